"""Ratios of two results, or of two revisions, with what noise leaves open.

    python bench/compare.py A.json B.json [--threshold 0.9] [--providers NAME ...] [--against NAME] [--force]
    python bench/compare.py --revisions OLD NEW --benchmark update|replay [--rounds 3] [-- OPTION ...]
    python bench/compare.py --ratio-floor 1.1 RESULT.json [--to plain]

A ratio is B against A, or the new revision against the old: above 1 is better, whatever the unit. For two
files the bounds are two standard errors of the medians, from quartiles and rounds. They do not know what else
the machine did: --revisions builds both and runs them in turns, in this checkout's benchmark, and its bounds
are the span over the rounds. Options after -- go to the benchmark (-- --width 128 --budget 10).
--against: ratios over that of a provider that did not change, which ran interleaved: a busy machine cancels.
--threshold: exit code 1 if a ratio lies below it with all of its bounds. --ratio-floor: the same for ours to
another provider of one result; its bounds are quartiles of the ratios round by round.
Exit code 2: there is nothing to compare, or what must not be: files of different machines, of a run that
failed or whose equality check did. --force compares such files all the same and marks every line.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import ROOT, Parser, Unreadable, failures, one_line, positive, read

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


class Refused(Exception):
    """Nothing can be compared; the message is one line."""


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


def error(entry: Entry) -> float:
    """Relative standard error of a median: 1.25 standard deviations, which are the quartiles' span / 1.35."""
    if entry["low"] is None or entry["high"] is None:
        return 0.0
    span = (entry["high"] - entry["low"]) / 1.35 / abs(entry["value"])
    return float(1.25 * span / math.sqrt(max(1, entry["rounds"])))


def ratio(old: Entry, new: Entry) -> Ratio:
    """Of two measurements that have values."""
    middle = new["value"] / old["value"]
    middle = middle if new["better"] == "more" else 1.0 / middle
    noise = math.exp(min(300.0, 2.0 * math.hypot(error(old), error(new))))  # past telling from there on
    found = Ratio(new["case"], new["provider"], middle, middle / noise, middle * noise)
    if not (found.low > 0.0 and math.isfinite(found.high)):
        told = f"{old['value']:g} and {new['value']:g}"
        raise Refused(f"{new['case']}, {new['provider']}: {told} have no ratio; measure both anew")
    return found


def ratios(
    one: Mapping[str, Any], other: Mapping[str, Any], wanted: Sequence[str] = (), control: str | None = None
) -> tuple[list[Ratio], list[str]]:
    """Of what both measured, and a line for everything else."""
    old, new, found, lines = keyed(one), keyed(other), list[Ratio](), list[str]()
    for key in dict.fromkeys([*old, *new]):
        if wanted and key[1] not in (*wanted, control):
            continue
        a, b, told = old.get(key), new.get(key), f"{key[0]:<44} {key[1]:<22}"
        if a is None or b is None:
            lines.append(f"{told} only in {'A' if b is None else 'B'}")
        elif not (a["value"] and b["value"]):
            place, entry = ("A", a) if not a["value"] else ("B", b)
            lines.append(f"{told} no value in {place}: {entry.get('missing', 'it is 0')}")
        elif a["unit"] != b["unit"]:
            raise Refused(f"{', '.join(key)} is in {a['unit']} and in {b['unit']}: measure both anew")
        else:
            found.append(ratio(a, b))
    return (against(found, control) if control is not None else found), lines


def against(found: Sequence[Ratio], control: str) -> list[Ratio]:
    """Every ratio over that of the control in the same case."""
    base = {r.case: r for r in found if r.provider == control}
    others = [(r, base[r.case]) for r in found if r.provider != control and r.case in base]
    if not others:
        raise Refused(f"no case has a ratio of {control} and of another provider")
    return [
        r._replace(middle=r.middle / c.middle, low=r.low / c.high, high=r.high / c.low) for r, c in others
    ]


def trusted(path: Path, force: bool) -> dict[str, Any]:
    """Results of a run that did not fail and that passed its equality check, or of any if it is forced."""
    result = read(path)
    if not force and (reasons := failures(result)):
        told = "; ".join(reasons.values())
        raise Refused(f"{path} must not be compared: {told}; --force compares all the same")
    return result


def compare_files(given: argparse.Namespace) -> tuple[list[Ratio], list[str]]:
    """Prints all but the ratios; returns them, and what to mark each line with."""
    one, other = (trusted(path, given.force) for path in given.results)
    differing = "; ".join(f"{n}: {one[n]}, {other[n]}" for n in MACHINE if one[n] != other[n])
    if differing and not given.force:
        raise Refused(f"the machines differ ({differing}); --force compares all the same")
    found, lines = ratios(one, other, given.providers, given.against)
    if not found:
        raise Refused(f"{' and '.join(map(str, given.results))} share no case and provider with values")
    marks = ["different machines"] if differing else []
    for name, result in zip("AB", (one, other), strict=True):
        commit = (result["commit"] or "no commit")[:7] + (", dirty" if result["dirty"] else "")
        line = f"{name}: {result['date'][:10]}, {result['gpu'] or result['cpu']}, {commit}"
        print(one_line("; ".join([line, *failures(result).values()])))
        marks += [f"{short} of {name}" for short in failures(result)]
    print(*lines, sep="\n", end="\n" if lines else "")
    return found, marks


