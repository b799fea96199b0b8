"""Bodies, losses and ways to tell tasks apart, each with each, against updates written in torch alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from tape import Tape
from torch import Tensor
from torch.nn import functional as F

from brc_fast import (
    BRC,
    ActorConfig,
    Batch,
    Critic,
    CriticConfig,
    InputError,
    LearningConfig,
    Noise,
    config,
    kernels,
)
from brc_fast.config import BODIES, TrainConfig
from brc_fast.nn import bodies, conditioning, losses
from brc_fast.runs.trainer import Trainer

OBSERVED, ACTIONS, ROWS, ATOMS = 5, 3, 12, 11
BODY, LOSS, TASKS = BODIES, ("categorical", "mse"), ("embedding", "heads", "one_hot", "none")
ALLOWED = [
    (body, loss, reduction, how, tasks)
    for body, loss, reduction, how, tasks in itertools.product(BODY, LOSS, ("mean", "min"), TASKS, (1, 3))
    if not (how == "heads" and tasks == 1)
]


def learner(
    body: str,
    loss: str,
    reduction: Any,
    how: str,
    tasks: int,
    support: dict[str, Any] | None = None,
    **options: Any,
) -> BRC:
    sizes = {} if loss == "mse" else {"num_atoms": ATOMS, **(support or {})}
    size = {"embedding_size": 4} if how == "embedding" else {}
    return BRC(
        OBSERVED,
        ACTIONS,
        tasks,
        critic=CriticConfig(
            width=16, depth=2, body=body, loss=loss, reduction=reduction, conditioning=how, **sizes, **size
        ),
        actor=ActorConfig(width=16, depth=1, body=body),
        learning=LearningConfig(learning_rate=1e-3, weight_decay=0.05, tau=0.02),
        **options,
    )


def batches(updates: int, tasks: int, dtype: torch.dtype = torch.float64) -> tuple[Batch, Noise]:
    rng = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(updates, ROWS, *shape, generator=rng, dtype=torch.float64).to(dtype)

    ids = torch.randint(tasks, (updates, ROWS), generator=rng)
    masks = (torch.rand(updates, ROWS, generator=rng) > 0.2).to(dtype)
    batch = Batch(normal(OBSERVED), normal(ACTIONS).tanh(), normal(), masks, normal(OBSERVED), ids)
    return batch, Noise(normal(ACTIONS), normal(ACTIONS))


def norm(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return y * p[f"{name}.norm_weight"][:, None] + p[f"{name}.norm_bias"][:, None]


def dense(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return x @ p[f"{name}.kernel"] + p[f"{name}.bias"][:, None]


def outputs(body: str, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Of networks [E, ..], by the papers' own formulas."""
    if body == "bronet":
        x = norm(dense(x, p, "input"), p, "input").relu()
        for block in range(sum(name.endswith(".0.kernel") for name in p)):
            inner = norm(dense(x, p, f"blocks.{block}.0"), p, f"blocks.{block}.0").relu()
            x = x + norm(dense(inner, p, f"blocks.{block}.1"), p, f"blocks.{block}.1")
    elif body == "simba":
        x = dense(x, p, "input")
        for block in range(sum(name.endswith(".expand.kernel") for name in p)):
            inner = dense(norm(x, p, f"blocks.{block}.norm"), p, f"blocks.{block}.expand").relu()
            x = x + dense(inner, p, f"blocks.{block}.reduce")
        x = norm(x, p, "norm")
    else:
        for layer in range(sum("layers" in name and name.endswith("kernel") for name in p)):
            x = dense(x, p, f"layers.{layer}").relu()
    return dense(x, p, "head")


