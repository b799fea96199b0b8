"""What benchmarks write can be read again; what cannot be read is refused in one line."""

from __future__ import annotations

import json
import reprlib
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import harness

    return harness


def one(harness: Any) -> Any:
    return harness.measured("width=256", "ours", [3.0, 1.0, 2.0, 4.0], "updates/s", "more", floor=9.0)


def test_a_measurement_is_the_median_with_quartiles_of_its_rounds(harness: Any) -> None:
    assert one(harness) == {
        "case": "width=256",
        "provider": "ours",
        "value": 2.5,
        "unit": "updates/s",
        "better": "more",
        "low": 2.0,
        "high": 3.0,
        "rounds": 4,
        "floor": 9.0,
    }
    with pytest.raises(ValueError, match="width=256, ours: no round was measured"):
        harness.measured("width=256", "ours", [], "updates/s", "more")


def test_an_absent_measurement_has_the_same_keys_and_a_reason(harness: Any) -> None:
    missing = harness.absent("width=256", "jax", "jax is not installed", "updates/s", "more")
    assert missing.keys() - one(harness).keys() == {"missing"}
    assert (missing["value"], missing["rounds"]) == (None, 0)


def test_equality_names_what_differs(harness: Any) -> None:
    assert harness.equality([]) == "passed"
    assert harness.equality(["plain differs", "jax differs"]) == "failed: plain differs; jax differs"


def test_providers_take_turns_and_have_wall_and_processor_time(harness: Any) -> None:
    order: list[str] = []

    def busy() -> None:
        order.append("busy")
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass

    def idle() -> None:
        order.append("idle")
        time.sleep(0.01)

    times = harness.interleave({"busy": busy, "idle": idle}, seconds=0.0, calls=2, warmup=0)
    assert order == ["busy", "busy", "idle", "idle"] * 3
    assert {name: len(values) for name, values in times.items()} == {"busy": 3, "idle": 3}
    assert min(times["busy"] + times["idle"] + times.cpu["busy"]) >= 0.0099
    assert max(times.cpu["idle"]) < 0.005


def test_what_is_written_is_read_again_with_the_header(harness: Any, tmp_path: Path) -> None:
    path = harness.write("update", {"benchmark": "update", "measurements": [one(harness)]}, tmp_path)
    found = harness.read(path)
    assert found["measurements"] == [one(harness)]
    assert found.keys() >= {"format", "date", "cpu", "cores", "gpu", "versions", "commit", "dirty"}


