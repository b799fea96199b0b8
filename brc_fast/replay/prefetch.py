"""Batches gathered before they are asked for."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

import torch

from brc_fast import _core
from brc_fast.batch import Batch
from brc_fast.spec import integer

from .arena import Arena, Lease
from .forks import register
from .request import Size


@dataclass
class _Gathered:
    """A batch, the draw it belongs to, what it holds, and its copy on the device."""

    lease: Lease
    draw: int
    ahead: _core.Ahead = field(default_factory=_core.Ahead)
    copied: tuple[Batch, torch.cuda.Event] | None = None


_running: weakref.WeakSet[_Worker] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Python ends a thread that comes back to it from compiled code too late, and the process with it."""
    for worker in list(_running):
        worker.close()
        worker.thread.join()


class _Worker:
    """The thread and what it shares with a Prefetcher: batches gathered, and the draw that comes next."""

    def __init__(
        self,
        store: _core.ReplayStore,
        arena: Arena,
        request: _core.Request,
        size: Size,
        depth: int,
        device: torch.device,
    ) -> None:
        self.store, self.arena, self.request, self.size, self.depth = store, arena, request, size, depth
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.device = device
        self.ready: deque[_Gathered] = deque()
        self.draw = store.draws  # the next batch to gather
        self.gathering: int | None = None
        self.too_small = False  # the store, until a batch is asked for again
        self.error: BaseException | None = None
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run, name="brc-fast prefetch", daemon=True)

    def before_fork(self) -> None:
        self.changed.acquire()

    def after_fork(self, child: int | None) -> None:
        if child is None:
            self.changed.release()
        else:  # without the thread; those who waited are threads of the parent
            self.changed = threading.Condition()
            self.closed = True
            self.error = RuntimeError("its thread is one of the process that this one was forked from")

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def take(self) -> _Gathered | None:
        """The batch that is due, waiting for it if it is under way; None if it was not begun."""
        with self.changed:
            if self.closed:
                raise RuntimeError("this prefetcher is closed") from self.error
            due, step = self.store.draws, self.size.num_batches
            while self.ready and self.ready[0].draw != due:
                self.ready.popleft()
            while self.gathering == due and self.error is None:
                self.changed.wait()
            if self.error is not None:
                raise RuntimeError("the prefetching thread failed") from self.error
            gathered = self.ready.popleft() if self.ready else None
            if gathered is None or self.draw < due:  # nobody gathered it, or somebody sampled or loaded
                self.draw = due + step
            self.too_small = False
            self.changed.notify_all()
            return gathered

    def run(self) -> None:
        try:
            while True:
                with self.changed:
                    while not self.closed and (self.too_small or len(self.ready) >= self.depth):
                        self.changed.wait()
                    if self.closed:
                        return
                    draw = self.gathering = self.draw
                gathered = self.gather(draw)
                with self.changed:
                    if gathered is None:
                        self.too_small = True
                    elif self.draw == draw:
                        self.ready.append(gathered)
                        self.draw += self.size.num_batches
                    self.gathering = None
                    self.changed.notify_all()
        except BaseException as error:
            with self.changed:
                self.error, self.gathering = error, None
                self.changed.notify_all()

    def gather(self, draw: int) -> _Gathered | None:
        gathered = _Gathered(self.arena.lease(self.size), draw)
        views, slot, _ = gathered.lease
        try:
            self.store.gather_ahead(self.request, draw, *self.size[:2], views, slot, gathered.ahead)
        except ValueError:  # too little is stored: `settle` says so, if a batch is asked for
            return None
        if self.stream is not None:
            gathered.copied = self.copy(gathered.lease)
        return gathered

    def copy(self, lease: Lease) -> tuple[Batch, torch.cuda.Event]:
        assert self.stream is not None
        with torch.cuda.stream(self.stream):
            return lease.batch.to(self.device), self.stream.record_event()


class Prefetcher(Iterator[Batch]):
    """An endless iterator over batches, made by ReplayBuffer.prefetch.

    `next` returns exactly what `sample` would. It waits only while the thread is still gathering that batch.
    While the buffer holds less than a batch, `next` raises as `sample` does, and can be called again. For one
    consumer. Its thread ends with `close`, at the end of a `with` statement, or with the object.
    """

    def __init__(
        self,
        store: _core.ReplayStore,
        arena: Arena,
        request: _core.Request,
        size: Size,
        depth: int,
        device: str | torch.device,
        watch: Callable[[], None] | None = None,
    ) -> None:
        if integer("depth", depth) < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.device = torch.device(device)
        self.regathered = 0  # transitions that had changed, or were not there yet, when they were asked for
        self._newest: deque[Batch] = deque(maxlen=2)  # returned, kept from reuse by the next to be gathered
        self._watch = watch  # called before every batch
        self._worker = _Worker(store, arena, request, size, depth, self.device)
        self._close = weakref.finalize(self, self._worker.close)
        self._worker.thread.start()
        _running.add(self._worker)
        register(self._worker)

    def __next__(self) -> Batch:
        """The next batch on the device, with the shapes that `sample` would give it.

        Raises:
            ValueError: as `sample`.
            RuntimeError: it was closed, or its thread failed.
        """
        worker = self._worker
        if self._watch is not None:
            self._watch()
        gathered = worker.take() or _Gathered(worker.arena.lease(worker.size), -1)
        views, slot, _ = gathered.lease
        changed = worker.store.settle(worker.request, *worker.size[:2], views, slot, gathered.ahead)
        self.regathered += changed
        if self.device.type == "cpu":
            self._newest.append(gathered.lease.batch)
            return gathered.lease.batch
        if worker.stream is None:  # neither CPU nor CUDA
            return gathered.lease.batch.to(self.device)
        if gathered.copied is None or changed > 0:
            gathered.copied = worker.copy(gathered.lease)
        batch, event = gathered.copied
        user = torch.cuda.current_stream(worker.stream.device)
        user.wait_event(event)
        for column in batch.tensors():
            column.record_stream(user)
        return batch

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and wait for it. Batches that were returned stay valid."""
        self._close()
        self._worker.thread.join()
        self._worker.ready.clear()
