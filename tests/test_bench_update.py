"""The benchmark of the update times nothing that is wrong; its floors are counts of what an update does."""

from __future__ import annotations

import gc
import json
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from brc_fast import kernels

ROOT = Path(__file__).resolve().parent.parent
HERE = ("ours", "ours-bf16", "plain", "compiled")  # what any CPU with PyTorch can run


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


def subject(providers: Any, width: int = 16, batch: int = 8, updates: int = 1) -> Any:
    return providers.Subject(width, batch, updates, "cpu", "aot_eager")


def run(bench: Any, names: Sequence[str], widths: Sequence[int] = (16,), **options: Any) -> dict[str, Any]:
    return bench.run("cpu", names, widths, (8,), dry=True, **({"seconds": 60.0} | options))  # type: ignore[no-any-return]


def times_as_much(bench: Any, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let the plain update start with another temperature."""

    class Other(bench.BUILDERS["plain"]):  # type: ignore[misc]
        def __init__(self, subject: Any) -> None:
            super().__init__(subject)
            self.peer.log_alpha.data += math.log(factor)

    monkeypatch.setitem(bench.BUILDERS, "plain", Other)


# ---------------------------------------------------------------- floors


@pytest.fixture
def small(roofline: Any) -> Any:
    """One member without blocks: 9 inputs are padded to 16 and 2 outputs of the actor to 8."""
    return roofline.Sizes(4, 16, 8, 8, 1, depth=0, actor_depth=0, members=1, atoms=8)


def test_operations_of_a_small_update_counted_by_hand(roofline: Any, small: Any) -> None:
    actor = 2 * 4 * 8 * 8 + 2 * 4 * 8 * 8  # first layer, head
    critics = 2 * (2 * 4 * 16 * 16) + 2 * (2 * 4 * 16 * 8)  # online and target
    weights = 2 * 16 * 4 * 8 + 2 * 4 * 8 * 16 + 2 * 16 * 4 * 16  # of the head, to its input, of the first
    critic = 2 * 4 * 16 * 16 + 2 * 4 * 16 * 8
    frozen = 2 * 4 * 8 * 16 + 2 * 4 * 16 * 16  # to the head's input, to the critic's
    policy = 2 * 8 * 4 * 8 + 2 * 4 * 8 * 8 + 2 * 8 * 4 * 8
    counted = actor + critics + weights + actor + critic + frozen + policy
    assert sum(product.operations for product in roofline.products(small)) == counted
    slow = roofline.Machine("", bf16=1.0, tf32=0.5, bandwidth=math.inf)
    assert roofline.floor(small, "bf16", slow) == counted
    assert roofline.floor(small, "tf32", slow) == 2 * counted


def test_bytes_of_a_small_update_counted_by_hand(roofline: Any, small: Any) -> None:
    assert roofline.parameters(small) == (8 * 8 + 8 * 8 + 3 * 8 + 8, 16 * 16 + 16 * 8 + 3 * 16 + 8)
    first, *_ = roofline.products(small)
    assert first.elements == 4 * 8 + 8 * 8 + 4 * 8
    found: dict[str, int] = {}
    for work in roofline.passes(small, 2):
        found[work.name] = found.get(work.name, 0) + work.bytes
    hidden = 4 * 16 * 2
    assert found == {
        "noise": 2 * 4 * 4,
        "pack actor next": 4 * (8 * 4 + 8 * 2),
        "pack actor": 4 * (8 * 4 + 8 * 2),
        "actor norm": 2 * (2 * 4 * 8 * 2 + 2 * 4 * 4 + 3 * 8 * 4),
        "sample": 2 * 4 * (2 * 2 + 4 + 4 + 4),
        "pack critic": 4 * (9 * 4 + 16 * 2),
        "pack critic next": 4 * (9 * 4 + 16 * 2),
        "pack critic policy": 4 * (9 * 4 + 16 * 2),
        "critic norm": 3 * (2 * hidden + 2 * 4 * 4 + 3 * 16 * 4),
        "Bellman loss and gradient": 3 * 4 * 8 * 2 + 4 * (3 + 1) * 4,
        "critic head bias": 5 * 8 * 2,
        "critic norm backward": 2 * (3 * hidden + 2 * 4 * 4 + 3 * 16 * 4) + 3 * 16 * 2,
        "critic AdamW, target and copies": 38 * 440,
        "expected value and gradient": 2 * 4 * 8 * 2 + 4 * 4,
        "sum of dx": 2 * 4 * 16 * 2,
        "sample backward": 4 * (3 * 2 + 4 + 2 * 2),
        "actor head bias": 5 * 8 * 2,
        "actor norm backward": 3 * 4 * 8 * 2 + 2 * 4 * 4 + 3 * 8 * 4 + 3 * 8 * 2,
        "actor AdamW and copies": 28 * 160,
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


def test_a_machine_that_is_not_known_is_measured(roofline: Any) -> None:
    found = roofline.machine("cpu", size=64, repeats=2)
    assert (found.name, found.tf32) == ("cpu", found.bf16 / 2)
    assert found.bf16 > 0 < found.bandwidth


@pytest.mark.parametrize(("width", "batch"), [(16, 8), (48, 24), (264, 8)])
def test_the_list_of_products_is_what_an_update_multiplies(
    width: int, batch: int, providers: Any, roofline: Any
) -> None:
    def in_place(out: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
        return 2 * math.prod(left) * right[-1]

    size = subject(providers, width, batch)
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


# ---------------------------------------------------------------- providers


@pytest.mark.slow
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

    monkeypatch.setitem(bench.BUILDERS, "plain", full)
    (row,) = run(bench, ["ours", "plain", "ours-bf16"])["rows"]
    assert row["missing"] == {"plain": "out of memory"}
    assert row["updates_per_second"].keys() == {"ours", "ours-bf16"}
    line = next(line for line in capsys.readouterr().out.splitlines() if "plain" in line)
    assert line.split() == ["plain", "-", "out", "of", "memory"]


def test_a_provider_without_room_beside_others_is_timed_alone(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    plain = bench.BUILDERS["plain"]

    def once(subject: Any) -> Any:
        built.append(subject)
        if len(built) == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return plain(subject)

    monkeypatch.setitem(bench.BUILDERS, "plain", once)
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
        build = bench.BUILDERS[name]

        def builder(subject: Any) -> Any:
            assert [ref() for ref in held] == [None] * len(held)
            provider = build(subject)
            held.extend(weakref.ref(value) for value in (provider, *provider.parameters()))
            return provider

        return builder

    for name in HERE:
        monkeypatch.setitem(bench.BUILDERS, name, watched(name))
    monkeypatch.setattr(bench, "fits", lambda subject, names: False)
    pair = bench.compare(subject(providers), HERE, 0.0)
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
    assert row["missing"]["plain"].startswith("differs from ours: ")
    assert bench.wrong(found["rows"]) == [f"plain at H 16 B 8 {row['missing']['plain']}"]


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
    assert differs.startswith("differs from ours")


def test_time_that_is_up_leaves_out_sizes_and_says_which(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(bench, ["ours", "plain"], (16, 24), seconds=0.0)
    assert [row["width"] for row in found["rows"]] == [16]
    assert found["rows"][0]["missing"] == {"plain": "time was up"}
    assert found["not_reached"] == [[24, 8]]
    assert "not reached, time was up: H 24 B 8" in capsys.readouterr().out


def test_providers_of_a_device(bench: Any) -> None:
    assert bench.wanted(None, "cpu") == ["ours", "plain"]
    assert bench.wanted(None, "cuda") == ["ours-tf32", "ours-bf16", "plain", "compiled", "jax"]
    assert bench.wanted(["jax", "plain"], "cpu") == ["ours", "plain", "jax"]
    assert bench.wanted(["jax", "ours"], "cuda") == ["ours-tf32", "jax"]


def test_kernels_are_counted_between_marks(bench: Any) -> None:
    mark = f"void at::{bench.MARK}(long)"
    seen = ["warm", mark, "a", "Memcpy DtoD (Device -> Device)", "b", "c", mark, "warm", mark, "a", mark]
    assert bench.between(seen) == [seen[2:6], ["a"]]
    assert bench.between([*seen[1:7], mark, mark]) == [seen[2:6], []]
    assert bench.counts(seen[2:6], updates=2) == {"kernels": 1.5, "copies": 0.5}


def test_the_command_line_stores_rows_with_the_machine(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setattr(bench, "LONGEST", {"cpu": 0.0})
    monkeypatch.setattr(bench, "write", partial(bench.write, folder=tmp_path))
    words = ["--device", "cpu", "--width", "16", "--batch", "8", "16", "--budget", "20", "--save", "update"]
    assert bench.main(words) == 0
    stored = json.loads((tmp_path / "update.json").read_text())
    assert {"cpu", "versions", "commit", "rows", "not_reached"} <= stored.keys()
    assert [row["batch"] for row in stored["rows"]] == [8, 16]
    assert capsys.readouterr().out.splitlines()[0] == bench.HEAD
    assert bench.table(stored["rows"]).splitlines()[0].split()[:4] == ["H", "B", "ours", "plain"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "bench_update: torch sees no CUDA device\n"
