"""What every environment adapter returns, and what the training loop relies on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brc_fast.config import LONGEST_EPISODE
from brc_fast.errors import InputError
from brc_fast.spec import Box, Discrete, Field, Native, Spec

if TYPE_CHECKING:
    from gymnasium import Space


# Of all slots, or of each; None goes on with the random numbers.
Seed = int | Sequence[int | None] | None
# Observations of a robot by MuJoCo Playground's names: the policy's, and what the critic sees beside it.
STATE, PRIVILEGED = "state", "privileged_state"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Step(NamedTuple):
    """One step of N environments, tensors on the environments' device; observations and successors as the
    environments' `task_spec` has them (vectors [N, O] float32, images [N, H, W, C] uint8), the rest float32
    and bool.

    What the policy sees next and where the action really led are different fields: at the end of an
    episode `observations` already holds the first observation of the next one.

    ============= ======= ===========================================================================
    observations  [N, ..] what to act on next
    successors    [N, ..] where the action led (equal to `observations` unless the episode ended)
    rewards       [N]     reward of this step, unscaled
    terminated    [N]     the task ended: no value beyond this state
    truncated     [N]     a time limit or a reset from outside: the value goes on
    dropped       [N]     not a transition, must not be stored (its rewards and successors are finite
                          placeholders). With `truncated`: the simulator returned NaN or its process died,
                          and the slot was reset. Without: the environment spent the step on a reset after
                          an episode that ended one step before. So `terminated | truncated` is every
                          ended episode, whichever way
    ============= ======= ===========================================================================
    """

    observations: Tensor
    successors: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    dropped: Tensor


class Privileged(NamedTuple):
    """What the critic sees beside what the policy does, beside a `Step` of the same names; after a reset both
    are of the start. Of a step that was dropped its successors are placeholders, too."""

    observations: Tensor  # [N, P]
    successors: Tensor  # [N, P]


class VectorEnvironment(Protocol):
    """N environments of T tasks, stepped together. Every adapter is also a `gymnasium.vector.VectorEnv`."""

    num_envs: int  # N, over all tasks
    task_names: tuple[str, ...]  # length T
    task_ids: NDArray[np.int64]  # [N] int64, the task of every slot
    task_spec: Spec  # what all tasks observe and do (Gymnasium's `spec` says how one environment is made)
    max_episode_steps: int | None  # of the task with the longest episodes; None where one knows no limit
    continues: NDArray[np.bool_]  # [N] whether `load_state_dict` goes on inside the running episode

    @property
    def observation_size(self) -> int:
        """Numbers of an observation: O, of the widest task; narrower ones are zero-padded."""

    @property
    def action_size(self) -> int:
        """A, of the widest task, the surplus of narrower ones is ignored; or how many discrete actions."""

    @property
    def privileged(self) -> Privileged | None:
        """What the critic alone sees of the newest reset or step; None where `task_spec` has no such."""

    @property
    def nan_count(self) -> NDArray[np.int64]:
        """Transitions lost per task since the last reset, to NaN or to a process that died, [T]; reading it
        waits for the device."""

    @property
    def successes(self) -> Tensor | None:
        """[N] bool: the task called the newest step (that which led to `successors`) a success; None where no
        task has such a notion."""

    def reset_tensors(self, seed: Seed) -> Tensor:
        """Start every environment anew; returns the observations. Without a seed the random numbers go on.

        A list has a seed for each slot, as Gymnasium's: a slot of gym/ then starts as `Env.reset(seed=...)`
        does, while mjx/ makes one seed of the whole list.
        """

    def step_tensors(self, actions: Tensor) -> Step:
        """Apply actions [N, A] float32 in [-1, 1], or [N] int64 where they are discrete."""

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Everything needed to go on from here, as plain arrays."""

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> Tensor:
        """Go on from a `state_dict`: exactly where `continues`, with new episodes elsewhere, whose start
        states are those that an uninterrupted run would draw next. Returns the observations."""

    def close(self) -> None:
        """Free what the environments hold."""


