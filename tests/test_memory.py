"""The memory plan: what it says before anything is built is what a learner then takes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import torch
from kernel_harness import bytes_beside, tensors_of

from brc_fast import BRC, Batch, ReplayBuffer, envs
from brc_fast.agents import memory
from brc_fast.agents.memory import MemoryPlan, available, bytes_of, plan_memory, require_memory
from brc_fast.command import main as cli
from brc_fast.config import ActorConfig, CriticConfig, TrainConfig
from brc_fast.errors import InputError
from brc_fast.spec import Spec

GB = 10**9


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a run; small products only wait for more of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(tasks: int = 1, **changes: Any) -> TrainConfig:
    small = TrainConfig(
        tuple(f"toy/{i}" for i in range(tasks)),
        batch_size=20,
        updates_per_step=3,
        critic=CriticConfig(width=40, depth=2, num_atoms=21, embedding_size=4),
        actor=ActorConfig(width=24),
    )
    return dataclasses.replace(small, **changes)


def built(of: TrainConfig) -> tuple[BRC, Batch]:
    """A learner after an update, and the batch of it."""
    agent = BRC.from_config(of, Spec.vectors(7, 3, of.tasks), "cpu")
    rows = of.updates_per_step, of.transitions_per_update
    batch = Batch(
        torch.randn(*rows, 7),
        torch.rand(*rows, 3),
        torch.rand(rows),
        torch.ones(rows),
        torch.randn(*rows, 7),
        torch.randint(len(of.tasks), rows),
    )
    agent.update(batch)
    return agent, batch


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_plan_tells_what_a_built_learner_takes(tasks: int, precision: str, recompute: bool) -> None:
    """State by the pieces of memory behind networks and optimizers; passes by those behind an update's."""
    settings = config(tasks, precision=precision, recompute=recompute)
    plan = plan_memory(settings, Spec.vectors(7, 3, settings.tasks), "cpu")
    agent, batch = built(settings)
    networks = agent.critics, agent.actors, agent.critic_optimizer, agent.actor_optimizer
    scalars = 3 * 2 * 4  # of each optimizer: steps, learning rate, tau
    assert bytes_beside(networks) - scalars == plan.state
    assert plan.parameters == sum(p.numel() for m in (agent.critic, agent.actor) for p in m.parameters())
    passes = agent.plans(batch.update(0))
    # inputs [B, I], and the gradient of what the actor puts out, are of a row's size, not of a layer's
    rows = [x for x in tensors_of(passes) if x.dim() == 2], passes.dhead
    assert bytes_beside(passes, networks, rows) == plan.passes
    assert (
        plan.batches == bytes_of(*batch.columns) == sum(x.numel() * x.element_size() for x in batch.columns)
    )
    assert plan.libraries == 0
    assert plan.total == plan.state + plan.passes + plan.batches


def test_a_plan_of_a_gpu_has_two_sets_of_slots_and_an_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    """And room for the gradients of all products but the first, of the input; nothing is asked of the GPU."""
    spec = Spec.vectors(7, 3, config().tasks)
    here, there = (plan_memory(config(), spec, device) for device in ("cpu", "cuda"))
    assert there.batches == 2 * here.batches
    assert there.libraries == 2**30
    assert there.state == here.state
    critics, actor = 2 * 20 * 40 * 4, 20 * 24 * 4  # one layer of the trained networks, in bytes
    assert there.passes - here.passes == (6 - 3) * critics + (4 - 3) * actor


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(("width", "millions"), [(1024, 9), (2048, 34), (4096, 136), (11200, 1006)])
def test_wide_critics_take_no_more_than_24_bytes_per_parameter(
    width: int, millions: int, precision: str
) -> None:
    """The published sizes; a billion parameters are planned without their memory."""
    settings = TrainConfig(("toy/One",), precision=precision, critic=CriticConfig(width=width))  # type: ignore[arg-type]
    plan = plan_memory(settings, Spec.vectors(67, 21, settings.tasks), "cuda")
    assert plan.parameters == pytest.approx(millions * 1e6, rel=0.06)
    each = 22 if precision == "bf16" else 20  # parameter, target, gradient, moments; copies of the first two
    assert plan.state <= 24 * plan.parameters
    assert abs(plan.state / plan.parameters - each) < 0.1  # the actor has no target


def test_the_message_has_the_numbers() -> None:
    plan = MemoryPlan(1_005_000_000, 20_100_000_000, 2_500_000, 99_900_000, 2**30)
    assert plan.total == 20_100_000_000 + 2_500_000 + 99_900_000 + 2**30
    assert str(plan) == (
        "1005.0 M parameters take 20.10 GB (20.0 bytes each), the passes 2.5 MB, batches 99.9 MB, "
        "libraries 1.07 GB: 21.28 GB"
    )


