"""The command line's view of the settings: tasks are positional, and a run can be resumed."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
import tyro

from brc_fast.agents.transfer import require_alike
from brc_fast.config import TrainConfig, flat, from_dict, preset
from brc_fast.disk import LONGEST, opened, read_json
from brc_fast.envs import expand
from brc_fast.errors import InputError
from brc_fast.runs.checkpoint import RunFolder, module_of
from brc_fast.runs.plot import Group, Metric, Reference

Parsed = TypeVar("Parsed")
Modules = tyro.conf.UseAppendAction[tuple[str, ...]]
CHANGEABLE = (  # when a run is resumed: how long, what is told of it, and what computes it
    *("steps", "report_every", "analysis_every", "checkpoint_every"),
    *("eval_every", "eval_episodes", "eval_envs", "eval_sampled"),
    *("device", "threads", "precision", "graphs", "recompute"),
    *("env.processes", "env.restarts", "env.step_seconds"),
)
PLACES = ("run", "overwrite")  # settings that name no experiment but a folder
ELSEWHERE = {  # options of other libraries, and what they are here
    "lr": "learning.learning-rate",
    "gamma": "learning.discount",
    "total-timesteps": "steps",
    "learning-starts": "random-steps",
    "buffer-size": "replay-capacity",
    "gradient-steps": "updates-per-step",
    "utd-ratio": "updates-per-step",
    "output-dir": "run",
}
MOST_NAMED = 3  # settings in the name of a run's folder


@dataclass(frozen=True)
class TrainArguments(TrainConfig):
    """Train one BRC agent. The defaults shown are the ones for this device; "BRC" marks the value of the
    authors' published code. Exit codes: 0 done; 1 failed; 2 bad input; 128 + n ended, saved, by signal n."""

    tasks: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of tasks such as mjx/CartpoleSwingup or suites such as mjx/dmc25; several train one agent."""
    resume: str | None = None
    """Go on from the newest checkpoint of this run folder; "auto": of the folder that the other settings
    name, or start there. Only length, intervals, evaluations, the device, with how it computes, and the
    environments' processes may change."""
    from_run: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Folder of a run whose agent is taken to these tasks: its networks, which are then the defaults of
    critic.* and actor.* and cannot change."""
    config: str | None = None
    """File of settings, TOML or a run's config.json (without its run and overwrite); the command line comes
    after it."""
    wandb: str | None = None
    """W&B project to log to as well; a resumed run goes on there. WANDB_MODE=offline needs no network."""
    quiet: bool = False
    """Print nothing but what goes wrong."""
    allow_module: Modules = ()
    """With --resume: see brc-fast evaluate --help."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Returns, successes and scores of the policies of runs: of the mean action, and with their own noise."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs; several are seeds of one experiment, with the same tasks."""
    episodes: int = 10
    """Episodes per task."""
    seed: int = 1_000_000
    """Of the start states."""
    num_envs: int | None = None
    """Environments per task that play them; the smaller of episodes and 10 when not given."""
    sampled: bool = True
    """Play as many episodes with the policy's own noise, too."""
    checkpoint: str = "last"
    """Which checkpoint: last, best (of the evaluations while it trained), or a step."""
    json: str | None = None
    """Write the numbers of all runs, and their aggregate, to this file too, or with - to stdout alone."""
    allow_module: Modules = ()
    """Module that a run's task gym/MODULE:ID may import although it lies in the current folder; once for
    each."""


@dataclass(frozen=True)
class VideoArguments:
    """One episode of a run's policy (mean action), at the speed of the simulated time."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    task: str | None = None
    """Which of the run's tasks; the first when not given."""
    checkpoint: str = "last"
    """Which checkpoint: last, best (of the evaluations while it trained), or a step."""
    output: str | None = None
    """GIF, or MP4 where ffmpeg is installed; RUN/video-<task>.gif when not given."""
    seed: int = 1_000_000
    """Of the start state."""
    size: str | None = None
    """Height and width in pixels, of what MuJoCo draws; 480x640 when not given."""
    fps: int = 25
    """Frames per second, at most; the nearest number that divides the control rate is taken."""
    camera: str | None = None
    """Name or number of a camera of a MuJoCo model; its first one, or a free view, when not given."""
    allow_module: Modules = ()
    """See brc-fast evaluate --help."""


