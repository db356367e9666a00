"""predictions.h5ad: what went in comes out, scanpy plots it, and half a file never stands for a whole one."""

from __future__ import annotations

import json
from dataclasses import asdict

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sections import make_sections

from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.protocol import Protocol

GENES = 70


@pytest.fixture
def made(tmp_path) -> tuple[ad.AnnData, dict, list]:
    """Predictions of sections A1 and B1, the arrays they were made of, and the sections."""
    sections = make_sections(tmp_path, patients=2, per_patient=1, n_spots=9, n_genes=GENES)
    rng = np.random.default_rng(0)
    spots = pd.concat(
        [
            pd.DataFrame(
                {
                    "section": s.name,
                    "patient": s.patient,
                    "spot": s.spots.obs_names.to_numpy(str),
                    "role": "test",
                    "array_x": s.array_xy[:, 0],
                    "array_y": s.array_xy[:, 1],
                    "total_counts": s.total_counts,
                }
            )
            for s in sections
        ]
    )
    spots.index = spots["section"] + ":" + spots["spot"]
    arrays = {name: rng.gamma(2, 1, (len(spots), GENES)) for name in ("observed", "predicted", "counts", "uncertainty")}
    arrays["observed"][:9, 3] = np.nan  # not measured in A1
    arrays["observed"][:, 4] = np.nan  # not measured at all
    arrays |= {
        "xy_px": np.concatenate([s.xy_px for s in sections]),
        "mean_train": rng.random(GENES),
        "embedding": rng.normal(size=(len(spots), 5)),
        "obs": pd.DataFrame({"neighbour_section": "C1", "neighbour_distance": rng.random(len(spots))}),
    }
    adata = predictions.make_predictions(spots, [f"g{i:02d}" for i in range(GENES)], **arrays)
    predictions.add_images(adata, sections, max_px=60)
    adata.uns["stexp"] = {"protocol": json.dumps(asdict(Protocol("strict")))}
    return adata, arrays, sections


def test_what_is_written_is_read(tmp_path, made):
    adata, arrays, sections = made
    predictions.write(adata, tmp_path / "predictions.h5ad")
    again = predictions.read(tmp_path / "predictions.h5ad")
    for name in ("observed", "predicted", "uncertainty", "counts"):
        np.testing.assert_allclose(again.layers[name], arrays[name], rtol=1e-6)
        assert again.layers[name].dtype == np.float32
    np.testing.assert_array_equal(again.X, again.layers["predicted"])
    np.testing.assert_allclose(again.obsm["spatial"], arrays["xy_px"])
    np.testing.assert_allclose(again.obsm["image_embedding"], arrays["embedding"], rtol=1e-6)
    assert list(again.obs_names) == [f"{s.name}:{spot}" for s in sections for spot in s.spots.obs_names]
    assert again.obs["patient"].tolist() == ["A"] * 9 + ["B"] * 9
    assert again.obs["neighbour_section"].tolist() == ["C1"] * 18
    np.testing.assert_allclose(again.obs["neighbour_distance"], arrays["obs"]["neighbour_distance"])
    np.testing.assert_array_equal(again.obs["total_counts"], np.concatenate([s.total_counts for s in sections]))
    assert predictions.protocol_of(again) == Protocol("strict")
    assert not list(tmp_path.glob(".*"))


def test_highest_genes_are_flagged_by_training_and_by_test_spots(made):
    adata, arrays, _ = made
    train = set(np.argsort(-arrays["mean_train"])[:50])
    assert set(np.flatnonzero(adata.var["heg50_train"])) == train
    measured = [column[~np.isnan(column)] for column in arrays["observed"].T]
    mean = np.array([column.mean() if len(column) else -1 for column in measured])
    assert set(np.flatnonzero(adata.var["heg50_test"])) == set(np.argsort(-mean)[:50])
    assert not adata.var["heg50_test"].iloc[4]


def test_without_spread_the_layer_is_there_and_empty(made):
    adata, arrays, _ = made
    spots = adata.obs
    del arrays["uncertainty"], arrays["obs"], arrays["embedding"]
    plain = predictions.make_predictions(spots, list(adata.var_names), **arrays)
    assert np.isnan(plain.layers["uncertainty"]).all() and plain.layers["uncertainty"].shape == plain.shape
    assert "image_embedding" not in plain.obsm


def test_images_lie_under_the_spots(made):
    adata, _, sections = made
    assert set(adata.uns["spatial"]) == {"A1", "B1"}
    for section in sections:
        entry = adata.uns["spatial"][section.name]
        image, scale = entry["images"]["hires"], entry["scalefactors"]["tissue_hires_scalef"]
        assert image.dtype == np.uint8 and max(image.shape[:2]) == 60 and image.shape[2] == 3
        xy = adata.obsm["spatial"][adata.obs["section"] == section.name] * scale
        assert (xy >= 0).all() and (xy < image.shape[1::-1]).all()
        # spots do not overlap: 100 um would be 200 px here, they are less apart
        apart = np.linalg.norm(section.xy_px[:, None] - section.xy_px, axis=-1) + 1e9 * np.eye(len(section))
        assert 0 < entry["scalefactors"]["spot_diameter_fullres"] <= np.median(apart.min(axis=1)) + 1e-9


