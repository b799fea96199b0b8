"""Recording a CUDA graph so that a failure leaves nothing behind, and nobody frees what the graph uses."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Generator

T = TypeVar("T")
# Until then a generator counted its draws into a capture that had failed. Since then giving it another state
# would only part it from the graphs of others.
STUCK = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


def capture(
    function: Callable[[], T], stream: torch.cuda.Stream, generators: Sequence[Generator] = ()
) -> tuple[torch.cuda.CUDAGraph, T]:
    """What `function` does in `stream`, which is the current one, as a graph; nothing of it is executed.

    Args:
        generators: those that `function` draws from beside the default one.
    Returns:
        The graph, and what the function returned, in the graph's memory, which no other graph shares.
    Raises:
        RuntimeError (torch.OutOfMemoryError is one): it cannot be captured. After this and any other error
        the allocator is as it was, and the generators go on. But graphs made before keep the generators'
        old states: to replay one would draw what plain calls draw.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    begun, failure = False, None
    _clear_workspaces()
    try:
        for generator in generators:
            graph.register_generator_state(generator)
        # other threads (prefetching, JAX) may use the GPU while this one captures
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            begun = True
            try:
                return graph, function()
            except BaseException as error:  # which the end of the capture may cover with one of its own
                failure = error
                raise
    except BaseException as error:
        del graph
        _clear_frames(failure, error)
        _abandon(pool, generators, begun)
        try:
            raise failure or error from None
        finally:
            failure = None  # its frames hold this one


def _clear_frames(*errors: BaseException | None) -> None:
    """Let go of what lives on in the frames that errors came through: tensors that a function had made."""
    for error in errors:
        traceback.clear_frames(None if error is None else error.__traceback__)


def _clear_workspaces() -> None:
    """Have cuBLAS make the workspace that a capture needs in the capture's own pool.

    One that is there already lies in memory that can be freed while the graph still writes to it: by whoever
    clears the workspaces, and by torch when another graph dies on a stream of the same number.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # where torch was built with CUDA
    if clear is not None:
        clear()


def _abandon(pool: tuple[int, int], generators: Sequence[Generator], begun: bool) -> None:
    """End what a failed capture leaves begun, as torch does it only where the capture's end succeeds: the
    allocator would refuse all that follows, and generators would count their draws into the dead graph."""
    index = torch.cuda.current_device()
    with suppress(RuntimeError):  # nothing is begun any more
        torch._C._cuda_endAllocateToPool(index, pool)
    if STUCK:  # every capture registers the default generator too
        generators = (*generators, torch.cuda.default_generators[index])
    for generator in generators:
        generator.graphsafe_set_state(generator.clone_state())
    _clear_workspaces()  # that of the failed capture lies in its pool
    if begun and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        _release(index, pool)


def _release(index: int, pool: tuple[int, int]) -> None:
    """Take back the count by which a failed capture holds its pool, where this torch does not do so itself.

    That shows where memory that nothing uses stays reserved after `empty_cache`. A count that is taken back
    twice would break the allocator.
    """
    torch.cuda.empty_cache()
    for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
        mine = (segment["device"], tuple(segment["segment_pool_id"])) == (index, pool)
        if mine and not segment["active_size"]:
            torch._C._cuda_releasePool(index, pool)
            torch.cuda.empty_cache()
            return
