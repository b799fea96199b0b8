"""Batches on a device: our two buffers hold the same, and nothing that differs is timed. On a CPU here."""

from __future__ import annotations

import json
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

    threads = torch.get_num_threads()
    yield bench_replay
    torch.set_num_threads(threads)


def run(bench: Any, **options: Any) -> dict[str, Any]:
    work = bench.replay_device.stored(5, 2, 3, 2, 300)
    return bench.replay_device.run(work, [(2, 16)], "cpu", 0.0, **options)  # type: ignore[no-any-return]


def test_every_way_to_a_batch_and_to_a_stored_step_has_a_time(bench: Any) -> None:
    found = run(bench, name="three tasks")
    assert (found["equality"], found["capacity"], found["streams"]) == ("passed", 288, 6)
    told = [(entry["case"], entry["provider"]) for entry in found["measurements"]]
    sample, add = (
        "three tasks: sample 2 x 16 on the device",
        "three tasks: add from 6 environments on the device",
    )
    ways = [(sample, who) for who in ("device", "prefetched", "copied")]
    assert told == [*ways, (add, "device"), (add, "copied")]
    assert all(0 < entry["low"] <= entry["value"] for entry in found["measurements"])


@pytest.mark.parametrize("task", [True, False])
def test_batches_that_differ_or_were_never_stored_are_not_timed(
    task: bool, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, host = bench.replay_device.DeviceReplayBuffer, bench.replay_device.ReplayBuffer

    def wrong(kind: Any) -> Any:
        class Wrong(kind):  # type: ignore[misc]
            def add(self, observations: Any, *rest: Any) -> None:
                super().add(observations, rest[0] + 1, *rest[1:])

        return Wrong

    monkeypatch.setattr(bench.replay_device, "DeviceReplayBuffer", wrong(device))
    if task:  # both are wrong in the same way: then the transitions tell
        monkeypatch.setattr(bench.replay_device, "ReplayBuffer", wrong(host))
    found = run(bench)
    reason = "sampled actions do not belong to their observations" if task else "return different batches"
    assert found["equality"].startswith("failed: sample 2 x 16 on the device: ")
    assert found["equality"].endswith(reason)
    assert [entry["value"] for entry in found["measurements"]] == [None] * 5
    assert found["rows"] == []


def test_a_device_without_room_is_the_reason_of_every_figure(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **named: Any) -> Any:
        raise MemoryError("the replay buffer needs 9 bytes, and 1 of 2 are free; lower capacity")

    monkeypatch.setattr(bench.replay_device, "DeviceReplayBuffer", full)
    found = run(bench)
    assert found["equality"] == "passed"
    assert {entry["missing"][-14:] for entry in found["measurements"]} == {"lower capacity"}


def test_the_command_line_takes_workloads_and_refuses_what_is_not_there(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench_replay", "--capacity", f"{bench.MIN_CAPACITY}", "--budget", "0", "--device"]
    workload = ["--workload", "dmc-single", "--save", str(tmp_path / "there")]
    monkeypatch.setattr(sys, "argv", [*words, "cpu", *workload])
    assert bench.main() == 0
    stored = json.loads((tmp_path / "there.json").read_text())
    assert (stored["benchmark"], stored["device"], stored["equality"]) == ("replay", "cpu", "passed")
    assert stored["measurements"][0]["case"] == "dmc-single: sample 2 x 256 on the device"
    capsys.readouterr()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [*words, "cuda"])
    assert bench.main() == 2
    no_gpu = "bench_replay: torch sees no CUDA device; --device cpu runs the same code\n"
    assert capsys.readouterr().err == no_gpu
    monkeypatch.setattr(sys, "argv", [*words, "cpu", "--cases", "atari"])
    assert bench.main() == 2
    assert capsys.readouterr().err.startswith("bench_replay: --device knows neither --cases nor --picture")
