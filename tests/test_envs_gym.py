"""Gymnasium and dm_control behind the adapter: a wrong successor shows in the tags of a counter."""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from extras import needs, require
from refusals import says
from stepping import actions_for, equal, rollout, started

require("gymnasium")

import cloudpickle
import gymnasium
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from brc_fast.config import EnvConfig, TrainConfig, from_dict
from brc_fast.envs import make
from brc_fast.envs.base import check_finite
from brc_fast.envs.gym import make_gym
from brc_fast.envs.vector import VectorAdapter
from brc_fast.errors import InputError, MissingExtraError, SimulatorError, WorkerError

needs_dmc, needs_gym = needs("dmc"), needs("gym")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
N, LENGTH = 3, 4
MODES = list(AutoresetMode)


class Counter(gymnasium.Env):
    """Observes [start, episode, step]; the reward is the number of the step.

    Every third episode terminates at step 3, the others last until the time limit. An action of 1 brings
    what `trouble` names: "nan", "inf reward", "raise", "raise twice" (also when closed), "unpicklable",
    "exit", "short", "long", "text", "no reward" or "success". With "short start" and "nan start" it is the
    start that is not as it should be.
    """

    def __init__(self, trouble="", dtype=np.float32, space="box", low=-2.0, high=6.0):
        self.trouble = trouble
        self.kind = space
        plain = Box(-np.inf, np.inf, (3,), dtype)
        self.observation_space = {
            "box": plain,
            "grid": Box(-np.inf, np.inf, (3, 1), dtype),
            "nested": Dict(
                {"z": Box(-np.inf, np.inf, (), dtype), "a": Tuple([Box(-np.inf, np.inf, (2, 1), dtype)])}
            ),
            "discrete": Dict({"a": plain, "b": Discrete(3)}),
            "image": Dict({"a": plain, "b": Box(0, 255, (8, 8, 3), np.uint8)}),
            "graph": Graph(plain, Discrete(2)),
            "empty": Dict({}),
            "widest": Box(-np.finfo(np.float64).max, np.finfo(np.float64).max, (3,), np.float64),
        }.get(space, plain)
        self.action_space = Box(low, high, (1,), np.float32)
        if space == "several choices":
            self.action_space = MultiDiscrete([2, 3])
        self.episode = 0

    def loaded(self):
        return {"torch", "jax", "brc_fast"} & set(sys.modules), os.environ["OMP_NUM_THREADS"]

    def observe(self):
        tags = np.array([self.start, self.episode, self.steps], self.np_dtype)
        if self.kind == "nested":
            return {"z": tags[0], "a": (tags[1:].reshape(2, 1),)}
        return tags.reshape(self.observation_space.shape)

    @property
    def np_dtype(self):
        return np.float32 if self.kind == "nested" else self.observation_space.dtype

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start = np.float32(self.np_random.random())
        self.episode = 1 if seed is not None else self.episode + 1
        self.steps = 0
        if self.trouble == "bare start":
            return self.observe()
        starts = {"short start": np.zeros(1), "nan start": np.full(3, np.nan)}
        return starts.get(self.trouble, self.observe()), {"success": True}  # of no step, must not be read

    def step(self, action):
        self.steps += 1
        self.action = action
        tripped = action[0] == self.action_space.high[0]
        observation, reward, info = self.observe(), float(self.steps), {}
        if tripped and self.trouble == "nan":
            observation = np.full_like(observation, np.nan)
        if tripped and self.trouble == "inf reward":
            reward = np.inf
        if tripped and self.trouble in ("raise", "raise twice"):
            raise OSError("the simulator is unwell")
        if tripped and self.trouble == "unpicklable":
            raise type("Local", (Exception,), {})(lambda: None)
        if tripped and self.trouble in ("short", "long", "text"):
            observation = {"short": np.zeros(1), "long": np.zeros(4), "text": "three"}[self.trouble]
        if tripped and self.trouble == "no reward":
            reward = None
        if tripped and self.trouble == "two rewards":
            reward = np.ones(2)
        if tripped and self.trouble == "four values":
            return observation, reward, False, info
        if self.trouble == "array reward":
            reward = np.array([reward])
        if tripped and self.trouble == "exit":
            os._exit(7)
        if self.trouble in ("success", "is_success"):
            info[self.trouble] = bool(tripped)
        if self.trouble == "share of success":
            info["is_success"] = [np.nan, np.float32(tripped)][self.steps % 2]
        ended = self.episode % 3 == 0 and self.steps == LENGTH - 1
        return observation, reward, ended, False, info

    def close(self):
        if self.trouble == "raise twice":
            raise OSError("nor can it be closed")


class Counted:
    """Makes a Counter with a time limit."""

    def __init__(self, limit=LENGTH, **settings):
        self.limit, self.settings = limit, settings

    def __call__(self):
        return gymnasium.wrappers.TimeLimit(Counter(**self.settings), self.limit)


def registered(**settings):
    """A task id whose environments are Counters."""
    name = f"Counter{abs(hash(frozenset(settings.items())))}-v0"
    if name not in gymnasium.registry:
        gymnasium.register(name, Counter, max_episode_steps=LENGTH, kwargs=settings)
    return f"gym/{name}"


def adapted(mode=AutoresetMode.SAME_STEP, processes=False, seed=0, count=N, **settings):
    factories = [Counted(**settings)] * count
    if processes:
        venv = AsyncVectorEnv(factories, autoreset_mode=mode, context="forkserver")
    else:
        venv = SyncVectorEnv(factories, autoreset_mode=mode)
    return VectorAdapter(venv, "gym/Counter-v0", seed, max_episode_steps=LENGTH)


def still(env):
    return torch.zeros(env.num_envs, env.action_size)


def tripping(env, *slots):
    actions = still(env)
    actions[list(slots)] = 1.0
    return actions


def run(env, steps):
    return [env.step_tensors(still(env)) for _ in range(steps)]


def same(first, second):
    return all(map(equal, first, second))


