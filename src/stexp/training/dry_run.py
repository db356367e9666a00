"""A method tried out on a few spots: what of it does not fit, point by point, before any time is spent on training."""

from __future__ import annotations

import inspect
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from stexp import construct
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError, listed
from stexp.models.adapter import STEPS
from stexp.models.encoders.frozen import UNTUNED
from stexp.models.method import Method, Prediction
from stexp.training.fit import build_method
from stexp.training.machine import Machine
from stexp.training.observed import HideTruth, Watch, misfits

SPOTS = 4  # of a batch
EPOCHS = 60  # of one step each: a method may train its parts one after the other
NEEDED = ("hooks", "build", "loss", "prediction")
"""Points without which the later ones say nothing."""
APART = 1e-4  # of the spread of the predictions: more than the order of sums explains


@dataclass(frozen=True)
class Point:
    """One thing that was tried.

    Attributes
    ----------
    name
        What was tried.
    fits
        Whether it does; None: it does not apply, or says something about the method.
    text
        What was seen, and how to mend it where it does not fit.
    """

    name: str
    fits: bool | None
    text: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "NO", None: "--"}[self.fits]
        return f"{mark}  {self.name}: {self.text}"


def dry_run(node: Mapping[str, Any], data: SpotDataModule, folder: Path, seed: int = 0) -> list[Point]:
    """Build a method, train a step, predict and reload it.

    Parameters
    ----------
    node
        Of the method, as a run's config has it under ``model``.
    data
        Small; its batches are set to `SPOTS` spots.
    folder
        What the trainer writes goes here.

    Returns
    -------
    list of Point
        In the order in which they were tried. Where a step fails that the later ones need, it is the last.
    """
    data.batch_size = data.eval_batch_size = SPOTS
    trial = _Trial(node, data, folder, seed)
    with _quiet():
        for step in (trial.build, trial.train, trial.predict):
            if not trial.attempt(step):
                return trial.points
        checks = (trial.predict_again, trial.predict_one_by_one, trial.hide_truth, trial.reload, trial.freeze)
        for step in (trial.validate, *checks):
            trial.attempt(step)
    return trial.points


