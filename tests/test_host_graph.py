"""Replayed updates on a CPU do what plain ones do, bit for bit, and see what is changed between them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from agents import SIZES, agent, batches, noises
from torch import Tensor

from brc_fast import BRC, ActorConfig, CriticConfig, kernels
from brc_fast.kernels.runtime import native
from brc_fast.kernels.runtime.host_graph import HostGraph
from brc_fast.learner.graphs import MOST_SIGNATURES

needs_build = pytest.mark.skipif(native.compiled is None, reason="the package's compiled part is not built")
pytestmark = needs_build

CRITICS = [
    CriticConfig(width=24, num_atoms=21, embedding_size=4),
    CriticConfig(width=24, num_atoms=21, body="simba", reduction="min", conditioning="one_hot"),
    CriticConfig(width=24, body="mlp", loss="mse", conditioning="heads"),
]


def pair(tasks: int, **options: Any) -> tuple[BRC, BRC]:
    """Of the same numbers, the second without graphs."""
    return agent(tasks, **options), agent(tasks, **options, graphs=False)


def assert_same(replayed: BRC, plain: BRC) -> None:
    expected = plain.state_dict()
    for name, value in replayed.state_dict().items():
        assert torch.equal(value, expected[name]), name


def graphs_of(learner: BRC) -> list[HostGraph | None]:
    return [program.graph for program in learner.updates._host.values()]


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("critic", CRITICS, ids=lambda c: f"{c.body}-{c.loss}-{c.conditioning}")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16"},
        {"dtype": torch.float64},
        {"normalize_observations": True},
        {"recompute": True},
    ],
    ids=["float32", "bf16", "float64", "normalized", "recomputed"],
)
def test_replays_are_plain_updates(options: dict[str, Any], critic: CriticConfig, tasks: int) -> None:
    if critic.conditioning == "heads" and tasks == 1:
        pytest.skip("heads are for several tasks")
    replayed, plain = pair(tasks, critic=critic, actor=ActorConfig(width=16), **options)
    dtype = options.get("dtype", torch.float32)
    scale = torch.linspace(0.5, 2.0, tasks, dtype=dtype)
    for call in range(5):
        batch = batches(2, 12, tasks, seed=call, dtype=dtype)
        for learner in (replayed, plain):
            if learner.observations is not None:
                learner.observations.update(batch.observations[0] * 3.0 + 1.0, batch.task_ids[0])
        metrics, expected = (learner.update(batch, reward_scale=scale) for learner in (replayed, plain))
        assert all(torch.equal(metrics[name], expected[name]) for name in expected)
    assert (replayed.updates.reason, replayed.updates.captures) == (None, 1)
    assert_same(replayed, plain)


def test_a_replay_sees_what_was_changed_since() -> None:
    """Rates, parameters, the noise's state; and updates of another size, or with noise given, in between."""
    replayed, plain = pair(2)
    for call in range(12):
        for learner in (replayed, plain):
            if call == 3:
                learner.critic_optimizer.learning_rate = 1e-2
                learner.critic_optimizer.tau = 0.5
            if call == 5:
                with torch.no_grad():
                    next(learner.actor.parameters()).mul_(0.5)
            if call == 7:
                learner.load_state_dict({name: x.clone() for name, x in learner.state_dict().items()})
            if call == 9:
                learner.generator.manual_seed(3)
            rows = 7 if call % 4 == 2 else 12
            learner.update(batches(1, rows, 2, seed=call), noises(1, rows) if call == 10 else None)
    assert replayed.updates.captures == 2
    assert_same(replayed, plain)


def test_graphs_of_the_last_shapes_are_kept() -> None:
    learner = agent()
    for updates in range(1, 4 + MOST_SIGNATURES):
        for _ in range(2):
            learner.update(batches(updates, 5))
    assert len(graphs_of(learner)) == MOST_SIGNATURES
    assert all(graph is not None for graph in graphs_of(learner))


def test_buffers_that_move_are_followed() -> None:
    replayed, plain = pair(1)
    for call in range(5):
        for learner in (replayed, plain):
            if call == 3:
                learner.critic.share_memory()
            learner.update(batches(1, 12, seed=call))
    assert_same(replayed, plain)


def test_another_implementation_has_a_graph_of_its_own() -> None:
    learner = agent()
    for _ in range(2):
        learner.update(batches(1, 12))
    with kernels.use("reference"):
        learner.update(batches(1, 12))
    assert [graph is None for graph in graphs_of(learner)] == [False, True]


@pytest.mark.gpu
def test_kernels_on_a_cpu_are_run_and_not_replayed(kernel_device: str) -> None:
    learner = agent(device=kernel_device)
    with kernels.use("triton"):
        for _ in range(3):
            learner.update(batches(1, 4, device=kernel_device))
    assert graphs_of(learner) == []


