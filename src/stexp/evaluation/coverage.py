"""Which spots and genes of a run are predicted, and what else is to be said of predictions that were made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np

from stexp.evaluation.predictions import read_fact
from stexp.evaluation.records import ForeignFacts

FOREIGN = "elsewhere"
"""Key of ``uns["stexp"]`` and of ``metrics.json``: what is on record of predictions that no run of ours made."""


@dataclass(frozen=True)
class Coverage:
    """What of the test spots and the panel is predicted.

    Attributes
    ----------
    spots : (Q,) bool
    genes : (G,) bool
    """

    spots: np.ndarray
    genes: np.ndarray

    @property
    def whole(self) -> bool:
        return bool(self.spots.all() and self.genes.all())


def foreign_facts(adata: ad.AnnData) -> dict[str, Any] | None:
    """What is on record of predictions made elsewhere; None of those of a run of ours."""
    return read_fact(adata, FOREIGN, ForeignFacts) if FOREIGN in adata.uns.get("stexp", {}) else None


def coverage_of(adata: ad.AnnData) -> Coverage:
    """Spots and genes that are not NaN throughout; a run of ours predicts all, and a NaN in it is an error."""
    if foreign_facts(adata) is None:
        return Coverage(np.ones(adata.n_obs, dtype=bool), np.ones(adata.n_vars, dtype=bool))
    missing = np.isnan(np.asarray(adata.layers["predicted"]))
    return Coverage(~missing.all(axis=1), ~missing.all(axis=0))


def covered(adata: ad.AnnData) -> ad.AnnData:
    """Predictions without the spots and genes that are not predicted; the same object where there are none."""
    coverage = coverage_of(adata)
    return adata if coverage.whole else adata[coverage.spots, coverage.genes].copy()


def describe_coverage(adata: ad.AnnData) -> dict[str, Any]:
    """Counts of predicted spots and genes and of all, for ``metrics.json``, and the genes that are missing."""
    coverage = coverage_of(adata)
    return {
        "n_spots": int(coverage.spots.sum()),
        "of_spots": adata.n_obs,
        "n_genes": int(coverage.genes.sum()),
        "of_genes": adata.n_vars,
        "missing_genes": [str(gene) for gene in adata.var_names[~coverage.genes]],
    }


def is_partial(metrics: Mapping[str, Any]) -> bool:
    """Whether a run of predictions made elsewhere lacks spots or genes."""
    coverage = metrics.get(FOREIGN, {}).get("coverage")
    return coverage is not None and bool(
        coverage["n_spots"] < coverage["of_spots"] or coverage["n_genes"] < coverage["of_genes"]
    )


def is_training_unstated(metrics: Mapping[str, Any]) -> bool:
    """Whether predictions were made elsewhere by a training that nobody states."""
    return FOREIGN in metrics and metrics[FOREIGN]["trained_on"] is None


def n_scored_genes(metrics: Mapping[str, Any]) -> int:
    """Genes of the panel that are predicted."""
    return int(metrics.get(FOREIGN, {}).get("coverage", metrics)["n_genes"])


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """What a reader of the scores must know of predictions made elsewhere; empty for a run of ours."""
    facts = metrics.get(FOREIGN)
    if facts is None:
        return []
    coverage, trained_on = facts["coverage"], facts["trained_on"]
    if trained_on is None:
        trained = "which sections they were trained on is not stated"
    else:
        trained = f"by their statement trained on {', '.join(trained_on) or 'no section of this data set'}"
    text = [f"Predicted elsewhere: {trained}; floors are those of the training side of this fold."]
    if is_partial(metrics):
        text.append(
            f"Predicted are {coverage['n_spots']} of {coverage['of_spots']} test spots and {coverage['n_genes']} of "
            f"{coverage['of_genes']} genes; method, floors and ceiling are scored on these."
        )
    return [*text, facts["scale"]["statement"]]
