"""A policy as one file of another runtime: ONNX, or torch.export's PT2, checked against the policy itself.

Inputs `observations` [B, o] and, of a sampling policy, `noise` [B, a], standard normals; output `actions`
[B, a], in the task's bounds; float32, any B. What PolicyConfig.metadata says, and whether actions are
the mean's or a sample, is in the file: in ONNX each entry of it in `metadata_props`, lists and numbers as
JSON; in PT2 all of it as JSON in the extra file `brc_fast.json`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brc_fast.disk import replace_file, require_replaceable
from brc_fast.errors import InputError, MissingExtraError

from .policy import Policy

OPSETS = (18, 23)  # of ONNX that files may have; the default is the first, which the most runtimes read
SUFFIXES = (".onnx", ".pt2")
METADATA = "brc_fast.json"  # extra file of a PT2
TOLERANCE = 1e-5  # of a runtime's actions, as a share of the task's bounds
TRIED = (1, 2, 7)  # rows


class _Exported(nn.Module):
    """A policy whose arguments are tensors alone."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        actions: Tensor = self.policy(observations, noise)
        return actions


def require_target(path: Path, opset: int | None = None) -> None:
    """InputError for a file that `export` could not write, or an opset that it could not write it in."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} must end in {' or '.join(SUFFIXES)}: that chooses the format")
    if path.suffix == ".pt2" and opset is not None:
        raise InputError(f"opset {opset} is of .onnx files alone, and {path} is none")
    least, most = OPSETS
    if opset is not None and not least <= opset <= most:
        told = "too old for what torch exports" if opset < least else "newer than what torch exports"
        raise InputError(f"opset {opset} is {told}: it must be in [{least}, {most}]")
    if not path.absolute().parent.is_dir():
        raise InputError(f"there is no folder to write {path} to")
    require_replaceable(path, remedy="name another file with --to")
    if path.suffix == ".onnx" and any(
        importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")
    ):
        raise MissingExtraError(f"{path}: export to ONNX", "onnx")


def export(policy: Policy, path: Path, *, sample: bool = False, opset: int | None = None) -> float | None:
    """Write the policy to a file, ONNX or PT2 by its name's end; the largest difference of its actions from
    the policy's, or None where there is no onnxruntime to ask.

    Args:
        sample: actions are samples, of noise that is an input. opset: of ONNX; 18 when not given.
    Raises:
        InputError: see `require_target`. MissingExtraError without onnx. RuntimeError where what was written
        does not act as the policy does: then there is no file.
    """
    require_target(path, opset)
    module = _Exported(policy).eval()
    inputs = _inputs(policy, 3, sample)
    rows = torch.export.Dim("B", min=1, max=2**31 - 1)
    shapes = tuple({0: rows} for _ in inputs)
    with _quiet(), torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        made, run = (_onnx if path.suffix == ".onnx" else _pt2)(policy, program, shapes, opset or OPSETS[0])
    difference = _difference(policy, run, sample) if run is not None else None
    replace_file(path, made)
    return difference


def _inputs(policy: Policy, rows: int, sample: bool) -> tuple[Tensor, ...]:
    """Observations, and noise, that are alike in every call."""
    task, draw = policy.config.task, torch.Generator().manual_seed(rows)
    seen = torch.randn(rows, task.observation_size, generator=draw)
    if policy.mean is not None and policy.rate is not None:  # as the run saw them
        seen = policy.mean.cpu() + seen / policy.rate.cpu()
    noise = torch.randn(rows, task.action_size, generator=draw)
    return (seen, noise) if sample else (seen,)


Run = Callable[[Sequence[Tensor]], Tensor]


def _onnx(policy: Policy, program: Any, shapes: Any, opset: int) -> tuple[bytes, Run | None]:
    import onnx

    names = ["observations", "noise"][: len(shapes)]
    written = torch.onnx.export(
        program,
        (),
        input_names=names,
        output_names=["actions"],
        opset_version=opset,
        dynamo=True,
        external_data=False,
        verbose=False,
        optimize=True,
    )
    assert written is not None
    model = written.model_proto
    got = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if got != opset:
        raise RuntimeError(f"opset {opset} was asked for, and torch wrote {got}")
    model.doc_string = f"policy of {policy.config.task.task}, by brc-fast {policy.config.version}"
    graph = model.graph
    del graph.value_info[:], graph.metadata_props[:]
    for each in (*graph.node, *graph.input, *graph.output, *graph.initializer):  # of torch's own sources
        del each.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "B"
    told = _metadata(policy, "noise" in names).items()
    onnx.helper.set_model_props(model, {name: x if isinstance(x, str) else json.dumps(x) for name, x in told})
    onnx.checker.check_model(model, full_check=True)
    made = model.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        return made, None
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(made, settings, providers=["CPUExecutionProvider"])

    def run(inputs: Sequence[Tensor]) -> Tensor:
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(["actions"], given)[0])

    return made, run


def _pt2(policy: Policy, program: Any, shapes: Any, opset: int) -> tuple[bytes, Run | None]:
    file = io.BytesIO()
    told = json.dumps(_metadata(policy, len(shapes) > 1), indent=1)
    torch.export.save(program, file, extra_files={METADATA: told})
    made = file.getvalue()
    module = torch.export.load(io.BytesIO(made)).module()
    return made, lambda inputs: module(*inputs)


def _metadata(policy: Policy, sample: bool) -> dict[str, Any]:
    return {**policy.config.metadata(), "actions": "sample" if sample else "mean"}


def _difference(policy: Policy, run: Run, sample: bool) -> float:
    """The largest between a runtime's actions and the policy's; RuntimeError where it is no rounding."""
    largest, reach = 0.0, float((policy.high - policy.low).max())
    for rows in TRIED:
        inputs = _inputs(policy, rows, sample)
        found, wanted = run(inputs), policy(*inputs)
        if found.shape != wanted.shape:
            raise RuntimeError(
                f"what was written gives actions {list(found.shape)} instead of {list(wanted.shape)}"
            )
        largest = max(largest, float((found - wanted).abs().max()))
    if not largest <= TOLERANCE * reach:
        raise RuntimeError(f"what was written acts differently from the policy, by up to {largest:.1e}")
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter tells of its own progress."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
