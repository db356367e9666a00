"""``stexp-check model=mine plugins=[mypackage]``: what of a method does not fit, on a few spots in seconds."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import DictConfig

from stexp.config import build, command, to_plain
from stexp.config.compose import entry
from stexp.data.dataset import DataSet
from stexp.data.demo import write_demo
from stexp.data.readers.samplesheet import read_samplesheet
from stexp.data.splits import folds
from stexp.errors import InputError

if TYPE_CHECKING:
    from stexp.data.datamodule import SpotDataModule  # imports torch

SPOTS = 64  # of a section; published methods average over 50 neighbours


@entry("check")
def main(cfg: DictConfig) -> None:
    with command():
        if cfg.data.name != "demo":
            raise InputError(f"data={cfg.data.name}: a method is tried on generated sections; leave data= out")
        with tempfile.TemporaryDirectory(prefix="stexp-check-") as folder:
            status = check(to_plain(cfg), Path(folder))
    sys.exit(status)


def check(config: dict, folder: Path) -> int:
    """Print a line a point; 1 where one does not fit."""
    from stexp.training.dry_run import dry_run  # imports torch and Lightning, which --help and refusals do without

    points = dry_run(config["model"], little_data(config, folder), folder, config["seed"])
    for point in points:
        print(point)
    wrong = sum(point.fits is False for point in points)
    verdict = f"{wrong} of {len(points)} points do not fit" if wrong else "everything fits"
    print(f"{config['model']['name']}: {verdict}")
    return int(wrong > 0)


def little_data(config: dict, folder: Path) -> SpotDataModule:
    """Four generated sections of a few spots, made in `folder`, of which the protocol's first fold is held out."""
    import pytorch_lightning as pl
    import torch

    from stexp.models.encoders.frozen import UNTUNED, FrozenEncoder

    sheet = write_demo(folder / "demo", patients=4, sections_per_patient=1, image_px=800)
    sections = [section.take(np.arange(min(SPOTS, len(section)))) for section in read_samplesheet(sheet)]
    pl.seed_everything(config["seed"], verbose=False)  # random weights are those that the method's encoder will have
    encoder = build({**config["image_encoder"], **UNTUNED})
    frozen = FrozenEncoder(encoder, torch.device("cpu"), None, folder)
    dataset = DataSet({**config["data"], "cache_dir": str(folder), "augmentation": "none"})
    protocol = build(config["protocol"])
    return dataset.serve(sections, protocol, folds(sections, protocol)[0], config["seed"], encoder=frozen)


if __name__ == "__main__":
    main()
