"""Replay buffers: each observation once, exact successors, the same batches from host and device memory."""

from .buffer import ReplayBuffer
from .device import DeviceReplayBuffer
from .fields import Field
from .prefetch import Prefetcher

__all__ = ["DeviceReplayBuffer", "Field", "Prefetcher", "ReplayBuffer"]