class Plain:
    """Autograd over copies of an agent's parameters, and Adam written out."""

    def __init__(self, of: BRC) -> None:
        self.of, self.config, self.tasks = of, of.critic_config, of.num_tasks
        names = ("critic", "target_critic", "actor", "temperature")
        self.p = {
            f"{net}/{name}": p.detach().clone().requires_grad_()
            for net in names
            for name, p in getattr(of, net).named_parameters()
        }
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.p.items()}
        self.low, self.high = self.config.v_min, self.config.v_max
        self.low = -self.high if self.low is None else self.low
        if self.config.ends == "edges":  # middles of bins
            half = (self.high - self.low) / (2 * ATOMS)
            self.low, self.high = self.low + half, self.high - half
        self.z = None if of.atoms is None else torch.linspace(self.low, self.high, ATOMS, dtype=torch.float64)
        self.steps = 0

    def network(self, net: str, parts: list[Tensor], ids: Tensor, outs: int) -> Tensor:
        how, columns = self.config.conditioning, []
        if self.tasks > 1 and how == "embedding":
            owner = "critic" if net == "actor" else net
            table = self.p[f"{owner}/embedding"]
            columns = [F.normalize(table.detach() if net == "actor" else table, dim=-1)[ids]]
        elif self.tasks > 1 and how == "one_hot":
            columns = [F.one_hot(ids, self.tasks).to(parts[0])]
        body = self.of.actor_config.body if net == "actor" else self.config.body
        own = {n.removeprefix(f"{net}/body."): p for n, p in self.p.items() if n.startswith(f"{net}/body.")}
        out = outputs(body, torch.cat([*parts, *columns], -1), own)
        if how != "heads":
            return out
        return torch.stack([out[:, row, i * outs : (i + 1) * outs] for row, i in enumerate(ids.tolist())], 1)

    def q(self, net: str, observations: Tensor, actions: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and values of the members."""
        outs = 1 if self.z is None else ATOMS
        out = self.network(net, [observations, actions], ids, outs)
        return out, out.squeeze(-1) if self.z is None else out.softmax(-1) @ self.z

    def sample(self, observations: Tensor, ids: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.network("actor", [observations], ids, 2 * ACTIONS)[0].chunk(2, -1)
        log_std = -10.0 + 6.0 * (1.0 + raw.tanh())
        u = mean + log_std.exp() * noise
        gauss = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        return u.tanh(), (gauss - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)

    def step(self, net: str, loss: Tensor, beta1: float, decay: float) -> None:
        rule, own = self.of.learning, [name for name in self.p if name.startswith(f"{net}/")]
        for name, grad in zip(own, torch.autograd.grad(loss, [self.p[n] for n in own]), strict=True):
            m, v = self.moments[name]
            m += (1 - beta1) * (grad - m)
            v += (1 - rule.beta2) * (grad**2 - v)
            m_hat, v_hat = m / (1 - beta1**self.steps), v / (1 - rule.beta2**self.steps)
            with torch.no_grad():
                change = m_hat / (v_hat.sqrt() + rule.eps) + decay * self.p[name]
                self.p[name] -= rule.learning_rate * change

    def update(self, batch: Batch, next_noise: Tensor, noise: Tensor) -> None:
        rule, ids, how = self.of.learning, batch.task_ids, self.config.reduction
        least, own = how == "min", how == "own"
        self.steps += 1
        alpha = self.p["temperature/log_alpha"].exp().detach()
        with torch.no_grad():
            actions, log_probs = self.sample(batch.next_observations, ids, next_noise)
            next_out, next_q = self.q("target_critic", batch.next_observations, actions, ids)
            discount = rule.discount * batch.masks
            if self.z is None:
                q = next_q if own else next_q.amin(0) if least else next_q.mean(0)
                target = batch.rewards + discount * (q - alpha * log_probs)
            else:
                probs = next_out.softmax(-1)
                if not own:
                    probs = probs[next_q.argmin(0), torch.arange(ROWS)] if least else probs.mean(0)
                y = self.z - (alpha * log_probs)[:, None]
                y = (batch.rewards[:, None] + discount[:, None] * y).clamp(self.low, self.high)
                share = 1 - (y[:, :, None] - self.z).abs() / ((self.high - self.low) / (ATOMS - 1))
                target = (probs[..., None] * share.clamp(min=0)).sum(-2)
        out, q = self.q("critic", batch.observations, batch.actions, ids)
        if self.z is None:
            loss = (q - target).square().mean(-1).sum()
        else:
            loss = -(target * out.log_softmax(-1)).sum(-1).mean(-1).sum()
        self.step("critic", loss, rule.beta1, rule.weight_decay)
        with torch.no_grad():
            for name in [name for name in self.p if name.startswith("target_critic/")]:
                self.p[name].lerp_(self.p[name.removeprefix("target_")], rule.tau)
        actions, log_probs = self.sample(batch.observations, ids, noise)
        _, q = self.q("critic", batch.observations, actions, ids)
        q = q.amin(0) if least else q.mean(0)
        self.step("actor", (alpha * log_probs - q).mean(), rule.beta1, rule.weight_decay)
        entropy = -log_probs.detach().mean()
        loss = self.p["temperature/log_alpha"].exp() * (entropy - self.of.target_entropy)
        self.step("temperature", loss, rule.temperature_beta1, 0.0)


@pytest.mark.parametrize(("body", "loss", "reduction", "how", "tasks"), ALLOWED)
def test_three_updates_are_those_of_autograd(
    body: str, loss: str, reduction: str, how: str, tasks: int
) -> None:
    assert_updates_are_those_of_autograd(learner(body, loss, reduction, how, tasks, dtype=torch.float64))


SUPPORTS = [
    ("own", "categorical", {}),
    ("own", "mse", {}),
    ("mean", "categorical", {"v_min": -1.0, "v_max": 4.0}),
    ("min", "categorical", {"v_min": -2.5, "v_max": 0.0}),
    ("own", "categorical", {"v_min": 0.5, "v_max": 1.5, "ends": "edges"}),
    ("mean", "categorical", {"v_max": 2.0, "ends": "edges"}),
]


@pytest.mark.parametrize("how", ["embedding", "heads"])
@pytest.mark.parametrize(("reduction", "loss", "support"), SUPPORTS)
def test_three_updates_with_another_support_or_target_are_those_of_autograd(
    reduction: str, loss: str, support: dict[str, Any], how: str
) -> None:
    """Rewards of size 1: much of a target's mass is clipped."""
    assert_updates_are_those_of_autograd(
        learner("bronet", loss, reduction, how, 3, support, dtype=torch.float64)
    )


@pytest.mark.parametrize(("reduction", "loss", "support"), SUPPORTS)
def test_compiled_passes_know_other_supports_and_targets(
    reduction: str, loss: str, support: dict[str, Any]
) -> None:
    """float32 on a CPU, also what is replayed, against float64."""
    fast, slow = (
        learner("bronet", loss, reduction, "embedding", 3, support, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    slow.load_state_dict(fast.state_dict())
    data, noise = batches(3, 3)
    few = data.map(lambda x: x.float() if x.is_floating_point() else x)
    wanted = slow.update(data, noise)
    got = fast.update(few, Noise(*(x.float() for x in noise)))
    for name in ("critic_loss", "critic_gradient_norm", "q_mean"):
        assert got[name].item() == pytest.approx(wanted[name].item(), rel=2e-4, abs=2e-4), name
    state = slow.state_dict()
    for name, value in fast.state_dict().items():
        if name.startswith("critic/"):
            torch.testing.assert_close(value.double(), state[name].double(), rtol=1e-3, atol=1e-3, msg=name)
    for _ in range(3):
        assert all(value.isfinite() for value in fast.update(few).values())


def assert_updates_are_those_of_autograd(agent: BRC) -> None:
    plain, (data, noise) = Plain(agent), batches(3, agent.num_tasks)
    start = {name: p.detach().clone() for name, p in plain.p.items()}
    agent.update(data, noise)
    for update in range(3):
        plain.update(data.update(update), *(x[update] for x in noise))
    state = agent.state_dict()
    for name, p in plain.p.items():
        assert (state[name] - p).abs().max() < 1e-9, name
        assert not torch.equal(state[name], start[name]), name
        net, _, parameter = name.partition("/")
        if net == "target_critic":
            continue
        for moment, expected in zip(("exp_avg", "exp_avg_sq"), plain.moments[name], strict=True):
            assert (state[f"{net}_optimizer/{moment}/{parameter}"] - expected).abs().max() < 1e-9, name


@pytest.mark.parametrize("body", BODY)
@pytest.mark.parametrize("loss", LOSS)
@pytest.mark.parametrize("how", TASKS)
def test_the_critic_alone_has_the_gradient_of_its_loss(body: str, loss: str, how: str) -> None:
    """`bellman_loss` in somebody else's agent: float64 autograd of the formula, and the target's turn."""
    of = learner(body, loss, "mean", how, 3, dtype=torch.float64)
    plain, (data, noise) = Plain(of), batches(1, 3)
    batch, critic, target = data.update(0), of.critic, of.target_critic
    actions = noise.next_action[0].tanh()
    mine = critic.bellman_loss(
        target,
        batch.observations,
        batch.actions,
        batch.rewards,
        0.99 * batch.masks,
        batch.next_observations,
        actions,
        task_ids=batch.task_ids,
    )
    out, q = plain.q("critic", batch.observations, batch.actions, batch.task_ids)
    next_out, next_q = plain.q("target_critic", batch.next_observations, actions, batch.task_ids)
    if plain.z is None:
        expected = (q - (batch.rewards + 0.99 * batch.masks * next_q.mean(0)).detach()).square()
    else:
        y = (batch.rewards[:, None] + 0.99 * batch.masks[:, None] * plain.z).clamp(-10, 10)
        share = (1 - (y[:, :, None] - plain.z).abs() / (20 / (ATOMS - 1))).clamp(min=0)
        target_probs = (next_out.softmax(-1).mean(0)[:, :, None] * share).sum(1).detach()
        expected = -(target_probs * out.log_softmax(-1)).sum(-1)
    assert torch.allclose(mine, expected, rtol=0, atol=1e-10)
    assert torch.allclose(critic.values(batch.observations, batch.actions, batch.task_ids), q, atol=1e-10)
    own = [name for name in plain.p if name.startswith("critic/")]
    grads = torch.autograd.grad(expected.sum(), [plain.p[name] for name in own])
    named = dict(critic.named_parameters())
    parameters = [named[name.removeprefix("critic/")] for name in own]
    for own_grad, grad in zip(torch.autograd.grad(mine.sum(), parameters), grads, strict=True):
        assert (own_grad - grad).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("body", "loss", "how", "reduction", "support"),
    [
        *((*each, "min", {}) for each in itertools.product(BODY, LOSS, TASKS)),
        *(("bronet", loss, "embedding", reduction, support) for reduction, loss, support in SUPPORTS),
    ],
)
def test_an_update_is_what_a_cuda_graph_can_hold(
    body: str, loss: str, how: str, reduction: str, support: dict[str, Any]
) -> None:
    """Nothing waits for the device, and every call is the same operations on the same memory."""
    agent = learner(body, loss, reduction, how, 3, support)
    data, _ = batches(2, 3, torch.float32)
    slots, seen = [*data.columns, torch.ones(3)], []
    with kernels.use("reference"), torch.no_grad():
        agent.updates.function(*slots)
        for _ in range(2):
            with Tape() as tape:
                agent.updates.function(*slots)
            seen.append(tape.seen)
    assert len(seen[0]) > 100
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"body": "simbaa"}, ("body", "simba, ", "'simbaa'")),
        ({"loss": "mes"}, ("loss", "mse, categorical", "'mes'")),
        ({"conditioning": "onehot"}, ("conditioning", "one_hot, ", "'onehot'")),
        ({"reduction": "max"}, ("reduction", "mean", "min", "own")),
        ({"ends": "bins"}, ("ends", "atoms", "edges")),
        ({"v_min": 10.0}, ("v_min", "below v_max", "10.0")),
        ({"v_min": 3.0, "v_max": 2.0}, ("v_min", "below v_max", "3.0", "2.0")),
        ({"v_min": float("nan")}, ("v_min", "finite")),
        ({"v_max": -1.0}, ("v_max", "positive")),
        ({"loss": "mse", "v_min": 0.0}, ("v_min", "categorical", "mse")),
        ({"loss": "mse", "num_atoms": 51}, ("num_atoms", "categorical", "mse")),
        ({"conditioning": "heads", "embedding_size": 8}, ("embedding_size", "embedding", "heads")),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as refusal:
        CriticConfig(**options)
    assert all(word in str(refusal.value) for word in words)


