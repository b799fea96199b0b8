"""Kernels without a GPU: their tests, and the recorded updates, through Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest
from extras import require

require("triton")

HERE = Path(__file__).resolve().parent
FILES = [path for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__).resolve()]
OF_KERNELS = [path.stem for path in FILES if "kernel_device: str" in path.read_text()]
RECORDED = "test_published_update"
SWITCHES = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
Cases = list[ElementTree.Element]


def interpret(names: list[str], folder: Path, *words: str, **switches: str) -> Cases:
    """What pytest reports of each test in these files."""
    report = folder / f"{names[0]}.xml"
    own = ["-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}", *words]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *own, *(str(HERE / f"{name}.py") for name in names)],
        cwd=folder,  # not the checkout, which would hide an installed package
        env=os.environ | SWITCHES | switches,
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout[-6000:] + done.stderr[-2000:]
    return list(ElementTree.parse(report).iter("testcase"))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Cases]]]:
    """The tests marked gpu of all files of kernels in one process, and the recorded updates with nothing but
    kernels in another: at once, or one after the other beside the other process that pytest-xdist started."""
    folder = tmp_path_factory.mktemp("interpreted")
    with ThreadPoolExecutor(1 if "PYTEST_XDIST_WORKER" in os.environ else 2) as pool:
        kernels = pool.submit(interpret, OF_KERNELS, folder, "-m", "gpu")
        recorded = pool.submit(interpret, [RECORDED], folder, BRC_FAST_KERNELS="triton")
        yield dict.fromkeys(OF_KERNELS, kernels) | {RECORDED: recorded}


@pytest.mark.parametrize("name", [*OF_KERNELS, RECORDED])
def test_what_a_gpu_would_run_passes_in_the_interpreter(name: str, reports: dict[str, Future[Cases]]) -> None:
    # A file that cannot be imported is reported by its name alone.
    cases = [
        case
        for case in reports[name].result()
        if name in (case.get("classname", "") or case.get("name", "")).split(".")
    ]
    wrong = [x.text or "" for case in cases for x in case if x.tag in ("failure", "error")]
    assert not wrong, "\n".join(wrong)[-8000:]
    passed = [case for case in cases if case.find("skipped") is None]
    if name == RECORDED and not passed:
        pytest.skip("there are no recordings (set BRC_FAST_SHARED)")
    assert passed
