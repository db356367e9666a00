"""The spot encoder of mclSTExp: expression and array position through a Transformer."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from stexp.errors import InputError
from stexp.models.blocks import TransformerBlock

Position = Literal["none", "sinusoid", "naive", "learnable"]

LARGEST_TABLE = 1 << 16  # rows, as in the published code


class SpotEncoder(nn.Module):
    """Expression and array position of spots to features of the same width.

    Parameters
    ----------
    n_genes
        G: width of the input, of every block and of the output.
    n_positions
        Rows of a learned table per axis: largest array coordinate + 1.
    position
        ``learnable``: two tables of G-vectors, added (published); ``sinusoid``: fixed sines and cosines of
        x in the first half of the genes, of y in the second; ``naive``: one learned linear map of
        (x, y) / n_positions, our reading of a name that the paper does not define; ``none``.
    depth, heads, head_dim, dropout
        Of the Transformer blocks; the MLP's hidden width is G.
    """

    def __init__(
        self,
        n_genes: int,
        n_positions: int,
        *,
        position: Position = "learnable",
        depth: int = 2,
        heads: int = 8,
        head_dim: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if position == "learnable" and n_positions > LARGEST_TABLE:
            raise InputError(
                f"array coordinates go up to {n_positions - 1}; a learned table for each would be too large. Are they "
                f"pixels? Take array coordinates, or model.position=sinusoid"
            )
        self.position, self.n_positions = position, n_positions
        if position == "learnable":
            self.x_embed, self.y_embed = nn.Embedding(n_positions, n_genes), nn.Embedding(n_positions, n_genes)
        elif position == "naive":
            self.xy_embed = nn.Linear(2, n_genes)
        self.blocks = nn.ModuleList(
            TransformerBlock(n_genes, heads, head_dim, hidden=n_genes, dropout=dropout) for _ in range(depth)
        )

    def forward(
        self,
        expression: torch.Tensor,
        array_xy: torch.Tensor,
        mask: torch.Tensor | None = None,
        n_out: int | None = None,
    ) -> torch.Tensor:
        """Sequences of tokens (N, L, G), (N, L, 2) to features (N, L, G), or of the first `n_out` tokens; those of one
        sequence see each other."""
        x = expression + self._position(array_xy, expression.shape[-1])
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, mask, n_out if number == len(self.blocks) else None)
        return x[:, :n_out]

    def _position(self, array_xy: torch.Tensor, n_genes: int) -> torch.Tensor | float:
        if self.position == "none":
            return 0.0
        if self.position == "sinusoid":
            half = (n_genes + 1) // 2
            return torch.cat([sinusoid(array_xy[..., 0], half), sinusoid(array_xy[..., 1], n_genes - half)], dim=-1)
        if self.position == "naive":
            return self.xy_embed(array_xy.float() / self.n_positions)
        largest = int(array_xy.max())
        if largest >= self.n_positions or int(array_xy.min()) < 0:
            raise InputError(
                f"array coordinate {largest} does not fit the learned position table of {self.n_positions} rows: "
                f"the model was trained on a smaller array; train with model.position=sinusoid or none"
            )
        return self.x_embed(array_xy[..., 0]) + self.y_embed(array_xy[..., 1])


def sinusoid(position: torch.Tensor, n: int) -> torch.Tensor:
    """Sines and cosines of integer positions (...,) -> (..., n), wavelengths 2 pi to 20,000 pi (Vaswani 2017)."""
    pair = torch.arange(n, device=position.device) // 2
    angle = position[..., None].float() * torch.exp(pair * (-2 * math.log(1e4) / n))
    even = torch.arange(n, device=position.device) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos())
