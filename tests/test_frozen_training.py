"""Training on the cached features of a frozen encoder equals running it."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from demo_run import run

from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.encoders.frozen import FrozenEncoder
from stexp.models.encoders.image import ImageEncoder

FROZEN = ("image_encoder.frozen=true", "data.augmentation=none", "hardware.precision=32-true")
METHODS = {
    "mclstexp": [],
    "bleep": ["model=bleep"],
    "stnet": ["model=stnet", "model.input_scale=image_encoder", "model.symmetries=false", "model.lr=1e-4"],
    "sepal": ["model=sepal", "model.image_epochs=1", "model.lr=1e-3"],
}


def losses(folder: Path) -> np.ndarray:
    table = pd.read_csv(next(folder.glob("logs/csv/*/metrics.csv")))
    return table.filter(regex="^train/(loss|mse)").max(axis=1).dropna().to_numpy()


def predicted(folder: Path) -> np.ndarray:
    return np.asarray(ad.read_h5ad(folder / "predictions.h5ad").layers["predicted"])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_features_in_place_of_tiles_change_nothing(name: str, demo: Path, tmp_path: Path, monkeypatch) -> None:
    run(demo, tmp_path / "features", *FROZEN, *METHODS[name])
    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "is_of", lambda self, encoder: False)
        run(demo, tmp_path / "tiles", *FROZEN, *METHODS[name])
    assert len(losses(tmp_path / "tiles")) > 2
    np.testing.assert_allclose(losses(tmp_path / "features"), losses(tmp_path / "tiles"), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(predicted(tmp_path / "features"), predicted(tmp_path / "tiles"), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_encoder_does_not_run_where_its_features_are_kept(demo: Path, tmp_path: Path, monkeypatch) -> None:
    run(demo, tmp_path / "first", *FROZEN)

    monkeypatch.setattr(ImageEncoder, "forward", lambda *_: pytest.fail("the encoder runs"))
    monkeypatch.setattr("stexp.data.datamodule.augment", lambda *_: pytest.fail("tiles are gathered for a batch"))
    run(demo, tmp_path / "again", *FROZEN)
    assert np.array_equal(predicted(tmp_path / "again"), predicted(tmp_path / "first"))


@pytest.mark.slow
def test_an_encoder_of_other_weights_runs_itself(demo: Path, tmp_path: Path, monkeypatch) -> None:
    seen, serve = [], SpotDataModule.batch
    init = ImageEncoder.__init__

    def another(self, *args, **kwargs):
        init(self, *args, **kwargs)
        with torch.no_grad():
            next(self.parameters()).add_(len(made) * 0.1)
        made.append(self)

    def watch(self, index, device="cpu"):
        batch = serve(self, index, device)
        seen.append(index.image and batch.image is None)
        return batch

    made: list[ImageEncoder] = []
    monkeypatch.setattr(ImageEncoder, "__init__", another)
    monkeypatch.setattr(SpotDataModule, "batch", watch)
    run(demo, tmp_path / "run", *FROZEN, "trainer.max_epochs=1")
    assert len(made) == 2 and not any(seen)


@pytest.mark.slow
def test_augmented_views_are_drawn_by_seed_and_kept(demo: Path, tmp_path: Path, monkeypatch) -> None:
    views = ("image_encoder.frozen=true", "data.augmentation=dihedral", "data.views=3")
    run(demo, tmp_path / "first", *views)
    monkeypatch.setattr(ImageEncoder, "forward", lambda *_: pytest.fail("the encoder runs"))
    run(demo, tmp_path / "again", *views)
    assert np.array_equal(losses(tmp_path / "first"), losses(tmp_path / "again"))
    run(demo, tmp_path / "plain", "image_encoder.frozen=true", "data.augmentation=none")
    assert not np.allclose(losses(tmp_path / "first"), losses(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.views=2"], r"data\.views=2.*image_encoder\.frozen=true"),
        (["data.views=2", "image_encoder.frozen=true", "model=stnet"], r"data\.views=2.*model\.symmetries=false"),
        (["data.views=2", "image_encoder.frozen=true", "data.augmentation=none"], r"data\.augmentation=none"),
    ],
)
def test_views_that_nothing_would_read_are_refused(overrides, message, demo: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run(demo, tmp_path / "run", *overrides)
