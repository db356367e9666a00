"""What a prediction scores when it is laid on the section elsewhere: skill that spatial order alone would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import false_discovery_control, norm

from stexp.data.slides.spacing import spacing
from stexp.evaluation.metrics import pearson_per_gene

N_DRAWS = 199
OVERLAP = 0.5
"""Share of the spots that must come to lie on a predicted spot."""
TRIES = 20
"""Draws of a motion for each that is kept, before a section counts as too ragged."""


@dataclass(frozen=True)
class Chance:
    """Correlations of G maps, means over sections, beside those of the same maps moved over the sections.

    Parameters
    ----------
    pearson : (G,)
        As they lie; NaN where nothing can be scored.
    mean, z : (G,)
        Mean of the moved maps, and how many of their standard deviations `pearson` is above it.
    p : (G,)
        Share of the moved maps, and itself, that correlate as well or better.
    q : (G,)
        False discovery rate over the maps (Benjamini and Hochberg 1995), from the normal tail of `z`: `p` cannot be
        lower than one over the number of draws, with which hardly a map would stand out among a thousand.
    """

    pearson: np.ndarray
    mean: np.ndarray
    z: np.ndarray
    p: np.ndarray
    q: np.ndarray


def beyond_chance(
    sections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], n_draws: int = N_DRAWS, seed: int = 0
) -> Chance | None:
    """Compare every map with itself after rigid motions of the section: turned, mirrored and shifted at random.

    A motion keeps how smooth a prediction is, which spots as independent units would not: two smooth maps correlate
    by chance far more often than their number of spots suggests. Each spot takes the prediction of the spot that comes
    to lie nearest to it; those with none within a spacing are left out of that draw, at most half of them.

    Parameters
    ----------
    sections
        Observed (Q, G), with NaN columns where nothing was measured, predicted (Q, G) and positions (Q, 2) of each.

    Returns
    -------
    Chance or None
        None where every section is so small or ragged that no motion leaves half of it on itself.
    """
    rng = np.random.default_rng(seed)
    own, drawn = [], []
    for observed, predicted, xy in sections:
        sources = _motions(np.asarray(xy, dtype=np.float64), n_draws, rng)
        pearson = pearson_per_gene(observed, predicted)
        scored = np.flatnonzero(~np.isnan(pearson))
        if sources is None or not len(scored):
            continue
        truth, guess = (np.asarray(values[:, scored], dtype=np.float64) for values in (observed, predicted))
        # what is constant but for rounding, see `pearson_per_gene`, varies less than this
        small = [(1e-6 * np.abs(values).max(axis=0)) ** 2 for values in (truth, guess)]
        moved = np.full((n_draws, len(pearson)), np.nan)
        for draw, source in enumerate(sources):
            on = source >= 0
            moved[draw, scored] = _correlations(truth[on], guess[source[on]], *small)
        own.append(pearson)
        drawn.append(moved)
    if not own:
        return None
    n_sections = (~np.isnan(own)).sum(axis=0)
    scored = np.flatnonzero(n_sections)
    pearson = np.nansum(own, axis=0)[scored] / n_sections[scored]
    moved = np.nansum(drawn, axis=0)[:, scored] / n_sections[scored]
    sd, mean = moved.std(axis=0), moved.mean(axis=0)
    p = (1 + (moved >= pearson - 1e-12).sum(axis=0)) / (1 + n_draws)
    z = np.divide(pearson - mean, sd, out=np.zeros_like(sd), where=sd > 1e-9)
    columns = {"pearson": pearson, "mean": mean, "z": z, "p": p, "q": false_discovery_control(norm.sf(z))}
    whole = {key: np.full(len(n_sections), np.nan) for key in columns}
    for key, values in columns.items():
        whole[key][scored] = values
    return Chance(**whole)


def _correlations(truth: np.ndarray, guess: np.ndarray, small_truth: np.ndarray, small_guess: np.ndarray) -> np.ndarray:
    """`pearson_per_gene` of maps (Q, G) in float64, none NaN, and 0 where either side is constant; in a third of its
    time, for only maps of a variance up to `small_truth` or `small_guess` are looked at by it."""
    a, b = truth - truth.mean(axis=0), guess - guess.mean(axis=0)
    ab, aa, bb = (np.einsum("ij,ij->j", *pair) for pair in ((a, b), (a, a), (b, b)))
    near = (aa <= len(a) * small_truth) | (bb <= len(b) * small_guess)
    out = np.divide(ab, np.sqrt(aa) * np.sqrt(bb), out=np.zeros_like(ab), where=~near).clip(-1, 1)
    if near.any():
        out[near] = np.nan_to_num(pearson_per_gene(truth[:, near], guess[:, near]))
    return out


def _motions(xy: np.ndarray, n_draws: int, rng: np.random.Generator) -> list[np.ndarray] | None:
    """For each draw, the spot whose prediction every spot takes, (Q,); -1 for none."""
    if len(xy) < 4:
        return None
    tree, reach = cKDTree(xy), spacing(xy)
    centre, extent = xy.mean(axis=0), np.ptp(xy, axis=0)
    sources: list[np.ndarray] = []
    for _ in range(TRIES * n_draws):
        angle, mirror = rng.uniform(0, 2 * np.pi), rng.choice([-1.0, 1.0])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        moved = (xy - centre) * [mirror, 1.0] @ turn.T + centre + rng.uniform(-0.5, 0.5, 2) * extent
        distance, source = tree.query(moved, distance_upper_bound=reach)
        source = np.where(np.isfinite(distance), source, -1)
        if (source >= 0).mean() >= OVERLAP:
            sources.append(source)
            if len(sources) == n_draws:
                return sources
    return None
