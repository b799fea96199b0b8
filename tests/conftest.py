"""A small environment for tests of the loop: no JAX, no compilation, and it breaks when told to."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from brc_fast.envs.base import Step
from brc_fast.spec import Spec

EVALUATION_SLOTS = 2
sys.path.append(str(Path(__file__).parent))  # for replay_oracle, which several tests share
from extras import NEEDS, lacking, require

if os.environ.get("TRITON_INTERPRET") == "1" and not lacking("triton"):
    import quick_interpreter

    quick_interpreter.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "write there, a line each, what was skipped for want of an extra; `pytest @FILE` runs it"
    parser.addoption("--absent", metavar="FILE", type=Path, help=told)


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--absent")
    if path is not None and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to the first
        config.pluginmanager.register(Absent(config.rootpath / path))


class Absent:
    """Node ids of tests, and of files, that were skipped by `needs` or `require` of extras.py."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._add(report)

    def _add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if report.skipped and reason.startswith(NEEDS) and "pip install" in reason:
            self.names[report.nodeid] = None

    def pytest_sessionfinish(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(f"{name}\n" for name in self.names))


# The files that take longest begin first, so that of several processes none ends with one of them alone.
LONGEST = ("test_interpreted.py", "test_envs_programs.py", "test_bench_update.py", "test_envs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


class ToyEnv:
    """A point per slot that the action pushes; the reward is nearness to the origin. Episodes last 20 steps.

    `poison` maps a step number to the field that returns NaN in slot 1: "rewards" or "successors", or
    "dropped" for a slot that the environment itself reports as lost.
    """

    max_episode_steps = 20
    successes = None
    task_spec = Spec.vectors(3, 1, ("toy/One",))

    def __init__(self, tasks: Sequence[str], num_envs: int, poison: dict[int, str]) -> None:
        self.task_names = tuple(tasks)
        self.task_spec = dataclasses.replace(self.task_spec, tasks=self.task_names)
        self.num_envs = num_envs * len(tasks)
        self.task_ids = np.repeat(np.arange(len(tasks)), num_envs)
        self.continues = np.ones(self.num_envs, bool)
        self.poison = poison
        self.total = 0
        self.lost = np.zeros(len(tasks), np.int64)
        self.rng = np.random.default_rng(0)
        self.state = np.zeros((self.num_envs, 3), np.float32)

    @property
    def nan_count(self) -> np.ndarray:
        return self.lost

    def _start(self, number: int) -> np.ndarray:
        start = self.rng.uniform(-1, 1, (number, 3)).astype(np.float32)
        start[:, 2] = 0.0  # steps taken, as a share of the episode
        return start

    def reset_tensors(self, seed: int | None) -> Tensor:
        self.rng = np.random.default_rng(seed)
        self.state = self._start(self.num_envs)
        return torch.from_numpy(self.state.copy())

    def step_tensors(self, actions: Tensor) -> Step:
        self.total += 1
        push = actions.numpy()[:, 0]
        self.state[:, 1] = 0.9 * self.state[:, 1] + 0.1 * push
        self.state[:, 0] += 0.1 * self.state[:, 1]
        self.state[:, 2] += 1.0 / self.max_episode_steps
        successors = self.state.copy()
        rewards = np.exp(-np.abs(successors[:, 0])) * (1.0 + self.task_ids)
        ended = successors[:, 2] > 1.0 - 1e-4
        dropped = np.zeros(self.num_envs, bool)
        broken = self.poison.get(self.total)
        if broken == "dropped":
            dropped[1] = ended[1] = True
            rewards[1] = 0.0
            self.lost[self.task_ids[1]] += 1
        if ended.any():
            self.state[ended] = self._start(int(ended.sum()))
        step = Step(
            torch.from_numpy(self.state.copy()),
            torch.from_numpy(successors),
            torch.from_numpy(rewards.astype(np.float32)),
            torch.zeros(self.num_envs, dtype=torch.bool),
            torch.from_numpy(ended),
            torch.from_numpy(dropped),
        )
        if broken in ("rewards", "successors"):
            getattr(step, broken)[1] = float("nan")
        return step

    def state_dict(self) -> dict[str, Any]:
        words = self.rng.bit_generator.state["state"]
        numbers = [
            words["state"] >> 64,
            words["state"] & (2**64 - 1),
            words["inc"] >> 64,
            words["inc"] & (2**64 - 1),
        ]
        return {
            "rng": np.array(numbers, np.uint64),
            "state": self.state,
            "lost": self.lost,
            "total": np.array(self.total),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        wanted = {name: (x.shape, x.dtype) for name, x in self.state_dict().items()}
        if {name: (x.shape, x.dtype) for name, x in state.items()} != wanted:
            raise ValueError(f"the state must hold {wanted}")
        high, low, inc_high, inc_low = (int(word) for word in state["rng"])
        words = self.rng.bit_generator.state
        words["state"] = {"state": high << 64 | low, "inc": inc_high << 64 | inc_low}
        self.rng.bit_generator.state = words
        self.state, self.lost, self.total = state["state"].copy(), state["lost"].copy(), int(state["total"])
        return torch.from_numpy(self.state.copy())

    def close(self) -> None:
        pass


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Replaces the environments; the dictionary given to the test is the training environments' `poison`."""
    require("train")
    poison: dict[int, str] = {}

    def make(tasks: Sequence[str], num_envs: int, seed: int = 0, **settings: Any) -> ToyEnv:
        return ToyEnv(tasks, num_envs, {} if num_envs == EVALUATION_SLOTS else poison)

    monkeypatch.setattr("brc_fast.envs.make", make)
    monkeypatch.setattr("brc_fast.command.arguments.expand", tuple)
    return poison


@pytest.fixture
def gpu() -> str:
    """A CUDA device, or the CPU where BRC_FAST_GPU_DRY=1 sends the tests of a GPU to it."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("BRC_FAST_GPU_DRY") == "1":
        return "cpu"
    pytest.skip("torch sees no CUDA device (BRC_FAST_GPU_DRY=1 runs this on the CPU)")


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where kernels run: on CUDA, or on the CPU through Triton's interpreter with an honest bfloat16.

    Memory that nothing wrote is NaN.
    """
    if torch.cuda.is_available():
        device = "cuda"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        import honest_bfloat16

        honest_bfloat16.install(monkeypatch)
        device = "cpu"
    else:
        pytest.skip("torch sees no CUDA device (TRITON_INTERPRET=1 runs this on the CPU)")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield device
    torch.use_deterministic_algorithms(False)
