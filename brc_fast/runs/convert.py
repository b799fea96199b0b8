"""Checkpoints of the authors' code: bytes of flax.serialization, which are MessagePack and no pickle.

    FOLDER/actor.txt  critic.txt  target_critic.txt  temp.txt      a file per network, as their code writes it
    FILE.msgpack                                                   one of all, by these names

An array is an extension of type 1: MessagePack of (shape, name of the dtype, bytes). Larger ones than 1 GiB
are maps of chunks. Nothing but maps, and arrays of numbers with 16 bits or more after the point, is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brc_fast.agents import flax
from brc_fast.agents.brc import BRC
from brc_fast.agents.memory import require_room
from brc_fast.config import CriticConfig, TrainConfig
from brc_fast.disk import opened, replace_file, require_replaceable
from brc_fast.errors import InputError
from brc_fast.spec import Spec

from .arrays import Arrays
from .checkpoint import RunFolder
from .evaluate import restore

ARRAY, SCALAR = 1, 3  # flax's types of extensions
DTYPES = ("float32", "float64", "float16", "bfloat16")
DEEPEST, MOST_NAMES, LONGEST_NAME = 12, 20_000, 200
CHUNKED, CHUNK = "__msgpack_chunked_array__", 2**30
OPTIONAL = ("target_critic", "temp")


def unpack(data: bytes) -> Arrays:
    """The arrays of a flax checkpoint by their paths, `critic/.../kernel`; ValueError for anything else."""
    try:
        tree = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_array,
            object_pairs_hook=_once,
            max_str_len=LONGEST_NAME,
            max_map_len=MOST_NAMES,
            max_array_len=64,
            max_bin_len=0,
        )
    except msgpack.exceptions.StackError as error:
        raise ValueError("it is nested too deep") from error
    except (msgpack.exceptions.UnpackException, msgpack.exceptions.ExtraData) as error:
        told = str(error) if str(error) else type(error).__name__
        raise ValueError(f"it is no MessagePack, or damaged: {told:.200}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(tree, dict):
        raise ValueError(f"it must hold a map of arrays by name, got {type(tree).__name__}")
    out: Arrays = {}
    _flatten(tree, "", 0, out)
    return out


def _once(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if not isinstance(name, str):
            raise ValueError(f"names must be text, got {name!r:.60}")
        if name in out:
            raise ValueError(f"it has {name!a:.60} twice")
        out[name] = value
    return out


def _array(code: int, data: bytes) -> NDArray[Any]:
    """An array of an extension, whose bytes stay where they are; of bfloat16 as float32."""
    if code not in (ARRAY, SCALAR):
        raise ValueError(f"it has an extension of type {code}, and only arrays, of type 1 and 3, are read")
    parts = msgpack.unpackb(
        data, raw=False, ext_hook=_nothing, max_str_len=20, max_array_len=32, max_map_len=0
    )
    if not isinstance(parts, list) or len(parts) != 3:
        raise ValueError("an array must have shape, dtype and bytes")
    shape, dtype, held = parts
    if dtype not in DTYPES:
        raise ValueError(f"arrays must have one of the dtypes {', '.join(DTYPES)}, got {dtype!r:.60}")
    if not (isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**40 for size in shape)):
        raise ValueError(f"an array must have a shape, got {shape!r:.60}")
    size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    if not isinstance(held, bytes) or len(held) != math.prod(shape) * size:
        got = len(held) if isinstance(held, bytes) else held
        raise ValueError(
            f"an array {dtype}{shape} must have {math.prod(shape) * size} bytes, got {got!r:.60}"
        )
    if dtype == "bfloat16":
        return (np.frombuffer(held, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(held, np.dtype(dtype).newbyteorder("<")).reshape(shape)


def _nothing(code: int, data: bytes) -> None:
    raise ValueError(f"an array holds an extension of type {code}")


def _flatten(tree: dict[str, Any], start: str, depth: int, out: Arrays) -> None:
    if depth > DEEPEST:
        raise ValueError(f"it is nested too deep: at most {DEEPEST} maps in maps are read")
    for name, value in tree.items():
        path = f"{start}{name}"
        if isinstance(value, dict) and CHUNKED in value:
            out[path] = _joined(value, path)
        elif isinstance(value, dict):
            _flatten(value, f"{path}/", depth + 1, out)
        elif isinstance(value, np.ndarray):
            out[path] = value
        else:
            raise ValueError(f"{ascii(path)[1:-1]:.100} must be an array, got {type(value).__name__}")


def _joined(parts: dict[str, Any], path: str) -> NDArray[Any]:
    """An array that flax has cut in chunks."""
    shape, chunks = parts.get("shape"), parts.get("chunks")
    if parts.keys() == {CHUNKED, "shape", "chunks"} and isinstance(shape, dict) and isinstance(chunks, dict):
        sizes: list[Any]
        held: list[Any]
        sizes, held = ([each.get(str(i)) for i in range(len(each))] for each in (shape, chunks))
        whole = all(type(size) is int and size >= 0 for size in sizes)
        if whole and held and all(isinstance(each, np.ndarray) and each.ndim == 1 for each in held):
            joined: NDArray[Any] = np.concatenate(held)
            if joined.size == math.prod(sizes):
                return joined.reshape(sizes)
    raise ValueError(f"the chunks of {ascii(path)[1:-1]:.100} must be parts of one array")


def pack(arrays: Mapping[str, NDArray[np.float32]]) -> bytes:
    """What flax.serialization.msgpack_restore reads, of arrays by their paths."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = _chunks(array) if array.nbytes > CHUNK else _extension(array)
    packed: bytes = msgpack.packb(tree)
    return packed


