"""What a transition is made of in the store, and the checks of what is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brc_fast import _core
from brc_fast.batch import Batch
from brc_fast.spec import DTYPES, Field

Array = NDArray[Any]
MOST_ROWS = 1 << 29  # of a store, and
MOST_BYTES = 1 << 30  # of a field, as in csrc
DLPACK = {"i": 0, "u": 1, "f": 2, "bfloat": 4, "b": 6}  # its codes of numpy's kinds of dtypes


def native(name: str, field: Field) -> _core.Field:
    """The compiled store's record of a field."""
    kind = getattr(_core.Kind, field.dtype if "float" in field.dtype else "integer")
    item = field.numpy_dtype.itemsize
    nbytes = item * field.size
    if nbytes > MOST_BYTES:
        raise ValueError(f"{name} must have 1 to {MOST_BYTES} bytes, got {nbytes}")
    return _core.Field(name, nbytes, item, kind)


def dlpack(field: Field) -> int:
    """DLPack's code of a field's kind of numbers."""
    return DLPACK["bfloat" if field.dtype == "bfloat16" else field.numpy_dtype.kind]


@dataclass(frozen=True)
class Schema:
    """Everything that two buffers must share to hold each other's transitions, but for the capacity."""

    observation: Field
    action: Field
    extras: Mapping[str, Field]
    task_ids: NDArray[np.int64]
    capacities: tuple[int, ...]

    @classmethod
    def of(
        cls,
        capacity: int | Sequence[int],
        observation: int | Sequence[int] | Field,
        action: int | Sequence[int] | Field,
        extras: Mapping[str, int | Sequence[int] | Field] | None,
        task_ids: Sequence[int] | Array,
    ) -> Schema:
        """From a constructor's arguments; ValueError or TypeError names the one that is wrong."""
        ids = np.asarray(task_ids)
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError(f"task_ids must have shape [N] with N >= 1, got {list(ids.shape)}")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"task_ids must be integers, got {ids.dtype}")
        if not 0 <= ids.min() <= ids.max() < ids.size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"task_ids of {ids.size} streams must lie in 0..{ids.size - 1}, got {wrong}")
        tasks = int(ids.max()) + 1
        each = tuple(capacity) if isinstance(capacity, Sequence) else (capacity,) * tasks
        if not all(isinstance(value, (int, np.integer)) for value in each):
            raise TypeError(f"capacity must be an integer or one for each task, got {capacity!r}")
        if len(each) != tasks:
            raise ValueError(f"capacity must be an integer or one for each of {tasks} tasks, got {len(each)}")
        if max(each) > MOST_ROWS:
            raise ValueError(f"capacity must be at most {MOST_ROWS}, got {max(each)}")
        if extras is not None and not isinstance(extras, Mapping):
            raise TypeError(f"extras must map names to fields, got {extras!r}")
        if unnamed := [name for name in extras or {} if not isinstance(name, str)]:
            raise TypeError(f"extras must be named by strings, got {unnamed[0]!r}")
        named = {name: Field.of(name, field) for name, field in (extras or {}).items()}
        first, second = Field.of("observation_size", observation), Field.of("action_size", action)
        if taken := sorted(named.keys() & set(Batch._fields)):
            raise ValueError(f"extras must have other names than the columns of a batch, got {taken[0]}")
        for name, field in {"action": second, **named}.items():
            if field.stack != 1:
                raise ValueError(f"stack is for observations only, got {field.stack} for {name}")
        return cls(
            first, second, named, np.ascontiguousarray(ids, np.int64), tuple(int(value) for value in each)
        )

    @property
    def fields(self) -> dict[str, Field]:
        """Those beside the observation, in the order of a row."""
        return {"actions": self.action, **self.extras}

    def layout(self) -> _core.Layout:
        fields = [native(name, field) for name, field in self.fields.items()]
        return _core.Layout(native("observations", self.observation), fields, self.observation.stack)

    def describe(self) -> dict[str, Any]:
        """As JSON, for files."""
        return {
            "observation": self.observation.describe(),
            "action": self.action.describe(),
            "extras": {name: field.describe() for name, field in self.extras.items()},
            "task_ids": self.task_ids.tolist(),
        }


def checked(
    name: str, value: object, label: str, shape: tuple[int, ...], dtype: str, device: bool = False
) -> Any:
    """`value` with exactly this shape and dtype; -1 allows any length.

    A contiguous numpy array of the same bytes or, with `device`, a tensor that may lie anywhere.
    """
    if not isinstance(value, (Tensor, np.ndarray)):
        raise TypeError(f"{name} must be a torch tensor or a numpy array, got {type(value).__name__}")
    got = str(value.dtype).removeprefix("torch.")
    if got != dtype:
        remedy = f".to(torch.{dtype})" if isinstance(value, Tensor) else f'.astype("{dtype}")'
        raise TypeError(f"{name} must be {dtype}, got {got}; convert it with {remedy}")
    if isinstance(value, Tensor) and value.device.type != "cpu" and not device:
        raise TypeError(f"{name} must be on the CPU, got {value.device}; copy it with .cpu()")
    if tuple(value.shape) != shape:
        wanted = tuple(size if want == -1 else want for want, size in zip_longest(shape, value.shape))
        if tuple(value.shape) != wanted:
            sizes = ", ".join("any" if want == -1 else str(want) for want in shape)
            raise ValueError(f"{name} must have shape {label} = [{sizes}], got {list(value.shape)}")
    if device:
        return as_tensor(value, dtype)
    if isinstance(value, Tensor):
        value = value.detach().resolve_neg()
        value = value.view(torch.uint16).numpy() if dtype == "bfloat16" else value.numpy()
    elif dtype == "bfloat16":  # of ml_dtypes, JAX's numpy dtype
        value = value.view(np.uint16)
    return np.require(value, requirements=["C", "ALIGNED"])


def as_tensor(value: Tensor | Array, dtype: str) -> Tensor:
    """A tensor with the values of a numpy array, or the tensor itself."""
    if isinstance(value, Tensor):
        return value.detach()
    bytes_of = value.view(np.uint16) if dtype == "bfloat16" else value
    # A copy: torch takes no array with negative strides, and warns of one that is read-only.
    return torch.from_numpy(np.array(bytes_of, order="C")).view(DTYPES[dtype][0])
