"""A curve of cost through measured times: `seconds = fixed + rate * x ** power`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

POWERS = [step / 50 for step in range(25, 151)]  # 0.5 to 3


class Fit(NamedTuple):
    """`residual` is the root mean square of the relative errors at the points."""

    fixed: float
    rate: float
    power: float
    residual: float
    points: int

    def __call__(self, x: float) -> float:
        return self.fixed + self.rate * math.pow(x, self.power)


def fit(xs: Sequence[float], values: Sequence[float], power: float | None = None) -> Fit | None:
    """The curve of least relative error, without negative cost; None where there are too few points.

    Args:
        power: of x, where it is known; else the best of POWERS, which takes a point more.
    """
    if len(xs) < (3 if power is not None else 4):
        return None
    fits = [_weighted(xs, values, one) for one in (POWERS if power is None else [power])]
    return min(fits, key=lambda found: found.residual)


def _weighted(xs: Sequence[float], values: Sequence[float], power: float) -> Fit:
    """Least squares of fixed / value + rate * x ** power / value = 1, both at least 0."""
    fixed = [1.0 / value for value in values]
    growing = [x**power / value for x, value in zip(xs, values, strict=True)]
    ff, gg = _dot(fixed, fixed), _dot(growing, growing)
    fg, f, g = _dot(fixed, growing), sum(fixed), sum(growing)
    determinant = ff * gg - fg * fg
    candidates = [(f / ff, 0.0), (0.0, g / gg)]
    if determinant > 1e-12 * ff * gg:
        both = (f * gg - g * fg) / determinant, (g * ff - f * fg) / determinant
        candidates += [both] if min(both) >= 0.0 else []

    def residual(a: float, b: float) -> float:
        errors = [a * p + b * q - 1.0 for p, q in zip(fixed, growing, strict=True)]
        return math.sqrt(_dot(errors, errors) / len(errors))

    a, b = min(candidates, key=lambda pair: residual(*pair))
    return Fit(a, b, power, residual(a, b), len(xs))


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
