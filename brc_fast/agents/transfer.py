"""A trained agent, taken to new tasks: what it knows goes over by name, what is new begins without effect.

    observations, actions  column i of the old inputs is column i of the new ones; further columns of the
                           critic and the policy have the weight zero, so that old values and actions stay
    policy's outputs       action i of the old policy is action i of the new one; further actions are as in a
                           new agent
    tasks                  a task's row of the embedding, column of the one-hot code, or output layers: an old
                           task's own, or for a new task the mean of some old ones
    one task alone         has no such row: its part of the first layer's product goes into that one's bias
    statistics             of observations go over with the tasks that go on; new ones begin theirs

Moments go over as their parameters do. What is new has a first moment of zero, and the mean of its old
neighbours' second moments: the step count goes on too, so that Adam corrects no bias any more, and with zeros
the first hundred steps of what is new would be 3 to 6.6 times as long as those of a new agent.

Dims: E members, I inputs, K outputs, T tasks.   Source: our reading of figure 2 of Nauman et al. 2025, the
code of which is not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from brc_fast.batch import Batch
from brc_fast.config import TrainConfig, require_known
from brc_fast.errors import InputError
from brc_fast.kernels.stages import Stages, copies_input
from brc_fast.learner.flat import FlatNetworks
from brc_fast.learner.graphs import OFF
from brc_fast.learner.layout import BODY
from brc_fast.learner.optimizer import FlatAdamW
from brc_fast.nn.conditioning import OneHot
from brc_fast.nn.modules import Actor, Critic

from .brc import BRC

NETWORKS = ("critic", "target_critic", "actor")
OPTIMIZERS = {"critic_optimizer": "critic", "actor_optimizer": "actor"}
MEAN_START, NEAREST = "mean", "nearest"  # of transfer.start, beside names of tasks
VALUE, MEAN, SQUARE = "value", "exp_avg", "exp_avg_sq"  # a parameter, and its moments
LEAST = 1e-6  # of the length of a mean of rows: a shorter one has no direction


class Source(NamedTuple):
    """What a task begins as: the mean of these old tasks; `goes_on`: it is the one old task that there is."""

    tasks: tuple[int, ...]
    goes_on: bool = False


class Taken(NamedTuple):
    """Numbers of columns by which an agent's inputs are made, such as those of one that was taken over."""

    observation: int
    privileged: int
    action: int
    task: int

    @classmethod
    def of(cls, agent: BRC) -> Taken:
        sizes = agent.observation_size, agent.privileged_size, agent.action_size
        return cls(*sizes, agent.critic.conditioning.columns)

    def columns(self, network: str) -> list[slice]:
        """Of the inputs of a critic or the actor, part by part; those of the task come last."""
        critic = network != "actor"
        ends = [
            *accumulate((self.observation, *((self.privileged, self.action) if critic else ()), self.task))
        ]
        return [slice(start, end) for start, end in pairwise([0, *ends])]


def require_alike(config: TrainConfig, old: TrainConfig) -> None:
    """InputError, by name, where a run's networks are not those of the run whose agent it takes, or where it
    begins new tasks as one that this does not have."""
    start = config.transfer.start
    require_known("transfer.start", start, (MEAN_START, NEAREST, *old.tasks))
    if old.critic.conditioning == "none" and start != MEAN_START:
        raise InputError(
            f"transfer.start {start} has no meaning for the agent of {config.from_run}, which does not tell "
            "tasks apart (conditioning none)"
        )
    for section in ("critic", "actor"):
        mine, theirs = getattr(config, section), getattr(old, section)
        for name, value in vars(theirs).items():
            if getattr(mine, name) != value:
                raise InputError(
                    f"{section}.{name} of the agent of {config.from_run} is {value}, and cannot become "
                    f"{getattr(mine, name)}: leave it out"
                )
    if config.normalize_observations != old.normalize_observations:
        told = "normalizes" if old.normalize_observations else "does not normalize"
        raise InputError(f"the agent of {config.from_run} {told} observations, and that cannot change")


