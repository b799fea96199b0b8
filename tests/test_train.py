"""Runs, checkpoints and resuming, with the toy environment; one end-to-end run on MJX."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extras import require
from refusals import says
from run_folders import arrays, assert_one_line, assert_same_run, contents, rows_without_time

from brc_fast import __version__, envs
from brc_fast.command import main as cli
from brc_fast.config import TrainConfig, from_dict
from brc_fast.errors import InputError
from brc_fast.runs import checkpoint
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.metrics import read_rows
from brc_fast.runs.trainer import Trainer
from brc_fast.spec import Spec

one_line = functools.partial(assert_one_line, silent=False)
TINY = [
    *("--num-envs", "4", "--steps", "600", "--random-steps", "80", "--batch-size", "32"),
    *("--critic.width", "16", "--actor.width", "16", "--report-every", "60", "--eval-every", "200"),
    *("--eval-episodes", "2", "--checkpoint-every", "200"),
]


def train(run: Path, *words: str, tasks: tuple[str, ...] = ("toy/One",)) -> int:
    return cli.main(["train", *tasks, "--run", str(run), *TINY, *words])


def interrupt_at(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Press Ctrl-C while the step that ends at `steps` is under way."""
    collect = Trainer.collect

    def pressing(self: Trainer) -> None:
        collect(self)
        if self.steps == steps:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "collect", pressing)


def test_a_run_folder_holds_settings_metrics_checkpoints_and_a_curve(toy: dict, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, tasks=("toy/One", "toy/Two")) == 0
    rows = read_rows(run / "metrics.jsonl")
    evaluations = [row for row in rows if "eval/return_mean" in row]
    assert [row["step"] for row in evaluations] == [200, 400, 600]
    for row in evaluations:
        both = [row["eval/return/toy/One"], row["eval/return/toy/Two"]]
        assert row["eval/return_mean"] == pytest.approx(np.mean(both))
        assert both[1] > both[0]  # twice the reward
    reports = [row for row in rows if "train/updates" in row]
    assert [row["step"] for row in reports] == [60 * i for i in range(1, 11)]
    assert reports[-1]["train/updates"] == (600 - 80) // 4 + 1
    assert {"train/critic_loss", "train/return/toy/One", "time/updates_per_second"} <= reports[-1].keys()
    assert all(0.0 <= row["train/clipped_share"] <= 1.0 for row in reports[1:])
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "config.json").read_text())["critic"]["width"] == 16
    assert RunFolder(run).steps() == [400, 600]
    assert list((run / "tensorboard").iterdir())


