"""Scores on one scale for all tasks, and their aggregates with intervals.

Aggregates follow Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(arXiv:2108.13264).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brc_fast.envs.suites import MJX_TASKS
from brc_fast.published import normalization

Values = NDArray[np.float64]

RESAMPLES = 2_000
COVERAGE = 0.95

# EnvPool's names: a dm_control domain, the task, version 1. Its Gymnasium namesakes have other versions.
_DOMAINS = (
    "Acrobot|BallInCup|Cartpole|Cheetah|Dog|Finger|Fish|Hopper|Humanoid|HumanoidCMU|Manipulator|Pendulum|PointMass|"
    "Quadruped|Reacher|Swimmer|Walker"
)
_ENVPOOL_DMC = re.compile(rf"envpool/({_DOMAINS})[A-Z]\w*-v1")
_SUCCESS = re.compile(r"metaworld/|envpool/(MetaWorld/|HandManipulate|HandReach|AdroitHand)")


def normalized(task: str, returns: Values, successes: Values | None) -> Values | None:
    """Scores of episodes, or of means over episodes, of one task; None where no scale is known.

    ============================================ =================================================
    MetaWorld and robot hands                    success, where it is known (not None, not NaN)
    dm_control, also in MJX and EnvPool          return / 1000
    what `published.normalization` has           (return - random) / (reference - random), the two
    (HumanoidBench, Atari)                       as published
    ============================================ =================================================

    All of them presume that episodes have the length that the suite gives them.
    """
    if _SUCCESS.match(task):
        return None if successes is None or np.isnan(successes).any() else successes
    suite, _, name = task.partition("/")
    if suite == "mjx" and name not in MJX_TASKS:
        return None
    if suite in ("mjx", "dmc") or _ENVPOOL_DMC.fullmatch(task):
        return returns / 1000.0
    if (scale := normalization(task)) is None:
        return None
    random, reference = scale
    return (returns - random) / (reference - random)


class Estimate(NamedTuple):
    """A statistic with the bounds of its 95% interval; NaN bounds where there is but one sample per task."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        bounds = "" if np.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{bounds}"


def interquartile_mean(scores: Values) -> Values:
    """Mean of the middle half of all scores [..., T, R] together: a quarter, rounded down, is cut off at
    either end."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    middle: Values = flat[..., cut : flat.shape[-1] - cut].mean(-1)
    return middle


def aggregate(scores: Values, seed: int = 0) -> dict[str, Estimate]:
    """Statistics of scores [T, R] of R runs, or of R episodes of one run, on T tasks.

    `iqm`: the interquartile mean; `mean`; `median`: over the tasks, of their means. The bounds are
    percentiles of a stratified bootstrap: R of the R samples are drawn for each task on its own.
    """
    tasks, samples = scores.shape
    statistics: dict[str, Callable[[Values], Values]] = {
        "iqm": interquartile_mean,
        "mean": lambda scores: scores.mean((-2, -1)),
        "median": lambda scores: np.median(scores.mean(-1), axis=-1),
    }
    rng = np.random.default_rng(seed)
    bounds = dict.fromkeys(statistics, (np.nan, np.nan))
    if samples > 1:
        drawn = rng.integers(samples, size=(RESAMPLES, tasks, samples))
        resampled = scores[np.arange(tasks)[:, None], drawn]
        tails = (1 - COVERAGE) / 2, (1 + COVERAGE) / 2
        bounds = {name: tuple(np.quantile(of(resampled), tails)) for name, of in statistics.items()}
    return {name: Estimate(float(of(scores)), *map(float, bounds[name])) for name, of in statistics.items()}
