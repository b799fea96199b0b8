"""The categorical ops through the kernels: against their twins, their definitions written out here, and at
their edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from extras import require
from kernel_harness import (
    INTERPRETED,
    OPS,
    assert_close_to_truth,
    assert_follows_twin,
    guarded,
    layouts,
    native_calls,
    outputs_and_gradients,
)
from refusals import says
from torch import Tensor
from torch.autograd import forward_ad

from brc_fast import kernels
from brc_fast.kernels import _categorical, cross_entropy, reference
from brc_fast.kernels.runtime import tables, twins
from brc_fast.kernels.runtime.dispatch import recording

V_MAX = 10.0
INF, NAN = math.inf, math.nan
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
# the smallest; odd; the usual ones; exactly a block; one more than a block; the largest
ATOMS = [2, 3, 51, 101, 128, 257, 512]
# terminal rows; slopes with more than three sources per atom, below 0.67; the usual ones; beyond [0, 1]
DISCOUNTS = [0.0, 0.1, 0.49, 0.5, 0.9, 0.99, 1.0, 3.0, 0.03, -0.7]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def support(num_atoms: int, v_max: float = V_MAX) -> Tensor:
    return torch.linspace(-v_max, v_max, num_atoms, dtype=torch.float64)


def projected(probs: Tensor, positions: Tensor, v_max: float) -> Tensor:
    """The definition: an atom takes mass in proportion to nearness, up to one spacing away."""
    num_atoms = probs.shape[-1]
    index = (positions.double().clamp(-v_max, v_max) + v_max) * ((num_atoms - 1) / (2.0 * v_max))
    nearness = (1.0 - (index.unsqueeze(-1) - torch.arange(num_atoms)).abs()).clamp_min(0.0)
    return (probs.double().unsqueeze(-1) * nearness).sum(-2)


def bellman_target(
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    log_probs: Tensor,
    temperature: float,
    v_max: float,
) -> Tensor:
    """The definition, in float64 on the CPU."""
    next_logits, rewards, discounts, log_probs = (
        x.double().cpu() for x in (next_logits, rewards, discounts, log_probs)
    )
    z = support(next_logits.shape[-1], v_max)
    values = rewards[:, None] + discounts[:, None] * (z - temperature * log_probs[:, None])
    return projected(next_logits.softmax(-1).mean(0), values, v_max)


def normal_masses(value: float, num_atoms: int, v_max: float, sigma: float) -> list[float]:
    """The definition of HL-Gauss, edge by edge."""
    spacing = 2.0 * v_max / (num_atoms - 1)
    value = min(max(value, -v_max), v_max)
    edges = [-v_max + (k - 0.5) * spacing for k in range(num_atoms + 1)]
    below = [0.5 * (1.0 + math.erf((edge - value) / (sigma * math.sqrt(2.0)))) for edge in edges]
    return [(b - a) / (below[-1] - below[0]) for a, b in itertools.pairwise(below)]


def bellman_inputs(
    members: int, batch: int, num_atoms: int, others: int | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, next logits, and the rest: rewards, discounts, log-probabilities, temperature."""
    rewards = 2.0 * normal(batch, seed=2)
    discounts = torch.tensor(DISCOUNTS, dtype=torch.float64).repeat(-(-batch // len(DISCOUNTS)))[:batch]
    rest = [rewards, discounts, normal(batch, seed=3), torch.tensor(0.125, dtype=torch.float64)]
    logits, next_logits = (
        normal(members, batch, num_atoms),
        normal(others or members, batch, num_atoms, seed=1),
    )
    return logits, next_logits, rest


def bellman_tensors(device: str, *sizes: int) -> list[Tensor]:
    """The same on a device, in float32 and in one list."""
    logits, next_logits, rest = bellman_inputs(*sizes)
    return on(device, torch.float32, logits, next_logits, *rest)


def on(device: str, dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [guarded(x.to(dtype).to(device)) for x in tensors]


def atoms_of(logits: Tensor) -> Tensor:
    """Not as coarse as low-precision logits: their support is evenly spaced all the same."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return support(logits.shape[-1]).to(logits.device, dtype)


def bellman(name: str, **options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A Bellman op through the kernels, and its twin, as functions of all tensors but the atoms."""

    def kernel(*tensors: Tensor) -> Any:
        op = getattr(kernels, name)
        return op(*tensors, atoms_of(tensors[0]), V_MAX, **options, impl="triton")

    return kernel, lambda *tensors: getattr(reference, name)(*tensors, atoms_of(tensors[0]), V_MAX, **options)


TARGET, LOSS, PAIR = (
    bellman(f"categorical_{name}")[0] for name in ("target", "bellman_loss", "bellman_loss_and_gradient")
)


def run(name: str, *last: Any, **options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """An op through the kernels, and its twin, as functions of tensors alone."""

    def kernel(*tensors: Tensor) -> Any:
        return getattr(kernels, name)(*tensors, *last, **options, impl="triton")

    return kernel, lambda *tensors: getattr(reference, name)(*tensors, *last, **options)


# the Bellman target and its loss


@pytest.mark.gpu
@pytest.mark.parametrize("num_atoms", ATOMS)
def test_the_target_is_its_definition_for_every_discount(kernel_device: str, num_atoms: int) -> None:
    spacing = 2.0 * V_MAX / (num_atoms - 1)
    # nothing; an atom; between two; the ends and beyond them
    rewards = torch.tensor([0.0, spacing, 0.3 * spacing, -V_MAX, 99.0, INF, -INF, 1.7], dtype=torch.float64)
    slopes = [s for s in DISCOUNTS if num_atoms < 512 or s != 0.03]  # 67 steps are enough at 257
    discounts = torch.tensor(slopes, dtype=torch.float64).repeat_interleave(len(rewards))
    rewards = rewards.repeat(len(slopes))
    batch = len(rewards)
    next_logits = 3.0 * normal(2, batch, num_atoms)
    log_probs = normal(batch, seed=1) * (torch.arange(batch) % 3 > 0)
    for dtype in (torch.float32, torch.float64):
        tensors = on(kernel_device, dtype, next_logits, rewards, discounts, log_probs)
        atoms = support(num_atoms).to(tensors[0])
        with tables.trial("categorical_target", {"BLOCK_B": 64, "num_warps": 4}):
            out = kernels.categorical_target(*tensors, 0.1, atoms, V_MAX, impl="triton")
        assert out.dtype == dtype
        exact = bellman_target(*(x.to(dtype).double() for x in tensors), 0.1, V_MAX)
        # an index near K is rounded by K * 2**-24, and mass moves by that much
        allowed = num_atoms * 2.0**-23 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(out.cpu().double(), exact, rtol=0, atol=allowed)
        torch.testing.assert_close(out.sum(-1), torch.ones_like(out[:, 0]), rtol=0, atol=1e-6)
        assert (out >= 0).all()


@pytest.mark.gpu
def test_the_target_keeps_exact_hits_the_mean_and_the_ends(kernel_device: str) -> None:
    z = support(101)
    next_logits = normal(2, 4, 101)
    rewards = torch.tensor([0.0, 0.4, -0.4, 50.0], dtype=torch.float64)
    discounts = torch.tensor([1.0, 1.0, 0.9, 1.0], dtype=torch.float64)
    tensors = on(kernel_device, torch.float32, next_logits, rewards, discounts, torch.zeros(4))
    out = kernels.categorical_target(*tensors, 0.5, z.to(tensors[0]), V_MAX, impl="triton").cpu().double()
    probs = next_logits.float().double().softmax(-1).mean(0)
    torch.testing.assert_close(out[0], probs[0], rtol=0, atol=1e-7)  # every atom hits itself
    torch.testing.assert_close(out[1, 2:-1], probs[1, :-3], rtol=0, atol=1e-6)  # and two atoms further up
    assert out[2] @ z == pytest.approx((-0.4 + 0.9 * (probs[2] @ z)).item(), abs=1e-5)  # nothing is clipped
    assert out[3].tolist() == pytest.approx([0.0] * 100 + [1.0], abs=1e-6)


@pytest.mark.gpu
@DTYPES
def test_the_target_follows_its_twin(kernel_device: str, dtype: torch.dtype) -> None:
    _, next_logits, rest = bellman_inputs(3, 11, 101)
    (out,) = assert_follows_twin(
        *bellman("categorical_target"), [next_logits, *rest], [], [], dtype, kernel_device
    )
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    assert not out.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(2, 19, 101, 2), (1, 1, 2, 3), (3, 5, 64, 1), (2, 4, 33, 2)], ids=str)
@DTYPES
def test_the_bellman_loss_and_its_gradient_follow_their_twin(
    kernel_device: str, size: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    if dtype in (torch.float16, torch.float64) and size[2] != 101:
        pytest.skip("one size is enough in this dtype")
    members, batch, num_atoms, others = size
    logits, next_logits, rest = bellman_inputs(members, batch, num_atoms, others)
    inputs, seeds = [logits, next_logits, *rest], [normal(members, batch, seed=4)]
    op = bellman("categorical_bellman_loss")
    losses, grad = assert_follows_twin(*op, inputs, seeds, [0], dtype, kernel_device)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert grad.dtype == dtype
    assert (grad != 0).any(-1).all()


@pytest.mark.gpu
def test_only_the_logits_get_a_gradient_and_a_loss_alone_needs_none(kernel_device: str) -> None:
    tensors = bellman_tensors(kernel_device, 2, 5, 11)
    free = LOSS(*tensors)
    assert not free.requires_grad
    leaves = [x.requires_grad_() for x in tensors]
    kept = LOSS(*leaves)
    torch.testing.assert_close(kept.detach(), free)
    grads = torch.autograd.grad(kept.sum(), leaves, allow_unused=True)
    assert [g is not None for g in grads] == [True] + [False] * 5
    with torch.no_grad():
        torch.testing.assert_close(LOSS(*leaves), free)
    assert not TARGET(*leaves[1:]).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_loss_without_autograd_gives_the_scaled_gradient_in_padded_rows(
    kernel_device: str, dtype: torch.dtype
) -> None:
    logits, next_logits, rest = bellman_inputs(2, 7, 21)
    inputs = [logits, next_logits, *rest]
    op = bellman("categorical_bellman_loss_and_gradient", scale=0.3, columns=24)
    losses, grad = assert_follows_twin(*op, inputs, [], [], dtype, kernel_device)
    assert grad.shape == (2, 7, 24)
    assert grad.dtype == dtype
    assert (grad[..., 21:] == 0).all()
    tensors = on(kernel_device, dtype, *inputs)
    atoms = atoms_of(tensors[0])
    call = partial(kernels.categorical_bellman_loss_and_gradient, *tensors, atoms, V_MAX, impl="triton")
    scale = torch.tensor(0.3, dtype=torch.float64, device=kernel_device)
    for again, other in (call(scale=scale, columns=24), call(scale=0.3, columns=40)):
        torch.testing.assert_close(again, losses)
        torch.testing.assert_close(other[..., :21], grad[..., :21])
        assert (other[..., 21:] == 0).all()
    _, plain = call()
    leaf = tensors[0].requires_grad_()
    (whole,) = torch.autograd.grad(LOSS(leaf, *tensors[1:]).sum(), leaf)
    assert plain.shape == leaf.shape
    torch.testing.assert_close(plain, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_temperature_may_be_a_number_or_a_tensor(kernel_device: str, dtype: torch.dtype) -> None:
    _, next_logits, rest = bellman_inputs(2, 5, 11)
    tensors = on(kernel_device, dtype, next_logits, *rest)
    inputs = tensors[:4]

    def target(temperature: Tensor | float) -> Tensor:
        return TARGET(*inputs, temperature)

    fixed = target(0.3)
    for shape in ((), (1,)):
        other = target(torch.full(shape, 0.3, dtype=dtype, device=kernel_device))
        torch.testing.assert_close(fixed, other, rtol=0, atol=1e-7 if dtype == torch.float32 else 1e-14)
    assert not torch.equal(fixed, target(0))
    exact = bellman_target(*inputs, 0.3, V_MAX)
    torch.testing.assert_close(
        fixed.cpu().double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:invalid value")  # the interpreter's, on NaN from beyond the batch
@pytest.mark.parametrize("block", [1, 2, 8])
def test_the_rows_of_a_program_do_not_matter(kernel_device: str, block: int) -> None:
    tensors = bellman_tensors(kernel_device, 2, 5, 21)
    values, grad = on(kernel_device, torch.float32, normal(5), normal(2, 5))
    calls = {
        "categorical_bellman_loss": lambda: PAIR(*tensors),
        "categorical_target": lambda: TARGET(*tensors[1:]),
        "expected_value": lambda: kernels.expected_value(tensors[0], atoms_of(tensors[0]), impl="triton"),
        "categorical_cross_entropy_backward": lambda: cross_entropy._cross_entropy_backward(
            grad, tensors[0], values, V_MAX, 0.5
        ),
        "value_encoding": lambda: kernels.hl_gauss(values, 21, V_MAX, 0.5, impl="triton"),
    }
    for name, call in calls.items():
        usual = call()
        with tables.trial(name, {"BLOCK_B": block, "num_warps": 2}):
            torch.testing.assert_close(call(), usual, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_every_op_is_one_launch_each_way(kernel_device: str) -> None:
    tensors = bellman_tensors(kernel_device, 2, 5, 11)
    with recording() as launches:
        LOSS(*tensors)
        assert len(launches) == 1
        assert launches[0].arguments[10] is None  # without a gradient, none is written
        loss = LOSS(tensors[0].requires_grad_(), *tensors[1:])
        assert len(launches) == 2
        assert launches[1].arguments[10].shape == tensors[0].shape
        torch.autograd.grad(loss.sum(), tensors[0])
        assert len(launches) == 3
        TARGET(*tensors[1:])
        PAIR(*tensors)
        kernels.hl_gauss_cross_entropy(tensors[0], tensors[2], V_MAX, 1.0, impl="triton").sum().backward()
        kernels.expected_value(tensors[0], atoms_of(tensors[0]), impl="triton").sum().backward()
        assert len(launches) == 9
        kernels.expected_value_and_gradient(tensors[0], atoms_of(tensors[0]), columns=16, impl="triton")
        assert len(launches) == 10


@pytest.mark.gpu
def test_two_runs_give_the_same_bits(kernel_device: str) -> None:
    inputs = bellman_tensors(kernel_device, 2, 21, 101)
    seed = torch.randn(2, 21, device=kernel_device)
    first, second = (outputs_and_gradients(LOSS, inputs, [seed], [0]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_nan_stays_in_its_row(kernel_device: str) -> None:
    for place in range(4):  # next logits, rewards, discounts, log-probabilities
        _, next_logits, rest = bellman_inputs(2, 4, 11)
        tensors = [next_logits, *rest]
        for row in (0, 2):  # of discount 0 and not
            tensors[place][(0, row, 5) if place == 0 else row] = NAN
        out = TARGET(*on(kernel_device, torch.float32, *tensors))
        assert out[[0, 2]].isnan().all()
        assert out[[1, 3]].isfinite().all()
    values = torch.tensor([1.0, NAN, INF], device=kernel_device)
    same = values[:, None].expand(3, 5)
    for out in (
        kernels.two_hot(values, 5, V_MAX, impl="triton"),
        kernels.hl_gauss(values, 5, V_MAX, 1.0, impl="triton"),
        kernels.categorical_projection(torch.full_like(same, 0.2), same, V_MAX, impl="triton"),
    ):
        assert out[1].isnan().all()
        torch.testing.assert_close(out[[0, 2]].sum(-1), torch.ones(2, device=kernel_device))
    logits = torch.zeros(3, 5, device=kernel_device)
    logits[1, 2] = NAN
    expected, grad = kernels.expected_value_and_gradient(logits, atoms_of(logits), columns=8, impl="triton")
    assert expected.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(-1).tolist() == [False, True, False]
    assert (grad[:, 5:] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("far", "dtype"), [(1e4, torch.float16), (1e4, torch.float32), (1e30, torch.bfloat16)]
)
def test_extreme_logits_stay_finite(kernel_device: str, far: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[[far, -far, 0.0], [-far, -far, -far]]], dtype=dtype, device=kernel_device)
    exact = logits[0].double().cpu()
    target = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]], device=kernel_device)
    loss, grad = outputs_and_gradients(
        run("categorical_cross_entropy")[0], [logits, target], [torch.ones(1, 2, device=kernel_device)], [0]
    )
    expected = -(target.cpu().double() * exact.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss[0].cpu().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        grad[0].cpu().double(), exact.softmax(-1) - target.cpu(), rtol=0, atol=1e-2 if far > 1e5 else 1e-3
    )
    atoms = torch.tensor([-1.0, 0.0, 1.0], device=kernel_device)
    assert kernels.expected_value(logits, atoms, impl="triton").tolist() == [[-1.0, 0.0]]
    zeros = torch.zeros(2, device=kernel_device)
    out = kernels.categorical_target(logits, zeros, zeros + 1.0, zeros, 0.0, atoms, 1.0, impl="triton")
    torch.testing.assert_close(out.cpu().double(), exact.softmax(-1), rtol=0, atol=1e-6)


# cross-entropies, encodings, expected value


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(9, 101), (2, 5, 51), (2, 3, 4, 2), (1, 1, 128)], ids=str)
@DTYPES
def test_the_cross_entropy_follows_its_twin(
    kernel_device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    target = normal(*shape[-2:], seed=1).softmax(-1)
    op = run("categorical_cross_entropy")
    inputs, seeds = [normal(*shape), target], [normal(*shape[:-1], seed=2)]
    _, grad = assert_follows_twin(*op, inputs, seeds, [0], dtype, kernel_device)
    assert (grad != 0).any(-1).all()
    if len(shape) == 3:  # a target of its own for every member
        own = normal(*shape, seed=1).softmax(-1)
        assert_follows_twin(*op, [inputs[0], own], seeds, [0], dtype, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("sigma", [None, 0.15, 3.0])
@pytest.mark.parametrize("shape", [(5, 101), (2, 7, 51), (2, 1, 3, 2), (6,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_cross_entropy_of_values_follows_its_twin(
    kernel_device: str, shape: tuple[int, ...], sigma: float | None, dtype: torch.dtype
) -> None:
    if dtype != torch.float32 and len(shape) != 3:
        pytest.skip("one size is enough in this dtype")
    last = (V_MAX,) if sigma is None else (V_MAX, sigma)
    op = run("two_hot_cross_entropy" if sigma is None else "hl_gauss_cross_entropy", *last)
    values, seeds = 6.0 * normal(*shape[:-1], seed=1), [normal(*shape[:-1], seed=2)]
    _, grad = assert_follows_twin(*op, [normal(*shape), values], seeds, [0], dtype, kernel_device)
    assert (grad != 0).any(-1).all()
    if len(shape) == 3:  # values shared by the members
        assert_follows_twin(*op, [normal(*shape), values[0]], seeds, [0], dtype, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("num_atoms", [2, 3, 101, 128, 257])
@DTYPES
def test_the_encodings_follow_their_twins(kernel_device: str, num_atoms: int, dtype: torch.dtype) -> None:
    if dtype in (torch.float16, torch.float64) and num_atoms != 101:
        pytest.skip("one size is enough in this dtype")
    values = torch.cat([6.0 * normal(2, 6), support(3).expand(2, 3), torch.tensor([[99.0, -99.0]] * 2)], -1)
    for op in (run("two_hot", num_atoms, V_MAX), run("hl_gauss", num_atoms, V_MAX, 0.7)):
        (out,) = assert_follows_twin(*op, [values], [], [], dtype, kernel_device)
        torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]), rtol=0, atol=1e-6)
        assert out.shape == (2, 11, num_atoms)
        assert out.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(7,), (9, 101), (2, 5, 51), (2, 3, 4, 2), (1, 3, 128)], ids=str)
@DTYPES
def test_the_expected_value_follows_its_twin(
    kernel_device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs, seeds = [normal(*shape), support(shape[-1])], [normal(*shape[:-1], seed=1)]
    op = run("expected_value")
    _, grad = assert_follows_twin(*op, inputs, seeds, [0], dtype, kernel_device)
    assert (grad != 0).any(-1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(7,), (9, 101), (2, 5, 51), (2, 3, 4, 2), (1, 3, 128)], ids=str)
@DTYPES
def test_the_expected_value_without_autograd_gives_the_scaled_gradient_in_padded_rows(
    kernel_device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    K = shape[-1]
    inputs = [normal(*shape), support(K)]
    op = run("expected_value_and_gradient", scale=-0.3, columns=K + 3)
    values, grad = assert_follows_twin(*op, inputs, [], [], dtype, kernel_device)
    assert values.shape == shape[:-1]
    assert grad.shape == (*shape[:-1], K + 3)
    assert (grad[..., K:] == 0).all()
    logits, atoms = on(kernel_device, dtype, *inputs)
    call = partial(kernels.expected_value_and_gradient, logits, atoms, impl="triton")
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    for number in (torch.tensor(-0.3, dtype=kind), torch.tensor([-0.3], dtype=torch.float64)):
        again, other = call(scale=number.to(kernel_device))  # read where it is
        torch.testing.assert_close(again, values)
        torch.testing.assert_close(
            other, grad[..., :K], rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6
        )
    assert not any(x.requires_grad for x in call())
    leaf = logits.requires_grad_()
    plain = kernels.expected_value(leaf, atoms, impl="triton")
    torch.testing.assert_close(plain, values)
    (whole,) = torch.autograd.grad(plain.sum(), leaf)
    values, grad = call()  # of a leaf too
    assert not values.requires_grad
    torch.testing.assert_close(grad, whole)


# the projection of arbitrary positions


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 101), (2, 3, 4), (2, 2, 2, 2), (33,)], ids=str)
@DTYPES
def test_the_projection_follows_its_twin_in_value_and_both_gradients(
    kernel_device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if dtype in (torch.float16, torch.float64) and len(shape) != 3:
        pytest.skip("one size is enough in this dtype")
    num_atoms = shape[-1]
    # a third of a spacing off the atoms, where rounding decides nothing; some beyond the support
    whole = (normal(*shape) * num_atoms).round() + 1.0 / 3.0
    positions = whole * (2.0 * V_MAX / (num_atoms - 1)) - V_MAX * (num_atoms % 2 == 0)
    if dtype in (torch.bfloat16, torch.float16):
        positions = 0.25 * V_MAX * normal(*shape)
    inputs, seeds = [normal(*shape, seed=1).softmax(-1), positions], [normal(*shape, seed=2)]
    op = run("categorical_projection", V_MAX)
    out, *grads = assert_follows_twin(*op, inputs, seeds, [0, 1], dtype, kernel_device)
    assert all(grad.abs().sum() > 0 for grad in grads)
    exact = projected(*(x.to(dtype).double() for x in inputs), V_MAX)
    torch.testing.assert_close(out.cpu().double(), exact, rtol=0, atol=num_atoms * 2.0**-23)
    for wanted in ([0], [1]):
        assert_follows_twin(*op, inputs, seeds, wanted, dtype, kernel_device)


@pytest.mark.gpu
def test_the_gradient_of_the_projection_ends_where_the_support_does(kernel_device: str) -> None:
    probs, positions, seed = on(
        kernel_device,
        torch.float32,
        torch.full((1, 5), 0.2),
        torch.tensor([[-10.0, 5.0, 11.0, -12.0, 10.0]]),
        torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]),
    )
    _, *grads = outputs_and_gradients(
        run("categorical_projection", V_MAX)[0], [probs, positions], [seed], [0, 1]
    )
    assert grads[0].tolist() == [[1.0, 8.0, 16.0, 1.0, 16.0]]
    torch.testing.assert_close(grads[1].cpu(), torch.tensor([[0.04, 0.32, 0.0, 0.0, 0.0]]))


