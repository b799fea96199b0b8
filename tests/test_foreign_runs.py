"""Runs that somebody else made: whatever lies in their folders, nothing outside of them is touched."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replay_oracle
from run_folders import SMALL, assert_one_line, contents, everything
from safetensors.numpy import load_file, save_file

from brc_fast.command import main as cli
from brc_fast.envs import resolve
from brc_fast.errors import InputError
from brc_fast.runs import video
from brc_fast.runs.checkpoint import RunFolder, write_text
from brc_fast.runs.evaluate import restore
from brc_fast.runs.plot import curves

NEWEST = "checkpoints/000000000040"
one_line = functools.partial(assert_one_line, silent=False)
COMMANDS = {
    "resume": lambda run: ["train", "--resume", str(run), "--steps", "60"],
    "evaluate": lambda run: ["evaluate", str(run)],
    "plot": lambda run: ["plot", str(run)],
    "video": lambda run: ["video", str(run)],
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by the first test that needs it: a run of 40 steps with an evaluation."""
    return tmp_path_factory.mktemp("original") / "run"


@pytest.fixture
def run(toy: dict, original: Path, tmp_path: Path) -> Path:
    if not original.exists():
        assert cli.main(["train", "toy/One", "--run", str(original), *SMALL]) == 0
        assert cli.main(["evaluate", str(original)]) == 0
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("precious\n")
    return folder


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Whoever opens a FIFO waits for ever."""

    def late(*_: object) -> None:
        raise TimeoutError("waited for a FIFO")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def link(path: Path, outside: Path) -> None:
    """A link to what was there, or to a precious file."""
    target = outside / "precious"
    if path.exists():
        target = outside / f"moved-{path.name}"
        shutil.move(path, target)
    path.symlink_to(target)


def dangling(path: Path, outside: Path) -> None:
    """A link that would make a file elsewhere for who writes to it."""
    clear(path)
    path.symlink_to(outside / "new")


def hard_link(path: Path, outside: Path) -> None:
    target = outside / "precious"
    if path.exists():
        target = outside / f"moved-{path.name}"
        shutil.move(path, target)
    os.link(target, path)


def fifo(path: Path, outside: Path) -> None:
    clear(path)
    os.mkfifo(path)


def a_socket(path: Path, outside: Path) -> None:
    clear(path)
    before = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 characters
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


def other_kind(path: Path, outside: Path) -> None:
    """A folder for a file, and a file for a folder."""
    was_folder = path.is_dir() or path.name.startswith("partial-")
    clear(path)
    path.write_text("x") if was_folder else path.mkdir()


def clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def refused(
    words: list[str], path: Path, capsys: pytest.CaptureFixture[str], *folders: Path, told: str = "must "
) -> None:
    """The command ends with one line that names `path`, and `folders` are as they were."""
    one_line(words, f"brc-fast: {path} {told}", capsys, *folders)


REWRITTEN = ["config.json", "metrics.jsonl", "metrics.jsonl.damaged", "learning_curve.png", "evaluation.json"]
REWRITTEN.append("tasks.json")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("plant", [link, dangling, fifo, a_socket, other_kind])
@pytest.mark.parametrize("name", [*REWRITTEN, *(f"{name}.partial" for name in REWRITTEN)])
def test_a_file_that_is_rewritten_must_be_a_regular_file(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], name: str, plant: Any, command: str
) -> None:
    if plant is other_kind and name.startswith("evaluation.json"):
        return  # the evaluation is printed, and why it is not kept: see test_train
    plant(run / name, outside)
    refused(COMMANDS[command](run), run / name, capsys, run, outside)


FOLDERS = ["checkpoints", "best", "tensorboard", NEWEST, "checkpoints/partial-50"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("plant", [link, dangling, fifo, a_socket, other_kind])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_the_run_must_be_a_folder(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], name: str, plant: Any, command: str
) -> None:
    if name == "checkpoints/partial-50" and plant is not other_kind:
        (run / name).mkdir()
    plant(run / name, outside)
    refused(COMMANDS[command](run), run / name, capsys, run, outside)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("plant", [link, dangling, fifo, a_socket])
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "agent.safetensors", "replay", "replay/manifest.json", "replay/segment", "replay/x"],
)
def test_nothing_in_a_checkpoint_may_be_a_link_or_a_pipe(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], name: str, plant: Any, command: str
) -> None:
    path = run / NEWEST / name
    if name == "replay/segment":
        path = next(path.parent.glob("segment-*.bin"))
    plant(path, outside)
    refused(COMMANDS[command](run), path, capsys, run, outside)


def test_the_policy_of_such_a_run_is_refused_in_python_too(run: Path, outside: Path) -> None:
    link(run / NEWEST / "agent.safetensors", outside)
    with pytest.raises(InputError, match=r"agent\.safetensors must be a regular file .*, got a link"):
        restore(RunFolder(run), "cpu")


def test_of_several_runs_none_is_evaluated_if_one_is_refused(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = outside / "other"
    shutil.copytree(run, other)
    fifo(other / NEWEST / "agent.safetensors", outside)
    path = other / NEWEST / "agent.safetensors"
    refused(["evaluate", str(run), str(other)], path, capsys, run, outside)


def test_the_folder_itself_may_be_a_link_and_what_a_run_does_not_write_may_be_anything(
    run: Path, outside: Path, tmp_path: Path
) -> None:
    (run / "notes").symlink_to(outside / "precious")
    os.mkfifo(run / "pipe")
    (run / "checkpoints" / "latest").symlink_to("000000000040")
    (tmp_path / "shortcut").symlink_to(run)
    before = everything(outside)
    for words in (COMMANDS["evaluate"], COMMANDS["plot"], COMMANDS["resume"]):
        assert cli.main(words(tmp_path / "shortcut")) == 0
    assert RunFolder(run).steps() == [40, 60]
    assert everything(outside) == before


def test_a_copy_of_hard_links_is_gone_on_with_and_the_other_names_keep_their_bytes(
    run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "copy"
    shutil.copytree(run, other, copy_function=os.link)
    before = contents(run)
    for command in ("evaluate", "plot", "resume"):
        assert cli.main(COMMANDS[command](other)) == 0
    assert RunFolder(other).steps() == [40, 60]
    assert contents(run) == before


@pytest.mark.parametrize("inside", [NEWEST, f"{NEWEST}/replay", "checkpoints/partial-50"])
def test_folders_nested_without_end_are_refused_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], inside: str
) -> None:
    top = run / inside
    top.mkdir(exist_ok=True)
    handle = os.open(top, os.O_RDONLY)
    for _ in range(2000):
        os.mkdir("a", dir_fd=handle)
        deeper = os.open("a", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = deeper
    os.close(handle)
    try:
        for command in COMMANDS.values():
            one_line(command(run), "must be at most 100 folders deep; delete", capsys)
    finally:
        subprocess.run(["rm", "-rf", str(top)], check=True)  # Python's own recurses


@pytest.mark.parametrize("plant", [fifo, link])
def test_in_python_too_nothing_waits_for_a_pipe_or_follows_a_link(
    run: Path, outside: Path, plant: Any
) -> None:
    folder = RunFolder(run)
    for name, read in (
        (f"{NEWEST}/agent.safetensors", lambda: folder.load("agent")),
        (f"{NEWEST}/manifest.json", lambda: folder.load("agent")),
        ("metrics.jsonl", lambda: curves(folder)),
        ("config.json", folder.config),
    ):
        plant(run / name, outside)
        with pytest.raises(InputError, match=f"{Path(name).name} must be a regular file, got a "):
            read()


# ---- What lies


def rewrite(file: Path, change: Callable[[dict[str, Any]], None], data: bytes = b"") -> None:
    """Change the header of a safetensors file, append to its data, and have the manifest agree."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + raw[8 + size :] + data
    file.write_bytes(raw)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": len(raw), "crc32": zlib.crc32(raw)}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("command", ["resume", "evaluate"])
