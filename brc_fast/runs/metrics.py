"""Numbers out of a run: episode returns, metrics.jsonl, TensorBoard. The only place that waits for them."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from brc_fast.config import TrainConfig, flat
from brc_fast.disk import lines_of, opened, replace_file, sync
from brc_fast.envs.base import Step

from .checkpoint import DAMAGED
from .weights_and_biases import WandbRun

log = logging.getLogger(__name__)


class EpisodeTracker:
    """Undiscounted returns, lengths and successes of finished episodes, per task, since the last row.

    Args:
        task_names: [T]. task_ids: [N], the task of every environment.
    """

    def __init__(self, task_names: tuple[str, ...], task_ids: NDArray[np.int64]) -> None:
        self.task_names, self.task_ids = task_names, task_ids
        self._running = np.zeros(len(task_ids))
        self._lengths = np.zeros(len(task_ids))
        self._succeeded = np.zeros(len(task_ids), bool)
        self._sums = np.zeros((2, len(task_names)))  # of returns, of successes
        self._steps = np.zeros(len(task_names))  # sums of lengths
        self._counts = np.zeros(len(task_names), np.int64)

    def record(self, step: Step, successes: Tensor | None = None) -> None:
        """Add one step; a dropped slot's episode is forgotten, one with a successful step is a success.

        Args:
            successes: [N] bool, see VectorEnvironment.
        """
        self._running += step.rewards.cpu().numpy()
        if successes is not None:
            self._succeeded |= successes.cpu().numpy()
        dropped = step.dropped.cpu().numpy()
        self._lengths += ~dropped
        ended = (step.terminated | step.truncated).cpu().numpy()
        counted = ended & ~dropped
        tasks = self.task_ids[counted]
        np.add.at(self._sums[0], tasks, self._running[counted])
        np.add.at(self._sums[1], tasks, self._succeeded[counted])
        np.add.at(self._steps, tasks, self._lengths[counted])
        np.add.at(self._counts, tasks, 1)
        self.forget(ended | dropped)

    def forget(self, slots: NDArray[np.bool_]) -> None:
        """The running episodes of these slots [N] start anew."""
        self._running[slots], self._lengths[slots], self._succeeded[slots] = 0.0, 0.0, False

    def row(self, with_success: NDArray[np.bool_] | None = None) -> dict[str, float]:
        """`train/return/<task>` and `train/length/<task>` of the tasks that finished an episode, and
        `train/success/<task>` of those `with_success` [T]; starts a new count."""
        out: dict[str, float] = {}
        for task in np.flatnonzero(self._counts):
            returns, successes = self._sums[:, task] / self._counts[task]
            out[f"train/return/{self.task_names[task]}"] = float(returns)
            out[f"train/length/{self.task_names[task]}"] = float(self._steps[task] / self._counts[task])
            if with_success is not None and with_success[task]:
                out[f"train/success/{self.task_names[task]}"] = float(successes)
        self._sums[:], self._steps[:], self._counts[:] = 0.0, 0.0, 0
        return out

    def state_dict(self) -> dict[str, NDArray[Any]]:
        names = ("running", "lengths", "succeeded", "sums", "steps", "counts")
        return {name: getattr(self, f"_{name}").copy() for name in names}

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from a `state_dict`; ValueError for one of other environments or tasks.

        In one of an earlier version the lengths of the running episodes are unknown: NaN until they end.
        """
        unknown = {name: np.full_like(getattr(self, f"_{name}"), np.nan) for name in ("lengths", "steps")}
        state = unknown | state
        for name, mine in self.state_dict().items():
            given = state[name]
            if (given.shape, given.dtype) != (mine.shape, mine.dtype):
                raise ValueError(
                    f"episodes {name} must be {mine.dtype}{list(mine.shape)}, "
                    f"got {given.dtype}{list(given.shape)}"
                )
            setattr(self, f"_{name}", given.copy())


