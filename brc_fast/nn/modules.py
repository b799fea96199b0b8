"""BroNet, the critic ensemble, the tanh-Gaussian policy and the task embedding.

Parameters of stacked networks carry a leading axis [E]; a kernel is [E, in, out]. Equations live with the
ops in `brc_fast.kernels`; here they are only put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from brc_fast import kernels
from brc_fast.config import ActorConfig, CriticConfig

PAD = 8  # elements: rows of 16 bytes in bfloat16, which the fast matrix products want
GAIN = math.sqrt(2.0)  # of every orthogonal kernel but the log-std head's, which the authors start at 1


def padded(size: int) -> int:
    """The next multiple of PAD."""
    return -(-size // PAD) * PAD


def _orthogonal(shape: tuple[int, ...], gain: float, generator: Generator | None) -> Tensor:
    """Orthogonal matrices over the last two axes, each drawn on its own."""
    kernel = torch.empty(shape)
    for matrix in () if kernel.is_meta else kernel.reshape(-1, *shape[-2:]):
        nn.init.orthogonal_(matrix, gain, generator)
    return kernel


class NormedLinear(nn.Module):
    """Parameters of one layer `LayerNorm(x W + b)`: kernel [E, I, H] and three vectors [E, H]."""

    def __init__(self, members: int, inputs: int, width: int, generator: Generator | None) -> None:
        super().__init__()
        self.kernel = nn.Parameter(_orthogonal((members, inputs, width), GAIN, generator))
        self.bias = nn.Parameter(torch.zeros(members, width))
        self.norm_weight = nn.Parameter(torch.ones(members, width))
        self.norm_bias = nn.Parameter(torch.zeros(members, width))


class Head(nn.Module):
    """Parameters of the linear head: kernel [E, H, outputs] and bias [E, outputs]."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.kernel = nn.Parameter(kernel)
        self.bias = nn.Parameter(torch.zeros(kernel.shape[0], kernel.shape[-1]))


