"""Tables of the paper from finished runs, every number beside the printed one; needs no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import betainc, betaln, hyp2f1
from typing_extensions import TypedDict  # that of typing carries no annotations before Python 3.12

from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.evaluation.floors import ORACLES
from stexp.evaluation.metrics import pearson_per_gene
from stexp.evaluation.records import read_json
from stexp.evaluation.verdict import count
from stexp.reporting import grids
from stexp.reporting.tables import LOWER_IS_BETTER, METRICS, Table, details, tabulate
from stexp.runs.scored import read_scored_run
from stexp.sweeps.jobs import Job
from stexp.sweeps.names import NOT_IN_NAME
from stexp.sweeps.plan import read_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = METRICS | {"ari": "ARI", "nmi": "NMI", "minus_log10_p": "−log10 p", "pearson": "Pearson", "best_k": "best k"}
TOP = 8
NOT_ROWS = ("data", "protocol")


class Sections(TypedDict):
    """What ``metrics.json`` says of the sections of a run."""

    sections: dict[str, dict]


@dataclass(frozen=True)
class Cells:
    """What a table or figure is made of.

    Parameters
    ----------
    name, overrides
        The sweep and what was given with it, as after ``stexp-train -m``.
    jobs
        All cells, finished or not, in the paper's order.
    reference
        ``experiments/reference/<name>.json``.
    sizes
        ``experiments/reference/tableS1.json``: data set -> its size in the paper.
    """

    name: str
    overrides: tuple[str, ...]
    jobs: list[Job]
    reference: dict[str, Any]
    sizes: dict[str, dict[str, int]]
    _facts: dict[Path, tuple[dict, list[str]]] = field(default_factory=dict, repr=False)

    def facts(self, job: Job) -> tuple[dict, list[str]]:
        """``provenance.json`` of a finished cell, and its sections; every number asks for them."""
        folder = job.output_dir
        if folder not in self._facts:
            metrics = read_json(folder / "metrics.json", Sections)
            self._facts[folder] = read_json(folder / "provenance.json"), list(metrics["sections"])
        return self._facts[folder]

    @property
    def varied(self) -> list[str]:
        """Axes that name the rows, the paper's first."""
        axis = self.reference.get("axis", "model")
        keys = [key for key in self.jobs[0].cell if key not in NOT_ROWS and key != axis]
        return [axis, *(key for key in keys if len({job.cell[key] for job in self.jobs}) > 1)]

    def label(self, job: Job) -> str:
        axis, *others = self.varied
        value = job.cell[axis]
        first = self.reference.get("rows", {}).get(value) or (
            value if axis == "model" else f"{axis.rpartition('.')[2]} = {value}"
        )
        return " ".join([first, *(f"{key.rpartition('.')[2]}={job.cell[key]}" for key in others)])

    def groups(self, *, by_label: bool = False) -> dict[tuple[str, ...], list[Job]]:
        """Cells of one data set and protocol, and of one row of the table."""
        out: dict[tuple[str, ...], list[Job]] = {}
        for job in self.jobs:
            key = (job.data, job.protocol, *([self.label(job)] if by_label else []))
            out.setdefault(key, []).append(job)
        return out

    @property
    def changed(self) -> list[str]:
        """What was given that makes other numbers, besides fewer cells."""
        keys = [text.partition("=")[0] for text in self.overrides]
        axes = {*self.jobs[0].cell, "trainer", "logger", "callbacks", "data.root", "data.sections"}
        pairs = zip(keys, self.overrides, strict=True)
        return [text for key, text in pairs if key not in axes and not key.startswith(NOT_IN_NAME)]

    def command(self, jobs: list[Job]) -> str:
        """What makes these cells, or goes on with them."""
        axes = {key: list(dict.fromkeys(job.cell[key] for job in jobs)) for key in ["data", "protocol", *self.varied]}
        rest = [text for text in self.overrides if text.partition("=")[0] not in axes]
        root = (jobs[0].needs or jobs[0]).output_dir.parents[2]
        rest += [] if root == Path("runs") else [f"output_dir={root}"]
        plan = read_plan(self.name)
        published = {**plan, **plan.get("grid", {}), **plan.get("rescore", {})}
        chosen = [f"{key}={','.join(values)}" for key, values in axes.items() if values != _texts(published.get(key))]
        return shlex.join(["stexp-train", "-m", f"sweep={self.name}", *chosen, *rest])


