"""Checks of what a method is built with: one line that names the config key, and what would fit."""

from __future__ import annotations

import math
from collections.abc import Collection

from stexp.errors import InputError


def whole(least: int = 1, **values: object) -> None:
    """InputError for a value that is no whole number of at least `least`."""
    for name, value in values.items():
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
            raise InputError(f"model.{name}={value}: a whole number of at least {least} would fit")


def within(interval: str, **values: object) -> None:
    """InputError for a value that is no number of an interval as mathematics writes it, ``[0, 1)`` or ``(0, inf)``."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above, below = interval[0] == "(", interval[-1] == ")"
    if math.isinf(high):
        text = f"above {low:g}" if above else f"of at least {low:g}"
    elif above:
        text = f"above {low:g}, up to {high:g}"
    else:
        text = f"from {low:g} to {'below ' if below else ''}{high:g}"
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and low <= value <= high and not (above and value == low) and not (below and value == high)):
            raise InputError(f"model.{name}={value}: a number {text} would fit")


def one_of(choices: Collection[object], **values: object) -> None:
    """InputError for a value that is not among `choices`."""
    for name, value in values.items():
        if value not in choices:
            listed = (" or " if len(choices) == 2 else ", ").join(map(str, choices))
            raise InputError(f"model.{name}={value}: choose {listed}")
