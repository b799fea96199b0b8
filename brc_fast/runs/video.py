"""Film an episode, on a CPU too.

Of tasks whose MuJoCo model and state can be reached (MJX, dm_control, Gymnasium's and HumanoidBench's) it is
MuJoCo's own picture of the state, so all of them look alike. Other tasks draw themselves (`rgb_array`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import logging
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from brc_fast.agents.brc import BRC
from brc_fast.disk import REGULAR, require
from brc_fast.envs.base import VectorEnvironment, require_kept_limit, require_time_limit
from brc_fast.errors import InputError, MissingExtraError

log = logging.getLogger(__name__)

Frame = NDArray[np.uint8]  # [height, width, 3]
State = dict[str, NDArray[Any]]  # fields of MuJoCo's data that decide what is seen

SEEN = ("qpos", "qvel", "mocap_pos", "mocap_quat")
FRAMES_PER_SECOND = 30  # of a task that draws itself and names no number
ONE_GEOM = "<mujoco><worldbody><geom size='1'/></worldbody></mujoco>"


@dataclass(frozen=True)
class Settings:
    """Size in pixels, frames per second at most, and a camera's name or number (None: the model's first).

    chosen: which of "size" and "camera" the user gave: a task that draws itself has neither.
    """

    height: int = 480
    width: int = 640
    fps: int = 25
    camera: str | None = None
    chosen: tuple[str, ...] = ()

    @classmethod
    def parse(cls, size: str | None, fps: int, camera: str | None) -> Settings:
        """From "480x640"; InputError for what cannot be used."""
        match = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", size or "480x640")
        if match is None:
            raise InputError(
                f"size must be height x width in pixels, each 10 to 9999, such as 480x640, got {size!r}"
            )
        if not 1 <= fps <= 100:
            raise InputError(f"fps must be in [1, 100], got {fps}")
        given = {"size": size, "camera": camera}
        chosen = tuple(name for name, value in given.items() if value is not None)
        return cls(int(match[1]), int(match[2]), fps, camera, chosen)


class Simulation(NamedTuple):
    """What is known of the simulator behind one environment."""

    model: Any  # mujoco.MjModel
    read: Callable[[], State]  # copies of the current state
    seconds: float  # between two actions


class Pictures(NamedTuple):
    """An environment that draws itself."""

    draw: Callable[[], Frame]
    seconds: float  # between two actions, as it is to be shown


def simulation(env: VectorEnvironment) -> Simulation | Pictures:
    """The only place that knows how adapters keep their simulator, after a reset; InputError for what cannot
    be filmed."""
    task = env.task_names[0]
    if task.startswith("mjx/"):
        return _mjx(env)
    slots = getattr(getattr(env, "venv", None), "envs", None)
    inner: Any = slots[0].unwrapped if slots else None
    if hasattr(inner, "_env") and hasattr(inner._env, "physics"):  # dm_control behind Shimmy
        physics = inner._env.physics
        return Simulation(physics.model.ptr, lambda: _copied(physics.data.ptr), inner._env.control_timestep())
    if _is_mujoco(inner):
        seconds = getattr(inner, "dt", inner.model.opt.timestep)
        return Simulation(inner.model, lambda: _copied(inner.data), float(seconds))
    drawing: Any = slots[0] if slots else getattr(env, "venv", None)
    if getattr(drawing, "render_mode", None) == "rgb_array":
        per_second = (drawing.metadata or {}).get("render_fps") or FRAMES_PER_SECOND
        return Pictures(lambda: _picture(task, drawing), 1.0 / float(per_second))
    raise InputError(
        f"{task} cannot be filmed: it draws no pictures (render_mode rgb_array; envs.make: render=True), and "
        "its MuJoCo model and state are out of reach, where those of mjx/... and dmc/... are not"
    )


def in_mujoco(env: VectorEnvironment) -> bool:
    """Whether slots that Gymnasium made are MuJoCo's."""
    slots: Any = getattr(getattr(env, "venv", None), "envs", None)
    return bool(slots) and _is_mujoco(slots[0].unwrapped)


def _is_mujoco(inner: Any) -> bool:
    if not (hasattr(inner, "model") and hasattr(inner, "data")) or not importlib.util.find_spec("mujoco"):
        return False
    import mujoco

    return isinstance(inner.model, mujoco.MjModel) and isinstance(inner.data, mujoco.MjData)


