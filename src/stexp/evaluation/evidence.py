"""What stands behind a score: its interval, the parts of the error, chance, strata, spatial order, gene sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anndata as ad
import numpy as np
import pandas as pd

from stexp.evaluation import intervals
from stexp.evaluation.chance import beyond_chance
from stexp.evaluation.coverage import foreign_facts
from stexp.evaluation.floors import ORACLES, by_floor
from stexp.evaluation.metrics import SCORES, mean_or_none, pearson_per_gene
from stexp.evaluation.programmes import scored_genes, set_scores
from stexp.evaluation.spatial import structural_similarity, structure
from stexp.evaluation.strata import MEASURABLE, strata

FALSE_DISCOVERIES = 0.05

Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of a section: observed and predicted expression (Q, G), positions (Q, 2)."""


def evidence(
    adata: ad.AnnData,
    observed: np.ndarray,
    floors: Mapping[str, np.ndarray],
    genes: pd.DataFrame,
    sections: Mapping[str, Mapping],
    sets: Mapping[str, Sequence[str]],
) -> tuple[dict, pd.DataFrame]:
    """Examine predictions beyond their means.

    Parameters
    ----------
    adata
        ``predictions.h5ad``.
    observed : (Q, G)
        The truth.
    floors
        Name, with its seed -> (Q, G).
    genes
        A row a gene, as ``per_gene.csv``.
    sections
        Of ``metrics.json``: each section's scores, floors and patient.
    sets
        Gene sets: name -> genes; those outside the panel are left out.

    Returns
    -------
    facts : dict
        ``intervals``: of every score; ``error``: its parts and their skill against the training mean; ``chance``: how
        many genes correlate beyond their own moved maps; ``strata``; ``measurable``: the mean over genes that are not
        mere noise; ``structure``; ``gene_sets``, a row a set.
    columns : DataFrame
        ``chance_z`` and ``chance_q`` of every gene, where sections can be moved over themselves.
    """
    predicted, xy = np.asarray(adata.layers["predicted"]), np.asarray(adata.obsm["spatial"], dtype=np.float64)
    rows_of = [np.flatnonzero(adata.obs["section"] == name) for name in sections]
    parts = [(observed[rows], predicted[rows], xy[rows]) for rows in rows_of]
    patients = {name: section.get("patient") for name, section in sections.items()}
    facts: dict = {
        "intervals": _intervals(sections, patients, parts),
        "error": _error(sections),
        "structure": _mean_of([structure(*part) for part in parts]) | {"ssim": None},
    }
    elsewhere = foreign_facts(adata)
    if elsewhere is None or elsewhere["scale"]["errors"]:  # maps of another scale, as of counts, are no maps of this
        facts["structure"]["ssim"] = mean_or_none([_mean_or_nan(structural_similarity(y, p)) for y, p, _ in parts])
    facts["chance"], columns = _chance(parts)
    of_sections = {name: pearson_per_gene(y, p) for name, (y, p, _) in zip(sections, parts, strict=True)}
    facts["strata"] = strata(genes, adata.var["mean_train"].to_numpy(), of_sections, patients)
    measurable = (genes["ceiling"] >= MEASURABLE).to_numpy()
    facts["measurable"] = {
        "n_genes": int(measurable.sum()),
        "pearson": mean_or_none(genes["pearson"].to_numpy()[measurable]),
    }
    floors_of = {floor: [values[rows] for rows in rows_of] for floor, values in floors.items()}
    facts["gene_sets"] = _gene_sets(sets, list(adata.var_names), parts, floors_of)
    return facts, pd.DataFrame(columns, index=genes.index)


def _intervals(sections: Mapping[str, Mapping], patients: Mapping[str, str | None], parts: Sequence[Part]) -> dict:
    out = {}
    for score in SCORES:
        values = {name: section["scores"].get(score) for name, section in sections.items()}
        if (interval := intervals.over_sections(values, patients)) is not None:
            out[score] = interval
    if "pearson_acg" not in out and (interval := intervals.over_blocks(parts)) is not None:
        out["pearson_acg"] = interval
    return out


