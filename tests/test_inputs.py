"""Packed network inputs and the normalised embedding: kernels against twins, twins against definitions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from extras import require
from kernel_harness import OPS, assert_follows_twin, assert_torch_sees, layouts, outputs_and_gradients
from refusals import says
from torch import Tensor

from brc_fast import kernels
from brc_fast.kernels import inputs, reference
from brc_fast.kernels.runtime.dispatch import Launch, recording
from brc_fast.kernels.runtime.tables import trial

pack_inputs = partial(inputs.pack_inputs, impl="triton")
normalized_embedding = partial(inputs.normalized_embedding, impl="triton")
normalized_embedding_backward = partial(inputs.normalized_embedding_backward, impl="triton")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)


class Size(NamedTuple):
    """rows [..], O, A (0: no actions), D with T tasks (0: no table), the width wanted."""

    rows: tuple[int, ...]
    observation: int
    action: int = 0
    embedding: int = 0
    tasks: int = 0
    width: int | None = None
    norm: str = "l2"


SIZES = [
    Size((9,), 67, 24, 32, 3, 128),  # a critic's, padded; one row more than a tile has
    Size((2, 9), 67, 0, 32, 3, None, "l1"),  # an actor's, rank 3
    Size((7,), 5, 3, width=16),  # one task: no table
    Size((3, 2, 2), 1, 1, 1, 1, 4, "l1"),  # one of everything, rank 4
    Size((5,), 8, 4, 16, 5, 32),  # powers of two: whole blocks, nothing masked
    Size((5,), 17, 5, 33, 4, 57, "l1"),  # one more than a block in each part
    Size((2,), 1030, 3, 5, 2, 1100),  # observations wider than a block
    Size((2,), 3, 1030, 300, 2, 2400, "l1"),  # actions and zeros wider than a block, a wide embedding
    Size((), 4, 2, 3, 2, 9),  # no batch
    Size((4,), 6, width=8),  # zeros alone are added
]


def parts(size: Size) -> tuple[list[Tensor | None], list[Tensor], list[int]]:
    """Observations, actions, table and ids; a seed; the places that get a gradient. Task 0 has no row, but
    where it is the only one."""
    torch.manual_seed(0)
    rows, action, tasks = size.rows, size.action, size.tasks

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    observations = normal(*rows, size.observation)
    actions = normal(*rows, action) if action else None
    table = normal(tasks, size.embedding) if tasks else None
    ids = torch.randint(min(1, tasks - 1), tasks, rows) if tasks else None
    width = size.width or size.observation + action + size.embedding
    wanted = [0] + [1] * bool(action) + [2] * bool(tasks)
    return [observations, actions, table, ids], [normal(*rows, width)], wanted


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_every_gradient_follow_the_twin(kernel_device: str, size: Size, dtype: torch.dtype) -> None:
    given, seeds, wanted = parts(size)
    keywords = {"norm": size.norm, "width": size.width}
    mine, twin = partial(pack_inputs, **keywords), partial(reference.pack_inputs, **keywords)
    results = assert_follows_twin(mine, twin, given, seeds, wanted, dtype, kernel_device)
    out, *grads = results
    used = size.observation + size.action + size.embedding
    assert torch.equal(out[..., : size.observation].cpu(), given[0].to(dtype))
    assert (out[..., used:] == 0.0).all()
    assert torch.equal(grads[0].cpu(), seeds[0][..., : size.observation].to(dtype))
    for place, grad in zip(wanted, grads, strict=True):
        # a row of one number is normalised to +-1 whatever it is
        assert (grad.abs().sum() > 0) or (place == 2 and size.embedding == 1)
    if size.tasks > 1:
        assert (grads[-1][0] == 0.0).all()  # the task without rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_other_dtypes_follow_the_twin_too(kernel_device: str, dtype: torch.dtype) -> None:
    for norm in ("l1", "l2"):
        given, seeds, wanted = parts(SIZES[0])
        mine, twin = (partial(op, norm=norm, width=128) for op in (pack_inputs, reference.pack_inputs))
        assert_follows_twin(mine, twin, given, seeds, wanted, dtype, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_embedding_alone_follows_the_twin(kernel_device: str, norm: str) -> None:
    torch.manual_seed(0)
    table, ids = torch.randn(5, 24, dtype=torch.float64), torch.randint(5, (3, 7))
    table[:, 3] = 0.0  # where the L1 norm has a kink
    seed = torch.randn(3, 7, 24, dtype=torch.float64)
    mine, twin = (partial(op, norm=norm) for op in (normalized_embedding, reference.normalized_embedding))
    for dtype in (torch.float32, torch.bfloat16):
        out, dtable = assert_follows_twin(mine, twin, [table, ids], [seed], [0], dtype, kernel_device)
        assert dtable.abs().sum() > 0
        rounding = torch.finfo(dtype).eps
        assert (out.double().norm(p=int(norm[1]), dim=-1) - 1.0).abs().max() < 24 * rounding
        # e does not change along itself: its gradient is orthogonal to it
        radial = (dtable.double().cpu() * table.to(dtype).double()).sum(-1)
        assert (radial.abs() <= 16 * rounding * dtable.double().cpu().norm(dim=-1) * table.norm(dim=-1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "tasks", "size", "block"),
    [
        (67, 3, 8, 4),  # 9 chunks, the last of 3 rows
        (64, 1, 4, 8),  # one task, whole blocks, a chunk for each
        (81, 5, 3, 16),  # one chunk more than there is room for
        (40, 21, 2, 4),  # so many tasks that one program walks all rows of each
        (2500, 2, 24, 0),  # enough rows for chunks in the block that is usual
    ],
)
def test_many_rows_are_summed_in_chunks(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, rows: int, tasks: int, size: int, block: int
) -> None:
    monkeypatch.setattr(inputs, "processors", lambda device: 10)
    torch.manual_seed(0)
    table, ids = torch.randn(tasks, size, dtype=torch.float64), torch.randint(tasks, (rows,))
    seed = torch.randn(rows, size, dtype=torch.float64)
    with trial("embedding_backward", {"BLOCK_B": block, "num_warps": 4} if block else {}):
        for dtype in (torch.float32, torch.bfloat16):
            runs = [
                assert_follows_twin(
                    normalized_embedding,
                    reference.normalized_embedding,
                    *([table, ids], [seed], [0]),
                    dtype,
                    kernel_device,
                )
                for _ in range(2)
            ]
            assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.gpu
def test_every_layout_of_inputs_and_gradients_gives_the_same(kernel_device: str) -> None:
    torch.manual_seed(0)
    observations = torch.randn(3, 2, 5, device=kernel_device)
    actions = torch.randn(3, 2, 4, device=kernel_device)
    seed = torch.randn(3, 2, 14, device=kernel_device)
    ways = [list(layouts(x)) for x in (observations, actions, seed)]
    tables = list(layouts(torch.randn(4, 3, device=kernel_device)))
    all_ids = torch.tensor([[1, 0], [3, 1], [1, 2]], device=kernel_device)
    ids = [all_ids, all_ids.T.contiguous().T, all_ids[:1].expand(3, 2), all_ids.repeat(1, 2)[:, ::2]]
    assert len(ways[0]) == 42
    for place, (told, x) in enumerate(ways[0]):  # each with different ones of the others
        a, s = (ways[other][(place + 11 * other) % 42][1] for other in (1, 2))
        given = [x, a, tables[place % len(tables)][1], ids[place % 4]]
        pack = partial(pack_inputs, width=14)
        mine = outputs_and_gradients(pack, given, [s], [0, 1, 2])
        twin = outputs_and_gradients(partial(reference.pack_inputs, width=14), given, [s], [0, 1, 2])
        for got, expected in zip(mine, twin, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=f"observations {told}")


@pytest.mark.gpu
def test_columns_of_wider_rows_and_parts_of_different_dtypes_are_packed_in_one_launch(
    kernel_device: str,
) -> None:
    torch.manual_seed(0)
    wide = torch.randn(6, 20, device=kernel_device)
    observations, actions = wide[:, 2:9], wide[:, 11:14].double().requires_grad_()
    table = torch.randn(3, 5, device=kernel_device).half().requires_grad_()
    ids = torch.randint(3, (6,), device=kernel_device, dtype=torch.int32)
    results = []
    for op in (pack_inputs, reference.pack_inputs):
        out = op(observations, actions, table, ids, "l1", width=16, dtype=torch.bfloat16)
        seed = torch.linspace(-1.0, 1.0, 96, device=kernel_device).view(6, 16).bfloat16()
        results.append((out, *torch.autograd.grad(out, (actions, table), seed)))
    kinds = [torch.bfloat16, torch.float64, torch.float16]
    assert [x.dtype for x in results[0]] == kinds
    for mine, twin in zip(*results, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-2, atol=1e-2)
    assert torch.equal(results[0][0][:, :10], torch.cat([observations, actions], 1).bfloat16())
    assert torch.equal(results[0][1], seed[:, 7:10].double())


@pytest.mark.gpu
def test_each_gradient_alone_is_there(kernel_device: str) -> None:
    given, seeds, _ = parts(SIZES[0])
    for wanted in ([0], [1], [2], [1, 2]):
        assert_follows_twin(
            partial(pack_inputs, width=128), partial(reference.pack_inputs, width=128), given, seeds, wanted,
            torch.float32, kernel_device,
        )  # fmt: skip


@pytest.mark.gpu
def test_bad_rows_are_nan_and_stay_alone(kernel_device: str) -> None:
    table = torch.tensor([[3.0, 4.0], [0.0, 0.0], [math.nan, 1.0], [5.0, 12.0]], device=kernel_device)
    observations = torch.zeros(4, 1, device=kernel_device)
    observations[2] = math.inf
    for norm in ("l2", "l1"):
        ids = torch.tensor([0, 1, 2, 3], device=kernel_device)
        out = pack_inputs(observations, None, table, ids, norm)
        twin = reference.pack_inputs(observations, None, table, ids, norm)
        torch.testing.assert_close(out, twin, equal_nan=True)
        assert out.isnan().any(-1).tolist() == [False, True, True, False]
        leaf = table.clone().requires_grad_()
        (mine,) = torch.autograd.grad(normalized_embedding(leaf, ids[[0, 0, 3]], norm).sum(), leaf)
        (expected,) = torch.autograd.grad(
            reference.normalized_embedding(leaf, ids[[0, 0, 3]], norm).sum(), leaf
        )
        torch.testing.assert_close(mine[[0, 3]], expected[[0, 3]])
        assert mine[1].isnan().all()
        assert mine[2].isnan().all()


@pytest.mark.gpu
def test_ids_outside_of_the_table_read_and_write_nothing_of_others(kernel_device: str) -> None:
    table = torch.ones(2, 3, device=kernel_device, requires_grad=True)
    ids = torch.tensor([-1, 0, 2, 2**40, 1], device=kernel_device)
    out = normalized_embedding(table, ids)
    assert out.isnan().all(-1).tolist() == [True, False, True, True, False]
    seed = torch.full((5, 3), math.nan, device=kernel_device)
    seed[1] = torch.tensor([1.0, 0.0, 0.0])
    seed[4] = 0.0
    (grad,) = torch.autograd.grad(out, table, seed)
    third = 1.0 / 3.0
    expected = torch.tensor([[1.0 - third, -third, -third], [0.0, 0.0, 0.0]], device=kernel_device) / 3.0**0.5
    torch.testing.assert_close(grad, expected)


@pytest.mark.gpu
def test_empty_inputs_need_no_launch(kernel_device: str) -> None:
    table = torch.ones(2, 3, device=kernel_device, requires_grad=True)
    for rows in ((0,), (2, 0)):
        leaves = [torch.ones(*rows, size, device=kernel_device, requires_grad=True) for size in (4, 2)]
        ids = torch.zeros(rows, dtype=torch.int64, device=kernel_device)
        out = pack_inputs(*leaves, table, ids, width=12)
        assert out.shape == (*rows, 12)
        *grads, dtable = torch.autograd.grad(out.sum(), (*leaves, table))
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
        assert (dtable == 0.0).all()
    nothing = torch.ones(3, 0, device=kernel_device)
    torch.testing.assert_close(pack_inputs(nothing, table[:, :2][[0, 1, 0]]), table[:, :2][[0, 1, 0]])
    assert pack_inputs(nothing, width=2).tolist() == [[0.0, 0.0]] * 3
    assert pack_inputs(nothing, nothing).shape == (3, 0)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits_and_a_second_derivative_is_refused(kernel_device: str) -> None:
    given, (seed,), _ = parts(SIZES[0])
    given = [x.to(kernel_device) for x in given]
    given[2].requires_grad_()
    grads = []
    for _ in range(2):
        out = pack_inputs(*given, width=128)
        grads.append(
            torch.autograd.grad(out.square(), given[2], seed.to(kernel_device), retain_graph=True)[0]
        )
    assert torch.equal(*grads)
    with pytest.raises(RuntimeError, match=r"no second derivative .*: use kernels.reference."):
        torch.autograd.grad(out.sum(), given[2], create_graph=True)


@pytest.mark.gpu
def test_torchs_own_checks_of_the_ops_pass(kernel_device: str) -> None:
    observations, actions = (torch.randn(4, n, device=kernel_device, requires_grad=True) for n in (3, 2))
    table = torch.randn(2, 5, device=kernel_device, requires_grad=True)
    ids = torch.tensor([0, 1, 1, 0], device=kernel_device)
    pack, backward = OPS.pack_inputs, OPS.normalized_embedding_backward
    torch.library.opcheck(pack, (observations, actions, table, ids, "l2", 12, torch.bfloat16))
    torch.library.opcheck(pack, (None, None, table, ids, "l1", 5, torch.float32))
    torch.library.opcheck(backward, (torch.randn(4, 5, device=kernel_device), table.detach(), ids, "l2"))


@pytest.mark.gpu
def test_compiled_and_transformed_calls_give_the_same(kernel_device: str) -> None:
    torch.manual_seed(0)
    observations, actions = (torch.randn(3, 4, n, device=kernel_device) for n in (5, 2))
    table, ids = torch.randn(3, 6, device=kernel_device), torch.randint(3, (3, 4), device=kernel_device)

    def loss(actions: Tensor, table: Tensor, observations: Tensor, ids: Tensor) -> Tensor:
        packed = pack_inputs(observations, actions, table, ids, width=16)
        return packed.sin().sum() + normalized_embedding(table, ids, "l1").exp().sum()

    def leaves() -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (actions, table)]

    plain, traced = leaves(), leaves()
    value = loss(*plain, observations, ids)
    again = torch.compile(loss, fullgraph=True, backend="aot_eager")(*traced, observations, ids)
    torch.testing.assert_close(again, value)
    grads = torch.autograd.grad(value, plain)
    transformed = torch.func.grad(loss, argnums=(0, 1))(actions, table, observations, ids)
    for other in (torch.autograd.grad(again, traced), transformed):
        for mine, expected in zip(other, grads, strict=True):
            torch.testing.assert_close(mine, expected)
    per_item = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None, 0, 0))
    dactions, dtable = per_item(actions, table, observations, ids)
    torch.testing.assert_close(dactions, grads[0])
    torch.testing.assert_close(dtable.sum(0), grads[1])


# into buffers and without autograd


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("size", [((3, 7), 5, 24), ((9,), 2, 33), ((), 3, 4), ((400,), 2, 8)], ids=str)
def test_the_tables_gradient_without_autograd_follows_its_twin(
    kernel_device: str, size: tuple[tuple[int, ...], int, int], norm: str, dtype: torch.dtype
) -> None:
    rows, tasks, width = size
    torch.manual_seed(0)
    table, ids = torch.randn(tasks, width, dtype=torch.float64), torch.randint(tasks, rows)
    table[0, 1] = 0.0
    networks = (3,) if rows == (400,) else ()
    grad = torch.randn(*networks, *rows, width, dtype=torch.float64)
    mine, twin = (
        partial(op, norm=norm)
        for op in (normalized_embedding_backward, reference.normalized_embedding_backward)
    )
    with trial("embedding_backward", {"BLOCK_B": 16, "num_warps": 4} if rows == (400,) else {}):
        (dtable,) = assert_follows_twin(mine, twin, [grad, table, ids], [], [], dtype, kernel_device)
    assert dtable.abs().sum() > 0


@pytest.mark.gpu
@DTYPES
def test_columns_are_summed_into_a_buffer_of_any_dtype(kernel_device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table, wide = torch.randn(4, 6, device=kernel_device), torch.randn(3, 5, 20, device=kernel_device)
    ids, grad = torch.randint(4, (3, 5), device=kernel_device, dtype=torch.int32), wide[..., 7:13]
    flat = torch.full((50,), math.nan, device=kernel_device, dtype=dtype)
    out = flat[10:34].view(4, 6)
    leaf = table.clone().requires_grad_()
    (expected,) = torch.autograd.grad(normalized_embedding(leaf, ids), leaf, grad)
    with recording() as launches:
        normalized_embedding_backward(grad, table, ids, out=out)
    assert len(launches) == 1
    assert launches[0].arguments[0].data_ptr() == grad.data_ptr()
    assert launches[0].arguments[3].data_ptr() == out.data_ptr()
    version = flat._version
    assert normalized_embedding_backward(grad, leaf, ids, out=out) is out
    assert flat._version > version
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(normalized_embedding_backward(grad, table, ids), expected)
    assert flat.isnan().sum() == 26
    several = wide.repeat(3, 1, 1, 1)[..., 7:13]  # of three networks, in one launch, read in place
    with recording() as launches:
        normalized_embedding_backward(several, table, ids, out=out)
    assert [launch.arguments[0].data_ptr() for launch in launches] == [several.data_ptr()]
    torch.testing.assert_close(normalized_embedding_backward(several, table, ids), 3.0 * expected)
    turned = several.mT.contiguous().mT
    torch.testing.assert_close(normalized_embedding_backward(turned, table, ids), 3.0 * expected)
    none = torch.full_like(table, math.nan)
    assert (normalized_embedding_backward(grad[:0], table, ids[:0], out=none) == 0.0).all()


@pytest.mark.gpu
@DTYPES
def test_inputs_are_packed_into_a_buffer(kernel_device: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        given, _, _ = parts(size)
        given = [x if x is None or not x.is_floating_point() else x.float() for x in given]
        given = [None if x is None else x.to(kernel_device) for x in given]
        plain = pack_inputs(*given, size.norm, width=size.width, dtype=dtype)
        held = torch.full((plain.numel() + 64,), math.nan, device=kernel_device, dtype=dtype)
        out = held[32 : 32 + plain.numel()].view(plain.shape)
        version = held._version
        assert pack_inputs(*given, size.norm, width=size.width, out=out) is out
        assert held._version > version
        assert torch.equal(out, plain)
        assert held.isnan().sum() == 64
        out.fill_(math.nan)
        assert torch.equal(pack_inputs(*given, size.norm, out=out, dtype=dtype), plain)
        twin = reference.pack_inputs(*given, size.norm, out=torch.empty_like(out))
        torch.testing.assert_close(out, twin, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6)
    alone = torch.randn(3, 5, device=kernel_device)
    copy = torch.empty_like(alone)
    assert pack_inputs(alone, out=copy) is copy  # a copy also where nothing is to be done
    assert torch.equal(alone, copy)
    leaf = alone.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(
            pack_inputs(leaf, leaf, out=torch.empty(3, 10, device=kernel_device))[:, :5], alone
        )
    empty = torch.empty(0, 12, device=kernel_device)
    assert pack_inputs(alone[:0], out=empty) is empty


@pytest.mark.gpu
def test_torch_sees_what_is_written(kernel_device: str) -> None:
    """By its own checks, in a compiled call, through a mode, and where there are only shapes."""
    torch.manual_seed(0)
    observations, actions, table, seed = (
        torch.randn(shape, device=kernel_device) for shape in ((4, 3), (4, 2), (2, 5), (4, 5))
    )
    ids = torch.tensor([0, 1, 1, 0], device=kernel_device)
    pack, backward = OPS.pack_inputs_into, OPS.normalized_embedding_backward_into
    out = torch.zeros(4, 12, device=kernel_device)
    torch.library.opcheck(pack, (observations, actions, table, ids, "l2", out))
    torch.library.opcheck(pack, (observations, None, None, None, "l2", out.bfloat16()))
    torch.library.opcheck(backward, (seed, table, ids, "l1", table.clone()))

    def step(observations: Tensor, table: Tensor, ids: Tensor, packed: Tensor, flat: Tensor) -> Tensor:
        pack_inputs(observations, None, table, ids, out=packed)
        dtable = flat[3:13].view(2, 5)
        normalized_embedding_backward(packed[:, 3:8] * 2.0 + 1.0, table, ids, out=dtable)
        return packed.sum() + dtable.sum()

    def fresh() -> list[Tensor]:
        zeros = [torch.zeros(shape, device=kernel_device) for shape in ((4, 9), (20,))]
        return [observations, table, ids, *zeros]

    written = assert_torch_sees(step, fresh, "pack_inputs_into", "normalized_embedding_backward_into")
    assert (written[4][3:13] != 0.0).all()


def launches_of(rows: int, wanted: list[int], frozen: bool = False) -> list[Launch]:
    """What is launched for inputs [rows, 6 + 3 + 4] of 2 tasks, forward and backward."""
    require("triton")
    given = [torch.zeros(rows, 6), torch.zeros(rows, 3), torch.zeros(2, 4).bfloat16()]
    leaves = [x.requires_grad_(place in wanted) for place, x in enumerate(given)]
    with recording() as launches:
        table = leaves[2].detach() if frozen else leaves[2]
        out = kernels.pack_inputs(*leaves[:2], table, torch.zeros(rows, dtype=torch.int64), width=16)
        if wanted:
            torch.autograd.grad(out, [leaves[place] for place in wanted], torch.ones_like(out))
    return launches


def test_one_launch_packs_and_one_more_gives_the_tables_gradient() -> None:
    def names(*arguments: Any, **keywords: Any) -> list[str]:
        return [launch.kernel.fn.__name__ for launch in launches_of(*arguments, **keywords)]

    pack, backward = "_pack_inputs_kernel", "_embedding_backward_kernel"
    assert names(100, []) == [pack]
    assert names(100, [0, 1]) == [pack]  # slices
    assert names(100, [1], frozen=True) == [pack]
    assert names(100, [1, 2]) == [pack, backward]
    assert names(100_000, [1, 2]) == [pack, backward, backward]


def test_the_sums_of_chunks_are_kept_in_float32_for_a_table_in_bfloat16() -> None:
    _, chunks, total = launches_of(100_000, [2])
    sums, dtable = chunks.arguments[3], total.arguments[3]
    assert sums is total.arguments[0]
    assert (sums.dtype, dtable.dtype) == (torch.float32, torch.bfloat16)


def test_the_gradient_of_actions_is_a_view_that_costs_nothing() -> None:
    require("triton")
    observations, actions = torch.zeros(4, 6), torch.zeros(4, 3, requires_grad=True)
    seed = torch.arange(64.0).view(4, 16)
    with recording():
        out = kernels.pack_inputs(observations, actions, width=16)
        (grad,) = torch.autograd.grad(out, actions, seed)
    assert grad.data_ptr() == seed[:, 6:].data_ptr()
    assert torch.equal(grad, seed[:, 6:9])


@pytest.mark.parametrize("rows", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("l1", 1)])
def test_the_twin_is_the_concatenation_row_by_row(rows: tuple[int, ...], norm: str, order: int) -> None:
    torch.manual_seed(0)
    observations, actions = (torch.randn(*rows, n, dtype=torch.float64) for n in (3, 2))
    table, ids = torch.randn(4, 5, dtype=torch.float64), torch.randint(4, rows)
    for op in (reference.pack_inputs, kernels.pack_inputs):
        packed = op(observations, actions, table, ids, norm, width=12, dtype=torch.float32)
        assert packed.dtype == torch.float32
        assert packed.shape == (*rows, 12)
        flat = zip(observations.reshape(-1, 3), actions.reshape(-1, 2), ids.flatten(), strict=True)
        for row, (x, a, task) in zip(packed.reshape(-1, 12), flat, strict=True):
            e = table[task]
            length = e.abs().pow(order).sum() ** (1.0 / order)
            expected = [*x.tolist(), *a.tolist(), *(e / length).tolist(), 0.0, 0.0]
            torch.testing.assert_close(row, torch.tensor(expected))


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("rows", [(), (4,), (2, 3)], ids=str)
def test_the_twin_of_the_tables_gradient_is_autograds(rows: tuple[int, ...], norm: str) -> None:
    torch.manual_seed(0)
    table, ids = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randint(4, rows)
    grad = torch.randn(*rows, 9, dtype=torch.float64)[..., 2:7]
    (expected,) = torch.autograd.grad(reference.normalized_embedding(table, ids, norm), table, grad)
    for op in (reference.normalized_embedding_backward, kernels.normalized_embedding_backward):
        dtable = op(grad, table, ids, norm)
        assert not dtable.requires_grad
        torch.testing.assert_close(dtable, expected)
        out = torch.empty(4, 5)
        assert op(grad, table, ids, norm, out=out) is out
        torch.testing.assert_close(out, expected.float())
        low = op(grad.bfloat16(), table.bfloat16(), ids, norm)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.double(), expected, rtol=0.1, atol=0.1)
        parts = torch.stack([0.25 * grad, 0.75 * grad])  # of two networks, which add up
        torch.testing.assert_close(op(parts, table, ids, norm), expected)


def test_on_a_cpu_inputs_are_packed_into_a_buffer() -> None:
    torch.manual_seed(0)
    for size in SIZES:
        (observations, actions, table, ids), _, _ = parts(size)
        plain = kernels.pack_inputs(observations, actions, table, ids, size.norm, width=size.width)
        for op in (kernels.pack_inputs, reference.pack_inputs):
            for kind in (torch.float64, torch.float32, torch.bfloat16):
                out = torch.full(plain.shape, math.nan, dtype=kind)
                assert op(observations, actions, table, ids, size.norm, out=out) is out
                assert torch.equal(out, plain.to(kind))


def test_what_cannot_be_written_is_refused() -> None:
    table, ids, grad = torch.ones(5, 4), torch.zeros(2).long(), torch.zeros(2, 4)
    observations, leaf = torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True)
    gaps = torch.zeros(2, 6)[:, ::2]
    buffer = torch.zeros(2, 3)
    packed: list[tuple[dict[str, Any], type, str]] = [
        ({"out": grad, "observations": leaf}, RuntimeError, "out has no gradient: detach"),
        ({"out": table}, ValueError, "out ... [2, 4], got [5, 4]"),
        ({"out": buffer, "width": 4}, ValueError, "out ... [2, 4], got [2, 3]"),
        ({"out": buffer[:, :2]}, ValueError, "width ... O + A + D = 3 = 3, got 2"),
        ({"out": buffer[0, 0]}, ValueError, "out ... [2, 3], got []"),
        ({"out": gaps}, ValueError, "out ... contiguous, got strides [6, 2]"),
        ({"out": buffer.long()}, TypeError, "out must be of dtype ... got torch.int64"),
        ({"out": buffer.to("meta")}, ValueError, "out ... on cpu ... got meta"),
        ({"out": buffer, "dtype": torch.float64}, TypeError, "dtype must be that of out, torch.float32"),
    ]
    for change, error, told in packed:
        with pytest.raises(error, match=says(told)):
            kernels.pack_inputs(**({"observations": observations} | change))
    given: dict[str, Any] = {"grad": grad, "table": table, "task_ids": ids}
    backward: list[tuple[dict[str, Any], type, str]] = [
        ({"grad": grad[:, :3]}, ValueError, "grad ... [2, 4], got [2, 3]"),
        ({"grad": grad[:1]}, ValueError, "grad ... [2, 4], got [1, 4]"),
        ({"norm": "l3"}, ValueError, "norm ... l2, l1, got 'l3'"),
        ({"task_ids": ids.float()}, TypeError, "task_ids must be of dtype"),
        ({"task_ids": ids + 5}, IndexError, "out of"),
        ({"out": torch.zeros(4, 4)}, ValueError, "out ... [T, D] = [5, 4], got [4, 4]"),
        ({"out": torch.zeros(4, 5).T}, ValueError, "out ... contiguous, got strides [1, 5]"),
        ({"out": torch.zeros(5, 4).int()}, TypeError, "out must be of dtype ... got torch.int32"),
        ({"impl": "triton"}, RuntimeError, "kernels were asked for"),
    ]
    for change, error, told in backward:
        with pytest.raises(error, match=says(told)):
            kernels.normalized_embedding_backward(**(given | change))


def test_observations_alone_come_back_as_they_are() -> None:
    observations = torch.randn(2, 3)
    for op in (kernels.pack_inputs, reference.pack_inputs):
        assert op(observations) is observations
        assert op(observations, width=3, dtype=torch.float32) is observations
        assert op(observations, width=5).shape == (2, 5)
        assert op(observations, dtype=torch.float64).dtype == torch.float64
    assert kernels.pack_inputs(observations, None, None, torch.zeros(2).long()) is observations


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"actions": torch.zeros(3, 2)}, ValueError, "actions ... [2] of the observations, got [3, 2]"),
        ({"actions": torch.zeros(())}, ValueError, "actions ... got []"),
        ({"observations": torch.zeros(())}, ValueError, "observations ... [.., O], got []"),
        ({"table": torch.zeros(4)}, ValueError, "table ... [T, D], got [4]"),
        ({"task_ids": None}, ValueError, "task_ids [B] are needed"),
        ({"task_ids": torch.zeros(3).long()}, ValueError, "task_ids ... [2] of the observations, got [3]"),
        ({"task_ids": torch.zeros(2)}, TypeError, "task_ids ... int64 or torch.int32, got torch.float32"),
        ({"task_ids": torch.zeros(2, device="meta").long()}, ValueError, "task_ids ... on cpu ... got meta"),
        ({"norm": "max"}, ValueError, "norm ... l2, l1, got 'max'"),
        ({"width": 8}, ValueError, "width ... O + A + D = 3 + 2 + 4 = 9, got 8"),
        ({"dtype": torch.int64}, TypeError, "dtype ... torch.float32, ... got torch.int64"),
        ({"impl": "triton"}, RuntimeError, "kernels were asked for"),
        ({"task_ids": torch.tensor([0, 5])}, IndexError, "out of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], error: type, told: str) -> None:
    given: dict[str, object] = {
        "observations": torch.zeros(2, 3),
        "actions": torch.zeros(2, 2),
        "table": torch.ones(5, 4),
        "task_ids": torch.zeros(2).long(),
    }
    with pytest.raises(error, match=says(told)):
        kernels.pack_inputs(**(given | changed))  # type: ignore[arg-type]


def test_the_embedding_alone_refuses_the_same() -> None:
    table, ids = torch.ones(5, 4), torch.zeros(2).long()
    with pytest.raises(ValueError, match="norm must be one of l2, l1, got 'l3'"):
        kernels.normalized_embedding(table, ids, "l3")
    with pytest.raises(TypeError, match="task_ids must be of dtype"):
        kernels.normalized_embedding(table, ids.float())
    with pytest.raises(RuntimeError, match="kernels were asked for"):
        kernels.normalized_embedding(table, ids, impl="triton")
    torch.testing.assert_close(kernels.normalized_embedding(table, ids), torch.full((2, 4), 0.5))
