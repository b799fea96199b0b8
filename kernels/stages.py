"""One loop through stacked networks, forward and backward, in memory that stays.

A network is a list of stages. Value 0 is the input, value k what the k-th stage leaves:

    value[k] = pass(value[reads] @ kernel) + value[adds]

Backward, from the last stage down, with dp the gradient of a stage's product:

    d value[reads] += dp kernel^T;    d value[adds] += d value[k];    d kernel = value[reads]^T dp

The first gradient that reaches a value is written, later ones are added by the product itself (beta = 1).
Whatever is known before the first pass is bound before it: a pass is a list of calls.

Dims:    N networks, of which the first G get gradients; B rows, R of them with gradients.
Passes:  what is between the products: norm.py (Triton), passes_cpu.py, and passes_plain.py for what those
         lack. Where a pass leaves partial sums, they are added up by one launch at the end, and the kernels'
         gradients of stages of equal shape are one product.
Twin:    reference.network
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import passes_plain
from .passes_plain import Call, Pass
from .runtime import native
from .runtime.dispatch import chosen, takes_kernels
from .runtime.rows import spaced

__all__ = ["Pass", "Plan", "Stage", "check_stages", "copies_input", "shapes_of"]

SLOT = 64  # elements: slots of memory are multiples of it
KEEP_NOTHING, KEEP_FOR_INPUT, KEEP_ALL, KEEP_ENDS = range(4)  # of a forward pass, for the backward pass


class Stage(NamedTuple):
    """A product with a kernel, and the pass over it. Values are numbered from 0, the input.

    name: of its module; parameters are `name.kernel` [N, inputs, outputs] and `name.VECTOR` [N, outputs].
    outputs: width of the value it leaves. reads: number of the value that it multiplies.
    after: the pass, of kernels.passes_plain.PASSES. relu: after the pass, before anything is added.
    adds: number of the value that is added. product: False where the pass is over the value itself.
    """

    name: str
    outputs: int
    reads: int
    after: str = "bias"
    relu: bool = False
    adds: int | None = None
    product: bool = True


Stages = tuple[Stage, ...]


@lru_cache
def check_stages(stages: Stages) -> None:
    """ValueError, by the stage's name, for a list that is no network: it must end in a head, a product plus
    bias that all its other values lead to."""
    if not stages:
        raise ValueError("a network needs at least one stage, its head")
    names: set[str] = set()
    widths: list[int | None] = [None]
    used: set[int] = set()
    for number, stage in enumerate(stages, start=1):
        told = f"stage {stage.name!r}"
        if stage.name in names:
            raise ValueError(f"{told} has the name of an earlier stage: names of parameters must differ")
        if not all(part.isidentifier() or part.isdecimal() for part in stage.name.split(".")):
            raise ValueError(f"{told} must be named as a module is: letters, digits and dots")
        names.add(stage.name)
        if stage.outputs < 1:
            raise ValueError(f"{told} must have at least one output, got {stage.outputs}")
        if stage.after not in passes_plain.PASSES:
            known = ", ".join(passes_plain.PASSES)
            raise ValueError(f"{told} has no known pass: after must be one of {known}, got {stage.after!r}")
        for verb, value in (("reads", stage.reads), ("adds", stage.adds)):
            if value is not None and not 0 <= value < number:
                made = f"values 0 (the input) to {number - 1} exist there"
                raise ValueError(f"{told} {verb} value {value}, which does not exist yet: {made}")
        if stage.adds is not None:
            if stage.relu:
                raise ValueError(f"{told} has relu and adds: give the sum a stage of its own")
            if stage.adds and widths[stage.adds] != stage.outputs:
                wanted = f"{stage.outputs} wide, got {widths[stage.adds]}"
                raise ValueError(f"{told} adds value {stage.adds}, which must be {wanted}")
            used.add(stage.adds)
        if not stage.product:
            if passes_plain.PASSES[stage.after].in_place:
                raise ValueError(f"{told} has neither a product nor a norm")
            if stage.reads and widths[stage.reads] != stage.outputs:
                wanted = f"{widths[stage.reads]} outputs, as value {stage.reads} has, got {stage.outputs}"
                raise ValueError(f"{told} has no product: it must have {wanted}")
        used.add(stage.reads)
        widths.append(stage.outputs)
    head = stages[-1]
    if not head.product or head.after != "bias" or head.relu or head.adds is not None:
        raise ValueError(
            f"the last stage, {head.name!r}, must be a head: a product plus bias and nothing else"
        )
    for number in range(1, len(stages)):
        if number not in used:
            raise ValueError(f"value {number}, of stage {stages[number - 1].name!r}, is read by no stage")


@lru_cache
def shapes_of(stages: Stages, inputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one network's parameters by name, the kernel of a stage before its vectors; inputs: width of
    value 0."""
    widths, out = [inputs, *(stage.outputs for stage in stages)], {}
    for stage in stages:
        if stage.product:
            out[f"{stage.name}.kernel"] = (widths[stage.reads], stage.outputs)
        for vector in passes_plain.PASSES[stage.after].vectors:
            out[f"{stage.name}.{vector}"] = (stage.outputs,)
    return out


