"""What a run takes of a device's memory, before anything is allocated, and what there is of it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from brc_fast.agents.brc import BRC
from brc_fast.batch import Batch
from brc_fast.config import TrainConfig
from brc_fast.errors import InputError
from brc_fast.nn import bodies
from brc_fast.replay.fields import Schema
from brc_fast.spec import Spec

MEMORY = "free memory"
SLOT, PROCESS = 20_000, 30_000_000  # bytes of an environment in this process, and in one of its own, at least
ARM = (
    30_000_000  # and of a MetaWorld task in EnvPool: 88 environments of 8 tasks take 3.2 GB, with the process
)
LIBRARIES = 2**30  # CUDA's context, cuBLAS' workspaces, compiled kernels: about this much, not computed


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a learner, from the shapes of all that it allocates.

    state: of parameters, targets, moments, gradients and low-precision copies. passes: of what the forward
    and backward passes keep, for B rows (on a GPU without the norms' partial sums, which are small). batches:
    of two sets of input slots, and of normalized observations. libraries: a rough allowance on a GPU.
    """

    parameters: int
    state: int
    passes: int
    batches: int
    libraries: int

    @property
    def total(self) -> int:
        return self.state + self.passes + self.batches + self.libraries

    def __str__(self) -> str:
        share = self.state / self.parameters
        return (
            f"{self.parameters / 1e6:.1f} M parameters take {_told(self.state)} ({share:.1f} bytes each), "
            f"the passes {_told(self.passes)}, batches {_told(self.batches)}, libraries "
            f"{_told(self.libraries)}: {_told(self.total)}"
        )


