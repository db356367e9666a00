"""A loaded model predicts a slide as its run predicted the held-out section, and says what it cannot do."""

from __future__ import annotations

import json
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from exported_model import PANEL, exported, finished_run, killed_after, root, slide
from PIL import Image

from stexp import load_model
from stexp.data.slides.slide import Slide
from stexp.errors import InputError
from stexp.inference import predictor
from stexp.runs.rescore import predict_again

STNET = (
    "model=stnet",
    "data.tile_um=null",
    "data.stain=macenko",
    "model.lr=0.01",
    "model.symmetries=false",
    "trainer.max_epochs=1",
)
M2ORT = ("model=m2ort", "model.dim=24", "model.depth=1", "model.heads=2", "model.hidden=16", "random_features=0")
MAGNIFIED = ("model=hest_ridge", "data.tile_um=null", "data.tile_px=32", "data.scales_um=[60,120]")
UM = 2.0  # of the demo's images, whose files do not say it


@pytest.fixture(scope="module")
def model() -> predictor.Model:
    return load_model(exported())


def spots(section: str = "A1"):
    return root() / "data" / "spots" / f"{section}.csv"


def of_run(*overrides: str) -> ad.AnnData:
    return ad.read_h5ad(finished_run(*overrides) / "predictions.h5ad")


def equal(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("protocol=paper",),
        ("model=hest_ridge", "data.stain=macenko"),
        ("model=consensus",),
        STNET,
        M2ORT,
        MAGNIFIED,
    ],
    ids=lambda overrides: " ".join(overrides) or "default",
)
def test_at_the_spots_of_the_held_out_section_it_predicts_what_the_run_did(overrides):
    fold = "A1" if "protocol=paper" in overrides else "A"
    run = finished_run(*overrides, fold=fold)
    before = ad.read_h5ad(run / "predictions.h5ad")
    model = load_model(run)
    # raw pixels of another scale than in training are what the run had, and a model avoids: say that it is the same
    um = UM if model.facts["tile"]["um"] else model.facts["tile"]["trained_um_per_px"]
    found = model.predict(slide(), um_per_px=um, coordinates=spots(), batch_size=50, progress=False)
    found = found[before.obs["spot"].to_numpy(str)]
    assert list(found.var_names) == list(before.var_names)
    equal(found.X, before.layers["predicted"])
    equal(found.layers["predicted"], before.layers["predicted"])
    equal(found.layers["uncertainty"], before.layers["uncertainty"])
    equal(found.obsm["spatial"], before.obsm["spatial"])
    if "image_embedding" in before.obsm:
        np.testing.assert_allclose(found.obsm["image_embedding"], before.obsm["image_embedding"], rtol=1e-4, atol=1e-4)
        if "neighbours" in before.obsm:
            named = [table.uns["references"].index[table.obsm["neighbours"][:, 0]] for table in (found, before)]
            assert (named[0] == named[1]).mean() > 0.98  # but for ties
            assert set(found.uns["references"]["section"]) <= {"B1", "C1"}
        columns = [name for name in before.obs if name.startswith("neighbour_")]
        assert len(columns) == 6
        for name in columns:
            if before.obs[name].dtype.kind == "f":
                equal(found.obs[name], before.obs[name])
            else:
                assert found.obs[name].astype(str).tolist() == before.obs[name].astype(str).tolist()
    views = 2 if "model=consensus" in overrides else 1  # the widest shows twice a tile
    raw = "data.tile_um=null" in overrides and overrides != MAGNIFIED  # whose widest view is 120 um, as a tile here
    assert found.uns["stexp"]["tile_side_px"] == views * (64 if raw else 60)


def test_any_gene_is_what_scoring_all_genes_predicts(model, tmp_path):
    before = ad.read_h5ad(predict_again(finished_run(), {}, "all", str(tmp_path)) / "predictions.h5ad")
    xy = before.obsm["spatial"]
    found = model.predict(slide(), um_per_px=UM, coordinates=xy, genes="all", progress=False)
    assert found.n_vars == before.n_vars == 200
    equal(found[:, before.var_names].X, before.layers["predicted"])
    equal(found[:, before.var_names].layers["uncertainty"], before.layers["uncertainty"])
    outside = [gene for gene in found.var_names if gene not in model.panel][:3]
    some = model.predict(slide(), um_per_px=UM, coordinates=xy, genes=[*outside[::-1], model.panel[5]], progress=False)
    assert list(some.var_names) == [*outside[::-1], model.panel[5]] and not some.var["in_panel"].iloc[:3].any()
    equal(some.X, found[:, some.var_names].X)


