"""The update as a CUDA graph holds it: no host in it, and replays that go on where plain calls would."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tape import Tape
from torch import Tensor

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, graphs, kernels
from brc_fast.agent import METRICS
from brc_fast.graphs import Captured

SIZES = {"critic": CriticConfig(width=24, num_atoms=21, embedding_size=4), "actor": ActorConfig(width=16)}


def agent(tasks: int, device: str = "cpu", **options: object) -> BRC:
    return BRC(5, 2, tasks, **SIZES, device=device, **options)  # type: ignore[arg-type]


def batches(updates: int, tasks: int, device: str = "cpu", rows: int = 12) -> Iterator[Batch]:
    rng = torch.Generator().manual_seed(0)
    while True:
        sizes = (5, 2, 5)
        observations, actions, successors = (torch.randn(updates, rows, n, generator=rng) for n in sizes)
        rewards, masks = torch.rand(2, updates, rows, generator=rng)
        ids = torch.randint(tasks, (updates, rows), generator=rng)
        yield Batch(observations, actions.tanh(), rewards, (masks > 0.1).float(), successors, ids).to(device)


class Taped:
    """`Captured` with tapes in the place of graphs: a plain call, a recording, then replays."""

    def __init__(self, captured: Captured) -> None:
        self.function, self.slots, self.tape = captured.function, [], Tape()
        self.out = torch.empty(0)

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        if not self.slots:
            self.slots = [x.clone() for x in inputs]
            return self.function(*self.slots)
        for slot, x in zip(self.slots, inputs, strict=True):
            slot.copy_(x)
        if self.tape.steps:
            self.tape.replay()
        else:
            with self.tape:
                self.out = self.function(*self.slots)
        return self.out.clone()


def state(of: BRC) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in of.state_dict().items() if name != "generator"}


IMPLEMENTATIONS = [
    pytest.param("reference", id="twins"),
    pytest.param("triton", id="kernels", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("tasks", [1, 3])
def test_replays_of_two_updates_are_single_updates(tasks: int) -> None:
    """Twenty calls of two updates, most of them replays, against forty plain ones, bit for bit."""
    single, replayed = agent(tasks), agent(tasks)
    taped = replayed.updates = Taped(replayed.updates)  # type: ignore[assignment]
    scale = torch.linspace(0.5, 2.0, tasks)
    with kernels.use("reference"):
        for batch, _ in zip(batches(2, tasks), range(20), strict=False):
            for update in range(2):
                one = batch.map(lambda x, u=update: x[u : u + 1])  # type: ignore[misc]
                expected = single.update(one, reward_scale=scale)
            metrics = replayed.update(batch, reward_scale=scale)
            for name in METRICS:
                assert torch.equal(metrics[name], expected[name]), name
    assert len(taped.tape.steps) > 50
    for name, value in state(single).items():
        assert torch.equal(value, state(replayed)[name]), name


@pytest.mark.gpu
def test_kernels_replay_as_they_run(kernel_device: str) -> None:
    """Every launch of an update is on the tape, with nothing but what the device holds."""
    plain, replayed = (agent(2, kernel_device, graphs=False) for _ in range(2))
    replayed.updates = Taped(replayed.updates)  # type: ignore[assignment]
    with kernels.use("triton"):
        for batch, _ in zip(batches(2, 2, kernel_device), range(4), strict=False):
            plain.update(batch)
            replayed.update(batch)
    for name, value in state(plain).items():
        torch.testing.assert_close(value, state(replayed)[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tasks", [1, 2])
def test_an_update_is_the_same_operations_every_time(
    request: pytest.FixtureRequest, implementation: str, tasks: int
) -> None:
    """No number of the host may change from call to call, nor the place of any memory from outside."""
    device = request.getfixturevalue("kernel_device") if implementation == "triton" else "cpu"
    learner, data = agent(tasks, device), batches(2, tasks, device)
    slots = [*next(data), torch.ones(tasks, device=device)]
    seen = []
    with kernels.use(implementation), torch.no_grad():
        learner.updates.function(*slots)
        for _ in range(2):
            for slot, x in zip(slots, next(data), strict=False):
                slot.copy_(x)
            with Tape() as tape:
                learner.updates.function(*slots)
            seen.append(tape.seen)
    assert len(seen[0]) == len(seen[1])
    for first, second in zip(*seen, strict=True):
        assert first == second


@pytest.mark.gpu
@pytest.mark.parametrize(("tasks", "most"), [(1, 79), (3, 89)])
def test_an_update_is_so_many_launches(kernel_device: str, tasks: int, most: int) -> None:
    """With the published depths; cuBLAS may take more than one for a product. The launch that ends an
    optimizer's step is left out, since it is there where more than one program is."""
    learner, counts = agent(tasks, kernel_device, precision="bf16"), []
    for updates in (1, 2):
        slots = [*next(batches(updates, tasks, kernel_device)), torch.ones(tasks, device=kernel_device)]
        with kernels.use("triton"), torch.no_grad():
            learner.updates.function(*slots)
            with Tape() as tape:
                learner.updates.function(*slots)
        counts.append(sum(name != "_finish_kernel" for name in tape.launches))
    assert counts[1] - counts[0] == most


