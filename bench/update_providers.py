"""Who makes the update in bench_update.py: ours, our critic in a plain agent, plain PyTorch, compiled or not,
JAX; and its products alone, as torch.bmm makes them.

Each starts from the same parameters, is compared with plain PyTorch in float32, which knows nothing of ours,
and is then called without waiting.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from harness import wait
from roofline import Operand, Product, Sizes, parameters
from roofline import products as listed_products
from torch import Tensor
from workloads import Workload

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, Noise
from brc_fast.config import Precision
from brc_fast.learner.precision import products
from peers.torch_plain import METRICS, CompiledBRC, PlainBRC
from peers.torch_swapped import SwappedBRC

CARTPOLE = Workload("cartpole", "mjx/CartpoleSwingup", 5, 1, suites=("mjx/CartpoleSwingup",))
OURS = ("ours", "ours-tf32", "ours-bf16")
PROVIDERS = (*OURS, "critic", "plain", "compiled", "jax")
# Of losses against those in float32, relative and absolute: of an update, and of one after a step of AdamW.
# Such a step is at first the sign of the gradient, and small gradients turn over where products differ in
# their last digits: from there on rounding is that of the weights, 3e-4 and not 1e-7. Hence losses alone are
# compared in few digits, after a step: those of bfloat16 move by up to 2e-2, of TF32 no less.
FIRST = (1e-4, 1e-4)
AFTER_A_STEP = {"fp32": (1e-3, 2e-3), "tf32": (5e-3, 3e-2), "bf16": (1e-2, 5e-2)}
# Of parameters after one update in float32, and of targets, which move by tau times as much. As small
# gradients turn over, so may this share of each array, and one element where there are several.
PARAMETER, TARGET, TURNED = (1e-5, 1e-5), (3e-7, 2e-7), 1e-3
# Bytes per parameter of the online critic, with what a peer's optimizer needs for a moment.
HELD = {"ours": 20, "ours-tf32": 20, "ours-bf16": 22, "critic": 24, "plain": 24, "compiled": 24, "jax": 32}
COMPILING = 30.0  # seconds of torch.compile at one size, on one core with an empty cache

DIFFERS = "differs from plain PyTorch"
Losses = dict[str, float]


class Unavailable(Exception):
    """A provider has no time here; the message says why."""


@dataclass(frozen=True)
class Subject:
    """One size: critics of this width, U updates on batches of B rows per call; O, A, T of the workload."""

    width: int
    size: int
    updates: int = 1
    device: str = "cpu"
    backend: str = "inductor"
    workload: Workload = CARTPOLE

    @property
    def case(self) -> str:
        return f"{self.workload.name} H {self.width} B {self.size}"

    @property
    def actor_width(self) -> int:
        return min(self.width, 256)

    @property
    def sizes(self) -> Sizes:
        _, _, observation, action, tasks, *_ = self.workload
        return Sizes(self.size, self.width, self.actor_width, observation, action, tasks)

    @property
    def calls(self) -> int:
        """That are compared: the losses after a step depend on its gradients and on the optimizers."""
        return 2 if self.updates == 1 else 1

    def agent(self, precision: Precision, graphs: bool = True) -> BRC:
        critic, actor = CriticConfig(width=self.width), ActorConfig(width=self.actor_width)
        with quickly():
            return BRC(
                self.workload.observation,
                self.workload.action,
                self.workload.tasks,
                critic=critic,
                actor=actor,
                device=self.device,
                precision=precision,
                graphs=graphs,
            )

    def batches(self, seed: int = 0) -> Batch:
        """[U, B, ...] random transitions."""
        rng = torch.Generator().manual_seed(seed)
        shape = (self.updates, self.size)
        observations, next_observations = torch.randn(2, *shape, self.workload.observation, generator=rng)
        actions = 2.0 * torch.rand(*shape, self.workload.action, generator=rng) - 1.0
        rewards = torch.rand(shape, generator=rng)
        masks = (torch.rand(shape, generator=rng) > 0.02).float()
        ids = torch.randint(self.workload.tasks, shape, generator=rng)
        return Batch(observations, actions, rewards, masks, next_observations, ids).to(self.device)

    def noise(self, seed: int) -> Noise:
        rng = torch.Generator().manual_seed(seed)
        drawn = torch.randn(2, self.updates, self.size, self.workload.action, generator=rng)
        return Noise(*drawn.to(self.device))

    def bytes(self, name: str) -> int:
        """About what a provider takes at most: for parameters, and for what passes keep of hidden layers."""
        critic = parameters(self.sizes)[1] * HELD[name]
        return critic + 4 * 40 * self.size * self.width


@contextmanager
def quickly() -> Iterator[None]:
    """Random kernels of the same size in place of orthogonal ones: no time depends on them, and the QR
    decompositions of the largest take minutes."""

    def normal(matrix: Tensor, gain: float, generator: torch.Generator) -> Tensor:
        return matrix.normal_(0.0, gain / math.sqrt(max(matrix.shape)), generator=generator)

    before = torch.nn.init.orthogonal_
    torch.nn.init.orthogonal_ = normal  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.init.orthogonal_ = before


# ---------------------------------------------------------------- providers


class Provider:
    """U updates per call, on the same batches each time."""

    precision: str = "fp32"
    note: str | None = None

    def losses(self, batches: Batch, noise: Noise) -> dict[str, Any]:
        """Those of a call with this noise."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """All that an update changes, targets too, by the names of ours."""
        raise NotImplementedError

    def call(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Wait for all calls."""


