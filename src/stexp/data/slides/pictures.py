"""``pictures.h5``: what a report shows of slides beside their thumbnails, and of the spots retrieved from.

A slide is kept as levels that halve in scale, in JPEG cells of `CELL` px: the coarsest whole, the finer ones where
there are spots, as fine as the budget lets them be. Tiles of references lie side by side in one JPEG.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from stexp.data.hdf5 import new_hdf5, open_hdf5
from stexp.data.slides.slide import Slide
from stexp.errors import InputError

NAME = "pictures.h5"
CELL = 512
SHEET_PX, SHEET_COLUMNS = 48, 32  # a multiple of JPEG's blocks of 16: tiles do not run into each other
REFERENCES = 1500
"""Tiles of references that a report shows, at most: those of most weight."""
BANK_TILES = 6000
"""Tiles of references that go with an exported model, at most."""
SLIDE_BYTES = 3_000_000
"""For all slides together."""
SIZES = ("width", "height", "side_px")


@dataclass(frozen=True)
class Level:
    """One scale of a slide: level-0 px per pixel, and JPEG cells by column and row."""

    downsample: int
    cells: dict[tuple[int, int], bytes]

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.cells.values()))


@dataclass(frozen=True)
class SlidePicture:
    """A slide, coarsest level first; sizes in level-0 px.

    Parameters
    ----------
    side_px
        Side of a spot's tile.
    """

    width: int
    height: int
    side_px: float
    levels: list[Level]


@dataclass(frozen=True)
class Sheet:
    """Tiles of references in one JPEG, `SHEET_COLUMNS` in a row, in the order of `names`."""

    names: list[str]
    jpeg: bytes

    def among(self, names: list[str], most: int = REFERENCES) -> Sheet | None:
        """The first `most` of `names` that have a tile here; None where none has one."""
        place = {name: i for i, name in enumerate(self.names)}
        kept = [name for name in names if name in place][:most]
        if not kept:
            return None
        image = np.asarray(Image.open(io.BytesIO(self.jpeg)))
        corners = (np.array(divmod(place[name], SHEET_COLUMNS)) * SHEET_PX for name in kept)
        return sheet(kept, [image[y : y + SHEET_PX, x : x + SHEET_PX] for y, x in corners])


def picture(slide: Slide, xy_px: np.ndarray, side_px: float, budget: int = SLIDE_BYTES) -> SlidePicture:
    """A slide around the spots (N, 2), in at most `budget` bytes where its coarsest level is not larger by itself."""
    width, height = slide.size
    levels: list[Level] = []
    downsample, left = 1 << max(0, math.ceil(math.log2(max(width, height) / CELL))), budget
    at_once = 1 << max(0, math.ceil(math.log2(max(width, height) / (8 * CELL))))
    # coarse levels are reduced from one image, so that a large slide is not resampled whole for each
    small = Image.fromarray(slide.thumbnail(math.ceil(max(width, height) / at_once))[0])
    with slide.open() as reader:

        def cell(column: int, row: int) -> bytes:
            if downsample < at_once:
                pitch, x, y = CELL * downsample, CELL * downsample * column, CELL * downsample * row
                size = min(pitch, width - x), min(pitch, height - y)
                return to_jpeg(reader.read_region(x, y, *size, downsample))
            factor = downsample // at_once
            x, y = CELL * factor * column, CELL * factor * row
            box = (x, y, min(x + CELL * factor, small.width), min(y + CELL * factor, small.height))
            return to_jpeg(np.asarray(small.reduce(factor, box)))

        while downsample >= 1:
            # a level has up to four times the bytes of the one before, rarely less than twice
            if levels and 2 * levels[-1].n_bytes > left:
                break
            wanted = _where(width, height, xy_px, side_px, downsample, everywhere=not levels)
            cells = _within(((at, cell(*at)) for at in wanted), left if levels else math.inf)
            if cells is None:
                break
            levels.append(Level(downsample, cells))
            left -= levels[-1].n_bytes
            downsample //= 2
    return SlidePicture(width, height, side_px, levels)


def _where(
    width: int, height: int, xy: np.ndarray, side: float, downsample: int, *, everywhere: bool
) -> list[tuple[int, int]]:
    """Columns and rows of cells, row by row: all, or those that tiles of spots touch."""
    pitch = CELL * downsample
    last = np.array([(width - 1) // pitch, (height - 1) // pitch])
    if everywhere:
        return [(column, row) for row in range(last[1] + 1) for column in range(last[0] + 1)]
    # a tile touches cells at its corners, and between them where cells are smaller than it
    steps = np.linspace(-side / 2, side / 2, 2 + int(side // pitch))
    touched = np.concatenate([xy + np.array([dx, dy]) for dx in steps for dy in steps]) // pitch
    touched = np.unique(np.clip(touched, 0, last).astype(int)[:, ::-1], axis=0)
    return [(column, row) for row, column in touched.tolist()]


def _within(cells: Iterable[tuple[tuple[int, int], bytes]], budget: float) -> dict[tuple[int, int], bytes] | None:
    """All cells; None, as soon as they are more than the budget."""
    kept, used = {}, 0
    for at, jpeg in cells:
        kept[at] = jpeg
        used += len(jpeg)
        if used > budget:
            return None
    return kept


def sheet(names: list[str], tiles: Iterable[np.ndarray]) -> Sheet:
    """Lay R tiles (px, px, 3) uint8 side by side, `SHEET_PX` wide each."""
    out = np.full((-(-len(names) // SHEET_COLUMNS) * SHEET_PX, SHEET_COLUMNS * SHEET_PX, 3), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        y, x = (SHEET_PX * at for at in divmod(i, SHEET_COLUMNS))
        small = Image.fromarray(tile).resize((SHEET_PX, SHEET_PX), Image.Resampling.BILINEAR)
        out[y : y + SHEET_PX, x : x + SHEET_PX] = np.asarray(small)
    return Sheet(list(names), to_jpeg(out))


def to_jpeg(pixels: np.ndarray, quality: int = 75) -> bytes:
    """(h, w, 3) uint8 as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write(path: Path, slides: dict[str, SlidePicture], references: Sheet | None = None) -> None:
    """Write ``pictures.h5``, whole or not at all.

    Parameters
    ----------
    slides
        Section -> its slide.
    """
    with new_hdf5(path) as file:
        for number, (name, slide) in enumerate(slides.items()):
            group = file.create_group(f"slides/{number}")
            group.attrs["name"] = name
            for key, values in as_arrays(slide).items():
                (group if values.ndim else group.attrs)[key] = values
        if references is not None:
            group = file.create_group("references")
            group["names"] = np.array(references.names, dtype=h5py.string_dtype())
            group["jpeg"] = np.frombuffer(references.jpeg, dtype=np.uint8)


