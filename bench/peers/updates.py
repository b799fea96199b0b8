"""Who makes the update of bench_update.py, and the one check that all compute the same.

Each starts from the same parameters, is compared with plain PyTorch in float32, which knows nothing of ours,
and is then called without waiting.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from harness import Differs, Unavailable, tensor_cores, wait
from torch import Tensor
from workloads import Workload

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, Noise
from peers.torch_plain import METRICS, PlainBRC

OURS = ("ours", "ours-tf32", "ours-bf16")
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


class Subject(NamedTuple):
    """One size: O, A, T, critics' width and B of the workload; U updates per call."""

    workload: Workload
    updates: int = 1
    device: str = "cpu"

    @property
    def case(self) -> str:
        return f"{self.workload.name} H {self.workload.width} B {self.workload.batch}"

    @property
    def at(self) -> dict[str, str | int]:
        work = self.workload
        return {"workload": work.name, "width": work.width, "batch": work.batch}

    def agent(self, precision: Any = "fp32", graphs: bool = False) -> BRC:
        work, wide = self.workload, self.workload.width
        sizes: Any = {"critic": CriticConfig(width=wide), "actor": ActorConfig(width=min(wide, 256))}
        more: Any = {"device": self.device, "precision": precision, "graphs": graphs}
        with mock.patch("torch.nn.init.orthogonal_", normal):
            return BRC(work.observation, work.action, work.tasks, **sizes, **more)

    def inputs(self, seed: int = 0) -> tuple[Batch, Noise]:
        """Random transitions [U, B, ...] and noise."""
        work, shape = self.workload, (self.updates, self.workload.batch)
        rng = torch.Generator().manual_seed(seed)
        here, there = torch.randn(2, *shape, work.observation, generator=rng)
        actions = 2.0 * torch.rand(*shape, work.action, generator=rng) - 1.0
        rewards, drawn = torch.rand(2, *shape, generator=rng)
        ids = torch.randint(work.tasks, shape, generator=rng)
        batch = Batch(here, actions, rewards, (drawn > 0.02).float(), there, ids)
        noise = torch.randn(2, *actions.shape, generator=rng)
        return batch.to(self.device), Noise(*noise.to(self.device))


def normal(matrix: Tensor, gain: float, generator: torch.Generator) -> Tensor:
    """Like orthogonal kernels: no time depends on them, and QR decompositions of the largest take minutes."""
    return matrix.normal_(0.0, gain / math.sqrt(max(matrix.shape)), generator=generator)


# ---------------------------------------------------------------- providers


class Provider(NamedTuple):
    """U updates per call, on the same batches each time."""

    losses: Callable[[Batch, Noise], dict[str, Any]]  # those of a call with this noise
    parameters: Callable[[], dict[str, Tensor]]  # all that an update changes, targets too, by our names
    call: Callable[[], object]
    finish: Callable[[], object]  # waits for all calls
    precision: str


def ours(subject: Subject, precision: str) -> Provider:
    agent, (data, _) = subject.agent(precision, graphs=True), subject.inputs()

    def parameters() -> dict[str, Tensor]:
        parts = ("critic", "target_critic", "actor", "temperature")
        named = {part: getattr(agent, part).named_parameters() for part in parts}
        return {f"{part}/{name}": value for part, values in named.items() for name, value in values}

    call, finish = partial(agent.update, data), partial(wait, subject.device)
    return Provider(agent.update, parameters, call, finish, precision)


def one_thread(subject: Subject) -> Provider:
    provider = ours(subject, "fp32")

    def call() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        provider.call()
        torch.set_num_threads(threads)

    return provider._replace(call=call)


def plain(subject: Subject, **options: Any) -> Provider:
    peer, (data, _) = PlainBRC(subject.agent(), **options), subject.inputs()
    call, finish = partial(peer.updates, data), partial(wait, subject.device)
    return Provider(peer.updates, peer.named, call, finish, others(subject))


def compiled(subject: Subject, backend: str = "inductor") -> Provider:
    """On a GPU in a CUDA graph around the whole call: torch.compile's own graphs (mode="reduce-overhead")
    would leave out the optimizers. mode="max-autotune" takes minutes for each size."""
    if subject.device == "cpu":
        return plain(subject, backend=backend)
    stream = torch.cuda.Stream()  # also of the calls before, for what autograd keeps
    graph, provider = torch.cuda.CUDAGraph(), plain(subject, backend=backend, capturable=True)

    def losses(batches: Batch, noise: Noise) -> dict[str, Any]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            told = provider.losses(batches, noise)
        torch.cuda.current_stream().wait_stream(stream)
        return told

    def call() -> None:
        with torch.cuda.stream(stream):
            if not captured:
                for _ in range(3):
                    provider.call()
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    captured.append(provider.call())  # the losses stay in the graph's memory
            graph.replay()

    captured = list[object]()
    return provider._replace(losses=losses, call=call)


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
    data = peer.feed(subject.inputs()[0])

    def losses(batches: Batch, noise: Noise) -> dict[str, Any]:
        return peer.updates(peer.feed(batches), noise)

    def finish() -> object:
        return jax.block_until_ready(peer.state)

    finish()  # then what the state was copied from may go
    return Provider(losses, peer.named, partial(peer.updates, data), finish, others(subject))


BUILDERS: dict[str, Callable[[Subject], Provider]] = {
    "ours": partial(ours, precision="fp32"),
    "ours-tf32": partial(ours, precision="tf32"),
    "ours-bf16": partial(ours, precision="bf16"),
    "one-thread": one_thread,
    "critic": partial(plain, ours=True),
    "plain": plain,
    "compiled": compiled,
    "jax": in_jax,
}


def others(subject: Subject) -> str:
    """Precision of their float32 products: what JAX has by default, and what `tensor_cores` gives PyTorch."""
    return "tf32" if subject.device == "cuda" else "fp32"


# ---------------------------------------------------------------- equality


class Expected(NamedTuple):
    """Losses of each call, and parameters after the first update, where a call is one."""

    losses: list[dict[str, float]]
    parameters: dict[str, Tensor]


def expected(subject: Subject) -> Expected:
    """What plain PyTorch in float32 gives."""
    tensor_cores(subject.device, "highest")
    found = run(plain(subject), subject)
    tensor_cores(subject.device)
    return found


def run(provider: Provider, subject: Subject) -> Expected:
    """Two calls, where each is one update: losses after a step depend on its gradients and the optimizers."""
    found = Expected([], {})
    for index in range(2 if subject.updates == 1 else 1):
        told = provider.losses(*subject.inputs(1 + index))
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


def release(device: str) -> None:
    """Give back what deleted providers held: they are cycles, and allocators keep what they have."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
