"""Features of tiles by a frozen image encoder, laid out by the spots of a data module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch

from stexp.data.augment import Augmentation
from stexp.data.cache import kept_array
from stexp.data.progress import track
from stexp.data.rows import Rows, RowTable
from stexp.data.section import Section
from stexp.data.slides.stain import StainNormaliser
from stexp.data.slides.store import TileStore, file_of
from stexp.data.slides.tiles import TileSpec, around

MEASURED_AT_ONCE = 64  # tiles
Encoded = TypeVar("Encoded")
Stain = tuple[str, Callable[[torch.Tensor], torch.Tensor]]
"""A stain normalisation of one section: its key in the cache, and what it makes of tiles (B, px, px, 3) uint8."""


@dataclass(frozen=True)
class View:
    """One augmentation of all tiles, drawn once, so that features of it can be kept; see `augment`."""

    augmentation: Augmentation
    hed_sigma: float
    number: int

    @property
    def key(self) -> str:
        """Its name in the cache."""
        sigma = f"{self.hed_sigma:g}" if self.augmentation == "hed" else ""
        return f"{self.augmentation}{sigma}-view{self.number}"


class TileEncoder(Protocol):
    """A frozen image encoder; a context manager, inside of which it encodes."""

    @property
    def num_features(self) -> int:
        """F."""
        ...

    def of_tiles(
        self, section: Section, store: TileStore, stain: Stain | None = None, view: View | None = None
    ) -> np.ndarray:
        """Features of a section's tiles as they are, or of an augmented view, (n_spots, F) float32, memory-mapped."""
        ...

    def of_surroundings(
        self, section: Section, store: TileStore, spec: TileSpec, k: int, stain: Stain | None = None
    ) -> np.ndarray:
        """Features of the k x k tiles around each spot, (n_spots, k * k, F) float32; zero beyond the image."""
        ...

    def at_random_weights(self) -> Iterator[TileEncoder]:
        """Encoders of the same architecture at random weights, each of another seed."""
        ...

    def of_subtiles(self, section: Section, store: TileStore, k: int, stain: Stain | None = None) -> np.ndarray:
        """Features of the k x k parts of each spot's own tile, (n_spots, k * k, F) float32."""
        ...

    def is_of(self, encoder: torch.nn.Module) -> bool:
        """Whether another encoder would give the same features."""
        ...

    def __enter__(self) -> TileEncoder: ...

    def __exit__(self, *error: object) -> None: ...


@dataclass(frozen=True)
class TiledSection:
    """A section with an image, as a data module serves it."""

    section: Section
    rows: np.ndarray  # (n_spots,) of SpotDataModule.spots
    store: TileStore
    stain: Stain | None

    def measured(
        self, name: str, width: int, measure: Callable[[np.ndarray], np.ndarray], kind: str = "f"
    ) -> np.ndarray:
        """A measure of every tile, (n_spots, width), calculated once.

        Parameters
        ----------
        name
            Of the measure, with a version that is raised when the same tile gives other values.
        measure
            Tiles (n, px, px, 3) uint8, their stain normalised where it is, to (n, width).
        kind
            Of its numbers, as NumPy abbreviates it.
        """
        path, n = self.file_of(name), len(self.store)
        path.parent.mkdir(parents=True, exist_ok=True)

        def compute() -> np.ndarray:
            rows = np.split(np.arange(n), range(MEASURED_AT_ONCE, n, MEASURED_AT_ONCE))
            done = track(rows, n, f"section {self.section.name}: {name} of tiles", size=len)
            parts = (torch.from_numpy(np.array(self.store[part])) for part in done)
            return np.concatenate([measure((self.stain[1](part) if self.stain else part).numpy()) for part in parts])

        return kept_array(path, (n, width), compute, kind)

    def file_of(self, name: str) -> Path:
        """Where a measure of the tiles is kept: in ``measures`` beside the folder of the tile store."""
        store = file_of(self.store)
        stain = f"-{self.stain[0]}" if self.stain else ""
        return store.parents[1] / "measures" / f"{store.stem}{stain}-{name}.npy"


class SpotFeatures(RowTable):
    """Frozen features of every spot's tile, (N, F) float32, read from the cache as asked for; NaN without an image.

    Parameters
    ----------
    parts
        Of each section with an image, (n_spots, F), memory-mapped.
    rows
        Which of the N spots those are.
    """

    def __init__(self, parts: Sequence[np.ndarray], rows: Sequence[np.ndarray], shape: tuple[int, int]) -> None:
        self._parts, self.shape = list(parts), shape
        self._section = np.full(shape[0], -1, dtype=np.int32)
        self._row = np.zeros(shape[0], dtype=np.int32)
        for number, own in enumerate(rows):
            self._section[own], self._row[own] = number, np.arange(len(own))

    def take(self, rows: np.ndarray) -> np.ndarray:
        out = np.full((len(rows), self.shape[1]), np.nan, dtype=np.float32)
        section = self._section[rows]
        order = np.argsort(section, kind="stable")  # each section is read once
        for group in np.split(order, np.flatnonzero(np.diff(section[order])) + 1):
            if len(group) and section[group[0]] >= 0:
                out[group] = self._parts[section[group[0]]][self._row[rows[group]]]
        return out


