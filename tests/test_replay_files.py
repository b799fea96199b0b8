"""Saved replay buffers: generations, incremental saves, damage, contradictions and memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extras import require

from brc_fast.replay import Field, files

require("hypothesis")

from refusals import says
from replay_oracle import (
    Feed,
    Manifest,
    assert_same,
    assert_same_batch,
    filled,
    manifest_of,
    more,
    read_all,
    rewrite,
    saved_twice,
)


def newest_segment(folder: Path) -> Path:
    return folder / manifest_of(folder)["segments"][-1]["file"]


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def named_by(folder: Path, *manifests: str) -> set[str]:
    named = (segment["file"] for name in manifests for segment in manifest_of(folder, name)["segments"])
    return {*manifests, *named}


@pytest.fixture
def saved(tmp_path: Path) -> Feed:
    return saved_twice(tmp_path)


def refused(feed: Feed, folder: Path, words: str, **options: Any) -> None:
    """The load is refused in these words, and the buffer goes on as if nothing had been."""
    with pytest.raises(ValueError, match=says(words)):
        feed.buffer.load(folder, **options)
    feed.check_content(2, 0.9)
    feed.check_sample(3, 2)


def test_a_loaded_buffer_goes_on_exactly_as_one_that_was_never_saved(tmp_path: Path) -> None:
    for steps in (0, 1, 6, 11, 40):
        feed = filled(9, (0, 1, 0), steps)
        if steps > 0:
            feed.check_sample(2, 3)
        feed.buffer.save(tmp_path)
        loaded = feed.loaded(tmp_path)
        loaded.check_content()
        for _ in range(20):
            more(feed, 1, loaded.buffer)
            assert_same_batch(
                loaded.buffer.sample(3, 2, n_step=2, discount=0.9),
                feed.buffer.sample(3, 2, n_step=2, discount=0.9),
            )
        assert_same(read_all(loaded.buffer), read_all(feed.buffer))


def test_a_loaded_buffer_saves_the_same_bytes(tmp_path: Path) -> None:
    feed = filled([5, 20], (0, 1, 0), observation=Field((3,), stack=3))
    feed.buffer.save(tmp_path / "a")
    more(feed, 1)
    feed.buffer.save(tmp_path / "a")
    loaded = feed.loaded(tmp_path / "a")
    for one, name in ((feed, "b"), (loaded, "c")):
        one.buffer.save(tmp_path / name)
    assert newest_segment(tmp_path / "b").read_bytes() == newest_segment(tmp_path / "c").read_bytes()
    assert manifest_of(tmp_path / "b")["content"] == manifest_of(tmp_path / "c")["content"]


def test_a_second_save_writes_only_what_is_new(tmp_path: Path) -> None:
    feed = filled(3000, steps=800)
    feed.buffer.save(tmp_path)
    first = newest_segment(tmp_path)
    before = first.stat()
    more(feed, 2)
    feed.buffer.save(tmp_path)
    assert newest_segment(tmp_path) != first
    assert newest_segment(tmp_path).stat().st_size < 0.01 * before.st_size
    assert first.stat().st_mtime_ns == before.st_mtime_ns
    loaded = feed.loaded(tmp_path)
    loaded.check_content(3, 0.9)
    more(loaded, 2)
    loaded.buffer.save(tmp_path)
    assert newest_segment(tmp_path).stat().st_size < 0.01 * before.st_size
    loaded.loaded(tmp_path).check_content(3, 0.9)


@pytest.mark.parametrize("back", ["clear", "discard_episode"])
def test_a_save_after_transitions_were_taken_back_holds_those_that_came_since(
    back: str, tmp_path: Path
) -> None:
    feed = Feed(20, seed=1)
    for _ in range(8):
        feed.add()
    feed.buffer.save(tmp_path)
    if back == "clear":
        feed.buffer.clear()
    else:
        assert feed.buffer.discard_episode(0) == 8
    for _ in range(10):
        feed.add()
    feed.buffer.save(tmp_path)
    loaded = feed.empty()
    loaded.load(tmp_path)
    assert_same(read_all(loaded), read_all(feed.buffer))
    assert loaded.all().rewards.tolist() == [float(row.reward) for row in feed.history[0][8:]]


def test_the_generation_before_the_last_can_be_loaded(tmp_path: Path) -> None:
    feed = filled()
    feed.buffer.save(tmp_path)
    refused(feed, tmp_path, f"{tmp_path} ... no saved replay ... manifest.previous.json", previous=True)
    first = feed.copied()
    feed.buffer.save(tmp_path)
    for _ in range(4):
        older = feed.copied()
        more(feed, 2)
        feed.buffer.save(tmp_path)
    older.loaded(tmp_path, previous=True).check_content()
    feed.loaded(tmp_path).check_content()
    assert first.stored() != older.stored()


def test_a_save_to_another_folder_links_the_files_of_the_last(tmp_path: Path) -> None:
    feed = filled()
    feed.buffer.save(tmp_path / "a")
    first = newest_segment(tmp_path / "a")
    older = feed.copied()
    more(feed, 1)
    feed.buffer.save(tmp_path / "b", previous=tmp_path / "a")
    assert (tmp_path / "b" / first.name).samefile(first)
    shutil.rmtree(tmp_path / "a")
    feed.loaded(tmp_path / "b").check_content()
    more(feed, 1)
    feed.buffer.save(tmp_path / "c", previous=tmp_path / "nowhere")  # then everything is written
    assert len(manifest_of(tmp_path / "c")["segments"]) == 1
    feed.loaded(tmp_path / "c").check_content()
    older.buffer.save(tmp_path / "d", previous=tmp_path / "c")  # not its own save
    assert len(manifest_of(tmp_path / "d")["segments"]) == 1


def test_files_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*paths: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    feed = filled()
    feed.buffer.save(tmp_path / "a")
    first = newest_segment(tmp_path / "a")
    more(feed, 1)
    monkeypatch.setattr(os, "link", fail)
    feed.buffer.save(tmp_path / "b", previous=tmp_path / "a")
    copy = tmp_path / "b" / first.name
    assert copy.read_bytes() == first.read_bytes()
    assert not copy.samefile(first)
    feed.loaded(tmp_path / "b").check_content()


def test_saves_back_and_forth_between_two_folders_keep_both(tmp_path: Path) -> None:
    feed = filled(20)
    folders = [tmp_path / "a", tmp_path / "b"]
    for step in range(6):
        feed.buffer.save(folders[step % 2], previous=folders[1 - step % 2])
        kept = feed.copied()
        kept.loaded(folders[step % 2]).check_content()
        more(feed, 1)
        assert len(manifest_of(folders[step % 2])["segments"]) == step + 1


@pytest.mark.parametrize("busy", [[0, 1], [0]])
def test_many_saves_leave_few_files_and_little_more_than_the_content(tmp_path: Path, busy: list[int]) -> None:
    """Also where one stream stands still."""
    feed = filled(40, (0, 0), steps=30)
    feed.buffer.save(tmp_path)
    whole = newest_segment(tmp_path).stat().st_size
    for step in range(150):
        for _ in range(step % 3):
            feed.add(busy)
        feed.buffer.save(tmp_path)
        assert files_in(tmp_path) == named_by(tmp_path, "manifest.json", "manifest.previous.json")
        segments = manifest_of(tmp_path)["segments"]
        assert len(segments) <= 65
        assert sum((tmp_path / segment["file"]).stat().st_size for segment in segments) < 4 * whole
    feed.loaded(tmp_path).check_content(2, 0.9)


def test_another_buffer_in_the_same_folder_writes_everything_anew(tmp_path: Path) -> None:
    feed, other = filled(), filled(seed=8, steps=14)
    for step in range(4):
        one = (feed, other)[step % 2]
        more(one, 1)
        one.buffer.save(tmp_path)
        assert len(manifest_of(tmp_path)["segments"]) == 1
        one.loaded(tmp_path).check_content()
        if step > 0:
            (other, feed)[step % 2].loaded(tmp_path, previous=True).check_content()
    twin = other.loaded(tmp_path)  # two buffers that go on from the same save
    for one in (twin, other, twin):
        more(one, 2)
        one.buffer.save(tmp_path)
        one.loaded(tmp_path).check_content()


def test_buffers_that_save_to_the_same_folder_at_once_wait_for_each_other(tmp_path: Path) -> None:
    feeds = [filled(seed=seed, steps=9 + seed) for seed in range(3)]

    def save(feed: Feed) -> None:
        for _ in range(40):
            feed.buffer.save(tmp_path)

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(save, feed) for feed in feeds]:
            done.result()
    for previous in (False, True):
        name = "manifest.previous.json" if previous else "manifest.json"
        feed = feeds[manifest_of(tmp_path, name)["seed"]]
        feed.loaded(tmp_path, previous=previous).check_content()


def test_after_a_load_that_failed_half_way_a_save_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, other = filled(steps=30), filled(steps=2)
    feed.buffer.save(tmp_path / "a")
    other.buffer.save(tmp_path / "b")
    whole = files.load

    def fail(*arguments: Any) -> None:
        whole(*arguments)
        raise OSError(5, "Input/output error")

    other.buffer = feed.buffer
    with monkeypatch.context() as patched:
        patched.setattr(files, "load", fail)
        with pytest.raises(OSError, match="Input/output error"):
            other.buffer.load(tmp_path / "b")
    other.buffer.save(tmp_path / "a")
    other.loaded(tmp_path / "a").check_content()


def test_a_buffer_loaded_from_the_generation_before_does_not_mix_it_with_the_last(tmp_path: Path) -> None:
    feed = filled()
    feed.buffer.save(tmp_path)
    older = feed.copied()
    more(feed, 3)
    feed.buffer.save(tmp_path)
    older.buffer.load(tmp_path, previous=True)
    older.add([1], [True])
    older.buffer.save(tmp_path)
    older.loaded(tmp_path).check_content()
    feed.loaded(tmp_path, previous=True).check_content()


def test_an_incremental_save_after_a_load_into_other_capacities_is_whole(tmp_path: Path) -> None:
    feed = filled(9, (0, 1, 0), steps=30)
    feed.buffer.save(tmp_path)
    for capacity in (20, 4, 4, 1, 50):
        feed = feed.loaded(tmp_path, capacity)
        more(feed, 3)
        feed.buffer.save(tmp_path)
        feed.loaded(tmp_path).check_content(2, 0.9)
        feed.loaded(tmp_path, 30).check_content(2, 0.9)


# ---- Damage


@pytest.mark.parametrize("which", [0, 1])
def test_a_truncated_missing_or_flipped_segment_is_refused_by_name(
    saved: Feed, tmp_path: Path, which: int
) -> None:
    path = tmp_path / manifest_of(tmp_path)["segments"][which]["file"]
    whole, before = path.read_bytes(), saved.copied()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(saved, tmp_path, f"{path} is truncated ... {length} of {len(whole)} bytes")
    for place in {*range(0, len(whole), 97), len(whole) - 1}:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        refused(saved, tmp_path, f"{path} is damaged: the checksum of block 0 differs")
    path.unlink()
    refused(saved, tmp_path, f"{path} is missing ... load it with previous=True")
    path.write_bytes(whole)
    before.loaded(tmp_path).check_content()


def test_a_flipped_bit_of_a_manifest_is_refused_by_name_wherever_it_is(saved: Feed, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    before = read_all(saved.buffer)
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place * 5 % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=says(f"{path} is damaged")):
            saved.buffer.load(tmp_path)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(saved, tmp_path, f"{path} is damaged: ")
    assert_same(read_all(saved.buffer), before)


def test_a_damaged_last_generation_leaves_the_one_before(tmp_path: Path) -> None:
    feed = filled()
    feed.buffer.save(tmp_path)
    older = feed.copied()
    more(feed, 2)
    feed.buffer.save(tmp_path)
    newest_segment(tmp_path).unlink()
    refused(feed, tmp_path, f"{tmp_path}/segment-")
    older = older.loaded(tmp_path, previous=True)
    older.check_content()
    (tmp_path / "manifest.json").write_text("{")
    older.loaded(tmp_path, previous=True).check_content()
    more(older, 1)
    older.buffer.save(tmp_path)  # over the damaged one
    older.loaded(tmp_path).check_content()
    assert files_in(tmp_path) == named_by(tmp_path, "manifest.json", "manifest.previous.json")


def test_another_format_or_byte_order_is_refused_with_both(saved: Feed, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for number, remedy in ((99, "upgrade brc-fast"), (0, "use the version that wrote it")):
        rewrite(tmp_path, lambda manifest, number=number: manifest.update(format=number))
        refused(saved, tmp_path, f"{path} ... format {number}, ... reads formats 1 and 2: {remedy}")
    rewrite(tmp_path, lambda manifest: manifest.update(format=1, byte_order="big"))
    refused(saved, tmp_path, f"{path} ... big-endian order, this machine is little-endian")


FIELD = {"shape": [3], "dtype": "float32", "stack": 1}
ACTION = {"shape": [2], "dtype": "float32", "stack": 1}


@pytest.mark.parametrize(
    ("options", "name", "own", "got"),
    [
        ({"observation": Field((4,))}, "observation", {**FIELD, "shape": [4]}, FIELD),
        ({"observation": Field((3,), "float16")}, "observation", {**FIELD, "dtype": "float16"}, FIELD),
        ({"observation": Field((3,), stack=2)}, "observation", {**FIELD, "stack": 2}, FIELD),
        ({"action": Field((2,), "int32")}, "action", {**ACTION, "dtype": "int32"}, ACTION),
        ({"extras": {"x": Field()}}, "extras", {"x": {**FIELD, "shape": []}}, {}),
        ({"task_ids": (0, 0, 1)}, "task_ids", [0, 0, 1], [0, 1, 0]),
        ({"task_ids": (0, 1)}, "task_ids", [0, 1], [0, 1, 0]),
    ],
)
def test_a_save_with_other_fields_is_refused_with_both(
    tmp_path: Path, options: dict[str, Any], name: str, own: Any, got: Any
) -> None:
    filled().buffer.save(tmp_path)
    other = filled(**options)
    refused(other, tmp_path, f"{name} ... {tmp_path} must be {own}, got {got}")


def test_a_save_whose_extras_have_another_order_is_refused(tmp_path: Path) -> None:
    extras = {"x": Field((2,)), "y": Field((2,))}
    filled(extras=extras).buffer.save(tmp_path)
    described = {name: {**FIELD, "shape": [2]} for name in "yx"}
    other = filled(extras=dict(reversed(extras.items())))
    refused(other, tmp_path, f"extras ... {tmp_path} must be {described}, got ")


def test_what_is_not_finite_is_refused_by_a_buffer_that_refuses_it(tmp_path: Path) -> None:
    for name in ("observations", "actions", "rewards", "successors"):
        feed = filled(non_finite="allow")
        added = feed.arguments([0, 1, 2], [True] * 3, [(False, True)] * 3)
        added[name][1:2].flat[-1] = np.inf
        feed.give(added, feed.buffer)
        feed.remember(added)
        feed.buffer.save(tmp_path)
        feed.loaded(tmp_path).check_content()
        refused(filled(), tmp_path, f"{newest_segment(tmp_path)} ... {name} of stream 1 ... not finite")


def test_a_folder_without_a_save_or_with_other_files_is_refused(tmp_path: Path) -> None:
    feed = filled()
    refused(feed, tmp_path / "no", f"{tmp_path / 'no'} ... no saved replay ... manifest.json")
    for name in ("notes.txt", "manifest.json.bak", ".hidden", "segment-1.ts", "film.partial"):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(
            ValueError, match=says(f"{folder} ... replay files only, found {name}; ... another")
        ):
            feed.buffer.save(folder)
        assert files_in(folder) == {name}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        feed.buffer.save(tmp_path / "file")


# ---- Folders from somebody else


def everything(folder: Path) -> dict[str, Any]:
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = status.st_mode, status.st_ino, status.st_nlink, status.st_mtime_ns, content
    return found


HEX = "0123456789abcdef" * 2
FOUR = "\u0664"  # a digit in Arabic


@pytest.mark.parametrize(
    "name",
    [
        *("../y", "../outside/y", "/", "", ".", "..", "y", "manifest.json", "x/../y"),
        *(f"Segment-{HEX}.bin", f"segment-{HEX.upper()}.bin", f"segment-{HEX}.BIN", f"segment-{HEX[1:]}.bin"),
        *(f"segment-{HEX}.bin ", f" segment-{HEX}.bin", f"segment-{HEX}.bin\n", f"segment-{HEX}.bin.partial"),
        *(f"./segment-{HEX}.bin", f"segment-{HEX}.bin/", f"segment-{HEX}.bin\0", f"segment-{32 * FOUR}.bin"),
        "ABSOLUTE",
    ],
)  # fmt: skip
def test_a_segment_is_read_and_linked_only_under_a_name_that_a_save_gives(tmp_path: Path, name: str) -> None:
    down, mine, outside = (tmp_path / each for each in ("down", "mine", "outside"))
    outside.mkdir()
    feed = filled()
    feed.buffer.save(down)
    name = str(outside / "y") if name == "ABSOLUTE" else name
    segment = newest_segment(down)
    for place in (down / "y", tmp_path / "y", outside / "y", *([down / name] if HEX[1:] in name else [])):
        if "\0" not in name and place.parent.is_dir() and not place.name.endswith("/"):
            shutil.copy(segment, place)  # so that all is there that the manifest may name
    rewrite(down, lambda manifest: manifest["segments"][0].update(file=name))
    before = everything(tmp_path)
    with pytest.raises(
        ValueError, match=says(f"{down}/manifest.json gives segment 1 of 1 a name that no save")
    ):
        feed.copied().loaded(down)
    feed.buffer.save(mine, previous=down)  # which it does not need
    feed.loaded(mine).check_content()
    assert {path: told for path, told in everything(tmp_path).items() if path in before} == before
    assert {path.parent for path in map(Path, everything(tmp_path).keys() - before.keys())} <= {
        mine,
        tmp_path,
    }
    assert files_in(mine) == named_by(mine, "manifest.json")


def replace_by(kind: str, path: Path, target: Path) -> None:
    """`target` gets what was at `path`, if anything was."""
    if path.exists():
        shutil.move(path, target)
    if kind == "link":
        path.symlink_to(target)
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
@pytest.mark.parametrize(
    "which", ["manifest.json", "manifest.previous.json", "segment", "manifest.json.partial"]
)
def test_only_regular_files_are_read_linked_and_replaced(tmp_path: Path, kind: str, which: str) -> None:
    down, outside = tmp_path / "down", tmp_path / "outside"
    outside.mkdir()
    feed = filled()
    feed.buffer.save(down)
    more(feed, 1)
    feed.buffer.save(down)
    saved = feed.buffer._saved
    path = newest_segment(down) if which == "segment" else down / which
    (outside / "precious").write_text("precious")
    replace_by(kind, path, outside / "moved")
    before = everything(tmp_path)
    told = says(f"{path} must be a regular file, got a {kind}")
    if which != "manifest.json.partial":
        with pytest.raises(ValueError, match=told):
            feed.copied().loaded(down, previous=which == "manifest.previous.json")
    with pytest.raises(ValueError, match=f"{told}; name another folder"):
        feed.buffer.save(down)
    assert everything(tmp_path) == before
    feed.buffer._saved = saved
    mine = tmp_path / "mine"
    feed.buffer.save(mine, previous=down)
    feed.loaded(mine).check_content()
    assert all(file.is_file() and not file.is_symlink() for file in mine.iterdir())
    assert {path: told for path, told in everything(tmp_path).items() if str(outside) in path} == {
        path: told for path, told in before.items() if str(outside) in path
    }


@pytest.mark.parametrize("name", ["manifest.json", "manifest.json.partial", "manifest.previous.json.partial"])
def test_a_file_with_another_name_elsewhere_is_replaced_here_only(tmp_path: Path, name: str) -> None:
    folder, precious = tmp_path / "replay", tmp_path / "precious"
    feed = filled()
    feed.buffer.save(folder)
    shutil.copy(folder / "manifest.json", precious)
    (folder / name).unlink(missing_ok=True)
    os.link(precious, folder / name)
    before = precious.read_bytes()
    more(feed, 1)
    feed.buffer.save(folder)
    assert precious.read_bytes() == before
    feed.loaded(folder).check_content()
    feed.loaded(folder, previous=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("content"),
        lambda manifest: manifest["content"].update(kept="x"),
        lambda manifest: manifest["content"].update(count=[1]),
        lambda manifest: manifest["content"].update(count=[10**30] * 3),
        lambda manifest: manifest["segments"][0].update(rows=None),
        lambda manifest: manifest["segments"][0].pop("first"),
        lambda manifest: manifest["segments"].pop(0),
        lambda manifest: manifest["segments"].append(dict(manifest["segments"][0])),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_generation_that_was_changed_since_is_nothing_to_go_on_from(
    tmp_path: Path, change: Callable[[Manifest], Any], loaded: bool
) -> None:
    feed = saved_twice(tmp_path / "a")
    if loaded:
        feed.buffer.load(tmp_path / "a")
    kept = shutil.copytree(tmp_path / "a", tmp_path / "kept")
    rewrite(tmp_path / "a", change)
    more(feed, 1)
    feed.buffer.save(tmp_path / "b", previous=tmp_path / "a")
    feed.loaded(tmp_path / "b").check_content()
    assert len(manifest_of(tmp_path / "b")["segments"]) == 1
    assert len(manifest_of(kept)["segments"]) == 2


def test_a_save_goes_on_from_a_folder_that_has_lost_a_segment_by_writing_all(tmp_path: Path) -> None:
    feed = filled()
    feed.buffer.save(tmp_path / "a")
    newest_segment(tmp_path / "a").unlink()
    more(feed, 1)
    for folder in (tmp_path / "b", tmp_path / "a"):
        saved = feed.buffer._saved
        feed.buffer.save(folder, previous=tmp_path / "a")
        feed.loaded(folder).check_content()
        feed.buffer._saved = saved


@pytest.mark.parametrize("name", ["count", "draws"])
def test_numbers_that_would_wrap_are_refused(tmp_path: Path, name: str) -> None:
    feed = filled()
    feed.buffer.save(tmp_path)

    def raise_by(manifest: Manifest, more: int) -> None:
        if name == "draws":
            manifest["content"]["draws"] = more
        else:
            for numbers in (manifest["content"]["count"], manifest["segments"][0]["first"]):
                numbers[0] += more

    rewrite(tmp_path, lambda manifest: raise_by(manifest, 2**60))
    feed.copied().buffer.load(tmp_path)
    rewrite(tmp_path, lambda manifest: raise_by(manifest, 2**63))
    what = "draws" if name == "draws" else "transitions"
    with pytest.raises(ValueError, match=f"the saved replay has more {what} than can be counted"):
        feed.buffer.load(tmp_path)
    feed.check_content(2, 0.9)
