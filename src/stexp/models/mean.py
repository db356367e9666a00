"""The training mean, as a method: what others have to beat."""

from __future__ import annotations

import torch

from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.data.rows import column_means, some_rows
from stexp.models.closed_form import LEARNT_FROM, ClosedForm
from stexp.models.method import Prediction


class Mean(ClosedForm):
    """Every spot has the mean expression of the training and validation spots.

    Parameters
    ----------
    n_genes
        G; it comes from the data.
    """

    mean: torch.Tensor  # (G,)

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_genes))

    def fit_to(self, data: SpotDataModule) -> None:
        """Take the mean."""
        self.mean.copy_(torch.from_numpy(column_means(some_rows(data.target, data.rows(*LEARNT_FROM)), "float64")))

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (B, G), the same in every row."""
        return Prediction(self.mean.repeat(len(batch), 1))
