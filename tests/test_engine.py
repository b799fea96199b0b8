"""The learner's engine against a plain one: the same networks through autograd and torch.optim."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, LearningConfig, Noise, envs, kernels
from brc_fast.agents.brc import METRICS
from brc_fast.command import main as cli
from brc_fast.config import TrainConfig
from brc_fast.learner.precision import check_precision, products
from brc_fast.replay import ReplayBuffer
from brc_fast.replay.prefetch import Prefetcher
from brc_fast.runs import trainer as runs_trainer
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.trainer import Trainer

CRITIC = CriticConfig(width=24, depth=2, num_atoms=21, embedding_size=4)
ACTOR = ActorConfig(width=15, depth=1)
OBS, A, ROWS = 5, 2, 12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a run; small products only wait for more of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def agent(tasks: int = 1, **options: Any) -> BRC:
    return BRC(OBS, A, tasks, **{"critic": CRITIC, "actor": ACTOR, **options})


def batches(
    updates: int, tasks: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Batch, Noise]:
    """U batches, and their noise, that are the same numbers in every dtype."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(updates, ROWS, *shape, generator=rng).to(dtype)

    ids = torch.randint(tasks, (updates, ROWS), generator=rng)
    masks = (torch.rand(updates, ROWS, generator=rng) > 0.1).to(dtype)
    batch = Batch(normal(OBS), normal(A).tanh(), normal(), masks, normal(OBS), ids)
    return batch, Noise(normal(A), normal(A))


