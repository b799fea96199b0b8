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
from torch.autograd.function import once_differentiable

__all__ = ["Op"]

NAMESPACE = "brc_fast"


def _watched(arguments: Sequence[Any]) -> bool:
    """Whether a dispatch mode or a tensor subclass wants to see this call."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    return any(isinstance(a, Tensor) and type(a) not in (Tensor, torch.nn.Parameter) for a in arguments)


def _loop(op: Any, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """vmap by one call per element."""

    def element(argument: Any, dim: Any, index: int) -> Any:
        if isinstance(argument, (list, tuple)):
            return [element(a, d, index) for a, d in zip(argument, dim, strict=True)]
        return argument if dim is None else argument.select(dim, index)

    pairs = list(zip(arguments, in_dims, strict=True))
    results = [op(*(element(a, d, index) for a, d in pairs)) for index in range(info.batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    kind = type(results[0])
    return kind(torch.stack(parts) for parts in zip(*results, strict=True)), kind(0 for _ in results[0])


class Op:
    """A function of tensors that is also the op brc_fast::name.

    Args:
        function: annotated as torch.library wants it; changes none of its arguments and returns new tensors
            only, which share no memory.
        fake: the same signature; empty tensors of the results' shapes, dtypes and strides.
        setup: setup(ctx, inputs, outputs) keeps what the gradient needs.
        gradients: gradients(ctx, *output_gradients) -> one per input, made by another `Op`; an output's
            gradient is None where nothing used it. Without it, a gradient is refused.
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

        class Plain(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = function(*inputs)
                prepare(ctx, inputs, output)
                return output

        class Transformed(torch.autograd.Function):
            """For torch.func, whose gradients an op of torch.library does not have."""

            setup_context = staticmethod(prepare)

            @staticmethod
            def forward(*inputs: Any) -> Any:
                return self(*inputs)  # one transform further out

            @staticmethod
            def vmap(info: Any, in_dims: Sequence[Any], *inputs: Any) -> tuple[Any, Any]:
                return _loop(Transformed.apply, info, in_dims, *inputs)

        Plain.backward = staticmethod(once_differentiable(backward))  # type: ignore[assignment, no-untyped-call]
        Transformed.backward = staticmethod(backward)  # type: ignore[assignment]
        Plain.__name__ = Plain.__qualname__ = Transformed.__name__ = Transformed.__qualname__ = name
        self._transformed = Transformed.apply
        self._plain = function if gradients is None else Plain.apply
        self.library = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=())
        self.library.register_fake(fake)
        self.library.register_autograd(backward, setup_context=prepare)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.library(*arguments)
        if torch._C._functorch.maybe_current_level() is not None:
            return self._transformed(*arguments)
        return self.library(*arguments) if _watched(arguments) else self._plain(*arguments)
