"""Shapes, dtypes and kinds of what passes between environments, replay and agents."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

from brc_fast.errors import InputError

WIDEST = 1e18  # bound of an action: its square is finite in float32
NAMES = ("float32", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool")
# torch's dtype, and numpy's of the same bytes: numpy has no bfloat16
DTYPES: dict[str, tuple[torch.dtype, np.dtype[Any]]] = {
    name: (getattr(torch, name), np.dtype("uint16" if name == "bfloat16" else name)) for name in NAMES
}


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
    def of(cls, name: str, value: Any) -> Field:
        """A field from a number of floats, a shape, a field or a space of Gymnasium."""
        if isinstance(value, Field):
            return value
        if hasattr(value, "contains") and hasattr(value, "dtype") and value.shape is not None:  # a space
            dtype = np.dtype(value.dtype).name
            return cls(value.shape, "float32" if dtype == "float64" else dtype)
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
    def size(self) -> int:
        """Numbers of one value."""
        return prod(self.shape)

    @property
    def is_vector(self) -> bool:
        """Whether it is [size] float32."""
        return (len(self.shape), self.dtype, self.stack) == (1, "float32", 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype][0]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Of the same bytes; numpy has no bfloat16."""
        return DTYPES[self.dtype][1]

    def __str__(self) -> str:
        stack = f" in stacks of {self.stack}" if self.stack > 1 else ""
        return f"{self.dtype} {list(self.shape)}{stack}"

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {"shape": list(self.shape), "dtype": self.dtype, "stack": self.stack}


@dataclass(frozen=True)
class Box:
    """Continuous actions: `size` numbers, float32, each in [low, high]."""

    size: int
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if integer("size", self.size) < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")

    @property
    def field(self) -> Field:
        """One action."""
        return Field((self.size,))

    def __str__(self) -> str:
        return f"{self.size} continuous numbers in [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Discrete:
    """Discrete actions: one integer, int64, in [0, n)."""

    n: int

    def __post_init__(self) -> None:
        if integer("n", self.n) < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")

    @property
    def size(self) -> int:
        """n, the numbers of a one-hot action."""
        return self.n

    @property
    def field(self) -> Field:
        """One action."""
        return Field((), "int64")

    def __str__(self) -> str:
        return f"one of {self.n} discrete choices"


