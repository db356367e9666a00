"""``stexp-train``: fit, predict the held-out section(s), score, report. One run folder."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from stexp import InputError
from stexp.config import build, build_data, command, load_run, load_sections, to_plain, write_atomically
from stexp.overrides import entry

if TYPE_CHECKING:
    import numpy as np
    import torch
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.loggers import Logger

    from stexp.data.datamodule import SpotDataModule
    from stexp.distributed import Ranks

log = logging.getLogger(__name__)

FINISHED = ("predictions.h5ad", "floors.h5ad", "audit.json", "provenance.json", "report.html")
"""Without one of these a run is not finished; the same command makes it from the checkpoints."""


def _sweep(arguments: list[str]) -> int:
    from stexp.launch import sweep

    return sweep(arguments)


@entry("train", multirun=_sweep)
def main(cfg: DictConfig) -> None:
    with command():
        from stexp.data.splits import folds

        protocol = build(cfg.protocol)
        sections = load_sections(cfg, protocol)
        names = folds(sections, protocol)
        if not names:
            raise InputError(
                f"no section of {cfg.data.name} under {cfg.data.root} has an image; nothing can be trained"
            )
        if str(cfg.fold) == "all":
            from stexp.score import folds_table

            runs = [train(cfg, sections, fold, Path(cfg.output_dir) / fold) for fold in names]
            print(folds_table(runs))
            return
        if cfg.fold is None:
            log.info("fold=%s: the first of %s", names[0], ", ".join(names))
            cfg.fold = names[0]
        train(cfg, sections, str(cfg.fold), Path(cfg.output_dir))


def train(cfg: DictConfig, sections: list, fold: str, folder: Path) -> dict:
    """One fold, from sections to report; goes on where an interrupted run stopped.

    Returns
    -------
    dict
        ``metrics.json``.

    Raises
    ------
    InputError
        Another process is at work in `folder`, or it holds a run with another config or of other data.
    """
    _check_numbers(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            return _train(cfg, sections, fold, folder)
    except Timeout:
        raise InputError(f"another process is at work in {folder}; wait for it, or choose another output_dir") from None


def _train(cfg: DictConfig, sections: list, fold: str, folder: Path) -> dict:
    from stexp import hardware

    if cfg.hardware.keep_memory:
        hardware.keep_freed_memory()
    from stexp import logs
    from stexp.checkpoints import load_checkpoint
    from stexp.distributed import Ranks, devices_of, others
    from stexp.provenance import Stages, provenance
    from stexp.report import write_report
    from stexp.results import changed_data, write_results
    from stexp.score import score_run, summary

    cfg = OmegaConf.merge(cfg, {"fold": fold, "output_dir": str(folder)})
    if claim(folder, cfg):
        changed = changed_data(folder, sections)
        if changed:
            raise InputError(
                f"{folder} is finished, and its data changed since ({', '.join(changed[:5])}); choose another "
                f"output_dir, or overwrite=true to start anew"
            )
        log.info("%s is finished; give overwrite=true to run it again", folder)
        return score_run(folder)

    ranks = Ranks(0, len(devices_of(to_plain(cfg.trainer), hardware.accelerator_of(cfg.trainer.accelerator))))
    stages = Stages(folder)
    logger = build(cfg.logger)  # before the work: its package may not be installed
    ready = _ready(cfg, sections, folder, ranks, stages, logger)
    data, model, trainer, device = ready.data, ready.model, ready.trainer, ready.device
    last, best = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "best.ckpt"
    status = "failed"
    try:
        logs.begin(logger, to_plain(cfg))
        with stages("fit"):
            if last.exists():
                data.load_state_dict(load_checkpoint(last)["SpotDataModule"])  # before weights that may not fit
                if len(data.rows("validation")) and not best.exists():
                    raise InputError(f"{best} is gone, and {last} alone cannot bring it back; give overwrite=true")
                log.info("going on from %s", last)
            with others(folder, ranks):
                _fit(ready, folder)
            if best.exists():
                kept = load_checkpoint(best)
                model.load_state_dict(kept["state_dict"])
        with stages("predict"):
            data.share = (0, 1)  # from here on this process works alone
            chosen = model.to(device).tune(data) if hasattr(model, "tune") else {}
            if chosen:
                log.info("chosen: %s", chosen)
            outputs = ready.predictor.predict(model, datamodule=data)
            data.trainer = trainer
        with stages("results"):
            write_results(folder, cfg, data, model, outputs, chosen, ready.features, best.exists())
        with stages("score"):
            metrics = score_run(folder)
        record = provenance(cfg, data, stages, ready.precision, device.type)
        record["hardware"]["devices"] = ranks.world
        if best.exists():
            states = (state for state in kept["callbacks"].values() if state.get("monitor") == "val/pearson")
            record["validation_pearson"] = float(next(states)["best_model_score"])
        write_atomically(folder / "provenance.json", json.dumps(record, indent=1))
        report = write_report(folder)
        logs.results(logger, folder, metrics, trainer.global_step)
        status = "success"
    finally:
        logs.end(logger, status)
    print(summary(metrics))
    print(f"wrote {folder}; look at {report}")
    return metrics


def take_part(cfg: DictConfig, folder: Path, ranks: Ranks) -> None:
    """Train the run in `folder` as another than its first process; write nothing."""
    from stexp import hardware

    if cfg.hardware.keep_memory:
        hardware.keep_freed_memory()
    sections = load_sections(cfg, build(cfg.protocol))
    _fit(_ready(cfg, sections, folder, ranks, lambda stage: nullcontext(), logger=False), folder)


@dataclass
class _Ready:
    """What a fit needs, and what came of making it ready."""

    data: SpotDataModule
    model: LightningModule
    trainer: Trainer
    predictor: Trainer  # of one device
    features: np.ndarray
    device: torch.device
    precision: str


def _fit(ready: _Ready, folder: Path) -> None:
    last = folder / "checkpoints" / "last.ckpt"
    there = last if last.exists() else None
    ready.trainer.fit(ready.model, datamodule=ready.data, ckpt_path=there, weights_only=True)


def _ready(
    cfg: DictConfig, sections: list, folder: Path, ranks: Ranks, stages: Callable, logger: Logger | bool
) -> _Ready:
    import pytorch_lightning as pl
    import torch

    for chatty in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # their import sets another level

    from stexp import distributed, hardware
    from stexp.checkpoints import WholeCheckpoints
    from stexp.data.features import UNTUNED, frozen_features, surrounding_features

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

    callbacks = list(build(cfg.callbacks).values())
    if len(data.rows("validation")):
        # before the one that keeps the last epoch, which stores what was best so far
        callbacks.insert(
            0,
            pl.callbacks.ModelCheckpoint(
                folder / "checkpoints", filename="best", monitor="val/pearson", mode="max", enable_version_counter=False
            ),
        )
    given = {**to_plain(cfg.trainer), "accelerator": kind}
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
    alone = given | {"devices": 1 if kind == "cpu" else [device.index], "strategy": "auto"}
    plugins = [WholeCheckpoints()]
    if ranks.world > 1:
        given["devices"] = ranks.world if kind == "cpu" else devices
        plugins += [ranks, *([distributed.SyncBatchNorm()] if sync_batchnorm else [])]
        # what is logged is the same on every device
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    else:
        given = alone
    trainer = build(given, callbacks=callbacks, plugins=plugins, logger=logger, **of_both)
    predictor = trainer if ranks.world == 1 else build(alone, logger=False, **of_both)
    return _Ready(data, model, trainer, predictor, features, device, precision)


def _check_numbers(cfg: DictConfig) -> None:
    """What would else be found wrong after the tiles are cut, or the features computed."""
    tuning = cfg.image_encoder.get("tuning", "all")
    if cfg.image_encoder.frozen and tuning != "all":
        raise InputError(f"image_encoder.frozen=true trains nothing; tuning={tuning} needs image_encoder.frozen=false")
    for key, value, least in (
        ("trainer.max_epochs", cfg.trainer.max_epochs, 1),
        ("hardware.threads", 1 if cfg.hardware.threads is None else cfg.hardware.threads, 1),
        ("seed", cfg.seed, 0),
    ):
        if not (isinstance(value, int) and value >= least):
            raise InputError(f"{key}={value}: a whole number of at least {least} would fit")


def claim(folder: Path, cfg: DictConfig) -> bool:
    """Take a folder for a run; True where it already holds this run, finished.

    Raises
    ------
    InputError
        The folder holds a run with another config, or its config is gone or damaged.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(_identity(to_plain(cfg))))
    path = folder / "config.yaml"
    started = (folder / "checkpoints").exists() or (folder / "predictions.h5ad").exists()
    if started and not path.exists():
        raise InputError(f"{folder} holds checkpoints or predictions, but no config.yaml; choose another output_dir")
    if started and not cfg.overwrite:
        before = OmegaConf.to_container(load_run(folder))
        differing = sorted(_differences(before, OmegaConf.to_container(OmegaConf.create(text))))
        differing = [key for key in differing if not key.startswith("logger")]  # nothing reads what it wrote
        if differing:
            raise InputError(
                f"{folder} holds a run with another config ({', '.join(differing[:5])}); choose another output_dir, "
                f"or overwrite=true to start anew"
            )
        return all((folder / name).exists() for name in FINISHED)
    if cfg.overwrite and path.exists():
        for name in ("checkpoints", "rescored"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for made in (folder / "logs").glob("*"):
            if made.is_dir():  # job.log may be what this process writes to
                shutil.rmtree(made, ignore_errors=True)
        for name in (*FINISHED, "embeddings.h5ad", "metrics.json", "per_gene.csv", "stages.json"):
            (folder / name).unlink(missing_ok=True)
    write_atomically(path, text)
    return False


def _identity(config: dict) -> dict:
    """What makes a run this run: everything but where it runs from and whether it may overwrite."""
    return {key: value for key, value in config.items() if key not in ("overwrite", "hydra", "sweep")}


def _differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    out = []
    for key in {*a, *b}:
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            out += _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            out.append(f"{prefix}{key}")
    return out


if __name__ == "__main__":
    main()