def compare_providers(path: Path, other: str, force: bool) -> tuple[list[Ratio], list[str]]:
    """How many times as good ours is as the other, round by round, in every case."""
    result = trusted(path, force)
    keys, found = keyed(result), list[Ratio]()
    if not any("ratio" in entry for entry in keys.values()):
        raise Refused(f"{path} has no ratios; bench_update.py --save NAME measures them")
    for case in dict.fromkeys(case for case, _ in keys):
        if "ratio" not in (entry := keys.get((case, other), {})):
            own = [
                f"{e['provider']}: {e['missing']}"
                for (c, _), e in keys.items()
                if c == case and "missing" in e
            ]
            raise Refused(f"{case} has no ratio to {other}: {'; '.join(own) or 'it was not timed'}")
        found.append(Ratio(case, f"ours / {other}", *entry["ratio"]))
    return found, list(failures(result))


# ---------------------------------------------------------------- two revisions


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"git {' '.join(words)}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return done.stdout.strip()


def built(revision: str) -> Path:
    """A folder with the package of a revision; one that is there already is taken."""
    commit = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")[:12]
    site, tree, begun = (FOLDER / f"{commit}{end}" for end in ("", "-tree", "-begun"))
    if site.exists():
        return site
    print(f"building {revision} ({commit[:7]})", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    git("worktree", "add", "--force", "--detach", str(tree), commit)
    try:
        words = ["install", "-q", "--no-deps", "--upgrade", "--target", str(begun), str(tree)]
        if importlib.util.find_spec("scikit_build_core") is not None:
            words.append("--no-build-isolation")
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise Refused(f"{revision} cannot be built: {lines[-1]}")
        begun.rename(site)
    finally:
        shutil.rmtree(begun, ignore_errors=True)
        git("worktree", "remove", "--force", str(tree))
    return site


def run(site: Path, benchmark: str, words: Sequence[str], name: str) -> dict[str, Any]:
    """One run of this checkout's benchmark with the package of a folder."""
    result, script = FOLDER / f"{name}.json", ROOT / "bench" / f"bench_{benchmark}.py"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-c", BOOT, str(site), str(script), *words]
    command += ["--save", str(result.with_suffix(""))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise Refused(f"{script.name} with {name} ended with {done.returncode}: {lines[-1]}")
    return read(result)


def joined(rounds: Sequence[Sequence[Ratio]]) -> Iterator[Ratio]:
    """Median and span of what every round has a ratio of."""
    for first in rounds[0]:
        same = [r.middle for found in rounds for r in found if r[:2] == first[:2]]
        if len(same) == len(rounds):
            yield Ratio(first.case, first.provider, statistics.median(same), min(same), max(same))


def compare_revisions(given: argparse.Namespace, words: Sequence[str]) -> list[Ratio]:
    """Old and new in turns; every other round begins with the new one."""
    sites = {place: built(revision) for place, revision in zip("AB", given.revisions, strict=True)}
    rounds = []
    for number in range(given.rounds):
        order = "AB" if number % 2 == 0 else "BA"
        results = {place: run(sites[place], given.benchmark, words, place) for place in order}
        found, lines = ratios(results["A"], results["B"], given.providers, given.against)
        rounds.append(found)
        print(*([] if number else lines), f"round {number + 1} of {given.rounds}", sep="\n", flush=True)
    if not (whole := list(joined(rounds))):
        raise Refused(f"{' and '.join(given.revisions)} share no case and provider with values")
    return whole


def bound(word: str) -> float:
    """A finite number: nothing lies below NaN."""
    if not math.isfinite(value := float(word)):
        raise ValueError
    return value


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="two files; one with --ratio-floor")
    parser.add_argument("--threshold", type=bound, help="exit code 1 below it, for example 0.9")
    parser.add_argument("--providers", nargs="+", default=[], help="only these")
    parser.add_argument("--against", metavar="NAME", help="over the ratio of this provider")
    parser.add_argument("--force", action="store_true", help="compare also what should not be, and say so")
    parser.add_argument("--revisions", nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--benchmark", choices=("update", "replay"), default="update", help="of --revisions")
    parser.add_argument("--rounds", type=positive, default=3, help="of --revisions")
    parser.add_argument("--ratio-floor", type=bound, help="least ratio of ours to --to in one file")
    parser.add_argument("--to", default="plain", metavar="NAME", help="default: plain")
    asked = list(sys.argv[1:] if words is None else words)
    place = asked.index("--") if "--" in asked else len(asked)
    given, rest = parser.parse_args(asked[:place]), asked[place + 1 :]
    files = 0 if given.revisions else 1 if given.ratio_floor is not None else 2
    if len(given.results) != files:
        parser.error(f"{files} files are expected, got {len(given.results)}")
    if rest and not given.revisions:
        parser.error(f"only --revisions runs a benchmark that could take {' '.join(rest)}")
    threshold, marks = given.threshold, list[str]()
    try:
        if given.revisions:
            found = compare_revisions(given, rest)
        elif given.ratio_floor is not None:
            found, marks = compare_providers(given.results[0], given.to, given.force)
            threshold = given.ratio_floor
        else:
            found, marks = compare_files(given)
    except (Refused, Unreadable, OSError) as reason:  # OSError: of building a revision
        parser.error(f"{reason}")
    print(f"{'case':<44} {'provider':<22} {'x':>8} (bounds)")
    below = [threshold is not None and line.high < threshold for line in found]
    for line, worse in zip(found, below, strict=True):
        told = marks + ([f"below {threshold:g}"] if worse else [])
        print(f"{line}  {', '.join(told)}".rstrip())
    return 1 if any(below) else 0


if __name__ == "__main__":
    sys.exit(main())
