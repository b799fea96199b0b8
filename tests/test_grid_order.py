"""No result depends on the order of a launch's programs: none of them touches what another one writes.

Every case of every op, and whole updates, run with the programs that an H200 would be given, a case with as
few rows as divide its launches. Marked gpu, and so run by test_interpreted.py, are the cases with a launch
that differs from all before it by more than a size or dtype. The others take minutes:

    TRITON_INTERPRET=1 pytest tests/test_grid_order.py -m "not gpu"
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from agents import agent, batches
from torch import Tensor
from torch.utils._pytree import tree_leaves

from brc_fast import kernels
from brc_fast.kernels.runtime import dispatch

if not dispatch.INTERPRETED:
    pytest.skip("runs in Triton's interpreter alone (TRITON_INTERPRET=1)", allow_module_level=True)

from grid_order import Fault, Program, watched

from brc_fast.kernels.runtime import tables
from brc_fast.kernels.runtime.language import jit, tl
from brc_fast.kernels.runtime.tables import assume
from brc_fast.kernels.tools.cases import Case, cases

ALONE = {"_finish_kernel", "_summary_kernel"}  # of one program, however much there is to do
LARGE = 2 << 20  # bytes that rows may add to a case: beyond, the interpreter takes minutes


def backwards(programs: list[Program]) -> list[Program]:
    return programs[::-1]


def shuffled(programs: list[Program]) -> list[Program]:
    return random.Random(len(programs)).sample(programs, len(programs))


def assert_order_is_free(run: Callable[[], object]) -> list[str]:
    """`run`, which makes its own inputs, has no faults, and gives the same bits in each order.

    Returns the kernels that it launched.
    """
    bits, launches = [], []
    for order in (list, backwards, shuffled):
        with watched(order) as watch:
            leaves = tree_leaves(run())
        assert not watch.faults
        tensors = [x.detach().contiguous().reshape(-1) for x in leaves if isinstance(x, Tensor)]
        bits.append([x.view(torch.uint8) for x in tensors])
        launches.append(watch.launches)
    assert bits[0]
    for other in bits[1:]:
        assert [torch.equal(a, b) for a, b in zip(bits[0], other, strict=True)] == [True] * len(other)
    assert launches[0] == launches[1] == launches[2]
    return launches[0]


class Sized(NamedTuple):
    """A case, the rows to run it with, and the launches that it makes with them."""

    case: Case
    rows: int
    kernels: list[str]
    grids: list[tuple[int, ...]]
    kinds: set[tuple[Any, ...]]

    def divided(self) -> set[str]:
        """The kernels whose rows, or elements, are divided between programs."""
        return {name for name, grid in zip(self.kernels, self.grids, strict=True) if grid[0] > 1}


def kind(launch: dispatch.Launch) -> tuple[Any, ...]:
    """What a kernel's branches go by: arguments that are not there, flags, and which size exceeds which."""
    sizes = [x for name, x in launch.constants.items() if type(x) is int and not name.startswith("BLOCK")]
    flags = [x for x in launch.constants.values() if type(x) is not int]
    ranks = np.unique(sizes, return_inverse=True)[1].tolist()
    return launch.kernel.__name__, *(x is None for x in launch.arguments), *flags, *ranks


def sized(case: Case, rows: int) -> Sized:
    with assume("sm_90"):
        call = case.prepare(torch.device("cpu"), rows, "triton")
        with dispatch.recording() as launches:
            call()
    names = [launch.kernel.__name__ for launch in launches]
    return Sized(case, rows, names, [launch.grid for launch in launches], set(map(kind, launches)))


def assert_case_is_free(chosen: Sized) -> None:
    def run() -> object:
        torch.manual_seed(0)
        with assume("sm_90"):
            return chosen.case.prepare(torch.device("cpu"), chosen.rows, "triton")()

    assert assert_order_is_free(run) == chosen.kernels


def every_case() -> Iterator[Any]:
    """Each case with the fewest rows that divide most launches, marked gpu where a kind of launch is new."""
    seen: set[tuple[Any, ...]] = set()
    for case in cases():
        fits = [n for n in (2, 4, 8, 16, 32, 64, 128, 256) if case.bytes(n) - case.bytes(0) <= LARGE]
        chosen = max((sized(case, rows) for rows in fits), key=lambda x: sum(grid[0] > 1 for grid in x.grids))
        marks = [pytest.mark.gpu] if chosen.kinds - seen else []
        seen |= chosen.kinds
        yield pytest.param(chosen, marks=marks, id=f"{case.op} {case.label}")


CASES = list(every_case())
WALKING = [p for p in CASES if p.values[0].case.op in ("adamw_", "ema_") and "*batch float32" in p.id]
WALKING += [p for p in CASES if p.id == "bias_layer_norm E=2 H=256 float32 relu"]


@pytest.mark.parametrize("chosen", CASES)
def test_programs_of_a_launch_share_nothing_that_one_of_them_writes(
    kernel_device: str, chosen: Sized
) -> None:
    assert_case_is_free(chosen)


@pytest.mark.gpu
def test_the_default_cases_launch_every_kernel_with_several_programs() -> None:
    files = [path.stem for path in Path(kernels.__file__).parent.glob("*.py") if path.stem != "__init__"]
    modules = [vars(importlib.import_module(f"brc_fast.kernels.{name}")) for name in files]
    there = {name for module in modules for name in module if name.endswith("_kernel")}
    default = [p.values[0] for p in CASES if pytest.mark.gpu in p.marks]
    assert {name for chosen in default for name in chosen.kernels} == there
    assert set().union(*(chosen.divided() for chosen in default)) == there - ALONE


@pytest.mark.gpu
@pytest.mark.parametrize("case", [pytest.param(p.values[0].case, id=p.id) for p in WALKING])
def test_nor_do_programs_that_walk_over_more_than_a_block(
    kernel_device: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU of two multiprocessors, which has fewer programs than there are blocks."""
    rows = 40 if "*batch" in case.label else 256
    grids = sized(case, rows).grids
    monkeypatch.setitem(tables.PROCESSORS, "sm_90", 2)
    few = sized(case, rows)
    assert few.grids < grids
    assert few.divided()
    assert_case_is_free(few)


def wide_rows() -> object:
    """Rows of more than 8192, whose weights are loaded late."""
    x, *parameters = torch.randn(8, 16384), *torch.randn(3, 16384)
    return kernels.bias_layer_norm(x, *parameters, impl="triton")


def padded_targets() -> object:
    """Targets that are loaded with what lies between their rows."""
    logits, target = (torch.rand(n, 8, 16)[..., :13] for n in (2, 1))
    return kernels.categorical_cross_entropy(logits, target[0], impl="triton")


def short_horizons() -> object:
    """Discounts below 1/2, with which more than three atoms move to one."""
    rewards, log_probs, discounts = torch.randn(8), torch.randn(8), torch.linspace(0.0, 0.4, 8)
    atoms, next_logits = torch.linspace(-5.0, 5.0, 21), torch.randn(2, 8, 21)
    return kernels.categorical_target(
        next_logits, rewards, discounts, log_probs, 0.1, atoms, 5.0, impl="triton"
    )


def ragged_buffers() -> object:
    """Parameters, with all that goes with them, of which a last block holds but one."""
    param, grad, mean, square, target = torch.randn(5, 1025).abs()
    low, target_low = torch.zeros(2, 1025, dtype=torch.bfloat16)
    step, norm = torch.zeros(2)
    rule: dict[str, Any] = {"learning_rate": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    rule |= {"target": target, "tau": 0.1, "low": low, "target_low": target_low, "gradient_norm": norm}
    kernels.adamw_(param, grad, mean, square, step, **rule, impl="triton")
    moved = target.clone()
    kernels.ema_(moved, param, 0.1, low=low.clone(), impl="triton")
    return param, mean, square, step, target, low, target_low, norm, moved


@pytest.mark.gpu
@pytest.mark.parametrize(
    "op", [wide_rows, padded_targets, short_horizons, ragged_buffers], ids=lambda op: op.__name__
)
def test_nor_do_programs_in_branches_that_no_default_case_takes(
    kernel_device: str, op: Callable[[], object]
) -> None:
    def run() -> object:
        torch.manual_seed(0)
        with assume("sm_90"):
            return op()

    assert assert_order_is_free(run)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_an_update_does_not_depend_on_the_order_of_programs(
    kernel_device: str, tasks: int, precision: str
) -> None:
    def run() -> object:
        one = agent(tasks, precision=precision, device=kernel_device)
        with kernels.use("triton"), assume("sm_90"):
            return one.update(batches(1, 12, tasks)), one.state_dict()

    assert len(assert_order_is_free(run)) > 20


@jit
def _tidy_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    tl.store(out_ptr + i, x + 1.0, mask=i < N)


@jit
def _last_wins_kernel(out_ptr):  # type: ignore[no-untyped-def]
    tl.store(out_ptr, tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))


@jit
def _neighbour_kernel(x_ptr):  # type: ignore[no-untyped-def]
    """x[i + 1] += x[i]."""
    i = tl.program_id(0)
    tl.store(x_ptr + i + 1, tl.load(x_ptr + i + 1) + tl.load(x_ptr + i))


@jit
def _halves_kernel(whole_ptr, half_ptr):  # type: ignore[no-untyped-def]
    """The first program stores 4 bytes, the second the last 2 of them."""
    i = tl.program_id(0)
    tl.store(whole_ptr, 0.0, mask=i == 0)
    tl.store(half_ptr + 1, 0.0, mask=i == 1)


@jit
def _again_kernel(x_ptr, LOADS: tl.constexpr, WAITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store, wait or do not, and load or store the same 8 elements of each program."""
    i = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(x_ptr + i, 1.0)
    if WAITS:
        tl.debug_barrier()
    if LOADS:
        x = tl.load(x_ptr + i)
        tl.store(x_ptr + 16 + i, x)
    else:
        tl.store(x_ptr + i, 2.0)


@jit
def _lanes_kernel(x_ptr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 8)
    tl.store(x_ptr + i // 2, i.to(tl.float32))


@jit
def _beyond_kernel(x_ptr, out_ptr, LOAD: tl.constexpr, STORE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[0], loaded as x[LOAD], goes to out[STORE]."""
    tl.store(out_ptr + STORE, tl.load(x_ptr + LOAD))


@jit
def _atomic_kernel(x_ptr):  # type: ignore[no-untyped-def]
    tl.atomic_add(x_ptr, 1.0)


def faults(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> list[Fault]:
    with watched() as watch:
        dispatch.launch(kernel, grid, *arguments, **constants)
    assert watch.launches == [kernel.__name__]
    return watch.faults


def place(x: int, y: int = 0) -> Program:
    return x, y, 0


@pytest.mark.gpu
def test_a_kernel_that_keeps_to_its_own_has_no_fault(kernel_device: str) -> None:
    x = torch.arange(10.0)
    columns = torch.zeros(10, 2)[:, 1]  # in whose gaps nobody stores
    assert faults(_tidy_kernel, (3,), x, x, 10, BLOCK=4) == []
    assert x.tolist() == list(range(1, 11))
    assert faults(_tidy_kernel, (3,), columns, torch.zeros(10), 10, BLOCK=4) == []


@pytest.mark.gpu
def test_programs_run_in_the_order_asked_for(kernel_device: str) -> None:
    out = torch.zeros((), dtype=torch.int32)
    last = []
    for order in (list, backwards, shuffled):
        with watched(order):
            dispatch.launch(_last_wins_kernel, (2, 3), out)
        last.append(out.item())
    assert last == [5, 0, shuffled(list(range(6)))[-1]]  # type: ignore[arg-type]


@pytest.mark.gpu
def test_an_element_that_two_programs_touch_and_one_stores_is_a_race(kernel_device: str) -> None:
    out = torch.zeros(4, dtype=torch.int32)[2:]
    race = Fault("race", "_last_wins_kernel", "out_ptr", 0, (place(0), place(1, 2)))
    assert faults(_last_wins_kernel, (2, 3), out) == [race]
    race = Fault("race", "_neighbour_kernel", "x_ptr", 1, (place(0), place(1)))
    assert faults(_neighbour_kernel, (3,), torch.zeros(4)) == [race]
    whole = torch.ones(1)
    race = Fault("race", "_halves_kernel", "whole_ptr", 0, (place(0), place(1)))
    assert faults(_halves_kernel, (2,), whole, whole.view(torch.float16)) == [race]


@pytest.mark.gpu
def test_a_result_that_another_order_changes_is_told(kernel_device: str) -> None:
    def run() -> object:
        x = torch.ones(9)
        dispatch.launch(_neighbour_kernel, (8,), x)
        return x

    with pytest.raises(AssertionError, match="race"):
        assert_order_is_free(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grid_order.Accesses.faults", lambda _: [])  # so that the bits alone tell
        with pytest.raises(AssertionError, match=r"\[False\]"):
            assert_order_is_free(run)


@pytest.mark.gpu
@pytest.mark.parametrize(("loads", "kind"), [(True, "reread"), (False, "twice")])
def test_what_a_program_touches_again_it_must_first_wait_for(
    kernel_device: str, loads: bool, kind: str
) -> None:
    again = Fault(kind, "_again_kernel", "x_ptr", 0, (place(0), place(0)))
    assert faults(_again_kernel, (2,), torch.zeros(32), LOADS=loads, WAITS=False) == [again]
    assert faults(_again_kernel, (2,), torch.zeros(32), LOADS=loads, WAITS=True) == []


@pytest.mark.gpu
def test_two_lanes_that_store_one_element_are_told(kernel_device: str) -> None:
    twice = Fault("twice", "_lanes_kernel", "x_ptr", 0, (place(0), place(0)))
    assert faults(_lanes_kernel, (1,), torch.zeros(4)) == [twice]


@pytest.mark.gpu
def test_accesses_outside_of_the_tensors_are_told_and_change_nothing(kernel_device: str) -> None:
    x, memory = torch.ones(3), torch.zeros(6)
    out = memory[1:5:2]  # elements 1 and 3

    def outside(load: int, store: int) -> list[int]:
        """Where, in elements from the start of x or of the memory of out."""
        found = faults(_beyond_kernel, (1,), x, out, LOAD=load, STORE=store)
        assert all(fault[:3] == ("outside", "_beyond_kernel", "") for fault in found)
        start = x if load else memory
        return [(fault.element - start.data_ptr()) // 4 for fault in found]

    assert outside(0, 0) == outside(0, 2) == []
    assert outside(2, 0) == []
    assert outside(3, 0) == [3]
    assert outside(-1, 0) == [-1]
    memory.zero_()
    assert outside(0, 5) == [6]
    assert outside(0, -2) == [-1]
    assert memory.tolist() == [0] * 6
    assert outside(0, 1) == [2]
    assert outside(0, 4) == [5]


@pytest.mark.gpu
def test_atomics_are_refused(kernel_device: str) -> None:
    with pytest.raises(Exception, match="atomics are not followed"):
        faults(_atomic_kernel, (2,), torch.zeros(1))
