"""The matrix products of one update of `brc_fast.BRC`, listed layer by layer: the floor of its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from workloads import Workload

from brc_fast import ActorConfig, CriticConfig


class Product(NamedTuple):
    """[rows, inner] by [inner, columns] of n networks; `kind` says what is transposed as it lies there:
    "xw" nothing, "xg" (a gradient of weights) the left, "gw" (of inputs) the right."""

    kind: str
    networks: int
    rows: int
    inner: int
    columns: int


class Net(NamedTuple):
    """A stack of equal networks over B rows."""

    rows: int
    inputs: int
    width: int
    depth: int
    outputs: int

    def forward(self, networks: int, inputs: int = 1) -> Iterator[Product]:
        """`inputs`: how many there are, each for an equal share of the networks."""
        yield from [Product("xw", networks // inputs, self.rows, self.inputs, self.width)] * inputs
        yield from [Product("xw", networks, self.rows, self.width, self.width)] * (2 * self.depth)
        yield Product("xw", networks, self.rows, self.width, self.outputs)

    def backward(self, networks: int, weights: bool, columns: int = 0) -> Iterator[Product]:
        """From the head down; `columns` of the input get a gradient."""
        for outer in [self.outputs, *[self.width] * (2 * self.depth)]:
            if weights:
                yield Product("xg", networks, self.width, self.rows, outer)
            yield Product("gw", networks, self.rows, outer, self.width)
        if weights:
            yield Product("xg", networks, self.inputs, self.rows, self.width)
        if columns:
            yield Product("gw", networks, self.rows, self.width, columns)


def configs(work: Workload) -> tuple[CriticConfig, ActorConfig]:
    return CriticConfig(width=work.width), ActorConfig(width=min(work.width, 256))


def padded(size: int) -> int:
    """Rows of the first kernel, and columns of the head, are multiples of 8."""
    return -(-size // 8) * 8


def products(work: Workload) -> list[Product]:
    """Every matrix product of one update, forward and backward."""
    (config, policy), action = configs(work), work.action
    table = config.embedding_size if work.tasks > 1 else 0
    seen, members = work.observation + table, config.members
    actor = Net(work.batch, padded(seen), policy.width, policy.depth, padded(2 * action))
    critic = Net(work.batch, padded(seen + action), config.width, config.depth, padded(config.num_atoms))
    # With one task the policy at s' and at s is one pass: the critic's step does not move its input.
    policies = [actor] * 2 if work.tasks > 1 else [actor._replace(rows=2 * actor.rows)]
    found = [one for policy in policies for one in policy.forward(1)]
    found += [*critic.forward(2 * members, 2), *critic.forward(members)]
    found += [*critic.backward(members, weights=True, columns=padded(table))]
    found += [*critic.backward(members, weights=False, columns=padded(action))]
    return [*found, *actor.backward(1, weights=True)]


def alone(work: Workload, device: str, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """The products of an update and nothing else, each a torch.bmm into memory that is there.

    What a product makes is an input of the next one that takes its shape; weights are their own.
    """
    made: dict[tuple[int, ...], Tensor] = {}
    calls = list[Callable[[], object]]()

    def tensor(n: int, rows: int, columns: int, turned: bool) -> Tensor:
        shape = (n, columns, rows) if turned else (n, rows, columns)
        drawn = torch.randn(shape, device=device).to(dtype) / math.sqrt(columns)
        return drawn.mT if turned else drawn

    for kind, n, rows, inner, columns in products(work):
        left = made.get((n, rows, inner)) if kind != "xg" else None
        left = tensor(n, rows, inner, kind == "xg") if left is None else left
        made[n, rows, columns] = out = left.new_empty(n, rows, columns)
        calls.append(partial(torch.bmm, left, tensor(n, inner, columns, kind == "gw"), out=out))
    return lambda: [one() for one in calls]
