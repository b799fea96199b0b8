"""Checks of the public ops: name, rule and numbers in one line."""

from __future__ import annotations

from torch import Tensor


def check_bronet_shapes(x: Tensor, parameters: tuple[Tensor, ...]) -> None:
    """The compiled passes trust the shapes, so they are checked here."""
    if len(parameters) < 6 or len(parameters) % 8 != 6:
        raise ValueError(
            f"bronet takes 4 tensors per layer, one layer plus two per block, and 2 for the head: "
            f"6, 14, 22, ... in all, got {len(parameters)}"
        )
    if parameters[0].dim() != 3:
        raise ValueError(f"kernel of layer 0 must have shape [E, I, H], got {list(parameters[0].shape)}")
    members, inputs, width = parameters[0].shape
    if x.shape[-1:] != (inputs,) or x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] != members):
        wanted = f"[B, I] or [E, B, I] with E = {members}, I = {inputs}"
        raise ValueError(f"x must have shape {wanted}, got {list(x.shape)}")
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
