"""The least that one update of `brc_fast.BRC` costs: its matrix products and passes, counted.

    time >= sum over kernels of max(operations / matrix rate, bytes / bandwidth)

Every kernel reads and writes each of its tensors once and leaves nothing in a cache for the next. Sizes are
those of the buffers, padding included. What depends on how a kernel is cut up (partial sums, split products)
is not counted: this is a floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

EMBEDDING = 32  # D (brc_fast.config)
FORWARD, FORWARD_NORMS = "forward: products", "forward: norms"
BACKWARD, BACKWARD_NORMS = "backward: products", "backward: norms"
OPTIMIZERS, OTHERS = "optimizers", "losses, inputs, noise"
PARTS = (FORWARD, FORWARD_NORMS, BACKWARD, BACKWARD_NORMS, OPTIMIZERS, OTHERS)
PAD = 8  # of the first kernel's rows and the head's columns (brc_fast.nn.modules)


class Sizes(NamedTuple):
    """Of one update: B rows; critics of E members and their targets; the actor."""

    batch: int
    width: int
    actor_width: int
    observation: int
    action: int
    tasks: int = 1
    depth: int = 2
    actor_depth: int = 1
    members: int = 2
    atoms: int = 101

    @property
    def embedding(self) -> int:
        """Inputs of actor and critics that tell the task."""
        return EMBEDDING if self.tasks > 1 else 0


class Machine(NamedTuple):
    """Operations per second of matrix products, and bytes per second of a copy, read and written."""

    name: str
    bf16: float
    tf32: float
    bandwidth: float
    fp32: float = 0.0
    source: str = ""  # where these were measured (machines.py)

    def seconds(self, kernel: Work, precision: str) -> float:
        """The least that a kernel takes with products in bf16, tf32 or fp32."""
        rate = {"bf16": self.bf16, "tf32": self.tf32, "fp32": self.fp32}[precision]
        least = kernel.bytes / self.bandwidth
        return max(least, kernel.operations / rate) if kernel.operations else least


class Operand(NamedTuple):
    """A matrix of each network: `key` names the memory, [n, r, c] as it lies there."""

    key: str
    transposed: bool = False
    shared: bool = False  # one for all networks


class Product(NamedTuple):
    """`out = left @ right` of n networks, [rows, inner] by [inner, columns]."""

    networks: int
    rows: int
    inner: int
    columns: int
    left: Operand
    right: Operand
    out: str
    adds: str = ""  # "bias", or "out" for out += left @ right

    @property
    def operations(self) -> int:
        """A multiplication and an addition each."""
        return 2 * self.networks * self.rows * self.inner * self.columns

    @property
    def elements(self) -> int:
        """Read and written."""
        left = (1 if self.left.shared else self.networks) * self.rows * self.inner
        right = self.networks * self.inner * self.columns
        out = self.networks * self.rows * self.columns
        added = {"": 0, "bias": self.networks * self.columns, "out": out}[self.adds]
        return left + right + out + added


class Work(NamedTuple):
    """One kernel."""

    name: str
    operations: int
    bytes: int


def padded(size: int) -> int:
    return -(-size // PAD) * PAD


class Net(NamedTuple):
    """A stack of equal networks over B rows."""

    name: str
    rows: int
    inputs: int
    width: int
    depth: int
    outputs: int

    @property
    def layers(self) -> int:
        return 1 + 2 * self.depth

    @property
    def kernels(self) -> int:
        """Parameters of one network's kernels."""
        return self.width * (self.inputs + 2 * self.depth * self.width + self.outputs)

    @property
    def vectors(self) -> int:
        """Parameters of one network beside the kernels."""
        return 3 * self.layers * self.width + self.outputs

    def operand(self, part: str, transposed: bool = False, shared: bool = False) -> Operand:
        return Operand(f"{self.name}.{part}", transposed, shared)

    def product(
        self,
        networks: int,
        shape: tuple[int, int, int],
        left: Operand,
        right: Operand,
        out: str,
        adds: str = "",
    ) -> Product:
        return Product(networks, *shape, left, right, f"{self.name}.{out}", adds)

    def forward(self, networks: int, parts: tuple[int, ...] = ()) -> Iterator[Product]:
        """`parts`: the networks that each input is for, where there are several inputs."""
        for index, share in enumerate(parts or (networks,)):
            own = f".{index}" if index else ""
            shape = (self.rows, self.inputs, self.width)
            x, kernel = self.operand("x" + own, shared=True), self.operand("kernel.0" + own)
            yield self.product(share, shape, x, kernel, "product.0" + own)
        square = (self.rows, self.width, self.width)
        for layer in range(1, self.layers):
            below, kernel = self.operand(f"output.{layer - 1}"), self.operand(f"kernel.{layer}")
            yield self.product(networks, square, below, kernel, f"product.{layer}")
        shape = (self.rows, self.width, self.outputs)
        top = self.operand(f"output.{self.layers - 1}")
        yield self.product(networks, shape, top, self.operand("head"), "out", "bias")

    def backward(self, networks: int, weights: bool, columns: int = 0) -> Iterator[Product]:
        """From the head down, gradients of products where kernels/_stacked.py has them on a CPU; `columns`
        of the input get one."""
        rows, width, outputs, inputs = self.rows, self.width, self.outputs, self.inputs
        top, dout = self.operand(f"output.{self.layers - 1}", transposed=True), self.operand("dout")
        if weights:
            yield self.product(networks, (width, rows, outputs), top, dout, "gradient.head")
        head = self.operand("head", transposed=True)
        yield self.product(networks, (rows, outputs, width), dout, head, "g")
        for layer in range(self.layers - 1, 0, -1):
            closes = layer % 2 == 0
            dproduct = self.operand("dproduct" if closes else "inner")
            if weights:
                below = self.operand(f"output.{layer - 1}", transposed=True)
                yield self.product(networks, (width, rows, width), below, dproduct, f"gradient.{layer}")
            kernel, place = self.operand(f"kernel.{layer}", transposed=True), "inner" if closes else "g"
            adds = "" if closes else "out"
            yield self.product(networks, (rows, width, width), dproduct, kernel, place, adds)
        g, kernel = self.operand("g"), self.operand(f"{columns} rows of kernel.0", transposed=True)
        if weights:
            x = self.operand("x", transposed=True, shared=True)
            yield self.product(networks, (inputs, rows, width), x, g, "gradient.0")
        if columns:
            yield self.product(networks, (rows, width, columns), g, kernel, f"dx of {columns}")


