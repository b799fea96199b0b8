"""What every kind of buffer has: its sizes, and the checks of its arguments."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brc_fast import _core
from brc_fast.batch import Batch
from brc_fast.spec import integer

from .fields import Array, Schema, checked
from .request import Requests

FEWEST = 512  # transitions of which most may be jumps before anybody is told


class Buffer(ABC):
    """Streams of transitions, of tasks; `_store` counts them."""

    _store: _core.ReplayStore | _core.DeviceIndex

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._streams = np.arange(self.num_streams, dtype=np.int64)
        self._requests = Requests(schema)
        self._saving = threading.Lock()
        self._told_of_jumps = False
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

    @property
    def jumps(self) -> int:
        """Transitions that came since the buffer was made, cleared or loaded and did not go on from where the
        one before in their stream had led, though that ended no episode.

        `reset` and the `starts` of `extend` end one.
        """
        return self._store.jumps[0]

    def indices(self) -> Tensor:
        """What the transitions stored are called, [len(self)] int64: stream after stream and oldest first.

        A name is the number of the transition in its stream, times N, plus the stream. It stays as it is
        until the transition is replaced, and no other one gets it, unless it was taken back.
        """
        return torch.from_numpy(self._store.indices())

    def __getitem__(self, indices: Any) -> Batch:
        """The transitions of these names, of any shape [...], in fresh memory: `buffer[batch.indices]`.

        Raises:
            IndexError: one was never added, or has been replaced since.
        """
        names, shape = _on_host("indices", indices, "int64")
        return self._read(names.reshape(-1), shape)

    def all(self) -> Batch:
        """Every transition stored, [len(self), ...], in the order of `indices()` and in fresh memory."""
        return self[self.indices()]

    def epoch(
        self, batch_size: int, *, shuffle: bool = True, drop_last: bool = False, seed: int = 0
    ) -> Iterator[Batch]:
        """Batches [B, ...] of every transition that is stored now, each once; the last batch may be smaller.

        Args:
            shuffle: in an order that `seed` decides, else in that of `indices()`.
            drop_last: leaves a last batch out that is smaller.

        Raises:
            IndexError: a transition was replaced before its turn came.
        """
        if integer("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        names = self._store.indices()
        if shuffle:
            np.random.default_rng(seed).shuffle(names)
        end = len(names) - (len(names) % batch_size if drop_last else 0)
        for first in range(0, end, batch_size):
            yield self[names[first : min(first + batch_size, end)]]

    def sample_sequences(self, batch_size: int, length: int) -> Batch:
        """Sequences [B, length, ...] of transitions that followed each other in a stream, for recurrent
        agents.

        Each of those that are stored is equally likely. A sequence goes on through the ends of episodes: its
        extra `starts` [B, length], bool, is true where an episode begins, and a memory with it, and also at
        the oldest transition of a stream. Counts as one batch.

        Raises:
            ValueError: no stream holds `length` transitions.
        """
        size = integer("batch_size", batch_size), integer("length", length)
        if min(size) < 1:
            raise ValueError(f"batch_size and length must be at least 1, got {size[0]} and {size[1]}")
        names, starts = self._store.sequences(*size)
        batch = self._read(names, size)
        return batch._replace(
            extras={**batch.extras, "starts": torch.from_numpy(starts.view(bool)).view(size)}
        )

    def clear(self) -> None:
        """Forget every transition. The draws go on. Waits for a save that is under way."""
        with self._saving:
            self._saved = None  # names of transitions begin anew: files name others
            self._store.clear()

    def discard_episode(self, stream: int) -> int:
        """Take the newest episode of a stream back, over or not, for example one that a fault has spoiled.

        Returns how many transitions that were. What they had replaced is gone. Waits for a save that is under
        way.

        Raises:
            IndexError: no such stream.
        """
        number = integer("stream", stream)
        with self._saving:
            self._saved = None  # later transitions get the names of these, which files hold
            return self._store.discard_episode(number)

    @abstractmethod
    def _read(self, indices: NDArray[np.int64], shape: tuple[int, ...]) -> Batch:
        """The transitions of these names [M], as columns of this leading shape."""

    def update_priorities(self, indices: Array, priorities: Array) -> int:
        """Sets the priorities of transitions by what a batch told, for example by the errors of its values.

        Args:
            indices: of any shape, as `batch.indices` has them.
            priorities: of the same shape, finite and not negative; kept as float32. A transition of priority
                zero is not drawn by priority any more. Of several for the same transition the last holds.

        Both may lie on any device; what lies on a GPU is waited for.

        Returns:
            The number of those that are still stored. What has been replaced since is left out.

        Raises:
            TypeError: another type or dtype.
            ValueError: another shape, a priority out of range, or a buffer made without `alpha`.
            IndexError: an index that no transition ever had.
            In each case nothing is changed.
        """
        ids, shape = _on_host("indices", indices, "int64")
        values, other = _on_host("priorities", priorities, "float32")
        if shape != other:
            raise ValueError(f"priorities must have the shape of indices {list(shape)}, got {list(other)}")
        return self._store.set_priorities(ids, values)

    def _require_stored(self, batch_size: int) -> None:
        stored = self._store.size
        if batch_size > stored:
            raise ValueError(
                f"batch_size {batch_size} exceeds the {stored} transitions stored; "
                "collect more or lower batch_size"
            )

    def _watch_steps(self) -> None:
        """Warns once where to sum several steps hardly ever sums more than one."""
        if self._told_of_jumps:
            return
        jumps, added = self._store.jumps
        if added >= FEWEST and 2 * jumps > added:
            self._told_of_jumps = True
            warnings.warn(
                f"n_step sums hardly more than one step: {jumps} of {added} transitions did not go on from "
                "where the one before them had led, and no episode ended between. Pass as successor where "
                "the action led, which is the stream's next observation unless the episode ends; where "
                "transitions come in no order, sample with n_step=1",
                stacklevel=3,
            )

    def _per_task(self, per_stream: NDArray[np.int64]) -> NDArray[np.int64]:
        total = np.zeros(len(self.schema.capacities), np.int64)
        np.add.at(total, self.schema.task_ids, per_stream)
        return total


def _on_host(name: str, value: Array, dtype: str) -> tuple[NDArray[Any], tuple[int, ...]]:
    """An argument of any shape, and that shape."""
    shape = tuple(np.shape(value))
    host = value.cpu() if isinstance(value, Tensor) else value
    return checked(name, host, "[...]", shape or (1,), dtype), shape


def require_choices(seed: int, non_finite: str) -> None:
    """Refuses a seed that the random numbers do not have, and an unknown policy."""
    if not 0 <= integer("seed", seed) < 2**64:
        raise ValueError(f"seed must lie in 0..2**64-1, got {seed}")
    if non_finite not in ("error", "allow"):
        raise ValueError(f'non_finite must be "error" or "allow", got {non_finite!r}')
