"""Learning curves from metrics.jsonl, beside the published ones.

Runs that differ in nothing but their seed are one experiment: a line at the mean, and a band at the 95%
interval of a stratified bootstrap of that mean (Agarwal et al. 2021, arXiv:2108.13264). For 2 or 3 seeds that
is the span from the lowest to the highest.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from brc_fast import published
from brc_fast.config import TrainConfig, flat
from brc_fast.disk import replace_file, require_replaceable
from brc_fast.errors import InputError, MissingExtraError

from .checkpoint import RunFolder
from .metrics import read_records, read_rows
from .scores import COVERAGE, RESAMPLES, normalized

Metric = Literal["return", "success", "normalized"]
Reference = Literal["auto", "single_task", "multi_task", "none"]
Group = Literal["seed", "none"]
Series = tuple[list[int], list[float]]  # environment steps per task, values
Array = NDArray[np.float64]
log = logging.getLogger(__name__)

# Told apart by lightness, too: in grey and by the colour-blind. The markers tell later ones apart.
COLOURS = ("#004488", "#e0a526", "#bb5566", "#12824c", "#7b4ea3", "#222222")
MARKERS = "os^Dv*"
GREY = "#8c8c8c"  # the published curves
AXIS = {"return": "evaluation return", "success": "success rate", "normalized": "normalized score"}
# Settings that change nothing of what is learned up to a given step.
NEUTRAL = (
    *("seed", "run", "overwrite", "steps", "threads", "graphs"),
    *("env.processes", "env.restarts", "env.step_seconds"),
    *("report_every", "eval_every", "eval_sampled", "eval_envs", "checkpoint_every"),
)
LITERAL = {"parse_math": False}  # for names, which may hold any letters: no TeX
SMALL = 12  # tasks; with more, their panels are small and the mean over tasks gets a large one


@dataclass(frozen=True)
class Experiment:
    """Runs that count as repetitions of one another, each a mapping from its tasks to their curves."""

    label: str
    runs: list[Mapping[str, Series]]

    def entry(self) -> str:
        """Of the legend: with the number of seeds, where there are several."""
        tasks = {task for run in self.runs for task in run}
        counts = [sum(task in run for run in self.runs) for task in tasks]
        few, many = min(counts), max(counts)
        return self.label if many == 1 else f"{self.label}, {few if few == many else f'{few}-{many}'} seeds"


class Line(NamedTuple):
    """What is drawn of an experiment in one panel, P points."""

    steps: Array
    mean: Array
    low: Array
    high: Array
    complete: NDArray[np.bool_]  # whether every run has got this far


def curves(folder: RunFolder, metric: Literal["return", "success"] = "return") -> dict[str, Series]:
    """Evaluation curves of a run: task -> (environment steps per task, mean return or share of successes)."""
    return _curves(read_rows(folder.metrics), metric)


def _curves(rows: Sequence[Mapping[str, Any]], metric: Literal["return", "success"]) -> dict[str, Series]:
    prefix = f"eval/{metric}/"
    out: dict[str, Series] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(prefix) and value is not None:
                steps, values = out.setdefault(name.removeprefix(prefix), ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return out


def evaluations(folder: RunFolder, metric: Metric) -> dict[str, Series]:
    """`curves` in the unit of `metric`; InputError where a run has none, or a task no known scale."""
    found = read_records(folder.metrics)
    returns, successes = (_curves(found.rows, kind) for kind in ("return", "success"))
    if not returns:
        why = ": see eval_every in its config.json"
        if found.faults:
            why = f"; {folder.metrics} {found.told()}"
        raise InputError(f"{folder.path} holds no evaluation to plot yet{why}")
    if found.faults:
        log.warning("%s %s; the other rows are drawn", folder.metrics, found.told())
    if metric == "success" and not successes:
        raise InputError(f"{folder.path} holds no success rate: its tasks report none; use --metric return")
    if metric != "normalized":
        return successes if metric == "success" else returns
    out = {}
    for task, (steps, values) in returns.items():
        rates = None
        if task in successes:
            told = dict(zip(*successes[task], strict=True))
            rates = np.array([told.get(step, math.nan) for step in steps])
        scaled = normalized(task, np.array(values), rates)
        if scaled is None:
            raise InputError(f"{folder.path}: nothing is known to normalize {task} by; use --metric return")
        out[task] = steps, scaled.tolist()
    return out


def experiments(folders: Sequence[RunFolder], metric: Metric, group: Group) -> list[Experiment]:
    """The runs, grouped by their settings; single-task runs of different tasks are one experiment."""
    configs = [folder.config() for folder in folders]
    told = [tuple(learning_settings(config).items()) for config in configs]
    runs = {(key, config.tasks, config.seed) for key, config in zip(told, configs, strict=True)}
    if group == "none" or len(runs) < len(folders):  # a run that was repeated is no further seed
        named = zip(_names(folders), folders, strict=True)
        return [Experiment(name, [evaluations(folder, metric)]) for name, folder in named]
    members: dict[tuple[tuple[str, Any], ...], list[RunFolder]] = {}
    for folder, key in zip(folders, told, strict=True):
        members.setdefault(key, []).append(folder)
    keys = [dict(key) for key in members]
    groups = list(members.values())
    differing = [name for name in keys[0] if len({key[name] for key in keys}) > 1]
    labels = [", ".join(_told(name, key[name]) for name in differing) or "brc-fast" for key in keys]
    if len(differing) > 3 or len(set(labels)) < len(labels):
        labels = _names([runs[0] for runs in groups])
    return [
        Experiment(label, [evaluations(run, metric) for run in runs])
        for label, runs in zip(labels, groups, strict=True)
    ]


def learning_settings(config: TrainConfig) -> dict[str, Any]:
    """What tells experiments apart: "critic.width" -> 256. Of the tasks, those that share an agent."""
    out = {name: value for name, value in flat(config).items() if name not in NEUTRAL}
    out["tasks"] = config.tasks if len(config.tasks) > 1 else ()
    if config.from_run is not None:  # seeds of one experiment may each begin with that seed's agent
        out["from_run"] = re.sub(rf"\bseed{config.seed}\b", "seed", config.from_run)
    return out


def _told(name: str, value: Any) -> str:
    if name == "tasks":
        return f"one agent for {len(value)} tasks" if value else "one agent per task"
    return f"{name}={value}"


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """Paths from the folder that they have in common."""
    paths = [folder.path.absolute() for folder in folders]
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


def published_runs(
    tasks: Sequence[str], metric: Metric, mode: published.Mode, last_step: float
) -> Experiment | None:
    """Published curves, up to a step, of those tasks that have one in this unit and on a known axis.

    A seed of a suite counts as one run of its tasks where they shared an agent.
    """
    runs: dict[tuple[object, int], dict[str, Series]] = {}
    simulators: dict[str, None] = {}
    for task in tasks:
        curve = published.curve(task, mode)
        if curve is None or curve.steps is None or metric not in ("normalized", published.score_unit(task)):
            continue
        scores = normalized(task, curve.scores, curve.scores) if metric == "normalized" else curve.scores
        kept = curve.steps <= last_step
        if scores is None or not kept.any():
            continue
        simulators[curve.simulator] = None
        for seed, values in enumerate(scores):
            run = runs.setdefault((curve.suite if mode == "multi_task" else task, seed), {})
            run[task] = curve.steps[kept].tolist(), values[kept].tolist()
    told = f"published BRC ({', '.join(simulators)}), {mode.replace('_', '-')}"
    return Experiment(told, list(runs.values())) if runs else None


def line(experiment: Experiment, tasks: Sequence[str]) -> Line | None:
    """Mean over `tasks` and runs, with the bootstrap interval of that mean; None where a task has no run,
    or at no step a run has them all.

    Runs are resampled among those of the same tasks, and interpolated between their evaluations.
    """
    strata: dict[frozenset[str], list[Mapping[str, Series]]] = {}
    for run in experiment.runs:
        if shared := frozenset(run).intersection(tasks):
            strata.setdefault(shared, []).append(run)
    if sum(map(len, strata)) != len(tasks):
        return None
    steps = np.unique(
        [step for shared in strata for run in strata[shared] for t in shared for step in run[t][0]]
    )
    mean, resampled = np.zeros(len(steps)), np.zeros((RESAMPLES, len(steps)))
    complete = np.ones(len(steps), bool)
    rng = np.random.default_rng(0)
    for shared, runs in strata.items():
        each = [[np.interp(steps, *run[task], math.nan, math.nan) for task in sorted(shared)] for run in runs]
        values = np.array(each).sum(1) / len(tasks)  # [N, P]
        known = np.isfinite(values)
        filled = np.where(known, values, 0.0)
        weights = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), RESAMPLES)
        with np.errstate(invalid="ignore"):  # 0 / 0 where no run, or none of a resample, has got this far
            mean += filled.sum(0) / known.sum(0)
            resampled += (weights @ filled) / (weights @ known)
        complete &= known.all(0)
    drawn = np.isfinite(mean)
    if not drawn.any():
        return None
    low, high = np.nanquantile(resampled[:, drawn], ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2), axis=0)
    return Line(steps[drawn], mean[drawn], low, high, complete[drawn])


def plot(
    folders: Sequence[RunFolder],
    output: Path,
    *,
    metric: Metric = "return",
    group: Group = "seed",
    reference: Reference = "auto",
) -> None:
    """Draw the evaluations of one or many runs, one panel per task and one of their mean, to PNG or SVG.

    Args:
        metric: "return"; "success", the share of successful episodes; "normalized": see `scores.normalized`.
        group: "seed": one line for runs that differ in nothing else; "none": one line for each run.
        reference: which published curves to draw behind. "auto": those of the kind that the runs are,
            single-task or multi-task, where there are any.

    Raises:
        InputError: nothing to plot, a file that cannot be read, or an option that does not fit the runs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plotting", "train") from error
    for name, value, known in (
        ("metric", metric, get_args(Metric)),
        ("group", group, get_args(Group)),
        ("reference", reference, get_args(Reference)),
    ):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if output.suffix not in (".png", ".svg"):
        raise InputError(f"output must end in .png or .svg, got {output}")
    if not folders:
        raise InputError("name at least one run folder")
    shown = experiments(folders, metric, group)
    if not output.absolute().parent.is_dir():
        raise InputError(f"there is no folder to write {output} to")
    require_replaceable(output, remedy="name another output")
    tasks = list(dict.fromkeys(task for experiment in shown for run in experiment.runs for task in run))
    behind = None
    if reference != "none":
        single = all(len(run) == 1 for experiment in shown for run in experiment.runs)
        mode: published.Mode = (
            ("single_task" if single else "multi_task") if reference == "auto" else reference
        )
        behind = published_runs(tasks, metric, mode, _last_step(shown))
        if behind is None and reference != "auto":
            told = f"no {mode} curve in {metric} up to step {_last_step(shown)} is published"
            raise InputError(f"{told} for {', '.join(tasks)}: leave --reference out")
    figure = Figure(layout="constrained")
    draw(figure, shown, tasks, metric, behind)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=output.suffix[1:], dpi=150)
    replace_file(output, drawn.getvalue())


