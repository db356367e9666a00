"""What is said to a user whose input does not fit."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """What a user gave does not fit; the message is one line that says what would."""


class UnknownName(InputError):
    """A name of a section, patient or other thing of the data that is not among those there are.

    Parameters
    ----------
    names
        What was asked for and is not there, as text.
    choices
        What there is.
    typed
        The argument of the command line, with ``{}`` where a name goes. A command line reads some names as numbers
        (10_1 is 101): the command that prints the error can say how such a name is given.
    """

    def __init__(self, message: str, names: Iterable[str], choices: Iterable[str], typed: str) -> None:
        super().__init__(message)
        self.names, self.choices, self.typed = list(names), list(choices), typed


def did_you_mean(name: str, choices: Iterable[str], prefix: str = "") -> str:
    """``; did you mean X?`` for the nearest of the choices; nothing where none is near."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def listed(names: Iterable[Any], most: int = 5, of: int | None = None) -> str:
    """The first of some names, and how many more there are: ``a, b and 3 more``.

    Parameters
    ----------
    most
        Names that are written out.
    of
        How many there are, where `names` are only the first.
    """
    texts = [str(name)[:200] for name in names]  # those of damaged files may be anything
    n = len(texts) if of is None else of
    return ", ".join(texts[:most]) + (f" and {n - most} more" if n > most else "")


def is_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's, numpy's, or torch's on a CPU or GPU."""
    return (
        isinstance(error, MemoryError)
        or "OutOfMemory" in type(error).__name__  # without importing torch
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def in_one_line(error: Exception) -> str:
    """What a user reads of an error: of a file its name and the reason, of memory that it ran out."""
    if is_of_memory(error):
        reason = " ".join(str(error).split())[:200]
        return f"memory ran out{reason and f' ({reason})'}; what was finished is whole"
    if not isinstance(error, OSError) or error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return (
        where + error.strerror + ("; what was finished is whole, the same command goes on from there" if full else "")
    )
