"""What a run leaves behind: rows of metrics through crashes and resumes, in TensorBoard too; times, modes of
files, what is on the disk when, the policy's own noise, and the best policy."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require
from run_folders import SMALL, make_run
from scripted import Scripted
from torch import Tensor

require("train")
from brc_fast.agents.brc import BRC
from brc_fast.command import main as cli
from brc_fast.command.progress import TimeLeft
from brc_fast.config import ActorConfig, CriticConfig, TrainConfig
from brc_fast.errors import InputError
from brc_fast.runs import evaluate
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.metrics import EpisodeTracker, MetricsWriter, Stopwatch, read_rows
from brc_fast.runs.trainer import Trainer


def train(run: Path, *words: str) -> int:
    return cli.main(["train", "toy/One", "--run", str(run), *SMALL, *words])


def resume(run: Path, *words: str) -> int:
    return cli.main(["train", "--resume", str(run), *words])


def learned(run: Path) -> dict[str, np.ndarray]:
    return RunFolder(run).load("agent")[1]["agent"]


# rows

STEPS = [10, 20, 20, 30, 40, 40, 50, 60, 60]  # of nine rows: a report each, an evaluation at every other


def rows_up_to_60() -> list[bytes]:
    names = ["report" if step not in STEPS[:index] else "eval" for index, step in enumerate(STEPS)]
    rows = [{"step": step, f"{name}/x": 0.5} for step, name in zip(STEPS, names, strict=True)]
    return [json.dumps(row).encode() + b"\n" for row in rows]


AHEAD = [b'{"step": 70, "eval/x": 1}\n', b'{"step": 80}\n']


@pytest.mark.parametrize(
    ("spoil", "kept", "aside", "told"),
    [
        (lambda rows: rows, "012345678", b"", ""),
        (lambda rows: rows[:3], "012", b"", "lacks 6 rows, of steps 30, 40, 50, 60"),
        (lambda rows: [], "", b"", "lacks 9 rows, of steps 10, 20, 30, 40, ..., 60"),
        (lambda rows: rows[:4] + rows[5:], "01235678", b"", "lacks 1 row, of step 40"),
        (
            lambda rows: [*rows[:2], b"x\n", *rows[3:]],
            "01345678",
            b"x\n",
            "line 3 is not JSON (after step 20), moved to metrics.jsonl.damaged; lacks 1 row, of step 20",
        ),
        (
            lambda rows: [*rows[:4], bytes(200)],
            "0123",
            bytes(200) + b"\n",
            "line 5 holds zeros (after step 30), moved to metrics.jsonl.damaged; lacks 5 rows, of steps 40, ",
        ),
        (
            lambda rows: [*rows, b'{"step": 70, "ev'],
            "012345678",
            b'{"step": 70, "ev\n',
            "line 10 is cut off (after step 60), moved to",
        ),
        (
            lambda rows: [*rows, *AHEAD],
            "012345678",
            b"",
            "loses 2 rows beyond step 60, up to 80: ",
        ),
    ],
    ids=["whole", "gap", "empty", "inner", "rot", "zeros", "torn", "beyond"],
)
def test_a_resume_keeps_every_row_and_names_what_is_none_or_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any, kept: str, aside: bytes, told: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = rows_up_to_60()
    path.write_bytes(b"".join(spoil(list(lines))))
    MetricsWriter(path, 60, STEPS).close()
    assert path.read_bytes().splitlines(keepends=True) == [lines[int(number)] for number in kept]
    assert len(caplog.messages) == bool(told)
    assert not told or caplog.messages[0].startswith(f"{path} {told}")
    damaged = tmp_path / "metrics.jsonl.damaged"
    assert (damaged.read_bytes() if damaged.exists() else b"") == aside


def test_damaged_lines_of_several_crashes_are_all_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for damage in (b"first\n", b"second\n"):
        path.write_bytes(damage)
        MetricsWriter(path, 60).close()
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"first\nsecond\n"


def test_a_checkpoint_knows_which_rows_were_written(
    toy: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    for last, missing in ((60, "20, 40"), (80, "40, 60")):
        (run / "metrics.jsonl").unlink()
        caplog.clear()
        assert resume(run, "--steps", str(last)) == 0
        (told,) = caplog.messages
        assert told == f"{run / 'metrics.jsonl'} lacks 4 rows, of steps {missing}"
        again = last - 20  # what is due at the checkpoint is made again
        steps = [row["step"] for row in read_rows(run / "metrics.jsonl")]
        assert steps == [again, again, last, last]


def test_rows_are_on_the_disk_before_a_checkpoint_and_that_before_an_older_one_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", ("toy/One",))
    run = RunFolder(tmp_path / "run")
    run.metrics.write_text('{"step": 500}\n')
    parts = {name: {"x": np.zeros(3)} for name in ("agent", "progress")}
    run.save(600, parts, None)
    events: list[tuple[str, str]] = []

    def noted(name: str, place: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            events.append((name, str(Path(place(*arguments)).relative_to(run.path))))
            return original(*arguments, **named)

        original = getattr(shutil if name == "rmtree" else os, name)
        return call

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, noted(name, lambda source, target: target))
    monkeypatch.setattr(os, "fsync", noted("fsync", lambda handle: os.readlink(f"/proc/self/fd/{handle}")))
    monkeypatch.setattr(shutil, "rmtree", noted("rmtree", lambda path: path))
    run.save(700, parts, None)
    partial, final = "checkpoints/partial-700", "checkpoints/000000000700"
    wanted = [
        ("fsync", f"{partial}/agent.safetensors"),
        ("fsync", f"{partial}/progress.safetensors"),
        ("fsync", f"{partial}/manifest.json.partial"),
        ("replace", f"{partial}/manifest.json"),
        ("fsync", partial),
        ("fsync", "metrics.jsonl"),
        ("rename", final),
        ("fsync", "checkpoints"),
        ("fsync", "."),
        ("rmtree", "checkpoints/000000000500"),
    ]
    assert [event for event in events if event != ("rmtree", final)] == wanted


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_files_of_a_run_are_for_whom_the_umask_lets_read_them(toy: dict, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        assert train(tmp_path / "run") == 0
        assert cli.main(["evaluate", str(tmp_path / "run"), "--episodes", "1"]) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"agent.safetensors", "evaluation.json", "learning_curve.png"} <= {path.name for path in files}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~mask) for path in files
    }


def shown(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_every_row_once_after_a_kill_and_a_resume(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    for events in (run / "tensorboard").iterdir():
        events.write_bytes(events.read_bytes()[:-200])  # what a killed process had not yet written
    (run / "tensorboard" / "notes.txt").write_text("mine")
    assert resume(run, "--steps", "60") == 0
    rows, board = read_rows(run / "metrics.jsonl"), shown(run)
    for name in ("eval/return_mean", "train/updates", "time/total_seconds"):
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        assert [step for step, _ in board[name]] == [step for step, _ in wanted]
        np.testing.assert_allclose([x for _, x in board[name]], [x for _, x in wanted], rtol=1e-6)
    unknown = [row["step"] for row in rows if "train/critic_loss" in row and row["train/critic_loss"] is None]
    assert [step for step, value in board.get("train/critic_loss", []) if math.isnan(value)] == unknown
    assert (run / "tensorboard" / "notes.txt").read_text() == "mine"


def test_tensorboard_has_the_settings_beside_the_return(toy: dict, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    assert train(tmp_path / "run") == 0
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    told = [HParamsPluginData.FromString(x) for x in found.PluginTagToContent("hparams").values()]
    settings = next(one.session_start_info.hparams for one in told if one.session_start_info.hparams)
    assert settings["critic.width"].number_value == 8
    assert settings["tasks"].string_value == "('toy/One',)"
    (metric,) = next(one.experiment.metric_infos for one in told if one.experiment.metric_infos)
    assert metric.name.tag in shown(tmp_path / "run")


# times


def test_rows_tell_the_time_of_day_the_seconds_of_the_run_over_its_resumes_and_the_share_of_every_part(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    manifest = run / "checkpoints" / "000000000040" / "manifest.json"
    told = json.loads(manifest.read_text())
    before = [row["time/total_seconds"] for row in read_rows(run / "metrics.jsonl")]
    assert 0 < before[0] < before[-1] <= told["seconds"]
    manifest.write_text(json.dumps({**told, "seconds": 1000.0}))
    assert resume(run, "--steps", "60") == 0
    rows = read_rows(run / "metrics.jsonl")
    totals, clock = ([row[f"time/{name}"] for row in rows] for name in ("total_seconds", "timestamp"))
    assert totals[:4] == before
    assert 1000 < totals[4] < totals[5] < 1100
    assert clock == sorted(clock)
    assert abs(clock[-1] - (run / "metrics.jsonl").stat().st_mtime) < 1
    reports = [row for row in rows if "train/updates" in row]
    for name in Stopwatch.PARTS:
        assert all(0 <= row[f"time/{name}_share"] <= 1 for row in reports), name
    assert reports[1]["time/evaluation_share"] > 0 < reports[1]["time/checkpoint_share"]
    assert sum(reports[1][f"time/{name}_share"] for name in Stopwatch.PARTS) < 1.01


def test_the_length_of_training_episodes_is_told_beside_their_return(toy: dict, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--report-every", "40", "--steps", "120") == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/return/toy/One" in row]
    assert [row["train/length/toy/One"] for row in rows] == [20.0] * 3


def test_lengths_of_episodes_that_an_older_version_began_are_unknown_until_they_end() -> None:
    tracker = EpisodeTracker(("toy/One",), np.zeros(1, np.int64))
    state = tracker.state_dict()
    del state["lengths"], state["steps"]
    tracker.load_state_dict(state)
    env = Scripted(("toy/One",), 1, lambda slot, number: 3)
    env.reset_tensors(0)
    rows = []
    for _ in range(6):
        tracker.record(env.step_tensors(torch.zeros(1, 1)))
        rows.append(tracker.row())
    assert math.isnan(rows[2]["train/length/toy/One"])
    assert rows[5]["train/length/toy/One"] == 3.0


def report(updates: int, seconds: float, evaluating: float = 0.0) -> dict[str, float]:
    share = evaluating / seconds
    return {"train/updates": updates, "time/seconds": seconds, "time/evaluation_share": share}


def test_the_time_left_is_unknown_while_actions_are_random_and_then_counts_steps_and_evaluations() -> None:
    config = TrainConfig(steps=10_000, random_steps=2_000, eval_every=2_500, report_every=1_000)
    left = TimeLeft(config, 0)
    for step, row in (
        (1_000, report(0, 1.0)),  # random actions cost nothing
        (2_000, report(0, 1.0)),
        (3_000, report(1_000, 60.0)),  # the updates began somewhere in it
    ):
        left.take(step, row)
        assert str(left) == ""
    left.take(4_000, report(2_000, 60.0))
    assert str(left) == "6.0 min and 4 evaluations left"
    left.take(5_000, report(3_000, 60.0))
    left.take(5_000, {"eval/return_mean": 1.0, "time/evaluation_seconds": 120.0})
    left.take(6_000, report(4_000, 180.0, evaluating=120.0))
    assert str(left) == "8.0 min left"  # 4 of steps, 4 of the evaluations at 7,500 and 10,000
    left.take(10_000, report(8_000, 240.0))
    assert str(left) == "4.0 min left" or left.evaluations() == 1


@pytest.mark.parametrize(
    ("steps", "num_envs", "every", "done", "count"),
    [(100, 1, 25, 0, 4), (100, 1, 30, 0, 4), (100, 3, 50, 0, 2), (100, 8, 25, 50, 2), (10, 1, 100, 0, 1)],
)
def test_the_evaluations_still_to_come_are_those_that_the_loop_makes(
    steps: int, num_envs: int, every: int, done: int, count: int
) -> None:
    config = TrainConfig(steps=steps, num_envs=num_envs, eval_every=every)
    made, at = 0, -(-done // num_envs) * num_envs
    while at < steps:
        at += num_envs
        made += at >= steps or at // every > (at - num_envs) // every
    assert TimeLeft(config, -(-done // num_envs) * num_envs).evaluations() == made == count


# evaluation


def test_noise_of_an_evaluation_is_its_own_and_training_goes_on_as_without_it(
    toy: dict, tmp_path: Path
) -> None:
    assert train(tmp_path / "with") == 0
    assert train(tmp_path / "without", "--no-eval-sampled") == 0
    one, other = learned(tmp_path / "with"), learned(tmp_path / "without")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    rows, without = (
        [
            {name: x for name, x in row.items() if not name.startswith(("time/", "eval/sampled_"))}
            for row in read_rows(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("with", "without")
    )
    assert rows == without
    (first, *_) = (row for row in read_rows(tmp_path / "with" / "metrics.jsonl") if "eval/return_mean" in row)
    assert first["eval/sampled_return/toy/One"] == first["eval/sampled_return_mean"]
    assert first["eval/sampled_return_mean"] != first["eval/return_mean"]
    assert not any(
        "sampled" in name for row in read_rows(tmp_path / "without" / "metrics.jsonl") for name in row
    )


class Recorded:
    """An agent of 2 observations that notes its actions."""

    def __init__(self) -> None:
        self.agent = BRC(2, 1, critic=CriticConfig(width=8), actor=ActorConfig(width=8))
        self.actions: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.agent, name)

    def act(self, *arguments: Any, **named: Any) -> Tensor:
        self.actions.append(self.agent.act(*arguments, **named))
        return self.actions[-1]


def played(seed: int, sampled: bool) -> Tensor:
    recorded = Recorded()
    before = recorded.agent.generator.get_state()
    env = Scripted(["toy/One"], 2, lambda slot, number: 3)
    evaluate.evaluate(recorded, env, seed, sampled=sampled)  # type: ignore[arg-type]
    assert torch.equal(recorded.agent.generator.get_state(), before)
    return torch.stack(recorded.actions)


def test_sampled_episodes_take_the_policys_noise_by_the_seed_and_others_its_mean() -> None:
    assert torch.equal(played(0, True), played(0, True))
    assert not torch.equal(played(0, True), played(1, True))
    assert torch.equal(played(0, False), played(1, False))
    assert played(0, False).std() == 0 < played(0, True).std()  # all observations are alike


# the best policy


@pytest.fixture
def returns(toy: dict, monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Mean returns that evaluations are to find at each step."""
    told: dict[int, float] = {}

    def found(self: Trainer, before_step: Any) -> dict[str, float]:
        value = told[self.steps]
        names = ("eval/return/toy/One", "eval/return_mean")
        return {**dict.fromkeys(names, value), "time/evaluation_seconds": 0.1}

    monkeypatch.setattr(Trainer, "evaluate", found)
    return told