@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3", "F8_E5M2"])
def test_a_kind_of_number_that_numpy_lacks_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    def change(header: dict[str, Any]) -> None:
        for name in header.keys() - {"__metadata__"}:
            start, end = header[name]["data_offsets"]
            header[name].update(dtype=kind, shape=[(end - start) // (2 if kind == "BF16" else 1)])

    rewrite(run / NEWEST / "agent.safetensors", change)
    # damaged; or with ml_dtypes imported, as JAX does, numpy has them and torch refuses them
    one_line(COMMANDS[command](run), f"{run / NEWEST}", capsys, run)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("critic/embedding", []),
        ("critic/embedding", [0]),
        ("critic/embedding", [0, 2**40]),
        ("critic/embedding", [0, 2**62]),
    ],
)
@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_shapes_that_lie_are_refused_before_they_are_allocated(
    run: Path, capsys: pytest.CaptureFixture[str], command: str, name: str, shape: list[int]
) -> None:
    file = run / NEWEST / "agent.safetensors"
    end = max(each["data_offsets"][1] for key, each in header_of(file).items() if key != "__metadata__")
    data = b"" if shape else bytes(4)
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + len(data)]}
    rewrite(file, lambda header: header.update({name: entry}), data)
    told = "agent.safetensors is damaged: " if 2**62 in shape else "does not fit this run: "
    one_line(COMMANDS[command](run), told, capsys, run)


