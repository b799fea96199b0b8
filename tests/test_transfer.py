"""Agents of old tasks, taken to new ones: from Python, and by `brc-fast train NEW --from RUN`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import ACTION, OBSERVATION, SIZES, agent, batches, noises
from conftest import EVALUATION_SLOTS, ToyEnv
from extras import require
from refusals import says
from run_folders import arrays, assert_one_line, assert_same_run, replay, rows_without_time
from torch import Tensor

from brc_fast import BRC, CriticConfig, InputError
from brc_fast.config import TrainConfig, TransferConfig
from brc_fast.envs.base import Step
from brc_fast.nn.bodies import BODIES
from brc_fast.spec import Spec

CONDITIONINGS = ["embedding", "heads", "one_hot", "none"]
WIDER = {"observation_size": OBSERVATION + 4, "action_size": ACTION + 1, "privileged_size": 2}


def trained(tasks: int = 3, conditioning: str = "embedding", updates: int = 4, **options: Any) -> BRC:
    critic: CriticConfig = SIZES["critic"]
    if conditioning != "embedding":
        critic = CriticConfig(width=24, num_atoms=21, conditioning=conditioning)
    old = agent(tasks, critic=critic, **options)
    old.update(batches(updates, 32, tasks))
    return old


def learn(learner: BRC, updates: int = 4, rows: int = 32) -> None:
    """One call for each update: later ones are replayed."""
    seen = learner.observation_size + learner.privileged_size
    for seed in range(updates):
        some = batches(
            1,
            rows,
            learner.num_tasks,
            observation=seen,
            action=learner.action_size,
            seed=seed,
            dtype=learner.dtype,
        )
        learner.update(some)


def seen_by(new: BRC, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """What an agent of wider tasks is given for an old one's: zeros are added, and any further action."""
    rows = len(observations)
    more = new.observation_size + new.privileged_size - observations.shape[1]
    further = torch.rand(rows, new.action_size - actions.shape[1], dtype=new.dtype)
    return torch.cat([observations, torch.zeros(rows, more, dtype=new.dtype)], 1), torch.cat([actions, further], 1)


def assert_alike(old: BRC, new: BRC, ids: Tensor, new_ids: Tensor, atol: float = 0.0) -> None:
    """On rows of these old tasks, the new agent acts and values as the old one does."""
    x = torch.randn(len(ids), old.observation_size, dtype=old.dtype)
    a = torch.rand(len(ids), old.action_size, dtype=old.dtype)
    wide_x, wide_a = seen_by(new, x, a)
    for mine, theirs in zip(new.policy(new.sensed(wide_x), new_ids), old.policy(x, ids), strict=True):
        torch.testing.assert_close(mine[:, : old.action_size], theirs, rtol=0, atol=atol)
    for name in ("critic", "target_critic"):
        mine = getattr(new, name)(new.normalized(wide_x, new_ids), wide_a, new_ids)
        torch.testing.assert_close(mine, getattr(old, name)(old.normalized(x, ids), a, ids), rtol=0, atol=atol)


