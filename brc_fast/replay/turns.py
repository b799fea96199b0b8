"""Operations of several threads and CUDA streams on the same memory, one after the other."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Turns:
    """Blocks of which each comes after all earlier ones: on the host by a lock, on the device by an event.

    What a turn launches in the stream that is current in it waits for the turn before, and for nothing that
    was queued in that other stream since. The memory may come from any stream: torch is told of every one
    that works on it, and does not use it again before they are done.

    Args:
        device: where the memory lies, with its index; an order of streams is kept on CUDA alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._stream: torch.cuda.Stream | None = None  # of the newest turn; None where there are no streams
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._over = self._stream.record_event()

    def require_own_process(self) -> None:
        """RuntimeError in a forked process, in which the turn of another thread would never end."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this buffer works in the process that made it, {self._process}, and not in {os.getpid()}, "
                "which was forked from it; make one here, and load what `save(folder)` has kept"
            )

    @contextmanager
    def turn(self, memory: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """A block that works on what `memory` then returns.

        Raises:
            RuntimeError: in a forked process.
        """
        self.require_own_process()
        with self._lock:
            if self._stream is None:
                yield
                return
            stream = torch.cuda.current_stream(self._device)
            if stream != self._stream:
                stream.wait_event(self._over)
                for tensor in memory():
                    tensor.record_stream(stream)
                self._stream = stream
            try:
                yield
            finally:
                self._over.record(stream)
