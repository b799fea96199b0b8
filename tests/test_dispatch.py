"""Which implementation runs: the choice, its refusals, and the launches that are recorded instead of made."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import fresh
import pytest
import torch
from extras import needs
from torch import Tensor
from torch.autograd import forward_ad

from brc_fast import kernels
from brc_fast.kernels import reference
from brc_fast.kernels.runtime import dispatch

X = torch.randn(3, 11)
ATOMS = torch.linspace(-1, 1, 11)
NEEDS_TRITON = needs("triton")
PLAIN = pytest.mark.skipif(dispatch.INTERPRETED, reason="the interpreter runs kernels on a CPU")


def run(code: str, **switches: str) -> subprocess.CompletedProcess[str]:
    code = f"import torch; from brc_fast import kernels; x, z = torch.ones(3, 11), torch.ones(11); {code}"
    without = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BRC_FAST_KERNELS")}
    return fresh.run(code, environment=without | switches)


def test_a_cpu_takes_the_twins_by_itself() -> None:
    assert dispatch.takes_kernels(None, X) is False
    assert torch.equal(kernels.expected_value(X, ATOMS), reference.expected_value(X, ATOMS))


@NEEDS_TRITON
@PLAIN
def test_kernels_asked_for_on_a_cpu_are_refused_and_not_replaced() -> None:
    told = r"a tensor is on cpu; move it to CUDA, or set TRITON_INTERPRET=1 before triton is imported"
    with pytest.raises(RuntimeError, match=told):
        kernels.expected_value(X, ATOMS, impl="triton")
    with pytest.raises(RuntimeError, match=told), kernels.use("triton"):
        kernels.expected_value(X, ATOMS)


@NEEDS_TRITON
def test_an_argument_goes_before_the_block_and_a_block_ends_with_its_own() -> None:
    with kernels.use("triton"):
        kernels.expected_value(X, ATOMS, impl="reference")
        with kernels.use("reference"):
            assert dispatch.takes_kernels(None, X) is False
        with pytest.raises(TypeError, match=r"kernels take tensors of torch.float32.*, got torch.int32"):
            dispatch.takes_kernels(None, X.int())
    assert dispatch.chosen(None) == os.environ.get("BRC_FAST_KERNELS", "auto")


def test_a_block_that_raises_gives_the_choice_back() -> None:
    with pytest.raises(ZeroDivisionError), kernels.use("reference"):
        raise ZeroDivisionError
    assert dispatch.chosen(None) == os.environ.get("BRC_FAST_KERNELS", "auto")


def test_an_unknown_choice_is_refused_with_those_that_exist() -> None:
    told = r"impl must be one of auto, triton, reference, compile, got 'cuda'"
    with pytest.raises(ValueError, match=told):
        kernels.expected_value(X, ATOMS, impl="cuda")
    told = r"the implementation must be one of auto, triton, reference, compile, got 'fast'"
    with pytest.raises(ValueError, match=told), kernels.use("fast"):
        pass


def test_the_environment_variable_chooses_and_is_checked() -> None:
    wrong = run("", BRC_FAST_KERNELS="fast")
    assert (
        "ValueError: BRC_FAST_KERNELS must be one of auto, triton, reference, compile, got 'fast'"
        in wrong.stderr
    )
    assert run("kernels.expected_value(x, z)", BRC_FAST_KERNELS="reference").returncode == 0
    if dispatch.INSTALLED:
        refused = run("kernels.expected_value(x, z)", BRC_FAST_KERNELS="triton")
        assert "RuntimeError: kernels were asked for, but a tensor is on cpu" in refused.stderr


@NEEDS_TRITON
def test_the_interpreter_runs_only_when_kernels_are_asked_for() -> None:
    code = (
        "from unittest.mock import patch; "
        "from brc_fast.kernels import cross_entropy; from brc_fast.kernels.runtime import dispatch; "
        "spy = patch.object(cross_entropy, 'launch', wraps=dispatch.launch).start(); "
        "kernels.expected_value(x, z); print(spy.call_count)"
    )
    assert run(code, TRITON_INTERPRET="1").stdout.strip() == "0"
    asked = run(code, TRITON_INTERPRET="1", BRC_FAST_KERNELS="triton")
    assert asked.stdout.strip() == "1", asked.stderr


def test_without_triton_everything_but_an_explicit_choice_works() -> None:
    hide = (
        "import importlib.util as u, sys; find = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a); sys.modules['triton'] = None; "
    )
    code = (
        "from brc_fast import kernels, BRC, CriticConfig; import torch; "
        "x, z = torch.ones(3, 11), torch.ones(11); kernels.expected_value(x, z); "
        "kernels.bias_layer_norm(x, z, z, z); BRC(3, 1, critic=CriticConfig(width=16)); "
        "kernels.expected_value(x, z, impl='triton')"
    )
    done = fresh.run(hide + code)
    assert (
        'RuntimeError: kernels were asked for, but triton is not installed; pip install "triton>=3.6"'
        in done.stderr
    )


@NEEDS_TRITON
def test_recorded_launches_are_not_made() -> None:
    with dispatch.recording() as launches:
        kernels.expected_value(X, ATOMS, impl="triton")
    assert len(launches) == 1
    assert any(argument is not None for argument in launches[0].arguments)
    assert dispatch.takes_kernels(None, X) is False


@pytest.mark.parametrize(
    "op",
    [
        lambda x: kernels.categorical_projection(x.softmax(-1), x, 1.0),
        lambda x: kernels.tanh_gaussian(x, x, X)[1],
        lambda x: kernels.categorical_cross_entropy(x, X.softmax(-1)),
        lambda x: kernels.standard_normal(torch.tensor([1, 2]), (3,)) + x.sum(-1),
    ],
    ids=["projection", "tanh_gaussian", "cross_entropy", "standard_normal"],
)
def test_forward_mode_goes_through_the_twins_and_keeps_its_tangents(op: Callable[[Tensor], Tensor]) -> None:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, torch.ones_like(X))
        out = forward_ad.unpack_dual(op(x))
        with kernels.use("reference"):
            twin = forward_ad.unpack_dual(op(x))
        assert out.tangent is not None
        torch.testing.assert_close(out.primal, twin.primal)
        torch.testing.assert_close(out.tangent, twin.tangent)


def test_every_op_has_a_twin_with_its_arguments() -> None:
    import inspect

    for name in kernels.__all__:
        if name in ("reference", "use") or name[0].isupper():  # classes are no ops
            continue
        ours = list(inspect.signature(getattr(kernels, name)).parameters)
        twin = list(inspect.signature(getattr(reference, name)).parameters)
        assert [p for p in ours if p != "impl"] == [p for p in twin if p != "project"], name


def test_an_unknown_op_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute nothing"):
        kernels.nothing  # noqa: B018
