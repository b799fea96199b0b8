"""BroNet of stacked networks as one op with one backward written by hand.

    x = relu(LN(x W0 + b0));   per block:  x = x + LN(relu(LN(x W1 + b1)) W2 + b2);   out = x Wh + bh

One batched product over all networks and one pass per layer, each way: see _stacked.py for the loop.

Dims:    N networks (E members, or more stacked), B rows, I inputs, H width, K outputs, L = 1 + 2 * blocks.
Memory:  kept for the backward: the products [L, N, B, H] and the rows' statistics; the layers' outputs
         [L, N, B, H] too if a parameter wants a gradient. Without a gradient, four buffers in all.
Numbers: products in the dtype of x, which the kernels W must have; LayerNorm in float32; vectors of any
         float dtype.
Source:  Nauman et al. 2024, arXiv:2405.16158.
Twin:    reference.bronet

On a CPU, float32 takes compiled passes (_bronet_cpu.py), inside of torch.compile as an op of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _bronet_cpu, reference
from ._checks import check_bronet_dtypes, check_bronet_shapes
from ._stacked import Arrays, Backward, Forward, Memory, layers_of
from .runtime import native
from .runtime.dispatch import chosen, takes_kernels
from .runtime.library import Op
from .runtime.twins import twin
from .tools.cases import Case

__all__ = ["bronet", "cases"]

NOTHING, INPUT, EVERYTHING = range(3)  # what a gradient is wanted for


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dense(parameters: list[Tensor]) -> list[Tensor]:
    """Each vector [N, H] dense in its last axis."""
    return [p if p.dim() != 2 or p.stride(-1) == 1 else p.contiguous() for p in parameters]


Kept = tuple[Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _forward(x: Tensor, parameters: list[Tensor], wanted: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import norm

    return _forward_by(norm, x, _dense(parameters), wanted)


def _forward_on_cpu(
    x: Tensor, parameters: list[Tensor], wanted: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_by(_bronet_cpu, x, _bronet_cpu.alike(parameters), wanted)


def _forward_by(passes: ModuleType, x: Tensor, parameters: list[Tensor], wanted: int) -> Kept:
    """out [N, B, K]; then what the backward needs: products, outputs [L, N, B, H], statistics [L, 2, N, B].

    What is not needed is empty.
    """
    networks, _, width = parameters[0].shape
    depth, shape = len(layers_of(parameters)), (networks, x.shape[-2], width)
    products = x.new_empty(depth if wanted >= INPUT else 1, *shape)
    outputs = x.new_empty(depth if wanted == EVERYTHING else 3, *shape)
    stats = x.new_empty(len(products), 2, *shape[:2], dtype=_wide(x.dtype))
    out = Forward(parameters, Memory(products, outputs, stats), passes)([x])
    return (
        out,
        products if wanted >= INPUT else x.new_empty(0),
        outputs if wanted == EVERYTHING else x.new_empty(0),
        stats if wanted >= INPUT else stats.new_empty(0),
    )


def _forward_fake(x: Tensor, parameters: list[Tensor], wanted: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    networks, _, width = parameters[0].shape
    depth, rows = len(layers_of(parameters)), x.shape[-2]
    out = x.new_empty(networks, rows, parameters[-2].shape[-1])
    hidden = (depth, networks, rows, width)
    return (
        out,
        x.new_empty(hidden if wanted >= INPUT else (0,)),
        x.new_empty(hidden if wanted == EVERYTHING else (0,)),
        x.new_empty((depth, 2, networks, rows) if wanted >= INPUT else (0,), dtype=_wide(x.dtype)),
    )


def _backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    products: Tensor,
    outputs: Tensor,
    stats: Tensor,
    wanted: int,
    wants_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import norm

    return _backward_by(norm, grad, x, _dense(parameters), products, outputs, stats, wanted, wants_dx)


def _backward_on_cpu(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    products: Tensor,
    outputs: Tensor,
    stats: Tensor,
    wanted: int,
    wants_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = grad, x, _bronet_cpu.alike(parameters), products, outputs, stats
    return _backward_by(_bronet_cpu, *given, wanted, wants_dx)


def _backward_by(
    passes: ModuleType,
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    products: Tensor,
    outputs: Tensor,
    stats: Tensor,
    wanted: int,
    wants_dx: bool,
) -> Gradients:
    """Arrays of x; of the first kernel, the square kernels [L - 1, N, H, H], the vectors [L, 3, N, H], the
    head's kernel and bias. What is not wanted is empty.
    """
    depth, networks, _, width = products.shape
    gradients = None
    if wanted == EVERYTHING:
        vectors = x.new_empty(depth, 3, networks, width, dtype=parameters[1].dtype)
        first, head = x.new_empty(parameters[0].shape), x.new_empty(parameters[-2].shape)
        square = x.new_empty(depth - 1, networks, width, width)
        bias = x.new_empty(parameters[-1].shape, dtype=parameters[-1].dtype)
        gradients = Arrays(first, square, vectors, head, bias)
    memory = Memory(products, outputs, stats)
    sweep = Backward(parameters, memory, gradients, passes)
    dx = sweep(grad.contiguous(), x, slice(None) if wants_dx else None)
    if dx is None:
        dx = x.new_empty(0)
    elif x.dim() == 2:
        dx = dx.sum(0)
    return dx, *(gradients or (x.new_empty(0) for _ in range(5)))


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    products: Tensor,
    outputs: Tensor,
    stats: Tensor,
    wanted: int,
    wants_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    depth, networks, _, width = products.shape
    dx = x.new_empty(x.shape if wants_dx else (0,))
    if wanted != EVERYTHING:
        first, square, vectors, head, bias = (x.new_empty(0) for _ in range(5))
        return dx, first, square, vectors, head, bias
    return (
        dx,
        x.new_empty(parameters[0].shape),
        x.new_empty(depth - 1, networks, width, width),
        x.new_empty(depth, 3, networks, width, dtype=parameters[1].dtype),
        x.new_empty(parameters[-2].shape),
        x.new_empty(parameters[-1].shape, dtype=parameters[-1].dtype),
    )


_bronet_backward = Op("bronet_backward", _backward, _backward_fake)
_bronet_backward_on_cpu = Op("bronet_on_cpu_backward", _backward_on_cpu, _backward_fake)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, parameters, ctx.wanted = inputs
    ctx.save_for_backward(x, *parameters, *output[1:])


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return _gradients_by(_bronet_backward, ctx, grad)


def _gradients_on_cpu(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return _gradients_by(_bronet_backward_on_cpu, ctx, grad)


def _gradients_by(backward: Op, ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    x, *parameters, products, outputs, stats = ctx.saved_tensors  # a checkpoint gives them once
    if grad is None:
        return None, [None] * len(parameters), None
    wants_dx = ctx.needs_input_grad[0]
    dx, first, square, vectors, *head = backward(
        grad, x, parameters, products, outputs, stats, ctx.wanted, wants_dx
    )
    out: list[Tensor | None] = [None] * len(parameters)
    if ctx.wanted == EVERYTHING:
        for index, kernel in enumerate([first, *square.unbind()]):
            out[4 * index : 4 * index + 4] = kernel, *vectors[index].unbind()
        out[-2:] = head
        out = [None if g is None else g.to(p.dtype) for g, p in zip(out, parameters, strict=True)]
    return dx if wants_dx else None, out, None


_bronet = Op("bronet", _forward, _forward_fake, _keep, _gradients, kept=3)
_bronet_on_cpu = Op("bronet_on_cpu", _forward_on_cpu, _forward_fake, _keep, _gradients_on_cpu, kept=3)


def _compiled_plainly() -> bool:
    """By torch.compile; what is exported has to run without this package, and torch.func wants the twin."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not _transformed()


