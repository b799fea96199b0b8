"""What runs between the products of stacked networks, in PyTorch: any dtype, any device, seen by whatever
watches. `PASSES` names every pass there is; passes_cpu.py and norm.py have faster ones of the same names.
Each of the three has `multiply`, which makes the products, and BATCHED: whether a launch costs more
than memory for gradients of products.

Formulas: norm.py. Numbers: computed in float32, in float64 for float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .products import Call
from .products import by_torch as multiply
from .reference import EPS
from .runtime import native
from .runtime.dispatch import chosen
from .runtime.twins import twin

__all__ = ["BATCHED", "PASSES", "Bias", "Call", "Held", "Norm", "Pass", "multiply", "rounded", "sum_rows"]


class Held(NamedTuple):
    """What a pass of one stage is over; these tensors stay.

    product: [N, B, H], or the value that the stage reads. vectors: [N, H]. added: a value, added last.
    out: [N, B, H], the value of the stage. stats: [2, N, B], where the pass keeps any.
    """

    product: Tensor
    vectors: Sequence[Tensor]
    relu: bool
    added: Tensor | None
    out: Tensor
    stats: Tensor | None


class Pass:
    """What turns a product [N, B, H] into the value of its stage, and its gradient back.

    A method is given tensors that stay, and returns what is called at every pass over them. Vectors may be
    any distance apart, the same for all of a stage; everything else is contiguous.

    Attributes:
        vectors: names of its parameters [N, H].
        in_place: the product, with the first vector for its bias, is made where the value will be, and the
            backward pass does not read it.
        keeps_stats: two numbers of each row are kept for the backward pass.
        partial_sums: sums over rows are left in pieces, which `reduce` of the module adds up at the end.
    """

    vectors: tuple[str, ...] = ()
    in_place = False
    keeps_stats = False
    partial_sums = False

    def formula(self, product: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """What it is, with gradients, for reference.network: of the product [N, B, H] and vectors [N, H],
        before a ReLU."""
        raise NotImplementedError

    def forward(self, held: Held) -> Call | None:
        """From the product to the value; None where nothing is left to do."""
        raise NotImplementedError

    def writes(self, relu: bool) -> bool:
        """Whether the gradient of the product differs from that of the value."""
        return True

    def backward(
        self,
        held: Held,
        dout: Tensor,
        dproduct: Tensor,
        into: Sequence[Tensor] | None,
        pieces: Tensor | None,
    ) -> Call | None:
        """From the gradient of the value to that of the product, which may be the same tensor, and of the
        vectors, `into` or `pieces`."""
        raise NotImplementedError


class Norm(Pass):
    """LayerNorm of the product plus a bias, or without a bias; see norm.py."""

    keeps_stats = True

    def __init__(self, bias: bool = True) -> None:
        self.vectors = ("bias", "norm_weight", "norm_bias") if bias else ("norm_weight", "norm_bias")

    def split(self, vectors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor, Tensor]:
        """Bias, if there is one, weight and shift."""
        *bias, weight, shift = vectors
        return bias[0] if bias else None, weight, shift

    def forward(self, held: Held) -> Call:
        product, vectors, relu, added, out, stats = held
        assert stats is not None
        return partial(_norm_forward, product, *self.split(vectors), added, relu, out, stats)

    def backward(
        self,
        held: Held,
        dout: Tensor,
        dproduct: Tensor,
        into: Sequence[Tensor] | None,
        pieces: Tensor | None,
    ) -> Call:
        assert held.stats is not None
        vectors = self.split(held.vectors)
        return partial(_norm_backward, dout, held.product, *vectors, held.relu, held.stats, dproduct, into)


class Bias(Pass):
    """The product plus a bias."""

    vectors = ("bias",)
    in_place = True

    def forward(self, held: Held) -> Call | None:
        if held.added is not None:
            return partial(held.out.add_, held.added)
        return held.out.relu_ if held.relu else None

    def writes(self, relu: bool) -> bool:
        return relu

    def backward(
        self,
        held: Held,
        dout: Tensor,
        dproduct: Tensor,
        into: Sequence[Tensor] | None,
        pieces: Tensor | None,
    ) -> Call | None:
        if into is None and not held.relu:
            return None
        out = held.out if held.relu else None
        return partial(_bias_backward, dout, out, dproduct, into[0] if into else None)


BATCHED = False
PASSES: dict[str, Pass] = {"norm": Norm(), "layer_norm": Norm(bias=False), "bias": Bias()}


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, contiguous, in a narrower dtype. Torch's own threads would spin for what comes next."""
    if dtype != torch.bfloat16 or chosen(None) != "auto" or not native.takes(x):
        return x.to(dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    native.compiled.round_all(x.numel(), x.data_ptr(), out.data_ptr())
    return out


def sum_rows(x: Tensor, out: Tensor) -> None:
    """Sums [N, H] over the rows of x [N, B, H], contiguous."""
    if x.dtype == out.dtype and chosen(None) == "auto" and native.takes_rows(x):
        low = native.LOW[x.dtype]
        networks, rows, width = x.shape
        places = x.data_ptr(), out.data_ptr(), out.stride(0)
        native.compiled.sum_rows(low, networks, rows, width, *places)
    else:
        torch.sum(x, 1, dtype=out.dtype, out=out)


def _bias_backward(dout: Tensor, out: Tensor | None, dproduct: Tensor, into: Tensor | None) -> None:
    if out is not None:
        torch.ops.aten.threshold_backward.grad_input(dout, out, 0.0, grad_input=dproduct)
    if into is not None:
        sum_rows(dproduct, into)


def _norm_forward(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    y: Tensor,
    stats: Tensor,
) -> None:
    out, mean, rstd = twin(_forward)(x, bias, weight, shift, residual, relu, stats.dtype)
    y.copy_(out)
    stats[0].copy_(mean)
    stats[1].copy_(rstd)


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    relu: bool,
    stats: Tensor,
    dx: Tensor,
    into: Sequence[Tensor] | None,
) -> None:
    mean, rstd = stats.unbind()
    dh, sums = twin(_backward)(dy, x, bias, weight, shift, relu, mean, rstd, into is not None)
    dx.copy_(dh)
    if into is not None:
        for place, total in zip(into, sums[-len(into) :], strict=True):
            place.copy_(total)


def _forward(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, shift = (vector.to(dtype).unsqueeze(1) for vector in (weight, shift))
    h = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype).unsqueeze(1)
    normed, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], None, None, EPS)
    out = torch.addcmul(shift, normed, weight)
    if relu:
        out = out.relu()
    out = out if residual is None else out + residual
    return out.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def _backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    relu: bool,
    mean: Tensor,
    rstd: Tensor,
    wants_sums: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    weight, shift = (vector.to(mean.dtype).unsqueeze(1) for vector in (weight, shift))
    mean, rstd = mean.unsqueeze(-1), rstd.unsqueeze(-1)
    h = x.to(mean.dtype) if bias is None else x.to(mean.dtype) + bias.to(mean.dtype).unsqueeze(1)
    n = (h - mean) * rstd
    g = dy.to(mean.dtype)
    if relu:
        g = g.masked_fill(torch.addcmul(shift, n, weight) <= 0.0, 0.0)
    scaled = g * weight
    dh = rstd * (scaled - scaled.mean(-1, keepdim=True) - n * (scaled * n).mean(-1, keepdim=True))
    return dh.to(x.dtype), (dh.sum(1), (g * n).sum(1), g.sum(1)) if wants_sums else ()
