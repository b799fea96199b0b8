"""Environments that `gymnasium.make` makes, dm_control's and HumanoidBench's too, here or in other processes.

In processes of their own they run in Gymnasium's AsyncVectorEnv, with three additions. A worker imports
neither brc_fast nor the script that was started, hence no torch: the factory travels by value. A step that is
not finite ends the episode inside the worker, marked as lost. And when a worker dies, all are started anew.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import TimeoutError, get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from threading import Thread
from types import ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from torch import Tensor

from brc_fast.errors import InputError, MissingExtraError, WorkerError
from brc_fast.errors import SimulatorError as SimulatorError

from . import vector
from .base import Step
from .vector import SUCCESS, VectorAdapter, check_spaces, in_order, is_image, leaves, simulator_error

log = logging.getLogger(__name__)

# Torch and JAX run threads here, whose locks `fork` would copy; `spawn` starts 8 dogs half as fast.
_START_METHOD = "forkserver"
_SCHEDULER = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # signals that one sends to every process of a job
_STOP_SECONDS = 2.0  # given to all workers to end by themselves
_ENDED = (EOFError, ConnectionError)  # of a pipe without a process at its other end
_HOW_TO_LOOK = "--env.processes False runs it in this process and shows the traceback"


class _Failure(WorkerError):
    """What happened to a worker or to an environment in this process, in words."""


def make_gym(
    task: str,
    num_envs: int,
    seed: int = 0,
    *,
    episode_length: int | None = None,
    processes: bool | None = None,
    restarts: int = 3,
    step_seconds: float | None = None,
    kwargs: Mapping[str, Any] | None = None,
    privileged: bool = True,
    render: bool = False,
) -> VectorAdapter:
    """Slots of a task `gym/<id>`, `gym/<module>:<id>`, `dmc/<domain>-<task>` or `humanoidbench/<id>`.

    episode_length:  steps after which an episode is truncated; default: the task's own
    processes:       one process per slot, or all slots in this one; default: processes for dmc and
                     humanoidbench with more than one slot. An id that Gymnasium has only as a vector
                     environment always runs in this one
    restarts:        times that all workers are started anew, after one died, before WorkerError is raised
    kwargs:          arguments of the environments' constructor
    privileged:      of observations of the keys state and privileged_state, give the critic the second
    render:          make environments that can draw themselves, where they can
    step_seconds:    a worker that takes longer than this for a step or a reset counts as dead; default: none

    Raises InputError for an id that does not exist or cannot be used, MissingExtraError for `dmc` without its
    extra. What an environment raises is the cause of a SimulatorError.
    """
    suite, _, name = task.partition("/")
    given, kwargs = kwargs, dict(kwargs or {})
    if suite == "dmc":
        _require_dmc()
        name = f"shimmy:dm_control/{name}-v0"
        if episode_length is not None:
            kwargs["task_kwargs"] = {"time_limit": math.inf}
    elif suite == "humanoidbench":
        name = f"humanoid_bench:{name}"
    if episode_length is not None:
        kwargs["max_episode_steps"] = episode_length

    module, _, registered = name.rpartition(":")
    with _explained(task, given), _silence():
        if module:
            importlib.import_module(module)
        spec = gymnasium.spec(registered)
        if spec.entry_point is None:
            venv = gymnasium.make_vec(spec, num_envs, **kwargs)
            limit = episode_length or spec.max_episode_steps
            space, size = in_order(venv.single_observation_space, privileged)
            sizes: dict[str, Any] = {"max_episode_steps": limit, "privileged_size": size}
            return VectorAdapter(venv, task, seed, observation_space=space, **sizes)
        # A spec also carries what the running script has registered; a module registers its own everywhere.
        made = name if module else replace(spec, order_enforce=False)
        factory = SlotFactory(made, kwargs, privileged)
        if render and suite == "gym":
            with suppress(TypeError):  # of a constructor that takes no render_mode
                drawn = SlotFactory(made, {**kwargs, "render_mode": "rgb_array"}, privileged)
                drawn.spare = drawn()
                factory = drawn
        probe = factory.spare = factory.spare or factory()
    check_spaces(task, probe.unflattened, probe.action_space)
    if processes is None:
        processes = suite != "gym" and num_envs > 1

    def build() -> Any:
        with _explained(task):
            return Workers(factory, num_envs, step_seconds) if processes else Here(factory, num_envs)

    limit, own = probe.max_episode_steps, probe.unflattened
    return GymAdapter(build, task, seed, limit, restarts, probe.privileged_size, own)


def list_gym(backend: str) -> tuple[str, ...]:
    """Task ids of gym/ (of each name the newest version), dmc/ or humanoidbench/; MissingExtraError or
    InputError where it is not installed."""
    if backend == "gym":
        newest: dict[tuple[str | None, str], Any] = {}
        for spec in gymnasium.registry.values():
            known = newest.get((spec.namespace, spec.name))
            if known is None or (spec.version or 0) > (known.version or 0):
                newest[spec.namespace, spec.name] = spec
        return tuple(f"gym/{spec.id}" for spec in newest.values())
    if backend == "dmc":
        _require_dmc()
        with _silence():
            suite = importlib.import_module("dm_control.suite")
        return tuple(f"dmc/{domain}-{task}" for domain, task in suite.ALL_TASKS)
    with _explained("humanoidbench/...", None), _silence():
        before = set(gymnasium.registry)
        importlib.import_module("humanoid_bench")
    return tuple(f"humanoidbench/{name}" for name in gymnasium.registry if name not in before)


def _nearest(backend: str, name: str) -> str:
    """Tasks whose ids resemble `name`."""
    if backend == "gym":
        module, colon, wanted = name.rpartition(":")
        tasks = {known: f"gym/{module}{colon}{known}" for known in gymnasium.registry}
    else:
        wanted = name
        tasks = {task.partition("/")[2]: task for task in list_gym(backend)}
    by_lower = {known.lower(): task for known, task in tasks.items()}
    close = difflib.get_close_matches(wanted.lower(), by_lower, n=4, cutoff=0.0)
    return ", ".join(by_lower[key] for key in close)


def _require_dmc() -> None:
    if any(importlib.util.find_spec(module) is None for module in ("shimmy", "dm_control")):
        raise MissingExtraError("dmc/... environments", "dmc")


class Slot(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One environment: flat float32 observations or an image, no infos but "success", and "lost" for NaN.

    The last `privileged_size` numbers of an observation are the critic's alone.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], privileged: bool = True) -> None:
        super().__init__(env)
        space: Any = env.observation_space
        if hasattr(env.unwrapped, "observation_spec"):  # dm_control has an order, Gymnasium sorts by name
            names = env.unwrapped.observation_spec()
            space = gymnasium.spaces.Dict([(name, space[name]) for name in names])
        space, self.privileged_size = in_order(space, privileged)
        self.unflattened = space
        self.image = is_image(space)
        if not self.image:
            size = sum(math.prod(leaf.shape or ()) for leaf in leaves(space, space))
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
            self._zeros = np.zeros(size, np.float32)
        self.busy = False  # in a call of the environment, also after it has raised
        spec = env.spec
        self.max_episode_steps = None if spec is None else spec.max_episode_steps
        own_limit = getattr(env.unwrapped, "_step_limit", math.inf)  # dm_control counts by itself
        if self.max_episode_steps is None and math.isfinite(own_limit):
            self.max_episode_steps = math.ceil(own_limit)

    def _read(self, observation: Any) -> NDArray[Any]:
        """A new array of one observation; ValueError if it has not the shape, or size, of its space."""
        if self.image:
            image = np.array(observation)
            if image.shape != self.unflattened.shape or image.dtype != np.uint8:
                wanted, got = list(self.unflattened.shape), list(image.shape)
                raise ValueError(f"an observation must be uint8 {wanted}, got {image.dtype} {got}")
            return image
        with np.errstate(over="ignore"):  # infinity, which is told where it is checked
            if isinstance(self.unflattened, gymnasium.spaces.Box):
                flat = np.array(observation, np.float32).ravel()
            else:
                parts = [np.ravel(leaf) for leaf in leaves(self.unflattened, observation)]
                flat = np.concatenate(parts, dtype=np.float32)
        if flat.shape != self._zeros.shape:
            raise ValueError(f"an observation must have {self._zeros.size} numbers, got {flat.size}")
        return flat

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.busy = True
        result = self.env.reset(**kwargs)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"reset must return (observation, info), got {result!r:.60}")
        self._last = self._read(result[0])
        self.busy = False
        return self._last, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.busy = True
        result = self._step(action)
        self.busy = False
        return result

    def _step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            if _wants_five_values(error):
                form = "(observation, reward, terminated, truncated, info)"
                raise ValueError(f"step must return {form}: {error}") from error
            if type(error).__name__ != "PhysicsError":  # dm_control's word for a state that is not finite
                raise
            return self._last, 0.0, False, True, {"lost": True}
        seen = self._read(observation)
        if isinstance(reward, np.ndarray):
            if reward.size != 1:
                raise ValueError(f"a reward must be one number, got {reward.size}")
            reward = reward.item()
        # Zero times what is not finite is NaN; a fifth of the time of np.isfinite(seen).all().
        finite = self.image or math.isfinite(seen.dot(self._zeros))
        if not (finite and math.isfinite(reward)):
            return self._last, 0.0, False, True, {"lost": True}
        self._last = seen
        told = next((info[key] for key in SUCCESS if info.get(key) is not None), None)
        kept = {} if told is None else {"success": bool(told > 0)}
        return seen, reward, bool(terminated), bool(truncated), kept


def _wants_five_values(error: Exception) -> bool:
    """Whether a wrapper of Gymnasium's could not unpack what the environment's step returned."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    by = "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__"))
    return isinstance(error, ValueError) and "to unpack" in str(error) and by.startswith("gymnasium.wrappers")