def follow(env, steps):
    """Check every step against the tags; returns the number of episodes that ended in a restart."""
    acted_on = env.reset_tensors(0)
    assert (acted_on[:, 1:] == torch.tensor([1.0, 0.0])).all()
    ends = 0
    for _ in range(steps):
        step = env.step_tensors(still(env))
        ended = step.terminated | step.truncated
        for slot in range(env.num_envs):
            before, to, now = acted_on[slot], step.successors[slot], step.observations[slot]
            if step.dropped[slot]:
                assert not ended[slot]
                assert step.rewards[slot] == 0
                assert now.tolist()[1:] == [before[1] + 1, 0]
                continue
            assert to.tolist() == [before[0], before[1], before[2] + 1]
            assert step.rewards[slot] == to[2]
            assert bool(step.terminated[slot]) == (to[1] % 3 == 0 and to[2] == LENGTH - 1)
            assert bool(step.truncated[slot]) == (to[2] == LENGTH)
            if not ended[slot] or env._mode is AutoresetMode.NEXT_STEP:
                assert torch.equal(now, to)
            else:
                assert now.tolist()[1:] == [to[1] + 1, 0]
                assert now[0] != to[0]
                ends += 1
        acted_on = step.observations
    return ends


@pytest.mark.parametrize("space", ["box", "grid", "nested"])
@pytest.mark.parametrize("mode", MODES)
def test_successors_and_ends_are_true_in_every_restart_mode(mode, space):
    env = adapted(mode, space=space)
    if space == "nested":  # Gymnasium sorts the names of a Dict: a before z
        turned = env._read
        env._read = lambda raw, count: np.roll(turned(raw, count), 1, axis=1)
    ends = follow(env, 5 * LENGTH)
    assert (ends == 0) == (mode is AutoresetMode.NEXT_STEP)


@pytest.mark.parametrize("mode", MODES)
def test_worker_processes_return_the_steps_of_one_process(mode):
    here, there = adapted(mode), adapted(mode, processes=True)
    assert torch.equal(here.reset_tensors(5), there.reset_tensors(5))
    assert same(run(here, 3 * LENGTH), run(there, 3 * LENGTH))
    there.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_reset_step_is_dropped_in_next_step_mode_only(mode):
    env = adapted(mode)
    env.reset_tensors(0)
    dropped = [bool(step.dropped.any()) for step in run(env, LENGTH + 2)]
    assert dropped == [False] * LENGTH + [mode is AutoresetMode.NEXT_STEP, False]
    assert env.nan_count.tolist() == [0]


@pytest.mark.parametrize("mode", MODES)
def test_what_a_step_returns_never_changes_later(mode):
    env = adapted(mode)
    env.reset_tensors(0)
    kept = run(env, 2 * LENGTH)
    copies = [[x.clone() for x in step] for step in kept]
    for step in kept[:1]:
        step.observations.fill_(7.0)  # nor does the adapter read what the caller owns
    run(env, LENGTH)
    assert same(kept[1:], copies[1:])
    assert not torch.equal(kept[-1].observations, run(env, 1)[0].observations)


# Infos


@pytest.mark.parametrize("mode", MODES)
def test_success_is_that_of_the_step_and_not_of_the_reset_beside_it(mode):
    env = adapted(mode, trouble="success")
    env.reset_tensors(0)
    assert env.successes is None
    for number in range(3 * LENGTH):
        step = env.step_tensors(tripping(env, 1) if number % 2 else still(env))
        told = torch.tensor([False, bool(number % 2), False]) & ~step.dropped
        assert torch.equal(env.successes, told), number


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_is_success_counts_as_success(mode, processes):
    env = adapted(mode, processes=processes, trouble="is_success")
    ours = make_gym(registered(trouble="is_success"), N, processes=processes)
    with contextlib.closing(env), contextlib.closing(ours):
        for each in (env, ours):
            each.reset_tensors(0)
            for number in range(LENGTH):  # the last one ends the episode
                each.step_tensors(tripping(each, 1) if number % 2 else still(each))
                assert each.successes.tolist() == [False, bool(number % 2), False]


@pytest.mark.parametrize("mode", MODES)
def test_a_success_told_as_a_number_is_one_above_zero(mode):
    for env in (
        adapted(mode, trouble="share of success"),
        make_gym(registered(trouble="share of success"), N),
    ):
        env.reset_tensors(0)
        assert [env.step_tensors(tripping(env, 1)) and env.successes.tolist() for _ in range(2)] == [
            [False, True, False],
            [False] * N,  # NaN
        ]


@pytest.mark.parametrize("mode", MODES)
def test_infos_of_a_step_hold_its_success_and_not_that_of_another(mode):
    env = adapted(mode, trouble="success")
    env.reset(seed=0)
    for number in range(1, 3 * LENGTH):
        *_, terminated, truncated, infos = env.step(tripping(env, 1).numpy())
        ended = terminated | truncated
        restarted = ended & (mode is not AutoresetMode.NEXT_STEP)
        dropped = infos.get("_dropped", np.zeros(N, bool))
        assert infos.get("_success", np.zeros(N, bool)).tolist() == (~restarted & ~dropped).tolist()
        final = infos.get("final_info", {})
        assert final.get("_success", np.zeros(N, bool)).tolist() == restarted.tolist()
        told = infos.get("success", np.zeros(N, bool)) | final.get("success", np.zeros(N, bool))
        assert told.tolist() == [False, not dropped[1], False], number


@pytest.mark.parametrize("mode", MODES)
def test_gymnasiums_statistics_count_every_step_of_an_episode_and_no_other(mode):
    env = RecordEpisodeStatistics(adapted(mode))
    env.reset(seed=0)
    counted = []
    for _ in range(5 * LENGTH):
        observations, *_, infos = env.step(np.zeros((N, 1), np.float32))
        if "episode" in infos:
            counted.append((float(infos["episode"]["r"][0]), int(infos["episode"]["l"][0])))
        if mode is AutoresetMode.NEXT_STEP and "dropped" in infos:
            assert infos["dropped"].all()
            assert (observations[:, 2] == 0).all()
    whole, short = (10.0, LENGTH), (6.0, LENGTH - 1)  # rewards are 1, 2, 3 and 4
    assert counted[:3] == [whole, whole, short]
    assert set(counted) == {whole, short}


