"""Losses of critics: what a member puts out, what its value is, and what it is trained towards.

A loss is made from a `CriticConfig`; to add one, write a class with these methods and `register` it.

Dims: E members, B rows, K outputs of a member.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from brc_fast import config as names
from brc_fast import kernels
from brc_fast.config import CriticConfig, require_known

__all__ = ["LOSSES", "Backup", "Categorical", "CriticLoss", "MeanSquared", "make", "register"]


class Backup(NamedTuple):
    """What makes a target of the next value Q': rewards + discounts * (Q' - alpha * next_log_probs)."""

    rewards: Tensor  # [B]
    discounts: Tensor  # [B], the discount, and 0 where the episode ended
    next_log_probs: Tensor  # [B]
    alpha: Tensor | float


class CriticLoss(Protocol):
    """A loss without state. Outputs are [E, B, K], values and losses [E, B].

    Attributes:
        outputs: K. support: [K], what the outputs are a distribution over, or None.
    """

    outputs: int

    def __init__(self, config: CriticConfig) -> None: ...

    def support(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor | None: ...

    def values(self, out: Tensor, support: Tensor | None) -> Tensor:
        """Q of each member, [E, B], with gradients."""
        ...

    def bellman(
        self,
        out: Tensor,
        next_out: Tensor,
        backup: Backup,
        support: Tensor | None,
    ) -> Tensor:
        """Losses [E, B] towards the backup of Q', with gradients."""
        ...

    def bellman_and_gradient(
        self,
        out: Tensor,
        next_out: Tensor,
        backup: Backup,
        support: Tensor | None,
        *,
        scale: float,
        columns: int,
    ) -> tuple[Tensor, Tensor]:
        """Losses, and the gradient of scale * their sum, [E, B, columns], zero beyond the outputs."""
        ...

    def regression(
        self, out: Tensor, values: Tensor, support: Tensor | None, encoding: str | None, sigma: float | None
    ) -> Tensor:
        """Losses [E, B] towards values [B] or [E, B], with gradients; see `Critic.regression_loss`."""
        ...

    def policy_and_gradient(
        self, out: Tensor, support: Tensor | None, *, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Q that the policy ascends, [E, B] or, reduced, [1, B]; and the gradient of minus its mean over
        members and rows, [E, B, columns]."""
        ...


class Categorical:
    """Cross-entropy of a categorical distribution of the return, projected onto the support.

    The target's probabilities are averaged over its members; with reduction="min" they are those of the
    member with the lowest value, and with "own" each member has those of its own target.
    Source: Nauman et al. 2025, arXiv:2505.23150; of "min", Seo et al. 2025, arXiv:2505.22642.
    """

    def __init__(self, config: CriticConfig) -> None:
        self.outputs, self.reduction = config.num_atoms, config.reduction
        self.low, self.high = config.support
        self.middle, self.half = (self.low + self.high) / 2, (self.high - self.low) / 2
        self.bin = 2 * self.half / (self.outputs - 1)
        self.edges = config.ends == "edges"

    def support(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        return torch.linspace(self.low, self.high, self.outputs, device=device, dtype=dtype)

    def values(self, out: Tensor, support: Tensor | None) -> Tensor:
        assert support is not None
        return kernels.expected_value(out, support)

    def _members(self, next_out: Tensor, support: Tensor) -> Tensor:
        """Logits of the members [E', B, K] whose mean distribution is the target's."""
        if self.reduction != "min":
            return next_out
        lowest = self.values(next_out, support).argmin(0)
        return next_out.gather(0, lowest[None, :, None].expand(1, *next_out.shape[1:]))

    def _target(self, next_out: Tensor, backup: Backup, support: Tensor) -> tuple[Any, ...]:
        """What makes the target, as kernels take it: of a support around 0.

            y - m = r + (s - 1) m + s (z - m - alpha log pi),   m its middle

        With reduction "own" rows are those of all members, one after the other.
        """
        rewards, discounts, log_probs, alpha = backup
        if self.middle:
            rewards = rewards + (discounts - 1.0) * self.middle
            like: dict[str, Any] = {"device": support.device, "dtype": support.dtype}
            support = torch.linspace(-self.half, self.half, self.outputs, **like)
        logits = self._members(next_out, support)
        if self.reduction == "own":
            logits = _as_rows(logits)
            rewards, discounts, log_probs = (x.repeat(len(next_out)) for x in (rewards, discounts, log_probs))
        return logits, rewards, discounts, log_probs, alpha, support, self.half

    def target(self, next_out: Tensor, backup: Backup, support: Tensor) -> Tensor:
        """Probabilities [B, K] that the outputs regress on; with reduction "own" [E, B, K]."""
        probs = kernels.categorical_target(*self._target(next_out, backup, support))
        return probs.view(next_out.shape) if self.reduction == "own" else probs

    def clipped_share(self, next_out: Tensor, backup: Backup, support: Tensor) -> Tensor:
        """Mass of the target that lies beyond the support before it is clipped, [B]; "own": [E, B]."""
        wide = torch.promote_types(next_out.dtype, torch.float32)
        probs = self._members(next_out, support).to(wide).softmax(-1)
        probs = probs if self.reduction == "own" else probs.mean(0)
        rewards, discounts, log_probs, alpha = backup
        y = torch.addcmul(rewards[:, None], discounts[:, None], support - (alpha * log_probs)[:, None])
        slack = 1e-6 * self.half  # rounding is no clip
        return (probs * ((y < self.low - slack) | (y > self.high + slack))).sum(-1)

    def bellman(
        self,
        out: Tensor,
        next_out: Tensor,
        backup: Backup,
        support: Tensor | None,
    ) -> Tensor:
        assert support is not None
        rows = _as_rows(out) if self.reduction == "own" else out
        losses = kernels.categorical_bellman_loss(rows, *self._target(next_out, backup, support))
        return losses.view(out.shape[:-1])

    def bellman_and_gradient(
        self,
        out: Tensor,
        next_out: Tensor,
        backup: Backup,
        support: Tensor | None,
        *,
        scale: float,
        columns: int,
    ) -> tuple[Tensor, Tensor]:
        assert support is not None
        rows = _as_rows(out) if self.reduction == "own" else out
        losses, dout = kernels.categorical_bellman_loss_and_gradient(
            rows, *self._target(next_out, backup, support), scale=scale, columns=columns
        )
        return losses.view(out.shape[:-1]), dout.view(*out.shape[:-1], columns)

    def regression(
        self, out: Tensor, values: Tensor, support: Tensor | None, encoding: str | None, sigma: float | None
    ) -> Tensor:
        if encoding not in (None, "two_hot", "hl_gauss"):
            raise ValueError(f"encoding must be two_hot or hl_gauss, got {encoding!r}")
        if encoding != "hl_gauss":
            if sigma is not None:
                raise ValueError("sigma is of the encoding hl_gauss alone")
            return kernels.two_hot_cross_entropy(out, values - self.middle, self.half)
        sigma = 0.75 * self.bin if sigma is None else sigma
        if not self.edges:
            return kernels.hl_gauss_cross_entropy(out, values - self.middle, self.half, sigma)
        if not 0.0 < sigma < float("inf"):
            raise ValueError(f"sigma must be positive and finite, got {sigma}")
        target = self._in_bins(values, sigma)
        shared = target.dim() < out.dim()
        losses = kernels.categorical_cross_entropy(out if shared else _as_rows(out), target.flatten(0, -2))
        return losses.view(out.shape[:-1])

    def _in_bins(self, values: Tensor, sigma: float) -> Tensor:
        """A normal's mass [.., K] in K bins between the ends of the support, over that in all of them."""
        low, high = self.low - self.bin / 2, self.high + self.bin / 2
        edges = torch.linspace(low, high, self.outputs + 1, dtype=torch.float64, device=values.device)
        values = values.detach().double().clamp(low, high).unsqueeze(-1)
        below = torch.special.ndtr((edges - values) / sigma)
        masses: Tensor = below.diff() / (below[..., -1:] - below[..., :1])
        return masses

    def policy_and_gradient(
        self, out: Tensor, support: Tensor | None, *, columns: int
    ) -> tuple[Tensor, Tensor]:
        assert support is not None
        members, rows = out.shape[:2]
        lowest = self.reduction == "min"
        scale = -1.0 / ((1 if lowest else members) * rows)
        q, dout = kernels.expected_value_and_gradient(out, support, scale=scale, columns=columns)
        return _lowest(q, dout) if lowest else (q, dout)


class MeanSquared:
    """Squared error of a value, against the mean or the minimum of the target's members, or each its own.

    Sources: Haarnoja et al. 2018, arXiv:1812.05905; of the minimum, Fujimoto et al. 2018, arXiv:1802.09477.
    """

    def __init__(self, config: CriticConfig) -> None:
        self.outputs, self.reduction = 1, config.reduction

    def support(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        return None

    def values(self, out: Tensor, support: Tensor | None) -> Tensor:
        return out.squeeze(-1)

    def _error(
        self,
        out: Tensor,
        next_out: Tensor,
        backup: Backup,
    ) -> Tensor:
        wide = torch.promote_types(out.dtype, torch.float32)
        members = next_out.squeeze(-1).to(wide)
        next_q = reduced(members, self.reduction)
        rewards, discounts, next_log_probs, alpha = backup
        return out.squeeze(-1).to(wide) - (rewards + discounts * (next_q - alpha * next_log_probs))

    def bellman(
        self,
        out: Tensor,
        next_out: Tensor,
        backup: Backup,
        support: Tensor | None,
    ) -> Tensor:
        return self._error(out, next_out, backup).square()

    def bellman_and_gradient(
        self,
        out: Tensor,
        next_out: Tensor,
        backup: Backup,
        support: Tensor | None,
        *,
        scale: float,
        columns: int,
    ) -> tuple[Tensor, Tensor]:
        error = self._error(out, next_out, backup)
        dout = out.new_zeros(*error.shape, columns)
        dout[..., 0] = 2.0 * scale * error
        return error.square(), dout

    def regression(
        self, out: Tensor, values: Tensor, support: Tensor | None, encoding: str | None, sigma: float | None
    ) -> Tensor:
        if encoding is not None or sigma is not None:
            raise ValueError(f"encoding {encoding} and sigma {sigma} are of the loss categorical, not of mse")
        wide = torch.promote_types(out.dtype, torch.float32)
        return (out.squeeze(-1).to(wide) - values.detach()).square()

    def policy_and_gradient(
        self, out: Tensor, support: Tensor | None, *, columns: int
    ) -> tuple[Tensor, Tensor]:
        members, rows = out.shape[:2]
        dout = out.new_zeros(members, rows, columns)
        lowest = self.reduction == "min"
        dout[..., 0].fill_(-1.0 / ((1 if lowest else members) * rows))
        q = out.squeeze(-1)
        return _lowest(q, dout) if lowest else (q, dout)


def reduced(members: Tensor, reduction: str) -> Tensor:
    """The target's value [B] of those of its members [E, B], which "own" leaves as they are."""
    if reduction == "own":
        return members
    return members.mean(0) if reduction == "mean" else members.amin(0)


def _as_rows(x: Tensor) -> Tensor:
    """[E, B, K] as the rows of one member, [1, E * B, K]."""
    return x.reshape(1, -1, x.shape[-1])


def _lowest(q: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """Of the member with the lowest value at each row; the others get no gradient."""
    lowest = q.argmin(0, keepdim=True)
    mine = torch.arange(len(q), device=q.device)[:, None] == lowest
    return q.gather(0, lowest), dout * mine[..., None]


LOSSES: dict[str, type[CriticLoss]] = {"categorical": Categorical, "mse": MeanSquared}


def register(name: str, loss: type[CriticLoss]) -> None:
    """Let configurations name a loss."""
    LOSSES[name] = loss
    names.LOSSES.append(name)


def make(config: CriticConfig) -> CriticLoss:
    """The loss that a config names; InputError, with the names there are, for another."""
    require_known("loss", config.loss, LOSSES)
    return LOSSES[config.loss](config)
