"""MuJoCo Playground's environments as pure functions of N slots, the simulator called once for all tasks.

Tasks of one body (HumanoidStand, HumanoidWalk, HumanoidRun) differ in rewards and start states, not in what
the simulator computes, and the simulator is nearly all of what is compiled and run. So every task's own code
is traced up to its call of the simulator, the calls of all tasks are made as one over all their slots, and
the code goes on from the results.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from brc_fast.errors import InputError

from . import _jax
from .suites import MJX_LOCOMOTION, MJX_MANIPULATION, resolve

_jax.setup()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import mujoco  # noqa: E402
from mujoco import mjx  # noqa: E402
from mujoco_playground import registry  # noqa: E402
from mujoco_playground._src import mjx_env  # noqa: E402

Randomizer = Callable[[Any, Any], tuple[Any, Any]]
"""(model, keys [N, 2]) -> (model, some of its leaves [N, ...]; the same tree with 0 at those, else None)."""
_SWAPPED = threading.RLock()  # tracing swaps functions of Playground, which is no business of other threads


class Task:
    """One task of Playground."""

    def __init__(self, name: str, impl: str, randomize: bool | Randomizer) -> None:
        self.env = _load(name, impl)
        config = self.env._config
        self.action_repeat = int(config.get("action_repeat", 1))
        self.episode_length = -(-int(config.episode_length) // self.action_repeat)
        self.leaves, self.structure = jax.tree.flatten(self.env.mjx_model)
        self.joins = impl == "jax"
        self.kind = jax.tree.structure(_without_idle_sizes(self.env)) if self.joins else None
        self.randomizer = _randomizer(name, randomize)
        self.varied = self._varied()
        self.calls: dict[Any, _Simulator] = {}

    def _varied(self) -> tuple[int, ...]:
        """Places of the model's leaves that the randomizer draws."""
        if self.randomizer is None:
            return ()
        keys = jax.ShapeDtypeStruct((1, 2), jnp.uint32)
        axes: Any = None

        def draw(keys: Any) -> Any:
            nonlocal axes
            model, axes = self.randomizer(self.env.mjx_model, keys)  # type: ignore[misc]
            return model

        jax.eval_shape(draw, keys)
        axis_of = jax.tree.leaves(axes, is_leaf=lambda x: x is None)
        return tuple(place for place, axis in enumerate(axis_of) if axis is not None)

    def draw(self, keys: Any) -> Any:
        """The varied leaves of N models, each [N, ...]."""
        if self.randomizer is None:
            return []
        leaves = jax.tree.leaves(self.randomizer(self.env.mjx_model, keys)[0])
        return [leaves[place] for place in self.varied]

    @contextmanager
    def model(self, varied: Any) -> Iterator[None]:
        """Within, the environment's own code sees the model of one slot."""
        if not self.varied:
            yield
            return
        leaves = list(self.leaves)
        for place, leaf in zip(self.varied, varied, strict=True):
            leaves[place] = leaf
        usual, self.env._mjx_model = self.env._mjx_model, jax.tree.unflatten(self.structure, leaves)
        try:
            yield
        finally:
            self.env._mjx_model = usual

    def reset(self, key: Any) -> Any:
        """Start state of one slot."""
        return self.env.reset(key)

    def step(self, state: Any, action: Any) -> Any:
        """Successor of one slot; with an action repeat, rewards add up until the task ends."""
        out = self.env.step(state, action)
        for _ in range(self.action_repeat - 1):
            further = self.env.step(out, action)
            further = further.replace(reward=out.reward + further.reward)
            over = out.done > 0
            out = jax.tree.map(lambda now, then, over=over: jnp.where(over, now, then), out, further)
        return out


@dataclass(frozen=True)
class _Call:
    """A call of the simulator: equal ones can be made as one."""

    kind: str
    substeps: int
    operands: Any  # the tree of data and controls, and the shapes and types of its leaves
    model: Any  # the same of the model


class _Pending(Exception):
    """Thrown from inside a task's code at a call whose result is not known yet."""

    def __init__(self, kind: str, substeps: int, operands: Any) -> None:
        self.kind, self.substeps, self.operands = kind, substeps, operands


_SENSORS_OF_PLACE = (
    *("FRAMEPOS", "FRAMEQUAT", "FRAMEXAXIS", "FRAMEYAXIS", "FRAMEZAXIS", "FRAMELINVEL", "FRAMEANGVEL"),
    *("FRAMELINACC", "FRAMEANGACC", "ACCELEROMETER", "VELOCIMETER", "GYRO", "MAGNETOMETER"),
    *("FORCE", "TORQUE"),
)
_step, _forward = mjx_env.step, mjx.forward


