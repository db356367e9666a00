"""Callbacks of the fit, the same for every method: seeds, validation score, health, a line an epoch."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn.utils import get_total_norm

from stexp.data.datamodule import SpotDataModule
from stexp.evaluation import contrast
from stexp.evaluation.metrics import mean_pearson
from stexp.evaluation.records import read_json
from stexp.files import write_atomically
from stexp.models.gather import gather
from stexp.training.epoch_bar import EpochBar

log = logging.getLogger(__name__)

VALIDATION = "val/pearson"
"""The validation score, by which a checkpoint is the best."""


class ReseedEpochs(pl.Callback):
    """Seed torch anew before every epoch, so that a resumed run draws what an uninterrupted one would.

    Each device draws its own.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        torch.manual_seed(self.seed * 1_000_003 + trainer.current_epoch + (trainer.global_rank << 40))


class ScoreValidation(pl.Callback):
    """Log ``val/pearson``: per gene over the spots of a section, then means, as runs are scored.

    It reads the :class:`~stexp.models.method.Prediction` of the method's ``validation_step``. Of several devices each
    predicts its share of the spots, and all log the score of all spots, by which each decides on the same checkpoint.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, ...]] = []

    def on_validation_batch_end(self, trainer, model, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        tensors = (batch.target, outputs.predicted, batch.section)
        self._parts.append(tuple(tensor.float().cpu() for tensor in tensors))

    def on_validation_epoch_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        parts = [torch.cat(part) for part in zip(*self._parts, strict=True)]
        self._parts.clear()
        if trainer.world_size > 1:
            data: SpotDataModule = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it, undeclared
            n = len(data.rows("validation"))
            parts = [gather(part.to(model.device), n).cpu() for part in parts]
        observed, predicted, section = (part.numpy() for part in parts)
        model.log(VALIDATION, mean_pearson(observed, predicted, section), prog_bar=True)


class Health(pl.Callback):
    """Log, under ``health/``, the norm of the gradient (before clipping), spots per second and peak GPU memory.

    The spots are those of all devices, the memory is that of the first.
    """

    def on_train_epoch_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self._start, self._spots = time.perf_counter(), 0

    def on_before_optimizer_step(self, trainer: pl.Trainer, model: pl.LightningModule, optimizer) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it, undeclared
        if trainer.global_step % every == 0:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            model.log("health/grad_norm", get_total_norm(gradients))

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        self._spots += batch.whole
        self._end = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        model.log("health/spots_per_second", self._spots / (self._end - self._start))
        if model.device.type == "cuda":
            model.log("health/gpu_memory_gb", torch.cuda.max_memory_allocated(model.device) / 1e9)


class RecordContrast(pl.Callback):
    """Keep what a contrastive method logs of its loss beside chance, a row an epoch, in a run's ``contrast.json``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / contrast.NAME
        self._epochs: list[contrast.Epoch] = []
        self._spots = 0

    def on_train_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        begun = trainer.current_epoch
        before = read_json(self.path, contrast.Epochs)["epochs"] if begun and self.path.is_file() else []
        self._epochs = [epoch for epoch in before if epoch["epoch"] <= begun]

    def on_train_epoch_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self._spots = 0

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        self._spots += batch.whole

    def on_train_epoch_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        logged = trainer.callback_metrics
        if not trainer.is_global_zero or "train/log_batch" not in logged:
            return
        values = [float(logged[f"train/{name}"]) for name in ("mean_loss", "log_batch", "matched", "chance")]
        loss, log_batch, matched, chance = values
        self._epochs.append(
            {
                "epoch": trainer.current_epoch + 1,
                "n_spots": self._spots,
                "loss": loss,
                "log_batch": log_batch,
                "matched": matched,
                "chance": chance,
            }
        )
        write_atomically(self.path, json.dumps({"epochs": self._epochs}))


class EpochLines(pl.Callback):
    """One line per epoch: what was logged, and spots per second. On a terminal one bar over all epochs instead."""

    def __init__(self) -> None:
        self._bar: EpochBar | None = None

    def on_train_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        if sys.stderr.isatty() and trainer.is_global_zero and trainer.max_epochs:
            self._bar = EpochBar(trainer.max_epochs, trainer.current_epoch)

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        if self._bar is not None:
            self._bar.show(trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches, _brief(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.show(trainer.current_epoch + 1, _brief(trainer))
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        speed = logged.get("health/spots_per_second")
        log.info(
            "epoch %d/%d  %s%s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            "  ".join(f"{name} {logged[name]:.4f}" for name in sorted(logged) if not name.startswith("health/")),
            "" if speed is None else f"  {speed:.0f} spots/s",
        )

    def on_train_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        if self._bar is not None:
            self._stop()
            log.info("%d epochs  %s", trainer.current_epoch, _brief(trainer))

    def on_exception(self, trainer: pl.Trainer, model: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _brief(trainer: pl.Trainer) -> str:
    """The loss, and the best validation score so far."""
    logged = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
    brief = [f"{name.removeprefix('train/')} {logged[name]:.4f}" for name in logged if name.startswith("train/")]
    callbacks = (each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint))
    best = [each.best_model_score for each in callbacks if each.monitor == VALIDATION]
    scores = [float(score) for score in (*best, logged.get(VALIDATION)) if score is not None]
    return "  ".join(brief + [f"best validation {score:.4f}" for score in sorted(scores)[-1:]])
