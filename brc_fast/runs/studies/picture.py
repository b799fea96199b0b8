"""One picture of a study, in the style of `runs.plot`: published curves are grey, and stand behind."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brc_fast.disk import replace_file
from brc_fast.errors import MissingExtraError
from brc_fast.published import STEPS_PER_POINT, Mode
from brc_fast.runs.plot import (
    AXIS,
    COLOURS,
    GREY,
    LITERAL,
    MARKERS,
    Line,
    Metric,
    draw_curve,
    draw_frame,
    draw_legend,
)

from .results import REACHED, Cell, median_step, published_line, signal_line

PUBLISHED: dict[Mode, dict[str, Any]] = {  # how they are drawn
    "multi_task": {"linestyle": "-", "marker": ".", "markersize": 6},
    "single_task": {"linestyle": ":", "marker": "x", "markersize": 4},
}
TITLES = {
    "analysis/spread_td_error": "TD errors, spread over tasks",
    "analysis/spread_gradient_norm": "gradient norms, spread over tasks",
    "analysis/spread_entropy": "entropies, spread over tasks",
    "analysis/gradient_similarity": "cosine similarity of task gradients",
}
MANY = 12  # tasks of which each has a panel
ACROSS = 5  # panels of tasks in a row


def draw(found: Sequence[Cell], manifest: Mapping[str, Any], output: Path) -> None:
    """Draw the variants that are shown to PNG or SVG; there must be one."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plotting", "train") from error
    shown = [cell for cell in found if cell.shown]
    figure = Figure(layout="constrained")
    seeds = sorted({len(cell.seeds) for cell in shown})
    told = "1 seed" if seeds == [1] else f"{'-'.join(map(str, sorted({seeds[0], seeds[-1]})))} seeds"
    captions = [f"{manifest['study']}: {manifest['about']}" if manifest["about"] else manifest["study"]]
    statistic = {"iqm": "interquartile mean", "mean": "mean"}[manifest["statistic"]]
    captions += [f"{statistic} over tasks and {told}; band or bar: 95% stratified bootstrap interval"]
    if manifest["drawing"] == "sizes":
        legend = _sizes(figure, shown, manifest)
    elif len({cell.group for cell in shown}) > 1:
        legend = _groups(figure, shown, manifest)
    else:
        legend = _curves(figure, shown, manifest)
        captions += ["ring: mean"] * (manifest["drawing"] == "curves" and manifest["statistic"] != "mean")
    captions += ["published: 25k steps per point (inferred)"] * any("published" in name for name in legend)
    draw_legend(figure, legend, captions)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=output.suffix[1:], dpi=150)
    replace_file(output, drawn.getvalue())


def _style(place: int, large: bool) -> dict[str, Any]:
    style = {"color": COLOURS[place % len(COLOURS)], "linewidth": 1.8 if large else 1.2}
    return style | ({"marker": MARKERS[place % len(MARKERS)], "markersize": 3.5} if large else {})


def _behind(
    tasks: Sequence[str], manifest: Mapping[str, Any], until: float
) -> dict[str, tuple[Line, dict[str, Any]]]:
    """Published lines of these tasks, with how they are drawn."""
    found = {}
    for mode, style in PUBLISHED.items():
        line = published_line(tasks, manifest["metric"], mode, until, manifest["statistic"])
        if line is not None:
            found[f"published BRC, {mode.replace('_', '-')}"] = line, {"color": GREY, "zorder": 1.5, **style}
    return found


def _unit(last: float) -> tuple[float, str]:
    return (1e6, "millions") if last >= 1e6 else (1e3, "thousands")


def _name(panel: Any, title: str, size: float) -> None:
    panel.set_title(title, fontsize=size, loc="left", pad=4, **LITERAL)