def test_a_replay_is_seen_by_autograd() -> None:
    """What was computed with parameters that have changed since has no gradient."""
    learner, batch = agent(), batches(1, 12)
    for _ in range(3):
        learner.update(batch)
    x = torch.ones(learner.critics.master.shape, requires_grad=True)
    out = (x * learner.critics.master).sum()
    learner.update(batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_what_torch_does_is_done_again_in_its_turn() -> None:
    """Views, allocations, results of their own, several results, writes, and draws."""
    x, generator = torch.arange(6.0).view(2, 3), torch.Generator().manual_seed(0)
    kept = torch.zeros(2)

    def function() -> Tensor:
        y = x[:, 1:] * 2.0
        made = y.new_empty(2, 2)
        made.copy_(y).add_(torch.randn(2, 2, generator=generator))
        values, places = made.max(dim=1)
        kept.add_(values)
        return torch.cat([made, values[:, None], places[:, None].float()], 1)

    graph = HostGraph(function)
    assert graph.unfit is None
    generator.manual_seed(1)
    kept.zero_()
    x.add_(1.0)
    graph.replay()
    mine, mine_kept = graph.out.clone(), kept.clone()
    generator.manual_seed(1)
    kept.zero_()
    assert torch.equal(mine, function())
    assert torch.equal(mine_kept, kept)


READS: dict[str, Any] = {
    "item": Tensor.item,
    "bool": bool,
    "tolist": lambda x: x.view(1).tolist()[0],
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.view(1, 1).nonzero().numel() / 2,
    "mask": lambda x: x.view(1)[x.view(1) > 0.0].numel(),
    "unique": lambda x: torch.stack([x, x]).unique().numel(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_function_that_reads_a_number_is_done_and_has_no_graph(read: Any) -> None:
    x = torch.ones(())
    graph = HostGraph(lambda: x + float(read(x)))
    assert graph.out == 2.0
    assert "number" in str(graph.unfit)


def test_constants_masks_of_gradients_and_writes_with_results_are_made_again() -> None:
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    generator = torch.Generator().manual_seed(0)

    def function() -> Tensor:
        total, like = torch.tensor(1.0), x.new_tensor([2.0])
        total.add_(x.detach().sum())
        like.mul_(3.0)
        with torch.enable_grad():
            y = torch.nn.functional.layer_norm(x, (4,), weight)
            dx, dweight = torch.autograd.grad(y.square().sum(), [x, weight])
        noise = torch.empty(5, 4)
        leaky = torch.ops.aten.rrelu_with_noise(x.detach(), noise, 0.1, 0.3, True, generator)
        return torch.cat([total.view(1), like, dx.flatten(), dweight, leaky.flatten(), noise.flatten()])

    graph = HostGraph(function)
    assert graph.unfit is None
    for call in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(5, 4))
        generator.manual_seed(call)
        graph.replay()
        generator.manual_seed(call)
        torch.testing.assert_close(graph.out, function().detach(), rtol=0.0, atol=0.0)


def test_a_graph_does_not_outlive_its_agent() -> None:
    learner, batch = agent(), batches(1, 12)
    for _ in range(3):
        learner.update(batch)
    updates = learner.updates
    del learner
    with pytest.raises(RuntimeError, match="the agent of these updates is gone"):
        updates([*batch.columns, torch.ones(1)])


MOVED: dict[str, Any] = {
    "moments": lambda x: x.critic_optimizer.exp_avg,
    "a view of moments": lambda x: next(iter(x.actor_optimizer.state_dict().values())),
    "rate": lambda x: x.critic_optimizer.learning_rate,
    "average": lambda x: x.critic_optimizer.tau,
    "steps": lambda x: x.critic_optimizer.step_count,
    "gradients": lambda x: x.critics.grad,
    "atoms": lambda x: x.critic.atoms,
    "copies": lambda x: x.critics.low,
    "since": lambda x: x.first_bad.since,
}


@pytest.mark.parametrize("of", MOVED.values(), ids=MOVED)
def test_memory_that_moves_is_followed(of: Any) -> None:
    """To another process, say; what is written there afterwards counts."""
    replayed, plain = pair(2, precision="bf16")
    for call in range(6):
        for learner in (replayed, plain):
            if call == 3:
                of(learner).share_memory_()
            if call == 4:
                learner.critic_optimizer.learning_rate = 0.1
            learner.update(batches(1, 12, 2, seed=call))
    assert replayed.updates.captures == 2
    assert_same(replayed, plain)


def test_recording_does_not_load_the_compiler() -> None:
    """All of it takes a second."""
    done = fresh.run(
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import agents\n"
        "a, b = agents.agent(), agents.batches(1, 5)\n"
        "for _ in range(3): a.update(b)\n"
        "print('torch._dynamo' in sys.modules, a.updates.captures)"
    )
    assert (done.stdout.split(), done.stderr) == (["False", "1"], "")


def test_an_error_ends_the_recording() -> None:
    def broken() -> Tensor:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        HostGraph(broken)
    assert not native.recording()
    assert native.noted.tensors is None
    assert native.takes(torch.ones(1))


def test_what_other_threads_do_is_not_recorded() -> None:
    started, over = threading.Event(), threading.Event()

    def elsewhere() -> None:
        started.wait()
        assert not native.recording()
        agent(seed=1).update(batches(1, 12))
        over.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    x = torch.ones(3)

    def function() -> Tensor:
        started.set()
        assert over.wait(60.0)
        return x * 2.0

    graph = HostGraph(function)
    thread.join()
    assert len(graph._tape) == 1


def test_threads_make_the_same_updates() -> None:
    """Also where each takes only a part of the rows."""
    state = []
    wide = {"critic": CriticConfig(width=128), "actor": ActorConfig(width=64)}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(1)
            learner = BRC(5, 2, **wide)  # torch's own numbers depend on its threads
            torch.set_num_threads(threads)
            for call in range(4):
                learner.update(batches(1, 192, seed=call))
            state.append(learner.state_dict())
    finally:
        torch.set_num_threads(before)
    for other in state[1:]:
        assert all(torch.equal(value, other[name]) for name, value in state[0].items())


def test_without_graphs_there_are_none() -> None:
    learner = agent(graphs=False, **SIZES)
    for _ in range(3):
        learner.update(batches(1, 12))
    assert (learner.updates.captures, graphs_of(learner)) == (0, [])
