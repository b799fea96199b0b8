"""The README's example runs as it stands, but for its length; its files and commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
KERNELS = (ROOT / "kernels" / "README.md").read_text()


def test_the_example_runs_and_learns_from_its_own_transitions() -> None:
    pytest.importorskip("mujoco_playground", reason="needs the [mjx] extra")
    code = examples()[0]
    shorter = code.replace("range(5_000)", "range(40)").replace(">= 5_000", ">= 300")
    assert shorter != code
    names: dict[str, Any] = {}
    exec(compile(shorter, "README.md", "exec"), names)
    assert len(names["replay"]) == 40 * 16
    assert names["metrics"]["critic_loss"].isfinite()


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_of_the_replay_buffer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(examples()[1], "README.md", "exec"), names)
    assert names["batch"].observations.shape == (2, 1024, 67)
    assert (tmp_path / "build" / "replay" / "manifest.json").exists()


def test_the_readme_is_short_and_its_pictures_and_files_exist() -> None:
    assert len(README.splitlines()) <= 200
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_make_demo_and_make_test_stand_on_the_first_screen_and_every_make_target_named_exists() -> None:
    first = "\n".join(README.splitlines()[:25])
    assert "make demo" in first
    assert "make test" in first
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.MULTILINE):
        assert name in targets, name


def test_the_example_of_the_critic_runs() -> None:
    names: dict[str, Any] = {}
    exec(compile(examples()[2], "README.md", "exec"), names)
    assert names["losses"].shape == names["values"].shape == (2, 256)
    assert all(parameter.grad.abs().sum() > 0 for parameter in names["critic"].parameters())


def test_the_example_of_the_kernels_runs() -> None:
    names: dict[str, Any] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", KERNELS, re.DOTALL)[0], "README.md", "exec"), names)
    assert names["logits"].grad.abs().sum() > 0


def test_the_kernels_readme_names_every_op() -> None:
    from brc_fast import kernels

    for name in set(kernels.__all__) - {"reference", "use"}:
        assert f"`{name}`" in KERNELS or name.endswith("_cross_entropy"), name
