"""The critic in an agent of one's own: its loss, values and target, and the page that shows them."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require
from torch import Tensor

from brc_fast import BRC, ActorConfig, Batch, BroNet, Critic, CriticConfig, kernels

CONFIG = CriticConfig(width=24, num_atoms=21, embedding_size=4, v_max=5.0)
PAGE = (Path(__file__).resolve().parent.parent / "docs" / "critic.md").read_text()


def data(rows: int = 16, tasks: int = 1) -> Batch:
    rng = torch.Generator().manual_seed(3)
    observations, actions, successors = (torch.randn(rows, n, generator=rng) for n in (5, 2, 5))
    rewards, chance = torch.rand(2, rows, generator=rng)
    ids = torch.randint(tasks, (rows,), generator=rng)
    return Batch(observations, actions.tanh(), rewards, (chance > 0.2).float(), successors, ids)


MEMORY = """
import gc, sys, torch
from brc_fast import Critic, CriticConfig, kernels
torch.set_num_threads(1)
critic = Critic(17, 6, config=CriticConfig(width=256))
def resident():
    return told("VmRSS")
def told(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
def call(rows, wanted):
    with torch.set_grad_enabled(wanted), kernels.use(sys.argv[1]):
        values = critic.values(torch.zeros(rows, 17), torch.zeros(rows, 6))
        if wanted:
            values.sum().backward()
call(8, True)
before = resident()
call(16_384, False)
peak = told("VmHWM") - before
for rows in range(2_000, 4_000, 400):
    call(rows, False)
    call(rows, True)
critic.zero_grad()
gc.collect()
print(peak, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_keeps_little_memory_whatever_the_sizes_of_its_batches() -> None:
    """Without a gradient at most what plain PyTorch takes, and afterwards no more than a bound in bytes."""

    def measured(choice: str) -> list[float]:
        words = [sys.executable, "-c", MEMORY, choice]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        return [float(word) for word in done.stdout.split()]

    (peak, kept), (plain, _) = measured("auto"), measured("reference")
    assert peak < plain
    assert kept < 80  # MiB: 56 of the passes, and what the allocator holds


@pytest.mark.parametrize("tasks", [1, 3])
def test_its_loss_has_the_gradient_of_the_agents_update(tasks: int) -> None:
    agent = BRC(5, 2, tasks, critic=CONFIG, actor=ActorConfig(width=16))
    batch, noise = data(tasks=tasks), torch.randn(2, 16, 2)
    critic = copy.deepcopy(agent.critic)
    target = copy.deepcopy(agent.target_critic)
    sample = next(agent.plans(batch).samples(batch, noise))
    losses = critic.bellman_loss(
        target, batch.observations, batch.actions, batch.rewards, 0.99 * batch.masks,
        batch.next_observations, sample.actions, next_log_probs=sample.log_probs, temperature=agent.alpha,
        task_ids=batch.task_ids,
    )  # fmt: skip
    losses.mean(-1).sum().backward()
    torch.testing.assert_close(agent.update_critic(batch, sample, agent.alpha), losses)
    flat = agent.critics.named(agent.critics.grad)
    for name, parameter in critic.named_parameters():
        torch.testing.assert_close(parameter.grad, flat[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(parameter.grad is None for parameter in target.parameters())


def test_columns_of_rewards_and_no_entropy_are_those_of_a_plain_loss() -> None:
    critic, batch = Critic(5, 2, config=CONFIG), data()
    target = copy.deepcopy(critic)
    rest = batch.next_observations, batch.actions
    plain = critic.bellman_loss(
        target, batch.observations, batch.actions, batch.rewards, 0.9 * batch.masks, *rest
    )
    columns = critic.bellman_loss(
        target, batch.observations, batch.actions, batch.rewards[:, None], 0.9 * batch.masks[:, None], *rest,
        next_log_probs=torch.randn(16, 1),
    )  # fmt: skip
    assert plain.shape == (2, 16)
    torch.testing.assert_close(columns, plain)
    with pytest.raises(ValueError, match=r"rewards must have shape .* = \[16\] or .*, got \[16, 2\]"):
        critic.bellman_loss(
            target,
            batch.observations,
            batch.actions,
            batch.rewards[:, None].expand(16, 2),
            batch.masks,
            *rest,
        )


def test_values_are_means_and_frozen_ones_reach_the_actions_alone() -> None:
    critic, batch = Critic(5, 2, 3, CONFIG), data(tasks=3)
    actions = batch.actions.clone().requires_grad_()
    values = critic.values(batch.observations, actions, batch.task_ids, frozen=True)
    logits = critic(batch.observations, batch.actions, batch.task_ids)
    expected = (logits.softmax(-1) * torch.linspace(-5.0, 5.0, 21)).sum(-1)
    torch.testing.assert_close(values, expected)
    values.sum().backward()
    assert actions.grad is not None
    assert actions.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in critic.parameters())
    critic.values(batch.observations, actions, batch.task_ids).sum().backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())
    with pytest.raises(ValueError, match=r"task_ids .* are needed"):
        critic(batch.observations, batch.actions)


def test_the_target_moves_by_its_share() -> None:
    online, target = Critic(5, 2, 3, CONFIG), Critic(5, 2, 3, CONFIG)
    before = {name: p.clone() for name, p in target.named_parameters()}
    target.soft_update_(online, 0.25)
    for name, parameter in target.named_parameters():
        torch.testing.assert_close(parameter, before[name].lerp(online.get_parameter(name), 0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_atoms_are_evenly_spaced_in_any_dtype_and_after_another(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    atoms = torch.linspace(-10.0, 10.0, 101, dtype=wide)
    critic = Critic(5, 2, config=CriticConfig(width=8)).bfloat16().to(dtype)
    assert critic.body.head.kernel.dtype == dtype
    with torch.device("meta"):
        empty = Critic(5, 2, config=CriticConfig(width=8))
    for one in (critic, empty.to(dtype).to_empty(device="cpu")):
        assert one.atoms.dtype == wide
        assert torch.equal(one.atoms, atoms)
    seen, actions = torch.randn(4, 5, dtype=dtype), torch.randn(4, 2, dtype=dtype)
    expected = (critic(seen, actions).to(wide).softmax(-1) * atoms).sum(-1)
    torch.testing.assert_close(critic.values(seen, actions), expected)


def test_a_critic_that_cannot_be_is_refused() -> None:
    assert Critic(np.prod((5, 1)), 2, config=CONFIG)(torch.zeros(1, 5), torch.zeros(1, 2)).shape == (2, 1, 21)
    with pytest.raises(ValueError, match="num_tasks must be a positive integer, got CriticConfig"):
        Critic(5, 2, CONFIG)  # type: ignore[arg-type]
    for sizes, told in (
        ((0, 2), "observations must be a positive"),
        ((5, -1), "actions must be an integer of 0"),
    ):
        with pytest.raises(ValueError, match=f"the size of {told}"):
            Critic(*sizes, config=CONFIG)


def test_arguments_in_another_order_or_of_another_critic_are_named() -> None:
    critic, batch = Critic(5, 2, config=CONFIG), data()
    with pytest.raises(ValueError, match=r"observations must have shape \[..., 5\], got \[16, 2\]"):
        critic.values(batch.actions, batch.observations)
    with pytest.raises(ValueError, match=r"actions must have shape \[..., 2\] = \[16, 2\].*, got \[16, 5\]"):
        critic(batch.observations, batch.observations)
    given: list[Any] = [batch.observations, batch.actions, batch.rewards, 0.99]
    rest = batch.next_observations, batch.actions
    with pytest.raises(TypeError, match=r"discounts must be a tensor \[B\], got float"):
        critic.bellman_loss(critic, *given, *rest)
    for other in (replace(CONFIG, v_max=4.0), replace(CONFIG, num_atoms=11)):
        with pytest.raises(ValueError, match=r"target must have .* 21, -5.0, 5.0\), got"):
            critic.bellman_loss(Critic(5, 2, config=other), *given[:3], batch.masks, *rest)


def test_first_weights_come_from_torchs_seed_or_a_generator_of_ones_own() -> None:
    def first(seed: int, *generator: torch.Generator) -> Tensor:
        torch.manual_seed(seed)
        return Critic(5, 2, 1, CONFIG, *generator).body.head.kernel

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    own = (torch.Generator().manual_seed(7) for _ in range(2))
    assert torch.equal(first(0, next(own)), first(1, next(own)))
    assert (
        Critic(5, 2, config=CONFIG).state_dict().keys() == BRC(5, 2, critic=CONFIG).critic.state_dict().keys()
    )


def test_optimizers_of_torch_take_it() -> None:
    """Contiguous parameters: the fused ones read memory as if all were."""
    critics = {}
    for fused in (False, True):
        torch.manual_seed(0)
        critic, batch = Critic(5, 2, config=CONFIG), data()
        optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-2, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            critic.bellman_loss(
                copy.deepcopy(critic), batch.observations, batch.actions, batch.rewards, batch.masks,
                batch.next_observations, batch.actions,
            ).mean().backward()  # fmt: skip
            optimizer.step()
        critics[fused] = critic.state_dict()
    for name, value in critics[False].items():
        torch.testing.assert_close(critics[True][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda critic: pickle.loads(pickle.dumps(critic))])
def test_copies_of_the_agents_critic_have_no_gaps(copied: Any) -> None:
    agent = BRC(5, 2, 3, critic=CONFIG, actor=ActorConfig(width=16))
    mine = copied(agent.critic)
    for name, parameter in mine.named_parameters():
        assert parameter.is_contiguous(), name
        assert torch.equal(parameter, agent.critic.get_parameter(name)), name


def test_a_body_of_any_outputs_is_an_ensemble() -> None:
    body = BroNet(7, 1, width=12, depth=1, members=3)
    x = torch.randn(4, 7)
    assert body(x).shape == (3, 4, 1)
    parameters = [p.double() for p in body.parameters()]
    torch.testing.assert_close(
        body(x).double(), kernels.reference.bronet(x.double(), *parameters), rtol=1e-4, atol=1e-5
    )


def test_the_pages_agent_learns() -> None:
    """docs/critic.md as it stands, but shorter."""
    require("gymnasium")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    shorter = code.replace("range(4_000)", "range(400)").replace(">= 500", ">= 200")
    assert shorter.count("range(400)") == 1
    names: dict[str, Any] = {}
    exec(compile(shorter, "critic.md", "exec"), names)
    assert names["loss"].isfinite()
    assert names["critic"].body.head.bias.abs().sum() > 0
    assert len(names["replay"]) == 400