def test_an_output_layer_per_task_needs_several_tasks() -> None:
    heads = CriticConfig(width=16, conditioning="heads")
    for make in (
        lambda: Critic(3, 1, 1, heads),
        lambda: BRC(3, 1, critic=heads),
        lambda: Trainer(TrainConfig(tasks=("gym/Pendulum-v1",), critic=heads), "cpu"),
    ):
        with pytest.raises(InputError, match="heads needs several tasks"):
            make()
    with pytest.raises(ValueError, match="task_ids"):
        Critic(3, 1, 2, heads)(torch.zeros(4, 3), torch.zeros(4, 1))


def test_a_support_without_a_scale_or_a_distribution_is_refused() -> None:
    with pytest.raises(InputError, match="v_max"):
        TrainConfig(critic=CriticConfig(loss="mse", v_max=5.0), reward_scale=False)
    TrainConfig(critic=CriticConfig(loss="mse", v_max=5.0))  # the scale of rewards has a use for it
    with pytest.raises(InputError, match=r"reward_scale .* got v_min 0.0: .*--no-reward-scale"):
        TrainConfig(critic=CriticConfig(v_min=0.0))
    TrainConfig(critic=CriticConfig(v_min=0.0), reward_scale=False)
    TrainConfig(critic=CriticConfig(v_min=-10.0))


