"""Ordinary kriging: the best linear unbiased interpolation of a field whose variogram is given (Matheron 1963)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.linalg import lu_factor, lu_solve
from scipy.spatial.distance import cdist


@dataclass(frozen=True)
class Variogram:
    """Exponential variogram of sill 1.

    Parameters
    ----------
    nugget
        Share of the variance that neighbours do not have in common, as counting noise.
    reach
        Distance, in pitches, over which what they have in common falls to 1 / e.
    """

    nugget: float
    reach: float

    def __call__(self, distance: np.ndarray) -> np.ndarray:
        """Half the mean squared difference at a distance; 0 at 0, where a spot meets itself."""
        rising = self.nugget + (1 - self.nugget) * -np.expm1(-distance / self.reach)
        return np.where(distance > 0, rising, 0.0)


CANDIDATES = tuple(Variogram(*pair) for pair in product((0.0, 0.3, 0.6, 0.8, 0.9, 0.95), (1.5, 3.0, 6.0, 12.0)))


def kriging_weights(xy: np.ndarray, queries: np.ndarray, variogram: Variogram) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the data in every estimate, and the kriging variance.

    Parameters
    ----------
    xy : (S, 2)
        Places of the data, all different.
    queries : (Q, 2)

    Returns
    -------
    weights : (Q, S)
        Rows sum to 1. At a place of the data they are 1 for it and 0 for the others: kriging is exact there.
    variance : (Q,)
        Of the error, for a field of sill 1.

    Notes
    -----
    With Lagrange's multiplier m: sum_j w_j g(x_i, x_j) + m = g(x_i, x), sum_j w_j = 1, and the variance is
    sum_i w_i g(x_i, x) + m.
    """
    n = len(xy)
    system = np.ones((n + 1, n + 1))
    system[:n, :n] = variogram(cdist(xy, xy))
    system[n, n] = 0
    right = np.ones((n + 1, len(queries)))
    right[:n] = variogram(cdist(xy, queries))
    solution = lu_solve(lu_factor(system), right)
    return solution[:n].T, np.maximum((solution * right).sum(axis=0), 0)


def in_folds(
    xy: np.ndarray, values: np.ndarray, folds: Sequence[np.ndarray], variogram: Variogram
) -> tuple[np.ndarray, np.ndarray]:
    """Every value estimated from those of the other folds.

    Parameters
    ----------
    values : (S, G)
    folds
        Masks (S,), each spot in one.

    Returns
    -------
    estimate : (S, G)
    variance : (S,)
    """
    estimate, variance = np.empty_like(values, dtype=np.float64), np.empty(len(values))
    for fold in folds:
        weights, variance[fold] = kriging_weights(xy[~fold], xy[fold], variogram)
        estimate[fold] = weights @ values[~fold]
    return estimate, variance


@dataclass(frozen=True)
class Kriging:
    """A variogram for every gene, chosen on the data alone.

    Parameters
    ----------
    chosen : (G,) int
        Of `CANDIDATES`.
    sill : (G,)
        That makes squared errors of held-out data as large, on average, as the kriging variance says.
    held_out : (S, G)
        Data estimated from the other folds, by variograms chosen on these.
    """

    chosen: np.ndarray
    sill: np.ndarray
    held_out: np.ndarray

    @classmethod
    def fit(cls, xy: np.ndarray, values: np.ndarray, folds: Sequence[np.ndarray], per_gene: bool = False) -> Kriging:
        """Choose the variogram whose estimates of held-out data have the least squared error.

        Parameters
        ----------
        per_gene
            A variogram for each gene; else one for all, by errors relative to each gene's variance.
        """
        values = np.asarray(values, dtype=np.float64)
        errors = np.empty((len(CANDIDATES), len(folds), values.shape[1]))
        for i, variogram in enumerate(CANDIDATES):
            squares = np.square(in_folds(xy, values, folds, variogram)[0] - values)
            errors[i] = [squares[fold].sum(axis=0) for fold in folds]
        spread = values.var(axis=0)

        def best(errors: np.ndarray) -> np.ndarray:
            """Of errors (candidates, G) the least of every gene, or of all together, (G,)."""
            shared = (errors / np.where(spread > 0, spread, 1)).mean(axis=1).argmin()
            return errors.argmin(axis=0) if per_gene else np.full(values.shape[1], shared)

        held_out, relative = np.empty_like(values), np.empty_like(values)
        for number, fold in enumerate(folds):
            # chosen without the fold, since errors by which a variogram was chosen are too small
            for i, genes in _groups(best(np.delete(errors, number, axis=1).sum(axis=1))):
                weights, variance = kriging_weights(xy[~fold], xy[fold], CANDIDATES[i])
                at = np.ix_(fold, genes)
                held_out[at] = weights @ values[np.ix_(~fold, genes)]
                relative[at] = np.square(held_out[at] - values[at]) / np.maximum(variance, 1e-12)[:, None]
        return cls(best(errors.sum(axis=1)), relative.mean(axis=0), held_out)

    def predict(self, xy: np.ndarray, values: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Estimate and its standard deviation, (Q, G) each, from data (S, G) at `xy`."""
        mean = np.empty((len(queries), values.shape[1]))
        sd = np.empty_like(mean)
        for i, genes in _groups(self.chosen):
            weights, variance = kriging_weights(xy, queries, CANDIDATES[i])
            mean[:, genes] = weights @ values[:, genes]
            sd[:, genes] = np.sqrt(variance[:, None] * self.sill[genes])
        return mean, sd

    @property
    def settings(self) -> dict[str, float]:
        """Nugget and reach: those of all genes, or their medians."""
        used = [CANDIDATES[i] for i in self.chosen]
        return {
            "nugget": float(np.median([each.nugget for each in used])),
            "reach": float(np.median([each.reach for each in used])),
        }


def _groups(chosen: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Candidates that are chosen (G,), and a mask of the genes of each."""
    for i in np.unique(chosen):
        yield int(i), chosen == i
