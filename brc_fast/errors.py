"""Errors a user can mend: each message is one line that names the rule, the numbers and the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """A setting, file or name that cannot be used as given. The command line prints it and exits with 2."""


class WorkerError(RuntimeError):
    """Processes of environments ended more often than they may be started again."""


class SimulatorError(WorkerError):
    """An environment raised, in this process or in its own: the message names task, step, slot and what it
    said, and the cause is its own exception, or from another process its traceback as text."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message holds the pip command that brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f'{feature} needs the [{extra}] extra: pip install "brc-fast[{extra}]"')
