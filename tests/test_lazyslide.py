"""A model inside LazySlide: as its tile prediction calls it, and by that itself where it is installed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from exported_model import PANEL, exported, finished_run, slide
from PIL import Image

import stexp
from stexp.data.slides.slide import Slide
from stexp.errors import InputError
from stexp.inference.export import export
from stexp.inference.lazyslide import TilePredictor

CENTRES = np.array([[150, 160], [260, 200], [300, 330]])
SIDE = 96  # pixels of 1.25 um: 120 um


@pytest.fixture(scope="module")
def model():
    return stexp.load_model(exported())


def cut(place: np.ndarray) -> np.ndarray:
    """A tile as LazySlide cuts it: read at level 0 and resized."""
    x, y = place - SIDE // 2
    return np.asarray(Image.fromarray(Slide(slide()).read_region(x, y, SIDE, SIDE)).resize((64, 64), Image.BILINEAR))


def by_lazyslide(predictor: TilePredictor, tiles: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What ``tile_prediction`` does with a model, on one batch."""
    transform = predictor.to("cpu").get_transform()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        return predictor.predict(torch.utils.data.default_collate([transform(tile) for tile in tiles]))


def test_tiles_of_lazyslide_are_predicted_as_by_the_model(model):
    predictor = TilePredictor(model)
    assert predictor.tiles == {"tile_px": 64, "mpp": 120 / 64} and len(predictor.columns) == PANEL
    out = by_lazyslide(predictor, [cut(place) for place in CENTRES])
    assert tuple(out) == predictor.columns
    own = model.predict(slide(), um_per_px=1.25, coordinates=CENTRES, device="cpu", progress=False)
    np.testing.assert_allclose(np.column_stack(list(out.values())), own.X, atol=0.02)  # resampled by others
    assert np.ptp(own.X, axis=0).max() > 0.1


def test_genes_are_chosen_and_refused_as_in_predict(model):
    outside = next(gene for gene in model.genes.index if gene not in model.panel)
    assert TilePredictor(model, [outside]).columns == (outside,)
    assert len(TilePredictor(model, "all").columns) == len(model.genes)
    with pytest.raises(InputError, match=r"are not among the 200"):
        TilePredictor(model, ["NOGENE"])


def test_tiles_of_another_size_are_refused_with_what_would_fit(model):
    with pytest.raises(InputError, match=r"tile_tissues\(wsi, 64, mpp=1.875\)"):
        TilePredictor(model).tile(np.zeros((224, 224, 3), np.uint8))


@pytest.mark.slow
def test_a_model_that_normalises_stain_is_refused(tmp_path):
    run = finished_run("model=hest_ridge", "data.stain=macenko")
    export(run, tmp_path / "m")
    with pytest.raises(InputError, match=r"LazySlide hands over tiles; model.predict\(slide\)"):
        TilePredictor(stexp.load_model(tmp_path / "m"))


def test_a_method_that_predicts_tiles_together_is_refused():
    facts = {"stain": None, "method": "consensus"}
    model = SimpleNamespace(facts=facts, bank=None, panel=["g"], method=SimpleNamespace(together=True))
    with pytest.raises(InputError, match=r"consensus .* together.* would fit"):
        TilePredictor(model)


def test_lazyslide_itself_predicts_with_it(model, tmp_path):
    lazyslide, wsidata = pytest.importorskip("lazyslide"), pytest.importorskip("wsidata")
    from lazyslide_models import TilePredictionModelProtocol

    predictor = TilePredictor(model, model.panel[:3])
    assert isinstance(predictor, TilePredictionModelProtocol)
    path = tmp_path / "slide.tif"
    per_cm = (10_000 / 1.25, 10_000 / 1.25)  # pixels
    tifffile.imwrite(path, Slide(slide()).read(), tile=(256, 256), resolution=per_cm, resolutionunit="CENTIMETER")
    wsi = wsidata.open_wsi(path)
    wsi.set_mpp(1.25)
    lazyslide.pp.find_tissues(wsi)
    lazyslide.pp.tile_tissues(wsi, **predictor.tiles)
    lazyslide.tl.tile_prediction(wsi, predictor, pbar=False, device="cpu")
    tiles = wsi.shapes["tiles"]
    assert len(tiles) > 10
    bounds = tiles.bounds.to_numpy()
    centres = (bounds[:, :2] + bounds[:, 2:]) / 2
    own = model.predict(path, coordinates=centres, um_per_px=1.25, genes=model.panel[:3], progress=False)
    for gene in predictor.columns:  # LazySlide reduces tiles by another filter
        assert np.corrcoef(tiles[gene], own[:, gene].X.ravel())[0, 1] > 0.9
