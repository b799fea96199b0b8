"""The compiled float32 passes for the CPU, and when they apply."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import observed

try:
    from .. import _cpu as compiled
except ImportError:  # a checkout that was not built
    compiled = None  # type: ignore[assignment]

__all__ = ["compiled", "serves", "takes"]


def takes(*tensors: Tensor) -> bool:
    """Whether the compiled passes exist and serve these tensors: float32, on the CPU, in a plain call."""
    return not observed(*tensors) and serves(*tensors)


def serves(*tensors: Tensor) -> bool:
    """The same of any call, also one that a compiler sees."""
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    return compiled is not None
