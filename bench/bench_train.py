"""The whole training loop: time to a return, and environment steps and updates per second together.

    python bench/bench_train.py [--device cpu|cuda] [--task TASK | --workload NAME] [--threshold RETURN]
        [--budget SECONDS] [--save NAME]

ours    brc_fast.runs.trainer.Trainer, as `brc-fast train TASK` runs it
plain   the same loop, environments, replay, settings and seeds, but networks and update are those of
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

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import harness
import torch
from harness import Clock, Differs, Missing, Parser, Results, Unavailable
from workloads import WORKLOADS, Workload

from brc_fast import BRC, CriticConfig, LearningConfig, TrainConfig
from brc_fast.config import cpu_preset, gpu_preset
from brc_fast.envs import expand
from brc_fast.runs.trainer import Trainer
from brc_fast.spec import Spec
from peers.torch_plain import PlainAgent
from peers.updates import Provider, Subject, difference, release
from peers.updates import run as losses

AGENTS: dict[str, type[BRC]] = {"ours": BRC, "plain": PlainAgent}
SLICE = 0.5  # seconds of a provider's turn
SEEDS = 5  # at most
TASK = {"cpu": "gym/Pendulum-v1", "cuda": "mjx/CartpoleSwingup"}
# What an evaluation's mean return must reach: that of a good policy, far from that of random actions.
THRESHOLDS = {"gym/Pendulum-v1": -300.0, "mjx/CartpoleBalance": 800.0, "mjx/CartpoleSwingup": 500.0}


def settings(task: str, device: str, workload: Workload | None = None) -> TrainConfig:
    """The defaults of `brc-fast train` on a CPU, but for the task that is learned within 4000 updates; on a
    GPU many environments, and the width and batch size of a workload."""
    tasks = expand(task)
    several: dict[str, Any] = {"tasks": tasks, "eval_every": 5_000, "eval_sampled": False}
    if len(tasks) > 1:  # these are of each task
        several |= {"num_envs": 4, "eval_episodes": 2, "random_steps": 200}
    elif workload is not None:
        several["random_steps"] = 1_000
    if device == "cuda":
        wide = workload or Workload("", "", 0, 0, batch=1024, width=1024)
        many: dict[str, Any] = {"num_envs": 128, "updates_per_step": 8, "random_steps": 12_800}
        many |= {"critic": CriticConfig(width=wide.width), "batch_size": wide.batch}
        return dataclasses.replace(gpu_preset(), **(many | several))
    if task == TASK["cpu"]:
        several |= {"num_envs": 4, "updates_per_step": 4, "random_steps": 1_000, "eval_every": 500}
        several["learning"] = LearningConfig(learning_rate=1e-3)
    return dataclasses.replace(cpu_preset(), **several)


def check(config: TrainConfig, device: str) -> None:
    """Differs unless two updates of every learner in float32, with the same noise on the same random batches,
    give the losses of ours."""
    size = Workload("", "", 5, 2, len(config.tasks), config.transitions_per_update)
    config, spec = dataclasses.replace(config, precision="fp32"), Spec.vectors(5, 2, config.tasks)

    def learner(name: str) -> Provider:
        update = AGENTS[name].from_config(config, spec, device).update
        return Provider(update, dict, list, list, "fp32")  # parameters of the networks are not compared

    subject = Subject(size, device=device)
    if (wrong := difference(learner("plain"), subject, losses(learner("ours"), subject))) is not None:
        raise Differs(f"differs from ours: {wrong}")


class Side:
    """One provider's training. A threshold of infinity asks for no evaluations."""

    def __init__(self, name: str, config: TrainConfig, device: str, threshold: float) -> None:
        self.name, self.threshold, self.device = name, threshold, device
        with mock.patch("brc_fast.runs.trainer.BRC", AGENTS[name]):
            self.trainer = Trainer(config, device, say=lambda told: None)
        self.seconds, self.evaluations = 0.0, list[dict[str, float]]()
        self.evaluate()
        self.trainer.collect()  # which compiles

    @property
    def learning(self) -> bool:
        trainer = self.trainer
        return trainer.steps >= trainer.config.random_steps and len(trainer.replay) >= trainer.batch_size

    @property
    def best(self) -> float:
        return max((row["return"] for row in self.evaluations), default=-math.inf)

    @property
    def done(self) -> bool:
        return self.best >= self.threshold

    def turn(self) -> tuple[float, float]:
        """Train for a slice of time, evaluate where it is due: seconds per environment step and update."""
        trainer, due, start = self.trainer, False, time.perf_counter()
        steps, updates = trainer.steps, trainer.updates
        while time.perf_counter() - start < SLICE and not due:
            trainer.collect()
            if self.learning:
                trainer.learn()
            due = self.threshold < math.inf and trainer.due(trainer.config.eval_every)
        harness.wait(self.device)
        took = time.perf_counter() - start
        self.seconds += took
        trainer.agent.check_finite()
        if due:
            self.evaluate()
        return took / max(1, trainer.steps - steps), took / max(1, trainer.updates - updates)

    def evaluate(self) -> None:
        if self.threshold < math.inf:
            found = self.trainer.evaluate()["eval/return_mean"]
            self.evaluations.append({"step": self.trainer.steps, "seconds": self.seconds, "return": found})

    def close(self) -> dict[str, Any]:
        """What is stored of it."""
        self.trainer.env.close()
        self.trainer.eval_env.close()
        told = {"provider": self.name, "seed": self.trainer.config.seed, "trained_seconds": self.seconds}
        return {**told, "reached": self.done, "evaluations": self.evaluations}