def header_of(file: Path) -> dict[str, Any]:
    raw = file.read_bytes()
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


def test_a_policy_larger_than_the_memory_is_refused_before_it_is_allocated(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(run, "critic", width=2**20, depth=1000, members=1000)
    one_line(COMMANDS["evaluate"](run), "the learner does not fit: ", capsys, run)


@pytest.mark.parametrize("name", ["running", "succeeded", "sums", "counts"])
def test_returns_of_other_environments_do_not_fit(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = run / NEWEST / "progress.safetensors"
    arrays = load_file(file)
    arrays[f"episodes/{name}"] = arrays[f"episodes/{name}"][:0].copy()
    save_file(arrays, file)
    rewrite(file, lambda header: None)
    one_line(COMMANDS["resume"](run), f"does not fit this run: episodes {name} must be ", capsys, run)


PARTS = ["agent", "progress", "environments"]
JSON_FILES = ["config.json", f"{NEWEST}/manifest.json", f"{NEWEST}/replay/manifest.json"]
READ_BY = {"config.json": COMMANDS, "metrics.jsonl": ["resume", "plot"]}


def readers(name: str) -> list[str]:
    """Commands that read a file of a run."""
    if name.endswith(("agent.safetensors", f"{NEWEST}/manifest.json")):
        return ["resume", "evaluate"]  # and video, which knows no task of the tests
    return list(READ_BY.get(name, ["resume"]))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (name, command)
        for name in [*JSON_FILES, "metrics.jsonl", *(f"{NEWEST}/{part}.safetensors" for part in PARTS)]
        for command in readers(name)
    ],
)
def test_a_file_of_a_hundred_gigabytes_of_nothing_is_refused_without_reading_it(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    with (run / name).open("r+b") as file:
        file.truncate(100 * 2**30)
    if name.endswith(".safetensors"):  # a manifest that knows; its checksum is not come to
        manifest = json.loads((run / NEWEST / "manifest.json").read_text())
        manifest["files"][Path(name).name]["bytes"] = 100 * 2**30
        (run / NEWEST / "manifest.json").write_text(json.dumps(manifest))
    began = time.monotonic()
    words = COMMANDS[command](run)
    if name == f"{NEWEST}/replay/manifest.json":
        refused(words, run / name, capsys, outside, told="is damaged: it has more than ")
    else:
        one_line(words, Path(name).name, capsys, outside)
    assert time.monotonic() - began < 20


def test_a_segment_of_rows_that_no_save_leaves_is_refused_without_reading_it(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay = run / NEWEST / "replay"
    rows = 2**32 - 1

    def change(manifest: dict[str, Any]) -> None:
        segment = manifest["segments"][0]
        each = (segment["bytes"] - sum(segment["head"]) * 12) // sum(segment["rows"])
        segment.update(rows=[rows, rows], head=[0, 0], bytes=2 * rows * each)
        with (replay / segment["file"]).open("r+b") as file:
            file.truncate(segment["bytes"])

    replay_oracle.rewrite(replay, change)
    one_line(COMMANDS["resume"](run), "must have at most ... rows in its files, got 85", capsys, outside)


@pytest.mark.parametrize(("name", "command"), [(name, x) for name in JSON_FILES for x in readers(name)])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("[" * 100_000 + "]" * 100_000, "nested too deep", id="deep"),
        pytest.param(f'{{"a": {"9" * 5000}}}', "4300 digits", id="long"),
        pytest.param('{"a": 1, "a": 2}', "it has 'a' twice", id="twice"),
        pytest.param('{"a": 1e999}', "it holds 1e999, which is too large", id="infinite"),
        pytest.param('{"a": NaN}', "it holds NaN, which is no number of JSON", id="nan"),
        pytest.param('{"\\ud800": 1}', "it holds half a character", id="surrogate"),
        pytest.param('{"a": "\\udc00"}', "it holds half a character", id="half"),
        pytest.param(" " * 20_000_000, "it has more than ", id="blank"),
    ],
)
def test_json_that_only_a_forger_writes_is_refused_in_one_line(
    run: Path,
    outside: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    told: str,
    command: str,
) -> None:
    (run / name).write_text(text)
    one_line(COMMANDS[command](run), f"{run / name} ... {told}", capsys, run, outside)


