"""The benchmark of the update times nothing that is wrong; its floor is what an update multiplies."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from extras import require
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from brc_fast import kernels

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import bench_update as bench
import harness
import products
from workloads import CARTPOLE

from peers import torch_plain, updates

SLOW_PEERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("compiled", "jax")]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the benchmarks: several wait for each other on a busy machine. Nothing is compiled for a minute."""
    monkeypatch.setitem(updates.BUILDERS, "compiled", partial(updates.compiled, backend="aot_eager"))
    monkeypatch.setattr(bench, "COMPILING", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def subject(width: int = 16, batch: int = 8, tasks: int = 1, number: int = 1) -> updates.Subject:
    return updates.Subject(CARTPOLE._replace(width=width, batch=batch, tasks=tasks), number)


def run(names: Sequence[str], *sizes: updates.Subject, seconds: float = 0.0) -> harness.Results:
    found = harness.Results("update")
    bench.run(found, sizes or [subject()], names, seconds)
    return found


def entry(found: harness.Results, name: str) -> dict[str, Any]:
    (one,) = [entry for entry in found.entries if entry["provider"] == name]
    return one


# ---------------------------------------------------------------- the floor


@pytest.mark.parametrize(("width", "batch", "tasks"), [(16, 8, 1), (48, 24, 3), (264, 8, 1)])
def test_the_list_of_products_is_what_an_update_multiplies(
    width: int, batch: int, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_place(out: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
        return 2 * math.prod(left) * right[-1]

    size = subject(width, batch, tasks)
    counter = partial(FlopCounterMode, display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place})
    agent, other = size.agent(), size.agent()
    monkeypatch.setattr(products, "chosen_products", lambda dtype: "torch")  # whose operations are counted
    floor = products.Alone(lambda: other.update(size.inputs()[0]))
    with kernels.use("reference"), counter() as made:
        agent.update(size.inputs()[0])
    with counter() as alone:
        floor()
    assert alone.get_total_flops() == made.get_total_flops() > 0
    assert floor.whose == {"torch.bmm": len(floor.work)}


def test_a_product_of_the_floor_is_of_the_fastest_who_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(x: Tensor, y: Tensor, out: Tensor) -> Any:
        return lambda: time.sleep(0.01)

    size = subject(16, 8, 1)
    agent = size.agent()
    monkeypatch.setattr(products, "chosen_products", lambda dtype: "native")
    for name, whose in (("multiply", "torch.bmm"), ("by_torch", "brc-fast")):
        with monkeypatch.context() as patch:
            patch.setattr(products, name, slow)
            assert products.Alone(lambda: agent.update(size.inputs()[0])).whose.keys() == {whose}


def test_a_roofline_is_operations_or_bytes_whichever_takes_longer() -> None:
    """Of [2, 4, 8] times [2, 8, 16]: 2 * 2 * 4 * 8 * 16 operations, and 4 * 2 * (32 + 128 + 64) bytes."""
    pairs = products.noted(lambda: torch.bmm(torch.ones(2, 4, 8), torch.ones(2, 8, 16)))
    assert products.least(pairs, 1.0, math.inf) == 2048
    assert products.least(pairs, math.inf, 1.0) == 1792
    assert products.least([*pairs, *pairs], 1.0, 1.0) == 4096


def test_a_roofline_of_an_update_counts_its_products_and_what_adamw_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = subject(16, 8, 1)
    agent = size.agent()
    critic, actor = (sum(p.numel() for p in net.parameters()) for net in (agent.critic, agent.actor))
    monkeypatch.setattr(bench, "rate", lambda device, case: 1.0 if case == "copy" else math.inf)
    by_bytes = bench.roofline(size, "fp32")
    monkeypatch.setattr(bench, "rate", lambda device, case: math.inf if case == "copy" else 1.0)
    pairs = products.noted(lambda: agent.update(*size.inputs()))
    assert bench.roofline(size, "fp32") * size.updates == products.least(pairs, 1.0, math.inf) > 1e5
    assert by_bytes > 36 * critic + 28 * actor


# ---------------------------------------------------------------- equality


def test_every_provider_has_a_rate_a_ratio_to_ours_and_its_time_over_the_floor() -> None:
    found = run(["ours", "critic", "plain"], subject(number=2))
    assert found.equality == "passed"
    assert [one["provider"] for one in found.entries] == ["ours", "critic", "plain"]
    for one in found.entries:
        assert 0 < one["low"] <= one["value"] <= one["high"]
        assert one["over_floor"] == pytest.approx(one["floor"] / one["value"], rel=0.5)
        assert one["at"] == {"workload": "cartpole", "width": 16, "batch": 8}
        assert ("ratio" in one) == (one["provider"] != "ours")
    assert found.found["floor"] == "fastest products"
    (whose,) = found.found["products"].values()
    assert whose.keys() == {"fp32"}


PLANTED = {  # ops of an update, and what a wrong one makes of its result
    "categorical_bellman_loss_and_gradient": lambda out: (out[0] * 1.01, out[1]),
    "expected_value_and_gradient": lambda out: (out[0], out[1].roll(1, -2)),  # rows get those of others
    "tanh_gaussian": lambda out: (out[0], out[1] - 0.1),
    "normalized_embedding_backward": lambda out: out.zero_(),
}


@pytest.mark.parametrize("op", PLANTED)
def test_an_error_in_an_op_takes_our_time_away_and_tells_why(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, size = getattr(kernels, op), subject(tasks=3)
    assert run(["ours"], size).equality == "passed"
    monkeypatch.setattr(kernels, op, lambda *inputs, **options: PLANTED[op](right(*inputs, **options)))
    found = run(["ours", "plain"], size)
    ours = entry(found, "ours")
    assert ours["value"] is None
    assert ours["missing"].startswith("differs from plain PyTorch: ")
    assert entry(found, "plain")["value"] > 0
    assert found.equality == f"failed: ours at {size.case} {ours['missing']}"
    assert ours["missing"] in capsys.readouterr().out


@pytest.mark.parametrize("tasks", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
@pytest.mark.parametrize("name", ["critic", "plain", *SLOW_PEERS])
def test_a_peer_has_a_time_until_it_is_broken(name: str, tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Peer: Any = torch_plain.PlainBRC
    if name == "jax":
        require("jax", "optax")
        from peers.jax_plain import JaxBRC as Peer
    size = subject(32, 64, tasks)
    assert entry(run([name], size), name)["value"] > 0
    known, start = updates.expected(size), Peer.__init__

    def broken(self: Any, agent: Any, *rest: Any, **options: Any) -> None:
        start(self, agent, *rest, **options)
        self.learning = replace(self.learning, discount=0.9)

    monkeypatch.setattr(Peer, "__init__", broken)
    monkeypatch.setattr(updates, "expected", lambda subject: known)
    found = run(["ours", name], size)
    assert entry(found, name)["missing"].startswith("differs from plain PyTorch: ")
    assert entry(found, "ours")["value"] > 0
    assert found.end() == 1


@pytest.mark.parametrize(
    "name",
    ["critic/embedding", "target_critic/body.head.kernel", "actor/body.head.bias", "temperature/log_alpha"],
)
def test_a_parameter_that_stays_as_it_was_is_noticed(name: str) -> None:
    size = subject(32, 64, tasks=3)
    known, plain = updates.expected(size), updates.plain(size)
    before = plain.parameters()[name].clone()
    stuck = plain._replace(parameters=lambda: plain.parameters() | {name: before})
    differs = updates.difference(stuck, size, known)
    assert differs is not None
    assert differs.endswith(f"elements of {name}")


@pytest.mark.parametrize("name", ["plain", "critic", pytest.param("jax", marks=pytest.mark.slow)])
def test_providers_start_with_the_same_parameters_by_name(name: str) -> None:
    if name == "jax":
        require("jax", "optax")
    size = subject(tasks=3)
    ours, other = (updates.BUILDERS[each](size).parameters() for each in ("ours", name))
    assert ours.keys() == other.keys()
    assert {"critic/embedding", "target_critic/embedding", "temperature/log_alpha"} <= ours.keys()
    assert all(torch.equal(value, other[name]) for name, value in ours.items())


# ---------------------------------------------------------------- fair opponents


@pytest.fixture(params=[{}, {"ours": True}, {"backend": "aot_eager"}], ids=["plain", "critic", "compiled"])
def peer(request: pytest.FixtureRequest) -> Any:
    return torch_plain.PlainBRC(subject(tasks=3).agent(), **request.param)


def test_peers_in_pytorch_have_fused_optimizers_of_all_that_they_train(peer: Any) -> None:
    optimizers = peer.critic_optimizer, peer.actor_optimizer, peer.temperature_optimizer
    assert all(one.defaults["fused"] for one in optimizers)
    trained = {id(p) for p in (*peer.critic.parameters(), *peer.actor.parameters(), peer.log_alpha)}
    groups = [group for one in optimizers for group in one.param_groups]
    assert {id(parameter) for group in groups for parameter in group["params"]} == trained


def test_peers_in_pytorch_move_all_targets_in_one_call(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lerp, moved = torch._foreach_lerp_, list[Any]()
    monkeypatch.setattr(
        torch, "_foreach_lerp_", lambda slow, *rest: (moved.append([*map(id, slow)]), lerp(slow, *rest))
    )
    peer.updates(*subject(tasks=3).inputs())
    assert moved == [[*map(id, peer.target.parameters())]]


def test_peers_in_pytorch_compute_no_gradient_of_the_critic_for_the_actor(peer: Any) -> None:
    batches, noise = subject(tasks=3).inputs()
    batch, noise = batches.update(0), type(noise)(*(part[0] for part in noise))
    parameters = list(peer.critic.parameters())
    alone = torch.autograd.grad(peer.critic_loss(batch, noise.next_action), parameters)
    peer.update(batch, noise)
    for parameter, grad in zip(parameters, alone, strict=True):
        torch.testing.assert_close(parameter.grad, grad)  # else the actor's loss added to it


def test_jax_has_its_copy_before_torch_may_write_to_the_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    require("jax", "optax")
    from peers import jax_plain

    waited, wait = list[object](), jax_plain.jax.block_until_ready
    monkeypatch.setattr(jax_plain.jax, "block_until_ready", lambda x: waited.append(x) or wait(x))
    copy = jax_plain.from_torch(torch.ones(3, 2).T)
    assert [id(x) for x in waited] == [id(copy)]


# ---------------------------------------------------------------- time and memory


def test_the_budget_is_kept_and_what_it_does_not_reach_says_so() -> None:
    sizes = [subject(width) for width in (8, 16, 24)]
    start = time.perf_counter()
    assert (
        run(["ours"], *sizes, seconds=3.0).entries[0]["value"] > 0
    )  # a busy machine may not reach the others
    assert 2.0 < time.perf_counter() - start < 10.0
    found = run(["ours"], *sizes)
    assert [one["value"] is None for one in found.entries] == [False, True, True]
    assert found.entries[1]["missing"] == "time was up; raise --budget"


def test_a_provider_that_compiles_for_longer_than_there_is_time_is_left_out_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "COMPILING", 30.0)
    found = run(["ours", "compiled"])
    assert entry(found, "ours")["value"] > 0
    assert entry(found, "compiled")["missing"].startswith("compiling takes about 30 s")


def test_a_provider_without_room_says_so_and_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(size: updates.Subject) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setitem(updates.BUILDERS, "jax", full)
    found = run(["ours", "jax"])
    assert entry(found, "jax")["missing"] == "out of memory"
    assert entry(found, "ours")["value"] > 0


def test_the_command_line_stores_every_size_with_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "use_cores", lambda *_: None)
    words = ["--device", "cpu", "--width", "16", "--batch", "8", "16", "--budget", "3"]
    assert bench.main([*words, "--save", str(tmp_path / "update")]) == 0
    stored = harness.read(tmp_path / "update.json")
    assert [one["at"]["batch"] for one in stored["measurements"]] == [8, 8, 16, 16]
    assert {one["provider"] for one in stored["measurements"]} == {"ours", "plain"}


def test_one_thread_leaves_the_threads_of_the_others_as_they_were() -> None:
    small, seen = updates.Subject(CARTPOLE._replace(width=8, batch=8)), list[int]()
    counted = updates.ours(small, "fp32")._replace(call=lambda: seen.append(torch.get_num_threads()))
    with mock.patch.object(updates, "ours", return_value=counted):
        provider = updates.BUILDERS["one-thread"](small)
    torch.set_num_threads(2)
    provider.call()
    assert seen == [1]
    assert torch.get_num_threads() == 2
