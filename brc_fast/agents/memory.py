"""What a learner takes of a device's memory, before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from brc_fast.agents.brc import BRC
from brc_fast.batch import Batch
from brc_fast.config import TrainConfig
from brc_fast.errors import InputError
from brc_fast.spec import Spec

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
        state += bytes_of(optimizer.exp_avg, optimizer.exp_avg_sq)
    modules = agent.critic, agent.actor
    parameters = sum(p.numel() for module in modules for p in module.parameters())

    rows, updates = config.transitions_per_update, config.updates_per_step

    def field(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(updates, rows, *shape, dtype=dtype, device="meta")

    batches = Batch(
        field(agent.observation_size),
        field(agent.action_size),
        field(),
        field(),
        field(agent.observation_size),
        field(dtype=torch.int64),
    )
    normalized = 0
    if agent.observations is not None:
        state += bytes_of(*agent.observations.state_dict().values())
        normalized = bytes_of(batches.observations, batches.next_observations)
    plans = agent.plans(batches.update(0))
    kept = sum(plan.bytes(device) for plan in plans.all())
    cuda = torch.device(device).type == "cuda"
    slots = (2 if cuda else 1) * bytes_of(*batches)
    return MemoryPlan(parameters, state, kept, slots + normalized, LIBRARIES if cuda else 0)


def available(device: str) -> int:
    """Bytes that are free on a GPU; on a CPU nine tenths of what the system can give, or of all memory where
    it does not tell: the replay and the environments live there too."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = Path("/proc/meminfo")
    for line in told.read_text().splitlines() if told.exists() else ():
        if line.startswith("MemAvailable:"):
            total = 1024 * int(line.split()[1])
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))  # of a container
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()) - int(used.read_text()))
    return total * 9 // 10


def require_memory(plan: MemoryPlan, device: str) -> None:
    """InputError with the numbers where a plan does not fit."""
    there = available(device)
    if plan.total > there:
        raise InputError(
            f"the learner does not fit: {plan}, but {device} has {_told(there)}; lower --critic.width or "
            "--batch-size"
        )
