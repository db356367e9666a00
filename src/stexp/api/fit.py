"""``stexp.fit``: train a method on one fold, predict what it holds out and score it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng

from stexp import construct
from stexp.api.data import SpotDataModule
from stexp.api.features import machine_of
from stexp.api.model import Model, Run
from stexp.api.settings import check_numbers, plain
from stexp.api.statement import statement
from stexp.api.train import train_run
from stexp.api.typed import typed
from stexp.api.work_folder import WorkFolder
from stexp.config import HARMLESS
from stexp.config.plugins import FROM_DATA
from stexp.data.section import check_name
from stexp.errors import InputError
from stexp.models.adapter import as_method
from stexp.models.method import Method

PLAIN = (bool, int, float, str, type(None))


@typed
def fit(
    method: str | pl.LightningModule,
    data: SpotDataModule,
    *,
    max_epochs: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    begin_at: str | Path | None = None,
    seed: int | None = None,
    accelerator: str | None = None,
    devices: int | Sequence[int] | None = None,
    precision: str | None = None,
    threads: int | None = None,
    trainer_args: Mapping[str, Any] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    logger: str = "csv",
    name: str | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    plugins: Sequence[str] = (),
    verbose: bool = True,
) -> Model:
    """Train a method, predict the held-out spots, and score them beside floors and ceiling.

    It is what ``stexp-train`` does, with the same numbers. Predictions are by the best weights by validation, or the
    last where the protocol keeps nothing for validation.

    Parameters
    ----------
    method
        A choice of ``conf/model``, such as ``"stnet"``; or a LightningModule of one's own, which is trained in place:
        its ``training_step`` takes a :class:`~stexp.data.batches.SpotBatch` and returns a loss, its ``predict_step``
        returns expression (B, G) on the scale of ``batch.target``. To be saved, its class lies in a file, and its
        arguments are recorded by ``self.save_hyperparameters()``.
    data
        One fold. Left as it is: each fit serves it anew, under its own seed.
    max_epochs
        None: 90.
    model_args
        Arguments of a method by name that differ, such as ``{"lr": 1e-4}``.
    begin_at
        A model whose weights the training goes on from: an exported folder, a run, or ``owner/name`` on the hub. Its
        method and sizes must be these; genes that it lacks are initialised. Data that it was trained on are not held
        out.
    seed
        Of weights, order and augmentation; None: that of `data`.
    accelerator, devices
        ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"mps"``; of several GPUs the number of the one to take, in a list.
        Several at once are for ``stexp-train trainer=ddp``.
    precision
        As Lightning names it; None: bf16 where the hardware multiplies it, else 32 bits.
    threads
        CPU threads; None: as many as cores are idle.
    trainer_args
        Further arguments of Lightning's Trainer, such as ``{"gradient_clip_val": 1.0}``.
    callbacks
        Of Lightning, besides ours.
    logger
        A choice of ``conf/logger``: ``"csv"``, ``"tensorboard"`` or ``"wandb"``.
    name
        In scores and tables; None: that of the choice, or of the class.
    output_dir
        Where the run folder stays, as the command leaves it; the same call goes on with an interrupted run there.
        None: it goes with the model and its score.
    overwrite
        Start anew where `output_dir` holds a run.
    plugins
        Modules or packages of one's own that bring methods as choices.
    verbose
        Say on stderr how far it is, unless logging is set up already: then its handlers are told.

    Returns
    -------
    Model
        With its score under :attr:`~stexp.api.model.Model.score`.

    Raises
    ------
    InputError
        A name or value that does not fit, in one line that says what would.

    Examples
    --------
    >>> data = stexp.SpotDataModule(stexp.datasets.demo(), fold="B")
    >>> model = stexp.fit("stnet", data, max_epochs=20, model_args={"lr": 1e-3})
    >>> model.score.table
    """
    command = statement(fit, locals())
    if "image_encoder" in (model_args or {}):
        raise InputError("model_args: the image encoder is chosen by stexp.SpotDataModule(image_encoder=...)")
    work = WorkFolder(output_dir)
    changes: dict[str, Any] = {
        "output_dir": os.fspath(work.path),
        "from": begin_at,
        "seed": data.seed if seed is None else seed,
        "trainer.max_epochs": max_epochs,
        "trainer.accelerator": accelerator,
        "trainer.devices": devices,
        "hardware.precision": precision,
        "hardware.threads": threads,
    }
    if name is not None:
        check_name(name, "name")
    changes = {key: value for key, value in changes.items() if value is not None}
    changes |= {f"trainer.{key}": value for key, value in (trainer_args or {}).items()}
    if isinstance(method, str):
        changes |= {f"model.{key}": value for key, value in (model_args or {}).items()}
        changes |= {} if name is None else {"model.name": name}
        config = data.run_config({"model": method, "logger": logger}, changes, plugins)
        own = None
    else:
        own = _own_method(method, model_args)
        config = data.run_config({"model": "mean", "logger": logger}, changes, plugins)
        module = type(own).__module__
        config["model"] = _described(own, name)
        if not module.startswith("stexp."):
            construct.allow(module)  # who hands over an object of a class trusts its module
            config["plugins"] = list(dict.fromkeys([*config.get("plugins", []), module]))
    check_numbers(config)
    if machine_of(config).world_size > 1:
        raise InputError(f"devices={devices}: one device would fit; stexp-train trainer=ddp trains on several")
    with _undisturbed(), _lines() if verbose else nullcontext():
        run = train_run(
            config, data.every_section, command=command, overwrite=overwrite, method=own, callbacks=callbacks
        )
    assert run is not None  # of one device there is no process of another rank
    return Model(run=Run(work, data, config))


def _own_method(method: pl.LightningModule, model_args: Mapping[str, Any] | None) -> Method:
    if model_args:
        raise InputError("model_args are of methods by name; one's own has its arguments already")
    return as_method(method)


def _described(method: Method, name: str | None) -> dict[str, Any]:
    """A method of one's own as a config names it: its class and, as far as it recorded them, its arguments."""
    kind, hyperparameters = type(method), {str(key): plain(value) for key, value in method.hparams.items()}
    arguments = {key: value for key, value in hyperparameters.items() if key not in FROM_DATA and _is_plain(value)}
    return {**arguments, "_target_": f"{kind.__module__}.{kind.__qualname__}", "name": name or kind.__name__}


def _is_plain(value: object) -> bool:
    """Whether a config can hold a value; what it cannot is asked for where the method is built again."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, PLAIN)


@contextmanager
def _lines() -> Iterator[None]:
    """Print what is logged at work, where nobody has set up logging."""
    logger, handler = logging.getLogger("stexp"), logging.StreamHandler()
    if logging.getLogger().handlers or logger.handlers:
        yield
        return
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave random numbers, CPU threads and filters of warnings as they were."""
    threads = torch.get_num_threads()
    try:
        with isolate_rng(), warnings.catch_warnings():
            for message in HARMLESS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        torch.set_num_threads(threads)
