"""``stexp-train -m``: the jobs of a sweep, each a process of its own, on GPUs, on the CPU, on Slurm or on Ray."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from stexp.config import to_plain
from stexp.config.compose import compose, parse
from stexp.config.plugins import SOURCES
from stexp.errors import InputError
from stexp.files import write_csv
from stexp.sweeps.choice import choose
from stexp.sweeps.failure import MENDABLE
from stexp.sweeps.jobs import Job, jobs, with_needs
from stexp.sweeps.local import Local, gpu_slots, visible_gpus
from stexp.sweeps.plan import read_plan
from stexp.sweeps.preview import preview
from stexp.sweeps.ray import ray_starter
from stexp.sweeps.schedule import Slot, Start, run
from stexp.sweeps.slurm import slurm_starter

log = logging.getLogger(__name__)


def sweep(arguments: Sequence[str]) -> int:
    """Run what ``stexp-train -m`` names, and return its exit status.

    It is 1 where a job failed by a bug, 2 where the user can mend why jobs failed.

    Raises
    ------
    InputError
        Nothing to run, or no device to run it on.
    """
    own: dict[str, Any] = {}
    of_hydra: list[str] = []
    rest: list[str] = []
    sources = [text for text in arguments if text.partition("=")[0] in SOURCES]  # for launchers and jobs alike
    for override, text in zip(parse(arguments), arguments, strict=True):
        if override.key_or_group in ("sweep", "dry_run"):
            own[override.key_or_group] = override.value()
        else:
            of_job = text in sources or not override.key_or_group.startswith("hydra")
            (rest if of_job else of_hydra).append(text)
    name, dry = own.get("sweep"), own.get("dry_run", False)
    if name == "" or not (isinstance(name, str | None) and isinstance(dry, bool)):
        raise InputError("give one sweep=NAME, and dry_run=true or false")
    cells = jobs(name, rest)
    everything = with_needs(cells)
    launcher = to_plain(compose("train", [*of_hydra, *sources], with_hydra=True).hydra.launcher)
    anew = bool(everything[0].settings["overwrite"])
    if name is None and not anew:
        for job in everything:
            job.check()  # the folders of a sweep's runs are named by their settings
    if dry:
        print(preview(everything, anew))
        return 0
    start, slots = starter(launcher, everything, name)
    with _ended_like_ctrl_c():
        failed = run(everything, start, slots, anew)
    if name and not failed and (by := read_plan(name).get("choose_by")):
        _write_choice(name, cells, by)
    if not failed:
        return 0
    return MENDABLE if all(failure.is_mendable for failure in failed.values()) else 1


def starter(launcher: Mapping[str, Any], everything: Sequence[Job], name: str | None) -> tuple[Start, list[Slot]]:
    """What starts a job, and the slots that it may start in.

    Parameters
    ----------
    launcher
        ``conf/hydra/launcher``.
    name
        Of the sweep, which loggers group its runs by.
    """
    of_sweep = {"STEXP_SWEEP": name} if name else {}
    cluster = {"slurm": slurm_starter, "ray": ray_starter}.get(launcher.get("name", ""))
    if cluster is not None:
        at_once = launcher["at_once"]
        if not (isinstance(at_once, int) and at_once >= 1):
            raise InputError(f"hydra.launcher.at_once={at_once}: a whole number of at least 1 would fit")
        return cluster(launcher, of_sweep), [Slot()] * at_once
    if launcher.get("name") != "gpus":
        raise InputError(
            "hydra/launcher: gpus, slurm or ray would fit; others need hydra/sweeper=basic, which keeps no order"
        )
    trainers = [job.settings["trainer"] for job in everything]
    if any(trainer["devices"] not in (1, "auto") for trainer in trainers):
        raise InputError("a job of a sweep has one device; trainer.devices and trainer=ddp are for a single run")
    on_cpu = all(trainer["accelerator"] == "cpu" for trainer in trainers)
    slots = gpu_slots([] if on_cpu else visible_gpus(), launcher["gpus"], launcher["jobs_per_gpu"])
    threads = {}
    if len(slots) > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads["OMP_NUM_THREADS"] = str(max(1, _cores() // len(slots)))
    return lambda job, slot: Local(job, {**of_sweep, **threads, **slot.environment}), slots


def _cores() -> int:
    """CPU cores that this process may use, as far as the system says."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """A sweep that gets SIGTERM ends its jobs, too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_choice(name: str, cells: Sequence[Job], by: str) -> None:
    """Write the best cells of a search above its runs, and print them."""
    table = choose(cells, by)
    path = cells[0].output_dir.parents[2] / f"{name}.csv"
    write_csv(table, path)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    print(f"wrote {path}")
