"""stexp-prepare: what its summary says, what it writes, and that its help names what there is."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from encoders import frozen
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from stexp.cli import prepare
from stexp.config import build, dataset_of
from stexp.data.demo import write_demo
from stexp.data.quality import FLAGS
from stexp.errors import InputError
from stexp.files import CONF
from stexp.reporting import overlay


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sections as one's own data: B1 has a blank image corner pasted in, C1 no image and no scale."""
    path = write_demo(tmp_path_factory.mktemp("data") / "demo", patients=3, sections_per_patient=1)
    table = pd.read_csv(path)
    table.loc[2, ["image", "um_per_px"]] = None
    table.to_csv(path, index=False)
    with Image.open(path.parent / "images" / "B1.jpg") as image:
        pixels = np.array(image)
    pixels[:500] = 243
    Image.fromarray(pixels).save(path.parent / "images" / "B1.jpg", quality=92)
    return path


def configure(sheet: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        paths = [f"data.sheet={sheet}", f"data.cache_dir={sheet.parent}/cache", f"output_dir={sheet.parent}/out"]
        return compose("prepare", ["data=samplesheet", "data.tile_px=64", "data.tile_um=120", *paths, *overrides])


def run(cfg: DictConfig) -> tuple[pd.DataFrame, str]:
    protocol = build(cfg.protocol)
    summary = prepare.prepare(cfg, dataset_of(cfg).read_sections(protocol), dataset_of(cfg).panel(protocol))
    return summary, "\n".join(prepare.lines(summary, cfg))


@pytest.fixture(scope="module")
def prepared(sheet: Path) -> tuple[pd.DataFrame, str, Path]:
    panel = sheet.parent / "panel.txt"
    panel.write_text("TUMOUR01\nIMMUNE01\nNOSUCH\n")
    return *run(configure(sheet, f"data.panel_file={panel}")), sheet.parent / "out"


@pytest.mark.slow
def test_the_summary_says_what_the_files_hold(prepared, sheet):
    summary, text, folder = prepared
    assert summary["section"].to_list() == ["A1", "B1", "C1"]
    for row in summary.itertuples():
        counts = pd.read_csv(sheet.parent / "counts" / f"{row.section}.tsv.gz", sep="\t", index_col=0)
        totals = counts.sum(axis=1)
        assert (row.spots, row.genes) == counts.shape
        assert row.median_counts == totals.median() and row.min_counts == totals.min()
        assert row.median_genes == (counts > 0).sum(axis=1).median()
        assert (row.panel_genes, row.panel_size) == (2, 3)
    a, b, c = summary.to_dict("records")
    assert (a["um_per_px"], b["um_per_px"]) == (2.0, 1.25) and np.isnan(c["um_per_px"])
    assert (a["image_width"], a["image_height"]) == (1750, 1540) and np.isnan(c["image_width"])
    assert (a["tile_side_px"], b["tile_side_px"]) == (60, 96)
    # the blank corner: every spot whose tile lies in it is off tissue
    spots = pd.read_csv(sheet.parent / "spots" / "B1.csv")
    assert b["off_tissue"] >= (spots["pixel_y"] < 450).sum() > 40 > 5 * a["off_tissue"]
    assert np.isnan(c["tissue"]) and c["off_tissue"] == 0
    lines = text.splitlines()
    assert len(lines) == 8 and lines[3].split()[-2:] == ["0", "2/3"] and " - " in lines[3]
    assert "1750 x 1540" in lines[1] and f" {b['off_tissue']} " in lines[2]
    assert "off_tissue; they stay, unless data.leave_out names their flag" in lines[4]
    xy = pd.read_csv(sheet.parent / "spots" / "A1.csv")[["pixel_x", "pixel_y"]].to_numpy()
    apart = np.abs(xy[:, None] - xy) + 1e9 * np.eye(len(xy))[..., None]
    apart = apart[np.arange(len(xy)), np.square(apart).sum(axis=2).argmin(axis=1)]
    overlap = np.median((1 - apart / 60).clip(0).prod(axis=1))  # of squares, one spot at a time
    assert a["tile_overlap"] == pytest.approx(overlap) and np.isnan(c["tile_overlap"])
    assert lines[5].startswith("tiles overlap") and f"{100 * overlap:.0f}" in lines[5]
    assert lines[6].startswith("samplesheet: 3 sections of 3 patients, ") and "; 2 with an image" in lines[6]
    assert str(folder) in lines[7]


def test_the_files_hold_every_section_and_spot(prepared):
    summary, _, folder = prepared
    kept = pd.read_csv(folder / "qc.csv", keep_default_na=True)
    assert list(kept.columns) == list(summary.columns)
    np.testing.assert_allclose(kept["od_green"], summary["od_green"].astype(float), rtol=1e-4)
    spots = pd.read_csv(folder / "spots.csv.gz", dtype={"flags": str}, keep_default_na=False, na_values={"tissue": ""})
    assert len(spots) == summary["spots"].sum()
    for flag in FLAGS:
        raised = spots["flags"].str.split(";").map(lambda names, flag=flag: flag in names)
        assert raised.groupby(spots["section"]).sum().to_list() == summary[flag].to_list()
    assert sorted(path.name for path in folder.rglob("*")) == sorted(
        ["A1.png", "B1.png", "C1.png", "overlay", "overlay.png", "qc.csv", "spots.csv.gz"]
    )
    with Image.open(folder / "overlay.png") as page:
        assert page.width <= 2400 and np.asarray(page.convert("L")).std() > 10


def test_an_image_that_was_turned_is_warned_of(prepared, sheet, tmp_path):
    assert (prepared[0]["orientation"] == "").all()
    with Image.open(sheet.parent / "images" / "A1.jpg") as image:
        image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "A1.jpg", quality=92)
    table = pd.read_csv(sheet).iloc[:1]
    table["counts"], table["spots"] = (str(sheet.parent / table[key].iloc[0]) for key in ("counts", "spots"))
    table["image"] = "A1.jpg"
    table.to_csv(tmp_path / "sheet.csv", index=False)
    summary, text = run(configure(tmp_path / "sheet.csv"))
    assert summary["orientation"].str.contains("looks turned by 180 degrees against the spots").all()
    (line,) = [line for line in text.splitlines() if line.startswith("WARNING: A1: its image looks turned")]
    assert "of its spots lie off tissue" in line and line.endswith("look at overlay/A1.png")


