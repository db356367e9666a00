"""What a trainer is seen to do with a method, for a dry run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from stexp.data.datamodule import SpotDataModule
from stexp.models.method import Prediction


class Watch(pl.Callback):
    """What a trainer is seen to do with a method."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.reached: set[str] = set()
        self.validated: Any = None
        self.training: list[str] = []
        self.spots: list[int] = []

    def on_before_backward(self, trainer: pl.Trainer, model: pl.LightningModule, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach())

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        if not self.losses and isinstance(outputs, Mapping) and "loss" in outputs:
            self.losses.append(outputs["loss"].detach())  # of optimisation by hand

    def on_after_backward(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self.reached |= {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    def on_train_epoch_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        # further steps are only for parts that train later
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        trainer.should_stop = trained <= self.reached or not self.losses

    def on_validation_batch_end(self, trainer, model, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.validated = outputs if outputs is not None else "nothing"

    def on_predict_batch_start(self, trainer, model, batch, batch_idx, dataloader_idx=0) -> None:
        self.spots.append(len(batch))

    def on_predict_batch_end(self, trainer, model, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.training = [name or "the method" for name, module in model.named_modules() if module.training]


class HideTruth(pl.Callback):
    """Batches of prediction whose measured expression is not what was measured."""

    def on_predict_batch_start(self, trainer, model, batch, batch_idx, dataloader_idx=0) -> None:
        for name in ("expression", "target", "counts", "context_expression"):
            setattr(batch, name, getattr(batch, name) + 100.0)


@contextmanager
def truth_hidden(data: SpotDataModule) -> Iterator[None]:
    """Data whose held-out spots have another expression than what was measured, in all its tables."""
    names = ("counts", "expression", "target")
    measured = {name: getattr(data, name) for name in names}
    held_out = data.rows("test")
    for name, table in measured.items():
        other = np.array(table)
        other[held_out] += 100.0
        setattr(data, name, other)
    try:
        yield
    finally:
        for name, table in measured.items():
            setattr(data, name, table)


def misfits(part: Prediction, n: int, genes: int) -> list[str]:
    """What of a prediction has another shape than its spots and genes say."""
    predicted = part.predicted
    if not isinstance(predicted, torch.Tensor) or not predicted.is_floating_point():
        return [f"Prediction.predicted is {type(predicted).__name__}; floating point numbers (spots, genes) would fit"]
    out = []
    for name, value in (("predicted", predicted), ("uncertainty", part.uncertainty)):
        if value is not None and tuple(value.shape) != (n, genes):
            out.append(f"{name} has the shape {tuple(value.shape)}; {n} spots x {genes} genes, {(n, genes)}, would fit")
    for name in ("obs", "image_embedding", "neighbours", "neighbour_weights"):
        value = getattr(part, name)
        if value is not None and len(value) != n:
            out.append(f"{name} has {len(value)} rows; {n}, one a spot, would fit")
    return out
