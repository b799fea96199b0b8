"""Pictures of results, for report.py: PNG and SVG, in the style of plot_replay.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import roofline
from plot_replay import INK, LIMIT_COLOUR, OTHER_COLOUR, OURS_COLOUR, SMALL
from report_tables import label, number

COLOURS = {
    "ours": OURS_COLOUR,
    "ours-tf32": "#6ea8fe",
    "ours-bf16": OURS_COLOUR,
    "critic": "#1a7f37",
    "plain": "#57606a",
    "compiled": "#8250df",
    "jax": "#bf8700",
    "library": OTHER_COLOUR,
}
PART_COLOURS = (OURS_COLOUR, "#8250df", "#6ea8fe", "#c8a6f5", "#bf8700", OTHER_COLOUR, "#57606a")


def figure(panels: int, width: float = 3.9, height: float = 3.3) -> tuple[Any, list[Any]]:
    """A row of light panels."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "brc-fast"  # else every drawing has other names inside
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(
        1, panels, figsize=(max(6.6, width * panels), height), layout="constrained", squeeze=False
    )
    for panel in axes[0]:
        panel.tick_params(length=0, colors=INK, labelsize=8.5, which="both")
        panel.grid(color="#e6e9ee", linewidth=0.8)
        panel.set_axisbelow(True)
        for side in panel.spines.values():
            side.set_visible(False)
    return drawn, list(axes[0])


def close(drawn: Any) -> None:
    from matplotlib import pyplot as plt

    plt.close(drawn)


def legend(drawn: Any, panel: Any, columns: int = 6) -> None:
    """Above all panels, where no line can run through it."""
    handles, names = panel.get_legend_handles_labels()
    style = {"frameon": False, "fontsize": 8, "labelcolor": INK}
    drawn.legend(handles, names, ncols=min(len(names), columns), loc="outside upper center", **style)


def ticks(panel: Any, places: Sequence[float]) -> None:
    """These numbers alone on the x axis, as they are."""
    from matplotlib.ticker import NullFormatter, NullLocator

    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_ticks(places, [f"{place:g}" for place in places])


def logs(panel: Any, name: str) -> None:
    """A logarithmic axis with numbers in the place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (panel.set_xscale if name == "x" else panel.set_yscale)("log")
    axis = panel.xaxis if name == "x" else panel.yaxis
    axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def update(result: Mapping[str, Any]) -> Any:
    """Updates per second against width, a panel per batch size; the floor of ours as a line."""
    rows = [row for row in result["rows"] if row["updates_per_second"]]
    groups: dict[tuple[str, int], list[Any]] = {}
    for row in sorted(rows, key=lambda row: row["width"]):
        groups.setdefault((row.get("workload", ""), row["batch"]), []).append(row)
    groups = {key: own for key, own in groups.items() if len({row["width"] for row in own}) > 1}
    if not groups:
        return None
    shown = dict(sorted(groups.items(), key=lambda item: -len(item[1]))[:3])
    drawn, panels = figure(len(shown))
    for panel, ((workload, batch), own) in zip(panels, shown.items(), strict=True):
        for name in COLOURS:
            points = [
                (r["width"], r["updates_per_second"][name]) for r in own if name in r["updates_per_second"]
            ]
            if points:
                panel.plot(
                    *zip(*points, strict=True), "o-", color=COLOURS[name], label=label(name), ms=4, lw=1.6
                )
        floors = [(r["width"], 1 / r["floor_seconds"][b]) for r in own if (b := r["ratios_to"]) is not None]
        floors = [point for point in floors if point[1]]
        word = "its products by torch.bmm" if own[0]["floor"] == "products" else "limit: roofline"
        if floors:
            style = {"color": LIMIT_COLOUR, "linewidth": 1.2, "linestyle": (0, (4, 3))}
            panel.plot(*zip(*floors, strict=True), label=word, **style)
        panel.set_xscale("log")
        logs(panel, "y")
        ticks(panel, sorted({row["width"] for row in own}))
        panel.set_title(f"{workload + ', ' if workload else ''}batch {batch}", fontsize=9.5, color=INK)
        panel.set_xlabel("width of the critics", **SMALL)
    panels[0].set_ylabel("updates per second, more is better", **SMALL)
    legend(drawn, panels[0])
    return drawn


def parts_of(row: Mapping[str, Any], machine: Mapping[str, Any] | None) -> dict[str, float]:
    """Seconds by part: as measured where the row has them, else of the roofline's kernels on this machine."""
    if "parts" in row:
        return {part["part"]: part["seconds"] for part in row["parts"]}
    if machine is None or row["ratios_to"] is None:
        return {}
    precision = "bf16" if "ours-bf16" in row["precision"] else "tf32"
    shape = (row.get("observation", 5), row.get("action", 1))
    more = {"tasks": row["tasks"]} if row.get("tasks", 1) > 1 else {}
    sizes = roofline.Sizes(row["batch"], row["width"], row["actor_width"], *shape, **more)
    return roofline.parts(sizes, precision, roofline.Machine(**machine))


