"""Pictures of results, for report.py: PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BLUE, GREY, RED, INK = "#1f6feb", "#c3cbd6", "#d1495b", "#24292f"
LABELS = {
    "ours": "brc-fast", "ours-tf32": "brc-fast, TF32", "ours-bf16": "brc-fast, BF16", "kernels": "brc-fast",
    "critic": "plain PyTorch, our critic", "plain": "plain PyTorch", "eager": "plain PyTorch", "jax": "JAX",
    "compiled": "torch.compile", "compile": "torch.compile", "liger": "Liger", "library": "its own loop",
    "authors' layout (numpy)": "authors' layout", "torch.index_select": "index_select",
    "flashbax (jit)": "flashbax", "Stable-Baselines3": "SB3", "row gather (limit)": "copying one row",
}  # fmt: skip
COLOURS = {
    "ours": BLUE, "ours-tf32": "#6ea8fe", "ours-bf16": BLUE, "critic": "#1a7f37", "plain": "#57606a",
    "compiled": "#8250df", "jax": "#bf8700", "library": "#57606a",
}  # fmt: skip
PART_COLOURS = (BLUE, "#8250df", "#6ea8fe", "#c8a6f5", "#bf8700", GREY, "#57606a")
SMALL: dict[str, Any] = {"fontsize": 8.5, "color": INK}
DASHED: dict[str, Any] = {"color": RED, "linewidth": 1.2, "linestyle": (0, (4, 3))}
CASE, OURS, LIMIT = "1 x 1024", "brc-fast", "row gather (limit)"  # of the replay
AXES = {
    "width": "update against width of the critics",
    "batch": "update against batch size",
    "tasks": "update against number of tasks",
    "environments": "step against number of environments",
}
STEPS = 60  # places of a curve

Entries = Sequence[Mapping[str, Any]]


def label(provider: str) -> str:
    return LABELS.get(provider, provider)


# ---------------------------------------------------------------- panels


def panels(count: int, size: tuple[float, float] = (3.9, 3.3), columns: int = 3) -> tuple[Any, list[Any]]:
    """Light panels, each of about this size."""
    from matplotlib import pyplot as plt

    columns = min(columns, count)
    lines = -(-count // columns)
    whole = (max(6.6, size[0] * columns), size[1] * lines)
    figure, axes = plt.subplots(lines, columns, figsize=whole, layout="constrained", squeeze=False)
    for panel in axes.flat:
        panel.tick_params(length=0, colors=INK, labelsize=8.5, which="both")
        panel.grid(color="#e6e9ee", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[:].set_visible(False)
    for panel in axes.flat[count:]:
        panel.set_visible(False)
    return figure, list(axes.flat[:count])


def legend(figure: Any, panel: Any, columns: int = 6) -> None:
    """Above all panels, where no line can run through it."""
    handles, names = panel.get_legend_handles_labels()
    style = {"frameon": False, "fontsize": 8, "labelcolor": INK, "loc": "outside upper center"}
    figure.legend(handles, names, ncols=min(len(names), columns), **style)


def logs(axis: Any) -> None:
    """A logarithmic axis with numbers in the place of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())


def ticks(panel: Any, places: Sequence[float]) -> None:
    """These numbers alone on a logarithmic x axis, as they are."""
    from matplotlib.ticker import NullLocator

    panel.set_xscale("log")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(places, [f"{place:g}" for place in places])


def word(result: Mapping[str, Any]) -> str:
    """For the line of floors."""
    return "limit: roofline" if result["floor"] == "roofline" else f"its products by {result['floor']}"


