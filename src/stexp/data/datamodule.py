"""Sections joined with their tiles, split by a protocol: tile, expression and position under one index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from stexp import __version__
from stexp.arguments import Count, OpenShare, Pixels, Positive, Seed, Whole, checked
from stexp.data.augment import Augmentation, augment
from stexp.data.batches import SpotBatch, SpotIndex, SpotTables, neighbours_within
from stexp.data.cohorts import batch_effects
from stexp.data.duplicates import copies_by_counts, copies_in_fold
from stexp.data.expression import ExpressionTable, PanelCounts, expression_of
from stexp.data.features import (
    SpotFeatures,
    Surroundings,
    TiledSection,
    TileEncoder,
    draw_views,
    encode_subtiles,
    encode_surroundings,
    encode_tiles,
    encode_views,
    required,
    tiled_sections,
)
from stexp.data.genes import drop_unmeasured, panel_of_fold
from stexp.data.identity import check_checkpoint, check_stain, data_digest
from stexp.data.loaders import SpotLoaders
from stexp.data.parallel import on_all_cores
from stexp.data.rows import Rows
from stexp.data.section import Section
from stexp.data.slides.stain import StainNormaliser, check_method
from stexp.data.slides.tiles import TileBank, TileSpec, open_tiles, warn_of_scales
from stexp.data.splits import assign_roles, role_lines, spot_table
from stexp.errors import InputError
from stexp.protocol import Protocol

_BatchSize = Annotated[
    int, Field(ge=2, le=2**20, description="a whole number of at least 2 (a contrastive batch compares spots)")
]


class SpotDataModule(SpotLoaders):
    """Sections, joined with their tiles, split by a protocol, served as batches.

    The loaders carry indices only; tiles are gathered, augmented and scaled on the device, after the transfer of the
    batch.

    Parameters
    ----------
    sections
        All sections of the data set; those without an image serve as references.
    protocol, fold
        What is held out, and what may be seen; see :class:`~stexp.protocol.Protocol`.
    tile_px, tile_um, scales, scales_um
        See :meth:`stexp.data.slides.tiles.TileSpec.of`.
    batch_size, eval_batch_size
        Spots of a training batch, over all devices, and of a batch without gradients.
    augmentation
        ``none``, ``dihedral``, ``paper`` or ``hed``; see :func:`~stexp.data.augment.augment`.
    hed_sigma
        Strength of ``hed``.
    views
        Augmented views of each training tile whose frozen features are kept, one of which is drawn in each epoch;
        None: tiles are augmented anew. For methods that read such features in place of tiles.
    stain
        None or ``macenko``; see :class:`~stexp.data.slides.stain.StainNormaliser`.
    panel
        A published gene list; None: chosen from the sections the protocol names.
    panel_saw_test
        Whether whoever made the list looked at all sections; the audit says so.
    allow_duplicates
        Whether a copy of a held-out section may train; `copies` has them.
    n_neighbours
        Nearest spots of the same section and role in the context of a spot.
    cache_dir
        Where tiles are kept.
    tile_store
        ``raw`` or ``jpeg``; see :func:`~stexp.data.slides.tiles.open_tiles`.
    placement
        See :class:`~stexp.data.slides.tiles.TileBank`.
    encoder
        Frozen image encoder that computes `features` and `surroundings`.
    seed
        Order of spots and augmentation.

    Attributes
    ----------
    spots : DataFrame
        Every spot of the fold: section, patient, spot, role, array_x, array_y, total_counts.
    panel : list of str
        Predicted genes.
    counts, expression, target : RowTable, (n_spots, G) float32
        Raw counts; what a spot encoder reads; the truth on the scale of the protocol. ``target[rows]`` makes those
        rows, ``np.asarray(target)`` all of them.
    array_size : int
        Largest array coordinate + 1: the rows a learned position table needs.

    Notes
    -----
    What a batch is, and which part of the spots this device has, the loaders ask the attached trainer: its method's
    ``batching``, its rank and its number of devices. Prediction is of all test spots, by one device. Of a method that
    reads of a tile only what `encoder` makes of it, batches come without `image`, unless tiles are augmented anew.
    """

    @checked("data")
    def __init__(
        self,
        sections: list[Section],
        protocol: Protocol,
        fold: str,
        *,
        tile_px: Pixels = 224,
        tile_um: Positive | None = None,
        scales: list[Positive] | None = None,
        scales_um: list[Positive] | None = None,
        batch_size: _BatchSize = 128,
        eval_batch_size: Count = 256,
        augmentation: Augmentation = "paper",
        hed_sigma: OpenShare = 0.05,
        views: Count | None = None,
        stain: str | None = None,
        panel: Sequence[str] | None = None,
        panel_saw_test: bool = True,
        allow_duplicates: bool = False,
        n_neighbours: Whole = 6,
        cache_dir: str | Path = "cache",
        tile_store: Literal["raw", "jpeg"] = "raw",
        placement: Literal["auto", "device", "pinned", "disk"] = "auto",
        encoder: TileEncoder | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        if stain is not None:
            check_method(stain)
        self.protocol, self.fold, self.seed = protocol, fold, seed
        self.tile = TileSpec.of(tile_px, tile_um, scales, scales_um)
        self.cache_dir, self.placement = cache_dir, placement
        self.batch_size, self.eval_batch_size, self.augmentation = batch_size, eval_batch_size, augmentation
        self.hed_sigma, self.stain, self.tile_store, self.views = hed_sigma, stain, tile_store, views
        roles = assign_roles(sections, protocol, fold, self.tile.side_px)
        self.sections = [section for section in sections if section.name in roles]
        self.spots = spot_table(self.sections, roles)
        self.panel, self.panel_saw = panel_of_fold(self.sections, self.spots, protocol, panel, panel_saw_test)
        measuring = drop_unmeasured(self.sections, self.panel, self.names("test"), self.names("train", "validation"))
        if len(measuring) < len(self.sections):
            self.sections, self.spots = measuring, spot_table(measuring, roles)
        self.allow_duplicates = allow_duplicates
        self.copies = copies_in_fold(copies_by_counts(self.sections), self.spots, allow_duplicates)
        self.section_names = [section.name for section in self.sections]
        self._with_image = [section for section in self.sections if section.slide is not None]
        self.array_size = 1 + max(int(section.array_xy.max()) for section in self.sections)
        self._panel_counts = PanelCounts.of(self.sections, self.panel)
        self.counts, self.expression, self.target = expression_of(self._panel_counts, protocol)
        self._starts = dict(zip(self.section_names, np.cumsum([0, *map(len, self.sections)]).tolist(), strict=False))
        self.xy_px = np.concatenate([section.xy_px for section in self.sections])
        self.xy_um = np.concatenate([section.xy_um for section in self.sections])
        self.neighbours = neighbours_within(self.spots, self.xy_px, n_neighbours)
        self.encoder = encoder
        self._features: SpotFeatures | None = None
        self._surroundings: dict[int, Surroundings] = {}
        self.bank: TileBank | None = None
        self._bank_row = np.full(len(self.spots), -1, dtype=np.int64)

    # what the fold consists of

    def rows(self, *roles: str) -> np.ndarray:
        """Rows of `spots` that have one of the roles, in order of section and spot."""
        return np.flatnonzero(self.spots["role"].isin(roles))

    def names(self, *roles: str) -> list[str]:
        """Sections that have spots of one of the roles."""
        return list(self.spots["section"].iloc[self.rows(*roles)].unique())

    def rows_of(self, section: Section) -> np.ndarray:
        """Rows of `spots` that are a section's, in its order."""
        start = self._starts[section.name]
        return np.arange(start, start + len(section))

    def under(self, protocol: Protocol) -> ExpressionTable:
        """The truth under another protocol, (n_spots, G), row by row as `target` is."""
        return ExpressionTable(self._panel_counts, protocol)

    def summary(self) -> list[str]:
        """Lines for the log: spots and sections of each role, the panel, the size of the array."""
        lines = role_lines(self.spots)
        n_without = len(self.sections) - len(self._with_image)
        if n_without:
            lines.append(
                f"{n_without} section(s) have counts but no image; they can be retrieved from (model.reference=all)"
            )
        lines.append(f"panel: {len(self.panel)} genes; array: {self.array_size} x {self.array_size}")
        return [*lines, *batch_effects(self.sections, self.panel)]

    def state_dict(self) -> dict:
        """Facts about the data, for checkpoints of a model that is trained on it; plain values."""
        return {
            "stexp": __version__,
            "panel": self.panel,
            "protocol": asdict(self.protocol),
            "fold": self.fold,
            "tile_px": self.tile.px,
            "tile_um": self.tile.um,
            "array_size": self.array_size,
            "stain": self.normaliser and self.normaliser.state(),
            "data": self.digest,
        }

    def load_state_dict(self, state: dict) -> None:
        """Refuse a checkpoint that was trained on other data than this module serves."""
        check_checkpoint(state, self.panel, self.tile, self.array_size)
        check_stain(state, self.stain)
        if state["data"] != self.digest:
            raise InputError("the data changed since this run began; give overwrite=true to start anew")

    @cached_property
    def digest(self) -> str:
        """Hash of what a run learns from; see :func:`~stexp.data.identity.data_digest`."""
        arrays = (self.target, self.counts, self.xy_px)
        return data_digest(self.sections, self.spots, arrays, self.tile, self.stain, self.tile_store)

    def setup(self, stage: str | None = None) -> None:
        """Cut or open the tiles of all sections with an image, and compute or read their features."""
        self.open_tiles()
        if self.encoder is not None and self._features is None:
            self._features = encode_tiles(self.encoder, self.tiled(), len(self.spots))

    def open_tiles(self) -> TileBank:
        """Cut or open the tiles of all sections with an image."""
        if self.bank is not None:
            return self.bank
        warn_of_scales(self._with_image, self.tile)
        kept = (self.tile, self.cache_dir, self.tile_store)
        n, what = len(self._with_image), "sections with tiles"
        stores = on_all_cores(self._with_image, n, what, lambda section: open_tiles(section, *kept))
        has_tile = self.spots["section"].isin([section.name for section in self._with_image]).to_numpy()
        self._bank_row[has_tile] = np.arange(has_tile.sum())
        self.bank = TileBank(stores, self.placement)
        return self.bank

    def tiles(self, rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """Tiles of the spots `rows`, (B, px, px, 3) uint8, their stain normalised if `stain` says so."""
        bank = self.open_tiles()
        bank_rows = self._bank_row[rows]
        if (bank_rows < 0).any():
            names = self.spots["section"].iloc[np.asarray(rows)[bank_rows < 0]].unique()
            raise InputError(f"spots of {', '.join(names)} have no image to cut tiles from")
        tiles = bank.gather(torch.from_numpy(bank_rows), torch.device(device))
        if self.normaliser is None:
            return tiles
        return self.normaliser(tiles, torch.from_numpy(np.searchsorted(bank.starts, bank_rows, side="right") - 1))

    @cached_property
    def normaliser(self) -> StainNormaliser | None:
        """Stain normalisation of the sections with an image, in their order; None without `stain`."""
        if self.stain is None:
            return None
        bank = self.open_tiles()
        names = [section.name for section in self._with_image]
        trained_on = (self.spots["role"] == "train").to_numpy()[self._bank_row >= 0]
        return StainNormaliser.fit(self.stain, names, bank.stores, np.split(trained_on, bank.starts[1:-1]))

    @property
    def features(self) -> SpotFeatures | None:
        """Frozen features of every spot's tile, (n_spots, F) float32, NaN without an image; None without encoder."""
        if self.encoder is not None:
            self.setup()
        return self._features

    @property
    def tile_features(self) -> SpotFeatures:
        """`features` of a data module with an encoder."""
        return required(self.features)

    @property
    def n_features(self) -> int | None:
        """F of `features`."""
        return None if self.encoder is None else self.encoder.num_features

    def surroundings(self, k: int) -> Surroundings:
        """Frozen features of the k x k tiles around every spot (k odd), computed or opened at the first call."""
        if k not in self._surroundings:
            encoder, sections = required(self.encoder), self.tiled()
            self._surroundings[k] = encode_surroundings(encoder, sections, len(self.spots), self.tile, k)
        return self._surroundings[k]

    def subtiles(self, k: int) -> Surroundings:
        """Frozen features of the k x k parts of every spot's own tile, computed or opened."""
        return encode_subtiles(required(self.encoder), self.tiled(), len(self.spots), k)

    def tiled(self) -> Iterator[TiledSection]:
        """Sections with an image, and their tiles as methods see them."""
        rows = [self.rows_of(section) for section in self._with_image]
        return tiled_sections(self._with_image, self.open_tiles().stores, rows, self.normaliser)

    # batches

    def on_after_batch_transfer(self, batch: SpotIndex, dataloader_idx: int) -> SpotBatch:
        return self.batch(batch, self._device)

    def batch(self, index: SpotIndex, device: torch.device | str = "cpu") -> SpotBatch:
        """Gather the spots of `index` on `device`."""
        device = torch.device(device)
        kind = "none" if index.seed is None else self.augmentation
        if index.image:
            image = augment(self.tiles(index.rows.numpy(), device), kind, index.seed or 0, self.hed_sigma)
            return self._tables.take(index, image, device)
        batch = self._tables.take(index, None, device)
        if self.views and index.seed is not None and kind != "none":
            batch.features = draw_views(self._view_features, index.rows, index.seed).to(device)
        return batch

    @cached_property
    def _view_features(self) -> list[SpotFeatures]:
        """Frozen features of the augmented views of training tiles, (n_spots, F) of each view."""
        training = set(self.names("train"))
        sections = [tiled for tiled in self.tiled() if tiled.section.name in training]
        kind = (self.augmentation, self.hed_sigma)
        return encode_views(required(self.encoder), sections, len(self.spots), *kind, self.views or 0)

    @cached_property
    def _tables(self) -> SpotTables:
        tables: dict[str, Rows] = {
            "expression": self.expression,
            "target": self.target,
            "counts": self.counts,
            "xy_um": self.xy_um,
            "array_xy": self.spots[["array_x", "array_y"]].to_numpy(np.int64),
            "section": pd.Categorical(self.spots["section"], categories=self.section_names).codes.astype(np.int64),
        }
        if self.features is not None:
            tables["features"] = self.features
        return SpotTables(tables, self.neighbours)
