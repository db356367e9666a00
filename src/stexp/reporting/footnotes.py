"""What a table says of methods that predicted elsewhere."""

from __future__ import annotations

from stexp.evaluation.coverage import is_partial, sentences
from stexp.runs.scored import ScoredRun

WHOLE, PARTIAL = " †", " ‡"
"""Marks of rows that were predicted elsewhere: of all spots and genes, and of some."""


def tell_apart(labels: list[str], runs: list[ScoredRun]) -> list[str]:
    """Labels of runs, where a method that predicted elsewhere has none that a run of ours has."""
    ours = {label for label, run in zip(labels, runs, strict=True) if not run.is_foreign}
    return [
        f"{label} (elsewhere)" if run.is_foreign and label in ours else label
        for label, run in zip(labels, runs, strict=True)
    ]


def footnotes(runs: list[ScoredRun], labels: list[str]) -> tuple[list[str], dict[str, str]]:
    """Sentences for a caption, and the mark of each row that they are about."""
    notes: dict[str, dict[str, None]] = {}
    marks: dict[str, str] = {}
    for run, label in zip(runs, labels, strict=True):
        if run.is_foreign:
            notes.setdefault(label, {})[f"fold {run.fold}: {' '.join(sentences(run.metrics))}"] = None
            marks[label] = PARTIAL if is_partial(run.metrics) or marks.get(label) == PARTIAL else WHOLE
    return [f"{marks[label].strip()} {label}, {' '.join(texts)}" for label, texts in notes.items()], marks


def not_stated(run: ScoredRun) -> list[str]:
    """Points of a run's audit that whoever predicted does not state, in words."""
    names = [item["name"] for item in run.audit["items"] if item.get("unknown")]
    return [name.removesuffix("_not_stated").replace("_", " ") for name in names]
