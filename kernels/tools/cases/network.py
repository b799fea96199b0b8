"""Workloads of whole networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from ...network import bronet, bronet_stages, network
from ...stages import Stage, Stages, shapes_of
from .case import Case


def pre_norm(width: int, depth: int, outputs: int) -> Stages:
    """Residual blocks behind a norm of their own, four times as wide inside."""
    stages = [Stage("input", width, reads=0)]
    for block in range(depth):
        x = len(stages)
        stages.append(Stage(f"norm.{block}", width, reads=x, after="layer_norm", product=False))
        stages.append(Stage(f"expand.{block}", 4 * width, reads=x + 1, relu=True))
        stages.append(Stage(f"reduce.{block}", width, reads=x + 2, adds=x))
    return (*stages, Stage("head", outputs, reads=len(stages)))


def cases() -> Iterator[Case]:
    """The critic and the actor of BRC, from the smallest width to one where products are all that counts; and
    critics of another body. (One without norms launches no kernel of ours.)"""
    for networks, inputs, width, depth, outputs, dtype in (
        (2, 123, 256, 2, 101, torch.bfloat16),
        (2, 128, 512, 2, 104, torch.bfloat16),
        (4, 128, 512, 2, 104, torch.bfloat16),
        (2, 128, 1024, 2, 104, torch.bfloat16),
        (2, 123, 512, 2, 101, torch.float32),
        (1, 99, 256, 1, 48, torch.bfloat16),
    ):
        stages = bronet_stages(width, depth, outputs)
        yield case("bronet", f"depth={depth}", stages, networks, inputs, width, dtype)
    for inputs, width, outputs, dtype in ((128, 512, 104, torch.bfloat16), (23, 128, 1, torch.float32)):
        yield case("network", "pre-norm", pre_norm(width, 2, outputs), 2, inputs, width, dtype)


def case(
    op: str, told: str, stages: Stages, networks: int, inputs: int, width: int, dtype: torch.dtype
) -> Case:
    """Outputs and the gradients of every parameter."""
    shapes, outputs = shapes_of(stages, inputs), stages[-1].outputs
    weights = sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
    # each activation and its gradient, each way
    per_row = inputs + 6 * sum(stage.outputs for stage in stages[:-1]) + 2 * outputs

    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        parameters: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            if len(shape) == 2:
                kernel = torch.randn(networks, *shape, device=device) / shape[0] ** 0.5
                parameters[name] = kernel.to(dtype).requires_grad_()
            else:
                parameters[name] = torch.rand(networks, *shape, device=device).requires_grad_()
        leaves = list(parameters.values())
        x = torch.randn(batch, inputs, device=device).to(dtype)
        seed = torch.randn(networks, batch, outputs, device=device).to(dtype)

        def call() -> object:
            if op == "bronet":
                out = bronet(x, *leaves, impl=impl)
            else:
                out = network(x, stages, parameters, impl=impl)
            return out, *torch.autograd.grad(out, leaves, seed)

        return call

    def moved(batch: int) -> int:
        return networks * dtype.itemsize * (3 * weights + per_row * batch)

    label = f"N={networks} I={inputs} H={width} {told} K={outputs} {str(dtype).removeprefix('torch.')}"
    return Case(op, label, prepare, moved, ("norm_forward", "norm_backward"))
