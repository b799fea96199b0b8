"""Folders of finished runs, without training: what a report reads of them, with the numbers of a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from brc_fast.config import TrainConfig
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.studies.execute import prepare
from brc_fast.runs.studies.study import Run, Study

Score = Callable[[Run, str, int], float]  # of a run's task at a step


def finish(
    root: Path,
    run: Run,
    score: Score,
    *,
    kind: str = "success",
    signals: Mapping[str, Callable[[Run, int], float]] | None = None,
    parameters: int = 1000,
) -> None:
    """Write what `brc-fast train` leaves of a run that is over."""
    folder = RunFolder(root / run.name)
    folder.create(TrainConfig(tasks=run.tasks, steps=run.steps, seed=run.seed))
    every = run.settings["eval_every"]
    with folder.metrics.open("w") as file:
        for step in (*range(every, run.steps, every), run.steps):
            row: dict[str, float] = {"step": step, "eval/return_mean": 0.0}
            for task in run.tasks:
                row |= {f"eval/return/{task}": 0.0, f"eval/{kind}/{task}": score(run, task, step)}
            row |= {name: value(run, step) for name, value in (signals or {}).items()}
            file.write(json.dumps(row) + "\n")
    arrays = {"critic/kernel": np.zeros(parameters, np.float32), "actor/kernel": np.zeros(7, np.float32)}
    folder.save(run.steps, {"agent": arrays}, None)
    cost = {"wall_seconds": 2.0, "cpu_seconds": 1.5, "machine": {"cpu": "a processor"}, "commit": "abc"}
    (root / f"{run.name}.json").write_text(json.dumps(cost))


def make(root: Path, study: Study, runs: Sequence[Run], score: Score, **more: object) -> None:
    """A study's folder in which all these runs are finished."""
    prepare(root, study, runs)
    for run in runs:
        finish(root, run, score, **more)  # type: ignore[arg-type]
