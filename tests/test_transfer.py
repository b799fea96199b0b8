"""Agents of old tasks, taken to new ones: from Python, and by `brc-fast train NEW --from RUN`."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import ACTION, OBSERVATION, SIZES, agent, batches, noises
from conftest import ToyEnv
from extras import require
from refusals import says
from run_folders import arrays, assert_one_line, assert_same_run, rows_without_time
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
    return torch.cat([observations, torch.zeros(rows, more, dtype=new.dtype)], 1), torch.cat(
        [actions, further], 1
    )


def assert_alike(old: BRC, new: BRC, ids: Tensor, new_ids: Tensor, atol: float = 0.0) -> None:
    """On rows of these old tasks, the new agent acts and values as the old one does."""
    x = torch.randn(len(ids), old.observation_size, dtype=old.dtype)
    a = torch.rand(len(ids), old.action_size, dtype=old.dtype)
    wide_x, wide_a = seen_by(new, x, a)
    for mine, theirs in zip(new.policy(new.sensed(wide_x), new_ids), old.policy(x, ids), strict=True):
        torch.testing.assert_close(mine[:, : old.action_size], theirs, rtol=0, atol=atol)
    for name in ("critic", "target_critic"):
        mine = getattr(new, name)(new.normalized(wide_x, new_ids), wide_a, new_ids)
        torch.testing.assert_close(
            mine, getattr(old, name)(old.normalized(x, ids), a, ids), rtol=0, atol=atol
        )


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


@pytest.mark.parametrize(
    ("conditioning", "norm"), [("embedding", "l2"), ("embedding", "l1"), ("one_hot", "l2"), ("none", "l2")]
)
def test_a_task_alone_has_no_columns_and_does_as_its_source_did(conditioning: str, norm: Any) -> None:
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


@pytest.mark.parametrize("conditioning", ["embedding", "one_hot"])
def test_a_task_alone_begins_as_the_same_mean_as_one_among_others(conditioning: str) -> None:
    old = trained(conditioning=conditioning)
    alone, beside = old.add_tasks(1, keep=False), old.add_tasks(1)
    ids = torch.full((30,), 3)
    assert_alike(beside, alone, ids, torch.zeros_like(ids), atol=2e-5)


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
    for mine, theirs in zip(new.update(some, noise).values(), old.update(some, noise).values(), strict=True):
        assert torch.equal(mine, theirs)
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
        assert inner
        assert all(torch.equal(after[key], before[key]) for key in inner)
    first = new.actor_optimizer.state_dict()["exp_avg/body.head.kernel"].unflatten(-1, (-1, 2, ACTION + 1))
    assert not first[..., ACTION:].any()
    assert first[..., 0, :, :ACTION].any()
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
    assert not new.observations.variance[:2, OBSERVATION:].any()  # they have been zero all along
    shown = torch.randn(1, OBSERVATION + 6)
    assert torch.equal(new.observations.normalize(shown, torch.tensor([2])), shown / (1 + 1e-8) ** 0.5)


def parameters(learner: BRC) -> dict[str, Tensor]:
    modules = {"critic": learner.critic, "target_critic": learner.target_critic, "actor": learner.actor}
    return {
        f"{name}/{key}": p.detach().clone() for name, m in modules.items() for key, p in m.named_parameters()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_frozen_body_keeps_its_bits_while_the_rest_learns(conditioning: str, precision: str) -> None:
    old = trained(conditioning=conditioning, precision=precision)
    new = old.add_tasks(1, **WIDER)
    new.freeze_body()
    before = parameters(new)
    learn(new, 5)  # the last ones are replayed
    after = parameters(new)
    for networks in (new.critics, new.actors):
        assert networks.low is None or torch.equal(networks.low, networks.master.bfloat16())
    assert new.updates.reason is None
    assert new.updates.captures == 1
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


TINY = [
    *("--num-envs", "4", "--steps", "120", "--random-steps", "40", "--batch-size", "32"),
    *("--report-every", "60", "--eval-every", "120", "--eval-episodes", "2", "--checkpoint-every", "60"),
]
OLD, NEW, WIDE = ("toy/One", "toy/Two"), "toy/Three", "toy/Wide"


class Toys(ToyEnv):
    """Toys side by side, all with two more numbers to see and one more action where one is Wide."""

    def __init__(self, tasks: Sequence[str], num_envs: int, poison: dict[int, str]) -> None:
        super().__init__(tasks, num_envs, poison)
        self.wide = WIDE in tasks
        if self.wide:
            self.task_spec = Spec.vectors(5, 2, self.task_names)

    def _padded(self, x: Tensor) -> Tensor:
        more = torch.zeros(len(x), 2)
        if self.wide:
            more[torch.from_numpy(self.task_ids) == self.task_names.index(WIDE)] = 0.5
        return torch.cat([x, more], 1) if self.wide else x

    def reset_tensors(self, seed: int | None) -> Tensor:
        return self._padded(super().reset_tensors(seed))

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        return self._padded(super().load_state_dict(state))

    def step_tensors(self, actions: Tensor) -> Step:
        assert actions.shape[1] == self.task_spec.action.size
        step = super().step_tensors(actions)
        return step._replace(
            observations=self._padded(step.observations), successors=self._padded(step.successors)
        )


@pytest.fixture(scope="module")
def toys() -> Iterator[None]:
    """Replaces the environments."""
    require("train")

    def make(tasks: Sequence[str], num_envs: int, seed: int = 0, **settings: Any) -> Toys:
        return Toys(tasks, num_envs, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brc_fast.envs.make", make)
        patch.setattr("brc_fast.command.arguments.expand", tuple)
        yield


@pytest.fixture(scope="module")
def old(toys: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tasks, which is only read."""
    folder = tmp_path_factory.mktemp("runs") / "old"
    sizes = ("--critic.width", "16", "--actor.width", "16", "--eval-every", "60")
    assert train(*OLD, "--run", folder, *TINY, *sizes) == 0
    return folder


