"""The passes between the products of a BroNet in PyTorch: any dtype, any device, seen by whatever watches.

Formulas: norm.py. Numbers: computed in float32, in float64 for float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import EPS

__all__ = ["BATCHED", "norm_backward", "norm_forward", "partials"]

BATCHED = False


def partials(layers: int, networks: int, rows: int, width: int, like: Tensor) -> None:
    """Sums over the rows are made at once."""


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
    bias, weight, shift = (vector.to(stats.dtype).unsqueeze(1) for vector in (bias, weight, shift))
    h = x.to(stats.dtype) + bias
    normed, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], None, None, EPS)
    out = torch.addcmul(shift, normed, weight)
    if relu:
        out = out.relu()
    y.copy_(out if residual is None else out + residual)
    stats[0].copy_(mean.squeeze(-1))
    stats[1].copy_(rstd.squeeze(-1))


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
    bias, weight, shift = (vector.to(stats.dtype).unsqueeze(1) for vector in (bias, weight, shift))
    mean, rstd = stats.unsqueeze(-1)
    n = (x.to(stats.dtype) + bias - mean) * rstd
    g = dy.to(stats.dtype)
    if relu:
        g = g.masked_fill(torch.addcmul(shift, n, weight) <= 0.0, 0.0)
    scaled = g * weight
    dh = rstd * (scaled - scaled.mean(-1, keepdim=True) - n * (scaled * n).mean(-1, keepdim=True))
    if into is not None:
        into[0].copy_(dh.sum(1))
        into[1].copy_((g * n).sum(1))
        into[2].copy_(g.sum(1))
    dx.copy_(dh)
