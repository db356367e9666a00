"""What stands behind the scores of a table: parts of the error, depth, gene sets, chance, spatial order, intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from stexp.evaluation.compare import per_section
from stexp.evaluation.intervals import ENOUGH, over_sections
from stexp.evaluation.metrics import DEPTH_NOTE, mean_or_none
from stexp.evaluation.records import Evidence
from stexp.reporting import grids
from stexp.runs.scored import ScoredRun

SCORES = ("follows_depth", "mse_gene_mean", "mse_within_gene")
"""Scores of a section that the columns are made of, besides those of the table."""
COLUMNS = {
    "interval": "ACG, 95 %",
    "share_of_ceiling": "share of the ceiling",
    "skill_within_gene": "skill within genes",
    "skill_gene_mean": "skill in gene means",
    "gene_sets": "gene sets",
    "beyond_chance": "genes beyond chance",
    "moran_concordance": "Moran concordance",
    "follows_depth": "follows depth",
}
PERCENT = ("share_of_ceiling", "skill_within_gene", "skill_gene_mean", "beyond_chance")
EXPLAINED = (
    "Interval: over patients, sections or blocks of spots, as many as there are; of few it covers the truth in fewer "
    "than 95 % of cases, as stands beside it. Skill: the share of the training mean's squared error that is gone, "
    "within genes (from spot to spot) and in how high they are. Gene sets: Pearson of their scores. Beyond chance: "
    "above their own moved maps, false discovery rate 5 %. Moran concordance: 1 where each gene is as smooth as in "
    f"truth. Follows depth: correlation of a spot's mean prediction with the log of its total counts; {DEPTH_NOTE}."
)


def facts_behind(scores: pd.DataFrame, part: pd.DataFrame, runs: Sequence[ScoredRun]) -> dict[str, float | str | None]:
    """Values of `COLUMNS` of one row of a table; None where the runs do not have them.

    Parameters
    ----------
    scores
        Of all rows, see :func:`~stexp.reporting.rows.scores_of`.
    part
        Those of the row, which has every section.
    runs
        That the row is of, or stands beside.
    """
    keys = ["pearson_acg", *SCORES]
    own, beside = per_section(part, keys), scores[scores["of"].isin(part["of"])]
    base = str(part["name"].iloc[0]).partition(" (")[0]
    ceiling = per_section(beside[beside["kind"] == "ceiling"], keys)["pearson_acg"]
    mean = per_section(beside[(beside["kind"] == "floor") & beside["name"].str.match(r"mean( \(|$)")], keys)
    kind = part["kind"].iloc[0]
    facts: dict[str, float | str | None] = {"follows_depth": mean_or_none(own["follows_depth"].to_numpy())}
    if kind in ("method", "floor"):
        facts["share_of_ceiling"] = _ratio(own["pearson_acg"], ceiling)
        for name in ("within_gene", "gene_mean"):
            rest = _ratio(own[f"mse_{name}"], mean[f"mse_{name}"])
            facts[f"skill_{name}"] = None if rest is None else 1 - rest
        behind = [run.metrics["evidence"] for run in runs if "evidence" in run.metrics and _is_own(run)]
        facts["gene_sets"] = _gene_sets(behind, None if kind == "method" else base.replace(" ", "_"))
        if kind == "method":
            facts |= _of_method(own, behind, len(runs))
    return facts


def _is_own(run: ScoredRun) -> bool:
    """Whether a run is scored under its own protocol, which alone its evidence is of."""
    return run.scored_as == run.metrics["protocol"]


def _ratio(own: pd.Series, beside: pd.Series) -> float | None:
    """Of sums over sections that have both."""
    pairs = pd.concat([own, beside], axis=1).dropna()
    total = pairs.iloc[:, 1].sum()
    return float(pairs.iloc[:, 0].sum() / total) if total > 0 else None


def _gene_sets(behind: Sequence[Evidence], floor: str | None) -> float | None:
    """Mean Pearson over gene sets, then over runs; of a floor where one is named."""
    means = []
    for each in behind:
        values = [row["pearson"] if floor is None else row["floors"].get(floor) for row in each["gene_sets"]]
        means.append(mean_or_none([np.nan if value is None else value for value in values]))
    return mean_or_none([np.nan if value is None else value for value in means])


def _of_method(own: pd.DataFrame, behind: Sequence[Evidence], n_runs: int) -> dict[str, float | str | None]:
    concordance = [each["structure"].get("moran_concordance") for each in behind]
    chance = [each["chance"] for each in behind if each["chance"] is not None]
    n_genes = sum(each["n_genes"] for each in chance)
    acg = own["pearson_acg"]
    values = {str(section): None if np.isnan(value) else float(value) for (_, section), value in acg.items()}
    interval: Mapping | None = over_sections(values, {str(section): str(patient) for patient, section in acg.index})
    if interval is None and n_runs == len(behind) == 1:
        interval = behind[0]["intervals"].get("pearson_acg")
    return {
        "moran_concordance": mean_or_none([np.nan if value is None else value for value in concordance]),
        "beyond_chance": sum(each["n_beyond"] for each in chance) / n_genes if n_genes else None,
        "interval": None if interval is None else _interval(interval),
    }


def _interval(interval: Mapping) -> str:
    """``0.112 to 0.388 (3 patients, covers about 75 %)``: bounds, over what, and how sure where that is not 95 %."""
    units = f"{interval['n_units']} {interval['over']}" if "n_units" in interval else interval["over"]
    few = f", covers about {grids.percent(interval['covers'])}" if interval.get("covers", 1) < ENOUGH else ""
    return f"{interval['low']:.3f} to {interval['high']:.3f} ({units}{few})"


def behind_grid(rows: pd.DataFrame) -> list[list[str]]:
    """Methods, floors and oracles with the columns that some of them have; empty where there is none."""
    columns = [key for key in COLUMNS if key in rows and rows[key].notna().any()]
    shown = rows[rows[columns].notna().any(axis=1)] if columns else rows[:0]
    if shown.empty:
        return []
    return [
        ["", *(COLUMNS[key] for key in columns)],
        *([row["label"], *(_cell(row[key], key) for key in columns)] for _, row in shown.iterrows()),
    ]


def _cell(value: float | str | None, key: str) -> str:
    if isinstance(value, str):
        return value
    return grids.percent(value) if key in PERCENT else grids.number(value)
