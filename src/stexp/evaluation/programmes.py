"""Scores of sets of genes: those of a file, or modules of genes that vary together on the training side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from stexp.data.rows import MappedRows, Rows, column_means

GENES_OF_A_MODULE = 40
"""About as many genes a module has on average."""
LARGEST_PANEL = 2000
"""Of more genes, only those with the highest mean are in modules: distances between all of them take memory."""


def co_expressed_modules(expression: Rows, section: np.ndarray) -> np.ndarray:
    """Modules of genes that rise and fall together over the spots of a section.

    Parameters
    ----------
    expression : (N, G)
        Of training spots; genes not measured in a section are NaN there, and count as constant.
    section : (N,)

    Returns
    -------
    (G,) int
        Module of each gene, from 1; 0 for genes that are constant in every section, or not among the 2000 highest.

    Notes
    -----
    Ward's clustering of standardised genes, each section rid of its means beforehand: differences between sections
    would else make modules of their own. As many modules as the panel has times 40 genes.
    """
    filled = MappedRows(expression, np.nan_to_num, expression.shape[1], np.float32)
    highest = np.sort(np.argsort(-column_means(filled), kind="stable")[:LARGEST_PANEL])
    products = np.zeros((len(highest), len(highest)))
    _, which, times = np.unique(section, return_inverse=True, return_counts=True)
    for rows in np.split(np.argsort(which, kind="stable"), np.cumsum(times)[:-1]):
        part = np.asarray(expression[rows], dtype=np.float64)[:, highest]
        centred = np.nan_to_num(part - part.mean(axis=0))
        products += centred.T @ centred
    length = np.sqrt(np.diag(products))
    moving = np.flatnonzero(length > 1e-6)
    varies = highest[moving]
    modules = np.zeros(expression.shape[1], dtype=np.int64)
    if len(varies) < 2:
        modules[varies] = 1
        return modules
    cosine = products[np.ix_(moving, moving)] / np.outer(length[moving], length[moving])
    distance = np.sqrt(np.clip(2 - 2 * cosine, 0, None))  # Euclidean, of columns of length 1
    np.fill_diagonal(distance, 0)
    n_modules = max(1, round(len(varies) / GENES_OF_A_MODULE))
    modules[varies] = fcluster(linkage(squareform(distance, checks=False), "ward"), n_modules, "maxclust")
    return modules


def module_sets(panel: Sequence[str], modules: np.ndarray) -> dict[str, list[str]]:
    """Modules as gene sets, the largest first: ``module 1`` -> genes."""
    numbers, sizes = np.unique(modules[modules > 0], return_counts=True)
    ordered = numbers[np.argsort(-sizes, kind="stable")]
    return {
        f"module {n}": [panel[int(i)] for i in np.flatnonzero(modules == m)] for n, m in enumerate(ordered, start=1)
    }


def scored_genes(observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Genes (G,) bool of one section that vary in the truth and are predicted: those that both sides of a set have."""
    return np.isfinite(predicted).all(axis=0) & (_spread(np.asarray(observed, dtype=np.float64)) > 0)


def set_scores(expression: np.ndarray, sets: Mapping[str, Sequence[int]], genes: np.ndarray) -> np.ndarray:
    """Score of every spot of one section for every set of genes.

    Parameters
    ----------
    expression : (Q, G)
    sets
        Name -> columns.
    genes : (G,) bool
        Those that count, see `scored_genes`; the same for everything that is compared.

    Returns
    -------
    (Q, S) float64
        Mean over the genes of a set that count, each rid of its mean and divided by its standard deviation over the
        spots; a constant gene adds nothing. NaN of a set none of whose genes count.
    """
    values = np.asarray(expression, dtype=np.float64)
    spread = _spread(values)
    centred = np.where(spread > 0, values - values.mean(axis=0), 0.0)
    scaled = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    kept = [[column for column in columns if genes[column]] for columns in sets.values()]
    nothing = np.full(len(values), np.nan)
    return np.stack([scaled[:, columns].mean(axis=1) if columns else nothing for columns in kept], axis=1)


def _spread(values: np.ndarray) -> np.ndarray:
    """Standard deviation over spots (G,); 0 of genes that are constant but for rounding, or hold NaN."""
    spread = values.std(axis=0)
    return np.where(spread > 1e-6 * np.abs(values).max(axis=0), spread, 0.0)
