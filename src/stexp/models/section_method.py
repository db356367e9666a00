"""Base of methods that read the tiles of a whole section at once."""

from __future__ import annotations

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.nn import functional as F

from stexp.data.batches import SpotBatch
from stexp.models.blocks import GeneHead, central, start_as_mean
from stexp.models.method import Method, Prediction


class SectionMethod(Method):
    """A method that predicts the spots of a section from their tiles and places, all of them together.

    A method that inherits defines ``forward(image, array_xy)``, tiles (N, 3, H, W) in 0..1 and array coordinates
    (N, 2) of a section to expression (N, G), and ends it with the layers `gene_head`.

    Parameters
    ----------
    tile_px, tile_share, pixel_scale
        The middle of the tile, this share of its side, enters with tile_px x tile_px pixels in 0..pixel_scale.
    lr
        Of Adam.
    start_from_mean
        The last layer's bias starts as the mean expression of the training spots (published: at random).

    Notes
    -----
    Loss: mean squared error of a section, unless the method has its own. As published, a spot's prediction depends on
    all spots of its section.
    """

    batching = "section"
    predicts_slides = False
    gene_head: nn.Sequential
    """Ends with a :class:`~stexp.models.blocks.GeneHead`."""

    def __init__(self, tile_px: int, tile_share: float, pixel_scale: float, lr: float, start_from_mean: bool) -> None:
        super().__init__()
        self.tile_px, self.tile_share, self.pixel_scale, self.lr = tile_px, tile_share, pixel_scale, lr
        self.start_from_mean = start_from_mean

    def pixels(self, image: torch.Tensor) -> torch.Tensor:
        """Tiles (N, 3, H, W) in 0..1 to what the method sees of them, (N, 3, tile_px, tile_px) in 0..pixel_scale."""
        return central(image, self.tile_share, self.tile_px) * self.pixel_scale

    def on_fit_start(self) -> None:
        if self.start_from_mean and self.trainer.ckpt_path is None:
            last = self.gene_head[-1]
            assert isinstance(last, GeneHead)
            start_as_mean(last, self.data)

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor | None:
        loss = F.mse_loss(self(batch.tiles, batch.array_xy), batch.target)
        self.log("train/mse", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (N, G) of a section."""
        return Prediction(self(batch.tiles, batch.array_xy))