class Ours(Provider):
    def __init__(self, subject: Subject, precision: Precision, graphs: bool = True) -> None:
        self.subject, self.precision = subject, precision
        self.agent, self.data = subject.agent(precision, graphs), subject.batches()

    def losses(self, batches: Batch, noise: Noise) -> dict[str, Any]:
        return self.agent.update(batches, noise)

    def parameters(self) -> dict[str, Any]:
        parts = ("critic", "target_critic", "actor", "temperature")
        return {
            f"{part}/{name}": value
            for part in parts
            for name, value in getattr(self.agent, part).named_parameters()
        }

    def call(self) -> None:
        self.agent.update(self.data)

    def finish(self) -> None:
        wait(self.subject.device)
        if self.subject.device == "cuda":
            self.note = self.agent.updates.reason


class Plain(Provider):
    def __init__(self, subject: Subject) -> None:
        self.subject, self.precision = subject, peers_precision(subject.device)
        self.peer, self.data = PlainBRC(subject.agent("fp32", graphs=False)), subject.batches()

    def losses(self, batches: Batch, noise: Noise) -> dict[str, Any]:
        return self.peer.updates(batches, noise)

    def parameters(self) -> dict[str, Any]:
        return self.peer.named()

    def call(self) -> None:
        shape = (2, *self.data.actions.shape)
        self.peer.updates(self.data, Noise(*torch.randn(shape, device=self.subject.device)))

    def finish(self) -> None:
        wait(self.subject.device)


class Swapped(Plain):
    def __init__(self, subject: Subject) -> None:
        self.subject, self.precision = subject, peers_precision(subject.device)
        self.peer, self.data = SwappedBRC(subject.agent("fp32", graphs=False)), subject.batches()


class Compiled(Plain):
    def __init__(self, subject: Subject) -> None:
        self.subject, self.precision = subject, peers_precision(subject.device)
        self.peer: CompiledBRC = CompiledBRC(subject.agent("fp32", graphs=False), subject.backend)
        self.data = subject.batches()

    def losses(self, batches: Batch, noise: Noise) -> dict[str, Any]:
        with self.peer.captured.queue():  # the stream of the graph, also for what autograd keeps
            out = self.peer.updates(batches, noise)
        self.peer.captured.join()
        return out

    def call(self) -> None:
        self.peer.captured([*self.data])

    def finish(self) -> None:
        wait(self.subject.device)
        if self.subject.device == "cuda":
            self.note = self.peer.captured.reason


