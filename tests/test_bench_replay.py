"""The benchmark of replay buffers times nothing that is wrong and loses nothing that it has measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import bench_replay

    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield bench_replay
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def provider(bench: Any, check: Any = lambda: None) -> Any:
    return bench.Provider(lambda: sum(range(1000)), 10, check)


def test_a_case_measures_every_buffer_beside_the_bare_gather(bench: Any) -> None:
    names = (bench.OURS, "other", bench.LIMIT)
    missing = {"third": "is not installed"}
    found = bench.timed_case("1 x 8", "title", {name: provider(bench) for name in names}, missing, 0.0)
    *timed, absent = found["measurements"]
    assert [entry["provider"] for entry in timed] == list(names)
    for entry, row in zip(timed, found["rows"], strict=True):
        assert (entry["case"], entry["unit"], entry["better"]) == ("1 x 8", "ns per transition", "less")
        assert (entry["value"], entry["rounds"]) == (row["cpu"], row["rounds"])
        assert entry["floor"] == timed[2]["value"]
    assert (absent["provider"], absent["missing"]) == ("third", "is not installed")


def test_a_buffer_that_returns_something_else_has_a_reason_and_no_time(bench: Any) -> None:
    def wrong() -> None:
        raise ValueError("rewards differ")

    providers = {bench.OURS: provider(bench), "other": provider(bench, wrong)}
    found = bench.timed_case("1 x 8", "title", providers, {}, 0.0)
    absent = found["measurements"][1]
    assert (absent["provider"], absent["value"]) == ("other", None)
    assert absent["missing"] == "ValueError: rewards differ"


def test_memory_is_measured_exactly_and_files_over_their_rounds(bench: Any) -> None:
    (memory,) = bench.memory(bench.MIN_CAPACITY, bench.Clock(0.0))
    ours, other = memory["measurements"]
    assert 0 < ours["value"] < other["value"] == 4 * (2 * 67 + 24) + 8
    costs = {"ours save": [bench.files.Cost(2.0, 1.0, 0), bench.files.Cost(4.0, 1.0, 0)]}
    (save,) = bench.file_measurements(costs)
    assert (save["case"], save["provider"], save["value"], save["rounds"]) == (
        "files save",
        bench.OURS,
        3.0,
        2,
    )


def test_a_run_that_is_killed_leaves_what_it_measured(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import harness

    def killed(capacity: int, clock: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "GROUPS", bench.GROUPS | {"files": killed})
    words = ["bench_replay", "--capacity", f"{bench.MIN_CAPACITY}", "--save", str(tmp_path / "replay")]
    words += ["--budget", "0", "--cases", "memory"]
    monkeypatch.setattr(sys, "argv", [*words, "files"])
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    kept = harness.read(tmp_path / "replay.jsonl")
    assert [entry["case"] for entry in kept["measurements"]] == ["memory", "memory"]
    monkeypatch.setattr(sys, "argv", words)
    assert bench.main() == 0
    stored = harness.read(tmp_path / "replay.json")
    assert (stored["equality"], stored["measurements"]) == ("passed", kept["measurements"])
    assert not (tmp_path / "replay.jsonl").exists()


def test_a_workload_is_sampled_with_its_own_sizes_and_tasks(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[Any] = []

    def built(work: Any, missing: Any) -> Any:
        sampled.append(work)
        return original(work, missing, (bench.Authors,))

    original = bench.built
    monkeypatch.setattr(bench, "built", built)
    shape = bench.WORKLOADS["dogs-multitask"]
    (found,) = bench.on_workload(shape.name, bench.MIN_CAPACITY, bench.Clock(0.0))
    (work,) = sampled
    assert (work.observation_size, work.action_size, work.tasks) == (223, 38, 4)
    assert work.tasks * work.rows * shape.observation <= bench.MIN_CAPACITY * bench.OBSERVATION
    assert [entry["provider"] for entry in found["measurements"]] == [bench.OURS, bench.Authors.name]
    assert all(entry["value"] > 0 for entry in found["measurements"])
