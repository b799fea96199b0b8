"""Ratios of two results, or of two revisions, with what noise leaves open.

    python bench/compare.py A.json B.json [--threshold 0.9] [--providers NAME ...] [--against NAME] [--force]
    python bench/compare.py --revisions OLD NEW --benchmark update|replay [--rounds 3] [-- OPTION ...]
    python bench/compare.py --ratio-floor 1.1 RESULT.json [--to plain]

A ratio is B against A, or the new revision against the old: above 1 is better, whatever the unit. The bounds
of two files are their quartiles over each other. They do not know what else the machine did: --revisions
builds both and runs them in turns, each in its own benchmark, and its bounds are the span over the rounds.
Options after -- go to the benchmark (-- --width 128 --budget 10).
--against: ratios over that of a provider that did not change, which ran interleaved: a busy machine cancels.
--threshold: exit code 1 if a ratio lies below it with all of its bounds. --ratio-floor: the same for ours to
another provider of one result; its bounds are quartiles of the ratios round by round.
Exit code 2: there is nothing to compare, or what must not be: files of different machines, of a run that
failed or whose equality check did. --force compares such files all the same, and says so.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import FORMAT, ROOT, Parser, Refused, failures, one_line, positive, read

MACHINE = ("cpu", "gpu", "cores", "torch_threads")
FOLDER = ROOT / "build" / "compare"
# Runs a script with the package of a folder, also where another one is installed to be edited in place.
BOOT = """
import runpy, sys
site, script, *words = sys.argv[1:]
sys.meta_path[:] = [finder for finder in sys.meta_path if not hasattr(finder, "known_source_files")]
sys.path[:0] = [site, script.rpartition("/")[0]]
import brc_fast
if not brc_fast.__file__.startswith(site):
    sys.exit(f"brc_fast comes from {brc_fast.__file__}, not from {site}")
sys.argv = [script, *words]
runpy.run_path(script, run_name="__main__")
"""

Entry = Mapping[str, Any]


class Ratio(NamedTuple):
    """How many times as good, and between which bounds."""

    case: str
    provider: str
    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        bounds = f"({self.low:.3f} to {self.high:.3f})"
        return f"{self.case:<44} {self.provider:<22} {self.middle:8.3f} {bounds}"


def keyed(result: Mapping[str, Any]) -> dict[tuple[str, str], Entry]:
    return {(entry["case"], entry["provider"]): entry for entry in result["measurements"]}


def ratio(old: Entry, new: Entry) -> Ratio:
    """Of two measurements that have values."""
    if old["unit"] != new["unit"]:
        told = f"is in {old['unit']} and in {new['unit']}"
        raise Refused(f"{new['case']}, {new['provider']} {told}: measure both anew")
    these, those = (new, old) if new["better"] == "more" else (old, new)
    low = (these["low"] or these["value"]) / (those["high"] or those["value"])
    high = (these["high"] or these["value"]) / (those["low"] or those["value"])
    return Ratio(new["case"], new["provider"], these["value"] / those["value"], low, high)


def ratios(
    one: Mapping[str, Any], other: Mapping[str, Any], wanted: Sequence[str] = (), control: str | None = None
) -> tuple[list[Ratio], list[str]]:
    """Of what both measured, and a line for everything else; with a control, over its ratio in each case."""
    old, new, found, lines = keyed(one), keyed(other), list[Ratio](), list[str]()
    for key in dict.fromkeys([*old, *new]):
        told, pair = f"{key[0]:<44} {key[1]:<22}", {"A": old.get(key), "B": new.get(key)}
        if wanted and key[1] not in (*wanted, control):
            continue
        if absent := [place for place, entry in pair.items() if entry is None]:
            lines.append(f"{told} not in {absent[0]}")
        elif empty := [(place, entry) for place, entry in pair.items() if not entry["value"]]:
            lines.append(f"{told} no value in {empty[0][0]}: {empty[0][1].get('missing', 'it is 0')}")
        else:
            found.append(ratio(*pair.values()))
    if control is None:
        return found, lines
    base = {r.case: r for r in found if r.provider == control}
    pairs = [(r, base[r.case]) for r in found if r.provider != control and r.case in base]
    over = [r._replace(middle=r.middle / c.middle, low=r.low / c.high, high=r.high / c.low) for r, c in pairs]
    return over, lines


def checked(force: bool, *results: dict[str, Any]) -> None:
    """Refuses results that must not be compared; if it is forced, says why not."""
    reasons = [why for result in results for why in failures(result)]
    kinds = {name: {str(result[name]) for result in results} for name in MACHINE}
    reasons += [f"the machines differ ({n}: {', '.join(sorted(s))})" for n, s in kinds.items() if len(s) > 1]
    if reasons and not force:
        raise Refused(f"these must not be compared: {'; '.join(reasons)}; --force compares all the same")
    if reasons:
        print(f"compared all the same, by --force: {one_line('; '.join(reasons))}")


def compare_files(given: argparse.Namespace) -> list[Ratio]:
    """Prints all but the ratios, and returns them."""
    one, other = map(read, given.results)
    checked(given.force, one, other)
    found, lines = ratios(one, other, given.providers, given.against)
    for name, result in (("A", one), ("B", other)):
        commit = (result["commit"] or "no commit")[:7] + (", dirty" if result["dirty"] else "")
        print(f"{name}: {result['date'][:10]}, {result['gpu'] or result['cpu']}, {commit}")
    print(*lines, sep="\n", end="\n" if lines else "")
    return found


def compare_providers(given: argparse.Namespace) -> list[Ratio]:
    """How many times as good ours is as the other, round by round, in every case."""
    (result,), found = map(read, given.results), list[Ratio]()
    checked(given.force, result)
    cells = keyed(result)
    for case in dict.fromkeys(case for case, _ in cells):
        entry = cells.get((case, given.to), {})
        if "ratio" not in entry:
            raise Refused(f"{case} has no ratio to {given.to}: {entry.get('missing', 'it was not timed')}")
        found.append(Ratio(case, f"ours / {given.to}", *entry["ratio"]))
    return found


# ---------------------------------------------------------------- two revisions


def done(words: Sequence[str | Path], what: str) -> str:
    """What a command prints; Refused with the last line of its errors where it fails."""
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        lines = (ended.stderr or ended.stdout).strip().splitlines() or ["it said nothing"]
        raise Refused(f"{what} ended with {ended.returncode}: {lines[-1]}")
    return ended.stdout.strip()


def built(revision: str) -> Path:
    """A folder with a revision's files, and with its package in `site`; one that is there is taken."""
    word = f"{revision}^{{commit}}"
    commit = done(["git", "rev-parse", "--verify", "--end-of-options", word], f"git rev-parse {revision}")
    folder, begun, archive = (FOLDER / f"{commit[:12]}{end}" for end in ("", "-begun", ".tar"))
    if not folder.exists():
        print(f"building {revision} ({commit[:7]})", flush=True)
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)
        done(["git", "archive", "-o", archive, commit], "git archive")
        done(["tar", "-xf", archive, "-C", begun], "tar")
        archive.unlink()
        words = ["install", "-q", "--no-deps", "--no-build-isolation", "--target", begun / "site", begun]
        done([sys.executable, "-m", "pip", *words], f"building {revision}")
        begun.rename(folder)
    return folder


