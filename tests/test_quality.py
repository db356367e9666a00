"""Tiles that are wrong on purpose, sections that stand apart, spots left out only when asked."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image, ImageFilter
from scipy import ndimage
from sections import make_section

from stexp.config import build, dataset_of
from stexp.data import quality, tile_measures
from stexp.data.demo import write_demo
from stexp.data.quality import FLAGS, Thresholds, inspect, leave_out, stands_apart, summarise
from stexp.data.readers import her2st, samplesheet, visium
from stexp.data.slides.tiles import TileSpec, open_tiles
from stexp.data.tile_measures import OF_TILES, blur, measure
from stexp.errors import InputError
from stexp.files import CONF

SPEC = TileSpec(px=96)


@pytest.fixture(scope="module")
def thresholds() -> Thresholds:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build(compose("prepare", ["data=demo"]).data.quality)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> list:
    return samplesheet.read_samplesheet(
        write_demo(tmp_path_factory.mktemp("demo") / "demo", patients=2, sections_per_patient=1)
    )


@pytest.fixture(scope="module")
def tile(demo: list) -> np.ndarray:
    """A tile of dense tissue, (96, 96, 3)."""
    image, centres = demo[1].slide.read(), demo[1].xy_px.astype(int)
    around = [image[y - 48 : y + 48, x - 48 : x + 48] for x, y in centres]
    return min((t for t in around if t.shape == (96, 96, 3)), key=lambda t: t.mean())


def blurred(tile: np.ndarray, radius: float = 4) -> np.ndarray:
    return np.asarray(Image.fromarray(tile).filter(ImageFilter.GaussianBlur(radius)))


def drawn(tile: np.ndarray, ink: tuple[int, int, int]) -> np.ndarray:
    """A stroke from corner to corner, as ink over tissue."""
    y, x = np.mgrid[: len(tile), : len(tile)]
    out = tile.copy()
    out[np.abs(x - y) < 20] = ink
    return out


def folded(tile: np.ndarray) -> np.ndarray:
    """Three layers of tissue over half the tile: the light that passes each, multiplied (Beer-Lambert)."""
    out = tile.copy()
    half = tile[:, 24:72] / 255.0
    out[:, 24:72] = np.round(255 * half**3)
    return out


def flags_of(tiles: list[np.ndarray], tmp_path: Path, thresholds: Thresholds) -> list[str]:
    """Flags of spots whose tiles are given, through an image, a tile store and a section."""
    image = np.concatenate(tiles, axis=1)
    xy = np.array([[96 * i + 48, 48] for i in range(len(tiles))], dtype=float)
    counts = np.full((len(tiles), 30), 9)
    section = make_section(tmp_path, n=len(tiles), image=image, xy_px=xy, counts=counts, um_per_px=1.25)
    return list(inspect(section, open_tiles(section, SPEC, tmp_path / "cache"), SPEC, thresholds)["flags"])


def test_tiles_that_are_wrong_on_purpose_are_flagged_for_what_they_are(tile, tmp_path, thresholds):
    glass = np.full_like(tile, 243)
    wrong = {
        "": [tile, tile[::-1], tile[:, ::-1]],
        "blurred": [blurred(tile), blurred(tile, 8)],
        "pen": [drawn(tile, ink) for ink in ((25, 60, 190), (20, 120, 60), (15, 15, 20))],
        "fold": [folded(tile)],
        "off_tissue": [glass, glass - 20],
    }
    tiles = [t for these in wrong.values() for t in these]
    expected = [flag for flag, these in wrong.items() for _ in these]
    found = flags_of(tiles, tmp_path, thresholds)
    # ink may also be sharp-edged or blank; nothing else is confused
    assert [flags.split(";")[0] for flags in found] == expected, found


INKS = {  # light that passes: colour, 0..255
    "black": (25, 25, 30),
    "blue": (30, 60, 180),
    "green": (20, 120, 60),
    "red": (205, 35, 45),
    "purple": (110, 50, 160),
    "purple highlighter": (190, 140, 230),
    "yellow highlighter": (250, 240, 70),
    "orange highlighter": (255, 170, 60),
    "green highlighter": (160, 245, 120),
}


def marked(tile: np.ndarray, colour: tuple[int, int, int], strength: float, angle: float) -> np.ndarray:
    """A stroke with soft edges over two fifths of a tile: the light that passes both, multiplied (Beer-Lambert)."""
    side = len(tile)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    across = np.abs(x * np.cos(angle) + y * np.sin(angle)) / side
    cover = np.clip((0.2 - across) / 0.02 + 0.5, 0, 1)[..., None]
    return np.round(tile * (np.array(colour) / 255) ** (strength * cover)).astype(np.uint8)


def pen_rates(tiles: np.ndarray, um_per_px: float, most: float) -> tuple[float, dict[str, float]]:
    """Share of tiles flagged without a mark, and by ink of those with one: every third of a section is marked."""

    def flagged(tiles: np.ndarray) -> np.ndarray:
        return measure(tiles, um_per_px)[:, OF_TILES.index("pen")] > most

    hits, rows = {}, np.arange(0, len(tiles), 3)
    for name, colour in INKS.items():
        for strength in (1.0, 0.5):
            drawn_on = tiles.copy()
            for i in rows:
                drawn_on[i] = marked(tiles[i], colour, strength, angle=float(i))
            hits[f"{name}{', faint' if strength < 1 else ''}"] = flagged(drawn_on)[rows].mean()
    return flagged(tiles).mean(), hits


def tiles_of(section, tmp_path: Path) -> np.ndarray:
    return np.asarray(open_tiles(section, TileSpec(150, 150), tmp_path))


@pytest.mark.slow
def test_pens_of_all_common_colours_are_noticed_and_tissue_is_not(demo, tmp_path, thresholds):
    rates = [pen_rates(tiles_of(section, tmp_path), 1.0, thresholds.max_pen) for section in demo]
    assert [alarms for alarms, _ in rates] == [0, 0]
    for name in rates[0][1]:
        hits = np.mean([hits[name] for _, hits in rates])
        least = 0.95 if "faint" not in name else 0.1 if name.startswith("red") else 0.5
        assert hits >= least, (name, hits)


@pytest.mark.slow
@pytest.mark.data
def test_pens_on_real_tissue(real_data, tmp_path, thresholds):
    sections = her2st.read_her2st(real_data / "her2st", sections=["B4"]) + visium.read_visium(
        real_data / "visium_mouse_colon"
    )
    rates = []
    for section in sections:
        tiles = tiles_of(section, tmp_path)
        rates.append(pen_rates(tiles[:: len(tiles) // 120], 1.0, thresholds.max_pen))
    assert max(alarms for alarms, _ in rates) <= 0.02
    for name in rates[0][1]:
        hits = [round(float(hits[name]), 2) for _, hits in rates]
        assert np.mean(hits) >= (0.4 if "faint" in name else 0.8), (name, hits)


def test_ink_on_glass_is_ink_and_glass_is_nothing(tile):
    glass = np.full_like(tile, 243)
    full = np.broadcast_to(np.uint8([25, 60, 190]), glass.shape)
    tiles = np.stack([drawn(glass, (25, 60, 190)), glass, full])
    measured = pd.DataFrame(measure(tiles, 1.0), columns=list(OF_TILES))
    assert measured["pen"][0] > 0.15 and measured["pen"].to_list()[1:] == [0, 1]
    assert measured["tissue"].to_list()[1:] == [0, 0]
    assert measured.loc[1, ["od_red", "red"]].isna().all() and np.isnan(measured["blur"][1])


def slow_blur(image: np.ndarray, width: int = 9) -> float:
    """Crete et al. 2007, equation by equation, where the window lies inside."""
    scores, r = [], width // 2
    for f in (image, image.T):
        b = ndimage.uniform_filter1d(f, width, axis=0)
        d_f, d_b = np.abs(f[1:] - f[:-1])[r : -r or None], np.abs(b[1:] - b[:-1])[r : -r or None]
        v = np.maximum(0, d_f - d_b)
        scores.append((d_f.sum() - v.sum()) / d_f.sum())
    return max(scores)


def test_blur_is_the_published_metric_and_grows_with_blur(tile):
    import torch

    series = [np.asarray(blurred(tile, radius).mean(axis=2), dtype=np.float64) for radius in (0, 0.5, 1, 2, 4)]
    fast = blur(torch.from_numpy(np.stack(series))).numpy()
    np.testing.assert_allclose(fast, [slow_blur(image) for image in series], rtol=1e-6)
    assert (np.diff(fast) > 0).all()
    # neither stain strength nor brightness matters
    assert blur(torch.from_numpy(0.5 * series[1][None] + 40)).item() == pytest.approx(fast[1])
    assert torch.isnan(blur(torch.zeros(1, 8, 30))).item()


def test_measures_are_those_of_an_obvious_version(tile):
    tiles = np.stack([tile, drawn(tile, (25, 60, 190)), folded(tile), np.full_like(tile, 255)])
    got = pd.DataFrame(measure(tiles, 1.25), columns=list(OF_TILES))
    side = round(tile_measures.CELL_UM / 1.25)
    most_red, least_blue = tile_measures._usual_hues(tiles, 1.25)
    for i, whole in enumerate(tiles):
        tissue, ink, fold, densities = [], [], [], []
        for y in range(0, 96 - side + 1, side):
            for x in range(0, 96 - side + 1, side):
                colour = whole[y : y + side, x : x + side].reshape(-1, 3).mean(axis=0)
                r, g, b = od = -np.log10((np.minimum(colour, 254) + 1) / 255)
                is_ink = max(r, b) > 0.3 and r - g > 0.12  # blue, green
                is_ink |= r > 0.3 and r > most_red * g
                is_ink |= od.min() > 0.45 and od.min() > 0.7 * od.max()  # black
                is_ink |= b > 0.25 and b - g > 0.02  # yellow
                is_ink |= g > 0.6 and b > 0.75 * g  # red
                is_ink |= g > 0.25 and r > 0.25 * g and b < least_blue * g  # purple
                is_tissue = not is_ink and (g - (r + b) / 2 > 0.05 or od.mean() > 0.15)
                tissue.append(is_tissue)
                ink.append(is_ink)
                fold.append(is_tissue and 1 - colour.min() / colour.max() - colour.mean() / 255 > 0.2)
                densities += [od] if is_tissue else []
        expected = [np.mean(tissue), np.mean(ink), np.mean(fold)]
        np.testing.assert_allclose(got.loc[i, ["tissue", "pen", "fold"]].to_list(), expected, atol=1e-6)
        stain = np.mean(densities, axis=0) if densities else [np.nan] * 3
        np.testing.assert_allclose(got.loc[i, ["od_red", "od_green", "od_blue"]].to_list(), stain, atol=1e-5)


def test_chunks_and_scale_do_not_change_what_a_tile_gets(tile, monkeypatch):
    tiles = np.stack([tile, blurred(tile), folded(tile)])
    whole = measure(tiles, 1.25)
    monkeypatch.setattr(tile_measures, "TILES_AT_ONCE_PX", 1)
    np.testing.assert_allclose(measure(tiles, 1.25), whole, atol=1e-6)
    # the same tissue scanned at half the pixel size
    fine = np.stack([np.asarray(Image.fromarray(t).resize((192, 192), Image.Resampling.BICUBIC)) for t in tiles])
    close = pd.DataFrame(measure(fine, 0.5) - measure(tiles, 1.0), columns=list(OF_TILES)).abs()
    assert close[["tissue", "blur", "pen", "fold"]].to_numpy().max() < 0.1
    with pytest.raises(InputError, match="tiles must be"):
        measure(tiles[0], 1.0)


def test_measures_are_kept_and_mended(tile, tmp_path, thresholds, monkeypatch, caplog):
    first = flags_of([tile, blurred(tile)], tmp_path, thresholds)
    (kept,) = (tmp_path / "cache" / "quality").glob("*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(quality, "measure", None)
        assert flags_of([tile, blurred(tile)], tmp_path, thresholds) == first
    kept.write_bytes(kept.read_bytes()[:90])
    assert flags_of([tile, blurred(tile)], tmp_path, thresholds) == first
    assert "is damaged; computing it again" in caplog.text


def test_demo_tissue_is_good_but_for_fat(demo, tmp_path, thresholds):
    for section in demo:
        spec = TileSpec(64, 120)
        table = inspect(section, open_tiles(section, spec, tmp_path), spec, thresholds)
        flagged = table.loc[table["flags"] != "", "flags"]
        assert set(flagged) <= {"off_tissue"} and len(flagged) < 0.05 * len(table)
        obs = section.spots.obs
        np.testing.assert_array_equal(obs["qc_n_counts"], section.total_counts)
        np.testing.assert_array_equal(obs["qc_n_genes"], (section.spots.X.toarray() > 0).sum(axis=1))
        assert (obs["qc_flags"] == table["flags"]).all()
        for name in ("tissue", "blur", "pen", "fold"):
            np.testing.assert_array_equal(obs[f"qc_{name}"], table[name])


def test_summary_weighs_stain_by_tissue_and_counts_flags(tmp_path, thresholds):
    section = make_section(tmp_path, n=3, genes=2, image=False, counts=np.array([[1, 0], [40, 40], [300, 1]]))
    table = inspect(section, None, SPEC, thresholds)
    assert list(table["flags"]) == ["few_counts;few_genes", "few_genes", "few_genes"]
    row = summarise(section, table)
    assert (row["few_counts"], row["few_genes"], row["flagged"], row["median_counts"]) == (1, 3, 3, 80)
    assert row["image_width"] is None and np.isnan([row["tissue"], row["blur"], row["od_red"]]).all()
    table[["tissue", "od_red"]] = [[1.0, 0.4], [0.5, 0.1], [0.0, np.nan]]
    assert summarise(section, table)["od_red"] == pytest.approx(0.3)


def rows(**columns: list[float]) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    same = {"median_counts": 5000.0, "median_genes": 2000.0, "tissue": 0.9, "blur": 0.35}
    same |= {"od_red": 0.2, "od_green": 0.3, "od_blue": 0.15}
    return pd.DataFrame({**{name: [value] * n for name, value in same.items()}, **columns})


def test_a_section_that_stands_apart_is_named_with_what_sets_it_apart():
    (apart, *others) = stands_apart(rows(median_counts=[640, 9000, 9500, 10000, 12000.0]), 3.5)
    assert others == [""] * 4
    assert apart.startswith("median_counts 640 (median 9500, z -") and ";" not in apart
    # all others equal: the spread that is nothing to speak of stands in, so small differences do not stand apart
    assert stands_apart(rows(od_green=[0.3, 0.3, 0.3, 0.3, 0.35]), 3.5) == [""] * 5
    assert stands_apart(rows(od_green=[0.3, 0.3, 0.3, 0.3, 0.45]), 3.5)[4] == "od_green 0.45 (median 0.30, z +5.0)"
    # by the definition: 0.6745 (x - median) / MAD on natural logarithms
    counts = np.array([1000, 2000, 4000, 8000, 200000.0])
    scale = np.log1p(counts)
    z = 0.6745 * (scale - np.median(scale)) / np.median(np.abs(scale - np.median(scale)))
    assert stands_apart(rows(median_counts=counts), 3.0)[4].endswith(f"z {z[4]:+.1f})") == (z[4] > 3.0)
    assert stands_apart(rows(median_counts=[1, 9000, 9000.0]), 3.5) == [""] * 3  # too few to tell which
    assert stands_apart(rows(median_counts=[1, 9000, 9000, 9000, 9000.0]), None) == [""] * 5
    missing = stands_apart(rows(blur=[np.nan, 0.35, 0.35, 0.36, 0.34, 0.7]), 3.5)
    assert missing[:5] == [""] * 5 and missing[5].startswith("blur 0.70")


def test_spots_are_left_out_only_when_asked_and_it_is_said(tile, tmp_path, thresholds, caplog):
    image = np.concatenate([tile, np.full_like(tile, 243), tile, blurred(tile)], axis=1)
    xy = np.array([[96 * i + 48, 48] for i in range(4)], dtype=float)
    counts = np.full((4, 30), 9)
    counts[2, 1:] = 0
    section = make_section(tmp_path, n=4, image=image, xy_px=xy, counts=counts, um_per_px=1.25)
    tiles = open_tiles(section, SPEC, tmp_path / "cache")
    inspect(section, tiles, SPEC, thresholds)
    assert len(section) == 4
    with caplog.at_level(logging.INFO):
        (kept,) = leave_out([section], ["off_tissue", "few_counts"], thresholds, SPEC, lambda _: tiles)
    assert list(kept.spots.obs_names) == [section.spots.obs_names[i] for i in (0, 3)]
    assert list(kept.spots.obs["qc_flags"]) == ["", "blurred"]
    assert "section A1: 2 of 4 spots left out (1 few_counts, 1 off_tissue)" in caplog.text.replace(
        "1 off_tissue, 1 few_counts", "1 few_counts, 1 off_tissue"
    )
    assert len(section) == 4 and summarise(kept, inspect(kept, None, SPEC, thresholds))["left_out"] == 2
    # counts alone decide: no tile is opened
    assert len(leave_out([section], ["few_counts"], thresholds, SPEC, None)[0]) == 3


@pytest.mark.parametrize(
    ("flags", "changed", "message"),
    [
        (["glass"], {}, "no flag is called glass; choose from few_counts, few_genes, off_tissue, blurred, pen, fold"),
        (["few_genes"], {"min_genes": None}, "needs a threshold; data.quality.min_genes is null"),
        (["few_counts"], {"min_counts": 1e9}, "section A1: all 24 spots are flagged few_counts; change data.quality"),
    ],
)
def test_what_cannot_be_left_out_is_refused(flags, changed, message, tmp_path, thresholds):
    section = make_section(tmp_path)
    with pytest.raises(InputError, match=message):
        leave_out([section], flags, Thresholds(**{**vars(thresholds), **changed}), SPEC, None)


@pytest.mark.parametrize(
    ("name", "value"), [("min_tissue", 20), ("max_blur", -0.1), ("min_counts", "many"), ("max_pen", True)]
)
def test_thresholds_that_mean_nothing_are_refused(name, value, thresholds):
    with pytest.raises(InputError, match=rf"(?i)data.quality.{name}={value}: a number .* or null would fit"):
        Thresholds(**{**vars(thresholds), name: value})


def test_every_flag_has_a_threshold_and_stands_in_the_config(thresholds):
    assert {name for _, name in FLAGS.values()} | {"stands_apart"} == set(vars(thresholds))
    text = (CONF / "data" / "default.yaml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("leave_out"))
    assert line.split(": ")[-1].split(", ") == list(FLAGS)


def test_leave_out_is_a_key_of_every_command(demo, tmp_path):
    root = demo[0].slide.path.parents[1]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        keys = [f"data.sheet={root}/sheet.csv", "data.leave_out=[few_counts]", "data.quality.min_counts=4000"]
        cfg = compose("floors", ["data=samplesheet", *keys, f"data.cache_dir={tmp_path}"])
    kept = dataset_of(cfg).read_sections(build(cfg.protocol))
    assert [len(section) for section in kept] == [int((section.total_counts >= 4000).sum()) for section in demo]
    assert [path.name for path in tmp_path.iterdir()] == ["sections"], "no tiles"


def test_predictions_carry_the_quality_of_their_spots(tmp_path, thresholds):
    from stexp.data.datamodule import SpotDataModule
    from stexp.protocol import Protocol
    from stexp.runs.results import quality_of_test

    with initialize_config_dir(str(CONF), version_base="1.3"):
        protocol: Protocol = build(compose("train").protocol)
    sections = [make_section(tmp_path, f"{patient}1", patient, seed=i) for i, patient in enumerate("ABC")]
    data = SpotDataModule(sections, protocol, "B", tile_px=16, panel=["g00", "g01"], cache_dir=str(tmp_path))
    columns = quality_of_test(data, thresholds)
    assert len(columns) == len(data.rows("test")) == 24
    table = inspect(sections[1], open_tiles(sections[1], TileSpec(16), tmp_path), TileSpec(16), thresholds)
    for name in ("n_counts", "n_genes", "tissue", "blur", "pen", "fold", "flags"):
        assert columns[f"qc_{name}"].to_list() == pytest.approx(table[name].to_list(), nan_ok=True)


@pytest.mark.data
def test_her2st_tiles_are_sharp_tissue_without_ink(real_data, thresholds, tmp_path):
    from stexp.data.readers import her2st

    (section,) = her2st.read_her2st(real_data / "her2st", ["C3"])
    few = section.spots[::9].copy()
    section = type(section)("C3", "C", few, section.slide, section.um_per_px)
    table = inspect(section, open_tiles(section, TileSpec(), tmp_path), TileSpec(), thresholds)
    of_tiles = table["flags"].str.replace("few_counts;few_genes", "")
    assert (of_tiles == "").all() and table["tissue"].median() > 0.9
    softer = np.stack([blurred(t, 3 / 0.688) for t in open_tiles(section, TileSpec(), tmp_path)[:6]])
    assert (measure(softer, 0.688)[:, OF_TILES.index("blur")] > thresholds.max_blur).all()