def _picture(task: str, drawing: Any) -> Frame:
    """What an environment, or the first of a vector environment, draws of itself now."""
    try:
        frame: Any = drawing.render()
    except Exception as error:  # whatever it needs to draw
        raise InputError(
            f"{task} cannot be filmed: its render raised {type(error).__name__}: {error}"
        ) from error
    if isinstance(frame, tuple) or (isinstance(frame, np.ndarray) and frame.ndim == 4):
        frame = frame[0]
    told = f"{frame.dtype}{list(frame.shape)}" if isinstance(frame, np.ndarray) else f"{frame!r:.60}"
    if not (told.startswith("uint8") and frame.ndim == 3 and frame.shape[2] == 3 and frame.size):
        raise InputError(f"{task} cannot be filmed: it must draw uint8 [height, width, 3], got {told}")
    picture: Frame = frame
    return picture


def _mjx(env: Any) -> Simulation:
    from mujoco_playground import registry

    from brc_fast.envs._playground import mj_model

    task = env.task_names[0]
    config = registry.get_default_config(task.removeprefix("mjx/"))

    def read() -> State:
        leaves = {name.removeprefix("data."): values for name, values in env._slots.state[0].items()}
        return {name: np.array(leaves[name][0]) for name in SEEN if name in leaves}

    return Simulation(mj_model(task), read, config.ctrl_dt * config.get("action_repeat", 1))


def _copied(data: Any) -> State:
    return {name: np.array(getattr(data, name)) for name in SEEN}


def film(
    agent: BRC, env: VectorEnvironment, task_id: int, seed: int, output: Path, settings: Settings
) -> tuple[int, float]:
    """Play one episode in `env`, of one slot, with the mean action, and write it to a GIF or MP4 file.

    task_id: the agent's number of the task. Returns the number of frames and the episode's return. The last
    picture is of the state before the last action: after it the slot is already in its next episode.
    InputError where the task has grown since it was learned or does not keep its time limit, or its simulator
    is out of reach.
    """
    sizes = [[agent.observation_size, agent.action_size], [*env.task_spec.vector_sizes("the agent")]]
    if any(given > learned for learned, given in zip(*sizes, strict=True)):
        raise InputError(
            f"observation_size and action_size of {env.task_names[0]} are {sizes[1]}, those of the agent "
            f"only {sizes[0]}: film the task that it was trained on"
        )
    require_time_limit(env)
    observations = env.reset_tensors(seed)
    source = simulation(env)
    every = max(1, math.ceil(1.0 / (settings.fps * source.seconds) - 1e-6))
    speed = 1.0 / (every * source.seconds)
    episode = Episode(agent, env, task_id, observations)
    shown = (number for number in episode if number % every == 0)
    if isinstance(source, Pictures):
        if settings.chosen:
            told = " and ".join(settings.chosen)
            raise InputError(f"{told}: {env.task_names[0]} draws itself; only what MuJoCo draws has a choice")
        write((source.draw() for _ in shown), output, speed)
    else:
        model = copy.copy(source.model)  # some tasks move their target by changing the model at every reset
        states = [source.read() for _ in shown]
        write(render(model, states, settings), output, speed)
    return math.ceil(episode.steps / every), episode.total


class Episode:
    """The steps of one episode with the mean action; iterating yields their numbers, each before its step."""

    def __init__(self, agent: BRC, env: VectorEnvironment, task_id: int, observations: Tensor) -> None:
        self.agent, self.env, self.observations = agent, env, observations
        self.ids = torch.tensor([task_id], device=agent.device)
        self.action_size = env.task_spec.vector_sizes("the agent")[1]
        self.steps, self.total = 0, 0.0

    def __iter__(self) -> Iterator[int]:
        ended = False
        while not ended:
            yield self.steps
            self.steps += 1
            require_kept_limit(self.env, 0, self.steps)
            surplus = self.agent.observation_size - self.observations.shape[1]
            seen = pad(self.observations.to(self.agent.device), (0, surplus))
            actions = self.agent.act(seen, self.ids, deterministic=True)[:, : self.action_size]
            step = self.env.step_tensors(actions)
            self.total += float(step.rewards[0])
            ended = bool(step.terminated[0] | step.truncated[0])
            self.observations = step.observations
        if step.dropped[0]:
            log.warning("the episode was lost to NaN after %d steps; the video ends there", self.steps)


def render(model: Any, states: list[State], settings: Settings) -> Iterator[Frame]:
    """A picture of every state."""
    import mujoco

    buffers = model.vis.global_
    buffers.offheight = max(buffers.offheight, settings.height)
    buffers.offwidth = max(buffers.offwidth, settings.width)
    camera = _camera(model, settings.camera)
    data = mujoco.MjData(model)
    with mujoco.Renderer(model, settings.height, settings.width) as renderer:
        for state in states:
            for name, values in state.items():
                getattr(data, name)[:] = values.reshape(getattr(data, name).shape)
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, camera)
            yield renderer.render()


