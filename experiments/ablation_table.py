"""The tables of what experiments/ablation.py and experiments/rivals.py measured, in Markdown."""

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


def best_first(table: dict[str, dict]) -> list[str]:
    """Methods over folds and seeds, each with its difference to the one that it is compared with."""
    rows = [f"| | {' | '.join(SCORES)} | runs | s |", f"|---|{'---|' * (len(SCORES) + 2)}"]
    for name, part in sorted(table.items(), key=lambda item: -item[1]["pearson_acg"]["mean"]):
        cells = [cell(part[score]) for score in SCORES]
        rows.append(f"| {name} | {' | '.join(cells)} | {part['runs']} | {part['seconds']:.0f} |")
    return rows


def rivals(records: dict[str, dict]) -> str:
    """Tables of experiments/rivals.py, by the name of their record."""
    parts = []
    for name, record in records.items():
        link, seeds = f"[{name}](../experiments/results/{name}.json)", record["runs"]["consensus"]
        what = (
            f"Methods on one frozen encoder with one budget, {link}: mean over the sections of all folds and over "
            f"{len({key.split()[1] for key in seeds})} seeds, with the paired difference to `consensus` and its 95 % "
            "interval over sections; corrected: `model.correct=true`; s: seconds of a run."
        )
        parts.append("\n".join([what, "", *best_first(record["table"])]))
    return "\n\n".join(parts)


def tables(records: dict[str, dict]) -> str:
    """Those of every record, by its name."""
    parts = []
    for name, record in records.items():
        folds = re.search(r"--folds ((?:\S+ )+?)(?=--|\S+=)", record["command"])
        title = f"[{name}](../experiments/results/{name}.json), folds {folds[1].strip() if folds else '?'}"
        what = "`consensus` beside itself" if name.startswith("control-") else "What each part of `consensus` adds"
        parts.append("\n".join([f"{what}, {title}:", "", *lines(record["table"])]))
    return "\n\n".join(parts)
