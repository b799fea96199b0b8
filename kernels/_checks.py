"""Checks of the public ops: name, rule and numbers in one line."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_bronet_parameters(parameters: Sequence[Tensor]) -> None:
    """The compiled passes trust the shapes, so they are checked here."""
    if len(parameters) < 6 or len(parameters) % 8 != 6:
        raise ValueError(
            f"bronet takes 4 tensors per layer, one layer plus two per block, and 2 for the head: "
            f"6, 14, 22, ... in all, got {len(parameters)}"
        )
    if parameters[0].dim() != 3:
        raise ValueError(f"kernel of layer 0 must have shape [E, I, H], got {list(parameters[0].shape)}")
    members, inputs, width = parameters[0].shape
    for index in range(len(parameters) // 4):
        kernel, *norm = parameters[4 * index : 4 * index + 4]
        if kernel.shape != (members, inputs, width):
            wanted = f"[E, in, H] = {[members, inputs, width]}"
            raise ValueError(f"kernel of layer {index} must have shape {wanted}, got {list(kernel.shape)}")
        for vector in norm:
            if vector.shape != (members, width):
                wanted = f"[E, H] = {[members, width]}"
                raise ValueError(
                    f"vectors of layer {index} must have shape {wanted}, got {list(vector.shape)}"
                )
        inputs = width
    kernel, bias = parameters[-2:]
    if kernel.dim() != 3 or kernel.shape[:2] != (members, width):
        wanted = f"[E, H, K] with E = {members}, H = {width}"
        raise ValueError(f"kernel of the head must have shape {wanted}, got {list(kernel.shape)}")
    if bias.shape != (members, kernel.shape[2]):
        wanted = f"[E, K] = {[members, kernel.shape[2]]}"
        raise ValueError(f"bias of the head must have shape {wanted}, got {list(bias.shape)}")


def check_bronet_shapes(x: Tensor, parameters: Sequence[Tensor]) -> None:
    """Those of the parameters and of their input."""
    check_bronet_parameters(parameters)
    members, inputs, _ = parameters[0].shape
    if x.shape[-1:] != (inputs,) or x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] != members):
        wanted = f"[B, I] or [E, B, I] with E = {members}, I = {inputs}"
        raise ValueError(f"x must have shape {wanted}, got {list(x.shape)}")


def check_bronet_dtypes(x: Tensor, parameters: Sequence[Tensor]) -> None:
    """The products take one dtype; vectors may have another, all of them the same."""
    for index, kernel in enumerate([*parameters[:-2:4], parameters[-2]]):
        if kernel.dtype != x.dtype:
            name = "the head" if index == len(parameters) // 4 else f"layer {index}"
            raise TypeError(f"kernel of {name} must be of the dtype of x, {x.dtype}, got {kernel.dtype}")
    for index in range(len(parameters) // 4):
        for vector in parameters[4 * index + 1 : 4 * index + 4]:
            if vector.dtype != parameters[1].dtype:
                raise TypeError(
                    f"vectors of layer {index} must be of the dtype of those of layer 0, "
                    f"{parameters[1].dtype}, got {vector.dtype}"
                )