@dataclass(frozen=True)
class PlotArguments:
    """Learning curves of one or many runs, one panel per task."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs."""
    output: str | None = None
    """PNG or SVG file; RUN/learning_curve.png for one run and learning_curves.png for several."""
    metric: Metric = "return"
    """What to draw; normalized: 0 for a random policy, as the suite's published results are."""
    group: Group = "seed"
    """seed: one line, with an interval, for runs that differ in nothing else; none: one line for each run."""
    reference: Reference = "auto"
    """Published BRC curves to draw behind; auto: of the kind that the runs are, where there are any."""


@dataclass(frozen=True)
class ExportArguments:
    """The policy of one task as one file for other programs: raw observations in, actions within the task's
    own bounds out, any number of rows."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    task: str | None = None
    """Which of the run's tasks; needed where it learned several."""
    to: str | None = None
    """FILE.onnx, or FILE.pt2 for torch.export; RUN/policy-<task>.onnx when not given."""
    checkpoint: str = "last"
    """Which checkpoint: last, best (of the evaluations while it trained), or a step."""
    sample: bool = False
    """Act as while training: a second input, noise, has standard normals, one for each action."""
    opset: int | None = None
    """Of ONNX; 18 when not given."""
    allow_module: Modules = ()
    """See brc-fast evaluate --help; asked for only of runs that older versions wrote."""


@dataclass(frozen=True)
class ConvertArguments:
    """Checkpoints of the authors' code (flax) to a run of ours, and back. What is given chooses the way."""

    source: tyro.conf.Positional[str]
    """The folder, or one file, of a flax checkpoint; or a run."""
    to: str
    """The run to make; or of a run FILE.msgpack, or a folder for a file per network as the authors' code has
    them."""
    tasks: tuple[str, ...] = ()
    """Names of the checkpoint's tasks, in the order of their ids."""
    v_max: float = 10.0
    """The critic's support is [-v_max, v_max], which a flax checkpoint does not say."""
    step: int = 0
    """Environment steps per task that the checkpoint has learned, which it does not say either."""
    checkpoint: str = "last"
    """Of a run: last, best (of the evaluations while it trained), or a step."""
    overwrite: bool = False
    """Replace the run that the folder holds."""


