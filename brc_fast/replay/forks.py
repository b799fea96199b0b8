"""What becomes of buffers in a forked process, such as a worker of torch's DataLoader."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """Something with locks that other threads may hold when this one forks."""

    def before_fork(self) -> None:
        """Take the locks, lest they are held by a thread that the child does not have."""

    def after_fork(self, child: int | None) -> None:
        """Free them again: in the parent where `child` is None, else in its child of this number."""


_alive: weakref.WeakSet[Forked] = weakref.WeakSet()
_held: list[Forked] = []
_children = 0


def register(thing: Forked) -> None:
    """Let its methods be called at every fork from now on, as long as it lives."""
    _alive.add(thing)


def _before() -> None:
    global _children
    _children += 1
    _held.extend(_alive)
    for thing in _held:
        thing.before_fork()


def _after(child: int | None) -> None:
    for thing in _held:
        thing.after_fork(child)
    _held.clear()


os.register_at_fork(
    before=_before, after_in_parent=lambda: _after(None), after_in_child=lambda: _after(_children)
)
