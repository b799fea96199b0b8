"""The networks' passes of one update over B rows, in memory that stays from update to update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from brc_fast import kernels
from brc_fast.batch import Batch
from brc_fast.learner.flat import FlatNetworks
from brc_fast.nn.modules import Actor, Critic, padded


class Sample(NamedTuple):
    """Of the policy at B observations: what it says, the noise, and what comes of both."""

    mean: Tensor  # [B, A], overwritten by the next pass, as raw_log_std is
    raw_log_std: Tensor  # [B, A]
    noise: Tensor  # [B, A]
    actions: Tensor  # [B, A]
    log_probs: Tensor  # [B]


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
        self.embedding = None if critic.embedding is None else critic.embedding.detach()
        self.norm = critic.embedding_norm
        self.input_sizes = tuple(net.body.input.kernel.shape[1] for net in (actor, critic))
        self.dtype = actors.grad.dtype
        plan, gradients = critic.body.plan, critics.arrays(critics.grad)
        # without an embedding, which the critic's step moves, both samples of an update are one pass
        both = rows if self.embedding is not None else 2 * rows
        into = actors.arrays(actors.grad)
        self.actor = actor.body.plan(actors.ordered(1), both, into, trained_rows=rows)
        self.critics = plan(critics.ordered(2), rows, gradients, recompute=recompute)
        self.critic = plan(critics.ordered(1), rows, share=self.critics)
        self.actions = actor.body.head.kernel.shape[-1] // 2
        self.dhead = torch.zeros_like(self.actor.out[:, -rows:])
        self.policy_gradient = self._halves(self.dhead)
        size = 0 if self.embedding is None else self.embedding.shape[1]
        self._action_columns = self._columns(self.input_sizes[0] - size, self.actions)
        self._embedding_columns = self._columns(self.input_sizes[1] - size, size)
        self._embedding_gradient: Tensor | None = None
        if self.embedding is not None:
            self._embedding_gradient = critics.part(critics.grad, "embedding")[0]

    def _halves(self, head: Tensor) -> tuple[Tensor, Tensor]:
        return head[0, :, : self.actions], head[0, :, self.actions : 2 * self.actions]

    def _columns(self, first: int, size: int) -> tuple[slice, slice]:
        """Columns of the critics' input, a multiple of PAD, that hold these; and these among them."""
        start = min(first, padded(self.input_sizes[1]) - padded(size))
        return slice(start, start + padded(size)), slice(first - start, first - start + size)

    def samples(self, batch: Batch, noise: Tensor) -> Iterator[Sample]:
        """The policy's sample at the next observations, and then, the last before `backward`, at the
        observations; with a task embedding only when it is asked for.

        Args:
            noise: [2, B, A], contiguous, of the one and of the other.
        """
        observations = batch.next_observations, batch.observations
        if self.embedding is not None:
            for x, part in zip(observations, noise.unbind(), strict=True):
                yield self._sample(self._policy_input(x, batch.task_ids), part)
            return
        rows = batch.rewards.shape[0]
        x = noise.new_empty(2 * rows, padded(self.input_sizes[0]), dtype=self.dtype)
        for part, place in zip(observations, x.chunk(2), strict=True):
            self._policy_input(part, batch.task_ids, place)
        both = self._sample(x, noise.view(2 * rows, -1))
        for half in (slice(rows), slice(rows, None)):
            yield Sample(*(value[half] for value in both))

    def _policy_input(self, observations: Tensor, task_ids: Tensor, out: Tensor | None = None) -> Tensor:
        return kernels.pack_inputs(
            observations,
            None,
            self.embedding,
            task_ids,
            self.norm,
            width=padded(self.input_sizes[0]),
            dtype=self.dtype,
            out=out,
        )

    def _sample(self, x: Tensor, noise: Tensor) -> Sample:
        mean, raw_log_std = self._halves(self.actor.forward(x))
        return Sample(mean, raw_log_std, noise, *kernels.tanh_gaussian(mean, raw_log_std, noise))

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

    def critics_backward(self, dlogits: Tensor, task_ids: Tensor) -> None:
        """Leave the gradients of the online critics and of the task embedding, from that of their logits."""
        if self.embedding is None:
            self.critics.backward(dlogits)
            return
        columns, own = self._embedding_columns
        dx = self.critics.backward(dlogits, columns)
        assert dx is not None
        kernels.normalized_embedding_backward(
            dx[..., own], self.embedding, task_ids, self.norm, out=self._embedding_gradient
        )

    def actions_gradient(self, dlogits: Tensor) -> Tensor:
        """[E, B, A], of the actions to each online critic, from the gradient of what `critic` returned."""
        columns, own = self._action_columns
        dx = self.critic.backward(dlogits, columns)
        assert dx is not None
        return dx[..., own]
