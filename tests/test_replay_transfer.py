"""What was saved of some tasks, loaded into buffers of other tasks and other numbers of streams."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extras import require

from brc_fast.replay import DeviceReplayBuffer, Field, ReplayBuffer, transfer

require("hypothesis")

from refusals import says
from replay_oracle import ENDS, Feed, assert_same_batch, filled, manifest_of, more, rewrite

OBSERVATIONS: dict[str, Any] = {
    "plain": Field((3,)),
    "frames": Field((2, 2), "uint8", stack=3),
    "parts": {"policy": Field((3,)), "image": Field((4,), "uint8", stack=2)},
}
# Streams 0 and 2 are of task 0 and keep 4 transitions each, streams 1 and 3 of task 1 have 9.
SAVED = {"capacity": [8, 20], "task_ids": (0, 1, 0, 1), "steps": 9}
# capacity, task_ids and mapping of the other buffer; of each of its streams the saved streams and which of
# their transitions, counted from the oldest, or None where it keeps its own
CASES: dict[str, tuple[Any, tuple[int, ...], dict[int, int], list[Any]]] = {
    "fewer streams": ([8, 20], (0, 1), {0: 0, 1: 1}, [[(0, 0, 4), (2, 0, 4)], [(1, 0, 9), (3, 0, 9)]]),
    "more streams": (
        [12, 100],
        (0, 0, 0, 1, 1, 1),
        {0: 0, 1: 1},
        [[(0, 0, 4)], [(2, 0, 4)], [], [(1, 0, 9)], [(3, 0, 9)], []],
    ),
    "cut to fit": (9, (0, 0, 0), {0: 0}, [[(0, 0, 2)], [(0, 2, 4), (2, 0, 1)], [(2, 1, 4)]]),
    "the newest": (10, (0,), {1: 0}, [[(1, 4, 9), (3, 4, 9)]]),
    "the newest of unequal ones": (9, (0,), {0: 0, 1: 0}, [[(0, 2, 4), (2, 2, 4), (1, 7, 9), (3, 6, 9)]]),
    "one": (1, (0,), {0: 0}, [[(2, 3, 4)]]),
    "other tasks": (30, (0, 1, 2), {0: 2, 1: 0}, [[(1, 0, 9), (3, 0, 9)], None, [(0, 0, 4), (2, 0, 4)]]),
    "an added task": (
        40,
        (0, 1, 2, 2),
        {0: 0, 1: 1},
        [[(0, 0, 4), (2, 0, 4)], [(1, 0, 9), (3, 0, 9)], None, None],
    ),
    "left out": (30, (0,), {1: 0}, [[(1, 0, 9), (3, 0, 9)]]),
}


def loaded(saved: Feed, folder: Path, case: str) -> Feed:
    """The buffer of a case, and what it must hold."""
    capacity, task_ids, tasks, plan = CASES[case]
    feed = filled(capacity, task_ids, 5, observation=saved.observation, extras=saved.extras, seed=11)
    feed.check_sample(1, 3)
    feed.tag += 1000
    feed.buffer.load(folder, tasks=tasks)
    kept = [[row for s, row in saved.stored() if s == stream] for stream in range(4)]
    for stream, parts in enumerate(plan):
        if parts is None:
            continue
        rows = feed.history[stream] = []
        for source, first, end in parts:
            numbers = kept[source][first:end]
            rows += [saved.history[source][number] for number in numbers]
            rows[-len(numbers)] = rows[-len(numbers)]._replace(jumped=True)
        ring = len(feed.cells[stream])
        feed.cells[stream] = [*range(len(rows)), *([None] * (ring - len(rows)))]
        feed.next_cell[stream] = len(rows) % ring
    return feed


@pytest.mark.parametrize("observation", list(OBSERVATIONS))
@pytest.mark.parametrize("case", list(CASES))
def test_saved_tasks_are_dealt_out_over_the_streams_of_others(
    case: str, observation: str, tmp_path: Path
) -> None:
    saved = filled(**SAVED, observation=OBSERVATIONS[observation], extras={"cost": Field((), "bfloat16")})
    saved.buffer.save(tmp_path / "old")
    feed = loaded(saved, tmp_path / "old", case)
    feed.check_content()
    feed.check_content(3, 0.9)
    feed.check_sample(1, 5)
    streams = list(range(len(feed.task_ids)))
    feed.add(streams, [False] * len(streams), [ENDS[0]] * len(streams))  # from where the old ones led
    for stream, parts in enumerate(CASES[case][3]):
        if parts is not None:
            feed.history[stream][-1] = feed.history[stream][-1]._replace(jumped=True)
    feed.check_content(3, 0.9)
    more(feed, 4)
    feed.check_content(3, 0.9)
    feed.buffer.save(tmp_path / "new")
    feed.loaded(tmp_path / "new").check_content(3, 0.9)


def test_episodes_stay_apart_though_one_ended_where_the_next_began(tmp_path: Path) -> None:
    buffers = [ReplayBuffer(20, 1, 1, task_ids=[0] * n) for n in (2, 1)]
    still, no = np.zeros((2, 1)), [False, False]
    for step in range(4):
        if step == 2:
            buffers[0].reset()
        buffers[0].add(still, still, [step, step], no, no, still)
    buffers[0].save(tmp_path)
    buffers[1].load(tmp_path, tasks={0: 0})
    starts = buffers[1].sample_sequences(1, 8).extras["starts"][0]
    assert starts.tolist() == [True, False] * 4


def test_many_rows_are_copied_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "COPY_BYTES", 300)
    saved = filled(**SAVED, observation=Field((3,), stack=2))
    saved.buffer.save(tmp_path)
    loaded(saved, tmp_path, "fewer streams").check_content(3, 0.9)


def test_a_device_takes_saved_tasks_too(tmp_path: Path) -> None:
    saved = filled(**SAVED)
    saved.buffer.save(tmp_path)
    host = loaded(saved, tmp_path, "other tasks")
    device = DeviceReplayBuffer(30, 3, 2, task_ids=[0, 1, 2], seed=11, device="cpu")
    twin = Feed(30, (0, 1, 2), seed=11)
    more(twin, 5, device)
    device.sample(1, 3)
    device.load(tmp_path, tasks={0: 2, 1: 0})
    assert_same_batch(device.all(), host.buffer.all())
    steps = {"n_step": 3, "discount": 0.9}
    assert_same_batch(device.sample(4, 2, **steps), host.buffer.sample(4, 2, **steps))
    more(host, 3, device)
    assert_same_batch(device.all(), host.buffer.all())


def test_a_save_after_such_a_load_is_whole(tmp_path: Path) -> None:
    saved = filled(**SAVED)
    saved.buffer.save(tmp_path / "old")
    feed = filled([12, 30], (0, 1), 5, seed=11)
    feed.buffer.save(tmp_path / "new")
    feed.buffer.load(tmp_path / "old", tasks={0: 0, 1: 1})
    feed.buffer.save(tmp_path / "new")
    assert len(manifest_of(tmp_path / "new")["segments"]) == 1
    again = feed.empty()
    again.load(tmp_path / "new")
    assert_same_batch(again.all(), feed.buffer.all())


@pytest.mark.parametrize(
    ("tasks", "error", "words"),
    [
        ({2: 0}, ValueError, "tasks of the saved replay must lie in 0..1, got 2"),
        ({0: 3}, ValueError, "tasks of this buffer must lie in 0..2, got 3"),
        ({0: -1}, ValueError, "tasks of this buffer must lie in 0..2, got -1"),
        ({}, ValueError, "tasks must map at least one task of the saved replay, got none"),
        ([0], TypeError, "tasks must map saved tasks to tasks of this buffer, got [0]"),
        ({0: 1.5}, TypeError, "tasks must be an integer, got 1.5"),
    ],
)
def test_tasks_that_are_not_there_are_refused(
    tasks: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    filled(**SAVED).buffer.save(tmp_path)
    feed = filled(9, (0, 1, 2), 5)
    with pytest.raises(error, match=says(words)):
        feed.buffer.load(tmp_path, tasks=tasks)
    feed.check_content()


def test_what_does_not_fit_or_is_damaged_is_refused_before_anything_changes(
    tmp_path: Path,
) -> None:
    saved = filled(**SAVED, non_finite="allow")
    saved.buffer.save(tmp_path / "a")
    other = filled(9, (0,), 5, observation=Field((4,)))
    with pytest.raises(ValueError, match=says("observation of the replay ... [4] ... got ... [3]")):
        other.buffer.load(tmp_path / "a", tasks={0: 0})
    other.check_content()
    feed = filled(9, (0,), 5)
    with pytest.raises(ValueError, match=says("same_capacity cannot be asked for with tasks")):
        feed.buffer.load(tmp_path / "a", tasks={0: 0}, same_capacity=True)
    for change in (
        lambda manifest: manifest["fields"].update(task_ids=[0, 1, 0, 3]),
        lambda manifest: manifest["fields"].update(task_ids=[0, 1]),
        lambda manifest: manifest["fields"].update(task_ids="0101"),
        lambda manifest: manifest["content"].update(size=[4, 9, 4]),
    ):
        saved.buffer.save(tmp_path / "b")
        rewrite(tmp_path / "b", change)
        with pytest.raises(ValueError, match=says(f"{tmp_path / 'b'} ... task_ids must")):
            feed.buffer.load(tmp_path / "b", tasks={0: 0})
    added = saved.arguments([0, 1, 2, 3], [True] * 4, [ENDS[0]] * 4)
    added["rewards"][1] = np.nan
    saved.give(added, saved.buffer)
    saved.buffer.save(tmp_path / "c")
    with pytest.raises(ValueError, match=says("rewards of stream 1 that are not finite")):
        feed.buffer.load(tmp_path / "c", tasks={0: 0})
    feed.check_content()


@pytest.mark.parametrize("kind", [ReplayBuffer, functools.partial(DeviceReplayBuffer, device="cpu")])
def test_a_load_into_other_tasks_says_how_it_can_be_done(kind: Any, tmp_path: Path) -> None:
    filled(**SAVED).buffer.save(tmp_path)
    with pytest.raises(ValueError, match=says("task_ids of ... load(folder, tasks={saved task: own task})")):
        kind(9, 3, 2).load(tmp_path)


@pytest.mark.parametrize("room", range(20))
def test_each_stream_keeps_as_many_as_the_others_or_all_that_it_has(
    room: int,
) -> None:
    for sizes in ([4, 9, 4, 9], [0, 3, 1], [7], [5, 5, 5]):
        kept = transfer.newest(sizes, room)
        assert sum(kept) == min(room, sum(sizes))
        cut = [count for count, size in zip(kept, sizes, strict=True) if count < size]
        assert all(max(kept) <= count + 1 for count in cut)
