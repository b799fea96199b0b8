"""How networks tell tasks apart: columns of their inputs, output layers of their own, or not at all.

To add a way, write a class with these methods and `register` it.

Dims: T tasks, N networks, B rows, K outputs of a network at a row.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from brc_fast import config as names
from brc_fast.config import CriticConfig, require_known
from brc_fast.errors import InputError

__all__ = ["CONDITIONINGS", "Conditioning", "Embedding", "Heads", "OneHot", "make", "register"]


class Conditioning:
    """None: every task is given the same networks.

    Attributes:
        columns: of the inputs, behind observation and action. heads: output layers of a network.
        trained: whether the columns are a parameter of the critic.
    """

    columns = 0
    heads = 1
    trained = False

    def __init__(self, config: CriticConfig, num_tasks: int) -> None:
        self.num_tasks, self.norm = num_tasks, config.embedding_norm

    def table(self, generator: Generator | None) -> Tensor | None:
        """The first rows [T, columns] of what goes into the inputs, by task, each divided by its norm,
        so none may be zero."""
        return None

    def choose(self, out: Tensor, task_ids: Tensor | None, outputs: int) -> Tensor:
        """What networks put out for each row's task: [N, B, heads * K, perhaps padded] -> [N, B, K]."""
        return out[..., :outputs]

    def scatter(self, dout: Tensor, task_ids: Tensor | None, columns: int) -> Tensor:
        """The gradient of the whole output, [N, B, columns], from that of what `choose` gave, [N, B, K] or,
        with one head, [N, B, columns] already."""
        return dout


class Embedding(Conditioning):
    """BRC's: a learned vector of each task, normalized, that the critic trains."""

    def __init__(self, config: CriticConfig, num_tasks: int) -> None:
        super().__init__(config, num_tasks)
        self.trained = num_tasks > 1
        self.columns = config.embedding_size if self.trained else 0

    def table(self, generator: Generator | None) -> Tensor | None:
        if not self.trained:
            return None
        rows = torch.empty(self.num_tasks, self.columns)
        return rows if rows.is_meta else rows.normal_(generator=generator).div_(math.sqrt(self.columns))


class OneHot(Conditioning):
    """One column for each task."""

    def __init__(self, config: CriticConfig, num_tasks: int) -> None:
        super().__init__(config, num_tasks)
        self.columns = num_tasks if num_tasks > 1 else 0

    def table(self, generator: Generator | None) -> Tensor | None:
        return torch.eye(self.num_tasks) if self.columns else None


class Heads(Conditioning):
    """An output layer for each task."""

    def __init__(self, config: CriticConfig, num_tasks: int) -> None:
        super().__init__(config, num_tasks)
        if num_tasks < 2:
            raise InputError("conditioning heads needs several tasks, got one: with one task use embedding")
        self.heads = num_tasks

    def _places(self, task_ids: Tensor | None, outputs: int, networks: int) -> Tensor:
        if task_ids is None:
            raise ValueError("task_ids [B] are needed with an output layer per task, got None")
        own = torch.arange(outputs, device=task_ids.device)
        return (task_ids[:, None] * outputs + own).expand(networks, -1, -1)

    def choose(self, out: Tensor, task_ids: Tensor | None, outputs: int) -> Tensor:
        return out.gather(-1, self._places(task_ids, outputs, len(out)))

    def scatter(self, dout: Tensor, task_ids: Tensor | None, columns: int) -> Tensor:
        whole = dout.new_zeros(*dout.shape[:-1], columns)
        return whole.scatter_(-1, self._places(task_ids, dout.shape[-1], len(dout)), dout)


CONDITIONINGS: dict[str, type[Conditioning]] = {
    "embedding": Embedding,
    "heads": Heads,
    "one_hot": OneHot,
    "none": Conditioning,
}


def register(name: str, conditioning: type[Conditioning]) -> None:
    """Let configurations name a way."""
    CONDITIONINGS[name] = conditioning
    names.CONDITIONINGS.append(name)


def make(config: CriticConfig, num_tasks: int) -> Conditioning:
    """The way that a config names; InputError, with the names there are, for another."""
    require_known("conditioning", config.conditioning, CONDITIONINGS)
    return CONDITIONINGS[config.conditioning](config, num_tasks)
