"""Base of retrieval methods whose loss tells a tile's own spot from others: its objective and its negatives."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from stexp.data.batches import SpotBatch
from stexp.errors import InputError
from stexp.models.losses import info_nce
from stexp.models.negatives import Negatives, Origin
from stexp.models.objectives import (
    Candidates,
    Objective,
    TargetTemperature,
    chance_level,
    check_objective,
    contrastive_loss,
)
from stexp.models.retrieval import Distance, Reference, Weighting
from stexp.models.retrieval_method import RetrievalMethod


class ContrastiveMethod(RetrievalMethod):
    """A retrieval method that trains with :meth:`contrast`.

    Parameters
    ----------
    k, distance, weighting, reference
        See :class:`~stexp.models.retrieval_method.RetrievalMethod`.
    n_dims
        D of the embeddings.
    objective
        See :func:`~stexp.models.objectives.contrastive_loss`.
    negatives_memory, mask_within_um
        See :class:`~stexp.models.negatives.Negatives`.
    normalise, temperature
        Of the method's embeddings and critic, which not every objective goes with.
    """

    several_devices = True

    def __init__(
        self,
        k: int | Literal["auto"],
        distance: Distance,
        weighting: Weighting,
        reference: Reference,
        *,
        n_dims: int,
        objective: Objective,
        negatives_memory: int,
        mask_within_um: float,
        normalise: bool,
        temperature: float,
    ) -> None:
        super().__init__(k, distance, weighting, reference)
        check_objective(objective, normalise, temperature, negatives_memory)
        self.objective: Objective = objective
        self.normalise = normalise
        self.negatives = Negatives(n_dims, negatives_memory, mask_within_um)

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        return self._finish(super().embed_features(features))

    def _finish(self, embedding: torch.Tensor) -> torch.Tensor:
        return F.normalize(embedding, dim=-1) if self.normalise else embedding

    def on_fit_start(self) -> None:
        super().on_fit_start()
        rows = self.data.rows("train")
        unmeasured = rows[np.isnan(self.data.xy_um[rows]).any(axis=1)]
        if self.negatives.mask_within_um and len(unmeasured):
            name = self.data.spots["section"].iloc[unmeasured[0]]
            raise InputError(
                f"model.mask_within_um={self.negatives.mask_within_um:g}: the scale of section {name} is not known; "
                f"data.um_per_px= gives it, 0 masks nothing"
            )

    def on_train_start(self) -> None:
        """Forget what is in the memory, unless a training goes on: its rows are of other data."""
        super().on_train_start()
        if self.trainer.global_step == 0:
            self.negatives.forget()

    def contrast(
        self,
        image: torch.Tensor,
        spot: torch.Tensor,
        batch: SpotBatch,
        temperature: float | torch.Tensor,
        image_weight: float = 0.5,
        target_temperature: TargetTemperature = "divide",
    ) -> torch.Tensor:
        """Loss of the whole batch by the objective, logged beside that of embeddings that carry nothing.

        Parameters
        ----------
        image, spot : (B, D)
            Embeddings of the whole batch; see :func:`~stexp.models.gather.gather`.

        Notes
        -----
        ``train/loss_by_chance`` is the chance level of the objective, where there is one. Beside log(batch) stands
        InfoNCE of the same embeddings with all pairs of the batch, whatever is trained with.
        """
        n = len(image)
        if self.negatives.plain:
            candidates = Candidates.of_batch(image, spot)
        else:
            origin = Origin.of(batch)
            candidates = self.negatives.candidates(image, spot, origin)
            self.negatives.keep(image, spot, origin)
        loss = contrastive_loss(self.objective, candidates, temperature, image_weight, target_temperature)
        self.log("train/loss", loss, prog_bar=True, batch_size=n)
        if self.objective == "infonce" and self.negatives.plain:
            self.log_beside_chance(loss, image, spot)
            return loss
        by_chance = chance_level(self.objective, candidates.negative)
        if by_chance is not None:
            self.log("train/loss_by_chance", by_chance, on_step=False, on_epoch=True, batch_size=n)
        with torch.no_grad():
            self.log_beside_chance(info_nce(image, spot, temperature, image_weight), image, spot)
        return loss
