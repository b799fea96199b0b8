"""The BRC update in JAX, as research code has it: pytrees, vmapped members, optax, U updates in one jitted
loop. Float32.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch

from brc_fast import BRC, Batch, Noise

Array, Tree = jax.Array, Any
LAYER = ("kernel", "bias", "norm_weight", "norm_bias")


def from_torch(value: torch.Tensor) -> Array:
    """A copy on the same device. It is waited for: torch may write to what was copied from at once."""
    value = value.detach().contiguous()
    if value.is_cuda:
        torch.cuda.synchronize()  # some clients of JAX do not wait for torch's streams
    copy: Array = jax.block_until_ready(jnp.copy(jnp.from_dlpack(value)))
    return copy


def normed(x: Array, p: Tree, name: str) -> Array:
    kernel, bias, weight, shift = (p[f"{name}.{each}"] for each in LAYER)
    h = x @ kernel + bias
    centred = h - h.mean(-1, keepdims=True)
    return weight * centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6) + shift


def forward(p: Tree, x: Array) -> Array:
    """One network, its parameters by the names of ours: [B, I] -> [B, outputs]."""
    x = jax.nn.relu(normed(x, p, "body.input"))
    for block in range(sum(name.endswith(".0.kernel") for name in p)):
        h = jax.nn.relu(normed(x, p, f"body.blocks.{block}.0"))
        x = x + normed(h, p, f"body.blocks.{block}.1")
    return x @ p["body.head.kernel"] + p["body.head.bias"]


def embedded(critic: Tree, x: Array, task_ids: Array) -> Array:
    """x with the task's row of the table, of length 1, beside it; x where there is one task."""
    if "embedding" not in critic:
        return x
    table = critic["embedding"]
    return jnp.concatenate([x, (table / jnp.linalg.norm(table, axis=-1, keepdims=True))[task_ids]], -1)


def logits(critic: Tree, observations: Array, actions: Array, task_ids: Array) -> Array:
    """[E, B, K]"""
    x = embedded(critic, jnp.concatenate([observations, actions], -1), task_ids)
    nets = {name: value for name, value in critic.items() if name != "embedding"}
    return jax.vmap(forward, (0, None))(nets, x)


def sample(actor: Tree, x: Array, noise: Array) -> tuple[Array, Array]:
    """Actions and log-probabilities."""
    mean, raw = jnp.split(forward(actor, x), 2, -1)
    log_std = -10.0 + 6.0 * (1.0 + jnp.tanh(raw))
    u = mean + jnp.exp(log_std) * noise
    log_slope = 2.0 * (math.log(2.0) - u - jax.nn.softplus(-2.0 * u))
    return jnp.tanh(u), (-0.5 * noise**2 - log_std - 0.5 * math.log(2.0 * math.pi) - log_slope).sum(-1)


@jax.vmap
def projected(index: Array, probs: Array) -> Array:
    """The mass of each row, [B, K] at places between atoms, shared by the atoms on both sides: [B, K]."""
    lower = index.astype(jnp.int32)
    upper, share = jnp.minimum(lower + 1, len(probs) - 1), index - lower
    return jnp.zeros_like(probs).at[lower].add(probs * (1.0 - share)).at[upper].add(probs * share)