def _curves(figure: Any, shown: Sequence[Cell], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Scores over all tasks by steps, figures of the variants, signals, and a small panel for each task."""
    metric: Metric = manifest["metric"]
    statistic: str = manifest["statistic"]
    tasks = shown[0].tasks
    single = len(tasks) > 1 and all(list(cell.tasks) == list(tasks) for cell in shown)
    small = list(tasks) if single and len(tasks) <= MANY else []
    signals = [name for name in manifest["signals"] if any(name in cell.signals for cell in shown)]
    starts = manifest["drawing"] == "starts"
    dots = len(REACHED) if starts else 1
    rows = math.ceil(len(small) / ACROSS)
    top = 1 + dots + len(signals)
    figure.set_size_inches(max(3.3 * top + 0.3, 1.9 * ACROSS if small else 0), 2.9 + 1.45 * rows)
    outer = figure.add_gridspec(1 + bool(rows), 1, height_ratios=[2.7, 1.45 * rows][: 1 + bool(rows)])
    first = outer[0].subgridspec(1, top)
    last = max(cell.steps[-1] for cell in shown)
    unit, unit_name = _unit(last)
    axis = f"environment steps per task ({unit_name})"
    legend: dict[str, Any] = {}
    drawn = math.ceil(last / STEPS_PER_POINT) * STEPS_PER_POINT  # the point after ours ends the line

    def curves(panel: Any, of: Sequence[str], large: bool) -> None:
        for place, cell in enumerate(shown):
            legend.setdefault(
                cell.variant, draw_curve(panel, cell.line(statistic, of), unit, _style(place, large))
            )
        for name, (line, style) in _behind(of, manifest, drawn).items():
            style["linewidth"] = 1.6 if large else 1.0
            legend.setdefault(name, draw_curve(panel, line, unit, style))
        draw_frame(panel, metric, last / unit, large)

    panel = figure.add_subplot(first[0])
    curves(panel, tasks, True)
    panel.set_xlabel(axis, fontsize=8)
    panel.set_ylabel(AXIS[metric], fontsize=8)
    _name(panel, f"{len(tasks)} tasks" if len(tasks) > 1 else tasks[0], 10)
    if starts:
        for place, level in enumerate(REACHED):
            panel = figure.add_subplot(first[1 + place])
            _reached(panel, shown, level, last, unit, unit_name, metric)
    else:
        panel = figure.add_subplot(first[1])
        _figures(panel, shown, manifest, _behind(tasks, manifest, last))
        _name(panel, f"at {last:,.0f} steps", 10)
    for place, name in enumerate(signals):
        panel = figure.add_subplot(first[1 + dots + place])
        for index, cell in enumerate(shown):
            if name in cell.signals:
                draw_curve(panel, signal_line(cell.signals[name]), unit, _style(index, True))
        draw_frame(panel, "return", last / unit, True)
        if panel.dataLim.ymin < 0:
            panel.set_ylim(auto=True)
            panel.autoscale(axis="y")
        panel.set_xlabel(axis, fontsize=8)
        _name(panel, TITLES.get(name, name), 10)
    if rows:
        grid = outer[1].subgridspec(rows, ACROSS)
        for place, task in enumerate(small):
            panel = figure.add_subplot(grid[place // ACROSS, place % ACROSS])
            curves(panel, [task], False)
            _name(panel, task.removeprefix("metaworld/").removesuffix("-v3"), 7.5)
    return legend


class Bar(NamedTuple):
    """A value with its interval."""

    value: float
    low: float
    high: float


def _bars(panel: Any, names: Sequence[str], rows: Sequence[Bar | None], metric: Metric) -> None:
    """Values with their intervals, one under the other; published ones are grey, None is left out."""
    index = 0
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        grey = name.startswith("published")
        colour = GREY if grey else COLOURS[index % len(COLOURS)]
        marker = "." if grey else MARKERS[index % len(MARKERS)]
        index += not grey
        if row is None:
            continue
        value, low, high = row
        if math.isfinite(low):
            style = {"linewidth": 2.2, "alpha": 0.45, "solid_capstyle": "butt"}
            panel.plot([low, high], [place, place], color=colour, **style)
        panel.plot([value], [place], marker=marker, color=colour, markersize=5, linestyle="none")
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.tick_params(labelsize=8, length=2, color="#b0b0b0")
    panel.grid(color="#e9e9e9", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#b0b0b0")
    if metric == "success":
        panel.set_xlim(-0.03, 1.03)


def _figures(
    panel: Any, shown: Sequence[Cell], manifest: Mapping[str, Any], behind: Mapping[str, tuple[Line, Any]]
) -> None:
    """The score of every variant at the end, with the mean as a ring, and of the published curves there."""
    metric: Metric = manifest["metric"]
    final = [cell.final(manifest["last"]) for cell in shown]
    rows: list[Bar | None] = [Bar(*each[manifest["statistic"]]) for each in final]
    names = [cell.variant for cell in shown]
    for name, (line, _) in behind.items():
        early = "" if line.steps[-1] == shown[0].steps[-1] else f" at {line.steps[-1] / 1000:g}k"
        names.append(f"published,\n{name.rpartition(' ')[2]}{early}")
        rows.append(Bar(float(line.mean[-1]), float(line.low[-1]), float(line.high[-1])))
    _bars(panel, names, rows, metric)
    if manifest["statistic"] != "mean":
        for place, each in enumerate(final):
            _ring(panel, each["mean"].value, place)
    panel.set_xlabel(AXIS[metric], fontsize=8)


def _ring(panel: Any, value: float, place: int) -> None:
    style = {"marker": "o", "markersize": 6, "fillstyle": "none", "linestyle": "none"}
    panel.plot([value], [place], color=COLOURS[place % len(COLOURS)], markeredgewidth=0.9, **style)


def _reached(
    panel: Any, shown: Sequence[Cell], level: float, last: float, unit: float, unit_name: str, metric: Metric
) -> None:
    """Steps to a level, of the median run; a bar that leaves the panel has no end."""
    rows: list[Bar | None] = []
    for place, cell in enumerate(shown):
        found = median_step(cell.reached(level))
        values = [last * 1.08 if each is None else float(each) for each in found]
        rows.append(None if found[0] is None else Bar(*(value / unit for value in values)))
        if found[0] is None:
            text = "not reached" if found[1] is None else f"not reached by most (from {found[1] / unit:g})"
            style = {"ha": "right", "va": "center", "fontsize": 8, "color": COLOURS[place % len(COLOURS)]}
            panel.text(last / unit, place, text, **style)
    _bars(panel, [cell.variant for cell in shown], rows, "return")
    panel.set_xlim(0, 1.1 * last / unit)
    panel.set_xlabel(f"steps per task ({unit_name})", fontsize=8)
    _name(panel, f"to {level:.0%} {AXIS[metric].removesuffix(' rate')}", 10)


def _sizes(figure: Any, shown: Sequence[Cell], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Scores by the critics' parameters: a panel for one agent of all tasks, one for an agent per task."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    metric: Metric = manifest["metric"]
    kinds = [alone for alone in (False, True) if any(cell.alone == alone for cell in shown)]
    figure.set_size_inches(4.2 * len(kinds) + 0.3, 3.4)
    legend: dict[str, Any] = {}
    series: dict[str, dict[bool, list[Cell]]] = {}
    for cell in shown:
        name = cell.variant.rpartition("-")[0].removeprefix("single-").removeprefix("multi-")
        series.setdefault(name, {}).setdefault(cell.alone, []).append(cell)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for panel, alone in zip(panels, kinds, strict=True):
        for place, (name, cells) in enumerate(series.items()):
            points = sorted(cells.get(alone, ()), key=lambda cell: cell.parameters)
            if not points:
                continue
            found = np.array([cell.final(manifest["last"])[manifest["statistic"]] for cell in points])
            value, low, high = np.where(np.isnan(found), found[:, :1], found).T
            sizes = np.array([cell.parameters for cell in points], float)
            line = Line(sizes, value, low, high, np.ones(len(sizes), bool))
            legend.setdefault(name, draw_curve(panel, line, 1.0, _style(place, True)))
        draw_frame(panel, metric, 1.0, True)
        panel.set_xscale("log")
        of = [cell.parameters for cell in shown]
        panel.set_xlim(min(of) / 1.3, max(of) * 1.3)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("parameters of the critics", fontsize=8)
        _name(panel, "one agent per task" if alone else "one agent for all tasks", 10)
    panels[0].set_ylabel(AXIS[metric], fontsize=8)
    return legend


def _groups(figure: Any, shown: Sequence[Cell], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the variants, a panel for each group: their scales differ."""
    metric: Metric = manifest["metric"]
    groups = list(dict.fromkeys(cell.group for cell in shown))
    variants = list(dict.fromkeys(cell.variant for cell in shown))
    figure.set_size_inches(1.2 + 2.3 * len(groups), 1.2 + 0.28 * len(variants))
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for panel, group in zip(panels, groups, strict=True):
        cells = {cell.variant: cell for cell in shown if cell.group == group}
        found = {name: cell.final(manifest["last"])[manifest["statistic"]] for name, cell in cells.items()}
        _bars(panel, variants, [Bar(*found[name]) if name in found else None for name in variants], metric)
        panel.locator_params(axis="x", nbins=4)
        panel.set_xlabel(AXIS[metric], fontsize=8)
        _name(panel, group, 10)
    return {}