@pytest.mark.filterwarnings("ignore")
def test_scanpy_plots_a_gene_over_the_image(tmp_path, made):
    import matplotlib

    matplotlib.use("Agg")
    import scanpy as sc

    adata, _, sections = made
    predictions.write(adata, tmp_path / "predictions.h5ad")
    again = sc.read_h5ad(tmp_path / "predictions.h5ad")
    one = again[again.obs["section"] == "B1"].copy()
    (axis,) = sc.pl.spatial(one, library_id="B1", color="g07", layer="predicted", show=False)
    (drawn,) = axis.images
    height, width = again.uns["spatial"]["B1"]["images"]["hires"].shape[:2]
    assert drawn.get_array().shape[:2] == (height, width)
    circles = axis.collections[0]
    assert len(circles.get_paths()) == len(sections[1])
    np.testing.assert_allclose(np.sort(circles.get_array()), np.sort(one.layers["predicted"][:, 7]), rtol=1e-6)
    matplotlib.pyplot.close("all")


def test_half_a_file_never_has_the_name_of_a_whole_one(tmp_path, made, monkeypatch):
    adata, _, _ = made
    path = tmp_path / "predictions.h5ad"

    def full_disk(file, *_, **__):
        file["half"] = 1
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ad.io, "write_elem", full_disk)
        with pytest.raises(OSError, match=r"No space left.*/predictions\.h5ad"):
            predictions.write(adata, path)
    assert not list(tmp_path.glob(".*"))
    assert not path.exists()
    with pytest.raises(InputError, match="does not exist: the run has not got that far"):
        predictions.read(path)
    predictions.write(adata, path)
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ad.io, "write_elem", full_disk)
        with pytest.raises(OSError, match="No space left"):
            predictions.write(adata[:3].copy(), path)
    assert path.read_bytes() == whole
    predictions.write(adata, path)  # over what the failed write left behind
    assert predictions.read(path).shape == adata.shape and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda _: b"", lambda _: b"not hdf5"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, made, damage):
    path = tmp_path / "predictions.h5ad"
    predictions.write(made[0], path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"predictions.h5ad cannot be read: .*; delete it and give the comm") as caught:
        predictions.read(path)
    assert "\n" not in str(caught.value)


def test_what_a_file_lacks_is_named(tmp_path, made):
    path = tmp_path / "predictions.h5ad"
    predictions.write(made[0], path)
    needs = ("layers/counts", "obs/section", "obsm/spatial", "uns/stexp/protocol", "uns/spatial/A1/images")
    assert predictions.read(path, *needs).shape == made[0].shape
    lacks = ("layers/count", "obs/sections", "obsm/pca", "uns/stexp/fold", "uns/spatial/A1/images/lowres", "uns/x/y")
    with pytest.raises(InputError, match=f"predictions.h5ad has no {', '.join(lacks)}, .*; delete it"):
        predictions.read(path, *needs, *lacks)


@pytest.fixture
def recorded(tmp_path, made):
    """A run folder whose record holds the digest of its predictions."""
    adata, *_ = made
    predictions.write(adata, tmp_path / "predictions.h5ad")
    (tmp_path / "provenance.json").write_text(json.dumps({predictions.DIGEST: predictions.digest(adata)}))
    return tmp_path


def test_predictions_as_they_were_written_have_not_changed(recorded):
    assert not predictions.changed_since_run(recorded)
    adata = predictions.read(recorded / "predictions.h5ad")
    adata.layers["predicted"] = np.asfortranarray(adata.layers["predicted"])  # the same values, laid out otherwise
    adata.obs["domain"] = "1"
    adata.layers["uncertainty"] += 1
    predictions.write(adata, recorded / "predictions.h5ad")
    assert not predictions.changed_since_run(recorded)


@pytest.mark.parametrize("what", ["value", "spot", "gene", "order"])
def test_changed_predictions_are_seen(recorded, what):
    adata = predictions.read(recorded / "predictions.h5ad")
    if what == "value":
        adata.layers["predicted"][3, 4] = np.nextafter(adata.layers["predicted"][3, 4], np.float32(9))
    elif what == "spot":
        adata.obs_names = ["x", *adata.obs_names[1:]]
    elif what == "gene":
        adata.var_names = ["x", *adata.var_names[1:]]
    else:
        adata = adata[:, ::-1].copy()
    predictions.write(adata, recorded / "predictions.h5ad")
    assert predictions.changed_since_run(recorded)


def test_runs_of_before_without_a_record_are_not_judged(recorded):
    (recorded / "provenance.json").write_text("{}")
    assert not predictions.changed_since_run(recorded)
    (recorded / "provenance.json").unlink()
    assert not predictions.changed_since_run(recorded)