def _extension(array: NDArray[Any]) -> Any:
    told = (array.shape, array.dtype.name, np.ascontiguousarray(array).tobytes())
    return msgpack.ExtType(ARRAY, msgpack.packb(told, use_bin_type=True))


def _chunks(array: NDArray[Any]) -> dict[str, Any]:
    flat, step = array.reshape(-1), CHUNK // array.itemsize
    chunks = [flat[i : i + step] for i in range(0, flat.size, step)]
    shape = {str(axis): size for axis, size in enumerate(array.shape)}
    return {CHUNKED: True, "shape": shape, "chunks": {str(i): _extension(x) for i, x in enumerate(chunks)}}


def read_networks(source: Path) -> dict[str, dict[str, Tensor]]:
    """Networks of a checkpoint, a file or a folder, by the authors' names, each by paths; float32.

    InputError for what is missing, unknown or damaged.
    """
    if source.is_dir():
        files = {name: source / f"{name}.txt" for name in flax.NETWORKS}
        files = {name: path for name, path in files.items() if path.exists() or name not in OPTIONAL}
    elif source.exists():
        files = {"": source}
    else:
        raise InputError(f"there is no checkpoint {source}")
    found: dict[str, dict[str, Tensor]] = {}
    for name, path in files.items():
        try:
            with opened(path) as stream:
                size = path.stat().st_size
                require_room(str(path), 3 * size)
                arrays = unpack(stream.read(size))
        except FileNotFoundError:
            told = "a folder of a flax checkpoint has actor.txt and critic.txt"
            raise InputError(f"{path} is missing: {told}") from None
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{path} is no flax checkpoint that can be read: {error}") from error
        for place, array in arrays.items():
            network, _, rest = (f"{name}/{place}" if name else place).partition("/")
            if network not in flax.NETWORKS or not rest:
                known = ", ".join(flax.NETWORKS)
                raise InputError(f"{path} has {ascii(network)[1:-1]:.60}, and not only the networks {known}")
            rest = rest.removeprefix("params/")
            values = torch.from_numpy(np.asarray(array, np.float32).copy())
            found.setdefault(network, {})[rest] = values
    for network in flax.NETWORKS:
        if network not in found and network not in OPTIONAL:
            raise InputError(f"{source} lacks the network {network}")
    return found


