"""The compiled passes for the CPU, and when they apply."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .dispatch import observed

try:
    from .. import _cpu as compiled
except ImportError:  # a checkout that was not built
    compiled = None  # type: ignore[assignment]

__all__ = [
    "LOW",
    "built",
    "changed",
    "check_ids",
    "compiled",
    "noted",
    "number",
    "recording",
    "serves",
    "share_threads",
    "takes",
    "takes_rows",
]

LOW = {torch.float32: False, torch.bfloat16: True}  # what passes over rows, and products, are compiled for


def takes(*tensors: Tensor) -> bool:
    """Whether the compiled passes exist and serve these tensors: float32, on the CPU, in a plain call. They
    share as many threads as torch has now."""
    if observed(*tensors) or not serves(*tensors):
        return False
    share_threads()
    return True


def takes_rows(x: Tensor) -> bool:
    """The same of passes over rows like x, which may be bfloat16."""
    if compiled is None or x.dtype not in LOW or not x.is_cpu or observed(x):
        return False
    share_threads()
    return True


def share_threads() -> None:
    """Let compiled passes use as many threads as torch does."""
    if compiled is not None:
        compiled.set_threads(torch.get_num_threads())


def serves(*tensors: Tensor) -> bool:
    """The same of any call, also one that a compiler sees."""
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    return compiled is not None


def built() -> bool:
    """Whether there are compiled passes at all."""
    return compiled is not None


def recording() -> bool:
    """Whether this thread's calls are put into a host graph, which reads no numbers of tensors."""
    return compiled is not None and compiled.recording()


def check_ids(ids: Tensor, count: int, name: str = "task_ids", letter: str = "T") -> None:
    """IndexError for integers outside [0, count), where they are on the host and in a plain call: a GPU would
    have to be waited for."""
    if not ids.is_cpu or observed(ids) or recording() or not ids.numel():
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        raise IndexError(f"{name} must be in [0, {letter}) = [0, {count}), got {wrong}")


def number(x: Tensor | float) -> tuple[int, float]:
    """An address to read it from, where it may be another one at the next replay (host_graph.py), or 0; and
    its value, which counts where there is no address."""
    if isinstance(x, Tensor) and x.dtype is torch.float32 and x.is_cpu:
        return x.data_ptr(), 0.0
    return 0, float(x)


class _Noted(threading.local):
    """What this thread has changed while it records."""

    tensors: list[Tensor] | None = None


noted = _Noted()


def changed(*tensors: Tensor | None) -> None:
    """Tell autograd that a compiled pass has written these."""
    written = [x for x in tensors if x is not None]
    torch.autograd.graph.increment_version(written)
    if noted.tensors is not None:
        noted.tensors += written
