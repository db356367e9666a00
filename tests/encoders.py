"""Image encoders for tests: their yamls, made-up weights, made-up tiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from stexp.data.section import Section
from stexp.files import CONF
from stexp.models.encoders.frozen import FrozenEncoder

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


def frozen(encoder: torch.nn.Module, cache: Path, context: AbstractContextManager | None = None) -> FrozenEncoder:
    """An encoder for a data module, on the CPU."""
    return FrozenEncoder(encoder, torch.device("cpu"), context, cache)


class MadeUpFeatures(nullcontext):
    """In the place of a frozen encoder: rows of a table, in the order of sections and spots."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__(self)
        self.table, self.num_features, self.taken = table, table.shape[1], 0

    def of_tiles(self, section: Section, store: np.ndarray, stain: object = None, view: object = None) -> np.ndarray:
        self.taken += len(section)
        return self.table[self.taken - len(section) : self.taken]
