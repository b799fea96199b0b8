"""The record that passes between replay, normalizer and agent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor


def require_shape(name: str, x: Tensor, letters: str, shape: tuple[int, ...]) -> None:
    """ValueError with what was wanted, in letters and numbers."""
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {letters} = {list(shape)}, got {list(x.shape)}")


def sent(x: Tensor, device: str | torch.device) -> Tensor:
    """`x` on `device`. Only a copy to a GPU is not waited for: what reads it there comes later in the stream,
    and torch keeps pinned memory until it is read. The CPU would read memory that is not filled yet."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")


class Batch(NamedTuple):
    """Transitions for one update ([B, ...]) or for U updates ([U, B, ...]).

    ================== ============ ======== ==================================================
    field              shape        dtype    meaning
    ================== ============ ======== ==================================================
    observations       [.., B, O]   float32  what the policy saw, zero-padded to the widest task
    actions            [.., B, A]   float32  what it did, in [-1, 1]
    rewards            [.., B]      float32  raw from the replay; divided by the task's scale for the agent
    masks              [.., B]      float32  0 where the task truly ended, 1 otherwise (a time limit is 1)
    next_observations  [.., B, O]   float32  where the action really led, also at the end of an episode
    task_ids           [.., B]      int64    0 <= id < T
    extras             by name               further columns; none are needed for an update
    ================== ============ ======== ==================================================

    A replay gives as extras, beside the fields of its own that it was made with:

    ================== ============ ======== ==================================================
    terminated         [.., B]      bool     the task ended with this transition, and masks is 0
    truncated          [.., B]      bool     the episode was cut after it
    steps              [.., B]      int64    m, the steps that were summed
    indices            [.., B]      int64    what the replay calls it: `replay[indices]`
    weights            [.., B]      float32  importance, where it was sampled by priority
    ================== ============ ======== ==================================================

    Sampled with several steps, `rewards` holds sum_i discount^i r_i over the m steps that were made,
    `next_observations` is where the last led, as are `terminated` and `truncated` of that, and `masks` is
    discount^(m-1) instead of 1, so that the target is rewards + discount * masks * value(next_observations)
    for every m. A replay may hold other shapes and dtypes of observations and actions; the agent takes those
    above. Of a replay whose observations have names, both columns are dicts.

    It is a tuple of tensors and one dict, for jax.tree.map, torch's pytree and default_collate.
    """

    observations: Any  # Tensor, or a dict of them
    actions: Tensor
    rewards: Tensor
    masks: Tensor
    next_observations: Any
    task_ids: Tensor
    extras: Mapping[str, Tensor] = {}

    @property
    def terminated(self) -> Tensor:
        return self.extras["terminated"]

    @property
    def truncated(self) -> Tensor:
        return self.extras["truncated"]

    @property
    def steps(self) -> Tensor:
        return self.extras["steps"]

    @property
    def indices(self) -> Tensor:
        return self.extras["indices"]

    @property
    def weights(self) -> Tensor:
        return self.extras["weights"]

    def __getitem__(self, place: Any) -> Any:
        """An element of the tuple. TypeError for a slice, which would be of columns and not of rows."""
        if isinstance(place, slice):
            raise TypeError(
                "a Batch has columns, not rows: take rows of each by batch.map(lambda x: x[rows])"
            )
        return tuple.__getitem__(self, place)

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The six that an update takes."""
        return tuple(self)[:-1]

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [x for value in self for x in (value.values() if isinstance(value, Mapping) else (value,))]

    def map(self, function: Callable[[Tensor], Any]) -> Batch:
        """The batch of what `function` makes of each tensor."""

        def each(value: Any) -> Any:
            return (
                {name: function(x) for name, x in value.items()}
                if isinstance(value, Mapping)
                else function(value)
            )

        return Batch(*map(each, self))

    def check(self, observation_size: int, action_size: int, num_tasks: int) -> None:
        """ValueError unless these are U batches [U, B, ...] of an agent of these sizes, TypeError for task
        ids that are no integers.

        Task ids are looked at where they are on the host; a GPU would have to be waited for.
        """
        if self.rewards.dim() != 2 or not self.rewards.numel():
            raise ValueError(f"rewards must have shape [U, B], got {list(self.rewards.shape)}")
        rows = tuple(self.rewards.shape)
        sizes = {"observations": ("O", observation_size), "actions": ("A", action_size)}
        sizes["next_observations"] = sizes["observations"]
        for name, field in zip(self._fields, self.columns, strict=False):
            letter, size = sizes.get(name, ("", 0))
            if letter:
                require_shape(name, field, f"[U, B, {letter}]", (*rows, size))
            else:
                require_shape(name, field, "[U, B]", rows)
        if num_tasks > 1 and self.task_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"task_ids must be of dtype torch.int64, got {self.task_ids.dtype}")
        if self.task_ids.is_cpu:
            ids = self.task_ids.numpy()
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= num_tasks:
                raise ValueError(
                    f"task_ids must be in [0, T) = [0, {num_tasks}), got {low if low < 0 else high}"
                )

    def updates(self) -> Batch:
        """[U, B, ...]: itself, or the one update that a batch [B, ...] is for."""
        one = all(field.dim() == 1 for field in (self.rewards, self.masks, self.task_ids))
        return self.map(lambda field: field.unsqueeze(0)) if one else self

    def update(self, index: int) -> Batch:
        """The [B, ...] batch of one of the U updates of a batch [U, B, ...]."""
        if self.rewards.dim() != 2:
            raise ValueError(f"update takes one of U updates [U, B], got rewards {list(self.rewards.shape)}")
        return self.map(lambda field: field[index])

    def to(self, device: str | torch.device) -> Batch:
        """The same transitions on `device`.

        This batch may be dropped at once. A copy to a GPU is queued in the current stream: synchronize with
        that before you write into this batch.
        """
        return self.map(lambda field: sent(field, device))

    def numpy(self) -> dict[str, NDArray[Any]]:
        """Arrays by name on the same memory, extras among them, for JAX and others.

        TypeError on a GPU and for bfloat16.

        Hold them while another library copies from them: torch does not know of it.
        """
        named = self.map(Tensor.numpy)._asdict()
        extras: dict[str, NDArray[Any]] = named.pop("extras")
        return named | extras
