"""Updates per second of `brc_fast.BRC` and of the same mathematics written the plain way.

    python bench/bench_update.py [--providers ours plain jax] [--width 128 ...] [--batch 128] [--updates 1]
        [--budget SECONDS] [--save NAME]

plain is PyTorch without anything of ours, jax the same in JAX with optax, jitted as a whole. One process,
interleaved. All start from the same parameters, and one update on one batch must agree before anything is
timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from harness import interleave, median_ratio, write

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, Noise
from peers.torch_plain import PlainBRC

OBSERVATION, ACTION = 5, 1  # mjx/CartpoleSwingup
CALLS = 10
PROVIDERS = ("ours", "plain", "jax")


def batch(size: int, device: str, updates: int = 1, seed: int = 0) -> Batch:
    """[U, B, ...] batches of random transitions."""
    rng = torch.Generator().manual_seed(seed)
    observations, next_observations = torch.randn(2, updates, size, OBSERVATION, generator=rng)
    actions = 2.0 * torch.rand(updates, size, ACTION, generator=rng) - 1.0
    rewards = torch.rand(updates, size, generator=rng)
    masks = (torch.rand(updates, size, generator=rng) > 0.02).float()
    ids = torch.zeros(updates, size, dtype=torch.long)
    return Batch(observations, actions, rewards, masks, next_observations, ids).to(device)


def drawn(data: Batch, seed: int | None = None) -> Noise:
    """Noise for these batches."""
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    return Noise(*torch.randn(2, *data.actions.shape, generator=rng).to(data.actions.device))


def check_equal(agent: BRC, plain: PlainBRC, jax: Any, data: Batch) -> None:
    """The updates of each with the same noise: losses and parameters must agree to float32 rounding."""
    noise = drawn(data, seed=1)
    ours = agent.update(data, noise)
    others = {"plain": run_plain(plain, data, noise)}
    layer = plain.critics[1].input.weight.T
    kernels = {"plain": (layer, plain.actor.head.weight.T)}
    if jax is not None:
        others["jax"] = {name: torch.tensor(value) for name, value in jax.update(data, noise).items()}
        critic, actor = jax.state["critic"][0][0][0][1], jax.state["actor"][1][0]
        kernels["jax"] = (torch.tensor(numpy.array(critic)), torch.tensor(numpy.array(actor)))
    mine = agent.critic.body.input.kernel[1], agent.actor.body.head.kernel[0]
    for provider, metrics in others.items():
        for name, value in metrics.items():
            told = f"{name} of {provider} differs"
            torch.testing.assert_close(ours[name].cpu(), value.cpu(), rtol=1e-4, atol=1e-4, msg=told)
        for a, b in zip(mine, kernels[provider], strict=True):
            torch.testing.assert_close(
                a.cpu(), b.cpu(), rtol=1e-4, atol=1e-5, msg=f"{provider}: parameters differ"
            )


def run_plain(plain: PlainBRC, data: Batch, noise: Noise) -> dict[str, torch.Tensor]:
    metrics = {}
    for index in range(data.rewards.shape[0]):
        metrics = plain.update(data.update(index), Noise(*(part[index] for part in noise)))
    return metrics


def compare(
    width: int,
    size: int,
    device: str,
    seconds: float,
    providers: Sequence[str] = ("ours", "plain"),
    updates: int = 1,
) -> dict[str, Any]:
    """Time the providers at one size."""
    actor = ActorConfig(width=min(width, 256))
    agent = BRC(OBSERVATION, ACTION, critic=CriticConfig(width=width), actor=actor, device=device)
    plain, jax = PlainBRC(agent), None
    if "jax" in providers:
        from peers.jax_plain import JaxBRC

        jax = JaxBRC(agent)
    data = batch(size, device, updates)
    check_equal(agent, plain, jax, data)
    known = {
        "ours": lambda: agent.update(data),
        "plain": lambda: run_plain(plain, data, drawn(data)),
        "jax": lambda: jax.update(data, drawn(data)),
    }
    calls = max(1, CALLS // updates)
    times = interleave({name: known[name] for name in providers}, seconds=seconds, calls=calls, device=device)
    ratios = {name: median_ratio(taken, times["ours"]) for name, taken in times.items() if name != "ours"}
    middle, low, high = ratios.get("plain", (None, None, None))
    rate = {name: updates / statistics.median(values) for name, values in times.items()}
    return {
        "width": width,
        "actor_width": actor.width,
        "batch": size,
        "updates_per_call": updates,
        "device": device,
        "updates_per_second": rate,
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "ratios": ratios,
        "rounds": len(times["ours"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=["ours", "plain"])
    parser.add_argument("--width", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--updates", type=int, default=1, help="updates per call")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, and of JAX if it is one")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds in all")
    parser.add_argument("--save", help="name of a file under bench/results")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench_update: torch sees no CUDA device", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    if arguments.threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # JAX takes every core it sees
    providers = ["ours", *(name for name in PROVIDERS[1:] if name in arguments.providers)]
    for module in ("jax", "optax"):
        if "jax" in providers and importlib.util.find_spec(module) is None:
            print(f'jax is left out: {module} is not installed; pip install "brc-fast[bench]"')
            providers.remove("jax")
    rows = []
    print("width  batch  updates per second, and times as long as ours (quartiles)")
    for width in arguments.width:
        seconds = arguments.budget / len(arguments.width)
        row = compare(width, arguments.batch, arguments.device, seconds, providers, arguments.updates)
        rows.append(row)
        told = [f"ours {row['updates_per_second']['ours']:.1f}"]
        for name, (middle, low, high) in row["ratios"].items():
            rate = row["updates_per_second"][name]
            told.append(f"{name} {rate:.1f}, {middle:.2f} ({low:.2f} to {high:.2f})")
        print(f"{width:5d}  {row['batch']:5d}  " + ";  ".join(told), flush=True)
    if arguments.save:
        print(write(arguments.save, {"benchmark": "update", "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