def grown(
    agent: BRC,
    number: int,
    sizes: tuple[int | None, int | None, int | None],
    *,
    start: int | Sequence[int] | None,
    keep: bool,
    optimizer: Literal["kept", "fresh"],
    seed: int,
) -> BRC:
    """`BRC.add_tasks`, where its arguments are described; sizes: of observation, action, privileged."""
    if number < 1:
        raise ValueError(f"number must be positive, got {number}")
    if optimizer not in ("kept", "fresh"):
        raise ValueError(f"optimizer must be kept or fresh, got {optimizer!r}")
    least = {name: getattr(agent, name) for name in ("observation_size", "action_size", "privileged_size")}
    wanted = dict(zip(least, sizes, strict=True))
    widths = {name: least[name] if size is None else size for name, size in wanted.items()}
    for name, size in widths.items():
        if keep and size < least[name]:
            raise ValueError(f"{name} must be at least the {least[name]} of the old tasks, got {size}")
    everything = tuple(range(agent.num_tasks))
    starts = [start] * number if start is None or isinstance(start, int) else list(start)
    if len(starts) != number:
        raise ValueError(f"start must name {number} old tasks, one for each new one, got {len(starts)}")
    for task in starts:
        if task is not None and task not in everything:
            raise ValueError(f"start must be an old task in [0, T) = [0, {agent.num_tasks}), got {task}")
    sources = [Source((task,), goes_on=True) for task in everything if keep]
    sources += [Source(everything if task is None else (task,)) for task in starts]
    settings = agent.settings()[1] | {"seed": seed, "graphs": agent.updates.reason != OFF}
    observation, action, settings["privileged_size"] = widths.values()
    new = type(agent)(observation, action, len(sources), **settings)
    agent.updates.join()
    take_over(new, agent, sources, optimizer)
    new.set_rates(agent.rates())
    new._taken = Taken.of(agent)
    return new


def take_over(agent: BRC, old: BRC, sources: Sequence[Source], optimizer: str = "kept") -> None:
    """Give a new agent what an old one knows; both have the same networks but for inputs, outputs and tasks.

    Args:
        sources: of each of the new agent's tasks. optimizer: kept, or fresh.
    Raises:
        InputError for a body that norms or adds its input, where its columns change.
    """
    weights = torch.zeros(len(sources), old.num_tasks)
    for task, source in enumerate(sources):
        weights[task, list(source.tasks)] = 1.0 / len(source.tasks)
    goes_on = torch.tensor([float(source.goes_on) for source in sources])[:, None]
    theirs = {name: value.detach().to(agent.device) for name, value in old.state_dict().items()}
    state = {name: value.detach().clone() for name, value in agent.state_dict().items()}
    for name in NETWORKS:
        table = "target_critic" if name == "target_critic" else "critic"
        move = _Move(agent, old, name, weights, goes_on)
        state |= move.network(f"{name}/", state, theirs, VALUE)
        move.fold(state, theirs, f"{name}/{BODY}", _table(old, theirs, table))
    state["temperature/log_alpha"] = theirs["temperature/log_alpha"]
    if optimizer == "kept":
        for name, network in OPTIMIZERS.items():
            move = _Move(agent, old, network, weights, goes_on)
            for moment in (MEAN, SQUARE):
                state |= move.network(f"{name}/{moment}/", state, theirs, moment)
            state[f"{name}/step"] = theirs[f"{name}/step"]
        state |= {key: value for key, value in theirs.items() if key.startswith("temperature_optimizer/")}
    if agent.observations is not None and old.observations is not None:
        _statistics(state, theirs, agent, old, sources)
    agent.load_state_dict({name: value.to(state[name].dtype) for name, value in state.items()})


def widened(batch: Batch, taken: Taken, sizes: Taken) -> Batch:
    """Transitions [M, ..] of an agent of the sizes `taken` as one of more columns has them."""

    def placed(x: Tensor, parts: Sequence[tuple[int, int]]) -> Tensor:
        old = torch.split(x, [before for before, _ in parts], -1)
        return torch.cat(
            [pad(each, (0, size - before)) for each, (before, size) in zip(old, parts, strict=True)], -1
        )

    seen = (taken.observation, sizes.observation), (taken.privileged, sizes.privileged)
    return batch._replace(
        observations=placed(batch.observations, seen),
        next_observations=placed(batch.next_observations, seen),
        actions=placed(batch.actions, [(taken.action, sizes.action)]),
    )


