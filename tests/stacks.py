"""Lists of stages that tests share, and parameters for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from brc_fast.kernels import Stage
from brc_fast.kernels.network import bronet_stages
from brc_fast.kernels.passes_plain import PASSES
from brc_fast.kernels.stages import shapes_of
from brc_fast.nn import bodies

INPUTS = 11  # where a list does not say another width

HEAD = Stage("head", 6, reads=0)
BODIES = {
    "bronet": bronet_stages(33, 2, 6),
    "simba": bodies.simba(9, 2, 6),
    "mlp": bodies.mlp(33, 3, 6),
}
ODD = {
    "head alone": (HEAD,),
    "norm of the input": (
        Stage("norm", INPUTS, reads=0, after="layer_norm", relu=True, product=False),
        HEAD._replace(reads=1),
    ),
    "biased norm of the input, and a value that adds it to itself": (
        Stage("norm", INPUTS, reads=0, after="norm", adds=0, product=False),
        Stage("again", INPUTS, reads=1, after="layer_norm", adds=1, product=False),
        HEAD._replace(reads=2),
    ),
    "norm of the input, added to a product": (
        Stage("below", INPUTS, reads=0),
        Stage("norm", INPUTS, reads=0, after="layer_norm", adds=1, product=False),
        HEAD._replace(reads=2),
    ),
    "input added, by a bias and by a norm": (
        Stage("first", INPUTS, reads=0, adds=0),
        Stage("second", INPUTS, reads=1, after="norm", adds=0),
        HEAD._replace(reads=2),
    ),
    "a linear stage that adds what it reads": (
        Stage("first", 8, reads=0, relu=True),
        Stage("second", 8, reads=1, adds=1),
        HEAD._replace(reads=2),
    ),
    "values used several times": (
        Stage("trunk", 8, reads=0, after="norm", relu=True),
        Stage("left", 8, reads=1, relu=True),
        Stage("right", 8, reads=1, after="norm", adds=1),
        Stage("join", 8, reads=2, adds=3),
        Stage("input", 8, reads=0, after="layer_norm", adds=4),
        HEAD._replace(reads=5),
    ),
    "layer_norm after products of several widths": (
        Stage("wide", 40, reads=0, after="layer_norm", relu=True),
        Stage("narrow", 3, reads=1, after="layer_norm"),
        Stage("middle.0", 17, reads=2, relu=True),
        Stage("middle.1", 17, reads=3, after="norm", adds=3),
        HEAD._replace(reads=4),
    ),
    "one wide": (Stage("thin", 1, reads=0, relu=True), HEAD._replace(reads=1, outputs=1)),
}
ALL = BODIES | ODD


def parameters_of(
    stages: Sequence[Stage], networks: int, inputs: int, generator: Generator
) -> dict[str, Tensor]:
    """[N, ..] in float64. Every ReLU is clearly on or off: near its kink one way of rounding has it on and
    another off, and the gradients of its whole row differ by as much as they are."""
    stages, out = tuple(stages), {}
    shapes = shapes_of(stages, inputs)

    def normal(name: str) -> Tensor:
        shape = networks, *shapes[name]
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for stage in stages:
        kernel, (*_, shift) = f"{stage.name}.kernel", PASSES[stage.after].vectors
        if stage.product:
            scale = 0.2 if stage.relu else 1.0
            out[kernel] = scale * normal(kernel) / math.sqrt(shapes[kernel][0])
        for vector in PASSES[stage.after].vectors:
            name = f"{stage.name}.{vector}"
            out[name] = normal(name)
            if vector == "norm_weight":
                out[name] = 0.2 + 0.3 * out[name].abs().clamp(max=1.0)
            if vector == shift and stage.name != stages[-1].name:
                out[name] = 2.5 * out[name].sign() + 0.3 * out[name]
    return out


def in_rows(
    parameters: dict[str, Tensor], gap: int, guard: float
) -> tuple[Tensor, Callable[..., dict[str, Tensor]]]:
    """A row for each network, with `gap` elements of `guard` around every parameter of it; and what finds the
    parameters in such rows."""
    shapes = {name: p.shape[1:] for name, p in parameters.items()}
    size = gap + sum(shape.numel() + gap for shape in shapes.values())

    def views(rows: Tensor) -> dict[str, Tensor]:
        out, place = {}, gap
        for name, shape in shapes.items():
            out[name] = rows[:, place : place + shape.numel()].view(len(rows), *shape)
            place += shape.numel() + gap
        return out

    like = next(iter(parameters.values()))
    rows = torch.full((len(like), size), guard, dtype=like.dtype)
    for name, view in views(rows).items():
        view.copy_(parameters[name])
    return rows, views