@pytest.mark.parametrize("sizes", [{}, WIDER], ids=["same", "wider"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_added_tasks_leave_what_is_done_on_old_ones_as_it_was(conditioning: str, sizes: dict) -> None:
    old = trained(conditioning=conditioning)
    before = {name: value.clone() for name, value in old.state_dict().items()}
    new = old.add_tasks(2, **sizes)
    assert (new.num_tasks, new.action_size) == (5, ACTION + bool(sizes))
    ids = torch.arange(30) % 3
    assert_alike(old, new, ids, ids)
    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())


@pytest.mark.parametrize("body", sorted(BODIES))
def test_every_body_goes_over_by_column(body: str) -> None:
    critic = dataclasses.replace(SIZES["critic"], body=body, loss="mse", num_atoms=101)
    old = agent(2, critic=critic, actor=dataclasses.replace(SIZES["actor"], body=body))
    old.update(batches(3, 32, 2))
    ids = torch.arange(30) % 2
    assert_alike(old, old.add_tasks(1, **WIDER), ids, ids)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_new_task_begins_as_the_old_one_that_is_named(conditioning: str, keep: bool) -> None:
    old = trained(conditioning=conditioning)
    new = old.add_tasks(2, start=[2, 0], keep=keep, **WIDER)
    first = 3 if keep else 0
    assert new.num_tasks == first + 2
    for task, source in ((0, 2), (1, 0)):
        ids = torch.full((20,), source)
        assert_alike(old, new, ids, torch.full_like(ids, first + task))


def test_a_new_task_begins_as_the_mean_of_the_old_ones_directions() -> None:
    old = trained()
    new = old.add_tasks(2)
    table = old.critic.embedding.detach()
    lengths = table.norm(dim=1)
    mean = (table / lengths[:, None]).mean(0)
    expected = mean / mean.norm() * lengths.mean()
    torch.testing.assert_close(new.critic.embedding[3:].detach(), expected.expand(2, -1))
    opposite = agent(2)
    with torch.no_grad():
        opposite.critic.embedding[1] = -opposite.critic.embedding[0]
    learn(grown := opposite.add_tasks(1))  # the mean has no direction
    assert grown.critic.embedding.isfinite().all()


@pytest.mark.parametrize("conditioning", ["heads", "one_hot"])
def test_heads_and_columns_of_a_new_task_are_the_mean_of_the_old_ones(conditioning: str) -> None:
    old = trained(conditioning=conditioning)
    new = old.add_tasks(1)
    part = "head" if conditioning == "heads" else "input"
    theirs, mine = (
        getattr(each.critic.body, part).kernel.detach().unflatten(-1, (-1, 21))
        if conditioning == "heads"
        else getattr(each.critic.body, part).kernel.detach()[:, OBSERVATION + ACTION :].movedim(1, 2)
        for each in (old, new)
    )
    if conditioning == "heads":  # [E, H, T, K]
        torch.testing.assert_close(mine[..., 3, :], theirs.mean(-2))
    else:  # [E, H, T]
        torch.testing.assert_close(mine[..., 3], theirs.mean(-1))


@pytest.mark.parametrize("conditioning", ["embedding", "one_hot", "none"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_task_alone_has_no_columns_and_does_as_its_source_did(conditioning: str, norm: str) -> None:
    if norm == "l1" and conditioning != "embedding":
        pytest.skip("rows of an embedding alone have a norm to choose")
    critic = SIZES["critic"] if conditioning == "embedding" else CriticConfig(width=24, num_atoms=21)
    critic = dataclasses.replace(critic, conditioning=conditioning, embedding_norm=norm)
    old = agent(3, critic=critic, dtype=torch.float64)
    old.update(batches(4, 32, 3, dtype=torch.float64))
    new = old.add_tasks(1, start=1, keep=False)
    assert new.critic.table is None
    ids = torch.ones(30, dtype=torch.int64)
    assert_alike(old, new, ids, torch.zeros_like(ids), atol=1e-12)
    new.freeze_body()
    before = new.actor.body.input.bias.clone()
    learn(new)
    assert torch.equal(before, new.actor.body.input.bias) == (conditioning == "none")


@pytest.mark.parametrize("conditioning", ["embedding", "one_hot", "none"])
def test_an_agent_of_one_task_takes_others_up(conditioning: str) -> None:
    old = trained(1, conditioning)
    new = old.add_tasks(2, **WIDER)
    ids = torch.zeros(20, dtype=torch.int64)
    assert_alike(old, new, ids, ids)
    learn(new)
    assert (new.critic.embedding is None) == (conditioning != "embedding")


def test_updates_of_old_tasks_alone_go_on_as_they_would_have() -> None:
    old = trained()
    new = old.add_tasks(2)
    some, noise = batches(3, 32, 3, seed=5), noises(3, 32)
    assert all(torch.equal(a, b) for a, b in zip(old.update(some, noise).values(), new.update(some, noise).values()))
    theirs = dict(old.critic.named_parameters())
    for name, p in new.critic.named_parameters():
        assert torch.equal(p[:3] if name == "embedding" else p, theirs[name]), name


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_moments_go_over_by_name_and_those_of_new_parts_begin_small(conditioning: str) -> None:
    old = trained(conditioning=conditioning)
    new = old.add_tasks(1, **WIDER)
    before, after = (each.critic_optimizer.state_dict() for each in (old, new))
    assert after["step"] == before["step"] == 4
    for moment in ("exp_avg", "exp_avg_sq"):
        mine, theirs = (state[f"{moment}/body.input.kernel"] for state in (after, before))
        torch.testing.assert_close(mine[:, :OBSERVATION], theirs[:, :OBSERVATION], rtol=0, atol=0)
        further = mine[:, OBSERVATION : OBSERVATION + 6]  # 4 of the policy's, 2 of the critic's alone
        expected = theirs.mean(1, keepdim=True) if moment == "exp_avg_sq" else torch.zeros_like(theirs[:, :1])
        torch.testing.assert_close(further, expected.expand_as(further))
        inner = [key for key in after if key.startswith(f"{moment}/body.blocks")]
        assert inner and all(torch.equal(after[key], before[key]) for key in inner)
    first = new.actor_optimizer.state_dict()["exp_avg/body.head.kernel"].unflatten(-1, (-1, 2, ACTION + 1))
    assert not first[..., ACTION:].any() and first[..., 0, :, :ACTION].any()
    if conditioning == "heads":
        assert not first[..., 3, :, :].any()
    fresh = old.add_tasks(1, optimizer="fresh").critic_optimizer.state_dict()
    assert not any(value.any() for value in fresh.values())


def test_statistics_of_observations_go_over_and_new_tasks_begin_theirs() -> None:
    old = agent(2, normalize_observations=True)
    old.observations.update(torch.randn(40, OBSERVATION) * 3 + 1, torch.arange(40) % 2)
    old.update(batches(3, 32, 2))
    new = old.add_tasks(1, **WIDER)
    ids = torch.arange(30) % 2
    assert_alike(old, new, ids, ids)
    assert new.observations.count.ravel().tolist() == [20, 20, 0]
    shown = torch.randn(1, OBSERVATION + 6)
    assert torch.equal(new.observations.normalize(shown, torch.tensor([2])), shown / (1 + 1e-8) ** 0.5)


def parameters(learner: BRC) -> dict[str, Tensor]:
    modules = {"critic": learner.critic, "target_critic": learner.target_critic, "actor": learner.actor}
    return {f"{name}/{key}": p.detach().clone() for name, m in modules.items() for key, p in m.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_frozen_body_keeps_its_bits_while_the_rest_learns(conditioning: str, precision: str) -> None:
    old = trained(conditioning=conditioning, precision=precision)
    new = old.add_tasks(1, **WIDER)
    new.freeze_body()
    before = parameters(new)
    learn(new, 5)  # the last ones are replayed
    after = parameters(new)
    assert new.updates.reason is None and new.updates.captures == 1
    further = {"critic": slice(OBSERVATION, OBSERVATION + 6), "actor": slice(OBSERVATION, OBSERVATION + 4)}
    tasks = {"critic": OBSERVATION + 6 + ACTION + 1, "actor": OBSERVATION + 4}
    for network in ("critic", "actor"):
        for name in (name for name in after if name.startswith(f"{network}/")):
            mine, theirs = after[name], before[name]
            if "head" in name or "embedding" in name:
                assert not torch.equal(mine, theirs), name
            elif name == f"{network}/body.input.kernel":
                assert not torch.equal(mine[:, further[network]], theirs[:, further[network]])
                assert torch.equal(mine[:, :OBSERVATION], theirs[:, :OBSERVATION])
                own = slice(tasks[network], None)
                if conditioning != "none" and conditioning != "heads":
                    assert torch.equal(mine[:, own], theirs[:, own]) == (conditioning == "embedding")
            else:
                assert torch.equal(mine, theirs), name
    new.freeze_body(False)
    learn(new, 1)
    freed = parameters(new)
    assert all(not torch.equal(freed[name], after[name]) for name in after)


def test_the_target_of_a_frozen_body_goes_on_towards_it_and_moments_stay_warm() -> None:
    new = trained().add_tasks(1)
    new.freeze_body()
    name, kernel = "critic/body.input.kernel", "body.input.kernel"
    before, moment = parameters(new), new.critic_optimizer.state_dict()[f"exp_avg/{kernel}"].clone()
    learn(new, 1)
    expected = before[f"target_{name}"].lerp(before[name], new.learning.tau)
    assert not torch.equal(before[f"target_{name}"], before[name])
    torch.testing.assert_close(parameters(new)[f"target_{name}"], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(new.critic_optimizer.state_dict()[f"exp_avg/{kernel}"], moment)


def test_freezing_makes_the_same_numbers_with_and_without_a_graph() -> None:
    found = []
    for graphs in (True, False):
        new = trained(graphs=graphs).add_tasks(1)
        learn(new, 3)
        new.freeze_body()
        learn(new, 4)
        new.freeze_body(False)
        learn(new, 4)
        found.append(parameters(new))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"number": 0}, "number must be positive, got 0"),
        ({"start": 3}, "start must be an old task in [0, T) = [0, 3), got 3"),
        ({"start": [1]}, "start must name 2 old tasks, one for each new one, got 1"),
        ({"observation_size": 4}, "observation_size must be at least the 5 of the old tasks, got 4"),
        ({"optimizer": "new"}, "optimizer must be kept or fresh, got 'new'"),
    ],
)
def test_what_cannot_be_added_is_refused_by_name(words: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=says(told)):
        agent(3).add_tasks(**{"number": 2, **words})


def test_an_agent_that_nobody_gave_tasks_has_no_body_to_freeze() -> None:
    with pytest.raises(ValueError, match="freeze_body is for agents that add_tasks gave"):
        agent(2).freeze_body()


def test_an_agent_of_more_tasks_has_the_old_ones_rates() -> None:
    old = trained()
    old.actor_optimizer.learning_rate = 0.5
    assert old.add_tasks(1).actor_optimizer.learning_rate == 0.5
