"""An exported consensus predicts any gene of its references and names these; one of before predicts its panel."""

from __future__ import annotations

import json
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import torch
from exported_model import PANEL, exported, finished_run, root, slide
from scipy.stats import pearsonr
from sklearn.linear_model import LinearRegression

from stexp import load_model
from stexp.errors import InputError
from stexp.inference import model_folder
from stexp.inference.export import export
from stexp.inference.predictor import Model
from stexp.inference.trained import TrainedMethod
from stexp.runs.finished import FinishedRun
from stexp.runs.folder import RunFolder
from stexp.training.checkpoints import load_checkpoint

CONSENSUS = ("model=consensus", "image_encoder.output=levels", "data.stain=macenko")  # any features and colours do
UM = 2.0


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(exported(*CONSENSUS))


def predict(model: Model, genes="panel", name: str = "A1", **options) -> ad.AnnData:
    spots = root() / "data" / "spots" / f"{name}.csv"
    return model.predict(slide(name), um_per_px=UM, coordinates=spots, genes=genes, progress=False, **options)


@pytest.fixture(scope="module")
def of_all(model) -> ad.AnnData:
    return predict(model, "all")


@pytest.mark.slow
def test_loadings_from_the_references_are_those_of_the_components(model):
    """Of panel genes, which it need not compute; the references come without a copy beside those of the bank."""
    method, bank = model.method._method, model.bank
    expression = torch.from_numpy(bank.expression(model.panel, model.method.protocol, model.panel))
    again = method.readout_of(expression)
    torch.testing.assert_close(again.mean, method.mean, rtol=1e-4, atol=1e-4)
    held = method.scores.std(dim=0) > 1e-4  # by all but components of no variance
    torch.testing.assert_close(again.loadings[held], method.loadings[held], rtol=1e-3, atol=1e-4)
    checkpoint = load_checkpoint(RunFolder(finished_run(*CONSENSUS)).checkpoint)["state_dict"]
    torch.testing.assert_close(method.scores, checkpoint["scores"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(method.reference, checkpoint["reference"])
    kept = model_folder.read(exported(*CONSENSUS)).weights
    assert not kept["model.reference"].numel() and not kept["model.scores"].numel()


def test_a_gene_outside_the_panel_is_what_its_regression_on_the_scores_makes_of_the_spots(model, of_all):
    panel = predict(model)
    assert of_all.n_vars == 200 and not of_all.var["in_panel"].all()
    np.testing.assert_allclose(of_all[:, model.panel].X, panel.X, rtol=1e-5, atol=1e-5)
    # all genes are linear in the same agreed scores: what the panel says of these, a regression on them returns
    method, bank = model.method._method, model.bank
    outside = [gene for gene in of_all.var_names if gene not in model.panel]
    y = bank.expression(outside, model.method.protocol, model.panel)
    direct = LinearRegression().fit(method.scores.numpy(), y)
    taper = method.taper(method.scores.shape[1])[:, 0].numpy()
    agreed = np.linalg.lstsq(method.loadings.numpy().T, (panel.X - method.mean.numpy()).T, rcond=1e-6)[0].T
    expected = direct.intercept_ + agreed @ (direct.coef_ * taper).T
    assert np.abs(expected - of_all[:, outside].X).mean() < 0.02 * np.asarray(of_all[:, outside].X).std()
    assert (of_all.layers["uncertainty"] >= 0).all() and of_all[:, outside].layers["uncertainty"].max() > 0
    one = predict(model, [outside[3], model.panel[5], outside[0]])
    np.testing.assert_allclose(one.X, of_all[:, one.var_names].X, rtol=1e-4, atol=1e-4)


def test_what_to_expect_outside_the_panel_is_measured_on_the_held_out_spots(model, of_all):
    genes = model.genes
    outside = genes.index[~genes["in_panel"]]
    assert len(outside) == 200 - PANEL
    sections = FinishedRun(RunFolder(finished_run(*CONSENSUS))).sections
    section = next(each for each in sections if each.name == "A1")
    counts = np.asarray(section.spots.X.todense())
    share = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    found = of_all[section.spots.obs_names]
    for gene in outside[:20]:
        truth = share[:, list(section.genes).index(gene)]
        if truth.std() > 0:
            expected = pearsonr(truth, np.asarray(found[:, gene].X).ravel())[0]
            assert genes.loc[gene, "expected_pearson"] == pytest.approx(expected, abs=2e-3)
    assert genes.loc[outside, "expected_floor"].notna().mean() > 0.9
    assert genes.loc[outside, "interval_quantile"].notna().mean() > 0.9


@pytest.mark.slow
def test_a_slide_among_the_references_is_predicted_from_the_others(model):
    assert set(model.bank.section) == {"B1", "C1"}
    with_own, without = (predict(model, name="B1", exclude_slide=out) for out in (False, True))
    assert "B1" in set(with_own.uns["references"]["section"])
    assert set(without.uns["references"]["section"]) == set(without.obs["neighbour_section"]) == {"C1"}
    assert without.obsm["neighbour_weights"].shape == with_own.obsm["neighbour_weights"].shape


def test_without_names_it_predicts_its_panel_as_before(model, tmp_path):
    """A folder that was exported before consensus had a bank."""
    now, checkpoint = (
        model_folder.read(exported(*CONSENSUS)),
        load_checkpoint(RunFolder(finished_run(*CONSENSUS)).checkpoint),
    )
    weights = now.weights | {f"model.{key}": value for key, value in checkpoint["state_dict"].items()}
    facts = {key: value for key, value in now.facts.items() if key not in ("bank", "reference_tiles")}
    before = replace(now, weights=weights, facts=facts, bank=None, tiles=None, genes=now.genes[now.genes["in_panel"]])
    model_folder.write(tmp_path / "old", before)
    old = load_model(tmp_path / "old")
    made, expected = predict(old), predict(model)
    np.testing.assert_allclose(made.X, expected.X, rtol=1e-4, atol=1e-4)
    assert "neighbours" not in made.obsm and "neighbour_distance" in made.obs and "neighbour_section" not in made.obs
    outside = next(gene for gene in model.genes.index if gene not in model.panel)
    with pytest.raises(InputError, match=f"not among the {PANEL} that this model predicts: {outside}"):
        predict(old, outside)
    with pytest.raises(InputError, match="retrieves nothing that could be left out"):
        predict(old, exclude_slide=True)
    with pytest.raises(InputError, match="neither references nor a bank"):
        TrainedMethod(now.facts, now.weights, None)
    other = {**now.weights, "model.loadings": now.weights["model.loadings"][:, :5]}
    with pytest.raises(InputError, match="loadings are not of its panel"):
        TrainedMethod(now.facts, other, now.bank)


@pytest.mark.slow
def test_fewer_references_cost_what_is_measured(tmp_path):
    facts = export(finished_run(*CONSENSUS), tmp_path / "few", prototypes=40, alpha=None)
    assert facts["bank"]["spots"] <= 40 < facts["bank"]["of"]
    few = model_folder.read(tmp_path / "few")
    made = predict(load_model(tmp_path / "few"))
    assert len(few.bank) == facts["bank"]["spots"] and 0.5 < facts["bank"]["loss"]["pearson_with_full"] < 1
    truth = ad.read_h5ad(finished_run(*CONSENSUS) / "predictions.h5ad")
    made = made[truth.obs["spot"].to_numpy(str)]
    scores = [
        pearsonr(o, p)[0] for o, p in zip(truth.layers["observed"].T, np.asarray(made.X).T, strict=True) if o.std()
    ]
    assert np.nanmean(scores) == pytest.approx(facts["bank"]["loss"]["pearson_acg"], abs=2e-3)
    assert json.loads((tmp_path / "few" / "model.json").read_text())["bank"] == facts["bank"]
