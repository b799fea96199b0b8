"""Where transitions wait to be sampled: the typed face of the store in csrc/replay_store.hpp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _core
from .batch import Batch

Array = NDArray[Any]


class ReplayBuffer:
    """Keeps the newest transitions of N environment slots and samples them uniformly.

    A slot is called a stream here: its transitions are stored in the order in which they come, and each
    stream belongs to one task. Every observation is kept once: the successor of a transition is the stream's
    next observation. Where an episode ends, or the next observation differs from the successor, the successor
    is kept aside, so that a sampled pair is always one that was added.

        >>> buffer = ReplayBuffer(1_000_000, observation_size=67, action_size=24, task_ids=[0] * 64)
        >>> buffer.add(observations, actions, step.rewards, step.terminated, step.truncated, step.successors)
        >>> batch = buffer.sample(1024, num_batches=2)  # a Batch of CPU tensors, observations [2, 1024, 67]

    Args:
        capacity: transitions kept per task, not in total. A task with n streams keeps the newest
            ceil(capacity / n) of each, so up to n - 1 more than asked for: see `capacity_per_task`.
        observation_size, action_size: O and A, floats per observation and per action.
        task_ids: the task of every stream, N integers that name each of 0..T-1. Tasks may differ in streams.
        seed: 0..2**64-1. Equal seeds and equal calls give equal samples.

    Memory is reserved here (`nbytes`) and taken up as the buffer fills. Calls from several threads run one
    after the other.

    Raises:
        ValueError: a size below 1, a seed out of range, a task without streams, more than 2**29 rows.
        MemoryError: the system cannot reserve the memory; the message holds the sizes.
    """

    def __init__(
        self,
        capacity: int,
        observation_size: int,
        action_size: int,
        *,
        task_ids: Sequence[int] | Array = (0,),
        seed: int = 0,
    ) -> None:
        ids = np.asarray(task_ids)
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError(f"task_ids must have shape [N] with N >= 1, got {list(ids.shape)}")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"task_ids must be integers, got {ids.dtype}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie in 0..2**64-1, got {seed}")
        self._task_ids = np.ascontiguousarray(ids, dtype=np.int64)
        self._streams = np.arange(ids.size, dtype=np.int64)
        self._store = _core.ReplayStore(capacity, observation_size, action_size, self._task_ids, seed)
        self._capacity = capacity
        self._observation_size = observation_size
        self._action_size = action_size

    def __len__(self) -> int:
        """Transitions stored, over all tasks."""
        return self._store.size

    @property
    def capacity(self) -> int:
        """Transitions per task, as asked for."""
        return self._capacity

    @property
    def capacity_per_task(self) -> NDArray[np.int64]:
        """Transitions that fit, [T]: n * ceil(capacity / n) for a task with n streams."""
        return self._per_task(self._store.capacities())

    @property
    def size_per_task(self) -> NDArray[np.int64]:
        """Transitions stored, [T]."""
        return self._per_task(self._store.sizes())

    @property
    def num_streams(self) -> int:
        """N."""
        return self._streams.size

    @property
    def nbytes(self) -> int:
        """Bytes reserved. It grows by about 2 MB at a time with the successors that are kept aside."""
        return self._store.nbytes

    @property
    def draws(self) -> int:
        """Batches sampled so far; `sample(batch_size, U)` counts U. It and the seed decide the next draw."""
        return self._store.draws

    def add(
        self,
        observations: Tensor | Array,
        actions: Tensor | Array,
        rewards: Tensor | Array,
        terminated: Tensor | Array,
        truncated: Tensor | Array,
        successors: Tensor | Array,
        streams: Tensor | Array | None = None,
    ) -> None:
        """Appends one transition to every stream, or to those that `streams` names.

        ============ ======== ======= ================================================================
        argument     shape    dtype   meaning
        ============ ======== ======= ================================================================
        observations [M, O]   float32 what the policy saw
        actions      [M, A]   float32 what it did
        rewards      [M]      float32 raw
        terminated   [M]      bool    the task ended: no return comes after
        truncated    [M]      bool    the episode was cut, for example by a time limit
        successors   [M, O]   float32 where the action led; after an end not the first of the next episode
        streams      [M]      int64   distinct streams, each below N; all N in order where it is None
        ============ ======== ======= ================================================================

        Arguments are CPU tensors or numpy arrays and are copied. When one is refused, nothing is stored.

        Raises:
            TypeError: another type, dtype or device; nothing is cast.
            ValueError: another shape, a value that is not finite, a stream that is unknown or named twice.
        """
        ids = self._streams if streams is None else _checked("streams", streams, "[M]", (-1,), "int64")
        count, observation_size, action_size = len(ids), self._observation_size, self._action_size
        self._store.add(
            ids,
            _checked("observations", observations, "[M, O]", (count, observation_size), "float32"),
            _checked("actions", actions, "[M, A]", (count, action_size), "float32"),
            _checked("rewards", rewards, "[M]", (count,), "float32"),
            _checked("terminated", terminated, "[M]", (count,), "bool"),
            _checked("truncated", truncated, "[M]", (count,), "bool"),
            _checked("successors", successors, "[M, O]", (count, observation_size), "float32"),
        )

    def sample(self, batch_size: int, num_batches: int = 1) -> Batch:
        """`num_batches` batches of CPU tensors [U, B, ...] in fresh memory, with raw rewards.

        Each transition is drawn from all that are stored with equal chance, also one that was drawn before.
        `sample(B, U)` gives the batches of U calls of `sample(B)`.

        Raises:
            ValueError: an argument below 1, or a batch larger than what is stored.
        """
        if batch_size < 1 or num_batches < 1:
            raise ValueError(
                f"batch_size and num_batches must be at least 1, got {batch_size} and {num_batches}"
            )
        if batch_size > len(self):
            raise ValueError(
                f"batch_size {batch_size} exceeds the {len(self)} transitions stored; "
                "collect more or lower batch_size"
            )
        empty = partial(torch.empty, num_batches, batch_size, dtype=torch.float32, device="cpu")
        batch = Batch(
            observations=empty(self._observation_size),
            actions=empty(self._action_size),
            rewards=empty(),
            masks=empty(),
            next_observations=empty(self._observation_size),
            task_ids=empty(dtype=torch.int64),
        )
        self._store.sample(*(field.numpy() for field in batch))
        return batch

    def state_dict(self) -> dict[str, Array]:
        """Everything that later samples and adds depend on, as numpy arrays.

        The n stored transitions come stream after stream, oldest first in each. Where `has_successor` is set,
        the successor of a row is the next of the m rows of `successors`. Elsewhere it is the next observation
        or, for the newest row of a stream, its head.

        ============================== ================= ======= ============================================
        key                            shape             dtype   meaning
        ============================== ================= ======= ============================================
        observation_size, action_size  []                int64   O and A
        capacity                       []                int64   per task, as asked for
        task_ids                       [N]               int64   the task of each stream
        seed, draws                    []                uint64  key and counter of the random numbers
        sizes                          [N]               int64   transitions of each stream; they sum to n
        observations, actions, rewards [n, O] [n, A] [n] float32 as they were added
        terminated, truncated          [n]               bool    as they were added
        has_successor                  [n]               bool    the successor is kept aside
        successors                     [m, O]            float32 those that are kept aside
        heads                          [N, O]            float32 zero where `head_valid` is not set
        head_valid                     [N]               bool    the newest row's successor is the head
        ============================== ================= ======= ============================================
        """
        columns = {
            name: np.empty(shape, dtype)
            for name, (_, shape, dtype) in self._columns(len(self), self._store.side_size).items()
        }
        self._store.save(**columns)
        return {
            **{name: np.array(value) for name, value in self._identity().items()},
            "capacity": np.array(self._capacity),
            "seed": np.array(self._store.seed, np.uint64),
            "draws": np.array(self._store.draws, np.uint64),
            **columns,
        }

    def load_state_dict(self, state: Mapping[str, Tensor | Array]) -> None:
        """Replaces the content, the seed and the draw counter by those of a saved state.

        Later samples and adds are then bit for bit those of the buffer that was saved. The capacity may
        differ: a smaller one keeps the newest transitions of each stream, a larger one all. When the state is
        refused, the buffer stays as it was.

        Raises:
            TypeError: a value of another type or dtype.
            ValueError: missing or unknown keys, other sizes or task_ids than this buffer's, shapes or flags
                that contradict each other, a value that is not finite.
        """
        scalars = {"capacity": "int64", "seed": "uint64", "draws": "uint64"}
        identity = self._identity()
        expected = {*identity, *scalars, *self._columns(0, 0)}
        if missing := sorted(expected - set(state)):
            raise ValueError(f"the replay state lacks {', '.join(missing)}")
        if unknown := sorted(set(state) - expected):
            raise ValueError(f"the replay state has unknown keys: {', '.join(unknown)}")
        for name, own in identity.items():
            value = _checked(name, state[name], "[N]" if own.ndim else "[]", own.shape, "int64")
            if not np.array_equal(value, own):
                raise ValueError(f"{name} of the replay state must be {own.tolist()}, got {value.tolist()}")
        values = {name: int(_checked(name, state[name], "[]", (), dtype)) for name, dtype in scalars.items()}
        n = _checked("rewards", state["rewards"], "[n]", (-1,), "float32").size
        flags = _checked("has_successor", state["has_successor"], "[n]", (n,), "bool")
        columns = {
            name: _checked(name, state[name], label, shape, dtype)
            for name, (label, shape, dtype) in self._columns(n, int(np.count_nonzero(flags))).items()
        }
        self._store.load(values["seed"], values["draws"], **columns)

    def _identity(self) -> dict[str, NDArray[np.int64]]:
        """What a saved state must share with this buffer."""
        return {
            "observation_size": np.array(self._observation_size),
            "action_size": np.array(self._action_size),
            "task_ids": self._task_ids,
        }

    def _columns(self, n: int, m: int) -> dict[str, tuple[str, tuple[int, ...], str]]:
        """Label, shape and dtype of what the store saves for n transitions, m with their successor aside."""
        streams, observation_size, action_size = self.num_streams, self._observation_size, self._action_size
        return {
            "sizes": ("[N]", (streams,), "int64"),
            "observations": ("[n, O]", (n, observation_size), "float32"),
            "actions": ("[n, A]", (n, action_size), "float32"),
            "rewards": ("[n]", (n,), "float32"),
            "terminated": ("[n]", (n,), "bool"),
            "truncated": ("[n]", (n,), "bool"),
            "has_successor": ("[n]", (n,), "bool"),
            "successors": ("[m, O]", (m, observation_size), "float32"),
            "heads": ("[N, O]", (streams, observation_size), "float32"),
            "head_valid": ("[N]", (streams,), "bool"),
        }

    def _per_task(self, per_stream: NDArray[np.int64]) -> NDArray[np.int64]:
        total = np.zeros(self._task_ids.max() + 1, np.int64)
        np.add.at(total, self._task_ids, per_stream)
        return total


# Both dtypes of a name. Comparing them costs a tenth of comparing names, and `add` runs at every step.
_DTYPES = {name: (np.dtype(name), getattr(torch, name)) for name in ("float32", "bool", "int64", "uint64")}


def _checked(name: str, value: object, label: str, shape: tuple[int, ...], dtype: str) -> Array:
    """`value` as a contiguous numpy array of exactly this shape and dtype; -1 allows any length."""
    if not isinstance(value, (Tensor, np.ndarray)):
        raise TypeError(f"{name} must be a torch tensor or a numpy array, got {type(value).__name__}")
    if value.dtype not in _DTYPES[dtype]:
        got = str(value.dtype).removeprefix("torch.")
        remedy = f".to(torch.{dtype})" if isinstance(value, Tensor) else f'.astype("{dtype}")'
        raise TypeError(f"{name} must be {dtype}, got {got}; convert it with {remedy}")
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise TypeError(f"{name} must be on the CPU, got {value.device}; copy it with .cpu()")
        value = value.detach().numpy()
    if value.shape != shape:
        wanted = tuple(size if want == -1 else want for want, size in zip_longest(shape, value.shape))
        if value.shape != wanted:
            sizes = ", ".join("any" if want == -1 else str(want) for want in shape)
            raise ValueError(f"{name} must have shape {label} = [{sizes}], got {list(value.shape)}")
    return value if value.flags.c_contiguous else np.ascontiguousarray(value)
