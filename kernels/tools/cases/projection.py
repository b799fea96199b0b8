"""Workloads of the projection of a return distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...projection import categorical_projection
from .case import Case
from .cross_entropy import V_MAX


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
    """BRC's number of atoms."""
    yield _projection_case(101)
