"""The update as a CUDA graph holds it: no host in it, and replays that go on where plain calls would."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tape import Tape
from torch import Tensor

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, kernels
from brc_fast.agents.brc import METRICS
from brc_fast.agents.policy import LaggedPolicy
from brc_fast.learner import graphs
from brc_fast.learner.graphs import Captured

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


@pytest.mark.parametrize("normalized", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_replays_of_two_updates_are_single_updates(tasks: int, normalized: bool) -> None:
    """Twenty calls of two updates, most of them replays, against forty plain ones, bit for bit."""
    single, replayed = (agent(tasks, normalize_observations=normalized) for _ in range(2))
    taped = replayed.updates = Taped(replayed.updates)  # type: ignore[assignment]
    scale = torch.linspace(0.5, 2.0, tasks)
    with kernels.use("reference"):
        for batch, _ in zip(batches(2, tasks), range(20), strict=False):
            for learner in (single, replayed):
                if learner.observations is not None:  # the next replay must read what these have become
                    learner.observations.update(batch.observations[0] * 3.0 + 1.0, batch.task_ids[0])
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
    slots = [*next(data).columns, torch.ones(tasks, device=device)]
    seen = []
    with kernels.use(implementation), torch.no_grad():
        learner.updates.function(*slots)
        for _ in range(2):
            for slot, x in zip(slots, next(data).columns, strict=False):
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
        data = next(batches(updates, tasks, kernel_device)).columns
        slots = [*data, torch.ones(tasks, device=kernel_device)]
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
    learner.updates = lambda inputs: learner.make_updates(*inputs)  # type: ignore[assignment]
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


def test_why_the_function_runs_as_it_is_and_how_long_it_takes() -> None:
    assert Captured(lambda x: x, "meta").reason == "the learner is on meta"
    assert Captured(lambda x: x, "cpu", enabled=False).reason == "switched off"
    learner = agent(1)
    learner.update(next(batches(1, 1)))
    assert learner.updates.seconds() > 0.0
    assert learner.updates.seconds() == 0.0
    assert learner.updates.captures == 0


@pytest.mark.parametrize("value", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_rate_that_is_set_holds_in_replays(value: float | Tensor) -> None:
    plain, replayed = agent(2), agent(2)
    replayed.updates = Taped(replayed.updates)  # type: ignore[assignment]
    with kernels.use("reference"):
        for batch, call in zip(batches(1, 2), range(6), strict=False):
            if call == 4:
                for learner in (plain, replayed):
                    learner.critic_optimizer.learning_rate = value  # type: ignore[assignment]
                    learner.critic_optimizer.tau = 0.5  # type: ignore[assignment]
                    learner.actor_optimizer.learning_rate *= 0.5
                before = state(replayed)
            plain.update(batch)
            replayed.update(batch)
    for name, expected in state(plain).items():
        assert torch.equal(state(replayed)[name], expected), name
    assert torch.equal(before["critic/body.input.kernel"], state(replayed)["critic/body.input.kernel"])
    assert not torch.equal(before["actor/body.input.kernel"], state(replayed)["actor/body.input.kernel"])
    assert replayed.critic_optimizer.tau.item() == 0.5


def test_a_rate_keeps_its_shape() -> None:
    with pytest.raises(ValueError, match=r"tau must have shape .* = \[\], got \[2\]"):
        agent(1).critic_optimizer.tau = torch.zeros(2)


def test_what_a_graph_would_not_see_cannot_be_set() -> None:
    """Everything public that an agent and its optimizers are made with, but modules, which are watched."""
    learner = agent(2)
    watched = ("critic", "target_critic", "actor", "temperature", "updates")
    for part in (learner, *learner.optimizers().values()):
        for name, value in list(vars(part).items()):
            written = part is not learner and isinstance(value, Tensor)  # in place
            if name.startswith("_") or (part is learner and name in watched) or written:
                continue
            with pytest.raises(AttributeError, match=f"{name} is part of the compiled update, and fixed"):
                setattr(part, name, value)
    for name in ("weight_decay", "betas", "eps"):
        with pytest.raises(AttributeError, match=f"{name} .* make another agent with its LearningConfig"):
            setattr(learner.actor_optimizer, name, 10.0)
    with pytest.raises(AttributeError, match=r"target_entropy .* load this one's state_dict\(\)"):
        learner.target_entropy = -50.0
    with pytest.raises(FrozenInstanceError):
        learner.learning.discount = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("learning_rate", r"set on an optimizer: agent\.critic_optimizer\.learning_rate = 0\.5"),
        ("tau", r"set on an optimizer: agent\.critic_optimizer\.tau = 0\.5"),
        ("discount", "a setting of LearningConfig"),
        ("weight_decay", "a setting of LearningConfig"),
        ("embedding_norm", "a setting of CriticConfig"),
    ],
)
def test_a_setting_that_is_looked_for_in_the_wrong_place_is_told_its_own(name: str, told: str) -> None:
    with pytest.raises(AttributeError, match=told):
        setattr(agent(2), name, 0.5)


def test_optimizers_and_critics_take_no_number_that_nobody_reads() -> None:
    learner = agent(2)
    for optimizer, rates in (
        (learner.actor_optimizer, "learning_rate can"),
        (learner.critic_optimizer, "tau can"),
    ):
        for name in ("lr", "beta1"):
            with pytest.raises(AttributeError, match=f"{name} cannot be set on this optimizer: .*{rates}"):
                setattr(optimizer, name, 0.5)
    with pytest.raises(AttributeError, match="tau cannot be set"):  # which has no target
        learner.actor_optimizer.tau = 0.5
    with pytest.raises(AttributeError, match="embedding_norm"):
        learner.critic.embedding_norm = "l1"  # type: ignore[misc]


def test_an_agent_keeps_what_its_user_hangs_on_it() -> None:
    learner = agent(1)
    learner.episodes = 0  # type: ignore[attr-defined]
    learner.episodes += 1  # type: ignore[attr-defined]
    assert learner.episodes == 1  # type: ignore[attr-defined]


def test_many_sizes_of_batches_keep_the_memory_of_a_few() -> None:
    learner = agent(1)
    plans = []
    for rows in range(1, 2 * graphs.MOST_SIGNATURES):
        batch = next(batches(1, 1, rows=rows))
        learner.update(batch)
        plans.append(weakref.ref(learner.plans(batch.update(0))))
        gc.collect()
        assert sum(plan() is not None for plan in plans) <= graphs.MOST_SIGNATURES


def test_an_agent_dies_with_its_last_reference() -> None:
    """And its buffers and graphs with it: the cycle collector may come when a GPU's memory is long full."""
    gc.collect()
    gc.disable()
    try:
        learner = agent(2)
        learner.update(next(batches(1, 2)))
        learner.load_state_dict(learner.state_dict())
        found = [weakref.ref(x) for x in (learner, learner.critics.master, learner.updates)]
        actor = learner.actor
        del learner
        assert [ref() for ref in found] == [None] * 3
    finally:
        gc.enable()
    actor.load_state_dict(agent(2, seed=1).actor.state_dict())  # which outlives the agent whole
    assert torch.equal(actor.body.input.kernel, agent(2, seed=1).actor.body.input.kernel)