@dataclass
class _Trial:
    """A method on its way through the points."""

    node: Mapping[str, Any]
    data: SpotDataModule
    folder: Path
    seed: int
    points: list[Point] = field(default_factory=list)
    machine: Machine = field(init=False)
    method: Method = field(init=False)
    whole: Prediction = field(init=False)

    def __post_init__(self) -> None:
        self.machine = Machine({"accelerator": "cpu", "devices": 1}, "32-true", channels_last=False, threads=1)

    def attempt(self, step: Any) -> bool:
        """Take a step; False where it ended in an error, which is a point of its own."""
        try:
            step()
        except Exception as error:  # whatever the author's code raises is what this command is asked for
            self.say(step.__name__.replace("_", " "), False, _where(error))
            return False
        return not any(point.fits is False and point.name in NEEDED for point in self.points)

    def say(self, name: str, fits: bool | None, text: str) -> None:
        self.points.append(Point(name, fits, text))

    def build(self) -> None:
        """The class has its hooks, and is built from its config and the sizes of the data."""
        target = str(self.node.get("_target_"))
        kind = construct.named_callable(target)
        if not (inspect.isclass(kind) and issubclass(kind, pl.LightningModule)):
            self.say("build", False, f"{target} is no method; let it inherit from stexp.models.method.Method")
            return
        own = [name for name in STEPS if getattr(kind, name) is not getattr(pl.LightningModule, name)]
        absent = sorted({*STEPS} - {*own} | set(getattr(kind, "__abstractmethods__", ())))
        if absent:
            self.say("hooks", False, f"{kind.__name__} does not define {', '.join(absent)}; see CONTRIBUTING, A method")
            return
        self.say("hooks", True, ", ".join(STEPS))
        self.method = build_method(self.node, self.data, self.machine, self.seed)
        n = sum(parameter.numel() for parameter in self.method.parameters())
        self.say("build", True, f"{target}, {n:,} parameters")

    def train(self) -> None:
        """A step is taken: its loss is a finite number, and its gradients reach every parameter that trains."""
        watch = Watch()
        trainer = self._trainer(watch, epochs=EPOCHS)
        try:
            trainer.fit(self.method, datamodule=self.data)
        except RuntimeError:
            if not any(loss.numel() != 1 for loss in watch.losses):
                raise
            # of the shape of the loss, which says more
        else:
            self.method.tune(self.data)
            self.method.finish(self.data)
        if self.method.closed_form:
            self.say("loss", None, "closed form: one calculation, no loss and no gradients")
        else:
            self._check_step(watch, trainer)

    def _check_step(self, watch: Watch, trainer: pl.Trainer) -> None:
        if not watch.losses:
            self.say("loss", False, "training_step returned none; return it, or inherit from ClosedForm")
        elif any(loss.numel() != 1 for loss in watch.losses):
            self.say("loss", False, f"it has the shape {tuple(watch.losses[0].shape)}; return one number, its mean say")
        elif not all(bool(torch.isfinite(loss).all()) for loss in watch.losses):
            self.say("loss", False, "it is not finite; look for the log of 0, a division by 0 or a square root at 0")
        else:
            self.say("loss", True, f"{float(watch.losses[0]):.4g}")
            self._check_gradients(watch, trainer)

    def _check_gradients(self, watch: Watch, trainer: pl.Trainer) -> None:
        trained = {name: p for name, p in self.method.named_parameters() if p.requires_grad}
        optimised = {id(p) for each in trainer.optimizers for group in each.param_groups for p in group["params"]}
        outside = [name for name, parameter in trained.items() if id(parameter) not in optimised]
        unreached = [name for name in trained if name not in watch.reached and name not in outside]
        if outside:
            self.say("gradients", False, f"no optimizer has {listed(outside)}; give it all, or requires_grad_(False)")
        if unreached:
            self.say(
                "gradients",
                False,
                f"none reaches {listed(unreached)}: the loss does not depend on them; is there a detach()?",
            )
        if not outside and not unreached:
            self.say("gradients", True, f"reach all of {len(trained)} tensors that train")

    def validate(self) -> None:
        """A batch of validation spots is predicted, by which checkpoints are chosen."""
        watch = Watch()
        self._trainer(watch, epochs=1, validation=1).validate(self.method, datamodule=self.data, verbose=False)
        if watch.validated is None:
            self.say("validation", None, "no spots to validate on")
        elif not isinstance(watch.validated, Prediction):
            kind = type(watch.validated).__name__
            self.say(
                "validation", False, f"validation_step returns {kind}; return what predict_step does, or leave it out"
            )
        else:
            self.say("validation", True, "validation_step predicts, so that checkpoints can be chosen")

    def predict(self) -> None:
        """Every spot gets a finite value of every gene."""
        watch = Watch()
        parts = self._predict(self.method, SPOTS, watch)
        wrong = [part for part in parts if not isinstance(part, Prediction)]
        if wrong:
            kind = type(wrong[0]).__name__
            self.say(
                "prediction", False, f"predict_step returns {kind}; return Prediction(expression), or (spots, genes)"
            )
            return
        for part, n in zip(parts, watch.spots, strict=True):
            wrong_shapes = misfits(part, n, len(self.data.panel))
            if wrong_shapes:
                self.say("prediction", False, "; ".join(wrong_shapes))
                return
        self.whole = Prediction.concatenate(parts)
        fits = bool(torch.isfinite(self.whole.predicted).all())
        shape = f"{len(self.whole.predicted)} spots x {len(self.data.panel)} genes"
        self.say("prediction", fits, shape if fits else "some of it is not finite")
        self.say(
            "evaluation mode",
            not watch.training,
            f"{listed(watch.training)} is in training mode while it predicts (dropout, batch statistics); do not call "
            f"train() in predict_step or eval()"
            if watch.training
            else "everything is in evaluation mode while it predicts",
        )

    def predict_again(self) -> None:
        """Nothing is drawn at random while predicting."""
        again = self._tensor(self._predict(self.method, SPOTS, seed=self.seed + 1))
        self._compare("repeats", again, "the same twice", "differ when predicted twice: dropout or noise is on")

    def predict_one_by_one(self) -> None:
        """What a spot gets does not depend on the spots that share its batch."""
        if self.method.batching == "section":
            self.say("batches", None, "a batch is a whole section, whose spots may look at each other")
            return
        alone = self._tensor(self._predict(self.method, 1))
        self._compare(
            "batches",
            alone,
            f"the same one by one as {SPOTS} at a time",
            f"differ between a spot alone and in a batch of {SPOTS}: something is averaged over the batch",
        )

    def hide_truth(self) -> None:
        """The measured expression of the spots that are predicted is not read."""
        hidden = self._tensor(self._predict(self.method, SPOTS, HideTruth()))
        self._compare(
            "truth",
            hidden,
            "predictions read no measured expression of the spots they are for",
            "change with the measured expression of the spots they are for: predict_step reads target, expression, "
            "counts or the context of the batch",
        )

    def reload(self) -> None:
        """The weights, loaded into a method of another seed, predict the same."""
        other = build_method(self.node, self.data, self.machine, self.seed + 1)
        other.load_state_dict(self.method.state_dict())
        again = self._tensor(self._predict(other, SPOTS))
        self._compare(
            "reload",
            again,
            "its state_dict holds all that it predicts with",
            "differ after its state_dict is loaded into a new one: register_buffer what it learns or draws besides "
            "its parameters",
        )

    def freeze(self) -> None:
        """It runs with an image encoder that does not train; what it reads of a tile is said."""
        if "image_encoder" not in self.node:
            what = "frozen features of tiles" if "n_features" in self._arguments() else "what it takes of a batch"
            self.say("image encoder", None, f"has none; it reads {what}")
            return
        node = {**self.node, "image_encoder": {**self.node["image_encoder"], **UNTUNED}}
        method = build_method(node, self.data, self.machine, self.seed)
        self._trainer(Watch(), epochs=1).fit(method, datamodule=self.data)
        made = self._tensor(self._predict(method, SPOTS))
        if made.shape != self.whole.predicted.shape:
            self.say("image encoder", False, f"predicts {tuple(made.shape)} with image_encoder.frozen=true")
            return
        reads = self.data.encoder is not None and method.reads_features_of(self.data.encoder)
        how = "its features alone are read, so that they are computed once" if reads else "it still runs on every tile"
        self.say("image encoder", True, f"runs with image_encoder.frozen=true; {how}")

    def _arguments(self) -> set[str]:
        return set(inspect.signature(construct.named_callable(str(self.node["_target_"]))).parameters)

    def _trainer(self, callback: pl.Callback, epochs: int, batches: int = 1, validation: int = 0) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu",
            max_epochs=1 if getattr(self, "method", None) is not None and self.method.closed_form else epochs,
            limit_train_batches=1,
            limit_val_batches=validation,
            limit_predict_batches=batches,
            num_sanity_val_steps=0,
            callbacks=[callback],
            default_root_dir=self.folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def _predict(
        self, method: Method, batch_size: int, callback: pl.Callback | None = None, seed: int = 0
    ) -> list[Any]:
        """What ``predict_step`` returns of the first `SPOTS` held-out spots, or of the first held-out section."""
        self.data.eval_batch_size = batch_size
        trainer = self._trainer(callback or Watch(), epochs=1, batches=SPOTS // batch_size)
        torch.manual_seed(seed)
        self.data.trainer = method.trainer = trainer
        trainer.strategy.connect(method)
        method.tune(self.data)
        return list(trainer.predict(method, datamodule=self.data) or [])

    def _tensor(self, parts: Sequence[Prediction]) -> torch.Tensor:
        return Prediction.concatenate(parts).predicted

    def _compare(self, name: str, made: torch.Tensor, same: str, differs: str) -> None:
        """A point on whether predictions are those that were made first."""
        first = self.whole.predicted
        scale = max(float(first.std()), float(first.abs().mean()), 1e-6)
        apart = float((made - first).abs().max()) if bool(torch.isfinite(made).all()) else np.inf
        fits = apart <= APART * scale
        self.say(name, fits, same if fits else f"predictions {differs} (by up to {apart:.2g})")


def _where(error: Exception) -> str:
    """An error in one line, with the last line of the author's code that it came through."""
    text = " ".join(str(error).split())[:300]
    said = text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    libraries = tuple(str(Path(sysconfig.get_path(key))) for key in ("stdlib", "purelib", "platlib"))
    package = str(Path(construct.__file__).parent)
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, package, "<"))]
    # of a method of stexp, its own file
    own = own or [frame for frame in frames if Path(frame.filename).parent.name == "models"]
    if not own or isinstance(error, InputError):
        return said
    return f"{said} ({own[-1].filename}:{own[-1].lineno}, {own[-1].name}: {own[-1].line})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning and the data module say on the way."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "stexp")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
