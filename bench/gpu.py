"""Tests and timings on a CUDA machine, with what is installed there.

    python bench/gpu.py [--budget SECONDS] [--parts build limits test kernels update ...] [--dry]

Builds the package into .site, measures the machine's limits, runs `pytest -m gpu`, then times the kernels,
the update, how its cost grows, the replay, the environment step and the training loop, and writes
bench/results/gpu-<part>.json. Each part is a process of its own: what breaks one, or the GPU's state in it,
does not reach the others. Parts have equal shares of the budget, but no more than they need; none takes more
than nine minutes, its start included, and what a part had measured until then stays. What is not installed is
skipped with its reason and has no share.
`--dry` runs the same code, tests included, on the CPU at tiny sizes and writes to build/gpu-dry.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, ROOT, Part, Skip, missing, results, site

LONGEST = 420.0  # seconds of a part; compiling and starting come on top
END = 540.0  # when a part is stopped, its start included
SHORT = {"limits": 40.0}  # a part that needs no more


def run_part(work: Callable[[Part], dict[str, Any]], part: Part) -> tuple[str, dict[str, Any]]:
    """Status ("ok", "skipped" or "failed") and what there is to store."""
    start = time.perf_counter()
    try:
        out: dict[str, Any] = {"status": "ok", **work(part)}
    except Skip as reason:
        out = {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # one part's failure must not cost the others their machine
        out = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    return out["status"], out | {"seconds": time.perf_counter() - start}


def shares(parts: Sequence[str], budget: float) -> dict[str, float]:
    """Seconds of every part: equal, but for those that need less; building takes what it takes."""
    timed = [name for name in parts if name != "build" and not missing(name)]
    short = {name: min(SHORT[name], budget / len(timed)) for name in timed if name in SHORT}
    each = (budget - sum(short.values())) / max(1, len(timed) - len(short))
    return {name: min(LONGEST, short.get(name, each)) for name in parts}


def alone(name: str, seconds: float, dry: bool, path: Path) -> dict[str, Any]:
    """Run a part in a process of its own; what it stored, which is marked as failed if the process did not
    come to its end."""
    from harness import write

    words = [
        sys.executable,
        __file__,
        "--parts",
        name,
        "--budget",
        str(seconds),
        "--folder",
        str(path.parent),
    ]
    path.unlink(missing_ok=True)
    start = time.perf_counter()
    code: int | None = None
    told = f"it was stopped after {END:.0f} s"
    with subprocess.Popen([*words, *["--dry"] * dry], start_new_session=True) as process:
        try:
            code = process.wait(END)
            told = f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            pass
        finally:  # and, at Ctrl-C too, whatever it started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    stored: dict[str, Any] = {"part": name, "dry": dry}
    if path.exists():
        stored |= json.loads(path.read_text())
    if code not in (0, 1) or "status" not in stored:
        took = time.perf_counter() - start
        stored |= {"status": "failed", "reason": told, "seconds": took}
        write(path.stem, stored, path.parent)
    return stored


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds in all (default 480)")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--folder", type=Path, help="of the results, if another one")
    arguments = parser.parse_args(words)
    try:
        import torch
    except ImportError:
        print("bench/gpu.py: torch is not installed here", file=sys.stderr)
        return 2
    if not arguments.dry and not torch.cuda.is_available():
        print("bench/gpu.py: torch sees no CUDA device; --dry runs on the CPU", file=sys.stderr)
        return 2
    parts, built = arguments.parts, site(arguments.dry)
    if "build" in parts or (built.exists() and importlib.util.find_spec("brc_fast") is None):
        # Later parts, and their child processes, use what was just built, or built by an earlier call.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(built), os.environ.get("PYTHONPATH")]))
        sys.path.insert(0, str(built))
    if arguments.dry:
        torch.set_num_threads(1)

    device = "cpu" if arguments.dry else "cuda"
    folder = arguments.folder or results(arguments.dry)
    seconds = shares(parts, 2.0 if arguments.dry else arguments.budget)
    table = []
    for name in parts:
        path = folder / f"gpu-{name}.json"
        if len(parts) > 1:
            print(f"{name} ...", flush=True)
            out = alone(name, seconds[name], arguments.dry, path)
        else:
            status, out = run_part(PARTS[name], Part(seconds[name], device, arguments.dry, folder))
            from harness import write

            out = {"part": name, "dry": arguments.dry, **out, "status": status}
            write(path.stem, out, folder)
        table.append((name, out["status"], out.get("reason", ""), out["seconds"], path))
    if arguments.folder is None:  # else it is one part's own process
        print()
        for name, status, reason, took, path in table:
            shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            print(f"{name:<8}{status:<9}{took:7.1f} s  {shown}  {reason}".rstrip())
    return 1 if any(status == "failed" for _, status, *_ in table) else 0


if __name__ == "__main__":
    sys.exit(main())
