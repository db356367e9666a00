"""``stexp-prepare data=her2st``: bring a data set, check it, cut its tiles, say and show what is there."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from stexp.arguments import Odd, check
from stexp.config import build, command, dataset_of, to_plain
from stexp.config.compose import entry
from stexp.config.plugins import offer_features
from stexp.errors import InputError
from stexp.files import append_csv, table_file, write_csv

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

LEAST_OVERLAP = 0.005
"""Share of a tile's pixels, in half per cent, from which on their overlap is said."""

offer_features()


@entry("prepare")
def main(cfg: DictConfig) -> None:
    with command():
        check_features(cfg)
        bring(cfg.data)
        protocol = build(cfg.protocol)
        sections = dataset_of(cfg).read_sections(protocol)
        summary = prepare(cfg, sections, dataset_of(cfg).panel(protocol))
        print("\n".join(lines(summary, cfg)))
        if cfg.features is not None:
            print(prepare_features(cfg, sections))


def bring(data: DictConfig) -> None:
    """Bring what is missing of a data set, where it names a public source."""
    from stexp.data.download.fetch import fetch  # requests, pooch and the hub's client: not for local sections

    if data.get("source") is not None:
        data = to_plain(data)
        settings = {key: data[key] for key in ("mirror", "keep_archives") if key in data}
        fetch(data["source"], data["root"], data["sections"], data["download"], **settings)


def prepare(cfg: DictConfig, sections: list, panel: list[str] | None) -> pd.DataFrame:
    """Cut tiles, measure, draw; write ``qc.csv``, ``spots.csv.gz``, ``overlay/`` and ``overlay.png``.

    Returns
    -------
    DataFrame
        A row per section, as in ``qc.csv``.
    """
    # these bring torch and pandas, which --help does without
    import pandas as pd

    from stexp.data.parallel import on_all_cores
    from stexp.data.quality import inspect, stands_apart, summarise
    from stexp.data.slides.orientation import doubts
    from stexp.data.slides.spacing import shared_with_nearest
    from stexp.data.slides.store import file_of
    from stexp.data.slides.tiles import open_tiles, warn_of_scales
    from stexp.reporting import overlay

    folder, thresholds = Path(cfg.output_dir), build(cfg.data.quality)
    spec, kept = dataset_of(cfg).tile, (cfg.data.cache_dir, cfg.data.tile_store)
    with_image = [section for section in sections if section.slide is not None]
    warn_of_scales(with_image, spec)
    on_all_cores(with_image, len(with_image), "sections with tiles", lambda section: open_tiles(section, spec, *kept))
    (folder / "overlay").mkdir(parents=True, exist_ok=True)
    rows, pictures = [], []
    with table_file(folder / "spots.csv.gz") as spots:  # of a million spots no table lies in memory
        for number, section in enumerate(sections, start=1):
            log.info("section %s (%d of %d)", section.name, number, len(sections))
            tiles = None if section.slide is None else open_tiles(section, spec, *kept)
            table = inspect(section, tiles, spec, thresholds)
            row = summarise(section, table) | {"orientation": "; ".join(doubts(section))}
            if tiles is not None:
                facts = json.loads(file_of(tiles).with_suffix(".json").read_text())
                row |= {"tile_side_px": facts["side_px"], "padded_tiles": facts["padded"]}
                row |= {"tile_overlap": shared_with_nearest(section.xy_px, facts["side_px"])}
            if panel is not None:
                row |= {"panel_genes": len(section.genes.intersection(panel)), "panel_size": len(panel)}
            rows.append(row)
            if section.kept is not None:
                section.kept.let_go()
            append_csv(_spot_rows(section, table), spots, header=number == 1)
            pictures.append(folder / "overlay" / f"{section.name}.png")
            overlay.save(overlay.draw(section, table["flags"], row.get("tile_side_px")), pictures[-1])
    if len(pictures) > 1:
        overlay.sheet(pictures, folder / "overlay.png")
    summary = pd.DataFrame(rows)
    summary["stands_apart"] = stands_apart(summary, thresholds.stands_apart)
    write_csv(summary, folder / "qc.csv")
    return summary


def check_features(cfg: DictConfig) -> None:
    """Raise InputError, before any work, where the features asked for cannot be prepared."""
    size = cfg.surroundings
    check("surroundings", size, Odd | None)
    if size is not None and cfg.features is None:
        raise InputError(f"surroundings={size}: of which encoder? Give features=NAME, too")
    if cfg.features is not None and cfg.data.stain is not None:
        raise InputError(
            f"data.stain={cfg.data.stain} is fitted to the training sections of a fold, and features of normalised "
            f"tiles belong to that fold: stexp-train computes them. Leave out features, or data.stain"
        )


