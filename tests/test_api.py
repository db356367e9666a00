from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import yaml
from sections import make_section, make_sections

import stexp
from stexp import construct
from stexp.api.sections import source_of
from stexp.api.settings import plain, run_config
from stexp.api.work_folder import WorkFolder
from stexp.data.dataset import DataSet
from stexp.data.genes import normalise
from stexp.errors import InputError
from stexp.files import CONF
from stexp.runs.folder import RunFolder, differing_keys

QUICK = {"accelerator": "cpu", "threads": 1, "precision": "32-true"}


@pytest.fixture(scope="module")
def sections(demo: Path) -> list[stexp.Section]:
    return stexp.datasets.demo(demo / "data", patients=3, sections_per_patient=1)


@pytest.fixture(scope="module")
def data(demo: Path, sections: list[stexp.Section]) -> stexp.SpotDataModule:
    return stexp.SpotDataModule(sections, fold="A", cache_dir=demo / "cache")


@pytest.fixture(scope="module")
def model(data: stexp.SpotDataModule, tmp_path_factory) -> stexp.Model:
    """Trained as the run `strict` is by the command."""
    out = tmp_path_factory.mktemp("api") / "run"
    return stexp.fit("mclstexp", data, max_epochs=4, accelerator="cpu", output_dir=out)


class Linear(pl.LightningModule):
    """Mean colour to expression; a user's own."""

    def __init__(self, n_genes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(3, n_genes)

    def forward(self, image):
        return self.layer(self.hparams.scale * image.mean(dim=(2, 3)))

    def training_step(self, batch, batch_idx):
        return (self(batch.image) - batch.target).square().mean()

    def predict_step(self, batch):
        return self(batch.image)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> stexp.Model:
    """A user's own method on sections made by hand, in a folder that goes with it."""
    folder = tmp_path_factory.mktemp("own")
    by_hand = make_sections(folder, n_spots=25)
    panel = [f"g{i:02d}" for i in range(20)]
    data = stexp.SpotDataModule(
        by_hand, "strict", "C", image_encoder="tiny", panel=panel, tile_px=16, cache_dir=folder / "cache", name="mine"
    )
    return stexp.fit(Linear(len(data.panel), scale=2.0), data, max_epochs=2, seed=3, **QUICK)


# one run, two ways


@pytest.mark.slow
def test_python_and_command_train_the_same(model: stexp.Model, strict: Path) -> None:
    ours, theirs = (ad.read_h5ad(folder / "predictions.h5ad") for folder in (model.folder, strict))
    assert list(ours.obs_names) == list(theirs.obs_names) and list(ours.var_names) == list(theirs.var_names)
    np.testing.assert_array_equal(ours.layers["predicted"], theirs.layers["predicted"])
    for name in ("metrics.json", "per_gene.csv", "audit.json"):
        assert (model.folder / name).read_bytes() == (strict / name).read_bytes(), name
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (model.folder, strict)]
    assert {path.name for path in model.folder.iterdir()} >= {path.name for path in strict.iterdir()} - {"model.stexp"}
    differing = set(differing_keys(*configs))
    assert differing <= {"output_dir", "callbacks.last.dirpath", "logger.save_dir", "hardware.keep_memory"}, differing


