"""Files changed at random, always the same for the same seed, and what becomes of those who read them."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

DEEP, LONG, TWICE = "<deep>", "<long>", "<twice>"  # what json.dumps cannot write
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *(2**n + d for n in (7, 16, 31, 32, 53, 62, 63, 64, 100) for d in (-1, 0)),
    *(-(2**31), -(2**63), -(2**63) - 1, 10**40),
    *(
        "",
        "0",
        "x",
        "nan",
        "../../x",
        "/etc/passwd",
        "/dev/zero",
        "a\0b",
        "\ud800",
        "é",
        "x" * 10_000,
        "\x1b[2J",
    ),
    *([], {}, [0], [[]], [None], ["x"], [2**64], [-1], {"a": 1}, {"a": {"a": []}}, DEEP, LONG, TWICE),
]
PIECES = [
    b"NaN",
    b"Infinity",
    b"1e999",
    b"9" * 5000,
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"a":1,',
    b"[",
    b"}",
    b"null",
    b"\0",
]


def text_of(value: Any) -> str:
    """JSON, with what only a forger would write."""
    text = json.dumps(value)
    text = text.replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000)
    return text.replace(f'"{LONG}"', "9" * 5000).replace(f'"{TWICE}"', '{"a": 1, "a": []}')


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with every key of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in places(value[key])]


def changed_value(rng: random.Random, value: Any) -> Any:
    """A copy of some JSON with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        everywhere = places(value)
        if not everywhere or rng.random() < 0.01:
            value = copy.deepcopy(rng.choice(VALUES))
            continue
        inside, key = rng.choice(everywhere)
        old, how = inside[key], rng.randrange(6)
        if how == 0:
            del inside[key]
        elif how == 1 and isinstance(inside, dict):
            inside[rng.choice(["x", f"{key}x", "", "\0", "__metadata__"])] = copy.deepcopy(rng.choice(VALUES))
        elif how == 1 or (how == 2 and isinstance(inside, list)):
            inside.insert(rng.randint(0, len(inside)), copy.deepcopy(rng.choice([old, *VALUES])))
        elif how == 3 and isinstance(old, int | float):
            inside[key] = old + rng.choice([-1, 1, 0.5, 2**20, 2**32, -(2**33)])
        elif how == 4 and isinstance(old, list):
            rng.shuffle(old)
        else:
            inside[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """A copy of a file's bytes with one to eight changes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, how = rng.randrange(len(out) + 1), rng.randrange(6)
        if how == 0:
            del out[at : at + rng.randrange(1, 64)]
        elif how == 1:
            out[at:at] = rng.choice(PIECES)
        elif how == 2 and rng.random() < 0.2:
            del out[at:]
        elif how == 3:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1))
            out[at : at + size] = number.to_bytes(size, "little")
        elif out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
    return bytes(out)


class Late(BaseException):
    """One attempt took longer than it may."""


def campaign(
    name: str, count: int, once: Callable[[random.Random], str], fine: tuple[type[BaseException], ...]
) -> Counter[str]:
    """What `once` did with `count` seeds, in a child that a crash ends: "accepted" or "refused", or else what
    is wrong, with the first seed that shows it; and "megabytes", the most that the child's memory grew."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            found = _attempts(name, count, once, fine)
        except BaseException:
            found = Counter({f"broken: {traceback.format_exc()}": 1})
        os.write(send, json.dumps(found).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        data = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Counter(json.loads(data)) if data else Counter({f"crashed with {status}": 1})


def _attempts(
    name: str, count: int, once: Callable[[random.Random], str], fine: tuple[type[BaseException], ...]
) -> Counter[str]:
    def late(*_: object) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: Counter[str] = Counter()
    shown: dict[str, int] = {}
    for seed in range(count):
        signal.setitimer(signal.ITIMER_REAL, 2.0)
        try:
            try:
                told = once(random.Random(f"{name} {seed}"))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except fine as error:
            told = "refused" if "\n" not in str(error).strip() else f"several lines: {error}"
        except Late:
            told = "took more than two seconds"
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__} in {os.path.basename(frame.filename)}:{frame.lineno}"
        shown.setdefault(told, seed)
        found[told] += 1
    found = Counter({k if k in FINE else f"{k} (seed {shown[k]})": v for k, v in found.items()})
    found["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return found


FINE = ("accepted", "refused", "unchanged")
