"""The benchmark of the kernels times nothing that is wrong and loses nothing that it has timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import require
from torch import Tensor

from brc_fast.kernels import reference
from brc_fast.kernels.tools.cases import Case

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ABSENT = 'liger_kernel is not installed; pip install "brc-fast[bench]"'
# Of every op the first case and the first with results in 2 bytes: why its kernels have no time, as they are
# and with one of their results 1 % too large, each in turn.
PLANTING = """
import json, sys
sys.path[:0] = sys.argv[2:]
import honest_bfloat16, pytest, torch
import bench_kernels as bench

honest_bfloat16.install(pytest.MonkeyPatch())

kept, wrong, rotated = {}, None, bench.rotated

def stored(case, impl):
    key = case.op, case.label, impl
    if key not in kept:
        kept[key] = bench.results(rotated(case, torch.device("cpu"), 4, impl, sets=1)[0])
    return kept[key]

def planted(case, device, batch, impl, sets=None):
    found = list(stored(case, impl))
    if impl == "triton" and wrong is not None and wrong < len(found):
        found[wrong] = 1.01 * found[wrong]
    return [lambda: found]

bench.rotated = planted
chosen = {}
for case in bench.all_cases():
    if "float64" not in case.label:
        own = chosen.setdefault(case.op, [])
        if not own or len(own) == 1 and bench.rounded(stored(case, "reference")):
            own.append(case)
told = []
for case in (case for own in chosen.values() for case in own):
    places = [place for place, x in enumerate(stored(case, "reference")) if x.is_floating_point()]
    reasons = []
    for wrong in (None, *places):
        bench.wrong_in_float32.cache_clear()
        found = bench.measure(case, torch.device("cpu"), 4, "kernels", seconds=0.0, backend="")
        reasons.append(found.get("missing"))
    told.append((case.op, case.label, reasons))
json.dump(told, open(sys.argv[1], "w"))
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as if kernels ran here."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import bench_kernels

    monkeypatch.setattr(bench_kernels, "INTERPRETED", True)
    return bench_kernels


def expected_value(logits: Tensor, atoms: Tensor) -> Tensor:
    """In the place of a kernel."""
    return (torch.softmax(logits, -1) * atoms).sum(-1)


def case(kernel: Callable[[Tensor, Tensor], Tensor] = expected_value, op: str = "expected_value") -> Case:
    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        logits = torch.randn(2, batch, 51, device=device, requires_grad=True)
        atoms, seed = torch.linspace(-1, 1, 51, device=device), torch.randn(2, batch, device=device)

        def call() -> object:
            out = kernel(logits, atoms) if impl == "triton" else reference.expected_value(logits, atoms)
            return out, torch.autograd.grad(out, logits, seed)

        return call

    return Case(op, "E=2 K=51 float32", prepare, lambda batch: 2**20 * batch)


def run(bench: Any, *cases: Case, seconds: float = 60.0) -> dict[str, Any]:
    return bench.run(CPU, seconds, dry=True, cases=cases)  # type: ignore[no-any-return]


