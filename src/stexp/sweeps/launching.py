"""``stexp-train -m``: the jobs of a sweep, each a process of its own, on GPUs, on the CPU or on Slurm."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from stexp.config import load_run, write_atomically
from stexp.config.compose import compose, parse
from stexp.errors import InputError
from stexp.evaluation.predictions import read_json
from stexp.reporting.grids import duration
from stexp.sweeps.jobs import Job, choose, jobs, read_plan, with_needs

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long an interrupted job may take to end by itself."""


class Child(Protocol):
    """A job that runs."""

    def poll(self) -> int | None:
        """Exit status, None while it runs."""

    def interrupt(self) -> None:
        """Ask it to end."""

    def end(self, within_s: float) -> None:
        """Return once it has ended, by force after so many seconds."""


def sweep(arguments: Sequence[str]) -> int:
    """Run what ``stexp-train -m`` names, and return its exit status: 1 where a job failed.

    Raises
    ------
    InputError
        Nothing to run, or no device to run it on.
    """
    own, of_hydra, rest = {}, [], []
    for override, text in zip(parse(arguments), arguments, strict=True):
        if override.key_or_group in ("sweep", "dry_run"):
            own[override.key_or_group] = override.value()
        else:
            (of_hydra if override.key_or_group.startswith("hydra") else rest).append(text)
    name, dry = own.get("sweep"), own.get("dry_run", False)
    if name == "" or not (isinstance(name, str | None) and isinstance(dry, bool)):
        raise InputError("give one sweep=NAME, and dry_run=true or false")
    cells = jobs(name, rest)
    everything = with_needs(cells)
    launcher = compose("train", of_hydra, with_hydra=True).hydra.launcher
    anew = bool(everything[0].settings["overwrite"])
    if dry:
        print(preview(everything, anew))
        return 0
    start, slots = _starter(launcher, everything, name)
    with _ended_like_ctrl_c():
        failed = run(everything, start, slots, anew)
    plan = read_plan(name) if name else {}
    if "choose_by" in plan and not failed:
        table = choose(cells, plan["choose_by"])
        above = {job.output_dir.parents[2] for job in cells}.pop()
        write_atomically(above / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
        print(table.to_string(index=False, float_format="{:.4g}".format))
        print(f"wrote {above / f'{name}.csv'}")
    return int(bool(failed))


def run(
    everything: Sequence[Job], start: Callable[[Job, Slot], Child], slots: Sequence[Slot], anew: bool = False
) -> dict[Path, str]:
    """Run jobs, as many at a time as there are slots, each in a slot of its own; the next takes whichever frees first.

    Parameters
    ----------
    start
        Starts a job in a slot.
    anew
        Run what is done, too.

    Returns
    -------
    dict
        Folder of every job that failed -> why. Those that need one are not started, and are in it, too.
    """
    done = set() if anew else {job.output_dir for job in everything if job.done}
    waiting = [job for job in everything if job.output_dir not in done]
    free, running, failed, took = list(slots), [], {}, []
    log.info("%d jobs, %d of them done; %d at a time", len(everything), len(done), len(slots))
    try:
        while waiting or running:
            for job in list(waiting):
                before = job.needs.output_dir if job.needs else None
                if before in failed:
                    failed[job.output_dir] = f"not started: it needs {before}"
                    waiting.remove(job)
                elif free and (before is None or before in done):
                    slot = free.pop(0)
                    waiting.remove(job)
                    log.info("starts %s%s", job.label, f", {slot.name}" if slot.name else "")
                    running.append((start(job, slot), job, slot, time.monotonic()))
            ended = [each for each in running if each[0].poll() is not None]
            for each in ended:
                child, job, slot, since = each
                running.remove(each)
                free.append(slot)
                took.append(time.monotonic() - since)
                if child.poll() == 0 and job.done:
                    done.add(job.output_dir)
                else:
                    failed[job.output_dir] = _why(job, child.poll())
                left = (len(waiting) + len(running)) * sum(took) / len(took) / len(slots)
                log.info(
                    "[%d/%d] %s %s after %s%s",
                    len(done) + len(failed),
                    len(everything),
                    "done  " if job.output_dir in done else "FAILED",
                    job.label,
                    duration(took[-1]),
                    f"; about {duration(left)} left" if waiting or running else "",
                )
            if not ended:
                time.sleep(0.1)
    finally:
        for child, *_ in running:
            child.interrupt()
        until = time.monotonic() + PATIENCE_S
        for child, *_ in running:
            child.end(max(0.0, until - time.monotonic()))
    log.info("%d of %d jobs are done", len(done), len(everything))
    for folder, why in failed.items():
        log.error("%s failed: %s", folder, why)
    return failed


def _why(job: Job, status: int) -> str:
    path = log_of(job)
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("$ ")]
    said = [line for line in lines if line.startswith("stexp: error: ")] or lines
    why = said[-1].removeprefix("stexp: error: ")[:300] if said else f"exit status {status}"
    return f"{why} ({path})"


