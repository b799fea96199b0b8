"""Checkpoints of the authors' code and runs: the same numbers on both sides, and nothing else is let in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require
from run_folders import assert_one_line, make_run
from test_published_update import Recording, recordings, relative_error

require("train", "convert")
import msgpack

from brc_fast.command import main as cli
from brc_fast.runs import convert
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.evaluate import restore

Nested = dict[str, Any]


def nested(arrays: dict[str, np.ndarray]) -> Nested:
    tree: Nested = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = array
    return tree


def recorded(path: Path) -> dict[str, np.ndarray]:
    """The parameters that a recording begins with, by flax's paths."""
    data = np.load(path)
    return {key.removeprefix("init/"): data[key] for key in data.files if key.startswith("init/")}


def names_of(recording: Recording) -> list[str]:
    return [f"toy/{number}" for number in range(recording.meta["num_tasks"])]


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    place = tmp_path_factory.mktemp("two")
    convert.to_flax(
        RunFolder(make_run(place / "run", ("toy/One", "toy/Two"), sizes=(5, 2))), place / "a.msgpack"
    )
    return (place / "a.msgpack").read_bytes()


@pytest.fixture
def checkpoint(two_tasks: bytes) -> dict[str, np.ndarray]:
    """Of two tasks, by paths."""
    return convert.unpack(two_tasks)


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("path", recordings("meta"))
def test_a_checkpoint_that_flax_wrote_gives_the_recorded_actions_and_logits(
    path: Path, form: str, tmp_path: Path
) -> None:
    require("mjx")
    from flax import serialization

    recording = Recording(path, torch.float32)
    tree = nested(recorded(path))
    source = tmp_path / "theirs"
    if form == "file":
        source.write_bytes(serialization.to_bytes(tree))
    else:
        source.mkdir()
        for name, network in tree.items():
            (source / f"{name}.txt").write_bytes(serialization.to_bytes(network))
    words = ["convert", str(source), "--to", str(tmp_path / "run"), "--tasks", *names_of(recording)]
    assert cli.main(words) == 0

    _, agent = restore(RunFolder(tmp_path / "run"), "cpu")
    batch, noise = recording.batch(0), recording.noise(0)
    target = agent.critic_target(batch, noise.next_action)
    logits = agent.critic(batch.observations, batch.actions, batch.task_ids)
    seen = {"q_logits": logits, "next_q_logits": target.next_logits, "next_action": target.next_actions}
    for name, value in seen.items():
        expected = recording.tensor(f"expect/0/{name}")
        assert relative_error(value, expected) <= 1e-6, name
    assert agent.alpha == pytest.approx(recording.meta["init_temperature"], rel=1e-6)


@pytest.mark.parametrize("path", recordings("meta"))
def test_flax_restores_what_a_run_became_bit_for_bit(path: Path, tmp_path: Path) -> None:
    require("mjx")
    from flax import serialization

    theirs, recording = recorded(path), Recording(path, torch.float32)
    (tmp_path / "theirs").write_bytes(convert.pack(theirs))
    convert.from_flax(tmp_path / "theirs", RunFolder(tmp_path / "run"), names_of(recording))
    for place in ("back.msgpack", "back"):
        assert cli.main(["convert", str(tmp_path / "run"), "--to", str(tmp_path / place)]) == 0
    whole = serialization.msgpack_restore((tmp_path / "back.msgpack").read_bytes())
    parts = {name: tmp_path / "back" / f"{name}.txt" for name in whole}
    read = {name: serialization.msgpack_restore(file.read_bytes()) for name, file in parts.items()}
    for tree in (whole, read):
        restored = convert.unpack(serialization.to_bytes(tree))
        assert restored.keys() == theirs.keys()
        for name, array in theirs.items():
            assert np.array_equal(restored[name], array), name


def test_arrays_that_flax_cut_in_chunks_are_joined_and_cut_again(monkeypatch: pytest.MonkeyPatch) -> None:
    require("mjx")
    from flax import serialization

    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 40)
    monkeypatch.setattr(convert, "CHUNK", 40)
    array = np.arange(35, dtype=np.float32).reshape(5, 7)
    assert np.array_equal(convert.unpack(serialization.to_bytes({"a": {"b": array}}))["a/b"], array)
    packed = convert.pack({"a/b": array})
    assert packed.count(b"chunks") == 1
    assert np.array_equal(serialization.msgpack_restore(packed)["a"]["b"], array)


def test_narrower_and_wider_numbers_are_read_as_they_are() -> None:
    for dtype in (np.float16, np.float64):
        array = np.array([0.5, -3.0], dtype)
        assert np.array_equal(convert.unpack(convert.pack({"a": array}))["a"], array)
    require("mjx")
    import jax
    from flax import serialization

    halves = jax.numpy.array([1.5, -2.0], jax.numpy.bfloat16)
    assert convert.unpack(serialization.to_bytes({"a": halves}))["a"].tolist() == [1.5, -2.0]


