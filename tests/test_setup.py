"""setup.sh, which every target of the Makefile needs: what is missing is one line, and the next try works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("sh", "dirname", "sed", "tail", "grep", "mkdir", "touch", "rm", "make")
BASE = Path(sys.base_prefix) / "bin" / "python3"
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the Makefile and setup.sh read of a checkout."""
    for name in ("setup.sh", "Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def command(*words: str, folder: Path, **environment: str) -> Done:
    others = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "CXX", "MAKEFLAGS")}
    return subprocess.run(words, cwd=folder, env=others | environment, capture_output=True, text=True)


def setup(folder: Path, *words: str, **environment: str) -> Done:
    return command("sh", "setup.sh", "venv", *words, folder=folder, **environment)


def refused(done: Done) -> str:
    """The one line of a setup that failed."""
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("echo 3.9", "is Python 3.9, and Python 3.11 to 3.13 is needed; name another: make PYTHON="),
        ("echo 3.14", "is Python 3.14, and Python 3.11 to 3.13 is needed; "),
        ("echo 2.7", "is Python 2.7, and Python 3.11 to 3.13 is needed; "),
        ("echo not found >&2; exit 127", "; install Python 3.11 to 3.13, or name it: make PYTHON=python3.11"),
    ],
)
def test_a_python_that_is_not_supported_is_one_line(text: str, told: str, folder: Path) -> None:
    fake = program(folder / "fake", text)
    assert told in refused(setup(folder, PYTHON=str(fake)))
    assert not (folder / "venv").exists()


def test_a_machine_without_a_compiler_is_told_so_before_anything_is_fetched(folder: Path) -> None:
    tools = folder / "tools"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    line = refused(setup(folder, PYTHON=str(BASE), PATH=str(tools)))
    assert re.match(r"setup: there is no C\+\+ compiler; install one .*: g\+\+.*name it: CXX=", line)
    old = program(folder / "old", "case $* in *c++20*) exit 1;; esac")
    told = f"setup: {old} does not compile C++20; "
    assert refused(setup(folder, PYTHON=str(BASE), CXX=str(old))).startswith(told)
    assert not (folder / "venv").exists()


def test_without_a_network_one_line_says_so_and_the_next_try_goes_on(folder: Path) -> None:
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PYTHON": str(BASE)}
    offline |= {"PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    line = refused(setup(folder, "no-such-thing", **offline))
    assert line.startswith("setup: pip cannot get no-such-thing: go online, or set PIP_INDEX_URL or ")
    assert "no-such-thing" in (folder / "build" / "setup.log").read_text()
    (folder / "venv" / "kept").touch()
    done = setup(folder, "--no-index", str(wheel(folder)), PYTHON=str(BASE))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / "venv" / "kept").exists()


def test_what_was_killed_is_made_anew_and_what_pip_refuses_is_one_line(folder: Path) -> None:
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / ".unfinished").touch()
    (folder / "venv" / "half").touch()
    thing = wheel(folder)
    done = setup(folder, "--no-index", str(thing), PYTHON=str(BASE))
    assert (done.returncode, done.stderr) == (0, "")
    assert not (folder / "venv" / "half").exists()
    assert not (folder / "venv" / ".unfinished").exists()
    command("venv/bin/python", "-c", "import thing", folder=folder).check_returncode()
    thing.write_bytes(b"no wheel")
    line = refused(setup(folder, "--no-index", "--force-reinstall", str(thing)))
    assert line.startswith("setup: pip: ")
    assert thing.name in line
    assert (folder / "venv" / ".unfinished").exists()


def wheel(folder: Path) -> Path:
    """The smallest package there is."""
    path = folder / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing.py", "")
        archive.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        archive.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("thing-1.0.dist-info/RECORD", "")
    return path


def test_another_python_that_is_named_is_not_passed_over_because_a_venv_is_there(folder: Path) -> None:
    program(folder / ".venv" / "bin" / "python", "echo 3.11")
    stamp = folder / ".venv" / ".installed"
    stamp.touch()
    same, other = (program(folder / f"python{name}", f"echo {name}") for name in ("3.11", "3.12"))
    for words, wanted in (([], False), ([f"PYTHON={same}"], False), ([f"PYTHON={other}"], True)):
        done = command("make", "-n", "test", *words, folder=folder)
        assert done.returncode == 0, done.stderr
        assert ("setup.sh" in done.stdout) is wanted, words
