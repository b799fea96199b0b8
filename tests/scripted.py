"""An environment whose episodes are written down beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from brc_fast.envs.base import Step
from brc_fast.spec import Spec


class Scripted:
    """Slots whose k-th episode (from 0) has length(slot, k) steps, each with reward 1 + slot / 1000.

    An episode for which lost(slot, try) holds is lost in its second step. Success is told in the
    episode's first step alone. `reset_steps`: the environment spends a step on every reset. What comes with
    a dropped step means nothing and says so: a reward of 99 and a success.
    """

    max_episode_steps = 1000

    def __init__(
        self,
        tasks: Sequence[str],
        slots: int,
        length: Callable[[int, int], int],
        *,
        lost: Callable[[int, int], bool] = lambda slot, number: False,
        success: Callable[[int, int], bool] | None = None,
        reset_steps: bool = False,
    ) -> None:
        self.task_names = tuple(tasks)
        self.task_spec = Spec.vectors(2, 1, tasks)
        self.num_envs = slots * len(tasks)
        self.task_ids = np.repeat(np.arange(len(tasks)), slots)
        self.length, self.lost, self.success, self.reset_steps = length, lost, success, reset_steps
        self.successes: Tensor | None = None
        self.closed = False

    def reset_tensors(self, seed: int | None) -> Tensor:
        self.step_number, self.finished, self.tries = np.zeros((3, self.num_envs), int)
        self.resetting = np.zeros(self.num_envs, bool)
        return torch.zeros(self.num_envs, 2)

    def step_tensors(self, actions: Tensor) -> Step:
        rewards = 1.0 + np.arange(self.num_envs) / 1000
        ended, dropped, successes = np.zeros((3, self.num_envs), bool)
        for slot in range(self.num_envs):
            if self.resetting[slot]:
                dropped[slot], self.resetting[slot] = True, False
                continue
            if self.step_number[slot] == 1 and self.lost(slot, self.tries[slot]):
                self.tries[slot] += 1
                self.step_number[slot] = 0
                ended[slot] = dropped[slot] = True
                continue
            if self.success is not None and self.step_number[slot] == 0:
                successes[slot] = self.success(slot, self.finished[slot])
            self.step_number[slot] += 1
            if self.step_number[slot] == self.length(slot, self.finished[slot]):
                ended[slot] = True
                self.resetting[slot] = self.reset_steps
                self.step_number[slot] = 0
                self.finished[slot] += 1
                self.tries[slot] += 1
        rewards[dropped], successes[dropped] = 99.0, True
        if self.success is not None:
            self.successes = torch.from_numpy(successes)
        observations = torch.zeros(self.num_envs, 2)
        none = torch.zeros(self.num_envs, dtype=torch.bool)
        return Step(
            observations,
            observations.clone(),
            torch.from_numpy(rewards.astype(np.float32)),
            none,
            torch.from_numpy(ended),
            torch.from_numpy(dropped),
        )

    def close(self) -> None:
        self.closed = True
