"""The tanh-Gaussian policy and its noise: kernels against twins, twins against definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from extras import require
from kernel_harness import (
    OPS,
    assert_close_to_truth,
    assert_follows_twin,
    assert_torch_sees,
    layouts,
    native_calls,
    outputs_and_gradients,
)
from refusals import says
from torch import Tensor

from brc_fast import kernels
from brc_fast.kernels import policy, reference
from brc_fast.kernels.runtime.dispatch import recording
from brc_fast.kernels.runtime.language import jit, tl

tanh_gaussian = partial(policy.tanh_gaussian, impl="triton")
tanh_gaussian_backward = partial(policy.tanh_gaussian_backward, impl="triton")
standard_normal = partial(policy.standard_normal, impl="triton")
SIZES = [
    (7,),  # no batch
    (1, 1),  # one of each
    (9, 24),  # the dogs' width padded to a block, one row more than a tile has
    (2, 8, 32),  # exactly a block, exactly two tiles
    (3, 2, 33),  # one more than a block
    (2, 3, 2, 2),  # rank 4
    (3, 300),  # a row alone is more than a tile
]
CASES = [(size, dtype) for dtype in (torch.float32, torch.bfloat16) for size in SIZES]
CASES += [((9, 24), torch.float64), ((9, 24), torch.float16)]
# index, offset, seed, words: the known answers of Random123's kat_vectors for philox4x32_10
KNOWN = [
    (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (-1, -1, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x85A308D3243F6A88 - 2**64,
        0x0370734413198A2E,
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def halves(op, head: Tensor, *rest: Tensor, **keywords: Tensor) -> tuple[Tensor, Tensor]:
    """The op on a head [.., 2 A] that holds mean and raw log-std, as the agent's does."""
    mean, raw_log_std = head.chunk(2, -1)
    return op(mean, raw_log_std, *rest, **keywords)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def rng_of(seed: int, offset: int, device: str = "cpu") -> Tensor:
    return torch.tensor([seed, offset], device=device)


