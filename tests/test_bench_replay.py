"""The benchmark of replay buffers times nothing that is wrong and loses nothing that it has measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import bench_replay
import harness

from peers import replay

AUTHORS = bench_replay.AUTHORS


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ours and the peers that need no package."""
    monkeypatch.setattr(harness, "use_cores", lambda *_: None)
    for name in ("cpprb", "TorchRL", "Stable-Baselines3", "flashbax (jit)"):
        monkeypatch.delitem(replay.KINDS, name)
    return bench_replay


def group(bench: Any, name: str) -> Any:
    found = bench.Results("replay", judged=bench.OURS)
    if name in bench.GROUPS:
        bench.run(found, bench.GROUPS[name](replay.KINDS, bench.MIN_CAPACITY), 0.0, bench.OURS)
    else:
        bench.OTHERS[name](found, bench.MIN_CAPACITY, 0.0)
    return found


def changed(monkeypatch: pytest.MonkeyPatch, name: str, part: str, change: Callable[[Any], Any]) -> None:
    """Has what a part of a peer returns go through this."""
    kind = replay.KINDS[name]

    def make(work: Any) -> Any:
        peer = kind.make(work)
        right = getattr(peer, part)
        return peer._replace(**{part: lambda *inputs: change(right(*inputs))})

    monkeypatch.setitem(replay.KINDS, name, kind._replace(make=make))


def more_reward(columns: Any) -> Any:
    first, second, rewards, *rest = columns
    return [first, second, rewards * 1.01, *rest]


@pytest.mark.parametrize("name", ["locomotion", "ten-tasks", "insert"])
def test_every_buffer_is_timed_beside_ours(name: str, bench: Any) -> None:
    found = group(bench, name)
    cases = list(dict.fromkeys(one["case"] for one in found.entries))
    assert len(cases) == {"locomotion": 4, "ten-tasks": 1, "insert": 3}[name]
    timed = {one["provider"] for one in found.entries if one["case"] == cases[-1]}
    assert timed >= {bench.OURS, AUTHORS, "torch.index_select"}
    assert ("row gather (limit)" in timed) == (name == "locomotion")
    assert ("brc-fast, tensors" in timed) == (name == "insert")
    for one in found.entries:
        assert (one["unit"], one["better"]) == ("ns per transition", "less")
        assert one["value"] > 0
        assert ("ratio" in one) == (one["provider"] != bench.OURS)
    assert found.found["titles"].keys() == set(cases)


def test_batches_by_priority_are_timed_with_the_updates_of_priorities(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = []
    right = replay.ReplayBuffer.update_priorities

    def update(buffer: Any, indices: Any, priorities: Any) -> int:
        updates.append((tuple(indices.shape), tuple(priorities.shape)))
        return right(buffer, indices, priorities)

    monkeypatch.setattr(replay.ReplayBuffer, "update_priorities", update)
    assert replay.PRIORITIZED.keys() == {bench.OURS, "cpprb", "TorchRL"}
    [ours] = group(bench, "by-priority").entries
    assert (ours["case"], ours["provider"]) == ("by priority", bench.OURS)
    assert ours["value"] > 0
    assert set(updates) == {((1, 1024), (1, 1024))}


@pytest.mark.parametrize("name", ["ten-tasks", "insert", "files"])
def test_ours_that_returns_something_else_has_no_time_and_fails_the_result(
    name: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (bench.OURS, bench.TENSORS):
        changed(monkeypatch, one, "columns", more_reward)
    if name == "files":
        monkeypatch.setattr(bench.ReplayBuffer, "load", lambda self, folder: None)
    found = group(bench, name)
    ours = [one for one in found.entries if one["provider"].startswith(bench.OURS)]
    assert ours
    assert all(one["value"] is None for one in ours)
    assert found.end() == 1
    assert "brc-fast at " in found.equality


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("columns", more_reward, "sampled rewards do not belong to their observations"),
        ("columns", lambda columns: [*(column[::-1] for column in columns[:4]), columns[4]], "next_obs"),
        ("columns", lambda columns: [c[:1].repeat(len(c), 0) for c in columns], "drawn again and again"),
        ("prepare", lambda step: [step[0], step[1] + 1, *step[2:]], "do not belong to their observations"),
    ],
    ids=["values", "rows", "one row", "what is stored"],
)
def test_a_peer_that_returns_something_else_costs_no_more_than_its_own_time(
    part: str, change: Any, reason: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, AUTHORS, part, change)
    found = group(bench, "ten-tasks")
    told = {one["provider"]: one.get("missing") for one in found.entries}
    assert reason in told[AUTHORS]
    assert [name for name, missing in told.items() if missing is None] == [bench.OURS, "torch.index_select"]
    assert found.equality == "passed"


