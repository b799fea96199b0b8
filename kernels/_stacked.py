"""The one loop through stacked BroNets, over memory that is given: behind `bronet` and behind `BroNetPlan`.

Forward, per layer: one batched product over all networks and one pass for bias, LayerNorm and ReLU or
residual. Backward, from the head down, with dh_i the gradient of layer i's product:

    d hidden = dh W^T;    the residual's gradient is added by the same product (beta = 1)
    dW_i = below_i^T dh_i;    biases and norms: sums over the rows, made by the pass itself

`passes` is what runs between the products: norm (Triton), _bronet_cpu (compiled) or _bronet_plain (PyTorch).
What its `norm_forward` and `norm_backward` are called with, `forward_arguments` and `backward_arguments` make
of tensors, once.
Where it says BATCHED, the square layers' dW are products over all layers at once, after the last, and sums
over the rows are left as `partials`, reduced at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .runtime import native
from .runtime.dispatch import chosen, takes_kernels

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
    return _bronet_cpu if chosen(impl) == "auto" and native.takes(x) else _bronet_plain


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
        self,
        parameters: Sequence[Tensor],
        memory: Memory,
        passes: ModuleType,
        out: Tensor | None = None,
        parts: int = 1,
    ) -> None:
        self.parameters, self.memory, self.passes, self.out = parameters, memory, passes, out
        self.head, self.bias = parameters[-2], parameters[-1].unsqueeze(1)
        products, outputs, stats = memory.products, memory.outputs, memory.stats
        kernel = parameters[0]
        self.share = kernel.shape[0] // parts
        self.first = tuple(zip(kernel.chunk(parts), products[0].chunk(parts), strict=True))
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []
        self.norms: list[tuple[Any, ...]] = []
        self.hidden = skip = outputs[0]
        for index, (kernel, *vectors) in enumerate(layers_of(parameters)):
            product, held = products[index % len(products)], stats[index % len(stats)]
            y = outputs[index % len(outputs)]  # of three, the one that is neither `hidden` nor `skip`
            if index:
                self.products.append((self.hidden, kernel, product))
            closes_block = index > 0 and index % 2 == 0
            residual = skip if closes_block else None
            self.norms.append(
                passes.forward_arguments(product, *vectors, residual, not closes_block, y, held)
            )
            self.hidden = y
            if index % 2 == 0:
                skip = y

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """[N, B, K] of one [N, B, I], or of several [B, I]."""
        norm, norms = self.passes.norm_forward, iter(self.norms)
        for x, (kernel, product) in zip(inputs, self.first, strict=True):
            torch.bmm(x.expand(self.share, *x.shape[-2:]), kernel, out=product)
        norm(*next(norms))
        for (hidden, kernel, product), arguments in zip(self.products, norms, strict=True):
            torch.bmm(hidden, kernel, out=product)
            norm(*arguments)
        hidden = self.hidden
        bias = self.bias if self.bias.dtype == hidden.dtype else self.bias.to(hidden.dtype)
        if len(hidden) == 1 and self.out is not None:  # one kernel: baddbmm copies the bias first
            torch.addmm(bias[0, 0], hidden[0], self.head[0], out=self.out[0])
            return self.out
        return torch.baddbmm(bias, hidden, self.head, out=self.out)


class _Layer(NamedTuple):
    """What the backward pass does for one layer."""

    number: int
    norm: tuple[Any, ...]  # arguments of norm_backward
    dproduct: Tensor  # what that leaves
    kernel: Tensor  # [N, H, H], transposed
    dkernel: tuple[Tensor, Tensor, Tensor] | None  # factors and place of the kernel's gradient
    opens_block: bool
    closes_block: bool


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
        self.parameters, self.memory, self.passes, self.gradients = parameters, memory, passes, gradients
        self.head, self.first = parameters[-2].mT, parameters[0].mT
        layers = layers_of(parameters)
        self.batched = gradients is not None and passes.BATCHED and not memory.recomputed
        product = memory.products[0]
        if space is None:
            space = product.new_empty(len(layers) + 2 if self.batched else 3, *product.shape)
        self.space = space
        slots: tuple[Tensor, ...] = space.unbind()
        self.g, self.inner, dproducts = slots[0], slots[1], slots[2:]
        self.partials: Tensor | None = None
        if gradients is not None and passes.BATCHED:
            self.partials = passes.partials(len(layers), *product.shape, product)
        self.layers = [self._layer(index, layers[index], dproducts) for index in reversed(range(len(layers)))]

    def _layer(self, index: int, parameters: Sequence[Tensor], dproducts: Sequence[Tensor]) -> _Layer:
        (kernel, *vectors), memory, gradients = parameters, self.memory, self.gradients
        opens_block, closes_block = index % 2 == 1, index > 0 and index % 2 == 0
        incoming, relu = self.inner if opens_block else self.g, not closes_block
        dproduct = dproducts[index % len(dproducts)]
        if not closes_block and not self.batched:  # what comes in is not needed again
            dproduct = incoming
        partial = None if self.partials is None else self.partials[index]
        into, dkernel = None, None
        if gradients is not None:
            into = gradients.vectors[index]
            if index and not self.batched:
                dkernel = memory.outputs[index - 1].mT, dproduct, gradients.square[index - 1]
        norm = self.passes.backward_arguments(
            incoming, memory.products[index], *vectors, relu, memory.stats[index], dproduct, partial, into
        )
        return _Layer(index, norm, dproduct, kernel.mT, dkernel, opens_block, closes_block)

    def __call__(self, grad: Tensor, x: Tensor, columns: slice | None) -> Tensor | None:
        """The gradient of x [N, B, I] in these columns, where any are wanted.

        Args:
            grad: [N, B, K], contiguous. x: [N, B, I], or [B, I] of all networks.
        """
        passes, gradients, g, inner = self.passes, self.gradients, self.g, self.inner
        x = x.expand(len(g), *x.shape[-2:])
        if gradients is not None:
            torch.bmm(self.memory.outputs[-1].mT, grad, out=gradients.head)
            if self.partials is None:
                torch.sum(grad, 1, dtype=gradients.bias.dtype, out=gradients.bias)
        torch.bmm(grad, self.head, out=g)
        for index, norm, dproduct, kernel, dkernel, opens_block, closes_block in self.layers:
            if self.memory.recomputed and index < len(self.layers) - 1 and not opens_block:
                self._recompute(index, x)
            passes.norm_backward(*norm)
            if dkernel is not None:
                torch.bmm(dkernel[0], dkernel[1], out=dkernel[2])
            if closes_block:
                torch.bmm(dproduct, kernel, out=inner)
            elif opens_block:
                g.baddbmm_(dproduct, kernel)
        if gradients is not None:
            torch.bmm(x.mT, dproduct, out=gradients.first)
            if self.batched:
                assert self.memory.whole is not None
                _square_gradients(self.memory.whole, self.space[2:], gradients.square)
            if self.partials is not None:
                passes.reduce_partials(self.partials, gradients.vectors, grad, gradients.bias)
        return None if columns is None else torch.bmm(dproduct, self.first[..., columns])

    def _recompute(self, index: int, x: Tensor) -> None:
        """Make the products of the block that ends at this layer again, and what lies inside of it."""
        products, outputs, layers = self.memory.products, self.memory.outputs, layers_of(self.parameters)
        if index == 0:
            torch.bmm(x, layers[0][0], out=products[0])
            return
        kernel, *vectors = layers[index - 1]
        torch.bmm(outputs[index - 2], kernel, out=products[index - 1])
        stats = self.memory.stats[index - 1]
        self.passes.norm_forward(
            *self.passes.forward_arguments(
                products[index - 1], *vectors, None, True, outputs[index - 1], stats
            )
        )
        torch.bmm(outputs[index - 1], layers[index][0], out=products[index])


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
