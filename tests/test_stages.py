"""Stages and plans: the passes of a learner, against autograd through the twin."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from kernel_harness import assert_close_to_truth, bytes_beside, tensors_of
from stacks import ALL, BODIES, INPUTS, ODD, in_rows, parameters_of
from torch import Tensor

from brc_fast.kernels import Plan, Stage, network, passes_plain, reference, use
from brc_fast.kernels.network import bronet_stages
from brc_fast.kernels.runtime import native
from brc_fast.kernels.stages import check_stages, outputs_dtype, shapes_of

GUARD = 12345.0  # a number of every dtype here, or nearly: gaps must keep it
GAP = 5
KEPT_OR_NOT = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


class Size(NamedTuple):
    networks: int = 4
    trained: int = 2
    rows: int = 9
    inputs: int = INPUTS
    parts: int = 2
    last: int | None = None  # rows with gradients

    def __str__(self) -> str:
        return "-".join(map(str, self))


ONLINE_AND_TARGET = Size()
SIZES = [
    ONLINE_AND_TARGET,
    Size(2, 2, 17, 8, 1),  # one input for all
    Size(3, 1, 1, 1, 1),  # one row and one input; one of three is trained
    Size(2, 1, 70, 5, 2),
    Size(1, 1, 18, INPUTS, 1, last=9),  # the actor's: gradients of the second half of the rows
    Size(1, 1, 7, 4, 1, last=2),
]
# every body of every size, and other lists as online and target, as an actor, and with one row
CASES = [(name, size) for name in BODIES for size in SIZES]
CASES += [(name, size) for name in ODD for size in (SIZES[0], SIZES[4], Size(3, 1, 1, INPUTS, 1))]
EACH_CASE = pytest.mark.parametrize(("body", "size"), CASES, ids=[f"{n}-{s}" for n, s in CASES])


class Problem:
    """Networks in flat rows, inputs, and gradients of outputs: numbers that `dtype` holds exactly."""

    def __init__(
        self,
        stages: Sequence[Stage],
        size: Size = ONLINE_AND_TARGET,
        dtype: torch.dtype = torch.float32,
        gap: int = GAP,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.stages, self.size, self.dtype = tuple(stages), size, dtype
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)

        exact = parameters_of(stages, size.networks, size.inputs, rng)
        rows, self.views = in_rows(exact, gap, GUARD)
        self.flat = rows.to(device, dtype)
        self.parameters = self.views(self.flat)
        self.inputs = [normal(size.rows, size.inputs) for _ in range(size.parts)]
        self.grad = normal(size.trained, size.last or size.rows, stages[-1].outputs)
        self.flat_gradients = torch.full_like(self.flat[: size.trained], GUARD)
        self.gradients = self.views(self.flat_gradients)
        self.given = self.flat, self.flat_gradients, self.inputs, self.grad

    def plan(self, recompute: bool = False) -> Plan:
        rows = {"recompute": recompute, "trained_rows": self.size.last}
        return Plan(self.stages, self.parameters, self.size.rows, self.gradients, **rows)

    def run(self, plan: Plan | None = None) -> dict[str, Tensor]:
        """Outputs, dx and every gradient, copied."""
        plan = plan or self.plan()
        out = plan.forward(*self.inputs).clone()
        dx = plan.backward(self.grad, slice(None))
        assert dx is not None
        return {"out": out, "dx": dx.sum(0)} | {name: g.clone() for name, g in self.gradients.items()}

    def twin(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same by autograd through the twin, in `dtype`, on the CPU."""
        share, trained = self.size.networks // self.size.parts, self.size.trained
        leaves = {name: p.cpu().to(dtype).requires_grad_() for name, p in self.parameters.items()}
        inputs = [x.cpu().to(dtype).requires_grad_() for x in self.inputs]
        parts = []
        for part, x in enumerate(inputs):
            own = {name: p[part * share : (part + 1) * share] for name, p in leaves.items()}
            parts.append(reference.network(x, self.stages, own))
        out, rows = torch.cat(parts), self.grad.shape[1]
        learned, seed = out[:trained, -rows:], self.grad.cpu().to(dtype)
        dx, *grads = torch.autograd.grad(learned, [inputs[0], *leaves.values()], seed)
        found = {name: grad[:trained] for name, grad in zip(leaves, grads, strict=True)}
        return {"out": out.detach(), "dx": dx[-rows:]} | found

    def check(self, results: dict[str, Tensor]) -> None:
        exact, plain = self.twin(torch.float64), self.twin(self.dtype)
        if self.dtype == torch.bfloat16:
            self._check_low(results, exact, plain)
            return
        for name, mine in results.items():
            assert_close_to_truth(mine, exact[name], plain[name], told=name)
            if self.dtype == torch.float64:
                torch.testing.assert_close(mine.cpu(), exact[name], rtol=1e-11, atol=1e-11, msg=name)

    def _check_low(
        self, results: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor]
    ) -> None:
        """Within twice the largest relative error that the twin makes of anything: of a few rounded numbers
        each, the twin's own errors are too much a matter of chance."""

        def error(x: Tensor, truth: Tensor) -> float:
            return ((x.cpu().double() - truth).norm() / truth.norm().clamp_min(1e-3)).item()

        worst = max(error(plain[name], truth) for name, truth in exact.items())
        assert worst < 0.1
        wide = results["out"].dtype
        assert wide == outputs_dtype(self.parameters[f"{self.stages[-1].name}.kernel"])
        for name, mine in results.items():
            assert mine.dtype in ((wide, self.dtype) if name in ("out", "dx") else (self.dtype,)), name
            assert error(mine, exact[name]) <= 2.0 * worst, name

    def check_gaps(self) -> None:
        """What lies between the arrays, in parameters and gradients, is what it was; the rest is not."""
        for flat in (self.flat, self.flat_gradients):
            inside = torch.zeros(flat.shape, device=flat.device)
            for array in self.views(inside).values():
                array.fill_(1.0)
            guard = torch.tensor(GUARD).to(flat)
            assert (flat[inside == 0] == guard).all()
            assert not (flat[inside == 1] == guard).any()


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the bit."""
    assert list(results) == list(expected)
    for name, mine in results.items():
        assert torch.equal(mine, expected[name]), name


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a run; small products only wait for more of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is NaN until something is written there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def taking(passes: str, request: pytest.FixtureRequest) -> tuple[str, AbstractContextManager[object]]:
    """The device, and a block in which these passes run."""
    if passes == "triton":
        return request.getfixturevalue("kernel_device"), use("triton")
    if passes == "plain":
        return "cpu", use("reference")
    if native.compiled is None:
        pytest.skip("the compiled passes are not built")
    return "cpu", nullcontext()


TRITON = pytest.param("triton", marks=pytest.mark.gpu)
EVERY_KIND = pytest.mark.parametrize("passes", ["plain", "compiled", TRITON])
EACH_BODY = pytest.mark.parametrize("body", BODIES)


@pytest.mark.parametrize(
    ("dtype", "gap"),
    [(torch.float64, 0), (torch.float64, GAP), (torch.float32, GAP), (torch.bfloat16, GAP)],
    ids=str,
)
@EACH_CASE
@KEPT_OR_NOT
def test_values_and_every_gradient_are_those_of_autograd(
    body: str, size: Size, dtype: torch.dtype, gap: int, recompute: bool
) -> None:
    problem = Problem(ALL[body], size, dtype, gap)
    problem.check(problem.run(problem.plan(recompute)))
    problem.check_gaps()


@EACH_CASE
@EVERY_KIND
@KEPT_OR_NOT
def test_every_kind_of_pass_gives_the_values_of_the_others(
    request: pytest.FixtureRequest, passes: str, body: str, size: Size, recompute: bool
) -> None:
    device, block = taking(passes, request)
    problem = Problem(ALL[body], size, device=device)
    with block:
        results = problem.run(problem.plan(recompute))
    problem.check(results)
    problem.check_gaps()
    with use("reference"):
        expected = Problem(ALL[body], size, gap=0).run()
    for name, mine in results.items():
        torch.testing.assert_close(mine.cpu(), expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("passes", ["compiled", TRITON])
def test_the_fast_passes_are_those_that_run(request: pytest.FixtureRequest, passes: str) -> None:
    """Plain operations would give the same: one call of torch's LayerNorm tells them."""
    device, block = taking(passes, request)
    problem = Problem(ALL["bronet"], device=device)
    with torch.profiler.profile() as seen, block:
        problem.run()
    assert not any("layer_norm" in event.name for event in seen.events())
    with torch.profiler.profile() as seen, use("reference"):
        Problem(ALL["bronet"]).run()
    assert any("layer_norm" in event.name for event in seen.events())