def test_a_grid_comes_with_all_that_plots_and_judges_it(model):
    found = model.predict(slide(), um_per_px=UM, spacing_um=200, progress=False)
    assert found.shape[1] == PANEL and found.n_obs > 20 and found.obs_names.is_unique
    assert np.isfinite(found.X).all() and (found.layers["uncertainty"] >= 0).all()
    np.testing.assert_array_equal(found.obs[["pixel_x", "pixel_y"]].to_numpy(), found.obsm["spatial"])
    assert set(found.obs["neighbour_patient"]) <= {"B", "C"} and found.obs["array_x"].dtype.kind == "i"
    library = found.uns["spatial"]["A1"]
    assert found.obs["section"].unique().tolist() == ["A1"]
    assert library["images"]["hires"].ndim == 3
    assert library["scalefactors"]["spot_diameter_fullres"] == pytest.approx(100 / UM)
    for column in ("expected_pearson", "expected_floor", "expected_floor_name", "beats_floor"):
        assert found.var[column].equals(model.genes.loc[found.var_names, column])
    before = found.layers["predicted"].copy()
    found.X += 1  # as people do who transform X in place
    np.testing.assert_array_equal(found.layers["predicted"], before)
    dense = model.predict(slide(), um_per_px=UM, spacing_um=100, grid="square", progress=False)
    assert 3 < dense.n_obs / found.n_obs < 5


def test_scanpy_plots_it(model, tmp_path):
    import matplotlib.pyplot as plt
    import scanpy as sc

    found = model.predict(slide(), um_per_px=UM, spacing_um=300, progress=False)
    found.write_h5ad(tmp_path / "x.h5ad")
    again = ad.read_h5ad(tmp_path / "x.h5ad")
    (axis,) = sc.pl.spatial(again, color=again.var_names[0], library_id="A1", show=False)
    assert axis.images and axis.collections
    plt.close("all")


@pytest.mark.slow
def test_tiles_show_as_much_tissue_as_in_training(model):
    side = model.predict(slide(), um_per_px=1.0, coordinates=spots(), progress=False).uns["stexp"]["tile_side_px"]
    assert side == 120, "120 um"
    raw = load_model(finished_run(*STNET))
    found = raw.predict(slide(), um_per_px=1.0, coordinates=spots(), progress=False)
    assert found.uns["stexp"]["tile_side_px"] == 80, "64 px of 1.25 um"


def test_a_slide_without_scale_is_asked_for_it(model):
    for places in (None, spots()):
        with pytest.raises(InputError, match=r"A1.jpg does not say how large its pixels are; give um_per_px="):
            model.predict(slide(), coordinates=places)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"um_per_px": -1}, "um_per_px=-1: a number above 0"),
        ({"um_per_px": 0.001}, "a tile as in training is 120000 px wide at 0.001 um/px, the image is"),
        ({"genes": ["ZZZ", "G"]}, "2 of 2 genes are not among the 200 that this model predicts: ZZZ, G"),
        ({"genes": []}, "genes names a gene twice, or none"),
        ({"device": "tpu9"}, "device=tpu9: choose auto, cpu"),
        ({"batch_size": 0}, "batch_size=0: a whole number of at least 1"),
        ({"grid": "round"}, "grid=round: choose hexagonal or square"),
        ({"spacing_um": 0}, "spacing_um=0: a number above 0"),
        ({"coordinates": np.zeros((4, 3))}, r"coordinates of shape \(4, 3\)"),
        ({"coordinates": np.eye(4)[:, :2][:2] * 1e6 + 1e6}, "places lie outside of it"),
        ({"coordinates": np.full((4, 2), 50.0)}, "coordinates hold a place twice"),
        ({"genes": None}, "genes=None: give panel, all, or a list"),
        ({"device": "meta"}, "device=meta: choose auto, cpu"),
        ({"coordinates": "nowhere.csv"}, "nowhere.csv do not exist"),
    ],
)
def test_what_does_not_fit_is_one_line(model, options, says):
    with pytest.raises(InputError, match=says) as caught:
        model.predict(slide(), **{"um_per_px": UM, **options}, progress=False)
    assert "\n" not in str(caught.value)


def test_what_would_not_fit_in_memory_is_refused_with_what_would(model, monkeypatch):
    monkeypatch.setattr(predictor, "free_memory", lambda: 500_000)
    with pytest.raises(InputError, match=r"152 spots x 200 genes need .* (\d+) genes would fit") as caught:
        model.predict(slide(), um_per_px=UM, coordinates=spots(), genes="all", progress=False)
    fit = int(str(caught.value).split(" genes would fit")[0].split()[-1])
    assert 0 < fit < 200
    genes = list(model.genes.index[:fit])
    assert model.predict(slide(), um_per_px=UM, coordinates=spots(), genes=genes, progress=False).n_vars == fit


