"""The recipes of docs/replay.md do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import require

TEXT = (Path(__file__).parent.parent / "docs" / "replay.md").read_text()
RECIPES = {
    part.partition("\n")[0]: code
    for part in re.split(r"^### ", TEXT, flags=re.M)[1:]
    for code in re.findall(r"```python\n(.*?)```", part, re.S)
}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each recipe leaves, one run after the other."""
    require("gym")
    left: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("recipes"))
        for title, code in RECIPES.items():
            exec(compile(code, title, "exec"), shared)
            left[title] = dict(shared)
    return left


def test_every_recipe_is_run(names: dict[str, dict[str, Any]]) -> None:
    assert len(RECIPES) == len(re.findall(r"^```python$", TEXT, re.M)) - 1  # the first is of test_readme.py
    assert names.keys() == RECIPES.keys()


def test_loops_of_gymnasium_store_where_their_actions_led(names: dict[str, dict[str, Any]]) -> None:
    titles = {1: "One environment of Gymnasium", 4: "A vector of environments, as in CleanRL or SB3"}
    for envs, title in titles.items():
        replay = names[title]["replay"]
        rows = replay.all()
        assert len(replay) == {1: 500, 4: 1000}[envs]
        assert replay.jumps == 0
        assert rows.truncated.sum() == len(replay) // envs // 200 * envs
        turn = torch.atan2(rows.observations[:, 1], rows.observations[:, 0])
        after = torch.atan2(rows.next_observations[:, 1], rows.next_observations[:, 0])
        moved = torch.remainder(after - turn + torch.pi, 2 * torch.pi) - torch.pi
        torch.testing.assert_close(moved, rows.next_observations[:, 2] * 0.05, atol=1e-4, rtol=0)


def test_collected_rows_and_data_sets_come_in_order(names: dict[str, dict[str, Any]]) -> None:
    left = names["Whole trajectories, as from a collector of TorchRL"]
    ends, everything = left["collected"]["ends"], left["everything"]
    assert len(left["replay"]) == 800 - int((~ends[:, -1]).sum())
    assert torch.equal(everything.terminated, torch.cat([x if x[-1] else x[:-1] for x in ends]))
    assert torch.equal(left["again"].observations, everything.observations[:10])
    left = names["Offline data"]
    terminal, cut = (torch.from_numpy(left["dataset"][name]) for name in ("terminals", "timeouts"))
    assert left["loaded"] == len(left["replay"]) == 5000 - int((cut & ~terminal).sum())


def test_observations_stacks_and_sequences_have_the_shapes_that_the_recipes_name(
    names: dict[str, dict[str, Any]],
) -> None:
    left = names["What the policy sees and what only the critic sees"]
    assert (left["policy"].shape, left["critic"].shape) == ((32, 48), (32, 123))
    assert names["Stacks of images"]["stacks"].shape == (32, 4, 84, 84)
    left = names["Sequences for recurrent agents"]
    starts = left["batch"].extras["starts"]
    assert starts.shape == (16, 20)
    assert 0 < starts.sum() <= 16 * 2
    assert left["replay"].jumps == 0
    assert left["memory"].shape == (16, 8)


def test_a_loader_gives_all_and_a_save_goes_to_other_tasks(
    names: dict[str, dict[str, Any]],
) -> None:
    assert names["DataLoader and forks"]["seen"] == 400
    left = names["Saving, and going on with other environments or tasks"]
    assert torch.equal(left["resumed"].sample(8).observations, left["replay"].sample(8).observations)
    assert left["wider"].size_per_task.tolist() == [0, 400]
