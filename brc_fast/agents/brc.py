"""BRC: the updates of a critic ensemble with its target, of the policy and of its temperature.

Dims: B batch, E ensemble, K atoms, O observation, P privileged, A action, T tasks, U updates.
Source: Nauman et al. 2025, "Bigger, Regularized, Categorical", arXiv:2505.23150.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from brc_fast import kernels
from brc_fast.batch import Batch, require_shape
from brc_fast.config import ActorConfig, CriticConfig, LearningConfig, Precision, TrainConfig
from brc_fast.learner.flat import FlatNetworks
from brc_fast.learner.graphs import MOST_SIGNATURES
from brc_fast.learner.optimizer import FlatAdamW
from brc_fast.learner.precision import check_precision, low_dtype
from brc_fast.nn import bodies, conditioning
from brc_fast.nn.inputs import ObservationStatistics
from brc_fast.nn.losses import Backup, Categorical
from brc_fast.nn.modules import Actor, Critic, Temperature
from brc_fast.spec import Field, Spec

from .base import Agent, Metrics, TemperatureStep
from .plans import Plans, Sample
from .policy import Acting

if TYPE_CHECKING:
    from .transfer import Taken

METRICS = kernels.reference.METRICS
CRITIC_NORM, ACTOR_NORM = (METRICS.index(f"{name}_gradient_norm") for name in ("critic", "actor"))


class Noise(NamedTuple):
    """Standard normals of the two samplings of one update ([B, A] each) or of U updates ([U, B, A])."""

    next_action: Tensor
    actor_action: Tensor


class CriticTarget(NamedTuple):
    """What a categorical critic regresses on, and the steps that led there."""

    next_actions: Tensor  # [B, A]
    next_log_probs: Tensor  # [B]
    next_logits: Tensor  # [E, B, K]
    probs: Tensor  # [B, K]; with reduction "own" [E, B, K]


class BRC(Acting, Agent):
    """The agent: networks, optimizers and their noise. It knows neither environments nor replay.

    Args:
        observation_size: O, of the widest task. action_size: A, of the widest task.
        num_tasks: T; with T = 1 there is no task embedding.
        privileged_size: P, numbers that the critic sees beside the policy's O (an asymmetric actor-critic).
            `update` and `value` then take observations [.., O + P], those of the policy first; `act` takes
            [N, O].
        critic, actor, learning: sizes, rates, and what is exchangeable: bodies, the critic's loss, how tasks
            are told apart; the published ones by default (critic width 4096).
        device, dtype: of parameters and arithmetic. seed: of initialisation and sampling.
        precision: of matrix products: fp32, tf32 (needs CUDA) or bf16, for which bfloat16 copies of the
            float32 parameters are kept; moments, averages and LayerNorm stay in float32.
        graphs: on CUDA, replay `update` as a CUDA graph (brc_fast.learner.graphs).
        recompute: the critics' activations in the backward pass, which takes less memory and more time.
        normalize_observations: what the networks are given, by running statistics (`agent.observations`) that
            are the caller's to update: `agent.observations.update(observations, task_ids)`. Observations stay
            as the environments give them for `act`, `value`, `update` and the replay.

    Once made, its settings are fixed; learning rates and tau are tensors of its optimizers, and may be set at
    any time: `agent.actor_optimizer.learning_rate = 1e-4`.

    Raises:
        ValueError for a size below 1; InputError (a ValueError) for a precision that device or dtype lack, or
        for heads with one task; AttributeError where a setting is given another value later.
    """

    METRICS = METRICS
    FOLLOWED = ("critic", "target_critic", "actor", "temperature")
    _taken: Taken | None = None  # sizes of the agent that this one was made of

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        num_tasks: int = 1,
        *,
        privileged_size: int = 0,
        critic: CriticConfig | None = None,
        actor: ActorConfig | None = None,
        learning: LearningConfig | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        precision: Precision = "fp32",
        graphs: bool = True,
        recompute: bool = False,
        normalize_observations: bool = False,
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
        if privileged_size < 0:
            raise ValueError(f"privileged_size must be 0 or more, got {privileged_size}")
        self.observation_size, self.action_size, self.num_tasks = observation_size, action_size, num_tasks
        self.privileged_size = privileged_size
        check_precision(precision, device, dtype)
        self.device, self.dtype, self.precision, self.recompute = device, dtype, precision, recompute
        self.target_entropy = self.learning.target_entropy_per_action * action_size
        self.v_max = self.critic_config.v_max

        drawn_on = "cpu" if torch.device(device).type == "meta" else device
        initial = Generator(drawn_on).manual_seed(seed)
        seen = observation_size + privileged_size
        with torch.device(device):
            self.critic = Critic(seen, action_size, num_tasks, self.critic_config, initial)
            tasks = self.critic.conditioning
            self.actor = Actor(observation_size, action_size, self.actor_config, tasks, initial)
            self.temperature = Temperature(self.learning.initial_temperature)
        for module in (self.critic, self.actor, self.temperature):
            module.to(dtype)
        self.atoms, self.loss = self.critic.atoms, self.critic.loss
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        low = low_dtype(precision)
        self.critics = FlatNetworks([self.critic, self.target_critic], low)
        self.actors = FlatNetworks([self.actor], low)
        rule, decay, beta1 = self.learning, self.learning.weight_decay, self.learning.beta1
        self.critic_optimizer = self.optimizer(self.critics, beta1, decay, rule.tau)
        self.actor_optimizer = self.optimizer(self.actors, beta1, decay)
        self.temperature_optimizer = self.optimizer(
            FlatNetworks([self.temperature]), rule.temperature_beta1, 0.0
        )
        self.generator = Generator(drawn_on).manual_seed(seed + 1)
        shown = ObservationStatistics(seen, num_tasks, device=device, dtype=dtype)
        self.observations = shown if normalize_observations else None
        self._plans: dict[int, Plans] = {}
        self._unscaled = torch.ones(num_tasks, device=device, dtype=dtype)
        self.ready(graphs)

    @classmethod
    def from_config(cls, config: TrainConfig, spec: Spec, device: str) -> BRC:
        """The agent of a training run; InputError for tasks without vectors or continuous actions."""
        return cls(
            *spec.vector_sizes("BRC"),
            len(spec.tasks),
            privileged_size=spec.privileged_size,
            critic=config.critic,
            actor=config.actor,
            learning=config.learning,
            device=device,
            precision=config.precision,
            graphs=config.graphs,
            recompute=config.recompute,
            normalize_observations=config.normalize_observations,
            seed=config.seed,
        )

    @staticmethod
    def spec_of(config: TrainConfig, state: dict[str, Tensor]) -> Spec:
        """What a training run's agent with this `state_dict` sees and does; ValueError for what is missing or
        disagrees."""
        if not all(values.numel() for values in state.values()):  # else sizes are at most those of the state
            raise ValueError("the agent has an array without numbers")
        tasks = conditioning.make(config.critic, len(config.tasks))

        def body(network: str, kind: CriticConfig | ActorConfig) -> tuple[int, int]:
            """Inputs without task columns, and outputs, of the first and the last kernel."""
            stages = bodies.make(kind.body, kind.width, kind.depth, 1)
            first = next(stage.name for stage in stages if stage.reads == 0 and stage.product)
            names = [f"{network}/body.{name}.kernel" for name in (first, stages[-1].name)]
            for name in names:
                if name not in state:
                    raise ValueError(f"agent state lacks {name}")
            return state[names[0]].shape[-2] - tasks.columns, state[names[1]].shape[-1]

        observation, outputs = body("actor", config.actor)
        action = outputs // (2 * tasks.heads)
        privileged = body("critic", config.critic)[0] - observation - action
        if privileged < 0:
            raise ValueError(
                f"the critic of the agent's state must read the {observation} observed numbers and {action} "
                f"actions of its actor, and lacks {-privileged}"
            )
        spec = Spec.vectors(observation, action, config.tasks)
        return replace(spec, privileged=Field((privileged,))) if privileged else spec

    def parts(self) -> dict[str, nn.Module | FlatAdamW | ObservationStatistics]:
        statistics = {} if self.observations is None else {"observations": self.observations}
        return {
            "critic": self.critic,
            "target_critic": self.target_critic,
            "actor": self.actor,
            "temperature": self.temperature,
            "critic_optimizer": self.critic_optimizer,
            "actor_optimizer": self.actor_optimizer,
            "temperature_optimizer": self.temperature_optimizer,
            **statistics,
        }

    @property
    def alpha(self) -> Tensor:
        """Temperature of the entropy bonus, 0-d, without gradient."""
        return self.temperature.log_alpha.detach().exp()

    def update(
        self,
        batches: Batch,
        noise: Noise | None = None,
        reward_scale: Tensor | None = None,
    ) -> Metrics:
        """U updates, each on its own batch [U, B, ...], or one [B, ...]; returns the last one's metrics, 0-d:
        critic_loss (summed over members), actor_loss, temperature_loss, critic_gradient_norm,
        actor_gradient_norm, entropy (nats), q_mean (in units of the scaled return) and temperature (alpha).

        Args:
            batches: on any device; pinned host memory is copied to a GPU while that still computes.
            noise: of the samplings, shaped as the actions; drawn where it is not given. With it there is no
                CUDA graph.
            reward_scale: [T], by which each task's rewards are divided (`RewardNormalizer.scale`); 1 where it
                is not given, for rewards that are scaled already.
        Raises:
            ValueError for batches that do not fit. RuntimeError for parameters that were frozen, removed, or
            moved to another dtype or device; new values that they were given by hand are taken over (those
            written through `.data` in bf16 after one more update).
        """
        if torch.compiler.is_compiling():  # of a user's loop: no compiler takes views changed through buffers
            as_it_is = torch.compiler.disable(self.update)  # type: ignore[no-untyped-call]
            return as_it_is(batches, noise, reward_scale)  # type: ignore[no-any-return]
        if noise is not None and batches.rewards.dim() == 1:
            noise = Noise(*(part.unsqueeze(0) for part in noise))
        return self.run(self._inputs(batches, noise, reward_scale), noise)

    def prepared(self, batches: Batch, reward_scale: Tensor | None = None) -> Callable[[], Metrics]:
        """`update` on a CPU, to be called once, from any thread: noise is drawn now, and statistics are
        copied, so that this thread may draw and count meanwhile. Until it has returned, nothing else may use
        the networks, and the batches must stay."""
        batches = batches.updates()
        drawn = [self.normal(2, *batches.actions.shape[1:]) for _ in batches.actions]
        noise = Noise(*torch.stack(drawn, 1))
        inputs = self._inputs(batches, noise, reward_scale)
        return partial(self.run, [*inputs[:6], *(x.clone() for x in inputs[6:])], noise)

    def _inputs(self, batches: Batch, noise: Noise | None, reward_scale: Tensor | None) -> list[Tensor]:
        """What `make_updates` takes, without noise."""
        batches = batches.updates()
        batches.check(self.observation_size + self.privileged_size, self.action_size, self.num_tasks)
        scale = self._unscaled if reward_scale is None else reward_scale
        require_shape("reward_scale", scale, "[T]", (self.num_tasks,))
        for name, part in () if noise is None else noise._asdict().items():
            require_shape(f"noise.{name}", part, "[U, B, A]", tuple(batches.actions.shape))
        moments = () if self.observations is None else self.observations.moments
        return [*batches.columns, scale, *moments]

    def make_updates(self, *inputs: Tensor) -> Tensor:
        """`update` of a batch's fields, the reward scale, the moments of observations where these are
        normalized and, perhaps, noise."""
        batches, scale, noise = Batch._make((*inputs[:6], {})), inputs[6], inputs[7:]
        if self.observations is not None:
            moments, noise = (noise[0], noise[1]), noise[2:]
            seen = (batches.observations, batches.next_observations)
            now, then = (self.observations.normalize(x, batches.task_ids, moments) for x in seen)
            batches = batches._replace(observations=now, next_observations=then)
        each = scale if self.num_tasks == 1 else scale[batches.task_ids]
        batches = batches._replace(rewards=batches.rewards / each)
        discounts = self.learning.discount * batches.masks
        given = torch.stack(noise, 1) if noise else None  # [U, 2, B, A]
        rows = discounts.new_empty(discounts.shape[0], len(METRICS))
        alpha = self.alpha
        for index, metrics in enumerate(rows):
            batch = batches.update(index)
            drawn = self.normal(2, *batch.actions.shape) if given is None else given[index]
            samples = self.plans(batch).samples(batch, drawn)
            losses = self.update_critic(batch, next(samples), alpha, metrics[CRITIC_NORM], discounts[index])
            sample = next(samples)
            q_values = self.update_actor(batch, sample, alpha, metrics[ACTOR_NORM])
            step = self.temperature_step()
            self.measure(metrics, losses, sample.log_probs, q_values, alpha, step)
        return rows[-1]

    def plans(self, batch: Batch) -> Plans:
        """The networks' passes over as many rows as the batch has."""
        rows = batch.rewards.shape[0]
        if rows not in self._plans:
            if len(self._plans) == MOST_SIGNATURES:
                self.updates.forget()  # graphs that use the memory of those
                self._plans.clear()
            nets = self.actor, self.critic, self.actors, self.critics
            self._plans[rows] = Plans(*nets, rows, self.recompute)  # kept: a graph may use its memory
        return self._plans[rows]

    def forget_plans(self) -> None:
        self._plans.clear()

    @torch.no_grad()
    def critic_target(self, batch: Batch, noise: Tensor) -> CriticTarget:
        """Soft categorical Bellman target; probabilities are averaged over members (with reduction "min" they
        are those of the member with the lowest value, with "own" each member has its own).

        a'     ~ pi(.|s'),   p = mean_e softmax(Q'_e(s', a'))
        y_k    = clip(r + discount * mask * (z_k - alpha * log pi(a'|s')), v_min, v_max)
        target = project(p, from y, onto z)
        """
        if self.atoms is None or not isinstance(self.loss, Categorical):
            raise ValueError(
                f"critic_target is of the categorical loss, and loss is {self.critic_config.loss}"
            )
        next_actions, next_log_probs = kernels.tanh_gaussian(
            *self.policy(self.sensed(batch.next_observations), batch.task_ids), noise
        )
        seen = self.normalized(batch.next_observations, batch.task_ids)
        next_logits = self.target_critic(seen, next_actions, batch.task_ids)
        backup = Backup(batch.rewards, self.learning.discount * batch.masks, next_log_probs, self.alpha)
        probs = self.loss.target(next_logits, backup, self.atoms)
        return CriticTarget(next_actions, next_log_probs, next_logits, probs)

    @torch.no_grad()
    def clipped_share(self, batch: Batch, reward_scale: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """Share of the target's mass that the ends of the support clip, 0-d, over a batch [B, ...] with raw
        rewards; see `Critic.clipped_share`. The agent stays as it is, its noise included.

        Args:
            reward_scale: [T], as for `update`. seed: of the noise of the next actions.
        Raises:
            ValueError with the loss mse, which has no support.
        """
        batch = batch.to(self.device)
        scale = self._unscaled if reward_scale is None else reward_scale
        generator = Generator(self.device).manual_seed(seed)
        mean, raw_log_std = self.policy(self.sensed(batch.next_observations), batch.task_ids)
        noise = torch.empty_like(mean).normal_(generator=generator)
        next_actions, next_log_probs = kernels.tanh_gaussian(mean, raw_log_std, noise)
        share: Tensor = self.critic.clipped_share(
            self.target_critic,
            batch.rewards / (scale if self.num_tasks == 1 else scale[batch.task_ids]),
            self.learning.discount * batch.masks,
            self.normalized(batch.next_observations, batch.task_ids),
            next_actions,
            next_log_probs=next_log_probs,
            temperature=self.alpha,
            task_ids=batch.task_ids,
        )
        return share.mean()

    @torch.no_grad()
    def update_critic(
        self,
        batch: Batch,
        next_sample: Sample,
        alpha: Tensor,
        norm: Tensor | None = None,
        discounts: Tensor | None = None,
    ) -> Tensor:
        """One AdamW step of every member, and of the task embedding, towards the projected target of
        `critic_target`; then the target critic moves towards the new one, embedding included.

        loss = sum_e mean_b cross_entropy(target_b, log softmax(Q_e(s_b, a_b)));    Q' += tau * (Q - Q')

        Args:
            next_sample: the policy's, at the next observations. alpha: 0-d. norm: 0-d, receives that of the
                gradient. discounts: discount * masks, [B], where they are there already.
        Returns:
            The losses [E, B] before the step.
        """
        plans, ids = self.plans(batch), batch.task_ids
        x = plans.critic_input(self.critic, batch.observations, batch.actions, ids)
        next_x = plans.critic_input(self.target_critic, batch.next_observations, next_sample.actions, ids)
        out, next_out = plans.critics.forward(x, next_x).chunk(2)  # online, target
        if discounts is None:
            discounts = self.learning.discount * batch.masks
        losses, dout = self.loss.bellman_and_gradient(
            plans.choose(out, ids),  # [E, B, K]
            plans.choose(next_out, ids),
            Backup(batch.rewards, discounts, next_sample.log_probs, alpha),
            self.atoms,
            scale=1.0 / len(ids),
            columns=plans.gradient_columns,
        )
        plans.critics_backward(dout, ids)
        self.critic_optimizer.step(norm)
        return losses

    @torch.no_grad()
    def update_actor(self, batch: Batch, sample: Sample, alpha: Tensor, norm: Tensor | None = None) -> Tensor:
        """One AdamW step of the policy against the new critic, which gets no gradient.

        a ~ pi(.|s),   loss = mean_b [alpha * log pi(a|s) - sum_k z_k * mean_e softmax(Q_e(s, a))_k]

        Args:
            sample: the policy's, at the observations. alpha: 0-d. norm: 0-d, receives that of the gradient.
        Returns:
            The values [E, B] of the actions; [1, B] where the members' lowest counts.
        """
        plans, ids = self.plans(batch), batch.task_ids
        x = plans.critic_input(self.critic, batch.observations, sample.actions, ids)
        out = plans.choose(plans.critic.forward(x), ids)  # [E, B, K]
        q_values, dout = self.loss.policy_and_gradient(out, self.atoms, columns=plans.gradient_columns)
        plans.actor_backward(plans.actions_gradient(dout, ids), sample, alpha, ids)
        self.actor_optimizer.step(norm)
        return q_values

    def temperature_step(self) -> TemperatureStep:
        """One Adam step of log alpha on `alpha * (entropy - target_entropy)`, for `measure`, which has the
        entropy: both are one launch."""
        optimizer = self.temperature_optimizer
        return TemperatureStep(self.target_entropy, optimizer.grad[:1], optimizer.scalar())

    def add_tasks(
        self,
        number: int = 1,
        *,
        start: int | Sequence[int] | None = None,
        keep: bool = True,
        observation_size: int | None = None,
        action_size: int | None = None,
        privileged_size: int | None = None,
        optimizer: Literal["kept", "fresh"] = "kept",
        seed: int = 0,
    ) -> BRC:
        """A new agent that knows what this one does, and has `number` more tasks, T .. T + number - 1. This
        one stays as it is: graphs and optimizers hold its memory. On old tasks both act and value alike.

            agent = agent.add_tasks(2, start=0)

        Args:
            start: the old task, one for all or one for each, that new ones begin as; the mean of all old ones
                when not given.
            keep: False leaves the old tasks out: the new ones are 0 .. number - 1.
            observation_size, action_size, privileged_size: of the widest task; this agent's when not given.
                Old columns keep their weights, further ones begin with weight zero, further actions as in
                a new agent (brc_fast.agents.transfer).
            optimizer: moments and step counts kept, by name, or fresh. Learning rates and tau are this
                agent's.
            seed: of what is drawn anew, and of the new agent's noise.
        Raises:
            ValueError for tasks that there are not, and with `keep` for sizes below this agent's.
        """
        from .transfer import grown

        sizes = observation_size, action_size, privileged_size
        return grown(self, number, sizes, start=start, keep=keep, optimizer=optimizer, seed=seed)

    def freeze_body(self, frozen: bool = True) -> None:
        """Of an agent that `add_tasks` gave: let only output layers, what tells tasks apart and further
        columns learn from now on; the rest stays as it is until `freeze_body(False)`. Copies are not frozen.

        Raises:
            ValueError for an agent that was made in another way.
        """
        from .transfer import freeze_body

        if self._taken is None:
            raise ValueError("freeze_body is for agents that add_tasks gave: this one has nothing to keep")
        freeze_body(self, self._taken if frozen else None)

    def settings(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sizes = self.observation_size, self.action_size, self.num_tasks
        names = "critic_config", "actor_config", "learning", "device", "dtype", "precision", "recompute"
        settings = {name.removesuffix("_config"): getattr(self, name) for name in names}
        settings["privileged_size"] = self.privileged_size
        return sizes, {**settings, "normalize_observations": self.observations is not None}
