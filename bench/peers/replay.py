"""Replay buffers behind one face, each used through its documented interface, and transitions to know again.

Each transition carries a number, its tag, and every value of it follows from the tag. So a sampled row proves
by itself that its observation, action, reward, mask and successor were stored together. The same steps come
again and again; the first of them follows the last one without a break.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import Differs
from numpy.typing import NDArray

from brc_fast import DeviceReplayBuffer, ReplayBuffer

Array = NDArray[Any]
EPISODE = 97  # an end in so many transitions; a prime, so that every stream has ends
LEAST = 4096  # different transitions
ALPHA, BETA = 0.6, 0.4  # of draws by priority, as Schaul et al. 2016 have them for Atari


class Steps(NamedTuple):
    """Transitions [S, ...] of all environments; the fields and their order are those of ReplayBuffer.add."""

    observations: Array
    actions: Array
    rewards: Array
    terminated: Array
    truncated: Array
    successors: Array


# A sampled batch for the check: [n, O], [n, A], [n], [n], [n, O], and [n] where tasks are told apart
COLUMNS = ("observations", "actions", "rewards", "masks", "next_observations", "task_ids")
Columns = Sequence[Array]


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
    def shapes(self) -> list[tuple[int, ...]]:
        """Of a row in each column but the last."""
        return [(self.observation,), (self.action,), (), (), (self.observation,)]

    @property
    def row_bytes(self) -> int:
        """A transition with two observations, reward and mask, all float32."""
        return 4 * (2 * self.observation + self.action + 2)

    @property
    def different(self) -> int:
        """Tags; whole steps, in a number that seldom divides what a buffer holds."""
        return self.lanes * (max(16, LEAST // self.lanes) + 1)

    def transitions(self, tags: Array) -> Steps:
        """Those of these tags. At an end the successor is one that no transition starts from."""
        kind = tags % (2 * EPISODE)
        there = np.where(tags % EPISODE == 0, -1 - tags, (tags + self.lanes) % self.different)
        here, there = values(tags, self.observation), values(there, self.observation)
        actions, rewards = values(tags, self.action), tags.astype(np.float32)
        return Steps(here, actions, rewards, kind == 0, kind == EPISODE, there)

    def each_step(self) -> list[Steps]:
        """Every different transition, in the order of the tags."""
        tags = np.arange(self.different).reshape(-1, self.lanes)
        return [self.transitions(step) for step in tags]

    def check(self, batch: Columns) -> None:
        """Differs unless `batch` holds stored transitions, whole ones and not always the same."""
        tags = np.rint(batch[0][:, 0] * 2.0).astype(np.int64)
        if tags.min() < 0 or tags.max() >= self.different:
            raise Differs("an observation was never stored")
        right = *masked(self.transitions(tags)), tags % self.lanes // self.streams
        for name, got, wanted in zip(COLUMNS, batch, right, strict=False):
            if got.shape != wanted.shape:
                raise Differs(f"{name} have shape {list(got.shape)} instead of {list(wanted.shape)}")
            if wrong := np.count_nonzero((got != wanted).reshape(len(tags), -1).any(1)):
                raise Differs(f"{wrong} of {len(tags)} sampled {name} do not belong to their observations")
        stored = min(self.different, self.rows * self.tasks)
        if tags.size * 4 <= stored and np.unique(tags).size < tags.size // 2:
            raise Differs("the same few transitions are drawn again and again")


def values(tags: Array, width: int) -> Array:
    """[..., width] float32 that follow from the tags; the first column is half of the tag."""
    return tags.astype(np.float32)[..., None] * np.linspace(0.5, 1.0, width, dtype=np.float32)


def masked(step: Steps) -> list[Array]:
    """The columns of a step."""
    masks = 1.0 - step.terminated.astype(np.float32)
    return [step.observations, step.actions, step.rewards, masks, step.successors]


# ---------------------------------------------------------------- buffers


class Peer(NamedTuple):
    """A buffer. `add` and `sample` are timed; what a user prepares once per step anyway (a TensorDict, an
    `infos` list, arrays on JAX's device), filling it and `columns` are not."""

    work: Stored
    prepare: Callable[[Steps], Any]  # one step [S, ...] in the form that `add` takes
    add: Callable[[Any], object]
    sample: Callable[[int, int], Any]  # U batches of B: U * B rows, or [U, B, ...], as the library has it
    columns: Callable[[Any], Columns]  # of what `sample` returned, as arrays of U * B rows
    buffer: Any = None

    def fill(self, any_rows: bool = False) -> None:
        """By `add`, as many rows at once as it takes: of all steps, or those of one."""
        work, rows = self.work, self.work.rows * self.work.tasks
        step = work.different if any_rows else work.lanes
        made = [self.prepare(work.transitions(tags)) for tags in np.arange(work.different).reshape(-1, step)]
        for place in range(rows // step):
            self.add(made[place % len(made)])
        if left := rows % step:
            self.add(self.prepare(work.transitions(np.arange(left))))

    def check(self, batches: int, size: int) -> None:
        """Differs unless a sample holds what was stored."""
        self.work.check(self.columns(self.sample(batches, size)))


def new_priorities(count: int) -> Array:
    """[count] float32, of those that every buffer gets."""
    return np.random.default_rng(0).random(count, np.float32) + np.float32(0.01)


def ours(
    work: Stored,
    tensors: bool = False,
    kind: Callable[..., Any] = ReplayBuffer,
    alpha: float | None = None,
) -> Peer:
    """`tensors`: `add` is given torch tensors."""
    ids = np.repeat(np.arange(work.tasks), work.streams)
    buffer = kind(work.rows, work.observation, work.action, task_ids=ids, alpha=alpha)

    def prepare(step: Steps) -> Sequence[Any]:
        return list(map(torch.from_numpy, step)) if tensors else step

    def columns(sampled: Any) -> Columns:
        return [field.flatten(0, 1).cpu().numpy() for field in sampled.columns]

    def by_priority(batches: int, size: int) -> Any:
        batch = buffer.sample(size, batches, beta=BETA)
        buffer.update_priorities(batch.indices, priorities(batches * size).reshape(batches, size))
        return batch

    priorities = cache(new_priorities)
    sample = by_priority if alpha else lambda batches, size: buffer.sample(size, batches)
    return Peer(work, prepare, lambda step: buffer.add(*step), sample, columns, buffer)


def authors(work: Stored) -> Peer:
    """The layout of the BRC authors' buffer: [T, capacity, ...] arrays, both observations, one pointer."""
    arrays = [np.empty((work.tasks, work.rows, *shape), np.float32) for shape in work.shapes]
    pointer = 0

    def prepare(step: Steps) -> list[Array]:
        return [column.reshape(work.tasks, work.streams, *column.shape[1:]) for column in masked(step)]

    def add(columns: list[Array]) -> None:
        nonlocal pointer
        for array, column in zip(arrays, columns, strict=True):
            array[:, pointer : pointer + work.streams] = column
        pointer = (pointer + work.streams) % work.rows

    def draw(size: int) -> list[Array]:
        task = np.random.randint(0, work.tasks, size)  # noqa: NPY002  as the authors draw
        step = np.random.randint(0, work.rows, size)  # noqa: NPY002
        return [array[task, step] for array in arrays]

    def sample(batches: int, size: int) -> list[Array]:
        drawn = [draw(size) for _ in range(batches)]
        return drawn[0] if batches == 1 else [np.stack(parts) for parts in zip(*drawn, strict=True)]

    def columns(sampled: list[Array]) -> Columns:
        return [array.reshape(-1, *shape) for array, shape in zip(sampled, work.shapes, strict=True)]

    return Peer(work, prepare, add, sample, columns, arrays)


def index_select(work: Stored) -> Peer:
    """Separate torch tensors, both observations; a batch is one torch.index_select from each, into memory
    that the next one of its size overwrites."""
    rows, pointer = work.rows * work.tasks, 0
    tensors = [torch.empty(rows, *shape) for shape in work.shapes]
    if work.tasks > 1:
        tensors.append(torch.arange(work.tasks).repeat_interleave(work.streams).repeat(work.steps))
    batches_of: dict[int, list[torch.Tensor]] = {}

    def add(columns: list[torch.Tensor]) -> None:
        nonlocal pointer
        for tensor, column in zip(tensors, columns, strict=False):
            tensor[pointer : pointer + len(column)] = column
        pointer = (pointer + len(columns[2])) % rows

    def sample(batches: int, size: int) -> list[torch.Tensor]:
        if (count := batches * size) not in batches_of:
            batches_of[count] = [tensor.new_empty(count, *tensor.shape[1:]) for tensor in tensors]
        index = torch.randint(rows, (count,))
        for tensor, batch in zip(tensors, batches_of[count], strict=True):
            torch.index_select(tensor, 0, index, out=batch)
        return batches_of[count]

    return Peer(work, lambda step: list(map(torch.from_numpy, masked(step))), add, sample, arrays_of)


def arrays_of(tensors: Sequence[torch.Tensor]) -> Columns:
    return [tensor.numpy() for tensor in tensors]


def cpprb(work: Stored, alpha: float | None = None) -> Peer:
    from cpprb import PrioritizedReplayBuffer
    from cpprb import ReplayBuffer as Buffer

    wide = {"shape": work.observation}
    fields = {"obs": wide, "act": {"shape": work.action}, "rew": {}, "done": {}, "next_obs": wide}
    priorities = cache(new_priorities)
    buffer = PrioritizedReplayBuffer(work.rows, fields, alpha=alpha) if alpha else Buffer(work.rows, fields)

    def by_priority(batches: int, size: int) -> dict[str, Array]:
        sampled = buffer.sample(batches * size, beta=BETA)
        buffer.update_priorities(sampled["indexes"], priorities(batches * size))
        return sampled

    def prepare(step: Steps) -> dict[str, Array]:
        columns = step.observations, step.actions, step.rewards, step.terminated, step.successors
        return dict(zip(fields, columns, strict=True))

    def columns(sampled: dict[str, Array]) -> Columns:
        here, actions, rewards, done, there = (sampled[name] for name in fields)
        return [here, actions, rewards[:, 0], 1.0 - done[:, 0], there]

    sample = by_priority if alpha else lambda batches, size: buffer.sample(batches * size)
    return Peer(work, prepare, lambda step: buffer.add(**step), sample, columns)


def torchrl(work: Stored, alpha: float | None = None) -> Peer:
    """ReplayBuffer with LazyTensorStorage and RandomSampler; TensorDictReplayBuffer takes a little longer."""
    from tensordict import TensorDict
    from torchrl import torchrl_logger
    from torchrl.data import LazyTensorStorage, PrioritizedSampler, RandomSampler
    from torchrl.data import ReplayBuffer as Buffer

    torchrl_logger.setLevel("WARNING")
    sampler = PrioritizedSampler(work.rows, alpha, BETA) if alpha else RandomSampler()
    buffer = Buffer(storage=LazyTensorStorage(work.rows, device="cpu"), sampler=sampler)
    priorities = cache(lambda count: torch.from_numpy(new_priorities(count)))

    def by_priority(batches: int, size: int) -> Any:
        sampled, told = buffer.sample(batches * size, return_info=True)
        buffer.update_priority(told["index"], priorities(batches * size))
        return sampled

    def prepare(step: Steps) -> Any:
        here, actions, rewards, done, _, there = map(torch.from_numpy, step)
        after = {"observation": there, "reward": rewards[:, None], "terminated": done[:, None]}
        content = {"observation": here, "action": actions, "next": TensorDict(after, [len(rewards)])}
        return TensorDict(content, [len(rewards)])

    def columns(sampled: Any) -> Columns:
        after = sampled["next"]
        rewards, masks = after["reward"][:, 0], 1.0 - after["terminated"].float()[:, 0]
        return arrays_of([sampled["observation"], sampled["action"], rewards, masks, after["observation"]])

    sample = by_priority if alpha else lambda batches, size: buffer.sample(batches * size)
    return Peer(work, prepare, buffer.extend, sample, columns)


def stable_baselines3(work: Stored) -> Peer:
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import ReplayBuffer as Buffer

    observations = Box(-np.inf, np.inf, (work.observation,), np.float32)
    actions = Box(-1.0, 1.0, (work.action,), np.float32)
    buffer = Buffer(work.rows, observations, actions, device="cpu", n_envs=work.lanes)

    def prepare(step: Steps) -> tuple[Any, ...]:
        infos = [{"TimeLimit.truncated": True} if cut else {} for cut in step.truncated.tolist()]
        done = step.terminated | step.truncated
        return step.observations, step.successors, step.actions, step.rewards, done, infos

    def columns(got: Any) -> Columns:
        rewards, masks = got.rewards[:, 0], 1.0 - got.dones[:, 0]
        return arrays_of([got.observations, got.actions, rewards, masks, got.next_observations])

    return Peer(work, prepare, lambda step: buffer.add(*step), lambda u, b: buffer.sample(u * b), columns)


def flashbax(work: Stored) -> Peer:
    """The item buffer, every function under jit, its state donated where it changes."""
    import flashbax
    import jax

    def buffer(rows: int) -> Any:
        return flashbax.make_item_buffer(work.rows, 1, rows, add_batches=True)

    @partial(jax.jit, static_argnums=2)
    def draw(state: Any, key: Any, rows: int) -> Any:
        key, now = jax.random.split(key)
        return key, buffer(rows).sample(state, now).experience

    def prepare(step: Steps) -> list[Any]:
        return list(map(jax.numpy.array, masked(step)))

    def add(columns: Any) -> None:
        nonlocal state
        state = jax.block_until_ready(added(state, columns))

    def sample(batches: int, size: int) -> Any:
        nonlocal key
        key, sampled = draw(state, key, batches * size)
        return jax.block_until_ready(sampled)

    added = jax.jit(buffer(1).add, donate_argnums=0)
    key = jax.random.key(np.random.default_rng().integers(2**31))  # tasks have buffers of their own
    state = buffer(1).init(prepare(Steps(*(column[0] for column in work.each_step()[0]))))
    return Peer(work, prepare, add, sample, lambda sampled: list(map(np.asarray, sampled)))


class Kind(NamedTuple):
    """How to make a buffer."""

    make: Callable[[Stored], Peer]
    tasks: bool = False  # knows tasks; otherwise there is one buffer for each
    any_rows: bool = True  # `add` takes any number of transitions, not only a step of all environments


KINDS = {
    "brc-fast": Kind(ours, tasks=True, any_rows=False),
    "brc-fast, tensors": Kind(partial(ours, tensors=True), tasks=True, any_rows=False),
    "authors' layout (numpy)": Kind(authors, tasks=True, any_rows=False),
    "cpprb": Kind(cpprb),
    "torch.index_select": Kind(index_select, tasks=True),
    "TorchRL": Kind(torchrl),
    "Stable-Baselines3": Kind(stable_baselines3, any_rows=False),
    "flashbax (jit)": Kind(flashbax),
}
PRIORITIZED = {  # those of them that draw by priority; a sample also sets the priorities of what it holds
    "brc-fast": Kind(partial(ours, alpha=ALPHA), tasks=True, any_rows=False),
    "cpprb": Kind(partial(cpprb, alpha=ALPHA)),
    "TorchRL": Kind(partial(torchrl, alpha=ALPHA)),
}


def on_device(device: str) -> dict[str, Kind]:
    """Ours with batches there. The thread of `prefetched` gathers two of them ahead and then rests."""

    def prepare(step: Steps) -> list[torch.Tensor]:
        return [torch.from_numpy(column).to(device) for column in step]

    def there(work: Stored) -> Peer:
        return ours(work, kind=partial(DeviceReplayBuffer, device=device))._replace(prepare=prepare)

    def copied(work: Stored) -> Peer:
        peer = ours(work)
        add = lambda step: peer.add([column.cpu() for column in step])  # noqa: E731
        sample = lambda batches, size: peer.sample(batches, size).to(device)  # noqa: E731
        return peer._replace(prepare=prepare, add=add, sample=sample)

    def prefetched(work: Stored) -> Peer:
        peer, streams = copied(work), dict[tuple[int, int], Any]()

        def sample(batches: int, size: int) -> Any:
            if (batches, size) not in streams:
                streams[batches, size] = peer.buffer.prefetch(size, batches, device=device)
            return next(streams[batches, size])

        return peer._replace(sample=sample)

    makes = {"device": there, "prefetched": prefetched, "copied": copied}
    return {name: Kind(make, tasks=True, any_rows=False) for name, make in makes.items()}


def filled(kind: Kind, work: Stored) -> Peer:
    """A full buffer; one per task where it knows no tasks: each gives its share, and these are joined."""
    apart = not kind.tasks
    parts = [kind.make(work._replace(tasks=1) if apart else work) for _ in range(work.tasks if apart else 1)]
    for part in parts:
        part.fill(kind.any_rows)
    if len(parts) == 1:
        return parts[0]

    def sample(batches: int, size: int) -> Columns:
        share, more = divmod(size, len(parts))
        drawn = [p.columns(p.sample(batches, share + (task < more))) for task, p in enumerate(parts)]
        return [np.concatenate(column) for column in zip(*drawn, strict=True)]

    return parts[0]._replace(sample=sample, columns=lambda sampled: sampled)
