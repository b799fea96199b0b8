"""What the tests of every op share: comparison with the float64 twin, memory layouts, guarded memory."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from brc_fast import kernels
from brc_fast.kernels.runtime import native

for _family in kernels.FAMILIES:
    importlib.import_module(f"brc_fast.kernels.{_family}")
OPS = torch.ops.brc_fast  # as torch's dispatcher knows them
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# How many roundings of its own a kernel may add to twice what the twin loses in the same dtype.
ROUNDINGS = {torch.float64: 64.0, torch.float32: 16.0, torch.float16: 1.0, torch.bfloat16: 1.0}

Op = Callable[..., Any]


def guarded(x: Tensor) -> Tensor:
    """A contiguous copy of `x` between NaNs (or the largest integer): reading beside it shows."""
    poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    whole = torch.full((x.numel() + 256,), poison, dtype=x.dtype, device=x.device)
    inside = whole[128 : 128 + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside


def outputs_and_gradients(
    op: Op, inputs: Sequence[Tensor | None], seeds: Sequence[Tensor], wanted: Sequence[int]
) -> list[Tensor]:
    """Outputs of `op(*inputs)`, then the gradients of the inputs at places `wanted` for these seeds.

    Every gradient must be there.
    """
    leaves = [None if x is None else x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    out = op(*leaves)
    out = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    if not wanted:
        return [o.detach() for o in out]
    grads = torch.autograd.grad(out, [leaves[i] for i in wanted], list(seeds))
    return [o.detach() for o in out] + list(grads)


def assert_close_to_truth(mine: Tensor, exact: Tensor, plain: Tensor, told: str = "") -> None:
    """`mine` is as near to the float64 truth as the twin in the same dtype, within a factor of two.

    max|mine - exact| <= 2 max|plain - exact| + ROUNDINGS * eps(dtype) * max|exact|
    """
    assert mine.shape == exact.shape, f"{told}: shape {list(mine.shape)}, expected {list(exact.shape)}"
    assert mine.dtype == plain.dtype, f"{told}: {mine.dtype}, expected {plain.dtype}"
    if mine.numel() == 0:
        return
    assert mine.isfinite().all(), f"{told}: {(~mine.isfinite()).sum().item()} values are not finite"
    mine, exact, low = mine.cpu().double(), exact.cpu().double(), plain.cpu().double()
    rounding = ROUNDINGS[plain.dtype] * torch.finfo(plain.dtype).eps * exact.abs().max()
    allowed = (2.0 * (low - exact).abs().max() + rounding).item()
    error = (mine - exact).abs().max().item()
    assert error <= allowed, f"{told}: error {error:.3e}, allowed {allowed:.3e}"


def assert_follows_twin(
    op: Op,
    twin: Op,
    inputs: Sequence[Tensor | None],
    seeds: Sequence[Tensor],
    wanted: Sequence[int],
    dtype: torch.dtype,
    device: str,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """Values and gradients of a kernel in `dtype` against its twin in float64, as `assert_close_to_truth`.

    `inputs` and `seeds` are float64 on the CPU (integers stay what they are): they are first rounded to
    `dtype`, so that all three see the same numbers. The kernel's inputs are guarded. Returns the kernel's
    outputs and gradients.
    """

    def to(x: Tensor | None, kind: torch.dtype, place: str) -> Tensor | None:
        if x is None or not x.is_floating_point():
            return x if x is None else x.to(place)
        return x.to(dtype).to(kind).to(place)

    results = []
    for function, kind, place in ((op, dtype, device), (twin, torch.float64, "cpu"), (twin, dtype, "cpu")):
        moved = [to(x, kind, place) for x in inputs]
        if function is op:
            moved = [None if x is None else guarded(x) for x in moved]
        moved_seeds = [to(s, kind, place) for s in seeds]
        results.append(outputs_and_gradients(function, moved, moved_seeds, wanted))  # type: ignore[arg-type]
    mine, exact, plain = results
    assert len(mine) == len(exact)
    for place, parts in enumerate(zip(mine, exact, plain, strict=True)):
        assert_close_to_truth(*parts, told=names[place] if names else f"result {place}")
    return mine


def tensors_of(*things: object) -> list[Tensor]:
    """Every tensor that these reach through objects of this package, and through what they would call."""
    found, seen, left = [], dict[int, object](), list(things)
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, (list, tuple, dict)):
            left += thing.values() if isinstance(thing, dict) else thing
        elif isinstance(thing, functools.partial):
            left += [thing.args, thing.func, vars(thing)]
        elif inspect.ismethod(thing) or inspect.isbuiltin(thing):
            left.append(thing.__self__)
        elif type(thing).__module__.startswith("brc_fast") and not inspect.ismodule(thing):
            left.append(vars(thing))
    return found


def bytes_beside(thing: object, *others: object) -> int:
    """Bytes of the memory that a thing holds and the others do not, each piece whole."""
    theirs = {x.untyped_storage().data_ptr() for x in tensors_of(*others)}
    mine = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(thing)}
    return sum(size for place, size in mine.items() if place not in theirs)


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the shape of `x`: every order of its axes in memory, each plain, with gaps along an axis,
    starting late, or expanded along an axis. 42 for rank 3; the values of an expanded one repeat."""
    rank = x.dim()
    for order in itertools.permutations(range(rank)):
        inverse = [order.index(axis) for axis in range(rank)]
        stored = x.permute(order).contiguous().permute(inverse)
        yield f"order {order}", stored
        for axis in range(rank):
            wide = torch.full_like(x.permute(order), float("nan")).repeat_interleave(2, order.index(axis))
            gaps = wide.permute(inverse)
            part = gaps[tuple(slice(1, None, 2) if a == axis else slice(None) for a in range(rank))]
            part.copy_(x)
            yield f"order {order}, gaps along {axis}", part
            yield f"order {order}, expanded along {axis}", stored.narrow(axis, 0, 1).expand_as(x)


def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiled passes that are called from now on."""
    calls: list[str] = []

    class Recorder:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            if name not in ("set_threads", "recording"):
                calls.append(name)
            return getattr(compiled, name)  # type: ignore[no-any-return]

    compiled = native.compiled
    monkeypatch.setattr(native, "compiled", Recorder())
    return calls


def assert_torch_sees(
    step: Callable[..., Tensor], fresh: Callable[[], list[Tensor]], *ops: str
) -> list[Tensor]:
    """A step that writes into its arguments does the same in compiled code and under a mode, which is told of
    these ops, and has the right shape where there are only shapes. Returns what it wrote."""
    seen: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    plain, traced, watched = fresh(), fresh(), fresh()
    expected = step(*plain)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*traced), expected)
    with Watching():
        torch.testing.assert_close(step(*watched), expected)
    assert {f"brc_fast.{name}.default" for name in ops} <= set(seen)
    for others in (traced, watched):
        for mine, other in zip(others, plain, strict=True):
            torch.testing.assert_close(mine, other)
    mode = FakeTensorMode()
    shapes = [mode.from_tensor(x) for x in fresh()]
    with mode:
        assert step(*shapes).shape == expected.shape
    return plain
