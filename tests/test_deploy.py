"""Policies out of training: for a task's own observations, its own actions, as module, files and on a hub."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import agents
import numpy as np
import pytest
import torch
from extras import require
from refusals import says
from run_folders import SMALL, assert_one_line, make_run
from test_extras import run as run_alone
from torch import Tensor

from brc_fast import BRC, ActorConfig, CriticConfig, InputError, MissingExtraError, Policy
from brc_fast.command import main as cli
from brc_fast.config import CONDITIONINGS
from brc_fast.deploy import policy as module
from brc_fast.kernels import reference
from brc_fast.kernels.stages import Stage
from brc_fast.nn import bodies
from brc_fast.runs.checkpoint import RunFolder
from brc_fast.runs.evaluate import restore
from brc_fast.spec import Native

OBSERVATION, ACTION = 7, 3  # of the widest task
NARROW = Native("toy/Narrow", (("speed", (2,)), ("place", (1, 2))), (-2.0, 0.5), (1.0, 3.0))
WIDE = Native.plain("toy/Wide", OBSERVATION, ACTION)


def agent(tasks: int = 2, **options: Any) -> BRC:
    made = BRC(OBSERVATION, ACTION, tasks, **{**agents.SIZES, **options})
    generator = torch.Generator().manual_seed(5)
    for p in made.actor.parameters():  # biases begin at zero, which would hide what is left out
        p.data += 0.02 * torch.randn(p.shape, generator=generator).to(p.dtype)
    if made.observations is not None:
        for task in range(tasks):
            # also of columns that are padding: whatever they hold is what the agent takes off
            rows = torch.randn(64, OBSERVATION, generator=generator) * 3.0 + 1.0
            made.observations.update(rows, torch.full((64,), task))
    return made


def observations(rows: int, seed: int = 0) -> Tensor:
    """[rows, O] as the task with the narrow observations has them: padded with zeros."""
    out = torch.randn(rows, OBSERVATION, generator=torch.Generator().manual_seed(seed))
    out[:, NARROW.observation_size :] = 0.0
    return out


def scaled(actions: Tensor, task: Native) -> Tensor:
    low, high = (torch.tensor(bound, dtype=actions.dtype) for bound in (task.low, task.high))
    return low + (high - low) * (actions + 1.0) / 2.0


def normed_input(width: int, depth: int, outputs: int) -> tuple[Stage, ...]:
    """A body that norms its whole input."""
    norm = Stage("norm", OBSERVATION + 4, reads=0, after="layer_norm", product=False)
    return norm, Stage("layer", width, reads=1, relu=True), Stage("head", outputs, reads=2)


def of_double(tasks: int = 2, **options: Any) -> tuple[BRC, BRC]:
    """The same agent in float32 and float64."""
    single, double = agent(tasks, **options), agent(tasks, dtype=torch.float64, **options)
    double.actor.load_state_dict(single.actor.state_dict())
    double.critic.load_state_dict(single.critic.state_dict())
    return single, double


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize(
    ("body", "conditioning"),
    [("normed_input", "embedding"), *itertools.product(("bronet", "simba", "mlp"), CONDITIONINGS)],
)
def test_a_policy_acts_as_its_agent_does_in_padded_columns(
    body: str, conditioning: str, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bodies.BODIES, "normed_input", normed_input)
    critic = CriticConfig(width=8, num_atoms=5, conditioning=conditioning)
    if conditioning == "embedding":
        critic = CriticConfig(width=8, num_atoms=5, embedding_size=4)
    monkeypatch.setattr("brc_fast.config.BODIES", list(bodies.BODIES))
    options = {
        "critic": critic,
        "actor": ActorConfig(width=16, body=body),
        "normalize_observations": normalize,
    }
    single, double = of_double(**options)
    policy = Policy.of(single, 1, NARROW)
    seen, ids = observations(40), torch.ones(40, dtype=torch.int64)
    own = seen[:, : NARROW.observation_size]
    wanted = scaled(single.act(seen, ids, deterministic=True)[:, :2], NARROW)
    half = (policy.high - policy.low) / 2.0  # what 1 is scaled to
    assert ((policy(own) - wanted) / half).abs().max() <= 1e-6
    truth = scaled(double.act(seen.double(), ids, deterministic=True)[:, :2], NARROW)
    exact = copy.deepcopy(policy).double()
    assert (exact(own.double()) - truth).abs().max() <= 2e-7  # of folding, which is rounded to float32 once

    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(1)).double()
    mean, raw = double.policy(seen.double(), ids)
    truth = scaled(reference.tanh_gaussian(mean[:, :2], raw[:, :2], noise)[0], NARROW)
    assert (exact(own.double(), noise) - truth).abs().max() <= 1e-6
    assert policy.state_dict().keys() == module._kinds(policy.config).keys()


def test_a_policy_of_one_task_acts_within_the_tasks_bounds() -> None:
    single = agent(1)
    for p in single.actor.parameters():
        p.data *= 4.0  # until actions lie at the ends
    native = Native("toy/Wide", WIDE.observation, (-0.4, -0.1, 0.7), (0.4, 0.3, 1.1))  # none of float32
    actions = Policy.of(single, 0, native)(observations(500, 3) * 10.0).double()
    low, high = torch.tensor(native.low).double(), torch.tensor(native.high).double()
    assert (actions >= torch.tensor([native.low], dtype=torch.float64)).all()
    assert (actions <= torch.tensor([native.high], dtype=torch.float64)).all()
    assert ((actions - low).abs().amin(0) < 1e-6).all()
    assert ((actions - high).abs().amin(0) < 1e-6).all()


def test_rows_have_any_axes_and_arrays_give_arrays() -> None:
    policy = Policy.of(agent(), 1, NARROW)
    seen = observations(24)[:, :4]
    wanted = policy(seen)
    assert torch.allclose(policy(seen.view(2, 3, 4, 4)), wanted.view(2, 3, 4, 2), atol=1e-6)
    assert torch.allclose(policy(seen[0]), wanted[0], atol=1e-6)
    assert policy(seen[:0]).shape == (0, 2)
    arrays = policy(seen.double().numpy())
    assert arrays.dtype == np.float32
    assert np.array_equal(arrays, wanted.numpy())
    assert np.array_equal(policy(seen.tolist()), arrays)
    parts = {"place": seen[:, 2:].reshape(24, 1, 2).numpy(), "speed": seen[:, :2].numpy()}
    assert np.array_equal(policy(parts), arrays)
    with pytest.raises(ValueError, match=says("parts speed, place, got speed")):
        policy({"speed": seen[:, :2].numpy()})
    with pytest.raises(ValueError, match=says("place must have shape [.., 1, 2], got [24, 2]")):
        policy({**parts, "place": seen[:, 2:].numpy()})
    with pytest.raises(ValueError, match=says("toy/Narrow must have shape [.., 4], got [24, 7]")):
        policy(observations(24))
    with pytest.raises(ValueError, match=says("noise must have shape [24, 2], got [24, 3]")):
        policy(seen, torch.zeros(24, 3))


def test_samples_come_from_the_generator_and_gradients_reach_the_observations_alone() -> None:
    policy = Policy.of(agent(), 1, NARROW)
    seen = observations(9)[:, :4].requires_grad_()
    drawn = [policy(seen, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    noise = torch.empty(9, 2).normal_(generator=torch.Generator().manual_seed(3))
    assert torch.equal(policy(seen, noise), drawn[0])
    policy(seen).sum().backward()
    assert seen.grad is not None
    assert seen.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in policy.parameters())
    assert torch.equal(pickle.loads(pickle.dumps(policy))(seen), policy(seen))


def test_a_task_that_does_not_fit_the_agent_is_refused() -> None:
    with pytest.raises(ValueError, match=says("at most as many numbers as the agent, [7, 3], got [8, 3]")):
        Policy.of(agent(), 0, Native.plain("toy/Wider", 8, 3))
    with pytest.raises(ValueError, match=says("[0, 2), got 2")):
        Policy.of(agent(), 2, NARROW)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"task": 3}, "task must be a name"),
    ({"observation": []}, "observation of 'a/b' must be"),
    ({"observation": [["x", [-1]]]}, "observation of 'a/b' must be"),
    ({"observation": [["x", [2]], ["x", [2]]]}, "different names"),
    ({"observation": [["x", [0]]]}, "different names"),
    ({"low": [-1.0]}, "got 1 and 2"),
    ({"low": ["-1", "-1"]}, "lists of numbers"),
    ({"low": [1.0, -1.0]}, "action 0 of 'a/b' must have low below high"),
    ({"high": [1.0, 1e30]}, "action 1"),
    ({"more": 1}, "a task must have"),
]


@pytest.mark.parametrize(("change", "told"), WRONG)
def test_a_task_is_told_as_json_and_nothing_else_is_one(change: dict[str, Any], told: str) -> None:
    native = Native("a/b", (("x", (2, 3)),), (-1.0, -1.0), (1.0, 2.0))
    assert Native.of(json.loads(json.dumps(native.describe()))) == native
    with pytest.raises(ValueError, match=says(told)):
        Native.of(native.describe() | change)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by the first test that needs it."""
    return tmp_path_factory.mktemp("original") / "run"


