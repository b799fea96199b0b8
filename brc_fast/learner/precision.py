"""What matrix products compute in, and on how many cores; everything else stays in float32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from brc_fast.config import Precision
from brc_fast.errors import InputError

__all__ = ["check_precision", "cores", "low_dtype", "products"]

TENSOR_CORES = (8, 0)  # compute capability from which TF32 and bfloat16 products exist


def check_precision(precision: Precision, device: str | torch.device, dtype: torch.dtype) -> None:
    """InputError where the device lacks this precision, or parameters of this dtype have only their own, or
    none."""
    place = torch.device(device)
    if dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"dtype must be torch.float32 or torch.float64, got {dtype}; precision bf16 is for low precision"
        )
    if precision not in ("fp32", "tf32", "bf16"):
        raise InputError(f"precision must be one of fp32, tf32, bf16, got {precision!r}")
    if precision == "fp32":
        return
    if dtype != torch.float32:
        raise InputError(f"precision {precision} is for float32 parameters, got {dtype}; leave it at fp32")
    if place.type == "cuda" and torch.cuda.get_device_capability(place) < TENSOR_CORES:
        name, has = torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place)
        raise InputError(
            f"precision {precision} needs compute capability 8.0, {name} has {has[0]}.{has[1]}; use fp32"
        )
    if place.type == "cpu" and precision == "tf32":
        raise InputError("precision tf32 needs a CUDA device, the learner is on the CPU; use fp32 or bf16")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def low_dtype(precision: Precision) -> torch.dtype | None:
    """Of the copies of parameters that products take, and of gradients; None for that of the parameters."""
    return torch.bfloat16 if precision == "bf16" else None


@contextmanager
def products(precision: Precision, device: str | torch.device) -> Iterator[None]:
    """Let float32 products on a GPU use TF32, or not, in this block, and none the caller's autocast; the
    caller's own choices come back.

    torch has an older and a newer switch, and refuses to read one that contradicts the other: the older sets
    both.
    """
    kind = torch.device(device).type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False), products(precision, device):
            yield
        return
    if kind != "cuda":
        yield
        return
    backend = torch.backends.cuda.matmul
    newer = backend.fp32_precision
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the newer one was set
        older = "highest"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        backend.fp32_precision = newer