@pytest.mark.parametrize("mode", MODES)
def test_a_task_whose_steps_report_no_success_has_none(mode):
    env = adapted(mode)
    env.reset_tensors(0)
    run(env, LENGTH + 1)
    assert env.successes is None


@pytest.mark.parametrize("trouble", ["nan", "inf reward"])
def test_a_slot_that_is_not_finite_is_lost_and_starts_anew(trouble):
    foreign = adapted(AutoresetMode.DISABLED, trouble=trouble)
    for env in (foreign, make_gym(registered(trouble=trouble), N, processes=False)):
        env.reset_tensors(0)
        observed = run(env, 1)[0].observations
        before = observed.clone()
        observed.fill_(9.0)  # it belongs to the caller
        step = env.step_tensors(tripping(env, 1))
        assert step.dropped.tolist() == step.truncated.tolist() == [False, True, False]
        assert not step.terminated.any()
        assert torch.equal(step.successors[1], before[1])
        assert step.rewards.tolist() == [2.0, 0.0, 2.0]
        assert step.observations[:, 1:].tolist() == [[1, 2], [2, 0], [1, 2]]
        assert env.nan_count.tolist() == [1]
        assert not run(env, 1)[0].dropped.any()
        env.reset_tensors(None)
        assert env.nan_count.tolist() == [0]


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_where_a_foreign_slot_cannot_be_reset_the_check_reports_it(mode):
    env = adapted(mode, trouble="nan")
    env.reset_tensors(0)
    told = "observations of gym/Counter-v0 are not finite in environment 2 at step 9"
    with pytest.raises(InputError, match=told):
        check_finite(env.step_tensors(tripping(env, 2)), env, 9)


# Actions and spaces


@pytest.mark.parametrize("bounds", [(-2.0, 6.0), (-1.9, -0.8), (-1.0, 1.0), (-0.4, 0.4)])
def test_actions_reach_exactly_the_bounds(bounds):
    env = adapted(low=bounds[0], high=bounds[1])
    env.reset_tensors(0)
    env.step_tensors(torch.tensor([[-1.0], [0.0], [1.0]]))
    low, middle, high = (slot.unwrapped.action for slot in env.venv.envs)
    space = env.venv.single_action_space
    assert (low.dtype, low, high) == (np.float32, space.low, space.high)
    assert middle == pytest.approx((bounds[0] + bounds[1]) / 2, abs=1e-6)


def test_actions_beyond_the_bounds_are_held_at_them():
    env = adapted()
    env.reset(seed=0)
    for actions in ([[-9.0], [0.5], [9.0]], torch.tensor([[-2], [0.5], [2]], dtype=torch.float64)):
        env.step(actions)
        assert [slot.unwrapped.action[0] for slot in env.venv.envs] == [-2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (np.array([[0], [np.nan], [0]]), "actions must be finite, got [nan] in environment 1"),
        ([[0.0], [0.0], [-np.inf]], "actions must be finite, got [-inf] in environment 2"),
        ([[0.0], [0.0, 1.0], [0.0]], "actions must be one array"),
        ([["left"], ["right"], ["left"]], "actions must be numbers, got <U5"),
        (None, "actions must be numbers, got object"),
        ([0.0, 0.0, 0.0], f"actions must have shape [N, A] = [{N}, 1], got [{N}]"),
        (1.0, f"actions must have shape [N, A] = [{N}, 1], got []"),
    ],
)
def test_actions_that_cannot_be_taken_are_told_before_the_environment_sees_them(actions, words):
    env = adapted()
    env.reset(seed=0)
    with pytest.raises(InputError, match=says(words)):
        env.step(actions)
    assert not hasattr(env.venv.envs[0].unwrapped, "action")


def test_whole_numbers_and_lists_are_actions_too():
    env = adapted()
    env.reset(seed=0)
    for actions in (np.array([[-1], [0], [1]]), [[-1], [0], [1]], [[False], [False], [True]]):
        env.step(actions)
        assert env.venv.envs[2].unwrapped.action[0] == 6.0


def test_spaces_are_those_of_the_contract():
    env = adapted(space="nested", dtype=np.float64)
    assert (env.observation_size, env.action_size, env.max_episode_steps) == (3, 1, LENGTH)
    assert env.observation_space == Box(-np.inf, np.inf, (N, 3), np.float32)
    assert env.action_space == Box(-1, 1, (N, 1), np.float32)
    assert not env.continues.any()
    assert env.reset_tensors(0).dtype == torch.float32


