"""Commands in processes of their own, for tests of what a process can meet: full disks, kills, no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"stexp.cli.{name}", *arguments]


def environment(home: Path) -> dict[str, str]:
    """This environment with one thread, no network of hubs, and a cache in `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("STEXP_", "WANDB_"))}
    path = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH", "")]))
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "STEXP_CACHE": str(home / "cache")}
    return {**kept, **own, "PYTHONPATH": path}


def demo(root: Path) -> list[str]:
    """Arguments of the smallest demo: three patients with one section each."""
    return ["data=demo", f"data.root={root}", "data.reader.patients=3", "data.reader.sections_per_patient=1"]


SHORT = [
    *("image_encoder=tiny", "trainer.max_epochs=2", "trainer.accelerator=cpu"),
    *("hardware.threads=1", "hardware.keep_memory=false", "hardware.precision=32-true"),
]
"""Arguments of a short training."""


def prediction(model: Path, slide: Path, out: Path | str) -> list[str]:
    return [f"run={model}", f"slide={slide}", "um_per_px=2", "device=cpu", f"output_dir={out}"]
