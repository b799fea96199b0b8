"""Evaluation: the policy's mean action, or a sample of its own, in exactly n episodes per task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from brc_fast.agents.brc import BRC
from brc_fast.agents.memory import plan_least, plan_memory, require_fit, require_memory
from brc_fast.config import TrainConfig
from brc_fast.envs.base import (
    VectorEnvironment,
    check_finite,
    require_kept_limit,
    require_time_limit,
    tasks_with_success,
)
from brc_fast.errors import InputError

from .arrays import Kinds
from .checkpoint import RunFolder
from .plot import learning_settings
from .scores import Estimate, Values, aggregate, normalized

LOST_IN_A_ROW = 10
ALIKE = 0.02  # of the mean return: a smaller deviation is none


class Episodes(NamedTuple):
    """n episodes of each of T tasks."""

    returns: NDArray[np.float64]  # [T, n] undiscounted
    lengths: NDArray[np.float64]  # [T, n] steps
    successes: NDArray[np.float64]  # [T, n] 1 if any step was a success, else 0; NaN for a task without such


def evaluate(
    agent: BRC,
    env: VectorEnvironment,
    seed: int,
    episodes: int | None = None,
    *,
    sampled: bool = False,
    before_step: Callable[[], object] = lambda: None,
) -> Episodes:
    """Play exactly `episodes` per task, by default one per slot, with the mean action or, `sampled`, with the
    policy's own noise. The seed gives the start states, and that noise: the agent's generator is left alone.

    How many each of a task's S slots plays is fixed before the first step, and all of them count: the first n
    to finish, wherever they do, would mostly be short ones. Slot i plays the episodes i, i + S, i + 2 S, ...
    An episode that is lost to NaN or to a dead process is played again. What `before_step` raises, called
    before every step, ends it.

    Raises InputError for sizes that differ from the agent's, for a task without a time limit or that
    does not keep it, for numbers that are not finite, and where a slot loses 10 episodes in a row.
    """
    sizes = [[agent.observation_size, agent.action_size], [*env.task_spec.vector_sizes("the agent")]]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"observation_size and action_size must be the agent's, {sizes[0]}, got environments with "
            f"{sizes[1]}: make those it was trained on"
        )
    require_time_limit(env)
    tasks = len(env.task_names)
    slots = env.num_envs // tasks
    count = slots if episodes is None else episodes
    task, slot = env.task_ids, np.arange(env.num_envs) % slots
    quota = count // slots + (slot < count % slots)
    result = Episodes(*np.zeros((3, tasks, count)))
    returns, lengths, successes = np.zeros((3, env.num_envs))  # of the episodes that are running
    played, lost = np.zeros((2, env.num_envs), np.int64)

    observations = env.reset_tensors(seed)
    task_ids = torch.as_tensor(task, device=agent.device)
    generator = torch.Generator(agent.device).manual_seed(seed) if sampled else None
    act = partial(agent.act, generator=generator) if sampled else partial(agent.act, deterministic=True)
    number = 0
    while (played < quota).any():
        before_step()
        actions = act(observations.to(agent.device), task_ids)
        step = env.step_tensors(actions)
        number += 1
        check_finite(step, env, number)
        observations = step.observations
        ends = (step.terminated | step.truncated).float()
        rewards, ended, dropped = torch.stack((step.rewards, ends, step.dropped.float())).cpu().numpy()
        ended, dropped, running = ended > 0, dropped > 0, played < quota

        returns += np.where(dropped, 0.0, rewards)
        lengths += ~dropped
        longest = int(np.where(running, lengths, 0.0).argmax())
        require_kept_limit(env, longest, int(lengths[longest]))
        if env.successes is not None:
            successes[env.successes.numpy() & ~dropped] = 1.0
        finished = np.flatnonzero(ended & ~dropped & running)
        place = task[finished], slot[finished] + slots * played[finished]
        for kept, current in zip(result, (returns, lengths, successes), strict=True):
            kept[place] = current[finished]
            current[ended] = 0.0
        played[finished] += 1
        lost[finished] = 0
        lost += ended & dropped & running
        if lost.max() >= LOST_IN_A_ROW:
            _give_up(env, int(lost.argmax()))
    result.successes[~tasks_with_success(env)] = np.nan
    return result


def _give_up(env: VectorEnvironment, slot: int) -> None:
    raise InputError(
        f"{env.task_names[env.task_ids[slot]]} cannot be evaluated: environment {slot} lost {LOST_IN_A_ROW} "
        "episodes in a row to NaN or to a process that died; see the warnings above, or lower episode_length"
    )


def summary(
    task_names: tuple[str, ...], episodes: Episodes, sampled: Episodes | None = None
) -> dict[str, float]:
    """Metrics of an evaluation: `eval/return/<task>` and `eval/length/<task>`, the means over its episodes,
    and where the task tells it `eval/success/<task>`, the share of episodes with a step that was a success;
    `eval/return_mean` and `eval/success_mean` are over the tasks. Of episodes with the policy's own noise the
    same is under `eval/sampled_return/<task>`, and so on."""
    row: dict[str, float] = {}
    for kind, played in (("", episodes), ("sampled_", sampled)):
        for name, values in (
            () if played is None else zip(("return", "length", "success"), played, strict=True)
        ):
            means = dict(zip(task_names, values.mean(1).tolist(), strict=True))
            known = {task: mean for task, mean in means.items() if not np.isnan(mean)}
            row |= {f"eval/{kind}{name}/{task}": mean for task, mean in known.items()}
            if known and name != "length":
                row[f"eval/{kind}{name}_mean"] = float(np.mean(list(known.values())))
    return row


def worth(row: dict[str, float]) -> list[float]:
    """What an evaluation's `summary` is compared by, the most important first: where every task tells its
    successes their mean, and the mean return."""
    tasks = sum(name.startswith("eval/return/") for name in row)
    told = sum(name.startswith("eval/success/") for name in row)
    names = ["eval/success_mean"] * (told == tasks) + ["eval/return_mean"]
    return [row[name] for name in names]


@dataclass(frozen=True)
class Evaluation:
    """Episodes of one run, or with `over_runs` the means of several, together with their scores.

    Scores and their aggregates are of the mean action."""

    task_names: tuple[str, ...]
    samples: Episodes  # of the mean action
    sample: Literal["episode", "run"] = "episode"
    scaled: bool = True  # False where episodes have not the length that the suite gives them: no scores
    sampled: Episodes | None = None  # with the policy's own noise

    @classmethod
    def over_runs(cls, runs: Sequence[Evaluation]) -> Evaluation:
        """One sample per run: its mean over episodes. All must have the same tasks."""

        def means(played: Sequence[Episodes]) -> Episodes:
            fields = zip(*played, strict=True)
            return Episodes(*(np.stack([values.mean(1) for values in field], axis=1) for field in fields))

        noisy = [run.sampled for run in runs if run.sampled is not None]
        return cls(
            runs[0].task_names,
            means([run.samples for run in runs]),
            "run",
            all(run.scaled for run in runs),
            means(noisy) if len(noisy) == len(runs) else None,
        )

    @cached_property
    def scores(self) -> dict[str, Values]:
        """Normalised scores [n] of the tasks that have a scale; see `brc_fast.runs.scores.normalized`."""
        rows = zip(self.task_names, self.samples.returns, self.samples.successes, strict=True)
        found = {name: normalized(name, returns, successes) for name, returns, successes in rows}
        return {name: scores for name, scores in found.items() if scores is not None and self.scaled}

    @cached_property
    def alike(self) -> list[str]:
        """Tasks with a score whose episodes hardly differ, as where they start alike: they are one sample of
        what the policy can do, however many they are."""
        spread = (
            dict(zip(self.task_names, self.samples.returns, strict=True)) if self.sample == "episode" else {}
        )
        return [
            name for name, x in spread.items() if name in self.scores and x.std() <= ALIKE * abs(x.mean())
        ]

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Aggregates of all scores, without bounds where episodes are `alike`; none without scores."""
        if not self.scores:
            return {}
        found = aggregate(np.stack(list(self.scores.values())))
        if self.alike:
            return {name: Estimate(each.value, np.nan, np.nan) for name, each in found.items()}
        return found

    def _numbers(self, played: Episodes) -> dict[str, Any]:
        """Every episode's, by task; successes of the tasks that tell them."""
        returns, lengths, successes = (
            dict(zip(self.task_names, values.tolist(), strict=True)) for values in played
        )
        told = {name: values for name, values in successes.items() if not np.isnan(values).any()}
        return {"returns": returns, "lengths": lengths, "successes": told}

    def record(self) -> dict[str, Any]:
        """What evaluation.json keeps: the summary, every number that it is made of, and the aggregates as
        [value, low, high]; low and high are null where there is one sample per task, or episodes that are
        `alike`."""
        return {
            **summary(self.task_names, self.samples, self.sampled),
            **self._numbers(self.samples),
            **({} if self.sampled is None else {"sampled": self._numbers(self.sampled)}),
            "scores": {name: values.tolist() for name, values in self.scores.items()},
            "aggregate": {
                name: [None if np.isnan(x) else x for x in estimate]
                for name, estimate in self.estimates.items()
            },
        }

    def table(self) -> str:
        """Means over the samples, a line per task, and the aggregates of the scores."""
        width = max(len(name) for name in self.task_names)
        noisy = self.sampled
        extra = "" if noisy is None else f"  {'sampled return':>20}  success"
        lines = [f"  {'task':<{width}}  {'return':>20}  success{extra}  score   length"]
        for task, (name, lengths) in enumerate(zip(self.task_names, self.samples.lengths, strict=True)):
            columns = "".join(
                _columns(played, task) for played in (self.samples, noisy) if played is not None
            )
            score = f"{self.scores[name].mean():.3f}" if name in self.scores else "-"
            lines.append(f"  {name:<{width}}{columns}  {score:>5}  {lengths.mean():7.1f}")
        count = self.samples.returns.shape[1]
        if count > 1:
            lines.append(f"  [+-: standard deviation of {count} {self.sample}s per task]")
        if noisy is not None:
            lines.append("  [sampled: with the policy's own noise; the rest is of its mean action]")
        if self.scores:
            told = ", ".join(f"{name} {estimate}" for name, estimate in self.estimates.items())
            lines.append(f"  score over {len(self.scores)} of {len(self.task_names)} tasks: {told}")
            if self.alike and count > 1:
                more = f" and {len(self.alike) - 1} more tasks" if len(self.alike) > 1 else ""
                told = (
                    f"episodes of {self.alike[0]}{more} hardly differ (standard deviation within {ALIKE:.0%})"
                )
                lines.append(f"  [no bounds: {told}, so they are one sample]")
            elif count > 1:
                whose = ", all of one policy: seeds may differ more" if self.sample == "episode" else ""
                lines.append(
                    f"  [bounds of 95%: stratified bootstrap of {count} {self.sample}s per task{whose}]"
                )
        elif not self.scaled:
            lines.append(
                "  no scores: they presume the suites' own episode lengths, and episode_length is set"
            )
        return "\n".join(lines)


