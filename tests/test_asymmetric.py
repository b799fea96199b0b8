"""Critics that see more than the policy senses: agent, environments, training, checkpoints."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import SIZES, batches, noises
from extras import needs, require
from torch import Tensor

from brc_fast import BRC, Batch, CriticConfig, Noise
from brc_fast.agents.memory import plan_memory, plan_run
from brc_fast.config import TrainConfig
from brc_fast.envs.base import Privileged, Step
from brc_fast.spec import Field, Spec

require("gym")

import cloudpickle
import gymnasium
from gymnasium.spaces import Box as Space
from gymnasium.spaces import Dict

from brc_fast import envs

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
from peers.torch_plain import PlainBRC

O, P, A = 5, 4, 2  # noqa: E741
GO1 = "envpool/MuJoCoPlayground/Go1JoystickFlatTerrain-v1"


def asymmetric(tasks: int = 1, **options: Any) -> BRC:
    return BRC(O, A, tasks, **{**SIZES, "privileged_size": P, **options})


def seen(updates: int, rows: int, tasks: int = 1, **options: Any) -> Batch:
    """Batches whose observations have P privileged columns behind the policy's O."""
    return batches(updates, rows, tasks, observation=O + P, **options)


def with_privileged(batch: Batch, seed: int) -> Batch:
    """The same batch with other numbers in the privileged columns."""
    rng = torch.Generator().manual_seed(seed)
    changed = {}
    for name in ("observations", "next_observations"):
        values = getattr(batch, name).clone()
        values[..., O:] = torch.randn(values[..., O:].shape, generator=rng, dtype=values.dtype)
        changed[name] = values
    return batch._replace(**changed)


# the agent


@pytest.mark.parametrize("tasks", [1, 3])
def test_updates_are_those_of_plain_pytorch_in_float64(tasks: int) -> None:
    agent = asymmetric(tasks, dtype=torch.float64)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        peer = PlainBRC(agent)
    finally:
        torch.set_default_dtype(usual)
    for seed in range(3):
        batch = seen(2, 16, tasks, seed=seed, dtype=torch.float64)
        noise = noises(2, 16, seed=9 + seed, dtype=torch.float64)
        mine, other = agent.update(batch, noise), peer.updates(batch, noise)
        for name, value in other.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-12)
    state = agent.state_dict()
    for name, value in peer.named().items():
        torch.testing.assert_close(state[name], value.detach(), rtol=1e-7, atol=1e-10, msg=name)
    assert agent.critic.body.inputs == O + P + A + agent.critic.conditioning.columns
    assert agent.actor.body.inputs == O + agent.critic.conditioning.columns


@pytest.mark.parametrize("conditioning", ["embedding", "heads", "one_hot", "none"])
@pytest.mark.parametrize("normalized", [False, True])
def test_replayed_updates_are_those_that_are_made_one_by_one(conditioning: str, normalized: bool) -> None:
    critic = CriticConfig(width=24, num_atoms=21, conditioning=conditioning)
    options = {"critic": critic, "normalize_observations": normalized}
    agents = [asymmetric(2, graphs=graphs, **options) for graphs in (True, False)]
    for number in range(5):  # recorded from the third call on
        batch = seen(2, 8, 2, seed=number)
        for agent in agents:
            if agent.observations is not None:
                agent.observations.update(batch.observations[0], batch.task_ids[0])
            agent.update(batch, reward_scale=torch.tensor([2.0, 3.0]))
    assert [agent.updates.captures for agent in agents] == [1, 0]
    states = [agent.state_dict() for agent in agents]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    twin = copy.deepcopy(agents[0])
    assert twin.privileged_size == P
    batch = seen(2, 8, 2, seed=50)
    told = [agent.update(batch)["critic_loss"] for agent in (agents[0], twin)]
    assert torch.equal(*told)


