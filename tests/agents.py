"""A small agent, and transitions for it, that tests of updates share. All numbers come from seeds."""

from __future__ import annotations

from typing import Any

import torch

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, Noise

OBSERVATION, ACTION = 5, 2
SIZES: dict[str, Any] = {
    "critic": CriticConfig(width=24, num_atoms=21, embedding_size=4),
    "actor": ActorConfig(width=16),
}


def agent(tasks: int = 1, **options: Any) -> BRC:
    return BRC(OBSERVATION, ACTION, tasks, **{**SIZES, **options})


def batches(
    updates: int,
    rows: int,
    tasks: int = 1,
    *,
    seed: int = 0,
    observation: int = OBSERVATION,
    action: int = ACTION,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Batch:
    """[U, B, ..] transitions, a tenth of which end an episode: the same numbers in every dtype."""
    rng = torch.Generator().manual_seed(seed)
    normal = [torch.randn(updates, rows, n, generator=rng) for n in (observation, action, observation)]
    masks = (torch.rand(updates, rows, generator=rng) > 0.1).float()
    ids = torch.randint(tasks, (updates, rows), generator=rng)
    rewards = torch.randn(updates, rows, generator=rng)
    observations, actions, rewards, masks, successors = (
        x.to(device, dtype) for x in (normal[0], normal[1].tanh(), rewards, masks, normal[2])
    )
    return Batch(observations, actions, rewards, masks, successors, ids.to(device))


def noises(
    updates: int,
    rows: int,
    *,
    seed: int = 1,
    action: int = ACTION,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Noise:
    """The noise [U, B, A] of the next actions and of the actor's, for the same number of transitions."""
    rng = torch.Generator().manual_seed(seed)
    next_action, action_noise = torch.randn(2, updates, rows, action, generator=rng).to(device, dtype)
    return Noise(next_action, action_noise)
