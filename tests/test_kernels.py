"""The ops against their twins, against definitions written out here, and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from brc_fast import kernels
from brc_fast.kernels import reference
from brc_fast.kernels.runtime import native

V_MAX = 10.0


def bronet_inputs(
    members: int, batch: int, inputs: int, width: int, depth: int, outputs: int, shared: bool
) -> tuple[Tensor, list[Tensor]]:
    shape = (batch, inputs) if shared else (members, batch, inputs)
    parameters = []
    for index in range(1 + 2 * depth):
        rows = inputs if index == 0 else width
        parameters += [torch.randn(members, rows, width) / math.sqrt(rows)]
        parameters += [torch.randn(members, width) for _ in range(3)]
    parameters += [torch.randn(members, width, outputs) / math.sqrt(width), torch.randn(members, outputs)]
    return torch.randn(shape), parameters


def run_bronet(op, x: Tensor, parameters: list[Tensor], seed: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output, gradient of the input and of every parameter."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *parameters)]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, seed.to(dtype))]


@pytest.mark.parametrize(
    ("members", "batch", "inputs", "width", "depth", "outputs", "shared"),
    [
        (2, 128, 6, 128, 2, 101, True),  # the demo's critic
        (1, 128, 5, 128, 1, 2, True),  # its actor
        (2, 64, 23, 64, 2, 101, False),  # an input per network
        (3, 7, 5, 33, 1, 3, True),  # nothing is a multiple of a vector's length
        (2, 1, 1, 2, 1, 2, True),  # a single row of two, shorter than any vector
        (1, 5, 4, 8, 0, 2, True),  # no blocks
        (2, 0, 4, 8, 1, 2, True),  # an empty batch
    ],
)
def test_the_fused_bronet_equals_its_float64_twin_in_value_and_in_every_gradient(
    members: int, batch: int, inputs: int, width: int, depth: int, outputs: int, shared: bool
) -> None:
    assert native.compiled is not None, "the compiled kernels are missing from this installation"
    torch.manual_seed(0)
    x, parameters = bronet_inputs(members, batch, inputs, width, depth, outputs, shared)
    seed = torch.randn(members, batch, outputs)
    ours = run_bronet(kernels.bronet, x, parameters, seed, torch.float32)
    truth = run_bronet(reference.bronet, x, parameters, seed, torch.float64)
    twin = run_bronet(reference.bronet, x, parameters, seed, torch.float32)
    for mine, exact, plain in zip(ours, truth, twin, strict=True):
        assert mine.shape == exact.shape
        allowed = 2.0 * (plain.double() - exact).norm() + 1e-5 * exact.norm() + 1e-6
        assert (mine.double() - exact).norm() <= allowed


def test_a_frozen_bronet_still_passes_the_gradient_of_its_input() -> None:
    torch.manual_seed(0)
    x, parameters = bronet_inputs(2, 16, 6, 32, 2, 11, shared=True)
    mine, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kernels.bronet(mine, *parameters).square().sum(), mine)
    (expected,) = torch.autograd.grad(reference.bronet(twin, *parameters).square().sum(), twin)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
    assert grad.abs().min() > 0


def test_bronet_accepts_strided_parameters_and_an_expanded_gradient() -> None:
    torch.manual_seed(0)
    x, parameters = bronet_inputs(2, 8, 6, 16, 1, 4, shared=True)
    strided = [torch.stack([p, p], -1)[..., 0].requires_grad_() for p in parameters]
    plain = [p.clone().requires_grad_() for p in parameters]
    ours = torch.autograd.grad(kernels.bronet(x, *strided).sum(), strided)  # the gradient of sum is expanded
    twin = torch.autograd.grad(reference.bronet(x, *plain).sum(), plain)
    for mine, expected in zip(ours, twin, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("place", "shape", "told"),
    [
        (0, (16, 7), r"x must have shape \[B, I\] or \[N, B, I\] with N = 2, I = 6, got \[16, 7\]"),
        (0, (3, 16, 6), r"got \[3, 16, 6\]"),
        (2, (2, 31), r"input\.bias must have shape .* = \[2, 32\], got \[2, 31\]"),
        (5, (2, 16, 32), r"blocks\.0\.0\.kernel must have shape .* = \[2, 32, 32\], got \[2, 16, 32\]"),
    ],
)
def test_bronet_refuses_shapes_that_do_not_fit(place: int, shape: tuple[int, ...], told: str) -> None:
    x, parameters = bronet_inputs(2, 16, 6, 32, 2, 11, shared=True)
    tensors = [x, *parameters]
    tensors[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=told):
        kernels.bronet(*tensors)
    with pytest.raises(ValueError, match="in all, got 21"):
        kernels.bronet(x, *parameters[:-1])


def test_nan_in_the_input_reaches_the_output() -> None:
    x, parameters = bronet_inputs(2, 4, 6, 16, 1, 3, shared=True)
    x[1, 2] = math.nan
    out = kernels.bronet(x, *parameters)
    assert out[:, 1].isnan().all()
    assert out[:, [0, 2, 3]].isfinite().all()


def test_a_second_derivative_of_the_fused_bronet_is_refused() -> None:
    x, parameters = bronet_inputs(1, 4, 3, 8, 0, 2, shared=True)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kernels.bronet(x, *parameters).sum(), x, create_graph=True)


@pytest.mark.parametrize("size", [1, 7, 4096])
@pytest.mark.parametrize("decay", [0.0, 1e-4])
def test_the_fused_optimizer_equals_its_twin_over_many_steps(size: int, decay: float) -> None:
    torch.manual_seed(0)
    rule = {"learning_rate": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay}
    start = torch.randn(size, dtype=torch.float64)
    states = []
    for op in (kernels.adamw_, reference.adamw_):
        torch.manual_seed(1)
        state = [start.clone(), *(torch.zeros(size, dtype=torch.float64) for _ in range(2)), torch.zeros(())]
        param, exp_avg, exp_avg_sq, step = state
        for _ in range(20):
            op(param, torch.randn(size, dtype=torch.float64), exp_avg, exp_avg_sq, step, **rule)
        states.append(state)
    for mine, twin in zip(*states, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-10, atol=1e-12)
    assert not torch.equal(states[0][0], start)
    assert states[0][3] == 20


def test_the_optimizer_twin_equals_torch_adamw() -> None:
    torch.manual_seed(0)
    param = torch.randn(50, dtype=torch.float64)
    leaf = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([leaf], lr=3e-3, betas=(0.5, 0.99), eps=1e-8, weight_decay=0.1)
    moments = [torch.zeros(50, dtype=torch.float64) for _ in range(2)]
    step = torch.zeros(())
    for _ in range(10):
        leaf.grad = torch.randn(50, dtype=torch.float64)
        rule = {"learning_rate": 3e-3, "betas": (0.5, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        reference.adamw_(param, leaf.grad, *moments, step, **rule)
        optimizer.step()
    torch.testing.assert_close(param, leaf.detach(), rtol=1e-12, atol=1e-12)


def value_and_gradients(op, inputs: list[Tensor], seeds: list[Tensor], wanted: int) -> list[Tensor]:
    """Outputs, and the gradients of the first `wanted` inputs."""
    leaves = [x.detach().clone().requires_grad_(i < wanted) for i, x in enumerate(inputs)]
    out = op(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    return [o.detach() for o in out] + list(torch.autograd.grad(out, leaves[:wanted], seeds))


@pytest.mark.parametrize(("batch", "actions"), [(1, 1), (128, 1), (37, 6), (0, 3)])
@pytest.mark.parametrize("scale", [1.0, 40.0])  # 40: far out in the tanh
def test_the_fast_policy_equals_its_twin_in_value_and_gradient(
    batch: int, actions: int, scale: float
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(batch, actions, dtype=torch.float64) for _ in range(3)]
    inputs[0] *= scale
    seeds = [torch.randn(batch, actions, dtype=torch.float64), torch.randn(batch, dtype=torch.float64)]
    ours = value_and_gradients(kernels.tanh_gaussian, inputs, seeds, 2)
    twin = value_and_gradients(reference.tanh_gaussian, inputs, seeds, 2)
    for mine, expected in zip(ours, twin, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_the_fast_policy_takes_the_halves_of_one_tensor_and_an_unused_output() -> None:
    head = torch.randn(8, 6, requires_grad=True)
    actions, _ = kernels.tanh_gaussian(*head.chunk(2, -1), torch.randn(8, 3))
    (grad,) = torch.autograd.grad(actions.sum(), head)
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


def test_the_fast_cross_entropy_equals_its_twin_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    inputs = [
        torch.randn(2, 9, 101, dtype=torch.float64),
        torch.randn(9, 101, dtype=torch.float64).softmax(-1),
    ]
    seeds = [torch.randn(2, 9, dtype=torch.float64)]
    ours = value_and_gradients(kernels.categorical_cross_entropy, inputs, seeds, 1)
    twin = value_and_gradients(reference.categorical_cross_entropy, inputs, seeds, 1)
    for mine, expected in zip(ours, twin, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("atoms", [2, 3, 51, 101, 128, 512])
@pytest.mark.parametrize("slope", [0.0, 0.3, 0.99, 3.0])
def test_the_compiled_projection_equals_its_twin(atoms: int, slope: float) -> None:
    torch.manual_seed(atoms)
    probs = torch.randn(7, atoms).softmax(-1)
    z = torch.linspace(-V_MAX, V_MAX, atoms)
    positions = torch.cat([slope * z + 4.0 * torch.randn(6, 1), z[None]])  # the last row hits every atom
    ours = kernels.categorical_projection(probs, positions, V_MAX)
    twin = reference.categorical_projection(probs.double(), positions.double(), V_MAX)
    # an index near K has a rounding error of K * 2**-24 in float32, and mass moves by that much
    torch.testing.assert_close(ours.double(), twin, rtol=0, atol=atoms * 2.0**-23)
    torch.testing.assert_close(ours.sum(-1), torch.ones(7), rtol=0, atol=2e-6)


def test_the_compiled_projection_answers_nan_with_nan_in_that_row_alone() -> None:
    probs = torch.full((3, 5), 0.2)
    positions = torch.zeros(3, 5)
    positions[1, 2] = math.nan
    out = kernels.categorical_projection(probs, positions, V_MAX)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    far = kernels.categorical_projection(probs, torch.full((3, 5), math.inf), V_MAX)
    torch.testing.assert_close(far[:, -1], torch.ones(3))


def test_the_compiled_projection_takes_strided_and_batched_rows() -> None:
    torch.manual_seed(0)
    probs = torch.randn(4, 3, 11, 2).softmax(2)[..., 0]
    positions = torch.randn(4, 3, 11, 2)[..., 1]
    ours = kernels.categorical_projection(probs, positions, V_MAX)
    torch.testing.assert_close(
        ours, reference.categorical_projection(probs, positions, V_MAX), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "op", [kernels.tanh_gaussian, lambda a, b, _: kernels.categorical_cross_entropy(a, b.softmax(-1))]
)
def test_second_derivatives_of_the_fast_forms_are_refused(op) -> None:
    a, b = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    out = op(a, b, torch.randn(4, 3))
    total = sum(part.sum() for part in out) if isinstance(out, tuple) else out.sum()
    with pytest.raises(RuntimeError, match=r"no second derivative .*: use kernels.reference."):
        torch.autograd.grad(total, a, create_graph=True)


def test_a_graph_kept_alive_keeps_its_activations_while_others_run() -> None:
    torch.manual_seed(0)
    x, parameters = bronet_inputs(2, 16, 6, 32, 2, 11, shared=True)
    x.requires_grad_()
    kept = kernels.bronet(x, *parameters).square().sum()
    (first,) = torch.autograd.grad(kept, x, retain_graph=True)
    for _ in range(3):
        other = torch.randn(16, 6, requires_grad=True)
        torch.autograd.grad(kernels.bronet(other, *parameters).sum(), other)
    (again,) = torch.autograd.grad(kept, x)
    assert torch.equal(first, again)


def project_slowly(probs: Tensor, positions: Tensor, v_max: float) -> Tensor:
    """The definition: every atom's mass goes to its neighbours in proportion to nearness."""
    rows, atoms = probs.shape
    spacing = 2 * v_max / (atoms - 1)
    out = torch.zeros_like(probs)
    for b in range(rows):
        for k in range(atoms):
            place = (positions[b, k].clamp(-v_max, v_max) + v_max) / spacing
            for j in range(atoms):
                out[b, j] += probs[b, k] * max(0.0, 1.0 - abs(place.item() - j))
    return out


