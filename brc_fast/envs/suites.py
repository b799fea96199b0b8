"""Names of tasks and suites, checked without importing a simulator so that a typing error fails at once."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence

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
# Playground's robots; their models come from the MuJoCo menagerie, which its wheel does not hold.
_LOCOMOTION = """
    ApolloJoystickFlatTerrain BarkourJoystick BerkeleyHumanoidJoystickFlatTerrain
    BerkeleyHumanoidJoystickRoughTerrain G1JoystickFlatTerrain G1JoystickRoughTerrain Go1JoystickFlatTerrain
    Go1JoystickRoughTerrain Go1Getup Go1Handstand Go1Footstand H1InplaceGaitTracking H1JoystickGaitTracking
    Op3Joystick SpotFlatTerrainJoystick SpotGetup SpotJoystickGaitTracking T1JoystickFlatTerrain
    T1JoystickRoughTerrain
"""
_MANIPULATION = """
    AlohaHandOver AlohaSinglePegInsertion PandaPickCube PandaPickCubeOrientation PandaPickCubeCartesian
    PandaOpenCabinet PandaRobotiqPushCube LeapCubeReorient LeapCubeRotateZAxis AeroCubeRotateZAxis
"""
MJX_LOCOMOTION = tuple(_LOCOMOTION.split())
MJX_MANIPULATION = tuple(_MANIPULATION.split())
# The paper's easy DeepMind Control tasks that Playground has: all but the humanoid, point mass and swimmer of
# dmc25, and without the variants (running backwards and the like) that only the authors have.
_NOT_EASY = (
    "AcrobotSwingupSparse",
    "HumanoidStand",
    "HumanoidWalk",
    "HumanoidRun",
    "PointMass",
    "SwimmerSwimmer6",
)
_MT50 = """
    assembly basketball bin-picking box-close button-press-topdown button-press-topdown-wall button-press
    button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock
    door-open door-unlock hand-insert drawer-close drawer-open faucet-open faucet-close hammer
    handle-press-side handle-press handle-pull-side handle-pull lever-pull pick-place-wall
    pick-out-of-hole pick-place plate-slide plate-slide-side plate-slide-back plate-slide-back-side
    peg-insert-side peg-unplug-side soccer stick-push stick-pull push push-wall push-back reach reach-wall
    shelf-place sweep-into sweep window-open window-close
"""
_MT10 = """
    reach push pick-place door-open drawer-open drawer-close button-press-topdown peg-insert-side window-open
    window-close
"""
# Eight tasks that a small agent can learn: the published multi-task run has 0.98 or more successes in each at
# 50,000 steps. Half are learned by half of that (reach, drawer-close, door-close, handle-press), the others
# are between 0.00 and 0.54 there, so that curves differ where they rise. Eight motions: of the hand alone, a
# drawer, a hinge, two slides in opposite directions, a button, a lever and a plate.
_STUDY8 = """
    reach drawer-close door-close window-open window-close button-press-topdown handle-press plate-slide
"""
# New tasks for an agent that has learned study8: three with an object of its tasks and another goal, and one,
# a faucet, that it has not seen.
_HELD_OUT4 = "door-unlock handle-press-side plate-slide-back faucet-open"
# Tasks of Playground that share bodies: what to train on, and harder ones for the bodies seen there.
_PRETRAIN = """
    CartpoleBalance CartpoleSwingup FingerSpin FingerTurnEasy HopperStand ReacherEasy WalkerStand WalkerWalk
"""
_HELD_OUT = "CartpoleBalanceSparse CartpoleSwingupSparse FingerTurnHard HopperHop ReacherHard WalkerRun"
_H1 = "walk stand run stair crawl pole slide hurdle maze"
_H1HAND = (
    f"{_H1} sit_simple sit_hard balance_simple balance_hard reach spoon window insert_small insert_normal "
    "bookshelf_simple bookshelf_hard"
)

SUITES = {
    "mjx/dmc25": tuple(f"mjx/{name}" for name in MJX_TASKS),
    "mjx/dmc-easy": tuple(f"mjx/{name}" for name in MJX_TASKS if name not in _NOT_EASY),
    "mjx/pretrain": tuple(f"mjx/{name}" for name in _PRETRAIN.split()),
    "mjx/held-out": tuple(f"mjx/{name}" for name in _HELD_OUT.split()),
    "mjx/locomotion": tuple(f"mjx/{name}" for name in MJX_LOCOMOTION),
    "mjx/manipulation": tuple(f"mjx/{name}" for name in MJX_MANIPULATION),
    "dmc/dogs": tuple(f"dmc/dog-{name}" for name in ("stand", "walk", "trot", "run")),
    "dmc/humanoids": tuple(f"dmc/humanoid-{name}" for name in ("stand", "walk", "run")),
    "metaworld/mt50": tuple(f"metaworld/{name}-v3" for name in _MT50.split()),
    "metaworld/mt10": tuple(f"metaworld/{name}-v3" for name in _MT10.split()),
    "metaworld/study8": tuple(f"metaworld/{name}-v3" for name in _STUDY8.split()),
    "metaworld/held-out4": tuple(f"metaworld/{name}-v3" for name in _HELD_OUT4.split()),
    "humanoidbench/h1": tuple(f"humanoidbench/h1-{name}-v0" for name in _H1.split()),
    "humanoidbench/h1hand": tuple(f"humanoidbench/h1hand-{name}-v0" for name in _H1HAND.split()),
}
# Suites of the paper that nothing a user can install has: name -> why.
_NO_HANDS = (
    "the paper's {} objects turned by a Shadow hand: the authors have not published this environment; "
    "EnvPool's hand tasks are envpool/<id>, your own are gym/<module>:<id>"
)
UNAVAILABLE = {"shadowhand/train": _NO_HANDS.format(85), "shadowhand/test": _NO_HANDS.format(29)}
# Prefixes of task ids, each with what may follow.
BACKENDS = {
    "mjx": "a MuJoCo Playground task",
    "gym": "any registered Gymnasium id, gym/HalfCheetah-v5 or gym/module:id",
    "dmc": "<domain>-<task> of dm_control, dmc/dog-run",
    "envpool": "any EnvPool id, envpool/WalkerRun-v1",
    "metaworld": "a MetaWorld task, metaworld/reach-v3 (runs in EnvPool)",
    "humanoidbench": "an id of HumanoidBench, humanoidbench/h1-walk-v0 (your own checkout)",
}
KNOWN = {
    "mjx": (*MJX_TASKS, *MJX_LOCOMOTION, *MJX_MANIPULATION),
    "metaworld": tuple(f"{name}-v3" for name in _MT50.split()),
}
_HOW_TO_LIST = "all names: brc-fast envs"


def is_robot(task: str) -> bool:
    """Whether a task is one of MuJoCo Playground's that may have privileged_state."""
    backend, _, name = task.partition("/")
    return task.startswith("envpool/MuJoCoPlayground/") or (backend == "mjx" and name not in MJX_TASKS)


