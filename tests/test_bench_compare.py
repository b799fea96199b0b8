"""Comparisons tell better from worse in any unit, know their noise, and refuse what cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import compare

    return compare


@pytest.fixture
def write(compare: Any, tmp_path: Path) -> Any:
    """Write a result with these measurements; more keys go into its header."""
    import harness

    def written(name: str, entries: Sequence[Any], **keys: Any) -> str:
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


def refusal(compare: Any, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        compare.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


def numbers(line: str) -> list[float]:
    """The ratio and its bounds."""
    words = [word.strip("()") for word in line.split()[2:]]
    return [float(word) for word in words if word.replace(".", "").isdigit()]


def test_a_ratio_above_one_is_better_in_rates_and_in_times(
    compare: Any, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def both(rate: float, time: float) -> list[Any]:
        return [entry(rate), entry(time, case="sample", better="less", unit="us")]

    assert compare.main([write("a", both(100.0, 10.0)), write("b", both(200.0, 5.0))]) == 0
    *_, rate, time = capsys.readouterr().out.splitlines()
    assert numbers(rate) == numbers(time) == [2.0, 2.0, 2.0]


def test_bounds_widen_with_quartiles_and_narrow_with_rounds(compare: Any) -> None:
    def span(spread: float, rounds: int) -> float:
        found = compare.ratio(entry(100.0, spread, rounds), entry(100.0, spread, rounds))
        assert found.low <= found.middle <= found.high
        return float(found.high - found.low)

    assert span(0.0, 100) == 0.0
    assert span(10.0, 100) == pytest.approx(2 * span(5.0, 100), rel=0.01)
    assert span(5.0, 400) == pytest.approx(span(5.0, 100) / 2, rel=0.01)


@pytest.mark.parametrize(
    ("value", "spread", "code"), [(95.0, 0.0, 0), (85.0, 0.0, 1), (85.0, 40.0, 0), (120.0, 0.0, 0)]
)
def test_a_ratio_past_the_threshold_with_all_its_noise_is_an_exit_code(
    value: float, spread: float, code: int, compare: Any, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write("a", [entry(100.0)]), write("b", [entry(value, spread)])]
    assert compare.main([*files, "--threshold", "0.9"]) == code
    assert capsys.readouterr().out.rstrip().endswith("below 0.9") == bool(code)
    assert compare.main(files) == 0


def test_a_busy_machine_cancels_against_what_did_not_change(
    compare: Any, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def both(ours: float, plain: float) -> list[Any]:
        return [entry(ours), entry(plain, provider="plain"), entry(7.0, provider="jax")]

    files = [write("a", both(100.0, 50.0)), write("b", both(60.0, 25.0))]
    words = ["--threshold", "0.9", "--providers", "ours"]
    assert compare.main([*files, *words]) == 1
    assert compare.main([*files, *words, "--against", "plain"]) == 0
    assert numbers(capsys.readouterr().out.splitlines()[-1])[:3] == [1.2, 1.2, 1.2]
    assert "no case has a ratio of nobody" in refusal(compare, capsys, *files, "--against", "nobody")


def test_different_machines_are_refused_unless_forced_and_then_marked(
    compare: Any, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write("a", [entry(1.0)], cpu="Old"), write("b", [entry(2.0)], cpu="New")]
    told = refusal(compare, capsys, *files)
    assert told.endswith(": the machines differ (cpu: Old, New); --force compares all the same")
    assert compare.main([*files, "--force"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("different machines")


@pytest.mark.parametrize(
    ("keys", "reason", "short"),
    [
        ({"equality": "failed: plain differs"}, "its equality check failed: plain", "failed equality check"),
        ({"status": "failed", "reason": "out of\nmemory"}, "its run failed (out of memory)", "failed run"),
    ],
)
def test_what_must_not_be_trusted_is_refused_unless_forced_and_then_marked(
    keys: dict[str, Any],
    reason: str,
    short: str,
    compare: Any,
    write: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = entry(0.3, provider="plain", ratio=[1.5, 1.4, 1.6])
    first, wrong = write("a", [entry(1.0)]), write("b", [entry(0.5), plain], **keys)
    two, one = [first, wrong, "--threshold", "0.9"], [wrong, "--ratio-floor", "1.7"]
    for words in (two, one):
        told = refusal(compare, capsys, *words)
        assert f"{wrong} must not be compared: {reason}" in told
        assert told.endswith("; --force compares all the same")
        assert compare.main([*words, "--force"]) == 1
        assert f"  {short}" in capsys.readouterr().out.splitlines()[-1]


def test_what_has_no_partner_or_no_value_is_listed_with_its_reason(
    compare: Any, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [entry(1.0), entry(1.0, provider="plain"), entry(1.0, provider="jax")]
    files = [write("a", old), write("b", [entry(1.0), entry(None, provider="jax")])]
    assert compare.main(files) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "width=256 plain only in A" in lines
    assert "width=256 jax no value in B: out of memory" in lines


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (entry(1.0, case="other"), "share no case and provider"),
        (entry(1.0, unit="us"), "is in updates/s and in us"),
        (entry(1e-300) | {"high": 1e300}, "1 and 1e-300 have no ratio; measure both anew"),
        (entry(-1.0), "1 and -1 have no ratio; measure both anew"),
        (entry(math.nan), "NaN is no figure"),
    ],
)
def test_figures_without_a_ratio_are_refused(
    other: dict[str, Any], reason: str, compare: Any, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reason in refusal(compare, capsys, write("a", [entry(1.0)]), write("b", [other]))


@pytest.mark.parametrize(("floor", "code"), [(1.55, 0), (1.7, 1)])
def test_one_file_holds_ours_to_another_provider_round_by_round(
    floor: float, code: int, compare: Any, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, jax = (
        entry(1.0, provider=n, ratio=[r, r - 0.1, r + 0.1]) for n, r in (("plain", 1.5), ("jax", 0.5))
    )
    file = write("a", [entry(1.0), plain, jax])
    assert compare.main([file, "--ratio-floor", str(floor)]) == code
    assert "ours / plain" in (line := capsys.readouterr().out.splitlines()[-1])
    assert ("below" in line) == bool(code)
    assert compare.main([file, "--ratio-floor", str(floor), "--to", "jax"]) == 1


def test_a_bound_that_nothing_was_held_to_does_not_pass(
    compare: Any, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refusal(compare, capsys, write("a", [entry(1.0)]), "--ratio-floor", "1")
    assert told.endswith("has no ratios; bench_update.py --save NAME measures them")
    jax = entry(1.0, provider="jax", ratio=[1.5, 1.4, 1.6])
    lost = [entry(1.0), entry(None, provider="plain"), jax]
    told = refusal(compare, capsys, write("a", lost), "--ratio-floor", "1")
    assert told.endswith("width=256 has no ratio to plain: plain: out of memory")
    assert "invalid bound value: 'nan'" in refusal(compare, capsys, "a", "b", "--threshold", "nan")
    assert "1 files are expected, got 0" in refusal(compare, capsys, "--ratio-floor", "1")


def test_revisions_take_turns_and_their_bounds_are_the_span_over_rounds(
    compare: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def run(site: Path, benchmark: str, words: Sequence[str], name: str) -> dict[str, Any]:
        order.append(str(site))
        assert (benchmark, words) == ("replay", ["--cases", "insert"])
        rate = 100.0 if str(site) == "old" else 100.0 + 10.0 * len(order)
        return {"measurements": [entry(rate)]}

    monkeypatch.setattr(compare, "built", Path)
    monkeypatch.setattr(compare, "run", run)
    words = ["--revisions", "old", "new", "--benchmark", "replay", "--threshold", "2", "--"]
    assert compare.main([*words, "--cases", "insert"]) == 1
    assert order == ["old", "new", "new", "old", "old", "new"]
    assert numbers(capsys.readouterr().out.splitlines()[-1])[:3] == [1.3, 1.2, 1.6]


def test_a_revision_that_does_not_exist_is_one_line(compare: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ": git rev-parse" in refusal(compare, capsys, "--revisions", "no-such-revision", "HEAD")


def test_a_run_takes_the_package_of_its_folder_and_no_other(compare: Any, tmp_path: Path) -> None:
    package = tmp_path / "site" / "brc_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text("import brc_fast, sys; print(brc_fast.__file__, *sys.argv[1:])")
    command = [compare.sys.executable, "-P", "-c", compare.BOOT, str(tmp_path / "site"), str(script), "--x"]
    done = compare.subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == [str(package / "__init__.py"), "--x"]
    (package / "__init__.py").unlink()
    package.rmdir()
    assert compare.subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0


def test_a_benchmark_that_fails_is_one_line(
    compare: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "brc_fast").mkdir()
    (tmp_path / "brc_fast" / "__init__.py").write_text("raise ImportError('libold.so is gone')")
    monkeypatch.setattr(compare, "FOLDER", tmp_path)
    with pytest.raises(compare.Refused, match=r"bench_replay\.py with A ended with 1: .*libold\.so is gone"):
        compare.run(tmp_path, "replay", [], "A")
