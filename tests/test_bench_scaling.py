"""The benchmark of scaling fits what it measured, and times no update that is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import require

from brc_fast import kernels

ROOT = Path(__file__).resolve().parent.parent
UPDATES = ["width", "batch", "tasks"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import bench_scaling

    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield bench_scaling
    torch.set_num_threads(threads)


def test_a_curve_is_found_again(bench: Any) -> None:
    xs = [64, 128, 256, 512]
    found = bench.fit(xs, [2.0 + 0.01 * x**1.5 for x in xs])
    assert (found.fixed, found.rate, found.power) == pytest.approx((2.0, 0.01, 1.5))
    assert found.residual < 1e-9
    line = bench.fit([1, 2, 4], [5.0, 7.0, 11.0], power=1.0)
    assert tuple(line) == pytest.approx((3.0, 2.0, 1.0, 0.0, 3), abs=1e-9)
    assert line(10) == pytest.approx(23.0)


def test_a_curve_has_no_negative_cost_and_tells_how_far_it_is_off(bench: Any) -> None:
    falling = bench.fit([1, 2, 4], [4.0, 3.0, 2.0], power=1.0)
    assert (falling.fixed >= 0.0, falling.rate) == (True, 0.0)
    assert 0.2 < falling.residual < 0.4
    steep = bench.fit([1, 2, 4], [1.0, 4.0, 16.0], power=1.0)
    assert steep.fixed == 0.0 < steep.rate


def test_too_few_sizes_have_no_curve(bench: Any) -> None:
    assert bench.fit([1, 2], [1.0, 2.0], power=1.0) is None
    assert bench.fit([1, 2, 3], [1.0, 2.0, 3.0]) is None
    assert bench.sentence(None) == "too few sizes for a curve"


@pytest.mark.exhaustive
def test_a_dry_run_stores_points_fits_and_a_picture(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require("matplotlib")
    monkeypatch.setattr(bench, "write", partial(bench.write, folder=tmp_path))
    picture = tmp_path / "scaling.png"
    words = ["--device", "cpu", "--axes", *UPDATES, "--dry", "--budget", "120", "--save", "scaling"]
    assert bench.main([*words, "--picture", str(picture)]) == 0
    stored = json.loads((tmp_path / "scaling.json").read_text())
    assert (stored["benchmark"], stored["equality"]) == ("scaling", "passed")
    assert [row["axis"] for row in stored["axes"]] == UPDATES
    for row in stored["axes"]:
        assert row["x"] == list(bench.DRY[row["axis"]])
        assert row["missing"] == {}
        assert row["fit"]["residual"] < 1.0
        assert row["axis"] not in row["kept"]
        for low, middle, high, floor in zip(
            row["low"], row["seconds"], row["high"], row["floor"], strict=True
        ):
            assert 0 < low <= middle <= high
            assert floor > 0
    assert stored["axes"][2]["fit"]["points"] == 3  # of four: one task has no embedding
    cases = [one["case"] for one in stored["measurements"]]
    assert len(set(cases)) == len(cases) == 11
    assert cases[0] == "update, width 8"
    first = stored["measurements"][0]
    assert (first["unit"], first["better"], first["provider"]) == ("us", "less", "ours")
    assert first["value"] == pytest.approx(1e6 * stored["axes"][0]["seconds"][0])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "update against tasks; width 16, batch 8" in capsys.readouterr().out


def test_an_update_that_is_wrong_has_no_point_but_the_reason(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "normalized_embedding_backward", lambda *_, out, **__: out.zero_())
    assert bench.main(["--device", "cpu", "--axes", "tasks", "--dry", "--budget", "60"]) == 1
    told = capsys.readouterr()
    lines = {line.split()[0]: line for line in told.out.splitlines()[1:5]}
    assert "differs from plain PyTorch" not in lines["1"]
    assert all("-  differs from plain PyTorch: " in lines[x] for x in "234")
    assert "too few sizes for a curve" in told.out
    assert told.err.startswith("failed: update, tasks 2: differs from plain PyTorch")


def test_time_that_is_up_leaves_out_sizes_evenly_and_says_so(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "DRY", {"batch": (4, 8, 12, 16, 20), "width": (8, 12, 16, 20, 24, 28)})
    found = bench.run("cpu", ["batch", "width"], seconds=0.0, dry=True)
    batch, width = found["axes"]
    assert batch["x"] == [4, 12, 20]
    assert batch["missing"] == {8: "time was up", 16: "time was up"}
    assert batch["fit"]["points"] == 3
    assert width["x"] == [8, 16, 20, 28]
    assert width["fit"]["points"] == 4
    assert [one["value"] is None for one in found["measurements"][:5]] == [False, True, False, True, False]
    assert found["equality"] == "passed"


def test_sizes_are_taken_from_the_ends_to_the_middles_of_gaps(bench: Any) -> None:
    assert bench.spread((1, 2, 4, 8, 16, 32, 64)) == [1, 64, 8, 2, 16, 4, 32]
    assert [bench.spread(sizes) for sizes in ((), (5,), (5, 6))] == [[], [5], [5, 6]]


def test_an_axis_without_a_curve_says_why(bench: Any) -> None:
    axis = bench.Axis("tasks", "ours", {})
    axis.times = {1: [1.0], 2: [1.0], 64: [2.0]}
    told = "too few sizes for a curve: 2 of at least 3 have a time"
    assert axis.row()["no_fit"] == told
    axis.missing = {8: bench.TIME_UP}
    assert axis.lines()[-1] == f"  {told}; raise --budget"
    axis.times[16] = [1.5]
    assert axis.no_curve is None


def test_a_step_is_timed_for_every_number_of_environments(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("gymnasium")
    monkeypatch.setattr(bench, "TASK", "gym/Pendulum-v1")
    found = bench.run("cpu", ["environments"], seconds=60.0, dry=True)
    (row,) = found["axes"]
    assert (row["what"], row["x"], row["missing"]) == ("step", [1, 2, 3], {})
    assert row["floor"] == [None] * 3
    assert row["fit"]["power"] == 1.0
    assert [one["case"] for one in found["measurements"]] == [f"step, environments {x}" for x in (1, 2, 3)]


def test_environments_that_cannot_be_made_are_missing_with_the_reason(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "TASK", "mjx/NoSuchTask")
    found = bench.run("cpu", ["environments"], seconds=60.0, dry=True)
    (row,) = found["axes"]
    assert row["x"] == []
    assert row["missing"].keys() == {1, 2, 3}
    assert all("\n" not in reason for reason in row["missing"].values())
    assert all(one["value"] is None for one in found["measurements"])


def test_what_cannot_be_done_is_one_line(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import plot_scaling

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "bench_scaling: torch sees no CUDA device\n"
    assert bench.main(["--device", "cpu", "--budget", "-1"]) == 2
    assert capsys.readouterr().err == "bench_scaling: --budget must be a number of seconds, at least 0\n"
    require("matplotlib")
    with pytest.raises(ValueError, match=r"no axis with times; bench_scaling\.py --save NAME measures them"):
        plot_scaling.draw({"axes": []}, tmp_path / "none.png")
