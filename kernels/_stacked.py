"""The one loop through stacked BroNets, over memory that is given: behind `bronet` and behind `BroNetPlan`.

Forward, per layer: one batched product over all networks and one pass for bias, LayerNorm and ReLU or
residual. Backward, from the head down, with dh_i the gradient of layer i's product:

    d hidden = dh W^T;    the residual's gradient is added by the same product (beta = 1)
    dW_i = below_i^T dh_i;    biases and norms: sums over the rows, made by the pass itself

`passes` is what runs between the products: norm (Triton), _bronet_cpu (compiled) or _bronet_plain (PyTorch).
Where it says BATCHED, the square layers' dW are products over all layers at once, after the last, and sums
over the rows are left as `partials`, reduced at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._dispatch import chosen, takes_kernels

__all__ = ["Arrays", "Backward", "Forward", "Memory", "layers_of", "passes_for"]


def layers_of(parameters: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """(kernel, bias, norm weight, norm bias) of each layer; the head is left out."""
    return [parameters[i : i + 4] for i in range(0, len(parameters) - 2, 4)]


def passes_for(x: Tensor, impl: str | None = None) -> ModuleType:
    """What runs between the products of tensors like x."""
    from . import _bronet_cpu, _bronet_plain

    if takes_kernels(impl, x):
        from . import norm

        return norm
    return _bronet_cpu if chosen(impl) == "auto" and _native.takes(x) else _bronet_plain


Slots = Sequence[Tensor] | Tensor  # one tensor per layer, or all as one


class Memory:
    """Where a forward pass of N networks over B rows leaves what the backward needs.

    Per layer products and outputs [N, B, H], what a product is and what comes of it, and stats [2, N, B].
    Without a backward pass few slots will do, used in turn.

    Args:
        outputs: as one tensor [L, N, B, H] where they lie so, for products over all layers at once.
        recomputed: layers share products, and the first layers of blocks their outputs. The backward pass
            makes them again from what came out of the blocks.
    """

    def __init__(
        self,
        products: Slots,
        outputs: Slots,
        stats: Slots,
        recomputed: bool = False,
    ) -> None:
        self.products, self.outputs, self.stats = list(products), list(outputs), list(stats)
        self.whole = outputs if isinstance(outputs, Tensor) else None
        self.recomputed = recomputed

    def part(self, networks: int, rows: int) -> Memory:
        """That of the first networks and, of each, of the last rows."""
        products = [x[:networks, -rows:] for x in self.products]
        outputs: Slots = [x[:networks, -rows:] for x in self.outputs]
        if self.whole is not None:
            outputs = self.whole[:, :networks, -rows:]
        stats = [x[:, :networks, -rows:] for x in self.stats]
        return Memory(products, outputs, stats, self.recomputed)


class Arrays(NamedTuple):
    """The parameters of N networks, or their gradients, together: first kernel [N, I, H], square kernels
    [L - 1, N, H, H], vectors (bias, norm weight, norm bias) [L, 3, N, H], the head's kernel [N, H, K] and
    bias [N, K]. Networks, layers and rows may be any distance apart."""

    first: Tensor
    square: Tensor
    vectors: Tensor
    head: Tensor
    bias: Tensor

    def ordered(self) -> list[Tensor]:
        """As `bronet` takes them."""
        out: list[Tensor] = []
        for kernel, vectors in zip((self.first, *self.square), self.vectors, strict=True):
            out += [kernel, *vectors]
        return [*out, self.head, self.bias]


class Forward:
    """The forward pass: everything that is the same at each call is looked up once.

    Args:
        out: [N, B, K] for the outputs; new memory where it is None.
        parts: how many inputs there are, each for an equal share of the networks.
    """

    def __init__(
        self, parameters: Sequence[Tensor], memory: Memory, out: Tensor | None = None, parts: int = 1
    ) -> None:
        self.layers, self.memory, self.out = layers_of(parameters), memory, out
        self.head, self.bias = parameters[-2], parameters[-1].unsqueeze(1)
        kernel, product = self.layers[0][0], memory.products[0]
        self.share = kernel.shape[0] // parts
        self.first = tuple(zip(kernel.chunk(parts), product.chunk(parts), strict=True))

    def __call__(self, inputs: Sequence[Tensor], passes: ModuleType) -> Tensor:
        """[N, B, K] of one [N, B, I], or of several [B, I]."""
        products, outputs, stats = self.memory.products, self.memory.outputs, self.memory.stats
        for x, (kernel, product) in zip(inputs, self.first, strict=True):
            torch.bmm(x.expand(self.share, *x.shape[-2:]), kernel, out=product)
        hidden = skip = inputs[0]
        for index, (kernel, *vectors) in enumerate(self.layers):
            product, held = products[index % len(products)], stats[index % len(stats)]
            y = outputs[index % len(outputs)]  # of three, the one that is neither `hidden` nor `skip`
            if index:
                torch.bmm(hidden, kernel, out=product)
            closes_block = index > 0 and index % 2 == 0
            residual = skip if closes_block else None
            passes.norm_forward(product, *vectors, residual, not closes_block, y, held)
            hidden = y
            if index % 2 == 0:
                skip = y
        bias = self.bias if self.bias.dtype == hidden.dtype else self.bias.to(hidden.dtype)
        if len(hidden) == 1 and self.out is not None:  # one kernel: baddbmm copies the bias first
            torch.addmm(bias[0, 0], hidden[0], self.head[0], out=self.out[0])
            return self.out
        return torch.baddbmm(bias, hidden, self.head, out=self.out)


class Backward:
    """The backward pass, into `gradients` where they are wanted; like `Forward`.

    Memory: g, of a block's ends, inner, of a block's hidden layer, and gradients of products: one, or those
    of all layers where `passes` is BATCHED and nothing is recomputed. `space` may be [3, N, B, H] that holds
    it where not.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        memory: Memory,
        gradients: Arrays | None,
        passes: ModuleType,
        space: Tensor | None = None,
    ) -> None:
        self.passes, self.memory, self.gradients = passes, memory, gradients
        self.layers = [(kernel, vectors, kernel.mT) for kernel, *vectors in layers_of(parameters)]
        self.head = parameters[-2].mT
        product, layers = memory.products[0], len(self.layers)
        self.batched = gradients is not None and passes.BATCHED and not memory.recomputed
        if space is None:
            space = product.new_empty(layers + 2 if self.batched else 3, *product.shape)
        slots = space.unbind()
        self.g, self.inner, self.dproducts = slots[0], slots[1], slots[2:]
        self.partials: Tensor | None = None
        if gradients is not None:
            self.all_dproducts = space[2:]
            if passes.BATCHED:
                self.partials = passes.partials(layers, *product.shape, product)
            self.outputs = [output.mT for output in memory.outputs]
            self.square, self.vectors = gradients.square.unbind(), gradients.vectors.unbind()

    def __call__(self, grad: Tensor, x: Tensor, columns: slice | None) -> Tensor | None:
        """The gradient of x [N, B, I] in these columns, where any are wanted.

        Args:
            grad: [N, B, K], contiguous. x: [N, B, I], or [B, I] of all networks.
        """
        passes, products, stats = self.passes, self.memory.products, self.memory.stats
        g, inner = self.g, self.inner
        gradients, partial, into = self.gradients, None, None
        x = x.expand(len(g), *x.shape[-2:])
        if gradients is not None:
            torch.bmm(self.outputs[-1], grad, out=gradients.head)
            torch.sum(grad, 1, dtype=gradients.bias.dtype, out=gradients.bias)
        torch.bmm(grad, self.head, out=g)
        dproduct = g
        for index in reversed(range(len(self.layers))):
            _, vectors, kernel = self.layers[index]
            opens_block, closes_block = index % 2 == 1, index > 0 and index % 2 == 0
            dproduct = self.dproducts[index % len(self.dproducts)]
            if self.memory.recomputed and index < len(self.layers) - 1 and not opens_block:
                self._recompute(index, x)
            if gradients is not None:
                into = self.vectors[index]
                partial = None if self.partials is None else self.partials[index]
            incoming, relu = inner if opens_block else g, not closes_block
            if not closes_block and not self.batched:  # what comes in is not needed again
                dproduct = incoming
            passes.norm_backward(
                incoming, products[index], *vectors, relu, stats[index], dproduct, partial, into
            )
            if gradients is not None and index and not self.batched:
                torch.bmm(self.outputs[index - 1], dproduct, out=self.square[index - 1])
            if closes_block:
                torch.bmm(dproduct, kernel, out=inner)
            elif opens_block:
                g.baddbmm_(dproduct, kernel)
        if gradients is not None:
            torch.bmm(x.mT, dproduct, out=gradients.first)
            if self.batched:
                assert self.memory.whole is not None
                _square_gradients(self.memory.whole, self.all_dproducts, gradients.square)
            if self.partials is not None:
                passes.reduce_partials(self.partials, gradients.vectors)
        return None if columns is None else torch.bmm(dproduct, self.layers[0][2][..., columns])

    def _recompute(self, index: int, x: Tensor) -> None:
        """Make the products of the block that ends at this layer again, and what lies inside of it."""
        products, outputs, stats = self.memory.products, self.memory.outputs, self.memory.stats
        if index == 0:
            torch.bmm(x, self.layers[0][0], out=products[0])
            return
        kernel, vectors, _ = self.layers[index - 1]
        torch.bmm(outputs[index - 2], kernel, out=products[index - 1])
        self.passes.norm_forward(
            products[index - 1], *vectors, None, True, outputs[index - 1], stats[index - 1]
        )
        torch.bmm(outputs[index - 1], self.layers[index][0], out=products[index])


def _square_gradients(outputs: Tensor, dproducts: Tensor, out: Tensor) -> None:
    """One product over layers and networks where their distances are those of one batch, else one for each
    network over its layers."""
    below, above = outputs[:-1], dproducts[1:]
    if not len(below):
        return
    if below.is_contiguous() and out.is_contiguous():
        torch.bmm(below.flatten(0, 1).mT, above.flatten(0, 1), out=out.flatten(0, 1))
        return
    for network in range(out.shape[1]):
        torch.bmm(below[:, network].mT, above[:, network], out=out[:, network])
