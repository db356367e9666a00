"""A finished run as a folder: what it says, what it costs to compress it, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from exported_model import PANEL, exported, finished_run

from stexp.cli.export import lines
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.inference import model_folder
from stexp.inference.export import export, exported_run, finished_export
from stexp.inference.trained import TrainedMethod
from stexp.models.hest_ridge import HestRidge
from stexp.models.mclstexp import MclSTExp
from stexp.runs.rescore import predict_again
from stexp.runs.scoring import score_run


def test_the_folder_says_what_the_model_is():
    run, folder = finished_run(), exported()
    found, before = model_folder.read(folder), predictions.read(run / "predictions.h5ad")
    facts = found.facts
    assert facts["panel"] == list(before.var_names) and len(facts["panel"]) == PANEL
    assert facts["protocol"]["name"] == "strict" and facts["method"] == "mclstexp" and facts["fold"] == "A"
    tile = facts["tile"]
    assert (tile["px"], tile["um"]) == (64, 120)
    assert set(tile["um_per_px"].values()) == {tile["trained_um_per_px"]} == {1.25}, "B1 trains, C1 validates"
    assert facts["k"] == json.loads(before.uns["stexp"]["chosen"])["k"]
    assert facts["licences"]["weights"] == "trained from random weights" and facts["licences"]["data"]
    assert facts["model"]["image_encoder"]["pretrained"] is False
    assert set(facts["trained"]["data_manifest"]) == {"A1", "B1", "C1"}
    assert facts["reproduces"]["spots"] == before.n_obs and facts["reproduces"]["largest_difference"] < 1e-5
    assert set(found.bank.patient) == {"B", "C"}, "references are of training and validation, never of the test"
    assert found.bank.counts.shape == (len(found.bank), 200) and len(found.genes) == 200
    np.testing.assert_array_equal(found.bank.total_counts, np.asarray(found.bank.counts.sum(axis=1)).ravel())
    assert any("as the run did" in line for line in lines(facts))


def test_accuracy_of_the_panel_is_that_of_the_held_out_spots():
    per_gene = pd.read_csv(finished_run() / "per_gene.csv").set_index("gene")
    genes = model_folder.read(exported()).genes
    panel = genes[genes["in_panel"]]
    assert list(panel.index) == list(per_gene.index)
    np.testing.assert_allclose(panel["expected_pearson"], per_gene["pearson"], atol=1e-5)
    floors = per_gene.filter(like="floor_").drop(columns="floor_depth_oracle")
    np.testing.assert_allclose(panel["expected_floor"], floors.max(axis=1), atol=1e-5)
    assert list(panel["expected_floor_name"]) == [name.removeprefix("floor_") for name in floors.idxmax(axis=1)]
    assert panel["beats_floor"].isna().all(), "one patient was held out"
    assert (panel["n_held_out_sections"] == 1).all()


def test_accuracy_outside_the_panel_is_what_scoring_all_genes_gives(tmp_path):
    score_run(predict_again(finished_run(), {}, "all", str(tmp_path)))
    per_gene = pd.read_csv(tmp_path / "per_gene.csv").set_index("gene")
    genes = model_folder.read(exported()).genes
    outside = genes[~genes["in_panel"]]
    assert len(outside) == 200 - PANEL
    expected = per_gene.loc[outside.index]
    np.testing.assert_allclose(outside["expected_pearson"], expected["pearson"], atol=1e-4)
    # ridge floors choose one penalty for the genes that are fitted together
    exact = outside["expected_floor_name"] == "knn_features"
    assert exact.sum() > 20
    np.testing.assert_allclose(outside["expected_floor"][exact], expected["floor_knn_features"][exact], atol=1e-4)


@pytest.mark.slow
def test_further_folds_average_over_their_sections(tmp_path):
    a, b = finished_run(), finished_run(fold="B")
    export(a, tmp_path / "m", folds=[str(b)])
    found = model_folder.read(tmp_path / "m")
    assert found.facts["expected"] == {"runs": [a.name, b.name], "sections": ["A1", "B1"], "flags": None}
    first, second = (pd.read_csv(run / "per_gene.csv").set_index("gene")["pearson"] for run in (a, b))
    both = first.index.intersection(second.index)
    assert len(both) > 10
    np.testing.assert_allclose(found.genes.loc[both, "expected_pearson"], (first + second)[both] / 2, atol=1e-5)
    assert (found.genes["n_held_out_sections"] == 2).all(), "what is outside one panel is retrieved"
    with pytest.raises(InputError, match=r"a fold is given twice \(A, A\)"):
        export(a, tmp_path / "n", folds=[str(a)])
    with pytest.raises(InputError, match=r"is of another method or protocol"):
        export(a, tmp_path / "n", folds=[str(finished_run("model=hest_ridge", "data.stain=macenko"))])


@pytest.mark.slow
def test_a_gene_is_said_to_beat_its_floor_where_three_patients_say_so(tmp_path):
    runs = [finished_run(fold=fold) for fold in "ABC"]
    facts = export(runs[0], tmp_path / "m", folds=[str(run) for run in runs[1:]], alpha=None)
    genes = model_folder.read(tmp_path / "m").genes
    said = genes["beats_floor"].notna()
    assert said.any() and (genes.loc[said, "n_held_out_sections"] == 3).all()
    expected = genes.loc[said, "expected_pearson"] > genes.loc[said, "expected_floor"]
    assert list(genes.loc[said, "beats_floor"]) == list(expected)
    flags = facts["expected"]["flags"]
    assert flags["patients"] == 3 and 0 <= flags["held"] <= 1 and 0 <= flags["missed"] <= 1
    assert any("it held on the next in" in line for line in lines(facts))


def test_the_same_command_after_a_kill_that_followed_the_rename_finishes(tmp_path, monkeypatch):
    run, output = finished_run(), tmp_path / "m"
    options = {"bank": "float16", "prototypes": 50, "folds": [], "alpha": 0.1}
    export(run, output, **options)
    (tmp_path / ".m.old").mkdir()
    monkeypatch.setattr("stexp.inference.export.export", lambda *_: pytest.fail("exported again"))
    facts = finished_export(run, output, **options)
    assert facts is not None and facts["digest"] == model_folder.read(output).digest
    assert not (tmp_path / ".m.old").exists()
    for other in ({"bank": "float32"}, {"prototypes": 51}, {"alpha": 0.2}, {"folds": [str(run)]}):
        assert finished_export(run, output, **options | other) is None
    assert finished_export(run, tmp_path / "none", **options) is None


def test_what_a_compressed_bank_costs_is_measured(tmp_path):
    run = finished_run()
    half = export(run, tmp_path / "half", bank="float16")
    assert 0.99 < half["bank"]["loss"]["pearson_with_full"] < 1
    few = export(run, tmp_path / "few", prototypes=60)
    loss, found = few["bank"]["loss"], model_folder.read(tmp_path / "few")
    assert len(found.bank) == few["bank"]["spots"] <= 60 and few["bank"]["of"] == len(
        model_folder.read(exported()).bank
    )
    assert loss["pearson_with_full"] < half["bank"]["loss"]["pearson_with_full"]
    assert any("against the full bank" in line for line in lines(few))
    # what was written predicts what was measured
    before = predictions.read(run / "predictions.h5ad")
    small = TrainedMethod(found.facts, found.weights, found.bank)
    made = small.retrieve(before.obsm["image_embedding"], small.panel)["predicted"]
    acg = np.nanmean([np.corrcoef(o, p)[0, 1] for o, p in zip(before.layers["observed"].T, made.T, strict=True)])
    assert acg == pytest.approx(loss["pearson_acg"], abs=1e-4)
    scored = json.loads((run / "metrics.json").read_text())["scores"]["pearson_acg"]
    assert loss["pearson_acg_full"] == pytest.approx(scored, abs=1e-4)
    size = [(tmp_path / name / "bank.safetensors").stat().st_size for name in ("half", "few")]
    assert size[1] < size[0] < (exported() / "bank.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bank": "int4"}, "bank=int4: choose float32 or float16"),
        ({"prototypes": 0}, "prototypes=0: a whole number from 1 to"),
        ({"prototypes": 100_000}, "prototypes=100000: a whole number from 1 to"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, says):
    with pytest.raises(InputError, match=says):
        export(finished_run(), tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_methods_that_need_more_than_tiles_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(MclSTExp, "batching", "section")
    monkeypatch.setattr(MclSTExp, "predicts_slides", False)
    with pytest.raises(InputError, match="mclstexp cannot predict a slide: it reads whole sections"):
        export(finished_run(), tmp_path / "m")
    monkeypatch.undo()
    run = finished_run("model=hest_ridge", "data.stain=macenko")
    with pytest.raises(InputError, match="hest_ridge does not retrieve: it has no bank to compress"):
        export(run, tmp_path / "m", bank="float16")
    monkeypatch.setattr(HestRidge, "predicts_slides", False)
    with pytest.raises(InputError, match=r"cannot predict a slide: it reads more than the tile of a spot"):
        export(run, tmp_path / "m")


def test_a_model_that_predicts_otherwise_than_its_run_is_not_exported(tmp_path, monkeypatch):
    whole = TrainedMethod.encode
    monkeypatch.setattr(TrainedMethod, "encode", lambda self, tiles, *where: whole(self, 255 - tiles, *where))
    with pytest.raises(InputError, match=r"does not predict the held-out spots of .* as the run did"):
        export(finished_run(), tmp_path / "m")


def test_a_run_is_exported_once(tmp_path, monkeypatch):
    run = finished_run()
    folder = exported_run(run)
    assert folder == run / "model.stexp" and model_folder.read(folder).facts["trained"]["run"] == run.name
    monkeypatch.setattr("stexp.inference.export.export", lambda *_: pytest.fail("exported again"))
    assert exported_run(run) == folder


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no run folder"):
        export(tmp_path, tmp_path / "m")
