"""What every adapter promises, for each simulator that is installed and beside the simulator's own API."""

import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from extras import needs, require
from stepping import actions_for, equal, rollout, started

require("gymnasium")
from brc_fast.envs import make
from brc_fast.envs.base import check_finite
from brc_fast.errors import InputError

N, SHORT = 4, 6  # slots; steps of a short episode


class Case(NamedTuple):
    task: str
    needs: pytest.MarkDecorator
    loses: bool  # whether an action of NaN makes the simulator lose its state, or its own clipping hides it
    processes: bool | None = None


CASES = {
    "mjx": Case("mjx/CartpoleSwingup", needs("mjx"), True),
    "gym": Case("gym/Pendulum-v1", needs("gymnasium"), True),
    "gym terminating": Case("gym/InvertedPendulum-v5", needs("gym"), False),
    "dmc": Case("dmc/cartpole-swingup", needs("dmc"), True, False),
    "dmc processes": Case("dmc/cartpole-swingup", needs("dmc"), True, True),
    "envpool": Case("envpool/CartpoleSwingup-v1", needs("envpool"), False),
    "envpool own physics": Case("envpool/Pendulum-v1", needs("envpool"), True),
    "metaworld": Case("metaworld/reach-v3", needs("envpool"), False),
}


MADE = {}


def shared(name, episode_length):
    """One environment for all tests, which start with a seeded reset."""
    case, key = CASES[name], (name, episode_length)
    if key not in MADE:
        MADE[key] = make(case.task, N, episode_length=episode_length, quiet=True, processes=case.processes)
    return MADE[key]


@pytest.fixture(scope="module", autouse=True)
def _close_shared():
    yield
    for env in MADE.values():
        env.close()
    MADE.clear()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings to a file in the work folder
    monkeypatch.setenv("MUJOCO_GL", "disable")


def named(names):
    return [pytest.param(name, marks=CASES[name].needs) for name in names]


@pytest.fixture(params=named(CASES))
def name(request):
    return request.param


@pytest.fixture
def env(name):
    return shared(name, SHORT)


# ---------------------------------------------------------------- the simulator's own API


