"""The names of parameters in the authors' JAX code, and ours.

A network of theirs is a tree of arrays, here by paths such as `BroNet_0/Dense_0/kernel`. Kernels are
[inputs, outputs] in both; their ensembles' arrays have a leading axis [E], ours all have one. Their actor has
mean and raw log-std in two output layers, ours in the halves of one.

Source: naumix/BiggerRegularizedCategorical (eec512f), as recorded updates of it name its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from brc_fast.config import ActorConfig, CriticConfig, TrainConfig
from brc_fast.errors import InputError

from .brc import BRC

NETWORKS = {  # theirs: ours
    "critic": "critic",
    "target_critic": "target_critic",
    "actor": "actor",
    "temp": "temperature",
}
_BODIES = {"actor": "BroNet_0/", "critic": "q_value_ensemble/q_value_ensemble/critic/"}
EMBEDDING = "task_embedding/embeddings/embedding"


def body(network: str) -> str:
    """Where the layers of a network's body lie."""
    return _BODIES["actor" if network == "actor" else "critic"]


def blocks(network: str, paths: Iterable[str]) -> int:
    """How many residual blocks the arrays at these paths belong to."""
    found = (re.match(rf"{body(network)}BronetBlock_\d+/", path) for path in paths)
    return len({each[0] for each in found if each})


def paths_of(network: str, depth: int, embedding: bool) -> dict[str, tuple[str, ...]]:
    """By the name of each of our parameters, the paths of theirs whose last axes, joined, it is.

    network: a key of NETWORKS. depth: residual blocks. embedding: whether the critic has one of tasks.
    """
    if network == "temp":
        return {"log_alpha": ("log_temp",)}
    start = body(network)
    out: dict[str, tuple[str, ...]] = {}

    def layer(ours: str, folder: str, number: int) -> None:
        theirs = {"kernel": "Dense", "bias": "Dense", "norm_weight": "LayerNorm", "norm_bias": "LayerNorm"}
        for name, kind in theirs.items():
            last = {"norm_weight": "scale", "norm_bias": "bias"}.get(name, name)
            out[f"body.{ours}.{name}"] = (f"{folder}{kind}_{number}/{last}",)

    layer("input", start, 0)
    for block in range(depth):
        for number in range(2):
            layer(f"blocks.{block}.{number}", f"{start}BronetBlock_{block}/", number)
    heads = ("Dense_0", "Dense_1") if network == "actor" else (f"{start}Dense_1",)
    for name in ("kernel", "bias"):
        out[f"body.head.{name}"] = tuple(f"{head}/{name}" for head in heads)
    return out | ({"embedding": (EMBEDDING,)} if embedding and network != "actor" else {})


def from_flax(network: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of our module out of the arrays of their network, by path, all of which are there."""
    depth = blocks(network, arrays)
    out = {}
    for name, paths in paths_of(network, depth, EMBEDDING in arrays).items():
        joined = torch.cat([arrays[path] for path in paths], -1) if len(paths) > 1 else arrays[paths[0]]
        out[name] = joined[None] if network == "actor" else joined  # ours is a stack of one
    return out


def to_flax(network: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays of their network, by path, out of the state of our module."""
    numbers = (re.match(r"body\.blocks\.(\d+)\.", name) for name in state)
    depth = max((int(each[1]) + 1 for each in numbers if each), default=0)
    out: dict[str, Tensor] = {}
    for name, paths in paths_of(network, depth, "embedding" in state).items():
        value = state[name].squeeze(0) if network == "actor" else state[name]
        out |= dict(zip(paths, value.chunk(len(paths), -1) if len(paths) > 1 else (value,), strict=True))
    return out


def config_of(
    networks: Mapping[str, Mapping[str, Tensor]], config: TrainConfig
) -> tuple[TrainConfig, int, int]:
    """The settings with the sizes of these networks, and the numbers O and A of an observation and an action.

    InputError for arrays that are missing or have not the axes that theirs have.
    """
    actor, critic = networks["actor"], networks["critic"]

    def shape(network: str, path: str, axes: int) -> tuple[int, ...]:
        found = networks[network].get(path)
        if found is None:
            raise InputError(f"{network} lacks {path}")
        if found.dim() != axes or not found.numel():
            raise InputError(f"{network}/{path} must have {axes} axes, got {list(found.shape)}")
        return tuple(found.shape)

    seen, width = shape("actor", f"{body('actor')}Dense_0/kernel", 2)
    (action,) = shape("actor", "Dense_0/bias", 1)
    members, _, wide = shape("critic", f"{body('critic')}Dense_0/kernel", 3)
    _, atoms = shape("critic", f"{body('critic')}Dense_1/bias", 2)
    tasks, columns = shape("critic", EMBEDDING, 2) if EMBEDDING in critic else (1, 0)
    if len(config.tasks) != tasks:
        given = ", ".join(config.tasks) or "none"
        raise InputError(f"the checkpoint has {tasks} tasks: name as many with --tasks, got {given}")
    if seen <= columns:
        raise InputError(f"actor must observe more than the {columns} numbers of a task, got {seen}")
    found = TrainConfig(
        tasks=config.tasks,
        critic=CriticConfig(
            width=wide,
            depth=blocks("critic", critic),
            members=members,
            num_atoms=atoms,
            v_max=config.critic.v_max,
            embedding_size=columns or CriticConfig.embedding_size,
        ),
        actor=ActorConfig(width=width, depth=blocks("actor", actor)),
    )
    return found, seen - columns, action


def require_shapes(networks: Mapping[str, Mapping[str, Tensor]], agent: BRC) -> None:
    """InputError with the first path that is missing, unknown, or has another shape than this agent has."""
    for theirs, arrays in networks.items():
        wanted = to_flax(theirs, module_of(agent, theirs))
        for path in sorted(wanted.keys() | arrays.keys()):
            if path not in arrays or path not in wanted:
                told = "lacks" if path in wanted else "has an unknown array"
                raise InputError(f"{theirs} {told} {ascii(path)[1:-1]:.100}")
            if arrays[path].shape != wanted[path].shape:
                must, got = list(wanted[path].shape), list(arrays[path].shape)
                raise InputError(f"{theirs}/{path} must have shape {must}, got {got}")


def module_of(agent: BRC, network: str) -> dict[str, Tensor]:
    """The state of the agent's module that their network is."""
    module = getattr(agent, NETWORKS[network])
    return {name: p.detach() for name, p in module.named_parameters()}


def require_theirs(config: TrainConfig) -> None:
    """InputError for an agent that the authors' networks cannot be."""
    only = {"body": "bronet", "loss": "categorical", "conditioning": "embedding", "embedding_norm": "l2"}
    told: dict[str, tuple[Any, Any]] = {
        f"critic.{name}": (getattr(config.critic, name), value) for name, value in only.items()
    }
    told["actor.body"] = config.actor.body, "bronet"
    told["normalize_observations"] = config.normalize_observations, False
    for name, (found, value) in told.items():
        if found != value:
            raise InputError(f"the authors' networks have {name} {value}, and the run's has {found}")
