"""Replay buffers behind one face, each used through its documented interface, and transitions to know again.

Each transition carries a number, its tag, and every value of it follows from the tag. So a sampled row proves
by itself that its observation, action, reward, mask and successor were stored together. The same steps come
again and again; the first of them follows the last one without a break.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import Differs, Missing
from numpy.typing import NDArray

from brc_fast import ReplayBuffer

Array = NDArray[Any]
EPISODE = 97  # an end in so many transitions; a prime, so that every stream has ends
LEAST = 4096  # different transitions


class Steps(NamedTuple):
    """Transitions [S, ...] of all environments; the fields and their order are those of ReplayBuffer.add."""

    observations: Array
    actions: Array
    rewards: Array
    terminated: Array
    truncated: Array
    successors: Array


class Columns(NamedTuple):
    """A sampled batch for the check: [n, O], [n, A], [n], [n], [n, O], and [n] where tasks are told apart."""

    observations: Array
    actions: Array
    rewards: Array
    masks: Array
    next_observations: Array
    task_ids: Array | None = None


class Stored(NamedTuple):
    """What S = tasks * streams environments in lockstep store: `steps` steps fill the buffer."""

    observation: int
    action: int
    tasks: int
    streams: int
    steps: int

    @property
    def lanes(self) -> int:
        """S."""
        return self.tasks * self.streams

    @property
    def rows(self) -> int:
        """Transitions per task."""
        return self.streams * self.steps

    @property
    def row_bytes(self) -> int:
        """A transition with two observations, reward and mask, all float32."""
        return 4 * (2 * self.observation + self.action + 2)

    @property
    def different(self) -> int:
        """Tags; whole steps, in a number that seldom divides what a buffer holds."""
        return self.lanes * (max(16, LEAST // self.lanes) + 1)

    def all_steps(self) -> Steps:
        """Every different transition, in the order of the tags."""
        tags = np.arange(self.different)
        ends = tags % (2 * EPISODE) == 0, tags % (2 * EPISODE) == EPISODE
        columns = values(tags, self.observation), values(tags, self.action), tags.astype(np.float32), *ends
        return Steps(*columns, values(self.successors(tags), self.observation))

    def each_step(self) -> list[Steps]:
        whole, starts = self.all_steps(), range(0, self.different, self.lanes)
        return [Steps(*(column[at : at + self.lanes] for column in whole)) for at in starts]

    def successors(self, tags: Array) -> Array:
        """The tag of the observation that follows; at an end one that no transition starts from."""
        return np.where(tags % EPISODE == 0, -1 - tags, (tags + self.lanes) % self.different)

    def check(self, batch: Columns) -> None:
        """Differs unless `batch` holds stored transitions, whole ones and not always the same."""
        tags = np.rint(batch.observations[:, 0] * 2.0).astype(np.int64)
        if tags.min() < 0 or tags.max() >= self.different:
            raise Differs("an observation was never stored")
        masks = (tags % (2 * EPISODE) != 0).astype(np.float32)
        following = values(self.successors(tags), self.observation)
        right = values(tags, self.observation), values(tags, self.action), tags.astype(np.float32)
        ids = None if batch.task_ids is None else tags % self.lanes // self.streams
        for name, got, wanted in zip(Columns._fields, batch, (*right, masks, following, ids), strict=True):
            if wanted is None:
                continue
            if got.shape != wanted.shape:
                raise Differs(f"{name} have shape {list(got.shape)} instead of {list(wanted.shape)}")
            if wrong := np.count_nonzero((got != wanted).reshape(len(tags), -1).any(1)):
                raise Differs(f"{wrong} of {len(tags)} sampled {name} do not belong to their observations")
        if tags.size * 4 <= min(self.different, self.rows) and np.unique(tags).size < tags.size // 2:
            raise Differs("the same few transitions are drawn again and again")


def values(tags: Array, width: int) -> Array:
    """[..., width] float32 that follow from the tags; the first column is half of the tag."""
    return tags.astype(np.float32)[..., None] * np.linspace(0.5, 1.0, width, dtype=np.float32)


# ---------------------------------------------------------------- buffers


class Peer:
    """A buffer. `sample` and `add` are timed; what a user prepares once per step anyway (a TensorDict, an
    `infos` list, arrays on JAX's device), filling it and `columns` are not."""

    name: str
    package: str  # to name its version
    buffer: Any
    tasks = False  # knows tasks itself; otherwise PerTask holds one for each
    any_rows = True  # `add` takes any number of transitions, not only a step of all environments

    def __init__(self, work: Stored) -> None:
        """Makes the empty buffer."""
        self.work = work

    def fill(self) -> None:
        if not self.any_rows:
            prepared = [self.prepare(step) for step in self.work.each_step()]
            for step in range(self.work.steps):
                self.add(prepared[step % len(prepared)])
            return
        whole, rows = self.work.all_steps(), self.work.rows * self.work.tasks
        for first in range(0, rows, self.work.different):
            self.add(self.prepare(Steps(*(column[: rows - first] for column in whole))))

    def sample(self, batches: int, size: int) -> Any:
        """U batches of B transitions, as the library gives them: U * B rows, or [U, B, ...]."""
        return self.buffer.sample(batches * size)

    def columns(self, sampled: Any) -> Columns:
        """What `sample` returned, as arrays of U * B rows."""
        raise NotImplementedError(self.name)

    def prepare(self, step: Steps) -> Any:
        """One step [S, ...] in the form that `add` takes."""
        return step

    def add(self, prepared: Any) -> Any:
        raise NotImplementedError(self.name)


class Ours(Peer):
    name, package, tasks, any_rows = "brc-fast", "brc-fast", True, False

    def __init__(self, work: Stored) -> None:
        ids = np.repeat(np.arange(work.tasks), work.streams)
        self.work, self.buffer = work, ReplayBuffer(work.rows, work.observation, work.action, task_ids=ids)

    def sample(self, batches: int, size: int) -> Any:
        return self.buffer.sample(size, batches)

    def columns(self, sampled: Any) -> Columns:
        return Columns(*(field.flatten(0, 1).cpu().numpy() for field in sampled))

    def add(self, prepared: Sequence[Any]) -> None:
        self.buffer.add(*prepared)


class OursTensors(Ours):
    """With torch tensors as arguments of `add`."""

    name = "brc-fast, tensors"

    def prepare(self, step: Steps) -> Any:
        return tuple(map(torch.from_numpy, step))


class Authors(Peer):
    """The layout of the BRC authors' buffer: [T, capacity, ...] arrays, both observations, one pointer."""

    name, package, tasks, any_rows = "authors' layout (numpy)", "numpy", True, False

    def __init__(self, work: Stored) -> None:
        widths = (work.observation,), (work.action,), (), (), (work.observation,)
        self.arrays = [np.empty((work.tasks, work.rows, *width), np.float32) for width in widths]
        self.work, self.pointer = work, 0

    def sample(self, batches: int, size: int) -> list[Array]:
        drawn = [self._draw(size) for _ in range(batches)]
        return drawn[0] if batches == 1 else [np.stack(parts) for parts in zip(*drawn, strict=True)]

    def _draw(self, size: int) -> list[Array]:
        task = np.random.randint(0, self.work.tasks, size)  # noqa: NPY002  as the authors draw
        step = np.random.randint(0, self.work.rows, size)  # noqa: NPY002
        return [array[task, step] for array in self.arrays]

    def columns(self, sampled: list[Array]) -> Columns:
        lead = sampled[2].ndim
        return Columns(*(array.reshape(-1, *array.shape[lead:]) for array in sampled))

    def prepare(self, step: Steps) -> list[Array]:
        masks, shape = 1.0 - step.terminated.astype(np.float32), (self.work.tasks, self.work.streams)
        columns = step.observations, step.actions, step.rewards, masks, step.successors
        return [column.reshape(*shape, *column.shape[1:]) for column in columns]

    def add(self, prepared: list[Array]) -> None:
        stop = self.pointer + self.work.streams
        for array, column in zip(self.arrays, prepared, strict=True):
            array[:, self.pointer : stop] = column
        self.pointer = stop % self.work.rows


class IndexSelect(Peer):
    """Separate torch tensors, both observations; a batch is one torch.index_select from each, into memory
    that the next one of its size overwrites."""

    name, package, tasks = "torch.index_select", "torch", True

    def __init__(self, work: Stored) -> None:
        rows, widths = (
            work.rows * work.tasks,
            ((work.observation,), (work.action,), (), (), (work.observation,)),
        )
        self.tensors = [torch.empty(rows, *width) for width in widths]
        if work.tasks > 1:
            self.tensors.append(torch.arange(work.tasks).repeat_interleave(work.streams).repeat(work.steps))
        self.work, self.pointer, self.batches = work, 0, dict[int, list[torch.Tensor]]()

    def sample(self, batches: int, size: int) -> list[torch.Tensor]:
        rows = batches * size
        if rows not in self.batches:
            self.batches[rows] = [tensor.new_empty(rows, *tensor.shape[1:]) for tensor in self.tensors]
        index = torch.randint(len(self.tensors[2]), (rows,))
        for tensor, batch in zip(self.tensors, self.batches[rows], strict=True):
            torch.index_select(tensor, 0, index, out=batch)
        return self.batches[rows]

    def columns(self, sampled: list[torch.Tensor]) -> Columns:
        return Columns(*(tensor.numpy() for tensor in sampled))

    def prepare(self, step: Steps) -> tuple[torch.Tensor, ...]:
        observations, actions, rewards, terminated, _, successors = map(torch.from_numpy, step)
        return observations, actions, rewards, 1.0 - terminated.float(), successors

    def add(self, prepared: tuple[torch.Tensor, ...]) -> None:
        start, stop = self.pointer, self.pointer + len(prepared[2])
        for tensor, column in zip(self.tensors, prepared, strict=False):
            tensor[start:stop] = column
        self.pointer = stop % len(self.tensors[2])


class Cpprb(Peer):
    name, package = "cpprb", "cpprb"

    def __init__(self, work: Stored) -> None:
        from cpprb import ReplayBuffer as Buffer

        wide = {"shape": work.observation}
        fields = {"obs": wide, "act": {"shape": work.action}, "rew": {}, "next_obs": wide, "done": {}}
        self.work, self.buffer = work, Buffer(work.rows, fields)

    def columns(self, sampled: dict[str, Array]) -> Columns:
        rewards, masks = sampled["rew"][:, 0], 1.0 - sampled["done"][:, 0]
        return Columns(sampled["obs"], sampled["act"], rewards, masks, sampled["next_obs"])

    def prepare(self, step: Steps) -> dict[str, Array]:
        here, actions, rewards, done, _, there = step
        return {"obs": here, "act": actions, "rew": rewards, "next_obs": there, "done": done}

    def add(self, prepared: dict[str, Array]) -> None:
        self.buffer.add(**prepared)


class TorchRL(Peer):
    """ReplayBuffer with LazyTensorStorage and RandomSampler; TensorDictReplayBuffer takes a little longer."""

    name, package = "TorchRL", "torchrl"

    def __init__(self, work: Stored) -> None:
        from torchrl import torchrl_logger
        from torchrl.data import LazyTensorStorage, RandomSampler
        from torchrl.data import ReplayBuffer as Buffer

        torchrl_logger.setLevel("WARNING")
        storage = LazyTensorStorage(work.rows, device="cpu")
        self.work, self.buffer = work, Buffer(storage=storage, sampler=RandomSampler())

    def columns(self, sampled: Any) -> Columns:
        after = sampled["next"]
        rewards, masks = after["reward"][:, 0], 1.0 - after["terminated"].float()[:, 0]
        parts = sampled["observation"], sampled["action"], rewards, masks, after["observation"]
        return Columns(*(part.numpy() for part in parts))

    def prepare(self, step: Steps) -> Any:
        from tensordict import TensorDict

        observations, actions, rewards, terminated, _, successors = map(torch.from_numpy, step)
        after = {"observation": successors, "reward": rewards[:, None], "terminated": terminated[:, None]}
        size = [len(rewards)]
        content = {"observation": observations, "action": actions, "next": TensorDict(after, size)}
        return TensorDict(content, size)

    def add(self, prepared: Any) -> None:
        self.buffer.extend(prepared)


class StableBaselines3(Peer):
    name, package, any_rows = "Stable-Baselines3", "stable-baselines3", False

    def __init__(self, work: Stored) -> None:
        from gymnasium.spaces import Box
        from stable_baselines3.common.buffers import ReplayBuffer as Buffer

        observations = Box(-np.inf, np.inf, (work.observation,), np.float32)
        actions = Box(-1.0, 1.0, (work.action,), np.float32)
        self.work = work
        self.buffer = Buffer(work.rows, observations, actions, device="cpu", n_envs=work.lanes)

    def columns(self, sampled: Any) -> Columns:
        rewards, masks = sampled.rewards[:, 0], 1.0 - sampled.dones[:, 0]
        parts = sampled.observations, sampled.actions, rewards, masks, sampled.next_observations
        return Columns(*(part.numpy() for part in parts))

    def prepare(self, step: Steps) -> tuple[Any, ...]:
        infos = [{"TimeLimit.truncated": True} if cut else {} for cut in step.truncated.tolist()]
        done = step.terminated | step.truncated
        return step.observations, step.successors, step.actions, step.rewards, done, infos

    def add(self, prepared: tuple[Any, ...]) -> None:
        self.buffer.add(*prepared)


@cache
def flashbax_functions(capacity: int, rows: int) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """The item buffer for samples of `rows` transitions, and its add and sample under jit."""
    import flashbax
    import jax

    buffer = flashbax.make_item_buffer(capacity, 1, rows, add_batches=True)

    def sample(state: Any, key: Any) -> Any:
        key, now = jax.random.split(key)
        return key, buffer.sample(state, now).experience

    return buffer, jax.jit(buffer.add, donate_argnums=0), jax.jit(sample)


class Flashbax(Peer):
    """The item buffer, every function under jit, its state donated where it changes."""

    name, package = "flashbax (jit)", "flashbax"

    def __init__(self, work: Stored) -> None:
        self.work, self.jax = work, importlib.import_module("jax")
        buffer, self.add_jit, _ = flashbax_functions(work.rows, 1)
        self.key = self.jax.random.key(np.random.default_rng().integers(2**31))  # PerTask has several
        self.state = buffer.init(self.prepare(Steps(*(column[0] for column in work.each_step()[0]))))

    def sample(self, batches: int, size: int) -> Any:
        draw = flashbax_functions(self.work.rows, batches * size)[2]
        self.key, sampled = draw(self.state, self.key)
        return self.jax.block_until_ready(sampled)

    def columns(self, sampled: Any) -> Columns:
        here, actions, rewards, terminated, there = map(np.asarray, sampled)
        return Columns(here, actions, rewards, 1.0 - terminated.astype(np.float32), there)

    def prepare(self, step: Steps) -> Any:
        here, actions, rewards, terminated, _, there = step
        return tuple(map(self.jax.numpy.array, (here, actions, rewards, terminated, there)))

    def add(self, prepared: Any) -> None:
        self.state = self.jax.block_until_ready(self.add_jit(self.state, prepared))


class PerTask(Peer):
    """One buffer per task for those that know no tasks: each gives its share, and the shares are joined."""

    def __init__(self, kind: type[Peer], work: Stored) -> None:
        self.name, self.work = f"{kind.name} x {work.tasks}", work._replace(tasks=1)
        self.parts = [kind(self.work) for _ in range(work.tasks)]

    def fill(self) -> None:
        for part in self.parts:
            part.fill()

    def sample(self, batches: int, size: int) -> Columns:
        share, more = divmod(size, len(self.parts))
        sizes = [share + (task < more) for task in range(len(self.parts))]
        drawn = [part.columns(part.sample(batches, one)) for part, one in zip(self.parts, sizes, strict=True)]
        return Columns(*(np.concatenate(column) for column in zip(*(d[:5] for d in drawn), strict=True)))

    def columns(self, sampled: Columns) -> Columns:
        return sampled


PEERS: tuple[type[Peer], ...] = (Authors, Cpprb, IndexSelect, TorchRL, StableBaselines3, Flashbax)


def filled(kinds: Sequence[type[Peer]], work: Stored, missing: Missing) -> dict[str, Peer]:
    """Full buffers by name, or why there are none."""
    peers: dict[str, Peer] = {}
    for kind in kinds:
        with missing.of(kind.name):
            peer = kind(work) if kind.tasks or work.tasks == 1 else PerTask(kind, work)
            peer.fill()
            peers[peer.name] = peer
    return peers
