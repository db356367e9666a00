"""Sections joined with their tiles, split by a protocol: tile, expression and position under one index."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from functools import cached_property

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from stexp import InputError, __version__
from stexp.data.augment import AUGMENTATIONS, augment
from stexp.data.batches import ShuffledBatches, SpotBatch, SpotIndex, index_loader, nearest
from stexp.data.genes import choose_panel, normalise
from stexp.data.section import Section
from stexp.data.splits import ROLES, assign_roles
from stexp.data.tiles import TileBank, TileSpec, file_digest, open_tiles
from stexp.protocol import Protocol

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
        See :class:`~stexp.data.tiles.TileSpec`.
    batch_size, eval_batch_size
        Spots of a training batch, and of a batch without gradients.
    augmentation
        ``none``, ``dihedral`` or ``paper``; see :func:`~stexp.data.augment.augment`.
    panel
        A published gene list; None: chosen from the sections the protocol names.
    panel_saw_test
        Whether whoever made the list looked at all sections; the audit says so.
    n_neighbours
        Nearest spots of the same section and role in the context of a spot.
    cache_dir
        Where tiles are kept.
    placement
        See :class:`~stexp.data.tiles.TileBank`.
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
        panel: list[str] | None = None,
        panel_saw_test: bool = True,
        n_neighbours: int = 6,
        cache_dir: str = "cache",
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
        self.protocol, self.fold, self.seed = protocol, fold, seed
        self.tile, self.cache_dir, self.placement = TileSpec(tile_px, tile_um), cache_dir, placement
        self.batch_size, self.eval_batch_size, self.augmentation = batch_size, eval_batch_size, augmentation
        roles = assign_roles(sections, protocol, fold)
        self.sections = [section for section in sections if section.name in roles]
        self.spots = _spot_table(self.sections, roles)
        self.panel, self.panel_sections = self._panel(panel, panel_saw_test)
        self._drop_unmeasured()
        self.section_names = [section.name for section in self.sections]
        self.spots = _spot_table(self.sections, roles)
        self.array_size = 1 + max(int(section.array_xy.max()) for section in self.sections)
        self._load_expression()
        self.neighbours = self._neighbours(n_neighbours)
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
        """The panel and the sections that chose it. Validation spots belong to the training side here."""
        everything = [section.name for section in self.sections]
        if panel is not None:
            chosen_on = everything if saw_test else []
        else:
            chosen_on = everything if self.protocol.panel == "all" else self.names("train", "validation")
            panel = choose_panel(
                [section for section in self.sections if section.name in chosen_on],
                self.protocol,
                measured_in=[section for section in self.sections if section.name in self.names("reference")],
            )
        return panel, chosen_on

    def _drop_unmeasured(self) -> None:
        """Refuse, leave out or warn of sections that do not measure all of the panel, by what they are for."""
        test, training = self.names("test"), self.names("train", "validation")
        left_out = []
        for section in self.sections:
            missing = [gene for gene in self.panel if gene not in section.genes]
            if not missing:
                continue
            text = (
                f"section {section.name} does not measure {len(missing)} of the {len(self.panel)} panel genes "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
            )
            if section.name in training:
                raise InputError(f"{text}; leave the section out (data.sections=) or the genes (data.panel_file=)")
            if section.name in test and len(missing) == len(self.panel):
                raise InputError(f"test section {section.name} measures none of the {len(missing)} panel genes")
            if section.name in test:
                log.warning("%s; they are not scored there", text)
            else:
                left_out.append(section.name)
        if left_out:
            log.warning(
                "%d sections without an image do not measure the whole panel and are not retrieved from: %s",
                len(left_out),
                ", ".join(left_out),
            )
            self.sections = [section for section in self.sections if section.name not in left_out]

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
        out = np.full((len(self.spots), n), -1, dtype=np.int64)
        for _, group in self.spots.reset_index(drop=True).groupby(["section", "role"], sort=False):
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
            "data": self.digest,
        }

    def load_state_dict(self, state: dict) -> None:
        """Refuse a checkpoint that was trained on other data than this module serves."""
        check_checkpoint(state, self.panel, self.tile, self.array_size)
        if state["data"] != self.digest:
            raise InputError("the data changed since this run began; give overwrite=true to start anew")

    @cached_property
    def digest(self) -> str:
        """Hash of what the run learns from: counts, positions, roles and images."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.counts, self.xy_px, self.spots["role"].to_numpy(str)):
            digest.update(np.ascontiguousarray(array).tobytes())
        for section in self.sections:
            digest.update(b"-" if section.slide is None else file_digest(section.slide.path).encode())
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
            store = open_tiles(section, self.tile, self.cache_dir)
            rows = np.flatnonzero(self.spots["section"] == section.name)
            self._bank_row[rows] = start + np.arange(len(rows))
            start += len(rows)
            stores.append(store)
        self.bank = TileBank(stores, self.placement)

    def tiles(self, rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """Tiles of the spots `rows`, (B, px, px, 3) uint8."""
        if self.bank is None:
            self.setup()
        where = self._bank_row[rows]
        if (where < 0).any():
            names = self.spots["section"].iloc[np.asarray(rows)[where < 0]].unique()
            raise InputError(f"spots of {', '.join(names)} have no image to cut tiles from")
        return self.bank.gather(torch.from_numpy(where), torch.device(device))

    def train_dataloader(self) -> DataLoader:
        order = ShuffledBatches(self.rows("train"), self.batch_size, self.seed)
        return index_loader(order, shuffled=order)

    def val_dataloader(self) -> DataLoader | list:
        return self.loader("validation") if len(self.rows("validation")) else []

    def predict_dataloader(self) -> DataLoader:
        return self.loader("test")

    def loader(self, *roles: str, image: bool = True, batch_size: int | None = None) -> DataLoader:
        """Every spot of the roles once, in order, unaugmented."""
        rows = torch.from_numpy(self.rows(*roles))
        return index_loader([SpotIndex(part, image=image) for part in rows.split(batch_size or self.eval_batch_size)])

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
            image = augment(tiles, "none" if index.seed is None else self.augmentation, index.seed or 0)
        around = table["neighbours"][rows]
        context = torch.cat([rows[:, None], around.clamp(min=0)], dim=1)
        mask = torch.cat([torch.ones_like(rows[:, None], dtype=torch.bool), around >= 0], dim=1)
        taken = {name: table[name][rows] for name in ("expression", "target", "counts", "xy_um", "array_xy", "section")}
        return SpotBatch(
            image=image,
            spot=rows,
            context_expression=table["expression"][context],
            context_array_xy=table["array_xy"][context],
            context_mask=mask,
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
            # pandas hands out read-only arrays, which torch does not take
            self._on[device] = {
                name: torch.from_numpy(np.require(array, requirements="W")).to(device) for name, array in arrays.items()
            }
        return self._on[device]


def check_checkpoint(state: dict, panel: list[str], tile: TileSpec, array_size: int) -> None:
    """Raise InputError unless data with this panel, tile and array fits a checkpoint's `state_dict`."""
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


def _spot_table(sections: list[Section], roles: dict[str, np.ndarray]) -> pd.DataFrame:
    parts = []
    for section in sections:
        parts.append(
            pd.DataFrame(
                {
                    "section": section.name,
                    "patient": section.patient,
                    "spot": section.spots.obs_names.to_numpy(str),
                    "role": roles[section.name],
                    "array_x": section.array_xy[:, 0],
                    "array_y": section.array_xy[:, 1],
                    "total_counts": section.total_counts,
                }
            )
        )
    table = pd.concat(parts, ignore_index=True)
    table.index = table["section"] + ":" + table["spot"]
    return table
