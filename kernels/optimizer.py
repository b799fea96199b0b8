"""AdamW over flat buffers in one pass, with all that an update wants of the new parameters.

    c = min(1, max_norm / (|g| + 1e-6)), or 1 without clipping
    m = m + (1 - b1) (c g - m),   v = b2 v + (1 - b2) (c g)^2
    p = p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p)
    target = target + tau (p - target),   low = round(p),   target_low = round(target),   norm = |g|

Dims:     P parameters, flat.
Memory:   reads p, g, m, v, target and writes p, m, v, target, low, target_low once: 38 bytes per parameter
          if g is bfloat16 and all are there. Clipping reads g once more, for its norm. A thread moves 4
          parameters at a time, 16 bytes of a float32, if the buffers start at multiples of 16 bytes; P may
          be any number. Buffers that start elsewhere work, element by element.
Launches: 2, and 1 if one program does it all without clipping. Programs stride over the buffers: their
          number is bounded, and with it that of the partial sums of the norm. Without clipping the second
          launch adds these up and counts the step, which all programs of the first have read by then. With
          clipping the first launch sums squares and counts the step, and each program of the second adds up
          the sums. ema_ takes 1. In float64 a number that is no tensor is first written to the device.
Numbers:  float32, or float64 where the parameters are. Sums are added in a fixed order. 1 - b^t holds to 3e-7
          from the first step on: where the difference would cancel, a series takes its place. A norm beyond
          1.8e19 is infinite, as torch's is. Copies are rounded to nearest.
Source:   Loshchilov and Hutter 2019, arXiv:1711.05101.
Twins:    reference.adamw_, reference.ema_

On a CPU a float32 step is one compiled pass (csrc/optimizer.hpp; clipping reads g once more), and any other
is torch's fused one. Nothing here has a gradient.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .runtime import native
from .runtime.dispatch import chosen, launch, observed, takes_kernels
from .runtime.language import jit, tl
from .runtime.library import NAMESPACE
from .runtime.numerics import scalar
from .runtime.tables import architecture, configuration, processors
from .runtime.twins import twin

__all__ = ["adamw_", "ema_"]

WIDE = (torch.float32, torch.float64)
LOW = (torch.bfloat16, torch.float16)
FLOATS = (*WIDE, *LOW)
Dtypes = tuple[torch.dtype, ...]
Given = dict[str, tuple[Any, Dtypes]]  # name: argument, and what it may be of
SUMS = 1024  # partial sums that a program adds up at a time


@jit
def _rounded(x, like_ptr):  # type: ignore[no-untyped-def]
    """To the type behind a pointer; a float64 by way of float32, as torch does it."""
    return x.to(tl.float32).to(like_ptr.dtype.element_ty)


@jit
def _lerp(q, p, tau):  # type: ignore[no-untyped-def]
    """q + tau (p - q), in the form of torch.lerp: exactly p for tau = 1."""
    d = p - q
    return tl.where(tau < 0.5, q + tau * d, p - (1.0 - tau) * d)


@jit
def _correction(t, LOG_BETA: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 - beta**t."""
    x = t * LOG_BETA
    if t.dtype == tl.float64:
        return 1.0 - tl.exp(x)
    else:  # float64 is slow on many GPUs. Near 0: -x (1 + x/2 (1 + x/3 (... (1 + x/11))))
        near = tl.maximum(x, -1.0)
        series = 1.0 + near * (1.0 / 11)
        for n in tl.static_range(9):
            series = 1.0 + near * (1.0 / (10 - n)) * series
        return tl.where(x > -1.0, -near * series, 1.0 - tl.exp(x))


