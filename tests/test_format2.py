"""A small run of an older version, committed as it wrote it, goes on with this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from extras import require
from safetensors.torch import load_file

from brc_fast import BRC, Batch, InputError, Noise
from brc_fast.command import main as cli
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.evaluate import restore
from brc_fast.spec import Spec

OLD = Path(__file__).parent / "data" / "format2"


def restored() -> BRC:
    folder = RunFolder(OLD)
    _, parts = folder.load("agent")
    config = folder.config()
    agent = BRC.from_config(config, Spec.vectors(3, 1, config.tasks), "cpu")
    agent.load_state_dict({name: torch.from_numpy(value) for name, value in parts["agent"].items()})
    return agent


def test_its_agent_goes_on_as_the_older_version_did() -> None:
    """Parameters after three more updates; moments and step counts decide them."""
    agent, rng = restored(), torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(3, 32, *shape, generator=rng)

    fields = normal(3), normal(1).tanh(), normal(), torch.ones(3, 32), normal(3)
    batches = Batch(*fields, torch.randint(2, (3, 32), generator=rng))
    agent.update(batches, Noise(normal(1), normal(1)))
    state, after = agent.state_dict(), load_file(OLD / "after.safetensors")
    assert len(after) > 40
    for name, expected in after.items():
        assert (state[name] - expected).abs().max() < 5e-6, name


def test_its_state_is_written_by_name_and_read_again() -> None:
    agent = restored()
    state = {name: value.clone() for name, value in agent.state_dict().items()}
    assert "critic_optimizer/exp_avg_sq/body.blocks.1.0.norm_weight" in state
    assert "critic_optimizer/exp_avg/embedding" in state
    assert "critic_optimizer/exp_avg" not in state
    other = restored()
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_its_run_is_evaluated_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("gymnasium", "tyro")
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"steps": 300}))
    assert cli.main(["evaluate", str(run), "--episodes", "1"]) == 0
    assert cli.main(["train", "--resume", str(run)]) == 0
    manifest = json.loads((run / "checkpoints" / "000000000300" / "manifest.json").read_text())
    assert manifest["format"] == 3


def test_a_vector_of_moments_of_another_length_is_refused() -> None:
    _, parts = RunFolder(OLD).load("agent")
    state = {name: torch.from_numpy(value) for name, value in parts["agent"].items()}
    state["critic_optimizer/exp_avg"] = state["critic_optimizer/exp_avg"][:-1]
    agent = restored()
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    with pytest.raises(ValueError, match=r"unknown entry critic_optimizer/exp_avg$"):
        agent.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())


def test_a_checkpoint_of_another_body_is_refused_in_one_line(tmp_path: Path) -> None:
    require("gymnasium")
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    config = json.loads((run / "config.json").read_text())
    config["critic"]["body"] = "simba"
    (run / "config.json").write_text(json.dumps(config))
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"does not fit this run: agent state .*body"):
        restore(RunFolder(run), "cpu")
    assert files == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
