"""Tanh-Gaussian sample and log-probability in few operations, with a backward written by hand.

With s = log_std, t = tanh(raw) and s = centre + reach * t:

    d log pi / du = 2 a,   du = da (1 - a^2) + 2 a dlogpi,
    ds = du std noise - dlogpi,   draw = reach (1 - t^2) ds

Numbers: any dtype and device; finite for every u.
Source:  Haarnoja et al. 2018, arXiv:1812.05905, appendix C.
Twin:    reference.tanh_gaussian
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .reference import LOG_STD_MAX, LOG_STD_MIN

REACH = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
CENTRE = 0.5 * (LOG_STD_MAX + LOG_STD_MIN)


class _TanhGaussian(torch.autograd.Function):
    """Keeps t, std * noise and the actions for the backward pass."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, raw_log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        t = raw_log_std.tanh()
        log_std = t * REACH + CENTRE
        spread = log_std.exp().mul_(noise)
        u = mean + spread
        actions = u.tanh()
        per_dim = F.softplus(-2.0 * u).add_(u).mul_(2.0).sub_(log_std).addcmul_(noise, noise, value=-0.5)
        ctx.save_for_backward(t, spread, actions)
        constant = 0.5 * math.log(2.0 * math.pi) + 2.0 * math.log(2.0)
        return actions, per_dim.sum(-1).sub_(mean.shape[-1] * constant)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dactions: Tensor, dlog_probs: Tensor) -> tuple[Tensor, Tensor, None]:
        t, spread, actions = ctx.saved_tensors
        dlog_probs = dlog_probs.unsqueeze(-1)
        du = torch.addcmul(dactions, dactions * actions, actions, value=-1.0)
        du.addcmul_(actions, dlog_probs, value=2.0)
        dlog_std = (du * spread).sub_(dlog_probs)
        return du, torch.addcmul(dlog_std, dlog_std * t, t, value=-1.0).mul_(REACH), None


def tanh_gaussian(mean: Tensor, raw_log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.tanh_gaussian`, in fewer operations; any dtype and device."""
    return _TanhGaussian.apply(mean, raw_log_std, noise.detach())  # type: ignore[no-any-return, no-untyped-call]
