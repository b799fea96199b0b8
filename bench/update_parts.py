"""Where the time of our update goes on a CPU: each part measured in whole updates, with the model's floor.

The functions that an update calls are wrapped with timers from outside. One clock runs at a time, of the
innermost wrapped function, so parts do not overlap and what no part has is "rest": Python, sums for metrics.
Updates with and without timers take turns; where the parts' sum is not the time of the update without timers,
there are no shares, and the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from harness import interleave, median_ratio, quartiles
from roofline import (
    BACKWARD,
    BACKWARD_NORMS,
    FORWARD,
    FORWARD_NORMS,
    OPTIMIZERS,
    OTHERS,
    PARTS,
    Machine,
    parts,
)
from update_providers import Provider, Subject

from brc_fast import BRC, kernels
from brc_fast.kernels import _bronet_cpu, _bronet_plain
from brc_fast.kernels.bronet_plan import BroNetPlan

REST = "rest"
TOLERANCE = 0.15  # of the parts' sum against the update without timers, relative
WRAPPED: list[tuple[Any, str, str]] = [  # owner, name, part
    (BroNetPlan, "forward", FORWARD),
    (BroNetPlan, "backward", BACKWARD),
    *((passes, "norm_forward", FORWARD_NORMS) for passes in (_bronet_cpu, _bronet_plain)),
    *((passes, "norm_backward", BACKWARD_NORMS) for passes in (_bronet_cpu, _bronet_plain)),
    (kernels, "adamw_", OPTIMIZERS),
    (kernels, "pack_inputs", OTHERS),
    (kernels, "normalized_embedding_backward", OTHERS),
    (kernels, "tanh_gaussian", OTHERS),
    (kernels, "tanh_gaussian_backward", OTHERS),
    (kernels, "categorical_bellman_loss_and_gradient", OTHERS),
    (kernels, "expected_value_and_gradient", OTHERS),
    (kernels, "update_summary_", OTHERS),
    (BRC, "_noise", OTHERS),
]


class Clocks:
    """Seconds of each part; that of the innermost function runs."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*PARTS, REST), 0.0)
        self.running = [REST]
        self.since = time.perf_counter()

    def switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*arguments: Any, **named: Any) -> Any:
            self.switch()
            self.running.append(part)
            try:
                return function(*arguments, **named)
            finally:
                self.switch()
                self.running.pop()

        return inside


@contextmanager
def clocks() -> Iterator[Clocks]:
    """The functions of an update with timers around them, while this is open."""
    found = Clocks()
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in WRAPPED]
    try:
        for owner, name, part in WRAPPED:
            setattr(owner, name, found.timed(part, getattr(owner, name)))
        found.since = time.perf_counter()
        yield found
        found.switch()
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def measured_parts(provider: Provider, subject: Subject, seconds: float, machine: Machine) -> dict[str, Any]:
    """`parts` with the quartiles of each in seconds per update, and what their sum is of the whole update; or
    `parts_missing`, the reason."""
    rounds: list[dict[str, float]] = []

    def whole() -> None:
        provider.call()
        provider.finish()

    def split() -> None:
        with clocks() as running:
            whole()
        rounds.append(running.seconds)

    times = interleave({"whole": whole, "split": split}, seconds=seconds, calls=1, warmup=1)
    del rounds[:1]  # of the warm-up
    sums = [sum(found.values()) for found in rounds]
    share = median_ratio(sums, times["whole"])[0]
    if abs(share - 1.0) > TOLERANCE:
        told = f"the parts' sum is {share:.2f} times the update without timers, more than {TOLERANCE:g} off"
        return {"parts_missing": f"{told}; measure on a quieter machine"}
    floors = parts(subject.sizes, provider.precision, machine)
    rows = []
    for part in (*PARTS, REST):
        low, middle, high = (t / subject.updates for t in quartiles([found[part] for found in rounds]))
        told = {"seconds": middle, "low": low, "high": high, "floor": floors.get(part)}
        rows.append({"part": part, **told})
    return {"parts": rows, "parts_over_whole": share}
