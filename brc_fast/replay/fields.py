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

Array = Any  # a numpy array, a tensor, another library's array, a list or a number
Values = Any  # an Array, or a dict of them
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


# what every batch tells of its transitions, among its extras
TOLD = {"terminated": "bool", "truncated": "bool", "steps": "int64", "indices": "int64"}
FieldLike = int | Sequence[int] | Field


def _named(what: str, fields: Mapping[str, FieldLike]) -> dict[str, Field]:
    if not isinstance(fields, Mapping):
        raise TypeError(f"{what} must map names to fields, got {fields!r}")
    if unnamed := [name for name in fields if not isinstance(name, str)]:
        raise TypeError(f"{what} must be named by strings, got {unnamed[0]!r}")
    return {name: Field.of(name, field) for name, field in fields.items()}


@dataclass(frozen=True)
class Schema:
    """Everything that two buffers must share to hold each other's transitions, but for the capacity."""

    observation: Field | Mapping[str, Field]
    action: Field
    extras: Mapping[str, Field]
    task_ids: NDArray[np.int64]
    capacities: tuple[int, ...]

    @classmethod
    def of(
        cls,
        capacity: int | Sequence[int],
        observation: FieldLike | Mapping[str, FieldLike],
        action: FieldLike,
        extras: Mapping[str, FieldLike] | None,
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
        named = _named("extras", extras or {})
        if taken := sorted(named.keys() & {*Batch._fields, *TOLD, "weights"}):
            raise ValueError(f"extras must have other names than the columns of a batch, got {taken[0]}")
        spaces = getattr(observation, "spaces", observation)  # of Gymnasium's Dict
        first: Field | dict[str, Field]
        if isinstance(spaces, Mapping):
            first = _named("observation_size", spaces)
            if not first:
                raise ValueError("observation_size must name at least one observation, got none")
        else:
            first = Field.of("observation_size", observation)
        second = Field.of("action_size", action)
        for name, field in {"action": second, **named}.items():
            if field.stack != 1:
                raise ValueError(f"stack is for observations only, got {field.stack} for {name}")
        return cls(
            first, second, named, np.ascontiguousarray(ids, np.int64), tuple(int(value) for value in each)
        )

    @property
    def parts(self) -> dict[str, Field]:
        """Of an observation, in the order of a row, by what messages call them."""
        if isinstance(self.observation, Field):
            return {"observations": self.observation}
        return {f"observations[{name!r}]": field for name, field in self.observation.items()}

    def split(self, name: str, value: Any) -> list[Any]:
        """The parts of an argument of `add`, in the order of a row; ValueError for other names."""
        if isinstance(self.observation, Field):
            return [value]
        if not isinstance(value, Mapping):
            raise TypeError(
                f"{name} must be a dict with {list(self.observation)}, got {type(value).__name__}"
            )
        if value.keys() != self.observation.keys():
            raise ValueError(f"{name} must hold {sorted(self.observation)}, got {sorted(map(str, value))}")
        return [value[part] for part in self.observation]

    def joined(self, values: Sequence[Any]) -> Any:
        """A column of a batch from its parts."""
        if isinstance(self.observation, Field):
            return values[0]
        return dict(zip(self.observation, values, strict=True))

    @property
    def fields(self) -> dict[str, Field]:
        """Those beside the observation, in the order of a row."""
        return {"actions": self.action, **self.extras}

    def named(self, actions: Array, extras: Mapping[str, Array] | None) -> dict[str, Array]:
        """Arguments of `add` by the names of `fields`; ValueError for other extras."""
        values = {"actions": actions, **(extras or {})}
        if values.keys() != self.fields.keys():
            raise ValueError(f"extras must hold {sorted(self.extras)}, got {sorted(extras or {})}")
        return values

    def layout(self) -> _core.Layout:
        parts = [(native(name, part), part.stack) for name, part in self.parts.items()]
        return _core.Layout(parts, [native(name, field) for name, field in self.fields.items()])

    def describe(self) -> dict[str, Any]:
        """As JSON, for files."""
        return {
            "observation": self.observation.describe()
            if isinstance(self.observation, Field)
            else {name: field.describe() for name, field in self.observation.items()},
            "action": self.action.describe(),
            "extras": {name: field.describe() for name, field in self.extras.items()},
            "task_ids": self.task_ids.tolist(),
        }


def checked(
    name: str, value: Any, label: str, shape: tuple[int, ...], dtype: str, device: bool = False
) -> Any:
    """`value` with exactly this shape and dtype; -1 allows any length.

    A contiguous numpy array of the same bytes or, with `device`, a tensor that may lie anywhere. Lists,
    numbers and arrays of other libraries are taken, and other dtypes where `cast` finds nothing lost. One
    row may come without its first dimension where `shape` asks for one, or for any number.
    """
    if not isinstance(value, (Tensor, np.ndarray)):
        value = _array(name, value, dtype)
    if isinstance(value, Tensor) and value.device.type != "cpu" and not device:
        raise TypeError(f"{name} must be on the CPU, got {value.device}; copy it with .cpu()")
    if str(value.dtype).removeprefix("torch.") != dtype:
        value = cast(name, value, dtype)
    if shape[0] in (1, -1) and tuple(value.shape) == shape[1:]:
        value = value[None]
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


def _array(name: str, value: object, dtype: str) -> Array:
    """An array of a number, a list or another library's array."""
    try:
        array = np.asarray(value)
    except ValueError:  # of lists of different lengths
        array = np.empty(0, object)
    if isinstance(value, (Mapping, str, bytes)) or not _holds_numbers(array):
        raise TypeError(
            f"{name} must be an array, a tensor or a list of {dtype} numbers, got {type(value).__name__}"
        )
    return array


def _holds_numbers(array: Array) -> bool:
    return array.dtype.kind in "biuf" or array.dtype.name == "bfloat16"


def cast(name: str, value: Tensor | Array, dtype: str) -> Tensor:
    """`value` as another dtype. Floats may be rounded to fewer digits, and nothing else may change:
    TypeError with the first number that would."""
    if isinstance(value, Tensor):
        source, number = value.detach(), not value.is_complex()
    else:
        number = _holds_numbers(value)
        if value.dtype.kind == "u" and value.itemsize > 1:  # torch does not compute with these
            value = value.astype(np.int64 if np.all(value < 2**63) else np.float64)
        if number:
            own = "bfloat16" if value.dtype.name == "bfloat16" else None
            source = (
                as_tensor(value, own)
                if own
                else torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
            )
    if not number:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    target = source.to(DTYPES[dtype][0])
    if source.is_floating_point() and target.is_floating_point():
        lost = source.isfinite() & ~target.isfinite()
    else:
        lost = target.to(source.dtype) != source
    if bool(lost.any()):
        first, kind = source[lost][0].item(), str(source.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be {dtype}, which does not hold {first!r}, got as {kind}")
    return target


def as_tensor(value: Tensor | Array, dtype: str) -> Tensor:
    """A tensor with the values of a numpy array, or the tensor itself."""
    if isinstance(value, Tensor):
        return value.detach()
    bytes_of = value.view(np.uint16) if dtype == "bfloat16" else value
    # A copy: torch takes no array with negative strides, and warns of one that is read-only.
    return torch.from_numpy(np.array(bytes_of, order="C")).view(DTYPES[dtype][0])
