"""The probe of HEST-Benchmark: ridge regression on a frozen image encoder (Jaume et al. 2024, arXiv 2406.16192)."""

from __future__ import annotations

from typing import Literal

import torch

from stexp.arguments import Count, Positive, checked
from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.data.rows import some_rows
from stexp.evaluation.ridge import RidgeProbe
from stexp.models.closed_form import LEARNT_FROM, ClosedForm
from stexp.models.method import Prediction


class HestRidge(ClosedForm):
    """Frozen features, standardised, 256 principal components, ridge; one linear map once fitted.

    Parameters
    ----------
    n_genes, n_features
        G and F; they come from the data and the image encoder.
    n_components
        Principal components kept, at most the number of training spots and of features.
    penalty
        ``hest``: 100 / (components x genes), as published; ``gcv``: by generalised cross-validation, as the floor
        ``ridge_features`` has it; or a number.
    intercept
        False: none, as the published code has it. The components are centred, so that predictions differ by the
        training mean alone: correlations are the same, errors are not.

    Notes
    -----
    The published code finds the components by a randomised method and stops the ridge's iterations (LSQR) at a
    relative tolerance of 1e-4; both are exact here.
    """

    centre: torch.Tensor  # (F,)
    slope: torch.Tensor  # (F, G)
    mean: torch.Tensor  # (G,)

    @checked("model")
    def __init__(
        self,
        n_genes: int,
        n_features: int,
        *,
        n_components: Count = 256,
        penalty: Literal["hest", "gcv"] | Positive = "hest",
        intercept: bool = True,
    ) -> None:
        super().__init__()
        self.n_components, self.penalty, self.intercept = n_components, penalty, intercept
        self.register_buffer("centre", torch.zeros(n_features))
        self.register_buffer("slope", torch.zeros(n_features, n_genes))
        self.register_buffer("mean", torch.zeros(n_genes))

    def fit_to(self, data: SpotDataModule) -> None:
        """Fit the linear map to the features and expression of training and validation spots."""
        rows = data.rows(*LEARNT_FROM)
        features, target = some_rows(data.tile_features, rows), some_rows(data.target, rows)
        probe = RidgeProbe.fit(features, target, self.n_components, self.penalty)
        self.centre.copy_(torch.from_numpy(probe.centre))
        self.slope.copy_(torch.from_numpy(probe.slope))
        if self.intercept:
            self.mean.copy_(torch.from_numpy(probe.mean))

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (B, G)."""
        features = batch.tile_features
        with torch.autocast(features.device.type, enabled=False):  # slopes of opposite sign cancel
            return Prediction(torch.addmm(self.mean, features - self.centre, self.slope))