def parts(result: Mapping[str, Any]) -> Any:
    """Share of an update's time by part, a bar per size; under one that was measured the parts' floors."""
    bars: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
    for row in result["rows"]:
        if shares := parts_of(row, result.get("machine")):
            floors = {part["part"]: part.get("floor") or 0.0 for part in row.get("parts", ())}
            bars[row.get("case", f"width {row['width']}, batch {row['batch']}")] = shares, floors
    if not bars:
        return None
    measured = any(any(floors.values()) for _, floors in bars.values())
    drawn, (panel,) = figure(1, 7.6, 1.3 + (0.52 if measured else 0.34) * len(bars))
    names = list(dict.fromkeys(name for shares, _ in bars.values() for name in shares))
    rows = [(-0.14, 0.4, 1.0), (0.26, 0.24, 0.5)] if measured else [(0.0, 0.68, 1.0)]
    wholes = [sum(shares.values()) for shares, _ in bars.values()]
    for kind, (shift, height, alpha) in enumerate(rows):  # what was measured, then floors
        left, places = [0.0] * len(bars), [place + shift for place in range(len(bars))]
        for colour, name in zip(PART_COLOURS, names, strict=False):
            own = [pair[kind].get(name, 0.0) for pair in bars.values()]
            share = [100.0 * part / whole for part, whole in zip(own, wholes, strict=True)]
            style = {"color": colour, "alpha": alpha, "label": None if kind else name}
            panel.barh(places, share, left=left, height=height, **style)
            left = [a + b for a, b in zip(left, share, strict=True)]
    panel.set_yticks(range(len(bars)), list(bars))
    panel.invert_yaxis()
    panel.set_xlim(0, max(100.0, *left))
    told = "% of the least time that the parts can take (roofline)"
    if "parts" in result["rows"][0]:
        told = "% of the measured time"
    if measured:
        told += "; below, paler: the floor of each part by the model"
    panel.set_xlabel(told, **SMALL)
    legend(drawn, panel, 4)
    return drawn


def envs(result: Mapping[str, Any]) -> Any:
    """Steps per second: against the number of environments where a task has several, else points."""
    rows = [row for row in result.get("rows", []) if "steps_per_second" in row]
    series: dict[str, list[Any]] = {}
    for row in sorted(rows, key=lambda row: row["num_envs"]):
        series.setdefault(row["task"], []).append(row)
    series = {task: own for task, own in series.items() if len(own) > 1}
    if not series:
        return env_points(rows) if rows else None
    drawn, panels = figure(min(3, len(series)))
    for panel, (task, own) in zip(panels, series.items(), strict=False):
        for name in ("ours", "library"):
            points = [
                (r["num_envs"], r["steps_per_second"][name]) for r in own if name in r["steps_per_second"]
            ]
            if points:
                colour = OURS_COLOUR if name == "ours" else "#57606a"
                panel.plot(*zip(*points, strict=True), "o-", color=colour, label=label(name), ms=4, lw=1.6)
        panel.set_xscale("log")
        logs(panel, "y")
        ticks(panel, [row["num_envs"] for row in own])
        panel.set_title(task, fontsize=9.5, color=INK)
        panel.set_xlabel("environments side by side", **SMALL)
    panels[0].set_ylabel("steps per second, more is better", **SMALL)
    legend(drawn, panels[0])
    return drawn


def env_points(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Ours above the simulator's own loop, task by task."""
    drawn, (panel,) = figure(1, 7.6, 1.3 + 0.42 * len(rows))
    for shift, name, colour in ((-0.17, "ours", OURS_COLOUR), (0.17, "library", "#57606a")):
        known = [(place + shift, row["steps_per_second"].get(name)) for place, row in enumerate(rows)]
        places = [(rate, place) for place, rate in known if rate is not None]
        panel.plot(*zip(*places, strict=True), "o", color=colour, ms=5, label=label(name))
        for rate, place in places:
            panel.text(rate * 1.06, place, number(rate), va="center", fontsize=8, color=INK)
    panel.set_yticks(range(len(rows)), [f"{row['task']} x {row['num_envs']}" for row in rows])
    panel.invert_yaxis()
    logs(panel, "x")
    rates = [rate for row in rows for rate in row["steps_per_second"].values()]
    panel.set_xlim(min(rates) / 1.5, max(rates) * 2)
    panel.set_xlabel("steps per second, more is better", **SMALL)
    legend(drawn, panel)
    return drawn


DRAWN: dict[str, dict[str, Callable[[Mapping[str, Any]], Any]]] = {
    "update": {"": update, "-parts": parts},
    "envs": {"": envs},
}


OWN = {"replay": "plot_replay", "scaling": "plot_scaling"}  # modules that draw a whole result


def draw(stem: str, result: Mapping[str, Any], stamp: str, folder: Path) -> list[Path]:
    """Every picture of a result as PNG and SVG; none where it has nothing to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    benchmark = result.get("benchmark", result.get("part", ""))
    paths = []
    if benchmark in OWN and ("cases" in result or "axes" in result):
        for suffix in (".png", ".svg"):
            path = folder / f"{stem}{suffix}"
            importlib.import_module(OWN[benchmark]).draw(result, path, stamp)
            paths.append(path)
    for ending, picture in DRAWN.get(benchmark, {}).items():
        if (drawn := picture(result)) is None:
            continue
        drawn.supxlabel(stamp, fontsize=7.5, color="#57606a")
        for suffix in (".png", ".svg"):
            path = folder / f"{stem}{ending}{suffix}"
            drawn.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
            paths.append(path)
        close(drawn)
    return paths