def freeze_body(agent: BRC, taken: Taken | None) -> None:
    """Let only these learn from now on: what tells tasks apart, output layers, and columns that an agent of
    the sizes `taken` did not have. None: everything.

    Where the old agent had columns for its tasks, and this one, of one task, has none, the first layer's bias
    stands for them.
    """
    agent.updates.join()
    pairs: list[tuple[str, FlatNetworks, FlatAdamW]] = [
        ("critic", agent.critics, agent.critic_optimizer),
        ("actor", agent.actors, agent.actor_optimizer),
    ]
    for name, networks, optimizer in pairs:
        optimizer.freeze(None if taken is None else _frozen(agent, taken, name, networks))
    agent.updates.forget()


def _frozen(agent: BRC, taken: Taken, network: str, networks: FlatNetworks) -> Tensor:
    """Which of a network's parameters stay, [E, P]."""
    rows = torch.zeros_like(networks.grad, dtype=torch.bool)
    module = getattr(agent, network)
    readers, head = _readers(module.body.stages), module.body.stages[-1].name
    tasks = agent.critic.conditioning
    pairs = list(zip(Taken.of(agent).columns(network), taken.columns(network), strict=True))
    own_tasks = isinstance(tasks, OneHot) or not taken.task  # else the embedding itself learns
    for name, view in networks.named(rows).items():
        stage, _, own = name.removeprefix(BODY).rpartition(".")
        if not name.startswith(BODY) or stage == head:
            continue
        view.fill_(True)
        if stage not in readers:
            continue
        if own == "kernel":
            for mine, theirs in pairs[:-1]:
                view[:, mine][:, _size(theirs) :] = False
            if own_tasks:
                view[:, pairs[-1][0]] = False
        elif own == "bias" and taken.task and not tasks.columns:
            view.fill_(False)
    return rows


def _size(part: slice) -> int:
    return int(part.stop - part.start)


def _readers(stages: Stages) -> list[str]:
    """Names of the stages that multiply the input."""
    return [stage.name for stage in stages if stage.reads == 0 and stage.product]


def _table(old: BRC, theirs: dict[str, Tensor], critic: str) -> Tensor | None:
    """What goes into the inputs for each old task, each row divided by its norm."""
    table = theirs.get(f"{critic}/embedding", old.critic.table)
    if table is None:
        return None
    rows: Tensor = table.detach()
    return rows / _length(rows, old.critic.embedding_norm)


def _length(rows: Tensor, norm: str) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, 1 if norm == "l1" else 2, -1, keepdim=True)
    return length


