"""Base of methods that predict by retrieval: the embedding of a tile searches those of reference spots."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from stexp.arguments import Count, checked
from stexp.data.batches import SpotBatch, SpotIndex, tensor_or_rows
from stexp.data.datamodule import SpotDataModule
from stexp.data.rows import Rows, some_rows
from stexp.errors import InputError
from stexp.evaluation.metrics import mean_pearson
from stexp.models.correction import (
    AT_MOST,
    CORRECTION_EPOCHS,
    Correction,
    Retrieved,
    fit_correction,
    without_itself,
)
from stexp.models.encoders.image import ImageEncoder
from stexp.models.losses import beside_chance
from stexp.models.method import Method, Prediction, References
from stexp.models.prototypes import Prototypes, stand_for
from stexp.models.retrieval import Distance, Reference, ReferenceIndex, Weighting, choose_references, retrieve

K_CANDIDATES = (5, 10, 25, 50, 100, 200, 400, 800)
RETRIEVED_FROM = ("train", "validation", "reference")  # roles, when the test spots are predicted
DEFAULT_K = 50  # while k is "auto" and not yet chosen


class RetrievalMethod(Method):
    """A method whose prediction is the expression of the reference spots nearest to a tile in a shared space.

    A method that inherits sets `image_encoder`, `image_projection`, `lr` and `weight_decay`, of AdamW, and defines
    :meth:`embed_batch_spots` and ``training_step``. One that embeds more than a tile's pooled features overrides
    `frozen_encoder` and :meth:`embed_tiles`.

    Parameters
    ----------
    k, distance, weighting
        See :meth:`ReferenceIndex.search`. ``k="auto"``: that of a few with the best Pearson correlation on the
        validation spots. None of them touches the encoders.
    reference
        Training-side sections retrieved from: ``image`` (those with an image), ``all``, or names of sections.
    """

    image_encoder: ImageEncoder
    image_projection: nn.Module
    lr: float
    weight_decay: float

    reference_batch = 1024
    """Spots that are embedded in one call for the reference."""

    @checked("model")
    def __init__(
        self, k: Count | Literal["auto"], distance: Distance, weighting: Weighting, reference: Reference
    ) -> None:
        super().__init__()
        self.k, self.distance, self.weighting, self.reference = k, distance, weighting, reference
        self.correction: Correction | None = None
        self.prototypes: Prototypes | None = None
        self._index: ReferenceIndex | None = None  # searched, set before validation and prediction
        self._reference_target: torch.Tensor | Rows | None = None  # (N, G), the expression of its spots

    def correct(self, n_dims: int, n_genes: int) -> None:
        """Correct what is retrieved by a residual, see :class:`~stexp.models.correction.Correction`.

        Neighbours then count by their similarity, whatever `weighting` says.
        """
        self.weighting, self.correction = "similarity", Correction(n_dims, n_genes)

    def learn_prototypes(self, n: int, n_dims: int) -> None:
        """Search `n` prototypes instead of spots, see :class:`~stexp.models.prototypes.Prototypes`."""
        if self.correction is not None:
            raise InputError(
                "model.correct=true learns from spots that are retrieved without themselves, which prototypes cannot "
                "leave out; model.prototypes=null would fit"
            )
        if self.k != "auto" and self.k > n:
            raise InputError(f"model.k={self.k}, but there are {n} prototypes; choose 1 to {n}, or more prototypes")
        self.prototypes = Prototypes(n, n_dims)

    def with_prototypes(
        self, loss: torch.Tensor, image: torch.Tensor, spot: torch.Tensor, temperature: float | torch.Tensor
    ) -> torch.Tensor:
        """The contrastive loss of a batch, and that of its prototypes where the method learns any."""
        if self.prototypes is None:
            return loss
        own = self.prototypes(image, spot, temperature)
        self.log("train/prototypes", own, on_step=False, on_epoch=True, batch_size=len(image))
        return loss + own

    @property
    def frozen_encoder(self) -> ImageEncoder | None:
        return self.image_encoder if self.image_encoder.frozen else None

    def embed_image(self, image: torch.Tensor) -> torch.Tensor:
        """Tiles (B, 3, H, W), RGB in 0..1, to embeddings (B, D)."""
        return self.embed_features(self.image_encoder(image))

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features of tiles (B, F) to embeddings (B, D)."""
        return self.image_projection(features)

    def embed_tiles(self, batch: SpotBatch) -> torch.Tensor:
        """Tiles of a batch to embeddings (B, D), by their features where it comes without images."""
        return self.embed_features(batch.tile_features) if batch.image is None else self.embed_image(batch.image)

    @abstractmethod
    def embed_batch_spots(self, batch: SpotBatch) -> torch.Tensor:
        """Spots of a batch to embeddings (B, D)."""

    def log_beside_chance(self, info_nce: torch.Tensor, image: torch.Tensor, spot: torch.Tensor) -> None:
        """Log means over the epoch of what :func:`~stexp.models.losses.beside_chance` says of a batch."""
        n = len(image)
        for name, value in beside_chance(info_nce, image, spot).items():
            shown = name != "mean_loss"
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, prog_bar=shown, batch_size=n)

    @property
    def _searched(self) -> tuple[ReferenceIndex, torch.Tensor | Rows]:
        """What `set_reference` set: the index, and the expression of its spots, (N, G)."""
        if self._index is None or self._reference_target is None:
            raise RuntimeError("set_reference says what is searched, and was not called")
        return self._index, self._reference_target

    def on_fit_start(self) -> None:
        """Refuse before training what retrieval could not do after it."""
        data = self.data
        if self.k == "auto" and len(data.rows("validation")) == 0:
            raise InputError("model.k=auto needs validation spots; give a number, or protocol.validation=true")
        for roles in (self.validation_roles(), RETRIEVED_FROM):
            n = len(choose_references(data.spots.iloc[data.rows(*roles)], self.reference))
            if self.k != "auto" and self.k > n:
                raise InputError(f"k={self.k}, but there are {n} reference spots; choose 1 to {n}")
        n = len(data.rows("train"))
        if self.prototypes is not None and len(self.prototypes) > n:
            raise InputError(f"model.prototypes={len(self.prototypes)}, but {n} spots train; choose 1 to {n}")

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Place prototypes that are nowhere yet at training spots, drawn by the seed of the data."""
        if self.prototypes is None or self.prototypes.started:
            return
        rows, n = self.data.rows("train"), len(self.prototypes)
        rows = np.sort(np.random.default_rng(self.data.seed).choice(rows, n, replace=False))
        parts = (SpotIndex(part, image=False) for part in torch.from_numpy(rows).split(self.reference_batch))
        self.prototypes.start(torch.cat([self.embed_batch_spots(self.data.batch(i, self.device)) for i in parts]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)

    def validation_roles(self) -> tuple[str, ...]:
        """Roles that are retrieved from, when validation spots are predicted."""
        # validation spots must not retrieve themselves; sections without an image only where they are asked for
        return ("train",) if self.reference == "image" else ("train", "reference")

    def on_validation_start(self) -> None:
        self.set_reference(self.data, *self.validation_roles())

    def on_predict_start(self) -> None:
        self.set_reference(self.data, *RETRIEVED_FROM)

    @torch.no_grad()
    def set_reference(self, data: SpotDataModule, *roles: str) -> None:
        """Embed the training-side spots of the given roles that `reference` admits, and search among them.

        Of a method with prototypes, these are searched that the spots belong to.
        """
        loader = data.loader(*roles, image=False, batch_size=self.reference_batch)
        rows = data.rows(*roles)
        embedding = torch.cat([self.embed_batch_spots(data.batch(index, self.device)).float() for index in loader])
        chosen = choose_references(data.spots.iloc[rows], self.reference)
        table = data.spots.iloc[rows[chosen]]
        searched = embedding if len(chosen) == len(rows) else embedding[torch.from_numpy(chosen).to(embedding.device)]
        sections, prototype = list(table["section"].unique()), None
        if self.prototypes is None:
            self._reference_target = tensor_or_rows(some_rows(data.target, rows[chosen]), self.device)
        else:
            prototype = self.prototypes.assign(embedding).cpu().numpy()
            standing = stand_for(prototype[chosen], searched, table)
            self._reference_target = standing.mean(torch.from_numpy(data.target[rows[chosen]]).to(self.device))
            searched, table = standing.embedding, standing.names
        self._index = ReferenceIndex(searched, table["section"].to_numpy(str), table["patient"].to_numpy(str))
        self.references = References(rows, embedding, sections, rows[chosen], prototype)

    def retrieved(self, batch: SpotBatch) -> Prediction:
        """Expression (B, G) as it is retrieved, its spread among the neighbours, where it came from, the embedding."""
        query = self.embed_tiles(batch).float()
        index, target = self._searched
        made = retrieve(index, query, target, self._k(index), self.distance, self.weighting)
        return replace(made, image_embedding=query)

    def _k(self, index: ReferenceIndex) -> int:
        k = DEFAULT_K if self.k == "auto" else self.k
        # prototypes that no reference belongs to are not there
        return min(k, len(index)) if self.k == "auto" or self.prototypes is not None else k

    def validation_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:  # type: ignore[override]
        """What is retrieved: while the encoders train there is no correction."""
        return self.retrieved(batch)

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """`retrieved`, corrected where the method corrects."""
        made = self.retrieved(batch)
        if self.correction is None:
            return made
        assert made.image_embedding is not None
        return replace(made, predicted=made.predicted + self.correction(made.image_embedding))

    @torch.no_grad()
    def tune(self, data: SpotDataModule) -> dict:
        """Choose k on the validation spots where it is ``auto``; returns what was chosen, for the record."""
        if self.k != "auto":
            return {"k": self.k}
        rows = data.rows("validation")
        self.eval()
        self.set_reference(data, *self.validation_roles())
        query = self._embed_role(data, "validation")
        index, target = self._searched
        candidates = [k for k in K_CANDIDATES if k <= len(index)] or [len(index)]
        observed, section = data.target[rows], data.spots["section"].to_numpy(str)[rows]
        score: dict[int, float] = {}
        for k, neighbours in index.search_for(query, candidates, self.distance, self.weighting).items():
            predicted, _ = index.average(neighbours, target, spread=False)
            score[k] = mean_pearson(observed, predicted.cpu().numpy(), section)
        best = max(score, key=lambda k: (round(score[k], 4), k))  # ties: the larger, the steadier
        self.k = best
        return {"k": best, "k_validation_pearson": {str(k): round(value, 4) for k, value in score.items()}}

    def _embed_role(self, data: SpotDataModule, role: str) -> torch.Tensor:
        """Embeddings (N, D) of the tiles of all spots of a role, as they are."""
        with self.trainer.precision_plugin.forward_context():
            batches = (data.batch(index, self.device) for index in data.loader(role))
            return torch.cat([self.embed_tiles(batch).float() for batch in batches])

    @torch.no_grad()
    def finish(self, data: SpotDataModule) -> dict:
        """Train the correction on training spots, each retrieved without itself; returns the epoch it is of."""
        if self.correction is None:
            return {}
        self.eval()
        self.set_reference(data, *self.validation_roles())
        index, expression = self._searched
        assert self.references is not None  # by set_reference
        place = torch.full((len(data.spots),), -1, device=self.device)
        place[self.references.retrieved_rows] = torch.arange(len(index), device=self.device)
        k = self._k(index)
        parts: dict[str, Retrieved] = {}
        for role in ("train", "validation"):
            rows = data.rows(role)
            if not len(rows):
                continue
            query = self._embed_role(data, role)
            if role == "train":
                some = slice(None, None, -(-len(rows) // AT_MOST))
                rows, query = rows[some], query[some]
                neighbours = index.search(query, min(k + 1, len(index)), self.distance, self.weighting)
                neighbours = without_itself(neighbours, place[rows])
            else:
                neighbours = index.search(query, k, self.distance, self.weighting)
            estimate, _ = index.average(neighbours, expression, spread=False)
            target = torch.from_numpy(data.target[rows]).to(self.device)
            parts[role] = Retrieved(query, estimate, target, data.spots["section"].to_numpy(str)[rows])
        epoch = fit_correction(self.correction, parts["train"], parts.get("validation"), data.seed)
        return {CORRECTION_EPOCHS: epoch}
