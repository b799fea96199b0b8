"""The ops of the BRC update: fused Triton kernels, each with a plain PyTorch twin of its name in `reference`.

Kernels run on CUDA, twins elsewhere; `use`, the argument `impl` and BRC_FAST_KERNELS choose
(runtime/dispatch.py).
The files of kernels, and Triton with them, are imported when the first of their ops is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import reference
from .network import bronet, network
from .runtime.dispatch import use
from .stages import Pass, Plan, Stage

if TYPE_CHECKING:
    from .categorical import (
        categorical_bellman_loss,
        categorical_bellman_loss_and_gradient,
        categorical_target,
    )
    from .cross_entropy import (
        categorical_cross_entropy,
        expected_value,
        expected_value_and_gradient,
        hl_gauss,
        hl_gauss_cross_entropy,
        two_hot,
        two_hot_cross_entropy,
    )
    from .gather import gather_rows, n_step_rewards
    from .inputs import normalized_embedding, normalized_embedding_backward, pack_inputs
    from .norm import bias_layer_norm
    from .optimizer import adamw_, ema_
    from .policy import standard_normal, tanh_gaussian, tanh_gaussian_backward
    from .projection import categorical_projection
    from .summary import update_summary_

FAMILIES = (
    "categorical",
    "cross_entropy",
    "projection",
    "inputs",
    "norm",
    "optimizer",
    "policy",
    "summary",
    "gather",
)
__all__ = [
    "Pass",
    "Plan",
    "Stage",
    "adamw_",
    "bias_layer_norm",
    "bronet",
    "categorical_bellman_loss",
    "categorical_bellman_loss_and_gradient",
    "categorical_cross_entropy",
    "categorical_projection",
    "categorical_target",
    "ema_",
    "expected_value",
    "expected_value_and_gradient",
    "gather_rows",
    "hl_gauss",
    "hl_gauss_cross_entropy",
    "n_step_rewards",
    "network",
    "normalized_embedding",
    "normalized_embedding_backward",
    "pack_inputs",
    "reference",
    "standard_normal",
    "tanh_gaussian",
    "tanh_gaussian_backward",
    "two_hot",
    "two_hot_cross_entropy",
    "update_summary_",
    "use",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for family in FAMILIES:
            module = importlib.import_module(f".{family}", __name__)
            if name in module.__all__:
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__} has no attribute {name}")
