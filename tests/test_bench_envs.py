"""The benchmark of environments times nothing that is wrong and says what it left out."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from extras import needs, require

require("gymnasium")

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import bench_envs
import harness

PENDULUM = "gym/Pendulum-v1"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # main sets it too, and this takes it back
    return bench_envs


def compared(bench, task, slots=2, device="cpu"):
    found = bench.Results("envs")
    bench.compare(found, task, slots, harness.Clock(0.0), device)
    return found


def test_every_task_has_rates_and_a_ratio_and_one_that_is_not_there_its_reason(bench, tmp_path):
    words = ["--tasks", PENDULUM, "gym/Nope-v1", "--num-envs", "2", "3", "--budget", "2"]
    assert bench.main([*words, "--save", str(tmp_path / "envs")]) == 0
    stored = harness.read(tmp_path / "envs.json")
    ours, library, *_ = stored["measurements"]
    assert (ours["case"], ours["provider"], ours["unit"]) == (f"{PENDULUM} num_envs=2", "ours", "steps/s")
    assert ours["at"] == {"steps/s": PENDULUM, "slots": 2}
    assert 0 < ours["low"] <= ours["value"] <= ours["high"]
    middle, low, high = library["ratio"]
    assert 0 < low <= middle <= high
    assert [one["at"]["slots"] for one in stored["measurements"]] == [2, 2, 3, 3] * 2
    assert all("gym/Nope-v1" in one["missing"] for one in stored["measurements"][4:])
    assert stored["equality"] == "passed"


@pytest.mark.parametrize("task", ["dmc/cartpole-swingup", "envpool/CartpoleSwingup-v1", "metaworld/reach-v3"])
def test_every_library_takes_the_same_actions_to_the_same_rewards(task, bench):
    require("dmc" if task.startswith("dmc/") else "envpool")
    assert all(one["value"] > 0 for one in compared(bench, task).entries)


@pytest.mark.slow
@needs("mjx")
def test_playground_takes_the_same_actions_to_the_same_rewards(bench):
    assert all(one["value"] > 0 for one in compared(bench, "mjx/PendulumSwingup", 4).entries)


def test_rewards_that_differ_are_not_timed_and_fail_the_result(bench, monkeypatch, capsys):
    prepare = bench.scaled
    monkeypatch.setattr(bench, "scaled", lambda actions, space: prepare(-actions, space))
    found = compared(bench, PENDULUM)
    assert [one["value"] for one in found.entries] == [None, None]
    told = f"failed: ours at {PENDULUM} num_envs=2 differs in step 2: rewards"
    assert found.equality.startswith(told)
    assert found.end() == 1
    assert "steps/s" not in capsys.readouterr().out


def test_actions_are_scaled_to_the_bounds_of_the_space(bench):
    from gymnasium.spaces import Box

    space = Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 3.0], np.float32))
    actions = np.array([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]], np.float32)
    assert bench.scaled(actions, space).tolist() == [[-2.0, 3.0], [2.0, 0.0], [0.0, 1.5]]


def test_a_suite_of_several_tasks_is_stepped_by_ours_alone(bench, monkeypatch):
    suite, make = [PENDULUM, "gym/MountainCarContinuous-v0"], bench.make
    monkeypatch.setattr(bench, "expand", lambda name: suite)
    monkeypatch.setattr(bench, "make", lambda name, *rest, **named: make(suite, *rest, **named))
    ours, library = compared(bench, "dmc/dogs", 3).entries
    assert (ours["at"]["slots"], library["value"], library["missing"]) == (6, None, str(bench.ALONE))
    assert ours["value"] > 0


def test_mjx_on_another_device_than_the_agent_is_the_reason_of_a_case(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(default_backend=lambda: "cpu"))
    monkeypatch.setattr(bench, "make", lambda *words, **named: SimpleNamespace(close=lambda: None))
    found = compared(bench, "mjx/CartpoleSwingup", 1, "cuda")
    assert found.entries[0]["missing"].startswith("JAX sees no GPU, its backend is cpu; ")
