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
    package: str  # to name its version
    buffer: Any
    tasks = False  # knows tasks itself; otherwise PerTask holds one for each

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.build()

    def build(self) -> None:
        """Makes the empty buffer."""

    def put(self, first: int, steps: Steps) -> None:
        """Stores steps [k, S, ...], of which the first has the number `first`."""
        self.add(self.prepare(Steps(*flat(*steps))))

    def finish(self) -> None:
        """Runs when the buffer is full."""

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
        """Stores one step of all environments."""
        raise NotImplementedError(self.name)


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


def shapes(work: Workload, *rows: int) -> list[tuple[int, ...]]:
    """Of arrays of observations, actions, rewards, masks and next observations."""
    wide, narrow = (*rows, work.observation_size), (*rows, work.action_size)
    return [wide, narrow, rows, rows, wide]


class Authors(Peer):
    """The layout of the BRC authors' buffer: [T, capacity, ...] arrays, both observations, one pointer."""

    name, package, tasks = "authors' layout (numpy)", "numpy", True

    def build(self) -> None:
        work = self.workload
        self.arrays = [np.empty(shape, np.float32) for shape in shapes(work, work.tasks, work.rows)]
        self.pointer = 0

    def put(self, first: int, steps: Steps) -> None:
        tasks, streams = self.workload.tasks, self.workload.streams
        start, stop = first * streams, (first + len(steps.rewards)) * streams
        for array, column in zip(self.arrays, self.prepare(steps), strict=True):
            by_task = column.reshape(-1, tasks, streams, *column.shape[2:]).swapaxes(0, 1)
            array[:, start:stop] = by_task.reshape(tasks, stop - start, *column.shape[2:])

    def sample(self, batches: int, size: int) -> list[Array]:
        if batches == 1:
            return self._draw(size)
        stacked = [np.empty((batches, size, *array.shape[2:]), np.float32) for array in self.arrays]
        for u in range(batches):
            for whole, part in zip(stacked, self._draw(size), strict=True):
                whole[u] = part
        return stacked

    def _draw(self, size: int) -> list[Array]:
        task = np.random.randint(0, self.workload.tasks, size)  # noqa: NPY002  as the authors draw
        step = np.random.randint(0, self.workload.rows, size)  # noqa: NPY002
        return [array[task, step] for array in self.arrays]

    def columns(self, sampled: list[Array]) -> Columns:
        return Columns(*(sampled if sampled[2].ndim == 1 else flat(*sampled)), None)

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
        self.tensors = [torch.empty(shape) for shape in shapes(work, work.rows * work.tasks)]
        if work.tasks > 1:
            self.tensors.append(torch.arange(work.tasks).repeat_interleave(work.streams).repeat(work.steps))
        self.pointer = 0
        self.batches: dict[int, list[torch.Tensor]] = {}

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
        observations, actions, rewards, terminated, _, successors = map(torch.from_numpy, step)
        return observations, actions, rewards, 1.0 - terminated.float(), successors

    def add(self, prepared: tuple[torch.Tensor, ...]) -> None:
        start, stop = self.pointer, self.pointer + len(prepared[2])
        for tensor, column in zip(self.tensors, prepared, strict=False):
            tensor[start:stop] = column
        self.pointer = stop % len(self.tensors[2])


