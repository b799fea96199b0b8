"""Videos: frames and their timing, files that can be read back, and what is said where none can be drawn."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require
from refusals import says
from run_folders import assert_one_line, make_run
from scripted import Scripted

from brc_fast import envs
from brc_fast.errors import InputError, MissingExtraError
from brc_fast.runs import video
from brc_fast.spec import Spec

require("PIL")
from PIL import Image


class Pushing:
    """A policy with the sizes of a wider task, which always answers with the same actions."""

    device, observation_size, action_size = "cpu", 40, 8

    def act(
        self, observations: torch.Tensor, task_ids: torch.Tensor, deterministic: bool = False
    ) -> torch.Tensor:
        assert deterministic
        assert observations.shape == (1, self.observation_size)
        assert task_ids.tolist() == [3]
        return torch.full((1, self.action_size), 0.3)


def grey(levels: list[int], height: int = 24, width: int = 32) -> Iterator[video.Frame]:
    return (np.full((height, width, 3), level, np.uint8) for level in levels)


def test_a_gif_holds_every_frame_at_its_speed(tmp_path: Path) -> None:
    levels = [0, 60, 120, 180, 240]
    video.write(grey(levels), tmp_path / "a.gif", fps=20)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size) == (5, (32, 24))
        for number, level in enumerate(levels):
            gif.seek(number)
            assert gif.info["duration"] == 50  # milliseconds
            assert abs(int(gif.convert("L").getpixel((5, 5))) - level) <= 3


def test_an_mp4_holds_every_frame_and_may_have_odd_sides(tmp_path: Path) -> None:
    if video.ffmpeg() is None:
        require("imageio_ffmpeg")
    video.write(grey([0, 100, 200] * 5, 25, 33), tmp_path / "a.mp4", fps=22.2)
    program = video.ffmpeg()
    assert program is not None
    raw = ["-f", "rawvideo", "-pix_fmt", "gray", "-"]
    words = [program, "-v", "error", "-i", str(tmp_path / "a.mp4"), *raw]
    frames = np.frombuffer(subprocess.run(words, capture_output=True, check=True).stdout, np.uint8)
    frames = frames.reshape(15, 26, 34)
    np.testing.assert_allclose(frames[:, 5, 5], [0, 100, 200] * 5, atol=6)


def test_a_video_that_fails_half_way_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[video.Frame]:
        yield from grey([1, 2])
        raise RuntimeError("lost the display")

    for name in ("a.gif", *(["a.mp4"] if video.ffmpeg() else [])):
        with pytest.raises(RuntimeError, match="lost the display"):
            video.write(broken(), tmp_path / name, fps=20)
    assert list(tmp_path.iterdir()) == []


def test_what_ffmpeg_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho no such encoder >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(video, "ffmpeg", lambda: str(program))
    with pytest.raises(OSError, match=r"ffmpeg could not write .*: no such encoder"):
        video.write(grey([0] * 1000, 240, 320), tmp_path / "a.mp4", fps=20)


@pytest.mark.parametrize(
    ("seconds", "fps", "pictures", "speed"), [(0.02, 25, 50, 25.0), (0.03, 25, 50, 50 / 3)]
)
def test_an_episode_is_shown_at_the_speed_of_simulated_time(
    seconds: float, fps: int, pictures: int, speed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, Any] = {}
    steps = 100
    env = Scripted(["toy/One"], 1, lambda slot, number: steps)

    def read() -> video.State:
        return {"qpos": env.step_number.copy()}

    def render(model: Any, states: list[video.State], settings: video.Settings) -> Iterator[video.Frame]:
        shown["numbers"] = [int(state["qpos"][0]) for state in states]
        return grey([0] * len(states))

    monkeypatch.setattr(video, "simulation", lambda env: video.Simulation(None, read, seconds))
    monkeypatch.setattr(video, "render", render)
    monkeypatch.setattr(video, "write", lambda frames, output, fps: shown.update(fps=fps))
    output = tmp_path / "a.gif"
    frames, result = video.film(Pushing(), env, 3, 0, output, video.Settings(fps=fps))  # type: ignore[arg-type]
    assert frames == pictures
    assert shown["fps"] == pytest.approx(speed)
    assert shown["numbers"] == list(range(0, steps, steps // pictures + (steps % pictures > 0)))
    assert result == pytest.approx(steps)


@contextlib.contextmanager
def filmed(task: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[video.State]]]:
    """Model and states of an episode, without drawing them."""
    caught: list[Any] = []

    def write(frames: Any, output: Path, fps: float) -> None:
        list(frames)

    def render(model: Any, states: list[video.State], settings: video.Settings) -> Iterator[video.Frame]:
        caught.extend((model, states))
        return iter(())

    monkeypatch.setattr(video, "render", render)
    monkeypatch.setattr(video, "write", write)
    with contextlib.closing(envs.make(task, 1, episode_length=steps)) as env:
        video.film(Pushing(), env, 3, 7, Path("unused.gif"), video.Settings(fps=100))  # type: ignore[arg-type]
    yield caught[0], caught[1]


def test_dm_control_is_shown_as_it_was_during_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    require("dmc")
    with filmed("dmc/reacher-easy", 40, monkeypatch) as (model, states):
        import mujoco

        assert len(states) == 20 * 2  # 0.02 s between actions: every one of them
        data = mujoco.MjData(model)
        for before, after in itertools.pairwise(states):
            data.qpos[:], data.qvel[:] = before["qpos"], before["qvel"]
            data.ctrl[:] = 0.3
            mujoco.mj_step(model, data)
            np.testing.assert_allclose(data.qpos, after["qpos"], atol=1e-5)
        # the target stands where this episode has it, not where the next one does
        with contextlib.closing(envs.make("dmc/reacher-easy", 1)) as env:
            first = env.reset_tensors(7)[0].numpy()
            data.qpos[:] = states[0]["qpos"]
            mujoco.mj_forward(model, data)
            seen = data.geom("target").xpos[:2] - data.geom("finger").xpos[:2]
            np.testing.assert_allclose(first[2:4], seen, atol=1e-5)


def test_gymnasium_mujoco_tasks_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    require("gym")
    with filmed("gym/HalfCheetah-v5", 5, monkeypatch) as (model, states):
        assert model.nq == 9
        assert [state["qpos"].shape for state in states] == [(9,)] * 5
        assert not np.array_equal(states[0]["qpos"], states[-1]["qpos"])


@pytest.mark.slow
def test_mjx_states_follow_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    require("mjx")
    with filmed("mjx/CartpoleSwingup", 20, monkeypatch) as (model, states):
        import mujoco

        data = mujoco.MjData(model)
        assert len(states) == 20
        for before, after in itertools.pairwise(states):
            data.qpos[:], data.qvel[:], data.ctrl[:] = before["qpos"], before["qvel"], 0.3
            mujoco.mj_step(model, data)
            np.testing.assert_allclose(data.qpos, after["qpos"], atol=1e-3)


def test_a_task_with_more_observations_than_were_learned_is_refused() -> None:
    env = Scripted(["toy/One"], 1, lambda slot, number: 5)
    env.task_spec = Spec.vectors(41, 1, ("toy/One",))
    with pytest.raises(InputError, match=r"of toy/One are \[41, 1\], those of the agent only \[40, 8\]"):
        video.film(Pushing(), env, 3, 0, Path("unused.gif"), video.Settings())  # type: ignore[arg-type]


def test_a_task_without_a_reachable_simulator_is_refused() -> None:
    require("gymnasium")
    with contextlib.closing(envs.make("gym/Pendulum-v1", 1)) as env:
        env.reset_tensors(0)
        with pytest.raises(InputError, match="gym/Pendulum-v1 cannot be filmed"):
            video.simulation(env)


def drawing(**ways: Any) -> str:
    """A task whose picture number t is of grey level 20 t."""
    import gymnasium

    class Drawing(gymnasium.Env[Any, Any]):
        metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
        observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))
        model = data = "not MuJoCo's"

        def __init__(self, render_mode: str | None = None) -> None:
            self.render_mode = render_mode

        def reset(self, **_: Any) -> Any:
            self.steps = 0
            return np.zeros(1, np.float32), {}

        def step(self, action: Any) -> Any:
            self.steps += 1
            return np.zeros(1, np.float32), 1.0, False, False, {}

        def render(self) -> Any:
            return np.full((8, 12, 3), 20 * self.steps, np.uint8)

    name = f"Drawing{len(gymnasium.registry)}-v0"
    gymnasium.register(name, type("Drawing", (Drawing,), ways), max_episode_steps=6)
    return f"gym/{name}"


def test_a_task_that_draws_itself_is_filmed_by_its_own_pictures(tmp_path: Path) -> None:
    require("gymnasium")
    output = tmp_path / "a.gif"
    with contextlib.closing(envs.make(drawing(), 1, render=True)) as env:
        assert not video.in_mujoco(env)
        frames, total = video.film(Pushing(), env, 3, 0, output, video.Settings(fps=5))  # type: ignore[arg-type]
    assert (frames, total) == (3, 6.0)
    with Image.open(output) as gif:
        assert gif.size == (12, 8)
        for number in range(3):  # every second one of 10 per second
            gif.seek(number)
            assert gif.info["duration"] == 200
            assert np.asarray(gif.convert("L")).mean() == pytest.approx(40 * number, abs=2)


def raising(self: Any) -> Any:
    raise OSError("no screen")


@pytest.mark.parametrize(
    ("ways", "chosen", "told"),
    [
        ({"render": lambda self: None}, {}, "must draw uint8 [height, width, 3], got None"),
        ({"render": lambda self: np.zeros((8, 8, 4), np.uint8)}, {}, "got uint8[8, 8, 4]"),
        ({"render": lambda self: np.zeros((8, 8, 3))}, {}, "got float64[8, 8, 3]"),
        ({"render": raising}, {}, "cannot be filmed: its render raised OSError: no screen"),
        (
            {"__init__": lambda self: None},
            {},
            "cannot be filmed: it draws no pictures (render_mode rgb_array",
        ),
        ({}, {"size": "48x64", "camera": "1"}, "size and camera: ... draws itself"),
    ],
)
def test_a_task_that_cannot_be_shown_as_asked_is_told(
    ways: dict[str, Any], chosen: dict[str, str], told: str, tmp_path: Path
) -> None:
    require("gymnasium")
    settings = video.Settings.parse(chosen.get("size"), 25, chosen.get("camera"))
    output = tmp_path / "a.gif"
    with (
        contextlib.closing(envs.make(drawing(**ways), 1, render=True)) as env,
        pytest.raises(InputError, match=says(told)),
    ):
        video.film(Pushing(), env, 3, 0, output, settings)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_envpool_task_draws_its_first_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    require("envpool")
    with contextlib.closing(envs.make("envpool/Pong-v5", 1, render=True)) as env:
        env.reset_tensors(0)
        source = video.simulation(env)
        assert isinstance(source, video.Pictures)
        frame = source.draw()
    assert frame.dtype == np.uint8
    assert frame.shape[2] == 3
    assert frame.std() > 5


def brc_fast(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "brc_fast", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


@pytest.mark.slow
def test_the_command_films_a_run(tmp_path: Path) -> None:
    require("gym", "train")
    with contextlib.closing(envs.make("gym/InvertedPendulum-v5", 1)) as env:
        sizes = env.observation_size, env.action_size
    run = make_run(tmp_path / "run", ("gym/InvertedPendulum-v5",), sizes=sizes)
    result = brc_fast("video", str(run), "--output", str(tmp_path / "a.gif"), "--size", "48x64")
    if "MuJoCo cannot draw" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (64, 48)
        assert gif.n_frames > 1
        gif.seek(gif.n_frames - 1)
        assert np.asarray(gif.convert("L")).std() > 5  # something can be seen


def test_without_mujoco_the_extra_that_brings_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=r"brc-fast video needs the \[video\] extra"):
        video.require_renderer()


def test_without_a_way_to_draw_one_line_tells_what_to_set_and_install(tmp_path: Path) -> None:
    require("mujoco", "train")
    run = make_run(tmp_path / "run", ("dmc/cartpole-swingup",))
    result = brc_fast("video", str(run), "--output", str(tmp_path / "a.gif"), MUJOCO_GL="disable")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    for word in ("MuJoCo cannot draw with MUJOCO_GL='disable'", "MUJOCO_GL=egl", "libegl1", "libosmesa6"):
        assert word in result.stderr
    assert not (tmp_path / "a.gif").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "nowhere holds no run"),
        (["run", "--task", "dmc/dog-walk"], "run did not learn dmc/dog-walk; its tasks: dmc/dog-run"),
        (["run", "--output", "a.avi"], "output must end in .gif or .mp4, got a.avi"),
        (["run", "--output", "a.mp4"], "a.mp4 needs ffmpeg: install it, or pip install imageio-ffmpeg"),
        (["run", "--output", "no/a.gif"], "there is no folder to write no/a.gif to"),
        (["run", "--size", "big"], "size must be height x width in pixels"),
        (["run", "--fps", "0"], "fps must be in [1, 100], got 0"),
        (["run", "--seed", "-1"], "seed must be 0 or more, got -1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(video, "ffmpeg", lambda: None)
    monkeypatch.setattr(video, "require_renderer", lambda: pytest.fail("the input was not checked first"))
    make_run(Path("run"), ("dmc/dog-run",))
    assert_one_line(["video", *words], told, capsys, tmp_path)


def test_a_camera_that_the_model_lacks_is_refused_with_those_it_has() -> None:
    require("mujoco")
    import mujoco

    cameras = "<camera name='side' pos='0 -3 0'/><camera name='top' pos='0 0 3'/>"
    model = mujoco.MjModel.from_xml_string(
        f"<mujoco><worldbody>{cameras}<geom size='1'/></worldbody></mujoco>"
    )
    found = [video._camera(model, wanted) for wanted in (None, "side", "top", "1", "-1")]
    assert found == [0, 0, 1, 1, -1]
    with pytest.raises(InputError, match=r"camera must be one of 0 side, 1 top, or -1 .*, got '2'"):
        video._camera(model, "2")
