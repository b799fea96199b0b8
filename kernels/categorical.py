"""Categorical critics: Bellman target, cross-entropy, projection, encodings of scalars, expected value.

    hat(d) = max(0, 1 - |d|): how an atom shares what lies d spacings away from it
    index  = clip((y + v_max) / spacing, 0, K - 1): where the return y lies, counted in atoms
    target_j = sum_k p_k hat(index_k - j)           loss = -sum_k target_k log softmax(logits)_k
    d loss / d logits = softmax(logits) - target    d expected / d logits_k = p_k (z_k - expected)

Target:  y_k = r + s (z_k - temperature log pi) is affine in k, so index_k = clip(c + s k, 0, K - 1) with one
         c and one slope s per row. The ends sum what is clipped to them over the whole row. Any other atom j
         has its sources in (j - 1 - c) / s < k < (j + 1 - c) / s: three for s = 0.99, about 2 / s in general,
         at most K. They are read again, from the L1 cache, and their probabilities computed again. For s = 0
         all mass sits at c. Nothing is scattered, and no sum depends on the order of programs.
Dims:    B batch, E and E' members, K atoms; R rows where leading axes do not matter.
Memory:  categorical_bellman_loss reads E'*B*K next logits and E*B*K logits once, and writes E*B*K gradients
         where they are wanted; the backward pass multiplies those in place of computing them. The target
         stays in registers, as does the encoding in two_hot_cross_entropy and hl_gauss_cross_entropy. The
         other losses and expected_value read logits once each way and write their gradients.
         Rows may be padded, logits = padded[..., :K]: they are read where they are. Where they start at
         multiples of 8 elements they are read in words of 16 bytes, some columns beyond K included.
Launches: one each way.
Numbers: arithmetic in float32, in float64 for float64 logits; results are float32 for logits narrower than
         that, gradients have the dtype of the logits. An index is rounded like any number of its size, by at
         most K * 2^-24, but to the same number for both of its atoms: a row's mass is kept. A NaN among the
         inputs of a row makes that row NaN, and no other.
Source:  Bellemare et al. 2017, arXiv:1707.06887; Nauman et al. 2025, arXiv:2505.23150; for the HL-Gauss
         encoding Farebrother et al. 2024, arXiv:2403.03950.
Twins:   reference.<name of the op>

On a CPU the projection is compiled for float32 (csrc/categorical.hpp); the rest is plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _native, reference
from ._cases import Case
from ._config import architecture, configuration, next_power_of_2
from ._dispatch import chosen, launch, observed, takes_kernels
from ._numerics import scalar, wide
from ._ops import Op, first_derivative
from ._rows import rows_of
from ._triton import jit, tl, triton

__all__ = [
    "categorical_bellman_loss",
    "categorical_bellman_loss_and_gradient",
    "categorical_cross_entropy",
    "categorical_projection",
    "categorical_target",
    "expected_value",
    "hl_gauss",
    "hl_gauss_cross_entropy",
    "two_hot",
    "two_hot_cross_entropy",
]


# arithmetic of the kernels


@jit
def _place(B, BLOCK_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's rows of the batch, for reading and for writing: the last one is read in place of those
    beyond it."""
    # int64: row * stride passes 2**31
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    return tl.minimum(rows, B - 1), rows, rows < B