def _columns(played: Episodes, task: int) -> str:
    """Return and success of one task, as `table` has them."""
    returns, _, successes = (values[task] for values in played)
    spread = f"{returns.mean():.1f} +- {returns.std():.1f}"
    success = "-" if np.isnan(successes).any() else f"{successes.mean():.3f}"
    return f"  {spread:>20}  {success:>7}"


def apart(names: Sequence[str], configs: Sequence[TrainConfig], steps: Sequence[int]) -> str:
    """Why runs are no repetitions of one experiment with other seeds; empty where they are.

    steps: at which they are compared.
    """
    told = [{**learning_settings(config), "step": step} for config, step in zip(configs, steps, strict=True)]
    found = []
    for key in told[0]:
        values = [each[key] for each in told]
        other = next((index for index, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            found.append(f"{key} is {values[0]} in {names[0]} and {values[other]} in {names[other]}")
    runs = [(config.seed, each) for config, each in zip(configs, told, strict=True)]
    for index, run in enumerate(runs):
        if (first := runs.index(run)) < index:
            twice = f"{names[index]} has the settings and the seed {run[0]} of {names[first]}"
            found.append(f"{twice}: a run that was repeated is no further seed")
    return "; ".join(found)


def restore(folder: RunFolder, device: str, checkpoint: str = "last") -> tuple[int, BRC]:
    """The agent of a run's checkpoint "last", "best" or of a step, and the step that it was written at."""
    folder.require_plain()
    # acting takes float32 products whatever learning took, on any device
    config = dataclasses.replace(folder.config(), precision="fp32")
    require_fit(plan_least(config, device)[:1])
    folder.require_size(config)

    def fits(kinds: Kinds) -> None:
        state = {
            name: torch.empty(kind.shape, dtype=getattr(torch, kind.dtype), device="meta")
            for name, kind in kinds.items()
        }
        spec = BRC.spec_of(config, state)
        plan = plan_memory(dataclasses.replace(config, batch_size=1, updates_per_step=1), spec, device)
        require_memory(plan, device)
        BRC.from_config(config, spec, "meta").require_kinds(kinds)

    step, parts = folder.load("agent", checkpoint=checkpoint, fits={"agent": fits})
    with folder.fitting():
        state = {name: torch.from_numpy(value) for name, value in parts["agent"].items()}
        agent = BRC.from_config(config, BRC.spec_of(config, state), device)
        agent.load_state_dict(state)
    return step, agent


def env_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of the run's environments, as `envs.make` takes them."""
    return dataclasses.asdict(config.env)
