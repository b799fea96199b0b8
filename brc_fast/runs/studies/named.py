"""The paper's claims as studies, at three scales: two CPU cores, one GPU, and the published sizes.

The paper's code for them is not public: what a variant stands for is our reading, see docs/studies.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from brc_fast.config import flat, preset, require_known
from brc_fast.envs import expand, list_tasks

from .study import Drawing, Group, Settings, Study, Variant, metric_of

RATE = "learning.learning_rate"
SPREADS = ("analysis/spread_td_error", "analysis/spread_gradient_norm", "analysis/spread_entropy")
SIMILARITY = ("analysis/gradient_similarity",)


class Scale(NamedTuple):
    """Sizes that all variants of a study share. `several` and `one` are batches of an agent with several
    tasks and with one, in the published ratio of four to one."""

    steps: int  # environment steps per task
    several: int
    one: int
    settings: Settings
    widths: tuple[int, int, int]  # of the critics whose size is varied
    benchmark: str  # tasks of `metaworld`
    suite: str  # tasks of the others
    machine: str


COMMON: Settings = {"num_envs": 1, "updates_per_step": 2}
PUBLISHED: Settings = {**COMMON, "random_steps": 5_000, "actor.width": 256, RATE: 3e-4}
SCALES = {
    "tiny": Scale(
        30_000,
        256,
        64,
        # 60,000 updates of a small network want a higher rate than two million of a large one
        {
            **COMMON,
            "random_steps": 1_000,
            "eval_sampled": False,
            "critic.width": 128,
            "actor.width": 128,
            RATE: 1e-3,
        },
        (32, 64, 128),
        "metaworld/mt10",
        "metaworld/study8",
        "two CPU cores",
    ),
    "small": Scale(
        100_000,
        1024,
        256,
        {**PUBLISHED, "critic.width": 1024},
        (256, 1024, 2048),
        "metaworld/mt10",
        "metaworld/mt10",
        "one GPU",
    ),
    "full": Scale(
        500_000,
        1024,
        256,
        {**PUBLISHED, "critic.width": 4096},
        (512, 2048, 4096),
        "metaworld/mt50",
        "metaworld/mt50",
        "GPUs",
    ),
}
NAIVE: Settings = {
    "critic.body": "mlp",
    "critic.loss": "mse",
    "critic.reduction": "min",
    "critic.conditioning": "one_hot",
    "actor.body": "mlp",
    "actor.depth": 2,
    "reward_scale": False,
}


def headline(scale: Scale) -> dict[str, Variant]:
    return {
        "naive": Variant({"batch_size": scale.several, **NAIVE}),
        "single": Variant({"batch_size": scale.one}, alone=True),
        "multi": Variant({"batch_size": scale.several}),
    }


def loss(scale: Scale) -> dict[str, Variant]:
    batch = {"batch_size": scale.several}
    return {
        "mse": Variant({**batch, "critic.loss": "mse", "reward_scale": False}),
        "mse-scaled": Variant({**batch, "critic.loss": "mse"}),
        "categorical": Variant(batch),
    }


def scaling(scale: Scale) -> dict[str, Variant]:
    bodies: dict[str, Settings] = {
        "mlp-mse": {"critic.body": "mlp", "critic.loss": "mse"},
        "simba-mse": {"critic.body": "simba", "critic.loss": "mse"},
        "bronet-mse": {"critic.loss": "mse"},
        "bronet-categorical": {},
    }
    out = {}
    for kind, batch in (("multi", scale.several), ("single", scale.one)):
        for body, settings in bodies.items():
            for width in scale.widths:
                sizes = {"critic.width": width, "batch_size": batch}
                out[f"{kind}-{body}-{width}"] = Variant({**settings, **sizes}, alone=kind == "single")
    return out


def conditioning(scale: Scale) -> dict[str, Variant]:
    batch = {"batch_size": scale.several}
    return {
        "single": Variant({"batch_size": scale.one}, alone=True),
        "heads": Variant({**batch, "critic.conditioning": "heads"}),
        "embedding": Variant(batch),
    }


def transfer(scale: Scale) -> dict[str, Variant]:
    batch = {"batch_size": scale.several}
    held_out = list_tasks("metaworld/held-out4")
    learned = tuple(task for task in expand(scale.suite) if task not in held_out)
    return {
        "pretrain": Variant(batch, tasks=learned),
        "scratch": Variant(batch),
        "mean": Variant({**batch, "transfer.start": "mean"}, source="pretrain"),
        "nearest": Variant({**batch, "transfer.start": "nearest"}, source="pretrain"),
    }


def metaworld(scale: Scale) -> dict[str, Variant]:
    return {
        "multi": Variant({"batch_size": scale.several}),
        "single": Variant({"batch_size": scale.one}, alone=True),
    }


class Claim(NamedTuple):
    """A study at any scale."""

    figure: str  # of the paper
    about: str
    variants: Callable[[Scale], dict[str, Variant]]
    hours: float  # of two CPU cores, at the scale tiny
    signals: tuple[str, ...] = ()
    drawing: Drawing = "curves"


STUDIES = {
    "headline": Claim("1", "naive multi-task SAC, and BRC with one task and with several", headline, 0.9),
    "transfer": Claim("2", "new tasks from a trained agent and from scratch", transfer, 0.8, (), "starts"),
    "loss": Claim("3", "MSE, MSE with a return scale, and cross-entropy", loss, 0.7, SPREADS),
    "scaling": Claim("4", "score against the critic's parameters, four critics", scaling, 3.0, (), "sizes"),
    "conditioning": Claim("5", "single-task, heads and embedding", conditioning, 1.1, SIMILARITY),
    "metaworld": Claim("table", "MetaWorld at the published curves' steps", metaworld, 3.5),
    "defaults": Claim("-", "settings of a CPU that differ in one", lambda _: dict(DEFAULTS), 1.9),
}
# Of the eight tasks the four that take longest: where there is room for a difference.
SLOWER = ("window-open", "window-close", "button-press-topdown", "plate-slide")


def named(name: str, scale: str = "tiny", steps: int | None = None, tasks: Sequence[str] = ()) -> Study:
    """A study of this package; InputError, with the names there are, for another one.

    steps, tasks: per task, and of all variants, in place of the study's.
    """
    require_known("study", name, STUDIES)
    require_known("scale", scale, SCALES)
    if name == "defaults":
        return defaults(scale, steps, tasks)
    claim, sizes = STUDIES[name], SCALES[scale]
    chosen: tuple[str, ...] = (sizes.benchmark if name == "metaworld" else sizes.suite,)
    settings, taken, evaluations = dict(sizes.settings), sizes.steps, 12
    if name == "transfer":
        chosen = ("metaworld/held-out4",)
    if scale == "tiny" and name == "scaling":
        chosen, taken = tuple(f"metaworld/{each}-v3" for each in SLOWER), 20_000
    if scale == "tiny" and name == "metaworld":
        settings["critic.width"], settings["actor.width"], taken, evaluations = 256, 256, 50_000, 10
    if scale != "tiny":
        evaluations = sizes.steps // 25_000 if scale == "full" else 20
    variants = claim.variants(sizes)
    if tasks and name == "transfer":
        # what is learned before is none of the new tasks
        learned = tuple(task for task in variants["pretrain"].tasks or () if task not in expand(tasks))
        variants["pretrain"] = dataclasses.replace(variants["pretrain"], tasks=learned)
    if claim.signals:
        settings["analysis_every"] = max(1, (steps or taken) // evaluations)
    group = Group(tuple(tasks) or chosen, steps or taken)
    return Study(
        f"{name}-{scale}",
        claim.about,
        {"": group},
        variants,
        settings,
        metric=metric_of(group.tasks),
        # the published table is of means
        statistic="mean" if name == "metaworld" else "iqm",
        evaluations=evaluations,
        drawing=claim.drawing,
        signals=claim.signals,
    )


FOUR = ("reach-v3", "drawer-close-v3", "button-press-topdown-v3", "window-open-v3")
DEFAULT_TASKS = {
    "swingup": Group(("mjx/CartpoleSwingup",), 200_000),
    "cheetah": Group(("gym/HalfCheetah-v5",), 300_000),
    "hopper": Group(("gym/Hopper-v5",), 300_000),
    "reach": Group(("metaworld/reach-v3",), 100_000),
    "four": Group(tuple(f"metaworld/{name}" for name in FOUR), 100_000),
}
# Each differs from the settings that a CPU has by default in one; those that cost more per environment step
# take fewer of them, so that all cost about the same.
DEFAULTS: dict[str, Variant] = {
    "lr-3e-4": Variant({RATE: 3e-4}),
    "lr-6e-4": Variant({RATE: 6e-4}),
    "lr-1e-3": Variant({RATE: 1e-3}),
    "lr-2e-3": Variant({RATE: 2e-3}),
    "updates-2": Variant({RATE: 1e-3, "updates_per_step": 2}, share=0.55),
    "batch-256": Variant({RATE: 1e-3, "batch_size": 256}, share=0.55),
    "width-256": Variant({RATE: 1e-3, "critic.width": 256}, share=0.35),
    "entropy-1": Variant({RATE: 1e-3, "learning.target_entropy_per_action": -1.0}),
}


def defaults(scale: str, steps: int | None, tasks: Sequence[str]) -> Study:
    """Which settings learn best on a CPU; there is one scale of it, tiny."""
    require_known("scale of defaults", scale, ("tiny",))
    groups = {name: group for name, group in DEFAULT_TASKS.items() if not tasks or name in tasks}
    for name in tasks:
        require_known("task of defaults", name, DEFAULT_TASKS)
    groups = {name: dataclasses.replace(group, steps=steps or group.steps) for name, group in groups.items()}
    settings: dict[str, Any] = {"eval_sampled": False}
    about = STUDIES["defaults"].about
    return Study("defaults-tiny", about, groups, DEFAULTS, settings, last=3)


def table() -> str:
    """A line for each study: the figure it is for, what it costs with three seeds, and what it compares."""
    rows = [["study", "figure", f"tiny, {SCALES['tiny'].machine}", "small, a GPU", "full, GPUs", "compares"]]
    for name, claim in STUDIES.items():
        scales = list(SCALES)[: 1 if name == "defaults" else None]
        costs = [_cost(named(name, scale), scale) for scale in scales]
        costs[0] = f"{costs[0].partition(',')[0]}, {claim.hours:g} h"
        rows.append([name, claim.figure, *costs, *["-"] * (len(SCALES) - len(costs)), claim.about])
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def _cost(study: Study, scale: str) -> str:
    """Runs of three seeds, and their updates."""
    runs, config = study.runs(3), flat(preset("cpu" if scale == "tiny" else "cuda"))
    updates = 0
    for run in runs:
        settings = config | dict(run.settings)
        updates += run.steps // settings["num_envs"] * settings["updates_per_step"]
    return f"{len(runs)} runs, {updates / 1e6:,.0f} M updates"