@jit
def _member_place(B, BLOCK_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's member, and as above."""
    blocks = tl.cdiv(B, BLOCK_B)
    program = tl.program_id(0)
    rows = (program % blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    return (program // blocks).to(tl.int64), tl.minimum(rows, B - 1), rows, rows < B


@jit
def _start(x_ptr, member, member_stride, rows, row_stride, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where these rows begin; strides count in UNIT elements."""
    return x_ptr + (tl.cast(member, tl.int64) * member_stride + rows * row_stride) * UNIT


@jit
def _logits(starts, k, K: tl.constexpr, READ: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(starts[:, None] + k[None, :], mask=(k < READ)[None, :], other=-float("inf"))


@jit
def _exp(x):  # type: ignore[no-untyped-def]
    """One instruction less than tl.exp has to spend on results below 1e-38, which are 0 here."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def _softmax(x, k, K: tl.constexpr, READ: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits less their maximum, their exponentials, the maximum and the sum. Beyond K they count as -inf."""
    x = wide(x)
    if READ > K:
        x = tl.where((k < K)[None, :], x, -float("inf"))
    m = tl.max(x, 1)
    x -= m[:, None]
    w = _exp(x)
    return x, w, m, tl.sum(w, 1)


@jit
def _clip(x, low, high):  # type: ignore[no-untyped-def]
    """NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@jit
def _unit(x):  # type: ignore[no-untyped-def]
    """Clip to [0, 1], which an addition does on the way; NaN becomes 0."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@jit
def _hat(d):  # type: ignore[no-untyped-def]
    return _unit(1.0 - tl.abs(d))


@jit
def _index(y, K: tl.constexpr, V_MAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the returns y lie, counted in atoms."""
    return _clip((_clip(y, -V_MAX, V_MAX) + V_MAX) * ((K - 1) / (2 * V_MAX)), 0.0, K - 1.0)


@jit
def _encoding(values, k, K: tl.constexpr, V_MAX: tl.constexpr, SIGMA: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two-hot, or HL-Gauss where SIGMA > 0."""
    index = _index(values, K, V_MAX)
    d = k.to(index.dtype)[None, :] - index[:, None]
    if SIGMA > 0.0:
        a: tl.constexpr = 2.0 * V_MAX / ((K - 1) * 1.4142135623730951 * SIGMA)
        inside = tl.erf((K - 0.5 - index) * a) - tl.erf((-0.5 - index) * a)
        t = (tl.erf((d + 0.5) * a) - tl.erf((d - 0.5) * a)) * (1.0 / inside)[:, None]
    else:
        t = _hat(d)
    return t + index[:, None] * 0.0  # NaN stays


@jit
def _add_source(t, spots, maxima, shares, place, n, near, slope, c, j, E: tl.constexpr):  # type: ignore[no-untyped-def]
    """t and what source place + n gives to atom j."""
    mass = 0.0
    for e in tl.static_range(E):
        x = wide(tl.load(spots[e] + n, mask=n < near, other=-float("inf")))
        mass += _exp(x - maxima[e][:, None, None]) * shares[e][:, None, None]
    return t + _hat(slope * (place + n) + c - j) * mass


@jit
def _bellman_target(  # type: ignore[no-untyped-def]
    next_ptr,
    rewards_ptr,
    discounts_ptr,
    log_probs_ptr,
    temperature_ptr,
    temperature,
    member_stride,
    row_stride,
    rows,
    k,
    E: tl.constexpr,
    K: tl.constexpr,
    READ: tl.constexpr,
    UNIT: tl.constexpr,
    V_MAX: tl.constexpr,
):
    """The projected target of these rows; beyond K it is finite and of no use."""
    starts = ()
    xs = ()
    for e in tl.static_range(E):
        starts += (_start(next_ptr, e, member_stride, rows, row_stride, UNIT),)  # type: ignore[assignment]
        xs += (_logits(starts[e], k, K, READ),)  # type: ignore[assignment]
    dtype = wide(xs[0]).dtype  # type: ignore[misc]
    r = tl.load(rewards_ptr + rows).to(dtype)
    s = tl.load(discounts_ptr + rows).to(dtype)
    bonus = scalar(temperature_ptr, temperature, dtype) * tl.load(log_probs_ptr + rows).to(dtype)
    c = (r - s * bonus + (1.0 - s) * V_MAX) * ((K - 1) / (2 * V_MAX))
    known = _clip(c, 0.0, K - 1.0)  # NaN where the row has one
    maxima = ()
    shares = ()
    p = 0.0
    for e in tl.static_range(E):
        _, w, m, total = _softmax(xs[e], k, K, READ)
        share = 1.0 / (E * total)
        p += w * share[:, None]
        known += share
        maxima += (m,)  # type: ignore[assignment]
        shares += (share,)  # type: ignore[assignment]
    j = k.to(dtype)
    index = s[:, None] * j[None, :] + c[:, None]
    first = tl.sum(p * _unit(1.0 - index), 1)
    last = tl.sum(p * _unit(index - (K - 2)), 1)

    # Sources are sought from a little more than one spacing away, for rounding; their hat is 0 there.
    # Tiles of another shape: the compiler then lays neighbouring atoms on neighbouring lanes, which makes
    # these reads contiguous, also where those above give a lane the 8 atoms of a word.
    back = 1.0 / tl.where(s == 0.0, 1.0, s)
    reach = tl.abs(back) * (1.0 + 1.0 / 256)
    count = tl.where(s == 0.0, 0.0, tl.ceil(tl.minimum(2.0 * reach, K)))
    offset = 1.0 - reach - c * back
    s3, c3, j3 = s[:, None, None], c[:, None, None], j[None, None, :]
    source = j3 * back[:, None, None] + offset[:, None, None]
    source = tl.minimum(tl.maximum(source, 0.0), K).to(tl.int32)
    spots = ()
    for e in tl.static_range(E):
        spots += (starts[e][:, None, None] + source,)  # type: ignore[assignment]
    place = source.to(dtype)
    near = K - source
    t = tl.zeros_like(place)
    for n in tl.static_range(3):  # all there are for a slope of 0.67 or more
        t = _add_source(t, spots, maxima, shares, place, n, near, s3, c3, j3, E)
    for n in range(3, tl.max(count, 0).to(tl.int32)):
        t = _add_source(t, spots, maxima, shares, place, n, near, s3, c3, j3, E)
    t = tl.sum(t, 1)

    t = tl.where((k == 0)[None, :], first[:, None], tl.where((k == K - 1)[None, :], last[:, None], t))
    alone = _hat(_clip(c, 0.0, K - 1.0)[:, None] - j[None, :])
    return tl.where((s == 0.0)[:, None], alone, t) + (known * 0.0)[:, None]


@jit
def _cross_entropy(x, total, t, k, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the masses t, given logits less their maximum and the sum of their exponentials."""
    log_p = tl.where((k < K)[None, :], x - tl.log(total)[:, None], 0.0)
    return -tl.sum(t * log_p, 1)


# kernels


@jit
def _target_kernel(  # type: ignore[no-untyped-def]
    next_ptr,
    rewards_ptr,
    discounts_ptr,
    log_probs_ptr,
    temperature_ptr,
    temperature,
    out_ptr,
    member_stride,
    row_stride,
    B,
    E: tl.constexpr,
    K: tl.constexpr,
    READ: tl.constexpr,
    UNIT: tl.constexpr,
    V_MAX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, out, live = _place(B, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    t = _bellman_target(
        next_ptr, rewards_ptr, discounts_ptr, log_probs_ptr, temperature_ptr, temperature,
        member_stride, row_stride, rows, k, E, K, READ, UNIT, V_MAX,
    )  # fmt: skip
    tl.store(out_ptr + out[:, None] * K + k[None, :], t, mask=live[:, None] & (k < K)[None, :])


@jit
def _bellman_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    next_ptr,
    rewards_ptr,
    discounts_ptr,
    log_probs_ptr,
    temperature_ptr,
    temperature,
    scale_ptr,
    scale,
    loss_ptr,
    grad_ptr,
    member_stride,
    row_stride,
    next_member_stride,
    next_row_stride,
    B,
    E: tl.constexpr,
    NEXT_E: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    READ: tl.constexpr,
    UNIT: tl.constexpr,
    V_MAX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, out, live = _place(B, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    xs = ()  # read before the target needs its own logits: one wait for memory, not two
    for e in tl.static_range(E):
        starts = _start(logits_ptr, e, member_stride, rows, row_stride, UNIT)
        xs += (_logits(starts, k, K, READ),)  # type: ignore[assignment]
    t = _bellman_target(
        next_ptr, rewards_ptr, discounts_ptr, log_probs_ptr, temperature_ptr, temperature,
        next_member_stride, next_row_stride, rows, k, NEXT_E, K, READ, UNIT, V_MAX,
    )  # fmt: skip
    for e in tl.static_range(E):
        x, w, _, total = _softmax(xs[e], k, K, READ)
        tl.store(loss_ptr + out, _cross_entropy(x, total, t, k, K), mask=live)
        if grad_ptr is not None:
            d = (w * (1.0 / total)[:, None] - t) * scalar(scale_ptr, scale, t.dtype)
            if COLUMNS > K:
                d = tl.where((k < K)[None, :], d, 0.0)
            mask = live[:, None] & (k < COLUMNS)[None, :]
            tl.store(
                grad_ptr + out[:, None] * COLUMNS + k[None, :], d.to(grad_ptr.dtype.element_ty), mask=mask
            )
        out += B


@jit
def _scale_rows_kernel(grad_ptr, d_ptr, out_ptr, grad_stride, N, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    rows = start // K + ((start % K).to(tl.int32) + i) // K
    mask = start + i < N
    d = wide(tl.load(d_ptr + start + i, mask=mask, other=0.0))
    g = tl.load(grad_ptr + rows * grad_stride, mask=mask, other=0.0).to(d.dtype)
    tl.store(out_ptr + start + i, (d * g).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    source_ptr,
    grad_ptr,
    out_ptr,
    member_stride,
    row_stride,
    source_member_stride,
    source_stride,
    grad_stride,
    B,
    K: tl.constexpr,
    READ: tl.constexpr,
    UNIT: tl.constexpr,
    V_MAX: tl.constexpr,
    SIGMA: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The source is the target where SIGMA is None, else values. Gradients for a grad_ptr, else losses."""
    member, rows, out, live = _member_place(B, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    x = _logits(_start(x_ptr, member, member_stride, rows, row_stride, UNIT), k, K, READ)
    dtype = wide(x).dtype
    if SIGMA is None:
        starts = _start(source_ptr, member, source_member_stride, rows, source_stride, UNIT)
        t = tl.load(starts[:, None] + k[None, :], mask=(k < READ)[None, :], other=0.0).to(dtype)
        if READ > K:
            t = tl.where((k < K)[None, :], t, 0.0)
    else:
        starts = _start(source_ptr, member, source_member_stride, rows, source_stride, 1)
        values = tl.load(starts).to(dtype)
    if grad_ptr is not None:
        g = tl.load(grad_ptr + (member * B + rows) * grad_stride).to(dtype)
    x, w, _, total = _softmax(x, k, K, READ)
    if SIGMA is not None:
        t = _encoding(values, k, K, V_MAX, SIGMA)
    out += member * B
    if grad_ptr is None:
        tl.store(out_ptr + out, _cross_entropy(x, total, t, k, K), mask=live)
    else:
        d = (w * (1.0 / total)[:, None] - t) * g[:, None]
        mask = live[:, None] & (k < K)[None, :]
        tl.store(out_ptr + out[:, None] * K + k[None, :], d.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _encoding_kernel(  # type: ignore[no-untyped-def]
    values_ptr,
    out_ptr,
    B,
    K: tl.constexpr,
    V_MAX: tl.constexpr,
    SIGMA: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, out, live = _place(B, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    t = _encoding(wide(tl.load(values_ptr + rows)), k, K, V_MAX, SIGMA)
    tl.store(out_ptr + out[:, None] * K + k[None, :], t, mask=live[:, None] & (k < K)[None, :])


@jit
def _expected_value_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    atoms_ptr,
    grad_ptr,
    out_ptr,
    member_stride,
    row_stride,
    grad_stride,
    B,
    K: tl.constexpr,
    READ: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients where there is a grad_ptr, else values."""
    member, rows, out, live = _member_place(B, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    x = _logits(_start(x_ptr, member, member_stride, rows, row_stride, UNIT), k, K, READ)
    dtype = wide(x).dtype
    z = tl.load(atoms_ptr + k, mask=k < K, other=0.0).to(dtype)[None, :]
    if grad_ptr is not None:
        g = tl.load(grad_ptr + (member * B + rows) * grad_stride).to(dtype)
    _, w, _, total = _softmax(x, k, K, READ)
    share = 1.0 / total
    q = tl.sum(w * z, 1) * share
    out += member * B
    if grad_ptr is None:
        tl.store(out_ptr + out, q, mask=live)
    else:
        d = w * (z - q[:, None]) * (share * g)[:, None]
        mask = live[:, None] & (k < K)[None, :]
        tl.store(out_ptr + out[:, None] * K + k[None, :], d.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _projection_kernel(  # type: ignore[no-untyped-def]
    probs_ptr,
    positions_ptr,
    out_ptr,
    B,
    K: tl.constexpr,
    V_MAX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, out, live = _place(B, BLOCK_B)
    j = tl.arange(0, BLOCK_K)
    dtype = out_ptr.dtype.element_ty
    t = tl.zeros([BLOCK_B, BLOCK_K], dtype)
    known = tl.zeros([BLOCK_B], dtype)
    for k in range(0, K):
        p = tl.load(probs_ptr + rows * K + k).to(dtype)
        index = _index(tl.load(positions_ptr + rows * K + k).to(dtype), K, V_MAX)
        known += index
        t += p[:, None] * _hat(index[:, None] - j[None, :])
    t += (known * 0.0)[:, None]  # NaN stays
    tl.store(out_ptr + out[:, None] * K + j[None, :], t, mask=live[:, None] & (j < K)[None, :])


@jit
def _projection_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    probs_ptr,
    positions_ptr,
    dprobs_ptr,
    dpositions_ptr,
    B,
    K: tl.constexpr,
    V_MAX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient read between its atoms, where each position lies, and its slope there."""
    rows, _, live = _place(B, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    mask = live[:, None] & (k < K)[None, :]
    at = rows[:, None] * K + k[None, :]
    y = wide(tl.load(positions_ptr + at, mask=mask, other=0.0))
    index = _index(y, K, V_MAX)
    lower = tl.floor(tl.minimum(tl.maximum(index, 0.0), K - 1.0))
    place = lower.to(tl.int32)
    g_lower = tl.load(grad_ptr + rows[:, None] * K + place, mask=mask, other=0.0).to(y.dtype)
    g_upper = tl.load(grad_ptr + rows[:, None] * K + tl.minimum(place + 1, K - 1), mask=mask, other=0.0)
    rise = g_upper.to(y.dtype) - g_lower
    if dprobs_ptr is not None:
        d = g_lower + (index - lower) * rise
        tl.store(dprobs_ptr + at, d.to(dprobs_ptr.dtype.element_ty), mask=mask)
    if dpositions_ptr is not None:
        p = tl.load(probs_ptr + at, mask=mask, other=0.0).to(y.dtype)
        d = tl.where((y < -V_MAX) | (y > V_MAX), 0.0, p * rise * ((K - 1) / (2 * V_MAX)))
        tl.store(dpositions_ptr + at, d.to(dpositions_ptr.dtype.element_ty), mask=mask)


# launches


def _result(x: Tensor) -> torch.dtype:
    """The dtype of what is computed from x."""
    return torch.promote_types(x.dtype, torch.float32)


def _members(x: Tensor) -> Tensor:
    """x [.., B, K] as [M, B, K] with each row contiguous: a view where its memory allows, else a copy."""
    x = x.reshape(x.shape[:-2].numel(), x.shape[-2] if x.dim() > 1 else 1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> list[int]:
    """Of members and rows; an axis of one entry has none."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def _words(*tensors: Tensor) -> tuple[int, int]:
    """UNIT and READ for a tile of rows of each tensor [M, B, K].

    Where all rows start at multiples of 8 elements, strides count in 8 and rows are read up to the next
    multiple of 8, if that is memory of theirs.
    """
    K = tensors[0].shape[-1]
    read = -(-K // 8) * 8
    for x in tensors:
        strides = _strides(x)
        end = sum((size - 1) * stride for size, stride in zip(x.shape[:-1], strides, strict=True)) + read
        inside = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        if any(stride % 8 for stride in strides) or end > inside:
            return 1, K
    return 8, read


def _tile(
    name: str, x: Tensor, members: int, rows: int, tiles: int, columns: int
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and configuration for `members` times `rows` rows, of each of which `tiles` rows of K are read."""
    block_k = next_power_of_2(columns)
    width = tiles * block_k * (2 if x.dtype == torch.float64 else 1)
    # One warp per program: sums over a row stay inside of it. 512 numbers, 16 per lane, leave registers for
    # some 30 warps per multiprocessor, which together read enough at a time to fill the memory's pipes. More
    # warps where a single row would take too many registers, but no more lanes than atoms.
    few = 16 if architecture(x.device) == "cpu" else max(1, 512 // width)
    warps = min(8, max(1, block_k // 64), next_power_of_2(-(-width // 1024)))
    config = configuration(name, columns, x.dtype, x.device, {"BLOCK_B": few, "num_warps": warps})
    return (members * triton.cdiv(rows, config["BLOCK_B"]),), {**config, "BLOCK_K": block_k}


def _spread(grad: Tensor) -> tuple[Tensor, int]:
    """A gradient with one entry per row, and the step from one to the next: 0 where one number fills it."""
    if not any(grad.stride()):
        return grad, 0
    return grad.contiguous(), 1


def _number(value: Tensor | None, fixed: float, like: Tensor) -> tuple[Tensor | None, float]:
    """A number as kernels take it: its address, or itself where float32 holds it."""
    if value is None and like.dtype == torch.float64:
        value = like.new_full((), fixed)
    return value, fixed


def _target(
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | None,
    fixed_temperature: float,
    v_max: float,
) -> Tensor:
    x = _members(next_logits)
    E, B, K = x.shape
    out = x.new_empty(B, K, dtype=_result(x))
    if B:
        unit, read = _words(x)
        grid, config = _tile("categorical_target", x, 1, B, E, K)
        vectors = (v.contiguous() for v in (rewards, discounts, next_log_probs))
        strides = (stride // unit for stride in _strides(x))
        alpha = _number(temperature, fixed_temperature, x)
        launch(
            _target_kernel, grid, x, *vectors, *alpha, out, *strides, B,
            E=E, K=K, READ=read, UNIT=unit, V_MAX=v_max, **config,
        )  # fmt: skip
    return out


def _target_fake(
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | None,
    fixed_temperature: float,
    v_max: float,
) -> Tensor:
    return next_logits.new_empty(next_logits.shape[1:], dtype=_result(next_logits))


def _bellman(
    logits: Tensor,
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | None,
    fixed_temperature: float,
    v_max: float,
    scale: Tensor | None,
    fixed_scale: float,
    columns: int,
) -> tuple[Tensor, Tensor]:
    """Losses, and gradients times scale in rows of `columns`; none where that is 0."""
    x, y = _members(logits), _members(next_logits)
    E, B, K = x.shape
    losses, grads = _bellman_fake(
        logits, next_logits, rewards, discounts, next_log_probs, temperature, fixed_temperature, v_max,
        scale, fixed_scale, columns,
    )  # fmt: skip
    if E * B:
        unit, read = _words(x, y)
        grid, config = _tile("categorical_bellman_loss", x, 1, B, E + len(y), max(K, columns))
        vectors = (v.contiguous() for v in (rewards, discounts, next_log_probs))
        numbers = (*_number(temperature, fixed_temperature, x), *_number(scale, fixed_scale, x))
        strides = (stride // unit for stride in (*_strides(x), *_strides(y)))
        launch(
            _bellman_kernel, grid, x, y, *vectors, *numbers, losses, grads if columns else None, *strides, B,
            E=E, NEXT_E=len(y), K=K, COLUMNS=columns, READ=read, UNIT=unit, V_MAX=v_max, **config,
        )  # fmt: skip
    return losses, grads


def _bellman_fake(
    logits: Tensor,
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | None,
    fixed_temperature: float,
    v_max: float,
    scale: Tensor | None,
    fixed_scale: float,
    columns: int,
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[:-1], dtype=_result(logits))
    return losses, logits.new_empty((*logits.shape[:-1], columns) if columns else 0)


def _scale_rows(grad: Tensor, rows: Tensor) -> Tensor:
    out = torch.empty_like(rows)
    N, K = rows.numel(), rows.shape[-1]
    if N:
        heuristic = {"BLOCK": 2048, "num_warps": 4}
        config = configuration("categorical_bellman_loss_backward", K, rows.dtype, rows.device, heuristic)
        g, step = _spread(grad)
        launch(_scale_rows_kernel, (triton.cdiv(N, config["BLOCK"]),), g, rows, out, step, N, K=K, **config)
    return out


def _scale_rows_fake(grad: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(rows)


def _cross_entropies(
    name: str,
    logits: Tensor,
    source: Tensor,
    v_max: float,
    sigma: float | None,
    grad: Tensor | None,
    out: Tensor,
) -> Tensor:
    x = _members(logits)
    M, B, K = x.shape
    if not M * B:
        return out
    if sigma is None:
        source = _members(source)
        strides = _strides(source)
        unit, read = _words(x, source)
        grid, config = _tile(name, x, M, B, 2, K)
    else:
        source = source.contiguous()
        strides = [B, 1] if source.numel() == M * B else [0, 1]
        unit, read = _words(x)
        grid, config = _tile(name, x, M, B, 1, K)
    steps = [stride // unit for stride in _strides(x)]
    steps += strides if sigma is not None else [stride // unit for stride in strides]
    g, step = (None, 0) if grad is None else _spread(grad)
    launch(
        _cross_entropy_kernel, grid, x, source, g, out, *steps, step, B,
        K=K, READ=read, UNIT=unit, V_MAX=v_max, SIGMA=sigma, **config,
    )  # fmt: skip
    return out


def _cross_entropy_forward(logits: Tensor, source: Tensor, v_max: float, sigma: float | None) -> Tensor:
    out = _cross_entropy_fake(logits, source, v_max, sigma)
    return _cross_entropies("categorical_cross_entropy", logits, source, v_max, sigma, None, out)


def _cross_entropy_fake(logits: Tensor, source: Tensor, v_max: float, sigma: float | None) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=_result(logits))


def _cross_entropy_backward(
    grad: Tensor, logits: Tensor, source: Tensor, v_max: float, sigma: float | None
) -> Tensor:
    out = logits.new_empty(logits.shape)
    return _cross_entropies("categorical_cross_entropy_backward", logits, source, v_max, sigma, grad, out)


def _cross_entropy_backward_fake(
    grad: Tensor, logits: Tensor, source: Tensor, v_max: float, sigma: float | None
) -> Tensor:
    return logits.new_empty(logits.shape)


def _encode(values: Tensor, num_atoms: int, v_max: float, sigma: float) -> Tensor:
    out = _encode_fake(values, num_atoms, v_max, sigma)
    if B := values.numel():
        grid, config = _tile("value_encoding", values, 1, B, 1, num_atoms)
        launch(
            _encoding_kernel,
            grid,
            values.contiguous(),
            out,
            B,
            K=num_atoms,
            V_MAX=v_max,
            SIGMA=sigma,
            **config,
        )
    return out


def _encode_fake(values: Tensor, num_atoms: int, v_max: float, sigma: float) -> Tensor:
    return values.new_empty(*values.shape, num_atoms, dtype=_result(values))


def _expected_values(name: str, logits: Tensor, atoms: Tensor, grad: Tensor | None, out: Tensor) -> Tensor:
    x = _members(logits)
    M, B, K = x.shape
    if M * B:
        unit, read = _words(x)
        grid, config = _tile(name, x, M, B, 1, K)
        g, step = (None, 0) if grad is None else _spread(grad)
        strides = (stride // unit for stride in _strides(x))
        arguments = (x, atoms.contiguous(), g, out, *strides, step, B)
        launch(_expected_value_kernel, grid, *arguments, K=K, READ=read, UNIT=unit, **config)
    return out


def _expected_value_forward(logits: Tensor, atoms: Tensor) -> Tensor:
    out = _expected_value_fake(logits, atoms)
    return _expected_values("expected_value", logits, atoms, None, out)


def _expected_value_fake(logits: Tensor, atoms: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=_result(logits))


def _expected_value_backward(grad: Tensor, logits: Tensor, atoms: Tensor) -> Tensor:
    return _expected_values("expected_value_backward", logits, atoms, grad, logits.new_empty(logits.shape))


def _expected_value_backward_fake(grad: Tensor, logits: Tensor, atoms: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _project(probs: Tensor, positions: Tensor, v_max: float) -> Tensor:
    p, y = rows_of(probs), rows_of(positions)
    out = _project_fake(probs, positions, v_max)
    if R := len(p):
        K = p.shape[-1]
        grid, config = _tile("categorical_projection", p, 1, R, 1, K)
        launch(_projection_kernel, grid, p, y, out, R, K=K, V_MAX=v_max, **config)
    return out


def _project_fake(probs: Tensor, positions: Tensor, v_max: float) -> Tensor:
    return probs.new_empty(probs.shape, dtype=_result(probs))


def _project_backward(
    grad: Tensor, probs: Tensor, positions: Tensor, v_max: float, to_probs: bool, to_positions: bool
) -> tuple[Tensor, Tensor]:
    g, p, y = rows_of(grad), rows_of(probs), rows_of(positions)
    dprobs, dpositions = _project_backward_fake(grad, probs, positions, v_max, to_probs, to_positions)
    if R := len(p):
        K = p.shape[-1]
        grid, config = _tile("categorical_projection_backward", p, 1, R, 2, K)
        wanted = (dprobs if to_probs else None, dpositions if to_positions else None)
        launch(_projection_backward_kernel, grid, g, p, y, *wanted, R, K=K, V_MAX=v_max, **config)
    return dprobs, dpositions


def _project_backward_fake(
    grad: Tensor, probs: Tensor, positions: Tensor, v_max: float, to_probs: bool, to_positions: bool
) -> tuple[Tensor, Tensor]:
    return (
        probs.new_empty(probs.shape if to_probs else 0),
        positions.new_empty(positions.shape if to_positions else 0),
    )


# gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.inputs = [x for x in inputs if not isinstance(x, Tensor)]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))


def _bellman_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _bellman_gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    return (None if grad is None else _scale_rows_op(grad, rows), *(None,) * 10)


def _cross_entropy_gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, source = ctx.saved_tensors
    back = None if grad is None else _cross_entropy_backward_op(grad, logits, source, *ctx.inputs)
    return back, None, None, None


def _expected_value_gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    return None if grad is None else _expected_value_backward_op(grad, *ctx.saved_tensors), None


def _project_gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    to_probs, to_positions = ctx.needs_input_grad[:2]
    if grad is None:
        return None, None, None
    pair = _project_backward_op(grad, *ctx.saved_tensors, *ctx.inputs, to_probs, to_positions)
    return pair[0] if to_probs else None, pair[1] if to_positions else None, None


_target_op = Op("categorical_target", _target, _target_fake)
_bellman_op = Op(
    "categorical_bellman_loss", _bellman, _bellman_fake, _bellman_keep, _bellman_gradients, kept=1
)
_scale_rows_op = Op("categorical_bellman_loss_backward", _scale_rows, _scale_rows_fake)
_cross_entropy_op = Op(
    "categorical_cross_entropy",
    _cross_entropy_forward,
    _cross_entropy_fake,
    _keep,
    _cross_entropy_gradients,
)
_cross_entropy_backward_op = Op(
    "categorical_cross_entropy_backward", _cross_entropy_backward, _cross_entropy_backward_fake
)
_encode_op = Op("value_encoding", _encode, _encode_fake)
_expected_value_op = Op(
    "expected_value", _expected_value_forward, _expected_value_fake, _keep, _expected_value_gradients
)
_expected_value_backward_op = Op(
    "expected_value_backward", _expected_value_backward, _expected_value_backward_fake
)
_project_op = Op("categorical_projection", _project, _project_fake, _keep, _project_gradients)
_project_backward_op = Op("categorical_projection_backward", _project_backward, _project_backward_fake)


class _CrossEntropy(torch.autograd.Function):
    """On a CPU: keeps the log-softmax for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        ctx.save_for_backward(log_probs, target)
        return (log_probs * target).sum(-1).neg_()

    @staticmethod
    @first_derivative("categorical_cross_entropy")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_probs, target = ctx.saved_tensors
        return log_probs.exp().sub_(target).mul_(grad.unsqueeze(-1)), None


# public ops


def _check_logits(name: str, logits: Tensor, shape: str, rank: int) -> None:
    if logits.dim() < rank or logits.shape[-1] < 2:
        raise ValueError(f"{name} must have shape {shape} with K >= 2, got {list(logits.shape)}")


def _check_shape(name: str, tensor: Tensor, dims: str, *allowed: tuple[int, ...]) -> None:
    if tensor.shape not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{name} must have shape {dims} = {shapes}, got {list(tensor.shape)}")


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0.0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {number}")


def _check_number(name: str, number: Tensor | float) -> None:
    if isinstance(number, Tensor) and number.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one, got shape {list(number.shape)}")


def _check_bellman(
    next_logits: Tensor, vectors: dict[str, Tensor], temperature: Tensor | float, atoms: Tensor, v_max: float
) -> None:
    if next_logits.dim() != 3 or next_logits.shape[0] < 1 or next_logits.shape[2] < 2:
        wanted = "[E, B, K] with E >= 1 and K >= 2"
        raise ValueError(f"next_logits must have shape {wanted}, got {list(next_logits.shape)}")
    for name, vector in vectors.items():
        _check_shape(name, vector, "[B]", (next_logits.shape[1],))
    _check_shape("atoms", atoms, "[K]", (next_logits.shape[2],))
    _check_number("temperature", temperature)
    _check_positive(v_max=v_max)


def _split(number: Tensor | float) -> tuple[Tensor | None, float]:
    """A number as an op of torch.library takes it: a tensor, or else a float."""
    return (number.detach(), 0.0) if isinstance(number, Tensor) else (None, float(number))


def categorical_target(
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | float,
    atoms: Tensor,
    v_max: float,
    *,
    impl: str | None = None,
) -> Tensor:
    """Soft categorical Bellman target of an ensemble; nothing gets a gradient.

        p    = mean over members of softmax(next_logits)
        y_k  = clip(r + discount * (z_k - temperature * log pi(a'|s')), -v_max, v_max)
        out  = projection of p from y onto z

    Args:
        next_logits: [E, B, K] of the target critic; K >= 2. Rows may be padded, `padded[..., :K]`.
        rewards, next_log_probs: [B]; a reward may be infinite.
        discounts: [B], the discount times the mask, 0 where the episode ended; mostly in [0, 1], any will do.
        temperature: a number, or a tensor of one.
        atoms: [K], evenly spaced from -v_max to v_max: the kernels rely on it and take them from v_max.
        v_max: > 0, in units of return; a change of it compiles the kernel anew.
        impl: auto, triton or reference (`kernels.use`).
    Returns:
        [B, K] probabilities: float64 for float64 logits, else float32.
    Raises:
        ValueError for shapes or numbers that do not fit.
    Source: Nauman et al. 2025, arXiv:2505.23150.
    """
    vectors = {"rewards": rewards, "discounts": discounts, "next_log_probs": next_log_probs}
    _check_bellman(next_logits, vectors, temperature, atoms, v_max)
    numbers = [temperature] if isinstance(temperature, Tensor) else []
    inputs = (next_logits, *vectors.values())
    if takes_kernels(impl, *inputs, atoms, *numbers):
        out: Tensor = _target_op(*(x.detach() for x in inputs), *_split(temperature), float(v_max))
        return out
    with torch.no_grad():
        return reference.categorical_target(
            next_logits, rewards, discounts, next_log_probs, temperature, atoms, v_max, _projection(impl)
        )


def categorical_bellman_loss(
    logits: Tensor,
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | float,
    atoms: Tensor,
    v_max: float,
    *,
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy of `categorical_target` against each member, in one launch; the target is not stored.

        losses = -sum_k target_k * log softmax(logits)_k     d losses / d logits = softmax(logits) - target

    Only the logits get a gradient. Where they need one, the same launch writes it, and the backward pass
    multiplies it by the incoming gradient.

    Args:
        logits: [E, B, K] of the critic that learns. Rows may be padded, `padded[..., :K]`.
        next_logits: [E', B, K] of the target critic, E' >= 1. The others: as in `categorical_target`.
        impl: auto, triton or reference (`kernels.use`).
    Returns:
        [E, B]: float64 for float64 logits, else float32.
    Raises:
        ValueError for shapes or numbers that do not fit.
    Source: Nauman et al. 2025, arXiv:2505.23150.
    """
    vectors = {"rewards": rewards, "discounts": discounts, "next_log_probs": next_log_probs}
    _check_bellman(next_logits, vectors, temperature, atoms, v_max)
    _check_shape("logits", logits, "[E, B, K]", (logits.shape[0], *next_logits.shape[1:]))
    numbers = [temperature] if isinstance(temperature, Tensor) else []
    inputs = (next_logits, *vectors.values())
    if takes_kernels(impl, logits, *inputs, atoms, *numbers):
        columns = logits.shape[-1] if logits.requires_grad and torch.is_grad_enabled() else 0
        fixed = (*(x.detach() for x in inputs), *_split(temperature))
        losses: Tensor = _bellman_op(logits, *fixed, float(v_max), None, 1.0, columns)[0]
        return losses
    target = categorical_target(
        next_logits, rewards, discounts, next_log_probs, temperature, atoms, v_max, impl=impl
    )
    return categorical_cross_entropy(logits, target, impl=impl)


def categorical_bellman_loss_and_gradient(
    logits: Tensor,
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | float,
    atoms: Tensor,
    v_max: float,
    *,
    scale: Tensor | float = 1.0,
    columns: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`categorical_bellman_loss` and its gradient, in one launch and without autograd.

    Args:
        scale: of the gradient, a number or a tensor of one: 1 / B where the mean over the batch counts.
        columns: of the gradient's rows, >= K; beyond K they are 0. K by default.
        The others: as in `categorical_bellman_loss`.
    Returns:
        losses [E, B], float64 for float64 logits, else float32; and d (scale * losses) / d logits
        [E, B, columns] in the dtype of the logits.
    Raises:
        ValueError for shapes or numbers that do not fit.
    """
    vectors = {"rewards": rewards, "discounts": discounts, "next_log_probs": next_log_probs}
    _check_bellman(next_logits, vectors, temperature, atoms, v_max)
    _check_shape("logits", logits, "[E, B, K]", (logits.shape[0], *next_logits.shape[1:]))
    _check_number("scale", scale)
    K = logits.shape[-1]
    columns = K if columns is None else columns
    if columns < K:
        raise ValueError(f"columns must be at least K = {K}, got {columns}")
    numbers = [x for x in (temperature, scale) if isinstance(x, Tensor)]
    inputs = (logits, next_logits, *vectors.values())
    if takes_kernels(impl, *inputs, atoms, *numbers):
        fixed = (*(x.detach() for x in inputs), *_split(temperature))
        pair: tuple[Tensor, Tensor] = _bellman_op(*fixed, float(v_max), *_split(scale), columns)
        return pair
    with torch.no_grad():
        return reference.categorical_bellman_loss_and_gradient(
            logits, next_logits, rewards, discounts, next_log_probs, temperature, atoms, v_max,
            scale=scale, columns=columns, project=_projection(impl),
        )  # fmt: skip


def categorical_cross_entropy(logits: Tensor, target: Tensor, *, impl: str | None = None) -> Tensor:
    """Cross-entropy of `target` against the log-softmax of `logits`, per row.

        out = -sum_k target_k * log softmax(logits)_k          d out / d logits = softmax(logits) - target

    Args:
        logits: [.., B, K], K >= 2. Rows may be padded, `padded[..., :K]`.
        target: [B, K], shared by all leading axes, or of the shape of the logits; mass 1 per row. It gets no
            gradient.
        impl: auto, triton or reference (`kernels.use`).
    Returns:
        [.., B]: float64 for float64 logits, else float32.
    Raises:
        ValueError for shapes that do not fit.
    """
    _check_logits("logits", logits, "[.., B, K]", 2)
    _check_shape("target", target, "[B, K]", logits.shape[-2:], logits.shape)
    target = target.detach()
    if takes_kernels(impl, logits, target):
        out: Tensor = _cross_entropy_op(logits, target, 1.0, None)
        return out
    if chosen(impl) == "reference" or observed(logits, target):
        return reference.categorical_cross_entropy(logits, target)
    return _CrossEntropy.apply(logits.to(_result(logits)), target)  # type: ignore[no-any-return, no-untyped-call]


def two_hot(values: Tensor, num_atoms: int, v_max: float, *, impl: str | None = None) -> Tensor:
    """Scalars as mass on the two atoms around them; their mean is the value. No gradient.

    Args:
        values: [..], in units of return; those beyond the support count as its ends.
        num_atoms: K >= 2, evenly spaced from -v_max to v_max.
        impl: auto, triton or reference (`kernels.use`).
    Returns:
        [.., K]: float64 for float64 values, else float32.
    Raises:
        ValueError for numbers that do not fit.
    """
    return _encoded(values, num_atoms, v_max, 0.0, impl)


def hl_gauss(
    values: Tensor, num_atoms: int, v_max: float, sigma: float, *, impl: str | None = None
) -> Tensor:
    """Scalars as the masses of a normal distribution in a bin around each atom (HL-Gauss). No gradient.

        out_k = m(z_k - h, z_k + h) / m(z_0 - h, z_{K-1} + h)
        m(a, b) = Phi((b - v) / sigma) - Phi((a - v) / sigma)

    with h half the spacing of the atoms and v the value, clipped to [-v_max, v_max].

    Args:
        values: [..], in units of return. num_atoms: K >= 2, evenly spaced from -v_max to v_max.
        sigma: > 0, in units of return; the paper's ratio sigma / spacing = 0.75 is 1.5 * v_max / (K - 1).
        impl: auto, triton or reference (`kernels.use`).
    Returns:
        [.., K] of mass 1: float64 for float64 values, else float32.
    Raises:
        ValueError for numbers that do not fit.
    Source: Farebrother et al. 2024, arXiv:2403.03950, section 3.1.
    """
    _check_positive(sigma=sigma)
    return _encoded(values, num_atoms, v_max, float(sigma), impl)


def _encoded(values: Tensor, num_atoms: int, v_max: float, sigma: float, impl: str | None) -> Tensor:
    if num_atoms < 2:
        raise ValueError(f"num_atoms must be at least 2, got {num_atoms}")
    _check_positive(v_max=v_max)
    values = values.detach()
    if takes_kernels(impl, values):
        out: Tensor = _encode_op(values, num_atoms, float(v_max), sigma)
        return out
    if sigma:
        return reference.hl_gauss(values, num_atoms, v_max, sigma)
    return reference.two_hot(values, num_atoms, v_max)


def two_hot_cross_entropy(logits: Tensor, values: Tensor, v_max: float, *, impl: str | None = None) -> Tensor:
    """Cross-entropy of `two_hot(values)` against the log-softmax of `logits`; the encoding is not stored.

    Args:
        logits: [.., K], K >= 2. Rows may be padded, `padded[..., :K]`.
        values: [..], or [B], the last axis before K, shared by all others; they get no gradient.
        v_max: > 0, the last atom, in units of return.
        impl: auto, triton or reference (`kernels.use`).
    Returns:
        [..]: float64 for float64 logits, else float32.
    Raises:
        ValueError for shapes or numbers that do not fit.
    """
    return _encoded_cross_entropy(logits, values, v_max, 0.0, impl)


def hl_gauss_cross_entropy(
    logits: Tensor, values: Tensor, v_max: float, sigma: float, *, impl: str | None = None
) -> Tensor:
    """As `two_hot_cross_entropy`, with `hl_gauss(values, K, v_max, sigma)` for the encoding."""
    _check_positive(sigma=sigma)
    return _encoded_cross_entropy(logits, values, v_max, float(sigma), impl)


def _encoded_cross_entropy(
    logits: Tensor, values: Tensor, v_max: float, sigma: float, impl: str | None
) -> Tensor:
    _check_logits("logits", logits, "[.., K]", 1)
    _check_shape("values", values, "[..]", logits.shape[:-1], logits.shape[:-1][-1:])
    _check_positive(v_max=v_max)
    values = values.detach()
    if takes_kernels(impl, logits, values):
        out: Tensor = _cross_entropy_op(logits, values, float(v_max), sigma)
        return out
    if sigma:
        return reference.hl_gauss_cross_entropy(logits, values, v_max, sigma)
    return reference.two_hot_cross_entropy(logits, values, v_max)


def expected_value(logits: Tensor, atoms: Tensor, *, impl: str | None = None) -> Tensor:
    """Mean of the categorical distribution, sum_k softmax(logits)_k * z_k.

    Args:
        logits: [.., K], K >= 2. Rows may be padded, `padded[..., :K]`.
        atoms: [K], anywhere. Through the kernels they get no gradient.
        impl: auto, triton or reference (`kernels.use`).
    Returns:
        [..]: float64 for float64 logits, else float32.
    Raises:
        ValueError for shapes that do not fit.
    Source: Bellemare et al. 2017, arXiv:1707.06887, section 2.
    """
    _check_logits("logits", logits, "[.., K]", 1)
    _check_shape("atoms", atoms, "[K]", logits.shape[-1:])
    if takes_kernels(impl, logits, atoms):
        out: Tensor = _expected_value_op(logits, atoms.detach())
        return out
    return reference.expected_value(logits, atoms)


def categorical_projection(
    probs: Tensor, positions: Tensor, v_max: float, *, impl: str | None = None
) -> Tensor:
    """Project a distribution on arbitrary positions onto K evenly spaced atoms in [-v_max, v_max].

    Mass is split linearly between the two neighbouring atoms; an exact hit keeps all of its mass, and
    positions beyond the support are clipped to its ends, so that the mass of every row is kept. This one
    takes K^2 steps per row, as nothing is known of the positions; `categorical_target` takes fewer.

    Args:
        probs: [.., K] mass, K >= 2. positions: [.., K] where that mass sits, in units of return.
        impl: auto, triton or reference (`kernels.use`).
    Returns:
        [.., K] mass on the atoms: float64 for float64 probs, else float32. Gradients reach both inputs.
    Raises:
        ValueError for shapes or numbers that do not fit.
    Source: Bellemare et al. 2017, arXiv:1707.06887, section 4.
    """
    _check_logits("probs", probs, "[.., K]", 1)
    _check_shape("positions", positions, "[.., K]", probs.shape)
    _check_positive(v_max=v_max)
    if takes_kernels(impl, probs, positions):
        out: Tensor = _project_op(probs, positions, float(v_max))
        return out
    return _projection(impl)(probs, positions, v_max)


def _projection(impl: str | None) -> reference.Projection:
    """The twin of `categorical_projection`, or the compiled pass where that applies."""
    return reference.categorical_projection if chosen(impl) == "reference" else _compiled_projection


def _compiled_projection(probs: Tensor, positions: Tensor, v_max: float) -> Tensor:
    tensors = (probs, positions)
    if any(x.requires_grad for x in tensors) or observed(*tensors) or not _native.takes(*tensors):
        return reference.categorical_projection(probs, positions, v_max)
    probs, positions = probs.contiguous(), positions.contiguous()
    out = torch.empty_like(probs)
    *rows, atoms = probs.shape
    _native.compiled.categorical_projection(
        math.prod(rows), atoms, probs.data_ptr(), positions.data_ptr(), v_max, out.data_ptr()
    )
    return out


V_MAX = 10.0


def _random_logits(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, padded: bool) -> Tensor:
    """Rows of the next multiple of 8 elements where padded."""
    wide = (*shape[:-1], -(-shape[-1] // 8) * 8 if padded else shape[-1])
    return torch.randn(wide, device=device).to(dtype)[..., : shape[-1]]


def _bellman_case(E: int, K: int, dtype: torch.dtype, padded: bool, way: str) -> Case:
    """way: target, loss (and its gradient by autograd) or gradient (without)."""

    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        rest = torch.float64 if dtype == torch.float64 else torch.float32
        logits, next_logits = (_random_logits(device, (E, batch, K), dtype, padded) for _ in range(2))
        rewards, log_probs, chance = (torch.randn(batch, device=device, dtype=rest) for _ in range(3))
        discounts = torch.where(chance > 2.0, 0.0, 0.99)  # a few episodes end
        temperature = torch.full((), 0.1, device=device, dtype=rest)
        atoms = torch.linspace(-V_MAX, V_MAX, K, device=device, dtype=rest)
        inputs = (next_logits, rewards, discounts, log_probs, temperature, atoms, V_MAX)
        if way == "target":
            return lambda: categorical_target(*inputs, impl=impl)
        if way == "gradient":
            columns = -(-K // 8) * 8 if padded else K
            scale = 1.0 / batch
            return lambda: categorical_bellman_loss_and_gradient(
                logits, *inputs, scale=scale, columns=columns, impl=impl
            )
        logits.requires_grad_()
        seed = torch.full((E, batch), 1.0 / batch, device=device, dtype=rest)

        def call() -> object:
            losses = categorical_bellman_loss(logits, *inputs, impl=impl)
            return losses, *torch.autograd.grad(losses, logits, seed)

        return call

    passes = {"target": 1, "gradient": 3, "loss": 5}[way]  # over tensors of the size of the logits

    def moved(batch: int) -> int:
        target = batch * K * 4 if way == "target" else 0
        return batch * (passes * E * K * dtype.itemsize + 12) + target

    op, kernels = {
        "target": ("categorical_target", ("categorical_target",)),
        "gradient": ("categorical_bellman_loss_and_gradient", ("categorical_bellman_loss",)),
        "loss": (
            "categorical_bellman_loss",
            ("categorical_bellman_loss", "categorical_bellman_loss_backward"),
        ),
    }[way]
    label = f"E={E} K={K} {str(dtype).removeprefix('torch.')}{' padded' if padded else ''}"
    return Case(op, label, prepare, moved, kernels)


def _row_case(op: str, E: int, K: int, dtype: torch.dtype, padded: bool = False) -> Case:
    """Ops on rows of logits, forward and backward."""
    rest = torch.float64 if dtype == torch.float64 else torch.float32

    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        logits = _random_logits(device, (E, batch, K), dtype, padded).requires_grad_()
        values = 3.0 * torch.randn(batch, device=device, dtype=rest)
        target = torch.randn(batch, K, device=device, dtype=rest).softmax(-1)
        atoms = torch.linspace(-V_MAX, V_MAX, K, device=device, dtype=rest)
        seed = torch.full((E, batch), 1.0 / batch, device=device, dtype=rest)
        forward: dict[str, Callable[[], Tensor]] = {
            "categorical_cross_entropy": lambda: categorical_cross_entropy(logits, target, impl=impl),
            "two_hot_cross_entropy": lambda: two_hot_cross_entropy(logits, values, V_MAX, impl=impl),
            "hl_gauss_cross_entropy": lambda: hl_gauss_cross_entropy(logits, values, V_MAX, 0.15, impl=impl),
            "expected_value": lambda: expected_value(logits, atoms, impl=impl),
        }

        def call() -> object:
            out = forward[op]()
            return out, *torch.autograd.grad(out, logits, seed)

        return call

    def moved(batch: int) -> int:
        target = 2 * K * rest.itemsize if op == "categorical_cross_entropy" else 0
        return batch * (3 * E * K * dtype.itemsize + target + 2 * E * rest.itemsize)

    kernel = "expected_value" if op == "expected_value" else "categorical_cross_entropy"
    label = f"E={E} K={K} {str(dtype).removeprefix('torch.')}{' padded' if padded else ''}"
    return Case(op, label, prepare, moved, (kernel, f"{kernel}_backward"))


def _value_case(op: str, K: int) -> Case:
    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        values = 3.0 * torch.randn(batch, device=device)
        if op == "two_hot":
            return lambda: two_hot(values, K, V_MAX, impl=impl)
        return lambda: hl_gauss(values, K, V_MAX, 0.15, impl=impl)

    return Case(op, f"K={K} float32", prepare, lambda batch: batch * (K + 1) * 4, ("value_encoding",))


def _projection_case(K: int) -> Case:
    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        probs = torch.randn(batch, K, device=device).softmax(-1).requires_grad_()
        positions = (5.0 * torch.randn(batch, K, device=device)).requires_grad_()
        seed = torch.randn(batch, K, device=device)

        def call() -> object:
            out = categorical_projection(probs, positions, V_MAX, impl=impl)
            return out, *torch.autograd.grad(out, (probs, positions), seed)

        return call

    kernels = ("categorical_projection", "categorical_projection_backward")
    return Case("categorical_projection", f"K={K} float32", prepare, lambda batch: batch * K * 32, kernels)


def cases() -> Iterator[Case]:
    """BRC's critic first: two members of 101 atoms."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    for E, K, dtype, padded in (
        (2, 101, bf16, False),
        (2, 101, bf16, True),
        (2, 101, f32, False),
        (2, 51, f32, False),
        (10, 101, bf16, False),
        (2, 512, f32, False),
        (2, 101, f64, False),
    ):
        yield _bellman_case(E, K, dtype, padded, "loss")
    for padded in (False, True):
        yield _bellman_case(2, 101, bf16, padded, "gradient")
    for dtype in (bf16, f32):
        yield _bellman_case(2, 101, dtype, False, "target")
        yield _row_case("categorical_cross_entropy", 2, 101, dtype)
        yield _row_case("expected_value", 2, 101, dtype)
        yield _row_case("two_hot_cross_entropy", 2, 101, dtype)
        yield _row_case("hl_gauss_cross_entropy", 2, 101, dtype)
    yield _row_case("expected_value", 2, 101, bf16, padded=True)
    yield _row_case("hl_gauss_cross_entropy", 2, 101, bf16, padded=True)
    yield _row_case("hl_gauss_cross_entropy", 2, 101, f64)
    yield _value_case("two_hot", 101)
    yield _value_case("hl_gauss", 101)
    yield _projection_case(101)