def _camera(model: Any, wanted: str | None) -> int:
    names = [model.camera(number).name for number in range(model.ncam)]
    if wanted is None:
        return 0 if names else -1  # -1: free, looking at the model's centre
    if wanted in names:
        return names.index(wanted)
    if wanted.lstrip("-").isdigit() and -1 <= int(wanted) < len(names):
        return int(wanted)
    told = ", ".join(f"{number} {name}".strip() for number, name in enumerate(names))
    raise InputError(f"camera must be one of {told or 'none'}, or -1 for a free view, got {wanted!r}")


def choose_renderer() -> None:
    """Without a display, MUJOCO_GL chooses how MuJoCo draws; it has to be set before MuJoCo is imported."""
    headless = platform.system() == "Linux" and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    if headless and not os.environ.get("MUJOCO_GL"):
        os.environ["MUJOCO_GL"] = "osmesa" if find_library("OSMesa") and not find_library("EGL") else "egl"


def require_renderer() -> None:
    """Find out whether MuJoCo can draw at all, before anything slow starts; InputError says what to set or
    install."""
    choose_renderer()
    if importlib.util.find_spec("mujoco") is None:
        raise MissingExtraError("brc-fast video", "video")
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401  (loaded after Mesa, which has an LLVM too, it ends the process)
    try:
        import mujoco

        for _ in render(mujoco.MjModel.from_xml_string(ONE_GEOM), [{}], Settings(16, 16)):
            pass
    except Exception as error:  # whatever OpenGL, ctypes or MuJoCo say
        chosen = os.environ.get("MUJOCO_GL", "")
        raise InputError(
            f"MuJoCo cannot draw with MUJOCO_GL={chosen!r} ({type(error).__name__}: {error}): "
            "set MUJOCO_GL=egl (system packages libegl1 and libgl1-mesa-dri) or MUJOCO_GL=osmesa (libosmesa6)"
        ) from error


def ffmpeg() -> str | None:
    """Path of the program that makes MP4 files; the one on PATH before the one that imageio-ffmpeg brings."""
    found = shutil.which("ffmpeg")
    if found is None and importlib.util.find_spec("imageio_ffmpeg") is not None:
        found = importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    return found


def suffix() -> str:
    """Of the kind of file that can be made here: .mp4, or .gif without ffmpeg."""
    return ".gif" if ffmpeg() is None else ".mp4"


def check_output(output: Path) -> Path:
    """The same path; InputError for one that cannot be written."""
    if output.suffix not in (".gif", ".mp4"):
        raise InputError(f"output must end in .gif or .mp4, got {output}")
    if output.suffix == ".mp4" and ffmpeg() is None:
        raise InputError(
            f"{output} needs ffmpeg: install it, or pip install imageio-ffmpeg, or ask for a .gif"
        )
    if not output.absolute().parent.is_dir():
        raise InputError(f"there is no folder to write {output} to")
    for file in (output, _partial(output)):
        require(file, REGULAR, remedy="name another output")
    return output


def _partial(output: Path) -> Path:
    long = len(os.fsencode(output.name)) > 240  # of 255 bytes, the most that file systems take
    return output.with_name(f"partial-{output.name[-50:] if long else output.name}")


def write(frames: Iterator[Frame], output: Path, fps: float) -> None:
    """Encode frames as they come; the file appears when it is complete."""
    check_output(output)
    partial = _partial(output)
    partial.unlink(missing_ok=True)
    try:
        (_write_gif if output.suffix == ".gif" else _write_mp4)(frames, partial, fps)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _write_gif(frames: Iterator[Frame], output: Path, fps: float) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("a GIF", "video") from error
    images = (Image.fromarray(frame) for frame in frames)
    hundredths = round(100 / fps)  # the unit of time in a GIF
    next(images).save(output, save_all=True, append_images=images, duration=10 * hundredths, loop=0)


def _write_mp4(frames: Iterator[Frame], output: Path, fps: float) -> None:
    program = ffmpeg()
    assert program is not None  # see check_output
    first = next(frames)
    size = f"{first.shape[1]}x{first.shape[0]}"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", f"{fps:.6f}", "-i", "-"]
    # players want 4:2:0 colour, for which both sides must be even, and the index at the front
    coded = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    with subprocess.Popen(
        [program, "-v", "error", *raw, *coded, "-y", str(output)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        told = b""
        try:
            process.stdin.write(first.tobytes())
            for frame in frames:
                process.stdin.write(frame.tobytes())
        except BrokenPipeError:
            pass  # it says why on stderr
        _, told = process.communicate()
    if process.returncode != 0:
        raise OSError(f"ffmpeg could not write {output}: {told.decode(errors='replace').strip()}")
