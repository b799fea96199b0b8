"""What a replay buffer must hold and draw: lists of all transitions, and integers that pick from them."""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from brc_fast import _core
from brc_fast.batch import Batch
from brc_fast.replay import Field, Prefetcher, ReplayBuffer
from brc_fast.replay.fields import TOLD
from brc_fast.replay.request import Size

ENDS = [(False, False), (True, False), (False, True), (True, True)]  # terminated, truncated
Arrays = dict[str, np.ndarray]
Manifest = dict[str, Any]
Picked = tuple[int, int]  # stream, number of the transition in it


class Transition(NamedTuple):
    values: Arrays  # observations, actions, extras and successors by name
    reward: np.float32
    terminated: bool
    truncated: bool
    jumped: bool  # its observation is not the successor of the one before

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated


class Feed:
    """Makes tagged transitions for a buffer, remembers them all, and knows which the buffer keeps where."""

    def __init__(
        self,
        capacity: int | Sequence[int],
        task_ids: Sequence[int] = (0,),
        observation: Field = Field((3,)),  # noqa: B008
        action: Field = Field((2,)),  # noqa: B008
        extras: Mapping[str, Field] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.task_ids, self.seed, self.options = list(task_ids), seed, options
        self.observation, self.action, self.extras = observation, action, dict(extras or {})
        named = (
            {f"/{name}": field for name, field in observation.items()}
            if isinstance(observation, dict)
            else None
        )
        self.parts: dict[str, Field] = named or {
            "": observation
        }  # by what follows "observations" in names of values
        self.fields = {
            **{f"observations{part}": field for part, field in self.parts.items()},
            "actions": action,
        }
        self.fields |= self.extras
        self.draws = self.tag = 0
        self.history: list[list[Transition]] = [[] for _ in task_ids]
        self.capacity = capacity
        self.cells: list[list[int | None]] = [[None] * ring for ring in self.rings]
        self.next_cell = [0] * len(self.task_ids)
        self.buffer = self.empty(seed)

    @property
    def rings(self) -> list[int]:
        """Transitions that each stream keeps."""
        capacities = (
            [self.capacity] * len(self.task_ids) if isinstance(self.capacity, int) else list(self.capacity)
        )
        return [math.ceil(capacities[task] / self.task_ids.count(task)) for task in self.task_ids]

    def empty(self, seed: int = 0) -> ReplayBuffer:
        """Another buffer that this one's content fits into."""
        return ReplayBuffer(
            self.capacity,
            self.observation,
            self.action,
            task_ids=self.task_ids,
            extras=self.extras or None,
            seed=seed,
            **self.options,
        )

    def copied(self, capacity: int | Sequence[int] | None = None) -> Feed:
        """What a load into another buffer must lead to; its buffer holds something else until then."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.history = [list(rows) for rows in self.history]
        other.capacity = self.capacity if capacity is None else capacity
        other.cells, other.next_cell = [], []
        for cells, following, ring in zip(self.cells, self.next_cell, other.rings, strict=True):
            if len(cells) != ring:  # numbered anew, oldest first
                kept = sorted(number for number in cells if number is not None)[-ring:]
                cells, following = kept + [None] * (ring - len(kept)), len(kept) % ring
            other.cells.append(list(cells))
            other.next_cell.append(following)
        other.buffer = other.empty(seed=self.seed + 1 & 2**64 - 1)
        streams = list(range(len(self.task_ids)))
        for end in ENDS:
            other.give(self.arguments(streams, [True] * len(streams), [end] * len(streams)), other.buffer)
        return other

    def loaded(
        self, folder: str | os.PathLike[str], capacity: int | Sequence[int] | None = None, **options: Any
    ) -> Feed:
        """A copy whose buffer was loaded from a folder."""
        other = self.copied(capacity)
        other.buffer.load(folder, **options)
        return other

    # ---- Adding

    def tagged(self, field: Field, stream: int) -> np.ndarray:
        """A value of its own for each of the first thousands of tags, exact in every dtype."""
        numbers = np.resize([self.tag % 113, stream, self.tag // 113 % 113], field.shape)
        if field.dtype == "bfloat16":
            return torch.tensor(numbers).to(torch.bfloat16).view(torch.uint16).numpy()
        return (numbers % 2 if field.dtype == "bool" else numbers).astype(field.numpy_dtype)

    def arguments(
        self, streams: Sequence[int], jumps: Sequence[bool], ends: Sequence[tuple[bool, bool]]
    ) -> dict[str, Any]:
        """One transition per stream; it goes on from the last successor unless it jumps elsewhere."""
        following = {f"successors{part}": field for part, field in self.parts.items()}
        every = {**self.fields, **following}
        made: dict[str, list[Any]] = {name: [] for name in every}
        rewards = []
        for stream, jump in zip(streams, jumps, strict=True):
            for name, field in every.items():
                self.tag += 1
                made[name].append(self.tagged(field, stream))
            if not jump and self.history[stream]:
                for part in self.parts:
                    made[f"observations{part}"][-1] = self.history[stream][-1].values[f"successors{part}"]
            rewards.append(self.tag * 0.7)
        arrays = {
            name: np.array(made[name], field.numpy_dtype).reshape(len(streams), *field.shape)
            for name, field in every.items()
        }
        flags = np.array(ends, bool).reshape(-1, 2)
        return {
            "observations": self.packed("observations", arrays),
            "actions": arrays["actions"],
            "rewards": np.array(rewards, np.float32),
            "terminated": flags[:, 0].copy(),
            "truncated": flags[:, 1].copy(),
            "successors": self.packed("successors", arrays),
            "streams": np.array(streams, np.int64),
            **({"extras": {name: arrays[name] for name in self.extras}} if self.extras else {}),
        }

    def packed(self, name: str, values: Mapping[str, Any]) -> Any:
        """An argument of `add` or a column of a batch from its parts."""
        return values[name] if "" in self.parts else {part[1:]: values[name + part] for part in self.parts}

    def unpacked(self, added: dict[str, Any]) -> Arrays:
        """Arguments of `add`, by the names of values."""
        out = {"actions": added["actions"], **added.get("extras", {})}
        for name in ("observations", "successors"):
            out |= {name + part: added[name][part[1:]] if part else added[name] for part in self.parts}
        return out

    def give(self, added: dict[str, Any], *buffers: ReplayBuffer) -> None:
        """Arguments of `add`, with bfloat16 as torch has it."""

        def one(value: Any, field: Any) -> Any:
            if isinstance(value, dict):
                return {name: one(each, field[name]) for name, each in value.items()}
            halves = isinstance(field, Field) and field.dtype == "bfloat16"
            return torch.from_numpy(value).view(torch.bfloat16) if halves else value

        fields = {"observations": self.observation, "successors": self.observation, "actions": self.action}
        fields["extras"] = self.extras
        for buffer in buffers:
            buffer.add(**{name: one(value, fields.get(name)) for name, value in added.items()})

    def remember(self, added: dict[str, Any]) -> None:
        """The buffer has taken these arguments."""
        columns = self.unpacked(added)
        for i, stream in enumerate(added["streams"].tolist()):
            rows = self.history[stream]
            values = {name: column[i].copy() for name, column in columns.items()}
            goes_on = rows and all(
                rows[-1].values[f"successors{part}"].tobytes() == values[f"observations{part}"].tobytes()
                for part in self.parts
            )
            cell = self.next_cell[stream]
            self.cells[stream][cell] = len(rows)
            self.next_cell[stream] = (cell + 1) % len(self.cells[stream])
            flags = bool(added["terminated"][i]), bool(added["truncated"][i])
            rows.append(Transition(values, added["rewards"][i], *flags, not goes_on))

    def add(
        self,
        streams: Sequence[int] | None = None,
        jumps: Sequence[bool] | None = None,
        ends: Sequence[tuple[bool, bool]] | None = None,
        *others: ReplayBuffer,
    ) -> None:
        """To the buffer and to others."""
        streams = list(range(len(self.task_ids))) if streams is None else streams
        added = self.arguments(streams, jumps or [False] * len(streams), ends or [ENDS[0]] * len(streams))
        self.give(added, self.buffer, *others)
        self.remember(added)

    # ---- What it must return

    def stored(self) -> list[Picked]:
        """Stream after stream and oldest first."""
        kept = (sorted(number for number in cells if number is not None) for cells in self.cells)
        return [(stream, number) for stream, numbers in enumerate(kept) for number in numbers]

    def frames(self, stream: int, number: int, count: int, part: str) -> list[np.ndarray]:
        """The observations up to this one; before the first of an episode, that again."""
        rows, out = self.history[stream], []
        for _ in range(count):
            out.insert(0, rows[number].values[f"observations{part}"])
            if number > 0 and not rows[number - 1].ended and not rows[number].jumped:
                number -= 1
        return out

    def steps(self, stream: int, number: int, n_step: int) -> list[Transition]:
        rows = self.history[stream][number : number + n_step]
        for i, row in enumerate(rows):
            if row.ended or (i + 1 < len(rows) and rows[i + 1].jumped):
                return rows[: i + 1]
        return rows

    def expected(self, picked: Sequence[Picked], n_step: int = 1, discount: float | None = None) -> Arrays:
        """The columns of these transitions."""
        powers = [1.0]
        while len(powers) < n_step:
            powers.append(powers[-1] * (1.0 if discount is None else discount))
        fields = {
            name + part: Field(field.stacked_shape, field.dtype)
            for part, field in self.parts.items()
            for name in ("observations", "next_observations")
        }
        fields |= {
            "actions": self.action,
            "rewards": Field(),
            "masks": Field(),
            "task_ids": Field((), "int64"),
        }
        fields |= {name: Field((), dtype) for name, dtype in TOLD.items()} | self.extras
        out: dict[str, list[Any]] = {name: [] for name in fields}
        for stream, number in picked:
            rows = self.steps(stream, number, n_step)
            reward = rows[0].reward
            for power, row in list(zip(powers, rows, strict=False))[1:]:
                reward = np.float32(reward + np.float32(np.float32(power) * row.reward))
            last = number + len(rows) - 1
            for part, field in self.parts.items():
                before = self.frames(stream, last, field.stack - 1, part)
                out[f"observations{part}"].append(self.frames(stream, number, field.stack, part))
                out[f"next_observations{part}"].append([*before, rows[-1].values[f"successors{part}"]])
            out["rewards"].append(reward)
            out["masks"].append(0.0 if rows[-1].terminated else powers[len(rows) - 1])
            out["task_ids"].append(self.task_ids[stream])
            out["terminated"].append(rows[-1].terminated)
            out["truncated"].append(rows[-1].truncated)
            out["steps"].append(len(rows))
            out["indices"].append(number * len(self.task_ids) + stream)
            for name in ("actions", *self.extras):
                out[name].append(rows[0].values[name])
        made = {
            name: np.array(out[name], field.numpy_dtype).reshape(len(picked), *field.shape)
            for name, field in fields.items()
        }
        return made

    def pick(self, number: int, i: int, tasks: set[int]) -> Picked:
        """Element i of batch `number`: the first attempt that names a cell which holds a transition."""
        reach = {}
        for stream, cells in enumerate(self.cells):
            size = sum(cell is not None for cell in cells)
            if size > 0 and self.task_ids[stream] in tasks:
                reach[stream] = min(1 << (size - 1).bit_length(), len(cells))
        streams, ends = list(reach), list(itertools.accumulate(reach.values()))
        for attempt in itertools.count():
            product = word(self.seed, number, i // 4, attempt, i % 4) * ends[-1]
            if product % 2**32 < 2**32 % ends[-1]:
                continue
            member = bisect.bisect_right(ends, product >> 32)
            stream = streams[member]
            kept = self.cells[stream][(product >> 32) - ends[member] + reach[stream]]
            if kept is not None:
                return stream, kept
        raise AssertionError

    def picks(
        self,
        number: int,
        batch_size: int,
        tasks: Sequence[int] | None = None,
        weights: Sequence[float] | str | None = None,
    ) -> list[Picked]:
        """Batch `number`."""
        named = list(range(max(self.task_ids) + 1)) if tasks is None else list(tasks)
        if weights is None:
            groups = [(1.0, set(named))]
        else:
            shares = [1.0] * len(named) if weights == "equal" else list(weights)
            groups = [(share, {task}) for share, task in zip(shares, named, strict=True) if share > 0]
        passed = list(itertools.accumulate(share for share, _ in groups))
        offset = word(self.seed, number, 2**32 - 1, 0) / 2**32
        picked = []
        for i in range(batch_size):
            at = (i + offset) / batch_size * passed[-1]
            group = next((g for g, end in enumerate(passed) if at < end), len(groups) - 1)
            picked.append(self.pick(number, i, groups[group][1]))
        return picked

    # ---- Checks

    def check_content(self, n_step: int = 1, discount: float = 1.0) -> None:
        """Every stored transition, read one by one, is the one that was added."""
        stored = self.stored()
        sizes = np.bincount([stream for stream, _ in stored], minlength=len(self.task_ids))
        assert len(self.buffer) == len(stored)
        assert self.buffer._store.sizes().tolist() == sizes.tolist()
        assert self.buffer.size_per_task.tolist() == np.bincount(self.task_ids, sizes).tolist()
        assert (self.buffer.draws, self.buffer._store.seed) == (self.draws, self.seed)
        assert_same(read_all(self.buffer, n_step, discount), self.expected(stored, n_step, discount))

    def check_sample(self, batch_size: int, num_batches: int | None = None, **request: Any) -> Batch:
        """The sampled transitions are those that the documented random numbers name."""
        batch = self.buffer.sample(batch_size, num_batches, **request)
        self.check_batch(batch, batch_size, num_batches, **request)
        return batch

    def check_batch(
        self,
        batch: Batch,
        batch_size: int,
        num_batches: int | None = None,
        n_step: int = 1,
        discount: float | None = None,
        **spread: Any,
    ) -> None:
        """`batch` is what comes next."""
        sizes = (batch_size,) if num_batches is None else (num_batches, batch_size)
        drawn = num_batches or 1
        numbers = range(self.draws, self.draws + drawn)
        picked = [pick for number in numbers for pick in self.picks(number, batch_size, **spread)]
        expected = self.expected(picked, n_step, discount)
        assert_same(
            arrays_of(batch),
            {name: value.reshape(*sizes, *value.shape[1:]) for name, value in expected.items()},
        )
        self.draws += drawn
        assert self.buffer.draws == self.draws


def filled(
    capacity: int | Sequence[int] = 5, task_ids: Sequence[int] = (0, 1, 0), steps: int = 9, **options: Any
) -> Feed:
    """A buffer whose rings have wrapped, with ends and jumps in it."""
    feed = Feed(capacity, task_ids, **{"seed": 3, **options})
    more(feed, steps)
    return feed


def more(feed: Feed, steps: int, *others: ReplayBuffer) -> None:
    """Further transitions of every stream, with ends and jumps."""
    streams = range(len(feed.task_ids))
    for _ in range(steps):
        step = len(feed.history[0])
        ends = [ENDS[(step + stream) % 7 % 4 if (step + stream) % 3 else 0] for stream in streams]
        feed.add(None, [(step + 2 * stream) % 5 == 0 for stream in streams], ends, *others)


def word(seed: int, draw: int, quad: int, attempt: int, of_quad: int = 0) -> int:
    """One of the four words of a Philox block."""
    counter = (draw % 2**32, draw >> 32, quad, attempt)
    return _core.philox4x32(counter, (seed % 2**32, seed >> 32))[of_quad]


def read_all(buffer: ReplayBuffer, n_step: int = 1, discount: float = 1.0) -> Arrays:
    """Every stored transition, stream after stream and oldest first."""
    lease = buffer._arena.lease(Size(1, len(buffer), (len(buffer),)), fresh=True)
    buffer._store.read(
        buffer._store.indices(), _core.Request(n_step, discount, [], []), lease.views, lease.slot
    )
    return arrays_of(lease.batch)


def arrays_of(batch: Batch) -> Arrays:
    """By name, bfloat16 as its bytes."""
    named = batch.map(lambda x: x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    for name in ("observations", "next_observations"):
        if isinstance(parts := named[name], dict):
            del named[name]
            named |= {f"{name}/{part}": value for part, value in parts.items()}
    return named


def assert_same(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape), name
        if value.tobytes() != expected[name].tobytes():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
            raise AssertionError(f"{name} differs in bits alone")


def assert_same_batch(got: Batch, expected: Batch) -> None:
    assert_same(arrays_of(got), arrays_of(expected))


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened within 20 seconds"
        time.sleep(0.001)


def wait_until_full(batches: Prefetcher) -> None:
    """Until it has gathered all that it can."""
    wait_for(lambda: len(batches._worker.ready) == batches._worker.depth)


# ---- Saved


def saved_twice(folder: Path) -> Feed:
    """A buffer saved in two segments; streams 0 and 2 are full, stream 1 still grows."""
    feed = filled([5, 20], (0, 1, 0), steps=9)
    feed.buffer.save(folder)
    more(feed, 1)
    feed.check_sample(3)
    feed.buffer.save(folder)
    assert len(manifest_of(folder)["segments"]) == 2
    return feed


def manifest_of(folder: Path, name: str = "manifest.json") -> Manifest:
    manifest: Manifest = json.loads((folder / name).read_text())["manifest"]
    return manifest


def write_manifest(folder: Path, manifest: Any) -> None:
    """With a checksum that is right."""
    checksum = zlib.crc32(json.dumps(manifest).encode())
    (folder / "manifest.json").write_text(json.dumps({"checksum": checksum, "manifest": manifest}))


def rewrite(folder: Path, change: Callable[[Manifest], Any]) -> None:
    manifest = manifest_of(folder)
    change(manifest)
    write_manifest(folder, manifest)
