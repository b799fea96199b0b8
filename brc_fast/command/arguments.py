"""The command line's view of the settings: tasks are positional, and a run can be resumed."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
import tyro

from brc_fast.config import TrainConfig, preset
from brc_fast.envs import expand
from brc_fast.errors import InputError
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.plot import Group, Metric, Reference

Parsed = TypeVar("Parsed")
CHANGEABLE = (
    *("steps", "report_every", "eval_every", "checkpoint_every"),
    *("device", "threads", "precision", "graphs", "recompute"),
)


@dataclass(frozen=True)
class TrainArguments(TrainConfig):
    """Train one BRC agent. The defaults shown are the ones for this device; "BRC" marks the value of the
    authors' published code."""

    tasks: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of tasks such as mjx/CartpoleSwingup or suites such as mjx/dmc25; several train one agent."""
    resume: str | None = None
    """Go on from the newest checkpoint of this run folder; of the settings, only the length, the intervals
    and the device, with how it computes, may be given with it."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Returns, successes and scores of the policies of runs (newest checkpoint, mean action)."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs; several are seeds of one experiment, with the same tasks."""
    episodes: int = 10
    """Episodes per task."""
    seed: int = 1_000_000
    """Of the start states."""
    num_envs: int | None = None
    """Environments per task that play them; the smaller of episodes and 10 when not given."""
    json: str | None = None
    """Write the numbers of all runs, and their aggregate, to this file too."""


@dataclass(frozen=True)
class VideoArguments:
    """One episode of a run's policy (newest checkpoint, mean action), at the speed of the simulated time."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    task: str | None = None
    """Which of the run's tasks; the first when not given."""
    output: str | None = None
    """GIF, or MP4 where ffmpeg is installed; RUN/video-<task>.gif when not given."""
    seed: int = 1_000_000
    """Of the start state."""
    size: str = "480x640"
    """Height and width in pixels."""
    fps: int = 25
    """Frames per second, at most; the nearest number that divides the control rate is taken."""
    camera: str | None = None
    """Name or number of a camera of the model; its first one, or a free view, when not given."""


@dataclass(frozen=True)
class PlotArguments:
    """Learning curves of one or many runs, one panel per task."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs."""
    output: str | None = None
    """PNG or SVG file; RUN/learning_curve.png for one run and learning_curves.png for several."""
    metric: Metric = "return"
    """What to draw; normalized: 0 for a random policy, as the suite's published results are."""
    group: Group = "seed"
    """seed: one line, with an interval, for runs that differ in nothing else; none: one line for each run."""
    reference: Reference = "auto"
    """Published BRC curves to draw behind; auto: of the kind that the runs are, where there are any."""


def parse(kind: type[Parsed], words: Sequence[str], command: str, default: Parsed | None = None) -> Parsed:
    """Settings from the words of the command line; InputError, in one line, for words that do not fit."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            if default is None:
                return tyro.cli(kind, args=list(words), prog=f"brc-fast {command}")
            return tyro.cli(kind, args=list(words), prog=f"brc-fast {command}", default=default)
    except SystemExit as stop:
        if stop.code == 0:
            raise
        lines = [line.strip("│╭╮╰╯ ") for line in box.getvalue().splitlines()]
        told: list[str] = []
        for line in lines[1:]:
            if line.startswith(("─", "---")):  # a rule, which is of hyphens where stdout is not UTF-8
                if told:
                    break
                continue
            told.append(line)
        line = " ".join(told).removeprefix(f"Error parsing {kind.__name__}: ").rstrip(".")
        raise InputError(f"{line}; see brc-fast {command} --help") from None


def resolve_device(wanted: str) -> str:
    """ "auto" becomes "cuda" where torch sees a GPU, else "cpu"."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch sees no CUDA device; see brc-fast doctor")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def option(words: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`: what the defaults depend on is needed before they do."""
    for word, following in itertools.pairwise([*words, None]):
        if word == f"--{name}":
            return following
        if word and word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


def parse_train(words: Sequence[str]) -> tuple[TrainConfig, RunFolder | None]:
    """The run's settings over the defaults for its device, and the folder to resume, if any."""
    resume, device = option(words, "resume"), option(words, "device")
    if resume is not None:
        RunFolder(resume).require_plain()
        default = RunFolder(resume).config()
        RunFolder(resume).require_foreign_code(default.tasks)
        if not RunFolder(resume).steps():
            raise InputError(f"{resume} holds no complete checkpoint: train it anew, with --overwrite")
    else:
        default = preset(resolve_device(device if device in ("cpu", "cuda") else "auto"))
    names = [field.name for field in fields(TrainConfig)]
    given = TrainArguments(**{name: getattr(default, name) for name in names})
    arguments = parse(TrainArguments, words, "train", given)
    config = TrainConfig(**{name: getattr(arguments, name) for name in names})
    if config.tasks:
        config = replace(config, tasks=expand(config.tasks))
    if resume is None:
        return config, None
    for name in names:
        if name not in CHANGEABLE and getattr(config, name) != getattr(default, name):
            raise InputError(
                f"{name} cannot change when a run is resumed: it was {getattr(default, name)}; "
                f"only {', '.join(CHANGEABLE)} can"
            )
    return config, RunFolder(resume)
