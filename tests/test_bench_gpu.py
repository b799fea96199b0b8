"""The parts of bench/gpu.py on a CPU at tiny sizes, and what is stored where one cannot run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import require

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu

    return gpu


@pytest.fixture
def kept(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the results of a dry run go."""
    monkeypatch.setattr("gpu_parts.ROOT", tmp_path)
    return tmp_path / "build" / "gpu-dry"


def test_parts_share_the_budget_and_none_takes_more_than_nine_minutes(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda name: None)
    names = tuple(gpu.PARTS)
    shares = gpu.shares(names, 480.0)
    assert shares["limits"] == gpu.SHORT["limits"]
    assert len({shares[name] for name in names if name not in ("limits", "build")}) == 1
    assert sum(shares[name] for name in names if name != "build") == pytest.approx(480.0)
    assert max(gpu.shares(names, 1e6).values()) == gpu.LONGEST < 540
    assert gpu.shares(["build"], 480.0)["build"] == gpu.LONGEST
    assert gpu.shares(["limits"], 10.0) == {"limits": 10.0}


def test_a_dry_run_stores_measurements_of_limits_and_replay(
    gpu: Any, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness import read

    assert gpu.main(["--dry", "--parts", "limits", "replay"]) == 0
    for name in ("limits", "replay"):
        stored = read(kept / f"gpu-{name}.json")
        assert (stored["part"], stored["dry"], stored["status"]) == (name, True, "ok")
        assert all(entry["value"] > 0 for entry in stored["measurements"])
    assert {entry["provider"] for entry in stored["measurements"]} == {"device", "prefetched", "copied"}
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[:2] for line in table] == [["limits", "ok"], ["replay", "ok"]]


