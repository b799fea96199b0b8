"""What kernels on rows of K logits share: arithmetic, launches and checks.

Rows may be padded, logits = padded[..., :K]: they are read where they are. Where they start at multiples of 8
elements they are read in words of 16 bytes, some columns beyond K included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .runtime.language import jit, tl, triton
from .runtime.numerics import wide
from .runtime.tables import architecture, configuration, next_power_of_2

__all__ = [
    "_check_logits",
    "_check_number",
    "_check_positive",
    "_check_shape",
    "_clip",
    "_cross_entropy",
    "_exp",
    "_hat",
    "_index",
    "_keep",
    "_logits",
    "_member_place",
    "_members",
    "_number",
    "_place",
    "_result",
    "_softmax",
    "_split",
    "_spread",
    "_start",
    "_strides",
    "_tile",
    "_unit",
    "_words",
]


@jit
def _place(B, BLOCK_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's rows of the batch, for reading and for writing: the last one is read in place of those
    beyond it."""
    # int64: row * stride passes 2**31
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    return tl.minimum(rows, B - 1), rows, rows < B


@jit
def _member_place(B, BLOCK_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's member, and as above."""
    blocks = tl.cdiv(B, BLOCK_B)
    program = tl.program_id(0)
    rows = (program % blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    return (program // blocks).to(tl.int64), tl.minimum(rows, B - 1), rows, rows < B


@jit
def _start(x_ptr, member, member_stride, rows, row_stride, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where these rows begin; strides count in UNIT elements."""
    return x_ptr + (tl.cast(member, tl.int64) * member_stride + rows * row_stride) * UNIT


@jit
def _logits(starts, k, K: tl.constexpr, READ: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(starts[:, None] + k[None, :], mask=(k < READ)[None, :], other=-float("inf"))


@jit
def _exp(x):  # type: ignore[no-untyped-def]
    """One instruction less than tl.exp has to spend on results below 1e-38, which are 0 here."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def _softmax(x, k, K: tl.constexpr, READ: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits less their maximum, their exponentials, the maximum and the sum. Beyond K they count as -inf."""
    x = wide(x)
    if READ > K:
        x = tl.where((k < K)[None, :], x, -float("inf"))
    m = tl.max(x, 1)
    x -= m[:, None]
    w = _exp(x)
    return x, w, m, tl.sum(w, 1)


@jit
def _clip(x, low, high):  # type: ignore[no-untyped-def]
    """NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@jit
def _unit(x):  # type: ignore[no-untyped-def]
    """Clip to [0, 1], which an addition does on the way; NaN becomes 0."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@jit
def _hat(d):  # type: ignore[no-untyped-def]
    return _unit(1.0 - tl.abs(d))


@jit
def _index(y, K: tl.constexpr, V_MAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the returns y lie, counted in atoms."""
    return _clip((_clip(y, -V_MAX, V_MAX) + V_MAX) * ((K - 1) / (2 * V_MAX)), 0.0, K - 1.0)


@jit
def _cross_entropy(x, total, t, k, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the masses t, given logits less their maximum and the sum of their exponentials."""
    log_p = tl.where((k < K)[None, :], x - tl.log(total)[:, None], 0.0)
    return -tl.sum(t * log_p, 1)


def _result(x: Tensor) -> torch.dtype:
    """The dtype of what is computed from x."""
    return torch.promote_types(x.dtype, torch.float32)


def _members(x: Tensor) -> Tensor:
    """x [.., B, K] as [M, B, K] with each row contiguous: a view where its memory allows, else a copy."""
    x = x.reshape(x.shape[:-2].numel(), x.shape[-2] if x.dim() > 1 else 1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> list[int]:
    """Of members and rows; an axis of one entry has none."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def _words(*tensors: Tensor) -> tuple[int, int]:
    """UNIT and READ for a tile of rows of each tensor [M, B, K].

    Where all rows start at multiples of 8 elements, strides count in 8 and rows are read up to the next
    multiple of 8, if that is memory of theirs.
    """
    K = tensors[0].shape[-1]
    read = -(-K // 8) * 8
    for x in tensors:
        strides = _strides(x)
        end = sum((size - 1) * stride for size, stride in zip(x.shape[:-1], strides, strict=True)) + read
        inside = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        if any(stride % 8 for stride in strides) or end > inside:
            return 1, K
    return 8, read


def _tile(
    name: str, x: Tensor, members: int, rows: int, tiles: int, columns: int
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and configuration for `members` times `rows` rows, of each of which `tiles` rows of K are read."""
    block_k = next_power_of_2(columns)
    width = tiles * block_k * (2 if x.dtype == torch.float64 else 1)
    # One warp per program: sums over a row stay inside of it. 512 numbers, 16 per lane, leave registers for
    # some 30 warps per multiprocessor, which together read enough at a time to fill the memory's pipes. More
    # warps where a single row would take too many registers, but no more lanes than atoms.
    few = 16 if architecture(x.device) == "cpu" else max(1, 512 // width)
    warps = min(8, max(1, block_k // 64), next_power_of_2(-(-width // 1024)))
    config = configuration(name, columns, x.dtype, x.device, {"BLOCK_B": few, "num_warps": warps})
    return (members * triton.cdiv(rows, config["BLOCK_B"]),), {**config, "BLOCK_K": block_k}


def _spread(grad: Tensor) -> tuple[Tensor, int]:
    """A gradient with one entry per row, and the step from one to the next: 0 where one number fills it."""
    if not any(grad.stride()):
        return grad, 0
    return grad.contiguous(), 1


def _number(value: Tensor | None, fixed: float, like: Tensor) -> tuple[Tensor | None, float]:
    """A number as kernels take it: its address, or itself where float32 holds it."""
    if value is None and like.dtype == torch.float64:
        value = like.new_full((), fixed)
    return value, fixed


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.inputs = [x for x in inputs if not isinstance(x, Tensor)]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))


def _check_logits(name: str, logits: Tensor, shape: str, rank: int) -> None:
    if logits.dim() < rank or logits.shape[-1] < 2:
        raise ValueError(f"{name} must have shape {shape} with K >= 2, got {list(logits.shape)}")


def _check_shape(name: str, tensor: Tensor, dims: str, *allowed: tuple[int, ...]) -> None:
    if tensor.shape not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{name} must have shape {dims} = {shapes}, got {list(tensor.shape)}")


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0.0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {number}")


def _check_number(name: str, number: Tensor | float) -> None:
    if isinstance(number, Tensor) and number.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one, got shape {list(number.shape)}")


def _split(number: Tensor | float) -> tuple[Tensor | None, float]:
    """A number as an op of torch.library takes it: a tensor, or else a float."""
    return (number.detach(), 0.0) if isinstance(number, Tensor) else (None, float(number))
