"""What is said to a user whose input does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What a user gave does not fit; the message is one line that says what would."""


def did_you_mean(name: str, choices: Iterable[str], prefix: str = "") -> str:
    """``; did you mean X?`` for the nearest of the choices; nothing where none is near."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
