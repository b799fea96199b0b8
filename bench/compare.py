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
another provider of one result of bench_update.py; its bounds are quartiles of the ratios round by round.
Exit code 2: there is nothing to compare, or what must not be: files of different machines, of a run that
failed or whose equality check did. --force compares such files all the same and marks every line.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import ROOT, Measurement, Parser, Unreadable, failures, one_line, positive, read

MACHINE = ("cpu", "gpu", "cores", "torch_threads")
FOLDER = ROOT / "build" / "compare"
MOST = 300.0  # of a logarithm, where noise is past telling
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

Key = tuple[str, str]  # case and provider


class Refused(Exception):
    """Nothing can be compared; the message is one line."""


class Ratio(NamedTuple):
    """How many times as good, and between which bounds."""

    case: str
    provider: str
    middle: float
    low: float
    high: float

    def below(self, threshold: float) -> bool:
        return self.high < threshold

    def __str__(self) -> str:
        bounds = f"({self.low:.3f} to {self.high:.3f})"
        return f"{self.case:<44} {self.provider:<22} {self.middle:8.3f} {bounds}"


def keyed(result: Mapping[str, Any]) -> dict[Key, Measurement]:
    return {(entry["case"], entry["provider"]): entry for entry in result["measurements"]}


def oriented(old: float, new: float, better: str) -> float:
    """Above 1 where the new one is better."""
    return new / old if better == "more" else old / new


def error(entry: Measurement) -> float:
    """Relative standard error of a median: 1.25 standard deviations, which are the quartiles' span / 1.35."""
    value, low, high = entry["value"], entry["low"], entry["high"]
    if not value or low is None or high is None:
        return 0.0
    return 1.25 * (high - low) / 1.35 / math.sqrt(max(1, entry["rounds"])) / abs(value)


def ratio(old: Measurement, new: Measurement) -> Ratio:
    """Of two measurements that have values."""
    assert old["value"] is not None
    assert new["value"] is not None
    middle = oriented(old["value"], new["value"], new["better"])
    noise = math.exp(min(MOST, 2.0 * math.hypot(error(old), error(new))))
    found = Ratio(new["case"], new["provider"], middle, middle / noise, middle * noise)
    if not (found.low > 0.0 and math.isfinite(found.high)):
        told = f"{old['value']:g} and {new['value']:g}"
        raise Refused(f"{new['case']}, {new['provider']}: {told} have no ratio; measure both anew")
    return found


# ---------------------------------------------------------------- two files


def machine_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs of the machines, or nothing."""
    differing = [name for name in MACHINE if one.get(name) != other.get(name)]
    return "; ".join(f"{name}: {one.get(name)}, {other.get(name)}" for name in differing)


def ratios(
    one: Mapping[str, Any], other: Mapping[str, Any], wanted: Sequence[str] = (), control: str | None = None
) -> tuple[list[Ratio], list[str]]:
    """Of what both measured, and a line for everything else."""
    old, new = keyed(one), keyed(other)
    found: list[Ratio] = []
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        case, provider = key
        if wanted and provider not in (*wanted, control):
            continue
        a, b = old.get(key), new.get(key)
        told = f"{case:<44} {provider:<22}"
        if a is None or b is None:
            lines.append(f"{told} only in {'A' if b is None else 'B'}")
        elif a["value"] and b["value"]:
            if a["unit"] != b["unit"]:
                raise Refused(f"{case}, {provider} is in {a['unit']} and in {b['unit']}: measure both anew")
            found.append(ratio(a, b))
        else:
            place, entry = ("A", a) if not a["value"] else ("B", b)
            lines.append(f"{told} no value in {place}: {entry.get('missing', 'it is 0')}")
    return (against(found, control) if control is not None else found), lines


def against(found: Sequence[Ratio], control: str) -> list[Ratio]:
    """Every ratio over that of the control in the same case."""
    base = {r.case: r for r in found if r.provider == control}
    over = [
        Ratio(r.case, r.provider, r.middle / c.middle, r.low / c.high, r.high / c.low)
        for r in found
        if r.provider != control and (c := base.get(r.case)) is not None
    ]
    if not over:
        raise Refused(f"no case has a ratio of {control} and of another provider")
    return over


def told(name: str, result: Mapping[str, Any]) -> str:
    """A file's line: when, where and of which commit, and why not to trust it."""
    commit = (result["commit"] or "no commit")[:7] + (", dirty" if result["dirty"] else "")
    line = f"{name}: {result['date'][:10]}, {result['gpu'] or result['cpu']}, {commit}"
    return one_line("; ".join([line, *failures(result).values()]))


