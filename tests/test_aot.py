"""Every kernel, compiled for a GPU that is not there: no spills, no more shared memory than the chip has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import require

require("triton")
from brc_fast import kernels
from brc_fast.kernels.runtime import dispatch, tables
from brc_fast.kernels.runtime.language import jit, tl
from brc_fast.kernels.tools import aot
from brc_fast.kernels.tools.cases import FAMILIES

NVIDIA = Path(aot.triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = [
    pytest.mark.skipif(dispatch.INTERPRETED, reason="the interpreter takes the compiler's place"),
    pytest.mark.skipif(not (NVIDIA / "ptxas").exists(), reason="this triton ships no ptxas"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_of_a_family_fit_an_h200(family: str) -> None:
    rows = list(aot.compile_all("90", FAMILIES[family]()))
    assert rows
    wrong = {f"{row.kernel} in {row.case}": aot.complaints(row) for row in rows if aot.complaints(row)}
    assert not wrong
    assert all(0 < row.registers <= 255 for row in rows)


@pytest.mark.parametrize("op", ["bias_layer_norm", "adamw_"])
def test_what_moves_most_of_the_memory_is_loaded_sixteen_bytes_at_a_time(op: str) -> None:
    cases = [case for case in aot.cases([op]) if "H=1024" in case.label or "1024*batch float32" in case.label]
    rows = [row for row in aot.compile_all("90", cases) if "finish" not in row.kernel]
    assert len(rows) >= 3
    assert min(row.wide_loads for row in rows) >= 2


@pytest.mark.parametrize("arch", [arch for arch in aot.SHARED_MEMORY if arch != "90"])
def test_other_architectures_compile_and_have_their_own_configuration(arch: str) -> None:
    case = next(iter(aot.cases(["expected_value"])))
    rows = list(aot.compile_all(arch, [case]))
    assert {row.arch for row in rows} == {arch}
    assert not [told for row in rows for told in aot.complaints(row)]


@jit
def _product_kernel(x_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + i[None, :])
    tl.store(out_ptr + i[:, None] * N + i[None, :], tl.dot(x, x))


@jit
def _crowded_kernel(x_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """All N values live until their sum is known."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x / tl.sum(x))


def compiled(kernel: Any, size: int, warps: int, *tensors: torch.Tensor) -> aot.Compiled:
    with tables.assume("sm_90"), dispatch.recording() as launches:
        dispatch.launch(kernel, (1,), *tensors, N=size, num_warps=warps)
    found = aot.inspect(aot.compile_launch(launches[0], "90"), "90")
    return aot.Compiled("", "", "90", {}, warps, dots=kernel.src.count("tl.dot("), **found)


def test_a_spill_is_seen_and_a_product_without_wgmma() -> None:
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    product = compiled(_product_kernel, 64, 4, x, x.float())
    assert product.dots == 1
    assert product.wgmma > 0
    assert aot.complaints(product) == []
    assert aot.complaints(product._replace(wgmma=0)) == ["a product without wgmma"]
    roomy, crowded = (compiled(_crowded_kernel, 16384, n, torch.zeros(16384), x.float()) for n in (16, 1))
    assert aot.complaints(roomy) == []
    assert aot.complaints(crowded) == [f"{crowded.spilled} bytes spilled"]
    assert crowded.spilled > 0
    greedy = roomy._replace(shared=300_000)
    assert aot.complaints(greedy) == ["300000 bytes of shared memory, the chip has 232448"]


def test_arguments_are_specialised_as_by_a_launch() -> None:
    def kernel(a_ptr, b_ptr, one, sixteen, odd, large, x, flag, nothing, BLOCK) -> None:  # type: ignore[no-untyped-def]
        pass

    a = torch.zeros(64)
    values = (a, a[1:], 1, 32, 33, 2**40, 0.5, True, None)
    fake: Any = type("Kernel", (), {"arg_names": list(kernel.__code__.co_varnames[:10])})
    types, constants, hints = aot.specialised(dispatch.Launch(fake, (1,), values, {"BLOCK": 8}, {}))
    assert types["a_ptr"] == types["b_ptr"] == "*fp32"
    assert [types[n] for n in ("sixteen", "odd", "large", "x", "flag")] == ["i32", "i32", "i64", "fp32", "i1"]
    assert constants == {"BLOCK": 8, "one": 1, "nothing": None}
    assert set(hints) == {(0,), (3,), (5,)}  # aligned to 16 bytes, and multiples of 16


def run(*words: str, **switches: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "brc_fast.kernels.tools.aot", *words]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | switches)


def test_the_command_prints_a_table_and_writes_it(tmp_path: Path) -> None:
    done = run("--ops", "expected_value", "--arch", "90", "--json", str(tmp_path / "table.json"))
    assert done.returncode == 0, done.stderr
    assert "expected_value_kernel" in done.stdout
    assert " 0 with complaints" in done.stdout
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {row["arch"] for row in rows} == {"90"}


def test_the_command_refuses_what_it_cannot_do_in_one_line() -> None:
    unknown = run("--ops", "fly")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("unknown op fly; there are adamw_, ")
    interpreted = run("--ops", "expected_value", TRITON_INTERPRET="1")
    assert interpreted.returncode == 2
    assert "puts the interpreter in the compiler's place; unset it" in interpreted.stderr


def test_every_public_op_has_a_case() -> None:
    public = {name for name in kernels.__all__ if not name[0].isupper()} - {"reference", "use"}
    assert public == {case.op for case in aot.cases()}
