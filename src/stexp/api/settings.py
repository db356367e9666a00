"""The settings of a run: composed from the choices of ``conf/``, changed by value, checked; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from stexp.arguments import Count, Seed, SeveralSeeds, check
from stexp.config import to_plain
from stexp.errors import InputError, did_you_mean

OPEN = ("trainer",)
"""Parts of a config that take keys which are not there: what is built of them checks them itself."""


def run_config(choices: Mapping[str, str], changes: Mapping[str, Any], plugins: Sequence[str] = ()) -> dict[str, Any]:
    """``conf/train.yaml`` with other choices and values, every value in place, as plain data.

    Parameters
    ----------
    choices
        Group -> choice, such as ``{"data": "her2st", "model": "stnet"}``.
    changes
        Dotted key -> value, such as ``{"model.lr": 1e-4}``. What refers to a key follows it.
    plugins
        Modules or packages that bring choices; they are imported.

    Raises
    ------
    InputError
        A choice or key that is not there, with the nearest that is.
    """
    from stexp.config.compose import compose, quoted  # imports Hydra, which loaded models do without

    named = [f"plugins=[{','.join(map(quoted, plugins))}]"] if plugins else []
    cfg = compose("train", [*named, *(f"{group}={quoted(choice)}" for group, choice in choices.items())])
    for key, value in changes.items():
        parent, _, last = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        names = [str(name) for name in node if not str(name).startswith("_")]
        if last not in names and parent not in OPEN:
            of = f"{parent}={choices[parent]}" if parent in choices else parent or "a run"
            raise InputError(f"{of} has no {last}{did_you_mean(last, names) or '; it has ' + ', '.join(names)}")
        OmegaConf.update(cfg, key, plain(value), merge=False, force_add=True)
    return to_plain(cfg)


def plain(value: Any) -> Any:
    """A value of Python as a config holds it: paths as text, numbers of numpy as Python's, text never a reference."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return value.replace("${", r"\${") if isinstance(value, str) else value


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
    check("random_features", config["random_features"], SeveralSeeds)
    for key in ("fast_dev_run", "limit_train_batches", "limit_val_batches", "limit_predict_batches"):
        if key in trainer:
            raise InputError(f"trainer.{key}: a run takes all its spots; to try something out, take fewer sections")