def draw(
    figure: Any, shown: Sequence[Experiment], tasks: Sequence[str], metric: Metric, behind: Experiment | None
) -> None:
    """Lay out the panels in a matplotlib figure and draw the experiments, over the published runs.

    The panel of the mean over tasks is left out where no experiment has them all.
    """
    groups = [list(tasks)] if len(tasks) > 1 and any(line(each, tasks) for each in shown) else []
    groups += [[task] for task in tasks]
    small = len(tasks) > SMALL
    panels = _panels(figure, len(groups), small and len(groups) > len(tasks))
    families = {task.partition("/")[0] for task in tasks}
    family = families.pop() if len(families) == 1 and len(tasks) > 1 else ""
    last_step = _last_step(shown)
    unit, unit_name = (1e6, "millions") if last_step >= 1e6 else (1e3, "thousands")
    legend: dict[str, Any] = {}
    dashed = False
    for panel, group in zip(panels, groups, strict=True):
        large = not small or len(group) > 1
        for index, each in enumerate(shown):
            if found := line(each, group):
                style = {"color": COLOURS[index % len(COLOURS)], "linewidth": 1.8 if large else 1.2}
                if large and len(found.steps) <= 25:
                    style |= {"marker": MARKERS[index % len(MARKERS)], "markersize": 3.5}
                legend.setdefault(each.entry(), draw_curve(panel, found, unit, style))
                dashed |= not found.complete.all()
        if behind and (found := line(behind, group)):
            style = {"color": GREY, "linewidth": 1.6 if large else 1.0, "zorder": 1.5}
            legend.setdefault(behind.entry(), draw_curve(panel, found, unit, style))
        title = _drawable(_title(group, family))
        size, room = (10, 70 if len(panels) == 1 else 34) if large else (7.5, 24)  # letters at that size
        size *= min(1, room / max(1, len(title)))
        panel.set_title(title, fontsize=size, loc="left", pad=5 if large else 3, **LITERAL)
        draw_frame(panel, metric, last_step / unit, large)
    figure.supxlabel(f"environment steps per task ({unit_name})", fontsize=9)
    figure.supylabel(AXIS[metric], fontsize=9)
    repeated = any(each.entry() != each.label for each in (*shown, *([behind] if behind else [])))
    captions = ["line: mean over seeds; band: its 95% bootstrap interval"] * repeated
    captions += ["dashed: not every seed has got there"] * dashed
    captions += ["published: 25k steps per point (inferred)"] * (behind is not None)
    if len(legend) > 1 or captions:
        draw_legend(figure, legend, captions)


