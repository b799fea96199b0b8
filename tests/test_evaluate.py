"""Evaluation: which episodes count, successes, scores and their intervals, and the command."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require
from run_folders import assert_one_line, make_run
from scripted import Scripted
from torch import Tensor

require("train")
from brc_fast.command import main as cli
from brc_fast.config import TrainConfig
from brc_fast.errors import InputError
from brc_fast.published import normalization
from brc_fast.runs import evaluate
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.scores import aggregate, interquartile_mean, normalized
from brc_fast.spec import Spec


class Still:
    """A policy that does nothing, and only when asked for its mean action."""

    device, observation_size, action_size = "cpu", 2, 1

    def act(self, observations: Tensor, task_ids: Tensor, deterministic: bool = False) -> Tensor:
        assert deterministic
        return torch.zeros(len(observations), 1)


def play(env: Any, episodes: int | None = None) -> evaluate.Episodes:
    return evaluate.evaluate(Still(), env, 0, episodes)  # type: ignore[arg-type]


def first_to_finish(env: Scripted, episodes: int) -> list[int]:
    """What must not be done: take the first episodes that finish, whichever slot they come from."""
    env.reset_tensors(0)
    running, lengths = np.zeros(env.num_envs, int), []
    while len(lengths) < episodes:
        ended = env.step_tensors(torch.zeros(env.num_envs, 1)).truncated.numpy()
        running += 1
        lengths += running[ended].tolist()
        running[ended] = 0
    return lengths[:episodes]


def test_short_episodes_are_not_favoured() -> None:
    # every episode lasts 1 or 101 steps, with equal chance: on average 51
    lengths = np.random.default_rng(0).choice([1, 101], size=(50, 1000))
    env = Scripted(["toy/One"], 50, lambda slot, number: int(lengths[slot, number]))
    played = play(env, 50)
    np.testing.assert_array_equal(played.lengths, [lengths[:, 0]])
    assert abs(played.lengths.mean() - 51) < 24  # 3.4 standard errors
    assert np.mean(first_to_finish(env, 50)) < 27  # the test can tell them apart


@pytest.mark.parametrize(("slots", "episodes"), [(3, 7), (3, 3), (3, 2), (1, 4), (5, 1)])
def test_every_task_gets_exactly_n_episodes_of_slots_fixed_before_the_start(
    slots: int, episodes: int
) -> None:
    env = Scripted(["toy/One", "toy/Two"], slots, lambda slot, number: 1 + (3 * slot + number) % 5)
    played = play(env, episodes)
    for task in range(2):
        for number in range(episodes):
            slot, turn = task * slots + number % slots, number // slots
            length = 1 + (3 * slot + turn) % 5
            assert played.lengths[task, number] == length
            assert played.returns[task, number] == pytest.approx(length * (1 + slot / 1000), rel=1e-6)


def test_without_a_number_every_slot_plays_one_episode() -> None:
    played = play(Scripted(["toy/One", "toy/Two"], 3, lambda slot, number: slot + 1))
    np.testing.assert_array_equal(played.lengths, [[1, 2, 3], [4, 5, 6]])


def test_lost_episodes_are_played_again_and_leave_no_trace() -> None:
    def length(slot: int, number: int) -> int:
        return 2 + slot + number

    expected = play(Scripted(["toy/One"], 2, length, success=lambda slot, number: number == 1), 6)
    env = Scripted(
        ["toy/One"],
        2,
        length,
        lost=lambda slot, number: number % 10 != 9,  # nine of ten, but never ten in a row
        success=lambda slot, number: number == 1,
    )
    for values, wanted in zip(play(env, 6), expected, strict=True):
        np.testing.assert_array_equal(values, wanted)


def test_ten_lost_episodes_in_a_row_are_one_clear_error() -> None:
    env = Scripted(["toy/One", "toy/Two"], 2, lambda slot, number: 3, lost=lambda slot, number: slot == 3)
    with pytest.raises(InputError, match=r"toy/Two .* environment 3 lost 10 episodes in a row"):
        play(env)


def test_a_slot_that_has_played_its_episodes_may_lose_as_many_as_it_likes() -> None:
    env = Scripted(
        ["toy/One"], 2, lambda slot, number: 2 + 50 * slot, lost=lambda slot, number: slot == 0 and number > 0
    )
    np.testing.assert_array_equal(play(env).lengths, [[2, 52]])


def test_steps_that_the_environment_spends_on_a_reset_count_nothing() -> None:
    def played(reset_steps: bool) -> evaluate.Episodes:
        script = Scripted(
            ["toy/One"],
            2,
            lambda slot, number: 2 + slot + number,
            success=lambda slot, number: number == 1,
            reset_steps=reset_steps,
        )
        return play(script, 6)

    for values, wanted in zip(played(True), played(False), strict=True):
        np.testing.assert_array_equal(values, wanted)


def test_an_episode_is_a_success_if_any_of_its_steps_was_one() -> None:
    env = Scripted(
        ["metaworld/a", "metaworld/b"],
        2,
        lambda slot, number: 4,
        success=lambda slot, number: number % 2 == slot % 2,
    )
    played = play(env, 6)
    np.testing.assert_array_equal(played.successes, [[1, 0, 0, 1, 1, 0]] * 2)
    row = evaluate.summary(env.task_names, played)
    assert row["eval/success/metaworld/a"] == row["eval/success_mean"] == 0.5
    assert row["eval/length/metaworld/b"] == 4.0


def test_tasks_that_know_no_success_report_none() -> None:
    known = Scripted(["metaworld/a"], 2, lambda slot, number: 2, success=lambda slot, number: True)
    unknown = Scripted(["toy/One"], 2, lambda slot, number: 2)

    class Both(Scripted):
        groups = (unknown, known)  # in another order than the names

    env = Both(["metaworld/a", "toy/One"], 2, lambda slot, number: 2, success=lambda slot, number: slot < 2)
    known.successes = torch.ones(2, dtype=torch.bool)
    row = evaluate.summary(env.task_names, play(env))
    assert row["eval/success/metaworld/a"] == row["eval/success_mean"] == 1.0
    assert "eval/success/toy/One" not in row
    assert not [name for name in evaluate.summary(("toy/One",), play(unknown)) if "success" in name]


def test_environments_of_another_size_than_the_agents_are_refused() -> None:
    env = Scripted(["toy/One"], 2, lambda slot, number: 2)
    env.task_spec = Spec.vectors(3, 1, ("toy/One",))
    with pytest.raises(InputError, match=r"must be the agent's, \[2, 1\], got environments with \[3, 1\]"):
        play(env)


# scores


@pytest.mark.parametrize(
    ("task", "score"),
    [
        ("dmc/dog-run", 0.25),
        ("mjx/HumanoidRun", 0.25),
        ("envpool/DogRun-v1", 0.25),
        ("envpool/BallInCupCatch-v1", 0.25),
        ("metaworld/reach-v3", 0.5),
        ("envpool/MetaWorld/Reach-v3", 0.5),
        ("envpool/HandManipulateBlockRotateZ-v1", 0.5),
        ("envpool/AdroitHandDoor-v1", 0.5),
        ("mjx/Go1JoystickFlatTerrain", None),
        ("gym/HalfCheetah-v5", None),
        ("envpool/Hopper-v4", None),
        ("envpool/HandleRun-v1", None),
        ("toy/One", None),
    ],
)
def test_scores_follow_the_suite(task: str, score: float | None) -> None:
    found = normalized(task, np.array([150.0, 350.0]), np.array([0.0, 1.0]))
    assert (found is None) == (score is None)
    if found is not None:
        assert found.mean() == score


@pytest.mark.parametrize("task", ["humanoidbench/h1-walk-v0", "gym/humanoid_bench:h1-walk-v0"])
def test_humanoidbench_scores_are_zero_at_random_and_one_at_the_reference(task: str) -> None:
    scale = normalization(task)
    assert scale is not None
    assert scale[1] > scale[0]
    found = normalized(task, np.array([*scale, sum(scale) / 2]), None)
    np.testing.assert_allclose(np.asarray(found), [0.0, 1.0, 0.5], atol=1e-12)


def test_a_task_scored_by_success_has_no_score_while_success_is_unknown() -> None:
    assert normalized("metaworld/reach-v3", np.ones(2), None) is None
    assert normalized("metaworld/reach-v3", np.ones(2), np.full(2, np.nan)) is None


def test_the_interquartile_mean_is_that_of_the_middle_half() -> None:
    shuffled = np.random.default_rng(0).permutation([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 700.0, -800.0])
    # sorted: -800 1 | 2 3 4 5 | 6 700
    assert interquartile_mean(shuffled.reshape(2, 4)) == 3.5
    require("scipy")
    from scipy import stats

    for size in ((3, 5), (7, 1), (2, 2), (1, 3)):
        values = np.random.default_rng(1).normal(size=size)
        assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values.ravel(), 0.25))


def test_estimates_agree_with_an_independent_bootstrap() -> None:
    require("scipy")
    from scipy import stats

    rng = np.random.default_rng(3)
    values = rng.uniform(size=(6, 5)) + np.arange(6)[:, None] / 5

    def pooled(*tasks: np.ndarray, axis: int) -> np.ndarray:  # each [..., 5]
        return np.concatenate(tasks, axis=axis)

    independent = {
        "iqm": lambda *tasks, axis: stats.trim_mean(pooled(*tasks, axis=axis), 0.25, axis=axis),
        "mean": lambda *tasks, axis: pooled(*tasks, axis=axis).mean(axis=axis),
        "median": lambda *tasks, axis: np.median([task.mean(axis=axis) for task in tasks], axis=0),
    }
    for name, statistic in independent.items():
        wanted = stats.bootstrap(
            tuple(values),
            statistic,
            n_resamples=20_000,
            batch=5_000,
            method="percentile",
            rng=rng,
            vectorized=True,
        ).confidence_interval
        got = aggregate(values)[name]
        assert got.value == pytest.approx(statistic(*values, axis=-1))
        width = wanted.high - wanted.low
        assert got.low == pytest.approx(wanted.low, abs=0.08 * width)
        assert got.high == pytest.approx(wanted.high, abs=0.08 * width)


def test_the_interval_of_a_mean_is_that_of_normal_theory() -> None:
    values = np.random.default_rng(0).normal(size=(20, 30))
    error = np.sqrt(values.var(1).sum() / 30) / 20
    got = aggregate(values)["mean"]
    assert got.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert got.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_differences_between_tasks_do_not_widen_an_interval() -> None:
    estimates = aggregate(np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    assert all(tuple(estimate) == (0.5, 0.5, 0.5) for estimate in estimates.values())


def test_one_sample_per_task_has_no_interval() -> None:
    estimate = aggregate(np.array([[0.25], [0.75]]))["mean"]
    assert estimate.value == 0.5
    assert np.isnan(estimate.low)
    assert str(estimate) == "0.500"


def test_estimates_are_the_same_for_the_same_seed() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4))
    assert aggregate(values, 5) == aggregate(values, 5) != aggregate(values, 6)


# the command


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Scripted]:
    """Replaces the environments; the list holds what the command made."""
    made: list[Scripted] = []

    def make(tasks: Sequence[str], num_envs: int, seed: int = 0, **settings: Any) -> Scripted:
        length = settings.get("episode_length") or 200
        env = Scripted(tasks, num_envs, lambda slot, number: length + 100 * (number % 2))
        if tasks[0].startswith("metaworld"):
            env.success = lambda slot, number: slot % 2 == 0
        made.append(env)
        return env

    monkeypatch.setattr("brc_fast.envs.make", make)
    return made


def test_the_command_prints_and_keeps_returns_lengths_and_scores(
    made: list[Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", ("dmc/dog-run", "gym/HalfCheetah-v5"))
    assert cli.main(["evaluate", str(run), "--episodes", "6", "--num-envs", "3"]) == 0
    assert [env.num_envs for env in made] == [6]
    assert made[0].closed
    kept = json.loads((run / "evaluation.json").read_text())
    assert (kept["step"], kept["seed"], kept["episodes"]) == (500, 1_000_000, 6)
    assert kept["lengths"]["dmc/dog-run"] == [200, 200, 200, 300, 300, 300]
    returns = kept["returns"]["dmc/dog-run"]
    assert kept["eval/return/dmc/dog-run"] == pytest.approx(np.mean(returns))
    assert kept["scores"] == {"dmc/dog-run": pytest.approx([value / 1000 for value in returns])}
    assert kept["aggregate"]["iqm"][0] == pytest.approx(interquartile_mean(np.array([returns]) / 1000))
    assert kept["aggregate"]["iqm"][1] < kept["aggregate"]["iqm"][2]
    assert kept["successes"] == {}
    told = capsys.readouterr().out
    assert "score over 1 of 2 tasks: iqm 0.2" in told
    assert "stratified bootstrap of 6 episodes per task" in told
    assert "[+-: standard deviation of 6 episodes per task]" in told


def test_several_runs_are_seeds_of_one_experiment(
    made: list[Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ("metaworld/reach-v3", "metaworld/push-v3")
    runs = [str(make_run(tmp_path / f"run{seed}", tasks, seed)) for seed in range(3)]
    file = tmp_path / "all.json"
    assert cli.main(["evaluate", *runs, "--episodes", "4", "--json", str(file)]) == 0
    told = capsys.readouterr().out
    assert "stratified bootstrap of 3 runs per task" in told
    assert "[+-: standard deviation of 3 runs per task]" in told
    assert "score over 2 of 2 tasks: iqm 0.500 [0.500, 0.500]" in told
    kept = json.loads(file.read_text())
    assert list(kept["runs"]) == runs
    assert kept["together"]["scores"] == dict.fromkeys(tasks, [0.5] * 3)
    for run in runs:
        assert kept["runs"][run] == json.loads((Path(run) / "evaluation.json").read_text())


def test_runs_that_are_no_seeds_of_one_experiment_are_listed_one_by_one(
    made: list[Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ("metaworld/reach-v3",)
    one, two = make_run(tmp_path / "one", task), make_run(tmp_path / "two", task, 1)
    copy, wider, longer = (tmp_path / name for name in ("copy", "wider", "longer"))
    for run in (copy, wider, longer):
        shutil.copytree(two, run)
    settings = json.loads((wider / "config.json").read_text())
    settings["learning"]["discount"] = 0.9
    (wider / "config.json").write_text(json.dumps({**settings, "seed": 2, "steps": 7}))
    (longer / "config.json").write_text(
        json.dumps(json.loads((two / "config.json").read_text()) | {"seed": 3})
    )
    (longer / "checkpoints" / "000000000500").rename(longer / "checkpoints" / "000000000600")
    manifest = longer / "checkpoints" / "000000000600" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "step": 600}))
    short = ("--episodes", "2", "--no-sampled")
    for runs, told in (
        ([one, two, copy], f"{copy} has the settings and the seed 1 of {two}: a run that was repeated"),
        ([one, two, wider], f"learning.discount is 0.99 in {one} and 0.9 in {wider}"),
        ([one, longer], f"step is 500 in {one} and 600 in {longer}"),
    ):
        file = tmp_path / "all.json"
        assert cli.main(["evaluate", *map(str, runs), *short, "--json", str(file)]) == 0
        out = capsys.readouterr().out
        assert f"not taken together: {told}" in out
        assert "stratified bootstrap of" not in out.replace("of 2 episodes", "")
        assert out.count("  metaworld/reach-v3 ") == len(runs)
        kept = json.loads(file.read_text())
        assert kept["together"] is None
        assert told in kept["apart"]
    assert cli.main(["evaluate", str(one), str(two), *short]) == 0
    assert "stratified bootstrap of 2 runs per task" in capsys.readouterr().out


def test_episodes_that_hardly_differ_are_one_sample_and_have_no_interval() -> None:
    def told(*returns: float) -> evaluate.Evaluation:
        values = np.array([returns, [100.0, 300.0, 500.0]])
        episodes = evaluate.Episodes(values, np.ones_like(values), np.full_like(values, np.nan))
        return evaluate.Evaluation(("dmc/dog-run", "dmc/dog-walk"), episodes)

    alike, apart = told(859.0, 860.0, 861.0), told(700.0, 860.0, 900.0)
    assert alike.alike == ["dmc/dog-run"]
    assert all(np.isnan(each.low) for each in alike.estimates.values())
    assert alike.estimates["mean"].value == apart.estimates["mean"].value + (860 - 820) / 2000
    assert "no bounds: episodes of dmc/dog-run hardly differ" in alike.table()
    assert alike.record()["aggregate"]["iqm"][1:] == [None, None]
    assert "of 3 episodes per task, all of one policy: seeds may differ more" in apart.table()
    runs = evaluate.Evaluation.over_runs([alike, alike])
    assert runs.estimates["mean"].low == runs.estimates["mean"].high  # of runs an interval is one


def test_both_returns_are_printed_and_kept_and_the_sampled_ones_can_be_left_out(
    made: list[Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", ("metaworld/reach-v3",))
    assert cli.main(["evaluate", str(run), "--episodes", "4"]) == 0
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept["sampled"]["returns"]["metaworld/reach-v3"] == kept["returns"]["metaworld/reach-v3"]
    assert kept["eval/sampled_success_mean"] == 0.5
    assert "sampled return  success" in capsys.readouterr().out
    assert cli.main(["evaluate", str(run), "--episodes", "4", "--no-sampled"]) == 0
    assert "sampled" not in capsys.readouterr().out
    assert not [name for name in json.loads((run / "evaluation.json").read_text()) if "sampled" in name]


def test_json_to_stdout_is_all_of_it_and_tables_go_to_stderr(
    made: list[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"), ("dmc/dog-run",))
    before = set(Path().iterdir())
    assert cli.main(["evaluate", "run", "--episodes", "2", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["runs"]["run"]["step"] == 500
    assert "run, step 500, 2 episodes per task" in err
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize("kind", ["device", "FIFO", "link"])
@pytest.mark.parametrize("words", [["evaluate", "--json"], ["plot", "--output"], ["video", "--output"]])
def test_no_output_replaces_a_device_a_fifo_or_what_a_link_names(
    made: list[Scripted],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("brc_fast.runs.video.require_renderer", lambda: None)
    run = make_run(Path("run"), ("dmc/dog-run",))
    (run / "metrics.jsonl").write_text('{"step": 20, "eval/return/dmc/dog-run": 3.0}\n')
    output, precious = Path("x" + {"plot": ".png", "video": ".gif"}.get(words[0], "")), Path("precious")
    precious.write_text("precious")
    if kind == "link":
        output.symlink_to(precious)
    elif kind == "FIFO":
        os.mkfifo(output)
    else:
        try:
            os.mknod(output, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    told = f"{output} must be a regular file, got a {kind}; name another"
    assert_one_line([words[0], "run", words[1], str(output)], told, capsys, tmp_path)


def test_runs_that_set_their_own_episode_length_get_no_scores(
    made: list[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "env_settings", lambda config: {"episode_length": 50})
    run = make_run(tmp_path / "run", ("dmc/dog-run",))
    assert cli.main(["evaluate", str(run), "--episodes", "2"]) == 0
    assert "no scores: they presume the suites' own episode lengths" in capsys.readouterr().out
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept["lengths"]["dmc/dog-run"] == [50, 50]
    assert kept["scores"] == kept["aggregate"] == {}


def test_the_settings_of_the_runs_environments_are_passed_on() -> None:
    @dataclass(frozen=True)
    class Settings:
        episode_length: int | None = 7
        impl: str = "jax"

    class Config:
        env = Settings()

    assert evaluate.env_settings(Config()) == {"episode_length": 7, "impl": "jax"}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name at least one run folder"),
        (["a", "--episodes", "0"], "episodes must be positive, got 0"),
        (["a", "--num-envs", "0"], "num_envs must be positive, got 0"),
        (["a", "--seed", "-1"], "seed must be 0 or more, got -1"),
        (["a", "--json", "no/such/folder.json"], "there is no folder to write no/such/folder.json to"),
        (["a", "--json", ""], "json must name a file, got the folder ."),
        (["a", "nowhere"], "nowhere holds no run"),
        (["a", "empty"], "empty holds no complete checkpoint"),
        (["a", "a"], "runs must differ, but a is listed more than once"),
        (["a", "b"], "must have the same tasks in the same order: a has dmc/dog-run, b has dmc/dog-walk"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words: list[str],
    told: str,
    made: list[Scripted],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("a"), ("dmc/dog-run",))
    make_run(Path("b"), ("dmc/dog-walk",))
    RunFolder("empty").create(TrainConfig(tasks=("dmc/dog-run",)))
    assert_one_line(["evaluate", *words], told, capsys, tmp_path)
    assert not made
