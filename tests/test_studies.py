"""A study makes the runs that are missing, whatever fails, and reports out of their folders alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extras import require
from refusals import says
from study_folders import finish, make

require("train", "gymnasium")
from brc_fast import published
from brc_fast.command.arguments import with_settings
from brc_fast.command.main import main
from brc_fast.config import preset
from brc_fast.envs import list_tasks
from brc_fast.envs.suites import body
from brc_fast.errors import InputError
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.metrics import read_rows
from brc_fast.runs.studies.execute import Executor, prepare, read_manifest, record, require_memory, status
from brc_fast.runs.studies.named import SCALES, STUDIES, named
from brc_fast.runs.studies.results import cells, median_step, report
from brc_fast.runs.studies.study import Group, Run, Study, Variant, from_toml

REACH, PUSH = "metaworld/reach-v3", "metaworld/push-v3"

# Stands for `brc-fast train`: a run "wrong" fails, one "slow" waits for a signal, each second "pair" lets the
# one before it go on, all others finish.
PROGRAM = """
import json, os, pathlib, signal, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = pathlib.Path(options["run"])
def tell(what):
    with (folder.parent / "events").open("a") as file:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        file.write(json.dumps([what, folder.name, time.monotonic(), options.get("from"), seen]) + "\\n")
def save(step):
    (folder / "checkpoints" / f"{step:012d}").mkdir(parents=True)
    row = {"step": step, "eval/return_mean": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
def stop(*_):
    save(1)
    tell("stopped")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
tell("begins")
if folder.name.startswith("wrong"):
    print("a warning")
    print("brc-fast: the simulator is lost; go on with more", file=sys.stderr)
    sys.exit(1)
if folder.name.startswith("slow") and not folder.exists():
    time.sleep(60)
if folder.name.startswith("pair"):
    begun = lambda: (folder.parent / "events").read_text().count("begins")
    wanted, deadline = begun(), time.monotonic() + 60
    wanted += wanted % 2
    while begun() < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
time.sleep(0.1)
tell("ends")
save(int(options["steps"]))
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, "-S", str(path)]


def study(**variants: Variant) -> Study:
    return Study("mine", "", {"": Group((REACH,), 100)}, variants)


def events(root: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (root / "events").read_text().splitlines()]


