"""How a run ends before its time: what is saved, what is said, and that it goes on as if it had not ended."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from extras import require
from refusals import says
from run_folders import arrays, assert_same_run, rows_without_time

require("train")

from brc_fast import envs
from brc_fast.command import main as cli
from brc_fast.errors import WorkerError
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.interrupt import Interrupted, Stopped, StopRequest
from brc_fast.runs.metrics import MetricsWriter
from brc_fast.runs.trainer import Trainer

SHORT = [
    *("--num-envs", "4", "--steps", "120", "--random-steps", "40", "--batch-size", "16"),
    *("--critic.width", "8", "--actor.width", "8", "--report-every", "20", "--eval-every", "40"),
    *("--eval-episodes", "2", "--checkpoint-every", "60"),
]
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 138, "SIGUSR2": 140, "SIGXCPU": 152}
EVALUATION = 40  # steps: an episode of the toy environment, with the mean action and with sampled ones


def train(run: Path, *words: str) -> int:
    return cli.main(["train", "toy/One", "--run", str(run), *SHORT, *words])


def resume(run: Path, *words: str) -> int:
    return cli.main(["train", "--resume", str(run), *words])


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    return capfd.readouterr().err.strip().splitlines()[-1]


def after_collecting(monkeypatch: pytest.MonkeyPatch, steps: int, what: Callable[[], object]) -> None:
    """Do something when the environments have reached a step."""
    collect = Trainer.collect

    def doing(self: Trainer) -> None:
        collect(self)
        if self.steps == steps:
            what()

    monkeypatch.setattr(Trainer, "collect", doing)


def within_evaluation(monkeypatch: pytest.MonkeyPatch, total: int, what: Callable[[], object]) -> list[int]:
    """Do something in the step `total` of all evaluations together; the list holds their steps."""
    toy_env = type(envs.make(("toy/One",), 1))
    step_tensors, steps = toy_env.step_tensors, []

    def doing(self: Any, actions: Any) -> Any:
        if self.num_envs == 2:
            steps.append(self.total + 1)
            if steps[-1] == total:
                what()
        return step_tensors(self, actions)

    monkeypatch.setattr(toy_env, "step_tensors", doing)
    return steps


def raiser(error: BaseException) -> Callable[[], None]:
    def raising() -> None:
        raise error

    return raising


@pytest.fixture(autouse=True)
def unheard() -> Iterator[None]:
    """A signal that a run does not hear does nothing, instead of ending the tests."""
    before = {number: signal.signal(number, lambda *_: None) for number in StopRequest.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def whole(toy: dict, tmp_path: Path) -> Path:
    """A run that was never stopped."""
    run = tmp_path / "whole"
    assert train(run) == 0
    return run


@pytest.mark.parametrize("name", CODES)
def test_each_signal_ends_a_run_saved_and_with_its_customary_exit_code(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    after_collecting(monkeypatch, 52, lambda: signal.raise_signal(number))
    assert train(tmp_path / "run") == CODES[name]
    assert RunFolder(tmp_path / "run").steps() == [52]
    told = capfd.readouterr()
    assert f"\n{name}: the run is saved and ends after this step" in told.err
    assert f"stopped at step 52; go on with: brc-fast train --resume {tmp_path / 'run'}\n" in told.out
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("total", "step"), [(EVALUATION + 5, 80), (2 * EVALUATION + 5, 120)], ids=["middle", "last"]
)
def test_a_signal_ends_an_evaluation_which_is_made_after_the_resume(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, step: int
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        steps = within_evaluation(patch, total, lambda: signal.raise_signal(signal.SIGTERM))
        assert train(run) == 143
    assert steps[-1] == total  # none after the signal
    assert RunFolder(run).steps()[-1] == step
    newest = [row for row in rows_without_time(run) if row["step"] == step]
    assert len(newest) == 1
    assert "train/updates" in newest[0]
    assert resume(run) == 0
    assert_same_run(whole, run)


def test_a_run_that_dies_after_a_late_evaluation_does_not_write_it_twice(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        within_evaluation(patch, EVALUATION + 5, lambda: signal.raise_signal(signal.SIGTERM))
        assert train(run) == 143
    with monkeypatch.context() as patch:
        after_collecting(patch, 92, raiser(SystemExit(9)))  # the checkpoint of step 80 is still the newest
        with pytest.raises(SystemExit):
            resume(run)
    assert resume(run) == 0
    assert_same_run(whole, run)


def test_a_signal_that_comes_with_the_last_row_ends_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save = Trainer.save

    def late(self: Trainer, folder: RunFolder) -> None:
        save(self, folder)
        if self.steps == 120:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "save", late)
    assert train(tmp_path / "run") == 0
    assert "go on with" not in capfd.readouterr().out
    assert_same_run(whole, tmp_path / "run")


def test_a_second_signal_ends_the_run_at_once_with_its_own_code(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)
        signal.raise_signal(signal.SIGHUP)

    after_collecting(monkeypatch, 52, twice)
    assert train(tmp_path / "run") == 129
    assert last_line(capfd) == "brc-fast: interrupted; nothing was saved after the newest checkpoint"
    assert not RunFolder(tmp_path / "run").steps()


def test_signals_that_come_together_and_a_limit_told_again_are_one_request() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # of `timeout`: to the process and to its group
        time.sleep(0.3)
        signal.raise_signal(signal.SIGXCPU)  # each further second
        with pytest.raises(Stopped):
            stop.check()
        assert stop.signal == signal.SIGTERM
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGUSR1)


@pytest.fixture
def ignored() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_hangup_that_nohup_ignores_stays_ignored_and_an_interrupt_does_not(ignored: None) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        stop.check()
        signal.raise_signal(signal.SIGINT)
        assert stop
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_an_environment_that_raises_costs_one_step(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my run"
    toy_env = type(envs.make(("toy/One",), 1))
    step_tensors = toy_env.step_tensors

    def failing(self: Any, actions: Any) -> Any:
        if self.num_envs == 4 and self.total == 20:
            raise WorkerError("toy/One, at step 21: slot 1 raised OSError: lost the robot")
        return step_tensors(self, actions)

    with monkeypatch.context() as patch:
        patch.setattr(toy_env, "step_tensors", failing)
        assert train(run) == 1
        told = last_line(capfd)
        assert told == (
            "brc-fast: toy/One, at step 21: slot 1 raised OSError: lost the robot; saved at step 80; "
            f"go on with: brc-fast train --resume '{run}'; traceback in {run / 'error.txt'}"
        )
        assert "WorkerError" in (run / "error.txt").read_text()
        assert RunFolder(run).steps() == [60, 80]
        assert arrays(run)["progress"]["updates"] == (80 - 40) // 4 + 1
        before = (run / "checkpoints").stat().st_mtime_ns
        assert resume(run) == 1  # it still fails: what there is, is kept
        assert (run / "checkpoints").stat().st_mtime_ns == before
    assert resume(run) == 0


def test_before_the_first_step_there_is_nothing_to_go_on_from(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    toy_env = type(envs.make(("toy/One",), 1))
    with monkeypatch.context() as patch:
        patch.setattr(toy_env, "reset_tensors", lambda *_: raiser(ValueError("no connection"))())
        assert train(tmp_path / "run") == 1
    told = last_line(capfd)
    assert told.startswith(
        "brc-fast: ValueError: no connection; there is no checkpoint: train it anew, with --over"
    )
    with monkeypatch.context() as patch:  # killed while it begins anew
        unlink = Path.unlink

        def stopping(path: Path, **options: Any) -> None:
            if path.name == "metrics.jsonl":
                raise OSError("the disk is gone")
            unlink(path, **options)

        patch.setattr(Path, "unlink", stopping)
        assert train(tmp_path / "run", "--resume", "auto") != 0
    assert train(tmp_path / "run", "--resume", "auto") == 0


def test_an_evaluation_that_fails_is_made_after_the_resume(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        within_evaluation(patch, EVALUATION + 5, raiser(RuntimeError("the camera\nfell off")))
        assert train(run) == 1
    assert last_line(capfd).startswith("brc-fast: RuntimeError: the camera fell off; saved at step 80; go on")
    assert resume(run) == 0
    assert_same_run(whole, run)


@pytest.mark.parametrize("what", ["report", "evaluation", "picture"])
def test_a_full_disk_under_a_log_loses_no_row(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    run, full = tmp_path / "run", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    kind = {"report": "train/updates", "evaluation": "eval/return_mean"}.get(what)
    write = MetricsWriter.write

    def refusing(self: MetricsWriter, step: int, values: Any) -> Any:
        if step == 80 and kind in values:
            raise full
        return write(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", refusing)
        if what == "picture":
            patch.setattr("brc_fast.runs.plot.plot", lambda *_, **__: raiser(full)())
        assert train(run) == 1
    saved = 40 if what == "picture" else 80
    assert re.search(rf"No space left on device; saved at step {saved}; go on with", last_line(capfd))
    assert resume(run) == 0
    assert_same_run(whole, run)


def test_a_disk_that_is_full_for_the_checkpoint_too_leaves_the_earlier_one(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def filled() -> None:
        monkeypatch.setattr(MetricsWriter, "write", full)
        monkeypatch.setattr("brc_fast.runs.checkpoint.write_text", full)
        monkeypatch.setattr(cli, "write_text", full)

    after_collecting(monkeypatch, 80, filled)
    assert train(tmp_path / "run") == 1
    told = last_line(capfd)
    assert re.search(
        says("not saved at step 80 ... No space left ... checkpoint 60 is still there); go on"), told
    )
    assert "error.txt" not in told
    assert RunFolder(tmp_path / "run").steps() == [60]


@pytest.mark.parametrize("how", ["raises", "is not finite"])
def test_nothing_is_saved_of_a_learner_that_failed(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    run, learn = tmp_path / "run", Trainer.learn

    def failing(self: Trainer) -> None:
        if self.steps == 72 and how == "is not finite":
            self.agent.state_dict()["actor/body.head.kernel"].fill_(float("nan"))
        learn(self)
        if self.steps == 72 and how == "raises":
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "learn", failing)
        assert train(run) == 1
    told = last_line(capfd)
    assert ("RuntimeError: out of memory" if how == "raises" else "finite") in told
    assert f"go on with: brc-fast train --resume {run}" in told
    assert RunFolder(run).steps() == [60]
    assert resume(run) == 0


def test_processes_and_evaluations_may_change_on_a_resume_and_the_task_may_not(
    toy: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run, "--steps", "80") == 0
    for words in (["--env.episode-length", "9"], ["--env.randomize"], ["--critic.width", "16"]):
        assert resume(run, "--steps", "120", *words) == 2
        name = words[0].removeprefix("--").replace("-", "_")
        assert f"{name} cannot change when a run is resumed" in last_line(capfd)
    words = ["--env.restarts", "9", "--env.step-seconds", "5", "--env.processes", "False"]
    assert resume(run, "--steps", "120", "--eval-episodes", "4", "--eval-every", "20", *words) == 0
    config = RunFolder(run).config()
    assert (config.env.restarts, config.eval_episodes) == (9, 4)
    evaluated = [row["step"] for row in rows_without_time(run) if "eval/return_mean" in row]
    assert evaluated == [40, 80, 100, 120]


def test_resume_auto_starts_goes_on_and_ends_by_the_same_words(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, auto = tmp_path / "run", ("--resume", "auto")
    with monkeypatch.context() as patch:
        after_collecting(patch, 44, raiser(SystemExit(9)))
        with pytest.raises(SystemExit):
            train(run, *auto)
    assert not RunFolder(run).steps()
    assert len(rows_without_time(run)) == 3
    with monkeypatch.context() as patch:
        after_collecting(patch, 72, lambda: signal.raise_signal(signal.SIGUSR1))
        assert train(run, *auto) == 138
    assert train(run, *auto, "--critic.width", "16") == 2
    assert last_line(capfd).startswith(
        "brc-fast: critic.width cannot change when a run is resumed: it was 8; only"
    )
    assert train(run, *auto) == 0
    assert_same_run(whole, run)
    assert train(run, *auto) == 0
    assert "is at step 120 already" in capfd.readouterr().out


def test_resume_auto_does_not_take_a_folder_that_holds_no_run_of_ours(
    toy: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "run" / "checkpoints" / "mine"
    mine.mkdir(parents=True)
    assert train(tmp_path / "run", "--resume", "auto") == 2
    assert "already holds a run" in last_line(capfd)
    assert mine.exists()


def test_an_environment_whose_processes_are_gone_still_has_its_state() -> None:
    require("gym")
    from brc_fast.envs.gym import make_gym

    env = make_gym("gym/Pendulum-v1", 2, processes=True, restarts=0)
    env.reset_tensors(0)
    os.kill(env.venv.processes[0].pid, signal.SIGKILL)
    import torch

    with pytest.raises(WorkerError):
        env.step_tensors(torch.zeros(2, 1))
    state = env.state_dict()
    again = make_gym("gym/Pendulum-v1", 2, restarts=0)
    assert again.load_state_dict(state).shape == (2, 3)
    again.close()


def test_what_a_simulator_raises_is_one_line_and_its_traceback_is_in_a_file(tmp_path: Path) -> None:
    """In a process of its own: pytest takes what is logged."""
    require("gym")
    (tmp_path / "falls.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "class Falls(PendulumEnv):\n"
        "    steps = 0\n"
        "    def step(self, action):\n"
        "        Falls.steps += 1\n"
        "        if Falls.steps == 30:\n"
        "            raise OSError('the gripper is gone')\n"
        "        return super().step(action)\n"
        "gymnasium.register('Falls-v0', Falls, max_episode_steps=20)\n"
    )
    words = ["train", "gym/falls:Falls-v0", "--run", "run", *SHORT, "--eval-every", "1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "brc_fast", *words]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    told = ended.stderr
    assert ended.returncode == 1, told
    assert "slot" in told.splitlines()[-1]
    assert "OSError: the gripper is gone; saved at step" in told.splitlines()[-1]
    assert "Traceback" not in told
    assert "raise OSError('the gripper is gone')" in (tmp_path / "run" / "error.txt").read_text()


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
def test_a_signal_to_the_whole_group_ends_a_run_with_worker_processes_in_order(tmp_path: Path) -> None:
    require("gym")
    words = [
        "gym/Pendulum-v1",
        "--run",
        "run",
        *SHORT,
        "--env.processes",
        "True",
        "--env.episode-length",
        "20",
    ]
    words += ["--steps", "1000000", "--eval-every", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "brc_fast", "train", *words],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        told += line
        if line.startswith("step 60 of"):
            os.killpg(process.pid, signal.SIGTERM)
            break
    told += process.stderr.read()
    assert process.wait() == 143, told
    assert "Traceback" not in told
    assert "starting all" not in told
    assert RunFolder(tmp_path / "run").steps()[-1] >= 60


def strikes(folder: Path, *words: str) -> None:
    script = Path(__file__).with_name("run_kills.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script), str(folder), *words], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "strikes: every run went on and equals one that was never stopped" in result.stdout


@pytest.mark.slow
def test_a_run_struck_at_random_moments_equals_one_never_stopped(tmp_path: Path) -> None:
    strikes(tmp_path, "--kills", "4", "--signals", "6")


@pytest.mark.exhaustive
def test_a_run_struck_at_more_random_moments_equals_one_never_stopped(tmp_path: Path) -> None:
    strikes(tmp_path, "--kills", "20", "--signals", "15", "--seed", str(random.randrange(2**31)))
