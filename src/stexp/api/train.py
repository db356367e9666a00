"""One run, from sections to report: what ``stexp-train`` and :func:`stexp.fit` both call."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from stexp.api.features import frozen_encoder, machine_of
from stexp.construct import build
from stexp.data.datamodule import SpotDataModule
from stexp.data.dataset import DataSet
from stexp.data.parallel import Background
from stexp.data.readers.memory import free_memory
from stexp.data.section import Section
from stexp.errors import InputError
from stexp.evaluation.predictions import DIGEST
from stexp.files import alone_in, write_atomically
from stexp.inference.base import Base, check_data, check_method, check_tiles, read_base
from stexp.inference.carried import CarriedWeights
from stexp.models.method import Method
from stexp.reporting.report import write_report
from stexp.runs.comparison import Comparison, colours, random_features, reduced
from stexp.runs.folder import RunFolder, config_of_run
from stexp.runs.provenance import Stages, provenance
from stexp.runs.results import write_results
from stexp.runs.scoring import score_finished, score_run
from stexp.training import loggers
from stexp.training.duplicates import compare_tiles, training_record
from stexp.training.fit import best_validation_score, build_method, fit, predict, size_of_training
from stexp.training.machine import Machine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, and what made it.

    Attributes
    ----------
    folder
        With predictions, floors, audit, provenance, ``metrics.json``, ``per_gene.csv`` and ``report.html``.
    metrics
        ``metrics.json``.
    method
        At the weights that predicted; None where the folder held the finished run already.
    """

    folder: Path
    metrics: dict[str, Any]
    method: Method | None


def train_run(
    config: Mapping[str, Any],
    sections: list[Section],
    *,
    command: str | None = None,
    overwrite: bool = False,
    method: Method | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> TrainedRun | None:
    """Fit one fold, predict what it holds out, score it and write the report; goes on where a run was interrupted.

    Parameters
    ----------
    config
        ``conf/train.yaml`` with every value in place, ``fold`` and ``output_dir`` too, as plain data.
    sections
        Those of the data set, held out and not.
    command
        What was called, for the record; None: the command that runs.
    overwrite
        Start anew where ``output_dir`` holds a run, this one or another.
    method
        Trained in place of what ``config["model"]`` would build.
    callbacks
        Of Lightning, besides those of the config.

    Returns
    -------
    TrainedRun or None
        None in a process of another rank than the first, which only takes part in the fit.

    Raises
    ------
    InputError
        Another process is at work in the folder, or it holds a run with another config or of other data.
    """
    machine = machine_of(config)
    config = config_of_run(config)
    base = _base(config, method)
    if base is not None:
        config["from"] = base.config
    folder = RunFolder(Path(config["output_dir"]))
    if not machine.is_first:
        logging.getLogger().setLevel(logging.ERROR)  # the first process says what there is to say
    try:
        with alone_in(folder.path) if machine.is_first else nullcontext():
            if machine.is_first:
                if folder.claim(config, overwrite):
                    return TrainedRun(folder.path, score_finished(folder.path, sections), None)
            elif folder.finished and not overwrite:
                return None
            return _train(config, sections, folder, machine, command, overwrite, method, callbacks, base)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_next(folder)) from None


def _next(folder: RunFolder) -> str:
    """What the same command does after this one was interrupted."""
    if folder.last_checkpoint.exists():
        return f"the same command goes on from {folder.last_checkpoint}"
    return "no epoch is finished; the same command starts anew, with the tiles and features that are in the cache"


def _base(config: Mapping[str, Any], method: Method | None) -> Base | None:
    """The model that the training begins at, where the config names one."""
    if config.get("from") is None:
        return None
    if method is not None:
        raise InputError(f"from={config['from']}: a method given as an object brings its own weights")
    base = read_base(str(config["from"]))
    check_method(base, config["model"])
    return base


def _train(
    config: dict[str, Any],
    sections: list[Section],
    folder: RunFolder,
    machine: Machine,
    command: str | None,
    overwrite: bool,
    method: Method | None,
    callbacks: Sequence[pl.Callback],
    base: Base | None,
) -> TrainedRun | None:
    dataset, protocol, seed = DataSet.of(config), build(config["protocol"]), config["seed"]
    stages = Stages(folder.path if machine.is_first else None)
    logger: Any = build(config["logger"]) if machine.is_first else False  # before the work: it may not be installed
    _announce(config, machine)
    with stages("data"):
        data = dataset.serve(sections, protocol, config["fold"], seed)  # judges its keys, before weights are loaded
        data.encoder = frozen_encoder(config, machine)
        if base is not None:
            check_data(base, data)
        data.open_tiles()
        tiles = compare_tiles(data)
        if base is not None:
            check_tiles(base, data, tiles)
        for line in data.summary():
            log.info("%s", line)
    with stages("floors"):
        data.setup()  # the features: what the encoder's weights are worth before any training
        colour, random = colours(data), random_features(data)

    def compare() -> Comparison:
        return Comparison.of(data, data.tile_features, colour, reduced(data, random))

    with stages("model"):
        if method is None:
            method = build_method(config["model"], data, machine, seed)
        carried = None if base is None else CarriedWeights(base, method, config["model"], data)
        if carried is not None:
            carried.say()
            callbacks = [*callbacks, carried]
    # floors and ceilings need nothing of the method
    beside = Background(compare) if machine.is_first and _leaves_room(machine, data) else None
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
                callbacks=[*(build(node) for node in config["callbacks"].values()), *callbacks],
                logger=logger,
                about={"name": config["model"]["name"], "image_encoder": config["image_encoder"]["name"]},
                resume=not overwrite,
            )
        if not machine.is_first:
            return None
        with stages("predict"):
            prediction, chosen = predict(method, data, machine, trainer, folder.checkpoint)
        (folder.path / "provenance.json").unlink(missing_ok=True)  # it is of predictions that are made anew
        with stages("results"):
            thresholds = build(config["data"]["quality"])
            comparison = compare() if beside is None else beside.result()
            digest = write_results(folder, data, method, prediction, chosen, thresholds, comparison)
        with stages("score"):
            metrics = score_run(folder.path)
        computed = machine.chosen_precision, machine.device.type
        record = provenance(data.sections, size_of_training(trainer), stages, *computed, command)
        record["hardware"]["devices"] = machine.world_size
        record[DIGEST] = digest
        references = () if method.references is None else method.references.sections
        record["spots"] = training_record(data, tiles, references)
        if carried is not None:
            record["from"] = carried.record()
        if folder.best_checkpoint.exists():
            record["validation_pearson"] = best_validation_score(folder.best_checkpoint)
        write_atomically(folder.path / "provenance.json", json.dumps(record, indent=1))
        write_report(folder.path)
        loggers.results(logger, folder.path, metrics, trainer.global_step)
        status = "success"
    finally:
        if machine.is_first:
            loggers.end(logger, status)
    return TrainedRun(folder.path, metrics, method)


def _leaves_room(machine: Machine, data: SpotDataModule) -> bool:
    """Whether training leaves a core to floors and ceilings, and the data leave memory: they take 22 to 24 times what
    expression does as one table, and less where it is so large that it is read by blocks."""
    return machine.leaves_a_core and 25 * data.target.nbytes < free_memory()


def _announce(config: dict[str, Any], machine: Machine) -> None:
    """Seed the run, and say what differs between machines and was chosen here."""
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