class Jax(Provider):
    def __init__(self, subject: Subject) -> None:
        for module in ("jax", "optax"):
            if importlib.util.find_spec(module) is None:
                raise Unavailable(f'{module} is not installed; pip install "brc-fast[bench]"')
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to the others
        import jax

        if subject.device == "cuda" and jax.default_backend() != "gpu":
            raise Unavailable(f"JAX sees no GPU, its backend is {jax.default_backend()}")
        from peers.jax_plain import JaxBRC

        self.jax, self.precision = (
            jax,
            peers_precision(subject.device),
        )  # of a GPU: tf32 unless told otherwise
        self.peer: Any = JaxBRC(subject.agent("fp32", graphs=False))
        self.data = self.peer.feed(subject.batches())
        jax.block_until_ready((self.peer.state, self.data))  # then what they were copied from may go

    def losses(self, batches: Batch, noise: Noise) -> dict[str, Any]:
        return self.peer.update(self.peer.feed(batches), noise)  # type: ignore[no-any-return]

    def parameters(self) -> dict[str, Any]:
        return {name: torch.tensor(value) for name, value in self.jax.device_get(self.peer.named()).items()}

    def call(self) -> None:
        self.peer.update(self.data)

    def finish(self) -> None:
        self.jax.block_until_ready(self.peer.state)


class Products(Provider):
    """The matrix products of U updates and nothing else, each a torch.bmm into memory that is there."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        listed = listed_products(subject.sizes)
        shapes: dict[str, tuple[int, int, int]] = {}
        for product in listed:
            for key, shape in stored(product):
                shapes[key] = max(shapes.get(key, shape), shape)  # of the most networks
        rng = torch.Generator().manual_seed(0)
        self.memory = {
            key: torch.randn(shape, generator=rng).div_(math.sqrt(shape[1])).to(subject.device)
            for key, shape in shapes.items()
        }
        self.work = [self._bound(product) for product in listed]

    def _operand(self, operand: Operand, networks: int) -> Tensor:
        memory = self.memory[operand.key]
        memory = memory.expand(networks, -1, -1) if operand.shared else memory[:networks]
        return memory.mT if operand.transposed else memory

    def _bound(self, product: Product) -> Callable[[], object]:
        left, right = (self._operand(x, product.networks) for x in (product.left, product.right))
        out = self.memory[product.out][: product.networks]
        if product.adds == "out":
            return lambda: out.baddbmm_(left, right)
        if product.adds == "bias":
            bias = torch.zeros_like(out[:, :1])
            return lambda: torch.baddbmm(bias, left, right, out=out)
        return lambda: torch.bmm(left, right, out=out)

    def call(self) -> None:
        for _ in range(self.subject.updates):
            for work in self.work:
                work()

    def finish(self) -> None:
        wait(self.subject.device)


def stored(product: Product) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The memory of a product's tensors, by key."""
    sides = (product.left, product.rows, product.inner), (product.right, product.inner, product.columns)
    for operand, rows, columns in sides:
        networks = 1 if operand.shared else product.networks
        yield operand.key, (networks, columns, rows) if operand.transposed else (networks, rows, columns)
    yield product.out, (product.networks, product.rows, product.columns)


BUILDERS: dict[str, Callable[[Subject], Provider]] = {
    "ours": lambda subject: Ours(subject, "fp32"),
    "ours-tf32": lambda subject: Ours(subject, "tf32"),
    "ours-bf16": lambda subject: Ours(subject, "bf16"),
    "critic": Swapped,
    "plain": Plain,
    "compiled": Compiled,
    "jax": Jax,
}


def peers_precision(device: str) -> str:
    """Of float32 products of the others: what JAX has by default, and what `tensor_cores` gives PyTorch."""
    return "tf32" if device == "cuda" else "fp32"


