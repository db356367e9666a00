"""Configs of a sweep's jobs, composed once for all jobs with the same choices."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from stexp.config.compose import compose, groups_of, parse
from stexp.config.plugins import SOURCES


def config_of(chosen: Mapping[str, str]) -> tuple[DictConfig, dict[str, str]]:
    """The config of ``stexp-train`` with `chosen` on its command line, and the choice of every group."""
    groups = {*groups_of("train", typed(sources_in(chosen))), *SOURCES}
    cfg, choices = _of_groups(*(text for text in typed(chosen) if text.partition("=")[0] in groups))
    cfg = copy.deepcopy(cfg)
    try:
        for override in parse(typed({key: value for key, value in chosen.items() if key not in groups})):
            OmegaConf.update(cfg, override.get_key_element(), override.value())
    except OmegaConfBaseException:  # composing takes more kinds of keys, and says which there is not
        cfg = compose("train", typed(chosen))
    return cfg, choices


def sources_in(chosen: Mapping[str, str]) -> dict[str, str]:
    """What of a job's settings says where its choices come from."""
    return {key: value for key, value in chosen.items() if key in SOURCES}


@functools.lru_cache(maxsize=256)
def default_settings(*groups: str) -> tuple[dict[str, Any], str]:
    """What a choice of groups sets by itself, dotted key -> value, and the image encoder that comes with it."""
    cfg, choices = _of_groups(*groups)
    return flat(plain(cfg)), choices["image_encoder"]


@functools.lru_cache(maxsize=256)
def _of_groups(*groups: str) -> tuple[DictConfig, dict[str, str]]:
    cfg = compose("train", groups, with_hydra=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A config as a dict, every interpolation resolved; what a run names later stays missing."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted key -> value."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return out


def typed(chosen: Mapping[str, str]) -> list[str]:
    """Settings as arguments of a command."""
    return [f"{key}={value}" for key, value in chosen.items()]
