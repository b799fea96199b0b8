"""What the agent promises beyond the recorded numbers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, Noise
from brc_fast.agents.brc import METRICS

SMALL = {"critic": CriticConfig(width=32), "actor": ActorConfig(width=16)}


def batches(updates: int, size: int, observation: int, action: int, tasks: int, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    normal = [torch.randn(updates, size, n, generator=rng) for n in (observation, action, observation)]
    masks = (torch.rand(updates, size, generator=rng) > 0.1).float()
    ids = torch.randint(tasks, (updates, size), generator=rng)
    rewards = torch.randn(updates, size, generator=rng)
    return Batch(normal[0], normal[1].tanh(), rewards, masks, normal[2], ids)


@pytest.mark.parametrize("tasks", [1, 3])
def test_u_updates_in_one_call_equal_u_calls(tasks: int) -> None:
    one, many = (BRC(5, 2, tasks, **SMALL) for _ in range(2))
    data = batches(4, 16, 5, 2, tasks)
    one.update(data)
    for u in range(4):
        many.update(data.map(lambda field, u=u: field[u : u + 1]))
    for name, value in one.state_dict().items():
        assert torch.equal(value, many.state_dict()[name]), name


def test_a_batch_of_one_update_needs_no_dimension_for_it() -> None:
    one, other = (BRC(5, 2, 3, **SMALL) for _ in range(2))
    scale, noise = torch.tensor([1.0, 2.0, 3.0]), Noise(*torch.randn(2, 1, 16, 2))
    for step in range(4):
        data = batches(1, 16, 5, 2, 3, seed=step)
        given = noise if step == 1 else None
        one.update(data, given, scale)
        other.update(data.update(0), given and Noise(*(part[0] for part in given)), scale)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"one of U updates \[U, B\], got rewards \[16\]"):
        data.update(0).update(0)


def test_the_same_seed_gives_the_same_agent_and_another_seed_another() -> None:
    same = [BRC(5, 2, seed=3, **SMALL) for _ in range(2)]
    other = BRC(5, 2, seed=4, **SMALL)
    for agent in (*same, other):
        agent.update(batches(2, 16, 5, 2, 1))
    assert torch.equal(same[0].critic_optimizer.flat, same[1].critic_optimizer.flat)
    assert not torch.equal(same[0].critic_optimizer.flat, other.critic_optimizer.flat)


def test_every_parameter_of_every_network_moves_in_one_update() -> None:
    agent = BRC(5, 2, 3, **SMALL)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    agent.update(batches(1, 64, 5, 2, 3))
    for name, value in agent.state_dict().items():
        assert name.endswith("/atoms") or not torch.equal(value, before[name]), name


def test_each_update_changes_its_own_network_and_the_critics_its_target() -> None:
    agent = BRC(5, 2, 3, **SMALL)
    batch = batches(1, 32, 5, 2, 3).update(0)
    samples = agent.plans(batch).samples(batch, torch.randn(2, 32, 2))
    flats = {
        "critic": agent.critic_optimizer.flat,
        "target": agent.critic_optimizer.target,
        "actor": agent.actor_optimizer.flat,
        "temperature": agent.temperature_optimizer.flat,
    }
    losses, log_probs = torch.rand(2, 32), torch.randn(32)
    steps = {
        "critic": lambda: agent.update_critic(batch, next(samples), agent.alpha),
        "actor": lambda: agent.update_actor(batch, next(samples), agent.alpha),
        "temperature": lambda: agent.measure(
            torch.zeros(len(METRICS)), losses, log_probs, losses, agent.alpha, agent.temperature_step()
        ),
    }
    for name, step in steps.items():
        before = {key: flat.clone() for key, flat in flats.items()}
        step()
        changed = {key for key, flat in flats.items() if not torch.equal(flat, before[key])}
        assert changed == ({name, "target"} if name == "critic" else {name})
        if name == "critic":
            moved = before["target"].lerp(flats["critic"], agent.learning.tau)
            torch.testing.assert_close(flats["target"], moved, rtol=1e-6, atol=1e-8)


def test_parameters_stay_views_of_the_flat_buffers() -> None:
    agent = BRC(5, 2, 3, **SMALL)
    agent.update(batches(1, 16, 5, 2, 3))
    agent.load_state_dict({name: value.clone() for name, value in agent.state_dict().items()})
    for module, flat in (
        (agent.critic, agent.critic_optimizer.flat),
        (agent.target_critic, agent.critic_optimizer.target),
        (agent.actor, agent.actor_optimizer.flat),
    ):
        joined = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
        torch.testing.assert_close(flat.norm(), joined.norm(), rtol=1e-6, atol=0.0)
        flat.copy_(torch.arange(flat.numel()))
        seen = torch.cat([p.detach().reshape(-1) for p in module.parameters()]).long()
        assert len(seen.unique()) == len(seen)  # each has its own place
        assert len(flat) < 1.2 * len(seen)


def test_a_restored_agent_goes_on_bit_for_bit() -> None:
    one, two = BRC(5, 2, 2, seed=1, **SMALL), BRC(5, 2, 2, seed=9, **SMALL)
    one.update(batches(3, 16, 5, 2, 2))
    two.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    for agent in (one, two):
        agent.update(batches(3, 16, 5, 2, 2, seed=5))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    ids = torch.zeros(4, dtype=torch.long)
    assert torch.equal(one.act(torch.ones(4, 5), ids), two.act(torch.ones(4, 5), ids))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copied_agent_goes_on_bit_for_bit_and_apart(how: str, precision: str) -> None:
    one = BRC(5, 2, 2, seed=1, precision=precision, recompute=True, **SMALL)
    one.critic_optimizer.learning_rate.fill_(0.01)
    one.critic_optimizer.tau.fill_(0.5)
    one.update(batches(3, 16, 5, 2, 2))
    two = copy.deepcopy(one) if how == "deepcopy" else pickle.loads(pickle.dumps(one))
    assert two.recompute
    before = {name: value.clone() for name, value in one.state_dict().items()}
    two.update(batches(3, 16, 5, 2, 2, seed=5))
    for name, value in one.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert name.endswith("/atoms") or not torch.equal(value, two.state_dict()[name]), name
    one.update(batches(3, 16, 5, 2, 2, seed=5))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_a_state_of_another_kind_of_device_has_all_but_the_noise() -> None:
    """A GPU's generator is 16 bytes: its noise cannot go on here, but is the same at each load."""
    one = BRC(5, 2, 2, seed=1, **SMALL)
    one.update(batches(3, 16, 5, 2, 2))
    state = {name: value.clone() for name, value in one.state_dict().items()}
    state["generator"] = torch.arange(16, dtype=torch.uint8)
    others = [BRC(5, 2, 2, seed=seed, **SMALL) for seed in (2, 3)]
    drawn = []
    for other in others:
        other.load_state_dict(state)
        assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items() if k != "generator")
        drawn.append(other.random_actions(4))
    assert torch.equal(*drawn)


