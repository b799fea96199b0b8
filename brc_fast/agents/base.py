"""What every agent has beside its updates: state, what was done to its parameters by hand, metrics.

An agent makes its networks and optimizers, names them in `parts`, and calls `ready` at the end of its
`__init__`.
"""

from __future__ import annotations

import dataclasses
import weakref
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Generator, Tensor, nn

from brc_fast import kernels
from brc_fast.config import ActorConfig, CriticConfig, LearningConfig, Precision
from brc_fast.learner.finite import FirstBad, require_finite
from brc_fast.learner.flat import FlatNetworks
from brc_fast.learner.graphs import OFF, Captured
from brc_fast.learner.optimizer import FIXED, FlatAdamW
from brc_fast.learner.precision import products
from brc_fast.nn.inputs import ObservationStatistics

Metrics = dict[str, Tensor]
SETTINGS = {
    field.name: config.__name__
    for config in (ActorConfig, CriticConfig, LearningConfig)
    for field in dataclasses.fields(config)
}


ATOMS = "/atoms"  # what the state of a categorical critic calls its support
LARGEST_GENERATOR = 2**14  # bytes of the state of one, on any device; torch's on a CPU has 5056


class KindOf(Protocol):
    """Of an array in a file: its dtype's name and its shape."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def require_generator(state: Tensor) -> None:
    """ValueError for a state of a CPU's generator whose next draw would read past its 624 words: torch looks
    at how many are left and which is next, but not at whether they agree."""
    if state.numel() != 5056:
        return
    left, following = int(state[8:12].view(torch.int32)), int(state[16:24].view(torch.int64))
    if left + following != 625 and (left, following) != (1, 0):
        raise ValueError(f"agent state generator has {left} words left and takes number {following} of 624")


class TemperatureStep(NamedTuple):
    """What a step of the temperature is made of."""

    target_entropy: float  # nats
    gradient: Tensor  # [1], receives that of log alpha
    adam: kernels.reference.ScalarAdam


def memory_of(part: nn.Module | FlatAdamW | ObservationStatistics) -> list[Tensor]:
    """Tensors at whose addresses an update works, but for parameters of modules."""
    if isinstance(part, nn.Module):
        return list(part.buffers())
    held = vars(part.networks) | vars(part) if isinstance(part, FlatAdamW) else vars(part)
    return [x for x in held.values() if isinstance(x, Tensor)]


class Agent:
    """An agent whose U updates of a call are one program: on CUDA a graph.

    Once made, its settings are fixed; learning rates and tau are tensors of its optimizers, and may be set at
    any time: `agent.actor_optimizer.learning_rate = 1e-4`.

    Attributes:
        METRICS: names of what an update measures. FOLLOWED: attributes that are looked at in every update.
    """

    METRICS: ClassVar[tuple[str, ...]]
    FOLLOWED: ClassVar[tuple[str, ...]] = ()

    device: str
    dtype: torch.dtype
    precision: Precision
    learning: LearningConfig
    generator: Generator
    updates: Captured
    first_bad: FirstBad
    critic_optimizer: FlatAdamW  # whose steps are the updates

    def parts(self) -> dict[str, nn.Module | FlatAdamW | ObservationStatistics]:
        """Networks, optimizers and statistics by name: what state is kept of; modules are trained."""
        raise NotImplementedError

    def make_updates(self, *inputs: Tensor) -> Tensor:
        """The updates of one call, from tensors alone; metrics in the order of METRICS. It keeps to what a
        CUDA graph can hold."""
        raise NotImplementedError

    def forget_plans(self) -> None:
        """Parameters have moved: what holds addresses of theirs is to be made anew."""
        raise NotImplementedError

    def ready(self, graphs: bool) -> None:
        self.first_bad = FirstBad(self.METRICS, torch.empty(0, device=self.device, dtype=self.dtype))
        self._trained = {name: part for name, part in self.parts().items() if isinstance(part, nn.Module)}
        updates = weakref.WeakMethod(self.make_updates)  # so that the agent dies with its last reference

        def function(*inputs: Tensor) -> Tensor:
            mine = updates()
            if mine is None:
                raise RuntimeError("the agent of these updates is gone: hold it while they are made")
            return mine(*inputs)

        self.updates = Captured(
            function, self.device, [self.generator], enabled=graphs, alive=lambda: updates() is not None
        )
        parts = [x for part in self.parts().values() for x in memory_of(part)]
        self._memory = [self.first_bad.since, *parts]
        self._places = self._places_now()
        self._fixed = frozenset(vars(self)) - {*self.FOLLOWED, "updates"}

    def __setattr__(self, name: str, value: object) -> None:
        """What the agent was made with is fixed: a CUDA graph has it, and would not see another value."""
        fixed = vars(self).get("_fixed", frozenset[str]())
        if name in fixed and not name.startswith("_"):
            raise AttributeError(f"{name} {FIXED}: make another one and load this one's state_dict() into it")
        if fixed and name in ("learning_rate", "tau"):
            raise AttributeError(f"{name} is set on an optimizer: agent.critic_optimizer.{name} = {value}")
        if fixed and name in SETTINGS:
            raise AttributeError(f"{name} is a setting of {SETTINGS[name]}, which {FIXED}")
        super().__setattr__(name, value)

    def optimizer(
        self, networks: FlatNetworks, beta1: float, weight_decay: float, tau: float | None = None
    ) -> FlatAdamW:
        return FlatAdamW(
            networks,
            learning_rate=self.learning.learning_rate,
            betas=(beta1, self.learning.beta2),
            eps=self.learning.eps,
            weight_decay=weight_decay,
            tau=tau,
        )

    def run(self, inputs: Sequence[Tensor], noise: Sequence[Tensor] | None = None) -> Metrics:
        """The updates of one call; on CUDA, where noise is given, without a graph."""
        # memory that is kept must not be of inference mode: nothing outside of that could write it
        with torch.inference_mode(False), torch.no_grad(), products(self.precision, self.device):
            self._follow()
            if noise is None or self.updates.stream is None:
                values = self.updates([*inputs, *(noise or ())])
            else:
                self.updates.join()
                values = self.make_updates(*(x.to(self.device) for x in (*inputs, *noise)))
        return dict(zip(self.METRICS, values.unbind(), strict=True))

    def _follow(self) -> None:
        """Take in what was done by hand since the last update; see `FlatNetworks.follow`."""
        for name, trained in self._trained.items():
            now = getattr(self, name)
            if now is trained:
                continue
            # compiled or wrapped, a module has the same parameters
            if [id(p) for p in now.parameters()] != [id(p) for p in trained.parameters()]:
                raise RuntimeError(f"{name} is not the module that is trained: load its parameters into that")
        moved = False
        for optimizer in self.optimizers().values():
            if optimizer.networks.touched():
                self.updates.join()  # before what it may still read is changed
                moved |= optimizer.networks.follow()
        if moved or self._places_now() != self._places:
            self.updates.join()
            self.updates.forget()
            self.forget_plans()
            self._places = self._places_now()

    def _places_now(self) -> tuple[int, ...]:
        """Addresses of what graphs and plans read and write beside parameters: share_memory moves it."""
        return tuple(map(Tensor.data_ptr, self._memory))

    @torch.no_grad()
    def measure(
        self,
        metrics: Tensor,
        losses: Tensor,
        log_probs: Tensor,
        q_values: Tensor,
        alpha: Tensor,
        temperature: TemperatureStep,
    ) -> None:
        """The metrics of one update, since when one is not finite, and a step of the temperature, in one
        launch.

        Args:
            metrics: [8] in the order of `kernels.reference.METRICS`, with the norms; receives the others.
            losses: [E, B], of the critic. log_probs: [B], of the policy's sample. q_values: [E, B], of it.
            alpha: 0-d, becomes that of the next update.
        """
        kernels.update_summary_(
            metrics,
            losses,
            log_probs,
            q_values,
            alpha,
            target_entropy=temperature.target_entropy,
            gradient=temperature.gradient,
            step=self.critic_optimizer.step_count,
            since=self.first_bad.since,
            adam=temperature.adam,
        )

    def check_finite(self) -> None:
        """FloatingPointError if a loss or a gradient is not finite: which, and since which update.

        This waits for the GPU; every update is looked at all the same.
        """
        self.first_bad.require_finite()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes, by name: parameters, targets, moments, step counts, noise; and the
        support of a categorical critic, which does not, so that another is told."""
        state: dict[str, Tensor] = {"generator": self.generator.get_state()}
        for name, part in self.parts().items():
            state |= {f"{name}/{key}": value for key, value in part.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`; ValueError names the first entry that does not fit.

        From another kind of device comes a generator's state of another size: that seeds the noise anew.
        States of checkpoints in format 2, and those that do not say their support, are taken too.
        """
        state = self._named(state)
        for key, values in state.items():
            require_finite(f"agent state {key}", values)
            if ("/exp_avg_sq/" in key or key.endswith("_optimizer/step")) and (values < 0).any():
                raise ValueError(f"agent state {key} must be 0 or more, got {values.min():g}")
            critic = getattr(self, key.removesuffix(ATOMS), None) if key.endswith(ATOMS) else None
            if critic is not None and not critic.fits(values):
                low, high = critic.config.support
                raise ValueError(
                    f"agent state {key} must go from {low:g} to {high:g}, the support, got {values[0]:g} to "
                    f"{values[-1]:g}: make the agent with the v_min and v_max of the state"
                )
        self._take(state)

    def _named(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state of any format as this version has it; ValueError for entries of other names or shapes, and
        for integers in the place of floats."""
        mine = self.state_dict()
        for name, optimizer in self.optimizers().items():
            state = optimizer.with_named_moments(state, f"{name}/")
        older = {key: value for key, value in mine.items() if key.endswith(ATOMS)}  # do not say their support
        state = {**older, **state}
        for key in sorted(mine.keys() | state.keys()):
            if key not in state or key not in mine:
                told = "lacks" if key in mine else "has an unknown entry"
                raise ValueError(f"agent state {told} {ascii(key)[1:-1]:.80}")
            if key != "generator" and mine[key].shape != state[key].shape:
                raise ValueError(
                    f"agent state {key} must have shape {list(mine[key].shape)}, got {list(state[key].shape)}"
                )
            if mine[key].is_floating_point() != state[key].is_floating_point():
                raise ValueError(f"agent state {key} must be {mine[key].dtype}, got {state[key].dtype}")
        drawn = state["generator"]
        if drawn.dtype != torch.uint8 or drawn.dim() != 1 or drawn.numel() > LARGEST_GENERATOR:
            raise ValueError(
                f"agent state generator must be at most {LARGEST_GENERATOR} of torch.uint8, got "
                f"{list(drawn.shape)} of {drawn.dtype}"
            )
        return state

    def require_kinds(self, kinds: Mapping[str, KindOf]) -> None:
        """ValueError names the first array of a file with this agent's state whose name, dtype or shape is
        not what `state_dict` has."""
        mine = self.state_dict()
        given = {
            name: torch.empty(kind.shape, dtype=getattr(torch, kind.dtype), device="meta")
            for name, kind in kinds.items()
        }
        for name, values in self._named(given).items():
            if values.dtype != mine[name].dtype:
                raise ValueError(f"agent state {name} must be {mine[name].dtype}, got {values.dtype}")

    def _take(self, state: dict[str, Tensor]) -> None:
        """Go on from a state that fits."""
        self.first_bad.clear()
        drawn = state["generator"].cpu()
        if drawn.shape == self.generator.get_state().shape:
            require_generator(drawn)
            try:
                self.generator.set_state(drawn)
            except RuntimeError as error:
                raise ValueError(f"agent state generator is none of a generator: {error}") from error
        else:
            self.generator.manual_seed(zlib.crc32(drawn.numpy().tobytes()))
        for name, part in self.parts().items():
            prefix = f"{name}/"
            part.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )

    def optimizers(self) -> dict[str, FlatAdamW]:
        return {name: part for name, part in self.parts().items() if isinstance(part, FlatAdamW)}

    def settings(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What to call the class with for an agent like this one."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[object, ...]:
        """A copied or unpickled agent has buffers of its own, and goes on from the same state."""
        sizes, settings = self.settings()
        settings["graphs"] = self.updates.reason != OFF
        state = {name: value.clone() for name, value in self.state_dict().items()}
        return self._restored, (sizes, settings, state, self.rates())

    def rates(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Learning rates and tau of the optimizers, which may be set at any time."""
        return {name: (part.learning_rate, part.tau) for name, part in self.optimizers().items()}

    def set_rates(self, rates: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Take those of another agent."""
        for name, optimizer in self.optimizers().items():
            optimizer.learning_rate.copy_(rates[name][0])
            optimizer.tau.copy_(rates[name][1])

    @classmethod
    def _restored(
        cls,
        sizes: tuple[Any, ...],
        settings: dict[str, Any],
        state: dict[str, Tensor],
        rates: dict[str, tuple[Tensor, Tensor]],
    ) -> Self:
        """The inverse of `__reduce__`."""
        agent = cls(*sizes, **settings)
        agent._take(agent._named(state))
        agent.set_rates(rates)
        return agent

    def normal(self, *shape: int) -> Tensor:
        """Standard normals of the agent's own generator."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)
