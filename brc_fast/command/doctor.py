"""What is installed, which devices there are, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from brc_fast import __version__
from brc_fast.kernels.products import chosen_products, fast_bfloat16, measured_rate
from brc_fast.kernels.runtime.dispatch import chosen

EXTRAS = {
    "mjx": ("jax", "mujoco", "mujoco-mjx", "playground", "brax", "gymnasium"),
    "train": ("tyro", "tqdm", "matplotlib", "tensorboard"),
}
OPTIONAL = {
    "gym": ("gymnasium", "mujoco", "imageio"),
    "dmc": ("dm-control", "shimmy"),
    "envpool": ("envpool",),
    "video": ("imageio-ffmpeg",),
    "wandb": ("wandb",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "hub": ("huggingface-hub",),
    "convert": ("msgpack",),
}


def report() -> tuple[str, bool]:
    """The report, and whether nothing is missing."""
    lines = [
        f"brc-fast {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"cores {os.cpu_count()}, torch threads {torch.get_num_threads()}",
        "",
        f"{'torch':<14}{torch.__version__}",
    ]
    fine = True
    for name in ("numpy", "safetensors"):
        lines.append(f"{name:<14}{_version(name)}")
    if importlib.util.find_spec("brc_fast._core") is None:
        fine = False
        lines.append(f"{'replay store':<14}missing: the compiled module was not built; pip install brc-fast")
    else:
        lines.append(f"{'replay store':<14}built")
    lines.append(f"{'kernels':<14}{_kernels()}")
    lines.append(f"{'products':<14}{_products()}")
    unused = "unused: no CUDA device; on a CPU updates are replayed too, without Python between passes"
    used = "used by the learner's updates (--no-graphs turns them off; a run says where one cannot be made)"
    lines.append(f"{'CUDA graphs':<14}{used if torch.cuda.is_available() else unused}")
    for extra, names in EXTRAS.items():
        missing = [name for name in names if _version(name) == "missing"]
        lines.append("")
        lines.append(f"[{extra}]" + (f'  missing; pip install "brc-fast[{extra}]"' if missing else ""))
        lines += [f"  {name:<12}{_version(name)}" for name in names]
        fine = fine and not missing
    lines += ["", "other simulators and tools"]
    for extra, names in OPTIONAL.items():
        told = ", ".join(f"{name} {_version(name)}" for name in names)
        lacks = any(_version(name) == "missing" for name in names)
        lines.append(f"  {extra:<12}{told}" + (f'; pip install "brc-fast[{extra}]"' if lacks else ""))
    lines += ["", "devices"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            lines.append(f"  torch cuda:{index}  {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    else:
        lines.append("  torch cpu     no CUDA device: the learner runs on the CPU")
    lines.append(f"  {_jax_devices()}")
    return "\n".join(lines), fine


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _kernels() -> str:
    """Which implementation the ops of the update take here."""
    choice, triton = chosen(None), _version("triton")
    if choice in ("reference", "compile"):
        return f"plain PyTorch (BRC_FAST_KERNELS={choice})"
    if triton == "missing":
        return 'plain PyTorch: triton is not installed; pip install "triton>=3.6" on a GPU'
    if choice == "triton":
        return f"triton {triton} or an error (BRC_FAST_KERNELS=triton)"
    where = "used on CUDA" if torch.cuda.is_available() else "unused: no CUDA device, plain PyTorch instead"
    return f"triton {triton}, {where}"


def _products() -> str:
    """Who makes the products of a learner on this CPU, and how fast, in each precision."""
    told = []
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        whose = {"native": "ours", "torch": "torch's"}[chosen_products(dtype)]
        told.append(f"{precision} {whose}, {measured_rate(dtype) * 1e-9:.0f} GFLOP/s")
    slow = "" if fast_bfloat16() else " (no bfloat16 instructions here)"
    return f"on the CPU {'; '.join(told)}{slow}"


def _jax_devices() -> str:
    if importlib.util.find_spec("jax") is None:
        return "jax           not installed: no MJX environments"
    from brc_fast.envs import _jax

    _jax.setup()
    import jax

    devices = ", ".join(str(device) for device in jax.devices())
    hint = ""
    if torch.cuda.is_available() and jax.default_backend() == "cpu":
        hint = '; environments will run on the CPU: pip install "jax[cuda13]" for the GPU'
    return f"jax           {devices}{hint}"
