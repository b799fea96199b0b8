"""The plain agent with our critic in the place of its own, as docs/critic.md puts it there: all else stays.

Optimizers, the actor's step and the targets' are those of the plain agent.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from brc_fast import BRC, Batch

from .torch_plain import PlainBRC, named


class SwappedBRC(PlainBRC):
    def __init__(self, agent: BRC) -> None:
        super().__init__(agent)
        self.critics = copy.deepcopy(agent.critic)
        with torch.no_grad():
            for parameter in self.critics.parameters():
                parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.critic_optimizer = self.adamw(self.critics)

    def sample(self, observations: Tensor, task_ids: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if self.critics.embedding is not None:
            with torch.no_grad():
                rows = nn.functional.normalize(self.critics.embedding, dim=-1)[task_ids]
            observations = torch.cat([observations, rows], -1)
        return self.sampled(observations, noise)

    def critic_loss(self, batch: Batch, noise: Tensor) -> Tensor:
        with torch.no_grad():
            next_actions, next_log_probs = self.sample(batch.next_observations, batch.task_ids, noise)
        losses = self.critics.bellman_loss(
            self.targets,
            batch.observations,
            batch.actions,
            batch.rewards,
            self.learning.discount * batch.masks,
            batch.next_observations,
            next_actions,
            next_log_probs=next_log_probs,
            temperature=self.log_alpha.detach().exp(),
            task_ids=batch.task_ids,
        )
        return losses.mean(-1).sum()

    def actor_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        actions, log_prob = self.sample(batch.observations, batch.task_ids, noise)
        q = self.critics.values(batch.observations, actions, batch.task_ids, frozen=True).mean(0)
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.detach().mean()

    def named(self) -> dict[str, Tensor]:
        out = {f"actor/{name}": value[None] for name, value in named(self.actor).items()}
        for part, critic in (("critic", self.critics), ("target_critic", self.targets)):
            out |= {f"{part}/{name}": value for name, value in critic.named_parameters()}
        return out | {"temperature/log_alpha": self.log_alpha}
