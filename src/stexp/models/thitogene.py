"""THItoGene: dynamic convolution, capsules, a Transformer and graph attention over a section (Jia et al. 2024)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from stexp.arguments import Count, Depth, OpenShare, Pixels, Positive, Rate, Width, checked
from stexp.data.batches import SpotBatch
from stexp.errors import InputError
from stexp.models.blocks import ArrayEmbedding, GeneHead, TransformerBlock, neighbour_graph
from stexp.models.section_method import SectionMethod


class THItoGene(SectionMethod):
    """A spot's tile becomes capsules, to which its two array coordinates are added as two more.

    Parameters
    ----------
    n_genes, n_positions
        G, and the rows of the position tables; they come from the data.
    tile_px, tile_share, pixel_scale
        The middle of the tile, this share of its side, enters with tile_px x tile_px pixels in 0..pixel_scale.
    capsules, capsule_dim
        What a tile becomes. The token of a spot has (capsules + 2) x capsule_dim dimensions.
    depth, heads, head_dim, hidden
        Of the Transformer; `hidden` is the width of its MLPs.
    graph_heads, graph_hidden, graph_dim, n_neighbours
        Of the two layers of graph attention: the first has `graph_heads` heads of `graph_hidden`, the second one
        of `graph_dim`.
    dropout
        Of the tokens, in the Transformer, of the attention in the graph and of what enters it.
    lr
        Of Adam.
    positions
        False: tokens do not know where they are, which fits arrays of any size (not published).
    start_from_mean
        The last layer's bias starts as the mean expression of the training spots (published: at random).

    Notes
    -----
    Loss: mean squared error of a section. As published, graph attention looks at a spot's neighbours without the spot.
    A section of one spot, which has none, looks at itself.
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
        capsules: Width = 20,
        capsule_dim: Width = 64,
        depth: Depth = 4,
        heads: Width = 16,
        head_dim: Width = 64,
        hidden: Width = 2048,
        graph_heads: Width = 8,
        graph_hidden: Width = 1024,
        graph_dim: Width = 512,
        n_neighbours: Count = 4,
        dropout: OpenShare = 0.2,
        lr: Rate = 1e-5,
        positions: bool = True,
        start_from_mean: bool = False,
    ) -> None:
        super().__init__(tile_px, tile_share, pixel_scale, lr, start_from_mean)
        if tile_px < 44 or tile_px % 4:
            raise InputError(f"model.tile_px={tile_px}: a number of at least 44 that 4 divides would fit")
        self.n_neighbours = n_neighbours
        self.convolution = DynamicConv2d(3, 16, 4)
        self.capsules = EfficientCapsules(tile_px // 4, capsules, capsule_dim)
        self.position = ArrayEmbedding(n_positions, capsule_dim) if positions else None
        dim = (capsules + 2 * positions) * capsule_dim
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, head_dim, hidden, dropout) for _ in range(depth))
        self.graph_in = GraphAttention(dim, graph_hidden, graph_heads, dropout)
        self.graph_out = GraphAttention(graph_heads * graph_hidden, graph_dim, 1, dropout)
        self.gene_head = nn.Sequential(
            nn.Linear(graph_dim, 1024), nn.ReLU(), nn.LayerNorm(1024), GeneHead(1024, n_genes)
        )

    def forward(self, image: torch.Tensor, array_xy: torch.Tensor) -> torch.Tensor:
        """Tiles (N, 3, H, W) in 0..1 and array coordinates (N, 2) of a section to expression (N, G)."""
        tokens = self.capsules(F.relu(self.convolution(self.pixels(image))))
        if self.position is not None:
            tokens = torch.cat([tokens, torch.stack(self.position(array_xy), dim=1)], dim=1)
        x = self.dropout(tokens.flatten(1))[None]
        for block in self.blocks:
            x = block(x)
        graph = neighbour_graph(array_xy, self.n_neighbours)
        x = F.elu(self.graph_in(self.dropout(x[0]), *graph))
        x = F.elu(self.graph_out(self.dropout(x), *graph))
        return self.gene_head(x)

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor | None:
        # batch normalisation has nothing to compare one spot with: such a section does not train
        return None if len(batch) == 1 else super().training_step(batch, batch_idx)


