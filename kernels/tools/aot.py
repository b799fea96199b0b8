"""Compile every kernel for GPUs that are not there, and say what the compiler made of it.

    python -m brc_fast.kernels.tools.aot [--arch 80 90 100 120 gfx942] [--ops NAME ...] [--json FILE]

Every case of `cases` is run with its launches recorded instead of made, under the configurations of the
architecture asked for; each distinct launch is then compiled as it would be on that GPU: the same constants,
the same alignment hints. The table shows registers and spills as ptxas counts them, shared memory, matrix
instructions (wgmma) and loads of 16 bytes. On AMD the registers and spills are those of the compiler's own
notes. Not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.dispatch import INTERPRETED, Launch, recording
from ..runtime.language import triton
from ..runtime.tables import assume
from .cases import Case, cases

SHARED_MEMORY = {"80": 166912, "86": 101376, "89": 101376, "90": 232448, "100": 232448, "120": 101376}
SHARED_MEMORY |= {"gfx942": 65536}
WIDE_LOAD = r"ld\.global\S*\.v(?:[48]\.b32|[24]\.b64)|cp\.async\.cg"
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8",
    torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


class Compiled(NamedTuple):
    """What one launch was compiled to."""

    kernel: str
    case: str
    arch: str
    constants: dict[str, Any]
    warps: int
    registers: int
    spilled: int  # bytes stored and loaded again
    shared: int  # bytes
    wgmma: int
    wide_loads: int  # loads of 16 bytes
    dots: int  # matrix products in the kernel's source


def recorded(case: Case, arch: str, batch: int = 64) -> list[Launch]:
    """The launches that a case would make on this architecture."""
    name = arch if arch.startswith("gfx") else f"sm_{arch}"
    with assume(name):
        call = case.prepare(torch.device("cpu"), batch, "triton")
        with recording() as launches:
            call()
    return launches


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and hints of a launch, as Triton's own launcher derives them from the arguments."""
    names = launch.kernel.arg_names
    types: dict[str, str] = {}
    constants = dict(launch.constants)
    hints: dict[tuple[int, ...], Any] = {}
    for index, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        aligned = False
        if isinstance(value, Tensor):
            types[name] = POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            constants[name] = value
        elif isinstance(value, bool):
            types[name] = "i1"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            types[name] = "fp32"
        if aligned:
            hints[(index,)] = [["tt.divisibility", 16]]
    types |= {name: "constexpr" for name in names if name not in types}
    return {name: types[name] for name in names}, constants, hints


def compile_launch(launch: Launch, arch: str) -> Any:
    """The kernel as Triton would compile it for this launch on this architecture."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = arch.startswith("gfx")
    types, constants, hints = specialised(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=hints)
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
    return triton.compile(source, target=target, options=dict(launch.options))


def inspect(code: Any, arch: str) -> dict[str, int]:
    """Registers, spilled bytes, shared memory and instructions of a compiled kernel."""
    found = {"shared": int(code.metadata.shared)}
    if arch.startswith("gfx"):
        text = code.asm["amdgcn"]

        def note(name: str) -> int:
            return max((int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)

        spilled = 4 * (note("vgpr_spill_count") + note("sgpr_spill_count"))
        wide = len(re.findall(r"global_load_dwordx4|buffer_load_dwordx4", text))
        return found | {"registers": note("vgpr_count"), "spilled": spilled, "wgmma": 0, "wide_loads": wide}
    from triton.backends.nvidia.compiler import get_ptxas

    feature = "a" if int(arch) >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(code.asm["ptx"])
        words = [get_ptxas(int(arch)).path, "-v", f"--gpu-name=sm_{arch}{feature}", str(path)]
        done = subprocess.run([*words, "-o", f"{folder}/out"], capture_output=True, text=True, check=True)

    def count(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, done.stderr))

    return found | {
        "registers": count(r"Used (\d+) registers"),
        "spilled": count(r"(\d+) bytes spill stores") + count(r"(\d+) bytes spill loads"),
        "wgmma": code.asm["ptx"].count("wgmma.mma_async"),
        "wide_loads": len(re.findall(WIDE_LOAD, code.asm["ptx"])),
    }


def compile_all(arch: str, wanted: Iterable[Case]) -> Iterator[Compiled]:
    """Compile every distinct launch of these cases; RuntimeError under the interpreter."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 puts the interpreter in the compiler's place; unset it")
    seen = set()
    for case in wanted:
        for launch in recorded(case, arch):
            types, constants, hints = specialised(launch)
            mark = (launch.kernel.fn, *map(str, (types, constants, sorted(hints), launch.options)))
            if mark in seen:
                continue
            seen.add(mark)
            found = inspect(compile_launch(launch, arch), arch)
            yield Compiled(
                kernel=launch.kernel.fn.__name__.strip("_"),
                case=f"{case.op} {case.label}",
                arch=arch,
                constants=launch.constants,
                warps=launch.options["num_warps"],
                dots=launch.kernel.src.count("tl.dot("),
                **found,
            )


def complaints(row: Compiled) -> list[str]:
    """What must not be: spills, more shared memory than there is, a product that is no wgmma on Hopper."""
    out = []
    if row.spilled:
        out.append(f"{row.spilled} bytes spilled")
    if row.shared > SHARED_MEMORY.get(row.arch, 232448):
        out.append(f"{row.shared} bytes of shared memory, the chip has {SHARED_MEMORY[row.arch]}")
    if row.dots and row.arch == "90" and not row.wgmma:
        out.append("a product without wgmma")
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m brc_fast.kernels.tools.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", default=["90"], choices=list(SHARED_MEMORY))
    parser.add_argument("--ops", nargs="+", help="only these ops")
    parser.add_argument("--json", type=Path, help="write the table here too")
    given = parser.parse_args(arguments)
    if triton is None:
        print('triton is not installed; pip install "triton>=3.6"', file=sys.stderr)
        return 2
    if INTERPRETED:
        print("TRITON_INTERPRET=1 puts the interpreter in the compiler's place; unset it", file=sys.stderr)
        return 2
    known = sorted({case.op for case in cases()})
    for name in given.ops or ():
        if name not in known:
            print(f"unknown op {name}; there are {', '.join(known)}", file=sys.stderr)
            return 2
    rows, wrong = [], 0
    head = f"{'arch':>7}{'warps':>6}{'regs':>6}{'spill':>6}{'shared':>8}{'wgmma':>6}{'16B':>5}"
    print(f"{'kernel':<34}{head}  case")
    for arch in given.arch:
        for row in compile_all(arch, cases(given.ops)):
            told = complaints(row)
            wrong += bool(told)
            rows.append(row)
            numbers = f"{arch:>7}{row.warps:>6}{row.registers:>6}{row.spilled:>6}{row.shared:>8}"
            numbers += f"{row.wgmma:>6}{row.wide_loads:>5}"
            wrongs = f"  WRONG: {'; '.join(told)}" if told else ""
            print(f"{row.kernel:<34}{numbers}  {row.case}{wrongs}", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    print(f"{len(rows)} kernels, {wrong} with complaints (triton {triton.__version__})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
