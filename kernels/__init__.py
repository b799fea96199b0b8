"""The ops of the BRC update. Each has a plain PyTorch twin in `reference`; `cpu` has faster forms."""

from .cpu import (
    adamw_,
    bronet,
    categorical_cross_entropy,
    categorical_projection,
    categorical_target,
    tanh_gaussian,
)
from .reference import (
    bias_layer_norm,
    ema_,
    expected_value,
    normalized_embedding,
    pack_inputs,
    two_hot,
)

__all__ = [
    "adamw_",
    "bias_layer_norm",
    "bronet",
    "categorical_cross_entropy",
    "categorical_projection",
    "categorical_target",
    "ema_",
    "expected_value",
    "normalized_embedding",
    "pack_inputs",
    "tanh_gaussian",
    "two_hot",
]