class Stopwatch:
    """Seconds of the parts of a turn: acting, the environments, storing, sampling (or waiting for a batch
    that is being prefetched), and the updates, which on a GPU are timed there; those of evaluations, analyses
    and checkpoints between turns; and how much each did.

    Attributes:
        total: seconds of the run so far, over all its resumes.
    """

    PARTS = ("act", "environment", "store", "sample", "update", "evaluation", "analysis", "checkpoint")

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._clear()

    def _clear(self) -> None:
        self._began = self._last = time.perf_counter()
        self._seconds, self._done = dict.fromkeys(self.PARTS, 0.0), dict.fromkeys(self.PARTS, 0)

    @property
    def total(self) -> float:
        return time.perf_counter() - self._started

    @total.setter
    def total(self, seconds: float) -> None:
        self._started = time.perf_counter() - seconds

    def start(self) -> None:
        """What went by since the last lap belongs to no part."""
        self._last = time.perf_counter()

    def lap(self, part: str, done: int = 0) -> float:
        """What went by since the last lap belongs to this part; returns the seconds."""
        now = time.perf_counter()
        seconds = now - self._last
        self.add(part, seconds, done)
        self._last = now
        return seconds

    def add(self, part: str, seconds: float, done: int = 0) -> None:
        self._seconds[part] += seconds
        self._done[part] += done

    def read(self) -> dict[str, float]:
        """Throughput of the whole loop and the share of each part since this was last asked.

        On a GPU the shares of parts that run at once add up to more than 1.
        """
        elapsed = time.perf_counter() - self._began
        out = {
            "time/total_seconds": self.total,
            "time/seconds": elapsed,
            "time/updates_per_second": self._done["update"] / elapsed,
            "time/environment_steps_per_second": self._done["environment"] / elapsed,
        }
        out |= {f"time/{part}_share": seconds / elapsed for part, seconds in self._seconds.items()}
        self._clear()
        return out


class MetricsWriter:
    """Appends rows to metrics.jsonl, to TensorBoard where it is installed, and to W&B where it is asked for.

    Names under `time/` depend on the machine; all others are the same for the same seed on a CPU.

    Args:
        resume_step: of the checkpoint that the run goes on from. Rows beyond it are left out, since the run
            makes those steps anew; lines that are no rows go to metrics.jsonl.damaged. Both are told.
        expected: steps of the rows that were written up to there: what is missing is told.
        config: settings for TensorBoard's table of hyperparameters, and W&B's.
        project: W&B's, to log to.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int | None = None,
        expected: Iterable[int] = (),
        *,
        config: TrainConfig | None = None,
        project: str | None = None,
    ) -> None:
        kept = None if resume_step is None else _cut(path, resume_step, expected)
        self._file = path.open("a", buffering=1)
        sync(path.parent)
        self._board = _tensorboard(path.parent / "tensorboard", kept, config)
        self._wandb = WandbRun(project, path.parent, flat(config) if config else {}) if project else None

    def write(self, step: int, values: dict[str, Tensor | float]) -> dict[str, float]:
        """One row at `step` environment steps per task, with the time of day; returns it as numbers."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
        row["time/timestamp"] = round(time.time(), 3)
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._board is not None:
            _show(self._board, step, row)
        if self._wandb is not None:
            self._wandb.log(step, row)
        return row

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close()


class Records(NamedTuple):
    """What a metrics.jsonl holds."""

    rows: list[dict[str, Any]]  # each with an integer `step`, which never falls; values are numbers or None
    faults: dict[int, str]  # number of a line -> why it is no row
    damaged: list[bytes]  # those lines

    def told(self) -> str:
        """The faults, as the end of a sentence; empty where there are none."""
        shown = [f"line {number} {why}" for number, why in list(self.faults.items())[:MOST_TOLD]]
        more = len(self.faults) - len(shown)
        return ", ".join(shown) + (f" and {more} more lines are no rows" if more else "")


MOST_TOLD = 5


