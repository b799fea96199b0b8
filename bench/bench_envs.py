"""Steps per second of our environments and of the same simulators driven by their own loop.

    python bench/bench_envs.py [--tasks TASK ...] [--workload NAME ...] [--num-envs N ...] [--device cpu|cuda]
        [--budget SECONDS] [--save NAME]

ours      `brc_fast.envs.make`: tensors, true successors, ended slots started again
library   mjx: Playground's step in jit(vmap), state donated, nothing restarted, waited for once per step
          gym, dmc: Gymnasium's SyncVectorEnv and AsyncVectorEnv, whichever ours runs in
          envpool, metaworld: the pool's own `step`

Before timing, their rewards over the first steps from the same start must agree. A step is that of one slot.
A suite of several tasks is stepped by ours alone, for the libraries have no loop over tasks. --device is
where the agent is whose actions come; MJX runs on the same kind of device, the others on the CPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import harness
import numpy as np
import torch
from harness import Clock, Differs, Missing, Parser, Results, Unavailable, interleave, positive, shares
from numpy.typing import NDArray
from workloads import WORKLOADS

from brc_fast.envs import expand, make

TASKS = (
    "mjx/CartpoleSwingup", "mjx/CheetahRun", "gym/Pendulum-v1", "gym/HalfCheetah-v5", "dmc/dog-run",
    "envpool/DogRun-v1", "metaworld/reach-v3",
)  # fmt: skip
SLOTS = {"mjx": 64, "gym": 8, "dmc": os.cpu_count() or 1, "envpool": 8, "metaworld": 16}
SERIES = {"mjx/CartpoleSwingup": (16, 64, 256)}  # steps against slots, of one that compiles in seconds
SEVERAL = 4  # slots of each task of a suite
COMPARED = 10  # steps before timing
TOLERANCE = 1e-3  # of rewards, relative and absolute: programs of XLA differ in rounding
ALONE = Unavailable("steps one task at a time; nothing to compare a suite with")

Actions = NDArray[np.float32]


class Library(NamedTuple):
    """The simulator's own loop, started as ours was."""

    step: Callable[[Any], Any]  # with one of `prepare`, waits for the end; returns the rewards [N]
    prepare: Callable[[Actions], Any]  # actions in [-1, 1] as the library takes them
    close: Callable[[], None] = lambda: None


# ---------------------------------------------------------------- the libraries' own loops


def playground(task: str, env: Any) -> Library:
    import jax
    from mujoco_playground import registry

    single = registry.load(task.partition("/")[2], config_overrides={"impl": "jax"})
    keys = jax.random.split(jax.random.fold_in(env.state_dict()["keys"][0], 0), env.num_envs)
    state = jax.jit(jax.vmap(single.reset))(keys)
    advance = jax.jit(jax.vmap(single.step), donate_argnums=0)

    def step(actions: Any) -> Any:
        nonlocal state
        state = jax.block_until_ready(advance(state, actions))
        return state.reward

    # A jitted function takes NumPy arrays faster than its own where both are in the host's memory.
    return Library(step, jax.device_put if jax.default_backend() == "gpu" else np.asarray)


def vectorized(task: str, env: Any, seeds: Sequence[int]) -> Library:
    import gymnasium
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

    name = task.partition("/")[2]
    name = f"shimmy:dm_control/{name}-v0" if task.startswith("dmc/") else name
    kind, options = SyncVectorEnv, dict[str, Any]()
    if isinstance(env.venv, AsyncVectorEnv):  # `fork` is not safe beside the threads of torch and JAX
        kind, options = AsyncVectorEnv, {"context": "forkserver"}
    factories = [partial(gymnasium.make, name)] * env.num_envs
    venv = kind(factories, autoreset_mode=AutoresetMode.SAME_STEP, **options)
    venv.reset(seed=list(seeds))
    return Library(lambda a: venv.step(a)[1], partial(scaled, space=venv.single_action_space), venv.close)


def pooled(maker: Callable[[], Any]) -> Library:
    pool = maker()
    pool.reset()
    return Library(lambda actions: pool.step(actions)[1], partial(scaled, space=pool.action_space))


def scaled(actions: Actions, space: Any) -> NDArray[Any]:
    share = (actions.astype(np.float64) + 1.0) / 2.0
    found: NDArray[Any] = (space.low + share * (space.high - space.low)).astype(space.dtype)
    return found


def started(tasks: str, num_envs: int, device: str) -> Any:
    """Ours; Unavailable where MJX would run on another kind of device than the agent."""
    if device == "cuda" and tasks.startswith("mjx/"):
        import jax

        if (backend := jax.default_backend()) != "gpu":
            raise Unavailable(f"JAX sees no GPU, its backend is {backend}; install jax[cuda12]")
    return make(tasks, num_envs, quiet=True)


