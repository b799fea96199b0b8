"""Replay of a function that works in place, as a CUDA graph or, on a CPU, as a HostGraph. Nothing here knows
what it computes.

    call 1          runs the function as it is: kernels are compiled, memory that stays is made
    call 2, 3       capture it, once for each of two sets of input slots, and replay
    further calls   copy the inputs into the slots that the running replay does not read, and replay

On a CPU, which does not run ahead, there is one set of slots, and call 2 is itself what is recorded. Every
call is one execution of the function, exactly as without graphs. Each signature (shapes and dtypes of the
inputs) has slots and graphs of its own; those of the last eight are kept.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch import Generator, Tensor

from brc_fast.kernels.runtime import native
from brc_fast.kernels.runtime.capture import capture
from brc_fast.kernels.runtime.dispatch import chosen, unwatched
from brc_fast.kernels.runtime.host_graph import HostGraph

__all__ = ["OFF", "Captured"]

Signature = tuple[tuple[torch.Size, torch.dtype], ...]
OFF = "switched off"  # the reason for no graphs where nobody wants them
TIMED = 64  # calls whose times may wait to be asked for
MOST_SIGNATURES = 8  # each keeps the memory of two graphs


def event(timed: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


@contextmanager
def _recorded(over: torch.cuda.Event) -> Iterator[None]:
    """Record the event at the end of a block, however that comes."""
    try:
        yield
    finally:
        over.record()


class _Slots:
    """One set of inputs at fixed addresses, and the graph that reads it."""

    def __init__(self, inputs: Sequence[Tensor], device: torch.device) -> None:
        self.inputs = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in inputs]
        self.free, self.copied = event(), event()
        self.held: Sequence[Tensor] = ()  # what the copy reads
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: Tensor | None = None


class _Program:
    """The two sets of slots of one signature, used in turn."""

    def __init__(self, inputs: Sequence[Tensor], device: torch.device) -> None:
        self.slots = [_Slots(inputs, device) for _ in range(2)]
        self.calls = 0


class _HostProgram:
    """The slots of one signature on a CPU."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [torch.empty_like(x) for x in inputs]
        self.calls = 0
        self.graph: HostGraph | None = None


