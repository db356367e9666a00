"""Where a stained image lies on the slide of an instrument: the matrix that Xenium Explorer exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from stexp.data.readers.text import read_table
from stexp.data.readers.visium_scale import SQUARE
from stexp.errors import InputError


def read_alignment(file: Path) -> np.ndarray:
    """The matrix (3, 3) from pixels (x, y) of an H&E image to pixels of Xenium.

    Parameters
    ----------
    file
        ``<name>_he_imagealignment.csv`` of 10x Genomics, or ``matrix.csv`` of Xenium Explorer: three rows of three
        numbers without a header.

    Raises
    ------
    InputError
        Another form, a matrix that is singular or no affine map, or one that skews the image or stretches one side.

    Notes
    -----
    Direction: with M = the matrix, (x', y') = M (x, y, 1) takes a pixel of the H&E image to Xenium's morphology image,
    whose pixels measure ``pixel_size`` of ``experiment.xenium``; spots go the other way, by its inverse. Source: 10x
    Genomics, knowledge base 35386990499853, "How can I convert coordinates between H&E image and Xenium data?".
    """
    if not file.is_file():
        raise InputError(f"alignment {file} does not exist (data.alignment=)")
    table = read_table(file, "alignment", header=None)
    matrix = table.apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise InputError(
            f"alignment {file} is no table of 3 x 3 numbers without a header ({len(matrix)} x {matrix.shape[1]}); the "
            f"matrix that Xenium Explorer exports would fit"
        )
    if not np.allclose(matrix[2], (0, 0, 1), atol=1e-9):
        raise InputError(
            f"alignment {file}: the last row is {', '.join(f'{n:g}' for n in matrix[2])}; 0, 0, 1 of an affine map "
            f"would fit"
        )
    largest, least = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    if least <= 1e-6 * largest:
        raise InputError(f"alignment {file} is singular: it takes the image to a line or a point")
    if largest > SQUARE * least:
        raise InputError(
            f"alignment {file} stretches the image {largest / least:.3g} times as much one way as across; turned, "
            f"mirrored and evenly scaled images would fit"
        )
    return matrix


def to_image(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Pixels of the H&E image (N, 2) of places (N, 2) in pixels of Xenium."""
    inverse = np.linalg.inv(matrix)
    return xy @ inverse[:2, :2].T + inverse[:2, 2]


def scale_of(matrix: np.ndarray) -> float:
    """Pixels of Xenium that a pixel of the H&E image is wide: the geometric mean of both ways."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
