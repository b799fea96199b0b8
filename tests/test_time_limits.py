"""A task whose episodes may never end is refused before anybody waits for one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require
from run_folders import SMALL, assert_one_line

require("gym")

import gymnasium
from gymnasium.spaces import Box
from gymnasium.vector import SyncVectorEnv

from brc_fast import BRC, ActorConfig, CriticConfig, envs
from brc_fast.command import main as cli
from brc_fast.envs.base import require_time_limit
from brc_fast.envs.multitask import MultiTaskEnv
from brc_fast.envs.vector import VectorAdapter
from brc_fast.errors import InputError
from brc_fast.runs import evaluate, video

TOLD = "has no time limit, and an evaluation ends with its episodes: train with --env.episode-length"


class Endless(gymnasium.Env[Any, Any]):
    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)
    resets = 0

    def reset(self, **settings: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**settings)
        Endless.resets += 1
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), 1.0, False, False, {}


class EndlessVector(SyncVectorEnv):
    def __init__(self, num_envs: int, max_episode_steps: int | None = None) -> None:
        made = Endless() if max_episode_steps is None else None
        super().__init__(
            [lambda: made or gymnasium.wrappers.TimeLimit(Endless(), max_episode_steps)] * num_envs
        )


def limited() -> Any:
    return gymnasium.wrappers.TimeLimit(Endless(), 7)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    ids = ("Endless-v0", "EndlessVector-v0", "Wrapped-v0", "Own-v0")
    gymnasium.register(ids[0], Endless)
    gymnasium.register(ids[1], vector_entry_point=EndlessVector)
    gymnasium.register(ids[2], limited)  # limits itself by a wrapper of its own
    gymnasium.register(ids[3], Endless, max_episode_steps=5)
    Endless.resets = 0
    yield
    for name in ids:
        del gymnasium.registry[name]


@pytest.mark.parametrize(
    ("tasks", "named"),
    [
        (["gym/Endless-v0"], "gym/Endless-v0"),
        (["gym/EndlessVector-v0"], "gym/EndlessVector-v0"),
        (["gym/Own-v0", "gym/Endless-v0"], "gym/Endless-v0"),
        (["gym/EndlessVector-v0", "gym/Pendulum-v1"], "gym/EndlessVector-v0"),
    ],
)
def test_training_is_refused_before_it_starts(
    tasks: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "run"
    assert_one_line(
        ["train", *tasks, "--run", str(run), *SMALL], f"brc-fast: {named} {TOLD}", capsys, tmp_path
    )
    assert Endless.resets == 0


@pytest.mark.parametrize("task", ["gym/Endless-v0", "gym/EndlessVector-v0"])
def test_the_option_that_the_error_names_lets_it_train_and_be_evaluated(task: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", task, "--run", str(run), *SMALL, "--env.episode-length", "5"]) == 0
    assert cli.main(["evaluate", str(run), "--episodes", "2"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["lengths"][task] == [5, 5]


def test_a_run_without_a_limit_is_neither_evaluated_nor_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", "gym/Own-v0", "--run", str(run), *SMALL]) == 0
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "tasks": ["gym/Endless-v0"]}))
    for words in (["evaluate", str(run)], ["train", "--resume", str(run), "--steps", "60"]):
        assert_one_line(words, f"brc-fast: gym/Endless-v0 {TOLD}", capsys, run)


def without_limit() -> list[Any]:
    def adapted() -> VectorAdapter:
        return VectorAdapter(SyncVectorEnv([Endless] * 2), "mine", max_episode_steps=None)

    own = envs.make("gym/Own-v0", 2)
    return [adapted(), envs.make("gym/Endless-v0", 2), MultiTaskEnv([own, adapted()], ("gym/Own-v0", "mine"))]


@pytest.mark.parametrize("which", range(3))
def test_evaluate_and_film_refuse_it_before_the_first_reset(which: int, tmp_path: Path) -> None:
    env = without_limit()[which]
    agent = BRC(2, 1, num_tasks=len(env.task_names), critic=CriticConfig(width=8), actor=ActorConfig(width=8))
    with pytest.raises(InputError, match=TOLD):
        evaluate.evaluate(agent, env, 0, 2)
    with pytest.raises(InputError, match=TOLD):
        video.film(agent, env, 0, 0, tmp_path / "x.gif", video.Settings())
    assert Endless.resets == 0


def test_a_limit_is_found_wherever_gymnasium_keeps_it() -> None:
    for task, steps in (("gym/Own-v0", 5), ("gym/Wrapped-v0", 7), ("gym/Pendulum-v1", 200)):
        env = envs.make(task, 1)
        require_time_limit(env)
        assert env.max_episode_steps == steps
    env = envs.make("gym/Endless-v0", 1, episode_length=3)
    env.reset_tensors(0)
    ends = [bool(env.step_tensors(torch.zeros(1, 1)).truncated) for _ in range(6)]
    assert ends == [False, False, True] * 2


class BoundlessVector(SyncVectorEnv):
    """Takes a limit and does not keep it."""

    def __init__(self, num_envs: int, **settings: Any) -> None:
        super().__init__([Endless] * num_envs)


def test_an_episode_beyond_the_limit_that_its_task_claims_ends_the_evaluation(tmp_path: Path) -> None:
    def claimed() -> Any:
        return VectorAdapter(BoundlessVector(1), "mine", max_episode_steps=5)

    told = "mine does not keep its time limit: an episode of environment 0 has 6 steps, and max_episode_steps"
    agent = BRC(2, 1, critic=CriticConfig(width=8), actor=ActorConfig(width=8))
    with pytest.raises(InputError, match=f"{told} is 5"):
        evaluate.evaluate(agent, claimed(), 0, 2)
    env = claimed()
    env.venv.envs[0].render_mode = "rgb_array"
    env.venv.envs[0].render = lambda: np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(InputError, match=f"{told} is 5"):
        video.film(agent, env, 0, 0, tmp_path / "x.gif", video.Settings())


def test_of_several_tasks_the_longest_limit_holds() -> None:
    env = MultiTaskEnv(
        [envs.make("gym/Own-v0", 1), envs.make("gym/Wrapped-v0", 1)], ("gym/Own-v0", "gym/Wrapped-v0")
    )
    agent = BRC(2, 1, num_tasks=2, critic=CriticConfig(width=8), actor=ActorConfig(width=8))
    assert evaluate.evaluate(agent, env, 0, 3).lengths.tolist() == [[5] * 3, [7] * 3]


def test_a_limit_that_nobody_would_see_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = envs.make("gym/Own-v0", 1, episode_length=10**9)
    with pytest.raises(InputError, match=r"has episodes of up to 1000000000 steps, and at most 1000000 are"):
        require_time_limit(env)
    require_time_limit(envs.make("gym/Own-v0", 1, episode_length=10**6))
    run = tmp_path / "run"
    assert cli.main(["train", "gym/Own-v0", "--run", str(run), *SMALL]) == 0
    config = json.loads((run / "config.json").read_text())
    for length in (10**6 + 1, 10**9, 10**30):
        changed = {**config, "env": {**config["env"], "episode_length": length}}
        (run / "config.json").write_text(json.dumps(changed))
        for words in (["evaluate", str(run)], ["train", "--resume", str(run), "--steps", "60"]):
            assert_one_line(words, f"episode_length must be at most 1000000, got {length}", capsys, run)
