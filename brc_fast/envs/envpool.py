"""EnvPool's environments in C++: MetaWorld, DeepMind Control with the dogs, robot hands, MyoSuite.

Left alone, a pool spends a step on restarting a finished slot. Here a slot is restarted on demand as soon as
it has ended, so that no step is wasted.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
from gymnasium.error import AlreadyPendingCallError
from gymnasium.spaces import Box, Dict, Tuple
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, create_empty_array
from numpy.typing import NDArray

from brc_fast.errors import InputError, MissingExtraError

from .vector import SUCCESS, VectorAdapter, check_spaces, in_order, is_image

log = logging.getLogger(__name__)

NO_LIMIT = 2**31 - 1  # EnvPool's max_episode_steps of a task that has none
METAWORLD_STEPS = 200  # of an episode, as in the publications that report MT50 with visible goals

# EnvPool has one set of observations for all tasks of a domain; these are dm_control's, in its order.
_HUMANOID = ("joint_angles", "head_height", "extremities", "torso_vertical", "com_velocity", "velocity")
_DOG = (
    "joint_angles",
    "joint_velocites",  # sic
    "torso_pelvis_height",
    "z_projection",
    "torso_com_velocity",
    "inertial_sensors",
    "foot_forces",
    "touch_sensors",
    "actuator_state",
)
_QUADRUPED = ("egocentric_state", "torso_velocity", "torso_upright", "imu", "force_torque")
_OBSERVATIONS = {
    **dict.fromkeys(("DogRun-v1", "DogStand-v1", "DogTrot-v1", "DogWalk-v1"), _DOG),
    **dict.fromkeys(("HumanoidRun-v1", "HumanoidStand-v1", "HumanoidWalk-v1"), _HUMANOID),
    **dict.fromkeys(("QuadrupedRun-v1", "QuadrupedWalk-v1"), _QUADRUPED),
    "FingerSpin-v1": ("position", "velocity", "touch"),
    "FishSwim-v1": ("joint_angles", "upright", "target", "velocity"),
    "FishUpright-v1": ("joint_angles", "upright", "velocity"),
    "HumanoidRunPureState-v1": ("position", "velocity"),
    "QuadrupedEscape-v1": (*_QUADRUPED, "origin", "rangefinder"),
    "QuadrupedFetch-v1": (*_QUADRUPED, "ball_state", "target_position"),
}
_SUCCESS = (*SUCCESS, "solved")  # of MetaWorld and Adroit, of Fetch and Shadow; of MyoSuite


class Pool(VectorEnv[NDArray[Any], NDArray[Any], NDArray[Any]]):
    """An EnvPool pool as a vector environment that is reset by mask (AutoresetMode.DISABLED).

    Observations are [N, O] float32, of a dictionary the entries named in `_OBSERVATIONS`, or all; or images
    [N, C, H, W] uint8. Of MuJoCo Playground's robots they are "state" and, where `privileged`, the
    `privileged_size` numbers of "privileged_state" behind it. `infos` holds "success" [N] where the task
    reports it, and nothing else. Keywords go to `envpool.make`.
    """

    def __init__(
        self, name: str, num_envs: int, render: bool = False, privileged: bool = True, **config: Any
    ) -> None:
        envpool = importlib.import_module("envpool")
        self.num_envs = num_envs
        threads = min(num_envs, _cores())
        self._make = partial(envpool.make_gymnasium, name, num_envs=num_envs, num_threads=threads, **config)
        if render:
            self.render_mode = "rgb_array"
            self._make.keywords["render_mode"] = self.render_mode
        with _no_warnings():
            spec = envpool.make_spec(name, **config)
            space = spec.gymnasium_observation_space
            self.single_action_space = spec.gymnasium_action_space
            self.action_space = batch_space(self.single_action_space, num_envs)
        longest = int(spec.config.max_episode_steps)
        self.max_episode_steps = None if longest >= NO_LIMIT else longest
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self._keys: Sequence[str] = ()
        leaves = [space]
        space, self.privileged_size = in_order(space, privileged)
        if isinstance(space, Dict):
            self._keys = _OBSERVATIONS.get(name, tuple(space))
            leaves = [space[key] for key in self._keys]
        boxes = [leaf for leaf in leaves if isinstance(leaf, Box)]
        if len(boxes) < len(leaves):
            raise InputError(f"envpool/{name} must have observations that are arrays of numbers, got {space}")
        check_spaces(f"envpool/{name}", space if is_image(space) else Tuple(boxes), self.single_action_space)
        self._image = is_image(space)
        self.unflattened = Dict(list(zip(self._keys, leaves, strict=True))) if self._keys else space
        flat = Box(-np.inf, np.inf, (sum(math.prod(box.shape) for box in boxes),), np.float32)
        self.single_observation_space = space if self._image else flat
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._success = next((key for key in _SUCCESS if f"info:{key}" in spec._state_keys), None)
        self._pool: Any = None
        self._pending = False  # a step was sent and not received
        self._newest: Any = create_empty_array(self.single_observation_space, num_envs)

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Restart all slots, or those of `options["reset_mask"]` [N] bool; returns all observations [N, O].

        EnvPool seeds a pool only when it makes it: with a seed there is a new one (1.3 s for a dog).
        """
        if self._pending:
            self.step_wait()
        if seed is not None or self._pool is None:
            self._pool = None  # ends the old threads before there are new ones
            # EnvPool's rule, slot i gets seed + i, would let runs with neighbouring seeds share their starts.
            drawn = np.random.SeedSequence(seed).generate_state(self.num_envs) >> 1  # an int32 each
            seeds = seed if isinstance(seed, list) else drawn.tolist()
            with _no_warnings():
                self._pool = self._make(seed=[each % 2**31 for each in seeds])
                _ = self._pool.observation_space  # made, and kept, at its first use
        mask = (options or {}).get("reset_mask")
        slots = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        observations = self._newest.copy()
        observations[slots] = self._read(self._pool.reset(slots.astype(np.int32))[0], len(slots))
        self._newest = observations
        return observations, {}

    def step_async(self, actions: NDArray[Any]) -> None:
        if self._pending:
            raise AlreadyPendingCallError("step_wait has to follow step_async", "step")
        self._pool.send(actions)
        self._pending = True

    def step_wait(self) -> tuple[NDArray[Any], Any, Any, Any, dict[str, Any]]:
        observations, rewards, terminated, truncated, infos = self._pool.recv()
        self._pending = False
        self._newest = self._read(observations, self.num_envs)
        named = {} if self._success is None else {"success": infos[self._success]}
        return self._newest, rewards, terminated, truncated, named

    def step(self, actions: NDArray[Any]) -> tuple[NDArray[Any], Any, Any, Any, dict[str, Any]]:
        self.step_async(actions)
        return self.step_wait()

    def render(self) -> tuple[Any, ...]:
        """A picture [H, W, 3] of the first slot. Without OpenGL in this process EnvPool would end it."""
        return tuple(self._pool.render())

    def close_extras(self, **kwargs: Any) -> None:
        self._pool = None  # EnvPool's own close leaves the threads running, its destructor ends them

    def _read(self, observations: Any, count: int) -> NDArray[Any]:
        if self._image:
            return np.array(observations)
        leaves = [observations[key] for key in self._keys] if self._keys else [observations]
        return np.concatenate([leaf.reshape(count, -1) for leaf in leaves], axis=1, dtype=np.float32)


