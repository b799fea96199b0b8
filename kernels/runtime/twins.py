"""Twins through torch.compile, each held against the plain one before it is trusted.

The choice "compile" (`kernels.use`, BRC_FAST_KERNELS). At the first call with tensors of some shapes, strides
and dtypes both run on copies of the arguments; what they return, and what they changed, must agree to
rounding. Compiling takes seconds per op and shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from .dispatch import chosen, observed

__all__ = ["twin"]

Function = TypeVar("Function", bound=Callable[..., Any])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_compiled: dict[Any, Callable[..., Any]] = {}
_trusted: set[Any] = set()


def twin(function: Function, impl: str | None = None) -> Function:
    """The twin itself, or with the choice "compile" what torch.compile makes of it.

    A plain call only: where something watches, or a gradient is wanted, that is the one to compile.
    """
    if chosen(impl) != "compile":
        return function

    def call(*arguments: Any, **options: Any) -> Any:
        tensors = [x for x in tree_flatten((arguments, options))[0] if isinstance(x, Tensor)]
        if observed(*tensors):
            return function(*arguments, **options)
        if function not in _compiled:
            _compiled[function] = torch.compile(function, dynamic=False)
        key = (function, *_signature(arguments, options))
        if key not in _trusted:
            _compare(function, arguments, options)
            _trusted.add(key)
        return _compiled[function](*arguments, **options)

    return call  # type: ignore[return-value]


def _signature(arguments: Any, options: Any) -> list[Any]:
    def describe(x: Any) -> Any:
        return (x.shape, x.stride(), x.dtype, x.requires_grad) if isinstance(x, Tensor) else type(x)

    leaves, structure = tree_flatten((arguments, options))
    return [structure, torch.is_grad_enabled(), *map(describe, leaves)]


def _compare(function: Callable[..., Any], arguments: Any, options: Any) -> None:
    """RuntimeError where the two differ in a result, or in what they left of an argument."""

    def copied(x: Any) -> Any:
        return x.detach().clone(memory_format=torch.preserve_format) if isinstance(x, Tensor) else x

    leaves = []
    for run in (function, _compiled[function]):
        given = tree_map(copied, (arguments, options))
        out = run(*given[0], **given[1])
        leaves.append([x for x in tree_flatten((out, given))[0] if isinstance(x, Tensor)])
    for index, (plain, mine) in enumerate(zip(*leaves, strict=True)):
        limit = TOLERANCE.get(plain.dtype, 0.0)
        if not torch.allclose(plain, mine, rtol=limit, atol=limit, equal_nan=True):
            error = (plain.double() - mine.double()).abs().max().item()
            raise RuntimeError(
                f"torch.compile changed {function.__name__}: tensor {index} of its results and arguments is "
                f"off by {error:.2g}; choose another implementation (kernels.use)"
            )