@jit
def _scales(t, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the mean and of the root of the squares, for their bias after t steps."""
    return 1.0 / _correction(t, LOG_BETA1), 1.0 / tl.sqrt(_correction(t, LOG_BETA2))


@jit
def _step(  # type: ignore[no-untyped-def]
    p,
    g,
    m,
    v,
    rate,
    mean_scale,
    root_scale,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
):
    """The new p, m and v."""
    m += (1.0 - BETA1) * (g - m)
    v = BETA2 * v + (1.0 - BETA2) * g * g
    return p - rate * (mean_scale * m / (root_scale * tl.sqrt(v) + EPS) + WEIGHT_DECAY * p), m, v


@jit
def _norm(partial_ptr, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Square root of the sum of N partial sums."""
    total = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + n, mask=n < N, other=0.0)
    return tl.sqrt(tl.sum(total))


@jit
def _adamw_kernel(  # type: ignore[no-untyped-def]
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    step_ptr,
    target_ptr,
    low_ptr,
    target_low_ptr,
    norm_ptr,
    partial_ptr,
    learning_rate_ptr,
    tau_ptr,
    max_norm_ptr,
    learning_rate,
    tau,
    max_norm,
    P,
    N,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    CLIP: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    dtype = param_ptr.dtype.element_ty
    program = tl.program_id(0)
    step = tl.load(step_ptr)
    if not CLIP:
        step += 1
    else:  # counted already
        norm = _norm(partial_ptr, N, BLOCK_N)
        if norm_ptr is not None:
            tl.store(norm_ptr, norm, mask=program == 0)
        clip = scalar(max_norm_ptr, max_norm, dtype) / (norm + 1e-6)
        clip = tl.where(clip > 1.0, 1.0, clip)  # NaN stays NaN
    t = step.to(dtype)
    mean_scale, root_scale = _scales(t, LOG_BETA1, LOG_BETA2)
    rate = scalar(learning_rate_ptr, learning_rate, dtype)
    if target_ptr is not None:
        share = scalar(tau_ptr, tau, dtype)
    squares = tl.zeros([BLOCK_P], dtype)
    whole = P // BLOCK_P * BLOCK_P
    each = tl.arange(0, BLOCK_P).to(tl.int64)  # there may be more than 2**31 parameters
    for TAIL in tl.static_range(2):  # whole blocks without a mask, then what is left
        first = whole * TAIL + program.to(tl.int64) * BLOCK_P
        for start in range(first, P if TAIL else whole, tl.num_programs(0) * BLOCK_P):
            i = start + each
            mask = i < P if TAIL else None
            other = 0.0 if TAIL else None
            # all loads first: a store could change what a later one reads, for all that the compiler knows
            g = tl.load(grad_ptr + i, mask=mask, other=other).to(dtype)
            m = tl.load(exp_avg_ptr + i, mask=mask, other=other)
            v = tl.load(exp_avg_sq_ptr + i, mask=mask, other=other)
            p = tl.load(param_ptr + i, mask=mask, other=other)
            if target_ptr is not None:
                q = tl.load(target_ptr + i, mask=mask, other=other)
            if CLIP:
                g *= clip
            elif norm_ptr is not None:
                squares += g * g
            p, m, v = _step(p, g, m, v, rate, mean_scale, root_scale, BETA1, BETA2, EPS, WEIGHT_DECAY)
            tl.store(exp_avg_ptr + i, m, mask=mask)
            tl.store(exp_avg_sq_ptr + i, v, mask=mask)
            tl.store(param_ptr + i, p, mask=mask)
            if low_ptr is not None:
                tl.store(low_ptr + i, _rounded(p, low_ptr), mask=mask)
            if target_ptr is not None:
                q = _lerp(q, p, share)
                tl.store(target_ptr + i, q, mask=mask)
                if target_low_ptr is not None:
                    tl.store(target_low_ptr + i, _rounded(q, target_low_ptr), mask=mask)
    if not CLIP:
        if ALONE:
            if norm_ptr is not None:
                tl.store(norm_ptr, tl.sqrt(tl.sum(squares)))
            tl.debug_barrier()  # a barrier: no warp still has to read the step
            tl.store(step_ptr, step)
        elif norm_ptr is not None:
            tl.store(partial_ptr + program, tl.sum(squares))


@jit
def _squares_kernel(grad_ptr, step_ptr, partial_ptr, P, BLOCK_P: tl.constexpr):  # type: ignore[no-untyped-def]
    dtype = partial_ptr.dtype.element_ty
    program = tl.program_id(0)
    squares = tl.zeros([BLOCK_P], dtype)
    whole = P // BLOCK_P * BLOCK_P
    each = tl.arange(0, BLOCK_P).to(tl.int64)
    for TAIL in tl.static_range(2):
        first = whole * TAIL + program.to(tl.int64) * BLOCK_P
        for start in range(first, P if TAIL else whole, tl.num_programs(0) * BLOCK_P):
            i = start + each
            g = tl.load(grad_ptr + i, mask=i < P if TAIL else None, other=0.0 if TAIL else None).to(dtype)
            squares += g * g
    tl.store(partial_ptr + program, tl.sum(squares))
    counts = program == 0  # alone: a load by another program would race with this store
    tl.store(step_ptr, tl.load(step_ptr, mask=counts, other=0.0) + 1, mask=counts)


@jit
def _finish_kernel(step_ptr, norm_ptr, partial_ptr, N, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    if norm_ptr is not None:
        tl.store(norm_ptr, _norm(partial_ptr, N, BLOCK_N))
    tl.store(step_ptr, tl.load(step_ptr) + 1)


@jit
def _ema_kernel(target_ptr, param_ptr, low_ptr, tau_ptr, tau, P, BLOCK_P: tl.constexpr):  # type: ignore[no-untyped-def]
    share = scalar(tau_ptr, tau, target_ptr.dtype.element_ty)
    whole = P // BLOCK_P * BLOCK_P
    each = tl.arange(0, BLOCK_P).to(tl.int64)
    for TAIL in tl.static_range(2):
        first = whole * TAIL + tl.program_id(0).to(tl.int64) * BLOCK_P
        for start in range(first, P if TAIL else whole, tl.num_programs(0) * BLOCK_P):
            i = start + each
            mask = i < P if TAIL else None
            p = tl.load(param_ptr + i, mask=mask, other=0.0 if TAIL else None)
            q = _lerp(tl.load(target_ptr + i, mask=mask, other=0.0 if TAIL else None), p, share)
            tl.store(target_ptr + i, q, mask=mask)
            if low_ptr is not None:
                tl.store(low_ptr + i, _rounded(q, low_ptr), mask=mask)


class InPlaceOp:
    """A function that changes tensors and returns nothing, which is also the op brc_fast::name.

    A plain call goes straight to the function, and counts the change where autograd looks for it.

    Args:
        function: annotated as torch.library wants it. changed: the names of the arguments that it changes.
    """

    def __init__(self, name: str, function: Callable[..., None], changed: Iterable[str]) -> None:
        names = list(inspect.signature(function).parameters)
        self._function = function
        self._changed = [names.index(argument) for argument in changed]
        self.library = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=tuple(changed))
        self.library.register_fake(lambda *_: None)

    def __call__(self, *arguments: Any) -> None:
        if observed(*(a for a in arguments if isinstance(a, Tensor))):
            self.library(*arguments)
            return
        self._function(*arguments)
        for index in self._changed:
            if arguments[index] is not None:
                torch.autograd.graph.increment_version(arguments[index])


def _programs(kernel: str, x: Tensor, loads: int, most: int) -> tuple[int, dict[str, Any]]:
    """How many programs, and their configuration, whose PROGRAMS is their largest number per multiprocessor.

    Each of 4 warps reads 16 bytes of x per thread, `loads` times: whole sectors of memory, and no exchange
    between threads where other buffers are read and written in the same layout.
    """
    arch = architecture(x.device)
    block = loads * 4 * (64 if arch.startswith("gfx") else 32) * 16 // x.element_size()
    heuristic = {"BLOCK_P": 16384 if arch == "cpu" else block, "num_warps": 4, "PROGRAMS": most}
    config: dict[str, Any] = dict(configuration(kernel, x.numel(), x.dtype, x.device, heuristic))
    limit = config.pop("PROGRAMS") * processors(x.device)
    return max(1, min(-(-x.numel() // config["BLOCK_P"]), limit)), config


def _log(beta: float) -> float:
    return math.log(max(beta, 1e-300))


def _at(value: float, tensor: Tensor | None, param: Tensor) -> tuple[Tensor | None, float]:
    """A scalar for a kernel: its address, or its value, which reaches a kernel as a float32."""
    if tensor is None and param.dtype == torch.float64:
        tensor = torch.full((), value, dtype=torch.float64, device=param.device)
    return tensor, float(value)


def _adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    target: Tensor | None,
    low: Tensor | None,
    target_low: Tensor | None,
    gradient_norm: Tensor | None,
    learning_rate_tensor: Tensor | None,
    tau_tensor: Tensor | None,
    max_norm_tensor: Tensor | None,
    learning_rate: float,
    tau: float,
    max_norm: float,
    clip: bool,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    programs, config = _programs("adamw", param, 1, 32)
    alone = not clip and programs == 1
    partial, sums = None, 0
    if clip:
        sums, squares = _programs("squares", grad, 4, 8)
        partial = param.new_empty(sums)
        launch(_squares_kernel, (sums,), grad, step, partial, param.numel(), **squares)
    elif gradient_norm is not None and not alone:
        sums, partial = programs, param.new_empty(programs)
    rate = _at(learning_rate, learning_rate_tensor, param)
    share = (None, 0.0) if target is None else _at(tau, tau_tensor, param)
    limit = _at(max_norm, max_norm_tensor, param) if clip else (None, 0.0)
    addresses, values = zip(rate, share, limit, strict=True)
    buffers = (param, grad, exp_avg, exp_avg_sq, step, target, low, target_low, gradient_norm, partial)
    launch(
        _adamw_kernel,
        (programs,),
        *buffers,
        *addresses,
        *values,
        param.numel(),
        sums,
        BETA1=beta1,
        BETA2=beta2,
        LOG_BETA1=_log(beta1),
        LOG_BETA2=_log(beta2),
        EPS=eps,
        WEIGHT_DECAY=weight_decay,
        CLIP=clip,
        ALONE=alone,
        BLOCK_N=SUMS,
        **config,
    )
    if not (clip or alone):
        launch(_finish_kernel, (1,), step, gradient_norm, partial, sums, BLOCK_N=4 * SUMS)


def _ema(target: Tensor, param: Tensor, low: Tensor | None, tau_tensor: Tensor | None, tau: float) -> None:
    if target.numel() > 0:
        programs, config = _programs("ema", target, 1, 32)
        share = _at(tau, tau_tensor, target)
        launch(_ema_kernel, (programs,), target, param, low, *share, target.numel(), **config)


CHANGED = ("param", "exp_avg", "exp_avg_sq", "step", "target", "low", "target_low", "gradient_norm")
_adamw_op = InPlaceOp("adamw", _adamw, CHANGED)
_ema_op = InPlaceOp("ema", _ema, ("target", "low"))


def _check(likes: str, like: Tensor, flat: Given, scalars: Given) -> None:
    """Refuse buffers that are not flat like `like`, and tensors that are no scalars on its device."""
    device, shape = like.device, like.shape
    for name, (x, dtypes) in flat.items():
        if x is None or (
            x.dtype in dtypes
            and x.device == device
            and x.shape == shape
            and len(shape) == 1
            and x.is_contiguous()
        ):
            continue
        _check_place(name, x, likes, device, dtypes)
        if len(shape) != 1:
            raise ValueError(f"{likes} must be flat, of shape [P], got {list(shape)}")
        if x.shape != shape:
            raise ValueError(f"{name} must have shape [P] = {list(shape)}, got {list(x.shape)}")
        raise ValueError(
            f"{name} must be contiguous, got strides {list(x.stride())}; flatten it into a buffer"
        )
    for name, (x, dtypes) in scalars.items():
        if not isinstance(x, Tensor):
            continue
        _check_place(name, x, likes, device, dtypes)
        if x.dim() != 0:
            raise ValueError(f"{name} must be a 0-d tensor, got shape {list(x.shape)}")


def _check_place(name: str, x: Tensor, likes: str, device: torch.device, dtypes: Dtypes) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like {likes}, got {x.device}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be of dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")


def _split(x: float | Tensor) -> tuple[Tensor | None, float]:
    return (x, 0.0) if isinstance(x, Tensor) else (None, x)


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    learning_rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    target: Tensor | None = None,
    tau: float | Tensor = 0.005,
    low: Tensor | None = None,
    target_low: Tensor | None = None,
    max_norm: float | Tensor | None = None,
    gradient_norm: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """One AdamW step in place (Adam with weight_decay 0), over flat buffers; then the target and the copies.

        g = min(1, max_norm / (|grad| + 1e-6)) * grad, or grad without max_norm
        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        p -= learning_rate * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p)
        target += tau * (p - target)

    In a kernel, learning_rate, tau and max_norm may change from call to call; another value of betas, eps or
    weight_decay compiles it anew. As 0-d tensors the three are read on the device: a CUDA graph that is
    replayed sees their new values.

    Args:
        param, exp_avg, exp_avg_sq: [P] contiguous, all float32 or all float64. No buffers share memory.
        grad: [P] contiguous, of any float dtype; it is not changed.
        step: 0-d float32 or float64 on the device of param, t - 1 on entry and t on return.
        learning_rate, tau, max_norm: numbers, or 0-d float tensors on the device of param.
        target: [P] like param, moved towards the new param.
        low, target_low: [P] bfloat16 or float16, which receive the new param and the new target, rounded.
        max_norm: the largest L2 norm of the gradient, as in torch.nn.utils.clip_grad_norm_: there too a NaN
            in the gradient reaches every parameter.
        gradient_norm: 0-d float32 or float64, which receives the L2 norm of the gradient as it came.
        impl: auto, triton, reference or compile (`kernels.use`).
    Raises:
        ValueError, TypeError: for a tensor of another device, dtype or shape, or with gaps.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    same = (param.dtype,)
    flat: Given = {"param": (param, WIDE), "grad": (grad, FLOATS), "exp_avg": (exp_avg, same)}
    flat |= {"exp_avg_sq": (exp_avg_sq, same), "target": (target, same)}
    flat |= {"low": (low, LOW), "target_low": (target_low, LOW)}
    scalars: Given = {"step": (step, WIDE), "gradient_norm": (gradient_norm, WIDE)}
    scalars |= {
        "learning_rate": (learning_rate, FLOATS),
        "tau": (tau, FLOATS),
        "max_norm": (max_norm, FLOATS),
    }
    _check("param", param, flat, scalars)
    if target_low is not None and target is None:
        raise ValueError("target_low needs a target of shape [P], got None")
    if takes_kernels(impl, param, grad):
        numbers = [_split(x) for x in (learning_rate, tau, 0.0 if max_norm is None else max_norm)]
        buffers = (param, grad, exp_avg, exp_avg_sq, step, target, low, target_low, gradient_norm)
        constants = (max_norm is not None, *betas, eps, weight_decay)
        _adamw_op(*buffers, *(x[0] for x in numbers), *(x[1] for x in numbers), *constants)
        return
    rule: dict[str, Any] = {"learning_rate": learning_rate, "betas": betas, "eps": eps}
    rule |= {"weight_decay": weight_decay, "max_norm": max_norm, "gradient_norm": gradient_norm}
    if chosen(impl) == "auto" and not observed(param, grad):
        moved = param if target is None else target
        follow: dict[str, Any] = {"target": target, "tau": tau, "low": low, "target_low": target_low}
        rounded = [x for x in (grad, low, target_low) if x is not None]
        stale = max_norm is not None and native.recording()  # the norm is a number that Python reads
        if not stale and _compiled_serves(
            param, exp_avg, exp_avg_sq, moved, rounded=rounded, step=step, betas=betas
        ):
            _compiled(param, grad, exp_avg, exp_avg_sq, step, **rule, **follow)
            return
        _fused(param, grad, exp_avg, exp_avg_sq, step, **rule)
        if target is not None:
            reference.ema_(target, param, tau, low=target_low)
        if low is not None:
            low.copy_(param)
        return
    rule |= {"target": target, "tau": tau, "low": low, "target_low": target_low}
    twin(reference.adamw_, impl)(param, grad, exp_avg, exp_avg_sq, step, **rule)


def _compiled_serves(
    *buffers: Tensor, rounded: Sequence[Tensor], step: Tensor, betas: tuple[float, float]
) -> bool:
    """Whether `_compiled` does what torch would. What only torch can tell or refuse is left to it."""
    gradient, *copies = rounded
    return (
        native.takes(*buffers)
        and not observed(step, *rounded)
        and gradient.dtype in (torch.float32, torch.bfloat16)
        and all(copy.dtype == torch.bfloat16 for copy in copies)
        and step.dtype is torch.float32
        and (native.recording() or step.item() >= 0.0)
        and min(betas) >= 0.0
        and max(betas) < 1.0
    )


def _compiled(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    learning_rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float | Tensor | None,
    gradient_norm: Tensor | None,
    target: Tensor | None,
    tau: float | Tensor,
    low: Tensor | None,
    target_low: Tensor | None,
) -> None:
    """The step, the target's, and the copies, in one pass of csrc/optimizer.hpp over float32 buffers."""
    size = param.numel()
    scale = 1.0
    if max_norm is not None:
        given = grad.float()
        length = math.sqrt(native.compiled.sum_of_squares(size, given.data_ptr()))
        scale = float(max_norm) / (length + 1e-6)
        scale = 1.0 if scale > 1.0 else scale  # NaN stays NaN
    norm = gradient_norm
    if norm is not None and norm.dtype != torch.float32:
        norm = param.new_empty(())
    native.compiled.adamw(  # type: ignore[call-arg]
        size,
        param.data_ptr(),
        grad.dtype == torch.bfloat16,
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        *(0 if x is None else x.data_ptr() for x in (target, low, target_low)),
        step.data_ptr(),
        *native.number(learning_rate),
        *betas,
        eps,
        weight_decay,
        *native.number(0.0 if target is None else tau),
        scale,
        0 if norm is None else norm.data_ptr(),
    )
    if gradient_norm is not None and norm is not gradient_norm and norm is not None:
        gradient_norm.copy_(norm)
    native.changed(param, exp_avg, exp_avg_sq, step, target, low, target_low, gradient_norm)


def _fused(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    learning_rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float | Tensor | None,
    gradient_norm: Tensor | None,
) -> None:
    """The step by torch's own fused pass."""
    if grad.dtype != param.dtype:
        grad = grad.to(param.dtype)
    grad = reference.clipped(grad, max_norm, gradient_norm)
    step += 1
    torch._fused_adamw_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        lr=learning_rate,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


@torch.no_grad()
def ema_(
    target: Tensor, param: Tensor, tau: float | Tensor, *, low: Tensor | None = None, impl: str | None = None
) -> None:
    """Move a target network: `target += tau * (param - target)`, in place over [P].

    Args:
        target, param: [P] contiguous, both float32 or both float64. tau: a number, or a 0-d float tensor on
            their device. low: [P] bfloat16 or float16, which receives the new target, rounded to nearest.
        impl: auto, triton, reference or compile (`kernels.use`).
    Raises:
        ValueError, TypeError: for a tensor of another device, dtype or shape, or with gaps.
    """
    flat: Given = {"target": (target, WIDE), "param": (param, (target.dtype,)), "low": (low, LOW)}
    _check("target", target, flat, {"tau": (tau, FLOATS)})
    if takes_kernels(impl, target, param):
        _ema_op(target, param, low, *_split(tau))
    else:
        twin(reference.ema_, impl)(target, param, tau, low=low)
