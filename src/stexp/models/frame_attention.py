"""Attention of spots to those around them that does not see how a section lies: frame averaging (Puny et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from timm.layers.mlp import GluMlp, SwiGLUPacked
from torch import nn

from stexp.data.slides.spacing import spacing

TIE = 1e-6  # distances that differ by less than this share are one
SECTION_AXES = 1e-3  # weight of the section's axes in a frame, which count where neighbours lie alike in all directions
SIGNS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
"""The four frames of two axes."""


@dataclass(frozen=True)
class Surrounding:
    """The K spots around each of N, as far as positions say it.

    Attributes
    ----------
    index : (N, K) int64
        Rows of the neighbours; the spot itself where there are fewer.
    present : (N, K) bool
        Whether there is one; a spot without neighbours has itself.
    edges : (N, K, 4, 3) float32
        In each of four frames: where the neighbour lies, and how far off it is.
    """

    index: torch.Tensor
    present: torch.Tensor
    edges: torch.Tensor

    def to(self, device: torch.device) -> Surrounding:
        return Surrounding(*(value.to(device) for value in (self.index, self.present, self.edges)))


def surrounding(xy: np.ndarray, k: int) -> Surrounding:
    """The k nearest spots of each spot of a section, and all as near as the last of them, in frames of their own.

    Parameters
    ----------
    xy : (N, 2)
        Where the spots lie, in any unit: lengths are in spacings of the section.

    Notes
    -----
    Turning, mirroring, moving or scaling the section changes nothing. So that this holds on regular arrays, too, all of
    those equally far count, and the axes of a frame, the principal ones of the neighbours around their mean, lean a
    little to those of the section, which alone decide where the neighbours have no direction. It does not hold where
    the section has none either: a regular array as wide as it is high.
    """
    xy = (xy - xy.mean(axis=0)) / spacing(xy)
    index, present = _neighbours(xy, k)
    offset = np.where(present[..., None], xy[index] - xy[:, None], 0)
    mean = offset.sum(axis=1, keepdims=True) / present.sum(axis=1)[:, None, None]
    centred = np.where(present[..., None], offset - mean, 0)
    _, axes = np.linalg.eigh(_direction(centred) + SECTION_AXES * _direction(xy[None]))
    in_frame = (centred @ axes)[:, :, None] * SIGNS.numpy()
    distance = np.linalg.norm(offset, axis=2)[..., None, None]
    edges = np.concatenate([in_frame, np.broadcast_to(distance, (*in_frame.shape[:3], 1))], axis=3)
    return Surrounding(torch.from_numpy(index), torch.from_numpy(present), torch.from_numpy(edges.astype(np.float32)))


def _direction(points: np.ndarray) -> np.ndarray:
    """Covariances (N, 2, 2) of centred points (N, K, 2), of trace 1 or 0."""
    covariance = points.transpose(0, 2, 1) @ points
    return covariance / np.maximum(np.trace(covariance, axis1=1, axis2=2), 1e-12)[:, None, None]


def _neighbours(xy: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and presence (N, K) of all that are no farther off than the k-th nearest other spot."""
    n = len(xy)
    if n == 1 or k == 0:
        return np.arange(n)[:, None], np.ones((n, 1), dtype=bool)
    k = min(k, n - 1)
    tree = cKDTree(xy)
    reach = tree.query(xy, k=k + 1)[0][:, -1] * (1 + TIE)
    around = [np.array(rows)[np.array(rows) != i] for i, rows in enumerate(tree.query_ball_point(xy, reach))]
    index = np.tile(np.arange(n)[:, None], max(map(len, around)))
    present = np.zeros(index.shape, dtype=bool)
    for i, rows in enumerate(around):
        index[i, : len(rows)], present[i, : len(rows)] = rows, True
    return index, present


def swiglu(n_in: int, hidden: int, n_out: int, dropout: float) -> GluMlp:
    """Gated MLP, normalised behind the gate; its two branches have half of `hidden` each."""
    return SwiGLUPacked(n_in, hidden, n_out, drop=dropout, norm_layer=nn.LayerNorm)


class FrameAttention(nn.Module):
    """Spots gather from their neighbours; logits come from an MLP of both tokens, their edge and their expression.

    Parameters
    ----------
    dim, n_genes
        Of tokens and of expression.
    heads
        Of `dim` / heads numbers each.
    dropout
        In the MLPs and of the attention.
    """

    def __init__(self, dim: int, n_genes: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, head_dim = heads, dim // heads
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.edge_mlp = swiglu(3, dim, dim, dropout)
        self.logit_mlp = swiglu(3 * head_dim + n_genes, dim, 1, dropout)
        self.out_mlp = swiglu(2 * dim, dim, dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, y: torch.Tensor, around: Surrounding) -> torch.Tensor:
        """What tokens (N, dim) with expression `y` (N, G) gather, (N, dim)."""
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        edge = self.edge_mlp(around.edges).mean(dim=2).unflatten(-1, (self.heads, -1))  # (N, K, heads, head_dim)
        logits = self.logits(q, k, edge, y, around.index).masked_fill(~around.present[..., None], -torch.inf)
        weight = self.dropout(logits.softmax(dim=1))[..., None]
        gathered = [(weight * value).sum(dim=1).flatten(1) for value in (v[around.index], edge)]
        return self.out_mlp(torch.cat(gathered, dim=1))

    def logits(
        self, q: torch.Tensor, k: torch.Tensor, edge: torch.Tensor, y: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """`logit_mlp` of [query, key of the neighbour, edge, difference in expression], (N, K, heads).

        Its first layer is linear: what it makes of expression is computed once for a spot, not for each neighbour
        and head.
        """
        first, width = self.logit_mlp.fc1, q.shape[-1]
        of_query, of_key, of_edge, of_expression = first.weight.split([width, width, width, y.shape[1]], dim=1)
        expression = nn.functional.linear(y, of_expression)[:, None]  # alike for all heads
        own = nn.functional.linear(q, of_query) - expression
        others = nn.functional.linear(k, of_key) + expression
        hidden = own[:, None] + others[index] + nn.functional.linear(edge, of_edge, first.bias)
        gate, value = hidden.chunk(2, dim=-1)
        mlp = self.logit_mlp
        return mlp.drop2(mlp.fc2(mlp.norm(mlp.drop1(mlp.act(gate) * value))))[..., 0]
