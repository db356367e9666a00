"""Grids of text as Markdown and LaTeX tables: the first line is the head, an empty one stands for a rule."""

from __future__ import annotations

import re

import pandas as pd

_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
_TEX |= {"±": r"$\pm$", "–": "--", "−": "$-$", "↓": r"$\downarrow$"}


def markdown(grid: list[list[str]]) -> str:
    """A table with aligned columns, of text first and numbers then; rules are left out."""
    head, *rows = [[cell.replace("|", r"\|") for cell in line] for line in grid if line]
    widths = [max(3, *(len(line[i]) for line in (head, *rows))) for i in range(len(head))]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in (head, *rows)
    ]
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex(grid: list[list[str]], caption: str) -> str:
    """A booktabs table."""
    head, *rows = [" & ".join(map(tex, line)) + r" \\" if line else r"\midrule" for line in grid]
    out = [r"\begin{table}", r"\centering", rf"\caption{{{tex(caption)}}}"]
    out += [rf"\begin{{tabular}}{{l{'r' * (len(grid[0]) - 1)}}}", r"\toprule", head, r"\midrule", *rows]
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def tex(text: str) -> str:
    """Text as LaTeX sets it; ``**bold**`` is bold, and the sign of a number a minus."""
    bold = re.fullmatch(r"\*\*(.*)\*\*", text)
    if bold:
        return rf"\textbf{{{tex(bold[1])}}}"
    text = re.sub(r"[\\{}_&%$#~^<>±–−↓]", lambda m: _TEX.get(m[0], "\\" + m[0]), text)
    return re.sub(r"(?<![\w.-])([-+])(?=\d)", r"$\1$", text)


def number(value: float | None, form: str = "{:.3f}", scale: float = 1) -> str:
    """A number times `scale` in a format; a dash where there is none."""
    return "–" if value is None or pd.isna(value) else form.format(value * scale)


def percent(value: float | None) -> str:
    """A share as a whole number of percent; a dash where there is none."""
    return "–" if value is None or pd.isna(value) else f"{round(100 * value)} %"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best; a dash where there is no number."""
    if pd.isna(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
