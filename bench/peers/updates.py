"""Who makes the update of bench_update.py: ours, our critic in a plain agent, plain PyTorch, compiled or not,
JAX; and its products alone by torch.bmm.

Each starts from the same parameters, is compared with plain PyTorch in float32, which knows nothing of ours,
and is then called without waiting.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import Differs, Unavailable, wait
from roofline import Sizes, products
from torch import Tensor
from workloads import Workload

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, Noise
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
WARMUP = 5  # calls on a GPU: ours captures its graphs in the second and the third
HELD = 28  # bytes per parameter of the online critic, on average of the providers


class Subject(NamedTuple):
    """One size: O, A, T, critics' width and B of the workload; U updates per call."""

    workload: Workload
    updates: int = 1
    device: str = "cpu"
    backend: str = "inductor"

    @property
    def case(self) -> str:
        return f"{self.workload.name} H {self.workload.width} B {self.workload.batch}"

    @property
    def at(self) -> dict[str, str | int]:
        _, _, _, _, _, batch, width, _ = self.workload
        return {"workload": self.workload.name, "width": width, "batch": batch}

    @property
    def sizes(self) -> Sizes:
        _, _, observation, action, tasks, batch, width, _ = self.workload
        critic, actor = CriticConfig(width=width), ActorConfig(width=min(width, 256))
        return Sizes(batch, critic, actor, observation, action, tasks)

    def agent(self, precision: Any = "fp32", graphs: bool = False) -> BRC:
        _, critic, actor, *inputs = self.sizes
        more: Any = {"device": self.device, "precision": precision, "graphs": graphs}
        with quickly():
            return BRC(*inputs, critic=critic, actor=actor, **more)

    def batches(self, seed: int = 0) -> Batch:
        """[U, B, ...] random transitions."""
        _, _, observation, action, tasks, batch, *_ = self.workload
        rng, shape = torch.Generator().manual_seed(seed), (self.updates, batch)
        here, there = torch.randn(2, *shape, observation, generator=rng)
        actions = 2.0 * torch.rand(*shape, action, generator=rng) - 1.0
        rewards = torch.rand(shape, generator=rng)
        masks = (torch.rand(shape, generator=rng) > 0.02).float()
        ids = torch.randint(tasks, shape, generator=rng)
        return Batch(here, actions, rewards, masks, there, ids).to(self.device)

    def noise(self, seed: int | None = None) -> Noise:
        shape = (2, self.updates, self.workload.batch, self.workload.action)
        if seed is None:
            return Noise(*torch.randn(shape, device=self.device))
        return Noise(*torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device))

    def bytes(self, count: int) -> int:
        """About what so many providers take at most: parameters, and what passes keep of hidden layers."""
        kept = 4 * 40 * self.workload.batch * self.workload.width
        return (count + 1) * (HELD * self.sizes.parameters + kept)


@contextmanager
def quickly() -> Iterator[None]:
    """Random kernels of the same size in place of orthogonal ones: no time depends on them, and the QR
    decompositions of the largest take minutes."""

    def normal(matrix: Tensor, gain: float, generator: torch.Generator) -> Tensor:
        return matrix.normal_(0.0, gain / math.sqrt(max(matrix.shape)), generator=generator)

    before, torch.nn.init.orthogonal_ = torch.nn.init.orthogonal_, normal  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.init.orthogonal_ = before


# ---------------------------------------------------------------- providers


class Provider(NamedTuple):
    """U updates per call, on the same batches each time."""

    losses: Callable[[Batch, Noise], dict[str, Any]]  # those of a call with this noise
    parameters: Callable[[], dict[str, Any]]  # all that an update changes, targets too, by the names of ours
    call: Callable[[], object]
    finish: Callable[[], object]  # waits for all calls
    precision: str
    note: Callable[[], str | None] = lambda: None  # what else there is to know once it has run


