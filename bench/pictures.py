"""Pictures of results, for report.py: PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BLUE, GREY, RED, INK = "#1f6feb", "#c3cbd6", "#d1495b", "#24292f"
LABELS = {
    "ours": "brc-fast", "ours-tf32": "brc-fast, TF32", "ours-bf16": "brc-fast, BF16",
    "one-thread": "brc-fast, one thread", "kernels": "brc-fast",
    "critic": "plain PyTorch, our critic", "plain": "plain PyTorch", "eager": "plain PyTorch", "jax": "JAX",
    "compiled": "torch.compile", "compile": "torch.compile", "library": "its own loop",
    "authors' layout (numpy)": "authors' layout", "torch.index_select": "index_select",
    "flashbax (jit)": "flashbax", "Stable-Baselines3": "SB3", "row gather (limit)": "copying one row",
}  # fmt: skip
COLOURS = {
    "ours": BLUE, "ours-tf32": "#6ea8fe", "ours-bf16": "#0a3069", "critic": "#1a7f37", "plain": "#57606a",
    "compiled": "#8250df", "jax": "#bf8700", "library": "#57606a",
}  # fmt: skip
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


# ---------------------------------------------------------------- what is drawn


def curves(
    result: Result,
    groups: Mapping[str, list[Mapping[str, Any]]],
    x: Callable[[Mapping[str, Any]], int],
    words: tuple[str, str],
    fits: Mapping[str, Mapping[str, float]] | None = None,
) -> Any:
    """Values against x, a line per provider, and the floor of the first one; a panel for each group.

    Args:
        words: for both axes. fits: a curve through the points of a group, in the place of lines.
    """
    if not groups:
        return None
    figure, axes = panels(len(groups), columns=3 if fits is None else 2)
    for panel, (title, own) in zip(axes, groups.items(), strict=True):
        fit = (fits or {}).get(title)
        for name in dict.fromkeys(entry["provider"] for entry in own):
            points = sorted((x(e), e["value"]) for e in own if e["provider"] == name)
            style = {"color": COLOURS[name], "label": label(name), "ms": 4, "lw": 1.6}
            panel.plot(*zip(*points, strict=True), "o" if fit else "o-", **style)
        first = own[0]["provider"]
        if floors := sorted((x(e), e["floor"]) for e in own if e["provider"] == first and e["floor"]):
            panel.plot(*zip(*floors, strict=True), label=f"{result['floor']}, {label(first)}", **DASHED)
        places = sorted(set(map(x, own)))
        if fit:
            xs = [places[0] * (places[-1] / places[0]) ** (step / 60) for step in range(61)]
            ys = [1e6 * (fit["fixed"] + fit["rate"] * each ** fit["power"]) for each in xs]
            panel.plot(xs, ys, color=BLUE, lw=1, label="fit")
        logarithmic(panel, places)
        panel.set(title=title, xlabel=words[0])
    axes[0].set_ylabel(words[1])
    legend(figure, axes[0])
    return figure


def grouped(result: Result, x: str, *names: str) -> dict[str, list[Mapping[str, Any]]]:
    """Measurements by title: those that agree in the columns `names`, where they differ in x; at most three,
    those with most points first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in result["measurements"]:
        if entry["value"] is not None and x in (at := entry.get("at", {})):
            title = ", ".join([str(at[names[0]]), *(f"{name} {at[name]}" for name in names[1:])])
            groups.setdefault(title, []).append(entry)
    several = {title: own for title, own in groups.items() if len({e["at"][x] for e in own}) > 1}
    return dict(sorted(several.items(), key=lambda item: -len(item[1]))[:3])


def update(result: Result) -> Any:
    words = "width of the critics", "updates per second, more is better"
    return curves(result, grouped(result, "width", "workload", "batch"), lambda e: e["at"]["width"], words)


def envs(result: Result) -> Any:
    words = "environments side by side", "steps per second, more is better"
    return curves(result, grouped(result, "slots", "steps/s"), lambda e: e["at"]["slots"], words)


def scaling(result: Result) -> Any:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in (entry for entry in result["measurements"] if entry["value"] is not None):
        groups.setdefault(" against ".join(entry["case"].rpartition(" ")[0].split(", ")), []).append(entry)
    fits = {f"{axis['what']} against {axis['axis']}": axis["fit"] for axis in result["axes"] if axis["fit"]}
    return curves(result, groups, lambda e: int(e["case"].split()[-1]), ("", "microseconds"), fits)


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


DRAWN = {"update": update, "envs": envs, "replay": replay, "scaling": scaling}


def draw(stem: str, result: Result, stamp: str, folder: Path) -> Iterator[Path]:
    """The picture of a result as PNG and SVG; none where it has nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        if figure := DRAWN[result["benchmark"]](result) if result["benchmark"] in DRAWN else None:
            figure.supxlabel(stamp, fontsize=7.5, color="#57606a")
            folder.mkdir(parents=True, exist_ok=True)
            for suffix, more in ((".png", {}), (".svg", {"metadata": {"Date": None}})):
                path = folder / f"{stem}{suffix}"
                figure.savefig(path, dpi=150, **more)
                yield path
            plt.close(figure)
