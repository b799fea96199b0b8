"""Reset and step of MJX tasks, compiled for a number of slots and kept between processes."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from brc_fast.errors import InputError

from . import _jax
from .base import PRIVILEGED, STATE, Step
from .suites import MJX_TASKS, resolve

_jax.setup()

import jax  # noqa: E402
import jax.export  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.interpreters.partial_eval import dce_jaxpr  # noqa: E402

if TYPE_CHECKING:
    from ._playground import Randomizer


# Start states of a task are computed n at a time into a ring of so many blocks. With three, a block that a
# step may need is there when the host has not yet heard how many the step before that one used.
BLOCKS = 3


class Slots(NamedTuple):
    """What one step hands to the next and nobody else sees; its buffers are donated."""

    state: Any  # per task, by name: leaves [n, ...] of model and State that a step reads
    steps: Any  # [N] int32, steps taken in the current episode
    restarts: Any  # [T] int32, start states used so far
    dropped: Any  # [T] int32, transitions lost to NaN so far


class Start(NamedTuple):
    """n start states of every task."""

    observations: Any  # [N, O + P], as those of a Step here
    state: Any  # as in Slots


for kind in (Slots, Start, Step):
    jax.export.register_namedtuple_serialization(kind, serialized_name=f"brc_fast.{kind.__name__}")


class Sizes(NamedTuple):
    """What is known of a program without tracing it."""

    observation: int  # O, of the widest task
    privileged: int  # P, of the widest task; 0 where none has what the critic alone sees
    action: int  # A, of the widest task
    episode_lengths: list[int]  # steps, per task
    own: list[tuple[int, int]]  # numbers of an observation and of an action, per task


class Programs:
    """Reset and step of T tasks, n slots each, compiled; shared by all environments of them.

    Tracing takes seconds. What it gives, the programs before compilation, is kept in the user's cache folder
    next to JAX's own cache of compiled ones: a second process needs neither MuJoCo nor Playground to go on.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        impl: str,
        num_envs: int,
        randomize: bool | Randomizer,
        privileged: bool = True,
    ) -> None:
        self._lock = threading.Lock()
        self._ready = False
        kept = _Kept(tasks, impl, num_envs, randomize, privileged)
        found = kept.read()
        if found is None:
            traced = _Traced(tasks, impl, num_envs, randomize, privileged)
            found = traced.sizes, traced.export()
            kept.write(*found)
        self.sizes, self._exported = found

    def compile(self) -> None:
        """Make `reset` and `step` callable; waits while another thread does so."""
        with self._lock:
            if self._ready:
                return
            with ThreadPoolExecutor(2) as pool:  # the compiler itself uses one core
                self.reset, self.step = pool.map(_compiled, ("reset", "step"), self._exported, ((), (0,)))
            slots, observations, ring, *_ = _arguments(self._exported[1])
            self.state = slots, observations, ring
            self._ready = True


programs = functools.cache(Programs)


