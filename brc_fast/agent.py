"""BRC: four updates around a categorical critic ensemble.

Dims: B batch, E ensemble, K atoms, O observation, A action, T tasks, U updates.
Source: Nauman et al. 2025, "Bigger, Regularized, Categorical", arXiv:2505.23150.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from . import kernels
from .batch import Batch
from .config import ActorConfig, CriticConfig, LearningConfig, TrainConfig
from .networks import Actor, Critic, Temperature
from .optimizer import FlatAdamW, flatten_parameters

Metrics = dict[str, Tensor]


class Noise(NamedTuple):
    """Standard normals of the two samplings of one update ([B, A] each) or of U updates ([U, B, A])."""

    next_action: Tensor
    actor_action: Tensor


class CriticTarget(NamedTuple):
    """What the critic regresses on, and the steps that led there."""

    next_actions: Tensor  # [B, A]
    next_log_probs: Tensor  # [B]
    next_logits: Tensor  # [E, B, K]
    probs: Tensor  # [B, K]


class BRC:
    """The agent: networks, optimizers and their noise. It knows neither environments nor replay.

    Args:
        observation_size: O, of the widest task. action_size: A, of the widest task.
        num_tasks: T; with T = 1 there is no task embedding.
        device, dtype: of parameters and arithmetic. seed: of initialisation and sampling.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        num_tasks: int = 1,
        *,
        critic: CriticConfig | None = None,
        actor: ActorConfig | None = None,
        learning: LearningConfig | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.critic_config = critic or CriticConfig()
        self.actor_config = actor or ActorConfig()
        self.learning = learning or LearningConfig()
        for name, size in (("observation_size", observation_size), ("action_size", action_size)):
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be positive, got {num_tasks}")
        self.observation_size, self.action_size, self.num_tasks = observation_size, action_size, num_tasks
        self.device, self.dtype = device, dtype
        self.target_entropy = self.learning.target_entropy_per_action * action_size
        self.v_max = self.critic_config.v_max
        self.atoms = torch.linspace(
            -self.v_max, self.v_max, self.critic_config.num_atoms, device=device, dtype=dtype
        )

        initial = torch.Generator().manual_seed(seed)
        embedding_size = self.critic_config.embedding_size if num_tasks > 1 else 0
        self.critic = Critic(observation_size, action_size, num_tasks, self.critic_config, initial)
        self.actor = Actor(observation_size, action_size, embedding_size, self.actor_config, initial)
        self.temperature = Temperature(self.learning.initial_temperature)
        for module in (self.critic, self.actor, self.temperature):
            module.to(device=device, dtype=dtype)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_flat = flatten_parameters(self.target_critic)
        decay, beta1 = self.learning.weight_decay, self.learning.beta1
        self.critic_optimizer = self._optimizer(self.critic, beta1, decay)
        self.actor_optimizer = self._optimizer(self.actor, beta1, decay)
        self.temperature_optimizer = self._optimizer(self.temperature, self.learning.temperature_beta1, 0.0)
        self.generator = Generator(device).manual_seed(seed + 1)

    @classmethod
    def from_config(cls, config: TrainConfig, observation_size: int, action_size: int, device: str) -> BRC:
        """The agent of a training run."""
        return cls(
            observation_size,
            action_size,
            len(config.tasks),
            critic=config.critic,
            actor=config.actor,
            learning=config.learning,
            device=device,
            seed=config.seed,
        )

    def _optimizer(self, module: nn.Module, beta1: float, weight_decay: float) -> FlatAdamW:
        return FlatAdamW(
            module.parameters(),
            flatten_parameters(module),
            learning_rate=self.learning.learning_rate,
            betas=(beta1, self.learning.beta2),
            eps=self.learning.eps,
            weight_decay=weight_decay,
        )

    @property
    def alpha(self) -> Tensor:
        """Temperature of the entropy bonus, 0-d, without gradient."""
        return self.temperature.log_alpha.detach().exp()

    def policy(self, observations: Tensor, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std [B, A]; the online critic's embedding is read, and gets no gradient."""
        table = None if self.critic.embedding is None else self.critic.embedding.detach()
        norm = self.critic_config.embedding_norm
        return self.actor(kernels.pack_inputs(observations, None, table, task_ids, norm))  # type: ignore[no-any-return]

    @torch.no_grad()
    def act(self, observations: Tensor, task_ids: Tensor, deterministic: bool = False) -> Tensor:
        """Actions [N, A] in [-1, 1] for observations [N, O]: a sample, or the mean's tanh."""
        mean, raw_log_std = self.policy(observations, task_ids)
        if deterministic:
            return mean.tanh()
        return kernels.tanh_gaussian(mean, raw_log_std, self._normal(mean.shape))[0]

    def random_actions(self, number: int) -> Tensor:
        """Uniform actions [number, A] in [-1, 1]."""
        shape = (number, self.action_size)
        return torch.rand(shape, generator=self.generator, device=self.device, dtype=self.dtype) * 2.0 - 1.0

    @torch.no_grad()
    def value(self, observations: Tensor, task_ids: Tensor) -> Tensor:
        """Q of the mean action, averaged over members, in units of the scaled return: [N, O] -> [N]."""
        logits = self.critic(observations, self.act(observations, task_ids, deterministic=True), task_ids)
        return kernels.expected_value(logits, self.atoms).mean(0)

    @torch.no_grad()
    def entropy_per_task(self, batch: Batch) -> Tensor:
        """Mean of -log pi over a batch's rows of each task, [T]; zero for a task without rows."""
        mean, raw_log_std = self.policy(batch.observations, batch.task_ids)
        log_probs = kernels.tanh_gaussian(mean, raw_log_std, self._normal(mean.shape))[1]
        total = torch.zeros(self.num_tasks, device=mean.device, dtype=mean.dtype)
        rows = total.clone().index_add_(0, batch.task_ids, torch.ones_like(log_probs))
        return total.index_add_(0, batch.task_ids, -log_probs) / rows.clamp_min(1)

    def update(self, batches: Batch, noise: Noise | None = None) -> Metrics:
        """U updates, each on its own batch [U, B, ...]; returns the last one's metrics as 0-d tensors."""
        metrics: Metrics = {}
        for index in range(batches.rewards.shape[0]):
            batch = batches.update(index)
            if noise is None:
                shape = batch.actions.shape
                drawn = Noise(self._normal(shape), self._normal(shape))
            else:
                drawn = Noise(noise.next_action[index], noise.actor_action[index])
            metrics = self.update_critic(batch, drawn.next_action)
            self.update_target()
            metrics |= self.update_actor(batch, drawn.actor_action)
            metrics |= self.update_temperature(metrics["entropy"])
        return metrics

    @torch.no_grad()
    def critic_target(self, batch: Batch, noise: Tensor) -> CriticTarget:
        """Soft categorical Bellman target; probabilities are averaged over members, there is no minimum.

        a'     ~ pi(.|s'),   p = mean_e softmax(Q'_e(s', a'))
        y_k    = clip(r + discount * mask * (z_k - alpha * log pi(a'|s')), -v_max, v_max)
        target = project(p, from y, onto z)
        """
        next_actions, next_log_probs = kernels.tanh_gaussian(
            *self.policy(batch.next_observations, batch.task_ids), noise
        )
        next_logits = self.target_critic(batch.next_observations, next_actions, batch.task_ids)
        probs = kernels.categorical_target(
            next_logits,
            batch.rewards,
            self.learning.discount * batch.masks,
            next_log_probs,
            self.alpha,
            self.atoms,
            self.v_max,
        )
        return CriticTarget(next_actions, next_log_probs, next_logits, probs)

    def update_critic(self, batch: Batch, noise: Tensor) -> Metrics:
        """One AdamW step of every member, and of the task embedding, towards the projected target.

        loss = sum_e mean_b cross_entropy(target_b, log softmax(Q_e(s_b, a_b)))
        """
        target = self.critic_target(batch, noise).probs
        logits = self.critic(batch.observations, batch.actions, batch.task_ids)  # [E, B, K]
        loss = kernels.categorical_cross_entropy(logits, target).mean(-1).sum()
        norm = self.critic_optimizer.minimize(loss)
        return {"critic_loss": loss.detach(), "critic_gradient_norm": norm}

    def update_target(self) -> None:
        """Move the target critic, embedding included, towards the new critic: Q' += tau * (Q - Q')."""
        kernels.ema_(self.target_flat, self.critic_optimizer.flat, self.learning.tau)

    def update_actor(self, batch: Batch, noise: Tensor) -> Metrics:
        """One AdamW step of the policy against the new critic, which gets no gradient.

        a ~ pi(.|s),   loss = mean_b [alpha * log pi(a|s) - sum_k z_k * mean_e softmax(Q_e(s, a))_k]
        """
        actions, log_probs = kernels.tanh_gaussian(*self.policy(batch.observations, batch.task_ids), noise)
        logits = self.critic(batch.observations, actions, batch.task_ids, frozen=True)
        q_values = kernels.expected_value(logits, self.atoms).mean(0)  # [B]
        loss = (self.alpha * log_probs - q_values).mean()
        norm = self.actor_optimizer.minimize(loss)
        return {
            "actor_loss": loss.detach(),
            "actor_gradient_norm": norm,
            "entropy": -log_probs.detach().mean(),
            "q_mean": q_values.detach().mean(),
        }

    def update_temperature(self, entropy: Tensor) -> Metrics:
        """One Adam step of log alpha on `alpha * (entropy - target_entropy)`; entropy is a 0-d tensor."""
        loss = self.temperature.log_alpha.exp() * (entropy - self.target_entropy)
        metrics = {"temperature": self.alpha, "temperature_loss": loss.detach()}
        self.temperature_optimizer.minimize(loss)
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes, by name: parameters, target, moments, step counts, noise."""
        state: dict[str, Tensor] = {"generator": self.generator.get_state()}
        for name, part in self._parts().items():
            state |= {f"{name}/{key}": value for key, value in part.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`; ValueError names the first entry that does not fit."""
        mine = self.state_dict()
        for key in sorted(mine.keys() | state.keys()):
            if key not in state or key not in mine:
                raise ValueError(f"agent state {'lacks' if key in mine else 'has an unknown entry'} {key}")
            if mine[key].shape != state[key].shape:
                raise ValueError(
                    f"agent state {key} must have shape {list(mine[key].shape)}, got {list(state[key].shape)}"
                )
        self.generator.set_state(state["generator"].cpu())
        for name, part in self._parts().items():
            part.load_state_dict(
                {
                    key.removeprefix(f"{name}/"): value
                    for key, value in state.items()
                    if key.startswith(f"{name}/")
                }
            )

    def _parts(self) -> dict[str, nn.Module | FlatAdamW]:
        return {
            "critic": self.critic,
            "target_critic": self.target_critic,
            "actor": self.actor,
            "temperature": self.temperature,
            "critic_optimizer": self.critic_optimizer,
            "actor_optimizer": self.actor_optimizer,
            "temperature_optimizer": self.temperature_optimizer,
        }

    def _normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)
