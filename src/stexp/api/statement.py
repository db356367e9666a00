"""A call of the Python interface as a line of code: what stands in the record of a run in place of a command."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

LONGEST = 80
"""Characters of a value; a longer one stands as its type."""


def statement(function: Callable, arguments: Mapping[str, Any]) -> str:
    """``stexp.fit('stnet', SpotDataModule(...), max_epochs=20)``: a call without what was left out.

    Parameters
    ----------
    arguments
        Every argument by name; objects, which no short text makes again, stand as their type.
    """
    parts = []
    for name, parameter in inspect.signature(function).parameters.items():
        value = arguments[name]
        if parameter.default is parameter.empty:
            parts.append(_text(value))
        elif not (value is parameter.default or (_is_plain(value) and value == parameter.default)):
            parts.append(f"{name}={_text(value)}")
    return f"stexp.{function.__name__}({', '.join(parts)})"


def _text(value: Any) -> str:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    text = repr(value) if _is_plain(value) else ""
    return text if 0 < len(text) <= LONGEST else f"{type(value).__name__}(...)"


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
