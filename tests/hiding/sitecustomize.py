"""Hides what $BRC_FAST_HIDDEN lists from a Python with this folder in PYTHONPATH, and its children."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from typing import Any

HIDDEN = json.loads(os.environ["BRC_FAST_HIDDEN"])


class Others(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        return None if fullname in HIDDEN["modules"] else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *words: Any, **named: Any) -> Iterator[Any]:
        found = super().find_distributions(*words, **named)
        return (one for one in found if one.name not in HIDDEN["distributions"])


sys.meta_path[sys.meta_path.index(PathFinder)] = Others
