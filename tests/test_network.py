"""Stacked networks as one op, against its twin in float64; BroNet is one of them."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_harness import OPS, assert_follows_twin, guarded, outputs_and_gradients
from stacks import ALL, BODIES, INPUTS, in_rows, parameters_of
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from brc_fast import BroNet, Critic, CriticConfig, kernels
from brc_fast.kernels import Stage, reference
from brc_fast.kernels.network import MOST_BYTES, Workspace, bronet_stages
from brc_fast.kernels.runtime.dispatch import watching
from brc_fast.kernels.runtime.native import compiled
from brc_fast.kernels.stages import KEEP_ALL, KEEP_FOR_INPUT, KEEP_NOTHING
from brc_fast.nn import bodies

Function = Callable[..., Tensor]
# networks, rows, inputs, shared input
CRITIC = (2, 9, INPUTS, True)
SIZES = [
    CRITIC,
    (1, 5, 7, True),  # an actor
    (4, 3, 6, False),  # an input per network, as online and target stacked have
    (3, 1, 1, True),  # one row, one input
    (2, 66, 5, True),  # more rows than a tile takes
]
CASES = [(name, size) for name in BODIES for size in SIZES]
CASES += [(name, (2, 9, INPUTS, shared)) for name in ALL if name not in BODIES for shared in (True, False)]
EACH_CASE = pytest.mark.parametrize(("body", "size"), CASES, ids=[f"{n}-{s}" for n, s in CASES])
EACH_BODY = pytest.mark.parametrize("body", BODIES)
EVERY_BODY = pytest.mark.parametrize("body", ALL)
A_FEW_BODIES = pytest.mark.parametrize("body", [*BODIES, "values used several times"])


class Problem:
    """x and the parameters, in order, with a gradient of the outputs; and the op as a function of them."""

    def __init__(self, body: str, networks: int, rows: int, inputs: int, shared: bool) -> None:
        rng = torch.Generator().manual_seed(0)
        self.stages = ALL[body]
        self.names, parameters = zip(*parameters_of(self.stages, networks, inputs, rng).items(), strict=True)
        shape = (rows, inputs) if shared else (networks, rows, inputs)
        x = torch.randn(shape, generator=rng, dtype=torch.float64)
        self.tensors = [x, *parameters]
        outputs = networks, rows, self.stages[-1].outputs
        self.seeds = [torch.randn(outputs, generator=rng, dtype=torch.float64)]

    def call(self, function: Function, **options: str) -> Function:
        def called(x: Tensor, *parameters: Tensor) -> Tensor:
            return function(x, self.stages, dict(zip(self.names, parameters, strict=True)), **options)

        return called

    @property
    def op(self) -> Function:
        return self.call(kernels.network)

    @property
    def twin(self) -> Function:
        return self.call(reference.network)

    def to(self, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [t.to(device, dtype) for t in self.tensors]


@pytest.fixture(params=["auto", pytest.param("triton", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device, of the compiled passes of a CPU, and of the kernels."""
    if request.param == "auto" and compiled is None:
        pytest.skip("the compiled passes are not built")
    with kernels.use(request.param):
        yield request.getfixturevalue("kernel_device") if request.param == "triton" else "cpu"


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """One function of these tests is compiled for many networks, more than a compiler makes of one."""
    yield
    torch._dynamo.reset()


@EACH_CASE
def test_value_and_every_gradient_follow_the_twin(
    place: str, body: str, size: tuple[int, int, int, bool]
) -> None:
    problem = Problem(body, *size)
    wanted = range(len(problem.tensors))
    given = problem.tensors, problem.seeds
    results = assert_follows_twin(problem.op, problem.twin, *given, wanted, torch.float32, place)
    assert all(grad.abs().sum() > 0 for grad in results[1:])


@pytest.mark.gpu
@EVERY_BODY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kernels_follow_the_twin_in_other_dtypes(kernel_device: str, body: str, dtype: torch.dtype) -> None:
    problem = Problem(body, *CRITIC)
    given = problem.tensors, problem.seeds, range(len(problem.tensors)), dtype, kernel_device
    assert_follows_twin(problem.call(kernels.network, impl="triton"), problem.twin, *given)


