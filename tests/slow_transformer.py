"""What the authors of HisToGene, Hist2ST and THItoGene call a Transformer layer: their tensors, a loop over heads."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from stexp.models.blocks import TransformerBlock

OURS = {
    "attn_norm": "{attn}.norm",
    "to_qkv": "{attn}.fn.to_qkv",
    "to_out": "{attn}.fn.to_out.0",
    "ff_norm": "{ff}.norm",
    "ff.0": "{ff}.fn.net.0",
    "ff.3": "{ff}.fn.net.3",
}
"""Names of our layers, and the authors' in terms of where their attention and MLP lie."""


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of these names and shapes; what is a variance stays positive."""
    draws = torch.Generator().manual_seed(seed)
    state = {name: 0.3 * torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    return {name: 0.5 + value.abs() if name.endswith("running_var") else value for name, value in state.items()}


def shapes(attn: str, ff: str, dim: int, inner: int, hidden: int) -> dict[str, tuple[int, ...]]:
    sizes = {
        f"{attn}.norm.weight": (dim,),
        f"{attn}.norm.bias": (dim,),
        f"{attn}.fn.to_qkv.weight": (3 * inner, dim),
        f"{attn}.fn.to_out.0.weight": (dim, inner),
        f"{attn}.fn.to_out.0.bias": (dim,),
        f"{ff}.norm.weight": (dim,),
        f"{ff}.norm.bias": (dim,),
    }
    for name, n_in, n_out in (("0", dim, hidden), ("3", hidden, dim)):
        sizes |= {f"{ff}.fn.net.{name}.weight": (n_out, n_in), f"{ff}.fn.net.{name}.bias": (n_out,)}
    return sizes


def load(block: TransformerBlock, state: dict[str, torch.Tensor], attn: str, ff: str) -> None:
    """Their tensors into our block."""
    ours = {}
    for name in block.state_dict():
        layer, kind = name.rsplit(".", 1)
        ours[name] = state[f"{OURS[layer].format(attn=attn, ff=ff)}.{kind}"]
    block.load_state_dict(ours)


def slow_block(x: torch.Tensor, state: dict[str, torch.Tensor], attn: str, ff: str, heads: int) -> torch.Tensor:
    """Tokens (N, dim) of one section -> (N, dim), one head after the other."""

    def norm(tokens: torch.Tensor, where: str) -> torch.Tensor:
        centred = tokens - tokens.mean(dim=1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{where}.norm.weight"] + state[f"{where}.norm.bias"]

    q, k, v = (norm(x, attn) @ state[f"{attn}.fn.to_qkv.weight"].T).chunk(3, dim=1)
    seen = []
    for head in range(heads):
        width = q.shape[1] // heads
        part = slice(head * width, (head + 1) * width)
        seen.append(torch.softmax(q[:, part] @ k[:, part].T / width**0.5, dim=1) @ v[:, part])
    x = x + torch.cat(seen, dim=1) @ state[f"{attn}.fn.to_out.0.weight"].T + state[f"{attn}.fn.to_out.0.bias"]
    hidden = F.gelu(norm(x, ff) @ state[f"{ff}.fn.net.0.weight"].T + state[f"{ff}.fn.net.0.bias"])
    return x + hidden @ state[f"{ff}.fn.net.3.weight"].T + state[f"{ff}.fn.net.3.bias"]
