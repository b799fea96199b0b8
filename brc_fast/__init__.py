"""BRC (Bigger, Regularized, Categorical) value learning, made fast. arXiv 2505.23150.

Importing this package loads torch, but neither JAX nor Triton: `brc_fast.envs` brings those when asked.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .agents.brc import BRC, Noise
from .agents.normalizer import RewardNormalizer
from .batch import Batch
from .config import ActorConfig, CriticConfig, EnvConfig, LearningConfig, TrainConfig
from .errors import InputError, MissingExtraError
from .nn.modules import BroNet, Critic
from .replay import DeviceReplayBuffer, Field, ReplayBuffer

if TYPE_CHECKING:
    from .deploy.policy import Policy

try:
    __version__ = version("brc-fast")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "BRC",
    "ActorConfig",
    "Batch",
    "BroNet",
    "Critic",
    "CriticConfig",
    "DeviceReplayBuffer",
    "EnvConfig",
    "Field",
    "InputError",
    "LearningConfig",
    "MissingExtraError",
    "Noise",
    "Policy",
    "ReplayBuffer",
    "RewardNormalizer",
    "TrainConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Policy, which brings huggingface_hub where that is installed, when it is asked for."""
    if name == "Policy":
        from .deploy.policy import Policy

        return Policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
