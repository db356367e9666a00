"""Which data a model was trained on: kept in its checkpoints, compared with the data it meets."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd

from stexp.data.digests import file_digest
from stexp.data.rows import Rows, blocks
from stexp.data.section import Section
from stexp.data.slides.tiles import TileSpec
from stexp.errors import InputError


def data_digest(
    sections: list[Section],
    spots: pd.DataFrame,
    arrays: tuple[Rows, ...],
    tile: TileSpec,
    stain: str | None,
    tile_store: str,
) -> str:
    """Hash of what a run learns from: counts, positions, roles, images, and how their tiles are made.

    Parameters
    ----------
    spots
        As :func:`~stexp.data.splits.spot_table` makes it.
    arrays
        Expression on the scale of the truth, raw counts, and positions in pixels.
    """
    digest = hashlib.blake2b((stain or "").encode(), digest_size=16)
    array_xy = spots[["array_x", "array_y"]].to_numpy()
    sides = np.array([0 if section.slide is None else tile.side_px(section) for section in sections])
    for array in (*arrays, array_xy, sides, spots["role"].to_numpy(str)):
        for block in blocks(len(array)):  # one after the other they are the bytes of the whole
            digest.update(np.ascontiguousarray(array[block]).tobytes())
    for section in sections:
        digest.update(b"-" if section.slide is None else file_digest(section.slide.path).encode())
    if tile_store != "raw":
        digest.update(tile_store.encode())
    return digest.hexdigest()


def check_checkpoint(state: dict, panel: list[str], tile: TileSpec, array_size: int) -> None:
    """InputError unless data with this panel, tile and array fits the data state of a checkpoint."""
    missing = [gene for gene in state["panel"] if gene not in set(panel)]
    if missing:
        raise InputError(
            f"the checkpoint predicts {len(state['panel'])} genes, {len(missing)} of them are not in the panel of this "
            f"data: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    if state["panel"] != panel:
        raise InputError(
            f"the checkpoint predicts {len(state['panel'])} genes, the panel of this data has {len(panel)}, "
            f"or another order"
        )
    if (state["tile_px"], state["tile_um"]) != (tile.px, tile.um):
        raise InputError(
            f"the checkpoint was trained on tiles of {state['tile_px']} px ({state['tile_um']} um), "
            f"not {tile.px} px ({tile.um} um)"
        )
    if array_size > state["array_size"]:
        raise InputError(
            f"the checkpoint knows array coordinates below {state['array_size']}, this data goes up to {array_size - 1}"
        )


def check_stain(state: dict, stain: str | None) -> None:
    """InputError unless the data state of a checkpoint is of this stain normalisation."""
    trained = (state.get("stain") or {}).get("method")
    if trained != stain:
        raise InputError(f"the checkpoint was trained with data.stain={trained or 'null'}, not {stain or 'null'}")