def _told(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def bytes_of(*tensors: Tensor | None) -> int:
    """Of different tensors, each whole."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def plan_memory(config: TrainConfig, spec: Spec, device: str) -> MemoryPlan:
    """What the learner of a run will take of `device`; the learner is built without memory to find out."""
    try:
        agent = BRC.from_config(config, spec, "meta")
    except RuntimeError as error:  # torch counts bytes with 63 bits
        raise InputError(f"the learner does not fit: {error}; lower --critic.width") from error
    state = bytes_of(
        *(buffer for module in (agent.critic, agent.target_critic) for buffer in module.buffers())
    )
    for networks, optimizer in (
        (agent.critics, agent.critic_optimizer),
        (agent.actors, agent.actor_optimizer),
    ):
        state += bytes_of(networks.master, networks.low, networks.grad)
        if config.transfer.freeze:  # which parameters stay, and what they and their target were
            state += bytes_of(networks.master) + networks.grad.numel()
        state += bytes_of(optimizer.exp_avg, optimizer.exp_avg_sq)
    modules = agent.critic, agent.actor
    parameters = sum(p.numel() for module in modules for p in module.parameters())

    rows, updates = config.transitions_per_update, config.updates_per_step

    def field(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(updates, rows, *shape, dtype=dtype, device="meta")

    seen = agent.observation_size + agent.privileged_size
    batches = Batch(
        field(seen),
        field(agent.action_size),
        field(),
        field(),
        field(seen),
        field(dtype=torch.int64),
    )
    normalized = 0
    if agent.observations is not None:
        state += bytes_of(*agent.observations.state_dict().values())
        normalized = bytes_of(batches.observations, batches.next_observations)
    plans = agent.plans(batches.update(0))
    kept = sum(plan.bytes(device) for plan in plans.all())
    cuda = torch.device(device).type == "cuda"
    slots = (2 if cuda else 1) * bytes_of(*batches.columns)
    return MemoryPlan(parameters, state, kept, slots + normalized, LIBRARIES if cuda else 0)


@dataclass(frozen=True)
class Need:
    """Memory that a part of a run takes of a device.

    size: bytes. told: what they are, in words. remedy: settings that make it smaller.
    """

    name: str
    size: int
    device: str
    told: str
    remedy: str
    about: bool = False  # an estimate

    @property
    def amount(self) -> str:
        return f"{'about ' if self.about else ''}{_told(self.size)}"


def learner(plan: MemoryPlan, device: str, precision: str = "") -> Need:
    return Need("learner", plan.total, device, f"{plan}{precision}", "--critic.width or --batch-size")


def plan_run(config: TrainConfig, spec: Spec, device: str) -> list[Need]:
    """What a training run takes, part by part; nothing is allocated to find out."""
    needed = learner(plan_memory(config, spec, device), device, f" in {config.precision}")
    stride = Schema.of(1, *spec.fields, None, (0,)).layout().stride
    return [needed, *_beside(config, stride)]


def plan_least(config: TrainConfig, device: str) -> list[Need]:
    """What a training run takes at least, before anything is known of its tasks: this takes no time."""
    each = sum(count * size for count, size in zip(parameters_at_least(config), (20, 16), strict=True))
    told = f"{sum(parameters_at_least(config)) / 1e6:.1f} M parameters take {_told(each)} at least"
    return [Need("learner", each, device, told, "--critic.width or --batch-size"), *_beside(config, 64)]


def parameters_at_least(config: TrainConfig) -> tuple[int, int]:
    """Parameters of the critics and of the actor, without what depends on the tasks."""

    def count(body: str, width: int, depth: int) -> int:
        stages = bodies.make(body, width, depth, 1)
        sizes = [1, *(stage.outputs for stage in stages)]
        return sum(sizes[stage.reads] * stage.outputs for stage in stages if stage.product)

    critic, actor = config.critic, config.actor
    return (
        critic.members * count(critic.body, critic.width, critic.depth),
        count(actor.body, actor.width, actor.depth),
    )


def _beside(config: TrainConfig, stride: int) -> list[Need]:
    """Replay, with rows of `stride` bytes, and environments, which live on the host."""
    tasks, capacity = max(1, len(config.tasks)), config.replay_capacity
    told = f"{capacity} transitions of each task take {_told(tasks * capacity * stride)}"
    played = config.eval_envs or config.eval_episodes
    return [
        Need("replay", tasks * (capacity + 3 * config.num_envs) * stride, "cpu", told, "--replay-capacity"),
        environments("environments", config, config.num_envs, "--num-envs"),
        environments("evaluation", config, played, "--eval-envs or --env.no-processes"),
    ]


def environments(name: str, config: TrainConfig, each: int, remedy: str) -> Need:
    """What the environments of all tasks take at least, roughly, `each` of every task."""
    size = sum(_slot(task, each, config.env.processes) * each for task in config.tasks)
    told = f"{each} environments of each task take about {_told(size)}"
    return Need(name, size, "cpu", told, remedy, about=True)


def _slot(task: str, each: int, processes: bool | None) -> int:
    """Bytes of one environment, about what gym/Pendulum-v1 takes: others take more."""
    backend = task.partition("/")[0]
    if task.startswith(("metaworld/", "envpool/MetaWorld/")):
        return ARM
    if processes is None:
        processes = backend in ("dmc", "humanoidbench") and each > 1
    return PROCESS if processes and backend in ("gym", "dmc", "humanoidbench") else SLOT


def table(needs: Sequence[Need]) -> str:
    """The parts with what they take, and for each device what it has."""
    width = max(len(need.amount) for need in needs)
    lines = [f"memory {'needs':>{8 + width}}"]
    lines += [f"  {need.name:<12} {need.amount:>{width}}  {need.device}: {need.told}" for need in needs]
    for device in dict.fromkeys(need.device for need in needs):
        total = sum(need.size for need in needs if need.device == device)
        lines.append(f"  {'in all':<12} {_told(total):>{width}}  {device}, which has {_room(device)}")
    return "\n".join(lines)


def require_fit(needs: Sequence[Need]) -> None:
    """InputError, with the numbers and what to lower, where a device has less than its parts take."""
    for device in dict.fromkeys(need.device for need in needs):
        here = [need for need in needs if need.device == device]
        total = sum(need.size for need in here)
        if total <= available(device):
            continue
        largest = max(here, key=lambda need: need.size)
        rest = f", and all parts {_told(total)}" if len(here) > 1 else ""
        verb = "do" if largest.name.endswith("s") else "does"
        raise InputError(
            f"the {largest.name} {verb} not fit: {largest.told}{rest}, but {device} has {_room(device)}; "
            f"lower {largest.remedy}"
        )


def require_memory(plan: MemoryPlan, device: str) -> None:
    """InputError with the numbers where a learner does not fit."""
    require_fit([learner(plan, device)])


def require_room(name: str, size: int) -> None:
    """InputError for a file that is larger than the memory it would be read into."""
    if size > available("cpu"):
        raise InputError(f"{name} has {_told(size)}, and there are {_room('cpu')} of memory to read it into")


def available(device: str) -> int:
    """Bytes that are free on a GPU; on a CPU nine tenths of what the tightest of its `limits` leaves."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min(limits().values()) * 9 // 10)


def _room(device: str) -> str:
    """What is available, and what limits it where that is not the memory itself."""
    told, left = _told(available(device)), limits()
    tightest = min(left, key=lambda name: left[name])
    return told if device != "cpu" or tightest == MEMORY else f"{told} ({tightest})"


def limits(root: Path = Path("/")) -> dict[str, int]:
    """Bytes that this process can still take, by what limits them: memory that is free, `ulimit`, and every
    control group that it is in, of version 1 or 2, or that holds one of those.

    root: where /proc and the control groups are looked for.
    """
    found = {MEMORY: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    told = dict(line.split(":", 1) for line in _lines(root / "proc/meminfo") if ":" in line)
    if "MemAvailable" in told:
        found[MEMORY] = 1024 * int(told["MemAvailable"].split()[0])
    if _lines(root / "proc/sys/vm/overcommit_memory")[:1] == ["2"] and "CommitLimit" in told:
        committed = [int(told[name].split()[0]) for name in ("CommitLimit", "Committed_AS")]
        found["vm.overcommit_memory 2"] = 1024 * (committed[0] - committed[1])
    pages = [int(word) for line in _lines(root / "proc/self/statm")[:1] for word in line.split()]
    for name, kind, place in (("ulimit -v", resource.RLIMIT_AS, 0), ("ulimit -d", resource.RLIMIT_DATA, 5)):
        most = resource.getrlimit(kind)[0]
        if most != resource.RLIM_INFINITY and pages:
            found[name] = most - pages[place] * os.sysconf("SC_PAGE_SIZE")
    for folder, mount in _control_groups(root):
        for group in (folder, *folder.parents):
            left = _left_in(group)
            if left is not None:
                found[f"control group {group}"] = left
            if group == mount:
                break
    return found


def _control_groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """Folders of the control groups that count this process's memory, and where their trees are mounted."""
    mine: dict[str, str] = {}  # by the kind of tree
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mine["cgroup2"] = path
        elif "memory" in controllers.split(","):
            mine["cgroup"] = path
    for line in _lines(root / "proc/self/mountinfo"):
        words, _, rest = line.partition(" - ")
        kind, options = rest.split()[:1], rest.split()[-1:]
        if kind not in (["cgroup2"], ["cgroup"]) or kind[0] not in mine:
            continue
        if kind == ["cgroup"] and "memory" not in options[0].split(","):
            continue
        top, place = words.split()[3:5]
        mount = root / place.lstrip("/")
        inside = Path(mine[kind[0]])
        inside = inside.relative_to(top) if inside.is_relative_to(top) else Path()
        yield (mount if ".." in inside.parts else mount / inside), mount


def _left_in(group: Path) -> int | None:
    """Bytes that a control group may still take; None without a limit. Files that are cached do not count."""
    for names, current, cached in (
        (("memory.max", "memory.high"), "memory.current", "inactive_file"),
        (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most = [int(line) for name in names for line in _lines(group / name)[:1] if line.isdigit()]
        used = [int(line) for line in _lines(group / current)[:1] if line.isdigit()]
        if most and used:
            stat = dict(line.split()[:2] for line in _lines(group / "memory.stat") if len(line.split()) == 2)
            return min(most) - used[0] + int(stat.get(cached, 0))
    return None


def _lines(file: Path) -> list[str]:
    """Of a file of the system's; none where it is not there."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
