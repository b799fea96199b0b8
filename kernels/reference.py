"""The plain PyTorch twin of every op of the update: same name, same signature, any dtype, any device.

Dims: B batch, E ensemble members, K atoms, H width, A action, O observation, D embedding, T tasks.
A leading [E] axis on parameters means stacked networks; without it the same code serves a single one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .runtime.dispatch import casts

if TYPE_CHECKING:
    from .stages import Stage

Projection = Callable[[Tensor, Tensor, float], Tensor]
EPS = 1e-6  # of every LayerNorm
LOG_STD_MIN = -10.0
LOG_STD_MAX = 2.0
METRICS = (  # of one update, in the order of `update_summary_`
    "critic_loss",
    "critic_gradient_norm",
    "actor_loss",
    "actor_gradient_norm",
    "entropy",
    "q_mean",
    "temperature",
    "temperature_loss",
)


def _wide(x: Tensor) -> Tensor:
    """The type to compute in: narrower types than float32 become that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        out = relu(y)  |  residual + y  |  residual + relu(y)  |  y

    Args:
        x: [.., H]. bias, weight, shift: [H], or [E, .., H] with the leading axes of x. residual: as x.
    Returns:
        Of the shape and dtype of x.
    Source: Ba et al. 2016, arXiv:1607.06450, section 3.
    """

    def over_rows(p: Tensor) -> Tensor:
        return p.reshape(*p.shape[:-1], *[1] * (x.dim() - p.dim()), p.shape[-1])

    h = x + over_rows(bias)
    normed = F.layer_norm(h, h.shape[-1:], eps=eps)
    y = torch.addcmul(over_rows(shift), normed, over_rows(weight))
    if relu:
        y = y.relu()
    return (y if residual is None else residual + y).to(x.dtype)


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
    return torch.baddbmm(head_bias.to(x.dtype).unsqueeze(1), x, head_kernel)


def network(x: Tensor, stages: Sequence[Stage], parameters: Mapping[str, Tensor]) -> Tensor:
    """N stacked networks of these stages (kernels.stages), each a product, its pass and what is added.

    Args:
        x: [B, I], shared by all networks, or [N, B, I].
        parameters: by name, kernels [N, inputs, outputs] and vectors [N, outputs].
    Returns:
        [N, B, K].
    """
    values = [x]
    for name, _, reads, after, relu, adds, product in stages:
        given = {
            vector: parameters.get(f"{name}.{vector}") for vector in ("bias", "norm_weight", "norm_bias")
        }
        y = torch.matmul(values[reads], parameters[f"{name}.kernel"]) if product else values[reads]
        bias, weight, shift = given.values()
        if after == "bias":
            assert bias is not None
            y = y + bias.to(y.dtype).unsqueeze(1)
            y = y.relu() if relu else y
        elif after not in ("norm", "layer_norm"):  # one that was added
            from .passes_plain import PASSES

            own = [parameters[f"{name}.{vector}"] for vector in PASSES[after].vectors]
            y = PASSES[after].formula(y, own)
            y = y.relu() if relu else y
        else:
            assert weight is not None
            assert shift is not None
            bias = torch.zeros_like(weight) if bias is None else bias
            y = y.expand(len(weight), *y.shape[-2:])
            y = bias_layer_norm(y, bias, weight, shift, relu=relu)
        values.append(y if adds is None else values[adds] + y)
    return values[-1]


def categorical_projection(probs: Tensor, positions: Tensor, v_max: float) -> Tensor:
    """Project a distribution on arbitrary positions onto K evenly spaced atoms in [-v_max, v_max].

    Mass is split linearly between the two neighbouring atoms; an exact hit keeps all of its mass, and
    positions beyond the support are clipped to its ends, so that the mass of every row is kept.

    Args:
        probs: [.., K] mass. positions: [.., K] where that mass sits, in units of return.
    Returns:
        [.., K] mass on the atoms: float64 for float64 probs, else float32.
    Source: Bellemare et al. 2017, arXiv:1707.06887, section 4.
    """
    probs = _wide(probs)
    positions = positions.to(probs.dtype)
    num_atoms = probs.shape[-1]
    spacing = 2.0 * v_max / (num_atoms - 1)
    index = (positions.clamp(-v_max, v_max) + v_max).div(spacing).clamp_(0.0, num_atoms - 1)
    lower = index.floor()
    upper_share = index - lower
    lower_index = lower.long().clamp_(0, num_atoms - 1)  # NaN too has an index
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
        [B, K] probabilities: float64 for float64 logits, else float32.
    Source: Nauman et al. 2025, arXiv:2505.23150.
    """
    probs = _wide(next_logits).softmax(-1).mean(0)
    atoms, rewards, discounts, next_log_probs = (
        x.to(probs.dtype) for x in (atoms, rewards, discounts, next_log_probs)
    )
    values = atoms - (temperature * next_log_probs).unsqueeze(-1)  # [B, K]
    positions = torch.addcmul(rewards.unsqueeze(-1), discounts.unsqueeze(-1), values)
    return project(probs, positions, v_max)


