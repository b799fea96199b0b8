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

GAIN = math.sqrt(2.0)  # of every orthogonal kernel but the log-std head's, which the authors start at 1


def _orthogonal(shape: tuple[int, ...], gain: float, generator: Generator) -> Tensor:
    """Orthogonal matrices over the last two axes, each drawn on its own."""
    kernel = torch.empty(shape)
    for matrix in kernel.reshape(-1, *shape[-2:]):
        nn.init.orthogonal_(matrix, gain, generator)
    return kernel


class NormedLinear(nn.Module):
    """`LayerNorm(x W + b)`, followed by ReLU or added to a residual.

    Shapes: x [.., B, I] -> [.., B, H]; with `members` E, every parameter has a leading [E].
    """

    def __init__(self, inputs: int, width: int, members: tuple[int, ...], generator: Generator) -> None:
        super().__init__()
        self.kernel = nn.Parameter(_orthogonal((*members, inputs, width), GAIN, generator))
        self.bias = nn.Parameter(torch.zeros(*members, width))
        self.norm_weight = nn.Parameter(torch.ones(*members, width))
        self.norm_bias = nn.Parameter(torch.zeros(*members, width))

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        return kernels.bias_layer_norm(
            torch.matmul(x, self.kernel), self.bias, self.norm_weight, self.norm_bias, residual, relu
        )


class BroNet(nn.Module):
    """Residual LayerNorm body.

        x = relu(LN(W0 x + b0));   `depth` times:  x = x + LN(W2 relu(LN(W1 x + b1)) + b2)

    Shapes: [.., B, I] -> [.., B, H].
    Source: Nauman et al. 2024, arXiv:2405.16158.
    """

    def __init__(
        self, inputs: int, width: int, depth: int, members: tuple[int, ...], generator: Generator
    ) -> None:
        super().__init__()
        self.input = NormedLinear(inputs, width, members, generator)
        self.blocks = nn.ModuleList(
            nn.ModuleList(NormedLinear(width, width, members, generator) for _ in range(2))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x, relu=True)
        for first, second in self.blocks:  # type: ignore[misc]
            x = second(first(x, relu=True), residual=x)
        return x


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
        self.body = BroNet(inputs, config.width, config.depth, (config.members,), generator)
        self.head_kernel = nn.Parameter(
            _orthogonal((config.members, config.width, config.num_atoms), GAIN, generator)
        )
        self.head_bias = nn.Parameter(torch.zeros(config.members, config.num_atoms))
        self.embedding = None
        if num_tasks > 1:
            rows = torch.randn(num_tasks, config.embedding_size, generator=generator)
            self.embedding = nn.Parameter(rows / math.sqrt(config.embedding_size))

    def forward(self, observations: Tensor, actions: Tensor, task_ids: Tensor) -> Tensor:
        """Logits [E, B, K] of observations [B, O], actions [B, A], task_ids [B]."""
        x = kernels.pack_inputs(observations, actions, self.embedding, task_ids, self.embedding_norm)
        return torch.baddbmm(self.head_bias.unsqueeze(1), self.body(x), self.head_kernel)


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
        self.body = BroNet(observation_size + embedding_size, config.width, config.depth, (), generator)
        mean = _orthogonal((config.width, action_size), GAIN, generator)
        log_std = _orthogonal((config.width, action_size), 1.0, generator)
        self.head_kernel = nn.Parameter(torch.cat([mean, log_std], -1))  # [H, 2 A]: mean, then raw log-std
        self.head_bias = nn.Parameter(torch.zeros(2 * action_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and raw log-std, [B, A] each, of packed inputs [B, O + D]."""
        mean, raw_log_std = torch.addmm(self.head_bias, self.body(x), self.head_kernel).chunk(2, -1)
        return mean, raw_log_std
