"""The summary of an update: kernel against twin, twin against its definition."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from extras import require
from kernel_harness import OPS, assert_close_to_truth, guarded
from refusals import says
from torch import Tensor

from brc_fast import kernels
from brc_fast.kernels import reference, summary
from brc_fast.kernels.reference import METRICS, ScalarAdam
from brc_fast.kernels.runtime.dispatch import recording

update_summary_ = partial(summary.update_summary_, impl="triton")
F64 = torch.float64


def numbers(rows: int, members: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Arguments in float64, by name; the gradients' norms are 11 and 13."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=F64)

    metrics = torch.full((len(METRICS),), 99.0, dtype=F64)
    metrics[METRICS.index("critic_gradient_norm")] = 11.0
    metrics[METRICS.index("actor_gradient_norm")] = 13.0
    return {
        "metrics": metrics,
        "losses": normal(members, rows).exp(),
        "log_probs": normal(rows) - 1.0,
        "q_values": 3.0 * normal(members, rows),
        "alpha": torch.tensor(0.3, dtype=F64),
        "gradient": torch.zeros(1, dtype=F64),
        "step": torch.tensor(4.0, dtype=F64),
        "since": torch.zeros(len(METRICS), dtype=F64),
    }


def to(
    given: dict[str, Tensor], dtype: torch.dtype, device: str = "cpu", low: Any = None
) -> dict[str, Tensor]:
    """The same in `dtype`, what is read row by row in `low`, between numbers that must not be read."""
    kinds = dict.fromkeys(("losses", "log_probs", "q_values"), low or dtype)
    return {name: guarded(x.to(device, kinds.get(name, dtype))) for name, x in given.items()}


@pytest.mark.parametrize("op", [reference.update_summary_, kernels.update_summary_])
@pytest.mark.parametrize("rows", [1, 7])
def test_metrics_are_those_of_the_definition(op: Any, rows: int) -> None:
    given = numbers(rows, 3)
    losses, log_probs, values = (given[x].tolist() for x in ("losses", "log_probs", "q_values"))
    q_values = [sum(members) / 3 for members in zip(*values, strict=True)]
    entropy, q = -sum(log_probs) / rows, sum(q_values) / rows
    expected = {
        "critic_loss": sum(sum(member) / rows for member in losses),
        "critic_gradient_norm": 11.0,
        "actor_loss": sum(0.3 * x - y for x, y in zip(log_probs, q_values, strict=True)) / rows,
        "actor_gradient_norm": 13.0,
        "entropy": entropy,
        "q_mean": q,
        "temperature": 0.3,
        "temperature_loss": 0.3 * (entropy + 2.5),
    }
    op(**given, target_entropy=-2.5)
    assert dict(zip(METRICS, given["metrics"].tolist(), strict=True)) == pytest.approx(expected, rel=1e-12)
    assert given["gradient"].item() == pytest.approx(expected["temperature_loss"], rel=1e-12)
    assert not given["since"].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 100, summary.BLOCK, summary.BLOCK + 1])
def test_the_kernel_follows_its_twin(kernel_device: str, rows: int, low: Any, dtype: torch.dtype) -> None:
    exact = numbers(rows, 3)
    for name in ("losses", "log_probs", "q_values"):
        exact[name] = exact[name].to(low or dtype).to(F64)
    exact["alpha"] = exact["alpha"].to(dtype).to(F64)
    plain, mine = to(exact, dtype, low=low), to(exact, dtype, kernel_device, low)
    for op, given in (
        (reference.update_summary_, exact),
        (reference.update_summary_, plain),
        (update_summary_, mine),
    ):
        op(**given, target_entropy=-2.7)
    for name in ("metrics", "gradient", "since"):
        assert_close_to_truth(mine[name], exact[name], plain[name], name)
    assert mine["metrics"][[1, 3]].tolist() == [11.0, 13.0]


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("rows", [1, 100, 4097])
def test_the_compiled_pass_follows_its_twin(rows: int, members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = numbers(rows, members)
    plain, mine = to(exact, torch.float32), to(exact, torch.float32)
    versions = {name: x._version for name, x in mine.items()}
    reference.update_summary_(**plain, target_entropy=-2.7)
    monkeypatch.setattr(reference, "update_summary_", None)  # nothing but the compiled pass is called
    kernels.update_summary_(**mine, target_entropy=-2.7)
    monkeypatch.undo()
    reference.update_summary_(**exact, target_entropy=-2.7)
    for name in ("metrics", "gradient", "since"):
        assert_close_to_truth(mine[name], exact[name], plain[name], name)
    assert mine["metrics"][[1, 3]].tolist() == [11.0, 13.0]
    changed = {name for name, x in mine.items() if x._version > versions[name]}
    assert changed == {"metrics", "gradient", "since"}


def adam(param: float, dtype: torch.dtype, device: str = "cpu") -> ScalarAdam:
    state = (guarded(torch.full((1,), x, dtype=dtype, device=device)) for x in (param, 0.2, 0.03))
    count, rate = (guarded(torch.tensor(x, dtype=dtype, device=device)) for x in (2.0, 0.1))
    return ScalarAdam(*state, count, rate, (0.5, 0.99), 1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_the_temperature_takes_adams_steps(kernel_device: str, dtype: torch.dtype) -> None:
    """Against the summary alone and a step of AdamW without decay, in float64."""
    exact, apart = numbers(9, 2), adam(-1.0, F64)
    runs = [
        (op, to(numbers(9, 2), dtype, place), adam(-1.0, dtype, place))
        for op, place in (
            (reference.update_summary_, "cpu"),
            (kernels.update_summary_, "cpu"),
            (update_summary_, kernel_device),
        )
    ]
    for turn in range(3):
        log_probs = torch.randn(9, generator=torch.Generator().manual_seed(turn), dtype=F64)
        exact["log_probs"] = log_probs
        reference.update_summary_(**exact, target_entropy=-2.0)
        reference.adamw_(
            apart.param, exact["gradient"], apart.exp_avg, apart.exp_avg_sq, apart.step,
            learning_rate=0.1, betas=(0.5, 0.99), eps=1e-8, weight_decay=0.0,
        )  # fmt: skip
        exact["alpha"].copy_(apart.param[0].exp())
        for op, given, state in runs:
            given["log_probs"].copy_(log_probs)
            op(**given, target_entropy=-2.0, adam=state)
            assert state.step.item() == 3.0 + turn
            assert state.learning_rate.item() == pytest.approx(0.1)
            for name in ("metrics", "alpha", "gradient"):
                torch.testing.assert_close(given[name].cpu().to(F64), exact[name], rtol=2e-5, atol=1e-6)
            for mine, other in zip(state[:3], apart[:3], strict=True):
                torch.testing.assert_close(mine.cpu().to(F64), other, rtol=2e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_step_with_a_number_that_is_not_finite_stays(kernel_device: str, bad: float) -> None:
    for op in (reference.update_summary_, update_summary_, kernels.update_summary_):
        given = to(numbers(9), torch.float32, kernel_device)
        rule = {"target_entropy": -1.0}
        for step, name, value in (
            (4, "q_values", 0.5),
            (5, "losses", bad),
            (6, "losses", 1.0),
            (7, "losses", bad),
        ):
            given["step"].fill_(step)
            given[name].view(-1)[-1] = value
            op(**given, **rule)
        assert given["since"].tolist() == [5.0, *[0.0] * 7]
        given["metrics"][3] = bad
        op(**given, **rule)
        assert given["since"].tolist() == [5.0, 0.0, 0.0, 7.0, *[0.0] * 4]
        given["log_probs"][0] = bad
        given["step"].fill_(8)
        op(**given, **rule)
        assert given["since"].tolist() == [5.0, 0.0, 8.0, 7.0, 8.0, 0.0, 0.0, 8.0]


@pytest.mark.gpu
def test_losses_that_lie_apart_and_a_gradient_of_no_dimension_are_taken(kernel_device: str) -> None:
    apart, dense = (to(numbers(8), torch.float32, kernel_device) for _ in range(2))
    wide = torch.full((2, 8, 3), math.nan, device=kernel_device)
    wide[..., 1] = dense["losses"]
    apart |= {"losses": wide[..., 1], "gradient": torch.zeros((), device=kernel_device)}
    for given in (apart, dense):
        update_summary_(**given, target_entropy=-1.0)
    assert torch.equal(apart["metrics"], dense["metrics"])
    assert torch.equal(apart["gradient"], dense["gradient"][0])


@pytest.mark.gpu
def test_it_is_an_op_for_the_dispatcher_and_the_compiler(kernel_device: str) -> None:
    def step(given: dict[str, Tensor]) -> Tensor:
        update_summary_(**given, target_entropy=-1.0)  # type: ignore[arg-type]
        return given["metrics"] * 2.0

    plain, traced = (
        to(numbers(8), torch.float32, kernel_device) | {"adam": adam(0.5, torch.float32, kernel_device)}
        for _ in range(2)
    )
    names = ("metrics", "losses", "log_probs", "q_values", "alpha", "gradient", "step", "since")
    *state, betas, eps = adam(0.5, torch.float32, kernel_device)
    given = tuple(plain[name].clone() for name in names)
    for more in ((None,) * 5, state):
        torch.library.opcheck(OPS.update_summary, (*given, *more, -1.0, *betas, eps))
    expected = step(plain)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(traced), expected)
    for name in ("metrics", "gradient", "alpha"):
        torch.testing.assert_close(traced[name], plain[name])
    torch.testing.assert_close(traced["adam"][:4], plain["adam"][:4])


def test_it_is_one_launch() -> None:
    require("triton")
    for state in (None, adam(0.5, torch.float32)):
        with recording() as launches:
            kernels.update_summary_(**to(numbers(8), torch.float32), target_entropy=-1.0, adam=state)
        assert [call.grid for call in launches] == [(1,)]


@pytest.mark.parametrize(
    ("name", "value", "error", "told"),
    [
        ("log_probs", torch.zeros(2, 4), ValueError, "log_probs must have shape [B] ... got [2, 4]"),
        ("log_probs", torch.zeros(0), ValueError, "log_probs ... B from 1, got [0]"),
        ("losses", torch.zeros(2, 5), ValueError, "losses ... [E, B] with B = 4, got [2, 5]"),
        ("losses", torch.zeros(4), ValueError, "losses must have shape [E, B]"),
        ("q_values", torch.zeros(4), ValueError, "q_values ... [E, B] with B = 4, got [4]"),
        ("q_values", torch.zeros(0, 4), ValueError, "q_values must have shape ... got [0, 4]"),
        ("metrics", torch.zeros(7), ValueError, "metrics ... [8] and no gaps, got [7]"),
        ("since", torch.zeros(16)[::2], ValueError, "since must have shape ... strides [2]"),
        ("alpha", torch.zeros(2), ValueError, "alpha must have one element, got [2]"),
        ("step", torch.zeros((), dtype=torch.int64), TypeError, "step must be of dtype ... got torch.int64"),
        ("losses", torch.zeros(2, 4, dtype=torch.int32), TypeError, "losses must be of dtype"),
        ("q_values", torch.zeros(2, 4, device="meta"), ValueError, "q_values ... on cpu ... got meta"),
        ("adam.param", torch.zeros(2), ValueError, "adam.param must have one element, got [2]"),
        ("adam.param", torch.zeros(1).half(), TypeError, "adam.param must be of dtype ... got torch.float16"),
        (
            "adam.exp_avg",
            torch.zeros(1, dtype=F64),
            TypeError,
            "adam.exp_avg ... of dtype torch.float32, got",
        ),
        ("adam.step", torch.zeros((), device="meta"), ValueError, "adam.step ... on cpu ... got"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, value: Tensor, error: type, told: str) -> None:
    given: dict[str, Any] = to(numbers(4), torch.float32)
    before = {key: x.clone() for key, x in given.items()}
    part = name.removeprefix("adam.")
    change = {name: value} if part == name else {"adam": adam(0.5, torch.float32)._replace(**{part: value})}
    with pytest.raises(error, match=says(told)):
        kernels.update_summary_(**given | change, target_entropy=-1.0)
    assert all(torch.equal(given[key], x) for key, x in before.items())
