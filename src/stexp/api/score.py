"""Scores of predictions, by our own methods or anyone's, beside floors and ceiling."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stexp.api.work_folder import WorkFolder
from stexp.data.shown import facts_table, one_line
from stexp.errors import InputError
from stexp.evaluation.floors import ORACLES
from stexp.evaluation.metrics import SCORES
from stexp.evaluation.records import read_audit, read_genes, read_metrics
from stexp.evaluation.score import summary
from stexp.evaluation.verdict import best_floor, label, number, verdict
from stexp.reporting.report import write_report
from stexp.runs.folder import RunFolder
from stexp.runs.scoring import score_run


class Score:
    """How good predictions of held-out spots are; ``print(score)`` says it in words.

    Parameters
    ----------
    run
        Folder of a finished run, of a command or of Python.

    Raises
    ------
    InputError
        The folder holds no run.

    Examples
    --------
    >>> score = model.score  # or stexp.Score("runs/her2st-stnet-strict-B-s0")
    >>> score.table.loc[["stnet", "colour ridge"], "pearson_acg"]
    >>> score.report("report.html")
    """

    def __init__(self, run: str | Path | WorkFolder) -> None:
        self._work = run if isinstance(run, WorkFolder) else WorkFolder(run)
        RunFolder(self.folder).require()

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self._work.path

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """``metrics.json``, all that was scored, as plain values."""
        if not (self.folder / "metrics.json").is_file():
            return score_run(self.folder)
        return dict(read_metrics(self.folder))

    @property
    def name(self) -> str:
        """Of the method."""
        return str(self.metrics["model"])

    @property
    def table(self) -> pd.DataFrame:
        """Ceiling, method, floors and oracles, the best first; ``kind`` and a column for every score.

        ``pearson_acg``: Pearson correlation of a gene over the spots of a section, mean over all genes, then over
        sections; ``pearson_heg50``: over the 50 highest genes; ``pearson_given_depth``: without what a spot's total
        counts explain; errors on the scale of the truth.
        """
        return ranked(self.name, self.metrics)

    @property
    def sections(self) -> pd.DataFrame:
        """The same by section: index ``section`` and ``name``."""
        parts = {name: ranked(self.name, part) for name, part in self.metrics["sections"].items()}
        return pd.concat(parts, names=["section"])

    @cached_property
    def per_gene(self) -> pd.DataFrame:
        """A row a gene: correlations, error, mean, ceiling and floors, means over sections."""
        table = pd.DataFrame(read_genes(self.folder / "per_gene.csv")).set_index("gene")
        return table.astype(np.float64).astype({"heg50": bool})

    @cached_property
    def audit(self) -> pd.DataFrame:
        """What predictions were allowed to see that they should not have, by item.

        ``leak``; ``unknown``: it cannot be judged, since whoever predicted did not state it; ``detail``.
        """
        items = read_audit(self.folder)["items"]
        table = pd.DataFrame([{"unknown": False, **item} for item in items]).set_index("name")
        return table[["leak", "unknown", "detail"]]

    @property
    def verdict(self) -> str:
        """What the numbers say, and how sure they are, in a sentence or two."""
        return verdict(self.metrics).statement

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report, a page with maps, charts and audit that needs nothing else.

        Parameters
        ----------
        path
            Where to; None: ``report.html`` in the folder of the run.
        """
        page = write_report(self.folder)
        if path is None:
            return page
        path = Path(path).expanduser()
        if path.is_dir():
            raise InputError(f"{path} is a folder; the name of a file in it, such as report.html, would fit")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, path)
        return path

    def in_words(self) -> dict[str, str]:
        """The main numbers, by what they are."""
        metrics, best = self.metrics, best_floor(self.metrics)
        floor = "none" if best is None else f"{number(metrics['floors'][best]['pearson_acg'])} ({label(best)})"
        return {
            "Pearson": number(metrics["scores"].get("pearson_acg")),
            "best floor": floor,
            "ceiling": number(metrics["ceiling"].get("pearson_acg")),
        }

    def _facts(self) -> dict[str, str]:
        metrics, (leaks, unknown) = self.metrics, self.audit[["leak", "unknown"]].sum()
        return {
            "score": self.name,
            "data": f"{metrics['data']} (fold {metrics['fold']})",
            "protocol": metrics["protocol"],
            **self.in_words(),
            "leaks": f"{leaks} ({unknown} not known)" if unknown else str(leaks),
        }

    def __repr__(self) -> str:
        return one_line(self._facts())

    def __str__(self) -> str:
        return summary(self.metrics)

    def _repr_html_(self) -> str:
        shown = [key for key in ("kind", "pearson_acg", "pearson_heg50", "pearson_given_depth", "mse", "mae")]
        table = self.table[shown].to_html(float_format="{:.3f}".format, na_rep="–", border=0, escape=True)
        return f"{facts_table(f'Score of {self.name}', self._facts())}{table}<p>{escape(self.verdict)}</p>"


def ranked(name: str, part: Mapping[str, Any]) -> pd.DataFrame:
    """The table of a score, from what ``metrics.json`` holds of all sections or of one."""
    rows = [("method", name, part["scores"])]
    rows += [("oracle" if floor in ORACLES else "floor", label(floor), own) for floor, own in part["floors"].items()]
    table = pd.DataFrame(
        [{"name": named, "kind": kind, **{key: own.get(key) for key in SCORES}} for kind, named, own in rows]
    )
    table = table.astype(dict.fromkeys(SCORES, np.float64))
    table = table.sort_values("pearson_acg", ascending=False, kind="stable", na_position="last")
    top = {"name": "counting noise", "kind": "ceiling", **{key: part["ceiling"].get(key) for key in SCORES}}
    first = pd.DataFrame([top]).astype(dict.fromkeys(SCORES, np.float64))
    return pd.concat([first, table], ignore_index=True).set_index("name")
