"""Whole updates through the kernels are those of the twins: thirty in float64, twenty in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, Noise, kernels

pytestmark = pytest.mark.gpu
UPDATES, ROWS = 10, 16
# In float32 two ways of rounding drift apart over many updates; in float64 they do not.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def learn(
    choice: str, device: str, dtype: torch.dtype, calls: int
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Parameters after calls of ten updates of a two-task agent, and the metrics after each call."""
    sizes = {"critic": CriticConfig(width=24, num_atoms=21, embedding_size=4), "actor": ActorConfig(width=16)}
    agent = BRC(5, 2, 2, **sizes, device=device, dtype=dtype)
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(UPDATES, ROWS, *shape, generator=rng, dtype=torch.float64).to(device, dtype)

    metrics = []
    with kernels.use(choice):
        for _ in range(calls):
            masks = (torch.rand(UPDATES, ROWS, generator=rng) > 0.1).to(device, dtype)
            ids = torch.randint(2, (UPDATES, ROWS), generator=rng).to(device)
            batches = Batch(normal(5), normal(2).tanh(), normal(), masks, normal(5), ids)
            metrics.append(agent.update(batches, Noise(normal(2), normal(2))))
    parameters = [*agent.critic.parameters(), *agent.target_critic.parameters(), *agent.actor.parameters()]
    return [p.detach() for p in (*parameters, agent.temperature.log_alpha)], metrics


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float64, 3), (torch.float32, 2)], ids=str)
def test_updates_give_the_losses_and_parameters_of_the_twins(
    kernel_device: str, dtype: torch.dtype, calls: int
) -> None:
    """Thirty updates in float64, twenty in float32."""
    ours, mine = learn("triton", kernel_device, dtype, calls)
    twins, theirs = learn("reference", kernel_device, dtype, calls)
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
            torch.testing.assert_close(
                a[name], b[name], **close, msg=lambda told, name=name: f"{name}: {told}"
            )
    for a, b in zip(ours, twins, strict=True):
        assert (a - b).norm() <= TOLERANCE[dtype] * b.norm() + TOLERANCE[dtype]
    assert (ours[-1].exp() - 0.1).abs() > 5e-4  # the temperature has left its start: steps were made
