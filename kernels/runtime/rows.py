"""The one place where tensors of any rank and layout become the rows that kernels read."""

from __future__ import annotations

from torch import Tensor

__all__ = ["member_rows", "rows_of", "strided_rows"]


def rows_of(x: Tensor) -> Tensor:
    """x [.., W] as contiguous [R, W]: a view where its memory allows, else a copy."""
    return x.reshape(-1, x.shape[-1]).contiguous() if x.shape[-1] else x.new_empty(0, 0)


def strided_rows(x: Tensor) -> Tensor:
    """x [.., W] as [R, W] of dense rows any distance apart, which the columns of a wider tensor are: a view
    where its memory allows, else a copy."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def member_rows(x: Tensor, rank: int) -> tuple[int, int, Tensor]:
    """How many tensors of this rank x stacks (x itself, or along a first axis), the distance between them,
    and the rows of the first, [R, W]."""
    if x.dim() == rank or not len(x):
        return 1, 0, strided_rows(x)
    rows = strided_rows(x[0])
    if rows.data_ptr() != x.data_ptr():  # a copy of the first alone
        x = x.contiguous()
        rows = strided_rows(x[0])
    return len(x), x.stride(0), rows
