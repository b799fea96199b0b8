"""Where transitions wait to be sampled: the typed face of the store in csrc/replay_store.hpp."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from brc_fast import _core
from brc_fast.batch import Batch
from brc_fast.spec import Field, integer

from . import files
from .arena import Arena
from .base import Buffer, require_choices
from .fields import Array, FieldLike, Schema, Values, checked, dlpack
from .forks import register
from .prefetch import Prefetcher
from .request import Size, exponent
from .transfer import require_tasks, transfer


class ReplayBuffer(Buffer):
    """Keeps the newest transitions of N environment slots and samples them.

    A slot is called a stream here: its transitions are stored in the order in which they come, and each
    stream belongs to one task. Every observation is kept once: the successor of a transition is the stream's
    next observation. Where an episode ends, or the next observation differs from the successor, the successor
    is kept aside, so that a sampled pair is always one that was added.

        >>> buffer = ReplayBuffer(1_000_000, 67, 24, task_ids=[0] * 64)
        >>> buffer.add(observations, actions, step.rewards, step.terminated, step.truncated, step.successors)
        >>> batch = buffer.sample(1024, num_batches=2)  # a Batch of CPU tensors, observations [2, 1024, 67]

    Frames of a camera, stacked by four when they are sampled, and discrete actions:

        >>> buffer = ReplayBuffer(1_000_000, Field((84, 84), "uint8", stack=4), Field((), "int64"))

    Several observations of a step, each kept once and returned with its own successor:

        >>> buffer = ReplayBuffer(1_000_000, {"policy": 48, "critic": 123}, 12)
        >>> buffer = ReplayBuffer(1_000_000, env.observation_space, env.action_space)  # of Gymnasium

    Draws by priority, with weights that make up for them:

        >>> buffer = ReplayBuffer(1_000_000, 67, 24, alpha=0.6)
        >>> batch = buffer.sample(256, beta=0.4)  # batch.weights, batch.indices [256]
        >>> buffer.update_priorities(batch.indices, errors)

    Args:
        capacity: transitions kept per task, not in total: one number for all tasks, or one for each of the T
            tasks. A task with n streams keeps the newest ceil(capacity / n) of each, so up to n - 1 more than
            asked for: see `capacity_per_task`.
        observation_size, action_size: O and A, floats per observation and per action; or a shape, a `Field`
            with shape and dtype, or a space of Gymnasium. Observations may be a dict of these.
        task_ids: the task of every stream, N integers that name each of 0..T-1. Tasks may differ in streams.
        extras: further fields of every transition, by name, each like `action_size`.
        non_finite: "error" refuses NaN and infinity; "allow" stores them.
        alpha: gives every transition a priority, which `sample` draws by where it is given `beta`, to the
            power of alpha >= 0 (Schaul et al. 2016, the proportional variant). A new transition has the
            largest priority that was ever set, 1 at first; `update_priorities` sets others. Takes 13 bytes a
            transition. None: there are no priorities.
        seed: 0..2**64-1. Equal seeds and equal calls give equal samples.

    Memory is reserved here (`nbytes`) and taken up as the buffer fills. All methods may be called from
    several threads; samples and saves run side by side. A forked process, such as a worker of torch's
    DataLoader, has what was stored at the fork, and draws other batches than its parent and its siblings.

    Raises:
        TypeError: a size, a task or a seed that is not an integer.
        ValueError: a size below 1, a seed out of range, a task without streams, more than 2**29 rows.
        MemoryError: the system cannot reserve the memory; the message holds the sizes.
    """

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
    ) -> None:
        super().__init__(Schema.of(capacity, observation_size, action_size, extras, task_ids))
        require_choices(seed, non_finite)
        self._non_finite = non_finite
        first = next(iter(self.schema.parts.values()))
        self._store: _core.ReplayStore = _core.ReplayStore(
            self.schema.layout(),
            list(self.schema.capacities),
            self.schema.task_ids.tolist(),
            seed,
            non_finite == "allow",
            exponent(alpha),
            _exact(first),
            _exact(self.schema.action),
        )
        self._try_add = self._store.try_add
        register(self)
        self._arena = Arena(self.schema, pinned=torch.cuda.is_available())
        self._newest: Batch | None = None  # sampled, kept from reuse by the next one

    @property
    def nbytes(self) -> int:
        """Bytes reserved. It grows by about 256 KB at a time with the successors that are kept aside."""
        return self._store.nbytes

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
        """Appends one transition to every stream, or to those that `streams` names.

        ============ ======== ======= ================================================================
        argument     shape    dtype   meaning
        ============ ======== ======= ================================================================
        observations [M, O]   float32 what the policy saw; of stacked frames the newest
        actions      [M, A]   float32 what it did
        rewards      [M]      float32 raw
        terminated   [M]      bool    the task ended: no return comes after
        truncated    [M]      bool    the episode was cut, for example by a time limit
        successors   [M, O]   float32 where the action led; after an end not the first of the next episode
        streams      [M]      int64   distinct streams, each below N; all N in order where it is None
        extras       [M, ...] any     a value for each of the buffer's `extras`, by name
        ============ ======== ======= ================================================================

        Shapes of observations and actions are those that the buffer was made with; observations that have
        names come as a dict. Arguments are copied. Best are CPU tensors or numpy arrays of exactly these
        dtypes; arrays of other libraries, lists and numbers are taken too, floats rounded to the field's,
        and anything else where nothing is lost. For one stream the first dimension may be left out: `add(o,
        a, 1.0, False, False, successor)`. When an argument is refused, nothing is stored.

        Raises:
            TypeError: no numbers, numbers that the dtype does not hold, or another device.
            ValueError: another shape, a value that is not finite, a stream that is unknown or named twice.
        """
        # Arguments that are exactly right are checked in the compiled store: the checks below would cost more
        # than the rest.
        if extras is None and self._try_add(
            streams, observations, actions, rewards, terminated, truncated, successors
        ):
            return
        ids = self._streams if streams is None else checked("streams", streams, "[M]", (-1,), "int64")
        given = (observations, actions, rewards, terminated, truncated, successors, extras)
        self._store.add(ids, *self._checked(len(ids), *given))

    def extend(
        self,
        observations: Values,
        actions: Array,
        rewards: Array,
        terminated: Array,
        truncated: Array,
        successors: Values | None = None,
        stream: int = 0,
        extras: Mapping[str, Array] | None = None,
        starts: Array | None = None,
    ) -> int:
        """Appends M transitions of one stream, one after the other, at the speed of memory.

        Arguments are those of `add`, [M, ...] each, from the oldest to the newest. Without successors an
        action led to the observation of the next row, or nowhere where it terminated. The last row of an
        episode that was cut is then left out, and so is the very last one: nobody knows where they led. What
        is not finite is refused before anything is stored.

        Args:
            starts: [M] bool, true where an episode begins though no end comes before it. Any observation but
                the last successor begins one without being told.

        Returns how many were appended.

        Raises:
            IndexError: no such stream.
            TypeError, ValueError: as `add`.
        """
        given = (observations, actions, rewards, terminated, truncated, successors, extras)
        m = len(rewards) if np.ndim(rewards) else 1
        columns = self._checked(m, *given, following=successors is None)
        begins = None if starts is None else checked("starts", starts, "[M]", columns[2].shape, "bool")
        return self._store.extend(integer("stream", stream), *columns, starts=begins)

    def _checked(
        self,
        m: int,
        observations: Values,
        actions: Array,
        rewards: Array,
        terminated: Array,
        truncated: Array,
        successors: Values | None,
        extras: Mapping[str, Array] | None,
        following: bool = False,
    ) -> tuple[Any, Any, Any, Any, Any, Any]:
        """M transitions as the compiled store takes them, `following` each other without successors."""
        schema = self.schema
        fields = schema.named(actions, extras)

        def observed(name: str, values: Values) -> list[Array]:
            parts = zip(schema.parts.items(), schema.split(name, values), strict=True)
            return [
                checked(part.replace("observations", name), value, "[M, O]", (m, *field.shape), field.dtype)
                for (part, field), value in parts
            ]

        seen = observed("observations", observations)
        values = [
            checked(
                name,
                fields[name],
                "[M, A]" if name == "actions" else "[M, ...]",
                (m, *field.shape),
                field.dtype,
            )
            for name, field in schema.fields.items()
        ]
        return (
            seen,
            values,
            checked("rewards", rewards, "[M]", (m,), "float32"),
            checked("terminated", terminated, "[M]", (m,), "bool"),
            checked("truncated", truncated, "[M]", (m,), "bool"),
            [] if following else observed("successors", successors),
        )

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
    ) -> Batch:
        """A batch of CPU tensors [B, ...], or `num_batches` of them [U, B, ...], with raw rewards.

        Each transition is drawn from all that are stored with equal chance, also one that was drawn before.
        `sample(B, U)` gives the batches of U calls of `sample(B)`. The stored transitions never change.

        Args:
            batch_size, num_batches: B and U. Fields have a dimension for U where it is given, be it 1.
            n_step: sums the rewards of up to n steps. It stops at the end of an episode, at a jump and at the
                newest transition; see `Batch` for what the fields hold then.
            discount: of the steps, in [0, 1]; needed with n_step > 1.
            tasks: draws from these tasks only.
            weights: shares of the tasks in each batch, in the order of `tasks` (or of all), or "equal". Each
                share is kept to within one transition, and the transitions of a task follow each other.
                Without it, a task's share is that of its stored transitions.
            copy: fresh memory. Otherwise the memory of a batch, pinned where CUDA is there, is used again
                after every tensor on it is gone, torch's copies out of it are over and another batch was
                sampled. Whoever has no more than its address, such as a copy that another library has
                begun, therefore has until the sample after the next.
            beta: draws by priority, in a buffer with `alpha`, and adds `weights` to the batch: transition i
                is drawn with probability P(i) = p_i^alpha / sum of p^alpha, and weighs (n P(i))^-beta, with
                n transitions stored, divided by the largest weight of its batch. In [0, 1]; 0 weighs all
                alike. Without `tasks` and `weights`.

        Raises:
            TypeError: an argument of another type.
            ValueError: an argument out of range, a batch larger than what is stored, or a task with a weight
                and nothing stored.
        """
        size = Size.of(batch_size, num_batches, weighted=beta is not None)
        request = self._requests(n_step, discount, tasks, weights, beta)
        if n_step > 1:
            self._watch_steps()
        try:
            lease = self._arena.lease(size, fresh=copy)
        except MemoryError:
            self._require_stored(batch_size)
            raise
        self._store.sample(request, *size[:2], lease.views, lease.slot)
        if not copy:
            self._newest = lease.batch
        return lease.batch

    def peek(self, draw: int, batch_size: int, weights: Sequence[float] | str | None = None) -> Batch:
        """The batch [B, ...] that `sample` would give as draw number `draw`, in 0..2**64-1, of what is stored
        now, in fresh memory. It counts as none: later samples are as if it had not been looked at.

        Arguments and errors are those of `sample`.
        """
        if not 0 <= integer("draw", draw) < 2**64:
            raise ValueError(f"draw must lie in 0..2**64-1, got {draw}")
        size = Size.of(batch_size, None)
        request = self._requests(1, None, None, weights)
        lease = self._arena.lease(size, fresh=True)
        self._store.gather_ahead(request, draw, *size[:2], lease.views, lease.slot, _core.Ahead())
        return lease.batch

    def _read(self, indices: NDArray[np.int64], shape: tuple[int, ...]) -> Batch:
        lease = self._arena.lease(Size(1, indices.size, shape), fresh=True)
        self._store.read(indices, self._requests.plain, lease.views, lease.slot)
        return lease.batch

    def reset(self, streams: Array | None = None) -> None:
        """Tell that these streams (all where it is None) begin another episode with their next transition.

        Needed only where an episode is left before its end and the next one may begin with the very
        observation that the last transition led to: any other is recognised. Waits for a save that is under
        way.
        """
        ids = self._streams if streams is None else checked("streams", streams, "[M]", (-1,), "int64")
        with self._saving:
            self._store.reset(ids)

    def before_fork(self) -> None:
        """For `forks`."""
        self._store.before_fork()

    def after_fork(self, child: int | None) -> None:
        """For `forks`."""
        self._store.after_fork(child)
        if child is not None:
            self._saving = threading.Lock()
            self._arena = Arena(self.schema, pinned=False)

    def prefetch(
        self,
        batch_size: int,
        num_batches: int | None = None,
        n_step: int = 1,
        discount: float | None = None,
        tasks: Sequence[int] | None = None,
        weights: Sequence[float] | str | None = None,
        *,
        beta: float | None = None,
        depth: int = 2,
        device: str | torch.device = "cpu",
    ) -> Prefetcher:
        """The batches that repeated calls of `sample` would return, gathered by a thread in advance.

            >>> with buffer.prefetch(1024, num_batches=2, device="cuda") as batches:
            ...     for _ in range(steps):
            ...         buffer.add(...)
            ...         agent.update(next(batches))

        Equal to `sample` bit for bit, whatever is added, sampled, saved or loaded in between: what has
        changed since a batch was gathered is gathered again. On a GPU the copy to the device is under way
        before the batch is asked for.

        Args:
            batch_size ... weights, beta: as for `sample`. One change of a priority, and one transition more,
                moves the shares of all others: with beta, what was gathered before is gathered again.
            depth: batches gathered ahead, at least 1.
            device: where the batches are wanted.
        """
        size = Size.of(batch_size, num_batches, weighted=beta is not None)
        request = self._requests(n_step, discount, tasks, weights, beta)
        told = self._watch_steps if n_step > 1 else None
        return Prefetcher(self._store, self._arena, request, size, depth, device, told)

    def save(self, folder: str | os.PathLike[str], *, previous: str | os.PathLike[str] | None = None) -> None:
        """Writes the content, the seed and the draw counter to files in `folder`.

        Where the folder holds this buffer's last save, only what changed since is written. A save that fails
        or is killed leaves the one before, and a finished one keeps it too, as the previous generation.

        Args:
            folder: made if it is missing. It must hold nothing but replay files.
            previous: a folder with this buffer's last save, if that is another one: its files are linked (or
                copied) instead of written again.

        Raises:
            OSError: the files cannot be written.
            ValueError: the folder holds something else.
        """
        with self._saving:
            self._saved = files.save(self._store, self.schema, Path(folder), self._saved, previous)

    def load(
        self,
        folder: str | os.PathLike[str],
        *,
        previous: bool = False,
        same_capacity: bool = False,
        tasks: Mapping[int, int] | None = None,
    ) -> None:
        """Replaces the content, the seed and the draw counter by those of a saved buffer.

        Later samples and adds are then bit for bit those of the buffer that was saved. The capacity may
        differ: a smaller one keeps the newest transitions of each stream, a larger one all. What is damaged
        or does not fit is refused before anything changes. Takes a few megabytes besides the buffer itself.

        With `tasks`, only what was saved of these tasks is loaded, into a buffer that may have other tasks
        and other numbers of streams:

            >>> buffer.load("old", tasks={0: 2, 1: 0})  # the old task 0 is the task 2 here

        It replaces what the buffer holds of the tasks named; other tasks, the seed and the draw counter stay.
        Saved streams are dealt out whole over those of their task, one behind the other, each the beginning
        of an episode for `n_step` and for frames. Where they do not fit so, they are cut into equal parts,
        and where even those do not fit, each keeps its newest transitions. Takes the memory of both buffers.

        Args:
            folder: what `save` was given.
            previous: load the generation before the last.
            same_capacity: refuse a save of another capacity, whose files may be of any size.
            tasks: for each task of the saved buffer that is wanted, the task of this one that takes it.

        Raises:
            ValueError: no save, another format, other fields or task_ids, tasks that are not there, or
                damaged files, with their name.
            OSError: the files cannot be read.
            MemoryError: with `tasks`, there is none for both.
        """
        with self._saving:
            if tasks is not None:
                self._load_tasks(Path(folder), previous, same_capacity, tasks)
                return
            self._saved = None  # a load that fails half-way leaves nothing that a save could go on from
            self._saved = files.load(self._store, self.schema, Path(folder), previous, same_capacity)

    def _load_tasks(
        self, folder: Path, previous: bool, same_capacity: bool, tasks: Mapping[int, int]
    ) -> None:
        if same_capacity:
            raise ValueError("same_capacity cannot be asked for with tasks, whose streams may be others")
        theirs = files.saved_schema(self.schema, folder, previous)
        known = require_tasks(tasks, theirs, self.schema)
        saved = ReplayBuffer(
            theirs.capacities,
            theirs.observation,
            theirs.action,
            task_ids=theirs.task_ids,
            extras=theirs.extras,
            non_finite=self._non_finite,
        )
        saved.load(folder, previous=previous)
        self._saved = None
        transfer(saved, self, known)


def _exact(field: Field) -> _core.Expected:
    """What needs no look from Python."""
    known = -1 if field.dtype == "bfloat16" else field.numpy_dtype.num  # numpy has no such type
    return _core.Expected(known, dlpack(field), 8 * field.numpy_dtype.itemsize, field.shape)