@contextmanager
def _answered(answers: Sequence[Any]) -> Iterator[None]:
    """Within, the simulator's calls return `answers` in turn; the first beyond them throws _Pending."""
    left = iter(answers)

    def step(model: Any, data: Any, action: Any, n_substeps: int = 1) -> Any:
        for answer in left:
            return answer
        raise _Pending("step", n_substeps, (data, action))

    def forward(model: Any, data: Any) -> Any:
        for answer in left:
            return answer
        raise _Pending("forward", 0, (data,))

    mjx_env.step, mjx.forward = step, forward
    try:
        yield
    finally:
        mjx_env.step, mjx.forward = _step, _forward


def together(
    tasks: Sequence[Task], varied: Sequence[Any], run: Callable[..., Any], arguments: Sequence[Any]
) -> list[Any]:
    """`run(task, *arguments)` of every slot of every task; calls of the simulator that agree are made as one.

    varied:     per task, leaves of the models, each [N, ...]
    arguments:  per task, a tuple of trees of [N, ...]
    Returns per task the results [N, ...].
    """
    with _SWAPPED:
        try:
            return _in_rounds(tasks, varied, run, arguments)
        except jax.errors.UnexpectedTracerError:  # the simulator is called inside a loop or a condition
            return [_alone(*each, run) for each in zip(tasks, varied, arguments, strict=True)]


def _alone(task: Task, varied: Any, arguments: Any, run: Callable[..., Any]) -> Any:
    def one(varied: Any, arguments: Any) -> Any:
        with task.model(varied):
            return run(task, *arguments)

    return jax.vmap(one)(varied, arguments)


def _in_rounds(
    tasks: Sequence[Task], varied: Sequence[Any], run: Callable[..., Any], arguments: Sequence[Any]
) -> list[Any]:
    results: dict[int, Any] = {}
    answers: list[list[Any]] = [[] for _ in tasks]
    while len(results) < len(tasks):
        waiting: dict[_Call, list[tuple[int, Any]]] = {}
        for number, task in enumerate(tasks):
            if number in results:
                continue
            result, call, operands = _attempt(task, varied[number], run, arguments[number], answers[number])
            if call is None:
                results[number] = result
            else:
                waiting.setdefault(call, []).append((number, operands))
        for call, callers in waiting.items():
            numbers = [number for number, _ in callers]
            sizes = [jax.tree.leaves(arguments[i])[-1].shape[0] for i in numbers]
            parts = _simulate(
                call, [tasks[i] for i in numbers], [varied[i] for i in numbers], dict(callers), sizes
            )
            for number, part in zip(numbers, parts, strict=True):
                answers[number].append(part)
    return [results[number] for number in range(len(tasks))]


def _attempt(
    task: Task, varied: Any, run: Callable[..., Any], arguments: Any, answers: list[Any]
) -> tuple[Any, _Call | None, Any]:
    """The results, or the call that has to be answered first with its operands [N, ...]."""
    pending: _Pending | None = None

    def one(varied: Any, arguments: Any, answers: Any) -> Any:
        nonlocal pending
        with task.model(varied), _answered(answers):
            try:
                return run(task, *arguments), ()
            except _Pending as thrown:
                pending = thrown
                return (), thrown.operands

    result, operands = jax.vmap(one)(varied, arguments, answers)
    if pending is None:
        return result, None, ()
    shapes = tuple((leaf.shape[1:], str(leaf.dtype)) for leaf in jax.tree.leaves(operands))
    model = tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in task.leaves)
    call = _Call(
        pending.kind,
        pending.substeps,
        (jax.tree.structure(operands), shapes),
        # MuJoCo Warp keeps the contacts of all slots in one array: its calls cannot be joined.
        (task.kind, model) if task.joins else id(task),
    )
    return result, call, operands


def _simulate(
    call: _Call, tasks: list[Task], varied: list[Any], operands: dict[int, Any], sizes: list[int]
) -> list[Any]:
    """One call for the slots of several tasks, its results again by task."""
    key = call, *map(id, tasks)
    if key not in tasks[0].calls:
        tasks[0].calls[key] = _Simulator(call, tasks)
    simulator = tasks[0].calls[key]
    if len(tasks) == 1:
        (only,) = operands.values()
        return [simulator.run(simulator.per_slot(tasks, varied, sizes), only)]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *operands.values())
    out = simulator.run(simulator.per_slot(tasks, varied, sizes), joined)
    ends = np.cumsum(sizes).tolist()
    return [
        jax.tree.map(lambda leaf, begin=end - size, end=end: leaf[begin:end], out)
        for size, end in zip(sizes, ends, strict=True)
    ]


