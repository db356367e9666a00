"""One bar over all epochs of a fit, on a terminal."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class EpochBar:
    """Epoch, time gone and left, and a text; while it shows, lines of the log come above it.

    Parameters
    ----------
    epochs
        Of the whole fit.
    begun
        Epochs that are done already, of a fit that goes on.
    """

    def __init__(self, epochs: int, begun: int) -> None:
        self._epochs = epochs
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[said]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=300)
        self._task = self._progress.add_task(self._counted(begun), total=epochs, completed=begun, said="")
        stderr = sys.stderr
        self._progress.start()
        # a handler keeps the stream that it was made with, past which the bar does not see
        root = logging.getLogger().handlers
        self._handlers = [each for each in root if isinstance(each, logging.StreamHandler) and each.stream is stderr]
        for handler in self._handlers:
            handler.setStream(sys.stderr)
        self._stderr = stderr

    def show(self, done: float, said: str) -> None:
        """Move to so many epochs, parts of one included, and say something beside the bar."""
        self._progress.update(self._task, completed=done, description=self._counted(done), said=said)

    def stop(self) -> None:
        """Take the bar away."""
        for handler in self._handlers:
            handler.setStream(self._stderr)
        self._progress.stop()

    def _counted(self, done: float) -> str:
        return f"epoch {min(int(done) + 1, self._epochs)}/{self._epochs}"
