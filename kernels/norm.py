"""Bias, LayerNorm, and ReLU or a residual sum in one pass, forward and backward, for stacked networks.

    h = x + bias,   n = (h - mean(h)) * rstd,   rstd = 1 / sqrt(mean((h - mean(h))^2) + eps)
    out = relu(y)  |  residual + y  |  residual + relu(y)  |  y        with y = weight * n + shift

Gradients, with dy = dout where y > 0 under a ReLU (0 elsewhere), and g = dy * weight:

    dx = dh = rstd * (g - mean(g) - n * mean(g * n)),   dresidual = dout
    dbias = sum over rows of dh,   dweight = sum over rows of dy * n,   dshift = sum over rows of dy

Dims:    N networks, B rows of each, H width, L layers, S programs that share the rows of a network.
Memory:  forward: reads x (and the residual), writes out, and 2 statistics per row. Backward: reads dout and
         x, writes dx; the mask of the ReLU is computed again, so out is not read. It keeps S * 3 * N * H
         partial sums for the parameters, which one more launch adds up, for any number of layers. Above
         H = 4096 (8192 without gradients of parameters, for H a multiple of 16) a row and they outgrow the
         registers of a program: a launch for the rows' sums goes before, and dout and x are read twice.
Numbers: arithmetic, statistics and partial sums in float32, in float64 for float64 inputs. The variance is
         the mean of centred squares. Sums have a fixed order: the same inputs give the same bits.
Source:  Ba et al. 2016, arXiv:1607.06450, section 3.
Twin:    reference.bias_layer_norm
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import passes_plain, reference
from .passes_plain import Call, Held, Pass, multiply
from .runtime.dispatch import launch, takes_kernels
from .runtime.language import jit, tl, triton
from .runtime.library import Op
from .runtime.rows import rows_of, spaced
from .runtime.tables import configuration, next_power_of_2, processors
from .runtime.twins import twin

__all__ = [
    "BATCHED",
    "PASSES",
    "backward_into",
    "bias_layer_norm",
    "forward_into",
    "multiply",
    "partial_shape",
    "reduce_partials",
]


@jit
def _vector(ptr, network, stride, column, H: tl.constexpr, F: tl.constexpr):  # type: ignore[no-untyped-def]
    """A parameter of one network as [1, BLOCK_H]; all of its rows want it, so it should stay in the cache."""
    value = tl.load(ptr + network * stride + column, mask=column < H, other=0.0, eviction_policy="evict_last")
    return value.to(F)[None, :]


@jit
def _norm_forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    bias_ptr,
    weight_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    stats_ptr,
    bias_stride,
    weight_stride,
    shift_stride,
    stats_stride,
    B,
    H: tl.constexpr,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    F = stats_ptr.dtype.element_ty
    network = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_ROWS
    first = network * B + start  # int64: first * H passes 2**31 in a large batch
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_H)
    row_mask = start + row < B
    column_mask = (column < H)[None, :]
    mask = row_mask[:, None] & column_mask
    place = row[:, None] * H + column[None, :]
    x = tl.load(x_ptr + first * H + place, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + first * H + place, mask=mask, other=0.0)
    h = x.to(F) + _vector(bias_ptr, network, bias_stride, column, H, F)
    # asked for early, weight and shift arrive with x; a wider block has no registers to keep them in
    if BLOCK_H <= 8192:
        weight = _vector(weight_ptr, network, weight_stride, column, H, F)
        shift = _vector(shift_ptr, network, shift_stride, column, H, F)
    mean = tl.sum(h, 1) / H
    centred = tl.where(column_mask, h - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / H + EPS)
    if BLOCK_H > 8192:
        weight = _vector(weight_ptr, network, weight_stride, column, H, F)
        shift = _vector(shift_ptr, network, shift_stride, column, H, F)
    y = centred * rstd[:, None] * weight + shift
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # a NaN stays one
    if residual_ptr is not None:
        y += residual.to(F)
    tl.store(y_ptr + first * H + place, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(stats_ptr + first + row, mean, mask=row_mask)
    tl.store(stats_ptr + stats_stride + first + row, rstd, mask=row_mask)


@jit
def _gradient_tile(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    stats_ptr,
    bias,
    weight,
    shift,
    first,
    stats_stride,
    row,
    column,
    row_mask,
    H: tl.constexpr,
    RELU: tl.constexpr,
):
    """dy behind the ReLU and n [BLOCK_ROWS, BLOCK_H], rstd [BLOCK_ROWS, 1], of the rows from `first` on.

    Beyond the last row all three are 0, beyond the last column dy is.
    """
    F = stats_ptr.dtype.element_ty
    mask = row_mask[:, None] & (column < H)[None, :]
    place = row[:, None] * H + column[None, :]
    x = tl.load(x_ptr + first * H + place, mask=mask, other=0.0).to(F)
    dy = tl.load(dy_ptr + first * H + place, mask=mask, other=0.0).to(F)
    mean = tl.load(stats_ptr + first + row, mask=row_mask, other=0.0)[:, None]
    rstd = tl.load(stats_ptr + stats_stride + first + row, mask=row_mask, other=0.0)[:, None]
    n = (x + bias - mean) * rstd
    if RELU:
        dy = tl.where(n * weight + shift <= 0.0, 0.0, dy)
    return dy, n, rstd


@jit
def _norm_sums_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    bias_ptr,
    weight_ptr,
    shift_ptr,
    stats_ptr,
    sums_ptr,
    bias_stride,
    weight_stride,
    shift_stride,
    stats_stride,
    B,
    H: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """sum(g) and sum(g * n) of rows wider than a block."""
    F = stats_ptr.dtype.element_ty
    network = tl.program_id(1).to(tl.int64)
    total = tl.num_programs(1).to(tl.int64) * B
    start = tl.program_id(0) * BLOCK_ROWS
    first = network * B + start
    row = tl.arange(0, BLOCK_ROWS)
    row_mask = start + row < B
    sum_g = tl.zeros([BLOCK_ROWS, BLOCK_H], F)
    sum_gn = tl.zeros([BLOCK_ROWS, BLOCK_H], F)
    for column_start in range(0, H, BLOCK_H):
        column = column_start + tl.arange(0, BLOCK_H)
        bias = _vector(bias_ptr, network, bias_stride, column, H, F)
        weight = _vector(weight_ptr, network, weight_stride, column, H, F)
        shift = _vector(shift_ptr, network, shift_stride, column, H, F)
        dy, n, _ = _gradient_tile(
            dy_ptr, x_ptr, stats_ptr, bias, weight, shift, first, stats_stride, row, column, row_mask, H, RELU
        )
        sum_g += dy * weight
        sum_gn += dy * weight * n
    tl.store(sums_ptr + first + row, tl.sum(sum_g, 1), mask=row_mask)
    tl.store(sums_ptr + total + first + row, tl.sum(sum_gn, 1), mask=row_mask)


@jit
def _norm_backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    bias_ptr,
    weight_ptr,
    shift_ptr,
    stats_ptr,
    sums_ptr,
    dx_ptr,
    partials_ptr,
    bias_stride,
    weight_stride,
    shift_stride,
    stats_stride,
    B,
    rows_each,
    H: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program walks over `rows_each` rows of one network, in all columns or, with sums_ptr, in a block."""
    F = stats_ptr.dtype.element_ty
    network = tl.program_id(1).to(tl.int64)
    networks = tl.num_programs(1).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    bias = _vector(bias_ptr, network, bias_stride, column, H, F)
    weight = _vector(weight_ptr, network, weight_stride, column, H, F)
    shift = _vector(shift_ptr, network, shift_stride, column, H, F)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_H], F)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_H], F)
    dshift = tl.zeros([BLOCK_ROWS, BLOCK_H], F)
    begin = tl.program_id(0) * rows_each
    for start in tl.range(begin, tl.minimum(begin + rows_each, B), BLOCK_ROWS, num_stages=STAGES):
        first = network * B + start
        row_mask = start + row < B
        dy, n, rstd = _gradient_tile(
            dy_ptr, x_ptr, stats_ptr, bias, weight, shift, first, stats_stride, row, column, row_mask, H, RELU
        )
        g = dy * weight
        if sums_ptr is None:
            sum_g = tl.sum(g, 1)[:, None]
            sum_gn = tl.sum(g * n, 1)[:, None]
        else:
            sum_g = tl.load(sums_ptr + first + row, mask=row_mask, other=0.0)[:, None]
            sum_gn = tl.load(sums_ptr + networks * B + first + row, mask=row_mask, other=0.0)[:, None]
        dh = rstd * (g - sum_g / H - n * (sum_gn / H))
        if dx_ptr is not None:
            place = row[:, None] * H + column[None, :]
            mask = row_mask[:, None] & (column < H)[None, :]
            tl.store(dx_ptr + first * H + place, dh.to(dx_ptr.dtype.element_ty), mask=mask)
        if partials_ptr is not None:
            dbias += dh
            dweight += dy * n
            dshift += dy
    if partials_ptr is not None:  # [S, 3, N, H]
        out_ptr = partials_ptr + (tl.program_id(0).to(tl.int64) * 3 * networks + network) * H + column
        tl.store(out_ptr, tl.sum(dbias, 0), mask=column < H)
        tl.store(out_ptr + networks * H, tl.sum(dweight, 0), mask=column < H)
        tl.store(out_ptr + 2 * networks * H, tl.sum(dshift, 0), mask=column < H)


