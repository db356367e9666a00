"""``stexp-prepare data=her2st``: read a data set, check it, cut its tiles, say what is there."""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
from omegaconf import DictConfig

from stexp.config import CONF, build, command, load_sections


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="prepare")
def main(cfg: DictConfig) -> None:
    with command():
        sections = load_sections(cfg, build(cfg.protocol))
        table = pd.DataFrame([describe(section, cfg) for section in sections])
        print(table.to_string(index=False))
        with_image = int((table["image"] != "-").sum())
        print(
            f"{cfg.data.name}: {len(table)} sections of {table['patient'].nunique()} patients, "
            f"{table['spots'].sum()} spots; {with_image} with an image, tiles in {Path(cfg.data.cache_dir) / 'tiles'}"
        )


def describe(section, cfg: DictConfig) -> dict:
    """One row of the summary: what a person would check. Cuts the section's tiles."""
    from stexp.data.tiles import TileSpec, open_tiles

    totals, padded = section.total_counts, "-"
    if section.slide is not None:
        store = open_tiles(section, TileSpec(cfg.data.tile_px, cfg.data.tile_um), cfg.data.cache_dir)
        padded = json.loads(Path(store.filename).with_suffix(".json").read_text())["padded"]
    return {
        "section": section.name,
        "patient": section.patient,
        "spots": len(section),
        "genes": len(section.genes),
        "median_umi": int(np.median(totals)),
        "min_umi": int(totals.min()),
        "no_counts": int((totals == 0).sum()),
        "um_per_px": "-" if section.um_per_px is None else round(section.um_per_px, 3),
        "image": "-" if section.slide is None else "{} x {}".format(*section.slide.size),
        "padded_tiles": padded,
    }


if __name__ == "__main__":
    main()
