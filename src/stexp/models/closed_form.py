"""Base of methods whose training is one calculation."""

from __future__ import annotations

from abc import abstractmethod

from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.models.method import Method

LEARNT_FROM = ("train", "validation")  # roles


class ClosedForm(Method):
    """A method that is fitted at once: ``stexp-train`` gives it one epoch of one batch, in which it calls `fit_to`.

    What it learns it keeps in buffers, so that checkpoints hold it.
    """

    closed_form = True
    fine_tunes = False

    @abstractmethod
    def fit_to(self, data: SpotDataModule) -> None:
        """Learn from `LEARNT_FROM`. Nothing is chosen on validation spots, so they may train, as they do for floors.

        They have no ``val/pearson`` then: it would be in sample.
        """

    def training_step(self, batch: SpotBatch, batch_idx: int) -> None:
        self.fit_to(self.data)

    def configure_optimizers(self) -> None:
        return None
