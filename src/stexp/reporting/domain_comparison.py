"""Ways to make domains side by side: how each agrees with labels, over seeds, and with domains of what was measured."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import combinations
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from stexp.reporting.domains import agreement, spatial_domains

WAYS = (("multimodal", "mixture"), ("joint", "kmeans"), ("joint", "leiden"))
SEEDS = range(3)


def compare_domains(
    adata: ad.AnnData, labels: pd.Series | None, ways: tuple[tuple[str, str], ...] = WAYS, **options: Any
) -> pd.DataFrame:
    """Scores of several ways to make domains, a row for each way and expression, section and labels or not.

    Leiden is left out where igraph is not installed.

    Parameters
    ----------
    ways
        Domains by what, and by which method.
    options
        ``n_domains``, ``resolution`` and ``smooth`` of :func:`~stexp.reporting.domains.spatial_domains`.

    Returns
    -------
    DataFrame
        ``domains``, ``method``, ``expression`` (predicted; observed where it is known), ``n_domains`` made,
        ``over_seeds``: mean adjusted Rand index of three seeds with each other, ``with_observed``: of the domains by
        predicted expression with those by observed; and, of sections with labels, ``section``, ``n_spots``, ``ari`` and
        ``nmi``, means of the seeds.
    """
    from sklearn.metrics import adjusted_rand_score  # scikit-learn takes a second to import

    section = adata.obs["section"].to_numpy(str)
    layers = [
        layer
        for layer in ("observed", "predicted")
        if layer in adata.layers and np.isfinite(adata.layers[layer]).all(axis=0).any()
    ]
    rows: list[dict[str, Any]] = []
    for by, method in ways:
        if method == "leiden" and find_spec("igraph") is None:
            continue
        observed: list[pd.Categorical] = []
        for layer in layers:
            made = [spatial_domains(adata, by, method=method, expression=layer, seed=each, **options) for each in SEEDS]
            beside = [adjusted_rand_score(*pair) for pair in zip(observed, made, strict=True)] if observed else [np.nan]
            row = {
                "domains": by,
                "method": method,
                "expression": layer,
                "n_domains": float(np.mean([len(each.categories) for each in made])),
                "over_seeds": float(np.mean([adjusted_rand_score(*pair) for pair in combinations(made, 2)])),
                "with_observed": float(np.mean(beside)),
            }
            observed = made
            if labels is None or not labels.notna().any():
                rows.append(row)
                continue
            scores = pd.concat([agreement(each, labels, section) for each in made])
            means = scores.groupby("section", sort=False)[["n_spots", "ari", "nmi"]].mean()
            rows += [{**row, "section": name, **values} for name, values in means.to_dict("index").items()]
    return pd.DataFrame(rows)