@contextmanager
def tensor_cores(device: str) -> Iterator[None]:
    """PyTorch's float32 products in TF32 on a GPU; ours choose for themselves (brc_fast.learner.precision).

    Set for all of PyTorch: compilers of some versions refuse to work where only CUDA's own flag is set
    (pytorch issue 166387).
    """
    if device != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------- equality and memory


@dataclass
class Expected:
    """What plain PyTorch in float32 gives: losses of each call, and parameters after the first update."""

    losses: list[Losses]
    parameters: dict[str, Tensor]


def expected(subject: Subject) -> Expected:
    with products("fp32", subject.device):
        return run_checked(Plain(subject), subject)


def loaded(names: Sequence[str] = ()) -> None:
    """The first optimizer of a process loads modules for a second or two, and the first torch.compile tries
    the C++ compiler and translates headers: now they are there."""
    expected(Subject(8, 8))
    if "compiled" in names:
        with suppress(Exception):  # its own start tells
            torch.compile(torch.relu)(torch.ones(8))


def run_checked(provider: Provider, subject: Subject) -> Expected:
    found = Expected([], {})
    for index in range(subject.calls):
        told = provider.losses(subject.batches(seed=1 + index), subject.noise(seed=1 + index))
        found.losses.append({name: float(told[name]) for name in METRICS})
        if index == 0 and subject.updates == 1:
            named = provider.parameters()
            found.parameters = {name: value.detach().cpu().clone() for name, value in named.items()}
    return found


def difference(provider: Provider, subject: Subject, known: Expected) -> str | None:
    """What a provider gets wrong, or None. Parameters are compared after one update in float32."""
    found = run_checked(provider, subject)
    for call, (known_losses, losses) in enumerate(zip(known.losses, found.losses, strict=True)):
        strict = provider.precision == "fp32" and subject.updates == 1 and call == 0
        relative, absolute = FIRST if strict else AFTER_A_STEP[provider.precision]
        for name in METRICS:
            a, b = known_losses[name], losses[name]
            if not abs(a - b) <= absolute + relative * abs(a):
                return f"{DIFFERS}: {name} is {b:.6g}, not {a:.6g}"
    if provider.precision != "fp32":
        return None
    if odd := known.parameters.keys() ^ found.parameters.keys():
        return f"{DIFFERS}: only one has {', '.join(sorted(odd))}"
    for name, value in known.parameters.items():
        relative, absolute = TARGET if name.startswith("target") else PARAMETER
        off = ~torch.isclose(found.parameters[name], value, rtol=relative, atol=absolute)
        if off.sum() > max(off.numel() > 1, TURNED * off.numel()):
            return f"{DIFFERS}: {int(off.sum())} of {off.numel()} elements of {name}"
    return None


def out_of_memory(error: BaseException) -> bool:
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in told for words in ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")
    )


def memory(device: str) -> int:
    """Bytes that the device has."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def taken(subject: Subject, names: Sequence[str]) -> int:
    """Bytes of all of these and of an agent to copy from."""
    return sum(subject.bytes(name) for name in (*names, "ours"))


def fits(subject: Subject, names: Sequence[str]) -> bool:
    """Whether all of these have room on the device together."""
    return taken(subject, names) < 0.85 * memory(subject.device)


def too_large(subject: Subject, name: str) -> str | None:
    """Why a CPU cannot make this update at all. A GPU tells by itself; a system may end the process."""
    if subject.device != "cpu" or fits(subject, [name]):
        return None
    takes, has = (f"{size / 1e9:.0f} GB" for size in (taken(subject, [name]), memory("cpu")))
    return f"takes about {takes} of memory, this machine has {has}; run it on a larger one"


def compiling(subject: Subject, name: str) -> float:
    """Seconds, about, that a CPU takes to compile a provider; JAX takes a tenth of them."""
    slow = name == "compiled" and subject.backend == "inductor" and subject.device == "cpu"
    return COMPILING if slow else 0.0


def release(device: str) -> None:
    """Give back what deleted providers held: they are cycles, and allocators keep what they have."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
