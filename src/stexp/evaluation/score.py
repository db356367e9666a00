"""Scores, floors and ceiling of predictions under a protocol."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.genes import normalise
from stexp.evaluation.floors import NO_SCALE, ORACLES
from stexp.evaluation.metrics import (
    mean_or_none,
    mean_over_sections,
    pearson_per_gene,
    score_section,
    spearman_per_gene,
    top_genes,
)
from stexp.evaluation.verdict import best_floor
from stexp.protocol import Protocol


def truth(adata: ad.AnnData, protocol: Protocol) -> np.ndarray:
    """Observed expression of the predicted spots under a protocol, (Q, G), from their counts."""
    out = np.empty(adata.shape, dtype=np.float32)
    for name in adata.obs["section"].unique():
        here = (adata.obs["section"] == name).to_numpy()
        out[here] = normalise(adata.layers["counts"][here], adata.obs["total_counts"].to_numpy()[here], protocol)
    return out


def score_under(protocol: Protocol, own: Protocol, adata: ad.AnnData, floors: ad.AnnData) -> tuple[dict, pd.DataFrame]:
    observed = truth(adata, protocol)
    predicted = np.asarray(adata.layers["predicted"])
    same_scale = protocol.scale == own.scale
    floor_of = {
        key.split(":", 1)[1]: np.asarray(floors.layers[key])
        for key in floors.layers
        if key.startswith(f"{protocol.name}:")
    }
    sections, columns = {}, {}
    for name in adata.obs["section"].unique():
        here = (adata.obs["section"] == name).to_numpy()
        y = observed[here]
        heg = top_genes(np.nan_to_num(y).mean(axis=0) if protocol.heg == "test" else floor_of["mean"][0])
        depth = adata.obs["total_counts"].to_numpy()[here]
        scores = score_section(y, predicted[here], heg, same_scale, depth)
        ceiling = np.asarray(floors.uns["ceiling"][protocol.name][name])
        sections[name] = {
            "scores": {key: value for key, value in scores.items() if not key.startswith("n_")},
            "floors": {
                floor: {
                    key: value
                    for key, value in score_section(y, values[here], heg, floor not in NO_SCALE, depth).items()
                    if not key.startswith("n_")
                }
                for floor, values in floor_of.items()
            },
            "ceiling": {"pearson_acg": mean_or_none(ceiling), "pearson_heg50": mean_or_none(ceiling[heg])},
            "n_spots": int(here.sum()),
            "n_constant_genes": scores["n_constant_genes"],
        }
        columns[name] = _per_gene(
            y, predicted[here], ceiling, heg, {floor: values[here] for floor, values in floor_of.items()}
        )
    means = {
        "scores": mean_over_sections([section["scores"] for section in sections.values()]),
        "floors": {
            floor: mean_over_sections([section["floors"][floor] for section in sections.values()]) for floor in floor_of
        },
        "ceiling": mean_over_sections([section["ceiling"] for section in sections.values()]),
        "sections": sections,
    }
    return means, _mean_genes(list(adata.var_names), list(columns.values()))


def _per_gene(observed, predicted, ceiling, heg, floors: dict[str, np.ndarray]) -> pd.DataFrame:
    top = np.zeros(observed.shape[1])
    top[heg] = 1
    columns = {
        "pearson": pearson_per_gene(observed, predicted),
        "spearman": spearman_per_gene(observed, predicted),
        "mse": np.square(predicted - observed).mean(axis=0),
        "mean_observed": observed.mean(axis=0),
        "heg50": top,
        "ceiling": ceiling,
    }
    return pd.DataFrame(
        columns | {f"floor_{name}": pearson_per_gene(observed, value) for name, value in floors.items()}
    )


def _mean_genes(panel: list[str], tables: list[pd.DataFrame]) -> pd.DataFrame:
    stacked = np.stack([table.to_numpy(dtype=np.float64) for table in tables])
    there = ~np.isnan(stacked)
    mean = np.where(there.any(0), np.nansum(stacked, axis=0) / np.maximum(there.sum(0), 1), np.nan)
    table = pd.DataFrame(mean, columns=tables[0].columns)
    table.insert(0, "gene", panel)
    table["heg50"] = table["heg50"] > 0
    table.insert(6, "n_sections", there[:, :, 0].sum(axis=0))
    return table


def summary(metrics: dict) -> str:
    """Scores beside floors and ceiling, for the terminal."""

    def row(name: str, scores: dict) -> str:
        return f"  {name:<34}" + _cells(scores, ("pearson_acg", "pearson_heg50", "pearson_given_depth", "mse", "mae"))

    head = (
        f"{metrics['data']}, {metrics['model']}, protocol {metrics['protocol']}, fold {metrics['fold']}: "
        f"{metrics['n_spots']} spots, {metrics['n_genes']} genes, {len(metrics['sections'])} section(s)"
    )
    blocks = [head, f"  {'':<34}     ACG   HEG50 | depth     MSE     MAE"]
    for title, part in (("", metrics), *((f"  scored as {name}", part) for name, part in metrics["scored_as"].items())):
        blocks += [title] if title else []
        blocks.append(row(metrics["model"], part["scores"]))
        for name, scores in part["floors"].items():
            blocks.append(row(f"floor: {name}" + (" (oracle)" if name in ORACLES else ""), scores))
        blocks.append(row("ceiling: counting noise", part["ceiling"]))
    return "\n".join(blocks)


def folds_table(runs: list[dict]) -> str:
    """Scores of several folds beside the best floor of each (oracles aside), and means over folds, for the terminal.

    Parameters
    ----------
    runs
        The ``metrics.json`` of each fold.
    """

    def row(name: str, scores: dict, floor: str, beside: dict) -> str:
        shown = ("pearson_acg", "pearson_heg50")
        return f"  {name:<16}{_cells(scores, shown)}   {floor:<18}{_cells(beside, shown)}"

    first = runs[0]
    lines = [
        f"{first['data']}, {first['model']}, protocol {first['protocol']}: {len(runs)} folds",
        f"  {'fold':<16}     ACG   HEG50   {'best floor':<18}     ACG   HEG50",
    ]
    own, beside = [], []
    for metrics in runs:
        best = best_floor(metrics)
        own.append(metrics["scores"])
        beside.append(metrics["floors"][best] if best else dict.fromkeys(metrics["scores"]))
        lines.append(row(metrics["fold"], own[-1], best or "-", beside[-1]))
    return "\n".join([*lines, row("mean", mean_over_sections(own), "", mean_over_sections(beside))])


def _cells(scores: dict, keys: tuple[str, ...]) -> str:
    return "".join("       -" if scores.get(key) is None else f"{scores[key]:8.4f}" for key in keys)