def _error(sections: Mapping[str, Mapping]) -> dict[str, float | None]:
    """Share of the training mean's error that a prediction is rid of, in each part: 1 is perfect, below 0 is worse.

    ``best_floor_within_gene`` is the highest that a floor has within genes.
    """

    scored = list(sections.values())

    def skill(part: str, predictions: Sequence[Mapping]) -> float | None:
        """Of the error summed over sections: in a mean of ratios, one that the mean fits by chance would decide."""
        beside = [section["floors"]["mean"].get(part) for section in scored]
        pairs = [(each.get(part), mean) for each, mean in zip(predictions, beside, strict=True)]
        own, mean = np.array([pair for pair in pairs if None not in pair], dtype=np.float64).reshape(-1, 2).sum(axis=0)
        return float(1 - own / mean) if mean > 0 else None

    parts = ("mse", "mse_gene_mean", "mse_within_gene")
    out = {f"skill_{part.removeprefix('mse_')}": skill(part, [each["scores"] for each in scored]) for part in parts}
    names = set(scored[0]["floors"]) - ORACLES - {"mean"}
    floors = [skill("mse_within_gene", [each["floors"][name] for each in scored]) for name in names]
    out["best_floor_within_gene"] = max((value for value in floors if value is not None), default=None)
    return out


def _chance(parts: Sequence[Part]) -> tuple[dict | None, dict[str, np.ndarray]]:
    outcome = beyond_chance(parts)
    if outcome is None:
        return None, {}
    facts = {
        "n_genes": int((~np.isnan(outcome.q)).sum()),
        "n_beyond": int((outcome.q <= FALSE_DISCOVERIES).sum()),
        "false_discoveries": FALSE_DISCOVERIES,
        "pearson_moved": mean_or_none(outcome.mean),
    }
    return facts, {"chance_z": outcome.z, "chance_q": outcome.q}


def _gene_sets(
    sets: Mapping[str, Sequence[str]],
    panel: Sequence[str],
    parts: Sequence[Part],
    floors: Mapping[str, Sequence[np.ndarray]],
) -> list[dict]:
    """A row a set, by falling correlation: its own, its floors', and what moved maps would give."""
    column = {gene: n for n, gene in enumerate(panel)}
    columns = {name: [column[gene] for gene in genes if gene in column] for name, genes in sets.items()}
    columns = {name: own for name, own in columns.items() if own}
    if not columns:
        return []
    # of each section the same genes on both sides, and of the floors
    common = [scored_genes(y, p) for y, p, _ in parts]
    scored = [
        (set_scores(y, columns, genes), np.nan_to_num(set_scores(p, columns, genes)), xy)
        for (y, p, xy), genes in zip(parts, common, strict=True)
    ]
    outcome = beyond_chance(scored)
    pearson = [pearson_per_gene(truth, own) for truth, own, _ in scored]
    beside = {
        floor: [
            pearson_per_gene(truth, np.nan_to_num(set_scores(own, columns, genes)))
            for (truth, *_), own, genes in zip(scored, values, common, strict=True)
        ]
        for floor, values in floors.items()
    }
    rows = []
    for n, (name, genes) in enumerate(columns.items()):
        row = {"set": name, "n_genes": len(genes), "genes": [panel[i] for i in genes]}
        row |= {"pearson": mean_or_none([each[n] for each in pearson])}
        row["floors"] = {
            floor: mean_or_none([each[n] for name in names for each in beside[name]])
            for floor, names in by_floor(beside).items()
        }
        if outcome is not None and not np.isnan(outcome.p[n]):
            row |= {"chance_z": float(outcome.z[n]), "chance_p": float(outcome.p[n])}
        rows.append(row)
    return sorted(rows, key=lambda row: -np.inf if row["pearson"] is None else row["pearson"], reverse=True)


def _mean_or_nan(values: np.ndarray) -> float:
    return float("nan") if (mean := mean_or_none(values)) is None else mean


def _mean_of(facts: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    return {key: mean_or_none(np.array([each[key] for each in facts], dtype=np.float64)) for key in facts[0]}
