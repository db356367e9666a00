"""Models that an earlier version exported load, and predict what that version predicted.

``kept/mclstexp`` and ``kept/stnet`` were trained and exported by stexp 0.1.0 at commit f809c3b, on the demo;
``kept/predicted.npz`` holds what that commit predicted on `slide`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stexp import load_model

KEPT = Path(__file__).parent / "kept"
PLACES = np.array([[x, y] for y in (100, 200, 300) for x in (80.5, 160, 240, 320)])


def slide(folder: Path) -> Path:
    """A made-up slide of 400 x 400 px: coarse and fine blocks of the colours of H&E."""
    rng = np.random.default_rng(0)
    coarse = np.kron(rng.integers(0, 2, (20, 20, 1)), np.ones((20, 20, 1), int))
    fine = np.kron(rng.integers(0, 60, (100, 100, 1)), np.ones((4, 4, 1), int))
    pixels = np.array([150, 90, 150]) + coarse * np.array([70, 60, 40]) - fine
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "kept.png")
    return folder / "kept.png"


@pytest.mark.parametrize("name", ["mclstexp", "stnet"])
def test_a_model_of_an_earlier_version_predicts_the_same_numbers(tmp_path, name):
    before = np.load(KEPT / "predicted.npz")
    genes = "all" if name == "mclstexp" else "panel"
    adata = load_model(KEPT / name).predict(
        slide(tmp_path), um_per_px=2.0, coordinates=PLACES, genes=genes, device="cpu", progress=False
    )
    assert list(adata.var_names) == list(before[f"{name}_genes"])
    for layer in ("predicted", "uncertainty", "lower", "upper"):
        np.testing.assert_allclose(adata.layers[layer], before[f"{name}_{layer}"], rtol=1e-4, atol=1e-5)
    assert np.ptp(adata.X, axis=0).max() > 0.01, "the tiles make a difference"
