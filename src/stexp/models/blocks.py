"""Blocks shared by two or more methods."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stexp.data.batches import nearest
from stexp.data.datamodule import SpotDataModule
from stexp.data.rows import column_means, some_rows
from stexp.errors import InputError

REACH = 1.6  # in array pitches: the 8 spots around one on a square array, the 6 on a hexagonal one
MAX_NEIGHBOURS = 8


class ProjectionHead(nn.Module):
    """F features to D dimensions of a shared space: LayerNorm(p + Dropout(Linear(GELU(p)))), p = Linear(x).

    Source: mclSTExp, equation for both heads; BLEEP uses the same.
    """

    def __init__(self, n_features: int, n_dims: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.projection = nn.Linear(n_features, n_dims)
        self.fc = nn.Linear(n_dims, n_dims)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(n_dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., F) -> (..., D)."""
        p = self.projection(x)
        return self.layer_norm(p + self.dropout(self.fc(F.gelu(p))))


class GeneHead(nn.Linear):
    """The last layer before expression, in 32 bits also under autocast: bf16 keeps three digits of its sums, which is
    less than predictions of a gene differ between spots early in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., F) -> (..., G) float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, both residual; queries, keys and values without bias."""

    def __init__(
        self, dim: int, heads: int = 8, head_dim: int = 64, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.attn_norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.ff_norm = nn.LayerNorm(dim)
        hidden = hidden or dim
        self.ff = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, n_out: int | None = None) -> torch.Tensor:
        """Tokens (N, L, dim) -> (N, L, dim), or the first `n_out`; `mask` (N, L) is False where one is padding."""
        x = x[:, :n_out] + self.attend(x, mask, n_out)
        return x + self.ff(self.ff_norm(x))

    def attend(self, x: torch.Tensor, mask: torch.Tensor | None = None, n_out: int | None = None) -> torch.Tensor:
        """What attention adds to tokens (N, L, dim), or to the first `n_out`, which attend to all."""
        x, width = self.attn_norm(x), self.heads * self.head_dim
        if n_out is None:
            q, k, v = self.to_qkv(x).split(width, dim=-1)
        else:
            of_query, of_rest = self.to_qkv.weight.split([width, 2 * width])
            q, (k, v) = F.linear(x[:, :n_out], of_query), F.linear(x, of_rest).split(width, dim=-1)
        q, k, v = (each.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for each in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
        return self.dropout(self.to_out(attended.transpose(1, 2).flatten(2)))


class ArrayEmbedding(nn.Module):
    """Two learned tables, one row for each array coordinate, as whole-section methods have them."""

    def __init__(self, n_positions: int, dim: int) -> None:
        super().__init__()
        if n_positions > 1 << 16:
            raise InputError(
                f"array coordinates go up to {n_positions - 1}; a learned table for each would be too large. Are they "
                f"pixels? Take array coordinates"
            )
        self.x_embed, self.y_embed = nn.Embedding(n_positions, dim), nn.Embedding(n_positions, dim)

    def forward(self, array_xy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Array coordinates (N, 2) to the rows of x and of y, each (N, dim).

        Raises
        ------
        InputError
            A coordinate has no row.
        """
        n = self.x_embed.num_embeddings
        least, largest = int(array_xy.min()), int(array_xy.max())
        if least < 0 or largest >= n:
            raise InputError(
                f"array coordinates from {least} to {largest} do not fit the learned position table of {n} rows: the "
                f"model was trained on a smaller array"
            )
        return self.x_embed(array_xy[:, 0]), self.y_embed(array_xy[:, 1])


@torch.no_grad()
def start_as_mean(layer: nn.Linear, data: SpotDataModule) -> None:
    """Set the bias of a last layer to the mean expression of the training spots."""
    layer.bias.copy_(torch.from_numpy(column_means(some_rows(data.target, data.rows("train")), "float64")))


def central(image: torch.Tensor, share: float, px: int) -> torch.Tensor:
    """The middle of tiles, (B, 3, H, H) to (B, 3, px, px): `share` of the side, resampled where that is not `px`."""
    side = image.shape[-1]
    kept = max(1, round(share * side))
    start = (side - kept) // 2
    image = image[..., start : start + kept, start : start + kept]
    if kept == px:
        return image
    return F.interpolate(image, size=(px, px), mode="bilinear", antialias=True)


def neighbour_graph(
    array_xy: torch.Tensor, k: int, max_distance: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest other spots of each spot on the array, ties by x, then y.

    Parameters
    ----------
    array_xy : (N, 2)
        Of one section.
    k
        Fewer where the section has fewer.
    max_distance
        In steps of the array; what is farther is no neighbour.

    Returns
    -------
    index, is_near : (N, K)
        Rows of the neighbours, and which of them count. A spot that has none has itself.
    """
    place = array_xy.cpu().numpy().astype(float)
    index = torch.from_numpy(nearest(place, k)).to(array_xy.device)
    itself = torch.arange(len(index), device=index.device)[:, None]
    if index.shape[1] == 0:
        return itself, torch.ones_like(itself, dtype=torch.bool)
    is_near = torch.ones_like(index, dtype=torch.bool)
    if max_distance is not None:
        apart = (array_xy[index] - array_xy[:, None]).square().sum(dim=-1)
        is_near = apart <= max_distance**2
    alone = ~is_near.any(dim=1, keepdim=True)
    first = torch.arange(index.shape[1], device=index.device) == 0
    return torch.where(alone & first, itself, index), is_near | (alone & first)


def local_graphs(xy: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each spot with the spots next to it on the array.

    Parameters
    ----------
    xy : (N, 2)
        Where spots lie, in any unit.
    group : (N,)
        Only spots of the same one are neighbours.

    Returns
    -------
    nodes, reach : (N, 1 + 8), (N,)
        Rows, the spot itself first, -1 where there are no more; and up to which distance spots are neighbours: 1.6
        times the median distance to the nearest spot.
    """
    nodes = np.full((len(xy), 1 + MAX_NEIGHBOURS), -1, dtype=np.int64)
    nodes[:, 0] = np.arange(len(xy))
    reach = np.zeros(len(xy))
    for code in np.unique(group):
        rows = np.flatnonzero(group == code)
        around = nearest(xy[rows], MAX_NEIGHBOURS)
        if around.shape[1] == 0:
            continue
        distance = np.linalg.norm(xy[rows][around] - xy[rows][:, None], axis=2)
        reach[rows] = REACH * np.median(distance[:, 0])
        nodes[rows, 1 : 1 + around.shape[1]] = np.where(distance <= reach[rows, None], rows[around], -1)
    return nodes, reach
