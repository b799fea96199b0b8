"""What a launch takes for granted and no GPU promises, found in Triton's interpreter.

A GPU runs the programs of a launch in any order and at once, the interpreter one after another from the
first. Here another order is chosen, and every element that a program loads or stores is written down. Of
each launch this tells, whatever the values were:

    race     an element that one program stored and another loaded or stored
    reread   an element that a program stored and then loaded without a barrier between: the threads of a
             program do not see each other's stores
    twice    an element that a program stored twice without a barrier between, or by two lanes of one store
    outside  a store that hits no element of the launch's tensors, or a load outside of their storages (what
             lies in a tensor's gaps may be loaded); what lies outside of the storages is not touched

Lanes that a mask turns off do nothing, so a launch is judged for its inputs alone. Memory is divided into
units, as large as the smallest element of the launch's tensors. Atomics are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from torch import Tensor
from triton.runtime import interpreter

from brc_fast.kernels.runtime import dispatch

Program = tuple[int, int, int]  # its place in the grid
Order = Callable[[list[Program]], list[Program]]


class Fault(NamedTuple):
    """All faults of one kind at one argument of a launch, by the first of them."""

    kind: str
    kernel: str
    argument: str  # that has the element; empty where none has
    element: int  # from the argument's first, as memory lies; the address where no argument has it
    programs: tuple[Program, Program]  # the first and the last that touched it


class Accesses:
    """The loads and stores of one launch, in the order in which they were made."""

    def __init__(self, launch: dispatch.Launch) -> None:
        self.kernel = launch.kernel.__name__
        named = zip(launch.kernel.arg_names, launch.arguments, strict=False)
        self.tensors: dict[str, Tensor] = {name: x for name, x in named if isinstance(x, Tensor)}
        self.unit = min(x.element_size() for x in self.tensors.values())
        self.turns: list[Program] = []  # the program that runs, once more after each of its barriers
        self.units: list[np.ndarray] = []  # per access
        self.notes: list[tuple[int, bool]] = []  # per access: its turn, and whether it stores
        self.outside: list[Fault] = []  # of all storages

    def note(self, pointers: Any, mask: Any, stores: bool) -> Any:
        """Write an access down; returns its mask without what lies outside of all storages."""
        addresses, on = np.broadcast_arrays(pointers.data.astype(np.int64), mask.data.astype(bool))
        size = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        inside = np.zeros(on.shape, bool)
        for x in self.tensors.values():
            storage = x.untyped_storage()
            start = storage.data_ptr()
            inside |= (start <= addresses) & (addresses + size <= start + storage.nbytes())
        for address in addresses[on & ~inside][:1]:
            self.outside.append(Fault("outside", self.kernel, "", int(address), (self.turns[-1],) * 2))
        first = addresses[on & inside] // self.unit
        self.units.append((first[:, None] + np.arange(max(1, size // self.unit))).ravel())
        self.notes.append((len(self.turns) - 1, stores))
        return interpreter.TensorHandle(on & inside, mask.dtype)

    def faults(self) -> list[Fault]:
        """What was wrong with the launch, at most one fault of each kind at each argument."""
        found = self.outside[:1]
        if not any(map(len, self.units)):
            return found
        turn, stored = (
            np.repeat(np.array(of_access), [len(units) for units in self.units])
            for of_access in zip(*self.notes, strict=True)
        )
        unit = np.concatenate(self.units)
        # By unit, then by time: accesses of one turn are neighbours, and so are those of one program.
        order = np.argsort(unit, kind="stable")
        unit, turn, stored = unit[order], turn[order], stored[order]
        program = np.unique(np.array(self.turns), axis=0, return_inverse=True)[1].ravel()[turn]
        first = np.flatnonzero(np.diff(unit, prepend=-1))
        last = np.append(first[1:], len(unit)) - 1
        written = np.logical_or.reduceat(stored, first)
        again = np.flatnonzero((np.diff(unit) == 0) & (np.diff(turn) == 0) & stored[:-1])
        owner = self._owners(unit * self.unit)

        def tell(kind: str, begins: np.ndarray, ends: np.ndarray) -> None:
            for number in np.unique(owner[begins]):
                at = np.flatnonzero(owner[begins] == number)[0]
                address = int(unit[begins[at]]) * self.unit
                name = list(self.tensors)[number] if number >= 0 else ""
                if name:
                    address = (address - self.tensors[name].data_ptr()) // self.tensors[name].element_size()
                programs = self.turns[turn[begins[at]]], self.turns[turn[ends[at]]]
                found.append(Fault(kind, self.kernel, name, address, programs))

        shared = written & (program[first] != program[last])
        tell("race", first[shared], last[shared])
        for kind, second in (("reread", ~stored[again + 1]), ("twice", stored[again + 1])):
            tell(kind, again[second], again[second] + 1)
        stray = written & (owner[first] < 0)
        tell("outside", first[stray], last[stray])
        return found

    def _owners(self, addresses: np.ndarray) -> np.ndarray:
        """The number of the tensor that has an element at each address, -1 where none has."""
        owner = np.full(len(addresses), -1)
        for number, x in enumerate(self.tensors.values()):
            is_element = np.zeros(x.untyped_storage().nbytes() // x.element_size(), bool)
            as_strided(is_element[x.storage_offset() :], x.shape, x.stride())[...] = True
            at = (addresses - x.untyped_storage().data_ptr()) // x.element_size()
            within = (owner < 0) & (at >= 0) & (at < len(is_element))
            owner[within] = np.where(is_element[at[within]], number, -1)
        return owner


class Watch(NamedTuple):
    """Of the launches of a block: their kernels' names, and their faults."""

    launches: list[str]
    faults: list[Fault]


@contextmanager
def watched(order: Order = list) -> Iterator[Watch]:
    """Make the launches of the block with their programs in this order, and watch them."""
    watch = Watch([], [])

    def make(launch: dispatch.Launch) -> None:
        accesses = Accesses(launch)
        grid = (*launch.grid, 1, 1)[:3]
        with pytest.MonkeyPatch.context() as patch:
            _listen(patch, accesses, iter(order(list(np.ndindex(grid)))))
            dispatch.make(launch)
        watch.launches.append(accesses.kernel)
        watch.faults.extend(accesses.faults())

    with dispatch.watching(make):
        yield watch


def _listen(patch: pytest.MonkeyPatch, accesses: Accesses, programs: Iterator[Program]) -> None:
    """Make the interpreter run these programs in place of its own, and write down what they touch."""
    builder = interpreter.InterpreterBuilder
    begin, load, store = builder.set_grid_idx, builder.create_masked_load, builder.create_masked_store

    def begin_next(self: Any, *_: int) -> None:
        accesses.turns.append(next(programs))
        begin(self, *accesses.turns[-1])

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointers, accesses.note(pointers, mask, False), *rest)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, accesses.note(pointers, mask, True), *rest)

    def barrier(_: Any) -> None:
        accesses.turns.append(accesses.turns[-1])

    def refuse(*_: Any) -> None:
        raise NotImplementedError("atomics are not followed")

    patch.setattr(builder, "set_grid_idx", begin_next)
    patch.setattr(builder, "create_masked_load", noted_load)
    patch.setattr(builder, "create_masked_store", noted_store)
    patch.setattr(builder, "create_barrier", barrier)
    for name in dir(builder):
        if name.startswith("create_atomic"):
            patch.setattr(builder, name, refuse)
