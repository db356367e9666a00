"""Hist2ST: convolutions, a Transformer and a graph network over a whole section (Zeng et al. 2022, bbac297)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import Compose, RandomGrayscale, RandomHorizontalFlip, RandomRotation

from stexp.arguments import Count, Depth, OpenShare, Pixels, Positive, Rate, Weight, Whole, Width, checked
from stexp.data.batches import SpotBatch
from stexp.errors import InputError
from stexp.models.blocks import ArrayEmbedding, GeneHead, TransformerBlock, central, neighbour_graph
from stexp.models.losses import zinb_nll
from stexp.models.section_method import SectionMethod


class Hist2ST(SectionMethod):
    """A spot's tile through convolutions, all spots through self-attention, neighbours through a graph network.

    Parameters
    ----------
    n_genes, n_positions
        G, and the rows of the position tables; they come from the data.
    tile_px, tile_share, pixel_scale
        The middle of the tile, this share of its side, enters with tile_px x tile_px pixels in 0..pixel_scale.
    patch_px, channels, kernel_size, mixer_depth
        First convolution, and the :class:`Mixer` blocks behind it. A spot's token has
        (tile_px // patch_px)^2 x channels / 8 dimensions, 1024 as published.
    depth, heads, head_dim
        Of the Transformer.
    graph_depth, n_neighbours, max_distance
        Of the :class:`GraphBlock`; see :func:`~stexp.models.blocks.neighbour_graph`.
    dropout
        Of the first convolution's output and in the Transformer.
    zinb_weight
        Of the negative log-likelihood of the raw counts; see :func:`~stexp.models.losses.zinb_nll`.
    n_views, distillation_weight
        Self-distillation: the section's prediction shall equal that of `n_views` augmented views, weighted by a
        softmax of what the model says of each.
    recompute_from
        A section of so many spots keeps the activations of one view at a time, and calculates them twice.
    lr
        Of Adam; times 0.9 every 50 epochs.
    positions
        False: tokens do not know where they are, which fits arrays of any size (not published).
    start_from_mean
        The last layer's bias starts as the mean expression of the training spots (published: at random).

    Notes
    -----
    Loss: mean squared error + zinb_weight x ZINB + distillation_weight x distillation. As published, the graph
    network looks at a spot's neighbours without the spot, all tiles of a view are augmented alike, and gradients go
    through both sides of the distillation. A spot without a neighbour, where theirs divides by 0, looks at itself.
    """

    @checked("model")
    def __init__(
        self,
        n_genes: int,
        n_positions: int,
        *,
        tile_px: Pixels = 112,
        tile_share: Rate = 0.5,
        pixel_scale: Positive = 255.0,
        patch_px: Pixels = 7,
        channels: Width = 32,
        kernel_size: Pixels = 5,
        mixer_depth: Depth = 2,
        depth: Depth = 8,
        heads: Width = 16,
        head_dim: Width = 64,
        graph_depth: Depth = 4,
        n_neighbours: Count = 4,
        max_distance: Positive | None = 2.0,
        dropout: OpenShare = 0.2,
        zinb_weight: Weight = 0.25,
        n_views: Whole = 5,
        distillation_weight: Weight = 0.5,
        recompute_from: Whole = 1000,
        lr: Rate = 1e-5,
        positions: bool = True,
        start_from_mean: bool = False,
    ) -> None:
        super().__init__(tile_px, tile_share, pixel_scale, lr, start_from_mean)
        if tile_px < patch_px:
            raise InputError(f"model.tile_px={tile_px}: a number of at least model.patch_px={patch_px} would fit")
        if channels < 8 or channels % 8:
            raise InputError(f"model.channels={channels}: a number that 8 divides would fit")
        self.n_neighbours, self.max_distance = n_neighbours, max_distance
        self.zinb_weight, self.n_views, self.distillation_weight = zinb_weight, n_views, distillation_weight
        self.recompute_from = recompute_from
        dim = (tile_px // patch_px) ** 2 * channels // 8
        self.patch_embedding = nn.Conv2d(3, channels, patch_px, patch_px)
        self.dropout = nn.Dropout(dropout)
        self.mixers = nn.Sequential(*(Mixer(channels, kernel_size) for _ in range(mixer_depth)))
        self.down = nn.Conv2d(channels, channels // 8, 1)
        self.position = ArrayEmbedding(n_positions, dim) if positions else None
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, head_dim, dim, dropout) for _ in range(depth))
        self.graph_blocks = nn.ModuleList(GraphBlock(dim) for _ in range(graph_depth))
        self.over_depth = nn.LSTM(dim, dim, 2)
        self.gene_head = nn.Sequential(nn.LayerNorm(dim), GeneHead(dim, n_genes))
        if zinb_weight > 0:
            self.mean_head, self.dispersion_head, self.zero_head = (GeneHead(dim, n_genes) for _ in range(3))
        if n_views > 0:
            self.view_weight = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))
            self.change = Compose([RandomGrayscale(0.1), RandomRotation(90), RandomHorizontalFlip(0.2)])

    def embed(
        self, tiles: torch.Tensor, array_xy: torch.Tensor, graph: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Tiles (N, 3, tile_px, tile_px) in 0..1, array coordinates (N, 2) and graph of a section to (N, dim)."""
        x = self.mixers(self.dropout(self.patch_embedding(tiles * self.pixel_scale)))
        x = self.down(x).flatten(1)
        if self.position is not None:
            x = x + sum(self.position(array_xy))
        x = x[None]
        for block in self.blocks:
            x = block(x)
        x, depths = x[0], []
        for block in self.graph_blocks:
            x = block(x, *graph)
            depths.append(x)
        return self.over_depth(torch.stack(depths))[0].mean(dim=0)

    def forward(self, image: torch.Tensor, array_xy: torch.Tensor) -> torch.Tensor:
        """Tiles (N, 3, H, W) in 0..1 and array coordinates (N, 2) of a section to expression (N, G)."""
        graph = neighbour_graph(array_xy, self.n_neighbours, self.max_distance)
        return self.gene_head(self.embed(central(image, self.tile_share, self.tile_px), array_xy, graph))

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        tiles = central(batch.tiles, self.tile_share, self.tile_px)
        graph = neighbour_graph(batch.array_xy, self.n_neighbours, self.max_distance)
        hidden = self._kept_or_not(self.embed, tiles, batch.array_xy, graph)
        predicted = self.gene_head(hidden).float()
        loss = mse = F.mse_loss(predicted, batch.target)
        losses = {"mse": mse}
        if self.zinb_weight > 0:
            losses["zinb"] = self._zinb(hidden, batch.counts)
            loss = loss + self.zinb_weight * losses["zinb"]
        if self.n_views > 0:
            views = [
                self._kept_or_not(self._view, tiles, batch.array_xy, graph) for _ in range(self.n_views)
            ]  # of each: expression (N, G), weight (N, 1)
            predictions, weight = (torch.stack(part).float() for part in zip(*views, strict=True))
            losses["distillation"] = F.mse_loss((weight.softmax(dim=0) * predictions).sum(dim=0), predicted)
            loss = loss + self.distillation_weight * losses["distillation"]
        for name, value in losses.items():
            self.log(f"train/{name}", value, prog_bar=name == "mse", batch_size=len(batch))
        return loss

    def _view(self, tiles: torch.Tensor, array_xy: torch.Tensor, graph: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.embed(self.change(tiles), array_xy, graph)
        return self.gene_head(hidden), self.view_weight(hidden)

    def _zinb(self, hidden: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        library = counts.sum(dim=1, keepdim=True)
        size = library / library.quantile(0.5).clamp(min=1)
        # limits as published
        mean = self.mean_head(hidden).float().exp().clamp(1e-5, 1e6) * size
        dispersion = F.softplus(self.dispersion_head(hidden).float()).clamp(1e-4, 1e4)
        return zinb_nll(counts, mean, dispersion, self.zero_head(hidden))

    def _kept_or_not(self, function, tiles: torch.Tensor, *args):
        if len(tiles) < self.recompute_from:
            return function(tiles, *args)
        return checkpoint(
            function, tiles, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), untracked(self))
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.9)}


