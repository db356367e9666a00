"""The machine of a run, and the frozen encoder that computes its features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.seed import isolate_rng

from stexp.construct import build
from stexp.models.encoders.frozen import UNTUNED, FrozenEncoder, random_twins
from stexp.training.machine import Machine


def machine_of(config: Mapping[str, Any]) -> Machine:
    """What a run of a config computes on."""
    hardware = config["hardware"]
    return Machine(config["trainer"], hardware["precision"], hardware["channels_last"], hardware["threads"])


def frozen_encoder(config: Mapping[str, Any], machine: Machine) -> FrozenEncoder:
    """The image encoder of a run before any training, whose features of tiles are kept in the cache."""
    with isolate_rng():
        pl.seed_everything(config["seed"], verbose=False)  # random weights are those of the seed
        encoder, data = build({**config["image_encoder"], **UNTUNED}), config["data"]
    kept = data["cache_dir"], data["eval_batch_size"]
    twins = random_twins(config["image_encoder"], config.get("random_features", 0))  # new in a version
    return FrozenEncoder(encoder, machine.device, machine.autocast(), *kept, twins=twins)