def test_a_lagging_policy_waits_in_the_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of the device that happens to be the current one."""
    learner, seen = agent(1), []
    taken = SimpleNamespace(
        record=lambda stream=None: seen.append(("record", stream)),
        wait=lambda stream=None: seen.append(("wait", stream)),
    )
    monkeypatch.setattr(learner.updates, "event", lambda: taken)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    lagged = LaggedPolicy(learner)
    lagged.refresh()
    lagged.act(torch.zeros(1, 5), torch.zeros(1, dtype=torch.long))
    assert seen == [("record", "stream of cpu"), ("wait", "stream of cpu")]


class State:
    """Where a generator is in its sequence; a graph keeps the object that was there when it was captured."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset


class FakeGenerator:
    """A CUDA generator whose draws are the numbers 0, 1, 2, .."""

    def __init__(self, state: State | None = None) -> None:
        self.state = state or State()

    def clone_state(self) -> FakeGenerator:
        return FakeGenerator(State(self.state.offset))

    def graphsafe_set_state(self, other: FakeGenerator) -> None:
        self.state = other.state


class FakeGPU:
    """Enough of torch.cuda to capture: streams note whom they wait for, a replay makes the draws that were
    captured, and a pool is refused as torch does it, where the last graph in it is gone and something else
    is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools: list[weakref.WeakSet[Any]] = []
        self.current = self.stream()
        self.capturing: Any = None
        self.generator = FakeGenerator()
        self.draws: list[int] = []
        self.begun: list[str] = []
        gpu = self

        class Graph:
            def __init__(self) -> None:
                self.state, self.draws = State(), 0

            def register_generator_state(self, generator: FakeGenerator) -> None:
                self.state = generator.state

            def replay(self) -> None:
                gpu.draws += range(self.state.offset, self.state.offset + self.draws)
                self.state.offset += self.draws

        class Slots(graphs._Slots):
            def __init__(self, inputs: list[Tensor], device: torch.device) -> None:
                gpu.allocate()
                super().__init__(inputs, torch.device("cpu"))

        def pool() -> tuple[int, int]:
            gpu.pools.append(weakref.WeakSet())
            return 0, len(gpu.pools) - 1

        used = set()

        @contextmanager
        def graph(
            into: Graph, handle: tuple[int, int], stream: object, capture_error_mode: str
        ) -> Iterator[None]:
            pool = handle[1]
            if pool in used and not gpu.pools[pool]:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            gpu.begun.append("capture")
            gpu.capturing = into
            try:
                yield
            finally:
                gpu.capturing = None
            used.add(pool)
            gpu.pools[pool].add(into)

        @contextmanager
        def on(stream: Any) -> Iterator[None]:
            before, gpu.current = gpu.current, stream
            try:
                yield
            finally:
                gpu.current = before

        def event(timed: bool = False) -> SimpleNamespace:
            made = SimpleNamespace(recorded=[], synchronize=lambda: None)
            made.record = lambda: made.recorded.append(gpu.current)
            return made

        fakes = {
            "CUDAGraph": Graph,
            "Stream": self.stream,
            "current_device": lambda: 0,
            "current_stream": lambda device: gpu.current,
            "default_generators": [FakeGenerator()],
            "graph": graph,
            "graph_pool_handle": pool,
            "is_current_stream_capturing": lambda: gpu.capturing is not None,
            "stream": on,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(graphs, "event", event)
        monkeypatch.setattr(graphs, "_Slots", Slots)
        monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: None)

    def stream(self, device: object = None) -> SimpleNamespace:
        seen: list[object] = []
        return SimpleNamespace(
            waited=seen, wait_stream=seen.append, wait_event=lambda event: None, synchronize=lambda: None
        )

    def draw(self, x: Tensor) -> Tensor:
        """A function with one number of noise."""
        if self.capturing is None:
            self.draws.append(self.generator.state.offset)
            self.generator.state.offset += 1
        else:
            self.capturing.draws += 1
        return x + 1.0

    def allocate(self) -> None:
        """Called for each set of slots."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    return FakeGPU(monkeypatch)


