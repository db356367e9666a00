"""A small run on demo data, for tests of what comes of runs."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from stexp import config, files
from stexp.cli.fold import train
from stexp.data.splits import folds


def overrides_of(root: Path, out: Path) -> list[str]:
    """Arguments of a small run on demo data under `root`."""
    return [
        "data=demo",
        f"data.root={root / 'data'}",
        f"data.cache_dir={root / 'cache'}",
        "data.reader.patients=3",
        "data.reader.sections_per_patient=1",
        f"output_dir={out}",
        "trainer.max_epochs=2",
        "trainer.accelerator=cpu",
        "hardware.keep_memory=false",
    ]


def configure(root: Path, out: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(files.CONF), version_base="1.3"):
        return compose("train", [*overrides_of(root, out), *overrides])


def run(root: Path, out: Path, *overrides: str, fold: str | None = None) -> dict:
    cfg = configure(root, out, *overrides)
    protocol = config.build(cfg.protocol)
    sections = config.dataset_of(cfg).read_sections(protocol)
    return train(cfg, sections, fold or folds(sections, protocol)[0], out)
