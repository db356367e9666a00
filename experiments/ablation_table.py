"""The tables of what experiments/ablation.py measured, in Markdown."""

from __future__ import annotations

import re

SIDES = ("training side, left out", "test side, decides nothing")
SCORES = ("pearson_acg", "pearson_given_depth", "mse")


def lines(table: dict[str, dict]) -> list[str]:
    """Its heading says which side judges; differences are to the whole method, of a part alone to plain ridges."""
    shown = [(SIDES[0], score) for score in SCORES] + [(SIDES[1], "pearson_acg")]
    rows = [
        "| | " + " | ".join(f"{score} ({side})" for side, score in shown) + " | s |",
        "|---" * (len(shown) + 2) + "|",
    ]
    for name in sorted(table, key=_place):
        part = table[name]
        cells = [cell(part[side][score]) for side, score in shown]
        rows.append(f"| {name} | " + " | ".join(cells) + f" | {part['seconds']:.0f} |")
    return rows


def _place(name: str) -> tuple[int, str]:
    """What is left out first, as it was measured; then parts alone, then other inputs and random weights."""
    kinds = ("plain", "whole,", "random")
    return next(((place + 1, name) for place, kind in enumerate(kinds) if name.startswith(kind)), (0, ""))


def cell(value: dict[str, float | None]) -> str:
    """A mean, and behind it the paired difference with its interval where there are these."""
    text = f"{value['mean']:.4f}"
    if "difference" in value:
        text += f", {value['difference']:+.4f}"
    if value.get("low") is not None:
        text += f" [{value['low']:+.4f}, {value['high']:+.4f}]"
    return text


def tables(records: dict[str, dict]) -> str:
    """Those of every record, by its name."""
    parts = []
    for name, record in records.items():
        folds = re.search(r"--folds ((?:\S+ )+?)(?=--|\S+=)", record["command"])
        title = f"[{name}](../experiments/results/{name}.json), folds {folds[1].strip() if folds else '?'}"
        parts.append("\n".join([f"What each part of `consensus` adds, {title}:", "", *lines(record["table"])]))
    return "\n\n".join(parts)
