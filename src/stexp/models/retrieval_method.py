"""What methods share that predict by retrieval: a reference of spot embeddings, searched with a tile's."""

from __future__ import annotations

import numpy as np
import pytorch_lightning as pl
import torch

from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.evaluation.metrics import mean_pearson
from stexp.models.retrieval import DISTANCES, WEIGHTINGS, ReferenceIndex, choose_references, retrieve

K_CANDIDATES = (5, 10, 25, 50, 100, 200, 400, 800)
RETRIEVED_FROM = ("train", "validation", "reference")  # roles, when the test spots are predicted
DEFAULT_K = 50  # while k is "auto" and not yet chosen


class RetrievalMethod(pl.LightningModule):
    """A method whose prediction is the expression of the reference spots nearest to a tile in a shared space.

    A method that inherits defines :meth:`embed_image` and :meth:`embed_batch_spots`, and trains them.

    Parameters
    ----------
    k, distance, weighting
        See :meth:`ReferenceIndex.search`. ``k="auto"``: that of a few with the best Pearson correlation on the
        validation spots. None of them touches the encoders.
    reference
        Training-side sections retrieved from: ``image`` (those with an image), ``all``, or names of sections.

    Attributes
    ----------
    reference_rows, reference_embedding
        All spots that `reference` may choose from, and their embeddings, kept for re-scoring.
    reference_sections, retrieved_rows
        Those chosen, and their spots: what ``neighbours`` of a prediction counts in.
    """

    reference_batch = 1024
    """Spots that are embedded in one call for the reference."""

    def __init__(self, k: int | str, distance: str, weighting: str, reference: str | list[str]) -> None:
        super().__init__()
        if distance not in DISTANCES:
            raise InputError(f"model.distance={distance}: choose {', '.join(DISTANCES)}")
        if weighting not in WEIGHTINGS:
            raise InputError(f"model.weighting={weighting}: choose {', '.join(WEIGHTINGS)}")
        if not (k == "auto" or (isinstance(k, int) and k >= 1)):
            raise InputError(f"model.k={k}: auto or a whole number of at least 1 would fit")
        self.k, self.distance, self.weighting, self.reference = k, distance, weighting, reference
        self._index: ReferenceIndex | None = None  # searched, set before validation and prediction
        self._reference_target: torch.Tensor | None = None  # (N, G), the expression of its spots
        self.reference_rows: np.ndarray | None = None
        self.reference_embedding: torch.Tensor | None = None
        self.reference_sections: list[str] = []
        self.retrieved_rows: np.ndarray | None = None

    def embed_image(self, image: torch.Tensor) -> torch.Tensor:
        """Tiles (B, 3, H, W), RGB in 0..1, to embeddings (B, D)."""
        raise NotImplementedError

    def embed_batch_spots(self, batch: SpotBatch) -> torch.Tensor:
        """Spots of a batch to embeddings (B, D)."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Refuse before training what retrieval could not do after it."""
        data = self.trainer.datamodule
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
        self.set_reference(self.trainer.datamodule, *self._validation_roles())

    def on_predict_start(self) -> None:
        self.set_reference(self.trainer.datamodule, *RETRIEVED_FROM)

    @torch.no_grad()
    def set_reference(self, data: SpotDataModule, *roles: str) -> None:
        """Embed the training-side spots of the given roles that `reference` admits, and search among them."""
        loader = data.loader(*roles, image=False, batch_size=self.reference_batch)
        rows = data.rows(*roles)
        embedding = torch.cat([self.embed_batch_spots(data.batch(index, self.device)).float() for index in loader])
        self.reference_rows, self.reference_embedding = rows, embedding
        chosen = choose_references(data.spots.iloc[rows], self.reference)
        self.retrieved_rows = rows[chosen]
        table = data.spots.iloc[self.retrieved_rows]
        self._index = ReferenceIndex(
            embedding[torch.from_numpy(chosen).to(embedding.device)],
            table["section"].to_numpy(str),
            table["patient"].to_numpy(str),
        )
        self._reference_target = torch.from_numpy(data.target[rows[chosen]]).to(self.device)
        self.reference_sections = list(table["section"].unique())

    def validation_step(self, batch: SpotBatch, batch_idx: int) -> dict:
        return self.predict_step(batch, batch_idx)

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> dict:
        """Expression (B, G), its spread among the neighbours, where it came from, and the tile embedding."""
        query = self.embed_image(batch.image).float()
        k = min(DEFAULT_K, len(self._index)) if self.k == "auto" else self.k
        found = retrieve(self._index, query, self._reference_target, k, self.distance, self.weighting)
        return {**found, "image_embedding": query}

    @torch.no_grad()
    def tune(self, data: SpotDataModule) -> dict:
        """Choose k on the validation spots where it is ``auto``; returns what was chosen, for the record."""
        if self.k != "auto":
            return {"k": self.k}
        rows = data.rows("validation")
        self.eval()
        self.set_reference(data, *self._validation_roles())
        with self.trainer.precision_plugin.forward_context():
            batches = (data.batch(index, self.device) for index in data.val_dataloader())
            query = torch.cat([self.embed_image(batch.image).float() for batch in batches])
        score = {}
        for k in [k for k in K_CANDIDATES if k <= len(self._index)] or [len(self._index)]:
            found = retrieve(self._index, query, self._reference_target, k, self.distance, self.weighting, spread=False)
            predicted = found["predicted"].cpu().numpy()
            score[k] = mean_pearson(data.target[rows], predicted, data.spots["section"].to_numpy(str)[rows])
        self.k = max(score, key=lambda k: (round(score[k], 4), k))  # ties: the larger, the steadier
        return {"k": self.k, "k_validation_pearson": {str(k): round(value, 4) for k, value in score.items()}}