BOUNDS, VECTORS = "; only continuous actions with finite bounds", "; only vectors, or one image of uint8"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("single_action_space", MultiBinary(2), f"action space MultiBinary(2){BOUNDS}"),
        ("single_action_space", Box(-np.inf, np.inf, (1,), np.float32), f"space Box(-inf, inf, ... {BOUNDS}"),
        (
            "single_action_space",
            Box(np.array([-1, -1], np.float32), np.array([1, np.inf], np.float32)),
            f"{BOUNDS} can be used, and action 1 lies in [-1, inf]",
        ),
        (
            "single_action_space",
            Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (2, 2), np.float32),
            f"{BOUNDS} can be used, and action 0 lies in [-3.40282e+38, 3.40282e+38], where 1e+18",
        ),
        (
            "single_action_space",
            Box(0, np.finfo(np.float64).max, (1,), np.float64),
            f"{BOUNDS} can be used, and action 0 lies in [0, 1.79769e+308], where 1e+18",
        ),
        (
            "single_action_space",
            Box(np.array([-1, 3], np.float32), np.array([1, 3], np.float32)),
            "in which action 1 is always 3; leave it out",
        ),
        ("single_action_space", Box(-5, 5, (2,), np.int64), f"space Box(-5, 5, (2,), int64){BOUNDS}"),
        ("single_observation_space", Discrete(5), "Discrete(5) among its observations; only Box"),
        ("single_observation_space", Box(0, 1, (8, 8, 1), np.float32), f"(8, 8, 1), ... an image{VECTORS}"),
        (
            "single_observation_space",
            Box(0, 1, (0,), np.float32),
            "cannot be learned: it has no observations",
        ),
        ("single_action_space", Box(0, 1, (0,), np.float32), "cannot be learned: it has no actions"),
        ("metadata", {}, "must say how it restarts: set metadata['autoreset_mode']"),
    ],
)
def test_what_cannot_be_used_is_refused(name, value, words):
    venv = SyncVectorEnv([Counted()])
    setattr(venv, name, value)
    with pytest.raises(InputError, match=says(f"gym/Counter-v0 ... {words}")):
        VectorAdapter(venv, "gym/Counter-v0", max_episode_steps=LENGTH)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("several choices", "has the action space MultiDiscrete"),
        ("discrete", "has Discrete(3) among its observations"),
        ("image", "has Box(0, 255, (8, 8, 3), uint8) among ... an image"),
        ("graph", "has Graph( ... among its observations; only Box"),
    ],
)
def test_spaces_are_refused_before_any_worker_starts(space, words, monkeypatch):
    monkeypatch.setattr("brc_fast.envs.gym.Workers", None)
    with pytest.raises(InputError, match=says(words)):
        make_gym(registered(space=space), N, processes=True)


def test_a_space_as_wide_as_its_type_and_one_of_nothing():
    assert (make_gym(registered(space="widest"), 1).reset_tensors(0)[:, 1:] == torch.tensor([1.0, 0.0])).all()
    with pytest.raises(InputError, match="cannot be learned: it has no observations"):
        make_gym(registered(space="empty"), 1)


class Spoilt(SyncVectorEnv):
    """Its second step returns an entry that is not what the contract asks for."""

    def __init__(self, entry, value):
        super().__init__([Counted()] * N, autoreset_mode=AutoresetMode.SAME_STEP)
        self.entry, self.value, self.steps = entry, value, 0

    def step(self, actions):
        self.steps += 1
        result = list(super().step(actions))
        if self.steps == 2:
            result[self.entry] = self.value
        return tuple(result)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (0, np.zeros((N, 4)), "observations of gym/Counter-v0 ... [3, 3], got [3, 4]"),
        (1, np.zeros((N, 1)), "rewards of gym/Counter-v0 ... [3], got [3, 1]"),
        (2, False, "terminated of gym/Counter-v0 ... [3], got []"),
        (3, np.ones(N, bool), "gym/Counter-v0 restarts in the same step ... must hold final_obs"),
    ],
)
def test_a_vector_environment_that_breaks_its_contract_is_told_with_task_and_step(entry, value, message):
    env = VectorAdapter(Spoilt(entry, value), "gym/Counter-v0", max_episode_steps=LENGTH)
    env.reset_tensors(0)
    run(env, 1)
    with pytest.raises(InputError, match=says(f"{message} ... at step 2 since the reset")):
        run(env, 1)


def test_stepping_and_saving_need_a_reset_first():
    env = adapted()
    with pytest.raises(InputError, match="step needs a reset first"):
        env.step_tensors(still(env))
    with pytest.raises(InputError, match="state_dict needs a reset first"):
        env.state_dict()


# Seeds and saved states


def test_a_seed_fixes_the_run_and_no_two_slots_or_resets_start_alike():
    first, second = adapted(), adapted()
    start = first.reset_tensors(3)
    second.reset_tensors(9)
    run(second, 5)
    assert torch.equal(start, second.reset_tensors(3))  # also in the middle of a run
    assert same(run(first, 2 * LENGTH), run(second, 2 * LENGTH))
    more = [start, first.reset_tensors(None), first.reset_tensors(None), first.reset_tensors(4)]
    assert len({float(x) for starts in more for x in starts[:, 0]}) == 4 * N
    assert torch.equal(more[1], second.reset_tensors(None))


def test_a_list_seeds_each_slot_as_gymnasium_does():
    def alone(seed):
        return float(Counted()().reset(seed=seed)[0][0])

    for env in (adapted(), make_gym(registered(), N)):
        observations, _ = env.reset(seed=[5, 6, 5])
        assert observations[:, 0].tolist() == [alone(5), alone(6), alone(5)]
        following = env.reset_tensors(None)
        assert torch.equal(
            torch.from_numpy(env.reset(seed=[5, None, 7])[0])[:, 0][::2], torch.tensor([alone(5), alone(7)])
        )
        env.reset_tensors([5, 6, 5])
        assert torch.equal(env.reset_tensors(None), following)
    both = make([registered(), registered(dtype=np.float64)], 2)
    observations, _ = both.reset(seed=[1, 2, 3, 2])
    assert observations[:, 0].tolist() == [alone(1), alone(2), alone(3), alone(2)]


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        ([1, 2], "seed must be one integer, or 3 for 3 environments, got 2"),
        ([1, 2, -1], "seed must be an integer in [0, 2**64), got -1"),
        ([1, 2, 0.5], "seed must be an integer in [0, 2**64), got 0.5"),
        (-1, "seed must be an integer in [0, 2**64), got -1"),
        ("abc", "seed must be an integer, or one for each environment, got 'abc'"),
        (1.5, "seed must be an integer, or one for each environment, got 1.5"),
    ],
)
def test_a_seed_that_cannot_be_used_is_refused(seed, words):
    with pytest.raises(InputError, match=says(words)):
        adapted().reset(seed=seed)


def test_tasks_with_the_same_seed_start_differently():
    one, other = (
        VectorAdapter(SyncVectorEnv([Counted()]), task, max_episode_steps=4) for task in ("a/b", "a/c")
    )
    assert one.reset_tensors(0)[0, 0] != other.reset_tensors(0)[0, 0]


