"""What every benchmark shares: the machine's header, interleaved timing, JSON results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
PACKAGES = ("brc-fast", "torch", "triton", "jax", "jaxlib", "mujoco", "mujoco-mjx", "playground", "numpy")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    try:
        out = subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def header() -> dict[str, Any]:
    """Machine, versions and commit: what a number needs to mean something."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None
        if (status := _git("status", "--porcelain", "--", ".", ":!bench/results")) is None
        else bool(status),
    }


def wait(device: str) -> None:
    """Let queued GPU work finish, so that wall time covers it."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    providers: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    calls: int,
    device: str = "cpu",
    warmup: int = 3,
) -> dict[str, list[float]]:
    """Seconds per call of every provider, in rounds: each runs `calls` times per round, one after the other.

    Interleaving lets a busy machine slow all of them alike; compare medians, or ratios round by round.
    """
    for work in providers.values():
        for _ in range(warmup):
            work()
    wait(device)
    times: dict[str, list[float]] = {name: [] for name in providers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, work in providers.items():
            start = time.perf_counter()
            for _ in range(calls):
                work()
            wait(device)
            times[name].append((time.perf_counter() - start) / calls)
    return times


def median_ratio(slower: list[float], faster: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratio, round by round."""
    ratios = sorted(a / b for a, b in zip(slower, faster, strict=True))
    quarter = len(ratios) // 4
    return statistics.median(ratios), ratios[quarter], ratios[-1 - quarter]


def write(name: str, results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Store results with their header under bench/results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**header(), **results}, indent=1) + "\n")
    return path