def run(folder: Path, benchmark: str, words: Sequence[str], name: str) -> dict[str, Any]:
    """One run of a revision's own benchmark with its own package."""
    result, script = FOLDER / f"{name}.json", folder / "bench" / f"bench_{benchmark}.py"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-c", BOOT, folder / "site", script, *words]
    done([*command, "--save", result.with_suffix("")], f"{script.name} of {name}")
    return read(result, formats=(1, FORMAT))


def compare_revisions(given: argparse.Namespace, words: Sequence[str]) -> list[Ratio]:
    """Old and new in turns; every other round begins with the new one. Median and span of the rounds."""
    folders = {place: built(revision) for place, revision in zip("AB", given.revisions, strict=True)}
    rounds = dict[tuple[str, str], list[float]]()
    for number in range(given.rounds):
        order = "AB" if number % 2 == 0 else "BA"
        results = {place: run(folders[place], given.benchmark, words, place) for place in order}
        found, lines = ratios(results["A"], results["B"], given.providers, given.against)
        for one in found:
            rounds.setdefault((one.case, one.provider), []).append(one.middle)
        print(*([] if number else lines), f"round {number + 1} of {given.rounds}", sep="\n", flush=True)
    whole = {key: own for key, own in rounds.items() if len(own) == given.rounds}
    return [Ratio(*key, statistics.median(own), min(own), max(own)) for key, own in whole.items()]


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="two files; one with --ratio-floor")
    parser.add_argument("--threshold", type=float, default=-math.inf, help="exit code 1 below it, as 0.9")
    parser.add_argument("--providers", nargs="+", default=[], help="only these")
    parser.add_argument("--against", metavar="NAME", help="over the ratio of this provider")
    parser.add_argument("--force", action="store_true", help="compare also what should not be, and say so")
    parser.add_argument("--revisions", nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--benchmark", choices=("update", "replay"), default="update", help="of --revisions")
    parser.add_argument("--rounds", type=positive, default=3, help="of --revisions")
    parser.add_argument("--ratio-floor", type=float, help="least ratio of ours to --to in one file")
    parser.add_argument("--to", default="plain", metavar="NAME", help="default: plain")
    asked = list(sys.argv[1:] if words is None else words)
    place = asked.index("--") if "--" in asked else len(asked)
    given, rest = parser.parse_args(asked[:place]), asked[place + 1 :]
    files = 0 if given.revisions else 1 if given.ratio_floor is not None else 2
    if len(given.results) != files:
        parser.error(f"{files} files are expected, got {len(given.results)}")
    if rest and not given.revisions:
        parser.error(f"only --revisions runs a benchmark that could take {' '.join(rest)}")
    threshold = given.threshold if given.ratio_floor is None else given.ratio_floor
    try:
        if given.revisions:
            found = compare_revisions(given, rest)
        else:
            found = (compare_files if given.ratio_floor is None else compare_providers)(given)
        if not found:
            raise Refused("no case and provider has a ratio; give results of the same benchmark and options")
    except (Refused, OSError) as reason:
        parser.error(one_line(reason))
    print(f"{'case':<44} {'provider':<22} {'x':>8} (bounds)")
    for line in found:
        print(line, *([] if line.high >= threshold else [f" below {threshold:g}"]))
    return 0 if all(line.high >= threshold for line in found) else 1


if __name__ == "__main__":
    sys.exit(main())
