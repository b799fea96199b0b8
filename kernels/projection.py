"""Projection of a distribution on arbitrary positions onto evenly spaced atoms.

    hat(d) = max(0, 1 - |d|),   index = clip((position + v_max) / spacing, 0, K - 1)
    out_j = sum_k p_k hat(index_k - j)
    d out_j / d p_k = hat(index_k - j),   d out_j / d position_k = p_k hat'(index_k - j) / spacing inside

Dims:    R rows, whatever their leading axes, of K atoms.
Memory:  reads and writes R*K once each way; every atom looks at every source of its row, in registers.
Numbers: arithmetic in float32, in float64 for float64; a row's mass is kept to rounding.
Source:  Bellemare et al. 2017, arXiv:1707.06887, section 4.
Twin:    reference.categorical_projection

On a CPU it is compiled for float32 (csrc/categorical.hpp).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._categorical import (
    _check_logits,
    _check_positive,
    _check_shape,
    _hat,
    _index,
    _keep,
    _place,
    _result,
    _tile,
)
from .runtime import native
from .runtime.dispatch import chosen, launch, observed, takes_kernels
from .runtime.language import jit, tl
from .runtime.library import Op
from .runtime.numerics import wide
from .runtime.rows import rows_of
from .runtime.twins import twin

__all__ = [
    "categorical_projection",
]


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


def _project_gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    to_probs, to_positions = ctx.needs_input_grad[:2]
    if grad is None:
        return None, None, None
    pair = _project_backward_op(grad, *ctx.saved_tensors, *ctx.inputs, to_probs, to_positions)
    return pair[0] if to_probs else None, pair[1] if to_positions else None, None


_project_op = Op("categorical_projection", _project, _project_fake, _keep, _project_gradients)

_project_backward_op = Op("categorical_projection_backward", _project_backward, _project_backward_fake)


def categorical_projection(
    probs: Tensor, positions: Tensor, v_max: float, *, impl: str | None = None
) -> Tensor:
    """Project a distribution on arbitrary positions onto K evenly spaced atoms in [-v_max, v_max].

    Mass is split linearly between the two neighbouring atoms; an exact hit keeps all of its mass, and
    positions beyond the support are clipped to its ends, so that the mass of every row is kept. This one
    takes K^2 steps per row, as nothing is known of the positions; `categorical_target` takes fewer.

    Args:
        probs: [.., K] mass, K >= 2. positions: [.., K] where that mass sits, in units of return.
        impl: auto, triton, reference or compile (`kernels.use`).
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
    return twin(_projection(impl), impl)(probs, positions, v_max)


def _projection(impl: str | None) -> reference.Projection:
    """The twin of `categorical_projection`, or the compiled pass where that applies."""
    return reference.categorical_projection if chosen(impl) == "reference" else _compiled_projection


def _compiled_projection(probs: Tensor, positions: Tensor, v_max: float) -> Tensor:
    tensors = (probs, positions)
    if any(x.requires_grad for x in tensors) or observed(*tensors) or not native.takes(*tensors):
        return reference.categorical_projection(probs, positions, v_max)
    probs, positions = probs.contiguous(), positions.contiguous()
    out = torch.empty_like(probs)
    *rows, atoms = probs.shape
    native.compiled.categorical_projection(
        math.prod(rows), atoms, probs.data_ptr(), positions.data_ptr(), v_max, out.data_ptr()
    )
    return out
