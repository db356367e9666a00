"""TRIPLEX: a tile, its neighbourhood and its whole section, fused (Chung et al. 2024, CVPR; arXiv 2403.07592)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stexp.arguments import Count, Depth, Odd, OpenShare, Rate, Share, Width, checked
from stexp.data.batches import SpotBatch
from stexp.data.features import Surroundings
from stexp.errors import InputError
from stexp.models.blocks import GeneHead
from stexp.models.encoders.image import ImageEncoder
from stexp.models.encoders.views import (
    AttentionBlock,
    GlobalEncoder,
    NeighbourEncoder,
    array_neighbours,
    feature_map,
    map_model,
    nearest_spots,
)
from stexp.models.method import Method, Prediction

HEADS = ("fused", "target", "neighbour", "whole")


@dataclass
class SectionView:
    """What the spots of a section are seen with."""

    first: int  # row of its first spot in SpotDataModule.spots
    features: torch.Tensor  # (N, F)
    around: torch.Tensor  # (N, size * size), for the position encoding
    nearest: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """Rows of the spot itself and its nearest spots, (N, T), itself where there are none; which there are; and where,
    (N, T, 2), in steps of the array."""


class Triplex(Method):
    """Target, neighbourhood and section, a head for each and one for the three fused by cross-attention.

    Parameters
    ----------
    image_encoder
        Its feature map is the tokens of the tile; all of it is trained unless it is frozen.
    n_genes, n_features
        G, and F of the frozen features that neighbourhood and section are seen through; they come from the data.
    dim
        D of all tokens. Features of another width go through one linear layer.
    neighbours
        ``tiles``: the side x side tiles that meet edge to edge around the spot, cut and encoded once, as published.
        ``spots``: the spot and its side * side - 1 nearest spots of the section, whose features are there already. They
        are biased by their distance in steps of the array.
    side
        Of the neighbourhood, in tiles; odd.
    fusion_*, global_*, neighbour_*
        Depth, heads, hidden width of the MLP and dropout of the three encoders.
    kernel_size
        Of the position encoding, odd.
    alpha
        Share of the fused prediction, against the truth, in what the other heads learn.
    nonnegative
        Clamp predictions at zero, in training too (published code since 2025).
    lr, lr_step, lr_decay
        Adam; the learning rate is multiplied by `lr_decay` every `lr_step` epochs.

    Notes
    -----
    Neighbourhood and section are seen unaugmented, through the image encoder before any training. All spots of a
    section are seen, whatever their role: their tiles, never their expression. Under ``protocol=blocks`` training so
    looks at the image of the blocks held out, as it would at a whole slide to be predicted.

    Differs from github.com/NEXGEM/TRIPLEX: the truth is not smoothed over neighbouring spots, there in training and
    test; no early stopping, the best epoch is kept; tiles beyond the image have features of zero, there those of a
    black or white tile (nothing attends to them, but they count in the mean that the neighbour head reads); dropout is
    off in evaluation, there it stays on after the attention of global and fusion encoder.
    """

    predicts_slides = False
    grid: torch.Tensor  # (side * side, 2)

    @checked("model")
    def __init__(
        self,
        image_encoder: ImageEncoder,
        n_genes: int,
        n_features: int,
        *,
        dim: Width = 512,
        neighbours: Literal["tiles", "spots"] = "tiles",
        side: Odd = 5,
        fusion_depth: Depth = 1,
        fusion_heads: Width = 4,
        fusion_hidden: Width = 2048,
        fusion_dropout: OpenShare = 0.2,
        global_depth: Depth = 3,
        global_heads: Width = 16,
        global_hidden: Width = 2048,
        global_dropout: OpenShare = 0.1,
        neighbour_depth: Depth = 3,
        neighbour_heads: Width = 16,
        neighbour_hidden: Width = 512,
        neighbour_dropout: OpenShare = 0.3,
        kernel_size: Odd = 3,
        alpha: Share = 0.3,
        nonnegative: bool = False,
        lr: Rate = 1e-4,
        lr_step: Count = 50,
        lr_decay: Rate = 0.9,
    ) -> None:
        super().__init__()
        for name, heads in (("fusion", fusion_heads), ("global", global_heads), ("neighbour", neighbour_heads)):
            if dim % heads:
                raise InputError(f"model.{name}_heads={heads}: a divisor of model.dim={dim} would fit")
        self.image_encoder = image_encoder
        self.target_width = _width(map_model(image_encoder).num_features, dim)
        self.neighbour_width, self.global_width = _width(n_features, dim), _width(n_features, dim)
        self.neighbour_encoder = NeighbourEncoder(
            dim, neighbour_depth, neighbour_heads, neighbour_hidden, neighbour_dropout, side
        )
        self.global_encoder = GlobalEncoder(dim, global_depth, global_heads, global_hidden, global_dropout, kernel_size)
        self.fusion = nn.ModuleList(
            AttentionBlock(dim, fusion_heads, fusion_hidden, fusion_dropout) for _ in range(fusion_depth)
        )
        self.fusion_norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleDict({name: GeneHead(dim, n_genes) for name in ("fused", "target", "neighbour", "whole")})
        steps = torch.arange(side, dtype=torch.float32)
        self.register_buffer("grid", torch.cartesian_prod(steps, steps).flip(1), persistent=False)  # left to right
        self.neighbours, self.side, self.kernel_size, self.alpha = neighbours, side, kernel_size, alpha
        self.nonnegative, self.lr, self.lr_step, self.lr_decay = nonnegative, lr, lr_step, lr_decay
        self._surroundings: Surroundings | None = None  # of the trainer's data, where `neighbours` are tiles
        self._views: dict[int, SectionView] = {}
        self._tokens: dict[int, torch.Tensor] | None = None  # of sections, where the weights stay as they are

    def forward(
        self,
        image: torch.Tensor,
        neighbour: torch.Tensor,
        seen: torch.Tensor,
        place: torch.Tensor,
        whole: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Predictions (B, G) of the four heads.

        Parameters
        ----------
        image : (B, 3, H, W)
            Tiles, RGB in 0..1.
        neighbour, seen, place : (B, T, F), (B, T), (B or 1, T, 2)
            Features around the spot, which of them there are, and where on the grid.
        whole : (B, D)
            The spots' tokens from `see_section`.
        """
        target = self.target_width(feature_map(self.image_encoder, image))
        neighbour = self.neighbour_encoder(self.neighbour_width(neighbour), seen, place)
        to_target = to_neighbour = whole[:, None]
        for block in self.fusion:
            to_target = block(to_target, target)
            to_neighbour = block(to_neighbour, neighbour, seen[:, None, None])
        fused = self.fusion_norm((to_target + to_neighbour)[:, 0])
        tokens = {"fused": fused, "target": target.mean(dim=1), "neighbour": neighbour.mean(dim=1), "whole": whole}
        predicted = {name: head(tokens[name]).float() for name, head in self.heads.items()}
        return {name: value.relu() for name, value in predicted.items()} if self.nonnegative else predicted

    def see_section(self, features: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
        """Features (N, F) of all spots of a section to tokens (N, D)."""
        if not torch.is_grad_enabled():
            return self.global_encoder(self.global_width(features), around)
        # a batch may see dozens of sections; what lies between is calculated again where gradients need it
        return checkpoint(self.global_encoder, self.global_width(features), around, use_reentrant=False)

    # what surrounds the spots of a batch

    def setup(self, stage: str) -> None:
        self._views = {}

    def view(self, section: int) -> SectionView:
        """What the section with this code is seen with, from the trainer's data."""
        if section not in self._views:
            data = self.data
            rows = np.flatnonzero(data.spots["section"] == data.section_names[section])
            array_xy = data.spots[["array_x", "array_y"]].to_numpy(np.int64)[rows]
            features = torch.from_numpy(data.tile_features[rows]).to(self.device)
            around = torch.from_numpy(array_neighbours(array_xy, self.kernel_size)).to(self.device)
            nearest = None
            if self.neighbours == "spots":
                near, seen, place = map(torch.from_numpy, nearest_spots(data.xy_px[rows], self.side**2))
                nearest = near.to(self.device), seen.to(self.device), place.to(self.device)
            self._views[section] = SectionView(int(rows[0]), features, around, nearest)
        return self._views[section]

    def see(self, batch: SpotBatch) -> dict[str, torch.Tensor]:
        """Predictions of the four heads for a batch of the trainer's data."""
        n_around = self.side**2
        whole = place = None
        if self.neighbours == "tiles":
            tables, rows = self._surroundings, batch.spot.cpu().numpy()
            assert tables is not None  # taken when a fit or a prediction starts
            neighbour, seen = (torch.from_numpy(x).to(self.device) for x in (tables[rows], tables.inside[rows]))
            place = self.grid[None]
        else:
            neighbour = batch.tile_features.new_empty(len(batch), n_around, batch.tile_features.shape[1])
            seen = torch.empty(len(batch), n_around, dtype=torch.bool, device=self.device)
            place = torch.empty(len(batch), n_around, 2, device=self.device)
        for section in batch.section.unique().tolist():
            in_section = torch.nonzero(batch.section == section)[:, 0]
            view = self.view(section)
            row = batch.spot[in_section] - view.first
            tokens = self._section_tokens(section, view)[row]
            whole = tokens.new_zeros(len(batch), tokens.shape[1]) if whole is None else whole
            whole = whole.index_copy(0, in_section, tokens)
            if view.nearest is not None:
                near, is_there, where = view.nearest
                neighbour[in_section], seen[in_section] = view.features[near[row]], is_there[row]
                place[in_section] = where[row]
        return self(batch.tiles, neighbour, seen, place, whole)

    def _section_tokens(self, section: int, view: SectionView) -> torch.Tensor:
        if self._tokens is None:
            return self.see_section(view.features, view.around)
        if section not in self._tokens:
            self._tokens[section] = self.see_section(view.features, view.around)
        return self._tokens[section]

    def on_validation_start(self) -> None:
        self._tokens = {}

    def on_validation_end(self) -> None:
        self._tokens = None

    def on_fit_start(self) -> None:
        self._see_surroundings()

    def on_predict_start(self) -> None:
        self._see_surroundings()
        self.on_validation_start()

    def on_predict_end(self) -> None:
        self.on_validation_end()

    def _see_surroundings(self) -> None:
        if self.neighbours == "tiles":
            self._surroundings = self.data.surroundings(self.side)

    # training

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        loss = self.loss(self.see(batch), batch.target)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def loss(self, predicted: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """MSE of the fused head, and for each other 1 - alpha of its MSE and alpha of that to the fused head."""
        fused, *others = predicted.values()
        loss = F.mse_loss(fused, target)
        for head in others:
            loss = loss + (1 - self.alpha) * F.mse_loss(head, target) + self.alpha * F.mse_loss(head, fused)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.lr)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, self.lr_step, self.lr_decay),
        }

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (B, G) of the fused head."""
        return Prediction(self.see(batch)["fused"])


def _width(n_features: int, dim: int) -> nn.Module:
    return nn.Identity() if n_features == dim else nn.Linear(n_features, dim)
