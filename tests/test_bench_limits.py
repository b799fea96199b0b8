"""The machine's limits have a figure or its reason, and curves of cost go through what was measured."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import bench_limits
import bench_scaling
from harness import Results

from peers import updates

PRODUCTS = [f"product {kind} 32" for kind in ("bfloat16", "tf32", "float32")]
CASES = ["copy", *PRODUCTS, "launch", "launch in a CUDA graph", "row gather"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the benchmarks: several wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured() -> list[dict[str, Any]]:
    found = Results("limits")
    bench_limits.measure(found, list(bench_limits.limits("cpu", True)), 0.0)
    return found.entries


def test_every_limit_has_a_figure_between_its_quartiles() -> None:
    before = torch.get_float32_matmul_precision()
    entries = measured()
    assert [one["case"] for one in entries] == CASES
    for one in entries:
        assert 0 < one["low"] <= one["value"] <= one["high"] < math.inf
        assert one["better"] == ("more" if one["unit"].endswith("/s") else "less")
        assert one["rounds"] >= 3
    assert torch.get_float32_matmul_precision() == before


def test_limits_of_a_cpu_are_of_float32_and_know_no_graphs() -> None:
    cases = [limit.case for limit in bench_limits.limits("cpu", dry=False)]
    assert cases == ["copy", *(f"product float32 {n}" for n in (256, 512, 1024)), "launch", "row gather"]


def test_a_limit_that_fails_is_listed_with_its_reason_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("native.row_gather.LIBRARY", tmp_path / "row_gather.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    *others, gathered = measured()
    assert all(one["value"] for one in others)
    assert "no-such-compiler" in gathered["missing"]


def test_rows_that_were_not_gathered_have_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_limits.RowGather, "gather", lambda self, count: self._out[:count])
    assert measured()[-1]["missing"] == "RuntimeError: the gathered rows are not those of their indices"


def test_a_copy_that_cannot_be_measured_is_the_reason_for_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_limits.rate("cpu", "copy", dry=True) > 1e6
    bench_limits.rate.cache_clear()
    monkeypatch.setattr(bench_limits, "seconds_per_call", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(RuntimeError, match="no floor without the limit copy: out of memory"):
        bench_limits.rate("cpu", "copy", dry=True)


def test_a_curve_finds_the_cost_that_made_its_points_and_has_no_negative_cost() -> None:
    xs = [64, 128, 256, 512]
    found = bench_scaling.fit(xs, [2e-3 + 1e-6 * x**1.5 for x in xs])
    assert found is not None
    assert (found["power"], found["points"]) == (1.5, 4)
    assert (found["fixed"], found["rate"]) == pytest.approx((2e-3, 1e-6), rel=1e-6)
    falling = bench_scaling.fit(xs, [4.0, 3.0, 2.0, 1.0], 1.0)
    assert falling is not None
    assert falling["rate"] == 0.0 < falling["fixed"]
    assert bench_scaling.fit(xs[:2], [1.0, 2.0], 1.0) is None
    assert bench_scaling.fit(xs[:3], [1.0, 2.0, 3.0]) is None


def test_every_size_of_an_axis_has_a_time_and_a_floor_and_an_axis_its_curve() -> None:
    found = Results("scaling")
    bench_scaling.run(found, "cpu", ["batch", "tasks"], 6.0, dry=True)
    cases = [f"update, batch {x}" for x in (4, 8, 16)] + [f"update, tasks {x}" for x in (1, 2, 3, 4)]
    assert [one["case"] for one in found.entries] == cases
    assert all(one["value"] > one["floor"] > 0 for one in found.entries)
    assert [axis["axis"] for axis in found.found["axes"]] == ["batch", "tasks"]
    assert found.found["axes"][0]["fit"]["points"] == 3
    assert found.equality == "passed"


def test_an_update_that_differs_at_a_size_has_no_time_there(monkeypatch: pytest.MonkeyPatch) -> None:
    right = updates.difference

    def wrong(provider: Any, size: Any, known: Any) -> Any:
        return "loss" if size.workload.batch == 8 else right(provider, size, known)

    monkeypatch.setattr(updates, "difference", wrong)
    found = Results("scaling")
    bench_scaling.run(found, "cpu", ["batch"], 3.0, dry=True)
    assert [one["value"] is None for one in found.entries] == [False, True, False]
    assert found.equality == "failed: ours at update, batch 8 differs from plain PyTorch: loss"
