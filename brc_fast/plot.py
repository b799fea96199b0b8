"""Learning curves from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .checkpoint import RunFolder
from .errors import InputError, MissingExtraError
from .metrics import read_rows

COLOURS = ("#1f6f8b", "#d1495b", "#5b8e3e", "#8a5a9e", "#c98a1b", "#4a4e69")  # told apart in grey, too


def curves(folder: RunFolder) -> dict[str, tuple[list[int], list[float]]]:
    """Evaluation curves of a run: task -> (environment steps per task, mean return)."""
    prefix = "eval/return/"
    out: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_rows(folder.metrics):
        for name, value in row.items():
            if name.startswith(prefix) and value is not None:
                steps, returns = out.setdefault(name.removeprefix(prefix), ([], []))
                steps.append(row["step"])
                returns.append(value)
    return out


def plot(folders: Sequence[RunFolder], output: Path) -> None:
    """Draw the evaluation returns of one or many runs, one panel per task, to a PNG or SVG file.

    Runs of one panel are told apart by colour and by their folder's name.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtraError("plotting", "train") from error
    mpl.use("agg")
    import matplotlib.pyplot as plt

    by_run = {str(folder.path): curves(folder) for folder in folders}
    for path, found in by_run.items():
        if not found:
            raise InputError(f"{path} holds no evaluation to plot yet: see eval_every in its config.json")
    tasks = list(dict.fromkeys(task for found in by_run.values() for task in found))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.2 + 4.6 * columns, 0.6 + 3.0 * rows), squeeze=False, layout="constrained"
    )
    for panel in axes.flat[len(tasks) :]:
        panel.set_visible(False)
    for panel, task in zip(axes.flat, tasks, strict=False):
        for index, (path, found) in enumerate(by_run.items()):
            if task in found:
                steps, returns = found[task]
                colour = COLOURS[index % len(COLOURS)]
                thousands = [step / 1000 for step in steps]
                panel.plot(
                    thousands, returns, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=path
                )
        panel.set_title(task, fontsize=11, loc="left")
        panel.set_xlabel("environment steps (thousands)")
        panel.set_ylabel("evaluation return")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
        panel.grid(color="#e6e6e6", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        if len(by_run) > 1:
            panel.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=150)
    plt.close(figure)
