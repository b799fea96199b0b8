"""Stacked BroNets without autograd: forward and backward in memory that stays, gradients into given buffers.

What a learner runs thousands of times at one batch size: no memory is asked for and no graph is recorded, so
that on a CPU nothing is left beside the arithmetic, and a CUDA graph can hold the whole.

Dims:   N networks, of which the first G get gradients; B rows; I inputs, H width, K outputs, L layers.
Memory: products and outputs [L, N, B, H], 3 more [G, B, H] (L + 2 on CUDA); a frozen plan has none of its own
        if it may share another's. With `recompute` outputs and inner products are made again for the backward
        pass: 2 + blocks + 5 buffers of [N, B, H] are left.
Loop:   _stacked.py. Twin: autograd through reference.bronet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._stacked import Arrays, Backward, Forward, Memory, layers_of, passes_for

__all__ = ["Arrays", "BroNetPlan"]


class BroNetPlan:
    """Passes of N stacked BroNets over B rows.

    Args:
        parameters: as `bronet` takes them, [N, ..]; networks any distance apart. They are read where they
            lie at every pass: change them in place.
        rows: B.
        gradients: where those of the first G networks go; None if no parameter wants any.
        share: a plan of at least as many networks, layers and rows, whose backward pass is over whenever this
            one runs: its memory is used.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rows: int,
        gradients: Arrays | None = None,
        share: BroNetPlan | None = None,
    ) -> None:
        self.parameters, self.rows, self.gradients = list(parameters), rows, gradients
        head = self.parameters[-2]
        networks, width, outputs = head.shape
        self.trained = networks if gradients is None else gradients.head.shape[0]
        layers, shape = len(layers_of(self.parameters)), (networks, rows, width)
        wide = torch.float64 if head.dtype == torch.float64 else torch.float32
        if share is None:
            products, passed = head.new_empty(2, layers, *shape).unbind()
            stats = head.new_empty(layers, 2, networks, rows, dtype=wide)
        else:
            size = layers * networks * rows
            products, passed, stats = share.memory.whole
            products = products.flatten()[: size * width].view(layers, *shape)
            passed = passed.flatten()[: size * width].view(layers, *shape)
            stats = stats.flatten()[: 2 * size].view(layers, 2, networks, rows)
        self.memory: Memory = Memory(products, passed, stats)
        self._shares = share is not None
        self.out = head.new_empty(networks, rows, outputs)
        self._forward: dict[int, Forward] = {}
        self._backward: dict[str, Backward] = {}
        self._inputs: Sequence[Tensor] = ()

    def bytes(self, device: str) -> int:
        """Memory of its own on a device of this kind, that of the backward pass included."""
        products, _, stats = self.memory.whole
        layers = len(products)
        every = self.gradients is not None and torch.device(device).type == "cuda"
        sweep = (layers + 2 if every else 3) * self.trained * products[0, 0].numel()
        held = 0 if self._shares else 2 * products.numel() * products.element_size()
        held += 0 if self._shares else stats.numel() * stats.element_size()
        return held + (sweep + self.out.numel()) * self.out.element_size()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Outputs [N, B, K], overwritten by the next call.

        Args:
            inputs: one [B, I] for all networks, or several, each for an equal share of them in order; they
                must stay as they are until the backward pass.
        """
        self._inputs, parts = inputs, len(inputs)
        if parts not in self._forward:
            self._forward[parts] = Forward(self.parameters, self.memory, self.out, parts)
        return self._forward[parts](inputs, passes_for(inputs[0]))

    def backward(self, grad: Tensor, wants_dx: bool = False) -> Tensor | None:
        """Fill the gradients of the first G networks; returns that of their input where it is wanted.

        Args:
            grad: [G, B, K], contiguous, of what `forward` returned for them.
        Returns:
            [B, I], summed over the networks.
        """
        passes = passes_for(grad)
        if passes.__name__ not in self._backward:
            whole = self.trained == len(self.out)
            memory = self.memory if whole else self.memory.part(self.trained)
            parameters = self.parameters if whole else [p[: self.trained] for p in self.parameters]
            self._backward[passes.__name__] = Backward(parameters, memory, self.gradients, passes)
        dx = self._backward[passes.__name__](grad, self._inputs[0], wants_dx)
        return None if dx is None else dx.sum(0)
