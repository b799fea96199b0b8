"""The benchmark of training compares two learners in one loop and says what was not reached."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import require

from brc_fast import ActorConfig, CriticConfig
from brc_fast.envs import expand

require("gymnasium")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import bench_train
from workloads import WORKLOADS

TASK = "gym/Pendulum-v1"
NEVER = 1.0  # its rewards are negative


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(bench_train, "SLICE", 0.05)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the benchmark does: several wait for each other on a busy machine
    yield bench_train
    torch.set_num_threads(threads)


@pytest.fixture
def config(bench: Any) -> Any:
    small = {"critic": CriticConfig(width=16), "actor": ActorConfig(width=16), "batch_size": 32}
    less = {"random_steps": 60, "eval_every": 200, "eval_episodes": 2, "num_envs": 2}
    less |= {"updates_per_step": 1, "replay_capacity": 1000}
    return dataclasses.replace(bench.settings(TASK, "cpu"), **small, **less)


def run(bench: Any, config: Any, threshold: float | None, seconds: float) -> Any:
    found = bench.Results("train")
    bench.run(found, TASK, threshold, "cpu", seconds, config)
    return found


def entries(found: Any, what: str) -> dict[str, dict[str, Any]]:
    return {one["provider"]: one for one in found.entries if one["case"].startswith(what)}


def test_the_plain_learner_acts_with_the_networks_that_it_trains(bench: Any, config: Any) -> None:
    side = bench.Side("plain", config, "cpu", NEVER)
    trainer, agent = side.trainer, side.trainer.agent
    assert isinstance(agent, bench.PlainAgent)
    inputs = torch.zeros(1, agent.observation_size), torch.zeros(1, dtype=torch.long)
    before = agent.policy(*inputs)[0]
    while trainer.updates < 5:
        trainer.collect()
        if side.learning:
            trainer.learn()
    assert not torch.equal(agent.policy(*inputs)[0], before)
    torch.testing.assert_close(agent.policy(*inputs)[0], agent.peer.actor(inputs[0]).chunk(2, -1)[0])
    assert agent.alpha != 1.0
    side.close()


def test_a_return_that_is_not_reached_is_missing_and_rates_are_there(bench: Any, config: Any) -> None:
    found = run(bench, config, NEVER, 8.0)
    assert found.equality == "passed"
    for name, entry in entries(found, "time to return").items():
        told = next(told for told in found.found["runs"] if told["provider"] == name)
        best = max(row["return"] for row in told["evaluations"])
        assert entry["value"] is None
        assert entry["missing"] == f"not reached in {told['trained_seconds']:.0f} s, best return {best:.0f}"
    steps, updates = entries(found, "environment steps"), entries(found, "updates")
    for name in bench.AGENTS:  # an update for every step of the two environments
        assert steps[name]["value"] == pytest.approx(2 * updates[name]["value"], rel=1e-6)
        assert updates[name]["rounds"] >= 2
    assert "ratio" in updates["plain"]


def test_a_return_that_is_reached_has_the_seconds_of_every_seed(
    bench: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SEEDS", 3)
    found = run(bench, config, -1e6, 60.0)
    assert [told["seed"] for told in found.found["runs"]] == [0, 0, 1, 1, 2, 2]
    for entry in entries(found, "time to return").values():
        assert (entry["rounds"], entry["better"], entry["unit"]) == (3, "less", "s")
    assert entries(found, "updates")["ours"]["missing"].endswith("raise --budget")


def test_where_no_return_is_asked_for_nothing_is_evaluated_and_rates_are_there(
    bench: Any, config: Any
) -> None:
    found = run(bench, dataclasses.replace(config, eval_every=4), None, 2.0)
    assert all(told["evaluations"] == [] for told in found.found["runs"])
    assert {one["unit"] for one in found.entries} == {"steps/s", "updates/s"}
    assert all(one["value"] > 0 for one in found.entries)


@pytest.mark.parametrize("name", ["ours", "plain"])
def test_a_learner_that_computes_something_else_is_not_timed(
    name: str, bench: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(bench.AGENTS[name]):  # type: ignore[misc]
        def update(self, batches: Any, *rest: Any, **options: Any) -> Any:
            return super().update(batches._replace(rewards=batches.rewards + 1.0), *rest, **options)

    monkeypatch.setitem(bench.AGENTS, name, Wrong)
    found = run(bench, config, NEVER, 5.0)
    assert all(one["value"] is None for one in found.entries)
    assert found.equality.startswith("failed: ours at time to return 1, gym/Pendulum-v1 differs from ours: ")


def test_a_learner_that_fails_costs_the_other_nothing(
    bench: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = bench.Side.turn

    def broken(side: Any) -> Any:
        if side.name == "plain":
            raise FloatingPointError("a loss is NaN")
        return turn(side)

    monkeypatch.setattr(bench.Side, "turn", broken)
    found = run(bench, config, NEVER, 2.0)
    told = entries(found, "time to return")
    assert told["plain"]["missing"] == "FloatingPointError: a loss is NaN"
    assert told["ours"]["missing"].startswith("not reached in ")


def test_a_workload_brings_its_tasks_and_on_a_gpu_its_sizes(bench: Any) -> None:
    dogs = WORKLOADS["dogs-multitask"]
    small, large = (bench.settings(dogs.suite, device, dogs) for device in ("cpu", "cuda"))
    assert small.tasks == large.tasks == expand("dmc/dogs")
    assert (large.critic.width, large.batch_size) == (4096, 1024)
    assert small.critic.width < 4096
    bench.check(small, "cpu")
