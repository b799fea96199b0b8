"""What every kind of buffer has: its sizes, and the checks of its arguments."""

from __future__ import annotations

import threading
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from brc_fast import _core
from brc_fast.spec import integer

from .fields import Schema
from .request import Requests


class Buffer:
    """Streams of transitions, of tasks; `_store` counts them."""

    _store: _core.ReplayStore | _core.DeviceIndex

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._streams = np.arange(self.num_streams, dtype=np.int64)
        self._requests = Requests(schema)
        self._saving = threading.Lock()
        self._saved: str | None = None  # manifest of the generation on disk that it goes on from

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is neither pickled nor copied: `save(folder)` keeps what it holds, and "
            "another one of the same sizes takes it up with `load(folder)`"
        )

    def __len__(self) -> int:
        """Transitions stored, over all tasks."""
        return self._store.size

    @property
    def capacity_per_task(self) -> NDArray[np.int64]:
        """Transitions that fit, [T]: n * ceil(capacity / n) for a task with n streams."""
        return self._per_task(self._store.capacities())

    @property
    def size_per_task(self) -> NDArray[np.int64]:
        """Transitions stored, [T]."""
        return self._per_task(self._store.sizes())

    @property
    def num_streams(self) -> int:
        """N."""
        return self.schema.task_ids.size

    @property
    def draws(self) -> int:
        """Batches sampled so far; `sample(batch_size, U)` counts U. It and the seed decide the next draw."""
        return self._store.draws

    def _require_stored(self, batch_size: int) -> None:
        stored = self._store.size
        if batch_size > stored:
            raise ValueError(
                f"batch_size {batch_size} exceeds the {stored} transitions stored; "
                "collect more or lower batch_size"
            )

    def _per_task(self, per_stream: NDArray[np.int64]) -> NDArray[np.int64]:
        total = np.zeros(len(self.schema.capacities), np.int64)
        np.add.at(total, self.schema.task_ids, per_stream)
        return total


def require_choices(seed: int, non_finite: str) -> None:
    """Refuses a seed that the random numbers do not have, and an unknown policy."""
    if not 0 <= integer("seed", seed) < 2**64:
        raise ValueError(f"seed must lie in 0..2**64-1, got {seed}")
    if non_finite not in ("error", "allow"):
        raise ValueError(f'non_finite must be "error" or "allow", got {non_finite!r}')
