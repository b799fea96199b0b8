"""Running statistics of observations: exact, of each task, in checkpoints, used wherever networks read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require
from torch import Tensor

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, Noise, TrainConfig
from brc_fast.agents.memory import plan_memory
from brc_fast.agents.policy import LaggedPolicy
from brc_fast.nn.inputs import ObservationStatistics
from brc_fast.spec import Spec

O, A, B, T = 5, 2, 12, 3  # noqa: E741
SMALL: dict[str, Any] = {"critic": CriticConfig(width=16, depth=1), "actor": ActorConfig(width=16, depth=1)}


def shown(rows: int, tasks: int = T, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Observations far from mean 0 and variance 1, others for each task; the last column of task 0 is 0."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(tasks, (rows,), generator=rng)
    scale, place = torch.logspace(-1, 3, O), torch.linspace(-100, 1000, O)
    observations = (torch.randn(rows, O, generator=rng) * scale + place) * (1.0 + ids[:, None])
    observations[ids == 0, -1] = 0.0
    return observations, ids


# the class


@pytest.mark.parametrize("parts", [1, 7, 500])
@pytest.mark.parametrize("tasks", [1, T])
def test_statistics_of_parts_are_those_of_all_observations(tasks: int, parts: int) -> None:
    observations, ids = shown(500, tasks)
    mine = ObservationStatistics(O, tasks)
    for part, part_ids in zip(observations.chunk(parts), ids.chunk(parts), strict=True):
        mine.update(part, part_ids)
    for task in range(tasks):
        rows = observations[ids == task].double()
        assert mine.count[task].item() == len(rows)
        torch.testing.assert_close(mine.mean[task], rows.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.variance[task], rows.var(0, correction=0), rtol=1e-9, atol=1e-18)


def test_observations_far_from_zero_keep_their_variance() -> None:
    """A mean of squares less the square of the mean would lose most of it, in float32 all."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(1e6, 1.0, (4000, O)))
    mine = ObservationStatistics(O, dtype=torch.float64)
    for part in values.chunk(400):
        mine.update(part)
    torch.testing.assert_close(mine.variance[0], values.var(0, correction=0), rtol=1e-8, atol=0.0)
    assert abs(mine.normalize(values).std().item() - 1.0) < 1e-3


@pytest.mark.parametrize("shape", [(30,), (3, 10), (2, 3, 5)])
def test_normalized_observations_have_mean_0_and_variance_1_in_each_task(shape: tuple[int, ...]) -> None:
    observations, ids = shown(30)
    mine = ObservationStatistics(O, T)
    mine.update(observations, ids)
    out = mine.normalize(observations.view(*shape, O), ids.view(shape)).view(30, O)
    assert out.dtype == torch.float32
    for task in range(T):
        rows, raw = out[ids == task].double(), observations[ids == task].double()
        wanted = (raw - raw.mean(0)) / (raw.var(0, correction=0) + 1e-8).sqrt()
        torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-4)
    assert (out[ids == 0, -1] == 0.0).all()  # padding


def test_padding_and_columns_that_never_change_become_zero() -> None:
    observations = torch.tensor([[0.0, 0.1, 3.0]]).repeat(1000, 1)
    observations[:, 2] += torch.arange(1000)
    mine = ObservationStatistics(3, 2)
    for part in observations.split(37):
        mine.update(part, torch.ones(len(part), dtype=torch.int64))
    out = mine.normalize(observations, torch.ones(1000, dtype=torch.int64))
    assert (out[:, :2] == 0.0).all()
    torch.testing.assert_close(out[:, 2].var(), torch.tensor(1.0), rtol=1e-2, atol=0.0)


