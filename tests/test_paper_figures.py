"""Figures of the paper: what is drawn, in which order, and the numbers beside it."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from paper import clusters
from paper import figures as paper_figures
from paper.figures import draw_spots, tree_order
from paper.paper import build, cards, text_of
from paper_runs import GENES, cells, finish
from test_her2st import write_section

from stexp.data.readers import her2st
from stexp.data.section import Section
from stexp.errors import InputError
from stexp.reporting.places import places

FEW = ("data=her2st", "data.sections=[B3,B4,C2]", "model=mclstexp")
TWO = ("data=alex10x", "data.sections=[1142243F,CID4290]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("paper") / "runs"
    for job in cells("figS1", folder, *FEW):
        finish(job)
    return folder


def test_the_papers_genes_are_shown_where_the_paper_shows_them(runs: Path):
    result, _ = build("figS1", FEW, runs)
    grid = {line[0]: line for line in result.parts[0][2][1:]}
    assert list(grid)[:3] == ["GNAS", "FN1", "FASN"] and "HLA-B" not in grid  # that is not predicted here
    assert grid["GNAS"][1] == "B3" and grid["GNAS"][-1] == "as in the paper"
    assert grid["FN1"][1] in ("B3", "B4", "C2") and grid["FN1"][-1] == "our best section"  # B6 was not held out
    numbers = {number["gene"]: number for number in result.numbers}
    adata = ad.read_h5ad(next(runs.rglob("B3-s0/predictions.h5ad")))
    both = [np.asarray(adata[:, "GNAS"].layers[key]).ravel() for key in ("observed", "predicted")]
    assert numbers["GNAS"]["value"] == pytest.approx(np.corrcoef(*both)[0, 1], rel=1e-5)
    assert numbers["GNAS"]["paper"] == 0.84 and numbers["FN1"]["paper"] is None
    assert numbers["GNAS"]["command"].endswith("fold=B3")


def test_each_spot_is_drawn_at_its_place_in_its_colour(runs: Path):
    result, _ = build("figS1", FEW, runs)
    (figure,) = result.figures.values()
    adata = ad.read_h5ad(next(runs.rglob("B3-s0/predictions.h5ad")))
    maps = [ax for ax in figure.subfigs[0].axes if ax.collections and ax.get_title() in ("observed", "predicted")]
    assert [ax.get_title() for ax in maps] == ["observed", "predicted"]
    for ax in maps:
        np.testing.assert_allclose(ax.collections[0].get_offsets(), adata.obsm["spatial"])
        values = np.asarray(adata[:, "GNAS"].layers[ax.get_title()]).ravel()
        np.testing.assert_allclose(ax.collections[0].get_array(), values)
        assert ax.get_ylim()[0] > ax.get_ylim()[1]  # rows of the image go down
    assert "0.84" in figure.subfigs[0].get_suptitle()


def test_the_tissue_lies_under_its_spots(runs: Path):
    from matplotlib.figure import Figure

    adata = ad.read_h5ad(next(runs.rglob("B3-s0/predictions.h5ad")))
    ax = Figure().subplots()
    draw_spots(ax, places(adata)[0])
    side = adata.uns["spatial"]["B3"]["images"]["hires"].shape[0] / 0.1
    np.testing.assert_allclose(ax.images[0].get_extent(), (0, side, side, 0))


def test_the_tree_puts_genes_that_go_together_side_by_side():
    random = np.random.default_rng(0)
    group = random.permutation(np.repeat([0, 1, 2], 10))
    x = random.normal(size=(300, 3))[:, group] + 0.5 * random.normal(size=(300, 30))
    order = tree_order(np.corrcoef(x, rowvar=False))
    assert sorted(order) == list(range(30))
    assert (np.diff(group[order]) != 0).sum() == 2


def test_correlations_are_means_over_sections_never_of_pooled_spots(runs: Path):
    result, _ = build("figS2", FEW, runs)
    total = {"observed": 0, "predicted": 0}
    for path in runs.rglob("predictions.h5ad"):
        adata = ad.read_h5ad(path)
        for key in total:
            total[key] = total[key] + np.corrcoef(adata.layers[key].astype(float), rowvar=False) / 3
    upper = np.triu_indices(len(GENES), 1)
    r = np.corrcoef(total["observed"][upper], total["predicted"][upper])[0, 1]
    assert result.numbers[0]["value"] == pytest.approx(r, rel=1e-6)
    (figure,), (order,) = result.figures.values(), result.tables.values()
    rows = pd.Index(GENES).get_indexer(order["gene"])
    for ax, key in zip(figure.axes, total, strict=False):
        np.testing.assert_allclose(ax.images[0].get_array(), total[key][np.ix_(rows, rows)], rtol=1e-6)


def test_scores_against_k_with_the_best_floor_and_the_papers_choice(tmp_path: Path):
    score = {200: 0.2, 400: 0.22, 800: 0.25, 1600: 0.24, 2400: 0.23, 3200: 0.1}
    for job in cells("figS4", tmp_path, *TWO):
        finish(job, score[int(job.cell["model.k"])])
    result, made_of = build("figS4", TWO, tmp_path)
    best = next(number for number in result.numbers if number["metric"] == "best_k")
    assert (best["value"], best["paper"], best["difference"]) == (800, 2400, -1600)
    acg, mse, _ = result.figures["neighbours"].axes
    assert dict(zip(*acg.lines[0].get_data(), strict=True)) == pytest.approx(score)
    assert acg.lines[1].get_ydata()[0] == pytest.approx(0.15)  # the best floor; an oracle is none
    assert mse.lines[1].get_ydata()[0] == pytest.approx(0.85) and acg.lines[2].get_xdata()[0] == 2400
    assert "Highest ACG at k = 800 (the paper's: 2400)" in text_of(result, made_of)
    line = next(line for line in cards(result, made_of).splitlines() if line.startswith("| best k"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["best k", "800", "2400", "-1600"]


@pytest.fixture
def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Sections B1 and C1 with labels under a root, and what names them; small enough for few starts."""
    monkeypatch.setattr(clusters, "STARTS", 5)
    monkeypatch.setattr(clusters, "COMPONENTS", 3)
    for name in ("B1", "C1"):
        write_section(tmp_path / "her2st", name, labels=True)
        path = tmp_path / "her2st" / "ST-pat" / "lbl" / f"{name}_labeled_coordinates.tsv"
        table = pd.read_csv(path, sep="\t")
        table["label"] = np.where(table["x"] < 5.5, "cancer", "connective tissue")
        table.to_csv(path, sep="\t", index=False)
    (tmp_path / "panel.txt").write_text("FO538757.1\nERBB2\nCD74\nCOL1A1\n")
    root = f"data.root={tmp_path / 'her2st'}"
    return "data.sections=[B1,C1]", root, f"data.panel_file={tmp_path / 'panel.txt'}", "model=bleep,mclstexp"


