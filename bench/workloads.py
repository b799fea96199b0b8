"""The shapes that every benchmark is named after: what the paper's suites, and ours, ask of an agent.

Widths of observations and actions are those of the widest task of a suite, as the agent pads them.
"""

from __future__ import annotations

from typing import NamedTuple


class Workload(NamedTuple):
    """One agent on one suite. O, A, T, B, H as everywhere."""

    name: str
    what: str
    observation: int  # O
    action: int  # A
    tasks: int = 1  # T; from 2 on, the critic has task embeddings
    batch: int = 256  # B, as published: 1024 with several tasks
    width: int = 512  # H of the critic; the actor's is 256
    suite: str = ""  # for brc_fast.envs.make


HANDS = "humanoidbench/h1hand"  # brc_fast.envs lists 20 of the 28
CARTPOLE = Workload("cartpole", "mjx/CartpoleSwingup, which the demo learns", 5, 1)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("dmc-single", "one humanoid of dm_control", 67, 21, suite="mjx/HumanoidRun"),
        Workload(
            "dogs-multitask", "the four dogs of dm_control in one agent", 223, 38, 4, 1024, 4096, "dmc/dogs"
        ),
        Workload("humanoidbench-28", "28 tasks of H1 with hands", 151, 61, 28, 1024, 4096, HANDS),
        Workload("metaworld-50", "all of MetaWorld", 39, 4, 50, 1024, 4096, "metaworld/mt50"),
        Workload("mjx-dmc25", "all of Playground's dm_control tasks", 67, 21, 25, 1024, 1024, "mjx/dmc25"),
        Workload("wide-1b", "the four dogs with a billion parameters", 223, 38, 4, 1024, 11200, "dmc/dogs"),
    )
}
