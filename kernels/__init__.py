"""The ops of the BRC update. Each has a plain PyTorch twin of the same name in `reference`."""

from .bronet import bronet
from .categorical import categorical_cross_entropy, categorical_projection, categorical_target
from .optimizer import adamw_
from .policy import tanh_gaussian
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
