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
from stexp.config import write_atomically
from stexp.data.section import Section
from stexp.data.slides.tiles import file_digest
from stexp.evaluation.predictions import read_json

log = logging.getLogger(__name__)

PACKAGES = ("stexp", "torch", "timm", "pytorch-lightning", "anndata", "scanpy", "numpy", "scikit-learn")


class Stages:
    """Seconds spent in each stage of a run, added up over interruptions in ``stages.json``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "stages.json"
        self.seconds: dict[str, float] = read_json(self.path) if self.path.exists() else {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 2)
            write_atomically(self.path, json.dumps(self.seconds))


def provenance(cfg, data, stages: Stages, precision: str, device: str) -> dict:
    """The record that stands beside a run's numbers, as plain values."""
    return {
        "command": command_line(),
        **git_state(),
        "date": now(),
        "seconds": round(sum(stages.seconds.values()), 1),
        "stages": stages.seconds,
        **hardware.peak_memory(),
        **size(data.trainer),
        "hardware": {"device": device, **hardware.describe()},
        "precision": precision,
        "versions": versions(),
        "data_manifest": manifest(data.sections),
    }


def size(trainer) -> dict:
    """Epochs trained, and numbers in all parameters and in those that train, of what a Lightning trainer holds."""
    parameters = [(p.numel(), p.requires_grad) for p in trainer.lightning_module.parameters()]
    return {
        "epochs": trainer.current_epoch,
        "parameters": {"total": sum(n for n, _ in parameters), "trained": sum(n for n, trains in parameters if trains)},
    }


def command_line() -> str:
    """The command that runs, as it would be typed."""
    return " ".join(["stexp-" + Path(sys.argv[0]).stem.removeprefix("stexp-"), *sys.argv[1:]])


def now() -> str:
    """Date and time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest(sections: list[Section]) -> dict[str, dict[str, str]]:
    """Content hash of every file that the sections were read from, by section and file name."""
    return {section.name: {path.name: file_digest(path) for path in section.files} for section in sections}


def git_state() -> dict:
    """Commit of the checkout that stexp runs from, and whether files differ from it; null outside a checkout."""
    here = Path(__file__).parent
    try:

        def git(*arguments: str) -> str:
            return subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()

        if git("ls-files", "--error-unmatch", Path(__file__).name) == "":
            return {"commit": None, "dirty": None}
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def versions() -> dict[str, str]:
    """Installed versions of the packages that make a number."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
