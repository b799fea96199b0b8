"""The benchmark of the update times nothing that is wrong; its floors are counts of what an update does."""

from __future__ import annotations

import gc
import json
import math
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from extras import require
from torch.utils.flop_counter import FlopCounterMode

from brc_fast import kernels

ROOT = Path(__file__).resolve().parent.parent
HERE = ("ours", "ours-bf16", "critic", "plain", "compiled")  # what any CPU with PyTorch can run


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import bench_update

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the benchmark does: several wait for each other on a busy machine
    yield bench_update
    torch.set_num_threads(threads)


@pytest.fixture
def roofline(bench: Any) -> Any:
    return bench.roofline


@pytest.fixture
def providers(bench: Any) -> Any:
    import update_providers

    return update_providers


def subject(providers: Any, width: int = 16, batch: int = 8, updates: int = 1, tasks: int = 1) -> Any:
    workload = providers.CARTPOLE._replace(tasks=tasks)
    return providers.Subject(width, batch, updates, "cpu", "aot_eager", workload)


def run(bench: Any, names: Sequence[str], widths: Sequence[int] = (16,), **options: Any) -> dict[str, Any]:
    return bench.run("cpu", names, widths, (8,), dry=True, **({"seconds": 60.0} | options))  # type: ignore[no-any-return]


