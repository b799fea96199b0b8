"""The BRC update written the plain way: nn.Linear, nn.LayerNorm, F.*, torch.optim.AdamW, a loop over members.

It is the yardstick of bench_update.py: what others compute is compared with it before anything is timed. It
has what PyTorch itself offers: fused optimizers, a critic without gradients while the actor learns, and all
targets moved in one call. `CompiledBRC` is the same under torch.compile, on a GPU replayed as a CUDA graph.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brc_fast import BRC, Batch, Noise
from brc_fast.learner.graphs import Captured

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
    def __init__(self, inputs: int, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.input, self.input_norm = nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.input_norm(self.input(x)))))


class Critics(nn.Module):
    """The members, and the task embedding that they share where there are several tasks."""

    def __init__(self, nets: nn.ModuleList, embedding: Tensor | None) -> None:
        super().__init__()
        self.nets = nets
        self.embedding = None if embedding is None else nn.Parameter(embedding.detach().clone())

    def embedded(self, x: Tensor, task_ids: Tensor) -> Tensor:
        """x with the task's row of the table, of length 1, beside it."""
        if self.embedding is None:
            return x
        return torch.cat([x, F.embedding(task_ids, F.normalize(self.embedding, dim=-1))], -1)

    def forward(self, observations: Tensor, actions: Tensor, task_ids: Tensor) -> list[Tensor]:
        """Logits [B, K] of each member."""
        x = self.embedded(torch.cat([observations, actions], -1), task_ids)
        return [net(x) for net in self.nets]


def named(net: Net) -> dict[str, Tensor]:
    """Views of its parameters by the names of ours, whose kernels are [in, out]."""
    out = {"body.head.kernel": net.head.weight.T, "body.head.bias": net.head.bias}
    layers = [("body.input", net.input, net.input_norm)]
    for index, block in enumerate(net.blocks):
        layers.append((f"body.blocks.{index}.0", block.first, block.first_norm))
        layers.append((f"body.blocks.{index}.1", block.second, block.second_norm))
    for name, linear, norm in layers:
        out |= {f"{name}.kernel": linear.weight.T, f"{name}.bias": linear.bias}
        out |= {f"{name}.norm_weight": norm.weight, f"{name}.norm_bias": norm.bias}
    return out


def copy_net(net: Net, state: dict[str, Tensor], member: int = 0) -> None:
    """Fill a Net from one of our stacked networks."""
    with torch.no_grad():
        for name, value in named(net).items():
            value.copy_(state[name][member])


