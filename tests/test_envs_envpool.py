"""EnvPool's environments beside EnvPool itself and beside dm_control."""

import gc
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from extras import needs, require
from refusals import says
from stepping import actions_for, equal, started

from brc_fast.errors import InputError, MissingExtraError
from brc_fast.spec import Box, Discrete, Field, Spec

require("gymnasium")
from brc_fast.envs import envpool as adapters
from brc_fast.envs.base import check_finite
from brc_fast.envs.envpool import make_envpool

needs_envpool, needs_dm_control = needs("envpool"), needs("envpool", "dmc")
CARTPOLE, REACH, PENDULUM = "envpool/CartpoleSwingup-v1", "metaworld/reach-v3", "envpool/InvertedPendulum-v5"
N = 3


@pytest.fixture(autouse=True)
def _logs_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings to a file in the work folder
    monkeypatch.setenv("MUJOCO_GL", "disable")


def own_pool(name, **config):
    """EnvPool without anything of ours."""
    import envpool

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return envpool.make_gymnasium(name, **config)


def threads():
    return len(os.listdir("/proc/self/task"))


# ---------------------------------------------------------------- names


def test_without_envpool_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    for task in ("envpool/DogRun-v1", "metaworld/reach-v3"):
        with pytest.raises(
            MissingExtraError, match=says('needs the [envpool] extra: ... "brc-fast[envpool]"')
        ):
            make_envpool(task, 1)


@needs_envpool
@pytest.mark.parametrize(
    ("task", "nearest"),
    [
        ("envpool/dogrun-v1", "envpool/DogRun-v1, envpool/DogTrot-v1, "),
        ("metaworld/rech-v3", "metaworld/reach-v3, metaworld/reach-wall-v3, "),
        ("dmc/dog-rnn", "envpool/DogRun-v1, envpool/DogTrot-v1, "),
    ],
)
def test_an_id_that_cannot_be_used_is_refused(task, nearest):
    with pytest.raises(InputError, match=f"unknown task '{task}'; nearest: {nearest}"):
        make_envpool(task, 1)


@needs_envpool
def test_every_metaworld_task_is_found_under_its_own_name():
    import envpool

    ids = [name for name in envpool.list_all_envs() if name.startswith("MetaWorld/")]
    assert len(ids) == 50
    names = [adapters._metaworld(name) for name in ids]
    assert {"metaworld/button-press-topdown-wall-v3", "metaworld/pick-out-of-hole-v3"} <= set(names)
    for task in names:
        env = make_envpool(task, 1)
        assert (env.task_names, env.max_episode_steps) == ((task,), 200)
        assert (env.observation_size, env.action_size) == (39, 4)


@needs_envpool
def test_a_name_of_metaworlds_version_2_runs_version_3_and_says_so_once(caplog):
    adapters._warn_once.cache_clear()
    old = "metaworld/assembly-v2-goal-observable"
    with caplog.at_level(logging.WARNING):
        envs = [make_envpool(task, N) for task in (old, old, "metaworld/assembly-v3")]
    assert [record.getMessage() for record in caplog.records] == [
        f"{old} runs as metaworld/assembly-v3: EnvPool has only version 3 of MetaWorld"
    ]
    for env in envs:
        env.venv._make.keywords["num_threads"] = 1
    first, second = (env.venv.reset(seed=0)[0] for env in envs[::2])
    assert np.array_equal(first, second)


# ---------------------------------------------------------------- dm_control


def dm_control_task(name):
    """dm_control's environment of an EnvPool id."""
    from dm_control import suite

    (found,) = ((d, t) for d, t in suite.ALL_TASKS if f"{adapters._camel(f'{d}-{t}')}-v1" == name)
    return suite.load(*found)


def dm_control_sizes(env):
    return [(key, int(np.prod(spec.shape))) for key, spec in env.observation_spec().items()]


def pool_sizes(name):
    pool = adapters.Pool(name, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import envpool

        space = envpool.make_spec(name).gymnasium_observation_space
    sizes = [(key, int(np.prod(space[key].shape))) for key in pool._keys]
    assert pool.single_observation_space.shape == (sum(size for _, size in sizes),)
    return sizes


@needs_dm_control
@pytest.mark.parametrize("name", ["CheetahRun-v1", "FingerSpin-v1", "FishSwim-v1", "FishUpright-v1"])
def test_observations_are_those_of_dm_control_in_its_order(name):
    assert pool_sizes(name) == dm_control_sizes(dm_control_task(name))


@needs_dm_control
@pytest.mark.slow
def test_observations_of_every_task_are_those_of_dm_control_in_its_order():
    from dm_control import suite

    names = [f"{adapters._camel(f'{domain}-{task}')}-v1" for domain, task in suite.ALL_TASKS]
    assert set(adapters._OBSERVATIONS) <= set(names)
    for name in names:
        assert pool_sizes(name) == dm_control_sizes(dm_control_task(name)), name


def turned(row):
    """A rotation whose last row is the vertical axis seen from the body; the heading is free."""
    z = row / np.linalg.norm(row)
    x = np.array([1.0, 0.0, 0.0]) - z * z[0]
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z])


