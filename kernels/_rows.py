"""The one place where tensors of any rank and layout become the rows that kernels read."""

from __future__ import annotations

from torch import Tensor

__all__ = ["rows_of", "strided_rows"]


def rows_of(x: Tensor) -> Tensor:
    """x [.., W] as contiguous [R, W]: a view where its memory allows, else a copy."""
    return x.reshape(-1, x.shape[-1]).contiguous() if x.shape[-1] else x.new_empty(0, 0)


def strided_rows(x: Tensor) -> Tensor:
    """x [.., W] as [R, W] of dense rows any distance apart, which the columns of a wider tensor are: a view
    where its memory allows, else a copy."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()
