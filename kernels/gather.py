"""Rows of a store by index, and the n-step rewards of the transitions in it.

    out[m]    = rows[index[m]] where index[m] >= 0, else side[-1 - index[m]]
    reward[m] = sum over i of weights[i] * rewards[index[m, i]], divided by scale[task_ids[m]] where given

Dims:    R rows stored, S rows beside them, W their width, M rows wanted, n steps, T tasks.
Memory:  gather_rows reads and writes M*W elements once, in the widest words that W, the strides and the
         addresses allow; several narrow rows or a part of a wide one per program. n_step_rewards reads M*n
         indices and as many rewards, and writes M.
Numbers: gather_rows copies bits; a cast rounds to nearest even, and a NaN stays one of any bits.
         n_step_rewards adds in float32 with i ascending, and rounds every product, sum and quotient: a CPU
         that does the same gets the same bits. The first step is not added to 0: a reward of -0 stays -0.
Source:  Sutton and Barto 2018, section 7.1, for the n-step reward.
Twins:   reference.gather_rows, reference.n_step_rewards

Nothing here has a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .optimizer import InPlaceOp
from .runtime.dispatch import launch, takes_kernels
from .runtime.language import jit, tl, triton
from .runtime.library import Op

__all__ = ["gather_rows", "n_step_rewards"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TILE = 1024  # elements per program of 4 warps, 8 per thread
MAX_ROWS = 128  # per program, one per thread


@jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,
    index_ptr,
    side_ptr,
    out_ptr,
    row_stride,
    side_stride,
    M,
    W,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    chunks = tl.cdiv(W, BLOCK_W)
    program = tl.program_id(0)
    # int64: row * stride passes 2**31 in a large store
    m = (program // chunks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    w = (program % chunks) * BLOCK_W + tl.arange(0, BLOCK_W)
    index = tl.load(index_ptr + m, mask=m < M, other=0)[:, None]
    mask = (m < M)[:, None] & (w < W)[None, :]
    if side_ptr is None:
        x = tl.load(rows_ptr + index * row_stride + w[None, :], mask=mask, other=0)
    else:  # two masked loads: a choice between two pointers would lose their alignment
        x = tl.load(rows_ptr + index * row_stride + w[None, :], mask=mask & (index >= 0), other=0)
        beside = side_ptr + (-1 - index) * side_stride + w[None, :]
        x = tl.load(beside, mask=mask & (index < 0), other=x)
    tl.store(out_ptr + m[:, None] * W + w[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _n_step_kernel(  # type: ignore[no-untyped-def]
    rewards_ptr,
    index_ptr,
    weights_ptr,
    scale_ptr,
    task_ids_ptr,
    out_ptr,
    reward_stride,
    M,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(N):
        index = tl.load(index_ptr + m * N + i, mask=m < M, other=-1)
        r = tl.load(rewards_ptr + index * reward_stride, mask=index >= 0, other=0.0)
        part = tl.load(weights_ptr + i) * r
        total = tl.where(index >= 0, total + part if i > 0 else part, total)
    if scale_ptr is not None:
        task = tl.load(task_ids_ptr + m, mask=m < M, other=0)
        total = tl.div_rn(total, tl.load(scale_ptr + task, mask=m < M, other=1.0))
    tl.store(out_ptr + m, total, mask=m < M)


def _check(name: str, tensor: Tensor, like: Tensor, dtype: torch.dtype, **sizes: int | None) -> None:
    """Refuse a device other than `like`'s, another dtype, and sizes other than those named (None: any)."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the rows, got {tensor.device}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be of dtype {dtype}, got {tensor.dtype}")
    pairs = zip(sizes.values(), tensor.shape, strict=False)
    if tensor.dim() != len(sizes) or any(size not in (None, got) for size, got in pairs):
        known = ", ".join(f"{dim} = {size}" for dim, size in sizes.items() if size is not None)
        shape = f"[{', '.join(sizes)}]{known and ' with '}{known}"
        raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")