def test_a_killed_run_keeps_the_lines_that_are_complete(harness: Any, tmp_path: Path) -> None:
    path = tmp_path / "update.jsonl"
    lines = harness.Lines(path, benchmark="update")
    lines.add("rows", {"width": 256})
    lines.add("measurements", one(harness))
    assert harness.read(path)["measurements"] == [one(harness)]  # while it is still open
    path.write_text(path.read_text() + '{"measurements": {"case"')
    found = harness.read(path)
    assert (found["benchmark"], found["rows"]) == ("update", [{"width": 256}])
    assert found["measurements"] == [one(harness)]
    lines.file.close()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory); a benchmark's --save NAME makes one"),
        (b"\xff\xfe", "cannot be read (no text)"),
        (b'{"format": 1, "measure', "is not JSON"),
        (b"[1, 2]", "holds no results: a JSON object is expected, not list"),
        (
            b'{"benchmark": "envs"}',
            "has format 0, older than 1: measure again with bench/bench_envs.py --save",
        ),
        (b'{"format": 2}', "has format 2, newer than 1: use the brc-fast that wrote it"),
        (b'{"format": "x"}', "has format x, newer than 1"),
        (b'{"format": 1, "measurements": []}', "holds no measurements"),
        (b'{"format": 1, "measurements": [{"case": "a"}]}', "measurement 0 lacks better, missing, provider"),
        (b'{"format": 1, "measurements": [{"value": 1}]}', "measurement 0 lacks better, case, floor, high"),
        (b'{"format": 1, "measurements": [7]}', "measurement 0 is none"),
        (
            b'{"format": 1, "measurements": [], "reason": "no\\nGPU"}',
            "holds no measurements (no\nGPU): measure",
        ),
        (b'{"format": true}', "has format True"),
        pytest.param(b"[" * 100_000, "is not JSON (maximum recursion depth exceeded", id="deep"),
        (b'{"cpu": "\\ud800"}', "is not JSON ('utf-8' codec can't encode"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(
    content: bytes | None, reason: str, harness: Any, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(harness.Unreadable) as refused:
        harness.read(path)
    assert str(refused.value).startswith(str(path))
    assert reason in str(refused.value)
    assert "\n" not in harness.one_line(refused.value)


def stored(harness: Any, path: Path, lacks: str | None = None, entry: Any = None, **keys: Any) -> Path:
    """A file with a result of these keys, of whose measurement some may be other ones."""
    entries = [{**one(harness), **(entry or {})}]
    content = {**harness.header(), "benchmark": "envs", "measurements": entries, **keys}
    content.pop(lacks, None)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        *(
            ({"lacks": key}, f" lacks {key}; measure again with bench/bench_envs.py --save result")
            for key in ("commit", "cores", "cpu", "date", "dirty", "gpu", "torch_threads", "versions")
        ),
        ({"date": 5}, "date is 5, not text; measure again with"),
        ({"versions": None}, "versions is None, not an object"),
        ({"versions": {"torch": 2}}, "torch is 2, not text or null"),
        ({"torch_threads": None}, "torch_threads is None, not a whole number"),
        ({"torch_threads": True}, "torch_threads is True, not a whole number"),
        ({"dirty": "no"}, "dirty is 'no', not true, false or null"),
        ({"benchmark": [1]}, "benchmark is [1], not text; measure again with the benchmark that wrote it"),
        ({"equality": True}, "equality is True, not text or null"),
        ({"entry": {"value": "fast"}}, "measurement 0 is none: value is 'fast', not a finite number or null"),
        ({"entry": {"value": float("nan")}}, "measurement 0 is none: value is nan, not a finite number"),
        ({"entry": {"high": float("inf")}}, "measurement 0 is none: high is inf, not a finite number"),
        ({"entry": {"floor": 10**400}}, "measurement 0 is none: floor is 1000000"),
        ({"entry": {"value": True}}, "measurement 0 is none: value is True"),
        ({"entry": {"rounds": None}}, "measurement 0 is none: rounds is None, not a whole number"),
        ({"entry": {"case": [1]}}, "measurement 0 is none: case is [1], not text"),
        ({"entry": {"better": "most"}}, "measurement 0 is none: better is 'most', not 'more' or 'less'"),
        ({"entry": {"value": None, "missing": 3}}, "measurement 0 is none: missing is 3, not text"),
    ],
    ids=lambda value: reprlib.repr(value),
)
def test_what_is_not_as_it_is_written_is_refused_before_anything_is_made_of_it(
    keys: dict[str, Any], reason: str, harness: Any, tmp_path: Path
) -> None:
    path = stored(harness, tmp_path / "result.json", **keys)
    with pytest.raises(harness.Unreadable) as refused:
        harness.read(path)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["[1]"], "line 1 is no object"),
        (["{}", "[1]"], "line 2 is no object"),
        (["{}", "{"], "line 2: Expecting property name"),
        (['{"measurements": 5}', '{"measurements": {}}'], "line 2 adds to 'measurements', which is no list"),
        (["[" * 100_000], "maximum recursion depth exceeded"),
    ],
    ids=["first", "later", "cut", "no list", "deep"],
)
def test_lines_that_add_nothing_are_refused_with_their_number(
    lines: list[str], reason: str, harness: Any, tmp_path: Path
) -> None:
    path = tmp_path / "result.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(harness.Unreadable, match=r"result\.jsonl is not JSON") as refused:
        harness.read(path)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        (
            "envs",
            {"benchmark": "envs", "starts": []},
            "measure again with bench/bench_envs.py --start --save envs",
        ),
        (
            "demo",
            {"benchmark": "train", "command": "brc-fast train a/b"},
            "no benchmark writes it; it holds runs",
        ),
        ("gpu-no", {}, "measure again with the benchmark that wrote it"),
        ("a", {"benchmark": "no-such"}, "measure again with the benchmark that wrote it"),
        ("a", {"benchmark": "../bench_envs"}, "measure again with the benchmark that wrote it"),
        ("gpu-mine", {"benchmark": "train"}, "measure again with bench/bench_train.py --save gpu-mine"),
        ("a", {"part": "kernels"}, "measure again with bench/gpu.py --parts kernels"),
        ("a", {"benchmark": "kernels"}, "measure again with bench/bench_kernels.py --json "),
        (
            "a",
            {"benchmark": "replay", "device": "cuda"},
            "measure again with bench/bench_replay.py --device cuda",
        ),
    ],
)
def test_the_remedy_names_the_command_that_makes_a_result_or_none(
    name: str, content: dict[str, Any], remedy: str, harness: Any, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(content))
    with pytest.raises(harness.Unreadable) as refused:
        harness.read(path)
    assert f"has format 0, older than 1: {remedy}" in str(refused.value)


def test_lines_that_hold_nothing_complete_are_refused(harness: Any, tmp_path: Path) -> None:
    path = tmp_path / "result.jsonl"
    path.write_text('{"format": 1')
    with pytest.raises(harness.Unreadable, match=r"is not JSON \(no line is complete\)"):
        harness.read(path)


def test_an_older_result_of_a_gpu_names_the_part_that_makes_it_anew(harness: Any, tmp_path: Path) -> None:
    path = tmp_path / "gpu-update.json"
    path.write_text(json.dumps({"part": "update"}))
    with pytest.raises(harness.Unreadable, match=r"again with bench/gpu\.py --parts update"):
        harness.read(path)