def both(task: str, num_envs: int, device: str) -> tuple[Any, Library]:
    """Ours after a reset, and the library's in the same start states: from the seeds that ours gives it."""
    backend = task.partition("/")[0]
    if backend in ("envpool", "metaworld") and importlib.util.find_spec("envpool"):
        envpool = importlib.import_module("envpool")
        with mock.patch.object(envpool, "make_gymnasium", wraps=envpool.make_gymnasium) as made:
            env = started(task, num_envs, device)
            env.reset_tensors(0)
        words, options = made.call_args
        return env, pooled(partial(envpool.make_gymnasium, *words, **options))
    env = started(task, num_envs, device)
    if backend == "mjx":
        env.reset_tensors(0)
        return env, playground(task, env)
    with mock.patch.object(env.venv, "reset", wraps=env.venv.reset) as reset:
        env.reset_tensors(0)
    return env, vectorized(task, env, reset.call_args_list[0].kwargs["seed"])


# ---------------------------------------------------------------- what is timed


def compare(found: Results, task: str, num_envs: int, clock: Clock, device: str = "cpu") -> None:
    """One case, actions from torch on `device`; a suite is stepped by ours alone."""
    count = len(expand(task))
    slots, missing, times = num_envs * count, Missing(), dict[str, list[float]]()
    shown: Any = {"case": f"{task} num_envs={slots}", "unit": "steps/s", "scale": slots}
    with missing.of("ours", "library"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the simulators, on bounds and versions
        made = (task, num_envs, device)
        env, library = (started(*made), None) if count > 1 else both(*made)
        with closing(env), closing(library or env):
            times = timed(env, library, slots, clock, device)
    if count > 1 and not missing:
        missing["library"] = ALONE
    at = {"steps/s": task, "slots": slots}
    found.case(times=times, ours="ours", missing=missing, at=at, **shown)


def timed(env: Any, library: Library | None, slots: int, clock: Clock, device: str) -> dict[str, list[float]]:
    """Seconds per step of all slots, once the rewards of both have agreed."""
    shape = (16, slots, env.action_size)
    actions = list(np.random.default_rng(0).uniform(-1.0, 1.0, shape).astype(np.float32))
    tensors = itertools.cycle([torch.from_numpy(action).to(device) for action in actions])

    def ours() -> None:
        rewards = env.step_tensors(next(tensors)).rewards
        harness.wait(rewards.device.type)
        rewards[0].item()

    work: dict[str, Callable[[], object]] = {"ours": ours}
    if library is None:
        env.reset_tensors(0)
    else:
        check(env, library, actions)
        prepared = itertools.cycle([library.prepare(action) for action in actions])
        work["library"] = lambda: library.step(next(prepared))
    for one in [*work.values()] * 2:
        one()  # compiles; JAX perhaps once more
    return interleave(work, clock.left)


def check(env: Any, library: Library, actions: Sequence[Actions]) -> None:
    for number, action in enumerate(actions[:COMPARED], start=1):
        ours = env.step_tensors(torch.from_numpy(action)).rewards.cpu().numpy()
        theirs = np.asarray(library.step(library.prepare(action)))
        if not np.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE):
            raise Differs(f"differs in step {number}: rewards {ours[:3]}, the library's {theirs[:3]}")


def usual(task: str) -> Sequence[int]:
    """Slots of a task, or of each of a suite, where none are asked for."""
    if len(expand(task)) > 1:
        return (SEVERAL,)
    return SERIES.get(task, (SLOTS.get(task.partition("/")[0], 8),))


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(120.0, workloads="+")
    parser.add_argument("--tasks", nargs="+", default=[], help=f"or suites; default: {' '.join(TASKS)}")
    told = f"slots; default: {SERIES | SLOTS}"
    parser.add_argument("--num-envs", type=positive, nargs="+", default=[], help=told)
    given = parser.parse_args(words)
    device = parser.device(given)
    asked = [*given.tasks, *(WORKLOADS[name].suite for name in given.workload or ())] or TASKS
    try:
        pairs = [(task, slots) for task in asked for slots in given.num_envs or usual(task)]
    except ValueError as error:
        parser.error(f"{error}")
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # else JAX takes a GPU that it sees
    with suppress(ImportError):
        import mujoco

        mujoco.set_mju_user_warning(lambda message: None)  # else on the terminal and in a file in this folder
    found = Results("envs", given.save, device=device)
    for (task, slots), clock in shares(pairs, given.budget):
        compare(found, task, slots, clock, device)
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
