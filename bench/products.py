"""The matrix products of an update: alone, its floor on a CPU, and what a machine needs for them at least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "baddbmm_")


class Noted(TorchDispatchMode):
    """Both factors of every product that is made while this is open."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = list[list[Tensor]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in PRODUCTS:
            self.factors.append([x.detach() for x in args if isinstance(x, Tensor)][-2:])
        return function(*args, **(kwargs or {}))


def noted(update: Callable[[], object]) -> list[list[Tensor]]:
    """Both factors [N, .., ..] of every product that `update` makes."""
    with Noted() as seen:
        update()
    return [[x if x.dim() == 3 else x[None] for x in pair] for pair in seen.factors]


def least(pairs: Sequence[Sequence[Tensor]], rate: float, bandwidth: float) -> float:
    """Seconds of these products at `rate` operations and `bandwidth` bytes per second, whichever takes longer
    for each: a roofline, which no library beats."""
    total = 0.0
    for left, right in pairs:
        size = left.shape[1] * right.shape[2]
        operations = 2 * len(left) * size * left.shape[2]
        moved = (left.numel() + right.numel() + len(left) * size) * left.element_size()
        total += max(operations / rate, moved / bandwidth)
    return total


def alone(update: Callable[[], object]) -> Callable[[], object]:
    """The products that `update` makes, each by torch.bmm of the same factors into memory that is there."""
    made: dict[torch.Size, Tensor] = {}
    work = list[Callable[[], object]]()
    for left, right in noted(update):
        shape = torch.Size((len(left), left.shape[1], right.shape[2]))
        out = made.setdefault(shape, left.new_empty(shape))
        work.append(partial(torch.bmm, left, right, out=out))
    return lambda: [one() for one in work]
