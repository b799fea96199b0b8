"""Arithmetic that kernels share."""

from __future__ import annotations

from .language import jit, tl

__all__ = ["scalar", "wide"]


@jit
def wide(x):  # type: ignore[no-untyped-def]
    """The type to compute in: float64 stays, everything narrower becomes float32."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@jit
def scalar(x_ptr, x, dtype):  # type: ignore[no-untyped-def]
    """The number at an address, or x where there is none."""
    if x_ptr is not None:
        return tl.load(x_ptr).to(dtype)
    else:
        return tl.full((), x, dtype)