def test_the_best_policy_is_kept_through_worse_ones_and_a_resume(
    returns: dict[int, float], tmp_path: Path
) -> None:
    run, folder = tmp_path / "run", RunFolder(tmp_path / "run")
    returns.update({20: 1.0, 40: 5.0, 60: 3.0, 80: 5.0, 100: 6.0})

    def best() -> list[str]:
        return [entry.name for entry in (run / "best").iterdir()]

    assert train(run, "--steps", "20") == 0
    first = evaluate.restore(folder, "cpu", "best")
    assert resume(run, "--steps", "60") == 0
    assert best() == ["000000000040"]
    assert json.loads((run / "best" / "000000000040" / "manifest.json").read_text())["value"] == [5.0]
    assert sorted(path.name for path in (run / "best" / "000000000040").iterdir()) == [
        "agent.safetensors",
        "manifest.json",
    ]
    assert resume(run, "--steps", "80") == 0
    assert best() == ["000000000040"]  # as good is not better
    assert folder.steps() == [60, 80]
    step, agent = evaluate.restore(folder, "cpu", "best")
    assert (first[0], step) == (20, 40)
    assert not torch.equal(first[1].actor.body.input.kernel, agent.actor.body.input.kernel)
    shutil.copytree(run, tmp_path / "copy")
    assert resume(run, "--steps", "100") == 0
    assert best() == ["000000000100"]
    (tmp_path / "copy" / "best" / "000000000040" / "manifest.json").write_text("{")
    assert resume(tmp_path / "copy", "--steps", "100") == 0