def test_a_plan_that_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = MemoryPlan(10**9, 20 * GB, 3 * GB, GB, GB)
    asked = []
    monkeypatch.setattr(memory, "available", lambda device: asked.append(device) or plan.total)
    require_memory(plan, "cuda")
    assert asked == ["cuda"]
    monkeypatch.setattr(memory, "available", lambda device: 24 * GB)
    with pytest.raises(InputError) as refused:
        require_memory(plan, "cuda")
    told = str(refused.value)
    assert str(plan) in told
    assert "25.00 GB, but cuda has 24.00 GB; lower --critic.width or --batch-size" in told


def test_what_is_available_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10**8 < available("cpu") < 10**14
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (5 * GB, 16 * GB))
    assert available("cuda") == available("cuda:0") == 5 * GB


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB"}
MOUNT = "30 25 0:26 {top} /sys/fs/cgroup{place} rw,nosuid shared:9 - {kind} cgroup rw,{options}"


@pytest.mark.parametrize("top", ["/", "/machine"])
@pytest.mark.parametrize("tight", ["memory.max", "memory.high"])
@pytest.mark.parametrize("level", ["", "a", "a/b", "a/b/c"])
def test_the_tightest_of_all_control_groups_around_counts(
    tmp_path: Path, level: str, tight: str, top: str
) -> None:
    """Of version 2, nested: what files keep in memory does not count, and "max" is no limit."""
    inside = "/a/b/c" if top == "/" else f"{top}/a/b/c"
    mount = MOUNT.format(top=top, place="", kind="cgroup2", options="nsdelegate")
    files = {**MEMINFO, "proc/self/cgroup": f"0::{inside}", "proc/self/mountinfo": mount}
    for each in ("a", "a/b", "a/b/c"):
        group = f"sys/fs/cgroup/{each}"
        files |= {
            f"{group}/memory.max": "max",
            f"{group}/memory.current": "1",
            f"{group}/memory.stat": "anon 1",
        }
    group = f"sys/fs/cgroup/{level}".rstrip("/")
    stat = "anon 500\ninactive_file 200\nactive_file 9"
    files |= {f"{group}/{tight}": "5000", f"{group}/memory.current": "1700", f"{group}/memory.stat": stat}
    found = memory.limits(tree(tmp_path, files))
    assert found[memory.MEMORY] == 8_000_000 * 1024
    assert min(found.values()) == found[f"control group {tmp_path / group}"] == 3500


def test_a_control_group_of_version_1_counts(tmp_path: Path) -> None:
    mount = MOUNT.format(top="/", place="/memory", kind="cgroup", options="memory")
    other = MOUNT.format(top="/", place="/cpu", kind="cgroup", options="cpu,cpuacct")
    files = {
        **MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/job/step",
        "proc/self/mountinfo": f"{other}\n{mount}",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9000",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "4000",
        "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 1000",
        "sys/fs/cgroup/memory/job/step/memory.limit_in_bytes": str(2**63 - 4096),
        "sys/fs/cgroup/memory/job/step/memory.usage_in_bytes": "4000",
    }
    found = memory.limits(tree(tmp_path, files))
    assert min(found.values()) == found[f"control group {tmp_path / 'sys/fs/cgroup/memory/job'}"] == 6000


def test_a_strict_system_gives_no_more_than_it_has_not_promised_yet(tmp_path: Path) -> None:
    told = "MemAvailable: 8000000 kB\nCommitLimit: 5000 kB\nCommitted_AS: 3000 kB"
    files = {"proc/meminfo": told, "proc/sys/vm/overcommit_memory": "2"}
    assert min(memory.limits(tree(tmp_path, files)).values()) == 2000 * 1024


def test_ulimit_counts_and_is_named() -> None:
    code = """
import resource
from brc_fast.agents import memory
before = memory.limits()
for name, kind, column in (("ulimit -d", resource.RLIMIT_DATA, 5), ("ulimit -v", resource.RLIMIT_AS, 0)):
    used = int(open("/proc/self/statm").read().split()[column]) * resource.getpagesize()
    resource.setrlimit(kind, (used + 10**9, used + 10**9))
    print(name in before, abs(memory.limits()[name] - 10**9) < 10**8, memory.available("cpu") < 10**9)
    try:
        memory.require_room("x", 10**12)
    except ValueError as error:
        print(error)
"""
    first, told, second, _ = fresh.run(code).stdout.strip().splitlines()
    assert first == second == "False True True"
    assert told.startswith("x has 1000.00 GB, and there are ")
    assert "(ulimit -d)" in told


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_plan_tells_what_a_replay_takes(tasks: int) -> None:
    settings = config(tasks, replay_capacity=500_000, num_envs=4)
    spec = Spec.vectors(7, 3, settings.tasks)
    (planned,) = (need for need in memory.plan_run(settings, spec, "cpu") if need.name == "replay")
    ids = np.repeat(np.arange(tasks), settings.num_envs)
    built = ReplayBuffer(settings.replay_capacity, *spec.fields, task_ids=ids)
    assert built.nbytes == pytest.approx(planned.size, rel=0.2)
    (least,) = (need for need in memory.plan_least(settings, "cpu") if need.name == "replay")
    assert least.size <= planned.size