@pytest.fixture
def run(toy: dict, original: Path, tmp_path: Path) -> Path:
    """A run of two tasks that the trainer made, with a best checkpoint."""
    words = [
        "train",
        "toy/One",
        "toy/Two",
        "--run",
        str(original),
        "--normalize-observations",
        *SMALL,
    ]
    if not original.exists():
        assert cli.main([*words, "--quiet"]) == 0
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def test_a_trained_run_gives_the_policy_of_each_task_and_checkpoint(run: Path) -> None:
    assert RunFolder(run).natives() == {name: Native.plain(name, 3, 1) for name in ("toy/One", "toy/Two")}
    seen = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for number, task in enumerate(("toy/One", "toy/Two")):
        for checkpoint in ("last", "best", 20):
            policy = Policy.from_run(run, task, checkpoint)
            step, whole = restore(RunFolder(run), "cpu", str(checkpoint))
            wanted = whole.act(seen, torch.full((6,), number), deterministic=True)
            assert (policy(seen) - wanted).abs().max() <= 1e-6
            assert (policy.config.run, policy.config.step) == ("run", step)
    with pytest.raises(InputError, match=says("several tasks, name one: toy/One, toy/Two")):
        Policy.from_run(run)
    with pytest.raises(InputError, match=says("did not learn toy/Three; its tasks: toy/One, toy/Two")):
        Policy.from_run(run, "toy/Three")
    with pytest.raises(InputError, match=says("no checkpoint 30, only 20, 40")):
        Policy.from_run(run, "toy/One", 30)


