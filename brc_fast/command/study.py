"""`brc-fast study`: make the runs of a study, and report what they found."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from brc_fast.config import TrainConfig, preset
from brc_fast.disk import require_replaceable
from brc_fast.errors import InputError
from brc_fast.learner.precision import cores
from brc_fast.runs.checkpoint import RunFolder, write_text
from brc_fast.runs.studies.execute import Executor, prepare, read_manifest, require_memory
from brc_fast.runs.studies.named import named
from brc_fast.runs.studies.named import table as names
from brc_fast.runs.studies.picture import draw
from brc_fast.runs.studies.results import cells, report, table
from brc_fast.runs.studies.study import Run, Study, from_toml

from .arguments import parse, resolve_device, with_settings

FAILED = 1


@dataclass(frozen=True)
class StudyArguments:
    """Make the runs of a study that are not finished, and report what all of them found. A run that was
    interrupted goes on. Exit codes: 0 done; 1 a run failed; 2 bad input; 128 + n ended by signal n, and the
    same command goes on."""

    study: tyro.conf.Positional[str]
    """One of the names that `brc-fast study` lists, or a TOML file of your own."""
    scale: Literal["tiny", "small", "full"] | None = None
    """tiny: two CPU cores, and what is taken when not given; small: one GPU; full: the published sizes."""
    runs: str = "runs/studies"
    """Folder that holds a folder NAME-SCALE for each study."""
    seeds: int = 3
    """0 to N - 1, of every variant."""
    only: tuple[str, ...] = ()
    """These variants alone, and what they start from."""
    steps: int | None = None
    """Environment steps per task, in place of the study's."""
    tasks: tuple[str, ...] = ()
    """Tasks or suites, in place of the study's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the runs' learners are; at the scale tiny on the CPU."""
    workers: int | None = None
    """Runs at once: as many as there are cores, or GPUs, when not given."""
    budget: float | None = None
    """Seconds after which the runs are saved and stopped; the same command goes on."""
    finished: bool = False
    """Make no run, and report what there is."""
    save: str | None = None
    """JSON of what was found; results.json in the study's folder when not given."""
    picture: str | None = None
    """PNG or SVG; picture.png in the study's folder when not given."""


def study(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not words:
        print(names())
        return 0
    given = parse(StudyArguments, words, "study")
    for name in ("seeds", "workers", "steps", "budget"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            raise InputError(f"{name} must be positive, got {value}")
    wanted = _study(given)
    root = Path(given.runs) / wanted.name
    save = Path(given.save) if given.save else root / "results.json"
    picture = Path(given.picture) if given.picture else root / "picture.png"
    if picture.suffix not in (".png", ".svg"):
        raise InputError(f"picture must end in .png or .svg, got {picture}")
    for file in (save, picture):
        if file.parent != root and not file.absolute().parent.is_dir():
            raise InputError(f"there is no folder to write {file} to")
        require_replaceable(file, remedy="name another file")
    runs, stopped = wanted.runs(given.seeds, given.only), None
    if given.finished:
        manifest = read_manifest(root)
    else:
        tiny = wanted.name.endswith("-tiny") and given.device == "auto"
        device = "cpu" if tiny else resolve_device(given.device)
        configs = [_config(run, device, wanted.name) for run in runs]
        gpus = torch.cuda.device_count() if device == "cuda" else 0
        workers = given.workers or gpus or cores()
        workers = require_memory(configs, workers, device, gpus, given.workers is not None)
        with RunFolder(root).claim():
            manifest = prepare(root, wanted, runs)
            seconds = math.inf if given.budget is None else given.budget
            stopped = Executor(root, device, workers, gpus, seconds=seconds, say=_say).execute(runs)
    found = cells(root, manifest)
    told = report(root, manifest, found)
    write_text(save, json.dumps(told, indent=1) + "\n")
    print(table(told))
    if any(cell.shown for cell in found):
        draw(found, manifest, picture)
        print(f"{save}, {picture}")
    for name, error in told["failed"].items():
        print(f"failed: {name}: {error}")
    if told["unfinished"]:
        print(f"{len(told['unfinished'])} of {len(manifest['runs'])} runs are not finished")
    if stopped is not None:
        return 128 + stopped
    return FAILED if told["failed"].keys() & {run.name for run in runs} else 0


def _study(given: StudyArguments) -> Study:
    if not given.study.endswith(".toml"):
        return named(given.study, given.scale or "tiny", given.steps, given.tasks)
    if given.scale is not None:
        raise InputError("a study of a file has one scale, its own: leave --scale out")
    return from_toml(Path(given.study), given.steps, given.tasks)


def _config(run: Run, device: str, source: str) -> TrainConfig:
    """The settings of a run, as `brc-fast train` will have them; InputError for what it would refuse."""
    settings = {name: value for name, value in run.settings.items() if not name.startswith("transfer.")}
    told = f"{source}, variant {run.variant}"
    config = with_settings(preset(device), settings, told)
    try:
        return dataclasses.replace(config, tasks=run.tasks, seed=run.seed)
    except InputError as error:
        raise InputError(f"{told}: {error}") from error


def _say(line: str) -> None:
    print(line, flush=True)
