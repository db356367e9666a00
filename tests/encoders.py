"""Image encoders for tests: their yamls, made-up weights, made-up tiles."""

from __future__ import annotations

import torch
from omegaconf import DictConfig, OmegaConf

from stexp.config import CONF

FOLDER = CONF / "image_encoder"


def tiles(n: int = 4, px: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed))


def settings(name: str, **changes) -> DictConfig:
    """A yaml of conf/image_encoder on the one that all of them start from."""
    own = OmegaConf.load(FOLDER / f"{name}.yaml")
    assert own.pop("defaults") == ["timm", "_self_"]
    return OmegaConf.merge(OmegaConf.load(FOLDER / "timm.yaml"), own, changes)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights none of which is zero, one or equal to another."""
    draws = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            positive = name.endswith(("running_var", "norm.weight", "norm1.weight", "norm2.weight", "gamma"))
            tensor.copy_(torch.rand(tensor.shape, generator=draws).sub(0.5).mul(0.2).add(1.0 if positive else 0.0))
    return model.eval()
