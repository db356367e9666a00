"""Blocks shared by two or more methods."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


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
        self.ff_norm = nn.LayerNorm(dim)
        hidden = hidden or dim
        self.ff = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (N, L, dim) -> (N, L, dim); `mask` (N, L) is False where a token is padding."""
        n, length, _ = x.shape
        q, k, v = self.to_qkv(self.attn_norm(x)).view(n, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
        x = x + self.to_out(attended.transpose(1, 2).reshape(n, length, -1))
        return x + self.ff(self.ff_norm(x))