def _leave_signals_to_the_parent() -> None:
    """In a worker: what a terminal or a scheduler sends to all processes is the parent's to answer, which
    ends its workers; and no worker outlives it, not even one that is stuck in a step."""
    for name in ("SIGINT", "SIGHUP"):  # of a terminal; programs that the environment starts ignore them too
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    for name in _SCHEDULER:  # those programs do not: an environment may end them so
        signal.signal(getattr(signal, name), lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # see _lean_processes
    parent = parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        Thread(target=end_with_parent, daemon=True).start()


class SlotFactory:
    """Makes one environment; can be sent to another process."""

    def __init__(self, spec: Any, kwargs: dict[str, Any], privileged: bool = True) -> None:
        self.spec = spec
        self.kwargs = kwargs
        self.privileged = privileged
        self.home = os.getpid()
        # For its processes. They cannot render, unless the user has set MUJOCO_GL.
        self.environment = {
            "OMP_NUM_THREADS": "1",
            "MUJOCO_GL": os.environ.get("MUJOCO_GL", "disabled"),
        }
        self.spare: Slot | None = None  # made to learn the sizes, handed out first

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "spare": None}

    def __call__(self) -> Slot:
        if os.getpid() != self.home:
            os.environ.update(self.environment)  # others may have started the server it was forked from
            _leave_signals_to_the_parent()
        if self.spare is not None:
            env, self.spare = self.spare, None
            return env
        with _silence():
            made = gymnasium.make(self.spec, disable_env_checker=True, **self.kwargs)
            return Slot(made, self.privileged)


