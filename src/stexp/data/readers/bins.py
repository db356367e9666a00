"""Bins of Visium HD: where they lie, and the larger squares that they make up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stexp.data.readers.spaceranger import POSITIONS, check_parquet, read_visium_positions
from stexp.errors import InputError

PATTERN = np.frombuffer(b"s_000um_00000_00000", dtype=np.uint8)
"""The barcode of a bin, s_<size>um_<row>_<column>, before ``-1``; digits stand for 0."""
PLACE = ("array_x", "array_y", "pixel_x", "pixel_y")
OFF_TISSUE, UNKNOWN = -1, -2
LEAST_TISSUE = 0.5
"""Share of a square's bins that are on tissue, of a square that counts as such."""
CHECKED_ROWS = 4096


def places_of(barcodes: Sequence[bytes] | np.ndarray, subject: object) -> np.ndarray:
    """Column and row (N, 2) of bins by their barcodes; InputError for one that is none of a bin."""
    text = np.asarray(barcodes, dtype="S")
    n = len(PATTERN)
    digits = ord("0") == PATTERN
    letters = np.zeros((len(text), max(n, text.dtype.itemsize)), np.uint8)
    letters[:, : text.dtype.itemsize] = text.view(np.uint8).reshape(len(text), -1)
    is_digit = (letters[:, :n] >= ord("0")) & (letters[:, :n] <= ord("9"))
    fits = np.where(digits, is_digit, letters[:, :n] == PATTERN).all(axis=1)
    if not fits.all():
        raise InputError(
            f"{subject}: {int((~fits).sum())} barcodes are none of bins (first: {text[~fits][0].decode()!r}); names "
            f"like s_002um_00012_00345-1 would fit"
        )
    row, column = (_number(letters[:, start : start + 5]) for start in (8, 14))
    return np.column_stack([column, row])


def _number(digits: np.ndarray) -> np.ndarray:
    return (digits - ord("0")).astype(np.int64) @ (10 ** np.arange(digits.shape[1])[::-1])


def read_bins(file: Path) -> pd.DataFrame:
    """Positions of the bins of one size, without the names of those of a parquet, of which there may be 11 million.

    Returns
    -------
    DataFrame
        in_tissue (bool), array_x, array_y (int64), pixel_x, pixel_y.

    Raises
    ------
    InputError
        As :func:`~stexp.data.readers.spaceranger.read_visium_positions`, and barcodes that name other places than
        ``array_row`` and ``array_col``.
    """
    if file.suffix.lower() == ".parquet":
        table = _read_columns(file)
    else:
        table = read_visium_positions(file)
        _check_places(table.index.to_numpy(), table["array_y"].to_numpy(), table["array_x"].to_numpy(), file)
    if table.empty or not table["in_tissue"].any():
        raise InputError(f"positions {file}: none of {len(table)} bins is in tissue")
    array = table[["array_x", "array_y"]].to_numpy()
    if not ((array >= 0) & (array < 10**5) & (array == np.round(array))).all():
        raise InputError(f"positions {file}: array_row and array_col of bins are whole numbers from 0 to 99,999")
    return table.astype({"array_x": np.int64, "array_y": np.int64})


def _read_columns(file: Path) -> pd.DataFrame:
    try:
        check_parquet(file)
        missing = [name for name in POSITIONS if name not in pq.read_schema(file).names]
        if missing:
            raise InputError(f"positions {file} lack {', '.join(missing)}; {', '.join(POSITIONS)} would fit")
        columns = pq.read_table(file, columns=list(POSITIONS[1:]))
        flag, row, column, y, x = (np.asarray(columns[name], dtype=np.float64) for name in POSITIONS[1:])
        first = next(pq.ParquetFile(file).iter_batches(CHECKED_ROWS, columns=["barcode"]), None)
    except InputError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"positions {file} cannot be read as a table: {' '.join(str(error).split())}") from error
    bad = ~np.isfinite([row, column, y, x]).all(axis=0) | ~np.isin(flag, (0, 1))
    if bad.any():
        raise InputError(
            f"positions {file}: {int(bad.sum())} rows hold no number where one is needed, or in_tissue other than "
            f"0 and 1"
        )
    if first is not None:
        names = first.column("barcode").cast(pa.string()).to_pylist()
        _check_places(names, row[: len(names)], column[: len(names)], file)
    return pd.DataFrame({"in_tissue": flag == 1, "array_x": column, "array_y": row, "pixel_x": x, "pixel_y": y})


