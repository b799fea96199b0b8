"""What a training run keeps on disk, to go on from as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from brc_fast.agents.brc import BRC
from brc_fast.agents.normalizer import RewardNormalizer
from brc_fast.agents.policy import LaggedPolicy
from brc_fast.replay import ReplayBuffer

from .checkpoint import Arrays, RunFolder, grouped, prefixed
from .metrics import EpisodeTracker


class Trainer(Protocol):
    """What of a training run is kept; see train.Trainer."""

    env: Any
    agent: BRC
    lagged: LaggedPolicy | None
    replay: ReplayBuffer
    normalizer: RewardNormalizer
    episodes: EpisodeTracker
    steps: int
    updates: int
    entropies: Tensor | None
    observations: Tensor | None


def save(trainer: Trainer, folder: RunFolder) -> None:
    """Write a checkpoint from which `load` goes on."""
    normalizer, episodes = trainer.normalizer.state_dict(), trainer.episodes.state_dict()
    progress = prefixed(normalizer=normalizer, episodes=episodes)
    progress["updates"] = np.array(trainer.updates)
    if trainer.entropies is not None:
        progress["entropies"] = trainer.entropies.cpu().numpy()
    agent = {name: value.cpu().numpy() for name, value in trainer.agent.state_dict().items()}
    parts: dict[str, Arrays] = {"agent": agent, "environments": trainer.env.state_dict()}
    if trainer.lagged is not None:
        lagged = trainer.lagged.state_dict()
        parts["lagged_policy"] = {name: value.cpu().numpy() for name, value in lagged.items()}
    folder.save(trainer.steps, {**parts, "progress": progress}, trainer.replay)


def load(trainer: Trainer, folder: RunFolder) -> None:
    """Go on from a folder's newest checkpoint; InputError if it does not fit this run."""
    names = ("agent", "environments", "progress")
    lagged = ("lagged_policy",) if trainer.lagged is not None else ()
    trainer.steps, parts = folder.load(*names, *lagged)
    with folder.fitting():
        trainer.agent.load_state_dict({k: torch.from_numpy(v) for k, v in parts["agent"].items()})
        if trainer.lagged is not None:
            trainer.lagged.load_state_dict(
                {k: torch.from_numpy(v) for k, v in parts["lagged_policy"].items()}
            )
        progress = parts["progress"]
        trainer.normalizer.load_state_dict(grouped(progress, "normalizer"))
        trainer.episodes.load_state_dict(grouped(progress, "episodes"))
        trainer.updates = int(progress["updates"])
        if trainer.entropies is not None:
            trainer.entropies = torch.from_numpy(progress["entropies"]).to(trainer.agent.device)
        trainer.observations = trainer.env.load_state_dict(parts["environments"])
    folder.load_replay(trainer.replay)  # last: what fits the rest and not this is damaged
    trainer.episodes.forget(~trainer.env.continues)
    trainer.normalizer.forget(~trainer.env.continues)


def require_finite(trainer: Trainer, folder: RunFolder) -> None:
    """FloatingPointError that says what stopped being finite, since when, and which checkpoint is good."""
    trainer.agent.updates.join()
    try:
        trainer.agent.check_finite()
    except FloatingPointError as error:
        kept = folder.steps()
        told = f"the checkpoint of step {kept[-1]} is good" if kept else "there is no checkpoint yet"
        raise FloatingPointError(f"{error}, at or before step {trainer.steps}; {told}") from error


@contextmanager
def learner_first(trainer: Trainer, folder: RunFolder) -> Iterator[None]:
    """Before environments or replay are blamed for what they were given, ask whether the learner broke."""
    try:
        yield
    except ValueError:
        require_finite(trainer, folder)
        raise