def rewritten(file: Path, name: str, values: Any) -> None:
    """Give an array of a part other values, and have the manifest agree."""
    arrays = load_file(file)
    assert name in arrays
    save_file({**arrays, name: values}, file)
    rewrite(file, lambda header: None)


@pytest.mark.parametrize("command", ["resume", "evaluate"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["actor/body.input.kernel", "critic_optimizer/exp_avg/body.input.kernel", "critic/body.head.bias"]
)
def test_weights_that_are_not_finite_are_refused_by_name(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], name: str, value: float, command: str
) -> None:
    file = run / NEWEST / "agent.safetensors"
    names = list(load_file(file))
    name = next(each for each in names if each.startswith(name.split("/")[0]) and each.endswith(name[-8:]))
    values = load_file(file)[name]
    values.reshape(-1)[-1] = value
    rewritten(file, name, values)
    told = f"does not fit this run: agent state {name} must be finite, got {value:g} at ["
    one_line(COMMANDS[command](run), told, capsys, run, outside)


@pytest.mark.parametrize(
    ("part", "name", "kind"),
    [
        ("agent", "actor/body.input.kernel", np.int32),
        ("agent", "critic/body.head.bias", np.uint32),
        ("agent", "generator", np.int8),
        ("progress", "updates", np.float64),
        ("progress", "normalizer/return_min", np.int64),
        ("progress", "normalizer/lengths", np.uint64),
        ("progress", "episodes/succeeded", np.uint8),
    ],
)
def test_arrays_of_another_kind_of_the_same_size_are_refused(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], part: str, name: str, kind: Any
) -> None:
    file = run / NEWEST / f"{part}.safetensors"
    values = load_file(file)[name]
    rewritten(file, name, values.reshape(-1).view(kind).reshape(values.shape))
    one_line(COMMANDS["resume"](run), "does not fit this run: ", capsys, run, outside)
    if part == "agent":
        one_line(COMMANDS["evaluate"](run), "does not fit this run: ", capsys, run, outside)


@pytest.mark.parametrize(
    ("part", "name", "change", "told"),
    [
        ("progress", "updates", lambda x: x * 0 - 1, "updates must be in [0, 2**62), got -1"),
        ("progress", "normalizer/lengths", lambda x: x * 0 - 1, "normalizer lengths must be 0 or more"),
        ("progress", "normalizer/return_max", lambda x: x * 0 - 1e9, "return_min and return_max must be "),
        ("progress", "normalizer/return_min", lambda x: x * np.nan, "return_min and return_max must be "),
        (
            "agent",
            "critic_optimizer/step",
            lambda x: x * 0 - 1,
            "step must be 0 or more, got -1",
        ),
        ("agent", "generator", lambda x: x * 0, "has 0 words left and takes number 0 of 624"),
        (
            "agent",
            "generator",
            lambda x: np.append(x[:16], [112, 2, *x[18:]]).astype(x.dtype),
            "takes number ",
        ),
        ("agent", "generator", lambda x: np.zeros(2**20, np.uint8), "generator must be at most "),
    ],
)
def test_numbers_that_no_run_saves_are_refused(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], part: str, name: str, change: Any, told: str
) -> None:
    file = run / NEWEST / f"{part}.safetensors"
    rewritten(file, name, np.asarray(change(load_file(file)[name])))
    one_line(COMMANDS["resume"](run), told, capsys, run, outside)


