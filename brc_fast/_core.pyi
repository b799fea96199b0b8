from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Segment = tuple[int, str, dict[str, Any]]

def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]: ...
def crc32c(data: bytes) -> int: ...

class Kind(Enum):
    integer = ...
    float16 = ...
    bfloat16 = ...
    float32 = ...

class Field:
    def __init__(self, name: str, nbytes: int, item: int, kind: Kind) -> None: ...

class Layout:
    def __init__(self, observation: Field, fields: Sequence[Field], stack: int) -> None: ...
    offsets: list[int]
    reward: int
    used: int
    stride: int

class Request:
    def __init__(
        self, n_step: int, discount: float, tasks: Sequence[int], weights: Sequence[float]
    ) -> None: ...
    powers: list[float]

class Ahead: ...

class ReplayStore:
    def __init__(
        self,
        layout: Layout,
        capacities: Sequence[int],
        task_ids: Sequence[int],
        seed: int,
        allow_not_finite: bool,
        observation: tuple[int, Sequence[int]],
        action: tuple[int, Sequence[int]],
    ) -> None: ...
    def try_add(
        self,
        streams: object,
        observations: object,
        actions: object,
        rewards: object,
        terminated: object,
        truncated: object,
        successors: object,
        /,
    ) -> bool: ...
    def add(
        self,
        streams: NDArray[np.int64],
        observations: Array,
        fields: Sequence[Array],
        rewards: NDArray[np.float32],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        successors: Array,
    ) -> None: ...
    def sample(
        self, request: Request, num_batches: int, batch_size: int, columns: Sequence[Array], /
    ) -> None: ...
    def gather_ahead(
        self,
        request: Request,
        draw: int,
        num_batches: int,
        batch_size: int,
        columns: Sequence[Array],
        ahead: Ahead,
        /,
    ) -> None: ...
    def settle(
        self, request: Request, num_batches: int, batch_size: int, columns: Sequence[Array], ahead: Ahead, /
    ) -> int: ...
    def read(self, stream: int, age: int, request: Request, columns: Sequence[Array], /) -> None: ...
    def write_segment(self, file: int, start: Sequence[int]) -> dict[str, Any]: ...
    def load(self, content: dict[str, Any], segments: Sequence[Segment], seed: int) -> None: ...
    def adopt(self, index: DeviceIndex, /) -> None: ...
    def rows(self, first: int, count: int, /) -> NDArray[np.uint8]: ...
    def slot(self, slot: int, /) -> NDArray[np.uint8]: ...
    def sizes(self) -> NDArray[np.int64]: ...
    def capacities(self) -> NDArray[np.int64]: ...
    @property
    def size(self) -> int: ...
    @property
    def side_size(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def draws(self) -> int: ...

class DeviceIndex:
    def __init__(self, capacities: Sequence[int], task_ids: Sequence[int], stack: int, seed: int) -> None: ...
    def heads(self, streams: NDArray[np.int64], rows: NDArray[np.int64]) -> None: ...
    def add(
        self,
        streams: NDArray[np.int64],
        departs: NDArray[np.bool_],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        rows: NDArray[np.int64],
        moved: NDArray[np.int64],
        successors: NDArray[np.int64],
    ) -> None: ...
    def plan(
        self,
        request: Request,
        num_batches: int,
        batch_size: int,
        steps: NDArray[np.int64],
        observations: NDArray[np.int64],
        successors: NDArray[np.int64],
        masks: NDArray[np.float32],
        task_ids: NDArray[np.int64],
    ) -> None: ...
    def adopt(self, store: ReplayStore, /) -> None: ...
    def sizes(self) -> NDArray[np.int64]: ...
    @property
    def rows(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def side_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def draws(self) -> int: ...
