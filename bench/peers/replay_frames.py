"""Image observations: frames that can be recognised, and the buffers that hold each of them once."""

from __future__ import annotations

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
    stack = np.maximum(now[:, None] - np.arange(STACK)[::-1], (now // EPISODE * EPISODE)[:, None])
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
    name = "brc-fast"

    def __init__(self, rows: int) -> None:
        observation = Field((SIDE, SIDE), "uint8", stack=STACK)
        self.buffer = ReplayBuffer(rows, observation, Field((), "int64"), task_ids=[0])
        self.rows, self.nbytes = rows, self.buffer.nbytes
        for number in range(rows):
            now = np.array([number])
            end = is_end(now)
            successor = frames(np.where(end, now + FINAL, now + 1))
            self.buffer.add(frames(now), now, now.astype(np.float32), end, np.zeros(1, bool), successor)

    def sample(self, size: int) -> Any:
        return self.buffer.sample(size)

    def check(self, size: int) -> None:
        batch = self.sample(size)
        both = (batch.observations, batch.next_observations)
        here, there = (field.numpy().reshape(-1, STACK, SIDE, SIDE) for field in both)
        check(here, batch.actions.numpy(), there, self.rows)


class CpprbFrames:
    """cpprb with `stack_compress` and `next_of`: one environment, which adds overlapping stacks in order."""

    name = "cpprb, stack_compress"

    def __init__(self, rows: int) -> None:
        from cpprb import ReplayBuffer as Buffer

        image = {"shape": (SIDE, SIDE, STACK), "dtype": np.uint8}
        fields = {"obs": image, "act": {"dtype": np.int64}, "rew": {}, "done": {}}
        self.buffer = Buffer(rows, fields, stack_compress="obs", next_of="obs")
        self.rows, self.nbytes = rows, rows * (PIXELS + 8 + 4 + 4)
        first = 0
        while first < rows:  # runs of transitions that stay within an episode
            count = min(256, rows - first, EPISODE - first % EPISODE)
            # The stack is the last axis here.
            here, there = (np.moveaxis(frames(numbers), 1, -1) for numbers in stacks(first, count))
            numbers = np.arange(first, first + count)
            end = is_end(numbers)
            self.buffer.add(obs=here, act=numbers, rew=numbers.astype(np.float32), next_obs=there, done=end)
            if end[-1]:
                self.buffer.on_episode_end()
            first += count

    def sample(self, size: int) -> Any:
        return self.buffer.sample(size)

    def check(self, size: int) -> None:
        batch = self.sample(size)
        here, there = (np.moveaxis(batch[key], -1, 1) for key in ("obs", "next_obs"))
        check(here, batch["act"], there, self.rows)
