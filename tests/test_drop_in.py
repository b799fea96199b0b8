"""The critic in other people's programs: what traces it, wraps it, loads it, or gives it what it cannot take."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brc_fast import ActorConfig, Critic, CriticConfig
from brc_fast.nn.modules import Actor

CONFIG = CriticConfig(width=16, num_atoms=21, embedding_size=4, v_max=5.0)


class Method(nn.Module):
    """A method of the critic as a module of its own, as exporters want it."""

    def __init__(self, critic: Critic, name: str) -> None:
        super().__init__()
        self.critic, self.name = critic, name

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(self.critic, self.name)(*inputs)


@pytest.mark.parametrize("graded", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("how", ["embedding", "heads", "one_hot"])
def test_a_trace_computes_what_the_critic_does_for_other_inputs_and_batches(how: str, graded: bool) -> None:
    """The compiled passes of a CPU write through addresses, which a tracer does not see."""
    sizes = {} if how == "embedding" else {"embedding_size": 32}
    critic = Critic(5, 2, 3, CriticConfig(width=16, num_atoms=21, conditioning=how, **sizes))
    given = torch.randn(8, 5), torch.rand(8, 2), torch.arange(8) % 3
    other = torch.randn(5, 5), torch.rand(5, 2), torch.arange(5) % 3
    module = Method(critic, "values")
    with warnings.catch_warnings(), torch.set_grad_enabled(graded):
        warnings.simplefilter("ignore")  # of sizes that are constants
        traced = torch.jit.trace(module, given)
        torch.testing.assert_close(traced(*other), module(*other), rtol=1e-4, atol=1e-5)
    torch.jit.save(traced, io.BytesIO())  # which Python functions of a graph do not let it
    assert "brc_fast::" not in str(traced.inlined_graph)  # it runs where this package is not
    if graded:
        traced(*other).sum().backward()
        gradients = [p.grad for p in critic.parameters()]
        critic.zero_grad()
        module(*other).sum().backward()
        for mine, p in zip(gradients, critic.parameters(), strict=True):
            torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-5)


def test_a_traced_policy_computes_what_the_policy_does() -> None:
    tasks = Critic(5, 2, config=CONFIG).conditioning
    actor = Actor(5, 2, ActorConfig(width=16), tasks)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(actor, (torch.randn(8, 5),))
        torch.jit.save(traced, io.BytesIO())
        seen = torch.randn(3, 5)
        for mine, wanted in zip(traced(seen), actor(seen), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
