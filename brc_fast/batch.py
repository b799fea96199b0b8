"""The record that passes between replay, normalizer and agent."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Transitions for one update ([B, ...]) or for U updates ([U, B, ...]).

    ================== ============ ======== ==================================================
    field              shape        dtype    meaning
    ================== ============ ======== ==================================================
    observations       [.., B, O]   float32  what the policy saw, zero-padded to the widest task
    actions            [.., B, A]   float32  what it did, in [-1, 1]
    rewards            [.., B]      float32  raw from the replay; divided by the task's scale for the agent
    masks              [.., B]      float32  0 where the task truly ended, 1 otherwise (a time limit is 1)
    next_observations  [.., B, O]   float32  where the action really led, also at the end of an episode
    task_ids           [.., B]      int64    0 <= id < T
    ================== ============ ======== ==================================================
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    masks: Tensor
    next_observations: Tensor
    task_ids: Tensor

    def update(self, index: int) -> Batch:
        """The [B, ...] batch of one of the U updates."""
        return Batch(*(field[index] for field in self))

    def to(self, device: str) -> Batch:
        """The same transitions on `device`."""
        return Batch(*(field.to(device, non_blocking=True) for field in self))
