"""What :class:`~stexp.models.consensus.Consensus` leaves open, chosen on spots that are left out in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls

from stexp.evaluation.metrics import mean_or_none, pearson_per_gene
from stexp.models.low_rank import Fitted, smooth
from stexp.models.table import Table

GENES = 2048  # on which smoothing is judged at once
NOTHING = 1e-10  # of the variance, below which what members add is rounding

Fit = Callable[[Table], Fitted]


@dataclass(frozen=True)
class Choice:
    """What is learned on spots that were left out; see :class:`~stexp.models.consensus.Consensus`."""

    weights: np.ndarray  # (M,)
    radius_um: float
    scale: float
    pearson: float


@dataclass(frozen=True)
class LeftOut:
    """A group of spots, as members see it that were fitted to the others."""

    rows: np.ndarray  # (n,) of the table
    mean: np.ndarray  # (G,)
    loadings: np.ndarray  # (R, G), tapered
    members: np.ndarray  # (M, n, R)
    scores: np.ndarray  # (n, R), as measured


def leave_out(table: Table, fit: Fit) -> Iterator[LeftOut]:
    """Each group of spots in turn."""
    for group in np.unique(table.group):
        rows = np.flatnonzero(table.group == group)
        fitted, own = fit(table.take(np.flatnonzero(table.group != group))), table.take(rows)
        seen = fitted.members(fitted.space(torch.from_numpy(own.read(own.features))))
        scores = fitted.expression(torch.from_numpy(own.read(own.expression)))
        yield LeftOut(rows, *(each.numpy() for each in (fitted.expression.centre, fitted.loadings, seen, scores)))


def choose(table: Table, fit: Fit, radii_um: Sequence[float], trust: float | None) -> Choice:
    """Weights, the one of some radii, ascending, and the scale."""
    parts = list(leave_out(table, fit))
    n = len(parts[0].members)
    weights = np.full(n, 1 / n) if trust is None else fit_weights(parts, trust)
    agreed = [np.tensordot(weights, part.members, 1) for part in parts]
    # a block is judged by itself: that it differs from the other blocks is no merit
    unit = np.char.add(np.char.add(table.section, " "), table.group)
    units = [unit == name for name in np.unique(unit)]
    expression = table.read(table.expression)
    n_genes = expression.shape[1]
    radii = radii_um if np.isfinite(table.xy_um).all() else [0.0]
    pearson, sums = np.empty((len(radii), len(units), n_genes)), np.zeros((len(radii), 3))
    for start in range(0, n_genes, GENES):
        genes = slice(start, start + GENES)
        observed = expression[:, genes]
        mean, added = np.empty_like(observed), np.empty_like(observed)
        for part, of_part in zip(parts, agreed, strict=True):
            mean[part.rows] = part.mean[genes]
            added[part.rows] = of_part @ part.loadings[:, genes]
        for i, radius in enumerate(radii):
            smoothed = _smooth_sections(table, added, radius)
            for j, own in enumerate(units):
                pearson[i, j, genes] = pearson_per_gene(observed[own], (mean + smoothed)[own])
            sums[i] += [
                np.sum(part, dtype=np.float64)
                for part in ((observed - mean) * smoothed, np.square(smoothed), np.square(observed - mean))
            ]
    means = [[mean_or_none(of_unit) for of_unit in of_radius] for of_radius in pearson]
    scores = [round(mean_or_none([m for m in each if m is not None]) or 0.0, 4) for each in means]
    best = int(np.argmax(scores))  # ties: the smaller radius
    product, square, spread = sums[best]
    least = max(NOTHING * spread, 1e-12)
    return Choice(weights, radii[best], max(float(product / square), 0.0) if square > least else 0.0, scores[best])


def fit_weights(parts: list[LeftOut], trust: float) -> np.ndarray:
    """Weights of the members (M,), at least 0 and 1 together.

    They are least squares of the scores of spots left out, with a penalty on the distance from equal weights that
    counts `trust` times as much as the members themselves do on average.
    """
    n = len(parts[0].members)
    gram, product = np.zeros((n, n)), np.zeros(n)
    for part in parts:
        members = part.members.reshape(n, -1).astype(np.float64)
        gram += members @ members.T
        product += members @ part.scores.ravel()
    equal = max(product.sum() / max(gram.sum(), 1e-12), 0.0)
    penalty = max(trust * np.trace(gram) / n, 1e-12)
    root = np.linalg.cholesky(gram + penalty * np.eye(n))
    weights, _ = nnls(root.T, np.linalg.solve(root, product + penalty * equal))
    return weights / weights.sum() if weights.sum() > 0 else np.full(n, 1 / n)


def _smooth_sections(table: Table, values: np.ndarray, radius: float) -> np.ndarray:
    out = np.empty_like(values)
    for name in np.unique(table.section):
        rows = table.section == name
        out[rows] = smooth(values[rows], table.xy_um[rows].astype(np.float64), radius)
    return out
