"""Draws what bench_scaling.py measured: a panel per axis with points, fitted curve and floor.

python bench/plot_scaling.py bench/results/scaling-cpu.json docs/scaling.png
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fitting import Fit
from plot_replay import INK, LIMIT_COLOUR, OURS_COLOUR, SMALL, command

TITLES = {
    "width": "update against width of the critics",
    "batch": "update against batch size",
    "tasks": "update against number of tasks",
    "environments": "step against number of environments",
}
STEPS = 60  # places of a curve


def draw(results: Mapping[str, Any], path: Path, stamp: str | None = None) -> None:
    """Both scales are logarithmic. PNG or SVG by the suffix.

    `stamp` says when, where and with what it was measured; without it the machine is named.

    Raises:
        ValueError: the results lack axes with times.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "brc-fast"  # else every drawing has other names inside
    from matplotlib import pyplot as plt

    rows = [row for row in results.get("axes", []) if row["x"]]
    if not rows:
        raise ValueError("the results hold no axis with times; bench_scaling.py --save NAME measures them")
    columns = min(2, len(rows))
    lines = -(-len(rows) // columns)
    size = (3.9 * columns, 0.7 + 2.5 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, row in zip(panels.flat, rows, strict=False):
        panel(axes, row)
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    machine = results["gpu"] if results["device"] == "cuda" else f"{results['cpu']}, one thread"
    told = f"Points: medians and quartiles. Line: fit. Dashed: {floor(results)}."
    figure.supxlabel(f"{told}\n{stamp or machine}", **SMALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def floor(results: Mapping[str, Any]) -> str:
    return "roofline" if results["device"] == "cuda" else "its products by torch.bmm"


def panel(axes: Any, row: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    xs, middle = row["x"], [1e3 * t for t in row["seconds"]]
    below = [1e3 * (m - low) for m, low in zip(row["seconds"], row["low"], strict=True)]
    above = [1e3 * (high - m) for m, high in zip(row["seconds"], row["high"], strict=True)]
    axes.errorbar(xs, middle, [below, above], fmt="o", color=OURS_COLOUR, markersize=4.5, linewidth=1)
    lowest = min(middle)
    if row["fit"] is not None:
        curve = Fit(**row["fit"])
        first = min(x for x in xs if row["axis"] != "tasks" or x > 1)
        places = [first * (max(xs) / first) ** (step / STEPS) for step in range(STEPS + 1)]
        axes.plot(places, [1e3 * curve(x) for x in places], color=OURS_COLOUR, linewidth=1, alpha=0.6)
        axes.set_title(f"{TITLES[row['axis']]}\n{formula(curve)}", fontsize=8.5, color=INK)
    else:
        axes.set_title(TITLES[row["axis"]], fontsize=8.5, color=INK)
    floors = {x: 1e3 * value for x, value in zip(xs, row["floor"], strict=True) if value is not None}
    if floors:
        axes.plot([*floors], [*floors.values()], color=LIMIT_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)))
        lowest = min(lowest, *floors.values())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(xs, [str(x) for x in xs], minor=False)
    axes.set_ylim(lowest / 1.6, 1.6 * max(middle))
    axes.set_ylabel("milliseconds", **SMALL)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(length=0, which="both", colors=INK, labelsize=8)
    axes.grid(color="#e6e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def formula(curve: Fit) -> str:
    power = "x" if curve.power == 1.0 else f"x$^{{{curve.power:.2f}}}$"
    growth = f" + {1e6 * curve.rate:.3g} µs · {power}" if curve.rate > 0.0 else " whatever x"
    return f"{1e3 * curve.fixed:.3g} ms{growth}, off by {100 * curve.residual:.1f} %"


def main(words: Sequence[str] | None = None) -> int:
    return command("scaling", __doc__, draw, words)


if __name__ == "__main__":
    sys.exit(main())