class _Simulator:
    """A call of the simulator for all slots of some tasks. It is traced once, however often they are.

    Leaves of the model in which the tasks agree are constants, the others have a row per slot.
    """

    def __init__(self, call: _Call, tasks: list[Task]) -> None:
        first = tasks[0]
        self.places = [
            place
            for place, leaf in enumerate(first.leaves)
            if any(place in task.varied for task in tasks)
            or not all(np.array_equal(leaf, task.leaves[place]) for task in tasks[1:])
        ]

        def one(own: Any, operands: Any) -> Any:
            leaves = list(first.leaves)
            for place, leaf in zip(self.places, own, strict=True):
                leaves[place] = leaf
            model = jax.tree.unflatten(first.structure, leaves)
            if call.kind == "step":
                return _step(model, *operands, call.substeps)
            return _forward(model, *operands)

        self.run = jax.jit(jax.vmap(one))

    def per_slot(self, tasks: list[Task], varied: list[Any], sizes: list[int]) -> list[Any]:
        """The leaves of `places`, a row for every slot."""
        return [
            jnp.concatenate(
                [
                    drawn[task.varied.index(place)]
                    if place in task.varied
                    else jnp.broadcast_to(task.leaves[place], (size, *np.shape(task.leaves[place])))
                    for task, drawn, size in zip(tasks, varied, sizes, strict=True)
                ]
            )
            for place in self.places
        ]


def _without_idle_sizes(env: Any) -> Any:
    """The model without sizes that MJX keeps outside its arrays and does not read: of sites that at most tell
    where they are, and of geometries where there is no height field. The tasks of Finger differ in such."""
    model, source = env.mjx_model, env.mj_model
    placed = [getattr(mujoco.mjtSensor, f"mjSENS_{name}") for name in _SENSORS_OF_PLACE]
    sized = (source.sensor_objtype == mujoco.mjtObj.mjOBJ_SITE) & ~np.isin(source.sensor_type, placed)
    seen = np.isin(np.arange(source.nsite), source.sensor_objid[sized])
    model = model.replace(site_size=np.where(seen[:, None], model.site_size, 0.0))
    sizes = getattr(model._impl, "geom_rbound_hfield", None)
    if source.nhfield or not isinstance(sizes, np.ndarray):
        return model
    return model.tree_replace({"_impl.geom_rbound_hfield": np.zeros_like(sizes)})


def _load(name: str, impl: str) -> Any:
    """Playground's environment, without MuJoCo's notes on old spellings in the models that it ships."""
    robots = name in MJX_LOCOMOTION or name in MJX_MANIPULATION
    if robots and not mjx_env.MENAGERIE_PATH.exists():
        raise InputError(
            f"mjx/{name} needs the MuJoCo menagerie, which MuJoCo Playground expects in "
            f"{mjx_env.MENAGERIE_PATH}: "
            "git clone https://github.com/google-deepmind/mujoco_menagerie.git there and check out "
            f"{mjx_env.MENAGERIE_COMMIT_SHA}"
        )
    if impl == "warp" and importlib.util.find_spec("warp") is None:
        raise InputError("impl 'warp' needs the package warp-lang: pip install warp-lang, or take impl 'jax'")
    # Playground 0.2 compares versions as text: for it MuJoCo 3.17 comes before 3.3 and still has `find_body`.
    lacks_old_name = not hasattr(mujoco.MjSpec, "find_body")
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)  # the default also writes a log file to the work folder
    if lacks_old_name:
        mujoco.MjSpec.find_body = mujoco.MjSpec.body
    try:
        return registry.load(name, config_overrides={"impl": impl})
    except NotImplementedError as error:
        hint = "; impl 'warp' may have it" if impl == "jax" else ""
        raise InputError(f"mjx/{name} cannot be loaded with impl {impl!r}: {error}{hint}") from error
    finally:
        mujoco.set_mju_user_warning(handler)
        if lacks_old_name:
            del mujoco.MjSpec.find_body


def _randomizer(name: str, randomize: bool | Randomizer) -> Randomizer | None:
    if not isinstance(randomize, bool):
        return randomize
    if not randomize:
        return None
    found: Randomizer | None = registry.get_domain_randomizer(name)
    if found is None:
        raise InputError(
            f"randomize: MuJoCo Playground has no domain randomization for mjx/{name}; pass a function "
            "(model, keys [N, 2]) -> (model, in_axes) instead of True"
        )
    return found


def mj_model(task: str) -> mujoco.MjModel:
    """The MuJoCo model of a task, to render with."""
    return _load(resolve(task)[1], "jax").mj_model
