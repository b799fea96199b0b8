"""Bad input at the command line: one clear line, exit code 2, nothing written."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import fresh
import pytest
from extras import require
from run_folders import assert_one_line

require("train")
from brc_fast.command import main as cli

CARTPOLE = "mjx/CartpoleSwingup"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fly"], "unknown command 'fly': one of train, evaluate, plot, envs, doctor, video"),
        (["train"], "name at least one task, such as mjx/CartpoleSwingup; all names: brc-fast envs"),
        (["train", "mjx/CartpoleSwingap"], "nearest: mjx/CartpoleSwingup"),
        (["train", "atari/Pong"], "unknown suite 'atari'"),
        (["train", CARTPOLE, CARTPOLE], "is listed 2 times"),
        (["train", CARTPOLE, "--critic.width", "-64"], "width must be positive, got -64"),
        (["train", CARTPOLE, "--num-envs", "0"], "num_envs must be positive, got 0"),
        (["train", CARTPOLE, "--batch-size", "0"], "batch_size must be positive, got 0"),
        (["train", CARTPOLE, "--steps", "-5"], "steps must be positive, got -5"),
        (["train", CARTPOLE, "--learning.discount", "1.0"], "discount must be in [0, 1), got 1.0"),
        (["train", CARTPOLE, "--critic.num-atoms", "1"], "num_atoms must be at least 2, got 1"),
        (["train", CARTPOLE, "--batch-size", "64", "--replay-capacity", "63"], "exceeds the 63 transitions"),
        (["train", CARTPOLE, "--seed", "x"], "--seed"),
        (["train", CARTPOLE, "--seed", str(2**64)], "seed must be in [0, 2**64), got 1844674407370"),
        (["train", CARTPOLE, "--critic.width", str(10**10)], "width must be at most 1048576, got 1000"),
        (["train", CARTPOLE, "--actor.depth", str(10**9)], "depth must be at most 1000, got 1000000000"),
        (["train", CARTPOLE, "--threads", "1000000"], "threads must be at most 1024, got 1000000"),
        (["train", CARTPOLE, "--critic.v-max", "inf"], "v_max must be finite in float32, got inf"),
        (["train", CARTPOLE, "--learning.learning-rate", "1e39"], "learning_rate must be finite in float32"),
        (["train", CARTPOLE, "--learning.target-entropy-per-action", "nan"], "float32, got nan"),
        (["train", CARTPOLE, "--run", "r\udcff"], "folder must have a name in UTF-8, got 'r\\udcff'"),
        (["train", CARTPOLE, "--resume", "", "--overwrite"], "config.json is missing"),
        (["train", CARTPOLE, "--resume"], "Missing value for argument '--resume'"),
        (["train", CARTPOLE, "--widht", "3"], "Unrecognized options: --widht"),
        (["train", "--resume=nowhere"], "nowhere holds no run: config.json is missing"),
        (["train", "--resume", "nowhere"], "nowhere holds no run: config.json is missing"),
        (["evaluate", "nowhere"], "nowhere holds no run: config.json is missing"),
        (["evaluate", "nowhere", "--episodes", "0"], "episodes must be positive, got 0"),
        (["plot", "nowhere"], "nowhere holds no run: config.json is missing"),
        (["plot"], "name at least one run folder"),
        (["envs", "please", "me"], "brc-fast envs takes at most one suite, got please me"),
        (["envs", "please"], "unknown suite 'please'; suites: mjx/dmc25, mjx/dmc-easy"),
        (["envs", "shadowhand/test"], "shadowhand/test cannot be made: the paper's 29 objects"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line(words, told, capsys, tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "0"], "steps must be positive, got 0"),
        (
            ["--device", "tpu"],
            "invalid choice 'tpu' for argument '--device'. Expected one of ('auto', 'cpu', 'cuda')",
        ),
    ],
)
def test_the_line_names_no_class_and_ends_its_sentence_once(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", CARTPOLE, *words]) == 2
    assert capsys.readouterr().err == f"brc-fast: {told}; see brc-fast train --help\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_line_is_the_rule_alone_whatever_stdout_can_show(encoding: str) -> None:
    code = "import sys; from brc_fast.command.main import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", code, "train", CARTPOLE, "--steps", "1e6"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    told = "Error parsing --steps: invalid literal for int() with base 10: '1e6'"
    assert result.stderr == f"brc-fast: {told}; see brc-fast train --help\n"


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    ("reader", "code", "told"),
    [("none", 0, ""), ("full", 2, "brc-fast: stdout cannot be written: No space left on device\n")],
)
def test_a_stdout_that_breaks_is_one_line_and_a_closed_pipe_none(
    reader: str, code: int, told: str, buffered: bool
) -> None:
    if reader == "full" and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full" if reader == "full" else write, "w") as stdout:
        result = subprocess.run(
            [sys.executable, "-m", "brc_fast", "envs"],
            env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (result.returncode, result.stderr) == (code, told)


def test_a_name_that_stdout_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("brc_fast.command.main.envs", lambda words: print(words[0]) or 0)
    assert cli.main(["envs", "r\u00fcn"]) == 0
    assert stdout.buffer.getvalue() == b"r\\xfcn\n"


def test_without_stderr_the_error_does_not_go_to_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert cli.main(["fly"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["plot", "train"])
def test_an_interrupted_command_speaks_of_checkpoints_only_where_it_writes_some(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, name, pressed)
    assert cli.main([name]) == 130
    saved = "; nothing was saved after the newest checkpoint" if name == "train" else ""
    assert capsys.readouterr().err == f"brc-fast: interrupted{saved}\n"


def test_an_interrupt_that_python_ignores_comes_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Collected:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def ignoring(words: list[str]) -> int:
        Collected()
        for _ in range(200):  # what comes again is seen between two instructions
            time.sleep(0.1)
        return 0

    monkeypatch.setattr(cli, "envs", ignoring)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` may have it ignored
    try:
        assert cli.main(["envs"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "brc-fast: interrupted\n"


def test_cuda_without_a_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["train", CARTPOLE, "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "words", "told"),
    [
        ("jax", ["train", CARTPOLE], 'pip install "brc-fast[mjx]"'),
        ("mujoco_playground", ["train", CARTPOLE], 'pip install "brc-fast[mjx]"'),
        ("tyro", ["train", CARTPOLE], 'pip install "brc-fast[train]"'),
        ("tqdm", ["train", CARTPOLE], 'pip install "brc-fast[train]"'),
        ("matplotlib", ["train", CARTPOLE], 'pip install "brc-fast[train]"'),
        ("matplotlib", ["plot", "run"], 'pip install "brc-fast[train]"'),
        ("gymnasium", ["train", "gym/Pendulum-v1"], 'pip install "brc-fast[gym]"'),
        ("gymnasium", ["train", "dmc/dog-run"], 'pip install "brc-fast[dmc]"'),
        ("gymnasium", ["train", "metaworld/reach-v3"], 'pip install "brc-fast[envpool]"'),
    ],
)
def test_a_missing_extra_is_named_with_its_pip_command(
    module: str, words: list[str], told: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    config = "import dataclasses, json; from brc_fast.config import cpu_preset; "
    config += "open('run/config.json', 'w').write(json.dumps(dataclasses.asdict(cpu_preset())))"
    blocked = f"import sys; sys.modules[{module!r}] = None; {config if words[0] == 'plot' else 'pass'}; "
    code = blocked + f"from brc_fast.command.main import main; sys.exit(main({words!r}))"
    result = fresh.run(code, tmp_path)
    assert result.returncode == 2, result.stderr
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_envs_says_what_names_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["envs"]) == 0
    told = capsys.readouterr().out
    for name in ("mjx/...", "gym/...", "metaworld/mt50", "50 tasks", "shadowhand/test"):
        assert name in told


def test_envs_lists_all_25_names_of_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["envs", "mjx/dmc25"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == len(set(names)) == 25
    assert {CARTPOLE, "mjx/HumanoidRun", "mjx/PendulumSwingup"} <= set(names)


@pytest.mark.parametrize(
    ("backend", "extra", "one"),
    [
        ("gym", "gym", "gym/Pendulum-v1"),
        ("mjx", "mjx", CARTPOLE),
        ("dmc", "dmc", "dmc/dog-run"),
        ("envpool", "envpool", "envpool/WalkerRun-v1"),
        ("metaworld", "envpool", "metaworld/reach-v3"),
    ],
)
def test_envs_lists_what_a_simulator_has_here(
    backend: str, extra: str, one: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    require(extra)
    assert cli.main(["envs", backend]) == 0
    names = capsys.readouterr().out.split()
    assert one in names
    assert len(names) == len(set(names)) > 20
    assert all(name.startswith(f"{backend}/") for name in names)


def test_envs_of_gym_are_each_of_the_newest_version(capsys: pytest.CaptureFixture[str]) -> None:
    require("gym")
    assert cli.main(["envs", "gym"]) == 0
    names = capsys.readouterr().out.split()
    assert [name for name in names if name.startswith("gym/HalfCheetah-")] == ["gym/HalfCheetah-v5"]


@pytest.mark.parametrize(
    ("backend", "module", "extra"),
    [
        ("gym", "gymnasium", "gym"),
        ("mjx", "jax", "mjx"),
        ("dmc", "dm_control", "dmc"),
        ("metaworld", "envpool", "envpool"),
    ],
)
def test_envs_of_a_simulator_that_is_not_there_names_its_extra(
    backend: str, module: str, extra: str, tmp_path: Path
) -> None:
    require("gymnasium")
    code = f"import sys; sys.modules[{module!r}] = None; import importlib.util as u; find = u.find_spec; "
    code += f"u.find_spec = lambda name: None if name == {module!r} else find(name); "
    code += f"from brc_fast.command.main import main; sys.exit(main(['envs', {backend!r}]))"
    result = fresh.run(code, tmp_path)
    assert result.returncode == 2
    assert f"brc-fast[{extra}]" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_doctor_tells_versions_devices_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["doctor"])
    told = capsys.readouterr().out
    for word in ("torch", "numpy", "replay store", "[mjx]", "[train]", "devices"):
        assert word in told

    def version(name: str) -> str:
        if name == "brax":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("brc_fast.command.doctor.version", version)
    assert cli.main(["doctor"]) == 1
    assert 'pip install "brc-fast[mjx]"' in capsys.readouterr().out


def test_doctor_works_for_a_user_without_a_home() -> None:
    require("mjx")
    code = "import os, pwd; os.environ.pop('XDG_CACHE_HOME', 0), os.environ.pop('HOME', 0); "
    code += "pwd.getpwuid = {}.__getitem__; from brc_fast.command import main as cli; cli.main(['doctor'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "jax " in result.stdout


def test_help_and_version_are_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["--version"]):
        assert cli.main(words) == 0
    assert "brc-fast train TASK..." in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    assert "--critic.width" in capsys.readouterr().out
