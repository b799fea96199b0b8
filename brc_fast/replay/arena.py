"""Memory for batches that is used again as soon as nobody holds it."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from brc_fast import _core
from brc_fast.batch import Batch
from brc_fast.spec import Field

from .fields import TOLD, Schema, dlpack
from .request import Size

C_TENSORS = _core.read_tensors(Tensor)  # a torch without that interface is slower here and in `add`
ALIGNMENT = 64
MAPPED = 1 << 16  # bytes of a slot from which on it has pages of its own
MOST_SPARE = 4  # slots of a size that nothing is on, kept to be used again
MOST_SHAPES = 8  # sizes of batches, whose memory is kept to be used again


def columns(schema: Schema, weighted: bool = False) -> list[Field]:
    """Every column of a batch, in the compiled store's order."""
    parts = [Field(field.stacked_shape, field.dtype) for field in schema.parts.values()]
    told = [Field((), dtype) for dtype in TOLD.values()]
    fields = [*schema.fields.values(), *([Field()] if weighted else [])]
    return [*parts, *parts, Field(), Field(), Field((), "int64"), *told, *fields]


def batch_of(schema: Schema, tensors: Sequence[Tensor]) -> Batch:
    """The record of a tensor for each of `columns`."""
    parts = len(schema.parts)
    rewards, masks, task_ids, *others = tensors[2 * parts :]
    told, (actions, *further) = others[: len(TOLD)], others[len(TOLD) :]
    # Weights come last, where there are any.
    extras = dict(zip((*TOLD, *schema.extras, "weights"), (*told, *further), strict=False))
    seen, led = schema.joined(tensors[:parts]), schema.joined(tensors[parts : 2 * parts])
    return Batch(seen, actions, rewards, masks, led, task_ids, extras)


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

    def __init__(self, columns: Sequence[Field], size: Size) -> None:
        self.shapes = [size.shape + field.shape for field in columns]
        self.dtypes = [field.torch_dtype for field in columns]
        self.offsets, self.nbytes = [], 0
        for shape, field in zip(self.shapes, columns, strict=True):
            self.offsets.append(self.nbytes)
            self.nbytes += -(-prod(shape) * field.numpy_dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if self.nbytes > sys.maxsize:
            told = f"{size.num_batches} batches of {size.batch_size}"
            raise MemoryError(f"cannot reserve {self.nbytes} bytes for {told}")
        places = zip(columns, self.shapes, self.offsets, strict=True)
        self.views = _core.Views(
            [_core.View(field.numpy_dtype, dlpack(field), shape, offset) for field, shape, offset in places]
        )
        self.slots: list[_core.Slot] = []

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
        spare = [slot for slot in self.slots if not slot.used]
        if len(spare) > MOST_SPARE:  # many batches were held at once: their memory goes back
            gone = set(map(id, spare[MOST_SPARE:]))
            self.slots = [slot for slot in self.slots if id(slot) not in gone]
        if spare:
            return spare[0]
        # Mapped: what is let go goes back to the system at once, which malloc does not promise.
        memory = mmap.mmap(-1, self.nbytes) if self.nbytes >= MAPPED else bytearray(self.nbytes)
        self.slots.append(_core.Slot(np.frombuffer(memory, np.uint8)))
        return self.slots[-1]

    def fresh(self) -> _core.Slot:
        return _core.Slot(np.empty(self.nbytes, np.uint8))

    def tensors(self, slot: _core.Slot) -> list[Tensor]:
        """The columns on a slot."""
        if C_TENSORS:
            return self.views.tensors(slot)
        arrays = self.views.arrays(slot)
        return [torch.from_numpy(a).view(dtype) for a, dtype in zip(arrays, self.dtypes, strict=True)]


class Arena:
    """Memory for batches, handed out again when every tensor and array on it is gone.

    Holding a batch is therefore always safe: there will be other memory. Pinned memory is torch's, and kept
    until the copies out of it are over too. Other memory is in slots; of the sizes that were asked for, slots
    of the last few are kept. Safe to use from several threads.
    """

    def __init__(self, schema: Schema, pinned: bool) -> None:
        self.schema = schema
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
        return Lease(shape.views, slot, batch_of(self.schema, tensors))

    def _shape(self, size: Size) -> _Shape:
        shape = self._shapes.pop(size, None) or _Shape(columns(self.schema, size.weighted), size)
        self._shapes[size] = shape  # the last one used comes last
        if len(self._shapes) > MOST_SHAPES:
            del self._shapes[next(iter(self._shapes))]
        return shape