class DynamicConv2d(nn.Module):
    """Omni-dimensional dynamic convolution (Li et al. 2022, ICLR), whose stride is its kernel's size.

    The mean colour of an image decides on four factors of the kernels: by place, input channel, output channel, and
    which of `n_kernels` they are made of.
    """

    def __init__(self, n_in: int, n_out: int, size: int, n_kernels: int = 4, squeezed: int = 16) -> None:
        super().__init__()
        self.size = size
        self.squeeze = nn.Sequential(nn.Linear(n_in, squeezed, bias=False), nn.BatchNorm1d(squeezed), nn.ReLU())
        self.by_input, self.by_output = nn.Linear(squeezed, n_in), nn.Linear(squeezed, n_out)
        self.by_place, self.by_kernel = nn.Linear(squeezed, size**2), nn.Linear(squeezed, n_kernels)
        self.weight = nn.Parameter(torch.empty(n_kernels, n_out, n_in, size**2))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.out_features))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.weight, std=math.sqrt(2 / (n_out * size**2)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, n_in, H, W) to (N, n_out, H / size, W / size)."""
        pooled = self.squeeze(image.mean(dim=(2, 3)))
        by_input, by_output, by_place = (
            layer(pooled).sigmoid() for layer in (self.by_input, self.by_output, self.by_place)
        )
        weight = torch.einsum("nk,koip->noip", self.by_kernel(pooled).softmax(dim=1), self.weight)
        weight = weight * by_input[:, None, :, None] * by_place[:, None, None, :]
        # kernels that do not overlap: one matrix product for each image
        pixels = F.pixel_unshuffle(image, self.size)
        out = torch.bmm(weight.flatten(2), pixels.flatten(2).to(weight.dtype)) * by_output[:, :, None]
        return out.unflatten(2, pixels.shape[2:])


class EfficientCapsules(nn.Module):
    """Efficient-CapsNet (Mazzia et al. 2021, Sci Rep 11, 14634): 16 primary capsules of 8, routed by attention.

    Parameters
    ----------
    side
        H of what comes in; 28 as published. The last convolution covers what is left of it.
    n, dim
        Capsules that come out.
    """

    def __init__(self, side: int, n: int, dim: int) -> None:
        super().__init__()
        layers = []
        for n_in, n_out, size, stride in ((16, 32, 5, 1), (32, 64, 3, 1), (64, 64, 3, 1), (64, 128, 3, 2)):
            convolution = nn.Conv2d(n_in, n_out, size, stride)
            nn.init.kaiming_normal_(convolution.weight)
            layers += [convolution, nn.BatchNorm2d(n_out), nn.ReLU()]
            side = (side - size) // stride + 1
        self.convolutions = nn.Sequential(*layers)
        self.primary = nn.Conv2d(128, 128, side, groups=128)
        self.weight = nn.Parameter(torch.empty(n, 16, 8, dim))
        self.bias = nn.Parameter(torch.zeros(n, 16))
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.weight[0].numel()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 16, H, H) to (N, n, dim)."""
        primary = squash(self.primary(self.convolutions(x)).view(-1, 16, 8))
        votes = torch.einsum("nji,cjid->ncjd", primary.to(self.weight.dtype), self.weight)
        # how far the vote of a primary capsule agrees with all votes for the same capsule
        agreement = torch.einsum("ncjd,ncd->ncj", votes, votes.sum(dim=2))
        share = (agreement.float() / math.sqrt(votes.shape[-1])).softmax(dim=1) + self.bias
        return squash(torch.einsum("ncj,ncjd->ncd", share.to(votes.dtype), votes))


def squash(x: torch.Tensor) -> torch.Tensor:
    """Bring capsules (..., D) from length n to length 1 - exp(-n), in float32."""
    x = x.float()
    n = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
    return -torch.expm1(-n) / n * x


class GraphAttention(nn.Module):
    """A layer of graph attention (Velickovic et al. 2018, ICLR): heads side by side, no self-loops, no bias."""

    def __init__(self, dim: int, head_dim: int, heads: int, dropout: float, slope: float = 0.01) -> None:
        super().__init__()
        self.heads, self.slope = heads, slope
        self.weight = nn.Linear(dim, heads * head_dim, bias=False)
        self.asking, self.answering = (nn.Parameter(torch.empty(heads, head_dim)) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        for parameter, fans in (
            (self.weight.weight, dim + head_dim),
            (self.asking, 2 * head_dim + 1),
            (self.answering, 2 * head_dim + 1),
        ):
            limit = 1.414 * math.sqrt(6 / fans)  # of each head by itself
            nn.init.uniform_(parameter, -limit, limit)

    def forward(self, x: torch.Tensor, index: torch.Tensor, is_near: torch.Tensor) -> torch.Tensor:
        """Spots (N, dim) and their graph, (N, K) twice, to (N, heads x head_dim)."""
        x = self.weight(x).unflatten(1, (self.heads, -1))
        asking, answering = (
            torch.einsum("nhd,hd->nh", x, vector.to(x.dtype)) for vector in (self.asking, self.answering)
        )
        score = F.leaky_relu(asking[:, None] + answering[index], self.slope).float()  # (N, K, heads)
        share = score.masked_fill(~is_near[:, :, None], -torch.inf).softmax(dim=1)
        return torch.einsum("nkh,nkhd->nhd", self.dropout(share).to(x.dtype), x[index]).flatten(1)
