"""Numbers out of a run: episode returns, metrics.jsonl, TensorBoard. The only place that waits for them."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from brc_fast.disk import opened
from brc_fast.envs.base import Step
from brc_fast.errors import InputError

from .checkpoint import write_text


class EpisodeTracker:
    """Undiscounted returns and successes of finished episodes, per task, since the last row.

    Args:
        task_names: [T]. task_ids: [N], the task of every environment.
    """

    def __init__(self, task_names: tuple[str, ...], task_ids: NDArray[np.int64]) -> None:
        self.task_names, self.task_ids = task_names, task_ids
        self._running = np.zeros(len(task_ids))
        self._succeeded = np.zeros(len(task_ids), bool)
        self._sums = np.zeros((2, len(task_names)))  # of returns, of successes
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
        ended = (step.terminated | step.truncated).cpu().numpy()
        counted = ended & ~dropped
        tasks = self.task_ids[counted]
        np.add.at(self._sums[0], tasks, self._running[counted])
        np.add.at(self._sums[1], tasks, self._succeeded[counted])
        np.add.at(self._counts, tasks, 1)
        self.forget(ended | dropped)

    def forget(self, slots: NDArray[np.bool_]) -> None:
        """The running episodes of these slots [N] start anew."""
        self._running[slots], self._succeeded[slots] = 0.0, False

    def row(self, with_success: NDArray[np.bool_] | None = None) -> dict[str, float]:
        """`train/return/<task>` of the tasks that finished an episode, and `train/success/<task>` of those
        `with_success` [T]; starts a new count."""
        out: dict[str, float] = {}
        for task in np.flatnonzero(self._counts):
            returns, successes = self._sums[:, task] / self._counts[task]
            out[f"train/return/{self.task_names[task]}"] = float(returns)
            if with_success is not None and with_success[task]:
                out[f"train/success/{self.task_names[task]}"] = float(successes)
        self._sums[:], self._counts[:] = 0.0, 0
        return out

    def state_dict(self) -> dict[str, NDArray[Any]]:
        names = ("running", "succeeded", "sums", "counts")
        return {name: getattr(self, f"_{name}").copy() for name in names}

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from a `state_dict`; ValueError for one of other environments or tasks."""
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
    that is being prefetched), and the updates, which on a GPU are timed there; and how much each did."""

    PARTS = ("act", "environment", "store", "sample", "update")

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._began = self._last = time.perf_counter()
        self._seconds, self._done = dict.fromkeys(self.PARTS, 0.0), dict.fromkeys(self.PARTS, 0)

    def start(self) -> None:
        """What went by since the last lap belongs to no part."""
        self._last = time.perf_counter()

    def lap(self, part: str, done: int = 0) -> None:
        """What went by since the last lap belongs to this part."""
        now = time.perf_counter()
        self.add(part, now - self._last, done)
        self._last = now

    def add(self, part: str, seconds: float, done: int = 0) -> None:
        self._seconds[part] += seconds
        self._done[part] += done

    def read(self) -> dict[str, float]:
        """Throughput of the whole loop and the share of each part since this was last asked.

        On a GPU the shares of parts that run at once add up to more than 1.
        """
        elapsed = time.perf_counter() - self._began
        out = {
            "time/seconds": elapsed,
            "time/updates_per_second": self._done["update"] / elapsed,
            "time/environment_steps_per_second": self._done["environment"] / elapsed,
        }
        out |= {f"time/{part}_share": seconds / elapsed for part, seconds in self._seconds.items()}
        self._clear()
        return out


class MetricsWriter:
    """Appends rows to metrics.jsonl, and to TensorBoard where it is installed.

    Names under `time/` depend on the machine; all others are the same for the same seed on a CPU.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        if resume_step is not None:
            kept = [row for row in read_rows(path) if row["step"] <= resume_step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", buffering=1)
        self._board = _tensorboard(path.parent / "tensorboard", resume_step)

    def write(self, step: int, values: dict[str, Tensor | float]) -> dict[str, float]:
        """One row at `step` environment steps per task; returns it as numbers."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        return row

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, each with an integer `step`; a last line cut off by a crash is left out.

    InputError for a file that cannot be read, which names the line.
    """
    try:
        with opened(path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        place, cut_off = f"{path} line {number}", number == len(lines)
        try:
            row = json.loads(line.decode())
        except json.JSONDecodeError:
            if cut_off:
                break
            raise InputError(f"{place} is not JSON: repair or delete it") from None
        except UnicodeDecodeError as error:
            if cut_off and rows:
                break
            raise InputError(f"{path} is not a text file: {error.reason}") from error
        except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
            raise InputError(f"{place} cannot be read ({error}): repair or delete it") from None
        if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 2**63:
            raise InputError(f"{place} is no row of metrics: repair or delete it")
        rows.append(row)
    return rows


def _tensorboard(folder: Path, purge_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)