def test_a_loaded_run_starts_new_episodes_that_are_those_of_the_next_reset():
    env, fresh = adapted(), adapted(seed=8)
    start = env.reset_tensors(3)
    run(env, 2)
    state = env.state_dict()
    resumed = fresh.load_state_dict(state)
    assert not torch.equal(resumed, start)
    assert torch.equal(resumed, env.reset_tensors(None))
    assert same(run(env, LENGTH), run(fresh, LENGTH))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.array([5, 1, 0])}, "is that of 5 environments and does not fit 3"),
        ({"key": np.zeros(2, np.uint32)}, "key: uint32[4], counts: int64[3]; got key: uint32[2], "),
        ({"more": np.zeros(1)}, "more: float64[1]"),
        ({"counts": np.array([3, -1, 0])}, "must have counts in [0, 2**62), got [ 3 -1  0]"),
        ({"counts": np.array([3, 2**63 - 1, 0])}, "must have counts in [0, 2**62)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    env = adapted()
    env.reset_tensors(0)
    with pytest.raises(InputError, match=says(message)):
        env.load_state_dict({**env.state_dict(), **change})


# Names


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gym/Pendulom-v1", "gym/Pendulom-v1 cannot be made: ... Did you mean: "),
        ("gym/Pendulom-v1", "; nearest: gym/Pendulum-v1, "),
        ("gym/Pendulum", "; nearest: gym/Pendulum-v1, "),
        ("gym/gymnasium.envs:Pendulom-v1", "; nearest: gym/gymnasium.envs:Pendulum-v1, "),
        (
            "gym/no_such_module:Foo-v0",
            "not installed: ... 'no_such_module' ... PYTHONPATH=FOLDER",
        ),
        ("gym/no.such.module:Foo-v0", "not installed: No module named 'no' ... PYTHONPATH=FOLDER"),
    ],
)
def test_a_name_that_cannot_be_used_is_an_input_error(task, message):
    with pytest.raises(InputError, match=says(message)):
        make_gym(task, 1)


@pytest.mark.skipif(
    importlib.util.find_spec("humanoid_bench") is not None, reason="humanoid_bench is installed"
)
def test_a_module_that_lacks_another_is_not_looked_for_in_a_folder(tmp_path, monkeypatch):
    (tmp_path / "lacking.py").write_text("import no_such_simulator")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"No module named 'no_such_simulator'$"):
        make_gym("gym/lacking:Foo-v0", 1)


@needs_dmc
def test_a_misspelt_dmc_task_is_told_the_nearest():
    with pytest.raises(InputError, match="; nearest: dmc/dog-run, "):
        make("dmc/dog-rum", 1)


def test_humanoidbench_says_where_it_comes_from():
    with pytest.raises(InputError, match=r"needs humanoid_bench, .*clone https"):
        make_gym("humanoidbench/h1-walk-v0", 1)


def test_dmc_without_dm_control_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"dmc/... environments needs the \[dmc\] extra"):
        make_gym("dmc/dog-run", 1)


def test_episode_length_replaces_the_time_limit():
    env = make_gym(registered(), N, episode_length=2)
    env.reset_tensors(0)
    assert env.max_episode_steps == 2
    assert [bool(step.truncated.all()) for step in run(env, 4)] == [False, True, False, True]


def test_an_id_with_only_a_vector_implementation_runs_as_that():
    class Only(gymnasium.vector.VectorEnv):
        def __init__(self, num_envs, max_episode_steps):
            self.inner = SyncVectorEnv([Counted(max_episode_steps)] * num_envs)
            self.num_envs = num_envs
            self.metadata = self.inner.metadata
            self.single_observation_space = self.inner.single_observation_space
            self.single_action_space = self.inner.single_action_space
            self.step = self.inner.step

        def reset(self, *, seed=None, options=None):
            assert seed is None or isinstance(seed, int)
            return self.inner.reset(seed=seed, options=options)

    gymnasium.register("OnlyVector-v0", vector_entry_point=Only, max_episode_steps=LENGTH)
    try:
        env = make_gym("gym/OnlyVector-v0", N)
        assert (env.max_episode_steps, env._mode) == (LENGTH, AutoresetMode.NEXT_STEP)
        follow(env, 3 * LENGTH)
    finally:
        del gymnasium.registry["OnlyVector-v0"]


# Arguments of the constructor


@pytest.mark.parametrize("processes", [False, True])
def test_keyword_arguments_reach_the_environment(processes):
    for kwargs in ({"low": -7.0, "high": 7.0}, '{"low": -7.0, "high": 7.0}'):
        with contextlib.closing(make(registered(), 1, kwargs=kwargs, processes=processes)) as env:
            env.reset(seed=0)
            assert env.venv.single_action_space == Box(-7.0, 7.0, (1,), np.float32)


def test_keyword_arguments_go_over_those_of_the_registration_and_to_gym_tasks_alone():
    env = make([registered(low=-3.0), registered(low=-4.0)], 1, kwargs={"high": 9.0})
    assert [group.venv.single_action_space.low[0] for group in env.groups] == [-3.0, -4.0]
    assert [group.venv.single_action_space.high[0] for group in env.groups] == [9.0, 9.0]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"hihg": 2.0}, "unexpected keyword argument 'hihg' ... kwargs (--env.kwargs) are the arguments"),
        ({"dtype": "abc"}, "kwargs (--env.kwargs) are the arguments of its constructor"),
        ({1: 2}, "kwargs must have names of arguments, got 1"),
        ({"max_episode_steps": 3}, "kwargs cannot set max_episode_steps: give episode_length"),
        ({"render_mode": "human"}, "kwargs cannot set render_mode"),
        ('{"id": "Hopper-v5"}', "kwargs cannot set id"),
        ([1], "kwargs must be a dictionary or a JSON object, got [1]"),
    ],
)
def test_keyword_arguments_that_cannot_be_used_are_refused(kwargs, words):
    with pytest.raises(InputError, match=says(words)):
        make(registered(), 1, kwargs=kwargs)


