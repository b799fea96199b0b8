"""What to sample: the arguments that every kind of buffer shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from brc_fast import _core
from brc_fast.spec import integer

from .fields import Schema


class Size(NamedTuple):
    """How many transitions: U batches of B each, and the leading dimensions of their fields."""

    num_batches: int
    batch_size: int
    shape: tuple[int, ...]  # [U, B], or [B] where there is one batch
    weighted: bool = False  # with a field for importance weights

    @classmethod
    def of(cls, batch_size: int, num_batches: int | None, weighted: bool = False) -> Size:
        """[B] where num_batches is None, else [U, B]; ValueError for a batch without a transition."""
        size = integer("batch_size", batch_size)
        count = 1 if num_batches is None else integer("num_batches", num_batches)
        if size < 1 or count < 1:
            raise ValueError(f"batch_size and num_batches must be at least 1, got {size} and {count}")
        return cls(count, size, (size,) if num_batches is None else (count, size), weighted)


class Requests:
    """Makes the compiled store's record of a request, and keeps the last one."""

    def __init__(self, schema: Schema) -> None:
        self._tasks = len(schema.capacities)
        self.plain = _core.Request(1, 1.0, [], [])

    def __call__(
        self,
        n_step: int,
        discount: float | None,
        tasks: Sequence[int] | None,
        weights: Sequence[float] | str | None,
        beta: float | None = None,
    ) -> _core.Request:
        """See ReplayBuffer.sample."""
        if n_step == 1 and discount is None and tasks is None and weights is None and beta is None:
            return self.plain
        n_step = integer("n_step", n_step)
        if n_step > 1 and discount is None:
            raise ValueError(f"discount must be given with n_step {n_step}: it weighs the rewards summed")
        named = [] if tasks is None else np.asarray(tasks).tolist()
        if not isinstance(named, list) or not all(type(task) is int for task in named):  # a mask is no list
            raise TypeError(f"tasks must be a sequence of integers, got {tasks!r}")
        if tasks is not None and not named:
            raise ValueError("tasks must name at least one task, got none")
        if isinstance(weights, str):
            if weights != "equal":
                raise ValueError(f'weights must be "equal" or one share per task, got {weights!r}')
            weights = [1.0] * (len(named) or self._tasks)
        shares = [] if weights is None else _numbers(weights)
        if weights is not None and not shares:
            raise ValueError("weights must hold one share per task, got none")
        power = 1.0 if discount is None else number("discount", discount)
        return _core.Request(n_step, power, named, shares, None if beta is None else number("beta", beta))


def exponent(alpha: float | None) -> float | None:
    """Of priorities, if there are any."""
    return None if alpha is None else number("alpha", alpha)


def number(name: str, value: float) -> float:
    """TypeError for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


def _numbers(weights: Sequence[float]) -> list[float]:
    try:
        if not isinstance(weights, (Mapping, Set)):  # neither has the order of the tasks
            return [float(weight) for weight in weights]
    except (TypeError, ValueError):
        pass
    raise TypeError(f'weights must be "equal" or a number per task, got {weights!r}')
