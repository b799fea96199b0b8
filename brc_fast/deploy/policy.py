"""The policy of one task by itself: an nn.Module from what its environment observes to what it does.

    mean, raw log-std = network((observation - mean) * rate)
    action = low + (high - low) * (1 + tanh(mean)) / 2

What is the same for every observation of the task (columns that narrower tasks are padded with, what tells
tasks apart) is part of the first bias; of output layers the task's own columns are kept. A body that norms
or adds its input is given those constants as columns.

Dims:  .. any leading axes, o numbers of an observation and a of an action, of this task alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from brc_fast import __version__
from brc_fast.config import LARGEST, MOST_NETWORKS
from brc_fast.disk import opened, read_json, replace_file, require_replaceable
from brc_fast.errors import InputError, MissingExtraError
from brc_fast.kernels import reference
from brc_fast.kernels.stages import copies_input, shapes_of
from brc_fast.learner.finite import require_finite
from brc_fast.nn import bodies
from brc_fast.nn.modules import Body
from brc_fast.runs.arrays import ArrayFile, Kind, require_kinds, write_arrays
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.spec import Native

if TYPE_CHECKING:
    from brc_fast.agents.brc import BRC


class _Folders:
    """What the mixin of huggingface_hub does, where that is not installed: folders, and no hub."""

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> str | None:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self._save_pretrained(Path(save_directory))
        return None

    def push_to_hub(self, repo_id: str, **_: Any) -> str:
        raise MissingExtraError(f"push_to_hub({repo_id!r})", "hub")

    def _save_pretrained(self, save_directory: Path) -> None:
        raise NotImplementedError


if TYPE_CHECKING:
    Hub = _Folders
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin as Hub
    except ImportError:
        Hub = _Folders

FORMAT = "brc_fast.Policy/1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
LARGEST_POLICY = 2**31  # bytes of the weights, as many as ONNX has in one file


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy is, but for its numbers.

    task:        as its own environment has it
    body, width, depth:  of the network
    inputs:      of the network: o, and constants where they are no part of a bias
    normalized:  whether observations are, by statistics of the run
    run, step:   where it was learned, and at which environment step per task
    version:     of brc-fast, that wrote it
    """

    task: Native
    body: str
    width: int
    depth: int
    inputs: int
    normalized: bool = False
    run: str = ""
    step: int = 0
    version: str = __version__

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"format": FORMAT, **told, "task": self.task.describe()}

    def metadata(self) -> dict[str, Any]:
        """As JSON, what a user of an exported file asks for."""
        task = self.task.describe()
        return {
            "task": self.task.task,
            "observation_size": self.task.observation_size,
            "observation": task["observation"],
            "action_size": self.task.action_size,
            "action_low": task["low"],
            "action_high": task["high"],
            "precision": "float32",
            "run": self.run,
            "step": self.step,
            "brc_fast": self.version,
        }

    @classmethod
    def of(cls, told: Any) -> PolicyConfig:
        """Of what `describe` gave; ValueError, in one line, for anything else."""
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            found = told.get("format") if isinstance(told, dict) else told
            raise ValueError(f"it is no policy of brc-fast: format must be {FORMAT!r}, got {found!r:.60}")
        kinds = {"body": str, "width": int, "depth": int, "inputs": int, "normalized": bool}
        kinds |= {"run": str, "step": int, "version": str}
        for name, kind in kinds.items():
            if type(told.get(name)) is not kind:
                raise ValueError(f"{name} must be {kind.__name__}, got {told.get(name)!r:.60}")
        task = Native.of(told.get("task"))
        if told["body"] not in bodies.BODIES:
            raise ValueError(f"body must be one of {', '.join(bodies.BODIES)}, got {told['body']!r:.60}")
        limits = {
            "width": (1, LARGEST),
            "depth": (0, MOST_NETWORKS),
            "inputs": (task.observation_size, 2**31),
        }
        for name, (least, most) in {**limits, "step": (0, 2**62)}.items():
            if not least <= told[name] <= most:
                raise ValueError(f"{name} must be in [{least}, {most}], got {told[name]}")
        return cls(task, **{name: told[name] for name in kinds})


