import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import fresh
import numpy as np
import pytest
import torch
from extras import needs
from refusals import says
from stepping import actions_for, equal, rollout

from brc_fast.envs import expand, list_tasks, make, resolve
from brc_fast.envs.base import Step, check_finite
from brc_fast.errors import InputError

needs_mjx = needs("mjx")
SHARED = Path(os.environ.get("BRC_FAST_SHARED", Path(__file__).resolve().parents[1] / "../shared"))
CARTPOLE, PENDULUM = "mjx/CartpoleSwingup", "mjx/PendulumSwingup"
N = 4  # one number of slots throughout: each task is compiled once


def cartpole(seed=0, episode_length=20):
    return make(CARTPOLE, N, seed, episode_length=episode_length)


def in_new_process(code, **environment):
    return fresh.run(code, environment={**os.environ, **environment})


def spoil(env, leaf, slot, value):
    """Write a number into one slot of the simulator's state."""
    (state,) = env._slots.state
    env._slots = env._slots._replace(state=[{**state, leaf: state[leaf].at[slot].set(value)}])


# Names and errors: none of these needs a simulator.


def test_listing_tasks_imports_no_simulator():
    code = (
        "import sys; from brc_fast.envs import list_tasks, resolve; print(len(list_tasks()));"
        "sys.exit(any(name in sys.modules for name in ('jax', 'mujoco', 'gymnasium')))"
    )
    done = in_new_process(code)
    assert (done.returncode, done.stdout.strip()) == (0, "25"), done.stderr


def test_a_task_id_is_suite_and_name():
    assert resolve(CARTPOLE) == ("mjx", "CartpoleSwingup")
    assert all(resolve(task)[0] == "mjx" for task in list_tasks())
    assert resolve("gym/module:Name-v0") == ("gym", "module:Name-v0")
    assert resolve("metaworld/reach-v2-goal-observable") == resolve("metaworld/reach-v3")


def test_a_suite_stands_for_its_tasks():
    assert expand("mjx/dmc25") == list_tasks()
    assert expand(["dmc/dogs", CARTPOLE])[-2:] == ("dmc/dog-run", CARTPOLE)
    sizes = {"mjx/dmc-easy": 19, "dmc/dogs": 4, "dmc/humanoids": 3, "metaworld/mt50": 50}
    sizes |= {"humanoidbench/h1": 9, "humanoidbench/h1hand": 20}
    assert {suite: len(expand(suite)) for suite in sizes} == sizes


