"""The plain PyTorch twin of every op of the update: same name, same signature, any dtype, any device.

Dims: B batch, E ensemble members, K atoms, H width, A action, O observation, D embedding, T tasks.
A leading [E] axis on parameters means stacked networks; without it the same code serves a single one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Projection = Callable[[Tensor, Tensor, float], Tensor]
EPS = 1e-6  # of every LayerNorm
LOG_STD_MIN = -10.0
LOG_STD_MAX = 2.0


def bias_layer_norm(
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """LayerNorm of `x + bias` over the last axis, then ReLU or a residual sum.

        h = x + bias
        y = weight * (h - mean(h)) / sqrt(var(h) + eps) + shift
        out = relu(y)  |  residual + y  |  y

    Args:
        x: [.., B, H]. bias, weight, shift: [.., H] with the same leading axes. residual: [.., B, H].
    """
    h = x + bias.unsqueeze(-2)
    normed = F.layer_norm(h, h.shape[-1:], eps=eps)
    y = torch.addcmul(shift.unsqueeze(-2), normed, weight.unsqueeze(-2))
    if relu:
        y = y.relu()
    return y if residual is None else residual + y


def bronet(x: Tensor, *parameters: Tensor) -> Tensor:
    """BroNet of E stacked networks, head included.

        x = relu(LN(x W0 + b0));   per block:  x = x + LN(relu(LN(x W1 + b1)) W2 + b2);   out = x Wh + bh

    Args:
        x: [B, I], shared by all networks, or [E, B, I].
        parameters: (kernel [E, in, H], bias, norm weight, norm bias [E, H]) of the input layer and of the two
            layers of each block, in this order, then the head's kernel [E, H, K] and bias [E, K].
    Returns:
        [E, B, K].
    Source: Nauman et al. 2024, arXiv:2405.16158.
    """
    *body, head_kernel, head_bias = parameters
    layers = [body[index : index + 4] for index in range(0, len(body), 4)]
    kernel, bias, weight, shift = layers[0]
    x = bias_layer_norm(torch.matmul(x, kernel), bias, weight, shift, relu=True)
    for first, second in zip(layers[1::2], layers[2::2], strict=True):
        kernel, bias, weight, shift = first
        hidden = bias_layer_norm(torch.matmul(x, kernel), bias, weight, shift, relu=True)
        kernel, bias, weight, shift = second
        x = bias_layer_norm(torch.matmul(hidden, kernel), bias, weight, shift, residual=x)
    return torch.baddbmm(head_bias.unsqueeze(1), x, head_kernel)


def categorical_projection(probs: Tensor, positions: Tensor, v_max: float) -> Tensor:
    """Project a distribution on arbitrary positions onto K evenly spaced atoms in [-v_max, v_max].

    Mass is split linearly between the two neighbouring atoms; an exact hit keeps all of its mass, and
    positions beyond the support are clipped to its ends, so that the mass of every row is kept.

    Args:
        probs: [B, K] mass. positions: [B, K] where that mass sits, in units of return.
    Returns:
        [B, K] mass on the atoms.
    Source: Bellemare et al. 2017, arXiv:1707.06887, section 4.
    """
    num_atoms = probs.shape[-1]
    spacing = 2.0 * v_max / (num_atoms - 1)
    index = (positions.clamp(-v_max, v_max) + v_max).div(spacing).clamp_(0.0, num_atoms - 1)
    lower = index.floor()
    upper_share = index - lower
    lower_index = lower.long()
    upper_mass = probs * upper_share
    target = torch.zeros_like(probs)
    target.scatter_add_(-1, lower_index, probs - upper_mass)
    target.scatter_add_(-1, (lower_index + 1).clamp_max_(num_atoms - 1), upper_mass)
    return target


def categorical_target(
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | float,
    atoms: Tensor,
    v_max: float,
    project: Projection = categorical_projection,
) -> Tensor:
    """Soft categorical Bellman target of an ensemble.

        p    = mean over members of softmax(next_logits)
        y_k  = clip(r + discount * (z_k - temperature * log pi(a'|s')), -v_max, v_max)
        out  = projection of p from y onto z

    Args:
        next_logits: [E, B, K] of the target critic. rewards, next_log_probs: [B].
        discounts: [B], the discount times the mask. atoms: [K]. project: the projection to use.
    Returns:
        [B, K] probabilities.
    Source: Nauman et al. 2025, arXiv:2505.23150.
    """
    probs = next_logits.softmax(-1).mean(0)
    values = atoms - (temperature * next_log_probs).unsqueeze(-1)  # [B, K]
    positions = torch.addcmul(rewards.unsqueeze(-1), discounts.unsqueeze(-1), values)
    return project(probs, positions, v_max)


def categorical_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of `target` against the log-softmax of `logits`, per row.

        out = -sum_k target_k * log softmax(logits)_k          d out / d logits = softmax(logits) - target

    Args:
        logits: [.., B, K]. target: [B, K], mass 1 per row, gets no gradient.
    Returns:
        [.., B].
    """
    return -(target.detach() * logits.log_softmax(-1)).sum(-1)


def expected_value(logits: Tensor, atoms: Tensor) -> Tensor:
    """Mean of the categorical distribution: `sum_k softmax(logits)_k * z_k`, [.., K] -> [..].

    Source: Bellemare et al. 2017, arXiv:1707.06887, section 2.
    """
    return logits.softmax(-1) @ atoms


