"""Scores, floors and ceiling of predictions under a protocol."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.genes import normalise
from stexp.evaluation.contrast import describe_contrast
from stexp.evaluation.coverage import coverage_of, foreign_facts, n_scored_genes, sentences
from stexp.evaluation.floors import NO_SCALE, ORACLES, by_floor, mean_over_seeds, spread_over_seeds
from stexp.evaluation.intervals import ENOUGH
from stexp.evaluation.metrics import (
    mean_or_none,
    mean_over_sections,
    pearson_per_gene,
    score_section,
    spearman_per_gene,
    top_genes,
)
from stexp.evaluation.predictions import CHANGED
from stexp.evaluation.verdict import best_floor, count, label, verdict
from stexp.protocol import Protocol


def truth(adata: ad.AnnData, protocol: Protocol) -> np.ndarray:
    """Observed expression of the predicted spots under a protocol, (Q, G), from their counts."""
    expression = np.empty(adata.shape, dtype=np.float32)
    for name in adata.obs["section"].unique():
        rows = (adata.obs["section"] == name).to_numpy()
        expression[rows] = normalise(adata.layers["counts"][rows], adata.obs["total_counts"].to_numpy()[rows], protocol)
    return expression


def floors_of(floors: ad.AnnData, protocol: Protocol) -> dict[str, np.ndarray]:
    """Predictions of floors in ``floors.h5ad`` on the truth scale of a protocol: name, with its seed -> (Q, G)."""
    prefix = f"{protocol.name}:"
    return {key.removeprefix(prefix): np.asarray(floors.layers[key]) for key in floors.layers if key.startswith(prefix)}


def score_under(protocol: Protocol, own: Protocol, adata: ad.AnnData, floors: ad.AnnData) -> tuple[dict, pd.DataFrame]:
    """Score predictions, and their floors, against the truth of a protocol.

    Of predictions made elsewhere that lack spots or genes, method, floors and ceiling are scored on what is there.

    Parameters
    ----------
    own
        The protocol that the predictions were made under; errors count where both have one scale.
    floors
        ``floors.h5ad``: layers ``<protocol>:<floor>``, and ``uns["ceiling"]``.

    Returns
    -------
    means : dict
        ``scores``, ``floors`` and ``ceiling``, means over sections; and ``sections``, the same of each;
        ``floor_spread``: of floors that several seeds drew, standard deviations of the scores in ``floors``.
    genes : DataFrame
        A row a gene: correlations, error, mean, ceiling and floors, means over sections.
    """
    observed = truth(adata, protocol)
    predicted = np.asarray(adata.layers["predicted"])
    coverage, elsewhere = coverage_of(adata), foreign_facts(adata)
    same_scale = protocol.scale == own.scale and (elsewhere is None or elsewhere["scale"]["errors"])
    floor_of = floors_of(floors, protocol)
    sections, columns, by_seed = {}, {}, []
    for name in adata.obs["section"].unique():
        of_section = (adata.obs["section"] == name).to_numpy()
        rows = of_section & coverage.spots
        if not rows.any():
            continue
        heg = top_genes(_levels(protocol, adata[of_section], observed[of_section], floor_of["mean"][0]))
        y = np.where(coverage.genes, observed[rows], np.nan)
        depth = adata.obs["total_counts"].to_numpy()[rows]
        scores = score_section(y, predicted[rows], heg, same_scale, depth)
        floor_scores = {
            floor: _without_counts(score_section(y, values[rows], heg, floor not in NO_SCALE, depth))
            for floor, values in floor_of.items()
        }
        by_seed.append(floor_scores)
        ceiling = np.where(coverage.genes, np.asarray(floors.uns["ceiling"][protocol.name][name]), np.nan)
        sections[name] = {
            "scores": _without_counts(scores),
            "floors": mean_over_seeds(floor_scores),
            "ceiling": {"pearson_acg": mean_or_none(ceiling), "pearson_heg50": mean_or_none(ceiling[heg])},
            "n_spots": int(rows.sum()),
            "n_constant_genes": scores["n_constant_genes"],
        }
        if not rows[of_section].all():
            sections[name]["n_test_spots"] = int(of_section.sum())
        if "patient" in adata.obs:
            sections[name]["patient"] = str(adata.obs["patient"].to_numpy()[rows][0])
        beside = {floor: values[rows] for floor, values in floor_of.items()}
        columns[name] = _per_gene(y, predicted[rows], ceiling, heg, beside, same_scale)
    of_floors = {floor: mean_over_sections([scores[floor] for scores in by_seed]) for floor in floor_of}
    means = {
        "scores": mean_over_sections([section["scores"] for section in sections.values()]),
        "floors": mean_over_seeds(of_floors),
        "floor_spread": spread_over_seeds(of_floors),
        "ceiling": mean_over_sections([section["ceiling"] for section in sections.values()]),
        "sections": sections,
    }
    return means, _mean_genes(list(adata.var_names), list(columns.values()))


def _levels(protocol: Protocol, adata: ad.AnnData, observed: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """How high genes are, (G,), predicted or not: what ranks the highest of a section."""
    if protocol.truth == "residuals":  # which have no level
        if protocol.heg == "train":
            return adata.var["mean_train"].to_numpy()
        observed = normalise(adata.layers["counts"], adata.obs["total_counts"].to_numpy(), protocol, "spot")
    return np.nan_to_num(observed).mean(axis=0) if protocol.heg == "test" else mean


def _without_counts(scores: dict) -> dict:
    return {key: value for key, value in scores.items() if not key.startswith("n_")}


def _per_gene(
    observed: np.ndarray,
    predicted: np.ndarray,
    ceiling: np.ndarray,
    heg: np.ndarray,
    floors: dict[str, np.ndarray],
    errors: bool,
) -> pd.DataFrame:
    top = np.zeros(observed.shape[1])
    top[heg] = 1
    columns = {
        "pearson": pearson_per_gene(observed, predicted),
        "spearman": spearman_per_gene(observed, predicted),
        "mse": np.square(predicted - observed).mean(axis=0) if errors else np.full(len(top), np.nan),
        "mean_observed": observed.mean(axis=0),
        "heg50": top,
        "ceiling": ceiling,
    }
    pearson = {name: pearson_per_gene(observed, value) for name, value in floors.items()}
    for floor, names in by_floor(floors).items():
        columns[f"floor_{floor}"] = np.mean([pearson[name] for name in names], axis=0)
    return pd.DataFrame(columns)


def _mean_genes(panel: list[str], tables: list[pd.DataFrame]) -> pd.DataFrame:
    stacked = np.stack([table.to_numpy(dtype=np.float64) for table in tables])
    scored = ~np.isnan(stacked)
    mean = np.where(scored.any(0), np.nansum(stacked, axis=0) / np.maximum(scored.sum(0), 1), np.nan)
    table = pd.DataFrame(mean, columns=tables[0].columns)
    table.insert(0, "gene", panel)
    table["heg50"] = table["heg50"] > 0
    table.insert(6, "n_sections", scored[:, :, 0].sum(axis=0))
    return table


def truth_of(metrics: dict) -> str:
    """What a run is scored on, where that is not what its protocol is known for; else empty."""
    return f", truth {metrics['truth']}" if "truth" in metrics else ""


def summary(metrics: dict, verbose: bool = False) -> str:
    """Scores beside floors and ceiling, what they mean, and the verdict, for the terminal.

    Parameters
    ----------
    metrics
        ``metrics.json``.
    verbose
        Also the scores under the other protocols.
    """
    lines = [
        f"{metrics['data']}, {metrics['model']}, protocol {metrics['protocol']}{truth_of(metrics)}, "
        f"fold {metrics['fold']}: "
        f"{count(metrics['n_spots'], 'spot')}, {count(n_scored_genes(metrics), 'gene')}, "
        f"{count(len(metrics['sections']), 'section')}",
        f"  {'':<34}     ACG   HEG50   depth     MSE     MAE",
        *_ranked(metrics["model"], metrics),
    ]
    for name, part in metrics["scored_as"].items() if verbose else ():
        lines += [f"  scored as {name}", *_ranked(metrics["model"], part)]
    lines += [
        "  ACG: Pearson correlation of a gene over the spots of a section, mean over all genes, then over sections;",
        "  HEG50: over the 50 highest genes; depth: ACG without what a spot's total counts explain.",
    ]
    chosen = metrics["chosen"]
    if "k_validation_pearson" in chosen:
        lines.append(f"  k = {chosen['k']} neighbours, chosen on validation spots.")
    lines += _evidence_lines(metrics)
    if metrics.get("contrast", {}).get("left_chance"):  # else the verdict says it
        lines.append(f"  {describe_contrast(metrics)}")
    judged = verdict(metrics)
    lines += [f"{CHANGED}."] if metrics.get("predictions_changed") else []
    lines += sentences(metrics)
    return "\n".join([*lines, judged.numbers, judged.statement])


def _evidence_lines(metrics: dict) -> list[str]:
    """Interval of the score, genes beyond chance, and the error that is gone, each in half a line."""
    behind, parts = metrics.get("evidence", {}), []
    if interval := behind.get("intervals", {}).get("pearson_acg"):
        text = f"95 % interval of ACG {interval['low']:.3f} to {interval['high']:.3f}, over {interval['over']}"
        few = f" (so few that it covers about {interval['covers']:.0%})" if interval.get("covers", 1) < ENOUGH else ""
        parts.append(text + few)
    if chance := behind.get("chance"):
        parts.append(f"{chance['n_beyond']} of {chance['n_genes']} genes beyond chance")
    skill = behind.get("error", {}).get("skill_within_gene")
    if skill is not None:
        parts.append(f"{100 * skill:.0f} % of the training mean's error within genes is gone")
    ours, mean = metrics["scores"].get("mse"), metrics["floors"].get("mean", {}).get("mse")
    if ours is not None and mean and ours > 1.5 * mean:  # correlations alone do not tell
        parts.append(f"the squared error is {ours / mean:.1f} times that of the training mean")
    return [f"  {'; '.join(parts)}."] if parts else []


def _ranked(model: str, part: dict) -> list[str]:
    """A line for the ceiling, then for method and floors by falling ACG."""
    rows = [(f"> {model}", part["scores"])]
    for name, own in part["floors"].items():
        rows.append((f"{'oracle' if name in ORACLES else 'floor'}: {label(name)}", own))
    rows.sort(key=lambda row: -np.inf if row[1].get("pearson_acg") is None else row[1]["pearson_acg"], reverse=True)
    shown = ("pearson_acg", "pearson_heg50", "pearson_given_depth", "mse", "mae")
    return [f"  {name:<34}" + _cells(own, shown) for name, own in [("ceiling: counting noise", part["ceiling"]), *rows]]


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
