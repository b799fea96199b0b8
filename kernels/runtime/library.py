"""Ops for torch's dispatcher, and the short way around it.

Something that traces or transforms (torch.compile, export, fake tensors, torch.func) sees opaque ops of
torch.library with a fake and a gradient, and a loop for vmap. A plain call goes straight to the Python
function: the dispatcher costs tens of microseconds. All ways share one forward, one set-up and one gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import watched

__all__ = ["Op", "first_derivative"]

NAMESPACE = "brc_fast"


def _loop(op: Any, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """vmap by one call per element; of an empty batch one of zeros, of which only the shape is kept."""
    size = info.batch_size

    def element(argument: Any, dim: Any, index: int) -> Any:
        if dim is None:
            return argument
        if isinstance(argument, (list, tuple)):
            return [element(a, d, index) for a, d in zip(argument, dim, strict=True)]
        if not size:
            return argument.new_zeros([n for axis, n in enumerate(argument.shape) if axis != dim])
        return argument.select(dim, index)

    pairs = list(zip(arguments, in_dims, strict=True))
    results = [op(*(element(a, d, index) for a, d in pairs)) for index in range(max(1, size))]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[:size], 0
    kind = type(results[0])
    stacked = (torch.stack(parts)[:size] for parts in zip(*results, strict=True))
    return kind(stacked), kind(0 for _ in results[0])


Shape = tuple[int | None, ...]


def _flatten(arguments: Sequence[Any]) -> tuple[list[Any], Shape]:
    """Arguments with their lists opened, for autograd, which does not look into lists; and how to undo it."""
    flat: list[Any] = []
    for argument in arguments:
        flat += argument if isinstance(argument, (list, tuple)) else [argument]
    return flat, tuple(len(a) if isinstance(a, (list, tuple)) else None for a in arguments)


def _unflatten(flat: Sequence[Any], shape: Shape) -> tuple[Any, ...]:
    out, place = [], 0
    for length in shape:
        out.append(flat[place] if length is None else list(flat[place : place + length]))
        place += 1 if length is None else length
    return tuple(out)


def first_derivative(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a backward refuse create_graph=True, instead of giving gradients cut off from their arguments."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        def checked(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name} has no second derivative (create_graph=True): use kernels.reference.{name}"
                )
            return backward(ctx, *grads)

        return checked

    return decorate


class Op:
    """A function of tensors, or of lists of them, that is also the op brc_fast::name.

    Args:
        function: annotated as torch.library wants it; changes none of its arguments and returns new tensors
            only, which share no memory.
        fake: the same signature; empty tensors of the results' shapes, dtypes and strides.
        setup: setup(ctx, inputs, outputs) keeps what the gradient needs.
        gradients: gradients(ctx, *output_gradients) -> one per input (a list for a list), made by another
            `Op`; an output's gradient is None where nothing used it. Without it, a gradient is refused.
            ctx.needs_input_grad counts the elements of a list one by one.
        kept: how many of the outputs, from the last, only serve the gradient and have none themselves.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        setup: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        gradients: Callable[..., Any] | None = None,
        kept: int = 0,
    ) -> None:
        def prepare(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            if kept:
                ctx.mark_non_differentiable(*output[-kept:])
            if setup is not None:
                setup(ctx, inputs, output)

        def refuse(ctx: Any, *_: Any) -> Any:
            twin = name.removesuffix("_backward")
            raise RuntimeError(f"{name} has no derivative of its own: use kernels.reference.{twin}")

        backward = gradients or refuse

        def flat_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return (*_flatten(backward(ctx, *grads))[0], None)

        class Plain(torch.autograd.Function):
            """For plain calls. The arguments are flat, their shape is the last."""

            @staticmethod
            def forward(ctx: Any, *flat: Any) -> Any:
                inputs = _unflatten(flat, flat[-1])
                output = function(*inputs)
                prepare(ctx, inputs, output)
                return output

        class Transformed(torch.autograd.Function):
            """For torch.func, whose gradients an op of torch.library does not have; arguments as above."""

            @staticmethod
            def forward(*flat: Any) -> Any:
                return self(*_unflatten(flat, flat[-1]))  # one transform further out

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                prepare(ctx, _unflatten(inputs, inputs[-1]), output)

            @staticmethod
            def vmap(info: Any, in_dims: Sequence[Any], *flat: Any) -> tuple[Any, Any]:
                return _loop(Transformed.apply, info, (*in_dims[: len(flat) - 1], None), *flat)

        Plain.backward = staticmethod(first_derivative(name)(flat_backward))  # type: ignore[method-assign]
        Transformed.backward = staticmethod(flat_backward)  # type: ignore[method-assign]
        Plain.__name__ = Plain.__qualname__ = Transformed.__name__ = Transformed.__qualname__ = name
        self._transformed: Any = Transformed.apply
        self._plain: Any = None if gradients is None else Plain.apply
        self._function = function
        self.library = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=())
        self.library.register_fake(fake)
        self.library.register_autograd(backward, setup_context=prepare)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.library(*arguments)
        if torch._C._functorch.maybe_current_level() is not None:
            flat, shape = _flatten(arguments)
            return self._transformed(*flat, shape)
        flat, shape = _flatten(arguments)
        if watched(*(a for a in flat if isinstance(a, Tensor))):
            return self.library(*arguments)
        return self._function(*arguments) if self._plain is None else self._plain(*flat, shape)
