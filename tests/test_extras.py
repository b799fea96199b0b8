"""Every extra declares what its code imports: by the sources, and by what runs with all else out of sight."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions, packages_distributions, requires
from pathlib import Path

import pytest
from extras import (
    CORE,
    DISTRIBUTIONS,
    EXTRAS,
    PROJECT,
    ROOT,
    UNDECLARED,
    applies,
    declared,
    distribution,
    require,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from brc_fast.command import doctor

HIDING = Path(__file__).resolve().parent / "hiding"

# Files that need an extra, and all extras under which they run: each declares all that the file imports.
RUNS_UNDER = {
    "brc_fast/command/arguments.py": ("train",),
    "brc_fast/command/main.py": ("train",),
    "brc_fast/envs/_jax.py": ("mjx",),
    "brc_fast/envs/_playground.py": ("mjx",),
    "brc_fast/envs/_programs.py": ("mjx",),
    "brc_fast/envs/base.py": ("mjx", "gym", "dmc", "envpool", "train"),
    "brc_fast/envs/envpool.py": ("envpool",),
    "brc_fast/envs/gym.py": ("gym", "dmc"),
    "brc_fast/envs/mjx.py": ("mjx",),
    "brc_fast/envs/multitask.py": ("mjx", "gym", "dmc", "envpool", "train"),
    "brc_fast/envs/vector.py": ("mjx", "gym", "dmc", "envpool", "train"),
    "brc_fast/deploy/export.py": ("onnx",),
    "brc_fast/runs/convert.py": ("convert",),
    "brc_fast/runs/metrics.py": ("train",),
    "brc_fast/runs/plot.py": ("train",),
    "brc_fast/command/progress.py": ("train",),
    "brc_fast/command/study.py": ("train",),
    "brc_fast/runs/studies/picture.py": ("train",),
    "brc_fast/runs/video.py": ("video",),
    "brc_fast/runs/weights_and_biases.py": ("wandb",),
}
# Where it is there: torch brings Triton for a GPU, and an environment has brought its simulator.
IF_THERE = {
    "brc_fast/command/doctor.py": {"jax"},
    "brc_fast/deploy/policy.py": {"huggingface-hub"},
    "brc_fast/envs/gym.py": {"dm-control", "humanoid-bench"},
    "brc_fast/envs/suites.py": {"gymnasium"},
    "brc_fast/runs/video.py": {"triton", "playground"},
    "kernels/runtime/language.py": {"triton"},
    "kernels/tools/aot.py": {"triton"},
    "bench/bench_envs.py": {"envpool", "playground"},
    "tests/run_kills.py": {"matplotlib", "tensorboard"},  # of tests/test_endings.py, which asks for them
}
# Imported, but declared by another distribution, which pip follows.
BROUGHT_BY = {"flax": "brax", "ml-dtypes": "jax", "packaging": "pytest"}
# Declared, but imported by no line of ours: Gymnasium's id of a task names Shimmy; Playground builds on Brax,
# and torch's exporter to ONNX on onnxscript.
NEVER_IMPORTED = {"brax", "onnxscript", "pytest-xdist", "shimmy"}


def names(requirements: Iterable[Requirement]) -> set[str]:
    return {canonicalize_name(each.name) for each in requirements}


def sources() -> list[str]:
    folders = [ROOT / name for name in ("brc_fast", "kernels", "bench", "tests")]
    found = [path for folder in folders for path in folder.rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


# What a benchmark or a test imports from beside it
BESIDE = {path.stem for folder in ("bench", "tests") for path in (ROOT / folder).glob("[!.]*")}


@functools.cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse((ROOT / source).read_text())))


def modules(source: str) -> Iterator[str]:
    """Full names of the modules that a file imports, at its head or in a function."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    yield from called(source, "import_module", "importorskip")


def called(source: str, *functions: str) -> Iterator[str]:
    """Constant words that a file gives to functions of these names."""
    for node in nodes(source):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            words = (word.value for word in node.args if isinstance(word, ast.Constant))
            yield from (word for word in words if name in functions and isinstance(word, str))


