"""Losses of critics: what a member puts out, what its value is, and what it is trained towards.

A loss is made from a `CriticConfig`; to add one, write a class with these methods and `register` it.

Dims: E members, B rows, K outputs of a member.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

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

    def policy_and_gradient(
        self, out: Tensor, support: Tensor | None, *, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Q that the policy ascends, [E, B] or, reduced, [1, B]; and the gradient of minus its mean over
        members and rows, [E, B, columns]."""
        ...


class Categorical:
    """Cross-entropy of a categorical distribution of the return, projected onto the support.

    The target's probabilities are averaged over its members; with reduction="min" they are those of the
    member with the lowest value. Source: Nauman et al. 2025, arXiv:2505.23150.
    """

    def __init__(self, config: CriticConfig) -> None:
        self.outputs, self.v_max, self.reduction = config.num_atoms, config.v_max, config.reduction

    def support(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        return torch.linspace(-self.v_max, self.v_max, self.outputs, device=device, dtype=dtype)

    def values(self, out: Tensor, support: Tensor | None) -> Tensor:
        assert support is not None
        return kernels.expected_value(out, support)

    def target(self, next_out: Tensor, support: Tensor) -> Tensor:
        """Logits of the members [E', B, K] whose mean distribution is the target's."""
        if self.reduction == "mean":
            return next_out
        lowest = self.values(next_out, support).argmin(0)
        return next_out.gather(0, lowest[None, :, None].expand(1, *next_out.shape[1:]))

    def bellman(
        self,
        out: Tensor,
        next_out: Tensor,
        backup: Backup,
        support: Tensor | None,
    ) -> Tensor:
        assert support is not None
        target = self.target(next_out, support)
        return kernels.categorical_bellman_loss(out, target, *backup, support, self.v_max)

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
        given = *backup, support, self.v_max
        target = self.target(next_out, support)
        return kernels.categorical_bellman_loss_and_gradient(
            out, target, *given, scale=scale, columns=columns
        )

    def policy_and_gradient(
        self, out: Tensor, support: Tensor | None, *, columns: int
    ) -> tuple[Tensor, Tensor]:
        assert support is not None
        members, rows = out.shape[:2]
        shared = members if self.reduction == "mean" else 1
        scale = -1.0 / (shared * rows)
        q, dout = kernels.expected_value_and_gradient(out, support, scale=scale, columns=columns)
        return (q, dout) if self.reduction == "mean" else _lowest(q, dout)


class MeanSquared:
    """Squared error of a value, against the mean or the minimum of the target's members.

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
        next_q = members.mean(0) if self.reduction == "mean" else members.amin(0)
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

    def policy_and_gradient(
        self, out: Tensor, support: Tensor | None, *, columns: int
    ) -> tuple[Tensor, Tensor]:
        members, rows = out.shape[:2]
        dout = out.new_zeros(members, rows, columns)
        dout[..., 0].fill_(-1.0 / ((members if self.reduction == "mean" else 1) * rows))
        q = out.squeeze(-1)
        return (q, dout) if self.reduction == "mean" else _lowest(q, dout)


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
