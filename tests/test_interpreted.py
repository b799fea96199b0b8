"""The tests marked gpu that need no GPU: through Triton's interpreter, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FILES = sorted(
    path
    for path in HERE.glob("test_*.py")
    if "kernel_device" in path.read_text() and path != Path(__file__).resolve()
)


def interpret(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    words = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=5", str(path)]
    switches = {"TRITON_INTERPRET": "1", "BRC_FAST_GPU_DRY": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=folder,  # not the checkout, which would hide an installed package
        env=os.environ | switches | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """One process per file, two at a time."""
    folder = tmp_path_factory.mktemp("interpreted")
    with ThreadPoolExecutor(2) as pool:
        yield {path.name: pool.submit(interpret, path, folder) for path in FILES}


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_the_kernels_pass_their_gpu_tests_through_the_interpreter(
    name: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d passed", done.stdout), done.stdout[-2000:]