class Mixer(nn.Module):
    """Two depthwise convolutions, residual, then a pointwise one; (N, C, h, w) to the same."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        depthwise = []
        for _ in range(2):
            convolution = nn.Conv2d(channels, channels, kernel_size, groups=channels, padding="same")
            depthwise += [convolution, nn.BatchNorm2d(channels), nn.GELU()]
        self.depthwise = nn.Sequential(*depthwise)
        self.pointwise = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU(), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise(self.depthwise(x) + x)


class GraphBlock(nn.Module):
    """GraphSAGE: relu(W mean of the neighbours), brought to length 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Linear(dim, dim, bias=False)
        nn.init.xavier_uniform_(self.weight.weight)

    def forward(self, x: torch.Tensor, index: torch.Tensor, is_near: torch.Tensor) -> torch.Tensor:
        """Spots (N, dim) and their graph, (N, K) twice, to (N, dim)."""
        share = is_near.to(x.dtype) / is_near.sum(dim=1, keepdim=True)
        around = torch.einsum("nk,nkd->nd", share, x[index])
        return F.normalize(F.relu(self.weight(around)), dim=1)


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """Batch normalisation leaves its running mean and variance as they are."""
    momentum = {norm: norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)}
    for norm in momentum:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, before in momentum.items():
            norm.momentum = before
