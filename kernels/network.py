"""Stacked networks as one op with one backward written by hand, for any list of stages; BroNet is one.

Dims:    N networks (E members, or more stacked), B rows, I inputs, H width, K outputs, L stages.
Memory:  kept for the backward: products, values [N, B, H] of the stages and two numbers per row; values only
         if a parameter wants a gradient. Without a gradient, as much as is in use at a time.
Numbers: products in the dtype of x, which the kernels must have; norms in float32; vectors in any.
Source:  BroNet: Nauman et al. 2024, arXiv:2405.16158.
Twins:   reference.network, reference.bronet

The loop is that of stages.py. float32 on a CPU takes compiled passes, also inside of torch.compile.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from . import reference
from .runtime import native
from .runtime.dispatch import casts, chosen, observed, takes_kernels
from .runtime.library import Op
from .runtime.twins import twin
from .stages import (
    KEEP_ALL,
    KEEP_FOR_INPUT,
    KEEP_NOTHING,
    Backward,
    Forward,
    Memory,
    Stage,
    Stages,
    cached,
    check_parameters,
    copies_input,
    memory_elements,
    module,
    names_of,
    stats_shape,
    wide,
)

__all__ = ["bronet", "bronet_stages", "network"]

MOST_BYTES = 56 * 2**20  # of scratch memory that nobody uses


class Workspace:
    """Scratch memory of one pass on a CPU; the next pass of the same size gets it back.

    Fresh memory costs a page fault per 4 KB, which took an eighth of an update. The memory is returned when
    its last reference goes, so a graph that is kept alive keeps its activations. Of what nobody uses
    MOST_BYTES are kept, those used last.
    """

    free: dict[int, list[Tensor]] = {}  # noqa: RUF012 - of the process
    lock = threading.RLock()

    held: Tensor | None = None  # also where there was no memory for it

    def __init__(self, elements: int) -> None:
        try:
            self.held = self.free[elements].pop()
        except (KeyError, IndexError):
            with torch.inference_mode(False):  # whoever gets it next may not be in it
                self.held = torch.empty(elements)

    def __del__(self) -> None:
        if self.held is None or self.held.nbytes > MOST_BYTES:
            return
        free = self.free
        with self.lock:
            free[len(self.held)] = [*free.pop(len(self.held), []), self.held]  # the last one used comes last
            while sum(t.nbytes for tensors in list(free.values()) for t in tensors) > MOST_BYTES:
                oldest = next(iter(free))
                free[oldest] = free[oldest][1:]
                if not free[oldest]:
                    del free[oldest]


def _scratch(x: Tensor, elements: int) -> Tensor:
    """Memory like x; on a CPU that of a `Workspace`, which lives as long as this tensor object."""
    if x.dtype != torch.float32 or not native.takes(x):
        return x.new_empty(elements)
    workspace = Workspace(elements)
    assert workspace.held is not None
    memory = workspace.held[:]
    memory.workspace = workspace  # type: ignore[attr-defined]
    return memory


# -- the op: stages travel as text, which torch.library takes


def _fixed(stages: Sequence[Stage]) -> Stages:
    """With widths that a compiler takes for constants, also where it has seen others before."""
    if not torch.compiler.is_compiling():
        return tuple(stages)
    out = []
    for stage in stages:
        adds = None if stage.adds is None else index(stage.adds)
        out.append(stage._replace(outputs=index(stage.outputs), reads=index(stage.reads), adds=adds))
    return tuple(out)


def _encoded(stages: Stages) -> str:
    return ";".join([",".join([str(value) for value in stage]) for stage in stages])


@cached
def _decoded(text: str) -> Stages:
    out = []
    for line in text.split(";"):
        name, outputs, reads, after, relu, adds, product = line.split(",")
        added = None if adds == "None" else int(adds)
        out.append(Stage(name, int(outputs), int(reads), after, relu == "True", added, product == "True"))
    return tuple(out)


def _named(stages: Stages, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names_of(stages), parameters, strict=True))


def _alike(stages: Stages, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """By name, with the vectors of each stage dense and the same distances apart."""
    named = _named(stages, parameters)
    for stage in stages:
        strides = {named[name].stride() for name in stage.vectors}
        if len(strides) > 1 or next(iter(strides))[-1] != 1:
            named |= {name: named[name].contiguous() for name in stage.vectors}
    return named


def _forward(
    x: Tensor, parameters: list[Tensor], text: str, passes: str, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """out [N, B, K]; then what the backward needs, empty without one: products and values, statistics."""
    stages, networks, rows = _decoded(text), parameters[0].shape[0], x.shape[-2]
    flat = _scratch(x, memory_elements(stages, keep, networks, rows, x.shape[-1]))
    stats = x.new_empty(stats_shape(stages, networks, rows), dtype=wide(x.dtype))
    memory = Memory.carve(stages, keep, x.shape[-1], flat, stats)
    out = x.new_empty(networks, rows, stages[-1].outputs)
    if passes == "passes_cpu":
        native.share_threads()
    Forward(stages, _alike(stages, parameters), memory, module(passes), out)(x)
    if keep == KEEP_NOTHING:
        return out, x.new_empty(0), stats.new_empty(0)
    return out, flat, stats


def _forward_fake(
    x: Tensor, parameters: list[Tensor], text: str, passes: str, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    stages, networks, rows = _decoded(text), parameters[0].shape[0], x.shape[-2]
    elements, stats = memory_elements(stages, keep, networks, rows, x.shape[-1]), (0,)
    kept = keep != KEEP_NOTHING
    return (
        x.new_empty(networks, rows, stages[-1].outputs),
        x.new_empty(elements if kept else 0),
        x.new_empty(stats_shape(stages, networks, rows) if kept else stats, dtype=wide(x.dtype)),
    )


def _split(parameters: Sequence[Tensor], kernels: Tensor, vectors: Tensor) -> list[Tensor]:
    """Gradients of the parameters, in order, from those of all kernels and of all vectors as one."""
    out, starts = [], {3: 0, 2: 0}
    for p in parameters:
        flat, start = kernels if p.dim() == 3 else vectors, starts[p.dim()]
        out.append(flat[start : start + p.numel()].view(p.shape))
        starts[p.dim()] += p.numel()
    return out


def _gradient_memory(x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    vector = next(p for p in parameters if p.dim() == 2)
    kernels, vectors = (sum(p.numel() for p in parameters if p.dim() == dim) for dim in (3, 2))
    return x.new_empty(kernels), vector.new_empty(vectors)


def _backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    flat: Tensor,
    stats: Tensor,
    text: str,
    passes: str,
    keep: int,
    wants_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of all kernels and of all vectors; empty where they are not wanted."""
    if passes == "passes_cpu":
        native.share_threads()
    stages, batched = _decoded(text), module(passes).BATCHED
    memory = Memory.carve(stages, keep, x.shape[-1], flat, stats)
    into, gradients = [x.new_empty(0), parameters[-1].new_empty(0)], None
    if keep == KEEP_ALL:
        into = list(_gradient_memory(x, parameters))
        gradients = _named(stages, _split(parameters, *into))
    forward = Forward(stages, _alike(stages, parameters), memory, module(passes), grad)
    held = []

    def new(*shape: int) -> Tensor:
        if batched:
            return x.new_empty(shape)
        held.append(_scratch(x, torch.Size(shape).numel()))
        return held[-1].view(shape)

    dx = Backward(forward, gradients, wants_dx, new, batched)(grad.contiguous(), x)
    if dx is None:
        dx = x.new_empty(0)
    elif x.dim() == 2:
        dx = dx.sum(0)
    elif copies_input(stages):
        dx = dx.clone()
    return dx, into[0], into[1]


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    flat: Tensor,
    stats: Tensor,
    text: str,
    passes: str,
    keep: int,
    wants_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if wants_dx else (0,))
    if keep == KEEP_ALL:
        return dx, *_gradient_memory(x, parameters)
    return dx, x.new_empty(0), parameters[-1].new_empty(0)