class BroNet(nn.Module):
    """E stacked residual LayerNorm networks with a linear head.

        x = relu(LN(x W0 + b0));   `depth` times:  x = x + LN(relu(LN(x W1 + b1)) W2 + b2);   head

    Shapes: [B, I], shared by all networks, or [E, B, I] -> [E, B, outputs].

    Args:
        inputs: I. head: the number of outputs, or the head's first kernel [E, H, outputs].
        width: H. depth: residual blocks. members: E.
        generator: draws the first weights; without it torch's own does (torch.manual_seed).
    Source: Nauman et al. 2024, arXiv:2405.16158.
    """

    plan = kernels.BroNetPlan  # its passes without autograd, for a learner

    def __init__(
        self,
        inputs: int,
        head: int | Tensor,
        *,
        width: int = 256,
        depth: int = 2,
        members: int = 2,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(head, int):
            head = _orthogonal((members, width, head), GAIN, generator)
        self.input = NormedLinear(members, inputs, width, generator)
        self.blocks = nn.ModuleList(
            nn.ModuleList(NormedLinear(members, width, width, generator) for _ in range(2))
            for _ in range(depth)
        )
        self.head = Head(head)

    def flat_shapes(self) -> dict[str, tuple[int, ...]]:
        """What one network takes in a flat buffer, by name of `kernels.Arrays`; rows of products are padded
        to PAD elements: of the first kernel as many rows as its input has, of the head as many columns."""
        _, inputs, width = self.input.kernel.shape
        layers, outputs = 1 + 2 * len(self.blocks), padded(self.head.kernel.shape[-1])
        return {
            "first": (padded(inputs), width),
            "square": (layers - 1, width, width),
            "vectors": (layers, 3, width),
            "head": (width, outputs),
            "bias": (outputs,),
        }

    def padding(self, arrays: kernels.Arrays) -> list[Tensor]:
        """The views of `arrays` that belong to no parameter, and are zero."""
        inputs, outputs = self.input.kernel.shape[1], self.head.kernel.shape[-1]
        return [arrays.first[:, inputs:], arrays.head[..., outputs:], arrays.bias[:, outputs:]]

    def named(self, arrays: kernels.Arrays) -> dict[str, Tensor]:
        """The views of `arrays` that are this module's parameters, in the order of `named_parameters`."""
        inputs, outputs = self.input.kernel.shape[1], self.head.kernel.shape[-1]
        first, *rest = arrays.ordered()
        values = [first[:, :inputs], *rest[:-2], rest[-2][..., :outputs], rest[-1][..., :outputs]]
        return dict(zip((name for name, _ in self.named_parameters()), values, strict=True))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """`frozen` parameters get no gradient; the input still does."""
        parameters: list[Tensor] = []  # looked up at each call: torch.func and a load may put others in place
        layers = (layer for block in self.blocks for layer in block)  # type: ignore[attr-defined]
        for layer in (self.input, *layers):
            parameters += (layer.kernel, layer.bias, layer.norm_weight, layer.norm_bias)
        parameters += (self.head.kernel, self.head.bias)
        return kernels.bronet(x, *([p.detach() for p in parameters] if frozen else parameters))


class Critic(nn.Module):
    """E networks that give K logits of the return's distribution, and the task embedding they share.

    `BRC` has one, and any other agent may use it: docs/critic.md. task_ids are [B], int64, in [0, T); with
    one task there is no embedding, and they need not be given.

    Args:
        observation_size: O. action_size: A. num_tasks: T.
        config: sizes, and v_max: scale rewards so that returns lie within [-v_max, v_max], the support.
        generator: draws the first weights; without it torch's own does (torch.manual_seed).
    Attributes:
        atoms: [K], evenly spaced over the support.
    Source: Nauman et al. 2025, arXiv:2505.23150.
    """

    atoms: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        num_tasks: int = 1,
        config: CriticConfig | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self.sizes = {"observations": observation_size, "actions": action_size}
        given: dict[str, Any] = {f"the size of {name}": size for name, size in self.sizes.items()}
        for name, size in (given | {"num_tasks": num_tasks}).items():
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        self.config = config = CriticConfig() if config is None else config
        inputs = observation_size + action_size + (config.embedding_size if num_tasks > 1 else 0)
        self.body = BroNet(
            inputs,
            config.num_atoms,
            width=config.width,
            depth=config.depth,
            members=config.members,
            generator=generator,
        )
        self.register_buffer("atoms", self._support(), persistent=False)
        self.embedding = None
        if num_tasks > 1:
            rows = torch.empty(num_tasks, config.embedding_size)
            if not rows.is_meta:
                rows.normal_(generator=generator).div_(math.sqrt(config.embedding_size))
            self.embedding = nn.Parameter(rows)

    @property
    def embedding_norm(self) -> str:
        """How rows of the embedding are normalized; that of the config."""
        return self.config.embedding_norm

    def _support(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        v_max, atoms = self.config.v_max, self.config.num_atoms
        return torch.linspace(-v_max, v_max, atoms, device=device, dtype=dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Of `to`, `double` and their like. Atoms are evenly spaced in any dtype, in float32 or more."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype = torch.promote_types(self.atoms.dtype, torch.float32)
        self.atoms = self._support(self.atoms.device, dtype)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled, the critic of a BRC has no gaps between its parameters any more."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for p in self.parameters():
            p.data = p.data.contiguous()

    def forward(
        self, observations: Tensor, actions: Tensor, task_ids: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Logits [E, B, K] of observations [B, O], actions [B, A], task_ids [B]; see `BroNet.forward`."""
        for (name, size), x in zip(self.sizes.items(), (observations, actions), strict=True):
            if x.shape[-1:] != (size,):
                raise ValueError(f"{name} must have shape [B, {size}], got {list(x.shape)}")
        table = self.embedding.detach() if frozen and self.embedding is not None else self.embedding
        x = kernels.pack_inputs(observations, actions, table, task_ids, self.embedding_norm)
        return self.body(x, frozen)  # type: ignore[no-any-return]

    def values(
        self, observations: Tensor, actions: Tensor, task_ids: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Q [E, B], the mean of each member's distribution, in units of the scaled return. `frozen`, for the
        loss of an actor: gradients reach the actions and no parameter."""
        return kernels.expected_value(self(observations, actions, task_ids, frozen), self.atoms)

    def bellman_loss(
        self,
        target: Critic,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        discounts: Tensor,
        next_observations: Tensor,
        next_actions: Tensor,
        *,
        next_log_probs: Tensor | None = None,
        temperature: Tensor | float = 0.0,
        task_ids: Tensor | None = None,
    ) -> Tensor:
        """Losses [E, B] of each member at each row, against the target's distribution of the return.

            y = r + discount (Z'(s', a') - temperature log pi(a'|s')),   cross-entropy of its projection

        Z' is the mean of the target's members, which get no gradient. `.mean(-1).sum()` is the loss of BRC.

        Args:
            target: a critic of the same sizes, as copy.deepcopy gives it; see `soft_update_`.
            observations, next_observations: [B, O]. actions: [B, A], taken. next_actions: [B, A], of the
                policy at the next observations.
            rewards: [B] or [B, 1], scaled so that returns stay within +-v_max.
            discounts: [B] or [B, 1], the discount, and 0 where the episode ended in a terminal state.
            next_log_probs: [B] or [B, 1], of the next actions, for soft agents (SAC); zeros by default.
            temperature: alpha, a number or a tensor of one; without next_log_probs it has no effect.
            task_ids: [B], with several tasks.
        Raises:
            ValueError for shapes, or a target's support, that do not fit; TypeError for a number in the place
            of a tensor.
        """
        rows, own = observations.shape[0], (self.config.num_atoms, self.config.v_max)
        if isinstance(target, Critic) and own != (other := (target.config.num_atoms, target.config.v_max)):
            told = "the (num_atoms, v_max) of this critic"
            raise ValueError(f"target must have {told}, {own}, got {other}")
        for name, x in (("rewards", rewards), ("discounts", discounts)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor [B], got {type(x).__name__}")
        if next_log_probs is None:
            next_log_probs = torch.zeros_like(rewards)
        rewards, discounts, next_log_probs = (
            x.reshape(rows) if x.shape == (rows, 1) else x for x in (rewards, discounts, next_log_probs)
        )
        with torch.no_grad():
            next_logits = target(next_observations, next_actions, task_ids)
        logits = self(observations, actions, task_ids)
        rest = next_log_probs, temperature, self.atoms, self.config.v_max
        return kernels.categorical_bellman_loss(logits, next_logits, rewards, discounts, *rest)

    @torch.no_grad()
    def soft_update_(self, online: Critic, tau: float) -> None:
        """Move every parameter of this target: `p += tau * (online p - p)`; tau in [0, 1], 0.005 in BRC."""
        torch._foreach_lerp_(list(self.parameters()), list(online.parameters()), tau)


class Temperature(nn.Module):
    """Weight of the entropy bonus, kept as its logarithm."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(initial).log())


class Actor(nn.Module):
    """Tanh-Gaussian policy over [observation, task embedding]; the embedding is the online critic's.

    Args:
        observation_size: O. action_size: A. embedding_size: D, 0 with one task.
        config: width and depth of its BroNet. generator: draws the first weights.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        embedding_size: int,
        config: ActorConfig,
        generator: Generator,
    ) -> None:
        super().__init__()
        mean = _orthogonal((1, config.width, action_size), GAIN, generator)
        log_std = _orthogonal((1, config.width, action_size), 1.0, generator)
        head = torch.cat([mean, log_std], -1)  # [1, H, 2 A]: mean, then raw log-std
        inputs = observation_size + embedding_size
        self.body = BroNet(
            inputs, head, width=config.width, depth=config.depth, members=1, generator=generator
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std, [B, A] each, of packed inputs [B, O + D]."""
        mean, raw_log_std = self.body(x).squeeze(0).chunk(2, -1)
        return mean, raw_log_std
