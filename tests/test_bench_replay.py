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
    return bench.timing.Provider(lambda: sum(range(1000)), 10, check)


def test_a_case_measures_every_buffer_beside_the_bare_gather(bench: Any) -> None:
    names = (bench.timing.OURS, "other", bench.timing.LIMIT)
    missing = {"third": "is not installed"}
    found = bench.timing.timed_case("1 x 8", "title", {name: provider(bench) for name in names}, missing, 0.0)
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

    providers = {bench.timing.OURS: provider(bench), "other": provider(bench, wrong)}
    found = bench.timing.timed_case("1 x 8", "title", providers, {}, 0.0)
    absent = found["measurements"][1]
    assert (absent["provider"], absent["value"]) == ("other", None)
    assert absent["missing"] == "ValueError: rewards differ"


def test_the_peer_of_index_select_draws_new_batches_into_the_same_memory(bench: Any) -> None:
    from peers.replay_data import Workload
    from peers.replay_peers import IndexSelect, fill, make

    peer = make(IndexSelect, Workload(3, 2, 1, 4, 100))
    fill([peer], lambda _, error: pytest.fail(str(error)))
    sizes = (2, 8), (1, 8), (2, 8), (1, 16)
    batches = [peer.sample(*size) for size in sizes]
    for rows, drawn in zip((16, 8, 16, 16), batches, strict=True):
        assert [len(column) for column in drawn] == [rows] * 5
    for first, again in zip(batches[0], batches[2], strict=True):
        assert first.data_ptr() == again.data_ptr()
    seen = batches[0][0].clone()
    peer.workload.check(peer.columns(peer.sample(2, 8)))
    assert not torch.equal(batches[0][0], seen)


def test_memory_is_measured_exactly_and_files_over_their_rounds(bench: Any) -> None:
    (memory,) = bench.cases.memory(bench.MIN_CAPACITY, bench.timing.Clock(0.0))
    ours, other = memory["measurements"]
    assert 0 < ours["value"] < other["value"] == 4 * (2 * 67 + 24) + 8
    costs = {"ours save": [bench.cases.files.Cost(2.0, 1.0, 0), bench.cases.files.Cost(4.0, 1.0, 0)]}
    (save,) = bench.cases.file_measurements(costs, {})
    assert (save["case"], save["provider"], save["value"], save["rounds"]) == (
        "files save",
        bench.timing.OURS,
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


def run(bench: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(bench.cases, "PEERS", ())
    monkeypatch.setattr(bench, "PEERS", ())
    monkeypatch.setattr(sys, "argv", ["bench_replay", "--budget", "0", *words])
    return bench.main()  # type: ignore[no-any-return]


def test_ours_that_returns_something_else_fails_the_run(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import harness

    right = bench.cases.Ours.sample

    def wrong(self: Any, batches: int, size: int) -> Any:
        sampled = right(self, batches, size)
        sampled.rewards.mul_(1.01)
        return sampled

    monkeypatch.setattr(bench.cases.Ours, "sample", wrong)
    words = ["--capacity", f"{bench.MIN_CAPACITY}", "--cases", "insert", "--save", str(tmp_path / "replay")]
    assert run(bench, monkeypatch, *words) == 1
    told = capsys.readouterr().err
    assert told.startswith("failed: insert 1, brc-fast: Mismatch: ")
    assert told.count("\n") == 1
    stored = harness.read(tmp_path / "replay.json")
    assert stored["equality"] == told.rstrip()
    ours = [one for one in stored["measurements"] if one["provider"].startswith(bench.timing.OURS)]
    assert len(ours) == 6
    assert all(one["value"] is None for one in ours)


def test_what_is_added_as_tensors_is_checked(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work, missing = bench.cases.insert_providers(64, bench.MIN_CAPACITY, {}), {}
    assert bench.timing.checked(
        {name: work[name] for name in (bench.timing.OURS, bench.cases.OursTensors.name)}, missing
    )
    assert missing == {}
    right = bench.cases.OursTensors.prepare

    def wrong(self: Any, step: Any) -> Any:
        observations, actions, rewards, *rest = right(self, step)
        return observations, actions, rewards * 1.01, *rest

    monkeypatch.setattr(bench.cases.OursTensors, "prepare", wrong)
    work[bench.timing.OURS].check()
    with pytest.raises(Exception, match="sampled rewards do not belong"):
        work[bench.cases.OursTensors.name].check()


def test_files_of_data_that_was_never_stored_have_no_times(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from brc_fast import ReplayBuffer

    assert bench.failures(bench.cases.saved_files(bench.MIN_CAPACITY, bench.timing.Clock(0.0))) == []
    right = ReplayBuffer.sample

    def wrong(self: Any, *words: Any) -> Any:
        sampled = right(self, *words)
        sampled.rewards.mul_(1.01)
        return sampled

    monkeypatch.setattr(ReplayBuffer, "sample", wrong)
    results = bench.cases.saved_files(bench.MIN_CAPACITY, bench.timing.Clock(0.0))
    (reason,) = bench.failures(results)
    assert reason.startswith("files, brc-fast: Mismatch: 1024 of 1024 sampled rewards do not belong")
    (found,) = results
    assert found["costs"].keys() == {"plain save", "plain load"}
    assert all(row["ours"] is None for row in found["rows"])
    assert [one["case"] for one in found["measurements"] if one["value"] is None] == [
        "files save",
        "files load",
        "files again",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--workload", "dogs"], "no workload 'dogs'; there are dmc-single, "),
        (["--capacity", "0"], "--capacity must lie in 20480.."),
        (["--budget", "-1"], "--budget must be a number of seconds, at least 0"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(
    words: list[str],
    told: str,
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(bench, monkeypatch, *words) == 2
    lines = capsys.readouterr().err
    assert lines.startswith(f"bench_replay: {told}")
    assert lines.count("\n") == 1


def test_a_workload_is_sampled_with_its_own_sizes_and_tasks(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[Any] = []

    def built(work: Any, missing: Any) -> Any:
        sampled.append(work)
        return original(work, missing, (bench.cases.Authors,))

    original = bench.cases.built
    monkeypatch.setattr(bench.cases, "built", built)
    shape = bench.WORKLOADS["dogs-multitask"]
    (found,) = bench.cases.on_workload(shape.name, bench.MIN_CAPACITY, bench.timing.Clock(0.0))
    (work,) = sampled
    assert (work.observation_size, work.action_size, work.tasks) == (223, 38, 4)
    assert work.tasks * work.rows * shape.observation <= bench.MIN_CAPACITY * bench.cases.OBSERVATION
    assert [entry["provider"] for entry in found["measurements"]] == [
        bench.timing.OURS,
        bench.cases.Authors.name,
    ]
    assert all(entry["value"] > 0 for entry in found["measurements"])