def test_a_truth_value_that_is_neither_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / NEWEST / "progress.safetensors"
    succeeded = load_file(file)["episodes/succeeded"]
    succeeded.view(np.uint8)[0] = 2
    rewritten(file, "episodes/succeeded", succeeded)
    one_line(COMMANDS["resume"](run), "progress.safetensors is damaged: ... neither 0 nor 1", capsys, run)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", f"{NEWEST}/agent.safetensors"])
def test_a_file_that_may_not_be_read_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Permissions do not stop root, so the system's answer is put in its place."""
    honest = os.open

    def denied(path: Any, *rest: Any, **options: Any) -> int:
        if str(path) == str(run / name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return honest(path, *rest, **options)

    monkeypatch.setattr(os, "open", denied)
    for command in readers(name):
        one_line(COMMANDS[command](run), f"Permission denied: '{run / name}'", capsys)


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", *(f"{NEWEST}/{part}.safetensors" for part in PARTS)]
)
def test_a_device_in_the_place_of_a_file_is_never_read(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (run / name).unlink()
    if device(run / name) != run / name:
        (run / name).symlink_to("/dev/zero")
    for command in readers(name):
        refused(COMMANDS[command](run), run / name, capsys, run, outside)


def test_networks_that_the_checkpoint_cannot_hold_are_refused_at_once(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(run, "critic", depth=1000)
    began = time.monotonic()
    for command in ("resume", "evaluate"):
        one_line(COMMANDS[command](run), "does not fit this run: agent.safetensors has ", capsys, run)
    settings(run, "critic", width=2**20, members=1000)
    one_line(COMMANDS["evaluate"](run), "the learner does not fit: ", capsys, run)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("name", "told"), [("num_envs", "environments"), ("eval_envs", "evaluation")])
def test_environments_that_fit_no_memory_are_refused_before_they_are_made(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, told: str
) -> None:
    settings(run, "", **{name: 2**20, "replay_capacity": 1000})
    monkeypatch.setattr("brc_fast.agents.memory.available", lambda device: 2 * 10**10)
    monkeypatch.setattr("brc_fast.envs.make", None)
    one_line(
        COMMANDS["resume"](run), f"the {told} ... not fit: 1048576 environments of each task", capsys, run
    )


def test_a_terminal_is_not_spoken_to_by_a_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings(run, "", **{"\x1b[2J\x07": 1})
    line = one_line(COMMANDS["evaluate"](run), "written by another version: it has ", capsys, run)
    assert line.isprintable()


ROW = '{"step": 20, "eval/return/toy/One": 3.0, "eval/return_mean": 3.0}\n'


@pytest.mark.parametrize("command", ["resume", "plot"])
@pytest.mark.parametrize(
    "line",
    [
        *(
            '{"a": 1}',
            "[1]",
            "5",
            "null",
            '{"step": "x"}',
            '{"step": null}',
            '{"step": NaN}',
            '{"step": true}',
        ),
        *('{"step": 1e400}', '{"step": -1}', '{"step": 9223372036854775808}', "nonsense", "\0"),
        pytest.param("[" * 100_000 + "]" * 100_000, id="deep"),
        pytest.param(f'{{"step": {"9" * 5000}}}', id="long"),
    ],
)
def test_lines_of_metrics_that_are_none_are_named_and_the_rest_is_kept(
    run: Path, caplog: pytest.LogCaptureFixture, command: str, line: str
) -> None:
    (run / "metrics.jsonl").write_text(f"{line}\n{ROW}")
    assert cli.main(COMMANDS[command](run)) == 0
    assert f"{run / 'metrics.jsonl'} line 1 " in caplog.messages[0]
    if command == "resume":
        assert (run / "metrics.jsonl").read_text().startswith(ROW)
        assert (run / "metrics.jsonl.damaged").read_text() == f"{line}\n"


def settings(run: Path, group: str = "", /, **changed: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    (config[group] if group else config).update(changed)
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("command", ["resume", "evaluate", "plot"])
@pytest.mark.parametrize(
    ("group", "name", "value", "told"),
    [
        ("", "tasks", [1], "tasks must be tuple[str, ...], got [1]"),
        ("", "tasks", "toy/One", "tasks must be "),
        ("", "device", "foo", "device must be Literal['auto', 'cpu', 'cuda'], got 'foo'"),
        ("", "device", [], "device must be "),
        ("", "precision", "x", "precision must be "),
        ("", "seed", 1.5, "seed must be int, got 1.5"),
        ("", "seed", True, "seed must be int, got True"),
        ("", "num_envs", "2", "num_envs must be int, got '2'"),
        ("", "graphs", 5, "graphs must be bool, got 5"),
        ("", "threads", 1.0, "threads must be int | None, got 1.0"),
        ("", "run", 5, "run must be str | None, got 5"),
        ("", "num_envs", 2**20 + 1, "num_envs must be at most 1048576"),
        ("", "eval_envs", 10**9, "eval_envs must be at most 1048576"),
        ("", "eval_episodes", 10**15, "eval_episodes must be at most 1048576"),
        ("", "critic", [], "critic must be dict, got []"),
        ("", "env", None, "env must be dict, got None"),
        ("critic", "embedding_norm", "zz", "embedding_norm must be Literal['l2', 'l1'], got 'zz'"),
        ("critic", "members", 1001, "members must be at most 1000"),
        ("critic", "depth", 2**20, "depth must be at most 1000"),
        ("actor", "depth", 1001, "depth must be at most 1000"),
        ("learning", "beta1", "x", "beta1 must be float, got 'x'"),
        ("env", "processes", 5, "processes must be bool | None, got 5"),
        ("env", "step_seconds", 1e30, "step_seconds must be at most 1e+06"),
    ],
)
def test_settings_of_another_type_or_size_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], command: str, group: str, name: str, value: Any, told: str
) -> None:
    settings(run, group, **{name: value})
    one_line(COMMANDS[command](run), told, capsys, run)


