"""The order in which jobs run: as many at once as there are slots, trainings before what is retrieved from them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from stexp.reporting.grids import duration
from stexp.sweeps.failure import Failure, cause_of
from stexp.sweeps.jobs import Job

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long an interrupted job may take to end by itself."""
INTERVAL_S = 0.1
"""Between two looks at the jobs that run."""


class Child(Protocol):
    """A job that runs."""

    def poll(self) -> int | None:
        """Exit status, None while it runs."""

    def interrupt(self) -> None:
        """Ask it to end."""

    def end(self, within_s: float) -> None:
        """Return once it has ended, by force after so many seconds."""


@dataclass(frozen=True)
class Slot:
    """A place for one job: what it is called, and the environment it means."""

    name: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


Start = Callable[[Job, Slot], Child]
"""Starts a job in a slot."""


@dataclass(frozen=True)
class _Running:
    child: Child
    job: Job
    slot: Slot
    since: float


def run(everything: Sequence[Job], start: Start, slots: Sequence[Slot], anew: bool = False) -> dict[Path, Failure]:
    """Run jobs, as many at a time as there are slots, each in a slot of its own; the next takes whichever frees first.

    Parameters
    ----------
    anew
        Run what is done, too.

    Returns
    -------
    dict
        Folder of every job that failed -> why. Those that need one are not started, and are in it, too.
    """
    schedule = _Schedule(everything, start, slots, anew)
    log.info("%d jobs, %d of them done; %d at a time", len(everything), len(schedule.done), len(slots))
    try:
        while schedule.waiting or schedule.running:
            schedule.start_what_can()
            if not schedule.take_in_what_ended():
                time.sleep(INTERVAL_S)
    finally:
        schedule.interrupt()
    log.info("%d of %d jobs are done", len(schedule.done), len(everything))
    for folder, cause in schedule.failed.items():
        log.error("%s failed: %s", folder, cause)
    return schedule.failed


class _Schedule:
    """Which jobs wait, run, are done and failed."""

    def __init__(self, everything: Sequence[Job], start: Start, slots: Sequence[Slot], anew: bool) -> None:
        self.start, self.n_slots, self.n_jobs = start, len(slots), len(everything)
        self.free = list(slots)
        self.done = set() if anew else {job.output_dir for job in everything if job.done}
        self.waiting = [job for job in everything if job.output_dir not in self.done]
        self.running: list[_Running] = []
        self.failed: dict[Path, Failure] = {}
        self.seconds: list[float] = []

    def start_what_can(self) -> None:
        """Start jobs in free slots, in order; leave those whose training failed."""
        for job in list(self.waiting):
            training = job.needs.output_dir if job.needs else None
            if training in self.failed:
                self.failed[job.output_dir] = replace(
                    self.failed[training], message=f"not started: it needs {training}"
                )
                self.waiting.remove(job)
            elif self.free and (training is None or training in self.done):
                slot = self.free.pop(0)
                self.waiting.remove(job)
                log.info("starts %s%s", job.label, f", {slot.name}" if slot.name else "")
                self.running.append(_Running(self.start(job, slot), job, slot, time.monotonic()))

    def take_in_what_ended(self) -> bool:
        """Note how jobs ended, and free their slots; whether any did."""
        ended = [(each, status) for each in self.running if (status := each.child.poll()) is not None]
        for each, status in ended:
            self.running.remove(each)
            self.free.append(each.slot)
            self.seconds.append(time.monotonic() - each.since)
            folder = each.job.output_dir
            if status == 0 and each.job.done:
                self.done.add(folder)
            else:
                cause = cause_of(each.job.logs, status)
                self.failed[folder] = replace(cause, message=f"{cause.message} ({each.job.logs / 'job.log'})")
            self._report(each.job)
        return bool(ended)

    def _report(self, job: Job) -> None:
        n_left = len(self.waiting) + len(self.running)
        left = n_left * sum(self.seconds) / len(self.seconds) / self.n_slots
        log.info(
            "[%d/%d] %s %s after %s%s",
            len(self.done) + len(self.failed),
            self.n_jobs,
            "done  " if job.output_dir in self.done else "FAILED",
            job.label,
            duration(self.seconds[-1]),
            f"; about {duration(left)} left" if n_left else "",
        )

    def interrupt(self) -> None:
        """End what still runs."""
        for each in self.running:
            each.child.interrupt()
        until = time.monotonic() + PATIENCE_S
        for each in self.running:
            each.child.end(max(0.0, until - time.monotonic()))
