"""HECLIP: tiles drawn to the expression that alike tiles have, by retrieval (QSong-github/HECLIP, arXiv 2501.14948)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from stexp.arguments import Count, Positive, Rate, Share, Weight, Width, checked
from stexp.data.batches import SpotBatch
from stexp.models.blocks import ProjectionHead
from stexp.models.encoders.image import ImageEncoder
from stexp.models.gather import gather
from stexp.models.losses import image_targets, info_nce
from stexp.models.retrieval import Distance, Reference, Weighting
from stexp.models.retrieval_method import RetrievalMethod


class HECLIP(RetrievalMethod):
    """Image encoder and head into the space of the spots, trained on soft targets that tiles alone say.

    Parameters
    ----------
    image_encoder
        Tiles to features; all of it is trained unless it is frozen.
    n_genes
        G; it comes from the data.
    variant
        ``hvg``: a spot's embedding is its expression, and the image head has G dimensions; ``heg``: a head each, of
        `embedding_dim`. Published for panels of variable and of highly expressed genes; here either takes any panel.
    embedding_dim
        Of ``heg``.
    dropout
        In the heads.
    temperature
        tau; see :func:`~stexp.models.losses.image_targets`.
    k, distance, weighting, reference
        Retrieval; see :class:`~stexp.models.retrieval_method.RetrievalMethod`. Published: the plain mean of the 50
        nearest in cosine.
    correct
        Correct what is retrieved by a residual (not published); see :mod:`stexp.models.correction`.
    lr, weight_decay
        Of AdamW.

    Notes
    -----
    Tensors are named as in github.com/QSong-github/HECLIP, without the spot encoder that it makes and does not use.
    That code reads expression that Harmony has aligned between sections, and keeps the epoch with the lowest loss on
    the section it predicts; here expression is normalised as the protocol says, and validation spots pick the epoch.
    """

    several_devices = True

    @checked("model")
    def __init__(
        self,
        image_encoder: ImageEncoder,
        n_genes: int,
        *,
        variant: Literal["hvg", "heg"] = "hvg",
        embedding_dim: Width = 256,
        dropout: Share = 0.1,
        temperature: Positive = 1.0,
        k: Count | Literal["auto"] = 50,
        distance: Distance = "cosine",
        weighting: Weighting = "mean",
        reference: Reference = "image",
        correct: bool = False,
        lr: Rate = 1e-3,
        weight_decay: Weight = 1e-3,
    ) -> None:
        super().__init__(k, distance, weighting, reference)
        n_dims = n_genes if variant == "hvg" else embedding_dim
        self.image_encoder = image_encoder
        self.image_projection = ProjectionHead(image_encoder.num_features, n_dims, dropout)
        self.spot_projection = nn.Identity() if variant == "hvg" else ProjectionHead(n_genes, n_dims, dropout)
        self.temperature, self.lr, self.weight_decay = temperature, lr, weight_decay
        if correct:
            self.correct(n_dims, n_genes)

    def embed_batch_spots(self, batch: SpotBatch) -> torch.Tensor:
        """Spots of a batch, each by its own expression alone, to embeddings (B, D)."""
        return self.spot_projection(batch.expression)

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        image = gather(self.embed_tiles(batch), batch.whole)
        spot = gather(self.embed_batch_spots(batch), batch.whole)
        loss = image_targets(image, spot, self.temperature)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(image))
        # soft targets come below log(batch) where nothing is learned, too; only the image loss is trained
        self.log_beside_chance(info_nce(image.detach(), spot.detach(), self.temperature, 1.0), image, spot)
        return loss
