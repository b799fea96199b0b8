"""How the tasks of one critic pull at it: cosines between their gradients, and what each of them shows.

Dims: T tasks, E members, B rows, K atoms.
Source: the quantities are those of figures 3 and 5 of Nauman et al. 2025, arXiv:2505.23150, whose code for
them is not public: the definitions are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from brc_fast import kernels
from brc_fast.agents.brc import BRC
from brc_fast.batch import Batch, require_shape
from brc_fast.learner.precision import products
from brc_fast.nn.losses import Backup, reduced
from brc_fast.nn.modules import Critic

__all__ = ["Signals", "Similarity", "gradient_similarity", "task_signals"]

HELD = 2**30  # bytes of gradients that are held at a time


class Similarity(NamedTuple):
    """Cosines between the critic's gradients of two tasks."""

    pairs: Tensor  # [T, T]; NaN where a task has no gradient
    mean: Tensor  # 0-d, over the T (T - 1) / 2 pairs of different tasks


class Signals(NamedTuple):
    """What a batch shows of each task.

    similarity:     of the gradients
    td_error:       [T], mean over members and rows of |Q - (r + discount * mask * (Q' - alpha log pi))|, with
                    Q' the mean of the target's members (reduction "min": the lowest, "own": each its own), in
                    units of the scaled return; nothing is clipped to the support
    gradient_norm:  [T], L2 norm of the task's gradient
    entropy:        [T], mean over members and rows of the predicted distribution's, in nats; None with a loss
                    that has no distribution
    """

    similarity: Similarity
    td_error: Tensor
    gradient_norm: Tensor
    entropy: Tensor | None

    def row(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """By the names of metrics.jsonl: `analysis/td_error/<task>` and its like, their spreads over tasks,
        `analysis/spread_td_error`, and `analysis/gradient_similarity`, the mean over pairs."""
        out = {"analysis/gradient_similarity": self.similarity.mean}
        for name in ("td_error", "gradient_norm", "entropy"):
            values: Tensor | None = getattr(self, name)
            if values is not None:
                out[f"analysis/spread_{name}"] = spread(values)
                each = zip(tasks, values, strict=True)
                out |= {f"analysis/{name}/{task}": value for task, value in each}
        return out


def spread(values: Tensor) -> Tensor:
    """Of values [T] over tasks: their standard deviation (of all T, not T - 1) divided by their mean."""
    return values.std(correction=0) / values.mean()


def gradient_similarity(
    agent: BRC, batch: Batch, reward_scale: Tensor | None = None, *, seed: int = 0
) -> Similarity:
    """Cosines between the gradients that the critic's loss has for each task, on its rows of the batch.

        g_t = d/dw sum_e mean_{b of task t} loss[e, b],   cosine(s, t) = g_s . g_t / (|g_s| |g_t|)

    w are the parameters of the critic's body, of all members together: without the embedding, the output
    layer and what multiplies the columns of tasks, so that ways to tell tasks apart can be compared.

    Everything is read, and nothing of the agent changes: neither parameters nor gradients, moments or noise.
    It takes as long as an update of the same rows, and memory for the gradients of all tasks, or for 1 GiB of
    them and then more time. Products are in float32, or in float64 with such an agent.

    Args:
        batch: [B, ...], or several [U, B, ...], which are taken together; rows of every task, raw rewards.
        reward_scale: [T], by which each task's rewards are divided; 1 where it is not given.
        seed: of the noise of the next actions.
    Raises:
        ValueError for an agent of one task, a batch that lacks a task, and shapes that do not fit.
    """
    return task_signals(agent, batch, reward_scale, seed=seed).similarity


def task_signals(agent: BRC, batch: Batch, reward_scale: Tensor | None = None, *, seed: int = 0) -> Signals:
    """Errors, gradients and entropies of each task; arguments, costs and errors are those of
    `gradient_similarity`."""
    tasks = agent.num_tasks
    if tasks < 2:
        raise ValueError("tasks are compared with each other, and this agent has one")
    batches = batch.updates()
    batches.check(agent.observation_size + agent.privileged_size, agent.action_size, tasks)
    # rows are new tensors, and what is differentiated must not be of inference mode
    with torch.inference_mode(False), torch.enable_grad(), products("fp32", agent.device):
        return _signals(agent, batches.map(lambda column: column.flatten(0, 1)), reward_scale, seed)


def _signals(agent: BRC, batch: Batch, reward_scale: Tensor | None, seed: int) -> Signals:
    """Of a batch [B, ...]."""
    tasks, batch = agent.num_tasks, batch.to(agent.device)
    ids = batch.task_ids
    for task, rows in enumerate(ids.bincount(minlength=tasks).tolist()):
        if not rows:
            told = f"the batch must have rows of each of the {tasks} tasks, and has none of task {task}"
            raise ValueError(f"{told}: take a larger one, or a share of each task")
    if reward_scale is not None:
        require_shape("reward_scale", reward_scale, "[T]", (tasks,))
        batch = batch._replace(rewards=batch.rewards / reward_scale.to(agent.device)[ids])
    generator = torch.Generator(agent.device).manual_seed(seed)
    noise = torch.randn(batch.actions.shape, generator=generator, device=agent.device, dtype=agent.dtype)
    parts = [batch.map(lambda column, task=task: column[ids == task]) for task in range(tasks)]  # type: ignore[misc]
    body = body_parameters(agent.critic)
    errors, entropies = batch.rewards.new_empty(tasks), batch.rewards.new_empty(tasks)

    def gradient(task: int) -> Tensor:
        """[P], of one task; leaves its other signals."""
        own = parts[task]
        with torch.no_grad():
            next_actions, next_log_probs = kernels.tanh_gaussian(
                *agent.policy(agent.sensed(own.next_observations), own.task_ids), noise[ids == task]
            )
            seen = agent.normalized(own.next_observations, own.task_ids)
            next_out = agent.target_critic(seen, next_actions, own.task_ids)
        discounts = agent.learning.discount * own.masks
        backup = Backup(own.rewards, discounts, next_log_probs, agent.alpha)
        out = agent.critic(agent.normalized(own.observations, own.task_ids), own.actions, own.task_ids)
        loss = agent.loss.bellman(out, next_out, backup, agent.atoms).mean(-1).sum()
        grads = torch.autograd.grad(loss, [parameter for parameter, _ in body])
        with torch.no_grad():
            errors[task] = _td_error(agent, out, next_out, backup)
            log_probs = out.log_softmax(-1)
            entropies[task] = -(log_probs.exp() * log_probs).sum(-1).mean()
        return torch.cat([grad[:, own].flatten() for grad, (_, own) in zip(grads, body, strict=True)])

    gram = _products(gradient, tasks)
    norms = gram.diagonal().sqrt()
    cosines = (gram / (norms[:, None] * norms)).clamp(-1.0, 1.0)
    above = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    similarity = Similarity(cosines, cosines[above].mean())
    return Signals(similarity, errors, norms, None if agent.atoms is None else entropies)


def _td_error(agent: BRC, out: Tensor, next_out: Tensor, backup: Backup) -> Tensor:
    """0-d: see `Signals`."""
    values, members = (agent.loss.values(x, agent.atoms) for x in (out, next_out))
    soft = reduced(members, agent.critic_config.reduction) - backup.alpha * backup.next_log_probs
    return (values - (backup.rewards + backup.discounts * soft)).abs().mean()


def body_parameters(critic: Critic) -> list[tuple[Tensor, slice]]:
    """Of a critic's body without its output layer, each with what counts of its second axis: all but what
    multiplies the columns of tasks."""
    own = slice(critic.sizes["observations"] + critic.sizes["actions"])
    out: list[tuple[Tensor, slice]] = []
    for stage in critic.body.stages[:-1]:
        for name, parameter in critic.body.get_submodule(stage.name).named_parameters():
            reads_input = stage.reads == 0 and (name == "kernel" or not stage.product)
            out.append((parameter, own if reads_input else slice(None)))
    return out


def _products(gradient: Callable[[int], Tensor], tasks: int) -> Tensor:
    """Scalar products of the tasks' gradients, [T, T], of which as many are held as fit into HELD bytes."""
    first = gradient(0)
    held = max(1, HELD // first.nbytes)
    out = first.new_zeros(tasks, tasks)
    for start in range(0, tasks, held):
        end = min(start + held, tasks)
        block = torch.stack([first if task == 0 else gradient(task) for task in range(start, end)])
        out[start:end, start:end] = block @ block.T
        for task in range(end, tasks):
            out[start:end, task] = block @ gradient(task)
    return out.triu() + out.triu(1).T
