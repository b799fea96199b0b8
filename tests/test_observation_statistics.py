"""Running statistics of observations: exact, and of each task."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from brc_fast.nn.inputs import ObservationStatistics

O, T = 5, 3  # noqa: E741


def shown(rows: int, tasks: int = T, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Observations far from mean 0 and variance 1, others for each task; the last column of task 0 is 0."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(tasks, (rows,), generator=rng)
    scale, place = torch.logspace(-1, 3, O), torch.linspace(-100, 1000, O)
    observations = (torch.randn(rows, O, generator=rng) * scale + place) * (1.0 + ids[:, None])
    observations[ids == 0, -1] = 0.0
    return observations, ids


# the class


@pytest.mark.parametrize("parts", [1, 7, 500])
@pytest.mark.parametrize("tasks", [1, T])
def test_statistics_of_parts_are_those_of_all_observations(tasks: int, parts: int) -> None:
    observations, ids = shown(500, tasks)
    mine = ObservationStatistics(O, tasks)
    for part, part_ids in zip(observations.chunk(parts), ids.chunk(parts), strict=True):
        mine.update(part, part_ids)
    for task in range(tasks):
        rows = observations[ids == task].double()
        assert mine.count[task].item() == len(rows)
        torch.testing.assert_close(mine.mean[task], rows.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.variance[task], rows.var(0, correction=0), rtol=1e-9, atol=1e-18)


def test_observations_far_from_zero_keep_their_variance() -> None:
    """A mean of squares less the square of the mean would lose most of it, in float32 all."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(1e6, 1.0, (4000, O)))
    mine = ObservationStatistics(O, dtype=torch.float64)
    for part in values.chunk(400):
        mine.update(part)
    torch.testing.assert_close(mine.variance[0], values.var(0, correction=0), rtol=1e-8, atol=0.0)
    assert abs(mine.normalize(values).std().item() - 1.0) < 1e-3


@pytest.mark.parametrize("shape", [(30,), (3, 10), (2, 3, 5)])
def test_normalized_observations_have_mean_0_and_variance_1_in_each_task(shape: tuple[int, ...]) -> None:
    observations, ids = shown(30)
    mine = ObservationStatistics(O, T)
    mine.update(observations, ids)
    out = mine.normalize(observations.view(*shape, O), ids.view(shape)).view(30, O)
    assert out.dtype == torch.float32
    for task in range(T):
        rows, raw = out[ids == task].double(), observations[ids == task].double()
        wanted = (raw - raw.mean(0)) / (raw.var(0, correction=0) + 1e-8).sqrt()
        torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-4)
    assert (out[ids == 0, -1] == 0.0).all()  # padding


def test_padding_and_columns_that_never_change_become_zero() -> None:
    observations = torch.tensor([[0.0, 0.1, 3.0]]).repeat(1000, 1)
    observations[:, 2] += torch.arange(1000)
    mine = ObservationStatistics(3, 2)
    for part in observations.split(37):
        mine.update(part, torch.ones(len(part), dtype=torch.int64))
    out = mine.normalize(observations, torch.ones(1000, dtype=torch.int64))
    assert (out[:, :2] == 0.0).all()
    torch.testing.assert_close(out[:, 2].var(), torch.tensor(1.0), rtol=1e-2, atol=0.0)


def test_a_task_that_has_shown_nothing_is_given_as_it_is() -> None:
    mine = ObservationStatistics(O, 2)
    x = torch.randn(4, O)
    ids = torch.tensor([0, 0, 1, 1])
    assert torch.equal(mine.normalize(x, ids), x)
    mine.update(x[:2], ids[:2])
    mine.update(x[:0], ids[:0])
    assert torch.equal(mine.normalize(x, ids)[2:], x[2:])
    assert not torch.equal(mine.normalize(x, ids)[:2], x[:2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_and_changes_nothing(value: float) -> None:
    mine = ObservationStatistics(O, T)
    mine.update(*shown(20))
    before = {name: x.clone() for name, x in mine.state_dict().items()}
    observations, ids = shown(20, seed=1)
    observations[7, 3] = value
    told = rf"observations must be finite .* got {value} in row 7, column 3, of task {ids[7]}; leave"
    with pytest.raises(ValueError, match=told) as error:
        mine.update(observations, ids)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], x) for name, x in mine.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((torch.zeros(4, O + 1), torch.zeros(4).long()), r"\[N, O\] = \[4, 5\], got \[4, 6\]"),
        ((torch.zeros(2, 4, O), torch.zeros(4).long()), r"\[N, O\] = \[2, 5\], got \[2, 4, 5\]"),
        ((torch.zeros(4, O), torch.zeros(3).long()), r"task_ids must have shape \[N\] = \[4\], got \[3\]"),
        ((torch.zeros(4, O), torch.tensor([0, 1, 2, 3])), r"task_ids must be in \[0, T\) = \[0, 3\), got 3"),
        ((torch.zeros(1, O), torch.tensor([-1])), r"task_ids must be in \[0, T\) = \[0, 3\), got -1"),
    ],
)
def test_observations_that_do_not_fit_are_refused(arguments: tuple[Tensor, Tensor], told: str) -> None:
    mine = ObservationStatistics(O, T)
    with pytest.raises(ValueError, match=told):
        mine.update(*arguments)
    assert not mine.count.any()


def test_several_tasks_need_task_ids() -> None:
    with pytest.raises(ValueError, match="task_ids are needed to normalize the observations of 3 tasks"):
        ObservationStatistics(O, T).normalize(torch.zeros(2, O))


def test_a_state_goes_on_bit_for_bit_and_one_of_another_size_is_refused() -> None:
    mine, other = ObservationStatistics(O, T), ObservationStatistics(O, T)
    mine.update(*shown(20))
    other.load_state_dict(copy.deepcopy(mine.state_dict()))
    for each in (mine, other):
        each.update(*shown(20, seed=1))
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in mine.state_dict().items())
    assert all(map(torch.equal, mine.moments, other.moments))
    with pytest.raises(ValueError, match=r"observation statistics' mean must have .* \[3, 6\], got \[3, 5\]"):
        ObservationStatistics(O + 1, T).load_state_dict(mine.state_dict())
    with pytest.raises(ValueError, match="observation statistics lack variance"):
        other.load_state_dict({"count": mine.count, "mean": mine.mean})