def trusted(path: Path, force: bool) -> dict[str, Any]:
    """Results of a run that did not fail and that passed its equality check, or of any if it is forced.

    Raises:
        Refused, Unreadable: with the reason in a line.
    """
    result = read(path)
    if not force and (reasons := failures(result)):
        told = "; ".join(reasons.values())
        raise Refused(f"{path} must not be compared: {told}; --force compares all the same")
    return result


def compare_files(
    paths: Sequence[Path], wanted: Sequence[str], control: str | None, force: bool
) -> tuple[list[Ratio], list[str]]:
    """Prints all but the ratios; returns them, and what to mark each line with."""
    one, other = (trusted(path, force) for path in paths)
    differing = machine_difference(one, other)
    if differing and not force:
        raise Refused(f"the machines differ ({differing}); --force compares all the same")
    found, lines = ratios(one, other, wanted, control)
    if not found:
        raise Refused(f"{paths[0]} and {paths[1]} share no case and provider with values")
    pairs = list(zip("AB", (one, other), strict=True))
    print("\n".join([*(told(*pair) for pair in pairs), *lines]))
    marks = ["different machines"] if differing else []
    return found, marks + [f"{short} of {name}" for name, result in pairs for short in failures(result)]


# ---------------------------------------------------------------- two revisions


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"git {' '.join(words)}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return done.stdout.strip()


def built(revision: str) -> Path:
    """A folder with the package of a revision; one that is there already is taken."""
    commit = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")[:12]
    site, tree, begun = FOLDER / commit, FOLDER / f"{commit}-tree", FOLDER / f"{commit}-begun"
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
    result = FOLDER / f"{name}.json"
    result.unlink(missing_ok=True)
    script = ROOT / "bench" / f"bench_{benchmark}.py"
    command = [sys.executable, "-P", "-c", BOOT, str(site), str(script), *words]
    done = subprocess.run(
        [*command, "--save", str(result.with_suffix(""))], cwd=ROOT, capture_output=True, text=True
    )
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


def compare_revisions(
    revisions: Sequence[str],
    benchmark: str,
    rounds: int,
    words: Sequence[str],
    wanted: Sequence[str],
    control: str | None,
) -> list[Ratio]:
    """Old and new in turns; every other round begins with the new one."""
    sites = {place: built(revision) for place, revision in zip(("A", "B"), revisions, strict=True)}
    found = []
    for number in range(rounds):
        order = ("A", "B") if number % 2 == 0 else ("B", "A")
        results = {place: run(sites[place], benchmark, words, place) for place in order}
        one, lines = ratios(results["A"], results["B"], wanted, control)
        if number == 0 and lines:
            print("\n".join(lines))
        found.append(one)
        print(f"round {number + 1} of {rounds}", flush=True)
    if not (all_rounds := list(joined(found))):
        raise Refused(f"{' and '.join(revisions)} share no case and provider with values")
    return all_rounds


# ---------------------------------------------------------------- one file


def compare_providers(path: Path, other: str, force: bool) -> tuple[list[Ratio], list[str]]:
    """How many times as good ours is as the other, round by round, in every case; and what to mark each line
    with."""
    result, found = trusted(path, force), []
    cases = list(dict.fromkeys(entry["case"] for entry in result["measurements"]))
    keys = keyed(result)
    for case in cases if any("ratio" in entry for entry in keys.values()) else ():
        entry = keys.get((case, other))
        if entry is None or "ratio" not in entry:
            own = [
                f"{e['provider']}: {e['missing']}"
                for e in keys.values()
                if e["case"] == case and "missing" in e
            ]
            raise Refused(f"{case} has no ratio to {other}: {'; '.join(own) or 'it was not timed'}")
        found.append(Ratio(case, f"ours / {other}", *entry["ratio"]))
    if not found:
        raise Refused(f"{path} has no ratios; bench_update.py --save NAME measures them")
    return found, list(failures(result))


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
    threshold = given.threshold
    marks: list[str] = []
    try:
        if given.revisions:
            found = compare_revisions(
                given.revisions, given.benchmark, given.rounds, rest, given.providers, given.against
            )
        elif given.ratio_floor is not None:
            found, marks = compare_providers(given.results[0], given.to, given.force)
            threshold = given.ratio_floor
        else:
            found, marks = compare_files(given.results, given.providers, given.against, given.force)
    except (Refused, Unreadable, OSError) as reason:  # OSError: of building a revision
        print(f"compare: {one_line(reason)}", file=sys.stderr)
        return 2
    print(f"{'case':<44} {'provider':<22} {'x':>8} (bounds)")
    worse = [] if threshold is None else [r for r in found if r.below(threshold)]
    for line in found:
        below = [f"below {threshold:g}"] if line in worse else []
        print(f"{line}  {', '.join(marks + below)}".rstrip())
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
