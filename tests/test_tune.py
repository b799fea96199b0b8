"""Tuning finds what is faster, refuses what is wrong and keeps what was found before; timing counts right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from extras import require

from brc_fast.kernels.runtime import tables
from brc_fast.kernels.tools import timing, tune
from brc_fast.kernels.tools.cases import Case

CPU = torch.device("cpu")
Call = Callable[[], object]
BASE = {"BLOCK_B": 16, "num_warps": 4}


class Bench:
    """An op whose configuration decides what it returns and how long it takes."""

    def __init__(self) -> None:
        self.asked: list[dict[str, int]] = []
        self.seconds: Callable[[dict[str, int], int], float] = lambda config, batch: 1.0
        self.break_on: Callable[[dict[str, int]], str | None] = lambda config: None

    def case(self, label: str = "H=64 float32", op: str = "scale", size: int = 64) -> Case:
        def prepare(device: torch.device, batch: int, impl: str) -> Call:
            x = torch.randn(batch, 8, device=device)

            def call() -> object:
                config = tables.configuration("scale_kernel", size, x.dtype, device, BASE)
                self.asked.append(config)
                self.batch = batch
                trouble = self.break_on(config)
                if trouble == "raise":
                    raise ValueError("no such configuration")
                return {"y": 2.0 * x if trouble is None else 3.0 * x}, (x + 1.0,)

            return call

        return Case(op, label, prepare, lambda batch: 64 * batch, ("scale_kernel",))

    def clock(self, calls: Sequence[Call], device: torch.device) -> float:
        calls[0]()
        return self.seconds(self.asked[-1], self.batch)

    def tune(self, out: Path | None, *cases: Case, **options: object) -> int:
        options = {"seconds": 60.0, "batches": (4,), "clock": self.clock} | options
        return tune.tune(cases or [self.case()], CPU, out=out, **options)  # type: ignore[arg-type]


def kernels(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(path.read_text())["kernels"]  # type: ignore[no-any-return]


def test_neighbours_halve_and_double_one_number_within_bounds() -> None:
    around = list(tune.neighbours({"BLOCK_B": 1, "BLOCK_K": 64, "num_warps": 8, "STAGES": 3}, 8))
    same = {"BLOCK_B": 1, "BLOCK_K": 64, "num_warps": 8, "STAGES": 3}
    changes = [{n: v for n, v in config.items() if same[n] != v} for config in around]
    assert changes == [{"BLOCK_B": 2}, {"BLOCK_K": 32}, {"BLOCK_K": 128}, {"num_warps": 4}]


def test_the_fastest_is_found_over_several_steps_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()
    bench.seconds = lambda config, batch: 1.0 / (config["BLOCK_B"] if config["BLOCK_B"] <= 64 else 1)
    out = tmp_path / "sm_90.json"
    assert bench.tune(out) == 1
    assert kernels(out) == {"scale_kernel": {"64 float32": {"BLOCK_B": 64, "num_warps": 4}}}
    record = json.loads(out.read_text())["measured"]["scale_kernel"]["64 float32"]
    assert record["gain"] == 4.0
    assert record["over"] == BASE
    assert record["cases"] == ["scale H=64 float32 B=4"]
    assert {"date", "gpu", "torch", "triton"} <= record.keys()

    monkeypatch.setattr(tables, "TABLES", tmp_path)
    tables._table.cache_clear()
    with tables.assume("sm_90"):
        assert tables.configuration("scale_kernel", 50, torch.float32, CPU, BASE)["BLOCK_B"] == 64
        assert tables.configuration("scale_kernel", 50, torch.bfloat16, CPU, BASE)["BLOCK_B"] == 16
    tables._table.cache_clear()


def test_a_gain_of_three_percent_is_none(tmp_path: Path) -> None:
    bench = Bench()
    bench.seconds = lambda config, batch: 1.0 if config == BASE else 1.0 / 1.03
    assert bench.tune(tmp_path / "t.json") == 0
    assert not (tmp_path / "t.json").exists()
    assert all(
        sum(config[n] != BASE[n] for n in BASE) <= 1 for config in bench.asked
    )  # nor a step on the way
    bench.seconds = lambda config, batch: 1.0 if config["BLOCK_B"] != 8 else 1.0 / 1.04
    assert bench.tune(tmp_path / "t.json") == 1


@pytest.mark.parametrize("trouble", ["raise", "wrong"])
def test_a_candidate_that_fails_or_changes_the_results_is_named_and_passed_over(
    trouble: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench()
    bench.seconds = lambda config, batch: {8: 0.01, 32: 0.5}.get(config["BLOCK_B"], 1.0)
    bench.break_on = lambda config: trouble if config["BLOCK_B"] == 8 else None
    assert bench.tune(tmp_path / "t.json") == 1
    assert kernels(tmp_path / "t.json")["scale_kernel"]["64 float32"]["BLOCK_B"] == 32
    told = capsys.readouterr().out
    reason = {"raise": "ValueError: no such configuration", "wrong": "other results: result 0"}[trouble]
    assert f"scale_kernel {{'BLOCK_B': 8, 'num_warps': 4}} skipped: {reason}" in told


def test_what_is_fast_at_one_batch_size_and_slow_at_another_does_not_win(tmp_path: Path) -> None:
    bench = Bench()
    bench.seconds = lambda config, batch: 1.0 if config == BASE else (0.2 if batch == 4 else 1.1)
    assert bench.tune(tmp_path / "t.json", batches=(4, 8)) == 0
    bench.seconds = lambda config, batch: 1.0 if config == BASE else (0.2 if batch == 4 else 1.0)
    assert bench.tune(tmp_path / "t.json", batches=(4, 8)) == 1


def test_a_win_that_does_not_repeat_is_dropped(tmp_path: Path) -> None:
    bench, seen = Bench(), []

    def seconds(config: dict[str, int], batch: int) -> float:
        seen.append(config)
        return 0.5 if config["BLOCK_B"] == 8 and seen.count(config) == 1 else 1.0

    bench.seconds = seconds
    assert bench.tune(tmp_path / "t.json") == 0


def test_a_list_of_candidates_replaces_the_neighbours(tmp_path: Path) -> None:
    bench = Bench()
    bench.seconds = lambda config, batch: 1.0 / config["BLOCK_B"]
    assert bench.tune(tmp_path / "t.json", listed={"scale_kernel": [{"BLOCK_B": 128}, {"BLOCK_B": 4}]}) == 1
    assert kernels(tmp_path / "t.json")["scale_kernel"]["64 float32"] == {"BLOCK_B": 128, "num_warps": 4}
    assert {config["BLOCK_B"] for config in bench.asked} == {16, 128, 4}


def test_a_kernel_is_tuned_on_the_first_op_that_names_it_at_every_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench = Bench()
    cases = [bench.case(), bench.case("H=128 float32", size=128), bench.case("again", op="other")]
    found = tune.subjects(cases, CPU, (4, 8))
    work = [(s.entry, [(case.label, batch) for case, batch in s.work]) for s in found]
    assert work == [
        ("64 float32", [("H=64 float32", 4), ("H=64 float32", 8)]),
        ("128 float32", [("H=128 float32", 4), ("H=128 float32", 8)]),
    ]
    bench.tune(None, bench.case()._replace(kernels=("another",)))
    assert "another is named by a case, but none of them asks" in capsys.readouterr().out


def test_entries_of_a_table_that_were_not_tuned_stay(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    tune.store(path, "a", "64 float32", {"num_warps": 1}, {"gain": 2.0})
    tune.store(path, "a", "128 float32", {"num_warps": 2}, {"gain": 2.0})
    tune.store(path, "b", "64 float32", {"num_warps": 4}, {"gain": 2.0})
    tune.store(path, "a", "64 float32", {"num_warps": 8}, {"gain": 3.0})
    table = json.loads(path.read_text())
    assert table["kernels"] == {
        "a": {"64 float32": {"num_warps": 8}, "128 float32": {"num_warps": 2}},
        "b": {"64 float32": {"num_warps": 4}},
    }
    assert table["measured"]["a"]["64 float32"] == {"gain": 3.0}


def test_nothing_is_begun_after_the_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench()
    bench.seconds = lambda config, batch: 1.0 / config["BLOCK_B"]
    assert bench.tune(tmp_path / "t.json", seconds=0.0) == 0
    assert "time is up: 1 of 1 entries were not tried" in capsys.readouterr().out


def test_tuning_needs_a_gpu_or_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune, "INTERPRETED", False)
    assert tune.main([]) == 2
    told = capsys.readouterr().err
    assert (
        told == "tuning needs a GPU, and torch sees no CUDA device; --dry tries the code in the interpreter\n"
    )
    assert tune.main(["--dry"]) == 2
    assert capsys.readouterr().err.startswith("--dry needs Triton's interpreter: set TRITON_INTERPRET=1")


def test_a_dry_run_tries_two_candidates_of_one_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require("triton")
    bench = Bench()
    cases = [bench.case("H=64 bfloat16"), bench.case()]
    monkeypatch.setattr(tune, "INTERPRETED", True)
    monkeypatch.setattr(tune, "cases", lambda ops=None: (c for c in cases if ops is None or c.op in ops))
    assert tune.main(["--dry", "--out", str(tmp_path / "t.json")]) == 0
    assert {config["BLOCK_B"] for config in bench.asked} == {16, 8, 32}
    assert "scale_kernel [64 float32]" in capsys.readouterr().out
    assert tune.main(["--dry", "--ops", "nothing"]) == 2
    assert capsys.readouterr().err == "unknown op nothing; there are scale\n"


def test_a_real_kernel_is_tuned_in_the_interpreter(tmp_path: Path) -> None:
    require("triton")
    words = [
        "-m",
        "brc_fast.kernels.tools.tune",
        "--dry",
        "--ops",
        "adamw_",
        "--out",
        str(tmp_path / "t.json"),
    ]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,  # not the checkout, which would hide an installed package
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^adamw \[\d+ float32\]: ", done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout


# ---------------------------------------------------------------- results


def test_results_agree_to_rounding_row_by_row() -> None:
    x = torch.randn(5000, 50)  # a row of so many does not show in the whole
    assert tune.disagreement([x], [x * (1.0 + 1e-6)]) is None
    assert tune.disagreement([x.bfloat16()], [(x * 1.001).bfloat16()]) is None
    assert tune.disagreement([x > 0], [x > 0]) is None
    assert tune.disagreement([x[:0]], [x[:0]]) is None
    row, hole = x.clone(), x.clone()
    row[7], hole[7, 3] = 0.0, float("nan")
    for wrong in (x * 1.01, x * 1.0002, row, hole, x[1:], x.double()):
        assert tune.disagreement([wrong], [x]) is not None
    assert "by 1.0e+00 at most" in str(tune.disagreement([row.bfloat16()], [x.bfloat16()]))
    assert tune.disagreement([x[:, 0], x > 1], [x[:, 0], x > 0]) == "result 1 differs"
    assert tune.disagreement([x], [x, x]) == "1 results, expected 2"
    assert tune.disagreement([], []) is not None
    scalar = torch.tensor(2.0)
    assert tune.disagreement([scalar], [scalar]) is None
    assert tune.disagreement([torch.tensor(0.0)], [scalar]) is not None


def test_tensors_are_found_in_whatever_holds_them() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [x.numel() for x in tune.tensors(((a, None), [b, 1.0], {"c": c}))] == [1, 2, 3]


# ---------------------------------------------------------------- timing


def test_sets_are_larger_than_the_cache_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_cache", lambda device: 50 * 2**20)
    case = Bench().case()
    sizes = {2**34: (2, True), 2**25: (7, True), 2**24: (13, True), 2**22: (16, False), 0: (16, False)}
    for moved, (sets, cold) in sizes.items():
        calls = timing.rotated(case._replace(bytes=lambda batch, moved=moved: moved), CPU, 1, "triton")
        assert (len(calls), timing.cold(moved, CPU)) == (sets, cold)


def test_batches_are_halved_until_they_move_a_gigabyte_at_most() -> None:
    case = Bench().case()
    for moved, expected in (
        (lambda batch: 2**10 * batch, [4096, 256]),
        (lambda batch: 2**20 * batch, [1024, 256]),
        (lambda batch: 2**23 * batch, [128]),
        (lambda batch: 2**40 * batch, [1]),
    ):
        assert timing.batches_of(case._replace(bytes=moved)) == expected
    assert timing.batches_of(case._replace(op="adamw_", bytes=lambda batch: 2**40))[0] == 132_813


def test_sets_have_inputs_of_their_own_that_do_not_depend_on_the_implementation() -> None:
    case = Bench().case()
    mine = [tune.tensors(call())[0] for call in timing.rotated(case, CPU, 4, "triton")]
    theirs = [tune.tensors(call())[0] for call in timing.rotated(case, CPU, 4, "reference")]
    assert len(mine) == 2
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not torch.equal(mine[0], mine[1])


def test_calls_on_the_host_are_timed_by_the_clock() -> None:
    found = timing.seconds_per_call([lambda: time.sleep(0.002), lambda: time.sleep(0.004)], CPU, 0.0)
    assert found.samples == 3
    assert 0.003 <= found.low <= found.median <= found.high < 1.0


class FakeGPU:
    """Enough of torch.cuda for a timing: work takes virtual time when a graph is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = 0.0
        self.capturing: list[float] | None = None
        self.captures: list[int] = []
        self.modes: list[object] = []
        self.warm = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.clock

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * 1e3

        class Graph:
            def __init__(self) -> None:
                self.work: list[float] = []

            def replay(self) -> None:
                gpu.clock += sum(self.work)

        @contextmanager
        def graph(into: Graph, pool: str, stream: object, capture_error_mode: str) -> Iterator[None]:
            assert gpu.current is stream  # which a capture that fails would leave in the place of another
            gpu.capturing = into.work
            yield
            gpu.captures.append(len(into.work))
            gpu.capturing = None

        @contextmanager
        def on(stream: object) -> Iterator[None]:
            before, gpu.current = gpu.current, stream
            try:
                yield
            finally:
                gpu.current = before

        self.current: object = None
        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "graph_pool_handle": lambda: "pool",
            "stream": on,
            "current_device": lambda: 0,
            "current_stream": lambda: None,
            "default_generators": [SimpleNamespace(clone_state=dict, graphsafe_set_state=dict)],
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": self.modes.append,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(timing, "_stream", lambda device: stream)

    def call(self, seconds: float) -> Call:
        def work() -> torch.Tensor:
            if self.capturing is None:
                self.warm += 1
            else:
                self.capturing.append(seconds)
            return torch.empty(0)

        return work