Rates = list[dict[str, tuple[float, float]]]


def train(sides: Sequence[Side], clock: Clock, missing: Missing) -> Rates:
    """In turns until all are done or the time is up; the turns of the rounds in which all were learning."""
    rates: Rates = []
    while (running := [s for s in sides if not s.done and s.name not in missing]) and clock.left > 0.0:
        learning, turns = all(side.learning for side in running), dict[str, tuple[float, float]]()
        for side in running:
            with missing.of(side.name):
                turns[side.name] = side.turn()
        if learning and len(turns) == len(AGENTS):
            rates.append(turns)
    return rates[1:]  # graphs are captured in the first


def run(
    found: Results, task: str, threshold: float | None, device: str, seconds: float, config: TrainConfig
) -> None:
    """Seed after seed until the time is up, which begins when the first can start; nothing is timed where
    learners differ. A later seed that does not reach the return in time does not count."""
    sides, rates, missing, clock = list[Side](), Rates(), Missing(), Clock(math.inf)
    found.found |= {"task": task, "threshold": threshold, "settings": dataclasses.asdict(config), "runs": []}
    harness.tensor_cores(device)
    with missing.of(*AGENTS):
        check(config, device)
    for seed in range(SEEDS if threshold is not None else 1):
        own = list[Side]()
        for name in AGENTS if not missing else ():
            with missing.of(name):
                seeded = dataclasses.replace(config, seed=config.seed + seed)
                own.append(Side(name, seeded, device, math.inf if threshold is None else threshold))
        clock = clock if seed else Clock(seconds)
        rates += train(own, clock, missing)
        found.found["runs"] += [side.close() for side in own]
        release(device)
        if seed == 0 or all(side.done for side in own):
            sides += own
        if missing or clock.left == 0.0:
            break
    if threshold is not None:
        late = {
            s.name: f"not reached in {s.seconds:.0f} s, best return {s.best:.0f}" for s in sides if not s.done
        }
        lost = {name: Unavailable(told) for name, told in late.items()} | missing
        reached = {n: [s.seconds for s in sides if s.name == n] for n in AGENTS if n not in lost}
        found.case(f"time to return {threshold:g}, {task}", reached, "s", missing=lost)
    for place, (what, unit) in enumerate((("environment steps", "steps/s"), ("updates", "updates/s"))):
        none = Unavailable("no round in which all were learning; raise --budget")
        each = {name: [turns[name][place] for turns in rates] for name in AGENTS if rates}
        lost = {name: missing.get(name, none) for name in AGENTS if name not in each}
        found.case(f"{what} of the loop, {task}", each, unit, ours="ours", missing=lost)


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(240.0, workloads="?")
    parser.add_argument("--task", help=f"default: {TASK['cpu']}, on a GPU {TASK['cuda']}")
    parser.add_argument("--threshold", type=float, help=f"mean return; known for {', '.join(THRESHOLDS)}")
    given = parser.parse_args(words)
    if given.workload and given.task:
        parser.error("--task and --workload both say what to train on; give one of them")
    device = parser.device(given)
    task = given.workload or given.task or TASK[device]
    threshold = THRESHOLDS.get(task) if given.threshold is None else given.threshold
    if threshold is None and not given.workload:
        parser.error(f"no threshold is known for {task}; give --threshold")
    if device == "cpu":
        torch.set_num_threads(1)
    workload = WORKLOADS[given.workload] if given.workload else None
    config = settings(workload.suite if workload else task, device, workload)
    found = Results("train", given.save, device=device)
    run(found, task, threshold, device, given.budget, config)
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
