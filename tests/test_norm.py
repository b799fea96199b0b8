"""Bias, LayerNorm and ReLU or residual: the twin against the formula, the kernels against the twin."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from kernel_harness import OPS, assert_close_to_truth, assert_follows_twin, layouts, outputs_and_gradients
from refusals import says
from torch import Tensor

from brc_fast.kernels import norm, reference
from brc_fast.kernels.norm import bias_layer_norm
from brc_fast.kernels.runtime import dispatch, tables

FLOAT32, FLOAT64 = torch.float32, torch.float64
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
NAMES = ("out", "dx", "dbias", "dweight", "dshift", "dresidual")
# Blocks of 32 columns, which rows of more columns do not fit into.
NARROW = {
    "norm_backward": {"BLOCK_H": 32, "BLOCK_ROWS": 8},
    "norm_frozen": {"BLOCK_H": 32, "BLOCK_ROWS": 8},
    "norm_sums": {"BLOCK_H": 32, "BLOCK_ROWS": 8},
}


def arguments(
    shape: tuple[int, ...], of_parameters: tuple[int, ...], dtype: torch.dtype = FLOAT64, device: str = "cpu"
) -> tuple[list[Tensor], Tensor]:
    """x, bias, weight, shift and residual; then a gradient of the output."""
    torch.manual_seed(0)
    x, residual, seed = (torch.randn(shape, dtype=dtype) for _ in range(3))
    bias, weight, shift = (torch.randn(of_parameters, dtype=dtype) for _ in range(3))
    return [t.to(device) for t in (x, bias, weight + 0.5, shift, residual)], seed.to(device)


def an_op(function: Callable[..., Tensor], relu: bool, **more: Any) -> Callable[..., Tensor]:
    """The op with all of its tensors by position."""

    def op(x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, residual: Tensor | None = None) -> Tensor:
        return function(x, bias, weight, shift, residual=residual, relu=relu, **more)

    return op


def by_kernels(relu: bool) -> Callable[..., Tensor]:
    return an_op(bias_layer_norm, relu, impl="triton")


@contextmanager
def narrow_blocks() -> Iterator[None]:
    with ExitStack() as stack:
        for kernel, config in NARROW.items():
            stack.enter_context(tables.trial(kernel, config))
        yield


def formula(h: Tensor, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm of one row, term by term."""
    mean = sum(h.tolist()) / len(h)
    variance = sum((value - mean) ** 2 for value in h.tolist()) / len(h)
    return weight * (h - mean) / (variance + eps) ** 0.5 + shift


# The twin.