class JaxBRC:
    """Starts as a copy of `agent`."""

    def __init__(self, agent: BRC) -> None:
        self.learning = rule = agent.learning
        self.target_entropy, self.v_max, self.num_atoms = agent.target_entropy, agent.v_max, len(agent.atoms)
        adamw = optax.adamw(
            rule.learning_rate, rule.beta1, rule.beta2, rule.eps, weight_decay=rule.weight_decay
        )
        adam = optax.adam(rule.learning_rate, rule.temperature_beta1, rule.beta2, rule.eps)
        self.optimizers = {"critic": adamw, "actor": adamw, "log_alpha": adam}
        critic = {name: from_torch(value) for name, value in agent.critic.named_parameters()}
        actor = {name: from_torch(value)[0] for name, value in agent.actor.named_parameters()}
        trained = {"critic": critic, "actor": actor, "log_alpha": from_torch(agent.temperature.log_alpha)}
        moments = {name: self.optimizers[name].init(part) for name, part in trained.items()}
        state = {**trained, "target": jax.tree.map(jnp.copy, critic), "moments": moments}
        # All on one device, and said to be: else jit compiles once more for what it gave back itself.
        self.state, self._key = jax.device_put((state, jax.random.key(0)), trained["log_alpha"].device)
        self._updates = jax.jit(self._run, donate_argnums=0)
        self._draw = jax.jit(self._drawn, static_argnums=1)

    def _target(self, state: Tree, batch: dict[str, Array], noise: Array, atoms: Array) -> Array:
        observations, ids = batch["next_observations"], batch["task_ids"]
        actions, log_prob = sample(state["actor"], embedded(state["critic"], observations, ids), noise)
        probs = jax.nn.softmax(logits(state["target"], observations, actions, ids)).mean(0)
        soft = atoms - jnp.exp(state["log_alpha"]) * log_prob[:, None]
        y = batch["rewards"][:, None] + self.learning.discount * batch["masks"][:, None] * soft
        index = (y.clip(-self.v_max, self.v_max) + self.v_max) * ((self.num_atoms - 1) / (2 * self.v_max))
        return projected(index, probs)

    def _one(self, state: Tree, batch: dict[str, Array], noise: tuple[Array, ...]) -> Tree:
        observations, ids = batch["observations"], batch["task_ids"]
        atoms, alpha = jnp.linspace(-self.v_max, self.v_max, self.num_atoms), jnp.exp(state["log_alpha"])
        target = jax.lax.stop_gradient(self._target(state, batch, noise[0], atoms))

        def critic_loss(critic: Tree) -> tuple[Array, None]:
            told = jax.nn.log_softmax(logits(critic, observations, batch["actions"], ids))
            return -(target * told).sum(-1).mean(-1).sum(), None

        def actor_loss(actor: Tree) -> tuple[Array, Array]:
            actions, log_prob = sample(actor, embedded(state["critic"], observations, ids), noise[1])
            q = jax.nn.softmax(logits(state["critic"], observations, actions, ids)).mean(0) @ atoms
            return (alpha * log_prob - q).mean(), -log_prob.mean()

        def trained(name: str, loss: Any) -> Any:
            """The state with a part trained by this loss, and what the loss says."""
            told, grads = jax.value_and_grad(loss, has_aux=True)(state[name])
            change, moments = self.optimizers[name].update(grads, state["moments"][name], state[name])
            new = optax.apply_updates(state[name], change)
            return {**state, name: new, "moments": {**state["moments"], name: moments}}, told

        state, (loss, _) = trained("critic", critic_loss)
        state["target"] = optax.incremental_update(state["critic"], state["target"], self.learning.tau)
        state, (policy_loss, entropy) = trained("actor", actor_loss)
        state, _ = trained("log_alpha", lambda x: (jnp.exp(x) * (entropy - self.target_entropy), None))
        return state, {"critic_loss": loss, "actor_loss": policy_loss, "entropy": entropy}

    def _run(self, state: Tree, batches: dict[str, Array], noise: tuple[Array, ...]) -> Tree:
        def body(index: Array, carry: Tree) -> Tree:
            batch = {name: value[index] for name, value in batches.items()}
            return self._one(carry[0], batch, tuple(part[index] for part in noise))

        zeros = {name: jnp.zeros(()) for name in ("critic_loss", "actor_loss", "entropy")}
        return jax.lax.fori_loop(0, batches["rewards"].shape[0], body, (state, zeros))

    def _drawn(self, key: Array, shape: tuple[int, ...]) -> tuple[Array, ...]:
        """The next key, and noise of both samplings."""
        key, own = jax.random.split(key)
        return key, *jax.random.normal(own, (2, *shape))

    def feed(self, batches: Batch) -> dict[str, Array]:
        """Batches [U, B, ...] as `updates` takes them."""
        fields = batches._replace(task_ids=batches.task_ids.int(), extras={})  # JAX has no int64 unless told
        return {name: from_torch(value) for name, value in zip(fields._fields, fields.columns, strict=False)}

    def named(self) -> dict[str, torch.Tensor]:
        """What an update changes, by the names of ours and in its shapes."""
        parts = {"critic": self.state["critic"], "target_critic": self.state["target"]}
        parts["actor"] = {name: value[None] for name, value in self.state["actor"].items()}
        parts["temperature"] = {"log_alpha": self.state["log_alpha"]}
        flat = {f"{part}/{name}": value for part, own in parts.items() for name, value in own.items()}
        return {name: torch.tensor(value) for name, value in jax.device_get(flat).items()}

    def updates(self, fields: dict[str, Array], noise: Noise | None = None) -> dict[str, Array]:
        """U updates; the last one's losses, not waited for. Noise is drawn here where it is not given."""
        if noise is None:
            self._key, *drawn = self._draw(self._key, fields["actions"].shape)
        else:
            drawn = [from_torch(part) for part in noise]
        self.state, metrics = self._updates(self.state, fields, tuple(drawn))
        return metrics
