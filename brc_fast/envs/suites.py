"""Names of the known tasks, checked without importing a simulator so that a typing error fails at once."""

from __future__ import annotations

import difflib

from brc_fast.errors import InputError

# DeepMind Control tasks of MuJoCo Playground, in the order of its own registry.
MJX_TASKS = (
    "AcrobotSwingup",
    "AcrobotSwingupSparse",
    "BallInCup",
    "CartpoleBalance",
    "CartpoleBalanceSparse",
    "CartpoleSwingup",
    "CartpoleSwingupSparse",
    "CheetahRun",
    "FingerSpin",
    "FingerTurnEasy",
    "FingerTurnHard",
    "FishSwim",
    "HopperHop",
    "HopperStand",
    "HumanoidStand",
    "HumanoidWalk",
    "HumanoidRun",
    "PendulumSwingup",
    "PointMass",
    "ReacherEasy",
    "ReacherHard",
    "SwimmerSwimmer6",
    "WalkerRun",
    "WalkerStand",
    "WalkerWalk",
)
SUITES = {"mjx": MJX_TASKS}

_HOW_TO_LIST = "all names: brc-fast envs"


def list_tasks() -> tuple[str, ...]:
    """Every task id that `make` accepts, such as "mjx/CartpoleSwingup"."""
    return tuple(f"{suite}/{name}" for suite, names in SUITES.items() for name in names)


def resolve(task: str) -> tuple[str, str]:
    """Split a task id into suite and name.

    Raises InputError, which names the nearest ids, for one that does not exist.
    """
    suite, slash, name = task.partition("/")
    if slash and suite not in SUITES:
        known = ", ".join(SUITES)
        raise InputError(f"unknown suite {suite!r} in task {task!r}; known suites: {known}; {_HOW_TO_LIST}")
    if name not in SUITES.get(suite, ()):
        raise InputError(f"unknown task {task!r}; {_nearest(task)}{_HOW_TO_LIST}")
    return suite, name


def _nearest(task: str) -> str:
    by_lower = {name.rpartition("/")[2].lower(): name for name in list_tasks()}
    wanted = task.rpartition("/")[2].lower()
    close = difflib.get_close_matches(wanted, by_lower, n=4, cutoff=0.0)
    return f"nearest: {', '.join(by_lower[key] for key in close)}; "