def test_clusters_beside_the_pathologist_with_a_gap_where_no_run_is(labelled: tuple[str, ...], tmp_path: Path):
    found = cells("figS3", tmp_path / "runs", *labelled)
    for job in found[:-1]:
        finish(job)
        _on_the_labels(job, tmp_path / "her2st")
    with pytest.raises(InputError, match="figS3: 1 of 4 cells have no finished run"):
        build("figS3", labelled, tmp_path / "runs")
    result, _ = build("figS3", labelled, tmp_path / "runs", allow_missing=True)
    numbers = {(n["row"], n["section"], n["metric"]): n for n in result.numbers}
    assert numbers["bleep", "B1", "ari"]["value"] == 1.0 and numbers["bleep", "B1", "ari"]["paper"] == 0.291
    assert numbers["mclstexp", "C1", "nmi"]["value"] is None and numbers["mclstexp", "C1", "nmi"]["paper"] == 0.24
    assert numbers["observed", "C1", "ari"]["paper"] == 0.134 and numbers["observed", "C1", "ari"]["value"] < 0.9
    assert "with the other five" not in " ".join(numbers["observed", "B1", "ari"]["causes"])
    (figure,) = result.figures.values()
    # B1: pathologist, observed, mclSTExp, BLEEP, as the paper orders them; then C1
    drawn = [ax.collections[0].get_facecolor() if ax.collections else None for ax in figure.axes]
    assert len(drawn) == 8 and drawn[6] is None
    known = clusters.labels_of(_section(tmp_path / "her2st", "B1")) != ""
    # all right, and in the colours of the labels
    np.testing.assert_array_equal(drawn[0][known], drawn[3][known])
    assert len(np.unique(drawn[0][known], axis=0)) == 2 and not known.all()


def _on_the_labels(job, root: Path) -> None:
    """Predictions that tell the labels apart, for the spots of the section's files, in another order."""
    section = _section(root, job.fold)
    adata = ad.read_h5ad(job.output_dir / "predictions.h5ad")[: len(section)].copy()
    order = np.random.default_rng(0).permutation(len(section))
    adata.obs["spot"] = section.spots.obs_names.to_numpy(str)[order]
    far = 50 * (clusters.labels_of(section)[order] == "cancer")
    adata.layers["predicted"] = np.asarray(adata.layers["predicted"] + far[:, None], dtype=np.float32)
    adata.write_h5ad(job.output_dir / "predictions.h5ad")


def _section(root: Path, name: str) -> Section:
    return her2st.read_her2st(root, [name])[0]


def test_strict_folds_hold_out_the_annotated_sections_of_their_patient(labelled: tuple[str, ...], tmp_path: Path):
    for job in cells("figS3", tmp_path / "runs", *labelled, "protocol=strict"):
        assert job.fold in ("B", "C")
        assert {"B": "B1", "C": "C1"}[job.fold] in paper_figures._sections_of(job)