@pytest.mark.parametrize(
    "breach",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.to("meta"),
        lambda x: x + torch.tensor(1.0),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: f"{x}",
        lambda x: x.unique_consecutive(),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(x.long()),
    ],
    ids=[
        *("item", "bool", "mask", "copy", "number", "cpu", "to_cpu", "numpy", "tolist", "text"),
        *("runs", "counts", "repeats"),
    ],
)
def test_the_tape_refuses_what_a_graph_cannot_hold(breach: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError), Tape():
        breach(torch.ones(3))


def test_not_even_the_checks_of_update_read_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch on the device: on the host the task ids are looked at, and a batch is copied from there."""
    learner, data = agent(3), batches(2, 3)
    learner.update(next(data))
    learner.updates = lambda inputs: learner._updates(*inputs)  # type: ignore[assignment]
    batch = next(data)
    monkeypatch.setattr(Tensor, "is_cpu", False)
    with kernels.use("reference"), Tape():
        learner.update(batch)


def test_the_tape_tells_a_number_that_changes() -> None:
    seen = []
    x = torch.ones(3)
    for rate in (0.1, 0.2):
        with Tape() as tape:
            x.mul_(rate)
        seen.append(tape.seen)
    assert seen[0] != seen[1]


def test_without_cuda_the_function_runs_as_it_is_and_says_why() -> None:
    learner = agent(1)
    assert learner.updates.reason == "the learner is on cpu"
    assert Captured(lambda x: x, "cpu", enabled=False).reason == "switched off"
    learner.update(next(batches(1, 1)))
    assert learner.updates.seconds() > 0.0
    assert learner.updates.seconds() == 0.0
    assert learner.updates.captures == 0


class FakeGPU:
    """Enough of torch.cuda to capture: streams note whom they wait for, and a pool is refused as torch does
    it, where the last graph in it is gone and something else is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools: list[weakref.WeakSet[Any]] = []
        self.current = self.stream()
        gpu = self

        class Graph:
            def replay(self) -> None:
                pass

        class Slots(graphs._Slots):
            def __init__(self, inputs: list[Tensor], device: torch.device) -> None:
                super().__init__(inputs, torch.device("cpu"))

        def pool() -> int:
            gpu.pools.append(weakref.WeakSet())
            return len(gpu.pools) - 1

        used = set()

        @contextmanager
        def graph(into: Graph, pool: int, stream: object, capture_error_mode: str) -> Iterator[None]:
            if pool in used and not gpu.pools[pool]:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            yield
            used.add(pool)
            gpu.pools[pool].add(into)

        @contextmanager
        def on(stream: Any) -> Iterator[None]:
            before, gpu.current = gpu.current, stream
            yield
            gpu.current = before

        fakes = {
            "CUDAGraph": Graph,
            "Stream": self.stream,
            "current_device": lambda: 0,
            "current_stream": lambda device: gpu.current,
            "default_generators": [torch.Generator()],
            "graph": graph,
            "graph_pool_handle": pool,
            "stream": on,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        monkeypatch.setattr(graphs, "event", lambda timed=False: event)
        monkeypatch.setattr(graphs, "_Slots", Slots)
        monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: None)

    def stream(self, device: object = None) -> SimpleNamespace:
        seen: list[object] = []
        return SimpleNamespace(
            waited=seen, wait_stream=seen.append, wait_event=lambda event: None, synchronize=lambda: None
        )


