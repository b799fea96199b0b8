"""Per-task reward scale, from the discounted returns of finished episodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brc_fast import _core
from brc_fast.config import TrainConfig

ENDLESS = 10_000  # steps of an episode, while none of its task has ended, after which that is said
log = logging.getLogger(__name__)


class RewardNormalizer:
    """Keeps every task's scaled return within the critic's support.

    Each finished episode gives its discounted returns, computed backwards from a bootstrap (0 where the task
    ended); `return_min` and `return_max` are their extremes over all of a task's episodes. Then

        scale = (max(return_max, |return_min|) + alpha * |entropy| / (1 - discount)) / v_max
        r'    = r / scale

    where the second term bounds the discounted entropy bonus. Before a task's first episode ends its scale is
    infinite, so r' = 0.

    Args:
        task_ids: [N], the task of every environment; T is the largest plus one.
        bootstrap: value of a truncated episode's last state. "mean_reward" (the authors' code):
            mean(r) / (1 - discount) of that episode. "critic" (reported of the paper): the caller's estimate.
        entropy: "target" (the authors' code): target_entropy / 2 for every task. "measured" (reported of the
            paper): the policy's entropy on each task, from the caller.

    Source: Nauman et al. 2025, arXiv:2505.23150, and the authors' published code.
    """

    def __init__(
        self,
        task_ids: Sequence[int] | NDArray[np.int64],
        *,
        discount: float = 0.99,
        v_max: float = 10.0,
        target_entropy: float,
        bootstrap: Literal["mean_reward", "critic"] = "mean_reward",
        entropy: Literal["target", "measured"] = "target",
    ) -> None:
        self.task_ids = np.asarray(task_ids, np.int64)
        if self.task_ids.ndim != 1 or self.task_ids.size == 0 or self.task_ids.min() < 0:
            raise ValueError(f"task_ids must be N >= 1 ids from 0, got {task_ids}")
        if not 0 <= discount < 1:
            raise ValueError(f"discount must be in [0, 1), got {discount}")
        if v_max <= 0:
            raise ValueError(f"v_max must be positive, got {v_max}")
        self.num_tasks = int(self.task_ids.max()) + 1
        self.discount, self.v_max, self.target_entropy = discount, v_max, target_entropy
        self.bootstrap, self.entropy = bootstrap, entropy
        self.return_min = np.full(self.num_tasks, np.inf)
        self.return_max = np.full(self.num_tasks, -np.inf)
        self._lengths = np.zeros(len(self.task_ids), np.int64)  # steps of the running episodes
        self._rewards = np.zeros((64, len(self.task_ids)))  # their rewards, grown as needed
        self._told = False  # that a task's episodes do not end

    @classmethod
    def from_config(cls, config: TrainConfig, task_ids: NDArray[np.int64], target_entropy: float) -> Self:
        """The normalizer of a training run."""
        return cls(
            task_ids,
            discount=config.learning.discount,
            v_max=config.critic.v_max,
            target_entropy=target_entropy,
            bootstrap=config.learning.return_bootstrap,
            entropy=config.learning.return_entropy,
        )

    def update(
        self,
        rewards: NDArray[np.float32],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        values: NDArray[np.float32] | None = None,
        dropped: NDArray[np.bool_] | None = None,
    ) -> None:
        """Record one step of all N environments.

        Args:
            rewards, terminated, truncated: [N]. A step that is both terminated and truncated has ended.
            values: [N] unscaled returns to go of the successors; needed with bootstrap="critic".
            dropped: [N] slots whose step was discarded: their running episode is forgotten.

        Raises:
            ValueError: another shape, or a reward that is not finite of a slot that is not dropped; nothing
                is recorded then.
        """
        given = {"rewards": rewards, "terminated": terminated, "truncated": truncated}
        given |= {name: x for name, x in (("values", values), ("dropped", dropped)) if x is not None}
        for name, x in given.items():
            if np.shape(x) != self.task_ids.shape:
                raise ValueError(
                    f"{name} must have shape [N] = [{self.task_ids.size}], got {list(np.shape(x))}"
                )
        kept = np.ones_like(self.task_ids, np.bool_) if dropped is None else ~np.asarray(dropped, np.bool_)
        if not np.isfinite(rewards)[kept].all():
            slot = int(np.flatnonzero(kept & ~np.isfinite(rewards))[0])
            raise ValueError(f"rewards must be finite, got {rewards[slot]} from environment {slot}")
        truncated = truncated & ~terminated & kept
        if self.bootstrap == "critic" and truncated.any() and values is None:
            raise ValueError('values [N] are needed at a truncation with bootstrap="critic", got None')
        if self._lengths.max() == len(self._rewards):
            self._rewards = np.concatenate([self._rewards, np.zeros_like(self._rewards)])
        self._rewards[self._lengths, np.arange(self.task_ids.size)] = rewards
        self._lengths += 1
        self.forget(~kept)
        if not self._told and self._lengths.max() >= ENDLESS:
            self._tell_of_endless_episodes()
        ended = np.flatnonzero((terminated & kept) | truncated)
        if not ended.size:
            return
        bootstraps, mean_weights = np.zeros((2, self.task_ids.size))
        if self.bootstrap == "critic":
            bootstraps[truncated] = 0.0 if values is None else values[truncated]
        else:
            mean_weights[truncated] = 1.0 / (1.0 - self.discount)
        episodes = (ended, self._lengths[ended], bootstraps[ended], mean_weights[ended])
        low, high = _core.return_extremes(self._rewards, self.discount, *episodes)
        np.minimum.at(self.return_min, self.task_ids[ended], low)
        np.maximum.at(self.return_max, self.task_ids[ended], high)
        self._lengths[ended] = 0

    def forget(self, slots: NDArray[np.bool_]) -> None:
        """The running episodes of these slots [N] start anew."""
        self._lengths[slots] = 0

    def _tell_of_endless_episodes(self) -> None:
        """Once, where a task's rewards are scaled to 0 because none of its episodes has ended."""
        endless = np.isinf(self.return_min[self.task_ids]) & (self._lengths >= ENDLESS)
        if endless.any():
            self._told = True
            task = int(self.task_ids[endless][0])
            log.warning(
                "no episode of task %d has ended in %d steps: its rewards are scaled to 0 until one does; "
                "give it a time limit",
                task,
                ENDLESS,
            )

    def scale(self, temperature: Tensor, entropies: Tensor | None = None) -> Tensor:
        """Divisor of every task's rewards, [T]; infinite before its first episode has ended.

        Args:
            temperature: alpha, 0-d. entropies: [T], needed with entropy="measured".
        """
        extremes = np.maximum(self.return_max, np.abs(self.return_min))
        if self.entropy == "target":
            entropy: Tensor | float = abs(self.target_entropy) / 2.0
        elif entropies is not None:
            entropy = entropies.abs()
        else:
            raise ValueError('entropies [T] are needed with entropy="measured", got None')
        bonus = temperature * entropy / (1.0 - self.discount)
        # A copy of so few bytes is staged at once: nothing waits for the GPU, and extremes may change.
        given = torch.from_numpy(extremes).to(bonus.dtype).to(bonus.device, non_blocking=True)
        scale = (given + bonus) / self.v_max
        # Zero only where neither rewards nor entropy have been anything but zero: then 0 / scale must be 0.
        return scale.clamp_min(torch.finfo(scale.dtype).tiny)

    def normalize(
        self, rewards: Tensor, task_ids: Tensor, temperature: Tensor, entropies: Tensor | None = None
    ) -> Tensor:
        """`rewards / scale[task_ids]`, both of any one shape."""
        return rewards / self.scale(temperature, entropies)[task_ids]

    def state_dict(self) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
        """Extremes and running episodes, to go on exactly from here."""
        return {
            "return_min": self.return_min.copy(),
            "return_max": self.return_max.copy(),
            "lengths": self._lengths.copy(),
            "rewards": self._rewards[: self._lengths.max()].copy(),
        }

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from a `state_dict` of a normalizer for the same environments."""
        lengths, rewards = state["lengths"], state["rewards"]
        longest = int(lengths.max(initial=0)) if lengths.dtype.kind == "i" else 0
        wanted = {
            "return_min": ((self.num_tasks,), "float64"),
            "return_max": ((self.num_tasks,), "float64"),
            "lengths": (self._lengths.shape, "int64"),
            "rewards": ((longest, len(self.task_ids)), "float64"),
        }
        for name, (shape, dtype) in wanted.items():
            if state[name].dtype != dtype:
                raise ValueError(f"normalizer {name} must be {dtype}, got {state[name].dtype}")
            if state[name].shape != shape:
                raise ValueError(
                    f"normalizer {name} must have shape {list(shape)}, got {list(state[name].shape)}"
                )
        low, high = state["return_min"], state["return_max"]
        none_yet = (low == np.inf) & (high == -np.inf)
        if not (none_yet | (np.isfinite(low) & np.isfinite(high) & (low <= high))).all():
            raise ValueError(
                f"normalizer return_min and return_max must be finite and in order, got {low} and {high}"
            )
        if lengths.min(initial=0) < 0 or not np.isfinite(rewards).all():
            raise ValueError("normalizer lengths must be 0 or more, and rewards finite")
        self.return_min, self.return_max = low.copy(), high.copy()
        self._lengths = lengths.copy()
        self._rewards = np.zeros((max(64, longest), len(self.task_ids)))
        self._rewards[:longest] = rewards
