"""Categorical Bellman targets and their cross-entropy.

    hat(d) = max(0, 1 - |d|): how an atom shares what lies d spacings away from it
    index  = clip((y + v_max) / spacing, 0, K - 1): where the return y lies, counted in atoms
    target_j = sum_k p_k hat(index_k - j)           loss = -sum_k target_k log softmax(logits)_k
    d loss / d logits = softmax(logits) - target

Target:  y_k = r + s (z_k - temperature log pi) is affine in k, so index_k = clip(c + s k, 0, K - 1) with one
         c and one slope s per row. The ends sum what is clipped to them over the whole row. Any other atom j
         has its sources in (j - 1 - c) / s < k < (j + 1 - c) / s: three for s = 0.99, about 2 / s in general,
         at most K. They are read again, from the L1 cache, and their probabilities computed again. For s = 0
         all mass sits at c. Nothing is scattered, and no sum depends on the order of programs.
Dims:    B batch, E and E' members, K atoms.
Memory:  categorical_bellman_loss reads E'*B*K next logits and E*B*K logits once, and writes E*B*K gradients
         where they are wanted; the backward pass multiplies those in place of computing them. The target
         stays in registers. Rows may be padded (_categorical.py).
Launches: one each way.
Numbers: arithmetic in float32, in float64 for float64 logits; results are float32 for logits narrower than
         that, gradients have the dtype of the logits. An index is rounded like any number of its size, by at
         most K * 2^-24, but to the same number for both of its atoms: a row's mass is kept. A NaN among the
         inputs of a row makes that row NaN, and no other.
Source:  Bellemare et al. 2017, arXiv:1707.06887; Nauman et al. 2025, arXiv:2505.23150.
Twins:   reference.<name of the op>
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._categorical import (
    _check_number,
    _check_positive,
    _check_shape,
    _clip,
    _cross_entropy,
    _exp,
    _hat,
    _logits,
    _members,
    _number,
    _place,
    _result,
    _softmax,
    _split,
    _spread,
    _start,
    _strides,
    _tile,
    _unit,
    _words,
)
from .cross_entropy import categorical_cross_entropy
from .projection import _projection
from .runtime import native
from .runtime.dispatch import chosen, launch, observed, takes_kernels
from .runtime.language import jit, tl, triton
from .runtime.library import Op
from .runtime.numerics import scalar, wide
from .runtime.tables import configuration
from .runtime.twins import twin

__all__ = [
    "categorical_bellman_loss",
    "categorical_bellman_loss_and_gradient",
    "categorical_target",
]


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


def _bellman_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _bellman_gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    return (None if grad is None else _scale_rows_op(grad, rows), *(None,) * 10)


_target_op = Op("categorical_target", _target, _target_fake)

_bellman_op = Op(
    "categorical_bellman_loss", _bellman, _bellman_fake, _bellman_keep, _bellman_gradients, kept=1
)

_scale_rows_op = Op("categorical_bellman_loss_backward", _scale_rows, _scale_rows_fake)


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
    if atoms.is_cpu and not observed(atoms) and not native.recording():  # a GPU would have to be waited for
        first, last = atoms[0].item(), atoms[-1].item()
        if max(abs(first + v_max), abs(last - v_max)) > 1e-2 * v_max:
            raise ValueError(f"atoms must go from -v_max to v_max = {v_max}, got {first} to {last}")


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
        atoms: [K], evenly spaced from -v_max to v_max: the kernels rely on it and take them from v_max. On
            a GPU this is not checked.
        v_max: > 0, in units of return; a change of it compiles the kernel anew.
        impl: auto, triton, reference or compile (`kernels.use`).
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
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(())
    with torch.no_grad():
        return twin(reference.categorical_target, impl)(
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
        impl: auto, triton, reference or compile (`kernels.use`).
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
        columns: length of the gradient's rows, >= K; 0 beyond K. K by default.
        The others: as in `categorical_bellman_loss`.
    Returns:
        losses [E, B], float64 for float64 logits, else float32; and d (scale * losses) / d logits
        [E, B, columns] in the dtype of the logits.
    Raises:
        ValueError for shapes or numbers that do not fit.
    Source: Nauman et al. 2025, arXiv:2505.23150.
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
    if chosen(impl) == "auto" and native.takes(*inputs) and not observed(*numbers):
        return _compiled_bellman(inputs, temperature, float(v_max), float(scale), columns)
    temperature, scale = (x.reshape(()) if isinstance(x, Tensor) else x for x in (temperature, scale))
    with torch.no_grad():
        return twin(reference.categorical_bellman_loss_and_gradient, impl)(
            logits, next_logits, rewards, discounts, next_log_probs, temperature, atoms, v_max,
            scale=scale, columns=columns, project=_projection(impl),
        )  # fmt: skip


def _compiled_bellman(
    inputs: Sequence[Tensor], temperature: Tensor | float, v_max: float, scale: float, columns: int
) -> tuple[Tensor, Tensor]:
    logits, next_logits, *vectors = (x.detach() for x in inputs)
    x, y = _members(logits), _members(next_logits)
    rewards, discounts, log_probs = (v.contiguous() for v in vectors)
    losses = logits.new_empty(logits.shape[:-1])
    grads = logits.new_empty(*logits.shape[:-1], columns)
    native.compiled.categorical_bellman(  # type: ignore[call-arg]
        len(x), len(y), *x.shape[1:], x.data_ptr(), *_strides(x), y.data_ptr(), *_strides(y),
        rewards.data_ptr(), discounts.data_ptr(), log_probs.data_ptr(), *native.number(temperature), v_max,
        scale, columns, losses.data_ptr(), grads.data_ptr(),
    )  # fmt: skip
    return losses, grads
