"""Evaluation: the policy's mean action, exactly n episodes per task."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .agent import BRC
from .envs.base import VectorEnvironment, check_finite


def evaluate(agent: BRC, env: VectorEnvironment, seed: int) -> NDArray[np.float64]:
    """Undiscounted returns [T, n] of the first episode in every slot of `env`, n slots per task.

    One episode per slot, and every slot's episode counts: none is favoured for being short.
    """
    observations = env.reset_tensors(seed)
    task_ids = torch.as_tensor(env.task_ids, device=agent.device)
    returns = np.zeros(env.num_envs)
    running = np.ones(env.num_envs, bool)
    number = 0
    while running.any():
        actions = agent.act(observations.to(agent.device), task_ids, deterministic=True)
        step = env.step_tensors(actions)
        number += 1
        check_finite(step, env, number)
        returns[running] += step.rewards.cpu().numpy()[running]
        running &= ~(step.terminated | step.truncated).cpu().numpy()
        observations = step.observations
    return returns.reshape(len(env.task_names), -1)


def summary(task_names: tuple[str, ...], returns: NDArray[np.float64]) -> dict[str, float]:
    """`eval/return/<task>`, the mean over its episodes, and `eval/return_mean`, over tasks."""
    means = returns.mean(1)
    row = {f"eval/return/{name}": float(mean) for name, mean in zip(task_names, means, strict=True)}
    return {**row, "eval/return_mean": float(means.mean())}