def told(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# ---------------------------------------------------------------- what a study is


def test_a_variant_alone_has_a_run_for_each_task_and_seed() -> None:
    several = Study(
        "s",
        "",
        {"": Group((REACH, PUSH), 100)},
        {"multi": Variant({"batch_size": 8}), "single": Variant({"batch_size": 2}, alone=True, share=0.5)},
        {"batch_size": 1, "num_envs": 3},
    )
    runs = several.runs(2)
    assert [run.name for run in runs] == [
        f"{name}-seed{seed}"
        for seed in range(2)
        for name in ("multi", "single-metaworld-reach-v3", "single-metaworld-push-v3")
    ]
    assert [run.tasks for run in runs[:3]] == [(REACH, PUSH), (REACH,), (PUSH,)]
    settings = [(run.steps, run.settings["batch_size"], run.settings["num_envs"]) for run in runs[:2]]
    assert settings == [(100, 8, 3), (50, 2, 3)]


def test_the_words_of_a_run_are_options_of_train(tmp_path: Path) -> None:
    settings = {"reward_scale": False, "env.processes": True, "learning.target_entropy_per_action": -1.0}
    run = Run("a", "", 4, (REACH,), {"steps": 9, **settings, "transfer.start": "mean"}, source="b-seed4")
    words = run.words(tmp_path, "cpu")
    assert words[0] == REACH
    assert {f"--run={tmp_path}/a-seed4", "--seed=4", "--threads=1", "--device=cpu"} <= {*words}
    assert {"--steps=9", "--no-reward-scale", "--env.processes"} <= {*words}
    assert "--learning.target-entropy-per-action=-1.0" in words
    starts = {f"--from={tmp_path}/b-seed4", "--transfer.start=mean"}
    assert starts <= {*words}
    assert not starts & {*run.words(tmp_path, "cpu", fresh=False)}, "it has started, and goes on"
    assert "--threads=1" not in run.words(tmp_path, "cuda")


TOML = """
about = "width"
tasks = ["gym/Pendulum-v1"]
steps = 40
evaluations = 2
[settings]
num_envs = 2
critic.width = 8
[variants.narrow]
[variants.wide]
share = 0.5
settings = { critic.width = 16, "actor.width" = 4 }
[variants.after]
source = "wide"
"""


def test_a_toml_file_is_a_study(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(TOML)
    found = from_toml(file)
    assert (found.name, found.about, found.metric) == ("mine", "width", "return")
    narrow, wide, after = found.runs(1)
    assert narrow.tasks == ("gym/Pendulum-v1",)
    assert (narrow.settings["critic.width"], wide.settings["critic.width"]) == (8, 16)
    assert (wide.settings["actor.width"], wide.settings["num_envs"]) == (4, 2)
    assert (narrow.steps, narrow.settings["eval_every"], wide.steps) == (40, 20, 20)
    assert after.source == "wide-seed0"
    assert from_toml(file, steps=10, tasks=[REACH]).runs(1)[0].tasks == (REACH,)


def test_the_document_s_study_is_one_and_its_tables_name_what_there_is(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "studies.md").read_text()
    (tmp_path / "mine.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    mine = from_toml(tmp_path / "mine.toml")
    assert {run.variant for run in mine.runs(1)} == {"narrow", "wide", "single", "moved"}
    assert mine.metric == "success"
    for name, scale in itertools.product(STUDIES, SCALES):
        assert f"| `{name}` |" in text
        assert f"`{scale}`" in text
    for name in ("headline", "loss", "conditioning", "transfer"):
        assert all(f"`{variant}`" in text for variant in STUDIES[name].variants(SCALES["tiny"]))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("about", "abuot", ("abuot", "about")),
        ("steps = 40", "steps = true", ("steps", "int", "True")),
        ("steps = 40", "", ("steps",)),
        ("evaluations = 2", "evaluations = 0", ("evaluations", "positive")),
        ("share = 0.5", "share = 2.0", ("share", "2.0")),
        ('source = "wide"', 'source = "wild"', ("wild", "wide")),
        ("[variants.narrow]", '[variants."a/b"]', ("a/b", "letters")),
        ("[settings]", "[settings", ("mine.toml",)),
        ('["gym/Pendulum-v1"]', '"gym/Pendulum-v1"', ("tasks", "list")),
        ("critic.width = 8", "critic.wdith = 8", ("critic.wdith", "critic.width")),
        ("critic.width = 8", "critic.width = 0", ("width", "positive")),
    ],
)
def test_a_toml_file_that_does_not_fit_is_refused_before_anything_runs(
    old: str, new: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(TOML.replace(old, new))
    assert main(["study", str(file), "--runs", str(tmp_path / "runs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in ("mine", *words)), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["lose"], ("loss", "headline")),
        (["loss", "--only", "msd"], ("mse", "categorical")),
        (["loss", "--scale", "huge"], ("tiny", "full")),
        (["loss", "--sedes", "3"], ("--seeds",)),
        (["defaults", "--scale", "full"], ("tiny",)),
        (["loss", "--seeds", "0"], ("seeds", "positive")),
        (["loss", "--tasks", "metaworld/rech-v3"], ("metaworld/reach-v3",)),
        (["loss", "--picture", "a.gif"], (".png", ".svg")),
        (["loss", "--finished"], ("study.json",)),
        (["nothing.toml"], ("nothing.toml",)),
    ],
)
def test_what_is_unknown_names_what_there_is(
    words: list[str],
    names: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(name in line for name in names), line
    assert not list(tmp_path.iterdir())


def test_without_a_name_every_study_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)
    assert all(
        " runs, " in line and claim.about in line for line, claim in zip(lines, STUDIES.values(), strict=True)
    )


@pytest.mark.parametrize("scale", SCALES)
def test_every_run_of_every_study_has_settings_that_train_takes_and_its_study_s_steps(scale: str) -> None:
    for name in STUDIES:
        if name == "defaults" and scale != "tiny":
            continue
        runs = named(name, scale).runs(1)
        assert len({run.steps for run in runs}) == 1 or name == "defaults"
        for run in runs:
            settings = {key: value for key, value in run.settings.items() if key != "transfer.start"}
            config = with_settings(preset("cpu"), settings, run.name)
            config = dataclasses.replace(config, tasks=run.tasks)
            assert config.replay_capacity >= config.steps == run.steps
            several = len(run.tasks) > 1
            if name != "defaults":
                assert config.transitions_per_update == (
                    SCALES[scale].several if several else SCALES[scale].one
                )


def test_other_tasks_are_told_in_their_own_metric() -> None:
    assert named("loss").metric == "success"
    other = named("loss", tasks=["gym/Pendulum-v1"], steps=120)
    assert other.metric == "return"
    assert {(run.tasks, run.steps) for run in other.runs(1)} == {(("gym/Pendulum-v1",), 120)}


def test_held_out_tasks_are_none_of_those_learned_before() -> None:
    for scale in SCALES:
        runs = {run.variant: run for run in named("transfer", scale).runs(1)}
        learned, new = {*runs["pretrain"].tasks}, {*runs["scratch"].tasks}
        assert new == {*runs["mean"].tasks} == {*list_tasks("metaworld/held-out4")}
        assert len(learned) >= 8
        assert not learned & new
        assert runs["mean"].source == runs["pretrain"].name
    seen, held_out = (list_tasks(f"mjx/{name}") for name in ("pretrain", "held-out"))
    assert {body(task) for task in held_out} <= {body(task) for task in seen}
    assert not {*seen} & {*held_out}


def test_the_quick_tasks_are_learned_by_50k_steps_in_the_published_run() -> None:
    for task in list_tasks("metaworld/study8"):
        curve = published.curve(task)
        assert curve is not None
        assert curve.mean[1] >= 0.9


# ---------------------------------------------------------------- how its runs are made


def test_finished_runs_are_skipped_and_failed_ones_do_not_stop_the_others(
    tmp_path: Path, program: list[str]
) -> None:
    root, lines = tmp_path / "s", list[str]()
    runs = study(wrong=Variant(), after=Variant(source="wrong"), right=Variant()).runs(1)
    manifest = prepare(root, study(wrong=Variant(), right=Variant()), runs)
    assert Executor(root, "cpu", 1, program=program, say=lines.append).execute(runs) is None
    wrong, after, right = (status(root, run) for run in runs)
    assert (wrong.kind, after.kind, right.kind) == ("failed", "failed", "finished")
    assert wrong.told == "the simulator is lost; go on with more"
    assert "wrong-seed0" in after.told
    assert len(lines) == 3
    found = report(root, manifest, [])
    assert found["failed"] == {"wrong-seed0": wrong.told, "after-seed0": after.told}
    begun = [name for what, name, *_ in events(root) if what == "begins"]
    assert begun == ["wrong-seed0", "right-seed0"]
    Executor(root, "cpu", 1, program=program, say=lines.append).execute(runs)
    begun = [name for what, name, *_ in events(root) if what == "begins"]
    assert begun == ["wrong-seed0", "right-seed0", "wrong-seed0"], "what failed is tried again"


def test_what_a_study_beside_has_made_is_not_made_again(tmp_path: Path, program: list[str]) -> None:
    there, here, lines = tmp_path / "there", tmp_path / "here", list[str]()
    theirs = study(big=Variant({"batch_size": 64, "analysis_every": 10}), small=Variant({"batch_size": 32}))
    make(there, theirs, theirs.runs(1), rate)
    mine = study(
        same=Variant({"batch_size": 64, "report_every": 7}),
        other=Variant({"batch_size": 65}),
        unlike=Variant({"batch_size": 32, "analysis_every": 10}),  # of which the other has no rows
        after=Variant({"batch_size": 64}, source="same"),
    )
    runs = mine.runs(2)
    prepare(here, mine, runs)
    Executor(here, "cpu", 1, program=program, say=lines.append).execute(runs)
    begun = {name for what, name, *_ in events(here) if what == "begins"}
    assert begun == {run.name for run in runs} - {"same-seed0"}
    assert "same-seed0: taken from there/big-seed0" in lines
    assert (here / "same-seed0" / "metrics.jsonl").read_text() == (
        there / "big-seed0" / "metrics.jsonl"
    ).read_text()
    assert told(here / "same-seed0.json") == told(there / "big-seed0.json")


def test_as_many_run_at_once_as_there_are_workers_and_each_gpu_has_its_own(
    tmp_path: Path, program: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("brc_fast.runs.studies.execute.machine", lambda device: {"gpu": device})
    root = tmp_path / "s"
    mine = study(**{f"pair{number}": Variant() for number in range(4)})
    runs = mine.runs(1)
    prepare(root, mine, runs)
    Executor(root, "cuda", 2, 2, program=program, say=lambda _: None).execute(runs)
    found = events(root)
    running = np.cumsum([1 if what == "begins" else -1 for what, *_ in found])
    assert max(running) == 2
    assert {seen for *_, seen in found} == {"3", "5"}
    assert all(status(root, run).kind == "finished" for run in runs)


def test_a_run_waits_for_the_one_that_it_starts_from(tmp_path: Path, program: list[str]) -> None:
    root = tmp_path / "s"
    mine = study(after=Variant(source="before"), before=Variant(tasks=(PUSH,)))
    runs = mine.runs(1, ["after"])
    assert [run.variant for run in runs] == ["after", "before"], "it brings its source"
    prepare(root, mine, runs)
    Executor(root, "cpu", 2, program=program, say=lambda _: None).execute(runs)
    told = [(what, name) for what, name, *_ in events(root)]
    assert told.index(("ends", "before-seed0")) < told.index(("begins", "after-seed0"))
    starts = {name: source for what, name, _, source, _ in events(root) if what == "begins"}
    assert starts == {"before-seed0": None, "after-seed0": str(root / "before-seed0")}


@pytest.mark.parametrize("why", ["signal", "budget"])
def test_a_signal_or_a_spent_budget_ends_the_runs_saved_and_a_later_call_goes_on(
    why: str, tmp_path: Path, program: list[str]
) -> None:
    root = tmp_path / "s"
    runs = study(slow=Variant(), later=Variant()).runs(1)
    prepare(root, study(slow=Variant()), runs)
    waits = threading.Thread(target=interrupt_once, args=(root / "events",))
    if why == "signal":
        waits.start()
    seconds = 3.0 if why == "budget" else 60.0
    run_it = Executor(root, "cpu", 1, seconds=seconds, program=program, say=lambda _: None).execute
    assert run_it(runs) == (signal.SIGINT if why == "signal" else None)
    assert [what for what, *_ in events(root)] == ["begins", "stopped"]
    assert [status(root, run).kind for run in runs] == ["interrupted", "missing"]
    assert Executor(root, "cpu", 1, program=program, say=lambda _: None).execute(runs) is None
    assert [status(root, run).kind for run in runs] == ["finished", "finished"]
    assert record(root, runs[0])["wall_seconds"] > 0.1, "of both processes"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not hear of its parent's end")
def test_runs_are_saved_when_the_study_itself_is_killed(tmp_path: Path, program: list[str]) -> None:
    root = tmp_path / "s"
    runs = study(slow=Variant()).runs(1)
    prepare(root, study(slow=Variant()), runs)
    pid = os.fork()
    if not pid:
        try:
            Executor(root, "cpu", 1, program=program, say=lambda _: None).execute(runs)
        finally:
            os._exit(0)
    end = time.monotonic() + 20.0
    while not (root / "events").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while [what for what, *_ in events(root)] != ["begins", "stopped"]:
        assert time.monotonic() < end
        time.sleep(0.02)


def interrupt_once(file: Path) -> None:
    while not (file.exists() and file.read_text().endswith("\n")):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "s"
    mine = study(a=Variant({"batch_size": 8}))
    prepare(root, mine, mine.runs(1))
    manifest = prepare(root, mine, mine.runs(2))
    assert [*manifest["runs"]] == ["a-seed0", "a-seed1"], "more seeds are no other configuration"
    assert [*prepare(root, mine, mine.runs(1))["runs"]] == ["a-seed0", "a-seed1"]
    other = study(a=Variant({"batch_size": 16}))
    with pytest.raises(InputError, match=says("a-seed0 ... batch_size ... 8 ... 16 ... --runs")):
        prepare(root, other, other.runs(1))
    longer = dataclasses.replace(mine, groups={"": Group((REACH,), 200)})
    with pytest.raises(InputError, match=says("a-seed0 ... steps ... 100 ... 200")):
        prepare(root, longer, longer.runs(1))
    told = study(a=Variant({"batch_size": 8, "report_every": 7}))
    prepare(root, told, told.runs(1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(InputError, match=says("something else than a study")):
        prepare(tmp_path / "full", mine, mine.runs(1))


def test_runs_that_need_more_memory_than_there_is_are_fewer_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = 10 * 10**9
    monkeypatch.setattr("brc_fast.runs.studies.execute.available", lambda device: room)
    config = dataclasses.replace(preset("cpu"), tasks=(REACH,), replay_capacity=30_000_000)
    configs = [config] * 8  # 1.9 GB of replay each, at least
    fit = require_memory(configs, 8, "cpu", 0, given=False)
    assert 1 < fit < 6
    assert require_memory(configs, fit, "cpu", 0, given=True) == fit
    assert require_memory(configs[:2], 8, "cpu", 0, given=True) == 8, "there are but two"
    with pytest.raises(InputError, match=says(f"8 runs at once ... 10.0 GB ... --workers {fit}")):
        require_memory(configs, 8, "cpu", 0, given=True)
    room = 10**9
    with pytest.raises(InputError, match=says("8 runs at once ... 1.0 GB ... a machine with more")):
        require_memory(configs, 8, "cpu", 0, given=False)


# ---------------------------------------------------------------- what it reports


def rate(run: Run, task: str, step: int) -> float:
    """Success that rises with the steps, and with the variant, the task and the seed."""
    better = 0.2 * (run.variant == "b") + 0.1 * (task == REACH) + 0.05 * run.seed**2  # no symmetry
    return min(1.0, step / 200 + better)


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Study, list[Run]]:
    root = tmp_path / "mine-tiny"
    mine = Study(
        "mine-tiny",
        "b beside a",
        {"": Group((REACH, PUSH), 100)},
        {"a": Variant(alone=True), "b": Variant({"batch_size": 8})},
        metric="success",
        evaluations=4,
        signals=("analysis/gradient_similarity",),
    )
    runs = mine.runs(3)
    make(root, mine, runs, rate, signals={"analysis/gradient_similarity": lambda run, _: 0.1 * run.seed})
    return root, mine, runs


def interquartile_mean(values: list[float]) -> float:
    """Written anew: the mean of what is left without a quarter, rounded down, at either end."""
    cut = len(values) // 4
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept)


def test_the_report_has_the_interquartile_mean_over_tasks_and_seeds(
    folder: tuple[Path, Study, list[Run]],
) -> None:
    root, _, runs = folder
    manifest = read_manifest(root)
    found = {each["variant"]: each for each in report(root, manifest, cells(root, manifest))["results"]}
    for variant in "ab":
        last = [rate(run, task, 100) for run in runs if run.variant == variant for task in run.tasks]
        value, low, high = found[variant]["iqm"]
        assert value == pytest.approx(interquartile_mean(last), abs=1e-6)
        assert min(last) <= low < value < high <= max(last)
        assert found[variant]["mean"][0] == pytest.approx(sum(last) / len(last), abs=1e-6)
        assert found[variant]["seeds"] == [0, 1, 2]
        assert found[variant]["by_task"][PUSH] == pytest.approx(
            [rate(r, PUSH, 100) for r in runs if r.variant == variant and PUSH in r.tasks]
        )
        curve = found[variant]["curve"]["iqm"]
        assert curve["steps"] == [25, 50, 75, 100]
        first = [rate(run, task, 25) for run in runs if run.variant == variant for task in run.tasks]
        assert curve["values"][0][0] == pytest.approx(interquartile_mean(first), abs=1e-6)
    # a: 0.3, 0.35 and 0.5 at step 50, and 0.125 more at every further one
    assert found["a"]["steps_to"]["0.5"]["seeds"] == [100, 100, 50]
    assert found["a"]["steps_to"]["0.5"]["median"] == [100, 50, 100]
    assert found["a"]["steps_to"]["0.8"] == {"seeds": [None] * 3, "median": [None] * 3}
    assert found["b"]["critic_parameters"] == 1000
    assert found["b"]["signals"]["analysis/gradient_similarity"]["values"][0] == [0.1, 0.0, 0.2]


def test_the_json_and_the_picture_come_from_the_folders_alone(
    folder: tuple[Path, Study, list[Run]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    del folder  # it lies there
    file = tmp_path / "mine-tiny.toml"
    file.write_text(TOML)  # names the folder, and nothing of what is reported
    words = ["study", str(file), "--runs", str(tmp_path), "--finished"]
    words += ["--save", str(tmp_path / "o.json"), "--picture", str(tmp_path / "o.svg")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[:2] == ["a", "0.625"]
    found = told(tmp_path / "o.json")
    assert found["machines"] == [{"cpu": "a processor"}]
    assert found["commits"] == ["abc"]
    assert (found["wall_seconds"], found["cpu_seconds"]) == (18.0, 13.5)
    assert found["runs"]["b-seed2"]["state"] == "finished"
    command = found["runs"]["b-seed2"]["command"]
    assert command[:4] == ["brc-fast", "train", REACH, PUSH]
    assert {"--run=mine-tiny/b-seed2", "--batch-size=8"} <= {*command}
    assert str(tmp_path) not in json.dumps(found), "nothing of where it was run"
    assert not found["unfinished"]
    drawn = (tmp_path / "o.svg").read_text()
    assert all(
        f"<!-- {text} -->" in drawn for text in ("a", "b", "cosine similarity of task gradients", "reach")
    )


def test_a_seed_counts_when_all_its_tasks_are_finished(
    folder: tuple[Path, Study, list[Run]],
) -> None:
    root, _, runs = folder
    lost = next(run for run in runs if run.alone and run.seed == 1)
    for checkpoint in (root / lost.name / "checkpoints").iterdir():
        checkpoint.rename(checkpoint.with_name(f"{50:012d}"))
    manifest = read_manifest(root)
    found = report(root, manifest, cells(root, manifest))
    seeds = {each["variant"]: each["seeds"] for each in found["results"]}
    assert seeds == {"a": [0, 2], "b": [0, 1, 2]}
    assert found["unfinished"] == [lost.name]


def test_a_run_whose_last_evaluation_is_missing_is_not_finished(
    folder: tuple[Path, Study, list[Run]],
) -> None:
    root, _, runs = folder
    file = root / runs[0].name / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert status(root, runs[0]).kind == "interrupted"
    assert status(root, runs[1]).kind == "finished"


def test_published_curves_stand_beside_ours_at_equal_steps(tmp_path: Path) -> None:
    tasks = list_tasks("metaworld/mt10")
    mine = named("metaworld", "tiny")
    runs = mine.runs(1, ["multi"])
    make(tmp_path / "s", mine, runs, lambda run, task, step: step / 100_000)
    manifest = read_manifest(tmp_path / "s")
    found = report(tmp_path / "s", manifest, cells(tmp_path / "s", manifest))
    assert [each["mode"] for each in found["published"]] == ["multi_task", "single_task"]
    for each in found["published"]:
        curves = [published.curve(task, each["mode"]) for task in tasks]
        means = [np.mean([curve.mean[point] for curve in curves if curve]) for point in (0, 1)]
        assert each["curve"]["mean"]["steps"] == [25_000, 50_000]
        assert [value for value, *_ in each["curve"]["mean"]["values"]] == pytest.approx(means, abs=1e-6)
    (ours,) = found["results"]
    assert ours["curve"]["mean"]["steps"][-1] == 50_000


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        ([10], [10, 10, 10]),
        ([10, 20, 30], [20, 10, 30]),
        ([10, 20, None], [20, 10, None]),
        ([None, 20, None], [None, 20, None]),
        ([None], [None, None, None]),
    ],
)
def test_a_level_that_is_not_reached_is_later_than_any_step(
    steps: list[int | None], wanted: list[int | None]
) -> None:
    assert median_step(steps) == wanted


@pytest.mark.parametrize("name", ["scaling", "transfer", "defaults"])
def test_every_kind_of_picture_is_drawn(name: str, tmp_path: Path) -> None:
    mine = named(name, "tiny")
    runs = mine.runs(1)
    prepare(tmp_path / mine.name, mine, runs)
    for run in runs:
        width = run.settings.get("critic.width", 1)
        finish(tmp_path / mine.name, run, rate, kind=mine.metric, parameters=width**2)
    assert main(["study", name, "--finished", "--runs", str(tmp_path)]) == 0
    picture = tmp_path / mine.name / "picture.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = told(tmp_path / mine.name / "results.json")
    assert len(found["results"]) == len({(run.variant, run.group) for run in runs})


# ---------------------------------------------------------------- all of it


PENDULUM = """
tasks = ["gym/Pendulum-v1"]
steps = 3000
evaluations = 2
[settings]
num_envs = 2
report_every = 100
random_steps = 20
batch_size = 8
eval_episodes = 1
eval_sampled = false
critic.width = 8
actor.width = 8
env.episode_length = 20
[variants.narrow]
[variants.wrong]
settings = { env.kwargs = '{"nothing": 1}' }
"""


def test_a_study_is_interrupted_goes_on_and_tells_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, root = tmp_path / "mine.toml", tmp_path / "runs" / "mine"
    file.write_text(PENDULUM)
    words = ["study", str(file), "--runs", str(tmp_path / "runs"), "--seeds", "1"]
    waits = threading.Thread(target=interrupt_once, args=(root / "narrow-seed0" / "metrics.jsonl",))
    waits.start()
    assert main([*words, "--only", "narrow"]) == 128 + signal.SIGINT
    step = RunFolder(root / "narrow-seed0").steps()[-1]
    assert 0 < step < 3000
    assert "1 of 1 runs are not finished" in capsys.readouterr().out
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "nothing" in out.split("failed: wrong-seed0: ")[1].splitlines()[0]
    rows = [
        row["step"] for row in read_rows(root / "narrow-seed0" / "metrics.jsonl") if "train/updates" in row
    ]
    assert rows == [*range(100, 3100, 100)], "as if nothing had happened"
    found = told(root / "results.json")
    assert [each["variant"] for each in found["results"]] == ["narrow"]
    assert found["results"][0]["curve"]["iqm"]["steps"] == [1500, 3000]
    assert found["runs"]["narrow-seed0"]["cpu_seconds"] > 0.5
    assert found["machines"][0]["cores"] >= 1
    assert (root / "picture.png").exists()
