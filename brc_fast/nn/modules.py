"""Stacked networks, the critic ensemble, the tanh-Gaussian policy and its temperature.

Parameters of stacked networks carry a leading axis [E]; a kernel is [E, in, out]. Equations live with the
ops in `brc_fast.kernels` and in nn.bodies and nn.losses; here they are only put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from numbers import Integral
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from brc_fast import kernels
from brc_fast.config import ActorConfig, CriticConfig
from brc_fast.kernels.stages import Stages, check_stages, shapes_of

from . import bodies, conditioning, losses

GAIN = math.sqrt(2.0)  # of every orthogonal kernel but the log-std head's, which the authors start at 1


def _orthogonal(shape: tuple[int, ...], gain: float, generator: Generator | None) -> Tensor:
    """Orthogonal matrices over the last two axes, each drawn on its own."""
    kernel = torch.empty(shape)
    for matrix in () if kernel.is_meta else kernel.reshape(-1, *shape[-2:]):
        nn.init.orthogonal_(matrix, gain, generator)
    return kernel


class Layer(nn.Module):
    """Parameters of one stage: kernel [E, I, H], and vectors [E, H], of which `norm_weight` starts at 1."""

    def __init__(self, kernel: Tensor | None, vectors: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        if kernel is not None:
            self.kernel = nn.Parameter(kernel)
        for name, shape in vectors.items():
            start = torch.ones if name == "norm_weight" else torch.zeros
            self.register_parameter(name, nn.Parameter(start(shape)))


class Body(nn.Module):
    """E stacked networks of any stages, one `Layer` for each, under its name.

    Shapes: [B, I], shared by all networks, or [E, B, I] -> [E, B, outputs].

    Args:
        stages: see kernels.Stage. inputs: I. members: E.
        head: the first kernel of the head, [E, H, outputs]; orthogonal, as all others, when not given.
        generator: draws the first weights; without it torch's own does (torch.manual_seed).
    Raises:
        ValueError for stages that are no network.
    """

    def __init__(
        self,
        stages: Stages,
        inputs: int,
        *,
        members: int = 2,
        head: Tensor | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        check_stages(tuple(stages))
        self.stages, self.inputs, self.members = tuple(stages), inputs, members
        shapes, last = shapes_of(self.stages, inputs), self.stages[-1].name
        if head is None:
            head = _orthogonal((members, *shapes[f"{last}.kernel"]), GAIN, generator)
        for stage in self.stages:
            own = {n.rpartition(".")[2]: s for n, s in shapes.items() if n.rpartition(".")[0] == stage.name}
            shape = own.pop("kernel", None)
            kernel = head if stage.name == last else None
            if kernel is None and shape is not None:
                kernel = _orthogonal((members, *shape), GAIN, generator)
            layer = Layer(kernel, {name: (members, *size) for name, size in own.items()})
            self._place(stage.name.split("."), layer)

    def _place(self, path: list[str], layer: Layer) -> None:
        """As the submodule of this name; where names are numbers, in a list."""
        parent: nn.Module = self
        for name, below in pairwise(path):
            if name not in parent._modules:
                parent.add_module(name, nn.ModuleList() if below == "0" else nn.Module())
            child = parent._modules[name]
            assert child is not None
            parent = child
        parent.add_module(path[-1], layer)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """`frozen` parameters get no gradient; the input still does."""
        # looked up at each call: torch.func and a load may put others in place
        parameters: dict[str, Tensor] = dict(self.named_parameters())
        if frozen:
            parameters = {name: p.detach() for name, p in parameters.items()}
        return kernels.network(x, self.stages, parameters)


class BroNet(Body):
    """E stacked residual LayerNorm networks with a linear head.

        x = relu(LN(x W0 + b0));   `depth` times:  x = x + LN(relu(LN(x W1 + b1)) W2 + b2);   head

    Shapes: [B, I], shared by all networks, or [E, B, I] -> [E, B, outputs].

    Args:
        inputs: I. head: the number of outputs, or the head's first kernel [E, H, outputs].
        width: H. depth: residual blocks. members: E.
        generator: draws the first weights; without it torch's own does (torch.manual_seed).
    Source: Nauman et al. 2024, arXiv:2405.16158.
    """

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
        outputs = head if isinstance(head, int) else head.shape[-1]
        kernel = None if isinstance(head, int) else head
        stages = bodies.bronet(width, depth, outputs)
        super().__init__(stages, inputs, members=members, head=kernel, generator=generator)


class Critic(nn.Module):
    """E networks that give K logits of the return's distribution, and the task embedding they share.

    `BRC` has one, and any other agent may use it: docs/critic.md. task_ids are [B], int64, in [0, T); with
    one task there is no embedding, and they need not be given.

    Args:
        observation_size: O. action_size: A. num_tasks: T.
        config: sizes, the body, the loss (with "mse" K = 1, the value itself), how tasks are told apart, and
            v_max: scale rewards so that returns lie within [-v_max, v_max], the support.
        generator: draws the first weights; without it torch's own does (torch.manual_seed).
    Attributes:
        atoms: [K], evenly spaced over the support; None with "mse".
        embedding: [T, D], trained, of conditioning "embedding" with several tasks; else None.
    Source: Nauman et al. 2025, arXiv:2505.23150.
    """

    atoms: Tensor | None
    task_columns: Tensor | None

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
        self.loss, self.conditioning = losses.make(config), conditioning.make(config, num_tasks)
        heads, outputs, members = self.conditioning.heads, self.loss.outputs, config.members
        inputs = observation_size + action_size + self.conditioning.columns
        stages = bodies.make(config.body, config.width, config.depth, heads * outputs)
        reads = shapes_of(stages, inputs)[f"{stages[-1].name}.kernel"][0]
        each = [_orthogonal((members, reads, outputs), GAIN, generator) for _ in range(heads)]
        self.body = Body(stages, inputs, members=members, head=torch.cat(each, -1), generator=generator)
        self.register_buffer("atoms", self.loss.support(None, None), persistent=False)
        table = self.conditioning.table(generator)
        self.embedding = nn.Parameter(table) if table is not None and self.conditioning.trained else None
        fixed = None if self.conditioning.trained else table
        self.register_buffer("task_columns", fixed, persistent=False)

    @property
    def table(self) -> Tensor | None:
        """What goes into the inputs for each task, [T, columns], where anything does."""
        return self.task_columns if self.embedding is None else self.embedding

    @property
    def embedding_norm(self) -> str:
        """How rows of the embedding are normalized; that of the config."""
        return self.config.embedding_norm

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Of `to`, `double` and their like. Atoms are evenly spaced in any dtype, in float32 or more."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.atoms is not None:
            dtype = torch.promote_types(self.atoms.dtype, torch.float32)
            self.atoms = self.loss.support(self.atoms.device, dtype)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled, the critic of a BRC has no gaps between its parameters any more."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for p in self.parameters():
            p.data = p.data.contiguous()

    def forward(
        self, observations: Tensor, actions: Tensor, task_ids: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Logits [E, B, K] of observations [B, O], actions [B, A], task_ids [B]; see `Body.forward`."""
        for (name, size), x in zip(self.sizes.items(), (observations, actions), strict=True):
            if x.shape[-1:] != (size,):
                raise ValueError(f"{name} must have shape [B, {size}], got {list(x.shape)}")
        table = self.table.detach() if frozen and self.table is not None else self.table
        x = kernels.pack_inputs(observations, actions, table, task_ids, self.embedding_norm)
        return self.conditioning.choose(self.body(x, frozen), task_ids, self.loss.outputs)

    def values(
        self, observations: Tensor, actions: Tensor, task_ids: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Q [E, B], the mean of each member's distribution, in units of the scaled return. `frozen`, for the
        loss of an actor: gradients reach the actions and no parameter."""
        return self.loss.values(self(observations, actions, task_ids, frozen), self.atoms)

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

        Z' is the mean of the target's members, which get no gradient; with the loss "mse" it is their value,
        and the loss the squared error. `.mean(-1).sum()` is the loss of BRC.

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
        rows = observations.shape[0]
        if isinstance(target, Critic):
            names = ("loss", "num_atoms", "v_max")
            own, other = (tuple(getattr(c.config, name) for name in names) for c in (self, target))
            if own != other:
                told = "the (loss, num_atoms, v_max) of this critic"
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
        backup = losses.Backup(rewards, discounts, next_log_probs, temperature)
        return self.loss.bellman(logits, next_logits, backup, self.atoms)

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
    """Tanh-Gaussian policy over [observation, task columns]; these are the online critic's.

    Args:
        observation_size: O. action_size: A.
        config: body, width and depth. generator: draws the first weights.
        tasks: how it tells tasks apart: as its critic does.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        config: ActorConfig,
        tasks: conditioning.Conditioning,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self.conditioning, self.outputs = tasks, 2 * action_size
        inputs = observation_size + tasks.columns
        stages = bodies.make(config.body, config.width, config.depth, tasks.heads * self.outputs)
        reads = shapes_of(stages, inputs)[f"{stages[-1].name}.kernel"][0]
        each = []
        for _ in range(tasks.heads):  # [1, H, 2 A]: mean, then raw log-std
            each.append(_orthogonal((1, reads, action_size), GAIN, generator))
            each.append(_orthogonal((1, reads, action_size), 1.0, generator))
        self.body = Body(stages, inputs, members=1, head=torch.cat(each, -1), generator=generator)

    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std, [B, A] each, of packed inputs [B, O + columns]."""
        out = self.conditioning.choose(self.body(x), task_ids, self.outputs)
        mean, raw_log_std = out.squeeze(0).chunk(2, -1)
        return mean, raw_log_std