def nets(sizes: Sizes) -> tuple[Net, Net]:
    """Actor and critic."""
    rows, inputs = sizes.batch, sizes.observation + sizes.action + sizes.embedding
    actor = Net(
        "actor",
        rows,
        padded(sizes.observation + sizes.embedding),
        sizes.actor_width,
        sizes.actor_depth,
        padded(2 * sizes.action),
    )
    return actor, Net("critic", rows, padded(inputs), sizes.width, sizes.depth, padded(sizes.atoms))


def products(sizes: Sizes) -> list[Product]:
    """Every matrix product of one update, in order."""
    actor, critic = nets(sizes)
    members, several = sizes.members, sizes.tasks > 1
    return [
        *(actor if several else both(actor)).forward(1),
        *critic.forward(2 * members, (members, members)),
        *critic.backward(members, weights=True, columns=padded(sizes.embedding)),
        *(actor.forward(1) if several else ()),
        *critic.forward(members),
        *critic.backward(members, weights=False, columns=padded(sizes.action)),
        *actor.backward(1, weights=True),
    ]


def both(actor: Net) -> Net:
    """The policy at s' and at s in one pass, where the critic's step does not move its input."""
    return actor._replace(name="actor twice", rows=2 * actor.rows)


def parameters(sizes: Sizes) -> tuple[int, int]:
    """Of the actor, and of all members of the online critic with the table that they share."""
    actor, critic = nets(sizes)
    table = sizes.tasks * sizes.embedding
    return actor.kernels + actor.vectors, sizes.members * (critic.kernels + critic.vectors) + table


