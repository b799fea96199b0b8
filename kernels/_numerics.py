"""Arithmetic that kernels share."""

from __future__ import annotations

from ._triton import jit, tl

__all__ = ["wide"]


@jit
def wide(x):  # type: ignore[no-untyped-def]
    """The type to compute in: float64 stays, everything narrower becomes float32."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)
