"""What a study found, out of its folders alone.

A variant's score at a step is the interquartile mean over all its tasks and seeds together, with the 95%
interval of a bootstrap that draws seeds anew for each task (Agarwal et al. 2021, arXiv:2108.13264;
`scores.aggregate`). Only seeds count of which every task is finished, and all of them do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brc_fast import published
from brc_fast.disk import opened
from brc_fast.runs.arrays import ArrayFile
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.metrics import read_rows
from brc_fast.runs.plot import Array, Line, Metric, Series, evaluations
from brc_fast.runs.scores import COVERAGE, RESAMPLES, Estimate, aggregate

from .execute import Status, record, status, totals
from .study import Run

STATISTICS = ("iqm", "mean")
REACHED = (0.5, 0.8)  # of the score's scale: the steps to get there are told


@dataclass(frozen=True)
class Cell:
    """Finished runs of one variant on one group: S seeds, T tasks, P evaluations."""

    variant: str
    group: str
    runs: Sequence[Run]  # finished, of the seeds that count
    seeds: Sequence[int]
    tasks: Sequence[str]
    steps: Array  # [P] environment steps per task
    scores: NDArray[np.float64]  # [P, T, S]
    signals: Mapping[str, Sequence[Series]]  # by metric, of each run
    parameters: int  # of the critics of one run
    shown: bool
    alone: bool

    def line(self, statistic: str, tasks: Sequence[str] | None = None) -> Line:
        """A statistic over these tasks, by default all, at every step, with its interval."""
        places = [self.tasks.index(task) for task in (tasks or self.tasks)]
        return lines(self.steps, self.scores[:, places])[statistic]

    def final(self, last: int) -> dict[str, Estimate]:
        """Statistics of the runs' figures, the means of their last evaluations."""
        return aggregate(self.scores[-last:].mean(0))

    def reached(self, level: float) -> list[int | None]:
        """Of each seed, the first evaluated step at which its mean over the tasks is at the level; None where
        it never is."""
        return [first_step(self.steps, values, level) for values in self.scores.mean(1).T]


def lines(steps: Array, scores: NDArray[np.float64]) -> dict[str, Line]:
    """The STATISTICS of scores [P, T, S] at every step [P]; of one seed the interval is the value itself."""
    found, out = [aggregate(each) for each in scores], {}
    for name in STATISTICS:
        value, low, high = np.array([each[name] for each in found]).T
        low, high = (np.where(np.isnan(bound), value, bound) for bound in (low, high))
        out[name] = Line(steps, value, low, high, np.ones(len(steps), bool))
    return out


def first_step(steps: Array, values: Array, level: float) -> int | None:
    """The first step at which a curve [P] is at the level or above; None where it never is."""
    above = np.flatnonzero(values >= level)
    return int(steps[above[0]]) if len(above) else None


