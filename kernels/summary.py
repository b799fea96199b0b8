"""What is left of an update once its networks have moved: numbers for people, and the temperature's gradient.

    critic_loss = sum over members, mean over rows, of losses;   entropy = -mean(log pi);   q = mean(values)
    actor_loss = -(q + alpha entropy);   temperature_loss = alpha (entropy - target entropy)
    since_i = step where since_i is 0 and metric i is not finite

The loss of log alpha is its own gradient, since alpha is its own derivative by log alpha.

Dims:     B rows, E members, M = 8 metrics.
Memory:   reads (2 E + 1) B numbers and writes 2 M + 1.
Launches: 1, of a single program; as operations of their own they are about twenty.
Numbers:  float32, or float64 where the metrics are; sums are added in a fixed order.
Source:   Nauman et al. 2025, arXiv:2505.23150; Haarnoja et al. 2018, arXiv:1812.05905, section 5.
Twin:     reference.update_summary_

On a CPU, float32 takes a compiled pass (csrc/summary.hpp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import _native, reference
from ._cases import Case
from ._compiled import twin
from ._dispatch import DTYPES, chosen, launch, takes_kernels
from ._triton import jit, tl
from .optimizer import WIDE, InPlaceOp, _check_place
from .reference import METRICS

__all__ = ["cases", "update_summary_"]

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
    B,
    losses,
    q_values,
    TARGET_ENTROPY: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK: tl.constexpr,
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


def _update_summary(
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
    launch(
        _summary_kernel,
        (1,),
        metrics,
        *(x.contiguous() for x in (losses, log_probs, q_values)),
        *(alpha, gradient, step, since),
        *(x.numel() for x in (log_probs, losses, q_values)),
        TARGET_ENTROPY=target_entropy,
        METRICS=len(METRICS),
        BLOCK=BLOCK,
        num_warps=8,
    )


_update_summary_op = InPlaceOp("update_summary", _update_summary, ("metrics", "gradient", "since"))


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
    impl: str | None = None,
) -> None:
    """The metrics of one update of BRC, its temperature's gradient, and since when a metric is not finite.

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
    given = metrics, losses, log_probs, q_values, alpha
    if takes_kernels(impl, *given):
        _update_summary_op(*given, gradient, step, since, target_entropy)
        return
    numbers = *given, gradient, step, since
    if chosen(impl) == "auto" and _native.takes(*numbers) and all(x.is_contiguous() for x in given[1:4]):
        _compiled_update_summary(*numbers, target_entropy)
        return
    written = {"gradient": gradient, "step": step, "since": since}
    with torch.no_grad():
        twin(reference.update_summary_, impl)(*given, target_entropy=target_entropy, **written)


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
    _native.compiled.update_summary(*sizes, *read, target_entropy, *written)  # type: ignore[call-arg]
    torch.autograd.graph.increment_version((metrics, gradient, since))


def cases() -> Iterator[Case]:
    """Two members, in each of the types that metrics have; every result of order 1, one metric not finite."""
    for dtype in (torch.float32, torch.float64):

        def prepare(
            device: torch.device, batch: int, impl: str, dtype: torch.dtype = dtype
        ) -> Callable[[], object]:
            losses, q_values = torch.randn(2, 2, batch, device=device, dtype=dtype) + 2.0
            log_probs = torch.randn(batch, device=device, dtype=dtype) - 1.5
            metrics, since = (torch.zeros(len(METRICS), device=device, dtype=dtype) for _ in range(2))
            alpha, gradient, step = (torch.full((), x, device=device, dtype=dtype) for x in (0.3, 0.0, 7.0))
            metrics[1], metrics[3], since[4] = float("nan"), 3.0, 5.0
            results = metrics[:1], metrics[2:], gradient, since  # all but the NaN, which equals nothing

            def call() -> object:
                rest = {"gradient": gradient, "step": step, "since": since}
                given = metrics, losses, log_probs, q_values, alpha
                update_summary_(*given, target_entropy=-3.0, impl=impl, **rest)
                return results

            return call

        def moved(batch: int, size: int = dtype.itemsize) -> int:
            return (5 * batch + 4 * len(METRICS) + 3) * size

        yield Case("update_summary_", f"E=2 {dtype}".replace("torch.", ""), prepare, moved)
