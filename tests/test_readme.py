"""What the documents say can be run: their examples, made smaller, their commands, files and pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from extras import require

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()
KERNELS = (ROOT / "kernels" / "README.md").read_text()


def examples(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


def run(code: str, **shorter: str) -> dict[str, Any]:
    """The names that an example leaves, after each of these changes to it."""
    for old, new in shorter.items():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(code, "example", "exec"), names)
    return names


@pytest.mark.parametrize("file", ["README.md", "docs/agent.md"])
def test_the_loops_run_and_learn_from_their_own_transitions(file: str) -> None:
    require("mjx")
    names = run(examples(file)[0], **{"range(5_000)": "range(40)", ">= 5_000": ">= 300"})
    assert len(names["replay"]) == 40 * 16
    assert names["metrics"]["critic_loss"].isfinite()


def test_the_example_of_the_replay_buffer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(examples("docs/replay.md")[0])
    assert names["batch"].observations.shape == (2, 1024, 67)
    assert (tmp_path / "build" / "replay" / "manifest.json").exists()


def test_the_examples_of_training_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("gym")
    monkeypatch.chdir(tmp_path)
    train, policy, transfer = examples("docs/training.md")
    run(
        train,
        **{
            "steps=20_000": "steps=40, random_steps=20, batch_size=8, eval_episodes=1",
            "width=128": "width=16",
        },
    )
    assert run(policy)["actions"].shape == (1, 1)
    assert run(transfer)["grown"].num_tasks == 3


def test_the_examples_of_deploying_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("gym", "train", "onnx", "convert")
    from brc_fast.command import main as cli

    monkeypatch.chdir(tmp_path)
    sizes = ["--steps", "40", "--random-steps", "20", "--batch-size", "8", "--eval-episodes", "1"]
    sizes += [
        "--critic.width",
        "16",
        "--actor.width",
        "16",
        "--num-envs",
        "1",
        "--eval-every",
        "40",
        "--quiet",
    ]
    assert cli.main(["train", "gym/Pendulum-v1", "--run", "runs/gym-Pendulum-v1-seed0", *sizes]) == 0
    step, dictionary, onnx, pt2, folder = examples("docs/deploy.md")
    names = run(step, **{"range(200)": "range(3)"})
    exec(compile(dictionary, "example", "exec"), names)
    for line in re.findall(r"^    brc-fast (export|convert) (.*?)(?:#.*)?$", DEPLOY, re.MULTILINE):
        if "{" not in line[1]:
            assert cli.main([line[0], *line[1].split()]) == 0, line
    for example in (onnx, pt2, folder):
        run(example)


def test_the_readme_is_short_and_its_pictures_and_files_exist() -> None:
    assert len(README.splitlines()) <= 150
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_first_screen_has_the_commands_a_picture_of_each_kind_and_an_example() -> None:
    first = "\n".join(README.splitlines()[:40])
    for part in ("make demo", "make test", "](docs/demo.png)", "](docs/update-cpu.png)", "```python"):
        assert part in first
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.MULTILINE):
        assert name in targets, name


def test_the_example_of_the_kernels_runs() -> None:
    assert run(examples("kernels/README.md")[0])["logits"].grad.abs().sum() > 0


def test_the_kernels_readme_names_every_op() -> None:
    from brc_fast import kernels

    for name in set(kernels.__all__) - {"reference", "use", "Pass"}:
        assert f"`{name}`" in KERNELS or name.endswith("_cross_entropy"), name
