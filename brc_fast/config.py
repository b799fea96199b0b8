"""Every setting, with its unit, its source and the rule it must meet.

"BRC" in a comment means the value of the authors' published code (arXiv 2505.23150). Presets are
functions that return a configuration; there is nothing to subclass.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from difflib import SequenceMatcher
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import InputError

Precision = Literal["fp32", "tf32", "bf16"]
Reduction = Literal["mean", "min", "own"]
LARGEST = 2**20  # size of a network, or number of environments or updates; beyond, bytes would overflow
MOST_NETWORKS = 1_000  # of an ensemble, and blocks of a network: each is an object of its own
BODIES = ["bronet", "simba", "mlp"]  # names of bodies; nn.bodies has the networks
LOSSES = ["categorical", "mse"]  # of critics' losses: nn.losses
CONDITIONINGS = ["embedding", "heads", "one_hot", "none"]  # of ways to tell tasks apart: nn.conditioning
MOST_KWARGS = 10_000  # characters
_MAKES = "it is an argument of gymnasium.make, not of the environment"
RESERVED = {  # keyword arguments of environments that are not theirs
    **dict.fromkeys(("id", "disable_env_checker", "vectorization_mode", "vector_kwargs", "wrappers"), _MAKES),
    "max_episode_steps": "give episode_length (--env.episode-length) instead",
    "num_envs": "give num_envs (--num-envs) instead",
    "render_mode": "brc-fast video chooses it",
}
LONGEST_EPISODE = 1_000_000  # environment steps; an evaluation waits for ten such episodes


def _require(config: object, rule: str, holds: bool, name: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {rule}, got {getattr(config, name)}")


def _positive(config: object, *names: str) -> None:
    for name in names:
        _require(config, "positive", getattr(config, name) > 0, name)


def _limited(config: object, most: float, *names: str) -> None:
    for name in names:
        _require(
            config,
            f"at most {most:g}" if isinstance(most, float) else f"at most {most}",
            getattr(config, name) <= most,
            name,
        )


def _finite(config: object, *names: str) -> None:
    for name in names:
        _require(config, "finite in float32", abs(getattr(config, name)) < 3.4e38, name)


def require_known(name: str, value: str, known: Iterable[str]) -> None:
    """InputError, with what there is, nearest first, for a name that is not known."""
    if value not in known:
        nearest = sorted(known, key=lambda each: -SequenceMatcher(None, str(value), each).ratio())
        raise InputError(f"{name} must be one of {', '.join(nearest)}, got {value!r}")


def _only_with(config: object, option: str, value: str, *names: str) -> None:
    """InputError for a setting, other than by default, that another setting leaves without a meaning."""
    for field in fields(config):  # type: ignore[arg-type]
        if field.name in names and getattr(config, field.name) != field.default:
            now = getattr(config, option)
            raise InputError(f"{field.name} is a setting of {option} {value} alone, and {option} is {now}")


@dataclass(frozen=True)
class CriticConfig:
    """Ensemble of networks that predict the return, or its distribution."""

    width: int = 4096  # H, units per layer. BRC: 4096 on one GPU
    depth: int = 2  # residual blocks, or layers of an mlp. BRC
    members: int = 2  # E, networks with their own weights. BRC
    num_atoms: int = 101  # K, atoms of the return distribution. BRC
    v_max: float = 10.0  # the support is [v_min, v_max], in units of the scaled return. BRC
    v_min: float | None = None  # -v_max where it is not given. BRC
    ends: Literal["atoms", "edges"] = "atoms"  # on v_min and v_max: atoms (BRC), or edges of bins around them
    embedding_size: int = 32  # D, task embedding, only with several tasks. BRC
    embedding_norm: Literal["l2", "l1"] = "l2"  # l2: BRC's code; l1: reported of its paper
    body: str = "bronet"  # bronet, simba or mlp. BRC: bronet
    loss: str = "categorical"  # categorical or mse, which has no distribution. BRC: categorical
    reduction: Reduction = "mean"  # of members' values; own: each has its target. BRC
    conditioning: str = "embedding"  # of tasks: embedding, heads, one_hot or none. BRC: embedding

    def __post_init__(self) -> None:
        for name, known in (("body", BODIES), ("loss", LOSSES), ("conditioning", CONDITIONINGS)):
            require_known(name, getattr(self, name), known)
        require_known("reduction", self.reduction, get_args(Reduction))
        require_known("ends", self.ends, ("atoms", "edges"))
        if self.loss == "mse":
            _only_with(self, "loss", "categorical", "num_atoms", "v_min", "ends")
        if self.conditioning != "embedding":
            _only_with(self, "conditioning", "embedding", "embedding_size", "embedding_norm")
        _positive(self, "width", "members", "embedding_size")
        _finite(self, "v_max")
        if self.v_min is None:
            _positive(self, "v_max")
        else:
            _finite(self, "v_min")
            if not self.v_min < self.v_max:
                raise InputError(f"v_min must be below v_max, got {self.v_min} and {self.v_max}")
        _require(self, "0 or more", self.depth >= 0, "depth")
        _require(self, "at least 2", self.num_atoms >= 2, "num_atoms")
        _limited(self, LARGEST, "width", "num_atoms", "embedding_size")
        _limited(self, MOST_NETWORKS, "depth", "members")

    @property
    def support(self) -> tuple[float, float]:
        """The first and the last atom."""
        low, high = -self.v_max if self.v_min is None else self.v_min, self.v_max
        half_a_bin = (high - low) / self.num_atoms / 2 if self.ends == "edges" else 0.0
        return low + half_a_bin, high - half_a_bin


@dataclass(frozen=True)
class ActorConfig:
    """Network with a tanh-Gaussian head."""

    width: int = 256  # units per layer. BRC: 256
    depth: int = 1  # residual blocks, or layers of an mlp. BRC
    body: str = "bronet"  # bronet, simba or mlp. BRC: bronet

    def __post_init__(self) -> None:
        require_known("body", self.body, BODIES)
        _positive(self, "width")
        _require(self, "0 or more", self.depth >= 0, "depth")
        _limited(self, LARGEST, "width")
        _limited(self, MOST_NETWORKS, "depth")


@dataclass(frozen=True)
class LearningConfig:
    """What the updates use."""

    learning_rate: float = 3e-4  # of critic, actor and temperature. BRC
    beta1: float = 0.9  # of AdamW, for critic and actor. BRC
    beta2: float = 0.999  # of AdamW and of the temperature's Adam. BRC
    eps: float = 1e-8  # of AdamW and of the temperature's Adam. BRC
    weight_decay: float = 1e-4  # decoupled, on every parameter of actor and critic. BRC
    temperature_beta1: float = 0.5  # beta1 of the temperature's Adam. BRC
    initial_temperature: float = 0.1  # alpha, weight of the entropy bonus, at the start. BRC
    target_entropy_per_action: float = -0.5  # nats per (padded) action dimension. BRC: -A / 2
    discount: float = 0.99  # per environment step. BRC
    tau: float = 0.005  # share of the online critic in the target after an update. BRC
    return_bootstrap: Literal["mean_reward", "critic"] = "mean_reward"  # see RewardNormalizer
    return_entropy: Literal["target", "measured"] = "target"  # see RewardNormalizer

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "eps", "initial_temperature")
        _require(self, "0 or more", self.weight_decay >= 0, "weight_decay")
        for name in ("beta1", "beta2", "temperature_beta1", "discount"):
            _require(self, "in [0, 1)", 0 <= getattr(self, name) < 1, name)
        _require(self, "in (0, 1]", 0 < self.tau <= 1, "tau")
        _finite(self, "learning_rate", "eps", "weight_decay", "initial_temperature")
        _finite(self, "target_entropy_per_action")


def keywords(text: str) -> dict[str, Any]:
    """Keyword arguments out of a JSON object: plain values only, so that settings of a stranger can say no
    more than an environment takes. InputError for all else."""
    found: object = None
    if len(text) <= MOST_KWARGS:
        with suppress(ValueError, RecursionError):
            given = json.loads(text)
            json.dumps(given, allow_nan=False)  # NaN and infinity are not JSON
            found = given
    if not isinstance(found, dict):
        raise InputError(
            f"kwargs must be a JSON object of at most {MOST_KWARGS} characters, such as "
            f"'{{\"gain\": 2.0}}', got {text!r:.60}"
        )
    return check_keywords(found)


def check_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same keyword arguments; InputError for a name that is none or that has a setting of its own."""
    for name in kwargs:
        if not (isinstance(name, str) and name.isidentifier()):
            raise InputError(f"kwargs must have names of arguments, got {name!r:.60}")
        if name in RESERVED:
            raise InputError(f"kwargs cannot set {name}: {RESERVED[name]}")
    return kwargs


