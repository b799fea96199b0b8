"""Parameters of stacked networks as rows of flat buffers.

One row is one network: the online critic's members, then their targets. All that an optimizer touches is
therefore contiguous, a pass over online and target networks together is a pass over one stack, and a
network's gradient is one piece of memory. Modules keep their names and shapes: their parameters are views.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from brc_fast.kernels.runtime.dispatch import takes_kernels
from brc_fast.kernels.stages import Stages

from .layout import BODY, Layout

MARKS = (id, Tensor.data_ptr, Tensor.stride, attrgetter("_version", "requires_grad"))
GONE = "{} is no parameter of its module any more, but it is trained: put it back, or make a new agent"


class _Refresh:
    """Called when a module was loaded. A copied or unpickled module owns its parameters: nothing to renew,
    nor where the module outlives the buffers' owner."""

    def __init__(self, networks: FlatNetworks | None = None) -> None:
        self.networks = None if networks is None else weakref.ref(networks)  # which hold the module

    def __call__(self, *_: object) -> None:
        networks = None if self.networks is None else self.networks()
        if networks is not None:
            networks.refresh()

    def __reduce__(self) -> tuple[type[_Refresh], tuple[()]]:
        return _Refresh, ()


class FlatNetworks:
    """E networks of one module, and as many of each copy of it, in buffers [C * E, P].

    Args:
        modules: the module that learns, then its copies (a target). Each has its stacked networks in `body`
            (nn.modules.Body); what else it owns, which all its networks share, lies in the row of the first.
            They must have their device and dtype: moving them later would leave the buffers behind.
        low: the dtype of copies for matrix products and of gradients; None for that of the parameters.

    Attributes:
        master: [C * E, P], what the modules' parameters are views of. low: its copy, or None.
        grad: [E, P], gradients of the first module's networks; what is padding stays zero everywhere.
    """

    def __init__(self, modules: Sequence[nn.Module], low: torch.dtype | None = None) -> None:
        online = modules[0]
        parameters = dict(online.named_parameters())
        like = next(iter(parameters.values())).detach()
        body, self.members = getattr(online, "body", None), 1
        stages: Stages = ()
        inputs = 0
        if body is not None:
            stages, inputs, self.members = body.stages, body.inputs, body.members
        self._names = list(parameters)
        shared = {name: tuple(p.shape) for name, p in parameters.items() if not name.startswith(BODY)}
        self.layout = Layout(stages, inputs, shared)
        self.master = like.new_zeros(len(modules) * self.members, self.layout.size)
        self._modules = tuple(modules)
        self._find()
        self._take_over()
        self._seen, self._address = self._marks(), self.master.data_ptr()
        self.low = None if low is None else self.master.to(low)
        self.grad = self.master.new_zeros(self.members, self.layout.size, dtype=low)
        for module in modules:
            module.register_load_state_dict_post_hook(_Refresh(self))  # type: ignore[no-untyped-call]

    def _find(self) -> None:
        """Look up who holds each parameter, and every module on the way there."""
        owners = []
        for module in self._modules:
            for name in self._names:
                place, _, own = name.rpartition(".")
                try:
                    owners.append((module.get_submodule(place), own, name))
                except AttributeError:
                    raise RuntimeError(GONE.format(name)) from None
        self._owners = owners
        # as columns: they are looked through at every update
        self._held_by = [owner._parameters for owner, _, _ in owners], [own for _, own, _ in owners]
        parents = [parent for module in self._modules for parent in module.modules()]
        links = [(parent._modules, *link) for parent in parents for link in parent._modules.items()]
        self._links = tuple(zip(*links, strict=True)) or ((), (), ())

    def _held(self) -> list[nn.Parameter]:
        """The parameters of all modules in order; RuntimeError, by name, for one that is gone or shared."""
        names: dict[nn.Parameter, str] = {}
        for owner, own, name in self._owners:
            p = owner._parameters.get(own)
            if p is None:
                raise RuntimeError(GONE.format(name))
            if p in names:
                raise RuntimeError(f"{name} is the same parameter as {names[p]}: each needs its own")
            names[p] = name
        return list(names)

    def _take_over(self) -> None:
        """Make every parameter a view, also one that a load with assign=True has just put in place."""
        held = self._held()
        rows = self.master.view(len(self._modules), self.members, -1)
        views = [view for own in rows for view in self.named(own).values()]
        memory, moved = self.master.untyped_storage().data_ptr(), []
        for (owner, own, name), p, view in zip(self._owners, held, views, strict=True):
            if p.shape != view.shape:
                raise RuntimeError(f"{name} must have shape {list(view.shape)}, got {list(p.shape)}")
            if p.is_meta or (p.data_ptr(), p.stride()) != (view.data_ptr(), view.stride()):
                value = p.detach()
                if value.untyped_storage().data_ptr() == memory:  # that of another, which may come first
                    value = value.clone()
                moved.append((owner, own, p, view, value))
        with torch.inference_mode(False):
            for owner, own, p, view, value in moved:
                view.copy_(value)
                if p.is_inference():  # nothing else takes other memory
                    p = owner._parameters[own] = nn.Parameter(view.new_empty(0), p.requires_grad)
                p.data = view

    def _marks(self) -> list[tuple[object, ...]] | None:
        """What of the parameters tells that one was put elsewhere, changed or frozen, mark by mark. None
        where one is gone, or was put there in inference mode, which counts no versions."""
        held: list[Any] = list(map(dict.get, *self._held_by))
        try:
            return [tuple(map(mark, held)) for mark in MARKS]
        except (AttributeError, TypeError, RuntimeError):
            return None

    def touched(self) -> bool:
        """Whether there is something to `follow`."""
        places, names, children = self._links
        kept = all(map(is_, map(dict.get, places, names), children))
        marks = self._marks()
        return not kept or self.master.data_ptr() != self._address or marks is None or marks != self._seen

    def follow(self) -> bool:
        """Take in what was done to parameters by hand: new values, also in memory or modules of their own.

        What is written through `.data` leaves no mark: low-precision copies show it after `refresh` or a step
        of the optimizer.

        Returns:
            Whether the buffer itself has moved (share_memory): addresses in it are to be asked for anew.
        Raises:
            RuntimeError, by name, for a parameter that is gone, frozen, shared with another, or of another
            shape, dtype or device.
        """
        self._find()
        for index, ((_, _, name), p) in enumerate(zip(self._owners, self._held(), strict=True)):
            if (p.dtype, p.device) != (self.master.dtype, self.master.device):
                told = f"{self.master.dtype} on {self.master.device}, got {p.dtype} on {p.device}"
                raise RuntimeError(f"{name} must stay {told}: make the agent with another dtype or device")
            if not p.requires_grad and index < len(self._names):
                told = "but all parameters are trained together: set it to True"
                raise RuntimeError(f"{name} has requires_grad=False, {told}")
        self.refresh()
        moved = self.master.data_ptr() != self._address
        self._seen, self._address = self._marks(), self.master.data_ptr()
        return moved

    def refresh(self) -> None:
        """Renew the low-precision copies after parameters were set from outside, and the padding, to which
        a gradient that is not finite spreads."""
        self._take_over()
        for view in self.layout.padding(self.master):
            view.zero_()
        if self.low is not None:
            self.low.copy_(self.master)

    def named(self, rows: Tensor) -> dict[str, Tensor]:
        """What rows [E, P] of one module hold, in the order of its parameters."""
        views = self.layout.views(rows)
        return {name: views[name] for name in self._names}

    def body(self, modules: int) -> dict[str, Tensor]:
        """Parameters for a `kernels.Plan` over the networks of the first modules: what products take from the
        low-precision copy where there is one, the rest from the master. Products on a CPU take their biases
        in float32."""
        rows = slice(modules * self.members)
        out = self.layout.body(self.master[rows])
        if self.low is not None:
            low, biases = self.layout.body(self.low[rows]), takes_kernels(None, self.low)
            out |= {name: low[name] for name in self.layout.multiplied if biases or low[name].dim() == 3}
        return out

    def gradients(self) -> dict[str, Tensor]:
        """Those of the first module's body, for a `kernels.Plan`."""
        return self.layout.body(self.grad)
