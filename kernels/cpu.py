"""The twins' fast forms on a CPU: fused C++ between the matrix products, one autograd node per network.

    bronet    forward: GEMM, then bias + LayerNorm + (ReLU | residual) in one pass over the rows.
              backward, written by hand: per layer one such pass, two GEMMs, and the residual's gradient added
              by the GEMM itself. Only the input's gradient is computed where no parameter wants one.
    adamw_    torch's fused step over the flat buffer.

Memory:  each elementwise pass reads its inputs once and writes its output once (csrc/layer_norm.hpp).
Numbers: float32; other dtypes, other devices and an installation without the C++ module take the twin.
Twins:   reference.bronet, reference.adamw_
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from . import reference

try:
    from . import _cpu
except ImportError:  # a checkout that was not built
    _cpu = None  # type: ignore[assignment]

EPS = 1e-6


def _norm_forward(
    x: Tensor, layer: tuple[Tensor, ...], residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    """Output [E, B, H] and the rows' mean and 1/std [2, E, B]; layer: (bias, weight, shift), each [E, H]."""
    members, rows, width = x.shape
    bias, weight, shift = (parameter.data_ptr() for parameter in layer)
    y = torch.empty_like(x)
    stats = x.new_empty(2, members, rows)
    mean = stats.data_ptr()
    rstd = mean + 4 * members * rows
    held = 0 if residual is None else residual.data_ptr()
    _cpu.bias_layer_norm_forward(
        members, rows, width, x.data_ptr(), bias, weight, shift, held, relu, EPS, y.data_ptr(), mean, rstd
    )
    return y, stats


def _norm_backward(
    dy: Tensor, y: Tensor | None, x: Tensor, layer: tuple[Tensor, ...], stats: Tensor, parameters: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the norm's input [E, B, H] and, where asked, of (bias, weight, shift), [3, E, H]."""
    members, rows, width = x.shape
    bias, weight, _ = (parameter.data_ptr() for parameter in layer)
    mean = stats.data_ptr()
    rstd = mean + 4 * members * rows
    dx = torch.empty_like(x)
    grads = x.new_empty(3, members, width) if parameters else None
    dbias, dweight, dshift = (0, 0, 0) if grads is None else (part.data_ptr() for part in grads)
    output = 0 if y is None else y.data_ptr()
    _cpu.bias_layer_norm_backward(
        members, rows, width, dy.data_ptr(), output, x.data_ptr(), bias, weight, mean, rstd,
        dx.data_ptr(), dbias, dweight, dshift,
    )  # fmt: skip
    return dx, grads


class _BroNet(torch.autograd.Function):
    """x [E, B, I], then (kernel, bias, norm weight, norm bias) per layer, then the head's kernel and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        *body, head_kernel, head_bias = parameters
        layers = [tuple(body[i : i + 4]) for i in range(0, len(body), 4)]
        inputs, products, stats = [x], [], []
        for index, (kernel, *norm) in enumerate(layers):
            product = torch.bmm(inputs[-1], kernel)
            closes_block = index > 0 and index % 2 == 0
            residual = inputs[-2] if closes_block else None
            y, moments = _norm_forward(product, tuple(norm), residual, relu=not closes_block)
            inputs.append(y)
            products.append(product)
            stats.append(moments)
        ctx.layers = len(layers)
        ctx.save_for_backward(*inputs, *products, *stats, *parameters)
        return torch.baddbmm(head_bias.unsqueeze(1), inputs[-1], head_kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "bronet on a CPU has no second derivative (create_graph=True): use kernels.reference.bronet"
            )
        n = ctx.layers
        saved = ctx.saved_tensors
        inputs, products, stats = saved[: n + 1], saved[n + 1 : 2 * n + 1], saved[2 * n + 1 : 3 * n + 1]
        parameters = saved[3 * n + 1 :]
        wanted = any(ctx.needs_input_grad[1:])
        out: list[Tensor | None] = [None] * len(parameters)

        grad = grad.contiguous()
        head_kernel = parameters[-2]
        if wanted:
            out[-2:] = torch.bmm(inputs[n].mT, grad), grad.sum(1)
        dy = torch.bmm(grad, head_kernel.mT)
        skip = dy  # gradient that reaches the start of the block past its two layers
        for index in reversed(range(n)):
            kernel, *norm = parameters[4 * index : 4 * index + 4]
            closes_block = index > 0 and index % 2 == 0
            output = None if closes_block else inputs[index + 1]
            if closes_block:
                skip = dy
            dh, grads = _norm_backward(dy, output, products[index], tuple(norm), stats[index], wanted)
            if grads is not None:
                out[4 * index : 4 * index + 4] = torch.bmm(inputs[index].mT, dh), *grads
            if index % 2 == 1:
                dy = torch.baddbmm(skip, dh, kernel.mT)
            elif index > 0 or ctx.needs_input_grad[0]:
                dy = torch.bmm(dh, kernel.mT)
        return dy if ctx.needs_input_grad[0] else None, *out


def bronet(x: Tensor, *parameters: Tensor) -> Tensor:
    """As `reference.bronet`."""
    tensors = (x, *parameters)
    if _cpu is None or any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return reference.bronet(x, *parameters)
    members = parameters[0].shape[0]
    x = x.expand(members, *x.shape) if x.dim() == 2 else x
    return _BroNet.apply(x, *(p.contiguous() for p in parameters))  # type: ignore[no-any-return, no-untyped-call]


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """As `reference.adamw_`."""
    adamw(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=learning_rate,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
