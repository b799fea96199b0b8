"""What a CUDA graph holds of a call, on any device: its operations in order, which can be run again.

Host code is not run again, so whatever it did is missing from a replay, as it is from a graph's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from brc_fast.kernels.runtime import dispatch

# They wait for the device, or give results of a size that the device decides.
FORBIDDEN = {
    "aten._local_scalar_dense",
    "aten.item",
    "aten.is_nonzero",
    "aten.equal",
    "aten.nonzero",
    "aten.masked_select",
    "aten.unique_dim",
    "aten._unique2",
    "aten.unique_consecutive",
    "aten.unique_dim_consecutive",
    "aten.bincount",
    "aten.allclose",
    "aten._linalg_check_errors",
    "aten.lift_fresh",  # torch.tensor(number): a copy from the host
}
# On a CPU they are no operation, so they are known by their names.
TO_THE_HOST = {"cpu", "numpy", "tolist", "__array__", "__repr__", "__format__"}
ALLOCATIONS = {"aten.new_empty", "aten.empty", "aten.empty_like"}


class _Calls(TorchFunctionMode):
    """AssertionError for calls that would copy to or from another device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        assert name not in TO_THE_HOST, f"{name} waits for the device"
        if name in ("to", "type"):
            places = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, (str, torch.device))]
            assert not places, f"{name} copies between devices: {places[0]}"
        return func(*args, **kwargs)


class Tape(TorchDispatchMode):
    """Records the operations and kernel launches of a block; AssertionError for what no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.seen: list[tuple[Any, ...]] = []  # per operation: its name, numbers, and outer memory
        self.made: dict[int, int] = {}  # memory made inside: how many before it
        self.launches: list[str] = []  # what a GPU would run: kernels of ours, and operations that write
        self.kept: list[Tensor] = []  # so that no address is used twice
        self._inside = False  # of an op of ours, which is run again as a whole

    def __enter__(self) -> Tape:
        self._watch = dispatch.watching(self.launched)
        self._watch.__enter__()
        self._calls = _Calls()
        self._calls.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._calls.__exit__(*exception)
        self._watch.__exit__(*exception)

    def describe(self, x: Any) -> Any:
        """A tensor by its memory, which must be the same in each recording unless it was made inside."""
        if not isinstance(x, Tensor):
            return x if isinstance(x, (int, float, bool, str, torch.dtype, type(None))) else str(type(x))
        memory = x.untyped_storage().data_ptr()
        place = ("made", self.made[memory]) if memory in self.made else ("outer", memory)
        if place[0] == "outer" and self._inside:  # or made inside of an op of ours
            place = ("unknown", 0)
        return *place, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).rsplit(".", 1)[0]
        assert name not in FORBIDDEN, f"{name} waits for the device or reads the host"
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if name in ("aten.index", "aten.index_put", "aten.index_put_"):
            masks = [x for x in tree_flatten(args[1])[0] if x is not None and x.dtype == torch.bool]
            assert not masks, f"{name} with a mask waits for the device"
        device = kwargs.get("device")
        if name == "aten._to_copy" and device is not None:
            assert torch.device(device) == given[0].device, "a copy between devices"
        if name == "aten.repeat_interleave":
            assert kwargs.get("output_size") is not None, f"{name} without output_size waits for the device"
        self.seen.append((name, tree_map(self.describe, (args, kwargs))))
        inside, self._inside = self._inside, True
        out = func(*args, **kwargs)
        self._inside = inside
        if inside:
            return out
        results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        before = {x.untyped_storage().data_ptr() for x in given}
        fresh = [x for x in results if x.untyped_storage().data_ptr() not in before]
        for x in fresh:
            self.made[x.untyped_storage().data_ptr()] = len(self.made)
        self.kept += results
        if fresh or func._schema.is_mutable:

            def again() -> None:
                new = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
                for old, x in zip(results, new, strict=True):
                    if any(old is y for y in fresh):
                        old.copy_(x)

            self.steps.append(again)
            if not name.startswith("brc_fast.") and name not in ALLOCATIONS:
                self.launches.append(name)
        return out

    def launched(self, call: dispatch.Launch) -> None:
        arguments = tuple(self.describe(x) for x in call.arguments)
        self.launches.append(call.kernel.__name__)
        self.seen.append((str(call.kernel), call.grid, arguments, call.constants, call.options))
        if not self._inside:
            self.steps.append(lambda: dispatch.make(call))
        # the interpreter has operations of its own, and copies of its own
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            dispatch.make(call)

    def replay(self) -> None:
        with torch.no_grad():
            for step in self.steps:
                step()