@pytest.mark.parametrize("atoms", [2, 51, 101, 128])
def test_the_projection_equals_its_definition_and_keeps_the_mass(atoms: int) -> None:
    torch.manual_seed(atoms)
    probs = torch.randn(6, atoms, dtype=torch.float64).softmax(-1)
    positions = 8.0 * torch.randn(6, atoms, dtype=torch.float64)
    out = kernels.categorical_projection(probs, positions, V_MAX)
    torch.testing.assert_close(out, project_slowly(probs, positions, V_MAX), rtol=0, atol=1e-12)
    torch.testing.assert_close(out.sum(-1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_projection_keeps_the_mean_where_nothing_is_clipped() -> None:
    torch.manual_seed(0)
    z = torch.linspace(-V_MAX, V_MAX, 101, dtype=torch.float64)
    probs = torch.randn(5, 101, dtype=torch.float64).softmax(-1)
    positions = 0.9 * z + 0.7 * torch.rand(5, 1, dtype=torch.float64)
    out = kernels.categorical_projection(probs, positions, V_MAX)
    torch.testing.assert_close(out @ z, (probs * positions).sum(-1))


def test_an_exact_hit_keeps_its_atom_and_the_ends_catch_what_is_clipped() -> None:
    z = torch.linspace(-V_MAX, V_MAX, 5, dtype=torch.float64)  # atoms -10, -5, 0, 5, 10
    probs = torch.full((1, 5), 0.2, dtype=torch.float64)
    torch.testing.assert_close(kernels.categorical_projection(probs, z[None], V_MAX), probs)
    far = torch.tensor([[-99.0, -10.0, 0.0, 10.0, 99.0]], dtype=torch.float64)
    expected = torch.tensor([[0.4, 0.0, 0.2, 0.0, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(kernels.categorical_projection(probs, far, V_MAX), expected)


def test_the_target_of_a_terminal_row_is_its_reward_alone() -> None:
    z = torch.linspace(-V_MAX, V_MAX, 101)
    rewards = torch.tensor([1.0, -3.3])
    target = kernels.categorical_target(
        torch.randn(2, 2, 101), rewards, torch.zeros(2), torch.randn(2), 0.1, z, V_MAX
    )
    torch.testing.assert_close(target, kernels.two_hot(rewards, 101, V_MAX), rtol=0, atol=2e-6)


def test_the_target_averages_probabilities_and_adds_the_entropy_bonus() -> None:
    torch.manual_seed(0)
    z = torch.linspace(-V_MAX, V_MAX, 101, dtype=torch.float64)
    logits = torch.randn(2, 4, 101, dtype=torch.float64)
    rewards, log_probs = torch.rand(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    discounts = torch.full((4,), 0.5, dtype=torch.float64)
    target = kernels.categorical_target(logits, rewards, discounts, log_probs, 0.2, z, V_MAX)
    mean = (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2
    torch.testing.assert_close(target @ z, rewards + 0.5 * (mean @ z - 0.2 * log_probs))


@pytest.mark.parametrize("value", [-99.0, -10.0, -9.99, 0.0, 0.1, 3.3333, 9.99, 10.0, 99.0])
def test_two_hot_has_mass_one_and_the_clipped_value_as_its_mean(value: float) -> None:
    z = torch.linspace(-V_MAX, V_MAX, 101, dtype=torch.float64)
    out = kernels.two_hot(torch.tensor([[value]], dtype=torch.float64), 101, V_MAX)
    assert out.shape == (1, 1, 101)
    assert out.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (out @ z).item() == pytest.approx(max(-V_MAX, min(V_MAX, value)), abs=1e-9)
    assert (out > 0).sum() <= 2


def test_the_cross_entropy_has_the_gradient_softmax_minus_target() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, 11, dtype=torch.float64).softmax(-1)
    (grad,) = torch.autograd.grad(kernels.categorical_cross_entropy(logits, target).sum(), logits)
    torch.testing.assert_close(grad, logits.detach().softmax(-1) - target)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    target = torch.tensor([[0.0, 1.0, 0.0]])
    loss = kernels.categorical_cross_entropy(logits, target)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.item() == pytest.approx(2e4)
    assert grad.isfinite().all()
    assert kernels.expected_value(logits, torch.tensor([-1.0, 0.0, 1.0])).item() == pytest.approx(-1.0)


def test_the_policy_log_prob_is_the_density_of_the_squashed_sample() -> None:
    torch.manual_seed(0)
    mean, raw, noise = (torch.randn(6, 3, dtype=torch.float64) for _ in range(3))
    actions, log_probs = kernels.tanh_gaussian(mean, raw, noise)
    std = (-10.0 + 6.0 * (1.0 + raw.tanh())).exp()
    base = torch.distributions.Normal(mean, std)
    u = mean + std * noise
    expected = (base.log_prob(u) - (1.0 - actions.square()).log()).sum(-1)
    torch.testing.assert_close(actions, u.tanh())
    torch.testing.assert_close(log_probs, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("u", [-500.0, -30.0, 30.0, 500.0])
def test_the_policy_is_finite_far_out_in_the_tanh(u: float) -> None:
    mean = torch.full((1, 1), u, requires_grad=True)
    raw = torch.zeros(1, 1, requires_grad=True)
    actions, log_probs = kernels.tanh_gaussian(mean, raw, torch.ones(1, 1))
    grads = torch.autograd.grad(log_probs.sum() + actions.sum(), (mean, raw))
    assert log_probs.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


def test_packed_inputs_hold_the_parts_in_order_with_a_unit_embedding() -> None:
    torch.manual_seed(0)
    table = torch.randn(3, 4, requires_grad=True)
    actions = torch.randn(2, 2, requires_grad=True)
    observations, ids = torch.randn(2, 5), torch.tensor([2, 0])
    packed = kernels.pack_inputs(observations, actions, table, ids)
    torch.testing.assert_close(packed[:, :5], observations)
    torch.testing.assert_close(packed[:, 5:7], actions)
    rows = table.detach()[ids]
    torch.testing.assert_close(packed[:, 7:], rows / rows.norm(dim=-1, keepdim=True))
    grad_actions, grad_table = torch.autograd.grad(packed.square().sum() + packed.sum(), (actions, table))
    assert grad_actions.abs().sum() > 0
    assert grad_table[[0, 2]].abs().sum() > 0
    assert grad_table[1].abs().sum() == 0
    l1 = kernels.pack_inputs(observations, None, table, ids, norm="l1")
    torch.testing.assert_close(l1[:, 5:].abs().sum(-1), torch.ones(2))


def test_an_embedding_table_without_task_ids_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task_ids \[B\] are needed"):
        kernels.pack_inputs(torch.zeros(2, 3), None, torch.ones(2, 4))


def test_the_target_network_moves_by_tau() -> None:
    target, param = torch.zeros(4), torch.ones(4)
    kernels.ema_(target, param, 0.25)
    torch.testing.assert_close(target, torch.full((4,), 0.25))
