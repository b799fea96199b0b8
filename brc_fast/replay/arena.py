"""Memory for batches that is used again as soon as nobody holds it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brc_fast.batch import Batch

from .fields import Field, Spec

ALIGNMENT = 64
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


@dataclass
class Lease:
    """One batch's memory: `arrays` for the store to fill, `batch` for the user, both on the same bytes."""

    arrays: list[NDArray[Any]]
    batch: Batch
    flat: NDArray[np.uint8]


class _Use:
    """One use of a slot. Arrays made from it, and tensors made from those, keep it alive."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__


class _Slot:
    def __init__(self, nbytes: int, pinned: bool) -> None:
        if pinned:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            self.memory = np.empty(nbytes, np.uint8)
        self.use: weakref.ref[_Use] | None = None

    def take(self) -> NDArray[np.uint8]:
        use = _Use(self.memory)
        self.use = weakref.ref(use)
        return np.asarray(use)  # its base is `use`

    @property
    def free(self) -> bool:
        return self.use is None or self.use() is None


class Arena:
    """Slots for batches [U, B]. A slot is handed out again when every tensor and array on it is gone.

    Holding a batch is therefore always safe: another slot is made instead. Safe to use from several threads.
    """

    def __init__(self, spec: Spec, pinned: bool) -> None:
        self.columns = columns(spec)
        self.pinned = pinned
        self._slots: dict[tuple[int, int], list[_Slot]] = {}
        self._lock = threading.Lock()

    def offsets(self, rows: int) -> tuple[dict[str, int], int]:
        """Where each column of `rows` transitions begins, and the bytes of all."""
        offsets, end = {}, 0
        for name, field in self.columns.items():
            offsets[name] = end
            end += rows * prod(field.shape) * field.numpy_dtype.itemsize
            end = -(-end // ALIGNMENT) * ALIGNMENT
        return offsets, end

    def lease(self, num_batches: int, batch_size: int, fresh: bool = False) -> Lease:
        """Memory for U batches; `fresh` memory is never handed out again."""
        size = (num_batches, batch_size)
        offsets, nbytes = self.offsets(num_batches * batch_size)
        if fresh:
            flat = _Slot(nbytes, False).take()
        else:
            with self._lock:
                slots = self._slots.setdefault(size, [])
                slot = next((slot for slot in slots if slot.free), None)
                if slot is None:
                    slots.append(slot := _Slot(nbytes, self.pinned))
                flat = slot.take()
        arrays, tensors = [], {}
        for name, field in self.columns.items():
            array = np.ndarray(size + field.shape, field.numpy_dtype, flat, offsets[name])
            tensor = torch.from_numpy(array)
            arrays.append(array)
            tensors[name] = tensor.view(torch.bfloat16) if field.dtype == "bfloat16" else tensor
        return Lease(arrays, batch_of(tensors), flat)

    def on_device(self, flat: Tensor, num_batches: int, batch_size: int) -> Batch:
        """A batch from a copy of a slot's bytes on another device."""
        offsets, _ = self.offsets(num_batches * batch_size)
        tensors = {}
        for name, field in self.columns.items():
            shape = (num_batches, batch_size, *field.shape)
            nbytes = prod(shape) * field.numpy_dtype.itemsize
            part = flat[offsets[name] : offsets[name] + nbytes]
            tensors[name] = part.view(field.torch_dtype).view(shape)
        return batch_of(tensors)
