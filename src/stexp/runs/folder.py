"""The folder of a run: which files it holds, when it is finished, and whose it is."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import (
    Any,
    Literal,
    NotRequired,  # those of typing carry no annotations before Python 3.12
)

import yaml
from typing_extensions import TypedDict

from stexp.arguments import Count, Seed, check_fields
from stexp.construct import build
from stexp.documents import parse_yaml
from stexp.errors import InputError
from stexp.evaluation.contrast import NAME as CONTRAST
from stexp.evaluation.records import AGAIN
from stexp.files import write_atomically
from stexp.protocol import Protocol

log = logging.getLogger(__name__)

RESULTS = ("predictions.h5ad", "floors.h5ad", "audit.json", "provenance.json", "report.html")
"""Without one of these a run is not finished; the same command makes it from the checkpoints."""
PREDICTIONS = "predictions"
"""Key of the config of a run that only scores what another tool predicted: it has no model."""
KEYS_OF_PLACES = ("logger", "output_dir", "callbacks.last.dirpath", "predictions.files", "from.model")
"""How config keys begin that change no training, prediction or score: the folder is the one that was named."""
NO_SETTING = ("overwrite", "verbose", "hydra", "sweep")
"""Keys that change nothing of a run: a run folder's config goes without them."""
KEYS_OF_FLOORS = ("random_features",)
"""Config keys that change no training and no prediction, but which floors are scored beside them."""

Names = list[str | int] | str | int | None


class Built(TypedDict):
    """What a config describes to be built."""

    _target_: str


class ProtocolConfig(TypedDict):
    _target_: Literal["stexp.protocol.Protocol"]
    name: str


class NamedConfig(Built):
    name: str


class EncoderConfig(NamedConfig):
    checkpoint: NotRequired[str | None]


class ThresholdsConfig(TypedDict):
    _target_: Literal["stexp.data.quality.Thresholds"]


class DataConfig(TypedDict):
    """What :class:`stexp.data.dataset.DataSet` reads; its data module judges its own arguments."""

    _target_: Literal["stexp.data.datamodule.SpotDataModule"]
    name: str
    root: str | None
    reader: Built | None  # None: the sections came from Python
    quality: ThresholdsConfig
    sections: Names
    published_sections: Names
    um_per_px: Any
    leave_out: Names
    tile_px: Any
    tile_um: Any
    cache_dir: str
    tile_store: str
    panel_file: str | None
    published_panel_file: str | None
    licence: NotRequired[str | None]


class TrainerConfig(TypedDict):
    max_epochs: Count


class HardwareConfig(TypedDict):
    channels_last: bool


class RunConfig(TypedDict):
    """``config.yaml`` of a run, as far as it is read back."""

    seed: Seed
    fold: str | int
    protocol: ProtocolConfig
    data: DataConfig
    model: NamedConfig
    image_encoder: EncoderConfig
    trainer: TrainerConfig
    hardware: HardwareConfig


class Named(TypedDict):
    name: str