def place(physics, domain, seen):
    """Bring dm_control to the state that EnvPool's start observation shows, up to place and heading."""
    import mujoco

    data = physics.data
    with physics.reset_context():
        data.qpos[:] = data.qvel[:] = 0.0
        if domain == "cartpole":
            cart, cosine, sine = seen["position"]
            data.qpos[:] = cart, np.arctan2(sine, cosine)
            data.qvel[:] = seen["velocity"]
        elif domain == "cheetah":
            data.qpos[1:] = seen["position"]
            data.qvel[:] = seen["velocity"]
        else:  # qpos: place, orientation, joints
            height, vertical = (
                ("head_height", "torso_vertical")
                if domain == "humanoid"
                else ("torso_pelvis_height", "z_projection")
            )
            data.qpos[3] = 1.0
            data.qpos[7:] = seen["joint_angles"]
            physics.forward()
            own = physics.named.data.xmat["torso"].reshape(3, 3)
            mujoco.mju_mat2Quat(data.qpos[3:7], (turned(seen[vertical][:3]) @ own.T).ravel())
            physics.forward()
            data.qpos[2] = seen[height][0] - np.ravel(getattr(physics, height)())[0]
        if domain == "dog":  # the others start from rest
            data.act[:] = seen["actuator_state"]
            data.qvel[6:] = seen["joint_velocites"]

            def sensed(root):  # linear and angular velocity, both linear in that of the root
                data.qvel[:6] = root
                physics.forward()
                return physics.inertial_sensors()[3:].copy()

            still = sensed(np.zeros(6))
            slopes = np.stack([sensed(unit) - still for unit in np.eye(6)], axis=1)
            sensed(np.linalg.solve(slopes, seen["inertial_sensors"][3:] - still))


@needs_dm_control
@pytest.mark.parametrize("name", ["CartpoleSwingup-v1", "CheetahRun-v1", "HumanoidRun-v1", "DogRun-v1"])
def test_steps_have_the_values_of_dm_control(name):
    theirs = dm_control_task(name)
    domain = next(d for d in ("cartpole", "cheetah", "humanoid", "dog") if name.lower().startswith(d))
    theirs.reset()
    env = make_envpool(f"envpool/{name}", 1, seed=3)
    ours = env.reset_tensors(3)[0].numpy()
    sizes = dm_control_sizes(theirs)
    names, cuts = [key for key, _ in sizes], np.cumsum([size for _, size in sizes])[:-1]
    seen = dict(zip(names, np.split(ours.astype(float), cuts), strict=True))
    place(theirs.physics, domain, seen)

    def told(observation):
        parts = {key: np.ravel(observation[key]).copy() for key in names}
        for key in ("com_velocity", "velocity") if domain == "humanoid" else ():
            parts[key][:2] = np.linalg.norm(parts[key][:2])  # of the world's axes: the heading is unknown
        return np.concatenate(list(parts.values()))

    np.testing.assert_allclose(told(seen), told(theirs.task.get_observation(theirs.physics)), atol=2e-4)
    for action in actions_for(env, 10):
        step, expected = env.step_tensors(action), theirs.step(action[0].numpy().astype(float))
        got = dict(zip(names, np.split(step.successors[0].numpy(), cuts), strict=True))
        np.testing.assert_allclose(told(got), told(expected.observation), rtol=1e-4, atol=2e-3)
        assert step.rewards[0].item() == pytest.approx(expected.reward, abs=1e-5)


# ---------------------------------------------------------------- steps


