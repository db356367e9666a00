"""The page and the table of a folder of predicted slides."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import anndata as ad
import pytest
from fake_run import write_prediction, write_run

from stexp.reporting.index_page import write_index


def test_every_slide_has_its_row_and_its_link(tmp_path: Path) -> None:
    write_prediction(tmp_path / "a #1", spots=20, genes=6)
    write_prediction(tmp_path / "b", spots=30, genes=6, checks=False)
    write_run(tmp_path / "run", spots=20, genes=5)  # no slide
    page, table = write_index(tmp_path, {"=c": "no <b>tissue</b>"})
    with table.open(newline="") as file:
        first, second, third = csv.DictReader(file)
    assert (first["folder"], first["outcome"], first["n_spots"], first["stain"]) == (
        *("a #1", "do_not_trust", "20"),
        "do_not_trust",
    )
    assert (second["folder"], second["outcome"], second["n_spots"]) == ("b", "not checked", "30")
    assert (third["slide"], third["outcome"], third["verdict"]) == ("'=c", "failed", "no <b>tissue</b>")
    adata = ad.read_h5ad(tmp_path / "a #1" / "predictions.h5ad")
    assert float(first["median_expected_pearson"]) == pytest.approx(adata.var["expected_pearson"].median(), rel=1e-4)
    assert (int(first["n_genes_measured"]), int(first["n_genes"])) == (5, 6)
    assert int(first["n_genes_above_floor"]) == (adata.var["expected_pearson"] > adata.var["expected_floor"]).sum()

    text = page.read_text()
    assert re.findall(r'href="([^"]+)"', text) == ["a%20%231/report.html", "b/report.html"]
    assert "no &lt;b&gt;tissue&lt;/b&gt;" in text and "<script" not in text
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")
    assert text.count("data:image/jpeg;base64,") == 2


def test_one_slide_needs_no_index(tmp_path: Path) -> None:
    write_prediction(tmp_path / "a", spots=20, genes=5)
    assert write_index(tmp_path) == [] and not (tmp_path / "index.html").exists()


def test_what_is_not_finished_is_left_out(tmp_path: Path) -> None:
    for name in "abc":
        write_prediction(tmp_path / name, spots=20, genes=5)
    (tmp_path / "b" / "provenance.json").unlink()
    _, table = write_index(tmp_path)
    assert [row["folder"] for row in csv.DictReader(table.open())] == ["a", "c"]