class EvaluatedConfig(TypedDict):
    """``config.yaml`` of predictions that were made elsewhere, see :func:`stexp.runs.foreign.evaluate`."""

    seed: Seed
    fold: str | int
    protocol: ProtocolConfig
    data: Named
    model: Named
    predictions: dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """One run on disk.

    Parameters
    ----------
    path
        The folder; it need not exist yet.
    """

    path: Path

    @property
    def finished(self) -> bool:
        """Whether every result is there."""
        return all((self.path / name).exists() for name in RESULTS)

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def checkpoint(self) -> Path:
        """What the run predicts with: the best checkpoint, or the last where nothing was validated."""
        self.require_model()
        for path in (self.best_checkpoint, self.last_checkpoint):
            if path.is_file():
                return path
        raise InputError(f"{self.path} has no checkpoint; {AGAIN}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run's config, every value in place; plain data, nothing in it is executed."""
        path = self.path / "config.yaml"
        if not path.is_file():
            raise InputError(f"{self.path} is no run folder: it has no config.yaml")
        try:
            config = parse_yaml(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path} cannot be read: {reason}; train again with overwrite=true") from error
        if not isinstance(config, dict) or not config:
            raise InputError(f"{path} cannot be read: it holds no keys; train again with overwrite=true")
        if PREDICTIONS in config:
            check_fields(str(path), config, EvaluatedConfig, "evaluate again with overwrite=true")
        else:
            check_fields(str(path), config, RunConfig, "train again with overwrite=true")
        return config

    def require(self) -> RunFolder:
        """The folder itself; InputError where it holds no run."""
        _ = self.config
        return self

    def require_model(self) -> RunFolder:
        """The folder itself; InputError where its predictions were made elsewhere."""
        if PREDICTIONS in self.config:
            raise InputError(
                f"{self.path} holds the scores of predictions that were made elsewhere, and no model; a run of "
                f"stexp-train would fit"
            )
        return self

    @property
    def protocol(self) -> Protocol:
        return build(self.config["protocol"])

    def claim(self, config: Mapping[str, Any], overwrite: bool) -> bool:
        """Take the folder for a run; True where it already holds this run, finished.

        Parameters
        ----------
        config
            Of the run, every value in place.
        overwrite
            Whether a run with another config, or this one, may be deleted to start anew.

        Raises
        ------
        InputError
            The folder holds a run with another config, or its config is gone or damaged.
        """
        path = self.path / "config.yaml"
        if self._started and not (overwrite and path.exists()):
            self.check(config)
            for key in KEYS_OF_FLOORS:
                self._settle_floors(key, config.get(key))
            return self.finished
        if overwrite and path.exists():
            self.clear()
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _as_yaml(config))
        self.__dict__.pop("config", None)
        return False

    def _settle_floors(self, key: str, value: Any) -> None:
        """Say that a finished run keeps the floors it has; one that is still to be scored takes those asked for."""
        before = self.config.get(key)
        if before == value or not (before or value):
            return
        if self.finished:
            log.warning(
                "%s is finished, with %s=%s and not %s: it stays as it is; overwrite=true makes it anew",
                *(self.path, key, before, value),
            )
        else:
            write_atomically(self.path / "config.yaml", _as_yaml({**self.config, key: value}))
            self.__dict__.pop("config", None)

    @property
    def _started(self) -> bool:
        return (self.path / "checkpoints").exists() or (self.path / "predictions.h5ad").exists()

    def check(self, config: Mapping[str, Any]) -> None:
        """InputError where the folder holds a run with another config, or one whose config is gone or damaged."""
        if not self._started:
            return
        if not (self.path / "config.yaml").exists():
            raise InputError(
                f"{self.path} holds checkpoints or predictions, but no config.yaml; choose another output_dir"
            )
        differing = sorted(differing_keys(self.config, yaml.safe_load(_as_yaml(config))))
        differing = [key for key in differing if not key.startswith((*KEYS_OF_PLACES, *KEYS_OF_FLOORS))]
        if differing:
            raise InputError(
                f"{self.path} holds a run with another config ({', '.join(differing[:5])}); choose another "
                f"output_dir, or overwrite=true to start anew"
            )

    def clear(self) -> None:
        """Delete what a run left, but for its config and the log that this process may be writing."""
        for name in ("checkpoints", "rescored"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for logged in (self.path / "logs").glob("*"):
            if logged.is_dir():
                shutil.rmtree(logged, ignore_errors=True)
        for name in (*RESULTS, CONTRAST, "embeddings.h5ad", "metrics.json", "per_gene.csv", "stages.json"):
            (self.path / name).unlink(missing_ok=True)


def _as_yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys by which two configs differ; one that is new to a version counts as switched off before."""
    keys = []
    for key in {*a, *b}:
        left, right = a.get(key, False), b.get(key, False)
        if isinstance(left, dict) and isinstance(right, dict):
            keys += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right and (left or right or (key in a and key in b)):
            keys.append(f"{prefix}{key}")
    return keys


def config_of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that says what a run is, as its folder keeps it."""
    return {key: value for key, value in config.items() if key not in NO_SETTING}