def parse(kind: type[Parsed], words: Sequence[str], command: str, default: Parsed | None = None) -> Parsed:
    """Settings from the words of the command line; InputError, in one line, for words that do not fit."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            if default is None:
                return tyro.cli(kind, args=list(words), prog=f"brc-fast {command}")
            return tyro.cli(kind, args=list(words), prog=f"brc-fast {command}", default=default)
    except SystemExit as stop:
        if not stop.code:  # --help, or a shell's completion
            raise
        lines = [line.strip("│╭╮╰╯ ") for line in box.getvalue().splitlines()[1:]]
        parts: list[list[str]] = [[]]
        for line in lines:
            if line.startswith(("─", "---")):  # a rule, which is of hyphens where stdout is not UTF-8
                parts.append([])
            else:
                parts[-1].append(line)
        told, *others = filter(None, parts)
        rule = " ".join(told).removeprefix(f"Error parsing {kind.__name__}: ").rstrip(".")
        heads = ("Perhaps you meant", "Arguments similar to")
        hints = [each for part in others if part[0].startswith(heads) for each in part]
        near = [line.split()[0].rstrip(",") for line in hints if line.startswith("--")]
        if not near and command == "train" and rule.startswith("Unrecognized"):
            given = [word.partition("=")[0].lstrip("-").replace("_", "-") for word in words]
            near = [f"--{ELSEWHERE[name]}" for name in given if name in ELSEWHERE]
        if near:
            rule += f"; perhaps you meant {' or '.join(sorted({*near[:4]}))}"
        raise InputError(f"{rule}; see brc-fast {command} --help") from None


def resolve_device(wanted: str) -> str:
    """ "auto" becomes "cuda" where torch sees a GPU, else "cpu"."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch sees no CUDA device; see brc-fast doctor")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def option(words: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`: what the defaults depend on is needed before they do."""
    for word, following in itertools.pairwise([*words, None]):
        if word == f"--{name}":
            return following
        if word and word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


def options(words: Sequence[str], name: str) -> tuple[str, ...]:
    """The values of an option that may be given several times; see `option`."""
    found = (option(words[place:], name) for place in range(len(words)) if words[place].startswith("--"))
    return tuple({value: None for value in found if value is not None})


class Start(NamedTuple):
    """What a `train` command asks for."""

    config: TrainConfig
    folder: RunFolder
    resumes: bool  # goes on from the folder's newest checkpoint
    replaces: bool  # the run that the folder holds
    quiet: bool


def parse_train(words: Sequence[str]) -> Start:
    """A run's settings, which are those of the command line over the file's over the kept run's or, for a new
    one, the device's defaults; and its folder."""
    resume, device, file = (option(words, name) for name in ("resume", "device", "config"))
    if option(words, "from") is not None and resume not in (None, "auto"):
        raise InputError("--from begins a run and --resume goes on with one: leave one of them out")
    modules = (*options(words, "allow-module"), *filter(None, map(module_of, words)))  # tasks the user names
    given = read_settings(Path(file)) if file is not None else {}
    device = device or given.get("device")
    default = preset(resolve_device(device if device in ("cpu", "cuda") else "auto"))
    if file is not None and Path(file).suffix != ".toml":  # a run's, and perhaps somebody else's
        RunFolder(Path(file).parent).require_foreign_code(with_settings(default, given, file).tasks, modules)

    if resume not in (None, "auto"):
        folder = RunFolder(resume)
        kept = settings_of(folder, modules)
        if not folder.steps():
            raise InputError(f"{resume} holds no complete checkpoint: train it anew, with --overwrite")
        folder.require_size(kept)
        config, quiet = _parsed(words, kept, file, given)
        return Start(refuse_changes(config, kept), folder, True, False, quiet)

    config, quiet = _parsed(words, default, file, given)
    if not config.tasks:
        raise InputError("name at least one task, such as mjx/CartpoleSwingup; all names: brc-fast envs")
    folder = RunFolder(config.run or default_run(config, default))
    there = resume is not None and (folder.path / "config.json").exists()
    before = settings_of(folder, modules) if there else None
    if before is None or not folder.steps():  # killed before its first checkpoint
        if config.from_run is not None:
            old = RunFolder(config.from_run)
            own = networks_of(old, config, default, modules)
            config = with_old_tasks(_parsed(words, own, file, given)[0], old.config())
        return Start(config, folder, False, config.overwrite or there, quiet)
    folder.require_size(before)
    tasks = config.tasks
    config, quiet = _parsed(words, before, file, given)
    if config.from_run is not None and config.transfer.keep_tasks and set(tasks) <= set(before.tasks):
        config = replace(config, tasks=before.tasks)  # of which the command names the new ones
    config = replace(config, run=before.run, overwrite=before.overwrite)
    return Start(refuse_changes(config, before), folder, True, False, quiet)


def networks_of(
    old: RunFolder, config: TrainConfig, default: TrainConfig, modules: Sequence[str]
) -> TrainConfig:
    """The defaults of a run that takes the agent of another one; InputError where that has none."""
    old.require_plain()
    kept = old.config()
    old.choose(config.transfer.checkpoint)
    if config.transfer.keep_tasks:
        old.choose()  # which has their replay and reward scales
        old.require_foreign_code(kept.tasks, modules)
    same = {name: getattr(kept, name) for name in ("critic", "actor", "normalize_observations")}
    return replace(default, **same)


def with_old_tasks(config: TrainConfig, old: TrainConfig) -> TrainConfig:
    """The settings of a run that takes an agent, with the old tasks before the new ones where they are kept;
    InputError for what the agent does not allow."""
    require_alike(config, old)
    there = [task for task in config.tasks if task in old.tasks]
    new = tuple(task for task in config.tasks if task not in old.tasks)
    if there and not config.transfer.keep_tasks:
        raise InputError(
            f"{config.from_run} has {there[0]} already: name new tasks, and add --transfer.keep-tasks to go "
            "on with all the old ones"
        )
    if not new:
        raise InputError(f"{config.from_run} has {', '.join(there)} already: name at least one new task")
    return replace(config, tasks=(*old.tasks, *new)) if config.transfer.keep_tasks else config


def _parsed(
    words: Sequence[str], default: TrainConfig, file: str | None, given: dict[str, Any]
) -> tuple[TrainConfig, bool]:
    """Settings, and whether to be quiet."""
    default = with_settings(default, given, file)
    names = [field.name for field in fields(TrainConfig)]
    arguments = parse(
        TrainArguments, words, "train", TrainArguments(**{name: getattr(default, name) for name in names})
    )
    config = TrainConfig(**{name: getattr(arguments, name) for name in names})
    return replace(config, tasks=expand(config.tasks)) if config.tasks else config, arguments.quiet


def settings_of(folder: RunFolder, modules: Sequence[str]) -> TrainConfig:
    """Settings of a run that may be somebody else's, whose tasks may import these modules."""
    folder.require_plain()
    kept = folder.config()
    folder.require_foreign_code(kept.tasks, modules)
    return kept


def refuse_changes(config: TrainConfig, kept: TrainConfig) -> TrainConfig:
    """The same settings; InputError for one that may not change when a run is resumed."""
    before = flat(kept)
    for name, value in flat(config).items():
        if name not in CHANGEABLE and value != before[name]:
            raise InputError(
                f"{name} cannot change when a run is resumed: it was {before[name]}; "
                f"only {', '.join(CHANGEABLE)} can"
            )
    return config


def default_run(config: TrainConfig, default: TrainConfig) -> str:
    """runs/mjx-CartpoleSwingup-critic.width=256-seed0: the first task and the number of others, then the
    settings that make another run of it, which are those that are not the defaults and cannot change on a
    resume; of more than three, and of such as no folder should be called, a digest."""
    more = f"+{len(config.tasks) - 1}" if len(config.tasks) > 1 else ""
    same = {*CHANGEABLE, *PLACES, "tasks", "seed"}
    before = flat(default)
    new = {name: value for name, value in flat(config).items() if value != before[name]}
    changed = [f"{name}={value}" for name, value in new.items() if name not in same]
    if len(changed) > MOST_NAMED or not re.fullmatch(r"[\w.=+-]{0,100}", "".join(changed), re.ASCII):
        changed = [f"{zlib.crc32(' '.join(changed).encode()):08x}"]
    parts = [config.tasks[0].replace("/", "-") + more, *changed, f"seed{config.seed}"]
    return f"runs/{'-'.join(parts)}"


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a TOML file, or of a run's config.json, by their names on the command line."""
    try:
        if path.suffix == ".toml":
            with opened(path) as file:
                values = tomllib.loads(file.read(LONGEST).decode())
        else:
            values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"it must hold settings by name, got {values!r:.60}")
    except FileNotFoundError:
        raise InputError(f"config: there is no file {path}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"config: {path} cannot be read: {error}") from error
    if path.suffix != ".toml":  # a run's own, with what is no setting of another
        values = {name: value for name, value in values.items() if name not in (*PLACES, "written")}
    named = dict(_leaves(values))
    if "from" in named:
        named["from_run"] = named.pop("from")
    for name in PLACES:
        if name in named:
            raise InputError(f"{path}: {name} is for the command line alone, --{name}")
    return named


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = prefix + str(key).replace("-", "_")
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def with_settings(config: TrainConfig, given: dict[str, Any], source: str | None) -> TrainConfig:
    """The configuration with `given` settings out of a file; InputError for unknown ones and other types."""
    known = flat(config)
    values = asdict(config)
    for name, value in given.items():
        if name not in known:
            nearest = max(known, key=lambda each: SequenceMatcher(None, name, each).ratio())
            raise InputError(f"{source}: unknown setting {name}; nearest: {nearest}")
        section, _, inner = name.rpartition(".")
        (values[section] if section else values)[inner] = value
    try:
        changed = from_dict(TrainConfig, values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    assert isinstance(changed, TrainConfig)
    return changed
