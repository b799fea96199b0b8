"""The optimizer's step and the moving target against their twins, torch.optim and their definitions."""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from extras import needs
from kernel_harness import INTERPRETED, assert_close_to_truth, guarded, native_calls
from refusals import says
from torch import Tensor

from brc_fast.kernels import optimizer, reference
from brc_fast.kernels.runtime import dispatch, native
from brc_fast.kernels.runtime.tables import assume, trial
from brc_fast.kernels.tools import aot

NEEDS_TRITON = needs("triton")
PLAIN = pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in for the compiler")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
RULE: dict[str, Any] = {"learning_rate": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
MADE = ("param", "exp_avg", "exp_avg_sq", "step", "target", "low", "target_low", "gradient_norm")
State = dict[str, Tensor]


def kernel_adamw(*buffers: Tensor, **rule: Any) -> None:
    optimizer.adamw_(*buffers, **rule, impl="triton")


def small_blocks(kernel: str, block: int = 256, programs: int = 2) -> AbstractContextManager[None]:
    """At most this many programs per multiprocessor, of so many elements at a time."""
    return trial(kernel, {"BLOCK_P": block, "num_warps": 4, "PROGRAMS": programs})


def buffers(size: int, dtype: torch.dtype, device: str) -> State:
    """What a step changes, between guards of NaN; the same numbers in every dtype."""
    rng = torch.Generator().manual_seed(size)
    param, target = (torch.randn(size, generator=rng).to(dtype).to(device) for _ in range(2))
    state = {"param": param, "target": target, "step": torch.zeros((), device=device)}
    state |= {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
    return {name: guarded(x) if x.dim() else x for name, x in state.items()}


def assert_guards_stand(x: Tensor) -> None:
    """Nothing was written before or behind a tensor of `guarded`."""
    whole = x._base
    assert whole is not None
    assert whole[:128].isnan().all()
    assert whole[128 + x.numel() :].isnan().all()


def learn(
    op: Callable[..., None],
    size: int,
    dtype: torch.dtype,
    device: str,
    *,
    grad_dtype: torch.dtype | None = None,
    low: torch.dtype | None = None,
    scalars: str = "numbers",
    norm: bool = True,
    steps: int = 20,
    **rule: Any,
) -> State:
    """Everything that so many steps changed. The gradients have been rounded to `grad_dtype` for every op."""
    state = buffers(size, dtype, device)
    if not rule.pop("moves", True):
        del state["target"]
    if low is not None:
        empty = torch.full((size,), math.nan, dtype=low, device=device)
        state |= {name: guarded(empty) for name in ("low", "target_low")[: 1 + ("target" in state)]}
    if norm:
        state["gradient_norm"] = torch.full((), math.nan, dtype=dtype, device=device)
    rule = RULE | rule
    if scalars == "tensors":
        for name in rule.keys() & {"learning_rate", "tau", "max_norm"}:
            rule[name] = torch.tensor(rule[name], dtype=dtype, device=device)
    rng = torch.Generator().manual_seed(1)
    param, exp_avg, exp_avg_sq, step = (state[name] for name in MADE[:4])
    extras = {name: state[name] for name in MADE[4:] if name in state}
    for _ in range(steps):
        grad = torch.randn(size, generator=rng).to(grad_dtype or dtype)
        grad = guarded((grad if op is kernel_adamw else grad.to(dtype)).to(device))
        before = grad.clone()
        op(param, grad, exp_avg, exp_avg_sq, step, **rule, **extras)
        assert torch.equal(grad, before), "the gradient was changed"
    for name, x in state.items():
        if x.dim():
            assert_guards_stand(x)
        assert x.isfinite().all(), name
    return state


def assert_follows_twin(mine: State, dtype: torch.dtype, through: torch.dtype, **case: Any) -> None:
    """As near to the twin in float64 as the twin in `dtype`; copies are rounded from `through`."""
    exact, plain = (learn(reference.adamw_, dtype=kind, device="cpu", **case) for kind in (F64, dtype))
    assert mine.keys() == exact.keys()
    for part in mine.keys() - {"low", "target_low"}:
        assert_close_to_truth(mine[part], exact[part], plain[part], part)
    for copy, of in (("low", "param"), ("target_low", "target")):
        if copy in mine:
            assert torch.equal(mine[copy], mine[of].to(through).to(mine[copy].dtype)), copy


CASES: dict[str, dict[str, Any]] = {
    # a temperature: one parameter, one program, nothing else wanted
    "alone": {"size": 1, "moves": False, "norm": False},
    "alone, everything": {"size": 7, "grad_dtype": BF16, "low": BF16},
    "alone, copy but no target": {"size": 255, "low": F16, "moves": False, "tau": 0.5},
    # exactly the blocks of 256; one more than that; with at most 4 programs, that stride
    "four blocks": {"size": 1024, "low": BF16, "grad_dtype": BF16, "scalars": "tensors", "tau": 0.25},
    "one beyond": {"size": 1025, "norm": False, "weight_decay": 0.0},
    "striding": {"size": 4097, "grad_dtype": BF16, "low": BF16, "scalars": "tensors"},
    "clipped": {"size": 1025, "grad_dtype": BF16, "low": BF16, "max_norm": 2.0},
    "clipped by a tensor, alone": {"size": 37, "max_norm": 0.5, "scalars": "tensors", "norm": False},
    "below the limit": {"size": 1024, "max_norm": 1e3, "moves": False, "grad_dtype": F16},
    "a wide gradient": {"size": 600, "grad_dtype": F64, "max_norm": 3.0, "betas": (0.5, 0.99)},
    "no momentum": {"size": 19, "betas": (0.0, 0.0), "eps": 1e-3},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_of_the_kernels_follow_the_twin(
    kernel_device: str, name: str, dtype: torch.dtype
) -> None:
    with small_blocks("adamw"), small_blocks("squares", 512, 1):
        mine = learn(kernel_adamw, dtype=dtype, device=kernel_device, **CASES[name])
    assert_follows_twin(mine, dtype, F32, **CASES[name])
    assert mine["step"] == 20
    start = buffers(CASES[name]["size"], dtype, kernel_device)
    for part in mine.keys() & {"param", "target"}:
        assert (mine[part] != start[part]).float().mean() > 0.99, part


@pytest.mark.gpu
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_kernels_do_what_torch_does(kernel_device: str, max_norm: float | None, decay: float) -> None:
    rule = RULE | {"weight_decay": decay}
    state = buffers(600, F64, kernel_device)
    leaf = torch.nn.Parameter(state["param"].clone())
    make = torch.optim.AdamW if decay else torch.optim.Adam
    torchs = make([leaf], lr=rule["learning_rate"], betas=rule["betas"], eps=rule["eps"], weight_decay=decay)
    rng = torch.Generator().manual_seed(0)
    rule |= {"max_norm": max_norm, "gradient_norm": torch.zeros((), dtype=F64, device=kernel_device)}
    for _ in range(20):
        leaf.grad = torch.randn(600, generator=rng, dtype=F64).to(kernel_device)
        state_in_order = [state[name] for name in MADE[:4]]
        kernel_adamw(state_in_order[0], leaf.grad.clone(), *state_in_order[1:], **rule)
        theirs = torch.nn.utils.clip_grad_norm_([leaf], max_norm or math.inf)
        torch.testing.assert_close(rule["gradient_norm"], theirs, rtol=1e-12, atol=0)
        torchs.step()
    torch.testing.assert_close(state["param"], leaf.detach(), rtol=1e-11, atol=1e-12)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], torchs.state[leaf][name], rtol=1e-11, atol=1e-14)


def assert_bias_corrections(
    op: Callable[..., None], t: int, step: Tensor, dtype: torch.dtype, rel: float
) -> None:
    """The t-th step, from moments of 1 and with a gradient of 0."""
    rule = RULE | {"learning_rate": 1.0, "eps": 0.0, "weight_decay": 0.0}
    param, grad = (torch.zeros(1, dtype=dtype, device=step.device) for _ in range(2))
    op(param, grad, torch.ones_like(param), torch.ones_like(param), step.fill_(t - 1), **rule)
    mean, root = 0.9 / -math.expm1(t * math.log(0.9)), math.sqrt(0.999 / -math.expm1(t * math.log(0.999)))
    assert param.item() == pytest.approx(-mean / root, rel=rel), t
    assert step == t


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_bias_corrections_hold_at_every_step(kernel_device: str, dtype: torch.dtype) -> None:
    for t in (1, 2, 3, 9, 10, 30, 500, 1000, 1001, 3000, 10**5, 2**24 - 1):
        step = torch.zeros((), device=kernel_device)
        assert_bias_corrections(kernel_adamw, t, step, dtype, 1e-6 if dtype == F32 else 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("grad_dtype", [F32, BF16, F16, F64], ids=str)
def test_the_norm_is_that_of_the_gradient_as_it_came(
    kernel_device: str, grad_dtype: torch.dtype, clipped: bool
) -> None:
    for size, programs in (
        (1, 1),
        (300, 1),
        (2049, 1),
        (2049, 8),
    ):  # 8: more sums than one, and one block each
        state = buffers(size, F32, kernel_device)
        grad = (torch.randn(size) + 2.0).to(grad_dtype)
        norm = torch.full((), math.nan, dtype=F64, device=kernel_device)
        with small_blocks("adamw", 256, programs), small_blocks("squares", 256, programs):
            kernel_adamw(
                state["param"],
                guarded(grad.to(kernel_device)),
                *(state[name] for name in ("exp_avg", "exp_avg_sq", "step")),
                **RULE,
                gradient_norm=norm,
                max_norm=1.0 if clipped else None,
            )
        expected = torch.linalg.vector_norm(grad.double())
        torch.testing.assert_close(norm.cpu(), expected, rtol=4e-7 * math.log2(2 * size), atol=0)


@pytest.mark.gpu
def test_many_partial_sums_are_all_added(kernel_device: str) -> None:
    partial = torch.rand(5000, device=kernel_device)  # more than are added at a time
    norm, step = torch.zeros((), device=kernel_device), torch.zeros((), dtype=F64, device=kernel_device)
    dispatch.launch(optimizer._finish_kernel, (1,), step, norm, guarded(partial), 5000, BLOCK_N=4096)
    torch.testing.assert_close(norm.double(), partial.double().sum().sqrt(), rtol=1e-6, atol=0)
    assert step == 1


def every_exponent(dtype: torch.dtype) -> Tensor:
    """Numbers of every size, ties between neighbours and what float32 makes one, and NaN."""
    rng = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2000,), generator=rng, dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(-500, 500, dtype=torch.int32) << 16) + 0x3F808000
    near = 1.0 + torch.tensor([2.0**-8, 3 * 2.0**-8, 2.0**-11, 3 * 2.0**-11], dtype=F64)
    beside = torch.cat([near * (1.0 + 2.0**-40), near * (1.0 - 2.0**-40)])
    return torch.cat([torch.cat([bits, ties]).view(F32).to(dtype), beside.to(dtype)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("low_dtype", [BF16, F16], ids=str)
def test_copies_are_rounded_as_torch_rounds(
    kernel_device: str, dtype: torch.dtype, low_dtype: torch.dtype
) -> None:
    param = every_exponent(dtype).to(kernel_device)
    low = guarded(torch.zeros_like(param, dtype=low_dtype))
    target = guarded(torch.zeros_like(param))
    optimizer.ema_(target, param, 1.0, low=low, impl="triton")
    assert torch.equal(target.nan_to_num(0.5), param.nan_to_num(0.5))
    expected = param.to(low_dtype)
    assert torch.equal(low.isnan(), expected.isnan())
    assert torch.equal(low.nan_to_num(0.5), expected.nan_to_num(0.5))
    assert_guards_stand(low)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("size", [1, 256, 1025])  # alone; a block; more blocks than programs
def test_the_target_moves_by_tau(kernel_device: str, dtype: torch.dtype, size: int) -> None:
    state = buffers(size, dtype, "cpu")
    for tau in (0.0, 0.005, 0.5, 0.75, 1.0):
        results = []
        for op, kind, place in (
            (optimizer.ema_, dtype, kernel_device),
            (reference.ema_, F64, "cpu"),
            (reference.ema_, dtype, "cpu"),
        ):
            param, target = (guarded(state[name].to(kind).to(place)) for name in ("param", "target"))
            number: Any = tau if size > 1 else torch.tensor(tau, device=place)
            with small_blocks("ema", 256, 1):
                op(target, param, number, **({"impl": "triton"} if op is optimizer.ema_ else {}))
            assert torch.equal(param, state["param"].to(kind).to(place))
            assert_guards_stand(target)
            results.append(target)
        assert_close_to_truth(*results, told=str(tau))
        for place, name in ((0.0, "target"), (1.0, "param")):
            if tau == place:
                assert torch.equal(results[0].cpu(), state[name])


def test_the_twin_of_the_moving_target_is_its_definition() -> None:
    param, target = torch.randn(2, 9, dtype=F64)
    expected = target + 0.3 * (param - target)
    low = torch.empty(9, dtype=BF16)
    for op, tau in ((reference.ema_, 0.3), (optimizer.ema_, torch.tensor(0.3, dtype=F64))):
        mine = target.clone()
        op(mine, param, tau, low=low)
        torch.testing.assert_close(mine, expected)
        assert torch.equal(low, mine.to(BF16))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [100, 700])  # one program; several
def test_steps_are_counted_in_every_way_to_run(kernel_device: str, size: int) -> None:
    for dtype in (F32, F64):
        for extra in ({}, {"gradient_norm": torch.zeros((), device=kernel_device)}, {"max_norm": 1.0}):
            state = buffers(size, F32, kernel_device)
            param, exp_avg, exp_avg_sq, _ = (state[name] for name in MADE[:4])
            step = torch.zeros((), dtype=dtype, device=kernel_device)
            with small_blocks("adamw"), small_blocks("squares"):
                for count in (1, 2, 3):
                    kernel_adamw(param, torch.ones_like(param), exp_avg, exp_avg_sq, step, **RULE, **extra)
                    assert step == count
            # a constant gradient: the corrected moments are 1 and 1 only if the step was right each time
            expected = buffers(size, F32, kernel_device)["param"]
            for _ in range(3):
                expected = expected - RULE["learning_rate"] * (1.0 + RULE["weight_decay"] * expected)
            torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_no_parameters_are_a_step_too(kernel_device: str, max_norm: float | None) -> None:
    empty = torch.zeros(0, device=kernel_device)
    step, norm = torch.zeros((), device=kernel_device), torch.ones((), device=kernel_device)
    kernel_adamw(empty, empty, empty, empty, step, **RULE, max_norm=max_norm, gradient_norm=norm)
    assert step == 1
    assert norm == 0
    optimizer.ema_(empty, empty, 0.5, impl="triton")


def two_steps(
    op: Callable[..., None], device: str, grads: list[float], max_norm: float | None = None
) -> State:
    """Two steps from zero moments; the first gradients are `grads`, the others 1."""
    state = buffers(600, F32, device)
    grad = torch.ones(600)
    grad[: len(grads)] = torch.tensor(grads)
    state["gradient_norm"] = torch.zeros((), device=device)
    extras = {name: state[name] for name in ("target", "gradient_norm")}
    with small_blocks("adamw"), small_blocks("squares"):
        for _ in range(2):
            moments = (state[name] for name in MADE[1:4])
            op(state["param"], grad.to(device), *moments, **RULE, max_norm=max_norm, **extras)
    assert torch.equal(state["target"].isnan(), state["param"].isnan())
    return {name: x.cpu() for name, x in state.items()}


def assert_extreme_gradients_stay(op: Callable[..., None], device: str) -> None:
    start = buffers(600, F32, "cpu")["param"]
    zero = two_steps(op, device, [0.0] * 600, 1.0)
    decay = 1.0 - RULE["learning_rate"] * RULE["weight_decay"]
    torch.testing.assert_close(zero["param"], start * decay * decay)
    assert zero["gradient_norm"] == 0
    # 1e30: its square is infinite, and the step 0; NaN and infinity: NaN in that place alone
    state = two_steps(op, device, [1e30, -1e30, math.nan, math.inf])
    wild = state["param"]
    torch.testing.assert_close(wild[:2], start[:2] * decay * decay)
    assert wild.isnan().nonzero().flatten().tolist() == [2, 3]
    assert wild[4:].isfinite().all()
    assert (wild[4:] - start[4:]).abs().min() > 1e-3
    assert state["gradient_norm"].isnan()
    # the norm is infinite: nothing moves, but for infinity times 0
    clipped = two_steps(op, device, [math.inf], 1.0)
    assert clipped["gradient_norm"] == math.inf
    assert clipped["param"][0].isnan()
    torch.testing.assert_close(clipped["param"][1:], start[1:] * decay * decay)
    # NaN in the norm reaches everything, as with torch.nn.utils.clip_grad_norm_
    poisoned = two_steps(op, device, [1.0, math.nan], 1.0)
    assert poisoned["gradient_norm"].isnan()
    assert poisoned["param"].isnan().all()


@pytest.mark.gpu
def test_extreme_gradients_stay_where_they_are(kernel_device: str) -> None:
    assert_extreme_gradients_stay(kernel_adamw, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("max_norm", [None, 2.0])
def test_two_runs_give_the_same_bits(kernel_device: str, max_norm: float | None) -> None:
    runs = []
    for _ in range(2):
        with small_blocks("adamw"), small_blocks("squares"):
            case = {"size": 2051, "grad_dtype": BF16, "low": BF16, "max_norm": max_norm, "steps": 3}
            runs.append(learn(kernel_adamw, dtype=F32, device=kernel_device, **case))
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name


@pytest.mark.gpu
def test_buffers_may_start_anywhere(kernel_device: str) -> None:
    results = []
    for off in (0, 1, 3):  # elements into a vector
        parts = []
        for x in buffers(300, F32, kernel_device).values():
            whole = torch.full((320,), math.nan, device=kernel_device)
            parts.append(whole[off : off + 300].copy_(x) if x.dim() else x)
        param, target, step, exp_avg, exp_avg_sq = parts
        grad = torch.full((300 + off,), 0.25, device=kernel_device)[off:]
        kernel_adamw(param, grad, exp_avg, exp_avg_sq, step, **RULE, target=target, max_norm=1.0)
        results.append((param.clone(), target.clone()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_a_change_in_place_is_seen_by_autograd(kernel_device: str) -> None:
    state = buffers(10, F32, kernel_device)
    moments = [state[name] for name in MADE[1:4]]
    x = torch.ones(10, device=kernel_device, requires_grad=True)
    for change in (
        lambda: kernel_adamw(state["param"], torch.ones_like(x), *moments, **RULE),
        lambda: optimizer.ema_(state["param"], state["target"], 0.5, impl="triton"),
    ):
        out = (x * state["param"]).sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def op_arguments(device: str, clip: bool, tensors: bool) -> tuple[Any, ...]:
    """Arguments of the op behind `adamw_`."""
    state = buffers(300, F32, device)
    given = [state["param"], torch.ones(300, dtype=BF16, device=device)]
    given += [state[name] for name in MADE[1:4]]
    extras: list[Tensor | None] = [None] * 4
    if tensors:
        copies = [torch.zeros(300, dtype=BF16, device=device) for _ in range(2)]
        extras = [state["target"], *copies, torch.zeros((), device=device)]
    scalars = [torch.full((), x, device=device) if tensors else None for x in (1e-3, 0.5, 1.0)]
    return (*given, *extras, *scalars, 1e-3, 0.5, 1.0, clip, 0.9, 0.999, 1e-8, 0.1)


@pytest.mark.gpu
def test_the_ops_pass_the_checks_of_torch_library(kernel_device: str) -> None:
    for clip, tensors in ((False, True), (True, False)):
        torch.library.opcheck(optimizer._adamw_op.library, op_arguments(kernel_device, clip, tensors))
    target, param = torch.randn(2, 300, device=kernel_device)
    low, tau = torch.zeros(300, dtype=BF16, device=kernel_device), torch.full((), 0.5, device=kernel_device)
    torch.library.opcheck(optimizer._ema_op.library, (target, param, low, None, 0.5))
    torch.library.opcheck(optimizer._ema_op.library, (target, param, None, tau, 0.0))


@pytest.mark.gpu
@pytest.mark.parametrize("scalars", ["numbers", "tensors"])
def test_compiled_steps_equal_plain_ones(kernel_device: str, scalars: str) -> None:
    def op(*given: Tensor, **rule: Any) -> None:
        kernel_adamw(*given, **rule)
        optimizer.ema_(rule["target"], given[0], rule["tau"], low=rule["target_low"], impl="triton")

    case = {"size": 700, "low": BF16, "max_norm": 1.0, "steps": 3, "scalars": scalars, "tau": 0.1}
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    runs = [learn(f, dtype=F32, device=kernel_device, **case) for f in (op, compiled)]
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name
    assert runs[1]["step"] == 3


@pytest.mark.gpu
def test_a_graph_replays_steps_with_changed_scalars(kernel_device: str) -> None:
    if kernel_device == "cpu":
        pytest.skip("a CPU has no CUDA graphs")

    def made() -> tuple[State, Tensor, Tensor, dict[str, Any]]:
        state = buffers(5000, F32, kernel_device)
        low = torch.zeros(5000, dtype=BF16, device=kernel_device)
        norm, grad = (
            torch.zeros((), device=kernel_device),
            torch.zeros(5000, dtype=BF16, device=kernel_device),
        )
        numbers = {"learning_rate": 1e-3, "tau": 0.1, "max_norm": 50.0}
        rule = RULE | {name: torch.full((), x, device=kernel_device) for name, x in numbers.items()}
        state |= {"low": low, "target_low": low.clone(), "gradient_norm": norm}
        return state, grad, norm, rule | {name: state[name] for name in MADE[4:]}

    def step(state: State, grad: Tensor, rule: dict[str, Any]) -> None:
        kernel_adamw(state["param"], grad, *(state[name] for name in MADE[1:4]), **rule)

    results = []
    for captured in (False, True):
        state, grad, norm, rule = made()
        graph = torch.cuda.CUDAGraph()
        if captured:
            warm, warm_grad, _, warm_rule = made()
            step(warm, warm_grad, warm_rule)  # compiles
            with torch.cuda.graph(graph):
                step(state, grad, rule)
        rng, norms = torch.Generator().manual_seed(0), []
        for index in range(20):
            grad.copy_(torch.randn(5000, generator=rng))
            rule["learning_rate"].fill_(1e-3 * (index + 1))
            rule["max_norm"].fill_(50.0 + 2.0 * index)  # around the norm
            rule["tau"].fill_(0.05 * index)
            graph.replay() if captured else step(state, grad, rule)
            norms.append(norm.clone())
        results.append([*(state[name] for name in MADE), torch.stack(norms)])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)
    assert results[1][3] == 20


def lazy(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.gpu
def test_the_last_block_of_billions_is_where_it_belongs(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs the last of 4 million programs alone; 32 bits would take it back to the second."""
    if kernel_device == "cuda":
        pytest.skip("only the interpreter can run one program of many")
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    size, block = 2**32 + 2048, 1024
    try:
        param, exp_avg, exp_avg_sq, target = (lazy(size, F32) for _ in range(4))
        grad, low = lazy(size, BF16), lazy(size, BF16)
    except OSError as error:
        pytest.skip(f"no address space for billions of parameters: {error}")
    programs = size // block

    def number(value: int) -> Callable[..., Any]:
        return lambda *_: TensorHandle(np.array([value], np.int32), tl.int32)

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", number(programs - 1))
    monkeypatch.setattr(InterpreterBuilder, "create_get_num_programs", number(2**20))
    monkeypatch.setattr(optimizer, "processors", lambda _: 1)
    step, norm = torch.zeros(()), torch.zeros(())
    grad[-block:], target[-block:] = 1.0, 2.0
    rule = {"learning_rate": 0.25, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.0, "tau": 1.0}
    with small_blocks("adamw", block, 1), small_blocks("ema", block, 1):
        kernel_adamw(param, grad, exp_avg, exp_avg_sq, step, **rule, low=low, gradient_norm=norm)
        optimizer.ema_(target, param, 1.0, impl="triton")
    for x, value in ((param, -0.25), (exp_avg, 0.1), (exp_avg_sq, 0.001), (low, -0.25), (target, -0.25)):
        torch.testing.assert_close(x[-block:].float(), torch.full((block,), value))
        assert (x[: 4 * block] == 0).all()
        assert (x[-2 * block : -block] == 0).all()
    assert norm == math.sqrt(block)
    partial = torch.zeros(programs)
    dispatch.launch(optimizer._squares_kernel, (1,), grad, step, partial, size, BLOCK_P=block)
    assert partial[-1] == block


@pytest.mark.gpu
def test_billions_of_parameters_on_a_gpu_that_holds_them(kernel_device: str) -> None:
    size = 2**31 + 4096 + 5
    wanted = 16 * size
    if kernel_device == "cpu" or torch.cuda.mem_get_info()[0] < wanted:
        pytest.skip(f"needs a GPU with {wanted // 2**30} GiB free")
    torch.use_deterministic_algorithms(False)
    param = torch.zeros(size, device=kernel_device)
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    grad = torch.ones(size, dtype=BF16, device=kernel_device)
    step, norm = torch.zeros((), device=kernel_device), torch.zeros((), device=kernel_device)
    rule = RULE | {"learning_rate": 0.25, "eps": 0.0}
    kernel_adamw(param, grad, exp_avg, exp_avg_sq, step, **rule, gradient_norm=norm)
    low, high = param.aminmax()
    torch.testing.assert_close(torch.stack([low, high]), torch.full_like(param[:2], -0.25))
    torch.testing.assert_close(
        norm.double().cpu(), torch.tensor(float(size), dtype=F64).sqrt(), rtol=1e-5, atol=0
    )


@NEEDS_TRITON
@PLAIN
def test_offsets_have_64_bits_and_loads_16_bytes_for_billions_of_parameters() -> None:
    size = 3 * 10**9 + 1
    like = torch.empty(size, device="meta")
    grad = torch.empty(size, dtype=BF16, device="meta")
    step = torch.empty((), device="meta")
    with assume("sm_90"), dispatch.recording() as launches:
        optimizer.adamw_(like, grad, like, like, step, **RULE, target=like, low=grad, max_norm=1.0)
        optimizer.ema_(like, like, 0.5)
    assert [launch.kernel.fn.__name__ for launch in launches] == [
        "_squares_kernel",
        "_adamw_kernel",
        "_ema_kernel",
    ]
    for launch in launches:
        assert launch.grid[0] <= 32 * 132
        code = aot.compile_launch(launch, "90")
        found = aot.inspect(code, "90")
        assert found["spilled"] == 0
        block, text = launch.constants["BLOCK_P"], code.asm["ttir"]
        offsets = re.findall(rf"tt.addptr .*: tensor<{block}x!tt.ptr<\w+>>, tensor<{block}xi(\d+)>", text)
        assert len(offsets) >= 2
        assert set(offsets) == {"64"}
        assert len(re.findall("scf.for .* : i64 ", text)) == 2
        assert "ld.global.v4.b32" in code.asm["ptx"]


@NEEDS_TRITON
@PLAIN
@pytest.mark.parametrize(
    ("size", "extra", "names"),
    [
        (1, {}, ["adamw"]),
        (512, {"gradient_norm": torch.zeros(())}, ["adamw"]),
        (513, {}, ["adamw", "finish"]),
        (10**6, {"gradient_norm": torch.zeros(())}, ["adamw", "finish"]),
        (10**6, {"gradient_norm": torch.zeros(()), "max_norm": 1.0}, ["squares", "adamw"]),
        (1, {"max_norm": torch.zeros(())}, ["squares", "adamw"]),
    ],
)
def test_a_step_takes_two_launches_at_most(size: int, extra: dict[str, Any], names: list[str]) -> None:
    x = torch.zeros(size)
    with assume("sm_90"), dispatch.recording() as launches:
        optimizer.adamw_(x, x, x, x, torch.zeros(()), **RULE, **extra)
    assert [launch.kernel.fn.__name__.strip("_").removesuffix("_kernel") for launch in launches] == names


# without kernels


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_on_a_cpu_follow_the_twin(name: str, dtype: torch.dtype) -> None:
    mine = learn(optimizer.adamw_, dtype=dtype, device="cpu", **CASES[name])
    assert_follows_twin(mine, dtype, dtype, **CASES[name])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_step_on_a_cpu_without_the_compiled_pass_has_the_bits_of_torchs_fused_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == F32:
        monkeypatch.setattr(native, "compiled", None)
    state, grad = buffers(1000, dtype, "cpu"), torch.randn(1000, dtype=dtype)
    mine, theirs = ([state[name].clone() for name in MADE[:4]] for _ in range(2))
    optimizer.adamw_(mine[0], grad, *mine[1:], **RULE)
    theirs[3] += 1
    beta1, beta2 = RULE["betas"]
    lists = ([x] for x in (theirs[0], grad, theirs[1], theirs[2]))
    rule = {"lr": RULE["learning_rate"], "beta1": beta1, "beta2": beta2}
    rule |= {name: RULE[name] for name in ("weight_decay", "eps")}
    torch._fused_adamw_(*lists, [], [theirs[3]], **rule, amsgrad=False, maximize=False)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("size", [0, 1, 7, 1000, 100001])
@pytest.mark.parametrize(
    "rule",
    [
        {"moves": False, "norm": False},
        {"moves": False, "max_norm": 1.0},
        {"norm": False, "tau": 0.25, "scalars": "tensors"},
        {"tau": 0.75, "max_norm": 0.5, "scalars": "tensors", "low": BF16},
        {"max_norm": 1e6},
    ],
    ids=str,
)
def test_compiled_steps_follow_the_twin_in_float64(
    size: int, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = native_calls(monkeypatch)
    mine = learn(optimizer.adamw_, size, F32, "cpu", steps=5, **rule)
    assert calls == ([*["sum_of_squares"] * ("max_norm" in rule), "adamw"] * 5)
    assert_follows_twin(mine, F32, F32, size=size, steps=5, **rule)
    assert mine["step"] == 5
    if size == 0 and "gradient_norm" in mine:
        assert mine["gradient_norm"] == 0


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_compiled_step_with_tau_1_gives_the_target_the_bits_of_the_parameters(size: int) -> None:
    state = buffers(size, F32, "cpu")
    moments = (state[name] for name in MADE[1:4])
    optimizer.adamw_(state["param"], torch.randn(size), *moments, **RULE, target=state["target"], tau=1.0)
    assert torch.equal(state["target"], state["param"])
    assert not torch.equal(state["param"], buffers(size, F32, "cpu")["param"])


@pytest.mark.parametrize("step_dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("t", [1, 2, 10, 1000, 10000, 10**6])
def test_bias_corrections_of_a_compiled_step_hold(t: int, step_dtype: torch.dtype) -> None:
    assert_bias_corrections(optimizer.adamw_, t, torch.zeros((), dtype=step_dtype), F32, 3e-7)


def test_extreme_gradients_of_a_compiled_step_stay_where_they_are() -> None:
    assert_extreme_gradients_stay(optimizer.adamw_, "cpu")


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_bits_of_a_compiled_step_depend_on_no_address(max_norm: float | None) -> None:
    results = []
    for off in (0, 1, 3, 5):
        state = {}
        for name, x in buffers(10001, F32, "cpu").items():
            state[name] = torch.cat([x.new_zeros(off), x])[off:] if x.dim() else x
        grad = torch.randn(10001, generator=torch.Generator().manual_seed(0))
        norm = torch.zeros(())
        moments = (state[name] for name in MADE[1:4])
        rule = RULE | {"max_norm": max_norm, "gradient_norm": norm, "target": state["target"]}
        optimizer.adamw_(state["param"], torch.cat([grad[:off], grad])[off:], *moments, **rule)
        results.append([*state.values(), norm])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_the_compiled_pass_does_not_serve_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = native_calls(monkeypatch)
    for dtype, grad_dtype in ((F64, F64), (F32, BF16), (F32, F64)):
        learn(optimizer.adamw_, 5, dtype, "cpu", grad_dtype=grad_dtype, steps=1)
        state = buffers(5, dtype, "cpu")
        moments = (state[name] for name in MADE[1:4])
        optimizer.adamw_(state["param"], torch.ones(5, dtype=grad_dtype), *moments, **RULE)
    assert (
        calls == ["adamw"] * 3
    )  # `learn` rounds the gradient: of float32 parameters one of float64 is not served


def test_a_compiled_step_is_seen_by_autograd() -> None:
    state = buffers(10, F32, "cpu")
    for name in ("param", "exp_avg", "exp_avg_sq", "target"):
        x = torch.ones(10, requires_grad=True)
        out = (x * state[name]).sum()
        moments = (state[moment] for moment in MADE[1:4])
        optimizer.adamw_(state["param"], torch.ones(10), *moments, **RULE, target=state["target"])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


@pytest.mark.parametrize("impl", ["auto", "reference", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("place", ["param", "grad"])
def test_nothing_is_recorded_where_a_gradient_is_wanted(
    request: pytest.FixtureRequest, impl: str, dtype: torch.dtype, place: str
) -> None:
    """A parameter is a leaf that wants one; a gradient made with create_graph=True comes of one."""
    device = request.getfixturevalue("kernel_device") if impl == "triton" else "cpu"
    results = []
    for wanted in (False, True):
        state = buffers(10, dtype, device) | {"grad": torch.ones(10, dtype=dtype, device=device)}
        low, target_low = (torch.zeros(10, dtype=BF16, device=device) for _ in range(2))
        if wanted:
            state[place].requires_grad_()
        given = {"grad": state["grad"] * 1.0, "low": low, "target_low": target_low, "max_norm": 1.0}
        moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq", "step", "target")}
        optimizer.adamw_(state["param"], **moments, **given, **RULE, impl=impl)
        optimizer.ema_(moments["target"], state["param"], 0.5, low=target_low, impl=impl)
        made = [*moments.values(), low, target_low]
        assert not any(x.requires_grad for x in made)
        results.append([*made, state["param"].detach()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("max_norm", [None, 1.0, 1e3])
def test_the_twin_does_what_torch_does(max_norm: float | None) -> None:
    state = buffers(50, F64, "cpu")
    leaf = torch.nn.Parameter(state["param"].clone())
    target = state["target"].clone()
    torchs = torch.optim.AdamW([leaf], lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    low, target_low = torch.zeros(50, dtype=BF16), torch.zeros(50, dtype=F16)
    norm = torch.zeros((), dtype=F64)
    for _ in range(10):
        leaf.grad = torch.randn(50, dtype=F64)
        grad = leaf.grad.clone()
        total = torch.nn.utils.clip_grad_norm_([leaf], max_norm or math.inf)
        torchs.step()
        target = target + 0.05 * (leaf.detach() - target)
        moments = (state[name] for name in MADE[1:4])
        extras = {"target": state["target"], "tau": 0.05, "low": low, "target_low": target_low}
        extras |= {"max_norm": max_norm, "gradient_norm": norm}
        reference.adamw_(state["param"], grad, *moments, **RULE, **extras)
        assert norm == total == torch.linalg.vector_norm(grad)
    torch.testing.assert_close(state["param"], leaf.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["target"], target, rtol=1e-12, atol=1e-12)
    assert torch.equal(low, state["param"].to(BF16))
    assert torch.equal(target_low, state["target"].to(F16))


def test_stacked_steps_under_vmap_are_those_one_by_one() -> None:
    grads = torch.randn(3, 20)
    runs = []
    for stacked in (True, False):
        torch.manual_seed(0)
        param, target = torch.randn(2, 3, 20)
        moments = [torch.zeros(3, 20), torch.zeros(3, 20), torch.zeros(3)]

        def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: Tensor, q: Tensor) -> Tensor:
            optimizer.adamw_(p, g, m, v, t, **RULE, target=q, max_norm=1.0)
            return p

        if stacked:
            torch.func.vmap(step)(param, grads, *moments, target)
        else:
            for index in range(3):
                step(*(x[index] for x in (param, grads, *moments, target)))
        runs.append((param, target, *moments))
    for mine, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("scalars", ["numbers", "tensors"])
def test_a_compiled_step_on_a_cpu_equals_a_plain_one(scalars: str) -> None:
    compiled = torch.compile(optimizer.adamw_, fullgraph=True, backend="aot_eager")
    case = {"size": 70, "low": BF16, "max_norm": 1.0, "steps": 3, "scalars": scalars}
    runs = [learn(f, dtype=F32, device="cpu", **case) for f in (reference.adamw_, compiled)]
    for name, x in runs[0].items():
        torch.testing.assert_close(x, runs[1][name], msg=name)


def fitting() -> dict[str, Any]:
    x = torch.zeros(7)
    given = {"param": x, "grad": x, "exp_avg": x, "exp_avg_sq": x, "step": torch.zeros(())}
    return given | RULE | {"target": x.clone(), "low": x.bfloat16(), "gradient_norm": torch.zeros(())}


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"param": torch.zeros(7, 1)}, ValueError, "param ... flat, of shape [P], got [7, 1]"),
        (
            {"param": torch.zeros(7, dtype=BF16)},
            TypeError,
            "param ... float32 or torch.float64, got torch.bfloat16",
        ),
        ({"grad": torch.zeros(6)}, ValueError, "grad ... [P] = [7], got [6]"),
        (
            {"grad": torch.zeros(7, dtype=torch.int32)},
            TypeError,
            "grad ... torch.bfloat16 ... got torch.int32",
        ),
        ({"grad": torch.zeros(14)[::2]}, ValueError, "grad ... contiguous, got strides [2]; flatten"),
        ({"exp_avg": torch.zeros(7).double()}, TypeError, "exp_avg ... torch.float32, got torch.float64"),
        ({"exp_avg_sq": torch.zeros(8)}, ValueError, "exp_avg_sq ... [P] = [7], got [8]"),
        ({"target": torch.zeros(7, device="meta")}, ValueError, "target ... on cpu ... got meta"),
        ({"low": torch.zeros(7)}, TypeError, "low ... bfloat16 or torch.float16, got torch.float32"),
        ({"target": None, "target_low": torch.zeros(7, dtype=F16)}, ValueError, "target_low needs a target"),
        ({"step": torch.zeros(1)}, ValueError, "step must be a 0-d tensor, got shape [1]"),
        ({"step": torch.zeros((), dtype=torch.int64)}, TypeError, "step ... got torch.int64"),
        ({"learning_rate": torch.zeros((), device="meta")}, ValueError, "learning_rate ... on cpu ... meta"),
        ({"max_norm": torch.zeros(7)}, ValueError, "max_norm must be a 0-d tensor, got shape [7]"),
        ({"tau": torch.zeros(7)}, ValueError, "tau must be a 0-d tensor, got shape [7]"),
        ({"gradient_norm": torch.zeros((), dtype=BF16)}, TypeError, "gradient_norm ... got torch.bfloat16"),
        ({"impl": "cuda"}, ValueError, "impl ... auto, triton, ... got 'cuda'"),
    ],
)
def test_a_step_refuses_what_does_not_fit(change: dict[str, Any], error: type, told: str) -> None:
    optimizer.adamw_(**fitting())
    with pytest.raises(error, match=says(told)):
        optimizer.adamw_(**fitting() | change)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"target": torch.zeros(2, 3)}, ValueError, "target ... flat, of shape [P], got [2, 3]"),
        ({"param": torch.zeros(6)}, ValueError, "param ... [P] = [7], got [6]"),
        ({"param": torch.zeros(7).double()}, TypeError, "param ... torch.float32, got torch.float64"),
        ({"low": torch.zeros(7).half()[:6]}, ValueError, "low ... [P] = [7], got [6]"),
        ({"tau": torch.zeros(1)}, ValueError, "tau must be a 0-d tensor, got shape [1]"),
    ],
)
def test_a_moving_target_refuses_what_does_not_fit(change: dict[str, Any], error: type, told: str) -> None:
    given: dict[str, Any] = {"target": torch.zeros(7), "param": torch.zeros(7), "tau": 0.5}
    optimizer.ema_(**given)
    with pytest.raises(error, match=says(told)):
        optimizer.ema_(**given | change)


@NEEDS_TRITON
@PLAIN
def test_kernels_asked_for_on_a_cpu_are_refused_before_anything_changes() -> None:
    given = fitting()
    for call in (
        lambda: optimizer.adamw_(**given, impl="triton"),
        lambda: optimizer.ema_(given["target"], given["param"], 0.5, impl="triton"),
    ):
        with pytest.raises(RuntimeError, match="on cpu; move it to CUDA"):
            call()
    assert given["step"] == 0
