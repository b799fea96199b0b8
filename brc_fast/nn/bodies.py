"""Bodies of networks, each a list of stages: to add one, write its list and `register` it.

Every pass that a stage names runs at once on every device; kernels.stages is the loop.
"""

from __future__ import annotations

from collections.abc import Callable

from brc_fast import config
from brc_fast.kernels.network import bronet_stages
from brc_fast.kernels.stages import Stage, Stages

__all__ = ["BODIES", "Body", "bronet", "make", "mlp", "register", "simba"]

Body = Callable[[int, int, int], Stages]  # of width H, depth and outputs K

bronet: Body = bronet_stages


def simba(width: int, depth: int, outputs: int) -> Stages:
    """x = x W + b;   `depth` times:  x = x + relu(LN(x) W1 + b1) W2 + b2, 4 H wide inside;   LN(x) Wh + bh

    Source: Lee et al. 2024, arXiv:2410.09754.
    """
    stages = [Stage("input", width, reads=0)]
    for block in range(depth):
        x = len(stages)
        stages.append(Stage(f"blocks.{block}.norm", width, reads=x, after="layer_norm", product=False))
        stages.append(Stage(f"blocks.{block}.expand", 4 * width, reads=x + 1, relu=True))
        stages.append(Stage(f"blocks.{block}.reduce", width, reads=x + 2, adds=x))
    stages.append(Stage("norm", width, reads=len(stages), after="layer_norm", product=False))
    return (*stages, Stage("head", outputs, reads=len(stages)))


def mlp(width: int, depth: int, outputs: int) -> Stages:
    """`depth` times:  x = relu(x W + b);   x Wh + bh: the networks of SAC.

    Source: Haarnoja et al. 2018, arXiv:1812.05905.
    """
    layers = [Stage(f"layers.{layer}", width, reads=layer, relu=True) for layer in range(depth)]
    return (*layers, Stage("head", outputs, reads=depth))


BODIES: dict[str, Body] = {"bronet": bronet, "simba": simba, "mlp": mlp}


def register(name: str, body: Body) -> None:
    """Let configurations name a body."""
    BODIES[name] = body
    config.BODIES.append(name)


def make(body: str, width: int, depth: int, outputs: int) -> Stages:
    """The stages of a body by its name; InputError, with the names there are, for another."""
    config.require_known("body", body, BODIES)
    return BODIES[body](width, depth, outputs)
