"""The passes between the products of stacked networks on a CPU, compiled (csrc/layer_norm.hpp).

Memory:  a pass reads its inputs once and writes its output once.
Numbers: float32.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from . import passes_plain
from .passes_plain import Call, Held, Pass
from .reference import EPS
from .runtime import native

__all__ = ["PASSES", "Norm"]


class Norm(passes_plain.Norm):
    """See passes_plain.Norm. The tensors must be kept as long as what is returned: it holds addresses."""

    def _vectors(self, held: Held) -> tuple[Tensor, Tensor, Tensor]:
        bias, weight, shift = self.split(held.vectors)
        return weight.new_zeros(weight.shape[1]).expand_as(weight) if bias is None else bias, weight, shift

    def forward(self, held: Held) -> Call:
        product, _, relu, added, out, stats = held
        assert stats is not None
        bias, weight, shift = self._vectors(held)
        mean = stats.data_ptr()
        arguments = (
            *product.shape, bias.stride(0), weight.stride(0), product.data_ptr(), bias.data_ptr(),
            weight.data_ptr(), shift.data_ptr(), 0 if added is None else added.data_ptr(), relu, EPS,
            out.data_ptr(), mean, mean + 4 * stats.stride(0),
        )  # fmt: skip
        return _kept(partial(native.compiled.bias_layer_norm_forward, *arguments), bias)

    def backward(
        self,
        held: Held,
        dout: Tensor,
        dproduct: Tensor,
        into: Sequence[Tensor] | None,
        pieces: Tensor | None,
    ) -> Call:
        product, _, relu, _, _, stats = held
        assert stats is not None
        bias, weight, shift = self._vectors(held)
        mean = stats.data_ptr()
        places, strides, unused = [0, 0, 0], [0, 0], None
        if into is not None:
            *given, dweight, dshift = into
            unused = None if given else product.new_empty(weight.shape[1]).expand_as(dweight)
            dbias = given[0] if unused is None else unused
            places = [x.data_ptr() for x in (dbias, dweight, dshift)]
            strides = [dbias.stride(0), dweight.stride(0)]
        arguments = (
            *product.shape, bias.stride(0), weight.stride(0), *strides, dout.data_ptr(), product.data_ptr(),
            bias.data_ptr(), weight.data_ptr(), shift.data_ptr(), relu, mean, mean + 4 * stats.stride(0),
            dproduct.data_ptr(), *places,
        )  # fmt: skip
        return _kept(partial(native.compiled.bias_layer_norm_backward, *arguments), bias, unused)


def _kept(call: partial[None], *tensors: Tensor | None) -> Call:
    """The call, which keeps the memory of these alive."""
    call.tensors = tensors  # type: ignore[attr-defined]
    return call


BATCHED = False
MINE: dict[str, Pass] = {"norm": Norm(), "layer_norm": Norm(bias=False)}
PASSES = ChainMap(MINE, passes_plain.PASSES)  # what is added there later is here too
