"""The words of a refusal."""

from __future__ import annotations

import re


def says(words: str) -> str:
    """A pattern for `pytest.raises`: these words; " ... " stands for any others."""
    return ".*".join(map(re.escape, words.split(" ... ")))
