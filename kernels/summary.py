"""What is left of an update once its networks have moved: numbers for people, and the temperature's step.

    critic_loss = sum over members, mean over rows, of losses;   entropy = -mean(log pi);   q = mean(values)
    actor_loss = -(q + alpha entropy);   temperature_loss = alpha (entropy - target entropy)
    since_i = step where since_i is 0 and metric i is not finite

The loss of log alpha is its own gradient, since alpha is its own derivative by log alpha. Where its state is
given, it takes the step of Adam (optimizer.py), and alpha is that of the next update.

Dims:     B rows, E members, M = 8 metrics.
Memory:   reads (2 E + 1) B numbers and writes 2 M + 1.
Launches: 1, of a single program; as operations of their own they are about twenty.
Numbers:  float32, or float64 where the metrics are; sums are added in a fixed order.
Source:   Nauman et al. 2025, arXiv:2505.23150; Haarnoja et al. 2018, arXiv:1812.05905, section 5.
Twin:     reference.update_summary_

On a CPU, float32 takes a compiled pass (csrc/summary.hpp), and then those of `adamw_`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .optimizer import FLOATS, WIDE, Given, InPlaceOp, _check_place, _log, _scales, _step, adamw_
from .reference import METRICS, ScalarAdam
from .runtime import native
from .runtime.dispatch import DTYPES, chosen, launch, takes_kernels
from .runtime.language import jit, tl
from .runtime.twins import twin

__all__ = ["update_summary_"]

BLOCK = 4096


@jit
def _total(x_ptr, count, dtype: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros([BLOCK], dtype)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + place, mask=place < count, other=0.0).to(dtype)
    return tl.sum(total)


@jit
def _summary_kernel(  # type: ignore[no-untyped-def]
    metrics_ptr,
    losses_ptr,
    log_probs_ptr,
    q_values_ptr,
    alpha_ptr,
    gradient_ptr,
    step_ptr,
    since_ptr,
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    count_ptr,
    learning_rate_ptr,
    B,
    losses,
    q_values,
    TARGET_ENTROPY: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
):
    dtype: tl.constexpr = metrics_ptr.dtype.element_ty
    alpha = tl.load(alpha_ptr).to(dtype)
    critic_loss = _total(losses_ptr, losses, dtype, BLOCK) / B
    entropy = -_total(log_probs_ptr, B, dtype, BLOCK) / B
    q = _total(q_values_ptr, q_values, dtype, BLOCK) / q_values
    temperature_loss = alpha * (entropy - TARGET_ENTROPY)
    tl.store(gradient_ptr, temperature_loss)
    i = tl.arange(0, METRICS)  # those that stay are the norms of the gradients
    metrics = tl.load(metrics_ptr + i)
    metrics = tl.where(i == 0, critic_loss, metrics)
    metrics = tl.where(i == 2, -(q + alpha * entropy), metrics)
    metrics = tl.where(i == 4, entropy, metrics)
    metrics = tl.where(i == 5, q, metrics)
    metrics = tl.where(i == 6, alpha, metrics)
    metrics = tl.where(i == 7, temperature_loss, metrics)
    tl.store(metrics_ptr + i, metrics)
    since = tl.load(since_ptr + i)
    finite = metrics - metrics == 0.0
    step = tl.load(step_ptr).to(since.dtype)
    tl.store(since_ptr + i, tl.where((since == 0.0) & (finite == 0), step, since))
    if param_ptr is not None:
        p, m, v = tl.load(param_ptr), tl.load(exp_avg_ptr), tl.load(exp_avg_sq_ptr)
        count, rate = tl.load(count_ptr) + 1, tl.load(learning_rate_ptr).to(p.dtype)
        scales = _scales(count.to(p.dtype), LOG_BETA1, LOG_BETA2)
        p, m, v = _step(p, temperature_loss.to(p.dtype), m, v, rate, *scales, BETA1, BETA2, EPS, 0.0)
        tl.debug_barrier()  # a barrier: no warp still has to read what is written now
        tl.store(param_ptr, p)
        tl.store(exp_avg_ptr, m)
        tl.store(exp_avg_sq_ptr, v)
        tl.store(count_ptr, count)
        tl.store(alpha_ptr, tl.exp(p).to(alpha_ptr.dtype.element_ty))


def _update_summary(
    metrics: Tensor,
    losses: Tensor,
    log_probs: Tensor,
    q_values: Tensor,
    alpha: Tensor,
    gradient: Tensor,
    step: Tensor,
    since: Tensor,
    param: Tensor | None,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    count: Tensor | None,
    learning_rate: Tensor | None,
    target_entropy: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    launch(
        _summary_kernel,
        (1,),
        metrics,
        *(x.contiguous() for x in (losses, log_probs, q_values)),
        *(alpha, gradient, step, since, param, exp_avg, exp_avg_sq, count, learning_rate),
        *(x.numel() for x in (log_probs, losses, q_values)),
        TARGET_ENTROPY=target_entropy,
        METRICS=len(METRICS),
        BLOCK=BLOCK,
        BETA1=beta1,
        BETA2=beta2,
        LOG_BETA1=_log(beta1),
        LOG_BETA2=_log(beta2),
        EPS=eps,
        num_warps=8,
    )


CHANGED = ("metrics", "alpha", "gradient", "since", "param", "exp_avg", "exp_avg_sq", "count")
_update_summary_op = InPlaceOp("update_summary", _update_summary, CHANGED)


def update_summary_(
    metrics: Tensor,
    losses: Tensor,
    log_probs: Tensor,
    q_values: Tensor,
    alpha: Tensor,
    *,
    target_entropy: float,
    gradient: Tensor,
    step: Tensor,
    since: Tensor,
    adam: ScalarAdam | None = None,
    impl: str | None = None,
) -> None:
    """The metrics of one update of BRC, its temperature's gradient, and since when a metric is not finite;
    then a step of the temperature.

    Args:
        metrics: [8] float32 or float64, in the order of `reference.METRICS`: the norms of the gradients are
            there and stay, the rest is written.
        losses: [E, B], of each member at each row. log_probs: [B], of the actor's own actions. q_values:
            [E, B], of these actions to each member. All of any float dtype.
        alpha: 0-d, the temperature.
        target_entropy: in nats, of the whole action; another number compiles the kernel anew.
        gradient: 0-d or of one element, receives the temperature's loss, which is the gradient of log alpha.
        step: 0-d, the number of this update, from 1.
        since: [8], the update at which each metric first was not finite, 0 where there is none.
        adam: `reference.ScalarAdam` of log alpha, float32 or float64: it makes a step against the gradient,
            and alpha receives exp(log alpha). Other betas or eps compile the kernel anew.
        impl: auto, triton, reference or compile (`kernels.use`).
    Raises:
        ValueError, TypeError: for a tensor of another device, dtype or shape, or with gaps.
    Source: Nauman et al. 2025, arXiv:2505.23150.
    """
    place = metrics.device
    if log_probs.dim() != 1 or not log_probs.numel():
        raise ValueError(f"log_probs must have shape [B] with B from 1, got {list(log_probs.shape)}")
    rows = log_probs.shape[0]
    for name, x in (("losses", losses), ("q_values", q_values)):
        if x.dim() != 2 or x.shape[1] != rows or not x.numel():
            raise ValueError(f"{name} must have shape [E, B] with B = {rows}, got {list(x.shape)}")
    for name, x in (("metrics", metrics), ("since", since)):
        _check_place(name, x, "metrics", place, WIDE)
        if x.shape != (len(METRICS),) or not x.is_contiguous():
            wanted = f"shape [{len(METRICS)}] and no gaps"
            raise ValueError(f"{name} must have {wanted}, got {list(x.shape)}, strides {list(x.stride())}")
    for name, x in (("losses", losses), ("log_probs", log_probs), ("q_values", q_values)):
        _check_place(name, x, "metrics", place, DTYPES)
    for name, x in (("alpha", alpha), ("gradient", gradient), ("step", step)):
        _check_place(name, x, "metrics", place, WIDE)
        if x.numel() != 1:
            raise ValueError(f"{name} must have one element, got {list(x.shape)}")
    if adam is not None:
        _check_adam(adam, place)
    given = metrics, losses, log_probs, q_values, alpha
    if takes_kernels(impl, *given):
        *state, betas, eps = (*(None,) * 5, (0.0, 0.0), 0.0) if adam is None else adam
        _update_summary_op(*given, gradient, step, since, *state, target_entropy, *betas, eps)
        return
    numbers = *given, gradient, step, since
    if chosen(impl) == "auto" and native.takes(*numbers) and all(x.is_contiguous() for x in given[1:4]):
        _compiled_update_summary(*numbers, target_entropy)
        if adam is not None:
            _step_on_cpu(adam, gradient, alpha)
        return
    written: dict[str, Any] = {"gradient": gradient, "step": step, "since": since, "adam": adam}
    with torch.no_grad():
        twin(reference.update_summary_, impl)(*given, target_entropy=target_entropy, **written)


def _check_adam(adam: ScalarAdam, place: torch.device) -> None:
    same = (adam.param.dtype,)
    state: Given = {"param": (adam.param, WIDE), "exp_avg": (adam.exp_avg, same)}
    state |= {"exp_avg_sq": (adam.exp_avg_sq, same), "step": (adam.step, WIDE)}
    for name, (x, dtypes) in (state | {"learning_rate": (adam.learning_rate, FLOATS)}).items():
        _check_place(f"adam.{name}", x, "metrics", place, dtypes)
        if x.numel() != 1:
            raise ValueError(f"adam.{name} must have one element, got {list(x.shape)}")


def _step_on_cpu(adam: ScalarAdam, gradient: Tensor, alpha: Tensor) -> None:
    param, grad, *moments = (x.view(-1) for x in (adam.param, gradient, adam.exp_avg, adam.exp_avg_sq))
    rule: dict[str, Any] = {"learning_rate": adam.learning_rate, "betas": adam.betas, "eps": adam.eps}
    adamw_(param, grad, moments[0], moments[1], adam.step, **rule, weight_decay=0.0, impl="auto")
    alpha.copy_(param.exp().view(alpha.shape))


def _compiled_update_summary(
    metrics: Tensor,
    losses: Tensor,
    log_probs: Tensor,
    q_values: Tensor,
    alpha: Tensor,
    gradient: Tensor,
    step: Tensor,
    since: Tensor,
    target_entropy: float,
) -> None:
    sizes = (x.numel() for x in (log_probs, losses, q_values))
    read = (x.data_ptr() for x in (losses, log_probs, q_values))
    written = (x.data_ptr() for x in (alpha, step, metrics, gradient, since))
    native.compiled.update_summary(*sizes, *read, target_entropy, *written)  # type: ignore[call-arg]
    native.changed(metrics, gradient, since)