def test_a_row_holds_every_provider_its_share_and_the_ratios(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(bench, case())
    (row,) = found["rows"]
    providers = row["providers"]
    assert providers.keys() == {"kernels", "eager", "compile"}
    for name, told in providers.items():
        low, high = told["quartiles"]
        assert 0 < low <= told["seconds"] <= high
        assert told["seconds_outside_of_a_graph"] > 0
        assert row["share_of_copy"][name] == row["floor_seconds"] / told["seconds"]
    assert row["floor_seconds"] == row["bytes"] / found["machine"]["copy_bytes_per_second"]
    ratio = providers["compile"]["seconds"] / providers["kernels"]["seconds"]
    assert row["kernels_speedup_over"]["compile"] == ratio
    assert row["target"] == {"share": 0.8, "over_compile": None, "bytes_per_parameter": None}
    assert {p["kind"] for p in found["products"]} == {"bfloat16", "tf32", "float32"}
    assert {p["K"] for p in found["products"]} > {123, 128}
    assert found["equality"] == "passed"
    for entry in found["measurements"]:
        told = providers[entry["provider"]]
        assert entry["case"] == "expected_value E=2 K=51 float32 B=4"
        assert (entry["unit"], entry["value"]) == ("us", 1e6 * told["seconds"])
        assert (entry["low"], entry["high"]) == tuple(1e6 * value for value in told["quartiles"])
        assert (entry["rounds"], entry["floor"]) == (told["samples"], 1e6 * row["floor_seconds"])
    assert found["not_reached"] == 0
    assert found["aborted"] is None
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("expected_value"))
    assert line.endswith(">= 80%")


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
        (
            lambda logits, atoms: expected_value(logits, atoms) * float("nan"),
            "differs from the twin: result 0",
        ),
        (broken, "ValueError: cannot be compiled"),
    ],
    ids=["value", "gradient", "one row", "nan", "exception"],
)
def test_a_wrong_kernel_has_a_reason_and_no_time(
    kernel: Callable[[Tensor, Tensor], Tensor], reason: str, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(bench, case(kernel))
    (row,), (entry, *_) = found["rows"], found["measurements"]
    assert (entry["provider"], entry["value"]) == ("kernels", None)
    assert entry["missing"].startswith(reason)
    assert row["providers"]["kernels"].keys() == {"missing"}
    assert row["providers"]["kernels"]["missing"].startswith(reason)
    assert row["kernels_speedup_over"] == {}
    assert "seconds" in row["providers"]["eager"]
    assert f"    kernels: {reason}" in capsys.readouterr().out


def test_the_compiled_twin_is_checked_too(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        assert options == {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
        return lambda *arguments: 1.01 * function(*arguments)

    monkeypatch.setattr(torch, "compile", wrong)
    (row,) = run(bench, case())["rows"]
    assert row["providers"]["compile"]["missing"].startswith("differs from the twin")
    assert "seconds" in row["providers"]["kernels"]


def test_only_the_twin_that_the_op_enters_is_compiled_and_it_comes_back(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin, inner = reference.two_hot, reference.expected_value
    monkeypatch.setattr(reference, "two_hot", outer := lambda x: reference.expected_value(x, x[0]))
    outer.__module__ = reference.__name__
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    with bench.compiled(lambda: reference.two_hot(torch.ones(2, 3)), "eager"):
        reference.two_hot(torch.ones(2, 3))
    assert compiled == [outer]
    assert (reference.two_hot, reference.expected_value) == (outer, inner)
    with pytest.raises(AttributeError, match="no_such_twin"), bench.instead({"two_hot": twin}):
        reference.no_such_twin  # noqa: B018
    assert reference.two_hot is outer


def test_an_op_that_passes_its_twin_by_cannot_be_compared_with_its_compilation(bench: Any) -> None:
    aside = case()._replace(prepare=lambda device, batch, impl: lambda: torch.ones(batch))
    (row,) = run(bench, aside)["rows"]
    assert row["providers"]["compile"] == {
        "missing": "the op does not call its twin through kernels.reference"
    }


def test_kernels_do_not_run_on_a_cpu_without_the_interpreter(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "INTERPRETED", False)
    (row,) = run(bench, case())["rows"]
    assert row["providers"]["kernels"] == {"missing": "not on this device"}


def test_liger_is_listed_with_its_reason_for_what_it_has_alone(bench: Any) -> None:
    ops = "expected_value", "bias_layer_norm", "categorical_cross_entropy"
    rows = run(bench, *(case(op=op) for op in ops))["rows"]
    none, norm, entropy = (row["providers"].get("liger") for row in rows)
    assert none is None
    assert norm["missing"] in ("not on this device", ABSENT)
    assert entropy["missing"].startswith("Liger's cross-entropy takes the index of a class")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("liger_kernel", ABSENT),
        ("other", 'liger_kernel cannot be imported (no other); pip install "brc-fast[bench]"'),
    ],
)
def test_liger_that_cannot_be_imported_says_how_to_get_it(
    name: str, reason: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        @staticmethod
        def find_spec(module: str, *_: object) -> None:
            if module.startswith("liger_kernel"):
                raise ModuleNotFoundError(f"no {name}", name=name)

    for module in [module for module in sys.modules if module.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    (row,) = run(bench, case(op="bias_layer_norm"))["rows"]
    assert row["providers"]["liger"] == {"missing": reason}


def test_liger_in_the_twins_place_computes_what_the_twin_does(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Function:
        @staticmethod
        def apply(x: Tensor, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
            return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, shift, eps)

    module = type(sys)("liger_kernel.ops.layer_norm")
    module.LigerLayerNormFunction = Function  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for lead in ((), (3,)):
        x, residual = torch.randn(2, *lead, 5, 8)
        vectors = torch.randn(3, *lead, 8)
        for options in ({}, {"relu": True}, {"residual": residual}):
            expected = reference.bias_layer_norm(x, *vectors, **options)
            with bench.liger():
                assert reference.bias_layer_norm.__module__ == bench.__name__
                torch.testing.assert_close(reference.bias_layer_norm(x, *vectors, **options), expected)


def test_what_time_does_not_allow_is_counted(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(bench, case(), case(), seconds=0.0)
    assert found["rows"] == []
    assert found["not_reached"] == 4  # the second case of an op is not compiled or interpreted in a dry run
    assert "4 measurements were not made: time was up" in capsys.readouterr().out


def test_a_spoilt_device_ends_the_run_and_keeps_what_there_is(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = bench.measure

    def spoilt(subject: Case, device: torch.device, batch: int, name: str, **options: Any) -> dict[str, Any]:
        if name == "compile":
            raise RuntimeError("an illegal memory access was encountered")
        return measure(subject, device, batch, name, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(bench, "measure", spoilt)
    found = run(bench, case(), case(op="other"))
    assert found["aborted"].startswith("expected_value E=2 K=51 float32, compile: an illegal memory access")
    assert found["not_reached"] == 1
    assert all("seconds" in row["providers"]["kernels"] for row in found["rows"])


def test_the_command_line_writes_rows_with_the_machine(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "all_cases", lambda ops=None: iter([case()]))
    assert bench.main(["--dry", "--json", str(tmp_path / "kernels.json")]) == 0
    stored = json.loads((tmp_path / "kernels.json").read_text())
    assert {"cpu", "gpu", "versions", "commit", "machine", "products"} <= stored.keys()
    assert stored["rows"][0]["op"] == "expected_value"
    capsys.readouterr()
    assert bench.main(["--dry", "--ops", "nothing"]) == 2
    assert capsys.readouterr().err == "bench_kernels: unknown op nothing; there are expected_value\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert capsys.readouterr().err == "bench_kernels: torch sees no CUDA device; --dry runs on the CPU\n"


def test_targets_are_for_work_that_fills_a_gpu(bench: Any) -> None:
    subject = case(op="bias_layer_norm")
    asked = {
        ("E=2 H=512 bfloat16", 2**20): 1.2,
        ("E=2 H=1024 float64", 2**20): None,
        ("E=2 H=256 bfloat16", 2**20): None,
        ("E=2 H=512 bfloat16", 2**19): None,
    }
    for (label, moved), over in asked.items():
        target = bench.target_of(subject._replace(label=label), moved)
        assert (target and target.over_compile) == over
    assert bench.target_of(case(op="tanh_gaussian"), 2**20) is None


def test_all_ops_come_first_and_cases_from_all_over_their_lists(bench: Any) -> None:
    cases = [case(op="a")._replace(label=str(n)) for n in range(8)] + [case(op="b")._replace(label="0")]
    order = [(rank, c.op, c.label) for rank, c in bench.spread(cases)]
    assert order == [(0, "a", "0"), (0, "b", "0"), *((i, "a", n) for i, n in enumerate("4261537", 1))]


def test_the_optimizer_is_timed_at_136_million_parameters(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = case(op="adamw_")._replace(bytes=lambda batch: 38 * 1024 * batch)
    assert [round(batch * bench.PARAMETERS / 1e6) for batch in bench.batches_of(subject)] == [136, 4]
    line = str(bench.Row(subject, 132_813, CPU, 4e12, 0, large=True))
    assert line.endswith(">= 85% and 38 <= 40 B per parameter")


def test_what_is_allowed_follows_from_the_least_precise_result(bench: Any) -> None:
    wide, low = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    whole = torch.ones(2, dtype=torch.int64)
    assert bench.allowed("kernels", "ema_", [wide, low]) == bench.TWIN
    assert bench.allowed("liger", "ema_", [wide, whole]) == {torch.float32: bench.TWIN[torch.float32]}
    assert set(bench.allowed("liger", "ema_", [wide, low]).values()) == {bench.TWIN[torch.bfloat16]}
    assert set(bench.allowed("kernels", "bronet", [low, wide]).values()) == {bench.DEEP[torch.bfloat16]}
    assert bench.allowed("kernels", "bronet", [wide]) == {torch.float32: bench.TWIN[torch.float32]}
    assert bench.allowed("compile", "gather_rows", [whole]) == {}


def test_the_float32_case_is_the_most_alike_without_results_in_2_bytes(bench: Any) -> None:
    cases = {f"{case.op} {case.label}": case for case in bench.all_cases()}
    for name, expected in {
        "bias_layer_norm E=2 H=512 bfloat16 frozen rows x32": "E=2 H=512 float32 frozen rows x32",
        "tanh_gaussian_backward A=24 bfloat16 into halves": "A=24 float32 into halves",
        "ema_ P=1024*batch float32, with copy": "P=1024*batch float32, without copy",
        "categorical_bellman_loss_and_gradient E=2 K=101 bfloat16 padded": "E=2 K=101 float32",
    }.items():
        subject = cases[name]
        for label in (subject.label, f"dogs: {subject.label}"):
            assert bench.in_float32(subject._replace(label=label), CPU).label == expected
    assert bench.in_float32(case(op="other"), CPU) is None


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, list[str | None]]]:
    """Of each op and case, why real kernels and wrong ones have no time, in the interpreter."""
    require("triton")
    path = tmp_path_factory.mktemp("kernels") / "told.json"
    done = subprocess.run(
        [sys.executable, "-c", PLANTING, *map(str, (path, ROOT / "bench", ROOT / "tests"))],
        cwd=path.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_sound_kernels_of_every_op_have_a_time(
    bench: Any, outcomes: list[tuple[str, str, list[str | None]]]
) -> None:
    assert {op for op, _, _ in outcomes} == {case.op for case in bench.all_cases()}
    assert [(op, label, sound) for op, label, (sound, *_) in outcomes if sound is not None] == []


def test_a_result_that_is_one_percent_off_costs_any_op_its_time(
    outcomes: list[tuple[str, str, list[str | None]]],
) -> None:
    for op, label, (_, *reasons) in outcomes:
        assert reasons, f"{op} {label} has no result to spoil"
        for place, reason in enumerate(reasons):
            assert reason is not None, f"{op} {label}: result {place}"
            assert f"differs from the twin: result {place} is off by" in reason


def test_real_kernels_agree_with_their_twins_and_have_a_time_in_the_interpreter(tmp_path: Path) -> None:
    require("triton")
    words = ["--dry", "--ops", "ema_", "tanh_gaussian", "--json", str(tmp_path / "kernels.json")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "bench_kernels.py"), *words],
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    for op in ("ema_", "tanh_gaussian"):
        providers = next(row["providers"] for row in rows if row["op"] == op)
        assert all("seconds" in providers[name] for name in ("kernels", "eager", "compile")), providers
