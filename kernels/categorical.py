"""Categorical target, projection and cross-entropy.

    loss = -sum_k target_k * log softmax(logits)_k          d loss / d logits = softmax(logits) - target

Numbers: the projection is compiled for float32 on a CPU (csrc/categorical.hpp); the rest takes any dtype.
Source:  Bellemare et al. 2017, arXiv:1707.06887; Nauman et al. 2025, arXiv:2505.23150.
Twins:   reference.categorical_cross_entropy, reference.categorical_projection, reference.categorical_target
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, reference


class _CrossEntropy(torch.autograd.Function):
    """Keeps the log-softmax for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        ctx.save_for_backward(log_probs, target)
        return (log_probs * target).sum(-1).neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_probs, target = ctx.saved_tensors
        return log_probs.exp().sub_(target).mul_(grad.unsqueeze(-1)), None


def categorical_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """As `reference.categorical_cross_entropy`, in fewer operations; any dtype and device."""
    return _CrossEntropy.apply(logits, target.detach())  # type: ignore[no-any-return, no-untyped-call]


def categorical_projection(probs: Tensor, positions: Tensor, v_max: float) -> Tensor:
    """As `reference.categorical_projection`; [rows, K]."""
    if not _native.takes(probs, positions) or probs.requires_grad or probs.shape != positions.shape:
        return reference.categorical_projection(probs, positions, v_max)
    probs, positions = probs.contiguous(), positions.contiguous()
    out = torch.empty_like(probs)
    *rows, atoms = probs.shape
    _native.compiled.categorical_projection(
        math.prod(rows), atoms, probs.data_ptr(), positions.data_ptr(), v_max, out.data_ptr()
    )
    return out


def categorical_target(
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | float,
    atoms: Tensor,
    v_max: float,
) -> Tensor:
    """As `reference.categorical_target`."""
    return reference.categorical_target(
        next_logits, rewards, discounts, next_log_probs, temperature, atoms, v_max, categorical_projection
    )
