"""Small runs on demo data whose panel leaves genes over, made once, for tests of what is exported and predicted."""

from __future__ import annotations

import atexit
import functools
import tempfile
from pathlib import Path

import demo_run
import pytest

from stexp.inference.export import export
from stexp.inference.trained import TrainedMethod

ENCODE = TrainedMethod.encode
PANEL = 60
SHORT = ("hardware.precision=32-true", "hardware.threads=1", f"protocol.panel_size={PANEL}", "trainer.max_epochs=2")


@functools.cache
def root() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def finished_run(*overrides: str, fold: str = "A") -> Path:
    """A run folder; the same one for the same arguments."""
    return _run(overrides, fold)


@functools.cache
def _run(overrides: tuple[str, ...], fold: str) -> Path:
    out = root() / f"run{len(list(root().glob('run*')))}"
    demo_run.run(root(), out, *SHORT, *overrides, fold=fold)
    return out


@functools.cache
def exported(*overrides: str) -> Path:
    """The run of the same arguments, exported."""
    run = finished_run(*overrides)
    export(run, run.with_suffix(".stexp"))
    return run.with_suffix(".stexp")


def slide(name: str = "A1") -> Path:
    return root() / "data" / "images" / f"{name}.jpg"


def killed_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> list[int]:
    """Let the next prediction end within its tiles; the list holds how many tiles each encoded batch had."""
    seen = []

    def encode(self, tiles, *places):
        if len(seen) == batches:
            raise KeyboardInterrupt
        seen.append(len(tiles))
        return ENCODE(self, tiles, *places)

    monkeypatch.setattr(TrainedMethod, "encode", encode)
    return seen
