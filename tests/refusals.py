"""What tests say of a refusal: its words in their order, and that a command prints one line of them alone."""

from __future__ import annotations

import re

import pytest


def says(words: str) -> str:
    """A pattern for `pytest.raises`: these words; " ... " stands for any others."""
    return ".*".join(map(re.escape, words.split(" ... ")))


def line_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command refuses its input, and prints nothing else."""
    from brc_fast.command import main as cli

    capsys.readouterr()
    assert cli.main(words) == 2
    told = capsys.readouterr()
    (line,) = told.err.strip().splitlines()
    assert told.out == ""
    return line