def test_a_converted_run_evaluates_trains_on_and_is_told_from_a_run(
    toy: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(make_run(tmp_path / "one", ("toy/One",), sizes=(3, 1)))
    convert.to_flax(run, tmp_path / "one.msgpack")
    words = ["convert", str(tmp_path / "one.msgpack"), "--to", str(tmp_path / "run"), "--tasks", "toy/One"]
    assert cli.main([*words, "--step", "700", "--v-max", "20"]) == 0
    assert "3 observed numbers, 1 actions, 1 tasks" in capsys.readouterr().out
    step, agent = restore(RunFolder(tmp_path / "run"), "cpu")
    assert (step, agent.v_max) == (700, 20.0)
    assert cli.main(["evaluate", str(tmp_path / "run"), "--episodes", "2"]) == 0
    small = ["--num-envs", "2", "--steps", "40", "--random-steps", "20", "--batch-size", "16"]
    small += ["--eval-every", "40", "--eval-episodes", "2", "--quiet"]
    words = ["train", "toy/Two", "--from", str(tmp_path / "run"), "--run", str(tmp_path / "next"), *small]
    assert cli.main(words) == 0
    assert_one_line(
        ["convert", str(tmp_path / "one.msgpack"), "--to", str(tmp_path / "run"), "--tasks", "toy/One"],
        "already holds a run",
        capsys,
    )
    assert_one_line(["convert", str(tmp_path / "run"), "--to", str(tmp_path / "b.npz")], "b.npz", capsys)


def test_networks_that_a_checkpoint_may_lack_begin_as_a_new_agents(
    tmp_path: Path, checkpoint: dict[str, np.ndarray]
) -> None:
    few = {path: x for path, x in checkpoint.items() if path.startswith(("actor/", "critic/"))}
    (tmp_path / "few").write_bytes(convert.pack(few))
    told = convert.from_flax(tmp_path / "few", RunFolder(tmp_path / "run"), ("a/b", "c/d"))
    assert "without target_critic and temp" in told
    _, agent = restore(RunFolder(tmp_path / "run"), "cpu")
    assert agent.alpha == pytest.approx(0.1)
    for mine, theirs in zip(agent.critic.parameters(), agent.target_critic.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def array_of(shape: Any, dtype: str, held: bytes) -> Any:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, held), use_bin_type=True))


def deep(levels: int) -> bytes:
    return b"\x81\xa1a" * levels + b"\x80"


