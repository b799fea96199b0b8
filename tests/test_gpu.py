"""What a GPU must show: the agent, the hand-over from environments, the replay's batches on the device.

Run with `make gpu`. BRC_FAST_GPU_DRY=1 sends the same tests to the CPU, so that they are known to work.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agents import agent, batches, noises
from extras import require

from brc_fast import BRC, ActorConfig, CriticConfig, ReplayBuffer

pytestmark = pytest.mark.gpu
SMALL = {"critic": CriticConfig(width=64), "actor": ActorConfig(width=32)}


@pytest.fixture
def device(gpu: str) -> str:
    return gpu


@pytest.mark.parametrize("tasks", [1, 3])
def test_updates_on_the_device_follow_those_in_float64_on_the_cpu(device: str, tasks: int) -> None:
    ours, truth = agent(tasks, device=device, **SMALL), agent(tasks, dtype=torch.float64, **SMALL)
    # From a seed: with one noise in a hundred, float32 switches a ReLU or turns a first step of Adam around.
    mine, exact = (
        (batches(5, 64, tasks, **place), noises(5, 64, **place))
        for place in ({"device": device}, {"dtype": torch.float64})
    )
    metrics, expected = ours.update(*mine), truth.update(*exact)
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name].cpu().double(), value, rtol=1e-4, atol=1e-4, msg=name)
    for mine, theirs in zip(ours.critic.parameters(), truth.critic.parameters(), strict=True):
        difference = (mine.detach().cpu().double() - theirs.detach()).norm()
        assert difference <= 2e-4 * theirs.detach().norm() + 1e-6


def test_a_state_saved_on_the_device_restores_on_the_cpu(device: str) -> None:
    one, other = agent(device=device, **SMALL), agent(seed=7, **SMALL)
    one.update(batches(2, 32, device=device))
    state = {name: value.cpu() for name, value in one.state_dict().items() if name != "generator"}
    other.load_state_dict({**state, "generator": other.generator.get_state()})
    observations, ids = torch.randn(9, 5), torch.zeros(9, dtype=torch.long)
    mine = one.act(observations.to(device), ids.to(device), deterministic=True).cpu()
    torch.testing.assert_close(mine, other.act(observations, ids, deterministic=True), rtol=1e-4, atol=1e-4)


def test_replay_batches_reach_the_device_unchanged(device: str) -> None:
    buffer = ReplayBuffer(100, 3, 1, task_ids=[0, 1], seed=0)
    tag = np.zeros((2, 3), np.float32)
    for _ in range(50):
        successors = tag + 1.0
        no = np.zeros(2, bool)
        buffer.add(tag, np.zeros((2, 1), np.float32), tag[:, 0].copy(), no, no, successors)
        tag = successors
    batch = buffer.sample(16, 2).to(device)
    assert batch.observations.device.type == device
    assert torch.equal(batch.next_observations, batch.observations + 1.0)
    assert torch.equal(batch.rewards, batch.observations[..., 0])


def test_environment_tensors_feed_the_agent_and_keep_their_values(device: str) -> None:
    require("mjx")
    from brc_fast import envs

    env = envs.make("mjx/CartpoleSwingup", num_envs=8, seed=0)
    learner = BRC(env.observation_size, env.action_size, device=device, **SMALL)
    ids = torch.zeros(8, dtype=torch.long, device=device)
    observations = env.reset_tensors(0)
    held = []
    for _ in range(20):
        step = env.step_tensors(learner.act(observations.to(device), ids))
        held.append((step.observations, step.observations.cpu().clone()))
        observations = step.observations
    for tensor, copy in held:
        assert torch.equal(tensor.cpu(), copy)
    assert not torch.equal(held[0][1], held[-1][1])
    env.close()