def test_the_target_of_a_categorical_critic_is_refused_where_there_is_none() -> None:
    agent = learner("mlp", "mse", "mean", "none", 1)
    data, noise = batches(1, 1, torch.float32)
    with pytest.raises(ValueError, match=r"categorical.*mse"):
        agent.critic_target(data.update(0), noise.next_action[0])


@pytest.mark.parametrize("support", [{}, {"v_min": -1.0, "v_max": 4.0}])
@pytest.mark.parametrize("reduction", ["mean", "min", "own"])
def test_the_target_is_the_distribution_that_the_update_regresses_on(
    reduction: str, support: dict[str, Any]
) -> None:
    agent = learner("bronet", "categorical", reduction, "embedding", 3, support, dtype=torch.float64)
    data, noise = batches(1, 3)
    batch = data.update(0)
    target = agent.critic_target(batch, noise.next_action[0])
    logits = agent.critic(batch.observations, batch.actions, batch.task_ids)
    expected = -(target.probs * logits.log_softmax(-1)).sum(-1).mean(-1).sum()
    assert agent.update(data, noise)["critic_loss"].item() == pytest.approx(expected.item(), rel=1e-10)


def test_another_body_loss_and_conditioning_are_local_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are registered, named by a configuration, and learn; nothing else knows of them."""

    def two_roads(width: int, depth: int, outputs: int) -> kernels.stages.Stages:
        Stage = kernels.Stage
        return (
            Stage("left", width, reads=0, after="layer_norm", relu=True),
            Stage("right", width, reads=0, after="norm", adds=1),
            Stage("head", outputs, reads=2),
        )

    class Huber(losses.MeanSquared):
        """Squared error up to 1."""

        def bellman_and_gradient(self, *given: Any, scale: float, columns: int) -> tuple[Tensor, Tensor]:
            squared, dout = super().bellman_and_gradient(*given, scale=scale, columns=columns)
            return squared, dout.clamp(-2 * scale, 2 * scale)

    class Halves(conditioning.Conditioning):
        """One column, which says whether the task is of the second half."""

        columns = 1

        def table(self, generator: torch.Generator | None) -> Tensor:
            return torch.where(torch.arange(self.num_tasks) < self.num_tasks / 2, -1.0, 1.0)[:, None]

    for names in ("BODIES", "LOSSES", "CONDITIONINGS"):  # so that what is added goes again
        monkeypatch.setattr(config, names, list(getattr(config, names)))
    monkeypatch.setattr(bodies, "BODIES", dict(bodies.BODIES))
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    monkeypatch.setattr(conditioning, "CONDITIONINGS", dict(conditioning.CONDITIONINGS))
    bodies.register("two_roads", two_roads)
    losses.register("huber", Huber)
    conditioning.register("halves", Halves)
    critic = CriticConfig(width=16, body="two_roads", loss="huber", conditioning="halves")
    agent = BRC(OBSERVED, ACTIONS, 3, critic=critic, actor=ActorConfig(width=16))
    data, noise = batches(1, 3, torch.float32)
    first = agent.update(data, noise)["critic_loss"]
    for _ in range(40):
        last = agent.update(data, noise)["critic_loss"]
    assert last < 0.7 * first


def test_settings_survive_a_copy() -> None:
    import copy

    agent = learner("simba", "mse", "min", "heads", 3)
    data, noise = batches(2, 3, torch.float32)
    agent.update(data, noise)
    other = copy.deepcopy(agent)
    assert other.critic_config == agent.critic_config
    mine, theirs = agent.update(data, noise), other.update(data, noise)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert dataclasses.asdict(other.critic_config)["body"] == "simba"
