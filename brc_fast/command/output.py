"""stdout and stderr that may break."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any, TextIO


class Output:
    """stdout or stderr. Once it cannot be written, as when a pipe's reader has left, the rest is lost and
    nothing else happens: a run goes on."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: Any = io.StringIO() if stream is None else stream  # None: it was closed
        self.error: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names of folders

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., object], *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError as error:
            self.error = error
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())  # for what is in its buffer, too

    def broken(self) -> bool:
        """Whether something was lost that was wanted: who closes a pipe has seen enough."""
        return self.error is not None and not isinstance(self.error, BrokenPipeError)