def test_a_run_of_an_older_version_asks_its_task_or_says_what_is_missing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Policy.from_run(run, "toy/One").config
    (run / "tasks.json").unlink()
    assert Policy.from_run(run, "toy/One").config == wanted

    def missing(*_: Any, **__: Any) -> None:
        raise MissingExtraError("toy/... environments", "toy")

    monkeypatch.setattr("brc_fast.envs.make", missing)
    with pytest.raises(
        InputError, match=says('as an older version wrote it ... pip install "brc-fast[toy]"')
    ):
        Policy.from_run(run, "toy/One")
    here = tmp_path / "here"
    here.mkdir()
    (here / "foreign_module.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    other = make_run(tmp_path / "other", ("gym/foreign_module:X-v0",))
    with pytest.raises(InputError, match="would import the module foreign_module"):
        Policy.from_run(other)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2, "tasks": []}', '{"format": 1, "tasks": [3]}']
)
def test_a_damaged_list_of_tasks_is_named(text: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ("toy/One",))
    (folder / "tasks.json").write_text(text)
    with pytest.raises(InputError, match=says("tasks.json cannot be read")):
        Policy.from_run(folder)


@pytest.mark.parametrize("task", ["gym/Pendulum-v1", "gym/HalfCheetah-v5", "gym/Humanoid-v5"])
def test_actions_of_a_run_are_what_its_environment_is_given(task: str) -> None:
    require("gym")
    from brc_fast import envs
    from brc_fast.envs.base import natives_of

    env = envs.make(task, 2)
    (native,) = natives_of(env)
    single = BRC(env.observation_size, env.action_size, **agents.SIZES)
    policy = Policy.of(single, 0, native)
    seen = env.reset_tensors(0)
    assert policy(seen).shape == (2, env.action_size)
    given = env._native(single.act(seen, deterministic=True))
    assert np.abs(policy(seen).numpy() - given).max() <= 1e-6
    space = env.venv.single_action_space
    assert np.array_equal([native.low, native.high], [space.low, space.high])
    assert space.contains(policy(seen[0].numpy()))
    env.close()


