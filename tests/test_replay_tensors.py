"""Tensors are stored as what they say, whether the compiled store or Python looks at them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from brc_fast import Field, ReplayBuffer, _core
from brc_fast.replay import arena

STREAMS, OBSERVATION, ACTION = 3, 5, 2
OFFERED = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def step(dtype: torch.dtype = torch.float32, streams: int = STREAMS) -> dict[str, Tensor]:
    numbers = torch.randn(2, streams, OBSERVATION, generator=torch.Generator().manual_seed(0)) * 100
    return {
        "observations": numbers[0].to(dtype),
        "actions": numbers[1, :, :ACTION].contiguous(),
        "rewards": numbers[1, :, ACTION].contiguous(),
        "terminated": torch.tensor([True, False, False])[:streams],
        "truncated": torch.tensor([False, True, False])[:streams],
        "successors": numbers[1].to(dtype),
    }


def buffer_of(dtype: str = "float32", streams: int = STREAMS) -> ReplayBuffer:
    return ReplayBuffer(100, Field((OBSERVATION,), dtype), ACTION, task_ids=[0] * streams)


def require_stored(buffer: ReplayBuffer, given: dict[str, Tensor]) -> None:
    batch = buffer.sample(1, num_batches=64)
    found = (batch.rewards == given["rewards"].detach()).nonzero()[:, 1]
    assert found.unique().tolist() == list(range(STREAMS))
    assert torch.equal(batch.observations[:, 0], given["observations"][found].detach())
    assert torch.equal(batch.next_observations[:, 0], given["successors"][found].detach())
    assert torch.equal(batch.actions[:, 0], given["actions"][found].detach())
    assert torch.equal(batch.masks[:, 0] == 0, given["terminated"][found])


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments that Python looked at."""
    from brc_fast.replay import buffer

    names: list[str] = []

    def checked(name: str, *rest: Any) -> Any:
        names.append(name)
        return original(name, *rest)

    original = buffer.checked
    monkeypatch.setattr(buffer, "checked", checked)
    return names


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8", "int8", "int64", "bool"])
def test_tensors_that_are_exactly_right_need_no_look_from_python(dtype: str, looked: list[str]) -> None:
    buffer, given = buffer_of(dtype), step(getattr(torch, dtype))
    buffer.add(**given)
    buffer.add(**given, streams=torch.arange(STREAMS))
    require_stored(buffer, given)
    assert looked == [] or not OFFERED


OTHERS = {
    "columns of a longer tensor": lambda value: torch.stack([value, value], -1)[..., 0],
    "a transposed tensor": lambda value: value.T.contiguous().T if value.ndim == 2 else value,
    "rows of a longer tensor": lambda value: torch.cat([value, value])[STREAMS:],
    "part of a graph": lambda value: value.requires_grad_() * 1.0 if value.is_floating_point() else value,
    "a parameter": lambda value: torch.nn.Parameter(value) if value.is_floating_point() else value,
    "an array": lambda value: value.numpy(),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("names", [("rewards",), ("observations", "successors"), tuple(step())], ids=len)
def test_what_lies_otherwise_in_memory_is_stored_all_the_same(make: Any, names: tuple[str, ...]) -> None:
    buffer, given = buffer_of(), step()
    buffer.add(**{name: make(value) if name in names else value for name, value in given.items()})
    require_stored(buffer, given)


@pytest.mark.parametrize("shape", [(1,), (2,)])
def test_negated_numbers_are_stored_with_their_signs(shape: tuple[int, ...]) -> None:
    imaginary = torch.complex(torch.zeros(shape), torch.full(shape, 7.0)).conj().imag
    rewards = imaginary[0].unsqueeze(0) if shape == (1,) else imaginary
    assert rewards.is_neg()
    given = step(streams=shape[0]) | {"rewards": rewards}
    buffer = buffer_of(streams=shape[0])
    buffer.add(**given)
    assert buffer.sample(1).rewards.unique().tolist() == [-7.0]


REFUSED = {
    "rewards must be float32, which does not hold 1e": (
        "rewards",
        torch.full((STREAMS,), 1e39, dtype=torch.float64),
    ),
    "rewards must be float32, which does not hold 167": ("rewards", torch.full((STREAMS,), 2**24 + 1)),
    "terminated must be bool, which does not hold 2": ("terminated", torch.full((STREAMS,), 2).byte()),
    "rewards must be on the CPU, got meta": ("rewards", torch.zeros(STREAMS, device="meta")),
    r"rewards must have shape \[M\] = \[3\], got \[2\]": ("rewards", torch.zeros(2)),
    r"rewards must have shape \[M\] = \[3\], got \[3, 1\]": ("rewards", torch.zeros(STREAMS, 1)),
    r"actions must have shape \[M, A\] = \[3, 2\], got \[2, 3\]": ("actions", torch.zeros(2, STREAMS)),
    "rewards of stream 0 .* must be finite, got nan": ("rewards", torch.full((STREAMS,), torch.nan)),
}


@pytest.mark.parametrize(("told", "wrong"), REFUSED.items(), ids=REFUSED)
def test_a_wrong_tensor_is_refused_by_name_and_nothing_is_stored(
    told: str, wrong: tuple[str, Tensor]
) -> None:
    buffer = buffer_of()
    with pytest.raises((TypeError, ValueError), match=told):
        buffer.add(**(step() | dict([wrong])))
    assert len(buffer) == 0


def test_a_tensor_that_torch_has_wrapped_is_not_read() -> None:
    buffer, given = buffer_of(), step()

    def add(rewards: Tensor) -> Tensor:
        buffer.add(**(given | {"rewards": rewards}))
        return rewards

    with pytest.raises(RuntimeError):
        torch.func.vmap(add)(torch.randn(4, STREAMS))
    assert len(buffer) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8", "int8", "int64", "bool"])
def test_batches_are_the_same_without_the_interface(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = buffer_of(dtype), buffer_of(dtype)
    for buffer in (one, two):
        buffer.add(**step(getattr(torch, dtype)))
    batch = one.sample(2, num_batches=3)
    monkeypatch.setattr(arena, "C_TENSORS", False)
    for value, mine in zip(two.sample(2, num_batches=3).tensors(), batch.tensors(), strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (value.dtype, value.shape, value.stride())
        assert torch.equal(mine, value)


def test_types_without_the_interface_are_left_to_python() -> None:
    assert not _core.read_tensors(dict)
    assert _core.read_tensors(torch.Tensor) == OFFERED