@dataclass(frozen=True)
class EnvConfig:
    """How tasks are simulated; see envs.make."""

    episode_length: int | None = None
    """Environment steps per episode; the task's own when not given."""
    impl: Literal["jax", "warp"] = "jax"
    """MJX's simulator, for mjx/ tasks."""
    randomize: bool = False
    """Domain randomization of MuJoCo Playground, for mjx/ tasks that have one."""
    processes: bool | None = None
    """A process per environment; when not given, dmc/ and humanoidbench/ tasks have them, gym/ do not."""
    restarts: int = 3
    """How often the processes of a task are started again after one has died."""
    step_seconds: float | None = None
    """Seconds after which a process that is still at a step or a reset counts as dead; no limit when not
    given."""
    kwargs: str | None = None
    """Arguments of the environment's constructor, for gym/ tasks: a JSON object such as '{"gain": 2.0}'."""
    privileged: bool = True
    """Asymmetric actor-critic: critics see a robot's privileged_state beside its state, policies state alone.
    Without it nobody sees privileged_state."""

    def __post_init__(self) -> None:
        if self.kwargs is not None:
            object.__setattr__(self, "kwargs", json.dumps(keywords(self.kwargs)))  # in one form
        _require(self, "positive", self.episode_length is None or self.episode_length > 0, "episode_length")
        _require(self, "0 or more", self.restarts >= 0, "restarts")
        _require(self, "positive", self.step_seconds is None or self.step_seconds > 0, "step_seconds")
        for name, most in (("episode_length", LONGEST_EPISODE), ("step_seconds", 1e6)):
            if getattr(self, name) is not None:
                _limited(self, most, name)


