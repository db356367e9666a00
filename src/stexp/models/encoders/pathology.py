"""Architectures of published pathology encoders that timm does not have, and their names for weights."""

from __future__ import annotations

import math
import re
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import nn


class ConvStem(PatchEmbed):
    """Stem of CTransPath: two 3 x 3 convolutions of stride 2 and a 1 x 1, in place of 4 x 4 patches."""

    def __init__(self, *, embed_dim: int, device: torch.device | None = None, **of_patches) -> None:
        super().__init__(embed_dim=embed_dim, device=device, **of_patches)
        layers: list[nn.Module] = []
        width = 3
        for out in (embed_dim // 8, embed_dim // 4):
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False, device=device)]
            layers += [nn.BatchNorm2d(out, device=device), nn.ReLU(inplace=True)]
            width = out
        # where timm has one convolution
        self.proj = nn.Sequential(*layers, nn.Conv2d(width, embed_dim, 1, device=device))  # type: ignore[assignment]


def ctranspath(**model_args) -> nn.Module:
    """CTransPath: Swin-T with a convolutional stem (Wang et al. 2022, Medical Image Analysis 81, 102559)."""
    return timm.create_model(
        "swin_tiny_patch4_window7_224", **{"num_classes": 0, "embed_layer": ConvStem, **model_args}
    )


class AttentionalPooler(nn.Module):
    """Cross-attention of one learned query over tokens (B, N, F), to (B, D)."""

    def __init__(self, n_features: int, dim: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, dim))
        self.ln_k, self.ln_q = nn.LayerNorm(n_features), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(n_features, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query = self.to_q(self.ln_q(self.query)).expand(len(tokens), 1, -1)
        parts = (query, *self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).flatten(1))


class ConchV15(nn.Module):
    """Image tower of CONCH v1.5: ViT-L/16 at 448 px, all its tokens pooled by attention (TITAN, arXiv 2411.19666).

    Parameters
    ----------
    model_args
        Of ``timm.create_model`` for the ViT.
    """

    num_features = 768
    trunk: Any  # a timm model: they have much in common, but no class

    def __init__(self, **model_args) -> None:
        super().__init__()
        self.trunk = timm.create_model(
            "vit_large_patch16_224",
            **{"num_classes": 0, "global_pool": "", "img_size": 448, "init_values": 1.0, **model_args},
        )
        self.attn_pool_contrast = AttentionalPooler(self.trunk.num_features, self.num_features)
        self.ln_contrast = nn.LayerNorm(self.num_features)
        self.pretrained_cfg = self.trunk.pretrained_cfg

    def forward_features(self, image: torch.Tensor) -> torch.Tensor:
        """Tokens (B, 1 + 28 * 28, 1024), the class token first."""
        return self.trunk.forward_features(image)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.ln_contrast(self.attn_pool_contrast(self.forward_features(image)))

    def group_matcher(self, coarse: bool = False) -> dict:
        """As timm's models: which parameters are the stem's, and which of which block."""
        return {"stem": r"^trunk\.(?:cls_token|pos_embed|patch_embed)", "blocks": [(r"^trunk\.blocks\.(\d+)", None)]}


ARCHITECTURES = {"ctranspath": ctranspath, "conch_v1_5": ConchV15}
"""What `image_encoder.architecture` may name besides timm's models."""

# of transformers' Dinov2Model, in which Phikon-v2 is published
_DINOV2 = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)


def timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in another published naming under the names that the models here have.

    Knows transformers' DINOv2 (Phikon-v2), Swin of timm before 0.9 (CTransPath), and CONCH v1.5, whose positions are
    brought from the published 14 x 14 patches to the 28 x 28 of 448 px. Other weights come back as they are.
    """
    if "embeddings.cls_token" in state:
        return _from_transformers(state)
    if "layers.0.downsample.reduction.weight" in state:
        # in the old Swin a stage ended with its downsampling, today the next begins with it; buffers are not kept
        renamed = {re.sub(r"(?<=^layers\.)\d(?=\.downsample)", _next, key): value for key, value in state.items()}
        return {key: value for key, value in renamed.items() if not key.endswith((".attn_mask", "_position_index"))}
    if "trunk.pos_embed" in state:
        return {**state, "trunk.pos_embed": _conch_positions(state["trunk.pos_embed"])}
    return state


def _next(match: re.Match) -> str:
    return str(int(match[0]) + 1)


def _from_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, name in _DINOV2:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    renamed.pop("embeddings.mask_token", None)
    for query in [key for key in renamed if ".attention.attention.query." in key]:
        parts = [renamed.pop(query.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        renamed[query.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat(parts)
    return renamed


def _conch_positions(positions: torch.Tensor, side: int = 28) -> torch.Tensor:
    if positions.shape[1] == 1 + side**2:
        return positions
    published = math.isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].unflatten(1, (published, published)).permute(0, 3, 1, 2)
    # the scale that its code gives is that of 28.1 patches, as in DINO; coordinates follow it
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / published, mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