def imported(source: str) -> set[str]:
    """Distributions, not ours and not Python's, that a file imports."""
    own = BESIDE | sys.stdlib_module_names | {"brc_fast"}
    return {distribution(name) for name in modules(source) if name.partition(".")[0] not in own}


def allowed(source: str) -> list[set[str]]:
    """What each extra under which a file runs declares, with what every install has."""
    folder = source.partition("/")[0]
    if folder == "tests":
        asked = set(called(source, "needs", "require"))
        extras = {"test"} | asked & EXTRAS.keys()
        found = [set().union(map(distribution, asked - extras), *(names(declared(one)) for one in extras))]
    else:
        extras = ("bench",) if folder == "bench" else RUNS_UNDER.get(source, ())
        found = [names(declared(extra)) for extra in extras] or [set()]
    common = names(CORE) | IF_THERE.get(source, set())
    return [each | common for each in found]


def test_what_a_file_imports_is_declared_by_each_extra_under_which_it_runs() -> None:
    for source in sources():
        for known in allowed(source):
            brought = {name for name, other in BROUGHT_BY.items() if other in known}
            assert imported(source) - known - brought == set(), source


def test_what_an_extra_declares_is_imported_somewhere() -> None:
    seen = set().union(*map(imported, sources())) | NEVER_IMPORTED
    for extra in EXTRAS.keys() - {"dev"}:
        assert names(declared(extra)) <= seen, extra


def test_the_tables_of_this_file_name_nothing_that_is_gone() -> None:
    assert RUNS_UNDER.keys() | IF_THERE.keys() <= set(sources())
    for source, optional in IF_THERE.items():
        assert optional <= imported(source)
    everything = set().union(*map(imported, sources()))
    assert BROUGHT_BY.keys() | {*DISTRIBUTIONS.values(), *UNDECLARED.values()} <= everything
    assert not NEVER_IMPORTED & everything


@pytest.mark.parametrize(("name", "other"), BROUGHT_BY.items())
def test_what_is_not_declared_here_is_declared_by_what_brings_it(name: str, other: str) -> None:
    try:
        texts = requires(other) or []
    except ModuleNotFoundError:
        require(other)
        raise
    assert name in names(filter(applies, map(Requirement, texts)))


def reached(requirements: Iterable[Requirement]) -> set[str]:
    """All distributions that these requirements bring, by what the installed ones declare."""
    waiting, seen = list(requirements), set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, extra))
            waiting += [each for each in map(Requirement, requires(name) or []) if applies(each, extra)]
    return {name for name, _ in seen}


def run(code: str, requirements: Iterable[Requirement], folder: Path, without: str = "") -> str:
    """What a script prints with nothing else installed, as far as it can see."""
    kept = (reached([*CORE, *requirements]) | {PROJECT["name"]}) - {without}
    owners = {name: set(map(canonicalize_name, those)) for name, those in packages_distributions().items()}
    owners |= {name: {canonicalize_name(owner)} for name, owner in DISTRIBUTIONS.items() if "." in name}
    hidden = {
        "modules": sorted(name for name, those in owners.items() if not those & kept),
        "distributions": sorted(
            one.name for one in distributions() if canonicalize_name(one.name) not in kept
        ),
    }
    environment = os.environ | {"PYTHONPATH": str(HIDING), "BRC_FAST_HIDDEN": json.dumps(hidden)}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "MUJOCO_GL": "disable", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


