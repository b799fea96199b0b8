"""Ours on every workload, through pytest-benchmark, each checked before it is timed.

    pytest bench/ [--benchmark-json FILE] [--benchmark-compare] [-k "update and dmc-single"]

For the comparison with others, interleaved with them, there are bench_update.py and bench_replay.py.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("pytest_benchmark", reason='needs pytest-benchmark: pip install "brc-fast[bench]"')

import torch
from bench_replay import OURS, check_insert, held, inserting
from bench_update import HEAVY
from workloads import WORKLOADS, Workload

from peers.replay import filled, ours
from peers.updates import Subject, checked, expected

CUDA = torch.cuda.is_available()
DEVICE, PROVIDER, UPDATES = ("cuda", "ours-bf16", 2) if CUDA else ("cpu", "ours", 1)
CAPACITY = 65_536  # transitions with narrow observations
CALLS = {"rounds": 20, "iterations": 100, "warmup_rounds": 1}

pytestmark = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As the other benchmarks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_update(workload: Workload, benchmark: Any) -> None:
    subject = Subject(workload, UPDATES, DEVICE)
    size, room = subject.bytes(2), torch.cuda.mem_get_info()[0] if CUDA else 2 * HEAVY
    if size > room:
        pytest.skip(f"takes {size / 1e9:.0f} GB, more than the {room / 1e9:.0f} GB for it here")
    provider = checked(PROVIDER, subject, expected(subject))
    benchmark.extra_info["updates"] = UPDATES
    benchmark.pedantic(lambda: (provider.call(), provider.finish()), rounds=5, warmup_rounds=1)


def test_sample(workload: Workload, benchmark: Any) -> None:
    peer = filled(OURS, held(workload, CAPACITY))
    peer.check(2, workload.batch)
    benchmark.extra_info["transitions"] = 2 * workload.batch
    benchmark.pedantic(peer.sample, (2, workload.batch), **CALLS)


def test_insert(workload: Workload, benchmark: Any) -> None:
    work = held(workload, CAPACITY)
    check_insert(OURS, work)
    benchmark.extra_info["transitions"] = work.lanes
    benchmark.pedantic(inserting(ours(work)), **CALLS)