def from_flax(
    source: Path,
    target: RunFolder,
    tasks: Iterable[str],
    v_max: float = 10.0,
    step: int = 0,
    overwrite: bool = False,
) -> str:
    """Make a run of a checkpoint, with its agent at `step`: parameters are the checkpoint's, a target critic
    or temperature that it lacks begin as a new agent's, and optimizers begin anew. What was done, in a line.

    tasks: names, in the order of their ids. v_max: of the critic's support.
    """
    if not 0 <= step < 10**18:
        raise InputError(f"step must be in [0, 10**18), got {step}")
    given = TrainConfig(tasks=tuple(tasks), critic=CriticConfig(v_max=v_max))
    if len(set(given.tasks)) < len(given.tasks):
        raise InputError(f"tasks must differ, got {', '.join(given.tasks)}")
    networks = read_networks(source)
    target.refuse_existing(overwrite)
    try:
        config, observation, action = flax.config_of(networks, given)
        spec = Spec.vectors(observation, action, config.tasks)
        flax.require_shapes(networks, BRC.from_config(config, spec, "meta"))
        agent = BRC.from_config(config, spec, "cpu")
        state = agent.state_dict()
        missing = [name for name in OPTIONAL if name not in networks]
        networks.setdefault("target_critic", networks["critic"])
        for network, tensors in networks.items():
            ours = flax.from_flax(network, tensors)
            state |= {f"{flax.NETWORKS[network]}/{name}": value for name, value in ours.items()}
        agent.load_state_dict(state)
    except ValueError as error:
        raise InputError(f"{source} cannot become a run: {error}") from error
    with target.claim():
        target.create(config, command="brc-fast convert", source=source.name)
        arrays = {name: value.cpu().numpy() for name, value in agent.state_dict().items()}
        target.save(step, {"agent": arrays}, None)
    sizes = f"{observation} observed numbers, {action} actions, {len(config.tasks)} tasks"
    lacking = f"; without {' and '.join(missing)}, which begin anew" if missing else ""
    return f"{target.path}: {sizes}, critic {config.critic.width} wide{lacking}"


def to_flax(folder: RunFolder, target: Path, checkpoint: str = "last") -> str:
    """Write a run's agent as a checkpoint of the authors' code: one file where `target` ends in .msgpack,
    else a folder of four. What was done, in a line."""
    one = target.suffix == ".msgpack"
    if target.suffix and not one:
        raise InputError(f"{target} must be FILE.msgpack or a folder")
    names = [target] if one else [target / f"{name}.txt" for name in flax.NETWORKS]
    if one and not target.absolute().parent.is_dir():
        raise InputError(f"there is no folder to write {target} to")
    for path in names:
        require_replaceable(path, remedy="name another place with --to")
    folder.require_plain()
    flax.require_theirs(folder.config())
    step, agent = restore(folder, "cpu", checkpoint)
    if agent.privileged_size:
        raise InputError(
            f"the authors' critics see what the policy sees, and {folder.path} has {agent.privileged_size} "
            "privileged numbers beside"
        )
    theirs = {name: _arrays(flax.to_flax(name, flax.module_of(agent, name))) for name in flax.NETWORKS}
    if one:
        everything = {f"{name}/{path}": x for name, arrays in theirs.items() for path, x in arrays.items()}
        replace_file(target, pack(everything))
    else:
        target.mkdir(parents=True, exist_ok=True)
        for path, arrays in zip(names, theirs.values(), strict=True):
            replace_file(path, pack(arrays))
    return f"{target}: the agent of {folder.path} at step {step}"


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    return {path: value.cpu().float().numpy() for path, value in tensors.items()}
