"""The networks' passes of one update over B rows, in memory that stays from update to update."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .flat import FlatNetworks
from .networks import Actor, Critic, padded


class Passes:
    """Forward and backward of actor and critics; gradients go to the flat buffers of the networks.

    Args:
        actors: [actor]. critics: [critic, its target]. The modules themselves hold what is not their body.
        rows: B. recompute: of the critics' activations in the backward pass (kernels.BroNetPlan).

    Attributes:
        actor: of the policy. critics: of online and target networks, where the online ones get gradients.
        critic: of the online ones, frozen; it uses the memory of `critics`.
        dhead, policy_gradient: gradient of the actor's outputs [1, B, 2 A, padded]; its halves [B, A].
    """

    def __init__(
        self,
        actor: Actor,
        critic: Critic,
        actors: FlatNetworks,
        critics: FlatNetworks,
        rows: int,
        recompute: bool = False,
    ) -> None:
        self.embedding, self.norm = critic.embedding, critic.embedding_norm
        self.input_sizes = tuple(net.body.input.kernel.shape[1] for net in (actor, critic))
        self.dtype = actors.grad.dtype
        plan, gradients = critic.body.plan, critics.arrays(critics.grad)
        self.actor = actor.body.plan(actors.ordered(1), rows, actors.arrays(actors.grad))
        self.critics = plan(critics.ordered(2), rows, gradients, recompute=recompute)
        self.critic = plan(critics.ordered(1), rows, share=self.critics)
        self.actions = actor.body.head.kernel.shape[-1] // 2
        self.dhead = torch.zeros_like(self.actor.out)
        self.policy_gradient = self._halves(self.dhead)
        self._embedding_gradient = None
        if self.embedding is not None:
            self._embedding_gradient = critics.part(critics.grad, "embedding")[0]

    def _halves(self, head: Tensor) -> tuple[Tensor, Tensor]:
        return head[0, :, : self.actions], head[0, :, self.actions : 2 * self.actions]

    def policy(self, observations: Tensor, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std [B, A] at observations [B, O], overwritten by the next call."""
        x = kernels.pack_inputs(
            observations,
            None,
            self.embedding,
            task_ids,
            self.norm,
            width=padded(self.input_sizes[0]),
            dtype=self.dtype,
        )
        return self._halves(self.actor.forward(x))

    def critic_input(self, critic: Critic, observations: Tensor, actions: Tensor, task_ids: Tensor) -> Tensor:
        """[B, I, padded], with the embedding of this critic."""
        return kernels.pack_inputs(
            observations,
            actions,
            critic.embedding,
            task_ids,
            self.norm,
            width=padded(self.input_sizes[1]),
            dtype=self.dtype,
        )

    def embedding_gradient(self, dx: Tensor, task_ids: Tensor) -> None:
        """Leave the task embedding's gradient, from that of the critic's input [B, I, padded]."""
        if self.embedding is None:
            return
        size = self.embedding.shape[1]
        first = self.input_sizes[1] - size
        kernels.normalized_embedding_backward(
            dx[:, first : first + size], self.embedding, task_ids, self.norm, out=self._embedding_gradient
        )