def log_of(job: Job) -> Path:
    """Where the output of a job goes."""
    return job.output_dir / "logs" / "job.log"


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


# where jobs run


@dataclass(frozen=True)
class Slot:
    """A place for one job: what it is called, and the environment it means."""

    name: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def _starter(launcher: DictConfig, everything: Sequence[Job], name: str | None) -> tuple[Callable, list[Slot]]:
    of_sweep = {"STEXP_SWEEP": name} if name else {}
    if launcher.get("name") == "slurm":
        return _on_slurm(launcher, of_sweep), [Slot()] * launcher.at_once
    if launcher.get("name") != "gpus":
        raise InputError("hydra/launcher: choose gpus or slurm; others need hydra/sweeper=basic, which keeps no order")
    trainers = [job.settings["trainer"] for job in everything]
    if any(trainer["devices"] not in (1, "auto") for trainer in trainers):
        raise InputError("a job of a sweep has one device; trainer.devices and trainer=ddp are for a single run")
    on_cpu = all(trainer["accelerator"] == "cpu" for trainer in trainers)
    slots = gpu_slots([] if on_cpu else visible_gpus(), launcher.gpus, launcher.jobs_per_gpu)
    threads = {}
    if len(slots) > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // len(slots)))
    return lambda job, slot: Local(job, {**of_sweep, **threads, **slot.environment}), slots


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` or nvidia-smi names them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        names = [name.strip() for name in told.split(",") if name.strip()]
        return names[: names.index("-1")] if "-1" in names else names
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.split(":")[0].split()[1] for line in listed.splitlines() if line.startswith("GPU ")]


def gpu_slots(there: Sequence[str], wanted: Sequence[Any] | None, jobs_per_gpu: int) -> list[Slot]:
    """A slot for every job that may run at once: one on the CPU where no GPU is there and none is asked for.

    Raises
    ------
    InputError
        A GPU that is not there, or a number of jobs that is none.
    """
    if not (isinstance(jobs_per_gpu, int) and jobs_per_gpu >= 1):
        raise InputError(f"hydra.launcher.jobs_per_gpu={jobs_per_gpu}: a whole number of at least 1 would fit")
    chosen = list(there) if wanted is None else list(dict.fromkeys(map(str, wanted)))
    absent = [gpu for gpu in chosen if gpu not in there]
    if absent or (wanted is not None and not chosen):
        known = ", ".join(there) or "none"
        raise InputError(f"hydra.launcher.gpus: {', '.join(absent) or 'none'} asked for, and there are {known}")
    # a GPU's second job comes after every GPU's first
    names = [gpu for _ in range(jobs_per_gpu) for gpu in chosen]
    return [Slot(f"on GPU {gpu}", {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in names] or [Slot()]


class Local:
    """A job as a process of this machine."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        with _opened(log_of(job), job.typed) as file:
            self.process = subprocess.Popen(
                job.arguments,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is for the sweep, which ends its jobs
            )

    def poll(self) -> int | None:
        return self.process.poll()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self, within_s: float) -> None:
        try:
            self.process.wait(within_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def child(command: str, arguments: list[str]) -> None:
    """A command as a job of a sweep: it ends with the sweep, even where that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the sweep was started with & or nohup
    sys.argv = [f"stexp-{command}", *arguments]
    import_module(f"stexp.cli.{command}").main()


@contextmanager
def _opened(path: Path, typed: str) -> Iterator[Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(f"$ {typed}\n")
        file.flush()
        yield file


def run_logged(arguments: list[str], typed: str, path: Path, environment: Mapping[str, str]) -> None:
    """Run a command to its end, its output in a file; what a node of Slurm calls."""
    with _opened(path, typed) as file:
        env = {**os.environ, **environment}
        subprocess.run(arguments, stdout=file, stderr=subprocess.STDOUT, env=env, check=True)


class Submitted:
    """A job of submitit."""

    def __init__(self, submitted: Any) -> None:
        self.submitted = submitted

    def poll(self) -> int | None:
        if not self.submitted.done():
            return None
        return 0 if self.submitted.exception() is None else 1

    def interrupt(self) -> None:
        self.submitted.cancel(check=False)

    def end(self, within_s: float) -> None:
        """Slurm ends it."""


def _on_slurm(launcher: DictConfig, environment: Mapping[str, str]) -> Callable[[Job, Slot], Child]:
    try:
        import submitit
    except ImportError:
        raise InputError("hydra/launcher=slurm needs submitit: pip install 'stexp[slurm]'") from None
    given = {key: launcher[key] for key in ("gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min")}
    for key in ("partition", "account"):
        if launcher[key] is not None:
            given[f"slurm_{key}"] = launcher[key]
    if launcher.additional:
        given["slurm_additional_parameters"] = dict(launcher.additional)

    def start(job: Job, slot: Slot) -> Child:
        executor = submitit.AutoExecutor(folder=job.output_dir / "logs" / "submitit", cluster=launcher.cluster)
        executor.update_parameters(name=f"stexp-{job.data}-{job.fold}", **given)
        return Submitted(executor.submit(run_logged, job.arguments, job.typed, log_of(job), environment))

    return start


# what it would take


def preview(everything: Sequence[Job], anew: bool = False) -> str:
    """The jobs, which of them are done, and the hours and the disk that the others will take by what runs took."""
    done = [job.done and not anew for job in everything]
    lines = [
        f"{'done ' if is_done else 'to do'}  {job.output_dir}" for job, is_done in zip(everything, done, strict=True)
    ]
    groups: dict[tuple[str, str, str, str], list[tuple[Job, bool]]] = {}
    for job, is_done in zip(everything, done, strict=True):
        groups.setdefault((job.data, job.protocol, job.method, job.command), []).append((job, is_done))
    head = f"  {'jobs':>5} {'done':>5} {'h each':>8} {'h left':>8} {'GB left':>8}"
    width = max(len(" ".join(key[:3])) for key in groups)
    lines += ["", " " * width + head]
    hours, disk, unknown, devices = 0.0, 0.0, 0, set()
    for (data, protocol, method, command), members in groups.items():
        left = sum(not is_done for _, is_done in members)
        cost = _cost(members[0][0]) if command == "train" else None
        if cost is None:
            unknown += left
        else:
            hours, disk = hours + left * cost[0], disk + left * cost[1]
            devices.add(cost[2])
        row = f"  {len(members):5d} {len(members) - left:5d} {'unknown' if cost is None else f'{cost[0]:.2f}':>8}"
        row += f" {left * cost[0]:8.1f} {left * cost[1]:8.2f}" if cost else ""
        lines.append(f"{data} {protocol} {method}".ljust(width) + row)
    n_left = len(everything) - sum(done)
    above = next((path for path in everything[0].output_dir.resolve().parents if path.exists()), Path("/"))
    free = shutil.disk_usage(above).free / 1e9
    known = f"{hours:.1f} h and {disk:.1f} GB by runs on {', '.join(sorted(devices))}" if devices else "no run to go by"
    some = f"; unknown for {unknown}" if unknown else ""
    lines += ["", f"{len(everything)} jobs, {sum(done)} done, {n_left} to do: {known}{some}; {free:.0f} GB free"]
    return "\n".join(lines)


def _cost(job: Job) -> tuple[float, float, str] | None:
    """Hours and GB of a job, and the hardware, by finished runs of its model on its data; None without any.

    Runs with the same settings count where there are some; else the time of fitting is scaled by the epochs.
    """
    above = job.output_dir.parent.parent
    found = [path for path in above.parent.glob(f"{job.data}-*/*/*/provenance.json")]
    found = [path for path in found if path.parts[-3].partition("-")[0] == job.model]
    same = [path for path in found if path.parts[-3] == job.output_dir.parent.name and path.parts[-4] == above.name]
    hours, sizes, devices = [], [], []
    for path in sorted(same or found)[:50]:
        record, epochs = read_json(path, "seconds", "stages"), load_run(path.parent).trainer.max_epochs
        fit = record["stages"].get("fit", 0.0)
        seconds = record["seconds"] - fit + fit * job.settings["trainer"]["max_epochs"] / epochs
        hours.append(seconds / 3600)
        sizes.append(sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file()) / 1e9)
        hardware = record.get("hardware", {})
        devices.append(", ".join(sorted(set(hardware.get("gpu") or []))) or f"CPU {hardware.get('cpu', '')}".strip())
    return (sum(hours) / len(hours), sum(sizes) / len(sizes), devices[-1]) if hours else None


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2:])
