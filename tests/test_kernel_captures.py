"""Ops where something else runs them: a CUDA graph, and a compiler that sees a user's whole loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from extras import require
from torch import Tensor

from brc_fast import kernels

require("triton")
from brc_fast.kernels.tools import aot

OPS = sorted({case.op for case in aot.cases() if not case.op.endswith("_")})  # those change their arguments
CPU = "a CPU has no CUDA graphs"


def tensors(x: object) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from tensors(part)


def captured(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles outside of the capture
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = list(tensors(call()))
    return graph, out


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_a_graph_replays_an_op_with_the_bits_of_a_plain_call(kernel_device: str, op: str) -> None:
    if kernel_device == "cpu":
        pytest.skip(CPU)
    call = next(aot.cases([op])).prepare(torch.device(kernel_device), 96, "triton")
    graph, out = captured(call)
    for tensor in out:
        tensor.fill_(0)
    graph.replay()
    expected = list(tensors(call()))
    assert out
    for mine, other in zip(out, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.gpu
def test_a_graph_draws_other_noise_when_its_offset_moves_on(kernel_device: str) -> None:
    if kernel_device == "cpu":
        pytest.skip(CPU)
    rng = torch.tensor([3, 0], device=kernel_device)
    graph, (noise,) = captured(lambda: kernels.standard_normal(rng, (64,), impl="triton"))
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append(noise.clone())
        rng[1] += 1
    assert not torch.equal(*draws)
    assert torch.equal(draws[0], kernels.standard_normal(torch.tensor([3, 0], device=kernel_device), (64,)))


def critic_loss(observations: Tensor, actions: Tensor, table: Tensor, *parameters: Tensor) -> Tensor:
    """A user's loss from the observation to the number, by kernels alone."""
    ids = torch.arange(6, device=actions.device) % 3
    with kernels.use("triton"):
        x = kernels.pack_inputs(observations, actions, table, ids, width=16)
        hidden = kernels.bronet(x, *parameters)
        losses = kernels.two_hot_cross_entropy(hidden, actions.detach().sum(-1), v_max=5.0)
        values = kernels.expected_value(hidden, torch.linspace(-5, 5, 11, device=x.device))
        return losses.mean(-1).sum() + values.square().mean()


@pytest.mark.gpu
def test_a_users_whole_loss_compiles_to_the_same_numbers(kernel_device: str) -> None:
    torch.manual_seed(0)
    sizes = [(2, 16, 24), (2, 24, 24), (2, 24, 24), (2, 24, 11)]
    parameters = []
    for shape in sizes:
        vectors = [torch.rand(2, shape[2]) for _ in range(1 if shape is sizes[-1] else 3)]
        parameters += [torch.randn(shape) / shape[1] ** 0.5, *vectors]
    given = [torch.randn(6, 5), torch.randn(6, 2), torch.randn(3, 4), *parameters]
    leaves = [x.to(kernel_device).requires_grad_(i > 0) for i, x in enumerate(given)]
    plain = critic_loss(*leaves)
    compiled = torch.compile(critic_loss, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(plain, leaves[1:])
    for mine, other in zip(torch.autograd.grad(compiled, leaves[1:]), expected, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
