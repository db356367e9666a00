"""Tiles of a run's data, for pictures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stexp.data.datamodule import SpotDataModule


def tiles_of(data: SpotDataModule, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Tiles of the spots `rows`, (px, px, 3) uint8, one by one, in bounded memory."""
    for start in range(0, len(rows), data.eval_batch_size):
        yield from data.tiles(rows[start : start + data.eval_batch_size]).numpy()


def with_image(data: SpotDataModule) -> np.ndarray:
    """Which spots are of a section that has an image, (n_spots,)."""
    names = [section.name for section in data.sections if section.slide is not None]
    return data.spots["section"].isin(names).to_numpy()