def test_tasks_that_tell_success_are_compared_by_it_before_the_return() -> None:
    def row(success: float, value: float, *told: str) -> dict[str, float]:
        both = {f"eval/return/{task}": value for task in "ab"} | {"eval/return_mean": value}
        return both | {f"eval/success/{task}": success for task in told} | {"eval/success_mean": success}

    assert evaluate.worth(row(0.5, 10.0, "a", "b")) > evaluate.worth(row(0.4, 99.0, "a", "b"))
    assert evaluate.worth(row(0.5, 11.0, "a", "b")) > evaluate.worth(row(0.5, 10.0, "a", "b"))
    assert evaluate.worth(row(0.5, 10.0, "a")) < evaluate.worth(row(0.4, 99.0, "a"))


def test_a_checkpoint_can_be_named(
    returns: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    returns.update({20: 9.0, 40: 1.0, 60: 1.0})
    assert train(run, "--steps", "60") == 0
    for which, step in (("last", 60), ("best", 20), ("40", 40), ("20", 20)):
        assert cli.main(["evaluate", str(run), "--episodes", "2", "--checkpoint", which]) == 0
        assert json.loads((run / "evaluation.json").read_text())["step"] == step
    for command in ("evaluate", "video"):
        capsys.readouterr()
        assert cli.main([command, str(run), "--checkpoint", "30"]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told == f"brc-fast: {run} has no checkpoint 30, only 20, 40, 60, last, best"


def test_a_run_that_was_never_evaluated_has_no_best_policy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("toy/One",))
    with pytest.raises(InputError, match=r"has no checkpoint best, only 500, last"):
        evaluate.restore(RunFolder(run), "cpu", "best")
