"""Stepping environments, and the seeds that they give their simulators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def actions_for(env: Any, count: int, seed: int = 0) -> Tensor:
    """[count, N, A] from -1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, env.num_envs, env.action_size, generator=generator) * 2 - 1


def rollout(env: Any, actions: Tensor) -> list[Any]:
    return [env.step_tensors(action) for action in actions]


def equal(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def started(env: Any, seed: int) -> tuple[Tensor, list[int]]:
    """Observations of a reset, and the seeds that the simulators of the slots are given in it."""
    seeds: list[int] = []
    holder, name = (env.venv, "_make") if hasattr(env.venv, "_make") else (env, "_start")
    start = getattr(holder, name)

    def noting(*given: list[int], **named: list[int]) -> Any:
        seeds.extend(*given, *named.values())
        return start(*given, **named)

    setattr(holder, name, noting)
    try:
        return env.reset_tensors(seed), seeds
    finally:
        setattr(holder, name, start)
