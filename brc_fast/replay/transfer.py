"""What was saved of some tasks, in a buffer of other tasks or other numbers of streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from brc_fast.batch import Batch
from brc_fast.spec import integer

from . import files
from .fields import Schema

if TYPE_CHECKING:
    from .buffer import ReplayBuffer

COPY_BYTES = 1 << 25  # read at once


class Part(NamedTuple):
    """Transitions of a saved stream, in order."""

    stream: int
    first: int
    end: int


Change = Callable[[Batch], Batch]


def load_changed(
    folder: Path, sizes: tuple[int, int], buffer: ReplayBuffer, tasks: Mapping[int, int], change: Change
) -> None:
    """`buffer.load(folder, tasks=tasks)` of a replay with vectors of other sizes, O and A.

    change: makes transitions [M, ..] of those sizes such as this buffer takes. ValueError as `load`.
    """
    theirs = files.saved_schema(Schema.of(1, *sizes, None, (0,)), folder, previous=False)
    known = require_tasks(tasks, theirs, buffer.schema)
    saved = type(buffer)(theirs.capacities, *sizes, task_ids=theirs.task_ids)
    saved.load(folder)
    transfer(saved, buffer, known, change)


def transfer(
    saved: ReplayBuffer,
    buffer: ReplayBuffer,
    tasks: Mapping[int, int],
    change: Change = lambda batch: batch,
) -> None:
    """Replace what `buffer` holds of the tasks that `tasks` maps to by what `saved` holds of those mapped."""
    own, theirs = buffer.schema.task_ids, saved.schema.task_ids
    sizes, capacities = saved._store.sizes(), buffer._store.capacities()
    offsets, names = np.cumsum(sizes) - sizes, saved._store.indices()
    for target in dict.fromkeys(tasks.values()):
        streams = np.flatnonzero(own == target)
        sources = [int(s) for task in tasks if tasks[task] == target for s in np.flatnonzero(theirs == task)]
        buffer._store.clear_streams(streams)
        plan = dealt([int(sizes[s]) for s in sources], len(streams), int(capacities[streams[0]]))
        for stream, parts in zip(streams.tolist(), plan, strict=True):
            for part in parts:
                offset = offsets[sources[part.stream]]
                copy(saved, names[offset + part.first : offset + part.end], buffer, stream, change)
        buffer._store.reset(streams)


def require_tasks(tasks: Any, saved: Schema, own: Schema) -> dict[int, int]:
    """The tasks as integers; ValueError or TypeError for those that one of the buffers does not have."""
    if not isinstance(tasks, Mapping):
        raise TypeError(f"tasks must map saved tasks to tasks of this buffer, got {tasks!r:.60}")
    known = {integer("tasks", one): integer("tasks", other) for one, other in tasks.items()}
    for numbers, schema, whose in ((known, saved, "the saved replay"), (known.values(), own, "this buffer")):
        most = len(schema.capacities) - 1
        if wrong := [number for number in numbers if not 0 <= number <= most]:
            raise ValueError(f"tasks of {whose} must lie in 0..{most}, got {wrong[0]}")
    if not known:
        raise ValueError("tasks must map at least one task of the saved replay, got none")
    return known


def dealt(sizes: Sequence[int], streams: int, capacity: int) -> list[list[Part]]:
    """Which parts of saved streams each of `streams` takes, whole ones where they fit.

    Else all are laid end to end and cut into equal lengths, of each its newest transitions where even those
    do not fit.
    """
    plan: list[list[Part]] = [[] for _ in range(streams)]
    loads = [0] * streams
    for source, size in enumerate(sizes):
        least = loads.index(min(loads))
        loads[least] += size
        plan[least] += [Part(source, 0, size)] if size else []
    if max(loads) <= capacity:
        return plan
    kept = newest(sizes, streams * capacity)
    ends = np.cumsum(kept)
    borders = [int(ends[-1]) * k // streams for k in range(streams + 1)]
    for k in range(streams):
        plan[k] = []
        for source, (size, count, end) in enumerate(zip(sizes, kept, ends.tolist(), strict=True)):
            begin = end - count
            low, high = max(borders[k], begin), min(borders[k + 1], end)
            if low < high:
                plan[k].append(Part(source, size - count + low - begin, size - count + high - begin))
    return plan


def newest(sizes: Sequence[int], room: int) -> list[int]:
    """How many of each to keep so that `room` is full, the same number of each that has as many."""
    kept = [0] * len(sizes)
    for done, source in enumerate(sorted(range(len(sizes)), key=lambda source: sizes[source])):
        kept[source] = min(sizes[source], (room - sum(kept)) // (len(sizes) - done))
    return kept


def copy(
    saved: ReplayBuffer, names: NDArray[np.int64], buffer: ReplayBuffer, stream: int, change: Change
) -> None:
    """Append the transitions of these names, which followed each other, to a stream; the first begins an
    episode."""
    schema = buffer.schema
    fields = (*schema.parts.values(), *schema.parts.values(), *schema.fields.values())
    most = max(
        1, COPY_BYTES // sum(prod(field.stacked_shape) * field.numpy_dtype.itemsize for field in fields)
    )
    for first in range(0, len(names), most):
        some = names[first : first + most]
        batch, starts = change(saved[some]), saved._store.begins(some).view(bool)
        starts[0] |= first == 0
        buffer.extend(
            newest_frames(schema, batch.observations),
            batch.actions,
            batch.rewards,
            batch.terminated,
            batch.truncated,
            newest_frames(schema, batch.next_observations),
            stream,
            {name: batch.extras[name] for name in schema.extras},
            starts,
        )


def newest_frames(schema: Schema, observations: Any) -> Any:
    """What `add` takes of what a sample returns."""
    parts = zip(schema.parts.values(), schema.split("observations", observations), strict=True)
    return schema.joined([value if field.stack == 1 else value[:, -1] for field, value in parts])
