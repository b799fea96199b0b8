"""BroNet through the kernels: one op over stacked networks, against its twin in float64."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch
from kernel_harness import assert_follows_twin, guarded, outputs_and_gradients
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from brc_fast import BroNet, kernels
from brc_fast.kernels import reference

bronet = partial(kernels.bronet, impl="triton")
# networks, rows, inputs, width, blocks, outputs, shared input
CRITIC = (2, 9, 13, 32, 2, 11, True)
SIZES = [
    CRITIC,
    (1, 5, 7, 16, 1, 4, True),  # an actor
    (4, 3, 6, 24, 1, 5, False),  # an input per network, as online and target stacked have
    (3, 1, 1, 33, 0, 2, True),  # one row, one input, no block, an odd width
    (2, 66, 5, 8, 3, 3, True),  # more rows than a tile takes
]


def networks(
    count: int, rows: int, inputs: int, width: int, blocks: int, outputs: int, shared: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """x and the parameters; a seed for the output."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    parameters = []
    for size in [inputs] + [width] * (2 * blocks):
        parameters += [
            normal(count, size, width) / math.sqrt(size),
            *(normal(count, width) for _ in range(3)),
        ]
    parameters += [normal(count, width, outputs) / math.sqrt(width), normal(count, outputs)]
    x = normal(rows, inputs) if shared else normal(count, rows, inputs)
    return [x, *parameters], [normal(count, rows, outputs)]


def without_flips(inputs: list[Tensor]) -> list[Tensor]:
    """The same with norms whose shifts are far larger than their weights: every ReLU is clearly on or off.

    In 8 or 11 bits a ReLU near its kink is on in one way of rounding and off in another, and the gradients of
    its whole row differ by as much as they are.
    """
    changed = list(inputs)
    for place in range(3, len(inputs) - 2, 4):
        changed[place] = 0.2 + 0.3 * torch.rand_like(inputs[place])
        changed[place + 1] = 3.0 * inputs[place + 1].sign() + 0.3 * inputs[place + 1]
    return changed


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_and_every_gradient_follow_the_twin(
    kernel_device: str, size: tuple[int, int, int, int, int, int, bool], dtype: torch.dtype
) -> None:
    if dtype in (torch.float64, torch.float16) and size != CRITIC:
        pytest.skip("one size is enough in this dtype")
    inputs, seeds = networks(*size)
    wanted = range(len(inputs))
    inputs = without_flips(inputs) if dtype in (torch.bfloat16, torch.float16) else inputs
    results = assert_follows_twin(bronet, reference.bronet, inputs, seeds, wanted, dtype, kernel_device)
    assert all(grad.abs().sum() > 0 for grad in results[1:])


@pytest.mark.gpu
def test_frozen_networks_give_the_input_its_gradient_and_keep_less(kernel_device: str) -> None:
    inputs, seeds = networks(*CRITIC)
    assert_follows_twin(bronet, reference.bronet, inputs, seeds, [0], torch.float32, kernel_device)
    x, *parameters = (t.float().to(kernel_device) for t in inputs)
    out = bronet(x.requires_grad_(), *parameters)
    kept = [t.shape for t in out.grad_fn.saved_tensors[-3:]]
    assert kept[1].numel() == 0  # the layers' outputs serve weight gradients alone
    assert kept[0].numel() > 0


@pytest.mark.gpu
def test_parameters_alone_get_the_gradients_they_get_with_the_input(kernel_device: str) -> None:
    inputs, seeds = networks(*CRITIC)
    wanted = range(1, len(inputs))
    assert_follows_twin(bronet, reference.bronet, inputs, seeds, wanted, torch.float32, kernel_device)


@pytest.mark.gpu
def test_without_gradients_the_value_has_the_same_bits(kernel_device: str) -> None:
    inputs, _ = networks(2, 9, 13, 32, 3, 11, True)  # three blocks: the three buffers go round twice
    tensors = [t.float().to(kernel_device).requires_grad_() for t in inputs]
    with torch.no_grad():
        free = bronet(*tensors)
    kept = bronet(*tensors)
    assert free.grad_fn is None
    assert torch.equal(free, kept.detach())


