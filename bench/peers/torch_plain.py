"""The BRC update written the plain way: nn.Linear, nn.LayerNorm, F.*, torch.optim.AdamW, a loop over members.

Single task. It is the yardstick of bench_update.py, and is checked against `brc_fast.BRC` before it is timed.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brc_fast import BRC, Batch, Noise


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


def copy_net(net: Net, state: dict[str, Tensor]) -> None:
    """Fill a Net from one of our single networks ([in, out] kernels)."""

    def layer(linear: nn.Linear, norm: nn.LayerNorm, name: str) -> None:
        linear.weight.copy_(state[f"{name}.kernel"].T)
        linear.bias.copy_(state[f"{name}.bias"])
        norm.weight.copy_(state[f"{name}.norm_weight"])
        norm.bias.copy_(state[f"{name}.norm_bias"])

    with torch.no_grad():
        layer(net.input, net.input_norm, "body.input")
        for index, block in enumerate(net.blocks):
            layer(block.first, block.first_norm, f"body.blocks.{index}.0")
            layer(block.second, block.second_norm, f"body.blocks.{index}.1")
        net.head.weight.copy_(state["body.head.kernel"].T)
        net.head.bias.copy_(state["body.head.bias"])


class PlainBRC:
    """Starts as a copy of `agent`, so that one update of each can be compared."""

    def __init__(self, agent: BRC) -> None:
        critic, actor, self.learning = agent.critic_config, agent.actor_config, agent.learning
        inputs = agent.observation_size + agent.action_size
        self.critics = nn.ModuleList(
            Net(inputs, critic.width, critic.depth, critic.num_atoms) for _ in range(critic.members)
        )
        for member, net in enumerate(self.critics):
            copy_net(net, {key: value[member] for key, value in agent.critic.state_dict().items()})
        self.actor = Net(agent.observation_size, actor.width, actor.depth, 2 * agent.action_size)
        copy_net(self.actor, {key: value[0] for key, value in agent.actor.state_dict().items()})
        self.log_alpha = nn.Parameter(agent.temperature.log_alpha.detach().clone())
        for part in (self.critics, self.actor):
            part.to(agent.device)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.atoms, self.v_max, self.target_entropy = agent.atoms, agent.v_max, agent.target_entropy
        rule = {"lr": self.learning.learning_rate, "eps": self.learning.eps}
        betas, decay = (self.learning.beta1, self.learning.beta2), self.learning.weight_decay
        self.critic_optimizer = torch.optim.AdamW(
            self.critics.parameters(), betas=betas, weight_decay=decay, **rule
        )
        self.actor_optimizer = torch.optim.AdamW(
            self.actor.parameters(), betas=betas, weight_decay=decay, **rule
        )
        self.temperature_optimizer = torch.optim.Adam(
            [self.log_alpha], betas=(self.learning.temperature_beta1, self.learning.beta2), **rule
        )

    def sample(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.actor(observations).chunk(2, -1)
        log_std = -10.0 + 12.0 * (1.0 + torch.tanh(raw)) / 2.0
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2.0 * math.pi)
        log_prob = log_prob - 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
        return torch.tanh(u), log_prob.sum(-1)

    def target(self, batch: Batch, noise: Tensor) -> Tensor:
        with torch.no_grad():
            next_actions, next_log_prob = self.sample(batch.next_observations, noise)
            x = torch.cat([batch.next_observations, next_actions], -1)
            probs = torch.stack([F.softmax(net(x), -1) for net in self.targets]).mean(0)
            soft = self.atoms - self.log_alpha.exp() * next_log_prob[:, None]
            y = batch.rewards[:, None] + self.learning.discount * batch.masks[:, None] * soft
            y = y.clamp(-self.v_max, self.v_max)
            index = (y + self.v_max) / (2.0 * self.v_max / (len(self.atoms) - 1))
            lower = index.floor().clamp(0, len(self.atoms) - 1)
            share = index - lower
            out = torch.zeros_like(probs).scatter_add_(-1, lower.long(), probs * (1.0 - share))
            upper = (lower.long() + 1).clamp(max=len(self.atoms) - 1)
            return out.scatter_add_(-1, upper, probs * share)

    def update(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        target = self.target(batch, noise.next_action)
        x = torch.cat([batch.observations, batch.actions], -1)
        critic_loss = sum(F.cross_entropy(net(x), target) for net in self.critics)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                slow.lerp_(fast, self.learning.tau)

        actions, log_prob = self.sample(batch.observations, noise.actor_action)
        x = torch.cat([batch.observations, actions], -1)
        q = torch.stack([F.softmax(net(x), -1) for net in self.critics]).mean(0) @ self.atoms
        actor_loss = (self.log_alpha.exp().detach() * log_prob - q).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()

        entropy = -log_prob.detach().mean()
        temperature_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
        self.temperature_optimizer.zero_grad()
        temperature_loss.backward()
        self.temperature_optimizer.step()
        return {"critic_loss": critic_loss.detach(), "actor_loss": actor_loss.detach(), "entropy": entropy}
