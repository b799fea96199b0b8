"""Whatever is not installed is listed with its reason, in every benchmark, and the others are timed."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import require

ROOT = Path(__file__).resolve().parent.parent
# sys.modules[name] = None is what an absent module looks like to `import` and to `find_spec`
HIDING = """
import runpy, sys
for name in {hidden!r}:
    sys.modules[name] = None
sys.argv = {argv!r}
sys.path.insert(0, {bench!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(name: str, hidden: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    argv = [str(ROOT / "bench" / name), *words]
    code = HIDING.format(hidden=hidden, argv=argv, bench=str(ROOT / "bench"))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def measured(name: str, hidden: list[str], words: list[str], path: Path) -> dict[str, list[dict[str, Any]]]:
    """Measurements of each provider."""
    done = run(name, hidden, *words, "--save", str(path.with_suffix("")))
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in json.loads(path.read_text())["measurements"]:
        found.setdefault(entry["provider"], []).append(entry)
        reason = entry.get("missing")
        assert (entry["value"] is None) == (reason is not None)
        assert reason is None or reason in done.stdout
    return found


def test_replay_buffers_that_are_missing_are_listed(tmp_path: Path) -> None:
    require("gymnasium")  # else that is what Stable-Baselines3's lacks
    peers = {
        "cpprb": "cpprb",
        "stable_baselines3": "Stable-Baselines3",
        "torchrl": "TorchRL",
        "flashbax": "flashbax (jit)",
    }
    words = ["--cases", "locomotion", "--capacity", "20480", "--budget", "1"]
    found = measured("bench_replay.py", list(peers), words, tmp_path / "replay.json")
    for module, name in peers.items():
        assert all(module in entry["missing"] for entry in found[name])
    assert all(entry["value"] > 0 for entry in found["brc-fast"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("module", ["jax", "optax"])
def test_a_missing_jax_learner_is_listed(module: str, tmp_path: Path) -> None:
    words = ["--device", "cpu", "--providers", "ours", "plain", "jax", "--width", "16", "--batch", "8"]
    found = measured("bench_update.py", [module], [*words, "--budget", "15"], tmp_path / "update.json")
    assert [entry["missing"] for entry in found["jax"]] == [
        f'{module} is not installed; pip install "brc-fast[bench]"'
    ]
    assert found["ours"][0]["value"] > 0 < found["plain"][0]["value"]


@pytest.mark.parametrize(
    ("tasks", "hidden"),
    [
        (
            # of dm_control's tasks, shimmy and envpool can each run one
            ["mjx/CartpoleSwingup", "dmc/cartpole-swingup", "envpool/CartPole-v1", "metaworld/reach-v3"],
            ["mujoco_playground", "shimmy", "envpool"],
        ),
        (["gym/Pendulum-v1"], ["gymnasium"]),
    ],
    ids=["simulators", "gymnasium"],
)
def test_tasks_whose_simulator_is_missing_are_listed(
    tasks: list[str], hidden: list[str], tmp_path: Path
) -> None:
    words = ["--tasks", *tasks, "--num-envs", "2", "--budget", "1"]
    found = measured("bench_envs.py", hidden, words, tmp_path / "envs.json")
    assert found.keys() == {"ours", "library"}
    for entries in found.values():
        assert [entry["case"].split()[0] for entry in entries] == tasks
        for entry in entries:
            assert any(name in entry["missing"] for name in hidden) or "pip install" in entry["missing"]


def test_a_task_that_cannot_be_trained_on_is_listed(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--budget", "1"]
    found = measured("bench_train.py", ["gymnasium"], words, tmp_path / "train.json")
    assert found.keys() == {"ours", "plain"}
    assert all("pip install" in entry["missing"] for entry in [*found["ours"], *found["plain"]])


def test_kernels_without_peers_say_why(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    done = run("bench_kernels.py", ["liger_kernel"], "--dry", "--ops", "bias_layer_norm", "--json", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    entries = json.loads(path.read_text())["measurements"]
    absent = [entry for entry in entries if entry["provider"] in ("kernels", "liger")]
    assert absent
    assert all(entry["missing"] in done.stdout for entry in absent)
    (liger,) = {entry["missing"] for entry in absent if entry["provider"] == "liger"}
    assert liger == 'liger_kernel is not installed; pip install "brc-fast[bench]"'
    assert any(entry["value"] for entry in entries if entry["provider"] == "eager")


@pytest.mark.parametrize("name", ["limits", "update", "scaling", "train", "kernels"])
def test_a_gpu_that_is_not_there_is_one_line_and_exit_code_2(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "bench" / f"bench_{name}.py")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setattr(sys, "argv", [path] if name == "kernels" else [path, "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench_{name}: torch sees no CUDA device")
