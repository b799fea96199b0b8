"""Whole updates through the kernels are those of the twins: thirty in float64, twenty in float32."""

from __future__ import annotations

import pytest
import torch
from agents import agent, batches, noises
from torch import Tensor

from brc_fast import kernels

pytestmark = pytest.mark.gpu
UPDATES, ROWS = 10, 16
# In float32 two ways of rounding drift apart over many updates; in float64 they do not.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def learn(
    choice: str, device: str, dtype: torch.dtype, calls: int
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Parameters after calls of ten updates of a two-task agent, and the metrics after each call."""
    one, place = agent(2, device=device, dtype=dtype), {"device": device, "dtype": dtype}
    metrics = []
    with kernels.use(choice):
        for call in range(calls):
            data = batches(UPDATES, ROWS, 2, seed=call, **place)
            metrics.append(one.update(data, noises(UPDATES, ROWS, seed=-1 - call, **place)))
    parameters = [*one.critic.parameters(), *one.target_critic.parameters(), *one.actor.parameters()]
    return [p.detach() for p in (*parameters, one.temperature.log_alpha)], metrics


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
