"""AdamW over the flat buffers of one module's networks."""

from __future__ import annotations

import torch
from torch import Tensor

from brc_fast import kernels
from brc_fast.batch import require_shape

from .flat import FlatNetworks

FIXED = "is part of the compiled update, and fixed once the agent is made"


class FlatAdamW:
    """AdamW for the first module of `networks` (Adam without weight decay); the second follows as its target.

    Args:
        learning_rate, tau: kept as 0-d tensors on the device. tau: share of the new parameters in the second
            module, the target, after a step; None where there is none.

    An attribute that is a tensor, as learning_rate and tau are, is written in place when it is set, where
    replays of a CUDA graph read it too. The other numbers are part of the graph.

    Raises:
        AttributeError where one of those is set; ValueError for a tensor of another shape.
    """

    def __init__(
        self,
        networks: FlatNetworks,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        tau: float | None = None,
    ) -> None:
        self.networks, self.betas, self.eps, self.weight_decay = networks, betas, eps, weight_decay
        rows, low = networks.members, networks.low
        online = networks.master[:rows]
        self.flat, self.grad = online.view(-1), networks.grad.view(-1)
        self.exp_avg = torch.zeros_like(self.flat)
        self.exp_avg_sq = torch.zeros_like(self.flat)
        self.step_count = torch.zeros((), device=self.flat.device)
        self.learning_rate = self.flat.new_full((), learning_rate)
        self.low = None if low is None else low[:rows].view(-1)
        self.tau = self.flat.new_full((), tau or 0.0)
        self.target = None if tau is None else networks.master[rows:].view(-1)
        self.target_low = None if tau is None or low is None else low[rows:].view(-1)
        self._frozen: Tensor | None = None
        self._made = True

    @torch.no_grad()
    def __setattr__(self, name: str, value: object) -> None:
        mine = vars(self).get(name)
        if "_made" not in vars(self):
            super().__setattr__(name, value)
        elif isinstance(mine, Tensor) and (name != "tau" or self.target is not None):
            given = torch.as_tensor(value)
            require_shape(name, given, "that of before", tuple(mine.shape))
            mine.copy_(given)
        elif name in vars(self) and name != "tau":
            raise AttributeError(f"{name} {FIXED}: make another agent with its LearningConfig")
        else:
            rates = "learning_rate" if self.target is None else "learning_rate and tau"
            raise AttributeError(f"{name} cannot be set on this optimizer: {rates} can")

    def step(self, norm: Tensor | None = None) -> None:
        """One step against the gradient.

        The target, where there is one, and the low-precision copies follow in the same pass over memory.

        Args:
            norm: 0-d, receives the gradient's.
        """
        if self._frozen is None:
            self._step(norm)
            return
        frozen, kept = self._frozen, self.flat.clone()
        target = None if self.target is None else self.target.clone()
        self._step(norm)
        torch.where(frozen, kept, self.flat, out=self.flat)
        if target is not None and self.target is not None:
            torch.where(frozen, torch.lerp(target, kept, self.tau), self.target, out=self.target)
        for low, master in ((self.low, self.flat), (self.target_low, self.target)):
            if low is not None and master is not None:
                low.copy_(master)

    def freeze(self, frozen: Tensor | None) -> None:
        """From now on steps leave parameters as they are where `frozen` [E, P], bool, is true; None frees
        all. Their moments go on, so that the first step after has warm ones, and the target goes on towards
        them. Whoever holds a graph of `step` has to make it anew."""
        vars(self)["_frozen"] = None if frozen is None else frozen.reshape(-1)

    def _step(self, norm: Tensor | None) -> None:
        kernels.adamw_(
            self.flat,
            self.grad,
            self.exp_avg,
            self.exp_avg_sq,
            self.step_count,
            learning_rate=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            target=self.target,
            tau=self.tau,
            low=self.low,
            target_low=self.target_low,
            gradient_norm=norm,
        )

    def scalar(self) -> kernels.reference.ScalarAdam:
        """Of a single parameter, for the kernel that makes its step itself; without weight decay."""
        param, exp_avg, exp_avg_sq = (x[:1] for x in (self.flat, self.exp_avg, self.exp_avg_sq))
        rule = self.learning_rate, self.betas, self.eps
        return kernels.reference.ScalarAdam(param, exp_avg, exp_avg_sq, self.step_count, *rule)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments by the parameters' names, `exp_avg/NAME` and `exp_avg_sq/NAME`, and the steps made."""
        state = {"step": self.step_count}
        for moment, views in self._moments().items():
            state |= {f"{moment}/{name}": view for name, view in views.items()}
        return state

    def with_named_moments(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """A state of an agent where each moment was one vector, parameter by parameter (format 2), as it is
        now; another one, and a vector of another length, as it is."""
        state = dict(state)
        for moment, views in self._moments().items():
            whole, sizes = state.get(f"{prefix}{moment}"), [view.numel() for view in views.values()]
            if whole is None or whole.shape != (sum(sizes),):
                continue
            del state[f"{prefix}{moment}"]
            for (name, view), part in zip(views.items(), torch.split(whole, sizes), strict=True):
                state[f"{prefix}{moment}/{name}"] = part.view(view.shape)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for moment, views in self._moments().items():
            for name, view in views.items():
                view.copy_(state[f"{moment}/{name}"])
        for whole in (self.exp_avg, self.exp_avg_sq):
            for view in self.networks.layout.padding(whole.view(self.networks.grad.shape)):
                view.zero_()
        self.step_count.copy_(state["step"])

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        rows, named = self.networks.grad.shape, self.networks.named
        return {
            "exp_avg": named(self.exp_avg.view(rows)),
            "exp_avg_sq": named(self.exp_avg_sq.view(rows)),
        }