@dataclass(frozen=True)
class Native:
    """One task as its own environment has it, before vectors are padded and actions scaled to [-1, 1].

        Native("gym/Pendulum-v1", (("observation", (3,)),), (-2.0,), (2.0,))

    task:         its name
    observation:  names and shapes of the parts that an observation is made of, in the order in which the
                  policy sees them, flattened, in one vector
    low, high:    bounds of each number of an action
    """

    task: str
    observation: tuple[tuple[str, tuple[int, ...]], ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def plain(cls, task: str, observation_size: int, action_size: int) -> Native:
        """One vector seen, actions in [-1, 1]."""
        ones = (1.0,) * action_size
        return cls(task, (("observation", (observation_size,)),), tuple(-x for x in ones), ones)

    @property
    def observation_size(self) -> int:
        return sum(prod(shape) for _, shape in self.observation)

    @property
    def action_size(self) -> int:
        return len(self.low)

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        seen = [[name, list(shape)] for name, shape in self.observation]
        return {"task": self.task, "observation": seen, "low": list(self.low), "high": list(self.high)}

    @classmethod
    def of(cls, told: Any) -> Native:
        """Of what `describe` gave; ValueError, in one line, for anything else."""
        names = {"task", "observation", "low", "high"}
        if not isinstance(told, dict) or told.keys() != names:
            raise ValueError(f"a task must have {', '.join(sorted(names))}, got {told!r:.60}")
        task, seen, low, high = (told[name] for name in ("task", "observation", "low", "high"))
        if not isinstance(task, str):
            raise ValueError(f"task must be a name, got {task!r:.60}")
        if not (isinstance(seen, list) and seen and all(map(_is_part, seen))):
            raise ValueError(
                f"observation of {task!a:.60} must be [[name, [size, ..]], ..], got {seen!r:.60}"
            )
        bounds = [low, high]
        if not all(isinstance(each, list) and all(type(x) in (int, float) for x in each) for each in bounds):
            raise ValueError(f"low and high of {task!a:.60} must be lists of numbers, got {bounds!r:.60}")
        if len(low) != len(high) or not low:
            raise ValueError(
                f"low and high of {task!a:.60} must have a number for each action, got {len(low)} and "
                f"{len(high)}"
            )
        for number, (least, most) in enumerate(zip(low, high, strict=True)):
            if not -WIDEST <= least < most <= WIDEST:
                raise ValueError(
                    f"action {number} of {task!a:.60} must have low below high, both within {WIDEST:g}, got "
                    f"{least:g} and {most:g}"
                )
        parts = tuple((name, tuple(shape)) for name, shape in seen)
        found = cls(task, parts, tuple(map(float, low)), tuple(map(float, high)))
        if len({name for name, _ in parts}) < len(parts) or not 0 < found.observation_size < 2**31:
            raise ValueError(
                f"observation of {task!a:.60} must have parts of different names, got {seen!r:.60}"
            )
        return found


def _is_part(part: Any) -> bool:
    """Whether it is [name, [size, ..]]."""
    if not (isinstance(part, list) and len(part) == 2 and isinstance(part[0], str)):
        return False
    sizes = part[1]
    return isinstance(sizes, list) and all(type(size) is int and 0 <= size < 2**31 for size in sizes)


@dataclass(frozen=True)
class Spec:
    """What T tasks have in common: their observations and actions, as every slot of an environment gives and
    takes them, a replay stores them and an agent learns from them.

        Spec.vectors(67, 24, ("mjx/HumanoidRun",))
        Spec(Field((84, 84, 3), "uint8"), Discrete(6), ("mine/Pong",))
        Spec(Field((48,)), Box(12), ("mine/Walk",), privileged=Field((123,)))

    observation:  the policy's; float32 vectors of several tasks have the size of the widest
    action:       Box or Discrete
    tasks:        their names, in the order of their ids
    privileged:   what the critic sees beside that, where it sees more than the policy; several tasks have the
                  size of the widest, and one without has zeros
    """

    observation: Field
    action: Box | Discrete
    tasks: tuple[str, ...]
    privileged: Field | None = None

    @classmethod
    def vectors(cls, observation_size: int, action_size: int, tasks: Sequence[str]) -> Spec:
        """O float32 observed, A continuous actions in [-1, 1]."""
        return cls(Field((observation_size,)), Box(action_size), tuple(tasks))

    @classmethod
    def joined(cls, specs: Sequence[Spec], tasks: Sequence[str]) -> Spec:
        """Of tasks side by side: vectors and continuous actions have the size of the widest, all else must be
        equal. InputError names the first two that do not go together."""
        first = specs[0]
        for other in specs[1:]:
            if _kinds(other) != _kinds(first):
                raise InputError(
                    f"{first.tasks[0]} and {other.tasks[0]} cannot be learned together: one has {first}, the "
                    f"other {other}"
                )
        privileged = [spec.privileged for spec in specs if spec.privileged is not None]
        return cls(
            _widest([spec.observation for spec in specs]),
            max((spec.action for spec in specs), key=lambda action: action.size),
            tuple(tasks),
            _widest(privileged) if privileged else None,
        )

    @property
    def privileged_size(self) -> int:
        """P, numbers that the critic alone sees; 0 where it sees what the policy does."""
        return 0 if self.privileged is None else self.privileged.size

    @property
    def fields(self) -> tuple[Field, Field]:
        """An observation and an action, for `ReplayBuffer(capacity, *spec.fields)`. What the critic alone
        sees stands behind what the policy sees, in one vector [O + P]; InputError where either is none."""
        seen = self.observation
        if self.privileged is not None:
            for field in (seen, self.privileged):
                if not field.is_vector:
                    raise InputError(
                        f"observations and privileged ones are kept as one float32 vector, and "
                        f"{self.tasks[0]} has {field}"
                    )
            seen = Field((seen.size + self.privileged.size,))
        return seen, self.action.field

    def vector_sizes(self, agent: str) -> tuple[int, int]:
        """(O, A) for an agent that takes vectors and continuous actions in [-1, 1], and nothing else;
        InputError with the agent's name where the tasks have others."""
        task = self.tasks[0]
        if not isinstance(self.action, Box):
            raise InputError(
                f"{agent} takes continuous actions, and an action of {task} is {self.action}: take the "
                "task's continuous version, or an agent for discrete actions"
            )
        if (self.action.low, self.action.high) != (-1.0, 1.0):
            raise InputError(
                f"{agent} takes actions in [-1, 1], and an action of {task} is {self.action}: scale them in "
                "the environment"
            )
        if not self.observation.is_vector:
            raise InputError(
                f"{agent} takes observations that are float32 vectors, and {task} has {self.observation}: "
                "take the task's version without images, or flatten them with Gymnasium's FlattenObservation"
            )
        if self.privileged is not None and not self.privileged.is_vector:
            raise InputError(
                f"{agent} takes privileged observations that are float32 vectors, and {task} has "
                f"{self.privileged}: leave them out with --env.no-privileged (envs.make: privileged=False)"
            )
        return self.observation.size, self.action.size

    def __str__(self) -> str:
        critic = "" if self.privileged is None else f", privileged {self.privileged}"
        return f"observations {self.observation}{critic} and as an action {self.action}"


def _kinds(spec: Spec) -> tuple[object, ...]:
    """What tasks that are learned together must share."""
    parts = spec.observation, spec.privileged
    seen = tuple("vector" if part is None or part.is_vector else part for part in parts)
    action = spec.action
    return (*seen, (action.low, action.high) if isinstance(action, Box) else action)


def _widest(fields: Sequence[Field]) -> Field:
    return max(fields, key=lambda field: field.size)
