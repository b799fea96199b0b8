"""What a report says is what the results hold; what must not be cited is refused with its reason."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from extras import require

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import harness
import report

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a result; further keys replace those of the header."""

    def written(name: str = "update", content: dict[str, Any] | None = None, **keys: Any) -> Path:
        clean = {"commit": "0123456789", "dirty": False, "gpu": None, "equality": "passed"}
        path = tmp_path / f"{name}.json"
        harness.write(path, {**clean, **(update() if content is None else content), **keys})
        return path

    return written


def entry(
    case: str, provider: str, value: float | None, unit: str = "updates/s", **more: Any
) -> dict[str, Any]:
    found = {"case": case, "provider": provider, "value": value, "unit": unit, "better": "more", **more}
    found |= {"low": value, "high": value, "rounds": 3, "floor": more.get("floor")}
    return found | ({"missing": "jax is not installed"} if value is None else {})


def update() -> dict[str, Any]:
    entries = []
    for width in (128, 256):
        at = {"workload": "dmc-single", "width": width, "batch": 256}
        told = {"at": at, "floor": 4e4 / width}
        entries += [
            entry(f"H {width}", "ours", 3e4 / width, over_floor=4 / 3, **told),
            entry(f"H {width}", "plain", 2e4 / width, over_floor=2.0, ratio=[1.5, 1.4, 1.625], **told),
            entry(f"H {width}", "jax", None, at=at),
        ]
    return {"benchmark": "update", "floor": "torch.bmm", "measurements": entries}


def replay() -> dict[str, Any]:
    unit, added = "ns per transition", {"brc-fast": 1824.0, "brc-fast, tensors": 12538.0, "cpprb": 31577.0}
    entries = [entry("insert 1", name, value, unit) for name, value in {**added, "another": 199.0}.items()]
    times = {"cpprb": 520.0, "row gather (limit)": 137.0, "brc-fast": 170.0}
    entries += [entry("1 x 1024", name, value, unit) for name, value in times.items()]
    entries += [entry("ten tasks", "cpprb x 10", 779.0, unit), entry("2 x 1024", "cpprb", 1.0, unit)]
    return {"benchmark": "replay", "titles": {"1 x 1024": "Sampling 1 x 1024"}, "measurements": entries}


def envs(*slots: int) -> dict[str, Any]:
    entries = []
    for number in slots:
        at, case = {"steps/s": "gym/Pendulum-v1", "slots": number}, f"gym/Pendulum-v1 num_envs={number}"
        entries.append(entry(case, "ours", 100.0 * number, "steps/s", at=at))
        entries.append(entry(case, "library", 125.0 * number, "steps/s", at=at, ratio=[0.8, 0.75, 0.85]))
    return {"benchmark": "envs", "measurements": entries}


def scaling() -> dict[str, Any]:
    fit = {"fixed": 1e-4, "rate": 3e-5, "power": 1.0, "residual": 0.05, "points": 3}
    axes = [{"axis": "batch", "what": "update", "fit": fit}]
    entries = [entry(f"update, batch {x}", "ours", 30.0 * x + 100, "us", floor=20.0 * x) for x in (32, 64)]
    return {"benchmark": "scaling", "floor": "torch.bmm", "axes": axes, "measurements": entries}


def rows(path: Path) -> list[list[str]]:
    lines = report.table(report.trusted(path)).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


# ---------------------------------------------------------------- tables


def test_the_table_of_updates_has_rates_ratios_with_quartiles_and_times_over_the_floor(write: Write) -> None:
    head, _, first, second = rows(write())
    ratios = ["x plain PyTorch (quartiles)", "time / torch.bmm"]
    assert head == ["workload", "width", "batch", "brc-fast", "plain PyTorch", *ratios]
    assert first == ["dmc-single", "128", "256", "234", "156", "1.50 (1.40 to 1.62)", "1.33"]
    assert second[1:5] == ["256", "256", "117", "78.1"]
    assert "Missing: JAX (2 cases): jax is not installed." in report.table(report.trusted(write()))


def test_the_table_of_environments_shows_a_ratio_below_one_like_any_other(write: Write) -> None:
    head, _, row = rows(write(content=envs(8)))
    assert head == ["steps/s", "slots", "brc-fast", "its own loop", "x its own loop (quartiles)"]
    assert row == ["gym/Pendulum-v1", "8", "800", "1,000", "0.80 (0.75 to 0.85)"]


def test_buffers_of_several_tasks_stand_in_their_own_columns_and_the_gather_last(write: Write) -> None:
    head, _, *found = rows(write(content=replay()))
    buffers = ["brc-fast", "brc-fast, tensors", "cpprb", "another", "copying one row"]
    assert head == ["CPU ns per transition", *buffers]
    assert ["sample 1 x 1024", "170", "", "520", "", "137"] in found
    assert ["sample 1 x 1024 of 10 tasks", "", "", "779", "", ""] in found
    assert ["add from 1 environment", "1,824", "12,538", "31,577", "199", ""] in found
    assert len(found) == 3


def test_the_table_of_scaling_begins_with_the_curves_and_has_the_floors(write: Write) -> None:
    _, _, curve, head, _, first, _ = rows(write(content=scaling()))
    assert curve == ["update, x = batch", "100 + 30 x", "5.0 %"]
    assert head == ["us", "brc-fast", "torch.bmm"]
    assert first == ["update, batch 32", "1,060", "640"]


