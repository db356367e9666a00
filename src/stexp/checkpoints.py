"""Checkpoints that are whole or not there, and hold tensors and plain values only."""

from __future__ import annotations

import os
import pickle  # for the name of the error that torch.load raises
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from stexp import InputError


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the place and renames: Lightning copies across file systems, where a full disk leaves half."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
            os.replace(part, path)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # of a full disk, which torch's own hides
                raise error.__context__ from None
            raise
        finally:
            part.unlink(missing_ok=True)


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