def test_left_out_spots_are_counted_in_the_summary(prepared, sheet):
    before = prepared[0].set_index("section")
    cfg = configure(sheet, "data.leave_out=[off_tissue]", f"output_dir={sheet.parent}/left", "data.sections=[B1,C1]")
    summary, text = run(cfg)
    after = summary.set_index("section")
    assert after.loc["B1", "left_out"] == before.loc["B1", "off_tissue"] and after.loc["C1", "left_out"] == 0
    assert after.loc["B1", "spots"] == before.loc["B1", "spots"] - after.loc["B1", "left_out"]
    assert after.loc["B1", "off_tissue"] == 0
    assert "left_out" in text and "they stay" not in text


def test_spots_are_drawn_where_they_are(sheet, tmp_path):
    """A picture of asymmetric spots, read back: dark dots on white at the scaled positions, y downwards."""
    section = dataset_of(configure(sheet, "data.sections=[A1]")).read_sections(None)[0]
    figure = overlay.draw(section, [""] * len(section), 60)
    axes = figure.axes[1]
    (dots, *rings) = axes.collections
    np.testing.assert_array_equal(dots.get_offsets(), section.xy_px)
    np.testing.assert_allclose(dots.get_array(), np.log10(1 + section.total_counts))
    for ring, axis in zip(rings, (0, 1), strict=True):
        first = section.array_xy[:, axis] == section.array_xy[:, axis].min()
        np.testing.assert_array_equal(ring.get_offsets(), section.xy_px[first])
    assert axes.get_xlim() == (0, 1750) and axes.get_ylim() == (1540, 0)
    overlay.save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    top = len(pixels) - axes.transData.transform(section.xy_px)[:, 1]
    x = axes.transData.transform(section.xy_px)[:, 0]
    drawn = pixels[top.astype(int), x.astype(int)]
    expected = 255 * dots.to_rgba(dots.get_array())[:, :3]
    assert np.median(np.abs(drawn - expected).max(axis=1)) < 12
    bar = figure.axes[0].lines[0].get_xdata()
    assert (bar[1] - bar[0]) * section.um_per_px in (100, 200, 500, 1000)


