"""Ridge regression in closed form, for floors and for the methods that are one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler


def ridge_slope(x: np.ndarray, expression: np.ndarray, penalty: float | None = None) -> np.ndarray:
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
    n, centred = len(x), expression - expression.mean(axis=0)
    eigenvalues, vectors = np.linalg.eigh(x.T @ x)
    keep = eigenvalues > 1e-10 * max(eigenvalues.max(), 1e-300)
    eigenvalues, vectors = eigenvalues[keep], vectors[:, keep]
    projected = vectors.T @ (x.T @ centred)  # (kept, G); over the roots of the eigenvalues: U^T Y
    explained = (projected**2).sum(axis=1) / eigenvalues
    total = (centred**2).sum()

    def gcv(penalty: float) -> float:
        shrink = eigenvalues / (eigenvalues + penalty)
        residual = total - ((2 * shrink - shrink**2) * explained).sum()
        return residual / (n - 1 - shrink.sum()) ** 2 if shrink.sum() < n - 1 else np.inf  # 1: the intercept

    if penalty is None:
        penalty = min(n * np.logspace(-6, 4, 41), key=gcv)
    return vectors @ (projected / (eigenvalues + penalty)[:, None])


def _components(x: np.ndarray, n: int) -> tuple[StandardScaler, PCA]:
    scaler = StandardScaler().fit(x)
    # of fewer spots than features, whose covariance would be the larger matrix by far
    solver = "covariance_eigh" if len(x) >= x.shape[1] else "full"
    return scaler, PCA(min(n, *x.shape), svd_solver=solver).fit(scaler.transform(x))


def probe_components(training: np.ndarray, features: np.ndarray, n_components: int = 256) -> np.ndarray:
    """What the ridge of :class:`RidgeProbe` regresses on: principal components of the standardised features.

    Parameters
    ----------
    training : (N, F)
        Features that mean, spread and components are of.
    features : (M, F)
        Features to project; NaN rows stay NaN.

    Returns
    -------
    (M, at most `n_components`) float32
        Those of `training` are centred.
    """
    scaler, pca = _components(np.asarray(training, dtype=np.float64), n_components)
    return ((features - scaler.mean_) @ (pca.components_ / scaler.scale_).T).astype(np.float32)


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
        features: np.ndarray,
        expression: np.ndarray,
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
        x = np.asarray(features, dtype=np.float64)
        scaler, pca = _components(x, n_components)
        x = scaler.transform(x)
        chosen = 100 / (pca.n_components_ * expression.shape[1]) if penalty == "hest" else penalty
        slope = ridge_slope(pca.transform(x), expression, None if chosen == "gcv" else chosen)
        return cls(scaler.mean_, pca.components_.T @ slope / scaler.scale_[:, None], expression.mean(axis=0))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(Q, F) -> (Q, G)."""
        return self.mean + (features - self.centre) @ self.slope
