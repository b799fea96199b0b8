"""Ours on every workload, through pytest-benchmark, each checked before it is timed.

    pytest bench/ [--benchmark-json FILE] [--benchmark-compare] [-k "update and dmc-single"]

For the comparison with others, interleaved with them, there are bench_update.py and bench_replay.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark", reason='needs pytest-benchmark: pip install "brc-fast[bench]"')

import torch
from bench_replay import check_insert, inserting
from bench_update import HEAVY
from workloads import WORKLOADS, Workload

from peers.replay_data import Workload as Stored
from peers.replay_peers import Ours, filled
from peers.updates import Subject, checked, expected, tensor_cores

CUDA = torch.cuda.is_available()
DEVICE, PROVIDER, UPDATES = ("cuda", "ours-bf16", 2) if CUDA else ("cpu", "ours", 1)
ROWS, STREAMS = 65_536, 16  # transitions of all tasks; environments of each
CALLS = 100  # of the replay in one round

each_workload = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the other benchmarks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@each_workload
def test_update(workload: Workload, benchmark: Any) -> None:
    subject = Subject(workload, UPDATES, DEVICE)
    size, room = subject.bytes(2), torch.cuda.mem_get_info()[0] if CUDA else 2 * HEAVY
    if size > room:
        pytest.skip(f"takes {size / 1e9:.0f} GB, more than the {room / 1e9:.0f} GB for it here")
    with tensor_cores(DEVICE):
        provider = checked(PROVIDER, subject, expected(subject))

        def call() -> None:
            provider.call()
            provider.finish()

        benchmark.extra_info["updates"] = UPDATES
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@each_workload
def test_sample(workload: Workload, benchmark: Any) -> None:
    missing: dict[str, BaseException] = {}
    peers = filled((Ours,), stored(workload), missing)
    assert not missing
    peer = peers[Ours.name]
    peer.workload.check(peer.columns(peer.sample(2, workload.batch)))
    benchmark.extra_info["transitions"] = 2 * workload.batch
    benchmark.pedantic(peer.sample, (2, workload.batch), rounds=20, iterations=CALLS, warmup_rounds=1)


@each_workload
def test_insert(workload: Workload, benchmark: Any) -> None:
    shape = stored(workload, cycle=64)
    check_insert(Ours, shape)
    benchmark.extra_info["transitions"] = shape.lanes
    benchmark.pedantic(inserting(Ours(shape)), rounds=20, iterations=CALLS, warmup_rounds=1)


def stored(workload: Workload, cycle: int = 0) -> Stored:
    """What a buffer of this workload holds."""
    steps = ROWS // (workload.tasks * STREAMS)
    return Stored(workload.observation, workload.action, workload.tasks, STREAMS, steps, cycle)