def test_in_bfloat16_updates_are_near_those_in_float32() -> None:
    exact, low = asymmetric(3), asymmetric(3, precision="bf16")
    for seed in range(4):
        batch, noise = seen(1, 64, 3, seed=seed), noises(1, 64, seed=seed)
        wanted, got = exact.update(batch, noise), low.update(batch, noise)
        for name in ("critic_loss", "entropy"):
            torch.testing.assert_close(got[name], wanted[name], rtol=2e-2, atol=2e-2)


def actor_step(agent: BRC, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
    """Actions at the observations, their values, and the actor's gradient, without a step of the critic."""
    samples = agent.plans(batch).samples(batch, torch.stack(noise))
    next(samples)
    sample = next(samples)
    actions = sample.actions.clone()
    values = agent.update_actor(batch, sample, agent.alpha)
    return actions, values.clone(), agent.actors.grad.clone()


@pytest.mark.parametrize("tasks", [1, 2])
def test_privileged_numbers_reach_the_policy_by_the_critics_advice_alone(tasks: int) -> None:
    one = seen(1, 16, tasks).update(0)
    other = with_privileged(one, seed=7)
    noise = Noise(*(part[0] for part in noises(1, 16)))
    told = [actor_step(asymmetric(tasks), batch, noise) for batch in (one, other)]
    assert torch.equal(told[0][0], told[1][0])
    assert not torch.isclose(told[0][1], told[1][1]).any()
    assert not torch.equal(told[0][2], told[1][2])
    deaf = []
    for batch in (one, other):
        agent = asymmetric(tasks)
        with torch.no_grad():  # the critic does not read them any more, and nobody else does
            name = next(
                n for n, p in agent.critic.named_parameters() if p.shape[-2] == agent.critic.body.inputs
            )
            agent.critic.get_parameter(name)[:, O : O + P] = 0.0
        agent.critics.follow()
        deaf.append(actor_step(agent, batch, noise))
    assert all(torch.equal(x, y) for x, y in zip(*deaf, strict=True))
    assert deaf[0][2].any()


@pytest.mark.parametrize("normalized", [False, True])
def test_the_policy_takes_what_it_senses_and_refuses_more(normalized: bool) -> None:
    agent = asymmetric(2, normalize_observations=normalized)
    batch = seen(1, 6, 2).update(0)
    ids, everything = batch.task_ids, batch.observations
    if agent.observations is not None:
        agent.observations.update(everything * 3.0 + 1.0, ids)
    actions = agent.act(everything[:, :O], ids, deterministic=True)
    assert actions.shape == (6, A)
    for acting in (agent.act, agent.policy):
        with pytest.raises(ValueError, match=r"\[N, O\] = \[N, 5\], got \[6, 9\]; the 4 privileged numbers"):
            acting(everything, ids)
    with pytest.raises(ValueError, match=r"\[N, O\] = \[N, 5\], got \[6, 4\]$"):
        BRC(O, A, 2, **SIZES).act(everything[:, O:], ids)
    narrow = batches(1, 6, 2, observation=O)
    with pytest.raises(ValueError, match=r"observations must have shape .* \[1, 6, 9\], got \[1, 6, 5\]"):
        agent.update(narrow)
    other = with_privileged(batch, seed=3).observations
    values = [agent.value(x, ids) for x in (everything, other)]
    assert not torch.isclose(*values).any()
    assert torch.equal(agent.act(other[:, :O], ids, deterministic=True), actions)
    shown = everything
    if agent.observations is not None:
        mean, variance = (x[ids].float() for x in (agent.observations.mean, agent.observations.variance))
        shown = (everything - mean) * (variance + 1e-8).rsqrt()
    table = agent.critic.table
    assert table is not None
    rows = torch.nn.functional.normalize(table, dim=-1)[ids]
    mean_action = agent.actor(torch.cat([shown[:, :O], rows], -1))[0].tanh()
    torch.testing.assert_close(actions, mean_action)
    torch.testing.assert_close(values[0], agent.critic.values(shown, actions, ids).mean(0))


def test_what_is_told_of_the_policy_depends_on_what_it_senses_alone() -> None:
    batch, noise = seen(1, 16).update(0), noises(1, 16).next_action[0]
    entropies, targets = [], []
    for each in (batch, with_privileged(batch, seed=3)):
        agent = asymmetric()
        entropies.append(agent.entropy_per_task(each))
        targets.append(agent.critic_target(each, noise))
    assert torch.equal(*entropies)
    assert torch.equal(targets[0].next_actions, targets[1].next_actions)
    assert not torch.isclose(targets[0].next_logits, targets[1].next_logits).all()


def test_a_privileged_size_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="privileged_size must be 0 or more, got -1"):
        asymmetric(privileged_size=-1)