@pytest.mark.parametrize(("error", "status"), [("Skip", "skipped"), ("RuntimeError", "failed")])
def test_a_part_that_cannot_run_is_stored_with_its_reason(
    error: str, status: str, gpu: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(part: Any) -> dict[str, Any]:
        raise {"Skip": gpu.Skip, "RuntimeError": RuntimeError}[error]("no room")

    monkeypatch.setitem(gpu.PARTS, "kernels", broken)
    assert gpu.main(["--dry", "--parts", "kernels"]) == (1 if status == "failed" else 0)
    stored = json.loads((kept / "gpu-kernels.json").read_text())
    assert stored["status"] == status
    assert stored["reason"] == ("no room" if status == "skipped" else "RuntimeError: no room")


def runs(process: str) -> bool:
    """A process that ended and was not asked how is not counted."""
    try:
        return Path("/proc", process, "stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_what_a_part_measured_stays_when_its_process_dies_and_the_next_one_runs(
    gpu: Any, kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, crash = subprocess.Popen, "import os; os.kill(os.getpid(), 11)"
    hang = f"import subprocess as s, time; p = s.Popen(['sleep', '60']); open({str(kept / 'child')!r}, 'w')"
    hang += ".write(str(p.pid)); time.sleep(60)"
    scripts = {"kernels": crash, "update": crash, "scaling": hang, "limits": ""}

    def process(words: list[str], **options: Any) -> Any:
        if words[0] != sys.executable:  # for the header
            return start(words, **options)
        name, folder = words[words.index("--parts") + 1], Path(words[words.index("--folder") + 1])
        whole = {"status": "ok", "seconds": 2.0} if name == "limits" else {}
        if name in ("update", "limits"):  # the others die before they have anything
            (folder / f"gpu-{name}.json").write_text(json.dumps({"part": name, "rows": [1], **whole}))
        return start([sys.executable, "-S", "-c", scripts[name]], **options)

    kept.mkdir(parents=True)
    (kept / "gpu-kernels.json").write_text('{"status": "ok", "of": "an earlier run"}')
    monkeypatch.setattr(gpu, "END", 3.0)
    monkeypatch.setattr(gpu.subprocess, "Popen", process)
    assert gpu.main(["--dry", "--parts", "kernels", "update", "scaling", "limits"]) == 1
    found = {path.stem[4:]: json.loads(path.read_text()) for path in kept.glob("*.json")}
    assert {name: one["status"] for name, one in found.items()} == {
        **dict.fromkeys(("kernels", "update", "scaling"), "failed"),
        "limits": "ok",
    }
    assert found["update"]["rows"] == [1]
    assert "of" not in found["kernels"]
    assert found["kernels"]["reason"] == found["update"]["reason"] == "its process ended with -11"
    assert found["scaling"]["reason"] == "it was stopped after 3 s"
    end = time.monotonic() + 30.0
    while runs((kept / "child").read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[-4:]] == [*["failed"] * 3, "ok"]


def test_a_part_that_will_be_skipped_has_no_share_of_the_time(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda name: "mujoco" if name in ("envs", "train") else None)
    assert gpu.shares(["update", "envs", "train", "kernels"], 100.0)["update"] == 50.0
    assert gpu.shares(["envs"], 100.0)["envs"] > 0.0  # to say so


def test_results_that_failed_their_equality_check_are_a_failed_part(gpu: Any) -> None:
    import gpu_parts

    assert gpu_parts.judged({"equality": "passed"}) == {"equality": "passed"}
    wrong = gpu_parts.judged({"equality": "failed: plain differs"})
    assert (wrong["status"], wrong["reason"]) == ("failed", "failed: plain differs")


def test_what_is_not_installed_is_named(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_parts

    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jax" else object())
    for part in (gpu_parts.envs, gpu_parts.train):
        with pytest.raises(gpu.Skip, match="jax is not installed"):
            part(gpu.Part(1.0, "cpu", True, ROOT))


def test_without_a_gpu_there_is_one_line(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "bench/gpu.py: torch sees no CUDA device; --dry runs on the CPU\n"


@pytest.mark.parametrize("dry", [False, True])
def test_the_package_is_built_from_what_is_installed_to_a_folder_of_its_own(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, dry: bool
) -> None:
    parts, calls = importlib.import_module("gpu_parts"), list[list[str]]()
    monkeypatch.setattr(parts, "missing", lambda name: None)
    monkeypatch.setattr(parts.subprocess, "run", lambda words, check: calls.append(words))
    found = parts.build(parts.Part(1.0, "cpu", dry, parts.ROOT))
    assert found == {"site": "build/gpu-dry-site" if dry else ".site"}
    (words,) = calls
    assert words[-2:] == [str(parts.ROOT / found["site"]), str(parts.ROOT)]
    assert {"--no-index", "--no-build-isolation", "--no-deps"} < set(words)


def test_what_tests_found_is_stored_one_file_after_the_other(
    gpu: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slowest file does not cost the others their results, and ends before its part does."""
    parts, stored = importlib.import_module("gpu_parts"), kept / "gpu-test.json"
    (kept.parent.parent / "tests").mkdir(parents=True)
    for name in ("slow", "quick"):
        (kept.parent.parent / "tests" / f"test_{name}.py").write_text(
            "mark." + "gpu"
        )  # not found in this file

    def run(words: list[str], timeout: float, **options: Any) -> Any:
        assert 0.0 < timeout <= parts.TESTS < gpu.END
        if words[-1] == "tests/test_slow.py":
            end = time.monotonic() + 30.0
            while not stored.exists() or "quick" not in stored.read_text():
                assert time.monotonic() < end
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(words, timeout, output=b"one line")
        return subprocess.CompletedProcess(words, 0, "3 passed")

    monkeypatch.setattr(parts, "missing", lambda name: None)
    monkeypatch.setattr(parts.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(parts.subprocess, "run", run)
    monkeypatch.setattr("harness._git", lambda *words: None)
    found = parts.test(gpu.Part(1.0, "cuda", False, kept))
    assert found["reason"] == "pytest -m gpu failed: test_slow.py (124)"
    assert [one["summary"] for one in found["runs"]] == ["3 passed", "one line"]
    assert json.loads(stored.read_text())["runs"] == found["runs"]


def test_a_run_that_breaks_costs_neither_the_others_nor_the_learners(
    gpu: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = importlib.import_module("gpu_parts")

    def trained(name: str, words: str, seconds: float) -> dict[str, Any]:
        if name == "cheetah":
            raise RuntimeError("cheetah: brc-fast train ended with 1")
        return {"settings": words, "rates": {}, "evaluations": []}

    monkeypatch.setattr(parts, "missing", lambda name: None)
    monkeypatch.setattr(parts, "trained", trained)
    monkeypatch.setattr(parts, "time_to_return", lambda part: {"equality": "passed", "runs": ["a seed"]})
    found = parts.train(gpu.Part(1.0, "cuda", False, kept))
    assert (found["status"], found["reason"]) == ("failed", "cheetah: brc-fast train ended with 1")
    assert found["seeds"] == ["a seed"]
    assert ["missing" in run for run in found["runs"].values()] == [True, False, False]
    assert json.loads((kept / "gpu-train.json").read_text())["runs"] == found["runs"]


@pytest.mark.exhaustive
def test_a_dry_run_covers_scaling_and_training(gpu: Any, kept: Path) -> None:
    from harness import read

    require("mjx", "train")
    assert gpu.main(["--dry", "--parts", "scaling", "train"]) == 0
    scaling, train = (read(kept / f"gpu-{name}.json") for name in ("scaling", "train"))
    for stored in (scaling, train):
        assert (stored["status"], stored["equality"]) == ("ok", "passed")
    assert {entry["provider"] for entry in train["measurements"]} == {"ours", "plain"}
    assert train["runs"]["cartpole"]["evaluations"]