@jit
def _norm_reduce_kernel(  # type: ignore[no-untyped-def]
    partials_ptr,
    out_ptr,
    rows_ptr,
    sums_ptr,
    partials_stride,
    out_stride,
    vector_stride,
    network_stride,
    sums_stride,
    S,
    W,
    N,
    H,
    L,
    B,
    K,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[l, v, n, h] = sum over s of partials[l, s, w], w counting the vectors, networks and columns.

    Behind the last layer: sums[n, k] = sum over b of rows[n, b, k].
    """
    layer = tl.program_id(1).to(tl.int64)
    if rows_ptr is not None:
        if layer == L:
            b = tl.arange(0, BLOCK_B)
            for start in range(tl.program_id(0) * BLOCK_K, N * K, tl.num_programs(0) * BLOCK_K):
                w = start + tl.arange(0, BLOCK_K)
                network, column = (w // K).to(tl.int64), w % K
                total = tl.zeros([BLOCK_B, BLOCK_K], partials_ptr.dtype.element_ty)
                for first in range(0, B, BLOCK_B):
                    place = (network[None, :] * B + (first + b)[:, None]) * K + column[None, :]
                    mask = (first + b < B)[:, None] & (w < N * K)[None, :]
                    total += tl.load(rows_ptr + place, mask=mask, other=0.0).to(total.dtype)
                out = tl.sum(total, 0).to(sums_ptr.dtype.element_ty)
                tl.store(sums_ptr + network * sums_stride + column, out, mask=w < N * K)
        S, W = tl.where(layer == L, 0, S), tl.where(layer == L, 0, W)  # nothing else
    s = tl.arange(0, BLOCK_S)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK_S, BLOCK_W], partials_ptr.dtype.element_ty)
    for start in range(0, S, BLOCK_S):
        place = (start + s).to(tl.int64)[:, None] * W + w[None, :]
        mask = (start + s < S)[:, None] & (w < W)[None, :]
        total += tl.load(partials_ptr + layer * partials_stride + place, mask=mask, other=0.0)
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    row = w // H
    vector, network = (row // N).to(tl.int64), (row % N).to(tl.int64)  # of networks P apart in a flat buffer
    out_ptr += layer * out_stride + vector * vector_stride + network * network_stride
    tl.store(out_ptr + w % H, out, mask=w < W)


def _computed(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, and the dtype of statistics and partial sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward_config(H: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """At least 4 rows per program, so that they share the parameters, while a thread holds 16 values."""
    block = next_power_of_2(H)
    rows = max(1, min(8192, max(2048, 4 * block)) // block)
    heuristic = {"BLOCK_ROWS": rows, "num_warps": max(4, min(16, rows * block // 512))}
    return {**configuration("norm_forward", H, dtype, device, heuristic), "BLOCK_H": block}


class _Walk(NamedTuple):
    """How `programs` share the rows of a network: `rows_each` for each, in steps of BLOCK_ROWS."""

    programs: int
    rows_each: int
    blocks: int  # of columns
    config: dict[str, Any]


def _walk(N: int, B: int, H: int, dtype: torch.dtype, device: torch.device, frozen: bool) -> _Walk:
    """8 values per thread, beside its parameters and, unless frozen, as many partial sums; blocks of columns
    where a row is too wide for that. Frozen, there is room for twice the warps on a processor."""
    block = next_power_of_2(H)
    widest = 8192 if frozen and H % 16 == 0 else 4096  # without wide loads, addresses take registers too
    if block > (widest // 2 if dtype == torch.float64 else widest):
        block = 1024
    heuristic = {"BLOCK_H": block, "BLOCK_ROWS": max(1, 2048 // block), "STAGES": 2 if frozen else 3}
    heuristic["num_warps"] = max(8, min(16, block // 256))
    name = "norm_frozen" if frozen else "norm_backward"
    config: dict[str, Any] = dict(configuration(name, H, dtype, device, heuristic))
    # no two threads with the same value: one would read dy when the other has put dx in its place
    most = max(1, config["BLOCK_ROWS"] * config["BLOCK_H"] // 64)
    warps = config["num_warps"] = min(config["num_warps"], most)
    blocks = triton.cdiv(H, config["BLOCK_H"])
    wanted = max(1, processors(device) * (32 if frozen else 16) // (warps * N * blocks))
    tiles = max(1, triton.cdiv(B, config["BLOCK_ROWS"]))
    tiles_each = triton.cdiv(tiles, wanted)
    if tiles_each == 1:
        config["STAGES"] = 1  # nothing to load ahead
    return _Walk(triton.cdiv(tiles, tiles_each), tiles_each * config["BLOCK_ROWS"], blocks, config)


def partial_shape(
    N: int, B: int, H: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int, int, int]:
    """Shape [S, 3, N, H] of the partial sums of `backward_into` for x [N, B, H] of `dtype`.

    They are float32, float64 for float64. For L layers allocate [L, S, 3, N, H].
    """
    return _walk(N, B, H, dtype, device, frozen=False).programs, 3, N, H


def forward_into(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    y: Tensor,
    stats: Tensor,
) -> None:
    """Fill `y` [N, B, H] and `stats` [2, N, B], the mean and 1/std of every row. Checks nothing.

    Args:
        x, residual: contiguous [N, B, H]. bias, weight, shift: [N, H], last stride 1.
        y: contiguous; it may be `residual` itself.
        stats: float32, float64 for float64; its [N, B] are contiguous, the distance between them is free.
    """
    N, B, H = x.shape
    config = _forward_config(H, x.dtype, x.device)
    grid = (triton.cdiv(B, config["BLOCK_ROWS"]), N)
    tensors = (x, bias, weight, shift, residual, y, stats)
    strides = (bias.stride(0), weight.stride(0), shift.stride(0), stats.stride(0))
    if x.numel():
        launch(_norm_forward_kernel, grid, *tensors, *strides, B, H=H, EPS=eps, RELU=relu, **config)


def backward_into(
    dy: Tensor,
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    relu: bool,
    stats: Tensor,
    dx: Tensor | None,
    partials: Tensor | None,
) -> None:
    """Fill the gradient of x and the partial sums of the parameters' gradients, each where given.

    Checks nothing. Takes memory of its own, [2, N, B], only where the rows' sums need a launch.

    Args:
        dy, x: contiguous [N, B, H]. bias, weight, shift: [N, H], last stride 1.
        stats: as `forward_into` left it.
        dx: contiguous [N, B, H]; it may be `dy` or `x` itself.
        partials: contiguous `partial_shape`.
    """
    N, B, H = x.shape
    programs, rows_each, blocks, config = _walk(N, B, H, x.dtype, x.device, frozen=partials is None)
    tensors = (dy, x, bias, weight, shift, stats)
    strides = (bias.stride(0), weight.stride(0), shift.stride(0), stats.stride(0))
    sums = None
    if blocks > 1:
        sums = stats.new_empty(stats.shape)
        heuristic = {"BLOCK_ROWS": 4, "BLOCK_H": 1024, "num_warps": 8}
        block: dict[str, Any] = configuration("norm_sums", H, x.dtype, x.device, heuristic)
        grid = (triton.cdiv(B, block["BLOCK_ROWS"]), N)
        launch(_norm_sums_kernel, grid, *tensors, sums, *strides, B, H=H, RELU=relu, **block)
    held = (*tensors, sums, dx, partials, *strides, B, rows_each)
    launch(_norm_backward_kernel, (programs, N, blocks), *held, H=H, RELU=relu, **config)


def reduce_partials(
    partials: Tensor, out: Tensor, rows: Tensor | None = None, sums: Tensor | None = None
) -> None:
    """Add up the partial sums of L layers in one launch: out[l] = sum over s of partials[l, s]; and rows.

    Args:
        partials: [L, S, 3, N, H], each layer contiguous, any distance apart.
        out: [L, 3, N, H] of any float dtype, for bias, weight and shift; last stride 1, the others are free,
            so that the networks may lie in the rows of a flat buffer [N, P].
        rows: contiguous [N, B, K], which are summed over B into sums [N, K] of any float dtype and any
            distance between networks: as the gradient of what they put out is for their last bias.
    """
    L, S, _, N, H = partials.shape
    W = 3 * N * H
    # enough programs to fill the chip, and then wider ones
    block = next_power_of_2(min(128, max(32, L * W // (4 * processors(out.device)))))
    heuristic = {"BLOCK_W": block, "BLOCK_S": 4096 // block, "num_warps": 8}
    config: dict[str, Any] = configuration("norm_reduce", W, partials.dtype, out.device, heuristic)
    grid = (triton.cdiv(W, config["BLOCK_W"]), L if rows is None else L + 1)
    strides = (partials.stride(0), *out.stride()[:3], 0 if sums is None else sums.stride(0))
    B, K = (0, 0) if rows is None else rows.shape[1:]
    config |= {"BLOCK_K": 8, "BLOCK_B": 256}
    launch(_norm_reduce_kernel, grid, partials, out, rows, sums, *strides, S, W, N, H, L, B, K, **config)


def partials(stages: int, networks: int, rows: int, width: int, like: Tensor) -> Tensor:
    """Partial sums of several stages: [L, S, 3, N, H]."""
    shape = partial_shape(networks, rows, width, like.dtype, like.device)
    return like.new_empty(stages, *shape, dtype=_computed(like.dtype))


def reduce(
    pieces: Tensor, vectors: Sequence[Sequence[Tensor]], rows: Tensor | None, sums: Tensor | None
) -> None:
    """`reduce_partials` into the vectors of each stage, bias (or none), weight and shift [N, H]: one launch
    where these lie at equal distances."""
    layers = [spaced(each) for each in vectors]
    whole = None if None in layers else spaced([x for x in layers if x is not None])
    if whole is not None and whole.shape[1] == 3:
        reduce_partials(pieces, whole, rows, sums)
        return
    out = torch.empty(len(pieces), *pieces.shape[2:], dtype=vectors[0][0].dtype, device=pieces.device)
    reduce_partials(pieces, out, rows, sums)
    for total, into in zip(out, vectors, strict=True):
        for place, x in zip(into, total[-len(into) :], strict=True):
            place.copy_(x)


class Norm(passes_plain.Norm):
    """See passes_plain.Norm; gradients of the vectors are left as `partials`."""

    partial_sums = True

    def _vectors(self, vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        bias, weight, shift = self.split(vectors)
        return weight.new_zeros(weight.shape[1]).expand_as(weight) if bias is None else bias, weight, shift

    def forward(self, held: Held) -> Call:
        product, vectors, relu, added, out, stats = held
        assert stats is not None
        vectors = self._vectors(vectors)
        return partial(forward_into, product, *vectors, added, relu, reference.EPS, out, stats)

    def backward(
        self,
        held: Held,
        dout: Tensor,
        dproduct: Tensor,
        into: Sequence[Tensor] | None,
        pieces: Tensor | None,
    ) -> Call:
        assert held.stats is not None
        vectors = self._vectors(held.vectors)
        return partial(backward_into, dout, held.product, *vectors, held.relu, held.stats, dproduct, pieces)


BATCHED = True
MINE: dict[str, Pass] = {"norm": Norm(), "layer_norm": Norm(bias=False)}
PASSES = ChainMap(MINE, passes_plain.PASSES)  # what is added there later is here too


def _stacked(x: Tensor, parameter: Tensor) -> Tensor:
    """x as contiguous [N, B, H], N being 1 for parameters [H]."""
    networks = parameter.shape[0] if parameter.dim() == 2 else 1
    return rows_of(x).view(networks, -1, x.shape[-1])


def _vectors(*parameters: Tensor) -> Iterator[Tensor]:
    """Parameters as [N, H] with contiguous rows."""
    for parameter in parameters:
        rows = parameter if parameter.dim() == 2 else parameter.unsqueeze(0)
        yield rows if rows.stride(1) == 1 else rows.contiguous()


def _forward(
    x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    out, stats = _forward_fake(x, bias, weight, shift, residual, relu, eps)
    if x.numel():
        rows = _stacked(x, bias)
        skip = None if residual is None else _stacked(residual, bias)
        b, w, s = _vectors(bias, weight, shift)
        forward_into(rows, b, w, s, skip, relu, eps, out, stats)
    return out, stats


def _forward_fake(
    x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, *x.shape[:-1]), dtype=_computed(x.dtype))


def _backward(
    dout: Tensor,
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    stats: Tensor,
    relu: bool,
    wants_dx: bool,
    wants_parameters: bool,
) -> tuple[Tensor, Tensor]:
    dx, grads = _backward_fake(dout, x, bias, weight, shift, stats, relu, wants_dx, wants_parameters)
    if x.numel() == 0:
        return dx, grads.zero_()
    rows = _stacked(x, bias)
    partials = None
    if wants_parameters:
        N, B, H = rows.shape
        partials = stats.new_empty((1, *partial_shape(N, B, H, x.dtype, x.device)))
    b, w, s = _vectors(bias, weight, shift)
    backward_into(_stacked(dout, bias), rows, b, w, s, relu, stats, dx if wants_dx else None, partials)
    if partials is not None:
        reduce_partials(partials, grads.unsqueeze(0))
    return dx, grads


def _backward_fake(
    dout: Tensor,
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    stats: Tensor,
    relu: bool,
    wants_dx: bool,
    wants_parameters: bool,
) -> tuple[Tensor, Tensor]:
    one = bias.dtype == weight.dtype == shift.dtype
    kind = bias.dtype if one else _computed(x.dtype)
    dx = x.new_empty(x.shape if wants_dx else (0,))
    return dx, x.new_empty((3, *bias.shape) if wants_parameters else (0,), dtype=kind)


_backward_op = Op("bias_layer_norm_backward", _backward, _backward_fake)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.relu = inputs[5]


def _gradients(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    wants_dx, *wants, wants_residual = ctx.needs_input_grad[:5]
    out: list[Tensor | None] = [None] * 7
    if dout is None:
        return tuple(out)
    x, *parameters, stats = ctx.saved_tensors
    if wants_dx or any(wants):
        dx, grads = _backward_op(dout, x, *parameters, stats, ctx.relu, wants_dx, any(wants))
        out[0] = dx if wants_dx else None
        for index, parameter in enumerate(parameters):
            out[1 + index] = grads[index].to(parameter.dtype) if wants[index] else None
    out[4] = dout if wants_residual else None
    return tuple(out)


_forward_op = Op("bias_layer_norm", _forward, _forward_fake, _keep, _gradients, kept=1)


def _check(x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, residual: Tensor | None) -> None:
    if x.dim() == 0:
        raise ValueError("x must have shape [.., H], got []")
    if bias.dim() not in (1, 2) or bias.shape[-1] != x.shape[-1]:
        wanted = f"[H] or [E, H] with H = {x.shape[-1]}"
        raise ValueError(f"bias must have shape {wanted}, like the last axis of x, got {list(bias.shape)}")
    for name, parameter in (("weight", weight), ("shift", shift)):
        if parameter.shape != bias.shape:
            wanted = f"the shape of bias, {list(bias.shape)}"
            raise ValueError(f"{name} must have {wanted}, got {list(parameter.shape)}")
    if bias.dim() == 2 and (x.dim() < 2 or x.shape[0] != bias.shape[0]):
        wanted = f"[E, .., H] with E = {bias.shape[0]} for parameters [E, H]"
        raise ValueError(f"x must have shape {wanted}, got {list(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual must be of the dtype of x, {x.dtype}, got {residual.dtype}")


def bias_layer_norm(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-6,
    impl: str | None = None,
) -> Tensor:
    """LayerNorm of `x + bias` over the last axis, then ReLU or a residual sum.

        h = x + bias
        y = weight * (h - mean(h)) / sqrt(var(h) + eps) + shift
        out = relu(y)  |  residual + y  |  residual + relu(y)  |  y

    Args:
        x: [.., H], or [E, .., H] for E stacked networks. Any strides.
        bias, weight, shift: [H], or [E, H]. Their dtypes may differ from that of x.
        residual: of the shape and dtype of x.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        Of the shape and dtype of x. Every tensor argument gets a gradient, of its own dtype.
    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    Source: Ba et al. 2016, arXiv:1607.06450, section 3.
    """
    _check(x, bias, weight, shift, residual)
    tensors = (x, bias, weight, shift) if residual is None else (x, bias, weight, shift, residual)
    if not takes_kernels(impl, *tensors):
        return twin(reference.bias_layer_norm, impl)(
            x, bias, weight, shift, residual=residual, relu=relu, eps=eps
        )
    out, _ = _forward_op(x, bias, weight, shift, residual, relu, eps)
    return out  # type: ignore[no-any-return]
