"""Tables and pictures of results, and the tables of the READMEs.

    python bench/report.py [RESULT.json ...] [--pictures docs] [--readme [README.md ...]] [--check]

Without --pictures and --readme: tables on standard output. --readme replaces, in the files named or in all
that have such places, what stands between

    <!-- report: NAME -->
    <!-- end -->

by the table of the result NAME, given or in bench/results; --check changes nothing and exits with 1 where a
README says something else than its results. Refused are results without a passed equality check, of a run or
of tests that failed, and of a tree with uncommitted changes or perhaps with some: exit code 1, as for files
that cannot be read. The other files have their tables all the same.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, Parser, Refused, failures, one_line, read
from pictures import draw, label

READMES = tuple(ROOT / name for name in ("README.md", "bench/README.md", "docs/critic.md", "docs/replay.md"))
BEGIN = re.compile(r"^<!-- report: \S+ -->$", re.MULTILINE)  # on lines of their own
PLACE = re.compile(r"^(<!-- report: (\S+) -->\n)(.*?)^(<!-- end -->)$", re.DOTALL | re.MULTILINE)
VERSIONS = ("torch", "jax", "triton")  # what a line has room for; the file has all
REPLAY = {  # the cases of the table; the file has them all
    "1 x 1024": "sample 1 x 1024",
    "16 x 1024": "sample 16 x 1024",
    "ten tasks": "sample 1 x 1024 of 10 tasks",
    "wide": "sample 1 x 1024, O=1500",
    "by priority": "sample 1 x 1024 by priority and update",
    "atari": "sample 1 x 1024, 4 x 84 x 84 uint8",
    "insert 1": "add from 1 environment",
    "insert 64": "add from 64 environments",
    "insert 1024": "add from 1024 environments",
}
BUFFERS = ("brc-fast", "brc-fast, tensors")  # stand first, and the bare gather last
SLOWER = ", both stacks"  # of a buffer that also keeps frames once: what nobody would choose
NOTHING = "–"


# ---------------------------------------------------------------- tables


def number(value: float | None) -> str:
    """Three digits, or all of a large number."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def pivot(entries: Sequence[Mapping[str, Any]], floor: str) -> str:
    """Cases of one unit by providers, with ratios to them and the floor where there are any."""
    unit, cases = entries[0]["unit"], dict[str, dict[str, Mapping[str, Any]]]()
    for entry in entries:
        cases.setdefault(entry["case"], {})[entry["provider"]] = entry
    cases = {case: cells for case, cells in cases.items() if any(e["value"] for e in cells.values())}
    names = list(dict.fromkeys(entry["provider"] for entry in entries if entry["value"] is not None))
    told = [e for e in entries if "at" in e]  # only their tables have ratios
    others = [n for n in names if any(e["provider"] == n and "ratio" in e for e in told)]
    others = [name for name in others if not name.startswith("ours")]
    over = any("over_floor" in entry for entry in told)
    floors = not over and any(entry["floor"] is not None for entry in entries)
    rows = []
    for case, cells in cases.items():
        first = next(iter(cells.values()))
        columns = first.get("at", {unit: case})
        row = [str(each) for each in columns.values()]
        row += [number(cells[name]["value"]) if name in cells else "" for name in names]
        for name in others:
            each = cells.get(name, {}).get("ratio")
            row.append("{:.2f} ({:.2f} to {:.2f})".format(*each) if each else NOTHING)
        if over:
            row.append(f"{first['over_floor']:.2f}" if "over_floor" in first else NOTHING)
        if floors:
            row.append(number(next((e["floor"] for e in cells.values() if e["floor"] is not None), None)))
        rows.append(row)
    if not rows:
        return ""
    head = [*columns, *map(label, names), *(f"x {label(name)} (quartiles)" for name in others)]
    return grid(head + [f"time / {floor}"] * over + [floor] * floors, rows)


