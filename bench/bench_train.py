"""The whole training loop: time to a return, and environment steps and updates per second together.

    python bench/bench_train.py [--device cpu|cuda] [--task TASK | --workload NAME] [--threshold RETURN]
        [--budget SECONDS] [--save NAME] [--picture PNG]

ours    brc_fast.runs.trainer.Trainer, as `brc-fast train TASK` runs it
plain   the same loop, environments, replay, settings, seeds and noise, but networks and update are those of
        peers/torch_plain.py

Both train in one process, in turns of SLICE seconds, until an evaluation's mean return passes the threshold.
The seconds of a provider are those of its own turns: neither evaluations nor the start count. Before that,
updates of both on the same batches must agree. One seed after the other, as far as the time goes; figures of
the loop are medians of the turns in which both were learning.

--workload trains on the tasks of a workload (workloads.py), on a GPU with its width and batch size. Without
--threshold only the figures of the loop are measured: what a good return is depends on the tasks. Environment
steps are those of each task.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import Measurement, absent, equality, header, measured, median_ratio, refusal, wait, write
from plot_replay import INK, LIMIT_COLOUR, OTHER_COLOUR, OURS_COLOUR, SMALL
from update_providers import AFTER_A_STEP, FIRST, out_of_memory, release, tensor_cores
from workloads import WORKLOADS, Workload, named

from brc_fast import BRC, Batch, CriticConfig, Noise
from brc_fast.agents.policy import LaggedPolicy
from brc_fast.config import LearningConfig, TrainConfig, cpu_preset, gpu_preset
from brc_fast.envs import expand
from brc_fast.runs.trainer import Trainer
from peers.plain_agent import PlainAgent
from peers.torch_plain import METRICS

AGENTS: dict[str, type[BRC]] = {"ours": BRC, "plain": PlainAgent}
TOLERANCES = (FIRST, AFTER_A_STEP["fp32"])  # of the losses of each update that is compared
SLICE = 0.5  # seconds of a provider's turn
TASK = {"cpu": "gym/Pendulum-v1", "cuda": "mjx/CartpoleSwingup"}
# What an evaluation's mean return must reach: that of a good policy, far from that of random actions.
THRESHOLDS = {"gym/Pendulum-v1": -300.0, "mjx/CartpoleBalance": 800.0, "mjx/CartpoleSwingup": 500.0}
MOST = 5  # seeds
MORE = 1.2  # another seed is begun where there is this many times as much time left as the longest took


def settings(task: str, device: str) -> TrainConfig:
    """The defaults of `brc-fast train` on a CPU, but for the task that is learned within 4000 updates; on a
    GPU many environments."""
    if device == "cuda":
        many: dict[str, Any] = {
            "num_envs": 128,
            "updates_per_step": 8,
            "batch_size": 1024,
            "random_steps": 12_800,
        }
        return dataclasses.replace(gpu_preset(), tasks=(task,), critic=CriticConfig(width=1024), **many)
    config = dataclasses.replace(cpu_preset(), tasks=(task,), eval_every=5_000)
    if task != TASK["cpu"]:
        return config
    quick = LearningConfig(learning_rate=1e-3)
    often: dict[str, Any] = {"num_envs": 4, "updates_per_step": 4, "random_steps": 1_000, "eval_every": 500}
    return dataclasses.replace(config, learning=quick, **often)


def on_workload(workload: Workload, device: str) -> TrainConfig:
    """The same settings on the tasks of a workload; on a CPU the critic and the batches stay small."""
    config, tasks = settings(workload.suite, device), expand(workload.suite)
    if len(tasks) > 1:  # these are of each task
        config = dataclasses.replace(config, num_envs=4, eval_episodes=2, random_steps=200)
    config = dataclasses.replace(config, tasks=tasks, random_steps=min(config.random_steps, 1_000))
    if device == "cpu":
        return config
    return dataclasses.replace(config, critic=CriticConfig(width=workload.width), batch_size=workload.batch)


# ---------------------------------------------------------------- equality


def differences(config: TrainConfig, device: str, observation: int = 5, action: int = 2) -> list[str]:
    """What is not that of ours after two updates of every learner in float32, with the same noise on the same
    random batches."""
    config = dataclasses.replace(config, precision="fp32")
    rng = torch.Generator().manual_seed(0)
    shape, known, wrong = (1, config.transitions_per_update), list[dict[str, float]](), list[str]()
    batches, noise = [], []
    for _ in TOLERANCES:
        here, there = torch.randn(2, *shape, observation, generator=rng)
        actions, rewards = (
            torch.rand(*shape, action, generator=rng) * 2.0 - 1.0,
            torch.rand(shape, generator=rng),
        )
        ids = torch.randint(len(config.tasks), shape, generator=rng)
        batches.append(Batch(here, actions, rewards, torch.ones(shape), there, ids).to(device))
        noise.append(Noise(*torch.randn(2, *shape, action, generator=rng).to(device)))
    for name, kind in AGENTS.items():
        agent = kind.from_config(config, observation, action, device)
        for call, (relative, absolute) in enumerate(TOLERANCES):
            losses = {key: float(x) for key, x in agent.update(batches[call], noise[call]).items()}
            known += [losses] if name == "ours" else []
            for metric in METRICS:
                a, b = known[call][metric], losses[metric]
                if not abs(a - b) <= absolute + relative * abs(a):
                    wrong.append(f"{name} differs from ours: {metric} is {b:.6g}, not {a:.6g}")
    return wrong[:1]


# ---------------------------------------------------------------- training


class Side:
    """One provider's training with one seed."""

    def __init__(self, name: str, config: TrainConfig, device: str, threshold: float) -> None:
        self.name, self.threshold, self.device = name, threshold, device
        self.trainer = trainer = Trainer(config, device, say=lambda told: None)
        if name != "ours":
            sizes = trainer.env.observation_size, trainer.env.action_size
            trainer.agent = AGENTS[name].from_config(config, *sizes, device)
            if trainer.lagged:
                trainer.lagged = LaggedPolicy(trainer.agent)
        self.seconds = 0.0
        self.evaluations: list[dict[str, float]] = []
        if self.evaluates:
            self.evaluate()
        trainer.collect()  # which compiles

    @property
    def learning(self) -> bool:
        trainer = self.trainer
        return trainer.steps >= trainer.config.random_steps and len(trainer.replay) >= trainer.batch_size

    @property
    def evaluates(self) -> bool:
        """Not where no return is asked for: evaluations take long."""
        return self.threshold < math.inf

    @property
    def best(self) -> float:
        return max((row["return"] for row in self.evaluations), default=-math.inf)

    @property
    def done(self) -> bool:
        return self.best >= self.threshold

    def turn(self) -> tuple[float, float]:
        """Train for a slice of time, and evaluate where it is due: environment steps/s and updates/s."""
        trainer, took, due = self.trainer, 0.0, False
        steps, updates, start = trainer.steps, trainer.updates, time.perf_counter()
        while took < SLICE:
            trainer.collect()
            if self.learning:
                trainer.learn()
            due = self.evaluates and trainer.due(trainer.config.eval_every)
            took = time.perf_counter() - start
            if due:
                break
        trainer.agent.updates.join()
        wait(self.device)
        took = time.perf_counter() - start
        self.seconds += took
        trainer.agent.check_finite()
        if due:
            self.evaluate()
        return (trainer.steps - steps) / took, (trainer.updates - updates) / took

    def evaluate(self) -> None:
        found = self.trainer.evaluate()["eval/return_mean"]
        self.evaluations.append({"step": self.trainer.steps, "seconds": self.seconds, "return": found})

    def row(self) -> dict[str, Any]:
        config = self.trainer.config
        return {
            "provider": self.name,
            "seed": config.seed,
            "reached_seconds": self.seconds if self.done else None,
            "reached_steps": self.trainer.steps if self.done else None,
            "trained_seconds": self.seconds,
            "evaluations": self.evaluations,
        }

    def close(self) -> None:
        self.trainer.env.close()
        self.trainer.eval_env.close()