def make_envpool(
    task: str,
    num_envs: int,
    seed: int = 0,
    *,
    episode_length: int | None = None,
    privileged: bool = True,
    render: bool = False,
) -> VectorAdapter:
    """Make `num_envs` slots of a task in EnvPool, on as many threads as there are cores to use.

    envpool/<id>         as EnvPool has it, but MetaWorld's goals are visible, and the observations of
                         DeepMind Control are those of dm_control
    metaworld/<name>     envpool/MetaWorld/<Name> with episodes of 200 steps instead of 500. A name of version
                         2, such as assembly-v2-goal-observable, runs version 3, with a warning
    dmc/<domain>-<task>  envpool/<DomainTask>-v1

    privileged: give the critics of MuJoCo Playground's robots their privileged_state.

    Raises MissingExtraError without envpool, InputError for an id that it does not have and for actions or
    observations that cannot be used.
    """
    suite, _, rest = task.partition("/")
    known = _known(suite)
    name = rest
    if suite == "metaworld":
        base, _, version = re.sub("-v2-goal-observable$", "-v3", rest).rpartition("-")
        if not rest.endswith(version):
            _warn_once(f"{task} runs as metaworld/{base}-v3: EnvPool has only version 3 of MetaWorld")
        name = f"MetaWorld/{_camel(base)}-{version}"
    elif suite == "dmc":
        name = f"{_camel(rest)}-v1"
    if name not in known:
        raise InputError(f"unknown task {task!r}; {_nearest(name, suite, known)}")
    config: dict[str, Any] = {"partially_observable": False} if name.startswith("MetaWorld/") else {}
    if suite == "metaworld":
        config["max_episode_steps"] = METAWORLD_STEPS
    if episode_length is not None:
        config["max_episode_steps"] = episode_length
    pool = Pool(name, num_envs, render, privileged, **config)
    size, limit = pool.privileged_size, pool.max_episode_steps
    told: dict[str, Any] = {"privileged_size": size, "unflattened": pool.unflattened}
    return VectorAdapter(pool, task, seed, max_episode_steps=limit, **told)


def list_envpool(backend: str) -> tuple[str, ...]:
    """Task ids of envpool/ or metaworld/; MissingExtraError without EnvPool."""
    known = _known(backend)
    if backend == "metaworld":
        return tuple(f"{_metaworld(name)}" for name in known if name.startswith("MetaWorld/"))
    return tuple(f"envpool/{name}" for name in known)


def _known(suite: str) -> list[str]:
    """EnvPool's ids."""
    try:
        known: list[str] = importlib.import_module("envpool").list_all_envs()
    except ModuleNotFoundError as error:
        if error.name != "envpool":
            raise
        raise MissingExtraError(f"{suite}/... environments", "envpool") from error
    return known


def _camel(words: str) -> str:
    return "".join(word[:1].upper() + word[1:] for word in re.split("[-_]", words))


def _nearest(name: str, suite: str, known: Sequence[str]) -> str:
    tasks = {other: f"envpool/{other}" for other in known}
    if suite == "metaworld":
        tasks = {other: _metaworld(other) for other in known if other.startswith("MetaWorld/")}
    by_lower = {other.lower(): task for other, task in tasks.items()}
    close = difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.0)
    return f"nearest: {', '.join(by_lower[key] for key in close)}"


def _metaworld(name: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name.removeprefix("MetaWorld/"))
    return f"metaworld/{words.lower()}"


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Gymnasium warns of bounds that lose digits in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
