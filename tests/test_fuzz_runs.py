"""Every file of a run's folder, changed at random and signed again: it is taken or refused in one line.

`BRC_FAST_FUZZ=20000 pytest tests/test_fuzz_runs.py` tries as many changes of each file.
"""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import FINE, campaign, changed_bytes, changed_value, text_of
from run_folders import SMALL, contents

from brc_fast import _core
from brc_fast.agents.memory import plan_least, require_fit
from brc_fast.command import main as cli
from brc_fast.config import TrainConfig
from brc_fast.disk import parse_json
from brc_fast.errors import InputError, MissingExtraError, WorkerError
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.metrics import read_records
from brc_fast.runs.plot import curves
from brc_fast.runs.trainer import Trainer

COUNT = int(os.environ.get("BRC_FAST_FUZZ", "150"))
REFUSALS = (InputError, MissingExtraError, WorkerError, OSError, MemoryError, FloatingPointError)
MOST = 64  # megabytes that reading a changed file may take more than reading it as it was
NEWEST = "checkpoints/000000000040"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by the first test that needs it."""
    return tmp_path_factory.mktemp("fuzzed") / "run"


@pytest.fixture
def run(toy: dict, made: Path) -> Path:
    torch.set_num_threads(1)
    if not made.exists():
        assert cli.main(["train", "toy/One", "--run", str(made), *SMALL, "--normalize-observations"]) == 0
    return made


def sign_part(file: Path) -> None:
    """Let a checkpoint's manifest agree with a part."""
    manifest = file.parent / "manifest.json"
    whole = json.loads(manifest.read_text())
    data = file.read_bytes()
    whole["files"][file.name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    manifest.write_text(json.dumps(whole))


def sign_replay(folder: Path, manifest: Any) -> None:
    """Write a replay's manifest with its checksum."""
    text = text_of(manifest)
    try:
        checksum = zlib.crc32(json.dumps(parse_json(text.encode())).encode())
    except ValueError:
        checksum = 0
    (folder / "manifest.json").write_text(
        f'{{"checksum": {checksum}, "manifest": {text}}}', "utf8", "replace"
    )


def changed_part(rng: random.Random, file: Path) -> None:
    """Change a safetensors file's header, its arrays or any byte."""
    data, how = file.read_bytes(), rng.randrange(3)
    end = 8 + int.from_bytes(data[:8], "little")
    if how == 0:
        header = text_of(changed_value(rng, json.loads(data[8:end]))).encode("utf8", "replace")
        data = len(header).to_bytes(8, "little") + header + data[end:]
    elif how == 1:
        arrays = bytearray(data[end:])
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(len(arrays) // 4) * 4
            arrays[at : at + 4] = rng.choice(
                [b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 4, b"\0\0\0\x80", b"\1\0\0\0"]
            )
        data = data[:end] + bytes(arrays)
    else:
        data = changed_bytes(rng, data)
    file.write_bytes(data)
    sign_part(file)


def changed_segment(rng: random.Random, folder: Path) -> None:
    """Change a segment's bytes and sign them; the manifest has its old numbers of rows."""
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    segment = rng.choice(manifest["segments"])
    data = changed_bytes(rng, (folder / segment["file"]).read_bytes())
    (folder / segment["file"]).write_bytes(data)
    segment.update(bytes=len(data), checksums=[_core.crc32c(data)])
    sign_replay(folder, manifest)


def changed_text(rng: random.Random, file: Path) -> None:
    """Change a JSON file, as JSON or as bytes."""
    data = file.read_bytes()
    if rng.random() < 0.7:
        data = text_of(changed_value(rng, json.loads(data))).encode("utf8", "replace")
    else:
        data = changed_bytes(rng, data)
    file.write_bytes(data)


def changed_metrics(rng: random.Random, file: Path) -> None:
    lines = file.read_bytes().splitlines()
    if rng.random() < 0.6:
        at = rng.randrange(len(lines))
        lines[at] = text_of(changed_value(rng, json.loads(lines[at]))).encode("utf8", "replace")
        file.write_bytes(b"\n".join(lines) + b"\n")
    else:
        file.write_bytes(changed_bytes(rng, file.read_bytes()))


def changed_manifest(rng: random.Random, folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    sign_replay(folder, changed_value(rng, manifest))


FILES: dict[str, tuple[str, Callable[[random.Random, Path], None]]] = {
    "config": ("config.json", changed_text),
    "metrics": ("metrics.jsonl", changed_metrics),
    "manifest": (f"{NEWEST}/manifest.json", changed_text),
    "agent": (f"{NEWEST}/agent.safetensors", changed_part),
    "progress": (f"{NEWEST}/progress.safetensors", changed_part),
    "environments": (f"{NEWEST}/environments.safetensors", changed_part),
    "replay manifest": (f"{NEWEST}/replay", changed_manifest),
    "replay segment": (f"{NEWEST}/replay", changed_segment),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_changed_at_random_is_taken_or_refused_in_one_line(run: Path, name: str) -> None:
    """Within two seconds, with no more memory than the file itself takes, and nothing is written."""
    place, change = FILES[name]
    honest, names = contents(run.parent), set(run.parent.rglob("*"))
    changeable = [
        path for path in honest if path.parent == run / NEWEST or run / place in (path, path.parent)
    ]
    folder = RunFolder(run)
    trainer = Trainer(folder.config(), "cpu", lambda told: None)

    def read() -> str:
        if name == "metrics":  # lines that are no rows are named, and the others taken
            curves(folder)
            return "refused" if read_records(folder.metrics).faults else "accepted"
        elif name == "config":
            config = folder.config()
            assert isinstance(config, TrainConfig)
            folder.require_foreign_code(config.tasks)
            folder.require_size(config)
            require_fit(plan_least(config, "cpu"))
        else:
            trainer.load(folder)
            trainer.collect()
            trainer.learn()
            trainer.row()
        return "accepted"

    def once(rng: random.Random) -> str:
        try:
            change(rng, run / place)
            return read()
        finally:
            there = set(run.parent.rglob("*"))
            for path in changeable:
                path.write_bytes(honest[path])
            assert there == names, "something was written"

    read()  # as it was; what is allocated once is there then
    found = campaign(name, COUNT, once, REFUSALS)
    print(name, dict(found))
    assert contents(run.parent) == honest, "something was written"
    memory = found.pop("megabytes")
    assert not found.keys() - set(FINE)
    assert found["refused"] > COUNT // 10
    assert memory <= MOST
