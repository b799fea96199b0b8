"""Vector environments: `make` one, or several tasks stepped together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from brc_fast.errors import InputError, MissingExtraError

from .suites import list_tasks, resolve

if TYPE_CHECKING:
    from .mjx import MJXVectorEnv
    from .multitask import MultiTaskEnv

__all__ = ["list_tasks", "make", "resolve"]


def make(
    tasks: str | Sequence[str], num_envs: int, seed: int = 0, **settings: Any
) -> MJXVectorEnv | MultiTaskEnv:
    """Make a vector environment of one task, or of several side by side.

    tasks:     a task id such as "mjx/CartpoleSwingup", or a list of different ones
    num_envs:  slots per task: T tasks give T * num_envs slots, grouped by task
    seed:      used by the first `reset` that names none
    settings:  `episode_length` (steps; default: the task's own), `impl` ("jax" or "warp"), `quiet` (no
               compile progress on stderr)

    Raises InputError for a name or number that cannot be used, MissingExtraError where the simulator is
    not installed. Nothing is compiled before the first reset.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise InputError("tasks must name at least one task, got an empty list")
    for task in names:
        resolve(task)
        if names.count(task) > 1:
            raise InputError(f"tasks must differ, but {task!r} is listed {names.count(task)} times")
    _at_least(1, "num_envs", num_envs)
    _at_least(0, "seed", seed)
    if settings.get("episode_length") is not None:
        _at_least(1, "episode_length", settings["episode_length"])
    if settings.get("impl", "jax") not in ("jax", "warp"):
        raise InputError(f"impl must be 'jax' or 'warp', got {settings['impl']!r}")

    try:
        from .mjx import MJXVectorEnv
        from .multitask import MultiTaskEnv
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("brc_fast"):
            raise
        raise MissingExtraError("mjx/... environments", "mjx") from error

    groups = [MJXVectorEnv(task, num_envs, seed, **settings) for task in names]
    return groups[0] if len(groups) == 1 else MultiTaskEnv(groups, seed)


def _at_least(least: int, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
