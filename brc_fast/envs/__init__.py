"""Vector environments: `make` one, or several tasks stepped together."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from brc_fast.config import check_keywords, keywords
from brc_fast.errors import InputError, MissingExtraError

from .suites import KNOWN, body, expand, list_tasks, resolve

if TYPE_CHECKING:
    from ._playground import Randomizer
    from .mjx import MJXVectorEnv
    from .multitask import MultiTaskEnv
    from .vector import VectorAdapter

__all__ = ["expand", "installed", "list_tasks", "make", "resolve"]

log = logging.getLogger(__name__)
_EXTRA = {"gym": "gym", "dmc": "dmc", "envpool": "envpool", "metaworld": "envpool", "humanoidbench": "gym"}
_MJX_NEEDS = ("jax", "mujoco", "mujoco_playground", "gymnasium")


def make(
    tasks: str | Sequence[str],
    num_envs: int,
    seed: int = 0,
    *,
    episode_length: int | None = None,
    impl: str = "jax",
    randomize: bool | Randomizer = False,
    processes: bool | None = None,
    restarts: int = 3,
    step_seconds: float | None = None,
    kwargs: Mapping[str, Any] | str | None = None,
    privileged: bool = True,
    render: bool = False,
    quiet: bool = False,
) -> MJXVectorEnv | VectorAdapter | MultiTaskEnv:
    """Make a vector environment of one task, or of several side by side.

    tasks:           a task id such as "mjx/CartpoleSwingup", a suite such as "mjx/dmc25", or a list of them,
                     all different; `brc-fast envs` prints what there is
    num_envs:        slots per task: T tasks give T * num_envs slots, grouped by task
    seed:            used by the first `reset` that names none
    episode_length:  environment steps; None: the task's own
    impl:            MJX's simulator, "jax" or "warp" (mjx/ tasks)
    randomize:       a new physical model for every episode: True for Playground's own randomization of the
                     task, or a function (model, keys [N, 2]) -> (model, in_axes) as it has (mjx/ tasks)
    processes:       a process per environment (gym/, dmc/ and humanoidbench/ tasks): True, False, or None,
                     which means yes for dmc/ and humanoidbench/ with several slots, and no for gym/
    restarts:        how often the processes of a task are started again after one has died
    step_seconds:    a process that needs longer for a step or a reset counts as dead; None: there is no limit
    kwargs:          arguments of the environments' constructor, or a JSON object of such (gym/ tasks)
    privileged:      give critics the `privileged_state` of robots that have one (`env.privileged`)
    render:          make environments that can draw themselves, for `brc_fast.runs.video`
    quiet:           no compile progress on stderr

    Raises InputError for a name or number that cannot be used, MissingExtraError where the simulator is
    not installed. Nothing is compiled before the first reset.
    """
    names = expand(tasks)
    _at_least(1, "num_envs", num_envs)
    _at_least(0, "seed", seed)
    _at_least(0, "restarts", restarts)
    if episode_length is not None:
        _at_least(1, "episode_length", episode_length)
    if step_seconds is not None and not step_seconds > 0:
        raise InputError(f"step_seconds must be positive, got {step_seconds!r}")
    if not isinstance(privileged, bool):
        raise InputError(f"privileged must be True or False, got {privileged!r}")
    if not (isinstance(randomize, bool) or callable(randomize)):
        raise InputError(f"randomize must be True, False or a function, got {randomize!r}")
    if impl not in ("jax", "warp"):
        raise InputError(f"impl must be 'jax' or 'warp', got {impl!r}")
    if isinstance(kwargs, str):
        kwargs = keywords(kwargs)
    elif not isinstance(kwargs, Mapping | None):
        raise InputError(f"kwargs must be a dictionary or a JSON object, got {kwargs!r:.60}")
    kwargs = check_keywords(dict(kwargs or {}))
    backends = {resolve(task)[0] for task in names}
    for name, asked, takers in (
        ("impl", impl != "jax", {"mjx"}),
        ("randomize", bool(randomize), {"mjx"}),
        ("processes", processes is not None, {"gym", "dmc", "humanoidbench"}),
        ("step_seconds", step_seconds is not None, {"gym", "dmc", "humanoidbench"}),
        ("kwargs", bool(kwargs), {"gym"}),
    ):
        if asked and not takers & backends:
            suited = ", ".join(f"{taker}/..." for taker in sorted(takers))
            raise InputError(f"{name} means something to {suited} tasks only, and none of the tasks is one")

    groups: list[Any] = []
    bodies: dict[str, list[str]] = {}
    for task in names:
        backend, _ = resolve(task)
        if backend == "mjx":
            bodies.setdefault(body(task), []).append(task)
            continue
        gym: dict[str, Any] = {"processes": processes, "restarts": restarts, "step_seconds": step_seconds}
        if backend == "gym":
            gym["kwargs"] = kwargs
        shown = {"episode_length": episode_length, "privileged": privileged, "render": render}
        groups.append(_simulated(task, num_envs, seed, shown, gym))
    for together in bodies.values():
        settings: dict[str, Any] = {"episode_length": episode_length, "impl": impl, "randomize": randomize}
        settings |= {"privileged": privileged, "quiet": quiet}
        groups.append(_mjx(tuple(together), num_envs, seed, settings))
    if len(groups) == 1:
        return groups[0]  # type: ignore[no-any-return]
    from .multitask import MultiTaskEnv

    return MultiTaskEnv(groups, names, seed, quiet)


def _mjx(tasks: tuple[str, ...], num_envs: int, seed: int, settings: dict[str, Any]) -> MJXVectorEnv:
    if any(map(_missing, _MJX_NEEDS)):
        raise MissingExtraError("mjx/... environments", "mjx")
    from .mjx import MJXVectorEnv

    return MJXVectorEnv(tasks, num_envs, seed, **settings)


def _simulated(
    task: str, num_envs: int, seed: int, settings: dict[str, Any], gym: dict[str, Any]
) -> VectorAdapter:
    """One task of a simulator that runs on the CPU; `gym` has further arguments of `make_gym`."""
    backend, _ = resolve(task)
    if _missing("gymnasium"):
        raise MissingExtraError(f"{backend}/... environments", _EXTRA[backend])
    here = backend in ("gym", "humanoidbench") or (
        backend == "dmc" and not (_missing("shimmy") or _missing("dm_control"))
    )
    if backend == "dmc" and not here and not _missing("envpool"):
        log.warning("%s runs in EnvPool: dm_control is not installed", task)
    elif backend == "dmc" and not here:
        raise MissingExtraError("dmc/... environments", "dmc")
    if here:
        from .gym import make_gym

        return make_gym(task, num_envs, seed, **settings, **gym)
    from .envpool import make_envpool

    return make_envpool(task, num_envs, seed, **settings)


def installed(backend: str) -> tuple[str, ...]:
    """Task ids that a simulator of `suites.BACKENDS` has here, in the order of its own list.

    Raises MissingExtraError where it is not installed.
    """
    if backend == "mjx":
        if any(map(_missing, _MJX_NEEDS)):
            raise MissingExtraError("mjx/... environments", "mjx")
        return tuple(f"mjx/{name}" for name in KNOWN["mjx"])
    if _missing("gymnasium"):
        raise MissingExtraError(f"{backend}/... environments", _EXTRA[backend])
    if backend in ("envpool", "metaworld"):
        from .envpool import list_envpool

        return list_envpool(backend)
    from .gym import list_gym

    return list_gym(backend)


def _missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def _at_least(least: int, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