def test_suites_are_the_papers():
    file = SHARED / "published" / "task_lists.json"
    if not file.exists():
        pytest.skip(f"{file} does not exist")
    lists = json.loads(file.read_text())
    assert list_tasks("dmc/dogs") == tuple(f"dmc/{name}" for name in lists["DMC_DOGS"])
    assert list_tasks("dmc/humanoids") == tuple(f"dmc/{name}" for name in lists["DMC_HUMANOIDS"])
    mt50 = ["/".join(resolve(f"metaworld/{name}")) for name in lists["METAWORLD_ALL"]]
    assert list_tasks("metaworld/mt50") == tuple(mt50)
    for suite, name in (("h1", "HB_NOHANDS"), ("h1hand", "HB_HANDS")):
        expected = tuple(f"humanoidbench/{task}" for task in lists[name])
        assert list_tasks(f"humanoidbench/{suite}") == expected
    easy = {resolve(task)[1].lower() for task in list_tasks("mjx/dmc-easy")}
    paper = {
        re.sub("[-_]|catch", "", name).replace("ballincup", "ballincup") for name in lists["METAWORLD_DMC"]
    }
    assert easy <= paper


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tasks": "mjx/CartpoleSwingUp"}, "task 'mjx/CartpoleSwingUp'; nearest: mjx/CartpoleSwingup, "),
        ({"tasks": "metaworld/reech-v3"}, "task 'metaworld/reech-v3'; nearest: metaworld/reach-v3, "),
        ({"tasks": "HopperHop"}, "task 'HopperHop'; did you mean mjx/HopperHop; all names: brc-fast envs"),
        ({"tasks": "HoperHop"}, "task 'HoperHop'; nearest: mjx/HopperHop, ... all names: brc-fast envs"),
        ({"tasks": "Hopper-v5"}, "task 'Hopper-v5'; did you mean gym/Hopper-v5; "),
        ({"tasks": "Hoper-v5"}, "task 'Hoper-v5'; nearest: gym/Hopper-v5, "),
        ({"tasks": "reach-v3"}, "task 'reach-v3'; did you mean metaworld/reach-v3; "),
        ({"tasks": "dog-run"}, "task 'dog-run'; did you mean dmc/dog-run; "),
        ({"tasks": "my_envs:Mine-v0"}, "task 'my_envs:Mine-v0'; did you mean gym/my_envs:Mine-v0; "),
        ({"tasks": "phys2d/CartPole-v1"}, "known suites: mjx, ... did you mean gym/phys2d/CartPole-v1; "),
        ({"tasks": "metaworld/mt5"}, "task 'metaworld/mt5'; nearest: metaworld/mt50, "),
        ({"tasks": "dmc25"}, "task 'dmc25'; nearest: mjx/dmc25, mjx/dmc-easy, "),
        (
            {"tasks": "dm/HopperHop"},
            "suite 'dm' in task 'dm/HopperHop'; known suites: mjx, gym, dmc, envpool, ",
        ),
        ({"tasks": "shadowhand/train"}, "85 objects ... not published ... gym/<module>:<id>"),
        ({"tasks": []}, "tasks must name at least one task, got an empty list"),
        ({"tasks": [CARTPOLE, CARTPOLE]}, f"tasks must differ, but '{CARTPOLE}' is listed 2 times"),
        ({"tasks": [CARTPOLE, "mjx/dmc25"]}, f"tasks must differ, but '{CARTPOLE}' is listed 2 times"),
        ({"num_envs": 0}, "num_envs ... at least 1, got 0"),
        ({"num_envs": 2.5}, "num_envs ... an integer ... got 2.5"),
        ({"seed": -1}, "seed ... at least 0, got -1"),
        ({"episode_length": 0}, "episode_length ... at least 1, got 0"),
        ({"impl": "c++"}, "impl must be 'jax' or 'warp', got 'c++'"),
        ({"randomize": "yes"}, "randomize ... True, False or a function, got 'yes'"),
        ({"tasks": "gym/Pendulum-v1", "step_seconds": 0}, "step_seconds must be positive, got 0"),
        ({"step_seconds": 1.0}, "step_seconds ... dmc/..., gym/..., humanoidbench/... tasks only"),
        ({"restarts": -1}, "restarts ... at least 0, got -1"),
        ({"processes": True}, "processes ... dmc/..., gym/..., humanoidbench/... tasks only"),
        ({"tasks": "gym/Pendulum-v1", "impl": "warp"}, "impl means something to mjx/... tasks only"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name_and_remedy(arguments, words):
    with pytest.raises(InputError, match=says(words)):
        make(**{"tasks": CARTPOLE, "num_envs": N, **arguments})


@pytest.mark.parametrize("missing", ["jax", "gymnasium", "mujoco_playground"])
def test_a_missing_simulator_names_the_extra_to_install(missing):
    code = (
        f"import sys; sys.modules['{missing}'] = None\n"
        "from brc_fast.envs import make\n"
        "from brc_fast.errors import MissingExtraError\n"
        "try: make('mjx/PendulumSwingup', 1)\n"
        "except MissingExtraError as error: print(error)"
    )
    done = in_new_process(code)
    assert 'mjx/... environments needs the [mjx] extra: pip install "brc-fast[mjx]"' in done.stdout, (
        done.stderr
    )


def test_numbers_that_are_not_finite_are_reported_with_task_and_slot():
    class Env:
        task_names = ("first", "second")
        task_ids = np.array([0, 0, 1, 1])

    def step(rewards=0.0, successors=0.0, dropped=False):
        no = torch.zeros(4, dtype=torch.bool)
        out = Step(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4), no, no.clone(), no.clone())
        out.rewards[2], out.successors[2, 1], out.dropped[2] = rewards, successors, dropped
        return out

    check_finite(step(), Env(), 7)
    check_finite(step(rewards=3e38, successors=3e38), Env(), 7)  # the sum overflows, the numbers are fine
    check_finite(step(rewards=float("nan"), dropped=True), Env(), 7)
    for field, value in (("rewards", float("nan")), ("successors", float("inf"))):
        with pytest.raises(InputError, match=f"{field} of second are not finite in environment 2 at step 7"):
            check_finite(step(**{field: value}), Env(), 7)


