"""Finished runs of several methods beside floors and ceiling; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stexp.errors import InputError, did_you_mean
from stexp.evaluation.compare import (
    PATIENTS_TO_FLIP,
    PATIENTS_TO_RESAMPLE,
    compare_each,
    floors_beaten,
    per_section,
    smallest_p,
    summarise,
)
from stexp.evaluation.verdict import count
from stexp.files import write_atomically, write_csv
from stexp.reporting import grids
from stexp.reporting.agreement import Gap, check_agreement, describe_gaps, leave_out_copies
from stexp.reporting.behind import EXPLAINED, SCORES, behind_grid, facts_behind
from stexp.reporting.footnotes import footnotes, not_stated, tell_apart
from stexp.reporting.labels import label_methods
from stexp.reporting.rows import cost_of, scores_of, span
from stexp.runs.scored import ScoredRun

METRICS = {
    "pearson_acg": "ACG",
    "pearson_heg50": "HEG50",
    "pearson_given_depth": "given depth",
    "spearman_acg": "Spearman",
    "mse": "MSE",
    "mae": "MAE",
}


LOWER_IS_BETTER = ("mse", "mae")


KINDS = {"method": "", "floor": "floor: ", "oracle": "oracle: ", "ceiling": "ceiling: "}


FILES = ("table.md", "table.tex", "table.csv", "comparison.csv", "sections.csv")


@dataclass(frozen=True)
class Table:
    """One data set under one protocol.

    Parameters
    ----------
    caption
        Sentences without which the numbers would mislead.
    metrics
        Columns that some method has.
    metric, baseline
        What `comparisons` compares, and the row it compares with.
    rows
        Methods, floors, oracles and the ceiling, best first, with means, spreads and cost.
    comparisons
        Every other complete method with the baseline.
    sections
        What both are computed from: every row in every section, seeds averaged.
    gaps
        What a method lacks; its row has no mean.
    marks
        Row -> the mark of its footnote in the caption.
    """

    title: str
    caption: list[str]
    metrics: list[str]
    metric: str
    baseline: str
    rows: pd.DataFrame
    comparisons: pd.DataFrame
    sections: pd.DataFrame
    gaps: list[Gap]
    marks: Mapping[str, str] = field(default_factory=dict)


def by_table(runs: list[ScoredRun]) -> list[tuple[str, list[ScoredRun]]]:
    """The runs of every data set and protocol, with a title, so that no mean mixes two of them."""
    groups: dict[tuple[str, str], list[ScoredRun]] = {}
    for run in sorted(runs, key=lambda run: (run.metrics["data"], run.protocol.name, run.fold, str(run.folder))):
        names = f"{run.metrics['data']}, protocol {run.protocol.name}"
        if run.scored_as != run.protocol.name:
            names += f", scored as {run.scored_as}"
        groups.setdefault((names, json.dumps(choices_of(run))), []).append(run)
    titled = []
    for (names, _), members in groups.items():
        choices = choices_of(members[0])
        alike = [choices_of(others[0]) for (title, _), others in groups.items() if title == names]
        differing = [key for key in choices if any(other[key] != choices[key] for other in alike)]
        titled.append((", ".join([names, *(f"{key}={choices[key]}" for key in differing)]), members))
    return titled


def choices_of(run: ScoredRun) -> dict[str, Any]:
    """Fields of a run's protocol that tell tables apart; k and spot_context are settings of a method."""
    return {k: v for k, v in asdict(run.protocol).items() if k not in ("name", "k", "spot_context")}


