"""What a study is: variants of the settings, on groups of tasks, with seeds; each combination is one run."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from brc_fast.config import require_known
from brc_fast.disk import LONGEST, opened
from brc_fast.envs import expand
from brc_fast.errors import InputError
from brc_fast.published import score_unit
from brc_fast.runs.plot import Metric

Settings = Mapping[str, Any]  # of `brc-fast train`, by their names on the command line: critic.width -> 256
Drawing = Literal["curves", "sizes", "starts"]
NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)  # of a variant: it is the name of a folder


@dataclass(frozen=True)
class Group:
    """Tasks that are learned by one agent, or by one agent each, and the environment steps of every task."""

    tasks: tuple[str, ...]
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", expand(self.tasks))
        if self.steps < 1:
            raise InputError(f"steps must be positive, got {self.steps}")


@dataclass(frozen=True)
class Variant:
    """Settings that are compared with those of the other variants."""

    settings: Settings = field(default_factory=dict)
    alone: bool = False
    """One agent per task, instead of one for all tasks of a group."""
    share: float = 1.0
    """Of the group's steps: what costs more per step may take fewer."""
    source: str | None = None
    """The variant from whose run, of the same seed, this one starts (`brc-fast train --from`)."""
    tasks: tuple[str, ...] | None = None
    """Its own, in place of the group's: what a source learns. It is not drawn beside the others."""


@dataclass(frozen=True)
class Run:
    """One call of `brc-fast train`."""

    variant: str
    group: str
    seed: int
    tasks: tuple[str, ...]
    settings: Settings
    source: str | None = None  # name of the run that it starts from
    alone: bool = False  # its task is one of several that are reported together
    shown: bool = True

    @property
    def name(self) -> str:
        """Of its folder: VARIANT-seedN, with the group in the middle where there are several, or the task."""
        task = re.sub(r"[^\w.+-]", "-", self.tasks[0], flags=re.ASCII) if self.alone else ""
        return "-".join(filter(None, (self.variant, self.group, task, f"seed{self.seed}")))

    @property
    def steps(self) -> int:
        return int(self.settings["steps"])

    def words(self, root: Path, device: str, fresh: bool = True) -> list[str]:
        """The words of `brc-fast train` that make the run in its folder under `root`, or go on with it."""
        options: dict[str, Any] = {"resume": "auto", "run": root / self.name, "seed": self.seed}
        options |= {"device": device, "quiet": True}
        if device == "cpu":
            options["threads"] = 1
        if self.source is not None and fresh:
            options["from"] = root / self.source
        # how a run starts is settled once it has: the source may have been deleted meanwhile
        options |= {name: each for name, each in self.settings.items() if fresh or "transfer." not in name}
        return [*self.tasks, *(_word(name, value) for name, value in options.items())]


def _word(name: str, value: Any) -> str:
    """An option of the command line: --critic.width=256, --no-reward-scale, --env.no-processes."""
    section, dot, inner = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{section}{dot}{'' if value else 'no-'}{inner}"
    return f"--{section}{dot}{inner}={value}"


