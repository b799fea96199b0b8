"""The matrix products of an update and nothing else: the floor of its time."""

from __future__ import annotations

from collections.abc import Callable
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


def alone(update: Callable[[], object]) -> Callable[[], object]:
    """The products that `update` makes, each by torch.bmm of the same factors into memory that is there."""
    with Noted() as noted:
        update()
    made: dict[torch.Size, Tensor] = {}
    work = list[Callable[[], object]]()
    for left, right in noted.factors:
        left, right = (x if x.dim() == 3 else x[None] for x in (left, right))
        shape = torch.Size((len(left), left.shape[1], right.shape[2]))
        out = made.setdefault(shape, left.new_empty(shape))
        work.append(partial(torch.bmm, left, right, out=out))
    return lambda: [one() for one in work]