def ours(subject: Subject, precision: str, graphs: bool = True) -> Provider:
    agent, data = subject.agent(precision, graphs), subject.batches()

    def parameters() -> dict[str, Any]:
        parts = ("critic", "target_critic", "actor", "temperature")
        named = {part: getattr(agent, part).named_parameters() for part in parts}
        return {f"{part}/{name}": value for part, values in named.items() for name, value in values}

    def note() -> str | None:
        return agent.updates.reason if subject.device == "cuda" else None

    finish = partial(wait, subject.device)
    return Provider(agent.update, parameters, lambda: agent.update(data), finish, precision, note)


def plain(subject: Subject, kind: type[PlainBRC] = PlainBRC) -> Provider:
    peer, data = kind(subject.agent()), subject.batches()

    def call() -> object:
        return peer.updates(data, subject.noise())

    return Provider(peer.updates, peer.named, call, partial(wait, subject.device), _precision(subject))


def compiled(subject: Subject) -> Provider:
    peer, data = CompiledBRC(subject.agent(), subject.backend), subject.batches()

    def losses(batches: Batch, noise: Noise) -> dict[str, Any]:
        with peer.captured.queue():  # the stream of the graph, also for what autograd keeps
            out = peer.updates(batches, noise)
        peer.captured.join()
        return out

    def note() -> str | None:
        return peer.captured.reason if subject.device == "cuda" else None

    def call() -> object:
        return peer.captured([*data])

    finish = partial(wait, subject.device)
    return Provider(losses, peer.named, call, finish, _precision(subject), note)


def in_jax(subject: Subject) -> Provider:
    for module in ("jax", "optax"):
        if importlib.util.find_spec(module) is None:
            raise Unavailable(f'{module} is not installed; pip install "brc-fast[bench]"')
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to the others
    import jax

    if subject.device == "cuda" and jax.default_backend() != "gpu":
        raise Unavailable(f"JAX sees no GPU, its backend is {jax.default_backend()}")
    from peers.jax_plain import JaxBRC

    peer = JaxBRC(subject.agent())
    data = peer.feed(subject.batches())

    def losses(batches: Batch, noise: Noise) -> dict[str, Any]:
        return peer.update(peer.feed(batches), noise)

    def parameters() -> dict[str, Any]:
        return {name: torch.tensor(value) for name, value in jax.device_get(peer.named()).items()}

    def finish() -> object:
        return jax.block_until_ready(peer.state)

    jax.block_until_ready((peer.state, data))  # then what they were copied from may go
    return Provider(losses, parameters, lambda: peer.update(data), finish, _precision(subject))


BUILDERS: dict[str, Callable[[Subject], Provider]] = {
    "ours": partial(ours, precision="fp32"),
    "ours-tf32": partial(ours, precision="tf32"),
    "ours-bf16": partial(ours, precision="bf16"),
    "critic": partial(plain, kind=SwappedBRC),
    "plain": plain,
    "compiled": compiled,
    "jax": in_jax,
}


def _precision(subject: Subject) -> str:
    """Of float32 products of the others: what JAX has by default, and what `tensor_cores` gives PyTorch."""
    return "tf32" if subject.device == "cuda" else "fp32"


def floor(subject: Subject) -> Callable[[], object]:
    """The products of U updates and nothing else, each a torch.bmm into memory that is there.

    What a product makes is an input of the next one that takes its shape; weights are their own.
    """
    made: dict[tuple[int, ...], Tensor] = {}
    work = list[Callable[[], object]]()

    def tensor(n: int, rows: int, columns: int, turned: bool) -> Tensor:
        shape = (n, columns, rows) if turned else (n, rows, columns)
        drawn = torch.randn(shape, device=subject.device) / math.sqrt(columns)
        return drawn.mT if turned else drawn

    for kind, n, rows, inner, columns in (one for listed in products(subject.sizes) for one in listed):
        left = made.get((n, rows, inner)) if kind != "xg" else None
        left = tensor(n, rows, inner, kind == "xg") if left is None else left
        right = tensor(n, inner, columns, kind == "gw")
        out = torch.empty(n, rows, columns, device=subject.device)
        made[n, rows, columns] = out
        work.append(partial(torch.bmm, left, right, out=out))

    def call() -> None:
        for _ in range(subject.updates):
            for one in work:
                one()

    return call