class Here(SyncVectorEnv[Any, Any]):
    """A SyncVectorEnv that says which slot raised and what (`_Failure`)."""

    def __init__(self, factory: SlotFactory, num_envs: int) -> None:
        super().__init__([factory] * num_envs, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        self._slots: list[Any] = list(self.envs)

    def reset(self, **kwargs: Any) -> Any:
        with self._watched():
            return super().reset(**kwargs)

    def step(self, actions: Any) -> Any:
        with self._watched():
            return super().step(actions)

    def close_extras(self, **kwargs: Any) -> None:
        for slot, env in enumerate(self._slots):
            try:
                env.close()
            except Exception as error:  # must not hide why it is closed
                log.warning("slot %d raised %s when it was closed: %s", slot, type(error).__name__, error)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        for env in self._slots:
            env.busy = False
        try:
            yield
        except (Exception, SystemExit) as error:
            slot = next((slot for slot, env in enumerate(self._slots) if env.busy), None)
            if slot is None:
                raise
            raise _Failure(f"slot {slot} raised {type(error).__name__}: {error}") from error


class Workers(AsyncVectorEnv[Any, Any]):
    """An AsyncVectorEnv that says which worker failed and how (`_Failure`), and whose `close` cannot hang."""

    def __init__(self, factory: SlotFactory, num_envs: int, seconds: float | None = None) -> None:
        self._seconds = seconds  # for a step, None: as long as it takes
        mode = AutoresetMode.SAME_STEP
        try:
            with self._watched(), _lean_processes(factory):
                super().__init__([factory] * num_envs, copy=False, context=_START_METHOD, autoreset_mode=mode)
        except _Failure:
            self.close()
            raise
        # At the end of this process multiprocessing would ask daemons with a SIGTERM, and wait for them.
        Finalize(self, _kill, (self.processes,), exitpriority=0)

    def reset(self, **kwargs: Any) -> Any:
        with self._watched():
            self.reset_async(**kwargs)
            return self.reset_wait(self._seconds)

    def step_async(self, actions: Any) -> None:
        with self._watched():
            super().step_async(actions)

    def step_wait(self, timeout: float | None = None) -> Any:
        with self._watched():
            return super().step_wait(self._seconds if timeout is None else timeout)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except _ENDED as error:
            raise _Failure(self._who_ended()) from error
        except TimeoutError as error:
            late = [slot for slot, pipe in enumerate(self.parent_pipes) if not pipe.poll()]
            told = " and ".join(f"the process of slot {slot}" for slot in late) or "a process"
            raise _Failure(f"{told} took longer than {self._seconds:g} s") from error

    def _who_ended(self) -> str:
        ready = wait([process.sentinel for process in self.processes], timeout=5.0)
        ended = [slot for slot, process in enumerate(self.processes) if process.sentinel in ready]
        for slot in ended:
            self.processes[slot].join(1.0)  # sets the exit code
        codes = [
            f"the process of slot {slot} ended with exit code {self.processes[slot].exitcode}"
            for slot in ended
        ]
        return " and ".join(codes) or "a process closed its pipe"

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        failed = [slot for slot, success in enumerate(successes) if not success]
        if failed:
            try:
                slot, kind, message, traceback = self.error_queue.get(timeout=2.0)
            except Exception as error:  # the exception could not be pickled
                raise _Failure(f"slot {failed[0]} raised an exception") from error
            raised = RuntimeError(f"in the process of slot {slot}:\n{traceback}")
            raise _Failure(f"slot {slot} raised {kind.__name__}: {message}") from raised

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        for pipe in self.parent_pipes:
            with suppress(OSError):
                pipe.send(("close", None))
        deadline = time.monotonic() + _STOP_SECONDS
        for pipe, process in zip(self.parent_pipes, self.processes, strict=True):
            if process.pid is None:  # it did not start
                continue
            with suppress(EOFError, OSError):  # not `join`, which does not wait where the server is gone
                while pipe.poll(max(0.0, deadline - time.monotonic())):
                    pipe.recv_bytes()
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            process.join()
            pipe.close()


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()


@contextmanager
def _lean_processes(factory: SlotFactory) -> Iterator[None]:
    """Let processes that start now import only what an environment needs, and compute in one thread."""
    before = {name: os.environ.get(name) for name in factory.environment}
    main = sys.modules["__main__"]
    ours = [sys.modules[__name__], vector]
    os.environ.update(factory.environment)
    # The server that all workers are forked from imports these once; one that already runs stays as it is.
    preload = [factory.spec.partition(":")[0]] if isinstance(factory.spec, str) else []
    get_context(_START_METHOD).set_forkserver_preload(["gymnasium", *preload])
    sys.modules["__main__"] = ModuleType("__main__")  # a worker would run its file again
    for module in ours:
        cloudpickle.register_pickle_by_value(module)
    # The server outlives these too, as it hands on what it blocks, and so does the tracker that it starts
    # with. SIGTERM is not among them: other processes of this server may be ended by it.
    signals = [getattr(signal, name) for name in _SCHEDULER if name != "SIGTERM"] + [signal.SIGHUP]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for module in ours:
            cloudpickle.unregister_pickle_by_value(module)
        sys.modules["__main__"] = main
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class GymAdapter(VectorAdapter):
    """A VectorAdapter that builds its environments anew when a worker process has failed, and says which
    environment raised in this one."""

    def __init__(
        self,
        build: Callable[[], Any],
        task: str,
        seed: int,
        max_episode_steps: int | None,
        restarts: int,
        privileged_size: int = 0,
        unflattened: gymnasium.Space[Any] | None = None,
    ) -> None:
        self._build = build
        self._restarts = self._restarts_left = restarts
        try:
            venv = build()
        except _Failure as failure:
            raise WorkerError(f"{task} did not start: {failure}; {_HOW_TO_LOOK}") from failure
        sizes: dict[str, Any] = {"max_episode_steps": max_episode_steps, "privileged_size": privileged_size}
        super().__init__(venv, task, seed, lost_key="lost", unflattened=unflattened, **sizes)

    def launch(self, actions: Tensor) -> Any:
        try:
            return super().launch(actions)
        except _Failure as failure:
            return failure

    def collect(self, launched: Any) -> Step:
        if isinstance(launched, _Failure):
            return self._lost_step(launched)
        try:
            return super().collect(launched)
        except _Failure as failure:
            return self._lost_step(failure)

    def _lost_step(self, failure: _Failure) -> Step:
        successors = torch.from_numpy(self._observations)
        self._replace(failure)
        self._lost += self.num_envs
        if self.successes is not None:
            self.successes = torch.zeros(self.num_envs, dtype=torch.bool)
        yes, no = torch.ones(self.num_envs, dtype=torch.bool), torch.zeros(self.num_envs, dtype=torch.bool)
        self._restarted()
        seen = self.split(torch.from_numpy(self._observations.copy()), successors)
        return Step(*seen, torch.zeros(self.num_envs), no, yes, yes.clone())

    def _restarted(self, given: Sequence[int | None] | None = None) -> Tensor:
        while True:
            try:
                return super()._restarted(given)
            except _Failure as failure:
                self._replace(failure)

    def _replace(self, failure: _Failure) -> None:
        """Build all environments anew, or give up; the caller has to reset them."""
        task, when = self.task_names[0], self.when
        if isinstance(self.venv, Here):
            simulator_error(f"{task}, {when}: {failure}", failure.__cause__)
        while True:
            if not self._restarts_left:
                self.close()
                told = f"{task}, {when}: {failure}, after {self._restarts} restarts; {_HOW_TO_LOOK}"
                if failure.__cause__ is None or isinstance(failure.__cause__, _ENDED):
                    raise WorkerError(told) from failure
                simulator_error(told, failure.__cause__)
            self._restarts_left -= 1
            log.warning(
                "%s, %s: %s; starting all %d environments anew, %d restarts left",
                task,
                when,
                failure,
                self.num_envs,
                self._restarts_left,
            )
            self.venv.close()
            try:
                self.venv = self._build()
                return
            except _Failure as again:
                failure = again


@contextmanager
def _silence() -> Iterator[None]:
    """No notes on old versions of a task, old words in a MuJoCo model, or a display that is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("mujoco") is None:
            yield
            return
        import mujoco

        before, ours = mujoco.get_mju_user_warning(), lambda message: None
        mujoco.set_mju_user_warning(ours)  # MuJoCo's own also writes a log file to the work folder
        try:
            yield
        finally:
            if mujoco.get_mju_user_warning() is ours:  # else dm_control has put its own there
                mujoco.set_mju_user_warning(before)


@contextmanager
def _explained(task: str, kwargs: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn what Gymnasium says of an id, or a constructor of its arguments, into an InputError, and what it
    raises otherwise into an error that names the task."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name == "humanoid_bench":
            raise InputError(
                f"{task} needs humanoid_bench, which is not on the package index: clone "
                "https://github.com/carlosferrazza/humanoid-bench and run pip install -e . in it"
            ) from error
        if error.name in ("imageio", "packaging"):  # Gymnasium's MuJoCo tasks import them
            raise MissingExtraError(task, "gym") from error
        module = task.partition("/")[2].rpartition(":")[0]
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise InputError(
                f"{task} needs a module that is not installed: {error}; if it is a file of your own, say "
                "where: PYTHONPATH=FOLDER brc-fast ..."
            ) from error
        raise InputError(f"{task} needs a module that is not installed: {error}") from error
    except ImportError as error:
        raise InputError(f"{task} cannot be imported: {error}") from error
    except gymnasium.error.Error as error:
        prefix, _, rest = task.partition("/")
        known = rest.rpartition(":")[2] in gymnasium.registry
        hint = "" if known else f"; nearest: {_nearest(prefix, rest)}"
        raise InputError(f"{task} cannot be made: {error}{hint}") from error
    except (InputError, _Failure):
        raise
    except Exception as error:
        told = f"{task} cannot be made: {type(error).__name__}: {error}"
        asks = isinstance(error, TypeError) and "missing" in str(error)
        if asks or (kwargs and isinstance(error, (TypeError, ValueError))):
            raise InputError(f"{told}; kwargs (--env.kwargs) are the arguments of its constructor") from error
        simulator_error(told, error)
