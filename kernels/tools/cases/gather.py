"""Workloads of a replay store on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...gather import gather_rows, n_step_rewards
from .case import Case


def cases() -> Iterator[Case]:
    """Observations as they are, cast, as frames of bytes and with gaps; rewards with and without a scale."""
    for width, wide, dtype, to, beside in (
        (67, 68, torch.float32, torch.float32, True),
        (64, 64, torch.float32, torch.float32, True),
        (64, 64, torch.float32, torch.bfloat16, True),
        (64, 64, torch.float32, torch.float32, False),
        (7056, 7056, torch.uint8, torch.uint8, True),
    ):

        def prepare(
            device: torch.device,
            batch: int,
            impl: str,
            sizes: tuple[int, int] = (width, wide),
            dtypes: tuple[torch.dtype, torch.dtype] = (dtype, to),
            beside: bool = beside,
        ) -> Callable[[], object]:
            numbers = torch.randint(100, (4 * batch, sizes[1]), device=device)
            rows = numbers.to(dtypes[0])[:, : sizes[0]]
            index = torch.randint(4 * batch, (batch,), device=device)
            side = rows[:64] if beside else None
            return lambda: gather_rows(rows, index, side=side, dtype=dtypes[1], impl=impl)

        def moved(batch: int, row: int = width * (dtype.itemsize + to.itemsize)) -> int:
            return batch * (row + 8)

        label = f"W={width} of {wide} {dtype} to {to}, {'with' if beside else 'without'} side"
        yield Case("gather_rows", label.replace("torch.", ""), prepare, moved)
    for steps, scaled in ((1, False), (1, True), (3, True)):

        def prepare_rewards(
            device: torch.device, batch: int, impl: str, steps: int = steps, scaled: bool = scaled
        ) -> Callable[[], object]:
            rewards = torch.randn(4 * batch, device=device)
            index = torch.randint(4 * batch, (batch, steps), device=device)
            weights = 0.99 ** torch.arange(steps, device=device)
            scale = torch.ones(10, device=device) if scaled else None
            task_ids = torch.randint(10, (batch,), device=device)
            return lambda: n_step_rewards(rewards, index, weights, scale=scale, task_ids=task_ids, impl=impl)

        def moved_rewards(batch: int, row: int = 12 * steps + (12 if scaled else 4)) -> int:
            return batch * row

        label = f"n={steps} {'with' if scaled else 'without'} scale"
        yield Case("n_step_rewards", label, prepare_rewards, moved_rewards)
