"""Learning curves: which runs are one line, what the line and its band are, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extras import require
from run_folders import assert_one_line

from brc_fast import CriticConfig, InputError, TrainConfig, published
from brc_fast.command import main as cli
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.plot import (
    COLOURS,
    GREY,
    Experiment,
    Line,
    curves,
    draw,
    experiments,
    line,
    plot,
    published_runs,
)

require("matplotlib")
DOGS = tuple(f"dmc/{name}" for name in published.task_list("DMC_DOGS"))
RUN = "dmc/dog-run"


def make_run(
    path: Path,
    values: Mapping[str, Sequence[float]],
    success: bool = False,
    every: int = 25_000,
    seed: int = 0,
    **settings: Any,
) -> RunFolder:
    """A run folder with one evaluation per value of each task."""
    folder = RunFolder(path)
    path.mkdir()
    folder.write_config(TrainConfig(tasks=tuple(values), run=str(path), seed=seed, **settings))
    rows = []
    for point, row in enumerate(zip(*values.values(), strict=True), 1):
        named = {f"eval/return/{task}": value for task, value in zip(values, row, strict=True)}
        if success:
            named |= {name.replace("return", "success"): value / 1000 for name, value in named.items()}
        rows += [{"step": every * point - 1, "critic/loss": 1.0}, {"step": every * point, **named}]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def only(folders: Sequence[RunFolder]) -> Experiment:
    (experiment,) = experiments(folders, "return", "seed")
    return experiment


def drawn(experiment: Experiment, tasks: Sequence[str]) -> Line:
    found = line(experiment, tasks)
    assert found is not None
    return found


def figure_of(
    shown: Sequence[Experiment],
    tasks: Sequence[str],
    behind: Experiment | None = None,
    metric: Any = "return",
) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw(figure, shown, tasks, metric, behind)
    return figure


def test_runs_that_differ_only_in_seed_folder_and_length_are_one_line_at_their_mean(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).uniform(0, 1000, (3, 4))
    runs = [
        make_run(tmp_path / str(seed), {RUN: row}, seed=seed, steps=100_000 + seed)
        for seed, row in enumerate(rows)
    ]
    found = drawn(only(runs), [RUN])
    assert found.steps.tolist() == [25_000, 50_000, 75_000, 100_000]
    np.testing.assert_allclose(found.mean, rows.mean(0))
    assert found.complete.all()


def test_the_band_of_three_seeds_spans_them_and_that_of_twenty_is_the_interval_of_the_mean(
    tmp_path: Path,
) -> None:
    rows = np.random.default_rng(1).normal(500, 100, (20, 4))
    runs = [make_run(tmp_path / str(seed), {RUN: row}, seed=seed) for seed, row in enumerate(rows)]
    few = drawn(only(runs[:3]), [RUN])
    np.testing.assert_allclose([few.low, few.high], [rows[:3].min(0), rows[:3].max(0)])
    many = drawn(only(runs), [RUN])
    normal = 2 * 1.96 * rows.std(0) / np.sqrt(20)
    np.testing.assert_allclose(many.high - many.low, normal, rtol=0.1)
    assert ((many.low < many.mean) & (many.mean < many.high)).all()


def test_one_seed_has_no_band(tmp_path: Path) -> None:
    found = drawn(only([make_run(tmp_path / "run", {RUN: [1.0, 5.0]})]), [RUN])
    np.testing.assert_array_equal(found.low, found.mean)
    np.testing.assert_array_equal(found.high, found.mean)


def test_the_mean_over_tasks_keeps_the_runs_of_one_agent_together_and_resamples_separate_ones_apart(
    tmp_path: Path,
) -> None:
    # Two tasks whose scores mirror each other: an agent of both has the same mean with every seed.
    first, second = DOGS[:2]
    pairs = [(100.0, 900.0), (500.0, 500.0), (900.0, 100.0)]
    shared = [
        make_run(tmp_path / f"shared{seed}", {first: [a, a], second: [b, b]}, seed=seed)
        for seed, (a, b) in enumerate(pairs)
    ]
    apart = [
        make_run(tmp_path / f"apart{seed}{index}", {task: [value, value]}, seed=seed)
        for seed, pair in enumerate(pairs)
        for index, (task, value) in enumerate(zip((first, second), pair, strict=True))
    ]
    together, separate = (drawn(only(runs), (first, second)) for runs in (shared, apart))
    np.testing.assert_allclose(together.mean, 500.0)
    np.testing.assert_allclose(separate.mean, 500.0)
    np.testing.assert_allclose(together.high - together.low, 0.0, atol=1e-9)
    assert (separate.high - separate.low > 300).all()


def test_a_seed_that_stopped_early_leaves_the_mean_of_the_others_marked_as_incomplete(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", {RUN: [10.0, 20.0, 30.0]}, seed=0),
        make_run(tmp_path / "b", {RUN: [30.0]}, seed=1),
    ]
    found = drawn(only(runs), [RUN])
    assert found.mean.tolist() == [20.0, 20.0, 30.0]
    assert found.complete.tolist() == [True, False, False]
    figure = figure_of([only(runs)], [RUN])
    assert "dashed" in figure.legends[0].get_title().get_text()


def test_a_seed_evaluated_at_other_steps_is_interpolated(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", {RUN: [0.0, 20.0, 40.0, 60.0]}, every=10_000, seed=0),
        make_run(tmp_path / "b", {RUN: [120.0, 160.0]}, every=20_000, seed=1, eval_every=20_000),
    ]
    found = drawn(only(runs), [RUN])
    at = dict(zip(found.steps.tolist(), found.mean.tolist(), strict=True))
    assert at[30_000] == (40.0 + 140.0) / 2


def test_an_evaluation_that_was_not_finite_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", {RUN: [1.0, 2.0]})
    with folder.metrics.open("a") as file:
        file.write(json.dumps({"step": 75_000, f"eval/return/{RUN}": None}) + "\n")
    assert curves(folder) == {RUN: ([25_000, 50_000], [1.0, 2.0])}


def test_experiments_are_labelled_by_the_settings_that_differ(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{width}-{seed}", {RUN: [1.0]}, seed=seed, critic=CriticConfig(width=width))
        for width in (64, 128)
        for seed in range(2)
    ]
    assert [each.label for each in experiments(runs, "return", "seed")] == [
        "critic.width=64",
        "critic.width=128",
    ]
    assert [each.label for each in experiments(runs, "return", "none")] == ["64-0", "64-1", "128-0", "128-1"]
    assert {each.entry() for each in experiments(runs, "return", "seed")} == {
        "critic.width=64, 2 seeds",
        "critic.width=128, 2 seeds",
    }


def test_one_agent_of_all_tasks_and_one_for_each_are_different_experiments(tmp_path: Path) -> None:
    shared = make_run(tmp_path / "shared", {task: [1.0] for task in DOGS})
    own = [make_run(tmp_path / task[-4:], {task: [1.0]}) for task in DOGS]
    found = experiments([shared, *own], "return", "seed")
    assert [each.label for each in found] == ["one agent for 4 tasks", "one agent per task"]
    assert [len(each.runs) for each in found] == [1, 4]


def test_many_differing_settings_are_told_by_the_folder(tmp_path: Path) -> None:
    small = make_run(
        tmp_path / "small", {RUN: [1.0]}, num_envs=2, batch_size=3, random_steps=4, precision="bf16"
    )
    large = make_run(tmp_path / "large", {RUN: [1.0]})
    assert [each.label for each in experiments([small, large], "return", "seed")] == ["small", "large"]


def test_the_published_curve_is_cut_where_the_runs_end_and_says_what_it_is() -> None:
    behind = published_runs([RUN], "return", "single_task", 60_000)
    curve = published.curve(RUN, "single_task")
    assert behind is not None
    assert curve is not None
    found = drawn(behind, [RUN])
    assert found.steps.tolist() == [25_000, 50_000]
    np.testing.assert_allclose(found.mean, curve.mean[:2])
    assert behind.entry() == f"published BRC (dm_control), single-task, {curve.seeds} seeds"
    assert published_runs([RUN], "return", "single_task", 20_000) is None


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("mjx/CartpoleSwingup", "return"),
        ("metaworld/reach-v3", "return"),
        (RUN, "success"),
        ("knife", "success"),
    ],
)
def test_no_curve_is_drawn_behind_in_another_unit_or_on_an_unknown_axis(task: str, metric: Any) -> None:
    assert published_runs([task], metric, "multi_task", 1e9) is None


def test_published_and_own_scores_are_normalized_alike(tmp_path: Path) -> None:
    task = "humanoidbench/h1-walk-v0"
    curve = published.curve(task)
    assert curve is not None
    own = make_run(tmp_path / "run", {task: curve.mean.tolist()})
    (shown,) = experiments([own], "normalized", "seed")
    behind = published_runs([task], "normalized", "multi_task", 1e9)
    assert behind is not None
    np.testing.assert_allclose(drawn(shown, [task]).mean, drawn(behind, [task]).mean)


def test_a_figure_has_a_panel_for_the_mean_and_one_for_each_task_and_the_published_lines_are_grey(
    tmp_path: Path,
) -> None:
    runs = [
        make_run(tmp_path / str(seed), {t: [1.0 + seed] * 5 for t in DOGS}, seed=seed) for seed in range(2)
    ]
    figure = figure_of([only(runs)], DOGS, published_runs(DOGS, "return", "multi_task", 125_000))
    assert [panel.get_title(loc="left") for panel in figure.axes] == [
        "mean of 4 dmc tasks",
        *(task.removeprefix("dmc/") for task in DOGS),
    ]
    for panel in figure.axes:
        assert [each.get_color() for each in panel.lines] == [COLOURS[0], GREY]
    told = figure.legends[0].get_title().get_text()
    assert "25k steps per point (inferred)" in told
    assert "95% bootstrap interval" in told


def test_no_mean_is_drawn_of_tasks_that_no_experiment_has_all_of(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", {DOGS[0]: [1.0]}, num_envs=1),
        make_run(tmp_path / "b", {DOGS[1]: [1.0]}, num_envs=2),
    ]
    figure = figure_of(experiments(runs, "return", "seed"), DOGS[:2])
    assert len(figure.axes) == 2


@pytest.mark.parametrize("count", [2, 3, 5, 12, 13, 25, 50])
def test_panels_of_any_number_of_tasks_do_not_overlap_and_lie_inside_the_figure(count: int) -> None:
    tasks = [f"suite/Task{number}" for number in range(count)]
    shown = [Experiment("run", [{task: ([1000, 2000], [0.0, 1.0]) for task in tasks}])]
    figure = figure_of(shown, tasks)
    figure.draw_without_rendering()
    boxes = [panel.get_window_extent() for panel in figure.axes]
    assert len(boxes) == count + 1
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for panel in figure.axes:
        whole = panel.get_tightbbox()
        assert figure.bbox.x0 <= whole.x0 < whole.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= whole.y0 < whole.y1 <= figure.bbox.y1


@pytest.mark.parametrize("count", [1, 2, 13])
def test_a_long_name_stays_within_its_panel(count: int) -> None:
    tasks = [f"gym/some_module_of_mine:ATaskWithANameOfManyLetters{number}-v0" for number in range(count)]
    shown = [Experiment("run", [{task: ([1000, 2000], [0.0, 1.0]) for task in tasks}])]
    figure = figure_of(shown, tasks)
    figure.draw_without_rendering()
    boxes = [panel._left_title.get_window_extent() for panel in figure.axes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_the_first_colours_differ_in_lightness() -> None:
    from matplotlib.colors import to_rgb

    light = [float(np.dot((0.299, 0.587, 0.114), to_rgb(colour))) for colour in (*COLOURS[:3], GREY)]
    assert min(abs(a - b) for a, b in itertools.combinations(light, 2)) > 0.08
    assert len(set(COLOURS)) == len(COLOURS)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_command_writes_the_picture_it_names(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", {"metaworld/reach-v3": [100.0, 900.0]}, success=True)
    output = tmp_path / f"picture{suffix}"
    for metric in ("return", "success", "normalized"):
        assert cli.main(["plot", str(run.path), "--output", str(output), "--metric", metric]) == 0
        assert capsys.readouterr().out.strip() == str(output)
        assert output.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
        output.unlink()


def broken(text: bytes) -> Any:
    return lambda run: run.metrics.write_bytes(text)


@pytest.mark.parametrize(
    ("spoil", "words", "told"),
    [
        (broken(b""), [], "run holds no evaluation to plot yet: see eval_every"),
        (broken(b'{"step": 1}\nnonsense\n{"step": 3}\n'), [], "metrics.jsonl line 2 is not JSON"),
        (broken(b'{"step": 1}\n[3]\n'), [], "metrics.jsonl line 2 is no row of metrics"),
        (broken(b'{"eval/return/x": 3}\n'), [], "metrics.jsonl line 1 is no row of metrics"),
        (broken(b'{"step": 1, "eval/return/x": "y"}\n'), [], "metrics.jsonl line 1 is no row of metrics"),
        (broken(b'{"step": 1e999, "eval/return/x": 1}\n'), [], "metrics.jsonl line 1 is no row of metrics"),
        (
            broken(
                b'{"step": 1, "eval/return/metaworld/reach-v3": 1}\n'
                b'{"step": 2, "eval/return/metaworld/reach-v3": 1, "eval/success/metaworld/reach-v3": 1}\n'
            ),
            ["--metric", "normalized"],
            "nothing is known to normalize metaworld/reach-v3 by",
        ),
        (broken(b"\xff\xfe\x00"), [], "metrics.jsonl line 1 is not text"),
        (None, ["--output", "x.pdf"], "output must end in .png or .svg, got x.pdf"),
        (None, ["--output", "nowhere/x.png"], "there is no folder to write nowhere/x.png to"),
        (None, ["--metric", "loss"], "--metric"),
        (None, ["--colour", "red"], "Unrecognized options: --colour"),
        (None, ["--metric", "success"], "run holds no success rate: its tasks report none"),
        (None, ["--metric", "normalized"], "nothing is known to normalize toy/One by"),
        (None, ["--reference", "multi_task"], "no multi_task curve in return up to step 50000 is published"),
        (lambda run: (run.path / "config.json").unlink(), ["--group", "none"], "run holds no run"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_writes_nothing(
    spoil: Any,
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("run"), {"toy/One": [1.0, 2.0]})
    if spoil:
        spoil(run)
    assert_one_line(["plot", "run", *words], told, capsys, tmp_path)


def test_a_repeated_run_is_no_further_seed_but_a_line_of_its_own(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, {RUN: [1.0, 2.0]}) for name in ("first", "again")]
    assert [found.label for found in experiments(runs, "return", "seed")] == ["first", "again"]


@pytest.mark.parametrize(
    ("spoil", "kept", "told"),
    [
        (
            lambda rows: [*rows, b'{"step": 125000, "eval/ret'],
            [1, 2, 3, 4],
            "line 9 is cut off",
        ),
        (
            lambda rows: [*rows[:3], b"x" + rows[3], *rows[4:]],
            [1, 3, 4],
            "line 4 is not JSON",
        ),
        (lambda rows: [*rows, bytes(200)], [1, 2, 3, 4], "line 9 holds zeros (after step 100000)"),
        (lambda rows: [*rows[:4], b"\xff\xfe\n", *rows[4:]], [1, 2, 3, 4], "line 5 is not text"),
        (lambda rows: [*rows[:6], *rows[2:]], [1, 2, 3, 4], "line 7 goes back to step 49999"),
        (lambda rows: [*rows[:2], rows[1], *rows[2:]], [1, 2, 3, 4], "line 3 repeats step 25000"),
        (
            lambda rows: [*rows[:3], rows[3].replace(b"50", b"950"), *rows[4:]],
            [1, 3, 4],
            "line 4 is ahead",
        ),
        (
            lambda rows: [*rows[:3], rows[3].replace(b"2.0", b'"2"'), *rows[4:]],
            [1, 3, 4],
            "line 4 is no row",
        ),
    ],
)
def test_rows_beside_a_damaged_one_are_drawn_and_it_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any, kept: list[int], told: str
) -> None:
    run = make_run(tmp_path / "run", {RUN: [1.0, 2.0, 3.0, 4.0]})
    run.metrics.write_bytes(b"".join(spoil(run.metrics.read_bytes().splitlines(keepends=True))))
    assert cli.main(["plot", str(run.path), "--output", str(tmp_path / "x.png")]) == 0
    (line,) = caplog.messages
    assert f"{run.metrics} line " in line
    assert told in line
    assert curves(run)[RUN] == ([25_000 * number for number in kept], [float(number) for number in kept])


@pytest.mark.parametrize("option", ["metric", "group", "reference"])
def test_an_unknown_option_is_refused_from_python_too(option: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {RUN: [1.0]})
    with pytest.raises(InputError, match=rf"{option} must be one of .*, got 'best'"):
        plot([run], tmp_path / "x.png", **{option: "best"})  # type: ignore[arg-type]