def told(error: BaseException) -> str:
    words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return "out of memory" if out_of_memory(error) else words


class Seed:
    """All providers' training with one seed, and the reasons of those that failed."""

    def __init__(self, config: TrainConfig, device: str, threshold: float) -> None:
        self.sides: list[Side] = []
        self.failed: dict[str, str] = {}
        # of the rounds in which all were learning
        self.rates: dict[str, list[tuple[float, float]]] = {name: [] for name in AGENTS}
        for name in AGENTS:
            with self.noting(name):
                self.sides.append(Side(name, config, device, threshold))

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """The others go on without one that fails."""
        try:
            yield
        except (ImportError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
            self.failed[name] = told(error)

    def train(self, end: float) -> None:
        """In turns until all are done or the time is up."""
        warm = False  # the first round of learning captures graphs
        while running := [s for s in self.sides if not s.done and s.name not in self.failed]:
            if time.perf_counter() >= end:
                break
            counts = len(running) == len(AGENTS) and all(side.learning for side in running)
            found = {}
            for side in running:
                with self.noting(side.name):
                    found[side.name] = side.turn()
            if counts and warm and len(found) == len(AGENTS):
                for name, rates in found.items():
                    self.rates[name].append(rates)
            warm = warm or counts

    def close(self) -> None:
        for side in self.sides:
            side.close()


# ---------------------------------------------------------------- results


def measurements(
    task: str, threshold: float | None, seeds: Sequence[Seed], wrong: Sequence[str]
) -> list[Measurement]:
    """Of every provider: seconds to the return, over seeds, if one is asked for; environment steps/s and
    updates/s, over turns."""
    found = []
    for name in AGENTS:
        sides = [side for seed in seeds for side in seed.sides if side.name == name]
        failed = next((told for told in (*wrong, *(seed.failed.get(name) for seed in seeds)) if told), None)
        if threshold is not None:
            found.append(time_to_return(f"time to return {threshold:g}, {task}", name, sides, failed))
        rates = [pair for seed in seeds for pair in seed.rates[name]]
        for place, (what, unit) in enumerate((("environment steps", "steps/s"), ("updates", "updates/s"))):
            case = f"{what} of the loop, {task}"
            if rates:
                found.append(measured(case, name, [pair[place] for pair in rates], unit, "more"))
            else:
                reason = failed or "no round in which all were learning; raise --budget"
                found.append(absent(case, name, reason, unit, "more"))
    return found


def time_to_return(case: str, name: str, sides: Sequence[Side], failed: str | None) -> Measurement:
    """Of all seeds; where one did not reach it there is no figure."""
    missing, late = failed, [side for side in sides if not side.done]
    if missing is None and late:
        missing = f"not reached in {late[0].seconds:.0f} s, best return {late[0].best:.0f}"
        if len(sides) > 1:
            missing += f" (seed {late[0].trainer.config.seed}, {len(late)} of {len(sides)} seeds)"
    if missing is None:
        return measured(case, name, [side.seconds for side in sides], "s", "less")
    return absent(case, name, missing, "s", "less")


def line(told: Measurement) -> str:
    value, spread = "-", told.get("missing", "")
    if told["value"] is not None:
        value = f"{told['value']:.1f}"
        spread = f"({told['low']:.1f} to {told['high']:.1f}, {told['rounds']} rounds)"
    return f"{told['case']:<48}{told['provider']:<8}{value:>10} {told['unit']:<10}{spread}"


def run(
    task: str, threshold: float | None, device: str, seconds: float, config: TrainConfig | None = None
) -> dict[str, Any]:
    """Seed after seed until the time is up, which begins when the first can start; nothing is timed where
    learners differ, as `equality` says. Without a threshold the first seed takes all the time."""
    config = config or settings(task, device)
    seeds: list[Seed] = []
    wrong, longest, end = differences(config, device), 0.0, 0.0
    with tensor_cores(device):
        for number in range(0 if wrong else MOST):
            start = time.perf_counter()
            if seeds and (seeds[-1].failed or end - start < MORE * longest):
                break
            seeded = dataclasses.replace(config, seed=config.seed + number)
            seed = Seed(seeded, device, math.inf if threshold is None else threshold)
            end = end if seeds else time.perf_counter() + seconds
            seeds.append(seed)
            seed.train(end)
            seed.close()
            release(device)
            longest = max(longest, time.perf_counter() - start)
    found = {
        "task": task,
        "threshold": threshold,
        "device": device,
        "settings": dataclasses.asdict(config),
        "equality": equality(wrong),
        "ratios": ratios(seeds),
        "runs": [side.row() for seed in seeds for side in seed.sides],
        "measurements": measurements(task, threshold, seeds, wrong),
    }
    print("\n".join(map(line, found["measurements"])), flush=True)
    for name, (middle, low, high) in found["ratios"].items():
        print(f"updates/s of ours over {name}: {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)
    return found


def ratios(seeds: Sequence[Seed]) -> dict[str, tuple[float, float, float]]:
    """Updates per second of ours over those of the others, with quartiles, round by round."""
    found = {}
    for name in [name for name in AGENTS if name != "ours"]:
        both = [pair for seed in seeds for pair in zip(seed.rates["ours"], seed.rates[name], strict=True)]
        if both:
            found[name] = median_ratio([a[1] for a, _ in both], [b[1] for _, b in both])
    return found


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Return of the evaluations against seconds of training; a line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.0, 3.6), layout="constrained")
    for run in found["runs"]:
        seconds, returns = zip(*((row["seconds"], row["return"]) for row in run["evaluations"]), strict=True)
        first = run["seed"] == found["settings"]["seed"]
        colour = OURS_COLOUR if run["provider"] == "ours" else OTHER_COLOUR
        label = {"ours": "brc-fast", "plain": "plain PyTorch"}[run["provider"]] if first else None
        axes.plot(seconds, returns, color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
    axes.axhline(found["threshold"], color=LIMIT_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(left=0)
    axes.set_xlabel(f"seconds of training on {found['gpu'] or found['cpu']}", **SMALL)
    axes.set_ylabel("mean return of an evaluation", **SMALL)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.grid(color="#e6e9ee", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.suptitle(f"{found['task']}: the same loop with two learners", fontsize=10.5, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--task", help=f"default: {TASK['cpu']}, on a GPU {TASK['cuda']}")
    parser.add_argument("--workload", metavar="NAME", help=f"among {', '.join(WORKLOADS)}")
    parser.add_argument("--threshold", type=float, help=f"mean return; known for {', '.join(THRESHOLDS)}")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds, after the first start")
    parser.add_argument("--save", help="name of a file under bench/results")
    parser.add_argument("--picture", type=Path, help="draw the returns against time")
    arguments = parser.parse_args(words)
    if (reason := refusal(arguments)) is not None:
        print(f"bench_train: {reason}", file=sys.stderr)
        return 2
    there = torch.cuda.is_available()
    device = arguments.device or ("cuda" if there else "cpu")
    task, threshold, config = arguments.task or TASK[device], arguments.threshold, None
    try:
        if arguments.workload and arguments.task:
            raise ValueError("--task and --workload both say what to train on; give one of them")
        if arguments.workload and arguments.picture and threshold is None:
            raise ValueError("--picture draws returns, and none are evaluated without --threshold; give it")
        if arguments.workload:
            task, config = arguments.workload, on_workload(named(arguments.workload), device)
    except ValueError as error:
        print(f"bench_train: {error}", file=sys.stderr)
        return 2
    if threshold is None and config is None:
        threshold = THRESHOLDS.get(task)
    if device == "cuda" and not there:
        print("bench_train: torch sees no CUDA device", file=sys.stderr)
        return 2
    if threshold is None and config is None:
        print(f"bench_train: no threshold is known for {task}; give --threshold", file=sys.stderr)
        return 2
    if device == "cpu":
        torch.set_num_threads(1)
    found = run(task, threshold, device, arguments.budget, config)
    if arguments.save:
        print(write(arguments.save, {"benchmark": "train", **found}))
    if arguments.picture:
        draw({**header(), **found}, arguments.picture)
        print(arguments.picture)
    return 0 if found["equality"] == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
