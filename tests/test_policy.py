"""The tanh-Gaussian policy and its noise: kernels against twins, twins against definitions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from kernel_harness import assert_close_to_truth, assert_follows_twin, layouts, outputs_and_gradients
from torch import Tensor

from brc_fast import kernels
from brc_fast.kernels import policy, reference
from brc_fast.kernels._dispatch import recording
from brc_fast.kernels._triton import jit, tl

tanh_gaussian = partial(policy.tanh_gaussian, impl="triton")
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
    forward, backward = policy._tanh_gaussian_op.library, policy._tanh_gaussian_backward_op.library
    torch.library.opcheck(forward, (mean, raw, noise, None))
    torch.library.opcheck(forward, (mean, raw, None, rng))
    plain = [x.detach() for x in (mean, raw, noise)]
    torch.library.opcheck(backward, (noise, noise[:, 0], *plain))
    torch.library.opcheck(backward, (None, noise[:, 0], *plain))
    torch.library.opcheck(policy._standard_normal_op.library, (rng, 12, torch.bfloat16))


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


def test_forward_and_backward_are_one_launch_each_that_reads_the_halves_in_place() -> None:
    pytest.importorskip("triton")
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
    assert backward.arguments[7:11] == (11, 0, 8, 8)


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
        ({"noise": torch.zeros(2, 3), "rng": torch.zeros(2).long()}, ValueError, "must be given, got both"),
        (
            {"noise": torch.zeros(2, 4)},
            ValueError,
            r"noise must have the shape of mean, \[2, 3\], got \[2, 4\]",
        ),
        (
            {"rng": torch.zeros(3).long()},
            ValueError,
            r"rng must have shape \[2\], seed and offset, got \[3\]",
        ),
        ({"rng": torch.zeros(2)}, TypeError, "rng must be of dtype torch.int64, got torch.float32"),
        ({"rng": torch.zeros(2, device="meta").long()}, ValueError, "rng must be on cpu like mean, got meta"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Tensor], error: type, told: str) -> None:
    with pytest.raises(error, match=told):
        kernels.tanh_gaussian(torch.zeros(2, 3), torch.zeros(2, 3), **arguments)


def test_other_refusals_say_what_was_wanted() -> None:
    with pytest.raises(ValueError, match=r"raw_log_std must have the shape of mean, \[2, 3\], got \[3\]"):
        kernels.tanh_gaussian(torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"mean must have shape \[.., A\], got \[\]"):
        kernels.tanh_gaussian(torch.zeros(()), torch.zeros(()), torch.zeros(()))
    with pytest.raises(TypeError, match=r"dtype must be one of torch.float32, .*, got torch.int64"):
        policy.standard_normal(rng_of(0, 0), (3,), torch.int64)
    with pytest.raises(RuntimeError, match="kernels were asked for"):
        kernels.tanh_gaussian(*torch.zeros(3, 2, 3).unbind(0), impl="triton")
    with pytest.raises(RuntimeError, match="kernels were asked for"):
        policy.standard_normal(rng_of(0, 0), (3,), impl="triton")
