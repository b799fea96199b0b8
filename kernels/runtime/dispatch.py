"""Which implementation an op takes, and how a kernel is launched.

    auto        kernels on CUDA, otherwise the twin (with the compiled passes of a CPU where they apply)
    triton      kernels, or an error that says why not; on a CPU only through Triton's interpreter
    reference   the plain PyTorch twin
    compile     the twin through torch.compile, checked against the plain one (twins.py)

The argument `impl` of an op goes before `use(...)`, which goes before the environment variable
BRC_FAST_KERNELS, which is read when this is imported. Only auto may choose: the others do what they say.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "INTERPRETED",
    "Launch",
    "casts",
    "chosen",
    "launch",
    "observed",
    "recording",
    "takes_kernels",
    "transparent",
    "unwatched",
    "use",
    "watched",
    "watching",
]

# Triton itself is imported with the first kernel, not here: that takes a quarter of a second.
INSTALLED = importlib.util.find_spec("triton") is not None
# Triton decides when a kernel is defined whether its interpreter takes the compiler's place.
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"

CHOICES = ("auto", "triton", "reference", "compile")
PLAIN = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _checked(choice: str, source: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


_choice = _checked(os.environ.get("BRC_FAST_KERNELS", "auto"), "BRC_FAST_KERNELS")


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Choose the implementation of every op in the block, in all threads: auto, triton, reference or
    compile."""
    global _choice
    before, _choice = _choice, _checked(choice, "the implementation")
    try:
        yield
    finally:
        _choice = before


def chosen(impl: str | None) -> str:
    """The choice that holds for a call with this `impl`; ValueError for an unknown one."""
    return _choice if impl is None else _checked(impl, "impl")


def observed(*tensors: Tensor) -> bool:
    """Whether a compiler, a tracer, torch.func, forward-mode AD, a dispatch mode or a tensor subclass
    watches."""
    return _transformed() or watched(*tensors)


def watched(*tensors: Tensor) -> bool:
    """Whether a compiler, a tracer, a dispatch mode or a tensor subclass sees what is called."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > _transparent.modes:
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    for tensor in tensors:  # noqa: SIM110 - half the time of any(..)
        if type(tensor) not in PLAIN:
            return True
    return False


class _Transparent(threading.local):
    """Dispatch modes of this thread that see compiled passes as well as operations."""

    modes = 0


_transparent = _Transparent()


@contextmanager
def transparent() -> Iterator[None]:
    """Around a dispatch mode from which nothing needs to be shown to."""
    _transparent.modes += 1
    try:
        yield
    finally:
        _transparent.modes -= 1


def unwatched() -> bool:
    """Whether nothing sees or takes over what is called: no mode, no recorder and no watcher."""
    return not watched() and _recorder is None and _watcher is None


def casts(device: str) -> bool:
    """Whether autocast is on for this type of device; it does not know meta."""
    return device != "meta" and torch.is_autocast_enabled(device)


def takes_kernels(impl: str | None, *tensors: Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> bool:
    """Whether an op on these tensors, whose kernels take these dtypes, runs them (True) or its twin (False).

    Raises RuntimeError or TypeError where kernels were asked for and cannot run, ValueError for an unknown
    choice.
    """
    choice = chosen(impl)
    if choice in ("reference", "compile"):
        return False
    first = tensors[0]
    if choice == "auto":
        if _recorder is not None:
            return True
        if not first.is_cuda or not INSTALLED or _transformed():
            return False
        return all(t.is_cuda and t.dtype in dtypes for t in tensors)
    if not INSTALLED:
        raise RuntimeError('kernels were asked for, but triton is not installed; pip install "triton>=3.6"')
    for tensor in tensors:
        if tensor.dtype not in dtypes:
            known = ", ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"kernels take tensors of {known}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"tensors must be on one device, got {first.device} and {tensor.device}")
    if not (first.is_cuda or INTERPRETED or _recorder is not None):
        raise RuntimeError(
            f"kernels were asked for, but a tensor is on {first.device}; move it to CUDA, or set "
            "TRITON_INTERPRET=1 before triton is imported to run them through its interpreter"
        )
    return True


def _transformed() -> bool:
    """Inside of torch.func's transforms, forward-mode AD or torch.jit's tracer, which the twins serve."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return True
    return torch._C._get_tracing_state() is not None


class Launch(NamedTuple):
    """One launch as it would happen: the kernel, its arguments in order, and what is fixed at compilation."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


_recorder: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of making them, for tensors of any device; outputs stay unset."""
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


_watcher: Callable[[Launch], None] | None = None


@contextmanager
def watching(callback: Callable[[Launch], None]) -> Iterator[None]:
    """Hand every launch to `callback`, which makes it (`make`), or does not."""
    global _watcher
    before, _watcher = _watcher, callback
    try:
        yield
    finally:
        _watcher = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    enable_fp_fusion: bool = True,
    **constants: Any,
) -> None:
    """Launch a kernel on the device of its first tensor; `constants` are its constexpr arguments."""
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments, constants, options))
        return
    call = Launch(kernel, grid, arguments, constants, options)
    if _watcher is None:
        make(call)
    else:
        _watcher(call)


def make(call: Launch) -> None:
    """Make a launch on the device of its first tensor."""
    place = next(a for a in call.arguments if isinstance(a, Tensor)).device
    fixed = call.constants | call.options
    if place.type == "cuda" and place.index != torch.cuda.current_device():
        with torch.cuda.device(place):
            call.kernel[call.grid](*call.arguments, **fixed)
    else:
        call.kernel[call.grid](*call.arguments, **fixed)
