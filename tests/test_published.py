"""The published scores in the package: their names, their axes, and that they are the released ones.

The release is read from $BRC_FAST_SHARED (default ../shared): its tables, and the summary in algorithm.md.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import fresh
import numpy as np
import pytest

from brc_fast import InputError, published

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("BRC_FAST_SHARED", ROOT.parent / "shared"))
NEEDS_RELEASE = pytest.mark.skipif(
    not (SHARED / "published").is_dir(), reason=f"no {SHARED / 'published'} (set BRC_FAST_SHARED)"
)
MODES: tuple[published.Mode, ...] = ("single_task", "multi_task")


@pytest.mark.parametrize(
    ("task", "suite", "name"),
    [
        ("dmc/dog-run", "dmc", "dog-run"),
        ("dmc/humanoid-run", "dmc", "humanoid-run"),
        ("mjx/HumanoidRun", "dmc", "humanoid-run"),
        ("envpool/DogRun-v1", "dmc", "dog-run"),
        ("envpool/HumanoidStand-v1", "dmc", "humanoid-stand"),
        ("humanoidbench/h1-walk-v0", "humanoidbench", "h1-walk-v0"),
        ("gym/humanoid_bench:h1-walk-v0", "humanoidbench", "h1-walk-v0"),
        ("humanoidbench/h1hand-sit_hard-v0", "humanoidbench_hard", "h1hand-sit_hard-v0"),
        ("metaworld/reach-v3", "metaworld", "reach-v2-goal-observable"),
        ("envpool/MetaWorld/Reach-v3", "metaworld", "reach-v2-goal-observable"),
        ("reach-v2-goal-observable", "metaworld", "reach-v2-goal-observable"),
    ],
)
def test_a_task_id_finds_the_published_task(task: str, suite: str, name: str) -> None:
    for mode in MODES:
        curve = published.curve(task, mode)
        assert curve is not None
        assert (curve.suite, curve.task) == (suite, name)


@pytest.mark.parametrize(
    "task",
    [
        "mjx/CartpoleSwingup",
        "dmc/dog-fetch",
        "gym/HumanoidStandup-v5",
        "envpool/HumanoidStandup-v4",
        "envpool/HumanoidCMURun-v1",
        "envpool/HumanoidRunPureState-v1",
        "metaworld/reach-v2",
        "toy/One",
    ],
)
def test_a_task_that_was_not_published_finds_nothing(task: str) -> None:
    assert published.curve(task) is None
    assert published.normalization(task) is None
    assert published.score_unit(task) == "return"


def test_every_metaworld_task_is_found_by_both_of_its_ids() -> None:
    for name in published.task_list("METAWORLD_ALL"):
        short = name.removesuffix("-v2-goal-observable")
        camel = "".join(word.capitalize() for word in short.split("-"))
        for task in (f"metaworld/{short}-v3", f"envpool/MetaWorld/{camel}-v3"):
            assert published.published_name(task) == name
            assert published.curve(task) is not None


def test_every_listed_task_but_the_held_out_hands_has_both_curves() -> None:
    for name in ("DMC_DOGS", "DMC_HUMANOIDS", "METAWORLD_ALL", "HB_NOHANDS", "HB_HANDS", "SHADOWHAND_TRAIN"):
        for task in published.task_list(name):
            assert all(published.curve(task, mode) is not None for mode in MODES), task
    assert not set(published.task_list("SHADOWHAND_TEST")) & set(published.task_list("SHADOWHAND_TRAIN"))


def test_an_unknown_list_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(InputError, match=r"unknown task list 'DOGS': one of DMC_DOGS, .*SHADOWHAND_TEST"):
        published.task_list("DOGS")


def test_low_and_high_are_the_extreme_seeds_and_the_mean_lies_between() -> None:
    curve = published.curve("dmc/dog-run")
    assert curve is not None
    assert curve.steps is not None
    assert curve.seeds == len(curve.scores) > 1
    assert curve.steps.shape == curve.mean.shape == curve.low.shape == curve.high.shape
    assert (np.sort(curve.scores, axis=0)[[0, -1]] == [curve.low, curve.high]).all()
    assert ((curve.low <= curve.mean) & (curve.mean <= curve.high)).all()


def test_shadowhand_has_scores_but_no_steps() -> None:
    for mode in MODES:
        curve = published.curve(published.task_list("SHADOWHAND_TRAIN")[0], mode)
        assert curve is not None
        assert curve.steps is None
        assert curve.scores.size


def test_only_suites_of_successes_have_scores_that_are_shares() -> None:
    for task, unit in (("metaworld/reach-v3", "success"), ("dmc/dog-run", "return"), ("knife", "success")):
        curve = published.curve(task)
        assert curve is not None
        assert published.score_unit(task) == unit
        assert (curve.scores.max() <= 1) == (unit == "success")


def test_humanoidbench_and_atari_have_a_random_and_a_reference_score() -> None:
    for task in ("humanoidbench/h1-walk-v0", "gym/humanoid_bench:h1hand-package-v0", "Pong"):
        scale = published.normalization(task)
        assert scale is not None
        assert scale[0] < scale[1]


def test_importing_reads_no_table() -> None:
    code = (
        "import sys; seen = []; sys.addaudithook(lambda event, told: seen.append(f'{event} {told[:1]}'))\n"
        "from brc_fast import published as p\n"
        "def opened(): return sum(told.startswith('open ') and str(p.DATA) in told for told in seen)\n"
        "print(opened()); p.curve('dmc/dog-run'); print(opened())"
    )
    assert fresh.run(code).stdout.split() == ["0", "1"]


def test_the_tables_are_small_and_their_licence_lies_beside_them() -> None:
    assert sum(file.stat().st_size for file in published.DATA.iterdir()) < 400_000
    assert "Copyright (c) 2025 naumix" in (published.DATA / "LICENSE").read_text()


@NEEDS_RELEASE
def test_the_packaged_tables_are_what_the_readme_makes_of_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = re.findall(
        r"^```python\n(.*?)^```$", (published.DATA / "README.md").read_text(), re.M | re.S
    )
    monkeypatch.setenv("BRC_FAST_SHARED", str(SHARED))
    monkeypatch.chdir(tmp_path)
    tmp_path = tmp_path / "brc_fast" / "data"
    tmp_path.mkdir(parents=True)
    exec(snippet, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "normalization.csv",
        "scores.csv",
        "task_lists.json",
    ]
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (published.DATA / file.name).read_bytes(), file.name


def summary() -> list[tuple[str, str, list[float]]]:
    """Rows of the summary of the release: benchmark, steps, and mean and deviation of both modes."""
    file = SHARED / "algorithm.md"
    text = file.read_text() if file.exists() else ""
    rows = re.findall(
        r"^\| (\S+).*? \| (\S+) \| ([\d.]+) \+- ([\d.]+) \| ([\d.]+) \+- ([\d.]+) \|$", text, re.M
    )
    return [(name, steps, [float(number) for number in numbers]) for name, steps, *numbers in rows]


@NEEDS_RELEASE
def test_the_final_means_and_deviations_are_those_of_the_summary() -> None:
    suites = ("dmc", "humanoidbench", "humanoidbench_hard", "metaworld", "shadowhand")
    rows = summary()
    assert len(rows) == len(suites)
    for suite, (name, steps, numbers) in zip(suites, rows, strict=True):
        for mode, told in zip(MODES, (numbers[:2], numbers[2:]), strict=True):
            curves = [
                curve
                for task, of in published._scores()
                if of == mode and (curve := published.curve(task, mode)) is not None and curve.suite == suite
            ]
            finals = []  # [T, S]
            for curve in curves:
                low, high = published.normalization(curve.task) or (0.0, 1000.0 if suite == "dmc" else 1.0)
                finals.append((curve.scores[:, -1] - low) / (high - low))
                if curve.steps is not None:
                    scale = {"k": 1_000, "M": 1_000_000}[steps[-1]]
                    assert curve.steps[-1] == int(steps[:-1]) * scale
            seeds = np.mean(finals, axis=0)
            # Of the single-task hands, thinned to every 20th point, the last evaluation was not kept.
            atol = 0.009 if (suite, mode) == ("shadowhand", "single_task") else 0.001  # its last digit
            assert [seeds.mean(), seeds.std(ddof=1)] == pytest.approx(told, abs=atol), (name, mode)
