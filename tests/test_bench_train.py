"""The benchmark of training compares two learners in one loop and says what was not reached."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import require

from brc_fast import ActorConfig, CriticConfig

require("gymnasium")
ROOT = Path(__file__).resolve().parent.parent
TASK = "gym/Pendulum-v1"
NEVER = 1.0  # its rewards are negative


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import bench_train

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


def entries(found: dict[str, Any], what: str) -> dict[str, dict[str, Any]]:
    return {entry["provider"]: entry for entry in found["measurements"] if entry["case"].startswith(what)}


def test_both_learners_see_the_same_noise_and_end_up_with_the_same_policy(bench: Any, config: Any) -> None:
    sides = [bench.Side(name, config, "cpu", NEVER) for name in bench.AGENTS]
    ours, plain = (side.trainer for side in sides)
    assert isinstance(plain.agent, bench.PlainAgent)
    before = plain.agent.peer.actor.head.weight.clone()
    for trainer in (ours, plain):
        for _ in range(60):
            trainer.collect()
            if trainer.steps >= config.random_steps:
                trainer.learn()
    assert ours.updates == plain.updates > 5
    assert not torch.equal(plain.agent.peer.actor.head.weight, before)
    torch.testing.assert_close(ours.observations, plain.observations, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours.agent.alpha, plain.agent.alpha, rtol=1e-4, atol=1e-5)
    for side in sides:
        side.close()


def test_a_return_that_is_not_reached_is_missing_and_rates_are_there(bench: Any, config: Any) -> None:
    found = bench.run(TASK, NEVER, "cpu", 10.0, config)
    assert found["equality"] == "passed"
    assert [run["provider"] for run in found["runs"]][:2] == ["ours", "plain"]
    for name, entry in entries(found, "time to return").items():
        run = next(run for run in found["runs"] if run["provider"] == name)
        best = max(row["return"] for row in run["evaluations"])
        assert entry["value"] is None
        assert entry["missing"] == f"not reached in {run['trained_seconds']:.0f} s, best return {best:.0f}"
    steps, updates = entries(found, "environment steps"), entries(found, "updates")
    for name in bench.AGENTS:  # an update for every step of the two environments
        assert steps[name]["value"] == pytest.approx(2 * updates[name]["value"], rel=1e-6)
        assert updates[name]["rounds"] >= 2
    assert found["ratios"].keys() == {"plain"}


def test_a_return_that_is_reached_has_the_seconds_of_every_seed(
    bench: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = 3
    monkeypatch.setattr(bench, "MOST", seeds)
    found = bench.run(TASK, -1e6, "cpu", 60.0, config)
    assert len(found["runs"]) == 2 * seeds
    for name, entry in entries(found, "time to return").items():
        own = [run for run in found["runs"] if run["provider"] == name]
        assert [run["seed"] for run in own] == list(range(seeds))
        assert all(run["reached_steps"] is not None for run in own)
        assert (entry["rounds"], entry["better"], entry["unit"]) == (seeds, "less", "s")
    assert entries(found, "updates")["ours"]["missing"].endswith("raise --budget")


def test_where_no_return_is_asked_for_nothing_is_evaluated_and_rates_are_there(
    bench: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.Side, "evaluate", lambda side: pytest.fail("evaluated"))
    found = bench.run(TASK, None, "cpu", 2.0, dataclasses.replace(config, eval_every=4))
    assert found["threshold"] is None
    assert {entry["unit"] for entry in found["measurements"]} == {"steps/s", "updates/s"}
    assert all(entry["value"] > 0 for entry in found["measurements"])


@pytest.mark.parametrize("name", ["ours", "plain"])
def test_a_learner_that_computes_something_else_is_not_timed(
    name: str, bench: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = bench.AGENTS[name]

    class Other(kind):  # type: ignore[misc,valid-type]
        def update(self, batches: Any, noise: Any = None, reward_scale: Any = None) -> Any:
            return super().update(batches._replace(rewards=1.5 * batches.rewards), noise, reward_scale)

    monkeypatch.setitem(bench.AGENTS, name, Other)
    found = bench.run(TASK, NEVER, "cpu", 1.0, config)
    assert found["equality"].startswith("failed: plain differs from ours: critic_loss is ")
    assert found["runs"] == []
    assert all(entry["missing"].startswith("plain differs") for entry in found["measurements"])
    assert len(found["measurements"]) == 6


def test_a_learner_that_fails_is_listed_with_its_reason_and_the_other_goes_on(
    bench: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = bench.Side.turn

    def failing(side: Any) -> Any:
        if side.name == "plain":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return turn(side)

    monkeypatch.setattr(bench.Side, "turn", failing)
    found = bench.run(TASK, NEVER, "cpu", 1.0, config)
    times = entries(found, "time to return")
    assert times["plain"]["missing"] == "out of memory"
    assert times["ours"]["missing"].startswith("not reached in ")
    trained = {run["provider"]: run["trained_seconds"] for run in found["runs"]}
    assert trained["ours"] > 10 * 0.05 > trained["plain"] == 0.0


def test_a_simulator_that_is_missing_is_the_reason_of_every_figure(bench: Any, config: Any) -> None:
    other = dataclasses.replace(config, tasks=("gym/NoSuchTask-v0",))
    found = bench.run("gym/NoSuchTask-v0", NEVER, "cpu", 1.0, other)
    assert found["runs"] == []
    assert all("NoSuchTask" in entry["missing"] for entry in found["measurements"])


def test_the_command_line_stores_and_draws_and_says_what_it_lacks(
    bench: Any,
    config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from harness import read

    require("matplotlib")
    monkeypatch.setattr(bench, "settings", lambda task, device: config)
    monkeypatch.setattr(bench, "write", partial(bench.write, folder=tmp_path))
    words = ["--device", "cpu", "--task", TASK, "--threshold", "1", "--budget", "2", "--save", "train"]
    assert bench.main([*words, "--picture", str(tmp_path / "train.png")]) == 0
    stored = read(tmp_path / "train.json")
    assert json.loads(json.dumps(stored["settings"])) == stored["settings"]
    assert (tmp_path / "train.png").stat().st_size > 5000
    capsys.readouterr()
    assert bench.main(["--device", "cpu", "--task", "gym/Other-v1"]) == 2
    assert capsys.readouterr().err.startswith("bench_train: no threshold is known for gym/Other-v1; ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "bench_train: torch sees no CUDA device\n"
