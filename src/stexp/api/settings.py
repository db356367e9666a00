"""The settings of a run, checked before sections are read; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stexp.arguments import Count, Seed, check
from stexp.errors import InputError


def check_numbers(config: Mapping[str, Any]) -> None:
    """InputError for what would else be found wrong after the tiles are cut, or the features computed.

    Parameters
    ----------
    config
        ``conf/train.yaml`` with every value in place, as plain data.
    """
    encoder, trainer = config["image_encoder"], config["trainer"]
    tuning = encoder.get("tuning", "all")
    if encoder["frozen"] and tuning != "all":
        raise InputError(f"image_encoder.frozen=true trains nothing; tuning={tuning} needs image_encoder.frozen=false")
    check("trainer.max_epochs", trainer["max_epochs"], Count)
    check("hardware.threads", config["hardware"]["threads"], Count | None)
    check("seed", config["seed"], Seed)
    for key in ("fast_dev_run", "limit_train_batches", "limit_val_batches", "limit_predict_batches"):
        if key in trainer:
            raise InputError(f"trainer.{key}: a run takes all its spots; to try something out, take fewer sections")