@pytest.mark.parametrize(
    "text",
    [
        "gain=2",
        "[1]",
        "3",
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        "[" * 9000,
        " " * 20_000,
    ],
)
def test_keyword_arguments_in_settings_are_a_json_object(text):
    with pytest.raises(InputError, match="kwargs must be a JSON object of at most 10000 characters, such as"):
        EnvConfig(kwargs=text)


def test_keyword_arguments_are_kept_with_the_settings_of_a_run():
    config = TrainConfig(env=EnvConfig(kwargs='{"gain":2.0,  "modes": ["a", null]}'))
    kept = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_dict(TrainConfig, kept) == config
    assert config.env == EnvConfig(kwargs='{"gain": 2.0, "modes": ["a", null]}')
    kept["env"]["kwargs"] = {"gain": 2.0}
    with pytest.raises(InputError, match="kwargs must be"):
        from_dict(TrainConfig, kept)


def test_a_constructor_that_needs_arguments_says_how_to_give_them():
    gymnasium.register("Needy-v0", lambda need: Counter(), max_episode_steps=LENGTH)
    with pytest.raises(InputError, match=says("Needy-v0 cannot be made ... 'need' ... --env.kwargs")):
        make("gym/Needy-v0", 1)
    assert make("gym/Needy-v0", 1, kwargs={"need": True}).num_envs == 1


# Worker processes


@pytest.fixture
def workers():
    made = []

    def make(**settings):
        restarts = settings.pop("restarts", 1)
        count, processes = settings.pop("count", N), settings.pop("processes", True)
        seconds = settings.pop("step_seconds", None)
        task = registered(**settings)
        made.append(make_gym(task, count, processes=processes, restarts=restarts, step_seconds=seconds))
        return made[-1]

    yield make
    for env in made:
        env.close()


def test_workers_follow_the_tags_and_restart_in_the_same_step(workers):
    assert follow(workers(), 4 * LENGTH) > 0


def test_workers_import_neither_torch_nor_this_package_and_use_one_thread(workers):
    assert workers().venv.call("loaded") == ((set(), "1"),) * N


def break_worker(env, how):
    if how == "kill":
        os.kill(env.venv.processes[1].pid, signal.SIGKILL)
    return env.step_tensors(tripping(env, 1))


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("kill", "the process of slot 1 ended with exit code -9"),
        ("exit", "the process of slot 1 ended with exit code 7"),
        ("raise", "slot 1 raised OSError: the simulator is unwell"),
        ("unpicklable", "slot 1 raised an exception"),
    ],
)
def test_a_broken_worker_costs_one_step_and_ends_the_run_when_it_goes_on(workers, caplog, how, what):
    env = workers(trouble=how)
    task = env.task_names[0]
    start = env.reset_tensors(0)
    before = run(env, 1)[0].observations
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        step = break_worker(env, how)
    assert time.monotonic() - began < 20
    (told,) = caplog.messages
    assert told.startswith(f"{task}, at step 2 since the reset: {what}; ")
    assert told.endswith("0 restarts left")
    assert step.dropped.all()
    assert step.truncated.all()
    assert not step.terminated.any()
    assert torch.equal(step.successors, before)
    assert (step.observations[:, 1:] == torch.tensor([1.0, 0.0])).all()
    assert not set(step.observations[:, 0].tolist()) & set(start[:, 0].tolist())
    assert env.nan_count.tolist() == [N]
    assert not run(env, 1)[0].dropped.any()

    words = says(f"{task}, at step 4 since the reset: {what}, after 1 restarts; --env.processes False")
    with pytest.raises(WorkerError, match=words):
        break_worker(env, how)
    assert not multiprocessing.active_children()
    env.close()


def test_an_exception_in_this_process_is_told_with_task_slot_and_step_and_its_traceback_is_logged(caplog):
    env = make_gym(registered(trouble="raise"), N, processes=False)
    env.reset_tensors(0)
    run(env, LENGTH + 1)
    told = f"{env.task_names[0]}, at step {LENGTH + 2} ... slot 1 raised OSError: the simulator is unwell"
    with pytest.raises(SimulatorError, match=says(told)) as error:
        env.step_tensors(tripping(env, 1))
    assert isinstance(error.value.__cause__, OSError)
    assert 'raise OSError("the simulator is unwell")' in caplog.text  # the command line shows no traceback


class Unwell(SyncVectorEnv):
    def step(self, actions):
        raise OSError("the simulator is unwell")


def test_what_a_vector_environment_raises_is_told_with_its_task_and_step(caplog):
    env = VectorAdapter(Unwell([Counted()] * 2), "mine", max_episode_steps=LENGTH)
    env.reset_tensors(0)
    told = "mine, at step 1 since the reset: raised OSError: the simulator is unwell"
    with pytest.raises(SimulatorError, match=told) as error:
        env.step_tensors(still(env))
    assert isinstance(error.value.__cause__, OSError)


def test_an_exception_in_a_process_is_told_with_its_own_traceback_in_the_end(workers, caplog):
    env = workers(trouble="raise", restarts=0)
    env.reset_tensors(0)
    told = f"{env.task_names[0]}, at step 1 ... slot 2 raised OSError: the simulator is unwell"
    with pytest.raises(SimulatorError, match=says(told)) as error:
        env.step_tensors(tripping(env, 2))
    assert "in step\nOSError: the simulator is unwell" in str(error.value.__cause__)
    assert "in step\nOSError: the simulator is unwell" in caplog.text


