"""The BRC update in JAX, as research code has it: pytrees, vmapped members, optax, U updates in one jitted
loop.

Float32. It is a yardstick of bench_update.py and starts as a copy of `brc_fast.BRC`; updates are compared
before anything is timed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch

from brc_fast import BRC, Batch, Noise

Tree = Any
LAYER = ("kernel", "bias", "norm_weight", "norm_bias")


def from_torch(value: torch.Tensor) -> jax.Array:
    """A copy on the same device. It is waited for: torch may write to what was copied from at once."""
    value = value.detach().contiguous()
    if value.is_cuda:
        torch.cuda.synchronize()  # some clients of JAX do not wait for torch's streams
    copy: jax.Array = jax.block_until_ready(jnp.copy(jnp.from_dlpack(value)))
    return copy


def network(state: dict[str, torch.Tensor]) -> Tree:
    """Parameters of stacked networks [E, ..] as a list of layers and the head."""
    arrays = {name: from_torch(value) for name, value in state.items()}
    blocks = sorted({name.rsplit(".", 1)[0] for name in arrays if name.startswith("body.blocks")})
    layers = [[arrays[f"{place}.{name}"] for name in LAYER] for place in ("body.input", *blocks)]
    return layers, [arrays["body.head.kernel"], arrays["body.head.bias"]]


def normed(x: jax.Array, layer: list[jax.Array]) -> jax.Array:
    kernel, bias, weight, shift = layer
    h = x @ kernel + bias
    centred = h - h.mean(-1, keepdims=True)
    return weight * centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6) + shift


def forward(parameters: Tree, x: jax.Array) -> jax.Array:
    """One network: [B, I] -> [B, outputs]."""
    (first, *rest), (kernel, bias) = parameters
    x = jax.nn.relu(normed(x, first))
    for inner, outer in zip(rest[::2], rest[1::2], strict=True):
        x = x + normed(jax.nn.relu(normed(x, inner)), outer)
    return x @ kernel + bias


ensemble = jax.vmap(forward, (0, None))


def named(parameters: Tree) -> dict[str, jax.Array]:
    """The inverse of `network`."""
    (first, *rest), (kernel, bias) = parameters
    places = ["body.input", *(f"body.blocks.{index // 2}.{index % 2}" for index in range(len(rest)))]
    out = {"body.head.kernel": kernel, "body.head.bias": bias}
    for place, layer in zip(places, (first, *rest), strict=True):
        out |= {f"{place}.{name}": value for name, value in zip(LAYER, layer, strict=True)}
    return out


def embedded(x: jax.Array, embedding: jax.Array | None, task_ids: jax.Array) -> jax.Array:
    """x with the task's row of the table, of length 1, beside it; x where there is one task."""
    if embedding is None:
        return x
    rows = embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True)
    return jnp.concatenate([x, rows[task_ids]], -1)


def logits(critic: Tree, observations: jax.Array, actions: jax.Array, task_ids: jax.Array) -> jax.Array:
    """[E, B, K]"""
    x = jnp.concatenate([observations, actions], -1)
    return ensemble(critic["nets"], embedded(x, critic["embedding"], task_ids))


@jax.vmap
def projected(index: jax.Array, probs: jax.Array) -> jax.Array:
    """The mass of each row, [B, K] at places between atoms, shared by the atoms on both sides: [B, K]."""
    lower = index.astype(jnp.int32)
    upper, share = jnp.minimum(lower + 1, len(probs) - 1), index - lower
    return jnp.zeros_like(probs).at[lower].add(probs * (1.0 - share)).at[upper].add(probs * share)