@dataclass
class Result:
    """A finished table or figure.

    Parameters
    ----------
    parts
        Heading, sentences, grid (perhaps empty) and what stands below it, as Markdown.
    numbers
        Every number with what it came from: the rows of ``table.csv`` and the cards.
    figures, tables
        File name without ending -> what goes into it.
    """

    title: str
    parts: list[tuple[str, list[str], list[list[str]], str]] = field(default_factory=list)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    details: list[Table] = field(default_factory=list)


def record(cells: Cells, jobs: list[Job], **what: Any) -> dict[str, Any]:
    """A number with what it came from.

    Parameters
    ----------
    jobs
        The cells that it is the mean of, those without a run among them.
    what
        ``label``, ``row``, ``metric``, ``value``, ``paper`` and whatever tells it apart.
    """
    done = [job for job in jobs if job.done]
    records = [cells.facts(job)[0] for job in done]
    value, paper = what.get("value"), what.get("paper")
    commits = {str(each.get("commit"))[:10] + ("+changes" if each.get("dirty") else "") for each in records}
    gpus = {", ".join(each.get("hardware", {}).get("gpu") or []) or "CPU" for each in records}
    return {
        "table": cells.name,
        "data": jobs[0].data,
        "protocol": jobs[0].protocol,
        **what,
        "difference": None if value is None or paper is None else value - paper,
        "cells": len(jobs),
        "missing_cells": len(jobs) - len(done),
        "n_sections": len({section for job in done for section in cells.facts(job)[1]}),
        "paper_sections": cells.sizes.get(jobs[0].data, {}).get("sections"),
        "seeds": len({job.seed for job in done}),
        "changed": ", ".join(cells.changed),
        "command": cells.command(jobs),
        "commit": ", ".join(sorted(commits)) or None,
        "hours": sum(each.get("seconds", 0) for each in records) / 3600,
        "hardware": ", ".join(sorted(gpus)) or None,
    }


def missing_of(jobs: Iterable[Job]) -> list[str]:
    """A sentence that says how many cells have no run, and what makes the first; none without gaps."""
    lacking = [job for job in jobs if not job.done]
    if not lacking:
        return []
    n = count(len(lacking), "cell")
    return [f"Gaps: {n} without a finished run; the first is made by `{fill(lacking[0])}`."]


def fill(job: Job) -> str:
    """The command that makes a cell."""
    before = job.needs
    return job.typed if before is None or before.done else f"{before.typed} and then {job.typed}"


def score_tables(cells: Cells, metric: str, baseline: str | None) -> Result:
    """Scores, floors, oracle and ceiling by data set, each score beside the paper's: Tables 1 and S4 to S7."""
    metrics, out = cells.reference["metrics"], Result(cells.reference["title"])
    for (data, protocol), jobs in cells.groups().items():
        done = [job for job in jobs if job.done]
        title, caption = f"{data}, protocol {protocol}", missing_of(jobs)
        rows, below = pd.DataFrame(columns=["kind", "label"]), ""
        if done:
            runs = [read_scored_run(job.output_dir) for job in done]
            table = tabulate(title, runs, metric, baseline, True, [cells.label(job) for job in done])
            out.details.append(table)
            gaps = [line for line in table.caption if line.startswith("Gap: ")]
            rest = [line for line in table.caption if line not in gaps and not line.startswith("Mean over sections")]
            caption = ["Means over sections; their spread: sections.csv.", *rest, *caption, *gaps]
            rows, below = table.rows, details(table)
        grid = [["", *(head for key in metrics for head in _heads(key)), "floors beaten", "leaks"]]
        by_label = rows.set_index("label")
        for label in dict.fromkeys(map(cells.label, jobs)):
            row = by_label.loc[label] if label in by_label.index else None
            of_label = [job for job in jobs if cells.label(job) == label]
            line, numbers = _method_line(cells, of_label, label, row)
            grid.append(line)
            out.numbers += numbers
        kind = "method"
        for _, row in rows[rows["kind"] != "method"].iterrows():
            grid += [[]] if row["kind"] != kind else []
            kind = row["kind"]
            values = {name: _plain(row[name]) for name in metrics}
            shown = [cell for value in values.values() for cell in (grids.number(value, "{:.4f}"), "", "")]
            grid.append([row["label"], *shown, "", ""])
            facts = {"row": row["name"], "label": row["label"], "kind": kind}
            out.numbers += [
                record(cells, jobs, **facts, metric=name, value=value, paper=None)
                for name, value in values.items()
                if value is not None
            ]
        out.parts.append((title, caption, grid, below))
    return out