@dataclass(frozen=True)
class Study:
    """A list of runs and how they are reported. Making one touches nothing."""

    name: str  # of its folder
    about: str  # in one line
    groups: Mapping[str, Group]  # "" names the only one
    variants: Mapping[str, Variant]
    settings: Settings = field(default_factory=dict)  # of all variants
    metric: Metric = "return"
    statistic: Literal["iqm", "mean"] = "iqm"  # of the picture; the JSON has both
    last: int = 1  # evaluations that the figure of a run is the mean of
    evaluations: int = 10  # of a run
    drawing: Drawing = "curves"
    signals: tuple[str, ...] = ()  # metrics that are drawn beside the scores

    def __post_init__(self) -> None:
        for name, variant in self.variants.items():
            require_name("variant", name)
            if variant.source is not None:
                require_known(f"the source of variant {name}", variant.source, self.variants)
                if self.variants[variant.source].source is not None or self.variants[variant.source].alone:
                    raise InputError(f"variant {name} starts from {variant.source}, which has to stand alone")
        for name in filter(None, self.groups):
            require_name("group", name)

    def runs(self, seeds: int, only: Sequence[str] = ()) -> list[Run]:
        """In the order in which they are made: all variants of a seed before the next seed."""
        for name in only:
            require_known("only", name, self.variants)
        chosen = set(only or self.variants)
        chosen |= {source for name in chosen if (source := self.variants[name].source)}
        found = [run for seed in range(seeds) for run in self._of_seed(seed) if run.variant in chosen]
        names = [run.name for run in found]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"two runs would have the folder {twice}: name variants and tasks otherwise")
        return found

    def _of_seed(self, seed: int) -> Iterator[Run]:
        for name, variant in self.variants.items():
            for label, group in self.groups.items():
                tasks = group.tasks if variant.tasks is None else expand(variant.tasks)
                steps = max(1, int(group.steps * variant.share))
                settings = {**self._settings(steps), **variant.settings}
                each = Run(name, label, seed, tasks, settings, shown=variant.tasks is None)
                if variant.source is not None:
                    source = dataclasses.replace(each, variant=variant.source)
                    each = dataclasses.replace(each, source=source.name)
                if not variant.alone:
                    yield each
                    continue
                settings.pop("analysis_every", None)  # there is nothing to compare in an agent of one task
                for task in tasks:
                    yield dataclasses.replace(each, tasks=(task,), settings=settings, alone=True)

    def _settings(self, steps: int) -> dict[str, Any]:
        every = max(1, steps // self.evaluations)
        known = {"steps": steps, "eval_every": every, "checkpoint_every": max(1, steps // 5)}
        return {**known, "replay_capacity": steps, **self.settings}

    def manifest(self, runs: Iterable[Run]) -> dict[str, Any]:
        """What study.json keeps of it: all that a report needs besides the runs' own folders."""
        told = {"study": self.name, "about": self.about, "metric": self.metric, "last": self.last}
        told |= {"statistic": self.statistic, "drawing": self.drawing, "signals": list(self.signals)}
        return {**told, "runs": {run.name: dataclasses.asdict(run) for run in runs}}


def metric_of(tasks: Sequence[str]) -> Metric:
    """What the published scores of these tasks are; where they differ, or there are none, the return."""
    return "success" if all(score_unit(task) == "success" for task in tasks) else "return"


def require_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise InputError(f"{what} must be named by letters, digits, '.', '+' and '-', got {name!r:.80}")


def from_toml(path: Path, steps: int | None = None, tasks: Sequence[str] = ()) -> Study:
    """A user's own study; InputError, which names the file, for what does not fit.

        about = "How wide the critic must be"
        tasks = ["metaworld/study8"]
        steps = 30_000
        settings = { num_envs = 1, updates_per_step = 2 }

        [variants.narrow]
        settings = { critic.width = 64 }

        [variants.single]
        alone = true
        settings = { critic.width = 64, batch_size = 64 }

    steps, tasks: in place of the file's.
    """
    try:
        with opened(path) as file:
            given = tomllib.loads(file.read(LONGEST).decode())
        return _study(path.stem, given, steps, tasks)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (InputError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from error


def _study(name: str, given: dict[str, Any], steps: int | None, tasks: Sequence[str]) -> Study:
    require_name("the file", name)
    kinds: dict[str, type] = {"about": str, "metric": str, "steps": int, "tasks": list, "settings": dict}
    _require_kinds("", given, kinds | {"variants": dict, "last": int, "evaluations": int})
    if not given.get("variants"):
        raise InputError("it has no variants: add a table [variants.NAME] for each")
    variants = {}
    for label, table in given["variants"].items():
        if not isinstance(table, dict):
            raise InputError(f"variants.{label} must be a table, got {table!r:.60}")
        kinds = {"settings": dict, "alone": bool, "share": float, "source": str, "tasks": list}
        _require_kinds(f"variants.{label}.", table, kinds)
        values = dict(table, settings=named_settings(table.get("settings", {})))
        variants[label] = Variant(**values | ({"tasks": tuple(table["tasks"])} if "tasks" in table else {}))
    chosen = tuple(tasks or given.get("tasks", ()))
    if not chosen:
        raise InputError('it has no tasks: add a line such as tasks = ["metaworld/study8"]')
    if steps is None and "steps" not in given:
        raise InputError("it has no steps: add a line such as steps = 30_000")
    group = Group(chosen, given["steps"] if steps is None else steps)
    metric = given.get("metric", metric_of(group.tasks))
    require_known("metric", metric, ("return", "success", "normalized"))
    more = {key: given[key] for key in ("last", "evaluations") if key in given}
    for key, value in more.items():
        if value < 1:
            raise InputError(f"{key} must be positive, got {value}")
    settings = named_settings(given.get("settings", {}))
    return Study(name, given.get("about", ""), {"": group}, variants, settings, metric=metric, **more)


def _require_kinds(where: str, table: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for name, value in table.items():
        require_known(f"each name{f' in {where[:-1]}' if where else ''}", name, kinds)
        kind = kinds[name]
        fits = type(value) in ((int, float) if kind is float else (kind,))
        if kind is list:
            fits = fits and all(isinstance(each, str) for each in value)
        if not fits:
            told = "a list of names" if kind is list else kind.__name__
            raise InputError(f"{where}{name} must be {told}, got {value!r:.60}")
        if name == "share" and not 0 < value <= 1:
            raise InputError(f"{where}{name} must be in (0, 1], got {value}")


def named_settings(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their names on the command line, of tables in tables."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key.replace("-", "_")
        out |= named_settings(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return out
