"""ST-Net: a DenseNet-121 regresses the expression of a tile (He et al. 2020, Nat Biomed Eng 4, 827-834)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from stexp.arguments import OpenShare, Rate, Weight, checked
from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.data.rows import column_means, some_rows
from stexp.models.blocks import GeneHead
from stexp.models.encoders.image import ImageEncoder
from stexp.models.method import Method, Prediction


class STNet(Method):
    """Image encoder and one linear layer, which starts as the training mean.

    Parameters
    ----------
    image_encoder
        Tiles to features; all of it is trained unless it is frozen.
    n_genes
        G; it comes from the data.
    input_scale
        Mean and standard deviation that each colour is brought to 0 and 1 with: those of the training tiles
        (``train``, as published), or the encoder's own (``image_encoder``).
    symmetries
        Predict the mean over the eight symmetries of the tile, as published; false: the tile as it is.
    lr, momentum, weight_decay
        Of stochastic gradient descent.

    Notes
    -----
    As in github.com/bryanhe/ST-Net the loss is summed over the spots of a batch, and averaged over genes; so the
    step does not shrink with the batch. It estimates mean and standard deviation from twelve batches; here they
    are of all training tiles, or of 2,000 in even steps. Its expression is log((1 + count) / (sum + number of
    genes)), here that of the protocol. Its number of epochs is chosen by cross-validation among the training
    patients, here by the validation spots.
    """

    mean: torch.Tensor  # (1, 3, 1, 1)
    std: torch.Tensor

    @checked("model")
    def __init__(
        self,
        image_encoder: ImageEncoder,
        n_genes: int,
        *,
        input_scale: Literal["train", "image_encoder"] = "train",
        symmetries: bool = True,
        lr: Rate = 1e-6,
        momentum: OpenShare = 0.9,
        weight_decay: Weight = 0.0,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.head = GeneHead(image_encoder.num_features, n_genes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # of the training tiles; buffers, since a reloaded model has no training tiles
        self.register_buffer("mean", image_encoder.mean.clone())
        self.register_buffer("std", image_encoder.std.clone())
        self.input_scale, self.symmetries = input_scale, symmetries
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay

    @property
    def frozen_encoder(self) -> ImageEncoder | None:
        """The encoder, where it stands still and sees the tile as it is and in its own scale."""
        as_it_is = self.input_scale == "image_encoder" and not self.symmetries
        return self.image_encoder if self.image_encoder.frozen and as_it_is else None

    def on_fit_start(self) -> None:
        """Start as the training mean, and look at the colours of the training tiles; a resumed run has done both."""
        if self.trainer.ckpt_path is None:
            self.start_from(self.data)

    @torch.no_grad()
    def start_from(self, data: SpotDataModule) -> None:
        """Set the bias to the mean expression of the training spots, and the input scale as `input_scale` says."""
        rows = data.rows("train")
        self.head.bias.copy_(torch.from_numpy(column_means(some_rows(data.target, rows), "float64")))
        if self.input_scale == "train":
            sample = torch.from_numpy(rows[:: max(1, len(rows) // 2000)])
            moments = []  # (B, 2, 3): means of the colours of each tile, and of their squares
            for part in sample.split(64):
                pixels = data.tiles(part.numpy()).view(len(part), -1, 3).float() / 255
                moments.append(torch.stack([pixels.mean(dim=1), pixels.square().mean(dim=1)], dim=1))
            mean, square = torch.cat(moments).double().mean(dim=0)
            self.mean.copy_(mean.view(1, 3, 1, 1))
            self.std.copy_((square - mean**2).clamp(min=1e-6).sqrt().view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Tiles (B, 3, H, W), RGB in 0..1, to expression (B, G)."""
        encoder = self.image_encoder
        # the encoder subtracts and divides by its own
        scaled = (image - self.mean) / self.std * encoder.std + encoder.mean
        return self.head(encoder(scaled))

    def predict_once(self, batch: SpotBatch) -> torch.Tensor:
        """Expression by the tiles as they are, or by their features where the batch comes without images, (B, G)."""
        return (self.head(batch.tile_features) if batch.image is None else self(batch.image)).float()

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        loss = (self.predict_once(batch) - batch.target).square().mean(dim=1).sum()
        self.log("train/mse", loss.detach() / len(batch), prog_bar=True, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (B, G)."""
        if not self.symmetries:
            return Prediction(self.predict_once(batch))
        images = [batch.tiles.rot90(turns, (2, 3)) for turns in range(4)]
        images += [image.flip(3) for image in images]
        return Prediction(torch.stack([self(image).float() for image in images]).mean(dim=0))
