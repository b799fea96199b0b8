"""Ending a run early: a signal becomes a question that the loop asks between two environment steps."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

TOLD = "the run is saved and ends after this step; a second one ends it now"
TWICE_SECONDS = 0.2  # in which a second signal is the same request: see StopRequest


class Stopped(BaseException):
    """Raised by `StopRequest.check`; no error, and nobody's `except Exception` takes it for one."""


class Interrupted(KeyboardInterrupt):
    """Raised by a second signal, wherever the process is."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """True once a signal asked the process to end; a second one raises Interrupted at once.

        with StopRequest() as stop:
            while True:
                stop.check()  # raises Stopped
                ...

    A terminal that closes, `timeout` and launchers send a signal twice, to the process and to its group: what
    comes within 0.2 s is one request. SIGXCPU comes again every second and stays one. A signal that was
    ignored when the block began (`nohup` does so) stays ignored, but for SIGINT, which a script's shell
    ignores in all that it starts with `&`. Outside the main thread, where Python delivers no signals, it
    stays False.
    """

    SIGNALS = (
        *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
        *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
    )

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._asked = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raise Stopped once the process was asked to end."""
        if self:
            raise Stopped

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self and (now - self._asked < TWICE_SECONDS or number == signal.SIGXCPU):
            return
        if self:
            raise Interrupted(number)
        self.signal, self._asked = signal.Signals(number), now
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
