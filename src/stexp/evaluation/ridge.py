"""Ridge regression in closed form, for floors and for the methods that are one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from stexp.data.rows import MappedRows, Rows, blocks, column_means


@dataclass
class Moments:
    """Sums over spots of all that a ridge regression needs: x'x (F, F), x'y (F, G) and the sum of y^2, y centred."""

    n: int
    xx: np.ndarray
    xy: np.ndarray
    yy: float

    def slope(self, penalty: float | None = None) -> np.ndarray:
        """See :func:`ridge_slope`."""
        eigenvalues, vectors = np.linalg.eigh(self.xx)
        keep = eigenvalues > 1e-10 * max(eigenvalues.max(), 1e-300)
        eigenvalues, vectors = eigenvalues[keep], vectors[:, keep]
        projected = vectors.T @ self.xy  # (kept, G); over the roots of the eigenvalues: U^T Y
        explained = (projected**2).sum(axis=1) / eigenvalues

        def gcv(penalty: float) -> float:
            shrink = eigenvalues / (eigenvalues + penalty)
            residual = self.yy - ((2 * shrink - shrink**2) * explained).sum()
            # 1: the intercept
            return residual / (self.n - 1 - shrink.sum()) ** 2 if shrink.sum() < self.n - 1 else np.inf

        if penalty is None:
            penalty = min(self.n * np.logspace(-6, 4, 41), key=gcv)
        return vectors @ (projected / (eigenvalues + penalty)[:, None])


def moments_of(designs: Sequence[Rows], expression: Rows, mean: np.ndarray) -> list[Moments]:
    """Moments of several designs (N, F), each with centred columns, and one expression (N, G), read block by block.

    Parameters
    ----------
    mean : (G,)
        Of the expression.
    """
    out = [Moments(len(x), np.zeros((n, n)), np.zeros((n, len(mean))), 0.0) for x in designs for n in (x.shape[1],)]
    for block in blocks(len(expression)):
        centred = expression[block] - mean
        squared = (centred**2).sum()
        for x, moments in zip(designs, out, strict=True):
            part = x[block]
            moments.xx += part.T @ part
            moments.xy += part.T @ centred
            moments.yy += squared
    return out


def ridge_slope(x: Rows, expression: Rows, penalty: float | None = None) -> np.ndarray:
    """Slope of a ridge regression with an intercept, which is the mean expression.

    Parameters
    ----------
    x : (N, F)
        Centred columns.
    expression : (N, G)
    penalty
        Times the squared slope, beside the sum of squared errors. None: the best of 41 by generalised
        cross-validation (Golub et al. 1979), one for all genes.

    Returns
    -------
    (F, G) float64
    """
    return moments_of([x], expression, column_means(expression))[0].slope(penalty)


@dataclass(frozen=True)
class Projection:
    """Features, standardised and projected on their principal components.

    Attributes
    ----------
    centre, scale : (F,)
    vectors : (k, F)
    """

    centre: np.ndarray
    scale: np.ndarray
    vectors: np.ndarray

    @classmethod
    def fit(cls, features: Rows, n_components: int = 256) -> Projection:
        """Mean, spread and at most `n_components` components of N rows, read block by block."""
        scaler, (n, width) = StandardScaler(), features.shape
        for block in blocks(n):
            scaler.partial_fit(np.asarray(features[block], dtype=np.float64))
        kept = min(n_components, n, width)
        if n < width:  # the covariance would be the larger matrix by far
            whole = PCA(kept, svd_solver="full").fit(scaler.transform(np.asarray(features[:], dtype=np.float64)))
            return cls(scaler.mean_, scaler.scale_, whole.components_)
        covariance = np.zeros((width, width))
        for block in blocks(n):
            z = scaler.transform(np.asarray(features[block], dtype=np.float64))
            covariance += z.T @ z
        return cls(scaler.mean_, scaler.scale_, np.linalg.eigh(covariance)[1][:, ::-1].T[:kept])

    def standardise(self, features: np.ndarray) -> np.ndarray:
        """(n, F) -> (n, F) float64."""
        return (np.asarray(features, dtype=np.float64) - self.centre) / self.scale

    def of(self, features: Rows, dtype: type = np.float64) -> MappedRows:
        """Components of features (M, F), made row by row: (M, k). NaN rows stay NaN; of what was fitted on, centred."""
        return MappedRows(features, lambda part: self.standardise(part) @ self.vectors.T, len(self.vectors), dtype)


@dataclass(frozen=True)
class RidgeProbe:
    """Expression as a linear map of features: standardised, reduced to principal components, regressed by a ridge.

    The probe of HEST-Benchmark (arXiv 2406.16192), its three steps multiplied to one.
    """

    centre: np.ndarray  # (F,)
    slope: np.ndarray  # (F, G)
    mean: np.ndarray  # (G,), the expression at the centre

    @classmethod
    def fit(
        cls,
        features: Rows,
        expression: Rows,
        n_components: int = 256,
        penalty: float | Literal["gcv", "hest"] = "gcv",
    ) -> RidgeProbe:
        """Fit on N spots.

        Parameters
        ----------
        features : (N, F)
        expression : (N, G)
        n_components
            Principal components kept; at most N and F are there.
        penalty
            ``gcv``: see :func:`ridge_slope`; ``hest``: 100 / (components x genes), as the benchmark has it;
            or a number.
        """
        projection = Projection.fit(features, n_components)
        n_kept, n_genes = len(projection.vectors), expression.shape[1]
        chosen = 100 / (n_kept * n_genes) if penalty == "hest" else penalty
        slope = ridge_slope(projection.of(features), expression, None if chosen == "gcv" else chosen)
        slope = projection.vectors.T @ slope / projection.scale[:, None]
        return cls(projection.centre, slope, column_means(expression))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(Q, F) -> (Q, G)."""
        return self.mean + (features - self.centre) @ self.slope
