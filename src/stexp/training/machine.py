"""Devices, precision and threads of a fit, as asked for and as they are here."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from stexp import hardware
from stexp.errors import InputError, did_you_mean

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")


@dataclass(frozen=True)
class Machine:
    """What a fit runs on.

    Parameters
    ----------
    trainer
        Arguments of Lightning's Trainer, as ``conf/trainer`` has them.
    precision
        As Lightning names it; ``auto``: bf16 where the hardware multiplies it.
    channels_last
        Memory format of image batches.
    threads
        CPU threads of a process; None: as many as cores are free at the start, or ``OMP_NUM_THREADS``, divided among
        the processes of this machine.

    Notes
    -----
    Several devices, and several machines, are Lightning's: it starts the processes itself, or joins those that
    torchrun or Slurm started. Each builds the same objects and takes its part of every batch; only the first writes.
    """

    trainer: Mapping[str, Any]
    precision: str = "auto"
    channels_last: bool = True
    threads: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the only one of its run, or that of rank 0."""
        return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it, undeclared

    @cached_property
    def kind(self) -> str:
        """``cpu``, ``cuda`` or ``mps``."""
        return hardware.accelerator_of(self.trainer["accelerator"])

    @cached_property
    def devices(self) -> list[int]:
        """Numbers of the devices of this machine that train; on the CPU each is a process.

        Raises
        ------
        InputError
            Devices that are not there, or a strategy that is not data-parallel.
        """
        strategy, devices = self.trainer.get("strategy", "auto"), self.trainer["devices"]
        if strategy not in STRATEGIES:
            raise InputError(
                f"trainer.strategy={strategy}: choose {', '.join(STRATEGIES)}{did_you_mean(str(strategy), STRATEGIES)}"
            )
        n_nodes = self.trainer.get("num_nodes", 1)
        if not isinstance(n_nodes, int) or isinstance(n_nodes, bool) or n_nodes < 1:
            raise InputError(f"trainer.num_nodes={n_nodes}: a whole number of at least 1 would fit")
        try:
            if self.kind == "cuda":
                numbers = CUDAAccelerator.parse_devices(-1 if devices == "auto" else devices)
            else:
                numbers = list(range(1 if devices == "auto" else int(str(devices))))
        except Exception as error:  # Lightning's own, of several kinds
            raise InputError(f"trainer.devices={devices}: {' '.join(str(error).split())[:200]}") from error
        if not numbers:
            raise InputError(f"trainer.devices={devices}: a number of devices of at least 1 would fit")
        if self.kind == "mps" and len(numbers) > 1:
            raise InputError(f"trainer.devices={devices}: a Mac has one; 1 would fit")
        if self.trainer.get("sync_batchnorm") and len(numbers) * n_nodes > 1 and self.kind != "cuda":
            raise InputError("trainer.sync_batchnorm=true needs GPUs; take false on the CPU")
        return list(numbers)

    @property
    def world_size(self) -> int:
        """Processes that train together, on all machines."""
        return len(self.devices) * self.trainer.get("num_nodes", 1)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        if self.kind != "cuda":
            return torch.device(self.kind)
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        return torch.device("cuda", self.devices[local_rank if len(self.devices) > 1 else 0])

    @property
    def chosen_precision(self) -> str:
        return hardware.choose_precision(self.precision, self.kind)

    def autocast(self) -> AbstractContextManager:
        """The precision as a context, for what is computed outside of the trainer."""
        return torch.autocast(self.kind, torch.bfloat16, enabled=self.chosen_precision == "bf16-mixed")

    @property
    def chooses_threads(self) -> bool:
        """Whether the number of CPU threads is left to what is free."""
        return not self.threads and "OMP_NUM_THREADS" not in os.environ

    @property
    def leaves_a_core(self) -> bool:
        """Whether a core is left to other work while this machine trains: on a CPU none, since threads of one process
        that are more than the cores slow each other down."""
        return self.kind != "cpu" and hardware.usable_cores() > len(self.devices)

    def set_threads(self) -> str:
        """Take the CPU threads that this process may have; returns how many, and why they are few.

        Threads that share a core wait for each other, see :class:`~stexp.training.threads.LowerThreads`.
        """
        processes = len(self.devices) if self.kind == "cpu" else 1
        most = all_threads()
        busy = hardware.busy_cores() if self.chooses_threads and most > 1 else 0.0
        threads = self.threads or max(1, free_threads(most, os.cpu_count() or most, busy) // processes)
        hardware.set_threads(threads)
        counted = f"{threads} CPU thread{'s' * (threads != 1)}"
        if self.threads or threads == max(1, most // processes):
            return counted
        return f"{counted} of {most}: others keep {busy:.1f} cores busy (hardware.threads={most} takes all)"


@cache
def all_threads() -> int:
    """What torch takes by itself; asked before anything changes it."""
    return torch.get_num_threads()


def free_threads(most: int, cores: int, busy: float) -> int:
    """Threads, of `most`, for which there are cores when others keep some busy; a half of one is taken, too."""
    return min(most, max(1, math.floor(cores - busy + 0.5)))


def take_free_threads() -> None:
    """Take the CPU threads for which there are cores, in a command that trains nothing."""
    Machine({"accelerator": "cpu", "devices": 1}).set_threads()
