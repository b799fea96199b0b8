"""The command line's view of the settings: tasks are positional, and a run can be resumed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import tyro

from .checkpoint import RunFolder
from .config import TrainConfig, preset
from .errors import InputError

Parsed = TypeVar("Parsed")
CHANGEABLE = ("steps", "report_every", "eval_every", "checkpoint_every", "device", "threads")


@dataclass(frozen=True)
class TrainArguments(TrainConfig):
    """Train one BRC agent. The defaults shown are the ones for this device."""

    tasks: tyro.conf.Positional[tuple[str, ...]] = ()
    """Environment names such as mjx/CartpoleSwingup; several train one agent."""
    resume: str | None = None
    """Go on from the newest checkpoint of this run folder; of the settings, only the length, the intervals,
    the device and the threads may be given with it."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Returns of a run's policy (its newest checkpoint), with the mean action."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    episodes: int = 10
    """Episodes per task."""
    seed: int = 1_000_000
    """Of the start states."""


@dataclass(frozen=True)
class PlotArguments:
    """Learning curves of one or many runs, one panel per task."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs."""
    output: str | None = None
    """PNG or SVG file; RUN/learning_curve.png for one run and learning_curves.png for several."""


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
            if line.startswith("─") and told:
                break
            told.append(line)
        raise InputError(f"{' '.join(told)}; see brc-fast {command} --help") from None


def parse_train(words: Sequence[str], device: str) -> tuple[TrainConfig, RunFolder | None]:
    """The run's settings over the defaults for `device`, and the folder to resume, if any."""
    resume = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "--resume"), None)
    default = preset(device) if resume is None else RunFolder(resume).config()
    names = [field.name for field in fields(TrainConfig)]
    arguments = parse(
        TrainArguments, words, "train", TrainArguments(**{n: getattr(default, n) for n in names})
    )
    config = TrainConfig(**{name: getattr(arguments, name) for name in names})
    if resume is None:
        return config, None
    for name in names:
        if name not in CHANGEABLE and getattr(config, name) != getattr(default, name):
            raise InputError(
                f"{name} cannot change when a run is resumed: it was {getattr(default, name)}; "
                f"only {', '.join(CHANGEABLE)} can"
            )
    return config, RunFolder(resume)
