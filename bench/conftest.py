"""Lets `pytest bench/` import the modules beside it, as `python bench/bench_update.py` does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