def test_an_environment_that_cannot_be_closed_does_not_hide_what_it_raised(caplog):
    env = make_gym(registered(trouble="raise twice"), N)
    env.reset_tensors(0)
    with pytest.raises(SimulatorError, match="the simulator is unwell"), contextlib.closing(env):
        env.step_tensors(tripping(env, 1))
    assert "slot 2 raised OSError when it was closed: nor can it be closed" in caplog.messages


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize(
    ("trouble", "what"),
    [
        ("short", "ValueError: ... 3 numbers, got 1"),
        ("long", "ValueError: ... 3 numbers, got 4"),
        ("text", "ValueError: could not convert string to float"),
        ("no reward", "TypeError: must be real number, not NoneType"),
        ("two rewards", "ValueError: a reward must be one number, got 2"),
        ("four values", "ValueError: step must return (observation, reward, terminated, truncated, info)"),
    ],
)
def test_a_step_of_another_shape_or_type_is_told_with_task_slot_and_step(workers, trouble, what, processes):
    env = workers(trouble=trouble, restarts=0, processes=processes)
    env.reset_tensors(0)
    run(env, 1)
    with pytest.raises(WorkerError, match=says(f"{env.task_names[0]}, at step 2 ... slot 2 raised {what}")):
        env.step_tensors(tripping(env, 2))


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize(
    ("trouble", "what"),
    [
        ("short start", ", in the reset: slot 0 raised ValueError: ... 3 numbers, got 1"),
        (
            "bare start",
            ", in the reset: slot 0 raised ValueError: reset must return (observation, info), got ",
        ),
        ("nan start", " are not finite in environment 0 in the reset; "),
    ],
)
def test_a_start_that_cannot_be_used_is_told_with_task_and_slot(workers, trouble, what, processes):
    env = workers(trouble=trouble, restarts=0, processes=processes, count=1)
    with pytest.raises((WorkerError, InputError), match=says(f"{env.task_names[0]}{what}")):
        env.reset_tensors(0)


def test_a_reward_may_be_an_array_of_one_number():
    env = make_gym(registered(trouble="array reward"), N)
    env.reset_tensors(0)
    assert [step.rewards.tolist() for step in run(env, 2)] == [[1.0] * N, [2.0] * N]


def test_a_constructor_that_raises_is_told_with_the_task():
    with pytest.raises(SimulatorError, match=r"Counter.* cannot be made: TypeError: .*unexpected keyword"):
        make_gym(registered(no_such_setting=1), 1)


def test_a_hung_worker_counts_as_dead_after_the_given_time(workers, caplog):
    env = workers(step_seconds=0.5)
    env.reset_tensors(0)
    run(env, 2)
    os.kill(env.venv.processes[1].pid, signal.SIGSTOP)
    with caplog.at_level(logging.WARNING):
        step = run(env, 1)[0]
    (told,) = caplog.messages
    assert told.startswith(
        f"{env.task_names[0]}, at step 3 since the reset: the process of slot 1 took longer"
    )
    assert step.dropped.all()
    assert not run(env, 1)[0].dropped.any()


def test_a_worker_lost_during_a_reset_is_replaced(workers):
    env = workers()
    env.reset_tensors(0)
    os.kill(env.venv.processes[0].pid, signal.SIGKILL)
    assert (env.reset_tensors(1)[:, 2] == 0).all()
    assert not run(env, 1)[0].dropped.any()


@pytest.mark.parametrize("pending", [False, True])
def test_close_ends_all_workers_also_while_one_is_dead_or_at_work(workers, pending):
    env = workers()
    env.reset_tensors(0)
    os.kill(env.venv.processes[0].pid, signal.SIGSTOP if pending else signal.SIGKILL)
    if pending:
        env.launch(still(env))
    began = time.monotonic()
    env.close()
    env.close()
    assert time.monotonic() - began < 10
    assert not multiprocessing.active_children()


def all_end(pids):
    """Whether two processes were there and are gone, or soon will be."""
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(pids) == 2 and not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


