"""Completion of genes by what a reference measures of both: single cells, or other sections."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from stexp.completion.tasks import Completed, GeneTask, choose, out_of_fold
from stexp.evaluation.ridge import ridge_slope

COMPONENTS = 50
NEIGHBOURS = (10, 30, 100, 300)
AROUND = 6


def within_section(values: np.ndarray, section: np.ndarray) -> np.ndarray:
    """Values (R, G) less the gene means of their section: sections differ in level for reasons of their own."""
    values = np.array(values, dtype=np.float64)
    for name in np.unique(section):
        rows = section == name
        values[rows] -= values[rows].mean(axis=0)
    return values


def _sides(task: GeneTask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shown genes here and in the reference on one scale, and the hidden genes of the reference, within sections."""
    reference = within_section(task.reference_shown, task.reference_section)
    scale = reference.std(axis=0)
    scale[scale == 0] = 1
    own = within_section(task.expression, np.zeros(len(task.expression)))
    return own / scale, reference / scale, within_section(task.reference_hidden, task.reference_section)


def reference_mean(task: GeneTask) -> Completed:
    """Mean of every hidden gene over the reference, the same at every spot."""
    mean, sd = task.reference_hidden.mean(axis=0), task.reference_hidden.std(axis=0)
    shape = (len(task.expression), 1)
    return Completed(np.tile(mean, shape), np.tile(sd, shape), np.full(task.expression.shape, np.nan))


def _nearest(task: GeneTask, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread over the k reference spots or cells that are most alike in the shown genes, (N, H) each."""
    own, reference, hidden = _sides(task)
    _, _, axes = np.linalg.svd(_some(reference), full_matrices=False)
    axes = axes[:COMPONENTS].T
    index = nearest_rows(own @ axes, reference @ axes, min(k, len(reference)))
    mean, square = np.zeros((len(own), hidden.shape[1])), np.zeros((len(own), hidden.shape[1]))
    for column in index.T:
        mean += hidden[column]
        square += np.square(hidden[column])
    mean, square = mean / index.shape[1], square / index.shape[1]
    return task.reference_hidden.mean(axis=0) + mean, np.sqrt(np.maximum(square - mean**2, 0))


def nearest_rows(queries: np.ndarray, values: np.ndarray, k: int, chunk: int = 512) -> np.ndarray:
    """Rows of the k `values` (R, D) nearest to each of `queries` (Q, D), in no order, (Q, k).

    By products of matrices, since trees help little in fifty dimensions.
    """
    squares, out = np.square(values).sum(axis=1), []
    for start in range(0, len(queries), chunk):
        distance = squares - 2 * queries[start : start + chunk] @ values.T
        out.append(np.argpartition(distance, k - 1, axis=1)[:, :k])
    return np.concatenate(out)


def _some(values: np.ndarray, most: int = 4000) -> np.ndarray:
    """Rows enough for principal axes, spread evenly."""
    return values[np.linspace(0, len(values) - 1, min(len(values), most)).astype(int)]


def knn_reference(task: GeneTask) -> Completed:
    """Mean over the nearest of the reference in 50 components of the shown genes; how many, held-out genes choose."""
    n = len(task.reference_shown)
    best = choose(task, [k for k in NEIGHBOURS if k <= n] or [n], lambda own, k: _nearest(own, k)[0])
    return Completed(*_nearest(task, best.setting), best.held_out, {"k": best.setting})


def ridge_genes(task: GeneTask) -> Completed:
    """Ridge from the shown to the hidden genes, fitted on the reference within its sections."""
    return _ridge_of(task, around=False)


def ridge_neighbours(task: GeneTask) -> Completed:
    """Ridge from the shown genes of a spot and of the six around it, fitted on a reference that has places."""
    return _ridge_of(task, around=True)


def _ridge_of(task: GeneTask, around: bool) -> Completed:
    mean, error = _ridge(task, around)
    held_out = out_of_fold(task, lambda own: _ridge(own, around)[0])
    return Completed(mean, np.tile(error, (len(mean), 1)), held_out)


def _ridge(task: GeneTask, around: bool) -> tuple[np.ndarray, np.ndarray]:
    """Hidden genes (N, H), and the root mean square of the errors of each in sections of the reference left out."""
    own, reference, hidden = _sides(task)
    if around:
        assert task.reference_xy is not None
        beside = np.zeros_like(reference)
        for name in np.unique(task.reference_section):
            rows = np.flatnonzero(task.reference_section == name)
            beside[rows] = _around(task.reference_xy[rows], reference[rows])
        own, reference = np.hstack([own, _around(task.xy, own)]), np.hstack([reference, beside])
    left_out = a_fifth(task)
    rest = reference[left_out] @ ridge_slope(reference[~left_out], hidden[~left_out]) - hidden[left_out]
    mean = task.reference_hidden.mean(axis=0) + own @ ridge_slope(reference, hidden)
    return mean, np.sqrt(np.square(rest).mean(axis=0))


def a_fifth(task: GeneTask) -> np.ndarray:
    """Spots of a fifth of the sections of the reference, one at least; of one section, a fifth of its spots, (R,)."""
    names = np.unique(task.reference_section)
    rng = np.random.default_rng([task.seed, 23])
    if len(names) == 1:
        return rng.permutation(np.arange(len(task.reference_section)) % 5) == 0
    return np.isin(task.reference_section, rng.choice(names, -(-len(names) // 5), replace=False))


def _around(xy: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean over the spots nearest to each, itself not among them; zero of a single spot."""
    k = min(AROUND, len(xy) - 1)
    return values[cKDTree(xy).query(xy, k=k + 1)[1][:, 1:]].mean(axis=1) if k else np.zeros_like(values)