class Captured:
    """`function`, replayed as a graph where that is possible.

    Args:
        function: takes tensors and returns one. It must do the same operations at every call of one signature
            (shapes and dtypes of its arguments): no host synchronisation, no host number that changes;
            whatever it keeps, it changes in place.
        device: where it works. generators: of that device, whose draws are part of it.
        alive: whether what the function works on is still there: a graph does not look.
        enabled: False to run it as it is.

    Attributes:
        reason: why there are no graphs; None where they are used.
        stream: in which the function runs; None where the device has no streams.
        captures: how many were made.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: str | torch.device,
        generators: Sequence[Generator] = (),
        enabled: bool = True,
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self.function, self.device, self.generators = function, torch.device(device), generators
        self.alive = alive
        self.reason: str | None = None
        if not enabled:
            self.reason = OFF
        elif self.device.type == "cpu" and not native.built():
            self.reason = "the package's compiled part is not built"
        elif self.device.type not in ("cuda", "cpu"):
            self.reason = f"the learner is on {self.device.type}"
        self.captures = 0
        self._programs: dict[Signature, _Program] = {}  # the one that was called last comes last
        self._host: dict[tuple[str, Signature], _HostProgram] = {}
        self._times: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=TIMED)
        self._host_seconds = 0.0
        self.stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The function's result for these inputs.

        Args:
            inputs: on the device or on the host, where pinned memory is copied while the GPU computes. They
                may be dropped at once, and changed when the result is there.
        """
        if self.stream is None:
            began = time.perf_counter()
            out = self._on_host([x.to(self.device) for x in inputs])
            self._host_seconds += time.perf_counter() - began
            return out
        program = self._program(inputs)
        current = torch.cuda.current_stream(self.device)
        slots = program.slots[program.calls % 2]
        slots.copied.synchronize()  # of two calls ago: the host is never further ahead
        slots.held = inputs  # until then, whoever's memory it is
        self._copies.wait_event(slots.free)
        pairs = list(zip(slots.inputs, inputs, strict=True))
        with torch.cuda.stream(self._copies):  # beside the replay that may be running
            for slot, x in pairs:
                if not x.is_cuda:
                    slot.copy_(x, non_blocking=True)
        self.stream.wait_stream(self._copies)
        self.stream.wait_stream(current)  # which may have changed what the function reads
        begin, end = event(timed=True), event(timed=True)
        try:
            with torch.cuda.stream(self.stream), _recorded(slots.free):
                for slot, x in pairs:
                    if x.is_cuda:
                        slot.copy_(x)
                        x.record_stream(self.stream)
                slots.copied.record()
                if program.calls and self.reason is None and slots.graph is None:
                    self._capture(slots)
                begin.record()
                if slots.graph is None:
                    out = self.function(*slots.inputs)
                else:
                    slots.graph.replay()
                    assert slots.out is not None
                    out = slots.out.clone()
                end.record()
        finally:
            current.wait_stream(self.stream)  # also for what a call that was broken off has queued
        program.calls += 1
        self._times.append((begin, end))
        out.record_stream(current)
        return out

    def __del__(self) -> None:
        """Memory that is freed with its owner is handed out at once: who gets it waits for the calls made."""
        with suppress(Exception):  # at the end of Python, or of an object that was never whole
            if not torch.cuda.is_current_stream_capturing():  # the cycle collector may come at any time
                self.join()

    def event(self) -> torch.cuda.Event | None:
        """One for this device; None where there are no streams."""
        return None if self.stream is None else event()

    def queue(self) -> AbstractContextManager[object]:
        """Makes `stream` the current one in a block, for what must happen between two calls and after all
        that was queued before."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def join(self) -> None:
        """Let the current stream wait for all calls made so far."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _on_host(self, inputs: Sequence[Tensor]) -> Tensor:
        # kernels through Triton's interpreter, and what torch compiles, are not on a tape
        taken = chosen(None) in ("auto", "reference") and unwatched()
        if self.reason is not None or not taken or not self.alive():
            return self.function(*inputs)
        signature = chosen(None), tuple((x.shape, x.dtype) for x in inputs)
        program = self._host.pop(signature, None) or _HostProgram(inputs)
        if len(self._host) == MOST_SIGNATURES:
            del self._host[next(iter(self._host))]
        self._host[signature] = program
        program.calls += 1
        if program.calls == 1:
            return self.function(*inputs)
        torch._foreach_copy_(program.inputs, list(inputs))
        if program.graph is not None:
            native.share_threads()
            program.graph.replay()
            return program.graph.out.clone()
        graph = HostGraph(lambda: self.function(*program.inputs))
        if graph.unfit is None:
            program.graph = graph
            self.captures += 1
        else:
            self.reason = graph.unfit
            self._host.clear()
        return graph.out.clone()

    def forget(self) -> None:
        """Drop all graphs, as when what they read has moved. What can be captured is captured anew."""
        self._host.clear()
        if self.stream is not None:
            self.stream.synchronize()
            self._programs.clear()

    def seconds(self) -> float:
        """Time of the calls that ended since this was last asked, on the GPU without waiting for any."""
        total, self._host_seconds = self._host_seconds, 0.0
        while self._times and self._times[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._times.popleft()
            total += begin.elapsed_time(end) / 1000.0
        return total

    def _program(self, inputs: Sequence[Tensor]) -> _Program:
        """That of these inputs; a new one where there is none."""
        signature = tuple((x.shape, x.dtype) for x in inputs)
        program = self._programs.pop(signature, None)
        if program is None:
            assert self.stream is not None
            if self._programs and self.reason is None:
                last = next(reversed(self._programs))
                told = "; ".join(
                    f"input {index}: {list(a[0])} {a[1]} became {list(b[0])} {b[1]}"
                    for index, (a, b) in enumerate(zip(last, signature, strict=False))
                    if a != b
                )
                warnings.warn(f"the CUDA graph is captured anew: {told}", stacklevel=4)
            if len(self._programs) == MOST_SIGNATURES:
                self.stream.synchronize()
                del self._programs[next(iter(self._programs))]
            program = _Program(inputs, self.device)
            self._copies.wait_stream(torch.cuda.current_stream(self.device))  # whose old memory that may be
        self._programs[signature] = program
        return program

    def _capture(self, slots: _Slots) -> None:
        """Record the function on these slots; where that fails, go on without any graph and say why."""
        assert self.stream is not None
        try:
            slots.graph, slots.out = capture(
                lambda: self.function(*slots.inputs), self.stream, self.generators
            )
        except BaseException as error:
            self.forget()
            if not isinstance(error, RuntimeError):
                raise
            told = str(error).splitlines() or [type(error).__name__]
            self.reason = f"capturing failed: {told[0]}"
            warnings.warn(f"updates run without a CUDA graph: {self.reason}", stacklevel=4)
        else:
            self.captures += 1