class PlainBRC:
    """Starts as a copy of `agent`, so that one update of each can be compared.

    Args:
        options: of the optimizers.
    """

    def __init__(self, agent: BRC, **options: Any) -> None:
        critic, actor, self.learning = agent.critic_config, agent.actor_config, agent.learning
        tasks = agent.critic.embedding
        embedded = 0 if tasks is None else tasks.shape[1]
        inputs = agent.observation_size + agent.action_size + embedded
        with torch.device("meta"):  # what is copied into them needs no values before
            nets = nn.ModuleList(
                Net(inputs, critic.width, critic.depth, critic.num_atoms) for _ in range(critic.members)
            )
            self.actor = Net(
                agent.observation_size + embedded, actor.width, actor.depth, 2 * agent.action_size
            )
        for part in (nets, self.actor):
            part.to_empty(device=agent.device)
        for member, net in enumerate(nets):
            copy_net(net, agent.critic.state_dict(), member)
        copy_net(self.actor, agent.actor.state_dict())
        self.critics = Critics(nets, tasks)
        self.log_alpha = nn.Parameter(agent.temperature.log_alpha.detach().clone())
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.atoms, self.v_max, self.target_entropy = agent.atoms, agent.v_max, agent.target_entropy
        self.rule = {"lr": self.learning.learning_rate, "eps": self.learning.eps, "fused": True} | options
        self.critic_optimizer, self.actor_optimizer = self.adamw(self.critics), self.adamw(self.actor)
        self.temperature_optimizer = torch.optim.Adam(
            [self.log_alpha], betas=(self.learning.temperature_beta1, self.learning.beta2), **self.rule
        )

    def adamw(self, trained: nn.Module) -> torch.optim.AdamW:
        betas, decay = (self.learning.beta1, self.learning.beta2), self.learning.weight_decay
        return torch.optim.AdamW(trained.parameters(), betas=betas, weight_decay=decay, **self.rule)

    def sample(self, observations: Tensor, task_ids: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # the critic's loss alone trains the embedding
            x = self.critics.embedded(observations, task_ids)
        return self.sampled(x, noise)

    def sampled(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and log-probabilities, of the actor's input."""
        mean, raw = self.actor(x).chunk(2, -1)
        log_std = -10.0 + 12.0 * (1.0 + torch.tanh(raw)) / 2.0
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2.0 * math.pi)
        log_prob = log_prob - 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
        return torch.tanh(u), log_prob.sum(-1)

    def target(self, batch: Batch, noise: Tensor) -> Tensor:
        with torch.no_grad():
            ids = batch.task_ids
            next_actions, next_log_prob = self.sample(batch.next_observations, ids, noise)
            logits = self.targets(batch.next_observations, next_actions, ids)
            probs = torch.stack([F.softmax(member, -1) for member in logits]).mean(0)
            soft = self.atoms - self.log_alpha.exp() * next_log_prob[:, None]
            y = batch.rewards[:, None] + self.learning.discount * batch.masks[:, None] * soft
            y = y.clamp(-self.v_max, self.v_max)
            index = (y + self.v_max) / (2.0 * self.v_max / (len(self.atoms) - 1))
            lower = index.floor().clamp(0, len(self.atoms) - 1)
            share = index - lower
            out = torch.zeros_like(probs).scatter_add_(-1, lower.long(), probs * (1.0 - share))
            upper = (lower.long() + 1).clamp(max=len(self.atoms) - 1)
            return out.scatter_add_(-1, upper, probs * share)

    def critic_loss(self, batch: Batch, noise: Tensor) -> Tensor:
        target = self.target(batch, noise)
        logits = self.critics(batch.observations, batch.actions, batch.task_ids)
        return torch.stack([F.cross_entropy(member, target) for member in logits]).sum()

    def actor_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and entropy."""
        actions, log_prob = self.sample(batch.observations, batch.task_ids, noise)
        logits = self.critics(batch.observations, actions, batch.task_ids)
        q = torch.stack([F.softmax(member, -1) for member in logits]).mean(0) @ self.atoms
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.detach().mean()

    def move_targets(self) -> None:
        with torch.no_grad():
            slow, fast = list(self.targets.parameters()), list(self.critics.parameters())
            torch._foreach_lerp_(slow, fast, self.learning.tau)

    def update(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch, noise.next_action)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        self.move_targets()

        self.critics.requires_grad_(False)
        actor_loss, entropy = self.actor_loss(batch, noise.actor_action)
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        self.critics.requires_grad_(True)

        temperature_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
        self.temperature_optimizer.zero_grad()
        temperature_loss.backward()
        self.temperature_optimizer.step()
        values = critic_loss.detach(), actor_loss.detach(), entropy
        return dict(zip(METRICS, values, strict=True))

    def named(self) -> dict[str, Tensor]:
        """What an update changes, by the names of ours and in its shapes."""
        parts = {"critic": self.critics, "target_critic": self.targets}
        out = {f"actor/{name}": value[None] for name, value in named(self.actor).items()}
        for part, critics in parts.items():
            members = [named(net) for net in critics.nets]
            for name in members[0]:
                out[f"{part}/{name}"] = torch.stack([member[name] for member in members])
            if critics.embedding is not None:
                out[f"{part}/embedding"] = critics.embedding
        return out | {"temperature/log_alpha": self.log_alpha}

    def updates(self, batches: Batch, noise: Noise) -> dict[str, Tensor]:
        """U updates on [U, B, ...]; the last one's losses."""
        metrics = {}
        for index in range(batches.rewards.shape[0]):
            metrics = self.update(batches.update(index), Noise(*(part[index] for part in noise)))
        return metrics


class PlainAgent(BRC):
    """`BRC` with the networks and the updates of `PlainBRC`, where the training loop expects an agent.

    It draws the same noise from the same seed.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.peer = PlainBRC(self)

    @property
    def alpha(self) -> Tensor:
        return self.peer.log_alpha.detach().exp()

    def policy(self, observations: Tensor, task_ids: Tensor, lagged: object = None) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std [B, A]."""
        embedded = self.peer.critics.embedded(observations, task_ids)
        mean, raw_log_std = self.peer.actor(embedded).chunk(2, -1)
        return mean, raw_log_std

    def update(
        self, batches: Batch, noise: Noise | None = None, reward_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """U updates on [U, B, ...], one after the other; the last one's losses."""
        batches = batches.to(self.device)
        if reward_scale is not None:
            batches = batches._replace(rewards=batches.rewards / reward_scale[batches.task_ids])
        if noise is None:
            shape = (2, *batches.actions.shape[1:])  # drawn update by update, as ours is
            drawn = [
                torch.randn(shape, generator=self.generator, device=self.device) for _ in batches.rewards
            ]
            noise = Noise(*torch.stack(drawn, 1))
        return self.peer.updates(batches, noise)


class CompiledBRC(PlainBRC):
    """The losses with their gradients through torch.compile, one for each. U updates are one CUDA graph where
    there is a GPU.

    Compiled kernels inside of a graph that is captured around everything: torch.compile's own graphs
    (mode="reduce-overhead") would leave out the optimizers. mode="max-autotune" takes minutes for each size.
    """

    def __init__(self, agent: BRC, backend: str = "inductor") -> None:
        import torch._inductor.config as inductor

        # Wrong LayerNorm gradients where it is on: pytorch issue 193061.
        if hasattr(inductor.triton, "mix_order_reduction"):
            inductor.triton.mix_order_reduction = False
        cuda = torch.device(agent.device).type == "cuda"
        super().__init__(agent, **({"capturable": True} if cuda else {}))
        torch.compiler.reset()  # of another size: recompiling is limited
        options = {"fullgraph": True, "dynamic": False, "backend": backend}
        self.critic_loss = torch.compile(self.critic_loss, **options)
        self.actor_loss = torch.compile(self.actor_loss, **options)
        self.captured = Captured(self._run, agent.device)

    def _run(self, *fields: Tensor) -> Tensor:
        batches = Batch(*fields)
        shape = (2, *batches.actions.shape)
        metrics = self.updates(batches, Noise(*torch.randn(shape, device=batches.actions.device)))
        return torch.stack([metrics[name] for name in METRICS])
