"""The matrix products of an update: alone, its floor on a CPU, and what a machine needs for them at least."""

from __future__ import annotations

import timeit
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from brc_fast.kernels.products import by_torch, chosen_products, multiply

TRIED = 7  # times, before it is known who makes a product
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


class Alone:
    """The products that `update` makes, each of the same factors into memory that is there, by the fastest of
    those who can: torch.bmm, and this package's own.

    Attributes:
        whose: how many products are of which.
    """

    def __init__(self, update: Callable[[], object]) -> None:
        self.kept: list[tuple[Tensor, ...]] = []
        self.work, self.whose, made = list[Callable[[], object]](), Counter[str](), dict[torch.Size, Tensor]()
        for left, right in noted(update):
            shape = torch.Size((len(left), left.shape[1], right.shape[2]))
            out = made.setdefault(shape, left.new_empty(shape))
            ways = {"torch.bmm": by_torch(left, right, out)}
            if chosen_products(left.dtype) == "native":
                ways["brc-fast"] = multiply(left, right, out)
            best = min(ways, key=lambda name: min(timeit.repeat(ways[name], number=1, repeat=TRIED)))
            self.kept.append((left, right, out))
            self.whose[best] += 1
            self.work.append(ways[best])

    def __call__(self) -> None:
        for one in self.work:
            one()