def _transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


# A compiler cannot look into it, and takes what it says: torch.compiler.assume_constant_result sets the same,
# and loads the whole compiler.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _wanted(x: Tensor, parameters: Sequence[Tensor]) -> int:
    if not torch.is_grad_enabled():
        return NOTHING
    if any(p.requires_grad for p in parameters):
        return EVERYTHING
    return INPUT if x.requires_grad else NOTHING


def bronet(x: Tensor, *parameters: Tensor, impl: str | None = None) -> Tensor:
    """BroNet of N stacked networks, head included.

    The networks may be the members of an ensemble, or those of several: online and target critics stacked
    to 2E run in the same launches.

    Args:
        x: [B, I], shared by all networks, or [N, B, I].
        parameters: (kernel [N, in, H], bias, norm weight, norm bias [N, H]) of the input layer and of the two
            layers of each block, in this order, then the head's kernel [N, H, K] and bias [N, K]. Networks
            may be any distance apart in memory. Under autocast, x and the kernels are cast to its dtype.
        impl: auto, triton, reference or compile (`kernels.use`).
    Returns:
        [N, B, K] in the dtype of x. Every argument gets its gradient; parameters that want none cost nothing.
    Raises:
        ValueError for shapes that do not fit, TypeError for kernels of another dtype than x.
    Source: Nauman et al. 2024, arXiv:2405.16158.
    """
    check_bronet_shapes(x, parameters)
    if not takes_kernels(impl, x, *parameters):
        plain = chosen(impl) == "auto" and not torch.is_autocast_enabled("cpu")
        if plain and native.takes(x, *parameters):
            return _bronet_cpu.bronet_on_cpu(x, parameters)
        if plain and _compiled_plainly() and native.serves(x, *parameters):
            return _bronet_on_cpu(x, list(parameters), _wanted(x, parameters))[0]  # type: ignore[no-any-return]
        if not torch.is_autocast_enabled(x.device.type):
            check_bronet_dtypes(x, parameters)
        return twin(reference.bronet, impl)(x, *parameters)
    kind = x.device.type
    given = list(parameters)
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
        for place in (*range(0, len(given) - 2, 4), len(given) - 2):
            given[place] = given[place].to(dtype)
    check_bronet_dtypes(x, given)
    with torch.autocast(kind, enabled=False):  # the products are in the dtype that was just settled
        out, *_ = _bronet(x, given, _wanted(x, given))
    return out  # type: ignore[no-any-return]


