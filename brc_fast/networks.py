"""BroNet, the critic ensemble, the tanh-Gaussian policy and the task embedding.

Parameters of stacked networks carry a leading axis [E]; a kernel is [E, in, out]. Equations live with the
ops in `brc_fast.kernels`; here they are only put together.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from . import kernels
from .config import ActorConfig, CriticConfig

PAD = 8  # elements: rows of 16 bytes in bfloat16, which the fast matrix products want
GAIN = math.sqrt(2.0)  # of every orthogonal kernel but the log-std head's, which the authors start at 1


def padded(size: int) -> int:
    """The next multiple of PAD."""
    return -(-size // PAD) * PAD


def _orthogonal(shape: tuple[int, ...], gain: float, generator: Generator) -> Tensor:
    """Orthogonal matrices over the last two axes, each drawn on its own."""
    kernel = torch.empty(shape)
    for matrix in () if kernel.is_meta else kernel.reshape(-1, *shape[-2:]):
        nn.init.orthogonal_(matrix, gain, generator)
    return kernel


class NormedLinear(nn.Module):
    """Parameters of one layer `LayerNorm(x W + b)`: kernel [E, I, H] and three vectors [E, H]."""

    def __init__(self, members: int, inputs: int, width: int, generator: Generator) -> None:
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

        x = relu(LN(W0 x + b0));   `depth` times:  x = x + LN(W2 relu(LN(W1 x + b1)) + b2);   head

    Shapes: [B, I], shared by all networks, -> [E, B, outputs].
    Source: Nauman et al. 2024, arXiv:2405.16158.
    """

    plan = kernels.BroNetPlan  # its passes without autograd, for a learner

    def __init__(
        self, members: int, inputs: int, width: int, depth: int, head: Tensor, generator: Generator
    ) -> None:
        super().__init__()
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

    With one task there is no embedding and no embedding input.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        num_tasks: int,
        config: CriticConfig,
        generator: Generator,
    ) -> None:
        super().__init__()
        inputs = observation_size + action_size + (config.embedding_size if num_tasks > 1 else 0)
        self.embedding_norm = config.embedding_norm
        head = _orthogonal((config.members, config.width, config.num_atoms), GAIN, generator)
        self.body = BroNet(config.members, inputs, config.width, config.depth, head, generator)
        self.embedding = None
        if num_tasks > 1:
            rows = torch.empty(num_tasks, config.embedding_size)
            if not rows.is_meta:
                rows.normal_(generator=generator).div_(math.sqrt(config.embedding_size))
            self.embedding = nn.Parameter(rows)

    def forward(
        self, observations: Tensor, actions: Tensor, task_ids: Tensor, frozen: bool = False
    ) -> Tensor:
        """Logits [E, B, K] of observations [B, O], actions [B, A], task_ids [B]; see `BroNet.forward`."""
        table = self.embedding.detach() if frozen and self.embedding is not None else self.embedding
        x = kernels.pack_inputs(observations, actions, table, task_ids, self.embedding_norm)
        return self.body(x, frozen)  # type: ignore[no-any-return]


class Temperature(nn.Module):
    """Weight of the entropy bonus, kept as its logarithm."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(initial).log())


class Actor(nn.Module):
    """Tanh-Gaussian policy over [observation, task embedding]; the embedding is the online critic's."""

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
        self.body = BroNet(1, observation_size + embedding_size, config.width, config.depth, head, generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std, [B, A] each, of packed inputs [B, O + D]."""
        mean, raw_log_std = self.body(x).squeeze(0).chunk(2, -1)
        return mean, raw_log_std
