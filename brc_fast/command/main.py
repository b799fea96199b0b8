"""The `brc-fast` command. Bad input ends in one line on stderr and exit code 2, a failure in one and 1."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from shlex import join
from typing import Any

import torch

from brc_fast import __version__
from brc_fast.config import TrainConfig
from brc_fast.disk import require_replaceable
from brc_fast.errors import InputError, MissingExtraError, WorkerError
from brc_fast.kernels.products import chosen_products, fast_bfloat16, measured_rate
from brc_fast.learner.precision import cores
from brc_fast.runs.checkpoint import RunFolder, module_of, write_text
from brc_fast.runs.interrupt import Interrupted, interrupts_kept
from brc_fast.runs.weights_and_biases import require_wandb

from .output import Output

FAILED = 1  # exit code of a run that ended by an error which is not of its input
MOST_THREADS = 4  # by default; with more a learner was not measured
USAGE = f"""brc-fast {__version__}: BRC value learning, made fast

  brc-fast train TASK...          train one agent on one or several tasks (--help lists every setting)
  brc-fast train TASK... --from RUN   take the agent of a run to new tasks
  brc-fast train --resume RUN     go on from the newest checkpoint of a run
  brc-fast evaluate RUN...        returns, successes and scores of one or several runs' policies
  brc-fast video RUN              an episode of a run's policy as GIF or MP4
  brc-fast export RUN             a policy as ONNX or PT2, for programs without this package
  brc-fast convert FROM --to TO   the authors' flax checkpoints to runs, and back
  brc-fast plot RUN...            learning curves as PNG or SVG
  brc-fast study [NAME]           the paper's claims at a size of your machine; without a name, a list
  brc-fast envs [SUITE]           names of tasks and suites
  brc-fast doctor                 versions, devices, what is missing and how to get it

exit codes  0 done; 1 a run failed, and says whether it is saved; 2 bad input;
            128 + n: signal n ended it (train saves)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    output: Any = Output(sys.stdout)
    errors: Any = Output(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), interrupts_kept():
        try:
            code = command(words)
        finally:
            output.flush()
            if output.broken():
                print(f"brc-fast: stdout cannot be written: {output.error.strerror}", file=sys.stderr)
            errors.flush()
    if arguments is None and code > 128:
        os._exit(code)  # who sent a signal need not wait until all that was imported is taken apart
    return code or 2 * output.broken()