class _Move:
    """From one network of the old agent to that of the new one, parameters and moments alike.

    Args:
        weights: [T, old T], of the old tasks in what each task begins as. goes_on: [T, 1], 1 or 0.
    """

    def __init__(self, agent: BRC, old: BRC, network: str, weights: Tensor, goes_on: Tensor) -> None:
        self.module: Critic | Actor = getattr(agent, network)
        stages = self.module.body.stages
        self.readers, self.head = _readers(stages), stages[-1].name
        if copies_input(stages) and self.module.body.inputs != getattr(old, network).body.inputs:
            raise InputError(
                "a body that norms or adds its input cannot be taken to inputs of another width: "
                f"it has {getattr(old, network).body.inputs}, and the new tasks {self.module.body.inputs}"
            )
        critic = network != "actor"
        self.tasks, self.old_tasks = agent.critic.conditioning, old.critic.conditioning
        self.mine, self.theirs = (Taken.of(each).columns(network) for each in (agent, old))
        halves = (
            (1, agent.loss.outputs, old.loss.outputs) if critic else (2, agent.action_size, old.action_size)
        )
        self.parts, self.size, self.old_size = halves
        self.weights, self.goes_on, self.norm = weights, goes_on, agent.critic.embedding_norm
        self.alone = not self.tasks.columns and self.old_tasks.columns > 0

    def network(
        self, prefix: str, state: dict[str, Tensor], theirs: dict[str, Tensor], kind: str
    ) -> dict[str, Tensor]:
        """The new network's entries under a prefix; `state` has what they are in a new agent."""
        names = [name for name, _ in self.module.named_parameters()]
        return {
            prefix + name: self.parameter(name, state[prefix + name], theirs.get(prefix + name), kind)
            for name in names
        }

    def parameter(self, name: str, new: Tensor, old: Tensor | None, kind: str) -> Tensor:
        """A parameter or a moment of it, from what it is in a new agent and what it was in the old one."""
        if old is None:  # an embedding, where there was one task
            return new
        old = old.to(new.dtype)
        if name == "embedding":
            return self._rows(new, old, kind)
        stage, _, own = name.removeprefix(BODY).rpartition(".")
        if own == "kernel" and stage in self.readers:
            old = self._inputs(old, kind)
        return self._outputs(new, old, kind) if stage == self.head else old

    def fold(
        self, state: dict[str, Tensor], theirs: dict[str, Tensor], prefix: str, table: Tensor | None
    ) -> None:
        """Where one task is left, what its row of the table (or the mean of such) adds to the first layer."""
        if not self.alone or table is None:
            return
        row = self.weights.to(table) @ table
        if not isinstance(self.old_tasks, OneHot) and _length(row, self.norm) >= LEAST:
            row = row / _length(row, self.norm)
        for stage in self.readers:
            if f"{prefix}{stage}.bias" not in state:
                raise InputError(f"stage {stage} of the body has no bias, which one task alone would need")
            added = row @ theirs[f"{prefix}{stage}.kernel"][:, self.theirs[-1]]  # [E, 1, H]
            state[f"{prefix}{stage}.bias"] = state[f"{prefix}{stage}.bias"] + added[:, 0]

    def _mixing(self, like: Tensor, kind: str) -> Tensor:
        """[T, old T], of parameters and second moments, or of first moments, which only old tasks have."""
        return (self.weights * self.goes_on if kind == MEAN else self.weights).to(like)

    def _rows(self, new: Tensor, old: Tensor, kind: str) -> Tensor:
        """Of the embedding [T, D]. A mean is that of directions, as long as the rows are on average."""
        mixed = self._mixing(old, kind) @ old
        if kind != VALUE:
            return mixed
        length, weights = _length(old, self.norm), self.weights.to(old)
        mean = weights @ (old / length)
        short = _length(mean, self.norm)
        means = torch.where(short < LEAST, new, mean / short.clamp_min(LEAST) * (weights @ length))
        return torch.where(weights.amax(-1, keepdim=True) == 1, mixed, means)

    def _inputs(self, old: Tensor, kind: str) -> Tensor:
        """Rows of a kernel [E, I, H], one for each input."""
        fill = old.mean(-2, keepdim=True) if kind == SQUARE else torch.zeros_like(old[:, :1])
        out = fill.repeat(1, self.mine[-1].stop, 1)
        for mine, theirs in zip(self.mine[:-1], self.theirs[:-1], strict=True):
            size = min(_size(mine), _size(theirs))
            out[:, mine][:, :size] = old[:, theirs][:, :size]
        mine, theirs = self.mine[-1], self.theirs[-1]
        if self.tasks.columns and self.old_tasks.columns:
            rows = old[:, theirs]
            out[:, mine] = self._mixing(old, kind) @ rows if isinstance(self.tasks, OneHot) else rows
        return out

    def _outputs(self, new: Tensor, old: Tensor, kind: str) -> Tensor:
        """Columns of the head [E, .., heads * K]."""
        out = new.clone().view(*new.shape[:-1], self.tasks.heads, self.parts, self.size)
        was = old.reshape(*old.shape[:-1], self.old_tasks.heads, self.parts, self.old_size)
        size = min(self.size, self.old_size)
        mixed = was[..., :size]
        if self.old_tasks.heads > 1:
            mixed = torch.einsum("ts,...spk->...tpk", self._mixing(old, kind), mixed)
        out[..., :size] = mixed
        if kind == SQUARE:
            out[..., size:] = mixed.mean(-1, keepdim=True)
        return out.flatten(-3)


def _statistics(
    state: dict[str, Tensor], theirs: dict[str, Tensor], agent: BRC, old: BRC, sources: Sequence[Source]
) -> None:
    """Of observations: those of tasks that go on, whose further columns have been zero so far."""
    mine, before = (Taken.of(each).columns("critic")[:2] for each in (agent, old))
    for task, source in enumerate(sources):
        if not source.goes_on:
            continue
        (number,) = source.tasks
        state["observations/count"][task] = theirs["observations/count"][number]
        if not theirs["observations/count"][number] > 0:
            continue
        for name in ("mean", "variance"):
            row, was = state[f"observations/{name}"][task], theirs[f"observations/{name}"][number]
            row.zero_()
            for part, old_part in zip(mine, before, strict=True):
                size = min(_size(part), _size(old_part))
                row[part][:size] = was[old_part][:size]