def input_width(stages: Stages, parameters: Mapping[str, Tensor]) -> int:
    """Of value 0; ValueError where a parameter is missing."""
    for stage in stages:
        if stage.reads == 0:
            name = f"{stage.name}.kernel" if stage.product else f"{stage.name}.norm_weight"
            if name not in parameters:
                raise ValueError(f"parameters lack {name}")
            return parameters[name].shape[-2 if stage.product else -1]
    raise ValueError("no stage reads value 0, the input")


def check_parameters(
    stages: Stages, parameters: Mapping[str, Tensor], told: str = "", networks: int | None = None
) -> None:
    """The passes trust shapes and strides, so they are checked here; ValueError by the parameter's name."""
    check_stages(stages)
    shapes = shapes_of(stages, input_width(stages, parameters))
    for name in parameters.keys() - shapes.keys():
        raise ValueError(f"{told}{name} is no parameter of these stages: {', '.join(shapes)}")
    for name, shape in shapes.items():
        if name not in parameters:
            raise ValueError(
                f"{told or 'parameters '}lack {name}" if not told else f"{told}{name} is missing"
            )
        given = parameters[name]
        networks = given.shape[0] if networks is None and given.dim() == 1 + len(shape) else networks
        dims = "[N, inputs, outputs]" if len(shape) == 2 else "[N, outputs]"
        wanted = [networks or "N", *shape]
        if list(given.shape) != wanted:
            raise ValueError(f"{told}{name} must have shape {dims} = {wanted}, got {list(given.shape)}")


def check_strides(stages: Stages, parameters: Mapping[str, Tensor], told: str = "") -> None:
    """ValueError where the vectors of a stage are not the same distances apart, or not dense."""
    for stage in stages:
        vectors = _vectors(stage, parameters)
        strides = {vector.stride() for vector in vectors}
        if len(strides) > 1 or (vectors and vectors[0].shape[-1] > 1 and vectors[0].stride(-1) != 1):
            raise ValueError(
                f"{told}vectors of {stage.name} must have the same strides [.., 1], got {strides}"
            )


