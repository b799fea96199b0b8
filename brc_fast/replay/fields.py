"""What a transition is made of: shapes and dtypes, and the checks of what is stored."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from brc_fast import _core
from brc_fast.batch import Batch

Array = NDArray[Any]
MOST_ROWS = 1 << 29  # of a store, and
MOST_BYTES = 1 << 30  # of a field, as in csrc


class Dtype(NamedTuple):
    """One dtype in torch, in numpy (of the same bytes) and as the compiled store must know it."""

    torch: torch.dtype
    numpy: np.dtype[Any]
    kind: _core.Kind


DTYPES = {
    "float32": Dtype(torch.float32, np.dtype("float32"), _core.Kind.float32),
    "float16": Dtype(torch.float16, np.dtype("float16"), _core.Kind.float16),
    "bfloat16": Dtype(torch.bfloat16, np.dtype("uint16"), _core.Kind.bfloat16),
    **{
        name: Dtype(getattr(torch, name), np.dtype(name), _core.Kind.integer)
        for name in ("uint8", "int8", "int16", "int32", "int64", "bool")
    },
}

DLPACK = {"i": 0, "u": 1, "f": 2, "bfloat": 4, "b": 6}  # its codes of numpy's kinds of dtypes


def integer(name: str, value: object) -> int:
    """`value` as an int; TypeError with its name for what is none."""
    try:
        return int(operator.index(value))  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


@dataclass(frozen=True, init=False)
class Field:
    """Shape and dtype of one value per transition.

        Field((67,))                        # 67 float32, what a plain 67 stands for
        Field((84, 84), "uint8", stack=4)   # camera frames: one is stored, four are returned
        Field((), "int64")                  # a discrete action

    Args:
        shape: of one value; any rank, () for a scalar.
        dtype: float32, float16, bfloat16, uint8, int8, int16, int32, int64 or bool, by name, or as a dtype of
            torch or numpy.
        stack: frames per observation (observations only). The buffer is given the newest frame [*shape] and
            returns [stack, *shape], oldest first; before the first frame of an episode, that frame again.

    Raises:
        TypeError: a size or a stack that is not an integer.
        ValueError: a size or a stack below 1, or another dtype.
    """

    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    stack: int = 1

    def __init__(
        self,
        shape: int | Sequence[int] = (),
        dtype: str | torch.dtype | DTypeLike = "float32",
        stack: int = 1,
    ) -> None:
        if isinstance(dtype, (str, torch.dtype)):
            name = str(dtype).removeprefix("torch.")
        else:
            name = np.dtype(dtype).name
        sizes = shape if isinstance(shape, Iterable) else (shape,)
        whole = tuple(integer("shape", size) for size in sizes)
        stack = integer("stack", stack)
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name}")
        if any(size < 1 for size in whole):
            raise ValueError(f"shape must hold sizes of at least 1, got {list(whole)}")
        if stack < 1:
            raise ValueError(f"stack must be at least 1, got {stack}")
        for attribute, value in (("shape", whole), ("dtype", name), ("stack", stack)):
            object.__setattr__(self, attribute, value)

    @classmethod
    def of(cls, name: str, value: int | Sequence[int] | Field) -> Field:
        """A field from a number of floats, a shape or a field."""
        if isinstance(value, Field):
            return value
        sizes = tuple(value) if isinstance(value, Sequence) else (value,)
        if not all(isinstance(size, (int, np.integer)) for size in sizes):
            raise TypeError(f"{name} must be a number of floats, a shape or a Field, got {value!r}")
        if any(size < 1 for size in sizes):
            raise ValueError(f"{name} must be at least 1, got {value}")
        return cls(tuple(int(size) for size in sizes))

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Of a sampled value."""
        return self.shape if self.stack == 1 else (self.stack, *self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype].torch

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Of the same bytes; numpy has no bfloat16."""
        return DTYPES[self.dtype].numpy

    @property
    def dlpack(self) -> int:
        """The code of its kind of numbers."""
        return DLPACK["bfloat" if self.dtype == "bfloat16" else self.numpy_dtype.kind]

    def native(self, name: str) -> _core.Field:
        """The compiled store's record of it."""
        item = self.numpy_dtype.itemsize
        nbytes = item * prod(self.shape)
        if nbytes > MOST_BYTES:
            raise ValueError(f"{name} must have 1 to {MOST_BYTES} bytes, got {nbytes}")
        return _core.Field(name, nbytes, item, DTYPES[self.dtype].kind)

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {"shape": list(self.shape), "dtype": self.dtype, "stack": self.stack}


@dataclass(frozen=True)
class Spec:
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
    ) -> Spec:
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
        fields = [field.native(name) for name, field in self.fields.items()]
        return _core.Layout(self.observation.native("observations"), fields, self.observation.stack)

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
    return torch.from_numpy(np.array(bytes_of, order="C")).view(DTYPES[dtype].torch)
