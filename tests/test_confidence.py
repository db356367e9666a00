"""A slide as in training is predicted without objection, and one that is wrong on purpose is not."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest
import wrong_slides
from exported_model import exported, finished_run, slide
from hydra import compose, initialize_config_dir

from stexp import load_model
from stexp.cli.prediction import find_slides, predict
from stexp.config import to_plain
from stexp.errors import InputError
from stexp.files import CONF
from stexp.inference.confidence import lines
from stexp.inference.intervals import interval

OPTIONS = {"spacing_um": 250, "progress": False, "um_per_px": 2.0}
SEEN_BY = {
    "half": {"size"},
    "double": {"size", "sharpness"},
    "channels": {"unlike_training"},
    "hue": {"stain_colour", "unlike_training"},
    "pale": {"tissue"},
    "blurred": {"sharpness", "unlike_training"},
    "noise": {"size", "stain_colour", "unlike_training"},
    "photograph": {"size", "stain_colour", "unlike_training"},
    "white": {"tissue", "stain"},
}


@pytest.fixture(scope="module")
def model():
    return load_model(exported())


@pytest.fixture(scope="module")
def right(model) -> ad.AnnData:
    return model.predict(slide(), **OPTIONS)


def checks(adata: ad.AnnData) -> dict[str, dict]:
    return {check["check"]: check for check in json.loads(adata.uns["stexp"]["checks"])}


@pytest.mark.parametrize("section", ["A1", "B1", "C1"])
def test_the_right_slide_is_not_objected_to(model, section):
    um = {"A1": 2.0, "B1": 1.25, "C1": 2.0}[section]
    found = model.predict(slide(section), **OPTIONS | {"um_per_px": um})
    trained = section != "A1"
    objections = {name for name, check in checks(found).items() if check["verdict"] != "ok"}
    assert objections == ({"training_slide"} if trained else set())
    verdict = found.uns["stexp"]["verdict"]
    if trained:
        assert verdict.startswith("Read with caution") and f"among the references (section {section}" in verdict
    else:
        assert verdict.startswith("Nothing speaks against") and "120 um" in verdict
    assert found.obs["out_of_distribution"].mean() < 0.05


def test_a_wrong_scale_is_named_as_a_cause_of_blur(model):
    found = model.predict(slide("B1"), **OPTIONS)  # 1.25 um per pixel
    blurred = checks(found)["sharpness"]
    assert blurred["verdict"] != "ok" and "the stated scale is not right (2 um per pixel" in blurred["text"]


@pytest.mark.slow
@pytest.mark.parametrize("name", wrong_slides.WRONG)
def test_a_slide_that_is_wrong_on_purpose_is(model, name, tmp_path):
    path, options = wrong_slides.write(name, slide(), tmp_path), dict(OPTIONS)
    if name in ("white", "photograph"):
        with pytest.raises(InputError, match="no tissue found"):
            model.predict(path, **options)
        options = {**options, "coordinates": np.random.default_rng(0).uniform(300, 1000, (40, 2))}
    if name == "double":  # as many tiles as of the others
        options["spacing_um"] *= 2
    found = model.predict(path, **options)
    seen = {name for name, check in checks(found).items() if check["verdict"] != "ok"}
    assert seen >= SEEN_BY[name]
    assert found.uns["stexp"]["verdict"].startswith(("Read with caution", "Do not trust this prediction"))


@pytest.mark.parametrize("um", [1.0, 4.0])
def test_a_scale_that_is_not_that_of_the_slide_is_seen(model, um):
    found = model.predict(slide(), **OPTIONS | {"um_per_px": um, "spacing_um": 125 * um})
    assert checks(found)["size"]["verdict"] == "do_not_trust" and checks(found)["size"]["value"] == pytest.approx(
        um / 2, rel=0.2
    )
    assert "the stated scale is not right" in found.uns["stexp"]["verdict"]


def test_a_prediction_has_its_interval_and_how_often_that_held(model, right, tmp_path):
    lower, upper = right.layers["lower"], right.layers["upper"]
    assert (lower <= right.X).all() and (upper >= right.X).all() and lower.min() >= 0
    expected = interval(right.X, right.layers["uncertainty"], model.genes.loc[right.var_names], True)
    np.testing.assert_array_equal(lower, expected[0])
    np.testing.assert_allclose(right.var["interval_halfwidth"], np.median(upper - lower, axis=0) / 2)
    assert right.var["coverage_measured"].equals(model.genes.loc[right.var_names, "coverage_measured"])
    assert not {"interval_quantile", "interval_offset"} & set(right.var)
    assert json.loads(right.uns["stexp"]["interval"])["alpha"] == 0.1
    right.write_h5ad(tmp_path / "x.h5ad")
    again = ad.read_h5ad(tmp_path / "x.h5ad")
    assert again.obs["out_of_distribution"].dtype == bool and checks(again) == checks(right)
    distance, percentile = model.known.score(right.obsm["image_embedding"])
    np.testing.assert_array_equal(right.obs["ood_distance"], distance)
    assert (right.obs["out_of_distribution"] == (percentile > 0.99)).all()


@pytest.mark.slow
def test_a_method_without_embedding_and_a_run_without_calibration_say_so(tmp_path):
    from stexp.inference.export import export

    options = ("model=stnet", "model.lr=0.01", "model.symmetries=false", "trainer.max_epochs=1")
    facts = export(finished_run(*options), tmp_path / "m", alpha=None)
    assert facts["known_tiles"] is None and facts["interval"] is None
    said = "\n".join(lines(facts))
    assert "intervals: none" in said and "the method embeds no tiles" in said
    found = load_model(tmp_path / "m").predict(slide(), **OPTIONS)
    assert "lower" not in found.layers and "ood_distance" not in found.obs and "coverage_measured" not in found.var
    assert found.uns["stexp"]["interval"] == "null" and "unlike_training" not in checks(found)


def test_the_command_prints_and_keeps_the_verdict(tmp_path, capsys):
    wrong = wrong_slides.write("blurred", slide(), tmp_path)
    model = exported()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = to_plain(
            compose(
                "predict",
                [f"run={model}", f"slide={wrong}", "um_per_px=2", "spacing_um=400", f"output_dir={tmp_path / 'out'}"],
            )
        )
    predict(cfg, find_slides(cfg["slide"]))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("blurred.jpg: ")]
    verdict = json.loads((tmp_path / "out" / "blurred" / "provenance.json").read_text())["verdict"]
    assert line == f"blurred.jpg: {verdict}" and verdict.startswith("Do not trust this prediction: ")
    page = (tmp_path / "out" / "blurred" / "report.html").read_text()
    assert "Do not trust this prediction" in page and "it is less sharp than in training" in page
