"""What a workload of an op is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["Case"]


class Case(NamedTuple):
    """One op at one size.

    `prepare(device, batch, impl)` makes fresh inputs for `batch` rows and returns the call to make on them,
    forward and backward where the op has one. `bytes(batch)` is what that call must move at least, and
    `kernels` names the configurations it uses.
    """

    op: str
    label: str
    prepare: Callable[[torch.device, int, str], Callable[[], object]]
    bytes: Callable[[int], int]
    kernels: tuple[str, ...] = ()