def test_a_line_says_when_where_with_what_and_of_which_commit(write: Write) -> None:
    keys = {"date": "2026-01-02T03:04:05+00:00", "cpu": "Some CPU", "cores": 2, "torch_threads": 1}
    path = write(**keys, versions={"torch": "2.13.0+cpu", "jax": None})
    line = "2026-01-02, Some CPU, 2 cores, 1 thread of torch, torch 2.13.0, 0123456"
    assert report.stamp(report.trusted(path)) == line
    on_gpu = write(**keys, versions={"torch": "2.13.0"}, gpu="NVIDIA H200")
    assert report.stamp(report.trusted(on_gpu)) == "2026-01-02, NVIDIA H200, torch 2.13.0, 0123456"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"equality": None}, "it compares providers without an equality check: measure again"),
        ({"equality": "failed: plain differs"}, "its equality check failed: plain differs"),
        ({"status": "failed", "reason": "no\nmemory"}, "its run failed (no memory)"),
        ({"dirty": True}, "it was measured with uncommitted changes"),
        ({"commit": None, "dirty": None}, "it was measured outside of a git checkout"),
        ({"dirty": None}, "it was measured with uncommitted changes, or perhaps with some"),
    ],
)
def test_what_must_not_be_cited_is_refused_in_one_line_and_costs_the_others_nothing(
    keys: dict[str, Any], reason: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path, good = write("wrong", **keys), write("good")
    assert report.main([str(path), str(good)]) == 1
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith(f"report: {path} is refused: {reason}")
    assert "[good.json](" in told.out
    assert "wrong.json" not in told.out


def test_results_of_a_gpu_are_refused_where_the_tests_of_their_commit_failed(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, tests = write("gpu-update"), tmp_path / "gpu-test.json"
    told = {"status": "failed", "reason": "it ended with 1", "commit": "0123456789"}
    tests.write_text(json.dumps(told))
    assert report.main([str(path)]) == 1
    assert "the tests of its commit failed (it ended with 1)" in capsys.readouterr().err
    for other in ({"status": "ok"}, {"commit": "an older one"}):
        tests.write_text(json.dumps({**told, **other}))
        assert report.main([str(path)]) == 0


@pytest.mark.parametrize(
    "content",
    [
        {**scaling(), "axes": [{"fit": 3}]},
        {**update(), "measurements": [{**update()["measurements"][0], "at": 5}]},
        {**update(), "measurements": [{**update()["measurements"][1], "ratio": [1.0]}]},
    ],
)
def test_a_result_without_what_its_table_needs_is_one_line_and_costs_the_others_nothing(
    content: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, good = write("wrong", content), write("good")
    assert report.main([str(wrong), str(good)]) == 1
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith(f"report: {wrong} gives no table or picture (")
    assert "[good.json](" in told.out


# ---------------------------------------------------------------- READMEs


def test_a_readme_takes_its_table_in_place_and_is_checked_against_it(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, readme = write(), tmp_path / "README.md"
    readme.write_text("before\n\n<!-- report: update -->\nold\n<!-- end -->\n\nafter\n")
    words = [str(path), "--readme", str(readme)]
    assert report.main([*words, "--check"]) == 1
    assert f"report: {readme} differs from its results, from: | workload" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert report.main(words) == 0
    text = readme.read_text()
    assert text.startswith("before\n\n<!-- report: update -->\n| workload | width ")
    assert text.endswith(" ([update.json](update.json)).\n<!-- end -->\n\nafter\n")
    assert report.main([*words, "--check"]) == 0
    readme.write_text(text.replace("| 234 |", "| 235 |"))
    assert report.main([*words, "--check"]) == 1


def test_a_place_without_an_end_or_a_result_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- report: update -->\n")
    assert report.main(["--readme", str(readme)]) == 1
    assert "1 places begin with <!-- report: NAME -->, 0 have an end" in capsys.readouterr().err
    assert report.main(["--readme", str(tmp_path / "none.md")]) == 1
    assert "none.md gives no table or picture (FileNotFoundError" in capsys.readouterr().err
    readme.write_text("<!-- report: no-such-result -->\n<!-- end -->\n")
    assert report.main(["--readme", str(readme)]) == 1
    assert "no-such-result.json cannot be read" in capsys.readouterr().err


def test_every_table_of_the_readmes_is_what_its_committed_result_gives() -> None:
    assert report.main(["--check"]) == 0
    texts = [readme.read_text() for readme in report.READMES]
    names = {place[1] for text in texts for place in report.PLACE.findall(text)}
    assert names >= {"update-cpu", "replay-cpu", "critic-cpu"}
    others = {path for path in ROOT.glob("docs/*.md") if path not in report.READMES}
    assert not any(re.search("<!-- report:", path.read_text()) for path in others)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (update(), ["result"]),
        (replay(), ["result"]),
        (scaling(), ["result"]),
        (envs(8, 64), ["result"]),
        (envs(8), []),
    ],
    ids=["update", "replay", "scaling", "envs", "one number of envs"],
)
def test_pictures_are_png_and_svg_and_carry_machine_and_commit(
    content: dict[str, Any],
    names: list[str],
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    require("matplotlib")
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        assert report.main([str(write("result", content)), "--pictures", str(tmp_path / "docs")]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines() if line]
    assert [path.name for path in paths] == [f"{name}{end}" for name in names for end in (".png", ".svg")]
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.stat().st_size < 200_000
        else:
            assert "0123456" in path.read_text()