def categorical_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of `target` against the log-softmax of `logits`, per row.

        out = -sum_k target_k * log softmax(logits)_k          d out / d logits = softmax(logits) - target

    Args:
        logits: [.., B, K]. target: [B, K], mass 1 per row, gets no gradient.
    Returns:
        [.., B]: float64 for float64 logits, else float32.
    """
    logits = _wide(logits)
    return -(target.detach().to(logits.dtype) * logits.log_softmax(-1)).sum(-1)


def categorical_bellman_loss(
    logits: Tensor,
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | float,
    atoms: Tensor,
    v_max: float,
) -> Tensor:
    """Cross-entropy of `categorical_target` against each member; only the logits get a gradient.

    Args:
        logits: [E, B, K]. next_logits: [E', B, K]. The others: as in `categorical_target`.
    Returns:
        [E, B]: float64 for float64 logits, else float32.
    Source: Nauman et al. 2025, arXiv:2505.23150.
    """
    target = categorical_target(next_logits, rewards, discounts, next_log_probs, temperature, atoms, v_max)
    return categorical_cross_entropy(logits, target)


def categorical_bellman_loss_and_gradient(
    logits: Tensor,
    next_logits: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    next_log_probs: Tensor,
    temperature: Tensor | float,
    atoms: Tensor,
    v_max: float,
    *,
    scale: Tensor | float = 1.0,
    columns: int | None = None,
    project: Projection = categorical_projection,
) -> tuple[Tensor, Tensor]:
    """`categorical_bellman_loss`, and scale * (softmax(logits) - target), without autograd.

    Args:
        scale: of the gradient. columns: of the gradient's rows, 0 beyond K. The others: as above.
    Returns:
        losses [E, B], float64 for float64 logits, else float32; gradient [E, B, columns] of the dtype of the
        logits.
    """
    target = categorical_target(
        next_logits, rewards, discounts, next_log_probs, temperature, atoms, v_max, project
    ).detach()
    log_probs = _wide(logits.detach()).log_softmax(-1)
    target = target.to(log_probs.dtype)
    grad = (log_probs.exp() - target).mul_(scale).to(logits.dtype)
    missing = 0 if columns is None else columns - logits.shape[-1]
    return -(target * log_probs).sum(-1), F.pad(grad, (0, missing)) if missing else grad


def _mean(probs: Tensor, atoms: Tensor) -> Tensor:
    """[.., K] -> [..]; autocast would compute the product of matrices in fewer bits."""
    if casts(probs.device.type):
        return (probs * atoms).sum(-1)
    return probs @ atoms


def expected_value(logits: Tensor, atoms: Tensor) -> Tensor:
    """Mean of the categorical distribution: `sum_k softmax(logits)_k * z_k`, [.., K] -> [..].

    float64 for float64 logits, else float32.
    Source: Bellemare et al. 2017, arXiv:1707.06887, section 2.
    """
    probs = _wide(logits).softmax(-1)
    return _mean(probs, atoms.to(probs.dtype))


def expected_value_and_gradient(
    logits: Tensor, atoms: Tensor, *, scale: Tensor | float = 1.0, columns: int | None = None
) -> tuple[Tensor, Tensor]:
    """`expected_value`, and scale * softmax(logits)_k * (z_k - value), without autograd.

    Args:
        logits: [.., K]. atoms: [K]. scale: of the gradient. columns: of the gradient's rows, 0 beyond K.
    Returns:
        values [..], float64 for float64 logits, else float32; gradient [.., columns] of the dtype of the
        logits.
    Source: Bellemare et al. 2017, arXiv:1707.06887, section 2.
    """
    probs = _wide(logits.detach()).softmax(-1)
    atoms = atoms.detach().to(probs.dtype)
    values = _mean(probs, atoms)
    grad = (probs * (atoms - values.unsqueeze(-1))).mul_(scale).to(logits.dtype)
    missing = 0 if columns is None else columns - logits.shape[-1]
    return values, F.pad(grad, (0, missing)) if missing else grad


def two_hot(values: Tensor, num_atoms: int, v_max: float) -> Tensor:
    """Scalars [..] as mass [.., K] on the two atoms around them (on the end atoms beyond the support).

    float64 for float64 values, else float32.
    """
    values = _wide(values)
    spacing = 2.0 * v_max / (num_atoms - 1)
    index = (values.clamp(-v_max, v_max) + v_max).div(spacing).clamp_(0.0, num_atoms - 1).unsqueeze(-1)
    lower = index.floor()
    lower_index = lower.long().clamp_(0, num_atoms - 1)  # NaN too has an index
    out = values.new_zeros(*values.shape, num_atoms)
    out.scatter_add_(-1, lower_index, 1.0 - (index - lower))
    return out.scatter_add_(-1, (lower_index + 1).clamp_max_(num_atoms - 1), index - lower)


def hl_gauss(values: Tensor, num_atoms: int, v_max: float, sigma: float) -> Tensor:
    """Scalars [..] as the masses [.., K] of a normal distribution in a bin around each atom.

        out_k = (Phi((e_{k+1} - v) / sigma) - Phi((e_k - v) / sigma)) / (the same with e_K and e_0)

    with v the value, clipped to [-v_max, v_max], and e_0 .. e_K the edges of K bins as wide as the spacing of
    the atoms, each with an atom in its middle. float64 for float64 values, else float32.

    Args:
        sigma: in units of return.
    Source: Farebrother et al. 2024, arXiv:2403.03950, section 3.1.
    """
    values = _wide(values).clamp(-v_max, v_max).unsqueeze(-1)
    half = v_max / (num_atoms - 1)
    edges = torch.linspace(
        -v_max - half, v_max + half, num_atoms + 1, dtype=values.dtype, device=values.device
    )
    below = torch.erf((edges - values) / (math.sqrt(2.0) * sigma))
    return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])


def two_hot_cross_entropy(logits: Tensor, values: Tensor, v_max: float) -> Tensor:
    """Cross-entropy of `two_hot(values)`: logits [.., K], values [..] or [B] -> [..]."""
    target = two_hot(values.detach().to(_wide(logits).dtype), logits.shape[-1], v_max)
    return -(target * _wide(logits).log_softmax(-1)).sum(-1)


def hl_gauss_cross_entropy(logits: Tensor, values: Tensor, v_max: float, sigma: float) -> Tensor:
    """Cross-entropy of `hl_gauss(values)`: logits [.., K], values [..] or [B] -> [..]."""
    target = hl_gauss(values.detach().to(_wide(logits).dtype), logits.shape[-1], v_max, sigma)
    return -(target * _wide(logits).log_softmax(-1)).sum(-1)


def philox(seed: Tensor, offset: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words of 32 bits per index: Philox4x32-10, counter (index, offset), key seed.

    Args:
        seed, offset, index: int64, of shapes that broadcast; the low half of each is its first word.
    Returns:
        Four tensors of int64 in [0, 2^32).
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = index & low, index >> 32 & low, offset & low, offset >> 32 & low
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        # the multipliers less 2^32, so that products fit into int64; their high halves get the word back
        a, b = c0 * (0xD2511F53 - 2**32), c2 * (0xCD9E8D57 - 2**32)
        c0, c2 = ((b >> 32) + c2) ^ c1 ^ k0, ((a >> 32) + c0) ^ c3 ^ k1
        c1, c3 = b & low, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def standard_normal(rng: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals, a pure function of `rng`: element i of the flattened result is

        sqrt(-2 log u) * cos(2 pi v),   u, v = (floor(w / 2^9) + 1/2) / 2^23

    with w the first and the second word of `philox` for index i. u and v lie inside of (0, 1); no |normal|
    exceeds 5.77.

    Args:
        rng: [2] int64, seed and offset. One call uses one offset: add 1 to it before the next.
        dtype: of the result; computed in float32, or in float64 for float64.
    Source: Box and Muller 1958.
    """
    wide = torch.promote_types(dtype, torch.float32)
    index = torch.arange(math.prod(shape), device=rng.device)
    first, second, _, _ = philox(rng[0], rng[1], index)
    u, v = (((word >> 9).to(wide) + 0.5) * 2.0**-23 for word in (first, second))
    return ((-2.0 * u.log()).sqrt() * (2.0 * math.pi * v).cos()).to(dtype).reshape(tuple(shape))


def tanh_gaussian(
    mean: Tensor,
    raw_log_std: Tensor,
    noise: Tensor | None = None,
    *,
    rng: Tensor | None = None,
    out: Tensor | None = None,
    noise_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample of a tanh-squashed Gaussian and its log-probability.

        log_std = LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * (1 + tanh(raw_log_std)) / 2
        u       = mean + exp(log_std) * noise,   a = tanh(u)
        log pi  = sum_A [-noise^2 / 2 - log_std - log(2 pi) / 2 - log(1 - a^2)]

    The last term is computed as 2 * (log 2 - u - softplus(-2 u)), which is finite for every u. Narrower types
    than float32 are widened to it first.

    Args:
        mean, raw_log_std, noise: [.., A]; noise is standard normal and gets no gradient.
        rng: in its place, what `standard_normal` draws the noise from.
        out, noise_out: [.., A], which receive the actions, and the noise drawn from rng.
    Returns:
        actions [.., A] in [-1, 1], of the dtype of mean, or out; and log-probabilities [..], float32 or
        float64.
    Source: Haarnoja et al. 2018, arXiv:1812.05905, appendix C.
    """
    dtype, wide = mean.dtype, torch.promote_types(mean.dtype, torch.float32)
    if noise is None:
        if rng is None:
            raise ValueError("one of noise and rng is needed, got neither")
        noise = standard_normal(rng, mean.shape, wide)
        if noise_out is not None:
            noise_out.copy_(noise)
    mean, raw_log_std, noise = mean.to(wide), raw_log_std.to(wide), noise.detach().to(wide)
    log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (1.0 + raw_log_std.tanh())
    u = torch.addcmul(mean, log_std.exp(), noise)
    log_slope = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u, threshold=40.0))
    per_dim = -0.5 * noise.square() - log_std - log_slope
    actions = u.tanh().to(dtype) if out is None else out.copy_(u.tanh())
    return actions, per_dim.sum(-1) - 0.5 * math.log(2.0 * math.pi) * mean.shape[-1]


def tanh_gaussian_backward(
    dactions: Tensor | None,
    dlog_probs: Tensor | float | None,
    mean: Tensor,
    raw_log_std: Tensor,
    noise: Tensor,
    *,
    scale: float = 1.0,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `tanh_gaussian` for those of its results, without autograd.

        du = da (1 - a^2) + 2 a dlogpi,   dmean = du
        draw = reach (1 - tanh(raw)^2) (du exp(log_std) noise - dlogpi)

    with reach = (LOG_STD_MAX - LOG_STD_MIN) / 2. Narrower types than float32 are widened to it first.

    Args:
        dactions: [.., A], or [N, .., A] to be summed over N, or None for zeros. dlog_probs: [..], or one for
            all rows, or None for 0; multiplied by scale.
        mean, raw_log_std, noise: [.., A]. out: two tensors [.., A], which receive the result.
    Returns:
        dmean and draw [.., A] of the dtypes of mean and raw_log_std, or out.
    Source: Haarnoja et al. 2018, arXiv:1812.05905, appendix C.
    """
    wide = torch.promote_types(mean.dtype, torch.float32)
    reach = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
    t = raw_log_std.detach().to(wide).tanh()
    spread = (LOG_STD_MIN + reach * (1.0 + t)).exp() * noise.detach().to(wide)
    actions = (mean.detach().to(wide) + spread).tanh()
    dlog = 0.0 if dlog_probs is None else dlog_probs
    if isinstance(dlog, Tensor):
        dlog = dlog.detach().to(wide).unsqueeze(-1)
    dlog = dlog * scale
    du = 2.0 * actions * dlog
    if dactions is not None:
        da = dactions.detach().to(wide)
        da = da if da.dim() == mean.dim() else da.sum(0)
        du = du + da * (1.0 - actions * actions)
    draw = reach * (1.0 - t * t) * (du * spread - dlog)
    if out is None:
        return du.to(mean.dtype), draw.to(raw_log_std.dtype)
    return out[0].copy_(du), out[1].copy_(draw)


def normalized_embedding(table: Tensor, task_ids: Tensor, norm: str = "l2") -> Tensor:
    """Rows of the task embedding divided by their norm: table [T, D], task_ids [..] -> [.., D].

    `norm` is "l2" (the published code) or "l1" (reported of the paper).
    """
    order = {"l2": 2, "l1": 1}[norm]
    norms: Tensor = torch.linalg.vector_norm(table, order, -1, keepdim=True)
    return (table / norms)[task_ids]


def normalized_embedding_backward(
    grad: Tensor, table: Tensor, task_ids: Tensor, norm: str = "l2", *, out: Tensor | None = None
) -> Tensor:
    """Gradient of the table for that of rows of `normalized_embedding`, without autograd.

        l2:  dtable[t] = (s - n (n . s)) / |e|          l1:  dtable[t] = (s - sign(e) (n . s)) / |e|

    with e = table[t], n = e / |e| and s the sum of the gradients of the rows of task t.

    Args:
        grad: [.., D], or [E, .., D], which are summed. table: [T, D]. task_ids: [..]. out: [T, D], which
            receives the result.
    Returns:
        [T, D] of the dtype of the table, or out.
    """
    e = _wide(table.detach())
    grad = grad.detach().to(e.dtype)
    rows = (grad.sum(0) if grad.dim() > task_ids.dim() + 1 else grad).reshape(-1, e.shape[1])
    total = torch.zeros_like(e).index_put_((task_ids.reshape(-1),), rows, accumulate=True)
    length = torch.linalg.vector_norm(e, {"l2": 2, "l1": 1}[norm], -1, keepdim=True)
    n = e / length
    along = (n * total).sum(-1, keepdim=True)
    dtable = (total - (n if norm == "l2" else e.sign()) * along) / length
    return dtable.to(table.dtype) if out is None else out.copy_(dtable)


def pack_inputs(
    observations: Tensor,
    actions: Tensor | None = None,
    table: Tensor | None = None,
    task_ids: Tensor | None = None,
    norm: str = "l2",
    *,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One network input [observation, action, normalised task embedding, zeros], each part where given.

    Args:
        observations: [.., O]. actions: [.., A]. table: [T, D] with task_ids [..].
        width: of the result, O + A + D by default. dtype: of the result, that of the observations by default.
        out: [.., width], which receives the result.
    Returns:
        [.., width], or out; the observations themselves where there is nothing to do. Gradients reach the
        observations, the actions and the table.
    """
    parts = [observations]
    if actions is not None:
        parts.append(actions)
    if table is not None:
        if task_ids is None:
            raise ValueError("task_ids [B] are needed with a task embedding table, got None")
        parts.append(normalized_embedding(table, task_ids, norm))
    if out is not None:
        width = out.shape[-1]
    missing = 0 if width is None else width - sum(part.shape[-1] for part in parts)
    if missing:
        parts.append(observations.new_zeros(*observations.shape[:-1], missing))
    if out is not None:
        return torch.cat(parts, -1, out=out)
    packed = torch.cat(parts, -1) if len(parts) > 1 else observations
    return packed.to(dtype or observations.dtype)


def clipped(grad: Tensor, max_norm: float | Tensor | None, gradient_norm: Tensor | None) -> Tensor:
    """The gradient scaled to an L2 norm of at most `max_norm`; its own norm goes to `gradient_norm`.

    The factor is min(1, max_norm / (norm + 1e-6)), that of torch.nn.utils.clip_grad_norm_.
    """
    if max_norm is None and gradient_norm is None:
        return grad
    norm: Tensor = torch.linalg.vector_norm(grad)
    if gradient_norm is not None:
        gradient_norm.copy_(norm)
    return grad if max_norm is None else grad * (max_norm / (norm + 1e-6)).clamp(max=1.0)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    learning_rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    target: Tensor | None = None,
    tau: float | Tensor = 0.005,
    low: Tensor | None = None,
    target_low: Tensor | None = None,
    max_norm: float | Tensor | None = None,
    gradient_norm: Tensor | None = None,
) -> None:
    """One AdamW step in place (Adam with weight_decay 0) over one flat buffer; then target and copies.

        g = min(1, max_norm / (|grad| + 1e-6)) * grad, or grad without max_norm
        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        p -= learning_rate * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p)
        target += tau * (p - target),   low = p,   target_low = target,   gradient_norm = |grad|

    Args:
        param, grad, exp_avg, exp_avg_sq, target, low, target_low: [P]. step: 0-d tensor, t - 1 on entry and t
            on return. gradient_norm: 0-d, of the gradient before it is clipped.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    step += 1
    beta1, beta2 = betas
    grad = clipped(grad.to(param.dtype), max_norm, gradient_norm)
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    count = step.to(torch.float64)
    denominator = (exp_avg_sq / (1.0 - beta2**count)).sqrt_().add_(eps)
    update = (exp_avg / (1.0 - beta1**count)).div_(denominator).add_(param, alpha=weight_decay)
    param.sub_(learning_rate * update)
    if low is not None:
        low.copy_(param)
    if target is not None:
        ema_(target, param, tau, low=target_low)


def ema_(target: Tensor, param: Tensor, tau: float | Tensor, *, low: Tensor | None = None) -> None:
    """Move a target network in place over [P]: `target += tau * (param - target)`, low = target."""
    target.lerp_(param, tau.to(target) if isinstance(tau, Tensor) else tau)
    if low is not None:
        low.copy_(target)


class ScalarAdam(NamedTuple):
    """Adam of one parameter: tensors of one element, which a step changes, and the rule."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # 0-d, the steps made
    learning_rate: Tensor  # 0-d; it stays
    betas: tuple[float, float]
    eps: float


def update_summary_(
    metrics: Tensor,
    losses: Tensor,
    log_probs: Tensor,
    q_values: Tensor,
    alpha: Tensor,
    *,
    target_entropy: float,
    gradient: Tensor,
    step: Tensor,
    since: Tensor,
    adam: ScalarAdam | None = None,
) -> None:
    """The metrics of an update, but for the gradients' norms, which are there; the temperature's gradient,
    and a step of its logarithm.

        critic_loss = sum_e mean_b losses,   entropy = -mean(log_probs),   q_mean = mean(q_values)
        actor_loss = -(q_mean + alpha entropy),   temperature_loss = alpha (entropy - target_entropy)
        since = step where it is 0 and the metric is not finite

    Args:
        metrics, since: [8]. losses, q_values: [E, B]. log_probs: [B]. alpha, step: 0-d. gradient: of one
            element, receives the temperature's loss. adam: of log alpha; alpha receives exp of what it gives.
    """
    dtype = metrics.dtype
    entropy, q_mean = log_probs.mean(dtype=dtype).neg(), q_values.mean(dtype=dtype)
    weight = alpha.to(dtype).view(())
    loss = weight * (entropy - target_entropy)
    critic_loss = losses.sum(dtype=dtype) / losses.shape[-1]
    actor_loss = torch.addcmul(q_mean, weight, entropy).neg()
    numbers = [critic_loss, metrics[1], actor_loss, metrics[3], entropy, q_mean, weight, loss]
    metrics.copy_(torch.stack(numbers))
    gradient.copy_(loss.view(gradient.shape))
    new = (since == 0).logical_and_(metrics.isfinite().logical_not_())
    since.copy_(torch.where(new, step.to(since.dtype), since))
    if adam is not None:
        *state, count, rate, betas, eps = adam
        given = (state[0], gradient.view(state[0].shape), *state[1:], count)
        adamw_(*given, learning_rate=rate, betas=betas, eps=eps, weight_decay=0.0)
        alpha.copy_(adam.param.exp().view(alpha.shape))


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

    The sum adds with i ascending; a negative index stands for no reward. Of none it is 0, of -0 it is -0.

    Args:
        rewards: [R], R >= 1. index: [M, n] int64. weights: [n]. scale: [T]. task_ids: [M] int64.
    Returns:
        [M].
    Source: Sutton and Barto 2018, section 7.1.
    """
    total = rewards.new_zeros(index.shape[0])
    for i, (step, weight) in enumerate(zip(index.unbind(-1), weights, strict=True)):
        part = weight * rewards[step.clamp_min(0)]
        total = torch.where(step >= 0, total + part if i > 0 else part, total)
    return total if scale is None or task_ids is None else total / scale[task_ids]
