"""Launch configurations: a table per architecture, and a heuristic behind it. Nothing is timed at run time.

A table is tables/<architecture>.json, written by `python -m brc_fast.kernels.tools.tune`:
{kernel: {"<size> <dtype>": {"BLOCK_..": .., "num_warps": ..}}}, size being rounded up to a power of two.
What it does not hold is answered by the kernel's own heuristic.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .dispatch import INTERPRETED

__all__ = [
    "TABLES",
    "architecture",
    "assume",
    "configuration",
    "key",
    "next_power_of_2",
    "observing",
    "processors",
    "trial",
]

TABLES = Path(__file__).parent / "tables"
PROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
}
Config = Mapping[str, int]

_assumed: str | None = None
_trial: dict[str, Config] = {}
_observed: dict[tuple[str, str], dict[str, int]] | None = None


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, n >= 1."""
    return 1 << (n - 1).bit_length()


@cache
def _device_architecture(index: int) -> str:
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture(device: torch.device) -> str:
    """The architecture to configure for: sm_90, gfx942, or "cpu" for the interpreter."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return "cpu"
    return _device_architecture(torch.cuda.current_device() if device.index is None else device.index)


def processors(device: torch.device) -> int:
    """Multiprocessors to fill; two under the interpreter, where a program costs milliseconds."""
    if _assumed is not None:
        return PROCESSORS.get(_assumed, 132)
    if device.type != "cuda" or INTERPRETED:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextmanager
def assume(name: str) -> Iterator[None]:
    """Configure for this architecture, whatever is there."""
    global _assumed
    before, _assumed = _assumed, name
    try:
        yield
    finally:
        _assumed = before


@contextmanager
def trial(kernel: str, config: Config) -> Iterator[None]:
    """Use this configuration of a kernel, whatever table and heuristic say."""
    before = dict(_trial)
    _trial[kernel] = config
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)


@contextmanager
def observing() -> Iterator[dict[tuple[str, str], dict[str, int]]]:
    """Collect what `configuration` answers in the block: {(kernel, entry of the table): configuration}."""
    global _observed
    before, _observed = _observed, {}
    try:
        yield _observed
    finally:
        _observed = before


@cache
def _table(name: str) -> dict[str, dict[str, Config]]:
    path = TABLES / f"{name}.json"
    return json.loads(path.read_text())["kernels"] if path.exists() else {}


def key(size: int, dtype: torch.dtype) -> str:
    """The entry of a table that serves this size and dtype."""
    return f"{next_power_of_2(max(1, size))} {str(dtype).removeprefix('torch.')}"


def configuration(
    kernel: str, size: int, dtype: torch.dtype, device: torch.device, heuristic: Config
) -> dict[str, Any]:
    """Block sizes and warps of a kernel: the heuristic's, with what the table says instead."""
    chosen = _trial.get(kernel)
    if chosen is None:
        chosen = _table(architecture(device)).get(kernel, {}).get(key(size, dtype), {})
    answer = {**heuristic, **chosen}
    if _observed is not None:
        _observed[kernel, key(size, dtype)] = answer
    return answer
