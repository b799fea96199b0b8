"""Bfloat16 in Triton's interpreter, as a GPU does it.

The interpreter keeps a bfloat16 as the 16 bits that it is and computes with those bits as integers; only some
of its casts know better, and those cut off where a GPU rounds to nearest even. Here every operation on
bfloat16 goes through float32 and rounds its result. Reductions do not: a kernel must widen before them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    up = (bits >> 16) & 1
    near = ((bits.astype(np.uint64) + 0x7FFF + up) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), near)


def widened(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 -> float32."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter's arithmetic, casts and products of bfloat16 those of a GPU."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle as Handle

    def narrow(handle: Any) -> bool:
        return bool(handle.dtype.scalar == tl.bfloat16)

    def wide(handle: Any) -> Any:
        return Handle(widened(handle.data), tl.float32) if narrow(handle) else handle

    def back(data: np.ndarray) -> Any:
        return Handle(rounded(data.astype(np.float32)), tl.bfloat16)

    cast, convert = Builder.cast_impl, Builder.create_fp_to_fp
    dot, binary, unary = Builder.create_dot, Builder.binary_op, Builder.unary_op

    def honest_cast(self: Any, source: Any, to: Any) -> Any:
        if narrow(source):
            return wide(source) if to.scalar == tl.float32 else cast(self, wide(source), to)
        return back(source.data) if to.scalar == tl.bfloat16 else cast(self, source, to)

    def honest_convert(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if to.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float32, tl.float64):
            return back(source.data)
        return convert(self, source, to, rounding)

    def honest_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def honest_binary(self: Any, a: Any, b: Any, op: Any) -> Any:
        out = binary(self, wide(a), wide(b), op)
        rounds = (narrow(a) or narrow(b)) and out.data.dtype != np.bool_
        return back(out.data) if rounds else out

    def honest_unary(self: Any, x: Any, op: Any) -> Any:
        out = unary(self, wide(x), op)
        return back(out.data) if narrow(x) and out.data.dtype != np.bool_ else out

    monkeypatch.setattr(Builder, "cast_impl", honest_cast)
    monkeypatch.setattr(Builder, "create_fp_to_fp", honest_convert)
    monkeypatch.setattr(Builder, "create_dot", honest_dot)
    monkeypatch.setattr(Builder, "binary_op", honest_binary)
    monkeypatch.setattr(Builder, "unary_op", honest_unary)
