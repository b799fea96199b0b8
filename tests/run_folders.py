"""Runs for tests of the commands, and what lies in their folders."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import says

SMALL = [
    *("--num-envs", "2", "--steps", "40", "--random-steps", "20", "--batch-size", "16"),
    *("--critic.width", "8", "--actor.width", "8", "--report-every", "20", "--eval-every", "20"),
    *("--eval-episodes", "2", "--checkpoint-every", "20"),
]


def make_run(folder: Path, tasks: tuple[str, ...], seed: int = 0, sizes: tuple[int, int] = (2, 1)) -> Path:
    """A run with the checkpoint of an untrained agent."""
    from brc_fast import BRC
    from brc_fast.config import ActorConfig, CriticConfig, TrainConfig
    from brc_fast.runs.checkpoint import RunFolder
    from brc_fast.spec import Spec

    config = TrainConfig(tasks=tasks, critic=CriticConfig(width=8), actor=ActorConfig(width=8), seed=seed)
    run = RunFolder(folder)
    run.create(config)
    agent = BRC.from_config(config, Spec.vectors(*sizes, tasks), "cpu")

    class NoReplay:
        def save(self, folder: Path, *, previous: Path | None = None) -> None:
            folder.mkdir()

        def load(self, folder: Path) -> None: ...

    run.save(500, {"agent": {name: value.numpy() for name, value in agent.state_dict().items()}}, NoReplay())
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(folder: Path) -> dict[str, Any]:
    """What lies in a folder: kinds, links, contents and times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        told: Any = None
        if path.is_symlink():
            told = path.readlink()
        elif path.is_file():
            told = path.read_bytes()
        found[str(path)] = (status.st_mode, status.st_ino, status.st_nlink, status.st_mtime_ns, told)
    return found


def assert_one_line(
    words: Sequence[str], told: str, capsys: pytest.CaptureFixture[str], *folders: Path, silent: bool = True
) -> str:
    """The command is refused in these words, in the line that is returned, and `folders` are as they were.

    silent: nothing else is printed, as a run that is resumed prints its settings."""
    from brc_fast.command import main as cli

    before = [everything(folder) for folder in folders]
    capsys.readouterr()
    assert cli.main(list(words)) == 2
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert out == "" or not silent
    assert re.search(says(told), line), line
    assert [everything(folder) for folder in folders] == before
    return line


def rows_without_time(run: Path) -> list[dict[str, Any]]:
    from brc_fast.runs.metrics import read_rows

    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_rows(run / "metrics.jsonl")
    ]


def arrays(run: Path) -> dict[str, dict[str, np.ndarray]]:
    from brc_fast.runs.checkpoint import RunFolder

    return {**RunFolder(run).load("agent", "environments", "progress")[1], "replay": replay(run)}


def replay(run: Path) -> dict[str, np.ndarray]:
    """What the newest checkpoint's replay holds: its counters, and many samples of its transitions."""
    from brc_fast import ReplayBuffer
    from brc_fast.runs.checkpoint import RunFolder

    folder = RunFolder(run).newest() / "replay"
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    fields, content = manifest["fields"], manifest["content"]
    buffer = ReplayBuffer(
        sum(content["capacity"]),
        fields["observation"]["shape"],
        fields["action"]["shape"],
        task_ids=fields["task_ids"],
    )
    buffer.load(folder)
    counters = {name: np.array(content[name]) for name in ("count", "size", "draws")}
    return {**counters, **buffer.sample(len(buffer), 5).numpy()}


def assert_same_run(one: Path, two: Path) -> None:
    assert rows_without_time(one) == rows_without_time(two)
    left, right = arrays(one), arrays(two)
    for run in (left, right):  # a checkpoint may be older than the last of the rows, which were compared
        run["progress"].pop("rows")
    for part, values in left.items():
        assert values.keys() == right[part].keys()
        for name, value in values.items():
            np.testing.assert_array_equal(value, right[part][name], err_msg=f"{part}/{name}")
