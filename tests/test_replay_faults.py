"""Saves that are killed or run out of disk, manifests that contradict themselves, and memory while saving."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extras import require

require("hypothesis")

from refusals import says
from replay_kills import SCENARIOS
from replay_oracle import (
    Feed,
    Manifest,
    assert_same,
    filled,
    manifest_of,
    more,
    read_all,
    saved_twice,
    write_manifest,
)

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """[scenario, action, place, how the save ended, what a load finds] for each save that was stopped."""
    folder = tmp_path_factory.mktemp("kills")
    done = subprocess.run(
        [sys.executable, TESTS / "replay_kills.py", folder], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [line.split("|") for line in done.stdout.splitlines()]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("action", "ended"), [("kill", "killed"), ("raise", "refused")])
def test_a_save_that_is_killed_or_fails_anywhere_leaves_the_old_or_the_new(
    outcomes: list[list[str]], scenario: str, action: str, ended: str
) -> None:
    of = [row for row in outcomes if row[0] == scenario and row[1].startswith(action)]
    assert [row for row in of if row[4] not in ("old", "new")] == []
    assert {row[3] for row in of} == {ended, "saved"}
    assert {row[4] for row in of} == {"old", "new"}
    assert [row for row in of if row[3] == "saved" and row[4] == "old"] == []
    at_once = {row[2] for row in of if row[1] == action}
    if scenario != "large":
        places = {"before write_segment", "before fsync", "before replace", "within a manifest"}
        assert places <= at_once
        assert ("before link" in at_once) == (scenario in ("linked", "copied", "back", "back copied"))
        assert ("within copyfile" in at_once) == (scenario not in ("first", "linked"))


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Lets no file grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [0, 100, 600])
def test_a_full_disk_is_an_error_that_says_what_is_left(
    tmp_path: Path, small_disk: Callable[[int], None], most: int
) -> None:
    feed = filled()
    small_disk(most)
    told = "could not be saved: .*[Ff]ile too large; "
    with pytest.raises(OSError, match=f"{told}there is no earlier save") as caught:
        feed.buffer.save(tmp_path)
    assert caught.value.filename == str(tmp_path)
    assert list(tmp_path.glob("segment-*")) == []
    small_disk(1 << 30)
    feed.buffer.save(tmp_path)
    old = feed.copied()
    more(feed, 2)
    small_disk(most)
    with pytest.raises(OSError, match=f"{told}the save before it is intact"):
        feed.buffer.save(tmp_path)
    old.loaded(tmp_path).check_content()
    assert len(list(tmp_path.glob("segment-*"))) == 1
    small_disk(1 << 30)
    feed.check_sample(3, 2)
    feed.buffer.save(tmp_path)
    feed.loaded(tmp_path).check_content()


# ---- Manifests with a right checksum that contradict themselves


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Feed, Manifest]:
    return saved_twice(tmp_path), manifest_of(tmp_path)


def at(*path: Any, to: Any) -> Callable[[Manifest], None]:
    """Sets one place of a manifest."""

    def change(manifest: Manifest) -> None:
        inner: Any = manifest
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["segments"].clear(), "stream 0 of the saved replay lacks rows in its files"),
        (lambda m: m["segments"].pop(0), "stream 0 of the saved replay lacks rows in its files"),
        (lambda m: m["segments"].pop(), "stream 0 of the saved replay lacks rows in its files"),
        (lambda m: m["segments"].reverse(), "stream 0 of the saved replay lacks rows in its files"),
        (at("content", "count", 0, to=11), "stream 0 of the saved replay lacks rows in its files"),
        (at("content", "count", 0, to=9), "contradicts itself: stream 0 has rows after its last"),
        (at("content", "size", 0, to=4), "stream 0 of the saved replay has more transitions than rows"),
        (at("content", "kept", 1, to=11), "stream 1 of the saved replay has more transitions than rows"),
        (at("content", "kept", 0, to=6), "stream 0 of the saved replay lacks rows in its files"),
        (at("content", "size", 1, to=9), "stream 1 of the saved replay has a size, phase and cap"),
        (at("content", "phase", 1, to=9), "stream 1 of the saved replay has a size, phase and cap"),
        (at("content", "phase", 0, to=3), "stream 0 of the saved replay has a size, phase and cap"),
        (at("content", "capacity", 0, to=2), "stream 0 of the saved replay has a size, phase and cap"),
        (at("content", "capacity", 0, to=0), "stream 0 of the saved replay has a size, phase and cap"),
        (at("content", "count", to=[10, 10]), "count must hold 3 values, got 2"),
        (at("content", "phase", to=[]), "phase must hold 3 values, got 0"),
        (at("segments", 0, "rows", to=[3, 9]), "rows must hold 3 values, got 2"),
        (at("segments", 0, "side", to=[1] * 4), "side must hold 3 values, got 4"),
        (at("segments", 1, "head", 0, to=0), "contradicts itself: stream "),
        (at("segments", 1, "rows", 2, to=3), "contradicts itself: stream "),
        (at("segments", 1, "rows", 2, to=2**32 - 1), "contradicts itself: stream 2 has rows after its last"),
        (at("segments", 0, "side", 1, to=0), "stream 1 has another number of successors than its rows say"),
        (at("segments", 0, "bytes", to=2**63), "is truncated: it ends after "),
        (at("segments", 0, "bytes", to=10), "is damaged: the checksum of block 0 differs"),
        (at("segments", 0, "checksums", to=[]), "is damaged: the checksum of block 0 differs"),
        (at("segments", 0, "file", to=f"segment-{0:032x}.bin"), f"segment-{0:032x}.bin is missing"),
        (at("segments", 0, "file", to="segment-none.bin"), "a name that no save gives"),
        (at("content", "count", 0, to=-1), "manifest.json does not hold what it must"),
        (at("content", "draws", to=2**64), "manifest.json does not hold what it must"),
        (at("content", "phase", to=None), "manifest.json does not hold what it must"),
        (at("segments", 0, "head", to="yes"), "manifest.json does not hold what it must"),
        (at("segments", 0, "file", to=5), "manifest.json does not hold what it must"),
        (at("segments", to=7), "manifest.json does not hold what it must"),
        (at("seed", to=-1), "manifest.json does not hold what it must"),
        (at("fields", to=[]), "manifest.json does not hold what it must"),
        (lambda m: m.pop("id"), "manifest.json does not hold what it must"),
        (lambda m: m.pop("content"), "manifest.json does not hold what it must"),
        (lambda m: m.pop("format"), "manifest.json does not hold what it must"),
        (lambda m: m["fields"].pop("extras"), "manifest.json does not hold what it must"),
        (lambda m: m["segments"][1].pop("rows"), "manifest.json does not hold what it must"),
    ],
)  # fmt: skip
def test_a_manifest_that_contradicts_itself_is_refused_and_changes_nothing(
    saved: tuple[Feed, Manifest], tmp_path: Path, change: Callable[[Manifest], Any], message: str
) -> None:
    feed, manifest = saved
    change(manifest)
    write_manifest(tmp_path, manifest)
    other = filled([5, 20], (0, 1, 0), steps=7, seed=9)
    with pytest.raises(ValueError, match=says(message)):
        other.buffer.load(tmp_path)
    other.check_content(2, 0.9)
    other.check_sample(4, 2)
    assert feed.stored() != other.stored()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the numbers are."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, (dict, list)):
            yield from leaves(inner, (*path, key))
        elif isinstance(inner, int):
            yield (*path, key)


def test_any_other_number_in_a_manifest_is_refused_or_gives_true_transitions(
    saved: tuple[Feed, Manifest], tmp_path: Path
) -> None:
    feed, manifest = saved
    true = {row.tobytes() for row in rows_of(feed.expected([(s, n) for s in range(3) for n in range(10)]))}
    other = filled([5, 20], (0, 1, 0), steps=7, seed=9)
    before = read_all(other.buffer)
    accepted = 0
    for path in leaves({name: manifest[name] for name in ("content", "segments", "seed")}):
        inner: Any = manifest
        for key in path:
            inner = inner[key]
        for number in {0, 1, inner - 1, inner + 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0.5, -1} - {
            inner
        }:
            changed = copy.deepcopy(manifest)
            at(*path, to=number)(changed)
            write_manifest(tmp_path, changed)
            try:
                other.buffer.load(tmp_path)
            except ValueError:
                assert_same(read_all(other.buffer), before)
                continue
            accepted += 1
            assert {row.tobytes() for row in rows_of(read_all(other.buffer))} <= true, (path, number)
            other.buffer.sample(1, 3)
            other.buffer.add(**other.arguments([0, 1, 2], [False] * 3, [(False, False)] * 3))
            other = filled([5, 20], (0, 1, 0), steps=7, seed=9)
    assert 0 < accepted < 120


def rows_of(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Transitions as rows of floats."""
    names = ("observations", "actions", "rewards", "masks", "next_observations", "task_ids")
    return np.column_stack([columns[name].astype(np.float32) for name in names])


# ---- Memory

MEMORY = """
import sys
import numpy as np
from brc_fast.replay import ReplayBuffer

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

STREAMS, STEPS = 2048, 260
buffer = ReplayBuffer(STREAMS * 256, 67, 24, task_ids=[0] * STREAMS)
frame = np.zeros((STREAMS, 67), np.float32)
for step in range(STEPS):
    end = np.arange(STREAMS) % 50 == step % 50
    buffer.add(frame, frame[:, :24].copy(), frame[:, 0].copy(), end, ~end & False, frame + 1)
    frame = frame + 1
now, highest = kilobytes("VmRSS"), kilobytes("VmHWM")
assert buffer.nbytes > 200e6 and now > 200e3
{call}
print(highest - now, kilobytes("VmHWM") - now)
"""


def test_saving_and_loading_take_little_memory_besides_the_buffer(tmp_path: Path) -> None:
    for call in (f"buffer.save({str(tmp_path)!r})", f"buffer.load({str(tmp_path)!r})"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY.replace("{call}", call)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        before, after = map(int, done.stdout.split())
        assert before < 20_000
        assert after < 64_000
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 195e6
