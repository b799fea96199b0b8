"""Stacked BroNets without autograd: forward and backward in memory that stays, gradients into given buffers.

What a learner runs thousands of times at one batch size: no memory is asked for and no graph is recorded, so
that on a CPU nothing is left beside the arithmetic, and a CUDA graph can hold the whole.

Dims:   N networks, of which the first G get gradients; B rows, R of them with gradients; I inputs, H width,
        K outputs, L layers.
Memory: products and outputs [L, N, B, H], 3 more [G, R, H] (L + 2 on CUDA with gradients). With `recompute`
        4 + blocks of [N, B, H] and 3 more [G, R, H], for 2 * blocks - 1 more products of G networks.
Loop:   _stacked.py. Twin: autograd through reference.bronet.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _bronet_cpu, _bronet_plain
from ._checks import check_bronet_parameters
from ._stacked import Arrays, Backward, Forward, Memory, layers_of, passes_for

__all__ = ["Arrays", "BroNetPlan"]


def _check_gradients(gradients: Arrays, parameters: Sequence[Tensor]) -> None:
    """The passes write where they are told, and nowhere else if these fit."""
    (networks, inputs, width), outputs = parameters[0].shape, parameters[-1].shape[1]
    layers, trained = len(layers_of(parameters)), gradients.head.shape[0]
    if not 0 < trained <= networks:
        raise ValueError(f"gradients must be of 1 to N = {networks} networks, got {trained}")
    shapes = {
        "first": (trained, inputs, width),
        "square": (layers - 1, trained, width, width),
        "vectors": (layers, 3, trained, width),
        "head": (trained, width, outputs),
        "bias": (trained, outputs),
    }
    for name, x in gradients._asdict().items():
        if x.shape != shapes[name]:
            raise ValueError(f"gradients.{name} must have shape {list(shapes[name])}, got {list(x.shape)}")
        if name in ("vectors", "bias") and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"gradients.{name} must have strides [.., 1], got {list(x.stride())}")


class BroNetPlan:
    """Passes of N stacked BroNets over B rows.

    Args:
        parameters: as `bronet` takes them, [N, ..]; networks any distance apart. They are read where they
            lie at every pass: change them in place.
        rows: B.
        gradients: where those of the first G networks go; None if no parameter wants any.
        share: a plan of as many layers and rows and at least as many networks, whose backward pass is over
            whenever this one runs: its memory is used, and it says whether to recompute.
        recompute: keep only what comes out of the blocks, and make the rest again for the backward pass.
        trained_rows: R, of which there are gradients: the last ones, of a single network. All by default.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rows: int,
        gradients: Arrays | None = None,
        share: BroNetPlan | None = None,
        recompute: bool = False,
        trained_rows: int | None = None,
    ) -> None:
        # tensors of its own: what it holds stays where it is, also if a module puts other data into its own
        self.parameters, self.rows, self.gradients = [p.detach() for p in parameters], rows, gradients
        self.trained_rows = rows if trained_rows is None else trained_rows
        check_bronet_parameters(self.parameters)
        if gradients is not None:
            _check_gradients(gradients, self.parameters)
        for index, (_, *vectors) in enumerate(layers_of(self.parameters)):
            strides = {vector.stride() for vector in vectors}  # the compiled passes take one for all three
            if len(strides) > 1 or vectors[0].stride(-1) != 1:
                raise ValueError(
                    f"vectors of layer {index} must have the same strides [.., 1], got {strides}"
                )
        self.recompute: bool = recompute if share is None else share.recompute
        head = self.parameters[-2]
        networks, _, outputs = head.shape
        if not 0 < self.trained_rows <= rows:
            raise ValueError(f"trained_rows must be from 1 to B = {rows}, got {trained_rows}")
        if networks > 1 and self.trained_rows < rows:  # a pass over some of their rows has gaps
            raise ValueError(
                f"trained_rows must be B = {rows} with N = {networks} networks, got {trained_rows}"
            )
        self.trained = networks if gradients is None else gradients.head.shape[0]
        self._shares = share is not None
        self.memory: Memory = self._allocate() if share is None else share.memory.part(networks, rows)
        if share is not None:
            self._check_share(share)
        self.out: Tensor = head.new_empty(networks, rows, outputs)
        vectors = [p for layer in layers_of(self.parameters) for p in layer[1:]]
        vectors += [] if gradients is None else [gradients.vectors]
        self._float32 = all(vector.dtype == torch.float32 for vector in vectors)
        self._forward: dict[tuple[int, str], Forward] = {}
        self._backward: dict[str, Backward] = {}
        self._inputs: Sequence[Tensor] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Without what was looked up for the passes: it holds addresses, which are not those of a copy."""
        return {**self.__dict__, "_forward": {}, "_backward": {}}

    def _check_share(self, share: BroNetPlan) -> None:
        """What is missing in another's memory, torch would make up for in memory of nobody's."""
        layers, networks = len(layers_of(self.parameters)), len(self.parameters[0])
        held = len(layers_of(share.parameters)), len(share.out), share.rows
        if held[0] != layers or held[1] < networks or held[2] < self.rows:
            raise ValueError(
                f"share must have L = {layers} layers, N >= {networks} networks and B >= {self.rows} rows, "
                f"got {held[0]}, {held[1]} and {held[2]}"
            )

    def _passes(self, x: Tensor) -> ModuleType:
        """What runs between the products of x: the compiled passes take vectors in float32 alone."""
        passes = passes_for(x)
        return _bronet_plain if passes is _bronet_cpu and not self._float32 else passes

    def _allocate(self) -> Memory:
        head, layers = self.parameters[-2], len(layers_of(self.parameters))
        networks, width, _ = head.shape
        shape = networks, self.rows, width
        wide = torch.float64 if head.dtype == torch.float64 else torch.float32
        stats = head.new_empty(layers, 2, *shape[:2], dtype=wide)
        if not self.recompute or layers == 1:  # without blocks there is nothing to make again
            return Memory(head.new_empty(layers, *shape), head.new_empty(layers, *shape), stats)
        turns = head.new_empty(2, *shape).unbind()
        inner, *ends = head.new_empty(layers // 2 + 2, *shape)
        products = [turns[index % 2] for index in range(layers)]
        outputs = [inner if index % 2 else ends[index // 2] for index in range(layers)]
        return Memory(products, outputs, stats, recomputed=True)

    def bytes(self, device: str) -> int:
        """Memory of its own on a device of this kind, that of the backward pass included."""
        memory = self.memory
        batched = self.gradients is not None and torch.device(device).type == "cuda" and not self.recompute
        slots = len(memory.products) + 2 if batched else 3
        width = memory.products[0].shape[-1]
        held = slots * self.trained * self.trained_rows * width + self.out.numel()
        total: int = held * self.out.element_size()
        if not self._shares:
            parts = {id(x): x for x in (*memory.products, *memory.outputs, *memory.stats)}
            total += sum(x.numel() * x.element_size() for x in parts.values())
        return total

    def forward(self, *inputs: Tensor) -> Tensor:
        """Outputs [N, B, K], overwritten by the next call.

        Args:
            inputs: one [B, I] for all networks, or several, each for an equal share of them in order; they
                must stay as they are until the backward pass.
        """
        parts = len(inputs)
        for x in inputs:
            if x.shape[-2] != self.rows:  # torch would make the memory larger and go on
                raise ValueError(f"inputs must have B = {self.rows} rows, got {x.shape[-2]}")
        if not parts or len(self.out) % parts:
            raise ValueError(f"inputs must share N = {len(self.out)} networks equally, got {parts}")
        self._inputs = inputs
        passes = self._passes(inputs[0])
        kind = parts, passes.__name__
        if kind not in self._forward:
            self._forward[kind] = Forward(self.parameters, self.memory, passes, self.out, parts)
        return self._forward[kind](inputs)

    def backward(self, grad: Tensor, columns: slice | None = None) -> Tensor | None:
        """Fill the gradients of the first G networks; returns those of their input where they are wanted.

        Args:
            grad: [G, R, K], contiguous, of what `forward` returned for them.
            columns: of the input, C of them, of which a gradient is wanted; None for none.
        Returns:
            [G, R, C]: each network's own, to be summed where they had one input.
        """
        if not self._inputs:
            raise RuntimeError("a backward pass needs a forward pass before it")
        wanted = (self.trained, self.trained_rows, self.out.shape[-1])
        if grad.shape != wanted or not grad.is_contiguous():
            told = f"{list(grad.shape)}, strides {list(grad.stride())}"
            raise ValueError(f"grad must have shape [G, R, K] = {list(wanted)} and no gaps, got {told}")
        if self.trained > len(self.out) // len(self._inputs):
            raise ValueError("networks with gradients must all take the first input")
        passes = self._passes(grad)
        if passes.__name__ not in self._backward:
            whole = self.trained == len(self.out)
            memory = self.memory
            if not whole or self.trained_rows < self.rows:
                memory = memory.part(self.trained, self.trained_rows)
            parameters = self.parameters if whole else [p[: self.trained] for p in self.parameters]
            self._backward[passes.__name__] = Backward(parameters, memory, self.gradients, passes)
        return self._backward[passes.__name__](grad, self._inputs[0][..., -self.trained_rows :, :], columns)
