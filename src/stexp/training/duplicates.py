"""Copies across train and test that show only in the tiles."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from stexp.data.datamodule import SpotDataModule
from stexp.data.duplicates import N_BITS, copies_by_tiles, copies_in_fold, prints_of, record_spots, tile_prints
from stexp.data.features import TiledSection

log = logging.getLogger(__name__)

PRINTS = "prints-v1"
"""Name of `tile_prints` in the cache; its version is raised when the same tile has another."""
MOST_TILES = 200_000
"""Of more, reading them all for this takes longer than the check is worth beside the counts."""


def compare_tiles(data: SpotDataModule) -> dict[str, np.ndarray]:
    """Add to `data.copies` the sections that share tiles; InputError where these are not allowed.

    Returns
    -------
    dict
        Section -> `tile_prints` of its spots; empty where there are too many tiles to be read for this.
    """
    tiled = list(data.tiled())
    if sum(len(part.rows) for part in tiled if not part.file_of(PRINTS).exists()) > MOST_TILES:
        log.info("copies were looked for among the counts only: there are more than %d tiles", MOST_TILES)
        return {}
    prints = {part.section.name: _prints(part) for part in tiled}
    seen = {(copy.first, copy.second) for copy in data.copies}
    copies = copies_in_fold(copies_by_tiles(prints, set(data.names("test"))), data.spots, data.allow_duplicates)
    data.copies += [copy for copy in copies if (copy.first, copy.second) not in seen]
    return prints


def _prints(part: TiledSection) -> np.ndarray:
    """`tile_prints` of a section, kept as bits."""
    packed = part.measured(PRINTS, N_BITS // 8, lambda tiles: np.packbits(tile_prints(tiles), axis=1), "u")
    return np.unpackbits(packed, axis=1).astype(bool)


def training_record(
    data: SpotDataModule, tiles: Mapping[str, np.ndarray], references: Sequence[str] = ()
) -> dict[str, dict[str, list[str]]]:
    """Hashes of spots of each section that trains, validates or is retrieved from, by which it is known again later.

    Parameters
    ----------
    references
        Sections that the method retrieves from.
    """
    names = {*data.names("train", "validation"), *references}
    return {
        section.name: record_spots(prints_of(section), tiles.get(section.name))
        for section in data.sections
        if section.name in names
    }
