"""The floor that averages the spots whose frozen features are most alike."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from sklearn.preprocessing import normalize

from stexp.data.rows import MappedRows, Rows, blocks
from stexp.evaluation.ridge import Projection


def knn(
    projection: Projection, features: Rows, tested: Rows, expression: Rows, k: int = 50, chunk: int = 1024
) -> np.ndarray:
    """Plain mean over the `k` training spots with the highest cosine of the standardised features."""
    k = min(k, len(features))
    queries = normalize(projection.standardise(tested[:]))
    nearest = _most_similar(queries, MappedRows(features, projection.standardise, features.shape[1]), k, chunk)
    out = np.empty((len(queries), expression.shape[1]))
    for part in blocks(len(queries), 256):
        used, place = np.unique(nearest[part], return_inverse=True)
        ends = np.arange(0, place.size + 1, k)
        weights = sp.csr_matrix((np.full(place.size, 1 / k), place.ravel(), ends), shape=(len(ends) - 1, len(used)))
        out[part] = weights @ expression[used]
    return out


def _most_similar(queries: np.ndarray, bank: Rows, k: int, chunk: int) -> np.ndarray:
    """Rows (Q, k) of a bank with the highest cosine to each of Q queries of length 1."""
    best = np.full((len(queries), k), -np.inf)
    nearest = np.zeros((len(queries), k), dtype=np.int64)
    for block in blocks(len(bank)):
        units = normalize(bank[block])
        for part in blocks(len(queries), chunk):
            similarity = queries[part] @ units.T
            if block.start:
                similarity = np.hstack([best[part], similarity])
            top = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
            best[part] = np.take_along_axis(similarity, top, axis=1)
            if block.start:
                before = np.take_along_axis(nearest[part], np.minimum(top, k - 1), axis=1)
                top = np.where(top < k, before, block.start + top - k)
            nearest[part] = top
    return nearest
