"""What a report says is what the results hold; what must not be cited is refused with its reason."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from extras import require

ROOT = Path(__file__).resolve().parent.parent
Write = Callable[..., Path]
ADDED = {"brc-fast": 1824.0, "brc-fast, tensors": 12538.0, "cpprb": 31577.0, "another": 199.0}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import report

    return report


@pytest.fixture
def write(report: Any, tmp_path: Path) -> Write:
    """Write a result; further keys replace those of the header."""
    import harness

    def written(name: str = "update", content: dict[str, Any] | None = None, **keys: Any) -> Path:
        clean = {"commit": "0123456789", "dirty": False, "gpu": None, "equality": "passed"}
        given = update_result() if content is None else content
        return Path(harness.write(name, {**clean, **given, **keys}, tmp_path))

    return written


def entry(case: str, provider: str, value: float | None, unit: str = "updates/s") -> dict[str, Any]:
    found = {"case": case, "provider": provider, "value": value, "unit": unit, "better": "more"}
    found |= {"low": value, "high": value, "rounds": 3, "floor": None}
    return found | ({"missing": "jax is not installed"} if value is None else {})


def update_result() -> dict[str, Any]:
    rows = [
        {
            "case": f"dmc-single H {width} B 256",
            "workload": "dmc-single",
            "width": width,
            "actor_width": 256,
            "batch": 256,
            "observation": 67,
            "action": 21,
            "tasks": 1,
            "precision": {"ours": "fp32", "plain": "fp32"},
            "updates_per_second": {"ours": 3e4 / width, "plain": 2e4 / width},
            "ratios_to": "ours",
            "ratios": {"plain": [1.5, 1.4, 1.625]},
            "floor": "products",
            "floor_seconds": {"ours": width / 4e4, "plain": width / 4e4},
            "times_floor": {"ours": 4 / 3, "plain": 2.0},
            "missing": {"jax": "jax is not installed"},
        }
        for width in (128, 256)
    ]
    entries = [
        entry(row["case"], name, row["updates_per_second"].get(name))
        for row in rows
        for name in ("ours", "plain", "jax")
    ]
    return {"benchmark": "update", "rows": rows, "machine": None, "measurements": entries}


def replay_result() -> dict[str, Any]:
    times = {"brc-fast": 170.0, "cpprb": 520.0, "row gather (limit)": 137.0}
    row = [{"buffer": name, "cpu": value, "wall": value} for name, value in times.items()]
    case = {"case": "1 x 1024", "title": "Sampling 1 x 1024", "rows": row, "missing": {}}
    entries = [entry("1 x 1024", name, value, "ns per transition") for name, value in times.items()]
    many = [entry("ten tasks", "cpprb x 10", 779.0, "ns per transition")]
    slower = [entry("insert 1", name, value, "ns per transition") for name, value in ADDED.items()]
    return {"benchmark": "replay", "cases": [case], "measurements": entries + many + slower}


def envs_result(*slots: int) -> dict[str, Any]:
    rows = [
        {
            "task": "gym/Pendulum-v1",
            "num_envs": number,
            "steps_per_second": {"ours": 100.0 * number, "library": 125.0 * number},
            "times_library": [0.8, 0.75, 0.85],
        }
        for number in slots
    ]
    entries = [
        entry(f"{row['task']} num_envs={row['num_envs']}", name, rate, "steps/s")
        for row in rows
        for name, rate in row["steps_per_second"].items()
    ]
    return {"benchmark": "envs", "rows": rows, "measurements": entries}


def scaling_result() -> dict[str, Any]:
    seconds = [1e-3, 2e-3, 4e-3]
    axis = {"axis": "batch", "what": "update", "provider": "ours", "kept": {"width": 128}, "x": [32, 64, 128]}
    axis |= {"seconds": seconds, "low": seconds, "high": seconds, "floor": [5e-4, 1e-3, 2e-3], "missing": {}}
    axis["fit"] = {"fixed": 1e-4, "rate": 3e-5, "power": 1.0, "residual": 0.05, "points": 3}
    cases = zip(axis["x"], seconds, strict=True)
    entries = [entry(f"update, batch {x}", "ours", 1e6 * took, "us") for x, took in cases]
    return {"benchmark": "scaling", "device": "cpu", "axes": [axis], "measurements": entries}


# ---------------------------------------------------------------- tables


def table_of(report: Any, path: Path) -> list[list[str]]:
    lines = report.table(report.trusted(path)).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_table_of_the_update_has_rates_ratios_and_floors_as_measured(report: Any, write: Write) -> None:
    head, _, *rows = table_of(report, write())
    ratio = "x plain PyTorch (quartiles)"
    names = ["workload", "width", "batch", "brc-fast", "plain PyTorch", ratio, "time / torch.bmm"]
    assert head == names
    assert rows == [
        ["dmc-single", "128", "256", "234", "156", "1.50 (1.40 to 1.62)", "1.33"],
        ["dmc-single", "256", "256", "117", "78.1", "1.50 (1.40 to 1.62)", "1.33"],
    ]


def test_a_provider_without_a_value_is_listed_with_its_reason_and_not_dropped(
    report: Any, write: Write
) -> None:
    assert "Missing: JAX (2 cases): jax is not installed." in report.table(report.trusted(write()))


def test_providers_without_a_value_for_the_same_reason_share_a_line(report: Any, write: Write) -> None:
    case, rows = "dmc/dog-run num_envs=2", envs_result(8)
    entries = [*rows["measurements"], *(entry(case, name, None, "steps/s") for name in ("ours", "library"))]
    found = report.table(report.trusted(write(content=rows | {"measurements": entries})))
    assert f"Missing: brc-fast, its own loop ({case}): jax is not installed." in found
    assert found.count("Missing") == 1


def test_a_kernel_that_is_wrong_has_a_reason_in_the_place_of_its_row(report: Any, write: Write) -> None:
    good = entry("two_hot K=101", "kernels", 3.0, "us")
    wrong = entry("adamw_", "kernels", None, "us") | {"missing": "differs from the twin: result 0"}
    found = report.table(
        report.trusted(write(content={"benchmark": "kernels", "measurements": [good, wrong]}))
    )
    assert "| two_hot K=101 | 3 |" in found
    assert "| adamw_" not in found
    assert "Missing: brc-fast (adamw_): differs from the twin: result 0." in found


def test_buffers_of_several_tasks_stand_in_their_own_columns_and_the_gather_last(
    report: Any, write: Write
) -> None:
    head, _, *rows = table_of(report, write(content=replay_result()))
    buffers = ["brc-fast", "brc-fast, tensors", "cpprb", "another", "copying one row"]
    assert head == ["CPU ns per transition", *buffers]
    assert rows[0] == ["sample 1 x 1024", "170", "", "520", "", "137"]
    assert rows[1] == ["sample 1 x 1024 of 10 tasks", "", "", "779", "", ""]
    assert rows[2] == ["add from 1 environment", "1,824", "12,538", "31,577", "199", ""]


def test_the_table_of_environments_stands_beside_the_simulators_own_loop(report: Any, write: Write) -> None:
    _, _, row = table_of(report, write(content=envs_result(8)))
    assert row == ["gym/Pendulum-v1", "8", "800", "1,000", "0.80 (0.75 to 0.85)"]


def test_a_line_says_when_where_with_what_and_of_which_commit(report: Any, write: Write) -> None:
    keys = {"date": "2026-01-02T03:04:05+00:00", "cpu": "Some CPU", "cores": 2, "torch_threads": 1}
    path = write(**keys, versions={"torch": "2.13.0+cpu", "jax": None})
    line = "2026-01-02, Some CPU, 2 cores, 1 thread of torch, torch 2.13.0, 0123456"
    assert report.stamp(report.trusted(path)) == line
    on_gpu = write(**keys, versions={"torch": "2.13.0"}, gpu="NVIDIA H200")
    assert report.stamp(report.trusted(on_gpu)) == "2026-01-02, NVIDIA H200, torch 2.13.0, 0123456"


def test_the_table_of_scaling_begins_with_the_curves(report: Any, write: Write) -> None:
    _, _, curve, _, _, first, *_ = table_of(report, write(content=scaling_result()))
    assert curve == ["update, x = batch", "100 + 30 x", "5.0 %"]
    assert first == ["update, batch 32", "1,000"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"equality": None}, "it compares providers without an equality check: measure again"),
        ({"equality": "failed: plain differs"}, "its equality check failed: plain differs"),
        ({"status": "failed", "reason": "out of memory"}, "its run failed (out of memory)"),
        ({"dirty": True}, "it was measured with uncommitted changes: commit and measure again"),
        ({"commit": None, "dirty": None}, "it was measured outside of a git checkout"),
        (
            {"dirty": None},
            "it is not known whether it was measured with uncommitted changes: commit and measure",
        ),
        (
            {"dirty": True, "equality": "failed: plain differs"},
            "its equality check failed: plain differs; it was measured with uncommitted changes: commit",
        ),
        ({"status": "failed", "reason": "no\nmemory"}, "its run failed (no memory)"),
    ],
)
def test_what_must_not_be_cited_is_refused_in_one_line(
    keys: dict[str, Any], reason: str, report: Any, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(**keys)
    assert report.main([str(path)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith(f"report: {path} is refused: {reason}")


def test_results_of_a_gpu_are_refused_where_the_tests_of_their_commit_failed(
    report: Any, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("gpu-update")
    tests = {"status": "failed", "reason": "pytest -m gpu failed: test_norm.py (1)", "commit": "0123456789"}
    (tmp_path / "gpu-test.json").write_text(json.dumps(tests))
    assert report.main([str(path)]) == 1
    assert (
        "the tests of its commit failed (pytest -m gpu failed: test_norm.py (1))" in capsys.readouterr().err
    )
    for other in ({"status": "ok"}, {"commit": "an older one"}):
        (tmp_path / "gpu-test.json").write_text(json.dumps({**tests, **other}))
        assert report.main([str(path)]) == 0


def test_a_result_that_is_refused_does_not_cost_the_others_their_tables(
    report: Any, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write("dirty", dirty=True), write("clean")
    assert report.main([str(path) for path in paths]) == 1
    told = capsys.readouterr()
    assert "[clean.json](" in told.out
    assert "dirty.json" not in told.out
    assert len(told.err.splitlines()) == 1


def without(content: dict[str, Any], key: str) -> dict[str, Any]:
    first, *others = content["rows"]
    return content | {"rows": [{name: first[name] for name in first if name != key}, *others]}


@pytest.mark.parametrize(
    "content",
    [
        *({**update_result(), "rows": rows} for rows in (None, [1], [{}], {"a": 1}, "text")),
        {key: value for key, value in update_result().items() if key != "rows"},
        without(update_result(), "ratios"),
        without(update_result(), "width"),
        {**envs_result(8), "rows": None},
        {**envs_result(8), "starts": [5]},
        {**scaling_result(), "axes": [{"fit": 3}]},
        {**envs_result(8), "rows": [envs_result(8)["rows"][0] | {"times_library": [float("nan")] * 3}]},
    ],
)
def test_a_result_without_what_its_table_needs_is_one_line_and_costs_the_others_nothing(
    content: dict[str, Any], report: Any, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, good = write("wrong", content), write("good")
    assert report.main([str(wrong), str(good)]) == 1
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith(f"report: {wrong} gives no table (")
    assert f"; measure again with bench/bench_{content['benchmark']}.py" in line
    assert "[good.json](" in told.out
    assert "wrong.json" not in told.out


def test_a_place_of_a_readme_whose_result_is_wrong_does_not_cost_the_other_readmes_theirs(
    report: Any, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write("wrong", rows=None), write("good")
    readmes = [tmp_path / f"{path.stem}.md" for path in paths]
    for path, readme in zip(paths, readmes, strict=True):
        readme.write_text(f"<!-- report: {path.stem} -->\n<!-- end -->\n")
    assert report.main([*map(str, paths), "--readme", *map(str, readmes)]) == 1
    told = capsys.readouterr()
    assert told.out == f"{readmes[1]}\n"
    assert "wrong.json gives no table (" in told.err
    assert "| workload |" in readmes[1].read_text()


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000], ids=["list", "cut", "deep"])
def test_tests_of_a_gpu_that_cannot_be_read_are_a_reason(
    content: str, report: Any, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu-test.json").write_text(content)
    assert report.main([str(write("gpu-update"))]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("gpu-test.json beside it holds no result of tests: run the tests again")


def test_older_results_are_refused_with_the_command_that_makes_them_anew(
    report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "envs-cpu.json"
    path.write_text('{"benchmark": "envs"}')
    assert report.main([str(path)]) == 1
    assert "measure again with bench/bench_envs.py --save envs-cpu" in capsys.readouterr().err


# ---------------------------------------------------------------- READMEs


def test_a_readme_takes_its_table_in_place_and_is_checked_against_it(
    report: Any, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- report: update -->\n")
    assert report.main(["--readme", str(readme)]) == 1
    assert "1 places begin with <!-- report: NAME -->, 0 have an end" in capsys.readouterr().err
    assert report.main(["--readme", str(tmp_path / "none.md")]) == 1
    assert "none.md cannot be read (No such file or directory)" in capsys.readouterr().err
    readme.write_text("<!-- report: no-such-result -->\n<!-- end -->\n")
    assert report.main(["--readme", str(readme)]) == 1
    assert "no-such-result.json cannot be read" in capsys.readouterr().err


def test_every_table_of_the_readmes_is_what_its_committed_result_gives(report: Any) -> None:
    assert report.main(["--check"]) == 0
    for readme in report.READMES:
        begun = re.findall(r"^<!-- report: ", readme.read_text(), re.MULTILINE)
        assert len(begun) == len(report.PLACE.findall(readme.read_text()))
    texts = [readme.read_text() for readme in report.READMES]
    names = {place[1] for text in texts for place in report.PLACE.findall(text)}
    assert names >= {"update-cpu", "replay-cpu", "critic-cpu"}
    others = {path for path in ROOT.glob("docs/*.md") if path not in report.READMES}
    assert not any("<!-- report:" in path.read_text() for path in others)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (update_result(), ["result"]),
        (replay_result(), ["result"]),
        (scaling_result(), ["result"]),
        (envs_result(8), ["result"]),
        (envs_result(8, 64), ["result"]),
        ({**update_result(), "machine": {"name": "", "bf16": 8e14, "tf32": 4e14, "bandwidth": 4e12}}, None),
    ],
    ids=["update", "replay", "scaling", "envs", "numbers of envs", "roofline"],
)
def test_pictures_are_png_and_svg_and_carry_machine_and_commit(
    content: dict[str, Any],
    names: list[str] | None,
    report: Any,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    require("matplotlib")
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        assert report.main([str(write("result", content)), "--pictures", str(tmp_path / "docs")]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    wanted = names or ["result", "result-parts"]
    assert [path.name for path in paths] == [f"{name}{end}" for name in wanted for end in (".png", ".svg")]
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.stat().st_size < 200_000
        else:
            assert "0123456" in path.read_text()


def test_pictures_that_cannot_be_drawn_or_written_are_one_line_each(
    report: Any, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("matplotlib")
    wrong, good = write("wrong", rows=[1]), write("good")
    assert report.main([str(wrong), str(good), "--pictures", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"report: {wrong} gives no picture (")
    assert len(told.err.splitlines()) == 1
    assert str(tmp_path / "good.png") in told.out
    assert report.main([str(good), "--pictures", str(good / "docs")]) == 1
    assert capsys.readouterr().err == f"report: {good / 'docs'} cannot be written (Not a directory)\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "is not JSON"),
        (b"\xff\xfe", "cannot be read (no text)"),
        (b"[]", "a JSON object is expected, not list"),
        (envs_result(8), "is a result of envs, not of "),
        ("nothing in it", "gives no picture ("),
    ],
    ids=["absent", "empty", "binary", "list", "other", "nothing in it"],
)
@pytest.mark.parametrize(("name", "key"), [("replay", "cases"), ("scaling", "axes")])
def test_what_cannot_be_drawn_alone_is_one_line(
    name: str,
    key: str,
    content: Any,
    reason: str,
    report: Any,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    require("matplotlib")
    plot = importlib.import_module(f"plot_{name}")
    path = tmp_path / "result.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        known = update_result() | {"benchmark": name, key: [1]}
        path = write("result", known if isinstance(content, str) else content)
    assert plot.main([str(path), str(tmp_path / "picture.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"plot_{name}: {path} ")
    assert reason in line
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(path), "picture.txt"])


def test_shares_of_the_roofline_are_its_floor_and_measured_ones_come_first(report: Any) -> None:
    import report_pictures
    import roofline

    row = update_result()["rows"][0]
    machine = roofline.Machine("", 8e14, 4e14, 4e12)
    shares = report_pictures.parts_of(row, machine._asdict())
    sizes = roofline.Sizes(256, 128, 256, 67, 21)
    assert sum(shares.values()) == pytest.approx(roofline.floor(sizes, "tf32", machine))
    assert min(shares.values()) > 0
    measured = {**row, "parts": [{"part": "products", "seconds": 2.0}]}
    assert report_pictures.parts_of(measured, machine._asdict()) == {"products": 2.0}
    assert report_pictures.parts_of(row, None) == {}
