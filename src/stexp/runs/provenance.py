"""Where a number comes from: command, commit, data, hardware, time."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stexp import hardware
from stexp.arguments import NotNegative
from stexp.data.digests import file_digest
from stexp.data.progress import track
from stexp.data.section import Section
from stexp.evaluation.records import read_audit, read_json, read_provenance
from stexp.files import write_atomically

log = logging.getLogger(__name__)

PACKAGES = ("stexp", "torch", "timm", "pytorch-lightning", "anndata", "scanpy", "numpy", "scikit-learn")


class Stages:
    """Seconds spent in each stage of a run, added up over interruptions in ``stages.json`` where there is a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "stages.json"
        self.seconds: dict[str, float] = {}
        if self.path is not None and self.path.exists():
            self.seconds = read_json(self.path, dict[str, NotNegative])

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 2)
            if self.path is not None:
                write_atomically(self.path, json.dumps(self.seconds))


def provenance(
    sections: list[Section], training: dict, stages: Stages, precision: str, device: str, command: str | None = None
) -> dict:
    """The record that stands beside a run's numbers, as plain values.

    Parameters
    ----------
    sections
        What the run read.
    training
        Epochs and parameters; see :func:`~stexp.training.fit.size_of_training`.
    command
        What was called, where that is no command; None: see `command_line`.
    """
    return {
        "command": command or command_line(),
        **git_state(),
        "date": now(),
        "seconds": round(sum(stages.seconds.values()), 1),
        "stages": stages.seconds,
        **hardware.peak_memory(),
        **training,
        "hardware": {"device": device, **hardware.describe()},
        "precision": precision,
        "versions": versions(),
        "data_manifest": manifest(sections),
    }


def command_line() -> str:
    """The command that runs, as it would be typed."""
    return " ".join(["stexp-" + Path(sys.argv[0]).stem.removeprefix("stexp-"), *sys.argv[1:]])


def now() -> str:
    """Date and time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def changed_sections(run: Path, sections: list[Section]) -> list[str]:
    """Sections whose files or patient are not what a finished run read, and those with an image that it lacks."""
    before = read_provenance(run)["data_manifest"]
    patient_of = read_audit(run)["facts"]["patient_of"]
    today = manifest([section for section in sections if section.name in before])
    changed = {name for name in before if today.get(name) != before[name]}
    # sections without an image may have been left out, by the split or for genes they do not measure
    changed |= {section.name for section in sections if section.name not in before and section.slide is not None}
    changed |= {
        section.name for section in sections if section.patient != patient_of.get(section.name, section.patient)
    }
    return sorted(changed)


def manifest(sections: list[Section]) -> dict[str, dict[str, str]]:
    """Content hash of every file that the sections were read from, by section and file name."""
    hashing = track(sections, len(sections), "hashing files of sections")
    return {section.name: {path.name: file_digest(path) for path in section.files} for section in hashing}


def git_state() -> dict:
    """Commit of the checkout that stexp runs from, and whether files differ from it; null outside a checkout."""
    package = Path(__file__).parent
    try:

        def git(*arguments: str) -> str:
            return subprocess.run(
                ["git", *arguments], cwd=package, capture_output=True, text=True, check=True
            ).stdout.strip()

        if git("ls-files", "--error-unmatch", Path(__file__).name) == "":
            return {"commit": None, "dirty": None}
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def versions() -> dict[str, str]:
    """Installed versions of the packages that make a number."""
    installed = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed
