"""The gathers against plain indexing, and their kernels against the twins.

The tests of the kernels are marked gpu; test_interpreted.py sends them through Triton's interpreter. Others
compile the kernels for a GPU that is not there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from extras import require
from kernel_harness import OPS
from refusals import says
from torch import Tensor

from brc_fast import kernels
from brc_fast.kernels import gather, reference
from brc_fast.kernels.runtime import dispatch, tables

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
EVERY_DTYPE = pytest.mark.parametrize("dtype", gather.DTYPES, ids=str)
# one element; fewer than a vector; no multiple of one; fills a program almost
WIDTHS = pytest.mark.parametrize("width", [1, 3, 67, 1000])
CASTS = [(a, b) for a in gather.FLOATS for b in gather.FLOATS if a != b]


@pytest.fixture
def device(kernel_device: str) -> Iterator[str]:
    """Where the kernels run, and nothing but kernels does."""
    with kernels.use("triton"):
        yield kernel_device


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random; floats from 1e-8 to 1e8, so that a cast to float16 meets its subnormal numbers and infinity."""
    rng = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        size = 10.0 ** (16.0 * torch.rand(shape, generator=rng) - 8.0)
        return (size * torch.randn(shape, generator=rng).sign()).to(dtype)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=rng).bool()
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, generator=rng, dtype=torch.int64).to(dtype)


def store(
    width: int, dtype: torch.dtype, *, first: int = 0, wide: int = 0, wanted: int = 150
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and side as columns `first` onward of rows of width `wide`, and an index into both."""
    wide = wide or first + width
    rows, side = (values((n, wide), dtype, n)[:, first : first + width] for n in (40, 7))
    rng = torch.Generator().manual_seed(2)
    return rows, side, torch.randint(-7, 40, (wanted,), generator=rng)


def one_by_one(rows: Tensor, side: Tensor, index: Tensor) -> Tensor:
    return torch.stack([rows[i] if i >= 0 else side[-1 - i] for i in index.tolist()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = BITS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def gather_into_poison(rows: Tensor, index: Tensor, dtype: torch.dtype, side: Tensor | None) -> Tensor:
    """The gather into the middle of a buffer of 0xFF (NaN in a float), whose first and last row must stay."""
    row_bytes = rows.shape[1] * dtype.itemsize
    buffer = torch.full((len(index) + 2, row_bytes), 0xFF, dtype=torch.uint8, device=rows.device)
    out = buffer.view(dtype)[1:-1]
    assert gather.gather_rows(rows, index, side=side, out=out, dtype=dtype) is out
    assert (buffer[[0, -1]] == 0xFF).all()
    return out


def check_gather(device: str, rows: Tensor, side: Tensor | None, index: Tensor, dtype: torch.dtype) -> None:
    """The gather gives the bits of the twin on the CPU, with and without `out`."""
    expected = reference.gather_rows(rows, index, side=side, dtype=dtype)
    there = [None if t is None else strided_to(device, t) for t in (rows, side)]
    place = index.to(device)
    assert same_bits(gather_into_poison(there[0], place, dtype, there[1]).cpu(), expected)
    assert same_bits(gather.gather_rows(there[0], place, side=there[1], dtype=dtype).cpu(), expected)


def strided_to(device: str, x: Tensor) -> Tensor:
    """A copy on the device with the strides and the offset of `x`; a plain copy would close the gaps."""
    whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(device)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


# the twins


@EVERY_DTYPE
@WIDTHS
def test_gathered_rows_are_those_of_plain_indexing(dtype: torch.dtype, width: int) -> None:
    rows, side, index = store(width, dtype, first=2, wide=width + 5)
    expected = one_by_one(rows, side, index)
    assert same_bits(reference.gather_rows(rows, index, side=side), expected)
    assert same_bits(reference.gather_rows(rows, index.abs()), one_by_one(rows, side, index.abs()))
    out = torch.zeros_like(expected)
    assert reference.gather_rows(rows, index, side=side, out=out) is out
    assert same_bits(out, expected)


def test_nothing_has_a_gradient_whatever_the_store_wants() -> None:
    rows, side, index = store(3, torch.float32)
    expected = one_by_one(rows, side, index)
    rows.requires_grad_(), side.requires_grad_()
    out = torch.zeros_like(expected)
    for given in (None, out):
        gathered = gather.gather_rows(rows, index, side=side, out=given)
        assert same_bits(gathered, expected)
        assert not gathered.requires_grad
    one = torch.ones(1, requires_grad=True)
    rewards = gather.n_step_rewards(rows[:, 0], index.abs().view(-1, 1), one, scale=one, task_ids=index * 0)
    assert not rewards.requires_grad


@pytest.mark.parametrize(("dtype", "to"), CASTS, ids=str)
def test_gathered_rows_are_cast_once(dtype: torch.dtype, to: torch.dtype) -> None:
    rows, side, index = store(67, dtype)
    expected = one_by_one(rows, side, index).to(to)
    assert same_bits(reference.gather_rows(rows, index, side=side, dtype=to), expected)
    out = torch.zeros_like(expected)
    assert reference.gather_rows(rows, index, side=side, dtype=to, out=out) is out
    assert same_bits(out, expected)


def test_a_cpu_is_served_without_triton_and_refuses_an_index_outside() -> None:
    rows, _, _ = store(3, torch.float32)
    assert torch.equal(gather.gather_rows(rows, torch.tensor([39, 0])), rows[[39, 0]])
    rewards = gather.n_step_rewards(rows[:, 1], torch.tensor([[7], [-1]]), torch.ones(1))
    assert torch.equal(rewards, torch.stack([rows[7, 1], torch.tensor(0.0)]))
    for outside in (-1, 40):
        with pytest.raises(IndexError):
            reference.gather_rows(rows, torch.tensor([outside]))


def transitions(steps: int, wanted: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rewards as a column of wider rows, n-step indices that end early, weights, scale, task ids."""
    rng = torch.Generator().manual_seed(steps)
    wide = torch.randn(51, 6, generator=rng)
    wide[0] = math.nan  # what index -1 would read
    index = torch.randint(50, (wanted, steps), generator=rng)
    index[torch.arange(steps) >= torch.randint(1, steps + 1, (wanted, 1), generator=rng)] = -1
    scale = torch.tensor([0.3, math.inf, 7.0])
    return wide[1:, 4], index, 0.97 ** torch.arange(steps), scale, torch.randint(3, (wanted,), generator=rng)


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("scaled", [False, True])
def test_n_step_rewards_are_the_sum_rounded_at_every_step(steps: int, scaled: bool) -> None:
    rewards, index, weights, scale, task_ids = transitions(steps)
    expected = np.zeros(len(index), np.float32)
    for m, places in enumerate(index.tolist()):
        for weight, place in zip(weights.numpy(), places, strict=True):
            expected[m] += weight * (rewards[place].numpy() if place >= 0 else np.float32(0))
        if scaled:
            expected[m] /= scale.numpy()[task_ids[m]]
    options = {"scale": scale, "task_ids": task_ids} if scaled else {}
    ours = reference.n_step_rewards(rewards, index, weights, **options)
    assert same_bits(ours, torch.from_numpy(expected))
    if scaled:
        assert (ours[task_ids == 1] == 0).all()
        assert (ours[task_ids != 1] != 0).all()
    elif steps == 1:
        assert torch.equal(ours, rewards[index[:, 0]])


ZEROS = torch.tensor([-0.0, 0.0, 2.0])
ZEROS_INDEX = torch.tensor([[0, -1], [0, 0], [0, 1], [1, 0], [-1, -1], [0, 2], [-1, 0]])
SUMS_OF_ZEROS = torch.tensor([-0.0, -0.0, 0.0, 0.0, 0.0, 1.0, 0.0])


def test_a_sum_of_minus_zeros_keeps_its_sign() -> None:
    assert same_bits(reference.n_step_rewards(ZEROS, ZEROS_INDEX, torch.tensor([1.0, 0.5])), SUMS_OF_ZEROS)


# the kernels


@pytest.mark.gpu
def test_the_n_step_kernel_keeps_the_sign_of_minus_zero(device: str) -> None:
    place = (value.to(device) for value in (ZEROS, ZEROS_INDEX, torch.tensor([1.0, 0.5])))
    assert same_bits(gather.n_step_rewards(*place).cpu(), SUMS_OF_ZEROS)


@pytest.mark.gpu
@EVERY_DTYPE
@WIDTHS
def test_the_gather_kernel_copies_what_its_twin_copies(device: str, dtype: torch.dtype, width: int) -> None:
    rows, side, index = store(width, dtype, first=1, wide=width + 3, wanted=150 if width < 10 else 9)
    if dtype.is_floating_point:
        rows[::5, 0] = math.nan
    check_gather(device, rows, side, index, dtype)
    check_gather(device, rows, None, index.abs(), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "to"), CASTS, ids=str)
@pytest.mark.parametrize(("first", "width"), [(0, 64), (3, 67)])
def test_the_gather_kernel_rounds_as_its_twin(
    device: str, dtype: torch.dtype, to: torch.dtype, first: int, width: int
) -> None:
    rows, side, index = store(width, dtype, first=first, wide=128, wanted=30)
    check_gather(device, rows, side, index, to)
    check_gather(device, rows, None, index.abs(), to)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [0, 1, 2, 4, 8, 16])  # bytes into a word of 8 and a vector of 16
@pytest.mark.parametrize(
    "width", [24, 32, 5000]
)  # 5000 bytes as words of 8, and more than a program as bytes
def test_the_gather_kernel_takes_rows_that_start_anywhere(device: str, first: int, width: int) -> None:
    rows, side, index = store(width, torch.uint8, first=first, wide=5056, wanted=9)
    check_gather(device, rows, side, index, torch.uint8)
    check_gather(device, rows, None, index.abs(), torch.uint8)


@pytest.mark.gpu
def test_the_gather_kernel_reads_rows_beyond_two_to_the_31_elements(device: str) -> None:
    distance = 2**20 + 1  # odd: the bytes cannot be taken as wider words
    whole = torch.empty(2049 * distance + 64, dtype=torch.uint8, device=device)
    rows = whole.as_strided((2050, 63), (distance, 1))
    places = torch.tensor([2049, 0, 2048, 7])
    expected = values((4, 63), torch.uint8, 0)
    rows[places.to(device)] = expected.to(device)
    assert torch.equal(gather.gather_rows(rows, places.to(device)).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("wanted", [1, 300])
def test_the_n_step_kernel_gives_the_bits_of_its_twin(device: str, steps: int, wanted: int) -> None:
    rewards, index, weights, scale, task_ids = transitions(steps, wanted)
    place = (strided_to(device, rewards), index.to(device), weights.to(device))
    plain = reference.n_step_rewards(rewards, index, weights)
    assert same_bits(gather.n_step_rewards(*place).cpu(), plain)
    gaps = (place[0], place[1].T.contiguous().T, place[2].repeat_interleave(2)[::2])
    assert same_bits(gather.n_step_rewards(*gaps).cpu(), plain)
    ours = gather.n_step_rewards(*place, scale=scale.to(device), task_ids=task_ids.to(device))
    twin = reference.n_step_rewards(rewards, index, weights, scale=scale, task_ids=task_ids)
    assert same_bits(ours.cpu(), twin)


@pytest.mark.gpu
def test_nothing_wanted_gives_nothing(device: str) -> None:
    rows, side, _ = (x.to(device) for x in store(3, torch.float32))
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert gather.gather_rows(rows, none, side=side, dtype=torch.float16).shape == (0, 3)
    assert gather.gather_rows(rows[:, :0], none.new_zeros(4)).shape == (4, 0)
    assert gather.n_step_rewards(rows[:, 0], none.view(0, 3), rows.new_ones(3)).shape == (0,)


@pytest.mark.gpu
def test_torch_sees_what_a_gather_overwrites(device: str) -> None:
    rows, side, index = (x.to(device) for x in store(3, torch.float32))
    out = torch.zeros(len(index), 3, device=device)
    leaf = torch.ones(3, device=device, requires_grad=True)
    total = (leaf * out).sum()
    gather.gather_rows(rows, index, side=side, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.gpu
def test_the_gathers_are_sound_ops_of_torch(device: str) -> None:
    rows, side, index = (x.to(device) for x in store(3, torch.float32))
    places, weights = index.abs().view(-1, 3), rows.new_ones(3)
    scale, tasks = rows.new_full((2,), 0.5), places[:, 0] % 2
    out = torch.zeros(len(index), 3, device=device)
    for op, arguments in (
        (OPS.gather_rows, (rows, index, side, torch.float16)),
        (OPS.gather_rows, (rows, index.abs(), None, torch.float32)),
        (OPS.gather_rows_into, (rows, index, side, out)),
        (OPS.n_step_rewards, (rows[:, 1], places, weights, scale, tasks)),
        (OPS.n_step_rewards, (rows[:, 1], places, weights, None, None)),
    ):
        torch.library.opcheck(op, arguments)

    def both(rows: Tensor) -> tuple[Tensor, Tensor]:
        rewards = gather.n_step_rewards(rows[:, 1], places, weights, scale=scale, task_ids=tasks)
        return gather.gather_rows(rows, index, side=side), rewards

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    mapped = torch.func.vmap(both)(torch.stack([rows, 2.0 * rows]))
    for mine, again, plain in zip(compiled(rows), mapped, both(rows), strict=True):
        assert same_bits(mine, plain)
        assert same_bits(again[0], plain)


@pytest.mark.gpu
def test_a_graph_replays_the_gathers_with_new_indices(device: str) -> None:
    if device == "cpu":
        pytest.skip("a CPU has no CUDA graphs")
    rows, side, index = (x.to(device) for x in store(67, torch.float32))
    places, weights = index.abs().view(-1, 3), rows.new_ones(3)
    calls = [
        lambda: gather.gather_rows(rows, index, side=side),
        lambda: gather.n_step_rewards(rows[:, 1], places, weights),
    ]
    for call in calls:  # compiles outside of the capture
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    for tensor in (index, places):
        tensor.copy_(tensor.flip(0))
    graph.replay()
    for output, call in zip(outputs, calls, strict=True):
        assert torch.equal(output, call())


def compiled(call: Callable[[], object]) -> Any:
    """What the one kernel that `call` launches becomes on an H200, without one."""
    require("triton")
    if dispatch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 puts the interpreter in the compiler's place")
    from brc_fast.kernels.tools import aot

    with kernels.use("triton"), tables.assume("sm_90"), dispatch.recording() as launches:
        call()
    (launch,) = launches
    code = aot.compile_launch(launch, "90")
    assert aot.inspect(code, "90")["spilled"] == 0
    return code.asm


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("first", [0, 1])  # elements into a vector
@pytest.mark.parametrize(
    ("dtype", "to"), [(torch.uint8, torch.uint8), (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("width", [128, 8192])  # several rows to a program, several programs to a row
def test_the_gather_kernel_compiles_for_an_h200_without_spills_and_with_wide_loads(
    width: int, dtype: torch.dtype, to: torch.dtype, first: int, beside: bool
) -> None:
    rows = torch.zeros(40, width + 128, dtype=dtype)[:, first : first + width]
    index = torch.zeros(16, dtype=torch.int64)
    side = rows if beside else None
    asm = compiled(lambda: gather.gather_rows(rows, index, side=side, dtype=to))
    if first == 0:
        assert asm["sass"].count("LDG.E.128") >= 1 + beside


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_n_step_kernel_compiles_for_an_h200_without_spills_or_fused_sums(
    steps: int, scaled: bool
) -> None:
    rewards, index, weights, scale, task_ids = transitions(steps)
    options = {"scale": scale, "task_ids": task_ids} if scaled else {}
    asm = compiled(lambda: gather.n_step_rewards(rewards, index, weights, **options))
    assert not re.search(r"\bfma\.", asm["ptx"])
    assert ("div.rn.f32" in asm["ptx"]) == scaled


# refusals

ROWS, INDEX = torch.zeros(4, 6), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"rows": ROWS[0]}, ValueError, "rows ... [R, W], got [6]"),
        ({"rows": ROWS[:0]}, ValueError, "rows ... R >= 1, got [0, 6]"),
        ({"rows": ROWS.T}, ValueError, "row of rows ... contiguous, got strides [1, 6]"),
        ({"rows": ROWS.double()}, TypeError, "rows ... dtypes ... torch.float32 ... got torch.float64"),
        ({"index": INDEX.int()}, TypeError, "index ... torch.int64, got torch.int32"),
        ({"index": INDEX[:, None]}, ValueError, "index ... [M], got [5, 1]"),
        ({"index": INDEX.to("meta")}, ValueError, "index ... on cpu ... got meta"),
        ({"side": ROWS[:, 1:]}, ValueError, "side ... W = 6, got [4, 5]"),
        ({"side": ROWS.half()}, TypeError, "side ... torch.float32, got torch.float16"),
        ({"side": torch.zeros(6, 2).T}, ValueError, "row of side ... contiguous, got strides [1, 2]"),
        ({"out": torch.zeros(4, 6)}, ValueError, "out ... M = 5, W = 6, got [4, 6]"),
        ({"out": torch.zeros(6, 5).T}, ValueError, "out ... contiguous, got strides [1, 5]"),
        ({"out": torch.zeros(5, 6), "dtype": torch.float16}, TypeError, "out ... float16, got torch.float32"),
        ({"dtype": torch.int32}, TypeError, "dtype must be that of rows ... int32 for torch.float32"),
        (
            {"rows": ROWS.int(), "dtype": torch.float32},
            TypeError,
            "dtype must be that of rows ... for torch.int32",
        ),
    ],
)
def test_a_gather_refuses_what_does_not_fit(change: dict[str, Any], error: type, told: str) -> None:
    with pytest.raises(error, match=says(told)):
        gather.gather_rows(**{"rows": ROWS, "index": INDEX} | change)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"rewards": ROWS}, ValueError, "rewards ... [R], got [4, 6]"),
        ({"rewards": ROWS[:0, 0]}, ValueError, "rewards ... R >= 1, got [0]"),
        ({"rewards": ROWS[0].double()}, TypeError, "rewards ... torch.float32, got torch.float64"),
        ({"index": INDEX}, ValueError, "index ... [M, n], got [5]"),
        ({"weights": torch.ones(2)}, ValueError, "weights ... n = 3, got [2]"),
        ({"task_ids": None}, ValueError, "scale needs task_ids ... M = 5, got None"),
        ({"task_ids": INDEX[1:]}, ValueError, "task_ids ... M = 5, got [4]"),
        ({"task_ids": INDEX.int()}, TypeError, "task_ids ... torch.int64, got torch.int32"),
        ({"scale": torch.ones(())}, ValueError, "scale ... [T], got []"),
        ({"scale": torch.ones(2, device="meta")}, ValueError, "scale ... on cpu ... got meta"),
    ],
)
def test_n_step_rewards_refuse_what_does_not_fit(change: dict[str, Any], error: type, told: str) -> None:
    fitting = {"rewards": ROWS[0], "index": INDEX[:, None].expand(-1, 3), "weights": torch.ones(3)}
    fitting |= {"scale": torch.ones(2), "task_ids": INDEX}
    assert gather.n_step_rewards(**fitting).shape == (5,)
    with pytest.raises(error, match=says(told)):
        gather.n_step_rewards(**fitting | change)