SIGNALLED = """
import os, signal, torch
from brc_fast.envs.gym import make_gym
signals = [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
for number in signals:
    signal.signal(number, lambda number, frame: None)
env = make_gym("gym/Pendulum-v1", 2, processes=True)
env.reset_tensors(0)
for number in signals:
    os.killpg(0, number)
    assert not env.step_tensors(torch.zeros(2, 1)).dropped.any(), number
print(*(process.pid for process in env.venv.processes))
env.close()
"""


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_a_signal_to_all_processes_is_the_parents_to_answer_and_leaves_no_worker():
    script = [sys.executable, "-c", SIGNALLED]
    ended = subprocess.run(script, capture_output=True, text=True, start_new_session=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert all_end([int(pid) for pid in ended.stdout.split()])


STUCK = """
import sys, types, gymnasium, numpy as np, time, torch
from brc_fast.envs.gym import make_gym
class Stuck(gymnasium.Env):
    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))
    def reset(self, **_):
        return np.zeros(1, np.float32), {}
    def step(self, action):
        time.sleep(600)
gymnasium.register("Stuck-v0", Stuck, max_episode_steps=9)
env = make_gym("gym/Stuck-v0", 2, processes=True)
env.reset_tensors(0)
print(*(process.pid for process in env.venv.processes), flush=True)
env.step_tensors(torch.zeros(2, 1))
"""


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_a_worker_that_is_stuck_in_a_step_ends_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as running:
        pids = [int(pid) for pid in running.stdout.readline().split()]
        time.sleep(0.5)  # so that they are in the step
        running.kill()
    assert all_end(pids)


SCRIPT = """
import os, signal, sys, time, torch
from brc_fast.envs.gym import make_gym
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
print("script", flush=True)
env = make_gym("gym/Pendulum-v1", 2, processes=True)
env.reset_tensors(0)
print(*(process.pid for process in env.venv.processes), flush=True)
while True:
    env.step_tensors(torch.zeros(2, 1))
    if sys.argv[1] == "exit":
        break
"""


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", ["exit", "interrupt", "kill"])
def test_no_worker_outlives_its_parent_or_runs_its_script(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    running = subprocess.Popen(
        [sys.executable, str(script), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, all of which Ctrl-C reaches
    )
    assert running.stdout.readline() == "script\n"
    pids = [int(pid) for pid in running.stdout.readline().split()]
    if how == "interrupt":
        os.killpg(running.pid, signal.SIGINT)
    if how == "kill":
        running.kill()
    out, err = running.communicate(timeout=30)
    assert out == ""
    if how != "kill":  # workers may then complain of the closed pipe
        assert err.count("Traceback") == (how == "interrupt")
    assert all_end(pids)


# Real simulators beside their own interface


def dm_episode(domain, task, seed, actions):
    """Flat observations and rewards of one dm_control episode, and how it ended."""
    from dm_control import suite

    env = suite.load(domain, task, task_kwargs={"random": np.random.RandomState(seed)})
    steps = [env.reset()] + [env.step(action) for action in actions]
    assert [step.last() for step in steps[1:]] == [False] * (len(actions) - 1) + [True]
    flat = [np.concatenate([np.ravel(x) for x in step.observation.values()]) for step in steps]
    return np.array(flat, np.float32), [step.reward for step in steps[1:]], steps[-1].discount


@needs_dmc
@pytest.mark.parametrize(
    ("domain", "task", "processes"),
    [
        ("cartpole", "swingup", False),
        ("ball_in_cup", "catch", True),
        pytest.param("dog", "run", True, marks=pytest.mark.slow),
    ],
)
def test_a_dmc_episode_is_that_of_dm_control(domain, task, processes):
    env = make_gym(f"dmc/{domain}-{task}", 2, processes=processes)
    assert env.max_episode_steps == 1000
    first, seeds = started(env, 1)
    actions = actions_for(env, 1000)
    steps = rollout(env, actions)
    env.close()
    observations = [first, *(step.successors for step in steps)]
    for slot in range(2):
        flat, rewards, discount = dm_episode(domain, task, seeds[slot], actions[:, slot].double().numpy())
        np.testing.assert_array_equal(torch.stack(observations)[:, slot].numpy(), flat)
        got = torch.stack([step.rewards for step in steps])[:, slot]
        np.testing.assert_array_equal(got.numpy(), np.array(rewards, np.float32))
        assert discount == 1.0
    assert steps[-1].truncated.all()
    assert not any(step.terminated.any() or step.dropped.any() for step in steps)
    assert not any(step.truncated.any() for step in steps[:-1])
    assert not torch.equal(steps[-1].observations, steps[-1].successors)


@needs_dmc
def test_a_dmc_episode_can_be_longer_than_its_own_and_a_bad_state_is_lost():
    env = make_gym("dmc/cartpole-swingup", 1, episode_length=1005)
    assert env.max_episode_steps == 1005
    env.reset_tensors(0)
    ends = [number for number, step in enumerate(run(env, 1006), 1) if step.truncated.any()]
    assert ends == [1005]
    step = env.step_tensors(torch.full((1, 1), torch.nan))
    assert step.dropped.all()
    assert step.truncated.all()
    assert step.observations.isfinite().all()
    assert not run(env, 1)[0].dropped.any()


@pytest.mark.parametrize(
    "task",
    [
        pytest.param("dmc/cartpole-swingup", marks=needs_dmc),
        pytest.param("gym/HalfCheetah-v5", marks=needs_gym),
        pytest.param("gym/HalfCheetah-v4", marks=needs_gym),
    ],
)
def test_making_a_task_without_a_display_prints_nothing(task, tmp_path):
    code = f'from brc_fast.envs.gym import make_gym; make_gym("{task}", 2, processes=True).close()'
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MUJOCO_GL")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())  # MuJoCo's log


@needs_gym
def test_a_gymnasium_episode_is_that_of_gymnasium():
    env = make_gym("gym/InvertedPendulum-v5", 2)
    acted_on, seeds = started(env, 2)
    singles = [gymnasium.make("InvertedPendulum-v5") for _ in range(2)]
    now = [single.reset(seed=seed)[0] for single, seed in zip(singles, seeds, strict=True)]
    terminated = 0
    for actions in actions_for(env, 200):
        np.testing.assert_array_equal(acted_on.numpy(), np.array(now, np.float32))
        step = env.step_tensors(actions)
        for slot, single in enumerate(singles):
            now[slot], reward, end, cut, _ = single.step(actions[slot].numpy() * np.float32(3))
            np.testing.assert_array_equal(step.successors[slot].numpy(), now[slot].astype(np.float32))
            assert (step.rewards[slot], step.terminated[slot], step.truncated[slot]) == (reward, end, cut)
            if end or cut:
                now[slot] = single.reset()[0]
                terminated += end
        acted_on = step.observations
    assert terminated > 5


CHECKOUT = """
import gymnasium
import numpy as np


class Walk(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (51,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (19,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.age = 0
        return np.zeros(51), {}

    def step(self, action):
        self.age += 1
        return np.full(51, float(self.age)), float(self.age), False, False, {"success": self.age > 2}


gymnasium.register("h1-walk-v0", entry_point=Walk, max_episode_steps=4)
"""


@pytest.mark.parametrize("processes", [False, True])
def test_humanoidbench_comes_from_a_checkout_of_ones_own(processes, tmp_path, monkeypatch):
    (tmp_path / "humanoid_bench").mkdir()
    (tmp_path / "humanoid_bench" / "__init__.py").write_text(CHECKOUT)
    monkeypatch.syspath_prepend(tmp_path)
    env = make("humanoidbench/h1-walk-v0", 2, processes=processes)
    try:
        assert (env.observation_size, env.action_size, env.max_episode_steps) == (51, 19, 4)
        env.reset_tensors(0)
        steps = [env.step_tensors(torch.zeros(2, 19)) for _ in range(4)]
        assert [step.rewards.tolist() for step in steps] == [[n, n] for n in (1.0, 2.0, 3.0, 4.0)]
        assert steps[-1].truncated.all()
        assert (steps[-1].successors == 4.0).all()
        assert env.successes.all()
    finally:
        env.close()
        gymnasium.registry.pop("h1-walk-v0", None)
        sys.modules.pop("humanoid_bench", None)
