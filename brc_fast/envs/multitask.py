"""Several tasks stepped side by side, each by its own compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from brc_fast.errors import InputError

from .base import GymnasiumFace, Step
from .mjx import MJXVectorEnv


class MultiTaskEnv(GymnasiumFace, VectorEnv[NDArray[np.float32], NDArray[np.float32], NDArray[Any]]):
    """T groups of slots, one per task: slots are ordered by task, `task_ids` tells which belongs to which.

    Observations are zero-padded to the widest task; of the actions each group reads as many as it has.
    All groups are launched before the first is waited for.
    """

    def __init__(self, groups: Sequence[MJXVectorEnv], seed: int = 0) -> None:
        self.groups = tuple(groups)
        self.max_episode_steps = max(group.max_episode_steps for group in self.groups)
        sizes = [group.num_envs for group in self.groups]
        self._ends = np.cumsum(sizes).tolist()
        self.declare(
            task_names=tuple(group.task_names[0] for group in self.groups),
            task_ids=np.repeat(np.arange(len(sizes)), sizes),
            observation_size=max(group.observation_size for group in self.groups),
            action_size=max(group.action_size for group in self.groups),
            seed=seed,
        )

    @property
    def nan_count(self) -> NDArray[np.int64]:
        """Transitions dropped since the last reset, [T]."""
        return np.concatenate([group.nan_count for group in self.groups])

    def reset_tensors(self, seed: int | None) -> Tensor:
        return self._padded([group.reset_tensors(seed) for group in self.groups])

    def step_tensors(self, actions: Tensor) -> Step:
        actions = self.as_actions(actions)
        launched = [
            group.launch(actions[end - group.num_envs : end, : group.action_size])
            for group, end in zip(self.groups, self._ends, strict=True)
        ]
        steps = [group.collect(step) for group, step in zip(self.groups, launched, strict=True)]
        observations, successors, *others = zip(*steps, strict=True)
        return Step(self._padded(observations), self._padded(successors), *map(torch.cat, others))

    def _padded(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(part, (0, self.observation_size - part.shape[1])) for part in parts])

    def state_dict(self) -> dict[str, NDArray[Any]]:
        return {
            f"{name}/{key}": value
            for name, group in zip(self.task_names, self.groups, strict=True)
            for key, value in group.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> Tensor:
        parts: dict[str, dict[str, NDArray[Any]]] = {name: {} for name in self.task_names}
        for key, value in state.items():
            suite, name, rest = [*key.split("/", 2), "", ""][:3]
            if f"{suite}/{name}" not in parts:
                raise InputError(
                    f"the saved state holds {key!r}, which belongs to none of the tasks {', '.join(parts)}"
                )
            parts[f"{suite}/{name}"][rest] = value
        loaded = zip(self.groups, parts.values(), strict=True)
        return self._padded([group.load_state_dict(part) for group, part in loaded])

    def close_extras(self, **kwargs: Any) -> None:
        for group in self.groups:
            group.close()
