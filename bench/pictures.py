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
DASHED: dict[str, Any] = {"color": RED, "linewidth": 1.2, "linestyle": (0, (4, 3))}
STYLE = {
    "axes.axisbelow": True, "axes.edgecolor": "none", "axes.grid": True, "axes.labelcolor": INK,
    "axes.labelsize": 8.5, "axes.titlecolor": INK, "axes.titlesize": 9, "font.size": 8.5,
    "grid.color": "#e6e9ee", "legend.fontsize": 8, "legend.frameon": False, "text.color": INK,
    "xtick.color": INK, "xtick.major.size": 0, "ytick.color": INK, "ytick.major.size": 0,
    "ytick.minor.size": 0, "svg.hashsalt": "brc-fast",  # else every drawing has other names inside
}  # fmt: skip
CASE, OURS, LIMIT = "1 x 1024", "brc-fast", "row gather (limit)"  # of the replay

Result = Mapping[str, Any]


def label(provider: str) -> str:
    return LABELS.get(provider, provider)


# ---------------------------------------------------------------- panels


def panels(count: int, size: tuple[float, float] = (3.9, 3.3), columns: int = 3) -> tuple[Any, list[Any]]:
    """Panels, each of about this size."""
    from matplotlib import pyplot as plt

    columns = min(columns, count)
    lines = -(-count // columns)
    whole = (max(6.6, size[0] * columns), size[1] * lines)
    figure, axes = plt.subplots(lines, columns, figsize=whole, layout="constrained", squeeze=False)
    for panel in axes.flat[count:]:
        panel.set_visible(False)
    return figure, list(axes.flat[:count])


def legend(figure: Any, panel: Any, columns: int = 6) -> None:
    """Above all panels, where no line can run through it."""
    handles, names = panel.get_legend_handles_labels()
    figure.legend(handles, names, ncols=min(len(names), columns), loc="outside upper center")


def logarithmic(panel: Any, places: Sequence[float]) -> None:
    """Both axes, with numbers in the place of powers of ten; these alone on the x axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    panel.set(xscale="log", yscale="log")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(places, [f"{place:g}" for place in places])
    panel.yaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def limit(result: Result) -> str:
    """For the line of floors."""
    return "limit: roofline" if result["floor"] == "roofline" else f"its products by {result['floor']}"


# ---------------------------------------------------------------- what is drawn


def curves(result: Result, x: str, names: Sequence[str], below: str, beside: str) -> Any:
    """Values against the column x, a line per provider, and the floor of the first one; a panel for each
    that agree in the columns `names`, at most three, those with most points first."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in result["measurements"]:
        if entry["value"] is not None and x in entry.get("at", {}):
            groups.setdefault(tuple(entry["at"].get(name) for name in names), []).append(entry)
    groups = {key: own for key, own in groups.items() if len({e["at"][x] for e in own}) > 1}
    shown = sorted(groups.items(), key=lambda item: -len(item[1]))[:3]
    if not shown:
        return None
    figure, axes = panels(len(shown))
    for panel, (key, own) in zip(axes, shown, strict=True):
        for name in dict.fromkeys(entry["provider"] for entry in own):
            points = sorted((e["at"][x], e["value"]) for e in own if e["provider"] == name)
            style = {"color": COLOURS[name], "label": label(name), "ms": 4, "lw": 1.6}
            panel.plot(*zip(*points, strict=True), "o-", **style)
        first = own[0]["provider"]
        floors = sorted((e["at"][x], e["floor"]) for e in own if e["provider"] == first and e["floor"])
        if floors:
            panel.plot(*zip(*floors, strict=True), label=limit(result), **DASHED)
        logarithmic(panel, sorted({entry["at"][x] for entry in own}))
        panel.set(
            title=", ".join([str(key[0]), *(f"{n} {v}" for n, v in zip(names[1:], key[1:], strict=True))])
        )
        panel.set_xlabel(below)
    axes[0].set_ylabel(beside)
    legend(figure, axes[0])
    return figure


def update(result: Result) -> Any:
    words = "width of the critics", "updates per second, more is better"
    return curves(result, "width", ("workload", "batch"), *words)


def envs(result: Result) -> Any:
    words = "environments side by side", "steps per second, more is better"
    return curves(result, "slots", ("steps/s",), *words)


def parts(result: Result) -> Any:
    """Share of an update's time by part, a bar per size; under one that was measured the parts' floors."""
    bars: dict[str, list[Mapping[str, Any]]] = {}
    for part in result.get("parts", ()):
        bars.setdefault(part["case"], []).append(part)
    if not bars:
        return None
    kinds, told = {"floor": (0.0, 0.68, 1.0)}, "% of the least time that the parts can take (roofline)"
    if any("seconds" in part for own in bars.values() for part in own):
        kinds = {"seconds": (-0.14, 0.4, 1.0), "floor": (0.26, 0.24, 0.5)}  # place, height, opacity
        told = "% of the measured time; below, paler: the floor of each part by the model"
    figure, (panel,) = panels(1, (7.6, 1.3 + (0.18 + 0.17 * len(kinds)) * len(bars)))
    for place, own in enumerate(bars.values()):
        whole = sum(part[next(iter(kinds))] for part in own)
        for kind, (shift, height, alpha) in kinds.items():
            left = 0.0
            for colour, part in zip(PART_COLOURS, own, strict=False):
                share = 100.0 * (part.get(kind) or 0.0) / whole
                name = part["part"] if place == 0 and kind == next(iter(kinds)) else None
                panel.barh(place + shift, share, height, left, color=colour, alpha=alpha, label=name)
                left += share
    panel.set_yticks(range(len(bars)), list(bars))
    panel.invert_yaxis()
    panel.set_xlabel(told)
    panel.margins(x=0.0)
    legend(figure, panel, 4)
    return figure


def replay(result: Result) -> Any:
    """CPU time per transition of a batch of 1024, shortest first, and a line at the bare gather."""
    own = [e for e in result["measurements"] if e["case"] == CASE and e["value"] is not None]
    times = {entry["provider"]: entry["value"] for entry in own}
    bare = times.pop(LIMIT, None)
    if not times:
        return None
    names = sorted(times, key=times.__getitem__, reverse=True)
    figure, (panel,) = panels(1, (7.6, 1.5 + 0.34 * len(names)))
    colours = [BLUE if name == OURS else GREY for name in names]
    bars = panel.barh(names, [times[name] for name in names], 0.68, color=colours)
    others = [f", {times[n] / times[OURS]:.1f}x" if n != OURS and OURS in times else "" for n in names]
    told = [f" {times[name]:.0f} ns{more}" for name, more in zip(names, others, strict=True)]
    panel.bar_label(bars, told, color=INK, fontsize=9)
    if bare is not None:
        panel.axvline(bare, **DASHED)
        words = f" limit: copying one 640-byte row, {bare:.0f} ns"
        panel.text(bare, len(names) - 0.45, words, color=RED, fontsize=9, va="bottom")
    panel.set_xlim(0, max(times.values()) * 1.18)
    figure.suptitle(result["titles"][CASE], fontsize=10.5)
    panel.set_xlabel("CPU time per transition, less is better")
    return figure


def scaling(result: Result) -> Any:
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
        style: dict[str, Any] = {"color": BLUE, "lw": 1, "ms": 4.5, "label": "medians and quartiles"}
        panel.errorbar([*own], middle, bounds, fmt="o", **style)
        title = f"{axis['what']} against {axis['axis']}"
        if (fit := axis["fit"]) is not None:
            first = min(x for x in own if axis["axis"] != "tasks" or x > 1)
            places = [first * (max(own) / first) ** (step / 60) for step in range(61)]
            curve = [1e3 * (fit["fixed"] + fit["rate"] * math.pow(x, fit["power"])) for x in places]
            panel.plot(places, curve, color=BLUE, lw=1, alpha=0.6, label="fit")
            title += f"\n{formula(fit)}"
        floors = {x: e["floor"] / 1e3 for x, e in own.items() if e["floor"] is not None}
        panel.plot([*floors], [*floors.values()], label=limit(result), **DASHED)
        logarithmic(panel, [*own])
        panel.set(title=title, ylabel="milliseconds")
        panel.set_ylim(min([*middle, *floors.values()]) / 1.6, 1.6 * max(middle))
    legend(figure, axes[0])
    return figure


def formula(fit: Mapping[str, float]) -> str:
    power = "x" if fit["power"] == 1.0 else f"x$^{{{fit['power']:.2f}}}$"
    growth = f" + {1e6 * fit['rate']:.3g} µs · {power}" if fit["rate"] > 0.0 else " whatever x"
    return f"{1e3 * fit['fixed']:.3g} ms{growth}, off by {100 * fit['residual']:.1f} %"


DRAWN: dict[str, dict[str, Callable[[Result], Any]]] = {
    "update": {"": update, "-parts": parts},
    "envs": {"": envs},
    "replay": {"": replay},
    "scaling": {"": scaling},
}


def draw(stem: str, result: Result, stamp: str, folder: Path) -> Iterator[Path]:
    """Every picture of a result as PNG and SVG; none where it has nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for ending, picture in DRAWN.get(result["benchmark"], {}).items():
        with plt.rc_context(STYLE):
            if (figure := picture(result)) is None:
                continue
            figure.supxlabel(stamp, fontsize=7.5, color="#57606a")
            for suffix in (".png", ".svg"):
                path = folder / f"{stem}{ending}{suffix}"
                figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
                yield path
            plt.close(figure)
