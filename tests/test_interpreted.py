"""Kernels without a GPU: their tests, and the recorded updates, through Triton's interpreter in processes of
their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from extras import require

HERE = Path(__file__).resolve().parent
FILES = [path for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__).resolve()]
OF_KERNELS = [path.name for path in FILES if "kernel_device: str" in path.read_text()]
RECORDED = "test_published_update.py"
Done = subprocess.CompletedProcess[str]


def interpret(name: str, folder: Path) -> Done:
    """The tests marked gpu of a file of kernels; all of the recorded updates, with nothing but kernels."""
    words = ["-q", "-p", "no:cacheprovider", "--durations=5", str(HERE / name)]
    switches = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if name == RECORDED:
        switches["BRC_FAST_KERNELS"] = "triton"
    else:
        words += ["-m", "gpu"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=folder,  # not the checkout, which would hide an installed package
        env=os.environ | switches,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Done]]]:
    """One process per file, two at a time, or one beside the other process that pytest-xdist started."""
    folder = tmp_path_factory.mktemp("interpreted")
    with ThreadPoolExecutor(1 if "PYTEST_XDIST_WORKER" in os.environ else 2) as pool:
        yield {name: pool.submit(interpret, name, folder) for name in (*OF_KERNELS, RECORDED)}


@pytest.mark.parametrize("name", [*OF_KERNELS, RECORDED])
def test_what_a_gpu_would_run_passes_in_the_interpreter(name: str, runs: dict[str, Future[Done]]) -> None:
    require("triton")
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    if name == RECORDED and "no recording with" in done.stdout:
        pytest.skip("there are no recordings (set BRC_FAST_SHARED)")
    assert re.search(r"\d passed", done.stdout), done.stdout[-2000:]
