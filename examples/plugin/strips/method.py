"""A method: two layers on the features of an image encoder."""

from __future__ import annotations

import torch
from torch import nn

from stexp.arguments import Rate, Width, checked
from stexp.data.batches import SpotBatch
from stexp.models.blocks import GeneHead, start_as_mean
from stexp.models.encoders.image import ImageEncoder
from stexp.models.method import Method, Prediction


class TwoLayers(Method):
    """Tile to features, features to expression.

    Parameters
    ----------
    image_encoder
        What reads tiles, as ``image_encoder=`` chooses it.
    n_genes
        Length of the panel; it comes from the data.
    hidden
        Width of the layer between.
    lr
        Of Adam.
    """

    @checked("model")
    def __init__(self, image_encoder: ImageEncoder, n_genes: int, *, hidden: Width = 128, lr: Rate = 1e-3) -> None:
        super().__init__()
        self.image_encoder, self.lr = image_encoder, lr
        self.hidden = nn.Sequential(nn.Linear(image_encoder.num_features, hidden), nn.GELU())
        self.head = GeneHead(hidden, n_genes)

    def on_fit_start(self) -> None:
        """Start as the training mean; a resumed run has done so."""
        if self.trainer.ckpt_path is None:
            start_as_mean(self.head, self.data)

    @property
    def frozen_encoder(self) -> ImageEncoder | None:
        """With image_encoder.frozen=true batches come with the features of tiles, and without tiles."""
        return self.image_encoder if self.image_encoder.frozen else None

    def forward(self, batch: SpotBatch) -> torch.Tensor:
        """Expression (B, G) of the spots of a batch."""
        features = batch.tile_features if batch.image is None else self.image_encoder(batch.image)
        return self.head(self.hidden(features)).float()

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self(batch), batch.target)
        self.log("train/mse", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        return Prediction(self(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=self.lr)