_network_backward = Op("network_backward", _backward, _backward_fake)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, parameters, *ctx.how = inputs
    ctx.kept = output[1:] if hasattr(output[1], "workspace") else None  # as this object, or it is given back
    ctx.save_for_backward(x, *parameters, *(() if ctx.kept else output[1:]))


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved: list[Tensor] = [*ctx.saved_tensors, *(ctx.kept or ())]  # a checkpoint gives them once
    x, *parameters, flat, stats = saved
    if grad is None:
        return None, [None] * len(parameters), None, None, None
    wants_dx = ctx.needs_input_grad[0]
    dx, *into = _network_backward(grad, x, parameters, flat, stats, *ctx.how, wants_dx)
    out: list[Tensor | None] = [None] * len(parameters)
    if ctx.how[-1] == KEEP_ALL:
        out = [g.to(p.dtype) for g, p in zip(_split(parameters, *into), parameters, strict=True)]
    return dx if wants_dx else None, out, None, None, None


_network = Op("network", _forward, _forward_fake, _keep, _gradients, kept=2)


def _transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


# A compiler cannot look into it, and takes what it says: torch.compiler.assume_constant_result sets the same,
# and loads the whole compiler.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _serves_cpu(impl: str | None, *tensors: Tensor) -> bool:
    """Whether a CPU's compiled passes do it: in a plain call, or compiled by torch.compile. What is exported
    has to run without this package, and torch.func wants the twin."""
    if chosen(impl) != "auto" or casts("cpu") or not native.serves(*tensors):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting() and not _transformed()
    return not observed(*tensors)


