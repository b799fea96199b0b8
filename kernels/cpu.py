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

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import reference

try:
    from . import _cpu
except ImportError:  # a checkout that was not built
    _cpu = None  # type: ignore[assignment]

EPS = 1e-6
REACH = 0.5 * (reference.LOG_STD_MAX - reference.LOG_STD_MIN)
CENTRE = 0.5 * (reference.LOG_STD_MAX + reference.LOG_STD_MIN)
SHAPES_KEPT = 16
_free: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = {}


def _is_plain(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


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
    _cpu.bias_layer_norm_forward(
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
    _cpu.bias_layer_norm_backward(
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "bronet on a CPU has no second derivative (create_graph=True): use kernels.reference.bronet"
            )
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


def _check_shapes(x: Tensor, parameters: tuple[Tensor, ...]) -> None:
    """The compiled passes trust the shapes, so they are checked here."""
    if len(parameters) < 6 or len(parameters) % 8 != 6:
        raise ValueError(
            f"bronet takes 4 tensors per layer, one layer plus two per block, and 2 for the head: "
            f"6, 14, 22, ... in all, got {len(parameters)}"
        )
    if parameters[0].dim() != 3:
        raise ValueError(f"kernel of layer 0 must have shape [E, I, H], got {list(parameters[0].shape)}")
    members, inputs, width = parameters[0].shape
    if x.shape[-1:] != (inputs,) or x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] != members):
        wanted = f"[B, I] or [E, B, I] with E = {members}, I = {inputs}"
        raise ValueError(f"x must have shape {wanted}, got {list(x.shape)}")
    for index in range(len(parameters) // 4):
        kernel, *norm = parameters[4 * index : 4 * index + 4]
        if kernel.shape != (members, inputs, width):
            wanted = f"[E, in, H] = {[members, inputs, width]}"
            raise ValueError(f"kernel of layer {index} must have shape {wanted}, got {list(kernel.shape)}")
        for vector in norm:
            if vector.shape != (members, width):
                wanted = f"[E, H] = {[members, width]}"
                raise ValueError(
                    f"vectors of layer {index} must have shape {wanted}, got {list(vector.shape)}"
                )
        inputs = width


def bronet(x: Tensor, *parameters: Tensor) -> Tensor:
    """As `reference.bronet`. Raises ValueError for shapes that do not fit."""
    _check_shapes(x, parameters)
    if _cpu is None or not _is_plain(x, *parameters):
        return reference.bronet(x, *parameters)
    members = parameters[0].shape[0]
    x = x.expand(members, *x.shape) if x.dim() == 2 else x
    return _BroNet.apply(x, *(p.contiguous() for p in parameters))  # type: ignore[no-any-return, no-untyped-call]


class _TanhGaussian(torch.autograd.Function):
    """With s = log_std and t = tanh(raw), so that s = centre + reach * t:

    d log pi / du = 2 a,   du = da (1 - a^2) + 2 a dlogpi,
    ds = du std noise - dlogpi,   draw = reach (1 - t^2) ds
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, raw_log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        t = raw_log_std.tanh()
        log_std = t * REACH + CENTRE
        spread = log_std.exp().mul_(noise)
        u = mean + spread
        actions = u.tanh()
        per_dim = F.softplus(-2.0 * u).add_(u).mul_(2.0).sub_(log_std).addcmul_(noise, noise, value=-0.5)
        ctx.save_for_backward(t, spread, actions)
        constant = 0.5 * math.log(2.0 * math.pi) + 2.0 * math.log(2.0)
        return actions, per_dim.sum(-1).sub_(mean.shape[-1] * constant)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dactions: Tensor, dlog_probs: Tensor) -> tuple[Tensor, Tensor, None]:
        t, spread, actions = ctx.saved_tensors
        dlog_probs = dlog_probs.unsqueeze(-1)
        du = torch.addcmul(dactions, dactions * actions, actions, value=-1.0)
        du.addcmul_(actions, dlog_probs, value=2.0)
        dlog_std = (du * spread).sub_(dlog_probs)
        return du, torch.addcmul(dlog_std, dlog_std * t, t, value=-1.0).mul_(REACH), None


def tanh_gaussian(mean: Tensor, raw_log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.tanh_gaussian`, in fewer operations; any dtype and device."""
    return _TanhGaussian.apply(mean, raw_log_std, noise.detach())  # type: ignore[no-any-return, no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        ctx.save_for_backward(log_probs, target)
        return (log_probs * target).sum(-1).neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_probs, target = ctx.saved_tensors
        return log_probs.exp().sub_(target).mul_(grad.unsqueeze(-1)), None


def categorical_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """As `reference.categorical_cross_entropy`, in fewer operations; any dtype and device."""
    return _CrossEntropy.apply(logits, target.detach())  # type: ignore[no-any-return, no-untyped-call]


def categorical_projection(probs: Tensor, positions: Tensor, v_max: float) -> Tensor:
    """As `reference.categorical_projection`; [rows, K]."""
    if (
        _cpu is None
        or not _is_plain(probs, positions)
        or probs.requires_grad
        or probs.shape != positions.shape
    ):
        return reference.categorical_projection(probs, positions, v_max)
    probs, positions = probs.contiguous(), positions.contiguous()
    out = torch.empty_like(probs)
    *rows, atoms = probs.shape
    _cpu.categorical_projection(
        math.prod(rows), atoms, probs.data_ptr(), positions.data_ptr(), v_max, out.data_ptr()
    )
    return out


def categorical_target(
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | float,
    atoms: Tensor,
    v_max: float,
) -> Tensor:
    """As `reference.categorical_target`."""
    return reference.categorical_target(
        next_logits, rewards, discounts, next_log_probs, temperature, atoms, v_max, categorical_projection
    )


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
    step += 1
    torch._fused_adamw_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        lr=learning_rate,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