def prepare_features(cfg: DictConfig, sections: list) -> str:
    """Compute and keep the frozen features that ``stexp-train`` would, of every section with an image; say so."""
    import pytorch_lightning as pl
    import torch

    from stexp import hardware
    from stexp.data.slides.tiles import open_tiles
    from stexp.models.encoders.frozen import UNTUNED, FrozenEncoder

    device = torch.device(hardware.accelerator_of(cfg.trainer.accelerator))
    precision = hardware.choose_precision(cfg.hardware.precision, device.type)
    pl.seed_everything(cfg.seed, verbose=False)  # of an encoder with random weights
    encoder = build({**to_plain(cfg.image_encoder), **UNTUNED})
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
    spec, cache = dataset_of(cfg).tile, cfg.data.cache_dir
    with_image = [section for section in sections if section.slide is not None]
    log.info("features by %s on %s, %s", encoder.name, device.type, precision)
    with FrozenEncoder(encoder, device, autocast, cache, cfg.data.eval_batch_size) as frozen:
        for number, section in enumerate(with_image, start=1):
            log.info("section %s (%d of %d)", section.name, number, len(with_image))
            store = open_tiles(section, spec, cache, cfg.data.tile_store)
            frozen.of_tiles(section, store)
            if cfg.surroundings is not None:
                frozen.of_surroundings(section, store, spec, cfg.surroundings)
    around = f", and of the {cfg.surroundings} x {cfg.surroundings} tiles around each spot" if cfg.surroundings else ""
    return (
        f"features of {sum(map(len, with_image))} tiles by {encoder.name}{around}: {encoder.num_features} each, "
        f"{precision}, in {frozen.folder}"
    )


def _spot_rows(section, table: pd.DataFrame) -> pd.DataFrame:
    """What ``spots.csv.gz`` says of a section's spots."""
    import pandas as pd

    where = pd.DataFrame(
        {
            "section": section.name,
            "spot": section.spots.obs_names,
            "array_x": section.array_xy[:, 0],
            "array_y": section.array_xy[:, 1],
            "pixel_x": section.xy_px[:, 0],
            "pixel_y": section.xy_px[:, 1],
        }
    )
    return pd.concat([where, table.reset_index(drop=True)], axis=1)


def lines(summary: pd.DataFrame, cfg: DictConfig) -> list[str]:
    """The summary as a person reads it: a table, what stands apart, what is flagged, where the files are."""
    from stexp.data.quality import FLAGS

    def cell(value: object, text: str) -> str:
        return "-" if value is None or value != value else text.format(value)  # NaN is not itself

    shown = summary[["section", "patient", "spots", "genes"]].copy()
    for name, text in (("median_counts", "{:.0f}"), ("min_counts", "{:.0f}"), ("um_per_px", "{:.3f}")):
        shown[name] = [cell(value, text) for value in summary[name]]
    size = zip(summary["image_width"], summary["image_height"], strict=True)
    shown["image"] = [cell(width, "{:.0f}") + cell(height, " x {:.0f}").replace(" -", "") for width, height in size]
    for name, title in (("padded_tiles", "padded"), ("off_tissue", "off_tissue"), ("flagged", "flagged")):
        measured = summary[name] if name in summary else [None] * len(summary)
        there = summary["image_width"].notna() | (name == "flagged")
        shown[title] = [cell(value if t else None, "{:.0f}") for value, t in zip(measured, there, strict=True)]
    if summary["left_out"].any():
        shown["left_out"] = summary["left_out"]
    if "panel_size" in summary:
        shown["panel"] = [f"{n}/{size}" for n, size in zip(summary["panel_genes"], summary["panel_size"], strict=True)]
    shown["apart"] = ["yes" if text else "" for text in summary["stands_apart"]]
    out = [shown.to_string(index=False)]
    apart = summary.loc[summary["stands_apart"] != "", ["section", "stands_apart"]]
    out += [f"{name} stands apart: {text}" for name, text in apart.itertuples(index=False)]
    off = summary[summary["off_tissue"] > summary["spots"] / 2]
    out += [
        f"WARNING: {n} of {spots} spots of {name} lie off tissue: swapped x and y, or another resolution of the image? "
        f"look at overlay/{name}.png"
        for name, n, spots in off[["section", "off_tissue", "spots"]].itertuples(index=False)
    ]
    turned = summary.loc[summary["orientation"] != "", ["section", "orientation"]]
    out += [f"WARNING: {name}: {text}; look at overlay/{name}.png" for name, text in turned.itertuples(index=False)]
    flagged = {flag: int(summary[flag].sum()) for flag in FLAGS if summary[flag].any()}
    if flagged:
        counts = ", ".join(f"{n} {flag}" for flag, n in flagged.items())
        out.append(f"flagged spots: {counts}; they stay, unless data.leave_out names their flag")
    shared = summary["tile_overlap"].dropna() if "tile_overlap" in summary else ()
    if len(shared) and max(shared) >= LEAST_OVERLAP:
        low, high = (f"{100 * share:.0f}" for share in (min(shared), max(shared)))
        share = low if low == high else f"{low} to {high}"
        out.append(
            f"tiles overlap: a spot's shares {share} % of its pixels with that of the nearest spot; protocol=blocks "
            f"leaves spots out, so that no pixel is both trained on and tested"
        )
    with_image = int(summary["image_width"].notna().sum())
    out.append(
        f"{cfg.data.name}: {len(summary)} sections of {summary['patient'].nunique()} patients, "
        f"{summary['spots'].sum()} spots; {with_image} with an image, tiles in {Path(cfg.data.cache_dir) / 'tiles'}"
    )
    out.append(f"wrote {cfg.output_dir}: qc.csv, spots.csv.gz; look at overlay/ to see that spots lie on their tissue")
    return out


if __name__ == "__main__":
    main()
