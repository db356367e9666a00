"""Where on a slide something is predicted: a grid over its tissue, or given coordinates."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.hdf5 import open_hdf5
from stexp.data.readers.formats import POSITIONS, TEXT, read_positions, read_table
from stexp.data.readers.numbers import check_thousands, without_blanks
from stexp.data.section import n_outside, what_would_fit
from stexp.data.slides.slide import Slide
from stexp.data.slides.spacing import spacing
from stexp.data.slides.tissue import Tissue
from stexp.errors import InputError

log = logging.getLogger(__name__)

KINDS = ("hexagonal", "square")
MOST = 10_000_000  # centres of a grid: days on a GPU, hundreds of megabytes of coordinates


@dataclass(frozen=True, eq=False)
class Grid:
    """Places on a slide.

    Parameters
    ----------
    xy_px : (N, 2) float64
        Centres in level-0 pixels.
    array_xy : (N, 2) int64
        Column and row, >= 0; of a hexagonal grid as Visium has them: even columns in even rows, odd ones in odd rows.
    names
        Ids, where a file gives them.
    spacing_px
        Distance of neighbours; of given coordinates, the median.
    kind
        ``"hexagonal"``, ``"square"`` or ``"given"``.
    """

    xy_px: np.ndarray
    array_xy: np.ndarray
    names: list[str] | None
    spacing_px: float
    kind: str

    def __len__(self) -> int:
        return len(self.xy_px)


def make_grid(
    slide: Slide,
    um_per_px: float,
    kind: str = "hexagonal",
    spacing_um: float = 100.0,
    tissue: Tissue | None = None,
    min_tissue: float = 0.5,
) -> Grid:
    """A regular grid over the tissue of a slide, row by row.

    Parameters
    ----------
    um_per_px
        Micrometres per level-0 pixel.
    kind
        ``"hexagonal"``: rows spacing x sqrt(3) / 2 apart, odd ones shifted by half a spacing, as on a Visium slide;
        ``"square"``.
    spacing_um
        Centre to centre of neighbours; Visium's is 100.
    tissue
        The grid begins at the left and upper end of its mask; None: it covers the whole image.
    min_tissue
        Share of tissue, 0..1, that the square of side `spacing_um` around a centre must have.

    Raises
    ------
    InputError
        Unknown kind, a number that does not fit, no tissue, or more than ten million centres.
    """
    if kind not in KINDS:
        raise InputError(f"grid={kind}: choose {' or '.join(KINDS)}, or give coordinates=FILE")
    for name, value, most in (("um_per_px", um_per_px, np.inf), ("spacing_um", spacing_um, np.inf)):
        if not (isinstance(value, int | float) and 0 < value < most):
            raise InputError(f"{name}={value}: a number above 0 would fit")
    if not 0 <= min_tissue <= 1:
        raise InputError(f"min_tissue={min_tissue}: a number from 0 to 1 would fit")
    low, high = np.zeros(2), np.array(slide.size, dtype=np.float64)
    if tissue is not None:
        if not tissue.mask.any():
            raise InputError(f"image {slide.path}: no tissue found; if there is some, give its coordinates=FILE")
        ends = [np.flatnonzero(tissue.mask.any(axis=axis))[[0, -1]] for axis in (0, 1)]
        low = np.array([first for first, _ in ends]) * tissue.downsample
        high = np.minimum(np.array([last + 1 for _, last in ends]) * tissue.downsample, high)
    step = spacing_um / um_per_px
    down = step * np.sqrt(3) / 2 if kind == "hexagonal" else step
    columns, rows = (max(1, round(float(n))) for n in (high - low) / (step, down))
    if columns * rows > MOST:
        raise InputError(
            f"image {slide.path}: a grid of spacing_um={spacing_um:g} has {columns} x {rows} places where tissue "
            f"lies, more than {MOST:,}; spacing_um={spacing_um * np.sqrt(columns * rows / MOST):.3g} or more would fit"
        )
    row, column = (n.ravel() for n in np.mgrid[:rows, :columns])
    odd = row % 2 if kind == "hexagonal" else 0 * row
    # what the last column and row leave over is shared between both sides
    margin = (high - low - ((columns - 1) * step + (0.5 * step if odd.any() else 0), (rows - 1) * down)) / 2
    xy = low + margin + np.stack([(column + 0.5 * odd) * step, row * down], axis=1)
    array = np.stack([2 * column + odd if kind == "hexagonal" else column, row], axis=1)
    keep = ((xy >= 0) & (xy < slide.size)).all(axis=1)
    if tissue is not None:
        keep &= tissue.share(xy, step) >= min_tissue
    if not keep.any():
        raise InputError(
            f"image {slide.path}: of {len(xy)} places {spacing_um:g} um apart none has a share of {min_tissue:g} of "
            f"tissue around it; a smaller spacing_um or min_tissue would fit"
        )
    return Grid(xy[keep], array[keep].astype(np.int64), None, step, kind)


def read_coordinates(path: str | Path, slide: Slide | None = None) -> Grid:
    """Places that a file gives.

    Parameters
    ----------
    path
        - csv, tsv (also ``.gz``) or parquet with the columns pixel_x, pixel_y, optionally array_x, array_y, and ids
          in the first column where it is called anything else;
        - what `stexp.data.readers.formats.read_positions` reads: tissue_positions of SpaceRanger, spot files of Spatial
          Transcriptomics;
        - h5ad with ``obsm["spatial"]``, optionally ``obs`` array_x, array_y (or array_col, array_row).

        Positions are level-0 pixels. Array coordinates that the file lacks are positions in units of their spacing.
    slide
        Checked to hold every position.

    Raises
    ------
    InputError
        A column is missing, a position no number or outside the image, an id occurs twice, array coordinates are no
        whole numbers >= 0.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise InputError(f"coordinates {path} do not exist")
    table, named = _read_h5ad(path) if path.suffix == ".h5ad" else _read_table(path)
    if table.empty:
        raise InputError(f"coordinates {path} hold no place")
    xy = table[["pixel_x", "pixel_y"]].to_numpy(np.float64)
    bad = ~np.isfinite(xy).all(axis=1)
    if bad.any():
        raise InputError(f"coordinates {path}: {bad.sum()} rows hold no position (first: {table.index[bad][0]})")
    twice = table.index[table.index.duplicated()].unique()
    if len(twice):
        raise InputError(f"coordinates {path}: {len(twice)} ids occur twice (first: {twice[0]})")
    same = pd.DataFrame(xy, index=table.index).duplicated().to_numpy()
    if same.any():
        raise InputError(f"coordinates {path}: {same.sum()} places are given twice (first: {table.index[same][0]})")
    if slide is not None and (n := n_outside(xy, *slide.size)):
        width, height = slide.size
        raise InputError(
            f"coordinates {path}: {n} of {len(xy)} lie outside the image ({width} x {height} px); "
            + what_would_fit(pd.DataFrame(xy, index=table.index), width, height)
        )
    step = spacing(xy)
    if "array_x" in table:
        array = table[["array_x", "array_y"]].to_numpy(np.float64)
        if not (np.isfinite(array) & (array >= 0) & (array < 2**31) & (array == np.round(array))).all():
            raise InputError(f"coordinates {path}: array coordinates must be whole numbers >= 0, or left out")
    else:
        array = np.round((xy - xy.min(axis=0)) / max(step, 1.0))
    return Grid(xy, array.astype(np.int64), [str(name) for name in table.index] if named else None, step, "given")


