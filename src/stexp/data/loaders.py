"""What a data module's loaders carry: rows of spots, in whose order a method trains, validates and predicts."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from stexp.data.augment import Augmentation
from stexp.data.batches import Batching, SectionBatches, ShuffledBatches, SpotIndex, index_loader, part_of
from stexp.data.features import TileEncoder


class SpotLoaders(pl.LightningDataModule):
    """Loaders of a fold, which ask the attached trainer's method what a batch is, and what of a tile it reads."""

    spots: pd.DataFrame
    batch_size: int
    eval_batch_size: int
    augmentation: Augmentation
    views: int | None
    encoder: TileEncoder | None
    seed: int

    @abstractmethod
    def rows(self, *roles: str) -> np.ndarray:
        """Rows of `spots` that have one of the roles, in order of section and spot."""

    def train_dataloader(self) -> DataLoader:
        """Training spots in a random order: this device's part of each batch, or whole sections."""
        own = self.trainer and self.trainer.lightning_module.frozen_encoder  # sees tiles augmented anew
        image = not self._reads_features or (own is not None and self.augmentation != "none" and not self.views)
        if self._batching == "section":
            return index_loader(SectionBatches(self._by_section("train"), self.seed, image=image))
        return index_loader(ShuffledBatches(self.rows("train"), self.batch_size, self.seed, self._share, image=image))

    def val_dataloader(self) -> DataLoader | list:
        """This device's part of the validation spots; no loader where there are none."""
        if not len(self.rows("validation")):
            return []
        return self.loader("validation", batching=self._batching, share=self._share)

    def predict_dataloader(self) -> DataLoader:
        """All test spots."""
        return self.loader("test", batching=self._batching)

    @property
    def _batching(self) -> Batching:
        if self.trainer is None:
            return "spots"
        return self.trainer.lightning_module.batching  # type: ignore[return-value]  # of a Method, a layer above

    @property
    def _reads_features(self) -> bool:
        """Whether the attached method reads of a tile nothing but its `features`."""
        if self.trainer is None or self.encoder is None:
            return False
        return self.trainer.lightning_module.reads_features_of(self.encoder)  # type: ignore[operator]  # of a Method

    @property
    def _share(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def loader(
        self,
        *roles: str,
        image: bool | None = None,
        batch_size: int | None = None,
        batching: Batching = "spots",
        share: tuple[int, int] = (0, 1),
    ) -> DataLoader:
        """Every spot of some roles once, in order and unaugmented; with its tile, if the attached method reads tiles.

        A batch is `batch_size` spots (None: `eval_batch_size`) of the part that `share`, rank and number of devices,
        gives this device; or, with ``batching="section"``, one whole section.
        """
        if batching == "section":
            parts = [torch.from_numpy(rows) for rows in self._by_section(*roles)]
        else:
            rows = torch.from_numpy(self.rows(*roles))
            parts = rows[part_of(len(rows), *share)].split(batch_size or self.eval_batch_size)
        image = not self._reads_features if image is None else image
        return index_loader([SpotIndex(part, image=image) for part in parts])

    def _by_section(self, *roles: str) -> list[np.ndarray]:
        rows = self.rows(*roles)
        section = pd.factorize(self.spots["section"].to_numpy()[rows])[0]
        return np.split(rows, np.flatnonzero(np.diff(section)) + 1) if len(rows) else []

    def transfer_batch_to_device(self, batch: SpotIndex, device: torch.device, dataloader_idx: int) -> SpotIndex:
        self._device = device
        return batch