def tabulate(
    title: str,
    runs: list[ScoredRun],
    metric: str,
    baseline: str | None,
    allow_missing: bool,
    labels: list[str] | None = None,
) -> Table:
    """One table, of runs of one data set and protocol.

    Parameters
    ----------
    labels
        Name of each run's method; None: what differs between the runs.

    Raises
    ------
    InputError
        Runs that do not mean the same by a section; a gap, or two runs of one cell, unless `allow_missing`, which
        leaves both out; a baseline that is no row.
    """
    besides: list[str] = []
    if labels is None:
        labels, besides = label_methods([run.settings for run in runs])
        labels = tell_apart(labels, runs)
    n_runs = len(runs)
    runs, labels, gaps = leave_out_copies(runs, labels)
    if len(runs) < n_runs and not (allow_missing and runs):
        raise InputError(gaps[0].fill)
    check_agreement(runs)
    if gaps and not allow_missing:
        more = f", and {len(gaps) - 1} more," if len(gaps) > 1 else ""
        gap = gaps[0]
        raise InputError(f"{gap.method} lacks {gap.missing}{more} (allow_missing=true prints gaps); {gap.fill}")
    notes, marks = footnotes(runs, labels)
    rows, sections = table_rows(runs, labels, metric)
    scored = [key for key in METRICS if sections.loc[sections["kind"] == "method", key].notna().any()]
    if metric not in scored:
        raise InputError(f"{title}: no method has {metric}; metric={scored[0]} would do")
    baseline = _baseline(rows, metric, baseline)
    others = rows.loc[(rows["kind"] == "method") & rows[metric].notna() & (rows["label"] != baseline), "label"]
    values = sections.pivot(index=["patient", "section"], columns="label", values=metric)
    return Table(
        title=title,
        caption=_caption(runs, sections, metric, besides, gaps) + notes,
        metrics=scored,
        metric=metric,
        baseline=baseline,
        rows=rows,
        comparisons=compare_each(values, list(others), baseline).assign(metric=metric),
        sections=sections[["kind", "label", "patient", "section", *METRICS]],
        gaps=gaps,
        marks=marks,
    )