class Cpprb(Peer):
    name, package = "cpprb", "cpprb"

    def build(self) -> None:
        from cpprb import ReplayBuffer as Buffer

        work = self.workload
        wide, narrow = {"shape": work.observation_size}, {"shape": work.action_size}
        fields = {"obs": wide, "act": narrow, "rew": {}, "next_obs": wide, "done": {}}
        self.buffer = Buffer(work.rows, fields)

    def columns(self, sampled: dict[str, Array]) -> Columns:
        rewards, masks = sampled["rew"][:, 0], 1.0 - sampled["done"][:, 0]
        return Columns(sampled["obs"], sampled["act"], rewards, masks, sampled["next_obs"], None)

    def prepare(self, step: Steps) -> dict[str, Array]:
        here, actions, rewards, done, _, there = step
        return {"obs": here, "act": actions, "rew": rewards, "next_obs": there, "done": done}

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

    def columns(self, sampled: Any) -> Columns:
        following = sampled["next"]
        rewards, masks = following["reward"][:, 0], 1.0 - following["terminated"].float()[:, 0]
        parts = sampled["observation"], sampled["action"], rewards, masks, following["observation"]
        return Columns(*(part.numpy() for part in parts), None)

    def prepare(self, step: Steps) -> Any:
        from tensordict import TensorDict

        observations, actions, rewards, terminated, _, successors = map(torch.from_numpy, step)
        following = {"observation": successors, "reward": rewards[:, None], "terminated": terminated[:, None]}
        after = TensorDict(following, batch_size=[len(rewards)])
        content = {"observation": observations, "action": actions, "next": after}
        return TensorDict(content, batch_size=[len(rewards)])

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
        rows, buffer = slice(first, first + len(steps.rewards)), self.buffer
        buffer.observations[rows], buffer.next_observations[rows] = steps.observations, steps.successors
        buffer.actions[rows], buffer.rewards[rows] = steps.actions, steps.rewards
        buffer.dones[rows], buffer.timeouts[rows] = steps.terminated | steps.truncated, steps.truncated

    def finish(self) -> None:
        self.buffer.full = True

    def columns(self, sampled: Any) -> Columns:
        rewards, masks = sampled.rewards[:, 0], 1.0 - sampled.dones[:, 0]
        parts = sampled.observations, sampled.actions, rewards, masks, sampled.next_observations
        return Columns(*(part.numpy() for part in parts), None)

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

    def build(self) -> None:
        buffer, self.add_jit, _ = flashbax_functions(self.workload.rows, 1)
        self.jax = importlib.import_module("jax")
        self.key = self.jax.random.key(0)
        self.state = buffer.init(self.prepare(Steps(*(column[0, 0] for column in self.workload.at(0, 1)))))

    def sample(self, batches: int, size: int) -> Any:
        draw = flashbax_functions(self.workload.rows, batches * size)[2]
        self.key, sampled = draw(self.state, self.key)
        return self.jax.block_until_ready(sampled)

    def columns(self, sampled: Any) -> Columns:
        rows = {name: np.asarray(leaf) for name, leaf in sampled.items()}
        masks = 1.0 - rows["terminated"].astype(np.float32)
        return Columns(
            rows["observations"], rows["actions"], rows["rewards"], masks, rows["successors"], None
        )

    def prepare(self, step: Steps) -> Any:
        kept = {name: column for name, column in step._asdict().items() if name != "truncated"}
        return {name: self.jax.numpy.array(column) for name, column in kept.items()}

    def add(self, prepared: Any) -> None:
        self.state = self.jax.block_until_ready(self.add_jit(self.state, prepared))


class PerTask(Peer):
    """One buffer per task for those that know no tasks: each gives its share, and the shares are joined."""

    def __init__(self, kind: type[Peer], workload: Workload) -> None:
        self.kind, self.name = kind, f"{kind.name} x {workload.tasks}"
        super().__init__(workload)

    def build(self) -> None:
        self.parts = [self.kind(self.workload.one_task()) for _ in range(self.workload.tasks)]

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
        return self._join(
            [part.sample(batches, share + (task < more)) for task, part in enumerate(self.parts)]
        )

    def columns(self, sampled: Any) -> Columns:
        return self.parts[0].columns(sampled)

    def _join(self, drawn: Sequence[Any]) -> Any:
        first = drawn[0]
        if isinstance(first, dict):
            numpy = isinstance(next(iter(first.values())), np.ndarray)
            library = np if numpy else importlib.import_module("jax").numpy
            return {name: library.concatenate([part[name] for part in drawn]) for name in first}
        if isinstance(first, tuple):
            columns = zip(*drawn, strict=True)
            return type(first)(*(None if c[0] is None else torch.cat(c) for c in columns))
        return torch.cat(list(drawn))


PEERS: tuple[type[Peer], ...] = (Authors, Cpprb, IndexSelect, TorchRL, StableBaselines3, Flashbax)


def filled(
    kinds: Sequence[type[Peer]], workload: Workload, missing: dict[str, BaseException]
) -> dict[str, Peer]:
    """Full buffers by name, filled together, so that each chunk is made once; or why there are none."""
    peers: dict[str, Peer] = {}
    for kind in kinds:
        try:
            single = kind.tasks or workload.tasks == 1
            peer = kind(workload) if single else PerTask(kind, workload)
            peers[peer.name] = peer
        except Exception as error:
            missing[kind.name] = error
    for first, steps in workload.chunks() if peers else ():
        for name, peer in list(peers.items()):
            try:
                peer.put(first, steps)
                if first + len(steps.rewards) == workload.steps:
                    peer.finish()
            except Exception as error:
                missing[name] = error
                del peers[name]
    return peers
