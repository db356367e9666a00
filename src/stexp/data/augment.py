"""Augmentation of a batch of tiles, drawn per tile and run where the tiles are."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from stexp.data.slides.stain import intensity, optical_density
from stexp.errors import InputError

GRAY = torch.tensor([0.299, 0.587, 0.114])
HED = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density in R, G, B of haematoxylin, eosin and DAB (Ruifrok & Johnston 2001)."""
Augmentation = Literal["none", "dihedral", "paper", "hed"]
AUGMENTATIONS = get_args(Augmentation)


def augment(tiles: torch.Tensor, kind: str, seed: int, hed_sigma: float = 0.05) -> torch.Tensor:
    """Augment tiles and scale them to 0..1.

    Parameters
    ----------
    tiles : (B, px, px, 3) uint8
    kind
        ``"none"``; ``"dihedral"``: one of the 8 symmetries of the square; ``"paper"``: brightness,
        contrast and saturation each scaled by U(0.5, 1.5) in random order, horizontal flip, rotation
        by U(-180, 180) degrees with nearest neighbours and black corners; ``"hed"``: ``"dihedral"`` and
        :func:`hed_jitter`.
    seed
        The draws depend on it and on nothing else, on any device.
    hed_sigma
        Of ``"hed"``.

    Returns
    -------
    (B, 3, px, px) float32

    Notes
    -----
    The three colour changes are linear in the pixel, so they are composed to one 3 x 3 matrix and offset
    per tile, clipped once at the end; torchvision rounds and clips after each.
    """
    if kind not in AUGMENTATIONS:
        raise InputError(f"augmentation {kind!r}: choose {', '.join(AUGMENTATIONS)}")
    if kind == "none":
        return _to_unit(tiles)
    draws = torch.Generator().manual_seed(seed)
    n = len(tiles)
    if kind in ("dihedral", "hed"):
        turned = _dihedral(tiles, torch.randint(8, (n,), generator=draws))
        if kind == "dihedral":
            return _to_unit(turned)
        jitter = torch.empty(2, n, 3).uniform_(-hed_sigma, hed_sigma, generator=draws)
        matrix, offset = (part.to(tiles.device) for part in hed_jitter(1 + jitter[0], jitter[1]))
        density = optical_density(turned.view(n, -1, 3).mT.contiguous())
        pixels = intensity(torch.baddbmm(offset[:, :, None], matrix, density)).div_(255).clamp_(0, 1)
        return pixels.view(n, 3, *tiles.shape[1:3])
    factors = torch.empty(n, 3).uniform_(0.5, 1.5, generator=draws)
    order = torch.rand(n, 3, generator=draws).argsort(dim=1)
    flip = torch.rand(n, generator=draws) < 0.5
    angle = torch.empty(n).uniform_(-math.pi, math.pi, generator=draws)
    matrix, offset = colour_jitter(tiles, factors, order)
    moved, inside = _rotate(tiles, angle, flip)
    pixels = torch.bmm(matrix, moved.view(n, -1, 3).float().mT).add_(offset[:, :, None])
    pixels = pixels.clamp_(0, 1).mul_(inside.view(n, 1, -1))
    return pixels.view(n, 3, *tiles.shape[1:3])


def colour_jitter(tiles: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Brightness, contrast and saturation as one affine map of RGB per tile.

    Parameters
    ----------
    tiles : (B, px, px, 3) uint8
    factors : (B, 3)
        Of brightness, contrast, saturation; 1 changes nothing.
    order : (B, 3)
        Which comes first, second, third.

    Returns
    -------
    matrix (B, 3, 3), offset (B, 3)
        Colour in 0..1 = matrix @ colour in 0..255 + offset, before clipping.
    """
    device = tiles.device
    factors, order, gray = factors.to(device), order.to(device), GRAY.to(device)
    n = len(tiles)
    matrix = torch.eye(3, device=device).repeat(n, 1, 1) / 255
    offset = torch.zeros(n, 3, device=device)
    mean = tiles.view(n, -1, 3).float().mean(dim=1)
    for turn in order.unbind(1):
        f = factors.gather(1, turn[:, None])  # (B, 1)
        # each change blends the pixel with black, with the tile's mean gray, or with its own gray
        contrast, saturation = (turn == 1).float()[:, None], (turn == 2).float()[:, None]
        mean_gray = (torch.einsum("bij,bj->bi", matrix, mean) + offset) @ gray
        blend = f[:, :, None] * torch.eye(3, device=device) + ((1 - f) * saturation)[:, :, None] * gray
        matrix = blend @ matrix
        offset = torch.einsum("bij,bj->bi", blend, offset) + (1 - f) * contrast * mean_gray[:, None]
    return matrix, offset


def hed_jitter(alpha: torch.Tensor, beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Amounts of the three stains times `alpha` plus `beta`, as one affine map of optical density per tile.

    Parameters
    ----------
    alpha, beta : (B, 3)
        Of haematoxylin, eosin, DAB; U(1 - sigma, 1 + sigma) and U(-sigma, sigma) in Tellez et al. 2018 (IEEE TMI
        37(9)). An amount of 1 is a decadic optical density of about 1.

    Returns
    -------
    matrix (B, 3, 3), offset (B, 3)
        Density, as a column of R, G, B in natural units = matrix @ density + offset.

    Notes
    -----
    Amounts below 0 are not clipped. scikit-image's ``rgb2hed`` counts in units six times as large, so that the same
    `beta` there moves colours six times as far.
    """
    hed = HED.double()
    matrix = torch.linalg.inv(hed) @ (alpha.double()[:, :, None] * hed)
    return matrix.mT.float(), (math.log(10) * beta.double() @ hed).float()


def _to_unit(tiles: torch.Tensor) -> torch.Tensor:
    return tiles.permute(0, 3, 1, 2).float().div_(255)


def _dihedral(tiles: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(tiles)
    for symmetry in which.unique().tolist():
        in_group = (which == symmetry).to(tiles.device)
        turned = torch.rot90(tiles[in_group], symmetry % 4, (1, 2))
        out[in_group] = turned.flip(2) if symmetry >= 4 else turned
    return out


def _rotate(tiles: torch.Tensor, angle: torch.Tensor, flip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flip, then rotate about the centre: (B, px, px, 3) and which pixels come from inside, (B, px, px)."""
    n, height, width, _ = tiles.shape
    device = tiles.device
    cos, sin = (f(angle).to(device)[:, None, None] for f in (torch.cos, torch.sin))
    y = torch.arange(height, device=device).float()[:, None] - (height - 1) / 2
    x = torch.arange(width, device=device).float()[None, :] - (width - 1) / 2
    from_x = ((cos * x + (width - 1) / 2) + sin * y).round_().int()
    from_y = ((cos * y + (height - 1) / 2) - sin * x).round_().int()
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    from_x = torch.where(flip.to(device)[:, None, None], width - 1 - from_x, from_x)
    start = torch.arange(n, device=device, dtype=torch.int64)[:, None, None] * (height * width)
    index = torch.where(inside, from_y * width + from_x, 0) + start
    return tiles.reshape(-1, 3).index_select(0, index.view(-1)).view(tiles.shape), inside