@pytest.mark.parametrize("command", ["resume", "evaluate", "plot"])
def test_a_setting_of_thousands_of_digits_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"seed": 0', f'"seed": {"9" * 5000}'))
    one_line(COMMANDS[command](run), f"{run / 'config.json'} cannot be read: ", capsys, run)


@pytest.mark.parametrize("task", [r"$\frac{$", "$x$", "_a", "%", "", "\ud800"])
def test_names_of_tasks_are_drawn_as_they_are(run: Path, task: str) -> None:
    row = {"step": 20, f"eval/return/{task}": 1.0, "eval/return/toy/One": 2.0, "eval/return_mean": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    other = run.with_name(r"run $\frac{$")
    shutil.copytree(run, other)
    assert cli.main(["plot", str(run), str(other), "--group", "none", "--output", str(run / "x.svg")]) == 0


def test_tasks_that_share_no_step_have_no_mean(run: Path) -> None:
    rows = [{"step": 20, "eval/return/a": 1.0}, {"step": 40, "eval/return/b": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["plot", str(run)]) == 0


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "segment-" + 32 * "A" + ".bin", "manifest.json", ""])
def test_a_run_whose_replay_names_other_files_is_not_resumed(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    replay = run / NEWEST / "replay"
    replay_oracle.rewrite(
        replay, lambda manifest: [segment.update(file=name) for segment in manifest["segments"]]
    )
    refused(
        COMMANDS["resume"](run), replay / "manifest.json", capsys, run, outside, told="gives segment 1 of "
    )


@pytest.mark.parametrize(
    "name", ["00000000004٤", "٠٠٠٠٠٠٠٠٠٠٤٤", "44", "0000000000044", "9" * 19, "-00000000044"]
)
def test_only_names_that_a_run_gives_are_checkpoints(run: Path, name: str) -> None:
    (run / "checkpoints" / name).mkdir()
    assert RunFolder(run).steps() == [20, 40]
    assert cli.main(COMMANDS["resume"](run)) == 0
    assert RunFolder(run).steps() == [40, 60]


@pytest.mark.parametrize("step", [20, 60, -1, 10**300, float("inf"), "forty", [], None])
def test_a_checkpoint_that_tells_another_step_than_its_name_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], step: Any
) -> None:
    manifest = json.loads((run / NEWEST / "manifest.json").read_text())
    (run / NEWEST / "manifest.json").write_text(json.dumps({**manifest, "step": step}))
    for command in ("resume", "evaluate"):
        one_line(COMMANDS[command](run), str(run / NEWEST), capsys, run)


