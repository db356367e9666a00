"""Tiles in one file: as a plain array, or each as a JPEG; written so that a kill costs nothing that was done."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import torch
from PIL import Image

from stexp.errors import InputError

log = logging.getLogger(__name__)

SUFFIXES = {"raw": ".npy", "jpeg": ".jpegs"}
_JPEG_SHARE = 0.25  # of the raw bytes, at most, for tissue; 0.15 on HER2+
_MAGIC = b"stexptil"


class JpegTiles:
    """Tiles kept as JPEG of quality 95 without chroma subsampling, indexed like an array.

    Takes whatever an array takes along its first axis: a number, a slice, an array of numbers or of booleans.

    Parameters
    ----------
    filename
        The images one after the other, then their places (n, 2) int64 (offset, length), n, and a mark.

    Raises
    ------
    ValueError
        No such file, or one that is not whole.

    Notes
    -----
    On tiles of 224 px of HER2+ B4, against the plain array: 0.15 of the disk; values off by 0.9 of 255 on average,
    15 at most. Batches are decoded by as many threads as torch computes with.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, filename: str | Path) -> None:
        self.filename = str(filename)
        self._bytes = np.memmap(filename, np.uint8, "r")
        if len(self._bytes) < 16:
            raise ValueError("not a store of JPEG tiles")
        n, magic = int(self._bytes[-16:-8].view(np.int64)[0]), self._bytes[-8:].tobytes()
        end = len(self._bytes) - 16 - 16 * n
        if magic != _MAGIC or n < 1 or end < 0:
            raise ValueError("not a store of JPEG tiles")
        self._places = np.frombuffer(self._bytes[end:-16].tobytes(), np.int64).reshape(n, 2)
        if (self._places[:, 0] < 0).any() or (self._places[:, 1] < 1).any() or (self._places.sum(axis=1) > end).any():
            raise ValueError("tiles beyond the end of the file")
        # of the header alone: a decoder believes it, and takes memory for what it says
        offset, length = self._places[0]
        try:
            with Image.open(io.BytesIO(self._bytes[offset : offset + length].tobytes()), formats=["JPEG"]) as first:
                self.shape = (n, first.height, first.width, 3)
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError("not a JPEG tile") from error
        self._rows = np.arange(n)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles when decoded."""
        return int(np.prod(self.shape))

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        rows = self._rows[index]
        if rows.ndim == 0:
            return self._decode(int(rows))
        out = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        threads = min(torch.get_num_threads(), len(rows) // 8)
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:  # decoding lets other threads run
                for i, tile in enumerate(pool.map(self._decode, rows)):
                    out[i] = tile
        else:
            for i, row in enumerate(rows):
                out[i] = self._decode(row)
        return out

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self._decode, range(len(self)))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def _decode(self, row: int) -> np.ndarray:
        offset, length = self._places[row]
        try:
            tile = np.empty(self.shape[1:], dtype=np.uint8)
            return imagecodecs.jpeg8_decode(self._bytes[offset : offset + length].tobytes(), out=tile)
        except (imagecodecs.Jpeg8Error, ValueError) as error:
            raise InputError(f"tile {row} of {self.filename} is damaged ({error}); delete the file") from error


TileStore = np.memmap | JpegTiles
"""Tiles of a section in a file, (n, px, px, 3) uint8."""


def file_of(store: TileStore) -> Path:
    """Where a tile store lies."""
    if store.filename is None:
        raise ValueError("a store without a file")
    return Path(store.filename)


def open_store(path: Path, shape: tuple[int, ...]) -> TileStore | None:
    """The store at `path`, memory-mapped; None where there is none, or one that something damaged."""
    if not (path.exists() and path.with_suffix(".json").exists()):
        return None
    try:
        if not isinstance(json.loads(path.with_suffix(".json").read_text()), dict):
            raise ValueError("no facts beside it")
        tiles: TileStore = (
            JpegTiles(path) if path.suffix == SUFFIXES["jpeg"] else np.lib.format.open_memmap(path, mode="r")
        )
        if tiles.shape == shape and tiles.dtype == np.uint8:
            return tiles
    except (ValueError, EOFError, OSError, InputError):
        pass
    log.warning("tile store %s is damaged; cutting it again", path)
    return None


class StoreInTheMaking:
    """The unfinished store beside `path`, taken up where it was left; a context manager.

    ``<name>.part`` holds the tiles. ``<name>.done`` lists those that are whole, as (row, offset, length) int64, and
    is only written after they reached the disk: a kill at any point loses at most what was put since the last
    `commit`, and what is half written is written again. `finish` renames it into place.

    Parameters
    ----------
    path
        Where the store will be; its suffix says which kind it is.
    shape
        (n, px, px, 3).

    Attributes
    ----------
    done : (n,) bool
        Rows that are already there.

    Raises
    ------
    InputError
        Too little free disk: n x px x px x 3 bytes as a plain array (two million tiles of 224 px: 301 GB), about a
        sixth of that as JPEG (44 GB).
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self._part, self._journal = path.with_suffix(".part"), path.with_suffix(".done")
        self._raw = path.suffix == SUFFIXES["raw"]
        self._tile_bytes = int(np.prod(shape[1:]))
        self._places = np.zeros((shape[0], 2), dtype=np.int64)
        self._new: list[tuple[int, int, int]] = []
        if not self._resume():
            self._begin()
        self._start = np.lib.format.open_memmap(self._part, mode="r").offset if self._raw else 0
        self._file = self._part.open("r+b")
        self.done = self._places[:, 1] > 0

    def __enter__(self) -> StoreInTheMaking:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._file.close()
        if kind is not None and issubclass(kind, InputError):  # of the image: another one will have another name
            self._part.unlink(missing_ok=True)
            self._journal.unlink(missing_ok=True)

    def _resume(self) -> bool:
        """Read the journal; False where there is nothing to go on from."""
        try:
            size = self._part.stat().st_size
            journal = self._journal.read_bytes()
            if self._raw and np.lib.format.open_memmap(self._part, mode="r").shape != self.shape:
                return False
        except (OSError, ValueError, EOFError):
            return False
        whole = len(journal) // 24 * 24  # a kill may have cut the last entry
        os.truncate(self._journal, whole)
        row, offset, length = np.frombuffer(journal[:whole], np.int64).reshape(-1, 3).T
        good = (row >= 0) & (row < len(self._places)) & (offset >= 0) & (length > 0) & (offset + length <= size)
        self._places[row[good]] = np.column_stack([offset, length])[good]
        return True

    def _begin(self) -> None:
        self._journal.unlink(missing_ok=True)  # first: it must never speak of another file than it was written for
        self._part.unlink(missing_ok=True)
        raw_bytes, free = self.shape[0] * self._tile_bytes, shutil.disk_usage(self.path.parent).free
        need = raw_bytes if self._raw else round(_JPEG_SHARE * raw_bytes)
        if need > free:
            smaller = "; data.tile_store=jpeg takes about a sixth" if self._raw else ""
            raise InputError(
                f"{self.shape[0]} tiles need {_size(need)} in {self.path.parent}, {_size(free)} are free{smaller}"
            )
        if not self._raw:
            self._part.touch()
        else:
            try:
                np.lib.format.open_memmap(self._part, mode="w+", dtype=np.uint8, shape=self.shape)
                _reserve(self._part)
            except OSError:
                self._part.unlink(missing_ok=True)
                raise
        self._journal.touch()

    def put(self, rows: np.ndarray, tiles: np.ndarray) -> None:
        """Write `tiles` (len(rows), px, px, 3)."""
        for row, tile in zip(rows.tolist(), tiles, strict=True):
            if self._raw:
                data, offset = tile.tobytes(), self._start + row * self._tile_bytes
                self._file.seek(offset)
            else:
                data = imagecodecs.jpeg8_encode(tile, level=95, subsampling="444")
                offset = self._file.seek(0, os.SEEK_END)
            self._file.write(data)
            self._new.append((row, offset, len(data)))

    def commit(self) -> None:
        """Make sure that what was put is on disk, then say so in the journal."""
        self._file.flush()
        os.fsync(self._file.fileno())
        entries = np.array(self._new, dtype=np.int64).reshape(-1, 3)
        with self._journal.open("ab") as journal:
            journal.write(entries.tobytes())
        self._places[entries[:, 0]], self.done[entries[:, 0]] = entries[:, 1:], True
        self._new = []

    def finish(self, facts: dict) -> None:
        """Put the store in its place, and `facts` beside it."""
        if not self.done.all():
            raise RuntimeError(f"{(~self.done).sum()} tiles were never written")
        if not self._raw:
            self._file.seek(0, os.SEEK_END)
            self._file.write(self._places.tobytes() + np.int64(len(self._places)).tobytes() + _MAGIC)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.path.with_suffix(".json").write_text(json.dumps(facts))  # half of it is noticed by `open_store`
        os.replace(self._part, self.path)
        self._journal.unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    """Claim the blocks of a sparse file, so that a disk that is too small says so before the work."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _size(n: int) -> str:
    return f"{n / 1e9:.0f} GB" if n >= 10e9 else f"{n / 1e6:.0f} MB"
