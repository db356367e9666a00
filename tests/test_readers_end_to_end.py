"""Every data set's layout, faked on a small scale: read, trained on, predicted, scored, and scored again."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from fakes import visium, visium_hd, xenium
from hydra import compose, initialize_config_dir
from PIL import Image

import stexp
from stexp import config, files
from stexp.cli import prepare
from stexp.cli.fold import train
from stexp.data import readers
from stexp.data.splits import folds
from stexp.protocol import Protocol
from stexp.runs.rescore import predict_again
from stexp.runs.scoring import score_run

LAYOUTS = sorted(path.stem for path in (Path(__file__).parent / "fakes").glob("*.py"))
SMALL = ["image_encoder=tiny", "data.tile_px=32", "data.tile_um=null", "data.batch_size=16", "model.k=5"]
ON_CPU = ["trainer.max_epochs=1", "trainer.accelerator=cpu", "hardware.keep_memory=false"]
OPTIONS = {"hest": ["data.species=Homo sapiens"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_data_set_goes_from_files_to_scores(name, tmp_path, caplog):
    root = tmp_path / "data"
    importlib.import_module(f"fakes.{name}").write(root)
    places = [f"data.root={root}", f"data.cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}"]
    with initialize_config_dir(str(files.CONF), version_base="1.3"):
        cfg = compose("train", [f"data={name}", *places, *SMALL, *ON_CPU, *OPTIONS.get(name, [])])
    protocol = config.build(cfg.protocol)
    with caplog.at_level(logging.INFO):
        sections = config.dataset_of(cfg).read_sections(protocol)
        fold = folds(sections, protocol)[0]
        metrics = train(cfg, sections, fold, tmp_path / "run")

    held_out = {section.name: section for section in sections if section.patient == fold}
    assert set(metrics["sections"]) == {name for name, section in held_out.items() if section.slide is not None}
    adata = ad.read_h5ad(tmp_path / "run" / "predictions.h5ad")
    assert np.isfinite(adata.layers["predicted"]).all() and set(adata.obs["patient"]) == {fold}
    # what was scored are the counts that the reader gave, spot by spot
    for section_name in metrics["sections"]:
        rows = adata[adata.obs["section"] == section_name]
        section = held_out[section_name]
        np.testing.assert_array_equal(rows.obs["spot"], section.spots.obs_names)
        np.testing.assert_array_equal(rows.layers["counts"], section.counts(adata.var_names))
        np.testing.assert_array_equal(rows.obsm["spatial"], section.xy_px)
    assert json.loads((tmp_path / "run" / "audit.json").read_text())["leaks"] == 0

    before = (tmp_path / "run" / "metrics.json").read_bytes()
    score_run(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    again = score_run(predict_again(tmp_path / "run", {"k": 3}, "panel", None))
    assert again["chosen"]["k"] == 3 and again["scores"] != metrics["scores"]


def hd_section(root: Path) -> None:
    visium_hd.write_section(root / "A" / "outs", "A")


def xenium_section(root: Path) -> None:
    xenium.write_section(root / "A" / "outs")
    xenium.write_image(root / "A" / "A")


OTHER_SPOTS = {
    "aggr": ("visium", lambda root: visium.write_aggr(root / "agg" / "outs"), ["data.sections=[LB2]"]),
    "cytassist": (
        "visium",
        lambda root: visium.write_cytassist(root / "A", microscope=False),
        ["data.cytassist=true"],
    ),
    "bins of 24 um": ("visium_hd", hd_section, ["data.bin_um=24"]),
    "cells of HD": ("visium_hd", hd_section, ["data.spots=cells"]),
    "cells": ("xenium", xenium_section, ["data.spots=cells"]),
}
"""Data set, who writes it, and options: what else than whole spots a platform counts, or takes pictures of."""


@pytest.mark.parametrize("name", OTHER_SPOTS)
def test_other_spots_and_images_are_prepared_drawn_and_have_floors(name, tmp_path):
    data, write, options = OTHER_SPOTS[name]
    root = tmp_path / "data"
    root.mkdir()
    write(root)
    places = [f"data.root={root}", f"data.cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'out'}"]
    sizes = ["data.tile_px=24", "data.tile_um=24" if data != "visium" else "data.tile_um=150"]
    with initialize_config_dir(str(files.CONF), version_base="1.3"):
        cfg = compose("prepare", [f"data={data}", *places, *sizes, *options])
    protocol = Protocol("blocks", hold_out="block", blocks=3)
    sections = config.dataset_of(cfg).read_sections(protocol)
    summary = prepare.prepare(cfg, sections, None)
    assert (summary["orientation"] == "").all() and summary["tile_overlap"].between(0, 1).all()
    for section in sections:
        with Image.open(tmp_path / "out" / "overlay" / f"{section.name}.png") as page:
            pixels = np.asarray(page.convert("RGB")).astype(int)
        # of viridis, in which spots are coloured, green leads by far; of the ramp of the picture it never does
        assert (pixels[..., 1] > pixels[..., 0] + 40).sum() > 500
    encoder = {"image_encoder": "tiny"}
    module = stexp.SpotDataModule(
        sections, protocol=protocol, fold="block1", tile_px=24, tile_um=cfg.data.tile_um, **encoder,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    table = stexp.floors(module)
    assert {"ceiling", "floor"} <= set(table["kind"]) and np.isfinite(table["mse"].dropna()).all()


def test_every_reader_has_a_fake_or_is_the_demo():
    names = {path.stem for path in (Path(readers.__file__).parent).glob("*.py")}
    with_yaml = {path.stem for path in (files.CONF / "data").glob("*.yaml")} & names
    assert with_yaml - {"demo", "her2st", "samplesheet"} == set(LAYOUTS)  # the demo is a sample sheet
