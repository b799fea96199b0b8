"""Products of stacked networks into memory that stays: by torch, or our own (csrc/products.hpp).

Ours are faster than the libraries that torch carries wherever they run: on a CPU with AVX-512 (bfloat16: with
AVX512-BF16, and without AMX, which torch uses and ours do not). The choice follows from the processor alone;
BRC_FAST_PRODUCTS, read at the first product, sets another: auto, native or torch.

Numbers: sums in float32 (torch: of the dtype), whose bits do not depend on the number of threads.
"""

from __future__ import annotations

import os
import timeit
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from .runtime.native import LOW, compiled, share_threads

__all__ = ["Call", "by_torch", "chosen_products", "fast_bfloat16", "measured_rate", "multiply"]

Call = Callable[[], object]

WAYS = ("auto", "native", "torch")


@lru_cache
def chosen_products(dtype: torch.dtype) -> str:
    """Who makes products of this dtype on this CPU: native or torch.

    Raises:
        ValueError for a BRC_FAST_PRODUCTS that is none, or that asks for products which the processor lacks.
    """
    wanted = os.environ.get("BRC_FAST_PRODUCTS", "auto")
    if wanted not in WAYS:
        raise ValueError(f"BRC_FAST_PRODUCTS must be one of {', '.join(WAYS)}, got {wanted!r}")
    if dtype not in LOW or wanted == "torch":
        return "torch"
    can = compiled is not None and compiled.multiplies(LOW[dtype])
    if wanted == "native" and not can:
        needs = "AVX512-BF16" if LOW[dtype] else "AVX-512"
        lacks = "the package's compiled part" if compiled is None else f"a processor with {needs}"
        raise ValueError(f"BRC_FAST_PRODUCTS=native needs {lacks} for {dtype}, which is not there; use auto")
    better = wanted == "auto" and LOW[dtype] and has_amx()
    return "native" if can and not better else "torch"


def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 in tiles, which torch's library uses."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


def fast_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    return has_amx() or (compiled is not None and compiled.multiplies(True))


def measured_rate(dtype: torch.dtype) -> float:
    """Operations per second of products here, of two networks of 256 rows and columns, by torch's threads; it
    takes some hundredths of a second."""
    x, y = torch.randn(2, 2, 256, 256).to(dtype).unbind()
    out = torch.empty_like(x)  # kept: the call may hold its address
    call = multiply(x, y, out)
    share_threads()
    call()
    best = min(timeit.repeat(call, number=5, repeat=5)) / 5.0
    return 2.0 * 2.0 * 256.0**3 / best


def by_torch(x: Tensor, y: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> Call:
    """What fills `out` with x y, plus a bias, or adds x y to it.

    Args:
        x: [N, B, I]. y: [N, I, H]. out: [N, B, H], of their dtype, or float32. bias: [N, H]. Any strides.
    """
    if out.dtype != x.dtype:  # torch has none into another dtype
        return partial(_by_way_of, x, y, out, bias, add)
    if add:
        return partial(out.baddbmm_, x, y)
    if bias is None:
        return partial(torch.bmm, x, y, out=out)
    return partial(_affine, x, y, bias, out)


def _by_way_of(x: Tensor, y: Tensor, out: Tensor, bias: Tensor | None, add: bool) -> None:
    made = x.new_empty(out.shape)
    by_torch(x, y, made, bias)()
    if add:
        out.add_(made)
    else:
        out.copy_(made)


def _affine(x: Tensor, y: Tensor, bias: Tensor, out: Tensor) -> None:
    bias = bias if bias.dtype == x.dtype else bias.to(x.dtype)
    if len(x) == 1:  # one kernel on CUDA: baddbmm copies the bias first
        torch.addmm(bias[0], x[0], y[0], out=out[0])
    else:
        torch.baddbmm(bias.unsqueeze(1), x, y, out=out)


def multiply(x: Tensor, y: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> Call:
    """`by_torch`, or the same by the compiled products, on a CPU. The tensors must be kept as long as what is
    returned: it holds addresses."""
    if add and bias is not None:
        raise ValueError("a product has a bias or is added to what is there, not both")
    if not _fits(x, y, out, bias):
        return by_torch(x, y, out, bias, add)
    shift, distance = (0, 0) if bias is None else (bias.data_ptr(), bias.stride(0))
    return compiled.product(  # type: ignore[call-arg]
        *x.shape, out.shape[-1], LOW[x.dtype], x.data_ptr(), *x.stride(), y.data_ptr(),
        *y.stride(), shift, distance, out.data_ptr(), LOW[out.dtype], *out.stride()[:2], add,
    )  # fmt: skip


def _fits(x: Tensor, y: Tensor, out: Tensor, bias: Tensor | None) -> bool:
    if chosen_products(x.dtype) == "torch" or not x.shape[-1] or y.dtype != x.dtype:
        return False
    if out.dtype not in (x.dtype, torch.float32) or (bias is not None and bias.dtype != torch.float32):
        return False
    networks, rows, depth = x.shape
    if y.shape[:2] != (networks, depth) or out.shape != (networks, rows, y.shape[2]):
        return False  # torch says what is wrong
    dense = bias is None or bias.stride(-1) == 1
    return dense and out.stride(-1) == 1 and 1 in x.stride()[1:] and 1 in y.stride()[1:]
