"""Scores by how high a gene is, and by how well it could be predicted at all."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd

from stexp.evaluation.metrics import mean_or_none

MEASURABLE = 0.1
"""Ceiling below which a gene is noise in a section: whatever predicts it, its score says nothing."""
CEILINGS = (MEASURABLE, 0.3, 0.5)
"""Edges of the strata by ceiling; fixed beforehand, since the ceiling itself is of the test section."""
LEVELS = ("lowest third", "middle third", "highest third")


def strata(genes: pd.DataFrame, mean_train: np.ndarray) -> list[dict]:
    """Mean Pearson, ceiling and share of the ceiling of the genes of each stratum.

    Parameters
    ----------
    genes
        ``per_gene.csv``: ``pearson`` and ``ceiling``, NaN where nothing is scored.
    mean_train : (G,)
        Mean expression of each gene on the training side, whose thirds are the strata by level.

    Returns
    -------
    list of dict
        ``by`` (``expression`` or ``ceiling``), ``stratum``, ``n_genes``, ``pearson``, ``ceiling``,
        ``share`` of the ceiling that is reached, with ``share_low`` and ``share_high``, 95 % over genes drawn anew;
        None where there is nothing. Genes with a ceiling below 0.1 have no share.
    """
    pearson, ceiling = (genes[key].to_numpy(dtype=np.float64) for key in ("pearson", "ceiling"))
    scored = ~np.isnan(pearson)
    level = np.searchsorted(np.quantile(mean_train, [1 / 3, 2 / 3]), mean_train, side="right")
    by_level = [_stratum("expression", name, scored & (level == n), pearson, ceiling) for n, name in enumerate(LEVELS)]
    names = [f"below {CEILINGS[0]}", *(f"{a} to {b}" for a, b in pairwise(CEILINGS))]
    band = np.searchsorted(CEILINGS, np.nan_to_num(ceiling), side="right")
    by_ceiling = [
        _stratum("ceiling", name, scored & (band == n), pearson, ceiling)
        for n, name in enumerate([*names, f"{CEILINGS[-1]} and above"])
    ]
    return by_level + by_ceiling


def _stratum(by: str, name: str, rows: np.ndarray, pearson: np.ndarray, ceiling: np.ndarray) -> dict:
    low, high = None, None
    measurable = rows & (ceiling >= MEASURABLE)
    own, best = pearson[measurable], ceiling[measurable]
    if len(own) > 1:
        drawn = np.random.default_rng(0).integers(len(own), size=(1000, len(own)))
        low, high = map(float, np.quantile(own[drawn].mean(axis=1) / best[drawn].mean(axis=1), [0.025, 0.975]))
    return {
        "by": by,
        "stratum": name,
        "n_genes": int(rows.sum()),
        "pearson": mean_or_none(pearson[rows]),
        "ceiling": mean_or_none(ceiling[rows]),
        "share": float(own.mean() / best.mean()) if len(own) else None,
        "share_low": low,
        "share_high": high,
    }
