"""The benchmark of the update times nothing that is wrong; its floors are counts of what an update does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import require
from torch.utils.flop_counter import FlopCounterMode

from brc_fast import kernels

ROOT = Path(__file__).resolve().parent.parent
SLOW_PEERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("compiled", "jax")]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import bench_update

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the benchmark does: several wait for each other on a busy machine
    yield bench_update
    torch.set_num_threads(threads)


@pytest.fixture
def updates(bench: Any) -> Any:
    return bench.updates


def subject(updates: Any, width: int = 16, batch: int = 8, tasks: int = 1, number: int = 1) -> Any:
    workload = updates.CARTPOLE._replace(width=width, batch=batch, tasks=tasks)
    return updates.Subject(workload, number, backend="aot_eager")


def run(bench: Any, names: Sequence[str], *sizes: Any, seconds: float = 0.0) -> Any:
    found = bench.Results("update")
    bench.run(found, sizes or [subject(bench.updates)], names, seconds, dry=True)
    return found


def entry(found: Any, name: str) -> dict[str, Any]:
    (one,) = [entry for entry in found.entries if entry["provider"] == name]
    return one  # type: ignore[no-any-return]


# ---------------------------------------------------------------- floors


@pytest.mark.parametrize(("width", "batch", "tasks"), [(16, 8, 1), (48, 24, 3), (264, 8, 1)])
def test_the_list_of_products_is_what_an_update_multiplies(
    width: int, batch: int, tasks: int, updates: Any
) -> None:
    def in_place(out: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
        return 2 * math.prod(left) * right[-1]

    size = subject(updates, width, batch, tasks)
    counter = partial(FlopCounterMode, display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place})
    agent, floor = size.agent(), updates.floor(size)
    with kernels.use("reference"), counter() as made:
        agent.update(size.batches())
    with counter() as alone:
        floor()
    listed = sum(one.operations for part in updates.products(size.sizes) for one in part)
    assert listed == made.get_total_flops() == alone.get_total_flops()


def test_parameters_are_those_of_the_agent_with_their_padding(updates: Any) -> None:
    size = subject(updates, 32, tasks=4)  # 38 inputs of a critic are padded to 40, 101 atoms to 104
    critic = sum(p.numel() for p in size.agent().critic.parameters())
    assert size.sizes.parameters == critic + 2 * (2 * 32 + 3 * 32 + 3)


def test_the_slower_of_arithmetic_and_memory_is_the_floor_of_a_product(bench: Any) -> None:
    sizes = subject(bench.updates).sizes
    machine, roofline = bench.roofline.Machine, bench.roofline
    slow = machine("", bf16=1.0, tf32=0.5, bandwidth=math.inf)
    operations = sum(one.operations for part in roofline.products(sizes) for one in part)
    assert roofline.floor(sizes, "bf16", slow) == operations
    assert roofline.floor(sizes, "tf32", slow) == 2 * operations
    moved = sum(one.elements for part in roofline.products(sizes) for one in part)
    memory = machine("", math.inf, math.inf, 2.0)
    others = sum(roofline.passes(sizes, 2).values())
    assert roofline.floor(sizes, "bf16", memory) == moved + others / 2
    parts = roofline.parts(sizes, "bf16", memory)
    assert list(parts) == list(roofline.PARTS)
    assert min(parts.values()) > 0.0


def test_optimizers_read_and_write_all_that_a_step_needs(bench: Any) -> None:
    sizes = subject(bench.updates, 32).sizes
    moved = bench.roofline.passes(sizes, 2)[bench.roofline.OPTIMIZERS]
    # parameter, gradient and moments read, all but the gradient written, with low copies; the target too
    held = 4 * 3 + 2 + 4 * 3 + 2
    assert moved == (held + 4 * 2 + 2) * sizes.parameters + held * sizes.nets[0].parameters


def limits(*entries: tuple[str, float | None]) -> list[dict[str, Any]]:
    return [{"case": case, "value": value, "missing": "out of memory"} for case, value in entries]


def test_floors_use_the_newest_limits_of_this_machine_and_say_which(bench: Any, tmp_path: Path) -> None:
    import bench_limits
    from harness import write

    for folder, value, keys in (
        ("new", 10.0, {"date": "2026-02-02T03:04:05"}),
        ("old", 1.0, {"date": "2026-01-02T03:04:05"}),
        ("other", 9.0, {"date": "2026-03-02T03:04:05", "cpu": "another"}),
    ):
        found = bench.Results("limits", quiet=True)
        for case in ("copy", "product float32 256", "product float32 512"):
            found.add(case, "machine", "GB/s", [value * (1 + case.endswith("512"))] * 3)
        write(tmp_path / folder / "limits-cpu.json", {**found.found, "measurements": found.entries, **keys})
    folders = [tmp_path / name for name in ("new", "old", "other", "none")]
    machine = bench_limits.machine("cpu", folders=folders)
    assert (machine.bandwidth, machine.fp32, machine.tf32, machine.bf16) == (10e9, 20e9, 20e9, 20e9)
    assert machine.source == "limits-cpu.json of 2026-02-02T03:04"
    now = bench_limits.machine("cpu", dry=True, folders=folders)
    assert now.source == "measured in this run"
    assert min(now.bandwidth, now.fp32) > 0
    with pytest.raises(RuntimeError, match="no floor without the limit copy: out of memory"):
        bench_limits.made("cpu", limits(("copy", None), ("product float32 8", 1.0)), "")


# ---------------------------------------------------------------- equality


def test_every_provider_has_a_rate_a_ratio_to_ours_and_its_time_over_the_floor(bench: Any) -> None:
    found = run(bench, ["ours", "critic", "plain"], subject(bench.updates, number=2))
    assert found.equality == "passed"
    assert [one["provider"] for one in found.entries] == ["ours", "critic", "plain"]
    for one in found.entries:
        assert 0 < one["low"] <= one["value"] <= one["high"]
        assert one["over_floor"] == pytest.approx(one["floor"] / one["value"], rel=0.5)
        assert one["at"] == {"workload": "cartpole", "width": 16, "batch": 8}
        assert ("ratio" in one) == (one["provider"] != "ours")
    assert found.found["floor"] == "torch.bmm"


PLANTED = {  # ops of an update, and what a wrong one makes of its result
    "categorical_bellman_loss_and_gradient": lambda out: (out[0] * 1.01, out[1]),
    "expected_value_and_gradient": lambda out: (out[0], out[1].roll(1, -2)),  # rows get those of others
    "tanh_gaussian": lambda out: (out[0], out[1] - 0.1),
    "normalized_embedding_backward": lambda out: out.zero_(),
}


@pytest.mark.parametrize("op", PLANTED)
def test_an_error_in_an_op_takes_our_time_away_and_tells_why(
    op: str, bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, size = getattr(kernels, op), subject(bench.updates, tasks=3)
    assert run(bench, ["ours"], size).equality == "passed"
    monkeypatch.setattr(kernels, op, lambda *inputs, **options: PLANTED[op](right(*inputs, **options)))
    found = run(bench, ["ours", "plain"], size)
    ours = entry(found, "ours")
    assert ours["value"] is None
    assert ours["missing"].startswith("differs from plain PyTorch: ")
    assert entry(found, "plain")["value"] > 0
    assert found.equality == f"failed: ours at {size.case} {ours['missing']}"
    assert ours["missing"] in capsys.readouterr().out


@pytest.mark.parametrize("tasks", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
@pytest.mark.parametrize("name", ["critic", "plain", *SLOW_PEERS])
def test_a_peer_has_a_time_until_it_is_broken(
    name: str, tasks: int, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "jax":
        require("jax", "optax")
        from peers.jax_plain import JaxBRC as Peer
    else:
        from peers.torch_plain import PlainBRC as Peer
    size = subject(bench.updates, 32, 64, tasks)
    assert entry(run(bench, [name], size), name)["value"] > 0
    known, start = bench.updates.expected(size), Peer.__init__

    def broken(self: Any, agent: Any, *rest: Any, **options: Any) -> None:
        start(self, agent, *rest, **options)
        rule = "learning" if hasattr(self, "learning") else "rule"
        setattr(self, rule, replace(getattr(self, rule), discount=0.9))

    monkeypatch.setattr(Peer, "__init__", broken)
    monkeypatch.setattr(bench.updates, "expected", lambda subject: known)
    found = run(bench, ["ours", name], size)
    assert entry(found, name)["missing"].startswith("differs from plain PyTorch: ")
    assert entry(found, "ours")["value"] > 0
    assert found.end() == 1


@pytest.mark.parametrize(
    "name",
    ["critic/embedding", "target_critic/body.head.kernel", "actor/body.head.bias", "temperature/log_alpha"],
)
def test_a_parameter_that_stays_as_it_was_is_noticed(name: str, updates: Any) -> None:
    size = subject(updates, 32, 64, tasks=3)
    known, plain = updates.expected(size), updates.plain(size)
    before = plain.parameters()[name].clone()
    stuck = plain._replace(parameters=lambda: plain.parameters() | {name: before})
    differs = updates.difference(stuck, size, known)
    assert differs is not None
    assert differs.endswith(f"elements of {name}")


def test_providers_have_the_same_parameters_by_name(updates: Any) -> None:
    size = subject(updates, tasks=3)
    ours, plain = (updates.BUILDERS[name](size).parameters() for name in ("ours", "plain"))
    assert ours.keys() == plain.keys()
    assert {"critic/embedding", "target_critic/embedding", "temperature/log_alpha"} <= ours.keys()
    assert all(torch.equal(value, plain[name]) for name, value in ours.items())


# ---------------------------------------------------------------- fair opponents


def peers(updates: Any) -> Iterator[Any]:
    from peers.torch_plain import CompiledBRC, PlainBRC
    from peers.torch_swapped import SwappedBRC

    size = subject(updates, tasks=3)
    yield from ((size, PlainBRC(size.agent())), (size, SwappedBRC(size.agent())))
    yield size, CompiledBRC(size.agent(), "aot_eager")


def test_peers_in_pytorch_have_fused_optimizers_of_all_that_they_train(updates: Any) -> None:
    for _, peer in peers(updates):
        optimizers = peer.critic_optimizer, peer.actor_optimizer, peer.temperature_optimizer
        assert all(one.defaults["fused"] for one in optimizers)
        trained = {id(p) for p in (*peer.critics.parameters(), *peer.actor.parameters(), peer.log_alpha)}
        groups = [group for one in optimizers for group in one.param_groups]
        assert {id(parameter) for group in groups for parameter in group["params"]} == trained


def test_peers_in_pytorch_move_all_targets_in_one_call(updates: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lerp, moved = torch._foreach_lerp_, list[Any]()
    monkeypatch.setattr(
        torch, "_foreach_lerp_", lambda slow, *rest: (moved.append([*map(id, slow)]), lerp(slow, *rest))
    )
    for size, peer in peers(updates):
        peer.updates(size.batches(), size.noise(0))
        assert moved.pop() == [*map(id, peer.targets.parameters())]
        assert moved == []


def test_peers_in_pytorch_compute_no_gradient_of_the_critic_for_the_actor(updates: Any) -> None:
    for size, peer in peers(updates):
        batch, noise = size.batches().update(0), updates.Noise(*(part[0] for part in size.noise(0)))
        parameters = list(peer.critics.parameters())
        alone = torch.autograd.grad(peer.critic_loss(batch, noise.next_action), parameters)
        peer.update(batch, noise)
        for parameter, grad in zip(parameters, alone, strict=True):
            torch.testing.assert_close(parameter.grad, grad)  # else the actor's loss added to it


def test_jax_has_its_copy_before_torch_may_write_to_the_memory_again(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("jax", "optax")
    from peers import jax_plain

    waited, wait = list[object](), jax_plain.jax.block_until_ready
    monkeypatch.setattr(jax_plain.jax, "block_until_ready", lambda x: waited.append(x) or wait(x))
    copy = jax_plain.from_torch(torch.ones(3, 2).T)
    assert [id(x) for x in waited] == [id(copy)]


# ---------------------------------------------------------------- time, memory, parts, kernels


def test_the_budget_is_kept_and_what_it_does_not_reach_says_so(bench: Any) -> None:
    sizes = [subject(bench.updates, width) for width in (8, 16, 24)]
    start = time.perf_counter()
    found = run(bench, ["ours"], *sizes, seconds=3.0)
    assert 2.0 < time.perf_counter() - start < 10.0
    assert found.entries[0]["value"] > 0  # a busy machine may not reach the others
    found = run(bench, ["ours"], *sizes)
    assert [one["value"] is None for one in found.entries] == [False, True, True]
    assert found.entries[1]["missing"] == "time was up; raise --budget"


def test_what_takes_longer_than_the_budget_is_left_out_before_it_is_timed(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bench.updates.expected
    monkeypatch.setattr(bench.updates, "expected", lambda size: (time.sleep(0.5), expected(size))[1])
    found, machine = bench.Results("update"), bench.roofline.Machine("", 1e9, 1e9, 1e9, 1e9)
    bench.compare(found, subject(bench.updates), ["ours"], bench.Clock(1.0), machine)
    (one,) = found.entries
    assert one["missing"].endswith("more than is left; raise --budget")


def test_a_provider_that_compiles_for_longer_than_there_is_time_is_left_out_and_says_so(bench: Any) -> None:
    found = run(bench, ["ours", "compiled"], subject(bench.updates)._replace(backend="inductor"))
    assert entry(found, "ours")["value"] > 0
    assert entry(found, "compiled")["missing"].startswith("compiling takes about 30 s")


def test_a_provider_without_room_beside_others_is_timed_alone_or_says_so(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, plain = list[object](), bench.BUILDERS["plain"]

    def full(size: Any, times: int) -> Any:
        built.append(size)
        if len(built) <= times:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return plain(size)

    monkeypatch.setitem(bench.BUILDERS, "plain", partial(full, times=1))
    assert entry(run(bench, ["ours", "plain"]), "plain")["value"] > 0
    built.clear()
    monkeypatch.setitem(bench.BUILDERS, "plain", partial(full, times=9))
    assert entry(run(bench, ["ours", "plain"]), "plain")["missing"] == "out of memory"


def test_an_update_that_a_machine_has_no_memory_for_says_how_much_it_takes(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.updates, "memory", lambda device: 16_000_000_000)
    wide = bench.WORKLOADS["wide-1b"]
    (one,) = run(bench, ["ours"], bench.Subject(wide)).entries
    assert "GB of memory, this machine has 16 GB; run it on a larger one" in one["missing"]
    assert wide not in bench.asked([], "cpu")
    assert "wide-1b (" in capsys.readouterr().out.splitlines()[-1]
    assert wide in bench.asked([], "cuda")
    assert bench.asked([wide], "cpu") == [wide]


def test_parts_of_an_update_stand_beside_their_floors_and_change_nothing(bench: Any) -> None:
    size = subject(bench.updates, 32, 64, tasks=3)
    right = {name: getattr(kernels, name) for name in bench.parts.OPS} | {"bmm": torch.bmm}
    provider, plain = bench.BUILDERS["ours"](size), bench.BUILDERS["ours"](size)
    with bench.parts.clocks() as running:
        timed = provider.losses(size.batches(), size.noise(1))
    told = plain.losses(size.batches(), size.noise(1))
    assert {name: float(x) for name, x in timed.items()} == {name: float(x) for name, x in told.items()}
    assert min(running.seconds.values()) > 0.0, running.seconds  # every part is met in an update
    assert {name: getattr(kernels, name) for name in bench.parts.OPS} | {"bmm": torch.bmm} == right
    rows = run(bench, ["ours"], size).found["parts"]
    assert [row["part"] for row in rows] == [*bench.roofline.PARTS, "rest"]
    assert all(0.0 < row["low"] <= row["seconds"] <= row["high"] for row in rows)
    assert [row["floor"] is None for row in rows] == [False] * 6 + [True]


def test_a_part_that_takes_longer_is_the_one_that_is_longer(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, step = bench.BUILDERS["ours"](subject(bench.updates)), kernels.adamw_
    provider.call()
    monkeypatch.setattr(
        kernels, "adamw_", lambda *inputs, **named: (time.sleep(0.08), step(*inputs, **named))[1]
    )
    with bench.parts.clocks() as running:
        provider.call()
    others = sum(seconds for part, seconds in running.seconds.items() if part != "optimizers")
    assert running.seconds["optimizers"] > 0.15 > others  # two steps an update


def test_kernels_are_counted_between_marks(bench: Any) -> None:
    mark = f"void at::{bench.MARK}(long)"
    seen = ["warm", mark, "a", "Memcpy DtoD (Device -> Device)", "b", "c", mark, "warm", mark, "a", mark]
    assert bench.between(seen) == [seen[2:6], ["a"]]
    assert bench.between([*seen[1:7], mark, mark]) == [seen[2:6], []]
    assert bench.counts(seen[2:6], 2) == {"kernels": 1.5, "copies": 0.5}


def test_the_command_line_stores_every_size_with_the_machine(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness import read

    monkeypatch.setattr(bench, "one_core", lambda threads: None)
    words = ["--device", "cpu", "--width", "16", "--batch", "8", "16", "--budget", "3"]
    assert bench.main([*words, "--save", str(tmp_path / "update")]) == 0
    stored = read(tmp_path / "update.json")
    assert [one["at"]["batch"] for one in stored["measurements"]] == [8, 8, 16, 16]
    assert {one["provider"] for one in stored["measurements"]} == {"ours", "plain"}
    assert stored["limits"]["bandwidth"] > 0
