"""Replay buffers: transitions in host memory, each observation once, with exact successors."""

from .buffer import ReplayBuffer
from .fields import Field
from .prefetch import Prefetcher

__all__ = ["Field", "Prefetcher", "ReplayBuffer"]
