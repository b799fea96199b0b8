"""The progress bar of a run; plain lines where there is no terminal."""

from __future__ import annotations

import math
import sys
from collections import deque
from typing import NamedTuple

from tqdm import tqdm

from brc_fast.config import TrainConfig


class Interval(NamedTuple):
    """What went by between two training reports."""

    steps: int
    seconds: float  # without evaluations


class TimeLeft:
    """How long a run still takes, by rows of metrics: what a step costs once updates run, and an evaluation.

    Args:
        done: environment steps per task already taken (after a resume).
    """

    RECENT = 10  # reports: the machine may have become slower or faster

    def __init__(self, config: TrainConfig, done: int) -> None:
        self._config = config
        self._step = self._evaluated = done
        self._learning = False  # whether updates ran before the interval that ends with the next report
        self._intervals: deque[Interval] = deque(maxlen=self.RECENT)
        self._evaluations: deque[float] = deque(maxlen=self.RECENT)  # seconds

    def take(self, step: int, row: dict[str, float]) -> None:
        """One row of metrics."""
        if "eval/return_mean" in row:
            self._evaluations.append(row["time/evaluation_seconds"])
            self._evaluated = step
            return
        if self._learning:
            seconds = row["time/seconds"] * (1.0 - row["time/evaluation_share"])
            self._intervals.append(Interval(step - self._step, seconds))
        self._step, self._learning = step, row["train/updates"] > 0

    def evaluations(self) -> int:
        """How many are still to come, with one that is due at this step."""
        config = self._config
        last = -(-config.steps // config.num_envs) * config.num_envs  # steps are those of whole vectors
        due = last // config.eval_every - self._evaluated // config.eval_every
        return due + ((last - config.num_envs) // config.eval_every == last // config.eval_every)

    def __str__(self) -> str:
        """ "3.2 min left", or what is known of it; empty before updates have run for a whole report."""
        if not self._intervals:
            return ""
        steps, seconds = map(sum, zip(*self._intervals, strict=True))
        left = (self._config.steps - self._step) * seconds / steps
        count = self.evaluations()
        if count and not self._evaluations:
            return f"{left / 60:.1f} min and {count} evaluation{'s' * (count > 1)} left"
        if count:
            left += count * sum(self._evaluations) / len(self._evaluations)
        return f"{left / 60:.1f} min left"


class Progress:
    """Shows return, updates/s, environment steps/s and time left.

    Args:
        done: environment steps per task already taken (after a resume).
        quiet: shows nothing.
    """

    def __init__(self, config: TrainConfig, done: int, quiet: bool = False) -> None:
        self._quiet = quiet
        self._total, self._left = config.steps, TimeLeft(config, done)
        self._training = float("nan")
        self._evaluation: dict[str, float] = {}
        self._terminal = sys.stderr is not None and sys.stderr.isatty()  # None: it was closed
        self._bar = tqdm(
            total=config.steps,
            initial=done,
            unit_scale=True,
            disable=quiet or not self._terminal,
            dynamic_ncols=True,
            smoothing=0.05,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def report(self, step: int, row: dict[str, float]) -> None:
        """Take a row of metrics: a training report moves the bar, an evaluation is printed above it."""
        self._left.take(step, row)
        if "eval/return_mean" in row:
            self._evaluation = row
            self._print(f"step {step}  evaluation  {self.best()}")
            return
        returns = [value for name, value in row.items() if name.startswith("train/return/")]
        if returns:
            self._training = sum(returns) / len(returns)
        updates, steps = row["time/updates_per_second"], row["time/environment_steps_per_second"]
        mean = "-" if math.isnan(self._training) else f"{self._training:.0f}"  # no episode has ended yet
        told = f"return {mean}  {updates:.0f} updates/s  {steps:.0f} env steps/s  {self._left}".rstrip()
        if self._terminal:
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._print(f"step {step} of {self._total}  {told}")

    def best(self) -> str:
        """The newest evaluation: few tasks one by one, of many the mean; and with the policy's noise."""
        prefix = "eval/return/"
        returns = {k.removeprefix(prefix): v for k, v in self._evaluation.items() if k.startswith(prefix)}
        if not returns:
            return "no evaluation"
        told = ", ".join(f"{name} {value:.1f}" for name, value in returns.items())
        if len(returns) > 4:
            told = f"mean of {len(returns)} tasks {self._evaluation['eval/return_mean']:.1f}"
        successes = self._evaluation.get("eval/success_mean")
        told = told if successes is None else f"{told}, success {successes:.0%}"
        sampled = self._evaluation.get("eval/sampled_return_mean")
        return told if sampled is None else f"{told} (sampled {sampled:.1f})"

    def _print(self, text: str) -> None:
        if self._quiet:
            return
        if self._terminal:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