def as_arrays(slide: SlidePicture) -> dict[str, np.ndarray]:
    """`SIZES`; ``cells``, of each its downsample, column, row and bytes; ``jpeg``, these."""
    cells = [(level.downsample, *at, jpeg) for level in slide.levels for at, jpeg in level.cells.items()]
    return {
        **{key: np.array(getattr(slide, key)) for key in SIZES},
        "cells": np.array([(*where, len(jpeg)) for *where, jpeg in cells], dtype=np.int64),
        "jpeg": np.frombuffer(b"".join(jpeg for *_, jpeg in cells), dtype=np.uint8),
    }


def read(path: Path) -> tuple[dict[str, SlidePicture], Sheet | None]:
    """Read ``pictures.h5``; nothing where a folder has none, as one of an earlier version.

    Raises
    ------
    InputError
        The file is damaged.
    """
    if not path.is_file():
        return {}, None
    try:
        with open_hdf5(path, "") as file:
            # h5py holds its lock while groups are gone through, and an error in between would keep it
            groups = list(file.get("slides", {}).values())
            slides = {
                str(group.attrs["name"]): from_arrays(
                    {key: group.attrs[key] for key in SIZES} | {key: group[key][:] for key in ("cells", "jpeg")}
                )
                for group in groups
            }
            references = None
            if "references" in file:
                group = file["references"]
                references = read_sheet(list(group["names"].asstr()[:]), group["jpeg"][:].tobytes())
    except InputError:
        raise
    except Exception as error:  # h5py raises errors of every kind at what is not as `write` wrote it
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read: {reason}; without it the report is made of the rest") from error
    return slides, references


def from_arrays(arrays: Mapping[str, Any]) -> SlidePicture:
    """What `as_arrays` made arrays of; ValueError or KeyError where it made no such."""
    jpeg, cells = arrays["jpeg"], arrays["cells"]
    if jpeg.dtype != np.uint8 or cells.dtype != np.int64 or cells.ndim != 2 or cells.shape[1] != 4:
        raise ValueError("cells are no table of whole numbers, or JPEG no bytes")
    if (cells < 0).any() or (cells[:, [0, 3]] == 0).any() or cells[:, 3].sum() != jpeg.size:
        raise ValueError("cells and JPEG do not fit each other")
    width, height, side_px = (float(arrays[key]) for key in SIZES)
    if not all(0 < value < 2**31 for value in (width, height, side_px)):
        raise ValueError(f"the slide has {width:g} x {height:g} px, and tiles of {side_px:g}")
    levels: dict[int, dict[tuple[int, int], bytes]] = {}
    at = 0
    for downsample, column, row, n in cells.tolist():
        levels.setdefault(downsample, {})[column, row] = jpeg[at : at + n].tobytes()
        at += n
    return SlidePicture(int(width), int(height), side_px, [Level(factor, own) for factor, own in levels.items()])


def read_sheet(names: list[str], jpeg: bytes) -> Sheet:
    """Tiles of references; ValueError where the size of their image, in its header, is not that of their number."""
    if len(names) > BANK_TILES:
        raise ValueError(f"it names {len(names)} tiles, {BANK_TILES} at most are kept")
    with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
        size = image.size
    expected = (SHEET_COLUMNS * SHEET_PX, -(-len(names) // SHEET_COLUMNS) * SHEET_PX)
    if size != expected:
        raise ValueError(f"it has {size[0]} x {size[1]} px, {len(names)} tiles need {expected[0]} x {expected[1]}")
    return Sheet(names, jpeg)


def share_budget(slides: dict[str, SlidePicture], budget: int) -> dict[str, SlidePicture]:
    """Without the finest levels that are over `budget` bytes; of several slides the finest level of all goes first."""
    kept = {name: list(slide.levels) for name, slide in slides.items()}
    while sum(level.n_bytes for levels in kept.values() for level in levels) > budget:
        finest = min((levels for levels in kept.values() if levels), key=lambda levels: levels[-1].downsample)
        finest.pop()
    return {
        name: SlidePicture(slide.width, slide.height, slide.side_px, kept[name])
        for name, slide in slides.items()
        if kept[name]
    }
