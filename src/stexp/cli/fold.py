"""One fold of ``stexp-train``: fit, predict the held-out section(s), score, report."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stexp import hardware
from stexp.arguments import Count, Seed, check
from stexp.config import build, to_plain
from stexp.data.dataset import DataSet
from stexp.data.section import Section
from stexp.errors import InputError
from stexp.evaluation.predictions import DIGEST
from stexp.evaluation.score import summary
from stexp.files import alone_in, write_atomically
from stexp.reporting.report import write_report
from stexp.runs.folder import RunFolder
from stexp.runs.provenance import Stages, changed_sections, provenance
from stexp.runs.scoring import score_run

if TYPE_CHECKING:
    from stexp.training.machine import Machine

log = logging.getLogger(__name__)

NO_SETTING = ("overwrite", "verbose", "hydra", "sweep")
"""Keys that change nothing of a run: a run folder's config goes without them."""


def check_settings(cfg: DictConfig) -> None:
    """InputError for settings that contradict each other or are out of range, whatever the data are."""
    tuning = cfg.image_encoder.get("tuning", "all")
    if cfg.image_encoder.frozen and tuning != "all":
        raise InputError(f"image_encoder.frozen=true trains nothing; tuning={tuning} needs image_encoder.frozen=false")
    check("trainer.max_epochs", cfg.trainer.max_epochs, Count)
    check("hardware.threads", cfg.hardware.threads, Count | None)
    check("seed", cfg.seed, Seed)
    for key in ("fast_dev_run", "limit_train_batches", "limit_val_batches", "limit_predict_batches"):
        if key in cfg.trainer:
            raise InputError(f"trainer.{key}: a run takes all its spots; to try something out, take fewer sections")


def config_of(cfg: DictConfig, fold: str, folder: Path) -> dict[str, Any]:
    """The config of a run of one fold in its folder, as the folder keeps it; plain data."""
    cfg = cfg.copy()
    cfg.fold, cfg.output_dir = fold, str(folder)
    return {key: value for key, value in to_plain(cfg).items() if key not in NO_SETTING}


def train(cfg: DictConfig, sections: list[Section], fold: str, folder: Path) -> dict | None:
    """One fold, from sections to report; goes on where an interrupted run stopped.

    Returns
    -------
    dict
        ``metrics.json``; None in a process of another rank than the first, which only takes part in the fit.

    Raises
    ------
    InputError
        Another process is at work in `folder`, or it holds a run with another config or of other data.
    """
    check_settings(cfg)
    if cfg.hardware.keep_memory:
        hardware.keep_freed_memory()  # before torch takes any
    # imports torch and Lightning, which --help and refusals do without
    from stexp.training.machine import Machine

    machine = Machine(to_plain(cfg.trainer), cfg.hardware.precision, cfg.hardware.channels_last, cfg.hardware.threads)
    config, run = config_of(cfg, fold, folder), RunFolder(folder)
    if not machine.is_first:
        logging.getLogger().setLevel(logging.ERROR)  # the first process says what there is to say
    try:
        with alone_in(folder) if machine.is_first else nullcontext():
            return _train(config, sections, run, machine, bool(cfg.overwrite), bool(cfg.verbose))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_next(run)) from None


def _next(folder: RunFolder) -> str:
    """What the same command does after this one was interrupted."""
    if folder.last_checkpoint.exists():
        return f"the same command goes on from {folder.last_checkpoint}"
    return "no epoch is finished; the same command starts anew, with the tiles and features that are in the cache"


def _train(
    config: dict[str, Any],
    sections: list[Section],
    folder: RunFolder,
    machine: Machine,
    overwrite: bool,
    verbose: bool,
) -> dict | None:
    from stexp.models.encoders.frozen import UNTUNED, FrozenEncoder
    from stexp.runs.results import write_results
    from stexp.training import loggers
    from stexp.training.fit import best_validation_score, build_method, fit, predict, size_of_training

    if machine.is_first:
        if folder.claim(config, overwrite):
            return _finished(folder, sections)
    elif folder.finished and not overwrite:
        return None
    dataset, protocol, seed = DataSet(config["data"]), build(config["protocol"]), config["seed"]
    stages = Stages(folder.path if machine.is_first else None)
    logger: Any = build(config["logger"]) if machine.is_first else False  # before the work: it may not be installed
    _announce(config, machine)
    with stages("data"):
        data = dataset.serve(sections, protocol, config["fold"], seed)  # judges its keys, before weights are loaded
        encoder = build({**config["image_encoder"], **UNTUNED})
        data.encoder = FrozenEncoder(
            encoder, machine.device, machine.autocast(), config["data"]["cache_dir"], config["data"]["eval_batch_size"]
        )
        data.open_tiles()
        for line in data.summary():
            log.info("%s", line)
    with stages("floors"):
        data.setup()  # the features: what the encoder's weights are worth before any training
    with stages("model"):
        method = build_method(config["model"], data, machine, seed)
    status = "failed"
    try:
        if machine.is_first:
            loggers.begin(logger, config)
        with stages("fit"):
            trainer = fit(
                method,
                data,
                folder.path,
                machine,
                callbacks=[build(node) for node in config["callbacks"].values()],
                logger=logger,
                about={"name": config["model"]["name"], "image_encoder": config["image_encoder"]["name"]},
                resume=not overwrite,
            )
        if not machine.is_first:
            return None
        with stages("predict"):
            prediction, chosen = predict(method, data, machine, trainer)
        (folder.path / "provenance.json").unlink(missing_ok=True)  # it is of predictions that are made anew
        with stages("results"):
            digest = write_results(folder, data, method, prediction, chosen, build(config["data"]["quality"]))
        with stages("score"):
            metrics = score_run(folder.path)
        record = provenance(
            data.sections, size_of_training(trainer), stages, machine.chosen_precision, machine.device.type
        )
        record["hardware"]["devices"] = machine.world_size
        record[DIGEST] = digest
        if folder.best_checkpoint.exists():
            record["validation_pearson"] = best_validation_score(folder.best_checkpoint)
        write_atomically(folder.path / "provenance.json", json.dumps(record, indent=1))
        report = write_report(folder.path)
        loggers.results(logger, folder.path, metrics, trainer.global_step)
        status = "success"
    finally:
        if machine.is_first:
            loggers.end(logger, status)
    print(f"wrote {folder.path}; look at {report}")
    print(summary(metrics, verbose))
    return metrics


def _finished(folder: RunFolder, sections: list[Section]) -> dict:
    changed = changed_sections(folder.path, sections)
    if changed:
        raise InputError(
            f"{folder.path} is finished, and its data changed since ({', '.join(changed[:5])}); choose another "
            f"output_dir, or overwrite=true to start anew"
        )
    log.info("%s is finished; give overwrite=true to run it again", folder.path)
    return score_run(folder.path)


def _announce(config: dict[str, Any], machine: Machine) -> None:
    """Seed the run, and say what differs between machines and was chosen here."""
    import pytorch_lightning as pl

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its import sets INFO
    threads = machine.set_threads()
    pl.seed_everything(config["seed"], verbose=False)
    log.info(
        "fold %s on %s: %s, %s, %s",
        config["fold"],
        machine.kind if machine.world_size == 1 else f"{machine.world_size} x {machine.kind}",
        machine.chosen_precision,
        "channels last" if machine.channels_last else "channels first",
        threads,
    )