class JaxBRC:
    """Starts as a copy of `agent`."""

    def __init__(self, agent: BRC) -> None:
        rule, self.target_entropy = agent.learning, agent.target_entropy
        self.rule, self.v_max, self.num_atoms = rule, agent.v_max, len(agent.atoms)
        adamw = partial(optax.adamw, rule.learning_rate, rule.beta1, rule.beta2, rule.eps)
        self.adamw = adamw(weight_decay=rule.weight_decay)
        self.adam = optax.adam(rule.learning_rate, rule.temperature_beta1, rule.beta2, rule.eps)
        table = agent.critic.embedding
        critic = {
            "nets": network(agent.critic.state_dict()),
            "embedding": None if table is None else from_torch(table),
        }
        actor = jax.tree.map(lambda x: x[0], network(agent.actor.state_dict()))
        log_alpha = from_torch(agent.temperature.log_alpha)
        state = {
            "critic": critic,
            "target": jax.tree.map(jnp.copy, critic),
            "actor": actor,
            "log_alpha": log_alpha,
            "critic_moments": self.adamw.init(critic),
            "actor_moments": self.adamw.init(actor),
            "alpha_moments": self.adam.init(log_alpha),
        }
        # All on one device, and said to be: else jit compiles once more for what it gave back itself.
        self.state, self._key = jax.device_put((state, jax.random.key(0)), log_alpha.device)
        self._updates = jax.jit(self._run, donate_argnums=0)
        self._draw = jax.jit(self._drawn, static_argnums=1)

    def _sample(self, actor: Tree, x: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, raw = jnp.split(forward(actor, x), 2, -1)
        log_std = -10.0 + 6.0 * (1.0 + jnp.tanh(raw))
        u = mean + jnp.exp(log_std) * noise
        log_slope = 2.0 * (math.log(2.0) - u - jax.nn.softplus(-2.0 * u))
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2.0 * math.pi) - log_slope
        return jnp.tanh(u), log_prob.sum(-1)

    def _target(self, state: Tree, batch: dict[str, jax.Array], noise: jax.Array) -> jax.Array:
        observations, ids = batch["next_observations"], batch["task_ids"]
        x = embedded(observations, state["critic"]["embedding"], ids)
        actions, log_prob = self._sample(state["actor"], x, noise)
        probs = jax.nn.softmax(logits(state["target"], observations, actions, ids)).mean(0)
        atoms = jnp.linspace(-self.v_max, self.v_max, self.num_atoms)
        soft = atoms - jnp.exp(state["log_alpha"]) * log_prob[:, None]
        y = batch["rewards"][:, None] + self.rule.discount * batch["masks"][:, None] * soft
        index = (y.clip(-self.v_max, self.v_max) + self.v_max) * ((self.num_atoms - 1) / (2 * self.v_max))
        return projected(index, probs)

    def _one(self, state: Tree, batch: dict[str, jax.Array], noise: tuple[jax.Array, ...]) -> Tree:
        target = jax.lax.stop_gradient(self._target(state, batch, noise[0]))
        observations, ids = batch["observations"], batch["task_ids"]

        def critic_loss(critic: Tree) -> jax.Array:
            told = jax.nn.log_softmax(logits(critic, observations, batch["actions"], ids))
            return -(target * told).sum(-1).mean(-1).sum()

        loss, grads = jax.value_and_grad(critic_loss)(state["critic"])
        change, critic_moments = self.adamw.update(grads, state["critic_moments"], state["critic"])
        critic = optax.apply_updates(state["critic"], change)
        slow = optax.incremental_update(critic, state["target"], self.rule.tau)
        alpha = jnp.exp(state["log_alpha"])
        atoms = jnp.linspace(-self.v_max, self.v_max, self.num_atoms)

        def actor_loss(actor: Tree) -> tuple[jax.Array, jax.Array]:
            x = embedded(observations, critic["embedding"], ids)
            actions, log_prob = self._sample(actor, x, noise[1])
            q = jax.nn.softmax(logits(critic, observations, actions, ids)).mean(0) @ atoms
            return (alpha * log_prob - q).mean(), -log_prob.mean()

        (policy_loss, entropy), grads = jax.value_and_grad(actor_loss, has_aux=True)(state["actor"])
        change, actor_moments = self.adamw.update(grads, state["actor_moments"], state["actor"])
        actor = optax.apply_updates(state["actor"], change)
        grad = jax.grad(lambda log_alpha: jnp.exp(log_alpha) * (entropy - self.target_entropy))(
            state["log_alpha"]
        )
        change, alpha_moments = self.adam.update(grad, state["alpha_moments"], state["log_alpha"])
        new = {
            "critic": critic,
            "target": slow,
            "actor": actor,
            "log_alpha": optax.apply_updates(state["log_alpha"], change),
            "critic_moments": critic_moments,
            "actor_moments": actor_moments,
            "alpha_moments": alpha_moments,
        }
        return new, {"critic_loss": loss, "actor_loss": policy_loss, "entropy": entropy}

    def _run(self, state: Tree, batches: dict[str, jax.Array], noise: tuple[jax.Array, ...]) -> Tree:
        def body(index: jax.Array, carry: Tree) -> Tree:
            batch = {name: value[index] for name, value in batches.items()}
            return self._one(carry[0], batch, tuple(part[index] for part in noise))

        zeros = {name: jnp.zeros(()) for name in ("critic_loss", "actor_loss", "entropy")}
        return jax.lax.fori_loop(0, batches["rewards"].shape[0], body, (state, zeros))

    def _drawn(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
        """The next key, and noise of both samplings."""
        key, own = jax.random.split(key)
        return key, *jax.random.normal(own, (2, *shape))

    def feed(self, batches: Batch) -> dict[str, jax.Array]:
        """Batches [U, B, ...] as `update` takes them."""
        fields = batches._replace(task_ids=batches.task_ids.int())  # JAX has no int64 unless told
        return {name: from_torch(value) for name, value in fields._asdict().items()}

    def named(self) -> dict[str, jax.Array]:
        """What an update changes, by the names of ours and in its shapes."""
        out = {f"actor/{name}": value[None] for name, value in named(self.state["actor"]).items()}
        for part, critic in (("critic", self.state["critic"]), ("target_critic", self.state["target"])):
            out |= {f"{part}/{name}": value for name, value in named(critic["nets"]).items()}
            if critic["embedding"] is not None:
                out[f"{part}/embedding"] = critic["embedding"]
        return out | {"temperature/log_alpha": self.state["log_alpha"]}

    def update(self, fields: dict[str, jax.Array], noise: Noise | None = None) -> dict[str, jax.Array]:
        """U updates; the last one's losses, not waited for. Noise is drawn here where it is not given."""
        if noise is None:
            self._key, *drawn = self._draw(self._key, fields["actions"].shape)
        else:
            drawn = [from_torch(part) for part in noise]
        self.state, metrics = self._updates(self.state, fields, tuple(drawn))
        return metrics
