"""Markdown tables of results, for report.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LABELS = {
    "ours": "brc-fast",
    "ours-tf32": "brc-fast, TF32",
    "ours-bf16": "brc-fast, BF16",
    "critic": "plain PyTorch, our critic",
    "plain": "plain PyTorch",
    "compiled": "torch.compile",
    "compile": "torch.compile",
    "jax": "JAX",
    "kernels": "brc-fast",
    "eager": "plain PyTorch",
    "liger": "Liger",
    "library": "its own loop",
    "authors' layout (numpy)": "authors' layout",
    "torch.index_select": "index_select",
    "Stable-Baselines3": "SB3",
    "flashbax (jit)": "flashbax",
    "row gather (limit)": "copying one row",
}
REPLAY = {  # the cases of the table; the file and `pivot` have them all
    "1 x 1024": "sample 1 x 1024",
    "16 x 1024": "sample 16 x 1024",
    "ten tasks": "sample 1 x 1024 of 10 tasks",
    "wide": "sample 1 x 1024, O=1500",
    "atari": "sample 1 x 1024, 4 x 84 x 84 uint8",
    "insert 1": "add from 1 environment",
    "insert 64": "add from 64 environments",
    "insert 1024": "add from 1024 environments",
}
OURS, OURS_TENSORS = "brc-fast", "brc-fast, tensors"  # buffers of the replay
NOTHING = "–"


def label(provider: str) -> str:
    return LABELS.get(provider, provider)


def finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a figure is {value}")
    return value


def number(value: float | None) -> str:
    """Three digits, or all of a large number."""
    if value is None:
        return NOTHING
    if abs(finite(value)) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(ratio: Sequence[float]) -> str:
    middle, low, high = map(finite, ratio)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def providers(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(entry["provider"] for entry in entries if entry["value"] is not None))


def missing(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line per reason and cases that it left out, with the providers."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        if entry["value"] is None:
            reasons.setdefault((entry["provider"], entry["missing"]), []).append(entry["case"])
    together: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (provider, reason), cases in reasons.items():
        together.setdefault((reason, tuple(cases)), []).append(label(provider))
    for (reason, cases), names in together.items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        yield f"Missing: {', '.join(names)} ({where}): {reason}."


def pivot(
    entries: Sequence[Mapping[str, Any]], names: Mapping[str, str] | None = None, floor_is: str = "floor"
) -> str:
    """Cases by providers, a table per unit, with the floor where there is one."""
    tables = []
    for unit in dict.fromkeys(entry["unit"] for entry in entries):
        own = [entry for entry in entries if entry["unit"] == unit]
        columns = providers(own)
        floors = any(entry.get("floor") is not None for entry in own)
        rows = []
        for case in dict.fromkeys(entry["case"] for entry in own):
            cells = {entry["provider"]: entry for entry in own if entry["case"] == case}
            if all(entry["value"] is None for entry in cells.values()):
                continue
            values = [number(cells[name]["value"]) if name in cells else "" for name in columns]
            floor = next((e["floor"] for e in cells.values() if e.get("floor") is not None), None)
            rows.append([(names or {}).get(case, case), *values, *([number(floor)] if floors else [])])
        head = [unit, *map(label, columns), *([floor_is] if floors else [])]
        if rows:
            tables.append(grid(head, rows))
    return "\n\n".join(tables)


def update(result: Mapping[str, Any]) -> str:
    """Updates per second, ratios to the others round by round, and what multiple of the floor it is."""
    rows = [row for row in result["rows"] if row["updates_per_second"]]
    names = [n for n in LABELS if any(n in row["updates_per_second"] for row in rows)]
    others = [n for n in names if any(n in row["ratios"] and not n.startswith("ours") for row in rows)]
    floor = "torch.bmm" if all(row["floor"] == "products" for row in rows) else "its floor"
    head = ["workload"] if any("workload" in row for row in rows) else []
    head += ["width", "batch", *map(label, names), *(f"x {label(name)} (quartiles)" for name in others)]
    cells = []
    for row in rows:
        line = [row.get("workload", NOTHING)] if head[0] == "workload" else []
        line += [str(row["width"]), str(row["batch"])]
        line += [number(row["updates_per_second"].get(name)) for name in names]
        line += [spread(row["ratios"][name]) if name in row["ratios"] else NOTHING for name in others]
        over = row["times_floor"].get(row["ratios_to"])
        cells.append([*line, NOTHING if over is None else f"{finite(over):.2f}"])
    return grid([*head, f"time / {floor}"], cells)


SLOWER = ", both stacks"  # of a buffer that also keeps frames once: what nobody would choose


def replay(result: Mapping[str, Any]) -> str:
    """CPU time per transition of every buffer in these cases; ours side by side, the bare gather last."""
    entries = [
        e for e in result["measurements"] if e["case"] in REPLAY and not e["provider"].endswith(SLOWER)
    ]
    if not entries:
        return pivot(result["measurements"])
    columns = list(dict.fromkeys(map(_one_of, providers(entries))))
    if OURS in columns and OURS_TENSORS in columns:  # which only some cases have
        columns.remove(OURS_TENSORS)
        columns.insert(columns.index(OURS) + 1, OURS_TENSORS)
    columns.sort(key="row gather (limit)".__eq__)
    rows = []
    for case in dict.fromkeys(entry["case"] for entry in entries):
        value = {_one_of(entry["provider"]): entry["value"] for entry in entries if entry["case"] == case}
        rows.append([REPLAY[case], *(number(value[n]) if n in value else "" for n in columns)])
    return grid(["CPU ns per transition", *map(label, columns)], rows)


def _one_of(provider: str) -> str:
    """Without what a buffer does about tasks (one for each) or stacks."""
    return provider.removesuffix(" x 10").removesuffix(", stack_compress")


def envs(result: Mapping[str, Any]) -> str:
    """Steps per second beside the simulator's own loop; or the start of a process."""
    if "starts" in result:
        cells = [
            [row["task"], str(row["num_envs"]), number(row["first"]), number(row["second"])]
            for row in result["starts"]
        ]
        return grid(["seconds to the first step", "slots", "first process", "second"], cells)
    rows = []
    for row in result["rows"]:
        if rates := row.get("steps_per_second"):
            line = [
                row["task"],
                str(row["num_envs"]),
                *(number(rates.get(who)) for who in ("ours", "library")),
            ]
            rows.append([*line, spread(row["times_library"]) if "times_library" in row else NOTHING])
    head = ["steps/s", "slots", label("ours"), label("library"), "x its own loop (quartiles)"]
    return grid(head, rows)