class PlainEngine:
    """The update of BRC, from copies of an agent's modules, in terms of torch alone."""

    def __init__(self, of: BRC) -> None:
        self.critic, self.actor = copy.deepcopy(of.critic), copy.deepcopy(of.actor)
        self.target = copy.deepcopy(of.target_critic)
        self.log_alpha = torch.nn.Parameter(of.temperature.log_alpha.detach().clone())
        self.learning, self.atoms, self.v_max = of.learning, of.atoms, of.v_max
        self.target_entropy = of.target_entropy
        rule = {"lr": self.learning.learning_rate, "eps": self.learning.eps}
        betas, decay = (self.learning.beta1, self.learning.beta2), self.learning.weight_decay
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), betas=betas, weight_decay=decay, **rule
        )
        self.actor_optimizer = torch.optim.AdamW(
            self.actor.parameters(), betas=betas, weight_decay=decay, **rule
        )
        betas = (self.learning.temperature_beta1, self.learning.beta2)
        self.temperature_optimizer = torch.optim.Adam([self.log_alpha], betas=betas, **rule)

    def sample(self, observations: Tensor, ids: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        x = observations
        if self.critic.embedding is not None:
            x = torch.cat([x, F.normalize(self.critic.embedding.detach(), dim=-1)[ids]], -1)
        mean, raw = self.actor(x)
        log_std = -10.0 + 12.0 * (1.0 + raw.tanh()) / 2.0
        u = mean + log_std.exp() * noise
        actions = u.tanh()
        squash = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
        return actions, (-0.5 * noise**2 - log_std - 0.5 * math.log(2.0 * math.pi) - squash).sum(-1)

    def probs(self, batch: Batch, noise: Tensor) -> Tensor:
        """The projected target: each of K x K pairs of positions and atoms gets its share."""
        actions, log_probs = self.sample(batch.next_observations, batch.task_ids, noise)
        probs = self.target(batch.next_observations, actions, batch.task_ids).softmax(-1).mean(0)
        soft = self.atoms - self.log_alpha.exp() * log_probs[:, None]
        y = batch.rewards[:, None] + self.learning.discount * batch.masks[:, None] * soft
        y = y.clamp(-self.v_max, self.v_max)
        spacing = 2.0 * self.v_max / (len(self.atoms) - 1)
        share = (1.0 - (y[:, :, None] - self.atoms).abs() / spacing).clamp(min=0.0)
        return (probs[:, :, None] * share).sum(1)

    def update(self, batch: Batch, noise: Noise) -> dict[str, float]:
        with torch.no_grad():
            target = self.probs(batch, noise.next_action)
        logits = self.critic(batch.observations, batch.actions, batch.task_ids)
        critic_loss = -(target * logits.log_softmax(-1)).sum(-1).mean(-1).sum()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_norm = torch.cat([p.grad.flatten() for p in self.critic.parameters()]).norm()
        self.critic_optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                slow.lerp_(fast, self.learning.tau)

        actions, log_probs = self.sample(batch.observations, batch.task_ids, noise.actor_action)
        logits = self.critic(batch.observations, actions, batch.task_ids)
        q = logits.softmax(-1).mean(0) @ self.atoms
        actor_loss = (self.log_alpha.exp().detach() * log_probs - q).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_norm = torch.cat([p.grad.flatten() for p in self.actor.parameters()]).norm()
        self.actor_optimizer.step()

        entropy, alpha = -log_probs.detach().mean(), self.log_alpha.exp()
        temperature_loss = alpha * (entropy - self.target_entropy)
        self.temperature_optimizer.zero_grad()
        temperature_loss.backward()
        self.temperature_optimizer.step()
        values = (
            critic_loss,
            critic_norm,
            actor_loss,
            actor_norm,
            entropy,
            q.mean(),
            alpha,
            temperature_loss,
        )
        return dict(zip(METRICS, (value.item() for value in values), strict=True))

    def parameters(self) -> dict[str, Tensor]:
        modules = {"critic": self.critic, "target_critic": self.target, "actor": self.actor}
        out = {f"{m}/{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        return {**out, "temperature/log_alpha": self.log_alpha}


@contextmanager
def nearest_kinks() -> Iterator[list[float]]:
    """Per call of Tensor.relu, how near to zero an entry was: at zero, rounding chooses the gradient."""
    near: list[float] = []
    relu = Tensor.relu

    def watched(x: Tensor) -> Tensor:
        near.append(x.detach().abs().min().item())
        return relu(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "relu", watched)
        yield near


def distance(mine: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((mine.detach().double() - other.detach().double()).norm() / other.detach().double().norm()).item()


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("dtype", "updates", "tolerance"),
    [(torch.float64, 100, 1e-9), (torch.float32, 20, 1e-4)],
    ids=["float64", "float32"],
)
def test_updates_are_those_of_a_plain_engine(
    dtype: torch.dtype, updates: int, tolerance: float, tasks: int, recompute: bool
) -> None:
    learning = LearningConfig(learning_rate=1e-3, weight_decay=0.05, tau=0.02)
    mine = agent(tasks, dtype=dtype, learning=learning, recompute=recompute)
    plain = PlainEngine(mine)
    start = {name: p.detach().clone() for name, p in plain.parameters().items()}
    data, noise = batches(updates, tasks, seed=10, dtype=dtype)
    with nearest_kinks() as kinks:
        for call in range(0, updates, 10):  # ten updates a call
            metrics = mine.update(
                data.map(lambda x, first=call: x[first : first + 10]),
                Noise(*(x[call : call + 10] for x in noise)),
            )
            for update in range(call, call + 10):
                with kernels.use("reference"):
                    expected = plain.update(data.update(update), Noise(*(x[update] for x in noise)))
            for name in METRICS:
                assert metrics[name].item() == pytest.approx(expected[name], rel=10 * tolerance), name
    assert kinks
    if dtype == torch.float32:  # this seed keeps off the kinks by more than float32 rounds
        assert min(kinks) > 1e-5
    state = mine.state_dict()
    for name, parameter in plain.parameters().items():
        assert distance(state[name], parameter) < tolerance, name
        assert distance(start[name], parameter) > tolerance, name
    for name in ("critic", "actor"):
        optimizer = getattr(plain, f"{name}_optimizer")
        for moment in ("exp_avg", "exp_avg_sq"):
            theirs = torch.cat([s[moment].flatten() for s in optimizer.state.values()])
            prefix = f"{name}_optimizer/{moment}/"
            ours = torch.cat([value.flatten() for key, value in state.items() if key.startswith(prefix)])
            assert distance(ours, theirs) < 10 * tolerance
        assert state[f"{name}_optimizer/step"] == updates


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tasks", [1, 2])
def test_kernels_make_the_updates_of_a_plain_engine(kernel_device: str, tasks: int, precision: str) -> None:
    """Three updates; in bfloat16 as near to float32 as the plain passes are, within 3 % (below)."""
    mine = agent(tasks, device=kernel_device, precision=precision, graphs=False)
    plain = PlainEngine(mine)
    data, noise = batches(3, tasks)
    data, noise = data.to(kernel_device), Noise(*(x.to(kernel_device) for x in noise))
    with kernels.use("triton"):
        metrics = mine.update(data, noise)
    with kernels.use("reference"):
        for update in range(3):
            expected = plain.update(data.update(update), Noise(*(x[update] for x in noise)))
    tolerance = 1e-3 if precision == "fp32" else 0.03
    for name in METRICS:
        assert abs(metrics[name].item() - expected[name]) < tolerance * max(1.0, abs(expected[name])), name
    state = mine.state_dict()
    for name, parameter in plain.parameters().items():
        if "bias" not in name or precision == "fp32":  # a bias of a few steps from zero is noise in bfloat16
            assert distance(state[name], parameter) < tolerance, name


@pytest.mark.parametrize("tasks", [1, 3])
def test_bfloat16_stays_near_float32_and_keeps_float32_where_sums_are_kept(tasks: int) -> None:
    """Losses of 20 updates within 3 %, of 1 where they are smaller; float32 is as near as 1e-4 (above)."""
    low, full = agent(tasks, precision="bf16"), agent(tasks)
    data, noise = batches(20, tasks)
    for update in range(20):
        one = (
            data.map(lambda x, first=update: x[first : first + 1]),
            Noise(*(x[update : update + 1] for x in noise)),
        )
        mine, expected = low.update(*one), full.update(*one)
        for name in ("critic_loss", "actor_loss", "temperature_loss", "entropy", "q_mean"):
            scale = max(abs(expected[name].item()), 1.0)
            assert abs(mine[name].item() - expected[name].item()) < 0.03 * scale, (update, name)
    assert 0.0 < distance(low.critics.master, full.critics.master) < 0.03
    for networks, optimizer in ((low.critics, low.critic_optimizer), (low.actors, low.actor_optimizer)):
        assert networks.master.dtype == torch.float32
        assert optimizer.exp_avg.dtype == optimizer.exp_avg_sq.dtype == torch.float32
        assert networks.grad.dtype == optimizer.grad.dtype == torch.bfloat16
        assert networks.low is not None
        assert networks.low.dtype == torch.bfloat16
        assert torch.equal(networks.low, networks.master.bfloat16())
    assert all(value.dtype == torch.float32 for value in mine.values())
    assert {p.dtype for module in (low.critic, low.actor) for p in module.parameters()} == {torch.float32}
    observations, ids = torch.randn(4, OBS), torch.zeros(4, dtype=torch.long)
    assert low.act(observations, ids).dtype == low.value(observations, ids).dtype == torch.float32


@pytest.mark.parametrize("older", ["highest", "high", None])
@pytest.mark.parametrize("newer", ["ieee", "tf32", None])
def test_products_leave_both_of_torchs_switches_as_they_were(older: str | None, newer: str | None) -> None:
    """And inside they agree: torch refuses to multiply where they contradict each other."""
    backend = torch.backends.cuda.matmul

    def switches() -> list[object]:
        found: list[object] = [backend.fp32_precision]
        for read in (torch.get_float32_matmul_precision, lambda: backend.allow_tf32):
            try:
                found.append(read())
            except RuntimeError:
                found.append("refused")
        return found

    fresh = backend.fp32_precision
    try:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        if newer is not None:
            backend.fp32_precision = newer
        before = switches()
        for precision, expected in (("tf32", ["tf32", "high", True]), ("fp32", ["ieee", "highest", False])):
            with products(precision, "cuda"):
                assert switches() == expected
            assert switches() == before
        with products("tf32", "cpu"):
            assert switches() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        backend.fp32_precision = fresh


def test_precisions_that_a_device_lacks_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16, got 'fp16'"):
        agent(precision="fp16")
    with pytest.raises(ValueError, match="precision tf32 needs a CUDA device, the learner is on the CPU"):
        agent(precision="tf32")
    for precision in ("tf32", "bf16"):
        told = f"precision {precision} is for float32 parameters, got torch.float64; leave it at fp32"
        with pytest.raises(ValueError, match=told):
            agent(precision=precision, dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=f"dtype must be torch.float32 or torch.float64, got {dtype}"):
            agent(dtype=dtype)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "Tesla V100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (7, 5))
    for precision in ("tf32", "bf16"):
        told = f"precision {precision} needs compute capability 8.0, Tesla V100 has 7.5; use fp32"
        with pytest.raises(ValueError, match=told):
            check_precision(precision, "cuda", torch.float32)  # type: ignore[arg-type]
    check_precision("fp32", "cuda", torch.float32)
    check_precision("fp32", "cuda", torch.float64)
    for capability in ((8, 0), (12, 0)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None, c=capability: c)
        for precision in ("tf32", "bf16"):
            check_precision(precision, "cuda:1", torch.float32)  # type: ignore[arg-type]
    check_precision("bf16", "cpu", torch.float32)


def test_rewards_are_divided_by_the_scale_of_their_task() -> None:
    scaled, divided = agent(3), agent(3)
    data, noise = batches(4, 3)
    scale = torch.tensor([0.5, 3.0, float("inf")])  # infinite while a task's scale is unknown
    before = [x.clone() for x in data.columns]
    mine = scaled.update(data, noise, reward_scale=scale)
    expected = divided.update(data._replace(rewards=data.rewards / scale[data.task_ids]), noise)
    assert all(torch.equal(mine[name], expected[name]) for name in METRICS)
    assert torch.equal(scaled.critics.master, divided.critics.master)
    assert all(torch.equal(a, b) for a, b in zip(before, data.columns, strict=True))
    plain = agent(3)
    plain.update(data, noise)
    assert not torch.equal(plain.critics.master, scaled.critics.master)


@pytest.mark.parametrize(
    ("field", "shape", "told"),
    [
        ("rewards", (ROWS,), r"rewards must have shape \[U, B\], got \[12\]"),
        ("rewards", (0, ROWS), r"rewards must have shape \[U, B\], got \[0, 12\]"),
        (
            "observations",
            (2, ROWS, OBS + 1),
            r"observations must have .* \[U, B, O\] = \[2, 12, 5\], got \[2, 12, 6\]",
        ),
        (
            "actions",
            (2, ROWS, A - 1),
            r"actions must have shape \[U, B, A\] = \[2, 12, 2\], got \[2, 12, 1\]",
        ),
        ("masks", (3, ROWS), r"masks must have shape \[U, B\] = \[2, 12\], got \[3, 12\]"),
        (
            "next_observations",
            (3, ROWS, OBS),
            r"next_observations must have .* = \[2, 12, 5\], got \[3, 12, 5\]",
        ),
        ("task_ids", (2, ROWS + 1), r"task_ids must have shape \[U, B\] = \[2, 12\], got \[2, 13\]"),
    ],
)
def test_a_field_of_another_shape_is_refused_by_name(field: str, shape: tuple[int, ...], told: str) -> None:
    mine = agent(2)
    data, _ = batches(2, 2)
    wrong = torch.zeros(shape, dtype=getattr(data, field).dtype)
    before = mine.critics.master.clone()
    with pytest.raises(ValueError, match=told):
        mine.update(data._replace(**{field: wrong}))
    assert torch.equal(mine.critics.master, before)
    assert mine.critic_optimizer.step_count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_task_ids_that_are_no_integers_are_refused_by_name(dtype: torch.dtype) -> None:
    data, _ = batches(2, 2)
    with pytest.raises(TypeError, match=f"task_ids must be of dtype torch.int64, got {dtype}"):
        agent(2).update(data._replace(task_ids=data.task_ids.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_metrics_have_the_agents_dtype_whatever_the_scale_has(dtype: torch.dtype) -> None:
    data, noise = batches(2, 2)
    metrics = agent(2).update(data, noise, reward_scale=torch.tensor([2, 3], dtype=dtype))
    expected = agent(2).update(data, noise, reward_scale=torch.tensor([2.0, 3.0]))
    for name in METRICS:
        assert metrics[name].dtype == torch.float32
        torch.testing.assert_close(metrics[name], expected[name])


@pytest.mark.parametrize("tasks", [1, 2])
def test_an_update_computes_the_same_inside_of_a_users_autocast(tasks: int) -> None:
    outside, inside = agent(tasks), agent(tasks)
    data, noise = batches(2, tasks)
    outside.update(data, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside.update(data, noise)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(inside.critics.master, outside.critics.master)
    assert torch.equal(inside.actors.master, outside.actors.master)


def test_memory_that_is_kept_serves_inside_and_outside_of_inference_mode() -> None:
    """Inside first: what torch allocates there could not be written anywhere else."""
    one, other = agent(2), agent(2)
    data, noise = batches(4, 2)
    observations, ids = torch.randn(37, OBS), torch.zeros(37, dtype=torch.long)  # of a size of their own
    for half in (slice(2), slice(2, None)):
        part = data.map(lambda x, half=half: x[half]), Noise(*(x[half] for x in noise))
        with torch.inference_mode(half.start is None):
            one.update(*part)
            one.act(observations, ids)
        other.update(*part)
    actions = one.act(observations, ids, deterministic=True)
    one.critic(observations, actions, ids).sum().backward()
    assert torch.equal(one.critics.master, other.critics.master)


@pytest.mark.parametrize("number", [-1, 2])
def test_a_task_that_does_not_exist_is_refused(number: int) -> None:
    data, _ = batches(2, 2)
    data.task_ids[1, 3] = number
    with pytest.raises(ValueError, match=rf"task_ids must be in \[0, T\) = \[0, 2\), got {number}"):
        agent(2).update(data)
    data.task_ids[1, 3] = 1
    agent(2).update(data)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("field", "number"),
    [
        ("rewards", math.nan),
        ("rewards", math.inf),
        ("observations", math.inf),
        ("next_observations", math.nan),
    ],
)
def test_what_is_not_finite_is_told_by_name_with_its_update(
    precision: str, field: str, number: float
) -> None:
    mine = agent(2, precision=precision)
    data, noise = batches(12, 2)
    getattr(data, field)[6, 3] = number  # of update 7
    for update in range(12):
        one = slice(update, update + 1)
        mine.update(data.map(lambda x, one=one: x[one]), type(noise)(*(x[one] for x in noise)))
        if update < 6:
            mine.check_finite()
        elif (field, number) != ("rewards", math.inf):
            with pytest.raises(FloatingPointError, match=r"^critic_loss is not finite since update 7$"):
                mine.check_finite()
        else:
            mine.check_finite()  # an infinite return is clipped to the support, as any that is too large


def test_a_loss_that_is_infinite_is_not_finite() -> None:
    """The Bellman target is clipped, so that an infinite temperature is first seen in the actor's loss."""
    mine = agent()
    mine.temperature.log_alpha.data.fill_(200.0)
    data, noise = batches(1)
    metrics = mine.update(data._replace(masks=torch.ones_like(data.masks)), noise)
    assert metrics["critic_loss"].isfinite()
    assert metrics["actor_loss"].isinf()
    with pytest.raises(FloatingPointError, match="actor_loss is not finite since update 1"):
        mine.check_finite()


def test_what_was_first_not_finite_is_told_and_not_what_followed_from_it() -> None:
    """An infinite temperature breaks the actor in the first update, and by that the critic in the second."""
    mine = agent()
    mine.temperature.log_alpha.data.fill_(200.0)
    data, noise = batches(3)
    mine.update(data._replace(masks=torch.ones_like(data.masks)), noise)
    assert 1.0 in mine.first_bad.since
    assert mine.first_bad.since[METRICS.index("critic_loss")] == 2.0
    with pytest.raises(FloatingPointError, match=r"actor_loss is not finite since update 1$"):
        mine.check_finite()


def test_what_is_not_finite_is_told_with_its_update_among_several_of_a_call() -> None:
    mine = agent()
    data, noise = batches(8)
    data.rewards[5, 3] = math.nan  # update 6, the second of the second call
    for call in (0, 4):
        four = slice(call, call + 4)
        mine.update(data.map(lambda x, four=four: x[four]), type(noise)(*(x[four] for x in noise)))
    with pytest.raises(FloatingPointError, match="critic_loss is not finite since update 6"):
        mine.check_finite()


def test_an_agent_that_went_back_to_a_good_state_is_finite_again() -> None:
    mine = agent()
    good = {name: value.clone() for name, value in mine.state_dict().items()}
    data, noise = batches(1)
    mine.update(data._replace(rewards=data.rewards * math.nan), noise)
    with pytest.raises(FloatingPointError):
        mine.check_finite()
    mine.load_state_dict(good)
    mine.update(data, noise)
    mine.check_finite()


TINY = {
    "--num-envs": "4",
    "--steps": "320",
    "--random-steps": "80",
    "--batch-size": "32",
    "--critic.width": "16",
    "--actor.width": "16",
    "--report-every": "40",
    "--eval-every": "400",
    "--eval-episodes": "2",
    "--checkpoint-every": "100",
}


def train(run: Path, *words: str, tasks: tuple[str, ...] = ("toy/One",)) -> int:
    settings = [word for pair in TINY.items() for word in pair]
    return cli.main(["train", *tasks, "--run", str(run), *settings, *words])


def poison_update(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """The batch of the n-th call of a run's updates holds a reward that is NaN."""
    sample, calls = ReplayBuffer.sample, 0

    def poisoned(self: ReplayBuffer, *size: Any, **options: Any) -> Batch:
        nonlocal calls
        calls += 1
        out = sample(self, *size, **options)
        if calls == update:
            out.rewards[0, 0] = math.nan
        return out

    monkeypatch.setattr(ReplayBuffer, "sample", poisoned)


def finite_whatever_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments that take zero for an action that is NaN."""
    make = envs.make

    def forgiving(*arguments: Any, **settings: Any) -> Any:
        env = make(*arguments, **settings)
        step = env.step_tensors
        env.step_tensors = lambda actions: step(actions.nan_to_num())
        return env

    monkeypatch.setattr("brc_fast.envs.make", forgiving)


def test_a_run_whose_losses_stop_being_finite_ends_and_names_the_checkpoint_that_is_good(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The batch of update 31, at step 200, is bad; what is due there must not be written."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison_update(patch, 31)
        assert train(run, "--updates-per-step", "1") == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(
        "brc-fast: critic_loss is not finite since update 31, at or before step 200; "
        f"the checkpoint of step 100 is good; go on with: brc-fast train --resume {run}"
    )
    assert RunFolder(run).steps() == [100]
    arrays = RunFolder(run).load("agent")[1]["agent"]
    assert all(np.isfinite(value).all() for name, value in arrays.items() if name != "generator")
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert RunFolder(run).steps()[-1] == 320


def test_a_loss_that_is_not_finite_before_the_first_checkpoint_says_so(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_update(monkeypatch, 11)
    config = TrainConfig(
        ("toy/One",),
        num_envs=4,
        steps=80,
        random_steps=40,
        updates_per_step=1,
        batch_size=16,
        critic=CRITIC,
        actor=ACTOR,
    )
    trainer, folder = Trainer(config, "cpu"), RunFolder(tmp_path)

    class Counted:
        def count(self, *_: object) -> None: ...

    told = "critic_loss is not finite since update 11, at or before step 80; there is no checkpoint yet"
    with pytest.raises(FloatingPointError, match=told):
        trainer.run(folder, Counted(), lambda *_: None)  # type: ignore[arg-type]
    assert folder.steps() == []


@pytest.mark.parametrize("environments", ["break", "forgive"])
def test_what_a_policy_that_is_not_finite_breaks_is_not_blamed(
    toy: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environments: str,
) -> None:
    """Bad at step 196; it acts once before all is looked at, at step 200."""
    poison_update(monkeypatch, 30)
    if environments == "forgive":
        finite_whatever_acts(monkeypatch)
    assert train(tmp_path / "run", "--updates-per-step", "1") == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "critic_loss is not finite since update 30" in told
    assert "the checkpoint of step 100 is good" in told


def lagging(
    lag: int, updates: int, tasks: int, say: Callable[[str], object] = lambda line: None, **options: Any
) -> Trainer:
    names = tuple(f"toy/{i}" for i in range(tasks))
    config = TrainConfig(
        names,
        num_envs=4,
        steps=400,
        random_steps=24,
        updates_per_step=updates,
        policy_lag=lag,
        batch_size=16,
        critic=CRITIC,
        actor=ACTOR,
        learning=LearningConfig(learning_rate=0.01),
        **options,
    )
    return Trainer(config, "cpu", say)


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize(
    ("lag", "updates", "behind"), [(0, 2, 0), (1, 2, 0), (2, 2, 1), (5, 2, 1), (1, 1, 1)]
)
def test_actions_are_those_of_the_parameters_that_the_lag_allows(
    toy: dict, monkeypatch: pytest.MonkeyPatch, lag: int, updates: int, behind: int, tasks: int
) -> None:
    """With a lag of a whole call, of the parameters before the newest call; else of the newest ones."""
    trainer = lagging(lag, updates, tasks)
    assert (trainer.lagged is not None) == bool(behind)
    other = BRC.from_config(trainer.config, trainer.env.task_spec, "cpu")
    acted: list[Tensor] = []
    step = type(trainer.env).step_tensors

    def watched(self: Any, actions: Tensor) -> Any:
        acted.append(actions.clone())
        return step(self, actions)

    monkeypatch.setattr(type(trainer.env), "step_tensors", watched)

    def now() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in trainer.agent.state_dict().items()}

    while trainer.steps < 24:
        trainer.collect()
    states, told_apart = [now()], 0
    for _ in range(8):
        trainer.learn()
        trainer.join()
        states.append(now())
        assert trainer.observations is not None
        expected = {}
        for age in (0, 1):
            other.load_state_dict(states[-1 - age])
            other.generator.set_state(trainer.agent.generator.get_state())
            expected[age] = other.act(trainer.observations, trainer.task_ids)
        told_apart += not torch.equal(expected[0], expected[1])
        trainer.collect()
        assert torch.equal(acted[-1], expected[behind])
    assert told_apart == 8


class AtOnce:
    """An executor that does what it is given before it returns."""

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function())
        return done


@pytest.mark.parametrize("normalized", [False, True], ids=["raw", "normalized"])
def test_updates_beside_the_environments_are_those_before_them(toy: dict, normalized: bool) -> None:
    """To the bit, though actions are drawn, batches gathered and statistics counted while the updates run."""
    trainers = [lagging(2, 2, 2, normalize_observations=normalized) for _ in range(2)]
    assert isinstance(trainers[0].batches, Prefetcher)
    trainers[1].learner = AtOnce()  # type: ignore[assignment]
    trainers[1].batches = iter(partial(trainers[1].replay.sample, 16, 2), None)
    for trainer in trainers:
        while trainer.steps < 24:
            trainer.collect()
        for _ in range(12):
            trainer.learn()
            assert (trainer.running is not None) == (trainer.lagged is not None)
            trainer.collect()
        trainer.join()
    rows = [trainer.row() for trainer in trainers]
    assert rows[0].keys() == rows[1].keys()
    assert all(float(rows[0][name]) == float(rows[1][name]) for name in rows[0])
    states = [trainer.agent.state_dict() for trainer in trainers]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_error_of_an_update_beside_the_environments_is_raised(
    toy: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = lagging(2, 2, 1)
    while trainer.steps < 24:
        trainer.collect()

    def broken(*_: Any) -> Any:
        raise RuntimeError("no update")

    monkeypatch.setattr(trainer.agent, "run", broken)
    trainer.learn()
    trainer.collect()
    for _ in range(2):  # whoever asks: of a broken learner nothing is saved
        with pytest.raises(RuntimeError, match="no update"):
            trainer.join()


def test_updates_whose_waiting_a_signal_ended_are_waited_for_again(
    toy: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, goes_on = lagging(2, 2, 1), threading.Event()
    while trainer.steps < 24:
        trainer.collect()
    run = trainer.agent.run
    monkeypatch.setattr(trainer.agent, "run", lambda *given: (goes_on.wait(60.0), run(*given))[1])
    trainer.learn()
    assert trainer.running is not None
    with monkeypatch.context() as patch:
        patch.setattr(trainer.running, "result", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trainer.take()
    assert trainer.running is not None
    goes_on.set()
    trainer.take()
    assert trainer.running is None
    assert trainer.losses


def test_one_core_overlaps_nothing_and_says_so(toy: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    for there in (1, 2):
        monkeypatch.setattr(runs_trainer, "cores", lambda there=there: there)
        lagging(2, 2, 1, say=told.append)
    assert [line for line in told if "policy-lag" in line] == [
        "--policy-lag 2: on one core environments and updates take turns all the same"
    ]


def test_a_resumed_run_with_a_lag_goes_on_bit_for_bit(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "halves")
    trainers = [lagging(2, 2, 2) for _ in range(3)]

    def turns(trainer: Trainer, until: int) -> None:
        while trainer.steps < until:
            trainer.collect()
            if trainer.steps >= 24:
                trainer.learn()

    turns(trainers[0], 160)
    turns(trainers[1], 92)
    trainers[1].save(halves)
    trainers[2].load(halves)
    assert trainers[2].lagged is not None
    kept, newest = trainers[2].lagged.state_dict(), trainers[2].agent.actor.state_dict()
    assert "embedding" in kept
    assert any(not torch.equal(kept[name], value) for name, value in newest.items())
    turns(trainers[2], 160)
    trainers[0].save(whole)
    trainers[2].save(halves)
    names = ("agent", "environments", "progress", "lagged_policy")
    (step, parts), (other_step, other) = whole.load(*names), halves.load(*names)
    assert step == other_step == 160
    for name in names:
        assert parts[name].keys() == other[name].keys()
        for key, value in parts[name].items():
            np.testing.assert_array_equal(value, other[name][key], err_msg=f"{name}/{key}")


def test_a_compiled_loss_of_a_user_around_the_critic_equals_the_eager_one() -> None:
    mine = agent(2)
    data, noise = batches(1, 2)
    batch = data.update(0)
    target = mine.critic_target(batch, noise.next_action[0]).probs

    def loss(batch: Batch, target: Tensor) -> Tensor:
        logits = mine.critic(batch.observations, batch.actions, batch.task_ids)
        return kernels.categorical_cross_entropy(logits, target).mean(-1).sum()

    parameters = list(mine.critic.parameters())
    expected = loss(batch, target)
    grads = torch.autograd.grad(expected, parameters)
    torch._dynamo.reset()
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(batch, target)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0.0)
    for one, other in zip(torch.autograd.grad(value, parameters), grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_compiled_policy_equals_the_eager_one() -> None:
    mine = agent(2)
    data, noise = batches(1, 2)
    batch = data.update(0)

    def loss(observations: Tensor, ids: Tensor, noise: Tensor) -> Tensor:
        actions, log_probs = kernels.tanh_gaussian(*mine.policy(observations, ids), noise)
        logits = mine.critic(observations, actions, ids, frozen=True)
        return (0.1 * log_probs - kernels.expected_value(logits, mine.atoms).mean(0)).mean()

    parameters = list(mine.actor.parameters())
    arguments = batch.observations, batch.task_ids, noise.actor_action[0]
    expected = loss(*arguments)
    grads = torch.autograd.grad(expected, parameters)
    torch._dynamo.reset()
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(value, parameters), grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_compiled_loop_of_a_user_around_the_agent_equals_the_eager_one(tasks: int) -> None:
    """Acting is compiled, the update runs as it is between two compiled parts."""
    observations, ids = torch.randn(4, OBS), torch.zeros(4, dtype=torch.long)
    data, noise = batches(2, tasks)

    def turn(learner: BRC) -> tuple[Tensor, Tensor]:
        actions = learner.act(observations, ids)
        metrics = learner.update(data, noise=noise)
        return actions, metrics["critic_loss"] + metrics["actor_loss"]

    torch._dynamo.reset()
    compiled = torch.compile(turn, backend="aot_eager")
    one, other = agent(tasks), agent(tasks)
    for _ in range(3):
        for mine, expected in zip(compiled(one), turn(other), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(one.critics.master, other.critics.master)


def test_a_compiled_step_of_a_user_equals_the_eager_one() -> None:
    """zero_grad, loss, backward and a step of torch.optim, on the agent's own parameters."""
    data, noise = batches(3, 2)
    results = []
    for compiled in (False, True):
        mine = agent(2)
        optimizer = torch.optim.AdamW(mine.critic.parameters(), lr=1e-3)
        target = mine.critic_target(data.update(0), noise.next_action[0]).probs

        def step(
            batch: Batch, target: Tensor, mine: BRC = mine, optimizer: torch.optim.Optimizer = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            logits = mine.critic(batch.observations, batch.actions, batch.task_ids)
            loss = kernels.categorical_cross_entropy(logits, target).mean(-1).sum()
            loss.backward()
            optimizer.step()
            return loss.detach()

        torch._dynamo.reset()
        run = torch.compile(step, backend="aot_eager") if compiled else step
        losses = torch.stack([run(data.update(update), target) for update in range(3)])
        results.append((losses, mine.critics.master.clone()))
        fresh = agent(2).critics.master
        assert not torch.equal(fresh[:2], mine.critics.master[:2])  # the buffer itself has moved
        assert torch.equal(fresh[2:], mine.critics.master[2:])
        mine.update(data, noise)  # and the agent's own update goes on from there
        assert mine.critics.master.isfinite().all()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