def test_the_same_seed_repeats_a_run_and_another_does_not(toy: dict, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train(tmp_path / name, "--seed", seed) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert rows_without_time(tmp_path / "a") != rows_without_time(tmp_path / "c")


@pytest.mark.parametrize("steps", [40, 300, 308])  # before learning, at a report, between reports
@pytest.mark.parametrize(
    "words",
    [(), ("--learning.return-bootstrap", "critic", "--learning.return-entropy", "measured")],
    ids=["code", "paper"],
)
def test_a_run_stopped_by_ctrl_c_and_resumed_equals_one_never_stopped(
    toy: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    steps: int,
    words: tuple[str, ...],
) -> None:
    toy[30] = "dropped"
    tasks = ("toy/One", "toy/Two")
    assert train(tmp_path / "whole", *words, tasks=tasks) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, steps)
        assert train(tmp_path / "halves", *words, tasks=tasks) == 130
    assert RunFolder(tmp_path / "halves").steps()[-1] == steps
    told = "\nSIGINT: the run is saved and ends after this step; a second one ends it now\n"
    assert told in capfd.readouterr().err
    assert cli.main(["train", "--resume", str(tmp_path / "halves")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_a_command_that_is_told_can_be_pasted(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my run"
    interrupt_at(monkeypatch, 40)
    assert train(run) == 130
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"stopped at step 40; go on with: brc-fast train --resume '{run}'"
    assert train(run) == 2
    assert f"{run} already holds a run: go on with --resume '{run}', replace" in capsys.readouterr().err


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tmp_path / "whole") == 0
    collect = Trainer.collect

    def dying(self: Trainer) -> None:
        if self.steps == 500:
            raise SystemExit(9)  # past the checkpoint of step 400, rows of 420 and 480 written
        collect(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "collect", dying)
        with pytest.raises(SystemExit):
            train(tmp_path / "halves")
    with (tmp_path / "halves" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 500, "tr')  # cut off in the middle of a row
    assert cli.main(["train", "--resume", str(tmp_path / "halves")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_a_finished_run_can_be_made_longer(toy: dict, tmp_path: Path) -> None:
    assert train(tmp_path / "whole") == 0
    assert train(tmp_path / "longer", "--steps", "400") == 0
    assert cli.main(["train", "--resume", str(tmp_path / "longer"), "--steps", "600"]) == 0
    whole = [row for row in rows_without_time(tmp_path / "whole") if "eval/return_mean" in row]
    longer = [row for row in rows_without_time(tmp_path / "longer") if "eval/return_mean" in row]
    assert whole == longer


def test_a_dropped_transition_is_counted_and_never_stored(toy: dict, tmp_path: Path) -> None:
    toy[40] = "dropped"
    assert train(tmp_path / "run") == 0
    last = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/updates" in row][-1]
    assert last["train/dropped/toy/One"] == 1
    assert arrays(tmp_path / "run")["replay"]["count"].sum() == 600 - 1


@pytest.mark.parametrize("field", ["rewards", "successors"])
def test_nan_from_an_environment_ends_the_run_by_name_and_keeps_the_checkpoint(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    toy[77] = field
    assert train(tmp_path / "run") == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(says(f"{field} of toy/One ... environment 1 at step {77 * 4}"), told)
    assert f"; saved at step 304; go on with: brc-fast train --resume {tmp_path / 'run'}; " in told
    assert RunFolder(tmp_path / "run").steps() == [200, 304]  # the step that failed counts for nothing
    toy.clear()
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_arrays = checkpoint.write_arrays

    def failing(file: Path, data: dict) -> tuple[int, int]:
        if "partial-400" in str(file) and file.name == "progress.safetensors":
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_arrays(file, data)

    monkeypatch.setattr(checkpoint, "write_arrays", failing)
    assert train(tmp_path / "run") == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"step 400.*No space left on device.*checkpoint 200 is still there", told)
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000000200"]
    monkeypatch.undo()


def test_what_a_killed_save_left_behind_is_cleared_by_the_next(toy: dict, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--steps", "400") == 0
    left = run / "checkpoints" / "partial-420"
    left.mkdir()
    (left / "agent.safetensors").write_bytes(b"half")
    assert RunFolder(run).steps() == [200, 400]
    assert cli.main(["train", "--resume", str(run), "--steps", "600"]) == 0
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["000000000400", "000000000600"]


def test_two_processes_never_train_into_one_folder(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    before = contents(run)
    told = f"another process trains into {run}: name another folder"
    with RunFolder(run).claim():
        again = ["train", "toy/One", "--run", str(run), *TINY, "--overwrite"]
        for words in (again, ["train", "--resume", str(run), "--steps", "800"]):
            one_line(words, told, capsys)
    assert contents(run) == before
    assert cli.main(["train", "--resume", str(run), "--steps", "800"]) == 0

    def begun_meanwhile(*arguments: Any) -> Trainer:
        RunFolder(tmp_path / "new").create(TrainConfig(seed=7))
        return Trainer(*arguments)

    monkeypatch.setattr("brc_fast.runs.trainer.Trainer", begun_meanwhile)
    assert train(tmp_path / "new") == 2
    assert f"{tmp_path / 'new'} already holds a run" in capsys.readouterr().err
    assert RunFolder(tmp_path / "new").config().seed == 7


def test_a_run_without_a_checkpoint_is_refused_before_anything_is_made(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(tmp_path).create(TrainConfig(tasks=("toy/One",)))
    monkeypatch.setattr("brc_fast.runs.trainer.Trainer", None)
    told = f"{tmp_path} holds no complete checkpoint: train it anew, with --overwrite"
    one_line(["train", "--resume", str(tmp_path)], told, capsys)


def test_a_replay_that_the_store_cannot_index_is_refused_by_name(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "--replay-capacity", str(2**29)) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "replay_capacity must be at most 536870904, got 536870912" in told
    assert not (tmp_path / "run").exists()


def test_a_run_needs_no_stderr(toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert train(tmp_path / "run") == 0


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_run_outlives_its_stdout_and_its_stderr(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as broken:
        monkeypatch.setattr(f"sys.{name}", broken)
        assert train(tmp_path / "run") == 0
    assert RunFolder(tmp_path / "run").steps() == [400, 600]


def test_a_finished_run_says_so_and_stays_as_it_is(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    before = contents(run)
    for words in ([], ["--steps", "500"]):
        capsys.readouterr()
        assert cli.main(["train", "--resume", str(run), *words]) == 0
        told = capsys.readouterr().out.splitlines()[-1]
        assert told == f"{run} is at step 600 already: --steps with more makes it longer"
    assert contents(run) == before


def test_before_an_episode_has_ended_its_return_is_no_number(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step 60 of 600")]
    assert "  return -  0 updates/s  " in told[0]


def test_bytes_that_are_no_text_are_refused_in_settings_and_cut_off_metrics(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    rows = read_rows(run / "metrics.jsonl")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\x00\xfe\n")
    assert read_rows(run / "metrics.jsonl") == rows
    (run / "config.json").write_bytes(b"\xff\xfe")
    one_line(["plot", str(run)], f"{run / 'config.json'} cannot be read: ", capsys, run)


def damage(run: Path, how: str) -> None:
    folder = run / "checkpoints" / "000000000600"
    file = folder / "agent.safetensors"
    data = file.read_bytes()
    manifest = folder / "manifest.json"
    told = json.loads(manifest.read_text())
    if how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "missing":
        file.unlink()
    elif how == "replay":
        segment = min(folder.glob("replay/*.bin"))
        data = segment.read_bytes()
        segment.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif how == "newer":
        manifest.write_text(json.dumps(told | {"format": told["format"] + 1}))
    elif how == "manifest":
        manifest.write_text("{")


def test_a_run_may_change_its_precision_when_it_is_resumed_and_its_lag_not(toy: dict, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", "toy/One", "--run", str(run), *TINY]) == 0
    more = ["train", "--resume", str(run), "--steps", "640"]
    assert cli.main([*more, "--policy-lag", "9"]) == 2
    assert cli.main([*more, "--precision", "bf16"]) == 0
    assert RunFolder(run).config().precision == "bf16"
    assert all(
        row["train/critic_loss"] is not None
        for row in read_rows(run / "metrics.jsonl")
        if "train/critic_loss" in row
    )


def test_a_config_of_an_older_version_has_defaults_and_one_of_a_newer_is_refused() -> None:
    values = dataclasses.asdict(TrainConfig(tasks=("toy/One",), seed=3))
    del values["recompute"]
    assert from_dict(TrainConfig, values) == TrainConfig(tasks=("toy/One",), seed=3)
    with pytest.raises(InputError, match="written by another version: it has magic"):
        from_dict(TrainConfig, {**values, "magic": 1})


def test_a_config_tells_by_what_it_was_written_and_an_older_one_tells_nothing(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = tmp_path / "run", ["--steps", "200"]
    assert train(run, *words) == 0
    values = json.loads((run / "config.json").read_text())
    told = values["written"]
    assert (told["format"], told["brc_fast"], told["device"]) == (1, __version__, "cpu")
    assert told["command"].startswith("brc-fast train toy/One --run ")
    assert abs(datetime.now(UTC) - datetime.fromisoformat(told["date"])) < timedelta(minutes=5)
    assert values.keys() - {"written"} == {field.name for field in dataclasses.fields(TrainConfig)}
    config = RunFolder(run).config()
    del values["written"]
    (run / "config.json").write_text(json.dumps(values))
    assert RunFolder(run).config() == config
    assert cli.main(["train", "--resume", str(run), "--steps", "400"]) == 0
    told = json.loads((run / "config.json").read_text())["written"]
    assert told["command"] == f"brc-fast train --resume {run} --steps 400"
    for written, words in (
        ({"format": 2}, "has format 2, ... reads formats up to 1: upgrade brc-fast"),
        ({"format": "1"}, "cannot be read: written must have a format"),
        (5, "cannot be read: written must have a format, got 5"),
    ):
        (run / "config.json").write_text(json.dumps({"written": written, **values}))
        one_line(["evaluate", str(run)], words, capsys, run)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is truncated: "),
        ("flipped", "is damaged: its checksum differs"),
        ("missing", "is missing"),
        ("newer", "format 4, ... reads formats 2 and 3: upgrade brc-fast"),
        ("manifest", "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, message: str
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    damage(run, how)
    for words in (["train", "--resume", str(run), "--steps", "800"], ["evaluate", str(run)]):
        one_line(words, message, capsys, run)


def test_a_damaged_replay_is_refused_by_name(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    damage(run, "replay")
    told = "segment- ... is damaged ... 000000000600 to go on from the checkpoint of step 400"
    one_line(["train", "--resume", str(run), "--steps", "800"], told, capsys)


def test_checkpoints_share_the_replay_rows_that_they_have_in_common(toy: dict, tmp_path: Path) -> None:
    assert train(tmp_path / "run") == 0
    folders = [tmp_path / "run" / "checkpoints" / f"{step:012d}" / "replay" for step in (400, 600)]
    first, second = ({file.name: file.stat().st_ino for file in folder.glob("*.bin")} for folder in folders)
    assert first.items() < second.items()


@pytest.mark.parametrize("changed", ["width", "environments", "observations"])
def test_a_checkpoint_of_another_shape_is_refused_and_not_called_damaged(
    toy: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    config = json.loads((run / "config.json").read_text())
    if changed == "width":
        config["critic"]["width"] = 24
    elif changed == "environments":
        config["num_envs"] += 1
    else:
        toy_env = type(envs.make(("toy/One",), 1))
        monkeypatch.setattr(toy_env, "task_spec", Spec.vectors(4, 1, ("toy/One",)))
    (run / "config.json").write_text(json.dumps(config))
    told = one_line(
        ["train", "--resume", str(run), "--steps", "800"], "does not fit this run ... must have shape", capsys
    )
    assert "delete" not in told


def test_an_existing_run_is_kept_unless_overwriting_is_asked_for(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    (run / "notes.txt").write_text("mine")
    before = (run / "metrics.jsonl").read_bytes()
    assert train(run) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    assert train(run, "--overwrite", "--seed", "5") == 0
    assert json.loads((run / "config.json").read_text())["seed"] == 5
    assert (run / "notes.txt").read_text() == "mine"


def test_settings_that_would_change_the_numbers_cannot_change_on_resume(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run") == 0
    words = ["train", "--resume", str(tmp_path / "run"), "--seed", "3"]
    one_line(words, "seed cannot change when a run is resumed", capsys, tmp_path)


def test_a_run_that_cannot_be_written_to_is_evaluated_all_the_same(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    (run / "evaluation.json.partial").mkdir()  # stands in the way, for root as well
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--json", str(tmp_path / "all.json")]) == 2
    told = capsys.readouterr()
    assert "toy/One" in told.out
    assert told.err == f"brc-fast: {run / 'evaluation.json'} cannot be written: Is a directory\n"
    assert (tmp_path / "all.json").exists()


def test_plot_draws_one_or_many_runs(toy: dict, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        assert train(run) == 0
    output = tmp_path / "both.svg"
    assert cli.main(["plot", *map(str, runs), "--output", str(output)]) == 0
    assert "<svg" in output.read_text()


@pytest.mark.slow
def test_a_run_on_mjx_stopped_at_half_way_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("mjx")
    words = ["--steps", "3200", "--random-steps", "800", "--num-envs", "8"]
    words += ["--eval-every", "1600", "--eval-episodes", "8"]
    task = ("mjx/PendulumSwingup",)
    assert train(tmp_path / "whole", *words, tasks=task) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1600)
        assert train(tmp_path / "halves", *words, tasks=task) == 130
    assert cli.main(["train", "--resume", str(tmp_path / "halves")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
