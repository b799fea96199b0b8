"""Comparisons tell better from worse in any unit, know their noise, and refuse what cannot be compared."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import compare
import harness

Write = Callable[..., str]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a result with these measurements; more keys go into its header."""

    def written(name: str, *entries: Any, **keys: Any) -> str:
        path = tmp_path / f"{name}.json"
        harness.write(path, {"benchmark": "update", "measurements": entries, **keys})
        return str(path)

    return written


def entry(
    value: float | None,
    spread: float = 0.0,
    rounds: int = 100,
    case: str = "width=256",
    provider: str = "ours",
    **more: Any,
) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - spread, value + spread)
    found = {"case": case, "provider": provider, "value": value, "unit": "updates/s", "better": "more"}
    found |= {"low": low, "high": high, "rounds": rounds, "floor": None}
    return found | ({"missing": "out of memory"} if value is None else {}) | more


def plain(value: float | None, ratio: float | None = None, provider: str = "plain") -> dict[str, Any]:
    more = {} if ratio is None else {"ratio": [ratio, ratio - 0.1, ratio + 0.1]}
    return entry(value, provider=provider, **more)


def refusal(capsys: Captured, *words: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        compare.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def numbers(capsys: Captured) -> list[float]:
    """The last line's ratio and its bounds."""
    words = [word.strip("(),") for word in capsys.readouterr().out.splitlines()[-1].split()[2:]]
    return [float(word) for word in words if word.replace(".", "").isdigit()][:3]


@pytest.mark.parametrize(("unit", "better", "new"), [("updates/s", "more", 200.0), ("us", "less", 50.0)])
def test_a_ratio_above_one_is_better_in_rates_and_in_times(
    unit: str, better: str, new: float, write: Write, capsys: Captured
) -> None:
    files = [
        write(name, entry(value, unit=unit, better=better)) for name, value in (("a", 100.0), ("b", new))
    ]
    assert compare.main(files) == 0
    assert numbers(capsys) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("better", ["more", "less"])
def test_bounds_are_what_the_quartiles_of_both_leave_open(better: str) -> None:
    found = compare.ratio(entry(100.0, 20.0, better=better), entry(200.0, 40.0, better=better))
    middle, low, high = (2.0, 160 / 120, 240 / 80) if better == "more" else (0.5, 80 / 240, 120 / 160)
    assert (found.middle, found.low, found.high) == pytest.approx((middle, low, high))


@pytest.mark.parametrize(
    ("value", "spread", "code"), [(95.0, 0.0, 0), (85.0, 0.0, 1), (85.0, 40.0, 0), (120.0, 0.0, 0)]
)
def test_a_ratio_past_the_threshold_with_all_its_noise_is_an_exit_code(
    value: float, spread: float, code: int, write: Write, capsys: Captured
) -> None:
    files = [write("a", entry(100.0)), write("b", entry(value, spread))]
    assert compare.main([*files, "--threshold", "0.9"]) == code
    assert capsys.readouterr().out.rstrip().endswith("below 0.9") == bool(code)
    assert compare.main(files) == 0


def test_a_busy_machine_cancels_against_what_did_not_change(write: Write, capsys: Captured) -> None:
    files = [write("a", entry(100.0), plain(50.0)), write("b", entry(60.0), plain(25.0))]
    words = [*files, "--threshold", "0.9", "--providers", "ours"]
    assert compare.main(words) == 1
    assert compare.main([*words, "--against", "plain"]) == 0
    assert numbers(capsys) == [1.2, 1.2, 1.2]
    assert "no case and provider has a ratio" in refusal(capsys, *files, "--against", "nobody")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"cpu": "New"}, "the machines differ (cpu: "),
        ({"equality": "failed: plain differs"}, "its equality check failed: plain"),
        ({"status": "failed", "reason": "no\nroom"}, "its run failed (no room)"),
    ],
)
def test_what_must_not_be_compared_is_refused_unless_forced_and_then_told(
    keys: dict[str, Any], reason: str, write: Write, capsys: Captured
) -> None:
    words = [write("a", entry(1.0)), write("b", entry(0.5), **keys), "--threshold", "0.9"]
    told = refusal(capsys, *words)
    assert reason in told
    assert told.endswith("--force compares all the same")
    assert compare.main([*words, "--force"]) == 1
    assert f"by --force: {reason}" in capsys.readouterr().out
    if "cpu" not in keys:
        alone = [write("c", entry(1.0), plain(0.5, 2.0), **keys), "--ratio-floor", "1"]
        assert reason in refusal(capsys, *alone)
        assert compare.main([*alone, "--force"]) == 0


