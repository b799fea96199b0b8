"""A thousand steps of training, from the command line, on simulators other than MJX."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from extras import needs

from brc_fast.command import main as cli

pytestmark = pytest.mark.slow


def train(run: Path, *words: str) -> int:
    sizes = "--critic.width 16 --critic.num-atoms 11 --actor.width 16 --batch-size 32 --replay-capacity 1000"
    lengths = (
        "--random-steps 200 --report-every 500 --eval-every 1000 --eval-episodes 1 --env.episode-length 100"
    )
    words = (*words, "--run", str(run), "--device", "cpu", *sizes.split(), *lengths.split())
    return cli.main(["train", *words])


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("tasks", "sizes"),
    [
        pytest.param(["dmc/dog-run"], (223, 38), marks=needs("dmc")),
        pytest.param(["envpool/DogRun-v1"], (223, 38), marks=needs("envpool")),
        pytest.param(["metaworld/reach-v3", "metaworld/push-v3"], (39, 4), marks=needs("envpool")),
        pytest.param(
            ["gym/Pendulum-v1", "dmc/cartpole-swingup", "envpool/CheetahRun-v1", "metaworld/reach-v3"],
            (39, 6),
            marks=needs("dmc", "envpool"),
        ),
    ],
)
def test_a_thousand_steps_are_learned_from_saved_and_resumed(
    tasks: list[str], sizes: tuple[int, int], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(run, *tasks, "--num-envs", "2", "--steps", "1000") == 0
    written = rows(run)
    last = written[-2]
    assert last["step"] == 1000
    assert last["train/updates"] > 300
    assert np.isfinite(last["train/critic_loss"])
    for task in tasks:
        assert f"train/return/{task}" in last
        assert last[f"train/dropped/{task}"] == 0
        assert f"eval/return/{task}" in written[-1]
        assert (f"eval/success/{task}" in written[-1]) == task.startswith("metaworld/")
        assert (f"train/success/{task}" in last) == task.startswith("metaworld/")
    assert written[-1]["eval/length/" + tasks[0]] == 100
    assert not multiprocessing.active_children()

    assert cli.main(["train", "--resume", str(run), "--steps", "1200"]) == 0
    assert rows(run)[-1]["step"] == 1200
    assert (run / "learning_curve.png").exists()
    from brc_fast.runs.checkpoint import RunFolder
    from brc_fast.runs.evaluate import restore

    _, agent = restore(RunFolder(run), "cpu")
    assert (agent.observation_size, agent.action_size) == sizes