def times_as_much(bench: Any, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let the plain update start with another temperature."""

    class Other(bench.timing.BUILDERS["plain"]):  # type: ignore[misc]
        def __init__(self, subject: Any) -> None:
            super().__init__(subject)
            self.peer.log_alpha.data += math.log(factor)

    monkeypatch.setitem(bench.timing.BUILDERS, "plain", Other)


# ---------------------------------------------------------------- floors


@pytest.fixture
def small(roofline: Any) -> Any:
    """One member without blocks: 9 inputs are padded to 16 and 2 outputs of the actor to 8."""
    return roofline.Sizes(4, 16, 8, 8, 1, depth=0, actor_depth=0, members=1, atoms=8)


def test_operations_of_a_small_update_counted_by_hand(roofline: Any, small: Any) -> None:
    actor = 2 * 4 * 8 * 8 + 2 * 4 * 8 * 8  # first layer, head, at s' and at s
    critics = 2 * (2 * 4 * 16 * 16) + 2 * (2 * 4 * 16 * 8)  # online and target
    weights = 2 * 16 * 4 * 8 + 2 * 4 * 8 * 16 + 2 * 16 * 4 * 16  # of the head, to its input, of the first
    critic = 2 * 4 * 16 * 16 + 2 * 4 * 16 * 8
    frozen = 2 * 4 * 8 * 16 + 2 * 4 * 16 * 8  # to the head's input, to 8 columns of the critic's
    policy = 2 * 8 * 4 * 8 + 2 * 4 * 8 * 8 + 2 * 8 * 4 * 8
    counted = actor + critics + weights + actor + critic + frozen + policy
    assert sum(product.operations for product in roofline.products(small)) == counted
    slow = roofline.Machine("", bf16=1.0, tf32=0.5, bandwidth=math.inf)
    assert roofline.floor(small, "bf16", slow) == counted
    assert roofline.floor(small, "tf32", slow) == 2 * counted


def test_bytes_of_a_small_update_counted_by_hand(roofline: Any, small: Any) -> None:
    assert roofline.parameters(small) == (8 * 8 + 8 * 8 + 3 * 8 + 8, 16 * 16 + 16 * 8 + 3 * 16 + 8)
    first, *_ = roofline.products(small)
    assert first.elements == 8 * 8 + 8 * 8 + 8 * 8
    found: dict[str, int] = {}
    for work in roofline.passes(small, 2):
        found[work.name] = found.get(work.name, 0) + work.bytes
    hidden = 4 * 16 * 2
    assert found == {
        "noise": 2 * 4 * 4,
        "pack actor next": 4 * (8 * 4 + 8 * 2),
        "pack actor": 4 * (8 * 4 + 8 * 2),
        "actor twice norm": 2 * 8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 4,
        "sample": 8 * (2 * 2 + 4 + 4 + 4),
        "pack critic": 4 * (9 * 4 + 16 * 2),
        "pack critic next": 4 * (9 * 4 + 16 * 2),
        "pack critic policy": 4 * (9 * 4 + 16 * 2),
        "critic norm": 3 * (2 * hidden + 2 * 4 * 4 + 3 * 16 * 4),
        "Bellman loss and gradient": 3 * 4 * 8 * 2 + 4 * (3 + 1) * 4,
        "critic head bias": 5 * 8 * 2,
        "critic norm backward": 2 * (3 * hidden + 2 * 4 * 4 + 3 * 16 * 4) + 3 * 16 * 2,
        "critic AdamW, target and copies": 38 * 440,
        "expected value and gradient": 2 * 4 * 8 * 2 + 4 * 4,
        "sample backward": 4 * (3 * 2 + 4 + 2 * 2),
        "actor head bias": 5 * 8 * 2,
        "actor norm backward": 3 * 4 * 8 * 2 + 2 * 4 * 4 + 3 * 8 * 4 + 3 * 8 * 2,
        "actor AdamW and copies": 28 * 160,
        "metrics": 3 * 4 * 4,
        "temperature": 24,
    }
    moved = sum(found.values()) + 2 * sum(product.elements for product in roofline.products(small))
    assert roofline.floor(small, "bf16", roofline.Machine("", math.inf, math.inf, 2.0)) == moved / 2


def test_the_slower_of_arithmetic_and_memory_counts_kernel_by_kernel(roofline: Any, small: Any) -> None:
    rate, bandwidth = 1.0, 2.0  # products wait for arithmetic, passes for memory
    works = roofline.kernels(small, "tf32")
    either = max(sum(w.operations for w in works) / rate, sum(w.bytes for w in works) / bandwidth)
    both = sum(w.operations for w in works) / rate + sum(w.bytes for w in works) / bandwidth
    assert either < roofline.floor(small, "tf32", roofline.Machine("", 6.0, rate, bandwidth)) < both


@pytest.mark.parametrize(("width", "batch", "tasks"), [(16, 8, 1), (48, 24, 3), (264, 8, 1)])
def test_the_list_of_products_is_what_an_update_multiplies(
    width: int, batch: int, tasks: int, providers: Any, roofline: Any
) -> None:
    def in_place(out: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
        return 2 * math.prod(left) * right[-1]

    size = subject(providers, width, batch, tasks=tasks)
    agent = size.agent("fp32")
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place})
    with kernels.use("reference"), counter:
        agent.update(size.batches())
    assert sum(product.operations for product in roofline.products(size.sizes)) == counter.get_total_flops()
    alone = providers.Products(size)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        alone.call()
    assert sum(product.operations for product in roofline.products(size.sizes)) == counter.get_total_flops()


def test_parameters_are_those_of_the_agent(providers: Any, roofline: Any) -> None:
    size = subject(providers, 32)
    agent = size.agent("fp32")
    own = (
        sum(p.numel() for p in agent.actor.parameters()) + 6 * 32 + 3 * 32 + 6
    )  # padding: 3 inputs, 6 outputs
    assert roofline.parameters(size.sizes)[0] == own - 3 * 32 + 3 * 32
    critic = sum(p.numel() for p in agent.critic.parameters()) + 2 * (2 * 32 + 3 * 32 + 3)
    assert roofline.parameters(size.sizes)[1] == critic
    size = subject(providers, 32, tasks=4)  # 38 inputs of a critic are padded to 40, 37 of the actor to 40
    agent = size.agent("fp32")
    critic = sum(p.numel() for p in agent.critic.parameters()) + 2 * (2 * 32 + 3 * 32 + 3)
    own = sum(p.numel() for p in agent.actor.parameters()) + 3 * 32 + 6 * 32 + 6
    assert roofline.parameters(size.sizes) == (own, critic)


def test_several_tasks_cost_their_embedding(roofline: Any, small: Any) -> None:
    several = small._replace(tasks=3)
    added: dict[str, int] = {}
    for sizes, sign in ((several, 1), (small, -1)):
        for work in roofline.passes(sizes, 2):
            added[work.name] = added.get(work.name, 0) + sign * work.bytes
    table = 3 * 32 * 4
    look_up = 4 * 32 * 2 + 4 * 8 + table  # written, ids and table
    assert {name: more for name, more in added.items() if more} == {
        **{f"pack {name}": look_up for name in ("actor next", "actor")},
        **{f"pack {name}": look_up for name in ("critic", "critic next", "critic policy")},
        "actor twice norm": -(2 * 8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 4),
        "actor norm": 2 * (2 * 4 * 8 * 2 + 2 * 4 * 4 + 3 * 8 * 4),
        "embedding backward": 4 * 32 * 2 + 4 * 8 + table + table // 2,
        "critic AdamW, target and copies": 38 * (32 * 16 + 3 * 32),
        "actor AdamW and copies": 28 * 32 * 8,
    }


SLOW_PEERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("compiled", "jax")]


# ---------------------------------------------------------------- providers


@pytest.mark.exhaustive
def test_a_row_holds_rates_ratios_and_floors_of_every_provider(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "update.json"
    run(bench, bench.PROVIDERS, updates=2, keep=lambda found: path.write_text(json.dumps(found)))
    stored = json.loads(path.read_text())
    assert (stored["not_reached"], stored["machine"]) == ([], None)
    (row,) = stored["rows"]
    timed = {*HERE, "jax"} - row["missing"].keys()
    assert set(HERE) <= timed
    assert row["missing"].pop("jax", "is not installed").endswith("is not installed") or "jax" in timed
    assert row["missing"].keys() == {"ours-tf32"}
    assert "precision tf32 needs a CUDA device" in row["missing"]["ours-tf32"]
    assert row["updates_per_second"].keys() == row["times_floor"].keys() == timed
    assert row["ratios_to"] == "ours"
    assert row["ratios"].keys() == timed - {"ours"}
    for middle, low, high in row["ratios"].values():
        assert 0 < low <= middle <= high
    assert row["floor"] == "products"
    assert all(over > 1 for over in row["times_floor"].values())
    assert row["precision"]["ours-bf16"] == "bf16"
    assert (row["width"], row["batch"], row["updates_per_call"], row["device"]) == (16, 8, 2, "cpu")


def test_a_provider_without_room_is_left_out_and_the_others_run(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(subject: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    monkeypatch.setitem(bench.timing.BUILDERS, "plain", full)
    (row,) = run(bench, ["ours", "plain", "ours-bf16"])["rows"]
    assert row["missing"] == {"plain": "out of memory"}
    assert row["updates_per_second"].keys() == {"ours", "ours-bf16"}
    line = next(line for line in capsys.readouterr().out.splitlines() if "plain" in line)
    assert line.split() == ["plain", "-", "out", "of", "memory"]


def test_a_provider_without_room_beside_others_is_timed_alone(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    plain = bench.timing.BUILDERS["plain"]

    def once(subject: Any) -> Any:
        built.append(subject)
        if len(built) == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return plain(subject)

    monkeypatch.setitem(bench.timing.BUILDERS, "plain", once)
    (row,) = run(bench, ["ours", "plain"])["rows"]
    assert row["missing"] == {}
    assert row["interleaved"] == [["ours", "products"], ["plain", "products"]]
    middle, low, high = row["ratios"]["plain"]
    assert low <= middle <= high


def test_nothing_is_held_of_a_provider_when_the_next_is_built(
    bench: Any, providers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []

    def watched(name: str) -> Any:
        build = bench.timing.BUILDERS[name]

        def builder(subject: Any) -> Any:
            assert [ref() for ref in held] == [None] * len(held)
            provider = build(subject)
            held.extend(weakref.ref(value) for value in (provider, *provider.parameters().values()))
            return provider

        return builder

    for name in HERE:
        monkeypatch.setitem(bench.timing.BUILDERS, name, watched(name))
    monkeypatch.setattr(bench.timing, "fits", lambda subject, names: False)
    pair = bench.timing.compare(subject(providers), HERE, 0.0)
    assert pair.missing == {}
    assert pair.times.keys() == {*HERE, "products"}
    gc.collect()


@pytest.mark.parametrize("updates", [1, 2])
def test_a_provider_that_computes_something_else_has_no_time(
    updates: int, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    times_as_much(bench, monkeypatch, 1.5)
    found = run(bench, ["ours", "plain"], updates=updates)
    (row,) = found["rows"]
    assert row["updates_per_second"].keys() == {"ours"}
    assert row["missing"]["plain"].startswith("differs from plain PyTorch: ")
    assert bench.wrong(found["rows"]) == [f"plain at cartpole H 16 B 8 {row['missing']['plain']}"]


PLANTED = {  # ops of an update, and what a wrong one makes of its result
    "categorical_bellman_loss_and_gradient": lambda out: (out[0] * 1.01, out[1]),
    "expected_value_and_gradient": lambda out: (out[0], out[1].roll(1, -2)),  # rows get those of others
    "tanh_gaussian": lambda out: (out[0], out[1] - 0.1),
    "normalized_embedding_backward": lambda out: out.zero_(),
}


@pytest.mark.parametrize("op", PLANTED)
def test_an_error_in_an_op_takes_our_time_away_and_tells_why(
    op: str, bench: Any, providers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(kernels, op)
    workload = providers.CARTPOLE._replace(tasks=3)
    (row,) = run(bench, ["ours", "plain"], workloads=[workload])["rows"]
    assert row["missing"] == {}
    monkeypatch.setattr(kernels, op, lambda *inputs, **options: PLANTED[op](right(*inputs, **options)))
    found = run(bench, ["ours", "plain"], workloads=[workload])
    (row,) = found["rows"]
    assert row["updates_per_second"].keys() == {"plain"}
    assert row["missing"].keys() == {"ours"}
    assert row["missing"]["ours"].startswith("differs from plain PyTorch: ")
    (ours,) = [one for one in found["measurements"] if one["provider"] == "ours"]
    assert (ours["value"], ours["missing"]) == (None, row["missing"]["ours"])
    assert row["missing"]["ours"] in capsys.readouterr().out
    assert found["equality"] == f"failed: {bench.wrong(found['rows'])[0]}"


def test_jax_has_its_copy_before_torch_may_write_to_the_memory_again(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("jax", "optax")
    from peers import jax_plain

    waited, wait = list[object](), jax_plain.jax.block_until_ready
    monkeypatch.setattr(jax_plain.jax, "block_until_ready", lambda x: waited.append(x) or wait(x))
    copy = jax_plain.from_torch(torch.ones(3, 2).T)
    assert [id(x) for x in waited] == [id(copy)]
    assert copy.shape == (2, 3)


@pytest.mark.parametrize("tasks", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
@pytest.mark.parametrize("name", ["critic", "plain", *SLOW_PEERS])
def test_a_peer_has_a_time_until_it_is_broken(
    name: str, tasks: int, bench: Any, providers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "jax":
        require("jax", "optax")
    size = subject(providers, 32, 64, tasks=tasks)
    assert bench.timing.compare(size, ["ours", name], 0.0).missing == {}

    class Broken(bench.timing.BUILDERS[name]):  # type: ignore[misc]
        def __init__(self, subject: Any) -> None:
            super().__init__(subject)
            rule = "rule" if name == "jax" else "learning"
            setattr(self.peer, rule, replace(getattr(self.peer, rule), discount=0.9))

    monkeypatch.setitem(bench.timing.BUILDERS, name, Broken)
    pair = bench.timing.compare(size, ["ours", name], 0.0)
    assert pair.times.keys() == {"ours", "products"}
    assert pair.missing[name].startswith("differs from plain PyTorch: ")


@pytest.mark.parametrize(
    "name",
    ["critic/embedding", "target_critic/body.head.kernel", "actor/body.head.bias", "temperature/log_alpha"],
)
def test_a_parameter_that_stays_as_it_was_is_noticed(name: str, providers: Any) -> None:
    size = subject(providers, 32, 64, tasks=3)
    known, plain = providers.expected(size), providers.Plain(size)
    before, moved = plain.parameters()[name].clone(), plain.parameters
    plain.parameters = lambda: moved() | {name: before}
    differs = providers.difference(plain, size, known)
    assert differs is not None
    assert differs.endswith(f"elements of {name}")


def test_providers_have_the_same_parameters_by_name(providers: Any) -> None:
    size = subject(providers, 16, 8, tasks=3)
    ours, plain = (providers.BUILDERS[name](size).parameters() for name in ("ours", "plain"))
    assert ours.keys() == plain.keys()
    assert {"critic/embedding", "target_critic/embedding", "temperature/log_alpha"} <= ours.keys()
    for name, value in ours.items():
        assert torch.equal(value, plain[name]), name


OPTIMIZERS = ("critic_optimizer", "actor_optimizer", "temperature_optimizer")


@pytest.mark.parametrize("name", ["critic", "compiled"])
def test_peers_in_pytorch_have_the_optimizers_of_the_plain_one(name: str, providers: Any) -> None:
    size = subject(providers, tasks=3)
    plain, other = (providers.BUILDERS[one](size).peer for one in ("plain", name))
    for part in OPTIMIZERS:
        one, two = (getattr(peer, part) for peer in (plain, other))
        assert type(one) is type(two)
        assert one.defaults == two.defaults
        assert one.defaults["fused"]
    trained = {id(p) for p in (*other.critics.parameters(), *other.actor.parameters(), other.log_alpha)}
    groups = [group for part in OPTIMIZERS for group in getattr(other, part).param_groups]
    assert {id(parameter) for group in groups for parameter in group["params"]} == trained


@pytest.mark.parametrize("name", ["critic", "plain", "compiled"])
def test_peers_in_pytorch_move_all_targets_in_one_call(
    name: str, providers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = subject(providers, tasks=3)
    peer, moved = providers.BUILDERS[name](size).peer, list[Sequence[int]]()
    lerp, tau = torch._foreach_lerp_, peer.learning.tau

    def counted(slow: Any, fast: Any, weight: float) -> None:
        assert weight == tau
        moved.append([id(target) for target in slow])
        lerp(slow, fast, weight)

    monkeypatch.setattr(torch, "_foreach_lerp_", counted)
    peer.updates(size.batches(), size.noise(0))
    assert moved == [[id(target) for target in peer.targets.parameters()]]


@pytest.mark.parametrize("name", ["critic", "plain", "compiled"])
def test_peers_in_pytorch_compute_no_gradient_of_the_critic_for_the_actor(name: str, providers: Any) -> None:
    size = subject(providers, tasks=3)
    peer = providers.BUILDERS[name](size).peer
    for _ in range(2):
        batch, noise = size.batches().update(0), providers.Noise(*(part[0] for part in size.noise(0)))
        parameters = list(peer.critics.parameters())
        alone = torch.autograd.grad(peer.critic_loss(batch, noise.next_action), parameters)
        peer.update(batch, noise)
        for parameter, grad in zip(parameters, alone, strict=True):
            torch.testing.assert_close(parameter.grad, grad)  # else the actor's loss added to it


def test_a_provider_that_compiles_for_longer_than_there_is_time_is_left_out_and_says_so(
    bench: Any, providers: Any
) -> None:
    size = replace(subject(providers), backend="inductor")
    pair = bench.timing.compare(size, ["ours", "compiled"], 1.0)
    assert pair.times.keys() == {"ours", "products"}
    told = f"compiling takes about {providers.COMPILING:.0f} s, more than this size has of the budget"
    assert pair.missing == {"compiled": f"{told}; raise --budget"}


def test_what_compiles_for_long_is_built_when_the_others_are_there(
    bench: Any, providers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def builder(name: str) -> Any:
        def build(subject: Any) -> Any:
            built.append(name)
            raise providers.Unavailable("was built")

        return build

    for name in ("plain", "compiled", "jax"):
        monkeypatch.setitem(bench.timing.BUILDERS, name, builder(name))
    size = replace(subject(providers), backend="inductor")
    bench.timing.compare(size, ["plain", "compiled", "jax"], 100.0)
    assert built == ["plain", "jax", "compiled"]


def test_the_jax_peer_shares_mass_between_the_atoms_on_both_sides(bench: Any) -> None:
    require("optax")
    from peers.jax_plain import jnp, projected

    places = jnp.array([[0.0, 1.25, 3.0, 3.0], [2.5, 2.5, 0.0, 1.0]])  # 3 is the last atom
    probs = jnp.array([[0.1, 0.4, 0.3, 0.2], [0.5, 0.25, 0.125, 0.125]])
    shared = [[0.1, 0.3, 0.1, 0.5], [0.125, 0.125, 0.375, 0.375]]
    assert projected(places, probs).tolist() == [pytest.approx(row) for row in shared]


@pytest.mark.parametrize("part", ["critic_optimizer", "actor_optimizer"])
def test_a_step_that_is_left_out_is_noticed(
    part: str, bench: Any, providers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = subject(providers, 32, 64)
    known = providers.expected(size)
    plain = providers.Plain(size)
    assert providers.difference(plain, size, known) is None
    plain = providers.Plain(size)
    monkeypatch.setattr(getattr(plain.peer, part), "step", lambda: None)
    differs = providers.difference(plain, size, known)
    assert differs is not None
    assert differs.startswith("differs from plain PyTorch")


def test_time_that_is_up_leaves_out_sizes_and_says_which(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(bench, ["ours", "plain"], (16, 24), seconds=0.0)
    assert [row["width"] for row in found["rows"]] == [16]
    assert found["rows"][0]["missing"] == {"plain": "time was up"}
    assert found["not_reached"] == ["cartpole H 24 B 8"]
    assert "not reached, time was up: cartpole H 24 B 8" in capsys.readouterr().out


@pytest.fixture
def slow(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that makes 100,000 operations per second; returns an update of a size there, in seconds."""
    machine = bench.roofline.Machine("", 1e5, 1e5, 1e12, 1e5)
    monkeypatch.setattr(bench, "limits_of", lambda device, dry: machine)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    return lambda subject: bench.roofline.floor(subject.sizes, "fp32", machine)


def test_a_size_that_the_budget_has_no_room_for_is_refused(
    bench: Any, providers: Any, slow: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.timing, "compare", lambda *_: pytest.fail("was compared"))
    assert bench.main(["--device", "cpu", "--width", "16", "24", "--batch", "8", "--budget", "5"]) == 1
    told = capsys.readouterr()
    each = slow(providers.Subject(16, 8))
    reason = f"an update takes about {each:.2g} s here and a comparison 20 of them, "
    assert (
        told.out.count(f"{reason}more than the budget of 5 s allows; raise --budget") == 2
    )  # ours and plain
    assert told.err == "nothing was compared\n"
    found = bench.run("cpu", ["ours"], (16,), (8,), seconds=5.0)
    assert found["equality"] == "failed: nothing was compared"
    assert found["not_reached"] == []
    assert found["measurements"][0]["missing"].startswith("an update takes about ")


def test_every_size_has_its_least_time_and_a_share_of_the_rest(bench: Any, providers: Any, slow: Any) -> None:
    sizes = [providers.Subject(width, 8) for width in (16, 64, 16)]
    small, large = (slow(size) * bench.least_updates(size, 2) for size in sizes[:2])
    machine = bench.limits_of("cpu", False)
    plan = bench.planned(sizes, 2, 2.0 * small + large + 1.0, machine)
    assert [least.seconds for least in plan] == [small, large, small]
    assert bench.shared(2.0 * small + large + 3.0, plan) == pytest.approx(small + 1.0)
    assert bench.shared(large, plan[1:]) == large
    first, refused, last = bench.planned(sizes, 2, large + 0.5 * small, machine)
    assert (first.reason, last.reason) == (None, None)
    assert "more than other sizes leave of the budget of " in refused.reason
    assert bench.shared(5.0 + small, [last, refused]) == pytest.approx(5.0 + small)


def test_limits_are_measured_beside_the_budget(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []

    def limits_of(device: str, dry: bool) -> Any:
        time.sleep(1.0)
        return bench.roofline.Machine("", 1e12, 1e12, 1e12, 1e12)

    def compare(subject: Any, names: Any, seconds: float, machine: Any, deadline: float, limits: Any) -> Any:
        left.append(deadline - time.perf_counter())
        return bench.Pair(subject, machine)

    monkeypatch.setattr(bench, "limits_of", limits_of)
    monkeypatch.setattr(bench.timing, "compare", compare)
    assert bench.run("cpu", ["ours"], (16, 24), (8,), seconds=0.9)["not_reached"] == []
    assert len(left) == 2
    assert min(left) > 0.0


def test_what_the_time_is_too_short_for_is_the_least(
    bench: Any, providers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, called = subject(providers), []
    provider = SimpleNamespace(call=lambda: called.append(1), finish=lambda: None)
    found = bench.timing.timed({"ours": provider}, size, 0.0)
    assert (len(found["ours"]), len(called)) == (
        bench.timing.ROUNDS,
        1 + bench.timing.ROUNDS,
    )  # with the trial
    monkeypatch.setattr(bench.timing, "PARTS_FREE", 0.0)
    limits = bench.roofline.Machine("", 1e12, 1e12, 1e12, 1e12)
    pair = bench.timing.compare(size, ["ours"], 0.0, None, 0.0, limits)
    assert pair.times.keys() == {"ours", "products"}
    assert pair.parts == {"parts_missing": "time was up"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch", "128", "0"], "--batch must be at least 1"),
        (["--width", "0"], "--width must be at least 1"),
        (["--updates", "-1"], "--updates must be at least 1"),
        (["--threads", "0"], "--threads must lie in 1..1024"),
        (["--budget", "-5"], "--budget must be a number of seconds, at least 0"),
        (["--budget", "nan"], "--budget must be a number of seconds, at least 0"),
        (
            ["--save", "nowhere/update"],
            f"--save: there is no folder {ROOT / 'bench' / 'results' / 'nowhere'}",
        ),
    ],
)
def test_an_option_that_cannot_be_is_one_line(
    words: list[str], told: str, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--device", "cpu", *words]) == 2
    assert capsys.readouterr().err == f"bench_update: {told}\n"


def test_providers_of_a_device(bench: Any) -> None:
    assert bench.wanted(None, "cpu") == ["ours", "plain"]
    assert bench.wanted(None, "cuda") == ["ours-tf32", "ours-bf16", "plain", "compiled", "jax"]
    assert bench.wanted(["jax", "plain"], "cpu") == ["ours", "plain", "jax"]
    assert bench.wanted(["jax", "ours"], "cuda") == ["ours-tf32", "jax"]


def test_workloads_bring_their_sizes_unless_others_are_asked_for(bench: Any) -> None:
    dogs, hands = bench.named("dogs-multitask"), bench.named("humanoidbench-28")
    assert list(bench.shapes([dogs, hands], [], [])) == [dogs, hands]
    sizes = [(w.name, w.tasks, w.width, w.batch) for w in bench.shapes([dogs], [64, 128], [8, 16])]
    assert sizes == [("dogs-multitask", 4, width, batch) for batch in (8, 16) for width in (64, 128)]
    assert [(w.name, w.width, w.batch) for w in bench.shapes([], [16], [8])] == [("cartpole", 16, 8)]


def test_a_billion_parameters_are_left_out_on_a_cpu_unless_named(bench: Any) -> None:
    workloads, line = bench.asked([], "cpu")
    assert [workload.name for workload in workloads] == ["dmc-single", "mjx-dmc25"]
    assert "\n" not in line
    assert "wide-1b (4" in line  # GB
    assert bench.asked([], "cuda") == ([*bench.WORKLOADS.values()], None)
    assert bench.asked(["wide-1b"], "cpu") == ([bench.named("wide-1b")], None)


def test_an_update_that_a_machine_has_no_memory_for_says_how_much_it_takes(
    bench: Any, providers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "memory", lambda device: 16_000_000_000)
    found = bench.run("cpu", ["ours"], [], [], workloads=[bench.named("wide-1b")], seconds=1.0)
    (told,) = found["measurements"]
    assert (told["case"], told["value"]) == ("wide-1b H 11200 B 1024", None)
    assert "GB of memory, this machine has 16 GB; run it on a larger one" in told["missing"]
    assert found["equality"] == "failed: nothing was compared"


def test_measurements_are_updates_per_second_with_quartiles_and_floor(bench: Any) -> None:
    workload = bench.named("metaworld-50")
    found = run(bench, ["ours", "plain"], workloads=[workload])
    (row,) = found["rows"]
    assert [row[key] for key in ("case", "workload", "tasks")] == [
        "metaworld-50 H 16 B 8",
        "metaworld-50",
        50,
    ]
    assert [one["provider"] for one in found["measurements"]] == ["ours", "plain"]
    for one in found["measurements"]:
        assert (one["case"], one["unit"], one["better"]) == (row["case"], "updates/s", "more")
        assert 0 < one["low"] <= one["value"] <= one["high"]
        assert one["value"] == row["updates_per_second"][one["provider"]]  # of 3 rounds
        assert one["floor"] == 1.0 / row["floor_seconds"][one["provider"]]
        assert one["rounds"] >= 3


def test_a_workload_that_does_not_exist_is_one_line(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--workload", "dogs"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("bench_update: no workload 'dogs'; there are dmc-single, ")
    assert told.count("\n") == 1


def test_kernels_are_counted_between_marks(bench: Any) -> None:
    import update_counts as counting

    mark = f"void at::{counting.MARK}(long)"
    seen = ["warm", mark, "a", "Memcpy DtoD (Device -> Device)", "b", "c", mark, "warm", mark, "a", mark]
    assert counting.between(seen) == [seen[2:6], ["a"]]
    assert counting.between([*seen[1:7], mark, mark]) == [seen[2:6], []]
    assert counting.counts(seen[2:6], updates=2) == {"kernels": 1.5, "copies": 0.5}


def test_the_command_line_stores_rows_with_the_machine(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setattr(bench.timing, "LONGEST", {"cpu": 0.0})
    monkeypatch.setattr(bench, "write", partial(bench.write, folder=tmp_path))
    words = ["--device", "cpu", "--width", "16", "--batch", "8", "16", "--budget", "20", "--save", "update"]
    assert bench.main(words) == 0
    stored = json.loads((tmp_path / "update.json").read_text())
    assert {"cpu", "versions", "commit", "rows", "not_reached"} <= stored.keys()
    assert [row["batch"] for row in stored["rows"]] == [8, 16]
    assert capsys.readouterr().out.splitlines()[0] == f"{bench.HEAD}torch.bmm"
    assert bench.table(stored["rows"]).splitlines()[0].split()[:3] == ["case", "ours", "plain"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "bench_update: torch sees no CUDA device\n"
