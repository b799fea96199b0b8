"""Where parameters lie in a flat buffer: the only place that knows offsets and padding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from brc_fast.kernels.passes_plain import PASSES
from brc_fast.kernels.stages import Stages, copies_input, shapes_of

ALIGNMENT = 64  # elements between the starts of groups: 128 bytes in bfloat16
PAD = 8  # elements: rows of 16 bytes in bfloat16, which the fast matrix products want
BODY = "body."  # before the names of what each network of a module has of its own


def padded(size: int) -> int:
    """The next multiple of PAD."""
    return -(-size // PAD) * PAD


class Place(NamedTuple):
    """Of one network's parameter: offset in its row, shape with padding, and shape of the parameter."""

    offset: int
    held: tuple[int, ...]
    shape: tuple[int, ...]


class Layout:
    """A row holds one network: parameters of its stages, and what all networks of a module share, which is
    held in the row of the first.

    Kernels of one shape lie side by side, and so do the vectors of passes of one kind: what several stages
    have alike is one array at equal distances. The rows of kernels that multiply the input, and the columns
    of the head, are padded to PAD elements; nothing else is.

    Args:
        stages: of the module's `body`, or none. inputs: width of what they read.
        shared: shapes of the other parameters, by name.
    Attributes:
        size: P, elements of a row. multiplied: the body's parameters that go into products: kernels, and the
            biases that are added by them.
    """

    def __init__(self, stages: Stages, inputs: int, shared: Mapping[str, tuple[int, ...]]) -> None:
        self.stages, self.places, self.shared = stages, dict[str, Place](), tuple(shared)
        shapes = shapes_of(stages, inputs) if stages else {}
        wide = {} if not stages else shapes_of(self.padded_stages, self.padded_inputs(inputs))
        groups: dict[object, list[str]] = {}
        self.multiplied: list[str] = []
        for stage in stages:
            names = [name for name in shapes if name.rpartition(".")[0] == stage.name]
            for name in names:
                kernel = len(shapes[name]) == 2
                if kernel or PASSES[stage.after].in_place:
                    self.multiplied.append(name)
                groups.setdefault(wide[name] if kernel else (stage.after, wide[name]), []).append(name)
        self.size = 0
        for names in groups.values():
            for name in names:
                self._place(BODY + name, wide[name], shapes[name])
            self._align()
        for name, shape in shared.items():
            self._place(name, shape, shape)
            self._align()

    def _place(self, name: str, held: tuple[int, ...], shape: tuple[int, ...]) -> None:
        self.places[name] = Place(self.size, held, shape)
        self.size += math.prod(held)

    def _align(self) -> None:
        self.size = -(-self.size // ALIGNMENT) * ALIGNMENT

    def padded_inputs(self, inputs: int) -> int:
        """Width of an input in memory: a norm over it must not see padding."""
        return inputs if self.stages and copies_input(self.stages) else padded(inputs)

    @property
    def padded_stages(self) -> Stages:
        """The stages as they run over padded parameters."""
        *rest, head = self.stages
        return (*rest, head._replace(outputs=padded(head.outputs)))

    def _whole(self, rows: Tensor, name: str) -> Tensor:
        offset, held, _ = self.places[name]
        return rows[:, offset : offset + math.prod(held)].view(len(rows), *held)

    def body(self, rows: Tensor) -> dict[str, Tensor]:
        """What rows [N, P] hold of the body, padding included, by the names of its stages' parameters."""
        names = (name for name in self.places if name.startswith(BODY))
        return {name.removeprefix(BODY): self._whole(rows, name) for name in names}

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """What rows [E, P] of one module hold, by the names and in the shapes of its parameters."""
        out = {}
        for name, place in self.places.items():
            whole = self._whole(rows, name)
            if name in self.shared:
                out[name] = whole[0]
            else:
                out[name] = whole[(slice(None), *(slice(size) for size in place.shape))]
        return out

    def padding(self, rows: Tensor) -> list[Tensor]:
        """The views of rows [N, P] within arrays that belong to no parameter, and are zero."""
        out = []
        for name, (_, held, shape) in self.places.items():
            for axis, (size, own) in enumerate(zip(held, shape, strict=True), start=1):
                if size > own:
                    out.append(self._whole(rows, name).narrow(axis, own, size - own))
        return out
