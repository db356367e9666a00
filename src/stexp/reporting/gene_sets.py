"""Scores of gene sets on predicted expression."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

from stexp.errors import InputError
from stexp.evaluation.metrics import mean_or_none, pearson_per_gene

CONTROLS = 50  # genes per gene of a set, as scanpy's default; and at least so many genes in a bin of expression
BINS = (2, 25)  # fewest that scanpy takes, and its default


def gene_set_scores(adata: ad.AnnData, sets: dict[str, list[str]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score of every spot for every gene set, by scanpy's score_genes on the prediction.

    Parameters
    ----------
    sets
        Name -> genes; those that are not predicted are left out, and so are the scores of sets without any.

    Returns
    -------
    scores : DataFrame, N spots
        A column a set: mean of its genes less the mean of genes that are expressed alike, drawn at random.
    sets : DataFrame
        set, ``n_genes``, ``n_predicted``, ``missing``, and with a truth ``pearson`` of the score with the same score
        of the observed expression, mean over sections.

    Raises
    ------
    InputError
        No set has a predicted gene, or none is left to compare one with.
    """
    measured = np.ones(adata.n_vars, dtype=bool)
    if "observed" in adata.layers:
        measured = ~np.isnan(np.asarray(adata.layers["observed"])).any(axis=0)
    section, scores, rows = adata.obs["section"].to_numpy(str), {}, []
    for name, genes in sets.items():
        predicted = [gene for gene in genes if gene in adata.var_names]
        row = {"set": name, "n_genes": len(genes), "n_predicted": len(predicted)}
        row["missing"] = " ".join(gene for gene in genes if gene not in adata.var_names)
        if predicted:
            scores[name] = _score(adata, "predicted", name, predicted, np.ones(adata.n_vars, dtype=bool))
        if predicted and "observed" in adata.layers:
            observed, pearson = [gene for gene in predicted if measured[adata.var_names.get_loc(gene)]], []
            if observed:
                truth = _score(adata, "observed", name, observed, measured)
                for each in pd.unique(section):
                    spots = section == each
                    pearson.append(pearson_per_gene(truth[spots, None], scores[name][spots, None])[0])
            row["pearson"] = mean_or_none(pearson)
        rows.append(row)
    if not scores:
        raise InputError(f"none of the genes of {len(sets)} gene set(s) is predicted here; predict with genes=all")
    return pd.DataFrame(scores, index=adata.obs_names), pd.DataFrame(rows)


def _score(adata: ad.AnnData, layer: str, name: str, genes: list[str], measured: np.ndarray) -> np.ndarray:
    """Score of a gene set in every spot, among the measured genes of a layer, (N,)."""
    import scanpy as sc  # takes seconds to import

    table = ad.AnnData(np.asarray(adata.layers[layer])[:, measured])
    table.var_names = adata.var_names[measured]
    # a panel has few genes: bins of expression that hold enough to compare with
    bins = int(np.clip(table.n_vars // CONTROLS, *BINS))
    try:
        sc.tl.score_genes(table, genes, ctrl_size=CONTROLS, n_bins=bins, score_name="score", random_state=0)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"gene set {name} cannot be scored among {table.n_vars} genes ({reason})") from error
    return table.obs["score"].to_numpy(np.float64)