def test_a_buffer_per_task_gives_its_share_of_every_batch(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = replay.KINDS["torch.index_select"]._replace(tasks=False)
    monkeypatch.setitem(replay.KINDS, "torch.index_select", kind)
    found = group(bench, "ten-tasks")
    assert found.entries[-1]["provider"] == "torch.index_select x 10"
    assert all(one["value"] > 0 for one in found.entries)
    peer = replay.filled(kind, replay.Stored(3, 2, 3, 4, 400))
    assert [len(column) for column in peer.sample(2, 8)] == [16] * 5


def test_the_peer_of_index_select_draws_new_batches_into_the_same_memory(bench: Any) -> None:
    peer = replay.filled(replay.KINDS["torch.index_select"], replay.Stored(3, 2, 1, 4, 100))
    first, other, again, wide = (peer.sample(*size) for size in ((2, 8), (1, 8), (2, 8), (1, 16)))
    assert [len(column) for column in other] == [8] * 5
    assert [x.data_ptr() for x in first] == [x.data_ptr() for x in again] == [x.data_ptr() for x in wide]
    seen = first[0].clone()
    peer.check(2, 8)
    assert not torch.equal(first[0], seen)


def test_memory_is_exact_and_files_are_compared_in_turns(bench: Any) -> None:
    ours, other, frames, stacks = group(bench, "memory").entries
    assert 0 < ours["value"] < other["value"] == 4 * (2 * 67 + 24) + 8
    assert frames["value"] < stacks["value"] / 7
    found = group(bench, "files")
    told = [(one["case"], one["provider"]) for one in found.entries]
    numpy = "numpy.savez + numpy.load"
    pairs = [(f"files {what}", name) for what in ("save", "load") for name in (numpy, bench.OURS)]
    assert told == [*pairs, ("files again", bench.OURS)]
    assert found.equality == "passed"


def on_a_device(bench: Any, path: Path, *words: str) -> Any:
    sizes = "--device", "cpu", "--capacity", f"{bench.MIN_CAPACITY}", "--budget", "0"
    code = bench.main([*sizes, *words, "--save", str(path / "replay")])
    return code, harness.read(path / "replay.json")


def test_every_way_to_a_batch_on_a_device_has_a_time(bench: Any, tmp_path: Path) -> None:
    code, found = on_a_device(bench, tmp_path)
    ways = [("1 x 1024", who) for who in ("device", "prefetched", "copied")]
    told = [(one["case"], one["provider"]) for one in found["measurements"]]
    assert told[:3] == ways
    assert {case for case, _ in told} == {"1 x 1024", "16 x 1024", "insert 64"}
    assert all(0 < one["low"] <= one["value"] for one in found["measurements"])
    assert all("ratio" in one for one in found["measurements"] if one["provider"] != "device")
    assert code == 0


@pytest.mark.parametrize("kind", ["ReplayBuffer", "DeviceReplayBuffer"])
def test_batches_on_a_device_that_were_never_stored_are_not_timed(
    kind: str, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(replay, kind).add

    def wrong(buffer: Any, observations: Any, actions: Any, *rest: Any) -> None:
        right(buffer, observations, actions + 1, *rest)

    monkeypatch.setattr(getattr(replay, kind), "add", wrong)
    code, found = on_a_device(bench, tmp_path, "--workload", "mjx-dmc25")
    absent = {one["provider"] for one in found["measurements"] if one["value"] is None}
    assert absent == ({"device"} if kind.startswith("Device") else {"prefetched", "copied"})
    assert "do not belong to their observations" in found["equality"]
    assert code == 1


def test_the_command_line_takes_workloads_with_their_sizes_and_tasks(bench: Any, tmp_path: Path) -> None:
    words = ["--workload", "dogs-multitask", "--capacity", f"{bench.MIN_CAPACITY}", "--budget", "0"]
    assert bench.main([*words, "--save", str(tmp_path / "replay")]) == 0
    stored = harness.read(tmp_path / "replay.json")
    assert {one["case"] for one in stored["measurements"]} == {"dogs-multitask"}
    told = "Sampling 2 x 1024 from 4 tasks x 1,536 transitions, O=223, A=38"
    assert stored["titles"]["dogs-multitask"] == told
