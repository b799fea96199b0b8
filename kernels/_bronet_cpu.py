"""The passes between the products of a BroNet on a CPU, compiled (csrc/layer_norm.hpp), and memory for them.

Memory:  a pass reads its inputs once and writes its output once.
Numbers: float32.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._stacked import Arrays, Backward, Forward, Memory
from .reference import EPS
from .runtime import native
from .runtime.library import first_derivative

__all__ = [
    "BATCHED",
    "alike",
    "backward_arguments",
    "bronet_on_cpu",
    "forward_arguments",
    "norm_backward",
    "norm_forward",
]

PASSES = sys.modules[__name__]
BATCHED = False
MOST_BYTES = 56 * 2**20  # of scratch memory that nobody uses
_free: dict[tuple[int, ...], list[Tensor]] = {}
_lock = threading.RLock()


def forward_arguments(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    y: Tensor,
    stats: Tensor,
) -> tuple[Any, ...]:
    """Of `norm_forward`, which fills `y` [N, B, H] and the rows' mean and 1/std, `stats` [2, N, B].

    Networks of the vectors [N, H] may be any distance apart, the same for all three. The tensors must be kept
    as long as what comes back: it holds their addresses.
    """
    mean = stats.data_ptr()
    return (
        *x.shape, bias.stride(0), x.data_ptr(), bias.data_ptr(), weight.data_ptr(), shift.data_ptr(),
        0 if residual is None else residual.data_ptr(), relu, EPS, y.data_ptr(), mean,
        mean + 4 * stats.stride(0),
    )  # fmt: skip


def backward_arguments(
    dy: Tensor,
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    relu: bool,
    stats: Tensor,
    dx: Tensor,
    partial: None,
    into: Tensor | None,
) -> tuple[Any, ...]:
    """Of `norm_backward`, which fills the gradient of x, `dx`, and of bias, weight and shift, `into`
    [3, N, H], any distance apart."""
    mean = stats.data_ptr()
    first = distance = stride = 0
    if into is not None:
        first, distance, stride = into.data_ptr(), 4 * into.stride(0), into.stride(1)
    return (
        *x.shape, bias.stride(0), stride, dy.data_ptr(), x.data_ptr(), bias.data_ptr(), weight.data_ptr(),
        shift.data_ptr(), relu, mean, mean + 4 * stats.stride(0), dx.data_ptr(), first, first + distance,
        first + 2 * distance,
    )  # fmt: skip


def norm_forward(*arguments: Any) -> None:
    """See `forward_arguments`."""
    native.compiled.bias_layer_norm_forward(*arguments)


def norm_backward(*arguments: Any) -> None:
    """See `backward_arguments`."""
    native.compiled.bias_layer_norm_backward(*arguments)


class Workspace:
    """Scratch memory of one pass through a network; the next pass of the same shape gets it back.

    Fresh memory costs a page fault per 4 KB, which at these sizes took an eighth of the update. A workspace
    is returned when its last reference goes, so a graph that is kept alive keeps its activations. Of those
    that nobody uses MOST_BYTES are kept, those used last.
    """

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        try:
            self.tensor = _free[shape].pop()
        except (KeyError, IndexError):
            with torch.inference_mode(False):  # whoever gets it next may not be in it
                self.tensor = torch.empty(shape)

    def __del__(
        self, free: dict[tuple[int, ...], list[Tensor]] = _free, lock: threading.RLock = _lock
    ) -> None:
        if self.tensor.nbytes > MOST_BYTES:
            return
        with lock:
            kept = free.pop(self.shape, [])
            free[self.shape] = [*kept, self.tensor]  # the last one used comes last
            while sum(t.nbytes for tensors in list(free.values()) for t in tensors) > MOST_BYTES:
                oldest = next(iter(free))
                free[oldest] = free[oldest][1:]
                if not free[oldest]:
                    del free[oldest]


def _outputs_alone(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The forward pass where nobody wants a gradient: a few layers' memory, used in turn."""
    networks, _, width = parameters[0].shape
    hidden = Workspace(4, networks, x.shape[-2], width)
    stats = Workspace(1, 2, networks, x.shape[-2])
    memory = Memory(hidden.tensor[:1], hidden.tensor[1:], stats.tensor)
    return Forward(parameters, memory, PASSES)([x])


class _BroNet(torch.autograd.Function):
    """x [N, B, I] or [B, I], then the parameters as `bronet` has them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        networks, _, width = parameters[0].shape
        ctx.shape = shape = ((len(parameters) - 2) // 4, networks, x.shape[-2], width)
        outputs = shape[0] if any(ctx.needs_input_grad[1:]) else 3  # few in turn, where no kernel wants them
        products = Workspace(*shape)
        ctx.work = products, Workspace(outputs, *shape[1:]), Workspace(shape[0], 2, *shape[1:3])
        ctx.memory = Memory(*(work.tensor for work in ctx.work))
        ctx.save_for_backward(x, *parameters)
        return Forward(parameters, ctx.memory, PASSES)([x])

    @staticmethod
    @first_derivative("bronet")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        layers, networks, _, width = ctx.shape
        gradients = None
        if any(ctx.needs_input_grad[1:]):
            square = x.new_empty(layers - 1, networks, width, width)
            vectors = x.new_empty(layers, 3, networks, width)
            ends = (x.new_empty(p.shape) for p in (parameters[0], *parameters[-2:]))
            first, head, bias = ends
            gradients = Arrays(first, square, vectors, head, bias)
        space = Workspace(3, *ctx.shape[1:])
        sweep = Backward(parameters, ctx.memory, gradients, PASSES, space.tensor)
        dx = sweep(grad.contiguous(), x, slice(None) if ctx.needs_input_grad[0] else None)
        if dx is not None and x.dim() == 2:
            dx = dx.sum(0)
        if gradients is None:
            return dx, *(None for _ in parameters)
        return dx, *gradients.ordered()


def alike(parameters: Sequence[Tensor]) -> list[Tensor]:
    """With the vectors of each layer the same distances apart."""
    out = list(parameters)
    for place in range(1, len(out) - 2, 4):
        strides = {p.stride() for p in out[place : place + 3]}
        if len(strides) > 1 or out[place].stride(-1) != 1:
            out[place : place + 3] = [p.contiguous() for p in out[place : place + 3]]
    return out


def bronet_on_cpu(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """As `reference.bronet` for float32 tensors on a CPU, shapes checked."""
    given = alike(parameters)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *given)):
        return _BroNet.apply(x, *given)  # type: ignore[no-any-return, no-untyped-call]
    return _outputs_alone(x, given)
