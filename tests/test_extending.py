"""The snippets of docs/extending.md, run one after the other, do what they say."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from extras import require

from brc_fast import config
from brc_fast.nn import bodies, losses

TEXT = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()


def test_a_body_a_loss_an_environment_and_an_agent_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("gymnasium", "tensorboard", "matplotlib")
    monkeypatch.chdir(tmp_path)
    for names in ("BODIES", "LOSSES"):  # so that what is added goes again
        monkeypatch.setattr(config, names, list(getattr(config, names)))
    monkeypatch.setattr(bodies, "BODIES", dict(bodies.BODIES))
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    body, loss, environment, training, agent = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names: dict[str, object] = {}
    exec(body, names)
    two_roads = names["agent"]
    assert "body.left.norm_weight" in dict(two_roads.critic.named_parameters())  # type: ignore[attr-defined]
    exec(loss, names)
    assert names["agent"].critic_config.loss == "huber"  # type: ignore[attr-defined]
    exec(environment, names)
    exec(training, names)
    trainer = names["trainer"]
    assert trainer.updates > 100  # type: ignore[attr-defined]
    assert (tmp_path / "runs" / "reach" / "checkpoints" / "000000000800" / "manifest.json").exists()
    exec(agent, names)
    assert names["last"] < 0.05 * names["first"]  # type: ignore[operator]
    cloning, observations = names["cloning"], torch.randn(256, 3)
    twin = copy.deepcopy(cloning)
    given = observations, observations[:, :2].sin()
    assert torch.equal(cloning.update(*given)["loss"], twin.update(*given)["loss"])  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="fixed"):
        cloning.sizes = 1, 1  # type: ignore[attr-defined]
