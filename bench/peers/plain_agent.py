"""The plain PyTorch learner where the training loop expects `brc_fast.BRC`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from brc_fast import BRC, Batch, Noise
from peers.torch_plain import PlainBRC


class PlainAgent(BRC):
    """`BRC` with the networks and the updates of `PlainBRC`; it draws the same noise from the same seed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.peer = PlainBRC(self)

    @property
    def alpha(self) -> Tensor:
        return self.peer.log_alpha.detach().exp()

    def policy(self, observations: Tensor, task_ids: Tensor, lagged: object = None) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std [B, A]."""
        embedded = self.peer.critics.embedded(observations, task_ids)
        mean, raw_log_std = self.peer.actor(embedded).chunk(2, -1)
        return mean, raw_log_std

    def update(
        self, batches: Batch, noise: Noise | None = None, reward_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """U updates on [U, B, ...], one after the other; the last one's losses."""
        batches = batches.to(self.device)
        if reward_scale is not None:
            batches = batches._replace(rewards=batches.rewards / reward_scale[batches.task_ids])
        if noise is None:
            drawn = [self._noise(batches.update(index)) for index in range(len(batches.rewards))]
            noise = Noise(*torch.stack(drawn, 1))
        return self.peer.updates(batches, noise)