def _check_places(names: Sequence[str] | np.ndarray, row: np.ndarray, column: np.ndarray, file: Path) -> None:
    stated = places_of([str(name).encode() for name in names], f"positions {file}")
    wrong = (stated != np.column_stack([column, row])).any(axis=1)
    if wrong.any():
        raise InputError(
            f"positions {file}: array_row and array_col of {names[int(wrong.argmax())]} are other than its name says"
        )


@dataclass(frozen=True)
class Squares:
    """Squares of several bins a side.

    Parameters
    ----------
    places : DataFrame
        Those on tissue, by name: array_x, array_y, pixel_x, pixel_y.
    number : ndarray, shape (rows, columns) of the bins, int32
        Row of `places` that each bin on tissue belongs to; `OFF_TISSUE`, or `UNKNOWN` where the positions have no bin.
    """

    places: pd.DataFrame
    number: np.ndarray

    def of(self, barcodes: np.ndarray, subject: object) -> np.ndarray:
        """Row of `places` (N,) that each bin belongs to, -1 for bins off tissue.

        Raises
        ------
        InputError
            Bins that the positions lack.
        """
        column, row = places_of(barcodes, subject).T
        height, width = self.number.shape
        within = (row < height) & (column < width)
        number = np.full(len(barcodes), UNKNOWN, dtype=np.int64)
        number[within] = self.number[row[within], column[within]]
        unknown = number == UNKNOWN
        if unknown.any():
            raise InputError(
                f"{subject}: {int(unknown.sum())} of {len(barcodes)} barcodes with counts are not in the table of "
                f"positions (first: {np.asarray(barcodes)[unknown][0].decode()}), which lists every place of an "
                f"array: is it cut?"
            )
        return number


def squares_of(bins: pd.DataFrame, side: int, bin_um: float) -> Squares:
    """Squares of `side` x `side` bins, of which at least half are on tissue.

    Parameters
    ----------
    bins
        As :func:`read_bins` returns them.
    bin_um
        Side of a square, for its name.

    Notes
    -----
    Square (i, j) holds the bins whose column and row are i and j times `side`, and up to `side` - 1 more, as the 8 and
    16 um bins of SpaceRanger hold those of 2 um. Its centre is the mean of its bins; where it reaches over the edge of
    the array, the mean of those that there are, moved by what lacks at the step from bin to bin.
    """
    x, y = bins["array_x"].to_numpy(), bins["array_y"].to_numpy()
    in_tissue = bins["in_tissue"].to_numpy(bool)
    width, height = int(x.max()) + 1, int(y.max()) + 1
    n_across = -(-width // side)
    square = (y // side) * n_across + x // side
    n = np.bincount(square)
    on_tissue = np.bincount(square[in_tissue], minlength=len(n)) >= LEAST_TISSUE * side**2
    if not on_tissue.any():
        raise InputError(f"no square of {bin_um:g} um has half of its bins on tissue; a smaller data.bin_um would fit")
    any_bin = np.flatnonzero(n)
    mean = {name: (np.bincount(square, bins[name].to_numpy())[any_bin] / n[any_bin]) for name in PLACE}
    middle = np.column_stack([any_bin % n_across, any_bin // n_across]) * side + (side - 1) / 2
    array = np.column_stack([mean["array_x"], mean["array_y"]])
    pixels = np.column_stack([mean["pixel_x"], mean["pixel_y"]])
    # means of an affine map are the map of the means, of cut squares too
    step, *_ = np.linalg.lstsq(np.column_stack([array, np.ones(len(array))]), pixels, rcond=None)
    pixels += (middle - array) @ step[:2]
    chosen = np.flatnonzero(on_tissue)
    column, row = chosen % n_across, chosen // n_across
    pixels = pixels[np.searchsorted(any_bin, chosen)]
    names = [f"s_{int(bin_um):03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, column, strict=True)]
    places = pd.DataFrame(
        {"array_x": column, "array_y": row, "pixel_x": pixels[:, 0], "pixel_y": pixels[:, 1]},
        index=pd.Index(names, dtype=object),
    )
    row_of = np.full(len(n), OFF_TISSUE, dtype=np.int32)
    row_of[chosen] = np.arange(len(chosen))
    number = np.full((height, width), UNKNOWN, dtype=np.int32)
    number[y, x] = np.where(in_tissue, row_of[square], OFF_TISSUE)
    return Squares(places, number)
