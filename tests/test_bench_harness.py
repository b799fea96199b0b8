"""Providers take turns, cases become measurements, and what is written, and nothing else, can be read."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import harness
from workloads import WORKLOADS


def test_providers_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    work = {name: lambda name=name: (calls.append(name), time.sleep(0.002)) for name in "abc"}
    ended: list[str] = []
    times = harness.interleave(work, 0.2, turn=0.0, finish=ended.append)
    rounds = [calls[-3 * n - 3 : len(calls) - 3 * n] for n in range(len(times["a"]))]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert len(times["a"]) == len(times["b"]) == len(times["c"]) >= 10
    assert all(0.002 <= seconds < 0.1 for own in times.values() for seconds in own)
    assert ended[-3:] == calls[-3:]


def test_a_turn_holds_as_many_calls_as_fill_it_and_there_are_three_rounds_at_least() -> None:
    calls: list[int] = []
    times = harness.interleave({"fast": lambda: calls.append(1)}, 0.3, turn=0.01)
    assert len(calls) > 10 * len(times["fast"])
    times = harness.interleave({"slow": lambda: time.sleep(0.01)}, 0.0)
    assert len(times["slow"]) == harness.ROUNDS


def test_a_busy_provider_and_an_idle_one_differ_in_the_time_of_the_processor() -> None:
    def busy() -> None:
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass

    work = {"busy": busy, "idle": lambda: time.sleep(0.01)}
    times = harness.interleave(work, 0.0, timer=time.process_time)
    assert min(times["busy"]) >= 0.0099
    assert max(times["idle"]) < 0.005


def test_ratios_are_medians_round_by_round_with_quartiles() -> None:
    # A machine that becomes ten times as slow half-way slows both alike.
    ours, other = [1.0, 1.0, 10.0, 10.0], [2.0, 2.2, 20.0, 18.0]
    assert harness.ratio(other, ours) == pytest.approx((2.0, 2.0, 2.0), abs=0.21)
    assert harness.ratio([2.0, 2.0, 2.0], [1.0, 1.0]) == (2.0, 2.0, 2.0)  # of what ran apart


def noted(path: Path | None = None, **options: Any) -> Any:
    found = harness.Results("update", path and str(path.with_suffix("")))
    times = {"ours": [0.5] * 5, "plain": [0.4, 1.0, 1.0, 1.0, 2.0], "bmm": [0.25] * 5}
    found.case("a", times, "updates/s", 2.0, ours="ours", floor="bmm", at={"width": 8}, **options)
    return found


def test_a_case_has_rates_ratios_and_floors_and_one_below_one_like_any_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, plain = noted().entries
    assert (ours["value"], ours["floor"], ours["over_floor"], ours["rounds"]) == (4.0, 8.0, 2.0, 5)
    assert (plain["low"], plain["value"], plain["high"]) == (2.0, 2.0, 2.0)
    assert plain["ratio"] == (2.0, 2.0, 2.0)
    assert (ours["better"], ours["at"]) == ("more", {"width": 8})
    found = harness.Results("replay")
    found.case("b", {"brc-fast": [2e-6] * 3, "other": [1e-6] * 3}, "ns per row", 10.0, ours="brc-fast")
    assert [entry["value"] for entry in found.entries] == pytest.approx([200.0, 100.0])
    assert found.entries[1]["ratio"] == (0.5, 0.5, 0.5)
    assert "ours 0.50 times as good (0.50 to 0.50)" in capsys.readouterr().out.splitlines()[-1]


def test_a_provider_that_differs_has_a_reason_and_no_figure_and_fails_the_result(
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = {"jax": harness.Differs("differs: loss is 2,\nnot 1"), "other": ImportError("no other")}
    found = noted(missing=missing)
    jax, other = found.entries[2:]
    assert (jax["value"], jax["missing"]) == (None, "differs: loss is 2, not 1")
    assert (other["value"], other["missing"]) == (None, "no other")
    assert found.equality == "failed: jax at a differs: loss is 2, not 1"
    assert found.end() == 1
    told = capsys.readouterr()
    assert told.err == f"{found.equality}\n"
    assert told.out.splitlines()[2].split()[:3] == ["a", "jax", "-"]


def test_where_nothing_was_compared_nothing_is_equal() -> None:
    found = harness.Results("update")
    found.case("a", {}, "updates/s", missing={"ours": harness.Unavailable("no room")})
    assert found.equality == "failed: nothing was compared"


def test_a_run_that_is_killed_keeps_the_cases_that_it_has(tmp_path: Path) -> None:
    found = noted(tmp_path / "update.json")
    stored = harness.read(tmp_path / "update.json")
    assert stored["measurements"] == json.loads(json.dumps(found.entries))
    assert stored["equality"] == "passed"
    assert stored.keys() >= {"format", "date", "cpu", "cores", "gpu", "versions", "commit", "dirty"}


def broken(path: Path, **keys: Any) -> Path:
    noted(path)
    content = json.loads(path.read_text())
    content["measurements"][0] |= keys.pop("entry", {})
    content |= keys
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))
    return path


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"format": 1}, "its format is 1, not 2); measure again with the benchmark that wrote it"),
        ({"format": "gone"}, "its format is None, not 2)"),
        ({"measurements": []}, "it holds no measurements"),
        ({"measurements": [7]}, "is not subscriptable"),
        ({"commit": "gone"}, "it lacks 'commit'"),
        ({"entry": {"value": "fast"}}, "could not convert string to float"),
        ({"entry": {"value": float("nan")}}, "NaN is no figure"),
        ({"entry": {"value": None}}, "it lacks 'missing'"),
    ],
    ids=str,
)
def test_what_is_no_result_is_refused_with_its_reason_and_the_remedy(
    keys: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(harness.Refused) as refused:
        harness.read(broken(tmp_path / "result.json", **keys))
    assert str(refused.value).startswith(f"{tmp_path / 'result.json'} cannot be read (")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"{", b"[1]", b"[" * 100_000], ids=range(5))
def test_a_file_that_is_none_is_refused_in_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "gpu-update.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(harness.Refused, match=r"cannot be read \(.*--save gpu-update"):
        harness.read(path)


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("update", "--budget -1", "argument --budget: invalid seconds value: '-1'"),
        ("update", "--budget nan", "argument --budget: invalid seconds value: 'nan'"),
        ("update", "--device cuda", "torch sees no CUDA device"),
        ("update", "--workload dogs", "argument --workload: invalid choice: 'dogs' (choose from "),
        ("replay", "--capacity 10", "--capacity must be at least 20480"),
        ("replay", "--device cpu --cases insert", "--device knows no --cases"),
        ("envs", "--device cpu --num-envs 2 0", "argument --num-envs: invalid positive value: '0'"),
        ("envs", "--device cpu --tasks nope/x", "nope"),
        ("train", "--device cpu --workload dmc-single --task gym/Pendulum-v1", "both say what to train on"),
        ("train", "--device cpu --task gym/Other-v1", "no threshold is known for gym/Other-v1"),
        ("kernels", "--dry --ops nothing", "argument --ops: invalid choice: 'nothing'"),
        ("kernels", "", "torch sees no CUDA device; --dry runs on the CPU"),
        ("gpu", "", "torch sees no CUDA device; --dry runs on the CPU"),
    ],
)
def test_an_option_that_cannot_be_is_one_line_and_exit_code_2(
    script: str, words: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = script if script == "gpu" else f"bench_{script}"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(name).main(words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}.py: ")
    assert told in line


def test_modules_of_bench_import_each_other_without_a_circle() -> None:
    files = {path.stem: path for path in (ROOT / "bench").rglob("*.py")}
    imports = {}
    for name, path in files.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in (node for node in nodes if isinstance(node, ast.ImportFrom) and node.module):
            found |= {str(node.module), *(alias.name for alias in node.names if node.module == "peers")}
        imports[name] = {word.split(".")[-1] for word in found} & files.keys() - {name}
    left = dict(imports)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_make_bench_leaves_room_in_a_quarter_of_an_hour() -> None:
    text = (ROOT / "Makefile").read_text()
    recipe = text.partition("\nbench: $(VENV)")[2].partition("\n\n")[0]
    budgets = [int(seconds) for seconds in re.findall(r"--budget (\d+)", recipe)]
    assert len(budgets) == recipe.count("bench/bench_")
    assert sum(budgets) <= 800  # of 900: starts and what compiles come on top
    shapes = re.search(r"^SHAPES := (.*)$", text, re.MULTILINE)
    assert shapes is not None
    assert set(shapes[1].split()) <= WORKLOADS.keys()
