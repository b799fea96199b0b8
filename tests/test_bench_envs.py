"""The benchmark of environments times nothing that is wrong and says what it left out."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from extras import needs, require

require("gymnasium")

ROOT = Path(__file__).resolve().parent.parent
PENDULUM = "gym/Pendulum-v1"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import bench_envs

    monkeypatch.setattr(bench_envs, "write", partial(bench_envs.write, folder=tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # main sets it too, and this takes it back
    return bench_envs


def test_rows_hold_rates_ratios_and_the_machine(bench, tmp_path, capsys):
    words = ["--tasks", PENDULUM, "gym/Nope-v1", "--num-envs", "2", "--budget", "2", "--save", "envs"]
    assert bench.main(words) == 0
    stored = json.loads((tmp_path / "envs.json").read_text())
    assert {"benchmark", "cpu", "versions", "commit", "simulators", "rows"} <= stored.keys()
    timed, missing = stored["rows"]
    assert (timed["task"], timed["num_envs"]) == (PENDULUM, 2)
    assert timed["steps_per_second"].keys() == {"ours", "library"}
    assert all(rate > 0 for rate in timed["steps_per_second"].values())
    middle, low, high = timed["times_library"]
    assert 0 < low <= middle <= high
    assert timed["rounds"] >= 3
    assert "gym/Nope-v1" in missing["missing"]
    assert stored["equality"] == "passed"
    ours, _, absent, _ = stored["measurements"]
    assert (ours["case"], ours["provider"], ours["unit"]) == (f"{PENDULUM} num_envs=2", "ours", "steps/s")
    assert ours["value"] == timed["steps_per_second"]["ours"]
    assert ours["low"] <= ours["value"] <= ours["high"]
    assert (absent["value"], absent["missing"]) == (None, missing["missing"])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head == bench.HEAD
    assert first.split()[:2] == [PENDULUM, "2"]
    assert first.split()[2] == f"{timed['steps_per_second']['ours']:.0f}"
    assert second.endswith(missing["missing"])


@pytest.mark.parametrize("task", ["dmc/cartpole-swingup", "envpool/CartpoleSwingup-v1", "metaworld/reach-v3"])
def test_every_library_takes_the_same_actions_to_the_same_rewards(task, bench):
    require("dmc" if task.startswith("dmc/") else "envpool")
    row = bench.compare(task, 2, 0.0)
    assert "missing" not in row, row
    assert row["rounds"] == 3


@pytest.mark.slow
@needs("mjx")
def test_playground_takes_the_same_actions_to_the_same_rewards(bench):
    row = bench.compare("mjx/PendulumSwingup", 4, 0.0)
    assert "missing" not in row, row


def test_rewards_that_differ_are_not_timed(bench, monkeypatch, capsys, tmp_path):
    prepare = bench._scaled
    monkeypatch.setattr(bench, "_scaled", lambda actions, space: prepare(-actions, space))
    assert bench.main(["--tasks", PENDULUM, "--num-envs", "2", "--budget", "2", "--save", "envs"]) == 1
    stored = json.loads((tmp_path / "envs.json").read_text())
    assert stored["equality"].startswith(f"failed: {PENDULUM} num_envs=2 differs in step 2: rewards")
    assert [entry["value"] for entry in stored["measurements"]] == [None, None]
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[2:6] == ["-", "-", "differs", "in"]


def test_an_option_that_cannot_be_is_one_line(bench, capsys):
    assert bench.main(["--num-envs", "2", "0"]) == 2
    assert capsys.readouterr().err == "bench_envs: --num-envs must be at least 1\n"


def test_the_help_says_what_the_budget_does_not_hold(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    assert "starts come on top" in capsys.readouterr().out


def test_every_task_is_stepped_with_every_number_of_slots(bench):
    rows = bench.run([PENDULUM], [1, 2], 0.0)
    assert [row["num_envs"] for row in rows] == [1, 2]
    assert all(row["rounds"] >= 3 for row in rows)


def test_actions_are_scaled_to_the_bounds_of_the_space(bench):
    from gymnasium.spaces import Box

    space = Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 3.0], np.float32))
    actions = np.array([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]], np.float32)
    assert bench._scaled(actions, space).tolist() == [[-2.0, 3.0], [2.0, 0.0], [0.0, 1.5]]


@pytest.mark.slow
@needs("mjx")
def test_the_second_start_of_a_process_finds_the_first_ones_programs(bench, tmp_path, capsys):
    words = ["--start", "--tasks", "mjx/PendulumSwingup", "--num-envs", "1", "--save", "start"]
    assert bench.main(words) == 0
    (stored,) = json.loads((tmp_path / "start.json").read_text())["starts"]
    assert stored["task"] == "mjx/PendulumSwingup"
    assert stored["ratio"] == stored["first"] / stored["second"] > 0
    assert f"first process {stored['first']:.1f} s" in capsys.readouterr().out


def test_a_process_that_makes_no_step_is_an_error(bench):
    with pytest.raises(RuntimeError, match="gym/Nope-v1 made no step, exit code 1"):
        bench.start("gym/Nope-v1", 1)


def test_a_device_that_is_not_there_is_one_line_or_the_reason_of_a_row(bench, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "bench_envs: torch sees no CUDA device\n"
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(default_backend=lambda: "cpu"))
    monkeypatch.setattr(bench, "make", lambda *words, **named: SimpleNamespace(close=lambda: None))
    row = bench.compare("mjx/CartpoleSwingup", 1, 0.0, "cuda")
    assert row["missing"].startswith("JAX sees no GPU, its backend is cpu; ")
