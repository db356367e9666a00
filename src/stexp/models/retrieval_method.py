"""Base of methods that predict by retrieval: the embedding of a tile searches those of reference spots."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Literal

import torch

from stexp.arguments import Count, checked
from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.evaluation.metrics import mean_pearson
from stexp.models.method import Method, Prediction, References
from stexp.models.retrieval import Distance, Reference, ReferenceIndex, Weighting, choose_references, retrieve

K_CANDIDATES = (5, 10, 25, 50, 100, 200, 400, 800)
RETRIEVED_FROM = ("train", "validation", "reference")  # roles, when the test spots are predicted
DEFAULT_K = 50  # while k is "auto" and not yet chosen


class RetrievalMethod(Method):
    """A method whose prediction is the expression of the reference spots nearest to a tile in a shared space.

    A method that inherits defines :meth:`embed_image` and :meth:`embed_batch_spots`, and trains them; and
    :meth:`embed_features` where it has a ``frozen_encoder``.

    Parameters
    ----------
    k, distance, weighting
        See :meth:`ReferenceIndex.search`. ``k="auto"``: that of a few with the best Pearson correlation on the
        validation spots. None of them touches the encoders.
    reference
        Training-side sections retrieved from: ``image`` (those with an image), ``all``, or names of sections.
    """

    reference_batch = 1024
    """Spots that are embedded in one call for the reference."""

    @checked("model")
    def __init__(
        self, k: Count | Literal["auto"], distance: Distance, weighting: Weighting, reference: Reference
    ) -> None:
        super().__init__()
        self.k, self.distance, self.weighting, self.reference = k, distance, weighting, reference
        self._index: ReferenceIndex | None = None  # searched, set before validation and prediction
        self._reference_target: torch.Tensor | None = None  # (N, G), the expression of its spots

    @abstractmethod
    def embed_image(self, image: torch.Tensor) -> torch.Tensor:
        """Tiles (B, 3, H, W), RGB in 0..1, to embeddings (B, D)."""

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features of tiles (B, F), of ``frozen_encoder``, to embeddings (B, D)."""
        raise TypeError(f"{type(self).__name__} names a frozen_encoder and does not embed its features")

    def embed_tiles(self, batch: SpotBatch) -> torch.Tensor:
        """Tiles of a batch to embeddings (B, D), by their features where it comes without images."""
        return self.embed_features(batch.tile_features) if batch.image is None else self.embed_image(batch.image)

    @abstractmethod
    def embed_batch_spots(self, batch: SpotBatch) -> torch.Tensor:
        """Spots of a batch to embeddings (B, D)."""

    @property
    def _searched(self) -> tuple[ReferenceIndex, torch.Tensor]:
        """What `set_reference` set: the index, and the expression of its spots, (N, G)."""
        if self._index is None or self._reference_target is None:
            raise RuntimeError("set_reference says what is searched, and was not called")
        return self._index, self._reference_target

    def on_fit_start(self) -> None:
        """Refuse before training what retrieval could not do after it."""
        data = self.data
        if self.k == "auto" and len(data.rows("validation")) == 0:
            raise InputError("model.k=auto needs validation spots; give a number, or protocol.validation=true")
        for roles in (self._validation_roles(), RETRIEVED_FROM):
            n = len(choose_references(data.spots.iloc[data.rows(*roles)], self.reference))
            if self.k != "auto" and self.k > n:
                raise InputError(f"k={self.k}, but there are {n} reference spots; choose 1 to {n}")

    def _validation_roles(self) -> tuple[str, ...]:
        # validation spots must not retrieve themselves; sections without an image only where they are asked for
        return ("train",) if self.reference == "image" else ("train", "reference")

    def on_validation_start(self) -> None:
        self.set_reference(self.data, *self._validation_roles())

    def on_predict_start(self) -> None:
        self.set_reference(self.data, *RETRIEVED_FROM)

    @torch.no_grad()
    def set_reference(self, data: SpotDataModule, *roles: str) -> None:
        """Embed the training-side spots of the given roles that `reference` admits, and search among them."""
        loader = data.loader(*roles, image=False, batch_size=self.reference_batch)
        rows = data.rows(*roles)
        embedding = torch.cat([self.embed_batch_spots(data.batch(index, self.device)).float() for index in loader])
        chosen = choose_references(data.spots.iloc[rows], self.reference)
        table = data.spots.iloc[rows[chosen]]
        self._index = ReferenceIndex(
            embedding[torch.from_numpy(chosen).to(embedding.device)],
            table["section"].to_numpy(str),
            table["patient"].to_numpy(str),
        )
        self._reference_target = torch.from_numpy(data.target[rows[chosen]]).to(self.device)
        self.references = References(rows, embedding, list(table["section"].unique()), rows[chosen])

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (B, G), its spread among the neighbours, where it came from, and the tile embedding."""
        query = self.embed_tiles(batch).float()
        index, target = self._searched
        k = min(DEFAULT_K, len(index)) if self.k == "auto" else self.k
        made = retrieve(index, query, target, k, self.distance, self.weighting)
        return replace(made, image_embedding=query)

    @torch.no_grad()
    def tune(self, data: SpotDataModule) -> dict:
        """Choose k on the validation spots where it is ``auto``; returns what was chosen, for the record."""
        if self.k != "auto":
            return {"k": self.k}
        rows = data.rows("validation")
        self.eval()
        self.set_reference(data, *self._validation_roles())
        with self.trainer.precision_plugin.forward_context():
            batches = (data.batch(index, self.device) for index in data.loader("validation"))
            query = torch.cat([self.embed_tiles(batch).float() for batch in batches])
        index, target = self._searched
        score: dict[int, float] = {}
        for k in [k for k in K_CANDIDATES if k <= len(index)] or [len(index)]:
            made = retrieve(index, query, target, k, self.distance, self.weighting, spread=False)
            predicted = made.predicted.cpu().numpy()
            score[k] = mean_pearson(data.target[rows], predicted, data.spots["section"].to_numpy(str)[rows])
        best = max(score, key=lambda k: (round(score[k], 4), k))  # ties: the larger, the steadier
        self.k = best
        return {"k": best, "k_validation_pearson": {str(k): round(value, 4) for k, value in score.items()}}
