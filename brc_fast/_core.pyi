import numpy as np
from numpy.typing import NDArray

def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]: ...

class ReplayStore:
    def __init__(
        self,
        capacity: int,
        observation_size: int,
        action_size: int,
        task_ids: NDArray[np.int64],
        seed: int,
    ) -> None: ...
    def add(
        self,
        streams: NDArray[np.int64],
        observations: NDArray[np.float32],
        actions: NDArray[np.float32],
        rewards: NDArray[np.float32],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        successors: NDArray[np.float32],
    ) -> None: ...
    def sample(
        self,
        observations: NDArray[np.float32],
        actions: NDArray[np.float32],
        rewards: NDArray[np.float32],
        masks: NDArray[np.float32],
        next_observations: NDArray[np.float32],
        task_ids: NDArray[np.int64],
    ) -> None: ...
    def read(
        self,
        stream: int,
        age: int,
        observations: NDArray[np.float32],
        actions: NDArray[np.float32],
        rewards: NDArray[np.float32],
        masks: NDArray[np.float32],
        next_observations: NDArray[np.float32],
        task_ids: NDArray[np.int64],
    ) -> None: ...
    def save(
        self,
        sizes: NDArray[np.int64],
        observations: NDArray[np.float32],
        actions: NDArray[np.float32],
        rewards: NDArray[np.float32],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        has_successor: NDArray[np.bool_],
        successors: NDArray[np.float32],
        heads: NDArray[np.float32],
        head_valid: NDArray[np.bool_],
    ) -> None: ...
    def load(
        self,
        seed: int,
        draws: int,
        sizes: NDArray[np.int64],
        observations: NDArray[np.float32],
        actions: NDArray[np.float32],
        rewards: NDArray[np.float32],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        has_successor: NDArray[np.bool_],
        successors: NDArray[np.float32],
        heads: NDArray[np.float32],
        head_valid: NDArray[np.bool_],
    ) -> None: ...
    def sizes(self) -> NDArray[np.int64]: ...
    def capacities(self) -> NDArray[np.int64]: ...
    @property
    def size(self) -> int: ...
    @property
    def side_size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def draws(self) -> int: ...