def scaling(result: Mapping[str, Any]) -> str:
    """The curve through each axis, then the points."""
    rows = []
    for axis in result["axes"]:
        if (fit := axis["fit"]) is not None:
            power = "x" if fit["power"] == 1.0 else f"x^{fit['power']:.2f}"
            curve = f"{number(1e6 * fit['fixed'])} + {1e6 * finite(fit['rate']):.3g} {power}"
            off = f"{100 * finite(fit['residual']):.1f} %"
            rows.append([f"{axis['what']}, x = {axis['axis']}", curve, off])
    fits = grid(["cost of", "us", "off by (root mean square)"], rows)
    floor = "torch.bmm" if result["device"] == "cpu" else "roofline"
    return f"{fits}\n\n{pivot(result['measurements'], floor_is=floor)}"


def table(result: Mapping[str, Any]) -> str:
    """The table of a result, with a line for each provider that has no value."""
    kinds = {"update": update, "replay": replay, "envs": envs, "scaling": scaling}
    benchmark = result.get("benchmark", result.get("part", ""))
    kind = kinds.get(benchmark)
    if benchmark == "replay" and "cases" not in result:
        kind = None  # of a GPU: other cases, other providers
    found = pivot(result["measurements"]) if kind is None else kind(result)
    return "\n".join([found, *("\n" + line for line in missing(result["measurements"]))])