def passes(sizes: Sizes, size: int) -> list[Work]:
    """Everything but the products, for elements of `size` bytes; noise, losses and statistics in float32.

    An optimizer reads parameter, gradient and two moments and writes all but the gradient; the critic's also
    reads and writes the target. Low copies (elements of 2 bytes) are written with what they copy.
    """
    (actor, critic), rows, action = nets(sizes), sizes.batch, sizes.action
    members, low = sizes.members, 2 if size == 2 else 0
    own, critics = parameters(sizes)
    held = 4 * 3 + size + 4 * 3 + low  # bytes per parameter
    logits = members * rows * critic.outputs * size

    table, several = 4 * sizes.tasks * sizes.embedding, sizes.tasks > 1
    ids = 8 * rows if several else 0

    def pack(name: str, net: Net, given: int) -> Work:
        return Work(f"pack {name}", 0, rows * (4 * given + size * net.inputs) + ids + table)

    def norms(net: Net, networks: int) -> list[Work]:
        hidden = networks * net.rows * net.width * size
        held = networks * (2 * net.rows + 3 * net.width) * 4
        moved = [2, *(2, 3) * net.depth]  # in and out; where a block closes, what skipped it too
        return [Work(f"{net.name} norm", 0, tensors * hidden + held) for tensors in moved]

    def norms_backward(net: Net, networks: int, weights: bool) -> list[Work]:
        hidden, held = networks * rows * net.width * size, networks * (2 * rows + 3 * net.width) * 4
        own = networks * (3 * net.width * size) if weights else 0
        return [Work(f"{net.name} norm backward", 0, 3 * hidden + held + own)] * net.layers

    def head_bias(net: Net, networks: int) -> Work:
        return Work(f"{net.name} head bias", 0, networks * (rows + 1) * net.outputs * size)

    def sample(rows: int) -> Work:
        return Work("sample", 0, rows * (action * (2 * size + 4 + 4) + 4))

    to_table = Work(
        "embedding backward", 0, members * rows * sizes.embedding * size + ids + table * (4 + size) // 4
    )
    inputs = sizes.observation + action
    first = [pack("actor next", actor, sizes.observation)]
    second = [pack("actor", actor, sizes.observation)]
    policy, samples = ((actor, rows), (both(actor), 2 * rows))[not several]
    own_pass = [*norms(policy, 1), sample(samples)]
    return [
        Work("noise", 0, 2 * rows * action * 4),
        *(first if several else first + second),
        *own_pass,
        pack("critic", critic, inputs),
        pack("critic next", critic, inputs),
        *norms(critic, 2 * members),
        Work("Bellman loss and gradient", 0, 3 * logits + rows * 4 * (3 + members)),
        head_bias(critic, members),
        *norms_backward(critic, members, weights=True),
        *([to_table] if several else []),
        Work("critic AdamW, target and copies", 0, critics * (held + 4 * 2 + low)),
        *(second + own_pass if several else []),
        pack("critic policy", critic, inputs),
        *norms(critic, members),
        Work("expected value and gradient", 0, 2 * logits + members * rows * 4),
        *norms_backward(critic, members, weights=False),
        Work("sample backward", 0, rows * action * ((2 + members) * size + 4 + 2 * size)),
        head_bias(actor, 1),
        *norms_backward(actor, 1, weights=True),
        Work("actor AdamW and copies", 0, own * held),
        Work("metrics", 0, (2 * members + 1) * rows * 4),
        Work("temperature", 0, 3 * 2 * 4),
    ]


def kernels(sizes: Sizes, precision: str) -> list[Work]:
    """Those of one update with products in `precision` (bf16, tf32 or fp32)."""
    size = 2 if precision == "bf16" else 4
    multiplied = [Work(p.out, p.operations, size * p.elements) for p in products(sizes)]
    return multiplied + passes(sizes, size)


def floor(sizes: Sizes, precision: str, machine: Machine) -> float:
    """Seconds per update that no sequence of these kernels can beat on this machine."""
    return sum(machine.seconds(kernel, precision) for kernel in kernels(sizes, precision))


def part_of(name: str) -> str:
    """The part of an update that a kernel belongs to: products are named net.matrix."""
    net, _, matrix = name.partition(".")
    if matrix:
        return FORWARD if matrix == "out" or matrix.startswith("product") else BACKWARD
    if "norm" in net:
        return BACKWARD_NORMS if net.endswith("backward") else FORWARD_NORMS
    if net.endswith("head bias"):
        return BACKWARD
    return OPTIMIZERS if "AdamW" in net or net == "temperature" else OTHERS


def parts(sizes: Sizes, precision: str, machine: Machine) -> dict[str, float]:
    """The floor of each part."""
    found = dict.fromkeys(PARTS, 0.0)
    for kernel in kernels(sizes, precision):
        found[part_of(kernel.name)] += machine.seconds(kernel, precision)
    return found
