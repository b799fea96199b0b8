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

import importlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .passes_plain import PASSES, Call, Held, Pass, rounded, sum_rows
from .runtime import native
from .runtime.dispatch import chosen, takes_kernels
from .runtime.rows import spaced

__all__ = ["Pass", "Plan", "Stage", "check_stages", "copies_input", "shapes_of"]

SLOT = 64  # elements: slots of memory are multiples of it
KEEP_NOTHING, KEEP_FOR_INPUT, KEEP_ALL, KEEP_ENDS = range(4)  # of a forward pass, for the backward pass

P = ParamSpec("P")
R = TypeVar("R")


def cached(function: Callable[P, R]) -> Callable[P, R]:
    """`lru_cache` that torch.compile, which warns of one, does not see."""
    found = lru_cache(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return found(*args, **kwargs)  # type: ignore[arg-type]

    return call


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

    @property
    def vectors(self) -> list[str]:
        """Names of the vectors."""
        return [f"{self.name}.{vector}" for vector in PASSES[self.after].vectors]

    @property
    def uses(self) -> set[int]:
        """Numbers of the values that it reads and adds."""
        return {self.reads} if self.adds is None else {self.reads, self.adds}


Stages = tuple[Stage, ...]


@cached
def check_stages(stages: Stages) -> None:
    """ValueError, by the stage's name, for a list that is no network: it must end in a head, a product plus
    bias that all its other values lead to."""
    if not stages:
        raise ValueError("a network needs at least one stage, its head")
    names: list[str] = []
    widths: list[int | None] = [None]  # of the input: that of the first stage that takes it as it is
    for number, stage in enumerate(stages, start=1):
        told = f"stage {stage.name!r}"
        if not all(part.isidentifier() or part.isdecimal() for part in stage.name.split(".")):
            raise ValueError(f"{told} must be named as a module is: letters, digits and dots")
        for name in names:
            if name == stage.name:
                raise ValueError(f"{told} has the name of an earlier stage: names of parameters must differ")
            if f"{name}.".startswith(f"{stage.name}.") or f"{stage.name}.".startswith(f"{name}."):
                raise ValueError(f"{told} is named as a part of, or has as a part, stage {name!r}")
        names.append(stage.name)
        if stage.outputs < 1:
            raise ValueError(f"{told} must have at least one output, got {stage.outputs}")
        if stage.after not in PASSES:
            known = ", ".join(PASSES)
            raise ValueError(f"{told} has no known pass: after must be one of {known}, got {stage.after!r}")
        if stage.relu and stage.adds is not None:
            raise ValueError(f"{told} has relu and adds: give the sum a stage of its own")
        if not stage.product and PASSES[stage.after].in_place:
            raise ValueError(f"{told} has neither a product nor a norm")
        for verb, value, as_it_is in (("reads", stage.reads, not stage.product), ("adds", stage.adds, True)):
            if value is None:
                continue
            if not 0 <= value < number:
                made = f"values 0 (the input) to {number - 1} exist there"
                raise ValueError(f"{told} {verb} value {value}, which does not exist yet: {made}")
            if as_it_is:
                width = widths[value] = widths[value] or stage.outputs
                if width != stage.outputs:
                    wanted = f"must be {stage.outputs} wide, got {width}"
                    raise ValueError(f"{told} {verb} value {value} as it is, which {wanted}")
        widths.append(stage.outputs)
    head = stages[-1]
    if not head.product or head.after != "bias" or head.relu or head.adds is not None:
        raise ValueError(
            f"the last stage, {head.name!r}, must be a head: a product plus bias and nothing else"
        )
    for number, stage in enumerate(stages[:-1], start=1):
        if not any(number in later.uses for later in stages):
            raise ValueError(f"value {number}, of stage {stage.name!r}, is read by no stage")


def copies_input(stages: Stages) -> bool:
    """Whether the input, which may be elsewhere at each pass, is more than multiplied: its place is bound."""
    return any((not stage.product and stage.reads == 0) or stage.adds == 0 for stage in stages)


@cached
def shapes_of(stages: Stages, inputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one network's parameters by name, the kernel of a stage before its vectors; ValueError where
    `inputs`, the width of value 0, is not that of a stage that takes it as it is."""
    widths = [inputs, *(stage.outputs for stage in stages)]
    out: dict[str, tuple[int, ...]] = {}
    for stage in stages:
        if copies_input((stage,)) and stage.outputs != inputs:
            told = f"must be {stage.outputs} wide, as stage {stage.name!r} is, got {inputs}"
            raise ValueError(f"value 0, the input, {told}")
        if stage.product:
            out[f"{stage.name}.kernel"] = (widths[stage.reads], stage.outputs)
        out.update((name, (stage.outputs,)) for name in stage.vectors)
    return out


def names_of(stages: Stages) -> list[str]:
    """Of the parameters, in the order of `shapes_of`."""
    return [
        name
        for stage in stages
        for name in ([f"{stage.name}.kernel", *stage.vectors] if stage.product else stage.vectors)
    ]


def check_parameters(
    stages: Stages, parameters: Mapping[str, Tensor], told: str = "", inputs: int | None = None
) -> tuple[int, int]:
    """The passes trust shapes, so they are checked here: ValueError by the parameter's name. Returns the
    number of networks, and `inputs`, the width of value 0, which is theirs where it is not given."""
    check_stages(stages)
    for name in names_of(stages):
        if name not in parameters:
            raise ValueError(f"{told}{name} is missing")
    first = parameters[names_of(stages)[0]]  # of a stage that can read nothing but the input
    if inputs is None:
        inputs = first.shape[1] if first.dim() > 1 else 1
    networks, shapes = first.shape[0] if first.dim() else 0, shapes_of(stages, inputs)
    for name, p in parameters.items():
        if name not in shapes:
            raise ValueError(f"{told}{name} is no parameter of these stages: {', '.join(shapes)}")
        if p.shape != (networks, *shapes[name]) or not networks:
            dims = "[N, inputs, outputs]" if len(shapes[name]) == 2 else "[N, outputs]"
            wanted = [networks or "N", *shapes[name]]
            raise ValueError(f"{told}{name} must have shape {dims} = {wanted}, got {list(p.shape)}")
    return networks, inputs


def check_strides(stages: Stages, parameters: Mapping[str, Tensor], told: str = "") -> None:
    """ValueError where the vectors of a stage are not the same distances apart, or not dense."""
    for stage in stages:
        strides = {parameters[name].stride() for name in stage.vectors}
        if len(strides) > 1 or (stage.outputs > 1 and next(iter(strides))[-1] != 1):
            wanted = f"must have the same strides [.., 1], got {strides}"
            raise ValueError(f"{told}vectors of {stage.name} {wanted}")


# -- memory

Item = tuple[str, int]  # "product" or "value", and its number; the product of a stage has that of its value
Kind = tuple[str, int]  # of slots: for products or values, and of which width, 0 being that of the input
Place = tuple[Kind, int]  # a slot of its kind


@cached
def ends_of(stages: Stages) -> list[int]:
    """Numbers of the values that all later ones are made from: between two of them lies a block."""
    return [
        value for value in range(1, len(stages)) if all(min(stage.uses) >= value for stage in stages[value:])
    ]


@cached
def places_of(stages: Stages, keep: int) -> tuple[dict[Item, Place], Counter[Kind]]:
    """Where products and values lie, and the number of slots of each kind.

    What is kept has memory of its own; anything else is given out again after its last use, with KEEP_ENDS at
    the end of its block. The head's value is elsewhere, and the input where it is only multiplied.
    """
    last, ends = len(stages), ends_of(stages)
    uses = {value: number for number, stage in enumerate(stages, start=1) for value in stage.uses}
    needed = {
        number for number, stage in enumerate(stages, start=1) if stage.relu and PASSES[stage.after].in_place
    }
    needed |= {stage.reads for stage in stages if not stage.product}  # for the gradient of the input

    def until(name: str, number: int) -> int | None:
        if keep == KEEP_ALL or number == 0:
            return None
        if keep == KEEP_ENDS:
            kept = name == "value" and number in ends
            return None if kept else next(end for end in (*ends, last) if end >= number)
        if keep == KEEP_FOR_INPUT and (name == "product" or number in needed):
            return None
        return number if name == "product" else uses[number]

    places, slots = dict[Item, Place](), Counter[Kind]()
    free, ending = defaultdict[Kind, list[int]](list), defaultdict[int | None, list[Place]](list)

    def take(name: str, number: int, width: int) -> None:
        kind = name, width
        if not free[kind]:
            free[kind].append(slots[kind])
            slots[kind] += 1
        place = places[name, number] = kind, free[kind].pop(0)
        ending[until(name, number)].append(place)

    if copies_input(stages):
        take("value", 0, 0)
    for number, stage in enumerate(stages, start=1):
        if stage.product and not PASSES[stage.after].in_place:
            take("product", number, stage.outputs)
        if number < last:
            take("value", number, stage.outputs)
        for kind, slot in ending[number]:
            free[kind].append(slot)
    return places, slots


def _slot_size(networks: int, rows: int, width: int) -> int:
    return -(-networks * rows * width // SLOT) * SLOT


def memory_elements(stages: Stages, keep: int, networks: int, rows: int, inputs: int) -> int:
    """Of products and values together."""
    slots = places_of(stages, keep)[1]
    return sum(count * _slot_size(networks, rows, width or inputs) for (_, width), count in slots.items())


def stats_shape(stages: Stages, networks: int, rows: int) -> tuple[int, int, int, int]:
    return sum(PASSES[stage.after].keeps_stats for stage in stages), 2, networks, rows


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Memory(NamedTuple):
    """What a forward pass leaves, by number: products and statistics of the stages that have any, values
    [N, B, width] but the head's, and but the input where it is used where it lies."""

    products: dict[int, Tensor]
    values: dict[int, Tensor]
    stats: dict[int, Tensor]

    @classmethod
    def carve(cls, stages: Stages, keep: int, inputs: int, flat: Tensor, stats: Tensor) -> Memory:
        """Of `flat`, with `memory_elements`, and stats, of `stats_shape`."""
        places, slots = places_of(stages, keep)
        (networks, rows), start, held = stats.shape[2:], 0, dict[Place, Tensor]()
        for kind, count in slots.items():
            width = kind[1] or inputs
            for slot in range(count):
                held[kind, slot] = flat[start : start + networks * rows * width].view(networks, rows, width)
                start += _slot_size(networks, rows, width)
        products, values = (
            {number: held[place] for (kind, number), place in places.items() if kind == name}
            for name in ("product", "value")
        )
        numbers = [n for n, stage in enumerate(stages, start=1) if PASSES[stage.after].keeps_stats]
        return cls(products, values, dict(zip(numbers, stats.unbind(), strict=True)))

    def part(self, networks: int, rows: int) -> Memory:
        """That of the first networks and, of each, of the last rows."""
        products, values = ({n: x[:networks, -rows:] for n, x in own.items()} for own in self[:2])
        return Memory(products, values, {n: x[:, :networks, -rows:] for n, x in self.stats.items()})


# -- passes over it


def outputs_dtype(kernel: Tensor, device: str | None = None) -> torch.dtype:
    """Of what a head with this kernel puts out, on its own device or on one of this kind. What is made of it
    on a CPU is compiled for float32."""
    on_cpu = torch.device(device or kernel.device).type == "cpu" and not takes_kernels(None, kernel)
    return torch.float32 if on_cpu and kernel.dtype == torch.bfloat16 else kernel.dtype


def module_for(x: Tensor, alike: bool) -> Any:
    """What runs between the products of tensors like x: a module with `PASSES`. alike: whether vectors are
    float32 and gradients of the dtype of x, as the compiled passes take them."""
    if takes_kernels(None, x):
        return module("norm")
    compiled = alike and chosen(None) == "auto" and native.takes_rows(x)
    return module("passes_cpu" if compiled else "passes_plain")


@lru_cache
def module(name: str) -> Any:
    """The module of passes of this name; that of the Triton kernels takes its time to load."""
    return importlib.import_module(f".{name}", __package__)


def _bias(after: Pass, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    """What its product is made with."""
    return vectors[:1] if after.in_place else ()


def _vectors(stage: Stage, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    return [parameters[name] for name in stage.vectors]


class Given:
    """What a pass is given when it is called, and the calls that take it. A pass holds these, and they hold
    no pass, so that its memory goes with the last reference to it.

    inputs: one [N, B, I], or [B, I] of all networks, or several [B, I]. grad: [N, B, K], that of the outputs.
    columns: of the input, of which the gradient dx is wanted. multiply: of the module of passes. outputs: the
    dtype of outputs, and of the gradient of the input.
    """

    def __init__(self, multiply: Callable[..., Call], outputs: torch.dtype) -> None:
        self.multiply, self.outputs = multiply, outputs

    inputs: Sequence[Tensor]
    grad: Tensor
    columns: slice
    dx: Tensor | None = None

    def forward(self, after: Pass, places: Sequence[Sequence[Tensor]]) -> None:
        """Products of the inputs; places: kernel, out and vectors, for each of them."""
        for x, (kernel, out, *vectors) in zip(self.inputs, places, strict=True):
            self.multiply(x.expand(len(kernel), *x.shape[-2:]), kernel, out, *_bias(after, vectors))()

    def value(self, kernel: Tensor, out: Tensor) -> None:
        """The gradient of what the head multiplies."""
        self.multiply(self.grad, kernel, out)()

    def kernel(self, x: Tensor | None, dproduct: Tensor | None, out: Tensor) -> None:
        """The gradient of a kernel that multiplies x or, where that is None, the input; of the head without
        dproduct."""
        dproduct, x = self.grad if dproduct is None else dproduct, self.inputs[0] if x is None else x
        self.multiply(x.expand(len(out), *x.shape[-2:]).mT, dproduct, out)()

    def bias(self, out: Tensor) -> None:
        """The gradient of the head's."""
        sum_rows(self.grad, out)

    def sums(
        self, reduce: Callable[..., None], pieces: Tensor, vectors: list[list[Tensor]], bias: Tensor | None
    ) -> None:
        """Gradients of vectors from partial sums, and of the head's bias where it is given."""
        reduce(pieces, vectors, None if bias is None else self.grad, bias)

    def input(self, dproduct: Tensor | None, kernel: Tensor) -> None:
        """Add to the gradient of the input."""
        dproduct, kernel = self.grad if dproduct is None else dproduct, kernel[..., self.columns]
        there = self.dx is not None
        if self.dx is None:
            shape = *dproduct.shape[:2], kernel.shape[-1]
            self.dx = dproduct.new_empty(shape, dtype=self.outputs)
        self.multiply(dproduct, kernel, self.dx, add=there)()


class Forward:
    """The forward pass. Its calls have everything bound but the inputs.

    Args:
        module: of passes. out: [N, B, K] for the outputs. parts: how many inputs there are, each for an equal
            share of the networks.
    """

    def __init__(
        self,
        stages: Stages,
        parameters: Mapping[str, Tensor],
        memory: Memory,
        module: Any,
        out: Tensor,
        parts: int = 1,
    ) -> None:
        self.stages, self.parameters, self.memory, self.module = stages, parameters, memory, module
        self.out, self.parts = out, parts
        self.values = memory.values | {len(stages): out}
        self.given = Given(module.multiply, out.dtype)

    def held(self, number: int) -> Held:
        """What the pass of a stage is over."""
        stage, out = self.stages[number - 1], self.values[number]
        product = self.memory.products.get(number, out) if stage.product else self.values[stage.reads]
        added = None if stage.adds is None else self.values[stage.adds]
        stats = self.memory.stats.get(number)
        return Held(product, _vectors(stage, self.parameters), stage.relu, added, out, stats)

    def stage(self, number: int, product_alone: bool = False) -> list[Call]:
        """The calls of one stage, whose value is not made anew with `product_alone`."""
        stage, held, calls = self.stages[number - 1], self.held(number), list[Call]()
        after: Pass = self.module.PASSES[stage.after]
        if stage.product and not (product_alone and after.in_place):
            product, kernel = held.product, self.parameters[f"{stage.name}.kernel"]
            if stage.reads in self.values:
                bias = _bias(after, held.vectors)
                calls.append(self.module.multiply(self.values[stage.reads], kernel, product, *bias))
            else:
                places = zip(*(y.chunk(self.parts) for y in (kernel, product, *held.vectors)), strict=True)
                calls.append(partial(self.given.forward, after, list(places)))
        call = None if product_alone else after.forward(held)
        return calls if call is None else [*calls, call]

    @cached_property
    def calls(self) -> list[Call]:
        return [call for number in range(1, len(self.stages) + 1) for call in self.stage(number)]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """[N, B, K] of one [N, B, I], or of several [B, I]."""
        self.given.inputs = inputs
        if 0 in self.values:
            for x, place in zip(inputs, self.values[0].chunk(self.parts), strict=True):
                place.copy_(x)
        for call in self.calls:
            call()
        del self.given.inputs
        return self.out


class Backward:
    """The backward pass, into `gradients` where they are wanted. Its calls have everything bound but the
    input and the gradient of the outputs.

    Args:
        forward: of the same networks and rows, whose memory is read. gradients: by name, as the parameters.
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
        self.forward, self.gradients, self.new = forward, gradients, new
        self.stages, self.values, self.given = forward.stages, forward.values, forward.given
        self.wants_input = wants_input
        self.calls: list[Call] = []
        self.ending: list[Call] = []  # what is one launch for several stages
        self.slots: list[Tensor] = []  # kept: calls may hold addresses alone
        self.arrived: dict[int, Tensor] = {}  # gradients that have reached a value
        self.pieces: dict[int, Tensor] = {}
        self.dproducts: dict[int, Tensor] = {}
        if gradients is not None:
            if batched and not recomputes:
                self._batch_products(gradients)
            self._batch_sums(gradients)
        head, ends = self.stages[-1], ends_of(self.stages)
        self._kernel(head, None)
        if gradients is not None and not self.pieces:
            self.calls.append(partial(self.given.bias, gradients[f"{head.name}.bias"]))
        self._arrive(head.reads, None, forward.parameters[f"{head.name}.kernel"].mT)
        for number in reversed(range(1, len(self.stages))):
            if recomputes and number in ends[:-1]:
                first = max((end for end in ends if end < number), default=0) + 1
                for again in range(first, number + 1):
                    self.calls += forward.stage(again, product_alone=again == number)
            self._stage(number)
        self.calls += self.ending
        self.made = self.arrived.get(0)  # the input's gradient, where that has a place

    # what is one launch for several stages

    def _alike(self, key: Callable[[Stage, Pass], Any]) -> list[list[int]]:
        """Numbers of the stages, but the head, with the same key; those with none are left out."""
        out = defaultdict(list)
        for number, stage in enumerate(self.stages[:-1], start=1):
            out[key(stage, self.forward.module.PASSES[stage.after])].append(number)
        return [numbers for found, numbers in out.items() if found]

    def _batch_products(self, gradients: Mapping[str, Tensor]) -> None:
        """Gradients of products that stay until the end, where kernels' gradients become one product."""

        def key(stage: Stage, after: Pass) -> Any:
            if stage.product and stage.reads in self.values and after.writes(stage.relu):
                return self.values[stage.reads].shape[-1], stage.outputs
            return None

        for numbers in self._alike(key):
            stages = [self.stages[number - 1] for number in numbers]
            below = spaced([self.values[stage.reads] for stage in stages])
            into = spaced([gradients[f"{stage.name}.kernel"] for stage in stages])
            if len(numbers) > 1 and below is not None and into is not None:
                above = self.new(len(numbers), *self.forward.out.shape[:2], stages[0].outputs)
                self.dproducts |= zip(numbers, above.unbind(), strict=True)
                self.ending.append(partial(_products, below, above, into))

    def _batch_sums(self, gradients: Mapping[str, Tensor]) -> None:
        """Sums over rows that come in pieces: one launch for all stages of a pass and width."""
        module = self.forward.module
        for numbers in self._alike(lambda stage, after: after.partial_sums and (stage.after, stage.outputs)):
            stages, out = [self.stages[number - 1] for number in numbers], self.values[numbers[0]]
            pieces = module.partials(len(numbers), *out.shape, out)
            bias = None if self.pieces else gradients[f"{self.stages[-1].name}.bias"]
            self.pieces |= zip(numbers, pieces.unbind(), strict=True)
            vectors = [_vectors(stage, gradients) for stage in stages]
            self.ending.append(partial(self.given.sums, module.reduce, pieces, vectors, bias))

    # one stage

    def _slot(self, width: int, *busy: Tensor | None) -> Tensor:
        """Memory that holds nothing that is still needed."""
        for slot in self.slots:
            if slot.shape[-1] == width and all(slot is not x for x in (*self.arrived.values(), *busy)):
                return slot
        self.slots.append(self.new(*self.forward.out.shape[:2], width))
        return self.slots[-1]

    def _wanted(self, value: int) -> bool:
        return value > 0 or self.wants_input

    def _arrive(self, value: int, dproduct: Tensor | None, kernel: Tensor) -> None:
        """Add dproduct @ kernel to the gradient of a value; dproduct None is the gradient of the outputs."""
        there, multiply = self.arrived.get(value), self.forward.module.multiply
        if not self._wanted(value):
            return
        if value not in self.values:
            self.calls.append(partial(self.given.input, dproduct, kernel))
        elif there is None or dproduct is None:
            out = self.arrived[value] = self._slot(kernel.shape[-1], dproduct)
            if dproduct is None:
                self.calls.append(partial(self.given.value, kernel, out))
            else:
                self.calls.append(multiply(dproduct, kernel, out))
        elif there is dproduct:  # of a stage without a ReLU that adds what it reads
            out = self.arrived[value] = self._slot(kernel.shape[-1], dproduct)
            self.calls += [partial(out.copy_, there), multiply(dproduct, kernel, out, add=True)]
        else:
            self.calls.append(multiply(dproduct, kernel, there, add=True))

    def _add(self, value: int, gradient: Tensor) -> bool:
        """Add a gradient to that of a value; whether it is that from now on."""
        if not self._wanted(value):
            return False
        if value in self.arrived:
            self.calls.append(partial(self.arrived[value].add_, gradient))
            return False
        self.arrived[value] = gradient
        return True

    def _stage(self, number: int) -> None:
        stage, gradient = self.stages[number - 1], self.arrived.pop(number)
        after: Pass = self.forward.module.PASSES[stage.after]
        handed_on = stage.adds is not None and self._add(stage.adds, gradient)
        dproduct = gradient
        if number in self.dproducts:
            dproduct = self.dproducts[number]
        elif handed_on and after.writes(stage.relu):
            dproduct = self._slot(stage.outputs)
        into = None if self.gradients is None else _vectors(stage, self.gradients)
        call = after.backward(self.forward.held(number), gradient, dproduct, into, self.pieces.get(number))
        if call is not None:
            self.calls.append(call)
        if not stage.product:
            self._add(stage.reads, dproduct)
            return
        if number not in self.dproducts:
            self._kernel(stage, dproduct)
        self._arrive(stage.reads, dproduct, self.forward.parameters[f"{stage.name}.kernel"].mT)

    def _kernel(self, stage: Stage, dproduct: Tensor | None) -> None:
        if self.gradients is None:
            return
        x, out = self.values.get(stage.reads), self.gradients[f"{stage.name}.kernel"]
        if x is None or dproduct is None:
            self.calls.append(partial(self.given.kernel, x, dproduct, out))
        else:
            self.calls.append(self.forward.module.multiply(x.mT, dproduct, out))

    def __call__(self, grad: Tensor, x: Tensor, columns: slice = slice(None)) -> Tensor | None:
        """The gradient of x [N, B, I] in these columns, where it is wanted; in memory that stays where the
        input is copied.

        Args:
            grad: [N, B, K], contiguous. x: [N, B, I], or [B, I] of all networks.
        """
        given = self.given
        given.inputs, given.grad, given.columns = (x,), grad, columns
        for call in self.calls:
            call()
        dx = given.dx if self.made is None else self.made[..., columns]
        del given.inputs, given.grad
        given.dx = None
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
        self.stages, self.rows, self.gradients = tuple(stages), rows, gradients
        self.parameters = {name: p.detach() for name, p in parameters.items()}
        networks, self.inputs = check_parameters(self.stages, self.parameters)
        check_strides(self.stages, self.parameters)
        self.trained = networks
        if gradients is not None:
            self.trained, _ = check_parameters(self.stages, gradients, "the gradient of ", self.inputs)
            check_strides(self.stages, gradients, "gradients of ")
            if self.trained > networks:
                raise ValueError(f"gradients must be of 1 to N = {networks} networks, got {self.trained}")
        self.trained_rows = rows if trained_rows is None else trained_rows
        if not 0 < self.trained_rows <= rows:
            raise ValueError(f"trained_rows must be from 1 to B = {rows}, got {self.trained_rows}")
        if networks > 1 and self.trained_rows < rows:  # a pass over some of their rows has gaps
            raise ValueError(
                f"trained_rows must be B = {rows} with N = {networks} networks, got {trained_rows}"
            )
        head = self.parameters[f"{self.stages[-1].name}.kernel"]
        self.dtype = head.dtype
        self.out = head.new_empty(networks, rows, head.shape[-1], dtype=outputs_dtype(head))
        self._own, self.recompute = [self.out], recompute
        if share is None:
            keep = KEEP_ENDS if recompute else KEEP_ALL
            flat = head.new_empty(memory_elements(self.stages, keep, networks, rows, self.inputs))
            stats = head.new_empty(stats_shape(self.stages, networks, rows), dtype=wide(head.dtype))
            self.memory = Memory.carve(self.stages, keep, self.inputs, flat, stats)
            self._own += [flat, stats]
        else:
            mine, theirs = (
                (self.stages, self.inputs, self.dtype),
                (share.stages, share.inputs, share.dtype),
            )
            if mine != theirs or len(share.out) < networks or share.rows < rows:
                wanted = f"the same stages, inputs and dtype, N >= {networks} networks and B >= {rows} rows"
                raise ValueError(f"share must have {wanted}, got N = {len(share.out)} and B = {share.rows}")
            self.memory, self.recompute = share.memory.part(networks, rows), share.recompute
        self._alike = all(p.dtype == torch.float32 for p in self.parameters.values() if p.dim() == 2) and all(
            g.dtype == self.dtype for g in (gradients or {}).values()
        )
        self._forward: dict[tuple[int, Any], Forward] = {}
        self._backward: dict[tuple[Any, bool], Backward] = {}
        self._inputs: Sequence[Tensor] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Without what was looked up for the passes: it holds addresses, which are not those of a copy."""
        return {**self.__dict__, "_forward": {}, "_backward": {}}

    def bytes(self, device: str) -> int:
        """Memory of its own on a device of this kind, that of the backward pass included, but for the partial
        sums of norms, and zeros in place of a bias."""
        head = self.parameters[f"{self.stages[-1].name}.kernel"]
        out = self.out.new_empty(self.out.shape, dtype=outputs_dtype(head, device), device="meta")
        held = [out, *self._own[1:]]

        def new(*shape: int) -> Tensor:
            held.append(self.out.new_empty(shape, dtype=self.dtype, device="meta"))
            return held[-1]

        batched = torch.device(device).type == "cuda"
        self._reversed(module("passes_plain"), new, wants_input=True, batched=batched)
        return sum(x.numel() * x.element_size() for x in held)

    def _reversed(
        self, module: Any, new: Callable[..., Tensor], wants_input: bool, batched: bool
    ) -> Backward:
        """The backward pass over the networks and rows that are trained."""
        memory = self.memory.part(self.trained, self.trained_rows)
        parameters = {name: p[: self.trained] for name, p in self.parameters.items()}
        out = self.out[: self.trained, -self.trained_rows :]
        forward = Forward(self.stages, parameters, memory, module, out)
        return Backward(forward, self.gradients, wants_input, new, batched, self.recompute)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Outputs [N, B, K], overwritten by the next call: on a CPU, those of bfloat16 networks in float32.

        Args:
            inputs: one [B, I] for all networks, or several, each for an equal share of them in order; they
                must stay as they are until the backward pass.
        """
        parts = len(inputs)
        for x in inputs:  # torch would make the memory larger and go on, or repeat a column
            if x.shape != (self.rows, self.inputs):
                wanted = [self.rows, self.inputs]
                raise ValueError(f"inputs must have shape [B, I] = {wanted}, got {list(x.shape)}")
            if x.dtype != self.dtype:
                raise TypeError(f"inputs must be of {self.dtype}, got {x.dtype}")
        if not parts or len(self.out) % parts:
            raise ValueError(f"inputs must share N = {len(self.out)} networks equally, got {parts}")
        self._inputs = inputs
        module = module_for(inputs[0], self._alike)
        run = self._forward.get((parts, module))
        if run is None:
            run = Forward(self.stages, self.parameters, self.memory, module, self.out, parts)
            self._forward[parts, module] = run
        return run(*inputs)

    def backward(self, grad: Tensor, columns: slice | None = None) -> Tensor | None:
        """Fill the gradients of the first G networks; returns those of their input where they are wanted.

        Args:
            grad: [G, R, K], contiguous, of what `forward` returned for them, in its dtype or in that of the
                parameters.
            columns: of the input, C of them, of which a gradient is wanted; None for none.
        Returns:
            [G, R, C]: each network's own, to be summed where they had one input. Where a stage adds or norms
            the input, the next call overwrites it.
        """
        if not self._inputs:
            raise RuntimeError("a backward pass needs a forward pass before it")
        wanted = (self.trained, self.trained_rows, self.out.shape[-1])
        if grad.shape != wanted or not grad.is_contiguous():
            told = f"{list(grad.shape)}, strides {list(grad.stride())}"
            raise ValueError(f"grad must have shape [G, R, K] = {list(wanted)} and no gaps, got {told}")
        if self.trained > len(self.out) // len(self._inputs):
            raise ValueError("networks with gradients must all take the first input")
        grad = grad if grad.dtype == self.dtype else rounded(grad, self.dtype)
        module = module_for(grad, self._alike)
        run = self._backward.get((module, columns is not None))
        if run is None:
            new = partial(self.out.new_empty, dtype=self.dtype)
            run = self._reversed(module, new, columns is not None, module.BATCHED)
            self._backward[module, columns is not None] = run
        x = self._inputs[0][-self.trained_rows :]
        return run(grad, x, slice(None) if columns is None else columns)
