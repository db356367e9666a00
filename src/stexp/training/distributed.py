"""One run on several devices of a machine: a process each, which together take the steps of one process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.plugins.layer_sync import LayerSync
from timm.layers import convert_sync_batchnorm

from stexp.data.batches import part_of
from stexp.errors import InputError

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")


def gather(x: torch.Tensor, n: int) -> torch.Tensor:
    """The rows of the whole batch, in its order, of which each device has its part; of one device, `x` itself.

    Parameters
    ----------
    x : (B, ...)
        Rows of the part that :func:`~stexp.data.batches.part_of` gives this device.
    n
        Rows of the whole batch.

    Returns
    -------
    Tensor, shape (n, ...)

    Notes
    -----
    A loss of what this returns is the same on every device, and, as the gradient of each row is summed over devices
    and the gradient of each parameter is their mean, so is every gradient: that of one process with the whole batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    part = part_of(n, dist.get_rank(), dist.get_world_size())
    if len(x) != part.stop - part.start:
        raise ValueError(f"{len(x)} rows, where the part of this device has {part.stop - part.start} of {n}")
    whole = x.new_zeros(n, *x.shape[1:])
    whole[part] = x
    return _Sum.apply(whole)  # a sum with zeros: exact, and parts may differ in size


class _Sum(torch.autograd.Function):
    """Sum over devices; so is its gradient, since the loss of each device reads all rows."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class Ranks(LightningEnvironment):
    """Which of how many processes this one is; Lightning neither starts the others nor looks for a scheduler.

    Parameters
    ----------
    port
        Where the processes meet; None: a free one.
    """

    creates_processes_externally = True
    main_address = "127.0.0.1"

    def __init__(self, rank: int, world: int, port: int | None = None) -> None:
        super().__init__()
        self.rank, self.world = rank, world
        self._main_port = find_free_network_port() if port is None else port
        self.set_global_rank(rank)

    def local_rank(self) -> int:
        return self.rank

    def node_rank(self) -> int:
        return 0


class SyncBatchNorm(LayerSync):
    """Batch statistics over all devices. timm's layers hold their activation, which torch's conversion would drop."""

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        return convert_sync_batchnorm(model)

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        return model  # alone, and in evaluation, they are what they were


def devices_of(trainer: dict, kind: str) -> list[int]:
    """The devices that a trainer's config asks for, by number.

    Parameters
    ----------
    trainer
        The config ``trainer``.
    kind
        ``"cpu"``, where each is a process, or ``"cuda"``.

    Raises
    ------
    InputError
        Devices that are not there, several machines, or a strategy that is not data-parallel.
    """
    strategy, asked = trainer.get("strategy", "auto"), trainer["devices"]
    if strategy not in STRATEGIES:
        raise InputError(f"trainer.strategy={strategy}: choose {', '.join(STRATEGIES)}")
    if trainer.get("num_nodes", 1) != 1:
        raise InputError(f"trainer.num_nodes={trainer['num_nodes']}: a run has the devices of one machine")
    try:
        if kind == "cpu":
            found = list(range(1 if asked == "auto" else int(str(asked))))
        else:
            found = CUDAAccelerator.parse_devices(-1 if asked == "auto" else asked)
    except Exception as error:  # Lightning's own, of several kinds
        raise InputError(f"trainer.devices={asked}: {' '.join(str(error).split())[:200]}") from error
    if not found:
        raise InputError(f"trainer.devices={asked}: a number of devices of at least 1 would fit")
    if trainer.get("sync_batchnorm") and len(found) > 1 and kind == "cpu":
        raise InputError("trainer.sync_batchnorm=true needs GPUs; take false on the CPU")
    return found


def check(model: torch.nn.Module, data, world: int) -> None:
    """Refuse what several devices cannot train together."""
    if world == 1:
        return
    if not getattr(model, "several_devices", False):
        raise InputError(f"{type(model).__name__} trains on one device; take trainer.devices=1")
    for what, n, least in (
        ("data.batch_size", data.batch_size, 2 * world),
        ("training spots", len(data.rows("train")), 2 * world),
        ("validation spots", len(data.rows("validation")) or world, world),
    ):
        if n < least:
            raise InputError(f"{what}: {n}, too few for {world} devices; at least {least} would fit")


@contextmanager
def others(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Have the processes of the other ranks take part in the fit of the run in `folder`, inside this context.

    They read the run's config and the cache, and write nothing. Where one of them fails, this process ends, which
    would wait for it: the run goes on from its last checkpoint.
    """
    if ranks.world == 1:
        yield
        return
    command = [sys.executable, "-m", "stexp.training.distributed", str(folder)]
    started = [
        # a pipe that ends with this process, whatever ends it
        subprocess.Popen([*command, str(rank), str(ranks.world), str(ranks.main_port)], stdin=subprocess.PIPE)
        for rank in range(1, ranks.world)
    ]
    over = threading.Event()

    def watch(process: subprocess.Popen, rank: int) -> None:
        # what makes one process fail may soon be said by this one
        if process.wait() and not over.wait(10):
            print(f"stexp: error: the process of device {rank} ended with status {process.returncode}", file=sys.stderr)
            for other in started:
                other.kill()
            os._exit(1)

    for rank, process in enumerate(started, start=1):
        threading.Thread(target=watch, args=(process, rank), daemon=True).start()
    try:
        yield
        for process in started:
            process.wait()
    except RuntimeError as error:  # of the connection, where a process is gone
        ended = [rank for rank, process in enumerate(started, start=1) if _ended(process)]
        if not ended:
            raise
        raise InputError(
            f"the process of device {ended[0]} ended with status {started[ended[0] - 1].returncode}; the same command "
            f"goes on from the last checkpoint"
        ) from error
    finally:
        over.set()
        for process in started:
            process.kill()
        if dist.is_initialized():
            dist.destroy_process_group()


def _ended(process: subprocess.Popen) -> bool:
    """Whether a process failed; the connection may break before its end is seen."""
    try:
        return process.wait(2) != 0
    except subprocess.TimeoutExpired:
        return False


def main(folder: str, rank: str, world: str, port: str) -> None:
    """Take part in the fit of a run as one rank; started by :func:`others`."""
    from stexp.config import command, load_run
    from stexp.training.fit import take_part

    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    with command():
        logging.getLogger().setLevel(logging.ERROR)  # the first process says what there is to say
        take_part(load_run(folder), Path(folder), Ranks(int(rank), int(world), int(port)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
