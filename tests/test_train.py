"""The main job, from sections to report, on small demo data."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import warm
from demo_run import configure, overrides_of, run
from omegaconf import OmegaConf

from stexp import config
from stexp.cli.fold import train
from stexp.cli.train import main
from stexp.config.compose import compose
from stexp.errors import InputError
from stexp.models.method import Method, Prediction
from stexp.runs.rescore import predict_again
from stexp.runs.scoring import score_run
from stexp.training import callbacks
from stexp.training.fit import in_words

RUN_FOLDER = {
    "config.yaml",
    "predictions.h5ad",
    "floors.h5ad",
    "embeddings.h5ad",
    "metrics.json",
    "per_gene.csv",
    "audit.json",
    "report.html",
    "provenance.json",
}


def test_run_folder_is_complete_and_beats_the_mean(strict: Path) -> None:
    assert {path.name for path in strict.iterdir()} >= RUN_FOLDER
    assert {path.name for path in (strict / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    metrics = json.loads((strict / "metrics.json").read_text())
    assert metrics["protocol"] == "strict" and metrics["fold"] == "A"
    assert metrics["scores"]["pearson_acg"] > 0.15, "morphology explains a third of the demo's genes"
    assert metrics["scores"]["mse"] < metrics["floors"]["mean"]["mse"]
    assert set(metrics["floors"]) == {
        "mean",
        "nearest_section",
        "depth_oracle",
        "colour_ridge",
        "coordinates",
        "knn_features",
        "ridge_features",
    }
    assert metrics["scores"]["pearson_acg"] < metrics["ceiling"]["pearson_acg"] <= 1
    assert metrics["scored_as"]["paper"]["scores"]["mse"] is None, "another scale: errors would mean nothing"
    assert json.loads((strict / "audit.json").read_text())["leaks"] == 0


def test_genes_that_morphology_cannot_explain_stay_unexplained(strict: Path, demo: Path) -> None:
    genes = pd.read_csv(strict / "per_gene.csv").merge(pd.read_csv(demo / "data" / "genes.csv"), on="gene")
    mean = genes.groupby("family")["pearson"].mean()
    assert mean["full"] > mean["part"] > mean["none"] + 0.1
    assert abs(mean["none"]) < 0.05


def test_predictions_hold_each_test_spot_once_and_open_in_scanpy(strict: Path) -> None:
    import scanpy as sc

    adata = ad.read_h5ad(strict / "predictions.h5ad")
    assert adata.obs_names.is_unique and set(adata.obs["patient"]) == {"A"}
    assert np.isfinite(adata.layers["uncertainty"]).all() and (adata.layers["uncertainty"] >= 0).all()
    assert not set(adata.obs["neighbour_patient"]) & {"A"}
    axes = sc.pl.spatial(adata, color=adata.var_names[0], library_id="A1", show=False)
    assert len(axes) == 1


def test_checkpoint_is_plain_and_says_what_it_needs(strict: Path) -> None:
    checkpoint = torch.load(strict / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["method"] == {"name": "mclstexp", "image_encoder": "test_resnet"}
    about = checkpoint["SpotDataModule"]
    assert about["panel"] == list(ad.read_h5ad(strict / "predictions.h5ad").var_names)
    assert about["protocol"]["name"] == "strict" and about["tile_um"] == 120 and about["array_size"] > 1


def test_the_best_checkpoint_holds_no_more_than_its_weights(strict: Path) -> None:
    path = strict / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint["state_dict"].values())
    assert path.stat().st_size < 1.1 * weights + 100_000


@pytest.mark.slow
def test_interrupted_run_ends_as_an_uninterrupted_one(strict: Path, demo: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(self, trainer, model, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            raise RuntimeError("killed")

    out = tmp_path / "resumed"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(callbacks.EpochLines, "on_train_batch_end", stop)
        run(demo, out, "trainer.max_epochs=4")
    assert not (out / "metrics.json").exists()
    run(demo, out, "trainer.max_epochs=4")
    for name in ("metrics.json", "per_gene.csv", "audit.json"):
        assert (out / name).read_bytes() == (strict / name).read_bytes(), name
    ours, theirs = (ad.read_h5ad(folder / "predictions.h5ad") for folder in (out, strict))
    assert np.array_equal(ours.layers["predicted"], theirs.layers["predicted"])
    first, second = (pd.read_csv(out / "logs" / "csv" / f"version_{i}" / "metrics.csv")["epoch"] for i in (0, 1))
    assert first.max() == 2 and (second.min(), second.max()) == (2, 3), "the log goes on where it stopped"


@pytest.mark.slow
def test_same_seed_gives_identical_files(demo: Path, tmp_path: Path, strict: Path) -> None:
    for name in ("a", "b"):
        run(demo, tmp_path / name, "trainer.max_epochs=1")
    for name in ("metrics.json", "per_gene.csv", "audit.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    a, b = (ad.read_h5ad(tmp_path / name / "predictions.h5ad") for name in ("a", "b"))
    for layer in a.layers:
        assert np.array_equal(a.layers[layer], b.layers[layer], equal_nan=True), layer
    other = run(demo, tmp_path / "c", "trainer.max_epochs=1", "seed=1")
    assert other["scores"] != json.loads((tmp_path / "a" / "metrics.json").read_text())["scores"]


def test_choosing_genes_leaves_the_number_of_threads(demo: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []

    def stop(*_) -> None:
        seen.append(torch.get_num_threads())
        raise RuntimeError("far enough")

    monkeypatch.setattr("stexp.data.datamodule.encode_tiles", stop)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="far enough"):
        run(demo, tmp_path / "run")
    assert seen == [before]


def test_all_folds_end_with_one_table(demo: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def scored(acg: float | None, floor: float) -> dict:
        def scores(value):
            return {"pearson_acg": value, "pearson_heg50": value and value + 0.1}

        floors = {"mean": scores(0.0), "colour_ridge": scores(floor), "depth_oracle": scores(0.9)}
        return {"data": "demo", "model": "m", "protocol": "strict", "scores": scores(acg), "floors": floors}

    made = {"A": scored(0.2, 0.1), "B": scored(0.4, -0.1), "C": scored(None, 0.2)}
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # its handler would outlive the captured stream
    monkeypatch.setattr("stexp.cli.fold.train", lambda cfg, sections, fold, folder: made[fold] | {"fold": folder.name})
    main.__wrapped__(configure(demo, tmp_path, "fold=all"))
    head, _, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert " ".join(head) == "demo, m, protocol strict: 3 folds"
    assert rows == [
        ["A", "0.2000", "0.3000", "colour_ridge", "0.1000", "0.2000"],
        ["B", "0.4000", "0.5000", "mean", "0.0000", "0.0000"],
        ["C", "-", "-", "colour_ridge", "0.2000", "0.3000"],
        ["mean", "0.3000", "0.4000", "0.1000", "0.1667"],
    ]


def test_what_was_chosen_is_said_in_words() -> None:
    assert in_words({"k": 50, "k_validation_pearson": {"5": 0.034, "50": 0.0745}}) == (
        "k=50 by a validation score of 0.0745"
    )
    assert in_words({"k": 5}) == "k=5"
    assert in_words({"scale": 0.9, "weights": {"ridge 1": 0.7}}) == "scale=0.9", "weights are no scores"


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, Path]]:
    """Folds and folders that the command would train."""
    made: list[tuple[str, Path]] = []
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.setattr("stexp.cli.fold.train", lambda cfg, sections, fold, folder: made.append((fold, folder)))
    return made


def test_the_folder_of_a_run_holds_the_name_of_the_fold_that_was_not_named(demo: Path, trained) -> None:
    by_itself = [text for text in overrides_of(demo, demo) if not text.startswith("output_dir=")]
    main.__wrapped__(compose("train", by_itself))
    assert trained == [("A", Path("runs/demo-mclstexp-strict-A-s0"))]


def test_a_wrong_fold_leaves_no_folder(demo: Path, tmp_path: Path, trained, capsys) -> None:
    with pytest.raises(SystemExit):
        main.__wrapped__(configure(demo, tmp_path / "run", "fold=Z"))
    assert "fold=Z is no patient" in capsys.readouterr().err
    assert not trained and not (tmp_path / "run").exists()


def test_a_foreign_folder_is_refused_before_sections_are_read(
    strict: Path, demo: Path, trained, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("stexp.data.dataset.DataSet.read_sections", lambda *_: pytest.fail("sections are read"))
    with pytest.raises(SystemExit):
        main.__wrapped__(configure(demo, strict, "fold=A", "trainer.max_epochs=3"))
    assert "holds a run with another config (trainer.max_epochs)" in capsys.readouterr().err


def test_keys_of_the_data_are_judged_before_weights_are_loaded(demo: Path, tmp_path: Path) -> None:
    absent = ["image_encoder.pretrained=true", "image_encoder.checkpoint=nowhere.safetensors"]
    cfg = configure(demo, tmp_path / "run", "data.augmentation=all", *absent)
    with pytest.raises(InputError, match="augmentation=all: choose none"):
        train(cfg, config.dataset_of(cfg).read_sections(config.build(cfg.protocol)), "A", tmp_path / "run")


@pytest.mark.parametrize(("checkpoint", "says"), [(False, "no epoch is finished"), (True, "goes on from .*last.ckpt")])
def test_what_is_said_of_ctrl_c_is_true(checkpoint: bool, says: str, demo: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_) -> None:
        if checkpoint:
            (tmp_path / "checkpoints").mkdir()
            (tmp_path / "checkpoints" / "last.ckpt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("stexp.api.train._train", interrupted)
    with pytest.raises(KeyboardInterrupt, match=says):
        train(configure(demo, tmp_path), [], "A", tmp_path)


@pytest.mark.slow
def test_paper_protocol_names_its_leaks(demo: Path, tmp_path: Path) -> None:
    metrics = run(demo, tmp_path / "paper", "protocol=paper", "protocol.k=50", "trainer.max_epochs=1", fold="B1")
    assert metrics["protocol"] == "paper" and set(metrics["scored_as"]) == {"strict"}
    assert not (tmp_path / "paper" / "checkpoints" / "best.ckpt").exists(), "no validation, no best"
    leaks = {
        item["name"] for item in json.loads((tmp_path / "paper" / "audit.json").read_text())["items"] if item["leak"]
    }
    # one section a patient: nothing of the patient is left to leak
    assert leaks == {
        "panel_saw_test",
        "heg_saw_test",
        "truth_scaled_by_test_section",
        "spot_embedding_depends_on_batch",
        "settings_chosen_on_test",
    }


@pytest.mark.slow
def test_scoring_again_gives_the_same_and_needs_no_torch(strict: Path) -> None:
    before = (strict / "metrics.json").read_bytes()
    code = (
        f"import sys; from pathlib import Path; from stexp.runs.scoring import score_run; "
        f"score_run(Path({str(strict)!r})); "
        "assert 'torch' not in sys.modules, 'scoring imports torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (strict / "metrics.json").read_bytes() == before


def test_retrieval_again_with_the_same_settings_gives_the_same(strict: Path, tmp_path: Path) -> None:
    k = json.loads((strict / "metrics.json").read_text())["chosen"]["k"]
    same = predict_again(strict, {"k": k}, "panel", str(tmp_path / "same"))
    ours, theirs = (ad.read_h5ad(folder / "predictions.h5ad") for folder in (same, strict))
    np.testing.assert_allclose(ours.layers["predicted"], theirs.layers["predicted"], atol=1e-5)
    assert score_run(same)["floors"] == json.loads((strict / "metrics.json").read_text())["floors"]

    one = predict_again(strict, {"k": 1, "weighting": "mean"}, "panel", str(tmp_path / "one"))
    assert (ad.read_h5ad(one / "predictions.h5ad").obs["neighbour_effective_k"] == 1).all()
    assert json.loads((one / "audit.json").read_text())["facts"]["k_chosen_on"] == "after_scoring"
    with pytest.raises(InputError, match="not on the training side"):
        predict_again(strict, {"reference": ["A1"]}, "panel", str(tmp_path / "leak"))


@pytest.mark.slow
def test_genes_outside_the_panel_are_predicted(demo: Path, tmp_path: Path) -> None:
    panel = tmp_path / "panel.txt"
    panel.write_text("TUMOUR01\nSTROMA01\nHIDDEN01\n")
    run(demo, tmp_path / "few", f"data.panel_file={panel}", "data.panel_saw_test=false", "trainer.max_epochs=2")
    more = predict_again(tmp_path / "few", {}, ["TUMOUR02", "FAT01"], None)
    adata = ad.read_h5ad(more / "predictions.h5ad")
    assert list(adata.var_names) == ["TUMOUR02", "FAT01"]
    assert score_run(more)["n_genes"] == 2
    with pytest.raises(InputError, match=r"1 of 1 genes .*NOGENE"):
        predict_again(tmp_path / "few", {}, ["NOGENE"], None)


def test_a_method_needs_no_more_than_the_recipe_says(demo: Path, tmp_path: Path, monkeypatch) -> None:
    class Mean(Method):
        """One number a gene, learned: CONTRIBUTING.md's recipe and nothing else."""

        def __init__(self, n_genes: int, n_positions: int) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.zeros(n_genes))

        def training_step(self, batch, batch_idx):
            return (self.mean - batch.target).square().mean()

        def predict_step(self, batch, batch_idx=0):
            return Prediction(self.mean.detach().expand_as(batch.target))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.3)

    module = ModuleType("stexp.models.mean")
    module.Mean, Mean.__module__ = Mean, module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cfg = configure(demo, tmp_path / "mean", "trainer.max_epochs=6", "protocol.validation=false")
    OmegaConf.set_struct(cfg, False)
    cfg.model = {"_target_": "stexp.models.mean.Mean", "name": "mean"}
    sections = config.dataset_of(cfg).read_sections(config.build(cfg.protocol))
    metrics = train(cfg, sections, "A", tmp_path / "mean")
    assert metrics["scores"]["pearson_acg"] == 0, "a constant has no skill"
    assert metrics["scores"]["mse"] < 1.5 * metrics["floors"]["mean"]["mse"]
    assert not (tmp_path / "mean" / "embeddings.h5ad").exists()
    with pytest.raises(InputError, match="does not retrieve"):
        predict_again(tmp_path / "mean", {"k": 5}, "panel", None)


@pytest.mark.slow
def test_ctrl_c_in_the_fit_says_how_to_go_on(demo: Path, tmp_path: Path) -> None:
    arguments = [*overrides_of(demo, tmp_path / "run"), "trainer.max_epochs=10000"]
    command = [sys.executable, "-m", "stexp.cli.train", *arguments]
    with warm.begin(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            seen = next((line for line in process.stderr if "epoch 2/" in line), None)
            assert seen, "it trains"
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            assert process.wait() == 130, rest
        finally:
            process.kill()
    assert "interrupted" in rest and "the same command goes on" in rest and "Traceback" not in rest
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
