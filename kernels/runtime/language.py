"""Triton where it is installed; without it the kernels stay plain functions and every op takes its twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:
    triton = tl = None

__all__ = ["jit", "tl", "triton"]

jit: Callable[[Any], Any] = (lambda function: function) if triton is None else triton.jit
