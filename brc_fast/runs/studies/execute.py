"""Make the runs of a study: each a process, as many at once as there are workers."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import brc_fast
from brc_fast.agents.memory import available, plan_least
from brc_fast.config import TrainConfig
from brc_fast.disk import opened, read_json
from brc_fast.errors import InputError
from brc_fast.runs.checkpoint import RunFolder, write_text
from brc_fast.runs.interrupt import StopRequest
from brc_fast.runs.metrics import read_rows

from .study import Run, Study

EVALUATION = "eval/return_mean"  # which a row has that is of an evaluation
MANIFEST, FORMAT = "study.json", 1
TOLD = (
    "analysis_every",
    "checkpoint_every",
    "report_every",
)  # settings that change nothing of what is learned
TAIL = 2**16  # bytes of a log that are looked through for its last line
POLL = 0.05  # seconds
TRAIN = (sys.executable, *["-P"] * sys.flags.safe_path, "-m", "brc_fast", "train")
PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux
PATIENCE = 600.0  # seconds that a run may take to save
PROCESS = 400_000_000  # bytes of Python, torch and a simulator in a process, at least, measured


class Status(NamedTuple):
    """How far a run is: finished, failed (told: its error), interrupted (at a checkpoint) or missing."""

    kind: str
    told: str = ""


def status(root: Path, run: Run) -> Status:
    """From the run's folder, and where that is not finished from the record of its last end."""
    folder = RunFolder(root / run.name)
    steps = folder.steps()
    if steps and steps[-1] >= run.steps and _evaluated(folder, steps[-1]):
        return Status("finished")
    if error := record(root, run).get("error"):
        return Status("failed", str(error))
    return Status("interrupted", f"at step {steps[-1]}") if steps else Status("missing")


def _evaluated(folder: RunFolder, step: int) -> bool:
    return any(row["step"] == step and EVALUATION in row for row in read_rows(folder.metrics))


