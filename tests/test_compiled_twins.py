"""The choice "compile": twins through torch.compile, refused where they are not what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brc_fast import kernels
from brc_fast.kernels.runtime import twins


def test_a_compiled_twin_gives_the_twins_values_and_changes() -> None:
    x, raw = torch.randn(2, 16, 3, dtype=torch.float64)
    noise = torch.randn(16, 3, dtype=torch.float64)
    plain = kernels.tanh_gaussian(x, raw, noise, impl="reference")
    for mine, expected in zip(kernels.tanh_gaussian(x, raw, noise, impl="compile"), plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    buffers = {name: [torch.ones(9), torch.full((9,), 0.5), *torch.zeros(3, 9)] for name in ("a", "b")}
    rule = {"learning_rate": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    for name, impl in (("a", "reference"), ("b", "compile")):
        param, grad, mean, square, target = buffers[name]
        step = torch.zeros(())
        kernels.adamw_(param, grad, mean, square, step, target=target, tau=0.5, impl=impl, **rule)
        assert step == 1  # once, although it was compared
    for mine, expected in zip(buffers["b"], buffers["a"], strict=True):
        torch.testing.assert_close(mine, expected)


def test_an_op_that_the_compiler_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(x: Tensor) -> Tensor:
        return 2.0 * x

    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: function(x) + 1e-3)
    with (
        kernels.use("compile"),
        pytest.raises(RuntimeError, match=r"changed double: tensor 0 .* off by 0\.001"),
    ):
        twins.twin(double)(torch.ones(3))
    assert torch.equal(twins.twin(double)(torch.ones(3)), torch.full((3,), 2.0))  # not asked for


def test_a_change_of_an_argument_counts_as_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def grow(x: Tensor) -> None:
        x += 1.0

    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: x.add_(1.5))
    with kernels.use("compile"), pytest.raises(RuntimeError, match="changed grow"):
        twins.twin(grow)(torch.ones(3))