def test_a_dictionary_of_observations_is_told_part_by_part() -> None:
    require("gym")
    import gymnasium
    from gymnasium import spaces

    from brc_fast.envs.vector import native_of, spec_of

    space = spaces.Dict(
        {
            "b": spaces.Box(-1, 1, (2, 2)),
            "a": spaces.Dict({"c": spaces.Box(-1, 1, (3,)), "d": spaces.Box(-1, 1, ())}),
        }
    )
    box = spaces.Box(np.float32([-1, 0]), np.float32([1, 5]))
    native = native_of(spec_of("a/b", space, box), space, box)
    assert native.observation == (("a.c", (3,)), ("a.d", ()), ("b", (2, 2)))
    assert (native.low, native.high) == ((-1.0, 0.0), (1.0, 5.0))
    flat = gymnasium.spaces.flatten(space, sample := space.sample())
    policy = Policy.of(BRC(8, 2, **agents.SIZES), 0, native)
    parts = {"a.c": sample["a"]["c"], "a.d": sample["a"]["d"], "b": sample["b"]}
    assert np.array_equal(policy(parts), policy(flat))


def test_what_the_critic_alone_sees_is_no_part_of_a_policys_observation() -> None:
    require("gym")
    from gymnasium import spaces

    from brc_fast.envs.vector import native_of, spec_of

    seen, beside, box = (spaces.Box(-1, 1, (size,)) for size in (3, 5, 2))
    robot = spaces.Dict([("state", seen), ("privileged_state", beside)])
    assert native_of(spec_of("a/b", robot, box, 5), robot, box).observation == (("state", (3,)),)
    flat = spaces.Box(-1, 1, (8,))
    assert native_of(spec_of("a/b", flat, box, 5), flat, box).observation == (("observation", (3,)),)


def test_a_saved_policy_is_the_same_and_of_its_own_kind_of_files(tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"normalize_observations": True})):
        policy = Policy.of(agent(**options), 1, NARROW, run="runs/x", step=40)
        folder = tmp_path / str(number)
        policy.save_pretrained(folder)
        again = Policy.from_pretrained(folder)
        seen = observations(5)[:, :4]
        assert torch.equal(again(seen), policy(seen))
        assert again.config == policy.config
        assert {path.name for path in folder.iterdir()} - {"README.md"} == {
            "config.json",
            "model.safetensors",
        }
        again.save_pretrained(folder)  # over itself


def edited(folder: Path, **changes: Any) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | changes))


