"""What is measured of tasks that share a critic, against formulas in float64; a run does not notice it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from agents import SIZES, agent, batches
from run_folders import SMALL, arrays, assert_same_run, rows_without_time
from torch import Tensor

from brc_fast import Batch, CriticConfig, ReplayBuffer, analysis
from brc_fast.analysis import gradient_similarity, task_signals
from brc_fast.command import main as cli
from brc_fast.config import TrainConfig
from brc_fast.errors import InputError
from brc_fast.runs.trainer import Trainer

TASKS = 3
SCALE = torch.tensor([1.0, 2.5, 0.5], dtype=torch.float64)


def made(**options: Any) -> tuple[Any, Batch]:
    """An agent in float64 whose target differs, and a batch with unequal numbers of rows of three tasks."""
    subject = agent(TASKS, dtype=torch.float64, **options)
    batch = batches(1, 50, TASKS, dtype=torch.float64).update(0)
    subject.update(batches(5, 20, TASKS, dtype=torch.float64, seed=4))
    return subject, batch


def plain_body(stages: Any, weights: dict[str, Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """BroNet, SimBa or an MLP written down for one member: parameters without the head's, and outputs."""
    own = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    values = [x]
    for stage in stages:
        value = values[stage.reads]
        if stage.product:
            value = value @ own[f"{stage.name}.kernel"]
        if "norm" in stage.after:
            if f"{stage.name}.bias" in own:
                value = value + own[f"{stage.name}.bias"]
            value = value - value.mean(-1, keepdim=True)
            value = value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            value = value * own[f"{stage.name}.norm_weight"] + own[f"{stage.name}.norm_bias"]
        else:
            value = value + own[f"{stage.name}.bias"]
        value = value.relu() if stage.relu else value
        values.append(value if stage.adds is None else value + values[stage.adds])
    rest = [value for name, value in own.items() if not name.startswith(f"{stages[-1].name}.")]
    return rest, values[-1]


def task_input(critic: Any, observations: Tensor, actions: Tensor, task: int) -> Tensor:
    columns = [observations, actions]
    if critic.embedding is not None:
        row = critic.embedding[task].detach()
        columns.append((row / row.norm()).expand(len(actions), -1))
    elif critic.task_columns is not None:
        columns.append(critic.task_columns[task].expand(len(actions), -1))
    return torch.cat(columns, -1)


def own_outputs(critic: Any, out: Tensor, task: int) -> Tensor:
    size = critic.loss.outputs
    return out[:, task * size : (task + 1) * size] if critic.conditioning.heads > 1 else out