def gather_rows(
    rows: Tensor,
    index: Tensor,
    *,
    side: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """Rows of a store, or of a second one beside it where the index is negative.

    Args:
        rows: [R, W], R >= 1, of float32, float16, bfloat16, uint8, int8, int16, int32, int64 or bool. Each
            row is contiguous, the distance between rows is free: columns of wider rows do.
        index: [M] int64, -S <= index < R. A GPU does not check its values: outside of that, and below 0
            without `side`, foreign memory is read.
        side: [S, W] of the dtype of rows, as free in its strides.
        out: contiguous [M, W] for the result, apart from rows and side in memory.
        dtype: of the result, by default that of rows. Any of the three floats becomes any other, no other
            dtype changes.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        [M, W]; `out` where given.
    """
    dtype = dtype or rows.dtype
    if rows.dtype not in DTYPES:
        raise TypeError(f"rows must be of one of the dtypes {DTYPES}, got {rows.dtype}")
    if dtype != rows.dtype and not {dtype, rows.dtype} <= set(FLOATS):
        raise TypeError(f"dtype must be that of rows, or both one of {FLOATS}, got {dtype} for {rows.dtype}")
    _check("rows", rows, rows, rows.dtype, R=None, W=None)
    _check("index", index, rows, torch.int64, M=None)
    (stored, width), (wanted,) = rows.shape, index.shape
    if stored == 0:
        raise ValueError(f"rows must have shape [R, W] with R >= 1, got {[stored, width]}")
    if side is not None:
        _check("side", side, rows, rows.dtype, S=None, W=width)
    if out is not None:
        _check("out", out, rows, dtype, M=wanted, W=width)
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")
    for name, tensor in (("rows", rows), ("side", rows if side is None else side)):
        if width > 1 and tensor.stride(1) != 1:
            raise ValueError(f"a row of {name} must be contiguous, got strides {list(tensor.stride())}")
    rows, side = rows.detach(), None if side is None else side.detach()
    if not takes_kernels(impl, rows, dtypes=DTYPES):
        return reference.gather_rows(rows, index, side=side, out=out, dtype=dtype)
    if out is None:
        gathered: Tensor = _gather_op(rows, index, side, dtype)
        return gathered
    _gather_into_op(rows, index, side, out)
    return out


def _gather(rows: Tensor, index: Tensor, side: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = _gather_fake(rows, index, side, dtype)
    _gather_into(rows, index, side, out)
    return out


def _gather_fake(rows: Tensor, index: Tensor, side: Tensor | None, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(index.shape[0], rows.shape[1], dtype=dtype)


def _gather_into(rows: Tensor, index: Tensor, side: Tensor | None, out: Tensor) -> None:
    if not out.numel():
        return
    index = index.contiguous()
    if rows.dtype == out.dtype:
        # a copy of bits: the widest integer that divides the width and every address
        size, counts = rows.element_size(), [rows.shape[1]]
        for tensor in (rows, out) if side is None else (rows, out, side):
            counts += [tensor.stride(0), int(tensor.storage_offset()), tensor.data_ptr() // size]
        word = WORDS[math.gcd(8, size * math.gcd(*counts))]
        rows, out, side = rows.view(word), out.view(word), None if side is None else side.view(word)
    wanted, width = out.shape
    block_w = min(triton.next_power_of_2(width), TILE)
    block_m = min(TILE // block_w, MAX_ROWS)
    grid = (triton.cdiv(wanted, block_m) * triton.cdiv(width, block_w),)
    strides = rows.stride(0), 0 if side is None else side.stride(0)
    arguments = (rows, index, side, out, *strides, wanted, width)
    launch(_gather_kernel, grid, *arguments, BLOCK_M=block_m, BLOCK_W=block_w)


def n_step_rewards(
    rewards: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    scale: Tensor | None = None,
    task_ids: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Weighted sum of the n rewards of each transition, divided by the scale of its task where one is given.

    Args:
        rewards: [R] float32, R >= 1, of any stride: a column of wider rows does.
        index: [M, n] int64, -1 where there is no such step. Its values are not checked on a GPU.
        weights: [n] float32, discount**i.
        scale: [T] float32; infinity gives 0. task_ids: [M] int64, 0 <= id < T, needed where scale is given.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        [M] float32.
    """
    _check("rewards", rewards, rewards, torch.float32, R=None)
    _check("index", index, rewards, torch.int64, M=None, n=None)
    wanted, steps = index.shape
    if rewards.shape[0] == 0:
        raise ValueError("rewards must have shape [R] with R >= 1, got [0]")
    _check("weights", weights, rewards, torch.float32, n=steps)
    if scale is None:
        task_ids = None
    elif task_ids is None:
        raise ValueError(f"scale needs task_ids of shape [M] with M = {wanted}, got None")
    else:
        _check("scale", scale, rewards, torch.float32, T=None)
        _check("task_ids", task_ids, rewards, torch.int64, M=wanted)
    rewards, weights = rewards.detach(), weights.detach()
    scale = None if scale is None else scale.detach()
    if not takes_kernels(impl, rewards):
        return reference.n_step_rewards(rewards, index, weights, scale=scale, task_ids=task_ids)
    total: Tensor = _n_step_op(rewards, index, weights, scale, task_ids)
    return total


def _n_step(
    rewards: Tensor, index: Tensor, weights: Tensor, scale: Tensor | None, task_ids: Tensor | None
) -> Tensor:
    out = _n_step_fake(rewards, index, weights, scale, task_ids)
    wanted, steps = index.shape
    if wanted > 0:
        tasks = (None if x is None else x.contiguous() for x in (scale, task_ids))
        inputs = (rewards, index.contiguous(), weights.contiguous(), *tasks)
        arguments = (*inputs, out, rewards.stride(0), wanted)
        grid = (triton.cdiv(wanted, MAX_ROWS),)
        # no fused multiply-add: every product is rounded, as on a CPU
        launch(_n_step_kernel, grid, *arguments, N=steps, BLOCK_M=MAX_ROWS, enable_fp_fusion=False)
    return out


def _n_step_fake(
    rewards: Tensor, index: Tensor, weights: Tensor, scale: Tensor | None, task_ids: Tensor | None
) -> Tensor:
    return rewards.new_empty(index.shape[0])


_gather_op = Op("gather_rows", _gather, _gather_fake)
_gather_into_op = InPlaceOp("gather_rows_into", _gather_into, ("out",))
_n_step_op = Op("n_step_rewards", _n_step, _n_step_fake)
