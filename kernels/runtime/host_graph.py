"""What a CUDA graph is on a GPU, for a CPU: the operations of a call, which run again without Python between
them. The compiled passes are called one after the other; what torch does comes in its turn.

Host code is not run again: the function must do the same operations at every call, in memory that stays.
Compiled passes read their numbers where they lie, and see new ones; `unfit` tells of those that Python reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .dispatch import transparent
from .native import compiled, noted

__all__ = ["HostGraph"]

# They give Python a number, or results of a size that depends on numbers.
READS_A_NUMBER = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
    *("nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
TO_THE_HOST = {"tolist", "numpy", "__array__", "__dlpack__"}  # no operations, but methods
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class HostGraph:
    """The operations of one call of a function, which is made here.

    Args:
        function: see above.
    Attributes:
        out: what it returned, overwritten by every replay. unfit: why there can be none, else None.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self._tape, self._changed = compiled.Tape(), list[Tensor]()
        recorder = _Recorder(self._tape)
        noted.tensors = self._changed
        try:
            with transparent(), recorder, _Calls(recorder):
                compiled.record(self._tape)
                self.out = function()
        finally:
            compiled.record(None)
            noted.tensors = None
        self._kept, self.unfit = recorder.kept, recorder.unfit  # kept, so that no address is used twice

    def replay(self) -> None:
        """Do the operations again."""
        with torch.no_grad():
            self._tape.replay()
        torch.autograd.graph.increment_version(self._changed)


class _Calls(TorchFunctionMode):
    """Tells of methods that hand numbers to the host."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in TO_THE_HOST:
            self.recorder.unfit = f"{name} reads numbers of a tensor, which no replay would do"
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts what torch does on the tape, where the compiled passes put themselves."""

    def __init__(self, tape: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape, self.kept = tape, list[Tensor]()
        self.unfit: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: to have torch.compile skip this, torch would import all of it, for a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        if name in READS_A_NUMBER or (name.startswith("index") and _masks(args)):
            self.unfit = f"{name} reads a number of a tensor, which no replay would do"
        compiled.record(None)  # an op of ours is done again as a whole
        try:
            out = func(*args, **kwargs)
        finally:
            compiled.record(self.tape)
        results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        given = {memory(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        made = [x for x in results if memory(x) not in given]
        self.kept += results
        if name == "lift_fresh":  # torch.tensor(..): no operation made it
            self.tape.append(partial(out.copy_, out.clone()))
        elif func._schema.is_mutable and not made:
            self.tape.append(partial(func, *args, **kwargs))
        elif made and name not in ALLOCATES:
            self.tape.append(_into(func, args, kwargs, results, made))
        return out


def memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _masks(args: Any) -> bool:
    """Whether an index is a mask."""
    given = [x for x in tree_flatten(args[1:2])[0] if isinstance(x, Tensor)]
    return any(x.dtype in (torch.bool, torch.uint8) for x in given)


def _into(
    func: Any, args: Any, kwargs: Any, results: list[Tensor], made: list[Tensor]
) -> Callable[[], object]:
    """The operation once more, into the memory of its results: by its variant for that, where it has one."""
    packet = func._overloadpacket
    for name in packet.overloads() if len(results) == 1 and not func._schema.is_mutable else ():
        other = getattr(packet, name)
        if _same_but_out(func._schema, other._schema):
            return partial(other, *args, **kwargs, out=results[0])

    def again() -> None:
        values = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
        for old, new in zip(results, values, strict=True):
            if any(old is x for x in made):
                old.copy_(new)

    return again


def _same_but_out(schema: Any, other: Any) -> bool:
    last = other.arguments[-1] if other.arguments else None
    if last is None or not last.is_out or last.name != "out":
        return False
    given, taken = (
        [(a.name, str(a.type)) for a in arguments] for arguments in (schema.arguments, other.arguments)
    )
    return taken[:-1] == given