def table_rows(runs: list[ScoredRun], labels: list[str], metric: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of a table, best first, and the scores in every section that they are means of.

    A row that lacks a section has no mean.
    """
    scores = scores_of(runs, labels, [*METRICS, *SCORES])
    n_tested = len(scores[["fold", "section"]].value_counts())
    rows, sections = [], []
    for (kind, name), part in scores.groupby(["kind", "name"], sort=False):
        means = per_section(part, list(METRICS)).reset_index()
        sections.append(means.assign(kind=kind, label=KINDS[kind] + name))
        row = {"kind": kind, "label": KINDS[kind] + name, "name": name, "n_sections": len(means)}
        row["n_patients"] = means["patient"].nunique()
        row |= dict.fromkeys([*METRICS, "floors_beaten", "n_floors"], np.nan)
        whole = len(part[["fold", "section"]].value_counts()) == n_tested
        if whole:
            row |= summarise(part, list(METRICS))
            of = set(part["of"])
            row |= facts_behind(scores, part, [run for run, label in zip(runs, labels, strict=True) if label in of])
        if whole and kind == "method":
            row |= floors_beaten(scores[scores["of"] == name], metric, metric in LOWER_IS_BETTER)
        if kind == "method":
            row |= cost_of([run for run, label in zip(runs, labels, strict=True) if label == name])
        rows.append(row)
    table = pd.DataFrame(rows)
    table["_kind"] = table["kind"].map(list(KINDS).index)
    table["_worst"] = table[metric] if metric in LOWER_IS_BETTER else -table[metric]
    table = table.sort_values(["_kind", "_worst", "label"], ignore_index=True).drop(columns=["_kind", "_worst"])
    return table, pd.concat(sections, ignore_index=True)


def _baseline(rows: pd.DataFrame, metric: str, wanted: str | None) -> str:
    """Label of the row to compare with: the one asked for, or the best floor."""
    whole = rows[rows[metric].notna()]
    if wanted is None:
        floors = whole.loc[whole["kind"] == "floor", "label"]
        if floors.empty:
            raise InputError(f"no floor has {metric} in every section; name a row with baseline=")
        return floors.iloc[0]
    wanted = str(wanted).replace("_", " ")
    for names in (rows["label"], rows["name"]):
        for label in rows.loc[names.str.replace("_", " ") == wanted, "label"]:
            if label in set(whole["label"]):
                return label
            raise InputError(f"baseline={wanted} has no {metric} in some section; choose {', '.join(whole['label'])}")
    rows_there = ", ".join(whole["label"])
    raise InputError(
        f"baseline={wanted} is no row here; choose {rows_there}{did_you_mean(str(wanted), whole['label'])}"
    )


def _caption(
    runs: list[ScoredRun], sections: pd.DataFrame, metric: str, besides: list[str], gaps: list[Gap]
) -> list[str]:
    patients, folds = sorted(sections["patient"].unique()), sorted({run.fold for run in runs})
    unknown = sorted({name for run in runs for name in not_stated(run)})
    leaks = sorted({item["name"] for run in runs for item in run.audit["items"] if item["leak"]})
    text = [
        f"{count(sections['section'].nunique(), 'section')} of {count(len(patients), 'patient')} "
        f"({', '.join(patients)}), {count(len(folds), 'fold')} ({', '.join(folds)}), "
        f"{span(len(run.genes) for run in runs)} genes.",
        "Mean over sections ± standard deviation over sections (over the means of patients).",
        "ACG and HEG50: Pearson correlation per gene over the spots of a section, mean over all genes and over the 50 "
        "highest; given depth: partial correlation, rid of what the log of a spot's total counts explains. Bold: "
        f"better in {METRICS[metric]} than every floor of its own runs; an oracle reads the test spots' counts.",
        f"Audit: {', '.join(leaks)}." if leaks else f"Audit: no leak{' is known' if unknown else ''}.",
    ]
    if unknown:
        text.append(f"Not stated: {', '.join(unknown)}.")
    if any(run.scored_as != run.protocol.name for run in runs):
        text.append("The predictions and the audit are those of the protocol trained under.")
    if besides:
        text.append(f"Methods also differ in {', '.join(besides)}.")
    text += describe_gaps(gaps)
    changed = [str(run.folder) for run in runs if run.changed]
    if changed:
        text.append(f"Predictions changed since the run, and perhaps since they were scored: {', '.join(changed)}.")
    return text


def explain(table: Table) -> str:
    """Reach and limits of the comparisons of a table, in words."""
    comparisons = table.comparisons
    n_patients, n_sections = int(comparisons["n_patients"].max()), int(comparisons["n_sections"].max())
    better = "; below 0 is better" if table.metric in LOWER_IS_BETTER else ""
    text = [f"Difference: method less baseline, paired by section; seeds averaged first{better}."]
    if n_patients >= PATIENTS_TO_RESAMPLE:
        narrow = ", too narrow where patients are so few" if n_patients < PATIENTS_TO_FLIP else ""
        text.append(f"95 % interval: bootstrap of {n_patients} patients, then of their sections{narrow}.")
    elif comparisons["low"].isna().all():
        text.append("No interval: no patient has two sections, and there are fewer than three patients.")
    else:
        text.append(
            f"95 % interval: bootstrap of the sections within {count(n_patients, 'patient')}, kept as they are; "
            "it does not cover what differs between patients."
        )
        sizes = table.sections.groupby("patient")["section"].nunique()
        single = ", ".join(sizes.index[sizes == 1])
        text += [f"With one section, {single} does not vary in it."] if single else []
    best = comparisons.loc[comparisons["n_units"].idxmax()]
    units = count(int(best["n_units"]), best["unit"].removesuffix("s"))
    smallest, m = smallest_p(int(best["n_units"])), len(comparisons)
    independent = ", taken as independent" if best["unit"] == "sections" and n_sections > n_patients else ""
    text.append(f"p: signs of {units} flipped{independent}; Holm over {count(m, 'comparison')}.")
    if smallest * m >= 0.05:
        after = f", {min(1, smallest * m):.2g} after Holm" if m > 1 else ""
        text.append(f"{units}: smallest possible p {smallest:.2g}{after}, so none can be below 0.05.")
    return " ".join(text)


def markdown(table: Table) -> str:
    """A table as text: scores, comparisons, cost, and the compared score in every section."""
    return "\n\n".join(
        [f"## {table.title}", "\n".join(table.caption), grids.markdown(_score_grid(table)), details(table)]
    )


def details(table: Table) -> str:
    """What stands below the scores: comparisons, cost, and the compared score in every section."""
    parts = [f"### Against {table.baseline}, {METRICS[table.metric]}"]
    if len(table.comparisons):
        parts += [explain(table), grids.markdown(_comparison_grid(table))]
    else:
        parts += ["No other method has every section."]
    if behind := behind_grid(table.rows):
        parts += ["### What stands behind it", EXPLAINED, grids.markdown(behind)]
    parts += ["### What it took", grids.markdown(_cost_grid(table))]
    return "\n\n".join([*parts, f"### {METRICS[table.metric]} by section", grids.markdown(_section_grid(table))])


def latex(table: Table) -> str:
    """Scores and comparisons as two booktabs tables."""
    parts = [(f"{table.title}. {' '.join(table.caption)}", _score_grid(table))]
    if len(table.comparisons):
        caption = f"Against {table.baseline}, {METRICS[table.metric]}. {explain(table)}"
        parts.append((caption, _comparison_grid(table)))
    return "\n".join(["% needs booktabs", *(grids.latex(grid, caption) for caption, grid in parts)])


def write(tables: list[Table], text: str, folder: Path) -> None:
    """Write `FILES` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "table.md", f"# {folder.name}\n\n{text}\n")
    write_atomically(folder / "table.tex", "\n\n".join(map(latex, tables)) + "\n")
    for name, part in (("table", "rows"), ("comparison", "comparisons"), ("sections", "sections")):
        parts = [getattr(table, part).assign(table=table.title) for table in tables]
        whole = pd.concat([part.dropna(axis="columns", how="all") for part in parts if len(part)] or parts)
        whole = whole.reindex(columns=list(dict.fromkeys(name for part in parts for name in part.columns)))
        whole.insert(0, "table", whole.pop("table"))
        write_csv(whole, folder / f"{name}.csv")


