"""Stacked networks, the critic ensemble, the tanh-Gaussian policy and its temperature.

Parameters of stacked networks carry a leading axis [E]; a kernel is [E, in, out]. Equations live with the
ops in `brc_fast.kernels` and in nn.bodies and nn.losses; here they are only put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal, Self, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brc_fast import kernels
from brc_fast.config import ActorConfig, CriticConfig, Reduction
from brc_fast.kernels.runtime.native import check_ids
from brc_fast.kernels.stages import Stages, check_stages, names_of, shapes_of
from brc_fast.spec import Discrete

from . import bodies, conditioning, losses

Mode = Literal["logits", "values", "features", "bellman_loss", "regression_loss"]
MODES = get_args(Mode)
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
        return kernels.network(x, self.stages, self.parameters_by_name(frozen))

    def features(self, x: Tensor) -> Tensor:
        """What the head multiplies, [E, B, H], by plain PyTorch."""
        return kernels.reference.network(x, self.stages[:-1], self.parameters_by_name())

    def parameters_by_name(self, frozen: bool = False) -> dict[str, Tensor]:
        """Those of all stages as attributes have them: torch.func, a load or a parametrization may put others
        in place of this module's own."""
        own = {name: self.parameter(name) for name in names_of(self.stages)}
        return {name: p.detach() for name, p in own.items()} if frozen else own

    def parameter(self, name: str) -> Tensor:
        """The parameter of this name, as above."""
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        return value  # type: ignore[no-any-return]


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

    `BRC` has one, and any other agent may use it: docs/critic.md. Observations are [..., O] with any leading
    axes, actions [..., A] and task_ids [...], int64, in [0, T), with the same; results have E before them.
    With one task there is no embedding, and task_ids need not be given.

        Critic(17, 6)             # of continuous actions
        Critic(17, 0)             # of states: critic.values(observations)
        Critic(17, Discrete(4))   # of each discrete action, or of those given, int64 [...]

    Args:
        observation_size: O. action_size: A, 0, or `brc_fast.spec.Discrete(N)`, for which a network has N * K
            outputs. num_tasks: T.
        config: sizes, the body, the loss (with "mse" K = 1, the value itself), how tasks are told apart, and
            the support: scale rewards so that returns lie within [v_min, v_max].
        generator: draws the first weights; without it torch's own does (torch.manual_seed).
        device, dtype: of the parameters; torch's defaults where they are not given.
    Attributes:
        atoms: [K], evenly spaced over the support; None with "mse". They are part of the state: weights of
            another support are refused.
        embedding: [T, D], trained, of conditioning "embedding" with several tasks; else None.

    Whatever hooks the call of a module (DistributedDataParallel, FSDP, torch.compile) has to see it: behind
    such a wrapper call `wrapped(observations, actions, mode="bellman_loss", ...)` with the arguments of the
    method by name. A method of `ddp.module` would leave gradients that no process averages, and is refused.

    For optimizers: kernels are [E, inputs, outputs], biases and norms [E, H], an embedding [T, D]. A rule
    that gives weight decay to what has two axes or more therefore gives it to everything, as BRC does;
    `p.ndim == 3` are the kernels alone. torch.optim.Muon takes matrices: it refuses the kernels, and would
    orthogonalize biases and norms, so that none of them belongs into it.

    Source: Nauman et al. 2025, arXiv:2505.23150.
    """

    atoms: Tensor | None
    task_columns: Tensor | None
    choices: int | None = None  # N, of discrete actions
    _wrapped = False  # by DistributedDataParallel, whose _ignored names are no parameters of its
    _ignored: Sequence[str] = ()

    def __init__(
        self,
        observation_size: int,
        action_size: int | Discrete,
        num_tasks: int = 1,
        config: CriticConfig | None = None,
        generator: Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(action_size, Discrete):
            self.choices, action_size = action_size.n, 0
        self.sizes = {"observations": observation_size, "actions": action_size}
        given: list[tuple[str, Any, int]] = [
            ("the size of observations", observation_size, 1),
            ("the size of actions", action_size, 0),
            ("num_tasks", num_tasks, 1),
        ]
        for name, size, least in given:
            if not isinstance(size, Integral) or size < least:
                rule = "a positive integer" if least else "an integer of 0 or more, or Discrete(N)"
                raise ValueError(f"{name} must be {rule}, got {size!r}")
        self.num_tasks = num_tasks
        self.config = config = CriticConfig() if config is None else config
        # with each reduction of a target's members
        self._losses = {name: losses.make(replace(config, reduction=name)) for name in get_args(Reduction)}
        self.loss, self.conditioning = self._losses[config.reduction], conditioning.make(config, num_tasks)
        self.outputs = self.loss.outputs * (self.choices or 1)
        heads, members = self.conditioning.heads, config.members
        inputs = observation_size + action_size + self.conditioning.columns
        stages = bodies.make(config.body, config.width, config.depth, heads * self.outputs)
        reads = shapes_of(stages, inputs)[f"{stages[-1].name}.kernel"][0]
        with nullcontext() if device is None else torch.device(device):
            each = [_orthogonal((members, reads, self.outputs), GAIN, generator) for _ in range(heads)]
            self.body = Body(stages, inputs, members=members, head=torch.cat(each, -1), generator=generator)
            self._first = f"{next(stage.name for stage in stages if stage.product)}.kernel"
            self.register_buffer("atoms", self.loss.support(None, None))
            table = self.conditioning.table(generator)
        self.embedding = nn.Parameter(table) if table is not None and self.conditioning.trained else None
        fixed = None if self.conditioning.trained else table
        self.register_buffer("task_columns", fixed, persistent=False)
        if dtype is not None:
            self.to(dtype)

    @property
    def table(self) -> Tensor | None:
        """What goes into the inputs for each task, [T, columns], where anything does."""
        return self.task_columns if self.embedding is None else self.embedding

    @property
    def embedding_norm(self) -> str:
        """How rows of the embedding are normalized; that of the config."""
        return self.config.embedding_norm

    @torch.no_grad()
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw first weights anew, in place: those of a new critic with this generator."""
        place = self.body.parameter(self._first).device
        size = self.sizes["actions"] if self.choices is None else Discrete(self.choices)
        drawn_on = place if generator is None else generator.device
        sizes = self.sizes["observations"], size, self.num_tasks
        new = Critic(*sizes, self.config, generator, device=drawn_on)
        for mine, value in zip(self.parameters(), new.parameters(), strict=True):
            mine.copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Of `to`, `double`, `to_empty` and their like. Atoms are evenly spaced in any dtype, in float32 or
        more."""
        columns = self.task_columns
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.atoms is not None:
            dtype = torch.promote_types(self.atoms.dtype, torch.float32)
            self.atoms = self.loss.support(self.atoms.device, dtype)
        if columns is not None and self.task_columns is not None:
            self.task_columns = self._columns(columns).to(self.task_columns)
        return self

    def _columns(self, columns: Tensor) -> Tensor:
        """These columns of tasks, which are no parameter; made anew where they have no numbers."""
        made = self.conditioning.table(None) if columns.is_meta else columns
        assert made is not None
        return made

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Weights of another support are refused before any is taken; older ones do not say theirs."""
        name = f"{prefix}atoms"
        if self.atoms is None:
            if name in state_dict:
                raise RuntimeError(f"{name}: they are of a distribution, and this critic's loss is mse")
        else:
            theirs = state_dict.get(name)
            if theirs is not None and not self.fits(theirs):
                low, high = self.config.support
                mine = f"{len(self.atoms)} from {low:g} to {high:g}"
                told = f"{theirs.numel()}"
                if theirs.numel():
                    told += f" from {theirs.min():g} to {theirs.max():g}"
                raise RuntimeError(
                    f"{name}: these weights have another support (v_min, v_max, num_atoms, ends), {told}, "
                    f"and this critic has {mine}"
                )
            state_dict = {**state_dict, name: self.atoms}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = [x for key, x in state_dict.items() if key.startswith(prefix) and not x.is_meta]
        if local_metadata.get("assign_to_params_buffers") and own:  # which replaces what is on meta
            place, dtype = own[0].device, torch.promote_types(own[0].dtype, torch.float32)
            if self.atoms is not None and self.atoms.is_meta:
                self.atoms = self.loss.support(place, dtype)
            if self.task_columns is not None and self.task_columns.is_meta:
                self.task_columns = self._columns(self.task_columns).to(place, own[0].dtype)

    def fits(self, atoms: Tensor) -> bool:
        """Whether these atoms, of a state, are this critic's."""
        if self.atoms is None or atoms.shape != self.atoms.shape:
            return False
        low, high = self.config.support
        wanted = torch.tensor([low, high], dtype=torch.float64)
        ends = atoms.detach()[[0, -1]].cpu().double()
        return bool(((ends - wanted).abs() <= 1e-5 * max(abs(low), abs(high))).all())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled, the critic of a BRC has no gaps between its parameters any more; and a copy of one in a
        DistributedDataParallel is in none."""
        super().__setstate__({**state, "_wrapped": False})  # type: ignore[no-untyped-call]
        for p in self.parameters():
            p.data = p.data.contiguous()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Sequence[str]:
        """What DistributedDataParallel asks of a module that it wraps; nothing else does."""
        self._wrapped = True
        return self._ignored

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Sequence[str]) -> None:
        self._ignored = names

    def _require_hooks(self) -> None:
        """RuntimeError where DistributedDataParallel has this critic, but is not told of a backward pass."""
        if not self._wrapped or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or DistributedDataParallel._active_ddp_module is not None:
            return
        if any(p.requires_grad for p in self.parameters()):
            raise RuntimeError(
                "gradients of this critic would not be averaged over processes: call the module around it, "
                'ddp(observations, actions, mode="bellman_loss", ...), or take frozen=True or torch.no_grad()'
            )

    def forward(
        self,
        observations: Tensor,
        actions: Tensor | None = None,
        task_ids: Tensor | None = None,
        frozen: bool = False,
        *,
        mode: Mode = "logits",
        **given: Any,
    ) -> Tensor:
        """Logits [E, ..., K]; of each of N discrete actions, where they are not given, [E, ..., N, K].

        Args:
            frozen: parameters get no gradient; the inputs still do.
            mode: "logits", or the method that the call stands for, "values", "features", "bellman_loss" or
                "regression_loss", whose other arguments are given by name.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not frozen:
            self._require_hooks()
        rows = observations.shape[:-1]
        x, chosen, ids = self._inputs(observations, actions, task_ids, frozen)
        if mode == "features":
            return self._unflat(self.body.features(x), rows)
        out = self._chosen(self.body(x, frozen), chosen, ids)
        if mode == "bellman_loss":
            return self._bellman_loss(out, rows, task_ids, **given)
        if mode == "regression_loss":
            return self._regression_loss(out, rows, **given)
        return self._unflat(self.loss.values(out, self.atoms) if mode == "values" else out, rows)

    def _inputs(
        self, observations: Tensor, actions: Tensor | None, task_ids: Tensor | None, frozen: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Inputs [B, I] of the networks, discrete actions [B] where they are given, and task ids [B]."""
        size, like = self.sizes["observations"], self.body.parameter(self._first)
        if observations.shape[-1:] != (size,):
            raise ValueError(f"observations must have shape [..., {size}], got {list(observations.shape)}")
        if like.is_meta and not observations.is_meta:
            raise RuntimeError(
                "this critic is on meta, without numbers: critic.to_empty(device=...) and then "
                "critic.reset_parameters(), or critic.load_state_dict(..., assign=True)"
            )
        kind = observations.device.type
        cast = kind != "meta" and torch.is_autocast_enabled(kind)
        if observations.dtype != like.dtype and not (cast and observations.is_floating_point()):
            raise TypeError(
                f"observations must be {like.dtype}, like the critic's parameters, got {observations.dtype}: "
                f"give observations.to({like.dtype})"
            )
        rows = observations.shape[:-1]
        discrete = self.choices is not None
        width = self.sizes["actions"]
        if discrete:
            if actions is not None and (actions.shape != rows or actions.is_floating_point()):
                told = f"{list(actions.shape)} of {actions.dtype}"
                raise ValueError(f"actions must be integers [...] = {list(rows)} of observations, got {told}")
        elif actions is None and width:
            raise ValueError(f"actions must have shape [..., {width}], got None")
        elif actions is not None and actions.shape != (*rows, width):
            wanted = f"[..., {width}] = {[*rows, width]}, the leading axes those of observations"
            raise ValueError(f"actions must have shape {wanted}, got {list(actions.shape)}")
        if task_ids is not None and self.num_tasks > 1:
            if task_ids.shape != rows:
                raise ValueError(f"task_ids must have shape [...] = {list(rows)}, got {list(task_ids.shape)}")
            if self.conditioning.heads > 1:
                check_ids(task_ids, self.num_tasks)
        if len(rows) != 1:
            observations = observations.reshape(-1, size) if rows else observations.unsqueeze(0)
            flat = (-1,) if discrete else (-1, width)
            actions = None if actions is None else actions.reshape(flat)
            task_ids = None if task_ids is None else task_ids.reshape(-1)
        moves = None if discrete or not width else actions
        table = self.table.detach() if frozen and self.table is not None else self.table
        x = kernels.pack_inputs(observations, moves, table, task_ids, self.embedding_norm)
        return x, actions if discrete else None, task_ids

    def _chosen(self, out: Tensor, actions: Tensor | None, task_ids: Tensor | None) -> Tensor:
        """Outputs of each row's task and action [E, B, K]; of all discrete ones [E, B, N, K]."""
        out = self.conditioning.choose(out, task_ids, self.outputs)
        if self.choices is None:
            return out
        out = out.reshape(*out.shape[:-1], self.choices, self.loss.outputs)
        if actions is None:
            return out
        check_ids(actions, self.choices, "actions", "N")
        places = actions.long()[None, :, None, None].expand(len(out), -1, 1, out.shape[-1])
        return out.gather(2, places).squeeze(2)

    @staticmethod
    def _unflat(out: Tensor, rows: torch.Size) -> Tensor:
        """[E, B, ...] with the leading axes of the observations."""
        return out if len(rows) == 1 else out.reshape(len(out), *rows, *out.shape[2:])

    def features(
        self, observations: Tensor, actions: Tensor | None = None, task_ids: Tensor | None = None
    ) -> Tensor:
        """What the output layer multiplies, [E, ..., H], with gradients; by plain PyTorch."""
        return self(observations, actions, task_ids, mode="features")  # type: ignore[no-any-return]

    def values(
        self,
        observations: Tensor,
        actions: Tensor | None = None,
        task_ids: Tensor | None = None,
        frozen: bool = False,
    ) -> Tensor:
        """Q [E, ...], the mean of each member's distribution, in units of the scaled return; of discrete
        actions that are not given [E, ..., N]. `frozen`, for the loss of an actor: gradients reach the
        actions and no parameter."""
        return self(observations, actions, task_ids, frozen, mode="values")  # type: ignore[no-any-return]

    def bellman_loss(
        self,
        target_critic: Critic | Callable[..., Tensor] | None,
        observations: Tensor,
        actions: Tensor | None,
        rewards: Tensor,
        discounts: Tensor,
        next_observations: Tensor | None = None,
        next_actions: Tensor | None = None,
        *,
        next_logits: Tensor | None = None,
        next_log_probs: Tensor | None = None,
        temperature: Tensor | float = 0.0,
        task_ids: Tensor | None = None,
        target: Reduction | None = None,
    ) -> Tensor:
        """Losses [E, ...] of each member at each row, against the target's distribution of the return.

            y = r + discount (Z'(s', a') - temperature log pi(a'|s')),   cross-entropy of its projection

        Z' are the target's members, which get no gradient; with the loss "mse" they are their values, and the
        loss the squared error. `.mean(-1).sum()` is the loss of BRC.

        Args:
            target_critic: a critic of the same sizes, as copy.deepcopy gives it; see `soft_update_`. None
                with next_logits.
            observations, next_observations: [..., O]. actions: [..., A], taken. next_actions: [..., A], of
                the policy at the next observations.
            rewards: [...] or [..., 1], scaled so that returns stay within the support.
            discounts: as rewards, the discount, and 0 where the episode ended in a terminal state.
            next_logits: [E', ..., K], what the target puts out there, in place of target_critic,
                next_observations and next_actions.
            next_log_probs: as rewards, of the next actions, for soft agents (SAC); zeros by default.
            temperature: alpha, a number or a tensor of one; without next_log_probs it has no effect.
            task_ids: [...], with several tasks.
            target: which of its members: "mean" of their distributions (BRC), "min" for that with the lowest
                value (the clipped double Q of TD3, SAC and FastTD3), or "own" for each its own; that of
                config.reduction by default.
        Raises:
            ValueError for shapes, or a target's support, that do not fit; TypeError for a number in the place
            of a tensor.
        """
        return self(  # type: ignore[no-any-return]
            observations,
            actions,
            task_ids,
            mode="bellman_loss",
            target_critic=target_critic,
            rewards=rewards,
            discounts=discounts,
            next_observations=next_observations,
            next_actions=next_actions,
            next_logits=next_logits,
            next_log_probs=next_log_probs,
            temperature=temperature,
            target=target,
        )

    def _bellman_loss(
        self,
        out: Tensor,
        rows: torch.Size,
        task_ids: Tensor | None,
        *,
        rewards: Tensor,
        discounts: Tensor,
        target: Reduction | None = None,
        **given: Any,
    ) -> Tensor:
        self._require_chosen(out)
        loss = self._towards(target)
        next_out, backup = self._next(rows, rewards, discounts, task_ids, loss, **given)
        return self._unflat(loss.bellman(out, next_out, backup, self.atoms), rows)

    def _towards(self, target: Reduction | None) -> losses.CriticLoss:
        """The loss with this reduction of the target's members."""
        if target is None:
            return self.loss
        if target not in self._losses:
            known = ", ".join(self._losses)
            raise ValueError(f"target must be one of {known}, got {target!r}; the target critic comes first")
        return self._losses[target]

    def _require_chosen(self, out: Tensor) -> None:
        if out.dim() > 3:
            raise ValueError(f"actions must be integers [...], one of {self.choices} each, got None")

    def _next(
        self,
        rows: torch.Size,
        rewards: Tensor,
        discounts: Tensor,
        task_ids: Tensor | None,
        loss: losses.CriticLoss,
        *,
        target_critic: Critic | Callable[..., Tensor] | None = None,
        next_observations: Tensor | None = None,
        next_actions: Tensor | None = None,
        next_logits: Tensor | None = None,
        next_log_probs: Tensor | None = None,
        temperature: Tensor | float = 0.0,
    ) -> tuple[Tensor, losses.Backup]:
        """What the target puts out [E', B, K], and the backup of B rows."""
        if (target_critic is None) == (next_logits is None):
            raise ValueError("give target_critic or next_logits, and not both")
        if isinstance(target_critic, Critic):
            own, other = ((c.config.loss, c.loss.outputs, *c.config.support) for c in (self, target_critic))
            if own != other:
                told = "the (loss, num_atoms, v_min, v_max) of this critic"
                raise ValueError(f"target must have {told}, {own}, got {other}")
        for name, x in (("rewards", rewards), ("discounts", discounts)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor [B], got {type(x).__name__}")
        if next_log_probs is None:
            next_log_probs = torch.zeros_like(rewards)
        vectors = (
            _flat("rewards", rewards, rows),
            _flat("discounts", discounts, rows),
            _flat("next_log_probs", next_log_probs, rows),
        )
        if next_logits is None:
            assert target_critic is not None
            if next_observations is None:
                raise ValueError("next_observations are needed with target_critic, got None")
            with torch.no_grad():
                next_logits = target_critic(next_observations, next_actions, task_ids)
        elif next_observations is not None or next_actions is not None:
            raise ValueError("next_observations and next_actions have no use beside next_logits")
        outputs = loss.outputs
        if next_logits.dim() != len(rows) + 2 or next_logits.shape[1:] != (*rows, outputs):
            wanted = f"[E, {', '.join(map(str, (*rows, outputs)))}]"
            raise ValueError(f"next_logits must have shape {wanted}, got {list(next_logits.shape)}")
        members = len(next_logits)
        if getattr(loss, "reduction", None) == "own" and members != self.config.members:
            told = f"{self.config.members} members, one for each of this critic's"
            raise ValueError(f'with target "own" next_logits must have {told}, got {members}')
        next_logits = next_logits.detach().reshape(members, rows.numel(), outputs)
        return next_logits, losses.Backup(*vectors, temperature)

    @torch.no_grad()
    def clipped_share(
        self,
        target_critic: Critic | Callable[..., Tensor] | None,
        rewards: Tensor,
        discounts: Tensor,
        next_observations: Tensor | None = None,
        next_actions: Tensor | None = None,
        *,
        next_logits: Tensor | None = None,
        next_log_probs: Tensor | None = None,
        temperature: Tensor | float = 0.0,
        task_ids: Tensor | None = None,
        target: Reduction | None = None,
    ) -> Tensor:
        """Share [...] of the target's mass that the support's ends clip, in [0, 1]; [E, ...] with "own".

        Arguments are those of `bellman_loss`. Where the mean over a batch is more than a few percent, values
        are wrong: divide rewards by more, raise v_max, or begin with a smaller temperature, whose bonus is a
        part of the return.
        """
        loss = self._towards(target)
        if not isinstance(loss, losses.Categorical) or self.atoms is None:
            raise ValueError(f"a share is clipped by a support, and loss {self.config.loss} has none")
        rows = rewards.shape
        if next_logits is not None:
            rows = next_logits.shape[1:-1]
        elif next_observations is not None:
            rows = next_observations.shape[:-1]
        given = {
            "target_critic": target_critic,
            "next_observations": next_observations,
            "next_actions": next_actions,
            "next_logits": next_logits,
            "next_log_probs": next_log_probs,
            "temperature": temperature,
        }
        next_out, backup = self._next(rows, rewards, discounts, task_ids, loss, **given)  # type: ignore[arg-type]
        share = loss.clipped_share(next_out, backup, self.atoms)
        return share.reshape(rows) if share.dim() == 1 else share.reshape(len(share), *rows)

    def regression_loss(
        self,
        observations: Tensor,
        actions: Tensor | None,
        values: Tensor,
        encoding: Literal["two_hot", "hl_gauss"] | None = None,
        *,
        sigma: float | None = None,
        task_ids: Tensor | None = None,
    ) -> Tensor:
        """Losses [E, ...] towards scalar targets that somebody else has made: n-step returns, GAE, V-trace.

            two_hot   cross-entropy of mass on the two atoms around the value
            hl_gauss  of a normal around it: its mass in the bin of each atom, over that in all bins

        The value is clipped to the support. With `CriticConfig(ends="atoms")` the outermost atoms lie on
        v_min and v_max, as in C51 and MuZero, and bins reach half a bin beyond; with "edges" the outermost
        edges of bins do, and atoms are in the middle of bins, as in the listing of hl_gauss's paper.

        Args:
            values: [...] or [..., 1], or of each member [E, ...]; they get no gradient.
            encoding: two_hot by default; with the loss "mse" None, and the loss is the squared error.
            sigma: of hl_gauss, in units of the scaled return; 0.75 bins by default.
            observations, actions, task_ids: as in `bellman_loss`.
        Raises:
            ValueError for shapes or numbers that do not fit.
        Source: Farebrother et al. 2024, arXiv:2403.03950.
        """
        return self(  # type: ignore[no-any-return]
            observations,
            actions,
            task_ids,
            mode="regression_loss",
            values=values,
            encoding=encoding,
            sigma=sigma,
        )

    def _regression_loss(
        self,
        out: Tensor,
        rows: torch.Size,
        *,
        values: Tensor,
        encoding: str | None = None,
        sigma: float | None = None,
    ) -> Tensor:
        self._require_chosen(out)
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a tensor [...], got {type(values).__name__}")
        if values.shape == (len(out), *rows) and values.shape != (*rows, 1):
            values = values.reshape(out.shape[:2])
        else:
            values = _flat("values", values, rows)
        return self._unflat(self.loss.regression(out, values.detach(), self.atoms, encoding, sigma), rows)

    @torch.no_grad()
    def soft_update_(self, online: Critic, tau: float) -> None:
        """Move every parameter of this target: `p += tau * (online p - p)`; tau in [0, 1], 0.005 in BRC."""
        if not 0.0 <= tau <= 1.0:
            raise ValueError(f"tau must be in [0, 1], got {tau}")
        torch._foreach_lerp_(list(self.parameters()), list(online.parameters()), tau)


def _flat(name: str, x: Tensor, rows: torch.Size) -> Tensor:
    """One number for each of these rows, as [B]; a last axis of one is none."""
    if x.shape not in (rows, (*rows, 1)):
        wanted = f"[...] = {list(rows)} or [..., 1]"
        raise ValueError(f"{name} must have shape {wanted}, got {list(x.shape)}")
    return x if len(rows) == 1 and x.dim() == 1 else x.reshape(rows.numel())


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
