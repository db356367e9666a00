"""Which spots or genes of a section are shown; the others are asked for."""

from __future__ import annotations

from typing import Literal

import numpy as np

from stexp.errors import InputError

Known = Literal["spots", "genes"]
Pattern = Literal["random", "grid", "corner", "strip"]
SHARE = 0.1
"""Of spots or genes shown, where nobody says another."""
FEWEST_SHOWN, FEWEST_HIDDEN = 8, 3


def shown_spots(array_xy: np.ndarray, pattern: Pattern, share: float | None, seed: int) -> np.ndarray:
    """Spots that are shown, (N,) bool.

    Parameters
    ----------
    array_xy : (N, 2)
        Array coordinates.
    pattern
        ``random``: drawn; ``grid``: every second row and column of the array; ``corner``: all but the corner of the
        section that is farthest from what is shown, so that methods go on beyond the data; ``strip``: all but a strip
        through the middle, so that a gap is bridged. The seed draws spots, the offset of the grid, the corner, and the
        direction of the strip.
    share
        Of spots that are shown; None: `SHARE`. The grid has its own, about a quarter.

    Raises
    ------
    InputError
        A share beside ``grid``, or one that leaves nearly nothing shown or hidden.
    """
    rng, n = np.random.default_rng([seed, 11]), len(array_xy)
    if pattern == "grid":
        if share is not None:
            raise InputError(f"share={share:g}: pattern=grid shows every second row and column; leave share out")
        across, down = square_array(array_xy).T
        offset = rng.integers(0, 2, 2)
        shown = ((across + offset[0]) % 2 == 0) & ((down + offset[1]) % 2 == 0)
    else:
        n_shown = round((SHARE if share is None else share) * n)
        shown = np.zeros(n, dtype=bool)
        shown[_order(np.asarray(array_xy, dtype=np.float64), pattern, rng)[:n_shown]] = True
    return _enough(shown, "spots")


def _order(xy: np.ndarray, pattern: Pattern, rng: np.random.Generator) -> np.ndarray:
    """Spots, those first that are shown first."""
    if pattern == "random":
        return rng.permutation(len(xy))
    low, high = xy.min(axis=0), xy.max(axis=0)
    unit = (xy - low) / np.where(high > low, high - low, 1)
    if pattern == "corner":
        return np.argsort(-np.abs(unit - rng.integers(0, 2, 2)).max(axis=1), kind="stable")
    along = xy[:, rng.integers(0, 2)]
    return np.argsort(-np.abs(along - np.median(along)), kind="stable")


def square_array(array_xy: np.ndarray) -> np.ndarray:
    """Column and row of every spot, (N, 2); on a hexagonal array, which counts one of them in halves, whole ones.

    There column and row are both even or both odd; the one with the wider range is counted in halves, as Visium has it.
    """
    array_xy = np.array(array_xy, dtype=np.int64)
    parities = np.unique(array_xy % 2, axis=0)
    if len(parities) == 2 and len(np.unique(parities.sum(axis=1) % 2)) == 1:
        array_xy[:, np.ptp(array_xy, axis=0).argmax()] //= 2
    return array_xy


def shown_genes(n_genes: int, share: float | None, seed: int) -> np.ndarray:
    """Genes of a panel that are shown, (G,) bool, drawn by the seed; InputError where nearly none or all are."""
    rng = np.random.default_rng([seed, 12])
    shown = np.zeros(n_genes, dtype=bool)
    shown[rng.permutation(n_genes)[: round((SHARE if share is None else share) * n_genes)]] = True
    return _enough(shown, "genes")


def _enough(shown: np.ndarray, what: str) -> np.ndarray:
    n_shown, n_hidden = int(shown.sum()), int((~shown).sum())
    if n_shown < FEWEST_SHOWN or n_hidden < FEWEST_HIDDEN:
        raise InputError(
            f"share: of {len(shown)} {what}, {n_shown} would be shown and {n_hidden} asked for; "
            f"{FEWEST_SHOWN} and {FEWEST_HIDDEN} at least would fit"
        )
    return shown
