"""The passes between the products of a BroNet in PyTorch: any dtype, any device, seen by whatever watches.

Formulas: norm.py. Numbers: computed in float32, in float64 for float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import EPS
from .runtime.twins import twin

__all__ = ["BATCHED", "backward_arguments", "forward_arguments", "norm_backward", "norm_forward"]

BATCHED = False


def forward_arguments(*tensors: Any) -> tuple[Any, ...]:
    """Of `norm_forward`: the same."""
    return tensors


backward_arguments = forward_arguments


def norm_forward(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    y: Tensor,
    stats: Tensor,
) -> None:
    """Fill `y` [N, B, H] and the rows' mean and 1/std, `stats` [2, N, B]; vectors are [N, H]."""
    out, mean, rstd = twin(_forward)(x, bias, weight, shift, residual, relu, stats.dtype)
    y.copy_(out)
    stats[0].copy_(mean)
    stats[1].copy_(rstd)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    relu: bool,
    stats: Tensor,
    dx: Tensor,
    partial: None,
    into: Tensor | None,
) -> None:
    """Fill the gradient of x, `dx`, and of bias, weight and shift, `into` [3, N, H]."""
    mean, rstd = stats.unbind()
    dh, sums = twin(_backward)(dy, x, bias, weight, shift, relu, mean, rstd, into is not None)
    dx.copy_(dh)
    for place, total in zip(() if into is None else into, sums, strict=True):
        place.copy_(total)


def _forward(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    bias, weight, shift = (vector.to(dtype).unsqueeze(1) for vector in (bias, weight, shift))
    h = x.to(dtype) + bias
    normed, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], None, None, EPS)
    out = torch.addcmul(shift, normed, weight)
    if relu:
        out = out.relu()
    out = out if residual is None else out + residual
    return out.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def _backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    relu: bool,
    mean: Tensor,
    rstd: Tensor,
    wants_sums: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    bias, weight, shift = (vector.to(mean.dtype).unsqueeze(1) for vector in (bias, weight, shift))
    mean, rstd = mean.unsqueeze(-1), rstd.unsqueeze(-1)
    n = (x.to(mean.dtype) + bias - mean) * rstd
    g = dy.to(mean.dtype)
    if relu:
        g = g.masked_fill(torch.addcmul(shift, n, weight) <= 0.0, 0.0)
    scaled = g * weight
    dh = rstd * (scaled - scaled.mean(-1, keepdim=True) - n * (scaled * n).mean(-1, keepdim=True))
    return dh.to(x.dtype), (dh.sum(1), (g * n).sum(1), g.sum(1)) if wants_sums else ()
