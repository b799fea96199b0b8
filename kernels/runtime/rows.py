"""Where tensors of any rank and layout become the rows that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

__all__ = ["member_rows", "rows_of", "spaced", "strided_rows"]


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


def spaced(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one shape as one, where they lie at equal distances in one piece of memory."""
    first, offsets = tensors[0], [x.storage_offset() for x in tensors]
    storage = first.untyped_storage().data_ptr()
    alike = all(
        x.shape == first.shape
        and x.stride() == first.stride()
        and x.dtype == first.dtype
        and x.untyped_storage().data_ptr() == storage
        for x in tensors
    )
    steps = {b - a for a, b in pairwise(offsets)}
    if not alike or len(steps) > 1 or min(steps, default=1) < 1:
        return None
    return first.as_strided(
        (len(tensors), *first.shape), (*steps, *first.stride()) if steps else (0, *first.stride())
    )
