"""DeepMind Control tasks of MuJoCo Playground: N environments in one compiled JAX program.

Differs from Playground's own training wrapper, which overwrites the last observation of an episode: here the
step returns the true successor as well, and a finished slot continues from a fresh start state. Start states
come from a ring of 2 * N that are computed ahead, N at a time, by the same program as the first reset; each
is used once, so restarting is as random as resetting and costs one batched reset per N restarts.
"""

from __future__ import annotations

import functools
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from brc_fast.errors import InputError

from . import _jax
from .base import GymnasiumFace, Step
from .suites import resolve

_jax.setup()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import mujoco  # noqa: E402
from jax.interpreters.partial_eval import dce_jaxpr  # noqa: E402
from mujoco_playground import registry  # noqa: E402


class Slots(NamedTuple):
    """What one step hands to the next and nobody else sees; its buffers are donated."""

    state: Any  # by name, the leaves of Playground's State that a step reads, less the observations
    steps: Any  # [N] int32, steps taken in the current episode
    restarts: Any  # [] int32, start states used so far
    dropped: Any  # [] int32, transitions lost to NaN so far


class Start(NamedTuple):
    """N start states."""

    observations: Any  # [N, O]
    state: Any  # as in Slots


class Programs:
    """Reset and step of one task for one number of slots, compiled once and shared by all its instances.

    MuJoCo's state has about a hundred arrays, nearly all of them results that the next step computes anew.
    Only the few that it reads are carried on; the compiler then leaves out the work behind the others.
    """

    def __init__(self, task: str, impl: str, num_envs: int) -> None:
        self.task = task
        self.num_envs = num_envs
        self.env = _load(resolve(task)[1], impl)
        self.episode_length = int(self.env._config.episode_length)
        self._key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        self._count = jax.ShapeDtypeStruct((), jnp.int32)
        self._reset_all = jax.jit(self._playground_reset)
        self._step_all = jax.jit(self._playground_step)
        self._template = jax.eval_shape(self._reset_all, self._key, self._count)
        self.observation_size = self._template.obs.shape[1]
        self.actions = jax.ShapeDtypeStruct((num_envs, self.env.action_size), jnp.float32)
        self._compiled = False

    def compile(self, quiet: bool) -> None:
        if self._compiled:
            return
        with _jax.progress(f"compiling {self.task} for {self.num_envs} environments", quiet):
            self._find_carried()
            self.start = jax.eval_shape(self._reset, self._key, self._count)
            steps = jax.ShapeDtypeStruct((self.num_envs,), jnp.int32)
            self.slots = Slots(self.start.state, steps, self._count, self._count)
            arguments = (
                self.slots,
                self.start.observations,
                (self.start, self.start),
                self.actions,
                self._count,
            )
            reset = jax.jit(self._reset).lower(self._key, self._count)
            step = jax.jit(self._step, donate_argnums=0).lower(*arguments)
            with ThreadPoolExecutor(2) as pool:  # the compiler itself uses one core
                self.reset, self.step = pool.map(lambda lowered: lowered.compile(), (reset, step))
        self._compiled = True

    def _find_carried(self) -> None:
        """Follow the step backwards from its results to the leaves of the state that decide them."""
        paths, self._structure = jax.tree.flatten_with_path(self._template)
        names = [jax.tree_util.keystr(path) for path, _ in paths]
        jaxpr = jax.make_jaxpr(self._step_all)(self._template, self.actions).jaxpr
        results = (".obs", ".reward", ".done", ".data.qpos", ".data.qvel")
        used = [name in results for name in names]
        while True:
            _, read = dce_jaxpr(jaxpr, used)
            wider = [a or b for a, b in zip(used, read, strict=False)]  # the actions come last
            if wider == used:
                break
            used = wider
        self._carried = {
            name.removeprefix("."): place
            for place, name in enumerate(names)
            if read[place] and name != ".obs"
        }

    def _playground_reset(self, key: Any, fill: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, fill), self.num_envs)
        return _strongly_typed(jax.vmap(self.env.reset)(keys))

    def _playground_step(self, state: Any, actions: Any) -> Any:
        return _strongly_typed(jax.vmap(self.env.step)(state, actions))

    def _pick(self, state: Any) -> Any:
        leaves = jax.tree.leaves(state)
        return {name: leaves[place] for name, place in self._carried.items()}

    def _complete(self, carried: Any, observations: Any) -> Any:
        """A full State again; what no step reads is zero."""
        leaves = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(self._template)]
        for name, place in self._carried.items():
            leaves[place] = carried[name]
        return jax.tree.unflatten(self._structure, leaves).replace(obs=observations)

    def _reset(self, key: Any, fill: Any) -> Start:
        """N start states; `fill` counts the calls with the same key."""
        state = self._reset_all(key, fill)
        return Start(state.obs, self._pick(state))

    def _step(self, slots: Slots, observations: Any, ring: Any, actions: Any, limit: Any) -> Any:
        state = self._step_all(self._complete(slots.state, observations), actions)
        steps = slots.steps + 1

        checked = (state.obs, state.reward[:, None], state.data.qpos, state.data.qvel)
        dropped = ~jnp.all(jnp.isfinite(jnp.concatenate(checked, axis=1)), axis=1)
        successors = jnp.where(dropped[:, None], observations, state.obs)
        rewards = jnp.where(dropped, 0.0, state.reward)
        terminated = (state.done > 0) & ~dropped  # Playground also calls a NaN state done
        truncated = (steps >= limit) | dropped
        ended = terminated | truncated

        place = (slots.restarts + jnp.cumsum(ended) - 1) % (2 * self.num_envs)

        def restarted(old: Any, first: Any, second: Any) -> Any:
            mask = ended.reshape(ended.shape + (1,) * (old.ndim - 1))
            return jnp.where(mask, jnp.concatenate((first, second))[place], old)

        # Always computed: a `cond` is no faster on the CPU and makes the host wait on a GPU.
        current = jax.tree.map(restarted, Start(state.obs, self._pick(state)), *ring)
        slots = Slots(
            current.state,
            jnp.where(ended, 0, steps),
            slots.restarts + jnp.sum(ended, dtype=jnp.int32),
            slots.dropped + jnp.sum(dropped, dtype=jnp.int32),
        )
        return slots, Step(current.observations, successors, rewards, terminated, truncated, dropped)