@pytest.mark.parametrize(
    ("shape", "of_parameters"),
    [
        ((5,), (5,)),
        ((2, 5), (5,)),
        ((3, 2, 5), (5,)),
        ((3, 5), (3, 5)),
        ((3, 2, 5), (3, 5)),
        ((3, 2, 2, 5), (3, 5)),
    ],
)
@pytest.mark.parametrize(("relu", "skips"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_twin_is_the_formula_row_by_row(
    shape: tuple[int, ...], of_parameters: tuple[int, ...], relu: bool, skips: bool
) -> None:
    (x, bias, weight, shift, residual), _ = arguments(shape, of_parameters)
    out = reference.bias_layer_norm(
        x, bias, weight, shift, residual=residual if skips else None, relu=relu, eps=0.1
    )
    assert out.shape == x.shape
    for index in itertools.product(*map(range, shape[:-1])):
        network = index[:1] if len(of_parameters) == 2 else ()
        expected = formula(x[index] + bias[network], weight[network], shift[network], 0.1)
        expected = expected.clamp_min(0.0) if relu else expected
        torch.testing.assert_close(out[index], expected + residual[index] if skips else expected)


def test_the_twin_takes_as_many_leading_axes_as_its_parameters_have() -> None:
    (x, bias, weight, shift, _), _ = arguments((2, 3, 4, 5), (2, 3, 5))
    out = reference.bias_layer_norm(x, bias, weight, shift)
    for e, m in itertools.product(range(2), range(3)):
        torch.testing.assert_close(
            out[e, m], reference.bias_layer_norm(x[e, m], bias[e, m], weight[e, m], shift[e, m])
        )


def test_the_twin_returns_the_dtype_of_x_whatever_its_parameters_are() -> None:
    (x, bias, weight, shift, residual), _ = arguments((2, 3, 8), (2, 8))
    exact = reference.bias_layer_norm(x, bias, weight, shift, residual=residual)
    out = reference.bias_layer_norm(
        x.bfloat16(), bias.float(), weight.float(), shift.float(), residual=residual.bfloat16()
    )
    assert out.dtype == BFLOAT16
    torch.testing.assert_close(out.double(), exact, rtol=0.03, atol=0.03)


def test_on_a_cpu_the_op_is_its_twin_bit_for_bit() -> None:
    (x, bias, weight, shift, residual), _ = arguments((2, 3, 33), (2, 33), FLOAT32)
    for relu, skip in itertools.product((False, True), (None, residual)):
        mine = bias_layer_norm(x, bias, weight, shift, residual=skip, relu=relu, eps=1e-3)
        twin = reference.bias_layer_norm(x, bias, weight, shift, residual=skip, relu=relu, eps=1e-3)
        assert torch.equal(mine, twin)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"x": ()}, "x ... [.., H], got []"),
        ({"bias": (7,)}, "bias ... H = 8, like the last axis of x, got [7]"),
        ({"bias": (2, 1, 8)}, "bias ... H = 8 ... got [2, 1, 8]"),
        ({"weight": (8,)}, "weight ... shape of bias, [2, 8], got [8]"),
        ({"shift": (3, 8)}, "shift ... shape of bias, [2, 8], got [3, 8]"),
        ({"x": (3, 8)}, "x ... E = 2 for parameters [E, H], got [3, 8]"),
        ({"x": (8,)}, "x ... E = 2 for parameters [E, H], got [8]"),
        ({"residual": (2, 1, 8)}, "residual ... shape of x, [2, 3, 8], got [2, 1, 8]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, tuple[int, ...]], told: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"x": (2, 3, 8), "residual": (2, 3, 8)}
    shapes |= dict.fromkeys(("bias", "weight", "shift"), (2, 8))
    with pytest.raises(ValueError, match=says(told)):
        bias_layer_norm(**{name: torch.zeros(shape) for name, shape in (shapes | changes).items()})


def test_a_residual_of_another_dtype_is_refused() -> None:
    (x, bias, weight, shift, residual), _ = arguments((2, 3, 8), (2, 8), FLOAT32)
    with pytest.raises(TypeError, match=says("residual ... of x, torch.float32, got torch.float64")):
        bias_layer_norm(x, bias, weight, shift, residual=residual.double())


def test_kernels_that_were_asked_for_do_not_silently_become_the_twin() -> None:
    (x, bias, weight, shift, _), _ = arguments((2, 3, 8), (2, 8), FLOAT32)
    if dispatch.INTERPRETED or x.is_cuda:
        pytest.skip("kernels run here")
    with pytest.raises(RuntimeError, match="kernels were asked for, but"):
        bias_layer_norm(x, bias, weight, shift, impl="triton")


# The kernels against the twin.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "of_parameters", "dtype", "relu", "skips"),
    [
        ((2, 100, 70), (2, 70), FLOAT32, True, False),  # several tiles per program, the last one cut off
        ((2, 100, 70), (2, 70), BFLOAT16, False, True),
        ((3, 5, 64), (3, 64), BFLOAT16, True, False),  # exactly a block
        ((3, 5, 65), (3, 65), FLOAT32, False, True),  # one more than a block
        ((3, 5, 65), (3, 65), FLOAT16, True, True),
        ((2, 5, 512), (2, 512), BFLOAT16, True, False),  # the critic's width
        ((2, 5, 512), (2, 512), FLOAT32, False, True),
        ((2, 5, 512), (2, 512), FLOAT64, True, True),
        ((1, 2, 4096), (1, 4096), BFLOAT16, False, False),  # the widest in one pass, one row per program
        ((600, 8), (8,), FLOAT32, True, True),  # narrow: hundreds of rows per tile
        ((9, 3), (3,), FLOAT16, False, False),  # shorter than a vector
        ((4, 1), (1,), FLOAT32, True, True),  # a row of one value is its own mean
        ((7,), (7,), FLOAT32, True, False),  # rank 1
        ((3, 33), (3, 33), FLOAT32, False, True),  # a single row per network
        ((2, 3, 4, 16), (2, 16), BFLOAT16, True, True),  # rank 4
        ((2, 3, 4, 16), (16,), FLOAT64, False, False),
        ((1, 3, 4100), (1, 4100), FLOAT32, True, True),  # the first width whose backward takes two passes
        ((1, 1, 8200), (1, 8200), FLOAT32, True, False),  # the forward loads its parameters late
    ],
)
def test_value_and_every_gradient_follow_the_float64_twin(
    kernel_device: str,
    shape: tuple[int, ...],
    of_parameters: tuple[int, ...],
    dtype: torch.dtype,
    relu: bool,
    skips: bool,
) -> None:
    inputs, seed = arguments(shape, of_parameters)
    inputs = inputs if skips else inputs[:4]
    twin = an_op(reference.bias_layer_norm, relu)
    wanted = range(len(inputs))
    results = assert_follows_twin(
        by_kernels(relu), twin, inputs, [seed], wanted, dtype, kernel_device, NAMES[: len(inputs) + 1]
    )
    assert results[0].shape == shape
    if shape[-1] > 1:
        for name, result in zip(NAMES, results, strict=False):
            assert result.abs().max() > 0, f"{name} is all zeros"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "relu", "wanted"),
    [
        (FLOAT32, True, (0, 1, 2, 3)),
        (BFLOAT16, False, (0, 1, 2, 3)),
        (FLOAT32, True, (0,)),
        (FLOAT64, False, (0,)),
        (FLOAT32, False, (1, 2, 3)),
    ],
)
def test_rows_wider_than_a_block_follow_the_twin_too(
    kernel_device: str, dtype: torch.dtype, relu: bool, wanted: tuple[int, ...]
) -> None:
    inputs, seed = arguments((2, 37, 70), (2, 70))
    twin = an_op(reference.bias_layer_norm, relu)
    with narrow_blocks():
        assert_follows_twin(by_kernels(relu), twin, inputs[:4], [seed], wanted, dtype, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rows", [21, 100])  # a tile per program of the frozen pass, and several
def test_frozen_parameters_leave_the_other_gradients_as_they_were(
    kernel_device: str, relu: bool, rows: int
) -> None:
    inputs, seed = arguments((2, rows, 70), (2, 70))
    twin = an_op(reference.bias_layer_norm, relu)
    assert_follows_twin(by_kernels(relu), twin, inputs, [seed], (0, 4), FLOAT32, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [(1,), (2,), (3,), (4,), (1, 2, 3), (0, 3), (2, 4)])
def test_every_choice_of_gradients_is_served(kernel_device: str, wanted: tuple[int, ...]) -> None:
    inputs, seed = arguments((2, 5, 12), (2, 12))
    twin = an_op(reference.bias_layer_norm, True)
    assert_follows_twin(by_kernels(True), twin, inputs, [seed], wanted, FLOAT32, kernel_device)


@pytest.mark.gpu
def test_parameters_of_another_dtype_than_x_get_gradients_of_their_own(kernel_device: str) -> None:
    (x, *parameters, residual), seed = arguments((2, 19, 24), (2, 24))
    for kinds in ((FLOAT32,) * 3, (BFLOAT16, FLOAT32, FLOAT64), (FLOAT16,) * 3):
        mixed = [x.bfloat16(), *(p.to(kind) for p, kind in zip(parameters, kinds, strict=True))]
        mixed.append(residual.bfloat16())
        low = seed.bfloat16()
        truth = outputs_and_gradients(
            an_op(reference.bias_layer_norm, True), [t.double() for t in mixed], [low.double()], range(5)
        )
        mine = outputs_and_gradients(
            by_kernels(True), [t.to(kernel_device) for t in mixed], [low.to(kernel_device)], range(5)
        )
        assert [m.dtype for m in mine] == [BFLOAT16, *(t.dtype for t in mixed)]
        for name, result, exact in zip(NAMES, mine, truth, strict=True):
            assert_close_to_truth(result, exact, exact.to(result.dtype), name)


@pytest.mark.gpu
def test_gradcheck_accepts_the_kernels_in_float64(kernel_device: str) -> None:
    inputs, _ = arguments((2, 2, 3), (2, 3))
    leaves = [t.to(kernel_device).requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(by_kernels(False), leaves)


# Layouts.


@pytest.mark.gpu
def test_inputs_in_any_layout_give_what_their_contiguous_copies_give(kernel_device: str) -> None:
    inputs, seed = arguments((3, 5, 6), (3, 6), FLOAT32, kernel_device)
    count = 0
    for (told, x), (_, residual) in zip(layouts(inputs[0]), layouts(inputs[4]), strict=True):
        strided = [x, *inputs[1:4], residual]
        plain = [t.contiguous() for t in strided]
        results = [outputs_and_gradients(by_kernels(True), t, [seed], (0, 4)) for t in (strided, plain)]
        for mine, expected in zip(*results, strict=True):
            assert torch.equal(mine, expected), told
        count += 1
    assert count == 42


@pytest.mark.gpu
def test_gradients_that_arrive_in_any_layout_give_what_their_contiguous_copies_give(
    kernel_device: str,
) -> None:
    inputs, seed = arguments((3, 5, 6), (3, 6), FLOAT32, kernel_device)
    leaves = [t.requires_grad_() for t in inputs]
    out = by_kernels(True)(*leaves)
    for told, strided in layouts(seed.to(kernel_device)):
        mine = torch.autograd.grad(out, leaves, strided, retain_graph=True)
        expected = torch.autograd.grad(out, leaves, strided.contiguous(), retain_graph=True)
        for grad, plain in zip(mine, expected, strict=True):
            assert torch.equal(grad, plain), told


@pytest.mark.gpu
def test_the_gradient_of_a_sum_is_read_as_ones(kernel_device: str) -> None:
    inputs, _ = arguments((2, 4, 6), (2, 6), FLOAT32, kernel_device)
    leaves = [t.requires_grad_() for t in inputs]
    mine = torch.autograd.grad(by_kernels(True)(*leaves).sum(), leaves)
    ones = torch.autograd.grad(by_kernels(True)(*leaves), leaves, torch.ones_like(leaves[0]))
    assert all(torch.equal(a, b) for a, b in zip(mine, ones, strict=True))


@pytest.mark.gpu
def test_parameters_in_any_layout_give_what_their_contiguous_copies_give(kernel_device: str) -> None:
    inputs, seed = arguments((3, 5, 6), (3, 6), FLOAT32, kernel_device)
    flat = torch.full((3, 30), float("nan"), device=kernel_device)
    flat[:, 11:17] = inputs[1]
    strided = [flat[:, 11:17], inputs[2].T.contiguous().T, inputs[3][:1].expand(3, 6)]
    assert not any(p.is_contiguous() for p in strided)
    results = []
    for parameters in (strided, [p.contiguous() for p in strided]):
        tensors = [inputs[0], *parameters, inputs[4]]
        results.append(outputs_and_gradients(by_kernels(True), tensors, [seed], range(5)))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


# Properties.


@pytest.mark.gpu
def test_a_row_becomes_mean_zero_and_variance_one_whatever_is_added_to_it(kernel_device: str) -> None:
    (x, bias, *_), _ = arguments((1, 4, 300), (1, 300), FLOAT32)
    one, zero = torch.ones(1, 300, device=kernel_device), torch.zeros(1, 300, device=kernel_device)
    x, bias = x.to(kernel_device), bias.to(kernel_device)
    out = by_kernels(False)(x, bias, one, zero)
    torch.testing.assert_close(out.mean(-1), torch.zeros_like(out[..., 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.var(-1, correction=0), torch.ones_like(out[..., 0]), rtol=0, atol=1e-5)
    # beside 1000, 13 bits are left behind the point; as E[h^2] - E[h]^2 the variance would be off by percents
    torch.testing.assert_close(by_kernels(False)(x + 1000.0, bias, one, zero), out, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_a_gradient_neither_moves_the_mean_of_a_row_nor_its_scale(kernel_device: str) -> None:
    (x, bias, weight, shift, _), seed = arguments((2, 9, 40), (2, 40))
    x, bias, weight, shift, seed = (t.to(kernel_device) for t in (x, bias, weight, shift, seed))
    x.requires_grad_()
    out = bias_layer_norm(x, bias, weight, shift, relu=True, eps=0.0, impl="triton")
    (dx,) = torch.autograd.grad(out, x, seed)
    h = (x + bias[:, None]).detach()
    assert dx.abs().max() > 0.1
    assert dx.sum(-1).abs().max() < 1e-12
    assert (dx * h).sum(-1).abs().max() < 1e-12


@pytest.mark.gpu
def test_the_gradient_of_the_relu_at_zero_is_zero(kernel_device: str) -> None:
    inputs, seed = arguments((2, 3, 8), (2, 8), FLOAT32)
    inputs[2].zero_()
    inputs[3].zero_()  # y is 0 everywhere
    inputs[3][:, 5] = 1.0  # but here
    inputs = [t.to(kernel_device) for t in inputs[:4]]
    out, _, _, dweight, dshift = outputs_and_gradients(
        by_kernels(True), inputs, [seed.to(kernel_device)], range(4)
    )
    assert torch.equal(out, inputs[3][:, None].expand_as(out))
    there = torch.zeros(2, 8, dtype=torch.bool)
    there[:, 5] = True
    assert torch.equal((dshift != 0).cpu(), there)
    assert torch.equal((dweight != 0).cpu(), there)


@pytest.mark.gpu
def test_large_and_constant_rows_stay_finite_and_exact(kernel_device: str) -> None:
    (x, _, weight, shift, _), seed = arguments((1, 4, 64), (1, 64))
    x[0, 0] = 7.0  # a constant row: out is the shift
    x[0, 1] = 60000.0 * x[0, 1].sign()  # the squares overflow float16
    x[0, 2] *= 1e-3  # eps counts
    x[0, 3] += 2000.0  # a mean far from 0
    inputs = [x, torch.zeros(1, 64, dtype=FLOAT64), weight, shift]
    twin = an_op(reference.bias_layer_norm, False)
    for dtype in (FLOAT16, FLOAT32):
        out, *_ = assert_follows_twin(
            by_kernels(False), twin, inputs, [seed], range(4), dtype, kernel_device, NAMES[:5]
        )
        assert torch.equal(out[0, 0].cpu(), shift[0].to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [False, True])
def test_a_nan_stays_in_its_row_and_reaches_the_parameters(kernel_device: str, narrow: bool) -> None:
    inputs, seed = arguments((2, 20, 40), (2, 40), FLOAT32)
    inputs[0][1, 3, 7] = float("nan")
    inputs = [t.to(kernel_device) for t in inputs[:4]]
    with ExitStack() as stack:
        if narrow:
            stack.enter_context(narrow_blocks())
        out, dx, *grads = outputs_and_gradients(by_kernels(True), inputs, [seed.to(kernel_device)], range(4))
    row = torch.zeros(2, 20, dtype=torch.bool)
    row[1, 3] = True
    for result in (out, dx):
        assert torch.equal(result.isnan().all(-1).cpu(), row)
        assert torch.equal(result.isnan().any(-1).cpu(), row)
    for grad in grads[:2]:  # of bias and weight
        assert grad[1].isnan().all()
        assert grad[0].isfinite().all()


@pytest.mark.gpu
def test_two_runs_give_the_same_bits(kernel_device: str) -> None:
    inputs, seed = arguments((2, 200, 48), (2, 48), FLOAT32, kernel_device)
    first, second = (outputs_and_gradients(by_kernels(True), inputs, [seed], range(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "of_parameters"),
    [((2, 0, 8), (2, 8)), ((0, 8), (8,)), ((0, 3, 8), (0, 8)), ((2, 3, 0), (2, 0))],
)
def test_an_empty_input_gives_an_empty_output_and_zero_gradients(
    kernel_device: str, shape: tuple[int, ...], of_parameters: tuple[int, ...]
) -> None:
    inputs, seed = arguments(shape, of_parameters, FLOAT32)
    inputs = [t.to(kernel_device) for t in inputs]
    with dispatch.recording() as launches:
        out, dx, *grads, dresidual = outputs_and_gradients(
            by_kernels(True), inputs, [seed.to(kernel_device)], range(5)
        )
    assert not launches
    assert out.shape == dx.shape == dresidual.shape == shape
    assert all(torch.equal(grad.cpu(), torch.zeros(of_parameters)) for grad in grads)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("wanted", "kernels"),
    [(range(5), ["backward", "reduce"]), ((0, 4), ["backward"]), ((2,), ["backward", "reduce"]), ((4,), [])],
)
def test_no_launch_serves_a_gradient_that_nobody_wants(
    kernel_device: str, wanted: tuple[int, ...], kernels: list[str]
) -> None:
    inputs, seed = arguments((2, 5, 16), (2, 16), FLOAT32, kernel_device)
    names = ("forward", *kernels)
    with dispatch.recording() as launches:
        outputs_and_gradients(by_kernels(True), inputs, [seed], wanted)
    assert [launch.kernel.__name__ for launch in launches] == [f"_norm_{name}_kernel" for name in names]
    with narrow_blocks(), dispatch.recording() as launches:
        wide, seed = torch.randn(2, 5, 33, device=kernel_device), torch.randn(2, 5, 33, device=kernel_device)
        vectors = [torch.randn(2, 33, device=kernel_device) for _ in range(3)]
        outputs_and_gradients(by_kernels(True), [wide, *vectors, wide], [seed], wanted)
    names = ("forward", *(["sums"] if kernels else []), *kernels)
    assert [launch.kernel.__name__ for launch in launches] == [f"_norm_{name}_kernel" for name in names]


@pytest.mark.gpu
def test_a_second_derivative_is_refused(kernel_device: str) -> None:
    inputs, seed = arguments((2, 3, 8), (2, 8), FLOAT32, kernel_device)
    leaves = [t.requires_grad_() for t in inputs]
    for out in (by_kernels(True)(*leaves), by_kernels(True)(*leaves).square()):
        with pytest.raises(RuntimeError, match="bias_layer_norm has no second derivative"):
            torch.autograd.grad(out, leaves[0], seed.to(kernel_device), create_graph=True)


# The launchers below the op.


def between_nans(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Memory of NaNs, and the part of it that may be written."""
    count = int(torch.Size(shape).numel())
    whole = torch.full((count + 512,), float("nan"), dtype=dtype, device=device)
    return whole, whole[256 : 256 + count].view(shape)


def assert_untouched_around(whole: Tensor, inside: Tensor) -> None:
    assert whole[:256].isnan().all()
    assert whole[256 + inside.numel() :].isnan().all()
    assert inside.isfinite().all(), "a hole"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("N", "B", "H", "dtype", "narrow"),
    [(2, 130, 33, FLOAT32, False), (3, 40, 24, BFLOAT16, False), (2, 29, 70, FLOAT64, True)],
)
def test_the_launchers_fill_what_they_are_given_and_nothing_beside_it(
    kernel_device: str, N: int, B: int, H: int, dtype: torch.dtype, narrow: bool
) -> None:
    layers = 2
    torch.manual_seed(0)
    wide = FLOAT64 if dtype == FLOAT64 else FLOAT32
    flat = torch.randn(N, 4 * H + 5, device=kernel_device, dtype=wide)  # all vectors of a network in one row
    bias, weight, shift = (flat[:, 1 + k * H : 1 + (k + 1) * H] for k in range(3))
    place = torch.device(kernel_device)
    with ExitStack() as stack:
        if narrow:
            stack.enter_context(narrow_blocks())
        shape = norm.partial_shape(N, B, H, dtype, place)
        assert shape[1:] == (3, N, H)
        assert shape[0] > 1 or B < 100, "this size is here to have the rows of a network shared"
        held_partials, partials = between_nans((layers, *shape), wide, kernel_device)
        held_grads, grads = between_nans((layers, 3, N, H), dtype, kernel_device)
        for layer in range(layers):
            relu = layer == 0
            skips = not relu
            x, residual, dy = (torch.randn(N, B, H, device=kernel_device, dtype=dtype) for _ in range(3))
            held_y, y = between_nans((N, B, H), dtype, kernel_device)
            held_stats, stats = between_nans((2, N, B), wide, kernel_device)
            held_dx, dx = between_nans((N, B, H), dtype, kernel_device)
            norm.forward_into(x, bias, weight, shift, residual if skips else None, relu, 1e-6, y, stats)
            norm.backward_into(dy, x, bias, weight, shift, relu, stats, dx, partials[layer])
            for whole, part in ((held_y, y), (held_stats, stats), (held_dx, dx)):
                assert_untouched_around(whole, part)

            exact = outputs_and_gradients(
                an_op(reference.bias_layer_norm, relu),
                [t.double().cpu() for t in (x, bias, weight, shift)],
                [dy.double().cpu()],
                range(4),
            )
            added = y.double().cpu() - (residual.double().cpu() if skips else 0.0)
            rows = (x + bias[:, None].to(x.dtype)) if dtype == FLOAT64 else x.float() + bias[:, None]
            torch.testing.assert_close(stats[0], rows.mean(-1))
            torch.testing.assert_close(stats[1], (rows.var(-1, correction=0) + 1e-6).rsqrt())
            slack = {BFLOAT16: 0.05, FLOAT32: 1e-5, FLOAT64: 1e-12}[dtype]
            torch.testing.assert_close(added, exact[0], rtol=slack, atol=slack)
            torch.testing.assert_close(dx.double().cpu(), exact[1], rtol=slack, atol=slack)
            # in place: the same bits
            alone, skip = dy.clone(), residual.clone()
            norm.backward_into(alone, x, bias, weight, shift, relu, stats, alone, partials[layer])
            assert torch.equal(alone, dx)
            if skips:
                norm.forward_into(x, bias, weight, shift, skip, relu, 1e-6, skip, stats)
                assert torch.equal(skip, y)
            # without parameters, and without x
            norm.backward_into(dy, x, bias, weight, shift, relu, stats, alone, None)
            torch.testing.assert_close(alone, dx)
            again = torch.full_like(partials[layer], float("nan"))
            norm.backward_into(dy, x, bias, weight, shift, relu, stats, None, again)
            torch.testing.assert_close(again, partials[layer])
            grads[layer] = torch.stack(exact[2:]).to(dtype)
        assert_untouched_around(held_partials, partials)
        expected, held_grads[:] = grads.clone(), float("nan")
        norm.reduce_partials(partials, grads)
    assert_untouched_around(held_grads, grads)
    slack = {BFLOAT16: 0.02, FLOAT32: 1e-5, FLOAT64: 1e-12}[dtype]
    torch.testing.assert_close(grads, expected, rtol=slack, atol=slack * B)


@pytest.mark.gpu
def test_partial_sums_of_any_number_are_added_in_one_launch_for_all_layers(kernel_device: str) -> None:
    torch.manual_seed(0)
    for layers, programs, networks, width in ((1, 1, 1, 5), (3, 300, 2, 70), (2, 7, 1, 1)):
        spread = torch.randn(layers, programs + 1, 3, networks, width, device=kernel_device)
        partials = spread[:, 1:]  # layers that are not next to each other, nor those of out
        out = torch.empty(layers, 2, 3, networks, width, device=kernel_device, dtype=FLOAT64)[:, 1]
        with dispatch.recording() as launches:
            norm.reduce_partials(partials, out)
        assert len(launches) == 1
        norm.reduce_partials(partials, out)
        torch.testing.assert_close(out, partials.double().sum(1), rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16, FLOAT64], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 7, 5), (2, 513, 8), (2, 1100, 104), (1, 512, 33)], ids=str)
def test_the_same_launch_sums_the_rows_of_outputs(
    kernel_device: str, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    N, B, K = sizes
    wide = FLOAT64 if dtype == FLOAT64 else FLOAT32
    partials = torch.randn(2, 3, 3, N, 5, device=kernel_device, dtype=wide)
    rows = torch.randn(N, B, K, device=kernel_device).to(dtype)
    held = torch.full((N, K + 6), float("nan"), device=kernel_device, dtype=dtype)  # of a flat buffer
    sums, out = held[:, 2 : 2 + K], torch.empty(2, 3, N, 5, device=kernel_device, dtype=dtype)
    alone = torch.empty_like(out)
    with dispatch.recording() as launches:
        norm.reduce_partials(partials, out, rows, sums)
    assert len(launches) == 1
    norm.reduce_partials(partials, out, rows, sums)
    norm.reduce_partials(partials, alone)
    assert torch.equal(out, alone)
    exact = rows.double().sum(1)
    slack = {BFLOAT16: 0.01, FLOAT16: 2e-3, FLOAT32: 1e-6, FLOAT64: 1e-14}[dtype]
    torch.testing.assert_close(sums.double(), exact, rtol=slack, atol=slack * B**0.5)
    assert held.isfinite().sum() == sums.numel(), "written beside it"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16, FLOAT64], ids=str)
def test_the_sums_are_written_into_buffers_of_any_strides(kernel_device: str, dtype: torch.dtype) -> None:
    """As networks of P parameters lie in a flat buffer, and with each pair of axes exchanged in memory."""
    torch.manual_seed(0)
    L, S, N, H = 2, 3, 3, 21
    partials = torch.randn(
        L, S, 3, N, H, device=kernel_device, dtype=FLOAT64 if dtype == FLOAT64 else FLOAT32
    )
    exact = partials.double().sum(1).to(dtype)
    slack = {BFLOAT16: 0.01, FLOAT16: 2e-3, FLOAT32: 1e-6, FLOAT64: 1e-14}[dtype]
    for order in itertools.permutations(range(3)):
        inverse = [order.index(axis) for axis in range(3)]
        sizes = [(L, 3, N)[axis] for axis in order]
        shape = [*(size + 1 for size in sizes), H + 5]
        held = torch.full(shape, float("nan"), device=kernel_device, dtype=dtype)
        out = held[1:, 1:, 1:, 2 : 2 + H].permute(*inverse, 3)
        with dispatch.recording() as launches:
            norm.reduce_partials(partials, out)
        assert len(launches) == 1
        norm.reduce_partials(partials, out)
        torch.testing.assert_close(out, exact, rtol=slack, atol=slack)
        assert held.isfinite().sum() == out.numel(), "written beside it"


@pytest.mark.gpu
def test_the_rows_of_a_network_are_shared_without_one_left_out(kernel_device: str) -> None:
    for arch, N, B, H, frozen in itertools.product(
        ("sm_90", "gfx942"), (1, 2, 5), (1, 63, 1000, 4096), (1, 100, 512, 4096, 4097, 16384), (False, True)
    ):
        with tables.assume(arch):
            walk = norm._walk(N, B, H, BFLOAT16, torch.device(kernel_device), frozen)
        told = f"{arch} N={N} B={B} H={H} frozen={frozen}"
        assert walk.programs * walk.rows_each >= B, told
        assert (walk.programs - 1) * walk.rows_each < B, f"{told}: a program without rows"
        assert walk.rows_each % walk.config["BLOCK_ROWS"] == 0, told
        assert walk.blocks * walk.config["BLOCK_H"] >= H, told


# Through torch's other ways of calling.


@pytest.mark.gpu
def test_torch_accepts_the_ops_of_the_library(kernel_device: str) -> None:
    (x, bias, weight, shift, residual), seed = arguments((2, 3, 8), (2, 8), FLOAT32)
    tensors = [t.to(kernel_device) for t in (x, bias, weight, shift, residual)]
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(OPS.bias_layer_norm, (*leaves, True, 1e-6))
    torch.library.opcheck(OPS.bias_layer_norm, (*leaves[:4], None, False, 1e-6))
    stats = torch.rand(2, 2, 3, device=kernel_device)
    for wants_dx, wants_parameters in ((True, True), (True, False), (False, True)):
        given = (seed.to(kernel_device), *tensors[:4], stats, True, wants_dx, wants_parameters)
        torch.library.opcheck(OPS.bias_layer_norm_backward, given)


@pytest.mark.gpu
def test_compiled_it_gives_the_same_values_and_gradients(kernel_device: str) -> None:
    inputs, _ = arguments((2, 5, 12), (2, 12), FLOAT32)

    def loss(*tensors: Tensor) -> Tensor:
        return by_kernels(True)(*tensors).sin().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.to(kernel_device).requires_grad_() for t in inputs]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_transforms_of_torch_func_see_the_same_gradients(kernel_device: str) -> None:
    inputs, _ = arguments((2, 3, 12), (2, 12), FLOAT32)
    inputs = [t.to(kernel_device) for t in inputs]

    def loss(*tensors: Tensor) -> Tensor:
        return by_kernels(True)(*tensors).sin().sum()

    leaves = [t.clone().requires_grad_() for t in inputs]
    plain = torch.autograd.grad(loss(*leaves), leaves)
    functional = torch.func.grad(loss, argnums=tuple(range(5)))
    for mine, expected in zip(functional(*inputs), plain, strict=True):
        torch.testing.assert_close(mine, expected)
    # one network at a time, by vmap
    each = torch.func.vmap(functional)(*inputs)
    for mine, expected in zip(each, plain, strict=True):
        torch.testing.assert_close(mine, expected)
