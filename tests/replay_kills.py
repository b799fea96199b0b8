"""Stops a save at every place where it touches the disk, and prints what is found in its folder afterwards.

    python replay_kills.py FOLDER

prints a line for each: SCENARIO|ACTION|PLACE|how the save ended|what a load finds then. The save ends
"killed", "refused" or "saved"; the load finds "old", "new" or what is wrong. Each save is made by a fork.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replay_oracle import Feed, filled, more, read_all

from brc_fast.replay import Field, forks

SCENARIOS = ["first", "second", "later", "another", "linked", "copied", "back", "back copied", "large"]
PIECES = 100  # of a manifest, between two places to stop


class Scenario:
    """`feed` saves to `to`, with `previous`. A load finds `old` there so far, nothing if that is None.

    `beside` is what `previous` holds and must keep.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.to, self.previous = "a", ""
        self.old: Feed | None = None
        self.beside: Feed | None = None
        a, b = folder / "a", folder / "b"
        folder.mkdir()
        if name == "large":  # rows of 800 kB, so that a segment has blocks
            self.feed = filled(20, (0,), 2, observation=Field((200_000,)))
        else:
            self.feed = filled(12, (0, 1, 0), 9)
        if name == "another":  # somebody else's save is there
            self.old = filled(12, (0, 1, 0), 5, seed=9)
            self.old.buffer.save(a)
        elif name != "first":
            for _ in range(3 if name == "later" else 1):  # whose first segment is not wanted any more
                self.feed.buffer.save(a)
                self.old = self.feed.copied()
                more(self.feed, {"later": 14, "large": 6}.get(name, 1))
        if name in ("linked", "copied"):
            self.to, self.previous, self.beside, self.old = "b", "a", self.old, None
        elif name in ("back", "back copied"):  # and forth: the files of `a` are in `b` too
            self.feed.buffer.save(b, previous=a)
            self.previous, self.beside = "b", self.feed.copied()
            more(self.feed, 1)

    def save(self, work: Path) -> None:
        self.feed.buffer.save(work / self.to, previous=work / self.previous if self.previous else None)

    def found(self, work: Path) -> str:
        """What a load finds, before and after a save that goes well."""
        try:
            if self.beside is not None and not holds(self.beside, work / self.previous):
                return "another content beside"
            if self.old is None:
                found = "new" if (work / self.to / "manifest.json").exists() else "old"
            else:
                found = "old" if holds(self.old, work / self.to) else "new"
            if found == "new" and not holds(self.feed, work / self.to):
                return "a mixture"
            self.save(work)
            return found if holds(self.feed, work / self.to) else "a later save is broken"
        except (ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"


def holds(feed: Feed, folder: Path) -> bool:
    """Whether a load gives exactly this."""
    buffer = feed.empty(seed=1)
    buffer.load(folder)
    got, expected = read_all(buffer), feed.expected(feed.stored())
    same = (buffer.draws, buffer._store.seed) == (feed.draws, feed.seed)
    return same and all(got[name].tobytes() == value.tobytes() for name, value in expected.items())


class Stops:
    """Counts places, names the one that it stops at, and stops there."""

    def __init__(self, at: int, action: str, report: int) -> None:
        self.left, self.action, self.report, self.pieces = at, action, report, 0

    def __call__(self, place: str) -> None:
        self.left -= 1
        if self.left != 0:
            return
        os.write(self.report, place.encode())
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(*arguments: Any, **options: Any) -> Any:
            self("before " + name)
            result = function(*arguments, **options)
            if self.action == "kill":  # what is done cannot fail any more
                self("after " + name)
            return result

        return stopping

    def install(self, feed: Feed) -> None:
        """From here on, this process stops."""
        copy, path_open, store = shutil.copyfile, Path.open, feed.buffer._store
        for name in ("open", "fsync", "replace", "rename", "link", "unlink", "mkdir"):
            setattr(os, name, self.around(name, getattr(os, name)))

        def copyfile(source: Any, target: Any) -> None:
            self("before copyfile")
            copy(source, target)
            os.truncate(target, os.stat(target).st_size // 2)
            self("within copyfile")
            copy(source, target)

        def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if mode not in ("w", "x"):
                return path_open(path, mode, *arguments, **options)
            self(f"before opening {path.name}")
            return Wrapped(path_open(path, mode, *arguments, **options), write=self.piecewise)

        shutil.copyfile, Path.open = copyfile, opened  # type: ignore[assignment]
        segment = self.around("write_segment", store.write_segment)
        feed.buffer._store = Wrapped(store, write_segment=lambda _, *given: segment(*given))  # type: ignore[assignment]

    def piecewise(self, file: Any, text: str) -> None:
        file.write(text)
        self.pieces += 1
        if self.pieces % PIECES == 0:
            file.flush()
            self("within a manifest")


class Wrapped:
    """An object with some methods replaced; they are given what is wrapped."""

    def __init__(self, whole: Any, **methods: Callable[..., Any]) -> None:
        self.whole, self.methods = whole, methods

    def __getattr__(self, name: str) -> Any:
        method = self.methods.get(name)
        if method is None:
            return getattr(self.whole, name)
        return lambda *arguments: method(self.whole, *arguments)

    def __enter__(self) -> Wrapped:
        return self

    def __exit__(self, *error: object) -> None:
        self.whole.close()


def attempt(scenario: Scenario, work: Path, prepare: Callable[[int], None]) -> tuple[str, str]:
    """Saves in a fork; returns where it stopped, if it did, and how it ended."""
    reader, writer = os.pipe()
    forks._alive.discard(
        scenario.feed.buffer
    )  # no DataLoader's worker: it goes on with the numbers of this process
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare(writer)
            scenario.save(work)
            code = 0
        except OSError:
            code = 3
        finally:
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as report:
        place = report.read()
    if os.WIFSIGNALED(status):
        return place, "killed"
    return place, {0: "saved", 3: "refused"}.get(os.WEXITSTATUS(status), "broken")


def limit(most: int, action: Any) -> None:
    """No file of this process may grow beyond: a signal kills it, or the write is refused."""
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def run(name: str, folder: Path) -> None:
    scenario = Scenario(name, folder)
    buffer, link, saved = scenario.feed.buffer, os.link, scenario.feed.buffer._saved
    work = folder.with_name(folder.name + " at work")
    if "copied" in name:

        def no_link(*paths: Any) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        os.link = no_link  # type: ignore[assignment]

    def one(action: str, prepare: Callable[[int], None]) -> str:
        shutil.copytree(folder, work)
        place, ended = attempt(scenario, work, prepare)
        print("|".join([name, action, place, ended, scenario.found(work)]))
        buffer._saved = saved
        shutil.rmtree(work)
        return place

    if name != "large":
        for action in ("kill", "raise"):
            for at in itertools.count(1):
                if (
                    one(action, lambda to, at=at, action=action: Stops(at, action, to).install(scenario.feed))
                    == ""
                ):
                    break
    size = 6 << 20 if name == "large" else 900
    for most in (0, size // 3, 5 * size // 6, 2 * size, 100 * size):
        one("kill at a size", lambda _, most=most: limit(most, signal.SIG_DFL))
        one("raise at a size", lambda _, most=most: limit(most, signal.SIG_IGN))
    os.link = link


if __name__ == "__main__":
    os.fsync = lambda handle: None  # a kill loses nothing that was written
    for each in SCENARIOS:
        run(each, Path(sys.argv[1]) / each)
