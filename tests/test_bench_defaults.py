"""The benchmark of settings trains what is missing, keeps what is finished, and says what failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from extras import require

require("gymnasium", "tyro")
sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
import bench_defaults as bench
import harness

PENDULUM = bench.Task(("gym/Pendulum-v1",), 10_000)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TASKS", {"pendulum": PENDULUM})


def test_a_run_is_made_once_and_its_last_evaluations_are_the_figure(tasks: None, tmp_path: Path) -> None:
    words = ["--runs", str(tmp_path), "--variants", "lr-3e-4", "--seeds", "1", "--dry"]
    assert bench.main([*words, "--save", str(tmp_path / "told")]) == 0
    (entry,) = harness.read(tmp_path / "told.json")["measurements"]
    rows = map(json.loads, (tmp_path / "lr-3e-4" / "pendulum-0" / "metrics.jsonl").read_text().splitlines())
    returns = [row["eval/return_mean"] for row in rows if "eval/return_mean" in row]
    assert len(returns) == 2
    assert entry["value"] == pytest.approx(sum(returns) / 2)
    assert entry["better"] == "more"
    assert entry["seconds"][0] > 0.0
    record = tmp_path / "lr-3e-4" / "pendulum-0.json"
    written = record.stat().st_mtime_ns
    assert bench.main(words) == 0
    assert record.stat().st_mtime_ns == written


def test_a_run_that_fails_is_named_and_has_no_figure(
    tasks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "VARIANTS", {"wrong": bench.Variant(("--critic.width", "0"))})
    words = ["--runs", str(tmp_path), "--variants", "wrong", "--seeds", "1", "--dry"]
    assert bench.main([*words, "--save", str(tmp_path / "told")]) == 1
    assert "pendulum-0 ended with exit code 2" in capsys.readouterr().err
    (entry,) = json.loads((tmp_path / "told.json").read_text())["measurements"]
    assert entry["value"] is None
    assert entry["missing"] == "no run is finished"


def test_what_costs_more_takes_fewer_steps() -> None:
    dear = bench.Job("width-256", "cheetah", 0)
    assert dear.steps < bench.Job("batch-256", "cheetah", 0).steps < bench.Job("lr-1e-3", "cheetah", 0).steps
