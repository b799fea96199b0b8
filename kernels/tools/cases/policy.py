"""Workloads of the squashed Gaussian policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ...policy import _wide, standard_normal, tanh_gaussian, tanh_gaussian_backward
from .case import Case


def _flat_cases(size: int, dtype: torch.dtype) -> Iterator[Case]:
    """Each way alone, into columns of a critic's input and into the halves of a head's gradient, there from
    the gradients of two critics."""
    rest = _wide(dtype)

    def forward(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        mean, raw = torch.randn(batch, 2 * size, device=device).to(dtype).chunk(2, -1)
        rng, noise = torch.tensor([1, 2], device=device), torch.empty(batch, size, device=device, dtype=rest)
        actions = torch.zeros(batch, 3 * size, device=device, dtype=dtype)[:, size : 2 * size]

        def call() -> object:
            return *tanh_gaussian(mean, raw, rng=rng, out=actions, noise_out=noise, impl=impl), noise

        return call

    def backward(device: torch.device, batch: int, impl: str, flat: bool) -> Callable[[], object]:
        mean, raw = torch.randn(batch, 2 * size, device=device).to(dtype).chunk(2, -1)
        noise = torch.randn(batch, size, device=device, dtype=rest)
        wide = torch.randn(*[2] * flat, batch, 3 * size, device=device).to(dtype)
        dactions = wide[..., size : 2 * size]
        head = torch.zeros(batch, 2 * size, device=device, dtype=dtype)
        halves = (head[:, :size], head[:, size:]) if flat else None
        share = torch.full((), 0.3, device=device, dtype=rest) if flat else 0.3

        def call() -> object:
            given = dactions, share, mean, raw, noise
            return tanh_gaussian_backward(*given, scale=1.0 / batch, out=halves, impl=impl)

        return call

    def moved(batch: int, rows: int) -> int:
        return batch * size * (rows * dtype.itemsize + rest.itemsize)

    label = f"A={size} {str(dtype).removeprefix('torch.')}"
    for flat in (False, True):
        prepare = partial(backward, flat=flat)
        told = f"{label}{' into halves' if flat else ''}"
        yield Case(
            "tanh_gaussian_backward",
            told,
            prepare,
            partial(moved, rows=5 + flat),
            ("tanh_gaussian_backward",),
        )
    yield Case("tanh_gaussian", f"{label} into columns", forward, partial(moved, rows=3), ("tanh_gaussian",))


def cases() -> Iterator[Case]:
    """Policy heads from a walker to a pair of hands and wider, with noise given and drawn."""
    for size, drawn, dtype in (
        (24, False, torch.float32),
        (24, True, torch.float32),
        (24, True, torch.bfloat16),
        (61, True, torch.bfloat16),
        (300, True, torch.float32),
        (6, True, torch.float64),
    ):

        def prepare(
            device: torch.device,
            batch: int,
            impl: str,
            size: int = size,
            drawn: bool = drawn,
            dtype: torch.dtype = dtype,
        ) -> Callable[[], object]:
            head = torch.randn(batch, 2 * size, device=device).to(dtype)
            mean, raw = (half.requires_grad_() for half in head.chunk(2, -1))
            noise = None if drawn else torch.randn(batch, size, device=device).to(dtype)
            rng = torch.tensor([1, 2], device=device) if drawn else None
            seeds = torch.randn(batch, size, device=device).to(dtype), torch.randn(batch, device=device)

            def call() -> object:
                actions, log_probs = tanh_gaussian(mean, raw, noise, rng=rng, impl=impl)
                grads = torch.autograd.grad((actions, log_probs), (mean, raw), seeds)
                return actions, log_probs, *grads

            return call

        def moved(batch: int, size: int = size, itemsize: int = dtype.itemsize) -> int:
            # mean, raw, action, its gradient and two gradients, mean and raw again; noise once each way
            return batch * (size * (8 * itemsize + 2 * max(itemsize, 4)) + 8)

        label = f"A={size} {'drawn' if drawn else 'given'} {str(dtype).removeprefix('torch.')}"
        yield Case("tanh_gaussian", label, prepare, moved, ("tanh_gaussian", "tanh_gaussian_backward"))

    for size, dtype in ((24, torch.float32), (24, torch.bfloat16), (300, torch.float32), (6, torch.float64)):
        yield from _flat_cases(size, dtype)

    for dtype in (torch.float32, torch.bfloat16, torch.float64):

        def draw(
            device: torch.device, batch: int, impl: str, dtype: torch.dtype = dtype
        ) -> Callable[[], object]:
            rng = torch.tensor([1, 2], device=device)
            return lambda: standard_normal(rng, (batch, 24), dtype, impl=impl)

        def written(batch: int, itemsize: int = dtype.itemsize) -> int:
            return batch * 24 * itemsize

        label = f"A=24 {str(dtype).removeprefix('torch.')}"
        yield Case("standard_normal", label, draw, written, ("standard_normal",))
