"""The benchmark of the machine's limits gives every figure or its reason."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CASES = [
    "copy",
    *(f"product {kind} 32" for kind in ("bfloat16", "tf32", "float32")),
    "launch",
    "launch in a CUDA graph",
    "row gather",
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import bench_limits

    return bench_limits


def test_every_limit_of_a_dry_run_has_a_figure_between_its_quartiles(bench: Any) -> None:
    before = torch.get_float32_matmul_precision()
    found = bench.run("cpu", 0.0, dry=True)
    assert [entry["case"] for entry in found["measurements"]] == CASES
    for entry in found["measurements"]:
        assert entry["value"] is not None, entry
        assert 0 < entry["low"] <= entry["value"] <= entry["high"] < math.inf
        assert entry["better"] == ("more" if entry["unit"].endswith("/s") else "less")
        assert entry["rounds"] >= 3
    assert torch.get_float32_matmul_precision() == before


def test_limits_of_a_cpu_are_of_float32_and_know_no_graphs(bench: Any) -> None:
    cases = [limit.case for limit in bench.limits(torch.device("cpu"), dry=False)]
    assert cases == ["copy", *(f"product float32 {n}" for n in (256, 512, 1024)), "launch", "row gather"]


def test_units_follow_from_the_seconds_of_a_call(bench: Any) -> None:
    units = {limit.case: (limit.unit, limit.value(0.5)) for limit in bench.limits(torch.device("cpu"), True)}
    assert units["copy"] == ("GB/s", 2 * 4 * 2**18 / 1e9 / 0.5)
    assert units["product float32 32"] == ("GFLOP/s", 2 * 32**3 / 1e9 / 0.5)
    assert units["launch"] == ("us", 0.5e6)
    assert units["row gather"] == ("ns per row", 0.5e9 / 64)


def test_a_limit_that_fails_is_listed_with_its_reason_and_the_others_run(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> None:
        raise RuntimeError("no C++ compiler 'c++'; install one or set CXX")

    monkeypatch.setattr("native.row_gather.load", load)
    *others, gathered = bench.run("cpu", 0.0, dry=True)["measurements"]
    assert all(entry["value"] for entry in others)
    assert gathered["value"] is None
    assert gathered["missing"] == "RuntimeError: no C++ compiler 'c++'; install one or set CXX"
    assert gathered["missing"] in capsys.readouterr().out.splitlines()[-1]


def test_rows_that_were_not_gathered_have_no_figure(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.RowGather, "gather", lambda self, count: self._out.reshape(-1, self.row_bytes))
    gathered = bench.run("cpu", 0.0, dry=True)["measurements"][-1]
    assert gathered["missing"] == "RuntimeError: the gathered rows are not those of their indices"


def test_the_command_line_stores_what_the_reader_takes(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness import read

    monkeypatch.setattr(bench, "run", lambda device, seconds: {"measurements": bench_run(bench)})
    monkeypatch.setattr(bench, "write", partial(bench.write, folder=tmp_path))
    assert bench.main(["--device", "cpu", "--save", "limits-cpu"]) == 0
    stored = read(tmp_path / "limits-cpu.json")
    assert stored["benchmark"] == "limits"
    assert len(stored["measurements"]) == len(CASES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capsys.readouterr()
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "bench_limits: torch sees no CUDA device\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--budget", "-1"], "--budget must be a number of seconds, at least 0"),
        (["--threads", "0"], "--threads must lie in 1..1024"),
        (
            ["--save", "nowhere/limits"],
            f"--save: there is no folder {ROOT / 'bench' / 'results' / 'nowhere'}",
        ),
    ],
)
def test_an_option_that_cannot_be_is_one_line(
    words: list[str], told: str, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--device", "cpu", *words]) == 2
    assert capsys.readouterr().err == f"bench_limits: {told}\n"


def bench_run(bench: Any) -> list[dict[str, Any]]:
    """A dry run's measurements: sizes of a real one take minutes on a slow machine."""
    limits = bench.limits(torch.device("cpu"), True)
    return [bench.measurement(limit, 0.0) for limit in limits]
