"""The benchmark of replay buffers times nothing that is wrong and loses nothing that it has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ours and the peers that need no package."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import bench_replay

    monkeypatch.setattr(bench_replay, "one_core", lambda: None)
    kept = [kind for kind in bench_replay.PEERS if kind.package in ("numpy", "torch")]
    monkeypatch.setattr(bench_replay, "PEERS", tuple(kept))
    return bench_replay


def group(bench: Any, name: str) -> Any:
    found = bench.Results("replay")
    bench.GROUPS[name][0](found, bench.MIN_CAPACITY, bench.Clock(0.0))
    return found


def wrong_sample(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.Ours.sample

    def wrong(self: Any, batches: int, size: int) -> Any:
        sampled = right(self, batches, size)
        sampled.rewards.mul_(1.01)
        return sampled

    monkeypatch.setattr(bench.Ours, "sample", wrong)


@pytest.mark.parametrize("name", ["locomotion", "ten-tasks", "insert"])
def test_every_buffer_is_timed_beside_ours(name: str, bench: Any) -> None:
    found = group(bench, name)
    cases = list(dict.fromkeys(one["case"] for one in found.entries))
    assert len(cases) == {"locomotion": 4, "ten-tasks": 1, "insert": 3}[name]
    timed = {one["provider"] for one in found.entries if one["case"] == cases[-1]}
    assert timed >= {bench.OURS, "authors' layout (numpy)", "torch.index_select"}
    assert ("row gather (limit)" in timed) == (name == "locomotion")
    assert ("brc-fast, tensors" in timed) == (name == "insert")
    for one in found.entries:
        assert (one["unit"], one["better"]) == ("ns per transition", "less")
        assert one["value"] > 0
        assert ("ratio" in one) == (one["provider"] != bench.OURS)
    assert found.found["titles"].keys() == set(cases)


@pytest.mark.parametrize("name", ["ten-tasks", "insert", "files"])
def test_ours_that_returns_something_else_has_no_time_and_fails_the_result(
    name: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "files":
        monkeypatch.setattr(bench.ReplayBuffer, "load", lambda self, folder: None)
    wrong_sample(bench, monkeypatch)
    found = group(bench, name)
    ours = [one for one in found.entries if one["provider"].startswith(bench.OURS)]
    assert ours
    assert all(one["value"] is None for one in ours)
    assert found.end() == 1
    assert "brc-fast at " in found.equality


def test_a_peer_that_returns_something_else_costs_no_more_than_its_own_time(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    authors, _ = bench.PEERS
    right = authors.columns
    monkeypatch.setattr(authors, "columns", lambda self, sampled: right(self, sampled)._replace(
        rewards=right(self, sampled).rewards + 1
    ))  # fmt: skip
    found = group(bench, "ten-tasks")
    told = {one["provider"]: one.get("missing") for one in found.entries}
    assert "sampled rewards do not belong to their observations" in told[authors.name]
    assert [name for name, missing in told.items() if missing is None] == [bench.OURS, "torch.index_select"]
    assert found.equality == "passed"


def test_what_is_added_as_tensors_is_checked(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.OursTensors.prepare

    def wrong(self: Any, step: Any) -> Any:
        observations, actions, rewards, *rest = right(self, step)
        return observations, actions, rewards * 1.01, *rest

    monkeypatch.setattr(bench.OursTensors, "prepare", wrong)
    values = {one["provider"]: one["value"] for one in group(bench, "insert").entries}
    assert values[bench.OURS] > 0
    assert values["brc-fast, tensors"] is None


def test_the_peer_of_index_select_draws_new_batches_into_the_same_memory(bench: Any) -> None:
    _, kind = bench.PEERS
    (peer,) = bench.filled((kind,), bench.Workload(3, 2, 1, 4, 100), {}).values()
    batches = [peer.sample(*size) for size in ((2, 8), (1, 8), (2, 8), (1, 16))]
    for rows, drawn in zip((16, 8, 16, 16), batches, strict=True):
        assert [len(column) for column in drawn] == [rows] * 5
    for first, again in zip(batches[0], batches[2], strict=True):
        assert first.data_ptr() == again.data_ptr()
    seen = batches[0][0].clone()
    peer.workload.check(peer.columns(peer.sample(2, 8)))
    assert not torch.equal(batches[0][0], seen)


def test_memory_is_exact_and_files_are_compared_in_turns(bench: Any) -> None:
    ours, other = group(bench, "memory").entries
    assert 0 < ours["value"] < other["value"] == 4 * (2 * 67 + 24) + 8
    found = group(bench, "files")
    told = [(one["case"], one["provider"]) for one in found.entries]
    numpy = "numpy.savez + numpy.load"
    pairs = [(f"files {what}", name) for what in ("save", "load") for name in (numpy, bench.OURS)]
    assert told == [*pairs, ("files again", bench.OURS)]
    assert found.equality == "passed"


def test_images_are_checked_and_held_once(bench: Any) -> None:
    (ours, _, memory, both) = group(bench, "atari").entries
    assert ours["value"] > 0
    assert memory["value"] < both["value"] / 7


@pytest.mark.parametrize("tasks", [1, 3])
def test_every_way_to_a_batch_on_a_device_has_a_time(tasks: int, bench: Any) -> None:
    found, shape = bench.Results("replay"), bench.Named("small", "", 5, 2, tasks, 16)
    bench.on_device(found, shape, 2000, "cpu", bench.Clock(0.0))
    told = [(one["case"], one["provider"]) for one in found.entries]
    sample, count = "small: sample 2 x 16 on the device", (64 if tasks == 1 else 8 * tasks)
    add = f"small: add from {count} environments on the device"
    ways = [(sample, who) for who in ("device", "prefetched", "copied")]
    assert told == [*ways, (add, "device"), (add, "copied")]
    assert all(0 < one["low"] <= one["value"] for one in found.entries)


@pytest.mark.parametrize("both", [True, False])
def test_batches_on_a_device_that_differ_or_were_never_stored_are_not_timed(
    both: bool, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DeviceReplayBuffer", "ReplayBuffer")[: 1 + both]:  # equal ones, but not what was stored

        class Wrong(getattr(bench, name)):  # type: ignore[misc]
            def add(self, observations: Any, actions: Any, *rest: Any) -> None:
                super().add(observations, actions + 1, *rest)

        monkeypatch.setattr(bench, name, Wrong)
    found = bench.Results("replay")
    bench.on_device(found, bench.Named("", "", 5, 2), 2000, "cpu", bench.Clock(0.0))
    assert all(one["value"] is None for one in found.entries)
    reason = "do not belong to their observations" if both else "the buffers return different batches"
    assert reason in found.equality


def test_the_command_line_takes_workloads_with_their_sizes_and_tasks(bench: Any, tmp_path: Path) -> None:
    from harness import read

    words = ["--workload", "dogs-multitask", "--capacity", f"{bench.MIN_CAPACITY}", "--budget", "0"]
    assert bench.main([*words, "--save", str(tmp_path / "replay")]) == 0
    stored = read(tmp_path / "replay.json")
    assert {one["case"] for one in stored["measurements"]} == {"dogs-multitask"}
    told = "Sampling 2 x 1024 from 4 tasks x 1,536 transitions, O=223, A=38"
    assert stored["titles"]["dogs-multitask"] == told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--capacity", "10"], "--capacity must lie in 20480.."),
        (["--device", "cpu", "--cases", "insert"], "--device knows no --cases"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(
    words: list[str], told: str, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
