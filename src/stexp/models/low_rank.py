"""Parts of :class:`~stexp.models.consensus.Consensus`: principal components, ridges beside neighbours, smoothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.linalg import eigh
from scipy.spatial import cKDTree

from stexp.models.retrieval import Neighbours, ReferenceIndex

CHUNK = 4096  # rows that are in float64, or searched, at once


@dataclass(frozen=True)
class Components:
    """Principal components of rows (N, F), as one affine map.

    Parameters
    ----------
    centre : (F,)
    axes : (F, D)
        Of orthogonal columns where nothing is standardised.
    """

    centre: torch.Tensor
    axes: torch.Tensor

    @classmethod
    def fit(cls, x: np.ndarray, n: int, *, standardise: bool = False) -> Components:
        """The first `n`, or as many as there are; of columns brought to one variance where they are standardised.

        Memory beside `x` is that of the smaller of an N x N and an F x F matrix.
        """
        n_rows, n_columns = x.shape
        centre = x.mean(axis=0, dtype=np.float64)
        scale = np.ones(n_columns)
        if standardise:
            sd = np.sqrt(sum(((part - centre) ** 2).sum(axis=0) for part in _parts(x)) / n_rows)
            scale = np.where(sd > 1e-6 * np.abs(centre).max(initial=1.0), 1 / np.maximum(sd, 1e-12), 0.0)
        n = min(n, n_rows - 1, n_columns)
        if n_rows <= n_columns:
            z = (x - centre) * scale
            value, vector = _largest(z @ z.T, n)
            axes = z.T @ vector / np.sqrt(np.maximum(value, 1e-12 * max(value[0], 1e-300)))
        else:
            covariance = np.zeros((n_columns, n_columns))
            for part in _parts(x):
                z = (part - centre) * scale
                covariance += z.T @ z
            _, axes = _largest(covariance, n)
        return cls(torch.from_numpy(centre).float(), torch.from_numpy(axes * scale[:, None]).float())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(N, F) -> (N, D), in 32 bits under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() - self.centre) @ self.axes


def _parts(x: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(x), CHUNK):
        yield x[start : start + CHUNK].astype(np.float64)


def _largest(matrix: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n largest eigenvalues of a symmetric matrix, falling, and their vectors as columns."""
    value, vector = eigh(matrix, subset_by_index=[len(matrix) - n, len(matrix) - 1])
    return value[::-1], vector[:, ::-1]


def ridge_slopes(
    z: torch.Tensor, scores: torch.Tensor, penalties: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridges with an intercept of one penalty after the other, from sums over rows: memory does not grow with N.

    Parameters
    ----------
    z : (N, D)
    scores : (N, R)
    penalties
        In mean eigenvalues of the covariance of `z`, times N.

    Returns
    -------
    slopes, intercepts : (P, D, R), (P, R) float32
    """
    mean, target = z.double().mean(dim=0), scores.double().mean(dim=0)
    gram = torch.zeros(z.shape[1], z.shape[1], dtype=torch.float64)
    product = torch.zeros(z.shape[1], scores.shape[1], dtype=torch.float64)
    for part, of_part in zip(z.split(CHUNK), scores.split(CHUNK), strict=True):
        centred = part.double() - mean
        gram += centred.T @ centred
        product += centred.T @ (of_part.double() - target)
    unit = torch.eye(len(gram), dtype=torch.float64) * gram.trace() / len(gram)
    slopes = product.new_zeros(len(penalties), *product.shape)
    for slope, penalty in zip(slopes, penalties, strict=True):
        slope.copy_(torch.linalg.solve(gram + penalty * unit, product))
    return slopes.float(), (target - mean @ slopes).float()


@dataclass(frozen=True)
class Members:
    """Ridges and means over neighbours, which predict scores (R numbers a spot) from embeddings.

    Parameters
    ----------
    slopes, intercepts : (P, D, R), (P, R)
        Of the ridges.
    reference, scores : (N, D), (N, R)
        What is searched by cosine, and averaged.
    neighbours
        Over how many, one mean each; over all where there are fewer.
    """

    slopes: torch.Tensor
    intercepts: torch.Tensor
    reference: torch.Tensor
    scores: torch.Tensor
    neighbours: Sequence[int]

    @classmethod
    def fit(cls, z: torch.Tensor, scores: torch.Tensor, penalties: Sequence[float], ks: Sequence[int]) -> Members:
        return cls(*ridge_slopes(z, scores, penalties), z, scores, ks)

    def __call__(self, z: torch.Tensor) -> tuple[torch.Tensor, Neighbours]:
        """Scores of each member (M, Q, R), ridges first, and the references nearest to each query."""
        nothing = np.zeros(len(self.reference), dtype=np.int8)  # where they are from is not asked here
        index = ReferenceIndex(self.reference, nothing, nothing)
        k, members, nearest = min(max(self.neighbours, default=1), len(index)), [], []
        for part in z.split(CHUNK):
            nearest.append(index.search(part, k, "cosine", "mean"))
            scores = self.scores[nearest[-1].index]
            means = [scores[None, :, :n].mean(dim=2) for n in self.neighbours]
            with torch.autocast(z.device.type, enabled=False):
                ridges = part @ self.slopes + self.intercepts[:, None]
            members.append(torch.cat([ridges, *means]))
        joined = (torch.cat([getattr(each, name) for each in nearest]) for name in ("index", "distance", "weight"))
        return torch.cat(members, dim=1), Neighbours(*joined)

    def share_of_neighbours(self, weights: torch.Tensor) -> torch.Tensor | None:
        """How much of the means over neighbours each of them makes, nearest first, (k,), with `weights` (M,).

        None where those means have no weight.
        """
        k = min(max(self.neighbours, default=1), len(self.reference))
        share = torch.zeros(k)
        for n, weight in zip(self.neighbours, weights[len(self.slopes) :].tolist(), strict=True):
            share[:n] += weight / min(n, k)
        return share / share.sum() if share.sum() > 0 else None


def smooth(values: np.ndarray, xy: np.ndarray, radius: float) -> np.ndarray:
    """Mean over the neighbourhood of each point, weighted by a Gaussian of the distance: how dense points lie is equal.

    Parameters
    ----------
    values : (N, C)
    xy : (N, 2)
        In the unit of `radius`, which is the Gaussian's standard deviation; beyond three of them nothing counts.
    """
    if radius == 0:
        return values
    tree, out = cKDTree(xy), np.empty_like(values)
    for start in range(0, len(xy), CHUNK // 4):
        rows = slice(start, start + CHUNK // 4)
        near = cKDTree(xy[rows]).sparse_distance_matrix(tree, 3 * radius, output_type="ndarray")
        weight = np.exp(-np.square(near["v"] / radius) / 2).astype(values.dtype)
        weights = sp.csr_matrix((weight, (near["i"], near["j"])), (len(xy[rows]), len(xy)))
        out[rows] = (weights @ values) / np.asarray(weights.sum(axis=1))
    return out
