"""What to sample: the arguments that every kind of buffer shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from brc_fast import _core

from .fields import Spec


def require_sizes(batch_size: int, num_batches: int) -> None:
    """ValueError for a batch without a transition."""
    if batch_size < 1 or num_batches < 1:
        raise ValueError(f"batch_size and num_batches must be at least 1, got {batch_size} and {num_batches}")


class Requests:
    """Makes the compiled store's record of a request, and keeps the last one."""

    def __init__(self, spec: Spec) -> None:
        self._tasks = len(spec.capacities)
        self._plain = _core.Request(1, 1.0, [], [])

    def __call__(
        self,
        n_step: int,
        discount: float | None,
        tasks: Sequence[int] | None,
        weights: Sequence[float] | str | None,
    ) -> _core.Request:
        """See ReplayBuffer.sample."""
        if n_step == 1 and discount is None and tasks is None and weights is None:
            return self._plain
        if n_step > 1 and discount is None:
            raise ValueError(f"discount must be given with n_step {n_step}: it weighs the rewards summed")
        named = [] if tasks is None else np.asarray(tasks).tolist()
        if not isinstance(named, list) or not all(isinstance(task, int) for task in named):
            raise TypeError(f"tasks must be a sequence of integers, got {tasks!r}")
        if tasks is not None and not named:
            raise ValueError("tasks must name at least one task, got none")
        if isinstance(weights, str):
            if weights != "equal":
                raise ValueError(f'weights must be "equal" or one share per task, got {weights!r}')
            weights = [1.0] * (len(named) or self._tasks)
        shares = [] if weights is None else [float(weight) for weight in weights]
        if weights is not None and not shares:
            raise ValueError("weights must hold one share per task, got none")
        return _core.Request(n_step, 1.0 if discount is None else discount, named, shares)
