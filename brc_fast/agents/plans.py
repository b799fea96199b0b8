"""The networks of one update over B rows, in memory that stays from update to update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from brc_fast import kernels
from brc_fast.batch import Batch
from brc_fast.learner.flat import FlatNetworks
from brc_fast.learner.layout import padded
from brc_fast.nn.modules import Actor, Critic


class Sample(NamedTuple):
    """Mean, raw log-std and noise of B samples, with the actions and log-probabilities they give."""

    mean: Tensor  # [B, A], overwritten by the next pass, as raw_log_std is
    raw_log_std: Tensor  # [B, A]
    noise: Tensor  # [B, A]
    actions: Tensor  # [B, A]
    log_probs: Tensor  # [B]


class Columns:
    """Where columns of an input lie among those whose gradient is made, a multiple of 8 at a time."""

    def __init__(self, first: int, size: int, width: int) -> None:
        start = min(first, max(0, width - padded(size)))
        self.made, self.own = slice(start, start + padded(size)), slice(first - start, first - start + size)


class Plans:
    """Forward and backward of actor and critics; gradients go to the flat buffers of the networks.

    Args:
        actors: [actor]. critics: [critic, its target]. The modules themselves hold what is not their body.
        rows: B. recompute: of the critics' activations in the backward pass (kernels.Plan).

    Attributes:
        actor: of the policy. critics: of online and target networks, where the online ones get gradients.
        critic: of the online ones, frozen; it uses the memory of `critics`.
        columns: of what a critic puts out, padded.
        sensed: O, the first columns of observations, which are all that the policy reads.
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
        self.tasks, self.norm = critic.conditioning, critic.embedding_norm
        self.outputs, self.dtype = critic.loss.outputs, actors.grad.dtype
        self.table = None if critic.table is None else critic.table.detach()
        self.widths = tuple(
            n.layout.padded_inputs(m.body.inputs) for n, m in ((actors, actor), (critics, critic))
        )
        stages = critics.layout.padded_stages
        # without an embedding, which the critic's step moves, both samples of an update are one pass
        both = rows if self.tasks.trained else 2 * rows
        self.actor = kernels.Plan(
            actors.layout.padded_stages, actors.body(1), both, actors.gradients(), trained_rows=rows
        )
        self.critics = kernels.Plan(stages, critics.body(2), rows, critics.gradients(), recompute=recompute)
        self.critic = kernels.Plan(stages, critics.body(1), rows, share=self.critics)
        self.columns = self.critics.out.shape[-1]
        self.actions = critic.sizes["actions"]
        self.dhead = torch.zeros_like(self.actor.out[:, -rows:])  # gradient of the actor's outputs
        observed = critic.sizes["observations"]
        self.sensed = actor.body.inputs - self.tasks.columns
        self._action_columns = Columns(observed, self.actions, self.widths[1])
        self._task_columns = Columns(observed + self.actions, self.tasks.columns, self.widths[1])
        self._embedding_gradient = critics.named(critics.grad)["embedding"] if self.tasks.trained else None

    def all(self) -> tuple[kernels.Plan, ...]:
        return self.actor, self.critics, self.critic

    def _halves(self, head: Tensor) -> tuple[Tensor, Tensor]:
        return head[..., : self.actions], head[..., self.actions : 2 * self.actions]

    def samples(self, batch: Batch, noise: Tensor) -> Iterator[Sample]:
        """The policy's sample at the next observations, and then, the last before `backward`, at the
        observations; with a task embedding only when it is asked for.

        Args:
            noise: [2, B, A], contiguous, of the one and of the other.
        """
        seen = batch.next_observations, batch.observations
        observations = [x[..., : self.sensed] for x in seen]
        if self.tasks.trained:
            for x, part in zip(observations, noise.unbind(), strict=True):
                yield self._sample(self._policy_input(x, batch.task_ids), part, batch.task_ids)
            return
        rows = batch.rewards.shape[0]
        x = noise.new_empty(2 * rows, self.widths[0], dtype=self.dtype)
        for part, place in zip(observations, x.chunk(2), strict=True):
            self._policy_input(part, batch.task_ids, place)
        ids = batch.task_ids.repeat(2) if self.tasks.heads > 1 else batch.task_ids
        both = self._sample(x, noise.view(2 * rows, -1), ids)
        for half in (slice(rows), slice(rows, None)):
            yield Sample(*(value[half] for value in both))

    def _policy_input(self, observations: Tensor, task_ids: Tensor, out: Tensor | None = None) -> Tensor:
        return kernels.pack_inputs(
            observations,
            None,
            self.table,
            task_ids,
            self.norm,
            width=self.widths[0],
            dtype=self.dtype,
            out=out,
        )

    def _sample(self, x: Tensor, noise: Tensor, task_ids: Tensor) -> Sample:
        out = self.tasks.choose(self.actor.forward(x), task_ids, 2 * self.actions)
        mean, raw_log_std = self._halves(out[0])
        return Sample(mean, raw_log_std, noise, *kernels.tanh_gaussian(mean, raw_log_std, noise))

    def critic_input(self, critic: Critic, observations: Tensor, actions: Tensor, task_ids: Tensor) -> Tensor:
        """[B, I], padded, with the task columns of this critic."""
        return kernels.pack_inputs(
            observations,
            actions,
            critic.table,
            task_ids,
            self.norm,
            width=self.widths[1],
            dtype=self.dtype,
        )

    def choose(self, out: Tensor, task_ids: Tensor) -> Tensor:
        """Each row's own outputs, [E, B, K]."""
        return self.tasks.choose(out, task_ids, self.outputs)

    @property
    def gradient_columns(self) -> int:
        """Of the gradient that a loss makes of what `choose` gives."""
        return self.columns if self.tasks.heads == 1 else self.outputs

    def critics_backward(self, dout: Tensor, task_ids: Tensor) -> None:
        """Leave the gradients of the online critics and of the task embedding, from that of their outputs."""
        dout = self.tasks.scatter(dout, task_ids, self.columns)
        if not self.tasks.trained or self.table is None:
            self.critics.backward(dout)
            return
        dx = self.critics.backward(dout, self._task_columns.made)
        assert dx is not None
        kernels.normalized_embedding_backward(
            dx[..., self._task_columns.own], self.table, task_ids, self.norm, out=self._embedding_gradient
        )

    def actions_gradient(self, dout: Tensor, task_ids: Tensor) -> Tensor:
        """[E, B, A], of the actions to each online critic, from the gradient of what `critic` returned."""
        dx = self.critic.backward(self.tasks.scatter(dout, task_ids, self.columns), self._action_columns.made)
        assert dx is not None
        return dx[..., self._action_columns.own]

    def actor_backward(self, dactions: Tensor, sample: Sample, alpha: Tensor, task_ids: Tensor) -> None:
        """Leave the actor's gradients, from those of the actions and of mean_b alpha * log pi."""
        own = (
            self.dhead if self.tasks.heads == 1 else self.dhead.new_empty(1, len(task_ids), 2 * self.actions)
        )
        kernels.tanh_gaussian_backward(
            dactions,
            alpha,
            sample.mean,
            sample.raw_log_std,
            sample.noise,
            scale=1.0 / len(task_ids),
            out=self._halves(own[0]),
        )
        if self.tasks.heads > 1:
            own = self.tasks.scatter(own, task_ids, self.dhead.shape[-1])
        self.actor.backward(own)