class Surroundings:
    """Frozen features of the k x k tiles around each spot of a data module, or of the k x k parts of its own tile, read
    from the cache as asked for.

    Attributes
    ----------
    inside : (n_spots, k * k) bool
        Which of the tiles lie inside the image, as all parts of a spot's own do; none of a spot without an image.
    """

    def __init__(self, parts: list[np.ndarray], inside: np.ndarray) -> None:
        self._parts, self.inside = parts, inside
        self._starts = np.cumsum([0] + [len(part) for part in parts])
        self._row = np.cumsum(inside.any(axis=1)) - 1  # among the spots with an image: the middle is always inside

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Those of the spots `rows` (B,) of ``data.spots``, all with an image: (B, k * k, F) float32."""
        out = np.empty((len(rows), *self._parts[0].shape[1:]), dtype=np.float32)
        with_image = self._row[rows]
        section = np.searchsorted(self._starts, with_image, side="right") - 1
        for i in np.unique(section):
            in_section = section == i
            out[in_section] = self._parts[i][with_image[in_section] - self._starts[i]]
        return out


def tiled_sections(
    sections: Sequence[Section],
    stores: Sequence[TileStore],
    rows: Sequence[np.ndarray],
    normaliser: StainNormaliser | None,
) -> Iterator[TiledSection]:
    """Sections with an image and their tiles, in order; their stain normalised where there is a normaliser of them.

    Parameters
    ----------
    rows
        Those of each section's spots.
    """
    for i, (section, store, own) in enumerate(zip(sections, stores, rows, strict=True)):
        stain = None if normaliser is None else (normaliser.key(i), partial(_normalise, normaliser, i))
        yield TiledSection(section, own, store, stain)


def _normalise(normaliser: StainNormaliser, i: int, tiles: torch.Tensor) -> torch.Tensor:
    """Tiles of the i-th section, in the stain of the others."""
    return normaliser(tiles, torch.full((len(tiles),), i))


def required(value: Encoded | None) -> Encoded:
    """An encoder or its features, of a data module that must have them; ValueError where it has none."""
    if value is None:
        raise ValueError("features of tiles need a data module with an encoder")
    return value


def encode_tiles(
    encoder: TileEncoder, sections: Iterable[TiledSection], n_spots: int, view: View | None = None
) -> SpotFeatures:
    """Features of every spot's tile, (n_spots, F) float32; NaN for spots of other sections."""
    parts, rows = [], []
    with encoder:
        for tiled in sections:
            parts.append(encoder.of_tiles(tiled.section, tiled.store, tiled.stain, view))
            rows.append(tiled.rows)
    return SpotFeatures(parts, rows, (n_spots, encoder.num_features))


def draw_views(views: Sequence[Rows], rows: torch.Tensor, seed: int) -> torch.Tensor:
    """Features of spots, (B, F), each from one of V views (n_spots, F); the draws depend on `seed` alone."""
    draws = torch.randint(len(views), (len(rows),), generator=torch.Generator().manual_seed(seed)).numpy()
    out = np.empty((len(rows), views[0].shape[1]), dtype=np.float32)
    for number in np.unique(draws):
        out[draws == number] = views[number][rows.numpy()[draws == number]]
    return torch.from_numpy(out)


def encode_views(
    encoder: TileEncoder,
    sections: Sequence[TiledSection],
    n_spots: int,
    augmentation: Augmentation,
    hed_sigma: float,
    n_views: int,
) -> list[SpotFeatures]:
    """Features of `n_views` augmented views of every spot's tile, (n_spots, F) float32 each."""
    views = [View(augmentation, hed_sigma, number) for number in range(n_views)]
    return [encode_tiles(encoder, sections, n_spots, view) for view in views]


def encode_surroundings(
    encoder: TileEncoder, sections: Iterable[TiledSection], n_spots: int, spec: TileSpec, k: int
) -> Surroundings:
    """Features of the k x k tiles around every spot, its own in the middle (k odd)."""
    parts, inside = [], np.zeros((n_spots, k * k), dtype=bool)
    with encoder:
        for tiled in sections:
            inside[tiled.rows] = around(tiled.section, spec, k)[1]
            parts.append(encoder.of_surroundings(tiled.section, tiled.store, spec, k, tiled.stain))
    return Surroundings(parts, inside)


def encode_subtiles(encoder: TileEncoder, sections: Iterable[TiledSection], n_spots: int, k: int) -> Surroundings:
    """Features of the k x k parts of every spot's own tile."""
    parts, inside = [], np.zeros((n_spots, k * k), dtype=bool)
    with encoder:
        for tiled in sections:
            inside[tiled.rows] = True
            parts.append(encoder.of_subtiles(tiled.section, tiled.store, k, tiled.stain))
    return Surroundings(parts, inside)
