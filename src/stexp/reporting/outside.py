"""Scores on another cohort beside those on held-out parts of the data set that trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from stexp.evaluation.compare import per_section
from stexp.reporting import grids
from stexp.reporting.labels import label_methods
from stexp.reporting.rows import scores_of
from stexp.runs.scored import ScoredRun

KINDS = {"method": "", "floor": "floor: ", "oracle": "oracle: ", "ceiling": "ceiling: "}
ACG = "pearson_acg"


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
    same_truth = replace(inside.protocol, hold_out="cohort") == replace(outside.protocol, hold_out="cohort")
    is_cohort, data = inside.protocol.hold_out == "cohort", trained_on(inside)
    return not is_cohort and same_truth and data == trained_on(outside) and inside.scored_as == outside.scored_as


def _text(title: str, inside: list[ScoredRun], outside: list[ScoredRun]) -> str:
    labels, _ = label_methods([run.settings for run in (*inside, *outside)])
    of_inside, of_outside = labels[: len(inside)], labels[len(inside) :]
    sides = [_means(inside, of_inside), _means(outside, of_outside)]
    rows = pd.concat(sides, axis=1, keys=["inside", "outside"])
    rows["_kind"] = [list(KINDS).index(kind) for kind, _ in rows.index]
    rows = rows.sort_values([("_kind", ""), ("outside", ACG)], ascending=[True, False], kind="stable")
    grid = [["", "inside", "outside", "outside − inside", "share of ceiling inside", "outside"]]
    for (kind, name), row in rows.iterrows():
        values = [row[side, ACG] for side in ("inside", "outside")]
        shares = [row[side, "share"] if kind in ("method", "floor") else None for side in ("inside", "outside")]
        cells = [grids.number(value) for value in values]
        cells.append(grids.number(values[1] - values[0], "{:+.3f}"))
        grid.append([KINDS[kind] + name, *cells, *(grids.percent(share) for share in shares)])
    folds, tested = len({run.fold for run in inside}), sum(len(run.sections) for run in _one_seed(outside))
    return "\n\n".join(
        [
            f"## Inside and outside: {title}",
            f"ACG. Inside: held out of {trained_on(outside[0])}, {folds} fold(s). Outside: all {tested} section(s) of "
            f"{outside[0].fold}, which trained nothing. They are other sections with another ceiling, and training "
            f"outside had all patients: a difference is not one of the method alone.",
            grids.markdown(grid),
        ]
    )


def _one_seed(runs: list[ScoredRun]) -> list[ScoredRun]:
    """Runs of the first run's seed and method."""
    return [run for run in runs if (run.seed, run.settings) == (runs[0].seed, runs[0].settings)]


def _means(runs: list[ScoredRun], labels: list[str]) -> pd.DataFrame:
    """Mean ACG over sections of every row, and its share of the ceiling; index kind and name."""
    scores = scores_of(runs, labels, [ACG])
    means = {key: per_section(part, [ACG])[ACG].mean() for key, part in scores.groupby(["kind", "name"], sort=False)}
    table = pd.DataFrame({ACG: pd.Series(means)})
    ceiling = table[ACG].get(("ceiling", "counting noise"))
    table["share"] = table[ACG] / ceiling if ceiling else float("nan")
    return table