@needs_envpool
@pytest.mark.parametrize("task", [CARTPOLE, REACH, PENDULUM])
def test_steps_are_those_of_a_pool_of_one_with_the_same_seed(task):
    length, own = 7, {}
    env = make_envpool(task, N, episode_length=length)
    if task == REACH:
        own["partially_observable"] = False
    name = {REACH: "MetaWorld/Reach-v3"}.get(task, task.removeprefix("envpool/"))
    observations, seeds = started(env, 4)
    alone = [own_pool(name, num_envs=1, seed=[s], max_episode_steps=length, **own) for s in seeds]
    low, high = alone[0].action_space.low, alone[0].action_space.high

    def flat(seen):
        return np.concatenate(list(seen.values()), 1)[0] if isinstance(seen, dict) else seen[0]

    starts = [flat(pool.reset()[0]) for pool in alone]
    ends = 0
    for actions in actions_for(env, 40):
        np.testing.assert_allclose(observations, np.stack(starts), rtol=1e-6)
        step = env.step_tensors(actions)
        for slot, pool in enumerate(alone):
            scaled = low + (actions[slot].double().numpy() + 1) / 2 * (high - low)
            seen, reward, terminated, truncated, _ = pool.step(scaled[None])
            np.testing.assert_allclose(step.successors[slot], flat(seen), rtol=2e-6, atol=1e-7)
            np.testing.assert_allclose(step.rewards[slot], reward[0], rtol=1e-5)
            assert [step.terminated[slot], step.truncated[slot]] == [terminated[0], truncated[0]]
            if terminated[0] or truncated[0]:
                seen = pool.step(scaled[None])[0]  # EnvPool spends it on the reset
                ends += 1
            starts[slot] = flat(seen)
        assert not step.dropped.any()
        observations = step.observations
    assert ends >= N * (40 // length)


@needs_envpool
def test_a_task_that_ends_is_terminated_and_a_time_limit_truncates():
    env = make_envpool(PENDULUM, N, episode_length=6)
    env.reset_tensors(0)
    push = torch.ones(N, 1)
    steps = [env.step_tensors(push if number < 10 else 0 * push) for number in range(30)]
    kinds = {(bool(s.terminated[i]), bool(s.truncated[i])) for s in steps for i in range(N)}
    assert kinds == {(False, False), (True, False), (False, True)}
    for step in steps:
        fallen = step.successors[:, 1].abs() > 0.2  # of the pole, in radians
        assert torch.equal(step.terminated, fallen)
        assert (step.observations[step.terminated | step.truncated, 1].abs() < 0.02).all()


@needs_envpool
def test_a_policy_sees_what_a_robot_senses_and_not_what_the_simulator_knows():
    task = "MuJoCoPlayground/Go1JoystickFlatTerrain-v1"
    env = make_envpool(f"envpool/{task}", N, episode_length=3)
    observations = env.reset_tensors([1, 2, 3])
    pool = env.venv._make(seed=[1, 2, 3])
    seen = pool.reset()[0]
    assert seen["state"].shape == (N, 48)
    assert seen["privileged_state"].shape == (N, 123)
    assert np.array_equal(observations.numpy(), seen["state"].astype(np.float32))


@needs_envpool
def test_a_list_of_seeds_starts_each_slot_by_its_own():
    env = make_envpool(PENDULUM, N)
    starts = env.reset_tensors([7, 8, 7][:N])
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[1])
    assert torch.equal(env.reset_tensors([7, 8, 7][:N]), starts)


@needs_envpool
def test_metaworld_shows_its_goal_and_draws_another_for_every_episode():
    env = make_envpool(REACH, N, episode_length=2)
    goals = [env.reset_tensors(0)[:, -3:]]
    for actions in actions_for(env, 20):
        step = env.step_tensors(actions)
        assert torch.equal(step.successors[:, -3:], goals[-1])
        if step.truncated.any():
            goals.append(step.observations[:, -3:])
    goals = torch.cat(goals)
    assert len(goals) == len(goals.unique(dim=0)) == 11 * N


@needs_envpool
@pytest.mark.parametrize("task", [REACH, "envpool/MetaWorld/Reach-v3"])
def test_success_is_that_of_the_successor(task):
    env = make_envpool(task, N, episode_length=60)
    observations = env.reset_tensors(0)
    assert env.successes is None
    reached = 0
    for _ in range(130):
        hand, goal = observations[:, :3], observations[:, -3:]
        actions = torch.cat([(10 * (goal - hand)).clamp(-1, 1), torch.zeros(N, 1)], dim=1)
        step = env.step_tensors(actions)
        near = (step.successors[:, :3] - step.successors[:, -3:]).norm(dim=1)
        # Within 0.05 m, but of a point between the fingers, about 0.01 m from the hand that is observed.
        assert env.successes[near < 0.03].all()
        assert not env.successes[near > 0.07].any()
        reached += int(env.successes[step.truncated].sum())
        observations = step.observations
    assert reached == 2 * N


