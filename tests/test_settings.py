"""What the words of `brc-fast train` make of the settings: files, names of folders, hints, silence."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from extras import require
from refusals import says

require("train")

from brc_fast.command import main as cli
from brc_fast.command.arguments import ELSEWHERE, default_run, parse_train
from brc_fast.config import CriticConfig, EnvConfig, TrainConfig, cpu_preset
from brc_fast.errors import InputError
from brc_fast.runs.checkpoint import RunFolder

PENDULUM = "gym/Pendulum-v1"
SHORT = [
    *(
        "--num-envs",
        "2",
        "--steps",
        "20",
        "--random-steps",
        "10",
        "--batch-size",
        "4",
        "--eval-episodes",
        "2",
    ),
    *("--critic.width", "8", "--actor.width", "8", "--report-every", "10", "--eval-every", "10"),
]


def parsed(*words: str) -> TrainConfig:
    return parse_train(words).config


def test_a_file_comes_before_the_command_line_and_after_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        f'tasks = ["{PENDULUM}"]\nnum-envs = 7\nseed = 3\ncritic.width = 64\n[learning]\nlearning_rate = 1\n'
    )
    config = parsed("--config", str(file), "--seed", "5", "--device", "cpu")
    assert (config.tasks, config.num_envs, config.seed) == ((PENDULUM,), 7, 5)
    assert (config.critic.width, config.learning.learning_rate) == (64, 1)
    assert config.batch_size == cpu_preset().batch_size
    assert parsed("gym/Acrobot-v1", "--config", str(file)).tasks == ("gym/Acrobot-v1",)


def test_a_suite_is_several_tasks_to_what_needs_several() -> None:
    config = parsed("metaworld/mt10", "--critic.conditioning", "heads", "--analysis-every", "1000")
    assert len(config.tasks) == 10


def test_the_documents_example_of_a_file_is_one(tmp_path: Path) -> None:
    document = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", document, re.DOTALL)
    (tmp_path / "x.toml").write_text(example)
    config = parsed("--config", str(tmp_path / "x.toml"))
    assert (config.tasks, config.num_envs, config.critic.width) == (("mjx/CartpoleSwingup",), 16, 256)
    folder = parse_train(["--config", str(tmp_path / "x.toml"), "--num-envs", "10", "--device", "cpu"]).folder
    assert str(folder.path) in document


def test_a_runs_own_settings_start_another_run_elsewhere(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    first = replace(cpu_preset(), tasks=(PENDULUM,), run=str(run.path), overwrite=True, num_envs=3)
    run.create(first)
    file = run.path / "config.json"
    file.write_text(json.dumps({"written": {"format": 1}, **asdict(first)}))
    config = parsed("--config", str(file), "--seed", "1")
    assert config == replace(first, seed=1, run=None, overwrite=False)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("x.toml", "critic.widht = 3", "x.toml: unknown setting critic.widht; nearest: critic.width"),
        ("x.json", '{"bach_size": 3}', "x.json: unknown setting bach_size; nearest: batch_size"),
        ("x.toml", "critic = 3", "unknown setting critic; nearest: critic."),
        ("x.toml", 'steps = "many"', "x.toml: steps must be int, got 'many'"),
        ("x.toml", "steps = -1", "x.toml: steps must be positive, got -1"),
        ("x.toml", "steps = ", "config: ... x.toml cannot be read"),
        ("x.json", "[1]", "config: ... x.json cannot be read: it must hold settings by name"),
        ("x.toml", 'run = "here"', "x.toml: run is for the command line alone, --run"),
        ("x.json", None, "config: there is no file"),
    ],
)
def test_what_a_file_cannot_say_is_refused_by_name(
    name: str, text: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert cli.main(["train", PENDULUM, "--config", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(says(told), line), line


def test_a_file_may_not_change_a_run_that_is_resumed_either(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(replace(cpu_preset(), tasks=(PENDULUM,)))
    (run.checkpoints / "000000000500").mkdir(parents=True)
    file = tmp_path / "x.toml"
    file.write_text("seed = 4")
    with pytest.raises(InputError, match="seed cannot change when a run is resumed: it was 0"):
        parse_train(["--resume", str(run.path), "--config", str(file)])
    file.write_text("eval-every = 4")
    assert parsed("--resume", str(run.path), "--config", str(file)).eval_every == 4


def test_a_folder_is_named_by_what_makes_another_run() -> None:
    default = replace(cpu_preset(), tasks=("mjx/CartpoleSwingup",))

    def name(**changes: object) -> str:
        return default_run(replace(default, **changes), cpu_preset())  # type: ignore[arg-type]

    assert name() == "runs/mjx-CartpoleSwingup-seed0"
    assert name(steps=5, eval_every=7, device="cpu", overwrite=True) == "runs/mjx-CartpoleSwingup-seed0"
    two = ("mjx/CartpoleSwingup", "gym/Pendulum-v1")
    assert name(tasks=two, seed=2) == "runs/mjx-CartpoleSwingup+1-seed2"
    wide = replace(default.critic, width=256)
    changed = "runs/mjx-CartpoleSwingup-num_envs=5-critic.width=256-env.episode_length=9-seed0"
    three = {"num_envs": 5, "critic": wide, "env": EnvConfig(episode_length=9, restarts=5)}
    assert name(**three) == changed
    digests = {name(**three, batch_size=size) for size in (32, 64)}
    assert len(digests) == 2
    digests.add(name(env=EnvConfig(kwargs='{"xml_file": "/a/b.xml"}')))  # no folders of that name
    assert all(re.fullmatch(r"runs/mjx-CartpoleSwingup-[0-9a-f]{8}-seed0", each) for each in digests)


def test_runs_of_other_settings_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require("gym")
    monkeypatch.chdir(tmp_path)
    for words in ((), ("--updates-per-step", "2")):
        assert cli.main(["train", PENDULUM, *SHORT, *words]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_quiet_run_prints_nothing_but_what_goes_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    require("gym")
    words = ["train", PENDULUM, "--run", str(tmp_path / "run"), *SHORT]
    assert cli.main([*words, "--quiet"]) == 0
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")
    assert cli.main([*words, "--quiet"]) == 2
    assert "already holds a run" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--critic.widht", "3"], "perhaps you meant --critic.width"),
        (["--num-env=3"], "perhaps you meant --num-envs"),
        (["--batchsize", "3"], "perhaps you meant --batch-size"),
        (["--width", "3"], "perhaps you meant --actor.width or --critic.width"),
        (["--graph", "--batchsize", "3"], "perhaps you meant --batch-size or --graphs"),
        (["--lr", "3"], "perhaps you meant --learning.learning-rate"),
        (["--total_timesteps=3"], "perhaps you meant --steps"),
    ],
)
def test_the_option_that_was_meant_is_named(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", PENDULUM, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("brc-fast: Unrecognized options: --")
    assert line.endswith(f"; {told}; see brc-fast train --help")


def test_every_option_that_a_hint_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    told = capsys.readouterr().out
    assert all(f"--{name}" in told for name in ELSEWHERE.values())


@pytest.mark.parametrize("command", ["train", "evaluate", "video", "plot"])
def test_a_shells_completion_is_no_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--tyro-print-completion", "bash"])
    assert not stop.value.code
    assert "complete" in capsys.readouterr().out


def test_the_defaults_of_python_name_no_setting() -> None:
    assert default_run(TrainConfig(tasks=("a/b",), critic=CriticConfig()), TrainConfig()) == "runs/a-b-seed0"
