"""SEPAL: a tile encoder, corrected by a graph network on the tiles around (Mejia et al. 2023, arXiv 2309.01036)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import nn

from stexp.arguments import Rate, Whole, Width, checked
from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.data.rows import column_means, some_rows
from stexp.errors import InputError
from stexp.models.blocks import GeneHead, local_graphs
from stexp.models.encoders.image import ImageEncoder
from stexp.models.encoders.spot import sinusoid
from stexp.models.method import Method, Prediction

log = logging.getLogger(__name__)


class SEPAL(Method):
    """Difference from the training mean: first by the tile alone, then corrected by the tiles around.

    The first `image_epochs` train the image encoder and a linear layer. Then both stand still; a graph network reads
    their features of the spot and of its neighbours, and learns what to add.

    Parameters
    ----------
    image_encoder
        Tiles to features; all of it is trained in the first stage unless it is frozen.
    n_genes
        G; it comes from the data.
    image_epochs
        Epochs of the first stage; the rest of ``trainer.max_epochs`` is the second's.
    before
        Widths of linear layers that each node passes before the graph.
    hidden
        Widths of graph convolutions.
    head
        A linear layer makes the correction from the last of `hidden`; false: one more graph convolution does.
    operator
        ``gcn`` (Kipf and Welling 2017) or ``graph`` (Morris et al. 2019, sum over neighbours).
    position
        Sines and cosines of where a node lies on the array, seen from the spot: ``concat`` or ``sum`` with features.
    image_lr, lr
        Of Adam, in the first and the second stage.

    Notes
    -----
    As in github.com/BCV-Uniandes/SEPAL: each layer is followed by an ELU, the last one too, and the graph is read off
    at the node with the highest score of a learned one (self-attention pooling of one node). A graph has the edges
    among its nodes, so neighbours that touch each other exchange, too. Differences: neighbours are the spots of the
    same section within 1.6 pitches, at the border fewer (there, on a hexagonal array, always the six nearest); the
    second stage starts from the last epoch of the first (there from the best on validation spots); expression is that
    of the protocol (there medians replace zeros, and ComBat aligns sections) and so are the genes (there by Moran's I).
    """

    predicts_slides = False
    fine_tunes = False  # its two stages begin at the training mean
    mean: torch.Tensor  # (G,)
    corrects: torch.Tensor  # (), whether the second stage began

    @checked("model")
    def __init__(
        self,
        image_encoder: ImageEncoder,
        n_genes: int,
        *,
        image_epochs: Whole = 50,
        before: list[Width] | tuple[Width, ...] = (512,),
        hidden: list[Width] | tuple[Width, ...] = (256, 128),
        head: bool = True,
        operator: Literal["gcn", "graph"] = "gcn",
        position: Literal["concat", "sum"] = "concat",
        image_lr: Rate = 1e-4,
        lr: Rate = 1e-5,
    ) -> None:
        super().__init__()
        if head and not hidden:
            raise InputError("model.hidden=[]: with model.head=true there must be a graph convolution")
        self.image_encoder = image_encoder
        self.image_head = GeneHead(image_encoder.num_features, n_genes)
        self.graph = LocalGraphNet(image_encoder.num_features, n_genes, before, hidden, head, operator, position)
        # a checkpoint says what it is of
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("corrects", torch.tensor(False))
        self.image_epochs, self.image_lr, self.lr = image_epochs, image_lr, lr
        self._embedding: torch.Tensor | None = None  # (n_spots, F), in the second stage

    @property
    def frozen_encoder(self) -> ImageEncoder | None:
        return self.image_encoder if self.image_encoder.frozen else None

    def encoded(self, batch: SpotBatch) -> torch.Tensor:
        """Pooled features of the tiles of a batch, (B, F)."""
        return batch.tile_features if batch.image is None else self.image_encoder(batch.image)

    # stages

    def on_fit_start(self) -> None:
        """Take the training mean, and look at the neighbours."""
        data = self.data
        self.mean.copy_(torch.from_numpy(column_means(some_rows(data.target, data.rows("train")), "float64")))
        epochs = self.trainer.max_epochs
        if epochs is not None and 0 <= epochs <= self.image_epochs:  # -1: without end
            log.warning(
                "the graph network of sepal is not trained: trainer.max_epochs=%d ends before the %d epochs of "
                "model.image_epochs do; predictions are by the tile alone",
                epochs,
                self.image_epochs,
            )
        self.set_graphs(data)

    def on_train_epoch_start(self) -> None:
        if self.trainer.current_epoch >= self.image_epochs:
            self.corrects.fill_(True)
            if self._embedding is None:
                self.embed(self.data, "train", "validation")

    def on_predict_start(self) -> None:
        data = self.data
        self.set_graphs(data)
        if self.corrects:
            self.embed(data, "test")

    def set_graphs(self, data: SpotDataModule) -> None:
        """Nodes of every spot's graph, and where all spots lie."""
        nodes, reach = local_graphs(data.xy_px, data.spots.groupby(["section", "role"], sort=False).ngroup().to_numpy())
        array_xy = data.spots[["array_x", "array_y"]].to_numpy(np.int64)
        self._nodes, self._reach, self._xy, self._array_xy = (
            torch.tensor(table, device=self.device) for table in (nodes, reach, data.xy_px.astype(np.float32), array_xy)
        )

    @torch.no_grad()
    def embed(self, data: SpotDataModule, *roles: str) -> None:
        """Features of the tiles of spots, as they are, by the encoder as it is."""
        training = self.image_encoder.training
        self.image_encoder.eval()
        self._embedding = torch.zeros(len(data.spots), self.image_encoder.num_features, device=self.device)
        for index in data.loader(*roles):
            batch = data.batch(index, self.device)
            with self.trainer.precision_plugin.forward_context():
                self._embedding[batch.spot] = self.encoded(batch).float()
        self.image_encoder.train(training)

    # training

    def difference(self, batch: SpotBatch) -> torch.Tensor:
        """Expression minus the training mean (B, G): by the tile alone, or in the second stage corrected."""
        if not self.corrects:
            return self.image_head(self.encoded(batch)).float()
        nodes = self._nodes[batch.spot]  # (B, L)
        is_node, nodes = nodes >= 0, nodes.clamp(min=0)
        place = self._xy[nodes]
        apart = (place[:, :, None] - place[:, None]).square().sum(dim=-1).sqrt()  # (B, L, L)
        edges = (apart <= self._reach[batch.spot][:, None, None]) & is_node[:, :, None] & is_node[:, None]
        edges &= ~torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
        offset = self._array_xy[nodes] - self._array_xy[batch.spot][:, None]
        assert self._embedding is not None  # whatever begins the second stage embeds
        features = self._embedding[nodes]
        with torch.no_grad():
            alone = self.image_head(features[:, 0])
        return alone.float() + self.graph(features, offset, edges, is_node).float()

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        loss = (self.difference(batch) - (batch.target - self.mean)).square().mean()
        self.log("train/mse", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        image = [*self.image_encoder.parameters(), *self.image_head.parameters()]
        # one for both stages: Adam passes over what has no gradient
        return torch.optim.Adam(
            [
                {"params": [parameter for parameter in image if parameter.requires_grad], "lr": self.image_lr},
                {"params": list(self.graph.parameters()), "lr": self.lr},
            ]
        )

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (B, G)."""
        return Prediction(self.mean + self.difference(batch))


class LocalGraphNet(nn.Module):
    """Small graphs of L nodes, the first of which is asked about, to G values; parameters as of :class:`SEPAL`."""

    def __init__(
        self,
        n_features: int,
        n_genes: int,
        before: Sequence[int],
        hidden: Sequence[int],
        head: bool,
        operator: str,
        position: str,
    ) -> None:
        super().__init__()
        self.position = position
        widths = [n_features * (2 if position == "concat" else 1), *before]
        self.before = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        widths = [widths[-1], *hidden, *([] if head else [n_genes])]
        convolution: type[GCNConv] | type[GraphConv] = GCNConv if operator == "gcn" else GraphConv
        self.convolutions = nn.ModuleList(convolution(a, b) for a, b in pairwise(widths))
        self.score = GraphConv(widths[-1], 1)
        self.head = GeneHead(widths[-1], n_genes) if head else None

    def forward(
        self, features: torch.Tensor, offset: torch.Tensor, edges: torch.Tensor, is_node: torch.Tensor
    ) -> torch.Tensor:
        """Correction (B, G).

        Parameters
        ----------
        features : (B, L, F)
        offset : (B, L, 2)
            Array coordinates, x and y, from the first node's.
        edges : (B, L, L)
            Which nodes are neighbours; symmetric, none of itself.
        is_node : (B, L)
            False where a graph has fewer.
        """
        place = offset_encoding(offset, features.shape[2])
        x = features + place if self.position == "sum" else torch.cat([features, place], dim=2)
        for layer in self.before:
            x = nn.functional.elu(layer(x))
        edges = edges.to(x.dtype)
        for layer in self.convolutions:
            x = nn.functional.elu(layer(x, edges))
        score = self.score(x, edges).squeeze(2).masked_fill(~is_node, -torch.inf)
        best, where = score.max(dim=1)
        x = x[torch.arange(len(x), device=x.device), where] * best.tanh()[:, None]
        return x if self.head is None else nn.functional.elu(self.head(x))


class GraphConv(nn.Module):
    """A linear layer of the node, and one of the sum over its neighbours (Morris et al. 2019)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.neighbours, self.itself = nn.Linear(n_in, n_out), nn.Linear(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """(B, L, n_in), (B, L, L) -> (B, L, n_out)."""
        return self.neighbours(edges @ x) + self.itself(x)


class GCNConv(nn.Module):
    """A linear layer of the mean over the node and its neighbours, by the roots of both degrees (Kipf 2017)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """(B, L, n_in), (B, L, L) -> (B, L, n_out)."""
        edges = edges + torch.eye(edges.shape[1], dtype=edges.dtype, device=edges.device)
        scale = edges.sum(dim=2).rsqrt()
        return self.linear((edges * scale[:, :, None] * scale[:, None]) @ x)


def offset_encoding(offset: torch.Tensor, n: int) -> torch.Tensor:
    """Offsets (..., 2) of -2 and more array steps to sines and cosines (..., n): of y in the first half, then of x."""
    half = 2 * math.ceil(n / 4)
    shifted = offset + 2  # the published code counts from the farthest
    return torch.cat([sinusoid(shifted[..., 1], half), sinusoid(shifted[..., 0], half)], dim=-1)[..., :n]