@pytest.fixture
def gone(old: Path, tmp_path: Path) -> Path:
    """A copy of it, to be removed."""
    return shutil.copytree(old, tmp_path / "old")


def train(*words: str | Path) -> int:
    from brc_fast.command import main as cli

    return cli.main(["train", *map(str, words)])


def agent_of(run: Path, checkpoint: str = "last") -> BRC:
    from brc_fast.runs.checkpoint import RunFolder
    from brc_fast.runs.evaluate import restore

    return restore(RunFolder(run), "cpu", checkpoint)[1]


def begun(run: Path, tasks: Sequence[str], *, policy_lag: int = 0, **transfer: Any) -> Any:
    """A trainer that has taken the agent of a run over, before its first step."""
    from brc_fast.runs.checkpoint import RunFolder
    from brc_fast.runs.trainer import Trainer

    settings = {"tasks": tuple(tasks), "from_run": str(run), "transfer": TransferConfig(**transfer)}
    trainer = Trainer(
        dataclasses.replace(RunFolder(run).config(), **settings, policy_lag=policy_lag, run=None), "cpu"
    )
    trainer.take_over()
    return trainer


def test_a_run_from_another_is_a_run_like_any_other(
    gone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from brc_fast.command import main as cli

    run, agent = tmp_path / "new", agent_of(gone)
    assert train(NEW, WIDE, "--from", gone, "--run", run, "--transfer.start", "nearest", *TINY) == 0
    told = capsys.readouterr().out
    shutil.rmtree(gone)
    config = json.loads((run / "config.json").read_text())
    assert (config["tasks"], config["from_run"], config["critic"]["width"]) == ([NEW, WIDE], str(gone), 16)
    assert config["transfer"]["start"] == "nearest"
    row = rows_without_time(run)[0]
    assert row["step"] == 0
    for task in (NEW, WIDE):
        returns = [row[f"transfer/return/{task}/{name}"] for name in OLD]
        assert row[f"transfer/start/{task}"] == np.argmax(returns)
        assert len(set(returns)) == 2
        assert f"{task} begins as {OLD[int(np.argmax(returns))]} of {gone}, step 120" in told
    assert cli.main(["evaluate", str(run), "--episodes", "2"]) == 0
    assert cli.main(["train", "--resume", str(run), "--steps", "140"]) == 0
    assert agent_of(run).observation_size == 5 != agent.observation_size


def test_the_nearest_task_is_the_one_with_the_best_return_in_a_trial(old: Path) -> None:
    trainer = begun(old, (NEW, "toy/Four"), start="nearest")
    table = agent_of(old).critic.embedding
    for place, task in enumerate((NEW, "toy/Four")):
        mine = [trainer.trial[f"transfer/return/{task}/{name}"] for name in OLD]
        assert torch.equal(trainer.agent.critic.embedding[place], table[int(np.argmax(mine))])


@pytest.mark.parametrize("checkpoint", ["last", "best", "60"])
def test_new_tasks_begin_as_the_checkpoint_that_is_named(old: Path, checkpoint: str) -> None:
    trainer = begun(old, (NEW, "toy/Four"), start="toy/Two", checkpoint=checkpoint)
    ids = torch.arange(20) % 2
    assert_alike(agent_of(old, checkpoint), trainer.agent, torch.ones_like(ids), ids)


def test_a_policy_that_lags_begins_as_the_agent_that_was_taken(old: Path) -> None:
    trainer = begun(old, (NEW, WIDE), policy_lag=2)
    assert torch.equal(trainer.lagged.table, trainer.agent.critic.embedding)
    assert all(map(torch.equal, trainer.lagged.actor.parameters(), trainer.agent.actor.parameters()))


def test_the_policy_that_was_taken_acts_from_the_first_step(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = begun(old, (NEW, WIDE))
    monkeypatch.setattr(trainer.env, "reset_tensors", lambda seed: torch.ones(8, 5))
    expected = copy.deepcopy(trainer.agent).act(torch.ones(8, 5), trainer.task_ids)
    trainer.collect()
    assert torch.equal(trainer.replay.all().actions, expected)


def test_old_tasks_that_are_kept_go_on_with_their_scale(old: Path) -> None:
    before, trainer = arrays(old)["progress"], begun(old, (*OLD, WIDE), keep_tasks=True)
    for name in ("return_min", "return_max"):
        mine = getattr(trainer.normalizer, name)
        assert (mine[:2] == before[f"normalizer/{name}"]).all()
        assert np.isinf(mine[2])
    ids = torch.arange(20) % 2
    assert_alike(agent_of(old), trainer.agent, ids, ids)
    assert begun(old, (*OLD, NEW), keep_tasks=True, replay=False).replay.size_per_task.sum() == 0


def test_the_replay_that_is_kept_holds_the_old_transitions_in_the_new_widths(old: Path) -> None:
    from brc_fast import ReplayBuffer
    from brc_fast.runs.checkpoint import RunFolder

    saved = ReplayBuffer(120, 3, 1, task_ids=np.repeat([0, 1], 4))
    saved.load(RunFolder(old).newest() / "replay")
    trainer = begun(old, (*OLD, WIDE), keep_tasks=True)
    assert trainer.replay.size_per_task.tolist() == [120, 120, 0]
    mine, theirs = trainer.replay.all(), saved.all()
    order, other = (np.lexsort(each.observations[:, :3].numpy().T) for each in (mine, theirs))
    for name in ("observations", "next_observations", "actions", "rewards", "masks", "task_ids"):
        got, want = getattr(mine, name)[order], getattr(theirs, name)[other]
        if want.dim() > 1:
            assert got.shape[1] > want.shape[1]
            assert not got[:, want.shape[1] :].any()
            got = got[:, : want.shape[1]]
        assert torch.equal(got, want), name


def test_with_old_replay_every_task_has_the_same_share_of_a_batch(old: Path) -> None:
    trainer = begun(old, (*OLD, WIDE), keep_tasks=True)
    trainer.steps = 40
    assert not trainer.learns()  # there is nothing yet of the new task
    while not trainer.learns():
        trainer.collect()
    share = torch.bincount(next(trainer.batches).task_ids.ravel(), minlength=3)
    assert share.max() - share.min() <= 1


def test_old_tasks_go_on_learning_beside_new_ones(old: Path) -> None:
    trainer = begun(old, (*OLD, NEW), keep_tasks=True)
    before = trainer.agent.critic.embedding.detach().clone()
    while trainer.steps < 100:  # more than an episode of every environment
        trainer.collect()
        if trainer.learns():
            trainer.learn()
    assert (trainer.agent.critic.embedding != before).any(1).all()
    assert trainer.scale().isfinite().all()


def test_a_body_is_frozen_for_as_many_steps_as_were_asked_for(old: Path) -> None:
    trainer = begun(old, (NEW, WIDE), freeze=20)
    kernel = trainer.agent.critic.body.blocks[0][0].kernel
    first, kept = kernel.detach().clone(), []
    while trainer.steps < 80:
        trainer.collect()
        if trainer.learns():
            trainer.learn()
            kept += [trainer.steps] if torch.equal(kernel, first) else []
    assert kept == list(range(40, 60, 4))


@pytest.mark.parametrize("words", [(), ("--transfer.keep-tasks", "--policy-lag", "4")], ids=["new", "kept"])
def test_a_run_that_is_resumed_while_its_body_is_frozen_equals_one_never_stopped(
    gone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    from brc_fast.runs.trainer import Trainer

    more = ("--from", gone, "--transfer.freeze", "40", *TINY, *words)
    assert train(NEW, WIDE, "--run", tmp_path / "whole", *more) == 0
    collect = Trainer.collect

    def pressing(self: Trainer) -> None:
        collect(self)
        if self.steps == 60:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "collect", pressing)
        assert train(NEW, WIDE, "--run", tmp_path / "halves", *more) == 130
    shutil.rmtree(gone)
    assert train("--resume", tmp_path / "halves") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_one_command_begins_a_run_and_goes_on_with_it(gone: Path, tmp_path: Path) -> None:
    run = tmp_path / "new"
    command = [NEW, "--from", gone, "--run", run, "--transfer.keep-tasks", "--resume", "auto", *TINY]
    assert train(*command) == 0
    shutil.rmtree(gone)
    assert train(*command, "--steps", "140") == 0
    assert json.loads((run / "config.json").read_text())["tasks"] == [*OLD, NEW]
    assert rows_without_time(run)[-1]["step"] == 140


def test_a_file_may_name_the_run_that_is_taken(old: Path, tmp_path: Path) -> None:
    from brc_fast.command.arguments import parse_train

    file = tmp_path / "x.toml"
    file.write_text(f'from = "{old}"\ntransfer.optimizer = "fresh"\ntransfer.keep-tasks = true\n')
    config = parse_train([NEW, "--config", str(file)]).config
    assert (config.from_run, config.transfer.optimizer, config.critic.width) == (str(old), "fresh", 16)
    assert config.tasks == (*OLD, NEW)


def test_seeds_that_each_begin_with_their_own_agent_are_one_experiment() -> None:
    from brc_fast.runs.plot import learning_settings

    first, second, other = (
        learning_settings(TrainConfig(tasks=(NEW,), seed=seed, from_run=f"runs/{name}-seed{seed}"))
        for name, seed in (("a", 0), ("a", 1), ("b", 1))
    )
    assert first == second != other


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["toy/One"],
            "OLD has toy/One already: name new tasks, and add --transfer.keep-tasks to go on with all",
        ),
        (["toy/One", "--transfer.keep-tasks"], "OLD has toy/One already: name at least one new task"),
        ([NEW, "--critic.body", "mlp"], "critic.body of the agent of OLD is bronet, and cannot become mlp"),
        ([NEW, "--critic.width", "8"], "critic.width of the agent of OLD is 16, and cannot become 8"),
        ([NEW, "--critic.depth", "1"], "critic.depth of the agent of OLD is 2, and cannot become 1"),
        (
            [NEW, "--critic.loss", "mse"],
            "critic.loss of the agent of OLD is categorical, and cannot become mse",
        ),
        (
            [NEW, "--critic.num-atoms", "51"],
            "critic.num_atoms of the agent of OLD is 101, and cannot become 51",
        ),
        ([NEW, "--actor.width", "8"], "actor.width of the agent of OLD is 16, and cannot become 8"),
        ([NEW, "--normalize-observations"], "the agent of OLD does not normalize observations"),
        (
            [NEW, "--transfer.start", "toy/Tow"],
            "transfer.start must be one of toy/Two, toy/One, ... got 'toy/Tow'",
        ),
        ([NEW, "--transfer.checkpoint", "81"], "OLD has no checkpoint 81, only 60, 120"),
        ([NEW, "--transfer.freeze", "-1"], "freeze must be 0 or more, got -1"),
        (
            [NEW, "--transfer.no-replay"],
            "transfer.replay is of the old tasks, which only transfer.keep_tasks keeps",
        ),
        (
            [NEW, "--resume", "OLD"],
            "--from begins a run and --resume goes on with one: leave one of them out",
        ),
    ],
)
def test_what_does_not_go_over_is_refused_in_one_line(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    words = [word.replace("OLD", str(old)) for word in words]
    line = ["train", *words, "--from", str(old), "--run", str(tmp_path / "new"), *TINY]
    assert_one_line(line, told.replace("OLD", str(old)), capsys, tmp_path, old)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start", "nearest"),
        ("freeze", "8"),
        ("optimizer", "fresh"),
        ("checkpoint", "best"),
        ("keep-tasks", None),
    ],
)
def test_settings_of_a_transfer_need_a_run_to_take(
    toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: str | None
) -> None:
    words = [f"--transfer.{name}", *([value] if value else [])]
    told = f"transfer.{name.replace('-', '_')} is a setting of --from RUN alone: name the run with --from"
    assert_one_line(["train", NEW, *words, "--run", str(tmp_path / "new"), *TINY], told, capsys, tmp_path)


