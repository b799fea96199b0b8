"""Workloads of the optimizer's step and of a target's move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...optimizer import adamw_, ema_
from .case import Case


def cases() -> Iterator[Case]:
    """Steps with and without extras, on 1024 parameters per row of the batch or on few; moving a target."""
    float32, float64, bfloat16 = torch.float32, torch.float64, torch.bfloat16
    for per_row, more, dtype, grad_dtype, extras, clip in (
        (1024, 0, float32, float32, False, False),
        (1024, 0, float32, bfloat16, True, False),
        (1024, 0, float32, bfloat16, True, True),
        (1024, 1, float32, float32, False, True),
        (1024, 0, float64, float64, True, True),
        (0, 1, float32, float32, False, False),
        (0, 1, float32, float32, True, False),
    ):

        def prepare(
            device: torch.device,
            batch: int,
            impl: str,
            sizes: tuple[int, int] = (per_row, more),
            dtypes: tuple[torch.dtype, torch.dtype] = (dtype, grad_dtype),
            extras: bool = extras,
            clip: bool = clip,
        ) -> Callable[[], object]:
            number = sizes[0] * batch + sizes[1]
            param, target, grad = (torch.randn(number, device=device, dtype=dtypes[0]) for _ in range(3))
            state = [param, grad.to(dtypes[1]), torch.zeros_like(param), torch.zeros_like(param)]
            state.append(torch.zeros((), device=device))
            rule: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
            # Steps as large as the parameters: a wrong one is seen in them.
            rule |= {"learning_rate": torch.full((), 0.3, device=device) if clip else 0.3}
            if clip:
                rule |= {"max_norm": torch.full((), 1.0, device=device)}
            if extras:
                low, target_low = (torch.empty_like(param, dtype=torch.bfloat16) for _ in range(2))
                rule |= {"target": target, "low": low, "target_low": target_low}
                rule |= {"gradient_norm": torch.zeros((), device=device)}

            def call() -> object:
                adamw_(*state, **rule, impl=impl)
                return [*state, *(x for x in rule.values() if isinstance(x, Tensor))]

            return call

        def moved(
            batch: int,
            sizes: tuple[int, int] = (per_row, more),
            each: int = (8 if extras else 6) * dtype.itemsize
            + (4 if extras else 0)
            + (2 if clip else 1) * grad_dtype.itemsize,
        ) -> int:
            return (sizes[0] * batch + sizes[1]) * each

        size = " + ".join([f"{per_row}*batch"] * (per_row > 0) + [str(more)] * more)
        label = f"P={size} {dtype}, gradient {grad_dtype}".replace("torch.", "")
        label += (", target, copies, norm" if extras else "") + (", clipped" if clip else "")
        kernels = ("adamw", "squares") if clip else ("adamw",)
        yield Case("adamw_", label, prepare, moved, kernels)
    for dtype, copied in ((float32, True), (float32, False), (float64, True)):

        def prepare_ema(
            device: torch.device, batch: int, impl: str, dtype: torch.dtype = dtype, copied: bool = copied
        ) -> Callable[[], object]:
            param, target = (torch.randn(1024 * batch, device=device, dtype=dtype) for _ in range(2))
            low = torch.empty_like(param, dtype=torch.bfloat16) if copied else None

            def call() -> object:
                ema_(target, param, 0.005, low=low, impl=impl)
                return target if low is None else [target, low]

            return call

        label = f"P=1024*batch {dtype}, {'with' if copied else 'without'} copy".replace("torch.", "")

        def moved_ema(batch: int, each: int = 3 * dtype.itemsize + (2 if copied else 0)) -> int:
            return 1024 * batch * each

        yield Case("ema_", label, prepare_ema, moved_ema, ("ema",))
