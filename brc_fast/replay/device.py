"""A replay buffer whose transitions lie on a GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brc_fast import _core
from brc_fast.batch import Batch, sent
from brc_fast.spec import Field, integer

from . import files
from .arena import batch_of, columns
from .base import Buffer, require_choices
from .buffer import ReplayBuffer
from .fields import Array, FieldLike, Schema, Values, checked
from .request import Size, exponent
from .turns import Turns

COPY_ROWS = 1 << 16  # rows per copy between device and host
FIRST_SLOTS = 1024  # places for successors kept aside, at first
log = logging.getLogger("brc_fast")


class DeviceReplayBuffer(Buffer):
    """A ReplayBuffer in device memory, with the same contract and, for equal seeds, the same batches.

    Rows lie on the device, what names them on the host: `add` and `sample` launch a few kernels each. `add`
    waits once for the device, to learn where an episode ended and where an observation is not the last
    successor; `sample` never waits. Methods may be called from several threads, and with any CUDA stream
    current: one call after the other works on the transitions, also on the device. While a save or a load
    copies them, the others wait.

        >>> buffer = DeviceReplayBuffer(1_000_000, 67, 24, task_ids=[0] * 1024, device="cuda")
        >>> buffer.add(observations, actions, rewards, terminated, truncated, successors)  # CUDA tensors
        >>> batch = buffer.sample(1024, num_batches=2, reward_scale=scale, dtype=torch.bfloat16)

    Args:
        capacity, observation_size, action_size, task_ids, extras, non_finite, alpha, seed: as for
            ReplayBuffer. Priorities are kept on the host.
        device: where the transitions are kept.

    Its size is logged (logger "brc_fast", level INFO) before it is allocated; `bytes_needed` tells it without
    a buffer.

    Raises:
        ValueError: as ReplayBuffer.
        MemoryError: the device has less memory free; the message holds the numbers.
    """

    _store: _core.DeviceIndex

    def __init__(
        self,
        capacity: int | Sequence[int],
        observation_size: FieldLike | Mapping[str, FieldLike],
        action_size: FieldLike,
        *,
        task_ids: Sequence[int] | Array = (0,),
        extras: Mapping[str, FieldLike] | None = None,
        non_finite: str = "error",
        alpha: float | None = None,
        seed: int = 0,
        device: str | torch.device = "cuda",
    ) -> None:
        from brc_fast.kernels import gather  # brings Triton, where it is installed

        super().__init__(Schema.of(capacity, observation_size, action_size, extras, task_ids))
        require_choices(seed, non_finite)
        self._gather = gather
        self.device = torch.device(device)
        self._allow = non_finite == "allow"
        schema = self.schema
        self._layout = schema.layout()
        tasks = schema.task_ids.tolist()
        stack, self._alpha = self._layout.stack, exponent(alpha)
        self._store = _core.DeviceIndex(list(schema.capacities), tasks, stack, seed, self._alpha)
        self._rows = self._allocate()
        self.device = self._rows.device  # with its index, whichever is current later or in another thread
        self._side = self._empty(FIRST_SLOTS, self._observation_bytes)
        self._weights: dict[tuple[float, ...], Tensor] = {}
        self._turns = Turns(self.device)
        self._whole = True  # False while the rows are not where the index says

    @staticmethod
    def bytes_needed(
        capacity: int | Sequence[int],
        observation_size: FieldLike | Mapping[str, FieldLike],
        action_size: FieldLike,
        *,
        task_ids: Sequence[int] | Array = (0,),
        extras: Mapping[str, FieldLike] | None = None,
    ) -> int:
        """Bytes that such a buffer reserves at first. Nothing is allocated."""
        schema = Schema.of(capacity, observation_size, action_size, extras, task_ids)
        layout = schema.layout()
        index = _core.DeviceIndex(list(schema.capacities), schema.task_ids.tolist(), layout.stack, 0)
        return index.rows * layout.stride

    @property
    def nbytes(self) -> int:
        """Bytes reserved on the device. It doubles what is kept aside when that is full."""
        return self._rows.numel() + self._side.numel()

    def add(
        self,
        observations: Values,
        actions: Array,
        rewards: Array,
        terminated: Array,
        truncated: Array,
        successors: Values,
        streams: Array | None = None,
        extras: Mapping[str, Array] | None = None,
    ) -> None:
        """As ReplayBuffer.add; arguments may lie on any device."""
        ids = self._streams if streams is None else self._host_streams(streams)
        m, schema = len(ids), self.schema
        given = schema.named(actions, extras)
        seen = self._observed("observations", observations, m)
        led = self._observed("successors", successors, m)
        values = {
            name: self._here(name, given[name], "[M, A]" if name == "actions" else "[M, ...]", m, field)
            for name, field in schema.fields.items()
        }
        reward = self._here("rewards", rewards, "[M]", m, Field())
        ends = [
            self._here(name, value, "[M]", m, Field((), "bool"))[:, 0]
            for name, value in (("terminated", terminated), ("truncated", truncated))
        ]
        if m == 0:
            return
        finite = {**seen, **values, "rewards": reward, **led}
        with self._turn():
            heads = np.empty(m, np.int64)
            self._store.heads(ids, heads)
            told = [self._departs(heads, seen), *ends, *(_not_finite(value) for value in finite.values())]
            flags = torch.stack(told).cpu().numpy()  # the only wait
            if not self._allow:
                self._require_finite(ids, dict(zip(finite, flags[3:], strict=True)))

            places = np.empty((3, m), np.int64)
            row, moved, successor = places
            self._grow(self._store.side_size + 2 * m)
            self._whole = False
            self._store.add(ids, flags[0].copy(), flags[1].copy(), flags[2].copy(), row, moved, successor)
            rows = self._index(row)
            for (frames, side), now, following in zip(
                self._parts(), seen.values(), led.values(), strict=True
            ):
                self._move(side, moved, moved >= 0, frames[self._index(row[moved >= 0])])
                frames[rows] = now
                self._move(frames, successor, successor >= 0, following)
                self._move(side, -1 - successor, successor < 0, following)
            for (_, view), value in zip(self._field_views(), values.values(), strict=True):
                view[rows] = value
            self._rewards()[rows] = reward[:, 0]
            self._whole = True

    def reset(self, streams: Array | None = None) -> None:
        """As ReplayBuffer.reset."""
        ids = self._streams if streams is None else self._host_streams(streams)
        with self._turn():
            heads, moved = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
            self._store.heads(ids, heads)
            self._grow(self._store.side_size + len(ids))
            self._whole = False
            self._store.reset(ids, moved)
            for frames, side in self._parts():
                self._move(side, moved, moved >= 0, frames[self._index(heads[moved >= 0])])
            self._whole = True

    def sample(
        self,
        batch_size: int,
        num_batches: int | None = None,
        n_step: int = 1,
        discount: float | None = None,
        tasks: Sequence[int] | None = None,
        weights: Sequence[float] | str | None = None,
        copy: bool = False,
        *,
        beta: float | None = None,
        reward_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Batch:
        """As ReplayBuffer.sample, on the device and always in fresh memory.

        Args:
            batch_size ... copy, beta: as for ReplayBuffer.sample.
            reward_scale: [T] float32; the rewards are divided by the scale of their task.
            dtype: of floating observations and actions, by default as stored: float32, float16 or bfloat16.
        """
        size = Size.of(batch_size, num_batches, weighted=beta is not None)
        request = self._requests(n_step, discount, tasks, weights, beta)
        if reward_scale is not None:
            tasks_known = (len(self.schema.capacities),)
            reward_scale = checked("reward_scale", reward_scale, "[T]", tasks_known, "float32", device=True)
            reward_scale = reward_scale.to(self.device)
        if dtype not in (None, *self._gather.FLOATS):
            raise TypeError(f"dtype must be one of {self._gather.FLOATS}, got {dtype}")
        with self._turn():
            self._require_stored(batch_size)
            if n_step > 1:
                self._watch_steps()
            return self._gathered(request, size, reward_scale, dtype)

    def _read(self, indices: NDArray[np.int64], shape: tuple[int, ...]) -> Batch:
        with self._turn():
            return self._gathered(self._requests.plain, Size(1, indices.size, shape), None, None, indices)

    def _gathered(
        self,
        request: _core.Request,
        size: Size,
        reward_scale: Tensor | None,
        dtype: torch.dtype | None,
        names: NDArray[np.int64] | None = None,
    ) -> Batch:
        n_step, most = len(request.powers), self._layout.stack
        total = size.num_batches * size.batch_size
        numbers = {"steps": n_step, "observations": most, "successors": most}
        numbers |= {"task_ids": 1, "summed": 1, "indices": 1}
        sizes = [total * each for each in numbers.values()]
        plan, masks = self._pinned(sum(sizes), torch.int64), self._pinned(total, torch.float32)
        flags = self._pinned(2 * total, torch.bool)
        where = dict(zip(numbers, np.split(plan.numpy(), np.cumsum(sizes)[:-1]), strict=True))
        where |= {"terminated": flags.numpy()[:total], "truncated": flags.numpy()[total:]}
        weights = self._pinned(total if size.weighted else 0, torch.float32)
        where |= {"masks": masks.numpy(), "weights": weights.numpy()}
        if names is None:
            self._store.plan(request, *size[:2], where)
        else:
            self._store.plan_named(request, names, where)
        steps, seen, led, ids, summed, indices = torch.split(sent(plan, self.device), sizes)
        terminated, truncated = torch.split(sent(flags, self.device), total)
        steps = steps.view(total, n_step)

        def gathered(part: Field, frames: Tensor, side: Tensor, places: Tensor) -> Tensor:
            cast = dtype if part.torch_dtype.is_floating_point else None
            newest = places.view(total, most)[:, most - part.stack :].reshape(-1)
            rows: Tensor = self._gather.gather_rows(frames, newest, side=side, dtype=cast)
            return rows

        parts = list(zip(self.schema.parts.values(), self._parts(), strict=True))
        rewards = self._gather.n_step_rewards(
            self._rewards(),
            steps,
            self._powers(request),
            scale=reward_scale,
            task_ids=None if reward_scale is None else ids,
        )
        first = steps[:, 0].contiguous()
        fields = []
        for (name, view), field in zip(self._field_views(), self.schema.fields.values(), strict=True):
            cast = dtype if name == "actions" and field.torch_dtype.is_floating_point else None
            fields.append(self._gather.gather_rows(view, first, dtype=cast))
        tensors = [
            *(gathered(part, *memory, seen) for part, memory in parts),
            *(gathered(part, *memory, led) for part, memory in parts),
            *(rewards, sent(masks, self.device), ids, terminated, truncated, summed, indices),
            *fields,
            *([sent(weights, self.device)] if size.weighted else []),
        ]
        shapes = [size.shape + field.shape for field in columns(self.schema, size.weighted)]
        return batch_of(self.schema, [x.view(shape) for x, shape in zip(tensors, shapes, strict=True)])

    def prefetch(self, *arguments: Any, depth: int = 2, **settings: Any) -> DevicePrefetcher:
        """The batches that repeated calls of `sample` would return.

        `sample` only queues work on the device, so nothing is gathered in advance, whatever the depth.
        """
        if integer("depth", depth) < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        return DevicePrefetcher(self, arguments, settings)

    def save(self, folder: str | os.PathLike[str], *, previous: str | os.PathLike[str] | None = None) -> None:
        """As ReplayBuffer.save, in the same format. Holds a copy of the buffer in host memory meanwhile."""
        self._turns.require_own_process()
        with self._saving:
            host = self._copied()._store
            self._saved = files.save(host, self.schema, Path(folder), self._saved, previous)

    def load(
        self,
        folder: str | os.PathLike[str],
        *,
        previous: bool = False,
        tasks: Mapping[int, int] | None = None,
    ) -> None:
        """As ReplayBuffer.load, in the same format. Holds a copy of the buffer in host memory meanwhile."""
        self._turns.require_own_process()
        with self._saving:
            other = self._host() if tasks is None else self._copied()
            other.load(folder, previous=previous, tasks=tasks)
            host, self._saved = other._store, None
            slots = torch.from_numpy(host.get_slots(host.slots))  # those in use may be any of them
            with self._turns.turn(self._memory):
                self._grow(len(slots))
                self._whole = False
                self._side[: len(slots), : self._observation_bytes] = slots.to(self.device)
                for first in range(0, self._store.rows, COPY_ROWS):
                    part = self._rows[first : first + COPY_ROWS]
                    part.copy_(torch.from_numpy(host.rows(first, len(part))))
                self._store.adopt(host)
                self._whole = True
            self._saved = other._saved

    # ---- Memory

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._turns.turn(self._memory):
            if not self._whole:
                raise RuntimeError(
                    "an add or a load of this buffer was broken off half-way: load what `save(folder)` has "
                    "kept, or make another buffer"
                )
            yield

    def _memory(self) -> tuple[Tensor, ...]:
        """All on the device that outlives a call."""
        return self._rows, self._side, *self._weights.values()

    @property
    def _observation_bytes(self) -> int:
        return self._layout.observation

    def _allocate(self) -> Tensor:
        rows, stride = self._store.rows, self._layout.stride
        told = f"{rows * stride} bytes for {rows} rows of {stride} bytes on {self.device}"
        log.info("the replay buffer takes %s", told)
        if self.device.type == "cuda":
            free, whole = torch.cuda.mem_get_info(self.device)
            if rows * stride > free:
                raise MemoryError(
                    f"the replay buffer needs {told}, and {free} of {whole} are free; lower capacity"
                )
        return self._empty(rows, stride)

    def _empty(self, rows: int, nbytes: int) -> Tensor:
        stride = -(-nbytes // 64) * 64
        return torch.empty(rows, stride, dtype=torch.uint8, device=self.device)

    def _grow(self, slots: int) -> None:
        """Make place for so many successors kept aside. Slots are used lowest first."""
        if slots > len(self._side):
            side = self._empty(max(slots, 2 * len(self._side)), self._observation_bytes)
            side[: len(self._side)] = self._side
            self._side = side

    def _view(self, rows: Tensor, offset: int, field: Field) -> Tensor:
        """A field of all rows, [R, W]."""
        item = field.numpy_dtype.itemsize
        return rows.view(field.torch_dtype)[:, offset // item : offset // item + prod(field.shape)]

    def _field_views(self) -> Iterator[tuple[str, Tensor]]:
        for (name, field), offset in zip(self.schema.fields.items(), self._layout.offsets, strict=True):
            yield name, self._view(self._rows, offset, field)

    def _rewards(self) -> Tensor:
        return self._rows.view(torch.float32)[:, self._layout.reward // 4]

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each part of an observation what the rows hold and what is kept aside, [.., W]."""
        for field, offset in zip(self.schema.parts.values(), self._layout.parts, strict=True):
            yield self._view(self._rows, offset, field), self._view(self._side, offset, field)

    def _host(self) -> ReplayBuffer:
        """Another one in host memory, empty."""
        schema = self.schema
        return ReplayBuffer(
            schema.capacities,
            schema.observation,
            schema.action,
            task_ids=schema.task_ids,
            extras=schema.extras,
            non_finite="allow" if self._allow else "error",
            alpha=self._alpha,
            seed=self._store.seed,
        )

    def _copied(self) -> ReplayBuffer:
        """Another one in host memory, with the same content and draws."""
        host = self._host()
        with self._turn():
            for first in range(0, self._store.rows, COPY_ROWS):
                part = self._rows[first : first + COPY_ROWS]
                torch.from_numpy(host._store.rows(first, len(part))).copy_(part)
            slots = self._side[: min(self._store.slots, len(self._side)), : self._observation_bytes]
            host._store.put_slots(slots.cpu().contiguous().numpy())
            host._store.adopt(self._store)
        return host

    # ---- Moving values

    def _host_streams(self, streams: Tensor | Array) -> NDArray[np.int64]:
        host = streams.cpu() if isinstance(streams, Tensor) else streams
        ids: NDArray[np.int64] = checked("streams", host, "[M]", (-1,), "int64")
        return ids

    def _here(self, name: str, value: object, label: str, count: int, field: Field) -> Tensor:
        """A checked argument on the device, [M, W]."""
        tensor: Tensor = checked(name, value, label, (count, *field.shape), field.dtype, device=True)
        return sent(tensor, self.device).reshape(count, prod(field.shape))

    def _index(self, values: NDArray[np.int64]) -> Tensor:
        index = self._pinned(len(values), torch.int64)
        index.numpy()[:] = values
        return sent(index, self.device)

    def _pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device="cpu", pin_memory=self.device.type == "cuda")

    def _move(self, to: Tensor, places: NDArray[np.int64], chosen: NDArray[np.bool_], values: Tensor) -> None:
        """Write the rows of `values` that are chosen, or are as many as those, to their places."""
        if not chosen.any():
            return
        picked = values if len(values) == chosen.sum() else values[self._index(np.flatnonzero(chosen))]
        to[self._index(places[chosen])] = picked

    def _observed(self, name: str, values: Values, count: int) -> dict[str, Tensor]:
        """The parts of checked observations on the device, [M, W], by what messages call them."""
        parts = zip(self.schema.parts.items(), self.schema.split(name, values), strict=True)
        called = ((part.replace("observations", name), value, field) for (part, field), value in parts)
        return {part: self._here(part, value, "[M, O]", count, field) for part, value, field in called}

    def _departs(self, heads: NDArray[np.int64], seen: Mapping[str, Tensor]) -> Tensor:
        """Whether an observation has other bits than the last successor, [M]."""
        known = self._index(heads)
        rows = known.clamp(min=0)
        other = torch.zeros_like(known, dtype=torch.bool)
        for (frames, _), now in zip(self._parts(), seen.values(), strict=True):
            # Strides anew: those of a single value may be any, and a view as bytes needs 1.
            last, there = (x.contiguous().as_strided(x.shape, (x.shape[1], 1)) for x in (frames[rows], now))
            other |= (last.view(torch.uint8) != there.view(torch.uint8)).any(1)
        return other & (known >= 0)

    def _require_finite(self, ids: NDArray[np.int64], wrong: Mapping[str, NDArray[np.bool_]]) -> None:
        for name, flags in wrong.items():
            if flags.any():
                stream = ids[flags.argmax()]
                raise ValueError(
                    f"{name} of stream {stream} (task {self.schema.task_ids[stream]}) must be finite, "
                    "got NaN or infinity; nothing was stored"
                )

    def _powers(self, request: _core.Request) -> Tensor:
        powers = tuple(request.powers)
        if powers not in self._weights:
            self._weights[powers] = torch.tensor(powers, dtype=torch.float32, device=self.device)
        return self._weights[powers]


class DevicePrefetcher(Iterator[Batch]):
    """An endless iterator over the batches of a DeviceReplayBuffer."""

    def __init__(self, buffer: DeviceReplayBuffer, arguments: Any, settings: Any) -> None:
        self._buffer: DeviceReplayBuffer | None = buffer
        self._arguments, self._settings = arguments, settings

    def __next__(self) -> Batch:
        if self._buffer is None:
            raise RuntimeError("this prefetcher is closed")
        return self._buffer.sample(*self._arguments, **self._settings)

    def __enter__(self) -> DevicePrefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the buffer go."""
        self._buffer = None


def _not_finite(value: Tensor) -> Tensor:
    """Whether a row holds NaN or infinity, [M]."""
    return (~value.isfinite()).any(1)
