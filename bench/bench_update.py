"""Updates per second of `brc_fast.BRC` and of the same mathematics written the plain way.

    python bench/bench_update.py [--width 128 ...] [--batch 128] [--budget SECONDS] [--save NAME]

One process, interleaved. Both start from the same parameters, and one update on one batch must agree before
anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from harness import interleave, median_ratio, write

from brc_fast import BRC, ActorConfig, Batch, CriticConfig, Noise
from peers.torch_plain import PlainBRC

OBSERVATION, ACTION = 5, 1  # mjx/CartpoleSwingup
CALLS = 10


def batch(size: int, device: str, seed: int = 0) -> Batch:
    """One [1, B, ...] batch of random transitions."""
    rng = torch.Generator().manual_seed(seed)
    observations, next_observations = torch.randn(2, 1, size, OBSERVATION, generator=rng)
    actions = 2.0 * torch.rand(1, size, ACTION, generator=rng) - 1.0
    rewards = torch.rand(1, size, generator=rng)
    masks = (torch.rand(1, size, generator=rng) > 0.02).float()
    ids = torch.zeros(1, size, dtype=torch.long)
    return Batch(observations, actions, rewards, masks, next_observations, ids).to(device)


def check_equal(agent: BRC, plain: PlainBRC, data: Batch) -> None:
    """One update of each with the same noise: losses and parameters must agree to float32 rounding."""
    rng = torch.Generator().manual_seed(1)
    noise = Noise(*torch.randn(2, 1, *data.actions.shape[1:], generator=rng).to(data.actions.device))
    ours = agent.update(data, noise)
    theirs = plain.update(data.update(0), Noise(*(part[0] for part in noise)))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4, msg=f"{name} differs")
    mine = agent.critic.body.input.kernel[1].T
    torch.testing.assert_close(mine, plain.critics[1].input.weight, rtol=1e-4, atol=1e-5)
    mine = agent.actor.body.head.kernel[0].T
    torch.testing.assert_close(mine, plain.actor.head.weight, rtol=1e-4, atol=1e-5)


def compare(width: int, size: int, device: str, seconds: float) -> dict[str, Any]:
    """Time both at one size."""
    actor = ActorConfig(width=min(width, 256))
    agent = BRC(OBSERVATION, ACTION, critic=CriticConfig(width=width), actor=actor, device=device)
    plain = PlainBRC(agent)
    data = batch(size, device)
    check_equal(agent, plain, data)

    def run_plain() -> None:
        noise = Noise(*torch.randn(2, size, ACTION, device=device))
        plain.update(data.update(0), noise)

    providers = {"ours": lambda: agent.update(data), "plain": run_plain}
    times = interleave(providers, seconds=seconds, calls=CALLS, device=device)
    middle, low, high = median_ratio(times["plain"], times["ours"])
    return {
        "width": width,
        "actor_width": actor.width,
        "batch": size,
        "device": device,
        "updates_per_second": {name: 1.0 / statistics.median(values) for name, values in times.items()},
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "rounds": len(times["ours"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds in all")
    parser.add_argument("--save", help="name of a file under bench/results")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench_update: torch sees no CUDA device", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    rows = []
    print("width  batch  ours upd/s  plain upd/s  ratio (quartiles)")
    for width in arguments.width:
        row = compare(width, arguments.batch, arguments.device, arguments.budget / len(arguments.width))
        rows.append(row)
        speed = row["updates_per_second"]
        low, high = row["ratio_quartiles"]
        print(
            f"{width:5d}  {row['batch']:5d}  {speed['ours']:10.1f}  {speed['plain']:11.1f}  "
            f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
            flush=True,
        )
    if arguments.save:
        print(write(arguments.save, {"benchmark": "update", "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
