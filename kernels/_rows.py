"""The one place where tensors of any rank and layout become the dense rows that kernels read."""

from __future__ import annotations

from torch import Tensor

__all__ = ["rows_of"]


def rows_of(x: Tensor) -> Tensor:
    """x [.., W] as contiguous [R, W]: a view where its memory allows, else a copy."""
    return x.reshape(-1, x.shape[-1]).contiguous() if x.shape[-1] else x.new_empty(0, 0)