# One task.


@needs_mjx
def test_every_name_is_in_playgrounds_registry():
    from mujoco_playground import dm_control_suite

    assert {f"mjx/{name}" for name in dm_control_suite.ALL_ENVS} == set(list_tasks())


@needs_mjx
@pytest.mark.slow
@pytest.mark.parametrize("task", list_tasks())
def test_every_task_loads_with_actions_from_minus_one_to_one(task):
    from brc_fast.envs._playground import mj_model

    env = make(task, 2)
    assert env.max_episode_steps == 1000
    assert env.single_observation_space.shape == (env.observation_size,)
    assert env.single_action_space.shape == (env.action_size,)
    model = mj_model(task)
    assert np.array_equal(model.actuator_ctrlrange, np.tile([-1.0, 1.0], (env.action_size, 1)))


@needs_mjx
def test_steps_agree_with_playground_through_several_episodes():
    import jax
    from mujoco_playground import registry

    env = cartpole(episode_length=35)
    observations = env.reset_tensors(5)
    playground = registry.load("CartpoleSwingup", config_overrides={"impl": "jax"})
    reset, step = jax.jit(jax.vmap(playground.reset)), jax.jit(jax.vmap(playground.step))

    def start(episode):
        return reset(jax.random.split(jax.random.fold_in(env._keys[0], episode), N))

    state = start(0)
    for number, actions in enumerate(actions_for(env, 120), start=1):
        np.testing.assert_allclose(observations, state.obs, atol=1e-4)
        state = step(state, actions.numpy())
        got = env.step_tensors(actions)
        np.testing.assert_allclose(got.successors, state.obs, atol=1e-4)
        np.testing.assert_allclose(got.rewards, state.reward, atol=1e-4)
        ended = number % 35 == 0
        assert got.truncated.tolist() == [ended] * N
        assert not got.terminated.any()
        assert not got.dropped.any()
        if ended:
            state = start(number // 35)
        else:
            assert torch.equal(got.observations, got.successors)
        observations = got.observations


@needs_mjx
def test_every_restart_has_a_start_state_of_its_own():
    env = cartpole(episode_length=2)
    starts = [env.reset_tensors(0)]
    starts += [step.observations for step in rollout(env, actions_for(env, 100))[1::2]]
    starts = torch.cat(starts)
    assert len(starts) == 51 * N
    assert len(starts.unique(dim=0)) == 51 * N
    assert (starts[:, 1] < -0.99).all()  # the pole hangs down: cosine of its angle


@needs_mjx
def test_actions_on_a_gpu_are_there_and_aligned_when_jax_reads_them(monkeypatch):
    """A CPU client of JAX, as some of a GPU's, has no stream that could wait for torch's."""
    import jax

    from brc_fast.envs import mjx

    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(True))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.dlpack, "from_dlpack", lambda actions: actions)
    rows = torch.arange(9.0)
    for actions in (rows[:8].view(4, 2), rows[1:].view(4, 2), rows[:8].view(2, 4).T):
        given = mjx._to_jax(actions)
        assert given.data_ptr() % 16 == 0
        assert given.is_contiguous()
        assert torch.equal(given, actions)
    assert len(waited) == 3
    monkeypatch.setattr(mjx, "_waits", lambda: True)
    mjx._to_jax(rows)
    assert len(waited) == 3