def start_seen(env: VectorEnvironment, observations: Tensor) -> Tensor:
    """What the critic sees [N, O + P] of the newest reset, or load, that returned these observations."""
    return _beside(env, observations, 0)


def step_seen(env: VectorEnvironment, step: Step) -> Step:
    """The newest step with what the critic sees [N, O + P] as its observations and successors."""
    observations, successors = (_beside(env, x, place) for place, x in enumerate(step[:2]))
    return step._replace(observations=observations, successors=successors)


def _beside(env: VectorEnvironment, seen: Tensor, place: int) -> Tensor:
    if env.task_spec.privileged is None:
        return seen
    if env.privileged is None:
        raise InputError(
            f"{env.task_names[0]} must set `privileged` in every reset, step and load: its task_spec has "
            f"{env.task_spec.privileged}"
        )
    return torch.cat([seen, env.privileged[place].to(seen.device)], -1)


def check_finite(step: Step, env: VectorEnvironment, step_number: int) -> None:
    """Raise InputError if a transition that was not dropped holds NaN or infinity; waits for the device."""
    total = step.observations.sum() + step.successors.sum() + step.rewards.sum()
    if total.isfinite():
        return
    kept = ~step.dropped
    for name, bad in (
        ("observations", ~finite_rows(step.observations)),
        ("successors", ~finite_rows(step.successors) & kept),
        ("rewards", ~step.rewards.isfinite() & kept),
    ):
        if bad.any():
            slot = int(bad.nonzero()[0])
            raise InputError(
                f"{name} of {env.task_names[env.task_ids[slot]]} are not finite in environment {slot} "
                f"at step {step_number}; the task must return numbers that float32 holds or mark the slot as "
                "dropped"
            )


def finite_rows(values: Tensor) -> Tensor:
    """[N] whether all numbers of a row [N, ..] are finite."""
    return values.isfinite().flatten(1).all(dim=1)


def check_start(observations: Tensor, env: VectorEnvironment, when: str = "in the reset") -> Tensor:
    """The same observations [N, ..]; InputError if one is not finite. Waits for the device."""
    if not observations.isfinite().all():
        slot = int((~finite_rows(observations)).nonzero()[0])
        raise InputError(
            f"observations of {env.task_names[env.task_ids[slot]]} are not finite in environment {slot} "
            f"{when}; the task must start with finite numbers"
        )
    return observations


def natives_of(env: VectorEnvironment) -> tuple[Native, ...]:
    """Each task, in the order of their ids, as its own environment has it. Of environments that tell nothing
    of it, all tasks see vectors and act in [-1, 1] as their `task_spec` says."""
    told: dict[str, Native] = {}
    for group in getattr(env, "groups", [env]):
        spec = group.task_spec
        sizes = spec.observation.size, spec.action.size
        told |= {task: Native.plain(task, *sizes) for task in group.task_names}
        told |= {native.task: native for native in getattr(group, "natives", ())}
    return tuple(told[task] for task in env.task_names)


def tasks_with_success(env: VectorEnvironment) -> NDArray[np.bool_]:
    """[T] whether a task reports successes; among several, one that does not has False in `successes`."""
    groups = getattr(env, "groups", [env])
    told = {name for group in groups if group.successes is not None for name in group.task_names}
    return np.array([name in told for name in env.task_names])


def require_time_limit(env: VectorEnvironment) -> None:
    """InputError that names the first task whose episodes might never end, so that nobody waits for one."""
    for group in getattr(env, "groups", [env]):
        if group.max_episode_steps is not None and group.max_episode_steps > LONGEST_EPISODE:
            raise InputError(
                f"{group.task_names[0]} has episodes of up to {group.max_episode_steps} steps, and at most "
                f"{LONGEST_EPISODE} are evaluated: train with a smaller --env.episode-length"
            )
        if group.max_episode_steps is None:
            raise InputError(
                f"{group.task_names[0]} has no time limit, and an evaluation ends with its episodes: train "
                "with --env.episode-length (envs.make: episode_length), or register it with max_episode_steps"
            )


