"""BroNetPlan: the passes of a learner, against autograd through the twin."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from kernel_harness import assert_close_to_truth
from torch import Tensor

from brc_fast import kernels
from brc_fast.kernels import Arrays, BroNetPlan, reference
from brc_fast.kernels.bronet_plan import passes_for
from brc_fast.kernels.runtime import native

GUARD = 12345.0  # a number of every dtype here, or nearly: gaps must keep it
GAP = 5


class Size(NamedTuple):
    networks: int = 4
    trained: int = 2
    rows: int = 9
    inputs: int = 11
    width: int = 33
    depth: int = 2
    outputs: int = 6
    parts: int = 2
    last: int = 0  # rows with gradients; 0 for all

    @property
    def trained_rows(self) -> int:
        return self.last or self.rows

    def __str__(self) -> str:
        return "-".join(map(str, self))


ONLINE_AND_TARGET = Size()
SIZES = [
    ONLINE_AND_TARGET,
    Size(1, 1, 5, 3, 7, 0, 2, 1),  # no block
    Size(2, 2, 17, 8, 100, 1, 5, 1),  # one input for all
    Size(3, 1, 1, 1, 33, 1, 1, 1),  # one row, one input, one output; one of three is trained
    Size(2, 1, 70, 5, 7, 2, 3, 2),
    Size(1, 1, 18, 11, 33, 2, 6, 1, last=9),  # the actor's: gradients of the second half of the rows
    Size(1, 1, 7, 4, 20, 1, 3, 1, last=2),
]


def arrays_in(flat: Tensor, size: Size, gap: int) -> Arrays:
    """Arrays of len(flat) networks, one row each, with `gap` elements behind every layer and every array."""
    place = gap

    def take(*shape: int, layers: int = 1) -> Tensor:
        nonlocal place
        count = math.prod(shape)
        whole = flat[:, place : place + layers * (count + gap)].view(len(flat), layers, count + gap)
        place += layers * (count + gap) + gap
        return whole[..., :count].unflatten(-1, shape)

    layers = 1 + 2 * size.depth
    return Arrays(
        take(size.inputs, size.width)[:, 0],
        take(size.width, size.width, layers=layers - 1).transpose(0, 1),
        take(3, size.width, layers=layers).permute(1, 2, 0, 3),
        take(size.width, size.outputs)[:, 0],
        take(size.outputs)[:, 0],
    )


def length(size: Size, gap: int) -> int:
    layers, width = 1 + 2 * size.depth, size.width
    numbers = (
        size.inputs * width + (layers - 1) * width * width + 3 * layers * width + (width + 1) * size.outputs
    )
    return numbers + gap * (6 + 3 + 2 * layers)


class Problem:
    """Networks in flat buffers, inputs, and gradients of outputs: float64 numbers that `dtype` holds exactly.

    No ReLU is near its kink (see `without_flips` in test_bronet.py), and norms are not all alike.
    """

    def __init__(self, size: Size, dtype: torch.dtype, gap: int = GAP, device: str = "cpu", seed: int = 0):
        self.size, self.dtype = size, dtype
        rng = torch.Generator().manual_seed(seed)

        def to(x: Tensor) -> Tensor:
            return x.to(device, dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        flat = torch.full((size.networks, length(size, gap)), GUARD, dtype=torch.float64)
        exact = arrays_in(flat, size, gap)
        exact.first.copy_(normal(*exact.first.shape) / math.sqrt(size.inputs))
        exact.square.copy_(normal(*exact.square.shape) / math.sqrt(size.width))
        exact.vectors.copy_(normal(*exact.vectors.shape))
        exact.vectors[:, 1] = 0.2 + 0.3 * exact.vectors[:, 1].abs().clamp(max=1.0)
        exact.vectors[::2, 2] = 2.5 * exact.vectors[::2, 2].sign() + 0.3 * exact.vectors[::2, 2]
        exact.vectors[1::2, 2] = 2.5 * exact.vectors[1::2, 2].sign() + 0.3 * exact.vectors[1::2, 2]
        exact.head.copy_(normal(*exact.head.shape) / math.sqrt(size.width))
        exact.bias.copy_(normal(*exact.bias.shape))
        self.flat = to(flat)
        self.arrays = arrays_in(self.flat, size, gap)
        self.inputs = [to(normal(size.rows, size.inputs)) for _ in range(size.parts)]
        self.grad = to(normal(size.trained, size.trained_rows, size.outputs))
        self.gradients_flat = torch.full_like(self.flat[: size.trained], GUARD)
        self.gradients = arrays_in(self.gradients_flat, size, gap)

    def plan(self, **options: Any) -> BroNetPlan:
        rows = {"trained_rows": self.size.last} if self.size.last else {}
        return BroNetPlan(self.arrays.ordered(), self.size.rows, self.gradients, **options, **rows)

    def run(self, plan: BroNetPlan | None = None) -> list[Tensor]:
        """Outputs, dx and every gradient, copied."""
        plan = plan or self.plan()
        out = plan.forward(*self.inputs).clone()
        dx = plan.backward(self.grad, slice(None))
        assert dx is not None
        return [x.clone() for x in (out, dx.sum(0), *self.gradients.ordered())]

    def twin(self, dtype: torch.dtype) -> list[Tensor]:
        """The same by autograd through the twin, in `dtype`, on the CPU."""
        share = self.size.networks // self.size.parts
        leaves = [p.cpu().to(dtype).requires_grad_() for p in self.arrays.ordered()]
        inputs = [x.cpu().to(dtype).requires_grad_() for x in self.inputs]
        out = torch.cat(
            [
                reference.bronet(x, *(p[part * share : (part + 1) * share] for p in leaves))
                for part, x in enumerate(inputs)
            ]
        )
        trained, rows = self.size.trained, self.size.trained_rows
        learned = out[:trained, -rows:]
        dx, *grads = torch.autograd.grad(learned, [inputs[0], *leaves], self.grad.cpu().to(dtype))
        assert (dx[:-rows] == 0).all()
        assert all((grad[trained:] == 0).all() for grad in grads)
        return [out.detach(), dx[-rows:], *(grad[:trained] for grad in grads)]

    def names(self) -> list[str]:
        layers = 1 + 2 * self.size.depth
        each = [
            f"{part} of layer {i}" for i in range(layers) for part in ("kernel", "bias", "weight", "shift")
        ]
        return ["outputs", "dx", *each, "head", "head's bias"]

    def check(self, results: list[Tensor], dtype: torch.dtype | None = None) -> None:
        exact, plain = self.twin(torch.float64), self.twin(dtype or self.dtype)
        if self.dtype == torch.bfloat16:
            self._check_low(results, exact, plain)
            return
        for name, *three in zip(self.names(), results, exact, plain, strict=True):
            assert_close_to_truth(*three, told=name)  # type: ignore[arg-type]
            assert three[1].abs().sum() > 0, name

    def _check_low(self, results: list[Tensor], exact: list[Tensor], plain: list[Tensor]) -> None:
        """Within twice the largest relative error that the twin makes of anything: of a few rounded numbers
        each, the twin's own errors are too much a matter of chance."""

        def error(x: Tensor, truth: Tensor) -> float:
            return ((x.cpu().double() - truth).norm() / truth.norm()).item()

        worst = max(map(error, plain, exact))
        assert worst < 0.1
        for name, mine, truth in zip(self.names(), results, exact, strict=True):
            assert mine.dtype == self.dtype, name
            assert error(mine, truth) <= 2.0 * worst, name

    def check_gaps(self, gap: int) -> None:
        """What lies between the arrays, in parameters and gradients, is what it was; the rest is not."""
        for flat in (self.flat, self.gradients_flat):
            inside = torch.zeros(flat.shape, device=flat.device)
            for array in arrays_in(inside, self.size, gap):
                array.fill_(1.0)
            guard = torch.tensor(GUARD).to(flat)
            assert (flat[inside == 0] == guard).all()
            assert not (flat[inside == 1] == guard).any()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a run; small products only wait for more of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PASSES = ["plain", "compiled", pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is NaN until something is written there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def taking(passes: str, request: pytest.FixtureRequest) -> tuple[str, AbstractContextManager[object]]:
    """The device, and a block in which these passes run."""
    if passes == "triton":
        return request.getfixturevalue("kernel_device"), kernels.use("triton")
    if passes == "plain":
        return "cpu", kernels.use("reference")
    if native.compiled is None:
        pytest.skip("the compiled passes are not built")
    return "cpu", nullcontext()


@pytest.mark.parametrize("gap", [0, GAP], ids=["dense", "gaps"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_values_and_every_gradient_are_those_of_autograd(
    poisoned: None, size: Size, dtype: torch.dtype, gap: int, recompute: bool
) -> None:
    problem = Problem(size, dtype, gap)
    problem.check(problem.run(problem.plan(recompute=recompute)))
    problem.check_gaps(gap)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_every_kind_of_pass_gives_the_values_of_the_others(
    poisoned: None, request: pytest.FixtureRequest, passes: str, size: Size, recompute: bool
) -> None:
    device, block = taking(passes, request)
    problem = Problem(size, torch.float32, GAP, device)
    with block:
        plan = problem.plan(recompute=recompute)
        results = problem.run(plan)
        name = passes_for(problem.grad).__name__.rpartition(".")[2]
    assert name == {"plain": "_bronet_plain", "compiled": "_bronet_cpu", "triton": "norm"}[passes]
    assert [key.rpartition(".")[2] for key in plan._backward] == [name]
    problem.check(results)
    problem.check_gaps(GAP)
    other = Problem(size, torch.float32, 0)
    with kernels.use("reference"):
        for told, mine, expected in zip(problem.names(), results, other.run(), strict=True):
            torch.testing.assert_close(mine.cpu(), expected, rtol=1e-4, atol=1e-4, msg=told)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [ONLINE_AND_TARGET, Size(2, 2, 17, 8, 100, 1, 5, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_kernels_follow_the_twin_in_other_dtypes(kernel_device: str, size: Size, dtype: torch.dtype) -> None:
    problem = Problem(size, dtype, GAP, kernel_device)
    with kernels.use("triton"):
        problem.check(problem.run())
    problem.check_gaps(GAP)


@pytest.mark.parametrize("passes", ["plain", pytest.param("triton", marks=pytest.mark.gpu)])
def test_float32_vectors_serve_bfloat16_products(
    poisoned: None, request: pytest.FixtureRequest, passes: str
) -> None:
    """As a learner in bfloat16 has them: vectors of the master, all else and all gradients in bfloat16."""
    device, block = taking(passes, request)
    problem = Problem(ONLINE_AND_TARGET, torch.bfloat16, GAP, device)
    vectors = problem.arrays.vectors.float()
    mixed = problem.arrays._replace(vectors=vectors)
    with block:
        plan = BroNetPlan(mixed.ordered(), problem.size.rows, problem.gradients)
        assert plan.memory.products[0].dtype == torch.bfloat16
        assert plan.memory.stats[0].dtype == torch.float32
        problem.check(problem.run(plan))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("whose", ["parameters", "gradients"])
def test_vectors_of_another_dtype_do_not_reach_the_compiled_passes(kind: torch.dtype, whose: str) -> None:
    """These would take their bytes for float32, and write as many."""
    problem = Problem(ONLINE_AND_TARGET, torch.float32)
    arrays, gradients = problem.arrays, problem.gradients
    if whose == "parameters":
        arrays = arrays._replace(vectors=arrays.vectors.to(kind))
    else:
        gradients = gradients._replace(vectors=torch.zeros(gradients.vectors.shape, dtype=kind))
    rounded = [x.float() for x in arrays.ordered()]
    expected = problem.run(BroNetPlan(rounded, problem.size.rows, problem.gradients))
    expected[2:] = [x.clone() for x in problem.gradients.ordered()]
    plan = BroNetPlan(arrays.ordered(), problem.size.rows, gradients)
    out = plan.forward(*problem.inputs).clone()
    plan.backward(problem.grad)
    tolerance = {"rtol": 0.02, "atol": 0.02} if kind == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(out, expected[0])
    for mine, plain in zip(gradients.ordered(), expected[2:], strict=True):
        torch.testing.assert_close(mine.float(), plain, **tolerance)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_works_in_memory_of_its_own(request: pytest.FixtureRequest, passes: str, how: str) -> None:
    device, block = taking(passes, request)
    problem = Problem(ONLINE_AND_TARGET, torch.float32, GAP, device)
    with block:
        plan = problem.plan()
        expected = problem.run(plan)
        twin = copy.deepcopy(plan) if how == "deepcopy" else pickle.loads(pickle.dumps(plan))
        for parameter in twin.parameters:
            parameter.mul_(2.0)
        twin.forward(*problem.inputs)
        twin.backward(problem.grad)
        kept = [plan.out, *problem.gradients.ordered()]
        for mine, before in zip(kept, [expected[0], *expected[2:]], strict=True):
            assert torch.equal(mine, before)
        assert not torch.equal(twin.out, plan.out)


@pytest.mark.parametrize("passes", PASSES)
def test_parameters_are_read_where_they_lie_at_every_pass(
    request: pytest.FixtureRequest, passes: str
) -> None:
    device, block = taking(passes, request)
    first, second = (Problem(ONLINE_AND_TARGET, torch.float32, GAP, device, seed) for seed in (0, 1))
    with block:
        expected = second.run()
        plan = first.plan()
        first.run(plan)
        first.flat.copy_(second.flat)
        first.inputs, first.grad = second.inputs, second.grad
        for mine, other in zip(first.run(plan), expected, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("passes", PASSES)
def test_tensors_that_turn_to_other_memory_leave_a_plan_where_it_was(
    request: pytest.FixtureRequest, passes: str
) -> None:
    device, block = taking(passes, request)
    problem = Problem(ONLINE_AND_TARGET, torch.float32, 0, device)
    parameters = problem.arrays.ordered()
    with block:
        plan = BroNetPlan(parameters, problem.size.rows, problem.gradients)
        before = plan.forward(*problem.inputs).clone()
        for parameter in parameters:
            parameter.data = torch.full_like(parameter, math.nan)
        assert torch.equal(plan.forward(*problem.inputs), before)


def test_a_float32_bias_of_a_bfloat16_head_is_read_at_every_pass_too() -> None:
    problem = Problem(ONLINE_AND_TARGET, torch.bfloat16)
    mixed = problem.arrays._replace(bias=problem.arrays.bias.float())
    plan = BroNetPlan(mixed.ordered(), problem.size.rows, problem.gradients)
    before = plan.forward(*problem.inputs).clone()
    mixed.bias.add_(8.0)
    after = plan.forward(*problem.inputs)
    torch.testing.assert_close(after - before, torch.full_like(before, 8.0), rtol=0.0, atol=0.1)


@pytest.mark.parametrize("passes", PASSES)
def test_a_second_call_overwrites_the_first_in_the_same_memory(
    request: pytest.FixtureRequest, passes: str
) -> None:
    device, block = taking(passes, request)
    problem = Problem(ONLINE_AND_TARGET, torch.float32, GAP, device)
    with block:
        plan = problem.plan()
        first = problem.run(plan)
        place, kept = plan.out.data_ptr(), [x.clone() for x in problem.inputs]
        for x in problem.inputs:
            x.mul_(-3.0)
        seen = plan.forward(*problem.inputs)
        assert seen.data_ptr() == place
        plan.backward(torch.ones_like(problem.grad))
        assert not torch.equal(seen, first[0])
        for x, was in zip(problem.inputs, kept, strict=True):
            x.copy_(was)
        for mine, other in zip(problem.run(plan), first, strict=True):
            assert torch.equal(mine, other)  # nothing is added up over calls


@pytest.mark.parametrize("passes", PASSES)
def test_the_inputs_gradient_is_made_only_where_it_is_wanted(
    request: pytest.FixtureRequest, passes: str
) -> None:
    device, block = taking(passes, request)
    problem = Problem(ONLINE_AND_TARGET, torch.float32, GAP, device)
    with block:
        _, dx, *expected = problem.run()
        problem.gradients_flat.fill_(GUARD)
        plan = problem.plan()
        plan.forward(*problem.inputs)
        assert plan.backward(problem.grad) is None
        for mine, other in zip(problem.gradients.ordered(), expected, strict=True):
            assert torch.equal(mine, other)
        plan.forward(*problem.inputs)
        part = plan.backward(problem.grad, slice(3, 8))
        assert part is not None
        assert part.shape == (problem.size.trained, problem.size.rows, 5)
        torch.testing.assert_close(part.sum(0), dx[:, 3:8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_frozen_plan_in_anothers_memory_gives_its_input_the_gradient(
    poisoned: None, request: pytest.FixtureRequest, passes: str, recompute: bool
) -> None:
    """The actor's pass through the online critics: fewer networks, one input, and no gradients of its own."""
    device, block = taking(passes, request)
    problem = Problem(ONLINE_AND_TARGET, torch.float32, GAP, device)
    online, rows = problem.size.networks // 2, problem.size.rows
    parameters = [p[:online] for p in problem.arrays.ordered()]
    grad = torch.randn(online, rows, problem.size.outputs, device=device)
    x = problem.inputs[1]
    leaf = x.double().requires_grad_()
    exact = reference.bronet(leaf, *(p.double() for p in parameters))
    dx = torch.autograd.grad(exact, leaf, grad.double())[0]
    with block:
        whole = problem.plan(recompute=recompute)
        frozen = BroNetPlan(parameters, rows, share=whole)
        assert memory_of(frozen.memory, {}).keys() == memory_of(whole.memory, {}).keys()
        expected = problem.run(whole)
        before = problem.gradients_flat.clone(), problem.flat.clone(), whole.out.clone()
        for _ in range(2):  # turn by turn, as in an update
            torch.testing.assert_close(frozen.forward(x), exact.detach().float(), rtol=1e-4, atol=1e-4)
            mine = frozen.backward(grad, slice(None))
            assert mine is not None
            torch.testing.assert_close(mine.sum(0), dx.float(), rtol=1e-4, atol=1e-4)
            now = problem.gradients_flat, problem.flat, whole.out
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
            for mine, other in zip(problem.run(whole), expected, strict=True):
                assert torch.equal(mine, other)


def memory_of(thing: object, found: dict[int, Tensor]) -> dict[int, Tensor]:
    """Every tensor that can be reached, one for each piece of memory."""
    if isinstance(thing, Tensor):
        found[thing.untyped_storage().data_ptr()] = thing
    elif isinstance(thing, dict):
        for value in thing.values():
            memory_of(value, found)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            memory_of(value, found)
    elif type(thing).__module__.startswith("brc_fast.kernels"):
        memory_of(vars(thing), found)
    return found


def owned(plan: BroNetPlan, *others: object) -> int:
    """Bytes of the memory that a plan holds and the others do not."""
    found = memory_of(plan, {})
    for pointer in memory_of(others, {}):
        found.pop(pointer, None)
    return sum(x.untyped_storage().nbytes() for x in found.values())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_bytes_of_a_plan_are_those_that_it_holds_after_its_passes(
    size: Size, dtype: torch.dtype, recompute: bool
) -> None:
    problem = Problem(size, dtype)
    given = (problem.flat, problem.gradients_flat, problem.inputs, problem.grad)
    plan = problem.plan(recompute=recompute)
    problem.run(plan)
    assert owned(plan, given) == plan.bytes("cpu")
    part = [p[: size.trained] for p in problem.arrays.ordered()]
    frozen = BroNetPlan(part, size.rows, share=plan, trained_rows=size.trained_rows)
    alone = BroNetPlan(part, size.rows, trained_rows=size.trained_rows)
    for one in (frozen, alone):
        one.forward(problem.inputs[0])
        one.backward(problem.grad, slice(None))
        assert owned(one, given, plan) == one.bytes("cpu")
    assert frozen.bytes("cpu") < alone.bytes("cpu")
    shapes = [p.to("meta") for p in problem.arrays.ordered()]
    meta = BroNetPlan(
        shapes, size.rows, problem.gradients, recompute=recompute, trained_rows=size.trained_rows
    )
    assert meta.bytes("cpu") == plan.bytes("cpu")


def test_recomputing_takes_less_memory_and_gives_the_same_bits() -> None:
    """Per layer of three blocks 2 buffers of [N, B, H], or 4 + blocks of them in all."""
    problem = Problem(Size(2, 2, 64, 8, 32, 3, 5, 1), torch.float32)
    kept, recomputed = problem.plan(), problem.plan(recompute=True)
    for mine, expected in zip(problem.run(recomputed), problem.run(kept), strict=True):
        assert torch.equal(mine, expected)
    buffer = 4 * 2 * 64 * 32
    assert kept.bytes("cpu") - recomputed.bytes("cpu") == (14 - 7) * buffer


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_bytes_of_a_plan_on_a_gpu_are_those_that_it_holds_but_for_partial_sums(
    kernel_device: str, size: Size, recompute: bool
) -> None:
    problem = Problem(size, torch.float32, GAP, kernel_device)
    given = (problem.flat, problem.gradients_flat, problem.inputs, problem.grad)
    with kernels.use("triton"):
        plan = problem.plan(recompute=recompute)
        problem.run(plan)
        sums = next(iter(plan._backward.values())).partials
    assert sums is not None
    assert owned(plan, given) - sums.untyped_storage().nbytes() == plan.bytes("cuda")


def test_what_would_silently_be_wrong_is_refused() -> None:
    """Vectors that the compiled passes would misread, other numbers of rows, gradients of several inputs."""
    problem = Problem(ONLINE_AND_TARGET, torch.float32)
    parameters = problem.arrays.ordered()
    for place, wrong in (
        (5, torch.zeros(4, 40)[:, :33]),  # the bias of layer 1, another distance apart than its weight
        (7, torch.zeros(4, 66)[:, ::2]),
    ):
        changed = [*parameters[:place], wrong, *parameters[place + 1 :]]
        with pytest.raises(ValueError, match="vectors of layer 1 must have the same strides"):
            BroNetPlan(changed, problem.size.rows)
    plan = problem.plan()
    with pytest.raises(ValueError, match="inputs must have B = 9 rows, got 20"):
        plan.forward(*(torch.zeros(20, problem.size.inputs) for _ in range(2)))
    every = BroNetPlan(parameters, problem.size.rows)
    every.forward(*problem.inputs)
    with pytest.raises(ValueError, match="networks with gradients must all take the first input"):
        every.backward(torch.zeros(4, problem.size.rows, problem.size.outputs), slice(None))
    for rows in (0, 10):
        with pytest.raises(ValueError, match=f"trained_rows must be from 1 to B = 9, got {rows}"):
            BroNetPlan(parameters, problem.size.rows, trained_rows=rows)
    with pytest.raises(ValueError, match="trained_rows must be B = 9 with N = 4 networks, got 4"):
        BroNetPlan(parameters, problem.size.rows, trained_rows=4)
    with pytest.raises(ValueError, match="inputs must have B = 9 rows, got 20"):
        plan.forward(problem.inputs[0], torch.zeros(20, problem.size.inputs))
    with pytest.raises(ValueError, match="inputs must share N = 4 networks equally, got 3"):
        plan.forward(*[problem.inputs[0]] * 3)
    with pytest.raises(RuntimeError, match="a backward pass needs a forward pass before it"):
        plan.backward(problem.grad)
    plan.forward(*problem.inputs)
    before = problem.gradients_flat.clone()
    for grad in (torch.zeros(2, 9, 7), torch.zeros(2, 8, 6), torch.zeros(2, 9, 1).expand(2, 9, 6)):
        with pytest.raises(
            ValueError, match=r"grad must have shape \[G, R, K\] = \[2, 9, 6\] and no gaps, got"
        ):
            plan.backward(grad)
    assert torch.equal(problem.gradients_flat, before)
    with pytest.raises(
        ValueError, match=r"share must have L = 5 layers, N >= 4 networks and B >= 10 rows, got"
    ):
        BroNetPlan(parameters, 10, share=plan)


@pytest.mark.parametrize("name", Arrays._fields)
def test_gradients_that_do_not_fit_are_refused(name: str) -> None:
    """The passes would write beyond them, or torch would put others in their place."""
    problem = Problem(ONLINE_AND_TARGET, torch.float32)
    parameters, gradients = problem.arrays.ordered(), problem.gradients
    shape = getattr(gradients, name).shape
    wrong = gradients._replace(**{name: torch.zeros(*shape[:-1], shape[-1] - 1)})
    with pytest.raises(ValueError, match=rf"gradients.{name} must have shape \[.*{shape[-1]}\], got \["):
        BroNetPlan(parameters, problem.size.rows, wrong)
    if name in ("vectors", "bias"):
        gaps = gradients._replace(**{name: torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2]})
        with pytest.raises(ValueError, match=rf"gradients.{name} must have strides \[.., 1\], got \["):
            BroNetPlan(parameters, problem.size.rows, gaps)
    if name == "head":
        more = arrays_in(torch.zeros(5, length(problem.size, 0)), problem.size, 0)
        with pytest.raises(ValueError, match="gradients must be of 1 to N = 4 networks, got 5"):
            BroNetPlan(parameters, problem.size.rows, more)
