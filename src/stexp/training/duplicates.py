"""Copies across train and test that show only in the tiles."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stexp.data.cache import mapped_array
from stexp.data.datamodule import SpotDataModule
from stexp.data.duplicates import N_BITS, copies_by_tiles, copies_in_fold, prints_of, record_spots, tile_prints
from stexp.data.features import TiledSection
from stexp.data.slides.store import file_of

log = logging.getLogger(__name__)

MOST_TILES = 200_000
"""Of more, reading them all for this takes longer than the check is worth beside the counts."""


VERSION = 1
"""Of `tile_prints`, in the names of the files that keep them."""


def compare_tiles(data: SpotDataModule) -> dict[str, np.ndarray]:
    """Add to `data.copies` the sections that share tiles; InputError where these are not allowed.

    Returns
    -------
    dict
        Section -> `tile_prints` of its spots; empty where there are too many tiles to be read for this.
    """
    sections = [(tiled, _file_of_prints(tiled)) for tiled in data.tiled()]
    if sum(len(tiled.rows) for tiled, path in sections if not path.exists()) > MOST_TILES:
        log.info("copies were looked for among the counts only: there are more than %d tiles", MOST_TILES)
        return {}
    prints = {tiled.section.name: _kept_prints(data, tiled, path) for tiled, path in sections}
    seen = {(copy.first, copy.second) for copy in data.copies}
    copies = copies_in_fold(copies_by_tiles(prints, set(data.names("test"))), data.spots, data.allow_duplicates)
    data.copies += [copy for copy in copies if (copy.first, copy.second) not in seen]
    return prints


def _file_of_prints(tiled: TiledSection) -> Path:
    """Where the `tile_prints` of a section are kept, in the cache beside its tiles."""
    store = file_of(tiled.store)
    stain = "" if tiled.stain is None else f"-{tiled.stain[0]}"
    return store.parents[1] / "prints" / f"{store.stem}{stain}-v{VERSION}.npy"


def _kept_prints(data: SpotDataModule, tiled: TiledSection, path: Path) -> np.ndarray:
    """`tile_prints` of a section, (n_spots, 112) bool, calculated once and kept as bits."""

    def compute() -> np.ndarray:
        parts = np.array_split(tiled.rows, -(-len(tiled.rows) // data.eval_batch_size))
        return np.packbits(np.concatenate([tile_prints(data.tiles(part).numpy()) for part in parts]), axis=1)

    path.parent.mkdir(parents=True, exist_ok=True)
    packed = mapped_array(path, (len(tiled.rows), N_BITS // 8), compute, kind="u")
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