# memory


@pytest.mark.gpu
def test_rows_may_lie_anyhow_in_memory(kernel_device: str) -> None:
    device, dtype = kernel_device, torch.float32
    logits, next_logits, rest = bellman_inputs(2, 3, 5)
    seed = normal(2, 3, seed=4).to(dtype).to(device)
    rest = [x.to(dtype).to(device) for x in rest]
    atoms, values = support(5).to(dtype).to(device), 5.0 * normal(2, 3).to(dtype).to(device)
    target = normal(3, 5).softmax(-1).to(dtype).to(device)
    ops: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: LOSS(x, y, *rest),
        lambda x, _: kernels.categorical_cross_entropy(x, target, impl="triton"),
        lambda x, y: kernels.categorical_cross_entropy(x, y.detach().softmax(-1), impl="triton"),
        lambda x, _: kernels.two_hot_cross_entropy(x, values, V_MAX, impl="triton"),
        lambda x, _: kernels.expected_value(x, atoms, impl="triton"),
    ]
    without: list[Callable[[Tensor], Any]] = [
        lambda x: kernels.expected_value_and_gradient(x, atoms, columns=7, impl="triton")
    ]
    pairs = zip(layouts(logits.to(dtype)), layouts(next_logits.to(dtype)), strict=True)
    for number, ((told, x), (_, y)) in enumerate(pairs):
        x, y = x.to(device), y.to(device)
        for op in ops[: len(ops) if number % 3 == 0 else 1]:
            mine = outputs_and_gradients(op, [x, y], [seed], [0])
            dense = outputs_and_gradients(op, [x.contiguous(), y.contiguous()], [seed], [0])
            for a, b in zip(mine, dense, strict=True):
                torch.testing.assert_close(
                    a, b, rtol=1e-5, atol=1e-6, msg=lambda text, told=told: f"{told}: {text}"
                )
        for call in without:
            for a, b in zip(call(x), call(x.contiguous()), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_incoming_gradients_and_vectors_may_lie_anyhow_in_memory(kernel_device: str) -> None:
    tensors = bellman_tensors(kernel_device, 2, 3, 5)
    atoms = atoms_of(tensors[0])
    ops: list[Callable[[Tensor], Tensor]] = [
        lambda x: LOSS(x, *tensors[1:]),
        lambda x: kernels.hl_gauss_cross_entropy(x, tensors[2], V_MAX, 1.0, impl="triton"),
        lambda x: kernels.expected_value(x, atoms, impl="triton"),
    ]
    seeds = [seed.to(kernel_device) for _, seed in layouts(normal(2, 3).float())]
    seeds.append(torch.ones((), device=kernel_device).expand(2, 3))  # as sum() sends it back
    for op in ops:
        for seed in seeds:
            mine = outputs_and_gradients(op, [tensors[0]], [seed], [0])
            dense = outputs_and_gradients(op, [tensors[0]], [seed.contiguous()], [0])
            for a, b in zip(mine, dense, strict=True):
                torch.testing.assert_close(a, b)
    usual = LOSS(*tensors)
    for place in range(2, 5):
        gaps = list(tensors)
        gaps[place] = torch.stack([tensors[place], tensors[place] + 1.0], -1)[:, 0]
        torch.testing.assert_close(LOSS(*gaps), usual)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_atoms", "columns"), [(101, 104), (5, 8), (33, 48), (7, 9), (16, 24)])
def test_padded_rows_are_read_where_they_are(kernel_device: str, num_atoms: int, columns: int) -> None:
    members, batch = 2, 3
    logits, next_logits, rest = bellman_inputs(members, batch, num_atoms)
    dense = on(kernel_device, torch.bfloat16, logits, next_logits, *rest)

    def padded(x: Tensor) -> Tensor:
        """Beyond the atoms, and in the other half of the batch, there is NaN."""
        whole = torch.full((members, 2 * batch, columns), NAN, dtype=x.dtype, device=x.device)
        whole[:, :batch, :num_atoms] = x
        return whole[:, :batch, :num_atoms]

    views = [padded(dense[0]), padded(dense[1]), *dense[2:]]
    assert _categorical._members(views[0]).data_ptr() == views[0].data_ptr()
    atoms, values = atoms_of(dense[0]), dense[2]
    target = next_logits[0].softmax(-1).to(kernel_device)
    wide = torch.full((batch, columns), NAN, device=kernel_device)
    wide[:, :num_atoms] = target
    calls: list[Callable[..., Any]] = [
        LOSS,
        lambda x, *_: kernels.categorical_cross_entropy(x, target.float(), impl="triton"),
        lambda x, *_: kernels.categorical_cross_entropy(x, wide[:, :num_atoms], impl="triton"),
        lambda x, *_: kernels.hl_gauss_cross_entropy(x, values, V_MAX, 1.0, impl="triton"),
        lambda x, *_: kernels.expected_value(x, atoms, impl="triton"),
    ]
    seed = torch.ones(members, batch, device=kernel_device)
    for call in calls:
        mine = outputs_and_gradients(call, views, [seed], [0])
        plain = outputs_and_gradients(call, dense, [seed], [0])
        for a, b in zip(mine, plain, strict=True):
            assert_close_to_truth(a, b.double(), b)
    alone = partial(kernels.expected_value_and_gradient, atoms=atoms, columns=columns, impl="triton")
    for a, b in zip(alone(views[0]), alone(dense[0]), strict=True):
        assert_close_to_truth(a, b.double(), b)


def test_only_memory_of_its_own_is_read_beyond_a_row() -> None:
    whole = torch.zeros(2, 4, 104)
    assert _categorical._words(whole[..., :101]) == (8, 104)
    assert _categorical._words(whole[..., 3:104]) == (1, 101)  # the last row ends where the memory does
    assert _categorical._words(whole[:, :3, 3:104]) == (8, 104)  # here another row follows
    assert _categorical._words(torch.zeros(2, 4, 101)) == (1, 101)
    assert _categorical._words(torch.zeros(2, 4, 64)) == (8, 64)
    assert _categorical._words(whole[..., :101], torch.zeros(1, 4, 101)) == (1, 101)
    assert _categorical._words(torch.zeros(1, 1, 101)) == (1, 101)  # one row, but nothing behind it


@pytest.mark.gpu
def test_an_empty_batch_gives_empty_results(kernel_device: str) -> None:
    tensors = bellman_tensors(kernel_device, 2, 0, 5)
    none, atoms = tensors[2], atoms_of(tensors[0])
    leaf = tensors[0].requires_grad_()
    target = TARGET(*tensors[1:])
    assert target.shape == (0, 5)
    assert kernels.two_hot(none, 5, V_MAX, impl="triton").shape == (0, 5)
    assert bellman("categorical_bellman_loss_and_gradient", columns=8)[0](*tensors)[1].shape == (2, 0, 8)
    assert run("expected_value_and_gradient", columns=8)[0](leaf, atoms)[1].shape == (2, 0, 8)
    for out in (
        LOSS(leaf, *tensors[1:]),
        kernels.categorical_cross_entropy(leaf, target, impl="triton"),
        kernels.hl_gauss_cross_entropy(leaf, none, V_MAX, 1.0, impl="triton"),
        kernels.expected_value(leaf, atoms, impl="triton"),
    ):
        assert out.shape == (2, 0)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert grad.shape == leaf.shape
    probs = target.requires_grad_()
    (grad,) = torch.autograd.grad(
        kernels.categorical_projection(probs, target.detach(), V_MAX, impl="triton").sum(), probs
    )
    assert grad.shape == (0, 5)


# torch's ways to call an op


def differentiable(device: str) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Each op with a gradient, as a function of one tensor, and that tensor."""
    logits, next_logits, rest = bellman_inputs(2, 4, 7)
    logits, next_logits, *rest = (x.float().to(device) for x in (logits, next_logits, *rest))
    target = next_logits[0].softmax(-1)
    return {
        "categorical_bellman_loss": (lambda x: LOSS(x, next_logits, *rest), logits),
        "categorical_cross_entropy": (
            lambda x: kernels.categorical_cross_entropy(x, target, impl="triton"),
            logits,
        ),
        "hl_gauss_cross_entropy": (
            lambda x: kernels.hl_gauss_cross_entropy(x, rest[0], V_MAX, 1.0, impl="triton"),
            logits,
        ),
        "expected_value": (lambda x: kernels.expected_value(x, atoms_of(x), impl="triton"), logits),
        "categorical_projection": (
            lambda x: kernels.categorical_projection(x, 2.0 * next_logits, V_MAX, impl="triton"),
            logits.softmax(-1),
        ),
    }


@pytest.mark.gpu
def test_each_op_is_a_sound_op_of_torch(kernel_device: str) -> None:
    logits, next_logits, rest = bellman_inputs(2, 3, 5)
    logits, next_logits, *rest = (x.float().to(kernel_device) for x in (logits, next_logits, *rest))
    vectors, temperature, atoms = rest[:3], rest[3], atoms_of(logits)
    leaf = logits.clone().requires_grad_()
    probs = next_logits.softmax(-1)
    grad = torch.ones(2, 3, device=kernel_device)
    given = next_logits, *vectors
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (OPS.categorical_target, (*given, temperature, 0.0, V_MAX)),
        (OPS.categorical_bellman_loss, (leaf, *given, None, 0.1, V_MAX, None, 1.0, 5)),
        (OPS.categorical_bellman_loss, (logits, *given, None, 0.1, V_MAX, temperature, 0.0, 0)),
        (OPS.categorical_bellman_loss_backward, (grad, logits)),
        (OPS.categorical_cross_entropy, (leaf, probs[0], 1.0, None)),
        (OPS.categorical_cross_entropy, (leaf, vectors[0], V_MAX, 0.5)),
        (OPS.categorical_cross_entropy_backward, (grad, logits, vectors[0], V_MAX, 0.0)),
        (OPS.value_encoding, (vectors[0], 5, V_MAX, 0.5)),
        (OPS.expected_value, (leaf, atoms)),
        (OPS.expected_value_backward, (grad, logits, atoms)),
        (OPS.expected_value_and_gradient, (logits, atoms, temperature, 0.0, 8)),
        (OPS.expected_value_and_gradient, (logits[0, 0], atoms, None, 0.5, 5)),
        (OPS.categorical_projection, (probs.clone().requires_grad_(), next_logits, V_MAX)),
        (OPS.categorical_projection_backward, (logits, probs, next_logits, V_MAX, True, False)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(differentiable("cpu")))
def test_compiled_code_and_transforms_give_what_plain_calls_give(kernel_device: str, name: str) -> None:
    function, x = differentiable(kernel_device)[name]

    def total(x: Tensor) -> Tensor:
        return function(x).sin().sum()

    leaf = x.clone().requires_grad_()
    plain = function(x)
    (grad,) = torch.autograd.grad(total(leaf), leaf)
    assert grad.abs().sum() > 0
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    out = compiled(leaf)
    torch.testing.assert_close(out, plain.sin().sum())
    torch.testing.assert_close(torch.autograd.grad(out, leaf)[0], grad)
    torch.testing.assert_close(torch.func.grad(total)(x), grad)
    pair = torch.stack([x, 2.0 * x])
    torch.testing.assert_close(torch.func.vmap(function)(pair)[0], plain)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(pair)[0], grad)
    assert torch.func.vmap(function)(pair[:0]).shape == (0, *plain.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(differentiable("cpu")))
def test_a_tangent_is_refused_and_not_lost(kernel_device: str, name: str) -> None:
    function, x = differentiable(kernel_device)[name]
    with forward_ad.dual_level():
        torch.testing.assert_close(function(x), function(x))  # without one the kernels serve there too
        with pytest.raises(NotImplementedError, match="jvp"):
            function(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.gpu
def test_compiled_code_gives_the_gradients_of_the_ops_without_autograd(kernel_device: str) -> None:
    logits, next_logits, rest = bellman_inputs(2, 4, 7)
    tensors = [x.float().to(kernel_device) for x in (logits, next_logits, *rest)]

    def both(logits: Tensor, scale: Tensor) -> list[Tensor]:
        atoms = atoms_of(logits)
        pair = kernels.expected_value_and_gradient(logits, atoms, scale=scale, columns=8, impl="triton")
        other = kernels.categorical_bellman_loss_and_gradient(
            logits, *tensors[1:], atoms, V_MAX, scale=scale, columns=8, impl="triton"
        )
        return [*pair, *other]

    scale = torch.tensor(0.5, device=kernel_device)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for leaf in (tensors[0], tensors[0].clone().requires_grad_()):
        for mine, plain in zip(compiled(leaf, scale), both(leaf, scale), strict=True):
            torch.testing.assert_close(mine, plain)
            assert not mine.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(differentiable("cpu")))
def test_a_second_derivative_is_refused(kernel_device: str, name: str) -> None:
    function, x = differentiable(kernel_device)[name]
    leaf = x.clone().requires_grad_()
    total = function(leaf).sum()  # its gradient depends on the leaf, though the seed does not
    with pytest.raises(RuntimeError, match=r"no second derivative .*: use kernels.reference."):
        torch.autograd.grad(total, leaf, create_graph=True)


# without kernels


@pytest.mark.parametrize("sigma", [0.05, 0.75, 20.0])
@pytest.mark.parametrize("num_atoms", [2, 51])
def test_hl_gauss_is_the_mass_of_a_normal_in_each_bin(num_atoms: int, sigma: float) -> None:
    values = torch.tensor([[-99.0, -V_MAX, 0.0], [0.123, 9.9, 99.0]], dtype=torch.float64)
    out = kernels.hl_gauss(values, num_atoms, V_MAX, sigma)
    expected = [[normal_masses(v, num_atoms, V_MAX, sigma) for v in row] for row in values.tolist()]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    low = kernels.hl_gauss(values.bfloat16(), num_atoms, V_MAX, sigma)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.sum(-1), torch.ones(2, 3))


def test_the_twins_are_their_definitions() -> None:
    logits, next_logits, rest = bellman_inputs(2, 20, 51)
    rest.append(support(51))
    target = bellman_target(next_logits, *rest[:3], 0.125, V_MAX)
    ours = reference.categorical_target(next_logits, *rest, V_MAX)
    torch.testing.assert_close(ours, target, rtol=0, atol=1e-12)
    log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
    losses = -(target * log_probs).sum(-1)
    torch.testing.assert_close(reference.categorical_bellman_loss(logits, next_logits, *rest, V_MAX), losses)
    pair = reference.categorical_bellman_loss_and_gradient(
        logits, next_logits, *rest, V_MAX, scale=0.3, columns=56
    )
    torch.testing.assert_close(pair[0], losses)
    torch.testing.assert_close(pair[1][..., :51], 0.3 * (log_probs.exp() - target))
    assert (pair[1][..., 51:] == 0).all()
    values = rest[0]
    two = torch.stack(
        [
            projected(torch.full((1, 51), 1.0 / 51, dtype=torch.float64), v.expand(1, 51), V_MAX)[0]
            for v in values
        ]
    )
    torch.testing.assert_close(reference.two_hot(values, 51, V_MAX), two, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        reference.two_hot_cross_entropy(logits, values, V_MAX), -(two * log_probs).sum(-1)
    )
    gauss = torch.tensor([normal_masses(v, 51, V_MAX, 0.6) for v in values.tolist()], dtype=torch.float64)
    torch.testing.assert_close(
        reference.hl_gauss_cross_entropy(logits, values, V_MAX, 0.6), -(gauss * log_probs).sum(-1)
    )


def test_a_cpu_takes_its_own_forms_of_the_bellman_loss() -> None:
    logits, next_logits, rest = bellman_inputs(2, 10, 51)
    logits, next_logits, *rest = (x.float() for x in (logits, next_logits, *rest, support(51)))
    logits.requires_grad_()
    losses = kernels.categorical_bellman_loss(logits, next_logits, *rest, V_MAX)
    target = kernels.categorical_target(next_logits, *rest, V_MAX)
    assert torch.equal(losses, kernels.categorical_cross_entropy(logits, target))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(grad, logits.detach().softmax(-1) - target)
    pair = kernels.categorical_bellman_loss_and_gradient(logits, next_logits, *rest, V_MAX, scale=0.5)
    torch.testing.assert_close(pair[0], losses.detach())
    torch.testing.assert_close(pair[1], 0.5 * grad)
    assert not pair[0].requires_grad


@pytest.mark.parametrize("num_atoms", [2, 51, 101, 128])
def test_a_cpu_gives_values_and_gradients_without_autograd(num_atoms: int) -> None:
    logits, next_logits, rest = bellman_inputs(2, 10, num_atoms, 3)
    logits, next_logits, *rest = (x.float() for x in (logits, next_logits, *rest, support(num_atoms)))
    atoms = rest[-1]
    whole = torch.full((2, 21, num_atoms + 5), NAN)
    padded = whole[:, 1:11, 2 : 2 + num_atoms]
    padded.copy_(logits)
    calls: dict[str, tuple[Any, ...]] = {
        "expected_value_and_gradient": (atoms,),
        "categorical_bellman_loss_and_gradient": (next_logits, *rest, V_MAX),
    }
    for name, others in calls.items():
        exact = getattr(reference, name)(
            logits.double(), *(x.double() if isinstance(x, Tensor) else x for x in others), scale=0.3
        )
        for scale in (0.3, torch.tensor(0.3), torch.tensor([0.3], dtype=torch.float64)):
            for x in (logits, padded, logits.transpose(0, 1).contiguous().transpose(0, 1), logits.clone()):
                for columns in (None, num_atoms + 3):
                    values, grad = getattr(kernels, name)(x, *others, scale=scale, columns=columns)
                    assert values.dtype == grad.dtype == torch.float32
                    assert grad.shape[-1] == (columns or num_atoms)
                    torch.testing.assert_close(values.double(), exact[0], rtol=1e-5, atol=2e-5)
                    torch.testing.assert_close(
                        grad[..., :num_atoms].double(), exact[1], rtol=1e-4, atol=2e-6 * 20
                    )
                    assert (grad[..., num_atoms:] == 0).all()
        for empty in (logits[:, :0], logits[:0]):
            if name == "expected_value_and_gradient":
                assert getattr(kernels, name)(empty, *others)[1].shape == empty.shape
    one, slope = kernels.expected_value_and_gradient(logits[0, 0], atoms)
    assert one.shape == ()
    assert slope.shape == (num_atoms,)


def test_the_compiled_passes_serve_plain_float32_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("brc_fast.kernels._cpu", reason="the compiled module is not built")
    seen = native_calls(monkeypatch)
    logits, next_logits, rest = bellman_inputs(2, 10, 51)
    tensors = [logits, next_logits, *rest, support(51)]

    def both(*tensors: Tensor, impl: str | None = None) -> list[Tensor]:
        pair = kernels.expected_value_and_gradient(tensors[0], tensors[-1], impl=impl)
        return [*pair, *kernels.categorical_bellman_loss_and_gradient(*tensors, V_MAX, impl=impl)]

    single = [x.float() for x in tensors]
    expected = both(*single, impl="reference")
    both(*tensors)
    both(*(x.bfloat16() for x in tensors))
    torch.compile(both, fullgraph=True, backend="eager")(*single)
    assert {"expected_value", "categorical_bellman"}.isdisjoint(seen)
    single[0].requires_grad_()
    for mine, other in zip(both(*single), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        assert not mine.requires_grad
    assert {"expected_value", "categorical_bellman"} <= set(seen)


def test_float32_on_a_cpu_keeps_its_bits() -> None:
    torch.manual_seed(0)
    logits, atoms = torch.randn(2, 7, 101), torch.linspace(-V_MAX, V_MAX, 101)
    target = torch.randn(7, 101).softmax(-1)
    assert torch.equal(kernels.expected_value(logits, atoms), logits.softmax(-1) @ atoms)
    log_probs = logits.log_softmax(-1)
    assert torch.equal(kernels.categorical_cross_entropy(logits, target), (log_probs * target).sum(-1).neg())


def test_low_precision_logits_give_float32_results_on_a_cpu() -> None:
    logits, next_logits, rest = bellman_inputs(2, 10, 51)
    rest.append(support(51))
    for dtype in (torch.bfloat16, torch.float16):
        low, low_next, *low_rest = (x.to(dtype) for x in (logits, next_logits, *rest))
        low.requires_grad_()
        target = kernels.categorical_target(low_next, *low_rest, V_MAX)
        losses = kernels.categorical_bellman_loss(low, low_next, *low_rest, V_MAX)
        values = kernels.expected_value(low, low_rest[-1])
        assert target.dtype == losses.dtype == values.dtype == torch.float32
        (grad,) = torch.autograd.grad(losses.sum(), low)
        assert grad.dtype == dtype
        exact = reference.categorical_bellman_loss(
            *(x.detach().double() for x in (low, low_next, *low_rest)), V_MAX
        )
        torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)


def test_values_keep_their_bits_under_autocast() -> None:
    logits, atoms = normal(3, 5).float(), support(5).float()
    for op in (kernels.expected_value, lambda *x: kernels.expected_value_and_gradient(*x)[0]):
        with torch.autocast("cpu", torch.bfloat16):
            values = op(logits, atoms)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, op(logits, atoms), rtol=1e-5, atol=1e-5)


def test_a_temperature_is_any_tensor_of_one_number() -> None:
    logits, next_logits, rest = bellman_inputs(2, 4, 5)
    rewards, discounts, log_probs, _ = rest
    for op in (kernels.categorical_target, partial(kernels.categorical_bellman_loss, logits)):
        results = [
            op(next_logits, rewards, discounts, log_probs, one, support(5), V_MAX)
            for one in (0.2, torch.tensor(0.2), torch.tensor([0.2]), torch.tensor([[0.2]]))
        ]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


def test_a_target_of_another_dtype_changes_nothing_but_its_rounding() -> None:
    logits = normal(2, 3, 5).float().requires_grad_()
    target = normal(3, 5).softmax(-1)
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        out = kernels.categorical_cross_entropy(logits, target.to(kind))
        plain = kernels.categorical_cross_entropy(logits, target.to(kind), impl="reference")
        assert out.dtype == plain.dtype == torch.float32
        torch.testing.assert_close(out, plain)


def test_the_cross_entropy_takes_a_batch_of_incoming_gradients() -> None:
    logits, target = normal(3, 5).float(), normal(3, 5).softmax(-1).float()

    def jacobian(vectorize: bool) -> Tensor:
        out: Tensor = torch.autograd.functional.jacobian(
            lambda x: kernels.categorical_cross_entropy(x, target), logits, vectorize=vectorize
        )
        return out

    torch.testing.assert_close(jacobian(True), jacobian(False))


def test_a_scale_is_any_tensor_of_one_number() -> None:
    for dtype in (torch.float32, torch.float64):
        logits, atoms = normal(5).to(dtype), support(5).to(dtype)
        value, grad = kernels.expected_value_and_gradient(logits, atoms, scale=0.5)
        pair = kernels.expected_value_and_gradient(logits, atoms, scale=torch.full((1, 1), 0.5))
        assert torch.equal(pair[0], value)
        assert torch.equal(pair[1], grad)


def test_the_choice_compile_compiles_every_op_on_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(twins, "_compiled", {})
    monkeypatch.setattr(twins, "_trusted", set())
    logits, values = normal(3, 5).float(), normal(3).float()
    target = logits.softmax(-1)
    with kernels.use("compile"):
        kernels.categorical_cross_entropy(logits, target)
        kernels.two_hot(values, 5, V_MAX)
        kernels.hl_gauss(values, 5, V_MAX, 1.0)
        kernels.categorical_projection(target, logits, V_MAX)
    assert compiled == ["categorical_cross_entropy", "two_hot", "hl_gauss", "_compiled_projection"]


def test_a_nan_position_is_no_error_in_the_twins() -> None:
    probs = torch.full((2, 5), 0.2, dtype=torch.float64)
    positions = torch.tensor([[0.0] * 5, [NAN] * 5], dtype=torch.float64)
    for out in (
        reference.categorical_projection(probs, positions, V_MAX),
        reference.two_hot(positions[:, 0], 5, V_MAX),
    ):
        assert out[0].isfinite().all()
        assert out[1].isnan().any()


def test_kernels_on_a_cpu_are_refused_without_the_interpreter() -> None:
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 makes it possible")
    require("triton")
    with pytest.raises(RuntimeError, match="kernels were asked for, but a tensor is on cpu"):
        kernels.expected_value(torch.zeros(2, 3), torch.zeros(3), impl="triton")


LOGITS, VECTOR, ATOMS_5 = torch.zeros(2, 3, 5), torch.zeros(3), torch.linspace(-10.0, 10.0, 5)
BELLMAN: dict[str, Any] = {
    "logits": LOGITS,
    "next_logits": LOGITS,
    "rewards": VECTOR,
    "discounts": VECTOR,
    "next_log_probs": VECTOR,
    "temperature": 0.1,
    "atoms": ATOMS_5,
    "v_max": V_MAX,
}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"next_logits": LOGITS[0]}, "next_logits ... E >= 1 and K >= 2, got [3, 5]"),
        ({"next_logits": LOGITS[:0]}, "next_logits ... E >= 1 and K >= 2, got [0, 3, 5]"),
        ({"next_logits": LOGITS[..., :1]}, "next_logits ... E >= 1 and K >= 2, got [2, 3, 1]"),
        ({"logits": LOGITS[..., :4]}, "logits ... [E, B, K] = [2, 3, 5], got [2, 3, 4]"),
        ({"rewards": VECTOR[:2]}, "rewards ... [B] = [3], got [2]"),
        ({"discounts": VECTOR[None]}, "discounts ... [B] = [3], got [1, 3]"),
        ({"next_log_probs": VECTOR[0]}, "next_log_probs ... [B] = [3], got []"),
        ({"atoms": ATOMS_5[:4]}, "atoms ... [K] = [5], got [4]"),
        ({"temperature": VECTOR}, "temperature must be a number ... got shape [3]"),
        ({"atoms": torch.linspace(0.0, 10.0, 5)}, "atoms ... -v_max to v_max = 10.0, got 0.0 to 10.0"),
        ({"v_max": 0.0}, "v_max ... positive and finite, got 0.0"),
        ({"v_max": NAN}, "v_max ... positive and finite, got nan"),
    ],
)
def test_the_bellman_ops_refuse_what_does_not_fit(change: dict[str, Any], told: str) -> None:
    arguments = BELLMAN | change
    ops: list[Callable[..., Any]] = [
        kernels.categorical_bellman_loss,
        kernels.categorical_bellman_loss_and_gradient,
    ]
    if "logits" not in change:
        ops.append(lambda logits, **rest: kernels.categorical_target(**rest))
    for op in ops:
        with pytest.raises(ValueError, match=says(told)):
            op(**arguments)


K_FROM_2 = "logits ... K >= 2"


@pytest.mark.parametrize(
    ("name", "given", "options", "told"),
    [
        ("categorical_bellman_loss_and_gradient", (), BELLMAN | {"columns": 4}, "columns ... K = 5, got 4"),
        (
            "categorical_bellman_loss_and_gradient",
            (),
            BELLMAN | {"scale": VECTOR},
            "scale must be a number ... [3]",
        ),
        ("categorical_cross_entropy", (VECTOR, VECTOR), {}, f"{K_FROM_2}, got [3]"),
        (
            "categorical_cross_entropy",
            (LOGITS, LOGITS[0, :2]),
            {},
            "target ... [3, 5] or [2, 3, 5], got [2, 5]",
        ),
        ("expected_value", (LOGITS, VECTOR), {}, "atoms ... [K] = [5], got [3]"),
        ("expected_value", (LOGITS[..., :1], VECTOR[:1]), {}, f"{K_FROM_2}, got [2, 3, 1]"),
        ("expected_value_and_gradient", (LOGITS, VECTOR), {}, "atoms ... [K] = [5], got [3]"),
        ("expected_value_and_gradient", (VECTOR[0], VECTOR), {}, f"{K_FROM_2}, got []"),
        ("expected_value_and_gradient", (LOGITS, ATOMS_5), {"columns": 4}, "columns ... K = 5, got 4"),
        (
            "expected_value_and_gradient",
            (LOGITS, ATOMS_5),
            {"scale": VECTOR},
            "scale must be a number ... [3]",
        ),
        ("two_hot_cross_entropy", (LOGITS, VECTOR[:2], V_MAX), {}, "values ... [2, 3] or [3], got [2]"),
        (
            "hl_gauss_cross_entropy",
            (LOGITS, VECTOR, V_MAX, 0.0),
            {},
            "sigma ... positive and finite, got 0.0",
        ),
        ("hl_gauss", (VECTOR, 5, V_MAX, INF), {}, "sigma ... positive and finite, got inf"),
        ("two_hot", (VECTOR, 1, V_MAX), {}, "num_atoms ... at least 2, got 1"),
        ("two_hot", (VECTOR, 5, -1.0), {}, "v_max ... positive and finite, got -1.0"),
        ("categorical_projection", (LOGITS, LOGITS[0], V_MAX), {}, "positions ... [2, 3, 5], got [3, 5]"),
        ("expected_value", (LOGITS, ATOMS_5), {"impl": "fast"}, "impl ... auto, triton, ... got 'fast'"),
    ],
)
def test_the_other_ops_refuse_what_does_not_fit(
    name: str, given: tuple[Any, ...], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=says(told)):
        getattr(kernels, name)(*given, **options)