def test_a_task_that_has_shown_nothing_is_given_as_it_is() -> None:
    mine = ObservationStatistics(O, 2)
    x = torch.randn(4, O)
    ids = torch.tensor([0, 0, 1, 1])
    assert torch.equal(mine.normalize(x, ids), x)
    mine.update(x[:2], ids[:2])
    mine.update(x[:0], ids[:0])
    assert torch.equal(mine.normalize(x, ids)[2:], x[2:])
    assert not torch.equal(mine.normalize(x, ids)[:2], x[:2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_and_changes_nothing(value: float) -> None:
    mine = ObservationStatistics(O, T)
    mine.update(*shown(20))
    before = {name: x.clone() for name, x in mine.state_dict().items()}
    observations, ids = shown(20, seed=1)
    observations[7, 3] = value
    told = rf"observations must be finite .* got {value} in row 7, column 3, of task {ids[7]}; leave"
    with pytest.raises(ValueError, match=told) as error:
        mine.update(observations, ids)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], x) for name, x in mine.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((torch.zeros(4, O + 1), torch.zeros(4).long()), r"\[N, O\] = \[4, 5\], got \[4, 6\]"),
        ((torch.zeros(2, 4, O), torch.zeros(4).long()), r"\[N, O\] = \[2, 5\], got \[2, 4, 5\]"),
        ((torch.zeros(4, O), torch.zeros(3).long()), r"task_ids must have shape \[N\] = \[4\], got \[3\]"),
        ((torch.zeros(4, O), torch.tensor([0, 1, 2, 3])), r"task_ids must be in \[0, T\) = \[0, 3\), got 3"),
        ((torch.zeros(1, O), torch.tensor([-1])), r"task_ids must be in \[0, T\) = \[0, 3\), got -1"),
    ],
)
def test_observations_that_do_not_fit_are_refused(arguments: tuple[Tensor, Tensor], told: str) -> None:
    mine = ObservationStatistics(O, T)
    with pytest.raises(ValueError, match=told):
        mine.update(*arguments)
    assert not mine.count.any()


def test_several_tasks_need_task_ids() -> None:
    with pytest.raises(ValueError, match="task_ids are needed to normalize the observations of 3 tasks"):
        ObservationStatistics(O, T).normalize(torch.zeros(2, O))


def test_a_state_goes_on_bit_for_bit_and_one_of_another_size_is_refused() -> None:
    mine, other = ObservationStatistics(O, T), ObservationStatistics(O, T)
    mine.update(*shown(20))
    other.load_state_dict(copy.deepcopy(mine.state_dict()))
    for each in (mine, other):
        each.update(*shown(20, seed=1))
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in mine.state_dict().items())
    assert all(map(torch.equal, mine.moments, other.moments))
    with pytest.raises(ValueError, match=r"observation statistics' mean must have .* \[3, 6\], got \[3, 5\]"):
        ObservationStatistics(O + 1, T).load_state_dict(mine.state_dict())
    with pytest.raises(ValueError, match="observation statistics lack variance"):
        other.load_state_dict({"count": mine.count, "mean": mine.mean})


# the agent


def agent(tasks: int = 1, normalize: bool = True, **options: Any) -> BRC:
    return BRC(O, A, tasks, normalize_observations=normalize, **{**SMALL, **options})


def batches(tasks: int, updates: int = 3) -> tuple[Batch, Noise]:
    rng = torch.Generator().manual_seed(1)
    seen, ids = shown(updates * B, tasks)
    led, _ = shown(updates * B, tasks, seed=0)
    shape = (updates, B)
    actions = torch.rand(*shape, A, generator=rng) * 2 - 1
    rewards = torch.rand(shape, generator=rng)
    batch = Batch(
        seen.view(*shape, O), actions, rewards, torch.ones(shape), led.view(*shape, O) * 1.01, ids.view(shape)
    )
    return batch, Noise(*torch.randn(2, *shape, A, generator=rng))


@pytest.mark.parametrize("tasks", [1, T])
def test_an_agent_acts_values_and_learns_as_one_that_is_given_normalized_observations(tasks: int) -> None:
    mine, plain = agent(tasks), agent(tasks, normalize=False)
    assert mine.observations is not None
    observations, ids = shown(200, tasks)
    mine.observations.update(observations, ids)
    normalized = mine.observations.normalize(observations, ids)
    batch, noise = batches(tasks)
    given = batch._replace(
        **{
            name: mine.observations.normalize(getattr(batch, name), batch.task_ids)
            for name in ("observations", "next_observations")
        }
    )
    before = batch.observations.clone()
    for _ in range(2):
        assert torch.equal(mine.act(observations, ids), plain.act(normalized, ids))
        assert torch.equal(
            mine.act(observations, ids, deterministic=True), plain.act(normalized, ids, deterministic=True)
        )
        assert torch.equal(mine.value(observations, ids), plain.value(normalized, ids))
        assert torch.equal(mine.entropy_per_task(batch.update(0)), plain.entropy_per_task(given.update(0)))
        targets = (
            one.critic_target(x.update(0), noise.next_action[0]) for one, x in ((mine, batch), (plain, given))
        )
        assert all(map(torch.equal, *targets))
        losses, expected = mine.update(batch, noise), plain.update(given, noise)
        assert all(torch.equal(losses[name], value) for name, value in expected.items())
        losses, expected = mine.update(batch), plain.update(given)  # with noise of their own
        assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert torch.equal(batch.observations, before)
    lagged, other = LaggedPolicy(mine), LaggedPolicy(plain)
    assert torch.equal(lagged.act(observations, ids), other.act(normalized, ids))


