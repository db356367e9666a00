"""Arrays that are filled batch by batch, and survive a kill."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError

from stexp.files import replacing
from stexp.inference.tensors import write_arrays

log = logging.getLogger(__name__)

SAVE_EVERY = 10.0  # seconds of work that a kill may cost


class Parts:
    """Arrays of N rows that are filled batch by batch and, in a folder, survive a kill.

    Attributes
    ----------
    done : int
        Rows that are filled, in the order of the batches.
    arrays : dict of (N, ...) float32
    """

    def __init__(self, n: int, folder: Path | None) -> None:
        self.n, self.folder, self.done = n, folder, 0
        self.arrays: dict[str, np.ndarray] = {}
        self._unsaved: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        self._saved_at = time.monotonic()
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.safetensors")):
            if (
                not path.stem.isdigit() or int(path.stem) != self.done
            ):  # one before it is gone, or was longer when it was done again
                continue
            try:
                part = safetensors.numpy.load_file(path)
                rows = part.pop("rows")
            except (SafetensorError, KeyError, OSError) as error:
                log.warning("%s is damaged (%s); its tiles are encoded again", path, type(error).__name__)
                continue
            self._fill(rows, part)
        if self.done:
            log.info("%d of %d tiles are there already", self.done, n)

    def add(self, rows: np.ndarray, made: dict[str, torch.Tensor]) -> None:
        values = {key: value.cpu().numpy() for key, value in made.items()}
        if self.folder is not None:
            self._unsaved.append((rows, values))
        self._fill(rows, values)
        if time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        if self.folder is None or not self._unsaved:
            return
        rows = np.concatenate([rows for rows, _ in self._unsaved])
        together = {key: np.concatenate([values[key] for _, values in self._unsaved]) for key in self._unsaved[0][1]}
        path = self.folder / f"{self.done - len(rows):012d}.safetensors"
        with replacing(path) as part:
            write_arrays(part, {"rows": rows, **together})
        self._unsaved, self._saved_at = [], time.monotonic()

    def _fill(self, rows: np.ndarray, values: dict[str, np.ndarray]) -> None:
        for key, value in values.items():
            if key not in self.arrays:
                self.arrays[key] = np.empty((self.n, *value.shape[1:]), dtype=np.float32)
            self.arrays[key][rows] = value
        self.done += len(rows)
