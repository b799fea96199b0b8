"""The passes between the products of stacked networks on a CPU, compiled (csrc/layer_norm.hpp).

Memory:  a pass reads its inputs once and writes its output once.
Numbers: float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .passes_plain import Call, Pass
from .passes_plain import Norm as PlainNorm
from .reference import EPS
from .runtime import native

__all__ = ["PASSES", "Norm"]


class Norm(PlainNorm):
    """See passes_plain.Norm. The tensors must be kept as long as what is returned: it holds addresses."""

    def _vectors(self, product: Tensor, vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        bias, weight, shift = self.split(vectors)
        if bias is None:
            bias = product.new_zeros(weight.shape[1]).expand_as(weight)
        return bias, weight, shift

    def forward(
        self,
        product: Tensor,
        vectors: Sequence[Tensor],
        added: Tensor | None,
        relu: bool,
        out: Tensor,
        stats: Tensor | None,
    ) -> Call:
        assert stats is not None
        bias, weight, shift = self._vectors(product, vectors)
        mean = stats.data_ptr()
        arguments = (
            *product.shape, bias.stride(0), weight.stride(0), product.data_ptr(), bias.data_ptr(),
            weight.data_ptr(), shift.data_ptr(), 0 if added is None else added.data_ptr(), relu, EPS,
            out.data_ptr(), mean, mean + 4 * stats.stride(0),
        )  # fmt: skip
        return _kept(partial(native.compiled.bias_layer_norm_forward, *arguments), bias)

    def backward(
        self,
        dout: Tensor,
        product: Tensor,
        vectors: Sequence[Tensor],
        relu: bool,
        out: Tensor,
        stats: Tensor | None,
        dproduct: Tensor,
        into: Sequence[Tensor] | None,
        pieces: Tensor | None,
    ) -> Call:
        assert stats is not None
        bias, weight, shift = self._vectors(product, vectors)
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


def _kept(call: partial[object], *tensors: Tensor | None) -> Call:
    """The call, which keeps the memory of these alive."""
    call.tensors = tensors  # type: ignore[attr-defined]
    return call


PASSES: dict[str, Pass] = {"norm": Norm(), "layer_norm": Norm(bias=False)}
