"""What happens around training, the same for every method."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytorch_lightning as pl
import torch

from stexp.metrics import mean_pearson

log = logging.getLogger(__name__)


class ReseedEpochs(pl.Callback):
    """Seed torch anew before every epoch, so that a resumed run draws what an uninterrupted one would."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        torch.manual_seed(self.seed * 1_000_003 + trainer.current_epoch)


class ScoreValidation(pl.Callback):
    """Log ``val/pearson``: per gene over the spots of a section, then means, as runs are scored.

    It reads ``{"predicted": (B, G)}`` from the method's ``validation_step``.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[np.ndarray, ...]] = []

    def on_validation_batch_end(self, trainer, model, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        tensors = (batch.target, outputs["predicted"], batch.section)
        self._seen.append(tuple(tensor.float().cpu().numpy() for tensor in tensors))

    def on_validation_epoch_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        observed, predicted, section = (np.concatenate(part) for part in zip(*self._seen, strict=True))
        self._seen.clear()
        model.log("val/pearson", mean_pearson(observed, predicted, section), prog_bar=True)


class EpochLines(pl.Callback):
    """One line per epoch: what was logged, and spots per second. A terminal gets a progress bar besides."""

    def on_train_epoch_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self._start, self._spots = time.perf_counter(), 0

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        self._spots += len(batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        logged = "  ".join(f"{name} {float(value):.4f}" for name, value in sorted(trainer.callback_metrics.items()))
        log.info(
            "epoch %d/%d  %s  %.0f spots/s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            logged,
            self._spots / (time.perf_counter() - self._start),
        )