def cases() -> Iterator[Case]:
    """The critic and the actor of BRC, from the smallest width to one where products are all that counts."""
    for networks, inputs, width, depth, outputs, dtype in (
        (2, 123, 256, 2, 101, torch.bfloat16),
        (2, 128, 512, 2, 104, torch.bfloat16),
        (4, 128, 512, 2, 104, torch.bfloat16),
        (2, 128, 1024, 2, 104, torch.bfloat16),
        (2, 123, 512, 2, 101, torch.float32),
        (1, 99, 256, 1, 48, torch.bfloat16),
    ):
        sizes = [inputs] + [width] * (2 * depth)
        weights = sum(i * width for i in sizes) + width * outputs
        per_row = inputs + 6 * width * len(sizes) + 2 * outputs  # each activation and its gradient, each way

        def prepare(
            device: torch.device,
            batch: int,
            impl: str,
            sizes: list[int] = sizes,
            shape: tuple[int, int, int] = (networks, width, outputs),
            dtype: torch.dtype = dtype,
        ) -> Callable[[], object]:
            networks, width, outputs = shape
            parameters = []
            for size in sizes:
                kernel = torch.randn(networks, size, width, device=device) / size**0.5
                vectors = [torch.rand(networks, width, device=device) for _ in range(3)]
                parameters += [kernel.to(dtype), *vectors]
            head = torch.randn(networks, width, outputs, device=device) / width**0.5
            parameters += [head.to(dtype), torch.zeros(networks, outputs, device=device)]
            leaves = [p.requires_grad_() for p in parameters]
            x = torch.randn(batch, sizes[0], device=device).to(dtype)
            seed = torch.randn(networks, batch, outputs, device=device).to(dtype)

            def call() -> object:
                out = bronet(x, *leaves, impl=impl)
                return out, *torch.autograd.grad(out, leaves, seed)

            return call

        def moved(
            batch: int,
            networks: int = networks,
            weights: int = weights,
            per_row: int = per_row,
            size: int = dtype.itemsize,
        ) -> int:
            return networks * size * (3 * weights + per_row * batch)

        label = (
            f"N={networks} I={inputs} H={width} depth={depth} K={outputs} {str(dtype).removeprefix('torch.')}"
        )
        yield Case("bronet", label, prepare, moved, ("norm_forward", "norm_backward"))
