"""AdamW over one flat buffer per network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import kernels


def flatten_parameters(module: nn.Module) -> Tensor:
    """Move a module's parameters into one flat buffer [P] and make each a view of it.

    Names and shapes stay as they are, so `state_dict` and `load_state_dict` do not notice. Call it after the
    module has reached its device and dtype: moving the module later would leave the buffer behind.
    """
    parameters = list(module.parameters())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    offset = 0
    for parameter in parameters:
        parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return flat


class FlatAdamW:
    """AdamW for one module (Adam when weight_decay is 0).

    Args:
        flat: the module's flat buffer from `flatten_parameters`; it is updated in place.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        flat: Tensor,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.parameters = tuple(parameters)
        self.flat = flat
        self.learning_rate, self.betas, self.eps, self.weight_decay = learning_rate, betas, eps, weight_decay
        self.grad = torch.zeros_like(flat)
        self.exp_avg = torch.zeros_like(flat)
        self.exp_avg_sq = torch.zeros_like(flat)
        self.step_count = torch.zeros((), device=flat.device)

    def minimize(self, loss: Tensor) -> Tensor:
        """One step against the gradient of `loss`; returns that gradient's norm, 0-d."""
        gradients = torch.autograd.grad(loss, self.parameters)
        torch.cat([gradient.reshape(-1) for gradient in gradients], out=self.grad)
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
        )
        norm: Tensor = torch.linalg.vector_norm(self.grad)
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step_count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, mine in self.state_dict().items():
            mine.copy_(state[name])
