"""What the maps get: values in few bits, neighbours, slides, all in one small file."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from fake_run import write_pictures, write_run
from test_report import page_of, unpack

from stexp.data.slides.pictures import Level, SlidePicture, read, sheet
from stexp.reporting.maps import MISSING, PAGE_BYTES, STEPS, VALUE_BYTES, make_maps, quantise
from stexp.reporting.report import write_report


def test_quantise_keeps_ends_constants_and_gaps() -> None:
    values = np.array([[0.0, 3.0, np.nan], [1.0, 3.0, np.nan], [np.nan, 3.0, np.nan]])
    codes, ranges = quantise(values, 254)
    assert codes.tolist() == [[0, 254, MISSING], [0, 0, 0], [MISSING] * 3]
    assert ranges[:, :2].tolist() == [[0, 3], [1, 3]] and np.isnan(ranges[:, 2]).all()


def test_neighbours_are_those_of_the_predictions_and_have_their_tiles(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", spots=60, genes=8)
    write_pictures(folder)
    report, predictions = write_report(folder), ad.read_h5ad(folder / "predictions.h5ad")
    references, table = page_of(report)["references"], predictions.uns["references"]
    rows = unpack(report, "1-neighbours", "<i4").reshape(-1, 5)
    second = (predictions.obs["section"] == "B2").to_numpy()
    assert np.array_equal(rows, predictions.obsm["neighbours"][second])
    assert unpack(report, "1-weights", "<f4") == pytest.approx(predictions.obsm["neighbour_weights"][second].ravel())
    tiles = read(folder / "pictures.h5")[1].names
    for i, name in enumerate(table.index):
        section, spot = references["sections"][references["section"][i]], references["spots"][i]
        assert f"{section}:{spot}" == name
        assert references["tile"][i] == (tiles.index(name) if name in tiles else -1)
    assert references["tile"].count(-1) == 1


def test_cells_of_a_slide_are_found_in_what_is_embedded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", spots=60, genes=8)
    write_pictures(folder)
    text = write_report(folder).read_text()
    (slide,) = (section["slide"] for section in page_of(folder / "report.html")["sections"] if section["slide"])
    (picture,) = read(folder / "pictures.h5")[0].values()
    packed = base64.b64decode(re.search(r'id="0-slide">(.*?)<', text)[1])
    cells = {
        (level["downsample"], column, row): packed[start:stop]
        for level in slide["levels"]
        for column, row, start, stop in level["cells"]
    }
    assert cells == {(level.downsample, *at): jpeg for level in picture.levels for at, jpeg in level.cells.items()}


@pytest.mark.slow
def test_five_thousand_spots_by_a_thousand_genes_with_pictures_fit(tmp_path: Path) -> None:
    predictions = ad.read_h5ad(write_run(tmp_path / "x", sections=("B1",), spots=5000, genes=10) / "predictions.h5ad")
    random, shape = np.random.default_rng(0), (5000, 1000)
    predictions = ad.AnnData(
        obs=predictions.obs,
        var=pd.DataFrame(index=[f"GENE{i}" for i in range(1000)]),
        obsm=dict(predictions.obsm),
        uns=predictions.uns,
        layers={
            "observed": np.log1p(random.poisson(1, shape)).astype(np.float32),
            "predicted": random.normal(size=shape).astype(np.float32),
            "uncertainty": random.normal(size=shape).astype(np.float32),
        },
    )
    noise = [random.bytes(n) for n in (50_000, 500_000, 1_000_000, 1_400_000)]
    slide = SlidePicture(8192, 8192, 224.0, [Level(16 >> i, {(0, 0): jpeg}) for i, jpeg in enumerate(noise)])
    names = list(predictions.uns["references"].index)
    tiles = sheet(names, random.integers(0, 255, (len(names), 48, 48, 3), dtype=np.uint8))
    maps = make_maps(predictions, {"B1": slide}, tiles)
    used = sum(map(len, maps.arrays.values()))
    assert maps.genes == list(predictions.var_names)
    assert VALUE_BYTES / 2 < sum(len(text) for key, text in maps.arrays.items() if "slide" not in key) < 14e6
    assert 0.8 * PAGE_BYTES < used <= PAGE_BYTES and "sheet" in maps.arrays
    # a finest level that does not fit is left out, the others stay
    assert 1 <= len(maps.sections[0]["slide"]["levels"]) < 4


def test_of_very_many_genes_the_best_have_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stexp.reporting.maps.VALUE_BYTES", 60_000)
    folder = write_run(tmp_path / "x", sections=("B1",), spots=300, genes=400)
    report = write_report(folder)
    page = page_of(report)
    kept, rows = set(page["genes"]), page["table"]["rows"]
    assert len(rows) == 400 and 50 < len(kept) < 300 and page["steps"]["predicted"] == STEPS[-1]
    known = [row for row in rows if row["pearson"] is not None]
    worst_kept = min(row["pearson"] for row in known if row["gene"] in kept)
    assert worst_kept >= max(row["pearson"] for row in known if row["gene"] not in kept)
    assert f"of the {len(kept)} best of 400 genes" in report.read_text()
    values = sum(len(unpack(report, f"0-{layer}", "u1")) for layer in page["sections"][0]["layers"])
    assert values == 3 * 300 * len(kept)
