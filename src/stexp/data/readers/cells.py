"""Segmented cells of SpaceRanger 4: the centres of their outlines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stexp.data.readers.text import read_text
from stexp.errors import InputError


def read_cell_centres(file: Path) -> pd.DataFrame:
    """Centres of cells of ``cell_segmentations.geojson``, in pixels of the full-resolution image.

    Returns
    -------
    DataFrame
        Index as the matrix of cells names them (cellid_000000001-1); pixel_x, pixel_y, the centroid of the outline.

    Raises
    ------
    InputError
        No collection of polygons with a cell_id each.
    """
    try:
        features = json.loads(read_text(file, "cells"))["features"]
        names = [_name(feature["properties"]["cell_id"]) for feature in features]
        centres = [_centre(feature["geometry"]) for feature in features]
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # whatever JSON may hold
        raise InputError(
            f"cells {file} are no collection of polygons with a cell_id ({type(error).__name__}: {str(error)[:100]}); "
            f"cell_segmentations.geojson of SpaceRanger would fit"
        ) from error
    if not names:
        raise InputError(f"cells {file} hold no cell")
    index = pd.Index(names, dtype=object)
    return pd.DataFrame(np.array(centres, dtype=np.float64), index=index, columns=["pixel_x", "pixel_y"])


def _name(cell_id: object) -> str:
    """A cell as barcodes name it, from its number, or from that name with or without its suffix."""
    if isinstance(cell_id, int) or str(cell_id).isdigit():
        return f"cellid_{int(str(cell_id)):09d}-1"
    return f"{str(cell_id).removesuffix('-1')}-1"


def _centre(geometry: dict[str, Any]) -> tuple[float, float]:
    """Centroid of a polygon, or of several; holes count off."""
    polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    if geometry["type"] not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"a {geometry['type']} is no outline")
    area, moment = 0.0, np.zeros(2)
    for outline, *holes in polygons:
        for ring, sign in ((outline, 1.0), *((hole, -1.0) for hole in holes)):
            own, centre = _ring(ring)
            area += sign * own
            moment += sign * own * centre
    points = np.array([point[:2] for outline, *_ in polygons for point in outline], dtype=np.float64)
    x, y = moment / area if area > 0 else points.mean(axis=0)  # a line has no area
    return float(x), float(y)


def _ring(points: Sequence[Sequence[float]]) -> tuple[float, np.ndarray]:
    """Area of a closed ring, and its centroid (shoelace formula)."""
    xy = np.array([point[:2] for point in points], dtype=np.float64)
    shift = xy[0]
    a = xy - shift  # large coordinates would cost digits
    b = np.roll(a, -1, axis=0)
    cross = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    signed = cross.sum() / 2
    if signed == 0:
        return 0.0, shift
    return abs(signed), shift + ((a + b) * cross[:, None]).sum(axis=0) / (6 * signed)