def replay(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """CPU time per transition of every buffer in the cases of the table."""
    found = []
    for entry in entries:
        if entry["case"] in REPLAY and not entry["provider"].endswith(SLOWER):
            # Without what a buffer does about tasks (one for each) or stacks
            name = entry["provider"].removesuffix(" x 10").removesuffix(", stack_compress")
            told = {"case": REPLAY[entry["case"]], "unit": "CPU ns per transition", "floor": None}
            found.append({**entry, **told, "provider": name})
    order = {name: place - len(BUFFERS) for place, name in enumerate(BUFFERS)} | {"row gather (limit)": 1}
    return sorted(found, key=lambda entry: order.get(entry["provider"], 0))


def fits(axes: Sequence[Mapping[str, Any]]) -> str:
    """The curve through each axis."""
    rows = []
    for axis in axes:
        if (fit := axis["fit"]) is not None:
            power = "x" if fit["power"] == 1.0 else f"x^{fit['power']:.2f}"
            curve = f"{number(1e6 * fit['fixed'])} + {1e6 * fit['rate']:.3g} {power}"
            rows.append([f"{axis['what']}, x = {axis['axis']}", curve, f"{100 * fit['residual']:.1f} %"])
    return grid(["cost of", "us", "off by (root mean square)"], rows)


def missing(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line per provider and reason, with the cases that it left out."""
    left: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        if entry["value"] is None:
            left.setdefault((label(entry["provider"]), entry["missing"]), []).append(entry["case"])
    for (name, reason), cases in left.items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        yield f"Missing: {name} ({where}): {reason}."


def table(result: Mapping[str, Any]) -> str:
    """The table of a result, with a line for each provider that has no value."""
    entries = result["measurements"]
    shown = (result["benchmark"] == "replay" and replay(entries)) or entries
    parts = [fits(result["axes"])] if "axes" in result else []
    for unit in dict.fromkeys(entry["unit"] for entry in shown):
        parts.append(pivot([e for e in shown if e["unit"] == unit], result.get("floor", "floor")))
    return "\n\n".join(filter(None, [*parts, *missing(entries)]))


# ---------------------------------------------------------------- what may be cited


def refusals(path: Path, result: Mapping[str, Any]) -> Iterator[str]:
    """Every reason why a result must not be cited."""
    yield from failures(result)
    if result.get("equality") is None and len({entry["provider"] for entry in result["measurements"]}) > 1:
        yield "it compares providers without an equality check: measure again"
    if result["commit"] is None:
        yield "it was measured outside of a git checkout: commit and measure again"
    elif result["dirty"] is not False:
        yield "it was measured with uncommitted changes, or perhaps with some: commit and measure again"
    tests = path.parent / "gpu-test.json"
    if path.stem.startswith("gpu-") and tests.exists():
        told = json.loads(tests.read_text())
        if told.get("commit") == result["commit"] and told.get("status") == "failed":
            yield f"the tests of its commit failed ({told.get('reason', tests.name)})"


def trusted(path: Path) -> dict[str, Any]:
    """A result that may be cited; else Refused."""
    result = read(path)
    if reasons := list(refusals(path, result)):
        raise Refused(f"{path} is refused: {'; '.join(reasons)}")
    return result


def stamp(result: Mapping[str, Any]) -> str:
    """When, where and with what it was measured."""
    threads = result["torch_threads"]
    cores = f"{result['cores']} cores, {threads} thread{'s' if threads > 1 else ''} of torch"
    machine = result["gpu"] or f"{result['cpu']}, {cores}"
    versions = result["versions"]
    used = [f"{name} {versions[name].partition('+')[0]}" for name in VERSIONS if versions.get(name)]
    return ", ".join([result["date"][:10], machine, *used, result["commit"][:7]])


def section(path: Path, beside: Path) -> str:
    """The table with its line; the link is relative to the folder of `beside`."""
    result = trusted(path)
    link = Path(os.path.relpath(path.resolve(), beside.resolve().parent)).as_posix()
    return f"{table(result)}\n\n{stamp(result)} ([{path.name}]({link})).\n"


# ---------------------------------------------------------------- what is asked for


def update_readme(readme: Path, given: Sequence[Path], check: bool) -> None:
    """Write the tables; with `check`, refuse a README that says something else."""
    old, named = readme.read_text(), {path.stem: path for path in given}
    opened, closed = len(BEGIN.findall(old)), len(PLACE.findall(old))
    if opened != closed:
        raise Refused(f"{readme}: {opened} places begin with <!-- report: NAME -->, {closed} have an end")

    def fill(place: re.Match[str]) -> str:
        path = named.get(place[2], RESULTS / f"{place[2]}.json")
        return f"{place[1]}{section(path, readme)}{place[4]}"

    if (new := PLACE.sub(fill, old)) == old:
        return
    if check:
        lines = zip(old.splitlines(), new.splitlines(), strict=False)
        first = next((b for a, b in lines if a != b), "its end")
        raise Refused(f"{readme} differs from its results, from: {first}")
    readme.write_text(new)
    print(readme)


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="files of bench_*.py --save or bench/gpu.py")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw PNG and SVG there")
    parser.add_argument("--readme", type=Path, nargs="*", metavar="FILE", help="fill in the tables there")
    parser.add_argument("--check", action="store_true", help="compare the READMEs, change nothing")
    given = parser.parse_args(words)
    readmes = given.readme is not None or given.check
    if not (given.results or readmes):
        parser.error("name results, or --readme, or --check")

    def show(path: Path) -> None:
        if given.pictures is not None:
            result = trusted(path)
            print(*draw(path.stem, result, stamp(result), given.pictures), sep="\n")
        elif not readmes:
            print(section(path, ROOT / "README.md"))

    work = [(show, (path,)) for path in given.results]
    for readme in (given.readme or READMES) if readmes else ():
        work.append((update_readme, (readme, given.results, given.check)))
    code = 0
    for step, inputs in work:  # what is wrong with one file is a line, and costs the others nothing
        try:
            step(*inputs)
        except Refused as reason:
            print(f"report: {one_line(reason)}", file=sys.stderr)
            code = 1
        except Exception as error:
            told = f"{type(error).__name__}: {one_line(error)}; measure again if the result lacks it"
            print(f"report: {inputs[0]} gives no table or picture ({told})", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
