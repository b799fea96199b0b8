"""bench/gpu.py runs each part in a process of its own, within its time, and says how it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from extras import require

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import gpu
import harness


def test_no_part_takes_more_than_nine_minutes_and_a_budget_replaces_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = dict[str, float]()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        gpu,
        "run",
        lambda part, seconds, *_: given.update({part: seconds}) or {"status": "ok", "seconds": 1.0},
    )
    assert gpu.main([]) == 0
    assert list(given) == list(gpu.PARTS)
    assert all(seconds < gpu.END <= 540 for seconds in given.values())
    assert gpu.main(["--parts", "update", "--budget", "420"]) == 0
    assert given["update"] == 420.0


@pytest.mark.parametrize("dry", [True, False])
def test_every_command_is_a_script_with_options_that_it_knows(dry: bool, tmp_path: Path) -> None:
    for part in gpu.PARTS:
        command = gpu.command(part, 7.0, dry, tmp_path / f"gpu-{part}.json")
        if part in ("build", "test") or part.startswith(gpu.STUDY):
            continue
        _, script, *words = command
        assert Path(script).is_file()
        told = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True).stdout
        assert all(word in told for word in words if word.startswith("--")), (part, words)
        assert words[-4:] == ["--budget", "7", "--save", str(tmp_path / f"gpu-{part}")]


@pytest.mark.parametrize("dry", [True, False])
def test_every_study_is_one_that_exists_with_options_that_it_knows(dry: bool, tmp_path: Path) -> None:
    require("train")
    from brc_fast.command.arguments import parse
    from brc_fast.command.study import StudyArguments
    from brc_fast.runs.studies.named import STUDIES

    parts = [part for part in gpu.PARTS if part.startswith(gpu.STUDY)]
    assert {part.removeprefix(gpu.STUDY) for part in parts} == STUDIES.keys() - {"defaults"}
    for part in parts:
        *_, module, command = (words := gpu.command(part, 7.0, dry, tmp_path / f"{part}.json"))[:5]
        assert (module, command) == ("brc_fast", "study")
        given = parse(StudyArguments, words[5:], "study")
        assert (given.study, given.budget) == (part.removeprefix(gpu.STUDY), 7.0)
        assert given.scale == ("tiny" if dry else "small")


@pytest.mark.exhaustive
def test_a_dry_run_measures_and_stores_the_parts_that_make_gpu_dry_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require("mjx", "train")
    for part in ("scaling", "train"):
        told = gpu.run(part, 4.0, True, tmp_path / f"gpu-{part}.json")
        assert told["status"] == "ok", told
        stored = harness.read(tmp_path / f"gpu-{part}.json")
        assert (stored["status"], stored["equality"], stored["dry"]) == ("ok", "passed", True)


def test_a_part_stores_its_measurements_with_how_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "gpu-limits.json"
    told = gpu.run("limits", 1.0, True, path)
    stored = harness.read(path)
    assert told["status"] == stored["status"] == "ok"
    assert (stored["benchmark"], stored["part"]) == ("limits", "limits")
    assert {entry["provider"] for entry in stored["measurements"]} == {"machine"}


def runs(process: int) -> bool:
    try:
        return Path("/proc", str(process), "stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_what_a_part_measured_stays_when_it_dies_or_is_stopped_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = f"open({str(tmp_path / 'gpu-update.json')!r}, 'w').write('{{\"measurements\": [1]}}')"
    child = f"open({str(tmp_path / 'child')!r}, 'w').write(str(p.pid))"
    hang = f"import subprocess as s, time; p = s.Popen(['sleep', '60']); {child}; time.sleep(60)"
    scripts = {"update": f"{measured}; import os; os.kill(os.getpid(), 11)", "scaling": hang}
    monkeypatch.setattr(gpu, "command", lambda part, *_: [sys.executable, "-S", "-c", scripts[part]])
    monkeypatch.setattr(gpu, "END", 2.0)
    path = tmp_path / "gpu-update.json"
    path.write_text('{"of": "an earlier run"}')
    told = gpu.run("update", 1.0, True, path)
    stored = json.loads(path.read_text())
    assert (told["status"], stored["reason"]) == ("failed", "it ended with -11")
    assert stored["measurements"] == [1]
    assert "of" not in stored
    assert gpu.run("scaling", 1.0, True, tmp_path / "s.json")["reason"] == "it was stopped after 2 s"
    end = time.monotonic() + 30.0
    while runs(int((tmp_path / "child").read_text())):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_failed_equality_check_and_what_is_not_installed_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu-update.json"
    code = f"import json; open({str(path)!r}, 'w').write(json.dumps({{'equality': 'failed: jax'}})); exit(1)"
    monkeypatch.setattr(gpu, "command", lambda part, *_: [sys.executable, "-S", "-c", code])
    told = gpu.run("update", 1.0, True, path)
    assert (told["status"], told["reason"]) == ("failed", "failed: jax")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "mujoco_playground" else object()
    )
    told = gpu.run("train", 1.0, True, path)
    assert (told["status"], told["reason"]) == ("skipped", "mujoco_playground is not installed")


def test_the_exit_code_and_a_line_per_part_tell_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {"limits": {"status": "ok"}, "update": {"status": "failed", "reason": "it ended with 1"}}
    monkeypatch.setattr(gpu, "run", lambda part, *_: ends[part] | {"seconds": 1.0})
    assert gpu.main(["--dry", "--parts", "limits", "update"]) == 1
    limits, update = capsys.readouterr().out.splitlines()[-2:]
    assert limits.split()[:2] == ["limits", "ok"]
    assert update.split()[:2] == ["update", "failed"]
    assert update.endswith("it ended with 1")
    assert gpu.main(["--dry", "--parts", "limits"]) == 0


HIDING = """
import runpy, sys
script, hidden, *words = sys.argv[1:]
class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] in hidden.split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder)
sys.path.insert(0, script.rpartition("/")[0])
sys.argv = [script, *words]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "hidden", "words", "absent"),
    [
        (
            "replay",
            "cpprb,torchrl,tensordict,flashbax,stable_baselines3",
            "--capacity 20480 --cases wide",
            {"cpprb", "TorchRL", "Stable-Baselines3", "flashbax (jit)"},
        ),
        ("envs", "gymnasium", "--tasks gym/Pendulum-v1 --num-envs 2", {"ours", "library"}),
        ("train", "gymnasium", "--device cpu", {"ours", "plain"}),
    ],
)
def test_whatever_is_not_installed_is_listed_with_its_reason(
    script: str, hidden: str, words: str, absent: set[str], tmp_path: Path
) -> None:
    path = ROOT / "bench" / f"bench_{script}.py"
    command = [sys.executable, "-c", HIDING, str(path), hidden, *words.split(), "--budget", "1"]
    done = subprocess.run(
        [*command, "--save", str(tmp_path / "found")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]
    found = harness.read(tmp_path / "found.json")["measurements"]
    assert {one["provider"] for one in found if one["value"] is None} == absent
    assert all(one["missing"] for one in found if one["value"] is None)