@pytest.mark.gpu
def test_networks_of_two_flat_buffers_run_as_one_stack(kernel_device: str) -> None:
    """Online and target as one [2E] stack: parameters are views, a whole network apart in memory."""
    inputs, _ = networks(4, 9, 13, 32, 2, 11, False)
    x, *parameters = (t.float().to(kernel_device) for t in inputs)
    flat = torch.cat([p.reshape(4, -1) for p in parameters], 1)  # [N, parameters of one network]
    sizes = [p[0].numel() for p in parameters]
    views = [v.view(p.shape) for v, p in zip(flat.split(sizes, 1), parameters, strict=True)]
    assert not views[0].is_contiguous()
    seeds = [torch.randn(4, 9, 11, device=kernel_device)]
    wanted = range(len(inputs))
    stacked = outputs_and_gradients(bronet, [x, *views], seeds, wanted)
    dense = outputs_and_gradients(bronet, [x, *parameters], seeds, wanted)
    assert all(torch.equal(a, b) for a, b in zip(stacked, dense, strict=True))
    for half in (slice(0, 2), slice(2, 4)):
        part = outputs_and_gradients(bronet, [t[half] for t in (x, *parameters)], [seeds[0][half]], wanted)
        for a, b in zip(stacked, part, strict=True):
            torch.testing.assert_close(a[half], b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_inputs_parameters_and_gradients_may_lie_anyhow_in_memory(kernel_device: str) -> None:
    inputs, _ = networks(2, 4, 6, 16, 1, 3, False)
    tensors = [t.float().to(kernel_device) for t in inputs]
    wanted = range(len(tensors))
    seed = torch.randn(2, 4, 3, device=kernel_device)
    dense = outputs_and_gradients(bronet, tensors, [seed], wanted)

    def turned(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT if x.dim() > 2 else torch.stack([x, x], -1)[..., 0]

    strided = outputs_and_gradients(bronet, [turned(t) for t in tensors], [turned(seed)], wanted)
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    leaves = [t.clone().requires_grad_() for t in tensors]
    summed = torch.autograd.grad(bronet(*leaves).sum(), leaves)
    ones = outputs_and_gradients(bronet, tensors, [torch.ones_like(seed)], wanted)[1:]
    assert all(torch.equal(a, b) for a, b in zip(summed, ones, strict=True))


@pytest.mark.gpu
def test_an_empty_batch_has_empty_values_and_zero_gradients(kernel_device: str) -> None:
    inputs, seeds = networks(2, 0, 6, 16, 1, 3, True)
    tensors = [t.float().to(kernel_device) for t in inputs]
    seeds = [s.float().to(kernel_device) for s in seeds]
    out, *grads = outputs_and_gradients(bronet, tensors, seeds, range(len(inputs)))
    assert out.shape == (2, 0, 3)
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.gpu
def test_two_runs_give_the_same_bits(kernel_device: str) -> None:
    inputs, seeds = networks(*CRITIC)
    tensors, seed = [t.float().to(kernel_device) for t in inputs], seeds[0].float().to(kernel_device)
    runs = [
        outputs_and_gradients(bronet, [guarded(t) for t in tensors], [seed], range(len(inputs))) for _ in "ab"
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_a_second_derivative_is_refused(kernel_device: str) -> None:
    inputs, _ = networks(1, 4, 3, 8, 0, 2, True)
    x, *parameters = (t.float().to(kernel_device) for t in inputs)
    total = bronet(x.requires_grad_(), *parameters).sum()  # a seed that depends on nothing
    with pytest.raises(RuntimeError, match=r"no second derivative .*: use kernels.reference.bronet"):
        torch.autograd.grad(total, x, create_graph=True)


@pytest.mark.gpu
def test_autocast_takes_its_dtype_for_the_products_and_gives_float32_gradients(kernel_device: str) -> None:
    inputs, seeds = networks(*CRITIC)
    leaves = [t.float().to(kernel_device).requires_grad_() for t in inputs]
    with torch.autocast(kernel_device, torch.bfloat16):
        out = bronet(*leaves)
    assert out.dtype == torch.bfloat16
    low = [
        t.detach().bfloat16().requires_grad_() if t.dim() != 2 or i == 0 else t for i, t in enumerate(leaves)
    ]
    plain = bronet(*low)
    assert torch.equal(out, plain)
    seed = seeds[0].to(kernel_device, torch.bfloat16)
    grads, expected = torch.autograd.grad(out, leaves, seed), torch.autograd.grad(plain, low, seed)
    for mine, other in zip(grads, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, other.float())


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_the_library_ops_pass_opcheck(kernel_device: str, wanted: int) -> None:
    module = sys.modules[kernels.bronet.__module__]  # the package's own name for it is the function
    inputs, seeds = networks(2, 3, 5, 8, 1, 4, True)
    x, *parameters = (t.float().to(kernel_device) for t in inputs)
    torch.library.opcheck(module._bronet.library, (x, parameters, wanted))
    if wanted:
        kept = module._forward(x, parameters, wanted)[1:]
        arguments = (seeds[0].float().to(kernel_device), x, parameters, *kept, wanted, True)
        torch.library.opcheck(module._bronet_backward.library, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
def test_compiled_and_transformed_calls_equal_plain_ones(kernel_device: str, shared: bool) -> None:
    inputs, _ = networks(2, 3, 5, 8, 1, 4, shared)
    tensors = [t.float().to(kernel_device) for t in inputs]

    def loss(*tensors: Tensor) -> Tensor:
        return bronet(*tensors).sin().sum()

    leaves = [t.clone().requires_grad_() for t in tensors]
    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value = compiled(*leaves)
    assert torch.equal(value.detach(), loss(*tensors))
    for mine, expected in zip(torch.autograd.grad(value, leaves), plain, strict=True):
        assert torch.equal(mine, expected)
    places = tuple(range(len(tensors)))
    for mine, expected in zip(torch.func.grad(loss, places)(*tensors), plain, strict=True):
        torch.testing.assert_close(mine, expected)
    rows = torch.stack([tensors[0], 2 * tensors[0]])
    mapped = torch.func.vmap(lambda x: bronet(x, *tensors[1:]))(rows)
    assert torch.equal(mapped, torch.stack([bronet(x, *tensors[1:]) for x in rows]))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("trained", ["all", "input", "nothing"])
def test_a_compiler_calls_the_passes_of_a_cpu(shared: bool, trained: str) -> None:
    """As one op each way, with the bits of a plain call; also where the vectors of a layer lie apart."""
    inputs, _ = networks(2, 3, 5, 8, 1, 4, shared)
    leaves = [t.float() for t in inputs]
    leaves[2] = torch.stack([leaves[2], leaves[2]], -1)[..., 0]  # a bias with gaps
    wanted = {"all": leaves, "input": leaves[:1], "nothing": []}[trained]
    for leaf in wanted:
        leaf.requires_grad_()
    graphs = []

    def seen(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    backend = aot_autograd(fw_compiler=seen, bw_compiler=seen)
    out = torch.compile(kernels.bronet, fullgraph=True, backend=backend)(*leaves)
    expected = kernels.bronet(*leaves)
    assert torch.equal(out, expected)
    assert "brc_fast.bronet_on_cpu.default" in graphs[0]
    if wanted:
        grads = torch.autograd.grad(out.sin().sum(), wanted)
        for mine, plain in zip(grads, torch.autograd.grad(expected.sin().sum(), wanted), strict=True):
            assert torch.equal(mine, plain)
        assert "brc_fast.bronet_on_cpu_backward.default" in graphs[1]


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_the_library_ops_of_a_cpu_pass_opcheck(wanted: int) -> None:
    module = sys.modules[kernels.bronet.__module__]
    inputs, seeds = networks(2, 3, 5, 8, 1, 4, True)
    x, *parameters = (t.float() for t in inputs)
    torch.library.opcheck(module._bronet_on_cpu.library, (x, parameters, wanted))
    if wanted:
        kept = module._forward_on_cpu(x, parameters, wanted)[1:]
        arguments = (seeds[0].float(), x, parameters, *kept, wanted, True)
        torch.library.opcheck(module._bronet_backward_on_cpu.library, arguments)


def test_transforms_that_are_compiled_take_the_twin() -> None:
    inputs, _ = networks(2, 3, 5, 8, 1, 4, True)
    tensors = [t.float() for t in inputs]

    def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda x: kernels.bronet(x, *tensors[1:]).sin().sum())(tensors[0])

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), gradient(*tensors))


def test_what_is_exported_needs_nothing_of_this_package() -> None:
    body = BroNet(5, 3, width=8, depth=1)
    program = torch.export.export(body, (torch.randn(4, 5),))
    assert not [node.target for node in program.graph.nodes if "brc_fast" in str(node.target)]


@pytest.mark.gpu
def test_a_checkpoint_gives_the_same_gradients(kernel_device: str) -> None:
    inputs, _ = networks(2, 3, 5, 8, 1, 4, True)
    leaves = [t.float().to(kernel_device).requires_grad_() for t in inputs]
    plain = torch.autograd.grad(bronet(*leaves).sum(), leaves)
    again = torch.autograd.grad(checkpoint(bronet, *leaves, use_reentrant=False).sum(), leaves)
    for mine, expected in zip(again, plain, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("place", "dtype", "told"),
    [
        (
            1,
            torch.bfloat16,
            r"kernel of layer 0 must be of the dtype of x, torch.float32, got torch.bfloat16",
        ),
        (
            9,
            torch.bfloat16,
            r"kernel of layer 2 must be of the dtype of x, torch.float32, got torch.bfloat16",
        ),
        (
            13,
            torch.bfloat16,
            r"kernel of the head must be of the dtype of x, torch.float32, got torch.bfloat16",
        ),
        (
            6,
            torch.bfloat16,
            r"vectors of layer 1 must be of the dtype of those of layer 0, torch.float32, got torch.b",
        ),
    ],
)
def test_kernels_of_another_dtype_are_refused(place: int, dtype: torch.dtype, told: str) -> None:
    from brc_fast.kernels._checks import check_bronet_dtypes

    inputs, _ = networks(2, 3, 5, 8, 1, 4, True)
    tensors = [t.float() for t in inputs]
    check_bronet_dtypes(tensors[0], tensors[1:])
    tensors[place] = tensors[place].to(dtype)
    with pytest.raises(TypeError, match=told):
        check_bronet_dtypes(tensors[0], tensors[1:])
    with pytest.raises(TypeError, match=told):
        kernels.bronet(*tensors)


@pytest.mark.parametrize(
    ("place", "shape", "told"),
    [
        (-2, (2, 4, 8), r"kernel of the head must have shape .* with E = 2, H = 8, got \[2, 4, 8\]"),
        (-2, (8, 4), r"kernel of the head must have shape .* with E = 2, H = 8, got \[8, 4\]"),
        (-1, (2, 1), r"bias of the head must have shape \[E, K\] = \[2, 4\], got \[2, 1\]"),
        (-1, (1, 4), r"bias of the head must have shape \[E, K\] = \[2, 4\], got \[1, 4\]"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(place: int, shape: tuple[int, ...], told: str) -> None:
    inputs, _ = networks(2, 3, 5, 8, 1, 4, True)
    tensors = [t.float() for t in inputs]
    tensors[place] = torch.zeros(shape)
    for impl in ("auto", "reference"):
        with pytest.raises(ValueError, match=told):
            kernels.bronet(*tensors, impl=impl)
