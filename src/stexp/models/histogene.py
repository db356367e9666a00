"""HisToGene: a Transformer over the tiles of a whole section (Pang et al. 2021, bioRxiv 2021.11.28.470212)."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from stexp import InputError
from stexp.data.batches import SpotBatch
from stexp.models.blocks import ArrayEmbedding, GeneHead, TransformerBlock, central, start_as_mean


class HisToGene(pl.LightningModule):
    """Each spot's pixels and array position make a token; the tokens of a section attend to each other.

    Parameters
    ----------
    n_genes, n_positions
        G, and the rows of the position tables; they come from the data.
    tile_px, tile_share
        A token is made of tile_px x tile_px pixels: the middle of the tile, this share of its side.
    pixel_scale
        What pixels in 0..1 are multiplied with.
    dim, depth, heads, head_dim, hidden
        Of the Transformer; `hidden` is the width of its MLPs.
    dropout
        Of the tokens, the attention's output and the MLPs.
    lr
        Of Adam.
    positions
        False: tokens do not know where they are, which fits arrays of any size (not published).
    start_from_mean
        The last layer's bias starts as the mean expression of the training spots (published: at random).

    Notes
    -----
    Loss: mean squared error of a section. As published, a spot's prediction depends on all spots of its section.
    """

    batching = "section"

    def __init__(
        self,
        n_genes: int,
        n_positions: int,
        *,
        tile_px: int = 112,
        tile_share: float = 0.5,
        pixel_scale: float = 255.0,
        dim: int = 1024,
        depth: int = 8,
        heads: int = 16,
        head_dim: int = 64,
        hidden: int = 2048,
        dropout: float = 0.1,
        lr: float = 1e-5,
        positions: bool = True,
        start_from_mean: bool = False,
    ) -> None:
        super().__init__()
        for name, value, fits, what in (
            ("tile_px", tile_px, tile_px >= 1, "above 0"),
            ("tile_share", tile_share, 0 < tile_share <= 1, "above 0, 1 at most,"),
            ("pixel_scale", pixel_scale, pixel_scale > 0, "above 0"),
            ("dropout", dropout, 0 <= dropout < 1, "from 0 to below 1"),
            ("lr", lr, lr > 0, "above 0"),
        ):
            if not fits:
                raise InputError(f"model.{name}={value}: a number {what} would fit")
        self.tile_px, self.tile_share, self.pixel_scale, self.lr = tile_px, tile_share, pixel_scale, lr
        self.start_from_mean = start_from_mean
        self.patch_embedding = nn.Linear(3 * tile_px**2, dim)
        self.position = ArrayEmbedding(n_positions, dim) if positions else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, head_dim, hidden, dropout) for _ in range(depth))
        self.gene_head = nn.Sequential(nn.LayerNorm(dim), GeneHead(dim, n_genes))

    def forward(self, image: torch.Tensor, array_xy: torch.Tensor) -> torch.Tensor:
        """Tiles (N, 3, H, W) in 0..1 and array coordinates (N, 2) of a section to expression (N, G)."""
        pixels = central(image, self.tile_share, self.tile_px).flatten(1) * self.pixel_scale
        x = self.patch_embedding(pixels)
        if self.position is not None:
            x = x + sum(self.position(array_xy))
        x = self.dropout(x)[None]
        for block in self.blocks:
            x = block(x)
        return self.gene_head(x[0])

    def on_fit_start(self) -> None:
        if self.start_from_mean and self.trainer.ckpt_path is None:
            start_as_mean(self.gene_head[-1], self.trainer.datamodule)

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        loss = F.mse_loss(self(batch.image, batch.array_xy).float(), batch.target)
        self.log("train/mse", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> dict:
        """Expression (N, G) of a section."""
        return {"predicted": self(batch.image, batch.array_xy).float()}

    def validation_step(self, batch: SpotBatch, batch_idx: int) -> dict:
        return self.predict_step(batch)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["method"] = {"name": "histogene"}
