"""The floors know the limits that were measured here, and the parts of an update are those of the whole."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import require

from brc_fast import kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the benchmark does: several wait for each other on a busy machine
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- limits


def limit(case: str, value: float | None, **keys: Any) -> dict[str, Any]:
    entry = {"case": case, "provider": "machine", "value": value, "unit": "GB/s", "better": "more"}
    return {**entry, "low": value, "high": value, "rounds": 3, "floor": None, **keys}


MEASURED = [limit("copy", 10.0), limit("product float32 256", 50.0), limit("product float32 512", 60.0)]


def store(folder: Path, **keys: Any) -> Path:
    import harness

    return Path(harness.write("limits-cpu", {"measurements": MEASURED, **keys}, folder))


def test_floors_use_the_newest_limits_of_this_machine_and_say_which(tmp_path: Path) -> None:
    from machines import machine

    store(tmp_path / "new", date="2026-02-02T03:04:05+00:00")
    slow = [limit(entry["case"], 1.0) for entry in MEASURED]
    store(tmp_path / "old", date="2026-01-02T03:04:05+00:00", measurements=slow)
    found = machine("cpu", folders=(tmp_path / "new", tmp_path / "old"))
    assert (found.bandwidth, found.fp32, found.tf32, found.bf16) == (10e9, 60e9, 60e9, 60e9)
    assert found.source == "limits-cpu.json of 2026-02-02T03:04"


@pytest.mark.parametrize(
    "other", [{"cpu": "another"}, {"cores": 999}, {"torch_threads": 77}, {"measurements": MEASURED[:1]}, None]
)
def test_limits_of_another_machine_or_none_at_all_are_measured_now(
    other: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import machines
    from bench_limits import limits

    if other is not None:
        store(tmp_path, **other)
    monkeypatch.setattr(machines, "EACH", 0.0)
    monkeypatch.setattr(machines, "limits", lambda device, dry: limits(device, True))
    found = machines.machine("cpu", folders=(tmp_path,))
    assert found.source == "measured in this run"
    assert min(found.bandwidth, found.fp32, found.tf32, found.bf16) > 0


def test_a_dry_run_measures_and_takes_no_file(tmp_path: Path) -> None:
    from machines import machine

    store(tmp_path)
    assert machine("cpu", dry=True, folders=(tmp_path,)).source == "measured in this run"


def test_a_limit_without_a_figure_is_no_floor_but_its_reason() -> None:
    from machines import made

    broken = [limit("copy", None, missing="out of memory"), *MEASURED[1:]]
    with pytest.raises(RuntimeError, match="no floor without the limit copy: out of memory"):
        made("cpu", broken, "")


# ---------------------------------------------------------------- parts


def ours(width: int = 32, batch: int = 64, tasks: int = 3) -> tuple[Any, Any]:
    from update_providers import BUILDERS, CARTPOLE, Subject

    subject = Subject(width, batch, workload=CARTPOLE._replace(tasks=tasks))
    return BUILDERS["ours"](subject), subject


def test_timers_change_nothing_and_are_taken_off_again() -> None:
    from update_parts import WRAPPED, clocks

    before = [getattr(owner, name) for owner, name, _ in WRAPPED]
    provider, subject = ours()
    plain = ours()[0].losses(subject.batches(), subject.noise(1))
    with clocks() as running:
        timed = provider.losses(subject.batches(), subject.noise(1))
    assert {name: float(x) for name, x in timed.items()} == {name: float(x) for name, x in plain.items()}
    assert [getattr(owner, name) for owner, name, _ in WRAPPED] == before
    assert min(running.seconds.values()) > 0, running.seconds  # every part is met in an update


def test_a_part_that_takes_longer_is_the_one_that_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    from roofline import OPTIMIZERS
    from update_parts import clocks

    provider, _ = ours()
    provider.call()
    step = kernels.adamw_

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.08)
        return step(*arguments, **named)

    monkeypatch.setattr(kernels, "adamw_", slow)
    with clocks() as running:
        provider.call()
    others = sum(seconds for part, seconds in running.seconds.items() if part != OPTIMIZERS)
    assert running.seconds[OPTIMIZERS] > 0.15 > others  # two steps an update


def test_parts_add_up_to_the_update_and_stand_beside_their_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    import update_parts
    from roofline import PARTS, Machine, floor
    from update_parts import REST, measured_parts

    monkeypatch.setattr(update_parts, "TOLERANCE", 0.5)  # others may use this machine
    provider, subject = ours()
    machine = Machine("", 0.0, 0.0, 1e10, 5e10)
    found = measured_parts(provider, subject, 0.3, machine)
    assert "parts" in found, found
    assert 0.5 <= found["parts_over_whole"] <= 1.5
    rows = {row["part"]: row for row in found["parts"]}
    assert list(rows) == [*PARTS, REST]
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in rows.values())
    assert rows[REST]["floor"] is None
    assert sum(rows[part]["floor"] for part in PARTS) == pytest.approx(floor(subject.sizes, "fp32", machine))


def test_parts_that_do_not_add_up_have_a_reason_and_no_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    import update_parts
    from roofline import Machine

    switch = update_parts.Clocks.switch

    def heavy(clocks: Any) -> None:
        time.sleep(0.001)
        switch(clocks)

    monkeypatch.setattr(update_parts.Clocks, "switch", heavy)
    found = update_parts.measured_parts(*ours(), 0.0, Machine("", 0.0, 0.0, 1e10, 5e10))
    assert found.keys() == {"parts_missing"}
    assert found["parts_missing"].endswith("more than 0.15 off; measure on a quieter machine")


def test_the_benchmark_stores_parts_with_the_limits_that_it_used(capsys: pytest.CaptureFixture[str]) -> None:
    import bench_update

    found = bench_update.run("cpu", ["ours", "plain"], (16,), (8,), seconds=1.0, dry=True)
    assert found["limits"]["source"] == "measured in this run"
    (row,) = json.loads(json.dumps(found["rows"]))
    assert ("parts" in row) != ("parts_missing" in row)
    *_, shares, limits = capsys.readouterr().out.splitlines()
    assert limits == "limits of this machine: measured in this run"
    assert shares.strip().startswith(("parts of ours: forward: products ", "no parts: the parts' sum is "))


def test_the_picture_has_a_bar_for_what_was_measured_and_one_for_floors() -> None:
    require("matplotlib")
    from report_pictures import close, parts

    told = [{"part": "optimizers", "seconds": 3.0, "floor": 2.0}, {"part": "rest", "seconds": 1.0}]
    drawn = parts({"rows": [{"case": "H 16", "width": 16, "batch": 8, "ratios_to": "ours", "parts": told}]})
    bars = [bar.get_width() for bar in drawn.axes[0].patches]
    assert bars == [75.0, 25.0, 50.0, 0.0]
    assert "measured" in drawn.axes[0].get_xlabel()
    close(drawn)
