"""A plain LightningModule as a method."""

from __future__ import annotations

import inspect
from typing import Any

import pytorch_lightning as pl
import torch

from stexp.data.batches import SpotBatch
from stexp.errors import InputError
from stexp.models.method import Method, Prediction

STEPS = ("training_step", "predict_step", "configure_optimizers")
"""What a LightningModule has to define to be trained and scored."""


def as_method(module: pl.LightningModule) -> Method:
    """The module itself, as a :class:`~stexp.models.method.Method`.

    Parameters
    ----------
    module
        With a ``training_step`` that takes a :class:`~stexp.data.batches.SpotBatch` and returns a loss, a
        ``predict_step`` that returns expression (B, G) on the scale of ``batch.target``, or a
        :class:`~stexp.models.method.Prediction`, and ``configure_optimizers``. Class attributes of a method
        (``batching``, ``predicts_slides``) count where it has them.

    Raises
    ------
    InputError
        It lacks one of these.
    """
    if isinstance(module, Method):
        return module
    module.__class__ = method_class(type(module))  # its weights, hooks and state stay what they are
    assert isinstance(module, Method)
    return module


def method_class(kind: type[pl.LightningModule]) -> type[Method]:
    """The class itself, or one that inherits from it and from Method."""
    if issubclass(kind, Method):
        return kind
    absent = [name for name in STEPS if getattr(kind, name) is getattr(pl.LightningModule, name)]
    if absent:
        raise InputError(
            f"{kind.__name__} has no {' and no '.join(absent)}; a LightningModule with {', '.join(STEPS)} would fit, "
            f"or a stexp.models.method.Method"
        )
    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "predict_step": _predict_step(kind),
        "validation_step": _validation_step(kind),
    }
    return type(kind.__name__, (kind, Method), namespace)


def _predict_step(kind: type[pl.LightningModule]) -> Any:
    takes_index = _takes_index(kind.predict_step)

    def predict_step(self: Any, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        made = kind.predict_step(self, *((batch, batch_idx) if takes_index else (batch,)))
        if isinstance(made, torch.Tensor):
            return Prediction(made)
        if isinstance(made, Prediction):
            return made
        raise InputError(
            f"{kind.__name__}.predict_step returns {type(made).__name__}; a tensor (spots, genes), or a "
            f"stexp.models.method.Prediction, would fit"
        )

    return predict_step


def _validation_step(kind: type[pl.LightningModule]) -> Any:
    """What the module logs of a batch of validation spots, and its prediction, by which checkpoints are chosen."""
    has_own = kind.validation_step is not pl.LightningModule.validation_step
    takes_index = _takes_index(kind.validation_step)

    def validation_step(self: Any, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        if has_own:
            kind.validation_step(self, *((batch, batch_idx) if takes_index else (batch,)))
        return self.predict_step(batch, batch_idx)

    return validation_step


def _takes_index(step: Any) -> bool:
    parameters = list(inspect.signature(step).parameters.values())[1:]  # without self
    return len(parameters) > 1 or any(each.kind is each.VAR_POSITIONAL for each in parameters)
