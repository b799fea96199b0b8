"""Which settings learn best on a CPU: returns of runs that differ in one setting.

    python bench/bench_defaults.py [--variants NAME ...] [--tasks NAME ...] [--seeds N] [--workers N]
        [--runs FOLDER] [--finished] [--save NAME]

A run is `brc-fast train` with the defaults of a CPU, one thread, and the settings of a variant; those that
cost more per environment step take fewer of them, so that all cost about the same. Runs are kept under FOLDER
as VARIANT/TASK-SEED, and one that is finished is not made again: what was stopped goes on. A run that fails
is named, and the others go on.

A figure is the mean over the seeds that are finished (`rounds`) of the mean return of a run's last three
evaluations; its low and high are the worst and the best seed. `seconds` are those of the processor, all
threads, start and evaluations included: what else the machine does hardly changes them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Parser, Results, git, positive

LAST = 3  # evaluations that a run's figure is the mean of
EVALUATIONS = 10  # of a run
RETURN = "eval/return_mean"


class Task(NamedTuple):
    names: tuple[str, ...]
    steps: int  # environment steps per task


class Variant(NamedTuple):
    options: tuple[str, ...]
    share: float = 1.0  # of a task's steps, so that costs are the same


FOUR = ("reach-v3", "drawer-close-v3", "button-press-topdown-v3", "window-open-v3")
TASKS = {
    "swingup": Task(("mjx/CartpoleSwingup",), 200_000),
    "cheetah": Task(("gym/HalfCheetah-v5",), 300_000),
    "hopper": Task(("gym/Hopper-v5",), 300_000),
    "reach": Task(("metaworld/reach-v3",), 100_000),
    "four": Task(tuple(f"metaworld/{name}" for name in FOUR), 100_000),
}
RATE = "--learning.learning-rate"
VARIANTS = {
    "lr-3e-4": Variant((RATE, "3e-4")),
    "lr-6e-4": Variant((RATE, "6e-4")),
    "lr-1e-3": Variant((RATE, "1e-3")),
    "lr-2e-3": Variant((RATE, "2e-3")),
    "updates-2": Variant((RATE, "1e-3", "--updates-per-step", "2"), 0.55),
    "batch-256": Variant((RATE, "1e-3", "--batch-size", "256"), 0.55),
    "width-256": Variant((RATE, "1e-3", "--critic.width", "256"), 0.35),
    "entropy-1": Variant((RATE, "1e-3", "--learning.target-entropy-per-action=-1")),
}


class Job(NamedTuple):
    variant: str
    task: str
    seed: int

    def folder(self, root: Path) -> Path:
        return root / self.variant / f"{self.task}-{self.seed}"

    def record(self, root: Path) -> Path:
        """What is written when the run is over."""
        return self.folder(root).with_suffix(".json")

    @property
    def steps(self) -> int:
        return int(TASKS[self.task].steps * VARIANTS[self.variant].share) // 5_000 * 5_000

    def words(self, root: Path, dry: bool) -> list[str]:
        """The command line of the run."""
        steps = 200 if dry else self.steps
        every = max(1, steps // EVALUATIONS // 1_000 * 1_000) if not dry else 100
        words = [*TASKS[self.task].names, "--run", str(self.folder(root)), "--seed", str(self.seed)]
        words += ["--overwrite", "--device", "cpu", "--threads", "1", "--steps", str(steps)]
        words += ["--eval-every", str(every), "--checkpoint-every", str(2 * steps), "--no-eval-sampled"]
        if dry:
            words += ["--random-steps", "50", "--eval-episodes", "1", "--env.episode-length", "50"]
        return [*words, *VARIANTS[self.variant].options]

    def run(self, root: Path, dry: bool) -> None:
        """Train, unless that is done, and note what it cost."""
        if self.record(root).exists():
            return
        folder, begun = self.folder(root), time.time()
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "brc_fast", "train", *self.words(root, dry)]
        with folder.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        if code := os.waitstatus_to_exitcode(status):
            print(f"{folder} ended with exit code {code}: see {log.name}", file=sys.stderr)
            return
        told = {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.time() - begun}
        told |= {"commit": git("rev-parse", "HEAD"), "command": command[3:]}
        self.record(root).write_text(json.dumps(told) + "\n")

    def figure(self, root: Path) -> float:
        """Mean of the last evaluations."""
        rows = map(json.loads, (self.folder(root) / "metrics.jsonl").read_text().splitlines())
        values = [row[RETURN] for row in rows if RETURN in row][-LAST:]
        return float(sum(values) / len(values))


def tell(found: Results, jobs: Sequence[Job], root: Path) -> None:
    """The measurements of what is finished."""
    for task in dict.fromkeys(job.task for job in jobs):
        for variant in dict.fromkeys(job.variant for job in jobs):
            those = [job for job in jobs if (job.task, job.variant) == (task, variant)]
            done = [job for job in those if job.record(root).exists()]
            if not done:
                found.add(task, variant, "return", None, 0, missing="no run is finished")
                continue
            values = [job.figure(root) for job in done]
            records = [json.loads(job.record(root).read_text()) for job in done]
            spread = min(values), sum(values) / len(values), max(values)
            told: dict[str, Any] = {"seeds": values, "steps": done[0].steps, "better": "more"}
            told["commits"] = sorted({record["commit"] for record in records})
            told["seconds"] = [record["cpu"] for record in records]
            found.add(task, variant, "return", spread, len(values), **told)
            found.store()


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("build/defaults"), metavar="FOLDER")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--workers", type=positive, default=1, help="runs at once, each on one thread")
    parser.add_argument("--finished", action="store_true", help="make no further run")
    parser.add_argument("--save", metavar="NAME", help="of a file under bench/results")
    parser.add_argument("--dry", action="store_true", help="tiny runs")
    given = parser.parse_args(words)
    seeds = range(given.seeds)
    jobs = [Job(variant, task, seed) for variant in given.variants for seed in seeds for task in given.tasks]
    torch.set_num_threads(1)  # as every run has it, for what the result says of threads
    told = {"variants": {name: VARIANTS[name].options for name in given.variants}}
    told |= {"tasks": {name: TASKS[name].names for name in given.tasks}}
    found = Results("defaults", given.save, **told)
    if not given.finished:
        with ThreadPoolExecutor(given.workers) as pool:
            list(pool.map(lambda job: job.run(given.runs, given.dry), jobs))
    tell(found, jobs, given.runs)
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
