"""Network inputs packed in one pass: observation, action, normalised task embedding, zeros.

    out[b] = [observation[b], action[b], n(table[task[b]]), 0 ..],   n(e) = e / |e|  in the L2 or the L1 norm

With g_b the gradient of row b's embedding, s_t = sum over the rows b of task t of g_b (of all networks that
the row went to), and e = table[t]:

    l2:  dtable[t] = (s - n (n . s)) / |e|          l1:  dtable[t] = (s - sign(e) (n . s)) / |e|

as the Jacobian is the same for all rows of a task. Observations and actions get slices of the gradient.

Dims:    B rows, O observation, A action, D embedding, T tasks, W width of the result.
Memory:  forward reads B*(O + A) elements, B ids and a row of the table (cached) each, and writes B*W. For the
         table's gradient the program of a task walks the ids and loads its own rows: T*B ids from the cache
         and B*D elements of each network. Many rows are walked in chunks by several programs per task, whose
         sums the same kernel adds in a second launch. The slices are views unless their dtype differs.
Numbers: copies are exact but for the cast; norms and sums in float32, in float64 if the table is. No atomics:
         every sum has one order. A zero row of the table gives NaN, as in the twin.
Source:  Nauman et al. 2025, arXiv:2505.23150.
Twins:   reference.pack_inputs, reference.normalized_embedding, reference.normalized_embedding_backward
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .optimizer import InPlaceOp, _check_place
from .runtime import native
from .runtime.dispatch import DTYPES, chosen, launch, observed, takes_kernels
from .runtime.language import jit, tl, triton
from .runtime.library import Op
from .runtime.numerics import wide
from .runtime.rows import member_rows, strided_rows
from .runtime.tables import configuration, next_power_of_2, processors

__all__ = ["normalized_embedding", "normalized_embedding_backward", "pack_inputs"]

NORMS = ("l2", "l1")
ID_DTYPES = (torch.int64, torch.int32)
LONE_BLOCKS = 4  # of rows that the program of a task walks alone; more are worth a second launch


@jit
def _length(e, L1: tl.constexpr):  # type: ignore[no-untyped-def]
    """Norm of the rows of e [.., BLOCK_D] as [.., 1]."""
    if L1:
        return tl.sum(tl.abs(e), 1, keep_dims=True)
    else:
        return tl.sqrt(tl.sum(e * e, 1, keep_dims=True))


@jit
def _pack_inputs_kernel(  # type: ignore[no-untyped-def]
    observations_ptr,
    actions_ptr,
    table_ptr,
    ids_ptr,
    out_ptr,
    observations_stride,
    actions_stride,
    table_stride,
    ids_stride,
    B,
    T,
    O: tl.constexpr,  # noqa: E741
    A: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    L1: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # int64: row * stride passes 2**31 in wide tensors
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    chunk = tl.program_id(1)
    inside = b < B
    out = out_ptr + b * W
    # All loads come before the first store: no load waits for another but the table's for the ids.
    if table_ptr is not None:
        task = tl.load(ids_ptr + b * ids_stride, mask=inside, other=0).to(tl.int64)
    if observations_ptr is not None:
        o = chunk * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
        x = tl.load(observations_ptr + b * observations_stride + o, mask=inside & (o < O), other=0.0)
    if actions_ptr is not None:
        a = chunk * BLOCK_A + tl.arange(0, BLOCK_A)[None, :]
        action = tl.load(actions_ptr + b * actions_stride + a, mask=inside & (a < A), other=0.0)
    if table_ptr is not None:
        d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # of chunk 0 alone: all of D is in it
        known = (task >= 0) & (task < T)  # others read nothing and become 0 / 0
        e = wide(tl.load(table_ptr + task * table_stride + d, mask=known & (d < D), other=0.0))
        n = e / _length(e, L1)
        tl.store(out + O + A + d, n.to(out_ptr.dtype.element_ty), mask=inside & (d < D))
    if observations_ptr is not None:
        tl.store(out + o, x.to(out_ptr.dtype.element_ty), mask=inside & (o < O))
    if actions_ptr is not None:
        tl.store(out + O + a, action.to(out_ptr.dtype.element_ty), mask=inside & (a < A))
    if O + A + D < W:
        w = O + A + D + chunk * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
        zeros = tl.zeros([BLOCK_B, BLOCK_W], out_ptr.dtype.element_ty)
        tl.store(out + w, zeros, mask=inside & (w < W))


@jit
def _embedding_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    ids_ptr,
    table_ptr,
    out_ptr,
    task_stride,
    network_stride,
    grad_stride,
    ids_stride,
    table_stride,
    B,
    span,
    NETWORKS: tl.constexpr,
    D: tl.constexpr,
    L1: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (t, c) sums the rows of task t in chunk c of `span` rows. Without ids the task has all rows,
    those that begin at t * task_stride. The LAST launch, of one chunk, goes on through the norm."""
    t = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)[None, :]
    e = wide(tl.load(table_ptr + t * table_stride + d, mask=d < D, other=0.0))
    total = tl.zeros([BLOCK_B, BLOCK_D], e.dtype)
    for start in range(chunk * span, tl.minimum((chunk + 1) * span, B), BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        mine = b < B
        if ids_ptr is not None:
            mine = mine & (tl.load(ids_ptr + b * ids_stride, mask=mine, other=-1) == t)
        g = grad_ptr + t * task_stride + b[:, None] * grad_stride + d
        for _ in tl.static_range(NETWORKS):
            total += tl.load(g, mask=mine[:, None] & (d < D), other=0.0).to(e.dtype)
            g += network_stride
    s = tl.sum(total, 0, keep_dims=True)
    if LAST:
        length = _length(e, L1)
        n = e / length
        direction = n
        if L1:
            direction = (e > 0.0).to(e.dtype) - (e < 0.0).to(e.dtype)
        s = (s - direction * tl.sum(n * s, 1, keep_dims=True)) / length
    out = out_ptr + (chunk * tl.num_programs(0) + t) * D + d
    tl.store(out, s.to(out_ptr.dtype.element_ty), mask=d < D)


def _pack(
    observations: Tensor | None,
    actions: Tensor | None,
    table: Tensor | None,
    task_ids: Tensor | None,
    norm: str,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    out = _pack_fake(observations, actions, table, task_ids, norm, width, dtype)
    _pack_into(observations, actions, table, task_ids, norm, out)
    return out


def _pack_into(
    observations: Tensor | None,
    actions: Tensor | None,
    table: Tensor | None,
    task_ids: Tensor | None,
    norm: str,
    out: Tensor,
) -> None:
    if not out.numel():
        return
    width = out.shape[-1]
    parts = [None if x is None else strided_rows(x) for x in (observations, actions, table)]
    ids = None if table is None or task_ids is None else task_ids.reshape(-1)
    sizes = [0 if x is None else x.shape[1] for x in parts]
    columns = (*sizes, width - sum(sizes))
    blocks = [min(next_power_of_2(max(1, size)), 1024) for size in columns]
    blocks[2] = next_power_of_2(max(1, sizes[2]))  # a norm needs the whole row
    heuristic = {"BLOCK_B": max(1, 1024 // max(blocks)), "num_warps": 4}
    c: dict[str, Any] = configuration("pack_inputs", width, out.dtype, out.device, heuristic)
    rows = out.numel() // width
    chunks = max(triton.cdiv(size, block) for size, block in zip(columns, blocks, strict=True))
    launch(
        _pack_inputs_kernel,
        (triton.cdiv(rows, c["BLOCK_B"]), chunks),
        *(*parts, ids, out),
        *(0 if x is None else x.stride(0) for x in (*parts, ids)),
        *(rows, 0 if table is None else table.shape[0]),
        O=sizes[0],
        A=sizes[1],
        D=sizes[2],
        W=width,
        L1=norm == "l1",
        BLOCK_O=blocks[0],
        BLOCK_A=blocks[1],
        BLOCK_D=blocks[2],
        BLOCK_W=blocks[3],
        **c,
    )


def _pack_fake(
    observations: Tensor | None,
    actions: Tensor | None,
    table: Tensor | None,
    task_ids: Tensor | None,
    norm: str,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    like: Any = task_ids if observations is None else observations
    rows = like.shape if observations is None else like.shape[:-1]
    return like.new_empty((*rows, width), dtype=dtype)  # type: ignore[no-any-return]


def _embedding_backward(grad: Tensor, table: Tensor, task_ids: Tensor, norm: str) -> Tensor:
    """Gradient of the table for that of normalised rows [.., D], or of several [E, .., D]."""
    dtable = _embedding_backward_fake(grad, table, task_ids, norm)
    _embedding_backward_into(grad, table, task_ids, norm, dtable)
    return dtable


def _embedding_backward_into(
    grad: Tensor, table: Tensor, task_ids: Tensor, norm: str, dtable: Tensor
) -> None:
    if not grad.numel() or not dtable.numel():
        dtable.zero_()
        return
    networks, distance, g = member_rows(grad, task_ids.dim() + 1)
    ids, rows_of_table = task_ids.reshape(-1), strided_rows(table)
    (rows, size), tasks = g.shape, table.shape[0]
    block = next_power_of_2(size)
    kind = torch.promote_types(table.dtype, torch.float32)
    # Up to 32 sums of 4 bytes per thread: few steps, and one reduction at the end.
    heuristic = {"BLOCK_B": min(1024, max(1, 65536 // (block * kind.itemsize))), "num_warps": 16}
    c: dict[str, Any] = configuration("embedding_backward", size, g.dtype, g.device, heuristic)
    blocks = triton.cdiv(rows, c["BLOCK_B"])
    chunks = 1 if blocks <= LONE_BLOCKS else min(blocks, max(1, 2 * processors(g.device) // tasks))
    span = triton.cdiv(blocks, chunks) * c["BLOCK_B"]
    chunks = triton.cdiv(rows, span)

    def sum_rows(x: Tensor, ids: Tensor | None, out: Tensor, chunks: int, span: int) -> None:
        launch(
            _embedding_backward_kernel,
            (tasks, chunks),
            *(x, ids, rows_of_table, out),
            *((size, 0, x.stride(0), 0) if ids is None else (0, distance, x.stride(0), ids.stride(0))),
            *(rows_of_table.stride(0), x.shape[0], span),
            NETWORKS=1 if ids is None else networks,
            D=size,
            L1=norm == "l1",
            LAST=out is dtable,
            BLOCK_D=block,
            **c,
        )

    if chunks == 1:
        sum_rows(g, ids, dtable, 1, span)
    else:
        sums = table.new_empty(chunks, tasks * size, dtype=kind)
        sum_rows(g, ids, sums, chunks, span)
        sum_rows(sums, None, dtable, 1, chunks)


def _embedding_backward_fake(grad: Tensor, table: Tensor, task_ids: Tensor, norm: str) -> Tensor:
    return table.new_empty(table.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *parts, task_ids, ctx.norm, _, _ = inputs
    ctx.save_for_backward(parts[2], task_ids)
    ctx.sizes = [0 if x is None else x.shape[-1] for x in parts]
    ctx.dtypes = [None if x is None else x.dtype for x in parts]


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    table, task_ids = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    slices: list[Any] = list(torch.split(grad[..., : sum(ctx.sizes)], ctx.sizes, -1))
    for place in (0, 1):
        slices[place] = slices[place].to(ctx.dtypes[place]) if wanted[place] else None
    slices[2] = _embedding_backward_op(slices[2], table, task_ids, ctx.norm) if wanted[2] else None
    return (*slices, None, None, None, None)


_embedding_backward_op = Op("normalized_embedding_backward", _embedding_backward, _embedding_backward_fake)
_embedding_backward_into_op = InPlaceOp(
    "normalized_embedding_backward_into", _embedding_backward_into, ("dtable",)
)
_pack_op = Op("pack_inputs", _pack, _pack_fake, _keep, _gradients)
_pack_into_op = InPlaceOp("pack_inputs_into", _pack_into, ("out",))


def _check_embedding(table: Tensor, task_ids: Tensor, norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if table.dim() != 2:
        raise ValueError(f"table must have shape [T, D], got {list(table.shape)}")
    if task_ids.dtype not in ID_DTYPES:
        raise TypeError(f"task_ids must be of dtype torch.int64 or torch.int32, got {task_ids.dtype}")
    if task_ids.device != table.device:
        raise ValueError(f"task_ids must be on {table.device} like the table, got {task_ids.device}")


def _check_out(out: Tensor, likes: str, like: Tensor, dims: str, shape: tuple[int, ...]) -> None:
    _check_place("out", out, likes, like.device, DTYPES)
    if out.shape != shape:
        raise ValueError(f"out must have shape {dims} = {list(shape)}, got {list(out.shape)}")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")


def normalized_embedding(
    table: Tensor, task_ids: Tensor, norm: str = "l2", *, impl: str | None = None
) -> Tensor:
    """Rows of the task embedding divided by their norm.

    Args:
        table: [T, D]. task_ids: [..] int64 or int32 in [0, T). A GPU does not check them: one outside gives
            a row of NaN and no gradient.
        norm: "l2" (the published code) or "l1" (reported of the paper).
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        [.., D] of the dtype of the table, which gets its gradient.
    Raises:
        ValueError for another norm, shape or device, TypeError for ids of another dtype, IndexError on a CPU
        for an id outside.
    Source: Nauman et al. 2025, arXiv:2505.23150.
    """
    _check_embedding(table, task_ids, norm)
    if not takes_kernels(impl, table):
        native.check_ids(task_ids, len(table))
        return reference.normalized_embedding(table, task_ids, norm)
    out: Tensor = _pack_op(None, None, table, task_ids, norm, table.shape[1], table.dtype)
    return out


def normalized_embedding_backward(
    grad: Tensor,
    table: Tensor,
    task_ids: Tensor,
    norm: str = "l2",
    *,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Gradient of the table for that of rows of `normalized_embedding`, without autograd.

        l2:  dtable[t] = (s - n (n . s)) / |e|          l1:  dtable[t] = (s - sign(e) (n . s)) / |e|

    with e = table[t], n = e / |e| and s the sum of the gradients of the rows of task t.

    Args:
        grad: [.., D] of any distance between rows: the columns of a wider gradient are read in place. Or
            [E, .., D], of E networks that were given the same rows: they are summed.
        table: [T, D]. task_ids: [..] int64 or int32 in [0, T). A GPU does not check them: a row of one
            outside counts for no task.
        norm: "l2" (the published code) or "l1" (reported of the paper).
        out: [T, D] contiguous, of any float dtype; it receives the result.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        [T, D] of the dtype of the table, or out.
    Raises:
        ValueError for another norm, shape, device or for gaps in out, TypeError for ids or an out of another
        dtype, IndexError on a CPU for an id outside.
    Source: Nauman et al. 2025, arXiv:2505.23150.
    """
    _check_embedding(table, task_ids, norm)
    wanted = (*task_ids.shape, table.shape[1])
    if grad.shape != wanted and (grad.dim() != len(wanted) + 1 or grad.shape[1:] != wanted):
        told = "[.., D] or [E, .., D] with the rows of task_ids and the columns of the table"
        raise ValueError(f"grad must have shape {told}, {list(wanted)}, got {list(grad.shape)}")
    if out is not None:
        _check_out(out, "the table", table, "[T, D]", tuple(table.shape))
    grad, table = grad.detach(), table.detach()
    if not takes_kernels(impl, table, grad):
        if _compiled_takes(impl, [table, grad], task_ids, table.dtype if out is None else out.dtype):
            return _compiled_gradient(
                grad, table, task_ids, norm, torch.empty_like(table) if out is None else out
            )
        native.check_ids(task_ids, len(table))
        with torch.no_grad():
            return reference.normalized_embedding_backward(grad, table, task_ids, norm, out=out)
    if out is None:
        dtable: Tensor = _embedding_backward_op(grad, table, task_ids, norm)
        return dtable
    _embedding_backward_into_op(grad, table, task_ids, norm, out)
    return out


def pack_inputs(
    observations: Tensor,
    actions: Tensor | None = None,
    table: Tensor | None = None,
    task_ids: Tensor | None = None,
    norm: str = "l2",
    *,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """One network input [observation, action, normalised task embedding, zeros], each part where given.

    Args:
        observations: [.., O]. actions: [.., A]. Rows may be any distance apart: columns of a wider tensor are
            read in place. The parts may differ in dtype.
        table: [T, D]. task_ids: [..] int64 or int32 in [0, T), needed with a table. A GPU does not check
            them: one outside gives an embedding of NaN and no gradient.
        norm: "l2" (the published code) or "l1" (reported of the paper).
        width: of the result, at least and by default O + A + D; what is beyond is zero.
        dtype: of the result, by default that of the observations.
        out: [.., width] contiguous, apart from the parts in memory; it receives the result and gives width
            and dtype, where they are not given.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        [.., width], or out; the observations themselves where there is nothing to do. Gradients reach the
        observations, the actions and the table.
    Raises:
        ValueError for shapes, a width, a norm or devices that do not fit, TypeError for ids of another dtype
        or a result of a dtype that is none of float32, bfloat16, float16 and float64, or not that of out,
        IndexError on a CPU for an id outside, RuntimeError for an out where a gradient is wanted.
    Source: Nauman et al. 2025, arXiv:2505.23150.
    """
    if not observations.dim():
        raise ValueError("observations must have shape [.., O], got []")
    rows = observations.shape[:-1]
    if actions is not None and (not actions.dim() or actions.shape[:-1] != rows):
        wanted = f"[.., A] with [..] = {list(rows)} of the observations"
        raise ValueError(f"actions must have shape {wanted}, got {list(actions.shape)}")
    if table is not None:
        if task_ids is None:
            raise ValueError("task_ids [B] are needed with a task embedding table, got None")
        _check_embedding(table, task_ids, norm)
        if task_ids.shape != rows:
            wanted = f"[..] = {list(rows)} of the observations"
            raise ValueError(f"task_ids must have shape {wanted}, got {list(task_ids.shape)}")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    parts = [x for x in (observations, actions, table) if x is not None]
    sizes = [x.shape[-1] for x in parts]
    if out is not None and width is None and out.dim():
        width = out.shape[-1]
    if width is not None and width < sum(sizes):
        total = " + ".join(map(str, sizes))
        raise ValueError(f"width must be at least O + A + D = {total} = {sum(sizes)}, got {width}")
    full = sum(sizes) if width is None else width
    if out is not None:
        _check_out(out, "the observations", observations, "[.., width]", (*rows, full))
        if dtype not in (None, out.dtype):
            raise TypeError(f"dtype must be that of out, {out.dtype}, got {dtype}")
        if torch.is_grad_enabled() and any(x.requires_grad for x in parts):
            raise RuntimeError("out has no gradient: detach the parts, or call without it")
    kernels = takes_kernels(impl, *parts)
    if out is None and len(parts) == 1 and width in (None, sizes[0]) and dtype in (None, observations.dtype):
        return observations
    if not kernels:
        made = dtype or (observations.dtype if out is None else out.dtype)
        if _compiled_takes(impl, parts, task_ids if table is not None else None, made):
            place = observations.new_empty(*rows, full, dtype=made) if out is None else out
            return _compiled_pack(observations, actions, table, task_ids, norm, place)
        if table is not None and task_ids is not None:
            native.check_ids(task_ids, len(table))
        return reference.pack_inputs(
            observations, actions, table, task_ids, norm, width=width, dtype=dtype, out=out
        )
    ids = None if table is None else task_ids
    if out is None:
        made = dtype or observations.dtype
        packed: Tensor = _pack_op(observations, actions, table, ids, norm, full, made)
        return packed
    _pack_into_op(
        *(None if x is None else x.detach() for x in (observations, actions, table)), ids, norm, out
    )
    return out


def _compiled_takes(
    impl: str | None, parts: Sequence[Tensor], task_ids: Tensor | None, made: torch.dtype
) -> bool:
    """Whether csrc/inputs.hpp does it: of float32 parts that want no gradient, into one of its types."""
    if chosen(impl) != "auto" or made not in native.LOW or not native.takes(*parts):
        return False
    if task_ids is not None and (task_ids.dtype != torch.int64 or observed(task_ids)):
        return False
    return not torch.is_grad_enabled() or not any(x.requires_grad for x in parts)


def _compiled_pack(
    observations: Tensor,
    actions: Tensor | None,
    table: Tensor | None,
    task_ids: Tensor | None,
    norm: str,
    out: Tensor,
) -> Tensor:
    parts = [strided_rows(observations), None if actions is None else strided_rows(actions)]
    read = [(0, 0, 0) if x is None else (x.data_ptr(), x.shape[1], x.stride(0)) for x in parts]
    ids, table = _read_embedding(table, task_ids)
    embedding = (
        (0, 0, 0, 0) if table is None or ids is None else (table.data_ptr(), *table.shape, ids.data_ptr())
    )
    rows, low = out.shape[:-1].numel(), native.LOW[out.dtype]
    places = out.data_ptr(), out.shape[-1]
    native.compiled.pack_inputs(rows, *read[0], *read[1], *embedding, norm == "l1", low, *places)  # type: ignore[call-arg]
    native.changed(out)
    return out


def _compiled_gradient(grad: Tensor, table: Tensor, task_ids: Tensor, norm: str, out: Tensor) -> Tensor:
    members, distance, rows = member_rows(grad, task_ids.dim() + 1)
    ids, table = _read_embedding(table, task_ids)
    native.compiled.embedding_gradient(  # type: ignore[call-arg]
        members, len(rows), rows.data_ptr(), distance, rows.stride(0), table.data_ptr(), *table.shape,
        ids.data_ptr(), norm == "l1", native.LOW[out.dtype], out.data_ptr(),
    )  # fmt: skip
    native.changed(out)
    return out


def _read_embedding(table: Any, task_ids: Any) -> tuple[Any, Any]:
    """Ids and table without gaps."""
    return (None, None) if table is None else (task_ids.contiguous(), table.detach().contiguous())