def _method_line(
    cells: Cells, jobs: list[Job], label: str, row: pd.Series | None
) -> tuple[list[str], list[dict[str, Any]]]:
    """Line of a method in the table, bold where it beats every floor, and the numbers in it beside the paper's.

    Parameters
    ----------
    jobs
        Cells of the method.
    row
        Of its finished runs; None where there is none.
    """
    metrics, key = cells.reference["metrics"], jobs[0].cell[cells.varied[0]]
    printed = cells.reference["values"].get(jobs[0].data, {}).get(key, [None] * len(metrics))
    beaten, leaks, line = "–", None, [label]
    if row is not None:
        leaks = str(row["leaks"])
        if pd.notna(row["floors_beaten"]):
            beaten = f"{row['floors_beaten']:.0f} of {row['n_floors']:.0f}"
            line = [f"**{label}**" if row["floors_beaten"] == row["n_floors"] else label]
    numbers = []
    for name, paper in zip(metrics, printed, strict=True):
        value = None if row is None else _plain(row[name])
        numbers.append(
            record(
                cells,
                jobs,
                row=key,
                label=label,
                kind="method",
                leaks=leaks,
                floors_beaten=beaten,
                metric=name,
                value=value,
                paper=paper,
                sd_sections=None if row is None else _plain(row.get(f"{name}_sd_sections")),
            )
        )
        line += _beside(value, paper)
    return [*line, beaten, leaks or "–"], numbers


def minus_log10_p(r: np.ndarray, n: int) -> np.ndarray:
    """-log10 of the two-sided p of Pearson correlations over n spots, exact where p itself would be 0.

    p = I(1 - r^2; (n - 2) / 2, 1 / 2), the regularised incomplete beta function; where that is 0 in double precision,
    its logarithm from x^a (1 - x)^b 2F1(a + b, 1; a + 1; x) / (a B(a, b)) (DLMF 8.17.7).
    """
    r = np.asarray(r, dtype=np.float64)
    if n < 3:
        return np.full(r.shape, np.nan)
    a, b, x = (n - 2) / 2, 0.5, (1 - np.abs(r)) * (1 + np.abs(r))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        p = betainc(a, b, x)
        tail = a * np.log(x) + b * np.log1p(-x) + np.log(hyp2f1(a + b, 1, a + 1, x)) - np.log(a) - betaln(a, b)
        return np.where(p > 1e-290, -np.log(p), -tail) / np.log(10) + 0.0


def gene_correlations(folder: Path) -> pd.DataFrame:
    """Pearson of every gene in every section of a run, of the method and of its floors.

    Returns
    -------
    DataFrame
        gene, section, ``by`` (method, or a floor's name), pearson, ``minus_log10_p``.
    """
    adata = predictions.read(folder / "predictions.h5ad", "layers/predicted", "layers/observed", "obs/section")
    floors = predictions.read(folder / "floors.h5ad")
    own = f"{predictions.protocol_of(adata).name}:"
    layers = {"method": np.asarray(adata.layers["predicted"])}
    layers |= {key.removeprefix(own): np.asarray(floors.layers[key]) for key in floors.layers if key.startswith(own)}
    section, tables = adata.obs["section"].to_numpy(str), []
    for name in pd.unique(section):
        rows = section == name
        for by, values in layers.items():
            if by in ORACLES:
                continue
            r = pearson_per_gene(np.asarray(adata.layers["observed"])[rows], values[rows])
            table = pd.DataFrame({"gene": adata.var_names.to_numpy(str), "section": name, "by": by, "pearson": r})
            tables.append(table.assign(minus_log10_p=minus_log10_p(r, int(rows.sum()))))
    return pd.concat(tables, ignore_index=True)


