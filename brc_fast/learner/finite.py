"""Since when a number is not finite, kept on the device: nothing waits until somebody asks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def require_finite(name: str, values: Tensor) -> None:
    """ValueError with the name and the place of the first number that is not finite."""
    if values.is_floating_point() and not values.isfinite().all():
        place = tuple(values.isfinite().logical_not().nonzero()[0].tolist())
        raise ValueError(f"{name} must be finite, got {values[place]:g} at {list(place)}")


class FirstBad:
    """The first update at which each of M numbers was not finite.

    Args:
        names: of the numbers. like: a tensor of their dtype and device.

    Attributes:
        since: [M], that update, counted from 1, or 0; `kernels.update_summary_` keeps it.
    """

    def __init__(self, names: Sequence[str], like: Tensor) -> None:
        self.names = names
        self.since = like.new_zeros(len(names))

    def require_finite(self) -> None:
        """FloatingPointError with the name that was first not finite, and since when; waits for the GPU."""
        bad = {n: since for n, since in zip(self.names, self.since.tolist(), strict=True) if since > 0}
        if bad:
            name = min(bad, key=lambda n: bad[n])  # what followed from it came later, or is listed after it
            raise FloatingPointError(f"{name} is not finite since update {bad[name]:.0f}")

    def clear(self) -> None:
        self.since.zero_()
