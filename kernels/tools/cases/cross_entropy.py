"""Workloads of the losses and values of rows of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...cross_entropy import (
    categorical_cross_entropy,
    expected_value,
    expected_value_and_gradient,
    hl_gauss,
    hl_gauss_cross_entropy,
    two_hot,
    two_hot_cross_entropy,
)
from .case import Case

V_MAX = 10.0


def random_logits(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, padded: bool) -> Tensor:
    """Rows of the next multiple of 8 elements where padded."""
    wide = (*shape[:-1], -(-shape[-1] // 8) * 8 if padded else shape[-1])
    return torch.randn(wide, device=device).to(dtype)[..., : shape[-1]]


def _row_case(op: str, E: int, K: int, dtype: torch.dtype, padded: bool = False) -> Case:
    """Ops on rows of logits, forward and backward."""
    rest = torch.float64 if dtype == torch.float64 else torch.float32

    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        logits = random_logits(device, (E, batch, K), dtype, padded).requires_grad_()
        values = 3.0 * torch.randn(batch, device=device, dtype=rest)
        target = torch.randn(batch, K, device=device, dtype=rest).softmax(-1)
        atoms = torch.linspace(-V_MAX, V_MAX, K, device=device, dtype=rest)
        seed = torch.full((E, batch), 1.0 / batch, device=device, dtype=rest)
        forward: dict[str, Callable[[], Tensor]] = {
            "categorical_cross_entropy": lambda: categorical_cross_entropy(logits, target, impl=impl),
            "two_hot_cross_entropy": lambda: two_hot_cross_entropy(logits, values, V_MAX, impl=impl),
            "hl_gauss_cross_entropy": lambda: hl_gauss_cross_entropy(logits, values, V_MAX, 0.15, impl=impl),
            "expected_value": lambda: expected_value(logits, atoms, impl=impl),
        }

        def call() -> object:
            out = forward[op]()
            return out, *torch.autograd.grad(out, logits, seed)

        return call

    def moved(batch: int) -> int:
        target = 2 * K * rest.itemsize if op == "categorical_cross_entropy" else 0
        return batch * (3 * E * K * dtype.itemsize + target + 2 * E * rest.itemsize)

    kernel = "expected_value" if op == "expected_value" else "categorical_cross_entropy"
    label = f"E={E} K={K} {str(dtype).removeprefix('torch.')}{' padded' if padded else ''}"
    return Case(op, label, prepare, moved, (kernel, f"{kernel}_backward"))


def _pair_case(E: int, K: int, dtype: torch.dtype, padded: bool = False) -> Case:
    """Values and gradients without autograd."""
    rest = torch.float64 if dtype == torch.float64 else torch.float32
    columns = -(-K // 8) * 8 if padded else K

    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        logits = random_logits(device, (E, batch, K), dtype, padded)
        atoms = torch.linspace(-V_MAX, V_MAX, K, device=device, dtype=rest)
        scale = -1.0 / batch
        return lambda: expected_value_and_gradient(logits, atoms, scale=scale, columns=columns, impl=impl)

    def moved(batch: int) -> int:
        return batch * E * ((K + columns) * dtype.itemsize + rest.itemsize)

    label = f"E={E} K={K} {str(dtype).removeprefix('torch.')}{' padded' if padded else ''}"
    return Case("expected_value_and_gradient", label, prepare, moved, ("expected_value_backward",))


def _value_case(op: str, K: int) -> Case:
    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        values = 3.0 * torch.randn(batch, device=device)
        if op == "two_hot":
            return lambda: two_hot(values, K, V_MAX, impl=impl)
        return lambda: hl_gauss(values, K, V_MAX, 0.15, impl=impl)

    return Case(op, f"K={K} float32", prepare, lambda batch: batch * (K + 1) * 4, ("value_encoding",))


def cases() -> Iterator[Case]:
    """BRC's critic first: two members of 101 atoms."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    for dtype in (bf16, f32):
        yield _row_case("categorical_cross_entropy", 2, 101, dtype)
        yield _row_case("expected_value", 2, 101, dtype)
        yield _row_case("two_hot_cross_entropy", 2, 101, dtype)
        yield _row_case("hl_gauss_cross_entropy", 2, 101, dtype)
    yield _row_case("expected_value", 2, 101, bf16, padded=True)
    for dtype, padded in ((bf16, True), (bf16, False), (f32, False), (f64, False)):
        yield _pair_case(2, 101, dtype, padded)
    yield _row_case("hl_gauss_cross_entropy", 2, 101, bf16, padded=True)
    yield _row_case("hl_gauss_cross_entropy", 2, 101, f64)
    yield _value_case("two_hot", 101)
    yield _value_case("hl_gauss", 101)
