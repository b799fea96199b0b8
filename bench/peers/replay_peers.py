"""Replay buffers behind one face, each used through its documented interface.

Filling is not timed, so it takes the fastest way that the interface allows: many rows per call, or assignment
to public arrays. What a user prepares once per step anyway (a TensorDict, an `infos` list, arrays on JAX's
device) is prepared outside of the timed part as well.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from brc_fast import ReplayBuffer

from .replay_data import Array, Columns, Steps, Workload, flat


class Peer:
    """A buffer. `sample` and `add` are timed; filling it, `prepare` and `columns` are not."""

    name: str
    package: str | None = None  # to name its version
    tasks = False  # knows tasks itself; otherwise PerTask holds one for each

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.build()

    def build(self) -> None:
        """Makes the empty buffer."""
        raise NotImplementedError

    def put(self, first: int, steps: Steps) -> None:
        """Stores steps [k, S, ...], of which the first has the number `first`."""
        raise NotImplementedError

    def finish(self) -> None:
        """Runs when the buffer is full."""

    def sample(self, batches: int, size: int) -> Any:
        """U batches of B transitions, as the library gives them: U * B rows, or [U, B, ...]."""
        raise NotImplementedError

    def columns(self, sampled: Any) -> Columns:
        """What `sample` returned, as arrays of U * B rows."""
        raise NotImplementedError

    def prepare(self, step: Steps) -> Any:
        """One step [S, ...] in the form that `add` takes."""
        return step

    def add(self, prepared: Any) -> Any:
        """Stores one step of all environments."""
        raise NotImplementedError


class Ours(Peer):
    name, package, tasks = "brc-fast", "brc-fast", True

    def build(self) -> None:
        self.buffer = self.empty(self.workload)

    @staticmethod
    def empty(workload: Workload) -> ReplayBuffer:
        """A buffer of the workload's sizes."""
        ids = np.repeat(np.arange(workload.tasks), workload.streams)
        return ReplayBuffer(workload.rows, workload.observation_size, workload.action_size, task_ids=ids)

    def put(self, first: int, steps: Steps) -> None:
        for k in range(len(steps.rewards)):
            self.buffer.add(*(column[k] for column in steps))

    def sample(self, batches: int, size: int) -> Any:
        return self.buffer.sample(size, batches)

    def columns(self, sampled: Any) -> Columns:
        return Columns(*flat(*(field.cpu().numpy() for field in sampled)))

    def add(self, prepared: Steps) -> None:
        self.buffer.add(*prepared)


class OursTensors(Ours):
    """Another hand on a buffer that exists, with torch tensors as arguments of `add`."""

    name = "brc-fast, tensors"

    def __init__(self, ours: Ours) -> None:
        self.workload, self.buffer = ours.workload, ours.buffer

    def prepare(self, step: Steps) -> Any:
        return tuple(torch.from_numpy(column) for column in step)


class Authors(Peer):
    """The layout of the BRC authors' buffer: [T, capacity, ...] arrays, both observations, one pointer."""

    name, package, tasks = "authors' layout (numpy)", "numpy", True

    def build(self) -> None:
        work = self.workload
        shape = (work.tasks, work.rows)
        self.arrays = (
            np.empty((*shape, work.observation_size), np.float32),
            np.empty((*shape, work.action_size), np.float32),
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
            np.empty((*shape, work.observation_size), np.float32),
        )
        self.pointer = 0

    def put(self, first: int, steps: Steps) -> None:
        tasks, streams = self.workload.tasks, self.workload.streams
        start, stop = first * streams, (first + len(steps.rewards)) * streams
        for array, column in zip(self.arrays, self.prepare(steps), strict=True):
            by_task = column.reshape(-1, tasks, streams, *column.shape[2:]).swapaxes(0, 1)
            array[:, start:stop] = by_task.reshape(tasks, stop - start, *column.shape[2:])

    def sample(self, batches: int, size: int) -> tuple[Array, ...]:
        if batches == 1:
            return self._draw(size)
        stacked = tuple(np.empty((batches, size, *array.shape[2:]), np.float32) for array in self.arrays)
        for u in range(batches):
            for whole, part in zip(stacked, self._draw(size), strict=True):
                whole[u] = part
        return stacked

    def _draw(self, size: int) -> tuple[Array, ...]:
        task = np.random.randint(0, self.workload.tasks, size)  # noqa: NPY002  as the authors draw
        step = np.random.randint(0, self.workload.rows, size)  # noqa: NPY002
        return tuple(array[task, step] for array in self.arrays)

    def columns(self, sampled: tuple[Array, ...]) -> Columns:
        one = sampled[2].ndim == 1
        return Columns(*(sampled if one else flat(*sampled)), None)

    def prepare(self, step: Steps) -> tuple[Array, ...]:
        masks = 1.0 - step.terminated.astype(np.float32)
        return (step.observations, step.actions, step.rewards, masks, step.successors)

    def add(self, prepared: tuple[Array, ...]) -> None:
        """Every task steps once: needs workloads with one stream per task."""
        for array, column in zip(self.arrays, prepared, strict=True):
            array[:, self.pointer] = column
        self.pointer = (self.pointer + 1) % self.workload.rows


