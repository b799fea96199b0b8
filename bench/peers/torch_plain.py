"""The BRC update written the plain way: nn.Linear, nn.LayerNorm, F.*, torch.optim.AdamW, a loop over members.

It is the yardstick of bench_update.py: what others compute is compared with it before anything is timed. It
has what PyTorch itself offers: fused optimizers, a critic without gradients while the actor learns, all
targets moved in one call, and, where it is asked for, torch.compile for both losses.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brc_fast import BRC, Batch, Critic, Noise

METRICS = ("critic_loss", "actor_loss", "entropy")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6)
        self.second, self.second_norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first_norm(self.first(x)))
        return x + self.second_norm(self.second(h))


class Net(nn.Module):
    """Starts as the member of one of our stacked networks, whose kernels are [in, out]."""

    def __init__(self, like: nn.Module, member: int = 0) -> None:
        super().__init__()
        state = like.state_dict()
        inputs, width = state["body.input.kernel"].shape[1:]
        depth = sum(name.endswith("0.kernel") for name in state)
        with torch.device("meta"):  # what is copied into them needs no values before
            self.input, self.input_norm = nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-6)
            self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
            self.head = nn.Linear(width, state["body.head.kernel"].shape[2])
        self.to_empty(device=state["body.input.kernel"].device)
        with torch.no_grad():
            for name, value in self.named().items():
                value.copy_(state[name][member])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.input_norm(self.input(x)))))

    def named(self) -> dict[str, Tensor]:
        """Views of its parameters by the names of ours."""
        out = {"body.head.kernel": self.head.weight.T, "body.head.bias": self.head.bias}
        layers = [("body.input", self.input, self.input_norm)]
        for index, block in enumerate(self.blocks):
            layers.append((f"body.blocks.{index}.0", block.first, block.first_norm))
            layers.append((f"body.blocks.{index}.1", block.second, block.second_norm))
        for name, linear, norm in layers:
            out |= {f"{name}.kernel": linear.weight.T, f"{name}.bias": linear.bias}
            out |= {f"{name}.norm_weight": norm.weight, f"{name}.norm_bias": norm.bias}
        return out


class PlainCritic(nn.Module):
    """Starts as a copy of ours and has of its methods those that a learner needs (docs/critic.md)."""

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self.nets = nn.ModuleList(Net(critic, member) for member in range(critic.config.members))
        table = critic.embedding
        self.embedding = None if table is None else nn.Parameter(table.detach().clone())
        self.atoms, self.v_max = critic.atoms, critic.config.v_max

    def probs(self, observations: Tensor, actions: Tensor, task_ids: Tensor) -> Tensor:
        """Of the return, the mean of all members: [B, K]."""
        logits = self(observations, actions, task_ids)
        return torch.stack([F.softmax(member, -1) for member in logits]).mean(0)

    def forward(self, observations: Tensor, actions: Tensor, task_ids: Tensor) -> list[Tensor]:
        """Logits [B, K] of each member."""
        x = embedded(self, torch.cat([observations, actions], -1), task_ids)
        return [net(x) for net in self.nets]

    def values(self, *inputs: Tensor, frozen: bool) -> Tensor:
        return self.probs(*inputs)[None] @ self.atoms

    def bellman_loss(
        self, target: PlainCritic, observations: Tensor, actions: Tensor, rewards: Tensor, discounts: Tensor,
        next_observations: Tensor, next_actions: Tensor, *, next_log_probs: Tensor, temperature: Tensor,
        task_ids: Tensor,
    ) -> Tensor:  # fmt: skip
        with torch.no_grad():
            probs = target.probs(next_observations, next_actions, task_ids)
            soft = self.atoms - temperature * next_log_probs[:, None]
            y = (rewards[:, None] + discounts[:, None] * soft).clamp(-self.v_max, self.v_max)
            index = (y + self.v_max) / (2.0 * self.v_max / (len(self.atoms) - 1))
            lower = index.floor().clamp(0, len(self.atoms) - 1)
            share, upper = index - lower, (lower.long() + 1).clamp(max=len(self.atoms) - 1)
            goal = torch.zeros_like(probs).scatter_add_(-1, lower.long(), probs * (1.0 - share))
            goal.scatter_add_(-1, upper, probs * share)
        logits = self(observations, actions, task_ids)
        return torch.stack([F.cross_entropy(member, goal, reduction="none") for member in logits])

    def named(self) -> dict[str, Tensor]:
        """Its parameters by the names of ours and in their shapes."""
        members = [net.named() for net in self.nets]
        out = {name: torch.stack([member[name] for member in members]) for name in members[0]}
        return out if self.embedding is None else out | {"embedding": self.embedding}


def embedded(critic: Critic | PlainCritic, x: Tensor, task_ids: Tensor) -> Tensor:
    """x with the task's row of the critic's table, of length 1, beside it; x where there is one task."""
    if critic.embedding is None:
        return x
    return torch.cat([x, F.embedding(task_ids, F.normalize(critic.embedding, dim=-1))], -1)


class PlainBRC:
    """Starts as a copy of `agent`, so that one update of each can be compared.

    Args:
        ours: whether the critic is `brc_fast.Critic`; nothing else changes then.
        backend: of torch.compile, for both losses with their gradients; none without.
        options: of the optimizers.
    """

    def __init__(self, agent: BRC, ours: bool = False, backend: str = "", **options: Any) -> None:
        rule, self.learning, self.target_entropy = agent.learning, agent.learning, agent.target_entropy
        self.critic = unpadded(agent.critic) if ours else PlainCritic(agent.critic)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor, self.sensed = Net(agent.actor), agent.observation_size
        self.log_alpha = nn.Parameter(agent.temperature.log_alpha.detach().clone())
        common = {"lr": rule.learning_rate, "eps": rule.eps, "fused": True} | options
        adamw = {"betas": (rule.beta1, rule.beta2), "weight_decay": rule.weight_decay} | common
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), **adamw)
        self.actor_optimizer = torch.optim.AdamW(self.actor.parameters(), **adamw)
        betas = rule.temperature_beta1, rule.beta2
        self.temperature_optimizer = torch.optim.Adam([self.log_alpha], betas=betas, **common)
        if backend:
            import torch._inductor.config as inductor

            if hasattr(inductor.triton, "mix_order_reduction"):  # wrong gradients: pytorch issue 193061
                inductor.triton.mix_order_reduction = False
            torch.compiler.reset()  # of another size: recompiling is limited
            compiling = {"fullgraph": True, "dynamic": False, "backend": backend}
            self.critic_loss = torch.compile(self.critic_loss, **compiling)
            self.actor_loss = torch.compile(self.actor_loss, **compiling)

    def sample(self, observations: Tensor, task_ids: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and log-probabilities."""
        with torch.no_grad():  # the critic's loss alone trains the embedding
            x = embedded(self.critic, observations[..., : self.sensed], task_ids)
        mean, raw = self.actor(x).chunk(2, -1)
        log_std = -10.0 + 12.0 * (1.0 + torch.tanh(raw)) / 2.0
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2.0 * math.pi)
        log_prob = log_prob - 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
        return torch.tanh(u), log_prob.sum(-1)

    def critic_loss(self, batch: Batch, noise: Tensor) -> Tensor:
        with torch.no_grad():
            actions, log_probs = self.sample(batch.next_observations, batch.task_ids, noise)
        losses = self.critic.bellman_loss(
            self.target, batch.observations, batch.actions, batch.rewards,
            self.learning.discount * batch.masks, batch.next_observations, actions,
            next_log_probs=log_probs, temperature=self.log_alpha.detach().exp(), task_ids=batch.task_ids,
        )  # fmt: skip
        return losses.mean(-1).sum()

    def actor_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and entropy."""
        actions, log_probs = self.sample(batch.observations, batch.task_ids, noise)
        q = self.critic.values(batch.observations, actions, batch.task_ids, frozen=True).mean(0)
        return (self.log_alpha.exp().detach() * log_probs - q).mean(), -log_probs.detach().mean()

    def update(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch, noise.next_action)
        step(self.critic_optimizer, critic_loss)
        with torch.no_grad():
            slow, fast = list(self.target.parameters()), list(self.critic.parameters())
            torch._foreach_lerp_(slow, fast, self.learning.tau)
        self.critic.requires_grad_(False)
        actor_loss, entropy = self.actor_loss(batch, noise.actor_action)
        step(self.actor_optimizer, actor_loss)
        self.critic.requires_grad_(True)
        step(self.temperature_optimizer, self.log_alpha.exp() * (entropy - self.target_entropy))
        return dict(zip(METRICS, (critic_loss.detach(), actor_loss.detach(), entropy), strict=True))

    def updates(self, batches: Batch, noise: Noise | None = None) -> dict[str, Tensor]:
        """U updates on [U, B, ...]; the last one's losses. Noise is drawn here where it is not given."""
        metrics = {}
        shape, device = (2, *batches.actions.shape), batches.actions.device
        noise = Noise(*torch.randn(shape, device=device)) if noise is None else noise
        for index in range(len(batches.rewards)):
            metrics = self.update(batches.update(index), Noise(*(part[index] for part in noise)))
        return metrics

    def named(self) -> dict[str, Tensor]:
        """What an update changes, by the names of ours and in its shapes."""
        out = {f"actor/{name}": value[None] for name, value in self.actor.named().items()}
        for part, critic in (("critic", self.critic), ("target_critic", self.target)):
            held = critic.named() if isinstance(critic, PlainCritic) else dict(critic.named_parameters())
            out |= {f"{part}/{name}": value for name, value in held.items()}
        return out | {"temperature/log_alpha": self.log_alpha}


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def unpadded(critic: Critic) -> Critic:
    """A copy whose parameters are no views of the agent's flat memory."""
    critic = copy.deepcopy(critic)
    for parameter in critic.parameters():
        parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
    return critic


class PlainAgent(BRC):
    """`BRC` with the networks and the updates of `PlainBRC`, where the training loop expects an agent."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.peer = PlainBRC(self)

    @property
    def alpha(self) -> Tensor:
        return self.peer.log_alpha.detach().exp()

    def policy(self, observations: Tensor, task_ids: Tensor, lagged: object = None) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std [B, A]."""
        mean, raw_log_std = self.peer.actor(embedded(self.peer.critic, observations, task_ids)).chunk(2, -1)
        return mean, raw_log_std

    def update(
        self, batches: Batch, noise: Noise | None = None, reward_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """U updates on [U, B, ...], one after the other; the last one's losses."""
        batches = batches.to(self.device)
        if reward_scale is not None:
            batches = batches._replace(rewards=batches.rewards / reward_scale[batches.task_ids])
        return self.peer.updates(batches, noise)
