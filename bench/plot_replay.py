"""Draws what bench_replay.py measured: the time per sampled transition of every buffer, and the limit.

python bench/plot_replay.py bench/results/replay-cpu.json docs/replay-cpu.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import Unreadable, making, one_line, read

CASE = "1 x 1024"
OURS, LIMIT = "brc-fast", "row gather (limit)"
OURS_COLOUR, OTHER_COLOUR, LIMIT_COLOUR, INK = "#1f6feb", "#c3cbd6", "#d1495b", "#24292f"
SMALL: dict[str, Any] = {"fontsize": 8.5, "color": INK}


def draw(results: Mapping[str, Any], path: Path, stamp: str | None = None) -> None:
    """Bars of CPU time at B = 1024, shortest first, and a line at the bare gather. PNG or SVG by the suffix.

    `stamp` says when, where and with what it was measured; without it the processor is named.

    Raises:
        ValueError: the results lack the case.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "brc-fast"  # else every drawing has other names inside
    from matplotlib import pyplot as plt

    case = next((case for case in results.get("cases", []) if case["case"] == CASE), None)
    if case is None or not case["rows"]:
        raise ValueError(f"the results hold no case {CASE!r}; bench_replay.py --cases locomotion measures it")
    times = {row["buffer"]: row["cpu"] for row in case["rows"]}
    limit = times.pop(LIMIT, None)
    names = sorted(times, key=times.__getitem__, reverse=True)
    figure, axes = plt.subplots(figsize=(7.6, 1.5 + 0.34 * len(names)), layout="constrained")
    colours = [OURS_COLOUR if name == OURS else OTHER_COLOUR for name in names]
    axes.barh(names, [times[name] for name in names], color=colours, height=0.68)
    for place, name in enumerate(names):
        text = f" {times[name]:.0f} ns"
        if name != OURS and OURS in times:
            text += f", {times[name] / times[OURS]:.1f}x"
        axes.text(times[name], place, text, va="center", color=INK, fontsize=9)
    if limit is not None:
        axes.axvline(limit, color=LIMIT_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)))
        label = f" limit: copying one 640-byte row, {limit:.0f} ns"
        axes.text(limit, len(names) - 0.45, label, color=LIMIT_COLOUR, fontsize=9, va="bottom")
    finish(axes, max(times.values()))
    figure.suptitle(case["title"], fontsize=10.5, color=INK)
    where = stamp or f"{results['cpu']}, one thread"
    figure.supxlabel(f"CPU time per transition, less is better\n{where}", **SMALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def finish(axes: Any, longest: float) -> None:
    """A light frame, with room for the labels at the ends of the bars."""
    axes.set_xlim(0, longest * 1.18)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.grid(axis="x", color="#e6e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def command(benchmark: str, told: str | None, draw: Callable[..., None], words: Sequence[str] | None) -> int:
    """Draw the result of a benchmark as the command line says; exit code 2 where it cannot be drawn."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, help="PNG or SVG by the suffix")
    given = parser.parse_args(words)
    if given.picture.suffix not in (".png", ".svg"):
        parser.error(f"a picture ends in .png or .svg, not {given.picture.name}")
    try:
        found = read(given.results)
        if (of := found.get("benchmark", found.get("part"))) != benchmark:
            raise Unreadable(f"{given.results} is a result of {of}, not of {benchmark}")
        with making("picture", given.results, found):
            draw(found, given.picture)
    except Unreadable as reason:
        print(f"plot_{benchmark}: {one_line(reason)}", file=sys.stderr)
        return 2
    return 0


def main(words: Sequence[str] | None = None) -> int:
    return command("replay", __doc__, draw, words)


if __name__ == "__main__":
    sys.exit(main())
