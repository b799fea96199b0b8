"""Workloads of the layers of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...norm import _computed, bias_layer_norm
from .case import Case


def _case(E: int, H: int, dtype: torch.dtype, form: str, spread: int = 1) -> Case:
    """`form`: relu, residual or frozen (relu, and no gradients of parameters); spread * batch rows."""

    def prepare(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        x, residual, seed = (torch.randn(E, spread * batch, H, device=device, dtype=dtype) for _ in range(3))
        parameters = [torch.randn(E, H, device=device, dtype=_computed(dtype)) for _ in range(3)]
        wanted = [x.requires_grad_()]
        if form != "frozen":
            wanted += [p.requires_grad_() for p in parameters]
        skip = residual if form == "residual" else None

        def call() -> object:
            out = bias_layer_norm(x, *parameters, residual=skip, relu=skip is None, impl=impl)
            return out, *torch.autograd.grad(out, wanted, seed)

        return call

    streams = 6 if form == "residual" else 5
    moved = streams * E * spread * H * torch.finfo(dtype).bits // 8
    label = f"E={E} H={H} {str(dtype).removeprefix('torch.')} {form}"
    label += f" rows x{spread}" if spread > 1 else ""
    kernels: tuple[str, ...] = ("norm_forward", "norm_backward", "norm_sums", "norm_reduce")
    if form == "frozen":
        kernels = ("norm_forward", "norm_frozen")
    return Case("bias_layer_norm", label, prepare, lambda batch: moved * batch, kernels)


def cases() -> Iterator[Case]:
    """The layers of a critic at its widths, with few rows and with many; then odd widths and float64."""
    for H in (256, 512, 1024, 2048, 4096, 8192, 16384):
        many = max(1, 16384 // H)
        for dtype in (torch.bfloat16, torch.float32):
            yield _case(2, H, dtype, "relu")
            yield _case(2, H, dtype, "residual", many)
            if many > 1:
                yield _case(2, H, dtype, "relu", many)
                yield _case(2, H, dtype, "frozen", many)
    yield _case(2, 100, torch.float32, "relu")
    yield _case(1, 64, torch.bfloat16, "residual")
    yield _case(2, 512, torch.float64, "residual")
