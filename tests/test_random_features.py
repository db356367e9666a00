"""The floor on the image encoder at random weights, from the command to the table."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import safetensors.torch
import torch
from demo_run import run
from omegaconf import OmegaConf

from stexp.api.train import train_run
from stexp.config import build, dataset_of
from stexp.data.datamodule import SpotDataModule
from stexp.data.parallel import Background
from stexp.evaluation.metrics import mean_or_none, pearson_per_gene
from stexp.evaluation.ridge import RidgeProbe
from stexp.models.encoders.frozen import FrozenEncoder, random_twins
from stexp.models.encoders.image import ImageEncoder
from stexp.runs.finished import FinishedRun
from stexp.runs.folder import RunFolder
from stexp.runs.rescore import predict_again
from stexp.training.fit import fit
from stexp.training.machine import Machine

CPU = torch.device("cpu")
TINY = {"_target_": "stexp.models.encoders.image.ImageEncoder", "name": "test_resnet", "frozen": True}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.torch.save_file(ImageEncoder("test_resnet", pretrained=False).model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folder(demo: Path, weights: Path, tmp_path_factory) -> Path:
    """A run whose encoder has weights from a file."""
    out = tmp_path_factory.mktemp("runs") / "random"
    encoder = [f"image_encoder.{key}" for key in ("pretrained=true", f"checkpoint={weights}", "frozen=true")]
    run(
        demo,
        out,
        *encoder,
        "data.augmentation=none",
        "hardware.precision=32-true",
        "trainer.max_epochs=1",
        "random_features=2",
    )
    return out


@pytest.fixture(scope="module")
def data(folder: Path) -> SpotDataModule:
    return FinishedRun(RunFolder(folder)).data


@pytest.mark.slow
def test_the_floor_is_the_mean_score_of_a_probe_on_encoders_at_random_weights(folder, data, demo) -> None:
    node = RunFolder(folder).config["image_encoder"]
    train, test, scores = data.rows("train", "validation"), data.rows("test"), []
    for make in random_twins(node, 2):
        data.encoder, data._features = FrozenEncoder(make(), CPU, None, demo / "other"), None
        probe = RidgeProbe.fit(data.tile_features[train], data.target[train].astype(np.float64))
        scores.append(mean_or_none(pearson_per_gene(data.target[test], probe.predict(data.tile_features[test]))))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["floors"]["random_features"]["pearson_acg"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert metrics["floor_spread"]["random_features"]["pearson_acg"] == pytest.approx(np.std(scores, ddof=1), abs=1e-4)
    assert set(metrics["sections"]["A1"]["floors"]) == set(metrics["floors"]) > {"ridge_features", "random_features"}
    assert "random features" in (folder / "report.html").read_text()
    assert "floor_random_features" in (folder / "per_gene.csv").read_text().splitlines()[0]


def test_retrieving_again_has_the_floor_without_the_encoder(folder: Path, tmp_path: Path) -> None:
    again = predict_again(folder, {"k": 5}, "panel", str(tmp_path / "again"))
    before, after = (ad.read_h5ad(path / "floors.h5ad").layers for path in (folder, again))
    assert set(before) == set(after) > {"strict:random_features_seed1"}
    for seed in range(2):
        name = f"strict:random_features_seed{seed}"
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5)


def test_an_encoder_at_random_weights_has_no_other_control(weights: Path, tmp_path: Path) -> None:
    assert random_twins({**TINY, "pretrained": False}, 3) == []
    node = {**TINY, "pretrained": True, "checkpoint": str(weights), "mean": [0.5] * 3, "std": [0.5] * 3}
    own = FrozenEncoder(random_twins(node, 1)[0](), CPU, None, tmp_path, twins=random_twins(node, 2))
    assert len(list(own.at_random_weights())) == 1  # seed 0 is itself
    torch.manual_seed(7)
    keys = [FrozenEncoder(make(), CPU, None, tmp_path).key for make in (*random_twins(node, 2), *random_twins(node, 2))]
    assert keys[:2] == keys[2:] and keys[0] != keys[1]
    assert torch.initial_seed() == 7


@pytest.mark.slow
@pytest.mark.parametrize(("core", "memory"), [(True, 1 << 40), (True, 1 << 10), (False, 1 << 40)])
def test_floors_made_beside_the_training_are_those_made_after_it(core, memory, folder, tmp_path, monkeypatch):
    events = []

    class Noted(Background):
        def __init__(self, work) -> None:
            events.append("background")
            super().__init__(work)

    def noted_fit(*args, **kwargs):
        events.append("fit")
        return fit(*args, **kwargs)

    monkeypatch.setattr(Machine, "leaves_a_core", core)
    monkeypatch.setattr("stexp.api.train.free_memory", lambda: memory)
    monkeypatch.setattr("stexp.api.train.Background", Noted)
    monkeypatch.setattr("stexp.api.train.fit", noted_fit)
    config = {**RunFolder(folder).config, "output_dir": str(tmp_path / "again")}
    config["data"] = {**config["data"], "cache_dir": str(tmp_path / "cache")}  # where none are kept
    cfg = OmegaConf.create(config)
    sections = dataset_of(cfg).read_sections(build(cfg.protocol))
    assert train_run(config, sections) is not None
    assert events == (["background", "fit"] if core and memory > 1 << 20 else ["fit"])
    ours, theirs = (ad.read_h5ad(each / "floors.h5ad") for each in (tmp_path / "again", folder))
    assert set(ours.layers) == set(theirs.layers)
    for name, values in theirs.layers.items():
        np.testing.assert_array_equal(ours.layers[name], values, err_msg=name)