def record(root: Path, run: Run) -> dict[str, Any]:
    """What was noted when processes of the run ended: wall and CPU seconds of all, machine, commit."""
    try:
        found = read_json(_beside(root, run, ".json"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _beside(root: Path, run: Run, suffix: str) -> Path:
    return root / f"{run.name}{suffix}"


def read_manifest(root: Path) -> dict[str, Any]:
    """What a study's folder says of itself; InputError for one that holds no study."""
    file = root / MANIFEST
    try:
        found = read_json(file, 2**24)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        runs = {name: Run(**{**each, "tasks": tuple(each["tasks"])}) for name, each in found["runs"].items()}
        if any(run.name != name for name, run in runs.items()):
            raise ValueError("a run has another name than its folder")
    except FileNotFoundError:
        raise InputError(f"{root} holds no study: {MANIFEST} is missing") from None
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    return {**found, "runs": runs}


def prepare(root: Path, study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """Make the study's folder, or take one that has the same runs, or some of them, and return its manifest.

    InputError where a run of the same name has other settings.
    """
    wanted = study.manifest(runs)
    if (root / MANIFEST).exists():
        kept = read_manifest(root)
        if kept["study"] != study.name:
            raise InputError(f"{root} holds the study {kept['study']}: name another folder with --runs")
        for run in runs:
            if (before := kept["runs"].get(run.name)) is not None:
                _require_same(root, before, run)
        wanted["runs"] = {**study.manifest(kept["runs"].values())["runs"], **wanted["runs"]}
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root} holds something else than a study: name another folder with --runs")
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / MANIFEST, json.dumps({"format": FORMAT, **wanted}, indent=1) + "\n")
    return read_manifest(root)


def _require_same(root: Path, before: Run, run: Run) -> None:
    old, new = ({**vars(each), **each.settings, "settings": None} for each in (before, run))
    for name in ("steps", *sorted((old.keys() | new.keys()) - {*TOLD})):
        if old.get(name) != new.get(name):
            raise InputError(
                f"{root} holds a study of another configuration: in {run.name} {name} was {old.get(name)} "
                f"and now is {new.get(name)}; name another folder with --runs"
            )


def adopt(root: Path, run: Run) -> Path | None:
    """Copy a finished run of another study beside this one that has the same tasks, settings and seed, with
    its record; returns where it was, or None where there is none."""
    if run.source is not None:
        return None
    for manifest in sorted(root.parent.glob(f"*/{MANIFEST}")):
        other = manifest.parent
        if other == root:
            continue
        with contextlib.suppress(InputError):
            made: dict[str, Run] = read_manifest(other)["runs"]
            for each in made.values():
                if _learns_the_same(run, each) and status(other, each).kind == "finished":
                    copy = _beside(root, run, ".part")
                    shutil.rmtree(copy, ignore_errors=True)
                    shutil.copytree(other / each.name, copy)
                    write_text(_beside(root, run, ".json"), json.dumps(record(other, each), indent=1) + "\n")
                    copy.rename(root / run.name)
                    return other / each.name
    return None


def _learns_the_same(run: Run, other: Run) -> bool:
    """Whether another run has all that this one would have."""
    mine, theirs = ({k: v for k, v in each.settings.items() if k not in TOLD} for each in (run, other))
    analysed = run.settings.get("analysis_every") in (None, other.settings.get("analysis_every"))
    return analysed and (run.seed, run.tasks, mine, None) == (other.seed, other.tasks, theirs, other.source)


def require_memory(configs: Sequence[TrainConfig], workers: int, device: str, gpus: int, given: bool) -> int:
    """How many runs fit at once, at most `workers`; the largest are looked at. InputError where a number of
    workers that was `given`, or even one run, does not fit."""
    rooms = {"cpu": available("cpu")} | ({device: gpus * available(device)} if device != "cpu" else {})
    for place, room in rooms.items():
        needs = sorted((_need(config, device, place) for config in configs), reverse=True)[:workers]
        sums = list(itertools.accumulate(needs))
        fits = sum(each <= room for each in sums)
        if fits == len(sums):
            continue
        if given or not fits:
            told = f"{len(sums)} runs at once take at least {sums[-1] / 1e9:.1f} GB of {place} memory"
            remedy = f"--workers {fits}" if fits else "a machine with more, or a smaller study"
            raise InputError(f"{told}, and {room / 1e9:.1f} GB are free: take {remedy}")
        workers = fits
    return workers


def _need(config: TrainConfig, device: str, place: str) -> int:
    """Bytes of `place` that a run on `device` takes at least."""
    host = PROCESS if place == "cpu" else 0
    return host + sum(need.size for need in plan_least(config, device) if need.device == place)


class Child(NamedTuple):
    process: subprocess.Popen[bytes]
    run: Run
    begun: float
    log: Path
    place: int  # in the log, where this process began to write
    gpu: int | None


class Executor:
    """Runs of one study on this machine.

    Args:
        root: the study's folder.
        device: "cpu", where each run has one thread, or "cuda", where each sees one of `gpus` GPUs.
        seconds: after which the runs are stopped, saved.
        say: takes a line for each run that ends.
        program: what the words of `brc-fast train` are given to.
    """

    def __init__(
        self,
        root: Path,
        device: str,
        workers: int,
        gpus: int = 0,
        *,
        seconds: float = math.inf,
        say: Callable[[str], object] = print,
        program: Sequence[str] = TRAIN,
    ) -> None:
        self.root, self.device, self.workers, self.gpus = root, device, workers, gpus
        self.end, self.say, self.program = time.monotonic() + seconds, say, program
        self.children: list[Child] = []
        self.ended = 0

    def execute(self, runs: Sequence[Run]) -> signal.Signals | None:
        """Make what is not finished, sources before those that start from them. What fails is left, and so is
        what would start from it; the others go on.

        A signal (StopRequest) lets the running processes save and end, and is returned.
        """
        waiting = [run for run in runs if status(self.root, run).kind != "finished"]
        for run in list(waiting):
            if status(self.root, run).kind == "missing" and (found := adopt(self.root, run)) is not None:
                waiting.remove(run)
                self.say(f"{run.name}: taken from {found.parent.name}/{found.name}")
        unmade = {run.name for run in waiting}
        self.ended, total = len(runs) - len(waiting), len(runs)
        if self.ended:
            self.say(f"{self.ended} of {total} runs are finished already")
        with StopRequest() as stop:
            try:
                while (waiting or self.children) and not stop and time.monotonic() < self.end:
                    for child in self.reap():
                        self.ended += 1
                        ended = status(self.root, child.run)
                        if ended.kind == "finished":
                            unmade.discard(child.run.name)
                        seconds = time.monotonic() - child.begun
                        told = ended.told if ended.kind == "failed" else f"{ended.kind} {ended.told}".strip()
                        self.say(f"[{self.ended}/{total}] {child.run.name}: {told}, {seconds:,.0f} s")
                    running = {child.run.name for child in self.children}
                    pending = running | {run.name for run in waiting}
                    for run in list(waiting):
                        if run.source in unmade:
                            if run.source not in pending:  # it failed
                                waiting.remove(run)
                                self.ended += 1
                                self.note(run, error=f"it starts from {run.source}, which failed")
                                self.say(f"[{self.ended}/{total}] {run.name}: starts from a run that failed")
                        elif len(self.children) < self.workers:
                            waiting.remove(run)
                            self.begin(run)
                    time.sleep(POLL)
                for child in self.children:
                    child.process.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + PATIENCE
                while self.children and time.monotonic() < deadline:
                    self.reap(stopped=True)
                    time.sleep(POLL)
            finally:
                for child in self.children:  # a second signal
                    child.process.kill()
                    child.process.wait()
        return stop.signal

    def begin(self, run: Run) -> None:
        """Start a run's process. It has a session of its own: a Ctrl-C in the terminal reaches it once, from
        here."""
        log = _beside(self.root, run, ".log")
        fresh = not RunFolder(self.root / run.name).steps()
        words = [*self.program, *run.words(self.root, self.device, fresh)]
        gpu = None
        environment = dict(os.environ)
        if self.device == "cpu":
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        else:
            load = [sum(child.gpu == each for child in self.children) for each in range(self.gpus)]
            gpu = load.index(min(load))
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
        with log.open("ab") as file:
            place = file.tell()
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self.children.append(Child(process, run, time.monotonic(), log, place, gpu))

    def reap(self, stopped: bool = False) -> list[Child]:
        """Take leave of the children that have ended, and note what they cost."""
        gone = []
        for child in list(self.children):
            number, wait_status, usage = os.wait4(child.process.pid, os.WNOHANG)
            if not number:
                continue
            self.children.remove(child)
            gone.append(child)
            child.process.returncode = code = os.waitstatus_to_exitcode(wait_status)
            error = ""
            if code and not (stopped and code in (128 + signal.SIGTERM, -signal.SIGTERM)):
                error = _last_line(child.log, child.place) or f"it ended with exit code {code}"
            seconds = time.monotonic() - child.begun, usage.ru_utime + usage.ru_stime
            self.note(child.run, error, *seconds)
        return gone

    def note(self, run: Run, error: str = "", wall: float = 0.0, cpu: float = 0.0) -> None:
        before = record(self.root, run)
        seconds = {"wall_seconds": round(before.get("wall_seconds", 0.0) + wall, 1)}
        seconds["cpu_seconds"] = round(before.get("cpu_seconds", 0.0) + cpu, 1)
        about: dict[str, Any] = {**seconds, "machine": machine(self.device), "commit": commit()}
        with contextlib.suppress(OSError):  # of a full disk the run itself has told
            write_text(
                _beside(self.root, run, ".json"), json.dumps({**about, "error": error}, indent=1) + "\n"
            )


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Let this process save and end when the one that started it is killed."""
    if _libc is not None:
        _libc.prctl(PARENT_DEATH, int(signal.SIGTERM))


def _last_line(log: Path, place: int) -> str:
    """What a run's process said last of all, or last of what it had against its input."""
    with opened(log) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(place, end - TAIL))
        lines = file.read(TAIL).decode(errors="replace").splitlines()
    own = [line.removeprefix("brc-fast: ") for line in lines if line.startswith("brc-fast: ")]
    said = own or [line.strip() for line in lines if line.strip()]
    return "".join(c for c in said[-1] if c.isprintable()) if said else ""


def machine(device: str) -> dict[str, Any]:
    """The processor and how many cores this process may use; and the GPU, where runs are on it."""
    from brc_fast.learner.precision import cores

    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    told: dict[str, Any] = {"cpu": models[0] if models else platform.processor() or platform.machine()}
    told["cores"] = cores()
    if device == "cuda":
        import torch

        told["gpu"] = torch.cuda.get_device_name(0)
    return told


def commit() -> str | None:
    """Of the checkout that this package is imported from, with -dirty where something in it was changed; None
    where it is installed."""
    root = Path(brc_fast.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(words, text=True, capture_output=True, check=True).stdout.strip()
    return None


def totals(root: Path, runs: Sequence[Run]) -> Mapping[str, float]:
    """Wall and CPU seconds of all runs."""
    records = [record(root, run) for run in runs]
    return {name: sum(each.get(name, 0.0) for each in records) for name in ("wall_seconds", "cpu_seconds")}