def test_it_goes_on_after_a_kill_to_the_same_numbers(model, monkeypatch, tmp_path):
    monkeypatch.setattr("stexp.inference.parts.SAVE_EVERY", -1)
    options = {"um_per_px": UM, "coordinates": spots(), "batch_size": 20, "progress": False}
    whole = model.predict(slide(), **options)
    killed_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        model.predict(slide(), **options, work_dir=tmp_path)
    seen = killed_after(monkeypatch, 100)
    again = model.predict(slide(), **options, work_dir=tmp_path)
    assert sum(seen) < 152 - 2 * 20, "what was finished is not done again"
    np.testing.assert_array_equal(again.X, whole.X)
    np.testing.assert_array_equal(again.obsm["image_embedding"], whole.obsm["image_embedding"])
    # other genes need no tile again; another grid does
    seen = killed_after(monkeypatch, 100)
    model.predict(slide(), **options, genes="all", work_dir=tmp_path)
    assert not seen
    model.predict(slide(), **{**options, "coordinates": whole.obsm["spatial"][:30]}, work_dir=tmp_path)
    assert sum(seen) == 30


@pytest.mark.slow
def test_the_stain_of_a_slide_is_brought_to_that_of_training(tmp_path):
    model = load_model(exported("model=hest_ridge", "data.stain=macenko"))
    options = {"um_per_px": UM, "coordinates": spots(), "progress": False}
    before = model.predict(slide(), **options)
    pixels = Slide(slide()).read().astype(float)
    Image.fromarray((pixels * [0.93, 0.87, 0.9]).astype(np.uint8)).save(tmp_path / "A1.png")  # a warmer lamp
    found = model.predict(tmp_path / "A1.png", **options)
    model.facts["stain"] = None
    without = [model.predict(path, **options).X for path in (slide(), tmp_path / "A1.png")]
    assert np.abs(found.X - before.X).mean() < 0.3 * np.abs(without[0] - without[1]).mean()


def test_a_place_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no folder; give a run, a model"):
        load_model(tmp_path / "nothing")
    with pytest.raises(InputError, match="is no exported model"):
        load_model(tmp_path)


def test_a_slide_that_trained_is_said_to_be_and_left_out(model, tmp_path):
    options = {"um_per_px": UM, "spacing_um": 250, "progress": False}
    turned = tmp_path / "again.png"
    Image.fromarray(np.rot90(Slide(slide("C1")).read())[::2, ::2]).save(turned)
    for path, um, how in ((slide("C1"), UM, "by its file"), (turned, 2 * UM, "by its look")):
        found = model.predict(path, **options | {"um_per_px": um})
        check = {each["check"]: each for each in json.loads(found.uns["stexp"]["checks"])}["training_slide"]
        assert check["verdict"] == "caution" and f"section C1, {how}" in check["text"]
        assert "this slide is among the references" in found.uns["stexp"]["verdict"]
        assert "C1" in set(found.uns["references"]["section"])
    without = model.predict(slide("C1"), **options, exclude_slide=True)
    assert set(without.uns["references"]["section"]) == {"B1"}
    assert "spots were left out" in without.uns["stexp"]["verdict"]
    expected = model.bank.without({"C1"})
    made = model.method.retrieve(without.obsm["image_embedding"], model.panel, bank=expected)
    np.testing.assert_array_equal(without.X, made["predicted"])


def test_leaving_out_what_is_no_reference_changes_nothing(model):
    options = {"um_per_px": UM, "coordinates": spots(), "progress": False}
    found = [model.predict(slide(), **options, exclude_slide=exclude) for exclude in (False, True)]
    np.testing.assert_array_equal(found[0].X, found[1].X)
    check = {each["check"]: each for each in json.loads(found[1].uns["stexp"]["checks"])}["training_slide"]
    assert check["verdict"] == "ok" and "none of the slides of training" in check["text"]


def test_without_references_none_can_be_left_out():
    raw = load_model(finished_run(*STNET))
    with pytest.raises(InputError, match="exclude_slide=true: stnet retrieves nothing"):
        raw.predict(slide(), um_per_px=1.0, coordinates=spots(), exclude_slide=True, progress=False)
    found = raw.predict(slide("B1"), um_per_px=UM, spacing_um=300, progress=False)
    assert "this slide is among those of training (section B1" in found.uns["stexp"]["verdict"]


@pytest.mark.slow
def test_predicting_needs_no_hydra(tmp_path):
    pd.DataFrame({"pixel_x": [300.0, 400.0], "pixel_y": [300.0, 320.0]}).to_csv(tmp_path / "xy.csv", index=False)
    code = (
        "import sys\nfrom stexp import load_model\n"
        f"adata = load_model({str(exported())!r}).predict({str(slide())!r}, um_per_px=2.0, "
        f"coordinates={str(tmp_path / 'xy.csv')!r}, genes='all')\n"
        "assert adata.n_obs == 2, adata\nassert 'hydra' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