def test_the_memory_that_is_told_counts_what_is_privileged() -> None:
    config = TrainConfig(tasks=("toy/One",), critic=CriticConfig(width=16), replay_capacity=1000)
    plain = Spec.vectors(O, A, config.tasks)
    both = replace(plain, privileged=Field((1600,)))
    sizes = [plan_memory(config, spec, "cpu") for spec in (plain, both)]
    assert sizes[1].parameters - sizes[0].parameters == 2 * 1600 * 16
    assert sizes[1].batches - sizes[0].batches == 4 * 2 * 256 * 2 * 1600
    stored = [plan_run(config, spec, "cpu")[1].size for spec in (plain, both)]
    assert stored[1] - stored[0] >= 4 * 1600 * 1000


def test_a_state_tells_what_its_agent_sees() -> None:
    config = TrainConfig(tasks=("a", "b"), critic=SIZES["critic"], actor=SIZES["actor"])
    spec = replace(Spec.vectors(O, A, config.tasks), privileged=Field((P,)))
    for wanted in (spec, replace(spec, privileged=None)):
        state = BRC.from_config(config, wanted, "cpu").state_dict()
        assert BRC.spec_of(config, state) == wanted
    name = next(n for n, x in state.items() if n.startswith("critic/") and x.shape[-2:-1] == (O + A + 4,))
    state[name] = state[name][:, :3]
    with pytest.raises(ValueError, match=r"must read the 5 observed numbers and 2 actions .* lacks 8"):
        BRC.spec_of(config, state)


# a run


