"""Micrometres per pixel of a Visium section, from all that its files say about it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd

from stexp.errors import InputError

log = logging.getLogger(__name__)

FACTORS = "scalefactors_json.json"
PITCH_UM = 100.0
"""Centre to centre of neighbouring spots, each with six neighbours: columns of the array are half of it apart."""

NOMINAL_SPOT_UM = 65.0
"""What SpaceRanger takes for the diameter of a spot in ``spot_diameter_fullres``; the printed spot has 55 um."""

BIN_FOLDER = re.compile(r"square_(\d+)um")
BIN_BARCODE = re.compile(r".*?s_(\d+)um_\d+_\d+.*")
SQUARE = 1.25
"""Pixels of a picture are square to within this factor."""
MOST_OFF = 2.0
"""Factor by which the nominal diameter of a spot may be off: the printed one is a sixth smaller."""
TOLERANCE = 0.05
"""Share by which two statements of one scale may differ; the pitch is fitted, the rest rounded."""


def read_factors(file: Path) -> dict[str, float]:
    """Numbers above 0 of ``scalefactors_json.json``; none, with a warning, where there is no such file."""
    if not file.is_file():
        log.warning("%s does not exist: nothing to compare the pitch of the spots with", file)
        return {}
    try:
        factors = json.loads(file.read_text(encoding="utf-8-sig"))
        return {
            key: float(value)
            for key, value in factors.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"scale factors {file} are no JSON object: {error}") from error


def bin_size_um(positions: pd.DataFrame, factors: dict[str, float], folder: Path, where: str) -> float | None:
    """Side of a bin of Visium HD, as scale factors, barcodes and the folder's name state it; None: no bins.

    Raises
    ------
    InputError
        Two of them contradict each other.
    """
    stated: dict[str, float] = {}
    if "bin_size_um" in factors:
        stated["bin_size_um of the scale factors"] = factors["bin_size_um"]
    sizes = {match[1] for name in positions.index[:1000] if (match := BIN_BARCODE.fullmatch(str(name)))}
    for size in sorted(sizes):
        stated[f"barcodes like {next(name for name in positions.index if f'_{size}um_' in str(name))}"] = float(size)
    for name in (folder.name, folder.parent.name):
        if match := BIN_FOLDER.fullmatch(name):
            stated[f"the folder {name}"] = float(match[1])
    if not stated:
        return None
    if len(set(stated.values())) > 1:
        statements = ", ".join(f"{source} {size:g}" for source, size in stated.items())
        raise InputError(f"{where}: files contradict each other about the size of a bin in um: {statements}")
    if "bin_size_um" not in factors:
        source, size = next(iter(stated.items()))
        log.warning("%s: bins of %g um, by %s; the scale factors lack bin_size_um", where, size, source)
    return next(iter(stated.values()))


def fit_um_per_px(positions: pd.DataFrame, factors: dict[str, float], bin_um: float | None, where: str) -> float:
    """Scale of the full-resolution image, from an affine fit of pixel to array positions.

    Parameters
    ----------
    bin_um
        Side of a bin on a square array; None: a hexagonal array of spots.

    Raises
    ------
    InputError
        The spots lie in one line, their pixel positions do not follow the array, its axes are swapped, the array is
        not that of Visium, or ``microns_per_pixel`` says otherwise.
    """
    along = _array_steps_px(positions, where)
    stated = factors.get("microns_per_pixel")
    if bin_um is None and 1 / SQUARE < along[0] / along[1] < SQUARE:
        # columns of the hexagonal array are 1 / sqrt(3) of its rows apart
        if stated is None:
            raise InputError(
                f"{where}: the positions are a square array, as of Visium HD, and nothing says how large its bins "
                f"are; bin_size_um or microns_per_pixel in scalefactors_json.json, or the folder's name as "
                f"SpaceRanger gives it (square_008um) would fit"
            )
        log.warning(
            "%s: a square array of unknown bins, %.3g um wide by microns_per_pixel %.3g of the scale factors",
            where,
            stated * float(np.sqrt(along[0] * along[1])),
            stated,
        )
        return stated
    step_um = np.array([bin_um, bin_um] if bin_um else [PITCH_UM / 2, PITCH_UM * np.sqrt(3) / 2])
    along_x, along_y = step_um / along
    if not 1 / 2 < along_x / along_y < 2:
        raise InputError(
            f"{where}: {along_x:.3g} um/px along the array's columns, {along_y:.3g} along its rows: "
            f"are array_row and array_col swapped?"
        )
    if not 1 / SQUARE < along_x / along_y < SQUARE:
        raise InputError(
            f"{where}: {along_x:.3g} um/px along the array's columns, {along_y:.3g} along its rows: this is not the "
            f"array of {f'bins of {bin_um:g} um' if bin_um else f'spots {PITCH_UM:g} um apart'}"
        )
    um_per_px = float(np.sqrt(along_x * along_y))
    _check_statements(um_per_px, factors, bin_um, where)
    return um_per_px


def _array_steps_px(positions: pd.DataFrame, where: str) -> np.ndarray:
    """Distances in pixels of neighbouring columns and of neighbouring rows of the array."""
    array = np.column_stack([positions[["array_x", "array_y"]], np.ones(len(positions))])
    pixels = positions[["pixel_x", "pixel_y"]].to_numpy()
    fit, _, rank, _ = np.linalg.lstsq(array, pixels, rcond=None)
    step_px = np.linalg.norm(fit[:2], axis=1)
    if rank < 3 or not step_px.all():
        raise InputError(
            f"{where}: {len(positions)} spots in one line, or at one place; a Visium array has rows and columns"
        )
    off_px = float(np.sqrt(np.square(array @ fit - pixels).sum(axis=1).mean()))
    if off_px > step_px.min():
        raise InputError(
            f"{where}: pixel positions do not follow the array; they are {off_px:.0f} px off a regular one"
        )
    if np.linalg.det(fit[:2]) < 0:
        log.warning(
            "%s: the positions mirror the array: unless the picture is mirrored, pixel row and column are swapped",
            where,
        )
    return step_px


def _check_statements(um_per_px: float, factors: dict[str, float], bin_um: float | None, where: str) -> None:
    """Compare the fitted scale with what the scale factors say."""
    stated = factors.get("microns_per_pixel")
    if stated is not None and not 1 - TOLERANCE < stated / um_per_px < 1 + TOLERANCE:
        what = f"bins of {bin_um:g} um" if bin_um else f"spots {PITCH_UM:g} um apart"
        raise InputError(
            f"{where}: {what} give {um_per_px:.3g} um/px, microns_per_pixel of the scale factors says {stated:.3g}; "
            f"which one is right cannot be told"
        )
    if "spot_diameter_fullres" in factors:
        nominal = (bin_um or NOMINAL_SPOT_UM) / factors["spot_diameter_fullres"]
        if not 1 / MOST_OFF < nominal / um_per_px < MOST_OFF:
            raise InputError(
                f"{where}: the pitch of the spots gives {um_per_px:.3g} um/px, spot_diameter_fullres of the scale "
                f"factors {nominal:.3g}; are positions and scale factors of one section, and of one image?"
            )
        if not 1 - TOLERANCE < nominal / um_per_px < 1 + TOLERANCE:
            log.warning(
                "%s: the pitch of the spots gives %.3g um/px, spot_diameter_fullres %.3g; the pitch counts",
                where,
                um_per_px,
                nominal,
            )