def _last_step(shown: Sequence[Experiment]) -> int:
    return max(steps[-1] for each in shown for run in each.runs for steps, _ in run.values())


def draw_legend(figure: Any, entries: Mapping[str, Any], captions: Sequence[str]) -> None:
    """Above the panels, under its captions; the figure grows by it."""
    letters = int(14 * figure.get_figwidth())
    columns = max(1, min(len(entries), letters // (max(map(len, entries), default=0) + 8)))
    title = "; ".join(captions)
    title = title if len(title) < letters else "\n".join(captions)
    rows = math.ceil(len(entries) / columns) + title.count("\n") + 1
    figure.set_figheight(figure.get_figheight() + 0.17 * rows)
    layout = {"loc": "outside upper left", "ncols": columns, "frameon": False, "alignment": "left"}
    fonts = {"fontsize": 8, "title_fontsize": 8}
    names = list(map(_drawable, entries))
    legend = figure.legend(list(entries.values()), names, title=title, **fonts, **layout)
    for text in legend.get_texts():
        text.set(**LITERAL)


def _title(group: Sequence[str], family: str) -> str:
    """The task, or how many; a family that is common to all is named once."""
    if len(group) == 1:
        return group[0].removeprefix(f"{family}/")
    return f"mean of {len(group)} {family} tasks" if family else f"mean of {len(group)} tasks"


def _drawable(name: str) -> str:
    """A name without what no font has: half a surrogate pair, as a folder's bytes that are no text become."""
    return name.encode(errors="backslashreplace").decode()


def _panels(figure: Any, count: int, large_first: bool) -> list[Any]:
    """Axes in reading order; with `large_first` the first covers two rows and two columns."""
    cells = count + 3 * large_first
    if cells > SMALL + 1:
        columns, width, height = round(math.sqrt(1.2 * cells)), 1.75, 1.3
    else:
        columns, width, height = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3, 9: 3}.get(cells, 4), 3.3, 2.5
    rows = math.ceil(cells / columns)
    figure.set_size_inches((6.2, 4.1) if count == 1 else (0.6 + width * columns, 0.5 + height * rows))
    grid = figure.add_gridspec(rows, columns)
    places = [(row, column) for row in range(rows) for column in range(columns)]
    first = []
    if large_first:
        first = [figure.add_subplot(grid[:2, :2])]
        places = [place for place in places if max(place) > 1]
    places = places[: count - len(first)]
    panels = [figure.add_subplot(grid[place]) for place in places]
    for panel, (row, column) in zip(panels, places, strict=True):
        panel.tick_params(labelbottom=(row + 1, column) not in places)
    return first + panels


def draw_curve(panel: Any, found: Line, unit: float, style: dict[str, Any]) -> Any:
    """Line and band; dashed where some runs are missing. Returns the line, for the legend."""
    steps = found.steps / unit
    band = {"color": style["color"], "alpha": 0.16, "linewidth": 0, "zorder": style.get("zorder", 2) - 0.5}
    panel.fill_between(steps, found.low, found.high, **band)
    if not found.complete.all():
        panel.plot(steps, found.mean, linestyle=(0, (2, 1.5)), **style)
    (handle,) = panel.plot(steps, np.where(found.complete, found.mean, math.nan), **style)
    return handle


def draw_frame(panel: Any, metric: Metric, longest: float, large: bool) -> None:
    panel.set_xlim(0, longest * 1.02)
    if metric == "success":
        panel.set_ylim(-0.03, 1.03)
    else:
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]) if panel.dataLim.ymin < 0 else 0.0)
    panel.locator_params(axis="x", nbins=6 if large else 3)
    panel.locator_params(axis="y", nbins=6 if large else 3)
    panel.tick_params(labelsize=8 if large else 6.5, length=2, color="#b0b0b0")
    panel.grid(color="#e9e9e9", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#b0b0b0")
