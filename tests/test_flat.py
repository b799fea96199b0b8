"""Parameters in flat buffers: modules, checkpoints and copies must not be able to tell."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Generator, Tensor, nn

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, LearningConfig, Noise, kernels
from brc_fast.learner.flat import FlatNetworks
from brc_fast.nn.modules import Actor, Critic, Temperature

# No size is a multiple of anything, so that there is padding everywhere.
CRITIC = CriticConfig(width=19, depth=2, num_atoms=11, embedding_size=3)
ACTOR = ActorConfig(width=13, depth=1)
OBS, A, T = 5, 2, 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a run; small products only wait for more of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def agent(tasks: int = T, seed: int = 0, **options: object) -> BRC:
    critic = options.pop("critic", CRITIC)
    return BRC(OBS, A, tasks, critic=critic, actor=ACTOR, seed=seed, **options)  # type: ignore[arg-type]


def batches(updates: int, tasks: int = T, rows: int = 10, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    observations, actions, successors = (torch.randn(updates, rows, n, generator=rng) for n in (OBS, A, OBS))
    rewards, masks = torch.rand(2, updates, rows, generator=rng)
    ids = torch.randint(tasks, (updates, rows), generator=rng)
    return Batch(observations, actions.tanh(), rewards, (masks > 0.1).float(), successors, ids)


def parts(of: BRC) -> list[tuple[FlatNetworks, list[nn.Module]]]:
    """Flat buffers and the modules that live in them, in order."""
    return [
        (of.critics, [of.critic, of.target_critic]),
        (of.actors, [of.actor]),
        (of.temperature_optimizer.networks, [of.temperature]),
    ]


def used(networks: FlatNetworks, modules: list[nn.Module]) -> Tensor:
    """Which elements of the buffer belong to a parameter: written through the modules, read in the buffer."""
    kept = networks.master.clone()
    networks.master.zero_()
    for module in modules:
        for parameter in module.parameters():
            assert (parameter == 0).all(), "two parameters share memory, or one is no view"
            parameter.data.fill_(1.0)
    mask = networks.master != 0
    networks.master.copy_(kept)
    return mask


@pytest.mark.parametrize("tasks", [1, T])
@pytest.mark.parametrize("depth", [0, 2])
def test_modules_have_the_names_shapes_and_values_of_modules_built_alone(tasks: int, depth: int) -> None:
    config = CriticConfig(width=19, depth=depth, num_atoms=11, embedding_size=3)
    mine = agent(tasks, seed=4, critic=config)
    rng = Generator().manual_seed(4)
    fresh = {
        "critic": Critic(OBS, A, tasks, config, rng),
        "actor": Actor(OBS, A, ACTOR, mine.critic.conditioning, rng),
        "temperature": Temperature(0.1),
    }
    for name, module in fresh.items():
        state, expected = getattr(mine, name).state_dict(), module.state_dict()
        assert list(state) == list(expected)
        for key, value in expected.items():
            assert torch.equal(state[key], value), f"{name}: {key}"
        own = [n for n, _ in getattr(mine, name).named_parameters()]
        assert own == [key for key in expected if key != "atoms"]
    target = mine.target_critic.state_dict()
    assert all(torch.equal(target[key], value) for key, value in mine.critic.state_dict().items())
    assert not any(p.requires_grad for p in mine.target_critic.parameters())


@pytest.mark.parametrize("tasks", [1, T])
def test_every_parameter_is_a_view_of_its_networks_row(tasks: int) -> None:
    mine = agent(tasks)
    for networks, modules in parts(mine):
        members, length = networks.grad.shape
        assert networks.master.shape == (len(modules) * members, length)
        assert networks.master.is_contiguous()
        first = networks.master.data_ptr() // 4
        for index, module in enumerate(modules):
            for name, parameter in module.named_parameters():
                assert parameter.untyped_storage().data_ptr() == networks.master.data_ptr(), name
                stacked = name.startswith("body.")
                for member, one in enumerate(parameter.detach() if stacked else [parameter.detach()]):
                    start = one.data_ptr() // 4 - first
                    end = start + sum((n - 1) * s for n, s in zip(one.shape, one.stride(), strict=True))
                    row = index * members + member
                    assert row * length <= start <= end < (row + 1) * length, name
        mask = used(networks, modules)
        assert mask.sum() == sum(p.numel() for module in modules for p in module.parameters())
    assert mine.critic_optimizer.flat.data_ptr() == mine.critics.master.data_ptr()
    assert mine.critic_optimizer.target is not None
    assert mine.critic_optimizer.target.data_ptr() == mine.critics.master[2:].data_ptr()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tasks", [1, T])
def test_padding_stays_exactly_zero(tasks: int, precision: str) -> None:
    learning = LearningConfig(weight_decay=0.1, learning_rate=0.01)
    mine = agent(tasks, precision=precision, learning=learning)
    masks = [used(*part) for part in parts(mine)]
    assert not masks[0].all()
    assert not masks[1].all()
    mine.update(batches(40, tasks))
    optimizers = mine.critic_optimizer, mine.actor_optimizer, mine.temperature_optimizer
    for (networks, _), mask, optimizer in zip(parts(mine), masks, optimizers, strict=True):
        online = mask[: networks.members]
        buffers = {
            "master": (networks.master, mask),
            "grad": (networks.grad, online),
            "exp_avg": (optimizer.exp_avg.view(online.shape), online),
            "exp_avg_sq": (optimizer.exp_avg_sq.view(online.shape), online),
        }
        if networks.low is not None:
            buffers["low"] = networks.low, mask
        for name, (buffer, inside) in buffers.items():
            assert (buffer[~inside] == 0).all(), name
            assert buffer[inside].isfinite().all()
            # a ReLU that never opens, and atoms that no target reaches, leave few gradients at zero
            assert (buffer[inside] != 0).float().mean() > 0.8, name
    assert (mine.critics.low is None) == (precision == "fp32")


@pytest.mark.parametrize("body", ["bronet", "simba", "mlp"])
@pytest.mark.parametrize("tasks", [1, T])
def test_views_by_name_and_padding_are_all_of_a_row_but_what_aligns_it(tasks: int, body: str) -> None:
    mine = agent(tasks, critic=CriticConfig(width=19, num_atoms=11, embedding_size=3, body=body))
    for networks, modules in parts(mine):
        rows = torch.zeros_like(networks.grad)
        views, padding = networks.named(rows), networks.layout.padding(rows)
        parameters = dict(modules[0].named_parameters())
        assert list(views) == list(parameters)
        for number, (name, view) in enumerate(views.items(), start=1):
            assert view.shape == parameters[name].shape
            assert not view.any(), name  # nor does it lie in another
            view.fill_(number)
        assert torch.equal(rows != 0, used(networks, modules)[: networks.members])
        assert not any(view.any() for view in padding)
        for view in padding:
            view.fill_(-1.0)
        whole = networks.layout.body(rows)
        assert all((view != 0).all() for view in whole.values())
        assert {f"body.{name}" for name in whole} == {n for n in parameters if n.startswith("body.")}


def test_products_take_low_precision_copies_and_passes_the_parameters_themselves() -> None:
    mine = agent(precision="bf16")
    low = mine.critics.body(2)
    vectors = {name for name, p in low.items() if p.dtype == torch.float32}
    products = {
        name for name in low if name.endswith("kernel")
    }  # biases too where it is a GPU that adds them
    assert vectors == low.keys() - products
    assert all(len(p) == 2 * mine.critics.members for p in low.values())
    assert {g.dtype for g in mine.critics.gradients().values()} == {torch.bfloat16}
    for name, p in low.items():
        exact = agent().critics.body(2)[name]
        assert torch.equal(p.float(), exact if name in vectors else exact.bfloat16().float()), name


@pytest.mark.parametrize("tasks", [1, T])
def test_moments_are_saved_without_padding_by_the_names_of_the_parameters(tasks: int) -> None:
    mine = agent(tasks)
    for module, optimizer in (
        (mine.critic, mine.critic_optimizer),
        (mine.actor, mine.actor_optimizer),
        (mine.temperature, mine.temperature_optimizer),
    ):
        for parameter in module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape))
        optimizer.exp_avg.copy_(optimizer.flat)
        optimizer.exp_avg_sq.copy_(-optimizer.flat)
        optimizer.step_count.fill_(9.0)
        state = {name: value.clone() for name, value in optimizer.state_dict().items()}
        named = dict(module.named_parameters())
        moments = {f"{moment}/{name}" for moment in ("exp_avg", "exp_avg_sq") for name in named}
        assert state.keys() == {"step", *moments}
        for name, parameter in named.items():
            assert torch.equal(state[f"exp_avg/{name}"], parameter)
            assert torch.equal(state[f"exp_avg_sq/{name}"], -parameter)
        assert state["step"] == 9.0
        optimizer.exp_avg.fill_(float("nan"))
        optimizer.exp_avg_sq.fill_(float("nan"))
        optimizer.step_count.zero_()
        optimizer.load_state_dict(state)
        for whole, expected in ((optimizer.exp_avg, optimizer.flat), (optimizer.exp_avg_sq, -optimizer.flat)):
            networks = optimizer.networks
            mine_by_name, theirs = (networks.named(x.view(networks.grad.shape)) for x in (whole, expected))
            assert all(torch.equal(mine_by_name[name], theirs[name]) for name in named)
            assert not any(view.any() for view in networks.layout.padding(whole.view(networks.grad.shape)))
        assert optimizer.step_count == 9.0


@pytest.mark.parametrize("tasks", [1, T])
def test_a_checkpoint_does_not_depend_on_the_padding(monkeypatch: pytest.MonkeyPatch, tasks: int) -> None:
    one = agent(tasks)
    one.update(batches(5, tasks))
    state = {name: value.clone() for name, value in one.state_dict().items()}
    monkeypatch.setattr("brc_fast.learner.layout.ALIGNMENT", 256)
    monkeypatch.setattr("brc_fast.learner.layout.PAD", 32)
    two = agent(tasks, seed=8)
    assert two.critics.grad.shape[1] > one.critics.grad.shape[1]
    two.load_state_dict(state)
    for name, value in two.state_dict().items():
        assert torch.equal(value, state[name]), name
    two.update(batches(5, tasks, seed=1))
    monkeypatch.undo()
    one.update(batches(5, tasks, seed=1))
    for name, value in two.state_dict().items():
        torch.testing.assert_close(value, one.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("tasks", [1, T])
def test_loading_a_module_renews_the_copies_that_products_take(tasks: int) -> None:
    mine, other = agent(tasks, precision="bf16"), agent(tasks, seed=5, precision="bf16")
    other.update(batches(3, tasks))
    for networks, modules in parts(mine)[:2]:
        assert networks.low is not None
        assert torch.equal(networks.low, networks.master.bfloat16())
        for index, module in enumerate(modules):
            name = {0: "actor" if len(modules) == 1 else "critic", 1: "target_critic"}[index]
            module.load_state_dict(copy.deepcopy(getattr(other, name).state_dict()))
            assert torch.equal(networks.low, networks.master.bfloat16())
            for key, value in getattr(other, name).state_dict().items():
                assert torch.equal(module.state_dict()[key], value), key
    mine.load_state_dict(other.state_dict())
    assert torch.equal(mine.critics.low, other.critics.low)  # type: ignore[arg-type]
    data, noise = batches(3, tasks, seed=2), Noise(torch.randn(3, 10, A), torch.randn(3, 10, A))
    mine.update(data, noise)
    other.update(data, noise)
    for networks, expected in ((mine.critics, other.critics), (mine.actors, other.actors)):
        assert networks.low is not None
        assert torch.equal(networks.low, networks.master.bfloat16())
        assert torch.equal(networks.master, expected.master)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copied_network_is_independent_and_works(how: str, precision: str) -> None:
    mine = agent(precision=precision)
    mine.update(batches(2))
    arguments = torch.randn(4, OBS), torch.rand(4, A), torch.tensor([0, 1, 2, 0])
    for module in (mine.critic, mine.actor, mine.target_critic):
        twin = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
        before = {name: value.clone() for name, value in module.state_dict().items()}
        assert list(twin.state_dict()) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in module.parameters()]
        if isinstance(module, Critic):
            assert torch.equal(twin(*arguments), module(*arguments))
        master = (mine.critics.master.clone(), mine.actors.master.clone())
        low = None if mine.critics.low is None else mine.critics.low.clone()
        for parameter in twin.parameters():
            parameter.data.zero_()
        changed = {name: value + 1.0 for name, value in before.items() if name != "atoms"}
        twin.load_state_dict(before | changed)
        assert torch.equal(mine.critics.master, master[0])
        assert torch.equal(mine.actors.master, master[1])
        assert low is None or torch.equal(low, mine.critics.low)  # type: ignore[arg-type]
        module.load_state_dict(before)
        if isinstance(module, Critic):  # its forward pass reads what it was given, not what it came from
            assert not torch.equal(twin(*arguments), module(*arguments))


def test_parameters_given_to_a_call_are_those_that_it_takes() -> None:
    """torch.func.functional_call, as for vmap over models; they get the gradients too."""
    module, other = agent().critic, agent(seed=5).critic
    arguments = torch.randn(4, OBS), torch.rand(4, A), torch.tensor([0, 1, 2, 0])
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    out = torch.func.functional_call(module, given, arguments)
    assert torch.equal(out, other(*arguments))
    assert not torch.equal(out, module(*arguments))
    out.square().sum().backward()
    assert all(p.grad is not None for p in given.values())
    assert all(p.grad is None for p in module.parameters())


def test_vmap_over_the_parameters_of_several_networks_is_each_alone() -> None:
    nets = [copy.deepcopy(agent(seed=seed).critic) for seed in (1, 2, 3)]
    parameters, buffers = torch.func.stack_module_state(nets)
    arguments = torch.randn(4, OBS), torch.rand(4, A), torch.tensor([0, 1, 2, 0])

    def call(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(nets[0], (values, buffers), arguments)  # type: ignore[no-any-return]

    for out, net in zip(torch.func.vmap(call)(parameters), nets, strict=True):
        torch.testing.assert_close(out, net(*arguments))


def test_a_users_gradients_of_each_row_have_the_mean_of_the_batchs() -> None:
    """torch.func: vmap of grad of a loss of the critic, whose values differ from row to row too."""
    critic = agent().critic
    rows = torch.randn(4, OBS), torch.rand(4, A), torch.tensor([0, 1, 2, 0]), torch.randn(4, 2)

    def loss(parameters: dict[str, Tensor], *row: Tensor) -> Tensor:
        *arguments, values = (x.unsqueeze(0) for x in row)
        logits = torch.func.functional_call(critic, parameters, tuple(arguments))
        return kernels.two_hot_cross_entropy(logits, values.T, v_max=10.0).mean()

    parameters = {name: p.detach() for name, p in critic.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0))(parameters, *rows)
    kernels.two_hot_cross_entropy(critic(*rows[:3]), rows[3].T, v_max=10.0).mean().backward()
    for name, parameter in critic.named_parameters():
        torch.testing.assert_close(each[name].mean(0), parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parameters_that_a_load_puts_in_place_are_taken_into_the_buffer(precision: str) -> None:
    mine, other = agent(precision=precision), agent(seed=5, precision=precision)
    for name in ("critic", "target_critic", "actor"):
        state = copy.deepcopy(getattr(other, name).state_dict())
        getattr(mine, name).load_state_dict(state, assign=True)
    arguments = torch.randn(4, OBS), torch.rand(4, A), torch.tensor([0, 1, 2, 0])
    assert torch.equal(mine.critic(*arguments), other.critic(*arguments))
    assert torch.equal(mine.critics.master, other.critics.master)
    data, noise = batches(3), Noise(torch.randn(3, 10, A), torch.randn(3, 10, A))
    mine.update(data, noise)
    other.update(data, noise)
    for name, value in other.critic.state_dict().items():
        assert torch.equal(mine.critic.state_dict()[name], value), name
    alone = copy.deepcopy(mine.critic)
    zeros = {name: torch.zeros_like(p) for name, p in alone.named_parameters()}
    alone.load_state_dict(alone.state_dict() | zeros, assign=True)
    assert not any(p.any() for p in alone.parameters())
    assert mine.critics.master.any()


def _another_object(module: nn.Module, name: str) -> None:
    """A parameter in the same memory, changed as often as the one that it replaces."""
    old = module.get_parameter(name)
    new = nn.Parameter(old.data, old.requires_grad)
    new.mul_(0.5)
    while new._version < old._version:
        new.add_(0.0)
    owner, _, own = name.rpartition(".")
    setattr(module.get_submodule(owner), own, new)


def _another_module(module: nn.Module, name: str) -> None:
    """The part that holds the parameter is replaced as a whole."""
    place = name.rpartition(".")[0]
    new = copy.deepcopy(module.get_submodule(place))
    new.get_parameter(name.rpartition(".")[2]).mul_(0.5)
    if place:
        owner, _, own = place.rpartition(".")
        setattr(module.get_submodule(owner), own, new)
    else:
        module.load_state_dict(new.state_dict())


def _of_inference_mode(module: nn.Module, name: str) -> None:
    with torch.inference_mode():
        owner, _, own = name.rpartition(".")
        old = module.get_parameter(name)
        setattr(module.get_submodule(owner), own, nn.Parameter(0.5 * old, old.requires_grad))


BY_HAND = {
    "in place": lambda module, name: module.get_parameter(name).mul_(0.5),
    "data": lambda module, name: setattr(
        module.get_parameter(name), "data", 0.5 * module.get_parameter(name).data
    ),
    "vector_to_parameters": lambda module, name: nn.utils.vector_to_parameters(
        0.5 * module.get_parameter(name).reshape(-1), [module.get_parameter(name)]
    ),
    "object": _another_object,
    "module": _another_module,
    "inference mode": _of_inference_mode,
}


@pytest.mark.parametrize("how", BY_HAND)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["critic.body.head.kernel", "target_critic.embedding", "actor.body.input.bias"]
)
def test_parameters_set_by_hand_are_those_of_the_next_update(name: str, precision: str, how: str) -> None:
    mine, other = (agent(T, precision=precision) for _ in range(2))
    data = batches(1, T, rows=8)
    for one in (mine, other):
        one.update(data)
    module, own = name.split(".", 1)
    with torch.no_grad():
        BY_HAND[how](getattr(mine, module), own)
    state = other.state_dict()
    state[name.replace(".", "/", 1)].mul_(0.5)
    other.load_state_dict({key: value.clone() for key, value in state.items()})
    for one in (mine, other):
        one.update(data)
    for key, value in other.state_dict().items():
        assert torch.equal(mine.state_dict()[key], value), key


FROM_UNDER_IT = {
    "frozen": (lambda critic: critic.embedding.requires_grad_(False), "embedding has requires_grad=False"),
    "double": (lambda critic: critic.double(), "must stay torch.float32 on cpu, got torch.float64 on cpu"),
    "meta": (lambda critic: critic.body.head.to("meta"), "body.head.kernel must stay .* got .* on meta"),
    "parametrized": (
        lambda critic: nn.utils.parametrizations.orthogonal(critic.body.head, "kernel"),
        "body.head.kernel is no parameter of its module any more",
    ),
    "removed": (
        lambda critic: delattr(critic.body, "head"),
        "body.head.kernel is no parameter of its module any more",
    ),
    "tied": (
        lambda critic: setattr(critic.body.blocks[1][0], "kernel", critic.body.blocks[0][1].kernel),
        "body.blocks.1.0.kernel is the same parameter as body.blocks.0.1.kernel",
    ),
    "shape": (
        lambda critic: setattr(critic.embedding, "data", torch.zeros(1)),
        r"embedding must have shape \[3, 3\], got \[1\]",
    ),
}


@pytest.mark.parametrize("how", FROM_UNDER_IT)
def test_a_parameter_taken_from_under_the_agent_is_named(how: str) -> None:
    mine = agent(T)
    data = batches(1, T, rows=8)
    mine.update(data)
    change, told = FROM_UNDER_IT[how]
    change(mine.critic)
    before = mine.critics.master.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=told):
            mine.update(data)
    assert torch.equal(mine.critics.master, before)


def test_parameters_that_trade_or_turn_their_memory_keep_what_they_show() -> None:
    mine = agent(T)
    mine.update(batches(1, T, rows=8))
    first, second, turned = (mine.critic.body.blocks[i][j].kernel for i, j in ((0, 0), (1, 0), (1, 1)))
    shown = second.detach().clone(), first.detach().clone(), turned.detach().mT.clone()
    first.data, second.data, turned.data = second.data, first.data, turned.data.mT
    mine.critics.follow()
    for p, name, value in zip((first, second, turned), ("0.0", "1.0", "1.1"), shown, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(mine.critics.named(mine.critics.master[:2])[f"body.blocks.{name}.kernel"], value)


def test_parameters_in_memory_that_processes_share_are_trained_there() -> None:
    """The whole buffer moves, and the compiled passes know it by its address."""
    mine, other = agent(T), agent(T)
    data = batches(1, T, rows=8)
    for turn in range(3):
        for one in (mine, other):
            one.update(data)
        if turn == 0:
            mine.actor.share_memory()
            mine.critic.share_memory()
    for key, value in other.state_dict().items():
        assert torch.equal(mine.state_dict()[key], value), key
    assert mine.actor.body.head.kernel.is_shared()


def test_another_module_in_the_place_of_one_is_refused_and_a_wrapped_one_is_not() -> None:
    mine, data = agent(T), batches(1, T, rows=8)
    mine.actor = torch.compile(mine.actor, backend="eager")  # type: ignore[assignment]
    mine.update(data)
    mine.target_critic = copy.deepcopy(mine.critic)
    with pytest.raises(RuntimeError, match="target_critic is not the module that is trained"):
        mine.update(data)


@pytest.mark.parametrize("tasks", [1, T])
def test_a_networks_gradient_is_one_row_and_the_one_of_autograd(tasks: int) -> None:
    mine = agent(tasks)
    data = batches(1, tasks, rows=16).update(0)
    noise = torch.randn(16, A)
    samples = mine.plans(data).samples(data, torch.stack([noise, noise]))
    twin, actor = copy.deepcopy(mine.critic), copy.deepcopy(mine.actor)
    target = mine.critic_target(data, noise).probs
    mine.update_critic(data, next(samples), mine.alpha)
    logits = twin(data.observations, data.actions, data.task_ids)
    kernels.categorical_cross_entropy(logits, target).mean(-1).sum().backward()
    assert mine.critics.grad.shape[0] == 2
    assert all(row.is_contiguous() for row in mine.critics.grad)
    mine_by_name = mine.critics.named(mine.critics.grad)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(mine_by_name[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    for member, row in enumerate(mine.critics.grad):  # a member's numbers, and no others, are in its row
        numbers = [p.grad[member] for name, p in twin.named_parameters() if name.startswith("body.")]
        if member == 0 and twin.embedding is not None:
            numbers.append(twin.embedding.grad)
        total = sum(x.double().square().sum() for x in numbers)
        torch.testing.assert_close(row.double().square().sum(), total, rtol=1e-4, atol=0.0)

    mean, raw = mine.policy(data.observations, data.task_ids, (actor, mine.critic.table))
    actions, log_probs = kernels.tanh_gaussian(mean, raw, noise)
    q = kernels.expected_value(
        mine.critic(data.observations, actions, data.task_ids, frozen=True), mine.atoms
    )
    (mine.alpha * log_probs - q.mean(0)).mean().backward()
    mine.update_actor(data, next(samples), mine.alpha)
    actor_by_name = mine.actors.named(mine.actors.grad)
    for name, parameter in actor.named_parameters():
        torch.testing.assert_close(actor_by_name[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_critic_gradient_of_one_member_reaches_no_other() -> None:
    """With three members and a target that is their own row, rows 3 to 5."""
    config = CriticConfig(width=19, depth=1, num_atoms=11, members=3)
    mine = agent(1, critic=config)
    assert mine.critics.master.shape[0] == 6
    mine.critics.master[1].zero_()  # a network without weights gets gradients in its head's bias alone
    mine.update(batches(1, 1))
    named = mine.critics.named(mine.critics.grad)
    assert (named["body.head.bias"][1] != 0).any()
    assert all((value[1] == 0).all() for name, value in named.items() if name != "body.head.bias")
    for member in (0, 2):
        assert all((value[member] != 0).any() for value in named.values())
