"""Scores of what was completed: of hidden spots or genes alone, beside the floors, the ceiling, and chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from stexp.completion.problem import Problem, Truth
from stexp.completion.tasks import Completed, relative_error
from stexp.evaluation.floors import ceiling_per_gene
from stexp.evaluation.intervals import difference_over_blocks
from stexp.evaluation.metrics import mean_or_none, pearson_per_gene, score_section, top_genes
from stexp.evaluation.verdict import count, label, number
from stexp.protocol import Protocol

SCORE = "pearson_acg"


def score(truth: Truth, completed: Completed) -> dict[str, Any]:
    """Scores of the hidden part, and how often its values lie in the intervals of 95 % that the method states."""
    scores = score_section(truth.observed, completed.mean, top_genes(truth.level), True, truth.total_counts)
    error = np.abs(truth.observed - completed.mean)
    scores["coverage_95"] = float((error <= 1.96 * completed.sd).mean())
    return scores


def ceiling(truth: Truth, protocol: Protocol) -> tuple[dict[str, float | None], np.ndarray]:
    """What counting noise allows on the hidden part: means as scores have them, and by gene (G,)."""
    per_gene = ceiling_per_gene(truth.counts, truth.total_counts, protocol)
    top = per_gene[top_genes(truth.level)]
    return {SCORE: mean_or_none(per_gene), "pearson_heg50": mean_or_none(top)}, per_gene


def chosen_for_maps(problem: Problem, completed: Mapping[str, Completed]) -> str:
    """The floor or method that did best on what is shown while it was held out, of those that held out all of it."""
    errors = {
        name: relative_error(problem.task, own.held_out)
        for name, own in completed.items()
        if np.isfinite(own.held_out).all()
    }
    return min(errors, key=errors.__getitem__)


def best_of(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The name with the highest score; the first of equals."""
    return max(scores, key=lambda name: -np.inf if scores[name][SCORE] is None else scores[name][SCORE])


def judge(
    problem: Problem, completed: Mapping[str, Completed], floors: Mapping[str, Any], methods: Mapping[str, Any]
) -> dict[str, Any]:
    """The best method beside the best floor, with an interval of their difference, in numbers and in words.

    Returns
    -------
    dict
        ``best_floor``, ``best_method``; ``difference``: value, and low and high where there are blocks enough to draw;
        ``outcome``: win, unclear or loss; ``verdict``: a sentence. Without a method, the floor alone.
    """
    floor = best_of(floors)
    if not methods:
        text = f"No method was asked for; the best floor, {label(floor)}, has Pearson {number(floors[floor][SCORE])}."
        return {"best_floor": floor, "best_method": None, "difference": None, "outcome": "unclear", "verdict": text}
    method, truth = best_of(methods), problem.truth
    ours, theirs = methods[method][SCORE], floors[floor][SCORE]
    beside = (
        f"The best of {count(len(methods), 'method')}, {label(method)}, has Pearson {number(ours)}, the best of "
        f"{count(len(floors), 'floor')}, {label(floor)}, {number(theirs)}"
    )
    if ours is None or theirs is None:
        text, outcome, difference = f"{beside}.", "unclear", None
    else:
        xy = problem.section.xy_px[truth.rows]
        difference = {"value": ours - theirs} | (
            difference_over_blocks(truth.observed, completed[method].mean, completed[floor].mean, xy) or {}
        )
        outcome, text = _in_words(difference, beside)
    return {"best_floor": floor, "best_method": method, "difference": difference, "outcome": outcome, "verdict": text}


def _in_words(difference: Mapping[str, Any], beside: str) -> tuple[str, str]:
    if "low" not in difference:
        return "unclear", f"{beside}; there are too few spots to say how sure the difference is."
    interval = f"{difference['value']:+.3f}, 95 % interval {difference['low']:+.3f} to {difference['high']:+.3f}"
    if difference["low"] > 0:
        return "win", f"{beside} ({interval}, over blocks of spots)."
    if difference["high"] < 0:
        return "loss", f"{beside}: no method here is as good as that floor ({interval})."
    return (
        "unclear",
        f"{beside}: no better than the floor, as far as can be told ({interval}, over blocks of spots).",
    )


def per_gene(
    truth: Truth, completed: Mapping[str, Completed], floors: list[str], of_ceiling: np.ndarray
) -> pd.DataFrame:
    """A row for each gene asked for: correlation of every floor and method on the hidden part, and the ceiling."""
    top = np.zeros(len(truth.genes), dtype=bool)
    top[top_genes(truth.level)] = True
    columns: dict[str, Any] = {"gene": truth.genes, "mean_observed": truth.observed.mean(axis=0), "heg50": top}
    for name, own in completed.items():
        columns[f"floor_{name}" if name in floors else name] = pearson_per_gene(truth.observed, own.mean)
    return pd.DataFrame(columns | {"ceiling": of_ceiling})
