"""What of the package's extras is installed: a test without what it needs is skipped, and says how to get it.

    pytestmark = needs("dmc")    a test, or with `pytestmark` a file, that needs an extra
    require("envpool", "jax")    the same from here on, in a test or at the head of a file

A name is an extra, which is there when all is installed that it declares, or a module of one.
"""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()
}
# Distributions whose modules have another name, or lie in the package of another one
DISTRIBUTIONS = {"PIL": "pillow", "mujoco.mjx": "mujoco-mjx", "mujoco_playground": "playground"}
# What a module of another distribution imports without saying so
UNDECLARED = {"jax.export": "flatbuffers", "torch.utils.tensorboard": "tensorboard"}
NEEDS = "Skipped: needs "  # how pytest tells a reason of `needs` and `require`


def distribution(module: str) -> str:
    """Canonical name of the distribution that a module belongs to or needs; longer names are known first."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    known = DISTRIBUTIONS | UNDECLARED
    return canonicalize_name(next((known[name] for name in names if name in known), parts[0]))


def applies(requirement: Requirement, extra: str = "") -> bool:
    """Whether this Python, this system and an extra of the distribution that requires it ask for it."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def declared(extra: str) -> Iterator[Requirement]:
    """What an extra requires, in its own name or through another extra of this package."""
    for requirement in filter(applies, EXTRAS[extra]):
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                yield from declared(other)
        else:
            yield requirement


def asked_of(requirement: Requirement) -> list[Requirement]:
    """What the extras named in a requirement require, as the installed distribution says."""
    texts = requires(requirement.name) or []
    found = [Requirement(text) for text in texts]
    return [
        each for each in found if not applies(each) for extra in requirement.extras if applies(each, extra)
    ]


def met(requirement: Requirement) -> bool:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return False
    return requirement.specifier.contains(installed, prereleases=True) and all(
        map(met, asked_of(requirement))
    )


def lacking(*names: str) -> str:
    """Why a test with these extras and modules cannot run here; empty where it can."""
    told, extras = [], []
    for name in names:
        if name in EXTRAS:
            there, extra, what = all(map(met, declared(name))), name, f"the [{name}] extra"
        else:
            brought = distribution(name)
            extra = next(
                each
                for each, wanted in EXTRAS.items()
                for one in wanted
                if canonicalize_name(one.name) == brought
            )
            there, what = importlib.util.find_spec(name) is not None, name
        if not there:
            told.append(what)
            extras.append(extra)
    command = f'pip install "{PROJECT["name"]}[{",".join(dict.fromkeys(extras))}]"'
    return f"needs {' and '.join(told)}: {command}" if told else ""


def needs(*names: str) -> pytest.MarkDecorator:
    reason = lacking(*names)
    return pytest.mark.skipif(bool(reason), reason=reason)


def require(*names: str) -> None:
    if reason := lacking(*names):
        pytest.skip(reason, allow_module_level=True)
