"""Replay buffers: each observation once, exact successors, the same batches from host and device memory."""

from brc_fast.spec import Field

from .buffer import ReplayBuffer
from .datasets import load_dataset
from .device import DeviceReplayBuffer
from .prefetch import Prefetcher

__all__ = ["DeviceReplayBuffer", "Field", "Prefetcher", "ReplayBuffer", "load_dataset"]
