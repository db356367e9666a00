"""``stexp-train``: fit, predict the held-out section(s), score, report. One run folder."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from stexp.config import alone_in, build, command, load_run, load_sections, to_plain, write_atomically
from stexp.config.compose import entry
from stexp.errors import InputError

log = logging.getLogger(__name__)

FINISHED = ("predictions.h5ad", "floors.h5ad", "audit.json", "provenance.json", "report.html")
"""Without one of these a run is not finished; the same command makes it from the checkpoints."""


def _sweep(arguments: list[str]) -> int:
    from stexp.sweeps.launching import sweep

    return sweep(arguments)


@entry("train", multirun=_sweep)
def main(cfg: DictConfig) -> None:
    with command():
        from stexp.data.splits import folds

        _check_numbers(cfg)  # before sections are read
        protocol = build(cfg.protocol)
        sections = load_sections(cfg, protocol)
        names = folds(sections, protocol)
        if not names:
            raise InputError(
                f"no section of {cfg.data.name} under {cfg.data.root} has an image; nothing can be trained"
            )
        if str(cfg.fold) == "all":
            from stexp.evaluation.score import folds_table

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
    with alone_in(folder):
        return _train(cfg, sections, fold, folder)


def _train(cfg: DictConfig, sections: list, fold: str, folder: Path) -> dict:
    from stexp import hardware

    if cfg.hardware.keep_memory:
        hardware.keep_freed_memory()
    from stexp.evaluation.score import summary
    from stexp.reporting.report import write_report
    from stexp.runs.provenance import Stages, provenance
    from stexp.runs.results import changed_data, write_results
    from stexp.runs.scoring import score_run
    from stexp.training import loggers as logs
    from stexp.training.checkpoints import load_checkpoint
    from stexp.training.distributed import Ranks, devices_of, others
    from stexp.training.fit import fit, ready_to_fit

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
    ready = ready_to_fit(cfg, sections, folder, ranks, stages, logger)
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
                fit(ready, folder)
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
        if not (isinstance(value, int) and least <= value < 2**32):
            raise InputError(f"{key}={value}: a whole number of at least {least} would fit")
    for key in ("fast_dev_run", "limit_train_batches", "limit_val_batches", "limit_predict_batches"):
        if key in cfg.trainer:
            raise InputError(f"trainer.{key}: a run takes all its spots; to try something out, take fewer sections")


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
        # nothing reads what a logger wrote; the folder is the one that was named, however it was
        elsewhere = ("logger", "output_dir", "callbacks.last.dirpath")
        differing = [key for key in differing if not key.startswith(elsewhere)]
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
