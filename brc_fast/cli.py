"""The `brc-fast` command. Bad input ends in one line on stderr and exit code 2."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__
from .checkpoint import RunFolder, write_text
from .config import TrainConfig
from .errors import InputError, MissingExtraError

USAGE = f"""brc-fast {__version__}: BRC value learning, made fast

  brc-fast train TASK...          train one agent on one or several tasks (--help lists every setting)
  brc-fast train --resume RUN     go on from the newest checkpoint of a run
  brc-fast evaluate RUN           returns of a run's policy
  brc-fast plot RUN...            learning curves as PNG or SVG
  brc-fast envs                   names of all tasks
  brc-fast doctor                 versions, devices, what is missing and how to get it
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": train, "evaluate": evaluate, "plot": plot, "envs": envs, "doctor": doctor}
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    try:
        if words[0] not in commands:
            raise InputError(f"unknown command {words[0]!r}: one of {', '.join(commands)}")
        return commands[words[0]](words[1:])
    except (InputError, MissingExtraError, OSError, MemoryError, FloatingPointError) as error:
        print(f"brc-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("brc-fast: interrupted; nothing was saved after the newest checkpoint", file=sys.stderr)
        return 130


def default_run(config: TrainConfig) -> str:
    """runs/mjx-CartpoleSwingup-seed0; further tasks are counted, not listed."""
    more = f"+{len(config.tasks) - 1}" if len(config.tasks) > 1 else ""
    return f"runs/{config.tasks[0].replace('/', '-')}{more}-seed{config.seed}"


def train(words: list[str]) -> int:
    """Train, or go on training, into a run folder."""
    try:
        import matplotlib  # noqa: F401  (drawn at the first evaluation: too late to find it missing)

        from .arguments import parse_train, resolve_device
        from .progress import Progress
    except ImportError as error:
        raise MissingExtraError("brc-fast train", "train") from error
    config, resumed = parse_train(words)
    if not config.tasks:
        raise InputError("name at least one task, such as mjx/CartpoleSwingup; all names: brc-fast envs")
    device = resolve_device(config.device)
    folder = resumed or RunFolder(config.run or default_run(config))
    if resumed is None:
        folder.refuse_existing(config.overwrite)
    if device == "cpu":
        torch.set_num_threads(config.threads or 1)

    from .metrics import MetricsWriter
    from .plot import plot as draw
    from .resume import load
    from .train import Trainer

    trainer = Trainer(config, device, print)
    if resumed is None:
        folder.create(config)
    else:
        load(trainer, folder)
        folder.write_config(config)
    metrics = MetricsWriter(folder.metrics, trainer.steps if resumed else None)
    with Progress(config, trainer.steps) as progress:

        def report(step: int, row: dict[str, float]) -> None:
            progress.report(step, row)
            if "eval/return_mean" in row:
                draw([folder], folder.path / "learning_curve.png")

        try:
            trainer.run(folder, metrics, report)
        finally:
            metrics.close()
    if trainer.steps < config.steps:
        print(f"stopped at step {trainer.steps}; go on with: brc-fast train --resume {folder.path}")
        return 130
    print(f"{folder.path}: {progress.best()}; curve in {folder.path / 'learning_curve.png'}")
    return 0


def evaluate(words: list[str]) -> int:
    """Print the returns of a run's policy and keep them in its evaluation.json."""
    try:
        from .arguments import EvaluateArguments, parse, resolve_device
    except ImportError as error:
        raise MissingExtraError("brc-fast evaluate", "train") from error
    arguments = parse(EvaluateArguments, words, "evaluate")
    if arguments.episodes < 1:
        raise InputError(f"episodes must be positive, got {arguments.episodes}")
    folder = RunFolder(arguments.run)
    config = folder.config()
    step, parts = folder.load("agent")

    from . import envs
    from .agent import BRC
    from .evaluate import evaluate as run_episodes
    from .evaluate import summary

    env = envs.make(config.tasks, arguments.episodes, arguments.seed)
    device = resolve_device("auto")
    # acting takes float32 products whatever learning took, on any device
    config = dataclasses.replace(config, precision="fp32")
    agent = BRC.from_config(config, env.observation_size, env.action_size, device)
    with folder.fitting():
        agent.load_state_dict({name: torch.from_numpy(value) for name, value in parts["agent"].items()})
    returns = run_episodes(agent, env, arguments.seed)
    print(f"{folder.path}, step {step}, {arguments.episodes} episodes per task")
    for name, row in zip(env.task_names, returns, strict=True):
        print(f"  {name:<32} {row.mean():9.1f} +- {row.std():.1f}")
    result: dict[str, object] = {"step": step, "seed": arguments.seed, **summary(env.task_names, returns)}
    result["returns"] = {name: row.tolist() for name, row in zip(env.task_names, returns, strict=True)}
    write_text(folder.path / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return 0


def plot(words: list[str]) -> int:
    """Draw learning curves."""
    try:
        from .arguments import PlotArguments, parse
    except ImportError as error:
        raise MissingExtraError("brc-fast plot", "train") from error
    from .plot import plot as draw

    arguments = parse(PlotArguments, words, "plot")
    folders = [RunFolder(run) for run in arguments.runs]
    if not folders:
        raise InputError("name at least one run folder")
    for folder in folders:
        folder.config()
    one = folders[0].path / "learning_curve.png" if len(folders) == 1 else Path("learning_curves.png")
    output = Path(arguments.output) if arguments.output else one
    if output.suffix not in (".png", ".svg"):
        raise InputError(f"output must end in .png or .svg, got {output}")
    draw(folders, output)
    print(output)
    return 0


def envs(words: list[str]) -> int:
    """Print every task name."""
    if words:
        raise InputError(f"brc-fast envs takes no arguments, got {' '.join(words)}")
    from .envs import list_tasks

    print("\n".join(list_tasks()))
    return 0


def doctor(words: list[str]) -> int:
    """Print what is installed; exit code 1 when something is missing."""
    if words:
        raise InputError(f"brc-fast doctor takes no arguments, got {' '.join(words)}")
    from .doctor import report

    text, fine = report()
    print(text)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
