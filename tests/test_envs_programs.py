"""MJX programs: shared by tasks of one body, kept between processes, for any environment of Playground's."""

import functools
import os
import time

import fresh
import numpy as np
import pytest
import torch
from extras import require
from refusals import says
from stepping import actions_for

from brc_fast.envs import make
from brc_fast.errors import InputError

require("mjx")

import jax
import jax.numpy as jnp
from mujoco_playground import dm_control_suite
from mujoco_playground._src.dm_control_suite import cartpole

from brc_fast.envs import _jax, _playground, _programs
from brc_fast.envs.suites import body, list_tasks

N = 4
POLES = ("mjx/CartpoleBalance", "mjx/CartpoleSwingup", "mjx/CartpoleSwingupSparse")


def simulator_calls(monkeypatch):
    """Number of slots of every call of the simulator that is traced from here on."""
    sizes = []
    usual = _playground._simulate

    def counted(call, tasks, varied, operands, slots):
        if call.kind == "step":
            sizes.append(sum(slots))
        return usual(call, tasks, varied, operands, slots)

    monkeypatch.setattr(_playground, "_simulate", counted)
    return sizes


def agree_with_each_alone(tasks, steps, atol):
    both = make(tasks, N, episode_length=steps // 3)
    alone = [make(task, N, episode_length=steps // 3) for task in tasks]
    observations, parts = both.reset_tensors(1), [env.reset_tensors(1) for env in alone]
    for actions in actions_for(both, steps):
        step = both.step_tensors(actions)
        for task, env in enumerate(alone):
            rows = slice(task * N, (task + 1) * N)
            np.testing.assert_allclose(observations[rows, : env.observation_size], parts[task], atol=atol)
            assert not observations[rows, env.observation_size :].any()
            single = env.step_tensors(actions[rows, : env.action_size])
            width = env.observation_size
            np.testing.assert_allclose(step.successors[rows, :width], single.successors, atol=atol)
            np.testing.assert_allclose(step.rewards[rows], single.rewards, atol=atol)
            for got, expected in zip(step[3:], single[3:], strict=True):
                assert torch.equal(got[rows], expected)
            parts[task] = single.observations
        observations = step.observations


def test_tasks_of_one_body_call_the_simulator_once_for_all_their_slots(monkeypatch):
    sizes = simulator_calls(monkeypatch)
    monkeypatch.setattr(_programs._Kept, "read", lambda self: None)
    programs = _programs.Programs(POLES, "jax", N, False)
    assert set(sizes) == {len(POLES) * N}
    assert programs.sizes == (5, 0, 1, [1000] * 3, [(5, 1)] * 3)


def test_tasks_of_one_body_step_as_each_does_alone():
    env = make(POLES, N)
    assert type(env).__name__ == "MJXVectorEnv"
    assert env.task_names == POLES
    agree_with_each_alone(POLES, 60, 1e-4)


@pytest.mark.slow
def test_tasks_whose_models_differ_in_numbers_share_a_call_and_keep_their_numbers(monkeypatch):
    """The targets of ReacherEasy and ReacherHard differ in size and mass."""
    sizes = simulator_calls(monkeypatch)
    monkeypatch.setattr(_programs._Kept, "read", lambda self: None)
    tasks = ("mjx/ReacherEasy", "mjx/ReacherHard")
    _programs.Programs(tasks, "jax", N, False)
    assert set(sizes) == {N * len(tasks)}
    easy, hard = (_playground.mj_model(task) for task in tasks)
    assert not np.array_equal(easy.body_mass, hard.body_mass)
    agree_with_each_alone(tasks, 30, 1e-4)


def test_sizes_that_the_simulator_does_not_read_do_not_tell_bodies_apart():
    names = ("FingerSpin", "FingerTurnEasy", "FingerTurnHard")
    tasks = [_playground.Task(name, "jax", False) for name in names]
    assert len({task.structure for task in tasks}) > 1  # the targets' sizes
    assert len({task.kind for task in tasks}) == 1
    touch = tasks[0].env.mj_model.sensor_objid[0]  # a site that feels, by its size
    tasks[0].env._mjx_model.site_size[touch] *= 2
    assert jax.tree.structure(_playground._without_idle_sizes(tasks[0].env)) != tasks[1].kind


def test_tasks_keep_the_order_in_which_they_were_named():
    names = ("mjx/CartpoleSwingup", "mjx/PendulumSwingup", "mjx/CartpoleBalance")
    env = make(names, N, episode_length=20)
    assert env.task_names == names
    assert env.task_ids.tolist() == [0] * N + [1] * N + [2] * N
    assert len(env.groups) == 2
    observations = env.reset_tensors(3)
    alone = [make(name, N, episode_length=20) for name in names]
    starts = [single.reset_tensors(3) for single in alone]
    spoiled = env.groups[0] if len(env.groups[0].task_names) == 2 else env.groups[1]
    for actions in actions_for(env, 45):
        for task, start in enumerate(starts):
            rows = slice(task * N, (task + 1) * N)
            np.testing.assert_allclose(observations[rows, : start.shape[1]], start, atol=1e-4)
        observations = env.step_tensors(actions).observations
        starts = [
            single.step_tensors(actions[task * N : (task + 1) * N]).observations
            for task, single in enumerate(alone)
        ]
    state = spoiled._slots.state
    last = {**state[1], "data.qpos": state[1]["data.qpos"].at[0].set(jnp.nan)}
    spoiled._slots = spoiled._slots._replace(state=[state[0], last])
    assert env.step_tensors(actions).dropped.nonzero().flatten().tolist() == [2 * N]
    assert env.nan_count.tolist() == [0, 0, 1]


def test_bodies_of_the_25_tasks_are_13():
    assert len({body(task) for task in list_tasks()}) == 13


ALL = """
import torch
from brc_fast.envs import make
env = make("mjx/dmc25", 1, quiet=True)
assert len(env.groups) == 13
assert (env.num_envs, env.observation_size, env.action_size) == (25, 67, 21)
assert env.reset_tensors(0).isfinite().all()
for _ in range(3):
    step = env.step_tensors(torch.rand(25, 21) * 2 - 1)
    assert step.successors.isfinite().all()
    assert not step.dropped.any()
for task, name in enumerate(env.task_names):
    width = next(group.observation_size for group in env.groups if name in group.task_names)
    assert not step.successors[task, width:].any()
print("stepped")
"""


@pytest.mark.exhaustive
def test_all_25_tasks_step_side_by_side():
    """Without the compiler's optimizations, which take most of the minutes that 13 bodies need at first."""
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = fresh.run(ALL, environment=environment)
    assert done.stdout == "stepped\n", done.stderr


# What Playground's own DeepMind Control tasks do not have: termination, named observations, action repeat.


class Falling(cartpole.Balance):
    """Ends when the cart leaves a strip; shows the policy a part of what it knows; counts steps in `info`."""

    strip = 0.02

    def __init__(self, config=None, config_overrides=None):
        super().__init__(swing_up=False, sparse=False, config=config, config_overrides=config_overrides)

    def reset(self, rng):
        state = super().reset(rng)
        return state.replace(obs=self._named(state.obs), info={**state.info, "age": jnp.zeros(())})

    def step(self, state, action):
        after = super().step(state.replace(obs=state.obs["privileged_state"]), action)
        info = {**after.info, "age": state.info["age"] + 1}
        done = (jnp.abs(after.data.qpos[0]) > self.strip).astype(float)
        return after.replace(obs=self._named(after.obs), done=done, info=info, reward=info["age"])

    def _named(self, obs):
        return {"state": obs[:2], "privileged_state": obs}


class Twice(Falling):
    pass


class Inside(cartpole.Balance):
    """Calls the simulator inside a condition, where its operands cannot be taken out."""

    def __init__(self, config=None, config_overrides=None):
        super().__init__(swing_up=True, sparse=False, config=config, config_overrides=config_overrides)

    def step(self, state, action):
        def move():  # Playground writes into the metrics that it is given
            return super(Inside, self).step(state.replace(metrics=dict(state.metrics)), action)

        return jax.lax.cond(action[0] < 2, move, lambda: state)


class Seeing(cartpole.Balance):
    """Shows the policy what `show` makes of the observation."""

    def __init__(self, config=None, config_overrides=None):
        super().__init__(swing_up=False, sparse=False, config=config, config_overrides=config_overrides)

    def reset(self, rng):
        state = super().reset(rng)
        return state.replace(obs=self.show(state.obs))

    def step(self, state, action):
        after = super().step(state, action)
        return after.replace(obs=self.show(after.obs))


def settings(repeat):
    config = cartpole.default_config()
    config.action_repeat, config.episode_length = repeat, 31
    return config


@pytest.fixture(scope="module", autouse=True)
def registered():
    for name, kind, repeat in (("Falling", Falling, 1), ("Twice", Twice, 2), ("Inside", Inside, 1)):
        dm_control_suite.register_environment(name, kind, functools.partial(settings, repeat))
    yield
    for name in ("Falling", "Twice", "Inside"):
        del dm_control_suite._envs[name], dm_control_suite._cfgs[name]


def test_a_critic_sees_what_a_robot_does_not_sense_to_the_end_of_an_episode():
    """Falling's policy sees the first 2 of the 5 numbers of CartpoleBalance, its critic all 5 beside them."""
    env = make("mjx/Falling", N)
    assert (env.task_spec.observation.shape, env.task_spec.privileged.shape) == ((2,), (5,))
    assert make("mjx/Falling", N, privileged=False).task_spec.privileged is None
    observations = env.reset_tensors(0)
    assert torch.equal(env.privileged.observations[:, :2], observations)
    ended = 0
    for actions in actions_for(env, 100):
        kept = env.privileged.observations
        step = env.step_tensors(actions)
        told, over = env.privileged, step.terminated | step.truncated
        assert torch.equal(told.observations[:, :2], step.observations)
        assert torch.equal(told.successors[:, :2], step.successors)
        assert torch.equal(told.observations[~over], told.successors[~over])
        # position and velocity of the cart go together, and no start state moves so fast
        moved = step.successors[:, 0] - kept[:, 0]
        speeds = (kept[:, 3] + told.successors[:, 3]) / 2
        np.testing.assert_allclose(moved, 0.01 * speeds, atol=2e-3)
        ended += int(over.sum())
    assert ended > N
    state = env.state_dict()
    again = make("mjx/Falling", N)
    assert torch.equal(again.load_state_dict(state), step.observations)
    assert torch.equal(again.privileged.observations, told.observations)


def test_termination_is_told_from_truncation_and_the_true_successor_is_kept():
    env = make("mjx/Falling", N)
    assert (env.observation_size, env.max_episode_steps) == (2, 31)
    env.reset_tensors(0)
    ages = torch.zeros(N)
    terminations = truncations = 0
    for actions in actions_for(env, 300):
        step = env.step_tensors(actions)
        ages += 1
        assert torch.equal(step.rewards, ages)  # also after a restart: `info` restarted too
        outside = step.successors[:, 0].abs() > Falling.strip
        assert torch.equal(step.terminated, outside)
        assert torch.equal(step.truncated, ages == 31)
        ended = step.terminated | step.truncated
        assert torch.equal((step.observations != step.successors).any(dim=1), ended)
        assert (step.observations[ended, 0].abs() <= 0.2).all()
        ages[ended] = 0
        terminations += int(step.terminated.sum())
        truncations += int(step.truncated.sum())
    assert terminations > 5
    assert env.nan_count.tolist() == [0]


@pytest.fixture
def seeing(monkeypatch):
    """Makes the task whose observations are what a function gives."""

    def made(show):
        monkeypatch.setattr(Seeing, "show", staticmethod(show), raising=False)
        _programs.programs.cache_clear()
        return make("mjx/Seeing", N, quiet=True)

    dm_control_suite.register_environment("Seeing", Seeing, functools.partial(settings, 1))
    yield made
    del dm_control_suite._envs["Seeing"], dm_control_suite._cfgs["Seeing"]


@pytest.mark.parametrize(
    ("show", "got"),
    [
        (lambda obs: {"pixels": jnp.zeros((8, 8, 3)), "pose": obs}, r"pixels \[8, 8, 3\], pose \[5\]"),
        (lambda obs: {"state": jnp.zeros((8, 8, 3))}, r"state \[8, 8, 3\]"),
        (lambda obs: jnp.zeros((8, 8)), r"state \[8, 8\]"),
        (lambda obs: obs[0], r"state \[\]"),
    ],
)
def test_a_task_that_does_not_observe_a_vector_is_refused(show, got, seeing):
    with pytest.raises(InputError, match=rf"mjx/Seeing must observe a vector, .* name state; got {got}$"):
        seeing(show)


def test_integers_are_observed_as_numbers_of_the_contracts_type(seeing):
    env = seeing(lambda obs: jnp.full(3, 2))
    assert env.reset_tensors(0).dtype == torch.float32
    step = env.step_tensors(torch.zeros(N, 1))
    assert [x.dtype for x in step[:3]] == [torch.float32] * 3
    assert (step.successors == 2.0).all()


def test_a_start_that_is_not_finite_is_told_with_task_and_slot(seeing):
    env = seeing(lambda obs: obs / 0.0)
    with pytest.raises(InputError, match="of mjx/Seeing are not finite in environment 0 in the reset"):
        env.reset_tensors(0)


def test_slots_of_a_task_that_ends_often_never_share_a_start_state_beside_one_that_does_not():
    programs = _programs.Programs(("mjx/CartpoleBalance", "mjx/Falling"), "jax", N, False)
    assert programs.sizes.episode_lengths == [1000, 31]
    from brc_fast.envs.mjx import MJXVectorEnv

    env = MJXVectorEnv(("mjx/CartpoleBalance", "mjx/Falling"), N)
    starts = [env.reset_tensors(0)[N:, :2]]
    for actions in actions_for(env, 200):
        step = env.step_tensors(actions)
        ended = (step.terminated | step.truncated)[N:]
        starts.append(step.observations[N:, :2][ended])
        assert not (step.terminated | step.truncated)[:N].any()
    starts = torch.cat(starts)
    assert len(starts) > 6 * N
    assert len(starts.unique(dim=0)) == len(starts)


def test_an_action_repeat_adds_rewards_until_the_task_ends():
    env, single = make("mjx/Twice", N), make("mjx/Falling", N, episode_length=1000)
    assert env.max_episode_steps == 16  # 31 steps of the simulation, two per action
    env._keys = single._keys = np.ones((1, 2), np.uint32)
    assert torch.equal(env.reset_tensors(None), single.reset_tensors(None))
    over = torch.zeros(N, dtype=torch.bool)
    for actions in actions_for(env, 10):
        step, first = env.step_tensors(actions), single.step_tensors(actions)
        second = single.step_tensors(actions)
        one = first.terminated & ~over
        two = ~first.terminated & ~over
        assert torch.equal(step.rewards[one], first.rewards[one])
        assert torch.equal(step.rewards[two], (first.rewards + second.rewards)[two])
        over |= step.terminated | first.terminated | second.terminated


def test_a_task_that_calls_the_simulator_inside_a_condition_steps_as_it_does_outside():
    inside, usual = make("mjx/Inside", N), make("mjx/CartpoleSwingup", N)
    inside._keys = usual._keys = np.ones((1, 2), np.uint32)
    assert torch.equal(inside.reset_tensors(None), usual.reset_tensors(None))
    for actions in actions_for(usual, 20):
        np.testing.assert_allclose(
            inside.step_tensors(actions).successors, usual.step_tensors(actions).successors, atol=1e-4
        )


# Domain randomization.


def heavier(model, keys):
    """Every slot's masses times its own factor."""
    factor = jax.vmap(lambda key: jax.random.uniform(key, (), minval=0.2, maxval=5.0))(keys)
    axes = jax.tree.map(lambda leaf: None, model).tree_replace({"body_mass": 0})
    return model.tree_replace({"body_mass": model.body_mass * factor[:, None]}), axes


def test_every_episode_has_a_model_of_its_own():
    env = make("mjx/CartpoleSwingup", N, randomize=heavier, episode_length=5)
    env.reset_tensors(0)
    seen = []
    for actions in actions_for(env, 20):
        masses = np.array(next(v for k, v in env._slots.state[0].items() if k.startswith("model.")))
        seen.append(masses[:, 1])
        env.step_tensors(actions)
    seen = np.array(seen).reshape(4, 5, N)
    assert (seen == seen[:, :1]).all()  # the same throughout an episode
    assert len(np.unique(seen[:, 0])) == 4 * N
    usual = _playground.mj_model("mjx/CartpoleSwingup").body_mass[1]
    assert (seen > 0.2 * usual - 1e-6).all()
    assert (seen < 5 * usual + 1e-6).all()


def test_a_slots_model_is_the_one_it_moves_by():
    env = make("mjx/CartpoleSwingup", N, randomize=heavier)
    plain = make("mjx/CartpoleSwingup", N)
    start = env.reset_tensors(0)
    assert torch.equal(start, plain.reset_tensors(0))
    pushed = torch.ones(N, 1)
    for _ in range(5):
        step, usual = env.step_tensors(pushed), plain.step_tensors(pushed)
    masses = np.array(next(v for k, v in env._slots.state[0].items() if k.startswith("model.")))[:, 1]
    way = (step.successors - start)[:, 0].numpy()
    assert (np.argsort(way) == np.argsort(-masses)).all()  # the lighter, the farther
    assert not torch.allclose(step.successors, usual.successors, atol=1e-3)


def test_a_task_without_randomization_says_so():
    with pytest.raises(InputError, match="no domain randomization for mjx/PendulumSwingup; pass a function"):
        make("mjx/PendulumSwingup", N, randomize=True)


@pytest.mark.parametrize("task", ["Go1JoystickFlatTerrain", "PandaPickCube"])
def test_a_robot_without_the_menagerie_says_where_it_belongs(task, monkeypatch, tmp_path):
    monkeypatch.setattr(_playground.mjx_env, "MENAGERIE_PATH", tmp_path / "menagerie")
    with pytest.raises(
        InputError, match=says(f"mjx/{task} needs the MuJoCo menagerie ... {tmp_path}/menagerie")
    ):
        make(f"mjx/{task}", 3)
    assert not (tmp_path / "menagerie").exists()  # and nothing was downloaded


@pytest.mark.slow
def test_mujoco_warp_steps_as_playground_does_and_restarts_too():
    """It keeps the contacts of all slots together, so its tasks stand side by side without sharing calls."""
    env = make(["mjx/CartpoleBalance", "mjx/CartpoleSwingup"], N, impl="warp", episode_length=6, quiet=True)
    observations = env.reset_tensors(3)
    for task, name in enumerate(("CartpoleBalance", "CartpoleSwingup")):
        playground = _playground._load(name, "warp")
        reset, step = jax.jit(jax.vmap(playground.reset)), jax.jit(jax.vmap(playground.step))
        rows = slice(task * N, (task + 1) * N)
        key = env._keys[task]
        observations = env.reset_tensors(3)
        state = reset(jax.random.split(jax.random.fold_in(key, 0), N))
        for number, actions in enumerate(actions_for(env, 14), start=1):
            np.testing.assert_allclose(observations[rows], state.obs, atol=1e-5)
            state, got = step(state, actions[rows].numpy()), env.step_tensors(actions)
            np.testing.assert_allclose(got.successors[rows], state.obs, atol=1e-5)
            np.testing.assert_allclose(got.rewards[rows], state.reward, atol=1e-5)
            if number % 6 == 0:
                assert got.truncated.all()
                state = reset(jax.random.split(jax.random.fold_in(key, number // 6), N))
            observations = got.observations
    assert env.nan_count.tolist() == [0, 0]


# Kept between processes.

STEP = """
import sys
import torch
from pathlib import Path
from brc_fast.envs import _programs, make

def step():
    _programs.programs.cache_clear()
    env = make("mjx/PendulumSwingup", 2, quiet=True)
    env.reset_tensors(0)
    print(env.step_tensors(torch.ones(2, 1)).successors.tolist())

step()
print(sorted({"mujoco", "mujoco_playground"} & set(sys.modules)))
"""
DAMAGE = """
(file,) = Path(FOLDER).iterdir()
whole = file.read_bytes()
for damaged in (whole[: len(whole) // 2], whole[:80] + b"x" + whole[81:]):
    file.write_bytes(damaged)
    step()
    made = file.stat().st_mtime_ns
    step()
    print(file.read_bytes() != damaged, file.stat().st_mtime_ns == made)
print(sorted({"mujoco", "mujoco_playground"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_a_second_process_traces_nothing_and_a_damaged_file_is_made_anew(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    damage = DAMAGE.replace("FOLDER", repr(str(tmp_path / "brc_fast" / "programs")))
    first, second = (fresh.run(code, environment=environment) for code in (STEP, STEP + damage))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    successors, imported = first.stdout.splitlines()
    assert imported == "['mujoco', 'mujoco_playground']"
    again = [successors, successors, "True True"]  # made anew, then read
    assert second.stdout.splitlines() == [successors, "[]", *again, *again, imported]


def test_a_process_without_stderr_compiles_in_silence(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    with _jax.progress("compiling"):
        time.sleep(1.1)
    assert capsys.readouterr().out == ""