@pytest.mark.parametrize(
    ("seconds", "captures"),
    [(1e-6, [4, 128]), (50e-6, [4, 12]), (1e-3, [4]), (0.2, [4])],
    ids=["short", "middling", "long", "very long"],
)
def test_a_graph_is_captured_long_enough_and_counted_exactly(
    seconds: float, captures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGPU(monkeypatch)
    calls = [gpu.call(seconds * share) for share in (0.5, 1.5, 1.0, 1.0)]
    found = timing.seconds_per_call(calls, torch.device("cuda"), 0.0)
    assert found.median == pytest.approx(seconds, rel=1e-6)
    assert gpu.captures == captures
    assert gpu.warm == 8
    assert gpu.modes == [0, 0, "error", 0]


def test_a_call_that_waits_for_the_device_is_refused_before_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)

    def waits() -> None:
        if gpu.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        timing.seconds_per_call([waits, waits], torch.device("cuda"), 0.0)
    assert gpu.captures == []
    assert gpu.modes[-1] == 0


def test_a_capture_that_fails_leaves_no_pool_open(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, ended = FakeGPU(monkeypatch), list[tuple[object, ...]]()
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda *which: ended.append(which), raising=False
    )

    def fails() -> None:
        if gpu.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        timing.seconds_per_call([fails, fails], torch.device("cuda"), 0.0)
    assert ended == [(0, "pool")]
    assert gpu.current is None
