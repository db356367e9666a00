"""Two predictions of the same spots, held against each other."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.image import imread
from predicted import predicted

from stexp.errors import InputError
from stexp.reporting.differences import compare, draw


def test_spots_and_genes_are_matched_by_name():
    first = predicted()
    second = predicted(name="other")[::-1, ["G5", "G2", "G0"]].copy()
    second.layers["predicted"][:, 1] += 0.5
    table, maps = compare(first, second)
    assert list(maps.var_names) == ["G0", "G2", "G5"] and list(maps.obs_names) == list(first.obs_names)
    np.testing.assert_allclose(maps.X, np.tile([0, -0.5, 0], (first.n_obs, 1)), atol=1e-6)
    row = table.set_index("gene").loc["G2"]
    assert table["gene"].iloc[0] == "G2" and row["section"] == "slide"
    assert row["difference"] == pytest.approx(-0.5, abs=1e-6) and row["rmsd"] == pytest.approx(0.5, abs=1e-6)
    assert row["other_mean"] - row["mean"] == pytest.approx(0.5, abs=1e-6)
    np.testing.assert_allclose(table["pearson"], 1, atol=1e-6)


def test_with_a_truth_both_are_scored():
    first, second = predicted(), predicted()
    first.layers["observed"] = second.layers["predicted"].copy()
    first.layers["predicted"] = np.random.default_rng(5).normal(size=first.shape).astype(np.float32)
    table, _ = compare(first, second)
    np.testing.assert_allclose(table["other_pearson_observed"], 1, atol=1e-6)
    expected = [np.corrcoef(first[:, g].layers["predicted"].T, second[:, g].X.T)[0, 1] for g in table["gene"]]
    np.testing.assert_allclose(table["pearson_observed"], expected, atol=1e-5)
    np.testing.assert_allclose(table["pearson"], expected, atol=1e-5)


def test_what_cannot_be_compared_is_refused():
    first = predicted()
    with pytest.raises(InputError, match="spots of one name are up to 40 px apart"):
        moved = predicted()
        moved.obsm["spatial"] = moved.obsm["spatial"] + [40, 0]
        compare(first, moved)
    with pytest.raises(InputError, match="0 genes in common"):
        other = predicted()
        other.var_names = other.var_names + "x"
        compare(first, other)
    with pytest.raises(InputError, match="different scales"):
        other = predicted()
        protocol = json.loads(other.uns["stexp"]["protocol"]) | {"log": "log10"}
        other.uns["stexp"]["protocol"] = json.dumps(protocol)
        compare(first, other)


def test_the_maps_are_drawn(tmp_path):
    first, second = predicted(), predicted(seed=1)
    table, maps = compare(first, second)
    picture = imread(draw(table, maps, tmp_path / "differences.png"))
    assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.05
