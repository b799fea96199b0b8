"""Scores that the BRC authors released, by the task ids of this package. Their source: data/README.md."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

Mode = Literal["single_task", "multi_task"]
STEPS_PER_POINT = 25_000  # environment steps per task; inferred, the release does not state its axis
SUCCESS = ("metaworld", "shadowhand")  # suites whose score is the share of successes; elsewhere, the return
SIMULATORS = {
    "dmc": "dm_control",
    "humanoidbench": "HumanoidBench",
    "humanoidbench_hard": "HumanoidBench",
    "metaworld": "MetaWorld v2",
    "shadowhand": "ShadowHand",
}
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Curve:
    """Evaluations of one task while it was learned, S seeds with P points each."""

    suite: str
    task: str  # its published name
    steps: NDArray[np.int64] | None  # [P] environment steps per task (inferred); None: the axis is unknown
    scores: NDArray[np.float64]  # [S, P], in the unit of `score_unit`

    @property
    def seeds(self) -> int:
        return len(self.scores)

    @property
    def mean(self) -> NDArray[np.float64]:
        """[P], over the seeds."""
        return np.asarray(self.scores.mean(0))

    @property
    def low(self) -> NDArray[np.float64]:
        """[P], the lowest of the seeds."""
        return np.asarray(self.scores.min(0))

    @property
    def high(self) -> NDArray[np.float64]:
        """[P], the highest of the seeds."""
        return np.asarray(self.scores.max(0))

    @property
    def simulator(self) -> str:
        """What the task ran in, which need not be what the id asked for runs in: MJX is not dm_control."""
        return SIMULATORS[self.suite]


def published_name(task: str) -> str:
    """The name that the release would have for a task id: "dog-run" for dmc/dog-run and envpool/DogRun-v1,
    "reach-v2-goal-observable" for metaworld/reach-v3. A published name stands for itself."""
    if match := re.fullmatch(r"metaworld/([a-z-]+)-v3|envpool/MetaWorld/(\w+)-v3", task):
        return _hyphenated(match[1] or match[2]) + "-v2-goal-observable"
    if match := re.fullmatch(r"mjx/(\w+)|envpool/(\w+)-v1", task):
        return _hyphenated(match[1] or match[2])
    return re.sub(r"^(dmc/|humanoidbench/|gym/humanoid_bench:)", "", task)


def curve(task: str, mode: Mode = "multi_task") -> Curve | None:
    """The published curve of a task id, or None where there is none."""
    name = published_name(task)
    runs = _scores().get((name, mode))
    if runs is None:
        return None
    suite = runs[0][0]
    scores = np.array([points.split() for _, points in runs], np.float64)
    steps = None if suite == "shadowhand" else STEPS_PER_POINT * np.arange(1, scores.shape[1] + 1)
    return Curve(suite, name, steps, scores)


def score_unit(task: str) -> Literal["return", "success"]:
    """What published scores of this task are: returns of an episode, or shares of successes."""
    return "success" if _suite(task) in SUCCESS else "return"


def normalization(task: str) -> tuple[float, float] | None:
    """The returns that count as 0, of a random policy, and as 1; None where none are published.

    HumanoidBench has them, and Atari by the bare names of its games. Other suites need none.
    """
    return _normalization().get(published_name(task))


def task_list(name: str) -> tuple[str, ...]:
    """Published names of the tasks of a benchmark, such as DMC_DOGS; InputError for an unknown one."""
    lists = _task_lists()
    if name not in lists:
        raise InputError(f"unknown task list {name!r}: one of {', '.join(lists)}")
    return lists[name]


def _suite(task: str) -> str | None:
    runs = _scores().get((published_name(task), "multi_task"))
    return runs[0][0] if runs else None


def _hyphenated(name: str) -> str:
    """DogRun and dog-run -> dog-run."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


@cache
def _scores() -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(task, mode) -> (suite, scores) of every seed; the numbers are read only where a curve is asked for."""
    runs: dict[tuple[str, str], list[tuple[str, str]]] = {}
    with (DATA / "scores.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            runs.setdefault((row["task"], row["mode"]), []).append((row["suite"], row["scores"]))
    return runs


@cache
def _normalization() -> dict[str, tuple[float, float]]:
    with (DATA / "normalization.csv").open(newline="") as file:
        return {
            row["task"]: (float(row["random_score"]), float(row["reference_score"]))
            for row in csv.DictReader(file)
        }


@cache
def _task_lists() -> dict[str, tuple[str, ...]]:
    return {name: tuple(names) for name, names in json.loads((DATA / "task_lists.json").read_text()).items()}
