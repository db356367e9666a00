"""``stexp-score run=runs/x``: metrics, floors and ceiling from the files of a run, without torch."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from stexp import InputError, predictions
from stexp.config import command, load_run, other_protocols, to_plain, write_atomically
from stexp.data.genes import normalise
from stexp.floors import NO_SCALE, ORACLES
from stexp.metrics import (
    mean_or_none,
    mean_over_sections,
    pearson_per_gene,
    score_section,
    spearman_per_gene,
    top_genes,
)
from stexp.overrides import entry
from stexp.protocol import Protocol
from stexp.report import best_floor, write_report

log = logging.getLogger(__name__)

NEEDED = (
    "layers/predicted",
    "layers/counts",
    "obs/section",
    "obs/total_counts",
    *(f"uns/stexp/{key}" for key in ("protocol", "fold", "model", "data", "chosen")),
)
"""What scoring reads of ``predictions.h5ad``."""


@entry("score")
def main(cfg: DictConfig) -> None:
    with command():
        if OmegaConf.is_missing(cfg, "run"):
            raise InputError("which run? give its folder, as in: stexp-score run=runs/x")
        run = Path(cfg.run)
        load_run(run)
        changes = {key: value for key, value in to_plain(cfg.model).items() if value is not None}
        if not changes and cfg.genes == "panel" and cfg.output_dir is not None:
            raise InputError(
                "output_dir is for new predictions; change something, as in model.k=50 or genes=all, or leave it out"
            )
        if changes or cfg.genes != "panel":
            from stexp.rescore import predict_again  # imports torch, which scoring alone does not need

            run = predict_again(run, changes, to_plain(cfg).get("genes"), cfg.output_dir)
        metrics = score_run(run)
        print(summary(metrics))
        print(f"wrote {run / 'metrics.json'}, {run / 'per_gene.csv'} and {write_report(run)}")


def score_run(run: Path) -> dict:
    """Score a run under its own protocol and the others, and write ``metrics.json`` and ``per_gene.csv``.

    Under another protocol's truth the predictions keep their scale, so correlations count and errors do not,
    unless the two truths are the same. The split stays that of the run.
    """
    observed = predictions.read(run / "predictions.h5ad", *NEEDED)
    floors = predictions.read(run / "floors.h5ad", "uns/ceiling")
    facts, own = observed.uns["stexp"], predictions.protocol_of(observed)
    scored, genes = {}, None
    for protocol in (own, *other_protocols(own).values()):
        if protocol is not own and f"{protocol.name}:mean" not in floors.layers:
            continue  # a protocol that came after the run
        _check_floors(floors, observed, protocol, run / "floors.h5ad")
        scored[protocol.name], table = _score_under(protocol, own, observed, floors)
        genes = table if protocol is own else genes
    mine = scored.pop(own.name)
    metrics = {
        "protocol": own.name,
        "fold": str(facts["fold"]),
        "model": str(facts["model"]),
        "data": str(facts["data"]),
        "scores": mine["scores"],
        "floors": mine["floors"],
        "ceiling": mine["ceiling"],
        "oracle_floors": sorted(ORACLES & set(mine["floors"])),
        "n_spots": observed.n_obs,
        "n_genes": observed.n_vars,
        "n_constant_genes": sum(section["n_constant_genes"] for section in mine["sections"].values()),
        "chosen": json.loads(facts["chosen"]),
        "sections": mine["sections"],
        "scored_as": {
            name: {key: part[key] for key in ("scores", "floors", "ceiling")} for name, part in scored.items()
        },
    }
    genes.to_csv(run / ".per_gene.csv.part", index=False, float_format="%.6g")
    (run / ".per_gene.csv.part").replace(run / "per_gene.csv")
    write_atomically(run / "metrics.json", json.dumps(metrics, indent=1))
    return metrics


def truth(adata: ad.AnnData, protocol: Protocol) -> np.ndarray:
    """Observed expression of the predicted spots under a protocol, (Q, G), from their counts."""
    out = np.empty(adata.shape, dtype=np.float32)
    for name in adata.obs["section"].unique():
        here = (adata.obs["section"] == name).to_numpy()
        out[here] = normalise(adata.layers["counts"][here], adata.obs["total_counts"].to_numpy()[here], protocol)
    return out


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


def _check_floors(floors: ad.AnnData, observed: ad.AnnData, protocol: Protocol, path: Path) -> None:
    ceiling = floors.uns["ceiling"].get(protocol.name, {})
    sections = observed.obs["section"].unique()
    lacking = [name for name in sections if np.shape(ceiling.get(name)) != (observed.n_vars,)]
    if list(floors.var_names) != list(observed.var_names):
        problem = "is of other genes than predictions.h5ad"
    elif list(floors.obs_names) != list(observed.obs_names):
        problem = "is of other spots than predictions.h5ad"
    elif f"{protocol.name}:mean" not in floors.layers:
        problem = f"has no floors under protocol {protocol.name}"
    elif lacking:
        problem = f"has no ceiling of section {', '.join(lacking)} under protocol {protocol.name}"
    else:
        return
    raise InputError(f"{path} {problem}; delete it and {predictions.AGAIN}")


def _score_under(protocol: Protocol, own: Protocol, adata: ad.AnnData, floors: ad.AnnData) -> tuple[dict, pd.DataFrame]:
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


if __name__ == "__main__":
    main()