def test_a_state_of_another_shape_is_refused_by_name() -> None:
    state = BRC(5, 2, **SMALL).state_dict()
    wider = BRC(5, 2, critic=CriticConfig(width=48), actor=ActorConfig(width=16))
    with pytest.raises(ValueError, match=r"critic/body\S+ must have shape .*48.*, got .*32"):
        wider.load_state_dict(state)
    with pytest.raises(ValueError, match=r"actor/body.input.kernel must have shape"):
        BRC(5, 2, 2, **SMALL).load_state_dict(state)


def test_actions_stay_in_bounds_and_the_deterministic_one_is_the_mean() -> None:
    agent = BRC(5, 2, **SMALL)
    observations, ids = 100.0 * torch.randn(64, 5), torch.zeros(64, dtype=torch.long)
    actions = agent.act(observations, ids)
    assert actions.shape == (64, 2)
    assert actions.abs().max() <= 1.0
    assert not torch.equal(actions, agent.act(observations, ids))
    calm = agent.act(observations, ids, deterministic=True)
    assert torch.equal(calm, agent.policy(observations, ids)[0].tanh())
    assert agent.random_actions(1000).abs().max() <= 1.0


def test_one_task_has_no_embedding_and_several_are_told_apart() -> None:
    assert BRC(5, 2, **SMALL).critic.embedding is None
    agent = BRC(5, 2, 2, **SMALL)
    calm = agent.act(torch.ones(2, 5), torch.tensor([0, 1]), deterministic=True)
    assert not torch.equal(calm[0], calm[1])


def test_a_row_of_another_task_leaves_an_unseen_tasks_embedding_to_weight_decay_alone() -> None:
    agent = BRC(5, 2, 3, **SMALL)
    data = batches(1, 16, 5, 2, 1)  # task 0 only
    before = agent.critic.embedding.detach().clone()
    agent.update(data)
    shrunk = before * (1.0 - agent.learning.learning_rate * agent.learning.weight_decay)
    torch.testing.assert_close(agent.critic.embedding.detach()[1:], shrunk[1:], rtol=1e-6, atol=0)
    assert not torch.allclose(agent.critic.embedding.detach()[0], shrunk[0], rtol=1e-6, atol=0)


def test_learning_on_one_repeated_batch_lowers_the_critics_loss() -> None:
    torch.manual_seed(0)
    agent = BRC(5, 2, **SMALL)
    data = batches(1, 64, 5, 2, 1)
    data = data._replace(masks=torch.zeros_like(data.masks))  # a fixed target
    first = agent.update(data)["critic_loss"]
    for _ in range(200):
        last = agent.update(data)["critic_loss"]
    assert last < 0.7 * first


def test_the_entropy_per_task_is_the_mean_over_that_tasks_rows() -> None:
    agent = BRC(5, 2, 3, **SMALL)
    batch = batches(1, 4000, 5, 2, 2).update(0)
    entropies = agent.entropy_per_task(batch)
    assert entropies.shape == (3,)
    assert entropies[2] == 0.0
    *_, sample = agent.plans(batch).samples(batch, torch.randn(2, 4000, 2))
    rows = batch.task_ids.bincount(minlength=3) / 4000
    assert (entropies * rows).sum().item() == pytest.approx(-sample.log_probs.mean().item(), rel=0.05)


def test_injected_noise_decides_the_update() -> None:
    one, two = (BRC(5, 2, **SMALL) for _ in range(2))
    data = batches(1, 16, 5, 2, 1)
    noise = Noise(torch.randn(1, 16, 2), torch.randn(1, 16, 2))
    torch.randn(7)
    one.update(data, noise)
    two.normal(3)  # the agent's own generator plays no part
    two.update(data, noise)
    assert torch.equal(one.actor_optimizer.flat, two.actor_optimizer.flat)


@pytest.mark.parametrize(
    ("sizes", "name"), [((0, 2, 1), "observation_size"), ((5, 0, 1), "action_size"), ((5, 2, 0), "num_tasks")]
)
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        BRC(*sizes, **SMALL)
