"""Training on several devices: shared batch statistics, and the check that method and data allow it."""

from __future__ import annotations

import torch
from pytorch_lightning.plugins.layer_sync import LayerSync
from timm.layers import convert_sync_batchnorm

from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.method import Method


class SyncBatchNorm(LayerSync):
    """Batch statistics over all devices. timm's layers hold their activation, which torch's conversion would drop."""

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        return convert_sync_batchnorm(model)

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        return model  # alone, and in evaluation, they are what they were


def check_several_devices(method: Method, data: SpotDataModule, world_size: int) -> None:
    """Refuse what several devices cannot train together."""
    if world_size == 1:
        return
    if not method.several_devices:
        raise InputError(f"{type(method).__name__} trains on one device; take trainer.devices=1")
    for name, n, least in (
        ("data.batch_size", data.batch_size, 2 * world_size),
        ("training spots", len(data.rows("train")), 2 * world_size),
        ("validation spots", len(data.rows("validation")) or world_size, world_size),
    ):
        if n < least:
            raise InputError(f"{name}: {n}, too few for {world_size} devices; at least {least} would fit")
