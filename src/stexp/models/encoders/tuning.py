"""What of an image encoder trains besides all of it: updates of low rank, or the last blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

from stexp.errors import InputError


class LoRALinear(nn.Linear):
    """A linear layer that keeps its weight and trains an update of low rank (Hu et al. 2021, arXiv 2106.09685).

    ``W x + b + alpha / rank * B A x``; A is drawn as torch draws a linear layer, B is zero: it starts as ``W x + b``.

    Parameters
    ----------
    linear
        Layer whose weight and bias it takes over, under the same names.
    rank, alpha
        Rows of A; the strength of the update.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        # memory is that of `linear`
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha = rank, alpha
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * (self.alpha / self.rank)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"


def add_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a timm transformer but for updates of its attention's ``qkv`` and ``proj``.

    Raises
    ------
    InputError
        The model has no such layers.
    """
    attention = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "proj", None), nn.Linear)
    ]
    if not attention:
        raise InputError("image_encoder.tuning=lora is for attention, and this encoder has none; all or last would fit")
    model.requires_grad_(False)
    for module in attention:
        for name in ("qkv", "proj"):
            setattr(module, name, LoRALinear(getattr(module, name), rank, alpha))


def train_last(model: Any, n: int) -> None:
    """Freeze a timm model but for its last `n` blocks, and what follows them.

    Raises
    ------
    InputError
        It has fewer blocks.
    """
    matcher = dict(model.group_matcher(coarse=False))
    blocks = matcher["blocks"]
    # 99999 is timm's sign for "with the group before": a norm that no rule names belongs to the last block
    matcher["blocks"] = [*([(blocks, None)] if isinstance(blocks, str) else blocks), (".", (99999,))]
    groups = list(group_parameters(model, matcher).values())  # names: of the stem, then of each block
    if n >= len(groups):
        raise InputError(f"image_encoder.last_blocks={n}: this encoder has {len(groups) - 1}")
    model.requires_grad_(False)
    for name in {name for group in groups[-n:] for name in group}:
        model.get_parameter(name).requires_grad_(True)


def trained_parts(model: nn.Module) -> list[nn.Module]:
    """Modules all of whose parameters train: only they may be in training mode."""
    parts = ((module, list(module.parameters())) for module in model.modules())
    return [module for module, parameters in parts if parameters and all(p.requires_grad for p in parameters)]
