"""Offline data sets in a replay buffer: which transitions they make, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from refusals import says

from brc_fast.replay import DeviceReplayBuffer, Field, ReplayBuffer, load_dataset

# how long episodes are and how they end
EPISODES = [
    (4, "terminated"),
    (3, "truncated"),
    (1, "truncated"),
    (1, "terminated"),
    (5, "both"),
    (3, "open"),
]


def episodes(named: bool = False) -> list[dict[str, Any]]:
    """Each with its T + 1 observations, tagged by number."""
    made, tag = [], 0
    for steps, end in EPISODES:
        tags = np.arange(tag, tag + steps + 1, dtype=np.float32)
        seen: Any = np.stack([tags, -tags, tags / 8], 1)
        ends = np.zeros((2, steps), bool)
        ends[:, -1] = end in ("terminated", "both"), end in ("truncated", "both")
        made.append(
            {
                "observations": {"policy": seen, "image": tags.astype(np.uint8)[:, None]} if named else seen,
                "actions": np.stack([tags[:-1] / 64, tags[:-1] / 32], 1),
                "rewards": tags[:-1] * 3,
                "terminations": ends[0],
                "truncations": ends[1],
            }
        )
        tag += steps + 1
    return made


def rows(named: bool = False, successors: bool = True) -> dict[str, Any]:
    """Columns as D4RL has them."""
    each = episodes(named)

    def joined(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: joined([value[name] for value in values]) for name in values[0]}
        return np.concatenate(values)

    def cut(value: Any, rows: slice) -> Any:
        return {name: x[rows] for name, x in value.items()} if isinstance(value, dict) else value[rows]

    columns = {name: joined([one[name] for one in each]) for name in ("actions", "rewards")}
    columns["observations"] = joined([cut(one["observations"], slice(-1)) for one in each])
    if successors:
        columns["next_observations"] = joined([cut(one["observations"], slice(1, None)) for one in each])
    columns["terminals"] = joined([one["terminations"] for one in each])
    columns["timeouts"] = joined([one["truncations"] for one in each])
    return columns


def transitions(buffer: ReplayBuffer) -> list[tuple[float, float, bool, bool]]:
    """Of all that are stored: the tag, where it led (None where that is never used), and its ends."""
    got = buffer.all()
    seen, led = (
        x if isinstance(x, torch.Tensor) else x["policy"] for x in (got.observations, got.next_observations)
    )
    if isinstance(got.observations, dict):
        assert torch.equal(got.observations["image"][:, 0].float(), seen[:, 0])
    assert torch.equal(got.rewards, seen[:, 0] * 3)
    assert torch.equal(got.actions, torch.stack([seen[:, 0] / 64, seen[:, 0] / 32], 1))
    assert torch.equal(seen[:, 1:], torch.stack([-seen[:, 0], seen[:, 0] / 8], 1))
    assert torch.equal(got.masks, 1 - got.terminated.float())
    columns = (seen[:, 0], led[:, 0], got.terminated, got.truncated)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def expected(known: bool) -> list[tuple[float, float, bool, bool]]:
    """With all successors `known`, or those that the next row tells."""
    made, tag = [], 0.0
    for steps, end in EPISODES:
        for step in range(steps):
            last = step + 1 == steps
            flags = last and end in ("terminated", "both"), last and end in ("truncated", "both")
            if known or not last:
                made.append((tag + step, tag + step + 1, *flags))
            elif flags[0]:
                made.append((tag + step, tag + step, *flags))
        tag += steps + 1
    return made


@dataclass
class Episode:
    """As Minari has it."""

    id: int
    observations: Any
    actions: Any
    rewards: Any
    terminations: Any
    truncations: Any
    infos: dict[str, Any] = field(default_factory=dict)


class Minari:
    def __init__(self, each: list[dict[str, Any]]) -> None:
        self.each = each

    def iterate_episodes(self) -> Iterator[Episode]:
        for number, one in enumerate(self.each):
            yield Episode(number, **one)


def buffer_for(named: bool, capacity: int = 100, **options: Any) -> ReplayBuffer:
    observation: Any = {"policy": 3, "image": Field((1,), "uint8")} if named else 3
    return ReplayBuffer(capacity, observation, 2, **options)


class InFile:
    """A column of an HDF5 file: it is sliced, and no array."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.values[key]


def as_file(columns: dict[str, Any]) -> dict[str, Any]:
    return {name: as_file(x) if isinstance(x, dict) else InFile(x) for name, x in columns.items()}