@needs_mjx
def test_start_states_are_computed_when_nothing_of_torchs_is_under_way(monkeypatch):
    """Their program takes no actions: in memory that was torch's, only the host can make it wait."""
    from brc_fast.envs import mjx

    env, told = cartpole(episode_length=2), []
    monkeypatch.setattr(mjx, "_wait_for_torch", lambda: told.append("wait"))
    env.compile()
    reset = env._programs.reset
    monkeypatch.setattr(env._programs, "reset", lambda *given: (told.append("reset"), reset(*given))[1])
    env.reset_tensors(0)
    assert told == ["wait", "reset", "reset"]
    rollout(env, actions_for(env, 8))
    assert len(told) > 6
    assert told[3:] == ["wait", "reset"] * (len(told[3:]) // 2)


@needs_mjx
def test_slots_that_end_at_different_times_never_share_a_start_state():
    import jax.numpy as jnp

    env = cartpole(episode_length=7)
    env.reset_tensors(0)
    env._slots = env._slots._replace(steps=jnp.array([0, 2, 3, 3], jnp.int32))
    steps = rollout(env, actions_for(env, 140))
    starts = torch.cat([step.observations[step.truncated] for step in steps])
    assert len(starts) == 20 * N
    assert len(starts.unique(dim=0)) == 20 * N


@needs_mjx
def test_gymnasium_steps_carry_the_final_observation_in_its_own_format():
    import gymnasium
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    class Plain(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (5,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.zeros(5, np.float32), {}

        def step(self, action):
            return np.zeros(5, np.float32), 0.0, False, True, {"dropped": False}

    model = SyncVectorEnv([Plain] * N, autoreset_mode=AutoresetMode.SAME_STEP)
    model.reset()
    expected = model.step(np.zeros((N, 1), np.float32))[4]

    env, twin = cartpole(seed=2, episode_length=3), cartpole(episode_length=3)
    observations, info = env.reset()  # no seed: the one given to make
    assert info == {}
    assert np.array_equal(observations, twin.reset_tensors(2))
    for number, actions in enumerate(actions_for(env, 6), start=1):
        observations, rewards, terminations, truncations, infos = env.step(actions.numpy())
        step = twin.step_tensors(actions)
        assert env.observation_space.contains(observations)
        assert np.array_equal(observations, step.observations)
        assert np.array_equal(rewards, step.rewards)
        assert not terminations.any()
        assert truncations.tolist() == [number % 3 == 0] * N
        if number % 3:
            assert infos == {}
            continue
        assert infos.keys() == expected.keys()
        assert infos["final_info"].keys() == expected["final_info"].keys()
        assert infos["final_obs"].dtype == expected["final_obs"].dtype == object
        assert infos["_final_obs"].dtype == expected["_final_obs"].dtype == bool
        assert np.array_equal(np.stack(infos["final_obs"]), step.successors)
        assert not np.array_equal(np.stack(infos["final_obs"]), observations)


@needs_mjx
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("leaf", ["data.qpos", "data.qvel"])
def test_a_slot_that_turns_nan_is_restarted_dropped_and_counted(leaf, value):
    env, healthy = cartpole(), cartpole()
    before = env.reset_tensors(0)
    healthy.reset_tensors(0)
    assert env.nan_count.tolist() == [0]
    spoil(env, leaf, 2, value)
    actions = actions_for(env, 30)
    step, expected = env.step_tensors(actions[0]), healthy.step_tensors(actions[0])
    assert step.dropped.tolist() == step.truncated.tolist() == [False, False, True, False]
    assert not step.terminated.any()
    assert step.rewards[2] == 0
    assert torch.equal(step.successors[2], before[2])
    assert not torch.equal(step.observations[2], before[2])
    others = torch.tensor([0, 1, 3])
    assert equal([x[others] for x in step], [x[others] for x in expected])
    check_finite(step, env, 1)
    for number, later in enumerate(rollout(env, actions[1:]), start=2):
        check_finite(later, env, number)
        assert not later.dropped.any()
    assert env.nan_count.tolist() == [1]


@needs_mjx
def test_gymnasium_steps_mark_a_dropped_transition():
    env = cartpole()
    env.reset(seed=0)
    spoil(env, "data.qvel", 1, float("nan"))
    infos = env.step(np.zeros((N, 1), np.float32))[4]
    assert (
        infos["final_info"]["dropped"].tolist()
        == infos["_final_info"].tolist()
        == [False, True, False, False]
    )
    assert [x is None for x in infos["final_obs"]] == [True, False, True, True]


@needs_mjx
def test_actions_may_be_strided_or_need_gradients_or_come_from_numpy():
    actions = actions_for(cartpole(), 1)[0]
    wide = torch.zeros(N, 3)
    wide[:, 1:2] = actions
    results = []
    for variant in (
        actions,
        wide[:, 1:2],
        actions.clone().requires_grad_(),
        actions.double(),
        actions.numpy(),
    ):
        env = cartpole()
        env.reset_tensors(0)
        results.append(env.step_tensors(variant))
    assert all(equal(results[0], other) for other in results[1:])


@needs_mjx
def test_a_saved_state_goes_on_bit_for_bit(tmp_path: Path):
    env = cartpole()
    env.reset_tensors(0)
    actions = actions_for(env, 100)
    spoil(env, "data.qpos", 0, float("nan"))  # slots out of step with each other
    last = rollout(env, actions[:33])[-1]
    np.savez(tmp_path / "state.npz", **env.state_dict())
    expected = rollout(env, actions[33:])

    other = cartpole(seed=9)
    with np.load(tmp_path / "state.npz") as file:
        observations = other.load_state_dict(dict(file))
    assert torch.equal(observations, last.observations)
    assert all(map(equal, rollout(other, actions[33:]), expected))
    assert other.nan_count.tolist() == env.nan_count.tolist() == [1]


@needs_mjx
def test_a_saved_state_that_does_not_fit_is_refused():
    env = cartpole()
    env.reset_tensors(0)
    state = env.state_dict()
    missing = {name: value for name, value in state.items() if name != "leaf/0001"}
    first = state["leaf/0000"]
    for wrong, words in (
        (missing, f"must hold {len(state)} arrays, got {len(state) - 1}; ... leaf/0001"),
        ({**state, "leaf/0000": first[:2]}, "leaf/0000 ... must be float32[4 ... got float32[2"),
        ({**state, "leaf/0000": first.astype(float)}, "leaf/0000 ... must be float32[4 ... got float64[4"),
        ({**state, "fills": state["fills"] + 2**40}, "counts of resets and start states that disagree"),
        ({**state, "fills": state["fills"] * np.array([1, 0])}, "that disagree"),
        (
            {**state, "used": state["used"] + 2**30},
            "that disagree",
        ),  # else start states would be made for hours
        ({**state, "used": state["used"] - 1}, "that disagree"),
    ):
        with pytest.raises(InputError, match=says(words)):
            env.load_state_dict(wrong)


@needs_mjx
def test_environments_of_one_size_share_what_is_compiled():
    first, second = cartpole(), cartpole(seed=1, episode_length=100)
    assert first._programs is second._programs
    assert (first.max_episode_steps, second.max_episode_steps) == (20, 100)


@needs_mjx
@pytest.mark.parametrize(("used", "preallocates"), [("", "false"), ("jax.devices(); ", "true")])
def test_jax_leaves_memory_to_torch_unless_it_was_used_before(used, preallocates):
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    code = f"import os; os.environ.pop({name!r}, None); import jax; {used}"
    code += f"from brc_fast.envs import _jax; _jax.setup(); print(os.environ[{name!r}])"
    done = in_new_process(code)
    assert done.stdout.strip() == preallocates, done.stderr


@needs_mjx
def test_compiled_programs_are_kept_between_processes_and_progress_is_shown(tmp_path: Path):
    code = "from brc_fast.envs import make; make('mjx/PendulumSwingup', 1).reset_tensors(0)"
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    environment.update({name: "" for name in os.environ if name == "JAX_COMPILATION_CACHE_DIR"})
    done = in_new_process(code, **environment)
    assert done.returncode == 0, done.stderr
    names = [file.name for file in (tmp_path / "brc_fast" / "jax").iterdir()]
    assert any("reset" in name for name in names)
    assert any("step" in name for name in names)
    assert "tracing mjx/PendulumSwingup ... took" in done.stderr
    assert "compiling mjx/PendulumSwingup for 1 environments ... took" in done.stderr
    assert done.stdout == ""


# Several tasks.


@needs_mjx
def test_a_list_of_one_task_is_that_task():
    assert type(make([CARTPOLE], N)) is type(make(CARTPOLE, N))


@needs_mjx
def test_tasks_side_by_side_step_as_each_does_alone_and_are_padded_with_zeros():
    both = make([CARTPOLE, PENDULUM], N, episode_length=20)
    assert both.task_names == (CARTPOLE, PENDULUM)
    assert both.task_ids.tolist() == [0] * N + [1] * N
    assert (both.num_envs, both.observation_size, both.action_size) == (2 * N, 5, 1)
    alone = [make(task, N, episode_length=20) for task in (CARTPOLE, PENDULUM)]

    observations = both.reset_tensors(1)
    parts = [env.reset_tensors(1) for env in alone]
    for actions in actions_for(both, 50):
        assert torch.equal(observations[:N], parts[0])
        assert torch.equal(observations[N:, :3], parts[1])
        assert not observations[N:, 3:].any()
        step = both.step_tensors(actions)
        first, second = alone[0].step_tensors(actions[:N]), alone[1].step_tensors(actions[N:])
        assert torch.equal(step.successors[:N], first.successors)
        assert torch.equal(step.successors[N:, :3], second.successors)
        assert not step.successors[N:, 3:].any()
        assert equal(step[2:], [torch.cat(pair) for pair in zip(first[2:], second[2:], strict=True)])
        observations, parts = step.observations, [first.observations, second.observations]


@needs_mjx
def test_several_tasks_save_and_load_and_count_nan_per_task():
    env, other = (make([CARTPOLE, PENDULUM], N, seed, episode_length=20) for seed in (0, 1))
    env.reset_tensors(0)
    spoil(env.groups[1], "data.qpos", 0, float("nan"))
    actions = actions_for(env, 60)
    rollout(env, actions[:30])
    state = env.state_dict()
    assert env.nan_count.tolist() == [0, 1]
    other.load_state_dict(state)
    assert all(map(equal, rollout(env, actions[30:]), rollout(other, actions[30:])))
    surplus = {**state, "mjx/HopperHop:keys": state[f"{CARTPOLE}:keys"]}
    with pytest.raises(InputError, match="'mjx/HopperHop:keys', which belongs to none of the tasks mjx/Cart"):
        other.load_state_dict(surplus)


@needs_mjx
def test_several_tasks_are_a_gymnasium_environment_too():
    env = make([CARTPOLE, PENDULUM], N, episode_length=2)
    observations, _ = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    for _ in range(2):
        observations, _, _, truncations, infos = env.step(env.action_space.sample())
    assert truncations.all()
    assert np.stack(infos["final_obs"]).shape == observations.shape == (2 * N, 5)
