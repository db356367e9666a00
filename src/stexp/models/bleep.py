"""BLEEP: contrastive tile and spot embeddings, expression by retrieval (Xie et al. 2023, NeurIPS 36)."""

from __future__ import annotations

from typing import Literal

import torch

from stexp.arguments import Count, NotNegative, Positive, Rate, Share, Weight, Whole, Width, checked
from stexp.data.batches import SpotBatch
from stexp.models.blocks import ProjectionHead
from stexp.models.contrastive_method import ContrastiveMethod
from stexp.models.encoders.image import ImageEncoder
from stexp.models.gather import gather
from stexp.models.objectives import Objective, TargetTemperature
from stexp.models.retrieval import Distance, Reference, Weighting


class BLEEP(ContrastiveMethod):
    """Image encoder and head, and the same head directly on the expression, trained to agree on the same spots.

    Parameters
    ----------
    image_encoder
        Tiles to features; all of it is trained unless it is frozen.
    n_genes
        G; it comes from the data.
    embedding_dim
        D of the shared space.
    dropout
        In both heads.
    temperature
        tau, which divides the logits.
    objective
        Published: ``soft``; see :func:`~stexp.models.objectives.contrastive_loss`.
    target_temperature
        Targets of ``soft`` are the rows of softmax((I I^T + S S^T) / 2 x tau) (``multiply``: paper, and code until
        October 2024), or of softmax((I I^T + S S^T) / 2 / tau) (``divide``: code since). As published, gradients go
        through the targets, and the image loss has the transposed ones, whose rows do not sum to 1.
    normalise
        L2-normalise embeddings (the published code does not).
    negatives_memory, mask_within_um
        See :class:`~stexp.models.negatives.Negatives`; not published.
    k, distance, weighting, reference
        Retrieval; see :class:`~stexp.models.retrieval_method.RetrievalMethod`. Published: the plain mean of the
        50 nearest in cosine; ``k=1`` is what the paper calls simple.
    correct
        Correct what is retrieved by a residual (not published); see :mod:`stexp.models.correction`.
    prototypes
        Learn as many prototypes, and search them instead of spots (not published); see :mod:`stexp.models.prototypes`.
    lr, weight_decay
        Of AdamW.

    Notes
    -----
    Tensors are named as in github.com/bowang-lab/BLEEP, so that a state dict of its ``CLIPModel`` loads as it is
    (with a ResNet-50 of 256 dimensions). That code reads expression that Harmony has aligned between sections;
    here it is normalised as the protocol says.
    """

    @checked("model")
    def __init__(
        self,
        image_encoder: ImageEncoder,
        n_genes: int,
        *,
        embedding_dim: Width = 256,
        dropout: Share = 0.1,
        temperature: Positive = 1.0,
        objective: Objective = "soft",
        target_temperature: TargetTemperature = "multiply",
        normalise: bool = False,
        negatives_memory: Whole = 0,
        mask_within_um: NotNegative = 0.0,
        k: Count | Literal["auto"] = 50,
        distance: Distance = "cosine",
        weighting: Weighting = "mean",
        reference: Reference = "image",
        correct: bool = False,
        prototypes: Count | None = None,
        lr: Rate = 1e-3,
        weight_decay: Weight = 1e-3,
    ) -> None:
        super().__init__(
            *(k, distance, weighting, reference),
            n_dims=embedding_dim,
            objective=objective,
            negatives_memory=negatives_memory,
            mask_within_um=mask_within_um,
            normalise=normalise,
            temperature=temperature,
        )
        self.image_encoder = image_encoder
        self.image_projection = ProjectionHead(image_encoder.num_features, embedding_dim, dropout)
        self.spot_projection = ProjectionHead(n_genes, embedding_dim, dropout)
        self.temperature, self.target_temperature = temperature, target_temperature
        self.lr, self.weight_decay = lr, weight_decay
        if correct:
            self.correct(embedding_dim, n_genes)
        if prototypes is not None:
            self.learn_prototypes(prototypes, embedding_dim)

    def embed_batch_spots(self, batch: SpotBatch) -> torch.Tensor:
        """Spots of a batch, each by its own expression alone, to embeddings (B, D)."""
        return self._finish(self.spot_projection(batch.expression))

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        image = gather(self.embed_tiles(batch), batch.whole)
        spot = gather(self.embed_batch_spots(batch), batch.whole)
        loss = self.contrast(image, spot, batch, self.temperature, target_temperature=self.target_temperature)
        return self.with_prototypes(loss, image, spot, self.temperature)
