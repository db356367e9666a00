"""Sections joined with their tiles, split by a protocol: tile, expression and position under one index."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from stexp import __version__
from stexp.data.augment import AUGMENTATIONS, augment
from stexp.data.batches import SectionBatches, ShuffledBatches, SpotBatch, SpotIndex, index_loader, nearest, part_of
from stexp.data.genes import choose_panel, drop_unmeasured, normalise
from stexp.data.section import Section
from stexp.data.slides.stain import METHODS, StainNormaliser
from stexp.data.slides.store import SUFFIXES
from stexp.data.slides.tiles import TileBank, TileSpec, file_digest, open_tiles
from stexp.data.splits import ROLES, assign_roles, spot_table
from stexp.errors import InputError
from stexp.protocol import Protocol
from stexp.training.checkpoints import check_checkpoint

if TYPE_CHECKING:
    from stexp.models.encoders.features import Surroundings

log = logging.getLogger(__name__)


class SpotDataModule(pl.LightningDataModule):
    """Sections, joined with their tiles, split by a protocol, served as batches.

    The loaders carry indices only; tiles are gathered, augmented and scaled on the device, after the
    transfer of the batch.

    Parameters
    ----------
    sections
        All sections of the data set; those without an image serve as references.
    protocol, fold
        What is held out, and what may be seen; see :class:`~stexp.protocol.Protocol`.
    tile_px, tile_um
        See :class:`~stexp.data.slides.tiles.TileSpec`.
    batch_size, eval_batch_size
        Spots of a training batch, over all devices, and of a batch without gradients.
    augmentation
        ``none``, ``dihedral``, ``paper`` or ``hed``; see :func:`~stexp.data.augment.augment`.
    hed_sigma
        Strength of ``hed``.
    stain
        None, ``reinhard`` or ``macenko``; see :class:`~stexp.data.slides.stain.StainNormaliser`.
    panel
        A published gene list; None: chosen from the sections the protocol names.
    panel_saw_test
        Whether whoever made the list looked at all sections; the audit says so.
    n_neighbours
        Nearest spots of the same section and role in the context of a spot.
    cache_dir
        Where tiles are kept.
    tile_store
        ``raw`` or ``jpeg``; see :func:`~stexp.data.slides.tiles.open_tiles`.
    placement
        See :class:`~stexp.data.slides.tiles.TileBank`.
    seed
        Order of spots and augmentation.

    Attributes
    ----------
    spots : DataFrame
        Every spot of the fold: section, patient, spot, role, array_x, array_y, total_counts.
    panel : list of str
        Predicted genes.
    array_size : int
        Largest array coordinate + 1: the rows a learned position table needs.
    batching : str
        What a batch is: ``"spots"``, drawn from all sections, or one whole ``"section"``, as the method says.
    features : (n_spots, F) float32 or None
        Of the tiles, from the frozen image encoder; set by what trains, handed out in batches.
    surroundings : Surroundings or None
        The same of the tiles around each spot, for a method that has an attribute `surroundings`, tiles a side.
    share : (int, int)
        Rank and number of devices that train together: training batches and validation spots are split among them.
    """

    def __init__(
        self,
        sections: list[Section],
        protocol: Protocol,
        fold: str,
        *,
        tile_px: int = 224,
        tile_um: float | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        augmentation: str = "paper",
        hed_sigma: float = 0.05,
        stain: str | None = None,
        panel: list[str] | None = None,
        panel_saw_test: bool = True,
        n_neighbours: int = 6,
        cache_dir: str = "cache",
        tile_store: str = "raw",
        placement: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("tile_px", tile_px, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("n_neighbours", n_neighbours, 0),
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value}: a whole number of at least {least} would fit")
        if batch_size < 2:
            raise InputError(f"data.batch_size={batch_size}: a contrastive batch needs at least 2 spots")
        if augmentation not in AUGMENTATIONS:
            raise InputError(f"data.augmentation={augmentation}: choose {', '.join(AUGMENTATIONS)}")
        if not isinstance(hed_sigma, int | float) or not 0 <= hed_sigma < 1:
            raise InputError(f"data.hed_sigma={hed_sigma}: a number from 0 to below 1 would fit")
        if tile_store not in SUFFIXES:
            raise InputError(f"data.tile_store={tile_store}: choose {' or '.join(SUFFIXES)}")
        if stain not in (None, *METHODS):
            raise InputError(f"data.stain={stain}: choose null, {', '.join(METHODS)}")
        self.protocol, self.fold, self.seed = protocol, fold, seed
        self.tile, self.cache_dir, self.placement = TileSpec(tile_px, tile_um), cache_dir, placement
        self.batch_size, self.eval_batch_size, self.augmentation = batch_size, eval_batch_size, augmentation
        self.hed_sigma, self.stain, self.tile_store = hed_sigma, stain, tile_store
        roles = assign_roles(sections, protocol, fold, self.tile.side_px)
        self.sections = [section for section in sections if section.name in roles]
        self.spots = spot_table(self.sections, roles)
        self.panel, self.panel_saw = self._panel(panel, panel_saw_test)
        self.sections = drop_unmeasured(
            self.sections, self.panel, self.names("test"), self.names("train", "validation")
        )
        self.section_names = [section.name for section in self.sections]
        self.spots = spot_table(self.sections, roles)
        self.array_size = 1 + max(int(section.array_xy.max()) for section in self.sections)
        self._load_expression()
        self.neighbours = self._neighbours(n_neighbours)
        self.batching, self.share = "spots", (0, 1)
        self.features: np.ndarray | None = None
        self.surroundings: Surroundings | None = None
        self.bank: TileBank | None = None
        self._bank_row = np.full(len(self.spots), -1, dtype=np.int64)
        self._on: dict[torch.device, dict[str, torch.Tensor]] = {}

    # what the fold consists of

    def rows(self, *roles: str) -> np.ndarray:
        """Rows of `spots` that have one of the roles, in order of section and spot."""
        return np.flatnonzero(self.spots["role"].isin(roles))

    def names(self, *roles: str) -> list[str]:
        """Sections that have spots of one of the roles."""
        return list(self.spots["section"].iloc[self.rows(*roles)].unique())

    def summary(self) -> list[str]:
        """What trains, validates, is predicted and is only retrieved from, a line each."""
        lines = []
        for role in ROLES:
            names, n = self.names(role), len(self.rows(role))
            if n:
                lines.append(f"{role}: {n} spots of {len(names)} section(s): {', '.join(names)}")
        without = [section.name for section in self.sections if section.slide is None]
        if without:
            lines.append(
                f"{len(without)} section(s) have counts but no image; they can be retrieved from (model.reference=all)"
            )
        lines.append(f"panel: {len(self.panel)} genes; array: {self.array_size} x {self.array_size}")
        return lines

    def _panel(self, panel: list[str] | None, saw_test: bool) -> tuple[list[str], list[str]]:
        """The panel and the test sections that chose it. Validation spots belong to the training side here."""
        if panel is not None:
            return panel, self.names("test") if saw_test else []
        saw_test, choosing = self.protocol.panel == "all", []
        for section in self.sections:
            role = self.spots["role"].to_numpy()[self.spots["section"] == section.name]
            chooses = np.ones(len(role), bool) if saw_test else np.isin(role, ("train", "validation"))
            if chooses.any():
                choosing.append(section.take(chooses))
        referenced = [section for section in self.sections if section.name in self.names("reference")]
        panel = choose_panel(choosing, self.protocol, measured_in=referenced)
        return panel, self.names("test") if saw_test else []

    def _load_expression(self) -> None:
        counts, expression, target, xy_um = [], [], [], []
        for section in self.sections:
            c = section.counts(self.panel)
            counts.append(c)
            expression.append(normalise(c, section.total_counts, self.protocol, "spot"))
            target.append(normalise(c, section.total_counts, self.protocol))
            xy_um.append(section.xy_px * (np.nan if section.um_per_px is None else section.um_per_px))
        self.counts, self.expression, self.target = (np.concatenate(x) for x in (counts, expression, target))
        self.xy_um = np.concatenate(xy_um).astype(np.float32)
        self.xy_px = np.concatenate([section.xy_px for section in self.sections])

    def _neighbours(self, n: int) -> np.ndarray:
        """(N, n) rows of the nearest spots on the array, same section and role; -1 where there are none."""
        groups = self.spots.reset_index(drop=True).groupby(["section", "role"], sort=False)
        n = min(n, int(groups.size().max()) - 1)  # no spot has more
        out = np.full((len(self.spots), n), -1, dtype=np.int64)
        for _, group in groups:
            rows = group.index.to_numpy()
            out[rows, : min(n, len(rows) - 1)] = rows[nearest(self.xy_px[rows], n)]
        return out

    def state_dict(self) -> dict:
        """What a checkpoint must know about the data it was trained on; plain values."""
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
        stain = (state.get("stain") or {}).get("method")
        if stain != self.stain:
            raise InputError(
                f"the checkpoint was trained with data.stain={stain or 'null'}, not {self.stain or 'null'}"
            )
        if state["data"] != self.digest:
            raise InputError("the data changed since this run began; give overwrite=true to start anew")

    @cached_property
    def digest(self) -> str:
        """Hash of what the run learns from: counts, positions, roles, images and how their stain is normalised."""
        digest = hashlib.blake2b((self.stain or "").encode(), digest_size=16)
        array_xy = self.spots[["array_x", "array_y"]].to_numpy()
        sides = np.array([0 if s.slide is None else self.tile.side_px(s) for s in self.sections])
        for array in (self.target, self.counts, self.xy_px, array_xy, sides, self.spots["role"].to_numpy(str)):
            digest.update(np.ascontiguousarray(array).tobytes())
        for section in self.sections:
            digest.update(b"-" if section.slide is None else file_digest(section.slide.path).encode())
        if self.tile_store != "raw":
            digest.update(self.tile_store.encode())
        return digest.hexdigest()

    # tiles and loaders

    def setup(self, stage: str | None = None) -> None:
        """Cut or open the tiles of all sections with an image."""
        if self.bank is not None:
            return
        scales = [section.um_per_px for section in self.sections if section.slide is not None and section.um_per_px]
        if self.tile.um is None and scales and max(scales) > 1.1 * min(scales):
            log.warning(
                "tiles of %d raw pixels show between %.0f and %.0f um of tissue; data.tile_um gives them one size",
                self.tile.px,
                self.tile.px * min(scales),
                self.tile.px * max(scales),
            )
        stores, start = [], 0
        for section in self.sections:
            if section.slide is None:
                continue
            store = open_tiles(section, self.tile, self.cache_dir, self.tile_store)
            rows = np.flatnonzero(self.spots["section"] == section.name)
            self._bank_row[rows] = start + np.arange(len(rows))
            start += len(rows)
            stores.append(store)
        self.bank = TileBank(stores, self.placement)

    def tiles(self, rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """Tiles of the spots `rows`, (B, px, px, 3) uint8, their stain normalised if `stain` says so."""
        self.setup()
        where = self._bank_row[rows]
        if (where < 0).any():
            names = self.spots["section"].iloc[np.asarray(rows)[where < 0]].unique()
            raise InputError(f"spots of {', '.join(names)} have no image to cut tiles from")
        tiles = self.bank.gather(torch.from_numpy(where), torch.device(device))
        if self.normaliser is None:
            return tiles
        return self.normaliser(tiles, torch.from_numpy(np.searchsorted(self.bank.starts, where, side="right") - 1))

    @cached_property
    def normaliser(self) -> StainNormaliser | None:
        """What `stain` asks for, of the sections with an image, in their order."""
        if self.stain is None:
            return None
        self.setup()
        names = [section.name for section in self.sections if section.slide is not None]
        trained_on = (self.spots["role"] == "train").to_numpy()[self._bank_row >= 0]
        return StainNormaliser.fit(self.stain, names, self.bank.stores, np.split(trained_on, self.bank.starts[1:-1]))

    def train_dataloader(self) -> DataLoader:
        if self.batching == "section":
            order = SectionBatches(self._by_section("train"), self.seed)
        else:
            order = ShuffledBatches(self.rows("train"), self.batch_size, self.seed, self.share)
        return index_loader(order, shuffled=order)

    def val_dataloader(self) -> DataLoader | list:
        return self.loader("validation", share=self.share) if len(self.rows("validation")) else []

    def predict_dataloader(self) -> DataLoader:
        return self.loader("test")

    def loader(self, *roles: str, image=True, batch_size: int | None = None, share=(0, 1)) -> DataLoader:
        """Every spot of the roles once, in order, unaugmented; in batches of `batch_size`, or as `batching` says."""
        if self.batching == "section" and batch_size is None:
            parts = [torch.from_numpy(rows) for rows in self._by_section(*roles)]
        else:
            rows = torch.from_numpy(self.rows(*roles))
            parts = rows[part_of(len(rows), *share)].split(batch_size or self.eval_batch_size)
        return index_loader([SpotIndex(part, image=image) for part in parts])

    def _by_section(self, *roles: str) -> list[np.ndarray]:
        rows = self.rows(*roles)
        names = self.spots["section"].to_numpy()[rows]
        return [rows[names == name] for name in self.names(*roles)]

    def transfer_batch_to_device(self, batch: SpotIndex, device: torch.device, dataloader_idx: int) -> SpotIndex:
        self._device = device
        return batch

    def on_after_batch_transfer(self, batch: SpotIndex, dataloader_idx: int) -> SpotBatch:
        return self.batch(batch, self._device)

    def batch(self, index: SpotIndex, device: torch.device | str = "cpu") -> SpotBatch:
        """Gather the spots of `index` on `device`."""
        device = torch.device(device)
        table = self._tables(device)
        rows = index.rows.to(device)
        image = None
        if index.image:
            tiles = self.tiles(index.rows.numpy(), device)
            kind = "none" if index.seed is None else self.augmentation
            image = augment(tiles, kind, index.seed or 0, self.hed_sigma)
        around = table["neighbours"][rows]
        context = torch.cat([rows[:, None], around.clamp(min=0)], dim=1)
        mask = torch.cat([torch.ones_like(rows[:, None], dtype=torch.bool), around >= 0], dim=1)
        taken = {name: table[name][rows] for name in ("expression", "target", "counts", "xy_um", "array_xy", "section")}
        if "features" in table:
            taken["features"] = table["features"][rows]
        return SpotBatch(
            image=image,
            spot=rows,
            context_expression=table["expression"][context],
            context_array_xy=table["array_xy"][context],
            context_mask=mask,
            whole=index.whole or len(rows),
            **taken,
        )

    def _tables(self, device: torch.device) -> dict[str, torch.Tensor]:
        if device not in self._on:
            codes = pd.Categorical(self.spots["section"], categories=self.section_names).codes
            arrays = {
                "expression": self.expression,
                "target": self.target,
                "counts": self.counts,
                "xy_um": self.xy_um,
                "array_xy": self.spots[["array_x", "array_y"]].to_numpy(np.int64),
                "section": codes.astype(np.int64),
                "neighbours": self.neighbours,
            }
            if self.features is not None:
                arrays["features"] = self.features
            # pandas hands out read-only arrays, which torch does not take
            self._on[device] = {
                name: torch.from_numpy(np.require(array, requirements="W")).to(device) for name, array in arrays.items()
            }
        return self._on[device]