@needs_envpool
def test_hands_report_success_under_another_name():
    env = make_envpool("envpool/HandReach-v3", N)
    env.reset_tensors(0)
    env.step_tensors(torch.zeros(N, env.action_size))
    assert env.successes.tolist() == [False] * N


@needs_envpool
@pytest.mark.parametrize("task", ["envpool/Pendulum-v1", "envpool/HalfCheetah-v5"])
def test_a_slot_that_returns_nan_is_restarted_dropped_and_counted(task):
    env, healthy = make_envpool(task, N), make_envpool(task, N)
    before, _ = env.reset_tensors(0), healthy.reset_tensors(0)
    actions = actions_for(env, 6)
    expected = healthy.step_tensors(actions[0])
    broken = actions[0].clone()
    broken[1] = float("nan")
    step = env.step_tensors(broken)
    assert step.dropped.tolist() == step.truncated.tolist() == [False, True, False]
    assert not step.terminated.any()
    assert step.rewards[1] == 0
    assert torch.equal(step.successors[1], before[1])
    assert not torch.equal(step.observations[1], before[1])
    assert equal([x[::2] for x in step], [x[::2] for x in expected])
    for number, later in enumerate(actions[1:], start=2):
        step = env.step_tensors(later)
        check_finite(step, env, number)
        assert not step.dropped.any()
    assert env.nan_count.tolist() == [1]


# ---------------------------------------------------------------- seeds, threads, several pools


@needs_envpool
def test_no_two_slots_and_no_two_seeds_share_a_start():
    env = make_envpool(CARTPOLE, 8)
    starts = torch.cat([env.reset_tensors(seed) for seed in (*range(6), None)])
    assert len(starts.unique(dim=0)) == 7 * 8
    assert torch.equal(env.reset_tensors(3), starts[3 * 8 : 4 * 8])


@needs_envpool
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_threads_end_with_the_pool_that_a_reset_or_close_replaces():
    gc.collect()
    before = threads()
    env = make_envpool(CARTPOLE, 8)
    assert threads() == before
    env.reset_tensors(0)
    running = threads()
    assert running > before
    for seed in range(3):
        env.launch(torch.zeros(8, 1))
        env.reset_tensors(seed)
    assert threads() == running
    env.close()
    env.close()
    assert threads() == before


@needs_envpool
def test_several_pools_step_at_once_as_each_does_alone():
    tasks = (CARTPOLE, REACH, PENDULUM)
    together, alone = ([make_envpool(task, N, episode_length=5) for task in tasks] for _ in range(2))
    for env in (*together, *alone):
        env.reset_tensors(1)
    for number in range(20):
        actions = [actions_for(env, 1, number)[0] for env in together]
        launched = [env.launch(action) for env, action in zip(together, actions, strict=True)]
        steps = [env.collect(x) for env, x in zip(together, launched, strict=True)]
        for step, env, action in zip(steps, alone, actions, strict=True):
            assert equal(step, env.step_tensors(action))


@needs_envpool
def test_a_step_that_was_not_collected_blocks_the_next_until_a_reset():
    from gymnasium.error import AlreadyPendingCallError

    env, twin = make_envpool(CARTPOLE, N), make_envpool(CARTPOLE, N)
    twin.reset_tensors(0)
    env.reset_tensors(0)
    env.launch(torch.ones(N, 1))
    with pytest.raises(AlreadyPendingCallError):
        env.launch(torch.ones(N, 1))
    assert torch.equal(env.reset_tensors(5), twin.reset_tensors(5))
    actions = actions_for(env, 3)
    assert all(equal(env.step_tensors(a), twin.step_tensors(a)) for a in actions)


@needs_envpool
@pytest.mark.parametrize(
    ("task", "observation", "action"),
    [
        ("envpool/Pong-v5", Field((4, 84, 84), "uint8"), Discrete(6)),
        ("envpool/CarRacing-v3", Field((96, 96, 3), "uint8"), Box(3)),
    ],
)
def test_images_and_discrete_actions_pass_a_pool_as_they_are(task, observation, action):
    env = make_envpool(task, 2)
    try:
        assert env.task_spec == Spec(observation, action, (task,))
        first = env.reset_tensors(0)
        assert (tuple(first.shape), first.dtype) == ((2, *observation.shape), torch.uint8)
        kept = first.clone()
        moving = torch.full((2,), 2) if action == Discrete(6) else torch.full((2, 3), 0.5)
        steps = [env.step_tensors(moving) for _ in range(20)]
        assert all(torch.equal(step.observations, step.successors) for step in steps)
        assert not torch.equal(steps[-1].observations, first)
        assert torch.equal(first, kept)
    finally:
        env.close()
