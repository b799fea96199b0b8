"""Transitions drawn by priority: which ones, how often, with what weights, and what becomes of priorities."""

from __future__ import annotations

import bisect
import itertools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require

from brc_fast import Batch, DeviceReplayBuffer, _core
from brc_fast.replay import Field, ReplayBuffer

require("hypothesis", "scipy")

from refusals import says
from replay_oracle import (
    ENDS,
    Feed,
    Picked,
    arrays_of,
    assert_same,
    assert_same_batch,
    manifest_of,
    wait_until_full,
    word,
    write_manifest,
)
from scipy.stats import chisquare


class Prioritized(Feed):
    """A feed that knows the priority of every transition that it ever gave."""

    def __init__(self, *arguments: Any, alpha: float, **options: Any) -> None:
        super().__init__(*arguments, alpha=alpha, **options)
        self.alpha = alpha
        self.largest = 1.0
        self.priorities: dict[Picked, float] = {}

    def remember(self, added: dict[str, Any]) -> None:
        super().remember(added)
        for stream in added["streams"].tolist():
            self.priorities[stream, len(self.history[stream]) - 1] = self.largest

    def index(self, picked: Picked) -> int:
        return picked[1] * len(self.task_ids) + picked[0]

    def set(self, picked: Sequence[Picked], values: Sequence[float], *others: ReplayBuffer) -> int:
        """Updates them in the buffer and in others, and returns how many are still stored."""
        indices = np.array([self.index(pick) for pick in picked], np.int64)
        given = np.array(values, np.float32)
        numbers = {buffer.update_priorities(indices, given) for buffer in (self.buffer, *others)}
        stored = set(self.stored())
        for pick, value in zip(picked, given.tolist(), strict=True):
            if pick in stored:
                self.priorities[pick] = value
                self.largest = max(self.largest, value)
        assert numbers == {sum(pick in stored for pick in picked)}
        return numbers.pop()

    def shuffle(self, rng: np.random.Generator, *others: ReplayBuffer) -> int:
        """Other priorities for a third of all that were ever given, and none for a few."""
        given = [pick for pick in self.priorities if rng.random() < 1 / 3]
        values = np.exp(2.0 * rng.standard_normal(len(given))) * (rng.random(len(given)) < 0.9)
        return self.set(given, values.tolist(), *others)

    def powers(self) -> dict[Picked, float]:
        """Of all that can be drawn, cell after cell of stream after stream."""
        cells = [(s, number) for s, kept in enumerate(self.cells) for number in kept if number is not None]
        drawn = {pick: self.priorities[pick] for pick in cells}
        return {pick: priority**self.alpha for pick, priority in drawn.items() if priority > 0.0}

    def drawn(self, number: int, batch_size: int) -> list[Picked]:
        """Batch `number`, by the documented random numbers."""
        powers = self.powers()
        picks, ends = list(powers), list(itertools.accumulate(powers.values()))
        bits = [
            (word(self.seed, number, i // 2, 0, i % 2 * 2) << 32)
            | word(self.seed, number, i // 2, 0, i % 2 * 2 + 1)
            for i in range(batch_size)
        ]
        return [picks[bisect.bisect_right(ends, (each >> 11) / 2**53 * ends[-1])] for each in bits]

    def check_priorities(
        self,
        batch_size: int,
        num_batches: int,
        beta: float,
        buffer: ReplayBuffer | None = None,
        **request: Any,
    ) -> Batch:
        """The next batches of the buffer, or of its twin, hold what they must; returns them."""
        batch = (buffer or self.buffer).sample(batch_size, num_batches, beta=beta, **request)
        self.check_drawn(batch, beta, **request)
        if buffer is None:
            self.draws += num_batches
        return batch

    def check_drawn(self, batch: Batch, beta: float, **request: Any) -> None:
        num_batches, batch_size = batch.rewards.shape
        powers = self.powers()
        total, stored = sum(powers.values()), len(self.stored())
        arrays = arrays_of(batch)
        weights = arrays.pop("weights")
        assert (weights.dtype, weights.shape) == (np.float32, (num_batches, batch_size))
        for u in range(num_batches):
            picked = self.drawn(self.draws + u, batch_size)
            assert_same({name: value[u] for name, value in arrays.items()}, self.expected(picked, **request))
            own = np.array([(stored * powers[pick] / total) ** -beta for pick in picked])
            np.testing.assert_allclose(weights[u], own / own.max(), rtol=1e-6)
            assert weights[u].max() == 1.0

    def walk(self, rng: np.random.Generator, *others: ReplayBuffer) -> None:
        """Some streams go on, with ends and jumps."""
        streams = rng.permutation(len(self.task_ids))[: rng.integers(1, len(self.task_ids) + 1)].tolist()
        ends = [ENDS[rng.integers(4)] if rng.random() < 0.2 else ENDS[0] for _ in streams]
        self.add(streams, (rng.random(len(streams)) < 0.1).tolist(), ends, *others)


def prioritized(steps: int = 60, alpha: float = 0.6, seed: int = 3, **options: Any) -> Prioritized:
    """Streams of different capacity, some of which have wrapped, with priorities of all kinds."""
    rng = np.random.default_rng(seed)
    feed = Prioritized([23, 90], (0, 1, 0), alpha=alpha, seed=seed, **options)
    for _ in range(steps):
        feed.walk(rng)
        feed.shuffle(rng)
    return feed


FRAMES: dict[str, Any] = {
    "observation": Field((3,), stack=3),
    "extras": {"cost": Field((), "bfloat16")},
}


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("options", [{}, FRAMES], ids=["rows", "frames"])
def test_the_documented_random_numbers_draw_by_priority(alpha: float, options: dict[str, Any]) -> None:
    """While rings grow and after they have wrapped, for transitions over several steps too."""
    rng = np.random.default_rng(11)
    feed = Prioritized([23, 90], (0, 1, 0), alpha=alpha, seed=7, **options)
    for step in range(70):
        feed.walk(rng)
        if step % 3:
            feed.shuffle(rng)
        if len(feed.stored()) < 7 or not feed.powers():
            continue
        request = {"n_step": 3, "discount": 0.9} if step % 2 else {}
        feed.check_priorities(7, 2, (0.0, 0.4, 1.0)[step % 3], **request)
    assert any(None not in cells for cells in feed.cells)
    assert feed.shuffle(rng) < len(feed.priorities) / 3, "some were overwritten"


def counted(feed: Prioritized, batch: Batch) -> dict[int, int]:
    indices, counts = np.unique(batch.indices.numpy(), return_counts=True)
    return dict(zip(indices.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_share_of_each_transition_is_that_of_its_priority(alpha: float) -> None:
    """Those that were updated, overwritten since, never updated, and of priority zero."""
    feed = prioritized(alpha=alpha, seed=5)
    powers = {feed.index(pick): power for pick, power in feed.powers().items()}
    counts = counted(feed, feed.buffer.sample(20, 10_000, beta=0.4))
    assert counts.keys() <= powers.keys(), "no other one, and none of priority zero"
    assert len(powers) < len(feed.stored())
    rate = 200_000 / sum(powers.values())
    often = {index: power for index, power in powers.items() if power * rate >= 20}
    rest = 200_000 - sum(counts.get(index, 0) for index in often)
    seen, expected = [counts.get(index, 0) for index in often], [rate * power for power in often.values()]
    if len(often) < len(powers):
        seen, expected = [*seen, rest], [*expected, 200_000 - sum(expected)]
    assert chisquare(seen, expected).pvalue > 1e-3


def test_weights_are_those_of_the_paper_in_each_batch() -> None:
    """(n P(i))^-beta by the largest of the batch, in float64, whatever the sizes of priorities."""
    feed = Prioritized(40, alpha=0.7, seed=2)
    for _ in range(40):
        feed.add()
    feed.set(feed.stored(), (10.0 ** np.linspace(-30, 30, 40)).tolist())
    for beta in (0.0, 1e-3, 0.5, 1.0):
        feed.check_priorities(16, 3, beta)
    feed.set(feed.stored(), [0.5] * 40)
    assert torch.equal(feed.buffer.sample(16, 3, beta=1.0).weights, torch.ones(3, 16))


def test_new_transitions_have_the_largest_priority_so_far() -> None:
    feed = Prioritized(4, (0, 0), alpha=1.0, seed=4)
    feed.add()
    feed.set([(0, 0), (1, 0)], [0.25, 0.5])  # the first ones had 1
    feed.add()
    feed.set([(0, 1)], [8.0])
    feed.add()  # replaces the first, and with them no largest one is forgotten
    feed.set([(0, 1)], [0.125])
    feed.add()
    assert [feed.priorities[pick] for pick in feed.stored()] == [8.0] * 4
    assert feed.set([(0, 0), (1, 0)], [1e9, 1e9]) == 0, "what is not stored sets no largest one either"
    feed.add([1])
    assert feed.priorities[1, 4] == 8.0
    feed.check_priorities(4, 50, 0.5)


def test_of_several_updates_of_a_transition_the_last_holds() -> None:
    feed = prioritized()
    pick = feed.stored()[0]
    assert feed.set([pick, feed.stored()[1], pick], [5.0, 1.0, 0.0]) == 3
    feed.check_priorities(9, 30, 0.5)
    assert not (feed.buffer.sample(9, 300, beta=0.5).indices == feed.index(pick)).any()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_indices_may_have_the_shape_in_which_a_batch_has_them(kind: Any) -> None:
    feed = prioritized()
    batch = feed.buffer.sample(5, 2, beta=0.5)
    values = np.linspace(0.1, 1.0, 10, dtype=np.float32).reshape(2, 5)
    assert feed.buffer.update_priorities(kind(batch.indices.numpy()), kind(values)) == 10
    feed.draws += 2
    for index, value in zip(batch.indices.flatten().tolist(), values.ravel().tolist(), strict=True):
        feed.priorities[index % 3, index // 3] = value
    feed.check_priorities(9, 30, 0.5)
    one = batch.indices[0, 0]
    assert feed.buffer.update_priorities(one, torch.tensor(0.5)) == 1
    assert feed.buffer.update_priorities(batch.indices[:0], torch.ones(0, 5)) == 0


def test_without_beta_draws_are_those_of_a_buffer_without_priorities() -> None:
    feed = prioritized()
    for request in ({}, {"n_step": 3, "discount": 0.9}, {"weights": "equal"}, {"tasks": [1]}):
        batch = feed.check_sample(6, 5, **request)
        assert "weights" not in arrays_of(batch)
    assert_same_batch(feed.check_sample(6), prioritized(alpha=2.0).buffer.sample(6, 21).update(20))


def test_batches_are_those_of_single_calls_and_smaller_ones_the_beginnings_of_larger_ones() -> None:
    together, apart, shorter = prioritized(), prioritized().buffer, prioritized().buffer
    batches = together.check_priorities(9, 4, 0.3)
    for u in range(4):
        assert_same_batch(batches.update(u), apart.sample(9, beta=0.3))
    assert torch.equal(shorter.sample(5, 4, beta=0.3).indices, batches.indices[:, :5])
    other = prioritized().buffer.sample(9, 4, beta=0.9)
    assert torch.equal(other.indices, batches.indices), "beta changes the weights alone"


# ---- Taken back, forgotten, read


def test_transitions_keep_their_priorities_where_an_episode_is_taken_back() -> None:
    """They move to other cells then, where the ring had wrapped."""
    rng = np.random.default_rng(4)
    feed = prioritized()
    for _ in range(12):
        for _ in range(rng.integers(1, 9)):
            feed.walk(rng)
        feed.shuffle(rng)
        stream = int(rng.integers(3))
        taken = feed.buffer.discard_episode(stream)
        kept = sorted(number for number in feed.cells[stream] if number is not None)[:-taken]
        for _ in range(taken):
            feed.history[stream].pop()
            del feed.priorities[stream, len(feed.history[stream])]
        feed.cells[stream] = [*kept, *[None] * (feed.rings[stream] - len(kept))]
        feed.next_cell[stream] = len(kept)
        feed.check_priorities(9, 5, 0.5)


def test_whoever_forgets_all_begins_with_the_first_priority() -> None:
    feed = prioritized()
    feed.set(feed.stored()[:1], [1e3])
    feed.buffer.clear()
    fresh = Prioritized([23, 90], (0, 1, 0), alpha=0.6, seed=3)
    fresh.buffer, fresh.draws = feed.buffer, feed.draws
    for _ in range(30):
        fresh.add()
    fresh.check_priorities(9, 3, 0.5)
    fresh.shuffle(np.random.default_rng(5))
    fresh.check_priorities(9, 30, 0.5)


def test_a_whole_data_set_gets_priorities_too() -> None:
    rows = np.arange(300, dtype=np.float32)
    buffer, no = ReplayBuffer(200, 1, 1, alpha=1.0, seed=1), np.zeros(300, bool)
    buffer.extend(rows[:, None], rows[:, None], rows, no, no, rows[:, None] + 1)
    assert buffer.update_priorities(np.arange(300), np.where(rows >= 298, 1.0, 0.0)) == 200
    batch = buffer.sample(50, 4, beta=1.0)
    assert set(batch.indices.unique().tolist()) == {298, 299}
    assert "weights" not in buffer[batch.indices].extras


# ---- Refused


@pytest.mark.parametrize(
    ("indices", "values", "error", "words"),
    [
        ([0, 1], [1.0], ValueError, "priorities must have the shape of indices"),
        ([0, 1], [[1.0, 1.0]], ValueError, "priorities must have the shape of indices"),
        ([0, 1], [1.0, -1e-30], ValueError, "finite and not negative, got -0.000000"),
        ([0, 1], [np.nan, 1.0], ValueError, "finite and not negative, got nan"),
        ([0, 1], [1.0, np.inf], ValueError, "finite and not negative, got inf"),
        ([0, -1], [1.0, 1.0], IndexError, "index -1 is of no transition that was added"),
        ([0, 3 * 10**6], [1.0, 1.0], IndexError, "index 3000000 is of no transition that was added"),
        (
            [0, 2**63 - 1],
            [1.0, 1.0],
            IndexError,
            "index 9223372036854775807 is of no transition that was added",
        ),
    ],
)
def test_updates_that_are_refused_change_nothing(
    indices: list[int], values: Any, error: type[Exception], words: str
) -> None:
    feed = prioritized()
    with pytest.raises(error, match=says(words)):
        feed.buffer.update_priorities(np.array(indices, np.int64), np.array(values, np.float32))
    feed.check_priorities(9, 30, 0.5)
    feed.add()
    feed.check_priorities(9, 30, 0.5)


def test_an_index_is_refused_until_it_is_given_out() -> None:
    feed = prioritized()
    following = len(feed.history[1])
    with pytest.raises(IndexError, match=f"index {following * 3 + 1} is of no transition"):
        feed.buffer.update_priorities(np.array([following * 3 + 1]), np.ones(1, np.float32))
    feed.add([1])
    assert feed.set([(1, following)], [2.0]) == 1


@pytest.mark.parametrize(
    ("indices", "values", "words"),
    [
        ([0.5], [1.0], "indices must be int64, which does not hold 0.5"),
        ([0], [1e39], "priorities must be float32, which does not hold 1e+39"),
        ({0: 1}, [1.0], "indices must be an array, a tensor or a list of int64 numbers, got dict"),
        ([0], "1", "priorities must be an array, a tensor or a list of float32 numbers, got str"),
    ],
)
def test_updates_of_other_types_are_refused(indices: Any, values: Any, words: str) -> None:
    feed = prioritized()
    with pytest.raises(TypeError, match=says(words)):
        feed.buffer.update_priorities(indices, values)
    feed.check_priorities(9, 3, 0.5)


def test_updates_may_come_as_lists_numbers_and_other_floats() -> None:
    feed = prioritized()
    picks = feed.stored()[:4]
    indices = [feed.index(pick) for pick in picks]
    assert feed.buffer.update_priorities(indices[:2], np.array([0.5, 2.0])) == 2
    assert feed.buffer.update_priorities(indices[2], 3.0) == 1
    assert feed.buffer.update_priorities(indices[3:], torch.tensor([4.0]).bfloat16()) == 1
    feed.priorities.update(zip(picks, (0.5, 2.0, 3.0, 4.0), strict=True))
    feed.check_priorities(9, 30, 0.5)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ({"beta": -0.1}, ValueError, "beta must lie in 0..1, got -0.1"),
        ({"beta": 1.1}, ValueError, "beta must lie in 0..1, got 1.1"),
        ({"beta": float("nan")}, ValueError, "beta must lie in 0..1, got nan"),
        ({"beta": "much"}, TypeError, "beta must be a number, got 'much'"),
        ({"beta": 0.5, "tasks": [0]}, ValueError, "leave out tasks and weights"),
        ({"beta": 0.5, "weights": "equal"}, ValueError, "leave out tasks and weights"),
        ({"beta": 0.5, "batch_size": 999}, ValueError, "batch_size 999 exceeds the"),
    ],
)
def test_samples_that_are_refused_count_no_draw(
    request_: dict[str, Any], error: type[Exception], words: str
) -> None:
    feed = prioritized()
    with pytest.raises(error, match=says(words)):
        feed.buffer.sample(**{"batch_size": 4, **request_})
    feed.check_priorities(9, 3, 0.5)


@pytest.mark.parametrize(
    ("alpha", "error", "words"),
    [
        (-0.1, ValueError, "alpha must be finite and not negative, got -0.1"),
        (float("inf"), ValueError, "alpha must be finite and not negative, got inf"),
        (float("nan"), ValueError, "alpha must be finite and not negative, got nan"),
        ([0.6], TypeError, "alpha must be a number, got [0.6]"),
    ],
)
def test_alpha_is_a_number_that_is_not_negative(alpha: Any, error: type[Exception], words: str) -> None:
    for kind, on in ((ReplayBuffer, {}), (DeviceReplayBuffer, {"device": "cpu"})):
        with pytest.raises(error, match=says(words)):
            kind(10, 3, 2, alpha=alpha, **on)


def test_a_buffer_without_alpha_says_what_it_lacks() -> None:
    feed = Feed(9)
    feed.add()
    with pytest.raises(ValueError, match=says("beta draws by priority, which needs ... alpha")):
        feed.buffer.sample(1, beta=0.5)
    with pytest.raises(ValueError, match=says("priorities need ... alpha")):
        feed.buffer.update_priorities(np.zeros(1, np.int64), np.ones(1, np.float32))


def test_priorities_whose_powers_have_no_finite_sum_are_refused() -> None:
    feed = Prioritized(9, alpha=20.0, seed=1)
    feed.add()
    feed.add()
    with pytest.raises(ValueError, match=says("priorities must be at most ... with alpha 20.0")):
        feed.set([(0, 0)], [1e15])
    feed.set([(0, 0), (0, 1)], [1e14, 1e14])
    feed.check_priorities(2, 20, 1.0)
    feed.set([(0, 0), (0, 1)], [1e-30, 1e-30])  # powers too small for a double, but not zero
    assert set(counted(feed, feed.buffer.sample(2, 20, beta=1.0))) == {0, 1}


def test_nothing_is_drawn_where_every_priority_is_zero() -> None:
    feed = prioritized()
    feed.set(feed.stored(), [0.0] * len(feed.stored()))
    with pytest.raises(ValueError, match="every priority is zero"):
        feed.buffer.sample(4, beta=0.5)
    feed.check_sample(4)
    feed.set(feed.stored()[3:4], [1e-30])
    feed.check_priorities(4, 3, 0.5)


# ---- Saved, prefetched, shared


def test_priorities_are_saved_with_what_they_belong_to(tmp_path: Path) -> None:
    """Also by a save that adds nothing, and by one that writes no row anew but the newest."""
    rng = np.random.default_rng(0)
    feed = prioritized(**FRAMES)
    for round_ in range(4):
        feed.buffer.save(tmp_path)
        loaded = feed.empty(seed=99)
        loaded.load(tmp_path)
        feed.check_priorities(9, 3, 0.5, buffer=loaded)
        feed.check_priorities(9, 3, 0.5)
        if round_ == 2:
            feed.walk(rng)
        feed.shuffle(rng)
    assert len(manifest_of(tmp_path)["segments"]) == 4
    feed.buffer.load(tmp_path, previous=True)


def test_a_buffer_that_was_loaded_goes_on_with_its_priorities(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    feed = prioritized()
    feed.set(feed.stored()[:1], [1e3])
    feed.buffer.save(tmp_path)
    twin = feed.empty(seed=99)
    twin.load(tmp_path)
    for _ in range(40):
        feed.walk(rng, twin)
        feed.shuffle(rng, twin)
        feed.check_priorities(9, 1, 0.5, buffer=twin)
        feed.check_priorities(9, 1, 0.5)
    assert feed.largest >= 1e3


@pytest.mark.parametrize("capacity", [[11, 200], [9, 30]])
def test_each_transition_keeps_its_priority_in_another_capacity(capacity: list[int], tmp_path: Path) -> None:
    feed = prioritized()
    feed.buffer.save(tmp_path)
    loaded = feed.loaded(tmp_path, capacity)
    loaded.check_priorities(9, 20, 0.5)
    loaded.add()
    loaded.check_priorities(9, 20, 0.5)


def test_saves_without_priorities_are_loaded_with_all_at_one(tmp_path: Path) -> None:
    plain = Feed([23, 90], (0, 1, 0), seed=3)
    for _ in range(30):
        plain.add()
    plain.buffer.save(tmp_path)
    assert manifest_of(tmp_path)["format"] == 1, "what knows no priorities can read it"
    feed = prioritized()
    feed.buffer.load(tmp_path)
    feed.cells, feed.history, feed.draws, feed.largest = plain.cells, plain.history, plain.draws, 1.0
    feed.priorities = dict.fromkeys(feed.stored(), 1.0)
    feed.check_priorities(9, 20, 0.5)
    feed.buffer.save(tmp_path)
    feed.check_priorities(9, 20, 0.5)


def test_priorities_are_no_hindrance_to_a_buffer_without_them_and_to_another_alpha(tmp_path: Path) -> None:
    feed = prioritized()
    feed.buffer.save(tmp_path)
    assert manifest_of(tmp_path)["format"] == 2
    plain = ReplayBuffer([23, 90], 3, 2, task_ids=(0, 1, 0))
    plain.load(tmp_path)
    feed.alpha = 1.5
    other = ReplayBuffer([23, 90], 3, 2, task_ids=(0, 1, 0), alpha=1.5)
    other.load(tmp_path)
    feed.check_priorities(9, 20, 0.5, buffer=other)
    assert_same_batch(plain.sample(9), feed.buffer.sample(9))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda segment, floats: floats.__setitem__(3, -1.0), "finite and not negative, got -1.0"),
        (lambda segment, floats: floats.__setitem__(0, np.nan), "finite and not negative, got nan"),
        (lambda segment, floats: floats.pop(), "contradicts itself: it has"),
        (lambda segment, floats: floats.append(1.0), "contradicts itself: it has"),
        (lambda segment, floats: segment.pop("priorities"), "longer than its streams"),
        (lambda segment, floats: segment.update(priorities=2**40), "truncated"),
        (lambda segment, floats: segment.update(priorities=-1), "priorities must be"),
    ],
)
def test_priorities_that_cannot_be_are_refused_before_anything_changes(
    harm: Any, words: str, tmp_path: Path
) -> None:
    """With checksums that are right."""
    prioritized().buffer.save(tmp_path)
    manifest = manifest_of(tmp_path)
    segment = manifest["segments"][-1]
    path, count = tmp_path / segment["file"], segment["priorities"]
    content = path.read_bytes()
    rows, floats = content[: -4 * count], np.frombuffer(content[-4 * count :], np.float32).tolist()
    harm(segment, floats)
    content = rows + np.array(floats, np.float32).tobytes()
    path.write_bytes(content)
    changes = {"bytes": len(content), "checksums": [_core.crc32c(content)]}
    if len(floats) != count:
        changes["priorities"] = len(floats)
    segment.update(changes)
    write_manifest(tmp_path, manifest)
    feed = prioritized(40, seed=8)
    with pytest.raises(ValueError, match=says(words)):
        feed.buffer.load(tmp_path)
    feed.check_priorities(9, 3, 0.5)


def test_a_prefetched_batch_is_what_sample_would_return() -> None:
    """Whatever is added, sampled and updated since it was gathered; also where nothing is."""
    rng = np.random.default_rng(2)
    feed = prioritized()
    twin = prioritized()
    with feed.buffer.prefetch(9, 2, beta=0.4, n_step=2, discount=0.9, depth=2) as batches:
        for step in range(60):
            wait_until_full(batches)
            before = batches.regathered
            if step % 3 == 0:
                feed.shuffle(rng, twin.buffer)
            elif step % 3 == 1:
                feed.walk(rng, twin.buffer)
            batch = next(batches)
            assert_same_batch(batch, twin.buffer.sample(9, 2, beta=0.4, n_step=2, discount=0.9))
            feed.check_drawn(batch, 0.4, n_step=2, discount=0.9)
            feed.draws += 2
            if step % 3 == 2:
                assert batches.regathered == before + 18, "it was gathered before the last change"
                assert_same_batch(next(batches), twin.buffer.sample(9, 2, beta=0.4, n_step=2, discount=0.9))
                feed.draws += 2


def test_threads_may_add_sample_and_update_at_once(tmp_path: Path) -> None:
    """Weights and indices belong together, and no priority gets lost."""
    feed = Prioritized([40, 40], (0, 1, 0), alpha=1.0, seed=6)
    for _ in range(40):
        feed.add()
    buffer, over, failed = feed.buffer, threading.Event(), list[BaseException]()

    def until_over(work: Any) -> threading.Thread:
        def run() -> None:
            try:
                while not over.is_set():
                    work()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def learn() -> None:
        batch = buffer.sample(16, 2, beta=1.0)
        assert torch.isfinite(batch.weights).all()
        assert (batch.weights > 0).all()
        buffer.update_priorities(batch.indices, batch.weights + 0.5)

    threads = [until_over(learn), until_over(learn), until_over(lambda: buffer.save(tmp_path))]
    for _ in range(300):
        feed.add()
    over.set()
    for thread in threads:
        thread.join()
    assert not failed
    feed.draws = buffer.draws
    feed.set(feed.stored(), [1.0 + pick[1] % 7 for pick in feed.stored()])
    feed.check_priorities(9, 20, 0.5)


@pytest.mark.parametrize("request_", [{}, {"n_step": 3, "discount": 0.9}])
def test_a_device_buffer_draws_the_same_with_the_same_weights(
    request_: dict[str, Any], tmp_path: Path
) -> None:
    """On a CPU; its rows lie elsewhere, its priorities do not."""
    rng = np.random.default_rng(3)
    feed = Prioritized([23, 90], (0, 1, 0), alpha=0.6, seed=3)
    settings: dict[str, Any] = {"task_ids": (0, 1, 0), "alpha": 0.6, "device": "cpu"}
    device = DeviceReplayBuffer([23, 90], 3, 2, seed=3, **settings)
    for _ in range(20):
        feed.add(None, None, None, device)
    for _ in range(30):
        feed.walk(rng, device)
        feed.shuffle(rng, device)
        expected = feed.check_priorities(9, 2, 0.4, **request_)
        assert_same_batch(device.sample(9, 2, beta=0.4, **request_), expected)
    device.save(tmp_path)
    other = DeviceReplayBuffer([23, 90], 3, 2, seed=9, **settings)
    other.load(tmp_path)
    with other.prefetch(9, 2, beta=0.4, **request_) as batches:
        assert_same_batch(next(batches), feed.check_priorities(9, 2, 0.4, **request_))
    with pytest.raises(IndexError, match="index 999999 is of no transition"):
        device.update_priorities(torch.tensor([999_999]), torch.ones(1))
    assert json.dumps(manifest_of(tmp_path)["segments"][-1]["priorities"]) == str(1 + len(device))