def _read_h5ad(path: Path) -> tuple[pd.DataFrame, bool]:
    try:
        with open_hdf5(path, "coordinates"):  # refuses what leads to other files
            pass
        source = ad.read_h5ad(path, backed="r")
    except InputError:
        raise
    except Exception as error:  # damaged files make h5py and anndata raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"coordinates {path} cannot be read as h5ad ({reason})") from error
    try:
        xy = source.obsm.get("spatial")
        if xy is None or np.ndim(xy) != 2 or np.shape(xy)[1] != 2:
            raise InputError(f"coordinates {path} lack obsm['spatial'] with rows of (x, y)")
        table = pd.DataFrame(np.asarray(xy, dtype=np.float64), index=source.obs_names, columns=["pixel_x", "pixel_y"])
        for pair in (("array_x", "array_y"), ("array_col", "array_row")):
            if "array_x" not in table and set(pair) <= set(source.obs):
                table[["array_x", "array_y"]] = source.obs[list(pair)].to_numpy(np.float64)
        return table, True
    finally:
        source.file.close()


def _read_table(path: Path) -> tuple[pd.DataFrame, bool]:
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else read_table(path, "coordinates", **TEXT)
    except InputError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's own errors are
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"coordinates {path} cannot be read as a table: {reason}") from error
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index()  # ids of a parquet file
    table.columns = [str(name).strip() for name in table.columns]
    if not {"pixel_x", "pixel_y"} <= set(table) or {"x", "y"} <= set(table):
        return read_positions(path), True
    first = table.columns[0]
    named = first not in (*POSITIONS, "Unnamed: 0")
    ids = table[first] if named else pd.RangeIndex(len(table))
    wanted = [name for name in POSITIONS if name in table]
    if len(wanted) == 3:
        raise InputError(f"coordinates {path} have {', '.join(wanted)}; array_x and array_y go together")
    check_thousands(table[wanted], f"coordinates {path}")
    plain = without_blanks(table[wanted], f"coordinates {path}")
    numbers = plain.apply(pd.to_numeric, errors="coerce").astype(np.float64)
    return numbers.set_axis(pd.Index(ids, dtype=object), axis=0), named