class OwnGymnasium:
    """One `gymnasium.make` per slot, seeded as the adapter seeds its slots; later resets go on unseeded."""

    def __init__(self, task, env, seed):
        import gymnasium

        backend, _, own_id = task.partition("/")
        if backend == "dmc":
            own_id = f"shimmy:dm_control/{own_id}-v0"
        self.observations, seeds = started(env, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.envs = [gymnasium.make(own_id) for _ in range(N)]
        self.starts = [flat(one.reset(seed=s)[0]) for one, s in zip(self.envs, seeds, strict=True)]
        self.space = self.envs[0].action_space

    def step(self, slot, action):
        observation, *rest = self.envs[slot].step(scaled(action, self.space).astype(self.space.dtype))
        return flat(observation), *map(float, rest[:3])

    def restart(self, slot):
        return flat(self.envs[slot].reset()[0])


class OwnEnvPool:
    """A pool of one per slot, which spends a step on a reset."""

    def __init__(self, task, env, seed):
        import envpool

        self.observations, seeds = started(env, seed)
        pool_id, settings = task.removeprefix("envpool/"), {}
        if task == "metaworld/reach-v3":
            pool_id = "MetaWorld/Reach-v3"
            settings = {"partially_observable": False, "max_episode_steps": 200}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pools = [envpool.make_gymnasium(pool_id, num_envs=1, seed=[s], **settings) for s in seeds]
            self.starts = [flat(pool.reset()[0]) for pool in self.pools]
            self.space = self.pools[0].action_space

    def step(self, slot, action):
        observation, *rest = self.pools[slot].step(scaled(action, self.space)[None])
        return flat(observation), *(float(x[0]) for x in rest[:3])

    def restart(self, slot):
        return flat(self.pools[slot].step(np.zeros((1, *self.space.shape)))[0])


def flat(observation):
    parts = observation.values() if isinstance(observation, dict) else [observation]
    return np.concatenate([np.ravel(part) for part in parts])


def scaled(action, space):
    share = (action.double().numpy() + 1.0) / 2.0
    return space.low + share * (space.high - space.low)


@pytest.mark.parametrize("name", named(name for name in CASES if name not in ("mjx", "dmc processes")))
def test_a_thousand_steps_are_those_of_the_simulators_own_api(name):
    """Successors, rewards, both kinds of end and the starts after them. For MJX see test_envs.py."""
    case = CASES[name]
    env = shared(name, None)
    own = (OwnEnvPool if case.task.startswith(("envpool/", "metaworld/")) else OwnGymnasium)(
        case.task, env, 7
    )
    observations, starts = own.observations, own.starts
    total, expected = np.zeros(N), np.zeros(N)
    ends = set()
    for actions in actions_for(env, 1005):
        np.testing.assert_allclose(observations, np.stack(starts), rtol=1e-5, atol=1e-6)
        step = env.step_tensors(actions)
        for slot in range(N):
            starts[slot], reward, *ended = own.step(slot, actions[slot])
            np.testing.assert_allclose(step.successors[slot], starts[slot], rtol=1e-4, atol=1e-5)
            assert [step.terminated[slot], step.truncated[slot]] == ended
            expected[slot] += reward
            if any(ended):
                starts[slot] = own.restart(slot)
                ends.add("terminated" if ended[0] else "truncated")
        assert not step.dropped.any()
        total += step.rewards.numpy()
        observations = step.observations
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    assert ends == {"terminated" if name == "gym terminating" else "truncated"}
    assert env.nan_count.tolist() == [0]


# ---------------------------------------------------------------- the contract


def test_spaces_and_tensors_have_the_declared_shapes_and_types(name, env):
    from gymnasium.spaces import Box
    from gymnasium.vector import AutoresetMode, VectorEnv

    observation, action = env.observation_size, env.action_size
    assert isinstance(env, VectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert env.single_observation_space == Box(-np.inf, np.inf, (observation,), np.float32)
    assert env.single_action_space == Box(-1.0, 1.0, (action,), np.float32)
    assert (env.observation_space.shape, env.action_space.shape) == ((N, observation), (N, action))
    assert (env.num_envs, env.task_names, env.task_ids.tolist()) == (N, (CASES[name].task,), [0] * N)
    assert env.max_episode_steps == SHORT
    assert (env.continues.shape, env.continues.dtype) == ((N,), bool)
    first = env.reset_tensors(0)
    step = env.step_tensors(actions_for(env, 1)[0])
    assert (first.shape, first.dtype) == ((N, observation), torch.float32)
    assert [tuple(x.shape) for x in step] == [(N, observation)] * 2 + [(N,)] * 4
    assert [x.dtype for x in step] == [torch.float32] * 3 + [torch.bool] * 3
    assert (env.nan_count.shape, env.nan_count.dtype) == ((1,), np.int64)
    if env.successes is not None:
        assert (env.successes.shape, env.successes.dtype) == ((N,), torch.bool)


def test_the_same_seed_gives_the_same_trajectory_and_another_seed_another(env):
    def trajectory(seed):
        first = env.reset_tensors(seed)
        return first, rollout(env, actions_for(env, 3 * SHORT))

    (first, steps), (again, same), (other, _) = trajectory(3), trajectory(3), trajectory(4)
    assert torch.equal(first, again)
    assert all(map(equal, steps, same))
    assert not (first == other).all(dim=1).any()
    assert len(first.unique(dim=0)) == N
    goes_on = env.reset_tensors(None)
    assert not (goes_on == first).all(dim=1).any()


def test_only_the_end_of_an_episode_parts_observation_and_successor(env):
    env.reset_tensors(0)
    age = torch.zeros(N, dtype=torch.int64)
    starts = []
    for actions in actions_for(env, 4 * SHORT):
        step = env.step_tensors(actions)
        age += 1
        ended = step.terminated | step.truncated
        assert torch.equal(step.observations[~ended], step.successors[~ended])
        assert not (step.observations[ended] == step.successors[ended]).all(dim=1).any()
        running = ~step.terminated  # a simulator may call an end at the time limit both
        assert torch.equal(step.truncated[running], (age == SHORT)[running])
        assert not step.truncated[age < SHORT].any()
        starts.append(step.observations[ended])
        age[ended] = 0
    starts = torch.cat(starts)
    assert len(starts) >= 4 * N
    assert len(starts.unique(dim=0)) == len(starts)


def test_tensors_of_earlier_steps_do_not_change(env):
    held = [(env.reset_tensors(0),)]
    copies = [tuple(x.clone() for x in held[0])]
    for actions in actions_for(env, 300):
        step = env.step_tensors(actions)
        held.append(step)
        copies.append(tuple(x.clone() for x in step))
    assert all(map(equal, held, copies))


def test_what_a_caller_writes_into_a_step_does_not_reach_the_environment(name, env):
    if name == "mjx":
        pytest.skip("shares memory with JAX, as its contract says: never write in place")
    actions = actions_for(env, 2 * SHORT)
    env.reset_tensors(1)
    expected = rollout(env, actions)
    observations = env.reset_tensors(1)
    for action, want in zip(actions, expected, strict=True):
        observations.fill_(99.0)
        step = env.step_tensors(action)
        assert equal(step, want)
        observations = step.observations
        for tensor in step:
            tensor.zero_()


def test_a_step_may_be_launched_and_collected_later(env):
    actions = actions_for(env, 2 * SHORT)
    env.reset_tensors(2)
    expected = rollout(env, actions)
    env.reset_tensors(2)
    for action, want in zip(actions, expected, strict=True):
        launched = env.launch(action)
        assert equal(env.collect(launched), want)


def test_an_action_that_is_nan_never_leads_to_a_transition_that_is(name, env):
    env.reset_tensors(0)
    actions = actions_for(env, SHORT)
    actions[1, 2] = float("nan")
    lost = 0
    for number, action in enumerate(actions, start=1):
        step = env.step_tensors(action)
        check_finite(step, env, number)
        assert all(x.isfinite().all() for x in step[:3])
        assert (step.truncated | ~step.dropped).all()
        assert not step.dropped[[0, 1, 3]].any()
        lost += int(step.dropped[2])
    assert env.nan_count.tolist() == [lost] == [int(CASES[name].loses)]


def test_stepping_needs_a_reset_and_actions_of_the_right_shape(name, env):
    env.reset_tensors(0)
    surplus = env.action_size + 1
    message = rf"actions must have shape \[N, A\] = \[{N}, {env.action_size}\], got \[{N}, {surplus}\]"
    with pytest.raises(InputError, match=message):
        env.step_tensors(torch.zeros(N, surplus))
    if not CASES[name].processes:
        fresh = make(CASES[name].task, N, quiet=True, processes=CASES[name].processes)
        with pytest.raises(InputError, match="step needs a reset first"):
            fresh.step_tensors(torch.zeros(N, env.action_size))
        fresh.close()


def test_a_saved_state_goes_on(name, env, tmp_path):
    case = CASES[name]
    first = env.reset_tensors(0)
    actions = actions_for(env, 4 * SHORT)
    seen = [first, *(step.observations for step in rollout(env, actions[: SHORT + 2]))]
    np.savez(tmp_path / "state.npz", **env.state_dict())
    if env.continues.all():
        expected_start, expected = seen[-1], rollout(env, actions[SHORT + 2 :])
    else:  # the starts that this run would draw next
        assert not env.continues.any()
        expected_start = env.reset_tensors(None)
        expected = rollout(env, actions[SHORT + 2 :])
        assert not any((start == expected_start).all(dim=1).any() for start in seen)

    other = make(case.task, N, seed=9, episode_length=SHORT, quiet=True, processes=case.processes)
    with np.load(tmp_path / "state.npz") as file:
        assert torch.equal(other.load_state_dict(dict(file)), expected_start)
    assert all(map(equal, rollout(other, actions[SHORT + 2 :]), expected))
    with pytest.raises(InputError, match=f"saved state of {case.task}"):
        other.load_state_dict({"surplus": np.zeros(3)})
    other.close()


def test_gymnasium_steps_restart_in_the_same_step_and_carry_the_final_observation(name, env):
    from gymnasium.wrappers.vector import RecordEpisodeStatistics

    recorded = RecordEpisodeStatistics(env)
    observations, infos = recorded.reset(seed=2)
    assert infos == {}
    actions = actions_for(env, 2 * SHORT)
    twin = env.reset_tensors(2)
    steps = rollout(env, actions)
    observations, _ = recorded.reset(seed=2)
    assert np.array_equal(observations, twin)
    total = np.zeros(N)
    for action, step in zip(actions, steps, strict=True):
        observations, rewards, terminations, truncations, infos = recorded.step(action.numpy())
        assert env.observation_space.contains(observations)
        assert np.array_equal(observations, step.observations)
        assert np.array_equal(rewards, step.rewards)
        total += rewards
        ended = terminations | truncations
        assert ("success" in {**infos, **infos.get("final_info", {})}) == (env.successes is not None)
        if not ended.any():
            assert infos.keys() <= {"success", "_success"}
            continue
        assert np.array_equal(infos["_final_obs"], ended)
        for slot in ended.nonzero()[0]:
            assert np.array_equal(infos["final_obs"][slot], step.successors[slot])
            assert infos["episode"]["r"][slot] == pytest.approx(total[slot], rel=1e-5, abs=1e-6)
        assert not infos["final_info"]["dropped"].any()
        total[ended] = 0.0
    with pytest.raises(InputError, match="reset takes no options, got reset_mask"):
        env.reset(options={"reset_mask": np.ones(N, bool)})


def descendants():
    """Processes below this one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes as Linux shows them")
def test_closing_twice_leaves_no_process(name, env):
    case = CASES[name]
    before = descendants()  # `env` has started what all processes share
    one = make(case.task, N, episode_length=SHORT, quiet=True, processes=case.processes)
    one.reset_tensors(0)
    rollout(one, actions_for(one, 3))
    assert len(descendants() - before) == (N if case.processes else 0)
    one.close()
    one.close()
    assert not descendants() - before
