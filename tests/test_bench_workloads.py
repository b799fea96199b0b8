"""Every benchmark takes workloads by name, with the sizes and the tasks that they stand for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import require

from brc_fast.envs import expand, make

ROOT = Path(__file__).resolve().parent.parent
LISTED = {"humanoidbench-28": 20}  # tasks that brc_fast.envs knows by name; of the others all


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    def imported(name: str) -> Any:
        require("gymnasium")
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # main sets it too, and this takes it back
        return __import__(f"bench_{name}")

    return imported


def test_every_workload_has_suites_of_as_many_tasks_as_it_says() -> None:
    from workloads import WORKLOADS

    for name, workload in WORKLOADS.items():
        assert workload.suites
        for suite in workload.suites:
            assert len(expand(suite)) == LISTED.get(name, workload.tasks)


def test_a_workload_is_made_by_the_first_simulator_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from workloads import named

    there = {"envpool", "mujoco_playground"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    assert named("dmc-single").suite == "mjx/HumanoidRun"
    there.remove("mujoco_playground")
    assert named("dmc-single").suite == "dmc/humanoid-run"
    there.clear()
    assert named("dmc-single").suite == "mjx/HumanoidRun"  # whose reason is then told


@pytest.mark.parametrize("name", ["kernels", "envs", "train", "update"])
def test_an_unknown_workload_is_one_line_with_the_names(
    name: str, bench: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dry"] if name == "kernels" else ["--device", "cpu"]
    assert bench(name).main([*words, "--workload", "metaworld-51"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench_{name}: no workload 'metaworld-51'; there are dmc-single, ")


# ---------------------------------------------------------------- kernels


def test_the_kernels_run_at_the_sizes_of_a_workload_and_agree_with_its_networks() -> None:
    from roofline import Sizes, parameters
    from workload_cases import cases_of
    from workloads import WORKLOADS

    for workload in WORKLOADS.values():
        labels = {case.op: case.label for case in cases_of(workload)}  # of several cases of an op the last
        assert all(label.startswith(f"{workload.name}: ") for label in labels.values())
        embedding = 32 if workload.tasks > 1 else 0
        inputs = -(-(workload.observation + workload.action + embedding) // 8) * 8
        assert f"N=2 I={inputs} H={workload.width} depth=2 K=104" in labels["bronet"]
        assert f"O={workload.observation} A={workload.action} D={embedding} " in labels["pack_inputs"]
        shape = workload.width, 256, workload.observation, workload.action, workload.tasks
        assert f"P={parameters(Sizes(workload.batch, *shape))[1]} " in labels["adamw_"]
        assert f"H={workload.width} " in labels["bias_layer_norm"]


@pytest.mark.parametrize("name", ["dmc-single", "dogs-multitask"])
def test_every_case_of_a_workload_is_computed_by_its_twin(name: str) -> None:
    from workload_cases import cases_of
    from workloads import named

    for case in cases_of(named(name)._replace(width=16)):
        torch.manual_seed(0)
        found = case.prepare(torch.device("cpu"), 4, "reference")()
        tensors = list(found) if isinstance(found, list | tuple) else [found]
        assert all(torch.isfinite(x.float()).all() for x in tensors if isinstance(x, torch.Tensor)), case
        assert case.bytes(8) >= case.bytes(4) > 0


def test_what_packing_and_the_optimizer_move_is_what_they_read_and_write() -> None:
    from roofline import Sizes, passes
    from workload_cases import cases_of
    from workloads import named

    workload = named("dogs-multitask")
    cases = {case.op: case for case in cases_of(workload)}
    counted = {work.name: work.bytes for work in passes(Sizes(1024, 4096, 256, 223, 38, 4), 2)}
    table = 4 * 4 * 32  # which the roofline counts too
    assert cases["pack_inputs"].bytes(1024) == counted["pack critic"] - table
    assert cases["adamw_"].bytes(1024) == counted["critic AdamW, target and copies"]


def test_kernels_of_workloads_are_timed_at_their_batch_sizes_without_targets(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, asked = bench("kernels"), {}
    monkeypatch.setattr(kernels, "run", lambda device, seconds, **options: asked.update(options) or DONE)
    words = ["--dry", "--workload", "dmc-single", "dogs-multitask", "--ops", "adamw_"]
    assert kernels.main(words) == 0
    sizes = {case.label.partition(":")[0]: asked["batches"](case) for case in asked["cases"]}
    assert sizes == {"dmc-single": [256], "dogs-multitask": [1024]}
    assert {case.op for case in asked["cases"]} == {"adamw_"}


DONE = {"aborted": None}


# ---------------------------------------------------------------- environments and training


def test_a_suite_of_several_tasks_is_stepped_by_ours_alone(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    envs = bench("envs")
    suite = ["gym/Pendulum-v1", "gym/MountainCarContinuous-v0"]
    monkeypatch.setattr(envs, "expand", lambda name: suite)
    monkeypatch.setattr(envs, "make", lambda name, *rest, **named: make(suite, *rest, **named))
    rows = envs.run(["dmc/dogs"], [], 0.0)
    assert (rows[0]["num_envs"], rows[0]["steps_per_second"].keys()) == (2 * envs.SEVERAL, {"ours"})
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"library: {envs.ALONE}")
    ours, library = envs.collected(rows)["measurements"]
    assert ours["value"] > 0
    assert (library["provider"], library["value"], library["missing"]) == ("library", None, envs.ALONE)
    from report_tables import envs as table

    assert table({"rows": rows}).splitlines()[-1].endswith("| – | – |")


def test_the_tasks_of_a_workload_without_its_simulator_are_missing_in_one_line(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = bench("envs")
    for module in ("envpool", "dm_control", "shimmy"):
        monkeypatch.setitem(sys.modules, module, None)
    rows = envs.run(["dmc/dogs", "metaworld/mt50"], [], 0.0)
    assert ["pip install" in row["missing"] and "\n" not in row["missing"] for row in rows] == [True, True]
    assert len(envs.collected(rows)["measurements"]) == 4


def test_training_on_a_workload_has_its_tasks_and_on_a_gpu_its_sizes(bench: Callable[[str], Any]) -> None:
    train = bench("train")
    from workloads import named

    small, large = (train.on_workload(named("dogs-multitask"), device) for device in ("cpu", "cuda"))
    assert small.tasks == large.tasks == expand("dmc/dogs")
    assert (large.critic.width, large.batch_size) == (4096, 1024)
    assert small.critic.width < 4096
    assert train.differences(small, "cpu") == []


def test_training_on_a_workload_measures_rates_alone_unless_a_return_is_asked_for(
    bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, asked = bench("train"), []
    monkeypatch.setattr(train, "run", lambda *words: asked.append(words) or {"equality": "passed"})
    words = ["--device", "cpu", "--workload", "dmc-single"]
    assert train.main(words) == 0
    assert train.main([*words, "--threshold", "7"]) == 0
    assert [(task, threshold) for task, threshold, *_ in asked] == [("dmc-single", None), ("dmc-single", 7.0)]
    assert train.measurements("dmc-single", None, [], []) != []
    assert not any("return" in one["case"] for one in train.measurements("dmc-single", None, [], []))
    assert train.main([*words, "--task", "gym/Pendulum-v1"]) == 2
    assert capsys.readouterr().err.endswith("both say what to train on; give one of them\n")
    assert train.main([*words, "--picture", "none.png"]) == 2
    assert capsys.readouterr().err.endswith("none are evaluated without --threshold; give it\n")


# ---------------------------------------------------------------- make bench


def test_make_bench_knows_its_workloads_and_its_budgets_leave_room_in_a_quarter_of_an_hour() -> None:
    from workloads import WORKLOADS

    text = (ROOT / "Makefile").read_text()
    shapes = re.search(r"^SHAPES := (.*)$", text, re.MULTILINE)
    assert shapes is not None
    assert set(shapes[1].split()) <= WORKLOADS.keys()
    recipe = text.partition("\nbench: $(VENV)")[2].partition("\n\n")[0]
    budgets = [int(seconds) for seconds in re.findall(r"--budget (\d+)", recipe)]
    assert len(budgets) == recipe.count("bench/bench_")
    assert sum(budgets) <= 800  # of 900: starts and what compiles come on top
