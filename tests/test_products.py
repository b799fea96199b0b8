"""Products into given memory: any layout, whoever makes them, and who that is."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from brc_fast.command import main as cli
from brc_fast.config import TrainConfig
from brc_fast.kernels import products
from brc_fast.kernels.runtime import native

ours = pytest.mark.skipif(
    native.compiled is None or not native.compiled.multiplies(False),
    reason="this processor has no AVX-512, or the package's compiled part is not built",
)


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    products.chosen_products.cache_clear()
    yield
    products.chosen_products.cache_clear()


def laid_out(x: Tensor) -> Iterator[Tensor]:
    """The same numbers: dense, transposed, as columns of a wider tensor, and with gaps between columns."""
    yield x
    yield x.mT.contiguous().mT
    yield torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize("make", [products.multiply, products.by_torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 5, 7, 3), (3, 70, 33, 101), (1, 300, 1, 17), (2, 4, 2100, 6)]
)
def test_products_of_any_layout_are_those_in_float64(
    make: object, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    networks, rows, depth, columns = shape
    rng = torch.Generator().manual_seed(0)
    x, y, bias, before = (
        torch.randn(size, generator=rng).to(dtype)
        for size in (
            (networks, rows, depth),
            (networks, depth, columns),
            (networks, columns),
            (networks, rows, columns),
        )
    )
    exact = x.double() @ y.double()
    size = x.double().abs() @ y.double().abs() + 1.0
    unit = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float64: 1e-14}[dtype]
    for a, b in itertools.product(laid_out(x), laid_out(y)):
        for added, out in itertools.product((None, bias.float()), laid_out(before.clone())):
            make(a, b, out, added)()  # type: ignore[operator]
            wanted = exact if added is None else exact + added.double().unsqueeze(1)
            assert ((out.double() - wanted).abs() <= unit * (size + 8.0)).all()
        out = before.clone()
        make(a, b, out, add=True)()  # type: ignore[operator]
        assert ((out.double() - before.double() - exact).abs() <= unit * (size + 8.0)).all()


@pytest.mark.parametrize("make", [products.multiply, products.by_torch])
def test_products_of_bfloat16_into_float32_lose_no_digits(make: object) -> None:
    x, y = (torch.randn(2, 40, 40).bfloat16() for _ in range(2))
    out, more = torch.zeros(2, 40, 40), torch.ones(2, 40, 40)
    make(x, y, out)()  # type: ignore[operator]
    make(x, y, more, add=True)()  # type: ignore[operator]
    low = 1e-5 if make is products.multiply and products.chosen_products(torch.bfloat16) == "native" else 0.2
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=0.0, atol=low)
    torch.testing.assert_close(more, 1.0 + out, rtol=0.0, atol=0.2)


def test_networks_that_share_one_factor_and_those_without_rows_or_depth() -> None:
    x, y = torch.randn(1, 4, 3), torch.randn(5, 3, 2)
    out = torch.empty(5, 4, 2)
    products.multiply(x.expand(5, 4, 3), y, out)()
    torch.testing.assert_close(out, x @ y)
    products.multiply(torch.empty(5, 0, 3), y, torch.empty(5, 0, 2))()
    products.multiply(torch.empty(5, 4, 0), torch.empty(5, 0, 2), out)()
    assert (out == 0.0).all()


@ours
def test_the_same_bits_with_any_number_of_threads_and_rows_apart() -> None:
    x, y = torch.randn(2, 200, 600), torch.randn(2, 600, 130)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            native.share_threads()
            out = torch.empty(2, 200, 130)
            products.multiply(x, y, out)()
            results.append(out)
    finally:
        torch.set_num_threads(before)
        native.share_threads()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("fresh_choice")
def test_a_variable_chooses_who_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRC_FAST_PRODUCTS", "torch")
    assert products.chosen_products(torch.float32) == "torch"
    monkeypatch.setenv("BRC_FAST_PRODUCTS", "nobody")
    products.chosen_products.cache_clear()
    with pytest.raises(ValueError, match="auto, native, torch, got 'nobody'"):
        products.chosen_products(torch.float32)


class Without:
    """A compiled part for a processor that lacks these kinds of products."""

    def __init__(self, *lacking: bool) -> None:
        self.lacking = lacking

    def multiplies(self, low: bool) -> bool:
        return low not in self.lacking


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize("amx", [False, True])
def test_what_the_processor_lacks_is_made_by_torch_or_refused(
    monkeypatch: pytest.MonkeyPatch, amx: bool
) -> None:
    monkeypatch.setattr(products, "has_amx", lambda: amx)
    for lacking, expected in (
        ((), ("native", "torch" if amx else "native")),
        ((True,), ("native", "torch")),
        ((False, True), ("torch", "torch")),
    ):
        monkeypatch.setattr(products, "compiled", Without(*lacking))
        monkeypatch.delenv("BRC_FAST_PRODUCTS", raising=False)
        products.chosen_products.cache_clear()
        kinds = torch.float32, torch.bfloat16
        assert tuple(products.chosen_products(kind) for kind in kinds) == expected
        assert products.fast_bfloat16() == (amx or True not in lacking)
        monkeypatch.setenv("BRC_FAST_PRODUCTS", "native")
        products.chosen_products.cache_clear()
        for low, kind in enumerate(kinds):
            if bool(low) in lacking:
                with pytest.raises(ValueError, match="AVX512-BF16" if low else "AVX-512"):
                    products.chosen_products(kind)
            else:
                assert products.chosen_products(kind) == "native"


def test_the_command_refuses_a_way_that_is_none_in_one_line() -> None:
    command = [sys.executable, "-m", "brc_fast", "doctor"]
    done = subprocess.run(
        command, env={**os.environ, "BRC_FAST_PRODUCTS": "fast"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "brc-fast: BRC_FAST_PRODUCTS must be one of auto, native, torch, got 'fast'"


def test_the_doctor_tells_whose_products_there_are_and_how_fast(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("products"))
    whose = {"native": "ours", "torch": "torch's"}[products.chosen_products(torch.float32)]
    assert f"fp32 {whose}, " in line
    assert "bf16" in line
    assert line.count("GFLOP/s") == 2


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize(
    ("asked", "there", "taken"), [(None, 1, 1), (None, 2, 2), (None, 64, 4), (3, 64, 3), (9, 2, 2)]
)
def test_a_learner_takes_the_cores_that_there_are(
    asked: int | None,
    there: int,
    taken: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "cores", lambda: there)
    cli.use_cpu(TrainConfig(("toy/0",), threads=asked), print)
    assert torch.get_num_threads() == taken
    told = "--threads 9: this machine has 2 cores, so 2 are used\n"
    assert capsys.readouterr().out == (told if asked == 9 else "")


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_without_instructions_for_it_works_and_says_how_slow(
    fast: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "fast_bfloat16", lambda: fast)
    monkeypatch.setattr(cli, "measured_rate", lambda dtype: 5.0 if dtype == torch.float32 else 2.0)
    cli.use_cpu(TrainConfig(("toy/0",), precision="bf16"), print)
    slow = "this processor has no bfloat16 instructions, products take 2.5 times as long as in fp32"
    assert capsys.readouterr().out == ("" if fast else f"--precision bf16: {slow}\n")


@pytest.mark.parametrize("wrong", [(3, 4, 5), (2, 5, 5), (2, 4, 6)], ids=str)
def test_a_result_of_another_shape_is_never_written_past_its_end(wrong: tuple[int, ...]) -> None:
    """Torch refuses it or gives it the right shape."""
    x, y, out = torch.randn(2, 4, 3), torch.randn(2, 3, 5), torch.full(wrong, 7.0)
    before = out.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            products.multiply(x, y, out)()
        except RuntimeError:
            assert torch.equal(out, before)
        else:
            torch.testing.assert_close(out, x @ y)