def expected(subject: Any, batch: Batch, seed: int) -> dict[str, Tensor]:
    """The same by the definitions, one task, member, row and atom after the other."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(50, 2, generator=rng, dtype=torch.float64)
    config, alpha = subject.critic_config, subject.alpha
    gradients, errors, entropies = [], [], []
    for task in range(TASKS):
        rows = batch.task_ids == task
        own = batch.map(lambda x, rows=rows: x[rows])
        mean, raw = subject.policy(own.next_observations, own.task_ids)
        log_std = -10.0 + 12.0 * (1.0 + raw.tanh()) / 2.0
        before = mean + log_std.exp() * noise[rows]
        actions = before.tanh().detach()
        log_probs = torch.distributions.Normal(mean, log_std.exp()).log_prob(before)
        log_probs = (log_probs - (1.0 - actions.square()).log()).sum(-1).detach()
        outs: dict[str, list[Tensor]] = {"critic": [], "target_critic": []}
        parameters = []
        places = (own.observations, own.actions), (own.next_observations, actions)
        for (network, told), place in zip(outs.items(), places, strict=True):
            critic = getattr(subject, network)
            for member in range(2):
                weights = {name: p[member] for name, p in critic.body.named_parameters()}
                x = task_input(critic, *place, task)
                rest, out = plain_body(critic.body.stages, weights, x)
                told.append(own_outputs(critic, out, task))
                parameters += rest if network == "critic" else []
        rewards, discounts = own.rewards / SCALE[task], 0.99 * own.masks
        if config.loss == "mse":
            values, next_values = (torch.stack(x).squeeze(-1) for x in outs.values())
            lowest = next_values.amin(0) if config.reduction == "min" else next_values.mean(0)
            targets = (rewards + discounts * (lowest - alpha * log_probs)).detach()
            losses = (values - targets).square().mean(-1)
        else:
            z = torch.linspace(-config.v_max, config.v_max, config.num_atoms, dtype=torch.float64)
            probs, next_probs = (torch.stack(x).softmax(-1) for x in outs.values())
            p = next_probs.mean(0).detach()
            reach = rewards[:, None] + discounts[:, None] * (z - (alpha * log_probs)[:, None])
            y = reach.clamp(-config.v_max, config.v_max)
            shares = (1.0 - ((y[:, :, None] - z) / (z[1] - z[0])).abs()).clamp_min(0.0)
            target = (p[:, :, None] * shares).sum(1).detach()
            losses = -(target * probs.log()).sum(-1).mean(-1)
            values, targets = probs @ z, (p * reach).sum(-1).detach()
            entropies.append(-(probs * probs.log()).sum(-1).mean())
        errors.append((values - targets).abs().mean())
        found = torch.autograd.grad(losses.sum(), parameters)
        columns = subject.critic.conditioning.columns
        inputs = subject.critic.body.inputs
        gradients.append(
            torch.cat([(g[:-columns] if columns and g.shape[0] == inputs else g).flatten() for g in found])
        )
    norms = torch.stack([g.norm() for g in gradients])
    cosines = torch.stack([torch.stack([a @ b / a.norm() / b.norm() for b in gradients]) for a in gradients])
    out = {"pairs": cosines, "norms": norms, "errors": torch.stack(errors).detach()}
    return out | ({"entropies": torch.stack(entropies).detach()} if entropies else {})


@pytest.mark.parametrize("held", [2**30, 1], ids=["all held", "one held"])
@pytest.mark.parametrize(
    "critic",
    [
        {},
        {"conditioning": "heads", "body": "simba"},
        {"conditioning": "one_hot", "body": "mlp", "loss": "mse", "reduction": "min", "num_atoms": 101},
        {"conditioning": "none", "v_max": 0.5},
    ],
    ids=["published", "heads", "mse", "clipped"],
)
def test_signals_are_those_of_plain_networks_in_float64(
    monkeypatch: pytest.MonkeyPatch, critic: dict[str, Any], held: int
) -> None:
    monkeypatch.setattr(analysis, "HELD", held)
    if critic.get("conditioning", "embedding") != "embedding":
        critic = {"embedding_size": 32, **critic}
    subject, batch = made(critic=dataclasses.replace(SIZES["critic"], **critic))
    signals, wanted = task_signals(subject, batch, SCALE, seed=7), expected(subject, batch, 7)
    torch.testing.assert_close(signals.similarity.pairs, wanted["pairs"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(signals.gradient_norm, wanted["norms"], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(signals.td_error, wanted["errors"], rtol=1e-9, atol=0.0)
    mean = (wanted["pairs"][0, 1] + wanted["pairs"][0, 2] + wanted["pairs"][1, 2]) / 3
    torch.testing.assert_close(signals.similarity.mean, mean, rtol=1e-9, atol=1e-12)
    assert torch.equal(gradient_similarity(subject, batch, SCALE, seed=7).pairs, signals.similarity.pairs)
    assert (signals.entropy is None) == ("entropies" not in wanted)
    if signals.entropy is not None:
        torch.testing.assert_close(signals.entropy, wanted["entropies"], rtol=1e-9, atol=0.0)
    row = signals.row(("a", "b", "c"))
    x = wanted["norms"].tolist()
    deviation = math.sqrt(sum((value - sum(x) / 3) ** 2 for value in x) / 3)
    assert row["analysis/spread_gradient_norm"].item() == pytest.approx(deviation / (sum(x) / 3))
    assert row["analysis/td_error/b"] == signals.td_error[1]
    assert ("analysis/entropy/a" in row) == (signals.entropy is not None)


def test_a_task_is_like_itself_and_opposed_to_its_opposite() -> None:
    """Without a task's own columns, and the rewards of one the negative of the other's."""
    config = CriticConfig(width=16, num_atoms=101, conditioning="none", loss="mse")
    subject = agent(2, critic=config, dtype=torch.float64)
    half = batches(1, 12, dtype=torch.float64).update(0)
    rewards = torch.cat([half.rewards + 1e6, half.rewards + 1e6])
    both = half.map(lambda x: torch.cat([x, x]))._replace(task_ids=torch.arange(2).repeat_interleave(12))
    both = both._replace(masks=torch.zeros(24, dtype=torch.float64))
    same = gradient_similarity(subject, both._replace(rewards=rewards))
    torch.testing.assert_close(same.mean, torch.tensor(1.0, dtype=torch.float64))
    opposed = gradient_similarity(subject, both._replace(rewards=torch.cat([rewards[:12], -rewards[12:]])))
    torch.testing.assert_close(opposed.mean, torch.tensor(-1.0, dtype=torch.float64), atol=1e-4, rtol=0)
    assert same.pairs.diagonal().tolist() == pytest.approx([1.0, 1.0])


def test_looking_changes_nothing_of_the_agent() -> None:
    torch.manual_seed(0)
    subject, twin = agent(2), agent(2)
    before = {name: value.clone() for name, value in subject.state_dict().items()}
    gradient, drawn = subject.critics.grad.clone(), torch.get_rng_state()
    with torch.inference_mode():  # of the caller
        first = gradient_similarity(subject, batches(3, 8, 2))
    assert torch.equal(first.pairs, gradient_similarity(subject, batches(3, 8, 2)).pairs)
    assert not torch.equal(first.pairs, gradient_similarity(subject, batches(3, 8, 2), seed=1).pairs)
    assert all(torch.equal(value, before[name]) for name, value in subject.state_dict().items())
    assert torch.equal(subject.critics.grad, gradient)
    assert all(parameter.grad is None for parameter in subject.critic.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    for one in (subject, twin):
        one.update(batches(2, 8, 2))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in subject.state_dict().items())


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="this agent has one"):
        gradient_similarity(agent(), batches(1, 8))
    subject, batch = agent(3), batches(1, 8, 3).update(0)
    with pytest.raises(ValueError, match="rows of each of the 3 tasks, and has none of task 1"):
        gradient_similarity(subject, batch._replace(task_ids=torch.tensor([0, 2] * 4)))
    with pytest.raises(ValueError, match=r"reward_scale must have shape \[T\] = \[3\], got \[2\]"):
        gradient_similarity(subject, batch, torch.ones(2))
    with pytest.raises(ValueError, match="observations must have shape"):
        gradient_similarity(subject, batch._replace(observations=torch.zeros(8, 4)))
    with pytest.raises(InputError, match="analysis_every must be positive"):
        TrainConfig(analysis_every=0)


@pytest.mark.parametrize("weights", [None, "equal"])
def test_a_batch_that_is_peeked_at_is_the_one_that_sample_would_give(weights: str | None) -> None:
    buffers = [ReplayBuffer(100, 2, 1, task_ids=[0, 1, 1], seed=3) for _ in range(2)]
    ends = torch.zeros(3, dtype=torch.bool)
    for buffer in buffers:
        for step in range(6):
            seen = torch.full((3, 2), float(step)) + torch.arange(3)[:, None]
            buffer.add(seen, seen[:, :1], seen[:, 0], ends, ends, seen + 1.0)
    looked, other = buffers
    peeked = [looked.peek(draw, 8, weights) for draw in (0, 1, 2**63)]
    sampled = [other.sample(8, weights=weights) for _ in range(2)]
    for mine, theirs in zip(peeked, sampled, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(mine.tensors(), theirs.tensors(), strict=True))
    assert looked.draws == 0
    assert not torch.equal(peeked[2].extras["indices"], peeked[0].extras["indices"])
    with pytest.raises(ValueError, match=r"draw must lie in 0\.\.2"):
        looked.peek(-1, 8)
    with pytest.raises(ValueError, match="batch_size 19 exceeds the 18 transitions stored"):
        looked.peek(0, 19)


def train(run: Path, *words: str, tasks: tuple[str, ...] = ("toy/One", "toy/Two")) -> int:
    length = ("--steps", "120", "--checkpoint-every", "40", "--eval-every", "60")
    return cli.main(["train", *tasks, "--run", str(run), *SMALL, *length, *words])


def test_a_run_that_is_analysed_has_the_same_numbers_and_resumes_to_the_same_rows(
    toy: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tmp_path / "plain") == 0
    assert train(tmp_path / "analysed", "--analysis-every", "20") == 0
    rows = rows_without_time(tmp_path / "analysed")
    found = [row for row in rows if "analysis/gradient_similarity" in row]
    assert [row["step"] for row in found] == [20, 40, 60, 80, 100, 120]
    assert all(-1.0 <= row["analysis/gradient_similarity"] <= 1.0 for row in found)
    assert found[0].keys() == {
        "step",
        "analysis/gradient_similarity",
        *(f"analysis/spread_{name}" for name in ("td_error", "gradient_norm", "entropy")),
        *(
            f"analysis/{name}/{task}"
            for name in ("td_error", "gradient_norm", "entropy")
            for task in ("toy/One", "toy/Two")
        ),
    }
    assert [row for row in rows if row not in found] == rows_without_time(tmp_path / "plain")
    plain, analysed = arrays(tmp_path / "plain"), arrays(tmp_path / "analysed")
    for name, value in plain["agent"].items():
        assert (analysed["agent"][name] == value).all(), name

    collect = Trainer.collect
    with monkeypatch.context() as patch:

        def failing(self: Trainer) -> None:
            if self.steps == 60:
                raise RuntimeError("the power is gone")
            collect(self)

        patch.setattr(Trainer, "collect", failing)
        assert train(tmp_path / "halves", "--analysis-every", "20") == 1
    assert cli.main(["train", "--resume", str(tmp_path / "halves")]) == 0
    assert_same_run(tmp_path / "analysed", tmp_path / "halves")


def test_a_run_of_one_task_that_is_to_be_analysed_is_refused(
    toy: dict[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "--analysis-every", "20", tasks=("toy/One",)) == 2
    assert "analysis_every compares tasks with each other, got one task" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
