"""Scores on another cohort beside those on held-out parts of the data set that trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from stexp.reporting import grids
from stexp.reporting.agreement import describe_gaps, leave_out_copies
from stexp.reporting.footnotes import footnotes, tell_apart
from stexp.reporting.labels import label_methods
from stexp.reporting.tables import KINDS, choices_of, table_rows
from stexp.runs.scored import ScoredRun

ACG, SHARE = "pearson_acg", "share_of_ceiling"
SIDES = ("inside", "outside")


def inside_and_outside(groups: Sequence[tuple[str, list[ScoredRun]]]) -> list[str]:
    """A table as text for every cohort that was tested, where its training data are tabulated, too.

    Parameters
    ----------
    groups
        Title and runs of every table, see :func:`~stexp.reporting.tables.by_table`.
    """
    texts = []
    for title, outside in groups:
        if outside[0].protocol.hold_out == "cohort":
            texts += [_text(title, inside, outside) for _, inside in groups if _is_inside(inside[0], outside[0])]
    return texts


def trained_on(run: ScoredRun) -> str:
    """Name of the data set that trained a run."""
    name = str(run.metrics["data"])
    return name.removesuffix(f"-to-{run.fold}") if run.protocol.hold_out == "cohort" else name


def _is_inside(inside: ScoredRun, outside: ScoredRun) -> bool:
    """Whether runs, each the first of its table, are of one table but for what is held out."""
    return inside.protocol.hold_out != "cohort" and _table_of(inside) == _table_of(outside)


def _table_of(run: ScoredRun) -> tuple[str, str, str, dict[str, Any]]:
    choices = {key: value for key, value in choices_of(run).items() if key not in ("hold_out", "blocks")}
    return trained_on(run), run.protocol.name, run.scored_as, choices


def _text(title: str, inside: list[ScoredRun], outside: list[ScoredRun]) -> str:
    runs = [*inside, *outside]
    labels = tell_apart(label_methods([run.settings for run in runs])[0], runs)
    parts, gaps = [], []
    n = len(inside)
    for side, part in zip(SIDES, (slice(n), slice(n, None)), strict=True):
        kept, names, lacking = leave_out_copies(runs[part], labels[part])
        parts.append(table_rows(kept, names, ACG)[0].set_index(["kind", "label"]).reindex(columns=[ACG, SHARE]))
        gaps += [f"{sentence.removesuffix('.')} {side}." for sentence in describe_gaps(lacking)]
    marks = footnotes(runs, labels)[1]
    rows = pd.concat(parts, axis=1, keys=SIDES)
    rows["_kind"] = [list(KINDS).index(kind) for kind, _ in rows.index]
    rows = rows.sort_values([("_kind", ""), ("outside", ACG)], ascending=[True, False], kind="stable")
    grid = [["", "inside", "outside", "outside − inside", "share of ceiling inside", "outside"]]
    for (_, label), row in rows.iterrows():
        values = [row[side, ACG] for side in SIDES]
        cells = [*map(grids.number, values), grids.number(values[1] - values[0], "{:+.3f}")]
        grid.append([label + marks.get(label, ""), *cells, *(grids.percent(row[side, SHARE]) for side in SIDES)])
    folds = len({run.fold for run in inside})
    tested = len({section for run in outside for section in run.sections})
    return "\n\n".join(
        [
            f"## Inside and outside: {title}",
            f"ACG. Inside: held out of {trained_on(outside[0])}, {folds} fold(s). Outside: all {tested} section(s) of "
            f"{outside[0].fold}, which trained nothing. They are other sections with another ceiling, and training "
            f"outside had all patients: a difference is not one of the method alone.",
            *gaps,
            grids.markdown(grid),
        ]
    )
