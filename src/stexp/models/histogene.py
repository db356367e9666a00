"""HisToGene: a Transformer over the tiles of a whole section (Pang et al. 2021, bioRxiv 2021.11.28.470212)."""

from __future__ import annotations

import torch
from torch import nn

from stexp.arguments import Depth, OpenShare, Pixels, Positive, Rate, Width, checked
from stexp.models.blocks import ArrayEmbedding, GeneHead, TransformerBlock
from stexp.models.section_method import SectionMethod


class HisToGene(SectionMethod):
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

    @checked("model")
    def __init__(
        self,
        n_genes: int,
        n_positions: int,
        *,
        tile_px: Pixels = 112,
        tile_share: Rate = 0.5,
        pixel_scale: Positive = 255.0,
        dim: Width = 1024,
        depth: Depth = 8,
        heads: Width = 16,
        head_dim: Width = 64,
        hidden: Width = 2048,
        dropout: OpenShare = 0.1,
        lr: Rate = 1e-5,
        positions: bool = True,
        start_from_mean: bool = False,
    ) -> None:
        super().__init__(tile_px, tile_share, pixel_scale, lr, start_from_mean)
        self.patch_embedding = nn.Linear(3 * tile_px**2, dim)
        self.position = ArrayEmbedding(n_positions, dim) if positions else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, head_dim, hidden, dropout) for _ in range(depth))
        self.gene_head = nn.Sequential(nn.LayerNorm(dim), GeneHead(dim, n_genes))

    def forward(self, image: torch.Tensor, array_xy: torch.Tensor) -> torch.Tensor:
        """Tiles (N, 3, H, W) in 0..1 and array coordinates (N, 2) of a section to expression (N, G)."""
        x = self.patch_embedding(self.pixels(image).flatten(1))
        if self.position is not None:
            x = x + sum(self.position(array_xy))
        x = self.dropout(x)[None]
        for block in self.blocks:
            x = block(x)
        return self.gene_head(x[0])