def series(entries: Entries, x: str, *names: str) -> dict[tuple[Any, ...], Entries]:
    """Entries with a value that agree in what these columns hold, where they differ in x."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in entries:
        if entry["value"] is not None and x in entry.get("at", {}):
            groups.setdefault(tuple(entry["at"].get(name) for name in names), []).append(entry)
    return {key: own for key, own in groups.items() if len({e["at"][x] for e in own}) > 1}


def lines(panel: Any, entries: Entries, x: str) -> None:
    """Values against the column x, a line for each provider."""
    for name in dict.fromkeys(entry["provider"] for entry in entries):
        own = sorted((e["at"][x], e["value"]) for e in entries if e["provider"] == name)
        panel.plot(*zip(*own, strict=True), "o-", color=COLOURS[name], label=label(name), ms=4, lw=1.6)
    logs(panel.yaxis)
    ticks(panel, sorted({entry["at"][x] for entry in entries}))


# ---------------------------------------------------------------- what is drawn


def update(result: Mapping[str, Any]) -> Any:
    """Updates per second against width, a panel per batch size; the floor of ours as a line."""
    found = series(result["measurements"], "width", "workload", "batch")
    shown = sorted(found.items(), key=lambda item: -len(item[1]))[:3]
    if not shown:
        return None
    figure, axes = panels(len(shown))
    for panel, ((workload, batch), own) in zip(axes, shown, strict=True):
        lines(panel, own, "width")
        first = own[0]["provider"]
        floors = sorted((e["at"]["width"], e["floor"]) for e in own if e["provider"] == first and e["floor"])
        if floors:
            panel.plot(*zip(*floors, strict=True), label=word(result), **DASHED)
        panel.set_title(f"{workload}, batch {batch}", fontsize=9.5, color=INK)
        panel.set_xlabel("width of the critics", **SMALL)
    axes[0].set_ylabel("updates per second, more is better", **SMALL)
    legend(figure, axes[0])
    return figure


def parts(result: Mapping[str, Any]) -> Any:
    """Share of an update's time by part, a bar per size; under one that was measured the parts' floors."""
    bars: dict[str, list[Mapping[str, Any]]] = {}
    for part in result.get("parts", ()):
        bars.setdefault(part["case"], []).append(part)
    if not bars:
        return None
    measured = any("seconds" in part for own in bars.values() for part in own)
    kinds = (
        {"seconds": (-0.14, 0.4, 1.0), "floor": (0.26, 0.24, 0.5)}
        if measured
        else {"floor": (0.0, 0.68, 1.0)}
    )
    figure, (panel,) = panels(1, (7.6, 1.3 + (0.52 if measured else 0.34) * len(bars)))
    widest = 100.0
    for place, own in enumerate(bars.values()):
        whole = sum(part["seconds" if measured else "floor"] for part in own)
        for kind, (shift, height, alpha) in kinds.items():
            left = 0.0
            for colour, part in zip(PART_COLOURS, own, strict=False):
                share = 100.0 * (part.get(kind) or 0.0) / whole
                told = part["part"] if place == 0 and kind == next(iter(kinds)) else None
                panel.barh(place + shift, share, height, left, color=colour, alpha=alpha, label=told)
                left += share
            widest = max(widest, left)
    panel.set_yticks(range(len(bars)), list(bars))
    panel.invert_yaxis()
    panel.set_xlim(0, widest)
    told = "% of the least time that the parts can take (roofline)"
    if measured:
        told = "% of the measured time; below, paler: the floor of each part by the model"
    panel.set_xlabel(told, **SMALL)
    legend(figure, panel, 4)
    return figure


def envs(result: Mapping[str, Any]) -> Any:
    """Steps per second against the number of environments, of the tasks that have several."""
    found = list(series(result["measurements"], "slots", "steps/s").items())[:3]
    if not found:
        return None
    figure, axes = panels(len(found))
    for panel, ((task,), own) in zip(axes, found, strict=True):
        lines(panel, own, "slots")
        panel.set_title(task, fontsize=9.5, color=INK)
        panel.set_xlabel("environments side by side", **SMALL)
    axes[0].set_ylabel("steps per second, more is better", **SMALL)
    legend(figure, axes[0])
    return figure


def replay(result: Mapping[str, Any]) -> Any:
    """CPU time per transition of a batch of 1024, shortest first, and a line at the bare gather."""
    own = [e for e in result["measurements"] if e["case"] == CASE and e["value"] is not None]
    times = {entry["provider"]: entry["value"] for entry in own}
    limit = times.pop(LIMIT, None)
    if not times:
        return None
    names = sorted(times, key=times.__getitem__, reverse=True)
    figure, (panel,) = panels(1, (7.6, 1.5 + 0.34 * len(names)))
    panel.barh(
        names, [times[name] for name in names], 0.68, color=[BLUE if n == OURS else GREY for n in names]
    )
    for place, name in enumerate(names):
        times_as_long = f", {times[name] / times[OURS]:.1f}x" if name != OURS and OURS in times else ""
        words = f" {times[name]:.0f} ns{times_as_long}"
        panel.text(times[name], place, words, va="center", color=INK, fontsize=9)
    if limit is not None:
        panel.axvline(limit, **DASHED)
        words = f" limit: copying one 640-byte row, {limit:.0f} ns"
        panel.text(limit, len(names) - 0.45, words, color=RED, fontsize=9, va="bottom")
    panel.set_xlim(0, max(times.values()) * 1.18)
    figure.suptitle(result["titles"][CASE], fontsize=10.5, color=INK)
    panel.set_xlabel("CPU time per transition, less is better", **SMALL)
    return figure


def scaling(result: Mapping[str, Any]) -> Any:
    """A panel per axis with points, fitted curve and floor; both scales are logarithmic."""
    points: dict[str, dict[int, Mapping[str, Any]]] = {}
    for entry in result["measurements"]:
        if entry["value"] is not None:
            axis, x = entry["case"].partition(", ")[2].split()
            points.setdefault(axis, {})[int(x)] = entry
    rows = [axis for axis in result["axes"] if axis["axis"] in points]
    if not rows:
        return None
    figure, axes = panels(len(rows), (3.9, 2.7), 2)
    for panel, axis in zip(axes, rows, strict=True):
        own = dict(sorted(points[axis["axis"]].items()))
        middle = [e["value"] / 1e3 for e in own.values()]
        bounds = [[abs(e["value"] - e[end]) / 1e3 for e in own.values()] for end in ("low", "high")]
        panel.errorbar(
            [*own], middle, bounds, fmt="o", color=BLUE, ms=4.5, lw=1, label="medians and quartiles"
        )
        title = AXES[axis["axis"]]
        if (fit := axis["fit"]) is not None:
            first = min(x for x in own if axis["axis"] != "tasks" or x > 1)
            places = [first * (max(own) / first) ** (step / STEPS) for step in range(STEPS + 1)]
            curve = [1e3 * (fit["fixed"] + fit["rate"] * math.pow(x, fit["power"])) for x in places]
            panel.plot(places, curve, color=BLUE, lw=1, alpha=0.6, label="fit")
            title += f"\n{formula(fit)}"
        floors = {x: e["floor"] / 1e3 for x, e in own.items() if e["floor"] is not None}
        panel.plot([*floors], [*floors.values()], label=word(result), **DASHED)
        logs(panel.yaxis)
        ticks(panel, [*own])
        panel.set_ylim(min([*middle, *floors.values()]) / 1.6, 1.6 * max(middle))
        panel.set_title(title, fontsize=8.5, color=INK)
        panel.set_ylabel("milliseconds", **SMALL)
    legend(figure, axes[0])
    return figure


def formula(fit: Mapping[str, float]) -> str:
    power = "x" if fit["power"] == 1.0 else f"x$^{{{fit['power']:.2f}}}$"
    growth = f" + {1e6 * fit['rate']:.3g} µs · {power}" if fit["rate"] > 0.0 else " whatever x"
    return f"{1e3 * fit['fixed']:.3g} ms{growth}, off by {100 * fit['residual']:.1f} %"


DRAWN: dict[str, dict[str, Callable[[Mapping[str, Any]], Any]]] = {
    "update": {"": update, "-parts": parts},
    "envs": {"": envs},
    "replay": {"": replay},
    "scaling": {"": scaling},
}


def draw(stem: str, result: Mapping[str, Any], stamp: str, folder: Path) -> Iterator[Path]:
    """Every picture of a result as PNG and SVG; none where it has nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "brc-fast"  # else every drawing has other names inside
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for ending, picture in DRAWN.get(result["benchmark"], {}).items():
        if (figure := picture(result)) is None:
            continue
        figure.supxlabel(stamp, fontsize=7.5, color="#57606a")
        for suffix in (".png", ".svg"):
            path = folder / f"{stem}{ending}{suffix}"
            figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
            yield path
        plt.close(figure)