def command(words: list[str]) -> int:
    """Run one command, with errors that a user can mend as one line; returns the exit code."""
    commands = {
        "train": train,
        "evaluate": evaluate,
        "plot": plot,
        "envs": envs,
        "doctor": doctor,
        "video": video,
        "study": study,
        "export": export,
        "convert": convert,
    }
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    try:
        try:
            chosen_products(torch.float32)
        except ValueError as error:  # of the environment
            raise InputError(str(error)) from error
        if words[0] not in commands:
            raise InputError(f"unknown command {words[0]!r}: one of {', '.join(commands)}")
        return commands[words[0]](words[1:])
    except (InputError, MissingExtraError, WorkerError, OSError, MemoryError, FloatingPointError) as error:
        print(f"brc-fast: {one_line(error)}", file=sys.stderr)
        return FAILED if isinstance(error, WorkerError) else 2
    except KeyboardInterrupt as error:
        saved = "; nothing was saved after the newest checkpoint" if words[0] == "train" else ""
        print(f"brc-fast: interrupted{saved}", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


def one_line(error: BaseException) -> str:
    """What an error says, and where that is not enough, or is nothing, of which kind it is; in one line that
    may be printed: a file from elsewhere must not speak to the terminal."""
    line = " ".join(str(error).split())
    told = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if isinstance(error, (InputError, MissingExtraError, WorkerError, OSError, FloatingPointError)) and told:
        return told
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


def use_cpu(config: TrainConfig, say: Callable[[str], object]) -> None:
    """Torch's threads, which the learner's passes share; a line where something is not as it was asked."""
    there = cores()
    if config.threads is not None and config.threads > there:
        say(f"--threads {config.threads}: this machine has {there} cores, so {there} are used")
    torch.set_num_threads(min(config.threads or MOST_THREADS, there))
    if config.precision == "bf16" and not fast_bfloat16():
        slower = measured_rate(torch.float32) / measured_rate(torch.bfloat16)
        told = "this processor has no bfloat16 instructions"
        say(f"--precision bf16: {told}, products take {slower:.1f} times as long as in fp32")


def train(words: list[str]) -> int:
    """Train, or go on training, into a run folder."""
    try:
        import matplotlib  # noqa: F401  (drawn at the first evaluation: too late to find it missing)

        from .arguments import option, parse_train, resolve_device
        from .progress import Progress
    except ImportError as error:
        raise MissingExtraError("brc-fast train", "train") from error
    if (project := option(words, "wandb")) is not None:
        require_wandb()
    config, folder, resumes, replaces, quiet = parse_train(words)
    device = resolve_device(config.device)
    say: Callable[[str], object] = (lambda _: None) if quiet else print
    if not resumes:
        folder.refuse_existing(replaces)
    if device == "cpu":
        use_cpu(config, say)

    from brc_fast.published import score_unit
    from brc_fast.runs.metrics import MetricsWriter
    from brc_fast.runs.plot import Metric
    from brc_fast.runs.plot import plot as draw
    from brc_fast.runs.trainer import Trainer

    about = {"command": join(["brc-fast", "train", *words]), "device": device}
    trainer = Trainer(config, device, say, quiet)
    successes = all(score_unit(task) == "success" for task in config.tasks)
    with (
        contextlib.closing(trainer.env),
        contextlib.closing(trainer.eval_env),
        contextlib.ExitStack() as claim,
    ):
        if not resumes:
            trainer.take_over()  # before the folder is made, or replaced, which may be that of the other run
        claim.enter_context(folder.claim())
        if not resumes:
            # again: another run may have begun there meanwhile
            folder.refuse_existing(replaces and (config.overwrite or not folder.steps()))
            folder.create(config, **about)
        else:
            trainer.load(folder)
            if trainer.steps >= config.steps and not trainer.missing_rows(folder):
                say(f"{folder.path} is at step {trainer.steps} already: --steps with more makes it longer")
                return 0
        written = trainer.steps if resumes else None
        metrics = MetricsWriter(folder.metrics, written, trainer.rows, config=config, project=project)
        with Progress(config, trainer.steps, quiet) as progress:
            if resumes:
                folder.write_config(config, **about)  # what may refuse the run has been read

            def report(step: int, row: dict[str, float]) -> None:
                progress.report(step, row)
                if "eval/return_mean" in row:
                    metric: Metric = "success" if successes else "return"
                    draw([folder], folder.path / "learning_curve.png", metric=metric)

            try:
                with without_tracebacks():
                    stopped = trainer.run(folder, metrics, report)
                metrics.close()
            except BaseException as error:
                with contextlib.suppress(OSError):  # where it failed before
                    metrics.close()
                if isinstance(error, Exception):
                    return failed(folder, error)
                raise
    if stopped is not None:
        say(f"stopped at step {trainer.steps}; {go_on(folder)}")
        return 128 + stopped
    say(f"{folder.path}: {progress.best()}; curve in {folder.path / 'learning_curve.png'}")
    return 0


def go_on(folder: RunFolder) -> str:
    if not folder.steps():
        return "there is no checkpoint: train it anew, with --overwrite"
    words = ["brc-fast", "train", "--resume", str(folder.path)]
    for task in folder.config().tasks:
        try:
            folder.require_foreign_code([task])
        except InputError:  # the user named it to begin with, and has to again
            words += ["--allow-module", module_of(task)]
    return f"go on with: {join(words)}"


def failed(folder: RunFolder, error: Exception) -> int:
    """A run that ended by an error: one line, and the traceback in error.txt."""
    parts = [one_line(error), *getattr(error, "__notes__", ()), go_on(folder)]
    file = folder.path / "error.txt"
    with contextlib.suppress(OSError):
        write_text(file, "".join(traceback.format_exception(error)))
        parts.append(f"traceback in {file}")
    print(f"brc-fast: {'; '.join(parts)}", file=sys.stderr)
    return FAILED


@contextlib.contextmanager
def without_tracebacks() -> Iterator[None]:
    """What an environment in this process raises is logged with its traceback, which `failed` keeps."""
    logger = logging.getLogger("brc_fast.envs.vector")

    def unless_raised(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    logger.addFilter(unless_raised)
    try:
        yield
    finally:
        logger.removeFilter(unless_raised)


def evaluate(words: list[str]) -> int:
    """Print returns, successes and scores of runs, and keep each run's in its evaluation.json."""
    try:
        from .arguments import EvaluateArguments, parse, resolve_device
    except ImportError as error:
        raise MissingExtraError("brc-fast evaluate", "train") from error
    arguments = parse(EvaluateArguments, words, "evaluate")
    count, seed = arguments.episodes, arguments.seed
    slots = min(count, 10 if arguments.num_envs is None else arguments.num_envs)
    for name, value, least in (("episodes", count, 1), ("num_envs", slots, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name} must be {'positive' if least else '0 or more'}, got {value}")
    to_stdout = arguments.json == "-"
    if arguments.json is not None and not to_stdout:
        output = Path(arguments.json)
        if output.is_dir():
            raise InputError(f"json must name a file, got the folder {output}")
        if not output.absolute().parent.is_dir():
            raise InputError(f"json: there is no folder to write {output} to")
        require_replaceable(output, remedy="name another file with --json")
    folders = [RunFolder(run) for run in arguments.runs]
    configs = same_tasks(folders, arguments.checkpoint, arguments.allow_module)

    from brc_fast import envs
    from brc_fast.agents.memory import environments, require_fit
    from brc_fast.runs.evaluate import Evaluation, apart, env_settings, restore
    from brc_fast.runs.evaluate import evaluate as run_episodes

    tell = partial(print, file=sys.stderr) if to_stdout else print
    device, runs, code = resolve_device("auto"), [], 0
    records: dict[str, object] = {}
    steps = [int(folder.choose(arguments.checkpoint).name) for folder in folders]
    compared = [0] * len(steps) if arguments.checkpoint == "best" else steps
    differ = apart([str(folder.path) for folder in folders], configs, compared)
    for folder, config in zip(folders, configs, strict=True):
        settings = env_settings(config)
        scaled = settings.get("episode_length") is None
        step, agent = restore(folder, device, arguments.checkpoint)
        require_fit([environments("environments", config, slots, "--num-envs")])
        with contextlib.closing(envs.make(config.tasks, slots, seed, **settings)) as env:
            play = partial(run_episodes, agent, env, seed, count)
            played, noisy = play(), play(sampled=True) if arguments.sampled else None
            run = Evaluation(env.task_names, played, scaled=scaled, sampled=noisy)
        result: dict[str, object] = {"step": step, "seed": seed, "episodes": count, **run.record()}
        try:
            write_text(folder.path / "evaluation.json", json.dumps(result, indent=2) + "\n")
        except OSError as error:  # somebody else's run
            told = f"{folder.path / 'evaluation.json'} cannot be written: {error.strerror}"
            print(f"brc-fast: {told}", file=sys.stderr)
            code = 2
        tell(f"{folder.path}, step {step}, {count} episodes per task")
        if differ or len(folders) == 1:
            tell(run.table())
        runs.append(run)
        records[str(folder.path)] = result
    together = None if differ else Evaluation.over_runs(runs)
    if together is None:
        tell(f"not taken together: {differ}")
    elif len(runs) > 1:
        tell(together.table())
    if arguments.json is not None:
        everything: dict[str, object] = {
            "runs": records,
            "together": None if together is None else together.record(),
        }
        everything |= {"apart": differ} if differ else {}
        text = json.dumps(everything, indent=2) + "\n"
        print(text, end="") if to_stdout else write_text(Path(arguments.json), text)
    return code


def same_tasks(folders: list[RunFolder], checkpoint: str, modules: Sequence[str]) -> list[TrainConfig]:
    """The settings of runs that are to be taken together, of which each has the checkpoint; they may import
    these modules."""
    if not folders:
        raise InputError("name at least one run folder")
    for folder in folders:
        folder.require_plain()
    configs = [folder.config() for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if config.tasks != configs[0].tasks:
            raise InputError(
                "runs that are evaluated together must have the same tasks in the same order: "
                f"{folders[0].path} has {', '.join(configs[0].tasks)}, "
                f"{folder.path} has {', '.join(config.tasks)}"
            )
        if [other.path.resolve() for other in folders].count(folder.path.resolve()) > 1:
            raise InputError(f"runs must differ, but {folder.path} is listed more than once")
        folder.choose(checkpoint)
        folder.require_foreign_code(config.tasks, modules)
    return configs


def video(words: list[str]) -> int:
    """Film one episode of a run's policy."""
    try:
        from .arguments import VideoArguments, parse, resolve_device
    except ImportError as error:
        raise MissingExtraError("brc-fast video", "train") from error
    from brc_fast import envs
    from brc_fast.runs import video as filming

    arguments = parse(VideoArguments, words, "video")
    if arguments.seed < 0:
        raise InputError(f"seed must be 0 or more, got {arguments.seed}")
    settings = filming.Settings.parse(arguments.size, arguments.fps, arguments.camera)
    folder = RunFolder(arguments.run)
    folder.require_plain()
    config = folder.config()
    folder.require_foreign_code(config.tasks, arguments.allow_module)
    folder.choose(arguments.checkpoint)
    tasks = envs.expand(config.tasks)
    task = tasks[0] if arguments.task is None else arguments.task
    if task not in tasks:
        raise InputError(f"{folder.path} did not learn {task}; its tasks: {', '.join(tasks)}")
    default = folder.path / f"video-{task.replace('/', '-').replace(':', '-')}{filming.suffix()}"
    output = filming.check_output(Path(arguments.output) if arguments.output else default)
    filming.choose_renderer()
    if not task.startswith("gym/"):  # some of which draw without MuJoCo
        filming.require_renderer()

    from brc_fast.runs.evaluate import env_settings, restore

    step, agent = restore(folder, resolve_device("auto"), arguments.checkpoint)
    shared = {"mjx": ("impl", "randomize"), "gym": ("kwargs",)}.get(task.partition("/")[0], ())
    taken = {name: env_settings(config)[name] for name in ("episode_length", *shared)}
    with contextlib.closing(envs.make(task, 1, arguments.seed, render=True, **taken)) as env:
        if task.startswith("gym/") and filming.in_mujoco(env):
            filming.require_renderer()
        frames, result = filming.film(agent, env, tasks.index(task), arguments.seed, output, settings)
    print(f"{output}: {task} at step {step}, {frames} frames, return {result:.1f}")
    return 0


def export(words: list[str]) -> int:
    """Write the policy of a run's task as one file."""
    try:
        from .arguments import ExportArguments, parse
    except ImportError as error:
        raise MissingExtraError("brc-fast export", "train") from error
    from brc_fast.deploy import export as exporting
    from brc_fast.deploy.policy import Policy

    arguments = parse(ExportArguments, words, "export")
    folder = RunFolder(arguments.run)
    task = Policy.task_of(folder, arguments.task)
    default = folder.path / f"policy-{task.replace('/', '-').replace(':', '-')}.onnx"
    output = Path(arguments.to) if arguments.to else default
    exporting.require_target(output, arguments.opset)
    policy = Policy.from_run(folder.path, task, arguments.checkpoint, allow_module=arguments.allow_module)
    try:
        difference = exporting.export(policy, output, sample=arguments.sample, opset=arguments.opset)
    except RuntimeError as error:
        print(f"brc-fast: {task} cannot be exported: {one_line(error)}", file=sys.stderr)
        return FAILED
    checked = (
        f"within {difference:.1e} of PyTorch"
        if difference is not None
        else ('not checked: onnxruntime is not installed, pip install "brc-fast[onnx]"')
    )
    print(f"{output}: {task} at step {policy.config.step}, {output.stat().st_size / 1e3:.1f} kB, {checked}")
    return 0


def convert(words: list[str]) -> int:
    """A flax checkpoint to a run, or a run to a flax checkpoint."""
    try:
        from .arguments import ConvertArguments, parse
    except ImportError as error:
        raise MissingExtraError("brc-fast convert", "train") from error
    try:
        from brc_fast.runs import convert as converting
    except ImportError as error:
        raise MissingExtraError("brc-fast convert", "convert") from error
    arguments = parse(ConvertArguments, words, "convert")
    source, target = Path(arguments.source), Path(arguments.to)
    if (source / "config.json").exists():
        given = {"--tasks": arguments.tasks, "--step": arguments.step, "--overwrite": arguments.overwrite}
        if unused := [name for name, value in given.items() if value]:
            raise InputError(f"{source} is a run, which says {unused[0]} itself: leave it out")
        print(converting.to_flax(RunFolder(source), target, arguments.checkpoint))
        return 0
    numbers = arguments.v_max, arguments.step
    print(converting.from_flax(source, RunFolder(target), arguments.tasks, *numbers, arguments.overwrite))
    return 0


def plot(words: list[str]) -> int:
    """Draw learning curves."""
    try:
        from .arguments import PlotArguments, parse
    except ImportError as error:
        raise MissingExtraError("brc-fast plot", "train") from error
    from brc_fast.runs.plot import plot as draw

    arguments = parse(PlotArguments, words, "plot")
    folders = [RunFolder(run) for run in arguments.runs]
    for folder in folders:
        folder.require_plain()
    one = folders[0].path / "learning_curve.png" if len(folders) == 1 else Path("learning_curves.png")
    output = Path(arguments.output) if arguments.output else one
    draw(folders, output, metric=arguments.metric, group=arguments.group, reference=arguments.reference)
    print(output)
    return 0


def study(words: list[str]) -> int:
    """Make the runs of a study, and report what they found."""
    try:
        import matplotlib  # noqa: F401  (a picture ends the study: too late to find it missing)

        from .study import study as run
    except ImportError as error:
        raise MissingExtraError("brc-fast study", "train") from error
    return run(words)


def envs(words: list[str]) -> int:
    """Print what names there are, or the tasks of a suite or simulator."""
    from brc_fast.envs import installed, list_tasks
    from brc_fast.envs.suites import BACKENDS, SUITES, UNAVAILABLE

    if len(words) > 1:
        raise InputError(f"brc-fast envs takes at most one suite, got {' '.join(words)}")
    if words:
        print("\n".join(installed(words[0]) if words[0] in BACKENDS else list_tasks(words[0])))
        return 0
    print("tasks (brc-fast envs gym lists those that are installed, and so on)")
    for backend, meaning in BACKENDS.items():
        print(f"  {backend + '/...':<24}{meaning}")
    print("suites (brc-fast envs SUITE lists the tasks)")
    for suite, tasks in SUITES.items():
        print(f"  {suite:<24}{len(tasks)} tasks")
    for suite in UNAVAILABLE:
        print(f"  {suite:<24}not available: brc-fast envs {suite} says why")
    return 0


def doctor(words: list[str]) -> int:
    """Print what is installed; exit code 1 when something is missing."""
    if words:
        raise InputError(f"brc-fast doctor takes no arguments, got {' '.join(words)}")
    from .doctor import report

    text, fine = report()
    print(text)
    return 0 if fine else 1
