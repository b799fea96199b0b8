"""The layout's promises: imports go downwards, and importing the package is cheap."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "brc_fast"

# What a module may import of the package: its own folder, and what the lines above it name.
LAYERS = (
    {"kernels", "_core"},
    {"errors", "config", "batch", "spec", "published", "disk"},
    {"learner", "nn", "replay", "envs"},
    {"agents"},
    {"analysis"},
    {"runs"},
    {"deploy"},
    {"command"},
    {"__main__"},
)


def imported(path: Path) -> set[str]:
    """Names of brc_fast's own folders and modules that a file imports, at any depth."""
    here = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        full: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            base += (node.module or "").split(".") if node.module else []
            full = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in full if name.startswith("brc_fast.")}
    return found - {"__version__"}


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def package_of(path: Path) -> str:
    """The module that a file is, or the folder that it is a part of."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_imports_go_downwards_only() -> None:
    layer = {name: index for index, names in enumerate(LAYERS) for name in names}
    for path in modules():
        name = package_of(path)
        for other in imported(path) - {name}:
            below = layer[other] < layer[name] or (layer[other] == layer[name] == 1)
            assert below, f"{path.relative_to(PACKAGE)} imports {other}, which is not below it"


def test_replay_and_returns_are_compiled_and_config_imports_nothing_but_errors() -> None:
    users = {path.stem for path in modules() if "_core" in imported(path) and package_of(path) != "replay"}
    assert users == {"normalizer"}
    assert imported(PACKAGE / "config.py") <= {"errors"}


def test_kernels_know_torch_and_themselves_alone() -> None:
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_what_runs_never_imports_what_measures_it() -> None:
    tools = ROOT / "kernels" / "tools"
    for path in [*modules(), *(ROOT / "kernels").rglob("*.py")]:
        if tools not in path.parents:
            for node in ast.walk(ast.parse(path.read_text())):
                base = (getattr(node, "module", None) or "").split(".")
                names = {alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)}
                assert "tools" not in {*base, *(part for name in names for part in name.split("."))}, path


def test_importing_the_package_brings_neither_jax_nor_triton_nor_plots() -> None:
    code = "import sys; before = set(sys.modules); import brc_fast; print(*(set(sys.modules) - before))"
    new = {name.partition(".")[0] for name in fresh.run(code).stdout.split()}
    assert "brc_fast" in new
    assert not new & {"jax", "triton", "mujoco", "gymnasium", "matplotlib", "tyro", "tqdm", "tensorboard"}


def test_importing_the_package_takes_under_a_fifth_of_a_second_beyond_torch() -> None:
    code = "import time; t = time.process_time(); import brc_fast; print(time.process_time() - t)"
    assert min(float(fresh.run(code).stdout) for _ in range(3)) < 0.2


def test_the_package_is_typed_and_has_its_compiled_parts() -> None:
    import brc_fast
    from brc_fast import _core
    from brc_fast.kernels.runtime import native

    assert (Path(brc_fast.__file__).parent / "py.typed").exists()
    assert _core.__name__ == "brc_fast._core"
    assert native.compiled is not None


@pytest.mark.parametrize("name", ["BRC", "ReplayBuffer", "RewardNormalizer", "Batch", "TrainConfig"])
def test_public_names_have_docstrings(name: str) -> None:
    import brc_fast

    assert len(getattr(brc_fast, name).__doc__) > 40
