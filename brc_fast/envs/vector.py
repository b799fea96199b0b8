"""Any `gymnasium.vector.VectorEnv` as a task of ours: true successors, flat observations, scaled actions.

An image is kept as it is, and discrete actions count from 0.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from gymnasium import Space, spaces
from gymnasium.error import AlreadyPendingCallError, NoAsyncCallError
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from brc_fast.errors import InputError, SimulatorError, WorkerError
from brc_fast.spec import WIDEST, Box, Discrete, Field, Native, Spec

from .base import PRIVILEGED, STATE, GymnasiumFace, Seed, Step, check_start, finite_rows

log = logging.getLogger(__name__)

# Entries of info: MetaWorld's; Gymnasium-Robotics' and Stable-Baselines3's.
SUCCESS = ("success", "is_success")


def simulator_error(told: str, error: BaseException | None) -> NoReturn:
    """A SimulatorError from what an environment raised. The command line shows no traceback: it is logged."""
    log.error("%s", told, exc_info=error)
    raise SimulatorError(told) from error


class VectorAdapter(GymnasiumFace, VectorEnv[NDArray[Any], NDArray[Any], NDArray[Any]]):
    """N slots of one task, held by a vector environment that restarts them in any of Gymnasium's three ways.

    venv:               has the reset, step, close, spaces and metadata of a `gymnasium.vector.VectorEnv`. One
                        with `step_async` and `step_wait` is stepped while other groups are
    max_episode_steps:  longest episode in steps, None where nobody knows
    lost_key:           boolean entry of a step's info: the transition is lost, the observation a placeholder
    success_keys:       entries of a step's info, numbers or booleans of which the first that is there counts:
                        above zero, the task calls the step a success
    observation_space:  of one slot; a Dict with fewer keys than the environment's leaves the others out.
                        One Box of uint8 with two or more dimensions is an image and stays one, all else
                        becomes a vector. Of a Dict with the keys "state" and "privileged_state" alone the
                        policy sees the one, and the critic both (`privileged`)
    privileged_size:    numbers at the end of an observation of the space that the critic alone sees; those
                        of "privileged_state" when not given
    unflattened:        space of what the environment itself calls an observation, where the vector
                        environment makes one vector of it, with what the critic alone sees or without

    A number that is not finite loses its transition where the slot can be reset from outside (mode DISABLED);
    in the other modes it is passed on, for `check_finite` to report. Raises InputError for spaces that do not
    suit. A simulator's state cannot be saved: a loaded run goes on with new episodes.

    Subclasses may replace how the environments are driven: `_start`, `_send` and `_receive`.
    """

    def __init__(
        self,
        venv: Any,
        task: str,
        seed: int = 0,
        *,
        max_episode_steps: int | None,
        lost_key: str | None = None,
        success_keys: Sequence[str] = SUCCESS,
        observation_space: Space[Any] | None = None,
        privileged_size: int | None = None,
        unflattened: Space[Any] | None = None,
    ) -> None:
        self.venv = venv
        self.max_episode_steps = max_episode_steps
        self._lost_keys = [] if lost_key is None else [lost_key]
        self._success_keys = success_keys
        try:
            self._mode = AutoresetMode(venv.metadata.get("autoreset_mode"))
        except ValueError:
            raise InputError(
                f"the vector environment of {task} must say how it restarts: set metadata['autoreset_mode'] "
                "to one of gymnasium.vector.AutoresetMode"
            ) from None
        self._space = venv.single_observation_space if observation_space is None else observation_space
        actions = venv.single_action_space
        check_spaces(task, self._space, actions)
        if privileged_size is None:
            self._space, privileged_size = in_order(self._space)
        self._symmetric = isinstance(actions, spaces.Box) and bool((actions.low == -actions.high).all())
        spent = self._mode is AutoresetMode.NEXT_STEP
        spec = spec_of(task, self._space, actions, privileged_size)
        self.declare(spec, np.zeros(venv.num_envs, np.int64), seed, spent)
        if isinstance(actions, spaces.Box) and not is_image(self._space):
            self.natives = (native_of(spec, self._space if unflattened is None else unflattened, actions),)
        self.continues[:] = False
        self._set_key(seed)
        self._lost = 0
        self._steps = 0  # since the last reset
        self._running = False

    @property
    def when(self) -> str:
        """The step that is under way, in words."""
        return f"at step {self._steps} since the reset" if self._steps else "in the reset"

    @property
    def nan_count(self) -> NDArray[np.int64]:
        """Transitions lost since the last reset, [1]."""
        return np.array([self._lost], np.int64)

    def reset_tensors(self, seed: Seed) -> Tensor:
        self._lost = self._steps = 0
        if seed is None or isinstance(seed, int | np.integer):
            if seed is not None:
                self._set_key(int(seed))
            return self._restarted()
        if None not in seed:  # what follows depends on nothing else
            self._set_key([0 if each is None else int(each) for each in seed])
        return self._restarted(seed)

    def step_tensors(self, actions: Tensor) -> Step:
        return self.collect(self.launch(actions))

    def launch(self, actions: Tensor) -> Any:
        """Begin a step."""
        if not self._running:
            raise InputError("step needs a reset first: call reset or reset_tensors")
        self._steps += 1
        native = self._native(self.as_actions(actions))
        with self._simulating():
            return self._send(native)

    def collect(self, launched: Any) -> Step:
        with self._simulating():
            received = self._receive(launched)
        return self._as_step(*received)

    @contextmanager
    def _simulating(self) -> Iterator[None]:
        """Turn what the vector environment raises into a SimulatorError that names the task and the step."""
        try:
            yield
        except (InputError, WorkerError, AlreadyPendingCallError, NoAsyncCallError):
            raise
        except (Exception, SystemExit) as error:
            told = f"{self.task_names[0]}, {self.when}: raised {type(error).__name__}: {error}"
            simulator_error(told, error)

    def _start(self, seeds: list[int]) -> Any:
        """Reset all slots, slot i with seeds[i]; returns their observations."""
        own = isinstance(getattr(self.venv, "unwrapped", None), (SyncVectorEnv, AsyncVectorEnv))
        return self.venv.reset(seed=seeds if own else seeds[0])[0]  # others need only know a single seed

    def _send(self, actions: NDArray[Any]) -> Any:
        """Begin a step with actions in the environment's own form; what is returned goes to `_receive`."""
        if hasattr(self.venv, "step_async"):
            self.venv.step_async(actions)
        return actions

    def _receive(self, sent: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """End the step: what `VectorEnv.step` returns."""
        result = self.venv.step_wait() if hasattr(self.venv, "step_wait") else self.venv.step(sent)
        return result  # type: ignore[no-any-return]

    def _set_key(self, seed: int | list[int]) -> None:
        entropy = [*(seed if isinstance(seed, list) else [seed]), zlib.crc32(self.task_names[0].encode())]
        self._key = np.random.SeedSequence(entropy).generate_state(4, np.uint32)
        self._starts = 0  # times that all slots were started since the key was set

    def _restarted(self, given: Sequence[int | None] | None = None) -> Tensor:
        """Start all slots, with the given seeds or ones not used before."""
        sequence = np.random.SeedSequence([*self._key.tolist(), self._starts])
        self._starts += 1
        seeds = (sequence.generate_state(self.num_envs, np.uint32) >> 1).tolist()  # some take an int32
        if given is not None:
            seeds = [drawn if each is None else int(each) for drawn, each in zip(seeds, given, strict=True)]
        with self._simulating():
            start = self._start(seeds) if given is None else self.venv.reset(seed=seeds)[0]
        observations = self._read(start, self.num_envs)
        check_start(torch.from_numpy(observations), self, self.when)
        self._ended = np.zeros(self.num_envs, bool)
        self._running = True
        self._observations = observations.copy()
        start = torch.from_numpy(observations)
        return self.split(start, start)[0]

    def _read(self, observation: Any, count: int) -> NDArray[Any]:
        """A new array [count, ..] of `count` observations, stacked in every leaf of the space, with what the
        critic alone sees."""
        field = self.task_spec.fields[0]
        if is_image(self._space):
            read = np.array(observation)
            if read.dtype != np.uint8:
                raise InputError(
                    f"observations of {self.task_names[0]} must be uint8, got {read.dtype} {self.when}"
                )
            if count == 1 and read.shape == field.shape:
                read = read[None]
        else:
            parts = [np.reshape(leaf, (count, -1)) for leaf in leaves(self._space, observation)]
            read = np.concatenate(parts, axis=1, dtype=np.float32)
        self._check_shape("observations", read, count, *field.shape)
        return read

    def _check_shape(self, name: str, values: NDArray[Any], *shape: int) -> None:
        if values.shape != shape:
            raise InputError(
                f"{name} of {self.task_names[0]} must have shape {list(shape)}, got {list(values.shape)} "
                f"{self.when}"
            )

    def _native(self, actions: Tensor) -> NDArray[Any]:
        """Actions between the bounds of the space, and exactly the bounds at -1 and 1."""
        space = self.venv.single_action_space
        native: NDArray[Any] = actions.cpu().numpy().astype(space.dtype)
        if isinstance(space, spaces.Discrete):
            native += space.start
            return native
        native = native.reshape(self.num_envs, *space.shape).clip(-1, 1)
        if self._symmetric:
            native *= space.high
            return native
        share = (native + 1) / 2
        scaled: NDArray[Any] = space.low * (1 - share) + space.high * share
        return scaled

    def _as_step(
        self, raw: Any, rewards: Any, terminated: Any, truncated: Any, infos: dict[str, Any]
    ) -> Step:
        observations = self._read(raw, self.num_envs)
        successors = observations.copy()
        with np.errstate(over="ignore"):  # infinity, which `check_finite` tells
            rewards = np.array(rewards, np.float32)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        for name, values in (("rewards", rewards), ("terminated", terminated), ("truncated", truncated)):
            self._check_shape(name, values, self.num_envs)
        ended = terminated | truncated
        lost = self._flags(self._lost_keys, infos, ended)
        success = self._flags(self._success_keys, infos, ended)

        if self._mode is AutoresetMode.SAME_STEP:
            if ended.any() and "final_obs" not in infos:
                raise InputError(
                    f"{self.task_names[0]} restarts in the same step, so its infos must hold final_obs; they "
                    f"do not {self.when}"
                )
            for slot in ended.nonzero()[0]:
                successors[slot] = self._read(infos["final_obs"][slot], 1)[0]
        elif self._mode is AutoresetMode.DISABLED:
            finite = finite_rows(torch.from_numpy(successors)).numpy() & np.isfinite(rewards)
            if not finite.all():
                lost = ~finite if lost is None else lost | ~finite
                ended |= lost
            if ended.any():
                with self._simulating():
                    restarted, _ = self.venv.reset(options={"reset_mask": ended.copy()})
                observations[ended] = self._read(restarted, self.num_envs)[ended]

        dropped = np.zeros(self.num_envs, bool)
        if lost is not None:
            self._lost += int(lost.sum())
            successors[lost] = self._observations[lost]
            rewards[lost] = 0.0
            terminated &= ~lost
            truncated |= lost
            dropped |= lost
        if self._mode is AutoresetMode.NEXT_STEP:
            dropped |= self._ended  # the step after an end is spent on a reset
            rewards[self._ended] = 0.0
            self._ended = ended
        if success is not None:
            self.successes = torch.from_numpy(success & ~dropped)
        elif self.successes is not None:
            self.successes = torch.zeros(self.num_envs, dtype=torch.bool)
        self._observations = observations.copy()
        seen = self.split(torch.from_numpy(observations), torch.from_numpy(successors))
        return Step(*seen, *map(torch.from_numpy, (rewards, terminated, truncated, dropped)))

    def _flags(
        self, keys: Sequence[str], infos: dict[str, Any], ended: NDArray[np.bool_]
    ) -> NDArray[Any] | None:
        """Whether an entry of the infos of this step is above zero, [N], False where a slot has none; None
        without any."""
        if not infos:
            return None
        places = [(infos, ~ended)]
        if self._mode is not AutoresetMode.SAME_STEP:
            places = [(infos, ~self._ended)]  # not those that spent the step on a reset
        elif "final_info" in infos:  # what stands beside it belongs to the next episode
            places.append((infos["final_info"], ended))
        flags = None
        for source, slots in places:
            for key in keys:
                told = slots & source.get(f"_{key}", True)
                if key in source and told.any():
                    flags = np.zeros(self.num_envs, bool) if flags is None else flags
                    flags[told] = np.asarray(source[key])[told].astype(np.float32) > 0  # NaN is not
                    break
        return flags

    def state_dict(self) -> dict[str, NDArray[Any]]:
        if not self._starts:  # what was closed, or failed, still has it
            raise InputError("state_dict needs a reset first: call reset or reset_tensors")
        counts = np.array([self.num_envs, self._starts, self._lost], np.int64)
        return {"key": self._key.copy(), "counts": counts}

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> Tensor:
        task = self.task_names[0]
        wanted: Any = {"key": ((4,), np.uint32), "counts": ((3,), np.int64)}
        if {name: (x.shape, x.dtype) for name, x in state.items()} != wanted:
            got = ", ".join(f"{name}: {x.dtype}{list(x.shape)}" for name, x in state.items()) or "nothing"
            raise InputError(
                f"the saved state of {task} must hold key: uint32[4], counts: int64[3]; got {got}"
            )
        saved = int(state["counts"][0])
        if saved != self.num_envs:
            raise InputError(
                f"the saved state of {task} is that of {saved} environments and does not fit {self.num_envs}"
            )
        if state["counts"].min() < 0 or state["counts"].max() >= 2**62:
            raise InputError(
                f"the saved state of {task} must have counts in [0, 2**62), got {state['counts']}"
            )
        self._key = state["key"].copy()
        self._starts, self._lost = map(int, state["counts"][1:])
        self._steps = 0
        return self._restarted()

    def close_extras(self, **kwargs: Any) -> None:
        self._running = False
        self.venv.close()


def check_spaces(task: str, observation_space: Space[Any], action_space: Space[Any]) -> None:
    """Raise InputError unless observations are an image or can be made a vector, and actions are discrete, or
    continuous and bounded."""
    box = action_space if isinstance(action_space, spaces.Box) else None
    if not isinstance(action_space, spaces.Discrete) and (
        box is None or not np.issubdtype(box.dtype, np.floating)
    ):
        raise InputError(
            f"{task} has the action space {action_space}; only continuous actions with finite bounds, and "
            "discrete ones, can be used"
        )
    bounds = () if box is None else zip(box.low.flat, box.high.flat, strict=True)
    for number, (low, high) in enumerate(bounds):
        if not -WIDEST <= low <= high <= WIDEST:
            raise InputError(
                f"{task} has the action space {action_space}; only continuous actions with finite bounds can "
                f"be used, and action {number} lies in [{low:g}, {high:g}], where {WIDEST:g} and more is no "
                "bound; give the space those that the task uses, or wrap it in Gymnasium's TransformAction"
            )
        if low == high:
            raise InputError(
                f"{task} has the action space {action_space}, in which action {number} is always {low:g}; "
                "leave it out"
            )
    if not is_image(observation_space):
        check_vectors(task, observation_space)


def check_vectors(task: str, space: Space[Any]) -> None:
    """Raise InputError unless observations can be made a vector."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = space.spaces
        for part in parts.values() if isinstance(parts, dict) else parts:
            check_vectors(task, part)
    elif not isinstance(space, spaces.Box):
        raise InputError(
            f"{task} has {space} among its observations; only Box, and Dict and Tuple of Boxes, can be used"
        )
    elif is_image(space) or len(space.shape) > 2:
        raise InputError(
            f"{task} has {space} among its observations, an image; only vectors, or one image of uint8 and "
            "nothing else, can be used: take the task's version without pictures, or flatten them with "
            "Gymnasium's FlattenObservation"
        )


def is_image(space: Space[Any]) -> bool:
    """Whether observations are kept as they are: arrays of uint8, such as [H, W, C]. Others are flattened."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1


def in_order(space: Space[Any], privileged: bool = True) -> tuple[Space[Any], int]:
    """A space whose last numbers are the critic's alone, and how many; without them if not `privileged`."""
    if not isinstance(space, spaces.Dict) or set(space.spaces) != {STATE, PRIVILEGED}:
        return space, 0
    kept = (STATE, PRIVILEGED) if privileged else (STATE,)
    return spaces.Dict([(key, space[key]) for key in kept]), spaces.flatdim(space[PRIVILEGED]) * privileged


def spec_of(
    task: str, observation_space: Space[Any], action_space: Space[Any], privileged_size: int = 0
) -> Spec:
    """What a task observes and does, of spaces that were checked; InputError where there is nothing.

    privileged_size: numbers of an observation, its last ones, that the critic alone sees.
    """
    image = is_image(observation_space)
    shape = observation_space.shape if image else (spaces.flatdim(observation_space) - privileged_size,)
    size = spaces.flatdim(action_space)
    for side, sizes in (("observations", shape or ()), ("actions", (size,))):
        if 0 in sizes:
            raise InputError(f"{task} cannot be learned: it has no {side}")
    observation = Field(shape or (), "uint8" if image else "float32")
    discrete = isinstance(action_space, spaces.Discrete)
    privileged = Field((privileged_size,)) if privileged_size else None
    return Spec(observation, Discrete(size) if discrete else Box(size), (task,), privileged)


def native_of(spec: Spec, observation_space: Space[Any], action_space: spaces.Box) -> Native:
    """A task of this spec as its own environment has it.

    observation_space: before anything is flattened; what the critic alone sees may be left out of it.
    """
    parts = [(".".join(path) or "observation", shape) for path, shape in _named(observation_space)]
    size, kept = 0, []
    for name, shape in parts:
        if size < spec.observation.size:
            kept.append((name, shape))
            size += math.prod(shape)
    if size != spec.observation.size:  # one vector, of which the critic alone sees the end
        kept = [("observation", (spec.observation.size,))]
    low, high = (tuple(map(float, bound.flat)) for bound in (action_space.low, action_space.high))
    return Native(spec.tasks[0], tuple(kept), low, high)


def _named(space: Space[Any], *path: str) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Where the arrays of an observation lie, and their shapes, in the order of `leaves`."""
    if isinstance(space, spaces.Dict):
        for name, part in space.spaces.items():
            yield from _named(part, *path, name)
    elif isinstance(space, spaces.Tuple):
        for number, part in enumerate(space.spaces):
            yield from _named(part, *path, str(number))
    else:
        yield path, tuple(space.shape or ())


def leaves(space: Space[Any], observation: Any) -> Iterator[Any]:
    """The arrays of an observation in the order of its space."""
    if isinstance(space, spaces.Dict):
        for name, part in space.spaces.items():
            yield from leaves(part, observation[name])
    elif isinstance(space, spaces.Tuple):
        for part, value in zip(space.spaces, observation, strict=True):
            yield from leaves(part, value)
    else:
        yield observation
