"""Offline data sets, loaded into a replay buffer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from brc_fast.spec import integer

if TYPE_CHECKING:
    from .buffer import ReplayBuffer

TERMINATED = ("terminated", "terminals", "terminations")  # as Gymnasium, D4RL and Minari call it
TRUNCATED = ("truncated", "timeouts", "truncations")
log = logging.getLogger("brc_fast")


def load_dataset(buffer: ReplayBuffer, dataset: Any, *, stream: int = 0) -> int:
    """Appends an offline data set to a stream of a buffer, and ends its last episode there.

        >>> buffer = ReplayBuffer(1_000_000, 17, 6)
        >>> load_dataset(buffer, d4rl_env.get_dataset())
        >>> load_dataset(buffer, minari.load_dataset("mujoco/halfcheetah/medium-v0"))

    A mapping of columns, such as D4RL's dict or an open HDF5 file:

    ============================================ ======== ============================================
    column                                       shape    meaning
    ============================================ ======== ============================================
    observations                                 [M, O]   or a mapping of these by name
    actions                                      [M, A]
    rewards                                      [M]
    terminated, terminals or terminations        [M]      the task ended
    truncated, timeouts or truncations           [M]      the episode was cut; may be missing where there
                                                          are next_observations
    next_observations                            [M, O]   may be missing: then that of the next row
    the buffer's extras                          [M, ...] each by its name
    ============================================ ======== ============================================

    Without next_observations, the last row of an episode that was cut is left out, and the very last row
    unless it terminated: nobody knows where they led. The logger "brc_fast" says how many.

    Or a data set of Minari: anything whose `iterate_episodes()` gives episodes with observations [T + 1, O],
    actions, rewards, terminations and truncations [T], and the buffer's extras among their `infos`. Nothing
    of it is left out, and an episode never goes on into the next.

    Returns how many transitions were appended. A stream keeps the newest that fit, and a warning says so.

    Raises:
        IndexError: no such stream.
        TypeError, ValueError: a column that is missing, given twice, or of another length, shape or dtype, or
            holds what is not finite; it is named, and the buffer is as it was.
    """
    if not hasattr(buffer, "extend"):
        raise TypeError(
            f"load_dataset takes a ReplayBuffer, got {type(buffer).__name__}; one on a device can load what "
            "a ReplayBuffer of the same sizes has saved"
        )
    number, names = integer("stream", stream), list(buffer.schema.extras)
    whole = _joined(dataset, names) if hasattr(dataset, "iterate_episodes") else _columns(dataset, names)
    rows = len(whole["rewards"])
    whole["starts"][:1] = True  # whatever the stream holds
    stored = buffer.extend(**whole, stream=number)
    buffer.reset([number])
    if stored < rows:
        log.info("%d of %d rows were left out: the data set does not say where they led", rows - stored, rows)
    fits = int(buffer._store.capacities()[number])
    if stored > fits:
        log.warning("stream %d keeps the newest %d of %d transitions of the data set", number, fits, stored)
    return stored


def _columns(dataset: Any, extras: Sequence[str]) -> dict[str, Any]:
    """The arguments of `extend`."""
    if not isinstance(dataset, Mapping):
        raise TypeError(
            "dataset must be a mapping of columns or have iterate_episodes(), as data sets of Minari do, "
            f"got {type(dataset).__name__}"
        )
    missing = [name for name in ("observations", "actions", "rewards", *extras) if name not in dataset]
    ends = _either(dataset, TERMINATED)
    cuts = _either(dataset, TRUNCATED)
    missing += [] if ends[0] else [" or ".join(TERMINATED)]
    if not cuts[0] and "next_observations" not in dataset:
        missing.append(f"{' or '.join(TRUNCATED)} (or next_observations, which show where episodes were cut)")
    if missing:
        raise ValueError(f"the data set has no {missing[0]}; it has {sorted(map(str, dataset))}")
    columns = {name: _read(dataset[name]) for name in ("observations", "actions", "rewards", *extras)}
    if "next_observations" in dataset:
        columns["next_observations"] = _read(dataset["next_observations"])
    columns |= {name: value for name, value in (ends, cuts) if name}
    rows = np.shape(columns["rewards"])[0] if np.ndim(columns["rewards"]) else 0
    for name, value in _leaves("", columns):
        _require_length(f"{name} of the data set", value, rows)
    return {
        "observations": columns["observations"],
        "actions": columns["actions"],
        "rewards": columns["rewards"],
        "terminated": columns[ends[0]],
        "truncated": columns[cuts[0]] if cuts[0] else np.zeros(rows, bool),
        "successors": columns.get("next_observations"),
        "extras": {name: columns[name] for name in extras},
        "starts": np.zeros(rows, bool),
    }


def _either(dataset: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """The name and the column that has one of these, or no name; ValueError where two of them differ."""
    found = [(name, _read(dataset[name])) for name in names if name in dataset]
    for name, value in found[1:]:
        first, other = np.asarray(found[0][1]), np.asarray(value)
        if first.shape != other.shape or (first != other).any():
            raise ValueError(f"the data set has {found[0][0]} and {name}, and they differ; leave one out")
    return found[0] if found else ("", None)


def _read(value: Any) -> Any:
    """An array, from memory or from a file, or a dict of arrays."""
    if isinstance(value, Mapping):
        return {name: _read(each) for name, each in value.items()}
    if isinstance(value, (np.ndarray, Tensor)):
        return value
    return np.asarray(value[:] if hasattr(value, "shape") else value)


def _joined(dataset: Any, extras: Sequence[str]) -> dict[str, Any]:
    """The arguments of `extend` of all episodes, one after the other."""
    episodes = []
    for number, episode in enumerate(dataset.iterate_episodes()):
        where = f"episode {getattr(episode, 'id', number)} of the data set"
        one = {
            name: _read(_of(episode, name, where))
            for name in ("observations", "actions", "rewards", "terminations", "truncations")
        }
        steps = len(one["rewards"])
        seen = one.pop("observations")
        infos = (getattr(episode, "infos", None) or {}) if extras else {}
        if absent := [name for name in extras if name not in infos]:
            raise ValueError(f"the infos of {where} have no {absent[0]}; they have {sorted(infos)}")
        one["extras"] = {name: _read(infos[name])[-steps:] for name in extras}  # the reset may have one
        for name, value in _leaves("observations", seen):
            _require_length(f"{name} of {where}", value, steps + 1)
        for name, value in _leaves("", one):
            _require_length(f"{name} of {where}", value, steps)
        if steps > 0:
            one |= {"observations": _each(seen, lambda x: x[:-1]), "successors": _each(seen, lambda x: x[1:])}
            one["starts"] = np.arange(steps) == 0
            episodes.append(one)
    if not episodes:
        raise ValueError("the data set has no transitions")
    whole: dict[str, Any] = _concatenated(episodes)
    whole["terminated"], whole["truncated"] = whole.pop("terminations"), whole.pop("truncations")
    return whole


def _of(episode: Any, name: str, where: str) -> Any:
    if not hasattr(episode, name):
        raise ValueError(f"{where} has no {name}")
    return getattr(episode, name)


def _each(value: Any, function: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _each(each, function) for name, each in value.items()}
    return function(value)


def _concatenated(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {name: _concatenated([value[name] for value in values]) for name in values[0]}
    return np.concatenate([np.asarray(value) for value in values])


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    """Arrays with the names that messages give them."""
    if not isinstance(value, Mapping):
        return [(name, value)]
    inner = ((f"{name}[{key!r}]" if name else str(key), each) for key, each in value.items())
    return [leaf for key, each in inner for leaf in _leaves(key, each)]


def _require_length(name: str, value: Any, rows: int) -> None:
    if np.ndim(value) == 0 or len(value) != rows:
        raise ValueError(f"{name} must have {rows} rows, got shape {list(np.shape(value))}")
