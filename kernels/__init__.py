"""The ops of the BRC update. Today each is its plain PyTorch twin from `reference`."""

from .eager import adamw_, bias_layer_norm
from .reference import (
    categorical_cross_entropy,
    categorical_projection,
    categorical_target,
    ema_,
    expected_value,
    normalized_embedding,
    pack_inputs,
    tanh_gaussian,
    two_hot,
)

__all__ = [
    "adamw_",
    "bias_layer_norm",
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
