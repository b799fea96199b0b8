"""Since when a number is not finite, kept on the device: nothing waits until somebody asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FirstBad:
    """The first update at which each of M numbers was not finite.

    Args:
        names: of the numbers. like: a tensor of their dtype and device.
    """

    def __init__(self, names: Sequence[str], like: Tensor) -> None:
        self.names = names
        self._since = like.new_zeros(len(names))

    def note(self, rows: Sequence[Tensor], update: Tensor) -> None:
        """Look at the numbers [M] of some updates, of which `update`, 0-d and from 1, is the last."""
        bad = torch.stack(tuple(rows)).isfinite().logical_not_()
        first = update - (len(rows) - 1) + bad.to(torch.uint8).argmax(0)
        new = bad.any(0).logical_and_(self._since == 0)
        self._since.copy_(torch.where(new, first, self._since))

    def require_finite(self) -> None:
        """FloatingPointError with the first name that is not finite, and since when; waits for the GPU."""
        for name, since in zip(self.names, self._since.tolist(), strict=True):
            if since > 0:
                raise FloatingPointError(f"{name} is not finite since update {since:.0f}")

    def clear(self) -> None:
        self._since.zero_()