def _keeps(x: Tensor, parameters: Sequence[Tensor]) -> int:
    if not torch.is_grad_enabled():
        return KEEP_NOTHING
    if any(p.requires_grad for p in parameters):
        return KEEP_ALL
    return KEEP_FOR_INPUT if x.requires_grad else KEEP_NOTHING


def network(
    x: Tensor, stages: Sequence[Stage], parameters: Mapping[str, Tensor], impl: str | None = None
) -> Tensor:
    """N stacked networks of these stages.

    Args:
        x: [B, I], shared by all networks, or [N, B, I].
        stages: see `Stage`. parameters: by name, kernels [N, inputs, outputs] and vectors [N, outputs];
            networks may be any distance apart. Under autocast, x and the kernels are cast to its dtype.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        [N, B, K] in the dtype of x. Every argument gets its gradient; parameters that want none cost nothing.
    Raises:
        ValueError for stages or shapes that do not fit, TypeError for kernels of another dtype than x.
    """
    stages = _fixed(stages)
    networks, inputs = check_parameters(stages, parameters)
    if x.shape[-1:] != (inputs,) or x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] != networks):
        wanted = f"[B, I] or [N, B, I] with N = {networks}, I = {inputs}"
        raise ValueError(f"x must have shape {wanted}, got {list(x.shape)}")
    given, kind = [parameters[name] for name in names_of(stages)], x.device.type
    kernels, cast = takes_kernels(impl, x, *given), casts(kind)
    if kernels and cast:
        dtype = torch.get_autocast_dtype(kind)
        x, given = x.to(dtype), [p.to(dtype) if p.dim() == 3 else p for p in given]
    if kernels or not cast:
        _check_dtypes(x, _named(stages, given))
    if kernels or _serves_cpu(impl, x, *given):
        how = _encoded(stages), "norm" if kernels else "passes_cpu", _keeps(x, given)
        with torch.autocast(kind, enabled=False):  # the products are in the dtype that was just settled
            return _network(x, given, *how)[0]  # type: ignore[no-any-return]
    return twin(reference.network, impl)(x, stages, _named(stages, given))


def _check_dtypes(x: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """The products take one dtype; vectors may have another, all of them the same."""
    vectors = None
    for name, p in parameters.items():
        if p.dim() == 3:
            if p.dtype != x.dtype:
                raise TypeError(f"{name} must be of the dtype of x, {x.dtype}, got {p.dtype}")
            continue
        vectors = p.dtype if vectors is None else vectors
        if p.dtype != vectors:
            raise TypeError(f"{name} must be of the dtype of the other vectors, {vectors}, got {p.dtype}")


# -- BroNet


@cached
def bronet_stages(width: int, depth: int, outputs: int) -> Stages:
    """x = relu(LN(x W0 + b0));   `depth` times:  x = x + LN(relu(LN(x W1 + b1)) W2 + b2);   x Wh + bh

    Source: Nauman et al. 2024, arXiv:2405.16158.
    """
    stages = [Stage("input", width, reads=0, after="norm", relu=True)]
    for block in range(depth):
        below = len(stages)
        stages.append(Stage(f"blocks.{block}.0", width, reads=below, after="norm", relu=True))
        stages.append(Stage(f"blocks.{block}.1", width, reads=below + 1, after="norm", adds=below))
    return (*stages, Stage("head", outputs, reads=len(stages)))


def bronet(x: Tensor, *parameters: Tensor, impl: str | None = None) -> Tensor:
    """BroNet of N stacked networks, head included.

    The networks may be the members of an ensemble, or those of several: online and target critics stacked
    to 2E run in the same launches.

    Args:
        x: [B, I], shared by all networks, or [N, B, I].
        parameters: (kernel [N, in, H], bias, norm weight, norm bias [N, H]) of the input layer and of the two
            layers of each block, in this order, then the head's kernel [N, H, K] and bias [N, K]. Networks
            may be any distance apart in memory. Under autocast, x and the kernels are cast to its dtype.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        [N, B, K] in the dtype of x. Every argument gets its gradient; parameters that want none cost nothing.
    Raises:
        ValueError for shapes that do not fit, TypeError for kernels of another dtype than x.
    Source: Nauman et al. 2024, arXiv:2405.16158.
    """
    if len(parameters) < 6 or len(parameters) % 8 != 6:
        raise ValueError(
            f"bronet takes 4 tensors per layer, one layer plus two per block, and 2 for the head: "
            f"6, 14, 22, ... in all, got {len(parameters)}"
        )
    if parameters[0].dim() != 3 or parameters[-2].dim() != 3:
        wrong = "the input" if parameters[0].dim() != 3 else "the head"
        raise ValueError(f"the kernel of {wrong} must have shape [N, inputs, outputs]")
    stages = bronet_stages(parameters[0].shape[-1], len(parameters) // 8, parameters[-2].shape[-1])
    return network(x, stages, _named(stages, parameters), impl)