def test_other_shapes_are_captured_into_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the function keeps of a capture, as plans keep their inputs, outlives the graphs before."""
    gpu = FakeGPU(monkeypatch)
    captured = Captured(lambda x: x + 1.0, "cuda")
    for _ in range(3):
        captured([torch.zeros(2)])
    with pytest.warns(UserWarning, match="captured anew"):
        captured([torch.zeros(3)])
    for _ in range(2):
        captured([torch.zeros(3)])
    assert captured.reason is None
    assert captured.captures == 4
    assert [len(alive) for alive in gpu.pools] == [0, 2]


def test_what_happens_between_calls_waits_for_what_was_queued_before(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    captured = Captured(lambda x: x, "cuda")
    mine = gpu.current
    with captured.queue():
        assert gpu.current is captured.stream
    assert captured.stream.waited == [mine]  # type: ignore[union-attr]
    assert gpu.current is mine


def on_cuda() -> AbstractContextManager[object]:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return nullcontext()


@pytest.mark.gpu
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_cuda_graph_gives_the_updates_of_plain_calls(tasks: int) -> None:
    with on_cuda():
        plain, graph = agent(tasks, "cuda", graphs=False), agent(tasks, "cuda")
    for place in ("cuda", "cpu"):
        for batch, _ in zip(batches(2, tasks, place), range(6), strict=False):
            mine, expected = graph.update(batch), plain.update(batch)
            for name in METRICS:
                torch.testing.assert_close(mine[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert graph.updates.reason is None
    assert graph.updates.captures == 2
    for name, value in state(plain).items():
        torch.testing.assert_close(value, state(graph)[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
def test_another_batch_size_is_captured_anew_and_says_so() -> None:
    with on_cuda():
        learner = agent(1, "cuda")
    for _ in range(3):
        learner.update(next(batches(1, 1, "cuda")))
    with pytest.warns(UserWarning, match=r"captured anew: input 0: \[1, 12, 5\].* became \[1, 20, 5\]"):
        learner.update(next(batches(1, 1, "cuda", rows=20)))
    for _ in range(2):
        learner.update(next(batches(1, 1, "cuda", rows=20)))
    assert learner.updates.captures == 4


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_all_the_same_and_says_why() -> None:
    with on_cuda():
        captured = Captured(lambda x: x * x.sum().item(), "cuda")
    x = torch.ones(3, device="cuda")
    captured([x])
    with pytest.warns(UserWarning, match="updates run without a CUDA graph: capturing failed"):
        out = captured([x])
    assert torch.equal(out, 3 * x)
    assert captured.reason is not None
    assert torch.equal(captured([2 * x]), 12 * x)


@pytest.mark.gpu
def test_a_capture_that_failed_leaves_neither_memory_nor_noise_in_it() -> None:
    with on_cuda():
        generator, same = (torch.Generator("cuda").manual_seed(0) for _ in range(2))

    def draw(x: Tensor) -> Tensor:
        torch.rand(2, device=x.device)  # from the default generator, which every graph registers
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        return noise * float(x.sum().item())

    captured, x = Captured(draw, "cuda", [generator]), torch.ones(3, device="cuda")
    outs = [captured([x])]
    with pytest.warns(UserWarning, match="capturing failed"):
        outs.append(captured([x]))
    outs.append(captured([x]))
    for out in outs:
        torch.testing.assert_close(out, 3.0 * torch.randn(3, generator=same, device="cuda"))
    torch.cuda.empty_cache()  # which torch refuses while a capture goes on
    learner = agent(1, "cuda")
    for _ in range(3):
        learner.update(next(batches(1, 1, "cuda")))
    assert learner.updates.reason is None
    assert learner.updates.captures == 2


@pytest.mark.gpu
def test_a_replay_reads_the_newest_learning_rate() -> None:
    with on_cuda():
        learner = agent(1, "cuda")
    data = batches(1, 1, "cuda")
    for _ in range(4):
        learner.update(next(data))
    assert learner.updates.captures == 2
    for optimizer in (learner.critic_optimizer, learner.actor_optimizer):
        optimizer.learning_rate.zero_()
    before = learner.critic_optimizer.flat.clone()
    learner.update(next(data))
    assert torch.equal(learner.critic_optimizer.flat, before)
