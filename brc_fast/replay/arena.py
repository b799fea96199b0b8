"""Memory for batches that is used again as soon as nobody holds it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from math import prod
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from brc_fast import _core
from brc_fast.batch import Batch

from .fields import Field, Spec

C_TENSORS = _core.read_tensors(Tensor)  # a torch without that interface is slower here and in `add`
ALIGNMENT = 64
MOST_SHAPES = 8  # sizes of batches, whose memory is kept to be used again
ORDER = ("observations", "next_observations", "rewards", "masks", "task_ids")  # then the fields of a row


def columns(spec: Spec) -> dict[str, Field]:
    """Every column of a batch, in the compiled store's order."""
    observation = Field(spec.observation.stacked_shape, spec.observation.dtype)
    each = (observation, observation, Field(), Field(), Field((), "int64"))
    return {**dict(zip(ORDER, each, strict=True)), **spec.fields}


def batch_of(tensors: Mapping[str, Tensor]) -> Batch:
    """The record of a column each."""
    batch = Batch(*(tensors[name] for name in Batch._fields))
    extras = {name: value for name, value in tensors.items() if name not in Batch._fields}
    return batch.with_extras(extras) if extras else batch


class Lease(NamedTuple):
    """One batch's memory: `views` of `slot` for the store to fill, `batch` on them for the user."""

    views: _core.Views
    slot: _core.Slot
    batch: Batch


def _slot(nbytes: int, pinned: bool) -> _core.Slot:
    if pinned:
        return _core.Slot(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy())
    return _core.Slot(np.empty(nbytes, np.uint8))


class _Shape:
    """Where the columns of batches [U, B] lie, and the slots for such batches."""

    def __init__(self, columns: Mapping[str, Field], num_batches: int, batch_size: int) -> None:
        size = (num_batches, batch_size)
        self.names = list(columns)
        self.shapes = [size + field.shape for field in columns.values()]
        self.dtypes = [field.torch_dtype for field in columns.values()]
        self.offsets, self.nbytes = [], 0
        for shape, field in zip(self.shapes, columns.values(), strict=True):
            self.offsets.append(self.nbytes)
            self.nbytes += -(-prod(shape) * field.numpy_dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if self.nbytes > sys.maxsize:
            raise MemoryError(f"cannot reserve {self.nbytes} bytes for {num_batches} batches of {batch_size}")
        parts = zip(columns.values(), self.shapes, self.offsets, strict=True)
        self.views = _core.Views(
            [_core.Part(field.numpy_dtype, field.dlpack, shape, offset) for field, shape, offset in parts]
        )
        self.slots: list[_core.Slot] = []
        self.in_batch = itemgetter(*(self.names.index(name) for name in Batch._fields))
        self.further = [name for name in self.names if name not in Batch._fields]

    def tensors(self, slot: _core.Slot) -> list[Tensor]:
        """The columns on a slot."""
        if C_TENSORS:
            return self.views.tensors(slot)
        arrays = self.views.arrays(slot)
        return [torch.from_numpy(a).view(dtype) for a, dtype in zip(arrays, self.dtypes, strict=True)]

    def batch(self, tensors: list[Tensor]) -> Batch:
        batch = Batch(*self.in_batch(tensors))
        if self.further:
            batch.extras = {name: tensors[self.names.index(name)] for name in self.further}
        return batch


class Arena:
    """Slots for batches. A slot is handed out again when every tensor and array on it is gone.

    Holding a batch is therefore always safe: another slot is made instead. Of the sizes [U, B] that were
    asked for, slots of the last few are kept. Safe to use from several threads.
    """

    def __init__(self, spec: Spec, pinned: bool) -> None:
        self.columns = columns(spec)
        self.pinned = pinned
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._lock = threading.Lock()

    def lease(self, num_batches: int, batch_size: int, fresh: bool = False) -> Lease:
        """Memory for U batches; `fresh` memory is never handed out again."""
        with self._lock:
            shape = self._shape(num_batches, batch_size)
            slot = _slot(shape.nbytes, False) if fresh else self._free(shape)
            tensors = shape.tensors(slot)
        return Lease(shape.views, slot, shape.batch(tensors))

    def on_device(self, memory: Tensor, num_batches: int, batch_size: int) -> Batch:
        """A batch from a copy of a slot's bytes on another device."""
        with self._lock:
            layout = self._shape(num_batches, batch_size)
        tensors = []
        for shape, dtype, offset in zip(layout.shapes, layout.dtypes, layout.offsets, strict=True):
            part = memory[offset : offset + prod(shape) * dtype.itemsize]
            tensors.append(part.view(dtype).view(shape))
        return layout.batch(tensors)

    def _free(self, shape: _Shape) -> _core.Slot:
        for slot in shape.slots:
            if not slot.used:
                return slot
        shape.slots.append(_slot(shape.nbytes, self.pinned))
        return shape.slots[-1]

    def _shape(self, num_batches: int, batch_size: int) -> _Shape:
        size = (num_batches, batch_size)
        shape = self._shapes.pop(size, None) or _Shape(self.columns, num_batches, batch_size)
        self._shapes[size] = shape  # the last one used comes last
        if len(self._shapes) > MOST_SHAPES:
            del self._shapes[next(iter(self._shapes))]
        return shape