def test_what_a_function_keeps_of_a_capture_outlives_its_graphs(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As plans keep their inputs: graphs of other shapes take memory of their own."""
    monkeypatch.setattr(graphs, "MOST_SIGNATURES", 1)
    captured = Captured(lambda x: x + 1.0, "cuda")
    for _ in range(3):
        captured([torch.zeros(2)])
    with pytest.warns(UserWarning, match="captured anew"):
        captured([torch.zeros(3)])
    for _ in range(2):
        captured([torch.zeros(3)])
    assert captured.reason is None
    assert captured.captures == 4
    assert [len(alive) for alive in gpu.pools] == [0, 0, 1, 1]


def test_shapes_that_take_turns_are_captured_once(gpu: FakeGPU) -> None:
    captured = Captured(gpu.draw, "cuda", [gpu.generator])  # type: ignore[list-item]
    with pytest.warns(UserWarning, match=r"captured anew: input 0: \[2\] .* became \[3\]"):
        outs = [captured([torch.zeros(2 + call % 2)]) for call in range(12)]
    assert captured.captures == 4
    assert gpu.draws == list(range(12))
    assert [len(out) for out in outs] == [2, 3] * 6


def test_graphs_of_the_shapes_used_last_are_kept(gpu: FakeGPU) -> None:
    captured = Captured(lambda x: x, "cuda")
    sizes = [size for size in range(1 + graphs.MOST_SIGNATURES) for _ in range(3)]
    with pytest.warns(UserWarning, match="captured anew"):
        _ = [captured([torch.zeros(size)]) for size in sizes]
    assert [len(alive) for alive in gpu.pools] == [0, 0] + 2 * graphs.MOST_SIGNATURES * [1]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_capture_that_fails_leaves_no_graph_and_no_noise_twice(gpu: FakeGPU, failing: int) -> None:
    def function(x: Tensor) -> Tensor:
        out = gpu.draw(x)
        if gpu.capturing is not None and len(gpu.begun) == failing:
            raise torch.OutOfMemoryError("out of memory")
        return out

    captured = Captured(function, "cuda", [gpu.generator])  # type: ignore[list-item]
    with pytest.warns(UserWarning, match="updates run without a CUDA graph: capturing failed: out of memory"):
        _ = [captured([torch.zeros(2)]) for _ in range(8)]
    assert gpu.draws == list(range(8))
    assert len(gpu.begun) == failing
    assert not any(map(len, gpu.pools))


def test_a_capture_that_is_interrupted_can_be_made_again(gpu: FakeGPU) -> None:
    """A Ctrl-C is no reason to do without graphs; the one before it would draw from a state that is gone."""

    def function(x: Tensor) -> Tensor:
        out = gpu.draw(x)
        if gpu.capturing is not None and len(gpu.begun) == 2:
            raise KeyboardInterrupt
        return out

    captured = Captured(function, "cuda", [gpu.generator])  # type: ignore[list-item]
    for _ in range(2):
        captured([torch.zeros(2)])
    with pytest.raises(KeyboardInterrupt):
        captured([torch.zeros(2)])
    for _ in range(4):
        captured([torch.zeros(2)])
    assert captured.reason is None
    assert captured.captures == 3
    assert gpu.draws == list(range(6))


def test_what_a_function_raised_is_told_although_the_end_of_its_capture_fails_too(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C stays one, and the reason is the first error, also one without words."""

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        gpu.capturing = True
        try:
            yield
        finally:
            gpu.capturing = None
            raise RuntimeError("operation failed due to a previous error during capture")

    def function(x: Tensor) -> Tensor:
        if gpu.capturing is not None:
            raise error
        return x

    monkeypatch.setattr(torch.cuda, "graph", graph)
    captured = Captured(function, "cuda")
    captured([torch.zeros(2)])
    for error in (KeyboardInterrupt(), MemoryError("full")):
        with pytest.raises(type(error)):
            captured([torch.zeros(2)])
        captured([torch.zeros(2)])
    assert captured.reason is None
    error = NotImplementedError()
    with pytest.warns(UserWarning, match="capturing failed: NotImplementedError"):
        captured([torch.zeros(2)])


def test_a_call_that_is_broken_off_leaves_the_order_of_streams(gpu: FakeGPU) -> None:
    """What it has queued still runs: who saves the parameters has to wait for it, as has the next call."""
    broken = True

    def function(x: Tensor) -> Tensor:
        if broken:
            raise KeyboardInterrupt
        return x

    captured, mine = Captured(function, "cuda"), gpu.current
    with pytest.raises(KeyboardInterrupt):
        captured([torch.zeros(2)])
    assert mine.waited == [captured.stream]
    assert gpu.current is mine
    slots = next(iter(captured._programs.values())).slots[0]
    assert slots.free.recorded == [captured.stream]  # type: ignore[attr-defined]
    broken = False
    assert torch.equal(captured([torch.ones(2)]), torch.ones(2))


def test_an_agent_that_dies_while_another_captures_leaves_that_capture_alone(gpu: FakeGPU) -> None:
    """The cycle collector comes at any time, and a stream that captures must not wait for another."""
    dying = [Captured(lambda x: x, "cuda")]

    def function(x: Tensor) -> Tensor:
        if gpu.capturing is not None:
            seen = list(gpu.current.waited)
            dying.clear()
            assert gpu.current.waited == seen
        return x

    captured = Captured(function, "cuda")
    for _ in range(2):
        captured([torch.zeros(2)])
    assert captured.captures == 1
    assert not dying


@pytest.mark.parametrize("left", ["unused", "used", "nothing"])
def test_a_failed_capture_gives_up_its_pool_where_torch_does_not(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Once, and only where memory that nothing uses stays reserved: the allocator counts each release."""
    told: list[str] = []
    other = {"device": 0, "segment_pool_id": (0, 7), "active_size": 0}
    mine = {"device": 0, "segment_pool_id": (0, 0), "active_size": 512 if left == "used" else 0}
    held: list[weakref.ref[Tensor]] = []

    def snapshot() -> list[dict[str, object]]:
        assert held[0]() is None  # what the function had made is gone when its memory is looked at
        return [other] if left == "nothing" else [other, mine, mine]

    def function(x: Tensor) -> Tensor:
        made = x + 1.0
        if gpu.capturing is not None:
            held.append(weakref.ref(made))
            raise RuntimeError("made to fail")
        return made

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", snapshot)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("emptied"))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *place: told.append(f"released {place}"))
    captured = Captured(function, "cuda")
    captured([torch.zeros(2)])
    with pytest.warns(UserWarning, match="made to fail"):
        captured([torch.zeros(2)])
    assert told == ["emptied"] + ["released (0, (0, 0))", "emptied"] * (left == "unused")


def test_a_graph_has_a_workspace_of_its_own_for_products(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: gpu.begun.append("cleared"), raising=False)
    captured = Captured(lambda x: x, "cuda")
    for _ in range(4):
        captured([torch.zeros(2)])
    assert gpu.begun == ["cleared", "capture"] * 2


@pytest.mark.filterwarnings("ignore:the CUDA graph is captured anew")
@pytest.mark.parametrize("made", [0, 1])
@pytest.mark.parametrize("size", [8, 1])
def test_memory_that_ran_out_in_the_slots_leaves_the_next_call_whole(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, size: int, made: int
) -> None:
    """Also where a slot of the size before would take the new inputs by broadcasting."""
    captured = Captured(lambda x: x.sum(1), "cuda")
    for _ in range(3):
        captured([torch.zeros(2, 4)])
    calls = []

    def full() -> None:
        calls.append(0)
        if len(calls) > made:
            raise torch.OutOfMemoryError("CUDA out of memory")

    x = torch.ones(2, size)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "allocate", full)
        with pytest.raises(torch.OutOfMemoryError):
            captured([x])
    assert torch.equal(captured([x]), x.sum(1))
    captured([torch.zeros(2, 4)])
    assert captured.captures == 2  # which are there still


def test_inputs_are_held_until_they_were_copied(gpu: FakeGPU) -> None:
    """Memory of other libraries, as JAX's, does not know of the stream that reads it."""
    captured, seen = Captured(lambda x: x + 1.0, "cuda"), []
    for call in range(4):
        inputs = [torch.zeros(2)]
        seen.append(weakref.ref(inputs[0]))
        captured(inputs)
        del inputs
        assert [ref() is not None for ref in seen] == [age < 2 for age in range(call, -1, -1)]
    for slots in next(iter(captured._programs.values())).slots:
        assert slots.copied.recorded == [captured.stream] * 2  # type: ignore[attr-defined]


def test_memory_that_is_freed_with_an_agent_waits_for_its_last_call(gpu: FakeGPU) -> None:
    captured, mine = Captured(lambda x: x, "cuda"), gpu.current
    with captured.queue():
        captured([torch.zeros(2)])
    stream = captured.stream
    assert stream not in mine.waited
    del captured
    assert mine.waited == [stream]


def test_buffers_that_move_take_their_graphs_with_them(gpu: FakeGPU) -> None:
    captured = Captured(lambda x: x, "cuda")
    for _ in range(3):
        captured([torch.zeros(2)])
    captured.forget()
    for _ in range(3):
        captured([torch.zeros(2)])
    assert captured.captures == 4
    assert [len(alive) for alive in gpu.pools] == [0, 0, 1, 1]


def test_what_happens_between_calls_waits_for_what_was_queued_before(gpu: FakeGPU) -> None:
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


def large(**options: object) -> BRC:
    """One whose products are large enough for cuBLAS to take a workspace."""
    return BRC(
        5,
        2,
        critic=CriticConfig(width=512),
        actor=ActorConfig(width=256),
        device="cuda",
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["cleared", "another graph dies"])
def test_a_graph_outlives_the_workspaces_of_products(how: str) -> None:
    with on_cuda():
        graph, plain = large(), large(graphs=False)
    data = batches(1, 1, "cuda", rows=512)
    for _ in range(4):
        batch = next(data)
        graph.update(batch)
        plain.update(batch)
    assert graph.updates.captures == 2
    if how == "cleared":
        torch._C._cuda_clearCublasWorkspaces()
    else:  # on a stream of the same number: torch hands out 32 in turn
        assert graph.updates.stream is not None
        for _ in range(40):
            other = large()
            for _ in range(3):
                other.update(next(data))
            assert other.updates.stream is not None
            met = other.updates.stream.cuda_stream == graph.updates.stream.cuda_stream
            del other
            if met:
                break
        assert met
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    filler = [torch.zeros(1 << 23, device="cuda") for _ in range(8)]  # where a workspace may have been
    for _ in range(4):
        batch = next(data)
        mine, expected = graph.update(batch), plain.update(batch)
        for name in METRICS:
            torch.testing.assert_close(mine[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)
    torch.cuda.synchronize()
    assert not any(x.any() for x in filler)


@pytest.mark.gpu
def test_a_second_capture_that_fails_repeats_no_noise() -> None:
    with on_cuda():
        generator, same = (torch.Generator("cuda").manual_seed(0) for _ in range(2))
    captures = []

    def draw(x: Tensor) -> Tensor:
        noise = torch.randn(4, generator=generator, device="cuda")
        if torch.cuda.is_current_stream_capturing():
            captures.append(0)
            if len(captures) == 2:
                raise RuntimeError("made to fail")
        return x + noise

    captured, x = Captured(draw, "cuda", [generator]), torch.zeros(4, device="cuda")
    with pytest.warns(UserWarning, match="made to fail"):
        outs = [captured([x]) for _ in range(8)]
    for out in outs:
        torch.testing.assert_close(out, torch.randn(4, generator=same, device="cuda"))


@pytest.mark.gpu
def test_a_capture_that_failed_gives_its_memory_back() -> None:
    with on_cuda():
        x = torch.ones(3, device="cuda")

    def breach(x: Tensor) -> Tensor:
        held = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
        return x + held.sum().item()

    captured = Captured(breach, "cuda")
    captured([x])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pytest.warns(UserWarning, match="capturing failed"):
        captured([x])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 1 << 28


@pytest.mark.gpu
def test_a_dead_agent_leaves_its_memory_on_the_gpu() -> None:
    with on_cuda():
        data = batches(1, 1, "cuda", rows=512)
    gc.collect()
    gc.disable()
    try:
        sizes = []
        for _ in range(3):
            learner = large()
            for _ in range(4):
                learner.update(next(data))
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            del learner
            sizes.append(torch.cuda.memory_allocated())
        assert sizes[2] <= sizes[0] < held
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_lagging_policy_of_another_device_waits_for_its_refresh() -> None:
    with on_cuda():
        pass
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    learner = agent(1, "cuda:1")
    lagged = LaggedPolicy(learner)
    with torch.no_grad():
        for p in learner.actor.parameters():
            p.fill_(0.5)
    torch.cuda.synchronize(1)
    with learner.updates.queue():
        torch.cuda._sleep(1 << 31)  # the learner is busy before it hands over
        lagged.refresh()
    zeros = torch.zeros(1, 5, device="cuda:1"), torch.zeros(1, dtype=torch.long, device="cuda:1")
    lagged.act(*zeros)
    seen = [p.clone() for p in lagged.actor.parameters()]
    torch.cuda.synchronize(1)
    assert all((p == 0.5).all() for p in seen)
