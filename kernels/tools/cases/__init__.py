"""Workloads of the ops: what is compiled ahead of time, tuned and timed, one file per family of ops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from . import (
    categorical,
    cross_entropy,
    gather,
    inputs,
    network,
    norm,
    optimizer,
    policy,
    projection,
    summary,
)
from .case import Case

__all__ = ["FAMILIES", "Case", "cases"]

FAMILIES = {
    "categorical": categorical.cases,
    "cross_entropy": cross_entropy.cases,
    "projection": projection.cases,
    "inputs": inputs.cases,
    "norm": norm.cases,
    "optimizer": optimizer.cases,
    "policy": policy.cases,
    "summary": summary.cases,
    "gather": gather.cases,
    "network": network.cases,
}


def cases(ops: Iterable[str] | None = None) -> Iterator[Case]:
    """Every case of every family, or those of these ops."""
    wanted = None if ops is None else set(ops)
    for family in FAMILIES.values():
        for case in family():
            if wanted is None or case.op in wanted:
                yield case