def test_the_least_plan_asks_for_no_more_than_the_plan() -> None:
    for body in ("bronet", "simba", "mlp"):
        critic = CriticConfig(width=40, depth=2, num_atoms=21, embedding_size=4, body=body)
        settings = config(critic=critic)
        spec = Spec.vectors(7, 3, settings.tasks)
        least, plan = (
            {need.name: need.size for need in needs}
            for needs in (memory.plan_least(settings, "cpu"), memory.plan_run(settings, spec, "cpu"))
        )
        assert least.keys() == plan.keys()
        assert all(least[name] <= plan[name] for name in plan)
        assert least["learner"] > plan["learner"] // 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"replay_capacity": 10**8}, "the replay does not fit: .* lower --replay-capacity$"),
        ({"num_envs": 2**20}, "the environments do not fit: .* lower --num-envs$"),
        ({"eval_envs": 2**20}, "the evaluation does not fit: .* lower --eval-envs"),
        ({"critic": CriticConfig(width=2**17)}, "the learner does not fit: .* lower --critic.width or"),
    ],
)
def test_what_takes_the_most_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 4 * 10**9)
    with pytest.raises(InputError, match=told):
        memory.require_fit(memory.plan_least(config(**{"replay_capacity": 1000} | changes), "cpu"))


def test_an_evaluation_of_metaworld_takes_gigabytes() -> None:
    tasks = envs.list_tasks("metaworld/study8")
    need = memory.environments("evaluation", TrainConfig(tasks=tasks), 10, "--eval-envs")
    assert 2e9 < need.size < 4e9  # measured: 3.2 GB, with the process


def watch(monkeypatch: pytest.MonkeyPatch, built: list[str]) -> None:
    """Note every learner that gets memory, and every replay."""
    make = BRC.__init__

    def noted(self: BRC, *sizes: Any, **options: Any) -> None:
        if options["device"] != "meta":
            built.append("learner")
        make(self, *sizes, **options)

    monkeypatch.setattr(BRC, "__init__", noted)
    from brc_fast.runs import trainer

    replay = trainer.ReplayBuffer

    def noted_replay(*arguments: Any, **options: Any) -> Any:
        built.append("replay")
        return replay(*arguments, **options)

    monkeypatch.setattr(trainer, "ReplayBuffer", noted_replay)


WORDS = [
    "--num-envs",
    "2",
    "--steps",
    "20",
    "--random-steps",
    "10",
    "--batch-size",
    "4",
    "--eval-episodes",
    "2",
]
SMALL = ["--critic.width", "16", "--actor.width", "16", "--device", "cpu"]


def test_a_run_tells_its_plan_before_anything_is_built(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []
    told: list[tuple[str, int]] = []
    watch(monkeypatch, made)
    say = MemoryPlan.__str__
    monkeypatch.setattr(MemoryPlan, "__str__", lambda self: told.append((say(self), len(made))) or say(self))
    assert cli.main(["train", "toy/One", "--run", str(tmp_path / "run"), *WORDS, *SMALL]) == 0
    ((message, before),) = told
    assert before == 0
    assert made == ["learner", "replay"]
    out = capsys.readouterr().out
    assert f"  cpu: {message} in fp32\n" in out
    for part in ("learner", "replay", "environments", "evaluation", "in all"):
        assert f"\n  {part} " in out


def test_a_run_that_does_not_fit_is_refused_before_anything_is_built_or_written(
    toy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []
    watch(monkeypatch, made)
    monkeypatch.setattr(memory, "available", lambda device: 2 * 10**5)
    words = [*WORDS, *SMALL, "--replay-capacity", "100"]
    assert cli.main(["train", "toy/One", "--run", str(tmp_path / "run"), *words]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("memory ")
    (told,) = printed.err.strip().splitlines()
    assert told.startswith("brc-fast: the learner does not fit: 0.0 M parameters take ")
    assert re.search(
        r", and all parts \d\.\d MB, but cpu has 0\.2 MB; lower --critic\.width or --batch-size$", told
    )
    assert made == []
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_the_device_lacks_is_one_line(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "toy/One", "--run", str(tmp_path / "run"), *WORDS, *SMALL, "--precision", "tf32"]
    assert cli.main(words) == 2
    assert "precision tf32 needs a CUDA device" in capsys.readouterr().err


def test_a_run_of_a_gpu_can_be_evaluated_without_one(toy: dict, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", "toy/One", "--run", str(run), *WORDS, *SMALL]) == 0
    file = run / "config.json"
    file.write_text(file.read_text().replace('"fp32"', '"tf32"'))
    assert cli.main(["evaluate", str(run), "--episodes", "3"]) == 0