@pytest.mark.parametrize("name", ["prepare", "floors"])
def test_help_names_every_data_set_and_only_keys_that_there_are(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(name, ["data=samplesheet"], return_hydra_config=True)
    text = Template(cfg.hydra.help.template).substitute()  # as Hydra does: a lone $ would fail
    named = set(re.findall(r"\w+", text))
    there = {path.stem for path in (CONF / "data").glob("*.yaml")} - {"default"}
    assert there <= named, f"stexp-{name} --help does not name {there - named}"
    for key in re.findall(r"^ +([a-z_]+(?:\.[a-z_]+)+|output_dir)=", text, flags=re.MULTILINE):
        assert OmegaConf.select(cfg, key, throw_on_missing=False, default="nothing") != "nothing", key


# frozen features


def forbidden(*args, **kwargs):
    raise LookupError("the encoder was asked again")


@pytest.mark.slow
def test_features_are_those_that_training_reads(sheet, tmp_path, monkeypatch):
    """The encoder is not asked again: neither for tiles nor for what is around them, in any fold."""
    prepared = ["features=tiny", "surroundings=3", f"data.cache_dir={tmp_path}/cache", "seed=3"]
    cfg = configure(sheet, *prepared, "trainer.accelerator=cpu", "hardware.precision=32-true")
    prepare.check_features(cfg)
    sections = dataset_of(cfg).read_sections(build(cfg.protocol))
    text = prepare.prepare_features(cfg, sections)
    n = sum(len(section) for section in sections if section.slide is not None)
    assert f"features of {n} tiles by test_resnet, and of the 3 x 3 tiles" in text and "32-true" in text
    files = sorted((tmp_path / "cache" / "features").glob("*.npy"))
    assert len(files) == 4 and all(np.isfinite(np.load(file)).all() and np.load(file).any() for file in files)

    for fold in ("A", "B"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            train = compose("train", ["data=samplesheet", "data.tile_px=64", "data.tile_um=120", "image_encoder=tiny"])
        train.data.sheet, train.data.cache_dir = str(sheet), f"{tmp_path}/cache"
        pl.seed_everything(3, verbose=False)
        encoder = build(train.image_encoder)
        monkeypatch.setattr(type(encoder), "forward", forbidden)
        exact, reduced = (
            dataset_of(train).serve(
                sections,
                build(train.protocol),
                fold,
                train.seed,
                encoder=frozen(encoder, train.data.cache_dir, torch.autocast("cpu", torch.bfloat16, enabled=enabled)),
            )
            for enabled in (False, True)
        )
        rows = exact.rows("train", "validation", "test")
        features, around = exact.features[rows], exact.surroundings(3)[rows]
        assert np.abs(around[:, 4] - features).max() < 1e-4 < features.std()
        with pytest.raises(LookupError, match="asked again"):
            reduced.setup()
        monkeypatch.undo()


@pytest.mark.slow
def test_features_choose_among_the_image_encoders_as_training_does(sheet):
    for path in (CONF / "image_encoder").glob("*.yaml"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            train = compose("train", [f"image_encoder={path.stem}", "+image_encoder.mark=1"])
            cfg = compose(
                "prepare", [f"features={path.stem}", "+image_encoder.mark=1"]
            )  # of the demo, which has its own
        assert cfg.features == path.stem and cfg.image_encoder == train.image_encoder
    assert configure(sheet).features is None


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["features=tiny", "data.stain=macenko"], "features of normalised tiles belong to that fold"),
        (["features=tiny", "surroundings=4"], "surroundings=4: an odd whole number"),
        (["surroundings=5"], "surroundings=5: of which encoder"),
    ],
)
def test_features_that_cannot_be_prepared_are_refused(sheet, overrides, says):
    with pytest.raises(InputError, match=says):
        prepare.check_features(configure(sheet, *overrides))
