"""Tanh-Gaussian sample and log-probability, with noise given or drawn, and a backward written by hand.

With t = tanh(raw), s = log_std = centre + reach * t, u = mean + exp(s) * noise and a = tanh(u):

    log pi = sum_A [-noise^2 / 2 - s - log(2 pi) / 2 - 2 (log 2 - |u| - log(1 + exp(-2 |u|)))]
    d log pi / du = 2 a,   du = da (1 - a^2) + 2 a dlogpi,
    ds = du exp(s) noise - dlogpi,   draw = reach (1 - t^2) ds

Noise from a seed and an offset in device memory: Philox4x32-10 with the counter (element, offset), then
sqrt(-2 log x) cos(2 pi y) of the first two words. Nothing depends on the launch, and a CUDA graph draws anew
in each replay if the offset moves on.

Dims:    B rows, A action.
Memory:  forward reads mean, raw and noise (or writes it) and writes the actions and B log-probabilities;
         backward reads mean, raw, noise and the gradients, recomputes the rest and writes two gradients.
         mean and raw may be halves of one tensor: rows are read where they lie, and where rows are given
         for actions and gradients they are written there, and the noise only where noise_out wants it.
Numbers: arithmetic and log-probabilities in float32, in float64 if mean is; finite for every u. tanh comes
         from exp(-2 |x|) and has an absolute error of an eps, 1 - tanh^2 a relative one. The noise drawn
         differs from the twin's in its last bits only, as the words are the same.
Source:  Haarnoja et al. 2018, arXiv:1812.05905, appendix C; Salmon et al. 2011, "Parallel random numbers: as
         easy as 1, 2, 3"; Box and Muller 1958.
Twins:   reference.tanh_gaussian, reference.tanh_gaussian_backward, reference.standard_normal
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .optimizer import WIDE, InPlaceOp, _check_place, _split
from .reference import LOG_STD_MAX, LOG_STD_MIN
from .runtime import native
from .runtime.dispatch import DTYPES, chosen, launch, observed, takes_kernels
from .runtime.language import jit, tl, triton
from .runtime.library import Op, first_derivative
from .runtime.numerics import wide
from .runtime.rows import member_rows, strided_rows
from .runtime.tables import configuration, next_power_of_2
from .runtime.twins import twin

__all__ = ["standard_normal", "tanh_gaussian", "tanh_gaussian_backward"]

REACH = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
CENTRE = 0.5 * (LOG_STD_MAX + LOG_STD_MIN)
# Of log pi, per action: the normal's and the slope's.
CONSTANT = 0.5 * math.log(2.0 * math.pi) + 2.0 * math.log(2.0)


@jit
def _words(rng_ptr, i):  # type: ignore[no-untyped-def]
    """The four words of elements i (int64): those of reference.philox."""
    seed, offset = tl.load(rng_ptr), tl.load(rng_ptr + 1)
    i_low, i_high = i.to(tl.uint32), (i >> 32).to(tl.uint32)
    return tl.philox(seed, i_low, i_high, offset.to(tl.uint32), (offset >> 32).to(tl.uint32))


@jit
def _normal(rng_ptr, i, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Standard normals of elements i, in float32 or float64."""
    first, second, _, _ = _words(rng_ptr, i)
    x = ((first >> 9).to(DTYPE) + 0.5) * 1.1920928955078125e-07  # 2^-23: exact, inside of (0, 1)
    y = ((second >> 9).to(DTYPE) + 0.5) * 1.1920928955078125e-07
    # cos(2 pi y) = sin(angle) with |angle| <= pi / 2: no reduction, and its series to angle^19 has every bit
    angle = 6.283185307179586 * (tl.abs(y - 0.5) - 0.25)
    square = angle * angle
    series = tl.full(y.shape, 1.0, DTYPE)
    for step in tl.static_range(9):
        series = 1.0 - series * square * (1.0 / ((18 - 2 * step) * (19 - 2 * step)))
    return tl.sqrt(tl.maximum(-2.0 * tl.log(x), 0.0)) * angle * series


@jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """tanh(x), its derivative, and -log of that derivative plus log 4; without overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    d = 1.0 + e
    t = (1.0 - e) / d
    return tl.where(x < 0.0, -t, t), 4.0 * e / (d * d), 2.0 * (tl.abs(x) + tl.log(d))


@jit
def _tanh_gaussian_kernel(  # type: ignore[no-untyped-def]
    mean_ptr,
    raw_ptr,
    noise_ptr,
    rng_ptr,
    actions_ptr,
    log_probs_ptr,
    drawn_ptr,
    mean_stride,
    raw_stride,
    noise_stride,
    actions_stride,
    B,
    A: tl.constexpr,
    CENTRE: tl.constexpr,
    REACH: tl.constexpr,
    CONSTANT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    # int64: row * stride passes 2**31 in a wide tensor
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    a = tl.arange(0, BLOCK_A)[None, :]
    mask = (row < B) & (a < A)
    mean = wide(tl.load(mean_ptr + row * mean_stride + a, mask=mask, other=0.0))
    raw = tl.load(raw_ptr + row * raw_stride + a, mask=mask, other=0.0).to(mean.dtype)
    if rng_ptr is None:
        noise = tl.load(noise_ptr + row * noise_stride + a, mask=mask, other=0.0).to(mean.dtype)
    else:
        noise = _normal(rng_ptr, row * A + a, mean.dtype)
        if drawn_ptr is not None:
            tl.store(drawn_ptr + row * A + a, noise.to(drawn_ptr.dtype.element_ty), mask=mask)
    log_std = CENTRE + REACH * _tanh(raw)[0]
    action, _, steepness = _tanh(mean + tl.exp(log_std) * noise)
    per_dim = tl.where(mask, steepness - log_std - 0.5 * noise * noise, 0.0)
    tl.store(actions_ptr + row * actions_stride + a, action.to(actions_ptr.dtype.element_ty), mask=mask)
    tl.store(log_probs_ptr + row, tl.sum(per_dim, 1, keep_dims=True) - A * CONSTANT, mask=row < B)


@jit
def _tanh_gaussian_backward_kernel(  # type: ignore[no-untyped-def]
    dactions_ptr,
    dlog_probs_ptr,
    mean_ptr,
    raw_ptr,
    noise_ptr,
    dmean_ptr,
    draw_ptr,
    members_stride,
    dactions_stride,
    dlog_probs_stride,
    mean_stride,
    raw_stride,
    noise_stride,
    dmean_stride,
    draw_stride,
    dlog_prob,
    scale,
    B,
    MEMBERS: tl.constexpr,
    A: tl.constexpr,
    CENTRE: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """dlog_prob stands for all rows where there is no dlog_probs_ptr, which are multiplied by scale."""
    # int64: row * stride passes 2**31 in a wide tensor
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    a = tl.arange(0, BLOCK_A)[None, :]
    mask = (row < B) & (a < A)
    mean = wide(tl.load(mean_ptr + row * mean_stride + a, mask=mask, other=0.0))
    raw = tl.load(raw_ptr + row * raw_stride + a, mask=mask, other=0.0).to(mean.dtype)
    noise = tl.load(noise_ptr + row * noise_stride + a, mask=mask, other=0.0).to(mean.dtype)
    da = tl.zeros_like(mean)
    if dactions_ptr is not None:
        for _ in tl.static_range(MEMBERS):
            da += tl.load(dactions_ptr + row * dactions_stride + a, mask=mask, other=0.0).to(mean.dtype)
            dactions_ptr += members_stride
    if dlog_probs_ptr is not None:
        dlog_probs = tl.load(dlog_probs_ptr + row * dlog_probs_stride, mask=row < B, other=0.0)
        dlog_probs = dlog_probs.to(mean.dtype) * scale
    else:
        dlog_probs = tl.full([BLOCK_B, 1], dlog_prob, tl.float32).to(mean.dtype)
    t, t_slope, _ = _tanh(raw)
    spread = tl.exp(CENTRE + REACH * t) * noise
    action, slope, _ = _tanh(mean + spread)
    du = da * slope + 2.0 * action * dlog_probs
    draw = REACH * t_slope * (du * spread - dlog_probs)
    tl.store(dmean_ptr + row * dmean_stride + a, du.to(dmean_ptr.dtype.element_ty), mask=mask)
    tl.store(draw_ptr + row * draw_stride + a, draw.to(draw_ptr.dtype.element_ty), mask=mask)


@jit
def _standard_normal_kernel(rng_ptr, out_ptr, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    DOUBLE: tl.constexpr = out_ptr.dtype.element_ty == tl.float64
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    noise = _normal(rng_ptr, i, tl.float64 if DOUBLE else tl.float32)
    tl.store(out_ptr + i, noise.to(out_ptr.dtype.element_ty), mask=i < N)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _launch(kernel: Any, name: str, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch on the rows of x [B, A]."""
    rows, size = x.shape
    block = next_power_of_2(size)
    # About two elements per thread: at the usual sizes that is one program for each multiprocessor.
    c: dict[str, Any] = configuration(
        name, size, x.dtype, x.device, {"BLOCK_B": max(1, 256 // block), "num_warps": 4}
    )
    grid = (triton.cdiv(rows, c["BLOCK_B"]),)
    launch(
        kernel, grid, *arguments, rows, A=size, CENTRE=CENTRE, REACH=REACH, BLOCK_A=block, **constants, **c
    )


def _tanh_gaussian(
    mean: Tensor, raw_log_std: Tensor, noise: Tensor | None, rng: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Actions, log-probabilities, and the noise where it was drawn (else empty)."""
    actions, log_probs, drawn = _tanh_gaussian_fake(mean, raw_log_std, noise, rng)
    _tanh_gaussian_into(mean, raw_log_std, noise, rng, actions, log_probs, None if rng is None else drawn)
    return actions, log_probs, drawn


def _tanh_gaussian_into(
    mean: Tensor,
    raw_log_std: Tensor,
    noise: Tensor | None,
    rng: Tensor | None,
    actions: Tensor,
    log_probs: Tensor,
    drawn: Tensor | None,
) -> None:
    if not mean.numel():
        log_probs.zero_()
        return
    x, raw, out = strided_rows(mean), strided_rows(raw_log_std), strided_rows(actions)
    given = None if noise is None else strided_rows(noise)
    _launch(
        _tanh_gaussian_kernel,
        "tanh_gaussian",
        x,
        *(x, raw, given, None if rng is None else rng.contiguous(), out, log_probs, drawn),
        *(x.stride(0), raw.stride(0), 0 if given is None else given.stride(0), out.stride(0)),
        CONSTANT=CONSTANT,
    )


def _tanh_gaussian_fake(
    mean: Tensor, raw_log_std: Tensor, noise: Tensor | None, rng: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    actions = mean.new_empty(mean.shape)
    log_probs = mean.new_empty(mean.shape[:-1], dtype=_wide(mean.dtype))
    return actions, log_probs, log_probs.new_empty(0 if rng is None else mean.shape)


def _tanh_gaussian_backward(
    dactions: Tensor | None,
    dlog_probs: Tensor | None,
    mean: Tensor,
    raw_log_std: Tensor,
    noise: Tensor,
    dlog_prob: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    given = dactions, dlog_probs, mean, raw_log_std, noise, dlog_prob, scale
    outs = _tanh_gaussian_backward_fake(*given)
    _tanh_gaussian_backward_into(*given, *outs)
    return outs


def _tanh_gaussian_backward_fake(
    dactions: Tensor | None,
    dlog_probs: Tensor | None,
    mean: Tensor,
    raw_log_std: Tensor,
    noise: Tensor,
    dlog_prob: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    return mean.new_empty(mean.shape), raw_log_std.new_empty(mean.shape)


def _tanh_gaussian_backward_into(
    dactions: Tensor | None,
    dlog_probs: Tensor | None,
    mean: Tensor,
    raw_log_std: Tensor,
    noise: Tensor,
    dlog_prob: float,
    scale: float,
    dmean: Tensor,
    draw: Tensor,
) -> None:
    """dlog_probs of each row, or one tensor for all, times scale, or else the number dlog_prob."""
    if not mean.numel():
        return
    rows = [strided_rows(x) for x in (mean, raw_log_std, noise, dmean, draw)]
    members, distance, da = (1, 0, None) if dactions is None else member_rows(dactions, mean.dim())
    if mean.dtype == torch.float64:  # a kernel gets numbers as float32
        if dlog_probs is None and dlog_prob:
            dlog_probs, scale = mean.new_full((), dlog_prob), 1.0
        elif dlog_probs is not None and scale != 1.0:
            dlog_probs, scale = dlog_probs * scale, 1.0
    dlog = None if dlog_probs is None else dlog_probs.reshape(-1)
    _launch(
        _tanh_gaussian_backward_kernel,
        "tanh_gaussian_backward",
        rows[0],
        *(da, dlog, *rows),
        distance,
        *(0 if grad is None or len(grad) == 1 else grad.stride(0) for grad in (da, dlog)),
        *(x.stride(0) for x in rows),
        dlog_prob,
        scale,
        MEMBERS=members,
    )


def _standard_normal(rng: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    out = _standard_normal_fake(rng, count, dtype)
    if count:
        c: dict[str, Any] = configuration(
            "standard_normal", count, dtype, rng.device, {"BLOCK": 256, "num_warps": 4}
        )
        launch(_standard_normal_kernel, (triton.cdiv(count, c["BLOCK"]),), rng.contiguous(), out, count, **c)
    return out


def _standard_normal_fake(rng: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return rng.new_empty(count, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    mean, raw_log_std, noise, _ = inputs
    ctx.save_for_backward(mean, raw_log_std, output[2] if noise is None else noise)


def _gradients(ctx: Any, dactions: Tensor | None, dlog_probs: Tensor | None, _: Any) -> tuple[Any, ...]:
    dmean = draw = None
    if dactions is not None or dlog_probs is not None:
        dmean, draw = _tanh_gaussian_backward_op(dactions, dlog_probs, *ctx.saved_tensors)
    wants_mean, wants_raw, *_ = ctx.needs_input_grad
    return dmean if wants_mean else None, draw if wants_raw else None, None, None


_tanh_gaussian_backward_op = Op(
    "tanh_gaussian_backward", _tanh_gaussian_backward, _tanh_gaussian_backward_fake
)
_tanh_gaussian_backward_into_op = InPlaceOp(
    "tanh_gaussian_backward_into", _tanh_gaussian_backward_into, ("dmean", "draw")
)
_tanh_gaussian_op = Op("tanh_gaussian", _tanh_gaussian, _tanh_gaussian_fake, _keep, _gradients, kept=1)
_tanh_gaussian_into_op = InPlaceOp(
    "tanh_gaussian_into", _tanh_gaussian_into, ("actions", "log_probs", "drawn")
)
_standard_normal_op = Op("standard_normal", _standard_normal, _standard_normal_fake)


class _TanhGaussian(torch.autograd.Function):
    """In few operations of torch. Keeps t, std * noise and the actions for the backward pass."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, raw_log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        t = raw_log_std.tanh()
        log_std = t * REACH + CENTRE
        spread = log_std.exp().mul_(noise)
        u = mean + spread
        actions = u.tanh()
        per_dim = (
            F.softplus(-2.0 * u, threshold=40.0)
            .add_(u)
            .mul_(2.0)
            .sub_(log_std)
            .addcmul_(noise, noise, value=-0.5)
        )
        ctx.save_for_backward(t, spread, actions)
        return actions, per_dim.sum(-1).sub_(mean.shape[-1] * CONSTANT)

    @staticmethod
    @first_derivative("tanh_gaussian")
    def backward(ctx: Any, dactions: Tensor, dlog_probs: Tensor) -> tuple[Tensor, Tensor, None]:
        t, spread, actions = ctx.saved_tensors
        dlog_probs = dlog_probs.unsqueeze(-1)
        du = torch.addcmul(dactions, dactions * actions, actions, value=-1.0)
        du.addcmul_(actions, dlog_probs, value=2.0)
        dlog_std = (du * spread).sub_(dlog_probs)
        return du, torch.addcmul(dlog_std, dlog_std * t, t, value=-1.0).mul_(REACH), None


def _check_rng(rng: Tensor) -> None:
    if rng.dtype != torch.int64:
        raise TypeError(f"rng must be of dtype torch.int64, got {rng.dtype}")
    if rng.shape != (2,):
        raise ValueError(f"rng must have shape [2], seed and offset, got {list(rng.shape)}")


def _check_like(name: str, x: Tensor, mean: Tensor) -> None:
    if x.shape != mean.shape:
        raise ValueError(f"{name} must have the shape of mean, {list(mean.shape)}, got {list(x.shape)}")


def _check_out(name: str, out: Tensor, mean: Tensor) -> None:
    """Refuse what is not [.., A] in dense rows, apart and all the same distance from one to the next."""
    _check_place(name, out, "mean", mean.device, DTYPES)
    _check_like(name, out, mean)
    *axes, (size, step) = zip(out.shape, out.stride(), strict=True)
    axes = [(1, size), *(axis for axis in reversed(axes) if axis[0] > 1)]
    dense = size <= 1 or step == 1
    apart = len(axes) == 1 or axes[1][1] >= size
    even = all(above[1] == below[0] * below[1] for below, above in itertools.pairwise(axes[1:]))
    if out.numel() and not (dense and apart and even):
        wanted = "dense rows that are all the same distance apart"
        raise ValueError(f"{name} must have {wanted}, got strides {list(out.stride())}")


def standard_normal(
    rng: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    impl: str | None = None,
) -> Tensor:
    """Standard normals, a pure function of a seed and an offset in device memory.

    Element i of the flattened result depends on (seed, offset, i) alone: a larger shape begins with the
    numbers of a smaller one, and `tanh_gaussian` draws the same. No |normal| exceeds 5.77.

    Args:
        rng: [2] int64, seed and offset, on the device of the result. One call uses one offset: add 1 to it
            (`rng[1] += 1`) before the next. The replay store has the same generator: give it another seed.
        shape: of the result.
        dtype: of the result; computed in float32, or in float64 for float64, from the same words.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        Normals of this shape; there is no gradient.
    Raises:
        TypeError for a dtype of rng other than int64 or of the result that is none of float32, bfloat16,
        float16 and float64, ValueError for another shape of rng.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller 1958.
    """
    _check_rng(rng)
    if dtype not in DTYPES:
        known = ", ".join(str(known) for known in DTYPES)
        raise TypeError(f"dtype must be one of {known}, got {dtype}")
    if not takes_kernels(impl, rng, dtypes=(torch.int64,)):
        return reference.standard_normal(rng, shape, dtype)
    out: Tensor = _standard_normal_op(rng, math.prod(shape), dtype)
    return out.view(tuple(shape))


def tanh_gaussian(
    mean: Tensor,
    raw_log_std: Tensor,
    noise: Tensor | None = None,
    *,
    rng: Tensor | None = None,
    out: Tensor | None = None,
    noise_out: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample of a tanh-squashed Gaussian and its log-probability.

        log_std = LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * (1 + tanh(raw_log_std)) / 2
        a       = tanh(mean + exp(log_std) * noise),   log pi(a), summed over the actions

    Args:
        mean, raw_log_std: [.., A] of any distance between rows: the halves of one tensor are read in place.
        noise: [.., A], standard normals; it gets no gradient.
        rng: in its place, seed and offset [2] int64 on the same device, from which it is drawn as
            `standard_normal` draws it, in float32 (float64 if mean is). One call uses one offset: add 1 to it
            (`rng[1] += 1`) before the next. A backward may come after that.
        out: [.., A] of any float dtype and of any distance between rows, as the columns of a critic's input
            are; it receives the actions.
        noise_out: [.., A] contiguous float32 or float64, which receives the noise drawn from rng, for
            `tanh_gaussian_backward`.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        actions [.., A] in [-1, 1] of the dtype of mean, or out; and log-probabilities [..] in float32, or in
        float64 if mean is.
    Raises:
        ValueError for shapes or strides that do not fit, for both or none of noise and rng, a noise_out
        without rng, or an rng that is not [2]; TypeError for an rng that is not int64 or another dtype of out
        or noise_out; RuntimeError for out or noise_out where a gradient is wanted.
    Source: Haarnoja et al. 2018, arXiv:1812.05905, appendix C.
    """
    if (noise is None) == (rng is None):
        raise ValueError(
            f"exactly one of noise and rng must be given, got {'both' if rng is not None else 'none'}"
        )
    if not mean.dim():
        raise ValueError("mean must have shape [.., A], got []")
    for name, x in (("raw_log_std", raw_log_std), ("noise", mean if noise is None else noise)):
        _check_like(name, x, mean)
    if rng is not None:
        _check_rng(rng)
        if rng.device != mean.device:
            raise ValueError(f"rng must be on {mean.device} like mean, got {rng.device}")
    _check_written(mean, raw_log_std, rng, out, noise_out)
    written = [x for x in (out, noise_out) if x is not None]
    given = (mean, raw_log_std) if noise is None else (mean, raw_log_std, noise)
    if takes_kernels(impl, *given):
        eps = None if noise is None else noise.detach()
        if not written:
            actions, log_probs, _ = _tanh_gaussian_op(mean, raw_log_std, eps, rng)
            return actions, log_probs
        actions = mean.new_empty(mean.shape) if out is None else out
        log_probs = mean.new_empty(mean.shape[:-1], dtype=_wide(mean.dtype))
        heads = mean.detach(), raw_log_std.detach()
        _tanh_gaussian_into_op(*heads, eps, rng, actions, log_probs, noise_out)
        return actions, log_probs
    plain = chosen(impl) == "auto" and mean.dtype in WIDE
    if not plain or any(x.dtype != mean.dtype for x in given) or observed(*given, *written):
        return twin(reference.tanh_gaussian, impl)(
            mean, raw_log_std, noise, rng=rng, out=out, noise_out=noise_out
        )
    if noise is None:
        noise = reference.standard_normal(rng, mean.shape, mean.dtype)  # type: ignore[arg-type]
        if noise_out is not None:
            noise_out.copy_(noise)
    wanted = torch.is_grad_enabled() and (mean.requires_grad or raw_log_std.requires_grad)
    if not wanted and native.takes(mean, raw_log_std, noise):
        return _compiled_tanh_gaussian(mean, raw_log_std, noise, out)
    pair: tuple[Tensor, Tensor] = _TanhGaussian.apply(mean, raw_log_std, noise.detach())  # type: ignore[no-untyped-call]
    return pair if out is None else (out.copy_(pair[0]), pair[1])


def _compiled_tanh_gaussian(
    mean: Tensor, raw_log_std: Tensor, noise: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, raw, noise = strided_rows(mean), strided_rows(raw_log_std), noise.contiguous()
    actions, log_probs = _place(out, mean), mean.new_empty(mean.shape[:-1])
    rows = strided_rows(actions)
    native.compiled.tanh_gaussian(  # type: ignore[call-arg]
        *x.shape, x.data_ptr(), raw.data_ptr(), x.stride(0), raw.stride(0), noise.data_ptr(),
        rows.data_ptr(), rows.stride(0), log_probs.data_ptr(),
    )  # fmt: skip
    return _written(actions, out), log_probs


def _compiled_backward(
    dactions: Tensor | None,
    dlog_prob: tuple[int, float, float],
    mean: Tensor,
    raw_log_std: Tensor,
    noise: Tensor,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    x, raw, noise = strided_rows(mean), strided_rows(raw_log_std), noise.contiguous()
    da = None if dactions is None else strided_rows(dactions)
    outs = (None, None) if out is None else out
    first, second = (_place(place, mean) for place in outs)
    dmean, draw = strided_rows(first), strided_rows(second)
    native.compiled.tanh_gaussian_backward(  # type: ignore[call-arg]
        *x.shape, 0 if da is None else da.data_ptr(), 0 if da is None else da.stride(0), *dlog_prob,
        x.data_ptr(), raw.data_ptr(), x.stride(0), raw.stride(0), noise.data_ptr(),
        dmean.data_ptr(), draw.data_ptr(), dmean.stride(0), draw.stride(0),
    )  # fmt: skip
    return _written(first, outs[0]), _written(second, outs[1])


def _place(out: Tensor | None, like: Tensor) -> Tensor:
    """Where a compiled pass writes: `out` where it is float32, else a tensor of its own."""
    return out if out is not None and out.dtype == torch.float32 else like.new_empty(like.shape)


def _written(x: Tensor, out: Tensor | None) -> Tensor:
    """What a compiled pass wrote to `_place`, where it belongs; torch has not seen it."""
    if out is None:
        return x
    if x is not out:
        return out.copy_(x)
    torch.autograd.graph.increment_version(out)
    return out


def _check_written(
    mean: Tensor, raw_log_std: Tensor, rng: Tensor | None, out: Tensor | None, noise_out: Tensor | None
) -> None:
    if out is None and noise_out is None:
        return
    if torch.is_grad_enabled() and (mean.requires_grad or raw_log_std.requires_grad):
        name = "noise_out" if out is None else "out"
        raise RuntimeError(f"{name} has no gradient: detach mean and raw_log_std, or call without it")
    if out is not None:
        _check_out("out", out, mean)
    if noise_out is None:
        return
    if rng is None:
        raise ValueError("noise_out takes what is drawn from rng, got noise in its place")
    _check_place("noise_out", noise_out, "mean", mean.device, WIDE)
    _check_like("noise_out", noise_out, mean)
    if not noise_out.is_contiguous():
        raise ValueError(f"noise_out must be contiguous, got strides {list(noise_out.stride())}")


def tanh_gaussian_backward(
    dactions: Tensor | None,
    dlog_probs: Tensor | float | None,
    mean: Tensor,
    raw_log_std: Tensor,
    noise: Tensor,
    *,
    scale: float = 1.0,
    out: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `tanh_gaussian` for those of its results, in one launch and without autograd.

        du = da (1 - a^2) + 2 a dlogpi,   dmean = du
        draw = reach (1 - tanh(raw)^2) (du exp(log_std) noise - dlogpi)

    Args:
        dactions: [.., A] of any distance between rows: the columns of a wider gradient are read in place.
            [N, .., A] is summed over N, the networks that the actions went to. None for zeros.
        dlog_probs: [..], or a number or a 0-d tensor for all rows. None for 0.
        scale: by which dlog_probs are multiplied: 1 / B where they are of a mean over the rows.
        mean, raw_log_std: as in `tanh_gaussian`. noise: [.., A], what it used or drew (`noise_out`).
        out: two tensors [.., A] of any float dtype and of any distance between rows, as the halves of one
            gradient [.., 2 A] are; they receive the result.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        dmean and draw [.., A] of the dtypes of mean and raw_log_std, or out.
    Raises:
        ValueError for shapes or strides that do not fit, TypeError for another dtype of out.
    Source: Haarnoja et al. 2018, arXiv:1812.05905, appendix C.
    """
    if not mean.dim():
        raise ValueError("mean must have shape [.., A], got []")
    for name, x in (("raw_log_std", raw_log_std), ("noise", noise)):
        _check_like(name, x, mean)
    if dactions is not None and (dactions.dim() == mean.dim() or dactions.shape[1:] != mean.shape):
        _check_like("dactions", dactions, mean)
    one = isinstance(dlog_probs, Tensor) and not dlog_probs.dim()
    if isinstance(dlog_probs, Tensor) and not one and dlog_probs.shape != mean.shape[:-1]:
        wanted = f"[..] = {list(mean.shape[:-1])} of mean, or []"
        raise ValueError(f"dlog_probs must have shape {wanted}, got {list(dlog_probs.shape)}")
    if out is not None:
        for name, x in zip(("out[0]", "out[1]"), out, strict=True):
            _check_out(name, x, mean)
    mean, raw_log_std, noise = mean.detach(), raw_log_std.detach(), noise.detach()
    dactions = None if dactions is None else dactions.detach()
    rows, fixed = _split(0.0 if dlog_probs is None else dlog_probs)
    rows, fixed = None if rows is None else rows.detach(), float(fixed) * scale
    given = [x for x in (mean, raw_log_std, noise, dactions) if x is not None]
    numbers = [] if rows is None else [rows]
    if not takes_kernels(impl, *given, *numbers):
        compiled = chosen(impl) == "auto" and (rows is None or one) and native.takes(*given)
        watched = observed(*numbers, *([] if out is None else out))
        if compiled and not watched:
            if dactions is not None and dactions.dim() > mean.dim():
                dactions = dactions.sum(0)
            dlog = (0, fixed, 1.0) if rows is None else (*native.number(rows), scale)
            return _compiled_backward(dactions, dlog, mean, raw_log_std, noise, out)
        with torch.no_grad():
            return twin(reference.tanh_gaussian_backward, impl)(
                dactions, dlog_probs, mean, raw_log_std, noise, scale=scale, out=out
            )
    if out is None:
        pair: tuple[Tensor, Tensor] = _tanh_gaussian_backward_op(
            dactions, rows, mean, raw_log_std, noise, fixed, scale
        )
        return pair
    _tanh_gaussian_backward_into_op(dactions, rows, mean, raw_log_std, noise, fixed, scale, *out)
    return out