def renamed(terminated: str, truncated: str) -> Any:
    names = {"terminals": terminated, "timeouts": truncated}
    return lambda columns: {names.get(name, name): value for name, value in columns.items()}


FORMS: dict[str, Any] = {
    "d4rl": lambda columns: columns,
    "gymnasium": renamed("terminated", "truncated"),
    "minari's names": renamed("terminations", "truncations"),
    "file": as_file,
    "tensors": lambda columns: torch.utils._pytree.tree_map(torch.from_numpy, columns),
    "numbers": lambda columns: {**columns, "terminals": columns["terminals"].astype(np.float32)},
    "double": lambda columns: {**columns, "rewards": columns["rewards"].astype(np.float64)},
}


@pytest.mark.parametrize("named", [False, True], ids=["array", "dict"])
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("known", [True, False], ids=["successors", "rows"])
def test_a_data_set_makes_the_transitions_that_it_tells(
    named: bool, form: str, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = buffer_for(named, task_ids=[0, 0])
    caplog.set_level(logging.INFO, "brc_fast")
    right = expected(known)
    assert load_dataset(buffer, FORMS[form](rows(named, known)), stream=1) == len(right)
    assert transitions(buffer) == right
    assert set((buffer.indices() % 2).tolist()) == {1}
    left = sum(steps for steps, _ in EPISODES) - len(right)
    assert ("3 of 17 rows were left out" in caplog.text) is (left > 0)


@pytest.mark.parametrize("named", [False, True], ids=["array", "dict"])
def test_a_data_set_of_minari_keeps_every_transition_in_its_episode(named: bool) -> None:
    each = episodes(named)
    for capacity in (100, 6):
        buffer = buffer_for(named, capacity)
        assert load_dataset(buffer, Minari(each)) == 17
        assert transitions(buffer) == expected(True)[-capacity:]


def test_without_flags_of_truncation_the_successors_show_where_an_episode_was_cut() -> None:
    columns = rows()
    del columns["timeouts"]
    buffer = buffer_for(False)
    load_dataset(buffer, columns)
    assert transitions(buffer) == [(*row[:3], False) for row in expected(True)]
    summed = buffer.sample(17, 30, n_step=9, discount=1.0)
    right = {}
    tag = 0
    for steps, _ in EPISODES:
        right |= {float(tag + step): steps - step for step in range(steps)}
        tag += steps + 1
    pairs = zip(summed.observations[..., 0].flatten().tolist(), summed.steps.flatten().tolist(), strict=True)
    assert set(pairs) == set(right.items())


STILL = np.zeros((4, 3), np.float32)  # nothing moves: each episode ends where the next begins


def still(truncated: list[bool], terminated: list[bool] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "observations": STILL,
        "actions": np.zeros((4, 2), np.float32),
        "rewards": np.arange(4, dtype=np.float32),
        "terminals": np.array(terminated or [False] * 4),
        "timeouts": np.array(truncated),
        **more,
    }


@pytest.mark.parametrize("case", ["rows", "minari", "twice", "add", "after adds"])
def test_episodes_never_become_one_though_one_ends_where_the_next_begins(case: str) -> None:
    buffer = buffer_for(False)
    if case == "rows":
        load_dataset(buffer, still([False, True, False, False]))
        right = [True, True]  # rows 0 and 2
    elif case == "minari":
        one = {
            "observations": STILL[:3],
            "actions": np.zeros((2, 2), np.float32),
            "rewards": np.zeros(2, np.float32),
            "terminations": np.zeros(2, bool),
            "truncations": np.zeros(2, bool),
        }
        load_dataset(buffer, Minari([one, one]))
        right = [True, False, True, False]
    elif case == "twice":
        for _ in range(2):
            load_dataset(buffer, still([False] * 4, next_observations=STILL))
        right = [True, False, False, False] * 2
    elif case == "after adds":
        buffer.add(STILL[0], [0.0, 0.0], 9.0, False, False, STILL[0])
        load_dataset(buffer, still([False] * 4, next_observations=STILL))
        right = [True, True, False, False, False]
    else:
        load_dataset(buffer, still([False] * 4, next_observations=STILL))
        buffer.add(STILL[0], [0.0, 0.0], 9.0, False, False, STILL[0])
        right = [True, False, False, False, True]
    assert buffer.sample_sequences(1, len(right)).extras["starts"][0].tolist() == right


@pytest.mark.parametrize("slices", [1, 3])
def test_long_data_sets_are_cut_where_they_should_be(slices: int) -> None:
    """More rows than the store takes at once, with ends on both sides of every border."""
    m = 40_000 * slices // 3
    rng = np.random.default_rng(0)
    ends = rng.random((2, m)) < 0.2
    columns = {
        "observations": np.arange(m, dtype=np.float32)[:, None],
        "actions": np.zeros((m, 1), np.float32),
        "rewards": np.arange(m, dtype=np.float32),
        "terminals": ends[0],
        "timeouts": ends[1],
    }
    unknown = ~ends[0] & (ends[1] | (np.arange(m) == m - 1))
    buffer = ReplayBuffer(m, 1, 1)
    assert load_dataset(buffer, columns) == m - unknown.sum()
    got = buffer.all()
    kept = np.flatnonzero(~unknown)
    assert got.rewards.tolist() == kept.tolist()
    assert got.next_observations[:, 0].tolist() == (kept + ~ends[0][kept]).tolist()
    starts = buffer.sample_sequences(1, len(kept)).extras["starts"][0].numpy()
    before = np.concatenate([[True], (ends[0] | ends[1])[:-1]])[kept]
    assert (starts == before).all()


def test_the_buffers_extras_come_from_the_data_set() -> None:
    cost = np.arange(17, dtype=np.float32)
    buffer = buffer_for(False, extras={"cost": Field()})
    load_dataset(buffer, {**rows(), "cost": cost, "infos/qpos": cost})
    assert buffer.all().extras["cost"].tolist() == cost.tolist()
    for lead in (0, 1):  # with and without the info of the reset
        each = episodes()
        for one in each:
            one["infos"] = {"cost": np.append([0.0] * lead, one["rewards"])}
        buffer = buffer_for(False, extras={"cost": Field()})
        load_dataset(buffer, Minari(each))
        assert torch.equal(buffer.all().extras["cost"], buffer.all().rewards)
    with pytest.raises(ValueError, match=says("the data set has no cost; it has ['actions', ")):
        load_dataset(buffer, rows())
    with pytest.raises(ValueError, match=says("the infos of episode 0 of the data set have no cost")):
        load_dataset(buffer, Minari(episodes()))


def without(name: str) -> Any:
    return lambda columns: columns.pop(name)


def shorter(name: str) -> Any:
    return lambda columns: columns.update({name: columns[name][:-1]})


def spoiled(columns: dict[str, Any]) -> None:
    columns["observations"] = columns["observations"].copy()
    columns["observations"][9, 1] = np.nan


FAULTS: dict[str, tuple[Any, str]] = {
    **{
        f"no {name}": (without(name), f"the data set has no {name}; it has")
        for name in ("observations", "actions", "rewards")
    },
    "no terminals": (without("terminals"), "the data set has no terminated or terminals or terminations"),
    "no timeouts": (without("timeouts"), "the data set has no truncated or timeouts or truncations"),
    **{
        f"short {name}": (shorter(name), f"{name} of the data set must have 17 rows, got shape [16")
        for name in ("observations", "actions", "terminals", "timeouts")
    },
    "short rewards": (shorter("rewards"), "must have 16 rows, got shape [17"),
    "short next_observations": (
        lambda columns: columns.update(next_observations=columns["observations"][:-1]),
        "next_observations of the data set must have 17 rows, got shape [16, 3]",
    ),
    "two ends": (
        lambda columns: columns.update(terminated=~columns["terminals"]),
        "the data set has terminated and terminals, and they differ; leave one out",
    ),
    "wide": (
        lambda columns: columns.update(actions=np.zeros((17, 3), np.float32)),
        "actions must have shape [M, A] = [17, 2], got [17, 3]",
    ),
    "not finite": (spoiled, "observations in row 9 of stream 0 ... must be finite, got nan"),
    "strange flags": (lambda columns: columns.update(terminals=np.full(17, 2)), "terminated must be bool"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_column_that_is_missing_or_wrong_is_named_and_nothing_is_stored(fault: str) -> None:
    change, words = FAULTS[fault]
    buffer = buffer_for(False)
    load_dataset(buffer, rows())
    before = transitions(buffer)
    columns = rows(successors=False)
    change(columns)
    with pytest.raises((ValueError, TypeError), match=says(words)):
        load_dataset(buffer, columns)
    assert transitions(buffer) == before


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminations", "truncations"])
def test_an_episode_of_minari_with_a_wrong_column_is_named(name: str) -> None:
    buffer = buffer_for(False)
    each = episodes()
    if name != "rewards":
        each[1][name] = each[1][name][:-1]
        with pytest.raises(ValueError, match=says(f"{name} of episode 1 of the data set must have ")):
            load_dataset(buffer, Minari(each))
    each = episodes()
    each[2][name] = np.full_like(each[2][name], np.nan, dtype=np.float32)
    with pytest.raises((ValueError, TypeError)):
        load_dataset(buffer, Minari(each))
    assert len(buffer) == 0


def test_what_is_no_data_set_and_a_stream_that_is_not_there_are_refused() -> None:
    buffer = buffer_for(False)
    with pytest.raises(TypeError, match=says("dataset must be a mapping ... got list")):
        load_dataset(buffer, [1, 2])
    with pytest.raises(IndexError, match=says("stream must lie in 0..0, got 1")):
        load_dataset(buffer, rows(), stream=1)
    with pytest.raises(ValueError, match="the data set has no transitions"):
        load_dataset(buffer, Minari([]))
    with pytest.raises(TypeError, match="load_dataset takes a ReplayBuffer, got DeviceReplayBuffer"):
        load_dataset(DeviceReplayBuffer(9, 3, 2, device="cpu"), rows())  # type: ignore[arg-type]
    assert len(buffer) == 0


def test_more_than_fits_is_told(caplog: pytest.LogCaptureFixture) -> None:
    buffer = buffer_for(False, capacity=5)
    assert load_dataset(buffer, rows()) == 17
    assert transitions(buffer) == expected(True)[-5:]
    assert "stream 0 keeps the newest 5 of 17 transitions" in caplog.text


# ---- Rows at once, against row by row


@pytest.mark.parametrize(
    "observation", [1, Field((1,), stack=3), {"a": 1, "b": Field((2,), "uint8")}], ids=str
)
@pytest.mark.parametrize("capacity", [1, 2, 7, 40])
@pytest.mark.parametrize("known", [True, False], ids=["successors", "rows"])
def test_rows_at_once_are_those_that_come_one_by_one(known: bool, capacity: int, observation: Any) -> None:
    """With ends, starts, jumps and observations that repeat; few values, so that jumps are missed if only
    values tell them."""
    rng = np.random.default_rng(capacity)
    whole, single = (ReplayBuffer(capacity, observation, 1, seed=3) for _ in range(2))

    def packed(x: np.ndarray) -> Any:
        return {"a": x, "b": np.repeat(x, 2, 1).astype(np.uint8)} if isinstance(observation, dict) else x

    def row(x: Any, i: int) -> Any:
        return {name: value[i] for name, value in x.items()} if isinstance(x, dict) else x[i]

    for _ in range(40):
        m = int(rng.integers(0, 25))
        seen = rng.integers(0, 3, (m, 1)).astype(np.float32)
        led = np.where(rng.random((m, 1)) < 0.8, np.roll(seen, -1, 0), 1).astype(np.float32)
        terminated, truncated, starts = rng.random((3, m)) < 0.15
        rewards = rng.random(m, np.float32)
        given = (packed(seen), seen, rewards, terminated, truncated)
        stored = whole.extend(*given, packed(led) if known else None, starts=starts)
        lost = np.zeros(m, bool)
        if not known:
            lost = ~terminated & (truncated | np.append(starts[1:], True)[:m])
            led = np.where(terminated[:, None], seen, np.roll(seen, -1, 0))
        assert stored == m - lost.sum()
        for i in range(m):
            if starts[i] or lost[i]:
                single.reset()
            if not lost[i]:
                single.add(row(given[0], i), *(x[i] for x in given[1:]), row(packed(led), i))
        assert whole.jumps == single.jumps
        for got, right in ((whole.all(), single.all()), (sampled(whole), sampled(single))):
            for one, other in zip(got.tensors(), right.tensors(), strict=True):
                assert torch.equal(one, other)
        steps = min(5, len(whole))
        if steps:
            pair = [buffer.sample_sequences(3, steps).extras["starts"] for buffer in (whole, single)]
            assert torch.equal(*pair)


def sampled(buffer: ReplayBuffer) -> Any:
    size = len(buffer)
    return buffer.sample(size, 2, n_step=3, discount=0.5) if size else buffer.all()
