"""Workloads of the categorical Bellman loss and of its target."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...categorical import (
    categorical_bellman_loss,
    categorical_bellman_loss_and_gradient,
    categorical_target,
)
from .case import Case
from .cross_entropy import V_MAX, random_logits


def _bellman_case(E: int, K: int, dtype: torch.dtype, padded: bool, way: str) -> Case:
    """way: target, loss (and its gradient by autograd) or gradient (without)."""

    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        rest = torch.float64 if dtype == torch.float64 else torch.float32
        logits, next_logits = (random_logits(device, (E, batch, K), dtype, padded) for _ in range(2))
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
    yield _bellman_case(2, 101, f32, False, "gradient")
    for dtype in (bf16, f32):
        yield _bellman_case(2, 101, dtype, False, "target")
