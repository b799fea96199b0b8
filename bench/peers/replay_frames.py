"""Image observations: frames that can be recognised, and the buffers that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from brc_fast import Field, ReplayBuffer

from .replay_data import EPISODE, Array, Mismatch

SIDE, STACK = 84, 4
PIXELS = SIDE * SIDE
FINAL = 1 << 30  # added to the number of the frame that ends an episode
TEXTURE = np.random.default_rng(0).integers(0, 256, PIXELS, np.uint8)


def frames(numbers: Array) -> Array:
    """[..., 84, 84] uint8: a texture that the number shifts, and the number in the first four pixels."""
    numbers = np.asarray(numbers, np.uint32)
    pixels = TEXTURE + numbers[..., None].astype(np.uint8)
    pixels[..., :4] = numbers[..., None].view(np.uint8)
    return pixels.reshape(*numbers.shape, SIDE, SIDE)


def stacks(first: int, count: int) -> tuple[Array, Array]:
    """The frame numbers of the stacks of transitions first .. first + count - 1 and of their successors.

    Oldest frame first; before the start of an episode its first frame is repeated.
    """
    now = np.arange(first, first + count)
    start = now // EPISODE * EPISODE
    stack = np.maximum(now[:, None] - np.arange(STACK)[::-1], start[:, None])
    following = np.where(is_end(now), now + FINAL, now + 1)
    return stack, np.concatenate([stack[:, 1:], following[:, None]], axis=1)


def is_end(numbers: Array) -> Array:
    """Where an episode terminates."""
    return (numbers + 1) % EPISODE == 0


def check(observations: Array, actions: Array, next_observations: Array, rows: int) -> None:
    """Raises Mismatch unless the stacks [n, 4, 84, 84] are those of the transitions that the actions number.

    Before the start of an episode a buffer may repeat the first frame or give zeros.
    """
    numbers = np.asarray(actions).reshape(-1).astype(np.int64)
    if numbers.min() < 0 or numbers.max() >= rows:
        raise Mismatch("an action was never stored")
    for number, *got in zip(numbers, observations, next_observations, strict=True):
        for name, stack, wanted in zip(("stack", "next stack"), got, stacks(int(number), 1), strict=True):
            age = int(number % EPISODE) + (name == "next stack")
            own = min(STACK, age + 1)  # frames of this episode
            expected = frames(wanted[0])
            padding = stack[: STACK - own]
            if not np.array_equal(stack[STACK - own :], expected[STACK - own :]):
                raise Mismatch(f"the {name} of transition {number} holds other frames")
            if padding.any() and not np.array_equal(padding, expected[: STACK - own]):
                raise Mismatch(f"the {name} of transition {number} reaches into another episode")


class OursFrames:
    """Single frames, each kept once."""

    name = "brc-fast"

    def __init__(self, rows: int) -> None:
        observation = Field((SIDE, SIDE), "uint8", stack=STACK)
        self.buffer = ReplayBuffer(rows, observation, Field((), "int64"), task_ids=[0])
        self.rows = rows
        self.bytes_per_row = self.buffer.nbytes / rows
        for number in range(rows):
            self._add(number)

    def _add(self, number: int) -> None:
        now = np.array([number])
        end = is_end(now)
        successor = frames(np.where(end, now + FINAL, now + 1))
        rewards = now.astype(np.float32)
        self.buffer.add(frames(now), now, rewards, end, np.zeros(1, bool), successor)

    def sample(self, size: int) -> Any:
        return self.buffer.sample(size)

    def check(self, size: int) -> None:
        batch = self.sample(size)
        observations, following = (
            field.numpy().reshape(-1, STACK, SIDE, SIDE)
            for field in (batch.observations, batch.next_observations)
        )
        check(observations, batch.actions.numpy(), following, self.rows)


class CpprbFrames:
    """cpprb with `stack_compress` and `next_of`: one environment, which adds overlapping stacks in order."""

    name = "cpprb, stack_compress"
    options: dict[str, Any] = {"stack_compress": "obs", "next_of": "obs"}  # noqa: RUF012

    def __init__(self, rows: int) -> None:
        from cpprb import ReplayBuffer as Buffer

        image = {"shape": (SIDE, SIDE, STACK), "dtype": np.uint8}
        fields = {"obs": image, "act": {"dtype": np.int64}, "rew": {}, "done": {}}
        if not self.options:
            fields["next_obs"] = image
        self.buffer = Buffer(rows, fields, **self.options)
        self.rows = rows
        for first, count in pieces(rows):
            self._add(first, count)
        self.bytes_per_row = self._nbytes() / rows

    def _add(self, first: int, count: int) -> None:
        """One piece of an episode: the stack is the last axis here."""
        stack, following = (np.moveaxis(frames(numbers), 1, -1) for numbers in stacks(first, count))
        numbers = np.arange(first, first + count)
        end = is_end(numbers)
        self.buffer.add(obs=stack, act=numbers, rew=numbers.astype(np.float32), next_obs=following, done=end)
        if end[-1]:
            self.buffer.on_episode_end()

    def _nbytes(self) -> int:
        """Stored once per row: a frame (or both stacks), action, reward, done."""
        images = PIXELS if self.options else 2 * STACK * PIXELS
        return self.rows * (images + 8 + 4 + 4)

    def sample(self, size: int) -> Any:
        return self.buffer.sample(size)

    def check(self, size: int) -> None:
        batch = self.sample(size)
        observations, next_observations = (np.moveaxis(batch[key], -1, 1) for key in ("obs", "next_obs"))
        check(observations, batch["act"], next_observations, self.rows)


class CpprbPlainFrames(CpprbFrames):
    """cpprb with both stacks of every transition."""

    name = "cpprb, both stacks"
    options: dict[str, Any] = {}  # noqa: RUF012


def pieces(rows: int, longest: int = 256) -> Iterator[tuple[int, int]]:
    """Runs of transitions that stay within an episode: first and count."""
    first = 0
    while first < rows:
        count = min(longest, rows - first, EPISODE - first % EPISODE)
        yield first, count
        first += count
