"""DeviceReplayBuffer against ReplayBuffer: equal calls, equal bits.

On a CPU through the gather's twins and, in a process of its own, through Triton's interpreter; on a GPU by
`make gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require
from refusals import says

from brc_fast import Batch, DeviceReplayBuffer, Field, ReplayBuffer

FLOATS: dict[str, Any] = {"observation_size": 3, "action_size": 2}
FRAMES: dict[str, Any] = {
    "observation_size": Field((4, 3), "uint8", stack=3),
    "action_size": Field((), "int64"),
    "extras": {"state": Field((2, 2), "bfloat16"), "step": Field((), "int32")},
}
REQUESTS: list[dict[str, Any]] = [
    {},
    {"n_step": 3, "discount": 0.9},
    {"weights": "equal"},
    {"tasks": [1], "n_step": 2, "discount": 0.5},
    {"tasks": [1, 0], "weights": [0.25, 0.75]},
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("gpu")) if request.param == "cuda" else "cpu"


class Pair:
    """A buffer on the host and one on a device that get the same random calls."""

    def __init__(self, device: str, spec: dict[str, Any], **changes: Any) -> None:
        self.settings = {"capacity": [37, 20], "task_ids": [0, 0, 1], "seed": 5, **spec, **changes}
        self.host = ReplayBuffer(**self.settings)
        self.device = DeviceReplayBuffer(**self.settings, device=device)
        self.rng = np.random.default_rng(0)
        self.last: dict[int, torch.Tensor] = {}

    def values(self, field: Field, count: int) -> torch.Tensor:
        return torch.tensor(self.rng.integers(0, 120, (count, *field.shape))).to(field.torch_dtype)

    def arguments(self) -> dict[str, Any]:
        """One transition for some of the streams, with ends and jumps now and then."""
        spec = self.host.schema
        streams = np.flatnonzero(self.rng.random(3) < 0.8)
        count = len(streams)
        observations, successors = (self.values(spec.observation, count) for _ in range(2))
        for i, stream in enumerate(streams.tolist()):
            if stream in self.last and self.rng.random() < 0.8:
                observations[i] = self.last[stream]
            self.last[stream] = successors[i]
        return {
            "observations": observations,
            "actions": self.values(spec.action, count),
            "rewards": torch.tensor(self.rng.standard_normal(count), dtype=torch.float32),
            "terminated": torch.tensor(self.rng.random(count) < 0.1),
            "truncated": torch.tensor(self.rng.random(count) < 0.1),
            "successors": successors,
            "streams": torch.tensor(streams),
            "extras": {name: self.values(field, count) for name, field in spec.extras.items()} or None,
        }

    def add(self, times: int) -> None:
        for _ in range(times):
            arguments = self.arguments()
            self.host.add(**arguments)
            extras = {name: self.there(value) for name, value in (arguments.pop("extras") or {}).items()}
            self.device.add(**{name: self.there(v) for name, v in arguments.items()}, extras=extras or None)

    def there(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device.device)

    def check(self, **request: Any) -> None:
        assert_equal(self.host.sample(5, 2, **request), self.device.sample(5, 2, **request))


def assert_equal(host: Batch, other: Batch) -> None:
    assert host.extras.keys() == other.extras.keys()
    for got, value in zip(other.tensors(), host.tensors(), strict=True):
        assert got.dtype == value.dtype
        assert torch.equal(got.cpu(), value)


@pytest.mark.parametrize("spec", [FLOATS, FRAMES], ids=["floats", "frames"])
def test_the_batches_are_those_of_the_host_while_it_grows_and_after_it_wraps(
    device: str, spec: dict[str, Any]
) -> None:
    pair = Pair(device, spec)
    pair.add(12)
    for _ in range(40):
        pair.add(2)
        for request in REQUESTS:
            pair.check(**request)
    assert len(pair.device) == len(pair.host)
    assert pair.device.draws == pair.host.draws
    assert pair.device.size_per_task.tolist() == pair.host.size_per_task.tolist()
    assert pair.device.capacity_per_task.tolist() == pair.host.capacity_per_task.tolist()


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_small_capacities_wrap_as_on_the_host(device: str, capacity: int) -> None:
    pair = Pair(device, FLOATS, capacity=capacity)
    for _ in range(30):
        pair.add(1)
        if min(len(pair.host), len(pair.device)) >= 5:
            pair.check()


@pytest.mark.parametrize("spec", [FLOATS, FRAMES], ids=["floats", "frames"])
def test_files_pass_between_host_and_device_both_ways(
    device: str, spec: dict[str, Any], tmp_path: Path
) -> None:
    pair = Pair(device, spec)
    pair.add(60)
    pair.device.save(tmp_path / "device")
    pair.host.save(tmp_path / "host")
    pair.host.load(tmp_path / "device")
    pair.device = DeviceReplayBuffer(**pair.settings, device=device)
    pair.device.load(tmp_path / "host")
    for _ in range(30):
        pair.add(1)
        pair.check()
    pair.device.save(tmp_path / "device")  # only what is new
    pair.host.load(tmp_path / "device")
    pair.check(n_step=3, discount=0.9)


def test_a_save_of_the_host_goes_into_a_smaller_device_buffer(device: str, tmp_path: Path) -> None:
    pair = Pair(device, FLOATS)
    ends = np.zeros(3, bool)
    for step in range(20):  # the newest ends of what is kept take places that others had left
        seen = torch.full((3, 3), float(step))
        ends = torch.full((3,), step in (13, 14, 15, 17))
        arguments = (seen, seen[:, :2].contiguous(), seen[:, 0].clone(), ends, ends, seen + 0.5)
        pair.host.add(*arguments)
    pair.host.save(tmp_path)
    for capacity in (1, 2, 3, 4, 9):
        smaller = Pair(device, FLOATS, capacity=capacity)
        smaller.host.load(tmp_path)
        smaller.device.load(tmp_path)
        size = len(smaller.host)
        assert_equal(smaller.host.sample(size, 9), smaller.device.sample(size, 9))


def test_after_a_load_that_failed_half_way_a_save_is_whole(device: str, tmp_path: Path) -> None:
    pair, other = Pair(device, FLOATS), Pair(device, FLOATS)
    other.rng = np.random.default_rng(1)
    other.add(12)
    pair.add(20)
    for name, one in (("pair", pair), ("other", other)):
        one.device.save(tmp_path / name)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pair.device, "_grow", lambda slots: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pair.device.load(tmp_path / "other")
    pair.device.save(tmp_path / "other")
    pair.host.load(tmp_path / "other")
    pair.check()


@pytest.mark.parametrize("upload", [2, 3, 4])
def test_an_add_that_was_broken_off_is_no_source_of_torn_transitions(
    device: str, tmp_path: Path, upload: int
) -> None:
    """A Ctrl-C between the index and the rows: every call is refused until a save is loaded."""
    pair = Pair(device, FLOATS)
    pair.add(20)
    pair.device.save(tmp_path)
    index, calls = pair.device._index, []

    def broken(values: np.ndarray) -> torch.Tensor:
        calls.append(0)
        if len(calls) == upload:
            raise KeyboardInterrupt
        return index(values)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pair.device, "_index", broken)
        with pytest.raises(KeyboardInterrupt):
            _ = [pair.device.add(**pair.arguments()) for _ in range(9)]
    for call in (
        lambda: pair.device.sample(2),
        lambda: pair.device.add(**pair.arguments()),
        lambda: pair.device.save(tmp_path / "torn"),
    ):
        with pytest.raises(RuntimeError, match="broken off half-way: load what `save"):
            call()
    pair.device.load(tmp_path)
    pair.host.load(tmp_path)
    pair.check()


def test_a_load_that_was_broken_off_among_the_rows_is_told_until_it_is_made_again(
    device: str, tmp_path: Path
) -> None:
    pair = Pair(device, FLOATS)
    pair.add(20)
    pair.device.save(tmp_path)
    made, calls = torch.from_numpy, []

    def broken(array: np.ndarray) -> torch.Tensor:
        calls.append(0)
        if len(calls) > 1:  # the first are the successors kept aside
            raise KeyboardInterrupt
        return made(array)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "from_numpy", broken)
        with pytest.raises(KeyboardInterrupt):
            pair.device.load(tmp_path)
    with pytest.raises(RuntimeError, match="broken off half-way"):
        pair.device.sample(2)
    pair.device.load(tmp_path)
    pair.check()


def test_arrays_of_any_layout_are_stored_as_by_the_host(
    device: str, recwarn: pytest.WarningsRecorder
) -> None:
    spec = {"observation_size": 1, "action_size": 1, "task_ids": [0], "capacity": 8}
    pair = Pair(device, spec)
    fixed = np.ones((1, 1), np.float32)
    fixed.flags.writeable = False
    wide = np.ones((1, 4), np.float32)
    for seen in (fixed, wide[::-1, :1], wide[:, ::2][:, :1], torch.ones(1, 1, 2)[..., 0]):
        arguments = (seen, seen, seen[0], np.zeros(1, bool), np.zeros(1, bool), seen)
        pair.host.add(*arguments)
        pair.device.add(*arguments)
    assert_equal(pair.host.sample(4), pair.device.sample(4))
    assert [str(warning.message) for warning in recwarn] == []


def test_a_reward_of_minus_zero_keeps_its_sign(device: str) -> None:
    pair = Pair(device, {"observation_size": 1, "action_size": 1, "task_ids": [0], "capacity": 8})
    one, no = torch.ones(1, 1), torch.zeros(1, dtype=torch.bool)
    for buffer in (pair.host, pair.device):
        for _ in range(4):
            buffer.add(one, one, torch.tensor([-0.0]), no, no, one)
    for n_step in (1, 3):
        for buffer in (pair.host, pair.device):
            assert buffer.sample(4, n_step=n_step, discount=0.5).rewards.signbit().all()


def test_rewards_are_divided_by_the_scale_of_their_task_and_floats_are_cast(device: str) -> None:
    pair = Pair(device, FLOATS)
    pair.add(60)
    scale = torch.tensor([2.5, float("inf")])
    host = pair.host.sample(8, 3, n_step=3, discount=0.9)
    there = pair.device.sample(
        8, 3, n_step=3, discount=0.9, reward_scale=pair.there(scale), dtype=torch.bfloat16
    )
    assert torch.equal(there.rewards.cpu(), host.rewards / scale[host.task_ids])
    for name in ("observations", "actions", "next_observations"):
        assert torch.equal(getattr(there, name).cpu(), getattr(host, name).bfloat16()), name
    assert there.masks.dtype == torch.float32


def test_more_successors_than_there_was_place_for_are_kept(device: str) -> None:
    settings = {"capacity": 3000, "observation_size": 1, "action_size": 1, "task_ids": [0] * 500}
    host, there = ReplayBuffer(**settings), DeviceReplayBuffer(**settings, device=device)
    before = there.nbytes
    flags = torch.ones(500, dtype=torch.bool)
    for step in range(8):
        seen = torch.arange(500.0)[:, None] + 1000 * step
        arguments = (seen, seen, seen[:, 0], flags, flags, seen + 0.5)
        host.add(*arguments)
        there.add(*(value.to(there.device) for value in arguments))
    assert there.nbytes > before
    assert_equal(host.sample(3000), there.sample(3000))


def test_prefetch_gives_the_batches_of_sample(device: str) -> None:
    pair = Pair(device, FLOATS)
    pair.add(40)
    with (
        pair.device.prefetch(4, 2, n_step=2, discount=0.9, depth=3) as there,
        pair.host.prefetch(4, 2, n_step=2, discount=0.9, depth=3, device=device) as host,
    ):
        for _ in range(10):
            pair.add(1)
            first, second = next(there), next(host)
            assert second.observations.device.type == torch.device(device).type
            assert_equal(first.to("cpu"), second)
    with pytest.raises(RuntimeError, match="closed"):
        next(there)


def test_batches_prefetched_to_the_device_stay_as_they_were(device: str) -> None:
    """Host memory is used again while copies are still under way; no batch may see it."""
    host, twin = (ReplayBuffer(500, 64, 8, task_ids=[0] * 4, seed=1) for _ in range(2))
    flags = torch.zeros(4, dtype=torch.bool)
    for step in range(200):
        seen = torch.arange(4.0)[:, None] * 1000 + step + torch.zeros(4, 64)
        for buffer in (host, twin):
            buffer.add(seen, seen[:, :8].contiguous(), seen[:, 0].clone(), flags, flags, seen + 1)
    with host.prefetch(256, 4, depth=3, device=device) as batches:
        got = [next(batches) for _ in range(20)]
    for batch in got:
        assert_equal(twin.sample(256, 4), batch)


def test_a_refused_transition_changes_nothing(device: str) -> None:
    pair = Pair(device, FLOATS)
    pair.add(20)
    good = {**pair.arguments(), "streams": torch.tensor([0, 1])}
    shapes = {"observations": (2, 3), "actions": (2, 2), "rewards": (2,), "successors": (2, 3)}
    good |= {name: torch.zeros(shape) for name, shape in shapes.items()}
    good |= {name: torch.zeros(2, dtype=torch.bool) for name in ("terminated", "truncated")}
    for name in shapes:
        bad = good[name].clone()
        bad[1] = float("nan")
        with pytest.raises(ValueError, match=rf"{name} of stream 1 \(task 0\) must be finite"):
            pair.device.add(**{**good, name: bad})
    for name, value, error, words in (
        ("streams", torch.tensor([0, 3]), ValueError, "0..2, got 3"),
        ("streams", torch.tensor([0, 0]), ValueError, "differ, got 0 twice"),
        ("rewards", torch.full((2,), 1e39, dtype=torch.float64), TypeError, "float32, ... hold 1e+39"),
        ("actions", torch.zeros(2, 1), ValueError, "[M, A] = [2, 2], got [2, 1]"),
    ):
        with pytest.raises(error, match=says(f"{name} ... {words}")):
            pair.device.add(**{**good, name: value})
    requests: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"batch_size": 99}, ValueError, "batch_size 99 exceeds the"),
        ({"reward_scale": torch.ones(3)}, ValueError, "reward_scale ... [T] = [2], got [3]"),
        ({"dtype": torch.int32}, TypeError, "dtype ... torch.float32, ... got torch.int32"),
    ]
    for request, error, words in requests:
        scale = {name: pair.there(value) for name, value in request.items() if name == "reward_scale"}
        with pytest.raises(error, match=says(words)):
            pair.device.sample(**{"batch_size": 3, **request, **scale})
    pair.check()
    allowing = DeviceReplayBuffer(4, 1, 1, non_finite="allow", device=device)
    value, flag = torch.full((1, 1), float("nan")), torch.zeros(1, dtype=torch.bool)
    allowing.add(value, value, value[0], flag, flag, value)
    assert allowing.sample(1).observations.isnan().all()


def test_what_does_not_fit_is_an_error_with_the_numbers(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needed = DeviceReplayBuffer.bytes_needed(1000, 67, 24)
    assert needed == 1001 * 384
    with caplog.at_level("INFO", logger="brc_fast"):
        buffer = DeviceReplayBuffer(1000, 67, 24, device=device)
    assert buffer.nbytes >= needed
    assert f"takes {needed} bytes for 1001 rows of 384 bytes" in caplog.text
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (needed - 1, 2 * needed))
        words = says(f"{needed} bytes ... {needed - 1} of {2 * needed}")
        with pytest.raises(MemoryError, match=words):  # before anything asks for the GPU that is not there
            DeviceReplayBuffer(1000, 67, 24, device="cuda")
    else:
        free, _ = torch.cuda.mem_get_info()
        with pytest.raises(MemoryError, match=r"bytes for .* rows of 384 bytes on cuda"):
            DeviceReplayBuffer(free // 384 + 1000, 67, 24, device=device)


def test_the_kernels_give_the_same_through_the_interpreter(tmp_path: Path) -> None:
    require("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is the process of its own")
    chosen = "grows and floats or frames and files or scale or nothing"
    words = ["-q", "-m", "not gpu", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__).resolve())]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": "1", "BRC_FAST_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
