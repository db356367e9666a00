"""Parts of :class:`~stexp.models.consensus.Consensus`: principal components, ridges beside neighbours, smoothing.

What is fitted reads its rows in blocks, some at a time and several times over: memory does not grow with their number.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.linalg import eigh
from scipy.spatial import cKDTree

from stexp.models.retrieval import Neighbours, ReferenceIndex

CHUNK = 4096  # rows that are in float64, or searched, at once
EXACT = 4096  # rows or columns, of the fewer, up to which components are eigenvectors; then by subspace iteration
PASSES, SPARE = 30, 16  # at most, of the subspace iteration; and dimensions that it carries besides
REFERENCES = 1 << 16
"""Rows that are searched at most: every so many-th where there are more, so that a search is linear in the queries."""
CELLS = 4  # to a radius: points that lie denser are smoothed from the means of cells

Blocks = Callable[[], Iterable[np.ndarray]]
"""Rows (n, F) in blocks, from the first to the last, anew at every call."""


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
    def fit(cls, blocks: Blocks, n: int, *, standardise: bool = False) -> Components:
        """The first `n`, or as many as there are; of columns brought to one variance where they are standardised.

        Memory is that of a block, and of a square matrix with as many rows as there are rows or columns, whichever
        are fewer; where both are more than `EXACT`, of `n` + `SPARE` columns.
        """
        n_rows, centre, sd = _moments(blocks)
        scale = np.ones(len(centre))
        if standardise:
            scale = np.where(sd > 1e-6 * np.abs(centre).max(initial=1.0), 1 / np.maximum(sd, 1e-12), 0.0)
        n = min(n, n_rows - 1, len(centre))

        def scaled() -> Iterator[np.ndarray]:
            return ((block - centre) * scale for block in blocks())

        if min(n_rows, len(centre)) > EXACT:
            axes = _by_subspace(scaled, n, len(centre))
        elif n_rows <= len(centre):
            z = np.concatenate([block.astype(np.float32) for block in scaled()])
            value, vector = _largest(_sum_of_squares(_columns(z)), n)
            root = np.sqrt(np.maximum(value, 1e-12 * max(value[0], 1e-300)))
            axes = np.concatenate([part.T @ vector / root for part in _columns(z)])
        else:
            _, axes = _largest(_sum_of_squares(block.T for block in scaled()), n)
        return cls(torch.from_numpy(centre).float(), torch.from_numpy(axes * scale[:, None]).float())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(N, F) -> (N, D), in 32 bits under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() - self.centre) @ self.axes


def _moments(blocks: Blocks) -> tuple[int, np.ndarray, np.ndarray]:
    """How many rows, and mean and standard deviation of the columns, in float64."""
    n, shift = 0, np.zeros(0)
    total, squares = np.zeros(1), np.zeros(1)
    for block in blocks():
        shift = block.mean(axis=0, dtype=np.float64) if n == 0 else shift  # near the mean: squares keep their digits
        apart = block - shift
        n, total, squares = n + len(block), total + apart.sum(axis=0), squares + np.square(apart).sum(axis=0)
    mean = total / n
    return n, shift + mean, np.sqrt(np.maximum(squares / n - mean**2, 0.0))


def _columns(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[:, start : start + CHUNK].astype(np.float64) for start in range(0, x.shape[1], CHUNK))


def _sum_of_squares(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Of matrices (n, m), with m of their own: the sum of part @ part.T."""
    return functools.reduce(operator.iadd, (part @ part.T for part in parts))


