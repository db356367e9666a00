"""Scores by how high a gene is, and by how well it could be predicted at all."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pandas as pd

from stexp.evaluation.intervals import over_sections
from stexp.evaluation.metrics import mean_or_none

MEASURABLE = 0.1
"""Ceiling below which a gene is noise in a section: whatever predicts it, its score says nothing."""
CEILINGS = (MEASURABLE, 0.3, 0.5)
"""Edges of the strata by ceiling; fixed beforehand, since the ceiling itself is of the test section."""
LEVELS = ("lowest third", "middle third", "highest third")


def strata(
    genes: pd.DataFrame,
    mean_train: np.ndarray,
    of_sections: Mapping[str, np.ndarray],
    patients: Mapping[str, str | None],
) -> list[dict]:
    """Mean Pearson, ceiling and share of the ceiling of the genes of each stratum.

    Parameters
    ----------
    genes
        ``per_gene.csv``: ``pearson`` and ``ceiling``, NaN where nothing is scored.
    mean_train : (G,)
        Mean expression of each gene on the training side, whose thirds are the strata by level.
    of_sections
        Section -> Pearson of every gene in it, (G,), NaN where nothing is scored.
    patients
        Of each section.

    Returns
    -------
    list of dict
        ``by`` (``expression`` or ``ceiling``), ``stratum``, ``n_genes``, ``pearson``, ``ceiling``,
        ``share`` of the ceiling that is reached; None where there is nothing. Genes with a ceiling below 0.1 have no
        share. ``share_low`` and ``share_high``, 95 %, with sections or patients drawn anew (``share_over``) and the
        ceiling as it is; ``share_covers``, how often they hold the truth; None of fewer than three sections. Genes are
        never drawn: those of a section share its spots.
    """
    pearson, ceiling = (genes[key].to_numpy(dtype=np.float64) for key in ("pearson", "ceiling"))
    scored = ~np.isnan(pearson)
    level = np.searchsorted(np.quantile(mean_train, [1 / 3, 2 / 3]), mean_train, side="right")
    band = np.searchsorted(CEILINGS, np.nan_to_num(ceiling), side="right")
    bands = [f"below {CEILINGS[0]}", *(f"{a} to {b}" for a, b in pairwise(CEILINGS)), f"{CEILINGS[-1]} and above"]
    rows = []
    for by, names, stratum in (("expression", LEVELS, level), ("ceiling", bands, band)):
        for n, name in enumerate(names):
            of_stratum = scored & (stratum == n)
            facts = {"by": by, "stratum": name, "n_genes": int(of_stratum.sum())}
            facts |= {"pearson": mean_or_none(pearson[of_stratum]), "ceiling": mean_or_none(ceiling[of_stratum])}
            measurable = of_stratum & (ceiling >= MEASURABLE)
            rows.append(facts | _share(measurable, pearson, ceiling, of_sections, patients))
    return rows


def _share(
    rows: np.ndarray,
    pearson: np.ndarray,
    ceiling: np.ndarray,
    of_sections: Mapping[str, np.ndarray],
    patients: Mapping[str, str | None],
) -> dict:
    """Share of the ceiling that some genes reach, and its interval."""
    keys = ("share", "share_low", "share_high", "share_over", "share_covers")
    if not rows.any():
        return dict.fromkeys(keys)
    best = ceiling[rows].mean()
    means = {name: mean_or_none(values[rows]) for name, values in of_sections.items()}
    shares = {name: None if mean is None else mean / best for name, mean in means.items()}
    interval = over_sections(shares, patients) or {}
    bounds = (interval.get(key) for key in ("low", "high", "over", "covers"))
    return dict(zip(keys, (float(pearson[rows].mean() / best), *bounds), strict=True))
