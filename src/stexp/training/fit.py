"""Methods built for their data, and fitted by Lightning."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger

from stexp.construct import build
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.adapter import as_method
from stexp.models.correction import Correction
from stexp.models.method import Method, Prediction
from stexp.training.callbacks import VALIDATION, RecordContrast
from stexp.training.checkpoints import WholeCheckpoints, keep_weights, load_checkpoint
from stexp.training.distributed import SyncBatchNorm, check_several_devices
from stexp.training.machine import Machine
from stexp.training.threads import LowerThreads

log = logging.getLogger(__name__)


def build_method(node: Mapping[str, Any], data: SpotDataModule, machine: Machine, seed: int) -> Method:
    """A method with the sizes of its data, at the weights of a seed.

    Parameters
    ----------
    node
        ``_target_`` and arguments, but for ``n_genes``, ``n_positions`` and ``n_features``, which come from the data.
    """
    pl.seed_everything(seed, verbose=False)
    arguments = {key: value for key, value in node.items() if key != "name"}
    method = build(arguments, n_genes=len(data.panel), n_positions=data.array_size, n_features=data.n_features)
    if not isinstance(method, pl.LightningModule):
        raise InputError(f"model._target_={node['_target_']}: a method, one of stexp.models, would fit")
    method = as_method(method)
    if machine.channels_last:
        method.to(memory_format=torch.channels_last)
    return method


@dataclass(frozen=True)
class Checkpoints:
    """Where a fit keeps its checkpoints: ``last.ckpt`` to go on from, ``best.ckpt`` by validation."""

    folder: Path

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.folder / "best.ckpt"


def fit(
    method: Method,
    data: SpotDataModule,
    folder: Path,
    machine: Machine,
    *,
    callbacks: Sequence[Callback],
    logger: Logger | bool = False,
    about: Mapping[str, str] | None = None,
    resume: bool = True,
) -> Trainer:
    """Fit a method, and leave it at its best weights: by validation, or the last where nothing is validated.

    Nothing is where there are no validation spots, and of closed forms, which learn from these, too.

    Parameters
    ----------
    folder
        Of the run; ``checkpoints/last.ckpt`` in it, where there is one, is gone on from.
    about
        What a checkpoint says of the method beside its weights; plain values.
    resume
        False: start anew, whatever is there.

    Returns
    -------
    Trainer
        As it ended.
    """
    check_several_devices(method, data, machine.world_size)
    checkpoints = Checkpoints(folder / "checkpoints")
    going_on = resume and checkpoints.last.exists()
    # of a closed form the validation spots train: a score of theirs would be one in sample
    validated = len(data.rows("validation")) > 0 and not method.closed_form
    if going_on:
        checkpoint = load_checkpoint(checkpoints.last)
        data.load_state_dict(checkpoint["SpotDataModule"])  # before weights that may not fit
        if validated and not checkpoints.best.exists():
            raise InputError(
                f"{checkpoints.best} is gone, and {checkpoints.last} alone cannot bring it back; give overwrite=true"
            )
        log.info("going on from %s", checkpoints.last)
        method.load_state_dict(checkpoint["state_dict"])  # of what encoder there are features is asked next
    say_what_is_encoded(method, data)
    callbacks = [*callbacks, RecordContrast(folder)]
    if validated:
        # before the one that keeps the last epoch, which stores what was best so far
        best = ModelCheckpoint(
            checkpoints.folder, filename="best", monitor=VALIDATION, mode="max", enable_version_counter=False
        )
        callbacks.insert(0, best)
    plugin = WholeCheckpoints(dict(about or {}), checkpoints.best)
    if machine.chooses_threads and machine.kind == "cpu":
        callbacks.append(LowerThreads())
    trainer = _trainer(method, folder, machine, callbacks, logger, plugin)
    with _interruptible():
        trainer.fit(method, datamodule=data, ckpt_path=checkpoints.last if going_on else None, weights_only=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if machine.is_first and checkpoints.best.exists():
        method.load_state_dict(load_checkpoint(checkpoints.best)["state_dict"])
    return trainer


def say_what_is_encoded(method: Method, data: SpotDataModule) -> None:
    """Log whether a frozen encoder runs on tiles, or its kept features are trained on.

    Raises
    ------
    InputError
        ``data.views`` of a method that would not, or without an augmentation to draw from.
    """
    reads_features = data.encoder is not None and not method.closed_form and method.reads_features_of(data.encoder)
    if data.views and data.augmentation == "none":
        raise InputError(f"data.views={data.views}: data.augmentation=none has one view; null would fit")
    if data.views and not reads_features:
        raise InputError(
            f"data.views={data.views} are kept features of a frozen encoder (image_encoder.frozen=true), for methods "
            f"that read nothing else of a tile: mclstexp, bleep, heclip, stgchb, sepal, deepspot, stflow, stnet with "
            f"model.symmetries=false and model.input_scale=image_encoder; null would fit"
        )
    if reads_features and (data.views or data.augmentation == "none" or method.frozen_encoder is None):
        log.info("training on features in the cache: the image encoder is frozen and need not run")
    elif reads_features:
        log.info(
            "the frozen image encoder runs in every epoch, on tiles augmented anew; data.augmentation=none or "
            "data.views=8 train on features in the cache, in a fraction of the time"
        )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Pass Ctrl-C on as what it is: Lightning exits with status 1 instead, and leaves the signal ignored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        if not isinstance(ended.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def _trainer(
    method: Method,
    folder: Path,
    machine: Machine,
    callbacks: Sequence[Callback],
    logger: Logger | bool,
    checkpoint_io: WholeCheckpoints,
) -> Trainer:
    node = {**machine.trainer, "accelerator": machine.kind, "devices": _devices(machine)}
    sync_batchnorm = node.pop("sync_batchnorm", False)
    if method.closed_form:
        # one calculation: one step in which Lightning keeps a checkpoint, without optimizer, loss or validation
        node |= {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
        for message in (".*configure_optimizers. returned .None.", ".*training_step. returned .None."):
            warnings.filterwarnings("ignore", message=message)
    plugins: list[Any] = [checkpoint_io]
    if machine.world_size > 1:
        plugins += [SyncBatchNorm()] if sync_batchnorm else []
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged is the same on every device
    else:
        node["strategy"] = "auto"
    return build(
        node,
        callbacks=list(callbacks),
        plugins=plugins,
        logger=logger,
        precision=machine.chosen_precision,
        default_root_dir=str(folder),
        enable_progress_bar=False,  # EpochLines shows one over all epochs
    )


def _devices(machine: Machine) -> int | list[int]:
    return machine.devices if machine.kind == "cuda" else len(machine.devices)


def predict(
    method: Method, data: SpotDataModule, machine: Machine, trainer: Trainer, checkpoint: Path
) -> tuple[Prediction, dict]:
    """Predict the test spots on one device, after the method chose on validation spots what it left open, and learned
    what stands on its final weights.

    Parameters
    ----------
    trainer
        Of the fit.
    checkpoint
        Of the method, which keeps what it learns here.

    Returns
    -------
    Prediction
        Of the test spots, in their order.
    dict
        What was chosen; plain values.
    """
    alone = trainer
    if machine.world_size > 1:
        node = {key: value for key, value in machine.trainer.items() if key not in ("sync_batchnorm", "num_nodes")}
        node |= {"accelerator": machine.kind, "strategy": "auto"}
        node["devices"] = [machine.device.index] if machine.kind == "cuda" else 1
        alone = build(node, logger=False, precision=machine.chosen_precision, enable_progress_bar=False)
    data.trainer = method.trainer = alone
    alone.strategy.connect(method)  # whose loaders ask for it before its first prediction
    chosen = method.to(machine.device).tune(data)
    finished = method.finish(data)
    if finished:
        keep_weights(checkpoint, method.state_dict())
        chosen = {**chosen, **finished}
    if chosen:
        log.info("chosen: %s", in_words(chosen))
    # of one loader, the outputs of all batches
    with _interruptible():
        parts: list[Prediction] = alone.predict(method, datamodule=data)  # type: ignore[assignment]
    data.trainer = trainer
    return Prediction.concatenate(parts), chosen


def in_words(chosen: Mapping[str, Any]) -> str:
    """What a method chose on validation spots, for the log: ``k=50``, with the highest score it was chosen by."""
    tried = [value for key, value in chosen.items() if key.endswith("validation_pearson") and value]
    scores = [max(map(float, value.values())) for value in tried]
    best = [f"by a validation score of {max(scores):.4f}"] if scores else []
    return " ".join(
        [", ".join(f"{key}={value}" for key, value in chosen.items() if not isinstance(value, dict)), *best]
    )


def size_of_training(trainer: Trainer) -> dict[str, Any]:
    """Epochs of a fit, and how many numbers all parameters of its method hold, and those that train.

    A correction trains too, if only after the fit, when it asks for a gradient.
    """
    method = trainer.lightning_module
    corrections = [module for module in method.modules() if isinstance(module, Correction)]
    corrected = {id(parameter) for module in corrections for parameter in module.parameters()}
    parameters = [(p.numel(), p.requires_grad or id(p) in corrected) for p in method.parameters()]
    return {
        "epochs": trainer.current_epoch,
        "parameters": {"total": sum(n for n, _ in parameters), "trained": sum(n for n, trains in parameters if trains)},
    }


def best_validation_score(checkpoint: Path) -> float:
    """The validation score that a best checkpoint was kept for."""
    states = load_checkpoint(checkpoint)["callbacks"].values()
    return float(next(state for state in states if state.get("monitor") == VALIDATION)["best_model_score"])
