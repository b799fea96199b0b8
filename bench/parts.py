"""Where the time of our update goes on a CPU: each part measured in whole updates.

torch's products and the public ops are wrapped with timers from outside. One clock runs at a time. From an op
that makes a loss and its gradient to the next optimizer's step it is a backward pass; what runs between two
products of a pass is its norms, with the Python around them, and what follows a pass is "rest".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from harness import interleave, quartiles

from brc_fast import kernels

FORWARD, FORWARD_NORMS = "forward: products", "forward: norms"
BACKWARD, BACKWARD_NORMS = "backward: products", "backward: norms"
OPTIMIZERS, OTHERS, REST = "optimizers", "losses, inputs, noise", "rest"
PARTS = (FORWARD, FORWARD_NORMS, BACKWARD, BACKWARD_NORMS, OPTIMIZERS, OTHERS, REST)
PRODUCTS = ("mm", "bmm", "baddbmm", "addmm")
HEADS = ("baddbmm", "addmm")  # of a forward pass: its last product has a bias
LOSSES = ("categorical_bellman_loss_and_gradient", "expected_value_and_gradient")
OPS = (*LOSSES, "pack_inputs", "normalized_embedding_backward", "tanh_gaussian", "tanh_gaussian_backward",
       "update_summary_", "adamw_")  # fmt: skip


class Clocks:
    """Seconds of each part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.running, self.backward, self.since = REST, False, time.perf_counter()

    def switch(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[self.running] += now - self.since
        self.running, self.since = part, now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the clocks switched before it and after it."""

        def call(*inputs: Any, **named: Any) -> Any:
            if name in OPS:
                self.switch(OPTIMIZERS if name == "adamw_" else OTHERS)
            else:
                self.switch(BACKWARD if self.backward else FORWARD)
            try:
                return function(*inputs, **named)
            finally:
                last = name in OPS or (name in HEADS and not self.backward)
                self.switch(REST if last else BACKWARD_NORMS if self.backward else FORWARD_NORMS)
                self.backward = name in LOSSES or (self.backward and name != "adamw_")

        return call


@contextmanager
def clocks() -> Iterator[Clocks]:
    """The functions of an update with timers around them, while this is open."""
    found = Clocks()
    wrapped = [(torch, name) for name in PRODUCTS] + [(kernels, name) for name in OPS]
    with ExitStack() as stack:
        for owner, name in [*wrapped, (torch.Tensor, "baddbmm_")]:
            timed = found.timed(name, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, timed))
        found.since = time.perf_counter()
        yield found
        found.switch(REST)


def measured(update: Callable[[], object], seconds: float, updates: int = 1) -> dict[str, dict[str, float]]:
    """Of each part the median and quartiles, seconds per update."""
    rounds = list[dict[str, float]]()

    def split() -> None:
        with clocks() as running:
            update()
        rounds.append(running.seconds)

    interleave({"": split}, seconds, turn=0.0)
    found = {}
    for part in PARTS:
        low, middle, high = quartiles([one[part] / updates for one in rounds[1:]])
        found[part] = {"seconds": middle, "low": low, "high": high}
    return found
