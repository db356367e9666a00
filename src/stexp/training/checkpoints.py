"""Checkpoints that are whole or not there, and hold tensors and plain values only."""

from __future__ import annotations

import os
import pickle  # for the name of the error that torch.load raises
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from stexp.data.slides.tiles import TileSpec
from stexp.errors import InputError


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the place and renames: Lightning copies across file systems, where a full disk leaves half.

    Parameters
    ----------
    method
        What a checkpoint says of the method, beside its weights; plain values.
    """

    def __init__(self, method: dict[str, Any]) -> None:
        super().__init__()
        self.method = method

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("wb") as file:
                torch.save({**checkpoint, "method": self.method}, file)
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


def check_checkpoint(state: dict, panel: list[str], tile: TileSpec, array_size: int) -> None:
    """Raise InputError unless data with this panel, tile and array fits a checkpoint's `state_dict`."""
    missing = [gene for gene in state["panel"] if gene not in set(panel)]
    if missing:
        raise InputError(
            f"the checkpoint predicts {len(state['panel'])} genes, {len(missing)} of them are not in the panel of this "
            f"data: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    if state["panel"] != panel:
        raise InputError(
            f"the checkpoint predicts {len(state['panel'])} genes, the panel of this data has {len(panel)}, "
            f"or another order"
        )
    if (state["tile_px"], state["tile_um"]) != (tile.px, tile.um):
        raise InputError(
            f"the checkpoint was trained on tiles of {state['tile_px']} px ({state['tile_um']} um), "
            f"not {tile.px} px ({tile.um} um)"
        )
    if array_size > state["array_size"]:
        raise InputError(
            f"the checkpoint knows array coordinates below {state['array_size']}, this data goes up to {array_size - 1}"
        )
