"""The ops of the BRC update: fused Triton kernels, each with a plain PyTorch twin of its name in `reference`.

Kernels run on CUDA, twins elsewhere; `use`, the argument `impl` and BRC_FAST_KERNELS choose (`_dispatch`).
An op's file, and Triton with it, is imported when the op is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import reference
from ._dispatch import use
from .bronet import bronet

if TYPE_CHECKING:
    from .categorical import (
        categorical_cross_entropy,
        categorical_projection,
        categorical_target,
        expected_value,
        two_hot,
    )
    from .norm import bias_layer_norm
    from .inputs import pack_inputs, normalized_embedding
    from .optimizer import adamw_, ema_
    from .policy import tanh_gaussian

HOMES = {
    "categorical": (
        "categorical_cross_entropy",
        "categorical_projection",
        "categorical_target",
        "expected_value",
        "two_hot",
    ),
    "norm": ("bias_layer_norm",),
    "optimizer": ("adamw_", "ema_"),
    "policy": ("tanh_gaussian",),
    "inputs": ("pack_inputs", "normalized_embedding"),
}
_HOME_OF = {name: home for home, names in HOMES.items() for name in names}

__all__ = ["bronet", "reference", "use", *_HOME_OF]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value
