"""Runs that are killed, or sent a signal, at random moments, and go on until they are done.

    python tests/run_kills.py FOLDER --kills 300 --signals 200 [--seed 0]

A run of the toy environment, which goes on inside its episodes, is started again and again with
`--resume auto` in a fork of this process. In the end its rows, its parameters, its replay and everything else
of its newest checkpoint must be those of a run that was never stopped. A signal that found the loop must end
with its customary exit code, saved at the step that is told.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import matplotlib.figure
import torch

torch.set_num_threads(1)
import torch._dynamo  # of no use here: with all that follows it is paid for once, not by every fork
from conftest import EVALUATION_SLOTS, ToyEnv
from run_folders import assert_same_run
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

from brc_fast import envs
from brc_fast.command import arguments, progress  # noqa: F401
from brc_fast.command import main as cli
from brc_fast.runs import metrics, plot, trainer  # noqa: F401
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.interrupt import StopRequest

SIZES = [
    *("--num-envs", "4", "--steps", "240", "--random-steps", "40", "--batch-size", "32", "--threads", "1"),
    *("--critic.width", "16", "--actor.width", "16", "--report-every", "20", "--eval-every", "80"),
    *("--eval-episodes", str(EVALUATION_SLOTS), "--checkpoint-every", "60"),
]
LIMIT_SECONDS = 120


def start(run: Path) -> int:
    """Train in a fork until it is done or gone; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        envs.make = lambda tasks, num_envs, seed=0, **settings: ToyEnv(tasks, num_envs, {})
        arguments.expand = tuple
        code = cli.main(["train", "toy/One", "toy/Two", "--run", str(run), "--resume", "auto", *SIZES])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """The exit code, -n for signal n; None where it runs on."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def warm_up(picture: Path) -> None:
    """What a first picture loads: fonts, and how to place them."""
    figure = matplotlib.figure.Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], label="x")
    axes.legend()
    axes.set(title="x", xlabel="x", ylabel="x")
    figure.savefig(picture)


class Trials:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.endings: Counter[str] = Counter()
        self.places: Counter[str] = Counter()  # what there was when a kill came
        self.seconds: list[float] = []  # from a signal to the end of the process
        self.whole = folder / "whole"
        warm_up(folder / "warm.png")
        began = time.monotonic()
        self.finish(self.whole)
        self.duration = time.monotonic() - began

    def finish(self, run: Path) -> None:
        code = wait(start(run), LIMIT_SECONDS)
        if code != 0:
            raise AssertionError(f"{run} ended with {code}: {run.with_suffix('.log').read_text()}")

    def strike(self, run: Path, number: signal.Signals) -> bool:
        """Start, or go on, and send a signal at a random moment; whether it came before the end."""
        child = start(run)
        code = wait(child, self.random.uniform(0, 1.05) * self.duration)
        if code is not None:
            assert code == 0, run.with_suffix(".log").read_text()
            return False
        before = RunFolder(run).steps()
        os.kill(child, number)
        sent = time.monotonic()
        code = wait(child, LIMIT_SECONDS)
        self.endings[f"{number.name} -> {code}"] += 1
        if number == signal.SIGKILL:
            self.places["with checkpoints" if before else "before the first checkpoint"] += 1
            return code == -number
        told = run.with_suffix(".log").read_text()
        assert code in (0, -number, 128 + number), f"{number.name} ended with {code}: {told}"
        if code == 128 + number and "is saved and ends" in told:
            self.seconds.append(time.monotonic() - sent)
            step = int(re.findall(r"stopped at step (\d+)", told)[-1])
            assert RunFolder(run).steps()[-1] == step, told
        return code != 0

    def play(self, numbers: list[signal.Signals]) -> None:
        """Runs that are struck up to four times each, until all strikes have come."""
        left = list(numbers)
        while left:
            endings = dict(sorted(self.endings.items()))
            print(f"{len(left)} strikes left: {endings}", file=sys.stderr, flush=True)
            run = self.folder / "struck"
            for _ in range(self.random.randint(1, 4)):
                if left and self.strike(run, left[-1]):
                    left.pop()
            self.finish(run)
            assert_same_run(self.whole, run)
            shutil.rmtree(run)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name in ("--kills", "--signals", "--seed"):
        parser.add_argument(name, type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for number in StopRequest.SIGNALS:  # `nohup` and a shell's `&` ignore some, and runs would, too
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trials = Trials(given.folder, given.seed)
    others = [StopRequest.SIGNALS[i % len(StopRequest.SIGNALS)] for i in range(given.signals)]
    numbers = [signal.SIGKILL] * given.kills + others
    trials.random.shuffle(numbers)
    trials.play(numbers)
    print(dict(sorted(trials.endings.items())))
    print(dict(trials.places))
    if trials.seconds:
        slow = sorted(trials.seconds)
        print(f"from signal to end: median {slow[len(slow) // 2]:.2f} s, most {slow[-1]:.2f} s")
    print(f"{len(numbers)} strikes: every run went on and equals one that was never stopped")


if __name__ == "__main__":
    main()