def require_kept_limit(env: VectorEnvironment, slot: int, steps: int) -> None:
    """InputError where the running episode of `slot` took more steps than the task said it would at most."""
    if env.max_episode_steps is not None and steps > env.max_episode_steps:
        raise InputError(
            f"{env.task_names[env.task_ids[slot]]} does not keep its time limit: an episode of environment "
            f"{slot} has {steps} steps, and max_episode_steps is {env.max_episode_steps}"
        )


def observation_space(field: Field) -> Space[Any]:
    """Gymnasium's of one observation: all floats, or all values of a field of integers."""
    from gymnasium import spaces

    if field.dtype.startswith(("int", "uint")):
        limits = np.iinfo(field.numpy_dtype)
        return spaces.Box(limits.min, limits.max, field.shape, field.numpy_dtype.type)
    return spaces.Box(-np.inf, np.inf, field.shape, np.float32)


def action_space(action: Box | Discrete) -> Space[Any]:
    """Gymnasium's of one action."""
    from gymnasium import spaces

    if isinstance(action, Box):
        return spaces.Box(action.low, action.high, (action.size,), np.float32)
    return spaces.Discrete(action.n)


class GymnasiumFace:
    """The `gymnasium.vector.VectorEnv` side of an adapter, in terms of its tensors.

    Stands before `VectorEnv` among the bases. `metadata["autoreset_mode"]` says how slots restart: SAME_STEP,
    or NEXT_STEP where a vector environment of that mode is behind it. `infos` of a step holds, each entry
    beside a mask of the same name with an underscore [N]:

    - "success" [N] bool, of the slots whose task tells it; "dropped" [N] bool, of those whose step was no
      transition;
    - in SAME_STEP mode "final_obs", an object array [N] with the true successor of each ended slot, and
      "final_info", where an ended slot has its "success" and "dropped".

    `natives` has each task as its own environment has it, where that was found out: see `natives_of`.
    Actions may be given as an array, a list or a tensor of numbers; those that are not finite are refused.
    """

    num_envs: int
    task_names: tuple[str, ...]
    task_ids: NDArray[np.int64]
    task_spec: Spec
    natives: tuple[Native, ...] = ()
    max_episode_steps: int | None
    continues: NDArray[np.bool_]
    successes: Tensor | None = None
    privileged: Privileged | None = None
    single_observation_space: Space[Any]
    single_action_space: Space[Any]
    observation_space: Space[Any]
    action_space: Space[Any]
    _seed: int | None

    def declare(
        self, task_spec: Spec, task_ids: NDArray[np.int64], seed: int, next_step: bool = False
    ) -> None:
        """Set what Gymnasium and `VectorEnvironment` ask every adapter for."""
        from gymnasium.vector import AutoresetMode
        from gymnasium.vector.utils import batch_space

        self.num_envs = len(task_ids)
        self.task_spec = task_spec
        self.task_names = task_spec.tasks
        self.task_ids = task_ids
        self.continues = np.ones(len(task_ids), bool)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP if next_step else AutoresetMode.SAME_STEP}
        self.single_observation_space = observation_space(task_spec.observation)
        self.single_action_space = action_space(task_spec.action)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._seed = seed

    @property
    def observation_size(self) -> int:
        return self.task_spec.observation.size

    @property
    def action_size(self) -> int:
        return self.task_spec.action.size

    def split(self, observations: Tensor, successors: Tensor) -> tuple[Tensor, Tensor]:
        """What the policy sees of the newest rows [N, O + P]; the rest becomes `privileged`."""
        size = self.observation_size
        if self.task_spec.privileged is None:
            return observations, successors
        self.privileged = Privileged(observations[:, size:], successors[:, size:])
        return observations[:, :size], successors[:, :size]

    def as_actions(self, actions: Any) -> Tensor:
        """Check and detach actions, float32 [N, A] or int64 [N], on their own device. Waits for it where they
        are discrete."""
        if not isinstance(actions, Tensor):
            try:
                actions = np.asarray(actions)
            except ValueError as error:
                raise InputError(f"actions must be one array, got {actions!r:.60}") from error
            if actions.dtype.kind not in "biuf":
                raise InputError(f"actions must be numbers, got {actions.dtype}")
        if actions.shape != self.action_space.shape:
            letters = "[N, A]" if isinstance(self.task_spec.action, Box) else "[N]"
            wanted, got = list(self.action_space.shape or ()), list(actions.shape)
            raise InputError(f"actions must have shape {letters} = {wanted}, got {got}")
        if isinstance(self.task_spec.action, Box):
            return torch.as_tensor(actions, dtype=torch.float32).detach()
        given = torch.as_tensor(actions)
        if given.dtype not in INTEGERS:
            raise InputError(f"discrete actions must be int64, got {given.dtype}; convert them with .long()")
        low, high, n = int(given.min()), int(given.max()), self.task_spec.action.n
        if low < 0 or high >= n:
            raise InputError(f"actions must lie in [0, n) = [0, {n}), got {low if low < 0 else high}")
        return given.long()

    def reset_tensors(self, seed: Seed) -> Tensor:
        raise NotImplementedError

    def step_tensors(self, actions: Tensor) -> Step:
        raise NotImplementedError

    def reset(
        self, *, seed: Seed = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        if options:
            raise InputError(f"reset takes no options, got {', '.join(options)}")
        check_seed(seed, self.num_envs)
        observations = self.reset_tensors(self._seed if seed is None else seed)
        self._seed = None  # later resets without a seed go on with the random numbers
        return observations.cpu().numpy(), {}

    def step(
        self, actions: Any
    ) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        checked = self.as_actions(actions)
        if checked.is_floating_point() and not checked.isfinite().all():
            slot = int((~finite_rows(checked)).nonzero()[0])
            raise InputError(f"actions must be finite, got {checked[slot].tolist()} in environment {slot}")
        step = self.step_tensors(checked)
        observations, successors, rewards, terminated, truncated, dropped = (x.cpu().numpy() for x in step)
        from gymnasium.vector import AutoresetMode

        told = {"dropped": (dropped, dropped)}  # entry, and the slots that have it
        if self.successes is not None:
            env: Any = self
            told["success"] = self.successes.numpy(), tasks_with_success(env)[self.task_ids] & ~dropped
        restarted = terminated | truncated
        if self.metadata["autoreset_mode"] is not AutoresetMode.SAME_STEP:
            restarted = np.zeros(self.num_envs, bool)
        infos = _infos({name: (values, slots & ~restarted) for name, (values, slots) in told.items()})
        if restarted.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            for slot in restarted.nonzero()[0]:
                final_obs[slot] = successors[slot]
            told["dropped"] = dropped, restarted
            final = _infos({name: (values, slots & restarted) for name, (values, slots) in told.items()})
            infos |= {"final_obs": final_obs, "_final_obs": restarted}
            infos |= {"final_info": final, "_final_info": restarted}
        return observations, rewards, terminated, truncated, infos


def _infos(told: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> dict[str, Any]:
    """Entries of `infos` [N], with the masks of the slots that have them; none that no slot has."""
    infos: dict[str, Any] = {}
    for name, (values, slots) in told.items():
        if slots.any():
            infos |= {name: values & slots, f"_{name}": slots}
    return infos


def check_seed(seed: Any, num_envs: int) -> None:
    """InputError for what is neither one seed nor one for each slot."""
    seeds = [seed] if seed is None or isinstance(seed, int | np.integer) else seed
    if not isinstance(seeds, Sequence | np.ndarray) or isinstance(seeds, str):
        raise InputError(f"seed must be an integer, or one for each environment, got {seed!r:.60}")
    if seeds is seed and len(seeds) != num_envs:
        raise InputError(
            f"seed must be one integer, or {num_envs} for {num_envs} environments, got {len(seeds)}"
        )
    for each in seeds:
        if each is not None and (
            not isinstance(each, int | np.integer) or isinstance(each, bool) or not 0 <= each < 2**64
        ):
            raise InputError(f"seed must be an integer in [0, 2**64), got {each!r:.60}")