def test_overwriting_a_run_replaces_its_links_and_not_what_they_name(run: Path, outside: Path) -> None:
    for name in ("config.json", "learning_curve.png", "checkpoints", "tensorboard"):
        link(run / name, outside)
    link(run / "metrics.jsonl.partial", outside)
    before = everything(outside)
    assert cli.main(["train", "toy/One", "--run", str(run), *SMALL, "--overwrite"]) == 0
    assert everything(outside) == before
    RunFolder(run).require_plain()


def test_a_folder_whose_names_are_links_to_nothing_holds_a_run(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run)
    run.mkdir()
    dangling(run / "metrics.jsonl", outside)
    words = ["train", "toy/One", "--run", str(run), *SMALL]
    refused(words, run, capsys, run, outside, told="already holds a run")


def test_a_small_file_is_replaced_without_touching_what_shares_its_place(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for place in ("x.json", "x.json.partial"):
        for make in (os.link, os.symlink):
            make(precious, tmp_path / place)
            write_text(tmp_path / "x.json", "new")
            assert (tmp_path / "x.json").read_text() == "new"
            assert precious.read_text() == "precious"
            assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "x.json"]
            (tmp_path / "x.json").unlink()


# ---- Outputs that the user names


def device(path: Path) -> Path:
    """A device of one's own, or for who may not make one that which nobody may replace."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        return Path("/dev/null")
    return path


@pytest.mark.parametrize("kind", ["link", "dangling", "FIFO", "socket", "device", "partial"])
def test_the_numbers_of_an_evaluation_replace_regular_files_only(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    output = outside / "all.json"
    if kind == "device":
        output = device(output)
    elif kind == "partial":
        link(outside / "all.json.partial", outside)
    else:
        {"link": link, "dangling": dangling, "FIFO": fifo, "socket": a_socket}[kind](output, outside)
    named = outside / "all.json.partial" if kind == "partial" else output
    words = ["evaluate", str(run), "--json", str(output)]
    refused(words, named, capsys, run, outside, told="must be a regular file, got a ")


@pytest.mark.parametrize("plant", [link, dangling, fifo, other_kind])
def test_a_plot_replaces_regular_files_only(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str], plant: Any
) -> None:
    output = outside / "curve.svg"
    plant(output, outside)
    words = ["plot", str(run), "--output", str(output)]
    refused(words, output, capsys, run, outside, told="must be a regular file, got a ")


@pytest.mark.parametrize("length", [241, 250, 255])
def test_a_name_may_be_as_long_as_the_file_system_takes(run: Path, outside: Path, length: int) -> None:
    numbers, curve = outside / ("x" * length), outside / ("x" * (length - 4) + ".svg")
    assert cli.main(["evaluate", str(run), "--json", str(numbers)]) == 0
    assert cli.main(["plot", str(run), "--output", str(curve)]) == 0
    assert sorted(outside.iterdir()) == sorted([curve, numbers, outside / "precious"])
    film = outside / ("x" * (length - 4) + ".gif")
    pictures = iter([np.zeros((8, 8, 3), np.uint8)] * 2)
    video.write(pictures, film, 10.0)
    assert film.is_file()


def test_a_zero_byte_in_a_name_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(["evaluate", str(run), "--json", "a\0b"], "'a\\x00b' cannot be the name of a file", capsys, run)
    one_line(["plot", "a\0b"], "cannot be the name of a file", capsys, run)


def test_a_curve_with_another_name_elsewhere_is_replaced_here_only(run: Path, outside: Path) -> None:
    hard_link(outside / "curve.png", outside)
    assert cli.main(["plot", str(run), "--output", str(outside / "curve.png")]) == 0
    assert (outside / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (outside / "precious").read_text() == "precious\n"


# ---- What is imported


def test_a_plot_imports_nothing_that_a_run_names(
    run: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "tasks": ["gym/named_by_a_run:Env-v0"]}))
    (outside / "named_by_a_run.py").write_text("")
    monkeypatch.syspath_prepend(str(outside))
    assert cli.main(COMMANDS["plot"](run)) == 0
    assert "named_by_a_run" not in sys.modules


EVIL = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
import gymnasium
gymnasium.register("X-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=5)
"""


