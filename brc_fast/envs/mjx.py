"""MuJoCo Playground tasks on MJX: N environments of one or several tasks in one compiled JAX program.

Differs from Playground's own training wrapper, which overwrites the last observation of an episode: here the
step returns the true successor as well, and a finished slot continues from a fresh start state. Start states
come from a ring of three per slot that are computed ahead, by the same program as the first reset; each is
used once, so restarting is as random as resetting and costs one batched reset per n restarts of a task. How
many were used is read one step late, so the host never waits for the step that is under way.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from brc_fast.errors import InputError
from brc_fast.spec import Field, Native, Spec

from . import _jax
from ._programs import BLOCKS, Slots, Start, programs
from .base import STATE, GymnasiumFace, Seed, Step, check_start

_jax.setup()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

if TYPE_CHECKING:
    from ._playground import Randomizer


ALIGNMENT = 16  # bytes, which XLA demands of the arguments of a program


class MJXVectorEnv(GymnasiumFace, VectorEnv[NDArray[np.float32], NDArray[np.float32], NDArray[Any]]):
    """`num_envs` copies of every task; see `brc_fast.envs.make` for the settings.

    The tensors of a `Step` belong to the caller and do not change when stepping on. Compiles at the first
    reset or `load_state_dict`; environments with equal tasks, impl and num_envs share what is compiled. Tasks
    of one body (see `suites.body`) share the simulator's work; others can stand together, but gain nothing.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        num_envs: int,
        seed: int = 0,
        *,
        impl: str = "jax",
        episode_length: int | None = None,
        randomize: bool | Randomizer = False,
        privileged: bool = True,
        quiet: bool = False,
    ) -> None:
        with _jax.progress(f"tracing {', '.join(tasks)}", quiet):
            self._programs = programs(tasks, impl, num_envs, randomize, privileged)
        self._quiet = quiet
        sizes = self._programs.sizes
        limits = [episode_length or length for length in sizes.episode_lengths]
        self.max_episode_steps = max(limits)
        spec = Spec.vectors(sizes.observation, sizes.action, tasks)
        self.declare(
            replace(spec, privileged=Field((sizes.privileged,))) if sizes.privileged else spec,
            task_ids=np.repeat(np.arange(len(tasks)), num_envs),
            seed=seed,
        )
        own = zip(tasks, sizes.own, strict=True)
        self.natives = tuple(
            Native(task, ((STATE, (seen,)),), (-1.0,) * size, (1.0,) * size) for task, (seen, size) in own
        )
        self._limits = np.array(limits, np.int32)
        self._keys = np.zeros((len(tasks), 2), np.uint32)
        self._fills = 0  # calls of the reset program since the keys were set
        self._slots: Slots | None = None
        self._actions: tuple[Any, Any] = (None, None)
        self._used: tuple[Any, Any]  # [T] start states used until the step before last, until the last

    @property
    def nan_count(self) -> NDArray[np.int64]:
        """Transitions dropped since the last reset, [T]."""
        count = np.zeros(len(self.task_names)) if self._slots is None else np.asarray(self._slots.dropped)
        return count.astype(np.int64)

    def compile(self) -> None:
        """Compile reset and step, if nobody has; may run beside other environments' compilation."""
        self._programs.compile()

    def _compile_aloud(self) -> None:
        names = ", ".join(self.task_names)
        each = self.num_envs // len(self.task_names)
        with _jax.progress(f"compiling {names} for {each} environments", self._quiet):
            self.compile()

    def reset_tensors(self, seed: Seed) -> Tensor:
        if seed is not None:
            given = [seed] if isinstance(seed, int | np.integer) else [0 if x is None else x for x in seed]
            entropies = [[*given, zlib.crc32(task.encode())] for task in self.task_names]
            drawn = [np.random.SeedSequence(entropy).generate_state(2, np.uint32) for entropy in entropies]
            self._keys = np.stack(drawn).astype(np.uint32)
            self._fills = 0
        self._compile_aloud()
        _wait_for_torch()
        start = self._fresh()
        per_task = np.zeros(len(self.task_names), np.int32)
        counts = (np.zeros(self.num_envs, np.int32), per_task, per_task)
        self._slots = Slots(start.state, *map(jnp.array, counts))
        self._observations = start.observations
        self._ring = [self._fresh()] * BLOCKS  # all but the first are filled before they are needed
        self._filled = np.ones(len(self.task_names), np.int64)  # blocks of the ring filled since the reset
        self._used = per_task, per_task
        check_start(from_dlpack(self._observations), self)
        return self._started()

    def step_tensors(self, actions: Tensor) -> Step:
        return self.collect(self.launch(actions))

    def launch(self, actions: Tensor) -> Step:
        """Begin a step; `collect` turns the returned JAX arrays into tensors."""
        if self._slots is None:
            raise InputError("step needs a reset first: call reset or reset_tensors")
        # First of all: from here on JAX waits for the work that torch has queued on tensors of earlier steps.
        # Kept for two steps, when `_refill` has waited for this one to be over.
        self._actions = _to_jax(self.as_actions(actions).clamp(-1, 1)), self._actions[0]
        self._refill()
        step: Step
        self._slots, used, step = self._programs.step(
            self._slots, self._observations, tuple(self._ring), self._actions[0], self._limits
        )
        used.copy_to_host_async()
        self._used = self._used[1], used
        self._observations = step.observations
        return step

    def collect(self, step: Step) -> Step:
        observations, successors, *rest = map(from_dlpack, step)
        return Step(*self.split(observations, successors), *rest)

    def _started(self) -> Tensor:
        start = from_dlpack(self._observations)
        return self.split(start, start)[0]

    def _fresh(self) -> Start:
        start: Start = self._programs.reset(self._keys, np.int32(self._fills))
        self._fills += 1
        return start

    def _refill(self) -> None:
        """Fill the next block of every task that could run out of start states in this step.

        The step before may still be under way: of each task it can have used one block more than is known.
        """
        each = self.num_envs // len(self.task_names)
        while (short := np.asarray(self._used[0]) + 2 * each > self._filled * each).any():
            self._fill(short, each)

    def _fill(self, short: NDArray[np.bool_], each: int) -> None:
        _wait_for_torch()  # this program takes no actions, by which a step waits
        fresh = self._fresh()
        for place in range(BLOCKS):
            taking = short & (self._filled % BLOCKS == place)
            if taking.all():
                self._ring[place] = fresh
            elif taking.any():
                rows = np.repeat(taking, each)[:, None]
                kept = self._ring[place]
                state = [
                    new if take else old
                    for take, new, old in zip(taking, fresh.state, kept.state, strict=True)
                ]
                self._ring[place] = Start(jnp.where(rows, fresh.observations, kept.observations), state)
        self._filled += short

    def state_dict(self) -> dict[str, NDArray[Any]]:
        if self._slots is None:
            raise InputError("state_dict needs a reset first: call reset or reset_tensors")
        leaves = jax.tree.leaves((self._slots, self._observations, tuple(self._ring)))
        state = {f"leaf/{i:04d}": np.array(leaf) for i, leaf in enumerate(leaves)}
        state["keys"] = self._keys.copy()
        state["fills"] = np.array([self._fills, *self._filled], np.int64)
        state["used"] = np.stack([np.asarray(used, np.int32) for used in self._used])
        return state

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> Tensor:
        self._compile_aloud()
        paths, structure = jax.tree_util.tree_flatten_with_path(self._programs.state)
        wanted = {f"leaf/{i:04d}": (jax.tree_util.keystr(path), leaf) for i, (path, leaf) in enumerate(paths)}
        wanted["keys"] = ("the seed's keys", self._keys)
        count = len(self.task_names)
        wanted["fills"] = ("counts of resets", np.zeros(1 + count, np.int64))
        wanted["used"] = ("start states used", np.zeros((2, count), np.int32))
        task = ", ".join(self.task_names)
        if state.keys() != wanted.keys():
            different = sorted(state.keys() ^ wanted.keys())
            raise InputError(
                f"the saved state of {task} must hold {len(wanted)} arrays, got {len(state)}; "
                f"missing or surplus: {', '.join(different[:4])}{', ...' if len(different) > 4 else ''}"
            )
        for name, (meaning, leaf) in wanted.items():
            got = state[name]
            if got.shape != leaf.shape or got.dtype != leaf.dtype:
                raise InputError(
                    f"the saved state of {task} does not fit {self.num_envs} environments: "
                    f"{name} ({meaning}) must be {leaf.dtype}{list(leaf.shape)}, "
                    f"got {got.dtype}{list(got.shape)}"
                )
        fills, filled, used = int(state["fills"][0]), state["fills"][1:], state["used"]
        each = self.num_envs // count
        if not (fills < 2**30 and (filled > 0).all() and (filled <= fills).all()) or not (
            (used >= 0).all() and (used <= filled * each).all()
        ):
            raise InputError(f"the saved state of {task} has counts of resets and start states that disagree")
        _wait_for_torch()
        arrays = [jnp.array(state[f"leaf/{i:04d}"]) for i in range(len(paths))]
        self._slots, self._observations, ring = jax.tree.unflatten(structure, arrays)
        self._ring = list(ring)
        self._keys = np.array(state["keys"])
        self._fills, self._filled = int(state["fills"][0]), np.array(state["fills"][1:])
        self._used = state["used"][0].copy(), state["used"][1].copy()
        return self._started()

    def close_extras(self, **kwargs: Any) -> None:
        self._slots = None
        self._ring = []


def _to_jax(actions: Tensor) -> Any:
    if actions.is_cuda and jax.default_backend() == "gpu":
        actions = actions.contiguous()
        if actions.data_ptr() % ALIGNMENT:
            actions = actions.clone()
        if not _waits():
            torch.cuda.current_stream(actions.device).synchronize()
        return jax.dlpack.from_dlpack(actions)
    return actions.cpu().numpy()  # 15 us, where DLPack takes 30


@functools.cache
def _waits() -> bool:
    """Whether JAX lets the device wait for what torch has queued on a tensor; where it has no stream for
    that, it takes the tensor as it is."""
    try:
        jax.devices()[0].get_stream_for_external_ready_events()
    except (AttributeError, RuntimeError):
        return False
    return True


def _wait_for_torch() -> None:
    """Memory that JAX lent to torch may be handed out again while torch still reads it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