def two_hot(values: Tensor, num_atoms: int, v_max: float) -> Tensor:
    """Scalars [..] as mass [.., K] on the two atoms around them (on the end atoms beyond the support)."""
    spacing = 2.0 * v_max / (num_atoms - 1)
    index = (values.clamp(-v_max, v_max) + v_max).div(spacing).clamp_(0.0, num_atoms - 1).unsqueeze(-1)
    lower = index.floor()
    out = torch.zeros(*values.shape, num_atoms, dtype=values.dtype, device=values.device)
    out.scatter_add_(-1, lower.long(), 1.0 - (index - lower))
    return out.scatter_add_(-1, (lower.long() + 1).clamp_max_(num_atoms - 1), index - lower)


def tanh_gaussian(mean: Tensor, raw_log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample of a tanh-squashed Gaussian and its log-probability.

        log_std = LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * (1 + tanh(raw_log_std)) / 2
        u       = mean + exp(log_std) * noise,   a = tanh(u)
        log pi  = sum_A [-noise^2 / 2 - log_std - log(2 pi) / 2 - log(1 - a^2)]

    The last term is computed as 2 * (log 2 - u - softplus(-2 u)), which is finite for every u.

    Args:
        mean, raw_log_std, noise: [B, A]; noise is standard normal and gets no gradient.
    Returns:
        actions [B, A] in [-1, 1] and log-probabilities [B].
    Source: Haarnoja et al. 2018, arXiv:1812.05905, appendix C.
    """
    log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (1.0 + raw_log_std.tanh())
    u = torch.addcmul(mean, log_std.exp(), noise)
    log_slope = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
    per_dim = -0.5 * noise.square() - log_std - log_slope
    return u.tanh(), per_dim.sum(-1) - 0.5 * math.log(2.0 * math.pi) * mean.shape[-1]


def normalized_embedding(table: Tensor, task_ids: Tensor, norm: str = "l2") -> Tensor:
    """Rows of the task embedding divided by their norm: table [T, D], task_ids [B] -> [B, D].

    `norm` is "l2" (the published code) or "l1" (reported of the paper).
    """
    order = {"l2": 2, "l1": 1}[norm]
    norms: Tensor = torch.linalg.vector_norm(table, order, -1, keepdim=True)
    return (table / norms)[task_ids]


def pack_inputs(
    observations: Tensor,
    actions: Tensor | None = None,
    table: Tensor | None = None,
    task_ids: Tensor | None = None,
    norm: str = "l2",
) -> Tensor:
    """One network input [observation, action, normalised task embedding], each part where given.

    Args:
        observations: [B, O]. actions: [B, A]. table: [T, D] with task_ids [B].
    Returns:
        [B, O + A + D]. Gradients reach the actions and the table.
    """
    parts = [observations]
    if actions is not None:
        parts.append(actions)
    if table is not None:
        if task_ids is None:
            raise ValueError("task_ids [B] are needed with a task embedding table, got None")
        parts.append(normalized_embedding(table, task_ids, norm))
    return torch.cat(parts, -1) if len(parts) > 1 else observations


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step in place (Adam with weight_decay 0), over one flat buffer.

        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        p -= learning_rate * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p)

    Args:
        param, grad, exp_avg, exp_avg_sq: [P]. step: 0-d tensor, t - 1 on entry and t on return.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    step += 1
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    count = step.to(torch.float64)
    denominator = (exp_avg_sq / (1.0 - beta2**count)).sqrt_().add_(eps)
    update = (exp_avg / (1.0 - beta1**count)).div_(denominator).add_(param, alpha=weight_decay)
    param.sub_(update, alpha=learning_rate)


def ema_(target: Tensor, param: Tensor, tau: float) -> None:
    """Move a target network: `target = (1 - tau) * target + tau * param`, in place over [P]."""
    target.lerp_(param, tau)


def gather_rows(
    rows: Tensor,
    index: Tensor,
    *,
    side: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of a store, or of a second one beside it where the index is negative.

        out[m] = rows[index[m]] where index[m] >= 0, else side[-1 - index[m]]

    Args:
        rows: [R, W], R >= 1. index: [M] int64. side: [S, W]. out: [M, W]. dtype: of the result.
    Returns:
        [M, W] of `dtype` (default: that of rows); `out` where given.
    """
    same = dtype is None or dtype == rows.dtype
    beside = index < 0
    inside = index if side is None else index.masked_fill(beside, 0)
    gathered = torch.index_select(rows, 0, inside, out=out if same else None)
    if side is not None:
        gathered[beside] = side[-1 - index[beside]]
    if out is None:
        return gathered if same else gathered.to(dtype)
    return out.copy_(gathered)


def n_step_rewards(
    rewards: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    scale: Tensor | None = None,
    task_ids: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the n rewards of each transition, divided by the scale of its task where one is given.

        out[m] = sum_i weights[i] * rewards[index[m, i]] / scale[task_ids[m]]

    The sum starts at 0 and adds with i ascending; a negative index stands for a reward of 0.

    Args:
        rewards: [R], R >= 1. index: [M, n] int64. weights: [n]. scale: [T]. task_ids: [M] int64.
    Returns:
        [M].
    Source: Sutton and Barto 2018, section 7.1.
    """
    total = rewards.new_zeros(index.shape[0])
    for step, weight in zip(index.unbind(-1), weights, strict=True):
        total = total + weight * torch.where(step >= 0, rewards[step.clamp_min(0)], 0.0)
    return total if scale is None or task_ids is None else total / scale[task_ids]
