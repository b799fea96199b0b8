"""Run folders and checkpoints: safetensors for arrays, JSON for the rest, never pickle.

    RUN/config.json                  the settings and, under `written`, by what and when it was written
    RUN/tasks.json                   each task as its own environment has it (brc_fast.spec.Native)
    RUN/metrics.jsonl                a row per report and per evaluation, each with `step`
    RUN/metrics.jsonl.damaged        lines of it that were none
    RUN/learning_curve.png
    RUN/error.txt                    the traceback of the newest failure
    RUN/checkpoints/000000400000/    named by environment steps per task
        agent.safetensors  environments.safetensors  progress.safetensors
        replay/                      the replay buffer's own files (brc_fast.replay.files)
        manifest.json                format, step, and size and checksum of every other file; written last
    RUN/best/000000375000/           agent.safetensors and manifest.json at the best evaluation so far

A checkpoint is written under another name and renamed when it is complete, so a save that fails or is
killed leaves the previous one as it was. What a step writes is on the disk before the next one relies on it:
rows of metrics, files, manifest, names, and only then is an older checkpoint deleted, so that a power failure
does no more than a kill. The newest two are kept. Of the replay only the transitions that are
new since the previous checkpoint are written; the rest are links to its files.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from numpy.typing import NDArray

from brc_fast import __version__
from brc_fast.agents.memory import parameters_at_least, require_room
from brc_fast.config import TrainConfig, from_dict
from brc_fast.disk import (
    FOLDER,
    opened,
    read_json,
    replace_file,
    require,
    require_replaceable,
    require_shallow,
    sync,
)
from brc_fast.envs.suites import is_robot
from brc_fast.errors import InputError
from brc_fast.spec import Native

from .arrays import ArrayFile, Arrays, Kinds, checksum_of, write_arrays

FORMAT = 3  # of checkpoints, what is written
CONFIG_FORMAT = 1
READ = (2, FORMAT)  # 2 has moments as one vector; agents.base.Agent.load_state_dict takes both
KEPT = 2
SMALL = 2**28  # bytes of a file that is read a second time, to tell damage from what does not fit
REPLAY = "replay"
STEP = re.compile(r"(0\d{11}|[1-9]\d{11,17})", re.ASCII)  # a checkpoint's name
DAMAGED = ".damaged"
Fits = Callable[[Kinds], object]  # ValueError where what a file says it holds does not fit the run
log = logging.getLogger(__name__)


class Replay(Protocol):
    """What keeps its own files; see ReplayBuffer.save and load."""

    def save(self, folder: Path, *, previous: Path | None = None) -> None: ...
    def load(self, folder: Path, *, same_capacity: bool = False) -> None: ...


class RunFolder:
    """One run on disk. Making the object touches nothing."""

    FILES = (
        *("config.json", "metrics.jsonl", f"metrics.jsonl{DAMAGED}", "learning_curve.png", "evaluation.json"),
        *("error.txt", "tasks.json", "wandb.json"),
    )
    FOLDERS = ("checkpoints", "best", "tensorboard", "wandb")
    OWN = FILES + FOLDERS

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints, self.bests = self.path / "checkpoints", self.path / "best"

    def refuse_existing(self, overwrite: bool) -> None:
        """InputError if the folder holds a run and may not be overwritten, or cannot be one."""
        try:
            str(self.path).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the run's folder must have a name in UTF-8, got {str(self.path)!a}") from error
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file: name another folder with --run")
        if not overwrite and any(os.path.lexists(self.path / name) for name in self.OWN):
            raise InputError(
                f"{self.path} already holds a run: go on with --resume {quote(str(self.path))}, "
                "replace it with --overwrite, or name another folder with --run"
            )

    def require_plain(self) -> None:
        """InputError for a link, pipe or device where the run has files of its own, before one is opened.

        Whoever goes on with a run that somebody else made calls this first. The folder itself may be a link,
        and what a run does not write may be anything.
        """
        for name in self.FILES:
            # a folder there: the evaluation is printed and the command tells why it is not kept
            unwritable = (FOLDER,) if name == "evaluation.json" else ()
            require_replaceable(self.path / name, *unwritable)
        for name in self.FOLDERS:
            require(self.path / name, FOLDER)
        for checkpoint in (*self.checkpoints.glob("*"), *self.bests.glob("*")):
            if STEP.fullmatch(checkpoint.name) or checkpoint.name.startswith("partial-"):
                require(checkpoint, FOLDER)
                require_shallow(checkpoint)

    def require_foreign_code(self, tasks: Iterable[str], allowed: Sequence[str] = ()) -> None:
        """InputError for a task `gym/MODULE:ID` that would import code which the user did not choose: from
        the run's own folder, or from the current one unless the module is `allowed`. Nothing is imported.

        A run that somebody else made would bring its own code: where Python looks for modules in the current
        folder, that of a run there is a package, and so is what lies beside it. What is installed in an
        environment below the current folder was chosen. Only the module's first name is looked up.
        """
        home, here = self.path.resolve(), Path.cwd().resolve()
        for task in tasks:
            module = module_of(task)
            if not module:
                continue
            places = _places(module)
            own = [place for place in places if _lies_in(place, home)]
            if own:
                raise InputError(
                    f"{task} would run code out of the run's own folder, {own[0]}: move the module to a "
                    "place of your own if you trust it"
                )
            near = [place for place in places if _lies_in(place, here)]
            near = [place for place in near if not any(_lies_in(place, folder) for folder in _installed())]
            if near and module not in allowed:
                raise InputError(
                    f"{task}, named by the run's config.json, would import the module {module} out of the "
                    f"current folder, {_file(near, module)}: add --allow-module {quote(module)} if you trust "
                    "it"
                )

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Make the folder and keep it to this process; InputError where another one trains into it."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process trains into {self.path}: name another folder") from None
            except OSError:  # a file system without locks
                pass
            yield
        finally:
            os.close(handle)

    def create(self, config: TrainConfig, **about: str) -> None:
        """Make the folder, clear it of an earlier run (of nothing else), and write config.json.

        The earlier config.json goes last, replaced by this one, and checkpoints first: whoever is killed on
        the way leaves a run that has none, and not a folder of which nobody knows what it holds.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        others = [name for name in self.FILES if name != "config.json"]
        for name in (*self.FOLDERS, *others, *(f"{name}.partial" for name in self.FILES)):
            old = self.path / name
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
        self.write_config(config, **about)
        with suppress(OSError):  # a folder that may be written and not read
            sync(self.path.parent)

    def write_config(self, config: TrainConfig, **about: str) -> None:
        """Write config.json: the settings and, apart from them under `written`, its format, the version and
        date of this writing, and what else is told `about` it, such as command and device."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        written = {"format": CONFIG_FORMAT, "brc_fast": __version__, "date": now, **about}
        text = json.dumps({"written": written, **dataclasses.asdict(config)}, indent=2)
        write_text(self.path / "config.json", text + "\n")

    def config(self) -> TrainConfig:
        """The settings of the run in this folder."""
        file = self.path / "config.json"
        try:
            values = read_json(file)
            if not isinstance(values, dict):
                raise TypeError(f"it must be an object, got {values!r:.60}")
            _require_readable(file, values.pop("written", {"format": 0}))  # 0: before there was a number
            config = from_dict(TrainConfig, values)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{self.path} holds no run: {file.name} is missing") from None
        except InputError:
            raise
        except (ValueError, TypeError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
        assert isinstance(config, TrainConfig)
        if "privileged" not in values.get("env", {}) and any(map(is_robot, config.tasks)):
            # an older version wrote it, whose critics saw what the policy sees
            return dataclasses.replace(config, env=dataclasses.replace(config.env, privileged=False))
        return config

    def write_natives(self, natives: Iterable[Native]) -> None:
        """Keep each task as its own environment has it, in tasks.json."""
        told = {"format": 1, "tasks": [native.describe() for native in natives]}
        write_text(self.path / "tasks.json", json.dumps(told, indent=1) + "\n")

    def natives(self) -> dict[str, Native]:
        """What tasks.json says, by task; nothing where an older version wrote the run. InputError where it is
        damaged."""
        file = self.path / "tasks.json"
        try:
            told = read_json(file)
            if not isinstance(told, dict) or not isinstance(told.get("tasks"), list):
                raise ValueError(f"it must be an object with tasks, got {told!r:.60}")
            if told.get("format") != 1:
                raise ValueError(f"its format is {told.get('format')!r:.60}, and this version reads format 1")
            return {native.task: native for native in map(Native.of, told["tasks"])}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except InputError:
            raise
        except ValueError as error:
            raise InputError(
                f"{file} cannot be read: {error}; without it tasks are asked themselves"
            ) from error

    def steps(self) -> list[int]:
        """Environment steps per task of the complete checkpoints, oldest first."""
        return [int(folder.name) for folder in _complete(self.checkpoints)]

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(_complete(self.checkpoints)), None)

    def best(self) -> tuple[Path, list[float]] | None:
        """The best checkpoint and what it was chosen by, see `save`; None where none is whole."""
        found = []
        for folder in _complete(self.bests):
            try:
                found.append(([float(each) for each in _manifest(folder)["value"]], folder))
            except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
                log.warning("%s is damaged (%s): the next evaluation counts as the best", folder, error)
        if not found:
            return None
        value, folder = max(found)
        return folder, value

    def seconds(self) -> float:
        """That the run had taken at its newest checkpoint; 0 where an older version wrote it."""
        newest = self.newest()
        try:
            return 0.0 if newest is None else float(_manifest(newest).get("seconds", 0.0))
        except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
            return 0.0

    def choose(self, which: str = "last") -> Path:
        """The folder of the checkpoint "last", "best" or of a step; InputError where there is none."""
        newest = self.newest()
        if newest is not None and which == "last":
            return newest
        named = {} if newest is None else {"last": newest}
        if (best := self.best()) is not None:
            named["best"] = best[0]
        steps = {int(folder.name): folder for folder in (*named.values(), *_complete(self.checkpoints))}
        there = {str(step): steps[step] for step in sorted(steps)} | named
        if not there:
            raise InputError(f"{self.path} holds no complete checkpoint")
        if which not in there:
            raise InputError(f"{self.path} has no checkpoint {which}, only {', '.join(there)}")
        return there[which]

    def save(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, NDArray[Any]]],
        replay: Replay | None,
        *,
        best: Sequence[float] | None = None,
        seconds: float = 0.0,
    ) -> Path:
        """Write the checkpoint of `step`: named groups of arrays, and a replay. OSError leaves the others as
        they were.

        Args:
            best: the numbers by which it is the best one, the most important first; it replaces the best one
                before it, and no other.
            seconds: that the run has taken so far.
        """
        home, kept = (self.checkpoints, KEPT) if best is None else (self.bests, 1)
        final, partial = home / f"{step:012d}", home / f"partial-{step}"
        for stale in home.glob("partial-*"):  # of a process that was killed while saving
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
        try:
            files = {}
            for name, arrays in parts.items():
                size, checksum = write_arrays(partial / f"{name}.safetensors", arrays)
                files[f"{name}.safetensors"] = {"bytes": size, "crc32": checksum}
            if replay is not None:
                newest = self.newest()
                replay.save(partial / REPLAY, previous=newest / REPLAY if newest else None)
            manifest = {"format": FORMAT, "step": step, "seconds": round(seconds, 3), "files": files}
            manifest |= {} if best is None else {"value": list(best)}
            write_text(partial / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            if self.metrics.exists():
                sync(self.metrics)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            there = (
                f"checkpoint {self.steps()[-1]} is still there" if self.steps() else "there is no earlier one"
            )
            raise OSError(
                f"the checkpoint of step {step} could not be written to {final}: {error}; {there}"
            ) from error
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(home)
        sync(self.path)
        others = [folder for folder in _complete(home) if folder != final]
        for old in others[: len(others) + 1 - kept]:
            shutil.rmtree(old)
        return final

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Turn what refuses the newest checkpoint's contents into an InputError that names the folder."""
        try:
            yield
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(f"{self.newest()} does not fit this run: {error}") from error

    def require_size(self, config: TrainConfig) -> None:
        """InputError where the newest checkpoint has far fewer bytes than an agent of these settings: one of
        a thousand blocks takes half a minute to make, to be refused then."""
        newest = self.newest()
        file = newest / "agent.safetensors" if newest is not None else None
        if file is None or not file.exists():
            return
        least = sum(n * size for n, size in zip(parameters_at_least(config), (16, 12), strict=True))
        if 8 * file.stat().st_size < least:  # of what is about as large the array that does not fit is told
            raise InputError(
                f"{newest} does not fit this run: {file.name} has {file.stat().st_size} bytes, and the "
                f"networks of its config.json take {least} at least"
            )

    def load_replay(self, replay: Replay) -> None:
        """The newest checkpoint's replay; InputError with its name and what to do where it is damaged."""
        newest = self.newest()
        assert newest is not None
        for folder in (self.checkpoints, newest, newest / REPLAY):
            require(folder, FOLDER)
        try:
            replay.load(newest / REPLAY, same_capacity=True)
        except ValueError as error:
            raise InputError(f"{error}; {_remedy(newest, self.steps())}") from error

    def load(
        self, *names: str, checkpoint: str = "last", fits: Mapping[str, Fits] | None = None
    ) -> tuple[int, dict[str, Arrays]]:
        """A checkpoint's step and the named groups of arrays, checked against its manifest; see `choose`.

        fits: by name, asked before an array is read whether the dtypes and shapes fit; see `fitting`.
        """
        require(self.checkpoints, FOLDER)
        folder, steps = self.choose(checkpoint), self.steps()
        require(folder, FOLDER)
        try:
            manifest = _manifest(folder)
            version, step, files = (manifest[name] for name in ("format", "step", "files"))
            if (type(version), type(step), type(files)) != (int, int, dict):
                raise TypeError("format and step must be integers, and files an object")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder / 'manifest.json'} is damaged ({error}); {_remedy(folder, steps)}"
            ) from error
        if version not in READ:
            raise InputError(
                f"{folder} has format {version}, this version of brc-fast reads formats 2 and {FORMAT}: "
                + ("upgrade brc-fast" if version > FORMAT else "use the version that wrote it")
            )
        if step != int(folder.name):
            raise InputError(f"{folder} holds a checkpoint of step {step}; {_remedy(folder, steps)}")
        groups = {}
        for name in names:
            file = folder / f"{name}.safetensors"
            wanted = files.get(file.name)
            if wanted is None or not file.exists():
                raise InputError(f"{file} is missing; {_remedy(folder, steps)}")
            if not isinstance(wanted, dict) or not wanted.keys() >= {"bytes", "crc32"}:
                raise InputError(f"{file} has no size and checksum in its manifest; {_remedy(folder, steps)}")
            try:
                groups[name] = self._read(file, wanted, (fits or {}).get(name))
            except InputError:
                raise
            except ValueError as error:
                raise InputError(f"{file} is damaged: {error}; {_remedy(folder, steps)}") from error
        return step, groups

    def _read(self, path: Path, wanted: dict[str, Any], fits: Fits | None) -> Arrays:
        """The arrays of a file; ValueError where it is damaged."""
        with opened(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != wanted["bytes"]:
                told = f"is truncated: {size} of {wanted['bytes']!r:.60} bytes"
                raise InputError(f"{path} {told}; {_remedy(path.parent, self.steps())}")
            try:
                file = ArrayFile(stream)
                if fits is not None:
                    with self.fitting():
                        fits(file.kinds)
            except ValueError:
                if size < SMALL and checksum_of(stream) != wanted["crc32"]:
                    raise ValueError("its checksum differs") from None
                raise
            require_room(str(path), size)
            arrays, checksum = file.read()
        if checksum != wanted["crc32"]:
            raise ValueError("its checksum differs")
        return arrays


def prefixed(**groups: Mapping[str, NDArray[Any]]) -> Arrays:
    """Several groups of arrays as one, under `group/name`."""
    return {f"{group}/{name}": value for group, arrays in groups.items() for name, value in arrays.items()}


def grouped(arrays: Mapping[str, NDArray[Any]], group: str) -> Arrays:
    """One group of `prefixed`."""
    prefix = f"{group}/"
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    replace_file(path, text.encode())


def _complete(home: Path) -> list[Path]:
    """Folders of the complete checkpoints in a folder, by their steps."""
    if not home.is_dir():
        return []
    return sorted(
        (entry for entry in home.iterdir() if STEP.fullmatch(entry.name)), key=lambda entry: int(entry.name)
    )


def _manifest(folder: Path) -> Any:
    return read_json(folder / "manifest.json")


def module_of(task: str) -> str:
    """The module of a task `gym/MODULE:ID`; "" of others."""
    backend, _, name = task.partition("/")
    return name.rpartition(":")[0] if backend == "gym" else ""


def _places(module: str) -> list[Path]:
    """Files and folders that importing a module would read, as far as can be told without it."""
    first, *others = module.split(".")
    if not first:
        return []
    try:
        found = importlib.util.find_spec(first)
    except ValueError:  # of __main__, which is loaded
        return []
    if found is None:
        return []
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    places = folders + [folder.joinpath(*others) for folder in folders]
    if found.has_location and found.origin is not None:
        places.append(Path(found.origin))
    return [place.absolute() for place in places]


def _file(places: list[Path], module: str) -> Path:
    """The file of a module that is found at one of these places, or the nearest thing to it."""
    last = module.rpartition(".")[2]
    for place in places:
        for file in (place, place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if file.is_file() and last in (file.stem, file.parent.name):
                return file
    return places[-1]


def _installed() -> list[Path]:
    """Folders whose modules somebody has installed."""
    packages = [
        Path(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")
    ]
    return [folder.resolve() for folder in (*packages, Path(sysconfig.get_path("stdlib")))]


def _lies_in(place: Path, folder: Path) -> bool:
    return place.resolve().is_relative_to(folder) or folder in (up.resolve() for up in place.parents)


def _require_readable(file: Path, written: Any) -> None:
    """InputError for a config.json of a format that this version does not know."""
    version = written.get("format") if isinstance(written, dict) else None
    if type(version) is not int or version < 0:
        raise InputError(f"{file} cannot be read: written must have a format, got {written!r:.60}")
    if version > CONFIG_FORMAT:
        raise InputError(
            f"{file} has format {version}, this version of brc-fast reads formats up to {CONFIG_FORMAT}: "
            "upgrade brc-fast"
        )


def _remedy(folder: Path, steps: list[int]) -> str:
    if folder.parent.name == "best":
        return f"delete {folder}"
    if others := [step for step in steps if f"{step:012d}" != folder.name]:
        return f"delete {folder} to go on from the checkpoint of step {others[-1]}"
    return "there is no earlier checkpoint to go on from"
