"""The progress bar of a run; plain lines where there is no terminal."""

from __future__ import annotations

import math
import sys
import time

from tqdm import tqdm

from brc_fast.config import TrainConfig


class Progress:
    """Shows return, updates/s, environment steps/s and time left.

    Args:
        done: environment steps per task already taken (after a resume).
        quiet: shows nothing.
    """

    def __init__(self, config: TrainConfig, done: int, quiet: bool = False) -> None:
        self._quiet = quiet
        self._total, self._first, self._started = config.steps, done, time.monotonic()
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
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def report(self, step: int, row: dict[str, float]) -> None:
        """Take a row of metrics: a training report moves the bar, an evaluation is printed above it."""
        if "eval/return_mean" in row:
            self._evaluation = row
            self._print(f"step {step}  evaluation  {self.best()}")
            return
        returns = [value for name, value in row.items() if name.startswith("train/return/")]
        if returns:
            self._training = sum(returns) / len(returns)
        updates, steps = row["time/updates_per_second"], row["time/environment_steps_per_second"]
        mean = "-" if math.isnan(self._training) else f"{self._training:.0f}"  # no episode has ended yet
        told = f"return {mean}  {updates:.0f} updates/s  {steps:.0f} env steps/s"
        if self._terminal:
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            seconds = (time.monotonic() - self._started) / max(1, step - self._first) * (self._total - step)
            self._print(f"step {step} of {self._total}  {told}  {seconds / 60:.1f} min left")

    def best(self) -> str:
        """The newest evaluation: few tasks one by one, of many the mean."""
        prefix = "eval/return/"
        returns = {k.removeprefix(prefix): v for k, v in self._evaluation.items() if k.startswith(prefix)}
        if not returns:
            return "no evaluation"
        told = ", ".join(f"{name} {value:.1f}" for name, value in returns.items())
        if len(returns) > 4:
            told = f"mean of {len(returns)} tasks {self._evaluation['eval/return_mean']:.1f}"
        successes = self._evaluation.get("eval/success_mean")
        return told if successes is None else f"{told}, success {successes:.0%}"

    def _print(self, text: str) -> None:
        if self._quiet:
            return
        if self._terminal:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