@contextmanager
def tensor_cores(device: str, precision: str = "high") -> Iterator[None]:
    """PyTorch's float32 products in TF32 on a GPU, or not ("highest"); ours choose for themselves.

    Set for all of PyTorch: compilers of some versions refuse to work where only CUDA's own flag is set
    (pytorch issue 166387).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision if device == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------- equality


class Expected(NamedTuple):
    """Losses of each call, and parameters after the first update, where a call is one."""

    losses: list[dict[str, float]]
    parameters: dict[str, Tensor]


def expected(subject: Subject) -> Expected:
    """What plain PyTorch in float32 gives."""
    with tensor_cores(subject.device, "highest"):
        return run(plain(subject), subject)


def run(provider: Provider, subject: Subject) -> Expected:
    """Two calls, where each is one update: losses after a step depend on its gradients and the optimizers."""
    found = Expected([], {})
    for index in range(2 if subject.updates == 1 else 1):
        told = provider.losses(subject.batches(1 + index), subject.noise(1 + index))
        found.losses.append({name: float(told[name]) for name in METRICS})
        if index == 0 and subject.updates == 1:
            named = provider.parameters().items()
            found.parameters.update({name: value.detach().cpu().clone() for name, value in named})
    return found


def difference(provider: Provider, subject: Subject, known: Expected) -> str | None:
    """What a provider gets wrong, or None. Parameters are compared after one update in float32."""
    found = run(provider, subject)
    for call, (right, losses) in enumerate(zip(known.losses, found.losses, strict=True)):
        strict = provider.precision == "fp32" and subject.updates == 1 and call == 0
        relative, absolute = FIRST if strict else AFTER_A_STEP[provider.precision]
        for name, a in right.items():
            if not abs(a - losses[name]) <= absolute + relative * abs(a):
                return f"{name} is {losses[name]:.6g}, not {a:.6g}"
    if provider.precision != "fp32":
        return None
    if odd := known.parameters.keys() ^ found.parameters.keys():
        return f"only one has {', '.join(sorted(odd))}"
    for name, value in known.parameters.items():
        relative, absolute = TARGET if name.startswith("target") else PARAMETER
        off = ~torch.isclose(found.parameters[name], value, rtol=relative, atol=absolute)
        if off.sum() > max(off.numel() > 1, TURNED * off.numel()):
            return f"{int(off.sum())} of {off.numel()} elements of {name}"
    return None


def checked(name: str, subject: Subject, known: Expected) -> Provider:
    """The provider, once it has computed what plain PyTorch does.

    Raises:
        Differs: it does not. Unavailable: it cannot run here.
    """
    provider = BUILDERS[name](subject)
    if (wrong := difference(provider, subject, known)) is not None:
        raise Differs(f"differs from plain PyTorch: {wrong}")
    for _ in range(WARMUP if subject.device == "cuda" else 1):
        provider.call()
    provider.finish()
    return provider


def memory(device: str) -> int:
    """Bytes that the device has."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(subject: Subject, names: Sequence[str] = ("plain",)) -> None:
    """Unavailable where a CPU has no room for these together: the system would end the process."""
    takes, has = subject.bytes(len(names)), memory(subject.device)
    if subject.device == "cpu" and takes > 0.85 * has:
        told = f"takes about {takes / 1e9:.0f} GB of memory, this machine has {has / 1e9:.0f} GB"
        raise Unavailable(f"{told}; run it on a larger one")


def release(device: str) -> None:
    """Give back what deleted providers held: they are cycles, and allocators keep what they have."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