def read_records(path: Path) -> Records:
    """All rows of a metrics.jsonl, and what in it is none; nothing where there is no such file."""
    try:
        lines = lines_of(path)
    except FileNotFoundError:
        return Records([], {}, [])
    numbered: list[tuple[int, dict[str, Any]]] = []  # with the number of the line
    faults: dict[int, str] = {}

    def refuse(number: int, why: str) -> None:
        after = f" (after step {numbered[-1][1]['step']})" if numbered else ""
        faults[number] = why + after

    for number, line in enumerate(lines, 1):
        if not line.strip(b"\n"):
            continue
        row = _row(line.rstrip(b"\n"))
        if isinstance(row, str):
            torn = not line.endswith(b"\n") and numbered and line.strip(b"\0")  # the newline comes last
            refuse(number, "is cut off" if torn else row)
            continue
        if numbered and row["step"] < numbered[-1][1]["step"]:
            # one step is wrong: that of the row before, if without it they are in order
            step = row["step"]
            if len(numbered) > 1 and numbered[-2][1]["step"] > step:
                refuse(number, f"goes back to step {step}")
                continue
            wrong, ahead = numbered.pop()
            refuse(wrong, f"is ahead, at step {ahead['step']}")
        if any(_repeats(row, other) for _, other in _at(numbered, row["step"])):
            refuse(number, f"repeats step {row['step']}")
            continue
        numbered.append((number, row))
    faults = dict(sorted(faults.items()))
    return Records(
        [row for _, row in numbered], faults, [lines[number - 1].rstrip(b"\n") for number in faults]
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a warning names the lines that are none."""
    found = read_records(path)
    if found.faults:
        log.warning("%s %s; the other rows are taken", path, found.told())
    return found.rows


def _row(line: bytes) -> dict[str, Any] | str:
    """A row, or why the line is none."""
    if not line.strip(b"\0"):
        return "holds zeros"
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return "is not text"
    except json.JSONDecodeError:
        return "is not JSON"
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return "cannot be read"
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 2**63:
        return "is no row of metrics"
    for value in row.values():
        if not (value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)):
            return "is no row of metrics"
    return row


def _at(numbered: Sequence[tuple[int, dict[str, Any]]], step: int) -> Iterable[tuple[int, dict[str, Any]]]:
    """The newest rows, as far as they are of this step."""
    for number, row in reversed(numbered):
        if row["step"] != step:
            return
        yield number, row


def _repeats(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows of one step tell the same metric; a report and an evaluation share times alone."""
    return any(name != "step" and not name.startswith("time/") for name in row.keys() & other.keys())


def _cut(path: Path, step: int, expected: Iterable[int]) -> list[dict[str, Any]]:
    """End a metrics.jsonl at a step, clear it of what is no row, and tell what is left out or missing."""
    found = read_records(path)
    kept = [row for row in found.rows if row["step"] <= step]
    told = [f"{found.told()}, moved to {path.name}{DAMAGED}"] if found.faults else []
    missing = sorted((Counter(expected) - Counter(row["step"] for row in kept)).elements())
    if missing:
        rows = "lacks 1 row" if len(missing) == 1 else f"lacks {len(missing)} rows"
        steps = list(map(str, dict.fromkeys(missing)))
        shown = steps if len(steps) <= MOST_TOLD else [*steps[: MOST_TOLD - 1], "...", steps[-1]]
        told.append(f"{rows}, of step{'s' * (len(steps) > 1)} {', '.join(shown)}")
    beyond = len(found.rows) - len(kept)
    if beyond:
        last = found.rows[-1]["step"]
        rows = f"loses {beyond} row{'s' * (beyond > 1)} beyond step {step}, up to {last}"
        told.append(f"{rows}: the run goes on from there")
    if told:
        log.warning("%s %s", path, "; ".join(told))
    if found.damaged:
        aside = path.with_name(path.name + DAMAGED)
        try:
            with opened(aside) as file:
                before = file.read()
        except FileNotFoundError:
            before = b""
        replace_file(aside, before + b"".join(line + b"\n" for line in found.damaged))
    replace_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    return kept


def _show(board: Any, step: int, row: dict[str, float]) -> None:
    for name, value in row.items():
        board.add_scalar(name, value, step, walltime=row.get("time/timestamp"))


def _tensorboard(folder: Path, rows: list[dict[str, Any]] | None, config: TrainConfig | None) -> Any:
    """A writer; with the rows of a run that is resumed it has shown these and nothing else, for what an
    earlier process had shown ended wherever that was killed. None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams
    except ImportError:
        return None
    for old in folder.glob("events.out.tfevents.*") if rows is not None else ():
        old.unlink()
    # purge_step: a TensorBoard that is looking forgets what it has seen
    board = SummaryWriter(str(folder), purge_step=None if rows is None else 0)
    if config is not None:
        settings = {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in flat(config).items()
        }
        # the table's column of returns is the newest scalar of that name
        for summary in hparams(settings, {"eval/return_mean": None}):
            board._get_file_writer().add_summary(summary)
    for row in rows or ():
        shown = {name: math.nan if value is None else value for name, value in row.items() if name != "step"}
        _show(board, row["step"], shown)
    return board
