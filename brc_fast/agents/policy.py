"""Acting, with the newest policy or with one that lags behind the learner, so that both may run at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from brc_fast import kernels
from brc_fast.batch import Batch
from brc_fast.learner.finite import require_finite
from brc_fast.nn.inputs import ObservationStatistics
from brc_fast.nn.modules import Actor, Critic

if TYPE_CHECKING:
    from .brc import BRC


class Acting:
    """What an agent with a tanh-Gaussian policy and a critic gives to whoever steps environments."""

    actor: Actor
    critic: Critic
    observation_size: int
    action_size: int
    privileged_size: int
    num_tasks: int
    device: str
    dtype: torch.dtype
    generator: Generator

    observations: ObservationStatistics | None

    normal: Callable[..., Tensor]

    def sensed(self, observations: Tensor) -> Tensor:
        """What the policy sees [..., O] of what the critic sees [..., O + P]."""
        return observations[..., : self.observation_size] if self.privileged_size else observations

    def normalized(self, observations: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """What the networks are given for what the policy sees [..., O], or the critic [..., O + P]."""
        statistics = self.observations
        return observations if statistics is None else statistics.normalize(observations, task_ids)

    def policy(
        self,
        observations: Tensor,
        task_ids: Tensor | None = None,
        lagged: tuple[Actor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std [B, A] for observations [B, O] as environments give them; the online critic's
        embedding is read, and gets no gradient."""
        if observations.shape[-1:] != (self.observation_size,):
            told = f"[N, {self.observation_size}], got {list(observations.shape)}"
            if self.privileged_size:
                told += f"; the {self.privileged_size} privileged numbers are for the critic alone"
            raise ValueError(f"observations must have shape [N, O] = {told}")
        observations = self.normalized(observations, task_ids)
        table = None if self.critic.table is None else self.critic.table.detach()
        actor, table = (self.actor, table) if lagged is None else lagged
        x = kernels.pack_inputs(observations, None, table, task_ids, self.critic.embedding_norm)
        return actor(x, task_ids)  # type: ignore[no-any-return]

    @torch.no_grad()
    def act(
        self,
        observations: Tensor,
        task_ids: Tensor | None = None,
        deterministic: bool = False,
        lagged: tuple[Actor, Tensor | None] | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Actions [N, A] in [-1, 1] for observations [N, O]: a sample, or the mean's tanh. What is privileged
        has no place in them: ValueError for another number of columns.

        Args:
            task_ids: [N] int64, in [0, T), on the agent's device like observations; needed with T > 1.
            generator: of the sample's noise, on the agent's device; the agent's own when not given.
            lagged: the actor and embedding to act with in place of the newest (LaggedPolicy).
        """
        mean, raw_log_std = self.policy(observations, task_ids, lagged)
        if deterministic:
            return mean.tanh()
        own = generator is None
        noise = self.normal(*mean.shape) if own else torch.empty_like(mean).normal_(generator=generator)
        return kernels.tanh_gaussian(mean, raw_log_std, noise)[0]

    def random_actions(self, number: int) -> Tensor:
        """Uniform actions [number, A] in [-1, 1]."""
        shape = (number, self.action_size)
        return torch.rand(shape, generator=self.generator, device=self.device, dtype=self.dtype) * 2.0 - 1.0

    @torch.no_grad()
    def value(self, observations: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """Q of the mean action, averaged over members, in units of the scaled return, of what the critic
        sees: [N, O + P] -> [N]."""
        actions = self.act(self.sensed(observations), task_ids, deterministic=True)
        return self.critic.values(self.normalized(observations, task_ids), actions, task_ids).mean(0)

    @torch.no_grad()
    def entropy_per_task(self, batch: Batch) -> Tensor:
        """Mean of -log pi over a batch's rows of each task, [T]; zero for a task without rows."""
        mean, raw_log_std = self.policy(self.sensed(batch.observations), batch.task_ids)
        log_probs = kernels.tanh_gaussian(mean, raw_log_std, self.normal(*mean.shape))[1]
        total = torch.zeros(self.num_tasks, device=mean.device, dtype=mean.dtype)
        rows = total.clone().index_add_(0, batch.task_ids, torch.ones_like(log_probs))
        return total.index_add_(0, batch.task_ids, -log_probs) / rows.clamp_min(1)


class LaggedPolicy:
    """The policy as it was before the newest call of `agent.update`."""

    def __init__(self, agent: BRC) -> None:
        self.agent = agent
        self.actor = copy.deepcopy(agent.actor).requires_grad_(False)
        table = agent.critic.table
        self.table = None if table is None else table.detach().clone()
        self._taken = agent.updates.event()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the parameters over; to be called in the learner's stream, before `update`."""
        for mine, newest in zip(self.actor.parameters(), self.agent.actor.parameters(), strict=True):
            mine.copy_(newest)
        if self.table is not None:
            table = self.agent.critic.table
            assert table is not None
            self.table.copy_(table)
        if self._taken is not None:
            self._taken.record(torch.cuda.current_stream(self.agent.device))

    def act(self, observations: Tensor, task_ids: Tensor) -> Tensor:
        """As `agent.act`; it waits for `refresh`, and for no update after it."""
        if self._taken is not None:
            self._taken.wait(torch.cuda.current_stream(self.agent.device))
        return self.agent.act(observations, task_ids, lagged=(self.actor, self.table))

    def state_dict(self) -> dict[str, Tensor]:
        """Its parameters, and the embedding where there is one."""
        out = dict(self.actor.state_dict())
        return out if self.table is None else {**out, "embedding": self.table}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a `state_dict`; ValueError names the first entry that does not fit."""
        for name, mine in self.state_dict().items():
            if state[name].shape != mine.shape:
                wanted, got = list(mine.shape), list(state[name].shape)
                raise ValueError(f"lagged policy {name} must have shape {wanted}, got {got}")
            require_finite(f"lagged policy {name}", state[name])
        for name, mine in self.state_dict().items():
            mine.copy_(state[name])
