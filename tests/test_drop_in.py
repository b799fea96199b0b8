"""The critic in other people's programs: what traces it, wraps it, loads it, or gives it the wrong thing."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import math
import pickle
import socket
import warnings
from typing import Any

import pytest
import torch
from agents import agent, batches
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brc_fast import ActorConfig, Critic, CriticConfig, kernels
from brc_fast.nn.losses import Backup
from brc_fast.nn.modules import Actor
from brc_fast.spec import Discrete

CONFIG = CriticConfig(width=16, num_atoms=21, embedding_size=4, v_max=5.0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Method(nn.Module):
    """A method of the critic as a module of its own, as exporters want it."""

    def __init__(self, critic: Critic, name: str) -> None:
        super().__init__()
        self.critic, self.name = critic, name

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(self.critic, self.name)(*inputs)


@pytest.mark.parametrize("graded", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("how", ["embedding", "heads", "one_hot"])
def test_a_trace_computes_what_the_critic_does_for_other_inputs_and_batches(how: str, graded: bool) -> None:
    """The compiled passes of a CPU write through addresses, which a tracer does not see."""
    sizes = {} if how == "embedding" else {"embedding_size": 32}
    critic = Critic(5, 2, 3, CriticConfig(width=16, num_atoms=21, conditioning=how, **sizes))
    given = torch.randn(8, 5), torch.rand(8, 2), torch.arange(8) % 3
    other = torch.randn(5, 5), torch.rand(5, 2), torch.arange(5) % 3
    module = Method(critic, "values")
    with warnings.catch_warnings(), torch.set_grad_enabled(graded):
        warnings.simplefilter("ignore")  # of sizes that are constants
        traced = torch.jit.trace(module, given)
        torch.testing.assert_close(traced(*other), module(*other), rtol=1e-4, atol=1e-5)
    torch.jit.save(traced, io.BytesIO())  # which Python functions of a graph do not let it
    assert "brc_fast::" not in str(traced.inlined_graph)  # it runs where this package is not
    if graded:
        traced(*other).sum().backward()
        gradients = [p.grad for p in critic.parameters()]
        critic.zero_grad()
        module(*other).sum().backward()
        for mine, p in zip(gradients, critic.parameters(), strict=True):
            torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-5)


def test_a_traced_policy_computes_what_the_policy_does() -> None:
    tasks = Critic(5, 2, config=CONFIG).conditioning
    actor = Actor(5, 2, ActorConfig(width=16), tasks)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(actor, (torch.randn(8, 5),))
        torch.jit.save(traced, io.BytesIO())
        seen = torch.randn(3, 5)
        for mine, wanted in zip(traced(seen), actor(seen), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


# -- losses, against loops in float64

SUPPORTS = [
    {},
    {"v_min": -1.0, "v_max": 3.0},
    {"v_min": 0.0, "v_max": 2.0},
    {"v_min": -200.0, "v_max": -100.0},
    {"v_min": -1.0, "v_max": 2.0, "ends": "edges"},
]


def atoms_of(config: CriticConfig) -> list[float]:
    """By the definitions: K atoms from end to end, or the middles of K bins."""
    low, high, K = -config.v_max if config.v_min is None else config.v_min, config.v_max, config.num_atoms
    if config.ends == "atoms":
        return [low + k * (high - low) / (K - 1) for k in range(K)]
    return [low + (k + 0.5) * (high - low) / K for k in range(K)]


def projected(masses: list[float], places: list[float], atoms: list[float]) -> Tensor:
    """Each mass goes to the two atoms around its place, or to an end."""
    out = [0.0] * len(atoms)
    for mass, place in zip(masses, places, strict=True):
        place = min(max(place, atoms[0]), atoms[-1])
        upper = next((k for k, z in enumerate(atoms) if z >= place), len(atoms) - 1)
        lower = max(upper - 1, 0)
        share = 1.0 if upper == lower else (place - atoms[lower]) / (atoms[upper] - atoms[lower])
        out[upper] += mass * share
        out[lower] += mass * (1.0 - share)
    return torch.tensor(out, dtype=torch.float64)


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target * logits.log_softmax(-1)).sum()


def transitions(rows: int, middle: float, scale: float) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    normal = [torch.randn(rows, n, generator=rng, dtype=torch.float64) for n in (5, 2, 5, 2, 1, 1)]
    discounts = torch.rand(rows, generator=rng, dtype=torch.float64) * (torch.arange(rows) % 4 > 0)
    rewards = normal[4][:, 0] * scale + (1.0 - discounts) * middle
    names = ("observations", "actions", "next_observations", "next_actions")
    out = dict(zip(names, normal, strict=False))
    return {**out, "rewards": rewards, "discounts": discounts, "next_log_probs": normal[5][:, 0] * scale}


@pytest.mark.parametrize("target", ["mean", "min", "own"])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_bellman_losses_and_clipped_shares_are_those_of_loops(support: dict[str, Any], target: Any) -> None:
    config = CriticConfig(width=16, num_atoms=9, members=3, **support)
    atoms = atoms_of(config)
    critic, other = (Critic(5, 2, config=config, dtype=torch.float64) for _ in range(2))
    x = transitions(12, (atoms[0] + atoms[-1]) / 2, (atoms[-1] - atoms[0]) / 3)
    alpha = 0.3
    logits = critic(x["observations"], x["actions"])
    next_logits = 5.0 * other(x["next_observations"], x["next_actions"]).detach()
    probs = next_logits.softmax(-1)
    z = torch.tensor(atoms, dtype=torch.float64)
    expected, clipped = torch.zeros(3, 12, dtype=torch.float64), torch.zeros(3, 12, dtype=torch.float64)
    for e, b in itertools.product(range(3), range(12)):
        lowest = min(range(3), key=lambda m, b=b: float(probs[m, b] @ z))
        p = {"mean": probs[:, b].mean(0), "min": probs[lowest, b], "own": probs[e, b]}[target].tolist()
        reward, discount, log_prob = (float(x[n][b]) for n in ("rewards", "discounts", "next_log_probs"))
        y = [reward + discount * (atom - alpha * log_prob) for atom in atoms]
        expected[e, b] = cross_entropy(projected(p, y, atoms), logits[e, b])
        clipped[e, b] = sum(m for m, place in zip(p, y, strict=True) if not atoms[0] <= place <= atoms[-1])
    given = {name: x[name] for name in ("rewards", "discounts", "next_log_probs")}
    own = {"next_logits": next_logits, "temperature": alpha, "target": target}
    losses = critic.bellman_loss(None, x["observations"], x["actions"], **given, **own)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    parameters = list(critic.parameters())
    for mine, wanted in zip(
        torch.autograd.grad(losses.sum(), parameters),
        torch.autograd.grad(expected.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-7, atol=1e-9)
    share = critic.clipped_share(None, **given, **own)
    torch.testing.assert_close(share, clipped if target == "own" else clipped[0], rtol=1e-9, atol=1e-9)
    assert 0.0 < share.mean() < 1.0
    torch.testing.assert_close(critic.values(x["observations"], x["actions"]), logits.softmax(-1) @ z)
    # the same in float32, by the compiled passes
    few = copy.deepcopy(critic).float()
    x32 = {name: value.float() for name, value in x.items()}
    given = {name: x32[name] for name in given}
    own["next_logits"] = next_logits.float()
    with torch.no_grad():
        losses = few.bellman_loss(None, x32["observations"], x32["actions"], **given, **own)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-3, atol=1e-4)


def test_a_target_critic_and_what_it_puts_out_are_the_same_target() -> None:
    critic, other = (Critic(5, 2, config=CONFIG, dtype=torch.float64) for _ in range(2))
    x = transitions(8, 0.0, 1.0)
    whole = critic.bellman_loss(other, **x)
    seen = x.pop("next_observations"), x.pop("next_actions")
    out = other(*seen).detach().requires_grad_()
    losses = critic.bellman_loss(None, **x, next_logits=out)
    assert torch.equal(losses, whole)
    losses.sum().backward()
    assert out.grad is None
    assert torch.equal(critic.bellman_loss(None, **x, next_logits=out[:1]), critic.bellman_loss(
        None, **x, next_logits=torch.cat([out[:1]] * 2), target="mean"
    ))  # fmt: skip
    for wrong, told in (
        ({"next_logits": out, "target_critic": other}, "target_critic or next_logits"),
        ({}, "target_critic or next_logits"),
        ({"target_critic": other}, "next_observations are needed"),
        ({"next_logits": out, "next_actions": seen[1]}, "no use beside next_logits"),
        ({"next_logits": out[:, :7]}, r"next_logits must have shape \[E, 8, 21\], got \[2, 7, 21\]"),
        ({"next_logits": out[:1], "target": "own"}, "2 members, one for each .* got 1"),
        ({"next_logits": out, "target": "max"}, "target must be one of mean, min, own, got 'max'"),
    ):
        with pytest.raises(ValueError, match=told):
            critic.bellman_loss(**{"target_critic": None, **x, **wrong})


def phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


@pytest.mark.parametrize("encoding", ["two_hot", "hl_gauss"])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_regression_losses_are_those_of_loops(support: dict[str, Any], encoding: Any) -> None:
    config = CriticConfig(width=16, num_atoms=9, **support)
    atoms = atoms_of(config)
    width = atoms[1] - atoms[0]
    critic = Critic(5, 2, config=config, dtype=torch.float64)
    x = transitions(12, 0.0, 1.0)
    values = torch.linspace(atoms[0] - 2 * width, atoms[-1] + 2 * width, 12, dtype=torch.float64)
    logits = critic(x["observations"], x["actions"])
    sigma = 0.75 * width
    low, high = -config.v_max if config.v_min is None else config.v_min, config.v_max
    expected = torch.zeros(2, 12, dtype=torch.float64)
    for e, b in itertools.product(range(2), range(12)):
        value = min(max(values[b].item(), low), high)
        if encoding == "two_hot":
            target = projected([1.0], [value], atoms)
        else:
            edges = [atoms[0] + (k - 0.5) * width for k in range(10)]
            below = [phi((edge - value) / sigma) for edge in edges]
            masses = [(b - a) / (below[-1] - below[0]) for a, b in itertools.pairwise(below)]
            target = torch.tensor(masses, dtype=torch.float64)
        expected[e, b] = cross_entropy(target, logits[e, b])
    seen = x["observations"], x["actions"]
    losses = critic.regression_loss(*seen, values, encoding)
    torch.testing.assert_close(losses, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(critic.regression_loss(*seen, values[:, None], encoding), losses)
    each = torch.stack([values, values.flip(0)])
    torch.testing.assert_close(critic.regression_loss(*seen, each, encoding)[0], losses[0])
    if encoding == "two_hot":
        torch.testing.assert_close(critic.regression_loss(*seen, values), losses)
        return
    wider = critic.regression_loss(*seen, values, encoding, sigma=3 * width)
    assert not torch.allclose(wider, losses)
    few = copy.deepcopy(critic).float()
    narrow = few.regression_loss(*(t.float() for t in (*seen, values)), encoding)
    torch.testing.assert_close(narrow, losses.float(), rtol=1e-4, atol=1e-4)


def test_the_regression_of_a_plain_value_is_its_squared_error_and_others_are_refused() -> None:
    mse = Critic(5, 0, config=CriticConfig(width=16, loss="mse"), dtype=torch.float64)
    seen, values = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = (mse.values(seen) - values).square()
    torch.testing.assert_close(mse.regression_loss(seen, None, values), expected)
    with pytest.raises(ValueError, match=r"encoding two_hot .* of the loss categorical"):
        mse.regression_loss(seen, None, values, "two_hot")
    critic = Critic(5, 0, config=CONFIG, dtype=torch.float64)
    edged = Critic(5, 0, config=dataclasses.replace(CONFIG, ends="edges"), dtype=torch.float64)
    for wrong, told in (
        ((values, "one_hot"), "encoding must be two_hot or hl_gauss, got 'one_hot'"),
        ((values[:4],), r"values must have shape .* = \[6\] .* got \[4\]"),
    ):
        with pytest.raises(ValueError, match=told):
            critic.regression_loss(seen, None, *wrong)
    with pytest.raises(TypeError, match="values must be a tensor"):
        critic.regression_loss(seen, None, 1.0)  # type: ignore[arg-type]
    for one in (critic, edged):
        with pytest.raises(ValueError, match="sigma must be positive"):
            one.regression_loss(seen, None, values, "hl_gauss", sigma=0.0)
    with pytest.raises(ValueError, match="sigma is of the encoding hl_gauss"):
        critic.regression_loss(seen, None, values, "two_hot", sigma=1.0)


def test_numbers_that_other_libraries_publish() -> None:
    """Two-hot of MuZero's support -300..300, of one that is not symmetric, and C51's projection."""

    def masses(values: list[float], **config: Any) -> list[list[float]]:
        """Read off losses: a logit of log 2 more moves the cross-entropy by its mass."""
        critic = Critic(1, 0, config=CriticConfig(width=8, **config), dtype=torch.float64)
        seen, given = (
            torch.ones(len(values), 1, dtype=torch.float64),
            torch.tensor(values, dtype=torch.float64),
        )
        out = []
        for k in range(config["num_atoms"]):
            with torch.no_grad():
                critic.body.head.kernel.zero_()
                critic.body.head.bias.zero_()
                flat = critic.regression_loss(seen, None, given)
                critic.body.head.bias[:, k] = 1.0
                log = math.log(config["num_atoms"] - 1 + math.e) - math.log(config["num_atoms"])
                out.append(flat + log - critic.regression_loss(seen, None, given))
        return [[round(x, 9) for x in row] for row in torch.stack(out, -1)[0].tolist()]

    big = masses([3.7, -300.0, 999.0], num_atoms=601, v_max=300.0)
    assert {k: m for k, m in enumerate(big[0]) if m} == {303: 0.3, 304: 0.7}
    assert [big[1].index(1.0), big[2].index(1.0)] == [0, 600]
    assert masses([-1.0, 0.5, 2.25, 7.0], num_atoms=5, v_min=-1.0, v_max=3.0) == [
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.5, 0.5, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.75, 0.25],
        [0.0, 0.0, 0.0, 0.0, 1.0],
    ]
    # a distribution of three atoms, moved, shrunk and beyond the ends
    critic = Critic(1, 0, config=CriticConfig(width=8, num_atoms=3, v_min=0.0, v_max=2.0, members=1))
    p = torch.tensor([0.2, 0.3, 0.5])
    rewards, discounts = torch.tensor([0.0, 0.5, 1.0, 5.0, 0.25]), torch.tensor([1.0, 1.0, 0.5, 1.0, 0.0])
    loss = critic.loss
    target = loss.target(
        p.log().expand(1, 5, 3), Backup(rewards, discounts, torch.zeros(5), 0.0), critic.atoms
    )
    wanted = [[0.2, 0.3, 0.5], [0.1, 0.25, 0.65], [0.0, 0.35, 0.65], [0.0, 0.0, 1.0], [0.75, 0.25, 0.0]]
    torch.testing.assert_close(target, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


# -- shapes, dtypes, devices


@pytest.mark.parametrize("lead", [(), (1,), (2, 16), (3, 4), (2, 2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("tasks", [1, 3])
def test_leading_axes_are_rows_whatever_their_number(lead: tuple[int, ...], tasks: int) -> None:
    critic, other = (Critic(5, 2, tasks, CONFIG) for _ in range(2))
    count = math.prod(lead)
    seen, actions, rewards = torch.randn(*lead, 5), torch.rand(*lead, 2), torch.rand(lead)
    ids = torch.arange(count).reshape(lead) % tasks
    flat = seen.reshape(count, 5), actions.reshape(count, 2), ids.reshape(count)
    for name in ("values", "features", "__call__"):
        whole, rows = (getattr(critic, name)(*x) for x in ((seen, actions, ids), flat))
        assert whole.shape == (2, *lead, *rows.shape[2:])
        torch.testing.assert_close(whole.reshape(rows.shape), rows, rtol=1e-4, atol=1e-5)
    losses = critic.bellman_loss(other, seen, actions, rewards, rewards, seen, actions, task_ids=ids)
    r = rewards.reshape(count)
    rows = critic.bellman_loss(other, *flat[:2], r, r, *flat[:2], task_ids=flat[2])
    assert losses.shape == (2, *lead)
    torch.testing.assert_close(losses.reshape(rows.shape), rows, rtol=1e-4, atol=1e-5)
    one = rewards.unsqueeze(-1)
    columns = critic.bellman_loss(other, seen, actions, one, one, seen, actions, task_ids=ids, target="own")
    assert columns.shape == (2, *lead)
    assert critic.regression_loss(seen, actions, one, "hl_gauss", task_ids=ids).shape == (2, *lead)
    share = critic.clipped_share(other, 99 * rewards, rewards, seen, actions, task_ids=ids)
    assert share.shape == lead


def test_shapes_that_do_not_go_together_are_named() -> None:
    critic = Critic(5, 2, 3, CONFIG)
    seen, actions, ids = torch.randn(4, 6, 5), torch.rand(4, 6, 2), torch.zeros(4, 6, dtype=torch.int64)
    for given, told in (
        ((seen, actions[0], ids), r"actions must have shape .* = \[4, 6, 2\].* got \[6, 2\]"),
        ((seen, actions, ids[0]), r"task_ids must have shape .* = \[4, 6\], got \[6\]"),
        ((seen[..., :4], actions, ids), r"observations must have shape \[..., 5\], got \[4, 6, 4\]"),
        ((seen, None, ids), r"actions must have shape \[..., 2\], got None"),
    ):
        with pytest.raises(ValueError, match=told):
            critic(*given)
    with pytest.raises(ValueError, match=r"rewards must have shape .* = \[4, 6\] .* got \[4, 1\]"):
        critic.bellman_loss(critic, seen, actions, ids[:, :1], ids, seen, actions, task_ids=ids)
    with pytest.raises(ValueError, match="mode must be one of logits, values"):
        critic(seen, actions, ids, mode="q")


@pytest.mark.parametrize("how", ["embedding", "heads", "one_hot"])
@pytest.mark.parametrize("graded", [False, True], ids=["no_grad", "grad"])
def test_task_ids_outside_are_refused_on_a_cpu(how: str, graded: bool) -> None:
    sizes = {} if how == "embedding" else {"embedding_size": 32}
    config = CriticConfig(width=16, num_atoms=21, conditioning=how, **sizes)
    critic, seen, actions = Critic(5, 2, 3, config), torch.randn(4, 5), torch.rand(4, 2)
    for wrong in (-1, 3):
        ids = torch.tensor([0, 1, wrong, 2])
        for one in (critic, copy.deepcopy(critic).double()):
            x = (t.to(one.body.head.bias.dtype) for t in (seen, actions))
            with (
                torch.set_grad_enabled(graded),
                pytest.raises(IndexError, match=f"task_ids must be .*{wrong}"),
            ):
                one(*x, ids)
    with pytest.raises(IndexError, match="task_ids"):
        kernels.normalized_embedding(torch.ones(3, 2), torch.tensor([-1]))
    with pytest.raises(IndexError, match="task_ids"):
        kernels.normalized_embedding_backward(
            torch.ones(1, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64), torch.tensor([-1])
        )


def test_observations_of_another_dtype_are_named() -> None:
    critic, seen, actions = Critic(5, 2, config=CONFIG), torch.randn(4, 5), torch.rand(4, 2)
    with pytest.raises(TypeError, match=r"observations must be torch.float32, .* got torch.float64: give"):
        critic.values(seen.double(), actions)
    with torch.autocast("cpu", torch.bfloat16):
        assert critic(seen.bfloat16(), actions).dtype == torch.bfloat16
    assert critic.values(seen, actions.double()).dtype == torch.float32  # as the observations say


@pytest.mark.parametrize("how", ["embedding", "one_hot"])
def test_a_critic_on_meta_says_so_and_takes_numbers_in_either_way(how: str) -> None:
    sizes = {} if how == "embedding" else {"embedding_size": 32}
    config = CriticConfig(width=16, num_atoms=21, v_min=-1.0, conditioning=how, **sizes)
    whole = Critic(5, 2, 3, config, dtype=torch.float64)
    given = torch.randn(4, 5).double(), torch.rand(4, 2).double(), torch.arange(4) % 3
    for assign in (True, False):
        empty = Critic(5, 2, 3, config, device="meta", dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"on meta, without numbers: critic.to_empty.*assign=True"):
            empty.values(*given)
        if not assign:
            empty = empty.to_empty(device="cpu")
            empty.reset_parameters()
            assert torch.linalg.matrix_norm(empty.body.blocks[0][0].kernel[0], 2) < 1.5
        empty.load_state_dict(whole.state_dict(), assign=assign)
        assert torch.equal(empty.values(*given), whole.values(*given))
    empty = Critic(5, 2, 3, config, device="meta", dtype=torch.float64)
    assert empty.values(*(x.to("meta") for x in given)).shape == (2, 4)


def test_first_weights_are_drawn_anew_in_place() -> None:
    def drawn(seed: int) -> Critic:
        return Critic(5, 2, 3, CONFIG, torch.Generator().manual_seed(seed))

    critic = drawn(0)
    places = [p.data_ptr() for p in critic.parameters()]
    critic.reset_parameters(torch.Generator().manual_seed(1))
    assert [p.data_ptr() for p in critic.parameters()] == places
    for mine, wanted in zip(critic.parameters(), drawn(1).parameters(), strict=True):
        assert torch.equal(mine, wanted)
    low = Critic(5, Discrete(3), config=CONFIG, dtype=torch.bfloat16)
    low.reset_parameters()
    assert low.body.head.kernel.dtype == torch.bfloat16
    assert low.atoms is not None
    assert low.atoms.dtype == torch.float32


def test_features_are_what_the_output_layer_multiplies() -> None:
    for body in ("bronet", "simba", "mlp"):
        critic = Critic(5, 2, 3, dataclasses.replace(CONFIG, body=body), dtype=torch.float64)
        given = torch.randn(4, 5).double(), torch.rand(4, 2).double(), torch.arange(4) % 3
        features, head = critic.features(*given), critic.body.head
        assert features.shape == (2, 4, 16)
        torch.testing.assert_close(features @ head.kernel + head.bias[:, None], critic(*given))
        features.sum().backward()
        assert head.kernel.grad is None
        assert critic.embedding.grad.abs().sum() > 0


# -- values of states, and of discrete actions


@pytest.mark.parametrize("tasks", [1, 3])
def test_a_critic_of_states_is_the_network_over_observations_alone(tasks: int) -> None:
    critic = Critic(5, 0, tasks, CONFIG, dtype=torch.float64)
    seen, ids = torch.randn(6, 5).double(), torch.arange(6) % tasks
    x = seen
    if critic.embedding is not None:
        rows = critic.embedding / critic.embedding.norm(dim=-1, keepdim=True)
        x = torch.cat([seen, rows[ids]], -1)
    logits = kernels.reference.network(x, critic.body.stages, dict(critic.body.named_parameters()))
    torch.testing.assert_close(critic(seen, task_ids=ids), logits)
    torch.testing.assert_close(critic(seen, torch.empty(6, 0).double(), ids), logits)
    z = torch.linspace(-5.0, 5.0, 21, dtype=torch.float64)
    torch.testing.assert_close(critic.values(seen, task_ids=ids), logits.softmax(-1) @ z)
    rewards = torch.rand(6).double()
    losses = critic.bellman_loss(critic, seen, None, rewards, rewards, seen, task_ids=ids)
    atoms = z.tolist()
    for b in range(6):
        p = logits[:, b].softmax(-1).mean(0).tolist()
        y = [float(rewards[b] * (1 + atom)) for atom in atoms]
        torch.testing.assert_close(losses[0, b], cross_entropy(projected(p, y, atoms), logits[0, b]))
    with pytest.raises(ValueError, match="actions must have shape"):
        critic(seen, torch.rand(6, 2).double(), ids)


@pytest.mark.parametrize("how", ["embedding", "heads"])
def test_a_critic_of_discrete_actions_has_a_distribution_for_each(how: str) -> None:
    sizes = {"embedding_size": 4} if how == "embedding" else {}
    config = CriticConfig(width=16, num_atoms=7, conditioning=how, v_max=2.0, **sizes)
    critic, other = (Critic(5, Discrete(4), 3, config, dtype=torch.float64) for _ in range(2))
    seen, ids, actions = torch.randn(6, 5).double(), torch.arange(6) % 3, torch.tensor([0, 3, 1, 2, 2, 0])
    out = critic(seen, task_ids=ids)
    assert out.shape == (2, 6, 4, 7)
    chosen = torch.stack([out[:, b, a] for b, a in enumerate(actions.tolist())], 1)
    torch.testing.assert_close(critic(seen, actions, ids), chosen)
    values = critic.values(seen, task_ids=ids)
    torch.testing.assert_close(values, out.softmax(-1) @ torch.linspace(-2.0, 2.0, 7, dtype=torch.float64))
    greedy = values.mean(0).argmax(-1)
    rewards, atoms = torch.rand(6).double(), torch.linspace(-2.0, 2.0, 7, dtype=torch.float64).tolist()
    losses = critic.bellman_loss(other, seen, actions, rewards, rewards, seen, greedy, task_ids=ids)
    next_out = other(seen, task_ids=ids).softmax(-1).mean(0)
    for b in range(6):
        y = [float(rewards[b] * (1 + atom)) for atom in atoms]
        target = projected(next_out[b, greedy[b]].tolist(), y, atoms)
        torch.testing.assert_close(losses[1, b], cross_entropy(target, chosen[1, b]))
    for given, error, told in (
        ((seen, None, rewards, rewards, seen, greedy), ValueError, "actions must be integers"),
        ((seen, actions, rewards, rewards, seen, None), ValueError, "next_logits must have shape"),
        ((seen, actions.double(), rewards, rewards, seen, greedy), ValueError, "actions must be integers"),
        ((seen, actions + 1, rewards, rewards, seen, greedy), IndexError, r"actions must be in \[0, N\)"),
        ((seen, actions - 1, rewards, rewards, seen, greedy), IndexError, r"actions must be in \[0, N\)"),
    ):
        with pytest.raises(error, match=told):
            critic.bellman_loss(other, *given, task_ids=ids)


def test_a_share_beyond_one_of_the_target_is_refused() -> None:
    online, target = Critic(5, 2, config=CONFIG), Critic(5, 2, config=CONFIG)
    before = copy.deepcopy(target.state_dict())
    for tau in (-0.1, 1.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"tau must be in \[0, 1\]"):
            target.soft_update_(online, tau)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    target.soft_update_(online, 1.0)
    assert all(torch.equal(p, q) for p, q in zip(target.parameters(), online.parameters(), strict=True))


# -- the support is part of the state


def test_weights_of_another_support_are_refused_by_name() -> None:
    critic = Critic(5, 2, config=CONFIG)
    for other in ({"v_max": 2.0}, {"v_min": 0.0}, {"ends": "edges"}, {"num_atoms": 11}):
        theirs = Critic(5, 2, config=dataclasses.replace(CONFIG, **other))
        before = copy.deepcopy(critic.state_dict())
        with pytest.raises(RuntimeError, match=r"atoms: these weights have another support .*v_min, v_max"):
            critic.load_state_dict(theirs.state_dict())
        for name, value in critic.state_dict().items():
            assert torch.equal(value, before[name]), name
        with pytest.raises(RuntimeError, match=r"critic\.atoms: these weights"):
            nn.ModuleDict({"critic": critic}).load_state_dict(nn.ModuleDict({"critic": theirs}).state_dict())
    for odd in (torch.empty(0), torch.zeros(21), torch.zeros(2, 3), torch.full((21,), math.nan)):
        with pytest.raises(RuntimeError, match="atoms: these weights have another support"):
            critic.load_state_dict({**critic.state_dict(), "atoms": odd})
    older = {
        name: value for name, value in Critic(5, 2, config=CONFIG).state_dict().items() if name != "atoms"
    }
    critic.load_state_dict(older)
    assert torch.equal(critic.body.head.kernel, older["body.head.kernel"])
    low = copy.deepcopy(critic).double()
    low.load_state_dict(critic.state_dict())  # of another dtype
    same = pickle.loads(pickle.dumps(critic))
    assert torch.equal(same.atoms, critic.atoms)
    plain = Critic(5, 2, config=CriticConfig(width=16, loss="mse"))
    with pytest.raises(RuntimeError, match="atoms: they are of a distribution"):
        plain.load_state_dict(critic.state_dict())


def test_an_agents_state_of_another_support_is_refused_and_an_older_one_taken() -> None:
    config = CriticConfig(width=24, num_atoms=21, embedding_size=4)
    mine, theirs = agent(critic=config), agent(critic=dataclasses.replace(config, v_max=2.0))
    with pytest.raises(ValueError, match="critic/atoms must go from -10 to 10, the support, got -2 to 2"):
        mine.load_state_dict(theirs.state_dict())
    theirs = agent(critic=config, seed=5)
    older = {name: value for name, value in theirs.state_dict().items() if "atoms" not in name}
    mine.load_state_dict(older)
    for one in (mine, theirs):
        one.update(batches(1, 8))
    assert torch.equal(mine.critic.body.head.kernel, theirs.critic.body.head.kernel)


@pytest.mark.parametrize("reduction", ["mean", "own"])
def test_an_agent_tells_how_much_of_its_targets_the_support_clips(reduction: Any) -> None:
    config = CriticConfig(width=24, num_atoms=21, embedding_size=4, v_max=1.0, reduction=reduction)
    subject = agent(2, critic=config, dtype=torch.float64)
    before = {name: value.clone() for name, value in subject.state_dict().items()}
    batch = batches(1, 16, 2, dtype=torch.float64).update(0)
    scale = torch.tensor([1.0, 4.0], dtype=torch.float64)
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    actions, log_probs = kernels.reference.tanh_gaussian(
        *subject.policy(batch.next_observations, batch.task_ids), noise
    )
    out = subject.target_critic(batch.next_observations, actions, batch.task_ids).detach()
    probs, atoms, alpha = out.softmax(-1), atoms_of(config), subject.alpha.item()
    total = 0.0
    for e, b in itertools.product(range(2), range(16)):
        reward = (batch.rewards[b] / scale[batch.task_ids[b]]).item()
        for p, atom in zip(probs[e, b].tolist(), atoms, strict=True):
            y = reward + 0.99 * batch.masks[b].item() * (atom - alpha * log_probs[b].item())
            total += p / 32 if not -1.0 <= y <= 1.0 else 0.0
    share = subject.clipped_share(batch, scale, seed=3)
    assert 0.05 < total < 0.95
    assert share.item() == pytest.approx(total, rel=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in subject.state_dict().items())
    plain = agent(critic=CriticConfig(width=24, loss="mse"))
    with pytest.raises(ValueError, match="loss mse has none"):
        plain.clipped_share(batches(1, 4).update(0))


# -- wrappers


def test_the_call_of_the_module_stands_for_each_method() -> None:
    critic, other = (Critic(5, 2, config=CONFIG) for _ in range(2))
    seen, actions, rewards = torch.randn(6, 5), torch.rand(6, 2), torch.rand(6)
    given = {"target_critic": other, "rewards": rewards, "discounts": rewards}
    given |= {"next_observations": seen, "next_actions": actions}
    for mode, more in (
        ("values", {}),
        ("features", {}),
        ("bellman_loss", given),
        ("regression_loss", {"values": rewards, "encoding": "hl_gauss"}),
    ):
        method = getattr(critic, mode)
        named = {"observations": seen, "actions": actions, **more}
        assert torch.equal(critic(seen, actions, mode=mode, **more), method(**named))
        calls: list[str] = []
        hook = critic.register_forward_hook(lambda *_, calls=calls: calls.append("seen"))
        method(**named)
        hook.remove()
        assert calls == ["seen"], mode


def test_a_compiled_critic_has_the_losses_of_the_plain_one() -> None:
    critic, other = (Critic(5, 2, config=CONFIG) for _ in range(2))
    compiled = torch.compile(critic, fullgraph=True, backend="eager")
    seen, actions, rewards = torch.randn(2, 6, 5), torch.rand(2, 6, 2), torch.rand(2, 6)
    given = {"target_critic": other, "rewards": rewards, "discounts": rewards, "target": "own"}
    given |= {"next_observations": seen, "next_actions": actions}
    mine = compiled(seen, actions, mode="bellman_loss", **given)
    torch.testing.assert_close(mine, critic(seen, actions, mode="bellman_loss", **given))


def _process(rank: int, port: int, told: Any) -> None:
    """Of two: gradients of half a batch, averaged, against those of the whole batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )

    def new(seed: int) -> Critic:
        return Critic(5, 2, config=CONFIG, generator=torch.Generator().manual_seed(seed))

    rng = torch.Generator().manual_seed(9)
    normal = [torch.randn(16, n, generator=rng) for n in (5, 2, 5, 2)]
    rewards = torch.rand(16, generator=rng)
    names = ("observations", "actions", "next_observations", "next_actions")
    whole = dict(zip(names, normal, strict=True)) | {"rewards": rewards, "discounts": 0.9 * rewards}
    half = {name: x[rank * 8 : rank * 8 + 8] for name, x in whole.items()}
    target, found = new(1).requires_grad_(False), {}

    def gradients(critic: nn.Module, losses: Tensor) -> Tensor:
        critic.zero_grad()
        losses.mean(-1).sum().backward()
        own = [
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in critic.parameters()
        ]
        return torch.cat([x.flatten() for x in own])

    plain = new(0)
    for mode in ("bellman_loss", "regression_loss"):
        if mode == "bellman_loss":
            x, y = ({**data, "target_critic": target} for data in (whole, half))
        else:
            x, y = (
                {**{name: data[name] for name in names[:2]}, "values": data["rewards"]}
                for data in (whole, half)
            )
        wanted = gradients(plain, plain(**x, mode=mode))
        for name in ("ddp", "fsdp1", "fsdp2") if mode == "bellman_loss" else ("ddp",):
            critic = new(0)
            if name == "ddp":
                wrapped: Any = DistributedDataParallel(critic)
            elif name == "fsdp1":
                from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

                wrapped = FullyShardedDataParallel(
                    critic, device_id=torch.device("cpu"), use_orig_params=True,
                    sharding_strategy=ShardingStrategy.NO_SHARD,
                )  # fmt: skip
            else:
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard

                wrapped = fully_shard(critic, mesh=init_device_mesh("cpu", (2,)))
            mine = gradients(wrapped, wrapped(**y, mode=mode))
            found[name, mode] = bool(torch.allclose(mine, wanted, rtol=1e-4, atol=1e-6))
    critic = new(0)
    wrapped = DistributedDataParallel(critic)
    seen = half["observations"], half["actions"]
    critic.values(*seen, frozen=True)
    with torch.no_grad():
        critic.values(*seen)
    for name in ("bellman_loss", "values", "__call__"):
        given = (
            {**half, "target_critic": target}
            if name == "bellman_loss"
            else dict(zip(names, seen, strict=False))
        )
        try:
            getattr(wrapped.module, name)(**given)
            found[name] = False
        except RuntimeError as error:
            found[name] = "would not be averaged over processes" in str(error)
    copy.deepcopy(critic).values(*seen)
    torch.distributed.destroy_process_group()
    critic.values(*seen)
    if not all(found.values()):
        raise AssertionError(str(found))
    told.put(len(found))


def test_ddp_and_fsdp_average_gradients_of_the_documented_call_and_methods_behind_ddp_are_refused() -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    torch.multiprocessing.spawn(_process, (port, told), 2)
    assert [told.get(), told.get()] == [7, 7]
