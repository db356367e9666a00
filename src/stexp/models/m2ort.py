"""M2ORT: attention between three resolutions of a tile (Wang et al. 2024, arXiv 2401.10608; Dootmaan/M2ORT)."""

from __future__ import annotations

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.nn import functional as F

from stexp.arguments import Depth, OpenShare, Pixels, Rate, Width, checked
from stexp.data.batches import SpotBatch
from stexp.errors import InputError
from stexp.models.blocks import GeneHead, start_as_mean
from stexp.models.method import Method, Prediction

LEVELS = 3
"""Resolutions: that of the tile, a half and a quarter of it; they give queries, keys and values in this order."""
WIDENING = (1, 2, 4)
"""The hidden layer of a level's embedding is as wide as the Transformer divided by this."""


class M2ORT(Method):
    """The same ground at three resolutions, cut into as many patches each; a token is what lies at one place.

    Patches of `patch_px` pixels at the resolution of the tile, of a half and of a quarter as many where it is halved
    and quartered, cover the same squares. Each level embeds its patches in a third of `dim`; the thirds of a square
    make a token. In every block the queries come from the first third, keys from the second and values from the last;
    what attention gives, and the MLP, mixes them. Expression is read from a class token.

    Parameters
    ----------
    n_genes
        G; it comes from the data.
    tile_px
        Side of the data's tiles, a multiple of `patch_px`.
    patch_px
        Side of a patch at the first level; 4 divides it.
    dim, depth, heads, head_dim, hidden
        Of the Transformer; 3 divides `dim`, `hidden` is the width of its MLPs.
    dropout
        In the attention's output and the MLPs.
    lr
        Of Adam.
    start_from_mean
        The last layer's bias starts as the mean expression of the training spots (published: at random).

    Notes
    -----
    As in github.com/Dootmaan/M2ORT, whose loader of HER2+ makes the lower levels of the tile, too (bilinear,
    antialiased); those of a pyramid cover the same ground. Position embedding and class token start as draws from
    N(0, 1), nothing is dropped out, pixels enter in 0..1. Published besides are turns by any angle, filled with white,
    and expression as log of counts in a million, here as the protocol has it. M2OST, its successor, is not here.
    """

    @checked("model")
    def __init__(
        self,
        n_genes: int,
        *,
        tile_px: Pixels = 224,
        patch_px: Pixels = 16,
        dim: Width = 768,
        depth: Depth = 8,
        heads: Width = 12,
        head_dim: Width = 64,
        hidden: Width = 512,
        dropout: OpenShare = 0.0,
        lr: Rate = 1e-4,
        start_from_mean: bool = False,
    ) -> None:
        super().__init__()
        coarsest = 2 ** (LEVELS - 1)
        if patch_px % coarsest:
            raise InputError(f"model.patch_px={patch_px}: a multiple of {coarsest} would fit")
        if tile_px % patch_px:
            raise InputError(f"model.patch_px={patch_px}: tiles have {tile_px} px; a divisor of that would fit")
        if dim % LEVELS:
            raise InputError(f"model.dim={dim}: a multiple of {LEVELS} would fit")
        self.tile_px, self.lr, self.start_from_mean = tile_px, lr, start_from_mean
        self.embeddings = nn.ModuleList(
            LevelEmbedding(patch_px >> level, dim // widening, dim // LEVELS) for level, widening in enumerate(WIDENING)
        )
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 1 + (tile_px // patch_px) ** 2, dim))
        self.blocks = nn.ModuleList(CrossLevelBlock(dim, heads, head_dim, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.gene_head = GeneHead(dim, n_genes)

    def tokens(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """Tiles at each level, (B, 3, px, px), (B, 3, px / 2, px / 2), ..., to tokens (B, L, dim), row by row."""
        return torch.cat([embed(level) for embed, level in zip(self.embeddings, levels, strict=True)], dim=-1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Tiles (B, 3, px, px) in 0..1 to expression (B, G)."""
        if image.shape[-1] != self.tile_px:
            raise InputError(
                f"model.tile_px={self.tile_px}: tiles have {image.shape[-1]} px, as the widest of data.scales or "
                f"data.scales_um has; model.tile_px={image.shape[-1]} would fit"
            )
        x = self.tokens(resolutions(image))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.gene_head(self.norm(x[:, 0]))

    def on_fit_start(self) -> None:
        if self.start_from_mean and self.trainer.ckpt_path is None:
            start_as_mean(self.gene_head, self.data)

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        loss = F.mse_loss(self(batch.tiles), batch.target)
        self.log("train/mse", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (B, G)."""
        return Prediction(self(batch.tiles))


def resolutions(image: torch.Tensor) -> list[torch.Tensor]:
    """Images (B, 3, px, px) as they are, halved and quartered, antialiased."""
    sides = [image.shape[-1] >> level for level in range(1, LEVELS)]
    return [image, *(F.interpolate(image, size=(side, side), mode="bilinear", antialias=True) for side in sides)]


class LevelEmbedding(nn.Sequential):
    """Patches of one level to their part of a token."""

    def __init__(self, patch_px: int, hidden: int, dim: int) -> None:
        n_values = 3 * patch_px**2
        super().__init__(
            nn.LayerNorm(n_values), nn.Linear(n_values, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.LayerNorm(dim)
        )
        self.patch_px = patch_px

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, px, px) -> (B, L, dim), patches row by row."""
        # unfolded patches are (colour, row, column); of a layer that is learned the order does not matter
        return super().forward(F.pixel_unshuffle(image, self.patch_px).flatten(2).transpose(1, 2))


class CrossLevelBlock(nn.Module):
    """Pre-norm attention, queries, keys and values from a third of the tokens each, and MLP; both residual."""

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.projections = nn.ModuleList(nn.Linear(dim // LEVELS, heads * head_dim, bias=False) for _ in range(LEVELS))
        self.to_out = nn.Linear(heads * head_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, dim) -> (B, L, dim)."""
        x = x + self.dropout(self.to_out(self.attend(self.norm(x))))
        return x + self.mlp(x)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised tokens (B, L, dim) to what attention gathers, (B, L, heads * head_dim)."""
        thirds = zip(self.projections, x.chunk(LEVELS, dim=-1), strict=True)
        q, k, v = (project(third).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project, third in thirds)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