ONE = array_of((1,), "float32", bytes(4))
FOREIGN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "incomplete"),
    "pickle": (
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
        "damaged",
    ),
    "cut": (convert.pack({"actor/a": np.ones(9, np.float32)})[:-5], "incomplete"),
    "more": (convert.pack({"actor/a": np.ones(9, np.float32)}) + b"\x00", "damaged"),
    "list": (msgpack.packb([1, 2]), "map of arrays"),
    "number": (msgpack.packb({"actor": {"a": 3}}), "actor/a must be an array"),
    "bytes": (msgpack.packb({"actor": b"abc"}, use_bin_type=True), "max_bin_len"),
    "complex": (msgpack.packb({"actor": msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))}), "type 2"),
    "unknown type": (msgpack.packb({"actor": msgpack.ExtType(99, b"abc")}), "type 99"),
    "timestamp": (msgpack.packb({"actor": msgpack.Timestamp(1)}), "Timestamp"),
    "object": (msgpack.packb({"actor": array_of((1,), "object", bytes(8))}), "object"),
    "integers": (msgpack.packb({"actor": array_of((1,), "int32", bytes(4))}), "int32"),
    "too few bytes": (msgpack.packb({"actor": array_of((2**30, 2**9), "float32", bytes(8))}), "bytes"),
    "negative size": (msgpack.packb({"actor": array_of((-1, -1), "float32", bytes(4))}), "shape"),
    "array in an array": (
        msgpack.packb({"actor": msgpack.ExtType(1, msgpack.packb((ONE, "float32", b"")))}),
        "type 1",
    ),
    "deep": (deep(40), "nested too deep"),
    "very deep": (deep(100_000), "nested too deep"),
    "twice": (b"\x82\xa1a" + msgpack.packb(ONE) + b"\xa1a" + msgpack.packb(ONE), "twice"),
    "a number for a name": (b"\x81\x01" + msgpack.packb(ONE), "int is not allowed"),
    "a huge list": (b"\xdd\xff\xff\xff\xff", "exceeds"),
    "chunks that do not fit": (
        msgpack.packb(
            {"actor": {"__msgpack_chunked_array__": True, "shape": {"0": 9}, "chunks": {"0": ONE}}}
        ),
        "chunks",
    ),
    "another network": (convert.pack({"policy/a": np.ones(1, np.float32)}), "policy"),
    "no critic": (convert.pack({"actor/a": np.ones(1, np.float32)}), "lacks the network critic"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_checkpoint_is_refused_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, told = FOREIGN[name]
    (tmp_path / "foreign").write_bytes(data)
    words = ["convert", str(tmp_path / "foreign"), "--to", str(tmp_path / "run"), "--tasks", "a/b"]
    assert_one_line(words, told, capsys)
    assert not (tmp_path / "run").exists()


KERNEL = "actor/BroNet_0/Dense_0/kernel"
Change = Callable[[dict[str, np.ndarray]], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "missing": (
        lambda x: x.pop("critic/q_value_ensemble/q_value_ensemble/critic/LayerNorm_0/bias"),
        "LayerNorm_0/bias",
    ),
    "missing embedding": (lambda x: x.pop("critic/task_embedding/embeddings/embedding"), "1 tasks"),
    "missing block": (
        lambda x: [x.pop(k) for k in list(x) if k.startswith("actor/BroNet_0/BronetBlock_0/Dense_1")],
        "actor lacks BroNet_0/BronetBlock_0/Dense_1/bias",
    ),
    "extra": (
        lambda x: x.update({"actor/Dense_2/bias": np.ones(2, np.float32)}),
        "actor has an unknown array Dense_2/bias",
    ),
    "far block": (
        lambda x: x.update({"actor/BroNet_0/BronetBlock_900/Dense_0/bias": np.ones(8, np.float32)}),
        "BronetBlock_",
    ),
    "wrong shape": (
        lambda x: x.update({"actor/Dense_1/kernel": np.ones((8, 3), np.float32)}),
        "actor/Dense_1/kernel must have shape [8, 2], got [8, 3]",
    ),
    "wrong inputs": (
        lambda x: x.update({KERNEL: np.ones((36, 8), np.float32)}),
        "critic/q_value_ensemble/q_value_ensemble/critic/Dense_0/kernel must have shape",
    ),
    "flat": (lambda x: x.update({KERNEL: np.ones(8, np.float32)}), "must have 2 axes"),
    "empty": (lambda x: x.update({KERNEL: np.ones((0, 8), np.float32)}), "axes"),
    "NaN": (lambda x: x.update({"actor/Dense_1/kernel": np.full((8, 2), np.nan, np.float32)}), "finite"),
    "terminal": (lambda x: x.update({"actor/\x1b[31m": np.ones(2, np.float32)}), "\\x1b"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parameters_that_do_not_fit_are_told_by_their_path(
    name: str, checkpoint: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, told = CHANGES[name]
    change(checkpoint)
    (tmp_path / "changed").write_bytes(convert.pack(checkpoint))
    words = ["convert", str(tmp_path / "changed"), "--to", str(tmp_path / "run"), "--tasks", "a/b", "c/d"]
    assert_one_line(words, told, capsys)


def test_tasks_must_be_as_many_as_the_checkpoint_has(
    checkpoint: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two").write_bytes(convert.pack(checkpoint))
    words = ["convert", str(tmp_path / "two"), "--to", str(tmp_path / "run")]
    assert_one_line(words, "2 tasks: name as many with --tasks, got none", capsys)
    assert_one_line([*words, "--tasks", "a/b"], "2 tasks: name as many with --tasks, got a/b", capsys)
    assert_one_line([*words, "--tasks", "a/b", "a/b"], "tasks must differ", capsys)
    (tmp_path / "link").symlink_to(tmp_path / "two")
    assert_one_line(["convert", str(tmp_path / "link"), *words[2:], "--tasks", "a/b", "c/d"], "link", capsys)
    assert_one_line(["convert", str(tmp_path / "nothing"), *words[2:]], "there is no checkpoint", capsys)
    (tmp_path / "empty").mkdir()
    assert_one_line(["convert", str(tmp_path / "empty"), *words[2:]], "actor.txt", capsys)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"body": "mlp"}, "critic.body bronet"), ({"conditioning": "none"}, "critic.conditioning embedding")],
)
def test_an_agent_that_the_authors_networks_cannot_be_is_refused(
    settings: dict[str, str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", ("toy/One",))
    config = json.loads((run / "config.json").read_text())
    config["critic"] |= settings
    (run / "config.json").write_text(json.dumps(config))
    assert_one_line(["convert", str(run), "--to", str(tmp_path / "a.msgpack")], told, capsys)