class Policy(nn.Module, Hub):
    """Actions of one task, within its own bounds, for its observations as they are.

        policy = Policy.from_run("runs/gym-Pendulum-v1-seed0")
        observation, reward, *_ = env.step(policy(observation))

    No padding, normalizing, task id or scaling is left to the caller, and no simulator is needed. Parameters
    are float32 (`.double()` and the like change that) and get no gradient; observations may.
    """

    low: Tensor
    high: Tensor
    mean: Tensor | None
    rate: Tensor | None
    constants: Tensor | None

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        task = config.task
        self.config = config
        with torch.device("meta"):  # to be loaded
            stages = bodies.make(config.body, config.width, config.depth, 2 * task.action_size)
            self.body = Body(stages, config.inputs, members=1)
            none = torch.empty(task.observation_size) if config.normalized else None
            constants = config.inputs - task.observation_size
            self.register_buffer("mean", none)
            self.register_buffer("rate", none)
            self.register_buffer("constants", torch.empty(constants) if constants else None)
        low, high = (np.array(bound) for bound in (task.low, task.high))
        self.symmetric = bool((low == -high).all())
        self.register_buffer("low", _inside(low, high), persistent=False)
        self.register_buffer("high", _inside(high, low), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        task: str | None = None,
        checkpoint: str | int = "last",
        *,
        allow_module: Sequence[str] = (),
    ) -> Self:
        """The policy of a run's folder.

        Args:
            task: its name, where the run learned several. checkpoint: "last", "best", or a step.
            allow_module: modules that a task gym/MODULE:ID may import although they lie in the current
                folder; asked for only of a run that an older version wrote, whose tasks have to be made.
        Raises:
            InputError for a task or checkpoint that the run does not have, files that are damaged, and a task
            whose sizes and bounds the run does not say and whose simulator is not installed.
        """
        from brc_fast.runs.evaluate import restore

        folder = RunFolder(run)
        task, config = cls.task_of(folder, task), folder.config()
        folder.choose(str(checkpoint))
        native = folder.natives().get(task)
        if native is None:
            folder.require_foreign_code([task], allow_module)
            native = _asked(task, dataclasses.asdict(config.env), folder.path)
        step, agent = restore(folder, "cpu", str(checkpoint))
        name = folder.path.resolve().name
        return cls.of(agent, config.tasks.index(task), native, run=name, step=step)

    @staticmethod
    def task_of(folder: RunFolder, task: str | None) -> str:
        """The name of a run's task, of its only one by default; InputError, with the names there are."""
        folder.require_plain()
        tasks = folder.config().tasks
        if task is None and len(tasks) != 1:
            raise InputError(f"{folder.path} learned several tasks, name one: {', '.join(tasks)}")
        if task is not None and task not in tasks:
            raise InputError(f"{folder.path} did not learn {task}; its tasks: {', '.join(tasks)}")
        return tasks[0] if task is None else task

    @classmethod
    def of(cls, agent: BRC, number: int, task: Native, *, run: str = "", step: int = 0) -> Self:
        """The policy of an agent's task `number`, which is this task in its own environment.

        ValueError for a task with more numbers than the agent's.
        """
        sizes = task.observation_size, task.action_size
        most = agent.observation_size, agent.action_size
        if not 0 <= number < agent.num_tasks:
            raise ValueError(f"number must be in [0, T) = [0, {agent.num_tasks}), got {number}")
        if sizes[0] > most[0] or sizes[1] > most[1]:
            raise ValueError(
                f"{task.task} must observe and do at most as many numbers as the agent, {list(most)}, got "
                f"{list(sizes)}"
            )
        agent.updates.join()
        seen, ids = task.observation_size, torch.tensor([number])
        state = {
            f"body.{name}": p.detach().to("cpu", torch.float64)
            for name, p in agent.actor.body.named_parameters()
        }
        statistics = agent.observations
        nothing = torch.zeros(1, most[0], dtype=torch.float64)
        if statistics is not None:
            mean, rate = (x[number, : most[0]].to("cpu", torch.float64) for x in statistics.moments)
            nothing = (nothing - mean) * rate
            state |= {"mean": mean[:seen], "rate": rate[:seen]}
        table = None if agent.critic.table is None else agent.critic.table.detach().to("cpu", torch.float64)
        constants = reference.pack_inputs(nothing, None, table, ids, agent.critic.embedding_norm)[0, seen:]

        stages = agent.actor.body.stages
        head, outputs = f"body.{stages[-1].name}", agent.actor.outputs
        first = number * outputs * (agent.actor.conditioning.heads > 1)
        columns = torch.arange(task.action_size) + first
        columns = torch.cat([columns, columns + agent.action_size])  # mean, raw log-std
        for name in (f"{head}.kernel", f"{head}.bias"):
            state[name] = state[name][..., columns]
        readers = [stage for stage in stages if 0 in stage.uses]
        if not copies_input(stages) and all(stage.after in ("bias", "norm") for stage in readers):
            for stage in readers:
                kernel = state[f"body.{stage.name}.kernel"]
                state[f"body.{stage.name}.kernel"] = kernel[:, :seen]
                state[f"body.{stage.name}.bias"] = (
                    state[f"body.{stage.name}.bias"] + constants @ kernel[:, seen:]
                )
        elif len(constants):
            state["constants"] = constants
        settings = agent.actor_config
        config = PolicyConfig(
            task,
            settings.body,
            settings.width,
            settings.depth,
            inputs=seen + len(state.get("constants", ())),
            normalized=statistics is not None,
            run=run,
            step=step,
        )
        return cls._filled(config, state)

    @classmethod
    def _filled(cls, config: PolicyConfig, state: Mapping[str, Tensor]) -> Self:
        """With these numbers, which fit."""
        policy = cls(config)
        numbers = {name: value.float().contiguous() for name, value in state.items()}
        policy.load_state_dict(numbers, assign=True)
        return policy.requires_grad_(False)

    def forward(
        self,
        observations: Any,
        noise: Tensor | None = None,
        *,
        sample: bool = False,
        generator: Generator | None = None,
    ) -> Any:
        """Actions [.., a] of observations [.., o], in the task's bounds: those of the mean, or a sample.

        Args:
            observations: a tensor; or what numpy makes an array of, or a dictionary with the parts of
                `config.task.observation` by name, and then actions are an array too. They are cast to the
                policy's dtype.
            noise: [.., a], standard normals of a sample. sample: draw them, from `generator`, on the policy's
                device, or torch's own.
        Raises:
            ValueError for another number of columns, or parts.
        """
        if isinstance(observations, Tensor):
            return self._act(observations, noise, sample, generator)
        if isinstance(observations, Mapping):
            observations = self._joined(observations)
        given = torch.as_tensor(np.asarray(observations, np.float32), device=self.low.device)
        return self._act(given, noise, sample, generator).cpu().numpy()

    def _joined(self, parts: Mapping[str, Any]) -> NDArray[np.float32]:
        """One array [.., o] of the parts of observations."""
        wanted = dict(self.config.task.observation)
        if parts.keys() != wanted.keys():
            raise ValueError(
                f"observations of {self.config.task.task} must have the parts {', '.join(wanted)}, got "
                f"{', '.join(map(str, parts)) or 'none'}"
            )
        found = []
        for name, shape in wanted.items():
            part = np.asarray(parts[name], np.float32)
            axes = part.ndim - len(shape)
            if axes < 0 or part.shape[axes:] != shape:
                raise ValueError(f"{name} must have shape [.., {_listed(shape)}], got {list(part.shape)}")
            found.append(part.reshape(*part.shape[:axes], -1))
        return np.concatenate(found, -1)

    def _act(
        self, observations: Tensor, noise: Tensor | None, sample: bool, generator: Generator | None
    ) -> Tensor:
        mean, raw_log_std = self.distribution(observations)
        if noise is None and sample:
            noise = torch.empty_like(mean).normal_(generator=generator)
        if noise is None:
            return self._scaled(mean.tanh())
        if noise.shape != mean.shape:
            raise ValueError(f"noise must have shape {list(mean.shape)}, got {list(noise.shape)}")
        return self._scaled(reference.tanh_gaussian(mean, raw_log_std, noise.to(mean.dtype))[0])

    def distribution(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std [.., a], before the tanh, of observations [.., o]; see
        `kernels.reference.tanh_gaussian`."""
        size = self.config.task.observation_size
        if observations.shape[-1:] != (size,):
            told = f"must have shape [.., {size}], got {list(observations.shape)}"
            raise ValueError(f"observations of {self.config.task.task} {told}")
        x = observations.to(self.low.dtype)
        if self.mean is not None and self.rate is not None:
            x = (x - self.mean) * self.rate
        if self.constants is not None:
            x = torch.cat([x, self.constants.expand(*x.shape[:-1], -1)], -1)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        out = reference.network(rows, self.body.stages, dict(self.body.named_parameters()))[0]
        if x.dim() != 2:
            out = out.reshape(*x.shape[:-1], out.shape[-1])
        mean, raw_log_std = out.chunk(2, -1)
        return mean, raw_log_std

    def _scaled(self, actions: Tensor) -> Tensor:
        """From [-1, 1] to the task's bounds, as its environment was given them while it was learned."""
        if self.symmetric:
            return actions * self.high
        share = (actions + 1.0) / 2.0
        return self.low * (1.0 - share) + self.high * share

    def _save_pretrained(self, save_directory: Path) -> None:
        """model.safetensors, and then config.json, which has the size and checksum of the other."""
        config, weights = save_directory / CONFIG, save_directory / WEIGHTS
        for path in (config, weights):
            require_replaceable(path)
        arrays = {name: value.cpu().numpy() for name, value in self.state_dict().items()}
        partial = weights.with_name(f"{WEIGHTS}.partial")
        partial.unlink(missing_ok=True)
        size, checksum = write_arrays(partial, arrays)
        partial.replace(weights)
        told = {**self.config.describe(), "weights": {"bytes": size, "crc32": checksum}}
        replace_file(config, (json.dumps(told, indent=1) + "\n").encode())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> Self:
        """The policy in a folder that `save_pretrained` wrote, or of a repository of a hub, which needs
        huggingface_hub; `hub` are keyword arguments of its hf_hub_download, as revision or token.

        InputError names a file that is missing, damaged, or none of a policy. Files are data: no code of them
        runs.
        """
        place = Path(pretrained_model_name_or_path)
        if place.is_dir():
            files = [place / CONFIG, place / WEIGHTS]
        else:
            files = [_downloaded(str(pretrained_model_name_or_path), name, hub) for name in (CONFIG, WEIGHTS)]
        return cls._read(*files)

    @classmethod
    def _read(cls, config_file: Path, weights_file: Path) -> Self:
        for path in (config_file, weights_file):
            if not path.exists():
                raise InputError(f"{config_file.parent} holds no policy: {path.name} is missing")
        path = config_file
        try:
            told = read_json(config_file)
            config = PolicyConfig.of(told)
            weights = told.get("weights")
            if not isinstance(weights, dict) or not weights.keys() >= {"bytes", "crc32"}:
                raise ValueError("it has no size and checksum of the weights")
            path = weights_file
            with opened(weights_file) as stream:
                file = ArrayFile(stream)
                if file.size != weights["bytes"] or file.size > LARGEST_POLICY:
                    raise ValueError(f"it has {file.size} bytes instead of {weights['bytes']!r:.60}")
                require_kinds("it", _kinds(config), file.kinds)
                arrays, checksum = file.read()
            if checksum != weights["crc32"]:
                raise ValueError("its checksum differs")
            state = {name: torch.from_numpy(array) for name, array in arrays.items()}
            for name, values in state.items():
                require_finite(name, values)
        except InputError:
            raise
        except (ValueError, TypeError, FloatingPointError) as error:
            raise InputError(f"{path} is damaged: {error}") from error
        return cls._filled(config, state)


def _kinds(config: PolicyConfig) -> dict[str, Kind]:
    """Arrays of a policy by name, from its settings alone."""
    task = config.task
    stages = bodies.make(config.body, config.width, config.depth, 2 * task.action_size)
    found = {f"body.{name}": (1, *shape) for name, shape in shapes_of(stages, config.inputs).items()}
    if config.normalized:
        found |= {"mean": (task.observation_size,), "rate": (task.observation_size,)}
    if config.inputs > task.observation_size:
        found["constants"] = (config.inputs - task.observation_size,)
    return {name: Kind("float32", shape) for name, shape in found.items()}


def _inside(bound: NDArray[np.float64], other: NDArray[np.float64]) -> Tensor:
    """A bound in float32, no farther from the other than in float64."""
    near = bound.astype(np.float32)
    outside = np.abs(near - other) > np.abs(bound - other)
    return torch.from_numpy(np.where(outside, np.nextafter(near, other.astype(np.float32)), near))


def _asked(task: str, settings: dict[str, Any], folder: Path) -> Native:
    """A task as its own environment has it, which is made for it."""
    from brc_fast import envs
    from brc_fast.envs.base import natives_of

    try:
        with closing(envs.make([task], 1, quiet=True, **_taken(task, settings))) as env:
            return natives_of(env)[0]
    except (InputError, ImportError) as error:
        raise InputError(
            f"{folder} does not say what {task} observes and does, as an older version wrote it, and the "
            f"task cannot be made to ask it: {error}"
        ) from error


def _taken(task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Of a run's settings of environments those that shape a task."""
    shared = {"mjx": ("impl", "privileged"), "gym": ("kwargs", "privileged")}
    return {name: settings[name] for name in shared.get(task.partition("/")[0], ("privileged",))}


def _downloaded(repository: str, name: str, hub: dict[str, Any]) -> Path:
    """A file of a repository of a hub, in huggingface_hub's cache."""
    if Hub is _Folders:
        raise MissingExtraError(f"{repository} is no folder: a policy of a hub", "hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, name, **hub)).resolve()
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        told = " ".join(str(error).split())
        raise InputError(
            f"{repository} is no folder, and {name} of it as a repository cannot be had: {told:.300}"
        ) from error


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