@jit
def _words_kernel(rng_ptr, index_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    words = policy._words(rng_ptr, tl.load(index_ptr + i, mask=i < N, other=0))
    for place in tl.static_range(4):
        tl.store(out_ptr + place * N + i, words[place].to(tl.int64), mask=i < N)


def kernel_words(rng: Tensor, index: Tensor) -> Tensor:
    """[4, N] as the kernels see them."""
    out = torch.empty(4, len(index), dtype=torch.int64, device=index.device)
    _words_kernel[(1,)](rng, index, out, N=len(index), BLOCK=1 << (len(index) - 1).bit_length())
    return out


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_value_and_every_gradient_follow_the_twin(
    kernel_device: str, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    head, noise = normal(*size[:-1], 2 * size[-1]), normal(*size)
    seeds = [normal(*size), normal(*size[:-1])]
    for extra, keyword in (([noise], None), ([rng_of(2**40 + 5, -3)], "rng")):

        def run(op, head: Tensor, extra: Tensor, keyword: str | None = keyword) -> tuple[Tensor, Tensor]:
            return halves(op, head, **{keyword or "noise": extra})

        mine, twin = partial(run, tanh_gaussian), partial(run, reference.tanh_gaussian)
        results = assert_follows_twin(mine, twin, [head, *extra], seeds, [0], dtype, kernel_device)
        actions, log_probs, grad = results
        assert actions.dtype == dtype
        assert log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for part in grad.chunk(2, -1):
            assert part.abs().sum() > 0


@pytest.mark.gpu
def test_parts_of_different_dtypes_are_read_as_they_are(kernel_device: str) -> None:
    torch.manual_seed(0)
    mean, raw = normal(5, 6).bfloat16().requires_grad_(), normal(5, 6).float().requires_grad_()
    noise = normal(5, 6).half()
    parts = [x.detach().to(kernel_device) for x in (mean, raw, noise)]
    leaves = [x.requires_grad_(place < 2) for place, x in enumerate(parts)]
    results = []
    for op, inputs in ((tanh_gaussian, leaves), (reference.tanh_gaussian, [mean, raw, noise])):
        actions, log_probs = op(*inputs)
        grads = torch.autograd.grad(actions.float().sum() + log_probs.sum(), inputs[:2])
        results.append((actions, log_probs, *grads))
    assert [x.dtype for x in results[0]] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    for mine, twin in zip(*results, strict=True):
        rounding = 1e-2 if mine.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(mine.cpu(), twin, rtol=rounding, atol=rounding)


@pytest.mark.gpu
def test_every_layout_of_inputs_and_gradients_gives_the_same(kernel_device: str) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(3, 2, 5, device=kernel_device) for _ in range(4)]
    ways = [list(layouts(part)) for part in parts]
    ways_of_rows = list(layouts(torch.randn(3, 2, device=kernel_device)))
    assert len(ways[0]) == 42
    for place, (told, mean) in enumerate(ways[0]):  # each with different ones of the others
        raw, noise, dactions = (ways[other][(place + 11 * other) % 42][1] for other in (1, 2, 3))
        dlog_probs = ways_of_rows[place % len(ways_of_rows)][1]
        seeds = (dactions, dlog_probs)
        mine = outputs_and_gradients(tanh_gaussian, [mean, raw, noise], seeds, [0, 1])
        twin = outputs_and_gradients(reference.tanh_gaussian, [mean, raw, noise], seeds, [0, 1])
        for got, expected in zip(mine, twin, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=f"mean {told}")


@pytest.mark.gpu
def test_far_out_everything_is_finite_and_right(kernel_device: str) -> None:
    far = torch.tensor([0.0, 1e-3, 1.0, 8.0, 20.0, 100.0, 500.0, 3000.0], dtype=torch.float64)
    mean = torch.cat([far, -far]).repeat(3, 1)
    raw = torch.tensor([[-50.0], [0.0], [50.0]], dtype=torch.float64).expand(3, 16)  # std to its two ends
    noise = torch.linspace(-5.0, 5.0, 16, dtype=torch.float64).expand(3, 16)
    seeds = [torch.ones(3, 16, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    inputs = [mean, raw, noise]
    for dtype in (torch.float32, torch.bfloat16):
        actions, log_probs, dmean, draw = assert_follows_twin(
            tanh_gaussian, reference.tanh_gaussian, inputs, seeds, [0, 1], dtype, kernel_device
        )
        assert (actions[:, 6:8] == 1.0).all()
        assert (actions[:, 14:] == -1.0).all()
        assert log_probs.isfinite().all()
        assert (dmean[:, 6:8] == 2.0).all()
        assert (draw[[0, 2]].abs() < 1e-30).all()
        assert (draw[1].abs() > 0.1).all()


@pytest.mark.gpu
def test_nan_and_infinity_stay_in_their_row(kernel_device: str) -> None:
    mean, raw, noise = torch.zeros(3, 4, 5, device=kernel_device).unbind(0)
    mean = mean.clone()
    mean[1, 2], mean[2, 0], mean[3, 1] = math.nan, math.inf, -math.inf
    actions, log_probs = tanh_gaussian(mean, raw, noise)
    assert actions[1].isnan().tolist() == [False, False, True, False, False]
    assert log_probs.isnan().tolist() == [False, True, False, False]
    assert actions[2, 0] == 1.0
    assert actions[3, 1] == -1.0
    assert log_probs[2:].tolist() == [math.inf, math.inf]


@pytest.mark.gpu
def test_each_output_and_each_input_alone_has_its_gradient(kernel_device: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(4, 6, device=kernel_device) for _ in range(3)]
    for used in (0, 1):
        for wanted in ([0], [1], [0, 1]):
            grads = []
            for op in (tanh_gaussian, reference.tanh_gaussian):
                leaves = [x.detach().requires_grad_(place in wanted) for place, x in enumerate(inputs)]
                out = op(*leaves)[used].square().sum()
                grads.append(torch.autograd.grad(out, [leaves[place] for place in wanted]))
            for mine, twin in zip(*grads, strict=True):
                assert mine.abs().sum() > 0
                torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-4)
    noise = inputs[2].clone().requires_grad_()
    assert not tanh_gaussian(inputs[0], inputs[1], noise)[0].requires_grad


@pytest.mark.gpu
def test_a_second_derivative_is_refused(kernel_device: str) -> None:
    mean = torch.zeros(2, 3, device=kernel_device, requires_grad=True)
    actions, _ = tanh_gaussian(mean, mean, rng=rng_of(0, 0, kernel_device))
    with pytest.raises(RuntimeError, match=r"no second derivative .*: use kernels.reference.tanh_gaussian"):
        torch.autograd.grad(actions.sum(), mean, create_graph=True)


@pytest.mark.gpu
def test_empty_inputs_need_no_launch(kernel_device: str) -> None:
    for shape in ((0, 4), (2, 0, 4), (3, 0)):
        leaves = [torch.zeros(shape, device=kernel_device, requires_grad=True) for _ in range(2)]
        for keywords in (
            {"noise": torch.zeros(shape, device=kernel_device)},
            {"rng": rng_of(0, 0, kernel_device)},
        ):
            actions, log_probs = tanh_gaussian(*leaves, **keywords)
            assert actions.shape == shape
            assert log_probs.shape == shape[:-1]
            assert (log_probs == 0.0).all()
            grads = torch.autograd.grad(actions.sum() + log_probs.sum(), leaves)
            assert all(grad.shape == shape for grad in grads)
    assert standard_normal(rng_of(0, 0, kernel_device), (3, 0)).shape == (3, 0)


@pytest.mark.gpu
def test_the_kernels_words_are_the_published_ones_and_the_twins(kernel_device: str) -> None:
    for index, offset, seed, words in KNOWN:
        got = kernel_words(rng_of(seed, offset, kernel_device), torch.tensor([index], device=kernel_device))
        assert got[:, 0].tolist() == list(words)
    index = torch.cat([torch.arange(300), torch.tensor([2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7])])
    for seed, offset in ((0, 0), (-5, 2**33 + 1), (2**62 + 11, -1)):
        got = kernel_words(rng_of(seed, offset, kernel_device), index.to(kernel_device))
        twin = torch.stack(reference.philox(torch.tensor(seed), torch.tensor(offset), index))
        assert torch.equal(got.cpu(), twin)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_the_normals_follow_the_twin(kernel_device: str, dtype: torch.dtype) -> None:
    rng = rng_of(7, 3)
    got = standard_normal(rng.to(kernel_device), (3, 2, 201), dtype)
    exact, plain = (reference.standard_normal(rng, (3, 2, 201), kind) for kind in (torch.float64, dtype))
    assert_close_to_truth(got, exact, plain)


def assert_extreme(op, device: str, offset: int, place: int, top: int) -> None:
    """With seed 0 and this offset, element `place` has all bits of its radius alike."""
    first, second, _, _ = (
        word.item() for word in reference.philox(*(torch.tensor(x) for x in (0, offset, place)))
    )
    assert first >> 9 == top
    radius = 5.768102 if top == 0 else 3.452670e-4  # sqrt(-2 log u) for u = 2^-24 and 1 - 2^-24
    expected = radius * math.cos(2.0 * math.pi * ((second >> 9) + 0.5) * 2.0**-23)
    got = op(rng_of(0, offset, device), (8,))[place].item()
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
def test_the_kernels_normals_are_right_at_the_extreme_words(kernel_device: str) -> None:
    for offset, place, top in ((296355, 0, 0), (388300, 5, 2**23 - 1)):
        assert_extreme(standard_normal, kernel_device, offset, place, top)


@pytest.mark.gpu
def test_the_policy_draws_what_standard_normal_draws_and_replays_it_in_the_backward(
    kernel_device: str,
) -> None:
    torch.manual_seed(0)
    head = torch.randn(2, 9, 14, device=kernel_device, requires_grad=True)
    rng = rng_of(-1, 12, kernel_device)
    results = []
    for keywords in ({"rng": rng}, {"noise": standard_normal(rng, (2, 9, 7))}, {"rng": rng}):
        rng[1] = 12
        actions, log_probs = halves(tanh_gaussian, head, **keywords)
        rng[1] += 1  # before the backward
        (grad,) = torch.autograd.grad((actions.square().sum() + log_probs.sum()), head)
        results.append((actions, log_probs, grad))
    for drawn, given, again in zip(*results, strict=True):
        torch.testing.assert_close(given, drawn, rtol=1e-6, atol=1e-6)
        assert torch.equal(again, drawn)
    moved, _ = halves(tanh_gaussian, head, rng=rng)
    assert (moved != results[0][0]).all()


@pytest.mark.gpu
def test_a_draw_depends_on_its_place_alone(kernel_device: str) -> None:
    rng = rng_of(3, 4, kernel_device)
    long = standard_normal(rng, (700,))
    assert torch.equal(standard_normal(rng, (3, 5)).flatten(), long[:15])
    mean = torch.zeros(37, 7, device=kernel_device)
    noise = standard_normal(rng, (37, 7))
    drawn, given = tanh_gaussian(mean, mean, rng=rng)[0], tanh_gaussian(mean, mean, noise)[0]
    torch.testing.assert_close(drawn, given, rtol=1e-6, atol=1e-6)
    assert torch.equal(tanh_gaussian(mean[:4], mean[:4], rng=rng)[0], drawn[:4])
    strided = torch.stack([rng, rng + 9], 1)[:, 0]
    assert torch.equal(standard_normal(strided, (15,)), long[:15])


@pytest.mark.gpu
def test_torchs_own_checks_of_the_ops_pass(kernel_device: str) -> None:
    head = torch.randn(4, 6, device=kernel_device, requires_grad=True)
    mean, raw = (part.detach().requires_grad_() for part in head.chunk(2, -1))
    noise, rng = torch.randn(4, 3, device=kernel_device), rng_of(0, 1, kernel_device)
    forward, backward = OPS.tanh_gaussian, OPS.tanh_gaussian_backward
    torch.library.opcheck(forward, (mean, raw, noise, None))
    torch.library.opcheck(forward, (mean, raw, None, rng))
    plain = [x.detach() for x in (mean, raw, noise)]
    torch.library.opcheck(backward, (noise, noise[:, 0], *plain))
    torch.library.opcheck(backward, (None, noise[:, 0], *plain))
    torch.library.opcheck(OPS.standard_normal, (rng, 12, torch.bfloat16))


@pytest.mark.gpu
def test_compiled_and_transformed_calls_give_the_same(kernel_device: str) -> None:
    torch.manual_seed(0)
    head, rng = torch.randn(3, 4, 6, device=kernel_device), rng_of(5, 6, kernel_device)

    def loss(head: Tensor, rng: Tensor) -> Tensor:
        actions, log_probs = halves(tanh_gaussian, head, rng=rng)
        return actions.square().sum() + log_probs.sum() + standard_normal(rng, (3,)).sum()

    leaf = head.clone().requires_grad_()
    value = loss(leaf, rng)
    (grad,) = torch.autograd.grad(value, leaf)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    twice = head.clone().requires_grad_()
    again = compiled(twice, rng)
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(torch.autograd.grad(again, twice)[0], grad)
    torch.testing.assert_close(torch.func.grad(loss)(head, rng), grad)
    per_item = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(head, rng)
    torch.testing.assert_close(per_item[0], torch.func.grad(loss)(head[0], rng))
    assert per_item[1].abs().min() > 0


# without autograd


def held(rows: Tensor, dtype: torch.dtype, before: int = 3, after: int = 2) -> tuple[Tensor, Tensor]:
    """NaNs [.., before + A + after] and the columns in them that have the shape of `rows`."""
    size = rows.shape[-1]
    whole = torch.full((*rows.shape[:-1], before + size + after), math.nan, dtype=dtype, device=rows.device)
    return whole, whole[..., before : before + size]


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_the_backward_without_autograd_follows_its_twin(
    kernel_device: str, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    mean, raw, noise, dactions = (normal(*size) for _ in range(4))
    dlog_probs = normal(*size[:-1])
    for given in ([dactions, dlog_probs], [dactions, None], [None, dlog_probs], [dactions, normal()]):
        inputs = [*given, mean, raw, noise]
        results = assert_follows_twin(
            tanh_gaussian_backward, reference.tanh_gaussian_backward, inputs, [], [], dtype, kernel_device
        )
        assert all(x.dtype == dtype and x.abs().sum() > 0 for x in results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_number_stands_for_the_gradient_of_every_row(kernel_device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mean, raw, noise, dactions = (torch.randn(5, 3, device=kernel_device, dtype=dtype) for _ in range(4))
    number = 0.1  # has other bits in float32
    every = torch.full((5,), number, device=kernel_device, dtype=dtype)
    expected = tanh_gaussian_backward(dactions, every, mean, raw, noise)
    slack = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-14, "atol": 1e-14}
    for one in (number, every[0], every[:1].expand(5)):
        for x, exact in zip(tanh_gaussian_backward(dactions, one, mean, raw, noise), expected, strict=True):
            torch.testing.assert_close(x, exact, **slack)
    none = tanh_gaussian_backward(dactions, None, mean, raw, noise)
    zero = tanh_gaussian_backward(dactions, 0, mean, raw, noise)
    for x, exact in zip(none, zero, strict=True):
        assert torch.equal(x, exact)
    for x in tanh_gaussian_backward(None, None, mean, raw, noise):
        assert (x == 0.0).all()


def assert_sums_networks(op: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype, at: str) -> None:
    """Several networks' gradients of the actions, in three layouts, and scaled ones of log pi."""
    torch.manual_seed(0)
    mean, raw, noise = (torch.randn(shape, device=at, dtype=dtype) for _ in range(3))
    every = torch.randn(shape[:-1], device=at, dtype=dtype)
    wide = torch.randn(3, *shape[:-1], 2 * shape[-1] + 3, device=at, dtype=dtype)
    columns = wide[..., 2 : 2 + shape[-1]]
    slack = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
    for dactions in (columns, columns.contiguous(), wide[..., 2::2][..., : shape[-1]], columns[:1]):
        total = dactions.to(torch.promote_types(dtype, torch.float32)).sum(0)
        for rows in (every, every.flatten()[0], 0.3):
            expected = reference.tanh_gaussian_backward(total, rows * (1.0 / 7), mean, raw, noise)
            got = op(dactions, rows, mean, raw, noise, scale=1.0 / 7)
            for mine, truth in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, truth, rtol=slack, atol=slack)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (5, 3), (2, 3, 5)], ids=str)
def test_gradients_of_several_networks_are_summed(
    kernel_device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert_sums_networks(tanh_gaussian_backward, shape, dtype, kernel_device)


@pytest.mark.parametrize("op", [kernels.tanh_gaussian_backward, reference.tanh_gaussian_backward])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (5, 3), (2, 3, 5)], ids=str)
def test_on_a_cpu_gradients_of_several_networks_are_summed(
    op: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert_sums_networks(op, shape, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_are_written_into_the_halves_of_a_wider_one(kernel_device: str, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((5, 6), (2, 3, 6), (1, 6), (6,)):
        head = torch.randn(*shape[:-1], 12, device=kernel_device)
        mean, raw = head.chunk(2, -1)
        noise = torch.randn(shape, device=kernel_device)
        wide = torch.randn(*shape[:-1], 17, device=kernel_device)
        dactions, dlog_probs = wide[..., 4:10], torch.randn(shape[:-1], device=kernel_device)
        whole, inside = held(head, kind)
        out = inside.chunk(2, -1)
        got = tanh_gaussian_backward(dactions, dlog_probs, mean, raw, noise, out=out)
        plain = tanh_gaussian_backward(dactions, dlog_probs, mean, raw, noise)
        for mine, place, expected in zip(got, out, plain, strict=True):
            assert mine is place
            assert torch.equal(mine, expected.to(kind))
        assert whole.isnan().sum() == whole.numel() - inside.numel()
        twin = torch.zeros_like(whole)[..., 3:15].chunk(2, -1)
        reference.tanh_gaussian_backward(dactions, dlog_probs, mean, raw, noise, out=twin)
        rounding = max(1e-5, 2 * torch.finfo(kind).eps)
        for mine, expected in zip(out, twin, strict=True):
            torch.testing.assert_close(mine, expected, rtol=rounding, atol=rounding)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_actions_are_written_into_columns_and_the_noise_where_it_is_wanted(
    kernel_device: str, kind: torch.dtype
) -> None:
    torch.manual_seed(0)
    rng = rng_of(4, 9, kernel_device)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((5, 6), (2, 3, 6), (6,)):
            mean, raw = torch.randn(*shape[:-1], 12, device=kernel_device).to(dtype).chunk(2, -1)
            plain = tanh_gaussian(mean, raw, rng=rng)
            whole, out = held(mean, kind)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            noise = torch.full(shape, math.nan, device=kernel_device, dtype=wide)
            actions, log_probs = tanh_gaussian(mean, raw, rng=rng, out=out, noise_out=noise)
            assert actions is out
            assert torch.equal(log_probs, plain[1])
            rounding = 2 * max(torch.finfo(kind).eps, torch.finfo(dtype).eps)
            torch.testing.assert_close(out.double(), plain[0].double(), rtol=rounding, atol=rounding)
            if kind == dtype:
                assert torch.equal(out, plain[0])
            assert whole.isnan().sum() == whole.numel() - out.numel()
            torch.testing.assert_close(noise, standard_normal(rng, shape, wide), rtol=1e-6, atol=1e-6)
            again, same = tanh_gaussian(mean, raw, noise, out=torch.empty_like(out))
            torch.testing.assert_close(again, out)
            torch.testing.assert_close(same, log_probs)
            other = torch.empty_like(noise, dtype=torch.float64)
            alone, _ = tanh_gaussian(mean, raw, rng=rng, noise_out=other)
            assert torch.equal(alone, plain[0])
            assert torch.equal(other, noise.double())
            _, unused = tanh_gaussian(mean, raw, rng=rng, out=out)
            assert torch.equal(unused, log_probs)


@pytest.mark.gpu
def test_forward_and_backward_without_autograd_give_what_autograd_gives(kernel_device: str) -> None:
    torch.manual_seed(0)
    head = torch.randn(4, 10, device=kernel_device, requires_grad=True)
    rng = rng_of(3, 1, kernel_device)
    dactions, dlog_probs = torch.randn(4, 5, device=kernel_device), torch.randn(4, device=kernel_device)
    results = halves(tanh_gaussian, head, rng=rng)
    (grad,) = torch.autograd.grad(results, head, (dactions, dlog_probs))
    mean, raw = head.detach().chunk(2, -1)
    noise, mine = torch.empty(4, 5, device=kernel_device), torch.empty_like(grad)
    with recording() as launches:
        tanh_gaussian(mean, raw, rng=rng, noise_out=noise)
        tanh_gaussian_backward(dactions, dlog_probs, mean, raw, noise, out=mine.chunk(2, -1))
    assert len(launches) == 2
    assert launches[0].arguments[6] is noise
    tanh_gaussian(mean, raw, rng=rng, noise_out=noise)
    version = mine._version
    tanh_gaussian_backward(dactions, dlog_probs, *head.chunk(2, -1), noise, out=mine.chunk(2, -1))
    assert torch.equal(mine, grad)
    assert mine._version > version
    with torch.no_grad():  # a leaf's actions, where no gradient is wanted
        actions, _ = tanh_gaussian(*head.chunk(2, -1), noise, out=torch.empty(4, 5, device=kernel_device))
    torch.testing.assert_close(actions, results[0].detach())


@pytest.mark.gpu
def test_empty_buffers_stay_as_they_are(kernel_device: str) -> None:
    for shape in ((0, 4), (2, 0, 4), (3, 0)):
        mean, raw, noise, out, other = torch.zeros(5, *shape, device=kernel_device).unbind(0)
        _, log_probs = tanh_gaussian(mean, raw, rng=rng_of(0, 0, kernel_device), out=out, noise_out=noise)
        assert log_probs.shape == shape[:-1]
        assert (log_probs == 0.0).all()
        assert tanh_gaussian_backward(None, 1.0, mean, raw, noise, out=(out, other))[1] is other
        assert tanh_gaussian_backward(None, 1.0, mean, raw, noise)[0].shape == shape


@pytest.mark.gpu
def test_torch_sees_what_is_written(kernel_device: str) -> None:
    """By its own checks, in a compiled call, through a mode, and where there are only shapes."""
    torch.manual_seed(0)
    head, rng = torch.randn(4, 6, device=kernel_device), rng_of(0, 1, kernel_device)
    mean, raw = head.chunk(2, -1)
    noise, actions, log_probs = torch.randn(4, 3, device=kernel_device), mean.clone(), mean[:, 0].clone()
    forward, backward = OPS.tanh_gaussian_into, OPS.tanh_gaussian_backward_into
    torch.library.opcheck(forward, (mean, raw, None, rng, actions, log_probs, noise))
    torch.library.opcheck(forward, (mean, raw, noise, None, actions, log_probs, None))
    into = torch.randn(2, 4, 3, device=kernel_device)
    torch.library.opcheck(backward, (noise, None, mean, raw, noise, 0.5, 1.0, into[0], into[1]))

    def step(head: Tensor, packed: Tensor, grad: Tensor, rng: Tensor) -> Tensor:
        mean, raw = head.chunk(2, -1)
        noise = torch.empty_like(mean)
        _, log_probs = tanh_gaussian(mean, raw, rng=rng, out=packed[:, 2:5], noise_out=noise)
        tanh_gaussian_backward(packed[:, 2:5] * 2.0, log_probs, mean, raw, noise, out=grad.chunk(2, -1))
        return log_probs

    def fresh() -> list[Tensor]:
        return [head, torch.zeros(4, 8, device=kernel_device), torch.zeros_like(head), rng]

    written = assert_torch_sees(step, fresh, "tanh_gaussian_into", "tanh_gaussian_backward_into")
    assert written[1][:, 2:5].abs().min() > 0.0
    assert (written[1][:, [0, 1, 5, 6, 7]] == 0.0).all()


def test_forward_and_backward_are_one_launch_each_that_reads_the_halves_in_place() -> None:
    require("triton")
    head = torch.zeros(5, 8, requires_grad=True)
    mean, raw = head.chunk(2, -1)
    with recording() as launches:
        actions, log_probs = kernels.tanh_gaussian(mean, raw, rng=rng_of(0, 0))
        wide = torch.zeros(5, 11)  # the gradient of a critic's packed input
        torch.autograd.grad((actions, log_probs), (mean, raw), (wide[:, 3:7], torch.zeros(()).expand(5)))
    forward, backward = launches
    assert [x.data_ptr() for x in forward.arguments[:2]] == [mean.data_ptr(), raw.data_ptr()]
    assert [x.data_ptr() for x in backward.arguments[2:4]] == [mean.data_ptr(), raw.data_ptr()]
    assert backward.arguments[0].data_ptr() == wide[:, 3:].data_ptr()
    assert backward.arguments[8:12] == (11, 0, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (4, 3), (2, 3, 5)], ids=str)
def test_the_twin_is_the_density_of_the_squashed_sample(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mean, raw, noise = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3))
    base = torch.distributions.Normal(mean.double(), (-10.0 + 6.0 * (1.0 + raw.double().tanh())).exp())
    u = base.mean + base.stddev * noise.double()
    density = (base.log_prob(u) - 2.0 * (math.log(2.0) - u - torch.nn.functional.softplus(-2.0 * u))).sum(-1)
    for op in (reference.tanh_gaussian, kernels.tanh_gaussian):  # on a CPU in few operations
        actions, log_probs = op(mean, raw, noise)
        assert actions.dtype == dtype
        assert log_probs.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(
            actions, u.tanh().to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
        torch.testing.assert_close(log_probs.double(), density, rtol=1e-5, atol=1e-5)


def test_in_float64_the_density_far_out_has_all_its_digits() -> None:
    u = torch.linspace(-18.0, 18.0, 145, dtype=torch.float64)[:, None]
    wide = torch.zeros_like(u)
    for op in (kernels.tanh_gaussian, reference.tanh_gaussian):
        _, log_probs = op(u, wide, wide)
        slope = 2.0 * (math.log(2.0) - u.abs() - torch.log1p(torch.exp(-2.0 * u.abs())))
        exact = -0.5 * math.log(2.0 * math.pi) - policy.CENTRE - slope
        torch.testing.assert_close(log_probs, exact.squeeze(-1), rtol=1e-14, atol=1e-14)


def test_on_a_cpu_the_op_equals_its_twin_with_drawn_noise_too() -> None:
    torch.manual_seed(0)
    head = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for op in (kernels.tanh_gaussian, reference.tanh_gaussian):
        actions, log_probs = halves(op, head, rng=rng_of(1, 2))
        (grad,) = torch.autograd.grad(actions.sum() + log_probs.square().sum(), head)
        results.append((actions, log_probs, grad))
    for mine, twin in zip(*results, strict=True):
        torch.testing.assert_close(mine, twin)
    noise = policy.standard_normal(rng_of(1, 2), (5, 4), torch.float64)
    torch.testing.assert_close(halves(kernels.tanh_gaussian, head, noise)[0], results[0][0])
    jacobian = torch.func.jacrev(lambda x: halves(kernels.tanh_gaussian, x, noise)[1])(head.detach())
    (grad,) = torch.autograd.grad(halves(kernels.tanh_gaussian, head, noise)[1].sum(), head)
    torch.testing.assert_close(jacobian.sum(0), grad)


def test_the_twins_generator_gives_the_published_words() -> None:
    for index, offset, seed, words in KNOWN:
        got = reference.philox(*(torch.tensor(x) for x in (seed, offset, index)))
        assert tuple(word.item() for word in got) == words


def test_the_normals_have_the_moments_and_tails_of_the_normal_distribution() -> None:
    count = 1_000_000
    x = reference.standard_normal(rng_of(2024, 0), (count,), torch.float64)
    error = 5.0 / math.sqrt(count)  # five standard deviations of the mean of a variable of variance 1
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(x.pow(power).mean() - moment) < error * math.sqrt(variance), f"moment {power}"
    for edge in (0.5, 1.0, 2.0, 3.0, 4.0, 4.5):
        share = math.erfc(edge / math.sqrt(2.0)) / 2.0
        for tail in (x > edge, x < -edge):
            assert abs(tail.double().mean() - share) < error * math.sqrt(share), f"beyond {edge}"
    cdf = torch.special.ndtr(x.sort().values)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    assert max((cdf - steps[:-1]).abs().max(), (steps[1:] - cdf).abs().max()) < 2.0 / math.sqrt(count)  # KS
    assert abs((x[1:] * x[:-1]).mean()) < error
    for other in ((2024, 1), (2025, 0), (2024, 2**32), (2024 + 2**32, 0)):
        assert abs((reference.standard_normal(rng_of(*other), (count,), torch.float64) * x).mean()) < error


@pytest.mark.parametrize(("offset", "place", "top"), [(296355, 0, 0), (388300, 5, 2**23 - 1)])
def test_the_extreme_words_give_the_largest_and_the_smallest_radius(
    offset: int, place: int, top: int
) -> None:
    assert_extreme(reference.standard_normal, "cpu", offset, place, top)


def test_consecutive_offsets_share_no_words() -> None:
    seen: set[tuple[int, int]] = set()
    index = torch.arange(5000)
    for offset in (0, 1, 2, 5000, 2**32):
        first, second, _, _ = reference.philox(torch.tensor(9), torch.tensor(offset), index)
        pairs = set(zip(first.tolist(), second.tolist(), strict=True))
        assert len(pairs) == 5000
        assert not pairs & seen
        seen |= pairs


def test_other_dtypes_draw_the_same_numbers_rounded() -> None:
    exact = policy.standard_normal(rng_of(1, 1), (64,), torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.testing.assert_close(policy.standard_normal(rng_of(1, 1), (64,), dtype), exact.to(dtype))


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({}, ValueError, "exactly one of noise and rng must be given, got none"),
        ({"noise": torch.zeros(2, 3), "rng": torch.zeros(2).long()}, ValueError, "one of ... got both"),
        ({"noise": torch.zeros(2, 4)}, ValueError, "noise ... [2, 3], got [2, 4]"),
        ({"rng": torch.zeros(3).long()}, ValueError, "rng must have shape [2] ... got [3]"),
        ({"rng": torch.zeros(2)}, TypeError, "rng ... torch.int64, got torch.float32"),
        ({"rng": torch.zeros(2, device="meta").long()}, ValueError, "rng must be on cpu ... got meta"),
        (
            {"raw_log_std": torch.zeros(3), "noise": torch.zeros(2, 3)},
            ValueError,
            "raw_log_std ... [2, 3], got [3]",
        ),
        ({"mean": torch.zeros(()), "noise": torch.zeros(2, 3)}, ValueError, "mean ... [.., A], got []"),
        ({"noise": torch.zeros(2, 3), "impl": "triton"}, RuntimeError, "kernels were asked for"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], error: type, told: str) -> None:
    given = {"mean": torch.zeros(2, 3), "raw_log_std": torch.zeros(2, 3), **arguments}
    with pytest.raises(error, match=says(told)):
        kernels.tanh_gaussian(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (4, 3), (2, 3, 5)], ids=str)
def test_on_a_cpu_the_gradients_without_autograd_are_those_of_autograd(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(4)]
    mean, raw, noise, dactions = given
    exact = [x.double() for x in given]
    dlog_probs = torch.randn(shape[:-1], dtype=torch.float64)
    rounding = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for rows in (dlog_probs, None, 0.3, torch.tensor(0.3)):
        for seed in (exact[3], None):
            leaves = [x.clone().requires_grad_() for x in exact[:2]]
            results = reference.tanh_gaussian(*leaves, exact[2])
            every = torch.zeros(shape[:-1]).double() + (0.0 if rows is None else rows)
            seeds = (torch.zeros(shape).double() if seed is None else seed, every)
            expected = torch.autograd.grad(results, leaves, seeds)
            for op in (kernels.tanh_gaussian_backward, reference.tanh_gaussian_backward):
                out = tuple(half.clone() for half in (mean, raw))
                for keyword in ({}, {"out": out}):
                    got = op(None if seed is None else dactions, rows, mean, raw, noise, **keyword)
                    for mine, truth in zip(got, expected, strict=True):
                        assert mine.dtype == dtype
                        torch.testing.assert_close(mine.double(), truth, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_on_a_cpu_actions_and_noise_are_written_too(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mean, raw = torch.randn(5, 8).to(dtype).chunk(2, -1)
    plain = kernels.tanh_gaussian(mean, raw, rng=rng_of(1, 2))
    for op in (kernels.tanh_gaussian, reference.tanh_gaussian):
        whole, out = held(mean, torch.float32)
        noise = torch.empty(5, 4, dtype=torch.float64)
        actions, log_probs = op(mean, raw, rng=rng_of(1, 2), out=out, noise_out=noise)
        assert actions is out
        rounding = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(out.double(), plain[0].double(), rtol=rounding, atol=rounding)
        torch.testing.assert_close(log_probs, plain[1])
        torch.testing.assert_close(noise.float(), policy.standard_normal(rng_of(1, 2), (5, 4)))
        assert whole.isnan().sum() == whole.numel() - out.numel()
    leaf = mean.clone().requires_grad_()
    with torch.no_grad():
        kernels.tanh_gaussian(leaf, raw, noise.to(dtype), out=out)
    assert not kernels.tanh_gaussian_backward(None, 1.0, leaf, raw, noise)[0].requires_grad


def test_the_compiled_passes_serve_plain_float32_calls_that_want_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("brc_fast.kernels._cpu", reason="the compiled module is not built")
    seen = native_calls(monkeypatch)
    torch.manual_seed(0)
    head, noise, wide = torch.randn(2, 5, 8), torch.randn(2, 4, 5).mT, torch.randn(2, 5, 9)
    mean, raw = head.chunk(2, -1)
    leaf, dactions = mean.clone().requires_grad_(), wide[..., 3:7]
    kernels.tanh_gaussian(leaf, raw, noise)
    kernels.tanh_gaussian(mean.double(), raw.double(), noise.double())
    kernels.tanh_gaussian(mean, raw, noise, impl="reference")
    kernels.tanh_gaussian_backward(dactions, wide[..., 0], mean, raw, noise)  # each row has its own
    kernels.tanh_gaussian_backward(dactions, 1.0, mean.double(), raw, noise)
    torch.compile(kernels.tanh_gaussian, fullgraph=True, backend="eager")(mean, raw, noise)
    assert seen == []
    exact = reference.tanh_gaussian(mean, raw, noise)
    for kind in (torch.float32, torch.bfloat16):
        for place in (None, held(mean, kind)[1]):
            for got, other in zip(kernels.tanh_gaussian(mean, raw, noise, out=place), exact, strict=True):
                rounding = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
                torch.testing.assert_close(got.float(), other, rtol=rounding, atol=rounding)
    assert "tanh_gaussian" in seen
    for share in (None, 0.3, torch.tensor(0.3)):
        for seed in (dactions, None):
            exact = reference.tanh_gaussian_backward(seed, share, mean, raw, noise)
            whole, inside = held(head, torch.float32)
            version = whole._version
            halves = inside.chunk(2, -1)
            for out in (None, halves, (halves[0], torch.empty_like(mean, dtype=torch.float64))):
                got = kernels.tanh_gaussian_backward(seed, share, leaf, raw, noise, out=out)
                for mine, other in zip(got, exact, strict=True):
                    torch.testing.assert_close(mine.float(), other, rtol=1e-5, atol=1e-5)
            assert whole._version > version
            assert whole.isnan().sum() == whole.numel() - inside.numel()
    assert "tanh_gaussian_backward" in seen
    for shape in ((0, 4), (3, 0)):
        none = torch.zeros(shape)
        assert (kernels.tanh_gaussian(none, none, none)[1] == torch.zeros(shape[:-1])).all()
        assert kernels.tanh_gaussian_backward(none, 1.0, none, none, none)[1].shape == shape
    mean = torch.tensor([[math.nan, 0.0], [math.inf, 1e4], [-1e4, 0.5]])
    actions, log_probs = kernels.tanh_gaussian(mean, torch.zeros(3, 2), torch.ones(3, 2))
    assert actions.isnan().tolist() == [[True, False], [False, False], [False, False]]
    assert log_probs.isnan().tolist() == [True, False, False]


def test_what_cannot_be_written_is_refused() -> None:
    mean, rng = torch.zeros(2, 3), rng_of(0, 0)
    wide = torch.zeros(4, 6)
    forward: list[tuple[dict[str, Tensor], type, str]] = [
        ({"out": torch.zeros(2, 4)}, ValueError, "out ... shape of mean, [2, 3], got [2, 4]"),
        ({"out": torch.zeros(2, 3).long()}, TypeError, "out must be of dtype ... got torch.int64"),
        ({"out": torch.zeros(2, 3, device="meta")}, ValueError, "out must be on cpu ... got meta"),
        ({"out": wide[:2, ::2]}, ValueError, "out must have dense rows ... got strides"),
        ({"out": torch.zeros(3).expand(2, 3)}, ValueError, "out must have dense rows ... got strides [0, 1]"),
        ({"noise_out": torch.zeros(3, 3)}, ValueError, "noise_out must have the shape of mean"),
        ({"noise_out": wide[:2, :3]}, ValueError, "noise_out must be contiguous, got strides [6, 1]"),
        ({"noise_out": mean.bfloat16()}, TypeError, "noise_out ... torch.float32 or torch.float64"),
        ({"noise_out": mean, "noise": mean}, ValueError, "noise_out takes what is drawn from rng, got noise"),
    ]
    for change, error, told in forward:
        with pytest.raises(error, match=says(told)):
            kernels.tanh_gaussian(mean, mean, **({} if "noise" in change else {"rng": rng}), **change)
    leaf = torch.zeros(2, 3, requires_grad=True)
    for name in ("out", "noise_out"):
        for heads in ((leaf, mean), (mean, leaf)):
            with pytest.raises(RuntimeError, match=f"{name} has no gradient: detach mean and raw_log_std"):
                kernels.tanh_gaussian(*heads, rng=rng, **{name: torch.zeros(2, 3)})
    uneven = torch.zeros(4, 5, 3)[::2, :3]  # 3 rows, a gap of 2, and so on
    grid = torch.zeros(2, 3, 3)
    given = dict.fromkeys(("mean", "raw_log_std", "noise"), mean)
    backward: list[tuple[dict[str, Any], type, str]] = [
        ({"dactions": torch.zeros(3)}, ValueError, "dactions ... [2, 3], got [3]"),
        ({"dactions": torch.zeros(2, 3, 3)}, ValueError, "dactions ... [2, 3], got [2, 3, 3]"),
        ({"dlog_probs": torch.zeros(3)}, ValueError, "dlog_probs ... [2] of mean, or [], got [3]"),
        ({"noise": mean[0]}, ValueError, "noise must have the shape of mean"),
        (dict.fromkeys(given, torch.zeros(())), ValueError, "mean ... [.., A], got []"),
        ({"out": (mean.int(), mean)}, TypeError, "out[0] must be of dtype"),
        (
            dict.fromkeys(given, grid) | {"out": (grid.clone(), uneven)},
            ValueError,
            "out[1] must have dense rows",
        ),
        ({"impl": "triton"}, RuntimeError, "kernels were asked for"),
    ]
    for change, error, told in backward:
        with pytest.raises(error, match=says(told)):
            kernels.tanh_gaussian_backward(**{"dactions": None, "dlog_probs": None, **given, **change})


def test_normals_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=says("dtype must be one of torch.float32, ... got torch.int64")):
        policy.standard_normal(rng_of(0, 0), (3,), torch.int64)
    with pytest.raises(RuntimeError, match="kernels were asked for"):
        policy.standard_normal(rng_of(0, 0), (3,), impl="triton")
