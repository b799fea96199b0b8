"""Replay of updates recorded from the authors' code: every parameter, loss, logit and target must come out.

The recordings are read from $BRC_FAST_SHARED/golden (default ../shared/golden) and told by their keys.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, LearningConfig, Noise, kernels
from brc_fast.agents.flax import from_flax
from brc_fast.agents.normalizer import RewardNormalizer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("BRC_FAST_SHARED", ROOT.parent / "shared")) / "golden"
FILES = sorted(GOLDEN.glob("*.npz"))
AFTER_FIRST = {torch.float64: 2e-6, torch.float32: 5e-6}
AFTER_LAST = 5e-4


def recordings(key: str) -> list[Any]:
    """Every recording that holds `key`; one skipped case with the reason when there is none."""
    found = [pytest.param(path, id=path.stem) for path in FILES if key in np.load(path).files]
    reason = f"no recording with {key} in {GOLDEN} (set BRC_FAST_SHARED)"
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=reason))]


class Recording:
    """One recorded run, its arrays under our parameter names."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.data = dict(np.load(path))
        self.meta: dict[str, Any] = json.loads(str(self.data["meta"]))
        self.dtype = dtype
        self.last = max(int(key.split("/")[1]) for key in self.data if key.startswith("after/"))

    def tensor(self, key: str) -> Tensor:
        value = torch.from_numpy(np.asarray(self.data[key]))
        return value.to(self.dtype) if value.is_floating_point() else value.long()

    def parameters(self, prefix: str, net: str) -> dict[str, Tensor]:
        """Parameters of one net under `prefix` (init or after/u)."""
        root = f"{prefix}/{net}/"
        arrays = {key.removeprefix(root): self.tensor(key) for key in self.data if key.startswith(root)}
        return from_flax(net, arrays)

    def batch(self, update: int) -> Batch:
        return Batch(**{field: self.tensor(f"batch/{update}/{field}") for field in Batch._fields[:-1]})

    def noise(self, update: int) -> Noise:
        return Noise(*(self.tensor(f"noise/{update}/{field}") for field in Noise._fields))

    def agent(self) -> BRC:
        meta = self.meta
        agent = BRC(
            meta["obs_dim"],
            meta["action_dim"],
            meta["num_tasks"],
            critic=CriticConfig(
                width=meta["width_critic"],
                depth=meta["depth_critic"],
                members=meta["ensemble_size"],
                num_atoms=meta["num_bins"],
                v_max=meta["v_max"],
                embedding_size=meta["embedding_size"],
            ),
            actor=ActorConfig(width=meta["width_actor"], depth=meta["depth_actor"]),
            learning=LearningConfig(
                learning_rate=meta["lr"],
                beta1=meta["adam_b1"],
                beta2=meta["adam_b2"],
                eps=meta["adam_eps"],
                weight_decay=meta["weight_decay"],
                temperature_beta1=meta["temperature_b1"],
                initial_temperature=meta["init_temperature"],
                target_entropy_per_action=meta["target_entropy"] / meta["action_dim"],
                discount=meta["discount"],
                tau=meta["tau"],
            ),
            dtype=self.dtype,
        )
        for net, module in networks(agent).items():
            module.load_state_dict(self.parameters("init", net))
        return agent


