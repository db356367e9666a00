"""How far apart spots lie."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree


def spacing(xy: np.ndarray) -> float:
    """Median distance of spots (N, 2) to their nearest neighbour; 100 for a single spot."""
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])) if len(xy) > 1 else 100.0
