"""ST-GCHB, after the abstract of arXiv 2406.12229: graph contrast in each modality, an HSIC bottleneck, retrieval."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from stexp.arguments import Count, OpenShare, Positive, Rate, Share, Weight, Width, checked
from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.data.features import TileEncoder
from stexp.models.blocks import ProjectionHead
from stexp.models.dependence import hsic
from stexp.models.losses import info_nce
from stexp.models.retrieval import Distance, Reference, Weighting
from stexp.models.retrieval_method import RetrievalMethod


class STGCHB(RetrievalMethod):
    """Frozen features of tiles, and expression, each with its neighbours in the section, into one space.

    Loss: InfoNCE between tiles and spots, plus in each modality `graph_weight` x InfoNCE between two views of the graph
    around a spot, plus lambda_x HSIC(x, z) - lambda_y HSIC(y, z), where z are a modality's embeddings, x what it reads
    of its spots, and y what the other modality reads.

    Parameters
    ----------
    n_genes, n_features
        G and F; they come from the data and the image encoder.
    embedding_dim
        D of the shared space.
    dropout
        In both heads.
    feature_dropout, edge_dropout
        Of a view: which share of the features is 0, in all spots alike, and which share of the neighbours is left out.
    temperature, graph_temperature
        Divide the cosines, between modalities and between views.
    graph_weight, lambda_x, lambda_y
        Weights of the terms.
    k, distance, weighting, reference
        Retrieval; see :class:`~stexp.models.retrieval_method.RetrievalMethod`.
    correct
        Correct what is retrieved by a residual; see :mod:`stexp.models.correction`.
    lr, weight_decay
        Of AdamW.

    Notes
    -----
    The abstract names the three terms and the retrieval, and nothing more is public: the graph, the encoders, the
    views, what y is, every weight and every setting are open, and what stands here is ours. The graph joins a spot with
    the nearest spots of its section that batches carry (``data.n_neighbours``); an encoder is one graph convolution
    with mean aggregation (a spot beside the mean of its neighbours, as in GraphSAGE) and a projection head; views are
    those of GRACE (Zhu et al. 2020, arXiv 2006.04131). A prediction reads the tiles around a spot, which a bare slide
    does not give it here.
    """

    predicts_slides = False

    @checked("model")
    def __init__(
        self,
        n_genes: int,
        n_features: int,
        *,
        embedding_dim: Width = 256,
        dropout: Share = 0.1,
        feature_dropout: OpenShare = 0.2,
        edge_dropout: OpenShare = 0.2,
        temperature: Positive = 0.1,
        graph_temperature: Positive = 0.5,
        graph_weight: Weight = 0.5,
        lambda_x: Weight = 1.0,
        lambda_y: Weight = 1.0,
        k: Count | Literal["auto"] = 50,
        distance: Distance = "cosine",
        weighting: Weighting = "mean",
        reference: Reference = "image",
        correct: bool = False,
        lr: Rate = 1e-3,
        weight_decay: Weight = 1e-3,
    ) -> None:
        super().__init__(k, distance, weighting, reference)
        self.image_graph = GraphConvolution(n_features, embedding_dim, dropout)
        self.spot_graph = GraphConvolution(n_genes, embedding_dim, dropout)
        self.feature_dropout, self.edge_dropout = feature_dropout, edge_dropout
        self.temperature, self.graph_temperature = temperature, graph_temperature
        self.graph_weight, self.lambda_x, self.lambda_y = graph_weight, lambda_x, lambda_y
        self.lr, self.weight_decay = lr, weight_decay
        self._features: torch.Tensor | None = None  # (n_spots, F), of the trainer's data
        if correct:
            self.correct(embedding_dim, n_genes)

    @property
    def frozen_encoder(self) -> None:
        return None  # a tile is read with its neighbours

    def reads_features_of(self, encoder: TileEncoder) -> bool:
        """Features of any frozen encoder are all that is read of tiles."""
        return True

    # the two graphs

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._see(self.data)

    def set_reference(self, data: SpotDataModule, *roles: str) -> None:
        self._see(data)
        super().set_reference(data, *roles)

    def _see(self, data: SpotDataModule) -> None:
        self._features = torch.from_numpy(data.tile_features[:]).to(self.device)
        self._around = torch.from_numpy(data.neighbours).to(self.device)

    def tile_graph(self, batch: SpotBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of a spot's tile and of its neighbours' (B, L, F), and which of them there are (B, L)."""
        assert self._features is not None  # seen when a fit starts, and before references are
        around = self._around[batch.spot]
        # itself in the place of absent ones, which has features: NaN behind a mask still spoils gradients
        beside = self._features[torch.where(around < 0, batch.spot[:, None], around)]
        there = torch.cat([torch.ones_like(batch.spot[:, None], dtype=torch.bool), around >= 0], dim=1)
        return torch.cat([batch.tile_features[:, None], beside], dim=1), there

    def embed_tiles(self, batch: SpotBatch) -> torch.Tensor:
        """Tiles of a batch, each with its neighbours, to embeddings (B, D) of length 1."""
        return self.image_graph(*self.tile_graph(batch))

    def embed_batch_spots(self, batch: SpotBatch) -> torch.Tensor:
        """Spots of a batch, each with its neighbours, to embeddings (B, D) of length 1."""
        return self.spot_graph(batch.context_expression, batch.context_mask)

    # training

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        tiles, spots = self.tile_graph(batch), (batch.context_expression, batch.context_mask)
        image, spot = self.image_graph(*tiles), self.spot_graph(*spots)
        across = info_nce(image, spot, self.temperature)
        loss = across
        for graph, encoder in ((tiles, self.image_graph), (spots, self.spot_graph)):
            first, second = (encoder(*self.view(*graph)) for _ in range(2))
            loss = loss + self.graph_weight * info_nce(first, second, self.graph_temperature)
        features, expression = tiles[0][:, 0], batch.expression
        for x, y, z in ((features, expression, image), (expression, features, spot)):
            loss = loss + self.lambda_x * hsic(x, z) - self.lambda_y * hsic(y, z)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log_beside_chance(across, image, spot)
        return loss

    def view(self, x: torch.Tensor, there: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The graphs of a batch with some features at 0 and some neighbours left out, drawn anew in each call."""
        kept = torch.rand(x.shape[-1], device=x.device) >= self.feature_dropout
        edges = torch.rand(there.shape, device=x.device) >= self.edge_dropout
        edges[:, 0] = True
        return x * kept, there & edges


class GraphConvolution(nn.Module):
    """A spot beside the mean of its neighbours, through a projection head, to an embedding of length 1."""

    def __init__(self, n_features: int, n_dims: int, dropout: float) -> None:
        super().__init__()
        self.head = ProjectionHead(2 * n_features, n_dims, dropout)

    def forward(self, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Spots with their neighbours (B, L, F), the spot first, and which there are (B, L), to (B, D)."""
        beside = there[:, 1:, None]
        mean = (x[:, 1:] * beside).sum(dim=1) / beside.sum(dim=1).clamp(min=1)
        return F.normalize(self.head(torch.cat([x[:, 0], mean], dim=1)), dim=-1)
