"""Write constraints.txt: a version of everything that any target of the Makefile installs, for this Python.

    .venv/bin/python .ci/constraints.py             # keeps the versions that are there, adds what is missing
    .venv/bin/python .ci/constraints.py --upgrade   # the newest of everything

Pip resolves all extras and what builds the package together, and installs nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """\
# The one set of versions that CI runs (Python 3.11). `make` installs through this file.
# .ci/constraints.py writes it.
"""


def requirements() -> list[str]:
    """Of the package, all its extras and its build, without those that are extras of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    found = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    found += [requirement for extra in extras for requirement in extra]
    return sorted({each for each in found if not each.startswith(project["project"]["name"])})


def main(words: list[str]) -> None:
    file, report = ROOT / "constraints.txt", ROOT / "build" / "resolved.json"
    report.parent.mkdir(exist_ok=True)
    kept = [] if "--upgrade" in words else ["-c", str(file)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
    subprocess.run([*pip, "--report", str(report), *kept, *requirements()], check=True)
    found = {}
    for package in json.loads(report.read_text())["install"]:
        about = package["metadata"]
        found[about["name"].lower().replace("_", "-")] = about["version"].partition("+")[0]
    lines = [f"{name}=={version}" for name, version in sorted(found.items())]
    file.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
