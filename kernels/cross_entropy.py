"""Rows of logits: cross-entropy with a target or an encoded scalar, the encodings alone, the expected value.

    hat(d) = max(0, 1 - |d|),   index = clip((value + v_max) / spacing, 0, K - 1): the value's place in atoms
    two-hot:   t_j = hat(index - j)
    HL-Gauss:  t_j = a normal's mass in the bin of one spacing around atom j, over its mass in all bins
    loss = -sum_k t_k log softmax(logits)_k         d loss / d logits = softmax(logits) - t
    expected = sum_k p_k z_k                        d expected / d logits_k = p_k (z_k - expected)

Dims:    K atoms; R rows, whatever their leading axes.
Memory:  reads the logits once each way and writes their gradient. An encoding stays in registers in
         two_hot_cross_entropy and hl_gauss_cross_entropy. Rows may be padded (_categorical.py).
Launches: one each way; one in all for expected_value_and_gradient, which computes each softmax once.
Numbers: arithmetic in float32, in float64 for float64 logits; results are float32 for logits narrower than
         that, gradients have the dtype of the logits. A NaN makes its row NaN, and no other.
Source:  Bellemare et al. 2017, arXiv:1707.06887; Farebrother et al. 2024, arXiv:2403.03950 (HL-Gauss).
Twins:   reference.<name of the op>
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._categorical import (
    _check_logits,
    _check_number,
    _check_positive,
    _check_shape,
    _cross_entropy,
    _hat,
    _index,
    _keep,
    _logits,
    _member_place,
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
    _words,
)
from .runtime import native
from .runtime.dispatch import chosen, launch, observed, takes_kernels
from .runtime.language import jit, tl
from .runtime.library import Op, first_derivative
from .runtime.numerics import scalar, wide
from .runtime.twins import twin

__all__ = [
    "categorical_cross_entropy",
    "expected_value",
    "expected_value_and_gradient",
    "hl_gauss",
    "hl_gauss_cross_entropy",
    "two_hot",
    "two_hot_cross_entropy",
]


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
    scale_ptr,
    scale,
    values_ptr,
    out_ptr,
    member_stride,
    row_stride,
    grad_stride,
    B,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    READ: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Values for a values_ptr; for an out_ptr gradients, times those of the rows or else times the scale."""
    member, rows, out, live = _member_place(B, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    x = _logits(_start(x_ptr, member, member_stride, rows, row_stride, UNIT), k, K, READ)
    dtype = wide(x).dtype
    z = tl.load(atoms_ptr + k, mask=k < K, other=0.0).to(dtype)[None, :]
    if grad_ptr is not None:
        g = tl.load(grad_ptr + (member * B + rows) * grad_stride).to(dtype)
    else:
        g = scalar(scale_ptr, scale, dtype)
    _, w, _, total = _softmax(x, k, K, READ)
    share = 1.0 / total
    q = tl.sum(w * z, 1) * share
    out += member * B
    if values_ptr is not None:
        tl.store(values_ptr + out, q, mask=live)
    if out_ptr is not None:
        d = w * (z - q[:, None]) * (share * g)[:, None]
        if COLUMNS > K:
            d = tl.where((k < K)[None, :], d, 0.0)
        mask = live[:, None] & (k < COLUMNS)[None, :]
        tl.store(out_ptr + out[:, None] * COLUMNS + k[None, :], d.to(out_ptr.dtype.element_ty), mask=mask)


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


def _expected_values(
    name: str,
    logits: Tensor,
    atoms: Tensor,
    grad: Tensor | None,
    scale: Tensor | None,
    fixed_scale: float,
    values: Tensor | None,
    out: Tensor | None,
) -> None:
    x = _members(logits)
    M, B, K = x.shape
    if not M * B:
        return
    columns = K if out is None else out.shape[-1]
    unit, read = _words(x)
    grid, config = _tile(name, x, M, B, 1, columns)
    g, step = (None, 0) if grad is None else _spread(grad)
    number = (None, fixed_scale) if out is None or grad is not None else _number(scale, fixed_scale, x)
    strides = (stride // unit for stride in _strides(x))
    launch(
        _expected_value_kernel, grid, x, atoms.contiguous(), g, *number, values, out, *strides, step, B,
        K=K, COLUMNS=columns, READ=read, UNIT=unit, **config,
    )  # fmt: skip


def _expected_value_forward(logits: Tensor, atoms: Tensor) -> Tensor:
    values = _expected_value_fake(logits, atoms)
    _expected_values("expected_value", logits, atoms, None, None, 1.0, values, None)
    return values


def _expected_value_fake(logits: Tensor, atoms: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=_result(logits))


def _expected_value_backward(grad: Tensor, logits: Tensor, atoms: Tensor) -> Tensor:
    out = logits.new_empty(logits.shape)
    _expected_values("expected_value_backward", logits, atoms, grad, None, 1.0, None, out)
    return out


def _expected_value_backward_fake(grad: Tensor, logits: Tensor, atoms: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _expected_value_pair(
    logits: Tensor, atoms: Tensor, scale: Tensor | None, fixed_scale: float, columns: int
) -> tuple[Tensor, Tensor]:
    values, grads = _expected_value_pair_fake(logits, atoms, scale, fixed_scale, columns)
    _expected_values("expected_value_backward", logits, atoms, None, scale, fixed_scale, values, grads)
    return values, grads


def _expected_value_pair_fake(
    logits: Tensor, atoms: Tensor, scale: Tensor | None, fixed_scale: float, columns: int
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:-1]
    return logits.new_empty(rows, dtype=_result(logits)), logits.new_empty(*rows, columns)


def _cross_entropy_gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, source = ctx.saved_tensors
    back = None if grad is None else _cross_entropy_backward_op(grad, logits, source, *ctx.inputs)
    return back, None, None, None


def _expected_value_gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    return None if grad is None else _expected_value_backward_op(grad, *ctx.saved_tensors), None


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

_expected_value_pair_op = Op("expected_value_and_gradient", _expected_value_pair, _expected_value_pair_fake)


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
        d = log_probs.exp().sub_(target)
        return d * grad.unsqueeze(-1), None  # not in place: there may be a batch of gradients


def categorical_cross_entropy(logits: Tensor, target: Tensor, *, impl: str | None = None) -> Tensor:
    """Cross-entropy of `target` against the log-softmax of `logits`, per row.

        out = -sum_k target_k * log softmax(logits)_k          d out / d logits = softmax(logits) - target

    Args:
        logits: [.., B, K], K >= 2. Rows may be padded, `padded[..., :K]`.
        target: [B, K], shared by all leading axes, or of the shape of the logits; mass 1 per row. It gets no
            gradient.
        impl: auto, triton, reference or compile (`kernels.use`).
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
    if chosen(impl) != "auto" or observed(logits, target):
        return twin(reference.categorical_cross_entropy, impl)(logits, target)
    logits = logits.to(_result(logits))
    return _CrossEntropy.apply(logits, target.to(logits.dtype))  # type: ignore[no-any-return, no-untyped-call]


def two_hot(values: Tensor, num_atoms: int, v_max: float, *, impl: str | None = None) -> Tensor:
    """Scalars as mass on the two atoms around them; their mean is the value. No gradient.

    Args:
        values: [..], in units of return; those beyond the support count as its ends.
        num_atoms: K >= 2, evenly spaced from -v_max to v_max.
        impl: auto, triton, reference or compile (`kernels.use`).
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
        impl: auto, triton, reference or compile (`kernels.use`).
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
        return twin(reference.hl_gauss, impl)(values, num_atoms, v_max, sigma)
    return twin(reference.two_hot, impl)(values, num_atoms, v_max)


def two_hot_cross_entropy(logits: Tensor, values: Tensor, v_max: float, *, impl: str | None = None) -> Tensor:
    """Cross-entropy of `two_hot(values)` against the log-softmax of `logits`; the encoding is not stored.

    Args:
        logits: [.., K], K >= 2. Rows may be padded, `padded[..., :K]`.
        values: [..], or [B], the last axis before K, shared by all others; they get no gradient.
        v_max: > 0, the last atom, in units of return.
        impl: auto, triton, reference or compile (`kernels.use`).
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
        return twin(reference.hl_gauss_cross_entropy, impl)(logits, values, v_max, sigma)
    return twin(reference.two_hot_cross_entropy, impl)(logits, values, v_max)


def expected_value(logits: Tensor, atoms: Tensor, *, impl: str | None = None) -> Tensor:
    """Mean of the categorical distribution, sum_k softmax(logits)_k * z_k.

    Args:
        logits: [.., K], K >= 2. Rows may be padded, `padded[..., :K]`.
        atoms: [K], anywhere. Through the kernels they get no gradient.
        impl: auto, triton, reference or compile (`kernels.use`).
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
    return twin(reference.expected_value, impl)(logits, atoms)


def expected_value_and_gradient(
    logits: Tensor,
    atoms: Tensor,
    *,
    scale: Tensor | float = 1.0,
    columns: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`expected_value` and its gradient, in one launch and without autograd.

        gradient_k = scale * softmax(logits)_k * (z_k - value)

    Args:
        logits: [.., K], K >= 2. Rows may be padded, `padded[..., :K]`. atoms: [K], anywhere.
        scale: of the gradient, a number or a tensor of one on the device of the logits: -1 / B where the mean
            over the batch is to grow.
        columns: of the gradient's rows, >= K; beyond K they are 0. K by default.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        values [..], float64 for float64 logits, else float32; and d (scale * values) / d logits
        [.., columns] in the dtype of the logits.
    Raises:
        ValueError for shapes or numbers that do not fit.
    Source: Bellemare et al. 2017, arXiv:1707.06887, section 2.
    """
    _check_logits("logits", logits, "[.., K]", 1)
    _check_shape("atoms", atoms, "[K]", logits.shape[-1:])
    _check_number("scale", scale)
    if isinstance(scale, Tensor):
        scale = scale.reshape(())
    K = logits.shape[-1]
    columns = K if columns is None else columns
    if columns < K:
        raise ValueError(f"columns must be at least K = {K}, got {columns}")
    logits, atoms = logits.detach(), atoms.detach()
    numbers = [scale] if isinstance(scale, Tensor) else []
    if takes_kernels(impl, logits, atoms, *numbers):
        pair: tuple[Tensor, Tensor] = _expected_value_pair_op(logits, atoms, *_split(scale), columns)
        return pair
    if chosen(impl) == "auto" and native.takes(logits, atoms) and not observed(*numbers):
        return _compiled_expected_values(logits, atoms, float(scale), columns)
    with torch.no_grad():
        return twin(reference.expected_value_and_gradient, impl)(logits, atoms, scale=scale, columns=columns)


def _compiled_expected_values(
    logits: Tensor, atoms: Tensor, scale: float, columns: int
) -> tuple[Tensor, Tensor]:
    x, atoms = _members(logits), atoms.contiguous()
    values, grads = _expected_value_pair_fake(logits, atoms, None, scale, columns)
    native.compiled.expected_value(  # type: ignore[call-arg]
        *x.shape, x.data_ptr(), *_strides(x), atoms.data_ptr(), scale, columns,
        values.data_ptr(), grads.data_ptr(),
    )  # fmt: skip
    return values, grads