def test_a_folder_without_a_run_or_a_checkpoint_has_no_agent_to_take(
    toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from brc_fast.runs.checkpoint import RunFolder

    line = ["train", NEW, "--from", str(tmp_path / "old"), "--run", str(tmp_path / "new"), *TINY]
    assert_one_line(line, "old holds no run: config.json is missing", capsys, tmp_path)
    RunFolder(tmp_path / "old").create(TrainConfig(tasks=OLD))
    assert_one_line(line, "old holds no complete checkpoint", capsys, tmp_path)


@pytest.mark.parametrize("name", ["agent.safetensors", "progress.safetensors", "replay/manifest.json"])
def test_a_damaged_checkpoint_is_refused_before_the_new_folder_is_made(
    gone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from brc_fast.runs.checkpoint import RunFolder

    file = RunFolder(gone).newest() / name
    file.write_bytes(file.read_bytes()[:-20])
    line = ["train", NEW, "--from", str(gone), "--run", str(tmp_path / "new"), "--transfer.keep-tasks", *TINY]
    assert_one_line(line, file.name, capsys, tmp_path, silent=False)


@pytest.mark.parametrize(
    ("conditioning", "words", "told"),
    [
        (
            "heads",
            [],
            "heads needs several tasks, got one: name several new ones, or add --transfer.keep-tasks",
        ),
        ("none", ["--transfer.start", "nearest"], "transfer.start nearest has no meaning for the agent of"),
    ],
)
def test_ways_to_tell_tasks_apart_have_rules_of_their_own(
    gone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    conditioning: str,
    words: list[str],
    told: str,
) -> None:
    file = gone / "config.json"
    settings = json.loads(file.read_text())
    settings["critic"]["conditioning"] = conditioning
    file.write_text(json.dumps(settings))
    line = ["train", NEW, "--from", str(gone), "--run", str(tmp_path / "new"), *words, *TINY]
    assert_one_line(line, told, capsys, tmp_path)


def test_a_trainer_is_told_of_tasks_that_the_agent_has(old: Path) -> None:
    with pytest.raises(InputError, match=says("has toy/One already: set transfer.keep_tasks")):
        begun(old, (*OLD, NEW))