_programs = functools.cache(Programs)


def _load(name: str, impl: str) -> Any:
    """Playground's environment, without MuJoCo's notes on old spellings in the models that it ships."""
    # Playground 0.2 compares versions as text: for it MuJoCo 3.17 comes before 3.3 and still has `find_body`.
    lacks_old_name = not hasattr(mujoco.MjSpec, "find_body")
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)  # the default also writes a log file to the work folder
    if lacks_old_name:
        mujoco.MjSpec.find_body = mujoco.MjSpec.body
    try:
        return registry.load(name, config_overrides={"impl": impl})
    finally:
        mujoco.set_mju_user_warning(handler)
        if lacks_old_name:
            del mujoco.MjSpec.find_body


def _strongly_typed(tree: Any) -> Any:
    """Cast every leaf to its own dtype: a weakly typed one would change the signature from call to call."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), tree)


class MJXVectorEnv(GymnasiumFace, VectorEnv[NDArray[np.float32], NDArray[np.float32], NDArray[Any]]):
    """`num_envs` copies of one task; see `brc_fast.envs.make` for the settings.

    The tensors of a `Step` belong to the caller and do not change when stepping on. Compiles at the first
    reset or `load_state_dict`; environments with equal task, impl and num_envs share what is compiled.
    """

    def __init__(
        self,
        task: str,
        num_envs: int,
        seed: int = 0,
        *,
        impl: str = "jax",
        episode_length: int | None = None,
        quiet: bool = False,
    ) -> None:
        self._programs = _programs(task, impl, num_envs)
        self._quiet = quiet
        self.max_episode_steps = episode_length or self._programs.episode_length
        self.declare(
            task_names=(task,),
            task_ids=np.zeros(num_envs, np.int64),
            observation_size=self._programs.observation_size,
            action_size=self._programs.env.action_size,
            seed=seed,
        )
        self._limit = jnp.array(self.max_episode_steps, jnp.int32)
        self._key = np.zeros(2, np.uint32)
        self._fills = 0  # calls of the reset program since the key was set
        self._slots: Slots | None = None

    @property
    def nan_count(self) -> NDArray[np.int64]:
        """Transitions dropped since the last reset, [1]."""
        return np.array([0 if self._slots is None else int(self._slots.dropped)], np.int64)

    def reset_tensors(self, seed: int | None) -> Tensor:
        if seed is not None:
            entropy = [seed, zlib.crc32(self.task_names[0].encode())]
            self._key = np.random.SeedSequence(entropy).generate_state(2, np.uint32).astype(np.uint32)
            self._fills = 0
        self._programs.compile(self._quiet)
        _wait_for_torch()
        start = self._fresh()
        zero = np.int32(0)
        steps = np.zeros(self.num_envs, np.int32)
        self._slots = Slots(start.state, *map(jnp.array, (steps, zero, zero)))
        self._observations = start.observations
        self._ring = [self._fresh()] * 2  # the second half is filled before it is needed
        self._halves = 1  # halves of the ring filled since the reset
        return from_dlpack(self._observations)

    def step_tensors(self, actions: Tensor) -> Step:
        return self.collect(self.launch(actions))

    def launch(self, actions: Tensor) -> Step:
        """Begin a step; `collect` turns the returned JAX arrays into tensors."""
        if self._slots is None:
            raise InputError("step needs a reset first: call reset or reset_tensors")
        # First of all: from here on JAX waits for the work that torch has queued on tensors of earlier steps.
        # Kept until the next step, when reading `restarts` shows that this one is over.
        self._actions = _to_jax(self.as_actions(actions))
        if int(self._slots.restarts) + self.num_envs > self._halves * self.num_envs:
            self._ring[self._halves % 2] = self._fresh()
            self._halves += 1
        step: Step
        self._slots, step = self._programs.step(
            self._slots, self._observations, tuple(self._ring), self._actions, self._limit
        )
        self._observations = step.observations
        return step

    @staticmethod
    def collect(step: Step) -> Step:
        return Step(*map(from_dlpack, step))

    def _fresh(self) -> Start:
        start: Start = self._programs.reset(self._key, np.int32(self._fills))
        self._fills += 1
        return start

    def state_dict(self) -> dict[str, NDArray[Any]]:
        if self._slots is None:
            raise InputError("state_dict needs a reset first: call reset or reset_tensors")
        leaves = jax.tree.leaves((self._slots, self._observations, tuple(self._ring)))
        state = {f"leaf/{i:04d}": np.array(leaf) for i, leaf in enumerate(leaves)}
        state["key"] = self._key.copy()
        state["fills"] = np.array([self._fills, self._halves], np.int64)
        return state

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> Tensor:
        programs = self._programs
        programs.compile(self._quiet)
        expected = (programs.slots, programs.start.observations, (programs.start, programs.start))
        paths, structure = jax.tree_util.tree_flatten_with_path(expected)
        wanted = {f"leaf/{i:04d}": (jax.tree_util.keystr(path), leaf) for i, (path, leaf) in enumerate(paths)}
        wanted["key"] = ("the seed's key", self._key)
        wanted["fills"] = ("counts of resets", np.zeros(2, np.int64))
        task = self.task_names[0]
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
        _wait_for_torch()
        arrays = [jnp.array(state[f"leaf/{i:04d}"]) for i in range(len(paths))]
        self._slots, self._observations, ring = jax.tree.unflatten(structure, arrays)
        self._ring = list(ring)
        self._key = np.array(state["key"])
        self._fills, self._halves = map(int, state["fills"])
        return from_dlpack(self._observations)

    def close_extras(self, **kwargs: Any) -> None:
        self._slots = None
        self._ring = []


def _to_jax(actions: Tensor) -> Any:
    if actions.is_cuda and jax.default_backend() == "gpu":
        return jax.dlpack.from_dlpack(actions.contiguous())
    return actions.cpu().numpy()  # 15 us, where DLPack takes 30


def _wait_for_torch() -> None:
    """Memory that JAX lent to torch may be handed out again while torch still reads it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
