"""How far apart spots lie."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree


def spacing(xy: np.ndarray) -> float:
    """Median distance of spots (N, 2) to their nearest neighbour; 100 for a single spot."""
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])) if len(xy) > 1 else 100.0


def shared_with_nearest(xy: np.ndarray, side: float) -> float:
    """Median share of a square around a spot that the square around its nearest neighbour covers; 0 of a single spot.

    Parameters
    ----------
    xy : (N, 2)
    side
        Of every square, in the unit of `xy`.
    """
    if len(xy) < 2:
        return 0.0
    nearest = cKDTree(xy).query(xy, k=2)[1][:, 1]
    covered = np.clip(1 - np.abs(xy[nearest] - xy) / side, 0, None)
    return float(np.median(covered.prod(axis=1)))
