"""BRC: the updates of a categorical critic ensemble with its target, of the policy and of its temperature.

Dims: B batch, E ensemble, K atoms, O observation, A action, T tasks, U updates.
Source: Nauman et al. 2025, "Bigger, Regularized, Categorical", arXiv:2505.23150.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
import zlib
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from brc_fast import kernels
from brc_fast.batch import Batch, require_shape
from brc_fast.config import ActorConfig, CriticConfig, LearningConfig, Precision, TrainConfig
from brc_fast.learner.finite import FirstBad
from brc_fast.learner.flat import FlatNetworks
from brc_fast.learner.graphs import MOST_SIGNATURES, OFF, Captured
from brc_fast.learner.optimizer import FIXED, FlatAdamW
from brc_fast.learner.precision import check_precision, low_dtype, products
from brc_fast.nn.modules import Actor, Critic, Temperature

from .passes import Passes, Sample

Metrics = dict[str, Tensor]
SETTINGS = {
    field.name: config.__name__
    for config in (ActorConfig, CriticConfig, LearningConfig)
    for field in dataclasses.fields(config)
}
METRICS = kernels.reference.METRICS
CRITIC_NORM, ACTOR_NORM = (METRICS.index(f"{name}_gradient_norm") for name in ("critic", "actor"))


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
        critic, actor, learning: sizes and rates; the published ones by default (critic width 4096).
        device, dtype: of parameters and arithmetic. seed: of initialisation and sampling.
        precision: of matrix products: fp32, tf32 (needs CUDA) or bf16, for which bfloat16 copies of the
            float32 parameters are kept; moments, averages and LayerNorm stay in float32.
        graphs: on CUDA, replay `update` as a CUDA graph (brc_fast.learner.graphs).
        recompute: the critics' activations in the backward pass, which takes less memory and more time.

    Once made, its settings are fixed; learning rates and tau are tensors of its optimizers, and may be set at
    any time: `agent.actor_optimizer.learning_rate = 1e-4`.

    Raises:
        ValueError for a size below 1; InputError (a ValueError) for a precision that device or dtype lack;
        AttributeError where a setting is given another value later.
    """

    _EXCHANGED = ("critic", "target_critic", "actor", "temperature")  # looked at in every update

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
        precision: Precision = "fp32",
        graphs: bool = True,
        recompute: bool = False,
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
        check_precision(precision, device, dtype)
        self.device, self.dtype, self.precision, self.recompute = device, dtype, precision, recompute
        self.target_entropy = self.learning.target_entropy_per_action * action_size
        self.v_max = self.critic_config.v_max
        self.atoms = torch.linspace(
            -self.v_max, self.v_max, self.critic_config.num_atoms, device=device, dtype=dtype
        )

        drawn_on = "cpu" if torch.device(device).type == "meta" else device
        initial = Generator(drawn_on).manual_seed(seed)
        embedding_size = self.critic_config.embedding_size if num_tasks > 1 else 0
        with torch.device(device):
            self.critic = Critic(observation_size, action_size, num_tasks, self.critic_config, initial)
            self.actor = Actor(observation_size, action_size, embedding_size, self.actor_config, initial)
            self.temperature = Temperature(self.learning.initial_temperature)
        for module in (self.critic, self.actor, self.temperature):
            module.to(dtype)
        self.critic.atoms = self.atoms
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_critic.atoms = self.atoms
        low = low_dtype(precision)
        self.critics = FlatNetworks([self.critic, self.target_critic], low)
        self.actors = FlatNetworks([self.actor], low)
        rule, decay, beta1 = self.learning, self.learning.weight_decay, self.learning.beta1
        self.critic_optimizer = self._optimizer(self.critics, beta1, decay, rule.tau)
        self.actor_optimizer = self._optimizer(self.actors, beta1, decay)
        self.temperature_optimizer = self._optimizer(
            FlatNetworks([self.temperature]), rule.temperature_beta1, 0.0
        )
        self._trained = {name: part for name, part in self._parts().items() if isinstance(part, nn.Module)}
        self.generator = Generator(drawn_on).manual_seed(seed + 1)
        self._passes: dict[int, Passes] = {}
        self._unscaled = torch.ones(num_tasks, device=device, dtype=dtype)
        self.first_bad = FirstBad(METRICS, self.atoms)
        updates = weakref.WeakMethod(self._updates)  # so that the agent dies with its last reference

        def function(*inputs: Tensor) -> Tensor:
            mine = updates()
            if mine is None:
                raise RuntimeError("the agent of these updates is gone: hold it while they are made")
            return mine(*inputs)

        self.updates = Captured(function, device, [self.generator], enabled=graphs)

        self._fixed = frozenset(vars(self)) - {*self._EXCHANGED, "updates"}

    def __setattr__(self, name: str, value: object) -> None:
        """What the agent was made with is fixed: a CUDA graph has it, and would not see another value."""
        fixed = vars(self).get("_fixed", frozenset[str]())
        if name in fixed and not name.startswith("_"):
            raise AttributeError(f"{name} {FIXED}: make another one and load this one's state_dict() into it")
        if fixed and name in ("learning_rate", "tau"):
            raise AttributeError(f"{name} is set on an optimizer: agent.critic_optimizer.{name} = {value}")
        if fixed and name in SETTINGS:
            raise AttributeError(f"{name} is a setting of {SETTINGS[name]}, which {FIXED}")
        super().__setattr__(name, value)

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
            precision=config.precision,
            graphs=config.graphs,
            recompute=config.recompute,
            seed=config.seed,
        )

    def _optimizer(
        self, networks: FlatNetworks, beta1: float, weight_decay: float, tau: float | None = None
    ) -> FlatAdamW:
        return FlatAdamW(
            networks,
            learning_rate=self.learning.learning_rate,
            betas=(beta1, self.learning.beta2),
            eps=self.learning.eps,
            weight_decay=weight_decay,
            tau=tau,
        )

    @property
    def alpha(self) -> Tensor:
        """Temperature of the entropy bonus, 0-d, without gradient."""
        return self.temperature.log_alpha.detach().exp()

    def policy(
        self,
        observations: Tensor,
        task_ids: Tensor | None = None,
        lagged: tuple[Actor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std [B, A]; the online critic's embedding is read, and gets no gradient."""
        table = None if self.critic.embedding is None else self.critic.embedding.detach()
        actor, table = (self.actor, table) if lagged is None else lagged
        x = kernels.pack_inputs(observations, None, table, task_ids, self.critic_config.embedding_norm)
        return actor(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def act(
        self,
        observations: Tensor,
        task_ids: Tensor | None = None,
        deterministic: bool = False,
        lagged: tuple[Actor, Tensor | None] | None = None,
    ) -> Tensor:
        """Actions [N, A] in [-1, 1] for observations [N, O]: a sample, or the mean's tanh.

        Args:
            task_ids: [N] int64, in [0, T), on the agent's device like observations; needed with T > 1.
            lagged: the actor and embedding to act with in place of the newest (brc_fast.agents.policy).
        """
        mean, raw_log_std = self.policy(observations, task_ids, lagged)
        if deterministic:
            return mean.tanh()
        return kernels.tanh_gaussian(mean, raw_log_std, self._normal(mean.shape))[0]

    def random_actions(self, number: int) -> Tensor:
        """Uniform actions [number, A] in [-1, 1]."""
        shape = (number, self.action_size)
        return torch.rand(shape, generator=self.generator, device=self.device, dtype=self.dtype) * 2.0 - 1.0

    @torch.no_grad()
    def value(self, observations: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """Q of the mean action, averaged over members, in units of the scaled return: [N, O] -> [N]."""
        actions = self.act(observations, task_ids, deterministic=True)
        return self.critic.values(observations, actions, task_ids).mean(0)

    @torch.no_grad()
    def entropy_per_task(self, batch: Batch) -> Tensor:
        """Mean of -log pi over a batch's rows of each task, [T]; zero for a task without rows."""
        mean, raw_log_std = self.policy(batch.observations, batch.task_ids)
        log_probs = kernels.tanh_gaussian(mean, raw_log_std, self._normal(mean.shape))[1]
        total = torch.zeros(self.num_tasks, device=mean.device, dtype=mean.dtype)
        rows = total.clone().index_add_(0, batch.task_ids, torch.ones_like(log_probs))
        return total.index_add_(0, batch.task_ids, -log_probs) / rows.clamp_min(1)

    def update(
        self,
        batches: Batch,
        noise: Noise | None = None,
        reward_scale: Tensor | None = None,
    ) -> Metrics:
        """U updates, each on its own batch [U, B, ...]; returns the last one's metrics as 0-d tensors:
        critic_loss (summed over members), actor_loss, temperature_loss, critic_gradient_norm,
        actor_gradient_norm, entropy (nats), q_mean (in units of the scaled return) and temperature (alpha).

        Args:
            batches: on any device; pinned host memory is copied to a GPU while that still computes.
            noise: of the samplings, drawn where it is not given. With it there is no CUDA graph.
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
        batches.check(self.observation_size, self.action_size, self.num_tasks)
        scale = self._unscaled if reward_scale is None else reward_scale
        require_shape("reward_scale", scale, "[T]", (self.num_tasks,))
        for name, part in () if noise is None else noise._asdict().items():
            require_shape(f"noise.{name}", part, "[U, B, A]", tuple(batches.actions.shape))
        # memory that is kept must not be of inference mode: nothing outside of that could write it
        with torch.inference_mode(False), torch.no_grad(), products(self.precision, self.device):
            self._follow()
            if noise is None:
                values = self.updates([*batches, scale])
            else:
                self.updates.join()
                values = self._updates(*(x.to(self.device) for x in (*batches, scale, *noise)))
        return dict(zip(METRICS, values.unbind(), strict=True))

    def _follow(self) -> None:
        """Take in what was done by hand since the last update; see `FlatNetworks.follow`."""
        for name, trained in self._trained.items():
            now = getattr(self, name)
            if now is trained:
                continue
            # compiled or wrapped, a module has the same parameters
            if [id(p) for p in now.parameters()] != [id(p) for p in trained.parameters()]:
                raise RuntimeError(f"{name} is not the module that is trained: load its parameters into that")
        for optimizer in self._optimizers().values():
            if optimizer.networks.touched():
                self.updates.join()  # before what it may still read is changed
                if optimizer.networks.follow():
                    self.updates.forget()
                    self._passes.clear()  # they hold addresses

    def _updates(self, *inputs: Tensor) -> Tensor:
        """`update` of a batch's fields, the reward scale and, perhaps, noise; metrics in the order of
        METRICS. It keeps to what a CUDA graph can hold."""
        batches, scale, noise = Batch(*inputs[:6]), inputs[6], inputs[7:]
        each = scale if self.num_tasks == 1 else scale[batches.task_ids]
        batches = batches._replace(rewards=batches.rewards / each)
        discounts = self.learning.discount * batches.masks
        given = torch.stack(noise, 1) if noise else None  # [U, 2, B, A]
        rows = self.atoms.new_empty(batches.rewards.shape[0], len(METRICS))
        alpha = self.alpha
        for index, metrics in enumerate(rows):
            batch = batches.update(index)
            drawn = self._noise(batch) if given is None else given[index]
            samples = self.passes(batch).samples(batch, drawn)
            losses = self.update_critic(batch, next(samples), alpha, metrics[CRITIC_NORM], discounts[index])
            sample = next(samples)
            q_values = self.update_actor(batch, sample, alpha, metrics[ACTOR_NORM])
            self.update_temperature(losses, sample.log_probs, q_values, alpha, metrics)
        return rows[-1]

    def check_finite(self) -> None:
        """FloatingPointError if a loss or a gradient is not finite: which, and since which update.

        This waits for the GPU; every update is looked at all the same.
        """
        self.first_bad.require_finite()

    def passes(self, batch: Batch) -> Passes:
        """The networks' passes over as many rows as the batch has."""
        rows = batch.rewards.shape[0]
        if rows not in self._passes:
            if len(self._passes) == MOST_SIGNATURES:
                self.updates.forget()  # graphs that use the memory of those
                self._passes.clear()
            nets = self.actor, self.critic, self.actors, self.critics
            self._passes[rows] = Passes(*nets, rows, self.recompute)  # kept: a graph may use its memory
        return self._passes[rows]

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
        passes, rows = self.passes(batch), batch.rewards.shape[0]
        x = passes.critic_input(self.critic, batch.observations, batch.actions, batch.task_ids)
        next_x = passes.critic_input(
            self.target_critic, batch.next_observations, next_sample.actions, batch.task_ids
        )
        logits, next_logits = passes.critics.forward(x, next_x).chunk(2)  # online, target: [E, B, K]
        if discounts is None:
            discounts = self.learning.discount * batch.masks
        losses, dlogits = kernels.categorical_bellman_loss_and_gradient(
            logits[..., : len(self.atoms)],
            next_logits[..., : len(self.atoms)],
            batch.rewards,
            discounts,
            next_sample.log_probs,
            alpha,
            self.atoms,
            self.v_max,
            scale=1.0 / rows,
            columns=logits.shape[-1],
        )
        passes.critics_backward(dlogits, batch.task_ids)
        self.critic_optimizer.step(norm)
        return losses

    @torch.no_grad()
    def update_actor(self, batch: Batch, sample: Sample, alpha: Tensor, norm: Tensor | None = None) -> Tensor:
        """One AdamW step of the policy against the new critic, which gets no gradient.

        a ~ pi(.|s),   loss = mean_b [alpha * log pi(a|s) - sum_k z_k * mean_e softmax(Q_e(s, a))_k]

        Args:
            sample: the policy's, at the observations. alpha: 0-d. norm: 0-d, receives that of the gradient.
        Returns:
            The values [E, B] of the actions.
        """
        passes, rows, members = self.passes(batch), batch.rewards.shape[0], self.critic_config.members
        mean, raw_log_std, noise, actions, _ = sample
        x = passes.critic_input(self.critic, batch.observations, actions, batch.task_ids)
        logits = passes.critic.forward(x)  # [E, B, K]
        q_values, dlogits = kernels.expected_value_and_gradient(
            logits[..., : len(self.atoms)],
            self.atoms,
            scale=-1.0 / (members * rows),
            columns=logits.shape[-1],
        )
        kernels.tanh_gaussian_backward(
            passes.actions_gradient(dlogits),
            alpha,
            mean,
            raw_log_std,
            noise,
            scale=1.0 / rows,
            out=passes.policy_gradient,
        )
        passes.actor.backward(passes.dhead)
        self.actor_optimizer.step(norm)
        return q_values

    @torch.no_grad()
    def update_temperature(
        self, losses: Tensor, log_probs: Tensor, q_values: Tensor, alpha: Tensor, metrics: Tensor
    ) -> None:
        """One Adam step of log alpha on `alpha * (entropy - target_entropy)`, and the update's metrics.

        Args:
            losses: of `update_critic`. log_probs: [B], of the sample given to `update_actor`. q_values: of
                `update_actor`. alpha: 0-d, becomes that of the next update. metrics: [8] in the order of
                METRICS, with the norms; receives the others.
        """
        kernels.update_summary_(
            metrics,
            losses,
            log_probs,
            q_values,
            alpha,
            target_entropy=self.target_entropy,
            gradient=self.temperature_optimizer.grad[:1],
            step=self.critic_optimizer.step_count,
            since=self.first_bad.since,
            adam=self.temperature_optimizer.scalar(),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes, by name: parameters, target, moments, step counts, noise."""
        state: dict[str, Tensor] = {"generator": self.generator.get_state()}
        for name, part in self._parts().items():
            state |= {f"{name}/{key}": value for key, value in part.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`; ValueError names the first entry that does not fit.

        From another kind of device comes a generator's state of another size: that seeds the noise anew.
        """
        mine = self.state_dict()
        for key in sorted(mine.keys() | state.keys()):
            if key not in state or key not in mine:
                raise ValueError(f"agent state {'lacks' if key in mine else 'has an unknown entry'} {key}")
            if key != "generator" and mine[key].shape != state[key].shape:
                raise ValueError(
                    f"agent state {key} must have shape {list(mine[key].shape)}, got {list(state[key].shape)}"
                )
        self.first_bad.clear()
        drawn = state["generator"].cpu()
        if drawn.shape == mine["generator"].shape:
            self.generator.set_state(drawn)
        else:
            self.generator.manual_seed(zlib.crc32(drawn.numpy().tobytes()))
        for name, part in self._parts().items():
            part.load_state_dict(
                {
                    key.removeprefix(f"{name}/"): value
                    for key, value in state.items()
                    if key.startswith(f"{name}/")
                }
            )

    def __reduce__(self) -> tuple[object, ...]:
        """A copied or unpickled agent has buffers of its own, and goes on from the same state."""
        sizes = self.observation_size, self.action_size, self.num_tasks
        names = "critic_config", "actor_config", "learning", "device", "dtype", "precision", "recompute"
        settings = {name.removesuffix("_config"): getattr(self, name) for name in names}
        settings["graphs"] = self.updates.reason != OFF
        state = {name: value.clone() for name, value in self.state_dict().items()}
        rates = {name: (part.learning_rate, part.tau) for name, part in self._optimizers().items()}
        return _restored, (sizes, settings, state, rates)

    def _optimizers(self) -> dict[str, FlatAdamW]:
        return {name: part for name, part in self._parts().items() if isinstance(part, FlatAdamW)}

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

    def _noise(self, batch: Batch) -> Tensor:
        return self._normal(torch.Size((2, *batch.actions.shape)))

    def _normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)


def _restored(
    sizes: tuple[int, int, int],
    settings: dict[str, Any],
    state: dict[str, Tensor],
    rates: dict[str, tuple[Tensor, Tensor]],
) -> BRC:
    """The inverse of `BRC.__reduce__`."""
    agent = BRC(*sizes, **settings)
    agent.load_state_dict(state)
    for name, optimizer in agent._optimizers().items():
        optimizer.learning_rate.copy_(rates[name][0])
        optimizer.tau.copy_(rates[name][1])
    return agent
