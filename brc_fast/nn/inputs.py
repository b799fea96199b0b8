"""What networks are given in place of raw observations.

Dims: N environments, O observation, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brc_fast.batch import require_shape

Moments = tuple[Tensor, Tensor]  # of each task, [T, O]: the mean, and 1 / sqrt(variance + eps)


class ObservationStatistics:
    """Running mean and variance of each task's observations, over all environments and from the first on.

        x -> (x - mean) / sqrt(variance + eps)

    Observations of a task that has shown none yet stay as they are: mean 0, variance 1. A column that never
    changed becomes 0, as do those that a narrower task is padded with.

    Differs from SimBa: there every variance is also that of 1e-4 observations with variance 1.

    Args:
        observation_size: O. num_tasks: T. device: where the statistics are, and where `normalize` works.
        dtype: of what `normalize` is given. eps: SimBa's code has 1e-8.

    Attributes:
        count: [T, 1], observations taken in. mean, variance: [T, O]. All are float64.
        moments: what `normalize` needs, in dtype. `update` makes new tensors and leaves these as they are, so
            that a learner that runs at the same time may go on reading them.

    Source: Lee et al. 2024, "SimBa", arXiv:2410.09754; batches are merged as Chan, Golub and LeVeque 1979 do.
    """

    def __init__(
        self,
        observation_size: int,
        num_tasks: int = 1,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        eps: float = 1e-8,
    ) -> None:
        self.observation_size, self.num_tasks, self.dtype, self.eps = observation_size, num_tasks, dtype, eps
        self.count = torch.zeros(num_tasks, 1, dtype=torch.float64, device=device)
        self.mean = torch.zeros(num_tasks, observation_size, dtype=torch.float64, device=device)
        self.variance = torch.ones_like(self.mean)
        self.moments = self._moments()

    def _moments(self) -> Moments:
        return self.mean.to(self.dtype), (self.variance + self.eps).rsqrt().to(self.dtype)

    @torch.no_grad()
    def update(self, observations: Tensor, task_ids: Tensor | None = None) -> None:
        """Take in observations [N, O] of tasks [N] (of the only one by default).

        ValueError for other shapes, task ids out of range and numbers that are not finite; then nothing has
        changed. It waits for the device that holds the observations.
        """
        require_shape("observations", observations, "[N, O]", (len(observations), self.observation_size))
        ids = torch.zeros(len(observations), dtype=torch.int64) if task_ids is None else task_ids
        require_shape("task_ids", ids, "[N]", (len(observations),))
        if wrong := _first((ids < 0) | (ids >= self.num_tasks)):
            raise ValueError(f"task_ids must be in [0, T) = [0, {self.num_tasks}), got {ids[wrong]}")
        if wrong := _first(~observations.isfinite()):
            row, column = wrong
            raise ValueError(
                f"observations must be finite to be normalized, got {observations[wrong]} in row {row}, "
                f"column {column}, of task {ids[row]}; leave such rows out"
            )
        ids, x = ids.to(self.mean.device), observations.to(self.mean.device, torch.float64)
        rows = (ids == torch.arange(self.num_tasks, device=ids.device)[:, None]).double()  # [T, N]
        count = rows.sum(1, keepdim=True)
        mean = rows @ x / count.clamp_min(1)
        squares = rows @ (x - mean[ids]).square()
        total = self.count + count
        share, apart = count / total.clamp_min(1), mean - self.mean
        squares += self.variance * self.count + apart.square() * self.count * share
        self.mean = self.mean + apart * share
        self.variance = torch.where(total > 0, squares / total.clamp_min(1), self.variance)
        self.count = total
        self.moments = self._moments()

    def normalize(
        self, observations: Tensor, task_ids: Tensor | None = None, moments: Moments | None = None
    ) -> Tensor:
        """Observations [..., O] of tasks [...], or their first columns, as networks get them; `moments`:
        others than the newest."""
        columns = observations.shape[-1]
        mean, rate = (x[:, :columns] for x in (self.moments if moments is None else moments))
        if self.num_tasks == 1:
            return (observations - mean[0]) * rate[0]
        if task_ids is None:
            raise ValueError(f"task_ids are needed to normalize the observations of {self.num_tasks} tasks")
        return (observations - mean[task_ids]) * rate[task_ids]

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count, "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`, exactly; ValueError names the first entry that does not fit."""
        for name, mine in self.state_dict().items():
            if name not in state:
                raise ValueError(f"observation statistics lack {name}")
            require_shape(f"observation statistics' {name}", state[name], "[T, ...]", tuple(mine.shape))
            least = -torch.inf if name == "mean" else 0.0
            if not (state[name].isfinite() & (state[name] >= least)).all():
                rule = "finite" if name == "mean" else "finite and 0 or more"
                raise ValueError(f"observation statistics' {name} must be {rule}")
        for name, mine in self.state_dict().items():
            setattr(self, name, state[name].to(mine.device, torch.float64, copy=True))
        self.moments = self._moments()


def _first(wrong: Tensor) -> tuple[int, ...]:
    """Where the first is true; () where none is."""
    return tuple(wrong.nonzero()[0].tolist()) if wrong.any() else ()