def list_tasks(suite: str = "mjx/dmc25") -> tuple[str, ...]:
    """Task ids of a suite, such as "mjx/CartpoleSwingup"; InputError for a name that is none."""
    if suite in UNAVAILABLE:
        raise InputError(f"{suite} cannot be made: {UNAVAILABLE[suite]}")
    if suite not in SUITES:
        every = ", ".join((*SUITES, *UNAVAILABLE))
        raise InputError(f"unknown suite {suite!r}; suites: {every}; simulators: {', '.join(BACKENDS)}")
    return SUITES[suite]


def expand(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """Task ids of what a user named: tasks, suites or both.

    Raises InputError for an unknown name, one that nothing has, and a task that appears twice.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise InputError("tasks must name at least one task, got an empty list")
    suites = (*SUITES, *UNAVAILABLE)
    found = [task for name in names for task in (list_tasks(name) if name in suites else (name,))]
    for task in found:
        resolve(task)
        if found.count(task) > 1:
            raise InputError(f"tasks must differ, but {task!r} is listed {found.count(task)} times")
    return tuple(found)


def resolve(task: str) -> tuple[str, str]:
    """Split a task id into backend and name.

    Raises InputError, which names the nearest ids, for one that does not exist. Whether a `gym`, `dmc`,
    `envpool` or `humanoidbench` id exists is known only to that library: `make` tells.
    """
    backend, slash, name = task.partition("/")
    if slash and backend == "shadowhand":
        raise InputError(f"{task} cannot be made: {UNAVAILABLE['shadowhand/train']}")
    if slash and backend not in BACKENDS:
        known = ", ".join(BACKENDS)
        told = f"unknown suite {backend!r} in task {task!r}; known suites: {known}; "
        hint = f"did you mean gym/{task}; " if _in_gymnasium(task) else ""
        raise InputError(f"{told}{hint}{_HOW_TO_LIST}")
    plain = re.sub("-v2-goal-observable$", "-v3", name) if backend == "metaworld" else name
    known_here = plain in KNOWN[backend] or _registered(plain) if backend in KNOWN else bool(name)
    if ":" in name and backend != "gym":  # would name a module to import
        known_here = False
    if not known_here:
        whole = [] if slash else _with_backend(task)
        hint = f"did you mean {' or '.join(whole)}; " if whole else _nearest(task)
        raise InputError(f"unknown task {task!r}; {hint}{_HOW_TO_LIST}")
    return backend, plain


def _with_backend(name: str) -> list[str]:
    """Tasks that are called `name` behind their backend, as far as can be told without a simulator."""
    plain = re.sub("-v2-goal-observable$", "-v3", name)
    found = [f"{backend}/{name}" for backend, known in KNOWN.items() if plain in known]
    found += [task for tasks in SUITES.values() for task in tasks if task.partition("/")[2] == name]
    if ":" in name or _in_gymnasium(name):
        found.append(f"gym/{name}")
    return list(dict.fromkeys(found))


def _in_gymnasium(name: str) -> bool:
    """Whether Gymnasium, if it is installed, knows an id."""
    if importlib.util.find_spec("gymnasium") is None:
        return False
    return name in importlib.import_module("gymnasium").registry


def body(task: str) -> str:
    """What tasks that move the same MuJoCo model share: the first word of their name."""
    return re.sub(r"(?<=[a-z0-9])[A-Z].*", "", task.partition("/")[2])


def _registered(name: str) -> bool:
    """Whether the user has added an environment of this name to Playground's registry."""
    suites = ("dm_control_suite", "locomotion", "manipulation")
    modules = [sys.modules.get(f"mujoco_playground._src.{suite}") for suite in suites]
    return any(name in getattr(module, "_envs", ()) for module in modules)


def _nearest(task: str) -> str:
    backend = task.partition("/")[0]
    names = [
        f"{prefix}/{name}"
        for prefix, known in KNOWN.items()
        if prefix == backend or backend not in KNOWN
        for name in known
    ]
    if "/" not in task and importlib.util.find_spec("gymnasium") is not None:
        names += [f"gym/{name}" for name in importlib.import_module("gymnasium").registry]
    names += [suite for suite in SUITES if suite.partition("/")[0] == backend or backend not in BACKENDS]
    by_lower = {name.rpartition("/")[2].lower(): name for name in names}
    wanted = task.rpartition("/")[2].lower()
    close = difflib.get_close_matches(wanted, by_lower, n=4, cutoff=0.0)
    return f"nearest: {', '.join(by_lower[key] for key in close)}; "