def _largest(matrix: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n largest eigenvalues of a symmetric matrix, falling, and their vectors as columns."""
    value, vector = eigh(matrix, subset_by_index=[len(matrix) - n, len(matrix) - 1])
    return value[::-1], vector[:, ::-1]


def _by_subspace(blocks: Blocks, n: int, n_columns: int) -> np.ndarray:
    """The first `n` axes (F, n), until another pass over the rows adds less than 1e-5 to the variance they hold."""
    start = np.random.default_rng(0).normal(size=(n_columns, min(n + SPARE, n_columns)))
    axes, held = np.linalg.qr(start)[0], 0.0
    for _ in range(PASSES):
        image, gram = np.zeros_like(axes), np.zeros((axes.shape[1],) * 2)
        narrow = axes.astype(np.float32)
        for block in blocks():
            z = block.astype(np.float32)
            along = z @ narrow
            image += z.T @ along
            gram += along.T @ along
        value, vector = _largest(gram, n)
        if value.sum() <= (1 + 1e-5) * held:
            break
        best, held = axes @ vector, value.sum()
        axes = np.linalg.qr(image)[0]
    return best


class Moments:
    """Sums over rows of z (D numbers) and scores (R numbers), from which ridges follow."""

    def __init__(self, n_dims: int, n_scores: int) -> None:
        self.n = 0
        self.z, self.scores = (torch.zeros(n, dtype=torch.float64) for n in (n_dims, n_scores))
        self.gram = torch.zeros(n_dims, n_dims, dtype=torch.float64)
        self.product = torch.zeros(n_dims, n_scores, dtype=torch.float64)

    def add(self, z: torch.Tensor, scores: torch.Tensor) -> None:
        """Some more rows, (n, D) and (n, R)."""
        z, scores = z.double(), scores.double()
        self.n += len(z)
        self.z += z.sum(dim=0)
        self.scores += scores.sum(dim=0)
        self.gram += z.T @ z
        self.product += z.T @ scores

    def ridges(self, penalties: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ridges with an intercept of one penalty after the other.

        Parameters
        ----------
        penalties
            In mean eigenvalues of the covariance of z, times the number of rows.

        Returns
        -------
        slopes, intercepts : (P, D, R), (P, R) float32
        """
        mean, target = self.z / self.n, self.scores / self.n
        gram = self.gram - self.n * torch.outer(mean, mean)
        product = self.product - self.n * torch.outer(mean, target)
        unit = torch.eye(len(gram), dtype=torch.float64) * gram.trace() / len(gram)
        slopes = product.new_zeros(len(penalties), *product.shape)
        for slope, penalty in zip(slopes, penalties, strict=True):
            slope.copy_(torch.linalg.solve(gram + penalty * unit, product))
        return slopes.float(), (target - mean @ slopes).float()


def reference_rows(n: int) -> np.ndarray:
    """Which of n rows are searched: all, or `REFERENCES` of them, evenly spread."""
    return np.arange(n) if n <= REFERENCES else np.arange(REFERENCES) * n // REFERENCES


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
    def fit(
        cls, parts: Iterable[tuple[torch.Tensor, torch.Tensor]], n: int, penalties: Sequence[float], ks: Sequence[int]
    ) -> Members:
        """From the embeddings and scores of `n` rows, part by part; those of `reference_rows` are kept."""
        moments, kept, searched = None, [], torch.zeros(n, dtype=torch.bool)
        searched[reference_rows(n)] = True
        for z, scores in parts:
            moments = moments or Moments(z.shape[1], scores.shape[1])
            own = searched[moments.n : moments.n + len(z)]
            moments.add(z, scores)
            kept.append((z[own], scores[own]))
        assert moments is not None  # there are rows
        reference, scores = (torch.cat(each) for each in zip(*kept, strict=True))
        return cls(*moments.ridges(penalties), reference, scores, ks)

    @property
    def k(self) -> int:
        """Neighbours that are looked for."""
        return min(max(self.neighbours, default=1), len(self.reference))

    def blocks(self, z: torch.Tensor) -> Iterator[tuple[torch.Tensor, Neighbours]]:
        """Scores of each member (M, q, R), ridges first, and the references nearest to each query, block by block."""
        nothing = np.zeros(len(self.reference), dtype=np.int8)  # where they are from is not asked here
        index = ReferenceIndex(self.reference, nothing, nothing)
        for part in z.split(CHUNK):
            nearest = index.search(part, self.k, "cosine", "mean")
            scores = self.scores[nearest.index]
            means = [scores[None, :, :n].mean(dim=2) for n in self.neighbours]
            with torch.autocast(z.device.type, enabled=False):
                ridges = part @ self.slopes + self.intercepts[:, None]
            yield torch.cat([ridges, *means]), nearest

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Scores of each member, (M, Q, R), ridges first."""
        return torch.cat([scores for scores, _ in self.blocks(z)], dim=1)

    def share_of_neighbours(self, weights: torch.Tensor) -> torch.Tensor | None:
        """How much of the means over neighbours each of them makes, nearest first, (k,), with `weights` (M,).

        None where those means have no weight.
        """
        share = torch.zeros(self.k)
        for n, weight in zip(self.neighbours, weights[len(self.slopes) :].tolist(), strict=True):
            share[:n] += weight / min(n, self.k)
        return share / share.sum() if share.sum() > 0 else None


@dataclass(frozen=True)
class Fitted:
    """The embedding, the scores of expression with genes' loadings (R, G) on them, tapered, and the members."""

    space: Components
    expression: Components
    members: Members
    loadings: torch.Tensor


def project(scores: torch.Tensor, expression: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares of expression (N, G) on scores (N, R) with an intercept: that (G,), and the slopes (R, G).

    On all the scores that principal components have of the same rows, the slopes of their columns are the axes.
    """
    scores = scores.double()
    centre = scores.mean(dim=0)
    gram = torch.zeros(scores.shape[1], scores.shape[1], dtype=torch.float64)
    product = torch.zeros(scores.shape[1], expression.shape[1], dtype=torch.float64)
    total = torch.zeros(expression.shape[1], dtype=torch.float64)
    for part, of_part in zip(scores.split(CHUNK), expression.split(CHUNK), strict=True):
        centred = part - centre
        gram += centred.T @ centred
        product += centred.T @ of_part.double()
        total += of_part.double().sum(dim=0)
    slopes = torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ product
    return (total / len(scores) - centre @ slopes).float(), slopes.float()


def smooth(values: np.ndarray, xy: np.ndarray, radius: float) -> np.ndarray:
    """Mean over the neighbourhood of each point, weighted by a Gaussian of the distance: how dense points lie is equal.

    Parameters
    ----------
    values : (N, C)
    xy : (N, 2)
        In the unit of `radius`, which is the Gaussian's standard deviation; beyond three of them nothing counts.
    """
    return np.concatenate([part for _, part in smooth_blocks(values, xy, radius)])


def smooth_blocks(values: np.ndarray, xy: np.ndarray, radius: float) -> Iterator[tuple[slice, np.ndarray]]:
    """`smooth`, block by block.

    Where there are `CELLS` points or more to a square with `CELLS` of its sides to a radius, they count as one at their
    mean: a point has as many neighbours then, however dense they lie.
    """
    step = CHUNK // 4
    blocks = [slice(start, start + step) for start in range(0, len(xy), step)]
    if radius == 0:
        yield from ((rows, values[rows]) for rows in blocks)
        return
    count, sums, places = _cells(values, xy, radius / CELLS)
    tree = cKDTree(places)
    for rows in blocks:
        near = cKDTree(xy[rows]).sparse_distance_matrix(tree, 3 * radius, output_type="ndarray")
        weight = np.exp(-np.square(near["v"] / radius) / 2).astype(values.dtype)
        weights = sp.csr_matrix((weight, (near["i"], near["j"])), (len(xy[rows]), len(places)))
        yield rows, ((weights @ sums) / (weights @ count)[:, None]).astype(values.dtype)


def _cells(values: np.ndarray, xy: np.ndarray, side: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many points each square holds, the sum of their values and their mean place; each its own if they are few."""
    cell = np.floor((xy - xy.min(axis=0)) / side).astype(np.int64)
    _, of_point, count = np.unique(
        cell[:, 0] * (cell[:, 1].max() + 1) + cell[:, 1], return_inverse=True, return_counts=True
    )
    if len(xy) < CELLS * len(count):
        return np.ones(len(xy), values.dtype), values, xy
    gather = sp.csr_matrix((np.ones(len(xy), values.dtype), (of_point, np.arange(len(xy)))), (len(count), len(xy)))
    return count.astype(values.dtype), gather @ values, (gather.astype(np.float64) @ xy) / count[:, None]