class _Traced:
    """Reset and step as JAX functions of the state of all slots.

    MuJoCo's state has about a hundred arrays, nearly all of them results that the next step computes anew.
    Only the few that it reads are carried on; the compiler then leaves out the work behind the others.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        impl: str,
        num_envs: int,
        randomize: bool | Randomizer,
        privileged: bool = True,
    ) -> None:
        from ._playground import Task

        self.num_envs = num_envs
        self._tasks = [Task(resolve(task)[1], impl, randomize) for task in tasks]
        self._keys = jax.ShapeDtypeStruct((len(tasks), 2), jnp.uint32)
        self._count = jax.ShapeDtypeStruct((), jnp.int32)
        self._template = jax.eval_shape(self._playground_reset, self._keys, self._count)
        for task, (_, state) in zip(tasks, self._template, strict=True):
            _check_seen(task, state.obs)
        self._privileged = privileged
        self._action_sizes = [task.env.action_size for task in self._tasks]
        self.sizes = Sizes(
            max(_seen(state).shape[1] for _, state in self._template),
            max(self._beside(state).shape[1] for _, state in self._template),
            max(self._action_sizes),
            [task.episode_length for task in self._tasks],
            [
                (_seen(state).shape[1], size)
                for (_, state), size in zip(self._template, self._action_sizes, strict=True)
            ],
        )
        self._actions = jax.ShapeDtypeStruct((len(tasks) * num_envs, self.sizes.action), jnp.float32)
        self._find_carried()

    def export(self) -> tuple[Any, Any]:
        """Both programs for arguments of these shapes."""
        count = len(self._tasks)
        start = jax.eval_shape(self._reset, self._keys, self._count)
        steps = jax.ShapeDtypeStruct((count * self.num_envs,), jnp.int32)
        per_task = jax.ShapeDtypeStruct((count,), jnp.int32)
        slots = Slots(start.state, steps, per_task, per_task)
        arguments = (slots, start.observations, (start,) * BLOCKS, self._actions, per_task)
        return _export(self._reset, self._keys, self._count), _export(self._step, *arguments)

    def _find_carried(self) -> None:
        """Follow the step backwards from its results to the leaves of model and state that decide them."""
        paths, self._structure = jax.tree.flatten_with_path(self._template)
        names = [jax.tree_util.keystr(path, simple=True, separator=".").split(".", 2) for path, _ in paths]
        jaxpr = jax.make_jaxpr(self._playground_step)(self._template, self._actions).jaxpr
        results = ("obs", "reward", "done", "data.qpos", "data.qvel")
        used = [part == "1" and leaf.startswith(results) for _, part, leaf in names]
        while True:
            _, read = dce_jaxpr(jaxpr, used)
            wider = [a or b for a, b in zip(used, read, strict=False)]  # the actions come last
            if wider == used:
                break
            used = wider
        self._carried: list[dict[str, int]] = [{} for _ in self._tasks]
        for place, (task, part, leaf) in enumerate(names):
            if read[place]:
                self._carried[int(task)][leaf if part == "1" else f"model.{leaf}"] = place

    def _playground_reset(self, keys: Any, fill: Any) -> Any:
        """Per task (varied leaves of the models, State), all [n, ...]."""
        from ._playground import Task, together

        models, starts = [], []
        for task, key in zip(self._tasks, keys, strict=True):
            key = jax.random.fold_in(key, fill)
            starts.append((jax.random.split(key, self.num_envs),))
            models.append(task.draw(jax.random.split(jax.random.fold_in(key, 1), self.num_envs)))
        states = together(self._tasks, models, Task.reset, starts)
        return [_strongly_typed(pair) for pair in zip(models, states, strict=True)]

    def _playground_step(self, slots: Any, actions: Any) -> Any:
        from ._playground import Task, together

        rows = jnp.split(actions, len(self._tasks))
        models = [model for model, _ in slots]
        arguments = [
            (state, row[:, :size])
            for (_, state), row, size in zip(slots, rows, self._action_sizes, strict=True)
        ]
        states = together(self._tasks, models, Task.step, arguments)
        return [_strongly_typed(pair) for pair in zip(models, states, strict=True)]

    def _pick(self, slots: Any) -> Any:
        leaves = jax.tree.leaves(slots)
        return [{name: leaves[place] for name, place in carried.items()} for carried in self._carried]

    def _complete(self, state: Any) -> Any:
        """Models and States again; what no step reads is zero."""
        leaves = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(self._template)]
        for values, carried in zip(state, self._carried, strict=True):
            for name, place in carried.items():
                leaves[place] = values[name]
        return jax.tree.unflatten(self._structure, leaves)

    def _joined(self, slots: Any) -> Any:
        """What the policy sees, and behind it what the critic alone does, of all tasks: [N, O + P]."""

        def padded(x: Any, size: int) -> Any:
            return jnp.pad(x.astype(jnp.float32), ((0, 0), (0, size - x.shape[1])))

        seen = jnp.concatenate([padded(_seen(state), self.sizes.observation) for _, state in slots])
        if not self.sizes.privileged:
            return seen
        beside = [padded(self._beside(state), self.sizes.privileged) for _, state in slots]
        return jnp.concatenate([seen, jnp.concatenate(beside)], axis=1)

    def _beside(self, state: Any) -> Any:
        """What the critic alone sees of a State, [n, P]; [n, 0] of a task that has no such."""
        if self._privileged and isinstance(state.obs, dict) and PRIVILEGED in state.obs:
            return state.obs[PRIVILEGED]
        return jnp.zeros((self.num_envs, 0))

    def _reset(self, keys: Any, fill: Any) -> Start:
        """n start states per task; `fill` counts the calls with the same keys [T, 2]."""
        slots = self._playground_reset(keys, fill)
        return Start(self._joined(slots), self._pick(slots))

    def _step(self, slots: Slots, observations: Any, ring: Any, actions: Any, limits: Any) -> Any:
        count, n = len(self._tasks), self.num_envs
        after = self._playground_step(self._complete(slots.state), actions)
        joined = self._joined(after)
        rewards = jnp.concatenate([state.reward for _, state in after])
        done = jnp.concatenate([state.done for _, state in after])
        steps = slots.steps + 1

        finite = [
            jnp.all(jnp.isfinite(jnp.concatenate((state.data.qpos, state.data.qvel), axis=1)), axis=1)
            for _, state in after
        ]
        dropped = ~(jnp.concatenate(finite) & jnp.all(jnp.isfinite(joined), axis=1) & jnp.isfinite(rewards))
        successors = jnp.where(dropped[:, None], observations, joined)
        rewards = jnp.where(dropped, 0.0, rewards)
        terminated = (done > 0) & ~dropped  # Playground also calls a NaN state done
        truncated = (steps >= jnp.repeat(limits, n)) | dropped
        ended = terminated | truncated

        ended_of = ended.reshape(count, n)
        places = (slots.restarts[:, None] + jnp.cumsum(ended_of, axis=1) - 1) % (BLOCKS * n)

        def restarted(task: int, old: Any, *fresh: Any) -> Any:
            # MuJoCo Warp has scratch of all slots together, written before it is read.
            if old.shape[:1] != (n,):
                return old
            mask = ended_of[task].reshape((n,) + (1,) * (old.ndim - 1))
            return jnp.where(mask, jnp.concatenate(fresh)[places[task]], old)

        # Always computed: a `cond` is no faster on the CPU and makes the host wait on a GPU.
        kept = self._pick(after)
        state = [
            jax.tree.map(
                functools.partial(restarted, task), kept[task], *(block.state[task] for block in ring)
            )
            for task in range(count)
        ]
        rows = [jnp.split(x, count) for x in (joined, *(block.observations for block in ring))]
        current = jnp.concatenate([restarted(task, *(part[task] for part in rows)) for task in range(count)])
        restarts = slots.restarts + jnp.sum(ended_of, axis=1, dtype=jnp.int32)
        lost = slots.dropped + jnp.sum(dropped.reshape(count, n), axis=1, dtype=jnp.int32)
        slots = Slots(state, jnp.where(ended, 0, steps), restarts, lost)
        # `restarts` once more, for the host: the slots' own is donated to the next step.
        return slots, restarts, Step(current, successors, rewards, terminated, truncated, dropped)


class _Kept:
    """Traced programs of Playground's own DeepMind Control tasks, in the user's cache folder."""

    def __init__(
        self,
        tasks: tuple[str, ...],
        impl: str,
        num_envs: int,
        randomize: bool | Randomizer,
        privileged: bool = True,
    ) -> None:
        # Other tasks read files that may change without a version, and a function has no lasting name.
        fixed = all(resolve(task)[1] in MJX_TASKS for task in tasks) and randomize is False
        here = Path(__file__)
        parts = [tasks, impl, num_envs, privileged, jax.default_backend(), jax.config.jax_enable_x64]
        parts += [_version(name) for name in ("jax", "jaxlib", "mujoco", "mujoco-mjx", "playground")]
        parts += [(here.parent / name).read_text() for name in ("_programs.py", "_playground.py", "base.py")]
        name = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        self._path = _jax.cache_folder() / "programs" / name if fixed else None

    def read(self) -> tuple[Sizes, tuple[Any, Any]] | None:
        """What `write` kept; None where it did not, or where the file is damaged."""
        try:
            if self._path is None or not self._path.exists():
                return None
            head, reset, step = _unpacked(self._path.read_bytes())
            exported = jax.export.deserialize(bytearray(reset)), jax.export.deserialize(bytearray(step))
            return Sizes(**json.loads(head)), exported
        except Exception:  # whatever is wrong with it, tracing makes it anew
            return None

    def write(self, sizes: Sizes, exported: tuple[Any, Any]) -> None:
        if self._path is None or any(isinstance(each, _Unkept) for each in exported):
            return
        try:
            parts = [json.dumps(sizes._asdict()).encode(), *(bytes(each.serialize()) for each in exported)]
            _jax.write_atomically(self._path, _packed(parts))
        except (OSError, ImportError):  # no place for it, or no flatbuffers: the next process traces again
            return


def _packed(parts: list[bytes]) -> bytes:
    """Lengths, a checksum, the parts."""
    body = b"".join(parts)
    head = np.array([len(part) for part in parts], "<u8").tobytes()
    return hashlib.sha256(head + body).digest() + head + body


def _unpacked(data: bytes) -> list[bytes]:
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise InputError("checksum")
    lengths = np.frombuffer(data[32:56], "<u8").tolist()
    ends = (56 + np.cumsum(lengths)).tolist()
    return [data[end - length : end] for length, end in zip(lengths, ends, strict=True)]


def _export(function: Callable[..., Any], *arguments: Any) -> Any:
    """The traced program, in a form that can be kept; where there is none (impl "warp"), the function."""
    try:
        return jax.export.export(jax.jit(function))(*arguments)
    except ValueError:
        return _Unkept(function, arguments)


class _Unkept(NamedTuple):
    call: Callable[..., Any]
    arguments: Any


def _arguments(exported: Any) -> Any:
    """Shapes and types of a program's arguments."""
    if isinstance(exported, _Unkept):
        return exported.arguments
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.in_avals]
    return jax.tree.unflatten(exported.in_tree, shapes)[0]


def _compiled(name: str, exported: Any, donated: tuple[int, ...]) -> Any:
    def program(*arguments: Any) -> Any:
        return exported.call(*arguments)

    program.__name__ = f"brc_fast_{name}"  # in profiles and in JAX's cache
    return jax.jit(program, donate_argnums=donated).lower(*_arguments(exported)).compile()


def _seen(state: Any) -> Any:
    """What the policy sees of a State, [n, O]: with several kinds of observations, "state"."""
    return state.obs[STATE] if isinstance(state.obs, dict) else state.obs


def _check_seen(task: str, observations: Any) -> None:
    """Raise InputError unless `_seen` finds a vector."""
    kinds = observations if isinstance(observations, dict) else {STATE: observations}
    if STATE not in kinds or any(name in kinds and kinds[name].ndim != 2 for name in (STATE, PRIVILEGED)):
        told = ", ".join(f"{name} {list(kind.shape[1:])}" for name, kind in kinds.items())
        raise InputError(f"{task} must observe a vector, with several kinds under the name state; got {told}")


def _strongly_typed(tree: Any) -> Any:
    """Cast every leaf to its own dtype: a weakly typed one would change the signature from call to call."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), tree)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