@pytest.mark.parametrize("command", ["resume", "evaluate", "video"])
@pytest.mark.parametrize(
    ("start", "module"),
    [("", "run.evil"), ("", "run.evil.deeper"), ("run", "evil"), ("..", "{folder}.run.evil"), ("", "linked")],
)
def test_a_run_does_not_bring_its_own_code(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    start: str,
    module: str,
) -> None:
    """start: where the command is given, and Python looks for modules, from the folder that holds the run."""
    mark = tmp_path / "mark"
    (run / "evil.py").write_text(EVIL.format(mark=str(mark)))
    if module == "linked":
        (tmp_path / "linked.py").symlink_to(run / "evil.py")
    task = f"gym/{module.format(folder=tmp_path.name)}:X-v0"
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "tasks": [task]}))
    monkeypatch.chdir(tmp_path / start)
    monkeypatch.syspath_prepend(str(tmp_path / start))
    told = f"brc-fast: {task} would run code out of the run's own folder, "
    one_line(COMMANDS[command](run), told, capsys, run)
    assert not mark.exists()


def test_a_module_beside_the_run_is_imported_as_ever(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tasks.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(run)
    tasks = ["gym/mine.tasks:X-v0", "gym/sys:X-v0", "gym/X-v0", "gym/nowhere:X-v0", "gym/__main__:X-v0"]
    RunFolder(run).require_foreign_code(tasks)
    RunFolder(".").require_foreign_code(tasks)
    (tmp_path / "mine" / "run").symlink_to(run)
    RunFolder(tmp_path / "mine" / "run").require_foreign_code(tasks)


@pytest.mark.parametrize("command", ["resume", "evaluate", "video"])
@pytest.mark.parametrize("module", ["beside", "folder.beside"])
def test_code_in_the_current_folder_is_run_only_when_the_user_says_so(
    run: Path,
    outside: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    module: str,
) -> None:
    file = outside / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    settings(run, "", tasks=[f"gym/{module}:X-v0"])
    monkeypatch.chdir(outside)
    monkeypatch.syspath_prepend("")
    words = COMMANDS[command](run)
    line = one_line(words, f"gym/{module}:X-v0, named by the run's config.json, would import", capsys, run)
    assert f"current folder, {file}: " in line
    assert line.endswith(f"add --allow-module {module} if you trust it")
    one_line([*words, "--allow-module", "other"], f"add --allow-module {module} if", capsys, run)
    if command != "video":
        assert cli.main([*words, "--allow-module", "other", "--allow-module", module]) == 0
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(str(outside))
    RunFolder(run).require_foreign_code([f"gym/{module}:X-v0"])  # from there, another folder of one's own


def test_a_task_of_the_current_folder_that_the_user_names_needs_no_leave(
    run: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (outside / "beside.py").write_text("")
    settings(run, "", tasks=["gym/beside:X-v0"])
    monkeypatch.chdir(outside)
    monkeypatch.syspath_prepend("")
    config = ["train", "--config", str(run / "config.json"), "--run", str(outside / "new")]
    one_line(config, "add --allow-module beside if you trust it", capsys, run)
    assert not (outside / "new").exists()
    assert cli.go_on(RunFolder(run)) == f"go on with: brc-fast train --resume {run} --allow-module beside"
    named = ["train", "gym/beside:X-v0", "--run", str(run), "--resume", "auto"]
    assert cli.main([*named, "--steps", "60"]) == 0
    assert RunFolder(run).steps()[-1] == 60


def test_what_is_installed_below_the_current_folder_was_chosen(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    RunFolder(run).require_foreign_code(["gym/json:X-v0", "gym/numpy:X-v0"])


@pytest.mark.parametrize("task", ["humanoidbench/run:evil", "dmc/run:evil", "envpool/run:evil"])
def test_only_the_names_of_gym_tasks_name_modules(task: str) -> None:
    with pytest.raises(InputError, match="unknown task"):
        resolve(task)
