"""Several tasks stepped side by side, each group of slots by its own simulator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from brc_fast.errors import InputError
from brc_fast.spec import Spec

from .base import GymnasiumFace, Privileged, Seed, Step, VectorEnvironment


class Group(VectorEnvironment, Protocol):
    """An environment that can begin a step and be asked for it later."""

    metadata: dict[str, Any]  # Gymnasium's; "autoreset_mode" says how slots restart

    def launch(self, actions: Tensor) -> Any:
        """Begin a step with actions [N, A]."""

    def collect(self, launched: Any) -> Step:
        """Wait for it."""


class MultiTaskEnv(GymnasiumFace, VectorEnv[NDArray[np.float32], NDArray[np.float32], NDArray[Any]]):
    """Groups of slots of one or several tasks; slots are ordered by task, `task_ids` has the task of each.

    Vectors are zero-padded to the widest task, those of the critic alone too; of continuous actions each
    group reads as many as it has. Tasks whose observations or actions are of different kinds are refused with
    an InputError.
    All groups are launched before the first is waited for.
    """

    def __init__(
        self, groups: Sequence[Group], task_names: Sequence[str], seed: int = 0, quiet: bool = False
    ) -> None:
        self.groups = tuple(groups)
        self._quiet = quiet
        longest = [group.max_episode_steps for group in self.groups]
        self.max_episode_steps = None if None in longest else max(length for length in longest if length)
        slots_of: dict[str, NDArray[np.int64]] = {}  # task -> its slots, counted through all groups
        offset = 0
        for group in self.groups:
            for number, name in enumerate(group.task_names):
                slots_of[name] = offset + np.flatnonzero(group.task_ids == number)
            offset += group.num_envs
        order = np.concatenate([slots_of[name] for name in task_names])
        self._order = torch.from_numpy(order)
        ends = np.cumsum([group.num_envs for group in self.groups])[:-1]
        self._places = [  # a group's slots among ours
            torch.from_numpy(part) for part in np.split(np.argsort(order), ends)
        ]
        self._in_order = bool((order[1:] > order[:-1]).all())
        self.declare(
            Spec.joined([group.task_spec for group in self.groups], task_names),
            task_ids=np.repeat(np.arange(len(task_names)), [len(slots_of[name]) for name in task_names]),
            seed=seed,
            next_step=all(
                group.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP for group in self.groups
            ),
        )
        self.continues = np.concatenate([group.continues for group in self.groups])[order]

    @property
    def nan_count(self) -> NDArray[np.int64]:
        """Transitions lost since the last reset, [T]."""
        counts = {
            name: count
            for group in self.groups
            for name, count in zip(group.task_names, group.nan_count, strict=True)
        }
        return np.array([counts[name] for name in self.task_names], np.int64)

    def reset_tensors(self, seed: Seed) -> Tensor:
        self._compile()
        seeds: list[Seed] = [seed] * len(self.groups)
        if not (seed is None or isinstance(seed, int | np.integer)):
            seeds = [[seed[place] for place in places] for places in self._places]
        starts = zip(self.groups, seeds, strict=True)
        observations = self._padded([group.reset_tensors(given) for group, given in starts])
        self._note_newest()
        return observations

    def step_tensors(self, actions: Tensor) -> Step:
        actions = self.as_actions(actions)
        launched = []
        for group, places in zip(self.groups, self._places, strict=True):
            rows = actions[int(places[0]) : int(places[-1]) + 1] if self._in_order else actions[places]
            launched.append(group.launch(rows[:, : group.action_size] if rows.dim() > 1 else rows))
        steps = [group.collect(step) for group, step in zip(self.groups, launched, strict=True)]
        self._note_newest()
        observations, successors, *others = zip(*steps, strict=True)
        return Step(self._padded(observations), self._padded(successors), *map(self._joined, others))

    def _padded(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of all groups; vectors get the size of the widest."""
        widest = max(part.shape[-1] for part in parts)
        return self._joined([pad(part, (0, widest - part.shape[-1])) for part in parts])

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of all groups, on the device of the first, ordered by task."""
        device = parts[0].device
        rows = torch.cat([part.to(device) for part in parts])
        return rows if self._in_order else rows[self._order.to(device)]

    def _note_newest(self) -> None:
        """What the groups tell beside the newest step."""
        if self.task_spec.privileged is not None:
            nothing = (torch.zeros(group.num_envs, 0) for group in self.groups)
            seen = [
                group.privileged or Privileged(none, none)
                for group, none in zip(self.groups, nothing, strict=True)
            ]
            self.privileged = Privileged(*map(self._padded, zip(*seen, strict=True)))
        known = [group.successes for group in self.groups]
        if all(part is None for part in known):
            self.successes = None
            return
        no = (torch.zeros(group.num_envs, dtype=torch.bool) for group in self.groups)
        parts = [none if part is None else part.cpu() for part, none in zip(known, no, strict=True)]
        self.successes = self._joined(parts)

    def _compile(self) -> None:
        """Compile what is to be compiled on all cores at once: a compiler uses one."""
        waiting = [group for group in self.groups if hasattr(group, "compile")]
        if not waiting:
            return
        from . import _jax

        label = (
            f"compiling {sum(len(group.task_names) for group in waiting)} tasks as {len(waiting)} programs"
        )
        with _jax.progress(label, self._quiet), ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda group: group.compile(), waiting))

    def state_dict(self) -> dict[str, NDArray[Any]]:
        return {
            f"{group.task_names[0]}:{key}": value
            for group in self.groups
            for key, value in group.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> Tensor:
        parts: dict[str, dict[str, NDArray[Any]]] = {group.task_names[0]: {} for group in self.groups}
        for key, value in state.items():
            name, _, rest = key.rpartition(":")
            if name not in parts:
                raise InputError(
                    f"the saved state holds {key!r}, which belongs to none of the tasks {', '.join(parts)}"
                )
            parts[name][rest] = value
        self._compile()
        loaded = zip(self.groups, parts.values(), strict=True)
        observations = self._padded([group.load_state_dict(part) for group, part in loaded])
        self._note_newest()
        return observations

    def close_extras(self, **kwargs: Any) -> None:
        for group in self.groups:
            group.close()
