"""BroNet on a CPU: compiled passes between the GEMMs and one autograd node (see bronet.py for the maths).

Per layer the backward is one such pass and two GEMMs; the residual's gradient is added by the GEMM itself,
and no weight gradient is computed where no parameter wants one.

Memory:  an elementwise pass reads its inputs once and writes its output once (csrc/layer_norm.hpp).
Numbers: float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._ops import first_derivative
from .reference import EPS

__all__ = ["bronet_on_cpu"]

SHAPES_KEPT = 16
_free: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = {}


class Workspace:
    """Scratch memory of one pass through a network; the next pass of the same shape gets it back.

    Fresh memory costs a page fault per 4 KB, which at these sizes took an eighth of the update. A workspace
    is returned when its last reference goes, so a graph that is kept alive keeps its activations.

    `slots[i]` is the tensor of shape[1:] in slot i, made once: indexing costs a microsecond each time.
    """

    def __init__(self, *shape: int) -> None:
        if len(_free) > SHAPES_KEPT:
            _free.clear()
        self.shape = shape
        try:
            self.slots = _free[shape].pop()
        except (KeyError, IndexError):
            self.slots = torch.empty(shape).unbind()

    def __del__(self, free: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = _free) -> None:
        free.setdefault(self.shape, []).append(self.slots)


def _norm_forward(
    x: Tensor, layer: Sequence[Tensor], residual: Tensor | None, relu: bool, y: Tensor, stats: Tensor
) -> None:
    """Fill `y` [E, B, H] and the rows' mean and 1/std [2, E, B]; layer: (bias, weight, shift) [E, H]."""
    members, rows, width = x.shape
    bias, weight, shift = (parameter.data_ptr() for parameter in layer)
    mean = stats.data_ptr()
    rstd = mean + 4 * members * rows
    held = 0 if residual is None else residual.data_ptr()
    _native.compiled.bias_layer_norm_forward(
        members, rows, width, x.data_ptr(), bias, weight, shift, held, relu, EPS, y.data_ptr(), mean, rstd
    )


def _norm_backward(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    layer: Sequence[Tensor],
    stats: Tensor,
    dx: Tensor,
    grads: Tensor | None,
) -> None:
    """Fill the gradients of the norm's input, `dx`, and of (bias, weight, shift), `grads` [3, E, H]."""
    members, rows, width = x.shape
    bias, weight, _ = (parameter.data_ptr() for parameter in layer)
    mean = stats.data_ptr()
    rstd = mean + 4 * members * rows
    first = 0 if grads is None else grads.data_ptr()
    size = 0 if grads is None else 4 * members * width
    output = 0 if y is None else y.data_ptr()
    _native.compiled.bias_layer_norm_backward(
        members, rows, width, dy.data_ptr(), output, x.data_ptr(), bias, weight, mean, rstd,
        dx.data_ptr(), first, first + size, first + 2 * size,
    )  # fmt: skip


class _BroNet(torch.autograd.Function):
    """x [E, B, I], then (kernel, bias, norm weight, norm bias) per layer, then the head's kernel and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        members, rows, _ = x.shape
        layers = (len(parameters) - 2) // 4
        width = parameters[0].shape[-1]
        work = Workspace(2 * layers, members, rows, width)  # per layer: the product, then the layer's output
        stats = Workspace(layers, 2, members, rows)
        hidden = x
        skip = x
        for index in range(layers):
            kernel, *norm = parameters[4 * index : 4 * index + 4]
            product, y = work.slots[2 * index : 2 * index + 2]
            torch.bmm(hidden, kernel, out=product)
            closes_block = index > 0 and index % 2 == 0
            residual = skip if closes_block else None
            _norm_forward(product, norm, residual, not closes_block, y, stats.slots[index])
            hidden = y
            if index % 2 == 0:
                skip = y
        ctx.work, ctx.stats = work, stats
        ctx.save_for_backward(x, *parameters)
        return torch.baddbmm(parameters[-1].unsqueeze(1), hidden, parameters[-2])

    @staticmethod
    @first_derivative("bronet")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        products, outputs, stats = ctx.work.slots[::2], ctx.work.slots[1::2], ctx.stats.slots
        layers = len(products)
        wanted = any(ctx.needs_input_grad[1:])
        out: list[Tensor | None] = [None] * len(parameters)
        scratch = Workspace(3, *products[0].shape)
        g, inner, dh = scratch.slots  # gradients of a block's ends, of its hidden layer, of a product

        grad = grad.contiguous()
        if wanted:
            out[-2:] = torch.bmm(outputs[-1].mT, grad), grad.sum(1)
        torch.bmm(grad, parameters[-2].mT, out=g)
        for index in reversed(range(layers)):
            kernel, *norm = parameters[4 * index : 4 * index + 4]
            opens_block, closes_block = index % 2 == 1, index > 0 and index % 2 == 0
            grads = x.new_empty(3, *norm[0].shape) if wanted else None
            mask = None if closes_block else outputs[index]
            incoming = inner if opens_block else g
            _norm_backward(incoming, mask, products[index], norm, stats[index], dh, grads)
            if grads is not None:
                below = x if index == 0 else outputs[index - 1]
                out[4 * index : 4 * index + 4] = torch.bmm(below.mT, dh), *grads
            if closes_block:
                torch.bmm(dh, kernel.mT, out=inner)
            elif opens_block:
                g.baddbmm_(dh, kernel.mT)
        dx = torch.bmm(dh, parameters[0].mT) if ctx.needs_input_grad[0] else None
        return dx, *out


def bronet_on_cpu(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """As `reference.bronet` for float32 tensors on a CPU, shapes checked."""
    members = parameters[0].shape[0]
    x = x.expand(members, *x.shape) if x.dim() == 2 else x
    return _BroNet.apply(x, *(p.contiguous() for p in parameters))  # type: ignore[no-any-return, no-untyped-call]
