"""What an object holds, as one line and, in notebooks, as a small table."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

CELL = "text-align:left;padding:2px 10px 2px 0"


def one_line(facts: Mapping[str, object]) -> str:
    """``<name value, name value>``: a ``repr`` of an object by its facts, the first of which names it."""
    return f"<{', '.join(f'{name} {value}' for name, value in facts.items())}>"


def facts_table(title: str, facts: Mapping[str, object]) -> str:
    """A title over a row for each fact, as HTML; every text is escaped."""
    rows = "".join(
        f"<tr><th style='{CELL}'>{escape(str(name))}</th><td style='{CELL}'>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<div><b>{escape(title)}</b><table>{rows}</table></div>"