def rank_genes(jobs: list[Job]) -> pd.DataFrame:
    """Genes by falling mean over sections of -log10 p.

    Returns
    -------
    DataFrame, index gene
        ``rank``, ``minus_log10_p``, ``pearson``, ``n_sections``, the section with the highest Pearson and that
        (``best_section``, ``best_pearson``), and the highest mean of a floor (``floor``, ``floor_name``).
    """
    long = pd.concat([gene_correlations(job.output_dir) for job in jobs if job.done], ignore_index=True)
    values = ["pearson", "minus_log10_p"]
    sections = long.dropna(subset=values).groupby(["by", "gene", "section"], sort=False)[values].mean().reset_index()
    means = sections.groupby(["by", "gene"])[values].mean()
    ours = sections[sections["by"] == "method"]
    table = means.loc["method"].copy()
    table["n_sections"] = ours.groupby("gene")["section"].nunique()
    best = ours.loc[ours.groupby("gene")["pearson"].idxmax()].set_index("gene")
    table["best_section"], table["best_pearson"] = best["section"], best["pearson"]
    floors = means["minus_log10_p"].drop("method").unstack("by")
    if floors.size:
        table["floor"], table["floor_name"] = floors.max(axis=1), floors.idxmax(axis=1)
    table = table.sort_values("minus_log10_p", ascending=False, kind="stable")
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    return table


def started(cells: Cells, out: Result) -> Iterator[tuple[tuple[str, str, str], list[Job], str, list[str]]]:
    """Data set, protocol, label; their cells; title; caption. Those without a finished cell leave an empty part."""
    for (data, protocol, label), jobs in cells.groups(by_label=True).items():
        title, caption = f"{label}, {data}, protocol {protocol}", missing_of(jobs)
        if any(job.done for job in jobs):
            yield (data, protocol, label), jobs, title, caption
        else:
            out.parts.append((title, caption, [], ""))


def top_genes(cells: Cells) -> Result:
    """The best predicted genes beside the paper's: Tables S2 and S3."""
    out = Result(cells.reference["title"])
    for (data, protocol, label), jobs, title, caption in started(cells, out):
        printed = cells.reference["values"].get(data, {})
        table = rank_genes(jobs)
        caption = [
            "−log10 p: of the Pearson correlation of a gene over the spots of a section, mean over sections. Spots are "
            "neighbours and not independent: this ranks genes, and is no test.",
            "Floor: the highest mean of a floor that reads no counts of the test spots.",
            *caption,
        ]
        shown = list(dict.fromkeys([*printed, *table.index[:TOP]]))
        grid = [["gene", "−log10 p", "paper", "difference", "rank", "paper's", "Pearson", "best section", "floor"]]
        for gene in shown:
            grid += [[]] if len(grid) == 1 + len(printed) and printed else []
            paper = printed.get(gene)
            place = str(list(printed).index(gene) + 1) if gene in printed else ""
            row = table.loc[gene] if gene in table.index else None
            value = None if row is None else float(row["minus_log10_p"])
            rest = ["–"] * 4
            if row is not None:
                rest = [f"{row['rank']:.0f}", f"{row['pearson']:.3f}"]
                rest += [f"{row['best_section']} ({row['best_pearson']:.3f})", grids.number(row.get("floor"), "{:.2f}")]
            rest.insert(1, place)
            grid.append([gene, *_beside(value, paper, "{:.2f}"), *rest])
            facts = {"row": jobs[0].model, "label": f"{label}, {gene}", "kind": "method", "gene": gene}
            out.numbers.append(record(cells, jobs, **facts, metric="minus_log10_p", value=value, paper=paper))
        shared = [gene for gene in printed if gene in table.index[: len(printed)]]
        if printed:
            caption.append(f"Of the paper's {len(printed)} best, {len(shared)} are among our {len(printed)} best.")
        out.parts.append((title, caption, grid, ""))
        out.tables[f"genes-{data}-{protocol}-{label}"] = table.reset_index()
    return out


def refuse_gaps(cells: Cells) -> None:
    """InputError that names the command for the first cell without a finished run."""
    lacking = [job for job in cells.jobs if not job.done]
    if lacking:
        raise InputError(
            f"{cells.name}: {len(lacking)} of {len(cells.jobs)} cells have no finished run (allow_missing=true prints "
            f"gaps); the first is made by: {fill(lacking[0])}; all by: {cells.command(cells.jobs)}"
        )


def _heads(metric: str) -> list[str]:
    return [TITLES[metric] + (" ↓" if metric in LOWER_IS_BETTER else ""), "paper", "difference"]


def _beside(value: float | None, paper: float | None, form: str = "{:.4f}") -> list[str]:
    both = None if value is None or paper is None else value - paper
    return [grids.number(value, form), grids.number(paper, form), grids.number(both, form.replace(":", ":+"))]


def _texts(values: Any) -> list[str]:
    """Values of an axis as a command line has them; the numbers of neighbours differ between data sets."""
    lists = values.values() if isinstance(values, dict) else [values or []]
    return list(dict.fromkeys(str(value) for each in lists for value in each))


def _plain(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