def flipped(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def pickled(folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, folder / "model.safetensors")


DAMAGES: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no policy: config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "config of text": (lambda f: (f / "config.json").write_text("[1"), "config.json is damaged"),
    "another model's": (
        lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
        "no policy of brc-fast",
    ),
    "another format": (lambda f: edited(f, format="brc_fast.Policy/2"), "brc_fast.Policy/1"),
    "a huge width": (lambda f: edited(f, width=2**40), "width must be in"),
    "another width": (lambda f: edited(f, width=17), "must have shape"),
    "another body": (lambda f: edited(f, body="transformer"), "body must be one of"),
    "no checksum": (lambda f: edited(f, weights=None), "no size and checksum"),
    "a task of other sizes": (
        lambda f: edited(f, task=NARROW.describe() | {"low": [0.0], "high": [1.0]}),
        "shape",
    ),
    "a flipped bit": (flipped, "checksum differs"),
    "a pickle": (pickled, "model.safetensors is damaged"),
    "a link": (
        lambda f: (f / "model.safetensors").rename(f / "a") and (f / "model.safetensors").symlink_to(f / "a"),
        "model.safetensors must be a regular file",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, told = DAMAGES[name]
    Policy.of(agent(), 1, NARROW).save_pretrained(tmp_path / "policy")
    change(tmp_path / "policy")
    with pytest.raises(InputError, match=says(f"{tmp_path / 'policy'} ... {told}")):
        Policy.from_pretrained(tmp_path / "policy")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    policy = Policy.of(agent(), 1, NARROW)
    next(policy.parameters()).data.fill_(torch.nan)
    policy.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="finite"):
        Policy.from_pretrained(tmp_path)


ALONE = """
import torch
import brc_fast as brc
from brc_fast.spec import Native
policy = brc.Policy.of(brc.BRC(3, 1, actor=brc.ActorConfig(width=8), critic=brc.CriticConfig(width=8)), 0,
                       Native.plain("a/b", 3, 1))
policy.save_pretrained("policy")
again = brc.Policy.from_pretrained("policy")
assert torch.equal(again(torch.ones(2, 3)), policy(torch.ones(2, 3)))
for call in (lambda: policy.push_to_hub("a/b"), lambda: brc.Policy.from_pretrained("nobody/nothing")):
    try: call()
    except brc.MissingExtraError as error: print(error)
"""


def test_a_policy_needs_torch_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    told = run_alone(ALONE, [], tmp_path).splitlines()
    assert len(told) == 2
    assert all('pip install "brc-fast[hub]"' in line for line in told)
    assert {path.name for path in (tmp_path / "policy").iterdir()} == {"config.json", "model.safetensors"}


def test_the_hub_is_given_the_same_files_and_a_repository_gives_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("hub")
    import huggingface_hub
    from huggingface_hub import hub_mixin

    sent = tmp_path / "sent"

    class Api:
        def __init__(self, **_: Any) -> None: ...
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Created", (), {"repo_id": repo_id})()

        def upload_folder(self, folder_path: Path, **_: Any) -> str:
            Path(folder_path).rename(sent)
            return "done"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    policy = Policy.of(agent(), 1, NARROW)
    assert isinstance(policy, huggingface_hub.PyTorchModelHubMixin)
    assert policy.push_to_hub("someone/policy") == "done"
    assert (sent / "README.md").exists()

    def download(repository: str, name: str, **hub: Any) -> str:
        assert (repository, hub) == ("someone/policy", {"revision": "main"})
        (tmp_path / "snapshots").mkdir(exist_ok=True)
        (tmp_path / "snapshots" / name).symlink_to(sent / name)  # as the cache of the hub has them
        return str(tmp_path / "snapshots" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    again = Policy.from_pretrained("someone/policy", revision="main")
    assert torch.equal(again(torch.ones(1, 4)), policy(torch.ones(1, 4)))
    monkeypatch.undo()
    with pytest.raises(InputError, match=says("nobody/nothing is no folder")):
        Policy.from_pretrained("nobody/nothing", local_files_only=True)


@pytest.mark.parametrize("sample", [False, True], ids=["mean", "sample"])
def test_onnx_acts_as_the_policy_for_any_rows_and_says_what_it_is(sample: bool, tmp_path: Path) -> None:
    require("onnx")
    import onnx
    import onnxruntime

    from brc_fast.deploy.export import export

    policy = Policy.of(agent(normalize_observations=True), 1, NARROW, run="toy", step=40)
    difference = export(policy, tmp_path / "a.onnx", sample=sample)
    assert difference is not None
    assert difference <= (1e-5 if sample else 3e-6)  # a sample has up to e^2 times the mean's rounding
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for rows in (1, 5, 64):
        given = {"observations": observations(rows, 8)[:, :4]}
        if sample:
            given["noise"] = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
        (found,) = session.run(["actions"], {name: x.numpy() for name, x in given.items()})
        assert np.abs(found - policy(*given.values()).numpy()).max() <= (1e-5 if sample else 3e-6)
    model = onnx.load(tmp_path / "a.onnx")
    told = {each.key: each.value for each in model.metadata_props}
    assert told == {
        "task": "toy/Narrow",
        "observation_size": "4",
        "observation": '[["speed", [2]], ["place", [1, 2]]]',
        "action_size": "2",
        "action_low": "[-2.0, 0.5]",
        "action_high": "[1.0, 3.0]",
        "precision": "float32",
        "run": "toy",
        "step": "40",
        "brc_fast": policy.config.version,
        "actions": "sample" if sample else "mean",
    }
    assert model.opset_import[0].version == 18
    assert str(Path(__file__).parent) not in str(model)


def test_a_file_of_torch_export_acts_as_the_policy(tmp_path: Path) -> None:
    require("onnx")
    from brc_fast.deploy.export import export

    policy = Policy.of(agent(), 1, NARROW)
    assert export(policy, tmp_path / "a.pt2") == 0.0
    extra = {"brc_fast.json": ""}
    loaded = torch.export.load(tmp_path / "a.pt2", extra_files=extra).module()
    seen = observations(33)[:, :4]
    assert torch.allclose(loaded(seen), policy(seen), atol=1e-6)
    assert json.loads(extra["brc_fast.json"])["task"] == "toy/Narrow"


def test_what_was_written_wrongly_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("onnx")
    from brc_fast.deploy import export as exporting

    policy = Policy.of(agent(), 1, NARROW)
    wrong = b"file", lambda inputs: policy(*inputs) + 0.01
    monkeypatch.setattr(exporting, "_pt2", lambda *_: wrong)
    with pytest.raises(RuntimeError, match="acts differently"):
        exporting.export(policy, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


def test_the_command_exports_and_refuses_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("onnx")
    assert cli.main(["export", str(run), "--task", "toy/Two", "--checkpoint", "best"]) == 0
    assert says("policy-toy-Two.onnx: toy/Two at step")[:5] in capsys.readouterr().out
    assert (run / "policy-toy-Two.onnx").exists()
    for words, told in (
        ([], "several tasks, name one: toy/One, toy/Two"),
        (["--task", "toy/Three"], "its tasks: toy/One, toy/Two"),
        (["--task", "toy/One", "--checkpoint", "30"], "no checkpoint 30"),
        (["--task", "toy/One", "--to", str(run / "a.tflite")], "must end in .onnx or .pt2"),
        (["--task", "toy/One", "--to", str(run / "no" / "a.onnx")], "no folder to write"),
        (["--task", "toy/One", "--opset", "11"], "opset 11 is too old"),
        (["--task", "toy/One", "--opset", "40"], "opset 40 is newer"),
        (["--task", "toy/One", "--opset", "18", "--to", str(run / "a.pt2")], "of .onnx files alone"),
    ):
        assert_one_line(["export", str(run), *words], told, capsys, run)
    (run / "link.onnx").symlink_to(run / "config.json")
    assert_one_line(
        ["export", str(run), "--task", "toy/One", "--to", str(run / "link.onnx")], "link.onnx", capsys
    )
    assert_one_line(["export", str(run / "no")], "holds no run", capsys)


def test_what_an_export_lacks_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require("onnx")
    from brc_fast.deploy import export as exporting

    find = exporting.importlib.util.find_spec
    monkeypatch.setattr(
        exporting.importlib.util, "find_spec", lambda name: find(name) if name != "onnx" else None
    )
    assert_one_line(["export", str(run), "--task", "toy/One"], 'pip install "brc-fast[onnx]"', capsys, run)
