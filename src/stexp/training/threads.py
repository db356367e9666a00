"""Fewer CPU threads where steps stall: on a machine whose cores others came to keep busy."""

from __future__ import annotations

import logging
import time

import pytorch_lightning as pl
import torch

from stexp import hardware

log = logging.getLogger(__name__)


class LowerThreads(pl.Callback):
    """Take fewer CPU threads when no core is free and those of this process get a share of theirs only.

    Threads that share a core wait for each other at every operation: two beside two busy processes train at a third of
    the speed of one. Threads that wait for tiles get little time, too, but then cores are free. The number never rises
    again: sums depend on it in the last digits, so that it should change as seldom as it can.

    Parameters
    ----------
    seconds
        Of training from one look to the next.
    least_share
        Of the time of its cores that this process must get.
    """

    def __init__(self, seconds: float = 10.0, least_share: float = 0.7) -> None:
        self.seconds, self.least_share = seconds, least_share

    def on_train_epoch_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self._look()

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        threads = torch.get_num_threads()
        if threads == 1 or time.perf_counter() - self._since.wall < self.seconds:
            return
        cores, free = self._since.own_cores(), hardware.free_cores(self._since.ticks)
        self._look()
        if free is None or free > 0.5 or cores >= self.least_share * threads:
            return
        fewer = max(1, min(threads - 1, round(cores)))
        hardware.set_threads(fewer)
        log.info(
            "CPU threads: %d from here on; no core is free, and %d got the time of %.1f (hardware.threads=%d: all)",
            *(fewer, threads, cores, threads),
        )

    def _look(self) -> None:
        self._since = hardware.Moment.now()
