"""What floors are made of: the limits of this machine, as bench_limits.py measured them, in a file or now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_limits import limits, measurement
from harness import RESULTS, ROOT, Unreadable, header, read
from roofline import Machine

FOLDERS = (ROOT / "build" / "bench", RESULTS)
STEMS = {"cpu": "limits-cpu", "cuda": "gpu-limits"}  # as `make bench` and `make gpu` name them
SAME = {"cpu": ("cpu", "cores", "torch_threads"), "cuda": ("gpu",)}  # what tells one machine from another
EACH = 0.2  # seconds of a limit that is measured now


def machine(device: str, *, dry: bool = False, folders: tuple[Path, ...] = FOLDERS) -> Machine:
    """Of the newest file that this machine has, else measured now; `source` says which.

    A dry run takes no file: it measures tiny sizes.
    """
    if not dry and (found := sorted(stored(device, folders), key=lambda pair: pair[1]["date"])):
        path, result = found[-1]
        return made(device, result["measurements"], f"{path.name} of {result['date'][:16]}")
    wanted = (one for one in limits(torch.device(device), dry) if one.case.startswith(("copy", "product")))
    found = [measurement(one, 0.0 if dry else EACH) for one in wanted]
    if device == "cuda":
        torch.cuda.empty_cache()  # gigabytes that the updates need
    return made(device, found, "measured in this run")


def stored(device: str, folders: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Results of bench_limits.py that were measured on this machine and have what a floor needs."""
    here = header()
    for folder in folders:
        path = folder / f"{STEMS[device]}.json"
        try:
            result = read(path)
        except Unreadable:
            continue  # there is none, or one of another format: then limits are measured
        there = {entry["case"] for entry in result["measurements"] if entry["value"] is not None}
        whole = "copy" in there and any(case.startswith("product float32") for case in there)
        if whole and all(result.get(key) == here[key] for key in SAME[device]):
            yield path, result


def made(device: str, measurements: Sequence[Mapping[str, Any]], source: str) -> Machine:
    """The best rate of each kind of product. A kind that was not measured counts as the next more exact one.

    Raises:
        RuntimeError: the copy or the product in float32 has no figure, with its reason.
    """
    best: dict[str, float] = {}
    for entry in measurements:
        if entry["value"] is None:
            if entry["case"] == "copy" or "float32" in entry["case"]:
                raise RuntimeError(f"no floor without the limit {entry['case']}: {entry['missing']}")
            continue
        kind = " ".join(entry["case"].split()[:2])
        best[kind] = max(best.get(kind, 0.0), 1e9 * entry["value"])
    single = best["product float32"]
    tf32 = best.get("product tf32", single)
    name = torch.cuda.get_device_name() if device == "cuda" else header()["cpu"]
    return Machine(name, best.get("product bfloat16", tf32), tf32, best["copy"], single, source)
