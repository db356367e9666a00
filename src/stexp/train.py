"""``stexp-train``: fit, predict the held-out section(s), score, report. One run folder."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import hydra
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from stexp import InputError
from stexp.config import CONF, build, build_data, command, load_sections, to_plain, write_atomically

log = logging.getLogger(__name__)


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
            base = Path(cfg.output_dir)
            for fold in names:
                train(cfg, sections, fold, base / fold)
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
        Another process is at work in `folder`, or it holds a run with another config.
    """
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
    from stexp.results import write_results
    from stexp.score import score_run, summary

    cfg = OmegaConf.merge(cfg, {"fold": fold, "output_dir": str(folder)})
    if claim(folder, cfg):
        log.info("%s is finished; give overwrite=true to run it again", folder)
        return score_run(folder)

    # runs are seeded, and what differs between machines is chosen and said
    device = torch.device(hardware.accelerator_of(cfg.trainer.accelerator))
    precision = hardware.choose_precision(cfg.hardware.precision, device.type)
    if cfg.hardware.threads:
        torch.set_num_threads(cfg.hardware.threads)
    pl.seed_everything(cfg.seed, verbose=False)
    log.info(
        "fold %s on %s: %s, %s, %d CPU threads",
        fold,
        device.type,
        precision,
        "channels last" if cfg.hardware.channels_last else "channels first",
        torch.get_num_threads(),
    )
    stages = Stages(folder)

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
        )
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
    logger = build(cfg.logger)
    trainer = build(
        {**to_plain(cfg.trainer), "accelerator": device.type},
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


def claim(folder: Path, cfg: DictConfig) -> bool:
    """Take a folder for a run; True where it already holds this run, finished.

    Raises
    ------
    InputError
        The folder holds a run with another config.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(_identity(to_plain(cfg))))
    path = folder / "config.yaml"
    started = (folder / "checkpoints").exists() or (folder / "predictions.h5ad").exists()
    if path.exists() and started and not cfg.overwrite:
        before = OmegaConf.to_container(OmegaConf.load(path))
        differing = sorted(_differences(before, OmegaConf.to_container(OmegaConf.create(text))))
        if differing:
            raise InputError(
                f"{folder} holds a run with another config ({', '.join(differing[:5])}); choose another output_dir, "
                f"or overwrite=true to start anew"
            )
        return (folder / "report.html").exists() and (folder / "provenance.json").exists()
    if cfg.overwrite and path.exists():
        for name in ("checkpoints", "logs", "rescored"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (
            "predictions.h5ad",
            "floors.h5ad",
            "embeddings.h5ad",
            "metrics.json",
            "per_gene.csv",
            "audit.json",
            "report.html",
            "provenance.json",
            "stages.json",
        ):
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
