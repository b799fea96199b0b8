"""The passes between the products of stacked networks on a CPU, compiled (csrc/layer_norm.hpp).

Memory:  a pass reads its inputs once and writes its output once.
Numbers: float32 and bfloat16, computed in float32.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import passes_plain
from .passes_plain import Call, Held, Pass
from .products import multiply
from .reference import EPS
from .runtime import native

__all__ = ["BATCHED", "PASSES", "Norm", "multiply"]


class Norm(passes_plain.Norm):
    """See passes_plain.Norm. The tensors must be kept as long as what is returned: it holds addresses."""

    def _vectors(self, held: Held) -> tuple[Tensor, Tensor, Tensor]:
        bias, weight, shift = self.split(held.vectors)
        return weight.new_zeros(weight.shape[1]).expand_as(weight) if bias is None else bias, weight, shift

    def _read(self, held: Held, vectors: tuple[Tensor, Tensor, Tensor]) -> tuple[Any, ...]:
        """What both directions read."""
        bias, weight, _ = vectors
        places = (x.data_ptr() for x in (held.product, *vectors))
        low = native.LOW[held.product.dtype]
        return low, *held.product.shape, bias.stride(0), weight.stride(0), *places, held.relu

    def forward(self, held: Held) -> Call:
        assert held.stats is not None
        vectors = self._vectors(held)
        mean, rstd = (x.data_ptr() for x in held.stats)
        added = 0 if held.added is None else held.added.data_ptr()
        out = held.out.data_ptr()
        step = native.compiled.bias_layer_norm_forward(  # type: ignore[call-arg]
            *self._read(held, vectors), added, EPS, out, mean, rstd
        )
        step.tensors = vectors
        return step

    def backward(
        self,
        held: Held,
        dout: Tensor,
        dproduct: Tensor,
        into: Sequence[Tensor] | None,
        pieces: Tensor | None,
    ) -> Call:
        assert held.stats is not None
        vectors = self._vectors(held)
        mean, rstd = (x.data_ptr() for x in held.stats)
        places, strides, unused = [0, 0, 0], [0, 0], None
        if into is not None:
            *given, dweight, dshift = into
            unused = None if given else dweight.new_empty(dweight.shape[1]).expand_as(dweight)
            dbias = given[0] if unused is None else unused
            places = [x.data_ptr() for x in (dbias, dweight, dshift)]
            strides = [dbias.stride(0), dweight.stride(0)]
        places = [dproduct.data_ptr(), *places]
        read = *self._read(held, vectors), *strides, dout.data_ptr(), mean, rstd
        step = native.compiled.bias_layer_norm_backward(*read, *places)
        step.tensors = *vectors, unused
        return step


BATCHED = False
MINE: dict[str, Pass] = {"norm": Norm(), "layer_norm": Norm(bias=False)}
PASSES = ChainMap(MINE, passes_plain.PASSES)  # what is added there later is here too