def networks(agent: BRC) -> dict[str, torch.nn.Module]:
    return {
        "critic": agent.critic,
        "target_critic": agent.target_critic,
        "actor": agent.actor,
        "temp": agent.temperature,
    }


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of what was recorded."""
    difference = torch.linalg.vector_norm(ours.detach().double() - theirs.double())
    return (difference / torch.linalg.vector_norm(theirs.double()).clamp_min(1e-30)).item()


def assert_parameters(agent: BRC, recording: Recording, update: int, tolerance: float) -> None:
    for net, module in networks(agent).items():
        recorded = recording.parameters(f"after/{update}", net)
        ours = dict(module.named_parameters())
        assert ours.keys() == recorded.keys()
        errors = {name: relative_error(value, recorded[name]) for name, value in ours.items()}
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= tolerance, f"{net}.{worst} after update {update}: {errors[worst]:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", recordings("meta"))
def test_recorded_updates_replay(path: Path, dtype: torch.dtype) -> None:
    recording = Recording(path, dtype)
    agent = recording.agent()
    for update in range(recording.last + 1):
        tolerance = AFTER_FIRST[dtype] if update == 0 else AFTER_LAST
        batch, noise = recording.batch(update), recording.noise(update)

        target = agent.critic_target(batch, noise.next_action)
        logits = agent.critic(batch.observations, batch.actions, batch.task_ids)
        parameter_norms = [
            optimizer.flat.norm() for optimizer in (agent.critic_optimizer, agent.actor_optimizer)
        ]
        seen = {
            "next_action": target.next_actions,
            "next_log_prob": target.next_log_probs,
            "next_q_logits": target.next_logits,
            "q_logits": logits,
            "info/r": batch.rewards.mean(),
            "info/critic_pnorm": parameter_norms[0],
            "info/actor_pnorm": parameter_norms[1],
            "info/q_mean": (target.probs @ agent.atoms).mean(),
        }
        if f"expect/{update}/target_probs_float64" in recording.data:
            # Recorded from the float32 logits and log-probabilities, so it is projected from those here.
            seen["target_probs_float64"] = kernels.categorical_target(
                recording.tensor(f"expect/{update}/next_q_logits"),
                batch.rewards,
                agent.learning.discount * batch.masks,
                recording.tensor(f"expect/{update}/next_log_prob"),
                agent.alpha,
                agent.atoms,
                agent.v_max,
            )
        metrics = agent.update(batch.map(lambda x: x[None]), Noise(*(x[None] for x in noise)))
        renamed = {"temp_loss": "temperature_loss"}
        for name in ("critic_loss", "actor_loss", "entropy", "temp_loss", "temperature"):
            seen[f"info/{name}"] = metrics[renamed.get(name, name)]
        seen["info/critic_gnorm"] = metrics["critic_gradient_norm"]
        seen["info/actor_gnorm"] = metrics["actor_gradient_norm"]

        compared = 0
        for name, value in seen.items():
            key = f"expect/{update}/{name}"
            if key in recording.data:
                recorded = torch.from_numpy(np.asarray(recording.data[key]))
                error = relative_error(value, recorded)
                if recorded.dim() == 0:  # a mean of terms of order one may itself be next to zero
                    error = min(error, (value.detach().double() - recorded.double()).abs().item())
                assert error <= tolerance, f"{key}: {error:.2e}"
                compared += 1
        assert compared >= 5, f"update {update} recorded only {compared} known values"
        if f"after/{update}/temp/log_temp" in recording.data:
            assert_parameters(agent, recording, update, tolerance)


def rows_that_heed_noise(recording: Recording) -> Tensor:
    """Which rows of the first batch, [B], go on with a tenth of the mass of their target inside the support.

    Told by what was recorded: noise moves neither the target of a row that ended nor mass that is clipped.
    """
    meta, batch = recording.meta, recording.batch(0)
    next_logits = recording.tensor("expect/0/next_q_logits")  # [E, B, K]
    entropies = -meta["init_temperature"] * recording.tensor("expect/0/next_log_prob")
    atoms = torch.linspace(-meta["v_max"], meta["v_max"], meta["num_bins"], dtype=recording.dtype)
    discounts = meta["discount"] * batch.masks
    values = batch.rewards[:, None] + discounts[:, None] * (atoms + entropies[:, None])  # [B, K]
    inside = (next_logits.softmax(-1).mean(0) * (values.abs() < meta["v_max"])).sum(-1)
    return (batch.masks > 0.0) & (inside > 0.1)


@pytest.mark.parametrize("path", recordings("meta"))
def test_a_replay_with_one_changed_noise_entry_is_told_apart(path: Path) -> None:
    recording = Recording(path, torch.float64)
    agent = recording.agent()
    batch, noise = recording.batch(0), recording.noise(0)
    heeding = rows_that_heed_noise(recording)
    if not heeding.any():
        pytest.skip(f"{path.stem}: every row of the first batch has ended, or its target is clipped")
    other = noise.next_action.clone()
    other[:, 0] += 0.1
    probs, moved = (agent.critic_target(batch, eps).probs for eps in (noise.next_action, other))
    change = torch.where(heeding, (moved - probs).abs().sum(-1), 0.0)
    row = change.argmax()
    assert change[row] > 1e-3, f"noise moves no target, the most by {change[row]:.1e}"

    noise.next_action[row] = other[row]
    agent.update(batch.map(lambda x: x[None]), Noise(*(x[None] for x in noise)))
    with pytest.raises(AssertionError, match="critic"):
        assert_parameters(agent, recording, 0, AFTER_FIRST[torch.float64])


@pytest.mark.parametrize("path", recordings("return_min"))
def test_recorded_reward_scales_replay(path: Path) -> None:
    data = dict(np.load(path))
    num_tasks = data["rewards"].shape[1]
    normalizer = RewardNormalizer(
        np.arange(num_tasks),
        discount=float(data["discount"]),
        v_max=float(data["v_max"]),
        target_entropy=float(data["target_entropy"]),
    )
    for step in range(len(data["rewards"])):
        normalizer.update(data["rewards"][step], data["terminated"][step], data["truncated"][step])
        for name in ("return_min", "return_max"):
            ours, theirs = getattr(normalizer, name), data[name][step]
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, err_msg=f"{name} after step {step}")
    rewards = torch.from_numpy(data["batch_rewards"])
    scaled = normalizer.normalize(
        rewards, torch.from_numpy(data["task_ids"]), torch.tensor(data["temperature"])
    )
    np.testing.assert_allclose(scaled.numpy(), data["normalized"], rtol=2e-6)