def _score_grid(table: Table) -> list[list[str]]:
    grid = [["", *(METRICS[key] + (" ↓" if key in LOWER_IS_BETTER else "") for key in table.metrics), "floors beaten"]]
    kind = "method"
    for _, row in table.rows.iterrows():
        if row["kind"] != kind:
            grid.append([])
            kind = row["kind"]
        beaten = "" if kind != "method" else "–"
        if pd.notna(row["floors_beaten"]):
            beaten = f"{row['floors_beaten']:.0f} of {row['n_floors']:.0f}"
        cells = [row["label"] + table.marks.get(row["label"], ""), *(_mean(row, key) for key in table.metrics), beaten]
        if pd.notna(row["n_floors"]) and row["floors_beaten"] == row["n_floors"] > 0:
            for i in (0, 1 + table.metrics.index(table.metric)):
                cells[i] = f"**{cells[i]}**"
        grid.append(cells)
    return grid


def _comparison_grid(table: Table) -> list[list[str]]:
    grid = [["", "difference", "95 % interval", "p", "p (Holm)"]]
    for _, row in table.comparisons.iterrows():
        interval = "–" if pd.isna(row["low"]) else f"{row['low']:+.3f} to {row['high']:+.3f}"
        ps = [f"{row[key]:.2g}" if row[key] >= 1e-4 else "< 0.0001" for key in ("p", "p_holm")]
        grid.append([row["method"], f"{row['difference']:+.3f}", interval, *ps])
    return grid


def _cost_grid(table: Table) -> list[list[str]]:
    head = ["", "sections", "patients", "seeds", "sd over seeds", "leaks", "epochs", "parameters", "trained"]
    grid = [[*head, "time of a run", "memory", "on"]]
    for _, row in table.rows[table.rows["kind"] == "method"].iterrows():
        counts = [f"{row[key]:.0f}" for key in ("n_sections", "n_patients", "n_seeds")]
        memory = grids.number(row["peak_memory_gb"], "{:.1f} GB")
        if pd.notna(row["peak_gpu_memory_gb"]):
            memory += f", GPU {row['peak_gpu_memory_gb']:.1f} GB"
        cells = [
            row["label"],
            *counts,
            grids.number(row.get(f"{table.metric}_sd_seeds")),
            row["leaks"],
            grids.number(row["epochs"], "{:.0f}"),
        ]
        cells += [grids.number(row[key], "{:.2f} M", 1e-6) for key in ("parameters", "trained_parameters")]
        grid.append([*cells, grids.duration(row["seconds"]), memory, row["hardware"]])
    return grid


def _section_grid(table: Table) -> list[list[str]]:
    labels = list(table.rows.loc[table.rows["kind"] == "method", "label"])
    labels += [table.baseline] if table.baseline not in labels else []
    values = table.sections.pivot(index=["patient", "section"], columns="label", values=table.metric)
    return [
        ["section", "patient", *labels],
        *([section, patient, *map(grids.number, row[labels])] for (patient, section), row in values.iterrows()),
    ]


def _mean(row: pd.Series, metric: str) -> str:
    mean, spread, patients = (row.get(metric + end) for end in ("", "_sd_sections", "_sd_patients"))
    text = grids.number(mean)
    text += f" ± {spread:.3f}" if pd.notna(spread) else ""
    return text + (f" ({patients:.3f})" if pd.notna(patients) else "")
