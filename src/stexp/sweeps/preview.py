"""``dry_run=true``: the jobs of a sweep, and what the unfinished ones will cost by what finished runs took."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict  # that of typing carries no annotations before Python 3.12

from stexp.arguments import NotNegative
from stexp.evaluation.records import Hardware, read_json
from stexp.runs.folder import RunFolder
from stexp.sweeps.jobs import Job

HEADER = f"  {'jobs':>5} {'done':>5} {'h each':>8} {'h left':>8} {'GB left':>8}"
MOST_RECORDS = 50
"""Finished runs that are averaged."""


class Record(TypedDict):
    """What ``provenance.json`` says of the cost of a run."""

    seconds: NotNegative
    stages: dict[str, NotNegative]
    hardware: Hardware


@dataclass(frozen=True)
class Cost:
    """What a job takes.

    Parameters
    ----------
    hours
    gb
        On disk.
    hardware
        That it is known from.
    """

    hours: float
    gb: float
    hardware: str


def preview(everything: Sequence[Job], anew: bool = False) -> str:
    """The jobs, which of them are done, and the hours and the disk that the others will take.

    Parameters
    ----------
    anew
        Count what is done as still to do.
    """
    done = {job.output_dir for job in everything if job.done and not anew}
    lines = [f"{'done ' if job.output_dir in done else 'to do'}  {job.output_dir}" for job in everything]
    groups: dict[tuple[str, str, str, str], list[Job]] = {}
    for job in everything:
        groups.setdefault((job.data, job.protocol, job.method, job.command), []).append(job)
    width = max(len(" ".join(key[:3])) for key in groups)
    lines += ["", " " * width + HEADER]
    hours, gb, n_unknown, hardware = 0.0, 0.0, 0, set()
    for key, members in groups.items():
        n_left = sum(job.output_dir not in done for job in members)
        cost = recorded_cost(members[0]) if members[0].command == "train" else None
        row = f"{' '.join(key[:3]):{width}}  {len(members):5d} {len(members) - n_left:5d}"
        if cost is None:
            n_unknown += n_left
            lines.append(f"{row} {'unknown':>8}")
        else:
            hours += n_left * cost.hours
            gb += n_left * cost.gb
            hardware.add(cost.hardware)
            lines.append(f"{row} {cost.hours:8.2f} {n_left * cost.hours:8.1f} {n_left * cost.gb:8.2f}")
    total = f"{hours:.1f} h and {gb:.1f} GB by runs on {', '.join(sorted(hardware))}" if hardware else "no run to go by"
    rest = f"; unknown for {n_unknown}" if n_unknown else ""
    n_left = len(everything) - len(done)
    free = _free_gb(everything[0].output_dir)
    summary = f"{len(everything)} jobs, {len(done)} done, {n_left} to do: {total}{rest}; {free:.0f} GB free"
    return "\n".join([*lines, "", summary])


def recorded_cost(job: Job) -> Cost | None:
    """Mean cost of finished runs of a job's model on its data; None without any.

    Runs with the same settings count where there are some; else the time of fitting is scaled by the epochs.
    """
    method = job.output_dir.parent
    records = [
        path
        for path in method.parent.parent.glob(f"{job.data}-*/*/*/provenance.json")
        if path.parts[-3].partition("-")[0] == job.model
    ]
    same = [path for path in records if path.parts[-4:-2] == (method.parent.name, method.name)]
    hours, sizes, hardware = [], [], ""
    for path in sorted(same or records)[:MOST_RECORDS]:
        record, epochs = read_json(path, Record), RunFolder(path.parent).config["trainer"]["max_epochs"]
        fit = record["stages"].get("fit", 0.0)
        hours.append((record["seconds"] - fit + fit * job.settings["trainer"]["max_epochs"] / epochs) / 3600)
        sizes.append(sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file()) / 1e9)
        machine = record["hardware"]
        hardware = ", ".join(sorted(set(machine.get("gpu") or []))) or f"CPU {machine.get('cpu', '')}".strip()
    return Cost(sum(hours) / len(hours), sum(sizes) / len(sizes), hardware) if hours else None


def _free_gb(folder: Path) -> float:
    """Free space of the disk that a folder is on, or will be."""
    return shutil.disk_usage(next(path for path in folder.resolve().parents if path.exists())).free / 1e9
