"""What a run needs for its fit, made ready on each of its devices, and the fit."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import Logger

from stexp import hardware
from stexp.config import build, build_data, load_sections, to_plain
from stexp.data.datamodule import SpotDataModule
from stexp.models.encoders.features import UNTUNED, frozen_features, surrounding_features
from stexp.training import distributed
from stexp.training.checkpoints import WholeCheckpoints
from stexp.training.distributed import Ranks

log = logging.getLogger(__name__)


@dataclass
class Ready:
    """What a fit needs, and what came of making it ready."""

    data: SpotDataModule
    model: LightningModule
    trainer: Trainer
    predictor: Trainer  # of one device
    features: np.ndarray
    device: torch.device
    precision: str


def ready_to_fit(
    cfg: DictConfig, sections: list, folder: Path, ranks: Ranks, stages: Callable, logger: Logger | bool
) -> Ready:
    import torch

    for chatty in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # their import sets another level

    from stexp import hardware

    # runs are seeded, and what differs between machines is chosen and said
    kind = hardware.accelerator_of(cfg.trainer.accelerator)
    devices = distributed.devices_of(to_plain(cfg.trainer), kind)
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, devices[ranks.rank])
    precision = hardware.choose_precision(cfg.hardware.precision, kind)
    processes = ranks.world if kind == "cpu" else 1
    threads = cfg.hardware.threads or max(1, torch.get_num_threads() // processes)
    torch.set_num_threads(threads)
    pl.seed_everything(cfg.seed, verbose=False)
    log.info(
        "fold %s on %s: %s, %s, %d CPU threads",
        cfg.fold,
        kind if ranks.world == 1 else f"{ranks.world} x {kind}",
        precision,
        "channels last" if cfg.hardware.channels_last else "channels first",
        threads,
    )
    with stages("data"):
        data = build_data(cfg, sections, build(cfg.protocol), cfg.fold)
        data.share = (ranks.rank, ranks.world)
        data.setup()
        for line in data.summary():
            log.info("%s", line)
    with stages("floors"):
        # an encoder of their own: what the weights are worth before any training
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
        frozen = build({**to_plain(cfg.image_encoder), **UNTUNED})
        features = frozen_features(data, frozen, device, autocast)
    with stages("model"):
        pl.seed_everything(cfg.seed, verbose=False)
        model = build(
            {k: v for k, v in to_plain(cfg.model).items() if k != "name"},
            n_genes=len(data.panel),
            n_positions=data.array_size,
            n_features=features.shape[1],
        )
        data.features, data.batching = features, getattr(model, "batching", "spots")
        if getattr(model, "surroundings", 0):
            data.surroundings = surrounding_features(data, frozen, model.surroundings, device, autocast)
        del frozen
        if cfg.hardware.channels_last:
            model.to(memory_format=torch.channels_last)
    distributed.check(model, data, ranks.world)

    trainer, predictor = _trainers(cfg, folder, ranks, data, model, device, precision, logger)
    return Ready(data, model, trainer, predictor, features, device, precision)


def _trainers(
    cfg: DictConfig,
    folder: Path,
    ranks: Ranks,
    data: SpotDataModule,
    model: LightningModule,
    device: torch.device,
    precision: str,
    logger: Logger | bool,
) -> tuple[Trainer, Trainer]:
    """The trainer of the fit, on all devices, and the one that predicts, on this process's device alone."""
    callbacks = list(build(cfg.callbacks).values())
    if len(data.rows("validation")):
        # before the one that keeps the last epoch, which stores what was best so far
        callbacks.insert(
            0,
            pl.callbacks.ModelCheckpoint(
                folder / "checkpoints", filename="best", monitor="val/pearson", mode="max", enable_version_counter=False
            ),
        )
    given = {**to_plain(cfg.trainer), "accelerator": device.type}
    sync_batchnorm = given.pop("sync_batchnorm", False)
    if getattr(model, "closed_form", False):
        # one calculation: one step in which Lightning keeps a checkpoint, without optimizer or loss
        given |= {"max_epochs": 1, "limit_train_batches": 1}
        for message in (".*configure_optimizers. returned .None.", ".*training_step. returned .None."):
            warnings.filterwarnings("ignore", message=message)
    of_both = {
        "precision": precision,
        "default_root_dir": str(folder),
        "enable_progress_bar": sys.stderr.isatty() and ranks.rank == 0,
    }
    alone = given | {"devices": 1 if device.type == "cpu" else [device.index], "strategy": "auto"}
    plugins = [WholeCheckpoints({"name": cfg.model.name, "image_encoder": cfg.image_encoder.name})]
    if ranks.world > 1:
        of_machine = distributed.devices_of(to_plain(cfg.trainer), device.type)
        given["devices"] = ranks.world if device.type == "cpu" else of_machine
        plugins += [ranks, *([distributed.SyncBatchNorm()] if sync_batchnorm else [])]
        # what is logged is the same on every device
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    else:
        given = alone
    trainer = build(given, callbacks=callbacks, plugins=plugins, logger=logger, **of_both)
    predictor = trainer if ranks.world == 1 else build(alone, logger=False, **of_both)
    return trainer, predictor


def fit(ready: Ready, folder: Path) -> None:
    """Fit, from the run's last checkpoint where there is one."""
    last = folder / "checkpoints" / "last.ckpt"
    there = last if last.exists() else None
    ready.trainer.fit(ready.model, datamodule=ready.data, ckpt_path=there, weights_only=True)


def take_part(cfg: DictConfig, folder: Path, ranks: Ranks) -> None:
    """Train the run in `folder` as another than its first process; write nothing."""
    if cfg.hardware.keep_memory:
        hardware.keep_freed_memory()
    sections = load_sections(cfg, build(cfg.protocol))
    fit(ready_to_fit(cfg, sections, folder, ranks, lambda stage: nullcontext(), logger=False), folder)
