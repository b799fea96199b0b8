"""One type says what environments give, replay stores and agents learn, images and discrete actions too."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require

from brc_fast import BRC, ReplayBuffer, TrainConfig
from brc_fast.errors import InputError
from brc_fast.spec import Box, Discrete, Field, Spec

require("gym")

import cloudpickle
import gymnasium
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from brc_fast import envs
from brc_fast.envs.base import GymnasiumFace, Privileged, Step, check_finite
from brc_fast.envs.gym import SimulatorError
from brc_fast.envs.multitask import MultiTaskEnv
from brc_fast.envs.vector import VectorAdapter

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
N, LENGTH, SHAPE = 3, 4, (4, 5, 3)
IMAGES = Spec(Field(SHAPE, "uint8"), Discrete(3), ("gym/Painted-v0",))


class Painted(gymnasium.Env[Any, Any]):
    """An image whose first pixel is (episode, step, action + 1); the others are noise.

    Actions are -1, 0 and 1. Every third episode terminates at step 3. `trouble`: "floats", "wide".
    """

    observation_space = spaces.Box(0, 255, SHAPE, np.uint8)
    action_space = spaces.Discrete(3, start=-1)

    def __init__(self, trouble: str = "") -> None:
        self.trouble, self.episode = trouble, 0

    def picture(self, action: int) -> Any:
        picture = self.np_random.integers(0, 256, SHAPE, np.uint8)
        picture[0, 0] = self.episode, self.steps, action + 1
        if self.steps == 2 and self.trouble == "floats":
            return picture / 255.0
        return picture[:, :4] if self.steps == 2 and self.trouble == "wide" else picture

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode = 1 if seed is not None else self.episode + 1
        self.steps = 0
        return self.picture(0), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.steps += 1
        ended = self.episode % 3 == 0 and self.steps == LENGTH - 1
        return self.picture(int(action)), float(action), ended, False, {}


def limited(trouble: str = "") -> gymnasium.Env[Any, Any]:
    return gymnasium.wrappers.TimeLimit(Painted(trouble), LENGTH)


@pytest.fixture
def registered() -> Any:
    names = [f"Painted{trouble}-v0" for trouble in ("", "floats", "wide")]
    for name, trouble in zip(names, ("", "floats", "wide"), strict=True):
        gymnasium.register(name, Painted, max_episode_steps=LENGTH, kwargs={"trouble": trouble})
    yield [f"gym/{name}" for name in names]
    for name in names:
        del gymnasium.registry[name]


def follow(env: Any, mode: AutoresetMode, steps: int) -> int:
    """Check every step against the first pixels; returns the number of episodes that ended in a restart."""
    seen, ends = env.reset_tensors(0), 0
    assert (tuple(seen.shape), seen.dtype) == ((N, *SHAPE), torch.uint8)
    actions = torch.randint(3, (steps, N), generator=torch.Generator().manual_seed(1))
    for number, action in enumerate(actions, start=1):
        step = env.step_tensors(action)
        check_finite(step, env, number)
        assert step.observations.dtype == step.successors.dtype == torch.uint8
        ended = step.terminated | step.truncated
        for slot in range(N):
            episode, count, _ = seen[slot, 0, 0].tolist()
            now = step.observations[slot, 0, 0].tolist()
            if step.dropped[slot]:
                assert now == [episode + 1, 0, 1]
                continue
            assert step.successors[slot, 0, 0].tolist() == [episode, count + 1, action[slot]]
            assert step.rewards[slot] == action[slot] - 1
            if ended[slot] and mode is not AutoresetMode.NEXT_STEP:
                assert now == [episode + 1, 0, 1]
                ends += 1
            else:
                assert torch.equal(step.observations[slot], step.successors[slot])
        seen = step.observations
    return ends


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_images_and_discrete_actions_pass_the_adapter_as_they_are(mode: AutoresetMode) -> None:
    venv = SyncVectorEnv([limited] * N, autoreset_mode=mode)
    env = VectorAdapter(venv, "gym/Painted-v0", max_episode_steps=LENGTH)
    assert env.task_spec == IMAGES
    assert env.single_observation_space == spaces.Box(0, 255, SHAPE, np.uint8)
    assert env.single_action_space == spaces.Discrete(3)
    assert (env.observation_size, env.action_size) == (60, 3)
    assert "num_envs" in repr(env)
    assert (follow(env, mode, 5 * LENGTH) == 0) == (mode is AutoresetMode.NEXT_STEP)


@pytest.mark.parametrize("processes", [False, True])
def test_an_id_with_images_is_made_here_and_in_processes(registered: list[str], processes: bool) -> None:
    env = envs.make(registered[0], N, processes=processes)
    try:
        assert env.task_spec == replace(IMAGES, tasks=(registered[0],))
        assert follow(env, AutoresetMode.SAME_STEP, 5 * LENGTH) > 0
        env.reset(seed=3)
        for _ in range(LENGTH):
            observations, *_, infos = env.step(np.array([0, 1, 2]))
            assert env.observation_space.contains(observations)
        assert infos["final_obs"][1].shape == SHAPE
    finally:
        env.close()


@pytest.mark.parametrize(
    ("trouble", "told"), [(1, r"got float64 \[4, 5, 3\]"), (2, r"uint8 \[4, 5, 3\], got uint8 \[4, 4, 3\]")]
)
def test_an_image_that_is_not_what_its_space_says_is_refused(
    registered: list[str], trouble: int, told: str
) -> None:
    env = envs.make(registered[trouble], N)
    env.reset_tensors(0)
    env.step_tensors(torch.zeros(N, dtype=torch.int64))
    with pytest.raises(SimulatorError, match=told):
        env.step_tensors(torch.zeros(N, dtype=torch.int64))


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((N, *SHAPE)), "observations of mine/A must be uint8, got float64 in the reset"),
        (
            np.zeros((N, 4, 4, 3), np.uint8),
            r"shape \[3, 4, 5, 3\], got \[3, 4, 4, 3\] in the reset",
        ),
    ],
)
def test_a_vector_environment_must_give_the_images_of_its_space(image: Any, told: str) -> None:
    class Foreign(VectorEnv[Any, Any, Any]):
        num_envs, metadata = N, {"autoreset_mode": AutoresetMode.SAME_STEP}
        single_observation_space, single_action_space = Painted.observation_space, Painted.action_space

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            return image, {}

    with pytest.raises(InputError, match=told):
        VectorAdapter(Foreign(), "mine/A", max_episode_steps=LENGTH).reset_tensors(0)


@pytest.mark.parametrize(
    ("actions", "told"),
    [
        (torch.tensor([0, 1, 3]), r"actions must lie in \[0, n\) = \[0, 3\), got 3"),
        (torch.tensor([0, -1, 2]), r"actions must lie in \[0, n\) = \[0, 3\), got -1"),
        (torch.zeros(N), r"discrete actions must be int64, got torch.float32; convert them with .long\(\)"),
        (torch.zeros(N, 1, dtype=torch.int64), r"actions must have shape \[N\] = \[3\], got \[3, 1\]"),
    ],
)
def test_discrete_actions_that_no_task_has_are_refused_before_the_step(
    actions: torch.Tensor, told: str
) -> None:
    env = VectorAdapter(SyncVectorEnv([limited] * N), "gym/Painted-v0", max_episode_steps=LENGTH)
    env.reset_tensors(0)
    with pytest.raises(InputError, match=told):
        env.step_tensors(actions)
    step = env.step_tensors(torch.zeros(N, dtype=torch.int32))
    assert step.successors[:, 0, 0, 1].tolist() == [1, 1, 1]


def test_a_replay_made_from_a_spec_stores_what_its_environment_gives(registered: list[str]) -> None:
    env = envs.make(registered[0], N)
    replay = ReplayBuffer(100, *env.task_spec.fields, task_ids=env.task_ids)
    seen, pairs = env.reset_tensors(0), set()
    for number in range(10):
        actions = torch.full((N,), number % 3)
        step = env.step_tensors(actions)
        replay.add(seen, actions, step.rewards, step.terminated, step.truncated, step.successors)
        pairs |= {
            (a.numpy().tobytes(), b.numpy().tobytes()) for a, b in zip(seen, step.successors, strict=True)
        }
        seen = step.observations
    batch = replay.sample(30)
    assert (batch.observations.dtype, batch.actions.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(batch.rewards, batch.actions - 1.0)
    drawn = zip(*(x.flatten(0, -4) for x in (batch.observations, batch.next_observations)), strict=True)
    assert {(a.numpy().tobytes(), b.numpy().tobytes()) for a, b in drawn} <= pairs


# tasks side by side


def test_tasks_with_images_stand_side_by_side(registered: list[str]) -> None:
    one, two = (envs.make(name, N) for name in ("gym/Painted-v0", registered[0]))
    two.task_spec, two.task_names = replace(IMAGES, tasks=("gym/Second-v0",)), ("gym/Second-v0",)
    both = MultiTaskEnv([one, two], ("gym/Painted-v0", "gym/Second-v0"))
    assert both.task_spec == replace(IMAGES, tasks=("gym/Painted-v0", "gym/Second-v0"))
    seen = both.reset_tensors(0)
    assert (tuple(seen.shape), seen.dtype) == ((2 * N, *SHAPE), torch.uint8)
    step = both.step_tensors(torch.tensor([0, 1, 2, 2, 1, 0]))
    assert step.successors[:, 0, 0, 2].tolist() == [0, 1, 2, 2, 1, 0]


def test_tasks_of_different_kinds_are_not_learned_together(registered: list[str]) -> None:
    told = "gym/Painted-v0 and gym/Pendulum-v1 cannot be learned together: one has observations uint8"
    with pytest.raises(InputError, match=told):
        envs.make([registered[0], "gym/Pendulum-v1"], 1)


def test_joined_tasks_have_the_size_of_the_widest_vector_and_action() -> None:
    narrow, wide = Spec.vectors(3, 6, ["a"]), Spec.vectors(5, 1, ["b"])
    assert Spec.joined([narrow, wide], ["a", "b"]) == Spec.vectors(5, 6, ["a", "b"])
    critics = zip((narrow, wide), (Field((9,)), Field((7,))), strict=True)
    privileged = [replace(spec, privileged=seen) for spec, seen in critics]
    joined = Spec.joined(privileged, ["a", "b"])
    assert joined == replace(Spec.vectors(5, 6, ["a", "b"]), privileged=Field((9,)))
    assert Spec.joined([narrow, privileged[1]], ["a", "b"]).privileged == Field((7,))  # zeros for the narrow
    for other in (
        replace(wide, action=Discrete(6)),
        replace(wide, action=Box(6, 0.0, 1.0)),
        replace(wide, observation=Field((5,), "uint8")),
        replace(wide, privileged=Field((8, 8), "uint8")),
    ):
        with pytest.raises(InputError, match=r"a and b cannot be learned together: one has .*, the other"):
            Spec.joined([narrow, other], ["a", "b"])
    with pytest.raises(InputError, match=r"one of 3 discrete choices, the other .* one of 4 discrete"):
        Spec.joined([replace(narrow, action=Discrete(3)), replace(wide, action=Discrete(4))], ["a", "b"])


# observations for the critic alone


class Hidden(GymnasiumFace, VectorEnv[Any, Any, Any]):
    """The policy sees how often it was pushed, the critic also the sum of the pushes."""

    max_episode_steps = 10

    def __init__(self, task: str, size: int) -> None:
        self.size = size
        spec = replace(Spec.vectors(1, 1, [task]), privileged=Field((size,)))
        self.declare(spec, np.zeros(N, np.int64), seed=0)

    def observed(self) -> torch.Tensor:
        state = torch.cat([self.count, self.total, torch.zeros(N, self.size - 2)], 1)
        successors = state if self.privileged is None else state.clone()
        self.privileged = Privileged(state, successors)
        return self.count.clone()

    def reset_tensors(self, seed: int | None) -> torch.Tensor:
        self.count, self.total = torch.zeros(2, N, 1)
        return self.observed()

    def launch(self, actions: torch.Tensor) -> torch.Tensor:
        return self.as_actions(actions)

    def collect(self, launched: torch.Tensor) -> Step:
        self.count, self.total = self.count + 1, self.total + launched
        seen, no = self.observed(), torch.zeros(N, dtype=torch.bool)
        return Step(seen, seen.clone(), self.total[:, 0], no, no, no)


def test_what_the_critic_alone_sees_stands_beside_the_step() -> None:
    env = MultiTaskEnv([Hidden("toy/a", 2), Hidden("toy/b", 4)], ("toy/a", "toy/b"))
    assert env.task_spec.observation == Field((1,))
    assert env.task_spec.privileged == Field((4,))
    env.reset_tensors(0)
    assert torch.equal(env.privileged.observations, torch.zeros(2 * N, 4))
    step = env.step_tensors(torch.full((2 * N, 1), 0.5))
    assert torch.equal(step.observations, torch.ones(2 * N, 1))
    assert torch.equal(env.privileged.successors, torch.tensor([1.0, 0.5, 0.0, 0.0]).expand(2 * N, 4))


# refusals


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"action": Discrete(6)},
            "BRC takes continuous actions, and an action of mine/A is one of 6",
        ),
        (
            {"action": Box(2, 0.0, 2.0)},
            r"BRC takes actions in \[-1, 1\], .* 2 continuous .* in \[0, 2\]",
        ),
        (
            {"observation": Field((8, 8, 3), "uint8")},
            r"float32 vectors, and mine/A has uint8 \[8, 8, 3\]",
        ),
        ({"observation": Field((5,), "float16")}, r"float32 vectors, and mine/A has float16 \[5\]"),
        ({"observation": Field((5,), stack=4)}, r"mine/A has float32 \[5\] in stacks of 4"),
        ({"privileged": Field((9,), "float16")}, r"privileged .* mine/A has float16 \[9\]: leave them out"),
    ],
)
def test_brc_refuses_by_name_what_it_cannot_learn(changes: dict[str, Any], told: str) -> None:
    spec = replace(Spec.vectors(5, 2, ["mine/A"]), **changes)
    with pytest.raises(InputError, match=told):
        BRC.from_config(TrainConfig(tasks=("mine/A",)), spec, "cpu")


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("gym/CartPole-v1", "BRC takes continuous actions, and an action of gym/CartPole-v1 is one of 2"),
        ("gym/Painted-v0", "BRC takes continuous actions, and an action of gym/Painted-v0 is one of 3"),
    ],
)
def test_the_command_says_in_one_line_what_it_cannot_train(
    registered: list[str], task: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("train")
    from brc_fast.command import main as cli

    assert cli.main(["train", task, "--run", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    assert told in printed[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: Box(0), ValueError, "size must be at least 1, got 0"),
        (lambda: Box(2.5), TypeError, "size must be an integer, got 2.5"),
        (lambda: Box(2, 1.0, 1.0), ValueError, "low must be below high, got 1.0 and 1.0"),
        (lambda: Discrete(0), ValueError, "n must be at least 1, got 0"),
        (lambda: Discrete("6"), TypeError, "n must be an integer, got '6'"),
    ],
)
def test_sizes_that_no_action_has_are_refused(make: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()