def median_step(steps: Sequence[int | None]) -> list[int | None]:
    """Median over seeds with the bounds of its 95% bootstrap interval. None, never, is later than any step;
    of two middle values the later one counts."""
    values = np.array([math.inf if step is None else step for step in steps])
    rng = np.random.default_rng(0)
    drawn = values[rng.integers(len(values), size=(RESAMPLES, len(values)))]
    medians = np.sort(np.sort(drawn, axis=1)[:, len(values) // 2])
    tails = ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2)
    bounds = [medians[min(RESAMPLES - 1, int(tail * RESAMPLES))] for tail in tails]
    middle = np.sort(values)[len(values) // 2]
    return [None if math.isinf(x) else int(x) for x in (middle, *bounds)]


def cells(root: Path, manifest: Mapping[str, Any]) -> list[Cell]:
    """Of every variant and group that has a seed of which all runs are finished."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in manifest["runs"].values():
        groups.setdefault((run.variant, run.group), []).append(run)
    found = [_cell(root, manifest, runs) for runs in groups.values()]
    return [cell for cell in found if cell is not None]


def _cell(root: Path, manifest: Mapping[str, Any], runs: Sequence[Run]) -> Cell | None:
    missing = {run.seed for run in runs if status(root, run).kind != "finished"}
    kept = [run for run in runs if run.seed not in missing]
    if not kept:
        return None
    metric: Metric = manifest["metric"]
    curves: dict[tuple[str, int], Series] = {}
    for run in kept:
        found = evaluations(RunFolder(root / run.name), metric)
        curves |= {(task, run.seed): found[task] for task in run.tasks}
    tasks = list(dict.fromkeys(task for task, _ in curves))
    seeds = sorted({run.seed for run in kept})
    steps = sorted(set.intersection(*(set(steps) for steps, _ in curves.values())))
    values = [[curves[task, seed] for seed in seeds] for task in tasks]
    scores = np.array([[_at(steps, each) for each in row] for row in values]).transpose(2, 0, 1)
    signals = {name: [_signal(root, run, name) for run in kept] for name in manifest["signals"]}
    signals = {name: found for name, found in signals.items() if all(steps for steps, _ in found)}
    first = kept[0]
    return Cell(
        first.variant,
        first.group,
        kept,
        seeds,
        tasks,
        np.array(steps, np.float64),
        scores,
        signals,
        parameters(RunFolder(root / first.name)),
        first.shown,
        first.alone,
    )


def _at(steps: Sequence[int], series: Series) -> list[float]:
    """The values of a curve at these of its steps."""
    values = dict(zip(*series, strict=True))
    return [values[step] for step in steps]


def _signal(root: Path, run: Run, name: str) -> Series:
    rows = [row for row in read_rows(RunFolder(root / run.name).metrics) if row.get(name) is not None]
    return [row["step"] for row in rows], [float(row[name]) for row in rows]


def signal_line(series: Sequence[Series]) -> Line:
    """Mean over seeds at the steps that all have, with the interval of its bootstrap."""
    shared = sorted(set.intersection(*(set(steps) for steps, _ in series)))
    values = np.array([_at(shared, each) for each in series])  # [S, P]
    rng = np.random.default_rng(0)
    drawn = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(drawn, ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2), axis=0)
    return Line(np.array(shared, np.float64), values.mean(0), low, high, np.ones(len(shared), bool))


def parameters(folder: RunFolder) -> int:
    """Of a run's critics, all members together."""
    newest = folder.newest()
    assert newest is not None
    with opened(newest / "agent.safetensors") as file:
        kinds = ArrayFile(file).kinds
    return sum(math.prod(kind.shape) for name, kind in kinds.items() if name.startswith("critic/"))


def published_scores(
    tasks: Sequence[str], metric: Metric, mode: published.Mode, until: float
) -> tuple[Array, NDArray[np.float64]] | None:
    """Steps [P] and scores [P, T, S] of the published runs of the same tasks, up to a step; None where a task
    has no curve, or none in this metric or on a known axis."""
    curves = [each for task in tasks if (each := published.curve(task, mode)) is not None]
    if len(curves) < len(tasks) or len({each.suite for each in curves}) > 1:
        return None
    steps = curves[0].steps
    if steps is None or published.score_unit(tasks[0]) != metric or steps[0] > until:
        return None
    kept = steps <= until
    return steps[kept].astype(np.float64), np.stack([each.scores[:, kept].T for each in curves], axis=1)


def published_line(
    tasks: Sequence[str], metric: Metric, mode: published.Mode, until: float, statistic: str
) -> Line | None:
    """A statistic of `published_scores`."""
    found = published_scores(tasks, metric, mode, until)
    return None if found is None else lines(*found)[statistic]


def report(root: Path, manifest: Mapping[str, Any], found: Sequence[Cell]) -> dict[str, Any]:
    """All that was found, as JSON: scores are [value, low, high], the bounds null where there is one seed."""
    runs = list(manifest["runs"].values())
    ended = {run.name: status(root, run) for run in runs}
    out: dict[str, Any] = {name: manifest[name] for name in ("study", "about", "metric", "statistic")}
    last = manifest["last"]
    out["figure"] = f"mean of the last {last} evaluations" if last > 1 else "last evaluation"
    out["results"] = [_result(cell, manifest) for cell in found]
    out["published"] = _published(manifest, found)
    out["failed"] = {name: each.told for name, each in ended.items() if each.kind == "failed"}
    out["unfinished"] = [name for name, each in ended.items() if each.kind in ("interrupted", "missing")]
    records = {run.name: record(root, run) for run in runs}
    out["machines"] = _different(each.get("machine") for each in records.values())
    out["commits"] = _different(each.get("commit") for each in records.values())
    out |= totals(root, runs)
    out["runs"] = {run.name: _told(run, ended[run.name], records[run.name], root) for run in runs}
    return out


def _told(run: Run, ended: Status, noted: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """State, cost and origin of a run; its folder is told from the one that holds the study's."""
    device = "cuda" if "gpu" in noted.get("machine", {}) else "cpu"
    known = {key: noted.get(key) for key in ("wall_seconds", "cpu_seconds", "commit")}
    words = run.words(Path(root.name), device)
    return {"state": ended.kind, **known, "command": ["brc-fast", "train", *words]}


def _different(values: Any) -> list[Any]:
    out: list[Any] = []
    for value in values:
        if value is not None and value not in out:
            out.append(value)
    return out


def _estimate(each: Estimate) -> list[float | None]:
    return [None if math.isnan(x) else round(x, 6) for x in each]


def _line(line: Line) -> dict[str, Any]:
    rows = zip(line.mean.tolist(), line.low.tolist(), line.high.tolist(), strict=True)
    return {
        "steps": line.steps.astype(int).tolist(),
        "values": [[None if math.isnan(x) else round(x, 6) for x in row] for row in rows],
    }


def _result(cell: Cell, manifest: Mapping[str, Any]) -> dict[str, Any]:
    final = cell.scores[-manifest["last"] :].mean(0)
    out: dict[str, Any] = {"variant": cell.variant, "group": cell.group, "shown": cell.shown}
    out["one_agent_per_task"] = cell.alone
    out |= {"seeds": list(cell.seeds), "tasks": list(cell.tasks), "steps": int(cell.steps[-1])}
    out |= {"settings": dict(cell.runs[0].settings), "critic_parameters": cell.parameters}
    out |= {name: _estimate(each) for name, each in cell.final(manifest["last"]).items()}
    out["by_task"] = {task: values.tolist() for task, values in zip(cell.tasks, final, strict=True)}
    out["curve"] = {name: _line(line) for name, line in lines(cell.steps, cell.scores).items()}
    out["curves"] = {
        task: [[round(x, 6) for x in seed] for seed in cell.scores[:, place].T.tolist()]
        for place, task in enumerate(cell.tasks)
    }
    if manifest["metric"] != "return":
        out["steps_to"] = {
            str(level): {"seeds": cell.reached(level), "median": median_step(cell.reached(level))}
            for level in REACHED
        }
    if cell.signals:
        out["signals"] = {name: _line(signal_line(series)) for name, series in cell.signals.items()}
    return out


def _published(manifest: Mapping[str, Any], found: Sequence[Cell]) -> list[dict[str, Any]]:
    """Curves of the same tasks, to the step that ours reach."""
    metric: Metric = manifest["metric"]
    modes: tuple[published.Mode, ...] = ("multi_task", "single_task")
    out: list[dict[str, Any]] = []
    for tasks, until in dict.fromkeys((tuple(cell.tasks), cell.steps[-1]) for cell in found if cell.shown):
        for mode in modes:
            if (told := published_scores(tasks, metric, mode, until)) is None:
                continue
            steps, scores = told
            drawn = {name: _line(line) for name, line in lines(steps, scores).items()}
            means = {task: scores[:, place].mean(1).tolist() for place, task in enumerate(tasks)}
            seeds = scores.shape[-1]
            out.append({"mode": mode, "tasks": tasks, "seeds": seeds, "curve": drawn, "by_task": means})
    return out


def table(told: Mapping[str, Any]) -> str:
    """A line for each result, then what is published at the same step, and what is missing."""
    rows = []
    for each in told["results"]:
        name = "-".join(filter(None, (each["variant"], each["group"])))
        name += "" if each["shown"] else f" ({len(each['tasks'])} other tasks)"
        seeds = f"{len(each['seeds'])} seed{'s' * (len(each['seeds']) != 1)}"
        row = [name, _bounds(each["iqm"]), _number(each["mean"][0]), seeds, f"{each['steps']:,} steps"]
        if "steps_to" in each:
            row += [f"{float(k):.0%}: {_steps(v['median'])}" for k, v in each["steps_to"].items()]
        rows.append(row)
    for each in told["published"]:
        iqm, mean = (each["curve"][name]["values"][-1] for name in STATISTICS)
        step, seeds = each["curve"]["iqm"]["steps"][-1], f"{each['seeds']} seeds"
        name = f"published BRC, {each['mode'].replace('_', '-')}"
        rows.append([name, _bounds(iqm), _number(mean[0]), seeds, f"{step:,} steps"])
    if not rows:
        return "no variant has a seed of which all runs are finished"
    head = ["variant", f"IQM of {told['metric']}, 95% interval", "mean"]
    columns = itertools.zip_longest(head, *rows, fillvalue="")
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def _bounds(values: Sequence[float | None]) -> str:
    value, low, high = values
    bounds = "" if low is None or high is None else f" [{_number(low)}, {_number(high)}]"
    return f"{_number(value or 0.0)}{bounds}"


def _steps(values: Sequence[int | None]) -> str:
    told = ["not reached" if each is None else f"{each:,}" for each in values]
    return told[0] if len(set(told)) == 1 else f"{told[0]} [{told[1]}, {told[2]}]"
