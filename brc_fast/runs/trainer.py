"""The training loop: act, step, record, store, sample, normalize, update; and what of it is kept on disk."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brc_fast import analysis, envs
from brc_fast.agents.brc import BRC
from brc_fast.agents.memory import plan_least, plan_run, require_fit, table
from brc_fast.agents.normalizer import RewardNormalizer
from brc_fast.agents.policy import LaggedPolicy
from brc_fast.agents.transfer import (
    NEAREST,
    Source,
    Taken,
    freeze_body,
    require_alike,
    take_over,
    widened,
)
from brc_fast.config import TrainConfig
from brc_fast.envs.base import (
    Step,
    check_finite,
    natives_of,
    require_time_limit,
    start_seen,
    step_seen,
    tasks_with_success,
)
from brc_fast.errors import InputError
from brc_fast.learner.finite import require_finite
from brc_fast.learner.precision import cores
from brc_fast.replay import ReplayBuffer
from brc_fast.replay.transfer import load_changed

from .arrays import Arrays, Kind, Kinds, kinds_of, require_kinds
from .checkpoint import REPLAY, Fits, RunFolder, grouped, prefixed
from .evaluate import evaluate, restore, summary, worth
from .interrupt import Stopped, StopRequest
from .metrics import EpisodeTracker, MetricsWriter, Stopwatch, read_rows

Report = Callable[[int, dict[str, float]], None]
# kinds of rows, by what each of them has
REPORT, EVALUATION, ANALYSIS = "train/updates", "eval/return_mean", "analysis/gradient_similarity"
ANALYSED = 256  # transitions of each task that are looked at
FIRST_ANALYSIS = 2**63  # number of a draw that no training reaches
log = logging.getLogger(__name__)


class Trainer:
    """Everything a run holds between two environment steps.

    One turn of the loop steps the whole vector, num_envs environment steps per task; `steps` counts those.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: str,
        say: Callable[[str], object] = log.info,
        quiet: bool = False,
    ) -> None:
        self.config, self.say = config, say
        if len(config.tasks) == 1:  # TrainConfig's tasks may be suites
            self._require_several(config)
        require_fit(plan_least(config, device))
        made = partial(envs.make, config.tasks, seed=config.seed, quiet=quiet, **vars(config.env))
        self.env, self.eval_env = map(made, (config.num_envs, config.eval_envs or config.eval_episodes))
        require_time_limit(self.env)
        self.names, ids = self.env.task_names, self.env.task_ids
        spec = self.env.task_spec
        memory = plan_run(config, spec, device)
        say(table(memory))
        require_fit(memory)
        self.agent = BRC.from_config(config, spec, device)
        self.lagged = LaggedPolicy(self.agent) if config.policy_lag >= config.updates_per_step else None
        self.replay = ReplayBuffer(config.replay_capacity, *spec.fields, task_ids=ids, seed=config.seed)
        self.batch_size = config.transitions_per_update
        size = self.batch_size, config.updates_per_step
        # a GPU computes by itself while environments step; a CPU needs a thread for it
        beside = self.lagged is not None and device == "cpu"
        # beside the whole replay of old tasks new ones would hardly be drawn
        self.equal = config.from_run is not None and config.transfer.keep_tasks and config.transfer.replay
        shares: dict[str, Any] = {"weights": "equal"} if self.equal else {}
        sampled = iter(partial(self.replay.sample, *size, **shares), None)
        self.batches = self.replay.prefetch(*size, **shares) if beside or device == "cuda" else sampled
        self.normalizer = RewardNormalizer.from_config(config, ids, self.agent.target_entropy)
        self.episodes = EpisodeTracker(self.names, ids)
        self.task_ids = torch.as_tensor(ids, device=device)
        self.steps, self.updates, self.watch = 0, 0, Stopwatch()
        self.saved: int | None = None  # step of the newest checkpoint
        self.rows: list[int] = []  # steps of the rows of metrics that were written
        self.taken: Taken | None = None  # sizes of the agent of another run that this one began with
        self.frozen = False  # that agent's body
        self.trial: dict[str, float] = {}  # a row of metrics, of the choice of where new tasks begin
        self.best: list[float] = []  # what the best evaluation so far is worth; empty before the first
        self.losses: dict[str, Tensor] = {}
        self.learner = ThreadPoolExecutor(1, "learner") if beside else None
        self.running: Future[dict[str, Tensor]] | None = None
        if beside and cores() == 1:
            told = "on one core environments and updates take turns all the same"
            say(f"--policy-lag {config.policy_lag}: {told}")
        self.entropies: Tensor | None = None  # [T], kept only with return_entropy="measured"
        if self.normalizer.entropy == "measured":
            self.entropies = torch.full((len(self.names),), self.agent.target_entropy / 2.0, device=device)
        self.observations: Tensor | None = None  # [N, O + P], what the critic sees before the next step

    def _require_several(self, config: TrainConfig) -> None:
        """InputError for settings that one task leaves without a meaning."""
        if config.analysis_every is not None:
            raise InputError("analysis_every compares tasks with each other, got one task: leave it out")
        if config.critic.conditioning == "heads":
            remedy = "with one task use embedding"
            if config.from_run is not None:
                remedy = "name several new ones, or add --transfer.keep-tasks"
            raise InputError(f"conditioning heads needs several tasks, got one: {remedy}")

    def take_over(self) -> None:
        """Begin with the agent of `from_run`, and for tasks that go on with their reward scale and replay;
        InputError where that does not fit. A run that is loaded does not need the other one any more."""
        config, transfer = self.config, self.config.transfer
        if config.from_run is None:
            return
        folder = RunFolder(config.from_run)
        folder.require_plain()
        before = folder.config()
        require_alike(config, before)
        going = {task: before.tasks.index(task) for task in self.names if task in before.tasks}
        if going and not transfer.keep_tasks:
            raise InputError(f"{folder.path} has {next(iter(going))} already: set transfer.keep_tasks")
        step, old = restore(folder, "cpu", transfer.checkpoint)
        self.taken = Taken.of(old)
        every = tuple(range(len(before.tasks)))
        given = (before.tasks.index(transfer.start),) if transfer.start in before.tasks else every
        starts = {task: given for task in self.names if task not in going}
        if transfer.start == NEAREST and len(every) > 1:
            starts = self._nearest(old, before.tasks, starts, going)
        take_over(self.agent, old, self._sources(starts, going), transfer.optimizer)
        if self.lagged is not None:
            self.lagged.refresh()
        for task, tasks in starts.items():
            told = f"the mean of {len(tasks)} tasks" if len(tasks) > 1 else before.tasks[tasks[0]]
            self.say(f"{task} begins as {told} of {folder.path}, step {step}")
        if going:
            self._keep(folder, before, {old: self.names.index(task) for task, old in going.items()})

    def _sources(self, starts: Mapping[str, tuple[int, ...]], going: Mapping[str, int]) -> list[Source]:
        return [
            Source((going[task],), goes_on=True) if task in going else Source(starts[task])
            for task in self.names
        ]

    def _nearest(
        self, old: BRC, names: Sequence[str], starts: Mapping[str, tuple[int, ...]], going: Mapping[str, int]
    ) -> dict[str, tuple[int, ...]]:
        """For each new task the old one whose policy, by its mean action, has the best return on it in an
        episode of every evaluation environment."""
        seed = int(np.random.SeedSequence([self.config.seed, 0]).generate_state(1)[0])
        returns = []
        for number in range(len(names)):
            tried = dict.fromkeys(starts, (number,))
            take_over(self.agent, old, self._sources(tried, going))
            returns.append(evaluate(self.agent, self.eval_env, seed).returns.mean(1))
        found: dict[str, tuple[int, ...]] = {}
        for task in starts:
            mine = {
                name: float(each[self.names.index(task)]) for name, each in zip(names, returns, strict=True)
            }
            best = max(mine, key=lambda name: mine[name])
            found[task] = (names.index(best),)
            self.trial |= {f"transfer/return/{task}/{name}": value for name, value in mine.items()}
            self.trial[f"transfer/start/{task}"] = names.index(best)
            self.say(f"{task}: returns of {', '.join(f'{name} {value:.1f}' for name, value in mine.items())}")
        return found

    def _keep(self, folder: RunFolder, before: TrainConfig, tasks: Mapping[int, int]) -> None:
        """Of old tasks, by what they are here, their reward scales and, where it is wanted, their replay."""
        assert self.taken is not None
        ids = np.repeat(np.arange(len(before.tasks)), before.num_envs)
        scales = RewardNormalizer.from_config(before, ids, self.agent.target_entropy)
        _, parts = folder.load("progress")
        with folder.fitting():
            scales.load_state_dict(grouped(parts["progress"], "normalizer"))
        for old, task in tasks.items():
            self.normalizer.return_min[task] = scales.return_min[old]
            self.normalizer.return_max[task] = scales.return_max[old]
        newest = folder.newest()
        if not self.equal or newest is None:
            return
        sizes = self.taken.observation + self.taken.privileged, self.taken.action
        change = partial(widened, taken=self.taken, sizes=Taken.of(self.agent))
        try:
            load_changed(newest / REPLAY, sizes, self.replay, tasks, change)
        except ValueError as error:
            raise InputError(f"{error}; leave it out with --transfer.no-replay") from error

    def collect(self) -> None:
        """Act in every environment and store what came of it."""
        if self.observations is None:
            self.observations = start_seen(self.env, self.env.reset_tensors(self.config.seed))
            self.count(self.observations, torch.arange(self.env.num_envs))
        seen = self.observations.to(self.agent.device)
        random = self.taken is None and self.steps < self.config.random_steps
        policy = self.lagged or self.agent
        self.watch.start()
        sensed = self.agent.sensed(seen)
        actions = self.agent.random_actions(len(seen)) if random else policy.act(sensed, self.task_ids)
        self.watch.lap("act")
        step = step_seen(self.env, self.env.step_tensors(actions))
        check_finite(step, self.env, self.steps + self.config.num_envs)
        self.steps += self.config.num_envs
        self.watch.lap("environment", self.env.num_envs)
        bootstraps = self.normalizer.bootstrap == "critic" and bool(step.truncated.any())
        values = self.unscaled_values(step.successors) if bootstraps else None
        step = Step(*(field.cpu() for field in step))
        kept = (~step.dropped).nonzero().squeeze(-1)
        seen, actions, rows = seen.cpu()[kept], actions.cpu()[kept], Step(*(field[kept] for field in step))
        ends = (rows.terminated, rows.truncated)
        self.replay.add(seen, actions, rows.rewards, *ends, rows.successors, streams=kept)
        rewards, terminated, truncated, dropped = (field.numpy() for field in step[2:])
        self.normalizer.update(rewards, terminated, truncated, values, dropped)
        self.episodes.record(step, self.env.successes)
        self.observations = step.observations
        if self.agent.observations is not None:
            # each once: where the actions led, and what new episodes begin with
            begun = (step.dropped | (step.observations != step.successors).any(1)).nonzero().squeeze(-1)
            self.count(torch.cat([rows.successors, step.observations[begun]]), torch.cat([kept, begun]))
        self.watch.lap("store")

    def count(self, observations: Tensor, slots: Tensor) -> None:
        """Take observations [M, O + P] of these slots [M] into the statistics, where the agent has some."""
        if self.agent.observations is not None:
            self.agent.observations.update(observations.cpu(), torch.from_numpy(self.env.task_ids)[slots])

    def learn(self) -> None:
        """U updates, each on its own batch; with a lagging policy they go on while the environments step."""
        batches = next(self.batches)
        self.watch.lap("sample")
        self.take()
        self.freeze()
        with self.agent.updates.queue():
            if self.lagged:
                self.lagged.refresh()
            if self.entropies is not None:
                self.entropies = self.agent.entropy_per_task(batches.update(0).to(self.agent.device))
            if self.learner is None:
                self.losses = self.agent.update(batches, reward_scale=self.scale())
            else:
                self.running = self.learner.submit(self.agent.prepared(batches, self.scale()))
        if not self.lagged:
            self.agent.updates.join()
        self.updates += self.config.updates_per_step
        self.watch.add("update", self.agent.updates.seconds(), self.config.updates_per_step)

    def freeze(self) -> None:
        """Keep the body that was taken over, and give it free when its time has come."""
        frozen = self.steps < self.config.random_steps + self.config.transfer.freeze
        if self.taken is not None and frozen != self.frozen:
            freeze_body(self.agent, self.taken if frozen else None)
            self.frozen = frozen

    def learns(self) -> bool:
        """Whether there is enough to learn from."""
        if self.steps < self.config.random_steps or len(self.replay) < self.batch_size:
            return False
        return not self.equal or bool(self.replay.size_per_task.min() > 0)

    def take(self) -> None:
        """Wait for the updates that run in a thread beside this one; what they raise is raised every time."""
        if self.running is not None:
            self.losses = self.running.result()
            self.running = None

    def join(self) -> None:
        """Let what comes next see all updates made so far."""
        self.take()
        self.agent.updates.join()

    def scale(self) -> Tensor:
        """By which each task's rewards are divided, [T]; 1 without a reward scale."""
        if not self.config.reward_scale:
            return torch.ones(len(self.names), device=self.agent.device)
        return self.normalizer.scale(self.agent.alpha, self.entropies)

    def unscaled_values(self, observations: Tensor) -> NDArray[np.float32]:
        """The critic's return to go [N], in units of reward; zero while a task's scale is unknown."""
        self.join()
        scale = self.scale()
        values = self.agent.value(observations.to(self.agent.device), self.task_ids)
        return (values * scale.where(scale.isfinite(), 0.0)[self.task_ids]).cpu().numpy()

    def evaluate(self, before_step: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Returns of the current policy, of its mean action and, with `eval_sampled`, of actions that are
        drawn as in training; start states and noise depend on the seed and the step alone."""
        self.join()
        self.watch.start()
        seed = int(np.random.SeedSequence([self.config.seed, self.steps]).generate_state(1)[0])
        episodes = self.config.eval_episodes
        play = partial(evaluate, self.agent, self.eval_env, seed, episodes, before_step=before_step)
        row = summary(self.names, play(), play(sampled=True) if self.config.eval_sampled else None)
        row["time/evaluation_seconds"] = self.watch.lap("evaluation")
        return row | {"time/total_seconds": self.watch.total}

    def analyse(self) -> dict[str, Tensor | float]:
        """How the tasks pull at the critic, by transitions drawn beside those of updates and by noise that
        depends on the seed and the step alone."""
        self.join()
        self.watch.start()
        tasks = len(self.names)
        rows = min(ANALYSED, len(self.replay) // tasks)
        batch = self.replay.peek(FIRST_ANALYSIS + self.steps, rows * tasks, weights="equal")
        signals = analysis.task_signals(self.agent, batch, self.scale(), seed=self.analysis_seed())
        row: dict[str, Tensor | float] = {**signals.row(self.names)}
        row["time/analysis_seconds"] = self.watch.lap("analysis")
        return row | {"time/total_seconds": self.watch.total}

    def analysis_seed(self) -> int:
        """Of noise that is of no update."""
        return int(np.random.SeedSequence([self.config.seed, self.steps, 1]).generate_state(1)[0])

    def row(self) -> dict[str, Tensor | float]:
        """Returns since the last row, scales, the newest update's losses, and how much the support clips."""
        self.join()
        scale, told = self.scale(), tasks_with_success(self.env)
        out: dict[str, Tensor | float] = {"train/updates": self.updates, **self.episodes.row(told)}
        for task, (name, dropped) in enumerate(zip(self.names, self.env.nan_count, strict=True)):
            out |= {f"train/reward_scale/{name}": scale[task], f"train/dropped/{name}": int(dropped)}
        if self.updates and self.agent.atoms is not None:
            batch = self.replay.peek(FIRST_ANALYSIS + self.steps, self.batch_size)
            out["train/clipped_share"] = self.agent.clipped_share(batch, scale, seed=self.analysis_seed())
        return out | {f"train/{name}": value for name, value in self.losses.items()}

    def run(self, folder: RunFolder, metrics: MetricsWriter, report: Report) -> signal.Signals | None:
        """Train to the configured length. A signal (StopRequest) ends it earlier, saved, and is returned.

        What an environment, an evaluation or a log raises is raised again after a save, with a note that says
        so. Of a learner that failed or is not finite nothing is saved.
        """
        config = self.config
        if self.taken is None:
            self.take_over()
        if self.trial and not self.steps:
            metrics.write(0, {**self.trial})
        with StopRequest() as stop:
            try:
                self.rows = [row["step"] for row in read_rows(folder.metrics)]  # what else it had was told
                folder.write_natives(natives_of(self.env))
                missing = self.missing_rows(folder)  # an evaluation that was not over, a row on a full disk
                with self.rescued(folder):
                    self.write_rows(missing, folder, metrics, report, stop)
                while self.steps < config.steps:
                    stop.check()
                    with self.rescued(folder):
                        self.collect()
                    if self.learns():
                        self.learn()
                    rows, saves = self.due_rows(), self.due(config.steps, config.checkpoint_every)
                    if rows or saves or stop:
                        self.require_finite(folder)
                    with self.rescued(folder):
                        self.write_rows(rows, folder, metrics, report, stop)
                    if saves:
                        self.save(folder)
            except Stopped:
                self.require_finite(folder)
                if self.saved != self.steps:
                    self.save(folder)
                return stop.signal
        return None  # done, also where a signal came too late to stop it

    def due_rows(self) -> list[str]:
        """The kinds of rows, in their order, that a run with these settings writes at the newest step."""
        config = self.config
        every = {REPORT: config.report_every, EVALUATION: config.eval_every}
        if config.analysis_every is not None and self.updates and self.replay.size_per_task.all():
            every[ANALYSIS] = config.analysis_every
        return [kind for kind in every if self.due(config.steps, every[kind])]

    def missing_rows(self, folder: RunFolder) -> list[str]:
        """Those of them that the folder lacks."""
        due = self.due_rows() if self.steps else []
        rows = [row for row in read_rows(folder.metrics) if row["step"] == self.steps] if due else []
        return [kind for kind in due if not any(kind in row for row in rows)]

    def write_rows(
        self,
        kinds: Sequence[str],
        folder: RunFolder,
        metrics: MetricsWriter,
        report: Report,
        stop: StopRequest,
    ) -> None:
        for kind in kinds:
            if kind == REPORT:
                counted = self.episodes.state_dict()
                try:
                    row = metrics.write(self.steps, {**self.row(), **self.watch.read()})
                except Exception:
                    self.episodes.load_state_dict(counted)  # for the row that is written after a resume
                    raise
            elif kind == ANALYSIS:
                row = metrics.write(self.steps, self.analyse())
            else:
                row = metrics.write(self.steps, {**self.evaluate(stop.check)})
            self.rows.append(self.steps)
            if kind == EVALUATION:
                self.keep_best(folder, row)
            if kind != ANALYSIS:
                report(self.steps, row)

    def due(self, *every: int) -> bool:
        """Whether the newest step of the vector reached a multiple of one of these environment steps."""
        before = self.steps - self.config.num_envs
        return any(self.steps // each > before // each for each in every)

    def keep_best(self, folder: RunFolder, evaluation: dict[str, float]) -> None:
        """Keep the agent beside the newest checkpoint where no evaluation before was as good."""
        if self.best and worth(evaluation) <= self.best:
            return
        self.watch.start()
        self.best = worth(evaluation)
        folder.save(self.steps, {"agent": as_arrays(self.agent.state_dict())}, None, best=self.best)
        self.watch.lap("checkpoint")

    def save(self, folder: RunFolder) -> None:
        """Write a checkpoint from which `load` goes on as if nothing had happened."""
        self.join()
        self.watch.start()
        progress = self.progress()
        agent = as_arrays(self.agent.state_dict())
        parts = {"agent": agent, "environments": self.env.state_dict(), "progress": progress}
        if self.lagged is not None:
            parts["lagged_policy"] = as_arrays(self.lagged.state_dict())
        folder.save(self.steps, parts, self.replay, seconds=self.watch.total)
        self.saved = self.steps
        self.watch.lap("checkpoint")

    def progress(self) -> Arrays:
        """What a checkpoint keeps beside agent, environments and replay."""
        progress = prefixed(normalizer=self.normalizer.state_dict(), episodes=self.episodes.state_dict())
        progress |= prefixed(losses=as_arrays(self.losses))
        progress["updates"], progress["rows"] = np.array(self.updates), np.array(self.rows, np.int64)
        if self.entropies is not None:
            progress["entropies"] = self.entropies.cpu().numpy()
        if self.config.from_run is not None:
            progress["taken"] = np.array(self.taken or Taken(0, 0, 0, 0), np.int64)
        return progress

    def fits(self) -> dict[str, Fits]:
        """For the parts of a checkpoint, whether what they say they hold fits this run."""
        agent = {"agent": self.agent.require_kinds}
        if self.lagged is not None:
            lagged = kinds_of(as_arrays(self.lagged.state_dict()))
            agent["lagged_policy"] = partial(require_kinds, "the lagged policy", lagged)
        return {**agent, "progress": self._require_progress}

    def _require_progress(self, kinds: Kinds) -> None:
        wanted, name = kinds_of(self.progress()), "normalizer/rewards"
        longest = max(group.max_episode_steps or 0 for group in getattr(self.env, "groups", [self.env]))
        if name in kinds and kinds[name].shape and kinds[name].shape[0] <= longest:  # steps of an episode
            rewards = wanted[name]
            wanted[name] = rewards._replace(shape=(kinds[name].shape[0], *rewards.shape[1:]))
        # how much a run has told, and of which updates, is its own; older checkpoints do not say that, nor
        # how long the episodes are that were running
        loss = Kind.of(torch.empty((), dtype=self.agent.dtype))
        told = {f"losses/{name}": loss for name in self.agent.METRICS}
        told["rows"] = Kind("int64", kinds["rows"].shape[:1] if "rows" in kinds else ())
        newer = {*told, "episodes/lengths", "episodes/steps"} - kinds.keys()
        wanted = {name: kind for name, kind in wanted.items() if name not in {*told, *newer}}
        wanted |= {name: kind for name, kind in told.items() if name in kinds}
        require_kinds("its progress", wanted, kinds)

    def load(self, folder: RunFolder) -> None:
        """Go on from a folder's newest checkpoint; InputError if it does not fit this run."""
        lagged = ("lagged_policy",) if self.lagged is not None else ()
        names = "agent", "environments", "progress", *lagged
        self.steps, parts = folder.load(*names, fits=self.fits())
        with folder.fitting():
            self.agent.load_state_dict(as_tensors(parts["agent"]))
            if self.lagged is not None:
                self.lagged.load_state_dict(as_tensors(parts["lagged_policy"]))
            progress = parts["progress"]
            self.normalizer.load_state_dict(grouped(progress, "normalizer"))
            self.episodes.load_state_dict(grouped(progress, "episodes"))
            self.updates = int(progress["updates"])
            self.losses = as_tensors(grouped(progress, "losses"))
            self.rows = progress.get("rows", np.empty(0, np.int64)).astype(np.int64).ravel().tolist()
            if not 0 <= self.updates < 2**62:
                raise ValueError(f"updates must be in [0, 2**62), got {self.updates}")
            if self.entropies is not None:
                require_finite("entropies", torch.from_numpy(progress["entropies"]))
                self.entropies = torch.from_numpy(progress["entropies"]).to(self.agent.device)
            if self.config.from_run is not None:
                sizes = progress["taken"].tolist()
                if min(sizes) < 0:
                    raise ValueError(f"sizes of the agent taken over must be 0 or more, got {sizes}")
                self.taken = Taken(*sizes)
            self.observations = start_seen(self.env, self.env.load_state_dict(parts["environments"]))
            begun = torch.from_numpy(np.flatnonzero(~self.env.continues))
            self.count(self.observations.cpu()[begun], begun)
        best = folder.best()
        self.best = [] if best is None else best[1]
        self.watch.total = folder.seconds()
        folder.load_replay(self.replay)  # last: what fits the rest and not this is damaged
        self.episodes.forget(~self.env.continues)
        self.normalizer.forget(~self.env.continues)
        self.saved = self.steps

    def require_finite(self, folder: RunFolder) -> None:
        """FloatingPointError: what stopped being finite, since when, and which checkpoint is good."""
        self.join()
        try:
            self.agent.check_finite()
        except FloatingPointError as error:
            kept = folder.steps()
            told = f"the checkpoint of step {kept[-1]} is good" if kept else "there is no checkpoint yet"
            raise FloatingPointError(f"{error}, at or before step {self.steps}; {told}") from error

    @contextmanager
    def rescued(self, folder: RunFolder) -> Iterator[None]:
        """Save what was learned when a part beside the learner fails; a note on the error says so.

        Ask first whether the learner broke, before others are blamed for what it gave them.
        """
        try:
            yield
        except Exception as error:
            try:
                self.require_finite(folder)
            except FloatingPointError as reason:
                raise reason from error
            if not self.steps:
                raise
            try:
                if self.saved != self.steps:
                    self.save(folder)
                told = f"saved at step {self.steps}"
            except Exception as second:  # the disk is full for this too, or the environments have no state
                told = f"not saved at step {self.steps} ({' '.join(str(second).split())})"
            error.add_note(told)
            raise


def as_arrays(state: dict[str, Tensor]) -> Arrays:
    return {name: value.cpu().numpy() for name, value in state.items()}


def as_tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}
