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
from brc_fast.spec import Field

from .fields import Schema, dlpack
from .request import Size

C_TENSORS = _core.read_tensors(Tensor)  # a torch without that interface is slower here and in `add`
ALIGNMENT = 64
MOST_SHAPES = 8  # sizes of batches, whose memory is kept to be used again
ORDER = ("observations", "next_observations", "rewards", "masks", "task_ids")  # then the fields of a row


def columns(schema: Schema) -> dict[str, Field]:
    """Every column of a batch, in the compiled store's order."""
    observation = Field(schema.observation.stacked_shape, schema.observation.dtype)
    each = (observation, observation, Field(), Field(), Field((), "int64"))
    return {**dict(zip(ORDER, each, strict=True)), **schema.fields}


def batch_of(tensors: Mapping[str, Tensor]) -> Batch:
    """The record of a column each."""
    batch = Batch(*(tensors[name] for name in Batch._fields))
    extras = {name: value for name, value in tensors.items() if name not in Batch._fields}
    return batch.with_extras(extras) if extras else batch


class Lease(NamedTuple):
    """One batch's memory: `views` of `slot` for the store to fill, `batch` on it for the user."""

    views: _core.Views
    slot: _core.Slot
    batch: Batch


def pinned_memory(nbytes: int) -> Tensor:
    """Bytes that a GPU can read while the CPU goes on."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class _Shape:
    """Where the columns of batches of one size lie, and the slots for such batches."""

    def __init__(self, columns: Mapping[str, Field], size: Size) -> None:
        self.names = list(columns)
        self.shapes = [size.shape + field.shape for field in columns.values()]
        self.dtypes = [field.torch_dtype for field in columns.values()]
        self.offsets, self.nbytes = [], 0
        for shape, field in zip(self.shapes, columns.values(), strict=True):
            self.offsets.append(self.nbytes)
            self.nbytes += -(-prod(shape) * field.numpy_dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if self.nbytes > sys.maxsize:
            told = f"{size.num_batches} batches of {size.batch_size}"
            raise MemoryError(f"cannot reserve {self.nbytes} bytes for {told}")
        parts = zip(columns.values(), self.shapes, self.offsets, strict=True)
        self.views = _core.Views(
            [_core.Part(field.numpy_dtype, dlpack(field), shape, offset) for field, shape, offset in parts]
        )
        self.slots: list[_core.Slot] = []
        self.in_batch = itemgetter(*(self.names.index(name) for name in Batch._fields))
        self.further = [name for name in self.names if name not in Batch._fields]

    def in_pinned_memory(self) -> tuple[_core.Slot, list[Tensor]]:
        """A slot of pinned memory, and the columns on it.

        Torch uses it again when the last tensor is gone and all copies that it was asked for are over. It
        knows what a copy reads by the tensor's storage, hence all columns share that of the allocation; of
        pointers, which are all that DLPack and numpy pass on, it would know the first alone.
        """
        memory = pinned_memory(self.nbytes)
        storage, tensors = memory.untyped_storage(), []
        for shape, dtype, offset in zip(self.shapes, self.dtypes, self.offsets, strict=True):
            column = memory.new_empty(0, dtype=dtype)
            tensors.append(column.set_(storage, offset // dtype.itemsize, shape, ()))  # contiguous
        return _core.Slot(memory.numpy()), tensors

    def free(self) -> _core.Slot:
        """A slot that nothing is on, a new one if there is none."""
        for slot in self.slots:
            if not slot.used:
                return slot
        self.slots.append(self.fresh())
        return self.slots[-1]

    def fresh(self) -> _core.Slot:
        return _core.Slot(np.empty(self.nbytes, np.uint8))

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
    """Memory for batches, handed out again when every tensor and array on it is gone.

    Holding a batch is therefore always safe: there will be other memory. Pinned memory is torch's, and kept
    until the copies out of it are over too. Other memory is in slots; of the sizes that were asked for, slots
    of the last few are kept. Safe to use from several threads.
    """

    def __init__(self, schema: Schema, pinned: bool) -> None:
        self.columns = columns(schema)
        self.pinned = pinned
        self._shapes: dict[Size, _Shape] = {}
        self._lock = threading.Lock()

    def lease(self, size: Size, fresh: bool = False) -> Lease:
        """Memory for batches; `fresh` memory is never handed out again."""
        with self._lock:
            shape = self._shape(size)
            if self.pinned and not fresh:
                slot, tensors = shape.in_pinned_memory()
            else:
                slot = shape.fresh() if fresh else shape.free()
                tensors = shape.tensors(slot)
        return Lease(shape.views, slot, shape.batch(tensors))

    def _shape(self, size: Size) -> _Shape:
        shape = self._shapes.pop(size, None) or _Shape(self.columns, size)
        self._shapes[size] = shape  # the last one used comes last
        if len(self._shapes) > MOST_SHAPES:
            del self._shapes[next(iter(self._shapes))]
        return shape