@pytest.fixture
def hiding(toy: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy whose policy senses the point's place, and the critic its velocity and the time beside that."""
    toy_env = type(envs.make(("toy/One",), 1))

    class Hiding(toy_env):  # type: ignore[misc, valid-type]
        task_spec = replace(Spec.vectors(1, 1, ("toy/One",)), privileged=Field((2,)))

        def told(self, observations: Tensor, successors: Tensor) -> tuple[Tensor, Tensor]:
            self.privileged = Privileged(observations[:, 1:], successors[:, 1:])
            return observations[:, :1], successors[:, :1]

        def reset_tensors(self, seed: int | None) -> Tensor:
            start = super().reset_tensors(seed)
            return self.told(start, start)[0]

        def step_tensors(self, actions: Tensor) -> Step:
            step = super().step_tensors(actions)
            return Step(*self.told(step.observations, step.successors), *step[2:])

        def load_state_dict(self, state: dict[str, Any]) -> Tensor:
            start = super().load_state_dict(state)
            return self.told(start, start)[0]

    def make(tasks: Sequence[str], num_envs: int, seed: int = 0, **settings: Any) -> Any:
        kind = Hiding if settings.get("privileged", True) else toy_env
        return kind(tasks, num_envs, {30: "dropped"} if num_envs == 4 else {})

    monkeypatch.setattr("brc_fast.envs.make", make)


TINY = [
    *("--num-envs", "4", "--steps", "240", "--random-steps", "80", "--batch-size", "16", "--device", "cpu"),
    *("--critic.width", "8", "--actor.width", "8", "--report-every", "60", "--eval-every", "120"),
    *("--eval-episodes", "2", "--checkpoint-every", "120", "--quiet"),
]


@pytest.mark.parametrize(
    "words",
    [(), ("--normalize-observations", "--policy-lag", "1", "--learning.return-bootstrap", "critic")],
    ids=["plain", "normalized and lagging"],
)
def test_a_resumed_run_equals_one_never_stopped(
    hiding: None, tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    require("train")
    from run_folders import arrays, assert_same_run

    from brc_fast.command import main as cli

    command = ["train", "toy/One", *TINY, *words]
    assert cli.main([*command, "--run", str(tmp_path / "whole")]) == 0
    assert cli.main([*command, "--run", str(tmp_path / "halves"), "--steps", "120"]) == 0
    assert cli.main(["train", "--resume", str(tmp_path / "halves"), "--steps", "240", "--quiet"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    kept = arrays(tmp_path / "whole")
    assert kept["agent"]["actor/body.input.kernel"].shape == (1, 1, 8)
    assert kept["agent"]["critic/body.input.kernel"].shape == (2, 1 + 2 + 1, 8)
    # of every transition, also of the last one of an episode, both sides are the true ones
    before, actions, after = (
        kept["replay"][name] for name in ("observations", "actions", "next_observations")
    )
    velocity = np.float32(0.9) * before[..., 1] + np.float32(0.1) * actions[..., 0]
    np.testing.assert_allclose(after[..., 1], velocity, atol=1e-6)
    np.testing.assert_allclose(after[..., 0], before[..., 0] + 0.1 * velocity, atol=1e-6)
    np.testing.assert_allclose(after[..., 2], before[..., 2] + 0.05, atol=1e-6)
    assert (after[..., 2] > 0.99).any()
    if words:
        assert kept["agent"]["observations/mean"].shape == (1, 3)
    assert cli.main(["evaluate", str(tmp_path / "whole"), "--episodes", "2"]) == 0


def test_without_the_option_a_run_has_no_privileged_numbers(hiding: None, tmp_path: Path) -> None:
    require("train")
    from run_folders import arrays

    from brc_fast.command import main as cli
    from brc_fast.runs.checkpoint import RunFolder
    from brc_fast.runs.evaluate import restore

    runs = {}
    for words in ((), ("--env.no-privileged",)):
        run = runs[words] = tmp_path / f"run{len(words)}"
        assert cli.main(["train", "toy/One", *TINY, *words, "--steps", "120", "--run", str(run)]) == 0
    sizes = [restore(RunFolder(run), "cpu")[1] for run in runs.values()]
    assert [(agent.observation_size, agent.privileged_size) for agent in sizes] == [(1, 2), (3, 0)]
    config = json.loads((run / "config.json").read_text())
    assert config["env"]["privileged"] is False
    assert arrays(run)["replay"]["observations"].shape[-1] == 3


@pytest.mark.parametrize(
    ("task", "privileged"),
    [(GO1, False), ("mjx/Go1JoystickFlatTerrain", False), ("mjx/CartpoleSwingup", True), ("gym/A-v0", True)],
)
def test_a_robots_run_of_an_older_version_keeps_its_critics(
    task: str, privileged: bool, tmp_path: Path
) -> None:
    from brc_fast.runs.checkpoint import RunFolder

    folder = RunFolder(tmp_path)
    folder.create(TrainConfig(tasks=(task,)))
    assert folder.config().env.privileged
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["env"]["privileged"]
    file.write_text(json.dumps(values))
    assert folder.config().env.privileged is privileged
    del values["env"]
    file.write_text(json.dumps(values))
    assert folder.config().env.privileged is privileged


# environments

N = 3


class Robot(gymnasium.Env[Any, Any]):
    """A point that senses its place; the simulator also knows how fast it is, and `more` times its age."""

    action_space = Space(-1.0, 1.0, (1,), np.float32)

    def __init__(
        self, more: int = 1, senses: int = 1, extra: bool = False, render_mode: str | None = None
    ) -> None:
        self.senses, self.extra = senses, extra
        wide = Space(-np.inf, np.inf, (senses + 1 + more,), np.float32)
        kinds = {"privileged_state": wide, "state": Space(-np.inf, np.inf, (senses,), np.float32)}
        self.observation_space = Dict(kinds | ({"also": kinds["state"]} if extra else {}))
        self.more = more

    def _seen(self) -> dict[str, Any]:
        state = np.full(self.senses, self.place, np.float32)
        known = np.array([*state, self.speed, *[self.age] * self.more], np.float32)
        return {"privileged_state": known, "state": state} | ({"also": state} if self.extra else {})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.place, self.speed, self.age = self.np_random.uniform(-0.1, 0.1), 0.0, 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        if self.more == 4 and self.age == 2:
            os._exit(3)
        self.speed = 0.5 * self.speed + float(action[0])
        self.place, self.age = self.place + self.speed, self.age + 1
        if self.age == 4 and self.more == 3 and self.place > 0:
            self.speed = np.nan  # lost, though the policy senses nothing of it
        return self._seen(), -abs(self.place), abs(self.place) > 2.5, False, {}


@pytest.fixture
def robots() -> Iterator[None]:
    made = {
        "Robot-v0": {},
        "Wide-v0": {"more": 2, "senses": 2},
        "Also-v0": {"extra": True},
        "Lost-v0": {"more": 3},
        "Dying-v0": {"more": 4},
    }
    for name, kwargs in made.items():
        gymnasium.register(name, Robot, max_episode_steps=6, kwargs=kwargs)
    yield
    for name in made:
        del gymnasium.registry[name]


def played(env: Any, steps: int, seed: int = 1) -> Iterator[tuple[Privileged, Tensor, Step, Privileged]]:
    """Random steps, with what was privileged before and after each."""
    rng = torch.Generator().manual_seed(seed)
    env.reset_tensors(0)
    for _ in range(steps):
        before = env.privileged
        actions = torch.rand(env.num_envs, env.action_size, generator=rng) * 2 - 1
        step = env.step_tensors(actions)
        yield before, actions, step, env.privileged


@pytest.mark.parametrize("processes", [False, True])
def test_state_is_the_policys_and_privileged_state_the_critics(robots: None, processes: bool) -> None:
    env = envs.make("gym/Robot-v0", N, processes=processes)
    try:
        assert env.task_spec == replace(Spec.vectors(1, 1, ["gym/Robot-v0"]), privileged=Field((3,)))
        assert env.reset(seed=0)[0].shape == env.observation_space.shape == (N, 1)
        ends = set()
        for before, actions, step, after in played(env, 40):
            speed = 0.5 * before.observations[:, 1:2] + actions
            place = before.observations[:, :1] + speed
            age = before.observations[:, 2:] + 1
            torch.testing.assert_close(after.successors, torch.cat([place, speed, age], 1))
            assert torch.equal(after.successors[:, :1], step.successors)
            assert torch.equal(after.observations[:, :1], step.observations)
            over = step.terminated | step.truncated
            assert torch.equal(after.observations[over, 1:], torch.zeros(int(over.sum()), 2))
            ends |= {(bool(a), bool(b)) for a, b in zip(step.terminated, step.truncated, strict=True)}
        assert ends >= {(False, False), (False, True), (True, False)}
    finally:
        env.close()


def test_a_robot_without_it_and_other_names_are_as_they_were(robots: None) -> None:
    env = envs.make("gym/Robot-v0", N, privileged=False)
    env.reset_tensors(0)
    env.step_tensors(torch.zeros(N, 1))
    assert (env.task_spec, env.privileged) == (Spec.vectors(1, 1, ["gym/Robot-v0"]), None)
    also = envs.make("gym/Also-v0", N)
    assert also.task_spec == Spec.vectors(1 + 3 + 1, 1, ["gym/Also-v0"])


def test_a_number_that_only_the_critic_sees_can_lose_a_step(robots: None) -> None:
    env = envs.make("gym/Lost-v0", N)
    lost = 0
    for before, _, step, after in played(env, 40):
        assert after.observations.isfinite().all()
        assert torch.equal(after.successors[step.dropped], before.observations[step.dropped])
        lost += int(step.dropped.sum())
    assert lost == env.nan_count[0] > 0


def test_a_process_that_dies_loses_what_both_saw(robots: None) -> None:
    env = envs.make("gym/Dying-v0", 2, processes=True)
    try:
        *_, (before, _, step, after) = played(env, 3)
        assert step.dropped.all()
        assert step.truncated.all()
        assert torch.equal(after.successors, before.observations)
        assert torch.equal(step.successors, before.observations[:, :1])
        assert torch.equal(after.observations[:, :1], step.observations)
        assert not after.observations[:, 1:].any()  # of a new episode
    finally:
        env.close()


def test_tasks_side_by_side_have_the_widest_of_both(robots: None) -> None:
    names = ("gym/Robot-v0", "gym/Wide-v0", "gym/Pendulum-v1")  # the last has nothing that is privileged
    env = envs.make(names, N)
    assert env.task_spec == replace(Spec.vectors(3, 1, names), privileged=Field((5,)))
    for before, _, step, after in played(env, 9):
        for seen_ in (before.observations, after.observations, after.successors):
            robot, wide, pendulum = seen_.split(N)
            assert not robot[:, 3:].any()
            assert not pendulum.any()
            assert torch.equal(wide[:, 0], wide[:, 1])
            assert torch.equal(wide[:, 3], wide[:, 4])
        assert torch.equal(after.successors[:N, 0], step.successors[:N, 0])
        assert torch.equal(after.successors[N : 2 * N, :2], step.successors[N : 2 * N, :2])


def test_robots_of_different_sizes_train_one_agent(robots: None, tmp_path: Path) -> None:
    require("train")
    from run_folders import arrays

    from brc_fast.command import main as cli

    command = [
        "train",
        "gym/Robot-v0",
        "gym/Wide-v0",
        *TINY,
        "--run",
        str(tmp_path / "run"),
        "--steps",
        "120",
    ]
    assert cli.main(command) == 0
    kept = arrays(tmp_path / "run")["replay"]
    assert kept["observations"].shape[-1] == 2 + 5
    ids, before = kept["task_ids"], kept["observations"]
    assert not before[ids == 0][:, [1, 5, 6]].any()
    assert np.array_equal(before[..., 0], before[..., 2])  # place, as each of both is told it
    assert np.array_equal(kept["next_observations"][..., 0], kept["next_observations"][..., 2])
    assert np.abs(kept["next_observations"][ids == 1][:, 0]).max() > 0


@needs("envpool")
def test_a_walking_robots_critic_sees_what_the_simulator_knows() -> None:
    """EnvPool's own numbers, also of the last step of an episode."""
    env = envs.make(GO1, N, episode_length=3)
    assert env.task_spec == replace(Spec.vectors(48, 12, [GO1]), privileged=Field((123,)))
    assert envs.make(GO1, 1, privileged=False).task_spec == Spec.vectors(48, 12, [GO1])
    raw: list[Any] = []
    read = env.venv._read

    def noted(observations: Any, count: int) -> Any:
        raw.append(observations)
        return read(observations, count)

    env.venv._read = noted
    truncated = 0
    for _, _, step, after in played(env, 7):
        stepped = [x for x in raw if len(x["state"]) == N]
        led = stepped[-2] if step.truncated.all() else stepped[-1]
        assert np.array_equal(step.successors.numpy(), led["state"].astype(np.float32))
        assert np.array_equal(after.successors.numpy(), led["privileged_state"].astype(np.float32))
        assert np.array_equal(step.observations.numpy(), raw[-1]["state"].astype(np.float32))
        assert np.array_equal(after.observations.numpy(), raw[-1]["privileged_state"].astype(np.float32))
        truncated += int(step.truncated.sum())
    assert truncated == 2 * N
