"""Interpolation between the shown spots by position alone."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.interpolate import CloughTocher2DInterpolator, LinearNDInterpolator
from scipy.spatial import QhullError, cKDTree

Kind = Literal["nearest", "linear", "cubic"]


def interpolate(xy: np.ndarray, values: np.ndarray, queries: np.ndarray, kind: Kind) -> np.ndarray:
    """Values (S, G) at places (S, 2) interpolated to (Q, 2), (Q, G) float64.

    Parameters
    ----------
    kind
        ``nearest``, the first of equally near ones; ``linear`` on the triangles of Delaunay; ``cubic``, which is
        Clough and Tocher's. Outside the hull of the data, and where they lie on one line, the last two take the
        nearest.
    """
    values = np.asarray(values, dtype=np.float64)
    nearest = values[cKDTree(xy).query(queries)[1]]
    if kind == "nearest":
        return nearest
    interpolator = {"linear": LinearNDInterpolator, "cubic": CloughTocher2DInterpolator}[kind]
    try:
        inside = interpolator(xy, values)(queries)
    except QhullError:
        return nearest
    return np.where(np.isnan(inside), nearest, inside)
