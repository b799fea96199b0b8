"""Workloads of whole networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...network import bronet
from .case import Case


def cases() -> Iterator[Case]:
    """The critic and the actor of BRC, from the smallest width to one where products are all that counts."""
    for networks, inputs, width, depth, outputs, dtype in (
        (2, 123, 256, 2, 101, torch.bfloat16),
        (2, 128, 512, 2, 104, torch.bfloat16),
        (4, 128, 512, 2, 104, torch.bfloat16),
        (2, 128, 1024, 2, 104, torch.bfloat16),
        (2, 123, 512, 2, 101, torch.float32),
        (1, 99, 256, 1, 48, torch.bfloat16),
    ):
        sizes = [inputs] + [width] * (2 * depth)
        weights = sum(i * width for i in sizes) + width * outputs
        per_row = inputs + 6 * width * len(sizes) + 2 * outputs  # each activation and its gradient, each way

        def prepare(
            device: torch.device,
            batch: int,
            impl: str,
            sizes: list[int] = sizes,
            shape: tuple[int, int, int] = (networks, width, outputs),
            dtype: torch.dtype = dtype,
        ) -> Callable[[], object]:
            networks, width, outputs = shape
            parameters = []
            for size in sizes:
                kernel = torch.randn(networks, size, width, device=device) / size**0.5
                vectors = [torch.rand(networks, width, device=device) for _ in range(3)]
                parameters += [kernel.to(dtype), *vectors]
            head = torch.randn(networks, width, outputs, device=device) / width**0.5
            parameters += [head.to(dtype), torch.zeros(networks, outputs, device=device)]
            leaves = [p.requires_grad_() for p in parameters]
            x = torch.randn(batch, sizes[0], device=device).to(dtype)
            seed = torch.randn(networks, batch, outputs, device=device).to(dtype)

            def call() -> object:
                out = bronet(x, *leaves, impl=impl)
                return out, *torch.autograd.grad(out, leaves, seed)

            return call

        def moved(
            batch: int,
            networks: int = networks,
            weights: int = weights,
            per_row: int = per_row,
            size: int = dtype.itemsize,
        ) -> int:
            return networks * size * (3 * weights + per_row * batch)

        label = (
            f"N={networks} I={inputs} H={width} depth={depth} K={outputs} {str(dtype).removeprefix('torch.')}"
        )
        yield Case("bronet", label, prepare, moved, ("norm_forward", "norm_backward"))
