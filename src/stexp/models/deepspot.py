"""DeepSpot: a deep set over a tile, its parts and its neighbours (Nonchev et al. 2025; ratschlab/DeepSpot)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from stexp.arguments import Count, OpenShare, Rate, Weight, Width, checked
from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.data.features import Surroundings, TileEncoder
from stexp.models.blocks import GeneHead, local_graphs
from stexp.models.method import Method, Prediction


class DeepSpot(Method):
    """Frozen features of a tile, of the parts of it and of its neighbours' tiles, through one phi; rho of all three.

    phi is the element-wise median of parallel layers. Of the parts its values are added up, of the neighbours the
    largest counts. rho is the mean of parallel layers of the three, one after another. Targets are standardised by mean
    and standard deviation of each gene over the training spots, predictions are taken back.

    Parameters
    ----------
    n_genes, n_features
        G and F; they come from the data and the image encoder.
    dim
        Width of phi.
    n_parallel
        Layers of phi, and of rho.
    side
        A tile has side x side parts.
    dropout
        In phi and in rho.
    output_dropout
        Behind rho's layers.
    lr, weight_decay
        Of AdamW.

    Notes
    -----
    As in github.com/ratschlab/DeepSpot, where the median of an even number is the lower of the two in the middle.
    Neighbours are the spots of the same section within 1.6 pitches of the array: the 8 around one on a square array, as
    published (radius 1), the 6 on a hexagonal one (there 4, of odd coordinates). Absent ones do not count, there they
    are tiles of zeros. Spots are not drawn by clusters of equal size. Parts go into the encoder in the pixels that they
    have, or its ``input_size``. With ``data.views`` the tile is augmented; parts and neighbours never are.
    """

    predicts_slides = False
    mean: torch.Tensor  # (G,), of the training spots
    scale: torch.Tensor  # (G,)

    @checked("model")
    def __init__(
        self,
        n_genes: int,
        n_features: int,
        *,
        dim: Width = 512,
        n_parallel: Count = 10,
        side: Count = 3,
        dropout: OpenShare = 0.3,
        output_dropout: OpenShare = 0.1,
        lr: Rate = 1e-4,
        weight_decay: Weight = 1e-6,
    ) -> None:
        super().__init__()
        self.phi = Phi(n_features, dim, n_parallel, dropout)
        self.rho = nn.ModuleList(
            nn.Sequential(nn.Dropout(dropout), nn.ReLU(), GeneHead(3 * dim, n_genes), nn.Dropout(output_dropout))
            for _ in range(n_parallel)
        )
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))
        self.side, self.lr, self.weight_decay = side, lr, weight_decay
        self._parts: Surroundings | None = None  # of the trainer's data

    def reads_features_of(self, encoder: TileEncoder) -> bool:
        """Features of any frozen encoder are all that is read of tiles."""
        return True

    def forward(
        self, tile: torch.Tensor, parts: torch.Tensor, neighbours: torch.Tensor, around: torch.Tensor
    ) -> torch.Tensor:
        """Standardised expression (B, G).

        Parameters
        ----------
        tile : (B, F)
        parts : (B, P, F)
        neighbours : (U, F)
            Of the tiles next to those of the batch, each once.
        around : (B, L)
            Rows of `neighbours` next to each spot, -1 where there are fewer.
        """
        # values of phi are not negative, so that zeros in the place of absent neighbours are never the largest alone
        beside = self.phi(neighbours)[around.clamp(min=0)].masked_fill((around < 0)[..., None], 0)
        seen = torch.cat([self.phi(tile), self.phi(parts).sum(dim=1), beside.amax(dim=1)], dim=1)
        return torch.stack([layer(seen) for layer in self.rho]).mean(dim=0)

    # what surrounds the spots of a batch

    def on_fit_start(self) -> None:
        """Take mean and scale of the training spots, and look at what surrounds all spots."""
        data = self.data
        if self.trainer.ckpt_path is None:  # else they are those of the weights, which may have begun at a model's
            target = data.target[data.rows("train")].astype(np.float64)
            spread = target.std(axis=0)
            self.mean.copy_(torch.from_numpy(target.mean(axis=0)))
            self.scale.copy_(torch.from_numpy(np.where(spread > 0, spread, 1)))
        self.see_surroundings(data)

    def on_predict_start(self) -> None:
        self.see_surroundings(self.data)

    def see_surroundings(self, data: SpotDataModule) -> None:
        """Open the parts of all tiles, and search the neighbours of all spots."""
        group = data.spots.groupby(["section", "role"], sort=False).ngroup().to_numpy()
        self._parts = data.subtiles(self.side)
        self._around = torch.from_numpy(local_graphs(data.xy_px, group)[0][:, 1:]).to(self.device)
        self._features = torch.from_numpy(data.tile_features[:]).to(self.device)

    def standardised(self, batch: SpotBatch) -> torch.Tensor:
        """Standardised expression (B, G) of a batch of the trainer's data."""
        assert self._parts is not None  # seen when a fit or a prediction starts
        parts = torch.from_numpy(self._parts[batch.spot.cpu().numpy()]).to(self.device)
        around = self._around[batch.spot]
        # itself in the place of absent ones, which has features: NaN behind a mask still spoils gradients
        rows, position = torch.where(around < 0, batch.spot[:, None], around).unique(return_inverse=True)
        return self(batch.tile_features, parts, self._features[rows], position.masked_fill(around < 0, -1))

    # training

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        loss = (self.standardised(batch) - (batch.target - self.mean) / self.scale).square().mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (B, G)."""
        return Prediction(self.standardised(batch) * self.scale + self.mean)


class Phi(nn.Module):
    """Element-wise median of parallel layers, each ReLU(dropout(linear))."""

    def __init__(self, n_features: int, dim: int, n_parallel: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(n_features, n_parallel * dim)  # all of them at once
        self.dropout, self.n_parallel = nn.Dropout(dropout), n_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., F) -> (..., dim), at least 0."""
        return self.dropout(self.linear(x)).relu().unflatten(-1, (self.n_parallel, -1)).median(dim=-2).values
