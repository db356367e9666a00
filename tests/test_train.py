"""The main job, from sections to report, on small demo data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from stexp import InputError, callbacks, config
from stexp.data.splits import folds
from stexp.rescore import predict_again
from stexp.score import score_run
from stexp.train import train

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


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """Root of a demo data set: three patients with one section each."""
    root = tmp_path_factory.mktemp("demo")
    config.load_sections(configure(root, root / "unused"), config.build(configure(root, root / "unused").protocol))
    return root


def configure(root: Path, out: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose(
            "train",
            [
                "data=demo",
                f"data.root={root / 'data'}",
                f"data.cache_dir={root / 'cache'}",
                "data.reader.patients=3",
                "data.reader.sections_per_patient=1",
                f"output_dir={out}",
                "trainer.max_epochs=2",
                "trainer.accelerator=cpu",
                "hardware.keep_memory=false",
                *overrides,
            ],
        )


def run(root: Path, out: Path, *overrides: str, fold: str | None = None) -> dict:
    cfg = configure(root, out, *overrides)
    protocol = config.build(cfg.protocol)
    sections = config.load_sections(cfg, protocol)
    return train(cfg, sections, fold or folds(sections, protocol)[0], out)


@pytest.fixture(scope="session")
def strict(demo: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "strict"
    run(demo, out, "trainer.max_epochs=4")
    return out


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


def test_finished_run_is_not_run_again_and_another_config_is_refused(strict: Path, demo: Path) -> None:
    before = (strict / "predictions.h5ad").stat().st_mtime_ns
    run(demo, strict, "trainer.max_epochs=4")
    assert (strict / "predictions.h5ad").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"another config \(model\.lr"):
        run(demo, strict, "trainer.max_epochs=4", "model.lr=0.01")


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


def test_scoring_again_gives_the_same_and_needs_no_torch(strict: Path) -> None:
    before = (strict / "metrics.json").read_bytes()
    code = (
        f"import sys; from pathlib import Path; from stexp.score import score_run; score_run(Path({str(strict)!r})); "
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


def command(name: str, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"stexp.{name}", *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["fold=Z"], "fold=Z is no patient with an image; choose one of A, B, C, or all"),
        (["fold=A1"], "A1 is a section of patient A"),
        (["data.sections=[A1]", "fold=A"], "no section with an image is left to train on"),
        (["data.sections=[A1,X9]"], "X9 not in demo"),
        (["model.k=100000"], "reference spots; choose 1 to"),
        (["model.distance=l3"], "choose cosine, l1, l2"),
        (["trainer.accelerator=gpu"], "no GPU here; take cpu or auto"),
        (["trainer.accelerator=tpu"], "choose auto, cpu or gpu"),
        (["data.augmentation=all"], "choose none, dihedral, paper"),
        (["image_encoder.name=densnet121"], "timm has no model 'densnet121'"),
        (["image_encoder.pretrained=true", "image_encoder.checkpoint=nowhere.safetensors"], "does not exist"),
        (["data.panel_file=nowhere.txt"], "panel file nowhere.txt does not exist"),
        (["+model.kk=3"], "takes no key 'kk'; did you mean 'k'?"),
    ],
)
def test_bad_input_is_one_clear_line(demo: Path, tmp_path: Path, overrides: list[str], says: str) -> None:
    cfg = configure(demo, tmp_path / "run", *overrides)
    with pytest.raises(InputError) as error:
        sections = config.load_sections(cfg, config.build(cfg.protocol))
        train(cfg, sections, cfg.fold or "A", tmp_path / "run")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_command_line_ends_with_status_2_and_one_line(demo: Path, tmp_path: Path) -> None:
    done = command(
        "train",
        f"data.root={demo / 'data'}",
        "data.reader.patients=3",
        "data.reader.sections_per_patient=1",
        f"data.cache_dir={demo / 'cache'}",
        "fold=Z",
        f"output_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("stexp: error: fold=Z")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["train", "score", "floors", "prepare", "report"])
def test_help_teaches_without_importing_torch(name: str) -> None:
    code = (
        f"import sys, runpy\nsys.argv = ['stexp-{name}', '--help']\n"
        f"try:\n    runpy.run_module('stexp.{name}', run_name='__main__')\n"
        "except SystemExit:\n    pass\nassert 'torch' not in sys.modules, 'help imports torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"stexp-{name}" in done.stdout and len(done.stdout.splitlines()) > 3


def test_prepare_and_floors_print_what_they_found(demo: Path, tmp_path: Path) -> None:
    common = [f"data.root={demo / 'data'}", "data.reader.patients=3", "data.reader.sections_per_patient=1"]
    prepared = command("prepare", *common, f"data.cache_dir={demo / 'cache'}")
    assert prepared.returncode == 0 and "demo: 3 sections of 3 patients" in prepared.stdout
    floors = command("floors", *common)
    assert floors.returncode == 0 and "depth_oracle (oracle)" in floors.stdout


def test_config_of_a_run_is_data(strict: Path, tmp_path: Path) -> None:
    cfg = config.load_run(strict)
    assert OmegaConf.to_container(cfg)["fold"] == "A"
    (tmp_path / "config.yaml").write_text("model: {_target_: os.system, command: 'touch owned'}\n")
    loaded = config.load_run(tmp_path)
    with pytest.raises(InputError, match="not allowed"):
        config.build(loaded.model)
    with pytest.raises(InputError, match="no run folder"):
        config.load_run(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.data
def test_floors_of_her2st_are_those_of_the_docs(real_data: Path) -> None:
    done = command("floors", "data=her2st", "protocol=paper", STEXP_DATA=str(real_data))
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:]}
    assert rows["depth_oracle"][2:4] == ["0.3037", "0.5810"]
    assert rows["mean"][3:5] == ["0.7115", "0.6716"]


def test_a_damaged_cache_is_made_again(demo: Path, tmp_path: Path) -> None:
    first = run(demo, tmp_path / "a", "trainer.max_epochs=1", f"data.cache_dir={tmp_path / 'cache'}")
    for path in [*(tmp_path / "cache").rglob("*.npy")]:
        path.write_bytes(path.read_bytes()[:200])
    again = run(demo, tmp_path / "b", "trainer.max_epochs=1", f"data.cache_dir={tmp_path / 'cache'}")
    assert again["scores"] == first["scores"]


def test_a_damaged_checkpoint_is_said_in_one_line(demo: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(self, trainer, model):
        raise RuntimeError("killed")

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr("stexp.models.mclstexp.MclSTExp.on_predict_start", lambda self: stop(self, None, None))
        run(demo, out, "trainer.max_epochs=1")
    last = out / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
        run(demo, out, "trainer.max_epochs=1")


def test_a_protocol_in_a_prediction_file_is_never_called(strict: Path, tmp_path: Path) -> None:
    adata = ad.read_h5ad(strict / "predictions.h5ad")
    adata.uns["stexp"]["protocol"] = json.dumps({"_target_": "os.system", "command": f"touch {tmp_path / 'owned'}"})
    folder = tmp_path / "hostile"
    folder.mkdir()
    adata.write_h5ad(folder / "predictions.h5ad")
    (folder / "floors.h5ad").write_bytes((strict / "floors.h5ad").read_bytes())
    with pytest.raises(InputError, match="do not say their protocol"):
        score_run(folder)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(InputError, match="not allowed"):
        config.build(
            {"_target_": "pytorch_lightning.cli.instantiate_class", "args": [], "init": {"class_path": "os.system"}}
        )


def test_a_method_needs_no_more_than_the_recipe_says(demo: Path, tmp_path: Path, monkeypatch) -> None:
    class Mean(pl.LightningModule):
        """One number a gene, learned: CONTRIBUTING.md's recipe and nothing else."""

        def __init__(self, n_genes: int, n_positions: int) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.zeros(n_genes))

        def training_step(self, batch, batch_idx):
            return (self.mean - batch.target).square().mean()

        def predict_step(self, batch, batch_idx=0):
            return {"predicted": self.mean.detach().expand_as(batch.target)}

        validation_step = predict_step

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.3)

    module = ModuleType("stexp.models.mean")
    module.Mean, Mean.__module__ = Mean, module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cfg = configure(demo, tmp_path / "mean", "trainer.max_epochs=6", "protocol.validation=false")
    OmegaConf.set_struct(cfg, False)
    cfg.model = {"_target_": "stexp.models.mean.Mean", "name": "mean"}
    sections = config.load_sections(cfg, config.build(cfg.protocol))
    metrics = train(cfg, sections, "A", tmp_path / "mean")
    assert metrics["scores"]["pearson_acg"] == 0, "a constant has no skill"
    assert metrics["scores"]["mse"] < 1.5 * metrics["floors"]["mean"]["mse"]
    assert not (tmp_path / "mean" / "embeddings.h5ad").exists()
    with pytest.raises(InputError, match="does not retrieve"):
        predict_again(tmp_path / "mean", {"k": 5}, "panel", None)
