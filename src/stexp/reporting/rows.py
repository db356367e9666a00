"""What runs put into a table: scores of methods, floors and ceiling by section, and what each run took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from stexp.evaluation.coverage import is_partial
from stexp.reporting.footnotes import not_stated
from stexp.runs.scored import ScoredRun

SAME_FLOOR = 1e-3
"""Floors of one name that differ by less in every section are one row: rounding differs between machines."""


def scores_of(runs: list[ScoredRun], labels: list[str], metrics: list[str]) -> pd.DataFrame:
    """Every score of every run, of the method, floors, oracles and ceiling.

    Returns
    -------
    DataFrame
        ``kind`` (method, floor, oracle, ceiling), ``name``, ``of`` (the method of the run), ``fold``, ``seed``,
        ``section``, ``patient`` and `metrics`. A floor that differs between methods has one name for each value, and
        floors and ceiling of a method that does not predict all spots and genes are named by it.
    """
    rows = []
    for run, label in zip(runs, labels, strict=True):
        oracles = run.metrics["oracle_floors"]
        of_part = f" (where {label} predicts)" if is_partial(run.metrics) else ""  # floors of other spots or genes
        for section, part in run.sections.items():
            predictors = [("method", label, part["scores"])]
            predictors += [
                ("oracle" if floor in oracles else "floor", floor.replace("_", " ") + of_part, scores)
                for floor, scores in part["floors"].items()
            ]
            predictors.append(("ceiling", "counting noise" + of_part, part["ceiling"]))
            where = {"of": label, "fold": run.fold, "seed": run.seed, "section": section}
            where["patient"] = run.patient_of[section]
            for kind, name, scores in predictors:
                rows.append({"kind": kind, "name": name, **where, **{key: scores.get(key) for key in metrics}})
    table = pd.DataFrame(rows).astype(dict.fromkeys(metrics, np.float64))
    encoders = {
        label: label if run.is_foreign else str(run.settings.get("image_encoder.name"))
        for run, label in zip(runs, labels, strict=True)
    }
    _name_floors(table, encoders)
    return table


def _name_floors(scores: pd.DataFrame, encoders: dict[str, str]) -> None:
    """Rename floors that differ between methods, by image encoder, or by method where that does not tell them apart."""
    for name in scores.loc[scores["kind"] == "floor", "name"].unique():
        part = scores[(scores["kind"] == "floor") & (scores["name"] == name)]
        values = part.groupby(["fold", "section", "of"])["pearson_acg"].mean().unstack("of")
        alike: list[list[str]] = []
        for method in sorted(values.columns):
            for methods in alike:
                off = (values[method] - values[methods].mean(axis=1)).abs().dropna()
                if off.max() <= SAME_FLOOR if len(off) else encoders[method] == encoders[methods[0]]:
                    methods.append(method)
                    break
            else:
                alike.append([method])
        # predictions made elsewhere name no encoder; they stand beside floors of runs
        named = ({encoders[method] for method in methods} - set(methods) or set(methods) for methods in alike)
        tags = [", ".join(sorted(names)) for names in named]
        if len(set(tags)) < len(tags):
            tags = [", ".join(methods) for methods in alike]
        for tag, methods in zip(tags, alike, strict=True):
            if len(alike) > 1:
                scores.loc[part.index[part["of"].isin(methods)], "name"] = f"{name} ({tag})"


def cost_of(runs: list[ScoredRun]) -> dict:
    """Seeds, leaks, and what one run of a method took: means of seconds, the highest of the rest."""
    records = [run.provenance for run in runs if not run.is_foreign]  # whose training is not on record
    sizes = [record.get("parameters") or {} for record in records]

    def highest(facts: Iterable[Mapping], key: str) -> float | None:
        return max((each[key] for each in facts if each.get(key) is not None), default=None)

    return {
        "n_seeds": len({run.seed for run in runs}),
        "leaks": span(run.audit["leaks"] for run in runs) + (" known" if any(map(not_stated, runs)) else ""),
        "epochs": highest(records, "epochs") or max(run.settings.get("trainer.max_epochs") or 0 for run in runs)
        if records
        else None,
        "seconds": float(np.mean([record["seconds"] for record in records])) if records else np.nan,
        "peak_memory_gb": highest(records, "peak_memory_gb"),
        "peak_gpu_memory_gb": highest(records, "peak_gpu_memory_gb"),
        "parameters": highest(sizes, "total"),
        "trained_parameters": highest(sizes, "trained"),
        "hardware": ", ".join(sorted({_hardware(record["hardware"]) for record in records})) or "elsewhere",
    }


def _hardware(facts: Mapping) -> str:
    gpus = facts.get("gpu") or []
    return (
        ", ".join(sorted(set(gpus)))
        if facts.get("device") == "cuda" and gpus
        else f"CPU {facts.get('cpu', '')}".strip()
    )


def span(values: Iterable[Any]) -> str:
    """Lowest and highest of some values, or the only one."""
    values = sorted(set(values))
    return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"
