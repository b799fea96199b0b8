"""The least that one update of `brc_fast.BRC` costs: its matrix products and passes, counted layer by layer.

    time >= sum over kernels of max(operations / rate of products, bytes / bandwidth)

Every kernel reads and writes each of its tensors once and leaves nothing in a cache for the next. What
depends on how a kernel is cut up (partial sums, split products) is not counted: this is a floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from brc_fast import ActorConfig, CriticConfig

FORWARD, FORWARD_NORMS = "forward: products", "forward: norms"
BACKWARD, BACKWARD_NORMS = "backward: products", "backward: norms"
OPTIMIZERS, OTHERS = "optimizers", "losses, inputs, noise"
PARTS = (FORWARD, FORWARD_NORMS, BACKWARD, BACKWARD_NORMS, OPTIMIZERS, OTHERS)


class Machine(NamedTuple):
    """Operations per second of matrix products, and bytes per second of a copy, read and written."""

    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    source: str = ""  # where these were measured


class Product(NamedTuple):
    """[rows, inner] by [inner, columns] of n networks; `kind` says what is transposed as it lies there:
    "xw" nothing, "xg" (a gradient of weights) the left, "gw" (of inputs) the right."""

    kind: str
    networks: int
    rows: int
    inner: int
    columns: int

    @property
    def operations(self) -> int:
        return 2 * self.networks * self.rows * self.inner * self.columns

    @property
    def elements(self) -> int:
        """Read and written."""
        return self.networks * (self.rows * self.inner + self.inner * self.columns + self.rows * self.columns)


class Net(NamedTuple):
    """A stack of equal networks over B rows."""

    rows: int
    inputs: int
    width: int
    depth: int
    outputs: int

    @property
    def layers(self) -> int:
        return 1 + 2 * self.depth

    @property
    def parameters(self) -> int:
        """Of one network."""
        kernels = self.width * (self.inputs + 2 * self.depth * self.width + self.outputs)
        return kernels + 3 * self.layers * self.width + self.outputs

    def forward(self, networks: int, inputs: int = 1) -> Iterator[Product]:
        """`inputs`: how many there are, each for an equal share of the networks."""
        yield from [Product("xw", networks // inputs, self.rows, self.inputs, self.width)] * inputs
        yield from [Product("xw", networks, self.rows, self.width, self.width)] * (self.layers - 1)
        yield Product("xw", networks, self.rows, self.width, self.outputs)

    def backward(self, networks: int, weights: bool, columns: int = 0) -> Iterator[Product]:
        """From the head down; `columns` of the input get a gradient."""
        for outer in [self.outputs, *[self.width] * (self.layers - 1)]:
            if weights:
                yield Product("xg", networks, self.width, self.rows, outer)
            yield Product("gw", networks, self.rows, outer, self.width)
        if weights:
            yield Product("xg", networks, self.inputs, self.rows, self.width)
        if columns:
            yield Product("gw", networks, self.rows, self.width, columns)


class Sizes(NamedTuple):
    """Of one update: B rows; critics of E members and their targets; the actor."""

    batch: int
    critic: CriticConfig
    actor: ActorConfig
    observation: int
    action: int
    tasks: int = 1

    @property
    def embedding(self) -> int:
        """Inputs of actor and critics that tell the task."""
        return self.critic.embedding_size if self.tasks > 1 else 0

    @property
    def nets(self) -> tuple[Net, Net]:
        """Actor and critic."""
        seen, actor, critic = self.observation + self.embedding, self.actor, self.critic
        return (
            Net(self.batch, padded(seen), actor.width, actor.depth, padded(2 * self.action)),
            Net(self.batch, padded(seen + self.action), critic.width, critic.depth, padded(critic.num_atoms)),
        )

    @property
    def parameters(self) -> int:
        """Of all members of the online critic, with the table that they share."""
        return self.critic.members * self.nets[1].parameters + self.tasks * self.embedding


def padded(size: int) -> int:
    """Rows of the first kernel, and columns of the head, are multiples of 8."""
    return -(-size // 8) * 8


def products(sizes: Sizes) -> tuple[list[Product], list[Product]]:
    """Every matrix product of one update: those of forward and of backward passes."""
    (actor, critic), members = sizes.nets, sizes.critic.members
    # With one task the policy at s' and at s is one pass: the critic's step does not move its input.
    policies = [actor] * 2 if sizes.tasks > 1 else [actor._replace(rows=2 * actor.rows)]
    forward = [one for policy in policies for one in policy.forward(1)]
    forward += [*critic.forward(2 * members, 2), *critic.forward(members)]
    backward = [*critic.backward(members, weights=True, columns=padded(sizes.embedding))]
    backward += [*critic.backward(members, weights=False, columns=padded(sizes.action))]
    return forward, [*backward, *actor.backward(1, weights=True)]


def passes(sizes: Sizes, size: int) -> dict[str, int]:
    """Bytes of all that is no product, by part, with elements of `size`; noise and losses in float32.

    A norm reads and writes what it normalizes, and where a block closes what skipped it too; backward it
    also reads what it was given. An optimizer reads parameter, gradient and two moments and writes all but
    the gradient; the critic's also reads and writes the target. Low copies (elements of 2 bytes) are written
    with what they copy.
    """
    (actor, critic), rows, action, members = sizes.nets, sizes.batch, sizes.action, sizes.critic.members
    low = size if size == 2 else 0
    held = 4 * 3 + size + 4 * 3 + low
    actors, critics = rows * actor.width * size, members * rows * critic.width * size
    packed = 2 * (4 * sizes.observation + size * actor.inputs)
    packed += 3 * (4 * (sizes.observation + action) + size * critic.inputs)
    logits, sampled = members * critic.outputs * size, action * (2 * size + 4 + 4) + 4
    policy = action * (4 + (4 + members) * size)
    return {
        FORWARD_NORMS: 2 * (2 + 5 * actor.depth) * actors + 3 * (2 + 5 * critic.depth) * critics,
        BACKWARD_NORMS: 3 * actor.layers * actors + 2 * 3 * critic.layers * critics,
        OPTIMIZERS: sizes.parameters * (held + 4 * 2 + low) + actor.parameters * held,
        OTHERS: rows * (packed + 5 * logits + 2 * sampled + 2 * action * 4 + policy),
    }


def parts(sizes: Sizes, precision: str, machine: Machine) -> dict[str, float]:
    """The floor of each part, seconds per update, with products in bf16, tf32 or fp32."""
    size, rate = 2 if precision == "bf16" else 4, getattr(machine, precision)
    found = {part: moved / machine.bandwidth for part, moved in passes(sizes, size).items()}
    for part, listed in zip((FORWARD, BACKWARD), products(sizes), strict=True):
        found[part] = sum(max(p.operations / rate, size * p.elements / machine.bandwidth) for p in listed)
    return {part: found[part] for part in PARTS}


def alone(sizes: Sizes, device: str) -> Callable[[], object]:
    """The products of an update and nothing else, each a torch.bmm into memory that is there.

    What a product makes is an input of the next one that takes its shape; weights are their own.
    """
    made: dict[tuple[int, ...], Tensor] = {}
    work = list[Callable[[], object]]()

    def tensor(n: int, rows: int, columns: int, turned: bool) -> Tensor:
        shape = (n, columns, rows) if turned else (n, rows, columns)
        drawn = torch.randn(shape, device=device) / math.sqrt(columns)
        return drawn.mT if turned else drawn

    for kind, n, rows, inner, columns in (one for listed in products(sizes) for one in listed):
        left = made.get((n, rows, inner)) if kind != "xg" else None
        left = tensor(n, rows, inner, kind == "xg") if left is None else left
        made[n, rows, columns] = out = torch.empty(n, rows, columns, device=device)
        work.append(partial(torch.bmm, left, tensor(n, inner, columns, kind == "gw"), out=out))
    return lambda: [one() for one in work]
