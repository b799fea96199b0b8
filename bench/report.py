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

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, Unreadable, failures, making, one_line, read
from report_tables import table

READMES = tuple(ROOT / name for name in ("README.md", "bench/README.md", "docs/critic.md", "docs/replay.md"))
BEGIN = re.compile(r"^<!-- report: \S+ -->$", re.MULTILINE)  # on lines of their own
PLACE = re.compile(r"^(<!-- report: (\S+) -->\n)(.*?)^(<!-- end -->)$", re.DOTALL | re.MULTILINE)
VERSIONS = ("torch", "jax", "triton")  # what a line has room for; the file has all


class Refused(Exception):
    """A result must not be cited; the message has the reasons and the remedy."""


def refusals(path: Path, result: Mapping[str, Any]) -> Iterator[str]:
    """Every reason why a result must not be cited."""
    yield from failures(result).values()
    if result.get("equality") is None and len({entry["provider"] for entry in result["measurements"]}) > 1:
        yield "it compares providers without an equality check: measure again"
    if result["commit"] is None:
        yield "it was measured outside of a git checkout: commit and measure again"
    elif result["dirty"] is None:
        yield "it is not known whether it was measured with uncommitted changes: commit and measure again"
    elif result["dirty"]:
        yield "it was measured with uncommitted changes: commit and measure again"
    if path.stem.startswith("gpu-") and (tests := path.parent / "gpu-test.json").exists():
        try:
            told = json.loads(tests.read_text())
        except (OSError, ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            yield f"{tests.name} beside it holds no result of tests: run the tests again"
        elif told.get("commit") == result["commit"] and told.get("status") == "failed":
            yield f"the tests of its commit failed ({told.get('reason', tests.name)})"


def trusted(path: Path) -> dict[str, Any]:
    """A result that may be cited.

    Raises:
        Refused, Unreadable: with the reason in a line.
    """
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


def section(path: Path, result: Mapping[str, Any], beside: Path) -> str:
    """The table with its line; the link is relative to the folder of `beside`.

    Raises:
        Unreadable: the result lacks what its table needs.
    """
    link = Path(os.path.relpath(path.resolve(), beside.resolve().parent)).as_posix()
    with making("table", path, result):
        return f"{table(result)}\n\n{stamp(result)} ([{path.name}]({link})).\n"


def found_by_name(name: str, given: Sequence[Path]) -> Path:
    """The file of a result: among those given, else in bench/results."""
    for path in given:
        if path.stem == name:
            return path
    lines = RESULTS / f"{name}.jsonl"
    return lines if lines.exists() else RESULTS / f"{name}.json"


def filled(readme: Path, given: Sequence[Path]) -> tuple[str, str]:
    """The text of a README as it is and as its results want it."""
    try:
        text = readme.read_text()
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "no text"
        raise Refused(f"{readme} cannot be read ({told})") from None
    opened, closed = len(BEGIN.findall(text)), len(PLACE.findall(text))
    if opened != closed:
        raise Refused(f"{readme}: {opened} places begin with <!-- report: NAME -->, {closed} have an end")

    def fill(place: re.Match[str]) -> str:
        path = found_by_name(place[2], given)
        return f"{place[1]}{section(path, trusted(path), readme)}{place[4]}"

    return text, PLACE.sub(fill, text)


def first_difference(old: str, new: str) -> str:
    """The first line that changes, as it should be."""
    lines = zip(old.splitlines(), new.splitlines(), strict=False)
    return next((b for a, b in lines if a != b), "its end")


def update_readmes(readmes: Sequence[Path], given: Sequence[Path], check: bool) -> int:
    code = 0
    for readme in readmes:
        try:
            old, new = filled(readme, given)
        except (Refused, Unreadable) as reason:
            code = complain(reason)
            continue
        if old == new:
            continue
        if check:
            code = complain(f"{readme} differs from its results, from: {first_difference(old, new)}")
            continue
        try:
            readme.write_text(new)
            print(readme)
        except OSError as error:
            code = complain(f"{readme} cannot be written ({error.strerror})")
    return code


def draw_all(results: Mapping[Path, Mapping[str, Any]], folder: Path) -> int:
    from report_pictures import draw

    code = 0
    for path, result in results.items():
        try:
            with making("picture", path, result):
                pictures = draw(path.stem, result, stamp(result), folder)
        except Unreadable as reason:
            code = complain(reason)
            continue
        print(*pictures, sep="\n", end="\n" if pictures else "")
    return code


def print_all(results: Mapping[Path, Mapping[str, Any]]) -> int:
    code, sections = 0, []
    for path, result in results.items():
        try:
            sections.append(section(path, result, ROOT / "README.md"))
        except Unreadable as reason:
            code = complain(reason)
    if sections:
        print("\n".join(sections))
    return code


def complain(reason: object) -> int:
    """A line on standard error, and the exit code that goes with it."""
    print(f"report: {one_line(reason)}", file=sys.stderr)
    return 1


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="files of bench_*.py --save or bench/gpu.py")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw PNG and SVG there")
    parser.add_argument("--readme", type=Path, nargs="*", metavar="FILE", help="fill in the tables there")
    parser.add_argument("--check", action="store_true", help="compare the READMEs, change nothing")
    given = parser.parse_args(words)
    if not (given.results or given.readme is not None or given.check):
        parser.error("name results, or --readme, or --check")
    trustworthy, code = {}, 0
    for path in given.results:  # one that is refused does not cost the others their tables
        try:
            trustworthy[path] = trusted(path)
        except (Refused, Unreadable) as reason:
            code = complain(reason)
    if given.pictures is not None:
        code |= draw_all(trustworthy, given.pictures)
    if given.readme is not None or given.check:
        code |= update_readmes(given.readme or READMES, given.results, given.check)
    elif given.pictures is None:
        code |= print_all(trustworthy)
    return code


if __name__ == "__main__":
    sys.exit(main())
