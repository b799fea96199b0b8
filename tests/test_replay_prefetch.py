"""Batches gathered before they are asked for: equal to those of sample, whatever happens in between."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extras import require

from brc_fast.replay import Field

require("hypothesis")

from replay_oracle import ENDS, Feed, assert_same_batch, filled, more, wait_for, wait_until_full


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "request_",
    [
        {"batch_size": 8},
        {"batch_size": 5, "n_step": 3, "discount": 0.9},
        {"batch_size": 4, "num_batches": 3, "n_step": 2, "discount": 0.5, "weights": "equal"},
        {"batch_size": 6, "num_batches": 2, "tasks": [0]},
    ],
)
def test_the_next_batch_is_what_sample_would_return_whatever_happens_in_between(
    request_: dict[str, Any], depth: int, tmp_path: Path
) -> None:
    """From empty over growth and wraps, with adds, direct samples, saves and loads in any order."""
    feed = Feed(30, (0, 1, 0), Field((3,), stack=2), seed=5)
    twin = feed.empty(seed=5)
    rng = np.random.default_rng(depth)
    compared = refused = 0
    with twin.prefetch(**request_, depth=depth) as batches:
        for step in range(250):
            what = rng.integers(12 if step > 60 else 8)
            if what < 4:
                streams = rng.permutation(3)[: rng.integers(1, 4)].tolist()
                ends = [ENDS[rng.integers(4)] if rng.random() < 0.2 else ENDS[0] for _ in streams]
                feed.add(streams, (rng.random(len(streams)) < 0.1).tolist(), ends, twin)
            elif what < 8:
                if what == 4 and compared > 0 and len(twin) > 8:
                    wait_until_full(batches)
                    feed.add(None, None, None, twin)
                try:
                    expected = feed.buffer.sample(**request_)
                except ValueError:
                    refused += 1
                    with pytest.raises(ValueError, match="stored"):
                        next(batches)
                    continue
                assert_same_batch(next(batches), expected)
                compared += 1
            elif what < 10:
                assert_same_batch(twin.sample(7), feed.buffer.sample(7))
            elif what == 10 or step < 80:
                feed.buffer.save(tmp_path / "feed")
                twin.save(tmp_path / "twin")
            elif (tmp_path / "twin").exists():
                feed.buffer.load(tmp_path / "feed")
                twin.load(tmp_path / "twin")
            assert twin.draws == feed.buffer.draws
    assert refused > 0
    assert compared > 50


@pytest.mark.parametrize("depth", [1, 4])
def test_a_save_holds_the_batches_consumed_and_not_those_gathered(depth: int, tmp_path: Path) -> None:
    feed, twin = filled(), filled().buffer
    with twin.prefetch(4, 2, depth=depth) as batches:
        for consumed in range(5):
            wait_until_full(batches)
            twin.save(tmp_path)
            restored = feed.empty(seed=99)
            restored.load(tmp_path)
            assert twin.draws == restored.draws == 2 * consumed
            with restored.prefetch(4, 2, depth=3) as others:
                expected = feed.buffer.sample(4, 2)
                assert_same_batch(next(others), expected)
                assert_same_batch(next(batches), expected)


def test_nothing_is_gathered_twice_while_nothing_changes() -> None:
    feed, twin = filled(300, steps=150), filled(300, steps=150).buffer
    with twin.prefetch(32, 2, n_step=3, discount=0.9, depth=3) as batches:
        for _ in range(20):
            wait_until_full(batches)
            assert_same_batch(next(batches), feed.buffer.sample(32, 2, n_step=3, discount=0.9))
        assert batches.regathered == 0


@pytest.mark.parametrize("steps", [70, 400])
def test_only_what_has_changed_is_gathered_again(steps: int) -> None:
    """While the rings grow (from 70 to 110 transitions, of reach 128) and after they have wrapped."""
    feed, twin = filled(600, (0, 0, 0), steps), filled(600, (0, 0, 0), steps).buffer
    with twin.prefetch(100, depth=2) as batches:
        for _ in range(40):
            wait_until_full(batches)
            more(feed, 1, twin)
            assert_same_batch(next(batches), feed.buffer.sample(100))
        assert 0 < batches.regathered < 40 * 100 * 0.08


def test_what_was_gathered_before_a_load_of_something_else_is_not_returned(tmp_path: Path) -> None:
    """Although the draws and the numbers of the transitions are the same."""
    feed, other = filled(300, steps=50), Feed(300, (0, 1, 0), seed=3)
    other.tag = 5000
    more(other, 50)
    other.buffer.save(tmp_path)
    other.buffer = feed.buffer
    with feed.buffer.prefetch(50, depth=2) as batches:
        wait_until_full(batches)
        feed.buffer.load(tmp_path)
        for _ in range(4):
            other.check_batch(next(batches), 50)


def test_after_another_draw_the_thread_catches_up(tmp_path: Path) -> None:
    buffer = filled(300, steps=50).buffer
    buffer.save(tmp_path)
    with buffer.prefetch(10, depth=3) as batches:
        for _ in range(5):
            wait_until_full(batches)
            buffer.sample(4)  # the first of those gathered is passed over
            next(batches)
        assert batches.regathered == 0
        wait_until_full(batches)
        buffer.load(tmp_path)  # back to draws that nobody has gathered any more
        next(batches)
        for _ in range(5):
            wait_until_full(batches)
            next(batches)
        assert batches.regathered == 10


def test_too_little_is_refused_as_by_sample_until_there_is_enough() -> None:
    feed = Feed(10)
    with feed.buffer.prefetch(3, depth=2) as batches:
        for stored in range(3):
            for _ in range(2):
                with pytest.raises(ValueError, match=f"batch_size 3 exceeds the {stored} transitions"):
                    next(batches)
            feed.add()
        assert feed.buffer.draws == 0
        for _ in range(4):
            feed.check_batch(next(batches), 3)


def test_closing_ends_the_thread_and_batches_stay_valid() -> None:
    feed = filled()
    batches = feed.buffer.prefetch(4, depth=3)
    thread = batches._worker.thread
    wait_until_full(batches)
    batch = next(batches)
    batches.close()
    batches.close()
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    feed.check_batch(batch, 4)
    with feed.buffer.prefetch(4) as others:
        thread = others._worker.thread
    assert not thread.is_alive()
    feed.check_sample(4)


@pytest.mark.parametrize("used", [False, True])
def test_dropping_a_prefetcher_ends_its_thread(used: bool) -> None:
    buffer = filled().buffer
    batches = buffer.prefetch(4, depth=2)
    thread = batches._worker.thread
    if used:
        next(batches)
        wait_until_full(batches)
    assert thread in threading.enumerate()
    del batches
    wait_for(lambda: thread not in threading.enumerate())


LEFT_OPEN = """
import time
import numpy as np
from brc_fast import ReplayBuffer

buffer = ReplayBuffer(2000, 67, 24)
frame, no = np.zeros((1, 67), np.float32), np.zeros(1, bool)
for _ in range(2000):
    buffer.add(frame, frame[:, :24].copy(), frame[:, 0].copy(), no, no, frame)
left_open = [buffer.prefetch(2000, 16, depth=4) for _ in range(3)]
time.sleep(0.01)
"""


def test_python_ends_well_while_batches_are_being_gathered() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_goes_wrong_in_the_thread_is_raised_to_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = filled().buffer

    def fail(*sizes: int) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(buffer._arena, "lease", fail)
        batches = buffer.prefetch(4)
        batches._worker.thread.join(20)
    with pytest.raises(RuntimeError, match="thread failed") as failed:
        next(batches)
    assert isinstance(failed.value.__cause__, MemoryError)
    batches.close()


def test_a_prefetcher_needs_a_depth_and_sizes_of_at_least_one() -> None:
    buffer = filled().buffer
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        buffer.prefetch(4, depth=0)
    with pytest.raises(ValueError, match=r"batch_size .* at least 1, got 0 and 1"):
        buffer.prefetch(0)
