"""Checkpoints that are whole or not there, and hold tensors and plain values only."""

from __future__ import annotations

import pickle  # for the name of the error that torch.load raises
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from stexp.errors import InputError
from stexp.files import replacing

FOR_GOING_ON = ("optimizer_states", "lr_schedulers", "loops")
"""What a checkpoint holds to train on from; two thirds of it, with Adam's two moments of every weight."""


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; Lightning would leave half of it on a full disk.

    Parameters
    ----------
    method
        Name of the method and of its image encoder, kept in the checkpoint; plain values.
    best
        The file that is predicted with and not trained on from: it goes without `FOR_GOING_ON`.
    """

    def __init__(self, method: dict[str, Any], best: Path) -> None:
        super().__init__()
        self.method, self.best = method, best

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        left_out = FOR_GOING_ON if path.resolve() == self.best.resolve() else ()
        kept = {key: value for key, value in checkpoint.items() if key not in left_out}
        _save({**kept, "method": self.method}, path)


def keep_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint anew with other weights of the same method."""
    _save({**load_checkpoint(path), "state_dict": {key: value.cpu() for key, value in weights.items()}}, path)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    with replacing(path) as part, part.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # of a full disk, which torch's own hides
                raise error.__context__ from None
            raise


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of a run; InputError where it is damaged or of another kind."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}); delete the run, or give overwrite=true"
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "SpotDataModule"} <= set(checkpoint):
        raise InputError(f"{path} is no checkpoint of stexp-train; delete it, or give overwrite=true")
    return checkpoint