@dataclass(frozen=True)
class TransferConfig:
    """How the agent of another run (`--from RUN`) is taken to new tasks."""

    start: str = "mean"
    """What new tasks begin as, in what tells tasks apart: the mean of the old tasks, an old task by its name,
    or nearest, the old task whose policy has the best return in a trial on the new one."""
    freeze: int = 0
    """Environment steps per task, from the first that learns, in which the body's weights stay as they were,
    but for those of new columns; output layers and what tells tasks apart learn."""
    optimizer: Literal["kept", "fresh"] = "kept"
    """Moments and step count: kept, by name, or fresh."""
    keep_tasks: bool = False
    """Go on training the old tasks, beside the new ones."""
    replay: bool = True
    """With keep_tasks: keep the old tasks' replay too. Each task then has the same share of a batch."""
    checkpoint: str = "last"
    """Of the old run: last, best (of its evaluations), or a step. Replay and reward scales are the last's."""

    def __post_init__(self) -> None:
        _require(self, "0 or more", self.freeze >= 0, "freeze")
        if not self.replay and not self.keep_tasks:
            raise InputError("transfer.replay is of the old tasks, which only transfer.keep_tasks keeps")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: `brc-fast train TASK... [settings]`."""

    tasks: tuple[str, ...] = ()
    """Names of tasks such as mjx/CartpoleSwingup or suites such as mjx/dmc25; several train one agent."""
    run: str | None = None
    """Folder of the run; when not given runs/<tasks>-<settings>-seed<seed>, with the settings that are not
    this device's defaults."""
    seed: int = 0
    """Of networks, exploration, environments and replay."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner runs."""
    threads: int | None = None
    """Threads of the learner on a CPU; as many as there are cores, at most 4, when not given."""
    precision: Precision = "fp32"
    """Of matrix products: fp32, tf32 (CUDA) or bf16. BRC: JAX's default, which is tf32 on a GPU."""
    graphs: bool = True
    """Replay all updates of a step: on CUDA as one CUDA graph, on a CPU as one list of passes."""
    reward_scale: bool = True
    """Divide each task's rewards by its scale, which keeps returns within the critic's support. BRC."""
    normalize_observations: bool = False
    """Give networks observations of mean 0 and variance 1, by running statistics of each task. SimBa."""
    recompute: bool = False
    """Make the critics' activations again in the backward pass instead of keeping them."""
    policy_lag: int = 0
    """Updates by which the acting policy may lag: with updates_per_step or more, environments and updates
    run at once, on a GPU or on two cores."""
    num_envs: int = 1
    """Environments per task, stepped together. BRC: 1."""
    steps: int = 1_000_000
    """Length of the run in environment steps per task, summed over its environments."""
    random_steps: int = 5_000
    """Environment steps per task before learning starts, with uniform random actions or, of an agent that was
    taken from another run, its own. BRC: 5000."""
    updates_per_step: int = 2
    """Updates after each step of the vector, that is per num_envs transitions of every task. BRC: 2, with
    one environment."""
    batch_size: int | None = None
    """Transitions per update, over all tasks. None: BRC's, 256 for one task and 1024 for several."""
    replay_capacity: int = 1_000_000
    """Transitions kept per task. BRC: 1,000,000."""
    eval_every: int = 25_000
    """Environment steps per task between evaluations."""
    eval_episodes: int = 10
    """Episodes per task and evaluation, with the policy's mean action."""
    eval_sampled: bool = True
    """Evaluate with the policy's own noise too, in as many further episodes, which take as long again."""
    eval_envs: int | None = None
    """Environments per task that play them; as many as episodes when not given."""
    report_every: int = 2_000
    """Environment steps per task between rows of training metrics."""
    analysis_every: int | None = None
    """Environment steps per task between rows that compare tasks: similarity of their gradients, spread of
    TD errors, gradient norms and entropies (brc_fast.analysis); none when not given."""
    checkpoint_every: int = 100_000
    """Environment steps per task between checkpoints; one is always written at the end, and on a signal."""
    overwrite: bool = False
    """Replace the run that the folder holds."""
    from_run: str | None = None
    """Folder of a run whose agent is taken to these tasks, `--from RUN`: its networks, which are then the
    defaults of critic.* and actor.* and cannot change."""
    critic: CriticConfig = CriticConfig()
    actor: ActorConfig = ActorConfig()
    learning: LearningConfig = LearningConfig()
    env: EnvConfig = EnvConfig()
    transfer: TransferConfig = TransferConfig()

    def __post_init__(self) -> None:
        _positive(self, "num_envs", "steps", "updates_per_step", "replay_capacity", "eval_every")
        _positive(self, "eval_episodes", "report_every", "checkpoint_every")
        if self.critic.loss == "mse" and not self.reward_scale:
            _only_with(self.critic, "loss", "categorical", "v_max")
        if self.reward_scale and self.critic.v_min not in (None, -self.critic.v_max):
            raise InputError(
                f"reward_scale fits returns into [-v_max, v_max], got v_min {self.critic.v_min}: leave it "
                "out, or give --no-reward-scale"
            )
        for name, value in vars(self.transfer).items() if self.from_run is None else ():
            if value != getattr(TransferConfig, name):
                raise InputError(
                    f"transfer.{name} is a setting of --from RUN alone: name the run with --from"
                )
        _require(self, "0 or more", self.random_steps >= 0, "random_steps")
        _require(self, "in [0, 2**64)", 0 <= self.seed < 2**64, "seed")
        _require(self, "0 or more", self.policy_lag >= 0, "policy_lag")
        for name in ("batch_size", "threads", "eval_envs", "analysis_every"):
            _require(self, "positive", getattr(self, name) is None or getattr(self, name) > 0, name)
        _require(self, "at most 1024", self.threads is None or self.threads <= 1024, "threads")
        _limited(self, LARGEST, "num_envs", "eval_episodes", "updates_per_step")
        if self.eval_envs is not None:
            _limited(self, LARGEST, "eval_envs")
        stored = self.replay_capacity * len(self.tasks)
        if self.tasks:  # the store indexes 2**29 rows, of which each environment may take two more
            _limited(self, 2**29 // len(self.tasks) - 2 * self.num_envs, "replay_capacity")
        if self.tasks and self.transitions_per_update > stored:
            raise InputError(
                f"a batch of {self.transitions_per_update} exceeds the {stored} transitions that "
                "replay_capacity allows; raise it or lower batch_size"
            )

    @property
    def transitions_per_update(self) -> int:
        """B: batch_size, or BRC's for this number of tasks."""
        return self.batch_size or (1024 if len(self.tasks) > 1 else 256)


def gpu_preset() -> TrainConfig:
    """The published sizes, which are TrainConfig's own, and tf32."""
    return TrainConfig(precision="tf32")


def cpu_preset() -> TrainConfig:
    """Sizes that learn a small task within minutes on two CPU cores, and the learning rate that suits tens of
    thousands of updates of them (measured; see README and docs/training.md)."""
    return TrainConfig(
        num_envs=10,
        steps=400_000,
        random_steps=10_000,
        updates_per_step=1,
        batch_size=128,
        replay_capacity=400_000,
        eval_every=25_000,
        critic=CriticConfig(width=128),
        actor=ActorConfig(width=128),
        learning=LearningConfig(learning_rate=1e-3),
    )


def preset(device: str) -> TrainConfig:
    """The defaults that fit a resolved device, "cpu" or "cuda"."""
    return gpu_preset() if device == "cuda" else cpu_preset()


def flat(config: Any) -> dict[str, Any]:
    """Settings by their names on the command line: "critic.width" -> 256."""
    out: dict[str, Any] = {}
    for name, value in asdict(config).items():
        inner = value if isinstance(value, dict) else None
        out |= {name: value} if inner is None else {f"{name}.{key}": each for key, each in inner.items()}
    return out


def from_dict(kind: type[Any], values: dict[str, Any]) -> Any:
    """Rebuild a configuration from `dataclasses.asdict`: what is missing, because an older version wrote it,
    has its default; what is unknown, or of another type, is an InputError."""
    types = get_type_hints(kind)
    if unknown := sorted(set(values) - set(types)):
        raise InputError(f"config.json was written by another version: it has {', '.join(unknown)}")
    return kind(**{name: _typed(name, types[name], value) for name, value in values.items()})


def _typed(name: str, kind: Any, value: Any) -> Any:
    """A setting out of JSON as its type has it; InputError where it does not fit."""
    if is_dataclass(kind):
        kind, known = dict, kind
        if isinstance(value, dict):
            return from_dict(known, value)
    elif get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
            return tuple(value)
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    else:
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        if type(value) in kinds or (float in kinds and type(value) is int):
            return value
    told = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    raise InputError(f"{name} must be {told}, got {value!r:.60}")
