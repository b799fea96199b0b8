"""Acting with a policy that lags behind the learner, so that both may run at once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .brc import BRC


class LaggedPolicy:
    """The policy as it was before the newest call of `agent.update`."""

    def __init__(self, agent: BRC) -> None:
        self.agent = agent
        self.actor = copy.deepcopy(agent.actor).requires_grad_(False)
        table = agent.critic.embedding
        self.table = None if table is None else table.detach().clone()
        self._taken = agent.updates.event()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the parameters over; to be called in the learner's stream, before `update`."""
        for mine, newest in zip(self.actor.parameters(), self.agent.actor.parameters(), strict=True):
            mine.copy_(newest)
        if self.table is not None:
            assert self.agent.critic.embedding is not None
            self.table.copy_(self.agent.critic.embedding)
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
            mine.copy_(state[name])