class IndexSelect(Peer):
    """Separate torch tensors, both observations; a batch is one torch.index_select from each, into memory
    that the next one of its size overwrites."""

    name, package, tasks = "torch.index_select", "torch", True

    def build(self) -> None:
        work = self.workload
        rows = work.rows * work.tasks
        self.tensors = [
            torch.empty(rows, work.observation_size),
            torch.empty(rows, work.action_size),
            torch.empty(rows),
            torch.empty(rows),
            torch.empty(rows, work.observation_size),
        ]
        if work.tasks > 1:
            tasks = torch.arange(work.tasks).repeat_interleave(work.streams)
            self.tensors.append(tasks.repeat(work.steps))
        self.pointer = 0
        self.batches: dict[int, list[torch.Tensor]] = {}

    def put(self, first: int, steps: Steps) -> None:
        lanes = self.workload.lanes
        start, stop = first * lanes, (first + len(steps.rewards)) * lanes
        columns = [torch.from_numpy(array) for array in flat(*steps)]
        for tensor, column in zip(self.tensors, self._stored(*columns), strict=False):
            tensor[start:stop] = column

    def sample(self, batches: int, size: int) -> list[torch.Tensor]:
        rows = batches * size
        if rows not in self.batches:
            self.batches[rows] = [tensor.new_empty(rows, *tensor.shape[1:]) for tensor in self.tensors]
        index = torch.randint(len(self.tensors[2]), (rows,))
        for tensor, batch in zip(self.tensors, self.batches[rows], strict=True):
            torch.index_select(tensor, 0, index, out=batch)
        return self.batches[rows]

    def columns(self, sampled: list[torch.Tensor]) -> Columns:
        arrays = [tensor.numpy() for tensor in sampled]
        return Columns(*arrays[:5], arrays[5] if len(arrays) > 5 else None)

    def prepare(self, step: Steps) -> tuple[torch.Tensor, ...]:
        return self._stored(*(torch.from_numpy(column) for column in step))

    def add(self, prepared: tuple[torch.Tensor, ...]) -> None:
        start, stop = self.pointer, self.pointer + self.workload.lanes
        for tensor, column in zip(self.tensors, prepared, strict=False):
            tensor[start:stop] = column
        self.pointer = stop % len(self.tensors[2])

    @staticmethod
    def _stored(*columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        observations, actions, rewards, terminated, _, successors = columns
        return observations, actions, rewards, 1.0 - terminated.float(), successors


class Cpprb(Peer):
    name, package = "cpprb", "cpprb"

    def build(self) -> None:
        from cpprb import ReplayBuffer as Buffer

        work = self.workload
        wide, narrow = {"shape": work.observation_size}, {"shape": work.action_size}
        fields = {"obs": wide, "act": narrow, "rew": {}, "next_obs": wide, "done": {}}
        self.buffer = Buffer(work.rows, fields)

    def put(self, first: int, steps: Steps) -> None:
        self.buffer.add(**self.prepare(Steps(*flat(*steps))))

    def sample(self, batches: int, size: int) -> dict[str, Array]:
        return self.buffer.sample(batches * size)

    def columns(self, sampled: dict[str, Array]) -> Columns:
        observations, actions, rewards, successors, done = (
            sampled[key] for key in ("obs", "act", "rew", "next_obs", "done")
        )
        return Columns(observations, actions, rewards[:, 0], 1.0 - done[:, 0], successors, None)

    def prepare(self, step: Steps) -> dict[str, Array]:
        return {
            "obs": step.observations,
            "act": step.actions,
            "rew": step.rewards,
            "next_obs": step.successors,
            "done": step.terminated,
        }

    def add(self, prepared: dict[str, Array]) -> None:
        self.buffer.add(**prepared)


class TorchRL(Peer):
    """ReplayBuffer with LazyTensorStorage and RandomSampler; TensorDictReplayBuffer takes a little longer."""

    name, package = "TorchRL", "torchrl"

    def build(self) -> None:
        from torchrl import torchrl_logger
        from torchrl.data import LazyTensorStorage, RandomSampler
        from torchrl.data import ReplayBuffer as Buffer

        torchrl_logger.setLevel("WARNING")
        storage = LazyTensorStorage(self.workload.rows, device="cpu")
        self.buffer = Buffer(storage=storage, sampler=RandomSampler())

    def put(self, first: int, steps: Steps) -> None:
        self.buffer.extend(self.prepare(Steps(*flat(*steps))))

    def sample(self, batches: int, size: int) -> Any:
        return self.buffer.sample(batches * size)

    def columns(self, sampled: Any) -> Columns:
        following = sampled["next"]
        masks = 1.0 - following["terminated"].float()
        return Columns(
            sampled["observation"].numpy(),
            sampled["action"].numpy(),
            following["reward"].numpy()[:, 0],
            masks.numpy()[:, 0],
            following["observation"].numpy(),
            None,
        )

    def prepare(self, step: Steps) -> Any:
        from tensordict import TensorDict

        rows = len(step.rewards)
        following = {
            "observation": torch.from_numpy(step.successors),
            "reward": torch.from_numpy(step.rewards)[:, None],
            "terminated": torch.from_numpy(step.terminated)[:, None],
        }
        content = {
            "observation": torch.from_numpy(step.observations),
            "action": torch.from_numpy(step.actions),
            "next": TensorDict(following, batch_size=[rows]),
        }
        return TensorDict(content, batch_size=[rows])

    def add(self, prepared: Any) -> None:
        self.buffer.extend(prepared)


class StableBaselines3(Peer):
    name, package = "Stable-Baselines3", "stable-baselines3"

    def build(self) -> None:
        from gymnasium.spaces import Box
        from stable_baselines3.common.buffers import ReplayBuffer as Buffer

        work = self.workload
        observations = Box(-np.inf, np.inf, (work.observation_size,), np.float32)
        actions = Box(-1.0, 1.0, (work.action_size,), np.float32)
        self.buffer = Buffer(work.rows, observations, actions, device="cpu", n_envs=work.lanes)

    def put(self, first: int, steps: Steps) -> None:
        buffer = self.buffer
        stop = first + len(steps.rewards)
        buffer.observations[first:stop] = steps.observations
        buffer.next_observations[first:stop] = steps.successors
        buffer.actions[first:stop] = steps.actions
        buffer.rewards[first:stop] = steps.rewards
        buffer.dones[first:stop] = steps.terminated | steps.truncated
        buffer.timeouts[first:stop] = steps.truncated

    def finish(self) -> None:
        self.buffer.full = True

    def sample(self, batches: int, size: int) -> Any:
        return self.buffer.sample(batches * size)

    def columns(self, sampled: Any) -> Columns:
        return Columns(
            sampled.observations.numpy(),
            sampled.actions.numpy(),
            sampled.rewards.numpy()[:, 0],
            1.0 - sampled.dones.numpy()[:, 0],
            sampled.next_observations.numpy(),
            None,
        )

    def prepare(self, step: Steps) -> tuple[Any, ...]:
        done = step.terminated | step.truncated
        infos: list[dict[str, bool]] = [
            {"TimeLimit.truncated": True} if cut else {} for cut in step.truncated.tolist()
        ]
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

    def build(self) -> None:
        buffer, self.add_jit, _ = flashbax_functions(self.workload.rows, 1)
        self.jax = importlib.import_module("jax")
        self.key = self.jax.random.key(0)
        item = Steps(*(column[0, 0] for column in self.workload.at(0, 1)))
        self.state = buffer.init(self.prepare(item))

    def put(self, first: int, steps: Steps) -> None:
        self.add(self.prepare(Steps(*flat(*steps))))

    def sample(self, batches: int, size: int) -> Any:
        draw = flashbax_functions(self.workload.rows, batches * size)[2]
        self.key, sampled = draw(self.state, self.key)
        return self.jax.block_until_ready(sampled)

    def columns(self, sampled: Any) -> Columns:
        rows = {name: np.asarray(leaf) for name, leaf in sampled.items()}
        masks = 1.0 - rows["terminated"].astype(np.float32)
        observations, successors = rows["observations"], rows["successors"]
        return Columns(observations, rows["actions"], rows["rewards"], masks, successors, None)

    def prepare(self, step: Steps) -> Any:
        kept = step._asdict()
        del kept["truncated"]
        return {name: self.jax.numpy.array(column) for name, column in kept.items()}

    def add(self, prepared: Any) -> None:
        self.state = self.jax.block_until_ready(self.add_jit(self.state, prepared))


class PerTask(Peer):
    """One buffer per task for those that know no tasks: each gives its share, and the shares are joined."""

    def __init__(self, kind: type[Peer], workload: Workload) -> None:
        self.kind, self.name = kind, f"{kind.name} x {workload.tasks}"
        super().__init__(workload)

    def build(self) -> None:
        work = self.workload
        self.parts = [self.kind(work.one_task()) for _ in range(work.tasks)]

    def put(self, first: int, steps: Steps) -> None:
        streams = self.workload.streams
        for task, part in enumerate(self.parts):
            lanes = slice(task * streams, (task + 1) * streams)
            part.put(first, Steps(*(column[:, lanes] for column in steps)))

    def finish(self) -> None:
        for part in self.parts:
            part.finish()

    def sample(self, batches: int, size: int) -> Any:
        share, more = divmod(size, len(self.parts))
        drawn = [part.sample(batches, share + (task < more)) for task, part in enumerate(self.parts)]
        return self._join(drawn)

    def columns(self, sampled: Any) -> Columns:
        return self.parts[0].columns(sampled)

    def _join(self, drawn: Sequence[Any]) -> Any:
        first = drawn[0]
        if isinstance(first, dict) and isinstance(next(iter(first.values())), np.ndarray):
            return {name: np.concatenate([part[name] for part in drawn]) for name in first}
        if isinstance(first, dict):
            jax = importlib.import_module("jax")
            return {name: jax.numpy.concatenate([part[name] for part in drawn]) for name in first}
        if isinstance(first, tuple):
            columns = zip(*drawn, strict=True)
            return type(first)(*(None if c[0] is None else torch.cat(c) for c in columns))
        return torch.cat(list(drawn))


PEERS: tuple[type[Peer], ...] = (Authors, Cpprb, IndexSelect, TorchRL, StableBaselines3, Flashbax)


def make(kind: type[Peer], workload: Workload) -> Peer:
    """An empty buffer of this kind."""
    return kind(workload) if kind.tasks or workload.tasks == 1 else PerTask(kind, workload)


def fill(peers: Sequence[Peer], failed: Callable[[Peer, Exception], None]) -> None:
    """Fills buffers of one workload together, so that each chunk is made once."""
    good = list(peers)
    for first, steps in peers[0].workload.chunks() if peers else ():
        for peer in list(good):
            try:
                peer.put(first, steps)
                if first + len(steps.rewards) == peer.workload.steps:
                    peer.finish()
            except Exception as error:
                good.remove(peer)
                failed(peer, error)