STEPPING = """
import torch
from brc_fast import envs
for task in {tasks}:
    env = envs.make(task, 2, quiet=True)
    env.reset_tensors(0)
    step = env.step_tensors(torch.zeros(env.num_envs, env.action_size))
    assert step.successors.shape == (2, env.observation_size), task
    env.close()
"""
TRAINING = """
import pathlib
from brc_fast.command import main as cli
sizes = ["--critic.width", "16", "--critic.num-atoms", "11", "--actor.width", "16", "--batch-size", "32"]
length = ["--steps", "300", "--random-steps", "100", "--eval-every", "200", "--eval-episodes", "1"]
words = ["gym/Pendulum-v1", "--run", "run", "--device", "cpu", "--replay-capacity", "1000", "--num-envs", "1"]
assert cli.main(["train", *words, *sizes, *length]) == 0
assert cli.main(["evaluate", "run"]) == 0
assert cli.main(["plot", "run"]) == 0
assert list(pathlib.Path("run/tensorboard").iterdir()) and pathlib.Path("run/learning_curve.png").exists()
"""
FILMING = """
import pathlib
import mujoco
import numpy as np
from brc_fast.runs import video
for name in ("a.gif", "a.mp4"):
    video.write((np.full((16, 16, 3), level, np.uint8) for level in (0, 99)), pathlib.Path(name), 10)
"""
COMPARING = f"""
import sys
sys.path.insert(0, {str(ROOT / "bench")!r})
import torch
from peers import jax_plain
from peers.replay import KINDS, Stored, filled
for name in KINDS:
    if name != "cpprb" or sys.version_info < (3, 13):
        filled(KINDS[name], Stored(67, 24, 1, 64, 320)).check(1, 64)
"""
ALONE = """
import importlib
import torch
import brc_fast as brc
for name in {modules}:
    importlib.import_module(name)
agent = brc.BRC(3, 1, critic=brc.CriticConfig(width=16), actor=brc.ActorConfig(width=16))
replay = brc.ReplayBuffer(100, 3, 1)
assert agent.act(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)).shape == (1, 1)
"""
CASES = {
    "gym": STEPPING.format(tasks=["gym/Pendulum-v1", "gym/HalfCheetah-v4", "gym/HalfCheetah-v5"]),
    "dmc": STEPPING.format(tasks=["dmc/cartpole-swingup"]),
    "envpool": STEPPING.format(tasks=["envpool/CartpoleSwingup-v1", "metaworld/reach-v3"]),
    "mjx": STEPPING.format(tasks=["mjx/PendulumSwingup"]),
    "train": TRAINING,
    "video": FILMING,
    "bench": COMPARING,
}


def plain() -> list[str]:
    """Modules of the package that need no extra."""
    found = [name for name in sources() if name.partition("/")[0] in ("brc_fast", "kernels")]
    found = [name for name in found if name not in RUNS_UNDER and "__main__" not in name]
    dotted = (name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in found)
    return [f"brc_fast.{name}" if name.startswith("kernels") else name for name in dotted]


def test_the_package_works_alone(tmp_path: Path) -> None:
    run(ALONE.format(modules=plain()), [], tmp_path)


@pytest.mark.parametrize("extra", CASES)
def test_an_extra_alone_is_enough_for_what_it_is_for(extra: str, tmp_path: Path) -> None:
    require(extra)
    run(CASES[extra], declared(extra), tmp_path)
    if extra == "mjx":
        assert list(tmp_path.rglob("programs/*"))  # flatbuffers keeps what was traced


@pytest.mark.parametrize("extra", doctor.EXTRAS | doctor.OPTIONAL)
def test_doctor_looks_for_what_an_extra_brings(extra: str) -> None:
    require(extra)
    assert set((doctor.EXTRAS | doctor.OPTIONAL)[extra]) <= reached(declared(extra))


@pytest.mark.slow
def test_tests_can_be_collected_with_their_extra_alone(tmp_path: Path) -> None:
    words = ["--collect-only", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")]
    code = f"import pytest, sys; sys.exit(pytest.main({words}))"
    assert "tests collected" in run(code, declared("test"), tmp_path)


def test_a_package_that_gymnasium_lacks_is_named_with_the_extra(tmp_path: Path) -> None:
    require("gym")
    code = """
from brc_fast import MissingExtraError, envs
try: envs.make("gym/HalfCheetah-v5", 1)
except MissingExtraError as error: print(error)
"""
    told = run(code, declared("gym"), tmp_path, without="imageio")
    assert told == 'gym/HalfCheetah-v5 needs the [gym] extra: pip install "brc-fast[gym]"\n'