def test_acting_and_learning_leave_the_statistics_as_they_are() -> None:
    mine = agent(T)
    assert mine.observations is not None
    mine.observations.update(*shown(50))
    before = {name: x.clone() for name, x in mine.observations.state_dict().items()}
    mine.act(*shown(20, seed=3))
    mine.value(*shown(20, seed=3))
    mine.update(*batches(T))
    assert all(torch.equal(before[name], x) for name, x in mine.observations.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_that_is_under_way_keeps_the_moments_that_it_was_given(dtype: torch.dtype) -> None:
    mine = agent(T, dtype=dtype)
    assert mine.observations is not None
    mine.observations.update(*shown(50))
    moments = mine.observations.moments
    kept = [x.clone() for x in moments]
    mine.observations.update(*shown(50, seed=1))
    assert all(map(torch.equal, moments, kept))
    assert not torch.equal(moments[0], mine.observations.moments[0])


def test_the_state_of_an_agent_holds_its_statistics() -> None:
    mine, other = agent(T), agent(T)
    assert mine.observations is not None
    mine.observations.update(*shown(50))
    state = mine.state_dict()
    assert {name for name in state if name.startswith("observations/")} == {
        f"observations/{name}" for name in ("count", "mean", "variance")
    }
    other.load_state_dict(state)
    observations, ids = shown(20, seed=2)
    twin = copy.deepcopy(mine)
    acted = mine.act(observations, ids, deterministic=True)
    assert torch.equal(acted, other.act(observations, ids, deterministic=True))
    assert torch.equal(acted, twin.act(observations, ids, deterministic=True))
    with pytest.raises(ValueError, match="agent state has an unknown entry observations/count"):
        agent(T, normalize=False).load_state_dict(state)
    with pytest.raises(ValueError, match="agent state lacks observations/count"):
        mine.load_state_dict(agent(T, normalize=False).state_dict())


def test_the_plan_of_memory_counts_what_normalizing_takes() -> None:
    config = TrainConfig(tasks=("toy/One",), batch_size=B, updates_per_step=2, **SMALL)
    spec = Spec.vectors(O, A, config.tasks)
    without = plan_memory(config, spec, "cpu")
    plan = plan_memory(TrainConfig(**{**vars(config), "normalize_observations": True}), spec, "cpu")
    assert plan.batches - without.batches == 2 * (2 * B * O * 4)
    assert plan.state - without.state == (2 * O + 1) * 8


# the run


WORDS = [
    "--num-envs",
    "4",
    "--batch-size",
    "16",
    "--critic.width",
    "8",
    "--actor.width",
    "8",
    "--eval-episodes",
    "2",
]
LENGTHS = ["--steps", "320", "--random-steps", "40", "--eval-every", "160", "--checkpoint-every", "160"]


def train(run: Path, *words: str, tasks: tuple[str, ...] = ("toy/One", "toy/Two")) -> int:
    require("train")
    from brc_fast.command import main as cli

    return cli.main(["train", *tasks, "--run", str(run), *WORDS, *LENGTHS, *words])


def state_of(run: Path) -> dict[str, np.ndarray]:
    from brc_fast.runs.checkpoint import RunFolder

    return RunFolder(run).load("agent")[1]["agent"]


class Shown:
    """Notes what an environment shows, each observation once, apart from the loop that is looked at.

    With `spends` the environment spends a step on a reset, the one after an end.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type, spends: bool) -> None:
        self.rows: list[tuple[int, Tensor]] = []
        self.spends, self.ended = spends, torch.zeros(8, dtype=torch.bool)
        reset, step = kind.reset_tensors, kind.step_tensors
        monkeypatch.setattr(kind, "reset_tensors", self.noting_reset(reset))
        monkeypatch.setattr(kind, "step_tensors", self.noting_step(step))

    def noting_reset(self, reset: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(env: Any, seed: int | None) -> Tensor:
            observations = reset(env, seed)
            if env.num_envs > 4:  # those of training, not of the evaluation
                self.rows += zip(env.task_ids.tolist(), observations.clone(), strict=True)
            return observations

        return noted

    def noting_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def noted(env: Any, actions: Tensor) -> Any:
            result = step(env, actions)
            if env.num_envs > 4:
                if self.spends:
                    result.observations.copy_(result.successors)
                    result.dropped[self.ended] = True
                    result.rewards[self.ended] = 0.0
                    result.truncated[self.ended] = False
                    self.ended = result.truncated.clone()
                for slot, task in enumerate(env.task_ids.tolist()):
                    if not result.dropped[slot]:
                        self.rows.append((task, result.successors[slot].clone()))
                    if result.dropped[slot] or (result.truncated[slot] and not self.spends):
                        self.rows.append((task, result.observations[slot].clone()))
            return result

        return noted


@pytest.mark.parametrize("spends", [False, True])
def test_a_run_counts_every_observation_once_and_no_dropped_row(
    toy: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spends: bool
) -> None:
    from brc_fast import envs

    if not spends:
        toy[7] = "dropped"
    noted = Shown(monkeypatch, type(envs.make(("toy/One",), 1)), spends)
    assert train(tmp_path / "run", "--normalize-observations") == 0
    state = state_of(tmp_path / "run")
    for task in (0, 1):
        rows = torch.stack([row for which, row in noted.rows if which == task]).double().numpy()
        assert state["observations/count"][task, 0] == len(rows) > 320
        np.testing.assert_allclose(state["observations/mean"][task], rows.mean(0), rtol=1e-10)
        np.testing.assert_allclose(state["observations/variance"][task], rows.var(0), rtol=1e-8)


def test_a_resumed_run_goes_on_with_its_statistics_bit_for_bit(toy: dict, tmp_path: Path) -> None:
    from brc_fast.command import main as cli

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(whole, "--normalize-observations") == 0
    assert train(halves, "--normalize-observations", "--steps", "160") == 0
    assert cli.main(["train", "--resume", str(halves), "--steps", "320"]) == 0
    left, right = state_of(whole), state_of(halves)
    assert left.keys() == right.keys()
    for name, values in left.items():
        np.testing.assert_array_equal(values, right[name], err_msg=name)


def test_the_policy_of_a_normalizing_run_is_restored_with_its_statistics(toy: dict, tmp_path: Path) -> None:
    from brc_fast.command import main as cli
    from brc_fast.runs.checkpoint import RunFolder
    from brc_fast.runs.evaluate import restore

    run = tmp_path / "run"
    assert train(run, "--normalize-observations") == 0
    assert json.loads((run / "config.json").read_text())["normalize_observations"] is True
    _, restored = restore(RunFolder(run), "cpu")
    assert restored.observations is not None
    np.testing.assert_array_equal(restored.observations.mean.numpy(), state_of(run)["observations/mean"])
    before = state_of(run)
    assert cli.main(["evaluate", str(run), "--episodes", "2"]) == 0
    for name, values in state_of(run).items():
        np.testing.assert_array_equal(values, before[name])
    assert cli.main(["train", "--resume", str(run), "--no-normalize-observations"]) == 2


def test_environments_that_start_anew_are_counted_when_a_run_goes_on(tmp_path: Path) -> None:
    require("gym", "train")
    from brc_fast.command import main as cli

    run, task = tmp_path / "run", ("gym/Pendulum-v1",)
    assert train(run, "--normalize-observations", "--steps", "160", tasks=task) == 0
    assert state_of(run)["observations/count"].item() == 160 + 4
    assert cli.main(["train", "--resume", str(run), "--steps", "320"]) == 0
    assert state_of(run)["observations/count"].item() == 320 + 4 + 4


def test_a_run_without_the_option_keeps_no_statistics(toy: dict, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--steps", "80") == 0
    assert not [name for name in state_of(tmp_path / "run") if name.startswith("observations")]
