"""Workloads of the metrics of an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from ...reference import METRICS, ScalarAdam
from ...summary import update_summary_
from .case import Case


def cases() -> Iterator[Case]:
    """Two members, in each of the types that metrics have; every result of order 1, one metric not finite.
    The temperature stands still, at a rate of 0, so that a call may be repeated."""
    for dtype in (torch.float32, torch.float64):

        def prepare(
            device: torch.device, batch: int, impl: str, dtype: torch.dtype = dtype
        ) -> Callable[[], object]:
            losses, q_values = torch.randn(2, 2, batch, device=device, dtype=dtype) + 2.0
            log_probs = torch.randn(batch, device=device, dtype=dtype) - 1.5
            metrics, since = (torch.zeros(len(METRICS), device=device, dtype=dtype) for _ in range(2))
            alpha, gradient, step = (
                torch.full((), x, device=device, dtype=dtype) for x in (math.exp(-1.2), 0.0, 7.0)
            )
            metrics[1], metrics[3], since[4] = float("nan"), 3.0, 5.0
            state = [torch.full((1,), x, device=device, dtype=dtype) for x in (-1.2, 0.1, 0.02)]
            count, rate = (torch.full((), x, device=device, dtype=dtype) for x in (3.0, 0.0))
            adam = ScalarAdam(state[0], state[1], state[2], count, rate, (0.5, 0.999), 1e-8)
            results = metrics[:1], metrics[2:], gradient, since  # all but the NaN, which equals nothing

            def call() -> object:
                rest = {"gradient": gradient, "step": step, "since": since}
                given = metrics, losses, log_probs, q_values, alpha
                update_summary_(*given, target_entropy=-3.0, adam=adam, impl=impl, **rest)
                return results

            return call

        def moved(batch: int, size: int = dtype.itemsize) -> int:
            return (5 * batch + 4 * len(METRICS) + 12) * size

        yield Case("update_summary_", f"E=2 {dtype}".replace("torch.", ""), prepare, moved)
