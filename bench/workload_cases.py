"""The ops of one update at the sizes of a workload, for bench_kernels.py.

Critics of two members and 101 atoms, operands of products in bfloat16, inputs and outputs padded as the agent
pads them. What a case moves is counted as in kernels/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from roofline import Sizes, nets, parameters
from torch import Tensor
from workloads import Workload

from brc_fast.kernels import adamw_, bronet, categorical, cross_entropy, norm, pack_inputs, policy
from brc_fast.kernels.tools.cases import Case

LOW = torch.bfloat16
MEMBERS, ATOMS, ACTOR_WIDTH = 2, 101, 256


def cases_of(workload: Workload) -> Iterator[Case]:
    """Each label begins with the workload's name; they are to be run at its batch size."""
    _, _, observation, action, tasks, batch, width, _ = workload
    sizes = Sizes(batch, width, min(width, ACTOR_WIDTH), observation, action, tasks)
    own = (
        *(norm._case(MEMBERS, width, LOW, form) for form in ("relu", "residual", "frozen")),
        categorical._bellman_case(MEMBERS, ATOMS, LOW, True, "gradient"),
        cross_entropy._pair_case(MEMBERS, ATOMS, LOW, True),
        *policy._flat_cases(action, LOW),
        _packing(sizes),
        *(_passes(sizes, place) for place in (0, 1)),
        _optimizing(sizes),
    )
    for case in own:
        yield case._replace(label=f"{workload.name}: {case.label}")


def _packing(sizes: Sizes) -> Case:
    """The critics' input, with the embedding of the task where there are several."""
    wide = nets(sizes)[1].inputs

    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        observations = torch.randn(batch, sizes.observation, device=device)
        actions = torch.randn(batch, sizes.action, device=device)
        table = ids = None
        if sizes.embedding:
            table = torch.randn(sizes.tasks, sizes.embedding, device=device)
            ids = torch.randint(sizes.tasks, (batch,), device=device)
        return lambda: pack_inputs(observations, actions, table, ids, "l2", width=wide, dtype=LOW, impl=impl)

    row = 4 * (sizes.observation + sizes.action) + LOW.itemsize * wide + (8 if sizes.embedding else 0)
    label = f"O={sizes.observation} A={sizes.action} D={sizes.embedding} T={sizes.tasks} W={wide} forward"
    return Case("pack_inputs", label, prepare, lambda batch: batch * row)


def _passes(sizes: Sizes, place: int) -> Case:
    """The actor (place 0) or the online critics, forward and backward."""
    net, networks = nets(sizes)[place], (1, sizes.members)[place]
    inputs = [net.inputs] + [net.width] * (net.layers - 1)

    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        leaves: list[Tensor] = []
        for size in inputs:
            kernel = torch.randn(networks, size, net.width, device=device) / size**0.5
            leaves += [kernel.to(LOW), *torch.rand(3, networks, net.width, device=device)]
        head = torch.randn(networks, net.width, net.outputs, device=device) / net.width**0.5
        leaves += [head.to(LOW), torch.zeros(networks, net.outputs, device=device)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        x = torch.randn(batch, net.inputs, device=device).to(LOW)
        seed = torch.randn(networks, batch, net.outputs, device=device).to(LOW)

        def call() -> object:
            out = bronet(x, *leaves, impl=impl)
            return out, *torch.autograd.grad(out, leaves, seed)

        return call

    def moved(batch: int) -> int:
        """Kernels twice and their gradients; inputs, and each activation and its gradient, each way."""
        per_row = net.inputs + 6 * net.width * net.layers + 2 * net.outputs
        return networks * LOW.itemsize * (3 * net.kernels + per_row * batch)

    label = f"N={networks} I={net.inputs} H={net.width} depth={net.depth} K={net.outputs} bfloat16"
    return Case("bronet", label, prepare, moved)


def _optimizing(sizes: Sizes) -> Case:
    """A step of the critics with their targets and the copies of both; its size is not that of a batch."""
    number = parameters(sizes)[1]

    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        param, target = torch.randn(2, number, device=device)
        grad = torch.randn(number, device=device).to(LOW)
        first, second = torch.zeros(2, number, device=device)
        low, target_low = torch.empty(2, number, device=device, dtype=LOW)
        state = [param, grad, first, second, torch.zeros((), device=device)]

        def call() -> object:
            adamw_(
                *state,
                learning_rate=3e-4,
                betas=(0.9, 0.999),
                eps=1e-8,
                weight_decay=1e-4,
                target=target,
                low=low,
                target_low=target_low,
                impl=impl,
            )
            return [*state, target, low, target_low]

        return call

    label = f"P={number} float32, gradient bfloat16, target, copies"
    return Case("adamw_", label, prepare, lambda batch: number * (8 * 4 + 2 * LOW.itemsize + LOW.itemsize))
