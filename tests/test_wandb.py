"""W&B: what a run logs there, read back from its own files; nothing of it is needed, or can end a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from extras import needs, require
from run_folders import SMALL

require("train")
from brc_fast.command import main as cli
from brc_fast.runs.metrics import read_rows

BLOCK, HEADER = 32768, 7  # of a log of LevelDB: checksum [4], length [2], kind [1]


def records(file: Path) -> Iterator[bytes]:
    """What was appended to a .wandb file, in order."""
    data, place, whole = file.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # all of a record, or its end
            yield whole
            whole = b""


def logged(run: Path) -> tuple[set[tuple[str, str]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Of all processes: projects and ids, the settings of each, and the rows."""
    from wandb.proto.wandb_internal_pb2 import Record

    names, settings, rows = set(), [], []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        for data in records(file):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                names.add((record.run.project, record.run.run_id))
                settings.append({one.key: json.loads(one.value_json) for one in record.run.config.update})
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {(one.key or ".".join(one.nested_key)): json.loads(one.value_json) for one in items}
                )
                assert rows[-1]["step"] == record.history.step.num
    return names, settings, rows


@needs("wandb")
def test_a_run_and_its_resume_are_one_run_there_with_every_row_once(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true", "X_DISABLE_STATS": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = tmp_path / "run"
    assert cli.main(["train", "toy/One", "--run", str(run), *SMALL, "--wandb", "toys"]) == 0
    assert cli.main(["train", "--resume", str(run), "--steps", "60", "--wandb=toys"]) == 0
    names, settings, rows = logged(run)
    assert names == {("toys", json.loads((run / "wandb.json").read_text())["id"])}
    assert settings[0]["critic.width"] == 8
    assert settings[0]["tasks"] == ["toy/One"]
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["step"], {}).update(
            {name: value for name, value in row.items() if name[0] != "_"}
        )
    wanted: dict[int, dict[str, Any]] = {}
    for row in read_rows(run / "metrics.jsonl"):  # a report and an evaluation of one step are one row there
        wanted.setdefault(row["step"], {}).update(row)
    assert sorted(found) == sorted(wanted) == [20, 40, 60]
    for step, row in wanted.items():
        numbers = {name: value for name, value in row.items() if value is not None}
        assert {name: found[step][name] for name in numbers} == numbers


def broken(where: str) -> SimpleNamespace:
    """A W&B that fails there."""

    def fail(name: str) -> None:
        if name == where:
            raise RuntimeError("the network\nis gone")

    def init(**_: Any) -> SimpleNamespace:
        fail("init")
        return SimpleNamespace(log=lambda row, step: fail("log"), finish=lambda: fail("finish"))

    return SimpleNamespace(init=init, Settings=lambda **_: None)


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_what_fails_there_is_told_once_and_the_run_goes_on(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", broken(where))
    run = tmp_path / "run"
    assert cli.main(["train", "toy/One", "--run", str(run), *SMALL, "--wandb", "toys"]) == 0
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [20, 20, 40, 40]
    assert caplog.messages == ["W&B: the network is gone; the run goes on without it"]


def test_without_the_package_one_line_says_how_to_get_it_and_without_the_option_nothing_needs_it(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = tmp_path / "run"
    words = ["train", "toy/One", "--run", str(run), *SMALL]
    assert cli.main([*words, "--wandb", "toys"]) == 2
    assert (
        capsys.readouterr().err
        == 'brc-fast: --wandb needs the [wandb] extra: pip install "brc-fast[wandb]"\n'
    )
    assert not run.exists()
    assert cli.main(words) == 0
    assert not (run / "wandb.json").exists()