@pytest.mark.gpu
@pytest.mark.parametrize("body", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_kernels_follow_the_twin_in_other_dtypes(kernel_device: str, body: str, dtype: torch.dtype) -> None:
    for size in (ONLINE_AND_TARGET, ONLINE_AND_TARGET._replace(networks=2, parts=1)):
        problem = Problem(ALL[body], size, dtype, device=kernel_device)
        with use("triton"):
            problem.check(problem.run())
        problem.check_gaps()


@pytest.mark.gpu
@pytest.mark.parametrize("lying", ["as one", "in rows", "anyhow"])
def test_kernels_gradients_of_equal_stages_are_one_product_where_they_lie_alike(
    kernel_device: str, lying: str
) -> None:
    """Of the four square kernels of two networks; one for each network where they lie in its row."""
    problem = Problem(ALL["bronet"], Size(2, 2, 32, INPUTS, 1), device=kernel_device)
    square = [name for name, p in problem.parameters.items() if p.shape[1:] == (33, 33)]
    assert len(square) == 4
    if lying == "as one":
        whole = torch.empty(len(square), *problem.gradients[square[0]].shape, device=kernel_device)
        problem.gradients |= dict(zip(square, whole.unbind(), strict=True))
    elif lying == "anyhow":
        problem.gradients |= {name: torch.empty_like(problem.gradients[name]) for name in square}
    with use("triton"):
        plan = problem.plan()
        plan.forward(*problem.inputs)
        plan.backward(problem.grad)
        with torch.profiler.profile() as seen:
            results = problem.run(plan)
    problem.check(results)
    products = sum(event.name == "aten::bmm" for event in seen.events())
    # forward but for the head's bias; backward but for the sums with a residual's gradient; two kernels alone
    assert products == 5 + 4 + 2 + {"as one": 1, "in rows": 2, "anyhow": 4}[lying]


@EACH_BODY
@pytest.mark.parametrize("passes", ["plain", TRITON])
def test_float32_vectors_serve_bfloat16_products(
    request: pytest.FixtureRequest, passes: str, body: str
) -> None:
    """As a learner in bfloat16 has them: vectors of the master, all else and all gradients in bfloat16."""
    device, block = taking(passes, request)
    problem = Problem(ALL[body], dtype=torch.bfloat16, device=device)
    mixed = {name: p.float() if p.dim() == 2 else p for name, p in problem.parameters.items()}
    with block:
        problem.check(problem.run(Plan(problem.stages, mixed, problem.size.rows, problem.gradients)))


@EACH_BODY
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("whose", ["parameters", "gradients"])
def test_vectors_of_another_dtype_do_not_reach_the_compiled_passes(
    kind: torch.dtype, whose: str, body: str
) -> None:
    """These would take their bytes for float32, and write as many."""
    problem = Problem(ALL[body])
    expected = problem.run()
    sides = {"parameters": dict(problem.parameters), "gradients": dict(problem.gradients)}
    sides[whose] |= {name: p.to(kind) for name, p in sides[whose].items() if p.dim() == 2}
    plan = Plan(problem.stages, sides["parameters"], problem.size.rows, sides["gradients"])
    out = plan.forward(*problem.inputs).clone()
    plan.backward(problem.grad)
    tolerance = {"rtol": 0.05, "atol": 0.2} if kind == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(out, expected["out"], **tolerance)
    for name, mine in sides["gradients"].items():
        torch.testing.assert_close(mine.float(), expected[name], **tolerance, msg=name)


@EVERY_KIND
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_works_in_memory_of_its_own(request: pytest.FixtureRequest, passes: str, how: str) -> None:
    device, block = taking(passes, request)
    problem = Problem(ALL["bronet"], device=device)
    with block:
        plan = problem.plan()
        expected = problem.run(plan)
        twin = copy.deepcopy(plan) if how == "deepcopy" else pickle.loads(pickle.dumps(plan))
        for parameter in twin.parameters.values():
            parameter.mul_(2.0)
        twin.forward(*problem.inputs)
        twin.backward(problem.grad)
        kept = {"out": plan.out, "dx": expected["dx"], **problem.gradients}
        assert_same(kept, expected)
        assert not torch.equal(twin.out, plan.out)


@EVERY_KIND
@EACH_BODY
def test_parameters_are_read_where_they_lie_at_every_pass(
    request: pytest.FixtureRequest, passes: str, body: str
) -> None:
    device, block = taking(passes, request)
    first, second = (Problem(ALL[body], device=device, seed=seed) for seed in (0, 1))
    with block:
        expected = second.run()
        plan = first.plan()
        first.run(plan)
        first.flat.copy_(second.flat)
        first.inputs, first.grad = second.inputs, second.grad
        assert_same(first.run(plan), expected)


@EVERY_KIND
def test_tensors_that_turn_to_other_memory_leave_a_plan_where_it_was(
    request: pytest.FixtureRequest, passes: str
) -> None:
    device, block = taking(passes, request)
    problem = Problem(ALL["bronet"], device=device)
    with block:
        plan = problem.plan()
        before = plan.forward(*problem.inputs).clone()
        for parameter in problem.parameters.values():
            parameter.data = torch.full_like(parameter, math.nan)
        assert torch.equal(plan.forward(*problem.inputs), before)


def test_a_float32_bias_of_a_bfloat16_head_is_read_at_every_pass_too() -> None:
    problem = Problem(ALL["bronet"], dtype=torch.bfloat16)
    mixed = problem.parameters | {"head.bias": problem.parameters["head.bias"].float()}
    plan = Plan(problem.stages, mixed, problem.size.rows, problem.gradients)
    before = plan.forward(*problem.inputs).clone()
    mixed["head.bias"].add_(8.0)
    after = plan.forward(*problem.inputs)
    torch.testing.assert_close(after - before, torch.full_like(before, 8.0), rtol=0.0, atol=0.1)


@EVERY_KIND
@pytest.mark.parametrize("body", ALL)
def test_a_second_call_overwrites_the_first_in_the_same_memory(
    request: pytest.FixtureRequest, passes: str, body: str
) -> None:
    device, block = taking(passes, request)
    problem = Problem(ALL[body], device=device)
    with block:
        plan = problem.plan()
        first = problem.run(plan)
        place, kept = plan.out.data_ptr(), problem.inputs
        problem.inputs = [-3.0 * x for x in kept]
        seen = plan.forward(*problem.inputs)
        assert seen.data_ptr() == place
        plan.backward(torch.ones_like(problem.grad), slice(None))
        assert not torch.equal(seen, first["out"])
        problem.inputs = kept
        assert_same(problem.run(plan), first)  # nothing is added up over calls


@EVERY_KIND
@pytest.mark.parametrize("body", ALL)
def test_the_inputs_gradient_is_made_only_where_it_is_wanted(
    request: pytest.FixtureRequest, passes: str, body: str
) -> None:
    device, block = taking(passes, request)
    problem = Problem(ALL[body], device=device)
    with block:
        expected = problem.run()
        problem.flat_gradients.fill_(GUARD)
        plan = problem.plan()
        plan.forward(*problem.inputs)
        assert plan.backward(problem.grad) is None
        assert_same({"out": plan.out, "dx": expected["dx"], **problem.gradients}, expected)
        plan.forward(*problem.inputs)
        part = plan.backward(problem.grad, slice(3, 8))
        assert part is not None
        assert part.shape == (problem.size.trained, problem.size.rows, 5)
        torch.testing.assert_close(part.sum(0), expected["dx"][:, 3:8], rtol=1e-5, atol=1e-5)


@EVERY_KIND
@pytest.mark.parametrize("body", ALL)
@KEPT_OR_NOT
def test_a_frozen_plan_in_anothers_memory_gives_its_input_the_gradient(
    request: pytest.FixtureRequest, passes: str, body: str, recompute: bool
) -> None:
    """The actor's pass through the online critics: fewer networks, one input, and no gradients of its own."""
    device, block = taking(passes, request)
    problem = Problem(ALL[body], device=device)
    online, rows = problem.size.networks // 2, problem.size.rows
    parameters = {name: p[:online] for name, p in problem.parameters.items()}
    grad = torch.randn(online, rows, problem.stages[-1].outputs, device=device)
    x = problem.inputs[1]
    leaf = x.double().requires_grad_()
    exact = reference.network(leaf, problem.stages, {name: p.double() for name, p in parameters.items()})
    dx = torch.autograd.grad(exact, leaf, grad.double())[0]
    with block:
        whole = problem.plan(recompute)
        frozen = Plan(problem.stages, parameters, rows, share=whole)
        expected = problem.run(whole)
        before = problem.flat_gradients.clone(), problem.flat.clone(), whole.out.clone()
        for _ in range(2):  # turn by turn, as in an update
            torch.testing.assert_close(frozen.forward(x), exact.detach().float(), rtol=1e-4, atol=1e-4)
            mine = frozen.backward(grad, slice(None))
            assert mine is not None
            torch.testing.assert_close(mine.sum(0), dx.float(), rtol=1e-4, atol=1e-4)
            now = problem.flat_gradients, problem.flat, whole.out
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
            assert_same(problem.run(whole), expected)


def zeros(problem: Problem) -> int:
    """Bytes at most of vectors that stand for a bias that is not there, and for its gradient."""
    return 5 * 4 * sum(stage.outputs for stage in problem.stages if stage.after == "layer_norm")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@EACH_CASE
@KEPT_OR_NOT
def test_the_bytes_of_a_plan_are_those_that_it_holds_after_its_passes(
    body: str, size: Size, dtype: torch.dtype, recompute: bool
) -> None:
    problem = Problem(ALL[body], size, dtype)
    plan, stages = problem.plan(recompute), problem.stages
    problem.run(plan)
    assert 0 <= bytes_beside(plan, problem.given) - plan.bytes("cpu") <= zeros(problem)
    part = {name: p[: size.trained] for name, p in problem.parameters.items()}
    frozen = Plan(stages, part, size.rows, share=plan, trained_rows=size.last)
    alone = Plan(stages, part, size.rows, trained_rows=size.last)
    for one in (frozen, alone):
        one.forward(problem.inputs[0])
        one.backward(problem.grad, slice(None))
        assert 0 <= bytes_beside(one, problem.given, plan) - one.bytes("cpu") <= zeros(problem)
    assert frozen.bytes("cpu") < alone.bytes("cpu") or len(stages) == 1
    shapes = {name: p.to("meta") for name, p in problem.parameters.items()}
    rows = {"recompute": recompute, "trained_rows": size.last}
    assert Plan(stages, shapes, size.rows, problem.gradients, **rows).bytes("cpu") == plan.bytes("cpu")


@pytest.mark.parametrize("body", ALL)
def test_recomputing_gives_the_same_bits(body: str) -> None:
    problem = Problem(ALL[body])
    assert_same(problem.run(problem.plan(recompute=True)), problem.run())


def test_recomputing_takes_less_memory() -> None:
    """Per layer of three blocks 2 buffers of [N, B, H], or 4 + blocks of them in all."""
    problem = Problem(bronet_stages(32, 3, 5), Size(2, 2, 64, 8, 1))
    buffer = 4 * 2 * 64 * 32
    assert problem.plan().bytes("cpu") - problem.plan(recompute=True).bytes("cpu") == (14 - 7) * buffer


@pytest.mark.gpu
@EACH_CASE
@KEPT_OR_NOT
def test_the_bytes_of_a_plan_on_a_gpu_are_those_that_it_holds_but_for_partial_sums(
    kernel_device: str, body: str, size: Size, recompute: bool
) -> None:
    problem = Problem(ALL[body], size, device=kernel_device)
    with use("triton"):
        plan = problem.plan(recompute)
        problem.run(plan)
    sums = [x for x in tensors_of(plan) if x.dim() == 5]  # [L, S, 3, N, H]
    assert 0 <= bytes_beside(plan, problem.given, sums) - plan.bytes("cuda") <= zeros(problem)


def replaced(stages: Sequence[Stage], number: int, **changes: Any) -> tuple[Stage, ...]:
    """With other settings of the stage that leaves this value."""
    stages = list(stages)
    stages[number - 1] = stages[number - 1]._replace(**changes)
    return tuple(stages)


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ((), "at least one stage"),
        (replaced(BODIES["bronet"], 2, reads=2), "'blocks.0.0' reads value 2, which does not exist yet"),
        (replaced(BODIES["bronet"], 2, reads=-1), "reads value -1, which does not exist"),
        (replaced(BODIES["bronet"], 3, adds=3), "'blocks.0.1' adds value 3, which does not exist yet"),
        (replaced(BODIES["bronet"], 3, name="input"), "'input' has the name of an earlier stage"),
        (replaced(BODIES["bronet"], 3, name="a,b"), "must be named as a module"),
        (replaced(BODIES["bronet"], 3, name="a..b"), "must be named as a module"),
        (replaced(BODIES["bronet"], 3, outputs=0), "at least one output, got 0"),
        (
            replaced(BODIES["bronet"], 3, after="batch_norm"),
            "one of norm, layer_norm, bias, got 'batch_norm'",
        ),
        (replaced(BODIES["bronet"], 3, relu=True), "'blocks.0.1' has relu and adds"),
        (replaced(BODIES["bronet"], 3, outputs=32), "adds value 1 as it is, which must be 32 wide, got 33"),
        (
            replaced(BODIES["simba"], 2, outputs=8),
            "'blocks.0.norm' reads value 1 as it is, .* 8 wide, got 9",
        ),
        (replaced(BODIES["simba"], 2, after="bias"), "neither a product nor a norm"),
        (replaced(BODIES["mlp"], 3, reads=1), "value 2, of stage 'layers.1', is read by no stage"),
        (replaced(BODIES["mlp"], 4, reads=2), "value 3, of stage 'layers.2', is read by no stage"),
        (BODIES["simba"][:-1], "'norm', must be a head"),
        (replaced(BODIES["mlp"], 4, relu=True), "'head', must be a head"),
        (replaced(BODIES["mlp"], 4, after="norm"), "'head', must be a head"),
        (
            replaced(ODD["input added, by a bias and by a norm"], 2, outputs=9),
            "adds value 0 as it is, which must be 9 wide, got 11",
        ),
    ],
)
def test_a_list_that_is_no_network_is_refused_by_the_stage(stages: tuple[Stage, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_stages(stages)
    with pytest.raises(ValueError, match=told):
        Plan(stages, {}, 1)


def test_the_parts_of_a_name_are_modules_and_no_parameter_of_another() -> None:
    """`a` and `a.kernel` would both want the name a.kernel."""
    for name in ("input.kernel", "input.bias", "input"):
        with pytest.raises(ValueError, match=rf"'{name}' "):
            check_stages(replaced(BODIES["bronet"], 2, name=name))


@pytest.mark.parametrize("body", ["norm of the input", "input added, by a bias and by a norm"])
def test_an_input_that_is_normed_or_added_has_the_width_of_that_stage(body: str) -> None:
    """Passes trust it: they would read beyond a narrower one."""
    with pytest.raises(ValueError, match=r"value 0, the input, must be 11 wide, .* got 5"):
        shapes_of(ALL[body], 5)
    shapes = {name: (4, *shape) for name, shape in shapes_of(ALL[body], INPUTS).items()}
    if "first.kernel" in shapes:
        shapes["first.kernel"] = (4, 1, INPUTS)
        with pytest.raises(ValueError, match=r"value 0, the input, must be 11 wide, .* got 1"):
            Plan(ALL[body], {name: torch.zeros(shape) for name, shape in shapes.items()}, 9)


def test_inputs_that_do_not_fit_are_refused() -> None:
    for body in ("bronet", "norm of the input"):
        problem = Problem(ALL[body])
        plan = problem.plan()
        x = problem.inputs[0]
        for wrong in (
            torch.zeros(20, INPUTS),
            torch.zeros(9, 1),
            torch.zeros(9, 12),
            torch.zeros(4, 9, INPUTS),
        ):
            with pytest.raises(
                ValueError, match=rf"inputs must have shape \[B, I\] = \[9, 11\], got \[{len(wrong)}"
            ):
                plan.forward(x, wrong)
        with pytest.raises(TypeError, match=r"inputs must be of torch.float32, got torch.float64"):
            plan.forward(x, x.double())
        for count in (0, 3):
            with pytest.raises(ValueError, match=f"inputs must share N = 4 networks equally, got {count}"):
                plan.forward(*[x] * count)


def test_what_would_silently_be_wrong_is_refused() -> None:
    """Vectors that the compiled passes would misread, other numbers of rows, gradients of several inputs."""
    problem = Problem(ALL["bronet"])
    stages, parameters, rows = problem.stages, problem.parameters, problem.size.rows
    for name, wrong in (
        ("blocks.0.0.bias", torch.zeros(4, 40)[:, :33]),  # another distance apart than its weight
        ("blocks.0.0.norm_bias", torch.zeros(4, 66)[:, ::2]),
    ):
        with pytest.raises(ValueError, match=r"vectors of blocks\.0\.0 must have the same strides"):
            Plan(stages, parameters | {name: wrong}, rows)
    every = Plan(stages, parameters, rows)
    every.forward(*problem.inputs)
    with pytest.raises(ValueError, match="networks with gradients must all take the first input"):
        every.backward(torch.zeros(4, rows, 6), slice(None))
    for wrong in (0, 10):
        with pytest.raises(ValueError, match=f"trained_rows must be from 1 to B = 9, got {wrong}"):
            Plan(stages, parameters, rows, trained_rows=wrong)
    with pytest.raises(ValueError, match="trained_rows must be B = 9 with N = 4 networks, got 4"):
        Plan(stages, parameters, rows, trained_rows=4)
    plan = problem.plan()
    with pytest.raises(RuntimeError, match="a backward pass needs a forward pass before it"):
        plan.backward(problem.grad)
    plan.forward(*problem.inputs)
    before = problem.flat_gradients.clone()
    for grad in (torch.zeros(2, 9, 7), torch.zeros(2, 8, 6), torch.zeros(2, 9, 1).expand(2, 9, 6)):
        with pytest.raises(ValueError, match=r"grad must have shape .* = \[2, 9, 6\] and no gaps, got"):
            plan.backward(grad)
    assert torch.equal(problem.flat_gradients, before)


def test_memory_of_a_plan_that_is_smaller_or_of_other_stages_is_refused() -> None:
    problem = Problem(ALL["bronet"])
    plan = problem.plan()
    few = {name: p[:2] for name, p in problem.parameters.items()}
    small, others = Plan(problem.stages, few, 9), Problem(ALL["mlp"])
    for stages, parameters, rows, share in (
        (problem.stages, problem.parameters, 10, plan),
        (problem.stages, problem.parameters, 9, small),
        (others.stages, others.parameters, 9, plan),
    ):
        with pytest.raises(
            ValueError, match=f"the same stages, .* N >= 4 networks and B >= {rows} rows, got"
        ):
            Plan(stages, parameters, rows, share=share)
    wider = Problem(ALL["mlp"], Size(inputs=5))
    double = {name: p.double() for name, p in others.parameters.items()}
    with pytest.raises(ValueError, match="share must have"):
        Plan(others.stages, double, 9, share=wider.plan())


NAMES = ["input.kernel", "blocks.0.0.kernel", "blocks.1.1.norm_weight", "head.kernel", "head.bias"]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_gradients_that_do_not_fit_are_refused_by_name(name: str) -> None:
    """The passes would write beyond them, or torch would put others in their place."""
    problem = Problem(ALL["bronet"])
    stages, parameters, rows = problem.stages, problem.parameters, problem.size.rows
    for whose, told in ((parameters, name), (problem.gradients, f"the gradient of {name}")):

        def made(changed: dict[str, Tensor], whose: dict[str, Tensor] = whose) -> Plan:
            if whose is parameters:
                return Plan(stages, changed, rows)
            return Plan(stages, parameters, rows, changed)

        count, *shape = whose[name].shape
        another = count + (name != "input.kernel")  # networks: as many as the first has
        for wrong in ((count, *shape[:-1], shape[-1] - 1), (another, *shape, 1), tuple(shape), (3,)):
            with pytest.raises(ValueError, match=rf"{told} must have shape \[N, .*\], got \["):
                made(whose | {name: torch.zeros(wrong)})
        with pytest.raises(ValueError, match=f"{told} is missing"):
            made({key: p for key, p in whose.items() if key != name})
        with pytest.raises(ValueError, match=r"other\.kernel is no parameter of these stages"):
            made(whose | {"other.kernel": whose[name]})
        if len(shape) == 1:
            with pytest.raises(ValueError, match=f"vectors of {name.rpartition('.')[0]} must have the same"):
                made(whose | {name: torch.zeros(count, 2 * shape[0])[:, ::2]})
    more = Problem(ALL["bronet"], Size(networks=5, trained=5, parts=1)).gradients
    with pytest.raises(ValueError, match="gradients must be of 1 to N = 4 networks, got 5"):
        Plan(stages, parameters, rows, more)
    narrow = Problem(ALL["bronet"], Size(inputs=7)).gradients
    with pytest.raises(ValueError, match=r"the gradient of input.kernel must have shape .* 11, 33\], got"):
        Plan(stages, parameters, rows, narrow)


class Doubled(passes_plain.Bias):
    """Twice the product plus bias: a pass that this package does not have."""

    def forward(self, held: Any) -> Any:
        return lambda: held.out.mul_(2.0)

    def writes(self, relu: bool) -> bool:
        return True

    def formula(self, product: Tensor, vectors: Any) -> Tensor:
        return 2.0 * (product + vectors[0].unsqueeze(1))

    def backward(self, held: Any, dout: Tensor, dproduct: Tensor, into: Any, pieces: Any) -> Any:
        def call() -> None:
            torch.mul(dout, 2.0, out=dproduct)
            if into is not None:
                torch.sum(dproduct, 1, out=into[0])

        return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_pass_that_is_added_runs_beside_those_that_were_loaded(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """As an op too, whose gradients are those of the pass's formula."""
    stages = (Stage("a", 8, 0, "doubled"), Stage("b", 8, 1, "norm", relu=True), Stage("head", 3, 2))
    before = bronet_stages(8, 1, 3)
    x = torch.randn(7, 5, dtype=dtype)
    network(x, before, {n: torch.rand(2, *s, dtype=dtype) for n, s in shapes_of(before, 5).items()})
    monkeypatch.setitem(passes_plain.PASSES, "doubled", Doubled())
    leaves = {n: torch.rand(2, *s, dtype=dtype).requires_grad_() for n, s in shapes_of(stages, 5).items()}
    gradients = {name: torch.full_like(p, math.nan) for name, p in leaves.items()}
    plan, seed = Plan(stages, leaves, 7, gradients), torch.randn(2, 7, 3, dtype=dtype)
    out = reference.network(x, stages, leaves)
    torch.testing.assert_close(plan.forward(x), out.detach())
    torch.testing.assert_close(network(x, stages, leaves), out)
    plan.backward(seed)
    expected = torch.autograd.grad(out, list(leaves.values()), seed)
    for mine, exact in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)
