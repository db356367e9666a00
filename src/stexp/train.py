"""``stexp-train``: fit, predict the held-out section(s), score, report. One run folder."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

import hydra
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from stexp import InputError
from stexp.config import CONF, build, build_data, command, load_run, load_sections, to_plain, write_atomically

log = logging.getLogger(__name__)

FINISHED = ("predictions.h5ad", "floors.h5ad", "audit.json", "provenance.json", "report.html")
"""Without one of these a run is not finished; the same command makes it from the checkpoints."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
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
    import pytorch_lightning as pl
    import torch

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its import sets another level

    from stexp.checkpoints import WholeCheckpoints, load_checkpoint
    from stexp.data.features import frozen_features
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

    # runs are seeded, and what differs between machines is chosen and said
    device = torch.device(hardware.accelerator_of(cfg.trainer.accelerator))
    precision = hardware.choose_precision(cfg.hardware.precision, device.type)
    threads = cfg.hardware.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    pl.seed_everything(cfg.seed, verbose=False)
    log.info(
        "fold %s on %s: %s, %s, %d CPU threads",
        fold,
        device.type,
        precision,
        "channels last" if cfg.hardware.channels_last else "channels first",
        threads,
    )
    stages = Stages(folder)
    logger = build(cfg.logger)  # before the work: its package may not be installed

    with stages("data"):
        data = build_data(cfg, sections, build(cfg.protocol), fold)
        data.setup()
        for line in data.summary():
            log.info("%s", line)
    with stages("floors"):
        # an encoder of their own: what the weights are worth before any training
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
        features = frozen_features(data, build(cfg.image_encoder), device, autocast)
    with stages("model"):
        pl.seed_everything(cfg.seed, verbose=False)
        model = build(
            {k: v for k, v in to_plain(cfg.model).items() if k != "name"},
            n_genes=len(data.panel),
            n_positions=data.array_size,
            n_features=features.shape[1],
        )
        data.features, data.batching = features, getattr(model, "batching", "spots")
        if cfg.hardware.channels_last:
            model.to(memory_format=torch.channels_last)

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
    if getattr(model, "closed_form", False):
        # one calculation: one step in which Lightning keeps a checkpoint, without optimizer or loss
        given |= {"max_epochs": 1, "limit_train_batches": 1}
        for message in (".*configure_optimizers. returned .None.", ".*training_step. returned .None."):
            warnings.filterwarnings("ignore", message=message)
    trainer = build(
        given,
        precision=precision,
        callbacks=callbacks,
        plugins=[WholeCheckpoints()],
        logger=logger,
        default_root_dir=str(folder),
        enable_progress_bar=sys.stderr.isatty(),
    )
    last, best = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "best.ckpt"
    try:
        with stages("fit"):
            if last.exists():
                load_checkpoint(last)
                if len(data.rows("validation")) and not best.exists():
                    raise InputError(f"{best} is gone, and {last} alone cannot bring it back; give overwrite=true")
                log.info("going on from %s", last)
            trainer.fit(model, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
            if best.exists():
                model.load_state_dict(load_checkpoint(best)["state_dict"])
        with stages("predict"):
            chosen = model.to(device).tune(data) if hasattr(model, "tune") else {}
            if chosen:
                log.info("chosen: %s", chosen)
            outputs = trainer.predict(model, datamodule=data)
        with stages("results"):
            write_results(folder, cfg, data, model, outputs, chosen, features, best.exists())
    finally:
        if cfg.logger._target_.endswith("WandbLogger"):
            import wandb

            wandb.finish()
    with stages("score"):
        metrics = score_run(folder)
    record = provenance(cfg, data, stages, precision, device.type)
    write_atomically(folder / "provenance.json", json.dumps(record, indent=1))
    report = write_report(folder)
    print(summary(metrics))
    print(f"wrote {folder}; look at {report}")
    return metrics


def _check_numbers(cfg: DictConfig) -> None:
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
        if differing:
            raise InputError(
                f"{folder} holds a run with another config ({', '.join(differing[:5])}); choose another output_dir, "
                f"or overwrite=true to start anew"
            )
        return all((folder / name).exists() for name in FINISHED)
    if cfg.overwrite and path.exists():
        for name in ("checkpoints", "logs", "rescored"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (*FINISHED, "embeddings.h5ad", "metrics.json", "per_gene.csv", "stages.json"):
            (folder / name).unlink(missing_ok=True)
    write_atomically(path, text)
    return False


def _identity(config: dict) -> dict:
    """What makes a run this run: everything but where it runs from and whether it may overwrite."""
    return {key: value for key, value in config.items() if key not in ("overwrite", "hydra")}


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