@pytest.mark.gpu
def test_an_implementation_that_is_asked_for_is_the_one_that_runs(kernel_device: str) -> None:
    problem, launched = Problem("bronet", *CRITIC), []
    with torch.no_grad():
        for impl in ("triton", "reference"):
            with watching(launched.append):
                problem.call(kernels.network, impl=impl)(*problem.to(kernel_device))
            assert len(launched) == 5  # norms, all of the first call


@EVERY_BODY
def test_frozen_networks_give_the_input_its_gradient_and_keep_less(place: str, body: str) -> None:
    problem = Problem(body, *CRITIC)
    given = problem.tensors, problem.seeds
    assert_follows_twin(problem.op, problem.twin, *given, [0], torch.float32, place)


@pytest.mark.gpu
@EACH_BODY
def test_what_is_kept_for_the_input_alone_is_less(kernel_device: str, body: str) -> None:
    """Numbers of each row. Values serve weight gradients alone, but for those after a ReLU or before a norm
    alone: there is memory for as many of the others as are in use at a time."""
    problem, kept = Problem(body, 2, 64, INPUTS, True), []
    for wanted in ((0,), range(len(problem.tensors))):
        tensors = problem.to(kernel_device, torch.float64)  # for float32 memory may be that of a CPU's passes
        leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        out = problem.call(kernels.network, impl="triton")(*leaves)
        mine = [t for t in out.grad_fn.saved_tensors if all(t.data_ptr() != x.data_ptr() for x in leaves)]
        kept.append(sum(t.numel() for t in mine) // (2 * 64))
    stats = {"bronet": 2 * 5, "simba": 2 * 3, "mlp": 0}[body]
    values = {
        "bronet": ((5 + 3) * 33, 10 * 33),
        "simba": (4 * 9 + 2 * 36, 6 * 9 + 2 * 36),
        "mlp": (3 * 33, 3 * 33),
    }
    assert kept == [stats + number for number in values[body]]


@EVERY_BODY
def test_parameters_alone_get_the_gradients_they_get_with_the_input(place: str, body: str) -> None:
    problem = Problem(body, *CRITIC)
    tensors, seeds = problem.to(place), [s.float().to(place) for s in problem.seeds]
    _, _, *expected = outputs_and_gradients(problem.op, tensors, seeds, range(len(tensors)))
    _, *mine = outputs_and_gradients(problem.op, tensors, seeds, range(1, len(tensors)))
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@EVERY_BODY
def test_without_gradients_the_value_has_the_same_bits(place: str, body: str) -> None:
    problem = Problem(body, *CRITIC)
    tensors = [t.requires_grad_() for t in problem.to(place)]
    with torch.no_grad():
        free = problem.op(*tensors)
    kept = problem.op(*tensors)
    assert free.grad_fn is None
    assert torch.equal(free, kept.detach())
    with torch.inference_mode():
        assert torch.equal(problem.op(*tensors), free)


@EACH_BODY
def test_networks_of_flat_rows_run_as_one_stack(place: str, body: str) -> None:
    """Online and target as one [2E] stack: parameters are views, a whole network apart in memory."""
    problem = Problem(body, 4, 9, INPUTS, False)
    x, *parameters = problem.to(place)
    rows, views = in_rows(dict(zip(problem.names, parameters, strict=True)), 3, float("nan"))
    apart = list(views(rows.to(place)).values())
    assert not apart[0].is_contiguous()
    seeds = [torch.randn_like(s, dtype=torch.float32).to(place) for s in problem.seeds]
    wanted = range(1 + len(parameters))
    stacked = outputs_and_gradients(problem.op, [x, *apart], seeds, wanted)
    dense = outputs_and_gradients(problem.op, [x, *parameters], seeds, wanted)
    assert all(torch.equal(a, b) for a, b in zip(stacked, dense, strict=True))
    for half in (slice(0, 2), slice(2, 4)):
        part = outputs_and_gradients(problem.op, [t[half] for t in (x, *apart)], [seeds[0][half]], wanted)
        for a, b in zip(stacked, part, strict=True):
            torch.testing.assert_close(a[half], b, rtol=1e-5, atol=1e-5)


@EVERY_BODY
def test_inputs_parameters_and_gradients_may_lie_anyhow_in_memory(place: str, body: str) -> None:
    problem = Problem(body, 2, 4, INPUTS, False)
    tensors, wanted = problem.to(place), range(len(problem.tensors))
    seed = problem.seeds[0].float().to(place)
    dense = outputs_and_gradients(problem.op, tensors, [seed], wanted)

    def turned(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT if x.dim() > 2 else torch.stack([x, x], -1)[..., 0]

    strided = outputs_and_gradients(problem.op, [turned(t) for t in tensors], [turned(seed)], wanted)
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    leaves = [t.clone().requires_grad_() for t in tensors]
    summed = torch.autograd.grad(problem.op(*leaves).sum(), leaves)
    ones = outputs_and_gradients(problem.op, tensors, [torch.ones_like(seed)], wanted)[1:]
    assert all(torch.equal(a, b) for a, b in zip(summed, ones, strict=True))


@EVERY_BODY
def test_an_empty_batch_has_empty_values_and_zero_gradients(place: str, body: str) -> None:
    problem = Problem(body, 2, 0, INPUTS, True)
    seeds = [s.float().to(place) for s in problem.seeds]
    out, *grads = outputs_and_gradients(problem.op, problem.to(place), seeds, range(len(problem.tensors)))
    assert out.shape == problem.seeds[0].shape
    assert all((grad == 0).all() for grad in grads)


@EACH_BODY
def test_two_runs_give_the_same_bits(place: str, body: str) -> None:
    problem = Problem(body, *CRITIC)
    tensors, seeds = problem.to(place), [s.float().to(place) for s in problem.seeds]
    wanted = range(len(tensors))
    runs = [outputs_and_gradients(problem.op, [guarded(t) for t in tensors], seeds, wanted) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@EACH_BODY
def test_a_backward_pass_may_be_made_again_and_several_graphs_live_at_once(place: str, body: str) -> None:
    problem = Problem(body, *CRITIC)
    leaves = [t.requires_grad_() for t in problem.to(place)]
    seed = problem.seeds[0].float().to(place)
    first, other = problem.op(*leaves), problem.op(2.0 * leaves[0], *leaves[1:])
    expected = torch.autograd.grad(first, leaves, seed, retain_graph=True)
    problem.op(*leaves).sum().backward()
    torch.autograd.grad(other, leaves, seed)
    for mine, grad in zip(torch.autograd.grad(first, leaves, seed), expected, strict=True):
        assert torch.equal(mine, grad)


def test_a_second_derivative_is_refused(place: str) -> None:
    problem = Problem("bronet", *CRITIC)
    x, *parameters = problem.to(place)
    total = problem.op(x.requires_grad_(), *parameters).sum()
    with pytest.raises(RuntimeError, match=r"no second derivative .*: use kernels.reference.network"):
        torch.autograd.grad(total, x, create_graph=True)


@EACH_BODY
def test_autocast_takes_its_dtype_for_the_products_and_gives_float32_gradients(place: str, body: str) -> None:
    problem = Problem(body, *CRITIC)
    x, *parameters = leaves = [t.requires_grad_() for t in problem.to(place)]
    with torch.autocast(place, torch.bfloat16):
        out = problem.op(*leaves)
    assert out.dtype == torch.bfloat16
    low = [t.detach().bfloat16().requires_grad_() if t.dim() == 3 else t for t in parameters]
    low = [x.detach().bfloat16().requires_grad_(), *low]
    plain = problem.op(*low)
    assert torch.equal(out, plain)
    seed = problem.seeds[0].to(place, torch.bfloat16)
    grads, expected = torch.autograd.grad(out, leaves, seed), torch.autograd.grad(plain, low, seed)
    for mine, other in zip(grads, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, other.float())


@A_FEW_BODIES
@pytest.mark.parametrize("wanted", ["all", "input", "nothing"])
@pytest.mark.parametrize("passes", ["passes_cpu", pytest.param("norm", marks=pytest.mark.gpu)])
def test_the_library_ops_pass_opcheck(
    request: pytest.FixtureRequest, passes: str, wanted: str, body: str
) -> None:
    module = sys.modules["brc_fast.kernels.network"]  # the package's own name for it is the function
    device = request.getfixturevalue("kernel_device") if passes == "norm" else "cpu"
    problem = Problem(body, 2, 32, INPUTS, True)  # so that there is nothing between pieces of memory
    x, *parameters = problem.to(device)
    keep = {"all": KEEP_ALL, "input": KEEP_FOR_INPUT, "nothing": KEEP_NOTHING}[wanted]
    how = module._encoded(problem.stages), passes, keep
    torch.library.opcheck(OPS.network.default, (x, parameters, *how))
    if wanted != "nothing":
        kept = OPS.network(x, parameters, *how)[1:]
        arguments = (problem.seeds[0].float().to(device), x, parameters, *kept, *how, True)
        torch.library.opcheck(OPS.network_backward.default, arguments)


@EACH_BODY
@pytest.mark.parametrize("shared", [True, False])
def test_compiled_and_transformed_calls_equal_plain_ones(place: str, body: str, shared: bool) -> None:
    problem = Problem(body, 2, 3, INPUTS, shared)
    tensors = problem.to(place)

    def loss(*tensors: Tensor) -> Tensor:
        return problem.op(*tensors).sin().sum()

    leaves = [t.clone().requires_grad_() for t in tensors]
    plain = torch.autograd.grad(loss(*leaves), leaves)
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(value.detach(), loss(*tensors))
    for mine, expected in zip(torch.autograd.grad(value, leaves), plain, strict=True):
        assert torch.equal(mine, expected)
    for mine, expected in zip(
        torch.func.grad(loss, tuple(range(len(tensors))))(*tensors), plain, strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=3e-5)
    rows = torch.stack([tensors[0], 2 * tensors[0]])
    mapped = torch.func.vmap(lambda x: problem.op(x, *tensors[1:]))(rows)
    for mine, x in zip(mapped, rows, strict=True):
        torch.testing.assert_close(mine, problem.op(x, *tensors[1:]))


@A_FEW_BODIES
@pytest.mark.parametrize("trained", ["all", "input", "nothing"])
def test_a_compiler_calls_the_passes_of_a_cpu(body: str, trained: str) -> None:
    """As one op each way, with the bits of a plain call; also where the vectors of a stage lie apart."""
    problem = Problem(body, 2, 3, INPUTS, False)
    leaves = problem.to("cpu")
    apart = next(i for i, t in enumerate(leaves) if t.dim() == 2)
    leaves[apart] = torch.stack([leaves[apart], leaves[apart]], -1)[..., 0]  # a vector with gaps
    wanted = {"all": leaves, "input": leaves[:1], "nothing": []}[trained]
    for leaf in wanted:
        leaf.requires_grad_()
    graphs = []

    def seen(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    backend = aot_autograd(fw_compiler=seen, bw_compiler=seen)
    out = torch.compile(problem.op, fullgraph=True, backend=backend)(*leaves)
    expected = problem.op(*leaves)
    assert torch.equal(out, expected)
    assert "brc_fast.network.default" in graphs[0]
    if wanted:
        grads = torch.autograd.grad(out.sin().sum(), wanted)
        for mine, plain in zip(grads, torch.autograd.grad(expected.sin().sum(), wanted), strict=True):
            assert torch.equal(mine, plain)
        assert "brc_fast.network_backward.default" in graphs[1]


def test_one_compiled_function_serves_networks_of_several_widths() -> None:
    """After the first, a compiler takes widths for symbols, also those that it finds in stages."""

    def called(x: Tensor, parameters: dict[str, Tensor], stages: tuple[Stage, ...]) -> Tensor:
        return kernels.network(x, stages, parameters)

    compiled, bronet = torch.compile(called, fullgraph=True), torch.compile(kernels.bronet, fullgraph=True)
    rng = torch.Generator().manual_seed(0)
    for width, outputs in ((8, 3), (12, 5), (20, 6)):
        for stages in (bronet_stages(width, 1, outputs), bodies.simba(width, 1, outputs)):
            parameters = {name: p.float() for name, p in parameters_of(stages, 2, width // 2, rng).items()}
            x = torch.randn(width + outputs, width // 2)
            expected = kernels.network(x, stages, parameters)
            assert torch.equal(compiled(x, parameters, stages), expected)
            if stages[1].product:
                assert torch.equal(bronet(x, *parameters.values()), expected)


@pytest.mark.filterwarnings("error:Dynamo:UserWarning")
def test_a_compiler_has_nothing_to_warn_of() -> None:
    critic = Critic(3, 2, config=CriticConfig(width=8))
    compiled = torch.compile(critic, fullgraph=True, backend="eager")
    compiled(torch.randn(4, 3), torch.randn(4, 2))


@EACH_BODY
def test_transforms_that_are_compiled_take_the_twin(body: str) -> None:
    problem = Problem(body, 2, 3, 5, True)
    tensors = problem.to("cpu")

    def gradient(*tensors: Tensor) -> Tensor:
        return torch.func.grad(lambda x: problem.op(x, *tensors[1:]).sin().sum())(tensors[0])

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), gradient(*tensors))


def test_what_is_exported_needs_nothing_of_this_package() -> None:
    body = BroNet(5, 3, width=8, depth=1)
    program = torch.export.export(body, (torch.randn(4, 5),))
    assert not [node.target for node in program.graph.nodes if "brc_fast" in str(node.target)]


@EACH_BODY
def test_a_checkpoint_gives_the_same_gradients(place: str, body: str) -> None:
    problem = Problem(body, *CRITIC)
    leaves = [t.requires_grad_() for t in problem.to(place)]
    plain = torch.autograd.grad(problem.op(*leaves).sum(), leaves)
    again = torch.autograd.grad(checkpoint(problem.op, *leaves, use_reentrant=False).sum(), leaves)
    for mine, expected in zip(again, plain, strict=True):
        assert torch.equal(mine, expected)


# -- what is refused


IMPLEMENTATIONS = ("auto", "reference", "compile")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("input.kernel", r"input\.kernel must be of the dtype of x, torch.float32, got torch.bfloat16"),
        ("head.kernel", r"head\.kernel must be of the dtype of x, torch.float32, got torch.bfloat16"),
        (
            "blocks.0.1.bias",
            r"blocks\.0\.1\.bias must be of the dtype of the other vectors, torch.float32",
        ),
    ],
)
def test_parameters_of_another_dtype_are_refused(name: str, told: str) -> None:
    problem = Problem("bronet", *CRITIC)
    x, *parameters = problem.to("cpu")
    place = problem.names.index(name)
    parameters[place] = parameters[place].bfloat16()
    for impl in IMPLEMENTATIONS:
        with pytest.raises(TypeError, match=told):
            problem.call(kernels.network, impl=impl)(x, *parameters)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("input.kernel", (11, 33), r"input\.kernel must have shape"),
        ("head.kernel", (2, 6, 33), r"head\.kernel must have shape .* = \[2, 33, 6\], got \[2, 6, 33\]"),
        ("head.bias", (2, 1), r"head\.bias must have shape \[N, outputs\] = \[2, 6\], got \[2, 1\]"),
        ("head.bias", (1, 6), r"head\.bias must have shape \[N, outputs\] = \[2, 6\], got \[1, 6\]"),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...], told: str) -> None:
    problem = Problem("bronet", *CRITIC)
    x, *parameters = problem.to("cpu")
    parameters[problem.names.index(name)] = torch.zeros(shape)
    for impl in IMPLEMENTATIONS:
        with pytest.raises(ValueError, match=told):
            problem.call(kernels.network, impl=impl)(x, *parameters)


@pytest.mark.parametrize("body", ["bronet", "norm of the input"])
@pytest.mark.parametrize("shape", [(9, 12), (9, 1), (3, 9, INPUTS), (INPUTS,), (1, 2, 9, INPUTS)])
def test_an_input_that_does_not_fit_is_refused(body: str, shape: tuple[int, ...]) -> None:
    problem = Problem(body, *CRITIC)
    _, *parameters = problem.to("cpu")
    with pytest.raises(ValueError, match=r"x must have shape .* with N = 2, I = 11, got \["):
        problem.op(torch.zeros(shape), *parameters)


def test_bronet_is_the_network_of_its_stages_and_tells_how_many_tensors_it_takes() -> None:
    problem = Problem("bronet", *CRITIC)
    x, *parameters = problem.to("cpu")
    assert torch.equal(kernels.bronet(x, *parameters), problem.op(x, *parameters))
    torch.testing.assert_close(reference.bronet(x, *parameters), problem.twin(x, *parameters))
    for count in (5, 7, 10, 13):
        with pytest.raises(ValueError, match=f"6, 14, 22, ... in all, got {count}"):
            kernels.bronet(x, *parameters[:count])
    for place, whose in ((0, "the input"), (-2, "the head")):
        wrong = list(parameters)
        wrong[place] = wrong[place][0]
        with pytest.raises(
            ValueError, match=rf"the kernel of {whose} must have shape \[N, inputs, outputs\]"
        ):
            kernels.bronet(x, *wrong)


# -- memory of a CPU that is used again


@pytest.fixture
def nothing_free() -> Iterator[Callable[[], int]]:
    """Bytes of scratch memory that nobody uses, of which there are none at first."""
    gc.collect()
    Workspace.free.clear()
    yield lambda: sum(t.nbytes for tensors in Workspace.free.values() for t in tensors)
    Workspace.free.clear()


def test_scratch_memory_of_many_sizes_stays_within_its_bound(nothing_free: Callable[[], int]) -> None:
    critic = Critic(17, 6, config=CriticConfig(width=256))
    for rows in (1024, 1500, 2048, 2500, 3000):
        critic(torch.randn(rows, 17), torch.rand(rows, 6)).sum().backward()
        assert 0 < nothing_free() <= MOST_BYTES
    with torch.no_grad():
        critic(torch.randn(20_000, 17), torch.rand(20_000, 6))
    assert nothing_free() <= MOST_BYTES


def test_memory_that_comes_back_is_used_again_by_the_next_pass(nothing_free: Callable[[], int]) -> None:
    problem = Problem("bronet", *CRITIC)
    leaves = [t.requires_grad_() for t in problem.to("cpu")]
    free = []
    for _ in range(3):
        problem.op(*leaves).sum().backward()
        with torch.inference_mode():
            problem.op(*leaves)
        free.append(nothing_free())
    assert 0 < free[0] == free[1] == free[2]
    kept = [problem.op(*leaves) for _ in range(3)]
    seed = problem.seeds[0].float()
    grads = [torch.autograd.grad(out, leaves, seed) for out in kept]
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_a_graph_that_is_kept_keeps_its_activations(nothing_free: Callable[[], int]) -> None:
    problem = Problem("bronet", *CRITIC)
    leaves = [t.requires_grad_() for t in problem.to("cpu")]
    out = problem.op(*leaves)
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    others = [problem.op(2.0 * leaves[0], *leaves[1:]) for _ in range(3)]
    for other in others:
        torch.autograd.grad(other.sum(), leaves)
    for mine, grad in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert torch.equal(mine, grad)


PEAK = """
import resource, sys, torch
from brc_fast import Critic, CriticConfig, kernels
torch.set_num_threads(1)
critic = Critic(17, 6, config=CriticConfig(width=256))
observations, actions = torch.randn(16384, 17), torch.rand(16384, 6)
with torch.no_grad(), kernels.use(sys.argv[1]):
    critic.values(observations[:8], actions[:8])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    critic.values(observations, actions)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_many_rows_without_gradients_take_no_more_memory_than_the_twin() -> None:
    def peak(impl: str) -> int:
        out = subprocess.run([sys.executable, "-c", PEAK, impl], capture_output=True, text=True, check=True)
        return int(out.stdout)

    assert peak("auto") <= 1.1 * peak("reference")


def test_a_module_is_copied_without_its_scratch_memory(nothing_free: Callable[[], int]) -> None:
    body = BroNet(5, 3, width=8, depth=1)
    body(torch.randn(4, 5)).sum().backward()
    twin = copy.deepcopy(body)
    x = torch.randn(4, 5)
    assert torch.equal(twin(x), body(x))
