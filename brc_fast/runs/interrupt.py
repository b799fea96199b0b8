"""Stopping a run cleanly: Ctrl-C and SIGTERM become a question the loop asks between two steps."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

TOLD = "the run is saved and ends after this step; a second one ends it now"


class StopRequest:
    """True once the process was asked to stop; a second request interrupts at once.

        with StopRequest() as stop:
            while not stop: ...

    Outside the main thread, where Python delivers no signals, it stays False.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        with suppress(AttributeError, OSError, ValueError):  # there may be no stderr, or none with a number
            # not print: the signal may have come in the middle of one
            os.write(sys.stderr.fileno(), f"\n{self.signal.name}: {TOLD}\n".encode())


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """A Ctrl-C comes again where it came while Python ignores exceptions, as in JAX's callback of the garbage
    collector."""
    before = sys.unraisablehook

    def hook(ignored: Any) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            before(ignored)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