def _vectors(stage: Stage, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    return [parameters[f"{stage.name}.{name}"] for name in passes_plain.PASSES[stage.after].vectors]


# -- memory


class Place(NamedTuple):
    """A slot of memory: [N, B, width], the `slot`-th of those of its kind and width."""

    width: int
    slot: int


class Places(NamedTuple):
    """Where products (by stage) and values (by number) lie, and how many slots there are of each width."""

    products: tuple[Place | None, ...]
    values: tuple[Place | None, ...]
    product_slots: dict[int, int]
    value_slots: dict[int, int]


@lru_cache
def ends_of(stages: Stages) -> tuple[int, ...]:
    """Numbers of the values that all later ones are made from: between two of them lies a block."""
    return tuple(
        value
        for value in range(1, len(stages))
        if all(min(s.reads, s.reads if s.adds is None else s.adds) >= value for s in stages[value:])
    )


def copies_input(stages: Stages) -> bool:
    """Whether the input, which may be elsewhere at each pass, is more than multiplied: its place is bound."""
    return any((not stage.product and stage.reads == 0) or stage.adds == 0 for stage in stages)


@lru_cache
def places_of(stages: Stages, keep: int, inputs: int) -> Places:
    """What is kept has memory of its own; anything else is given out again after its last use, with
    KEEP_ENDS at the end of its block. The head's value is elsewhere, and the input where it is only
    multiplied."""
    last, ends = len(stages), ends_of(stages)
    uses: dict[int, int] = {}  # value -> the last stage, from 1, that uses it
    for number, stage in enumerate(stages, start=1):
        for value in (stage.reads, stage.adds):
            if value is not None:
                uses[value] = number
    kept_values, kept_products = set[int](), set[int]()
    for number, stage in enumerate(stages, start=1):
        in_place = passes_plain.PASSES[stage.after].in_place
        if keep == KEEP_ALL:
            kept_values.add(number)
            kept_products.add(number)
        elif keep == KEEP_FOR_INPUT:
            if in_place and stage.relu:
                kept_values.add(number)
            if not in_place:
                kept_products.add(number)
                if not stage.product:
                    kept_values.add(stage.reads)
    if keep == KEEP_ENDS:
        kept_values = set(ends)
    free: dict[str, dict[int, list[int]]] = {"products": defaultdict(list), "values": defaultdict(list)}
    counts: dict[str, Counter[int]] = {"products": Counter(), "values": Counter()}

    def take(kind: str, width: int) -> Place:
        if free[kind][width]:
            return Place(width, free[kind][width].pop(0))
        counts[kind][width] += 1
        return Place(width, counts[kind][width] - 1)

    products: list[Place | None] = []
    values: list[Place | None] = [take("values", inputs) if copies_input(stages) else None]
    block: list[tuple[str, Place]] = []  # of the running block, with KEEP_ENDS
    for number, stage in enumerate(stages, start=1):
        needs = stage.product and not passes_plain.PASSES[stage.after].in_place
        products.append(take("products", stage.outputs) if needs else None)
        values.append(take("values", stage.outputs) if number < last else None)
        if keep == KEEP_ENDS:
            block += [("products", place) for place in products[-1:] if place is not None]
            if number in ends or number == last:
                for kind, place in block:
                    free[kind][place.width].append(place.slot)
                block.clear()
            else:
                block += [("values", place) for place in values[-1:] if place is not None]
            continue
        done = products[-1]
        if done is not None and number not in kept_products:
            free["products"][done.width].append(done.slot)
        for value in {stage.reads, stage.adds} - {None}:
            assert value is not None
            place = values[value]
            if value and place is not None and uses[value] == number and value not in kept_values:
                free["values"][place.width].append(place.slot)
    return Places(tuple(products), tuple(values), dict(counts["products"]), dict(counts["values"]))


def memory_elements(stages: Stages, keep: int, networks: int, rows: int, inputs: int) -> int:
    """Of products and values together, in elements."""
    places = places_of(stages, keep, inputs)
    counts = [*places.product_slots.items(), *places.value_slots.items()]
    return sum(slots * _slot_size(networks, rows, width) for width, slots in counts)


def _slot_size(networks: int, rows: int, width: int) -> int:
    return -(-networks * rows * width // SLOT) * SLOT


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass
class Memory:
    """What a forward pass leaves: products and stats by stage, values by number; the last is None, and so is
    0 where the input is used where it lies."""

    products: list[Tensor | None]
    values: list[Tensor | None]
    stats: list[Tensor | None]

    @classmethod
    def carve(cls, stages: Stages, keep: int, rows: int, inputs: int, flat: Tensor, stats: Tensor) -> Memory:
        """Of `flat`, `memory_elements` long, and stats [L, 2, N, B] of L stages."""
        places, start, networks = places_of(stages, keep, inputs), 0, stats.shape[2]
        slots: dict[tuple[str, int], list[Tensor]] = {}
        kinds = (("products", places.product_slots), ("values", places.value_slots))
        for kind, counts in kinds:
            for width, count in counts.items():
                size = _slot_size(networks, rows, width)
                held = flat[start : start + count * size].view(count, size)
                slots[kind, width] = [
                    slot[: networks * rows * width].view(networks, rows, width) for slot in held.unbind()
                ]
                start += count * size
        products = [None if p is None else slots["products", p.width][p.slot] for p in places.products]
        values = [None if p is None else slots["values", p.width][p.slot] for p in places.values]
        keeps = [passes_plain.PASSES[stage.after].keeps_stats for stage in stages]
        return cls(products, values, [x if k else None for k, x in zip(keeps, stats.unbind(), strict=True)])

    @classmethod
    def new(cls, stages: Stages, keep: int, networks: int, rows: int, inputs: int, like: Tensor) -> Memory:
        flat = like.new_empty(memory_elements(stages, keep, networks, rows, inputs))
        stats = like.new_empty(len(stages), 2, networks, rows, dtype=wide(like.dtype))
        return cls.carve(stages, keep, rows, inputs, flat, stats)

    def pieces(self) -> list[Tensor]:
        """All there are, each once."""
        parts = [x for x in (*self.products, *self.values, *self.stats) if x is not None]
        return list({(x.storage_offset(), x.shape, x.dtype, x.data_ptr()): x for x in parts}.values())

    def part(self, networks: int, rows: int) -> Memory:
        """That of the first networks and, of each, of the last rows."""
        products = [x if x is None else x[:networks, -rows:] for x in self.products]
        values = [x if x is None else x[:networks, -rows:] for x in self.values]
        return Memory(products, values, [x if x is None else x[:, :networks, -rows:] for x in self.stats])


# -- passes over it


class Kind(NamedTuple):
    """What runs between the products: a module with `PASSES`, by its name."""

    name: str
    module: Any

    def of(self, after: str) -> Pass:
        known: Pass | None = self.module.PASSES.get(after)
        return passes_plain.PASSES[after] if known is None else known

    @property
    def batched(self) -> bool:
        """Whether a launch costs more than memory for gradients of products."""
        return self.name == "norm"


def kind_of(x: Tensor, float32: bool = True, impl: str | None = None) -> Kind:
    """For tensors like x; `float32`: whether all vectors are, which the compiled passes take alone."""
    if takes_kernels(impl, x):
        name = "norm"
    elif float32 and chosen(impl) == "auto" and native.takes(x):
        name = "passes_cpu"
    else:
        name = "passes_plain"
    return Kind(name, importlib.import_module(f".{name}", __package__))


class Forward:
    """The forward pass. Its calls have everything bound but the inputs.

    Args:
        out: [N, B, K] for the outputs. parts: how many inputs there are, each for an equal share of the
            networks.
    """

    def __init__(
        self,
        stages: Stages,
        parameters: Mapping[str, Tensor],
        memory: Memory,
        kind: Kind,
        out: Tensor,
        parts: int = 1,
    ) -> None:
        self.stages, self.parameters, self.memory, self.kind, self.parts = (
            stages,
            parameters,
            memory,
            kind,
            parts,
        )
        self.values = [*memory.values[:-1], out]
        self.inputs: Sequence[Tensor] = ()
        self.out = out
        self.calls = [call for k in range(len(stages)) for call in self.stage(k)]

    def stage(self, k: int, product_alone: bool = False) -> list[Call]:
        """The calls of one stage, whose value is not made anew with `product_alone`."""
        stage, out, calls = self.stages[k], self.values[k + 1], list[Call]()
        after, vectors = self.kind.of(stage.after), _vectors(stage, self.parameters)
        assert out is not None
        source = self.values[stage.reads]
        if stage.product:
            source = out if after.in_place else self.memory.products[k]
            assert source is not None
            if product_alone and after.in_place:
                return calls
            x, kernel = self.values[stage.reads], self.parameters[f"{stage.name}.kernel"]
            if x is None:
                places = zip(*(y.chunk(self.parts) for y in (kernel, source, *vectors)), strict=True)
                calls.append(partial(self._of_inputs, after, list(places)))
            else:
                calls.append(after.product(x, kernel, vectors, source))
        if product_alone:
            return calls
        assert source is not None
        added = None if stage.adds is None else self.values[stage.adds]
        call = after.forward(source, vectors, added, stage.relu, out, self.memory.stats[k])
        return calls if call is None else [*calls, call]

    def _of_inputs(self, after: Pass, places: Sequence[Sequence[Tensor]]) -> None:
        for x, (kernel, out, *vectors) in zip(self.inputs, places, strict=True):
            after.product(x.expand(len(kernel), *x.shape[-2:]), kernel, vectors, out)()

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """[N, B, K] of one [N, B, I], or of several [B, I]."""
        self.inputs = inputs
        if self.values[0] is not None:
            for x, place in zip(inputs, self.values[0].chunk(self.parts), strict=True):
                place.copy_(x)
        for call in self.calls:
            call()
        return self.out


class Backward:
    """The backward pass, into `gradients` where they are wanted; like `Forward`, whose memory it reads.

    Args:
        forward: of the same networks and rows. gradients: by name, as the parameters.
        wants_input: whether the gradient of the input is wanted. new: makes memory of a shape.
        batched: whether kernels' gradients of stages of equal shape are one product.
        recomputes: blocks but the last are made again from what came out of the block before.
    """

    def __init__(
        self,
        forward: Forward,
        gradients: Mapping[str, Tensor] | None,
        wants_input: bool,
        new: Callable[..., Tensor],
        batched: bool = False,
        recomputes: bool = False,
    ) -> None:
        self.stages, self.parameters, self.values = forward.stages, forward.parameters, forward.values
        self.memory, self.kind, self.forward = forward.memory, forward.kind, forward
        self.gradients, self.wants_input, self.new = gradients, wants_input, new
        self.copied = self.values[0] is not None
        self.shape = forward.out.shape[:2]
        self.grad: Tensor | None = None
        self.x: Tensor | None = None
        self.columns = slice(None)
        self.dx: Tensor | None = None
        self.calls: list[Call] = []
        self.sums: list[tuple[list[int], Tensor]] = []
        self.groups: list[tuple[Tensor, Tensor, Tensor]] = []
        self.pieces = {} if gradients is None else self._pieces()
        self.dproducts = {} if gradients is None or recomputes or not batched else self._dproducts(gradients)
        self._bind(recomputes)

    # what is one launch for several stages

    def _summed(self) -> dict[tuple[str, int], list[int]]:
        """Stages whose sums over rows come in pieces, by pass and width."""
        out = defaultdict(list)
        for k, stage in enumerate(self.stages):
            if self.kind.of(stage.after).partial_sums:
                out[stage.after, stage.outputs].append(k)
        return out

    def _pieces(self) -> dict[int, Tensor]:
        out: dict[int, Tensor] = {}
        for (_, width), stages in self._summed().items():
            like = self.values[stages[0] + 1]
            assert like is not None
            whole = self.kind.module.partials(len(stages), *self.shape, width, like)
            self.sums.append((stages, whole))
            out |= dict(zip(stages, whole.unbind(), strict=True))
        return out

    def _dproducts(self, gradients: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Gradients of products that stay until the end, by stage: those whose kernels' gradients are one
        product with others of their shape."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for k, stage in enumerate(self.stages[:-1]):
            x = self.values[stage.reads]
            if stage.product and x is not None and self.kind.of(stage.after).writes(stage.relu):
                groups[x.shape[-1], stage.outputs].append(k)
        out: dict[int, Tensor] = {}
        for (_, width), stages in groups.items():
            read = [self.values[self.stages[k].reads] for k in stages]
            below = spaced([x for x in read if x is not None])
            into = spaced([gradients[f"{self.stages[k].name}.kernel"] for k in stages])
            if len(stages) == 1 or below is None or into is None:
                continue
            above = self.new(len(stages), *self.shape, width)
            self.groups.append((below, above, into))
            out |= dict(zip(stages, above.unbind(), strict=True))
        return out

    def _bind(self, recomputes: bool) -> None:
        stages, calls = self.stages, self.calls
        head, ends = stages[-1], ends_of(stages)
        d: dict[int, Tensor] = {}  # gradients that have reached a value
        free: dict[int, list[Tensor]] = defaultdict(list)

        def slot(width: int) -> Tensor:
            return free[width].pop() if free[width] else self.new(*self.shape, width)

        def arrive(value: int, dproduct: Tensor | None, kernel: Tensor) -> None:
            """Add dproduct @ kernel to the gradient of a value; dproduct None is that of the head."""
            if value == 0 and not self.copied:
                if self.wants_input:
                    calls.append(partial(self._to_input, dproduct, kernel))
            elif value not in d:
                d[value] = slot(kernel.shape[-1])
                if dproduct is None:
                    calls.append(partial(self._of_head, kernel, d[value]))
                else:
                    calls.append(partial(torch.bmm, dproduct, kernel, out=d[value]))
            else:
                assert dproduct is not None
                calls.append(partial(d[value].baddbmm_, dproduct, kernel))

        if self.gradients is not None:
            calls.append(self._head_gradients)
        arrive(head.reads, None, self.parameters[f"{head.name}.kernel"].mT)
        for k in reversed(range(len(stages) - 1)):
            if recomputes and k + 1 in ends and k + 1 != ends[-1]:
                first = max((e for e in ends if e <= k), default=0)
                for j in range(first, k + 1):
                    calls += self.forward.stage(j, product_alone=j == k)
            self._stage(k, d, free, slot, arrive)
        self.calls += self._endings()
        if self.copied and self.wants_input:
            self.dx = d[0]

    def _stage(
        self,
        k: int,
        d: dict[int, Tensor],
        free: dict[int, list[Tensor]],
        slot: Callable[[int], Tensor],
        arrive: Callable[[int, Tensor | None, Tensor], None],
    ) -> None:
        stage, calls, g = self.stages[k], self.calls, d.pop(k + 1)
        after = self.kind.of(stage.after)
        handed = False
        if stage.adds is not None:
            if stage.adds in d:
                calls.append(partial(d[stage.adds].add_, g))
            elif stage.adds or self.copied:
                d[stage.adds], handed = g, True
        if not after.writes(stage.relu):
            dproduct = g
        elif k in self.dproducts:
            dproduct = self.dproducts[k]
        else:
            dproduct = slot(stage.outputs) if handed else g
        out = self.values[k + 1]
        source = self.values[stage.reads] if not stage.product else self.memory.products[k]
        source = out if source is None else source
        assert out is not None
        assert source is not None
        into = None if self.gradients is None else _vectors(stage, self.gradients)
        call = after.backward(
            g,
            source,
            _vectors(stage, self.parameters),
            stage.relu,
            out,
            self.memory.stats[k],
            dproduct,
            into,
            self.pieces.get(k),
        )
        if call is not None:
            calls.append(call)
        given_on = handed and dproduct is g
        if stage.product:
            kernel = f"{stage.name}.kernel"
            if self.gradients is not None and k not in self.dproducts:
                x = self.values[stage.reads]
                if x is None:
                    calls.append(partial(self._first_gradient, dproduct, self.gradients[kernel]))
                else:
                    calls.append(partial(torch.bmm, x.mT, dproduct, out=self.gradients[kernel]))
            arrive(stage.reads, dproduct, self.parameters[kernel].mT)
        elif stage.reads or self.copied:
            if stage.reads in d:
                calls.append(partial(d[stage.reads].add_, dproduct))
            else:
                d[stage.reads], given_on = dproduct, True
        if not given_on and k not in self.dproducts:
            free[stage.outputs].append(dproduct)
        if dproduct is not g and not handed:
            free[stage.outputs].append(g)

    def _endings(self) -> list[Call]:
        out: list[Call] = [partial(_products, *group) for group in self.groups]
        if self.gradients is None:
            return out
        for index, (stages, pieces) in enumerate(self.sums):
            vectors = [_vectors(self.stages[k], self.gradients) for k in stages]
            out.append(partial(self._reduce, pieces, vectors, index == 0))
        return out

    # what the inputs have a part in

    def _of_head(self, kernel: Tensor, out: Tensor) -> None:
        assert self.grad is not None
        torch.bmm(self.grad, kernel, out=out)

    def _head_gradients(self) -> None:
        head, gradients, grad = self.stages[-1], self.gradients, self.grad
        assert gradients is not None
        assert grad is not None
        x = self.values[head.reads]
        x = self.x if x is None else x
        assert x is not None
        torch.bmm(x.mT, grad, out=gradients[f"{head.name}.kernel"])
        if not self.pieces:
            bias = gradients[f"{head.name}.bias"]
            torch.sum(grad, 1, dtype=bias.dtype, out=bias)

    def _first_gradient(self, dproduct: Tensor, out: Tensor) -> None:
        assert self.x is not None
        torch.bmm(self.x.mT, dproduct, out=out)

    def _to_input(self, dproduct: Tensor | None, kernel: Tensor) -> None:
        dproduct = self.grad if dproduct is None else dproduct
        assert dproduct is not None
        kernel = kernel[..., self.columns]
        self.dx = torch.bmm(dproduct, kernel) if self.dx is None else self.dx.baddbmm_(dproduct, kernel)

    def _reduce(self, pieces: Tensor, vectors: list[list[Tensor]], with_head: bool) -> None:
        assert self.gradients is not None
        bias = self.gradients[f"{self.stages[-1].name}.bias"] if with_head else None
        self.kind.module.reduce(pieces, vectors, self.grad if with_head else None, bias)

    def __call__(self, grad: Tensor, x: Tensor, columns: slice = slice(None)) -> Tensor | None:
        """The gradient of x [N, B, I] in these columns, where it is wanted.

        Args:
            grad: [N, B, K], contiguous. x: [N, B, I], or [B, I] of all networks.
        """
        self.grad, self.x, self.columns = grad, x.expand(len(grad), *x.shape[-2:]), columns
        for call in self.calls:
            call()
        self.grad = self.x = None
        if self.copied:
            return None if self.dx is None else self.dx[..., columns]
        dx, self.dx = self.dx, None
        return dx


def _products(below: Tensor, above: Tensor, out: Tensor) -> None:
    """Kernels' gradients of several stages [n, N, I, H]: one product where their distances are those of one
    batch, else one for each network over its stages."""
    if _flat(below) and _flat(above) and _flat(out):
        torch.bmm(below.flatten(0, 1).mT, above.flatten(0, 1), out=out.flatten(0, 1))
        return
    for network in range(out.shape[1]):
        torch.bmm(below[:, network].mT, above[:, network], out=out[:, network])


def _flat(x: Tensor) -> bool:
    return x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


class Plan:
    """Passes of N stacked networks over B rows, without autograd, in memory that stays: a CUDA graph can hold
    them, and on a CPU nothing is left beside the arithmetic.

    Args:
        stages: of one network; see Stage.
        parameters: by name, [N, ..]; networks any distance apart. They are read where they lie at every pass:
            change them in place.
        rows: B.
        gradients: where those of the first G networks go, by the same names; None if no parameter wants any.
        share: a plan of the same stages, at least as many networks and rows, whose backward pass is over
            whenever this one runs: its memory is used, and it says whether to recompute.
        recompute: keep only what comes out of the blocks, and make the rest again for the backward pass.
        trained_rows: R, of which there are gradients: the last ones, of a single network. All by default.
    Raises:
        ValueError for stages, shapes or strides that do not fit.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        parameters: Mapping[str, Tensor],
        rows: int,
        gradients: Mapping[str, Tensor] | None = None,
        share: Plan | None = None,
        recompute: bool = False,
        trained_rows: int | None = None,
    ) -> None:
        # tensors of its own: what it holds stays where it is, also if a module puts other data into its own
        self.stages = tuple(stages)
        self.parameters = {name: p.detach() for name, p in parameters.items()}
        self.rows, self.gradients = rows, gradients
        self.trained_rows = rows if trained_rows is None else trained_rows
        check_parameters(self.stages, self.parameters)
        check_strides(self.stages, self.parameters)
        head = self.parameters[f"{self.stages[-1].name}.kernel"]
        networks, _, outputs = head.shape
        self.trained = networks
        if gradients is not None:
            check_parameters(self.stages, gradients, "the gradient of ")
            check_strides(self.stages, gradients, "gradients of ")
            self.trained = len(next(iter(gradients.values())))
        self.recompute: bool = recompute if share is None else share.recompute
        if not 0 < self.trained_rows <= rows:
            raise ValueError(f"trained_rows must be from 1 to B = {rows}, got {trained_rows}")
        if networks > 1 and self.trained_rows < rows:  # a pass over some of their rows has gaps
            raise ValueError(
                f"trained_rows must be B = {rows} with N = {networks} networks, got {trained_rows}"
            )
        self._shares = share is not None
        keep = KEEP_ENDS if self.recompute else KEEP_ALL
        if share is None:
            inputs = input_width(self.stages, self.parameters)
            self.memory = Memory.new(self.stages, keep, networks, rows, inputs, head)
        else:
            if share.stages != self.stages or len(share.out) < networks or share.rows < rows:
                wanted = f"the same stages, N >= {networks} networks and B >= {rows} rows"
                raise ValueError(f"share must have {wanted}, got N = {len(share.out)} and B = {share.rows}")
            self.memory = share.memory.part(networks, rows)
        self.out: Tensor = head.new_empty(networks, rows, outputs)
        held = [x for source in (self.parameters, gradients or {}) for x in source.values() if x.dim() == 2]
        self._float32 = all(x.dtype == torch.float32 for x in held)
        self._forward: dict[tuple[int, str], Forward] = {}
        self._backward: dict[tuple[str, bool], Backward] = {}
        self._inputs: Sequence[Tensor] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Without what was looked up for the passes: it holds addresses, which are not those of a copy."""
        return {**self.__dict__, "_forward": {}, "_backward": {}}

    def bytes(self, device: str) -> int:
        """Memory of its own on a device of this kind, that of the backward pass included (but for the partial
        sums of norms)."""
        held = [self.out]
        if not self._shares:
            held += self.memory.pieces()

        def new(*shape: int) -> Tensor:
            held.append(self.out.new_empty(shape, device="meta"))
            return held[-1]

        batched = torch.device(device).type == "cuda"
        plain = Kind("passes_plain", passes_plain)
        self._reversed(plain, new, wants_input=False, batched=batched)
        return sum(x.numel() * x.element_size() for x in held)

    def _reversed(self, kind: Kind, new: Callable[..., Tensor], wants_input: bool, batched: bool) -> Backward:
        """The backward pass over the networks and rows that are trained."""
        memory, out = self.memory, self.out
        if self.trained < len(out) or self.trained_rows < self.rows:
            memory = memory.part(self.trained, self.trained_rows)
            out = out[: self.trained, -self.trained_rows :]
        parameters = {name: p[: self.trained] for name, p in self.parameters.items()}
        forward = Forward(self.stages, parameters, memory, kind, out)
        return Backward(forward, self.gradients, wants_input, new, batched, self.recompute)

    def _bound(self, x: Tensor, parts: int) -> Forward:
        kind = kind_of(x, self._float32)
        key = parts, kind.name
        if key not in self._forward:
            self._forward[key] = Forward(self.stages, self.parameters, self.memory, kind, self.out, parts)
        return self._forward[key]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Outputs [N, B, K], overwritten by the next call.

        Args:
            inputs: one [B, I] for all networks, or several, each for an equal share of them in order; they
                must stay as they are until the backward pass.
        """
        parts = len(inputs)
        for x in inputs:
            if x.shape[-2] != self.rows:  # torch would make the memory larger and go on
                raise ValueError(f"inputs must have B = {self.rows} rows, got {x.shape[-2]}")
        if not parts or len(self.out) % parts:
            raise ValueError(f"inputs must share N = {len(self.out)} networks equally, got {parts}")
        self._inputs = inputs
        return self._bound(inputs[0], parts)(inputs)

    def backward(self, grad: Tensor, columns: slice | None = None) -> Tensor | None:
        """Fill the gradients of the first G networks; returns those of their input where they are wanted.

        Args:
            grad: [G, R, K], contiguous, of what `forward` returned for them.
            columns: of the input, C of them, of which a gradient is wanted; None for none.
        Returns:
            [G, R, C]: each network's own, to be summed where they had one input.
        """
        if not self._inputs:
            raise RuntimeError("a backward pass needs a forward pass before it")
        wanted = (self.trained, self.trained_rows, self.out.shape[-1])
        if grad.shape != wanted or not grad.is_contiguous():
            told = f"{list(grad.shape)}, strides {list(grad.stride())}"
            raise ValueError(f"grad must have shape [G, R, K] = {list(wanted)} and no gaps, got {told}")
        if self.trained > len(self.out) // len(self._inputs):
            raise ValueError("networks with gradients must all take the first input")
        kind = kind_of(grad, self._float32)
        key = kind.name, columns is not None
        if key not in self._backward:
            self._backward[key] = self._reversed(kind, self.out.new_empty, columns is not None, kind.batched)
        x = self._inputs[0][..., -self.trained_rows :, :]
        run = self._backward[key]
        run.forward.inputs = (x,)
        return run(grad, x, slice(None) if columns is None else columns)
