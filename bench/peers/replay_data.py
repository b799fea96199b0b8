"""Transitions that can be recognised: what every replay benchmark stores, and the check of what comes back.

Each transition carries a number, its tag, and every value of it follows from the tag. So a sampled row proves
by itself that its observation, action, reward, mask and successor were stored together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from harness import Differs
from numpy.typing import NDArray

Array = NDArray[Any]
EPISODE = 997  # one end in so many transitions; a prime, so that every stream has ends
MAX_ROWS = 1 << 24  # float32 holds every tag below exactly
CHUNK_BYTES = 8 << 20


class Mismatch(Differs):
    """A buffer returned what was never stored."""


class Steps(NamedTuple):
    """Transitions of all streams, [..., S, ...]; the fields and their order are those of ReplayBuffer.add."""

    observations: Array
    actions: Array
    rewards: Array
    terminated: Array
    truncated: Array
    successors: Array


class Columns(NamedTuple):
    """A sampled batch for the check: [n, O], [n, A], [n], [n], [n, O], and [n] where tasks are told apart."""

    observations: Array
    actions: Array
    rewards: Array
    masks: Array
    next_observations: Array
    task_ids: Array | None


@dataclass(frozen=True)
class Workload:
    """What S = tasks * streams environments in lockstep store: `steps` steps, which fill the buffer.

    With a `cycle` the same so many steps come again and again, also after the buffer is full; the first of
    them follows the last one without a break.
    """

    observation_size: int
    action_size: int
    tasks: int
    streams: int
    steps: int
    cycle: int = 0

    @property
    def lanes(self) -> int:
        """S."""
        return self.tasks * self.streams

    @property
    def rows(self) -> int:
        """Transitions per task."""
        return self.streams * self.steps

    @property
    def row_bytes(self) -> int:
        """A transition with two observations, reward and mask, all float32."""
        return 4 * (2 * self.observation_size + self.action_size + 2)

    def one_task(self) -> Workload:
        """A task of this workload."""
        return replace(self, tasks=1)

    def chunks(self) -> Iterator[tuple[int, Steps]]:
        """The steps that fill a buffer, oldest first: the first step of each chunk and its [k, S, ...]."""
        size = self.cycle or max(1, CHUNK_BYTES // (self.row_bytes * self.lanes))
        chunk = self.at(0, size)
        for first in range(0, self.steps, size):
            count = min(size, self.steps - first)
            if first and not self.cycle:
                chunk = self.at(first, count)
            yield first, Steps(*(column[:count] for column in chunk))

    def one_cycle(self) -> list[Steps]:
        """The steps of a cycle, each [S, ...]."""
        whole = self.at(0, self.cycle)
        return [Steps(*(column[k] for column in whole)) for k in range(self.cycle)]

    def at(self, first: int, count: int) -> Steps:
        """Steps first .. first + count - 1, [count, S, ...]."""
        tags = np.arange(first * self.lanes, (first + count) * self.lanes).reshape(count, self.lanes)
        terminated, truncated = ends(tags)
        return Steps(
            values(tags, self.observation_size),
            values(tags, self.action_size),
            tags.astype(np.float32),
            terminated,
            truncated,
            values(self.successors(tags), self.observation_size),
        )

    def successors(self, tags: Array) -> Array:
        """The tag of the observation that follows; at an end one that no transition starts from."""
        following = tags + self.lanes
        if self.cycle:
            following %= self.cycle * self.lanes
        return np.where(np.logical_or(*ends(tags)), -1 - tags, following)

    def task_of(self, tags: Array) -> Array:
        """The task of each transition: streams are numbered task after task."""
        return tags % self.lanes // self.streams

    def check(self, batch: Columns) -> None:
        """Raises Mismatch unless `batch` holds stored transitions, whole ones and not always the same."""
        tags = np.rint(batch.observations[:, 0] * 2.0).astype(np.int64)
        if tags.min() < 0 or tags.max() >= (self.cycle or self.steps) * self.lanes:
            raise Mismatch("an observation was never stored")
        expected = {
            "observations": values(tags, self.observation_size),
            "actions": values(tags, self.action_size),
            "rewards": tags.astype(np.float32),
            "masks": (~ends(tags)[0]).astype(np.float32),
            "next_observations": values(self.successors(tags), self.observation_size),
        }
        if batch.task_ids is not None:
            expected["task_ids"] = self.task_of(tags)
        for name, wanted in expected.items():
            got = getattr(batch, name)
            if got.shape != wanted.shape:
                raise Mismatch(f"{name} have shape {list(got.shape)} instead of {list(wanted.shape)}")
            wrong = np.count_nonzero((got != wanted).reshape(len(tags), -1).any(axis=1))
            if wrong:
                raise Mismatch(f"{wrong} of {len(tags)} sampled {name} do not belong to their observations")
        if tags.size * 4 <= (self.cycle or self.steps) * self.lanes and np.unique(tags).size < tags.size // 2:
            raise Mismatch("the same few transitions are drawn again and again")


def ends(tags: Array) -> tuple[Array, Array]:
    """Where episodes terminate and where they are truncated, in turns."""
    return tags % (2 * EPISODE) == 0, tags % (2 * EPISODE) == EPISODE


def values(tags: Array, width: int) -> Array:
    """[..., width] float32 that follow from the tags; the first column is half of the tag."""
    factors = np.linspace(0.5, 1.0, width, dtype=np.float32)
    return tags.astype(np.float32)[..., None] * factors


def flat(*arrays: Array) -> list[Array]:
    """The first two axes joined."""
    return [array.reshape(-1, *array.shape[2:]) for array in arrays]
