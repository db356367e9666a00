"""What every method of conf/model must do: learn, write a whole run folder, come back from a checkpoint."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import anndata as ad
import demo_run
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from encoders import frozen
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig

from stexp import config, files
from stexp.cli.fold import train
from stexp.errors import InputError
from stexp.evaluation.metrics import mean_pearson
from stexp.runs.rescore import predict_again
from stexp.training.checkpoints import load_checkpoint

METHODS = sorted(path.stem for path in (files.CONF / "model").glob("*.yaml"))

SHORT = {
    "bleep": ["trainer.max_epochs=4"],
    "deepspot": [
        *("data.batch_size=32", "model.dim=64", "model.dropout=0.0", "model.output_dropout=0.0", "model.lr=1e-3"),
        "trainer.max_epochs=12",
    ],
    "egn": [
        *("model.dim=64", "model.depth=2", "model.apart=spot", "model.n_exemplars=30", "model.lr=2e-3"),
        *("data.batch_size=8", "trainer.max_epochs=5"),
    ],
    "heclip": ["trainer.max_epochs=4"],
    "hest_ridge": ["model.penalty=3000"],
    "hist2st": [
        *("data.stain=macenko", "model.tile_share=1", "model.tile_px=8", "model.patch_px=2", "model.channels=64"),
        *("model.kernel_size=3", "model.mixer_depth=1", "model.depth=1", "model.heads=2", "model.graph_depth=1"),
        *("model.n_views=1", "model.positions=false", "model.start_from_mean=true", "model.dropout=0.0"),
        *("model.lr=3e-3", "trainer.max_epochs=60"),
    ],
    "histogene": [
        *("model.tile_share=1", "model.tile_px=4", "model.dim=256", "model.depth=1", "model.heads=2"),
        *("model.hidden=64", "model.start_from_mean=true", "model.dropout=0.0", "model.lr=3e-3"),
        "trainer.max_epochs=90",
    ],
    "m2ort": [
        *("model.dim=48", "model.depth=1", "model.heads=2", "model.head_dim=16", "model.hidden=32"),
        *("model.start_from_mean=true", "model.lr=2e-3", "data.batch_size=16", "trainer.max_epochs=8"),
    ],
    "mclstexp": ["model.k=50", "trainer.max_epochs=4"],
    "mclstexp_plus": ["model.k=50", "trainer.max_epochs=2"],
    "sepal": ["model.image_epochs=4", "model.image_lr=3e-3", "model.lr=3e-4", "trainer.max_epochs=6"],
    "stflow": [
        *("model.dim=64", "model.depth=1", "model.dropout=0.3", "model.output_dropout=0.0", "model.lr=1e-3"),
        *("model.start_from_mean=true", "model.standardise=true", "data.augmentation=none", "trainer.max_epochs=30"),
    ],
    "stgchb": ["trainer.max_epochs=6"],
    "stnet": ["model.lr=0.01", "trainer.max_epochs=2"],
    "thitogene": [
        *("data.stain=macenko", "model.tile_share=1", "model.tile_px=44", "model.capsules=4", "model.capsule_dim=2"),
        *("model.depth=1", "model.heads=2", "model.hidden=64", "model.graph_hidden=32", "model.graph_heads=2"),
        *("model.graph_dim=128", "model.positions=false", "model.start_from_mean=true", "model.lr=1e-3"),
        "trainer.max_epochs=25",
    ],
    "triplex": [
        *(f"model.{name}" for name in ("dim=64", "side=3", "lr=0.003", "global_depth=1", "neighbour_depth=1")),
        *(f"model.{name}=64" for name in ("fusion_hidden", "global_hidden", "neighbour_hidden")),
        *(f"model.{name}_heads=4" for name in ("global", "neighbour")),
        "data.batch_size=16",
        "trainer.max_epochs=10",
    ],
}
"""What a training of seconds on a few hundred spots needs instead of the published values."""

NO_SKILL = {"mean"}
"""Methods that predict the same for every spot."""

CLOSED = {"consensus", "hest_ridge", "mean"}
"""Methods that are one calculation, from validation spots, too: nothing is validated on these."""

FROM_NOTHING = {"hist2st", "m2ort", "thitogene"}
"""Methods that learn to see here from one section alone; the mean floor has the validation section, too."""

RUN_FOLDER = {
    "config.yaml",
    "predictions.h5ad",
    "floors.h5ad",
    "metrics.json",
    "per_gene.csv",
    "audit.json",
    "report.html",
    "provenance.json",
}


def configure(root: Path, out: Path, method: str, *overrides: str) -> DictConfig:
    short = ["trainer.max_epochs=3", "hardware.threads=1", *SHORT.get(method, [])]
    return demo_run.configure(root, out, f"model={method}", *short, *overrides)


def run(cfg: DictConfig, fold: str) -> dict:
    return train(cfg, config.dataset_of(cfg).read_sections(config.build(cfg.protocol)), fold, Path(cfg.output_dir))


def reload(cfg: DictConfig, fold: str, checkpoint: str):
    """A model of another seed with the weights of a checkpoint, and the data it was trained on."""
    protocol = config.build(cfg.protocol)
    pl.seed_everything(cfg.seed, verbose=False)  # the frozen encoder of the demo has random weights, of the run's seed
    encoder = frozen(config.build(cfg.image_encoder), cfg.data.cache_dir)
    dataset = config.dataset_of(cfg)
    data = dataset.serve(dataset.read_sections(protocol), protocol, fold, cfg.seed, encoder=encoder)
    torch.manual_seed(99)
    arguments = {key: value for key, value in config.to_plain(cfg.model).items() if key != "name"}
    model = config.build(arguments, n_genes=len(data.panel), n_positions=data.array_size, n_features=data.n_features)
    state = load_checkpoint(Path(cfg.output_dir) / "checkpoints" / checkpoint)
    data.load_state_dict(state["SpotDataModule"])
    model.load_state_dict(state["state_dict"])
    return model, data


def predict(model: pl.LightningModule, data, precision: str) -> np.ndarray:
    trainer = pl.Trainer(
        accelerator="cpu", precision=precision, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    outputs = trainer.predict(model, datamodule=data)
    return torch.cat([output.predicted.float() for output in outputs]).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_learns_reloads_and_resumes(method: str, demo: Path, tmp_path: Path) -> None:
    cfg = configure(demo, tmp_path / "run", method, "hardware.precision=32-true")
    metrics = run(cfg, "A")
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} >= RUN_FOLDER
    best = [] if method in CLOSED else ["best.ckpt"]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {*best, "last.ckpt"}
    assert metrics["model"] == method and metrics["protocol"] == "strict"
    assert json.loads((folder / "audit.json").read_text())["leaks"] == 0
    mean = metrics["floors"]["mean"]
    if method in NO_SKILL:
        assert metrics["scores"]["pearson_acg"] == 0
    else:
        assert metrics["scores"]["pearson_acg"] > mean["pearson_acg"] + 0.1, "morphology explains a third of the genes"
        if method not in FROM_NOTHING:
            assert metrics["scores"]["mse"] < mean["mse"]

    written = ad.read_h5ad(folder / "predictions.h5ad")
    model, data = reload(cfg, "A", "last.ckpt" if method in CLOSED else "best.ckpt")
    if method in FROM_NOTHING:
        seen = data.target[data.rows("train")].mean(axis=0)
        assert metrics["scores"]["mse"] < ((data.target[data.rows("test")] - seen) ** 2).mean()
    model.k = metrics["chosen"].get("k")  # of a method that retrieves; others have no such attribute to read
    predicted = predict(model, data, "32-true")
    np.testing.assert_allclose(predicted, written.layers["predicted"], rtol=1e-5, atol=1e-5)
    section = written.obs["section"].to_numpy(str)
    rounded = predict(model, data, "bf16-mixed")
    assert np.isfinite(rounded).all()
    if method not in NO_SKILL:
        assert mean_pearson(predicted, rounded, section) > 0.9
    assert np.abs(rounded - predicted).mean() < 0.1 * written.layers["observed"].std()

    if (folder / "embeddings.h5ad").exists():
        again = predict_again(folder, {}, "panel", str(tmp_path / "again"))
        found = ad.read_h5ad(again / "predictions.h5ad").layers["predicted"]
        if model.correction is None:  # which is left out where it is retrieved again
            np.testing.assert_allclose(found, written.layers["predicted"], rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(InputError, match="does not retrieve"):
            predict_again(folder, {}, "panel", None)

    (folder / "predictions.h5ad").unlink()  # as if killed before; the same command goes on from the last epoch
    run(cfg, "A")
    resumed = ad.read_h5ad(folder / "predictions.h5ad")
    np.testing.assert_array_equal(resumed.layers["predicted"], written.layers["predicted"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_runs_under_the_paper_protocol_in_bf16(method: str, demo: Path, tmp_path: Path) -> None:
    short = ["trainer.max_epochs=1", "protocol=paper", "hardware.precision=bf16-mixed"]
    metrics = run(configure(demo, tmp_path / "run", method, *short), "A1")
    assert {path.name for path in (tmp_path / "run").iterdir()} >= RUN_FOLDER
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists(), "no validation, no best"
    assert metrics["protocol"] == "paper" and np.isfinite(metrics["scores"]["mse"])
    assert np.isfinite(ad.read_h5ad(tmp_path / "run" / "predictions.h5ad").layers["predicted"]).all()


@pytest.mark.parametrize("method", METHODS)
def test_config_names_every_argument(method: str) -> None:
    """A yaml is where a method's published values are read: no argument is left to its default in the code."""
    with initialize_config_dir(str(files.CONF), version_base="1.3"):
        node = compose("train", [f"model={method}"]).model
    assert node.name == method
    taken = set(inspect.signature(get_object(node._target_)).parameters)
    assert set(node) - {"_target_", "name"} == taken - {"n_genes", "n_positions", "n_features"}
