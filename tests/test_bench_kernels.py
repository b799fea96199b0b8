"""The benchmark of the kernels times nothing that is wrong and loses nothing that it has timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from brc_fast.kernels import reference
from brc_fast.kernels.tools.cases import Case

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import bench_kernels
import harness

CPU = torch.device("cpu")
Kernel = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as if kernels ran here."""
    monkeypatch.setattr(bench_kernels, "INTERPRETED", True)
    return bench_kernels


def expected_value(logits: Tensor, atoms: Tensor) -> Tensor:
    """In the place of a kernel."""
    return (torch.softmax(logits, -1) * atoms).sum(-1)


def case(kernel: Kernel = expected_value, op: str = "expected_value", label: str = "E=2 K=51") -> Case:
    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        logits = torch.randn(2, batch, 51, device=device, requires_grad=True)
        atoms, seed = torch.linspace(-1, 1, 51, device=device), torch.randn(2, batch, device=device)

        def call() -> object:
            out = kernel(logits, atoms) if impl == "triton" else reference.expected_value(logits, atoms)
            return out, torch.autograd.grad(out, logits, seed)

        return call

    return Case(op, label, prepare, lambda batch: 2**20 * batch)


def run(bench: Any, *cases: Case, seconds: float = 60.0) -> tuple[Any, int]:
    found = bench.Results("kernels", judged="kernels")
    return found, bench.run(found, {each: [4] for each in cases}, CPU, seconds, True)


def test_every_provider_has_its_time_a_ratio_and_the_floor_of_a_copy(bench: Any) -> None:
    found, code = run(bench, case())
    kernels, eager = found.entries
    assert (code, kernels["provider"], eager["provider"]) == (0, "kernels", "eager")
    assert kernels["floor"] == pytest.approx(1e6 * 2**22 / found.found["bandwidth"])
    assert kernels["case"].startswith("expected_value E=2 K=51 B=4")
    middle, low, high = eager["ratio"]
    assert low <= middle <= high
    for one in (kernels, eager):
        assert 0 < one["low"] <= one["value"] <= one["high"]
        assert one["over_floor"] == pytest.approx(one["value"] / one["floor"])


def scaled_gradient(logits: Tensor, atoms: Tensor) -> Tensor:
    out = expected_value(logits, atoms)
    return out + 0.02 * (out - out.detach())


def last_row_lost(logits: Tensor, atoms: Tensor) -> Tensor:
    mask = torch.ones_like(logits[..., 0])
    mask[-1, -1] = 0.0
    return expected_value(logits, atoms) * mask


def broken(logits: Tensor, atoms: Tensor) -> Tensor:
    raise ValueError("cannot be compiled")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (lambda logits, atoms: expected_value(logits, 1.01 * atoms), "differs from the twin: result 0"),
        (scaled_gradient, "differs from the twin: result 1"),
        (last_row_lost, "differs from the twin: result 0"),
        (lambda logits, atoms: expected_value(logits, atoms) * float("nan"), "differs from the twin: res"),
        (broken, "cannot be compiled"),
    ],
    ids=["value", "gradient", "one row", "nan", "exception"],
)
def test_a_wrong_kernel_has_a_reason_and_no_time(kernel: Kernel, reason: str, bench: Any) -> None:
    found, code = run(bench, case(kernel))
    kernels, eager = sorted(found.entries, key=lambda entry: entry["provider"] != "kernels")
    assert kernels["value"] is None
    assert kernels["missing"].startswith(reason)
    assert eager["value"] > 0
    assert "ratio" not in eager
    assert code == reason.startswith("differs")


def test_a_peer_that_differs_costs_no_more_than_its_own_time(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only(name: str) -> Any:
        found = bench.Results("kernels", judged="kernels", bandwidth=1e9)
        bench.measure(found, case(lambda x, z: 2 * expected_value(x, z)), CPU, 4, [name, "eager"], 0.0)
        return found

    assert only("kernels").equality.startswith("failed: kernels at ")
    monkeypatch.setitem(bench.IMPLS, "compile", "triton")
    found = only("compile")
    assert found.entries[-1]["missing"].startswith("differs from the twin")
    assert found.equality == "passed"


def test_kernels_do_not_run_on_a_cpu_without_the_interpreter(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "INTERPRETED", False)
    found, _ = run(bench, case())
    told = {one["provider"]: one["missing"] for one in found.entries if one["value"] is None}
    assert told["kernels"] == "not on this device"


def test_what_time_does_not_allow_is_listed(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found, code = run(bench, case(), case(label="again"), seconds=0.0)
    assert found.found["not_reached"] == ["expected_value E=2 K=51 B=4", "expected_value again B=4"]
    assert "2 cases were not reached: time was up" in capsys.readouterr().out
    assert code == 1  # nothing was compared


def test_a_spoilt_device_ends_the_run_and_keeps_what_there_is(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = bench.measure

    def spoilt(found: Any, subject: Case, *rest: Any) -> None:
        if subject.op == "other":
            raise RuntimeError("an illegal memory access was encountered")
        measure(found, subject, *rest)

    monkeypatch.setattr(bench, "measure", spoilt)
    found, code = run(bench, case(), case(op="other"), case(label="after"))
    assert (code, found.found["status"]) == (1, "failed")
    assert found.found["reason"].startswith("other E=2 K=51: an illegal memory access")
    assert {one["case"].split()[0] for one in found.entries} == {"expected_value"}


def test_the_command_line_writes_a_result_and_knows_its_ops(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "all_cases", lambda: iter([case(), case(op="other")]))
    path = tmp_path / "kernels"
    assert bench.main(["--dry", "--ops", "expected_value", "--save", str(path)]) == 0
    stored = harness.read(path.with_suffix(".json"))["measurements"]
    assert [(one["case"].split()[0], one["provider"]) for one in stored] == [
        ("expected_value", name) for name in ("kernels", "eager")
    ]