def test_what_has_no_partner_or_no_value_is_listed_with_its_reason(write: Write, capsys: Captured) -> None:
    files = [write("a", entry(1.0), plain(1.0), plain(1.0, provider="jax"))]
    files.append(write("b", entry(1.0), plain(None, provider="jax")))
    assert compare.main(files) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "width=256 plain not in B" in lines
    assert "width=256 jax no value in B: out of memory" in lines


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (entry(1.0, case="other"), "no case and provider has a ratio"),
        (entry(1.0, unit="us"), "is in updates/s and in us"),
        (entry(float("nan")), "NaN is no figure"),
    ],
)
def test_figures_without_a_ratio_are_refused(
    other: dict[str, Any], reason: str, write: Write, capsys: Captured
) -> None:
    assert reason in refusal(capsys, write("a", entry(1.0)), write("b", other))


@pytest.mark.parametrize(("floor", "code"), [("1.55", 0), ("1.7", 1), ("nan", 1)])
def test_one_file_holds_ours_to_another_provider_round_by_round(
    floor: str, code: int, write: Write, capsys: Captured
) -> None:
    file = write("a", entry(1.0), plain(1.0, 1.5), plain(1.0, 0.5, "jax"))
    assert compare.main([file, "--ratio-floor", floor]) == code
    assert "ours / plain" in (line := capsys.readouterr().out.splitlines()[-1])
    assert ("below" in line) == bool(code)
    assert compare.main([file, "--ratio-floor", floor, "--to", "jax"]) == 1


def test_a_bound_that_nothing_was_held_to_does_not_pass(write: Write, capsys: Captured) -> None:
    file = write("a", entry(1.0), plain(None), plain(1.0, 1.5, "jax"))
    assert refusal(capsys, file, "--ratio-floor", "1").endswith("has no ratio to plain: out of memory")
    assert refusal(capsys, file, "--ratio-floor", "1", "--to", "x").endswith("to x: it was not timed")
    assert "1 files are expected, got 0" in refusal(capsys, "--ratio-floor", "1")
    assert "only --revisions" in refusal(capsys, file, file, "--", "--width", "8")


def test_revisions_take_turns_in_their_own_benchmarks_and_bounds_are_the_span_over_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    """Two revisions whose scripts tell another rate each time, the old one in results of format 1."""
    for name, form in (("old", 1), ("new", 2)):
        (tmp_path / name / "site" / "brc_fast").mkdir(parents=True)
        (tmp_path / name / "site" / "brc_fast" / "__init__.py").write_text(f"factor = {form - 1}")
        (tmp_path / name / "bench").mkdir()
        (tmp_path / name / "bench" / "rates.py").write_text(f"""
import pathlib, brc_fast
def rate():
    order = pathlib.Path({str(tmp_path / "order")!r})
    with order.open("a") as file: file.write({name!r} + " ")
    return 100.0 + 10.0 * brc_fast.factor * len(order.read_text().split())
""")
        (tmp_path / name / "bench" / "bench_replay.py").write_text(f"""
import json, pathlib, sys
from rates import rate  # beside it
assert sys.argv[1:4] == ["--cases", "insert", "--save"]
result = {harness.header()!r} | {{"format": {form}, "benchmark": "replay"}}
result["measurements"] = [{entry(1.0)!r} | dict.fromkeys(("value", "low", "high"), rate())]
pathlib.Path(sys.argv[4] + ".json").write_text(json.dumps(result))
""")
    monkeypatch.setattr(compare, "FOLDER", tmp_path)
    monkeypatch.setattr(compare, "built", lambda revision: tmp_path / revision)
    words = ["--revisions", "old", "new", "--benchmark", "replay", "--threshold", "2", "--"]
    assert compare.main([*words, "--cases", "insert"]) == 1
    assert (tmp_path / "order").read_text().split() == ["old", "new", "new", "old", "old", "new"]
    assert numbers(capsys) == [1.3, 1.2, 1.6]


def test_a_revision_is_built_once_from_what_its_commit_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    made: list[Sequence[Any]] = []

    def done(words: Sequence[Any], what: str) -> str:
        if "pip" not in words:
            return right(words, what)
        made.append(words)
        return ""

    right = compare.done
    monkeypatch.setattr(compare, "done", done)
    monkeypatch.setattr(compare, "FOLDER", tmp_path)
    (first, again) = (compare.built("HEAD") for _ in range(2))
    assert first == again
    assert len(made) == 1
    assert (first / "bench" / "bench_update.py").exists()
    assert "git rev-parse no-such-revision ended with 128" in refusal(
        capsys, "--revisions", "no-such-revision", "HEAD"
    )


def test_a_run_takes_the_package_of_its_folder_and_no_other(tmp_path: Path) -> None:
    package = tmp_path / "site" / "brc_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text("import brc_fast, sys; print(brc_fast.__file__, *sys.argv[1:])")
    command = [sys.executable, "-P", "-c", compare.BOOT, str(tmp_path / "site"), str(script), "--x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == [str(package / "__init__.py"), "--x"]
    (package / "__init__.py").unlink()
    package.rmdir()
    with pytest.raises(harness.Refused, match="the script ended with 1: "):
        compare.done(command, "the script")