def test_a_finished_fit_is_not_repeated(model: stexp.Model, data: stexp.SpotDataModule) -> None:
    before = (model.folder / "provenance.json").stat().st_mtime_ns
    again = stexp.fit("mclstexp", data, max_epochs=4, accelerator="cpu", output_dir=model.folder)
    assert again.score.metrics == model.score.metrics
    assert (model.folder / "provenance.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"another config .*max_epochs"):
        stexp.fit("mclstexp", data, max_epochs=5, accelerator="cpu", output_dir=model.folder)


def test_a_fit_leaves_the_process_as_it_was(data: stexp.SpotDataModule) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer, panel = data.trainer, list(data.panel)
    fitted = stexp.fit("mean", data, max_epochs=1, name="baseline", **QUICK)
    assert torch.equal(torch.rand(3), expected)
    assert data.trainer is trainer and data.panel == panel

    assert fitted.score.name == "baseline"
    recorded = json.loads((fitted.folder / "provenance.json").read_text())["command"]
    assert recorded.startswith("stexp.fit('mean', SpotDataModule(...), max_epochs=1, ") and "baseline" in recorded


# what a model predicts


def test_held_out_spots_come_with_their_truth(model: stexp.Model, data: stexp.SpotDataModule) -> None:
    adata = model.predict(data)
    kept = ad.read_h5ad(model.folder / "predictions.h5ad")
    np.testing.assert_array_equal(adata.X, kept.X)
    np.testing.assert_array_equal(model.predict(data, progress=False).X, kept.X)
    training = json.loads(adata.uns["stexp"]["training"])["trainings"]
    assert [each["sections"] for each in training] == [data.names("train", "validation")]
    np.testing.assert_array_equal(adata.layers["observed"], data.target[data.rows("test")])


@pytest.mark.slow
def test_a_section_is_predicted_at_its_spots(
    model: stexp.Model, data: stexp.SpotDataModule, sections: list[stexp.Section], saved: Path, tmp_path: Path
) -> None:
    kept = model.predict(data)
    adata = model.predict(sections[0], progress=False)
    assert list(adata.obs_names) == list(kept.obs_names)
    assert list(adata.obs["total_counts"]) == list(kept.obs["total_counts"])
    np.testing.assert_allclose(adata[:, kept.var_names].X, kept.X, atol=1e-4)
    np.testing.assert_array_equal(adata[:, kept.var_names].layers["observed"], kept.layers["observed"])

    loaded = stexp.load_model(saved)
    copied = stexp.load_model(loaded.save(tmp_path / "copy.stexp"))
    np.testing.assert_array_equal(copied.predict(data, progress=False).X, adata[:, model.panel].X)
    assert copied.panel == model.panel and copied.facts == loaded.facts
    with pytest.raises(InputError, match=r"exists; .*overwrite=True"):
        model.save(saved)
    with pytest.raises(InputError, match="loaded"):
        _ = loaded.score


@pytest.fixture(scope="module")
def saved(model: stexp.Model, tmp_path_factory) -> Path:
    return model.save(tmp_path_factory.mktemp("saved") / "mine.stexp")


def test_a_model_takes_the_place_of_another_when_it_is_whole(saved: Path, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "mine.stexp"
    shutil.copytree(saved, path)
    loaded = stexp.load_model(path)
    loaded.save(path, overwrite=True)
    assert stexp.load_model(path).facts == loaded.facts, "onto itself"
    (tmp_path / "link").symlink_to(path)
    for inside in (path / "inner", tmp_path / "link" / "inner"):
        with pytest.raises(InputError, match="lie in each other"):
            loaded.save(inside)
    for option in ({"bank": "float16"}, {"prototypes": 5}, {"folds": ["run"]}, {"alpha": None}):
        with pytest.raises(InputError, match=f"{next(iter(option))}: this model was loaded"):
            loaded.save(tmp_path / "other.stexp", **option)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        stexp.load_model(saved).save(path, overwrite=True)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert {each.name for each in tmp_path.iterdir()} <= {"mine.stexp", "link", ".mine.stexp.lock"}


def test_options_of_slides_are_refused_for_sections(model: stexp.Model, sections: list[stexp.Section], data) -> None:
    for option in ({"coordinates": np.zeros((1, 2))}, {"grid": "square"}, {"spacing_um": 50.0}, {"um_per_px": 1.0}):
        for spots in (sections[0], data):
            with pytest.raises(InputError, match=f"{next(iter(option))} is of slides"):
                model.predict(spots, **option)


def test_truth_of_a_block_is_scaled_by_its_whole_section(saved: Path, data, sections: list[stexp.Section]) -> None:
    loaded = stexp.load_model(saved)
    loaded.facts["protocol"].update(truth="gene")
    blocks = stexp.SpotDataModule(sections[:1], "blocks", panel=data.panel)
    adata = loaded.predict(blocks, progress=False)
    whole = normalise(sections[0].counts(adata.var_names), sections[0].total_counts, stexp.Protocol("x", truth="gene"))
    rows = sections[0].spots.obs_names.get_indexer(adata.obs["spot"])
    assert 0 < len(rows) < len(sections[0])
    np.testing.assert_array_equal(adata.layers["observed"], whole[rows])


@pytest.mark.slow
def test_training_is_known_under_other_names_and_not_by_names(saved: Path, sections: list[stexp.Section], data) -> None:
    a, b, c = sections
    renamed = [a, replace(b, name="Q1", patient="A"), replace(c, name="B1", patient="B")]
    protocol, encoder = stexp.Protocol("x", validation=False), {"image_encoder": "tiny", "tile_um": 120}
    others = stexp.SpotDataModule(renamed, protocol, fold="A", panel=data.panel, **encoder)
    score = stexp.evaluate(stexp.load_model(saved).predict(others, progress=False), others)
    assert score.metrics["elsewhere"]["trained_on"] == ["Q1", "B1"]
    assert {"same_section_in_training", "same_patient_in_training"} <= set(score.audit.index[score.audit["leak"]])
    assert json.loads((score.folder / "provenance.json").read_text())["command"].startswith("stexp.evaluate(AnnData(")


def test_several_sections_are_joined(model: stexp.Model, sections: list[stexp.Section], data) -> None:
    pair = [replace(section, patient="X") for section in sections[:2]] + sections[2:]
    pair[1] = replace(pair[1], um_per_px=pair[1].um_per_px * 1.02)
    both = stexp.SpotDataModule(pair, fold="X", protocol=stexp.Protocol("half", validation=False), panel=data.panel)
    adata = model.predict(both, progress=False)
    assert adata.n_obs == sum(map(len, sections[:2])) and set(adata.uns["spatial"]) == {"A1", "B1"}
    assert list(adata.obs_names) == list(both.spots.index[both.rows("test")])
    assert "um_per_px" not in adata.uns["stexp"] and "slide" not in adata.uns["stexp"], "they differ"
    assert adata.uns["stexp"]["model"] == "mclstexp"
    for section in pair[:2]:
        factors = adata.uns["spatial"][section.name]["scalefactors"]
        assert factors["microns_per_pixel"] == section.um_per_px


def test_a_module_and_sections_of_ones_own(own: stexp.Model, tmp_path: Path, monkeypatch) -> None:
    data = own._run.data  # type: ignore[union-attr]
    assert own.score.metrics["model"] == "Linear" and own.score.metrics["data"] == "mine"
    config = RunFolder(own.folder).config
    assert config["seed"] == 3 and config["plugins"] == ["test_api"]
    assert config["model"] == {"_target_": "test_api.Linear", "name": "Linear", "scale": 2.0}
    kept = own.predict(data)
    assert kept.shape == (50, 20)
    anew = own.predict(data, device="cpu", progress=False)
    np.testing.assert_allclose(anew.X, kept.X, atol=1e-5)
    with pytest.raises(InputError, match="given from Python"):
        DataSet(config["data"]).read_sections(data.protocol)

    saved = own.save(tmp_path / "own.stexp")
    loaded = stexp.load_model(saved, plugins=["test_api"])
    np.testing.assert_array_equal(loaded.predict(data, device="cpu", progress=False).X, anew.X)
    monkeypatch.setattr(construct, "_allowed", {})  # as in another process
    with pytest.raises(InputError, match="made with the plug-in test_api"):
        stexp.load_model(saved)


def test_a_folder_without_a_name_goes_with_what_was_made_in_it(own: stexp.Model) -> None:
    work = WorkFolder()
    shutil.copytree(own.folder, work.path, dirs_exist_ok=True)
    score, path = stexp.Score(work), work.path
    del work
    gc.collect()
    assert score.metrics == own.score.metrics, "a score holds its folder"
    del score
    gc.collect()
    assert not path.exists()


# scores


def test_a_score_is_what_the_files_of_its_run_say(model: stexp.Model) -> None:
    score, metrics = model.score, json.loads((model.folder / "metrics.json").read_text())
    assert score.table.loc["mclstexp", "pearson_acg"] == metrics["scores"]["pearson_acg"]
    assert score.table.loc["colour ridge", "mse"] == metrics["floors"]["colour_ridge"]["mse"]
    assert score.table["kind"].value_counts().to_dict() == {"ceiling": 1, "method": 1, "oracle": 1, "floor": 6}
    assert score.sections.loc[("A1", "mclstexp"), "mae"] == metrics["sections"]["A1"]["scores"]["mae"]
    assert score.per_gene["pearson"].mean() == pytest.approx(metrics["scores"]["pearson_acg"], abs=1e-5)
    assert int(score.audit["leak"].sum()) == 0 and "panel_saw_test" in score.audit.index
    assert score.verdict in str(score)


def test_a_report_is_written_where_it_is_asked_for(model: stexp.Model, tmp_path: Path) -> None:
    page = model.score.report(tmp_path / "there" / "report.html")
    assert page.read_text() == (model.folder / "report.html").read_text()
    with pytest.raises(InputError, match="is a folder"):
        model.score.report(tmp_path)


def test_floors_of_data_are_those_of_a_run_on_them(model: stexp.Model, data: stexp.SpotDataModule) -> None:
    table, of_run = stexp.floors(data), model.score.table
    expected = of_run[of_run["kind"] != "method"].loc[table.index]
    assert list(table["kind"]) == list(expected["kind"])
    numbers = table.columns.drop("kind")
    np.testing.assert_allclose(table[numbers], expected[numbers], atol=1e-6)


def test_scores_are_compared_section_by_section(model: stexp.Model, tmp_path: Path) -> None:
    folder = tmp_path / "worse"
    shutil.copytree(model.folder, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["model"] = "worse"
    metrics["sections"]["A1"]["scores"]["pearson_acg"] -= 0.25
    (folder / "metrics.json").write_text(json.dumps(metrics))
    worse = stexp.Score(folder)
    assert stexp.compare([model.score, worse])["difference"].to_dict() == pytest.approx({"mclstexp": 0.25})
    against = stexp.compare([model.score, worse], baseline="colour ridge")["difference"]
    floor = model.score.table.loc["colour ridge", "pearson_acg"]
    assert against["mclstexp"] == pytest.approx(model.score.table.loc["mclstexp", "pearson_acg"] - floor)
    with pytest.raises(InputError, match=r"all of mclstexp; .*baseline="):
        stexp.compare([model.score])
    with pytest.raises(InputError, match="is no run folder"):
        stexp.Score(tmp_path)
    with pytest.raises(InputError, match="did you mean pearson_acg"):
        stexp.compare([model.score, worse], metric="pearson_agc")


def test_scores_of_other_data_are_not_compared(model: stexp.Model, own: stexp.Model) -> None:
    with pytest.raises(InputError, match="different data"):
        stexp.compare([model.score, own.score])


@pytest.fixture(scope="module")
def evaluated(model: stexp.Model, data: stexp.SpotDataModule) -> stexp.Score:
    return stexp.evaluate(model.predict(data), data)


def test_predictions_of_a_model_score_as_its_run(evaluated: stexp.Score, model: stexp.Model) -> None:
    ours, of_run = evaluated.metrics, model.score.metrics
    for key in ("model", "data", "scores", "floors", "ceiling", "n_spots", "n_genes"):
        assert ours[key] == of_run[key], key
    pd.testing.assert_frame_equal(evaluated.per_gene[model.score.per_gene.columns], model.score.per_gene)
    assert not evaluated.audit.loc["same_patient_in_training", "leak"], "what it was trained on goes with it"
    assert evaluated.report().is_file()


@pytest.mark.slow
def test_arrays_and_tables_are_scored_too(
    evaluated: stexp.Score, model: stexp.Model, data: stexp.SpotDataModule, tmp_path: Path
) -> None:
    adata = model.predict(data)
    array = stexp.evaluate(np.asarray(adata.X), data, scale="target", output_dir=tmp_path / "array")
    assert array.metrics["scores"] == evaluated.metrics["scores"] and array.name == "predictions"
    assert (tmp_path / "array" / "config.yaml").is_file()
    table = pd.DataFrame(adata.X, adata.obs_names, adata.var_names).iloc[::-1, ::-1]
    found = stexp.evaluate(table, data, name="table", scale="target")
    assert found.metrics["scores"] == pytest.approx(evaluated.metrics["scores"])
    assert list(array.audit.index[array.audit["unknown"]]) == ["training_sections_not_stated"]
    assert "0 (1 not known)" in repr(array)
    assert stexp.compare([evaluated, found])["difference"].iloc[0] == pytest.approx(0)


BAD_PREDICTIONS = {
    "shape": (lambda d: np.zeros((3, 4)), {}, r"array of \(3, 4\); \(152, 200\)"),
    "kind": (lambda d: [1.0], {}, "predicted: .*list, does not fit"),
    "text": (lambda d: np.full((152, 200), "a"), {}, "numbers would fit"),
    "layer": (lambda d: ad.AnnData(np.zeros((1, 1))), {"layer": "pred"}, "layer=pred"),
    "section": (lambda d: np.zeros((152, 200)), {"trained_on": ["Z9"]}, "Z9 is no section"),
    "scale": (lambda d: np.zeros((152, 200)), {"scale": "cmp"}, "did you mean cpm"),
    "file": (lambda d: "nothing.h5ad", {}, "no such file"),
}


@pytest.mark.parametrize("name", BAD_PREDICTIONS)
def test_bad_predictions_are_refused_in_one_line(name: str, data: stexp.SpotDataModule) -> None:
    make, options, words = BAD_PREDICTIONS[name]
    with pytest.raises(InputError, match=words) as error:
        stexp.evaluate(make(data), data, **options)
    assert "\n" not in str(error.value)


# data by name


def test_sections_know_the_call_that_read_them_until_they_are_changed(sections: list[stexp.Section]) -> None:
    assert source_of(sections).data == "demo"  # type: ignore[union-attr]
    assert source_of([replace(sections[0], um_per_px=3.0), *sections[1:]]) is None
    few = np.arange(len(sections[0])) < 100
    assert source_of([sections[0].take(few)]) is None


def test_a_run_folder_reads_the_same_sections_again(demo: Path, sections: list[stexp.Section]) -> None:
    data = stexp.SpotDataModule(sections[:0:-1], "blocks", cache_dir=demo / "cache")
    config = data.run_config({}, {})
    again = DataSet(config["data"]).read_sections(data.protocol)
    assert [section.name for section in again] == ["B1", "C1"] == data.section_names
    assert data.fold == "block1"


def test_settings_left_out_are_those_of_the_data_set(data: stexp.SpotDataModule, own: stexp.Model) -> None:
    assert (data.tile.px, data.tile.um, data.batch_size, data.augmentation) == (64, 120, 64, "dihedral")
    of_own = own._run.data  # type: ignore[union-attr]
    assert (of_own.tile.px, of_own.tile.um, of_own.batch_size, of_own.augmentation) == (16, None, 128, "dihedral")


def test_a_protocol_may_be_an_object(sections: list[stexp.Section]) -> None:
    protocol = stexp.Protocol("small", panel_size=20, validation=False)
    data = stexp.SpotDataModule(sections, protocol)
    assert data.protocol == protocol and len(data.panel) == 20 and not len(data.rows("validation"))


def test_values_of_python_become_plain_and_text_stays_text() -> None:
    values = {"a": Path("x"), "b": np.float32(0.5), "c": ("${oc.env:HOME}", np.int64(2))}
    assert plain({"a": Path("x"), "b": np.float32(0.5)}) == {"a": "x", "b": 0.5}
    config = run_config({"model": "stnet"}, {"data.leave_out": values["c"], "output_dir": "${fold}"})
    assert config["data"]["leave_out"] == ["${oc.env:HOME}", 2]
    assert config["callbacks"]["last"]["dirpath"] == "${fold}/checkpoints", "what refers to a key follows it"


class OwnProtocol(stexp.Protocol):
    pass


BAD = {
    "class of protocol": (
        lambda s: stexp.SpotDataModule(s, OwnProtocol("own")),
        "OwnProtocol .* itself",
    ),
    "protocol": (lambda s: stexp.SpotDataModule(s, "stric"), "did you mean strict"),
    "fold": (lambda s: stexp.SpotDataModule(s, fold="a"), "did you mean A"),
    "fold of another kind": (lambda s: stexp.SpotDataModule(s, fold=1), "fold: 1, int, does not fit; str"),  # type: ignore[arg-type]
    "encoder": (lambda s: stexp.SpotDataModule(s, image_encoder="uno"), "did you mean uni"),
    "encoder's argument": (
        lambda s: stexp.SpotDataModule(s, image_encoder_args={"froze": True}),
        "did you mean frozen",
    ),
    "tile": (lambda s: stexp.SpotDataModule(s, tile_um=-1), "data.tile_um=-1"),
    "no sections": (lambda s: stexp.SpotDataModule([]), "list is empty"),
    "no section": (lambda s: stexp.SpotDataModule(["A1"]), "sections: .*does not fit; Sequence.Section."),  # type: ignore[list-item]
    "twice": (lambda s: stexp.SpotDataModule([s[0], *s]), "same counts"),
    "genes": (lambda s: stexp.SpotDataModule(s, panel=[]), "data.panel"),
    "flags": (lambda s: stexp.SpotDataModule(s, leave_out=["blury"]), "no flag is called blury"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_refused_in_one_line(name: str, sections: list[stexp.Section]) -> None:
    call, words = BAD[name]
    with pytest.raises(InputError, match=words) as error:
        call(sections)
    assert "\n" not in str(error.value)


BAD_FITS = {
    "method": (lambda d: stexp.fit("stnett", d), "did you mean stnet"),
    "class": (lambda d: stexp.fit(Linear, d), "is a class"),  # type: ignore[arg-type]
    "no method": (lambda d: stexp.fit(torch.nn.Linear(1, 1), d), "method: Linear, does not fit"),  # type: ignore[arg-type]
    "no data": (lambda d: stexp.fit("mean", d.every_section), "data: .*does not fit; SpotDataModule"),
    "epochs": (lambda d: stexp.fit("mean", d, max_epochs=0), "max_epochs=0"),
    "argument": (lambda d: stexp.fit("stnet", d, model_args={"lrr": 1}), "did you mean lr"),
    "value": (lambda d: stexp.fit("stnet", d, model_args={"lr": 2}, **QUICK), "model.lr=2"),
    "trainer": (lambda d: stexp.fit("mean", d, trainer_args={"gradient_clip": 1}, **QUICK), "gradient_clip_val"),
    "limits": (lambda d: stexp.fit("mean", d, trainer_args={"fast_dev_run": True}), "fast_dev_run"),
    "devices": (lambda d: stexp.fit("mean", d, accelerator="cpu", devices=2), "trains on several"),
    "logger": (lambda d: stexp.fit("mean", d, logger="cvs"), "did you mean csv"),
    "encoder": (lambda d: stexp.fit("stnet", d, model_args={"image_encoder": "uni"}), "SpotDataModule"),
}


@pytest.mark.parametrize("name", BAD_FITS)
def test_bad_fits_are_refused_in_one_line(name: str, data: stexp.SpotDataModule) -> None:
    call, words = BAD_FITS[name]
    with pytest.raises(InputError, match=words) as error:
        call(data)
    assert "\n" not in str(error.value)


# pictures


def test_genes_are_drawn_where_their_spots_are(model: stexp.Model, data: stexp.SpotDataModule) -> None:
    adata, genes = model.predict(data), ["TUMOUR01", "STROMA03"]
    figure = stexp.plot.genes(adata, genes)
    maps = [ax for ax in figure.axes if ax.get_title()]
    titles = [ax.get_title().split()[:2] for ax in maps]
    assert titles == [[gene, layer] for layer in ("observed", "predicted") for gene in genes]
    spots = next(each for each in maps[3].collections if each.get_array() is not None)
    np.testing.assert_allclose(spots.get_array(), adata[:, "STROMA03"].layers["predicted"].ravel())
    np.testing.assert_allclose(spots.get_offsets(), adata.obsm["spatial"])
    low, high = maps[3].get_ylim()
    assert low > high, "y points down, as in the image"
    assert figure._repr_png_().startswith(b"\x89PNG")
    spread = stexp.plot.genes(adata, genes[:1], layers=["observed", "uncertainty"])
    assert not any("r =" in ax.get_title() for ax in spread.axes), "only predictions are held against the truth"


def test_five_genes_need_two_lines_and_other_anndata_are_drawn_too() -> None:
    values = np.random.default_rng(0).random((30, 5))
    adata = ad.AnnData(values, obsm={"spatial": np.argwhere(np.ones((5, 6))) * 100.0})
    figure = stexp.plot.genes(adata)
    assert len([ax for ax in figure.axes if ax.get_title()]) == 5
    assert len({ax.get_subplotspec().rowspan.start for ax in figure.axes if ax.get_title()}) == 2
    with pytest.raises(InputError, match="genes: 9 not in adata"):
        stexp.plot.genes(adata, "9")
    with pytest.raises(InputError, match="layers: predictd"):
        stexp.plot.genes(adata, layers="predictd")
    with pytest.raises(InputError, match="spatial"):
        stexp.plot.genes(ad.AnnData(values))


def test_scores_are_drawn_as_bars_of_their_length(model: stexp.Model, sections: list[stexp.Section]) -> None:
    (ax,) = stexp.plot.scores(model.score).axes
    drawn = dict(zip([text.get_text() for text in ax.get_yticklabels()], ax.patches, strict=True))
    for name, row in model.score.table.iloc[1:].iterrows():
        assert drawn[name].get_width() == pytest.approx(row["pearson_acg"]), name
    assert stexp.plot.section(sections[0]).axes


# what objects say of themselves


def test_objects_say_what_they_hold(model: stexp.Model, data, sections: list[stexp.Section]) -> None:
    assert repr(sections[0]).startswith("<section A1, patient A, spots 152, genes 200")
    assert "fold A" in repr(data) == str(data) and "152 spots of 1 section" in repr(data)
    acg = f"{model.score.metrics['scores']['pearson_acg']:.3f}"
    assert acg in repr(model) and acg in repr(model.score)
    for each in (model, data, sections[0], model.score):
        assert "<table>" in each._repr_html_() and "\n" not in repr(each)


def test_text_from_data_is_escaped_in_notebooks(tmp_path: Path) -> None:
    section = make_section(tmp_path, patient="<script>")
    assert "<script>" not in section._repr_html_() and "&lt;script&gt;" in section._repr_html_()


def test_the_package_is_typed_and_every_name_is_there() -> None:
    for name in stexp.__all__:
        assert getattr(stexp, name) is not None
    assert set(dir(stexp)) == set(stexp.__all__)
    assert (Path(stexp.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'fti'"):
        stexp.fti  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, stexp; print([name for name in ('torch', 'pandas', 'numpy', 'hydra') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_names_are_the_choices_of_conf() -> None:
    for protocol in (path.stem for path in (CONF / "protocol").glob("*.yaml")):
        assert run_config({"protocol": protocol}, {})["protocol"]["name"] == protocol
